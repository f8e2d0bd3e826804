use super::{BLOCK, Block, quantise, reference};
use crate::error::LaunchError;
use crate::simd::{Class, tests::Random};

#[test]
fn every_class_equals_the_reference() {
    let mut random = Random(7);
    for scale in [1.0e-38, 1.0e-20, 1.0, 1.0e20] {
        for blocks in [1, 2, 18] {
            let row = random.floats(blocks * BLOCK, scale);
            let mut want = vec![Block::ZERO; blocks];
            reference::quantise(&row, &mut want);
            for class in Class::available() {
                let mut got = vec![Block::ZERO; blocks];
                quantise(class, &row, &mut got).unwrap();
                assert_eq!(got, want, "class {}", class.name());
            }
        }
    }
}

#[test]
fn a_value_comes_back_within_half_a_step() {
    let row = Random(8).floats(BLOCK, 3.0);
    let mut blocks = [Block::ZERO];
    quantise(Class::detect(), &row, &mut blocks).unwrap();
    for (x, q) in row.iter().zip(blocks[0].values) {
        assert!((x - f32::from(q) * blocks[0].scale).abs() <= 0.501 * blocks[0].scale);
    }
}

#[test]
fn zeros_and_infinities_do_not_panic() {
    for value in [0.0, f32::INFINITY, f32::NAN] {
        quantise(Class::detect(), &[value; BLOCK], &mut [Block::ZERO]).unwrap();
    }
}

#[test]
fn a_row_that_is_no_multiple_of_32_is_refused() {
    let refused = quantise(Class::detect(), &[0.0; 33], &mut [Block::ZERO]);
    assert_eq!(refused, Err(LaunchError::Multiple { what: "row", unit: 32, got: 33 }));
}
