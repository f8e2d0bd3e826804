//! The cache volume of a replica: a claim that outlives the replica's pods.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    PersistentVolumeClaim, PersistentVolumeClaimSpec, VolumeResourceRequirements,
};
use kube::ResourceExt;

use super::{ReplicaIndex, claim_name, metadata};
use crate::api::{ByteSize, ConversationModel};

/// The claim `<model>-<index>-kv`.
///
/// `ReadWriteOnce`, not `ReadWriteOncePod`: the latter needs a CSI driver, which local disks often
/// lack. That no second pod mounts the claim is kept by the plan (a replica's pod is created only
/// when the old one has gone) and, last, by the lock of the daemon's database.
pub fn claim(model: &ConversationModel, index: ReplicaIndex) -> PersistentVolumeClaim {
    let disk = &model.spec.cache.disk;
    PersistentVolumeClaim {
        metadata: metadata(model, claim_name(&model.name_any(), index), Some(index)),
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".into()]),
            storage_class_name: disk.storage_class_name.clone(),
            resources: Some(VolumeResourceRequirements {
                requests: Some(BTreeMap::from([("storage".into(), disk.size.quantity())])),
                limits: None,
            }),
            ..PersistentVolumeClaimSpec::default()
        }),
        ..PersistentVolumeClaim::default()
    }
}

/// The size that a claim asks for now, or `None` when it cannot be read (then it is left alone).
pub fn requested_size(claim: &PersistentVolumeClaim) -> Option<ByteSize> {
    let requests = claim.spec.as_ref()?.resources.as_ref()?.requests.as_ref()?;
    requests.get("storage")?.0.parse().ok()
}
