//! The daemon as a process, with the runtime's real cache client: what the loop promises, seen from outside.

mod support;

use std::os::unix::net::UnixStream;
use std::path::Path;

use kv_protocol::geometry::LayerSet;
use kv_protocol::message::CommitOutcome;
use kv_protocol::{Dtype, Geometry};
use runtime::cache_client::MissReason;
use support::{Daemon, Driver, Loaded, conversation, geometry, region_bytes, until};

const BINARY: &str = env!("CARGO_BIN_EXE_cache-daemon");

fn start(dir: &Path, frames: u64, more: &[&str]) -> Daemon {
    Daemon::start(Path::new(BINARY), dir, region_bytes(frames), more)
}

const SLOTS: &str = "--disk-engine=slots";
const SEGMENTS: &str = "--disk-engine=segments";
const BLOBDB: &str = "--disk-engine=blobdb";

#[test]
fn a_saved_conversation_is_found_with_its_tail() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let tokens = conversation(1, 16 * 5 + 7);
    assert_eq!(driver.save(&tokens).unwrap(), [CommitOutcome::Stored; 6]);
    let expected = Loaded { host: 6, disk: 0, tokens: tokens.len(), miss: None };
    assert_eq!(driver.load(&tokens).unwrap(), expected);
    // A later turn: more tokens than were saved, the tail is found inside a block that is now full.
    let longer = conversation(1, 16 * 8);
    let loaded = driver.load(&longer).unwrap();
    assert_eq!((loaded.host, loaded.tokens), (6, tokens.len()));
    assert_eq!(driver.save(&tokens).unwrap(), [CommitOutcome::Known; 6]);
    let strangers = driver.load(&conversation(2, 40)).unwrap();
    let nothing = Loaded { miss: Some(MissReason::NeverStored), ..Loaded::default() };
    assert_eq!(strangers, nothing);
}

#[test]
fn pins_and_unused_frames_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let tokens = conversation(1, 16 * 8);
    driver.save(&tokens).unwrap();
    let sequence = driver.enqueue(&tokens, 0);
    let (blocks, _) = driver.pin(sequence).unwrap();
    until("frames are pinned", || (daemon.status_u64("/frames/pinned") == 8).then_some(()));
    drop(blocks);
    drop(driver.client.take_frame());
    until("no frame is pinned", || {
        let _ = driver.client.poll();
        (daemon.status_u64("/frames/pinned") == 0).then_some(())
    });
}

#[test]
fn a_restarted_worker_keeps_what_was_in_frames() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let tokens = conversation(1, 16 * 10 + 3);
    driver.save(&tokens).unwrap();
    for round in 1..=5 {
        daemon.kill_worker();
        while driver.next_event().is_ok() {}
        driver.wait_attached();
        let loaded = driver.load(&tokens).unwrap();
        assert_eq!((loaded.host, loaded.tokens), (11, tokens.len()), "after kill {round}");
    }
    assert_eq!(daemon.status_u64("/worker_starts"), 6);
    assert_eq!(driver.client.stats().daemon_errors, 0);
}

#[test]
fn a_new_runtime_finds_what_the_old_one_left() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[]);
    let tokens = conversation(1, 16 * 4);
    for _ in 0..8 {
        // More runtimes than places: those of the dead ones are taken again.
        let mut driver = Driver::attach(&daemon.socket, geometry());
        driver.save(&tokens).unwrap();
        assert_eq!(driver.load(&tokens).unwrap().host, 4);
    }
}

#[test]
fn another_geometry_formats_the_region_anew_and_the_disk_keeps_the_old_blocks() {
    for engine in [SLOTS, SEGMENTS, BLOBDB] {
        another_geometry_formats_the_region_anew_and_the_disk_keeps_the_old_blocks_on(engine);
    }
}

