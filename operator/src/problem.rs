//! What keeps a pod from serving, in words that people understand. Pure.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod};
use kube::ResourceExt;

use crate::desired::pod::{CACHE_DAEMON, RUNTIME};

/// Exit code of a program that refuses its settings.
const EXIT_CONFIGURATION: i32 = 64;
/// Exit code of a runtime that refuses its model file.
const EXIT_MODEL_FILE: i32 = 65;
/// Exit code of a cache daemon whose disk refuses to be read or written.
const EXIT_DISK: i32 = 74;
/// Longest part of a container's last words that goes into a condition.
const LAST_WORDS_MAX: usize = 400;

/// Why a pod does not serve; the name becomes the reason of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trouble {
    /// The weights cannot be read: another file is needed.
    ModelFileInvalid,
    /// A program refuses its settings: the spec must change.
    ConfigurationRefused,
    /// The disk of the cache cannot be used, or another daemon holds it.
    DiskFailed,
    /// An image cannot be had.
    ImageMissing,
    /// A container was killed because its memory limit was reached.
    OutOfMemory,
    /// A program ends again and again.
    CrashLooping,
    /// The kubelet cannot make a container.
    ContainerNotCreated,
    /// A volume cannot be attached or mounted; often another pod still holds it.
    VolumeUnavailable,
    /// No node fits.
    Unschedulable,
}

impl Trouble {
    /// The reason of a condition.
    pub fn reason(self) -> &'static str {
        match self {
            Self::ModelFileInvalid => "ModelFileInvalid",
            Self::ConfigurationRefused => "ConfigurationRefused",
            Self::DiskFailed => "DiskFailed",
            Self::ImageMissing => "ImageMissing",
            Self::OutOfMemory => "OutOfMemory",
            Self::CrashLooping => "CrashLooping",
            Self::ContainerNotCreated => "ContainerNotCreated",
            Self::VolumeUnavailable => "VolumeUnavailable",
            Self::Unschedulable => "Unschedulable",
        }
    }
}

/// One thing that is wrong with a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What kind of trouble.
    pub trouble: Trouble,
    /// Container in trouble; none when the pod as a whole is.
    pub container: Option<String>,
    /// A sentence: which pod, what happened, what its program said.
    pub message: String,
}

/// The newest event about a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LastWords {
    /// Its reason, such as `FailedMount`.
    pub reason: String,
    /// Its sentence, or a fuller one of the same trouble.
    pub note: String,
}

/// The worst thing that is wrong with the pod, if any.
pub fn of(pod: &Pod, last_words: Option<&LastWords>) -> Option<Problem> {
    let containers = containers(pod).filter_map(|container| of_container(pod, container));
    containers
        .chain(of_placement(pod))
        .chain(last_words.and_then(|words| of_last_words(pod, words)))
        .min_by_key(|problem| problem.trouble)
}

/// Whether the pod has a node and waits for something that its own status does not tell: containers
/// that are "being created" may be waiting for an image volume or a disk.
pub fn is_mute(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
    let is = |wanted: &str| {
        conditions.clone().any(|condition| condition.type_ == wanted && condition.status == "True")
    };
    let waits = |container: &ContainerStatus| {
        let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
        let reason = waiting.and_then(|waiting| waiting.reason.as_deref());
        matches!(reason, Some("ContainerCreating" | "PodInitializing"))
    };
    let ending = pod.metadata.deletion_timestamp.is_some();
    !ending && is("PodScheduled") && !is("Ready") && containers(pod).any(waits)
}

/// Whether an event's reason tells of an image that could not be pulled.
pub fn is_pull_failure(reason: &str) -> bool {
    matches!(reason, "Failed" | "BackOff" | "ErrImageNeverPull" | "InspectFailed")
}

fn of_last_words(pod: &Pod, words: &LastWords) -> Option<Problem> {
    let (name, note) = (pod.name_any(), &words.note);
    let (trouble, message) = match words.reason.as_str() {
        reason if is_pull_failure(reason) => {
            (Trouble::ImageMissing, format!("pod {name} waits for an image: {note}"))
        }
        "FailedMount" | "FailedAttachVolume" | "FailedMapVolume" => {
            (Trouble::VolumeUnavailable, format!("pod {name} waits for a volume: {note}"))
        }
        "FailedCreatePodSandBox" => {
            (Trouble::ContainerNotCreated, format!("pod {name} cannot be started: {note}"))
        }
        _ => return None,
    };
    Some(Problem { trouble, container: None, message })
}

/// Restarts of the pod's containers, all together.
pub fn restarts(pod: &Pod) -> u32 {
    containers(pod).map(|container| u32::try_from(container.restart_count).unwrap_or(0)).sum()
}

