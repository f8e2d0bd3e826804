//! What the policies choose from: the blocks that may leave each tier, and those that a queued turn needs
//! and that are on disk only, all in order. One owner keeps it up to date: whoever changes a block or the
//! queue notes which block it is, and its [`Standing`] is taken anew before the next choice.

use std::collections::{BTreeSet, HashMap};

use kv_protocol::BlockKey;

use super::{Known, Order, PolicyKind, QueueTicket, Victim, lookahead};
use crate::directory::EntryId;
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
    pub id: EntryId,
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
    due: BTreeSet<(QueueTicket, u32, EntryId)>,
    due_of: HashMap<EntryId, (QueueTicket, u32)>,
}

impl Index {
    /// Of an empty cache.
    pub fn new(policy: PolicyKind) -> Self {
        let (host, disk) = (Order::new(policy), Order::new(policy));
        Self { policy, host, disk, due: BTreeSet::new(), due_of: HashMap::new() }
    }

    /// Takes a block's standing; `None` if it is known no more.
    pub fn set(&mut self, id: EntryId, key: &BlockKey, standing: Option<&Standing>) {
        let known = standing.map(|standing| &standing.known);
        let absent = Residence::Absent;
        self.host.set(id, key, known, standing.map_or(absent, |standing| standing.host));
        self.disk.set(id, key, known, standing.map_or(absent, |standing| standing.disk));
        let due = standing.and_then(|standing| {
            let is_on_disk_only =
                standing.host == Residence::Absent && standing.disk != Residence::Absent;
            let turn = standing.known.turn.filter(|_| is_on_disk_only)?;
            Some((turn, standing.known.depth))
        });
        let old = match due {
            Some(due) => self.due_of.insert(id, due),
            None => self.due_of.remove(&id),
        };
        if old != due {
            if let Some((turn, depth)) = old {
                self.due.remove(&(turn, depth, id));
            }
            if let Some((turn, depth)) = due {
                self.due.insert((turn, depth, id));
            }
        }
    }

    /// What to bring from disk before it is asked for: of the turns in the prefetch window the first that
    /// lacks a block.
    pub fn promote(&self, queue: &Queue, host_blocks: u64) -> Option<Promote> {
        if self.policy != PolicyKind::LookAhead {
            return None;
        }
        let &(turn, _, id) = self.due.first()?;
        let window = lookahead::prefetch_window(host_blocks, queue.blocks_mean());
        let is_inside = queue.first_outside(window).is_none_or(|outside| turn < outside);
        is_inside.then_some(Promote { id, turn })
    }

    /// Who leaves host memory next; after `passed`, if that one could not.
    pub fn host_victim(&mut self, passed: Option<&Victim>) -> Option<Victim> {
        self.host.next(passed)
    }

    /// Who leaves host memory so that a hinted block can come; `None` if all that could is needed sooner.
    /// `turn_of`: the first turn that needs a block.
    pub fn displaced_by(
        &mut self,
        turn: QueueTicket,
        turn_of: impl FnOnce(EntryId) -> Option<QueueTicket>,
    ) -> Option<Victim> {
        self.host.next(None).filter(|victim| lookahead::may_displace(turn_of(victim.id), turn))
    }

    /// Who leaves the disk so that `incoming` can come; `None` if there is nobody whom it outranks.
    pub fn disk_victim(
        &mut self,
        id: EntryId,
        incoming: &Known,
        passed: Option<&Victim>,
    ) -> Option<Victim> {
        let rank = self.disk.rank(id, incoming);
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

    fn set(index: &mut Index, number: u8, standing: Option<&Standing>) {
        index.set(EntryId(number.into()), &key(number), standing);
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
            for depth in 0..2 {
                let known = Known { depth, ..queued(0, 10 + u64::from(turn)) };
                let on_disk = standing(known, Residence::Absent, Residence::Free);
                set(&mut index, 2 * turn + depth as u8, Some(&on_disk));
            }
        }
        let mut came = Vec::new();
        while let Some(promote) = index.promote(&queue, 4) {
            came.push(promote.id.0); // Room for two turns of two blocks.
            let held = standing(queued(0, promote.turn.0), Residence::Held, Residence::Free);
            set(&mut index, promote.id.0 as u8, Some(&held));
        }
        assert_eq!(came, [0, 1, 2, 3]);
    }

