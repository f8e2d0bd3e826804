//! The plan: what to change so that the cluster becomes what the model asks for. Pure.
//!
//! Rules, each with a test:
//! 1. A replica's pod is created only when no pod of that index and no half-deleted volume of it is
//!    left: one volume cannot have two daemons.
//! 2. A pod that no longer matches the spec is replaced; a ready one only while every other replica
//!    is ready, the highest index first, one at a time.
//! 3. A scale-down ends the highest indexes. Their volumes stay, or go after their pods.
//! 4. A deleted model gives up its route first, then its pods, then its volumes, its finalizer last.
//! 5. Nothing that belongs to somebody else is touched.
//! 6. A cache that is off has no volumes made; those that are there stay, or go with `whenScaledDown`.
//! 7. Applying a plan until nothing changes any more ends with an empty plan.

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Service};
use kube::ResourceExt;
use serde_json::Value;

use crate::api::{ConversationModel, ScaleDownVolume};
use crate::desired::{self, Images, ReplicaIndex, pod::ANNOTATION_TEMPLATE};
use crate::observe::{Kind, Observed};

/// One step towards what the model asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Keep the model, once deleted, until we have cleaned up.
    AddFinalizer,
    /// All is gone: let the model go.
    RemoveFinalizer,
    /// Create the service, or set right what differs.
    ApplyService(Box<Service>),
    /// Create a volume, or let it grow.
    ApplyClaim(Box<PersistentVolumeClaim>),
    /// Create a pod.
    CreatePod(Box<Pod>),
    /// End this very object (its uid is checked, a successor of that name is safe).
    Delete {
        /// What is deleted.
        kind: Kind,
        /// Its name.
        name: String,
        /// Its uid.
        uid: String,
        /// Why.
        why: Why,
    },
}

/// Why an object is deleted; told in an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Its pod template differs from the spec's.
    SpecChanged,
    /// Its containers have ended for good (evicted, node shut down).
    Finished,
    /// Its index is beyond the number of replicas.
    ScaledDown,
    /// The disk below the volume is lost.
    VolumeLost,
    /// The model is being deleted.
    ModelDeleted,
}

/// Something that must happen elsewhere first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wait {
    /// An object is being deleted; its successor comes when it has gone.
    Ending(Kind, String),
    /// The name is taken by an object of another owner.
    NameTaken(Kind, String),
    /// Replicas with an old spec wait for their turn.
    RollOut(u32),
}

/// Changes to apply now, in this order, and what is waited for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Changes, in order.
    pub changes: Vec<Change>,
    /// What must happen before there can be more changes.
    pub waits: Vec<Wait>,
}

/// Plans the next changes of `model`.
pub fn plan(model: &ConversationModel, observed: &Observed, images: &Images) -> Plan {
    let mut plan = Plan::default();
    if model.metadata.deletion_timestamp.is_some() {
        plan.tear_down(model, observed);
        return plan;
    }
    if !has_finalizer(model) {
        plan.changes.push(Change::AddFinalizer);
    }
    plan.service(model, observed);
    for index in (0..model.spec.replicas).map(ReplicaIndex) {
        plan.replica(model, observed, images, index);
    }
    plan.roll_out(model, observed, images);
    plan.scale_down(model, observed, images);
    plan
}

impl Plan {
    fn service(&mut self, model: &ConversationModel, observed: &Observed) {
        let wanted = desired::service::service(model);
        match &observed.service {
            Some(service) if is_ending(&service.metadata) => self.ending(Kind::Service, service),
            Some(service) if covers(service, &wanted) => {}
            Some(_) => self.changes.push(Change::ApplyService(Box::new(wanted))),
            None => {
                if self.is_free(observed, Kind::Service, wanted.name_any()) {
                    self.changes.push(Change::ApplyService(Box::new(wanted)));
                }
            }
        }
    }

