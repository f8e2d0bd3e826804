//! `make bench-index`: what a block on disk costs in memory, and how soon a restarted daemon knows it.
//!
//! A store is filled in this process through the daemon's own disk tier, with blocks whose headers are as
//! large as Llama-3.1-8B's (64 tokens, 32 rows) and whose payloads are small. Then a real daemon opens it
//! and the runtime's cache client looks random conversations up. What a block costs is the growth of the
//! worker's private memory (RSS without the shared region: directory, policies, slots, block cache and
//! memtables) over a daemon with an empty store after as many lookups. The worker is killed, the kernel's
//! page cache dropped where that is allowed, and the time counts from the kill: `restart_serving_s` to
//! the first answer after which nothing was missed, `restart_complete_s` to the whole index.
//! Raw results: `bench/results/index.json`; as a picture: `docs/index.svg`.

#![forbid(unsafe_code)]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use cache_daemon::tier::disk::{Engine, NewBlock};
use clap::Parser;
use colloquy_tests::bars::{self, Panel, Scale};
use colloquy_tests::figures::{cpu_name, figure, quantile, read_raw, write_raw};
use colloquy_tests::progress::Progress;
use kv_protocol::geometry::LayerSet;
use kv_protocol::{BlockHeader, BlockKey, Dtype, Fingerprint, Generation, Geometry, RootKey, Span};
use runtime::cache_client::{
    Accept, CacheClient, CacheConfig, CacheEvent, Doorbell, Hint, NumericsTag, Query, SequenceTag,
    Variant,
};
use serde_json::{Value, json};

const TOKENS_PER_BLOCK: usize = 64;
const LAYERS: u16 = 32;
/// Of a conversation: 1,024 tokens.
const BLOCKS: usize = 16;
/// Written with one sync: this measures an index, not a drive.
const GROUP_BLOCKS: usize = 1024;
/// Before memory is measured, and after a restart.
const LOOKUPS: usize = 2_000;
const HOST_BYTES: u64 = 256 << 20;
/// What a block on disk may take in memory, and how soon after a restart a lookup has to be a hit.
const BLOCK_BYTES_MAX: f64 = 200.0;
const SERVING_MAX_S: f64 = 2.0;
/// Waits end in an error after this.
const PATIENCE: Duration = Duration::from_mins(3);

/// Measures the index of a full disk tier.
#[derive(Debug, Parser)]
struct Flags {
    /// A folder on the drive to use; emptied at the end.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Blocks on disk.
    #[arg(long, default_value_t = 1_000_000)]
    blocks: usize,
    /// Kills of the worker.
    #[arg(long, default_value_t = 3)]
    kills: usize,
    /// Measure nothing: draw the results that were kept last.
    #[arg(long)]
    redraw: bool,
}

fn geometry() -> anyhow::Result<Geometry> {
    Ok(Geometry::new(TOKENS_PER_BLOCK as u16, LAYERS, 1, 1, Dtype::F16, LayerSet::all(LAYERS))?)
}

fn root() -> RootKey {
    RootKey::new(&Fingerprint([1; 32]), b"")
}

fn numerics() -> NumericsTag {
    NumericsTag::of("bench-index")
}

fn conversation(number: usize) -> Arc<[u32]> {
    let first = (number * BLOCKS * TOKENS_PER_BLOCK) as u32;
    (first..first + (BLOCKS * TOKENS_PER_BLOCK) as u32).collect()
}

