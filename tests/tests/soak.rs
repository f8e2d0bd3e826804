//! The daemon under mixed work for a long time: its own memory stays what it was.
//!
//! Two runtimes' cache clients (small ones, which check every byte they load) take turns of more
//! conversations than the disk tier holds: saves, loads, hints that come true or are cancelled, anticipated
//! turns, records put and fetched, frames taken and given back, clients that go and come back. Measured is
//! what the worker has beside the region: its anonymous pages (`RssAnon`), every ten turns.
//!
//! Here 1,000 turns; `make soak` goes on for half an hour (`COLLOQUY_SOAK_MINUTES`). Fails if the last quarter's
//! median is above the second quarter's.

mod support;

use std::time::{Duration, Instant};

use kv_protocol::ConversationId;
use runtime::cache_client::{CacheEvent, Hint};
use support::beside_us;
use support::daemon::{Daemon, Detached, Driver, conversation, geometry, region_bytes};

const TURNS: u64 = 1_000;
/// Between two looks at the worker's memory.
const TURNS_A_SAMPLE: u64 = 10;
/// Conversations in all: several times what the disk tier holds.
const CONVERSATIONS: u64 = 3_000;
/// Longest, in tokens: twenty blocks.
const TOKENS_MAX: u64 = 16 * 20;
/// Growth that is none: what an allocator and RocksDB's memtables do.
const GROWTH_MAX_SHARE: f64 = 0.05;
const GROWTH_MAX_BYTES: f64 = 4.0 * 1024.0 * 1024.0;

#[test]
fn memory_stays_what_it_was() {
    let minutes = std::env::var("COLLOQUY_SOAK_MINUTES").ok().map(|minutes| {
        Duration::from_secs(60 * minutes.parse::<u64>().expect("COLLOQUY_SOAK_MINUTES is a number"))
    });
    let dir = tempfile::tempdir().expect("a folder");
    let binary = beside_us("cache-daemon", "COLLOQUY_CACHE_DAEMON");
    let flags = ["--disk-bytes=64MiB", "--tail-idle-seconds=0"];
    let daemon = Daemon::start(&binary, dir.path(), region_bytes(256), &flags);
    let mut clients = [client(&daemon, 0), client(&daemon, 1)];
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut samples = Vec::new();
    let (begin, mut told, mut turns) = (Instant::now(), Instant::now(), 0_u64);
    while minutes.map_or(turns < TURNS, |minutes| begin.elapsed() < minutes) {
        let number = (turns % 2) as usize;
        if random.below(200) == 0 {
            clients[number] = client(&daemon, number as u64);
        }
        one_turn(&mut clients[number], &mut random).expect("nobody kills this daemon");
        turns += 1;
        if turns.is_multiple_of(TURNS_A_SAMPLE) {
            samples.push(rss_anon_bytes(&daemon));
        }
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            let mib = samples.last().copied().unwrap_or(0.0) / f64::from(1 << 20);
            println!("{:?}, {turns} turns: {mib:.1} MiB beside the region", begin.elapsed());
        }
    }
    let quarter = samples.len() / 4;
    let (early, late) =
        (median(&samples[quarter..2 * quarter]), median(&samples[samples.len() - quarter..]));
    println!(
        "{turns} turns: {:.1} MiB in the second quarter, {:.1} MiB in the last; {} blocks dropped from disk",
        early / f64::from(1 << 20),
        late / f64::from(1 << 20),
        daemon.status_u64("/evictions_disk"),
    );
    assert!(daemon.status_u64("/evictions_disk") > 0, "the disk tier was never full");
    let allowed = early * (1.0 + GROWTH_MAX_SHARE) + GROWTH_MAX_BYTES;
    assert!(late <= allowed, "memory grew from {early} to {late} bytes");
}

fn client(daemon: &Daemon, salt: u64) -> Driver {
    let mut driver = Driver::spawn(&daemon.socket, geometry(), &salt.to_le_bytes());
    driver.wait_attached();
    driver
}

/// What a runtime does for one request, with all that may come in between.
fn one_turn(driver: &mut Driver, random: &mut Random) -> Result<(), Detached> {
    let number = random.below(CONVERSATIONS) as u32;
    let history = conversation(number, 1 + random.below(TOKENS_MAX) as u32);
    if random.below(4) == 0 {
        let foretold = driver.enqueue(&history, 0);
        driver.client.hint(foretold, Hint::Anticipated);
        driver.client.end(foretold); // The user went away.
    }
    let waiting = driver.enqueue(&history, 1 + random.below(8) as u32);
    if random.below(8) == 0 {
        driver.client.end(waiting); // The client hung up.
        return Ok(());
    }
    driver.load_enqueued(waiting, &history)?;
    let longer = conversation(number, history.len() as u32 + random.below(40) as u32);
    driver.save(&longer)?;
    drop(driver.client.take_frame());
    let id = ConversationId([(number % 251) as u8; 32]);
    let record = vec![number as u8; 64 + random.below(2_000) as usize];
    if driver.client.put_conversation(id, record).is_ok() {
        let question = driver.client.get_conversation(id).map_err(|_| Detached)?;
        loop {
            let event = driver.next_event()?;
            if matches!(event, CacheEvent::Conversation { question: of, .. } if of == question) {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Anonymous pages of the worker, as the kernel counts them.
fn rss_anon_bytes(daemon: &Daemon) -> f64 {
    let pid = daemon.worker_pid().expect("a worker");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("a count");
    let kib: f64 = line.split_whitespace().nth(1).expect("a number").parse().expect("a number");
    kib * 1024.0
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Marsaglia's xorshift, seeded: each run does the same.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
