//! The label of a block's KV: which sublayers were skipped when it, and all before it, were computed.

use kv_protocol::Variant;

use crate::adaskip::SkipSet;

/// The variant of KV computed under `set` alone. Backfilled layers do not enter: which layers a block
/// holds is part of its geometry, and what they hold depends on the skipped sublayers only.
pub fn of(set: &SkipSet) -> Variant {
    if set.is_none() {
        return Variant::Exact;
    }
    let mut description = Vec::new();
    description.extend_from_slice(&(set.layers() as u32).to_le_bytes());
    for sublayer in set.skipped() {
        description.extend_from_slice(&(sublayer as u32).to_le_bytes());
        description.extend_from_slice(&set.scale[sublayer].to_bits().to_le_bytes());
    }
    Variant::skip(&description)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(sublayers: &[usize], scale: f32) -> SkipSet {
        let mut set = SkipSet::none(4);
        for &sublayer in sublayers {
            set.skip(sublayer, scale);
        }
        set
    }

    #[test]
    fn a_set_that_skips_nothing_is_exact_whatever_its_scales() {
        let mut none = SkipSet::none(4);
        none.scale[2] = 3.0;
        assert_eq!(of(&none), Variant::Exact);
    }

    #[test]
    fn another_sublayer_or_another_scale_is_another_variant() {
        assert_eq!(of(&set(&[1, 4], 1.1)), of(&set(&[1, 4], 1.1)));
        assert_ne!(of(&set(&[1, 4], 1.1)), of(&set(&[1, 5], 1.1)));
        assert_ne!(of(&set(&[1, 4], 1.1)), of(&set(&[1, 4], 1.2)));
        assert_ne!(of(&set(&[1], 1.1)), Variant::Exact);
    }

    #[test]
    fn backfill_does_not_change_what_a_block_holds() {
        let mut backfilled = set(&[4], 1.1);
        backfilled.backfill[2] = true;
        assert_eq!(of(&backfilled), of(&set(&[4], 1.1)));
    }
}