    /// One replica: its volume, then its pod.
    fn replica(
        &mut self,
        model: &ConversationModel,
        observed: &Observed,
        images: &Images,
        index: ReplicaIndex,
    ) {
        let volume_usable = !model.spec.cache.enabled || self.volume(model, observed, index);
        match observed.pods.get(&index) {
            Some(pod) if is_ending(&pod.metadata) => self.ending(Kind::Pod, pod),
            Some(pod) if is_finished(pod) => self.delete(Kind::Pod, pod, Why::Finished),
            Some(_) => {}
            None => {
                let pod = desired::pod::pod(model, index, images);
                if volume_usable && self.is_free(observed, Kind::Pod, pod.name_any()) {
                    self.changes.push(Change::CreatePod(Box::new(pod)));
                }
            }
        }
    }

    /// Whether a new pod may use the replica's volume; a claim that is bound only when its first pod
    /// is placed is usable.
    fn volume(
        &mut self,
        model: &ConversationModel,
        observed: &Observed,
        index: ReplicaIndex,
    ) -> bool {
        let wanted = desired::volume::claim(model, index);
        let Some(claim) = observed.claims.get(&index) else {
            let free = self.is_free(observed, Kind::Claim, wanted.name_any());
            if free {
                self.changes.push(Change::ApplyClaim(Box::new(wanted)));
            }
            return free;
        };
        if is_ending(&claim.metadata) {
            self.ending(Kind::Claim, claim);
            return false;
        }
        if is_lost(claim) {
            // What was on the disk is gone with it; a cache starts again, cold, on a new one.
            if let Some(pod) = observed.pods.get(&index).filter(|pod| !is_ending(&pod.metadata)) {
                self.delete(Kind::Pod, pod, Why::VolumeLost);
            }
            self.delete(Kind::Claim, claim, Why::VolumeLost);
            return false;
        }
        if desired::volume::requested_size(claim)
            .is_some_and(|now| now < model.spec.cache.disk.size)
        {
            self.changes.push(Change::ApplyClaim(Box::new(wanted)));
        }
        true
    }

    /// Replaces pods whose template differs from the spec's.
    fn roll_out(&mut self, model: &ConversationModel, observed: &Observed, images: &Images) {
        let indexes = || (0..model.spec.replicas).rev().map(ReplicaIndex);
        let stale: Vec<&Pod> = indexes()
            .filter_map(|index| {
                let pod = observed.pods.get(&index)?;
                let replaceable = !is_ending(&pod.metadata) && !is_finished(pod);
                (replaceable && !is_current(model, index, pod, images)).then_some(pod)
            })
            .collect();
        let available =
            indexes().filter(|index| observed.pods.get(index).is_some_and(is_available)).count();

        // One that does not serve anyway may go at once: a repaired spec must not wait for the
        // broken one to become ready.
        let (ready, unready): (Vec<&Pod>, Vec<&Pod>) =
            stale.into_iter().partition(|pod| is_available(pod));
        let may_end_ready = unready.is_empty() && available == model.spec.replicas as usize;
        for pod in unready {
            self.delete(Kind::Pod, pod, Why::SpecChanged);
        }
        let mut ready = ready.into_iter();
        if may_end_ready && let Some(pod) = ready.next() {
            self.delete(Kind::Pod, pod, Why::SpecChanged);
        }
        let waiting = ready.len() as u32;
        if waiting > 0 {
            self.waits.push(Wait::RollOut(waiting));
        }
    }

    fn scale_down(&mut self, model: &ConversationModel, observed: &Observed, images: &Images) {
        let beyond = ReplicaIndex(model.spec.replicas)..;
        for (_, pod) in observed.pods.range(beyond.clone()).rev() {
            if is_ending(&pod.metadata) {
                self.ending(Kind::Pod, pod);
            } else {
                self.delete(Kind::Pod, pod, Why::ScaledDown);
            }
        }
        if model.spec.cache.disk.when_scaled_down == ScaleDownVolume::Keep {
            return;
        }
        // A cache that is off needs no volume: each goes when the pod that mounts it has been replaced.
        let is_off = !model.spec.cache.enabled;
        let unneeded = if is_off { ReplicaIndex(0).. } else { beyond };
        for (index, claim) in observed.claims.range(unneeded) {
            let pod = observed.pods.get(index);
            let is_mounted =
                pod.is_some_and(|pod| !(is_off && is_current(model, *index, pod, images)));
            if is_ending(&claim.metadata) {
                self.ending(Kind::Claim, claim);
            } else if !is_mounted {
                self.delete(Kind::Claim, claim, Why::ScaledDown);
            }
        }
    }

