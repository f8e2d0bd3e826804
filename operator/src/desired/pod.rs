//! The pod of a replica: the cache daemon as a native sidecar, the runtime, and their volumes.
//!
//! Why it looks as it does:
//! - The daemon is an init container with `restartPolicy: Always`: it starts before the runtime and
//!   ends after it, so that the last blocks of a turn still find it.
//! - The daemon has no readiness probe: a dead daemon costs cache hits, never the route to the pod.
//! - It passes Pod Security "restricted", and neither container may write anywhere but to its
//!   volumes.
//! - Both containers end their termination message with what they wrote last: the sentence on
//!   stderr with which a program refuses to start becomes the model's condition.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, EmptyDirVolumeSource, HTTPGetAction, ImageVolumeSource,
    LocalObjectReference, PersistentVolumeClaimVolumeSource, Pod, PodSecurityContext, PodSpec,
    Probe, ResourceRequirements, SeccompProfile, SecurityContext, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::arguments::{self, DaemonPlaces, RuntimePlaces};
use super::{Images, ReplicaIndex, claim_name, memory, metadata, pod_name};
use crate::api::{ByteSize, ConversationModel};

/// Name of the runtime's container.
pub const RUNTIME: &str = "runtime";
/// Name of the cache daemon's container.
pub const CACHE_DAEMON: &str = "cache-daemon";
/// Name of the runtime's API port.
pub const RUNTIME_PORT_NAME: &str = "http";
/// Annotation with the digest of everything below the pod's `spec`: a pod whose digest is not the
/// wanted one is replaced.
pub const ANNOTATION_TEMPLATE: &str = "colloquy.dev/template-hash";

const RUNTIME_PORT: i32 = 8000;
const DAEMON_PORT: i32 = 9100;
const DAEMON_PORT_NAME: &str = "cache-http";
const RUN_DIR: &str = "/run/kv";
const SOCKET: &str = "/run/kv/daemon.sock";
const DISK_DIR: &str = "/var/lib/kv";
const MODELS_DIR: &str = "/models";

/// The user of the program images; the volumes' group as well, so that both containers can use the
/// socket and the daemon its disk.
const USER: i64 = 65_532;

/// The daemon faults its region before it has started, the runtime loads weights and may learn its
/// skip set: ten minutes, asked every second, so that a small model is routable at once.
const STARTUP_PERIOD_SECONDS: i32 = 1;
const STARTUP_FAILURES: i32 = 600;

/// A daemon is ended only after 100 s of silence: a restart costs the host tier, waiting costs a few
/// misses.
const ALIVE_PERIOD_SECONDS: i32 = 10;
const ALIVE_FAILURES: i32 = 10;

/// CPU requested for the daemon. It mostly waits; no limit, as a throttled daemon makes late blocks.
const DAEMON_CPU_MILLI: u32 = 50;

/// The pod `<model>-<index>`.
pub fn pod(model: &ConversationModel, index: ReplicaIndex, images: &Images) -> Pod {
    let spec = pod_spec(model, index, images);
    let mut metadata = metadata(model, pod_name(&model.name_any(), index), Some(index));
    metadata.annotations = Some(BTreeMap::from([
        (ANNOTATION_TEMPLATE.to_owned(), digest(&spec)),
        // What `kubectl logs` and `exec` mean when no container is named.
        ("kubectl.kubernetes.io/default-container".to_owned(), RUNTIME.to_owned()),
    ]));
    Pod { metadata, spec: Some(spec), status: None }
}

/// Digest of a pod's spec: the first 16 hex digits of BLAKE3 over its JSON. Fields are written in
/// declaration order and maps are sorted, so equal specs have equal digests in every build.
fn digest(spec: &PodSpec) -> String {
    let json = serde_json::to_vec(spec).expect("a pod spec is JSON");
    blake3::hash(&json).to_hex()[..16].to_owned()
}

fn pod_spec(model: &ConversationModel, index: ReplicaIndex, images: &Images) -> PodSpec {
    let template = &model.spec.pod_template;
    PodSpec {
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(template.termination_grace_period_seconds.into()),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            fs_group_change_policy: Some("OnRootMismatch".into()),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".into(),
                localhost_profile: None,
            }),
            ..PodSecurityContext::default()
        }),
        init_containers: model.spec.cache.enabled.then(|| vec![cache_daemon(model, images)]),
        containers: vec![runtime(model, images)],
        volumes: Some(volumes(model, index, images)),
        node_selector: none_if_empty(template.node_selector.clone(), BTreeMap::is_empty),
        tolerations: none_if_empty(template.tolerations.clone(), Vec::is_empty),
        priority_class_name: template.priority_class_name.clone(),
        image_pull_secrets: none_if_empty(
            template
                .image_pull_secrets
                .iter()
                .map(|name| LocalObjectReference { name: name.clone() })
                .collect(),
            Vec::is_empty,
        ),
        ..PodSpec::default()
    }
}

