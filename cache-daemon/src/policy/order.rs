//! The blocks of one tier in the order in which they leave.
//!
//! Each tenant's blocks are in an order of their own; of all tenants' first blocks (their *heads*) those leave
//! first whose tenant has more than its quota, then the lowest rank. So a tenant over its quota loses its own
//! blocks, and crossing a quota costs one head, not a walk over the tenant's blocks.
//!
//! **Invariants**
//! - A tenant's `seats` are exactly those of its blocks that are free to leave; its head is the first of them.
//! - `used` counts a tenant's blocks in the tier, `pinned` those of all tenants that rank as pinned.

use std::collections::BTreeSet;
use std::ops::Bound;

use kv_protocol::BlockKey;

use super::{Keep, Known, PolicyKind, Rank, Residence, TenantId, fifo, lookahead, lru, s3fifo};
use crate::directory::EntryId;

/// Bounds of one tier, in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// What a tenant may have here before its own blocks leave first; `None`: no tenant is told from another.
    pub quota: Option<u64>,
    /// What may rank as pinned here; pinned blocks beyond it are like others.
    pub pinned: u64,
}

impl Limits {
    /// No quota, no pins refused.
    pub const NONE: Self = Self { quota: None, pinned: u64::MAX };
}

/// A block that may leave, and its place in the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Victim {
    /// Name.
    pub id: EntryId,
    /// Its place in the order of its tenant.
    pub rank: Rank,
    /// Its tenant has more than its quota.
    pub is_over_quota: bool,
    tenant: TenantId,
}

/// A rank and whose it is, in two words: there is one for each block of a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Seat(u64, u64);

impl Seat {
    fn new(rank: Rank, id: EntryId) -> Self {
        Self(rank.class_and_order, u64::from(u32::MAX - rank.from_end.0) << 32 | u64::from(id.0))
    }

    fn id(self) -> EntryId {
        EntryId(self.1 as u32)
    }

    fn rank(self) -> Rank {
        let depth = u32::MAX - (self.1 >> 32) as u32;
        Rank { class_and_order: self.0, from_end: std::cmp::Reverse(depth) }
    }
}

/// A tenant's next block to leave, and before which other tenants'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Head {
    is_within_quota: bool,
    seat: Seat,
    tenant: TenantId,
}

impl Head {
    fn victim(self) -> Victim {
        let Self { is_within_quota, seat, tenant } = self;
        Victim { id: seat.id(), rank: seat.rank(), is_over_quota: !is_within_quota, tenant }
    }
}

impl From<Victim> for Head {
    fn from(victim: Victim) -> Self {
        let Victim { id, rank, is_over_quota, tenant } = victim;
        Self { is_within_quota: !is_over_quota, seat: Seat::new(rank, id), tenant }
    }
}

/// How far a walk through the order has come, past blocks that cannot leave now.
#[derive(Debug, Default)]
pub struct Walk {
    last: Option<Head>,
    /// Where it goes on among the blocks of tenants whose head was passed.
    resumes: BTreeSet<Head>,
}

/// A block's rank, tenant and residence, in two words.
#[derive(Debug, Clone, Copy)]
struct Slot {
    class_and_order: u64,
    depth: u32,
    tenant: TenantId,
    residence: Residence,
}

const _: () = assert!(size_of::<Slot>() == 16, "there is one for each block of a tier");

impl Slot {
    const ABSENT: Self = Self {
        class_and_order: 0,
        depth: 0,
        tenant: TenantId::CROWD,
        residence: Residence::Absent,
    };

    fn new(rank: Rank, tenant: TenantId, residence: Residence) -> Self {
        let Rank { class_and_order, from_end } = rank;
        Self { class_and_order, depth: from_end.0, tenant, residence }
    }

    fn rank(self) -> Rank {
        let Self { class_and_order, depth, .. } = self;
        Rank { class_and_order, from_end: std::cmp::Reverse(depth) }
    }

    fn is_here(self) -> bool {
        self.residence != Residence::Absent
    }

    fn is_pinned(self) -> bool {
        self.is_here() && self.rank().is_pinned()
    }

    fn seat(self, id: EntryId) -> Option<Seat> {
        (self.residence == Residence::Free).then(|| Seat::new(self.rank(), id))
    }
}

/// The blocks of one tenant.
#[derive(Debug, Default)]
struct Group {
    seats: BTreeSet<Seat>,
    used: u64,
    head: Option<Head>,
}

/// See the module.
#[derive(Debug)]
pub struct Order {
    policy: PolicyKind,
    limits: Limits,
    /// By id.
    slots: Vec<Slot>,
    /// By tenant; without a quota there is one.
    groups: Vec<Group>,
    heads: BTreeSet<Head>,
    pinned: u64,
    s3: s3fifo::Queues,
}

