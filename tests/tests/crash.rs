//! Two real processes: a runtime's cache client (the peer) and `cache-daemon supervise`, whose worker is
//! killed with SIGKILL again and again, in the middle of a save, a load, a promote, an overwritten slot and
//! a change of the index.
//!
//! The killer maps the region and watches the frame states. A kill "struck inside" if, with the worker
//! dead, the frame that it was aimed at is still in the state that was wanted: only a daemon changes it.
//! Of files it watches the calls that the worker's threads are in; such a kill struck inside if, with the
//! worker stopped, the thread was still in a write or a sync of that file.
//! Every block's bytes follow from its key; the peer checks each byte it loads and fails at the first wrong one.
//! An eviction from frames cannot be aimed at: it is one store of one word.
//!
//! Twice: with a small peer (this same test binary, started anew as `the_peer`), and with the real
//! `runtime` over HTTP, where each answer is compared with the same request under a fresh `cache_salt`,
//! which computes everything. The model is a tiny random one; `COLLOQUY_CRASH_MODEL=smollm2` takes SmolLM2.
//!
//! `COLLOQUY_CRASH_KILLS` sets the kills of each kind (200; 50 where the disk tier is full).

mod support;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kv_protocol::frame::{FrameWord, Owner};
use kv_protocol::message::FrameHandle;
use kv_protocol::table::{AttachmentState, FrameTable, RegionView};
use kv_protocol::{AttachmentId, FrameIndex, FrameState};
use support::daemon::{self, Daemon, Driver, conversation, geometry, kill, region_bytes, until};
use support::{Client, Runtime, beside_us, prompt};

/// Tells `the_peer` which socket; without it there is nothing to do.
const PEER_SOCKET: &str = "COLLOQUY_CRASH_SOCKET";
/// Tells `the_peer` to begin new conversations all the time.
const PEER_IS_WIDE: &str = "COLLOQUY_CRASH_WIDE";
/// How far back a wide peer goes: further than frames reach, less far than the disk tier.
const TURNS_BACK: u32 = 60;
/// Conversations of a wide peer; their token ids are numbers of 32 bits.
const WIDE_CONVERSATIONS: u32 = 40_000;
/// Conversations that the peer goes round: more than the host tier holds.
const CONVERSATIONS: u32 = 6;
const TOKENS: u32 = 16 * 10 + 5;

#[test]
fn kills_while_a_frame_is_filling_cost_no_wrong_byte() {
    let scene = Scene::start();
    let peer = DriverPeer::start(&scene.daemon.socket);
    kill_many("Filling", &scene, filling, Box::new(peer));
}

#[test]
fn kills_while_a_frame_is_pinned_cost_no_wrong_byte() {
    let scene = Scene::start();
    let peer = DriverPeer::start(&scene.daemon.socket);
    kill_many("Pinned", &scene, pinned, Box::new(peer));
}

#[test]
fn kills_while_a_block_is_promoted_cost_no_wrong_byte() {
    let scene = Scene::with_full_disk();
    let peer = DriverPeer::start_wide(&scene.daemon.socket);
    kill_many("Promoting", &scene, promoting, Box::new(peer));
}

/// The disk tier is full: each write goes over a slot that another block had.
#[test]
fn kills_while_a_slot_is_written_cost_no_wrong_byte() {
    let scene = Scene::with_full_disk();
    let peer = DriverPeer::start_wide(&scene.daemon.socket);
    scene.wait_for_evictions();
    let find = |sight: &Sight<'_>| writing(sight, |path| path.contains("/slots/slots-"));
    kill_many("Slot", &scene, find, Box::new(peer));
}

/// The disk tier is full: blocks are removed from the index as often as others are put in.
#[test]
fn kills_while_the_index_is_changed_cost_no_wrong_byte() {
    let scene = Scene::with_full_disk();
    let peer = DriverPeer::start_wide(&scene.daemon.socket);
    scene.wait_for_evictions();
    let is_log = |path: &str| {
        path.contains("/slots/index/")
            && Path::new(path).extension().is_some_and(|extension| extension == "log")
    };
    kill_many("Index", &scene, |sight| writing(sight, is_log), Box::new(peer));
}

