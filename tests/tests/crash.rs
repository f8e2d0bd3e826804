//! Two real processes: a runtime's cache client (the peer) and `cache-daemon supervise`, whose worker is
//! killed with SIGKILL again and again, in the middle of a filling and in the middle of a pin.
//!
//! The killer maps the region and watches the frame states. A kill "struck inside" if, with the worker
//! dead, the frame that it was aimed at is still in the state that was wanted: only a daemon changes it.
//! Every block's bytes follow from its key; the peer checks each byte it loads and fails at the first wrong one.
//!
//! Twice: with a small peer (this same test binary, started anew as `the_peer`), and with the real
//! `runtime` over HTTP, where each answer is compared with the same request under a fresh `cache_salt`,
//! which computes everything. The model is a tiny random one; `COLLOQUY_CRASH_MODEL=smollm2` takes SmolLM2.
//!
//! `COLLOQUY_CRASH_KILLS` sets the kills of each kind (200).

mod support;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kv_protocol::frame::Owner;
use kv_protocol::message::FrameHandle;
use kv_protocol::table::{AttachmentState, FrameTable, RegionView};
use kv_protocol::{AttachmentId, FrameState};
use support::daemon::{self, Daemon, Driver, conversation, geometry, kill, region_bytes, until};
use support::{Client, Runtime, beside_us, prompt};

/// Tells `the_peer` which socket; without it there is nothing to do.
const PEER_SOCKET: &str = "COLLOQUY_CRASH_SOCKET";
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

/// A frame that a living attachment has begun to fill.
fn filling(table: &FrameTable, view: &RegionView) -> Option<FrameHandle> {
    table.frames().find_map(|frame| {
        let word = table.state(frame).ok()?;
        let Owner::Attachment(id) = word.owner else { return None };
        let id = AttachmentId::new(id.into())?;
        let begun = table.is_taken(frame, word.generation);
        let live = view.attachment_state(id) == AttachmentState::Live;
        let wanted = word.state == FrameState::Filling && begun && live;
        wanted.then_some(FrameHandle { frame, generation: word.generation })
    })
}

/// A frame that a living attachment has pinned.
fn pinned(table: &FrameTable, view: &RegionView) -> Option<FrameHandle> {
    table.frames().find_map(|frame| {
        let word = table.state(frame).ok()?;
        let live = AttachmentId::all().any(|id| {
            table.pins(frame, id).load(kv_protocol::sync::Ordering::Relaxed) > 0
                && view.attachment_state(id) == AttachmentState::Live
        });
        let wanted = word.state == FrameState::Pinned && live;
        wanted.then_some(FrameHandle { frame, generation: word.generation })
    })
}

/// A daemon in a folder of its own.
struct Scene {
    daemon: Daemon,
    dir: tempfile::TempDir,
}

impl Scene {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let binary = beside_us("cache-daemon", "COLLOQUY_CACHE_DAEMON");
        // SmolLM2's blocks are large; the small peer's geometry gets few frames from little.
        let bytes = if smollm2().is_some() { 64 << 20 } else { region_bytes(40) };
        Self { daemon: Daemon::start(&binary, dir.path(), bytes, &[]), dir }
    }
}

/// The process on the other side of the region.
trait Peer {
    /// Kills are spread over so many frames.
    fn frames_between_kills(&self) -> u32;
    /// Ends it. Fails if it saw anything wrong; else its last words, and how many blocks or answers it
    /// has compared.
    fn stop(self: Box<Self>) -> (String, u64);
}

fn kill_many(
    state: &str,
    scene: &Scene,
    find: impl Fn(&FrameTable, &RegionView) -> Option<FrameHandle>,
    peer: Box<dyn Peer>,
) {
    let kills: u32 = std::env::var("COLLOQUY_CRASH_KILLS")
        .ok()
        .and_then(|kills| kills.parse().ok())
        .unwrap_or(200);
    let daemon = &scene.daemon;
    let view = region_of(daemon);
    let table = until("the region is formatted", || view.table().ok());
    let is_still = |target: FrameHandle| {
        table.state(target.frame).is_ok_and(|word| {
            format!("{:?}", word.state) == state && word.generation == target.generation
        })
    };
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
        let target = spin("a frame is in the wanted state", || {
            let found = find(&table, &view)?;
            if pass_over > 0 && last.replace(found) != Some(found) {
                pass_over -= 1;
            }
            if pass_over > 0 {
                return None;
            }
            // Held still first: between our look and the signal the worker may have gone on.
            kill(worker, rustix::process::Signal::STOP);
            spin("the worker stands still", || is_in(worker, "TZ").then_some(()));
            if is_still(found) {
                return Some(found);
            }
            kill(worker, rustix::process::Signal::CONT);
            None
        });
        kill(worker, rustix::process::Signal::KILL);
        spin("the worker is dead", || is_in(worker, "Z").then_some(()));
        inside += u32::from(is_still(target));
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

/// Whether a process is in one of these states (T stopped, Z zombie), or is no more.
fn is_in(pid: i32, states: &str) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
    state.is_some_and(|state| states.contains(state))
}

/// The region, by way of the supervisor's descriptor.
fn region_of(daemon: &Daemon) -> RegionView {
    let fds = format!("/proc/{}/fd", daemon.supervisor_pid());
    let is_region = |path: &Path| {
        let target = std::fs::read_link(path).unwrap_or_default();
        target.to_string_lossy().contains("memfd:colloquy-kv")
    };
    let path = std::fs::read_dir(fds)
        .expect("our own child's descriptors")
        .flatten()
        .map(|entry| entry.path())
        .find(|path| is_region(path))
        .expect("the supervisor holds the region");
    let file = std::fs::File::options().read(true).write(true).open(path).expect("our own user's");
    let region = cache_daemon::shm::map::map(&file.into()).expect("a sealed region");
    RegionView::new(region)
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
struct DriverPeer(Child);

impl DriverPeer {
    fn start(socket: &Path) -> Self {
        let child = Command::new(std::env::current_exe().expect("our own path"))
            .args(["--exact", "the_peer", "--ignored", "--nocapture"])
            .env(PEER_SOCKET, socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the peer starts");
        Self(child)
    }
}

impl Peer for DriverPeer {
    fn frames_between_kills(&self) -> u32 {
        50 // Some four turns of eleven blocks.
    }

    fn stop(mut self: Box<Self>) -> (String, u64) {
        drop(self.0.stdin.take()); // Its sign to end.
        let mut output = String::new();
        let pipe = self.0.stdout.as_mut().expect("piped");
        pipe.read_to_string(&mut output).expect("the peer's words"); // All: it must not write in vain.
        let summary = output.lines().find(|line| line.contains("blocks")).unwrap_or_default();
        let summary = summary.to_owned();
        let status = self.0.wait().expect("our own child");
        assert!(status.success(), "the peer failed: {status}");
        let mut words = summary.split_whitespace().skip_while(|word| *word != "blocks");
        let blocks = words.nth(1).and_then(|blocks| blocks.parse().ok()).unwrap_or(0);
        (summary, blocks)
    }
}

impl Drop for DriverPeer {
    fn drop(&mut self) {
        let _ = self.0.kill(); // Ended already, normally.
        let _ = self.0.wait();
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
        let tokens = conversation(turn % CONVERSATIONS, TOKENS);
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
