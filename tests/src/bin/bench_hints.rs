//! `make bench-hints`: what the cache costs an engine step, as `figure NAME VALUE UNIT` lines.
//!
//! A real daemon, the runtime's cache client, and as many busy threads as there are cores. The engine's
//! stand-in makes [`STEPS_PER_SECOND`] steps a second and [`HINTS_PER_STEP`] hints in each. Whenever a turn
//! starts (it is looked up and pinned, and ends when its answer has come) another is enqueued (its keys go
//! into the arena), and all that wait move up a place and are hinted again. Two loads: 50 turns a second
//! out of a queue of 200, a busy replica's, and 1,000 a second out of a queue of ten, many times what one
//! serves. The time of the calls of a step is what it gets longer; beside it stands an idle step as long,
//! which tells what the machine's own scheduler does to either. Raw quantiles:
//! `bench/results/hints.json`; as a picture: `docs/hints.svg`.

#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;
use colloquy_tests::bars::{self, Panel, Scale};
use colloquy_tests::figures::{cpu_name, figure, quantile, read_raw, write_raw};
use kv_protocol::geometry::LayerSet;
use kv_protocol::{Dtype, Fingerprint, Geometry, RootKey};
use runtime::cache_client::{
    Accept, CacheClient, CacheConfig, CacheEvent, Doorbell, Hint, NewBlock, NumericsTag, Query,
    SequenceTag, Variant,
};
use serde_json::{Value, json};

/// Of the stand-in for an engine.
const STEPS_PER_SECOND: u32 = 1_000;
/// With the one at enqueue: 10,000 hints a second.
const HINTS_PER_STEP: usize = 10;
/// Half a minute of each load.
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

/// What one step in a hundred may exceed, and one credit.
const STEP_P99_MAX_US: f64 = 20.0;
const CREDIT_P99_MAX_US: f64 = 5.0;

/// Measures what the cache costs an engine step.
#[derive(Debug, Parser)]
struct Flags {
    /// Measure nothing: draw the results that were kept last.
    #[arg(long)]
    redraw: bool,
}

/// How often a turn starts, and how many wait. Their product is the rate of hints.
#[derive(Debug, Clone, Copy)]
struct Load {
    steps_per_turn: usize,
    queue: usize,
}

const BUSY: Load = Load { steps_per_turn: 20, queue: 200 };
const DENSE: Load = Load { steps_per_turn: 1, queue: 10 };
const _: () = assert!(BUSY.queue == HINTS_PER_STEP * BUSY.steps_per_turn);
const _: () = assert!(DENSE.queue == HINTS_PER_STEP * DENSE.steps_per_turn);

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

