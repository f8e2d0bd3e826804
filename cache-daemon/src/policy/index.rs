//! What the policies choose from: the blocks that may leave each tier, and those that a queued turn needs
//! and that are on disk only, all in order. One owner keeps it up to date: whoever changes a block or the
//! queue notes the block's key, and its [`Standing`] is taken anew before the next choice.

use std::collections::BTreeSet;

use kv_protocol::BlockKey;

use super::{Known, Order, PolicyKind, QueueTicket, Victim, lookahead};
use crate::key_map::KeyMap;
use crate::queue::Queue;

/// How a block stands in a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residence {
    /// Not there.
    Absent,
    /// There, or on its way, and may not leave now: pinned, being copied, asked for.
    Held,
    /// There, and may leave.
    Free,
}

/// A block in both tiers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// What ranks depend on.
    pub known: Known,
    /// In host memory.
    pub host: Residence,
    /// On disk.
    pub disk: Residence,
}

/// A block to bring from disk, for which turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promote {
    /// Name.
    pub key: BlockKey,
    /// The first turn that needs it.
    pub turn: QueueTicket,
}

/// See the module.
#[derive(Debug)]
pub struct Index {
    policy: PolicyKind,
    host: Order,
    disk: Order,
    /// On disk only, and needed: by turn, then in token order.
    due: BTreeSet<(QueueTicket, u32, BlockKey)>,
    due_of: KeyMap<(QueueTicket, u32)>,
}

impl Index {
    /// Of an empty cache.
    pub fn new(policy: PolicyKind) -> Self {
        let (host, disk) = (Order::new(policy), Order::new(policy));
        Self { policy, host, disk, due: BTreeSet::new(), due_of: KeyMap::default() }
    }

    /// Takes a block's standing; `None` if it is known no more.
    pub fn set(&mut self, key: BlockKey, standing: Option<&Standing>) {
        let known = standing.map(|standing| &standing.known);
        let absent = Residence::Absent;
        self.host.set(key, known, standing.map_or(absent, |standing| standing.host));
        self.disk.set(key, known, standing.map_or(absent, |standing| standing.disk));
        let due = standing.and_then(|standing| {
            let is_on_disk_only =
                standing.host == Residence::Absent && standing.disk != Residence::Absent;
            let turn = standing.known.turn.filter(|_| is_on_disk_only)?;
            Some((turn, standing.known.depth))
        });
        let old = match due {
            Some(due) => self.due_of.insert(key, due),
            None => self.due_of.remove(&key),
        };
        if old != due {
            if let Some((turn, depth)) = old {
                self.due.remove(&(turn, depth, key));
            }
            if let Some((turn, depth)) = due {
                self.due.insert((turn, depth, key));
            }
        }
    }

    /// What to bring from disk before it is asked for: of the turns in the prefetch window the first that
    /// lacks a block.
    pub fn promote(&self, queue: &Queue, host_blocks: u64) -> Option<Promote> {
        if self.policy != PolicyKind::LookAhead {
            return None;
        }
        let &(turn, _, key) = self.due.first()?;
        let window = lookahead::prefetch_window(host_blocks, queue.blocks_mean());
        let is_inside = queue.first_outside(window).is_none_or(|outside| turn < outside);
        is_inside.then_some(Promote { key, turn })
    }

    /// Who leaves host memory next; after `passed`, if that one could not.
    pub fn host_victim(&mut self, passed: Option<&Victim>) -> Option<Victim> {
        self.host.next(passed)
    }

    /// Who leaves host memory so that a hinted block can come; `None` if all that could is needed sooner.
    pub fn displaced_by(&mut self, turn: QueueTicket, passed: Option<&Victim>) -> Option<Victim> {
        self.host.next(passed).filter(|victim| lookahead::may_displace(victim.turn, turn))
    }

    /// Who leaves the disk so that `incoming` can come; `None` if there is nobody whom it outranks.
    pub fn disk_victim(
        &mut self,
        key: &BlockKey,
        incoming: &Known,
        passed: Option<&Victim>,
    ) -> Option<Victim> {
        let rank = self.disk.rank(key, incoming);
        self.disk.next(passed).filter(|victim| victim.rank < rank)
    }

    /// Blocks that may leave host memory.
    pub fn host_free(&self) -> usize {
        self.host.len()
    }

