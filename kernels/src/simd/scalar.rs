//! The scalar class: what each operation means, in plain Rust.

use super::{LANES, Simd};
use half::f16;

/// Needs nothing of the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scalar;

fn lanes<T>(each: impl FnMut(usize) -> T) -> [T; LANES] {
    std::array::from_fn(each)
}

fn map_bytes(bytes: [u8; 64], each: impl Fn(u8) -> u8) -> [u8; 64] {
    bytes.map(each)
}

impl Simd for Scalar {
    const WIDE: bool = false;
    type F = [f32; LANES];
    type I = [i32; LANES];
    type W = [u8; 64];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        *from
    }
    #[inline(always)]
    fn store(self, value: Self::F, to: &mut [f32; LANES]) {
        *to = value;
    }
    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::F {
        lanes(|l| f16::from_bits(from[l]).to_f32())
    }
    #[inline(always)]
    fn store_f16(self, value: Self::F, to: &mut [u16; LANES]) {
        *to = lanes(|l| f16::from_f32(value[l]).to_bits());
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|l| a[l] + b[l])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|l| a[l] - b[l])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|l| a[l] * b[l])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|l| a[l] / b[l])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        lanes(|l| a[l].mul_add(b[l], c[l]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|l| if a[l] > b[l] { a[l] } else { b[l] })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|l| if a[l] < b[l] { a[l] } else { b[l] })
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn keep_first(self, a: Self::F, count: usize, other: f32) -> Self::F {
        lanes(|l| if l < count { a[l] } else { other })
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F) -> f32 {
        a.into_iter().reduce(|x, y| if x > y { x } else { y }).expect("sixteen lanes")
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F) -> f32 {
        let eight: [f32; 8] = std::array::from_fn(|l| a[l] + a[l + 8]);
        let four: [f32; 4] = std::array::from_fn(|l| eight[l] + eight[l + 4]);
        (four[0] + four[2]) + (four[1] + four[3])
    }
    #[inline(always)]
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES] {
        lanes(|i| lanes(|j| rows[j][i]))
    }
    #[inline(always)]
    fn pow2_of_shifted(self, t: Self::F) -> Self::F {
        t.map(|t| f32::from_bits((t.to_bits() << 23).wrapping_add(1.0_f32.to_bits())))
    }
    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I {
        [value; LANES]
    }
    #[inline(always)]
    fn to_f32(self, value: Self::I) -> Self::F {
        value.map(|v| v as f32)
    }
    #[inline(always)]
    fn store_i8(self, value: Self::F, to: &mut [i8; LANES]) {
        *to = value.map(|v| v.round_ties_even() as i8);
    }
    #[inline(always)]
    fn load_bytes(self, from: &[u8; 64]) -> Self::W {
        *from
    }
    #[inline(always)]
    fn low_nibbles(self, bytes: Self::W) -> Self::W {
        map_bytes(bytes, |b| b & 15)
    }
    #[inline(always)]
    fn high_nibbles(self, bytes: Self::W) -> Self::W {
        map_bytes(bytes, |b| b >> 4)
    }
    #[inline(always)]
    fn dot_nibbles(self, acc: Self::I, w: Self::W, a: [i8; 4]) -> Self::I {
        lanes(|l| (0..4).fold(acc[l], |sum, i| sum + i32::from(w[4 * l + i]) * i32::from(a[i])))
    }
    #[inline(always)]
    fn biased_start(self, a_sum: i32) -> Self::I {
        [-128 * a_sum; LANES]
    }
    #[inline(always)]
    fn dot_biased(self, acc: Self::I, w: Self::W, a: [i8; 4]) -> Self::I {
        self.dot_nibbles(acc, w, a)
    }
}
