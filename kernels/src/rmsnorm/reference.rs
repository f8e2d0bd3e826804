//! The definition, in plain loops.

use crate::simd::LANES;

/// See the module.
pub fn rmsnorm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let mut lanes = [0.0_f32; LANES];
    for (i, &v) in x.iter().enumerate() {
        lanes[i % LANES] = v.mul_add(v, lanes[i % LANES]);
    }
    for width in [8, 4, 2, 1] {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
    }
    let inverse = 1.0 / (lanes[0] / x.len() as f32 + epsilon).sqrt();
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * inverse * weight;
    }
}
