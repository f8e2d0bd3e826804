//! The definition, in plain loops over the file's blocks.

use half::f16;

use super::FILE_BLOCK_BYTES;
use crate::quantise::{BLOCK, Block};

/// See the module. One row.
pub fn multiply(inner: usize, file: &[u8], x: &[Block], out: &mut [f32]) {
    for (row, out) in file.chunks_exact(inner / BLOCK * FILE_BLOCK_BYTES).zip(out) {
        *out = 0.0;
        for (weights, x) in row.chunks_exact(FILE_BLOCK_BYTES).zip(x) {
            let scale = f16::from_le_bytes([weights[0], weights[1]]).to_f32();
            let minimum = f16::from_le_bytes([weights[2], weights[3]]).to_f32();
            let mut dot = 0;
            for i in 0..16 {
                dot += i32::from(weights[4 + i] & 15) * i32::from(x.values[i]);
                dot += i32::from(weights[4 + i] >> 4) * i32::from(x.values[16 + i]);
            }
            *out = (dot as f32 * scale).mul_add(x.scale, *out);
            *out = minimum.mul_add(x.scaled_sum, *out);
        }
    }
}
