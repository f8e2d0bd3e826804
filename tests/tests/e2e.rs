//! End to end on the local Kubernetes: from `apply` to a cached turn, through crashes, a lost pod, a
//! changed spec and a refused one, to a namespace with nothing left in it.
//!
//! One story told in claims, in order; each stands on the one before, so the first that fails ends it.
//! `tests/e2e` starts the cluster, imports the images and runs this with COLLOQUY_E2E=1; without that
//! variable it does nothing, so that a plain `cargo test` needs no cluster.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use colloquy_tests::client::Client;
use colloquy_tests::cluster::{Cluster, Look, cluster_dir, kind, print_evidence, tool, wait};
use colloquy_tests::conversation::{Conversation, QUESTIONS};
use colloquy_tests::deployment::{Deployment, OPERATOR_NAMESPACE, install_charts};
use colloquy_tests::progress::Progress;
use k8s_openapi::api::core::v1::{PersistentVolume, Pod};
use kube::ResourceExt;
use kube::api::ListParams;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Not the demonstration's namespace: both may be there at once.
const NAMESPACE: &str = "chat-e2e";

/// Length of answers. Long enough to cross a block's end now and then.
const TOKENS_MAX: u32 = 48;

/// How often the daemon's worker is killed.
const KILLS: u32 = 10;

/// Each kill comes this much later after its worker has attached than the one before.
const KILL_SPREAD: Duration = Duration::from_millis(40);

/// Turns of the conversations that run while the worker is killed.
const TURNS_UNDER_FIRE: usize = 3;

/// Where the daemon answers `/status`.
const DAEMON_PORT: u16 = 9100;

/// How long the supervisor may take to have a worker again; its back-off is bounded below this.
const WORKER_DURATION_MAX: Duration = Duration::from_mins(1);

/// What the claims have in common.
struct Story {
    progress: Progress,
    cluster: Cluster,
    deployment: Deployment,
    client: Client,
    pod: Pod,
    conversation: Conversation,
    /// The answers of the first turns, cold and cached alike.
    answers: Vec<String>,
}

#[tokio::main]
async fn main() -> ExitCode {
    if std::env::var_os("COLLOQUY_E2E").is_none() {
        println!("end to end: not asked for; tests/e2e runs it");
        return ExitCode::SUCCESS;
    }
    let mut passed = 0;
    let result = tell(&mut passed).await;
    let failed = u32::from(result.is_err());
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    if let Err(error) = result {
        println!("FAILED\n\n{error:?}\n");
        print_evidence(&[NAMESPACE, OPERATOR_NAMESPACE]);
        println!("\nAll of the above is evidence of this: {error:?}\n");
        println!("logs of the cluster: {}", cluster_dir().join("logs").display());
    }
    println!("\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored");
    ExitCode::from(failed as u8)
}

async fn tell(passed: &mut u32) -> anyhow::Result<()> {
    macro_rules! claim {
        ($claim:ident($($argument:expr),*)) => {{
            println!("\nclaim: {}", stringify!($claim).replace('_', " "));
            let told = $claim($($argument),*).await.context(stringify!($claim))?;
            println!("test {} ... ok", stringify!($claim));
            *passed += 1;
            told
        }};
    }
    let mut story = claim!(a_model_becomes_ready_after_apply());
    claim!(from_the_second_turn_on_history_is_cached(&mut story));
    claim!(no_request_fails_while_the_daemons_worker_is_killed(&mut story));
    claim!(a_new_pod_finds_the_conversation_on_disk(&mut story));
    claim!(a_changed_spec_rolls_the_pod(&mut story));
    claim!(a_bad_spec_is_refused_with_a_clear_message(&mut story));
    claim!(deleting_the_model_leaves_nothing_behind(&mut story));
    Ok(())
}

