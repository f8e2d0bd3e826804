//! From logits to a token. Pure: the same logits, settings, seed and index give the same token,
//! whatever the batch, the machine or the time.
//!
//! Order of the filters: banned tokens, temperature, `min_p`, `top_k`, `top_p`.

use kernels::Class;
use kernels::log_sum_exp::log_sum_exp;

use crate::batch::{Sampling, TokenLogprob};

/// Tokens less likely than the likeliest by this factor (e^-30) are never drawn: all of a large
/// vocabulary's together weigh less than one part in a million, and sorting them would take longer
/// than the model.
const DRAWN_LOGIT_RANGE: f32 = 30.0;

/// What was drawn, and the likeliest alternatives if they were asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token, with its log-probability before temperature and filters.
    pub token: TokenLogprob,
    /// Likeliest first.
    pub alternatives: Vec<TokenLogprob>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    /// Relative to the likeliest, over temperature.
    score: f32,
}

/// Draws one token. `logits` is not empty.
pub fn sample(logits: &[f32], sampling: &Sampling) -> Sampled {
    assert!(!logits.is_empty());
    let normaliser = log_sum_exp(Class::detect(), logits);
    let named = |token: u32| TokenLogprob { token, logprob: logits[token as usize] - normaliser };
    let best = likeliest(logits, &sampling.banned);
    let token = if sampling.temperature > 0.0 { draw(logits, best, sampling) } else { best };
    let alternatives = sampling.logprobs.map_or_else(Vec::new, |count| {
        top(logits, usize::from(count)).into_iter().map(named).collect()
    });
    Sampled { token: named(token), alternatives }
}

/// NaN counts as never: a broken model must not break the order.
fn rank(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit }
}

/// The likeliest token that is not banned; of equals the lowest id.
fn likeliest(logits: &[f32], banned: &[u32]) -> u32 {
    let mut best: Option<(u32, f32)> = None;
    for (token, &logit) in (0_u32..).zip(logits) {
        let better = best.is_none_or(|(_, most)| rank(logit) > most);
        if better && !banned.contains(&token) {
            best = Some((token, rank(logit)));
        }
    }
    best.map_or(0, |(token, _)| token) // All banned: the request contradicts itself.
}

fn top(logits: &[f32], count: usize) -> Vec<u32> {
    let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
    let order = |a: &u32, b: &u32| {
        rank(logits[*b as usize]).total_cmp(&rank(logits[*a as usize])).then(a.cmp(b))
    };
    let count = count.min(tokens.len());
    if count < tokens.len() {
        tokens.select_nth_unstable_by(count, order);
        tokens.truncate(count);
    }
    tokens.sort_unstable_by(order);
    tokens
}

fn draw(logits: &[f32], best: u32, sampling: &Sampling) -> u32 {
    let most = rank(logits[best as usize]);
    let lowest = if sampling.min_p > 0.0 {
        libm::logf(sampling.min_p.min(1.0)).max(-DRAWN_LOGIT_RANGE)
    } else {
        -DRAWN_LOGIT_RANGE
    };
    let mut candidates: Vec<Candidate> = (0_u32..)
        .zip(logits)
        .map(|(token, &logit)| Candidate {
            token,
            score: (rank(logit) - most) / sampling.temperature,
        })
        .filter(|candidate| {
            candidate.score >= lowest && !sampling.banned.contains(&candidate.token)
        })
        .collect();
    candidates.sort_unstable_by(|a, b| b.score.total_cmp(&a.score).then(a.token.cmp(&b.token)));
    if sampling.top_k > 0 {
        candidates.truncate(sampling.top_k as usize);
    }
    let weights: Vec<f64> =
        candidates.iter().map(|candidate| libm::exp(f64::from(candidate.score))).collect();
    let total: f64 = weights.iter().sum();
    let kept = kept_by_top_p(&weights, total, sampling.top_p);
    let kept_total: f64 = weights[..kept].iter().sum();
    let mut left = uniform(sampling.seed, sampling.index) * kept_total;
    for (candidate, weight) in candidates[..kept].iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return candidate.token;
        }
    }
    // Rounding used up the last weight, or every logit was NaN.
    candidates[..kept].last().map_or(best, |candidate| candidate.token)
}

