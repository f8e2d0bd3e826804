use super::{TOLERANCE, reference, swiglu};
use crate::simd::{Class, tests::Random};

#[test]
fn every_class_gives_the_same_bits_near_the_reference() {
    let mut random = Random(41);
    for scale in [0.01, 1.0, 20.0, 200.0] {
        let (gate, up) = (random.floats(1536, scale), random.floats(1536, 3.0));
        let mut want = vec![0.0; 1536];
        reference::swiglu(&gate, &up, &mut want);
        let mut scalar = vec![0.0; 1536];
        swiglu(Class::scalar(), &gate, &up, &mut scalar).unwrap();
        for (got, want) in scalar.iter().zip(&want) {
            assert!((got - want).abs() <= TOLERANCE * want.abs() + 1.0e-30, "{got} {want}");
        }
        for class in Class::available() {
            let mut got = vec![0.0; 1536];
            swiglu(class, &gate, &up, &mut got).unwrap();
            let bits = |v: &[f32]| v.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&scalar), "class {}", class.name());
        }
    }
}