    /// Route, pods, volumes, finalizer: in this order, so that no turn is sent to a pod that ends,
    /// and no disk is taken from a daemon that still writes.
    fn tear_down(&mut self, model: &ConversationModel, observed: &Observed) {
        if let Some(service) = &observed.service {
            self.delete_once(Kind::Service, service);
        }
        for pod in observed.pods.values() {
            self.delete_once(Kind::Pod, pod);
        }
        if observed.pods.is_empty() {
            for claim in observed.claims.values() {
                self.delete_once(Kind::Claim, claim);
            }
        }
        let gone =
            observed.service.is_none() && observed.pods.is_empty() && observed.claims.is_empty();
        if gone && has_finalizer(model) {
            self.changes.push(Change::RemoveFinalizer);
        }
    }

    fn delete_once<K: kube::Resource<DynamicType = ()>>(&mut self, kind: Kind, object: &K) {
        if is_ending(object.meta()) {
            self.ending(kind, object);
        } else {
            self.delete(kind, object, Why::ModelDeleted);
        }
    }

    fn delete<K: kube::Resource<DynamicType = ()>>(&mut self, kind: Kind, object: &K, why: Why) {
        let uid = object.uid().unwrap_or_default();
        let planned =
            |change: &Change| matches!(change, Change::Delete { uid: other, .. } if *other == uid);
        if !self.changes.iter().any(planned) {
            self.changes.push(Change::Delete { kind, name: object.name_any(), uid, why });
        }
    }

    fn ending<K: kube::Resource<DynamicType = ()>>(&mut self, kind: Kind, object: &K) {
        self.waits.push(Wait::Ending(kind, object.name_any()));
    }

    fn is_free(&mut self, observed: &Observed, kind: Kind, name: String) -> bool {
        let taken = (kind, name);
        if observed.strangers.contains(&taken) {
            self.waits.push(Wait::NameTaken(taken.0, taken.1));
            return false;
        }
        true
    }
}

/// Whether the model bears our finalizer.
pub fn has_finalizer(model: &ConversationModel) -> bool {
    model.finalizers().iter().any(|finalizer| finalizer == desired::FINALIZER)
}

/// Whether the object is being deleted.
pub fn is_ending(meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> bool {
    meta.deletion_timestamp.is_some()
}

/// Whether the pod was made from the model's present spec.
pub fn is_current(
    model: &ConversationModel,
    index: ReplicaIndex,
    pod: &Pod,
    images: &Images,
) -> bool {
    let wanted = desired::pod::pod(model, index, images);
    pod.annotations().get(ANNOTATION_TEMPLATE) == wanted.annotations().get(ANNOTATION_TEMPLATE)
}

/// Whether the pod answers requests: ready, and not about to go.
pub fn is_available(pod: &Pod) -> bool {
    !is_ending(&pod.metadata) && is_ready(pod)
}

/// Whether all of the pod's containers are ready.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Whether the pod has ended for good: its containers are never started again.
fn is_finished(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

/// Whether the disk below a claim is lost.
pub fn is_lost(claim: &PersistentVolumeClaim) -> bool {
    let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
    phase == Some("Lost")
}

/// Whether everything in `wanted` is also in `observed`, which may hold more (defaults, status).
fn covers<K: serde::Serialize>(observed: &K, wanted: &K) -> bool {
    fn value_covers(observed: &Value, wanted: &Value) -> bool {
        match (observed, wanted) {
            (Value::Object(observed), Value::Object(wanted)) => {
                wanted.iter().all(|(key, value)| {
                    observed.get(key).is_some_and(|observed| value_covers(observed, value))
                })
            }
            (Value::Array(observed), Value::Array(wanted)) => {
                observed.len() == wanted.len()
                    && observed.iter().zip(wanted).all(|(seen, value)| value_covers(seen, value))
            }
            _ => observed == wanted,
        }
    }
    let json = |object: &K| serde_json::to_value(object).expect("a Kubernetes object is JSON");
    value_covers(&json(observed), &json(wanted))
}

#[cfg(test)]
mod tests;
