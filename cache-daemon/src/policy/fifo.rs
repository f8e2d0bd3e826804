//! First come, first out: the baseline that knows least.

use super::{Known, Rank};

/// In the order of arrival.
pub fn rank(known: &Known) -> Rank {
    Rank::new(0, known.arrival, known.depth)
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::known;
    use super::*;

    #[test]
    fn use_does_not_matter() {
        let (early, late) = (Known { arrival: 1, ..known(20) }, Known { arrival: 2, ..known(10) });
        assert!(rank(&early) < rank(&late));
    }
}
