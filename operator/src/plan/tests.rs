//! A table of scenes, then a property: whatever the state, applying plans comes to rest.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::api::ByteSize;
use crate::fixtures;

/// A cluster in memory: what the API server, the garbage of controllers and the kubelet would do,
/// one step at a time.
#[derive(Clone, Debug)]
struct Cluster {
    model: Option<ConversationModel>,
    observed: Observed,
    uids: u32,
    /// Pods that were ever created for each index while another of that index was there: must stay 0.
    doubled: u32,
}

impl Cluster {
    fn of(model: ConversationModel) -> Self {
        Self { model: Some(model), observed: Observed::default(), uids: 0, doubled: 0 }
    }

    fn replicas(count: u32) -> Self {
        let mut model = fixtures::model();
        model.spec.replicas = count;
        let mut cluster = Self::of(model);
        cluster.rest();
        cluster
    }

    fn model(&mut self) -> &mut ConversationModel {
        self.model.as_mut().expect("the model is there")
    }

    fn plan(&self) -> Plan {
        match &self.model {
            Some(model) => plan(model, &self.observed, &fixtures::images()),
            None => Plan::default(),
        }
    }

    fn uid(&mut self, meta: &mut ObjectMeta) {
        self.uids += 1;
        meta.uid = Some(format!("uid-{}", self.uids));
    }

    fn apply(&mut self, change: &Change) {
        let name = self.model().name_any();
        match change.clone() {
            Change::AddFinalizer => {
                self.model().metadata.finalizers = Some(vec![desired::FINALIZER.into()]);
            }
            Change::RemoveFinalizer => {
                assert!(self.model().metadata.deletion_timestamp.is_some());
                self.model = None;
            }
            Change::ApplyService(mut service) => {
                self.uid(&mut service.metadata);
                self.observed.service = Some(*service);
            }
            Change::ApplyClaim(mut claim) => {
                let index = desired::index_of_claim(&name, &claim.name_any()).unwrap();
                self.uid(&mut claim.metadata);
                self.observed.claims.insert(index, *claim);
            }
            Change::CreatePod(mut pod) => {
                let index = desired::index_of_pod(&name, &pod.name_any()).unwrap();
                self.uid(&mut pod.metadata);
                self.doubled += u32::from(self.observed.pods.insert(index, *pod).is_some());
            }
            Change::Delete { uid, .. } => {
                let pods = self.observed.pods.values_mut().map(|pod| &mut pod.metadata);
                let claims = self.observed.claims.values_mut().map(|claim| &mut claim.metadata);
                let services =
                    self.observed.service.iter_mut().map(|service| &mut service.metadata);
                let meta = pods
                    .chain(claims)
                    .chain(services)
                    .find(|meta| meta.uid.as_ref() == Some(&uid))
                    .expect("only what is there is deleted");
                assert!(meta.deletion_timestamp.is_none(), "deleted twice");
                meta.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
            }
        }
    }

    /// What others do: what is being deleted goes, pods become ready. A claim goes only after the pod that
    /// mounts it.
    fn tick(&mut self) {
        let pods = self.observed.pods.clone();
        self.observed.pods.retain(|_, pod| !is_ending(&pod.metadata));
        self.observed.claims.retain(|index, claim| {
            !is_ending(&claim.metadata) || pods.get(index).is_some_and(mounts)
        });
        if self.observed.service.as_ref().is_some_and(|service| is_ending(&service.metadata)) {
            self.observed.service = None;
        }
        let running = self.observed.pods.values_mut().filter(|pod| !is_finished(pod));
        running.for_each(make_ready);
    }

    /// Plans and applies until there is nothing to do and nothing to wait for. Gives back the
    /// changes in order.
    fn rest(&mut self) -> Vec<Change> {
        const ROUNDS_MAX: usize = 200;
        let mut history = Vec::new();
        for _ in 0..ROUNDS_MAX {
            let plan = self.plan();
            if plan == Plan::default() {
                return history;
            }
            plan.changes.iter().for_each(|change| self.apply(change));
            history.extend(plan.changes);
            self.tick();
        }
        panic!("no rest after {ROUNDS_MAX} rounds; the last plan: {:?}", self.plan());
    }
}