fn another_geometry_formats_the_region_anew_and_the_disk_keeps_the_old_blocks_on(engine: &str) {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[engine]);
    let tokens = conversation(1, 16 * 4);
    let mut first = Driver::attach(&daemon.socket, geometry());
    first.save(&tokens).unwrap();
    drop(first);
    let wider = Geometry::new(16, 6, 1, 32, Dtype::F16, LayerSet::all(6)).unwrap();
    let mut second = Driver::attach(&daemon.socket, wider);
    assert_eq!(daemon.status_u64("/format_epoch"), 2);
    second.save(&tokens).unwrap();
    assert_eq!(second.load(&tokens).unwrap().host, 4);
    drop(second);
    let mut first = Driver::attach(&daemon.socket, geometry());
    let expected = Loaded { host: 0, disk: 4, tokens: tokens.len(), miss: None };
    assert_eq!(first.load(&tokens).unwrap(), expected);
}

#[test]
fn blocks_and_records_survive_the_whole_daemon() {
    for engine in [SLOTS, SEGMENTS, BLOBDB] {
        blocks_and_records_survive_the_whole_daemon_on(engine);
    }
}

fn blocks_and_records_survive_the_whole_daemon_on(engine: &str) {
    let dir = tempfile::tempdir().unwrap();
    let tokens = conversation(1, 16 * 20 + 5);
    let (id, bytes);
    {
        let daemon = start(dir.path(), 64, &[engine]);
        let mut driver = Driver::attach(&daemon.socket, geometry());
        driver.save(&tokens).unwrap();
        let record;
        (id, record) = driver.record("chat", &tokens);
        bytes = record.encode().unwrap();
        driver.client.put_conversation(id, bytes.clone()).unwrap();
        assert_eq!(driver.ask(id).unwrap().as_ref(), Some(&bytes));
        drop(driver);
        assert_eq!(daemon.stop(), Some(0)); // SIGTERM: tails, too.
    }
    let daemon = start(dir.path(), 64, &[engine]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    assert_eq!(driver.ask(id).unwrap().as_ref(), Some(&bytes));
    until("the index is read", || {
        (daemon.status().pointer("/disk/state")? == "ready").then_some(())
    });
    let expected = Loaded { host: 0, disk: 21, tokens: tokens.len(), miss: None };
    assert_eq!(driver.load(&tokens).unwrap(), expected);
    let expected = Loaded { host: 21, disk: 0, ..expected };
    assert_eq!(driver.load(&tokens).unwrap(), expected);
    assert_eq!(daemon.status_u64("/writes"), 0); // Inclusive: written once in their lives.
}

#[test]
fn sealed_blocks_survive_a_killed_supervisor() {
    for engine in [SLOTS, SEGMENTS, BLOBDB] {
        sealed_blocks_survive_a_killed_supervisor_on(engine);
    }
}

fn sealed_blocks_survive_a_killed_supervisor_on(engine: &str) {
    let dir = tempfile::tempdir().unwrap();
    let tokens = conversation(1, 16 * 12);
    {
        let daemon = start(dir.path(), 64, &[engine]);
        let mut driver = Driver::attach(&daemon.socket, geometry());
        driver.save(&tokens).unwrap();
        until("all is written", || (daemon.status_u64("/blocks/disk") == 12).then_some(()));
    } // SIGKILL.
    let daemon = start(dir.path(), 64, &[engine]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    until("the index is read", || (daemon.status_u64("/blocks/disk") == 12).then_some(()));
    assert_eq!(driver.load(&tokens).unwrap().disk, 12);
}

/// One strided copy a layer takes neighbours to the device.
#[test]
fn a_conversations_blocks_lie_in_neighbouring_frames_saved_or_promoted() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = conversation(1, 16 * 12);
    let neighbours = |driver: &mut Driver| {
        let sequence = driver.enqueue(&tokens, 0);
        let (blocks, _) = driver.pin(sequence).unwrap();
        let frames: Vec<u32> = blocks.iter().map(|block| block.handle.frame.0).collect();
        assert_eq!(frames.len(), 12);
        frames.windows(2).filter(|pair| pair[1] == pair[0] + 1).count()
    };
    {
        let daemon = start(dir.path(), 64, &[]);
        let mut driver = Driver::attach(&daemon.socket, geometry());
        driver.save(&tokens).unwrap();
        assert_eq!(neighbours(&mut driver), 11);
        until("all is written", || (daemon.status_u64("/blocks/disk") == 12).then_some(()));
    }
    let daemon = start(dir.path(), 64, &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    until("the index is read", || (daemon.status_u64("/blocks/disk") == 12).then_some(()));
    assert_eq!(neighbours(&mut driver), 11);
}

/// Needs a pool of huge pages, which root can make: eight of 2 MiB.
#[test]
fn a_region_of_huge_pages_serves_like_another_and_without_a_pool_says_what_is_missing() {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let pages = || std::fs::read_to_string(POOL).ok()?.trim().parse::<u64>().ok();
    let before = pages().unwrap_or(0);
    let made = before >= 8 || std::fs::write(POOL, "8").is_ok() && pages() == Some(8);
    if !made {
        assert!(std::env::var_os("CI").is_none(), "no huge pages can be had here");
        eprintln!("skipped: no huge pages can be had here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    {
        let flags = ["--huge-pages=2MiB"];
        let daemon = Daemon::start(Path::new(BINARY), dir.path(), 12 << 20, &flags);
        let mut driver = Driver::attach(&daemon.socket, geometry());
        let tokens = conversation(1, 16 * 5 + 7);
        assert_eq!(driver.save(&tokens).unwrap(), [CommitOutcome::Stored; 6]);
        assert_eq!(driver.load(&tokens).unwrap().host, 6);
        until("all is faulted", || (daemon.status_u64("/faulted_bytes") == 12 << 20).then_some(()));
    }
    let output = std::process::Command::new(BINARY)
        .args(["supervise", "--host-bytes=1TiB", "--huge-pages=2MiB"])
        .arg(format!("--socket={}", dir.path().join("other.sock").display()))
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(71), "{words}");
    assert!(words.contains("hugepages"), "{words}");
    if before < 8 {
        std::fs::write(POOL, before.to_string()).unwrap();
    }
}

#[test]
fn host_frames_survive_the_whole_sidecar_while_a_runtime_lives() {
    let dir = tempfile::tempdir().unwrap();
    // A tail that never goes to disk: it can come back from frames only.
    let flags = ["--tail-idle-seconds=3600"];
    let daemon = start(dir.path(), 64, &flags);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let tokens = conversation(1, 16 * 6 + 5);
    driver.save(&tokens).unwrap();
    drop(daemon); // SIGKILL.
    while driver.next_event().is_ok() {}
    let daemon = start(dir.path(), 64, &flags);
    driver.wait_attached();
    let expected = Loaded { host: 7, disk: 0, tokens: tokens.len(), miss: None };
    assert_eq!(driver.load(&tokens).unwrap(), expected);
    assert_eq!(daemon.status_u64("/worker_starts"), 2);
}

#[test]
fn with_room_for_one_of_three_conversations_hints_bring_them_back_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 24, &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let conversations: Vec<_> = (1..=3).map(|number| conversation(number, 16 * 14)).collect();
    for tokens in &conversations {
        driver.save(tokens).unwrap();
    }
    for round in 0..3 {
        for tokens in &conversations {
            let before = daemon.status_u64("/promotes_by_hint");
            let sequence = driver.enqueue(tokens, 0);
            until("the hinted blocks are here", || {
                let _ = driver.client.poll(); // An engine polls all the time: pins go back by it.
                let status = daemon.status();
                let hinted = status.pointer("/promotes_by_hint")?.as_u64()?;
                (hinted > before && status.pointer("/frames/filling")?.as_u64()? <= 3).then_some(())
            });
            let loaded = driver.load_enqueued(sequence, tokens).unwrap();
            assert_eq!(loaded.tokens, tokens.len(), "round {round}");
            // In frames by the hints, and told as from where the turn's KV was kept.
            assert!(loaded.disk > 0, "round {round}: {loaded:?}");
            assert_eq!(loaded.host + loaded.disk, 14, "round {round}: {loaded:?}");
        }
    }
    assert!(daemon.status_u64("/evictions_host") > 0);
}

#[test]
fn a_full_disk_tier_drops_the_oldest() {
    for engine in [SLOTS, SEGMENTS, BLOBDB] {
        a_full_disk_tier_drops_the_oldest_on(engine);
    }
}

fn a_full_disk_tier_drops_the_oldest_on(engine: &str) {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[engine, "--disk-bytes=16777216"]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    for number in 0..40 {
        driver.save(&conversation(number, 16 * 40)).unwrap(); // 1,600 blocks of 8 KiB: 12.8 MiB fit.
    }
    until("the disk tier has dropped blocks", || {
        (daemon.status_u64("/evictions_disk") > 0).then_some(())
    });
    until("all is written", || (daemon.status_u64("/writes") == 1600).then_some(()));
    assert!(daemon.status_u64("/disk/stored_bytes") <= 16_777_216);
    let newest = conversation(39, 16 * 40);
    assert_eq!(driver.load(&newest).unwrap().tokens, newest.len());
    assert_eq!(driver.load(&conversation(0, 16 * 40)).unwrap().miss, Some(MissReason::Evicted));
}

#[test]
fn a_disk_that_fails_says_so_and_is_used_again_when_it_works_again() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[SLOTS]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let state = |wanted: &str| {
        until(wanted, || (daemon.status().pointer("/disk/state")? == wanted).then_some(()));
    };
    state("ready");
    let (slots, away) = (dir.path().join("disk/slots"), dir.path().join("disk/away"));
    std::fs::rename(&slots, &away).unwrap(); // No slot file can be made.
    let tokens = conversation(1, 16 * 8);
    driver.save(&tokens).unwrap();
    state("failed");
    assert!(daemon.status().pointer("/disk/error").unwrap().is_string());
    assert_eq!(driver.load(&tokens).unwrap().host, 8, "the host tier goes on");
    std::fs::rename(&away, &slots).unwrap();
    state("ready");
    until("what was only in frames is written", || {
        (daemon.status_u64("/blocks/disk") == 8).then_some(())
    });
    assert!(daemon.status().pointer("/disk/error").unwrap().is_null());
    assert_eq!(daemon.status_u64("/worker_starts"), 1, "by the same worker");
}

