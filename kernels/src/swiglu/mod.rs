//! `out = silu(gate) · up`, with `silu(x) = x / (1 + e^-x)`, one row.

mod cpu;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::error::LaunchError;
use crate::simd::{Class, LANES};

/// Largest error against [`reference::swiglu`], relative: a few roundings of f32 and `exp`'s 2e-7.
pub const TOLERANCE: f32 = 1.0e-6;

/// Gates one row; all classes give the same bits.
///
/// Same as [`reference::swiglu`] within [`TOLERANCE`].
pub fn swiglu(
    class: Class,
    gate: &[f32],    // [K]
    up: &[f32],      // [K]
    out: &mut [f32], // [K]
) -> Result<(), LaunchError> {
    LaunchError::check_multiple("gate", LANES, gate.len())?;
    LaunchError::check_equal("up", gate.len(), up.len())?;
    LaunchError::check_equal("out", gate.len(), out.len())?;
    class.run(cpu::SwiGlu { gate, up, out });
    Ok(())
}
