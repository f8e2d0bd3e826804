//! What the policies choose from: the blocks that may leave each tier, and those that a queued turn needs
//! and that are on disk only, all in order. One owner keeps it up to date: whoever changes a block or the
//! queue notes which block it is, and its [`Standing`] is taken anew before the next choice.

use std::collections::{BTreeSet, HashMap};

use kv_protocol::BlockKey;

use super::{Known, Limits, Order, PolicyKind, QueueTicket, TenantId, Victim, Walk, lookahead};
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
    /// Whose it is.
    pub tenant: TenantId,
}

/// See the module.
#[derive(Debug)]
pub struct Index {
    policy: PolicyKind,
    host: Order,
    disk: Order,
    /// On disk only, and needed: by turn, then in token order.
    due: BTreeSet<(QueueTicket, u32, EntryId)>,
    due_of: HashMap<EntryId, Due>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Due {
    turn: QueueTicket,
    depth: u32,
    tenant: TenantId,
}

impl Index {
    /// Of an empty cache.
    pub fn new(policy: PolicyKind, host: Limits, disk: Limits) -> Self {
        let (host, disk) = (Order::new(policy, host), Order::new(policy, disk));
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
            let Known { turn, depth, tenant, .. } = standing.known;
            Some(Due { turn: turn.filter(|_| is_on_disk_only)?, depth, tenant })
        });
        let old = match due {
            Some(due) => self.due_of.insert(id, due),
            None => self.due_of.remove(&id),
        };
        if old != due {
            if let Some(Due { turn, depth, .. }) = old {
                self.due.remove(&(turn, depth, id));
            }
            if let Some(Due { turn, depth, .. }) = due {
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
        let tenant = self.due_of.get(&id)?.tenant;
        is_inside.then_some(Promote { id, turn, tenant })
    }

    /// Who leaves host memory next, on a walk.
    pub fn host_victim(&mut self, walk: &mut Walk) -> Option<Victim> {
        self.host.next(walk)
    }

    /// That one cannot leave host memory now: the walk goes on after it.
    pub fn pass_host(&self, walk: &mut Walk, victim: Victim) {
        self.host.pass(walk, victim);
    }

    /// Who leaves host memory so that a hinted block can come; `None` if all that could is needed sooner.
    /// What is over its quota gives way to others, whatever needs it, and a tenant at its quota takes from
    /// itself. `turn_of`: the first turn that needs a block.
    pub fn displaced_by(
        &mut self,
        promote: &Promote,
        turn_of: impl FnOnce(EntryId) -> Option<QueueTicket>,
    ) -> Option<Victim> {
        let is_at_quota = self.host.is_at_quota(promote.tenant);
        let victim = if is_at_quota {
            self.host.first_of(promote.tenant)?
        } else {
            self.host.next(&mut Walk::default())?
        };
        let gives_way = victim.is_over_quota && !is_at_quota;
        let may = gives_way || lookahead::may_displace(turn_of(victim.id), promote.turn);
        may.then_some(victim)
    }

    /// Who leaves the disk so that `incoming` can come; `None` if there is nobody whom it outranks. What is
    /// over its quota gives way to others, and a tenant at its quota takes from itself.
    pub fn disk_victim(&mut self, id: EntryId, incoming: &Known) -> Option<Victim> {
        let rank = self.disk.rank(id, incoming);
        if self.disk.is_at_quota(incoming.tenant) {
            return self.disk.first_of(incoming.tenant).filter(|victim| victim.rank < rank);
        }
        let victim = self.disk.next(&mut Walk::default())?;
        (victim.is_over_quota || victim.rank < rank).then_some(victim)
    }

    /// Who leaves a disk that has become too small.
    pub fn first_on_disk(&mut self) -> Option<Victim> {
        self.disk.next(&mut Walk::default())
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
    use crate::policy::Keep;
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
        let mut index = Index::new(PolicyKind::LookAhead, Limits::NONE, Limits::NONE);
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
        let mut index = Index::new(PolicyKind::LookAhead, Limits::NONE, Limits::NONE);
        let on_disk = standing(queued(0, 9), Residence::Absent, Residence::Free);
        set(&mut index, 1, Some(&on_disk));
        assert_eq!(index.disk_victim(EntryId(2), &known(99)), None);
        assert_eq!(index.disk_victim(EntryId(2), &queued(0, 10)), None);
        assert_eq!(index.disk_victim(EntryId(2), &queued(0, 8)).unwrap().id, EntryId(1));
    }

    fn residence() -> impl Strategy<Value = Residence> {
        prop_oneof![Just(Residence::Absent), Just(Residence::Held), Just(Residence::Free)]
    }

    fn keep() -> impl Strategy<Value = Keep> {
        prop_oneof![Just(Keep::Fading), Just(Keep::Ordinary), Just(Keep::Pinned)]
    }

    prop_compose! {
        fn any_standing()(
            used_ms in 0u64..9, depth in 0u32..4,
            ticket in proptest::option::of(0u64..9),
            tenant in (0u16..4).prop_map(TenantId), keep in keep(),
            host in residence(), disk in residence(),
        ) -> Standing {
            let turn = ticket.map(QueueTicket);
            Standing { known: Known { used_ms, depth, turn, tenant, keep }, host, disk }
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
            quota in proptest::option::of(0u64..6),
        ) {
            let host = Limits { quota, ..Limits::NONE };
            let mut index = Index::new(policy, host, Limits::NONE);
            let mut blocks = std::collections::BTreeMap::new();
            for (number, change) in changes {
                set(&mut index, number, change.as_ref());
                match change {
                    Some(standing) => blocks.insert(EntryId(number.into()), standing),
                    None => blocks.remove(&EntryId(number.into())),
                };
                index.self_check();
                let order = Order::new(policy, host);
                let used = |tenant: TenantId| {
                    let is_here = |s: &&Standing| s.host != Residence::Absent;
                    let here = blocks.values().filter(is_here);
                    here.filter(|s| s.known.tenant == tenant).count() as u64
                };
                let is_within = |tenant| quota.is_none_or(|quota| used(tenant) <= quota);
                let mut free: Vec<_> = blocks
                    .iter()
                    .filter(|(_, standing)| standing.host == Residence::Free)
                    .map(|(id, standing)| {
                        let known = &standing.known;
                        (is_within(known.tenant), order.rank(*id, known), *id)
                    })
                    .collect();
                free.sort_unstable();
                let (mut chosen, mut walk) = (Vec::new(), Walk::default());
                while let Some(victim) = index.host_victim(&mut walk) {
                    chosen.push((!victim.is_over_quota, victim.rank, victim.id));
                    index.pass_host(&mut walk, victim);
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
            let mut index = Index::new(PolicyKind::LookAhead, Limits::NONE, Limits::NONE);
            for (number, ticket) in (0u8..).zip(&blocks) {
                let known = Known { turn: ticket.map(QueueTicket), ..known(5) };
                let on_disk = standing(known, Residence::Absent, Residence::Free);
                set(&mut index, number, Some(&on_disk));
            }
            let mut left = blocks.clone();
            while let Some(victim) = index.disk_victim(EntryId(99), &queued(0, 0)) {
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

        /// A tenant within its quota loses nothing while another has more than its own and something that may
        /// leave: neither from host memory nor from disk.
        #[test]
        fn a_noisy_tenant_pushes_out_nobody(
            uses in proptest::collection::vec((0u8..40, 0u16..3, 0u64..50), 1..200),
            policy in prop_oneof![
                Just(PolicyKind::LookAhead), Just(PolicyKind::Lru), Just(PolicyKind::Fifo),
                Just(PolicyKind::S3Fifo)
            ],
        ) {
            // Three tenants, a third of twelve blocks each.
            let limits = Limits { quota: Some(4), ..Limits::NONE };
            let mut index = Index::new(policy, limits, limits);
            let mut here = std::collections::BTreeMap::new();
            let used = |here: &std::collections::BTreeMap<u8, TenantId>, tenant| {
                here.values().filter(|other| **other == tenant).count()
            };
            for (number, tenant, used_ms) in uses {
                let tenant = *here.get(&number).unwrap_or(&TenantId(tenant));
                let known = Known { tenant, ..known(used_ms) };
                if !here.contains_key(&number) && here.len() == 12 {
                    let Some(victim) = index.disk_victim(EntryId(number.into()), &known) else {
                        prop_assert!(used(&here, tenant) >= 4, "refused below its quota");
                        continue;
                    };
                    let number = victim.id.0 as u8;
                    let loser = here[&number];
                    prop_assert!(loser == tenant || used(&here, loser) > 4, "pushed out");
                    here.remove(&number);
                    set(&mut index, number, None);
                }
                here.insert(number, tenant);
                let standing = standing(known, Residence::Absent, Residence::Free);
                set(&mut index, number, Some(&standing));
                index.self_check();
            }
        }

        /// S3-FIFO always finds a victim where there is one, and loses count of none.
        #[test]
        fn s3_fifo_gives_up_every_block_in_the_end(
            uses in proptest::collection::vec((0u8..30, 0u64..50), 1..200),
        ) {
            let mut index = Index::new(PolicyKind::S3Fifo, Limits::NONE, Limits::NONE);
            for (number, used_ms) in uses {
                let here = standing(known(used_ms), Residence::Free, Residence::Absent);
                set(&mut index, number, Some(&here));
                index.self_check();
                if index.host_free() > 8 {
                    let victim = index.host_victim(&mut Walk::default()).unwrap();
                    set(&mut index, victim.id.0 as u8, None);
                }
            }
            while let Some(victim) = index.host_victim(&mut Walk::default()) {
                set(&mut index, victim.id.0 as u8, None);
            }
            prop_assert_eq!(index.host_free(), 0);
        }
    }
}
