//! Two vectors a block.

use super::{BLOCK, Block, SMALLEST};
use crate::simd::{LANES, Simd, Task};

pub(super) struct Quantise<'a> {
    pub row: &'a [f32],
    pub blocks: &'a mut [Block],
}

impl Task for Quantise<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (row, _) = self.row.as_chunks::<BLOCK>();
        for (x, block) in row.iter().zip(self.blocks) {
            let (halves, _) = x.as_chunks::<LANES>();
            let (low, high) = (s.load(&halves[0]), s.load(&halves[1]));
            let largest = s.reduce_max(s.max(s.abs(low), s.abs(high)));
            *block = Block::ZERO;
            if largest > SMALLEST {
                block.scale = largest / 127.0;
                let inverse = s.splat(127.0 / largest);
                let (values, _) = block.values.as_chunks_mut::<LANES>();
                s.store_i8(s.mul(low, inverse), &mut values[0]);
                s.store_i8(s.mul(high, inverse), &mut values[1]);
                block.sum = block.values.iter().map(|&v| i32::from(v)).sum();
                block.scaled_sum = block.scale * block.sum as f32;
            }
        }
    }
}
