//! `make bench-hints`: what the cache costs an engine step, as `figure NAME VALUE UNIT` lines.
//!
//! A real daemon, the runtime's cache client, and as many busy threads as there are cores. The engine's
//! stand-in makes [`STEPS_PER_SECOND`] steps a second and [`HINTS_PER_STEP`] hints in each: one turn is
//! enqueued (its keys go into the arena), the turns before it move up a place, one is looked up and pinned,
//! and those whose answers have come end. The time of these calls is what a step gets longer; beside it
//! stands an idle step as long, which tells what the machine's own scheduler does to either. Raw
//! quantiles: `bench/results/hints.json`.

#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use colloquy_tests::figures::{cpu_name, figure, quantile, write_raw};
use kv_protocol::geometry::LayerSet;
use kv_protocol::{Dtype, Fingerprint, Geometry, RootKey};
use runtime::batch::FrameBytes;
use runtime::cache_client::{
    Accept, CacheClient, CacheConfig, CacheEvent, Doorbell, Hint, NewBlock, NumericsTag, Query,
    SequenceTag, Variant,
};
use serde_json::json;

/// Of the stand-in for an engine.
const STEPS_PER_SECOND: u32 = 1_000;
/// With the one at enqueue: 10,000 hints a second.
const HINTS_PER_STEP: usize = 10;
/// Half a minute.
const STEPS: usize = 30_000;
/// Conversations that take turns; all fit into host memory.
const CONVERSATIONS: u32 = 200;
/// Of each: 4,096 tokens at 64 a block.
const BLOCKS: usize = 64;
const TOKENS_PER_BLOCK: usize = 64;
/// A step of this length without hints, to compare with.
const IDLE_STEP: Duration = Duration::from_micros(5);
/// Frames taken and given back.
const CREDITS: usize = 200_000;
/// Waits for the daemon end in an error after this.
const PATIENCE: Duration = Duration::from_secs(30);

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill(); // Its worker dies with it.
        let _ = self.0.wait();
    }
}

/// Small payloads, so that all conversations fit: hints and lookups do not touch them.
fn geometry() -> anyhow::Result<Geometry> {
    Ok(Geometry::new(TOKENS_PER_BLOCK as u16, 1, 1, 32, Dtype::F16, LayerSet::all(1))?)
}

fn start_daemon(folder: &Path) -> anyhow::Result<Daemon> {
    let programs = std::env::current_exe()?;
    let program = programs.parent().context("a program lies in a folder")?.join("cache-daemon");
    let http = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let child = Command::new(&program)
        .args(["supervise", "--host-bytes=512MiB"])
        .arg(format!("--socket={}", folder.join("daemon.sock").display()))
        .arg(format!("--http={http}"))
        .env("RUST_LOG", "error")
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    Ok(Daemon(child))
}

/// The engine's side.
struct Engine {
    client: CacheClient,
    doorbell: Doorbell,
    root: RootKey,
}

impl Engine {
    fn attach(folder: &Path) -> anyhow::Result<Self> {
        let fingerprint = Fingerprint([1; 32]);
        let doorbell = Doorbell::new();
        let socket = folder.join("daemon.sock");
        let config = CacheConfig { socket, geometry: geometry()?, fingerprint };
        let client = CacheClient::spawn(config, doorbell.waker())?;
        let mut engine = Self { client, doorbell, root: RootKey::new(&fingerprint, b"") };
        engine.wait("the daemon to attach", |event| matches!(event, CacheEvent::Attached))?;
        Ok(engine)
    }

