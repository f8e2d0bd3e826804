//! Sixteen lanes, written once, compiled for three instruction classes.
//!
//! A kernel is a [`Task`] whose body is generic over [`Simd`]; [`Class::run`] compiles it for plain
//! Rust, AVX2 and AVX-512 VNNI and picks one at run time. Every operation is either exact (integers,
//! moves, maxima) or one IEEE 754 rounding (add, multiply, fused multiply-add, divide, square root),
//! and sums over lanes use one fixed tree. So **the class never changes a bit of a result**; the
//! property tests of each kernel hold that against the scalar class.
//!
//! Legend of shapes, used by all kernels: `T` tokens (activation rows), `N` output columns (weight
//! rows), `K` inner size, `Kb = K / 32` quantised blocks, `Hq` query heads, `Hkv` KV heads, `D`
//! head_dim, `B` tokens a block.

mod avx2;
mod avx512;
mod scalar;

use std::sync::OnceLock;

/// Lanes of one vector; also output columns of one packed weight group.
pub const LANES: usize = 16;

/// Environment variable that forces a class, for tests and comparisons: `scalar`, `avx2`, `avx512`.
pub const CLASS_ENV: &str = "COLLOQUY_CPU_CLASS";

/// Sixteen-lane arithmetic. A value of an implementing type proves that the CPU has the class.
///
/// Every method is lane by lane unless it says otherwise.
pub trait Simd: Copy {
    /// Whether there are registers for tiles of eight rows.
    const WIDE: bool;
    /// 16 × f32.
    type F: Copy;
    /// 16 × i32.
    type I: Copy;
    /// 64 bytes: four for each lane.
    type W: Copy;

    /// All lanes `value`.
    fn splat(self, value: f32) -> Self::F;
    /// From memory.
    fn load(self, from: &[f32; LANES]) -> Self::F;
    /// To memory.
    fn store(self, value: Self::F, to: &mut [f32; LANES]);
    /// From IEEE half precision; exact.
    fn load_f16(self, from: &[u16; LANES]) -> Self::F;
    /// To IEEE half precision, to nearest even.
    fn store_f16(self, value: Self::F, to: &mut [u16; LANES]);
    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a > b ? a : b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? a : b`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `|a|`.
    fn abs(self, a: Self::F) -> Self::F;
    /// Lanes below `count` from `a`, the others `other`.
    fn keep_first(self, a: Self::F, count: usize, other: f32) -> Self::F;
    /// Largest lane.
    fn reduce_max(self, a: Self::F) -> f32;
    /// Sum of lanes by the fixed tree: halves 8, 4, 2, 1 apart.
    fn reduce_add(self, a: Self::F) -> f32;
    /// `rows[i][j]` and `rows[j][i]` change places.
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES];
    /// `2^n` from `t = n + 1.5 · 2^23` as the rounding trick leaves it, for n in -126 … 127.
    fn pow2_of_shifted(self, t: Self::F) -> Self::F;

    /// All lanes `value`.
    fn splat_i32(self, value: i32) -> Self::I;
    /// Exact below 2^24.
    fn to_f32(self, value: Self::I) -> Self::F;
    /// To nearest even, to signed bytes; lanes lie in -127 … 127.
    fn store_i8(self, value: Self::F, to: &mut [i8; LANES]);
    /// 64 bytes from memory.
    fn load_bytes(self, from: &[u8; 64]) -> Self::W;
    /// The low four bits of each byte.
    fn low_nibbles(self, bytes: Self::W) -> Self::W;
    /// The high four bits of each byte.
    fn high_nibbles(self, bytes: Self::W) -> Self::W;
    /// `acc[l] += Σ w[l][i] · a[i]` over the lane's four bytes `w`, each at most 15.
    fn dot_nibbles(self, acc: Self::I, w: Self::W, a: [i8; 4]) -> Self::I;
    /// Where [`Simd::dot_biased`] starts, given the sum of all its `a`.
    fn biased_start(self, a_sum: i32) -> Self::I;
    /// `acc[l] += Σ (w[l][i] - 128) · a[i]`, once the start's share is counted.
    fn dot_biased(self, acc: Self::I, w: Self::W, a: [i8; 4]) -> Self::I;
}

/// A kernel body, generic over the class. `run` must be `#[inline(always)]`, or its operations
/// become calls.
pub trait Task {
    /// What it gives back.
    type Output;
    /// The body.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction class that this CPU has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Scalar(scalar::Scalar),
    Avx2(avx2::Avx2),
    Avx512(avx512::Avx512),
}

impl Class {
    /// Plain Rust: the definition of every operation, on any CPU.
    pub fn scalar() -> Self {
        Self(Kind::Scalar(scalar::Scalar))
    }

    /// All classes that this CPU has, slowest first.
    pub fn available() -> Vec<Self> {
        let avx2 = avx2::Avx2::detect().map(|token| Self(Kind::Avx2(token)));
        let avx512 = avx512::Avx512::detect().map(|token| Self(Kind::Avx512(token)));
        [Some(Self::scalar()), avx2, avx512].into_iter().flatten().collect()
    }

    /// The fastest class of this CPU, or the one that [`CLASS_ENV`] names if the CPU has it.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Class> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let available = Self::available();
            let forced = std::env::var(CLASS_ENV).ok();
            let named = available.iter().find(|class| Some(class.name()) == forced.as_deref());
            *named.or(available.last()).expect("the scalar class is always there")
        })
    }

    /// As [`CLASS_ENV`] spells it.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar(_) => "scalar",
            Kind::Avx2(_) => "avx2",
            Kind::Avx512(_) => "avx512",
        }
    }

    /// Runs the task compiled for this class.
    #[inline]
    pub fn run<T: Task>(self, task: T) -> T::Output {
        match self.0 {
            Kind::Scalar(token) => task.run(token),
            Kind::Avx2(token) => token.run(task),
            Kind::Avx512(token) => token.run(task),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
