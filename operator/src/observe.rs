//! What is in the cluster for one model: the first of observe → plan → apply.
//!
//! Lists are read from the API server, not from a watch cache: after a change of ours the next look
//! sees it, so the plan can never create a pod twice because a cache was late. Watches only say
//! when to look.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Service};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

use crate::api::ConversationModel;
use crate::desired::{self, ReplicaIndex};
use crate::problem::{self, LastWords};

/// Most events of one pod that are read; a pod that starts has about ten.
const EVENTS_MAX: u32 = 100;

/// Kind of an object that the operator owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A replica's pod.
    Pod,
    /// The model's service.
    Service,
    /// A replica's cache volume.
    Claim,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pod => "pod",
            Self::Service => "service",
            Self::Claim => "persistentvolumeclaim",
        })
    }
}

/// Everything in the cluster that belongs to one model, and what stands in its way.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The model's pods, by replica index.
    pub pods: BTreeMap<ReplicaIndex, Pod>,
    /// The model's cache volumes, by replica index.
    pub claims: BTreeMap<ReplicaIndex, PersistentVolumeClaim>,
    /// The model's service.
    pub service: Option<Service>,
    /// What the kubelet last said about pods whose own status says nothing: an image volume that
    /// cannot be pulled and a disk that cannot be mounted are told by events alone.
    pub last_words: BTreeMap<ReplicaIndex, LastWords>,
    /// Objects of other owners that bear a name which the model needs.
    pub strangers: BTreeSet<(Kind, String)>,
}

/// Looking failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObserveError {
    /// The API server did not give the objects of a kind.
    #[error("cannot read the {kind}s of {namespace}/{model}: {source}")]
    Read {
        /// What was read.
        kind: Kind,
        /// Namespace of the model.
        namespace: String,
        /// Name of the model.
        model: String,
        /// What the API server said.
        source: kube::Error,
    },
}

/// Looks at everything that belongs to `model`.
pub async fn observe(
    client: &Client,
    namespace: &str,
    model: &ConversationModel,
) -> Result<Observed, ObserveError> {
    let look = Look { namespace, model };
    let (pods, claims, services) = tokio::try_join!(
        look.list(Kind::Pod, Api::<Pod>::namespaced(client.clone(), namespace)),
        look.list(Kind::Claim, Api::<PersistentVolumeClaim>::namespaced(client.clone(), namespace)),
        look.list(Kind::Service, Api::<Service>::namespaced(client.clone(), namespace)),
    )?;
    let mut observed = Observed::sort(model, pods, claims, services);

    // Names that are wanted and not ours: free, or a stranger's. In the steady state there is none.
    for (kind, name) in observed.missing(model) {
        let taken = match kind {
            Kind::Pod => look.exists::<Pod>(client, kind, &name).await?,
            Kind::Claim => look.exists::<PersistentVolumeClaim>(client, kind, &name).await?,
            Kind::Service => look.exists::<Service>(client, kind, &name).await?,
        };
        if taken {
            observed.strangers.insert((kind, name));
        }
    }
    for (index, pod) in observed.pods.iter().filter(|(_, pod)| problem::is_mute(pod)) {
        if let Some(words) = look.last_words(client, pod).await? {
            observed.last_words.insert(*index, words);
        }
    }
    Ok(observed)
}

/// The newest of a pod's events; of several pull failures the one that says why.
fn newest(mut events: Vec<Event>) -> Option<LastWords> {
    let time = |event: &Event| {
        let series = event.series.as_ref().map(|series| series.last_observed_time.0);
        let last = event.deprecated_last_timestamp.as_ref().map(|time| time.0);
        let first = event.event_time.as_ref().map(|time| time.0);
        series.max(last).max(first)
    };
    events.sort_by_key(time);
    let newest = events.last()?;
    let note = |event: &Event| event.note.clone().unwrap_or_default();
    let pull_failed = events.iter().rev().map(note).find(|note| note.starts_with("Failed to pull"));
    let reason = newest.reason.clone().unwrap_or_default();
    let note = match pull_failed {
        Some(fuller) if problem::is_pull_failure(&reason) => fuller,
        _ => note(newest),
    };
    Some(LastWords { reason, note })
}

