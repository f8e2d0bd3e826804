//! One group × `R` rows.
//!
//! A block costs, for each row, 8 integer dot products and 4 float operations for 512 products;
//! unpacking the nibbles (4 loads, 12 logic operations) is shared by the rows.

use super::MatrixQ4_1;
use crate::matmul::Packed;
use crate::quantise::{BLOCK, Block, TILE_ROWS};
use crate::simd::Simd;

impl Packed for MatrixQ4_1 {
    fn inner(&self) -> usize {
        self.inner
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize>(
        &self,
        s: S,
        group: usize,
        x: &[[Block; TILE_ROWS]],
        first: usize,
    ) -> [S::F; R] {
        let blocks = self.inner / BLOCK;
        let scales = &self.scales[group * blocks..(group + 1) * blocks];
        let quants = &self.quants[group * blocks..(group + 1) * blocks];
        let mut sums = [s.splat(0.0); R];
        for ((x, scales), lines) in x.iter().zip(scales).zip(quants) {
            let x: &[Block; R] = x[first..].first_chunk().expect("a part lies within its tile");
            let mut dots = [s.splat_i32(0); R];
            for (l, line) in lines.iter().enumerate() {
                let bytes = s.load_bytes(&line.0);
                let (low, high) = (s.low_nibbles(bytes), s.high_nibbles(bytes));
                for r in 0..R {
                    let (fours, _) = x[r].values.as_chunks::<4>();
                    dots[r] = s.dot_nibbles(dots[r], low, fours[l]);
                }
                for r in 0..R {
                    let (fours, _) = x[r].values.as_chunks::<4>();
                    dots[r] = s.dot_nibbles(dots[r], high, fours[4 + l]);
                }
            }
            let [scale, minimum] = &scales.0;
            let (scale, minimum) = (s.load_f16(scale), s.load_f16(minimum));
            for r in 0..R {
                let dot = s.mul(s.to_f32(dots[r]), scale);
                sums[r] = s.fma(dot, s.splat(x[r].scale), sums[r]);
                sums[r] = s.fma(minimum, s.splat(x[r].scaled_sum), sums[r]);
            }
        }
        sums
    }
}
