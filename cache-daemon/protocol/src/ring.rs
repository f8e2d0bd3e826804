//! Rings with one producer and one consumer, and the arena beside a ring.
//!
//! Entries are arrays of atomic words: reading an entry while a mad peer writes it is a wrong value,
//! never undefined behaviour. Each side keeps its own index in private memory and only *publishes* it;
//! the other side's index is checked on every use.
//!
//! **Invariants**
//! - `tail - head <= capacity`, in wrapping arithmetic; anything else read from the peer is [`RingCorrupt`].
//! - An entry is copied to private memory before the slot is given back.
//! - A full ring refuses; what then happens is the caller's (hints are dropped, commits wait).

use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// A ring's memory: `words.len()` must be `W` times a power of two (asserted by the layout's constants).
#[derive(Clone, Copy)]
pub struct Ring<'a, const W: usize> {
    /// Entries consumed.
    pub head: &'a AtomicU32,
    /// Entries produced.
    pub tail: &'a AtomicU32,
    /// The entries.
    pub words: &'a [AtomicU64],
}

/// The other side published an index that no ring can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("ring indices are corrupt: head {head}, tail {tail}, capacity {capacity}")]
pub struct RingCorrupt {
    /// Read or own.
    pub head: u32,
    /// Read or own.
    pub tail: u32,
    /// Entries.
    pub capacity: u32,
}

impl<const W: usize> Ring<'_, W> {
    /// Entries.
    pub fn capacity(&self) -> u32 {
        let capacity = (self.words.len() / W) as u32;
        debug_assert!(capacity.is_power_of_two());
        capacity
    }

    /// Empties the ring. Only while no peer uses it: at attach, by the daemon.
    pub fn reset(&self) {
        self.head.store(0, Ordering::Relaxed);
        self.tail.store(0, Ordering::Relaxed);
    }

    fn slot(&self, index: u32) -> &[AtomicU64] {
        let at = (index & (self.capacity() - 1)) as usize * W;
        &self.words[at..at + W]
    }

    fn filled(&self, head: u32, tail: u32) -> Result<u32, RingCorrupt> {
        let filled = tail.wrapping_sub(head);
        let capacity = self.capacity();
        if filled > capacity { Err(RingCorrupt { head, tail, capacity }) } else { Ok(filled) }
    }
}

/// The producer's private end.
#[derive(Debug, Default)]
pub struct Producer {
    tail: u32,
}

impl Producer {
    /// Entries that can be pushed now.
    pub fn room<const W: usize>(&self, ring: &Ring<'_, W>) -> Result<u32, RingCorrupt> {
        Ok(ring.capacity() - ring.filled(self.head(ring), self.tail)?)
    }

    /// How many entries the consumer has given back, counted from the ring's reset.
    pub fn head<const W: usize>(&self, ring: &Ring<'_, W>) -> u32 {
        // SYNC slot-given-back: pairs with the Release in `Consumer::advance`; the consumer's copy of
        // the slot is done before we write it again.
        ring.head.load(Ordering::Acquire)
    }

    /// Index that the next pushed entry will have.
    pub fn tail(&self) -> u32 {
        self.tail
    }

    /// Writes and publishes an entry; `false` if the ring is full.
    pub fn push<const W: usize>(
        &mut self,
        ring: &Ring<'_, W>,
        entry: &[u64; W],
    ) -> Result<bool, RingCorrupt> {
        if self.room(ring)? == 0 {
            return Ok(false);
        }
        for (word, value) in ring.slot(self.tail).iter().zip(entry) {
            word.store(*value, Ordering::Relaxed);
        }
        self.tail = self.tail.wrapping_add(1);
        // SYNC entry-published: pairs with the Acquire in `Consumer::peek`; entry, arena bytes, header
        // and payload written before are seen by who sees this index.
        ring.tail.store(self.tail, Ordering::Release);
        Ok(true)
    }
}

/// The consumer's private end.
#[derive(Debug, Default)]
pub struct Consumer {
    head: u32,
}

impl Consumer {
    /// A private copy of the oldest entry, which stays in the ring until [`Consumer::advance`]: what it
    /// names in the arena stays valid until then.
    pub fn peek<const W: usize>(
        &self,
        ring: &Ring<'_, W>,
    ) -> Result<Option<[u64; W]>, RingCorrupt> {
        // SYNC entry-published: pairs with the Release in `Producer::push`.
        let tail = ring.tail.load(Ordering::Acquire);
        if ring.filled(self.head, tail)? == 0 {
            return Ok(None);
        }
        let mut entry = [0; W];
        for (value, word) in entry.iter_mut().zip(ring.slot(self.head)) {
            *value = word.load(Ordering::Relaxed);
        }
        Ok(Some(entry))
    }

    /// Gives the oldest entry's slot, and its arena bytes, back to the producer.
    pub fn advance<const W: usize>(&mut self, ring: &Ring<'_, W>) {
        self.head = self.head.wrapping_add(1);
        // SYNC slot-given-back: our reads of slot and arena come before the producer's next writes.
        ring.head.store(self.head, Ordering::Release);
    }

    /// Copy and give back in one.
    pub fn pop<const W: usize>(
        &mut self,
        ring: &Ring<'_, W>,
    ) -> Result<Option<[u64; W]>, RingCorrupt> {
        let entry = self.peek(ring)?;
        if entry.is_some() {
            self.advance(ring);
        }
        Ok(entry)
    }
}