async fn a_model_becomes_ready_after_apply() -> anyhow::Result<Story> {
    let mut progress = Progress::begin();
    let cluster = Cluster::connect().await?;
    install_charts(&mut progress)?;
    let deployment = Deployment::of_example(cluster.clone(), NAMESPACE).await?;
    if deployment.delete().await? {
        progress.say("a former run was broken off: its model goes first");
        wait_until_nothing_is_left(&cluster, &mut progress).await?;
    }
    deployment.apply().await?;
    let pod = deployment.ready(&mut progress, None).await?;
    let client = deployment.client().await?;
    ensure!(client.is_healthy(), "the service {} does not answer /health", client.base());
    let conversation = Conversation::new(TOKENS_MAX);
    Ok(Story { progress, cluster, deployment, client, pod, conversation, answers: Vec::new() })
}

async fn from_the_second_turn_on_history_is_cached(story: &mut Story) -> anyhow::Result<()> {
    for (turn, question) in QUESTIONS.iter().take(TURNS_UNDER_FIRE).enumerate() {
        let cached = story.conversation.say(&story.client, question)?;
        let cold = story.conversation.repeat_last_turn_cold(&story.client)?;
        story.progress.say(format!(
            "turn {}: {} prompt tokens, {} cached, {:?}; cold: {} prompt tokens, {} cached",
            turn + 1,
            cached.prompt_tokens,
            cached.cached_tokens,
            cached.text,
            cold.prompt_tokens,
            cold.cached_tokens,
        ));
        ensure!(turn == 0 || cached.cached_tokens > 0, "turn {} found nothing", turn + 1);
        ensure!(cold.cached_tokens == 0, "a fresh salt found {} tokens", cold.cached_tokens);
        ensure!(
            cached.text == cold.text,
            "cached and cold answers differ: {:?} and {:?}",
            cached.text,
            cold.text
        );
        story.answers.push(cached.text);
    }
    Ok(())
}

async fn no_request_fails_while_the_daemons_worker_is_killed(
    story: &mut Story,
) -> anyhow::Result<()> {
    let pod_uid = story.pod.uid().context("a pod without a uid")?;
    let Story { progress, client, answers, .. } = story;
    let (client, answers) = (&*client, &answers[..]);
    let address = story.pod.status.as_ref().and_then(|status| status.pod_ip.as_ref());
    let address = address.context("a pod without an address")?;
    let daemon = Client::new(format!("http://{address}:{DAEMON_PORT}"), "none");
    let asking = AtomicU32::new(0);
    let is_over = AtomicBool::new(false);
    let turns = std::thread::scope(|scope| -> anyhow::Result<u32> {
        // Two people, so that there is nearly always a turn under way.
        let people = [(), ()].map(|()| scope.spawn(|| talk(client, answers, &asking, &is_over)));
        let killed = kill_workers(progress, &pod_uid, &daemon, &asking);
        is_over.store(true, Ordering::Release);
        let mut turns = 0;
        for person in people {
            turns += person.join().expect("a person does not panic")?;
        }
        killed.map(|()| turns)
    })?;
    let pod = story.deployment.pod().await?.context("the pod is gone")?;
    ensure!(pod.uid() == story.pod.uid(), "the pod was replaced");
    let restarts = restarts(&pod);
    ensure!(restarts == 0, "containers were restarted {restarts} times: the supervisor died too");
    story.progress.say(format!("{turns} turns answered, {KILLS} workers killed, no restart"));

    let attached = "the last worker has the runtime attached";
    wait(&mut story.progress, WORKER_DURATION_MAX, attached, async || {
        let status = daemon_status(&daemon);
        Ok(if is_attached(&status) { Look::Done(()) } else { Look::NotYet(status.to_string()) })
    })
    .await
}

/// What the worker says of itself; null while there is none.
fn daemon_status(daemon: &Client) -> Value {
    let page = daemon.page("/status").unwrap_or_default();
    serde_json::from_str(&page).unwrap_or_default()
}

fn is_attached(status: &Value) -> bool {
    status["attachments"].as_u64().is_some_and(|attachments| attachments > 0)
}

