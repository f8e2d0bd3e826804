//! `local MODEL.yaml --weights PATH --dir DIR --bin-dir DIR`: runs one replica of a
//! `ConversationModel` as two processes, without Kubernetes and without root.
//!
//! What a pod does, this does: the file is checked by the same schema and rules, the command lines
//! come from the same code (`desired::arguments`), the daemon starts first and ends last, and a
//! program that fails takes its exit code and its last sentence to whoever started us.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use operator::api::ConversationModel;
use operator::desired::arguments::{self, DaemonPlaces, RuntimePlaces};
use operator::strict::model_from_yaml;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// The file, or the command line, is refused.
const EXIT_CONFIGURATION: u8 = 64;
/// Something else went wrong here.
const EXIT_SOFTWARE: u8 = 70;
/// As the pod's startup probes: ten minutes for a large model.
const START_TIMEOUT: Duration = Duration::from_mins(10);
/// How often a starting program is asked.
const START_PERIOD: Duration = Duration::from_millis(100);
/// Longest wait for one answer of a starting program.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for the last lines of a program that has ended.
const LAST_LINES_TIMEOUT: Duration = Duration::from_secs(5);
/// `sun_path` has 108 bytes and ends with a zero.
const SOCKET_PATH_MAX: usize = 107;

/// Runs one replica of a ConversationModel without Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "local", version)]
struct Arguments {
    /// The ConversationModel.
    model: PathBuf,
    /// The weights: a .gguf file, or a folder that holds exactly one. Stands for spec.model.image.
    #[arg(long)]
    weights: PathBuf,
    /// Folder for the socket, the disk tier and the logs; stands for the pod's volumes.
    #[arg(long)]
    dir: PathBuf,
    /// Folder of the programs `cache-daemon` and `runtime`.
    #[arg(long)]
    bin_dir: PathBuf,
    /// Port of the API on 127.0.0.1.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Port of the cache daemon's health and metrics on 127.0.0.1.
    #[arg(long, default_value_t = 9100)]
    cache_port: u16,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print(); // A closed terminal is no reason to fail differently.
            return ExitCode::from(if error.use_stderr() { EXIT_CONFIGURATION } else { 0 });
        }
    };
    let replica = match Replica::new(&arguments) {
        Ok(replica) => replica,
        Err(error) => {
            eprintln!("local: {error:#}");
            return ExitCode::from(EXIT_CONFIGURATION);
        }
    };
    let run = tokio::runtime::Runtime::new()
        .context("cannot start the async runtime")
        .and_then(|runtime| runtime.block_on(replica.run()));
    run.unwrap_or_else(|error| {
        eprintln!("local: {error:#}");
        ExitCode::from(EXIT_SOFTWARE)
    })
}

/// A replica that can be started: everything checked, nothing running.
struct Replica {
    model: ConversationModel,
    weights: String,
    dir: PathBuf,
    socket: String,
    disk_dir: String,
    bin_dir: PathBuf,
    api: SocketAddr,
    cache: SocketAddr,
}

impl Replica {
    fn new(arguments: &Arguments) -> anyhow::Result<Self> {
        let file = &arguments.model;
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        let model =
            model_from_yaml(&text).with_context(|| format!("{} is refused", file.display()))?;
        let absolute = |path: &Path| {
            std::path::absolute(path).with_context(|| format!("no such path: {}", path.display()))
        };
        let (dir, weights) = (absolute(&arguments.dir)?, absolute(&arguments.weights)?);
        ensure!(weights.exists(), "there are no weights at {}", weights.display());
        let bin_dir = absolute(&arguments.bin_dir)?;
        for program in [CACHE_DAEMON, RUNTIME] {
            let path = bin_dir.join(program);
            ensure!(path.is_file(), "there is no program {}; build it first", path.display());
        }
        let socket = dir.join("run/daemon.sock");
        ensure!(
            socket.as_os_str().as_bytes().len() <= SOCKET_PATH_MAX,
            "{} is longer than a socket's path may be ({SOCKET_PATH_MAX} bytes); use a shorter --dir",
            socket.display()
        );
        let text = |path: &Path| -> anyhow::Result<String> {
            Ok(path.to_str().with_context(|| format!("not UTF-8: {}", path.display()))?.to_owned())
        };
        let on_loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Ok(Self {
            weights: text(&weights)?,
            socket: text(&socket)?,
            disk_dir: text(&dir.join("kv"))?,
            model,
            dir,
            bin_dir,
            api: on_loopback(arguments.port),
            cache: on_loopback(arguments.cache_port),
        })
    }

