//! The status of a model, from what was seen and planned. Pure but for the time it is given.
//!
//! | condition | true when |
//! | --- | --- |
//! | `Ready` | every replica that was asked for answers requests |
//! | `Progressing` | something still changes, and is expected to end |
//! | `CacheReady` | every replica has its volume and a running cache daemon |
//! | `ModelResolved` | a runtime has read the weights; false when one refuses them |
//!
//! `Ready` carries the one reason that a person should read first: what must be fixed comes before
//! what will pass.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::api::{ConversationModel, ConversationModelStatus, ReplicaPhase, ReplicaStatus};
use crate::desired::pod::{CACHE_DAEMON, RUNTIME};
use crate::desired::{self, Images, ReplicaIndex};
use crate::observe::{Kind, Observed};
use crate::plan::{self, Plan, Wait};
use crate::problem::{self, Problem, Trouble};

/// Every requested replica answers requests.
pub const READY: &str = "Ready";
/// Something still changes.
pub const PROGRESSING: &str = "Progressing";
/// Volumes and cache daemons are there.
pub const CACHE_READY: &str = "CacheReady";
/// The weights were read.
pub const MODEL_RESOLVED: &str = "ModelResolved";

/// Longest message that is written; the API server refuses conditions beyond 32 KiB, and nobody
/// reads that far.
const MESSAGE_MAX: usize = 1_024;

/// One condition before it has a time.
struct Verdict {
    kind: &'static str,
    status: bool,
    reason: String,
    message: String,
}

impl Verdict {
    fn new(kind: &'static str, status: bool, reason: &str, message: impl Into<String>) -> Self {
        Self { kind, status, reason: reason.into(), message: message.into() }
    }
}

/// What is known about a model when its status is written.
pub struct Facts<'a> {
    /// The model.
    pub model: &'a ConversationModel,
    /// What was seen.
    pub observed: &'a Observed,
    /// What was planned from that.
    pub plan: &'a Plan,
    /// What the API server refused, in a sentence, because the user must change something.
    pub refused: Option<&'a str>,
    /// Default images, to tell which pods are up to date.
    pub images: &'a Images,
}

/// The status to write. Times of conditions that did not change are kept.
pub fn status(facts: &Facts<'_>, now: Timestamp) -> ConversationModelStatus {
    let model = facts.model;
    let replica_statuses = facts.replicas();
    let ready =
        replica_statuses.iter().filter(|replica| replica.phase == ReplicaPhase::Ready).count();
    let verdicts = [facts.ready(ready), facts.progressing(ready), facts.cache(), facts.resolved()];
    let old = model.status.as_ref().map_or(&[][..], |status| &status.conditions);
    let alive = || facts.observed.pods.iter().filter(|(_, pod)| !plan::is_ending(&pod.metadata));
    ConversationModelStatus {
        observed_generation: model.metadata.generation,
        replicas: alive().count() as u32,
        ready_replicas: ready as u32,
        updated_replicas: alive()
            .filter(|(index, pod)| plan::is_current(model, **index, pod, facts.images))
            .count() as u32,
        selector: desired::selector(&model.name_any()),
        conditions: verdicts
            .into_iter()
            .map(|verdict| dated(verdict, old, model.metadata.generation, now))
            .collect(),
        replica_statuses,
    }
}

/// Gives a verdict its time: the old condition's, unless its status has turned.
fn dated(
    verdict: Verdict,
    old: &[Condition],
    generation: Option<i64>,
    now: Timestamp,
) -> Condition {
    let status = if verdict.status { "True" } else { "False" };
    let same =
        old.iter().find(|condition| condition.type_ == verdict.kind && condition.status == status);
    Condition {
        type_: verdict.kind.into(),
        status: status.into(),
        reason: verdict.reason,
        message: verdict.message.chars().take(MESSAGE_MAX).collect(),
        observed_generation: generation,
        last_transition_time: same
            .map_or_else(|| Time(now), |condition| condition.last_transition_time.clone()),
    }
}

