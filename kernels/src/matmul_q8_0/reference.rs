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
            let values = weights[2..].iter().map(|&byte| i32::from(byte as i8));
            let dot: i32 = values.zip(x.values).map(|(w, x)| w * i32::from(x)).sum();
            *out = (dot as f32 * scale).mul_add(x.scale, *out);
        }
    }
}
