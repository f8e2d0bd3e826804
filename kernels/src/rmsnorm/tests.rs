use super::{reference, rmsnorm};
use crate::simd::{Class, tests::Random};

#[test]
fn every_class_equals_the_reference() {
    let mut random = Random(31);
    for len in [16, 48, 576] {
        let (x, weight) = (random.floats(len, 5.0), random.floats(len, 1.0));
        let mut want = vec![0.0; len];
        reference::rmsnorm(&x, &weight, 1.0e-5, &mut want);
        for class in Class::available() {
            let mut got = vec![0.0; len];
            rmsnorm(class, &x, &weight, 1.0e-5, &mut got).unwrap();
            let bits = |v: &[f32]| v.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&want), "class {}", class.name());
        }
    }
}

#[test]
fn a_normalised_row_has_unit_mean_square() {
    let x = Random(32).floats(64, 9.0);
    let mut out = vec![0.0; 64];
    rmsnorm(Class::detect(), &x, &[1.0; 64], 0.0, &mut out).unwrap();
    let mean = out.iter().map(|v| v * v).sum::<f32>() / 64.0;
    assert!((mean - 1.0).abs() < 1.0e-5);
}
