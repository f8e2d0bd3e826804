//! The local Kubernetes of `tests/cluster/`, as a test sees it: apply, look, wait, delete.
//!
//! It speaks to the API server as a person with `kubectl` would: custom resources are plain YAML, not
//! the operator's types, so that a test also notices when those types and the CRD part.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ContainerState, Pod};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::discovery::{Scope, pinned_kind};
use kube::{Client, Config, ResourceExt};
use serde_json::Value;

use crate::progress::Progress;

/// How often something that is waited for is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Under this name server-side apply keeps what a test or the demonstration sets.
const FIELD_MANAGER: &str = "colloquy-tests";

/// The folder of the local Kubernetes.
pub fn cluster_dir() -> PathBuf {
    let cache = std::env::var_os("COLLOQUY_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/colloquy"),
        PathBuf::from,
    );
    std::env::var_os("COLLOQUY_CLUSTER_DIR").map_or_else(|| cache.join("cluster"), PathBuf::from)
}

/// The checkout.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the checkout")
}

/// A connection to the API server, as administrator.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
}

impl Cluster {
    /// Connects by the kubeconfig that `tests/cluster/up` wrote.
    pub async fn connect() -> anyhow::Result<Self> {
        let path = cluster_dir().join("admin.kubeconfig");
        let kubeconfig = Kubeconfig::read_from(&path)
            .with_context(|| format!("{} (start it: tests/cluster/up)", path.display()))?;
        let mut config =
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        config.proxy_url = None; // The API server is on this machine, whatever the environment says.
        Ok(Self { client: Client::try_from(config)? })
    }

    /// Typed access to the pods of a namespace.
    pub fn pods(&self, namespace: &str) -> Api<Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Typed access to any kind that lives in namespaces.
    pub fn namespaced<K>(&self, namespace: &str) -> Api<K>
    where
        K: kube::Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Typed access to any kind that lives outside namespaces.
    pub fn cluster_wide<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = ()>,
    {
        Api::all(self.client.clone())
    }

    /// Untyped access to a kind, in a namespace if it lives in one.
    pub async fn api(
        &self,
        kind: &GroupVersionKind,
        namespace: &str,
    ) -> anyhow::Result<Api<DynamicObject>> {
        let (resource, capabilities) =
            pinned_kind(&self.client, kind).await.with_context(|| format!("the kind {kind:?}"))?;
        Ok(self.dynamic(&resource, &capabilities.scope, namespace))
    }

    fn dynamic(
        &self,
        resource: &ApiResource,
        scope: &Scope,
        namespace: &str,
    ) -> Api<DynamicObject> {
        match scope {
            Scope::Cluster => Api::all_with(self.client.clone(), resource),
            Scope::Namespaced => Api::namespaced_with(self.client.clone(), namespace, resource),
        }
    }

    /// Applies one object on the server side, refusing unknown fields as `kubectl` does.
    pub async fn apply(&self, object: &Value) -> anyhow::Result<DynamicObject> {
        let object: DynamicObject = serde_json::from_value(object.clone())?;
        let types = object.types.as_ref().context("an object without apiVersion and kind")?;
        let kind = GroupVersionKind::try_from(types)?;
        let namespace = object.namespace().unwrap_or_else(|| "default".into());
        let api = self.api(&kind, &namespace).await?;
        let parameters = PatchParams::apply(FIELD_MANAGER).force().validation_strict();
        Ok(api.patch(&object.name_any(), &parameters, &Patch::Apply(&object)).await?)
    }

    /// Applies every document of a YAML file.
    pub async fn apply_file(&self, path: &Path) -> anyhow::Result<()> {
        for object in documents(path)? {
            self.apply(&object).await.with_context(|| format!("applying {}", path.display()))?;
        }
        Ok(())
    }

    /// Names of what is left of a kind in a namespace.
    pub async fn names(
        &self,
        kind: &GroupVersionKind,
        namespace: &str,
    ) -> anyhow::Result<Vec<String>> {
        let list = self.api(kind, namespace).await?.list_metadata(&ListParams::default()).await?;
        Ok(list.items.iter().map(ResourceExt::name_any).collect())
    }

    /// Deletes a pod and waits until it has gone.
    pub async fn delete_pod(
        &self,
        namespace: &str,
        name: &str,
        progress: &mut Progress,
    ) -> anyhow::Result<()> {
        let pods = self.pods(namespace);
        let pod = pods.get(name).await?;
        pods.delete(name, &DeleteParams::default()).await?;
        wait(progress, Duration::from_mins(3), &format!("pod {name} has ended"), async || {
            let now = pods.get_opt(name).await?;
            Ok(match now {
                Some(now) if now.uid() == pod.uid() => Look::NotYet(describe_pod(&now)),
                _ => Look::Done(()),
            })
        })
        .await
    }
}

