//! The blocks of one tier in the order in which they leave.
//!
//! **Invariant:** `by_rank` has exactly the seats of those blocks that are free to leave.

use std::collections::BTreeSet;
use std::ops::Bound;

use kv_protocol::BlockKey;

use super::{Known, PolicyKind, Rank, Residence, fifo, lookahead, lru, s3fifo};
use crate::directory::EntryId;

/// A block that may leave, and its place in the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Victim {
    /// Name.
    pub id: EntryId,
    /// Its place in the order.
    pub rank: Rank,
}

/// A rank and whose it is, in two words: there is one for each block of a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Seat(u64, u64);

impl Seat {
    fn new(rank: Rank, id: EntryId) -> Self {
        Self(rank.class_and_order, u64::from(u32::MAX - rank.from_end.0) << 32 | u64::from(id.0))
    }

    fn victim(self) -> Victim {
        let depth = u32::MAX - (self.1 >> 32) as u32;
        let rank = Rank { class_and_order: self.0, from_end: std::cmp::Reverse(depth) };
        Victim { id: EntryId(self.1 as u32), rank }
    }
}

/// A block's rank and residence, in two words.
#[derive(Debug, Clone, Copy)]
struct Slot {
    class_and_order: u64,
    depth: u32,
    residence: Residence,
}

const _: () = assert!(size_of::<Slot>() == 16, "there is one for each block of a tier");

impl Slot {
    const ABSENT: Self = Self { class_and_order: 0, depth: 0, residence: Residence::Absent };

    fn new(rank: Rank, residence: Residence) -> Self {
        Self { class_and_order: rank.class_and_order, depth: rank.from_end.0, residence }
    }

    fn rank(self) -> Rank {
        let Self { class_and_order, depth, .. } = self;
        Rank { class_and_order, from_end: std::cmp::Reverse(depth) }
    }

    fn seat(self, id: EntryId) -> Option<Seat> {
        (self.residence == Residence::Free).then(|| Seat::new(self.rank(), id))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Order {
    policy: PolicyKind,
    /// By id.
    slots: Vec<Slot>,
    by_rank: BTreeSet<Seat>,
    s3: s3fifo::Queues,
}

impl Order {
    /// An empty tier.
    pub fn new(policy: PolicyKind) -> Self {
        let (slots, by_rank) = (Vec::new(), BTreeSet::new());
        Self { policy, slots, by_rank, s3: s3fifo::Queues::default() }
    }

    /// Blocks that may leave.
    pub fn len(&self) -> usize {
        self.by_rank.len()
    }

    /// Whether nothing may leave.
    pub fn is_empty(&self) -> bool {
        self.by_rank.is_empty()
    }

    fn slot(&self, id: EntryId) -> Slot {
        self.slots.get(id.0 as usize).copied().unwrap_or(Slot::ABSENT)
    }

    /// Which rank a block has, or would have.
    pub fn rank(&self, id: EntryId, known: &Known) -> Rank {
        let slot = self.slot(id);
        match self.policy {
            PolicyKind::LookAhead => lookahead::rank(known),
            PolicyKind::Lru => lru::rank(known),
            PolicyKind::Fifo if slot.residence != Residence::Absent => slot.rank(),
            PolicyKind::Fifo => fifo::rank(known),
            PolicyKind::S3Fifo => self.s3.rank(id),
        }
    }

    /// What is known of a block now, and how it stands here.
    pub fn set(&mut self, id: EntryId, key: &BlockKey, known: Option<&Known>, here: Residence) {
        let old = self.slot(id);
        let new = match known.filter(|_| here != Residence::Absent) {
            Some(known) if self.policy == PolicyKind::S3Fifo => {
                Slot::new(self.s3.see(id, key, known), here)
            }
            Some(known) => Slot::new(self.rank(id, known), here),
            None if old.residence == Residence::Absent => return,
            None => {
                self.s3.leave(id, key);
                Slot { residence: Residence::Absent, ..old }
            }
        };
        self.replace(id, old, new);
    }

    fn replace(&mut self, id: EntryId, old: Slot, new: Slot) {
        let (from, to) = (old.seat(id), new.seat(id));
        if from != to {
            from.map(|seat| self.by_rank.remove(&seat));
            to.map(|seat| self.by_rank.insert(seat));
        }
        let place = id.0 as usize;
        if place >= self.slots.len() {
            self.slots.resize(place + 1, Slot::ABSENT);
        }
        self.slots[place] = new;
    }

    /// Who leaves next; after `passed`, if that one could not leave now.
    pub fn next(&mut self, passed: Option<&Victim>) -> Option<Victim> {
        loop {
            let from = match (passed, self.policy) {
                (Some(victim), _) => Bound::Excluded(Seat::new(victim.rank, victim.id)),
                (None, PolicyKind::S3Fifo) => {
                    Bound::Included(Seat::new(self.s3.begin(), EntryId(0)))
                }
                (None, _) => Bound::Unbounded,
            };
            let first = self.by_rank.range((from, Bound::Unbounded)).next();
            // The queue that S3-FIFO would rather take from may be empty.
            let first = first.or_else(|| self.by_rank.first().filter(|_| passed.is_none()));
            let victim = first?.victim();
            let stays = (self.policy == PolicyKind::S3Fifo)
                .then(|| self.s3.second_chance(victim.id))
                .flatten();
            let Some(rank) = stays else { return Some(victim) };
            let old = self.slot(victim.id);
            self.replace(victim.id, old, Slot::new(rank, old.residence));
        }
    }

    /// Panics where the module's invariant does not hold.
    #[cfg(test)]
    pub fn self_check(&self) {
        let ids = (0..self.slots.len()).map(|place| EntryId(place as u32));
        let seats = ids.filter_map(|id| self.slot(id).seat(id));
        assert_eq!(seats.collect::<BTreeSet<_>>(), self.by_rank);
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::known;
    use super::*;

    #[test]
    fn first_come_is_first_out_whatever_was_used_since() {
        let mut order = Order::new(PolicyKind::Fifo);
        let key = BlockKey([0; 32]);
        for (id, used_ms) in [(1, 10), (2, 20), (1, 30)] {
            order.set(EntryId(id), &key, Some(&known(used_ms)), Residence::Free);
        }
        assert_eq!(order.next(None).map(|victim| victim.id), Some(EntryId(1)));
    }
}
