//! One group × `R` rows: 8 integer dot products and 3 float operations a block and row.

use super::MatrixQ8_0;
use crate::matmul::Packed;
use crate::quantise::{BLOCK, Block, TILE_ROWS};
use crate::simd::Simd;

impl Packed for MatrixQ8_0 {
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
            let mut dots: [S::I; R] = std::array::from_fn(|r| s.biased_start(x[r].sum));
            for (l, line) in lines.iter().enumerate() {
                let bytes = s.load_bytes(&line.0);
                for r in 0..R {
                    let (fours, _) = x[r].values.as_chunks::<4>();
                    dots[r] = s.dot_biased(dots[r], bytes, fours[l]);
                }
            }
            let scale = s.load_f16(scales);
            for r in 0..R {
                let dot = s.mul(s.to_f32(dots[r]), scale);
                sums[r] = s.fma(dot, s.splat(x[r].scale), sums[r]);
            }
        }
        sums
    }
}
