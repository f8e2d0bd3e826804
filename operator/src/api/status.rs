//! The status of a `ConversationModel`: what was seen, never what was wished for.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the operator last saw of the model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConversationModelStatus {
    /// The generation of the spec that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Replicas whose pod exists and is not being deleted.
    #[serde(default)]
    pub replicas: u32,

    /// Replicas that answer requests.
    #[serde(default)]
    pub ready_replicas: u32,

    /// Replicas whose pod was made from the current spec.
    #[serde(default)]
    pub updated_replicas: u32,

    /// Label selector of the replicas' pods, for `/scale` and autoscalers.
    #[serde(default)]
    pub selector: String,

    /// `Ready`, `Progressing`, `CacheReady` and `ModelResolved`, each with a reason and a message.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,

    /// Each replica, by index.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["index".into()]))]
    pub replica_statuses: Vec<ReplicaStatus>,
}

/// One replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaStatus {
    /// The replica's stable number, the end of its pod's name.
    pub index: u32,

    /// Name of the pod.
    pub pod: String,

    /// How far the replica is.
    pub phase: ReplicaPhase,

    /// Containers' restarts, both together.
    #[serde(default)]
    pub restarts: u32,

    /// What is waited for or wrong, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// How far a replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ReplicaPhase {
    /// There is no pod yet.
    Missing,
    /// The pod is placed, or its containers start.
    Starting,
    /// The replica answers requests.
    Ready,
    /// Something keeps the replica from becoming ready; the message says what.
    Failing,
    /// The pod is being deleted.
    Ending,
}
