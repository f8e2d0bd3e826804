//! Bits of the shared region flip under a daemon and a runtime's cache client that work: rings, control
//! words, arenas, credits, frame words, pins, headers, payloads.
//!
//! What may come of it: an attachment ends and is made anew, a block is a miss, an answer does not come.
//! What may not: bytes with right checksums that are not the block's, a daemon that dies, a cache that
//! does not work again. The other places where bits are flipped: slot files and the index
//! (`tier/disk/slots/tests.rs`), frame metadata at a restart (`tier/host.rs`).
//!
//! `COLLOQUY_FLIPS` sets how many (2,000); the seed is fixed.

mod support;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kv_protocol::layout::{
    ATTACHMENT_BYTES, AttachmentLayout, COMPLETION_ENTRIES, CREDIT_ENTRIES, SUBMISSION_ENTRIES,
    control, frame_entry,
};
use kv_protocol::table::{AttachmentState, FrameTable, RegionView};
use kv_protocol::{AttachmentId, BlockHeader, BlockKey, FrameIndex, MissReason};
use runtime::cache_client::CacheEvent;
use support::{Daemon, Driver, conversation, geometry, region_bytes, until};

const FLIPS: u64 = 2_000;
const FRAMES: u64 = 256;
const CONVERSATIONS: u64 = 8;
/// An answer that has not come by then was lost to a flip. Results do not depend on it: only losses that
/// follow one another without an end fail.
const PATIENCE: Duration = Duration::from_millis(300);
/// A doorbell that a flip made deaf is looked at again after this.
const REST: Duration = Duration::from_millis(10);
/// Losses in a row after which a runtime would be restarted.
const LOSSES_MAX: u32 = 3;

/// Why a turn did not end as it does on a sound machine.
enum Trouble {
    Detached,
    Lost,
}

#[derive(Debug, Default)]
struct Seen {
    blocks: u64,
    by_checksum: u64,
    detached: u64,
    lost: u64,
    restarted: u64,
}

