//! First come, first out: the baseline that knows least.

use kv_protocol::BlockKey;

use super::{View, first_by};

/// In the order of arrival.
pub fn evict(view: &View, need: usize) -> Vec<BlockKey> {
    first_by(view, need, |resident| resident.arrival)
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{key, resident};
    use super::*;

    #[test]
    fn use_does_not_matter() {
        let residents = vec![resident(2, 10, None), resident(1, 20, None)];
        assert_eq!(evict(&View { residents, ..View::default() }, 1), [key(1)]);
    }
}
