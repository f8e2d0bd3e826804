//! Time to first token of a second turn: history in host memory, on disk, or nowhere.
//!
//! `cache-daemon supervise` and `runtime` run as processes on loopback, as in a pod. A round takes a
//! history nobody has seen: a turn computes it, the device pool is cleared, and the next turn (history
//! and [`NEW_TOKENS`] more) is timed until its first token. The same turn under another salt is cold.
//! For the disk, the whole daemon is restarted between the two turns, so that host memory is empty.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

/// Tokens of the first turn.
const HISTORY_TOKENS: usize = 1500;
/// Tokens that the second turn adds.
const NEW_TOKENS: usize = 50;
/// Longest wait for a process to be ready, or for one answer.
const READY_DURATION_MAX: Duration = Duration::from_mins(2);
/// Between two looks at whether something is ready.
const READY_POLL: Duration = Duration::from_millis(50);
/// Full blocks of the history, at the runtime's default of 64 tokens.
const HISTORY_BLOCKS: u64 = HISTORY_TOKENS as u64 / 64;
/// Tokens that must come from the cache for a round to count, most of them from the tier measured.
const CACHED_TOKENS_MIN: u64 = 1400;

/// Seconds to first token, a round each.
#[derive(Default)]
pub struct Ttft {
    pub cold: Vec<f64>,
    pub host: Vec<f64>,
    pub disk: Vec<f64>,
}

/// A process that ends with the measurement.
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> anyhow::Result<Self> {
        let named = format!("{}", command.get_program().display());
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Ok(Self(child.with_context(|| format!("cannot start {named}"))?))
    }

    /// Asks to end (SIGTERM) and waits.
    fn stop(&mut self) -> anyhow::Result<()> {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            drop(self.stop());
        }
    }
}

struct Server {
    runtime: Process,
    daemon: Process,
    programs: PathBuf,
    folder: tempfile::TempDir,
    api: SocketAddr,
    daemon_http: SocketAddr,
}

fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn start_daemon(programs: &Path, folder: &Path, http: SocketAddr) -> anyhow::Result<Process> {
    let daemon = Process::start(
        Command::new(programs.join("cache-daemon"))
            .arg("supervise")
            .args(["--host-bytes", "512MiB", "--disk-bytes", "2GiB"])
            .arg("--socket")
            .arg(folder.join("daemon.sock"))
            .arg("--disk-dir")
            .arg(folder.join("disk"))
            .args(["--http", &http.to_string()]),
    )?;
    wait_for(http, "/started")?;
    Ok(daemon)
}