impl Observed {
    /// Sorts listed objects by index; what is not owned by this very model is left out.
    pub fn sort(
        model: &ConversationModel,
        pods: Vec<Pod>,
        claims: Vec<PersistentVolumeClaim>,
        services: Vec<Service>,
    ) -> Self {
        let name = model.name_any();
        let own = |meta: &ObjectMeta| desired::is_owned_by(meta, model);
        Self {
            pods: pods
                .into_iter()
                .filter(|pod| own(&pod.metadata))
                .filter_map(|pod| Some((desired::index_of_pod(&name, &pod.name_any())?, pod)))
                .collect(),
            claims: claims
                .into_iter()
                .filter(|claim| own(&claim.metadata))
                .filter_map(|claim| {
                    Some((desired::index_of_claim(&name, &claim.name_any())?, claim))
                })
                .collect(),
            service: services
                .into_iter()
                .find(|service| own(&service.metadata) && service.name_any() == name),
            last_words: BTreeMap::new(),
            strangers: BTreeSet::new(),
        }
    }

    /// Names that the model needs and that none of its own objects bears.
    fn missing(&self, model: &ConversationModel) -> Vec<(Kind, String)> {
        if model.metadata.deletion_timestamp.is_some() {
            return Vec::new(); // Nothing will be created any more.
        }
        let name = model.name_any();
        let indexes = || (0..model.spec.replicas).map(ReplicaIndex);
        let pods = indexes()
            .filter(|index| !self.pods.contains_key(index))
            .map(|index| (Kind::Pod, desired::pod_name(&name, index)));
        let claims = indexes()
            .filter(|index| !self.claims.contains_key(index))
            .map(|index| (Kind::Claim, desired::claim_name(&name, index)));
        let service = self.service.is_none().then(|| (Kind::Service, name.clone()));
        pods.chain(claims).chain(service).collect()
    }
}

/// Whose objects are looked for; carries what an error message needs.
struct Look<'a> {
    namespace: &'a str,
    model: &'a ConversationModel,
}

impl Look<'_> {
    async fn list<K>(&self, kind: Kind, api: Api<K>) -> Result<Vec<K>, ObserveError>
    where
        K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
    {
        let mine = ListParams::default().labels(&desired::selector(&self.model.name_any()));
        let list = api.list(&mine).await.map_err(|source| self.failed(kind, source))?;
        Ok(list.items)
    }

    async fn exists<K>(&self, client: &Client, kind: Kind, name: &str) -> Result<bool, ObserveError>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let api = Api::<K>::namespaced(client.clone(), self.namespace);
        let found = api.get_metadata_opt(name).await.map_err(|source| self.failed(kind, source))?;
        Ok(found.is_some())
    }

    async fn last_words(
        &self,
        client: &Client,
        pod: &Pod,
    ) -> Result<Option<LastWords>, ObserveError> {
        let about = format!("regarding.uid={}", pod.uid().unwrap_or_default());
        let events = Api::<Event>::namespaced(client.clone(), self.namespace);
        let listed = events.list(&ListParams::default().fields(&about).limit(EVENTS_MAX)).await;
        Ok(newest(listed.map_err(|source| self.failed(Kind::Pod, source))?.items))
    }

    fn failed(&self, kind: Kind, source: kube::Error) -> ObserveError {
        ObserveError::Read {
            kind,
            namespace: self.namespace.to_owned(),
            model: self.model.name_any(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(second: u32, reason: &str, note: &str) -> Event {
        serde_json::from_value(json!({
            "metadata": {"name": "e"}, "reason": reason, "note": note,
            "deprecatedLastTimestamp": format!("2026-01-01T00:00:{second:02}Z"),
        }))
        .unwrap()
    }

    #[test]
    fn the_newest_event_speaks_for_the_pod() {
        let events =
            vec![event(9, "Pulling", "Pulling image"), event(3, "FailedMount", "the disk is busy")];
        assert_eq!(newest(events).unwrap().reason, "Pulling");
        assert_eq!(newest(vec![]), None);
    }

    #[test]
    fn of_several_pull_failures_the_one_that_says_why_is_told() {
        let events = vec![
            event(1, "Failed", "Failed to pull image \"a/b\": no such host"),
            event(2, "Failed", "Error: ErrImagePull"),
            event(3, "BackOff", "Back-off pulling image \"a/b\""),
        ];
        let words = newest(events).unwrap();
        assert_eq!(words.reason, "BackOff");
        assert_eq!(words.note, "Failed to pull image \"a/b\": no such host");
    }
}