/// Hands out bytes of an arena in ring order: bytes named by an entry are free again once the consumer
/// has given that entry back. Private to the sender; the receiver only checks bounds.
#[derive(Debug)]
pub struct ArenaWriter {
    bytes: u32,
    /// Next byte to hand out.
    next: u32,
    /// Spans in use, oldest first: index of their entry, first byte behind them.
    used: std::collections::VecDeque<(u32, u32)>,
    /// First byte in use, if any is.
    oldest: u32,
}

impl ArenaWriter {
    /// An empty arena.
    pub fn new(bytes: u64) -> Self {
        Self { bytes: bytes as u32, next: 0, used: std::collections::VecDeque::new(), oldest: 0 }
    }

    /// Takes `bytes` contiguous bytes for the entry with index `entry`, given that entries before
    /// `consumed` were given back. `None` if there is no room now.
    pub fn take(&mut self, bytes: u32, entry: u32, consumed: u32) -> Option<u32> {
        while let Some(&(owner, end)) = self.used.front() {
            // Wrapping order: `owner` is before `consumed`.
            if (consumed.wrapping_sub(owner) as i32) <= 0 {
                break;
            }
            self.oldest = end;
            self.used.pop_front();
        }
        if self.used.is_empty() {
            (self.next, self.oldest) = (0, 0);
        }
        let bytes = bytes.next_multiple_of(8);
        let at = if self.used.is_empty() || self.next > self.oldest {
            // Free: from `next` to the end, and from the start to `oldest`.
            if self.bytes - self.next >= bytes {
                self.next
            } else if bytes < self.oldest {
                0
            } else {
                return None;
            }
        } else if bytes < self.oldest - self.next {
            self.next
        } else {
            return None;
        };
        self.next = at + bytes;
        self.used.push_back((entry, self.next));
        Some(at)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    struct Heap {
        head: AtomicU32,
        tail: AtomicU32,
        words: Vec<AtomicU64>,
    }

    impl Heap {
        fn new(entries: usize) -> Self {
            let words = (0..2 * entries).map(|_| AtomicU64::new(0)).collect();
            Self { head: AtomicU32::new(0), tail: AtomicU32::new(0), words }
        }

        fn ring(&self) -> Ring<'_, 2> {
            Ring { head: &self.head, tail: &self.tail, words: &self.words }
        }
    }

    #[test]
    fn a_full_ring_refuses_and_loses_nothing() {
        let heap = Heap::new(4);
        let (mut producer, mut consumer) = (Producer::default(), Consumer::default());
        for value in 0..4 {
            assert!(producer.push(&heap.ring(), &[value, !value]).unwrap());
        }
        assert!(!producer.push(&heap.ring(), &[9, 9]).unwrap());
        for value in 0..4 {
            assert_eq!(consumer.pop(&heap.ring()).unwrap(), Some([value, !value]));
        }
        assert_eq!(consumer.pop(&heap.ring()).unwrap(), None);
    }

    #[test]
    fn an_impossible_index_of_the_peer_is_named() {
        let heap = Heap::new(4);
        heap.tail.store(77, Ordering::Relaxed);
        let corrupt = Consumer::default().peek(&heap.ring()).unwrap_err();
        assert_eq!(corrupt, RingCorrupt { head: 0, tail: 77, capacity: 4 });
        heap.head.store(5, Ordering::Relaxed);
        assert!(Producer::default().push(&heap.ring(), &[0, 0]).is_err());
    }

    #[test]
    fn two_threads_exchange_entries_in_order() {
        let heap = Heap::new(64);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut producer = Producer::default();
                for value in 0..100_000u64 {
                    while !producer.push(&heap.ring(), &[value, value ^ 0xff]).unwrap() {
                        std::thread::yield_now();
                    }
                }
            });
            let mut consumer = Consumer::default();
            for value in 0..100_000u64 {
                let entry = loop {
                    match consumer.pop(&heap.ring()).unwrap() {
                        Some(entry) => break entry,
                        None => std::thread::yield_now(),
                    }
                };
                assert_eq!(entry, [value, value ^ 0xff]);
            }
        });
    }

    #[test]
    fn indices_survive_the_wrap_of_32_bits() {
        let heap = Heap::new(4);
        let start = u32::MAX - 1;
        heap.head.store(start, Ordering::Relaxed);
        heap.tail.store(start, Ordering::Relaxed);
        let (mut producer, mut consumer) = (Producer { tail: start }, Consumer { head: start });
        for value in 0..9 {
            assert!(producer.push(&heap.ring(), &[value, 0]).unwrap());
            assert_eq!(consumer.pop(&heap.ring()).unwrap(), Some([value, 0]));
        }
    }

    proptest! {
        /// Oracle: a queue of spans in use; no two overlap, none leaves the arena.
        #[test]
        fn spans_in_use_never_overlap(steps in proptest::collection::vec((1u32..400, any::<bool>()), 1..200)) {
            let mut arena = ArenaWriter::new(1024);
            let mut live: VecDeque<(u32, u32, u32)> = VecDeque::new();
            let (mut entry, mut consumed) = (u32::MAX - 20, u32::MAX - 20);
            for (bytes, consume) in steps {
                if consume && !live.is_empty() {
                    live.pop_front();
                    consumed = consumed.wrapping_add(1);
                }
                if let Some(at) = arena.take(bytes, entry, consumed) {
                    prop_assert!(at + bytes <= 1024);
                    for &(_, other, length) in &live {
                        prop_assert!(at + bytes <= other || other + length <= at);
                    }
                    live.push_back((entry, at, bytes));
                    entry = entry.wrapping_add(1);
                }
            }
            // Nothing leaks: once all is consumed, the whole arena is there again.
            prop_assert_eq!(arena.take(1024, entry, entry), Some(0));
        }
    }
}
