//! Least recently used first: the baseline that most caches have.

use super::{Known, Rank};

/// Oldest use first; of one chain, the last block first.
pub fn rank(known: &Known) -> Rank {
    Rank::new(Rank::CLASS_FIRST, known.used_ms, known.depth)
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{known, queued};
    use super::*;

    #[test]
    fn the_queue_does_not_matter() {
        assert!(rank(&queued(10, 0)) < rank(&known(20)));
    }
}