#[test]
fn kills_while_a_frame_is_filling_fail_no_request_of_the_real_runtime() {
    let scene = Scene::start();
    let peer = RuntimePeer::start(&scene);
    kill_many("Filling", &scene, filling, Box::new(peer));
}

#[test]
fn kills_while_a_frame_is_pinned_fail_no_request_of_the_real_runtime() {
    let scene = Scene::start();
    let peer = RuntimePeer::start(&scene);
    kill_many("Pinned", &scene, pinned, Box::new(peer));
}

/// What the killer can see.
struct Sight<'a> {
    table: &'a FrameTable,
    view: &'a RegionView,
    worker: i32,
}

/// What a kill is aimed at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// A frame in a state.
    Frame { state: FrameState, handle: FrameHandle },
    /// A thread in a call with these arguments, digested.
    Call { thread: i32, call: [u8; 32] },
}

impl Sight<'_> {
    /// The first frame in this state that is `wanted`.
    fn frame(
        &self,
        state: FrameState,
        wanted: impl Fn(FrameIndex, &FrameWord) -> bool,
    ) -> Option<Target> {
        self.table.frames().find_map(|frame| {
            let word = self.table.state(frame).ok()?;
            let handle = FrameHandle { frame, generation: word.generation };
            (word.state == state && wanted(frame, &word)).then_some(Target::Frame { state, handle })
        })
    }

    fn is_live(&self, id: AttachmentId) -> bool {
        self.view.attachment_state(id) == AttachmentState::Live
    }

    /// Whether it is as it was when it was aimed at; with the worker dead, as far as that can be seen.
    fn is_still(&self, target: Target) -> bool {
        match target {
            Target::Frame { state, handle } => self
                .table
                .state(handle.frame)
                .is_ok_and(|word| word.state == state && word.generation == handle.generation),
            Target::Call { thread, call } => call_of(self.worker, thread)
                .is_some_and(|now| *blake3::hash(now.as_bytes()).as_bytes() == call),
        }
    }

    /// Whether the thread that matters goes on no more.
    fn is_held(&self, target: Target) -> bool {
        match target {
            Target::Frame { .. } => is_in(&format!("/proc/{}/stat", self.worker), "TZ"),
            // A thread that waits for the drive stops when the call ends, before its next instruction.
            Target::Call { thread, .. } => {
                is_in(&format!("/proc/{}/task/{thread}/stat", self.worker), "TZ")
            }
        }
    }
}

/// A frame that a living attachment has begun to fill.
fn filling(sight: &Sight<'_>) -> Option<Target> {
    sight.frame(FrameState::Filling, |frame, word| {
        let Owner::Attachment(id) = word.owner else { return false };
        let id = AttachmentId::new(id.into());
        let begun = sight.table.is_taken(frame, word.generation);
        begun && id.is_some_and(|id| sight.is_live(id))
    })
}

/// A frame that a living attachment has pinned.
fn pinned(sight: &Sight<'_>) -> Option<Target> {
    sight.frame(FrameState::Pinned, |frame, _| {
        AttachmentId::all().any(|id| {
            let pins = sight.table.pins(frame, id).load(kv_protocol::sync::Ordering::Relaxed);
            pins > 0 && sight.is_live(id)
        })
    })
}

/// A frame that the daemon fills from disk.
fn promoting(sight: &Sight<'_>) -> Option<Target> {
    sight.frame(FrameState::Filling, |_, word| word.owner == Owner::Daemon)
}

/// A thread of the disk tier that writes or syncs such a file.
fn writing(sight: &Sight<'_>, is_wanted: impl Fn(&str) -> bool) -> Option<Target> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", sight.worker)).ok()?;
    tasks.flatten().find_map(|task| {
        let thread = task.file_name().to_str()?.parse().ok()?;
        let call = call_of(sight.worker, thread)?;
        let mut words = call.split_whitespace();
        let number: i64 = words.next()?.parse().ok()?;
        if ![libc::SYS_pwrite64, libc::SYS_write, libc::SYS_fdatasync].contains(&number) {
            return None;
        }
        let descriptor = u32::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
        let path = format!("/proc/{}/fd/{descriptor}", sight.worker);
        let path = std::fs::read_link(path).ok()?;
        let call = *blake3::hash(call.as_bytes()).as_bytes();
        is_wanted(path.to_str()?).then_some(Target::Call { thread, call })
    })
}