    /// Panics where an order is not what it says.
    #[cfg(test)]
    pub fn self_check(&self) {
        self.host.self_check();
        self.disk.self_check();
        assert_eq!(self.due.len(), self.due_of.len());
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{known, queued};
    use super::*;
    use crate::queue::TurnId;
    use proptest::prelude::*;

    fn key(number: u8) -> BlockKey {
        BlockKey([number; 32])
    }

    fn standing(known: Known, host: Residence, disk: Residence) -> Standing {
        Standing { known, host, disk }
    }

    #[test]
    fn promotes_come_in_the_order_of_turns_and_not_from_beyond_the_window() {
        let mut index = Index::new(PolicyKind::LookAhead);
        let mut queue = Queue::default();
        for turn in 0..3u8 {
            let keys = [key(2 * turn), key(2 * turn + 1)];
            queue.place(TurnId(turn.into()), QueueTicket(10 + u64::from(turn)), &keys, 2);
            for (depth, key) in (0..).zip(keys) {
                let known = Known { depth, ..queued(0, 10 + u64::from(turn)) };
                let on_disk = standing(known, Residence::Absent, Residence::Free);
                index.set(key, Some(&on_disk));
            }
        }
        let mut came = Vec::new();
        while let Some(promote) = index.promote(&queue, 4) {
            came.push(promote.key); // Room for two turns of two blocks.
            let known = queued(0, promote.turn.0);
            index.set(promote.key, Some(&standing(known, Residence::Held, Residence::Free)));
        }
        assert_eq!(came, [key(0), key(1), key(2), key(3)]);
    }

    #[test]
    fn a_full_disk_takes_no_block_that_would_be_the_first_to_leave() {
        let mut index = Index::new(PolicyKind::LookAhead);
        let on_disk = standing(queued(0, 9), Residence::Absent, Residence::Free);
        index.set(key(1), Some(&on_disk));
        assert_eq!(index.disk_victim(&key(2), &known(99), None), None);
        assert_eq!(index.disk_victim(&key(2), &queued(0, 10), None), None);
        assert_eq!(index.disk_victim(&key(2), &queued(0, 8), None).unwrap().key, key(1));
    }

    fn residence() -> impl Strategy<Value = Residence> {
        prop_oneof![Just(Residence::Absent), Just(Residence::Held), Just(Residence::Free)]
    }

    prop_compose! {
        fn any_standing()(
            used_ms in 0u64..9, arrival in 0u64..9, depth in 0u32..4,
            ticket in proptest::option::of(0u64..9), returns_ms in proptest::option::of(0u64..9),
            host in residence(), disk in residence(),
        ) -> Standing {
            let turn = ticket.map(QueueTicket);
            Standing { known: Known { used_ms, arrival, depth, turn, returns_ms }, host, disk }
        }
    }

    proptest! {
        /// Oracle: sort all blocks by their rank at every choice.
        #[test]
        fn the_index_chooses_as_a_sort_of_all_blocks_does(
            changes in proptest::collection::vec((0u8..12, proptest::option::of(any_standing())), 1..60),
            policy in prop_oneof![
                Just(PolicyKind::LookAhead), Just(PolicyKind::Lru), Just(PolicyKind::Fifo)
            ],
        ) {
            let mut index = Index::new(policy);
            let mut blocks = std::collections::BTreeMap::new();
            for (number, change) in changes {
                index.set(key(number), change.as_ref());
                match change {
                    Some(standing) => blocks.insert(key(number), standing),
                    None => blocks.remove(&key(number)),
                };
                index.self_check();
                let order = Order::new(policy);
                let mut free: Vec<_> = blocks
                    .iter()
                    .filter(|(_, standing)| standing.host == Residence::Free)
                    .map(|(key, standing)| (order.rank(key, &standing.known), *key))
                    .collect();
                free.sort_unstable();
                let (mut chosen, mut passed) = (Vec::new(), None);
                while let Some(victim) = index.host_victim(passed.as_ref()) {
                    chosen.push((victim.rank, victim.key));
                    prop_assert_eq!(victim.turn, blocks[&victim.key].known.turn);
                    passed = Some(victim);
                }
                prop_assert_eq!(chosen, free);
                let due = blocks
                    .iter()
                    .filter(|(_, s)| s.host == Residence::Absent && s.disk != Residence::Absent)
                    .filter_map(|(key, s)| Some((s.known.turn?, s.known.depth, *key)))
                    .min();
                prop_assert_eq!(index.due.first().copied(), due);
            }
        }

        /// The paper's exemption: what a turn inside the eviction window needs is dropped from disk only
        /// when nothing else is there; then the latest turn gives way.
        #[test]
        fn the_disk_drops_from_the_window_last_and_there_the_latest_turn_first(
            blocks in proptest::collection::vec(proptest::option::of(0u64..20), 1..20),
            window in 1u64..20,
        ) {
            let mut index = Index::new(PolicyKind::LookAhead);
            for (number, ticket) in (0u8..).zip(&blocks) {
                let known = Known { turn: ticket.map(QueueTicket), ..known(5) };
                let on_disk = standing(known, Residence::Absent, Residence::Free);
                index.set(key(number), Some(&on_disk));
            }
            let mut left = blocks.clone();
            while let Some(victim) = index.disk_victim(&key(99), &queued(0, 0), None) {
                let ticket = victim.turn.map(|turn| turn.0);
                let is_inside = |ticket: &Option<u64>| ticket.is_some_and(|t| t < window);
                if is_inside(&ticket) {
                    prop_assert!(left.iter().all(is_inside));
                    prop_assert_eq!(left.iter().max().copied().flatten(), ticket);
                }
                left.remove(left.iter().position(|other| *other == ticket).unwrap());
                index.set(victim.key, None);
            }
        }

        /// S3-FIFO always finds a victim where there is one, and loses count of none.
        #[test]
        fn s3_fifo_gives_up_every_block_in_the_end(
            uses in proptest::collection::vec((0u8..30, 0u64..50), 1..200),
        ) {
            let mut index = Index::new(PolicyKind::S3Fifo);
            for (number, used_ms) in uses {
                let here = standing(known(used_ms), Residence::Free, Residence::Absent);
                index.set(key(number), Some(&here));
                index.self_check();
                if index.host_free() > 8 {
                    let victim = index.host_victim(None).unwrap();
                    index.set(victim.key, None);
                }
            }
            while let Some(victim) = index.host_victim(None) {
                index.set(victim.key, None);
            }
            prop_assert_eq!(index.host_free(), 0);
        }
    }
}
