//! Rotary position embedding: dimension `i` of a head turns with dimension `i + D / 2` by
//! `position · theta^(-2 i / D)` ("halves" order; files that store neighbouring pairs are reordered
//! when their weights are packed).
//!
//! Angles are built in double precision by functions in plain Rust (the C library's may differ in
//! the last bit from machine to machine): f32 angles err by 4e-3 at position 1e5.

mod cpu;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::error::LaunchError;
use crate::simd::{Class, LANES, Simd};

/// Cosines and sines of all positions.
#[derive(Debug)]
pub struct Table {
    half: usize,
    positions: usize,
    values: Vec<[f32; LANES]>, // [positions, cos|sin, D / 2]
}

impl Table {
    /// Builds the table for at least `positions` positions; rounded up to whole attention tiles.
    /// `factors` divide the frequencies (`rope_freqs.weight` of Llama 3.1 files).
    pub fn new(
        head_dim: usize,
        theta: f64,
        factors: Option<&[f32]>, // [D / 2]
        positions: usize,
    ) -> Result<Self, LaunchError> {
        LaunchError::check_multiple("head_dim", 2 * LANES, head_dim)?;
        let half = head_dim / 2;
        if let Some(factors) = factors {
            LaunchError::check_equal("rope factors", half, factors.len())?;
        }
        let positions = positions.next_multiple_of(crate::paged_attention::TILE_MAX);
        let frequency = |i: usize| {
            let exponent = -2.0 * i as f64 / head_dim as f64;
            libm::pow(theta, exponent) / factors.map_or(1.0, |factors| f64::from(factors[i]))
        };
        let frequencies: Vec<f64> = (0..half).map(frequency).collect();
        let mut values = Vec::with_capacity(positions * head_dim / LANES);
        for position in 0..positions {
            for function in [libm::cos, libm::sin] {
                for lanes in frequencies.chunks_exact(LANES) {
                    let angle = |l: usize| position as f64 * lanes[l];
                    values.push(std::array::from_fn(|l| function(angle(l)) as f32));
                }
            }
        }
        Ok(Self { half, positions, values })
    }

    /// Values a head.
    pub fn head_dim(&self) -> usize {
        2 * self.half
    }

    /// Positions that have an entry.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Cosines and sines of one position, `D / 2` values each.
    #[inline(always)]
    pub(crate) fn at(&self, position: usize) -> (&[[f32; LANES]], &[[f32; LANES]]) {
        let vectors = self.half / LANES;
        let row = &self.values[position * 2 * vectors..(position + 1) * 2 * vectors];
        row.split_at(vectors)
    }
}

/// Rotates one pair of vectors: dimensions `i …` and `D / 2 + i …` of a head.
#[inline(always)]
pub(crate) fn turn<S: Simd>(s: S, low: S::F, high: S::F, cos: S::F, sin: S::F) -> (S::F, S::F) {
    let turned_low = s.sub(s.mul(low, cos), s.mul(high, sin));
    let turned_high = s.add(s.mul(high, cos), s.mul(low, sin));
    (turned_low, turned_high)
}

/// Rotates all heads of one token in place, then multiplies by `scale`.
///
/// Same as [`reference::rotate`], bit for bit.
pub fn rotate(
    class: Class,
    table: &Table,
    position: usize,
    scale: f32,
    heads: &mut [f32], // [H, D]
) -> Result<(), LaunchError> {
    LaunchError::check_multiple("heads", table.head_dim(), heads.len())?;
    assert!(position < table.positions);
    class.run(cpu::Rotate { table, position, scale, heads });
    Ok(())
}