#[test]
fn a_flipped_bit_of_the_region_costs_an_attachment_an_answer_or_a_miss_never_wrong_bytes() {
    let flips: u64 = std::env::var("COLLOQUY_FLIPS")
        .ok()
        .map_or(FLIPS, |flips| flips.parse().expect("COLLOQUY_FLIPS is a number"));
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(
        Path::new(env!("CARGO_BIN_EXE_cache-daemon")),
        dir.path(),
        region_bytes(FRAMES),
        &["--disk-bytes=16MiB"],
    );
    let mut driver = Some(Driver::attach(&daemon.socket, geometry()));
    let view = daemon.region();
    let (flipped, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut seen = Seen::default();
    let mut kills = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| flip_bits(&view, flips, &flipped, &done));
        let (mut turn, mut losses) = (0, 0);
        while flipped.load(Ordering::Relaxed) < flips {
            turn += 1;
            if turn % 100 == 0 {
                kills += 1;
                daemon.kill_worker(); // Frames that were lost come back, headers are read again.
            }
            let now = driver.get_or_insert_with(|| Driver::attach(&daemon.socket, geometry()));
            match one_turn(now, turn, &mut seen) {
                Ok(()) => losses = 0,
                Err(Trouble::Detached) => {
                    seen.detached += 1;
                    losses = 0;
                }
                Err(Trouble::Lost) => {
                    seen.lost += 1;
                    losses += 1;
                }
            }
            now.wait_attached();
            if losses == LOSSES_MAX {
                seen.restarted += 1;
                losses = 0;
                driver = None;
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    // Sound again: a new runtime, and a worker that takes over what is right.
    daemon.kill_worker();
    drop(driver);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let fresh = conversation(99, 16 * 5);
    until("a conversation is stored and found again", || {
        driver.save(&fresh).ok()?;
        let found = driver.load(&fresh).ok()?;
        (found.tokens == fresh.len()).then_some(())
    });
    println!("{flips} bits flipped: {seen:?}");
    // One more kill, one for the first: whatever was flipped, no worker died of it.
    assert_eq!(daemon.status_u64("/worker_starts"), kills + 2);
    assert!(seen.blocks > 0, "{seen:?}");
    assert!(seen.by_checksum + seen.detached + seen.lost > 0, "no flip struck: {seen:?}");
}

/// The answer names frames; whether they hold what was asked for shows when they are copied.
#[test]
fn a_frame_that_is_no_longer_the_block_is_found_when_it_is_copied() {
    let dir = tempfile::tempdir().unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_cache-daemon"));
    let daemon = Daemon::start(program, dir.path(), region_bytes(FRAMES), &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let tokens = conversation(1, 16 * 4);
    driver.save(&tokens).unwrap();
    let sequence = driver.enqueue(&tokens, 0);
    let (blocks, _) = driver.pin(sequence).unwrap();
    assert_eq!(blocks.len(), 4);
    let table = daemon.region().table().unwrap();
    let region = table.region();
    let [first, second] = [0, 1].map(|at| blocks[at].handle.frame);
    let header_bytes = BlockHeader::bytes(&geometry()) as u64;
    for at in 0..8 * header_bytes {
        let place = table.layout().header(first) + at / 8;
        let mut byte = [0];
        region.copy_out(place, &mut byte);
        region.copy_in(place, &[byte[0] ^ 1 << (at % 8)]);
        assert!(!driver.are_as_stored(&tokens, &blocks[0]), "bit {at} of the header");
        region.copy_in(place, &byte);
    }
    assert!(driver.are_as_stored(&tokens, &blocks[0]));
    // All of another block, each checksum of it right.
    let mut copy = vec![0; geometry().payload_bytes() as usize];
    table.copy_out(second, 0, &mut copy);
    table.copy_in(first, 0, &copy);
    let mut header = table.header(blocks[1].handle).unwrap();
    header.generation = blocks[0].handle.generation;
    table.write_header(first, &header);
    assert!(!driver.are_as_stored(&tokens, &blocks[0]), "another block is taken for it");
}

/// A runtime that finds a frame wrong says so: the next turn gets the block from disk, or computes it anew, and
/// does not run into the same bytes.
#[test]
fn a_rejected_frame_is_given_to_nobody_again() {
    for has_disk in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_cache-daemon"));
        let start = if has_disk { Daemon::start } else { Daemon::start_without_disk };
        let daemon = start(program, dir.path(), region_bytes(FRAMES), &[]);
        let mut driver = Driver::attach(&daemon.socket, geometry());
        let tokens = conversation(1, 16 * 4);
        driver.save(&tokens).unwrap();
        if has_disk {
            until("all is on disk", || (daemon.status_u64("/blocks/disk") == 4).then_some(()));
        }
        let sequence = driver.enqueue(&tokens, 0);
        let (blocks, _) = driver.pin(sequence).unwrap();
        let table = daemon.region().table().unwrap();
        table.copy_in(blocks[2].handle.frame, 0, &[!0; 8]);
        assert!(!driver.are_as_stored(&tokens, &blocks[2]));
        blocks[2].frame.reject();
        drop(blocks);
        driver.client.end(sequence);
        while driver.client.poll().is_some() {} // Gives the pins back.
        let found = driver.load(&tokens).unwrap();
        if has_disk {
            assert_eq!((found.tokens, found.host, found.disk), (64, 3, 1));
        } else {
            assert_eq!((found.tokens, found.miss), (32, Some(MissReason::Checksum)));
        }
        driver.save(&tokens).unwrap();
        assert_eq!(driver.load(&tokens).unwrap().tokens, 64);
    }
}

/// One after another, while the driver works, near what is in use.
fn flip_bits(view: &RegionView, flips: u64, flipped: &AtomicU64, done: &AtomicBool) {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    while flipped.load(Ordering::Relaxed) < flips && !done.load(Ordering::Relaxed) {
        let Ok(table) = view.table() else { continue };
        let live =
            AttachmentId::all().find(|id| view.attachment_state(*id) == AttachmentState::Live);
        let Some(id) = live else { continue };
        let at = place(&table, id, &mut random);
        let mut byte = [0];
        view.region().copy_out(at, &mut byte);
        view.region().copy_in(at, &[byte[0] ^ 1 << random.below(8)]);
        flipped.fetch_add(1, Ordering::Relaxed);
        for _ in 0..random.below(4_000) {
            std::thread::yield_now(); // Turns go on; each flip comes at another moment.
        }
    }
}

fn place(table: &FrameTable, id: AttachmentId, random: &mut Random) -> u64 {
    let area = AttachmentLayout::of(id);
    let word = |at: u64| {
        let mut bytes = [0; 4];
        table.region().copy_out(area.control + at, &mut bytes);
        u64::from(u32::from_le_bytes(bytes))
    };
    let mut near = |ring: u64, tail: u64, entries: u32, entry_bytes: u64| {
        let entry = (word(tail) + u64::from(entries) - 2 + random.below(4)) % u64::from(entries);
        ring + entry * entry_bytes + random.below(entry_bytes)
    };
    let completion = near(area.completions, control::COMPLETION_TAIL, COMPLETION_ENTRIES, 64);
    let submission = near(area.submissions, control::SUBMISSION_TAIL, SUBMISSION_ENTRIES, 64);
    let credit = near(area.credits, control::CREDIT_HEAD, CREDIT_ENTRIES, 8);
    let frame = FrameIndex(random.below(table.layout().frame_count().into()) as u32);
    match random.below(10) {
        0 => area.control + random.below(control::HINTS_DROPPED + 4),
        1 => submission,
        2 => completion,
        3 => credit,
        4 => area.control + random.below(ATTACHMENT_BYTES),
        5 => table.layout().frame_entry(frame) + random.below(frame_entry::PINS + 16),
        6 => table.layout().header(frame) + random.below(BlockHeader::bytes(&geometry()) as u64),
        _ => table.layout().frame(frame) + random.below(geometry().payload_bytes()),
    }
}

fn one_turn(driver: &mut Driver, turn: u64, seen: &mut Seen) -> Result<(), Trouble> {
    let number = (turn % CONVERSATIONS) as u32;
    let tokens = conversation(number, 16 * 10 + 5);
    load(driver, &tokens, seen)?;
    save(driver, &tokens)
}

fn load(driver: &mut Driver, tokens: &[u32], seen: &mut Seen) -> Result<(), Trouble> {
    let sequence = driver.enqueue(tokens, 0);
    driver.client.lookup(sequence).map_err(|_| Trouble::Detached)?;
    let mut all = Vec::new();
    let result = loop {
        match next_event(driver)? {
            None => break Err(Trouble::Lost),
            Some(CacheEvent::Found { sequence: of, blocks, on_disk, .. }) if of == sequence => {
                all.extend(blocks);
                if on_disk == 0 {
                    break Ok(());
                }
            }
            Some(CacheEvent::Promoted { sequence: of, blocks, .. }) if of == sequence => {
                all.extend(blocks);
                break Ok(());
            }
            Some(_) => {}
        }
    };
    for block in &all {
        seen.blocks += 1;
        seen.by_checksum += u64::from(!driver.are_as_stored(tokens, block));
    }
    driver.client.end(sequence);
    result
}

fn save(driver: &mut Driver, tokens: &[u32]) -> Result<(), Trouble> {
    let mut keys = Vec::new();
    for block in tokens.chunks(16) {
        let begin = Instant::now();
        let frame = loop {
            if let Some(frame) = driver.client.take_frame() {
                break frame;
            }
            if poll(driver)?.is_none() {
                driver.rest(REST);
            }
            if begin.elapsed() > PATIENCE {
                return Err(Trouble::Lost);
            }
        };
        let new = driver.fill(&frame, &keys, block, |_| {});
        keys.push(BlockKey::child(&new.parent, block));
        driver.client.commit(frame, new).map_err(|_| Trouble::Detached)?;
    }
    Ok(())
}

/// `None` if nothing came.
fn next_event(driver: &mut Driver) -> Result<Option<CacheEvent>, Trouble> {
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        if let Some(event) = poll(driver)? {
            return Ok(Some(event));
        }
        driver.rest(REST);
    }
    Ok(None)
}

fn poll(driver: &mut Driver) -> Result<Option<CacheEvent>, Trouble> {
    match driver.client.poll() {
        Some(CacheEvent::Detached) => Err(Trouble::Detached),
        None if !driver.client.is_attached() => Err(Trouble::Detached),
        event => Ok(event),
    }
}

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