/// Number and arguments of the call that a thread is in; `None` if it is gone or in none.
fn call_of(worker: i32, thread: i32) -> Option<String> {
    let call = std::fs::read_to_string(format!("/proc/{worker}/task/{thread}/syscall")).ok()?;
    call.starts_with(|first: char| first.is_ascii_digit()).then_some(call)
}

/// A daemon in a folder of its own.
struct Scene {
    daemon: Daemon,
    dir: tempfile::TempDir,
}

impl Scene {
    fn start() -> Self {
        // SmolLM2's blocks are large; the small peer's geometry gets few frames from little.
        Self::of(if smollm2().is_some() { 64 << 20 } else { region_bytes(40) }, &[])
    }

    /// Frames for four conversations, and the smallest disk tier, for a hundred.
    fn with_full_disk() -> Self {
        Self::of(region_bytes(40), &["--disk-engine=slots", "--disk-bytes=16MiB"])
    }

    fn of(host_bytes: u64, flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let binary = beside_us("cache-daemon", "COLLOQUY_CACHE_DAEMON");
        Self { daemon: Daemon::start(&binary, dir.path(), host_bytes, flags), dir }
    }

    fn wait_for_evictions(&self) {
        until("blocks leave the full disk tier", || {
            (self.daemon.status_u64("/evictions_disk") > 0).then_some(())
        });
    }
}

/// The process on the other side of the region.
trait Peer {
    /// Unless `COLLOQUY_CRASH_KILLS` says something else.
    fn kills(&self) -> u32 {
        200
    }
    /// Kills are spread over so many frames.
    fn frames_between_kills(&self) -> u32;
    /// Ends it. Fails if it saw anything wrong; else its last words, and how many blocks or answers it
    /// has compared.
    fn stop(self: Box<Self>) -> (String, u64);
}

fn kill_many(
    state: &str,
    scene: &Scene,
    find: impl Fn(&Sight<'_>) -> Option<Target>,
    peer: Box<dyn Peer>,
) {
    let kills: u32 = std::env::var("COLLOQUY_CRASH_KILLS")
        .ok()
        .and_then(|kills| kills.parse().ok())
        .unwrap_or(peer.kills());
    let daemon = &scene.daemon;
    let view = daemon.region();
    let table = until("the region is formatted", || view.table().ok());
    let mut inside = 0;
    for kill_number in 0..kills {
        // A worker that serves, and a frame in the wanted state under it.
        let starts = || view.worker_starts().load(kv_protocol::sync::Ordering::Relaxed);
        until("the worker has started", || (starts() > u64::from(kill_number)).then_some(()));
        let worker = until("there is a worker", || daemon.worker_pid());
        // Not always the first one: the peer gets on with its work between kills, and kills strike
        // it at different places.
        let mut pass_over = kill_number * 13 % peer.frames_between_kills();
        let mut last = None;
        let sight = Sight { table: &table, view: &view, worker };
        let target = spin("the wanted state is there", || {
            let found = find(&sight)?;
            if pass_over > 0 && last.replace(found) != Some(found) {
                pass_over -= 1;
            }
            if pass_over > 0 {
                return None;
            }
            // Held still first: between our look and the signal the worker may have gone on.
            kill(worker, rustix::process::Signal::STOP);
            spin("the worker stands still", || sight.is_held(found).then_some(()));
            if sight.is_still(found) {
                return Some(found);
            }
            kill(worker, rustix::process::Signal::CONT);
            None
        });
        let was_inside = sight.is_still(target);
        kill(worker, rustix::process::Signal::KILL);
        spin("the worker is dead", || is_in(&format!("/proc/{worker}/stat"), "Z").then_some(()));
        inside += u32::from(match target {
            Target::Frame { .. } => sight.is_still(target),
            Target::Call { .. } => was_inside, // The dead are in no call.
        });
    }
    let (summary, compared) = peer.stop();
    println!("{state}: {inside} of {kills} kills struck inside; peer: {summary}");
    assert!(inside * 10 >= kills * 9, "{inside} of {kills} kills struck inside");
    assert!(compared > 0, "the peer compared nothing: {summary}");
    let starts = || view.worker_starts().load(kv_protocol::sync::Ordering::Relaxed);
    until("the last worker has started", || (starts() > u64::from(kills)).then_some(()));
    assert_eq!(starts(), u64::from(kills) + 1, "a worker ended by itself");
}

/// As `until`, without pauses: the states last for microseconds.
fn spin<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let begin = std::time::Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(begin.elapsed() < Duration::from_mins(1), "waited in vain until {what}");
        std::thread::yield_now();
    }
}

