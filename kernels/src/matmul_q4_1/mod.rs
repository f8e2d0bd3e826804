//! Weights of four bits, blocks of 32: `w = scale · q + minimum`, with q in 0 … 15 (GGUF Q4_1).
//!
//! For a block of weights and a block of activations `x = xs · p`:
//! `Σ w x = scale · xs · Σ q p + minimum · xs · Σ p`. The sum of products is exact in integers; the
//! activations carry `xs · Σ p` (`scaled_sum`).

mod cpu;
pub mod reference;
#[cfg(test)]
mod tests;

use half::f16;

use crate::error::LaunchError;
use crate::matmul::Line;
use crate::quantise::BLOCK;
use crate::simd::LANES;

/// Bytes of a block in a GGUF file: scale and minimum as f16, sixteen bytes of nibbles.
pub const FILE_BLOCK_BYTES: usize = 20;
/// Bytes of a Q4_0 block: no minimum.
pub const FILE_BLOCK_BYTES_Q4_0: usize = 18;
/// Lines of packed nibbles a block of one group.
const LINES: usize = 4;

/// Packed weights.
///
/// Line `l` of a block holds, for lane (column) `c`, file bytes `4 l … 4 l + 3` of that column's
/// block: low nibbles are values `4 l …`, high nibbles values `16 + 4 l …`.
#[derive(Debug)]
pub struct MatrixQ4_1 {
    columns: usize,
    inner: usize,
    scales: Vec<Line<[[u16; LANES]; 2]>>, // [groups, K / 32, scale|minimum, 16] f16
    quants: Vec<[Line<[u8; 64]>; LINES]>, // [groups, K / 32, 4, 16, 4]
}

impl MatrixQ4_1 {
    /// Packs Q4_1 blocks; output column `c` comes from row `source(c)` of the file's matrix.
    pub fn pack(
        columns: usize,
        inner: usize,
        file: &[u8], // [N, K / 32] blocks of 20 bytes
        source: impl Fn(usize) -> usize,
    ) -> Result<Self, LaunchError> {
        Self::pack_blocks::<FILE_BLOCK_BYTES>(columns, inner, file, source, |block| {
            let scale = u16::from_le_bytes([block[0], block[1]]);
            let minimum = u16::from_le_bytes([block[2], block[3]]);
            (scale, minimum, 4)
        })
    }

    /// Packs Q4_0 blocks, `w = scale · (q - 8)`: a minimum of `-8 · scale`, exact in f16 unless it
    /// overflows, which no real weight does.
    pub fn pack_q4_0(
        columns: usize,
        inner: usize,
        file: &[u8], // [N, K / 32] blocks of 18 bytes
        source: impl Fn(usize) -> usize,
    ) -> Result<Self, LaunchError> {
        Self::pack_blocks::<FILE_BLOCK_BYTES_Q4_0>(columns, inner, file, source, |block| {
            let scale = f16::from_le_bytes([block[0], block[1]]);
            (scale.to_bits(), f16::from_f32(-8.0 * scale.to_f32()).to_bits(), 2)
        })
    }

    fn pack_blocks<const BYTES: usize>(
        columns: usize,
        inner: usize,
        file: &[u8],
        source: impl Fn(usize) -> usize,
        read: impl Fn(&[u8; BYTES]) -> (u16, u16, usize),
    ) -> Result<Self, LaunchError> {
        LaunchError::check_multiple("inner size", BLOCK, inner)?;
        LaunchError::check_multiple("columns", 1, columns)?;
        let blocks = inner / BLOCK;
        LaunchError::check_equal("weights", columns * blocks * BYTES, file.len())?;
        let cells = columns.div_ceil(LANES) * blocks;
        let mut scales = vec![Line([[0; LANES]; 2]); cells];
        let mut quants = vec![[Line([0; 64]); LINES]; cells];
        let (file, _) = file.as_chunks::<BYTES>();
        for column in 0..columns {
            let row = source(column);
            assert!(row < columns);
            let (group, lane) = (column / LANES, column % LANES);
            for b in 0..blocks {
                let block = &file[row * blocks + b];
                let (scale, minimum, start) = read(block);
                let cell = group * blocks + b;
                scales[cell].0[0][lane] = scale;
                scales[cell].0[1][lane] = minimum;
                for (line, bytes) in block[start..].chunks_exact(4).enumerate() {
                    quants[cell][line].0[4 * lane..4 * lane + 4].copy_from_slice(bytes);
                }
            }
        }
        Ok(Self { columns, inner, scales, quants })
    }

    /// Output columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Inner size.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// Bytes held in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(self.scales.as_slice()) + size_of_val(self.quants.as_slice())
    }

    /// One row of weights as floats.
    pub(crate) fn dequantise_row(&self, row: usize, out: &mut [f32]) {
        let (group, lane) = (row / LANES, row % LANES);
        let blocks = self.inner / BLOCK;
        for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let cell = group * blocks + b;
            let [scale, minimum] =
                self.scales[cell].0.map(|lanes| f16::from_bits(lanes[lane]).to_f32());
            for i in 0..16 {
                let byte = self.quants[cell][i / 4].0[4 * lane + i % 4];
                out[i] = f32::from(byte & 15).mul_add(scale, minimum);
                out[16 + i] = f32::from(byte >> 4).mul_add(scale, minimum);
            }
        }
    }
}