/// The documents of a YAML file.
pub fn documents(path: &Path) -> anyhow::Result<Vec<Value>> {
    use serde::Deserialize as _;
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_yaml::Deserializer::from_str(&text)
        .map(|document| Ok(Value::deserialize(document)?))
        .filter(|document| !matches!(document, Ok(Value::Null)))
        .collect()
}

/// What a look at something that is waited for has shown.
pub enum Look<T> {
    /// It is there.
    Done(T),
    /// Not yet; the line says how far it is.
    NotYet(String),
}

/// Looks again and again until it is there, saying each new state.
pub async fn wait<T>(
    progress: &mut Progress,
    limit: Duration,
    what: &str,
    mut look: impl AsyncFnMut() -> anyhow::Result<Look<T>>,
) -> anyhow::Result<T> {
    let began = Instant::now();
    loop {
        match look().await? {
            Look::Done(found) => {
                progress.say(format!("{what} ({:.1} s)", began.elapsed().as_secs_f32()));
                return Ok(found);
            }
            Look::NotYet(state) if began.elapsed() < limit => progress.say_news(state),
            Look::NotYet(state) => {
                bail!("not within {} s: {what}; last seen: {state}", limit.as_secs())
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// One line on how far a pod is: its phase and what each container does.
pub fn describe_pod(pod: &Pod) -> String {
    let name = pod.name_any();
    let Some(status) = &pod.status else { return format!("pod {name}: no status yet") };
    let mut line = format!("pod {name}: {}", status.phase.as_deref().unwrap_or("no phase"));
    if pod.metadata.deletion_timestamp.is_some() {
        line.push_str(", ending");
    }
    let containers = status.init_container_statuses.iter().chain(&status.container_statuses);
    for container in containers.flatten() {
        let state = container.state.as_ref().map_or("waiting", describe_state);
        let ready = if container.ready { " and ready" } else { "" };
        // Writing to a text cannot fail.
        let _ = write!(line, ", {} {state}{ready}", container.name);
    }
    line
}

fn describe_state(state: &ContainerState) -> &str {
    match (&state.waiting, &state.terminated) {
        (Some(waiting), _) => waiting.reason.as_deref().unwrap_or("waiting"),
        (None, Some(terminated)) => terminated.reason.as_deref().unwrap_or("ended"),
        (None, None) => "running",
    }
}

/// A kind by its names.
pub fn kind(group: &str, version: &str, kind: &str) -> GroupVersionKind {
    GroupVersionKind::gvk(group, version, kind)
}

/// A command with the cluster's kubeconfig and binaries.
pub fn tool(program: &str) -> Command {
    let folder = cluster_dir();
    let mut command = Command::new(folder.join("bin").join(program));
    command.env("KUBECONFIG", folder.join("admin.kubeconfig"));
    // Without these they keep caches in the home folder.
    command.env("KUBECACHEDIR", folder.join("run/kubectl"));
    command.env("HELM_CACHE_HOME", folder.join("run/helm"));
    command
}

/// Prints what a person would look at first after a failure.
pub fn print_evidence(namespaces: &[&str]) {
    for namespace in namespaces {
        for arguments in [
            &["get", "conversationmodels,pods,services,pvc", "-o", "wide"][..],
            &["get", "conversationmodels", "-o", "yaml"],
            &["describe", "pods"],
            &["get", "events", "--sort-by=.lastTimestamp"],
        ] {
            print_output(tool("kubectl").args(["--namespace", namespace]).args(arguments));
        }
        let pods = tool("kubectl")
            .args(["--namespace", namespace, "get", "pods", "-o", "name"])
            .output()
            .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
            .unwrap_or_default();
        for pod in pods.lines() {
            print_output(tool("kubectl").args([
                "--namespace",
                namespace,
                "logs",
                pod,
                "--all-containers",
                "--prefix",
                "--tail=200",
            ]));
        }
    }
}

fn print_output(command: &mut Command) {
    eprintln!("\n===== {command:?}");
    match command.output() {
        Ok(output) => {
            eprint!("{}", String::from_utf8_lossy(&output.stdout));
            eprint!("{}", String::from_utf8_lossy(&output.stderr));
        }
        Err(error) => eprintln!("{error}"),
    }
}