/// Whether a process or thread is in one of these states (T stopped, Z zombie), or is no more.
fn is_in(stat: &str, states: &str) -> bool {
    let Ok(stat) = std::fs::read_to_string(stat) else { return true };
    let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
    state.is_some_and(|state| states.contains(state))
}

/// SmolLM2's file, if that model is asked for.
fn smollm2() -> Option<PathBuf> {
    let asked = std::env::var("COLLOQUY_CRASH_MODEL").is_ok_and(|model| model == "smollm2");
    asked.then(|| {
        let home = std::env::var_os("HOME").map_or_else(PathBuf::new, PathBuf::from);
        let cache = std::env::var_os("COLLOQUY_CACHE")
            .map_or_else(|| home.join(".cache/colloquy"), PathBuf::from);
        cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf")
    })
}

/// The small peer.
struct DriverPeer {
    child: Child,
    kills: u32,
    frames_between_kills: u32,
}

impl DriverPeer {
    fn start(socket: &Path) -> Self {
        Self::start_with(socket, false, 200, 50) // Some four turns of eleven blocks.
    }

    /// One whose conversations are more than the disk tier holds.
    fn start_wide(socket: &Path) -> Self {
        Self::start_with(socket, true, 50, 8) // A group of writes is up to eight blocks.
    }

    fn start_with(socket: &Path, is_wide: bool, kills: u32, frames_between_kills: u32) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("our own path"));
        if is_wide {
            command.env(PEER_IS_WIDE, "1");
        }
        let child = command
            .args(["--exact", "the_peer", "--ignored", "--nocapture"])
            .env(PEER_SOCKET, socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the peer starts");
        Self { child, kills, frames_between_kills }
    }
}

impl Peer for DriverPeer {
    fn kills(&self) -> u32 {
        self.kills
    }

    fn frames_between_kills(&self) -> u32 {
        self.frames_between_kills
    }

    fn stop(mut self: Box<Self>) -> (String, u64) {
        drop(self.child.stdin.take()); // Its sign to end.
        let mut output = String::new();
        let pipe = self.child.stdout.as_mut().expect("piped");
        pipe.read_to_string(&mut output).expect("the peer's words"); // All: it must not write in vain.
        let summary = output.lines().find(|line| line.contains("blocks")).unwrap_or_default();
        let summary = summary.to_owned();
        let status = self.child.wait().expect("our own child");
        assert!(status.success(), "the peer failed: {status}");
        let mut words = summary.split_whitespace().skip_while(|word| *word != "blocks");
        let blocks = words.nth(1).and_then(|blocks| blocks.parse().ok()).unwrap_or(0);
        (summary, blocks)
    }
}

impl Drop for DriverPeer {
    fn drop(&mut self) {
        let _ = self.child.kill(); // Ended already, normally.
        let _ = self.child.wait();
    }
}

/// The real runtime, with two clients that hold conversations over HTTP.
struct RuntimePeer {
    runtime: Runtime,
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Answers>>,
}

/// What a client has seen.
#[derive(Debug, Default, Clone, Copy)]
struct Answers {
    compared: u64,
    cached_tokens: u64,
}

