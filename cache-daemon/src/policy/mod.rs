//! Which block leaves a tier next, and which comes: pure functions, no clock, no I/O.
//!
//! A policy maps what is [`Known`] of a block to a [`Rank`]; the smallest rank leaves first. [`Order`]
//! keeps a tier's blocks by rank, so that a choice costs the logarithm of their number: a rank changes only
//! when something that is known of its block does (`docs/adr/0010-policies-as-ranks.md`).
//!
//! [`lookahead`] is CachedAttention's (ATC'24, 3.3.1 and 3.3.2); [`lru`], [`fifo`] and [`s3fifo`] are there to
//! compare with: they see no queue, and promote only what a lookup asks for.

pub mod budget;
pub mod fifo;
pub mod index;
pub mod lookahead;
pub mod lru;
pub mod order;
pub mod retention;
pub mod s3fifo;

use std::cmp::Reverse;

pub use index::{Index, Promote, Residence, Standing};
pub use order::{Limits, Order, Victim, Walk};

/// When a waiting turn starts, relative to the others: the smallest starts first. Absolute, not a place: a
/// turn keeps its ticket when those before it leave the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueTicket(pub u64);

impl QueueTicket {
    /// From here on turns that are foretold but not queued: no queue ever counts so far.
    const ANTICIPATED: u64 = 1 << 60;

    /// From here on turns that nobody told of.
    const FORETOLD: u64 = Self::ANTICIPATED + (1 << 59);

    /// Of the `nth` anticipation: after every queued turn and after the anticipations before it.
    pub fn anticipated(nth: u64) -> Self {
        Self(Self::ANTICIPATED + nth)
    }

    /// Of a turn that only its conversation's pauses foretell, for this time: after all others, the soonest
    /// first.
    pub fn foretold(returns_ms: u64) -> Self {
        Self(Self::FORETOLD + returns_ms)
    }

    /// Whether the turn is not in the queue yet.
    pub fn is_anticipated(self) -> bool {
        self.0 >= Self::ANTICIPATED
    }
}

const _: () = assert!(
    QueueTicket::FORETOLD < Rank::ORDER_MAX / 8 * 7,
    "anticipations have ranks of their own"
);

/// Whose blocks, for quotas: model and tenant have one root, and a root has one of these while there are blocks
/// of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TenantId(pub u16);

impl TenantId {
    /// All tenants beyond the first 65,535 that have blocks at once: they share one quota.
    pub const CROWD: Self = Self(u16::MAX);
}

/// What was said of a block beside its use ([`retention`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keep {
    /// Most of its own time to live has passed without a use: it leaves first.
    Fading,
    /// Nothing.
    #[default]
    Ordinary,
    /// It leaves last.
    Pinned,
}

/// What is known of a block: all that a rank may depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// Last commit, lookup or promote; milliseconds.
    pub used_ms: u64,
    /// Blocks before it in its chain. Later blocks go first: a chain is useful up to its first gap.
    pub depth: u32,
    /// First queued turn that will read it.
    pub turn: Option<QueueTicket>,
    /// Whose it is.
    pub tenant: TenantId,
    /// Whether it was pinned, or is about to expire.
    pub keep: Keep,
}

/// A block's place in the order of leaving: the smallest leaves first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// Class in the upper three bits, order below: a rank is kept for each block of a tier.
    class_and_order: u64,
    from_end: Reverse<u32>,
}

impl Rank {
    /// Largest order inside a class; a larger one counts as this.
    pub const ORDER_MAX: u64 = (1 << 61) - 1;
    /// The lowest class that a policy gives: what fades is below it.
    pub const CLASS_FIRST: u8 = 1;
    /// The highest class that a policy gives: what is pinned is above it.
    pub const CLASS_LAST: u8 = 3;
    const PINNED: u64 = 1 << 63;

    /// All of a class leave before the next class; inside it, by `order`; of one chain, the last block
    /// first.
    pub fn new(class: u8, order: u64, depth: u32) -> Self {
        assert!(class >= Self::CLASS_FIRST, "what fades is below all classes");
        assert!(class <= Self::CLASS_LAST, "classes have two bits");
        let class_and_order = u64::from(class) << 61 | order.min(Self::ORDER_MAX);
        Self { class_and_order, from_end: Reverse(depth) }
    }

    /// After all that is not pinned.
    #[must_use]
    pub fn pinned(self) -> Self {
        Self { class_and_order: self.class_and_order | Self::PINNED, ..self }
    }

    /// Before all that does not fade.
    #[must_use]
    pub fn fading(self) -> Self {
        Self { class_and_order: self.order(), ..self }
    }

    fn is_pinned(self) -> bool {
        self.class_and_order & Self::PINNED != 0
    }

    fn is_fading(self) -> bool {
        self.class_and_order <= Self::ORDER_MAX
    }

    fn order(self) -> u64 {
        self.class_and_order & Self::ORDER_MAX
    }
}

/// Names of the policies.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    clap::ValueEnum,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyKind {
    /// By what the queue says.
    #[default]
    LookAhead,
    /// Least recently used first.
    Lru,
    /// First come, first out.
    Fifo,
    /// Three queues: newcomers must be used again to stay.
    #[value(name = "s3-fifo")]
    S3Fifo,
}

#[cfg(test)]
pub(crate) mod fixtures {
    use super::*;

    /// A block that no turn needs.
    pub(crate) fn known(used_ms: u64) -> Known {
        Known { used_ms, depth: 0, turn: None, tenant: TenantId(0), keep: Keep::Ordinary }
    }

    /// A block that a turn needs.
    pub(crate) fn queued(used_ms: u64, ticket: u64) -> Known {
        Known { turn: Some(QueueTicket(ticket)), ..known(used_ms) }
    }
}