/// Conversation after conversation, all with zeros for payload.
fn fill(dir: &Path, conversations: usize, disk_bytes: u64) -> anyhow::Result<()> {
    let geometry = geometry()?;
    let mut tier = Engine::Slots.open(dir, disk_bytes)?;
    tier.load(&mut |_| {}, &mut |_| {})?;
    let zeros = Span::heap(geometry.payload_bytes());
    let row_checksum = crc32c::crc32c(&vec![0; geometry.row_bytes() as usize]);
    let mut progress = Progress::begin();
    let mut headers: Vec<BlockHeader> = Vec::with_capacity(GROUP_BLOCKS);
    let mut written = 0;
    for number in 0..conversations {
        let tokens = conversation(number);
        let mut parent = root().as_parent();
        for block in tokens.chunks(TOKENS_PER_BLOCK) {
            let key = BlockKey::child(&parent, block);
            headers.push(BlockHeader {
                key,
                parent,
                root: root(),
                variant: Variant::Exact,
                numerics: numerics(),
                generation: Generation(0),
                created_ms: 1,
                tokens: block.to_vec(),
                checksums: vec![row_checksum; usize::from(LAYERS)],
            });
            parent = key;
        }
        if headers.len() + BLOCKS > GROUP_BLOCKS || number + 1 == conversations {
            let blocks: Vec<NewBlock<'_>> = headers
                .iter()
                .enumerate()
                .map(|(at, header)| {
                    let order = (written + at) as u64 + 1;
                    NewBlock { geometry: &geometry, header, order, payload: &zeros }
                })
                .collect();
            let mut failures = Vec::new();
            tier.write(&blocks, &mut |_, result| failures.extend(result.err()));
            ensure!(failures.is_empty(), "blocks were not written: {failures:?}");
            written += headers.len();
            headers.clear();
            if (written / GROUP_BLOCKS).is_multiple_of(64) {
                progress.say(format!("{written} blocks written"));
            }
        }
    }
    Ok(())
}

struct Daemon {
    supervisor: Child,
    socket: PathBuf,
    http: SocketAddr,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.supervisor.kill(); // Its worker dies with it.
        let _ = self.supervisor.wait();
    }
}