/// Steps with their hints; microseconds that each got longer.
fn steps(
    engine: &mut Engine,
    conversations: &[Arc<[u32]>],
    load: Load,
    tags: &mut impl Iterator<Item = u64>,
) -> anyhow::Result<Steps> {
    let mut result = Steps::default();
    // Turns that wait, the next one first; and those that were looked up.
    let mut queue: VecDeque<SequenceTag> = VecDeque::new();
    let mut looked_up: HashMap<SequenceTag, Instant> = HashMap::new();
    let mut conversations = conversations.iter().cycle();
    let mut next = || -> anyhow::Result<(SequenceTag, &Arc<[u32]>)> {
        let tokens = conversations.next().context("there are conversations")?;
        Ok((SequenceTag(tags.next().context("tags do not end")?), tokens))
    };
    for place in 0..load.queue - 1 {
        let (sequence, tokens) = next()?;
        let query = engine.query(tokens);
        let hint = Hint::Queued { place: place as u32, start_in_ms: place as u32 };
        engine.client.enqueue(sequence, query, hint);
        queue.push_back(sequence);
        std::thread::sleep(Duration::from_millis(1)); // The arena empties meanwhile.
    }
    // The place up to which the waiting turns have been told that they moved up.
    let mut told = 0;
    let begin = Instant::now();
    for number in 0..STEPS {
        let due = Duration::from_secs(1) / STEPS_PER_SECOND * number as u32;
        while begin.elapsed() < due {
            std::hint::spin_loop(); // The step's compute.
        }
        let starting = if number % load.steps_per_turn == 0 {
            let (sequence, tokens) = next()?;
            let hashing = Instant::now();
            let query = engine.query(tokens);
            result.hashing_us.push(hashing.elapsed().as_secs_f64() * 1e6);
            Some((sequence, query))
        } else {
            None
        };

        let step = Instant::now();
        let mut found = false;
        while let Some(event) = engine.client.poll() {
            if let CacheEvent::Found { sequence, blocks, .. } = event {
                found = true;
                result.found_blocks += blocks.len();
                result.answers_us.extend(
                    looked_up.remove(&sequence).map(|asked| asked.elapsed().as_secs_f64() * 1e6),
                );
                drop(blocks);
                engine.client.end(sequence);
            }
        }
        if found {
            result.poll_us.push(step.elapsed().as_secs_f64() * 1e6);
        }
        // Whose answer has not come keeps its place: it has not begun.
        let first = looked_up.len();
        let hint = |place: usize| Hint::Queued {
            place: (first + place) as u32,
            start_in_ms: place as u32,
        };
        let mut hints = HINTS_PER_STEP;
        if let Some((sequence, query)) = starting {
            let enqueuing = Instant::now();
            engine.client.enqueue(sequence, query, hint(queue.len()));
            result.enqueue_us.push(enqueuing.elapsed().as_secs_f64() * 1e6);
            queue.push_back(sequence);
            let next = queue.pop_front().context("a queue of turns")?;
            let looking_up = Instant::now();
            engine.client.lookup(next).context("the daemon went away")?;
            result.lookup_us.push(looking_up.elapsed().as_secs_f64() * 1e6);
            looked_up.insert(next, Instant::now());
            result.lookups += 1;
            (told, hints) = (0, hints - 1);
        }
        for (place, sequence) in queue.iter().enumerate().skip(told).take(hints) {
            engine.client.hint(*sequence, hint(place));
        }
        told += hints;
        result.step_us.push(step.elapsed().as_secs_f64() * 1e6);

        // As long as the median step, and nothing in it: what the scheduler of a full machine adds by itself.
        let idle = Instant::now();
        while idle.elapsed() < IDLE_STEP {
            std::hint::spin_loop();
        }
        result.idle_us.push(idle.elapsed().as_secs_f64() * 1e6);
    }
    result.seconds = begin.elapsed().as_secs_f64();
    for sequence in queue.into_iter().chain(looked_up.into_keys()) {
        engine.client.end(sequence);
    }
    Ok(result)
}

#[derive(Default)]
struct Steps {
    step_us: Vec<f64>,
    /// Of a step in which an answer comes, the reading of it, and the end of its turn.
    poll_us: Vec<f64>,
    /// Of a step in which a turn starts: another one enters the queue.
    enqueue_us: Vec<f64>,
    /// And the first one is looked up.
    lookup_us: Vec<f64>,
    idle_us: Vec<f64>,
    /// From a lookup to the step that has its answer.
    answers_us: Vec<f64>,
    hashing_us: Vec<f64>,
    found_blocks: usize,
    lookups: usize,
    seconds: f64,
}

impl Steps {
    /// Blocks found, of those looked for; the last answers are not waited for.
    fn found_share(&self) -> f64 {
        self.found_blocks as f64 / (self.lookups * BLOCKS) as f64
    }

    fn raw(&self, load: Load) -> serde_json::Value {
        json!({
            "turns_per_second": STEPS_PER_SECOND as usize / load.steps_per_turn, "queue": load.queue,
            "step_us": quantiles(&self.step_us), "poll_us": quantiles(&self.poll_us),
            "enqueue_us": quantiles(&self.enqueue_us), "lookup_us": quantiles(&self.lookup_us),
            "idle_step_us": quantiles(&self.idle_us), "answer_us": quantiles(&self.answers_us),
            "keys_us": quantiles(&self.hashing_us), "found_share": self.found_share(),
        })
    }
}