/// Whether a pod mounts its replica's claim.
fn mounts(pod: &Pod) -> bool {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.into_iter().any(|volume| volume.name == "kv")
}

fn make_ready(pod: &mut Pod) {
    pod.status = serde_json::from_value(
        json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}),
    )
    .unwrap();
}

fn set_status(pod: &mut Pod, status: serde_json::Value) {
    pod.status = serde_json::from_value(status).unwrap();
}

/// A plan in words: `+pod`, `-pod smollm2-0 SpecChanged` …
fn words(changes: &[Change]) -> Vec<String> {
    let word = |change: &Change| match change {
        Change::AddFinalizer => "+finalizer".into(),
        Change::RemoveFinalizer => "-finalizer".into(),
        Change::ApplyService(service) => format!("+service {}", service.name_any()),
        Change::ApplyClaim(claim) => format!("+claim {}", claim.name_any()),
        Change::CreatePod(pod) => format!("+pod {}", pod.name_any()),
        Change::Delete { kind, name, why, .. } => format!("-{kind} {name} {why:?}"),
    };
    changes.iter().map(word).collect()
}

#[test]
fn a_new_model_gets_finalizer_service_volume_and_pod_in_this_order() {
    let mut model = fixtures::model();
    model.metadata.finalizers = None;
    let plan = Cluster::of(model).plan();
    let expected = ["+finalizer", "+service smollm2", "+claim smollm2-0-kv", "+pod smollm2-0"];
    assert_eq!(words(&plan.changes), expected);
    assert_eq!(plan.waits, []);
}

#[test]
fn a_new_model_whose_cache_is_off_gets_no_volume() {
    let mut model = fixtures::model();
    model.spec.cache.enabled = false;
    let mut cluster = Cluster::of(model);
    assert_eq!(words(&cluster.rest()), ["+service smollm2", "+pod smollm2-0"]);
}

#[test]
fn switching_the_cache_off_replaces_the_pods_and_keeps_the_volumes_for_later() {
    let mut cluster = Cluster::replicas(2);
    cluster.model().spec.cache.enabled = false;
    let replaced = [
        "-pod smollm2-1 SpecChanged",
        "+pod smollm2-1",
        "-pod smollm2-0 SpecChanged",
        "+pod smollm2-0",
    ];
    assert_eq!(words(&cluster.rest()), replaced);
    assert_eq!(cluster.observed.claims.len(), 2);
    cluster.model().spec.cache.enabled = true;
    assert_eq!(words(&cluster.rest()), replaced, "on the volumes that were there");
}

#[test]
fn volumes_of_a_cache_that_is_off_go_after_the_pods_that_mount_them_when_it_is_asked_to() {
    let mut cluster = Cluster::replicas(1);
    cluster.model().spec.cache.enabled = false;
    cluster.model().spec.cache.disk.when_scaled_down = ScaleDownVolume::Delete;
    let expected = [
        "-pod smollm2-0 SpecChanged",
        "+pod smollm2-0",
        "-persistentvolumeclaim smollm2-0-kv ScaledDown",
    ];
    assert_eq!(words(&cluster.rest()), expected);
    assert!(cluster.observed.claims.is_empty());
}

#[test]
fn a_settled_model_needs_nothing() {
    assert_eq!(Cluster::replicas(3).plan(), Plan::default());
}

#[test]
fn a_lost_pod_is_made_again_on_the_same_volume() {
    let mut cluster = Cluster::replicas(2);
    cluster.observed.pods.remove(&ReplicaIndex(1));
    assert_eq!(words(&cluster.plan().changes), ["+pod smollm2-1"]);
}

#[test]
fn no_pod_is_created_while_the_old_one_of_that_index_is_still_there() {
    let mut cluster = Cluster::replicas(1);
    let pod = cluster.observed.pods.get_mut(&ReplicaIndex(0)).unwrap();
    pod.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    let plan = cluster.plan();
    assert_eq!(plan.changes, []);
    assert_eq!(plan.waits, [Wait::Ending(Kind::Pod, "smollm2-0".into())]);
}