/// Holds the same conversation again and again until it is over; gives the number of turns. An answer
/// that fails, or differs from the known one, is an error.
fn talk(
    client: &Client,
    answers: &[String],
    asking: &AtomicU32,
    is_over: &AtomicBool,
) -> anyhow::Result<u32> {
    let mut turns = 0;
    loop {
        let mut conversation = Conversation::new(TOKENS_MAX);
        for (question, known) in QUESTIONS.iter().zip(answers) {
            if is_over.load(Ordering::Acquire) {
                return Ok(turns);
            }
            asking.fetch_add(1, Ordering::AcqRel);
            let answer = conversation.say(client, question);
            asking.fetch_sub(1, Ordering::AcqRel);
            let answer = answer?;
            ensure!(answer.text == *known, "{:?}, where {known:?} was right", answer.text);
            turns += 1;
        }
    }
}

/// Kills the worker of a pod's daemon, and each that follows, always while the runtime is attached to it
/// and somebody is asking.
fn kill_workers(
    progress: &mut Progress,
    pod_uid: &str,
    daemon: &Client,
    asking: &AtomicU32,
) -> anyhow::Result<()> {
    let mut former = None;
    for kill in 1..=KILLS {
        let began = Instant::now();
        let worker = loop {
            let worker = worker_of(pod_uid)?;
            let is_new = worker.is_some() && worker != former;
            if is_new && is_attached(&daemon_status(daemon)) && asking.load(Ordering::Acquire) > 0 {
                break worker;
            }
            ensure!(
                began.elapsed() < WORKER_DURATION_MAX,
                "no new worker that is attached while somebody asks, before kill {kill} \
                 (former worker: {former:?}, status: {})",
                daemon_status(daemon)
            );
            std::thread::sleep(Duration::from_millis(5));
        };
        // Spread over what a turn does: lookup, load, commits, the record at its end.
        std::thread::sleep(KILL_SPREAD * kill);
        let pid = worker.context("a worker was found")?;
        kill_process(pid, Signal::KILL).with_context(|| format!("killing {pid:?}"))?;
        progress.say(format!("killed worker {kill}, process {}", pid.as_raw_nonzero()));
        former = worker;
    }
    Ok(())
}

/// The process `cache-daemon worker` in a pod's cgroup, as this machine's own `/proc` shows it.
fn worker_of(pod_uid: &str) -> anyhow::Result<Option<Pid>> {
    let cgroup = format!("pod{pod_uid}");
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else {
            continue;
        };
        // A process that ends while it is looked at has no files left: not the one.
        let is_in = |file: &str| std::fs::read_to_string(path.join(file)).unwrap_or_default();
        if is_worker(&path) && is_in("cgroup").contains(&cgroup) {
            return Ok(Pid::from_raw(pid));
        }
    }
    Ok(None)
}

fn is_worker(process: &Path) -> bool {
    let command = std::fs::read(process.join("cmdline")).unwrap_or_default();
    let mut arguments = command.split(|byte| *byte == 0);
    let program = arguments.next().unwrap_or_default();
    program.ends_with(b"cache-daemon") && arguments.next() == Some(b"worker")
}

fn restarts(pod: &Pod) -> i32 {
    let Some(status) = &pod.status else { return 0 };
    let containers = status.init_container_statuses.iter().chain(&status.container_statuses);
    containers.flatten().map(|container| container.restart_count).sum()
}

async fn a_new_pod_finds_the_conversation_on_disk(story: &mut Story) -> anyhow::Result<()> {
    let name = story.deployment.pod_name();
    story.cluster.delete_pod(NAMESPACE, &name, &mut story.progress).await?;
    let former = story.pod.uid();
    story.pod = story.deployment.ready(&mut story.progress, former.as_deref()).await?;
    let answer = story.conversation.say(&story.client, QUESTIONS[3])?;
    story.progress.say(format!(
        "turn 4: {} prompt tokens, {} cached, {} of them from disk",
        answer.prompt_tokens, answer.cached_tokens, answer.cached_by_tier.disk
    ));
    ensure!(answer.cached_by_tier.disk > 0, "nothing came from disk: {answer:?}");
    let cold = story.conversation.repeat_last_turn_cold(&story.client)?;
    ensure!(answer.text == cold.text, "from disk {:?}, cold {:?}", answer.text, cold.text);
    Ok(())
}

