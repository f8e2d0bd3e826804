//! Two passes over a row that lies in the first-level cache.

use crate::simd::{LANES, Simd, Task};

pub(super) struct RmsNorm<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub epsilon: f32,
    pub out: &'a mut [f32],
}

impl Task for RmsNorm<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (x, _) = self.x.as_chunks::<LANES>();
        let (weight, _) = self.weight.as_chunks::<LANES>();
        let (out, _) = self.out.as_chunks_mut::<LANES>();
        let mut sum = s.splat(0.0);
        for x in x {
            let x = s.load(x);
            sum = s.fma(x, x, sum);
        }
        let mean = s.reduce_add(sum) / self.x.len() as f32;
        let inverse = s.splat(1.0 / (mean + self.epsilon).sqrt());
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            s.store(s.mul(s.mul(s.load(x), inverse), s.load(weight)), out);
        }
    }
}
