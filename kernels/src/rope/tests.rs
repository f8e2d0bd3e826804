use super::{Table, reference, rotate};
use crate::error::LaunchError;
use crate::simd::{Class, tests::Random};

#[test]
fn every_class_equals_the_reference() {
    let mut random = Random(51);
    for head_dim in [32, 64, 96, 128] {
        let table = Table::new(head_dim, 1.0e5, None, 200).unwrap();
        let heads = random.floats(3 * head_dim, 2.0);
        let mut want = heads.clone();
        reference::rotate(&table, 173, 0.125, &mut want);
        for class in Class::available() {
            let mut got = heads.clone();
            rotate(class, &table, 173, 0.125, &mut got).unwrap();
            let bits = |v: &[f32]| v.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&want), "class {}", class.name());
        }
    }
}

#[test]
fn position_zero_leaves_a_head_as_it_is() {
    let table = Table::new(32, 1.0e4, None, 1).unwrap();
    let mut head = Random(52).floats(32, 1.0);
    let before = head.clone();
    rotate(Class::detect(), &table, 0, 1.0, &mut head).unwrap();
    assert_eq!(head, before);
}

#[test]
fn scores_depend_on_the_distance_of_positions_only() {
    let table = Table::new(64, 1.0e5, None, 4096).unwrap();
    let (q, k) = (Random(53).floats(64, 1.0), Random(54).floats(64, 1.0));
    let score = |q_position, k_position| {
        let (mut q, mut k) = (q.clone(), k.clone());
        rotate(Class::detect(), &table, q_position, 1.0, &mut q).unwrap();
        rotate(Class::detect(), &table, k_position, 1.0, &mut k).unwrap();
        q.iter().zip(&k).map(|(a, b)| a * b).sum::<f32>()
    };
    assert!((score(9, 2) - score(4009, 4002)).abs() < 1.0e-4);
}

#[test]
fn a_head_that_is_no_multiple_of_32_is_refused() {
    let refused = Table::new(80, 1.0e4, None, 1).unwrap_err();
    assert_eq!(refused, LaunchError::Multiple { what: "head_dim", unit: 32, got: 80 });
}
