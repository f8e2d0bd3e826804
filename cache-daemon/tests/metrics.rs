//! What the daemon counts, seen on `/metrics` of a real one.

mod support;

use std::path::Path;

use runtime::cache_client::{Hint, SequenceTag};
use support::{Daemon, Driver, conversation, geometry, region_bytes, until};

const BINARY: &str = env!("CARGO_BIN_EXE_cache-daemon");
const BLOCK_TOKENS: u64 = 16;
const BLOCK_BYTES: u64 = 8192;

/// A metric's value, summed over the lines that have these labels.
fn metric(daemon: &Daemon, name: &str, labels: &str) -> f64 {
    let text = daemon.get("/metrics");
    let start = format!("colloquy_cache_{name}");
    let lines = text.lines().filter(|line| {
        let rest = line.strip_prefix(&start);
        rest.is_some_and(|rest| rest.starts_with(['{', ' ']) && rest.contains(labels))
    });
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

fn count(daemon: &Daemon, name: &str, labels: &str) -> u64 {
    metric(daemon, name, labels) as u64
}

/// Hits, misses and queries of lookups that are over.
fn tokens_add_up(daemon: &Daemon) {
    let (hits, misses) =
        (count(daemon, "hit_tokens_total", ""), count(daemon, "miss_tokens_total", ""));
    assert_eq!(
        hits + misses,
        count(daemon, "lookup_tokens_total", ""),
        "{}",
        daemon.get("/metrics")
    );
}

/// Pushes what there is out of the 32 frames: all of it is on disk after that.
fn fill(daemon: &Daemon, driver: &mut Driver, number: u32) {
    let before = daemon.status_u64("/evictions_host");
    for round in 0.. {
        driver.save(&conversation(number + round, 16 * 12)).unwrap();
        if daemon.status_u64("/evictions_host") - before >= 40 {
            break;
        }
    }
}

#[test]
fn foresight_and_bytes_are_counted_from_a_hint_to_its_lookup() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(Path::new(BINARY), dir.path(), region_bytes(32), &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let (hinted, unhinted) = (conversation(1, 16 * 6), conversation(2, 16 * 6));
    driver.save(&hinted).unwrap();
    driver.save(&unhinted).unwrap();
    assert_eq!(count(&daemon, "moved_bytes_total", "from=\"device\""), 12 * BLOCK_BYTES);
    fill(&daemon, &mut driver, 100);

    // Foretold by its client, promoted, and then it comes.
    let tag = SequenceTag(9_000);
    let query = driver.query(&hinted);
    driver.client.enqueue(tag, query, Hint::Anticipated);
    until("the hint's blocks are here", || {
        (daemon.status_u64("/promotes_by_hint") == 6).then_some(())
    });
    assert_eq!(count(&daemon, "moved_bytes_total", "from=\"disk\""), 6 * BLOCK_BYTES);
    let loaded = driver.load_enqueued(tag, &hinted).unwrap();
    assert_eq!((loaded.disk, loaded.host), (6, 0));
    assert_eq!(count(&daemon, "prefetch_lead_seconds_count", ""), 6);
    assert!(metric(&daemon, "prefetch_lead_seconds_sum", "") > 0.0);
    assert_eq!(count(&daemon, "late_stall_seconds_count", ""), 0);
    assert_eq!(count(&daemon, "hinted_turns_total", "kind=\"anticipated\",outcome=\"came\""), 1);

    // Nobody foretold this one early enough: its lookup waits for the disk.
    assert_eq!(driver.load(&unhinted).unwrap().disk, 6);
    assert_eq!(count(&daemon, "late_stall_seconds_count", ""), 1);
    assert_eq!(count(&daemon, "hit_tokens_total", "disk"), 12 * BLOCK_TOKENS);
    tokens_add_up(&daemon);

    // Foretold, promoted, and pushed out again unread.
    fill(&daemon, &mut driver, 200);
    let before = daemon.status_u64("/promotes_by_hint");
    let tag = SequenceTag(9_001);
    let query = driver.query(&hinted);
    driver.client.enqueue(tag, query, Hint::Anticipated);
    until("they are here again", || {
        (daemon.status_u64("/promotes_by_hint") == before + 6).then_some(())
    });
    driver.client.end(tag);
    fill(&daemon, &mut driver, 300);
    assert_eq!(count(&daemon, "prefetch_wasted_bytes_total", ""), 6 * BLOCK_BYTES);
    assert_eq!(count(&daemon, "hinted_turns_total", "kind=\"anticipated\",outcome=\"left\""), 1);
    assert!(metric(&daemon, "disk_busy_seconds_total", "read") > 0.0);
    assert!(metric(&daemon, "disk_busy_seconds_total", "write") > 0.0);
    tokens_add_up(&daemon);
}

#[test]
fn what_was_evicted_and_is_wanted_is_counted_with_its_age() {
    let dir = tempfile::tempdir().unwrap();
    // No disk: what leaves the frames is gone.
    let daemon = Daemon::start_without_disk(Path::new(BINARY), dir.path(), region_bytes(32), &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let tokens = conversation(1, 16 * 6);
    driver.save(&tokens).unwrap();
    fill(&daemon, &mut driver, 100);
    assert_eq!(driver.load(&tokens).unwrap().tokens, 0);
    assert_eq!(count(&daemon, "evicted_then_wanted_seconds_count", ""), 1);
    assert_eq!(count(&daemon, "miss_tokens_total", "evicted"), 6 * BLOCK_TOKENS);
    tokens_add_up(&daemon);
}