#[test]
fn a_peer_that_writes_nonsense_is_detached_and_the_others_go_on() {
    use kv_protocol::handshake::{ClientToken, Hello, WELCOME_BYTES};
    use std::io::{Read, Write};
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let tokens = conversation(1, 64);
    driver.save(&tokens).unwrap();

    // A hello that is none is refused in words, and the connection ends.
    let mut stranger = UnixStream::connect(&daemon.socket).unwrap();
    stranger.write_all(&[0x5a; kv_protocol::handshake::HELLO_BYTES]).unwrap();
    let mut answer = Vec::new();
    stranger.read_to_end(&mut answer).unwrap();
    let answer: [u8; WELCOME_BYTES] = answer.try_into().unwrap();
    let refusal = kv_protocol::handshake::decode_answer(&answer).unwrap();
    assert_eq!(refusal, Err(kv_protocol::handshake::Refusal::Version));

    // A right hello, then garbage in the ring: named, counted, detached.
    let region = daemon.region();
    for garbage in [0u64, 9, 2, 4, 5, 6] {
        let before = protocol_errors(&daemon);
        let mut peer = UnixStream::connect(&daemon.socket).unwrap();
        let hello = Hello {
            geometry: geometry(),
            fingerprint: kv_protocol::Fingerprint([9; 32]),
            client: ClientToken([garbage as u8 + 1; 16]),
            quiescent: true,
        };
        peer.write_all(&hello.encode()).unwrap();
        let mut answer = [0; WELCOME_BYTES];
        peer.read_exact(&mut answer).unwrap();
        let welcome = kv_protocol::handshake::decode_answer(&answer).unwrap().unwrap();
        let mut ring = kv_protocol::ring::Producer::default();
        let entry = [garbage, u64::MAX >> 4, 0x7fff_ffff, 3, 4, 5, 6, 7];
        ring.push(&region.submissions(welcome.attachment), &entry).unwrap();
        region.daemon_doorbell().ring();
        assert_eq!(peer.read(&mut [0]).unwrap_or(0), 0, "the daemon hangs up");
        until("the error is counted", || (protocol_errors(&daemon) > before).then_some(()));
        // Its place rests for the grace period: wait for it, or places run out.
        until("the place is vacant", || {
            let state = region.attachment_state(welcome.attachment);
            (state == kv_protocol::table::AttachmentState::Vacant).then_some(())
        });
    }
    let expected = Loaded { host: 4, disk: 0, tokens: 64, miss: None };
    assert_eq!(driver.load(&tokens).unwrap(), expected);
}

