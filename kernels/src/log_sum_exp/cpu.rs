//! Two passes: the maximum, then the sum in sixteen lanes; what is left of a row counts as -inf.

use crate::math::exp;
use crate::simd::{LANES, Simd, Task};

pub(super) struct LogSumExp<'a> {
    pub logits: &'a [f32],
}

impl Task for LogSumExp<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (rows, rest) = self.logits.as_chunks::<LANES>();
        let mut tail = [f32::NEG_INFINITY; LANES];
        tail[..rest.len()].copy_from_slice(rest);
        let mut largest = s.load(&tail);
        for row in rows {
            largest = s.max(s.load(row), largest);
        }
        let largest = s.reduce_max(largest);
        if largest == f32::NEG_INFINITY {
            return largest;
        }
        let shift = s.splat(largest);
        let mut sum = exp(s, s.sub(s.load(&tail), shift));
        for row in rows {
            sum = s.add(sum, exp(s, s.sub(s.load(row), shift)));
        }
        largest + libm::logf(s.reduce_add(sum))
    }
}