    #[test]
    fn a_full_disk_takes_no_block_that_would_be_the_first_to_leave() {
        let mut index = Index::new(PolicyKind::LookAhead);
        let on_disk = standing(queued(0, 9), Residence::Absent, Residence::Free);
        set(&mut index, 1, Some(&on_disk));
        assert_eq!(index.disk_victim(EntryId(2), &known(99), None), None);
        assert_eq!(index.disk_victim(EntryId(2), &queued(0, 10), None), None);
        assert_eq!(index.disk_victim(EntryId(2), &queued(0, 8), None).unwrap().id, EntryId(1));
    }

    fn residence() -> impl Strategy<Value = Residence> {
        prop_oneof![Just(Residence::Absent), Just(Residence::Held), Just(Residence::Free)]
    }

    prop_compose! {
        fn any_standing()(
            used_ms in 0u64..9, depth in 0u32..4,
            ticket in proptest::option::of(0u64..9), returns_ms in proptest::option::of(0u64..9),
            host in residence(), disk in residence(),
        ) -> Standing {
            let turn = ticket.map(QueueTicket);
            Standing { known: Known { used_ms, depth, turn, returns_ms }, host, disk }
        }
    }

    proptest! {
        /// Oracle: sort all blocks by their rank at every choice.
        #[test]
        fn the_index_chooses_as_a_sort_of_all_blocks_does(
            changes in proptest::collection::vec((0u8..12, proptest::option::of(any_standing())), 1..60),
            policy in prop_oneof![
                Just(PolicyKind::LookAhead), Just(PolicyKind::Lru)
            ],
        ) {
            let mut index = Index::new(policy);
            let mut blocks = std::collections::BTreeMap::new();
            for (number, change) in changes {
                set(&mut index, number, change.as_ref());
                match change {
                    Some(standing) => blocks.insert(EntryId(number.into()), standing),
                    None => blocks.remove(&EntryId(number.into())),
                };
                index.self_check();
                let order = Order::new(policy);
                let mut free: Vec<_> = blocks
                    .iter()
                    .filter(|(_, standing)| standing.host == Residence::Free)
                    .map(|(id, standing)| (order.rank(*id, &standing.known), *id))
                    .collect();
                free.sort_unstable();
                let (mut chosen, mut passed) = (Vec::new(), None);
                while let Some(victim) = index.host_victim(passed.as_ref()) {
                    chosen.push((victim.rank, victim.id));
                    passed = Some(victim);
                }
                prop_assert_eq!(chosen, free);
                let due = blocks
                    .iter()
                    .filter(|(_, s)| s.host == Residence::Absent && s.disk != Residence::Absent)
                    .filter_map(|(id, s)| Some((s.known.turn?, s.known.depth, *id)))
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
                set(&mut index, number, Some(&on_disk));
            }
            let mut left = blocks.clone();
            while let Some(victim) = index.disk_victim(EntryId(99), &queued(0, 0), None) {
                let ticket = blocks[victim.id.0 as usize];
                let is_inside = |ticket: &Option<u64>| ticket.is_some_and(|t| t < window);
                if is_inside(&ticket) {
                    prop_assert!(left.iter().all(is_inside));
                    prop_assert_eq!(left.iter().max().copied().flatten(), ticket);
                }
                left.remove(left.iter().position(|other| *other == ticket).unwrap());
                set(&mut index, victim.id.0 as u8, None);
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
                set(&mut index, number, Some(&here));
                index.self_check();
                if index.host_free() > 8 {
                    let victim = index.host_victim(None).unwrap();
                    set(&mut index, victim.id.0 as u8, None);
                }
            }
            while let Some(victim) = index.host_victim(None) {
                set(&mut index, victim.id.0 as u8, None);
            }
            prop_assert_eq!(index.host_free(), 0);
        }
    }
}
