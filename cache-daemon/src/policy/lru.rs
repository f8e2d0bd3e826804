//! Least recently used first: the baseline that most caches have.

use kv_protocol::BlockKey;

use super::{View, first_by};

/// Oldest use first; of one chain, the last block first.
pub fn evict(view: &View, need: usize) -> Vec<BlockKey> {
    first_by(view, need, |resident| (resident.used_ms, std::cmp::Reverse(resident.depth)))
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{key, resident};
    use super::*;

    #[test]
    fn the_queue_does_not_matter() {
        let residents = vec![resident(1, 10, Some(0)), resident(2, 20, None)];
        assert_eq!(evict(&View { residents, ..View::default() }, 1), [key(1)]);
    }
}
