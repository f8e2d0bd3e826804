//! Carries out a plan: server-side apply with one field manager, deletes that name a uid.

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Service};
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::api::{ConversationModel, ConversationModelStatus};
use crate::desired::{FIELD_MANAGER, FINALIZER};
use crate::error::{Class, class_of};
use crate::observe::Kind;
use crate::plan::Change;

/// A change was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// The API server did not take an object or its deletion.
    #[error("cannot {verb} {what}: {source}")]
    Refused {
        /// What was tried.
        verb: &'static str,
        /// On what.
        what: String,
        /// What the API server said.
        source: kube::Error,
    },
}

impl ApplyError {
    /// Who can do something about it.
    pub fn class(&self) -> Class {
        let Self::Refused { source, .. } = self;
        class_of(source)
    }

    /// The API server's own sentence, for a condition.
    pub fn sentence(&self) -> String {
        let Self::Refused { verb, what, source } = self;
        match source {
            kube::Error::Api(status) => format!("cannot {verb} {what}: {}", status.message),
            other => format!("cannot {verb} {what}: {other}"),
        }
    }
}

/// Applies changes of one model.
pub struct Applier<'a> {
    /// Connection to the API server.
    pub client: &'a Client,
    /// Namespace of the model.
    pub namespace: &'a str,
}

impl Applier<'_> {
    /// Carries out one change.
    pub async fn apply(
        &self,
        model: &ConversationModel,
        change: &Change,
    ) -> Result<(), ApplyError> {
        match change {
            Change::AddFinalizer => self.set_finalizer(model, true).await,
            Change::RemoveFinalizer => self.set_finalizer(model, false).await,
            Change::ApplyService(service) => self.patch(service.as_ref()).await,
            Change::ApplyClaim(claim) => self.patch(claim.as_ref()).await,
            Change::CreatePod(pod) => self.patch(pod.as_ref()).await,
            Change::Delete { kind: Kind::Pod, name, uid, .. } => {
                self.delete::<Pod>(name, uid).await
            }
            Change::Delete { kind: Kind::Service, name, uid, .. } => {
                self.delete::<Service>(name, uid).await
            }
            Change::Delete { kind: Kind::Claim, name, uid, .. } => {
                self.delete::<PersistentVolumeClaim>(name, uid).await
            }
        }
    }

    /// Writes the status, whole.
    pub async fn write_status(
        &self,
        model: &ConversationModel,
        status: &ConversationModelStatus,
    ) -> Result<(), ApplyError> {
        let name = model.name_any();
        let patch = json!({
            "apiVersion": ConversationModel::api_version(&()),
            "kind": ConversationModel::kind(&()),
            // Without the uid a model that was deleted meanwhile, and made again, would get it.
            "metadata": {"name": name, "uid": model.uid()},
            "status": status,
        });
        let api = Api::<ConversationModel>::namespaced(self.client.clone(), self.namespace);
        let manager = PatchParams::apply(FIELD_MANAGER).force();
        api.patch_status(&name, &manager, &Patch::Apply(&patch))
            .await
            .map(drop)
            .map_err(refused("write the status of", &name))
    }

    async fn patch<K>(&self, object: &K) -> Result<(), ApplyError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned
            + Serialize,
    {
        let name = object.name_any();
        let what = format!("{} {name}", K::kind(&()).to_lowercase());
        let api = Api::<K>::namespaced(self.client.clone(), self.namespace);
        let manager = PatchParams::apply(FIELD_MANAGER).force();
        api.patch(&name, &manager, &Patch::Apply(object))
            .await
            .map(drop)
            .map_err(refused("apply", &what))
    }

    async fn delete<K>(&self, name: &str, uid: &str) -> Result<(), ApplyError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned,
    {
        let what = format!("{} {name}", K::kind(&()).to_lowercase());
        let api = Api::<K>::namespaced(self.client.clone(), self.namespace);
        let this_one = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
        match api.delete(name, &DeleteParams::background().preconditions(this_one)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()), // Gone already.
            Err(source) => Err(refused("delete", &what)(source)),
        }
    }

    /// A merge guarded by the resource version: server-side apply would bring back to life a model
    /// that has just gone.
    async fn set_finalizer(&self, model: &ConversationModel, keep: bool) -> Result<(), ApplyError> {
        let name = model.name_any();
        let others = model.finalizers().iter().filter(|finalizer| *finalizer != FINALIZER);
        let ours = keep.then(|| FINALIZER.to_owned());
        let finalizers: Vec<String> = others.cloned().chain(ours).collect();
        let patch = json!({"metadata": {
            "finalizers": finalizers,
            "resourceVersion": model.resource_version(),
        }});
        let api = Api::<ConversationModel>::namespaced(self.client.clone(), self.namespace);
        let manager =
            PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..Default::default() };
        match api.patch(&name, &manager, &Patch::Merge(&patch)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if !keep && status.is_not_found() => Ok(()),
            Err(source) => Err(refused("set the finalizer of", &name)(source)),
        }
    }
}

fn refused(verb: &'static str, what: &str) -> impl FnOnce(kube::Error) -> ApplyError {
    let what = what.to_owned();
    move |source| ApplyError::Refused { verb, what, source }
}
