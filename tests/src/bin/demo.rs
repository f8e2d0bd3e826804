//! `make demo`: what Colloquy is for, seen in two minutes. A conversation of five turns, a table of
//! what each turn found in the cache and what that saved, a deleted pod, and a sixth turn whose history
//! comes from disk. With `--local` two processes take the place of Kubernetes.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use colloquy_tests::client::{Answer, Client};
use colloquy_tests::cluster::{Cluster, cluster_dir, print_evidence, repository};
use colloquy_tests::conversation::{Conversation, QUESTIONS};
use colloquy_tests::deployment::{Deployment, OPERATOR_NAMESPACE, install_charts};
use colloquy_tests::progress::Progress;
use kube::ResourceExt;
use rustix::process::{Pid, Signal, kill_process};

/// Where the model of the demonstration lives.
const NAMESPACE: &str = "chat";

/// Length of the answers that are shown.
const TOKENS_MAX: u32 = 64;

/// A cold run is asked for its first token only.
const COLD_TOKENS_MAX: u32 = 1;

/// How long the two processes may take to serve; weights are in the page cache by then or not.
const LOCAL_READY_DURATION_MAX: Duration = Duration::from_mins(2);

/// How long they may take to end: the daemon writes what is not on disk yet.
const LOCAL_END_DURATION_MAX: Duration = Duration::from_mins(1);

/// Holds a conversation with a served model, and shows what the cache saves.
#[derive(Parser)]
struct Options {
    /// Two processes on this machine instead of Kubernetes; needs no root.
    #[arg(long)]
    local: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let mut progress = Progress::begin();
    match show(&options, &mut progress).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nthe demonstration failed: {error:?}");
            if !options.local {
                print_evidence(&[NAMESPACE, OPERATOR_NAMESPACE]);
                eprintln!("logs of the cluster: {}", cluster_dir().join("logs").display());
            }
            ExitCode::FAILURE
        }
    }
}

async fn show(options: &Options, progress: &mut Progress) -> anyhow::Result<()> {
    let mut stage = if options.local {
        Stage::Local(Local::start(progress)?)
    } else {
        Stage::Kubernetes(on_kubernetes(progress).await?)
    };
    let client = stage.client().await?;
    // Salted, so that the first turn is new even when the demonstration is run again.
    let mut conversation = Conversation::new(TOKENS_MAX).salted();
    let mut rows = Vec::new();
    for question in &QUESTIONS[..5] {
        rows.push(turn(&mut conversation, &client, question, progress)?);
    }
    print_table(&rows);

    stage.lose_pod(progress).await?;
    let client = stage.client().await?;
    let last = turn(&mut conversation, &client, QUESTIONS[5], progress)?;
    let disk = last.cached.cached_by_tier.disk;
    rows.push(last);
    print_table(&rows);
    if disk == 0 {
        bail!("the sixth turn found nothing on disk");
    }
    println!(
        "\nThe sixth turn took {disk} tokens of history from disk: they outlived the first pod.\n"
    );
    stage.print_what_next(&client);
    Ok(())
}

/// One turn, cached and cold.
struct Row {
    turn: usize,
    cached: Answer,
    cold: Answer,
}

fn turn(
    conversation: &mut Conversation,
    client: &Client,
    question: &str,
    progress: &mut Progress,
) -> anyhow::Result<Row> {
    let turn = conversation.turns() + 1;
    // Of the first question, which brings a text along, the end is what is asked.
    let asked = question.rsplit_once("\" ").map_or(question, |(_, end)| end);
    progress.say(format!("turn {turn}, person: {asked}"));
    let cached = conversation.say(client, question)?;
    progress.say(format!("turn {turn}, model:  {}", cached.text.trim().replace('\n', " ")));
    let cold = conversation.ask_last_turn_cold(client, COLD_TOKENS_MAX)?;
    Ok(Row { turn, cached, cold })
}

fn print_table(rows: &[Row]) {
    println!(
        "\n{:>4} {:>8} {:>8}   {:>6} {:>6} {:>6}   {:>14} {:>12} {:>7}",
        "turn", "prompt", "cached", "device", "host", "disk", "first token", "cold", "saved"
    );
    for Row { turn, cached, cold } in rows {
        let (after, cold_after) = (cached.first_token_after, cold.first_token_after);
        println!(
            "{turn:>4} {:>8} {:>8}   {:>6} {:>6} {:>6}   {:>11.0} ms {:>9.0} ms {:>6.0} %",
            cached.prompt_tokens,
            cached.cached_tokens,
            cached.cached_by_tier.device,
            cached.cached_by_tier.host,
            cached.cached_by_tier.disk,
            after.as_secs_f64() * 1e3,
            cold_after.as_secs_f64() * 1e3,
            (1.0 - after.as_secs_f64() / cold_after.as_secs_f64()) * 100.0,
        );
    }
    println!(
        "(prompt and cached in tokens, cached by tier; cold: the same turn with nothing cached)"
    );
}

async fn on_kubernetes(progress: &mut Progress) -> anyhow::Result<Deployment> {
    let cluster = Cluster::connect().await?;
    install_charts(progress)?;
    let deployment = Deployment::of_example(cluster.clone(), NAMESPACE).await?;
    progress.say("kubectl apply -f examples/smollm2.yaml");
    deployment.apply().await?;
    deployment.ready(progress, None).await?;
    Ok(deployment)
}

