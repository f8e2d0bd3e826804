//! First come, first out: the baseline that knows least.

use super::{Known, Rank};

/// In the order of coming; [`super::Order`] asks once, when a block comes into its tier. Of what came at
/// the same millisecond the last block of a chain leaves first.
pub fn rank(known: &Known) -> Rank {
    Rank::new(Rank::CLASS_FIRST, known.used_ms, known.depth)
}

/// Of a block that has a rank already: uses since do not count.
pub fn again(rank: Rank, known: &Known) -> Rank {
    Rank::new(Rank::CLASS_FIRST, rank.order(), known.depth)
}