async fn a_changed_spec_rolls_the_pod(story: &mut Story) -> anyhow::Result<()> {
    story.deployment.change(|spec| spec["adaSkip"]["prefill"]["sublayers"] = json!(4)).await?;
    let former = story.pod.uid();
    story.pod = story.deployment.ready(&mut story.progress, former.as_deref()).await?;
    let arguments = serde_json::to_string(&story.pod.spec)?;
    ensure!(arguments.contains(r#""--adaskip-prefill","4""#), "the new pod has the old arguments");
    let answer = story.conversation.say(&story.client, QUESTIONS[4])?;
    story.progress.say(format!("turn 5 with 4 sublayers skipped: {:?}", answer.text));
    Ok(())
}

async fn a_bad_spec_is_refused_with_a_clear_message(story: &mut Story) -> anyhow::Result<()> {
    /// What is wrong, how, and the words that must say so.
    type Fault = (&'static str, fn(&mut Value), &'static str);
    let faults: [Fault; 3] = [
        (
            "two sources of weights",
            |spec| spec["model"]["persistentVolumeClaim"] = json!({"claimName": "weights"}),
            "exactly one of model.image and model.persistentVolumeClaim must be given",
        ),
        (
            "more sublayers than any model has",
            |spec| spec["adaSkip"]["prefill"]["sublayers"] = json!(100_000),
            "spec.adaSkip.prefill.sublayers",
        ),
        (
            "an unknown field",
            |spec| spec["cache"]["hosts"] = json!({}),
            ".spec.cache.hosts: field not declared in schema",
        ),
    ];
    for (fault, spoil, words) in faults {
        let mut model = story.deployment.model().clone();
        spoil(&mut model["spec"]);
        match story.cluster.apply(&model).await {
            Ok(_) => bail!("{fault} was accepted"),
            Err(error) => {
                let message = format!("{error:#}");
                ensure!(message.contains(words), "{fault}: {message:?} does not say {words:?}");
                story.progress.say(format!("{fault}: refused with {words:?}"));
            }
        }
    }
    let pod = story.deployment.pod().await?.context("the pod is gone")?;
    ensure!(pod.uid() == story.pod.uid(), "a refused spec replaced the pod");
    Ok(())
}

async fn deleting_the_model_leaves_nothing_behind(story: &mut Story) -> anyhow::Result<()> {
    ensure!(story.deployment.delete().await?, "there is no model to delete");
    wait_until_nothing_is_left(&story.cluster, &mut story.progress).await?;
    // The namespace was the test's own.
    let namespace = ["delete", "namespace", NAMESPACE, "--wait=false"];
    ensure!(tool("kubectl").args(namespace).status()?.success(), "cannot delete {NAMESPACE}");
    Ok(())
}

async fn wait_until_nothing_is_left(
    cluster: &Cluster,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let limit = Duration::from_mins(3);
    wait(progress, limit, "nothing is left of the model", async || {
        let mut left = Vec::new();
        for name in ["ConversationModel", "Pod", "Service", "PersistentVolumeClaim"] {
            let kind = match name {
                "ConversationModel" => kind("colloquy.dev", "v1alpha1", name),
                _ => kind("", "v1", name),
            };
            let names = cluster.names(&kind, NAMESPACE).await?;
            left.extend(names.into_iter().map(|found| format!("{name} {found}")));
        }
        let volumes =
            cluster.cluster_wide::<PersistentVolume>().list(&ListParams::default()).await?;
        let ours = volumes.iter().filter(|volume| {
            let claim = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
            claim.and_then(|claim| claim.namespace.as_deref()) == Some(NAMESPACE)
        });
        left.extend(ours.map(|volume| format!("PersistentVolume {}", volume.name_any())));
        Ok(match left.as_slice() {
            [] => Look::Done(()),
            _ => Look::NotYet(format!("still there: {}", left.join(", "))),
        })
    })
    .await
}