impl Server {
    fn start(programs: &Path, model: &Path, threads: usize) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        std::fs::create_dir_all(folder.path().join("disk"))?;
        let (api, daemon_http) = (free_address()?, free_address()?);
        let daemon = start_daemon(programs, folder.path(), daemon_http)?;
        let runtime = Process::start(
            Command::new(programs.join("runtime"))
                .arg("--model")
                .arg(model)
                .arg("--cache-socket")
                .arg(folder.path().join("daemon.sock"))
                .args(["--served-name", "bench", "--admin", "--http", &api.to_string()])
                .args(["--device-bytes", &(256_u64 << 20).to_string()])
                .args(["--threads", &threads.to_string()]),
        )?;
        wait_for(api, "/health")?;
        let server =
            Self { runtime, daemon, programs: programs.to_owned(), folder, api, daemon_http };
        server.wait_attached()?;
        Ok(server)
    }

    /// Host memory is empty afterwards; the disk is not.
    fn restart_daemon(&mut self) -> anyhow::Result<()> {
        self.daemon.stop()?;
        // As on another node: with the old socket gone, nobody waits for the runtime to hand the
        // region back.
        std::fs::remove_file(self.folder.path().join("daemon.sock"))?;
        self.daemon = start_daemon(&self.programs, self.folder.path(), self.daemon_http)?;
        self.wait_attached()
    }

    /// Waits for the daemon's `/status` to be as wanted.
    fn wait_status(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            let status: Value =
                serde_json::from_str(&exchange(self.daemon_http, "GET", "/status", "")?)?;
            if wanted(&status) {
                return Ok(());
            }
            ensure!(start.elapsed() < READY_DURATION_MAX, "{what}: waited in vain at {status}");
            std::thread::sleep(READY_POLL);
        }
    }

    fn wait_attached(&self) -> anyhow::Result<()> {
        self.wait_status("the runtime's return to the daemon", |status| {
            status["attachments"] == 1 && status["disk"]["state"] == "ready"
        })
    }

    fn blocks_on_disk(&self) -> anyhow::Result<u64> {
        let status: Value =
            serde_json::from_str(&exchange(self.daemon_http, "GET", "/status", "")?)?;
        status["blocks"]["disk"].as_u64().context("a status without blocks")
    }

    /// One turn of one generated token: seconds, and its cached tokens by tier.
    fn turn(&self, tokens: &[u32], salt: &str) -> anyhow::Result<(f64, Value)> {
        let body = json!({
            "model": "bench",
            "prompt_token_ids": tokens,
            "cache_salt": salt,
            "max_tokens": 1,
            "temperature": 0,
        });
        let start = Instant::now();
        let answer = exchange(self.api, "POST", "/v1/chat/completions", &body.to_string())?;
        let seconds = start.elapsed().as_secs_f64();
        let answer: Value = serde_json::from_str(&answer)?;
        let tiers = &answer["usage"]["prompt_tokens_details"]["cached_tokens_by_tier"];
        ensure!(tiers.is_object(), "the runtime answered {answer}");
        Ok((seconds, tiers.clone()))
    }

    fn clear_device(&self) -> anyhow::Result<()> {
        exchange(self.api, "POST", "/admin/device-cache/clear", "").map(drop)
    }
}

/// One HTTP/1.0 exchange; the body of a 200.
fn exchange(to: SocketAddr, method: &str, path: &str, body: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(READY_DURATION_MAX))?;
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.0\r\nHost: {to}\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.contains(" 200 "), "{method} {path} answered {status}: {body}");
    Ok(body.to_owned())
}

fn wait_for(address: SocketAddr, path: &str) -> anyhow::Result<()> {
    let start = Instant::now();
    while exchange(address, "GET", path, "").is_err() {
        ensure!(start.elapsed() < READY_DURATION_MAX, "http://{address}{path} is not ready");
        std::thread::sleep(READY_POLL);
    }
    Ok(())
}

/// Measures `rounds` rounds.
pub fn measure(
    programs: &Path,
    model: &Path,
    threads: usize,
    vocab: usize,
    rounds: usize,
) -> anyhow::Result<Ttft> {
    let mut server = Server::start(programs, model, threads)?;
    let mut ttft = Ttft::default();
    let turns = super::prompt(HISTORY_TOKENS + NEW_TOKENS, vocab);
    for round in 0..rounds {
        for tier in ["host", "disk"] {
            let salt = format!("{tier} {round}");
            let before = server.blocks_on_disk()?;
            server.turn(&turns[..HISTORY_TOKENS], &salt)?;
            server.wait_status("the history's blocks on disk", |status| {
                status["blocks"]["disk"].as_u64() >= Some(before + HISTORY_BLOCKS)
            })?;
            if tier == "disk" {
                server.restart_daemon()?;
            }
            server.clear_device()?;
            let (seconds, tiers) = server.turn(&turns, &salt)?;
            let cached = |tier: &str| tiers[tier].as_u64().unwrap_or(0);
            let from_tier = cached(tier);
            if from_tier < CACHED_TOKENS_MIN || from_tier != cached("host") + cached("disk") {
                bail!("round {round}: {from_tier} tokens came from {tier}, by tier {tiers}");
            }
            if tier == "host" { ttft.host.push(seconds) } else { ttft.disk.push(seconds) }
        }
        server.clear_device()?;
        let (seconds, tiers) = server.turn(&turns, &format!("cold {round}"))?;
        let cached = |tier: &str| tiers[tier].as_u64().unwrap_or(0);
        ensure!(cached("device") + cached("host") + cached("disk") == 0, "not cold: {tiers}");
        ttft.cold.push(seconds);
    }
    server.runtime.stop()?;
    server.daemon.stop()?;
    Ok(ttft)
}
