//! Functions of one value that the C library would compute differently from machine to machine.

use crate::simd::Simd;

const SHIFT: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to an integer in the low mantissa bits.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Below this `exp` gives 0: the result would leave the range of [`Simd::pow2_of_shifted`].
const EXP_MIN: f32 = -87.0;
const EXP_MAX: f32 = 88.0;

/// e^x, relative error below 2e-7; 0 below -87, e^88 above 88.
///
/// Cephes' polynomial of degree 5 on |r| ≤ ln2 / 2; the same operations in every class.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let inside = s.max(s.min(x, s.splat(EXP_MAX)), s.splat(EXP_MIN));
    let shifted = s.fma(inside, s.splat(std::f32::consts::LOG2_E), s.splat(SHIFT));
    let n = s.sub(shifted, s.splat(SHIFT));
    let r = s.fma(n, s.splat(-LN2_HIGH), inside);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let mut p = s.splat(1.987_569_2e-4);
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.fma(p, s.mul(r, r), s.add(r, s.splat(1.0)));
    let y = s.mul(p, s.pow2_of_shifted(shifted));
    // Exactly 0 below the range: masked scores (-inf) must weigh nothing.
    let zero_below = s.max(s.min(s.sub(x, s.splat(EXP_MIN)), s.splat(1.0)), s.splat(0.0));
    select_zero(s, y, zero_below)
}

/// `y` where `gate` is positive, else 0.
#[inline(always)]
fn select_zero<S: Simd>(s: S, y: S::F, gate: S::F) -> S::F {
    // gate · huge, cut to 0 … y: exact, as y ≤ e^88 < gate · f32::MAX for any gate above 1e-30.
    s.min(y, s.mul(gate, s.splat(f32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::exp;
    use crate::simd::{Class, LANES, Simd, Task};

    struct Exp<'a>(&'a mut [f32; LANES]);
    impl Task for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let y = exp(s, s.load(self.0));
            s.store(y, self.0);
        }
    }

    #[test]
    fn exp_is_close_everywhere_and_equal_in_all_classes() {
        let mut x = -100.0_f32;
        while x < 88.0 {
            let lanes: [f32; LANES] = std::array::from_fn(|l| x + l as f32 * 0.013);
            let mut want = lanes;
            Class::scalar().run(Exp(&mut want));
            for (x, got) in lanes.into_iter().zip(want) {
                let exact = if x < -87.0 { 0.0 } else { f64::from(x.min(88.0)).exp() };
                assert!((f64::from(got) - exact).abs() <= 2.0e-7 * exact, "exp({x}) = {got}");
            }
            for class in Class::available() {
                let mut got = lanes;
                class.run(Exp(&mut got));
                assert_eq!(got.map(f32::to_bits), want.map(f32::to_bits), "{}", class.name());
            }
            x += 0.21;
        }
    }

    #[test]
    fn exp_of_minus_infinity_is_zero_and_of_zero_is_one() {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        lanes[3] = 0.0;
        for class in Class::available() {
            let mut got = lanes;
            class.run(Exp(&mut got));
            assert_eq!(got[0].to_bits(), 0);
            assert_eq!(got[3].to_bits(), 1.0_f32.to_bits());
        }
    }
}
