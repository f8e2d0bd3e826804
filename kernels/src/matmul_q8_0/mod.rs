//! Weights of eight bits, blocks of 32: `w = scale · q` (GGUF Q8_0).
//!
//! Packed as `q + 128`, since the CPU multiplies unsigned by signed bytes; `-128 · Σ p` starts the
//! integer sum, so it stays exact.

mod cpu;
pub mod reference;
#[cfg(test)]
mod tests;

use half::f16;

use crate::error::LaunchError;
use crate::matmul::Line;
use crate::quantise::BLOCK;
use crate::simd::LANES;

/// Bytes of a block in a GGUF file: scale as f16, thirty-two signed bytes.
pub const FILE_BLOCK_BYTES: usize = 34;
/// Lines of packed bytes a block of one group.
const LINES: usize = 8;
const BIAS: u8 = 128;

/// Packed weights. Line `l` of a block holds, for lane (column) `c`, values `4 l … 4 l + 3`.
#[derive(Debug)]
pub struct MatrixQ8_0 {
    columns: usize,
    inner: usize,
    scales: Vec<[u16; LANES]>,            // [groups, K / 32, 16] f16
    quants: Vec<[Line<[u8; 64]>; LINES]>, // [groups, K / 32, 8, 16, 4]
}

impl MatrixQ8_0 {
    /// Packs Q8_0 blocks; output column `c` comes from row `source(c)` of the file's matrix.
    pub fn pack(
        columns: usize,
        inner: usize,
        file: &[u8], // [N, K / 32] blocks of 34 bytes
        source: impl Fn(usize) -> usize,
    ) -> Result<Self, LaunchError> {
        LaunchError::check_multiple("inner size", BLOCK, inner)?;
        LaunchError::check_multiple("columns", 1, columns)?;
        let blocks = inner / BLOCK;
        LaunchError::check_equal("weights", columns * blocks * FILE_BLOCK_BYTES, file.len())?;
        let cells = columns.div_ceil(LANES) * blocks;
        let mut scales = vec![[0; LANES]; cells];
        let mut quants = vec![[Line([BIAS; 64]); LINES]; cells];
        let (file, _) = file.as_chunks::<FILE_BLOCK_BYTES>();
        for column in 0..columns {
            let row = source(column);
            assert!(row < columns);
            let (group, lane) = (column / LANES, column % LANES);
            for b in 0..blocks {
                let block = &file[row * blocks + b];
                let cell = group * blocks + b;
                scales[cell][lane] = u16::from_le_bytes([block[0], block[1]]);
                for (i, byte) in block[2..].iter().enumerate() {
                    quants[cell][i / 4].0[4 * lane + i % 4] = byte ^ BIAS;
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
            let scale = f16::from_bits(self.scales[cell][lane]).to_f32();
            for (i, out) in out.iter_mut().enumerate() {
                let value = (self.quants[cell][i / 4].0[4 * lane + i % 4] ^ BIAS) as i8;
                *out = f32::from(value) * scale;
            }
        }
    }
}