    /// Runs until a signal, or until a program ends; gives back the exit code of the failed one.
    async fn run(self) -> anyhow::Result<ExitCode> {
        for folder in ["run", "kv", "logs"] {
            let folder = self.dir.join(folder);
            std::fs::create_dir_all(&folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;

        let mut daemon = None;
        let mut runtime = None;
        let failed = tokio::select! {
            failed = self.serve(&mut daemon, &mut runtime) => Some(failed),
            _ = terminate.recv() => None,
            _ = interrupt.recv() => None,
        };
        // The kubelet's order: the runtime ends its turns while the daemon still takes their blocks.
        let grace = self.model.spec.pod_template.termination_grace_period_seconds;
        let grace = Duration::from_secs(grace.into());
        for program in [runtime, daemon].into_iter().flatten() {
            program.stop(grace).await;
        }
        match failed {
            None => {
                println!("stopped");
                Ok(ExitCode::SUCCESS)
            }
            Some(Ok(code)) => Ok(code),
            Some(Err(error)) => Err(error),
        }
    }

    /// Starts both programs, says when they answer, and waits for one of them to end.
    async fn serve(
        &self,
        daemon_place: &mut Option<Program>,
        runtime_place: &mut Option<Program>,
    ) -> anyhow::Result<ExitCode> {
        let http = self.cache.to_string();
        let places = DaemonPlaces { socket: &self.socket, disk_dir: &self.disk_dir, http: &http };
        if self.model.spec.cache.enabled {
            let daemon = daemon_place
                .insert(self.start(CACHE_DAEMON, &arguments::daemon(&self.model.spec, places))?);
            if let Some(code) = daemon.until_answers(self.cache, "/started").await? {
                return Ok(code);
            }
        }

        let http = self.api.to_string();
        let places =
            RuntimePlaces { model: &self.weights, cache_socket: &self.socket, http: &http };
        let runtime = runtime_place
            .insert(self.start(RUNTIME, &arguments::runtime(&self.model.spec, places))?);
        if let Some(code) = runtime.until_answers(self.api, "/health").await? {
            return Ok(code);
        }

        let cache = match daemon_place {
            Some(_) => format!("its cache daemon at http://{}", self.cache),
            None => "its cache is off".to_owned(),
        };
        println!(
            "ready: {} at http://{}/v1, {cache}, logs in {}",
            self.model.spec.model.name,
            self.api,
            self.dir.join("logs").display()
        );
        let Some(daemon) = daemon_place else {
            let status = runtime.child.wait().await?;
            return Ok(runtime.ended(status).await);
        };
        let code = tokio::select! {
            status = daemon.child.wait() => daemon.ended(status?).await,
            status = runtime.child.wait() => runtime.ended(status?).await,
        };
        Ok(code)
    }

    fn start(&self, name: &'static str, arguments: &[String]) -> anyhow::Result<Program> {
        Program::start(name, &self.bin_dir, &self.dir.join("logs"), arguments)
    }
}

const CACHE_DAEMON: &str = "cache-daemon";
const RUNTIME: &str = "runtime";

/// A running program and what it last said on stderr.
struct Program {
    name: &'static str,
    child: Child,
    last_words: Arc<Mutex<String>>,
    pumps: JoinSet<()>,
}

impl Program {
    fn start(
        name: &'static str,
        bin_dir: &Path,
        logs: &Path,
        arguments: &[String],
    ) -> anyhow::Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let open = || {
            let file = std::fs::OpenOptions::new().create(true).append(true).open(&log);
            file.with_context(|| format!("cannot write {}", log.display()))
        };
        let mut child = Command::new(bin_dir.join(name))
            .args(arguments.iter().map(OsStr::new))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A group of its own: Ctrl-C in a terminal reaches us alone, and we keep the order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let last_words = Arc::new(Mutex::new(String::new()));
        let mut pumps = JoinSet::new();
        if let Some(stdout) = child.stdout.take() {
            pumps.spawn(pump(name, stdout, open()?, None));
        }
        if let Some(stderr) = child.stderr.take() {
            pumps.spawn(pump(name, stderr, open()?, Some(last_words.clone())));
        }
        println!("started {name} (pid {})", child.id().unwrap_or_default());
        Ok(Self { name, child, last_words, pumps })
    }

    /// Waits until the program answers 200; its exit code when it ends instead.
    async fn until_answers(
        &mut self,
        address: SocketAddr,
        path: &str,
    ) -> anyhow::Result<Option<ExitCode>> {
        let since = Instant::now();
        while since.elapsed() < START_TIMEOUT {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(self.ended(status).await));
            }
            if matches!(timeout(PROBE_TIMEOUT, answers(address, path)).await, Ok(Ok(true))) {
                return Ok(None);
            }
            sleep(START_PERIOD).await;
        }
        bail!("{} did not answer http://{address}{path} in {START_TIMEOUT:?}", self.name)
    }

    /// The code that says how the program ended, and its last sentence on our stderr. A program that
    /// was not told to end has failed, even with code 0.
    async fn ended(&mut self, status: ExitStatus) -> ExitCode {
        self.read_to_the_end().await;
        let words = self.last_words.lock().map(|words| words.clone()).unwrap_or_default();
        eprintln!("local: {} ended by itself ({status}): {words}", self.name);
        let code = status.code().unwrap_or(i32::from(EXIT_SOFTWARE));
        match u8::try_from(code) {
            Ok(0) | Err(_) => ExitCode::from(EXIT_SOFTWARE),
            Ok(code) => ExitCode::from(code),
        }
    }

    /// SIGTERM, then SIGKILL after `grace`.
    async fn stop(mut self, grace: Duration) {
        let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) else {
            return; // It has ended already.
        };
        // It may end by itself right now; then there is nobody to tell.
        let _ = kill_process(pid, Signal::TERM);
        if timeout(grace, self.child.wait()).await.is_err() {
            eprintln!("local: {} did not end in {grace:?} and is killed", self.name);
            let _ = self.child.kill().await;
        }
        self.read_to_the_end().await;
    }

    /// Waits for the last lines of a program that has ended; not for ever, as a child of its own may
    /// hold the pipe open.
    async fn read_to_the_end(&mut self) {
        let all = async { while self.pumps.join_next().await.is_some() {} };
        if timeout(LAST_LINES_TIMEOUT, all).await.is_err() {
            eprintln!("local: a child of {} still runs and may write to its log", self.name);
        }
    }
}

/// Copies lines into a log, each with the program's name in front, and keeps the last one.
async fn pump(
    name: &'static str,
    from: impl AsyncRead + Unpin,
    mut log: std::fs::File,
    last: Option<Arc<Mutex<String>>>,
) {
    let mut lines = BufReader::new(from).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some(Ok(mut last)) = last.as_ref().map(|last| last.lock()) {
            last.clone_from(&line);
        }
        // A full disk must not stop the program, whose pipe would fill.
        let _ = std::io::Write::write_all(&mut log, format!("{name} | {line}\n").as_bytes());
    }
}

/// Whether a plain GET is answered 200.
async fn answers(address: SocketAddr, path: &str) -> std::io::Result<bool> {
    const STATUS_LINE: usize = "HTTP/1.1 200".len();
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut line = [0_u8; STATUS_LINE];
    stream.read_exact(&mut line).await?;
    Ok(line.ends_with(b" 200"))
}
