//! How much each sublayer changes its input: formulas 1 to 3 of AdaSkip (arXiv 2501.02336).
//!
//! A backend returns sums over the tokens of a row; here they are added up, and become means that are
//! weighted by tokens, as in the paper (the official code averages per request).

use crate::batch::Importance;

/// Sums over all rows measured so far.
#[derive(Debug, Clone, PartialEq)]
pub struct ImportanceSum {
    sum: Importance,
}

/// Means of each sublayer: `[2 * layer]` attention, `[2 * layer + 1]` FFN.
#[derive(Debug, Clone, PartialEq)]
pub struct Means {
    /// `Sim_j`: cos(input, output); `None` for a sublayer that never ran.
    pub similarity: Vec<Option<f64>>,
    /// `Scale_j`: ‖output‖ / ‖input‖; 1 for a sublayer that never ran.
    pub scale: Vec<f64>,
}

impl ImportanceSum {
    /// Nothing measured.
    pub fn new(layers: usize) -> Self {
        Self {
            sum: Importance {
                similarity_sum: vec![0.0; 2 * layers],
                scale_sum: vec![0.0; 2 * layers],
                tokens: vec![0; 2 * layers],
            },
        }
    }

    /// Adds one row's sums.
    pub fn add(&mut self, row: &Importance) {
        assert_eq!(row.tokens.len(), self.sum.tokens.len(), "importance of another model");
        for sublayer in 0..row.tokens.len() {
            self.sum.similarity_sum[sublayer] += row.similarity_sum[sublayer];
            self.sum.scale_sum[sublayer] += row.scale_sum[sublayer];
            self.sum.tokens[sublayer] += row.tokens[sublayer];
        }
    }

    /// Means over all tokens. A sublayer whose sums are not finite counts as one that never ran: it
    /// is then never chosen.
    pub fn means(&self) -> Means {
        let mean = |sum: f64, tokens: u64| {
            (sum / tokens as f64).is_finite().then_some(sum / tokens as f64)
        };
        let of = |sums: &[f64]| -> Vec<Option<f64>> {
            sums.iter().zip(&self.sum.tokens).map(|(&sum, &tokens)| mean(sum, tokens)).collect()
        };
        Means {
            similarity: of(&self.sum.similarity_sum),
            scale: of(&self.sum.scale_sum).into_iter().map(|scale| scale.unwrap_or(1.0)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_weighted_by_tokens_not_by_rows() {
        let mut sum = ImportanceSum::new(1);
        let row = |similarity: f64, tokens: u64| Importance {
            similarity_sum: vec![similarity * tokens as f64, 0.0],
            scale_sum: vec![2.0 * tokens as f64, 0.0],
            tokens: vec![tokens, 0],
        };
        sum.add(&row(1.0, 30));
        sum.add(&row(0.5, 10));
        let means = sum.means();
        assert_eq!(means.similarity, [Some(0.875), None]);
        assert_eq!(means.scale, [2.0, 1.0]);
    }

    #[test]
    fn a_sum_that_is_not_finite_is_never_measured() {
        let mut sum = ImportanceSum::new(1);
        sum.add(&Importance {
            similarity_sum: vec![f64::NAN, 1.0],
            scale_sum: vec![f64::INFINITY, 1.0],
            tokens: vec![1, 1],
        });
        let means = sum.means();
        assert_eq!(means.similarity, [None, Some(1.0)]);
        assert_eq!(means.scale, [1.0, 1.0]);
    }
}
