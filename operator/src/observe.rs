//! What is in the cluster for one model: the first of observe → plan → apply.
//!
//! Lists are read from the API server, not from a watch cache: after a change of ours the next look
//! sees it, so the plan can never create a pod twice because a cache was late. Watches only say
//! when to look.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

use crate::api::ConversationModel;
use crate::desired::{self, ReplicaIndex};

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
    Ok(observed)
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

    fn failed(&self, kind: Kind, source: kube::Error) -> ObserveError {
        ObserveError::Read {
            kind,
            namespace: self.namespace.to_owned(),
            model: self.model.name_any(),
            source,
        }
    }
}
