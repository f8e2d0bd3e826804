//! The definition, in plain loops and double precision; one query head of one token.

use half::f16;

use super::{KvBlocks, Part};
use crate::rope::{self, Table};

/// `query` is rotated and scaled; `out = softmax(query · K) V` over positions `0 ..= position`.
///
/// # Safety
/// Nobody writes the blocks meanwhile.
pub unsafe fn attend(
    (blocks, layer, block_table): (&KvBlocks, usize, &[u32]),
    kv_head: usize,
    rope: &Table,
    position: usize,
    query: &[f32],   // [D]
    out: &mut [f32], // [D]
) {
    let shape = blocks.shape();
    let read = |position: usize, part: Part| -> Vec<f32> {
        let block = block_table[position / shape.tokens_per_block] as usize;
        // SAFETY: by this fn's contract.
        let row = unsafe { blocks.row(layer, block) };
        let head = (kv_head * 2 + part as usize) * shape.head_len();
        let start = head + position % shape.tokens_per_block * shape.head_dim;
        let values = &row[start..start + shape.head_dim];
        values.iter().map(|&bits| f16::from_bits(bits).to_f32()).collect()
    };
    let scores: Vec<f64> = (0..=position)
        .map(|position| {
            let mut key = read(position, Part::Key);
            rope::reference::rotate(rope, position, 1.0, &mut key);
            key.iter().zip(query).map(|(&k, &q)| f64::from(k) * f64::from(q)).sum()
        })
        .collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut sums = vec![0.0_f64; shape.head_dim];
    for (position, weight) in weights.iter().enumerate() {
        for (sum, value) in sums.iter_mut().zip(read(position, Part::Value)) {
            *sum += weight / total * f64::from(value);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = sum as f32;
    }
}