impl RuntimePeer {
    fn start(scene: &Scene) -> Self {
        let model = smollm2().unwrap_or_else(|| {
            let path = scene.dir.path().join("tiny.gguf");
            runtime::weights::random::write_tiny_gguf(&path, 7).expect("the tiny model");
            path
        });
        let runtime = Runtime::start(&model, Some(&scene.daemon.socket), &["--device-bytes=64Mi"]);
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..2).map(|number| {
            let (client, stop) = (runtime.client(), stop.clone());
            std::thread::spawn(move || hold_conversations(&client, number, &stop))
        });
        Self { clients: clients.collect(), runtime, stop }
    }
}

/// Asks each question twice, with what the cache has and cold, until told to stop. A request that fails,
/// or an answer that differs, fails the test.
fn hold_conversations(client: &Client, number: u32, stop: &AtomicBool) -> Answers {
    let mut answers = Answers::default();
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let conversation = turn % CONVERSATIONS + number * CONVERSATIONS;
        let tokens = prompt(conversation, TOKENS);
        let warm = client.ask(&tokens, "");
        let cold = client.ask(&tokens, &format!("cold {number} {turn}"));
        assert_eq!(warm.text, cold.text, "conversation {conversation}, turn {turn}");
        answers.cached_tokens += warm.cached_tokens;
        answers.compared += 1;
        client.clear_device(); // The next turn loads its history from frames.
    }
    answers
}

impl Peer for RuntimePeer {
    fn frames_between_kills(&self) -> u32 {
        20
    }

    fn stop(mut self: Box<Self>) -> (String, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let mut sum = Answers::default();
        for client in std::mem::take(&mut self.clients) {
            let answers = client.join().expect("no request failed, no answer differed");
            sum.compared += answers.compared;
            sum.cached_tokens += answers.cached_tokens;
        }
        self.runtime.stop();
        assert!(sum.cached_tokens > 0, "no history ever came from the cache");
        let Answers { compared, cached_tokens } = sum;
        let words = format!("{compared} answers equal, {cached_tokens} tokens from the cache");
        (words, compared)
    }
}

/// Saves and loads conversations until its standard input ends. A wrong byte panics, and fails.
#[test]
#[ignore = "started by the other tests, as a process of its own"]
fn the_peer() {
    let Some(socket) = std::env::var_os(PEER_SOCKET) else { return };
    let is_wide = std::env::var_os(PEER_IS_WIDE).is_some();
    let mut driver = Driver::spawn(Path::new(&socket), geometry(), b"");
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        flag.store(true, Ordering::Relaxed);
    });
    let (mut blocks, mut rounds, mut detached) = (0u64, 0u64, 0u64);
    let mut turn = 0;
    while !stop.load(Ordering::Relaxed) {
        driver.wait_attached();
        turn += 1;
        let number = match turn {
            _ if !is_wide => turn % CONVERSATIONS,
            // Every other turn is of a new conversation, the others go back.
            _ if turn % 2 == 0 => turn / 2,
            _ => (turn / 2).saturating_sub(4 + turn * 7 % TURNS_BACK),
        };
        let tokens = conversation(number % WIDE_CONVERSATIONS, TOKENS);
        match one_turn(&mut driver, &tokens) {
            Ok(checked) => {
                blocks += checked as u64;
                rounds += 1;
            }
            Err(daemon::Detached) => detached += 1,
        }
    }
    let stats = driver.client.stats();
    let mut output = std::io::stdout();
    writeln!(
        output,
        "blocks {blocks} rounds {rounds} detached {detached} rejected {}",
        stats.blocks_rejected
    )
    .expect("the parent listens");
}

/// A turn: load the history, hold it while a "step" reads it several times, save what is new.
fn one_turn(driver: &mut Driver, tokens: &[u32]) -> Result<usize, daemon::Detached> {
    let sequence = driver.enqueue(tokens, 0);
    let (history, miss) = driver.pin(sequence)?;
    let mut checked = 0;
    for _ in 0..3 {
        if !driver.client.is_attached() {
            return Err(daemon::Detached);
        }
        driver.check(tokens, &history, miss);
        checked += history.len();
    }
    drop(history);
    driver.client.end(sequence);
    driver.save_with(tokens, |_| std::thread::yield_now())?;
    Ok(checked)
}