fn cache_daemon(model: &ConversationModel, images: &Images) -> Container {
    let http = format!("0.0.0.0:{DAEMON_PORT}");
    let places = DaemonPlaces { socket: SOCKET, disk_dir: DISK_DIR, http: &http };
    Container {
        name: CACHE_DAEMON.into(),
        image: Some(model.spec.cache.image.clone().unwrap_or(images.cache_daemon.clone())),
        restart_policy: Some("Always".into()), // In an init container: a native sidecar.
        args: Some(arguments::daemon(&model.spec, places)),
        ports: Some(vec![port(DAEMON_PORT_NAME, DAEMON_PORT)]),
        startup_probe: Some(startup_probe("/started", DAEMON_PORT_NAME)),
        liveness_probe: Some(Probe {
            period_seconds: Some(ALIVE_PERIOD_SECONDS),
            failure_threshold: Some(ALIVE_FAILURES),
            timeout_seconds: Some(5),
            ..http_probe("/alive", DAEMON_PORT_NAME)
        }),
        resources: Some(resources(DAEMON_CPU_MILLI, memory::daemon_limit(&model.spec))),
        volume_mounts: Some(vec![mount("run", RUN_DIR), mount("kv", DISK_DIR)]),
        ..container(images)
    }
}

fn runtime(model: &ConversationModel, images: &Images) -> Container {
    let http = format!("0.0.0.0:{RUNTIME_PORT}");
    let claim = model.spec.model.persistent_volume_claim.as_ref();
    let models = match claim.and_then(|claim| claim.path.as_deref()) {
        Some(path) => format!("{MODELS_DIR}/{path}"),
        None => MODELS_DIR.into(),
    };
    let places = RuntimePlaces { model: &models, cache_socket: SOCKET, http: &http };
    let settings = &model.spec.runtime;
    Container {
        name: RUNTIME.into(),
        image: Some(settings.image.clone().unwrap_or(images.runtime.clone())),
        args: Some(literal(arguments::runtime(&model.spec, places))),
        ports: Some(vec![port(RUNTIME_PORT_NAME, RUNTIME_PORT)]),
        startup_probe: Some(startup_probe("/health", RUNTIME_PORT_NAME)),
        readiness_probe: Some(Probe {
            period_seconds: Some(5),
            failure_threshold: Some(3),
            timeout_seconds: Some(2),
            ..http_probe("/health", RUNTIME_PORT_NAME)
        }),
        resources: Some(resources(settings.cpu_milli, memory::runtime_limit(&model.spec))),
        volume_mounts: Some(
            model
                .spec
                .cache
                .enabled
                .then(|| mount("run", RUN_DIR))
                .into_iter()
                .chain([VolumeMount { read_only: Some(true), ..mount("model", MODELS_DIR) }])
                .collect(),
        ),
        ..container(images)
    }
}

/// Arguments as they are: Kubernetes would put variables' values in the place of `$(NAME)`, and a declared
/// prompt may say that.
fn literal(arguments: Vec<String>) -> Vec<String> {
    arguments.into_iter().map(|argument| argument.replace('$', "$$")).collect()
}

/// What both containers have in common.
fn container(images: &Images) -> Container {
    Container {
        image_pull_policy: Some(images.pull_policy.clone()),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { add: None, drop: Some(vec!["ALL".into()]) }),
            ..SecurityContext::default()
        }),
        ..Container::default()
    }
}

fn volumes(model: &ConversationModel, index: ReplicaIndex, images: &Images) -> Vec<Volume> {
    let of_cache = model.spec.cache.enabled.then(|| cache_volumes(model, index));
    of_cache.into_iter().flatten().chain([weights(model, images)]).collect()
}

/// Where daemon and runtime meet, and the disk tier.
fn cache_volumes(model: &ConversationModel, index: ReplicaIndex) -> [Volume; 2] {
    [
        Volume {
            name: "run".into(),
            empty_dir: Some(EmptyDirVolumeSource {
                medium: Some("Memory".into()),
                size_limit: Some(memory::RUN_VOLUME.quantity()),
                ..EmptyDirVolumeSource::default()
            }),
            ..Volume::default()
        },
        Volume {
            name: "kv".into(),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim_name(&model.name_any(), index),
                read_only: None,
            }),
            ..Volume::default()
        },
    ]
}

/// The volume of the weights. The CRD's rules allow exactly one source; an object written before a
/// rule existed might name both, then the image wins.
fn weights(model: &ConversationModel, images: &Images) -> Volume {
    let source = &model.spec.model;
    let claim = source.persistent_volume_claim.as_ref();
    Volume {
        name: "model".into(),
        image: source.image.as_ref().map(|reference| ImageVolumeSource {
            reference: Some(reference.clone()),
            pull_policy: Some(images.pull_policy.clone()),
        }),
        persistent_volume_claim: claim.filter(|_| source.image.is_none()).map(|claim| {
            PersistentVolumeClaimVolumeSource {
                claim_name: claim.claim_name.clone(),
                read_only: Some(true),
            }
        }),
        ..Volume::default()
    }
}

fn port(name: &str, number: i32) -> ContainerPort {
    ContainerPort {
        name: Some(name.into()),
        container_port: number,
        protocol: Some("TCP".into()),
        ..ContainerPort::default()
    }
}

