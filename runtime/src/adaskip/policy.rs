//! Which sublayers to skip: the count, the one ranking, and a sequence's extras in decode.
//!
//! Where the paper and its official code differ, the paper is followed; its bug, a
//! threshold that every prefill resets so that no later request gets extras, cannot happen here: beta
//! is a value of the frozen set, not a state.

use super::importance::Means;

/// AdaSkip's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SkipConfig {
    /// Sublayers skipped in prefill.
    pub prefill_sublayers: usize,
    /// Sublayers skipped in decode.
    pub decode_sublayers: usize,
    /// Decoded tokens over which a sequence's extras are learned (the paper's P).
    pub learn_tokens: u32,
    /// Whether a sequence may skip further FFNs in decode.
    pub extras: bool,
    /// Whose KV a reader takes.
    pub reuse: Reuse,
}

impl SkipConfig {
    /// Nothing is skipped.
    pub const OFF: Self = Self {
        prefill_sublayers: 0,
        decode_sublayers: 0,
        learn_tokens: 20,
        extras: false,
        reuse: Reuse::Own,
    };

    /// Whether any set has to be learned.
    pub fn is_off(&self) -> bool {
        self.prefill_sublayers == 0 && self.decode_sublayers == 0
    }
}

/// Whose KV a reader takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reuse {
    /// Only what was computed as the reader itself would compute it; the rest is computed anew.
    #[default]
    Own,
    /// Whatever holds the layers that the reader runs.
    Any,
}

/// Sublayers to skip for a target acceleration: `m = M - M / alpha`, and the top `2m` of `2M`.
pub fn sublayers_for(layers: usize, alpha: f64) -> usize {
    let skipped_layers = layers as f64 - layers as f64 / alpha.max(1.0);
    (2.0 * skipped_layers).round() as usize
}

/// Sublayers by similarity, the most similar first: attention and FFN in one ranking. Ties fall to the
/// earlier sublayer, so that equal measurements give equal sets.
pub fn ranking(means: &Means) -> Vec<usize> {
    let mut ranked: Vec<(usize, f64)> = means
        .similarity
        .iter()
        .enumerate()
        .filter_map(|(sublayer, similarity)| similarity.map(|similarity| (sublayer, similarity)))
        .collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    ranked.into_iter().map(|(sublayer, _)| sublayer).collect()
}

/// The `count` most similar sublayers, ascending.
pub fn choose(means: &Means, count: usize) -> Vec<usize> {
    let mut chosen = ranking(means);
    chosen.truncate(count);
    chosen.sort_unstable();
    chosen
}

/// `beta = min{Sim_j : j skipped}`; `None` when nothing is skipped.
pub fn beta(means: &Means, skipped: &[usize]) -> Option<f64> {
    skipped.iter().filter_map(|&sublayer| means.similarity[sublayer]).min_by(f64::total_cmp)
}

/// Formula 5: FFNs not skipped so far whose mean similarity over a sequence's first P decoded tokens
/// exceeds `beta`. Strictly, as in the paper; the official code takes equal ones too.
pub fn extras(window: &Means, beta: f64, skipped: impl Fn(usize) -> bool) -> Vec<usize> {
    (1..window.similarity.len())
        .step_by(2)
        .filter(|&ffn| !skipped(ffn))
        .filter(|&ffn| window.similarity[ffn].is_some_and(|similarity| similarity > beta))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn means(similarity: &[f64]) -> Means {
        Means {
            similarity: similarity.iter().copied().map(Some).collect(),
            scale: vec![1.0; similarity.len()],
        }
    }

    #[test]
    fn the_papers_accelerations_give_its_counts() {
        assert_eq!(sublayers_for(32, 1.14), 8);
        assert_eq!(sublayers_for(32, 4.0 / 3.0), 16);
        assert_eq!(sublayers_for(32, 1.0), 0);
    }

    #[test]
    fn attention_and_ffn_stand_in_one_ranking() {
        // Layer 0: attention 0.9, FFN 0.5; layer 1: attention 0.7, FFN 0.8.
        let means = means(&[0.9, 0.5, 0.7, 0.8]);
        assert_eq!(ranking(&means), [0, 3, 2, 1]);
        assert_eq!(choose(&means, 2), [0, 3]);
    }

    #[test]
    fn equal_similarities_fall_to_the_earlier_sublayer() {
        assert_eq!(choose(&means(&[0.5, 0.5, 0.5, 0.5]), 2), [0, 1]);
    }

    #[test]
    fn a_sublayer_that_was_never_measured_is_never_chosen() {
        let mut means = means(&[0.1, 0.2, 0.3, 0.4]);
        means.similarity[3] = None;
        assert_eq!(choose(&means, 4), [0, 1, 2]);
    }

    #[test]
    fn beta_is_the_least_similarity_that_is_skipped() {
        let means = means(&[0.9, 0.5, 0.7, 0.8]);
        assert_eq!(beta(&means, &[0, 3]), Some(0.8));
        assert_eq!(beta(&means, &[]), None);
    }

    #[test]
    fn extras_are_ffns_above_beta_that_still_run() {
        let window = means(&[0.99, 0.95, 0.99, 0.8, 0.99, 0.9]);
        // FFN 1 is above beta, FFN 3 equal (not above), FFN 5 above but skipped already.
        assert_eq!(extras(&window, 0.8, |sublayer| sublayer == 5), [1]);
    }
}
