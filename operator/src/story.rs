//! Events: the story of a model as `kubectl describe` tells it. What was done, and what turned.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use kube::runtime::events::{Event, EventType};

use crate::api::ConversationModelStatus;
use crate::conditions::READY;
use crate::plan::{Change, Why};

/// Longest note; the API server refuses longer ones.
const NOTE_MAX: usize = 1_024;

/// Reasons of `Ready` that are not the fault of anybody.
const CALM: [&str; 6] =
    ["Ready", "ScaledToZero", "Starting", "Replacing", "Terminating", "VolumePending"];

/// The event that tells of a change that was carried out.
pub fn of_change(change: &Change) -> Event {
    match change {
        Change::AddFinalizer => {
            normal("Accepted", "Accept", "the model is taken care of from now on")
        }
        Change::RemoveFinalizer => {
            normal("CleanedUp", "Delete", "no pod, volume or service is left")
        }
        Change::ApplyService(service) => {
            normal("ServiceApplied", "Apply", &format!("applied service {}", service.name_any()))
        }
        Change::ApplyClaim(claim) => {
            normal("VolumeApplied", "Apply", &format!("applied cache volume {}", claim.name_any()))
        }
        Change::CreatePod(pod) => {
            normal("PodCreated", "Create", &format!("created pod {}", pod.name_any()))
        }
        Change::Delete { kind, name, why, .. } => {
            let note = |because: &str| format!("deleting {kind} {name}: {because}");
            match why {
                Why::SpecChanged => {
                    normal("RollingOut", "Delete", &note("the spec has changed since it was made"))
                }
                Why::ScaledDown => {
                    normal("ScaledDown", "Delete", &note("fewer replicas are asked for"))
                }
                Why::ModelDeleted => {
                    normal("Terminating", "Delete", &note("the model is being deleted"))
                }
                Why::Finished => {
                    warning("PodFinished", "Delete", &note("its containers have ended for good"))
                }
                Why::VolumeLost => warning(
                    "VolumeLost",
                    "Delete",
                    &note("the disk below the volume is lost; the cache starts again, cold"),
                ),
            }
        }
    }
}

/// The event that tells of a new reason of `Ready`, if it has one that was not told yet.
pub fn of_turn(
    old: Option<&ConversationModelStatus>,
    new: &ConversationModelStatus,
) -> Option<Event> {
    let ready = |status: &ConversationModelStatus| -> Option<Condition> {
        status.conditions.iter().find(|condition| condition.type_ == READY).cloned()
    };
    let now = ready(new)?;
    let before = old.and_then(ready);
    if before.is_some_and(|before| before.reason == now.reason && before.status == now.status) {
        return None;
    }
    let calm = CALM.contains(&now.reason.as_str());
    let told = if calm { normal } else { warning };
    Some(told(&now.reason, "Reconcile", &now.message))
}

fn normal(reason: &str, action: &str, note: &str) -> Event {
    event(EventType::Normal, reason, action, note)
}

fn warning(reason: &str, action: &str, note: &str) -> Event {
    event(EventType::Warning, reason, action, note)
}

fn event(type_: EventType, reason: &str, action: &str, note: &str) -> Event {
    Event {
        type_,
        reason: reason.into(),
        action: action.into(),
        note: Some(note.chars().take(NOTE_MAX).collect()),
        secondary: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    fn with_ready(status: &str, reason: &str) -> ConversationModelStatus {
        ConversationModelStatus {
            conditions: vec![Condition {
                type_: READY.into(),
                status: status.into(),
                reason: reason.into(),
                message: "told".into(),
                observed_generation: None,
                last_transition_time: Time(Timestamp::UNIX_EPOCH),
            }],
            ..ConversationModelStatus::default()
        }
    }

    #[test]
    fn a_reason_is_told_once() {
        let failing = with_ready("False", "ImageMissing");
        assert!(of_turn(None, &failing).is_some_and(|event| event.type_ == EventType::Warning));
        assert!(of_turn(Some(&failing), &failing).is_none());
        let ready = with_ready("True", "Ready");
        let event = of_turn(Some(&failing), &ready).unwrap();
        assert_eq!((event.type_, event.reason.as_str()), (EventType::Normal, "Ready"));
    }
}
