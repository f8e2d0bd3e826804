use half::f16;

use super::{FILE_BLOCK_BYTES, FILE_BLOCK_BYTES_Q4_0, MatrixQ4_1, reference};
use crate::error::LaunchError;
use crate::matmul::{Matrix, multiply_all};
use crate::quantise::{self, BLOCK, Block, quantise_all};
use crate::simd::{Class, tests::Random};

fn weights(random: &mut Random, columns: usize, inner: usize) -> Vec<u8> {
    let mut file = Vec::new();
    for _ in 0..columns * inner / BLOCK {
        file.extend(f16::from_f32(random.unit() * 0.1).to_le_bytes());
        file.extend(f16::from_f32(random.unit()).to_le_bytes());
        file.extend((0..16).map(|_| random.bits() as u8));
    }
    file
}

fn bits(floats: &[f32]) -> Vec<u32> {
    floats.iter().map(|f| f.to_bits()).collect()
}

#[test]
fn every_class_and_every_number_of_rows_gives_the_reference_bits() {
    let mut random = Random(11);
    for (columns, inner) in [(1, 32), (16, 32), (17, 96), (40, 576)] {
        let file = weights(&mut random, columns, inner);
        let matrix = Matrix::Q4_1(MatrixQ4_1::pack(columns, inner, &file, |c| c).unwrap());
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
                assert_eq!(bits(&got), bits(&want), "{} {columns}×{inner}×{rows}", class.name());
            }
        }
    }
}

#[test]
fn an_embedding_row_equals_the_files_values() {
    let mut random = Random(12);
    let file = weights(&mut random, 20, 64);
    let matrix = Matrix::Q4_1(MatrixQ4_1::pack(20, 64, &file, |c| 19 - c).unwrap());
    let mut row = [0.0; 64];
    matrix.dequantise_row(3, &mut row).unwrap();
    let block = &file[16 * 2 * FILE_BLOCK_BYTES..];
    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let minimum = f16::from_le_bytes([block[2], block[3]]).to_f32();
    assert_eq!(row[5].to_bits(), f32::from(block[9] & 15).mul_add(scale, minimum).to_bits());
    assert_eq!(row[21].to_bits(), f32::from(block[9] >> 4).mul_add(scale, minimum).to_bits());
}

#[test]
fn q4_0_is_q4_1_with_a_minimum_of_minus_eight_scales() {
    let mut random = Random(13);
    let mut file = Vec::new();
    for _ in 0..16 {
        file.extend(f16::from_f32(random.unit()).to_le_bytes());
        file.extend((0..16).map(|_| random.bits() as u8));
    }
    let matrix = Matrix::Q4_1(MatrixQ4_1::pack_q4_0(16, 32, &file, |c| c).unwrap());
    let mut row = [0.0; 32];
    for (n, block) in file.chunks(FILE_BLOCK_BYTES_Q4_0).enumerate() {
        matrix.dequantise_row(n, &mut row).unwrap();
        let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
        for i in 0..16 {
            assert!((row[i] - scale * (f32::from(block[2 + i] & 15) - 8.0)).abs() < 1.0e-6);
            assert!((row[16 + i] - scale * (f32::from(block[2 + i] >> 4) - 8.0)).abs() < 1.0e-6);
        }
    }
}

#[test]
fn weights_of_the_wrong_length_are_refused() {
    let refused = MatrixQ4_1::pack(16, 32, &[0; 319], |c| c).unwrap_err();
    assert_eq!(refused, LaunchError::Shape { what: "weights", expected: 320, got: 319 });
}
