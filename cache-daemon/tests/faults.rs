//! The daemon on a drive that is slow, full, ill or read-only: what is asked for is a miss at worst, what is
//! in frames is served, `/status` says why, and a drive that is well again is in use again.

mod support;

use std::path::Path;

use runtime::cache_client::MissReason;
use support::faults::{EIO, ENOSPC, EROFS, Fault, Faults};
use support::{Daemon, Driver, conversation, geometry, region_bytes, until};

const BINARY: &str = env!("CARGO_BIN_EXE_cache-daemon");
const BLOBDB: &str = "--disk-engine=blobdb";
/// Engines whose reads reach the drive: BlobDB has the little that is written here in memory.
const ENGINES: [&str; 2] = ["--disk-engine=slots", "--disk-engine=segments"];
/// Blocks of each conversation here.
const BLOCKS: u32 = 8;
/// Two conversations and a half.
const FRAMES: u64 = 20;

fn start(dir: &Path, faults: &Faults, engine: &str) -> Daemon {
    let bytes = region_bytes(FRAMES);
    let daemon = Daemon::start_in(Path::new(BINARY), dir, bytes, &[engine], &faults.environment());
    until_state(&daemon, "ready");
    daemon
}

fn until_state(daemon: &Daemon, wanted: &str) {
    until(wanted, || (daemon.status().pointer("/disk/state")? == wanted).then_some(()));
}

fn until_stored(daemon: &Daemon, blocks: u64) {
    until("blocks are written", || (daemon.status_u64("/blocks/disk") >= blocks).then_some(()));
}

fn tokens(number: u32) -> Vec<u32> {
    conversation(number, 16 * BLOCKS)
}

/// Stores conversations until the first is in no frame any more.
fn push_out(driver: &mut Driver, daemon: &Daemon) {
    for number in 100.. {
        driver.save(&tokens(number)).unwrap();
        if daemon.status_u64("/evictions_host") >= u64::from(BLOCKS) {
            return;
        }
    }
}

#[test]
fn a_drive_that_takes_no_writes_costs_stores_says_why_and_is_used_again() {
    let reasons = [(EIO, "Input/output error"), (ENOSPC, "No space"), (EROFS, "Read-only")];
    for engine in ENGINES.into_iter().chain([BLOBDB]) {
        for (errno, words) in reasons {
            println!("{engine} {words}");
            let dir = tempfile::tempdir().unwrap();
            let faults = Faults::new(dir.path());
            let daemon = start(dir.path(), &faults, engine);
            let mut driver = Driver::attach(&daemon.socket, geometry());
            driver.save(&tokens(1)).unwrap();
            until_stored(&daemon, BLOCKS.into());
            faults.set(Fault::Write(errno));
            driver.save(&tokens(2)).unwrap();
            let error = until("the status says why", || {
                daemon.status().pointer("/disk/error")?.as_str().map(str::to_owned)
            });
            assert!(error.contains(words), "{engine}, errno {errno}: {error}");
            assert_eq!(driver.load(&tokens(2)).unwrap().host, BLOCKS as usize, "frames go on");
            push_out(&mut driver, &daemon);
            // What was pushed out may have been a block of another conversation.
            let loaded = driver.load(&tokens(1)).unwrap();
            assert_eq!(loaded.host + loaded.disk, BLOCKS as usize, "{loaded:?}");
            assert!(loaded.disk > 0, "reads go on: {loaded:?}");
            faults.set(Fault::None);
            until_state(&daemon, "ready");
            let before = daemon.status_u64("/writes");
            driver.save(&tokens(3)).unwrap();
            until("writes go on", || {
                (daemon.status_u64("/writes") >= before + u64::from(BLOCKS)).then_some(())
            });
            until("the status is clean", || {
                daemon.status().pointer("/disk/error")?.is_null().then_some(())
            });
            assert_eq!(daemon.status_u64("/worker_starts"), 1, "by the same worker");
        }
    }
}

#[test]
fn a_drive_that_gives_nothing_is_a_miss_and_its_blocks_are_found_again() {
    for engine in ENGINES {
        println!("{engine}");
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::new(dir.path());
        let daemon = start(dir.path(), &faults, engine);
        let mut driver = Driver::attach(&daemon.socket, geometry());
        driver.save(&tokens(1)).unwrap();
        until_stored(&daemon, BLOCKS.into());
        push_out(&mut driver, &daemon);
        faults.set(Fault::Read(EIO));
        let loaded = driver.load(&tokens(1)).unwrap();
        assert_eq!((loaded.tokens, loaded.miss), (0, Some(MissReason::Io)), "{engine}");
        faults.set(Fault::None);
        let loaded = driver.load(&tokens(1)).unwrap();
        assert_eq!((loaded.disk, loaded.miss), (BLOCKS as usize, None), "{engine}");
        assert_eq!(daemon.status_u64("/worker_starts"), 1);
    }
}

/// The promote of one conversation takes four seconds at least; another's turn does not wait for it.
#[test]
fn a_slow_drive_delays_only_who_waits_for_it() {
    for engine in ENGINES {
        println!("{engine}");
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::new(dir.path());
        let daemon = start(dir.path(), &faults, engine);
        let mut driver = Driver::attach(&daemon.socket, geometry());
        driver.save(&tokens(1)).unwrap();
        until_stored(&daemon, BLOCKS.into());
        push_out(&mut driver, &daemon);
        until("all is written", || {
            let status = daemon.status();
            let number = |at| status.pointer(at).and_then(serde_json::Value::as_u64);
            (number("/blocks/disk") == number("/blocks/known")).then_some(())
        });
        faults.set(Fault::Slow(u64::from(BLOCKS) * geometry().payload_bytes() / 4));
        let waiting = driver.enqueue(&tokens(1), 0);
        driver.client.lookup(waiting).unwrap();
        let mut other = Driver::attach(&daemon.socket, geometry());
        let others = conversation(777, 16 * 2);
        other.save(&others).unwrap();
        assert_eq!(other.load(&others).unwrap().host, 2, "{engine}");
        let promoted =
            || daemon.status_u64("/promotes_by_lookup") + daemon.status_u64("/promotes_by_hint");
        assert!(promoted() < u64::from(BLOCKS), "{engine}: the first waits still");
        faults.set(Fault::None);
        until("what was waited for came", || (promoted() >= u64::from(BLOCKS)).then_some(()));
    }
}