impl Daemon {
    fn start(dir: &Path, disk: &Path, disk_bytes: u64) -> anyhow::Result<Self> {
        let programs = std::env::current_exe()?;
        let program = programs.parent().context("a program lies in a folder")?.join("cache-daemon");
        let http = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let socket = dir.join("daemon.sock");
        let supervisor = Command::new(&program)
            .arg("supervise")
            .arg(format!("--host-bytes={HOST_BYTES}"))
            .arg(format!("--socket={}", socket.display()))
            .arg(format!("--disk-dir={}", disk.display()))
            .arg(format!("--disk-bytes={disk_bytes}"))
            .arg(format!("--http={http}"))
            .env("RUST_LOG", "error")
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { supervisor, socket, http })
    }

    fn worker(&self) -> Option<i32> {
        let pid = self.supervisor.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    fn kill_worker(&self) -> anyhow::Result<()> {
        let pid = self.worker().and_then(rustix::process::Pid::from_raw);
        let pid = pid.context("there is no worker")?;
        Ok(rustix::process::kill_process(pid, rustix::process::Signal::KILL)?)
    }

    /// The worker's memory apart from the region.
    fn private_bytes(&self) -> anyhow::Result<u64> {
        let pid = self.worker().context("there is no worker")?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let bytes = |name: &str| -> anyhow::Result<u64> {
            let line = status.lines().find(|line| line.starts_with(name));
            let value = line.and_then(|line| line.split_whitespace().nth(1));
            Ok(value.with_context(|| format!("no {name} in /proc/{pid}/status"))?.parse::<u64>()?
                << 10)
        };
        Ok(bytes("RssAnon:")? + bytes("RssFile:")?)
    }

    fn status(&self) -> Option<Value> {
        let mut stream = TcpStream::connect(self.http).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        write!(stream, "GET /status HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    }

    /// Whether this many blocks are known and no more will come.
    fn is_complete(&self, blocks: usize) -> bool {
        self.status().is_some_and(|status| {
            status["disk"]["state"] == "ready" && status["blocks"]["disk"] == blocks
        })
    }
}

/// What a lookup said.
struct Answer {
    blocks: usize,
    us: f64,
}

struct Asker {
    client: CacheClient,
    doorbell: Doorbell,
    next: u64,
}

impl Asker {
    fn attach(socket: &Path) -> anyhow::Result<Self> {
        let doorbell = Doorbell::new();
        let config = CacheConfig {
            socket: socket.to_owned(),
            geometry: geometry()?,
            fingerprint: Fingerprint([1; 32]),
        };
        let client = CacheClient::spawn(config, doorbell.waker())?;
        let mut engine = Self { client, doorbell, next: 0 };
        engine.wait_attached()?;
        Ok(engine)
    }

    fn wait_attached(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        while !self.client.is_attached() {
            if self.client.poll().is_none() {
                self.doorbell.wait(Duration::from_millis(1));
            }
            ensure!(begin.elapsed() < PATIENCE, "waited in vain for the daemon to attach");
        }
        Ok(())
    }

    /// Looks a conversation up without a hint before it; `None` if the daemon went away.
    fn look_up(&mut self, number: usize) -> anyhow::Result<Option<Answer>> {
        let accept = Accept::Own { variant: Variant::Exact, numerics: numerics() };
        let query = Query::new(root(), accept, conversation(number), TOKENS_PER_BLOCK as u16);
        self.next += 1;
        let sequence = SequenceTag(self.next);
        let begin = Instant::now();
        self.client.enqueue(sequence, query, Hint::Queued { place: 0, start_in_ms: 0 });
        if self.client.lookup(sequence).is_err() {
            return Ok(None);
        }
        let mut found = 0;
        loop {
            match self.client.poll() {
                Some(CacheEvent::Found { sequence: of, blocks, on_disk, .. }) if of == sequence => {
                    found += blocks.len();
                    if on_disk == 0 {
                        break;
                    }
                }
                Some(CacheEvent::Promoted { sequence: of, blocks, .. }) if of == sequence => {
                    found += blocks.len();
                    break;
                }
                Some(CacheEvent::Detached) => return Ok(None),
                Some(_) => {}
                None => self.doorbell.wait(Duration::from_millis(10)),
            }
            ensure!(begin.elapsed() < PATIENCE, "waited in vain for an answer");
        }
        self.client.end(sequence);
        Ok(Some(Answer { blocks: found, us: begin.elapsed().as_secs_f64() * 1e6 }))
    }
}

/// Xorshift: which conversation is next.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

struct Restart {
    attached_s: f64,
    serving_s: f64,
    complete_s: f64,
    lookups: usize,
    missed: usize,
}

/// Kills the worker and looks random conversations up from the moment that its successor lets us.
fn restart(
    daemon: &Daemon,
    engine: &mut Asker,
    conversations: usize,
    random: &mut Random,
) -> anyhow::Result<Restart> {
    drop_page_cache();
    let begin = Instant::now();
    daemon.kill_worker()?;
    while engine.look_up(random.below(conversations))?.is_some() {}
    engine.wait_attached()?;
    let attached_s = begin.elapsed().as_secs_f64();
    let (mut lookups, mut missed) = (0, 0);
    let mut serving_s = None;
    let complete_s = loop {
        let Some(answer) = engine.look_up(random.below(conversations))? else {
            bail!("the daemon went away again");
        };
        lookups += 1;
        if answer.blocks == BLOCKS {
            serving_s.get_or_insert(begin.elapsed().as_secs_f64());
        } else {
            missed += 1;
            serving_s = None; // Counted from where nothing is missed any more.
        }
        if daemon.is_complete(conversations * BLOCKS) && serving_s.is_some() {
            break begin.elapsed().as_secs_f64();
        }
        ensure!(begin.elapsed() < PATIENCE, "the index was never complete");
    };
    let serving_s = serving_s.context("no lookup was a hit")?;
    Ok(Restart { attached_s, serving_s, complete_s, lookups, missed })
}

/// A new node has none of the store's pages; without the right to drop them the figures are of a warm one.
fn drop_page_cache() -> bool {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

/// Raw results as `docs/index.svg`; the dashes are what a block may take, and when a lookup has to be a hit.
fn picture(raw: &Value) -> anyhow::Result<()> {
    let number = |value: &Value, at: &str| value.pointer(at).and_then(Value::as_f64);
    let taken = number(raw, "/private_bytes_full")
        .zip(number(raw, "/private_bytes_empty"))
        .zip(number(raw, "/blocks"))
        .map(|((full, empty), blocks)| (full - empty) / blocks);
    let memory = Panel {
        title: "bytes of memory a block on disk".into(),
        scale: Scale::Linear,
        limits: vec![BLOCK_BYTES_MAX],
        groups: vec![(String::new(), vec![taken])],
    };
    let restarts = raw.pointer("/restarts").and_then(Value::as_array).into_iter().flatten();
    let group = |(place, restart): (usize, &Value)| {
        let at = ["/attached_s", "/serving_s", "/complete_s"];
        let seconds = std::iter::once(None).chain(at.map(|at| number(restart, at))).collect();
        (format!("kill {place}"), seconds)
    };
    let after = Panel {
        title: "seconds from a kill of the worker: the runtime is attached, the first lookup is a hit, the index is complete".into(),
        scale: Scale::Linear,
        limits: vec![SERVING_MAX_S],
        groups: (1..).zip(restarts).map(group).collect(),
    };
    bars::draw("index", &["memory", "attached", "serving", "complete"], &[memory, after])
}

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    if flags.redraw {
        return picture(&read_raw("index")?);
    }
    ensure!(flags.blocks >= GROUP_BLOCKS && flags.kills > 0, "--blocks ≥ 1024 and --kills ≥ 1");
    let home = match &flags.dir {
        Some(dir) => tempfile::Builder::new().prefix("bench-index-").tempdir_in(dir)?,
        None => tempfile::Builder::new().prefix("bench-index-").tempdir()?,
    };
    let conversations = flags.blocks / BLOCKS;
    let blocks = conversations * BLOCKS;
    // Half as much again: the index, and no eviction.
    let disk_bytes = blocks as u64 * Engine::Slots.block_bytes(&geometry()?) / 2 * 3;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut progress = Progress::begin();

    let (empty, full) = (home.path().join("empty"), home.path().join("full"));
    let empty_bytes = {
        std::fs::create_dir_all(&empty)?;
        let daemon = Daemon::start(home.path(), &empty, disk_bytes)?;
        let mut engine = Asker::attach(&daemon.socket)?;
        for _ in 0..LOOKUPS {
            engine.look_up(random.below(conversations))?.context("the daemon went away")?;
        }
        daemon.private_bytes()?
    };
    progress.say(format!("{empty_bytes} bytes of memory with an empty store"));

    std::fs::create_dir_all(&full)?;
    let begin = Instant::now();
    fill(&full, conversations, disk_bytes)?;
    let fill_s = begin.elapsed().as_secs_f64();
    let cold = drop_page_cache();
    let daemon = Daemon::start(home.path(), &full, disk_bytes)?;
    let mut engine = Asker::attach(&daemon.socket)?;
    let begin = Instant::now();
    while !daemon.is_complete(blocks) {
        ensure!(begin.elapsed() < PATIENCE, "the store was never open: {:?}", daemon.status());
        std::thread::sleep(Duration::from_millis(20));
    }
    progress.say("the daemon knows all blocks");

    let mut restarts = Vec::new();
    for _ in 0..flags.kills {
        let restart = restart(&daemon, &mut engine, conversations, &mut random)?;
        progress.say(format!(
            "attached again after {:.2} s, serving after {:.2} s, complete after {:.2} s; {} of {} lookups missed",
            restart.attached_s, restart.serving_s, restart.complete_s, restart.missed, restart.lookups
        ));
        restarts.push(restart);
    }
    let mut answers_us = Vec::new();
    for _ in 0..LOOKUPS {
        let answer = engine.look_up(random.below(conversations))?;
        let answer = answer.context("the daemon went away")?;
        ensure!(answer.blocks == BLOCKS, "a block on disk was missed");
        answers_us.push(answer.us);
    }
    let full_bytes = daemon.private_bytes()?;
    progress.say(format!("{full_bytes} bytes of memory with {blocks} blocks"));

    let per_block = full_bytes.saturating_sub(empty_bytes) as f64 / blocks as f64;
    let worst = |of: fn(&Restart) -> f64| restarts.iter().map(of).fold(0.0, f64::max);
    figure("index_bytes_per_block", per_block, "bytes");
    figure("restart_serving_s", worst(|restart| restart.serving_s), "s");
    figure("restart_complete_s", worst(|restart| restart.complete_s), "s");
    let restarts: Vec<Value> = restarts
        .iter()
        .map(|restart| {
            json!({
                "attached_s": restart.attached_s, "serving_s": restart.serving_s,
                "complete_s": restart.complete_s, "lookups": restart.lookups,
                "missed": restart.missed,
            })
        })
        .collect();
    let raw = json!({
        "cpu": cpu_name(),
        "blocks": blocks,
        "page_cache_dropped": cold,
        "fill_s": fill_s,
        "private_bytes_empty": empty_bytes,
        "private_bytes_full": full_bytes,
        "restarts": restarts,
        "lookup_from_disk_us": {
            "p50": quantile(&answers_us, 0.5), "p99": quantile(&answers_us, 0.99),
        },
    });
    write_raw("index", &raw)?;
    picture(&raw)
}
