//! The sets of both phases, fitted to one stored layout: which layers' K and V are kept.
//!
//! A skipped attention leaves no K and V. Prefill and decode may skip different attentions, yet each
//! reads what the other wrote, so the stored layers are those whose attention runs in either phase,
//! and a phase that skips one of them still computes its K and V (*backfill*).
//!
//! | reuse | decode reads prefill's KV | the next prefill reads decode's KV |
//! | --- | --- | --- |
//! | `Own` | prefill backfills what decode runs | never: such tokens are new to it (*heal*) |
//! | `Any` | prefill backfills what decode runs | decode backfills what prefill runs |

use std::sync::Arc;

use super::SkipSet;
use super::importance::Means;
use super::policy::{self, Reuse, SkipConfig};

/// The frozen sets of an engine, learned before it is ready. Immutable.
#[derive(Debug, Clone)]
pub struct SkipSets {
    /// What prefill skips.
    pub prefill: Arc<SkipSet>,
    /// What decode skips, before a sequence's extras.
    pub decode: Arc<SkipSet>,
    /// Layers whose K and V are stored, ascending: packed row `r` is layer `present_layers[r]`.
    pub present_layers: Arc<[u16]>,
    /// Whose KV a reader takes.
    pub reuse: Reuse,
    /// How a sequence's extras are found; `None` when it gets none.
    pub extras: Option<ExtrasRule>,
}

/// How a sequence's extras are found.
#[derive(Debug, Clone)]
pub struct ExtrasRule {
    /// The least similarity among the sublayers that decode skips. Set here, once.
    beta: f64,
    /// Decoded tokens to measure.
    pub learn_tokens: u32,
    /// Compensation of each sublayer, from calibration.
    scale: Vec<f64>,
}

impl SkipSets {
    /// Nothing is skipped, all layers are stored.
    pub fn exact(layers: usize) -> Self {
        let none = Arc::new(SkipSet::none(layers));
        Self {
            prefill: none.clone(),
            decode: none,
            present_layers: (0..layers as u16).collect(),
            reuse: Reuse::Own,
            extras: None,
        }
    }

    /// The sets that `config` asks for, by what calibration measured.
    pub fn new(config: &SkipConfig, means: &Means) -> Self {
        let layers = means.similarity.len() / 2;
        let set = |count: usize| {
            let mut set = SkipSet::none(layers);
            for sublayer in policy::choose(means, count) {
                set.skip(sublayer, means.scale[sublayer] as f32);
            }
            set
        };
        let mut prefill = set(config.prefill_sublayers);
        let mut decode = set(config.decode_sublayers);
        for layer in 0..layers {
            prefill.backfill[layer] = prefill.attention[layer] && !decode.attention[layer];
            decode.backfill[layer] =
                config.reuse == Reuse::Any && decode.attention[layer] && !prefill.attention[layer];
        }
        let present_layers = (0..layers)
            .filter(|&layer| !prefill.attention[layer] || !decode.attention[layer])
            .map(|layer| layer as u16)
            .collect();
        let skipped: Vec<usize> = decode.skipped().collect();
        let extras =
            policy::beta(means, &skipped).filter(|_| config.extras).map(|beta| ExtrasRule {
                beta,
                learn_tokens: config.learn_tokens.max(1),
                scale: means.scale.clone(),
            });
        Self {
            prefill: Arc::new(prefill),
            decode: Arc::new(decode),
            present_layers,
            reuse: config.reuse,
            extras,
        }
    }

    /// Whether KV computed in decode is what prefill would have computed.
    pub fn decode_is_own(&self) -> bool {
        self.prefill == self.decode
    }

    /// The decode set of a sequence whose first decoded tokens measured `window`; `None` when no
    /// further FFN qualifies.
    pub fn with_extras(&self, window: &Means) -> Option<Arc<SkipSet>> {
        let rule = self.extras.as_ref()?;
        let extras = policy::extras(window, rule.beta, |sublayer| self.decode.skips(sublayer));
        if extras.is_empty() {
            return None;
        }
        let mut set = SkipSet::clone(&self.decode);
        for sublayer in extras {
            set.skip(sublayer, rule.scale[sublayer] as f32);
        }
        Some(Arc::new(set))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three layers; by similarity: attention 2, FFN 0, attention 1, then the rest.
    fn means() -> Means {
        Means {
            similarity: [0.1, 0.8, 0.7, 0.2, 0.9, 0.3].map(Some).to_vec(),
            scale: vec![1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        }
    }

    fn config(prefill: usize, decode: usize, reuse: Reuse) -> SkipConfig {
        SkipConfig {
            prefill_sublayers: prefill,
            decode_sublayers: decode,
            reuse,
            extras: true,
            ..SkipConfig::OFF
        }
    }

    #[test]
    fn a_layer_is_stored_when_either_phase_runs_its_attention() {
        let sets = SkipSets::new(&config(1, 3, Reuse::Own), &means());
        assert_eq!(sets.prefill.attention, [false, false, true]);
        assert_eq!(sets.decode.attention, [false, true, true]);
        assert_eq!(*sets.present_layers, [0, 1]);
    }

    #[test]
    fn prefill_backfills_what_decode_runs() {
        let sets = SkipSets::new(&config(3, 0, Reuse::Own), &means());
        assert_eq!(sets.prefill.backfill, [false, true, true]);
        assert_eq!(*sets.present_layers, [0, 1, 2]);
    }

    #[test]
    fn decode_backfills_only_for_readers_that_take_its_kv() {
        assert_eq!(
            SkipSets::new(&config(0, 3, Reuse::Any), &means()).decode.backfill,
            [false, true, true]
        );
        assert_eq!(
            SkipSets::new(&config(0, 3, Reuse::Own), &means()).decode.backfill,
            [false, false, false]
        );
    }

    #[test]
    fn equal_counts_give_one_set_and_nothing_to_heal() {
        assert!(SkipSets::new(&config(2, 2, Reuse::Own), &means()).decode_is_own());
        assert!(!SkipSets::new(&config(2, 3, Reuse::Own), &means()).decode_is_own());
    }

    #[test]
    fn skipped_sublayers_are_compensated_by_their_own_scale() {
        let sets = SkipSets::new(&config(2, 0, Reuse::Own), &means());
        let bits = |sublayer: usize| sets.prefill.scale[sublayer].to_bits();
        assert_eq!(bits(4), 1.4_f32.to_bits());
        assert_eq!(bits(1), 1.1_f32.to_bits());
        assert_eq!(bits(0), 1.0_f32.to_bits(), "what runs is not scaled");
    }

    #[test]
    fn a_later_request_gets_extras_as_the_first_did() {
        // The official code resets its threshold in every prefill, so that from the 21st request on no
        // extra FFN is ever found.
        let sets = SkipSets::new(&config(0, 2, Reuse::Own), &means());
        let window = Means { similarity: vec![Some(0.99); 6], scale: vec![1.0; 6] };
        let mut earlier = None;
        for _request in 0..40 {
            let set = sets.with_extras(&window).expect("every FFN is above beta");
            assert_eq!(set.ffn, [true, true, true]);
            assert_eq!(set.attention, sets.decode.attention);
            assert_eq!(set.scale[3].to_bits(), 1.3_f32.to_bits());
            assert_eq!(*earlier.get_or_insert_with(|| set.clone()), set);
        }
    }

    #[test]
    fn without_a_skipped_sublayer_there_is_no_threshold_and_no_extra() {
        let sets = SkipSets::new(&config(3, 0, Reuse::Own), &means());
        assert!(sets.extras.is_none());
    }
}