/// The status of one container, sidecars included.
pub fn container<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStatus> {
    containers(pod).find(|container| container.name == name)
}

fn containers(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.as_ref();
    let sidecars = status.and_then(|status| status.init_container_statuses.as_ref());
    let containers = status.and_then(|status| status.container_statuses.as_ref());
    sidecars.into_iter().chain(containers).flatten()
}

fn of_placement(pod: &Pod) -> Option<Problem> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let refused = conditions.iter().find(|condition| {
        condition.type_ == "PodScheduled"
            && condition.status == "False"
            && condition.reason.as_deref() == Some("Unschedulable")
    })?;
    let said = refused.message.as_deref().unwrap_or("no node fits");
    Some(Problem {
        trouble: Trouble::Unschedulable,
        container: None,
        message: format!("no node can take pod {}: {said}", pod.name_any()),
    })
}

fn of_container(pod: &Pod, container: &ContainerStatus) -> Option<Problem> {
    let state = container.state.as_ref()?;
    let whole = |trouble, message| {
        Some(Problem { trouble, container: Some(container.name.clone()), message })
    };
    let place = format!("container {} of pod {}", container.name, pod.name_any());
    if let Some(waiting) = &state.waiting {
        let reason = waiting.reason.as_deref().unwrap_or_default();
        let said = waiting.message.as_deref().unwrap_or("no details");
        return match reason {
            "ErrImagePull"
            | "ImagePullBackOff"
            | "InvalidImageName"
            | "ErrImageNeverPull"
            | "ImageInspectError"
            | "RegistryUnavailable" => {
                whole(Trouble::ImageMissing, format!("{place} has no image ({reason}): {said}"))
            }
            "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => whole(
                Trouble::ContainerNotCreated,
                format!("{place} cannot be made ({reason}): {said}"),
            ),
            "CrashLoopBackOff" => {
                let ended = last_end(container)?;
                whole(trouble_of_end(container, ended), describe_end(&place, ended))
            }
            _ => None,
        };
    }
    let ended = last_end(container)?;
    let refused = matches!(ended.exit_code, EXIT_CONFIGURATION | EXIT_MODEL_FILE);
    let down = state.terminated.is_some() && ended.exit_code != 0;
    // Running again after a refusal: the next refusal is seconds away, the sentence stays true.
    let again = refused && container.started != Some(true);
    (down || again)
        .then(|| whole(trouble_of_end(container, ended), describe_end(&place, ended)))
        .flatten()
}

/// How the container ended last: now, or before its present state.
fn last_end(container: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    let ended =
        |state: &'_ Option<ContainerState>| state.as_ref().is_some_and(|s| s.terminated.is_some());
    let state = if ended(&container.state) { &container.state } else { &container.last_state };
    state.as_ref()?.terminated.as_ref()
}

fn trouble_of_end(container: &ContainerStatus, ended: &ContainerStateTerminated) -> Trouble {
    match ended.exit_code {
        EXIT_CONFIGURATION => Trouble::ConfigurationRefused,
        EXIT_MODEL_FILE if container.name == RUNTIME => Trouble::ModelFileInvalid,
        EXIT_DISK if container.name == CACHE_DAEMON => Trouble::DiskFailed,
        _ if ended.reason.as_deref() == Some("OOMKilled") => Trouble::OutOfMemory,
        _ => Trouble::CrashLooping,
    }
}

fn describe_end(place: &str, ended: &ContainerStateTerminated) -> String {
    let code = ended.exit_code;
    let how = match ended.reason.as_deref() {
        Some("OOMKilled") => {
            "was killed at its memory limit; raise spec.model.memory, it is part of that limit"
                .to_owned()
        }
        _ => format!("ended with exit code {code}"),
    };
    match last_words(ended.message.as_deref().unwrap_or_default()) {
        Some(words) => format!("{place} {how}: {words}"),
        None => format!("{place} {how}"),
    }
}

