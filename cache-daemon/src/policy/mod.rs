//! Which block leaves a tier next, and which comes: pure functions, no clock, no I/O.
//!
//! A policy maps what is [`Known`] of a block to a [`Rank`]; the smallest rank leaves first. [`Order`]
//! keeps a tier's blocks by rank, so that a choice costs the logarithm of their number: a rank changes only
//! when something that is known of its block does (`docs/adr/0010-policies-as-ranks.md`).
//!
//! [`lookahead`] is CachedAttention's (ATC'24, 3.3.1 and 3.3.2); [`lru`], [`fifo`] and [`s3fifo`] are there to
//! compare with: they see no queue, and promote only what a lookup asks for.

pub mod fifo;
pub mod index;
pub mod lookahead;
pub mod lru;
pub mod order;
pub mod s3fifo;

use std::cmp::Reverse;

pub use index::{Index, Promote, Residence, Standing};
pub use order::{Order, Victim};

/// When a waiting turn starts, relative to the others: the smallest starts first. Absolute, not a place: a
/// turn keeps its ticket when those before it leave the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueTicket(pub u64);

impl QueueTicket {
    /// From here on turns that are foretold but not queued: no queue ever counts so far.
    const ANTICIPATED: u64 = 1 << 60;

    /// Of the `nth` anticipation: after every queued turn and after the anticipations before it.
    pub fn anticipated(nth: u64) -> Self {
        Self(Self::ANTICIPATED + nth)
    }

    /// Whether the turn is not in the queue yet.
    pub fn is_anticipated(self) -> bool {
        self.0 >= Self::ANTICIPATED
    }
}

const _: () =
    assert!(QueueTicket::ANTICIPATED < Rank::ORDER_MAX, "anticipations have ranks of their own");

/// What is known of a block: all that a rank may depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// Last commit, lookup or promote; milliseconds.
    pub used_ms: u64,
    /// Blocks before it in its chain. Later blocks go first: a chain is useful up to its first gap.
    pub depth: u32,
    /// First queued turn that will read it.
    pub turn: Option<QueueTicket>,
    /// When its conversation is expected to ask again, if that can be foretold; milliseconds.
    pub returns_ms: Option<u64>,
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
    /// Largest class.
    pub const CLASS_MAX: u8 = 7;

    /// All of a class leave before the next class; inside it, by `order`; of one chain, the last block
    /// first.
    pub fn new(class: u8, order: u64, depth: u32) -> Self {
        assert!(class <= Self::CLASS_MAX, "classes have three bits");
        let class_and_order = u64::from(class) << 61 | order.min(Self::ORDER_MAX);
        Self { class_and_order, from_end: Reverse(depth) }
    }
}

/// Names of the policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
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
        Known { used_ms, depth: 0, turn: None, returns_ms: None }
    }

    /// A block that a turn needs.
    pub(crate) fn queued(used_ms: u64, ticket: u64) -> Known {
        Known { turn: Some(QueueTicket(ticket)), ..known(used_ms) }
    }
}
