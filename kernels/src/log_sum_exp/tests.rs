use super::{TOLERANCE, log_sum_exp, reference};
use crate::simd::{Class, tests::Random};

#[test]
fn every_class_gives_the_same_bits_near_the_reference() {
    let mut random = Random(71);
    for len in [1, 15, 16, 263, 49_152] {
        let logits = random.floats(len, 20.0);
        let want = log_sum_exp(Class::scalar(), &logits);
        assert!((want - reference::log_sum_exp(&logits)).abs() <= TOLERANCE);
        for class in Class::available() {
            let got = log_sum_exp(class, &logits);
            assert_eq!(got.to_bits(), want.to_bits(), "class {}", class.name());
        }
    }
}