    fn wait(&mut self, what: &str, wanted: impl Fn(&CacheEvent) -> bool) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            match self.client.poll() {
                Some(event) if wanted(&event) => return Ok(()),
                Some(_) => {}
                None => self.doorbell.wait(Duration::from_millis(10)),
            }
            ensure!(begin.elapsed() < PATIENCE, "waited in vain for {what}");
        }
    }

    fn query(&self, tokens: &Arc<[u32]>) -> Query {
        let accept =
            Accept::Own { variant: Variant::Exact, numerics: NumericsTag::of("bench-hints") };
        Query::new(self.root, accept, tokens.clone(), TOKENS_PER_BLOCK as u16)
    }

    /// Commits all blocks of a conversation.
    fn save(&mut self, tokens: &[u32]) -> anyhow::Result<()> {
        let mut parent = self.root.as_parent();
        let zeros = vec![0; self.client.geometry().row_bytes() as usize];
        for block in tokens.chunks(TOKENS_PER_BLOCK) {
            let begin = Instant::now();
            let frame = loop {
                if let Some(frame) = self.client.take_frame() {
                    break frame;
                }
                while self.client.poll().is_some() {}
                ensure!(begin.elapsed() < PATIENCE, "waited in vain for a free frame");
                std::thread::yield_now();
            };
            frame.bytes().write(0, &zeros);
            let key = kv_protocol::BlockKey::child(&parent, block);
            let block = NewBlock {
                root: self.root,
                parent,
                tokens: block.to_vec(),
                variant: Variant::Exact,
                numerics: NumericsTag::of("bench-hints"),
                checksums: [crc32c::crc32c(&zeros)].into(),
            };
            self.client.commit(frame, block).context("the daemon went away")?;
            self.wait("a commit", |event| matches!(event, CacheEvent::Committed { .. }))?;
            parent = key;
        }
        Ok(())
    }
}

/// Steps with their hints, one lookup and one end each; microseconds that each step got longer.
fn steps(engine: &mut Engine, conversations: &[Arc<[u32]>]) -> anyhow::Result<Steps> {
    let mut result = Steps::default();
    // Turns that wait, the next one first; and those that were looked up.
    let mut queue: VecDeque<SequenceTag> = VecDeque::new();
    let mut looked_up: HashMap<SequenceTag, Instant> = HashMap::new();
    let begin = Instant::now();
    for number in 0..STEPS {
        let due = Duration::from_secs(1) / STEPS_PER_SECOND * number as u32;
        while begin.elapsed() < due {
            std::hint::spin_loop(); // The step's compute.
        }
        let tokens = &conversations[number % conversations.len()];
        let hashing = Instant::now();
        let query = engine.query(tokens);
        result.hashing_us.push(hashing.elapsed().as_secs_f64() * 1e6);

        let step = Instant::now();
        while let Some(event) = engine.client.poll() {
            if let CacheEvent::Found { sequence, blocks, .. } = event {
                result.found_blocks += blocks.len();
                result.answers_us.extend(
                    looked_up.remove(&sequence).map(|asked| asked.elapsed().as_secs_f64() * 1e6),
                );
                drop(blocks);
                engine.client.end(sequence);
            }
        }
        result.poll_us.push(step.elapsed().as_secs_f64() * 1e6);
        // Whose answer has not come keeps its place: it has not begun.
        let first = looked_up.len() as u32;
        for (place, sequence) in (first..).zip(queue.iter().take(HINTS_PER_STEP - 1)) {
            engine.client.hint(*sequence, Hint::Queued { place, start_in_ms: place });
        }
        let sequence = SequenceTag(1 + number as u64);
        let place = first + queue.len() as u32;
        engine.client.enqueue(sequence, query, Hint::Queued { place, start_in_ms: place });
        queue.push_back(sequence);
        if queue.len() >= HINTS_PER_STEP
            && let Some(next) = queue.pop_front()
        {
            engine.client.lookup(next).context("the daemon went away")?;
            looked_up.insert(next, Instant::now());
        }
        result.step_us.push(step.elapsed().as_secs_f64() * 1e6);

        // As long as the median step, and nothing in it: what the scheduler of a full machine adds by itself.
        let idle = Instant::now();
        while idle.elapsed() < IDLE_STEP {
            std::hint::spin_loop();
        }
        result.idle_us.push(idle.elapsed().as_secs_f64() * 1e6);
    }
    result.seconds = begin.elapsed().as_secs_f64();
    Ok(result)
}

#[derive(Default)]
struct Steps {
    step_us: Vec<f64>,
    /// Of a step, the reading of answers.
    poll_us: Vec<f64>,
    idle_us: Vec<f64>,
    /// From a lookup to the step that has its answer.
    answers_us: Vec<f64>,
    hashing_us: Vec<f64>,
    found_blocks: usize,
    seconds: f64,
}

