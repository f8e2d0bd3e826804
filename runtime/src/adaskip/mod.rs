//! AdaSkip (AAAI'25, arXiv 2501.02336): skip the sublayers that change their input the least.
//!
//! [`importance`] sums what a backend measures, [`policy`] chooses by it, [`presence`] makes the two
//! phases' sets fit one stored layout. All three are pure: the engine runs the calibration text, once,
//! before the server is ready, and asks them.

pub mod importance;
pub mod policy;
pub mod presence;

/// What the prefill and decode sets are learned from, before the server is ready. Part of the binary,
/// so that a restart learns the same sets. Prose, dialogue, code, figures: what conversations hold.
pub const CALIBRATION_TEXT: &str = include_str!("calibration.txt");

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

    /// Transformer layers of the model.
    pub fn layers(&self) -> usize {
        self.attention.len()
    }

    /// Whether sublayer `2 * layer` (attention) or `2 * layer + 1` (FFN) is skipped.
    pub fn skips(&self, sublayer: usize) -> bool {
        if sublayer.is_multiple_of(2) {
            self.attention[sublayer / 2]
        } else {
            self.ffn[sublayer / 2]
        }
    }

    /// The skipped sublayers, ascending.
    pub fn skipped(&self) -> impl Iterator<Item = usize> + '_ {
        (0..2 * self.layers()).filter(|&sublayer| self.skips(sublayer))
    }

    /// Skips one sublayer more, compensated by `scale`.
    pub fn skip(&mut self, sublayer: usize, scale: f32) {
        let layer = sublayer / 2;
        if sublayer.is_multiple_of(2) {
            self.attention[layer] = true;
        } else {
            self.ffn[layer] = true;
        }
        self.scale[sublayer] = scale;
    }
}
