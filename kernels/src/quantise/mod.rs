//! Activations to signed bytes, per row, in blocks of 32: `x ≈ scale · q`.
//!
//! Quantising per row keeps a row's bits independent of its neighbours.

mod cpu;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::error::LaunchError;
use crate::simd::Class;

/// Values a block.
pub const BLOCK: usize = 32;

/// Below this largest magnitude a block counts as all zeros: its inverse scale would overflow.
const SMALLEST: f32 = 1.0e-30;

/// Thirty-two activations, with the sums that the weights' minimum and bias multiply.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(16))]
pub struct Block {
    /// -127 … 127.
    pub values: [i8; BLOCK],
    /// Largest magnitude / 127.
    pub scale: f32,
    /// `scale · sum`, rounded once.
    pub scaled_sum: f32,
    /// Sum of `values`.
    pub sum: i32,
    unused: u32,
}

impl Block {
    /// All zeros.
    pub const ZERO: Self =
        Self { values: [0; BLOCK], scale: 0.0, scaled_sum: 0.0, sum: 0, unused: 0 };
}

/// Quantises one row.
///
/// Same as [`reference::quantise`], bit for bit.
pub fn quantise(
    class: Class,
    row: &[f32],          // [K]
    blocks: &mut [Block], // [K / 32]
) -> Result<(), LaunchError> {
    LaunchError::check_multiple("row", BLOCK, row.len())?;
    LaunchError::check_equal("blocks", row.len() / BLOCK, blocks.len())?;
    class.run(cpu::Quantise { row, blocks });
    Ok(())
}
