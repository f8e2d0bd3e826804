//! The definition, in plain loops.

use super::{BLOCK, Block, SMALLEST};

/// See the module.
pub fn quantise(row: &[f32], blocks: &mut [Block]) {
    for (x, block) in row.chunks_exact(BLOCK).zip(blocks) {
        let largest = x.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        *block = Block::ZERO;
        if largest > SMALLEST {
            block.scale = largest / 127.0;
            let inverse = 127.0 / largest;
            block.values = std::array::from_fn(|i| (x[i] * inverse).round_ties_even() as i8);
            block.sum = block.values.iter().map(|&v| i32::from(v)).sum();
            block.scaled_sum = block.scale * block.sum as f32;
        }
    }
}
