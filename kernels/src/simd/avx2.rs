//! The AVX2 class: two 256-bit registers a vector, `vpmaddubsw` for the integer dot products.
//!
//! Why unsafe: instructions that the CPU may lack. What must hold: AVX2, FMA and F16C exist.
//! Who guarantees it: an [`Avx2`] is only made by [`Avx2::detect`].

use super::{LANES, Simd, Task};
use core::arch::x86_64::{__m256, __m256i};

/// Proof that AVX2, FMA and F16C exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx2 {
    _made_by_detect: (),
}

impl Avx2 {
    /// The proof, if the CPU has the features.
    pub fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self { _made_by_detect: () })
    }

    /// Runs the task with the class's instructions.
    #[inline]
    pub fn run<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn inner<T: Task>(token: Avx2, task: T) -> T::Output {
            task.run(token)
        }
        // SAFETY: `self` proves the features (module doc).
        unsafe { inner(self, task) }
    }
}

type F = [__m256; 2];
type I = [__m256i; 2];

/// The operations, with the features switched on, so that intrinsics on values are safe to name.
mod ops {
    use super::{F, I, LANES};
    #[allow(
        clippy::wildcard_imports,
        reason = "fifty intrinsics of one prefix; not linted in tests"
    )]
    use core::arch::x86_64::*;

    macro_rules! ops {
        ($(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? $body:block)*) => {$(
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            pub fn $name($($arg: $ty),*) $(-> $ret)? $body
        )*};
    }

    ops! {
        fn splat(value: f32) -> F { [_mm256_set1_ps(value); 2] }
        fn load(from: &[f32; LANES]) -> F {
            let (low, high) = from.split_at(8);
            // SAFETY: 32 readable bytes; unaligned loads need no alignment.
            let low = unsafe { _mm256_loadu_ps(low.as_ptr()) };
            // SAFETY: as above.
            let high = unsafe { _mm256_loadu_ps(high.as_ptr()) };
            [low, high]
        }
        fn store(value: F, to: &mut [f32; LANES]) {
            let (low, high) = to.split_at_mut(8);
            // SAFETY: 32 writable bytes, borrowed exclusively.
            unsafe { _mm256_storeu_ps(low.as_mut_ptr(), value[0]) }
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(high.as_mut_ptr(), value[1]) }
        }
        fn load_f16(from: &[u16; LANES]) -> F {
            // SAFETY: both are 32 bytes of plain integers. (The load intrinsic of this width brings
            // overlap checks into builds with debug assertions, in the hottest loops.)
            let halves = unsafe { std::mem::transmute::<[u16; LANES], __m256i>(*from) };
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)),
            ]
        }
        fn store_f16(value: F, to: &mut [u16; LANES]) {
            let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[0]);
            let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[1]);
            let halves = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high);
            // SAFETY: as in `load_f16`.
            *to = unsafe { std::mem::transmute::<__m256i, [u16; LANES]>(halves) };
        }
        fn add(a: F, b: F) -> F { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        fn sub(a: F, b: F) -> F { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
        fn mul(a: F, b: F) -> F { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        fn div(a: F, b: F) -> F { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
        fn fma(a: F, b: F, c: F) -> F {
            [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
        }
        fn max(a: F, b: F) -> F { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
        fn min(a: F, b: F) -> F { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
        fn abs(a: F) -> F {
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
        }
        fn keep_first(a: F, count: usize, other: f32) -> F {
            let count = _mm256_set1_epi32(count.min(LANES) as i32);
            let low = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            let high = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
            let other = _mm256_set1_ps(other);
            [
                _mm256_blendv_ps(other, a[0], _mm256_castsi256_ps(low)),
                _mm256_blendv_ps(other, a[1], _mm256_castsi256_ps(high)),
            ]
        }
        fn reduce_max(a: F) -> f32 {
            let eight = _mm256_max_ps(a[0], a[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
        fn reduce_add(a: F) -> f32 {
            let eight = _mm256_add_ps(a[0], a[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
        fn transpose(rows: [F; LANES]) -> [F; LANES] {
            // Through memory: the AVX2 class is the fallback, and this is a tenth of attention there.
            let mut cells = [[0.0_f32; LANES]; LANES];
            for (row, cells) in rows.into_iter().zip(&mut cells) {
                store(row, cells);
            }
            let mut out = rows;
            for (column, out) in out.iter_mut().enumerate() {
                *out = load(&std::array::from_fn(|row| cells[row][column]));
            }
            out
        }
        fn pow2_of_shifted(t: F) -> F {
            t.map(|t| {
                let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
                let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
                _mm256_castsi256_ps(_mm256_add_epi32(exponent, one))
            })
        }
        fn splat_i32(value: i32) -> I { [_mm256_set1_epi32(value); 2] }
        fn to_f32(value: I) -> F { [_mm256_cvtepi32_ps(value[0]), _mm256_cvtepi32_ps(value[1])] }
        fn store_i8(value: F, to: &mut [i8; LANES]) {
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(value[0]), _mm256_cvtps_epi32(value[1]));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes =
                _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            // SAFETY: 16 writable bytes, borrowed exclusively.
            unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), bytes) }
        }
        fn load_bytes(from: &[u8; 64]) -> I {
            // SAFETY: both are 64 bytes of plain integers.
            unsafe { std::mem::transmute::<[u8; 64], I>(*from) }
        }
        fn low_nibbles(bytes: I) -> I {
            let mask = _mm256_set1_epi8(15);
            [_mm256_and_si256(bytes[0], mask), _mm256_and_si256(bytes[1], mask)]
        }
        fn high_nibbles(bytes: I) -> I {
            low_nibbles([_mm256_srli_epi16::<4>(bytes[0]), _mm256_srli_epi16::<4>(bytes[1])])
        }
        fn dot_nibbles(acc: I, w: I, a: [i8; 4]) -> I {
            // A pair sums to at most 2 · 15 · 127: `vpmaddubsw` cannot saturate.
            let a = _mm256_set1_epi32(i32::from_le_bytes(a.map(|a| a as u8)));
            let ones = _mm256_set1_epi16(1);
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(_mm256_maddubs_epi16(w[0], a), ones)),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(_mm256_maddubs_epi16(w[1], a), ones)),
            ]
        }
        fn dot_biased(acc: I, w: I, a: [i8; 4]) -> I {
            // |w| · (a with w's sign): a pair sums to at most 2 · 128 · 127, which does not saturate.
            let bias = _mm256_set1_epi8(-128);
            let a = _mm256_set1_epi32(i32::from_le_bytes(a.map(|a| a as u8)));
            let ones = _mm256_set1_epi16(1);
            let mut out = acc;
            for (out, w) in out.iter_mut().zip(w) {
                let signed = _mm256_xor_si256(w, bias);
                let pairs =
                    _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(a, signed));
                *out = _mm256_add_epi32(*out, _mm256_madd_epi16(pairs, ones));
            }
            out
        }
    }
}

macro_rules! forward {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $ty),*) $(-> $ret)? {
            // SAFETY: `self` proves the features (module doc).
            unsafe { ops::$name($($arg),*) }
        }
    )*};
}

