//! What a `ConversationModel` should look like in the cluster: names, labels, and one file for each
//! kind of object. All of it is pure: the same model gives the same objects, byte for byte.

pub mod arguments;
pub mod memory;
pub mod pod;
pub mod service;
pub mod volume;

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt};

use crate::api::ConversationModel;

/// The one field manager with which the operator applies everything it owns.
pub const FIELD_MANAGER: &str = "colloquy-operator";

/// Keeps a deleted model until its pods, service and volumes have gone.
pub const FINALIZER: &str = "colloquy.dev/cleanup";

/// Label whose value is the name of the `ConversationModel`.
pub const LABEL_MODEL: &str = "colloquy.dev/model";

/// Label whose value is the replica index.
pub const LABEL_INDEX: &str = "colloquy.dev/replica-index";

/// Label that every object of the operator carries; watches ask for it, so that other people's pods
/// cost the operator nothing.
pub const LABEL_MANAGED: &str = "app.kubernetes.io/managed-by";

/// The value of [`LABEL_MANAGED`].
pub const MANAGED_BY: &str = "colloquy-operator";

/// The stable number of a replica: names its pod and its volume. Two pods of one index never exist
/// at the same time, for one volume cannot have two daemons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaIndex(pub u32);

impl fmt::Display for ReplicaIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Images that a model gets when its spec names none, and how they are pulled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    /// Image of the runtime.
    pub runtime: String,
    /// Image of the cache daemon.
    pub cache_daemon: String,
    /// Pull policy of both, and of the weights: `Always`, `IfNotPresent` or `Never`.
    pub pull_policy: String,
}

/// Name of a replica's pod.
pub fn pod_name(model: &str, index: ReplicaIndex) -> String {
    format!("{model}-{index}")
}

/// Name of a replica's cache volume claim.
pub fn claim_name(model: &str, index: ReplicaIndex) -> String {
    format!("{model}-{index}-kv")
}

/// The index in a pod's name, or `None` when the name is not of this model's scheme.
pub fn index_of_pod(model: &str, name: &str) -> Option<ReplicaIndex> {
    let digits = name.strip_prefix(model)?.strip_prefix('-')?;
    let index = ReplicaIndex(digits.parse().ok()?);
    (pod_name(model, index) == name).then_some(index)
}

/// The index in a claim's name, or `None` when the name is not of this model's scheme.
pub fn index_of_claim(model: &str, name: &str) -> Option<ReplicaIndex> {
    index_of_pod(model, name.strip_suffix("-kv")?)
}

/// Label selector of all objects of one model.
pub fn selector(model: &str) -> String {
    format!("{LABEL_MANAGED}={MANAGED_BY},{LABEL_MODEL}={model}")
}

/// Labels by which a service and an autoscaler find a model's pods.
pub fn selector_labels(model: &str) -> BTreeMap<String, String> {
    [(LABEL_MANAGED, MANAGED_BY), (LABEL_MODEL, model)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

fn labels(model: &str, index: Option<ReplicaIndex>) -> BTreeMap<String, String> {
    let mut labels = selector_labels(model);
    labels.insert("app.kubernetes.io/name".into(), "colloquy".into());
    labels.insert("app.kubernetes.io/instance".into(), model.into());
    if let Some(index) = index {
        labels.insert(LABEL_INDEX.into(), index.to_string());
    }
    labels
}

/// Metadata of an owned object. The owner reference lets the garbage collector finish the work
/// should the operator be uninstalled before the model.
fn metadata(model: &ConversationModel, name: String, index: Option<ReplicaIndex>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: model.namespace(),
        labels: Some(labels(&model.name_any(), index)),
        owner_references: Some(vec![owner(model)]),
        ..ObjectMeta::default()
    }
}

fn owner(model: &ConversationModel) -> OwnerReference {
    OwnerReference {
        api_version: ConversationModel::api_version(&()).into_owned(),
        kind: ConversationModel::kind(&()).into_owned(),
        name: model.name_any(),
        uid: model.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// Whether an object belongs to this very model: same name is not enough, a former model of that
/// name had another uid.
pub fn is_owned_by(meta: &ObjectMeta, model: &ConversationModel) -> bool {
    let uid = model.uid();
    meta.owner_references
        .iter()
        .flatten()
        .any(|owner| owner.controller == Some(true) && Some(&owner.uid) == uid.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_gives_back_the_index_that_made_it() {
        let name = pod_name("chat", ReplicaIndex(7));
        assert_eq!(index_of_pod("chat", &name), Some(ReplicaIndex(7)));
        let claim = claim_name("chat", ReplicaIndex(7));
        assert_eq!(index_of_claim("chat", &claim), Some(ReplicaIndex(7)));
    }

    #[test]
    fn names_of_another_scheme_have_no_index() {
        for name in ["chat", "chat-", "chat-x", "chat-01", "chat-+1", "chatty-0", "chat-0-kv"] {
            assert_eq!(index_of_pod("chat", name), None, "{name}");
        }
    }
}