/// Takes frames and gives them back; microseconds of each taking.
fn credits(engine: &mut Engine) -> anyhow::Result<Vec<f64>> {
    let mut taken_us = Vec::with_capacity(CREDITS);
    let begin = Instant::now();
    while taken_us.len() < CREDITS {
        let taking = Instant::now();
        let frame = engine.client.take_frame();
        let microseconds = taking.elapsed().as_secs_f64() * 1e6;
        if frame.is_some() {
            taken_us.push(microseconds);
        }
        drop(frame);
        while engine.client.poll().is_some() {} // What was dropped goes back by it.
        ensure!(begin.elapsed() < 4 * PATIENCE, "{} credits in two minutes", taken_us.len());
    }
    Ok(taken_us)
}

fn main() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let _daemon = start_daemon(folder.path())?;
    let mut engine = Engine::attach(folder.path())?;
    let conversations: Vec<Arc<[u32]>> = (0..CONVERSATIONS)
        .map(|number| {
            let tokens = 0..(BLOCKS * TOKENS_PER_BLOCK) as u32;
            tokens.map(|position| number * 100_000 + position).collect()
        })
        .collect();
    eprintln!("saving {CONVERSATIONS} conversations of {BLOCKS} blocks");
    for tokens in &conversations {
        engine.save(tokens)?;
    }
    let cores = std::thread::available_parallelism()?.get();
    let stop = Arc::new(AtomicBool::new(false));
    let busy: Vec<_> = (0..cores)
        .map(|_| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        })
        .collect();
    eprintln!("{STEPS} steps, then {CREDITS} credits, beside {cores} busy threads");
    let steps = steps(&mut engine, &conversations);
    let credits = steps.is_ok().then(|| credits(&mut engine));
    stop.store(true, Ordering::Relaxed);
    for thread in busy {
        thread.join().unwrap_or(()); // It cannot panic.
    }
    let (steps, credits) = (steps?, credits.context("no steps, no credits")??);

    let stats = engine.client.stats();
    let hints = (STEPS * HINTS_PER_STEP) as f64;
    let hints_lost = stats.hints_dropped as f64 / hints;
    let found = steps.found_blocks as f64 / (STEPS - HINTS_PER_STEP) as f64 / BLOCKS as f64;
    let quantiles = |values: &[f64]| {
        json!({
            "p50": quantile(values, 0.5), "p90": quantile(values, 0.9),
            "p99": quantile(values, 0.99), "p999": quantile(values, 0.999),
            "max": quantile(values, 1.0),
        })
    };
    figure("hint_step_p50_us", quantile(&steps.step_us, 0.5), "us");
    figure("hint_step_p99_us", quantile(&steps.step_us, 0.99), "us");
    figure("hint_step_poll_p99_us", quantile(&steps.poll_us, 0.99), "us");
    figure("idle_step_p99_us", quantile(&steps.idle_us, 0.99), "us");
    figure("lookup_answer_p50_us", quantile(&steps.answers_us, 0.5), "us");
    figure("lookup_answer_p99_us", quantile(&steps.answers_us, 0.99), "us");
    figure("credit_p50_us", quantile(&credits, 0.5), "us");
    figure("credit_p99_us", quantile(&credits, 0.99), "us");
    figure("keys_of_a_turn_p50_us", quantile(&steps.hashing_us, 0.5), "us");
    figure("hints_per_second", hints / steps.seconds, "1/s");
    figure("hints_dropped", 100.0 * hints_lost, "%");
    figure("blocks_found", 100.0 * found, "%");
    write_raw(
        "hints",
        &json!({
            "cpu": cpu_name(), "cores": cores, "steps": STEPS, "hints_per_step": HINTS_PER_STEP,
            "blocks_per_turn": BLOCKS, "step_us": quantiles(&steps.step_us),
            "answer_us": quantiles(&steps.answers_us), "poll_us": quantiles(&steps.poll_us),
            "idle_step_us": quantiles(&steps.idle_us),
            "credit_us": quantiles(&credits), "keys_us": quantiles(&steps.hashing_us),
            "hints_dropped": stats.hints_dropped, "found_share": found,
        }),
    )
}