/// Where the demonstration happens.
enum Stage {
    Kubernetes(Deployment),
    Local(Local),
}

impl Stage {
    async fn client(&self) -> anyhow::Result<Client> {
        match self {
            Self::Kubernetes(deployment) => deployment.client().await,
            Self::Local(local) => Ok(local.client.clone()),
        }
    }

    /// The pod, or the two processes, go and are replaced.
    async fn lose_pod(&mut self, progress: &mut Progress) -> anyhow::Result<()> {
        println!();
        match self {
            Self::Kubernetes(deployment) => {
                let pod = deployment.pod().await?.context("the pod is gone")?;
                progress.say(format!("kubectl delete pod {}", pod.name_any()));
                let cluster = Cluster::connect().await?;
                cluster.delete_pod(NAMESPACE, &pod.name_any(), progress).await?;
                deployment.ready(progress, pod.uid().as_deref()).await?;
                Ok(())
            }
            Self::Local(local) => {
                progress.say("ending both processes and starting them again");
                local.end()?;
                local.begin(progress)
            }
        }
    }

    fn print_what_next(&self, client: &Client) {
        let base = client.base();
        println!("It goes on running. To chat:\n");
        println!("  curl -s {base}/v1/chat/completions -H 'Content-Type: application/json' \\");
        println!("    -H 'X-Conversation-Id: mine' -d '{{\"model\": \"{}\",", client.model());
        println!("    \"messages\": [{{\"role\": \"user\", \"content\": \"Hello!\"}}]}}'\n");
        match self {
            Self::Kubernetes(_) => {
                let folder = cluster_dir();
                let folder = folder.display();
                println!("To watch it:\n");
                println!("  export KUBECONFIG={folder}/admin.kubeconfig PATH={folder}/bin:$PATH");
                println!("  kubectl get convo,pods,pvc --namespace {NAMESPACE}");
                println!("  kubectl describe convo smollm2 --namespace {NAMESPACE}\n");
            }
            Self::Local(local) => println!("Its logs: {}\n", local.log().display()),
        }
        println!("Metrics:\n\n  curl -s {base}/metrics\n\nTo stop it:\n\n  make demo-down");
    }
}

/// The two processes, kept by the operator's `local`, which starts them as the pod would.
struct Local {
    folder: PathBuf,
    child: Option<Child>,
    client: Client,
}

/// Where the API of the two processes listens.
const LOCAL_PORT: u16 = 18_000;
/// Where the health and the metrics of their cache daemon listen.
const LOCAL_CACHE_PORT: u16 = 18_100;

impl Local {
    /// Starts them on an empty disk tier.
    fn start(progress: &mut Progress) -> anyhow::Result<Self> {
        let folder = cluster_dir().with_file_name("local");
        let pid_file = folder.join("pid");
        ensure!(
            !pid_file.exists(),
            "{} exists: it runs already, or crashed; make demo-down first",
            pid_file.display()
        );
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        let base = format!("http://127.0.0.1:{LOCAL_PORT}");
        let client = Client::new(base, "smollm2-135m-instruct");
        let mut local = Self { folder, child: None, client };
        local.begin(progress)?;
        Ok(local)
    }

    fn log(&self) -> PathBuf {
        self.folder.join("logs")
    }

    fn begin(&mut self, progress: &mut Progress) -> anyhow::Result<()> {
        let programs = std::env::current_exe()?;
        let programs = programs.parent().context("a program lies in a folder")?;
        let cache = self.folder.parent().context("the folder lies in the cache")?;
        let log = std::fs::File::create(self.folder.join("local.log"))?;
        let child = Command::new(programs.join("local"))
            .arg(repository().join("examples/smollm2.yaml"))
            .arg("--weights")
            .arg(cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf"))
            .arg("--dir")
            .arg(&self.folder)
            .arg("--bin-dir")
            .arg(programs)
            .args(["--port", &LOCAL_PORT.to_string()])
            .args(["--cache-port", &LOCAL_CACHE_PORT.to_string()])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // A group of its own: it goes on when this program ends.
            .process_group(0)
            .spawn()
            .with_context(|| format!("{}/local", programs.display()))?;
        std::fs::write(self.folder.join("pid"), child.id().to_string())?;
        let child = self.child.insert(child);
        let began = Instant::now();
        let mut is_told = false;
        while !self.client.is_healthy() {
            if let Some(status) = child.try_wait()? {
                std::fs::remove_file(self.folder.join("pid"))?;
                let log = std::fs::read_to_string(self.folder.join("local.log"))?;
                bail!("local ended with {status}:\n{log}");
            }
            if !is_told {
                progress.say("starting cache-daemon and runtime ...");
                is_told = true;
            }
            ensure!(began.elapsed() < LOCAL_READY_DURATION_MAX, "not ready in time");
            std::thread::sleep(Duration::from_millis(100));
        }
        progress.say(format!("both serve, after {:.1} s", began.elapsed().as_secs_f32()));
        Ok(())
    }

    fn end(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("a process has a pid")?, Signal::TERM)?;
        let began = Instant::now();
        while child.try_wait()?.is_none() {
            ensure!(began.elapsed() < LOCAL_END_DURATION_MAX, "local does not end");
            std::thread::sleep(Duration::from_millis(50));
        }
        std::fs::remove_file(self.folder.join("pid"))?;
        Ok(())
    }
}
