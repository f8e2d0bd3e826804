//! AdaSkip (AAAI'25): skip the sublayers that change their input the least (papers.md, part 2).

/// Sublayers that do not run, fixed for a row. Immutable; shared by `Arc`.
///
/// A skipped sublayer's output is `scale · input` instead of `input + f(input)` (formula 4).
#[derive(Debug, Clone, PartialEq)]
pub struct SkipSet {
    /// `attention[layer]`: the layer's attention is skipped.
    pub attention: Vec<bool>,
    /// `ffn[layer]`: the layer's FFN is skipped.
    pub ffn: Vec<bool>,
    /// Compensation, `[2 * layer]` attention, `[2 * layer + 1]` FFN; read for skipped sublayers only.
    pub scale: Vec<f32>,
    /// `backfill[layer]`: the attention is skipped but its K and V are still computed and stored,
    /// because the other phase runs it. Implies `attention[layer]`.
    pub backfill: Vec<bool>,
}

impl SkipSet {
    /// The set that skips nothing: variant `exact`.
    pub fn none(layers: usize) -> Self {
        Self {
            attention: vec![false; layers],
            ffn: vec![false; layers],
            scale: vec![1.0; 2 * layers],
            backfill: vec![false; layers],
        }
    }

    /// Whether nothing is skipped.
    pub fn is_none(&self) -> bool {
        !self.attention.iter().chain(&self.ffn).any(|&skipped| skipped)
    }
}
