use super::{BLOCK, Block, quantise_all, reference, tiled_index};
use crate::error::LaunchError;
use crate::simd::{Class, tests::Random};

#[test]
fn every_class_equals_the_reference() {
    let mut random = Random(7);
    for scale in [1.0e-38, 1.0e-20, 1.0, 1.0e20] {
        for (rows, row_blocks) in [(1, 1), (3, 2), (11, 18)] {
            let floats = random.floats(rows * row_blocks * BLOCK, scale);
            let mut want = vec![Block::ZERO; rows * row_blocks];
            reference::quantise(&floats, &mut want);
            for class in Class::available() {
                let got = quantise_all(class, &floats, row_blocks * BLOCK).unwrap();
                for (n, want) in want.iter().enumerate() {
                    let got = &got[tiled_index(n / row_blocks, n % row_blocks, row_blocks)];
                    assert_eq!(got, want, "class {}", class.name());
                }
            }
        }
    }
}

#[test]
fn a_value_comes_back_within_half_a_step() {
    let row = Random(8).floats(BLOCK, 3.0);
    let blocks = quantise_all(Class::detect(), &row, BLOCK).unwrap();
    for (x, q) in row.iter().zip(blocks[0].values) {
        assert!((x - f32::from(q) * blocks[0].scale).abs() <= 0.501 * blocks[0].scale);
    }
}

#[test]
fn zeros_and_infinities_do_not_panic() {
    for value in [0.0, f32::INFINITY, f32::NAN] {
        quantise_all(Class::detect(), &[value; BLOCK], BLOCK).unwrap();
    }
}

#[test]
fn a_row_that_is_no_multiple_of_32_is_refused() {
    let refused = quantise_all(Class::detect(), &[0.0; 33], 33);
    assert_eq!(refused, Err(LaunchError::Multiple { what: "row", unit: 32, got: 33 }));
}
