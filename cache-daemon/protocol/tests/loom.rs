//! The protocol's orderings under loom: all interleavings of a small producer and consumer.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=/tmp/loom cargo test --profile ci -p kv-protocol --test loom
//! ```
//!
//! What the model cannot see: a second mapping (loom's memory is one process's), the futex, and the
//! sizes of the region's words (loom's atomics are larger). The heap-backed tests beside the code, and the
//! two-process crash test in `tests/`, see those.
#![cfg(loom)]

use kv_protocol::frame::{FrameState, FrameWord, Owner};
use kv_protocol::ring::{Consumer, Producer, Ring};
use kv_protocol::sync::{AtomicU32, AtomicU64, Ordering};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

const ENTRIES: usize = 2;

struct Memory {
    head: AtomicU32,
    tail: AtomicU32,
    words: Vec<AtomicU64>,
}

impl Memory {
    fn new() -> Self {
        let words = (0..2 * ENTRIES).map(|_| AtomicU64::new(0)).collect();
        Self { head: AtomicU32::new(0), tail: AtomicU32::new(0), words }
    }

    fn ring(&self) -> Ring<'_, 2> {
        Ring { head: &self.head, tail: &self.tail, words: &self.words }
    }
}

#[test]
fn entries_arrive_whole_and_in_order_around_the_wrap() {
    loom::model(|| {
        let memory = Arc::new(Memory::new());
        let producer_memory = memory.clone();
        let producer = thread::spawn(move || {
            let mut producer = Producer::default();
            let mut pushed = 0;
            // Three entries through two slots; a full ring refuses, and the entry is not sent.
            for value in 1..=3u64 {
                if producer.push(&producer_memory.ring(), &[value, value + 100]).unwrap() {
                    pushed += 1;
                } else {
                    break;
                }
            }
            pushed
        });
        let mut consumer = Consumer::default();
        let mut seen = 0;
        for _ in 0..2 {
            if let Some([value, other]) = consumer.pop(&memory.ring()).unwrap() {
                seen += 1;
                assert_eq!((value, other), (seen, seen + 100));
            }
        }
        let pushed = producer.join().unwrap();
        while let Some([value, other]) = consumer.pop(&memory.ring()).unwrap() {
            seen += 1;
            assert_eq!((value, other), (seen, seen + 100));
        }
        assert_eq!(seen, pushed);
    });
}

/// A slot is written again only when the consumer's copy is done: bytes that an entry names in the arena
/// (here a cell, which loom checks for races) are reused under the same rule.
#[test]
fn arena_bytes_are_not_reused_while_they_are_read() {
    struct Shared {
        memory: Memory,
        arena: UnsafeCell<u64>,
    }
    // SAFETY: access to `arena` is ordered by the ring: that is what this test is about, and loom
    // fails it if it is not so.
    unsafe impl Sync for Shared {}
    // SAFETY: all parts are.
    unsafe impl Send for Shared {}

    loom::model(|| {
        let shared = Arc::new(Shared { memory: Memory::new(), arena: UnsafeCell::new(0) });
        let sender = shared.clone();
        let producer = thread::spawn(move || {
            let mut producer = Producer::default();
            // SAFETY: nothing was pushed: the consumer does not look yet.
            sender.arena.with_mut(|bytes| unsafe { *bytes = 1 });
            assert!(producer.push(&sender.memory.ring(), &[1, 0]).unwrap());
            if producer.head(&sender.memory.ring()) == 1 {
                // SAFETY: the consumer gave the entry back after its last read of the bytes.
                sender.arena.with_mut(|bytes| unsafe { *bytes = 2 });
            }
        });
        let mut consumer = Consumer::default();
        if consumer.peek(&shared.memory.ring()).unwrap().is_some() {
            // SAFETY: the producer wrote before it pushed, and waits for `advance`.
            let read = shared.arena.with(|bytes| unsafe { *bytes });
            assert_eq!(read, 1);
            consumer.advance(&shared.memory.ring());
        }
        producer.join().unwrap();
    });
}

/// Fill → commit (ring) → publish (frame word) → read by a third party that only sees the word.
#[test]
fn a_frame_that_is_seen_ready_has_its_bytes() {
    struct Shared {
        memory: Memory,
        word: AtomicU64,
        payload: UnsafeCell<u64>,
    }
    // SAFETY: access to `payload` is ordered by ring and word: that is what this test is about.
    unsafe impl Sync for Shared {}
    // SAFETY: all parts are.
    unsafe impl Send for Shared {}

    loom::model(|| {
        let shared = Arc::new(Shared {
            memory: Memory::new(),
            word: AtomicU64::new(0),
            payload: UnsafeCell::new(0),
        });
        FrameWord::change(&shared.word, FrameState::Filling, Owner::Attachment(0)).unwrap();
        let (runtime, daemon) = (shared.clone(), shared.clone());
        let filler = thread::spawn(move || {
            // SAFETY: the frame is Filling and ours.
            runtime.payload.with_mut(|bytes| unsafe { *bytes = 42 });
            assert!(Producer::default().push(&runtime.memory.ring(), &[5, 0]).unwrap());
        });
        let publisher = thread::spawn(move || {
            if Consumer::default().pop(&daemon.memory.ring()).unwrap().is_some() {
                FrameWord::change(&daemon.word, FrameState::Ready, Owner::Daemon).unwrap();
            }
        });
        if FrameWord::load(&shared.word).unwrap().state == FrameState::Ready {
            // SAFETY: Ready frames are read-only.
            let read = shared.payload.with(|bytes| unsafe { *bytes });
            assert_eq!(read, 42);
        }
        filler.join().unwrap();
        publisher.join().unwrap();
    });
    let _ = Ordering::SeqCst; // The facade's own re-export is used.
}