impl Order {
    /// An empty tier.
    pub fn new(policy: PolicyKind, limits: Limits) -> Self {
        Self {
            policy,
            limits,
            slots: Vec::new(),
            groups: Vec::new(),
            heads: BTreeSet::new(),
            pinned: 0,
            s3: s3fifo::Queues::default(),
        }
    }

    /// Blocks that may leave.
    pub fn len(&self) -> usize {
        self.groups.iter().map(|group| group.seats.len()).sum()
    }

    /// Whether nothing may leave.
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    fn slot(&self, id: EntryId) -> Slot {
        self.slots.get(id.0 as usize).copied().unwrap_or(Slot::ABSENT)
    }

    /// Whether another block of a tenant would be over its quota.
    pub fn is_at_quota(&self, tenant: TenantId) -> bool {
        let group = self.groups.get(usize::from(tenant.0));
        self.limits.quota.is_some_and(|quota| group.map_or(0, |group| group.used) >= quota)
    }

    /// Which rank a block has, or would have.
    pub fn rank(&self, id: EntryId, known: &Known) -> Rank {
        let slot = self.slot(id);
        let rank = match self.policy {
            PolicyKind::LookAhead => lookahead::rank(known),
            PolicyKind::Lru => lru::rank(known),
            PolicyKind::Fifo if slot.is_here() => fifo::again(slot.rank(), known),
            PolicyKind::Fifo => fifo::rank(known),
            PolicyKind::S3Fifo => self.s3.rank(id),
        };
        self.kept(rank, slot, known)
    }

    /// What was said of a block beside its use: whether it is pinned, or fades.
    fn kept(&self, rank: Rank, slot: Slot, known: &Known) -> Rank {
        let is_foreseen = self.policy == PolicyKind::LookAhead && known.turn.is_some();
        match known.keep {
            Keep::Pinned if slot.is_pinned() || self.pinned < self.limits.pinned => rank.pinned(),
            Keep::Fading if !is_foreseen => rank.fading(),
            _ => rank,
        }
    }

    /// What is known of a block now, and how it stands here.
    pub fn set(&mut self, id: EntryId, key: &BlockKey, known: Option<&Known>, here: Residence) {
        let old = self.slot(id);
        let new = match known.filter(|_| here != Residence::Absent) {
            Some(known) => {
                let rank = if self.policy == PolicyKind::S3Fifo {
                    let rank = self.s3.see(id, key, known);
                    self.kept(rank, old, known)
                } else {
                    self.rank(id, known)
                };
                let tenant = self.limits.quota.map_or(TenantId(0), |_| known.tenant);
                Slot::new(rank, tenant, here)
            }
            None if !old.is_here() => return,
            None => {
                self.s3.leave(id, key);
                Slot { residence: Residence::Absent, ..old }
            }
        };
        self.replace(id, old, new);
    }

    fn replace(&mut self, id: EntryId, old: Slot, new: Slot) {
        self.pinned -= u64::from(old.is_pinned());
        self.pinned += u64::from(new.is_pinned());
        let (from, to) = (old.seat(id), new.seat(id));
        if old.is_here() {
            let group = &mut self.groups[usize::from(old.tenant.0)];
            group.used -= 1;
            if from != to || old.tenant != new.tenant {
                from.map(|seat| group.seats.remove(&seat));
            }
        }
        if new.is_here() {
            let place = usize::from(new.tenant.0);
            if place >= self.groups.len() {
                self.groups.resize_with(place + 1, Group::default);
            }
            let group = &mut self.groups[place];
            group.used += 1;
            group.seats.extend(to);
        }
        let place = id.0 as usize;
        if place >= self.slots.len() {
            self.slots.resize(place + 1, Slot::ABSENT);
        }
        self.slots[place] = new;
        self.update_head(new.tenant);
        if old.is_here() && old.tenant != new.tenant {
            self.update_head(old.tenant);
        }
    }

    fn head_from(&self, tenant: TenantId, from: Bound<Seat>) -> Option<Head> {
        let group = self.groups.get(usize::from(tenant.0))?;
        let seat = *group.seats.range((from, Bound::Unbounded)).next()?;
        let is_within_quota = self.limits.quota.is_none_or(|quota| group.used <= quota);
        Some(Head { is_within_quota, seat, tenant })
    }

    fn update_head(&mut self, tenant: TenantId) {
        let head = self.head_from(tenant, Bound::Unbounded);
        let Some(group) = self.groups.get_mut(usize::from(tenant.0)) else { return };
        let old = std::mem::replace(&mut group.head, head);
        if old != head {
            old.map(|head| self.heads.remove(&head));
            self.heads.extend(head);
        }
    }