fn quantiles(values: &[f64]) -> serde_json::Value {
    json!({
        "p50": quantile(values, 0.5), "p90": quantile(values, 0.9),
        "p99": quantile(values, 0.99), "p999": quantile(values, 0.999),
        "max": quantile(values, 1.0),
    })
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

/// Raw results as `docs/hints.svg`; the dashes are what a step and a credit may cost.
fn picture(raw: &Value) -> anyhow::Result<()> {
    let bars = [
        ("step", "/busy/step_us"),
        ("answer read", "/busy/poll_us"),
        ("enqueue", "/busy/enqueue_us"),
        ("lookup", "/busy/lookup_us"),
        ("dense step", "/dense/step_us"),
        ("idle step", "/busy/idle_step_us"),
        ("credit", "/credit_us"),
    ];
    let quantiles = [("median", "p50"), ("90 %", "p90"), ("99 %", "p99"), ("99.9 %", "p999")];
    let groups = quantiles.map(|(label, quantile)| {
        let value = |(_, at)| raw.pointer(&format!("{at}/{quantile}"))?.as_f64();
        (label.to_owned(), bars.map(value).to_vec())
    });
    let panel = Panel {
        title: "microseconds, all cores busy: a step and its parts, and taking a credit".into(),
        scale: Scale::Logarithmic(0.01),
        limits: vec![STEP_P99_MAX_US, CREDIT_P99_MAX_US],
        groups: groups.to_vec(),
    };
    bars::draw("hints", &bars.map(|(name, _)| name), &[panel])
}

fn main() -> anyhow::Result<()> {
    if Flags::parse().redraw {
        return picture(&read_raw("hints")?);
    }
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
    eprintln!("{STEPS} steps of each load, then {CREDITS} credits, beside {cores} busy threads");
    let mut tags = 1..;
    let mut measure = || -> anyhow::Result<_> {
        let busy = steps(&mut engine, &conversations, BUSY, &mut tags)?;
        let dense = steps(&mut engine, &conversations, DENSE, &mut tags)?;
        Ok((busy, dense, credits(&mut engine)?))
    };
    let measured = measure();
    stop.store(true, Ordering::Relaxed);
    for thread in busy {
        thread.join().unwrap_or(()); // It cannot panic.
    }
    let (busy, dense, credits) = measured?;

    let stats = engine.client.stats();
    let hints = (2 * STEPS * HINTS_PER_STEP) as f64;
    figure("hint_step_p50_us", quantile(&busy.step_us, 0.5), "us");
    figure("hint_step_p99_us", quantile(&busy.step_us, 0.99), "us");
    figure("hint_step_dense_p50_us", quantile(&dense.step_us, 0.5), "us");
    figure("hint_step_dense_p99_us", quantile(&dense.step_us, 0.99), "us");
    figure("idle_step_p99_us", quantile(&busy.idle_us, 0.99), "us");
    figure("lookup_answer_p50_us", quantile(&busy.answers_us, 0.5), "us");
    figure("lookup_answer_p99_us", quantile(&busy.answers_us, 0.99), "us");
    figure("credit_p50_us", quantile(&credits, 0.5), "us");
    figure("credit_p99_us", quantile(&credits, 0.99), "us");
    figure("keys_of_a_turn_p50_us", quantile(&busy.hashing_us, 0.5), "us");
    figure("hints_per_second", hints / (busy.seconds + dense.seconds), "1/s");
    figure("hints_dropped", 100.0 * stats.hints_dropped as f64 / hints, "%");
    figure("blocks_found", 100.0 * busy.found_share(), "%");
    let raw = json!({
        "cpu": cpu_name(), "cores": cores, "steps": STEPS, "hints_per_step": HINTS_PER_STEP,
        "blocks_per_turn": BLOCKS, "busy": busy.raw(BUSY), "dense": dense.raw(DENSE),
        "credit_us": quantiles(&credits), "hints_dropped": stats.hints_dropped,
    });
    write_raw("hints", &raw)?;
    picture(&raw)
}
