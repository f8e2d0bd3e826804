use half::f16;

use super::{FILE_BLOCK_BYTES, MatrixQ8_0, reference};
use crate::matmul::{Matrix, multiply_all};
use crate::quantise::{self, BLOCK, Block, quantise_all};
use crate::simd::{Class, tests::Random};

fn weights(random: &mut Random, columns: usize, inner: usize) -> Vec<u8> {
    let mut file = Vec::new();
    for _ in 0..columns * inner / BLOCK {
        file.extend(f16::from_f32(random.unit() * 0.1).to_le_bytes());
        file.extend((0..32).map(|_| random.bits() as u8)); // -128 too.
    }
    file
}

#[test]
fn every_class_and_every_number_of_rows_gives_the_reference_bits() {
    let mut random = Random(21);
    for (columns, inner) in [(1, 32), (16, 32), (17, 96), (40, 576)] {
        let file = weights(&mut random, columns, inner);
        let matrix = Matrix::Q8_0(MatrixQ8_0::pack(columns, inner, &file, |c| c).unwrap());
        for rows in [1, 2, 3, 7, 8, 13, 31] {
            let floats = random.floats(rows * inner, 4.0);
            let x = quantise_all(Class::detect(), &floats, inner).unwrap();
            let mut row_major = vec![Block::ZERO; rows * inner / BLOCK];
            quantise::reference::quantise(&floats, &mut row_major);
            let mut want = vec![0.0; rows * columns];
            for (x, want) in row_major.chunks(inner / BLOCK).zip(want.chunks_mut(columns)) {
                reference::multiply(inner, &file, x, want);
            }
            for class in Class::available() {
                let mut got = vec![0.0; rows * columns];
                multiply_all(class, &matrix, rows, &x, &mut got).unwrap();
                let bits = |floats: &[f32]| floats.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&got), bits(&want), "{} {columns}×{inner}×{rows}", class.name());
            }
        }
    }
}

#[test]
fn an_embedding_row_equals_the_files_values() {
    let file = weights(&mut Random(22), 20, 64);
    let matrix = Matrix::Q8_0(MatrixQ8_0::pack(20, 64, &file, |c| 19 - c).unwrap());
    let mut row = [0.0; 64];
    matrix.dequantise_row(3, &mut row).unwrap();
    let block = &file[(16 * 2 + 1) * FILE_BLOCK_BYTES..];
    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
    for i in 0..32 {
        assert_eq!(row[32 + i].to_bits(), (f32::from(block[2 + i] as i8) * scale).to_bits());
    }
}