fn protocol_errors(daemon: &Daemon) -> u64 {
    let metrics = daemon.get("/metrics");
    let name = "colloquy_cache_protocol_errors_total ";
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|value| value.parse().ok()).unwrap_or(0)
}

#[test]
fn a_corrupt_frame_is_not_written_to_disk_and_a_corrupt_header_is_not_adopted() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &["--tail-idle-seconds=3600"]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let tokens = conversation(1, 7); // A tail: it stays in its frame.
    driver.save(&tokens).unwrap();
    let region = daemon.region();
    let table = region.table().unwrap();
    let frame = table.frames().find(|frame| {
        table.state(*frame).is_ok_and(|word| word.state == kv_protocol::FrameState::Ready)
    });
    let at = table.layout().header(frame.unwrap());
    let torn = region.region().read(at, 1)[0] ^ 0xff;
    region.region().copy_in(at + 40, &[torn, torn, torn]);
    daemon.kill_worker();
    while driver.next_event().is_ok() {}
    driver.wait_attached();
    let nothing = Loaded { miss: Some(MissReason::NeverStored), ..Loaded::default() };
    assert_eq!(driver.load(&tokens).unwrap().tokens, nothing.tokens);
    assert_eq!(daemon.status_u64("/frames/pinned"), 0);
}