impl Facts<'_> {
    fn ready(&self, ready: usize) -> Verdict {
        let verdict =
            |status, reason: &str, message: String| Verdict::new(READY, status, reason, message);
        let wanted = self.model.spec.replicas as usize;
        if self.model.metadata.deletion_timestamp.is_some() {
            return verdict(false, "Terminating", self.terminating());
        }
        if ready == wanted && self.refused.is_none() && self.name_taken().is_none() {
            return match wanted {
                0 => verdict(true, "ScaledToZero", "no replica is asked for".into()),
                _ => {
                    verdict(true, "Ready", format!("{ready} of {wanted} replicas answer requests"))
                }
            };
        }
        if let Some(refused) = self.refused {
            return verdict(false, "Refused", refused.into());
        }
        if let Some((kind, name)) = self.name_taken() {
            let message = format!(
                "{kind} {name} exists and belongs to somebody else; delete it or name the model otherwise"
            );
            return verdict(false, "NameTaken", message);
        }
        if let Some(problem) = self.worst_problem() {
            return verdict(false, problem.trouble.reason(), problem.message);
        }
        if let Some(message) = self.volume_problem() {
            return verdict(false, "VolumePending", message);
        }
        if let Some(name) = self.first_ending(&[Kind::Pod, Kind::Claim, Kind::Service]) {
            let message =
                format!("{ready} of {wanted} replicas answer requests; waiting for {name} to go");
            return verdict(false, "Replacing", message);
        }
        verdict(false, "Starting", format!("{ready} of {wanted} replicas answer requests"))
    }

    fn progressing(&self, ready: usize) -> Verdict {
        let verdict = |status, reason: &str, message: &str| {
            Verdict::new(PROGRESSING, status, reason, message)
        };
        let wanted = self.model.spec.replicas as usize;
        if self.model.metadata.deletion_timestamp.is_some() {
            return verdict(true, "Terminating", "pods, volumes and the service are being deleted");
        }
        if self.refused.is_some() || self.name_taken().is_some() {
            return verdict(false, "Blocked", "nothing changes until the refusal is dealt with");
        }
        if let Some(left) = self.plan.waits.iter().find_map(|wait| match wait {
            Wait::RollOut(left) => Some(left),
            _ => None,
        }) {
            let message =
                format!("{left} replicas still run the former spec; one is replaced at a time");
            return verdict(true, "RollingOut", &message);
        }
        if let Some(problem) = self.worst_problem() {
            // Kubernetes tries again by itself, but not towards anything: it will fail again.
            return verdict(false, problem.trouble.reason(), &problem.message);
        }
        if self.plan.changes.is_empty() && self.plan.waits.is_empty() && ready == wanted {
            return verdict(false, "Settled", "the cluster is as the spec asks");
        }
        verdict(true, "Starting", "replicas are being made and started")
    }

    fn cache(&self) -> Verdict {
        let verdict = |status, reason: &str, message: String| {
            Verdict::new(CACHE_READY, status, reason, message)
        };
        let wanted = self.model.spec.replicas;
        if wanted == 0 {
            return verdict(true, "ScaledToZero", "no replica is asked for".into());
        }
        if !self.model.spec.cache.enabled {
            let message = "the cache is off (spec.cache.enabled): every turn is computed anew";
            return verdict(true, "Off", message.into());
        }
        if let Some(message) = self.volume_problem() {
            return verdict(false, "VolumePending", message);
        }
        let running = (0..wanted)
            .filter(|index| {
                self.observed
                    .pods
                    .get(&ReplicaIndex(*index))
                    .and_then(|pod| problem::container(pod, CACHE_DAEMON))
                    // Its startup probe has succeeded: the region is there and the disk is open.
                    .is_some_and(|daemon| daemon.started == Some(true))
            })
            .count();
        let message = format!("{running} of {wanted} cache daemons run");
        if running == wanted as usize {
            return verdict(true, "DaemonsRunning", message);
        }
        match self.problems().find(|problem| problem.container.as_deref() == Some(CACHE_DAEMON)) {
            Some(problem) => verdict(false, problem.trouble.reason(), problem.message),
            None => verdict(false, "DaemonsStarting", message),
        }
    }

    fn resolved(&self) -> Verdict {
        let verdict = |status, reason: &str, message: String| {
            Verdict::new(MODEL_RESOLVED, status, reason, message)
        };
        let bad = self.problems().find(|problem| problem.trouble == Trouble::ModelFileInvalid);
        if let Some(problem) = bad {
            return verdict(false, problem.trouble.reason(), problem.message);
        }
        let loaded = self.observed.pods.values().any(|pod| {
            problem::container(pod, RUNTIME).is_some_and(|runtime| runtime.started == Some(true))
        });
        let name = &self.model.spec.model.name;
        if loaded {
            return verdict(true, "Loaded", format!("a runtime serves {name}"));
        }
        verdict(false, "NotLoaded", format!("no runtime has loaded {name} yet"))
    }

    fn replicas(&self) -> Vec<ReplicaStatus> {
        let name = self.model.name_any();
        let beyond = self.observed.pods.range(ReplicaIndex(self.model.spec.replicas)..);
        let indexes = (0..self.model.spec.replicas).chain(beyond.map(|(index, _)| index.0));
        indexes
            .map(|index| {
                let pod = self.observed.pods.get(&ReplicaIndex(index));
                let last_words = self.observed.last_words.get(&ReplicaIndex(index));
                let problem = pod.and_then(|pod| problem::of(pod, last_words));
                let phase = match pod {
                    None => ReplicaPhase::Missing,
                    Some(pod) if plan::is_ending(&pod.metadata) => ReplicaPhase::Ending,
                    Some(pod) if plan::is_ready(pod) => ReplicaPhase::Ready,
                    Some(_) if problem.is_some() => ReplicaPhase::Failing,
                    Some(_) => ReplicaPhase::Starting,
                };
                let told = problem.filter(|_| phase == ReplicaPhase::Failing);
                ReplicaStatus {
                    index,
                    pod: desired::pod_name(&name, ReplicaIndex(index)),
                    phase,
                    restarts: pod.map_or(0, problem::restarts),
                    message: told.map(|problem| problem.message),
                }
            })
            .collect()
    }

    /// Problems of pods that do not serve and are not about to go.
    fn problems(&self) -> impl Iterator<Item = Problem> {
        let pods = self.observed.pods.iter();
        pods.filter(|(_, pod)| !plan::is_ending(&pod.metadata) && !plan::is_ready(pod))
            .filter_map(|(index, pod)| problem::of(pod, self.observed.last_words.get(index)))
    }

    fn worst_problem(&self) -> Option<Problem> {
        // A pod that only waits for the disk of its volume is told by the volume.
        let told_by_volume = |problem: &Problem| {
            problem.trouble == Trouble::Unschedulable && self.volume_problem().is_some()
        };
        self.problems()
            .filter(|problem| !told_by_volume(problem))
            .min_by_key(|problem| problem.trouble)
    }

    /// A volume that keeps a replica waiting: one that is going, or one that no disk was found for.
    fn volume_problem(&self) -> Option<String> {
        if !self.model.spec.cache.enabled {
            return None; // Nobody waits for volumes that are kept for later.
        }
        self.observed.claims.iter().find_map(|(index, claim)| {
            let name = claim.name_any();
            if index.0 >= self.model.spec.replicas {
                return None;
            }
            if plan::is_ending(&claim.metadata) {
                return Some(format!(
                    "volume claim {name} is still being deleted; its successor is made when it has gone"
                ));
            }
            let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
            let class = claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref());
            let class = class.map_or("the default storage class".to_owned(), |class| {
                format!("storage class {class}")
            });
            (phase == Some("Pending"))
                .then(|| format!("volume claim {name} waits for a disk of {class}"))
        })
    }

    fn name_taken(&self) -> Option<(Kind, &str)> {
        self.plan.waits.iter().find_map(|wait| match wait {
            Wait::NameTaken(kind, name) => Some((*kind, name.as_str())),
            _ => None,
        })
    }

    fn first_ending(&self, kinds: &[Kind]) -> Option<String> {
        self.plan.waits.iter().find_map(|wait| match wait {
            Wait::Ending(kind, name) if kinds.contains(kind) => Some(format!("{kind} {name}")),
            _ => None,
        })
    }

    fn terminating(&self) -> String {
        match self.first_ending(&[Kind::Pod, Kind::Service, Kind::Claim]) {
            Some(name) => format!("waiting for {name} to go"),
            None => "pods, volumes and the service are being deleted".into(),
        }
    }
}

#[cfg(test)]
mod tests;
