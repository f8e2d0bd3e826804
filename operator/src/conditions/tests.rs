//! What a person reads in the four conditions, scene by scene.

use serde_json::{Value, json};

use super::*;
use crate::desired::pod::pod;
use crate::fixtures;
use crate::plan::plan;

/// A model of one replica whose pod and claim have the given status.
struct Scene {
    model: ConversationModel,
    observed: Observed,
}

impl Scene {
    fn new(pod_status: Value, claim_phase: &str) -> Self {
        let model = fixtures::model();
        let mut replica = pod(&model, ReplicaIndex(0), &fixtures::images());
        replica.metadata.uid = Some("pod".into());
        replica.status = serde_json::from_value(pod_status).unwrap();
        let mut claim = desired::volume::claim(&model, ReplicaIndex(0));
        claim.metadata.uid = Some("claim".into());
        claim.status = serde_json::from_value(json!({"phase": claim_phase})).unwrap();
        let observed = Observed {
            pods: [(ReplicaIndex(0), replica)].into(),
            claims: [(ReplicaIndex(0), claim)].into(),
            service: Some(desired::service::service(&model)),
            last_words: [].into(),
            strangers: [].into(),
        };
        Self { model, observed }
    }

    fn status(&self, refused: Option<&str>) -> ConversationModelStatus {
        let images = fixtures::images();
        let plan = plan(&self.model, &self.observed, &images);
        let facts = Facts {
            model: &self.model,
            observed: &self.observed,
            plan: &plan,
            refused,
            images: &images,
        };
        status(&facts, "2026-01-02T03:04:05Z".parse().unwrap())
    }

    /// `Ready=False/Starting …` of all conditions.
    fn words(&self) -> Vec<String> {
        let word = |condition: &Condition| {
            format!("{}={}/{}", condition.type_, condition.status, condition.reason)
        };
        self.status(None).conditions.iter().map(word).collect()
    }

    fn ready_message(&self) -> String {
        self.status(None).conditions[0].message.clone()
    }
}

fn container(name: &str, state: &Value) -> Value {
    json!({"name": name, "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state})
}

fn running(name: &str) -> Value {
    let mut container = container(name, &json!({"running": {}}));
    container["started"] = true.into();
    container["ready"] = true.into();
    container
}

fn ready_pod() -> Value {
    json!({
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "True"}],
        "initContainerStatuses": [running("cache-daemon")],
        "containerStatuses": [running("runtime")],
    })
}

#[test]
fn a_replica_that_answers_makes_everything_true_and_settled() {
    let scene = Scene::new(ready_pod(), "Bound");
    let expected = [
        "Ready=True/Ready",
        "Progressing=False/Settled",
        "CacheReady=True/DaemonsRunning",
        "ModelResolved=True/Loaded",
    ];
    assert_eq!(scene.words(), expected);
    let status = scene.status(None);
    assert_eq!((status.replicas, status.ready_replicas, status.updated_replicas), (1, 1, 1));
    assert_eq!(status.observed_generation, Some(3));
    assert!(status.conditions.iter().all(|condition| condition.observed_generation == Some(3)));
}

#[test]
fn a_new_replica_is_starting() {
    let scene = Scene::new(json!({"phase": "Pending"}), "Bound");
    let expected = [
        "Ready=False/Starting",
        "Progressing=True/Starting",
        "CacheReady=False/DaemonsStarting",
        "ModelResolved=False/NotLoaded",
    ];
    assert_eq!(scene.words(), expected);
}

#[test]
fn a_volume_without_a_disk_is_waited_for_and_named() {
    let unschedulable = json!({"phase": "Pending", "conditions": [{"type": "PodScheduled",
        "status": "False", "reason": "Unschedulable", "message": "unbound PersistentVolumeClaims"}]});
    let scene = Scene::new(unschedulable, "Pending");
    assert_eq!(scene.words()[0], "Ready=False/VolumePending");
    assert_eq!(scene.words()[2], "CacheReady=False/VolumePending");
    let message = "volume claim smollm2-0-kv waits for a disk of storage class local";
    assert_eq!(scene.ready_message(), message);
}

#[test]
fn a_pod_that_fits_nowhere_is_unschedulable_once_its_volume_is_bound() {
    let unschedulable = json!({"phase": "Pending", "conditions": [{"type": "PodScheduled",
        "status": "False", "reason": "Unschedulable", "message": "Insufficient memory"}]});
    let scene = Scene::new(unschedulable, "Bound");
    assert_eq!(scene.words()[0], "Ready=False/Unschedulable");
    assert!(scene.ready_message().contains("Insufficient memory"));
}

