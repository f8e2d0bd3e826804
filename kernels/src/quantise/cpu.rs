//! Two vectors a block.

use super::{BLOCK, Block, SMALLEST, tiled_index};
use crate::disjoint::Disjoint;
use crate::simd::{LANES, Simd, Task};

pub(super) struct Quantise<'a> {
    pub row: &'a [f32],
    pub index: usize,
    pub tiles: &'a Disjoint<'a, Block>,
}

impl Task for Quantise<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (row, _) = self.row.as_chunks::<BLOCK>();
        for (b, x) in row.iter().enumerate() {
            let (halves, _) = x.as_chunks::<LANES>();
            let (low, high) = (s.load(&halves[0]), s.load(&halves[1]));
            let largest = s.reduce_max(s.max(s.abs(low), s.abs(high)));
            let mut block = Block::ZERO;
            if largest > SMALLEST {
                block.scale = largest / 127.0;
                let inverse = s.splat(127.0 / largest);
                let (values, _) = block.values.as_chunks_mut::<LANES>();
                s.store_i8(s.mul(low, inverse), &mut values[0]);
                s.store_i8(s.mul(high, inverse), &mut values[1]);
                block.sum = block.values.iter().map(|&v| i32::from(v)).sum();
                block.scaled_sum = block.scale * block.sum as f32;
            }
            let at = tiled_index(self.index, b, row.len());
            // SAFETY: the row's blocks are this call's alone (contract of `quantise`).
            let to = unsafe { self.tiles.range_mut(at..at + 1) };
            to[0] = block;
        }
    }
}
