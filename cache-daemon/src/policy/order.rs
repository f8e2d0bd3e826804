//! The blocks of one tier in the order in which they leave.
//!
//! **Invariant:** `by_rank` has exactly the pairs of those `slots` that have a rank.

use std::collections::BTreeSet;
use std::ops::Bound;

use kv_protocol::BlockKey;

use crate::key_map::KeyMap;

use super::{Known, PolicyKind, QueueTicket, Rank, Residence, fifo, lookahead, lru, s3fifo};

/// A block that may leave, and what it is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Victim {
    /// Name.
    pub key: BlockKey,
    /// First queued turn that needs it.
    pub turn: Option<QueueTicket>,
    /// Its place in the order.
    pub rank: Rank,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    /// `None`: it may not leave now.
    rank: Option<Rank>,
    turn: Option<QueueTicket>,
    s3: Option<s3fifo::Entry>,
}

/// See the module.
#[derive(Debug)]
pub struct Order {
    policy: PolicyKind,
    slots: KeyMap<Slot>,
    by_rank: BTreeSet<(Rank, BlockKey)>,
    s3: s3fifo::Queues,
}

impl Order {
    /// An empty tier.
    pub fn new(policy: PolicyKind) -> Self {
        let (slots, by_rank) = (KeyMap::default(), BTreeSet::new());
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

    /// Which rank a block has, or would have.
    pub fn rank(&self, key: &BlockKey, known: &Known) -> Rank {
        match self.policy {
            PolicyKind::LookAhead => lookahead::rank(known),
            PolicyKind::Lru => lru::rank(known),
            PolicyKind::Fifo => fifo::rank(known),
            PolicyKind::S3Fifo => {
                let entry = self.slots.get(key).and_then(|slot| slot.s3);
                // A newcomer is the last of the small queue, and never its own victim.
                entry.map_or(Rank::new(u8::MAX, 0, 0), |entry| entry.rank())
            }
        }
    }

    /// What is known of a block now, and how it stands here.
    pub fn set(&mut self, key: BlockKey, known: Option<&Known>, residence: Residence) {
        let known = known.filter(|_| residence != Residence::Absent);
        let old = self.slots.get(&key).copied();
        let s3 = match (self.policy, known) {
            (PolicyKind::S3Fifo, Some(known)) => Some(match old.and_then(|slot| slot.s3) {
                Some(entry) => entry.seen(known),
                None => self.s3.enter(&key, known),
            }),
            _ => None,
        };
        let rank = |known: &Known| s3.map_or_else(|| self.rank(&key, known), |entry| entry.rank());
        let new = known.map(|known| Slot {
            rank: (residence == Residence::Free).then(|| rank(known)),
            turn: known.turn,
            s3,
        });
        if let (Some(Slot { s3: Some(entry), .. }), None) = (old, new) {
            self.s3.leave(key, &entry);
        }
        self.replace(key, old, new);
    }

    fn replace(&mut self, key: BlockKey, old: Option<Slot>, new: Option<Slot>) {
        let (from, to) = (old.and_then(|slot| slot.rank), new.and_then(|slot| slot.rank));
        if from != to {
            if let Some(rank) = from {
                self.by_rank.remove(&(rank, key));
            }
            if let Some(rank) = to {
                self.by_rank.insert((rank, key));
            }
        }
        match new {
            Some(slot) => self.slots.insert(key, slot),
            None => self.slots.remove(&key),
        };
    }

    /// Who leaves next; after `passed`, if that one could not leave now.
    pub fn next(&mut self, passed: Option<&Victim>) -> Option<Victim> {
        loop {
            let from = match (passed, self.policy) {
                (Some(victim), _) => Bound::Excluded((victim.rank, victim.key)),
                (None, PolicyKind::S3Fifo) => Bound::Included((self.s3.begin(), BlockKey([0; 32]))),
                (None, _) => Bound::Unbounded,
            };
            let first = self.by_rank.range((from, Bound::Unbounded)).next();
            // The queue that S3-FIFO would rather take from may be empty.
            let first = first.or_else(|| self.by_rank.first().filter(|_| passed.is_none()));
            let (rank, key) = *first?;
            let slot = self.slots[&key];
            let stays = slot.s3.and_then(|entry| self.s3.second_chance(&entry));
            let Some(entry) = stays else { return Some(Victim { key, turn: slot.turn, rank }) };
            let again = Slot { rank: Some(entry.rank()), s3: Some(entry), ..slot };
            self.replace(key, Some(slot), Some(again));
        }
    }

    /// Panics where the module's invariant does not hold.
    #[cfg(test)]
    pub fn self_check(&self) {
        let ranked = self.slots.iter().filter_map(|(key, slot)| Some((slot.rank?, *key)));
        assert_eq!(ranked.collect::<BTreeSet<_>>(), self.by_rank);
    }
}
