//! S3-FIFO (Yang et al., SOSP'23): newcomers wait in a small queue, and only what was used there twice
//! gets into the main one; names of those that left are remembered, and come back into the main one.

use std::collections::{HashMap, VecDeque};

use kv_protocol::BlockKey;

use crate::directory::EntryId;
use crate::key_map::KeySet;

use super::{Known, Rank};

/// The small queue's share of the blocks: one in this many, the paper's tenth.
const SMALL_SHARE: usize = 10;
/// Uses are counted up to here, as in the paper.
const USES_MAX: u8 = 3;

/// Which queue a block waits in. The small one's class is the lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Place {
    Small = Rank::CLASS_FIRST,
    Main,
}

/// A block in one of the queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    place: Place,
    entered: u64,
    uses: u8,
    used_ms: u64,
    depth: u32,
}

impl Entry {
    /// Inside its queue, in the order of entry.
    fn rank(&self) -> Rank {
        Rank::new(self.place as u8, self.entered, self.depth)
    }
}

/// The three queues of one tier.
#[derive(Debug, Default)]
pub struct Queues {
    blocks: HashMap<EntryId, Entry>,
    entries: u64,
    small: usize,
    main: usize,
    ghosts: KeySet,
    ghost_order: VecDeque<BlockKey>,
}

impl Queues {
    /// The rank of a block that is here. A newcomer's is the last, so that it is never its own victim.
    pub fn rank(&self, id: EntryId) -> Rank {
        let newcomer = Rank::new(Rank::CLASS_LAST, 0, 0);
        self.blocks.get(&id).map_or(newcomer, Entry::rank)
    }

    /// A block came into the tier, or changed there: a use is counted, if there was one since the last look.
    pub fn see(&mut self, id: EntryId, key: &BlockKey, known: &Known) -> Rank {
        let (used_ms, depth) = (known.used_ms, known.depth);
        let entry = if let Some(entry) = self.blocks.get(&id) {
            let uses = (entry.uses + u8::from(used_ms > entry.used_ms)).min(USES_MAX);
            Entry { uses, used_ms, depth, ..*entry }
        } else {
            let place = if self.ghosts.remove(key) { Place::Main } else { Place::Small };
            self.entry(Entry { place, entered: 0, uses: 0, used_ms, depth })
        };
        self.blocks.insert(id, entry);
        entry.rank()
    }

    /// A block leaves the tier. Those that leave the small queue are remembered, as many as the main
    /// queue has blocks.
    pub fn leave(&mut self, id: EntryId, key: &BlockKey) {
        let Some(entry) = self.blocks.remove(&id) else { return };
        self.uncount(&entry);
        if entry.place == Place::Small && self.ghosts.insert(*key) {
            self.ghost_order.push_back(*key);
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

    /// A block at a queue's head that was used stays: its new rank. `None`: it leaves.
    pub fn second_chance(&mut self, id: EntryId) -> Option<Rank> {
        let entry = *self.blocks.get(&id)?;
        let uses = match entry.place {
            Place::Small if entry.uses > 1 => 0,
            Place::Main if entry.uses > 0 => entry.uses - 1,
            _ => return None,
        };
        self.uncount(&entry);
        let again = self.entry(Entry { place: Place::Main, uses, ..entry });
        self.blocks.insert(id, again);
        Some(again.rank())
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
