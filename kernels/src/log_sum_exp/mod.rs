//! `ln Σ e^x` of a row of logits: what turns a logit into a log-probability.

mod cpu;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::simd::Class;

/// Largest error against [`reference::log_sum_exp`]: terms err by 2e-7, and so does their sum.
pub const TOLERANCE: f32 = 1.0e-5;

/// The logarithm of the sum; all classes give the same bits. An empty row gives -inf.
///
/// Same as [`reference::log_sum_exp`] within [`TOLERANCE`].
pub fn log_sum_exp(class: Class, logits: &[f32]) -> f32 {
    class.run(cpu::LogSumExp { logits })
}