impl Simd for Avx2 {
    const WIDE: bool = false;
    type F = F;
    type I = I;
    type W = I;

    forward! {
        fn splat(value: f32) -> F;
        fn load(from: &[f32; LANES]) -> F;
        fn store(value: F, to: &mut [f32; LANES]);
        fn load_f16(from: &[u16; LANES]) -> F;
        fn store_f16(value: F, to: &mut [u16; LANES]);
        fn add(a: F, b: F) -> F;
        fn sub(a: F, b: F) -> F;
        fn mul(a: F, b: F) -> F;
        fn div(a: F, b: F) -> F;
        fn fma(a: F, b: F, c: F) -> F;
        fn max(a: F, b: F) -> F;
        fn min(a: F, b: F) -> F;
        fn abs(a: F) -> F;
        fn keep_first(a: F, count: usize, other: f32) -> F;
        fn reduce_max(a: F) -> f32;
        fn reduce_add(a: F) -> f32;
        fn transpose(rows: [F; LANES]) -> [F; LANES];
        fn pow2_of_shifted(t: F) -> F;
        fn splat_i32(value: i32) -> I;
        fn to_f32(value: I) -> F;
        fn store_i8(value: F, to: &mut [i8; LANES]);
        fn load_bytes(from: &[u8; 64]) -> I;
        fn low_nibbles(bytes: I) -> I;
        fn high_nibbles(bytes: I) -> I;
        fn dot_nibbles(acc: I, w: I, a: [i8; 4]) -> I;
        fn dot_biased(acc: I, w: I, a: [i8; 4]) -> I;
    }

    #[inline(always)]
    fn biased_start(self, _a_sum: i32) -> I {
        self.splat_i32(0) // `dot_biased` takes the bias off each weight here.
    }
}