#[test]
fn no_pod_is_created_on_a_volume_that_is_being_deleted() {
    let mut cluster = Cluster::replicas(1);
    cluster.observed.pods.clear();
    let claim = cluster.observed.claims.get_mut(&ReplicaIndex(0)).unwrap();
    claim.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    let plan = cluster.plan();
    assert_eq!(plan.changes, []);
    assert_eq!(plan.waits, [Wait::Ending(Kind::Claim, "smollm2-0-kv".into())]);
}

#[test]
fn a_spec_change_replaces_ready_pods_one_at_a_time_from_the_highest_index() {
    let mut cluster = Cluster::replicas(3);
    cluster.model().spec.ada_skip.prefill.sublayers = 4;
    let plan = cluster.plan();
    assert_eq!(words(&plan.changes), ["-pod smollm2-2 SpecChanged"]);
    assert_eq!(plan.waits, [Wait::RollOut(2)]);
    let history = cluster.rest();
    let expected = [
        "-pod smollm2-2 SpecChanged",
        "+pod smollm2-2",
        "-pod smollm2-1 SpecChanged",
        "+pod smollm2-1",
        "-pod smollm2-0 SpecChanged",
        "+pod smollm2-0",
    ];
    assert_eq!(words(&history), expected);
}

#[test]
fn a_ready_pod_is_not_replaced_while_another_replica_is_not_ready() {
    let mut cluster = Cluster::replicas(2);
    set_status(
        cluster.observed.pods.get_mut(&ReplicaIndex(0)).unwrap(),
        json!({"phase": "Pending"}),
    );
    cluster.model().spec.ada_skip.prefill.sublayers = 4;
    // The one that is not ready goes at once, the ready one waits for it.
    let plan = cluster.plan();
    assert_eq!(words(&plan.changes), ["-pod smollm2-0 SpecChanged"]);
    assert_eq!(plan.waits, [Wait::RollOut(1)]);
}

#[test]
fn a_repaired_spec_replaces_the_broken_pod_at_once() {
    let mut cluster = Cluster::replicas(1);
    set_status(
        cluster.observed.pods.get_mut(&ReplicaIndex(0)).unwrap(),
        json!({"phase": "Pending"}),
    );
    cluster.model().spec.model.image = Some("a-better-image".into());
    assert_eq!(words(&cluster.plan().changes), ["-pod smollm2-0 SpecChanged"]);
}

#[test]
fn an_evicted_pod_is_deleted_and_made_again() {
    let mut cluster = Cluster::replicas(1);
    set_status(
        cluster.observed.pods.get_mut(&ReplicaIndex(0)).unwrap(),
        json!({"phase": "Failed"}),
    );
    assert_eq!(words(&cluster.rest()), ["-pod smollm2-0 Finished", "+pod smollm2-0"]);
}

#[test]
fn scaling_down_ends_the_highest_indexes_and_keeps_their_volumes() {
    let mut cluster = Cluster::replicas(3);
    cluster.model().spec.replicas = 1;
    let history = cluster.rest();
    assert_eq!(words(&history), ["-pod smollm2-2 ScaledDown", "-pod smollm2-1 ScaledDown"]);
    assert_eq!(cluster.observed.claims.len(), 3);
    cluster.model().spec.replicas = 2;
    assert_eq!(words(&cluster.rest()), ["+pod smollm2-1"], "the volume is found again");
}

#[test]
fn scaling_down_deletes_volumes_after_their_pods_when_it_is_asked_to() {
    let mut cluster = Cluster::replicas(2);
    cluster.model().spec.replicas = 1;
    cluster.model().spec.cache.disk.when_scaled_down = ScaleDownVolume::Delete;
    let history = cluster.rest();
    let expected = ["-pod smollm2-1 ScaledDown", "-persistentvolumeclaim smollm2-1-kv ScaledDown"];
    assert_eq!(words(&history), expected);
}

#[test]
fn a_volume_grows_with_the_spec_and_never_shrinks() {
    let mut cluster = Cluster::replicas(1);
    cluster.model().spec.cache.disk.size = ByteSize::gibibytes(4);
    assert!(words(&cluster.plan().changes).contains(&"+claim smollm2-0-kv".to_owned()));
    cluster.rest();
    cluster.model().spec.cache.disk.size = ByteSize::gibibytes(1);
    assert!(!words(&cluster.plan().changes).contains(&"+claim smollm2-0-kv".to_owned()));
}