#[test]
fn a_truncated_value_on_disk_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = conversation(1, 16 * 4);
    {
        let daemon = start(dir.path(), 64, &[BLOBDB]);
        let mut driver = Driver::attach(&daemon.socket, geometry());
        driver.save(&tokens).unwrap();
        drop(driver);
        assert_eq!(daemon.stop(), Some(0));
    }
    {
        let families = ["default", "index", "payload", "conversation"];
        let options = rocksdb::Options::default();
        let db = rocksdb::DB::open_cf(&options, dir.path().join("disk"), families).unwrap();
        let payload = db.cf_handle("payload").unwrap();
        let root = kv_protocol::RootKey::new(&kv_protocol::Fingerprint([4; 32]), b"");
        let key = root.chain(&tokens, 16)[2];
        let value = db.get_cf(payload, key.0).unwrap().unwrap();
        db.put_cf(payload, key.0, &value[..value.len() - 100]).unwrap();
    }
    let daemon = start(dir.path(), 64, &[]); // An older store goes on under its own engine.
    assert_eq!(daemon.status().pointer("/disk/engine").unwrap(), "blobdb");
    let mut driver = Driver::attach(&daemon.socket, geometry());
    until("the index is read", || (daemon.status_u64("/blocks/disk") == 4).then_some(()));
    let loaded = driver.load(&tokens).unwrap();
    assert_eq!((loaded.tokens, loaded.miss), (32, Some(MissReason::Checksum)));
    assert_eq!(driver.load(&tokens).unwrap().miss, Some(MissReason::Checksum));
}

#[test]
fn bad_flags_end_with_a_sentence_and_code_64() {
    for flags in [&["supervise"][..], &["supervise", "--host-bytes=12"], &["dance"]] {
        let output = std::process::Command::new(BINARY).args(flags).output().unwrap();
        assert_eq!(output.status.code(), Some(64), "{flags:?}");
        assert!(!output.stderr.is_empty());
    }
}
