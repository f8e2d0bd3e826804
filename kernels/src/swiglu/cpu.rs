//! Sixteen values at a time.

use crate::math::exp;
use crate::simd::{LANES, Simd, Task};

pub(super) struct SwiGlu<'a> {
    pub gate: &'a [f32],
    pub up: &'a [f32],
    pub out: &'a mut [f32],
}

impl Task for SwiGlu<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (gate, _) = self.gate.as_chunks::<LANES>();
        let (up, _) = self.up.as_chunks::<LANES>();
        let (out, _) = self.out.as_chunks_mut::<LANES>();
        let (zero, one) = (s.splat(0.0), s.splat(1.0));
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let gate = s.load(gate);
            let denominator = s.add(one, exp(s, s.sub(zero, gate)));
            s.store(s.mul(s.div(gate, denominator), s.load(up)), out);
        }
    }
}