#[test]
fn a_lost_disk_is_replaced_by_a_new_cold_one() {
    let mut cluster = Cluster::replicas(1);
    let claim = cluster.observed.claims.get_mut(&ReplicaIndex(0)).unwrap();
    claim.status = serde_json::from_value(json!({"phase": "Lost"})).unwrap();
    let expected = [
        "-pod smollm2-0 VolumeLost",
        "-persistentvolumeclaim smollm2-0-kv VolumeLost",
        "+claim smollm2-0-kv",
        "+pod smollm2-0",
    ];
    assert_eq!(words(&cluster.rest()), expected);
}

#[test]
fn a_changed_service_is_set_right() {
    let mut cluster = Cluster::replicas(1);
    let spec = cluster.observed.service.as_mut().unwrap().spec.as_mut().unwrap();
    spec.cluster_ip = Some("10.0.0.7".into()); // What the server adds is left alone.
    assert_eq!(cluster.plan(), Plan::default());
    let spec = cluster.observed.service.as_mut().unwrap().spec.as_mut().unwrap();
    spec.ports.as_mut().unwrap()[0].port = 81;
    assert_eq!(words(&cluster.plan().changes), ["+service smollm2"]);
}

#[test]
fn what_belongs_to_somebody_else_is_not_touched() {
    let mut cluster = Cluster::of(fixtures::model());
    let taken = (Kind::Claim, "smollm2-0-kv".to_owned());
    cluster.observed.strangers.insert(taken.clone());
    let plan = cluster.plan();
    assert_eq!(words(&plan.changes), ["+service smollm2"], "no pod on somebody's volume");
    assert_eq!(plan.waits, [Wait::NameTaken(taken.0, taken.1)]);
}

#[test]
fn objects_of_a_former_model_of_that_name_are_not_ours() {
    let mut model = fixtures::model();
    let pod = desired::pod::pod(&model, ReplicaIndex(0), &fixtures::images());
    model.metadata.uid = Some("another".into());
    let observed = Observed::sort(&model, vec![pod], vec![], vec![]);
    assert_eq!(observed.pods, BTreeMap::new());
}

#[test]
fn a_deleted_model_gives_up_route_pods_volumes_and_finalizer_in_this_order() {
    let mut cluster = Cluster::replicas(1);
    cluster.model().metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    let expected = [
        "-service smollm2 ModelDeleted",
        "-pod smollm2-0 ModelDeleted",
        "-persistentvolumeclaim smollm2-0-kv ModelDeleted",
        "-finalizer",
    ];
    assert_eq!(words(&cluster.rest()), expected);
    assert!(cluster.model.is_none());
    assert!(cluster.observed.pods.is_empty() && cluster.observed.claims.is_empty());
}

#[test]
fn volumes_that_a_scale_down_kept_go_with_the_model() {
    let mut cluster = Cluster::replicas(3);
    cluster.model().spec.replicas = 0;
    cluster.rest();
    assert_eq!(cluster.observed.claims.len(), 3);
    cluster.model().metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    cluster.rest();
    assert!(cluster.observed.claims.is_empty());
}

#[test]
fn a_deleted_model_without_our_finalizer_is_let_alone() {
    let mut model = fixtures::model();
    model.metadata.finalizers = None;
    model.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    assert_eq!(Cluster::of(model).plan(), Plan::default());
}

/// Something that happens to a cluster between two looks.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Scale(u32),
    ChangeSpec(u32),
    GrowDisk(u64),
    DeleteVolumesOnScaleDown(bool),
    SwitchCache(bool),
    PodDeleted(u32),
    PodGone(u32),
    PodFailed(u32),
    PodUnready(u32),
    DiskLost(u32),
    ServiceGone,
    ModelDeleted,
    /// The operator takes one look and is killed after so many changes.
    LookInterrupted(usize),
    Tick,
}

fn happening() -> impl Strategy<Value = Happening> {
    use Happening::*;
    prop_oneof![
        (0_u32..5).prop_map(Scale),
        (0_u32..3).prop_map(ChangeSpec),
        (2_u64..5).prop_map(GrowDisk),
        any::<bool>().prop_map(DeleteVolumesOnScaleDown),
        any::<bool>().prop_map(SwitchCache),
        (0_u32..5).prop_map(PodDeleted),
        (0_u32..5).prop_map(PodGone),
        (0_u32..5).prop_map(PodFailed),
        (0_u32..5).prop_map(PodUnready),
        (0_u32..5).prop_map(DiskLost),
        Just(ServiceGone),
        Just(ModelDeleted),
        (0_usize..4).prop_map(LookInterrupted),
        Just(Tick),
    ]
}

