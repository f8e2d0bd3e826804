//! Two real processes: a runtime's cache client (the peer) and `cache-daemon supervise`, whose worker is
//! killed with SIGKILL again and again, in the middle of a filling and in the middle of a pin.
//!
//! The killer maps the region and watches the frame states. A kill "struck inside" if, with the worker
//! dead, the frame that it was aimed at is still in the state that was wanted: only a daemon changes it.
//! Every block's bytes follow from its key; the peer checks each byte it loads and fails at the first wrong one.
//!
//! `COLLOQUY_CRASH_KILLS` sets the kills of each kind (200). The peer is this same test binary, started
//! anew as `the_peer`.

#[path = "../../cache-daemon/tests/support/mod.rs"]
mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kv_protocol::frame::Owner;
use kv_protocol::message::FrameHandle;
use kv_protocol::table::{AttachmentState, FrameTable, RegionView};
use kv_protocol::{AttachmentId, FrameState};
use support::{Daemon, Driver, conversation, geometry, kill, region_bytes, until};

/// Tells `the_peer` which socket; without it there is nothing to do.
const PEER_SOCKET: &str = "COLLOQUY_CRASH_SOCKET";
/// Conversations that the peer goes round: more than the host tier holds.
const CONVERSATIONS: u32 = 6;
const TOKENS: u32 = 16 * 10 + 5;

#[test]
fn two_hundred_kills_while_a_frame_is_filling_cost_no_wrong_byte() {
    kill_many("Filling", |table, view| {
        table.frames().find_map(|frame| {
            let word = table.state(frame).ok()?;
            let Owner::Attachment(id) = word.owner else { return None };
            let id = AttachmentId::new(id.into())?;
            let begun = table.is_taken(frame, word.generation);
            let live = view.attachment_state(id) == AttachmentState::Live;
            let wanted = word.state == FrameState::Filling && begun && live;
            wanted.then_some(FrameHandle { frame, generation: word.generation })
        })
    });
}

#[test]
fn two_hundred_kills_while_a_frame_is_pinned_cost_no_wrong_byte() {
    kill_many("Pinned", |table, view| {
        table.frames().find_map(|frame| {
            let word = table.state(frame).ok()?;
            let live = AttachmentId::all().any(|id| {
                table.pins(frame, id).load(kv_protocol::sync::Ordering::Relaxed) > 0
                    && view.attachment_state(id) == AttachmentState::Live
            });
            let wanted = word.state == FrameState::Pinned && live;
            wanted.then_some(FrameHandle { frame, generation: word.generation })
        })
    });
}

fn kill_many(state: &str, find: impl Fn(&FrameTable, &RegionView) -> Option<FrameHandle>) {
    let kills: u32 = std::env::var("COLLOQUY_CRASH_KILLS")
        .ok()
        .and_then(|kills| kills.parse().ok())
        .unwrap_or(200);
    let dir = tempfile::tempdir().expect("a folder");
    let daemon = Daemon::start(&daemon_binary(), dir.path(), region_bytes(40), &[]);
    let mut peer = Peer::start(&daemon.socket);
    let view = region_of(&daemon);
    let table = until("the region is formatted", || view.table().ok());

    let mut inside = 0;
    for kill_number in 0..kills {
        // A worker that serves, and a frame in the wanted state under it.
        let starts = || view.worker_starts().load(kv_protocol::sync::Ordering::Relaxed);
        until("the worker has started", || (starts() > u64::from(kill_number)).then_some(()));
        let worker = until("there is a worker", || daemon.worker_pid());
        let target = spin("a frame is in the wanted state", || find(&table, &view));
        kill(worker, rustix::process::Signal::KILL);
        spin("the worker is dead", || is_dead(worker).then_some(()));
        let now = table.state(target.frame).ok();
        let struck = now.is_some_and(|word| {
            format!("{:?}", word.state) == state && word.generation == target.generation
        });
        inside += u32::from(struck);
    }
    let summary = peer.stop();
    println!("{state}: {inside} of {kills} kills struck inside; peer: {summary}");
    assert!(inside * 10 >= kills * 9, "{inside} of {kills} kills struck inside");
    assert!(summary.contains("wrong 0"), "{summary}");
    let rounds: u64 = summary
        .split_whitespace()
        .skip_while(|word| *word != "blocks")
        .nth(1)
        .and_then(|blocks| blocks.parse().ok())
        .unwrap_or(0);
    assert!(rounds > 0, "the peer loaded nothing: {summary}");
    assert_eq!(daemon.status_u64("/worker_starts"), u64::from(kills) + 1);
}

/// As `until`, without pauses: the states last for microseconds.
fn spin<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let begin = std::time::Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        std::thread::yield_now();
    }
}

/// Whether a process runs no more: a zombie, or not even that.
fn is_dead(pid: i32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Err(_) => true,
        Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')),
    }
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

/// The real binary, beside this test's own in the target folder.
fn daemon_binary() -> PathBuf {
    if let Some(path) = std::env::var_os("COLLOQUY_CACHE_DAEMON") {
        return path.into();
    }
    let test = std::env::current_exe().expect("our own path");
    let binary = test.parent().and_then(Path::parent).expect("target/ci/deps").join("cache-daemon");
    assert!(
        binary.exists(),
        "{} is missing: cargo build --profile ci -p cache-daemon",
        binary.display()
    );
    binary
}

struct Peer(Child);

impl Peer {
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

    /// Ends it, and gives back its last words.
    fn stop(&mut self) -> String {
        drop(self.0.stdin.take()); // Its sign to end.
        let output = self.0.stdout.take().expect("piped");
        let summary = BufReader::new(output)
            .lines()
            .map_while(Result::ok)
            .find(|line| line.contains("blocks"))
            .unwrap_or_default();
        let status = self.0.wait().expect("our own child");
        assert!(status.success(), "the peer failed: {status}");
        summary
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill(); // Ended already, normally.
        let _ = self.0.wait();
    }
}

/// Saves and loads conversations until its standard input ends. A wrong byte panics, and fails.
#[test]
#[ignore = "started by the other tests, as a process of its own"]
fn the_peer() {
    let Some(socket) = std::env::var_os(PEER_SOCKET) else { return };
    let mut driver = Driver::spawn(Path::new(&socket), geometry(), b"");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = stop.clone();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        flag.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let (mut blocks, mut rounds, mut detached) = (0u64, 0u64, 0u64);
    let mut turn = 0;
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        driver.wait_attached();
        turn += 1;
        let tokens = conversation(turn % CONVERSATIONS, TOKENS);
        match one_turn(&mut driver, &tokens) {
            Ok(checked) => {
                blocks += checked as u64;
                rounds += 1;
            }
            Err(support::Detached) => detached += 1,
        }
    }
    let stats = driver.client.stats();
    let mut output = std::io::stdout();
    writeln!(
        output,
        "blocks {blocks} rounds {rounds} detached {detached} rejected {} wrong 0",
        stats.blocks_rejected
    )
    .expect("the parent listens");
}

/// A turn: load the history, hold it while a "step" reads it several times, save what is new.
fn one_turn(driver: &mut Driver, tokens: &[u32]) -> Result<usize, support::Detached> {
    let sequence = driver.enqueue(tokens, 0);
    let (history, miss) = driver.pin(sequence)?;
    let mut checked = 0;
    for _ in 0..3 {
        if !driver.client.is_attached() {
            return Err(support::Detached);
        }
        driver.check(tokens, &history, miss);
        checked += history.len();
    }
    drop(history);
    driver.client.end(sequence);
    driver.save_with(tokens, |_| std::thread::yield_now())?;
    Ok(checked)
}