/// How many of the sorted weights reach the share `top_p`.
fn kept_by_top_p(weights: &[f64], total: f64, top_p: f32) -> usize {
    if top_p >= 1.0 {
        return weights.len();
    }
    let mut sum = 0.0;
    let reached = weights.iter().position(|weight| {
        sum += weight;
        sum >= f64::from(top_p) * total
    });
    reached.map_or(weights.len(), |index| index + 1)
}

/// In 0 … 1, a function of seed and index alone (SplitMix64's finaliser, twice).
fn uniform(seed: u64, index: u32) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let golden = 0x9E37_79B9_7F4A_7C15_u64;
    let bits = mix(mix(seed.wrapping_add(golden)) ^ golden.wrapping_mul(u64::from(index) + 1));
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::{Sampled, sample};
    use crate::batch::Sampling;
    use std::sync::Arc;

    const LOGITS: [f32; 6] = [1.0, 3.0, 2.0, -1.0, 3.0, 0.0];

    fn sampling() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 7,
            index: 0,
            logprobs: None,
            banned: Arc::new([]),
        }
    }

    /// How often each token is drawn in 20,000 draws of consecutive indices.
    fn shares(sampling: &Sampling) -> [f64; 6] {
        let mut counts = [0.0; 6];
        for index in 0..20_000 {
            let Sampled { token, .. } = sample(&LOGITS, &Sampling { index, ..sampling.clone() });
            counts[token.token as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_likeliest_and_of_equals_the_first() {
        let greedy = Sampling { temperature: 0.0, ..sampling() };
        assert_eq!(sample(&LOGITS, &greedy).token.token, 1);
        let banned = Sampling { banned: Arc::new([1, 4]), ..greedy };
        assert_eq!(sample(&LOGITS, &banned).token.token, 2);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let total: f64 = LOGITS.iter().map(|&x| f64::from(x).exp()).sum();
        for (share, logit) in shares(&sampling()).iter().zip(LOGITS) {
            assert!((share - f64::from(logit).exp() / total).abs() < 0.015);
        }
    }

    #[test]
    fn filters_leave_only_what_they_allow() {
        let drawn = |sampling: Sampling| shares(&sampling).map(|share| share > 0.0);
        let only_top = [false, true, false, false, true, false];
        assert_eq!(drawn(Sampling { top_k: 2, ..sampling() }), only_top);
        assert_eq!(drawn(Sampling { top_p: 0.7, ..sampling() }), only_top);
        assert_eq!(drawn(Sampling { min_p: 0.9, ..sampling() }), only_top);
        assert_eq!(drawn(Sampling { temperature: 0.01, ..sampling() }), only_top);
        let first = [false, true, false, false, false, false];
        assert_eq!(drawn(Sampling { top_k: 1, ..sampling() }), first);
        assert_eq!(drawn(Sampling { banned: Arc::new([4]), top_k: 1, ..sampling() }), first);
    }

    #[test]
    fn the_same_seed_and_index_draw_the_same_token() {
        for index in 0..50 {
            let sampling = Sampling { index, ..sampling() };
            assert_eq!(sample(&LOGITS, &sampling), sample(&LOGITS, &sampling));
        }
    }

    #[test]
    fn log_probabilities_are_of_the_unfiltered_distribution() {
        let sampling = Sampling { logprobs: Some(2), top_k: 1, temperature: 0.3, ..sampling() };
        let sampled = sample(&LOGITS, &sampling);
        let total: f64 = LOGITS.iter().map(|&x| f64::from(x).exp()).sum();
        assert!((f64::from(sampled.token.logprob) - (3.0 - total.ln())).abs() < 1.0e-5);
        let tokens: Vec<u32> = sampled.alternatives.iter().map(|a| a.token).collect();
        assert_eq!(tokens, [1, 4]);
    }

    #[test]
    fn broken_logits_do_not_panic() {
        for logits in [[f32::NAN; 6], [f32::INFINITY; 6], [f32::NEG_INFINITY; 6]] {
            for temperature in [0.0, 1.0] {
                sample(&logits, &Sampling { temperature, logprobs: Some(3), ..sampling() });
            }
        }
    }
}
