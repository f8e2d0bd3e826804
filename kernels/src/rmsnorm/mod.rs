//! `out = x / √(mean(x²) + epsilon) · weight`, one row.
//!
//! The sum of squares runs in sixteen lanes and ends in the fixed tree of [`crate::simd`].

mod cpu;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::error::LaunchError;
use crate::simd::{Class, LANES};

/// Normalises one row.
///
/// Same as [`reference::rmsnorm`], bit for bit.
pub fn rmsnorm(
    class: Class,
    x: &[f32],      // [K]
    weight: &[f32], // [K]
    epsilon: f32,
    out: &mut [f32], // [K]
) -> Result<(), LaunchError> {
    LaunchError::check_multiple("x", LANES, x.len())?;
    LaunchError::check_equal("weight", x.len(), weight.len())?;
    LaunchError::check_equal("out", x.len(), out.len())?;
    class.run(cpu::RmsNorm { x, weight, epsilon, out });
    Ok(())
}