impl Cluster {
    fn happen(&mut self, happening: Happening) {
        if self.model.is_none() {
            return;
        }
        match happening {
            Happening::Scale(count) => self.model().spec.replicas = count,
            Happening::ChangeSpec(k) => self.model().spec.ada_skip.prefill.sublayers = k,
            Happening::GrowDisk(gibibytes) => {
                let size = &mut self.model().spec.cache.disk.size;
                *size = (*size).max(ByteSize::gibibytes(gibibytes));
            }
            Happening::DeleteVolumesOnScaleDown(delete) => {
                self.model().spec.cache.disk.when_scaled_down =
                    if delete { ScaleDownVolume::Delete } else { ScaleDownVolume::Keep };
            }
            Happening::SwitchCache(enabled) => self.model().spec.cache.enabled = enabled,
            Happening::PodDeleted(index) => {
                if let Some(pod) = self.observed.pods.get_mut(&ReplicaIndex(index)) {
                    pod.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
                }
            }
            Happening::PodGone(index) => {
                self.observed.pods.remove(&ReplicaIndex(index));
            }
            Happening::PodFailed(index) => {
                if let Some(pod) = self.observed.pods.get_mut(&ReplicaIndex(index)) {
                    set_status(pod, json!({"phase": "Failed"}));
                }
            }
            Happening::PodUnready(index) => {
                if let Some(pod) = self.observed.pods.get_mut(&ReplicaIndex(index)) {
                    set_status(pod, json!({"phase": "Running"}));
                }
            }
            Happening::DiskLost(index) => {
                if let Some(claim) = self.observed.claims.get_mut(&ReplicaIndex(index)) {
                    claim.status = serde_json::from_value(json!({"phase": "Lost"})).unwrap();
                }
            }
            Happening::ServiceGone => self.observed.service = None,
            Happening::ModelDeleted => {
                self.model().metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
            }
            Happening::LookInterrupted(count) => {
                for change in self.plan().changes.iter().take(count) {
                    self.apply(change);
                }
            }
            Happening::Tick => self.tick(),
        }
    }
}

proptest! {
    #[test]
    fn whatever_happened_applying_plans_comes_to_rest_in_the_wanted_state(
        happenings in proptest::collection::vec(happening(), 0..24)
    ) {
        let mut cluster = Cluster::replicas(2);
        for happening in happenings {
            cluster.happen(happening);
        }
        cluster.rest();
        cluster.tick(); // What was broken and needs no change of ours becomes ready by itself.
        prop_assert_eq!(cluster.plan(), Plan::default());
        prop_assert_eq!(cluster.doubled, 0, "two pods of one index");
        let observed = &cluster.observed;
        match &cluster.model {
            None => {
                prop_assert!(observed.pods.is_empty());
                prop_assert!(observed.claims.is_empty());
                prop_assert!(observed.service.is_none());
            }
            Some(model) => {
                let wanted: Vec<_> = (0..model.spec.replicas).map(ReplicaIndex).collect();
                prop_assert_eq!(observed.pods.keys().copied().collect::<Vec<_>>(), wanted.clone());
                prop_assert!(observed.service.is_some());
                for (index, pod) in &observed.pods {
                    prop_assert!(is_ready(pod));
                    prop_assert!(is_current(model, *index, pod, &fixtures::images()));
                }
                let cache = &model.spec.cache;
                let deletes = cache.disk.when_scaled_down == ScaleDownVolume::Delete;
                if !cache.enabled {
                    prop_assert!(!deletes || observed.claims.is_empty());
                    return Ok(());
                }
                prop_assert!(wanted.iter().all(|index| observed.claims.contains_key(index)));
                for index in wanted {
                    let size = desired::volume::requested_size(&observed.claims[&index]);
                    prop_assert_eq!(size, Some(model.spec.cache.disk.size));
                }
            }
        }
    }
}