#[test]
fn a_bad_model_file_unresolves_the_model_with_the_runtime_s_own_sentence() {
    let status = json!({"phase": "Running",
        "initContainerStatuses": [running("cache-daemon")],
        "containerStatuses": [container("runtime", &json!({"terminated": {
            "exitCode": 65, "message": "runtime: /models/x.gguf is not a GGUF file; give another\n"}}))],
    });
    let scene = Scene::new(status, "Bound");
    let expected = [
        "Ready=False/ModelFileInvalid",
        "Progressing=False/ModelFileInvalid",
        "CacheReady=True/DaemonsRunning",
        "ModelResolved=False/ModelFileInvalid",
    ];
    assert_eq!(scene.words(), expected);
    assert!(scene.ready_message().ends_with("is not a GGUF file; give another"));
    let replica = &scene.status(None).replica_statuses[0];
    assert_eq!(replica.phase, ReplicaPhase::Failing);
}

#[test]
fn a_cache_that_is_off_is_said_to_be_off_and_waits_for_no_volume() {
    let mut scene = Scene::new(json!({"phase": "Running"}), "Pending");
    scene.model.spec.cache.enabled = false;
    let status = scene.status(None);
    let cache = status.conditions.iter().find(|condition| condition.type_ == CACHE_READY).unwrap();
    assert_eq!((cache.status.as_str(), cache.reason.as_str()), ("True", "Off"));
    assert!(status.conditions.iter().all(|condition| condition.reason != "VolumePending"));
}

#[test]
fn a_daemon_that_crashes_is_told_by_the_cache_and_by_nothing_else_while_the_runtime_answers() {
    let mut status = ready_pod();
    status["initContainerStatuses"] =
        json!([container("cache-daemon", &json!({"waiting": {"reason": "CrashLoopBackOff"}}))]);
    let scene = Scene::new(status, "Bound");
    assert_eq!(scene.words()[0], "Ready=True/Ready");
    assert_eq!(scene.words()[2], "CacheReady=False/DaemonsStarting");
}

#[test]
fn a_refusal_of_the_api_server_is_passed_on() {
    let scene = Scene::new(ready_pod(), "Bound");
    let status = scene.status(Some("cannot apply pod smollm2-0: exceeded quota"));
    assert_eq!(status.conditions[0].reason, "Refused");
    assert_eq!(status.conditions[0].message, "cannot apply pod smollm2-0: exceeded quota");
    assert_eq!(status.conditions[1].reason, "Blocked");
}

#[test]
fn a_taken_name_says_whose_it_is_not() {
    let mut scene = Scene::new(ready_pod(), "Bound");
    scene.observed.service = None;
    scene.observed.strangers.insert((Kind::Service, "smollm2".into()));
    assert_eq!(scene.words()[0], "Ready=False/NameTaken");
    assert!(
        scene.ready_message().starts_with("service smollm2 exists and belongs to somebody else")
    );
}

#[test]
fn a_model_that_is_deleted_says_what_it_waits_for() {
    let mut scene = Scene::new(ready_pod(), "Bound");
    scene.model.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    let pod = scene.observed.pods.get_mut(&ReplicaIndex(0)).unwrap();
    pod.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    assert_eq!(scene.words()[0], "Ready=False/Terminating");
    assert_eq!(scene.ready_message(), "waiting for pod smollm2-0 to go");
}

#[test]
fn no_replica_asked_for_is_no_fault() {
    let mut scene = Scene::new(ready_pod(), "Bound");
    scene.model.spec.replicas = 0;
    scene.observed.pods.clear();
    assert_eq!(scene.words()[0], "Ready=True/ScaledToZero");
}

#[test]
fn a_condition_keeps_its_time_until_its_status_turns() {
    let mut scene = Scene::new(json!({"phase": "Pending"}), "Bound");
    let mut old = scene.status(None);
    let before: Timestamp = "2020-01-01T00:00:00Z".parse().unwrap();
    for condition in &mut old.conditions {
        condition.last_transition_time = Time(before);
    }
    scene.model.status = Some(old);
    let same = scene.status(None);
    assert!(same.conditions.iter().all(|condition| condition.last_transition_time.0 == before));
    assert_eq!(
        scene.model.status.as_ref(),
        Some(&same),
        "an unchanged status is not written again"
    );

    let replica = scene.observed.pods.get_mut(&ReplicaIndex(0)).unwrap();
    replica.status = serde_json::from_value(ready_pod()).unwrap();
    assert!(scene.status(None).conditions[0].last_transition_time.0 > before);
}
