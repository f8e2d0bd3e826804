//! The AVX-512 class: one 512-bit register a vector, `vpdpbusd` for the integer dot products.
//!
//! Why unsafe: instructions that the CPU may lack. What must hold: the features in `ENABLED` exist.
//! Who guarantees it: an [`Avx512`] is only made by [`Avx512::detect`].

use super::{LANES, Simd, Task};
use core::arch::x86_64::{__m512, __m512i};

/// Proof that AVX-512 F, BW, DQ, VL and VNNI exist, with FMA and F16C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx512 {
    _made_by_detect: (),
}

impl Avx512 {
    /// The proof, if the CPU has the features.
    pub fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self { _made_by_detect: () })
    }

    /// Runs the task with the class's instructions.
    #[inline]
    pub fn run<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn inner<T: Task>(token: Avx512, task: T) -> T::Output {
            task.run(token)
        }
        // SAFETY: `self` proves the features (module doc).
        unsafe { inner(self, task) }
    }
}

/// The operations, with the features switched on, so that intrinsics on values are safe to name.
mod ops {
    use super::LANES;
    #[allow(
        clippy::wildcard_imports,
        reason = "fifty intrinsics of one prefix; not linted in tests"
    )]
    use core::arch::x86_64::*;

    macro_rules! ops {
        ($(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? $body:block)*) => {$(
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            pub fn $name($($arg: $ty),*) $(-> $ret)? $body
        )*};
    }

    ops! {
        fn splat(value: f32) -> __m512 { _mm512_set1_ps(value) }
        fn load(from: &[f32; LANES]) -> __m512 {
            // SAFETY: 64 readable bytes; unaligned loads need no alignment.
            unsafe { _mm512_loadu_ps(from.as_ptr()) }
        }
        fn store(value: __m512, to: &mut [f32; LANES]) {
            // SAFETY: 64 writable bytes, borrowed exclusively.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
        }
        fn load_f16(from: &[u16; LANES]) -> __m512 {
            // SAFETY: both are 32 bytes of plain integers. (The load intrinsic of this width brings
            // overlap checks into builds with debug assertions, in the hottest loops.)
            let halves = unsafe { std::mem::transmute::<[u16; LANES], __m256i>(*from) };
            _mm512_cvtph_ps(halves)
        }
        fn store_f16(value: __m512, to: &mut [u16; LANES]) {
            let halves = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(value);
            // SAFETY: as in `load_f16`.
            *to = unsafe { std::mem::transmute::<__m256i, [u16; LANES]>(halves) };
        }
        fn add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn max(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        fn min(a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        fn abs(a: __m512) -> __m512 { _mm512_abs_ps(a) }
        fn keep_first(a: __m512, count: usize, other: f32) -> __m512 {
            let mask = if count >= LANES { u16::MAX } else { (1_u16 << count) - 1 };
            _mm512_mask_blend_ps(mask, _mm512_set1_ps(other), a)
        }
        fn reduce_max(a: __m512) -> f32 {
            let eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
        fn reduce_add(a: __m512) -> f32 {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
        fn transpose(r: [__m512; LANES]) -> [__m512; LANES] {
            // Pairs of rows, then fours, then the 128-bit quarters: each step moves blocks twice as wide.
            let mut two = [_mm512_setzero_ps(); LANES];
            for i in 0..8 {
                two[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                two[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            // four[4 g + c], 128-bit quarter q = column 4 q + c of rows 4 g … 4 g + 3.
            let mut four = [_mm512_setzero_ps(); LANES];
            for g in 0..4 {
                let [a, b, c, d] = [two[4 * g], two[4 * g + 1], two[4 * g + 2], two[4 * g + 3]];
                four[4 * g] = _mm512_shuffle_ps::<0x44>(a, c);
                four[4 * g + 1] = _mm512_shuffle_ps::<0xEE>(a, c);
                four[4 * g + 2] = _mm512_shuffle_ps::<0x44>(b, d);
                four[4 * g + 3] = _mm512_shuffle_ps::<0xEE>(b, d);
            }
            let mut out = [_mm512_setzero_ps(); LANES];
            for c in 0..4 {
                let even_low = _mm512_shuffle_f32x4::<0x88>(four[c], four[4 + c]);
                let odd_low = _mm512_shuffle_f32x4::<0xDD>(four[c], four[4 + c]);
                let even_high = _mm512_shuffle_f32x4::<0x88>(four[8 + c], four[12 + c]);
                let odd_high = _mm512_shuffle_f32x4::<0xDD>(four[8 + c], four[12 + c]);
                out[c] = _mm512_shuffle_f32x4::<0x88>(even_low, even_high);
                out[8 + c] = _mm512_shuffle_f32x4::<0xDD>(even_low, even_high);
                out[4 + c] = _mm512_shuffle_f32x4::<0x88>(odd_low, odd_high);
                out[12 + c] = _mm512_shuffle_f32x4::<0xDD>(odd_low, odd_high);
            }
            out
        }
        fn pow2_of_shifted(t: __m512) -> __m512 {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_castps_si512(_mm512_set1_ps(1.0))))
        }
        fn splat_i32(value: i32) -> __m512i { _mm512_set1_epi32(value) }
        fn to_f32(value: __m512i) -> __m512 { _mm512_cvtepi32_ps(value) }
        fn store_i8(value: __m512, to: &mut [i8; LANES]) {
            let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value));
            // SAFETY: 16 writable bytes, borrowed exclusively.
            unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), bytes) }
        }
        fn load_bytes(from: &[u8; 64]) -> __m512i {
            // SAFETY: 64 readable bytes; unaligned loads need no alignment.
            unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
        }
        fn low_nibbles(bytes: __m512i) -> __m512i {
            _mm512_and_si512(bytes, _mm512_set1_epi8(15))
        }
        fn high_nibbles(bytes: __m512i) -> __m512i {
            _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), _mm512_set1_epi8(15))
        }
        fn dot_nibbles(acc: __m512i, w: __m512i, a: [i8; 4]) -> __m512i {
            _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(i32::from_le_bytes(a.map(|a| a as u8))))
        }
        fn biased_start(a_sum: i32) -> __m512i { _mm512_set1_epi32(-128 * a_sum) }
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

