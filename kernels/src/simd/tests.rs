//! Each operation of each class equals the scalar one, bit for bit.

use super::{Class, LANES, Simd, Task};

/// A small deterministic generator; tests need no more.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = self.0 ^ (self.0 >> 29);
        (x.wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 32) as u32
    }
    /// In -1 … 1.
    pub fn unit(&mut self) -> f32 {
        self.bits() as f32 / 2_147_483_648.0 - 1.0
    }
    pub fn floats(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.unit() * scale).collect()
    }
}

struct Everything<'a> {
    a: &'a [f32; LANES],
    b: &'a [f32; LANES],
    c: &'a [f32; LANES],
    bytes: &'a [u8; 64],
    signed: [i8; 4],
    count: usize,
}

impl Task for Everything<'_> {
    type Output = Vec<u32>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<u32> {
        let (a, b, c) = (s.load(self.a), s.load(self.b), s.load(self.c));
        let w = s.load_bytes(self.bytes);
        let sum = self.signed.iter().map(|&x| i32::from(x)).sum();
        let shifted = s.add(s.mul(a, s.splat(40.0)), s.splat(12_582_912.0));
        let mut halves = [0_u16; LANES];
        s.store_f16(s.mul(a, s.splat(3.0e-6)), &mut halves);
        let mut bytes = [0_i8; LANES];
        s.store_i8(s.mul(a, s.splat(127.0)), &mut bytes);
        let mut vectors = vec![
            s.add(a, b),
            s.sub(a, b),
            s.mul(a, b),
            s.div(a, b),
            s.fma(a, b, c),
            s.max(a, b),
            s.min(a, b),
            s.abs(a),
            s.keep_first(a, self.count, -7.0),
            s.splat(s.reduce_max(a)),
            s.splat(s.reduce_add(a)),
            s.pow2_of_shifted(shifted),
            s.load_f16(&halves),
            s.to_f32(s.dot_nibbles(s.splat_i32(3), s.low_nibbles(w), self.signed)),
            s.to_f32(s.dot_nibbles(s.splat_i32(-3), s.high_nibbles(w), self.signed)),
            s.to_f32(s.dot_biased(s.biased_start(sum), w, self.signed)),
        ];
        let rows = std::array::from_fn(|i| s.add(a, s.mul(b, s.splat(i as f32))));
        vectors.extend(s.transpose(rows));
        let mut out = Vec::new();
        for vector in vectors {
            let mut lanes = [0.0; LANES];
            s.store(vector, &mut lanes);
            out.extend(lanes.map(f32::to_bits));
        }
        out.extend(halves.map(u32::from));
        out.extend(bytes.map(|b| b as u32));
        out
    }
}

#[test]
fn every_class_gives_the_bits_of_the_scalar_class() {
    let mut random = Random(1);
    for round in 0..200 {
        let mut lanes = || std::array::from_fn(|_| random.unit());
        let (a, b, c) = (lanes(), lanes(), lanes());
        let bytes: [u8; 64] = std::array::from_fn(|_| random.bits() as u8);
        let signed = std::array::from_fn(|_| (random.bits() as i8).max(-127));
        let task = || Everything { a: &a, b: &b, c: &c, bytes: &bytes, signed, count: round % 18 };
        let want = Class::scalar().run(task());
        for class in Class::available() {
            assert_eq!(class.run(task()), want, "class {}", class.name());
        }
    }
}

#[test]
fn extreme_weights_do_not_saturate() {
    let ones = [1.0; LANES];
    for (weight, activation) in [(0_u8, -127_i8), (0, 127), (255, -127), (255, 127)] {
        let bytes = [weight; 64];
        let signed = [activation; 4];
        let task = || Everything { a: &ones, b: &ones, c: &ones, bytes: &bytes, signed, count: 0 };
        let want = Class::scalar().run(task());
        for class in Class::available() {
            assert_eq!(class.run(task()), want, "class {}", class.name());
        }
    }
}