    /// A tenant's own next block to leave.
    pub fn first_of(&self, tenant: TenantId) -> Option<Victim> {
        self.head_from(tenant, Bound::Unbounded).map(Head::victim)
    }

    /// Who leaves next, on a walk.
    pub fn next(&mut self, walk: &mut Walk) -> Option<Victim> {
        if self.policy == PolicyKind::S3Fifo {
            return self.next_of_s3(walk);
        }
        loop {
            let from = walk.last.map_or(Bound::Unbounded, Bound::Excluded);
            let head = self.heads.range((from, Bound::Unbounded)).next().copied();
            let Some(resumes) = walk.resumes.first().copied() else {
                return head.map(Head::victim);
            };
            if head.is_some_and(|head| head < resumes) {
                return head.map(Head::victim);
            }
            // The block may have left, or its tenant's quota be kept again.
            let now = self.head_from(resumes.tenant, Bound::Included(resumes.seat));
            if now == Some(resumes) {
                return Some(resumes.victim());
            }
            walk.resumes.remove(&resumes);
            walk.resumes.extend(now);
        }
    }

    /// S3-FIFO begins in the middle of the order, and moves blocks as it looks at them. It looks at all
    /// tenants: it is there to compare with.
    fn next_of_s3(&mut self, walk: &Walk) -> Option<Victim> {
        loop {
            let victim = match walk.last {
                Some(last) => self
                    .heads_from(Bound::Excluded(last.seat))
                    .filter(|head| head.is_within_quota >= last.is_within_quota)
                    .min(),
                None => self.first_of_s3(),
            }?
            .victim();
            let Some(rank) = self.s3.second_chance(victim.id) else { return Some(victim) };
            let old = self.slot(victim.id);
            let rank = if old.is_pinned() { rank.pinned() } else { rank };
            self.replace(victim.id, old, Slot::new(rank, old.tenant, old.residence));
        }
    }

    fn first_of_s3(&self) -> Option<Head> {
        let first = self.heads_from(Bound::Unbounded).min()?;
        if first.seat.rank().is_fading() {
            return Some(first);
        }
        let begin = Bound::Included(Seat::new(self.s3.begin(), EntryId(0)));
        let is_pinned = |head: &Head| head.seat.rank().is_pinned();
        // The queue that it would rather take from may be empty.
        Some(self.heads_from(begin).min().filter(|head| !is_pinned(head)).unwrap_or(first))
    }

    fn heads_from(&self, from: Bound<Seat>) -> impl Iterator<Item = Head> {
        let tenants = (0..self.groups.len()).map(|place| TenantId(place as u16));
        tenants.filter_map(move |tenant| self.head_from(tenant, from))
    }

    /// The victim cannot leave now: the walk goes on after it.
    pub fn pass(&self, walk: &mut Walk, victim: Victim) {
        let head = Head::from(victim);
        walk.resumes.remove(&head);
        walk.resumes.extend(self.head_from(head.tenant, Bound::Excluded(head.seat)));
        walk.last = Some(head);
    }

    /// Panics where the module's invariants do not hold.
    #[cfg(test)]
    pub fn self_check(&self) {
        let mut used = vec![0; self.groups.len()];
        let mut seats = vec![BTreeSet::new(); self.groups.len()];
        let mut pinned = 0;
        for place in 0..self.slots.len() {
            let id = EntryId(place as u32);
            let slot = self.slot(id);
            if slot.is_here() {
                used[usize::from(slot.tenant.0)] += 1;
                seats[usize::from(slot.tenant.0)].extend(slot.seat(id));
                pinned += u64::from(slot.is_pinned());
            }
        }
        assert_eq!(pinned, self.pinned);
        for (place, group) in self.groups.iter().enumerate() {
            assert_eq!((group.used, &group.seats), (used[place], &seats[place]));
            assert_eq!(group.head, self.head_from(TenantId(place as u16), Bound::Unbounded));
        }
        let heads: BTreeSet<Head> = self.groups.iter().filter_map(|group| group.head).collect();
        assert_eq!(heads, self.heads);
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::known;
    use super::*;

    #[test]
    fn first_come_is_first_out_whatever_was_used_since() {
        let mut order = Order::new(PolicyKind::Fifo, Limits::NONE);
        let key = BlockKey([0; 32]);
        for (id, used_ms) in [(1, 10), (2, 20), (1, 30)] {
            order.set(EntryId(id), &key, Some(&known(used_ms)), Residence::Free);
        }
        let first = order.next(&mut Walk::default());
        assert_eq!(first.map(|victim| victim.id), Some(EntryId(1)));
    }
}