impl Simd for Avx512 {
    const WIDE: bool = true;
    type F = __m512;
    type I = __m512i;
    type W = __m512i;

    forward! {
        fn splat(value: f32) -> __m512;
        fn load(from: &[f32; LANES]) -> __m512;
        fn store(value: __m512, to: &mut [f32; LANES]);
        fn load_f16(from: &[u16; LANES]) -> __m512;
        fn store_f16(value: __m512, to: &mut [u16; LANES]);
        fn add(a: __m512, b: __m512) -> __m512;
        fn sub(a: __m512, b: __m512) -> __m512;
        fn mul(a: __m512, b: __m512) -> __m512;
        fn div(a: __m512, b: __m512) -> __m512;
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512;
        fn max(a: __m512, b: __m512) -> __m512;
        fn min(a: __m512, b: __m512) -> __m512;
        fn abs(a: __m512) -> __m512;
        fn keep_first(a: __m512, count: usize, other: f32) -> __m512;
        fn reduce_max(a: __m512) -> f32;
        fn reduce_add(a: __m512) -> f32;
        fn transpose(rows: [__m512; LANES]) -> [__m512; LANES];
        fn pow2_of_shifted(t: __m512) -> __m512;
        fn splat_i32(value: i32) -> __m512i;
        fn to_f32(value: __m512i) -> __m512;
        fn store_i8(value: __m512, to: &mut [i8; LANES]);
        fn load_bytes(from: &[u8; 64]) -> __m512i;
        fn low_nibbles(bytes: __m512i) -> __m512i;
        fn high_nibbles(bytes: __m512i) -> __m512i;
        fn dot_nibbles(acc: __m512i, w: __m512i, a: [i8; 4]) -> __m512i;
        fn biased_start(a_sum: i32) -> __m512i;
    }

    #[inline(always)]
    fn dot_biased(self, acc: __m512i, w: __m512i, a: [i8; 4]) -> __m512i {
        self.dot_nibbles(acc, w, a) // `vpdpbusd` takes any unsigned byte.
    }
}
