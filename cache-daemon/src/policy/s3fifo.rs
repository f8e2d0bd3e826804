//! S3-FIFO (Yang et al., SOSP'23): newcomers wait in a small queue, and only what was used there twice
//! gets into the main one; names of those that left are remembered, and come back into the main one.

use std::collections::VecDeque;

use kv_protocol::BlockKey;

use crate::key_map::KeySet;

use super::{Known, Rank};

/// The small queue's share of the blocks: one in this many, the paper's tenth.
const SMALL_SHARE: usize = 10;
/// Uses are counted up to here, as in the paper.
const USES_MAX: u8 = 3;

/// Which queue a block waits in. The small one's class is the lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Small,
    Main,
}

/// A block in one of the queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    place: Place,
    entered: u64,
    uses: u8,
    used_ms: u64,
    depth: u32,
}

impl Entry {
    /// Inside its queue, in the order of entry.
    pub fn rank(&self) -> Rank {
        Rank::new(self.place as u8, self.entered, self.depth)
    }

    /// Counts a use, if there was one since the last look.
    #[must_use]
    pub fn seen(self, known: &Known) -> Self {
        let was_used = known.used_ms > self.used_ms;
        let uses = (self.uses + u8::from(was_used)).min(USES_MAX);
        Self { uses, used_ms: known.used_ms, depth: known.depth, ..self }
    }
}

/// The three queues of one tier.
#[derive(Debug, Default)]
pub struct Queues {
    entries: u64,
    small: usize,
    main: usize,
    ghosts: KeySet,
    ghost_order: VecDeque<BlockKey>,
}

impl Queues {
    /// A block comes into the tier.
    pub fn enter(&mut self, key: &BlockKey, known: &Known) -> Entry {
        let place = if self.ghosts.remove(key) { Place::Main } else { Place::Small };
        self.entry(Entry { place, entered: 0, uses: 0, used_ms: known.used_ms, depth: known.depth })
    }

    /// A block leaves the tier. Those that leave the small queue are remembered, as many as the main
    /// queue has blocks.
    pub fn leave(&mut self, key: BlockKey, entry: &Entry) {
        self.uncount(entry);
        if entry.place == Place::Small && self.ghosts.insert(key) {
            self.ghost_order.push_back(key);
        }
        while self.ghost_order.len() > self.main.max(1) {
            if let Some(oldest) = self.ghost_order.pop_front() {
                self.ghosts.remove(&oldest);
            }
        }
    }

    /// The rank from which the next victim is looked for: the small queue's while it is over its share.
    pub fn begin(&self) -> Rank {
        let all = self.small + self.main;
        let is_small_over = self.small * SMALL_SHARE >= all;
        Rank::new(if is_small_over { Place::Small } else { Place::Main } as u8, 0, u32::MAX)
    }

    /// A block at a queue's head that was used stays: where it goes instead. `None`: it leaves.
    pub fn second_chance(&mut self, entry: &Entry) -> Option<Entry> {
        let uses = match entry.place {
            Place::Small if entry.uses > 1 => 0,
            Place::Main if entry.uses > 0 => entry.uses - 1,
            _ => return None,
        };
        self.uncount(entry);
        Some(self.entry(Entry { place: Place::Main, uses, ..*entry }))
    }

    fn entry(&mut self, entry: Entry) -> Entry {
        self.entries += 1;
        *self.count(entry.place) += 1;
        Entry { entered: self.entries, ..entry }
    }

    fn uncount(&mut self, entry: &Entry) {
        *self.count(entry.place) -= 1;
    }

    fn count(&mut self, place: Place) -> &mut usize {
        match place {
            Place::Small => &mut self.small,
            Place::Main => &mut self.main,
        }
    }
}
