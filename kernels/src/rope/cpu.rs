//! Pairs of vectors, half a head apart.

use super::{Table, turn};
use crate::simd::{LANES, Simd, Task};

pub(super) struct Rotate<'a> {
    pub table: &'a Table,
    pub position: usize,
    pub scale: f32,
    pub heads: &'a mut [f32],
}

impl Task for Rotate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (cos, sin) = self.table.at(self.position);
        let scale = s.splat(self.scale);
        for head in self.heads.chunks_exact_mut(self.table.head_dim()) {
            let (low, high) = head.split_at_mut(self.table.half);
            let (low, _) = low.as_chunks_mut::<LANES>();
            let (high, _) = high.as_chunks_mut::<LANES>();
            for i in 0..cos.len() {
                let (cos, sin) = (s.load(&cos[i]), s.load(&sin[i]));
                let (l, h) = turn(s, s.load(&low[i]), s.load(&high[i]), cos, sin);
                s.store(s.mul(l, scale), &mut low[i]);
                s.store(s.mul(h, scale), &mut high[i]);
            }
        }
    }
}