/// The last line that a program wrote: where ours say why they end.
fn last_words(message: &str) -> Option<String> {
    let line = message.lines().map(str::trim).rfind(|line| !line.is_empty())?;
    Some(line.chars().take(LAST_WORDS_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(status: &serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "chat-0"}, "status": status})).unwrap()
    }

    fn waiting(name: &str, reason: &str, last_exit: Option<i32>, words: &str) -> Pod {
        let last =
            last_exit.map(|code| json!({"terminated": {"exitCode": code, "message": words}}));
        pod(&json!({"containerStatuses": [{
            "name": name, "image": "", "imageID": "", "ready": false, "restartCount": 3,
            "state": {"waiting": {"reason": reason, "message": "told by the kubelet"}},
            "lastState": last.unwrap_or(json!({})),
        }]}))
    }

    #[test]
    fn a_pod_that_starts_has_no_problem() {
        assert_eq!(of(&pod(&json!({})), None), None);
        assert_eq!(of(&waiting("runtime", "PodInitializing", None, ""), None), None);
        assert_eq!(of(&waiting("runtime", "ContainerCreating", None, ""), None), None);
    }

    #[test]
    fn exit_code_65_of_the_runtime_is_a_bad_model_file_and_its_sentence_is_kept() {
        let words = "loading\nmodel file /models/x.gguf is cut off; fetch it again\n";
        let problem = of(&waiting("runtime", "CrashLoopBackOff", Some(65), words), None).unwrap();
        assert_eq!(problem.trouble, Trouble::ModelFileInvalid);
        assert!(problem.message.ends_with("is cut off; fetch it again"), "{}", problem.message);
        assert!(problem.message.contains("chat-0"));
    }

    #[test]
    fn exit_codes_and_waiting_reasons_become_reasons_that_name_the_remedy() {
        let cases = [
            ("runtime", "CrashLoopBackOff", Some(64), Trouble::ConfigurationRefused),
            ("cache-daemon", "CrashLoopBackOff", Some(64), Trouble::ConfigurationRefused),
            ("cache-daemon", "CrashLoopBackOff", Some(65), Trouble::CrashLooping),
            ("cache-daemon", "CrashLoopBackOff", Some(74), Trouble::DiskFailed),
            ("runtime", "CrashLoopBackOff", Some(74), Trouble::CrashLooping),
            ("runtime", "CrashLoopBackOff", Some(70), Trouble::CrashLooping),
            ("runtime", "ImagePullBackOff", None, Trouble::ImageMissing),
            ("runtime", "ErrImageNeverPull", None, Trouble::ImageMissing),
            ("runtime", "CreateContainerConfigError", None, Trouble::ContainerNotCreated),
        ];
        for (name, reason, exit, trouble) in cases {
            let problem = of(&waiting(name, reason, exit, "said"), None).unwrap();
            assert_eq!(problem.trouble, trouble, "{name} {reason} {exit:?}");
        }
    }

    #[test]
    fn a_container_killed_for_memory_is_out_of_memory() {
        let status = json!({"containerStatuses": [{
            "name": "runtime", "image": "", "imageID": "", "ready": false, "restartCount": 1,
            "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
        }]});
        assert_eq!(of(&pod(&status), None).unwrap().trouble, Trouble::OutOfMemory);
    }

    #[test]
    fn a_clean_end_is_no_problem() {
        let status = json!({"containerStatuses": [{
            "name": "runtime", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 0, "reason": "Completed"}},
        }]});
        assert_eq!(of(&pod(&status), None), None);
    }

    #[test]
    fn a_program_that_runs_again_after_a_crash_is_no_longer_in_trouble() {
        let status = json!({"containerStatuses": [{
            "name": "runtime", "image": "", "imageID": "", "ready": true, "restartCount": 1, "started": true,
            "state": {"running": {}}, "lastState": {"terminated": {"exitCode": 70}},
        }]});
        assert_eq!(of(&pod(&status), None), None);
    }

    #[test]
    fn a_mute_pod_speaks_through_its_last_event() {
        let status = json!({
            "conditions": [{"type": "PodScheduled", "status": "True"}],
            "containerStatuses": [{
                "name": "runtime", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"waiting": {"reason": "PodInitializing"}},
            }],
        });
        let pod = pod(&status);
        assert!(is_mute(&pod));
        let trouble = |reason: &str| {
            let words = LastWords { reason: reason.into(), note: "said".into() };
            of(&pod, Some(&words)).map(|problem| problem.trouble)
        };
        assert_eq!(trouble("FailedMount"), Some(Trouble::VolumeUnavailable));
        assert_eq!(trouble("FailedAttachVolume"), Some(Trouble::VolumeUnavailable));
        assert_eq!(trouble("BackOff"), Some(Trouble::ImageMissing));
        assert_eq!(trouble("Pulling"), None);
        assert_eq!(trouble("Unhealthy"), None, "a startup probe that fails is a start");
    }

    #[test]
    fn the_scheduler_s_own_words_are_passed_on() {
        let status = json!({"conditions": [{"type": "PodScheduled", "status": "False",
            "reason": "Unschedulable", "message": "0/1 nodes are available: 1 Insufficient memory."}]});
        let problem = of(&pod(&status), None).unwrap();
        assert_eq!(problem.trouble, Trouble::Unschedulable);
        assert!(problem.message.contains("Insufficient memory"));
    }
}
