//! Activations to signed bytes, per row, in blocks of 32: `x ≈ scale · q`.
//!
//! Quantising per row keeps a row's bits independent of its neighbours.

mod cpu;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::disjoint::Disjoint;
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

/// Rows that lie interleaved in memory: what one pass over a group's weights serves.
pub const TILE_ROWS: usize = 8;

/// Blocks that `rows` rows of `row_blocks` blocks take, whole tiles.
pub fn tiled_len(rows: usize, row_blocks: usize) -> usize {
    rows.next_multiple_of(TILE_ROWS) * row_blocks
}

/// Where a block of a row lies: `[T / 8, K / 32, 8]`, so that a tile is read with one pointer.
pub fn tiled_index(row: usize, block: usize, row_blocks: usize) -> usize {
    (row / TILE_ROWS * row_blocks + block) * TILE_ROWS + row % TILE_ROWS
}

/// Quantises one row, as row `index` of the tiles.
///
/// Same as [`reference::quantise`], bit for bit.
///
/// # Safety
/// While this runs nobody else touches that row's blocks in `tiles`.
pub unsafe fn quantise(
    class: Class,
    row: &[f32], // [K]
    index: usize,
    tiles: &Disjoint<'_, Block>, // [T / 8, K / 32, 8]
) -> Result<(), LaunchError> {
    LaunchError::check_multiple("row", BLOCK, row.len())?;
    assert!(tiled_len(index + 1, row.len() / BLOCK) <= tiles.len());
    class.run(cpu::Quantise { row, index, tiles });
    Ok(())
}

/// Quantises rows on the calling thread; for tests and small uses.
pub fn quantise_all(
    class: Class,
    rows: &[f32], // [T, K]
    inner: usize,
) -> Result<Vec<Block>, LaunchError> {
    LaunchError::check_multiple("rows", inner, rows.len())?;
    let mut blocks = vec![Block::ZERO; tiled_len(rows.len() / inner, inner / BLOCK)];
    let tiles = Disjoint::new(&mut blocks);
    for (index, row) in rows.chunks_exact(inner).enumerate() {
        // SAFETY: this thread alone knows the buffer.
        unsafe { quantise(class, row, index, &tiles) }?;
    }
    Ok(blocks)
}