fn http_probe(path: &str, port: &str) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.into()),
            port: IntOrString::String(port.into()),
            ..HTTPGetAction::default()
        }),
        ..Probe::default()
    }
}

fn startup_probe(path: &str, port: &str) -> Probe {
    Probe {
        period_seconds: Some(STARTUP_PERIOD_SECONDS),
        failure_threshold: Some(STARTUP_FAILURES),
        timeout_seconds: Some(1),
        ..http_probe(path, port)
    }
}

/// Memory is requested in full, as the region is faulted at start; CPU has no limit.
fn resources(cpu_milli: u32, memory: ByteSize) -> ResourceRequirements {
    let memory = || ("memory".to_owned(), memory.quantity());
    ResourceRequirements {
        requests: Some(BTreeMap::from([
            ("cpu".to_owned(), Quantity(format!("{cpu_milli}m"))),
            memory(),
        ])),
        limits: Some(BTreeMap::from([memory()])),
        claims: None,
    }
}

fn mount(name: &str, path: &str) -> VolumeMount {
    VolumeMount { name: name.into(), mount_path: path.into(), ..VolumeMount::default() }
}

fn none_if_empty<T>(value: T, is_empty: impl Fn(&T) -> bool) -> Option<T> {
    (!is_empty(&value)).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    fn template(model: &ConversationModel) -> String {
        let pod = pod(model, ReplicaIndex(0), &fixtures::images());
        pod.annotations()[ANNOTATION_TEMPLATE].clone()
    }

    #[test]
    fn a_spec_change_that_reaches_the_pod_changes_its_digest_and_nothing_else_does() {
        let before = fixtures::model();
        let mut after = before.clone();
        after.spec.replicas = 5;
        after.spec.cache.disk.when_scaled_down = crate::api::ScaleDownVolume::Delete;
        assert_eq!(template(&before), template(&after));
        after.spec.ada_skip.decode.sublayers = 4;
        assert_ne!(template(&before), template(&after));
    }

    /// `COLLOQUY_BLESS=1 cargo test -p operator golden` writes the file anew; review the diff, for
    /// every pod of every installation is replaced when it changes.
    #[test]
    fn the_golden_pod_is_the_committed_one() {
        let pod = pod(&fixtures::model(), ReplicaIndex(0), &fixtures::images());
        let yaml = serde_yaml::to_string(&pod).unwrap();
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/pod.yaml");
        if std::env::var_os("COLLOQUY_BLESS").is_some() {
            std::fs::create_dir_all(std::path::Path::new(file).parent().unwrap()).unwrap();
            std::fs::write(file, &yaml).unwrap();
        }
        let committed = std::fs::read_to_string(file).unwrap_or_default();
        assert!(committed == yaml, "{file} differs; see this test's comment\n{yaml}");
    }

    #[test]
    fn with_the_cache_off_the_pod_is_the_runtime_and_its_weights() {
        let mut model = fixtures::model();
        model.spec.cache.enabled = false;
        let spec = pod(&model, ReplicaIndex(0), &fixtures::images()).spec.unwrap();
        assert_eq!(spec.init_containers, None);
        let names = |volumes: Vec<Volume>| volumes.into_iter().map(|volume| volume.name);
        assert_eq!(names(spec.volumes.unwrap()).collect::<Vec<_>>(), ["model"]);
        let [runtime] = &spec.containers[..] else { panic!("one container") };
        let mounts = runtime.volume_mounts.iter().flatten().map(|mount| mount.name.as_str());
        assert_eq!(mounts.collect::<Vec<_>>(), ["model"]);
    }

    #[test]
    fn a_shared_prefix_reaches_the_runtime_as_it_was_written() {
        let mut model = fixtures::model();
        let system = "It costs $5, or $(PRICE).".to_owned();
        model.spec.cache.shared_prefixes = vec![crate::api::SharedPrefix { system }];
        let spec = pod(&model, ReplicaIndex(0), &fixtures::images()).spec.unwrap();
        let arguments = spec.containers[0].args.clone().unwrap();
        // As Kubernetes expands it: two dollars are one, and begin no variable.
        let last = arguments.last().unwrap();
        assert_eq!(last, "--shared-prefix=It costs $$5, or $$(PRICE).");
    }

    #[test]
    fn weights_come_from_the_claim_when_the_spec_names_one() {
        let mut model = fixtures::model();
        model.spec.model.image = None;
        model.spec.model.persistent_volume_claim = Some(crate::api::ModelClaim {
            claim_name: "weights".into(),
            path: Some("q4/model.gguf".into()),
        });
        let pod = pod(&model, ReplicaIndex(0), &fixtures::images());
        let spec = pod.spec.unwrap();
        let arguments = spec.containers[0].args.clone().unwrap();
        assert!(arguments.contains(&"/models/q4/model.gguf".to_owned()));
        let volume = spec.volumes.unwrap().into_iter().find(|volume| volume.name == "model");
        assert_eq!(volume.unwrap().persistent_volume_claim.unwrap().claim_name, "weights");
    }
}
