//! Quantised weights × quantised activations: what all weight formats share.
//!
//! Weights are packed at load in groups of sixteen output columns, so that a vector's lanes are
//! columns: `acc[lane] += …` runs over `K` in one order whatever the number of rows, the tile, or
//! the thread. A tile is one group × up to [`TILE_ROWS`] activation rows (8 float and 8 integer
//! accumulators fit AVX-512's 32 registers); its weights are read once.

use std::ops::Range;

use crate::disjoint::Disjoint;
use crate::error::LaunchError;
use crate::matmul_q4_1::MatrixQ4_1;
use crate::matmul_q8_0::MatrixQ8_0;
use crate::quantise::{BLOCK, Block, TILE_ROWS, tiled_len};
use crate::simd::{Class, LANES, Simd, Task};

/// Activation rows that stay in the second-level cache while a range of groups meets them: 64 rows
/// of 1,536 values take 150 KB.
const PANEL_ROWS: usize = 64;

/// Sixty-four bytes on a cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line<T>(pub T);

/// A weight format: how one group of sixteen columns meets `R` rows.
pub(crate) trait Packed: Sync {
    /// Inner size.
    fn inner(&self) -> usize;
    /// Output columns, padding excluded.
    fn columns(&self) -> usize;
    /// Sums over `K` of group `group` for rows `first .. first + R` of a tile.
    fn tile<S: Simd, const R: usize>(
        &self,
        s: S,
        group: usize,
        x: &[[Block; TILE_ROWS]], // [K / 32]
        first: usize,
    ) -> [S::F; R];
}

/// A packed weight matrix: `[N, K]`, as in the file, of any format.
#[derive(Debug)]
pub enum Matrix {
    /// Four bits with a minimum; also holds Q4_0, whose minimum is `-8 · scale`.
    Q4_1(MatrixQ4_1),
    /// Eight bits.
    Q8_0(MatrixQ8_0),
}

impl Matrix {
    /// Output columns (`N`).
    pub fn columns(&self) -> usize {
        match self {
            Self::Q4_1(matrix) => matrix.columns(),
            Self::Q8_0(matrix) => matrix.columns(),
        }
    }

    /// Inner size (`K`).
    pub fn inner(&self) -> usize {
        match self {
            Self::Q4_1(matrix) => matrix.inner(),
            Self::Q8_0(matrix) => matrix.inner(),
        }
    }

    /// Groups of sixteen columns: the unit of work.
    pub fn groups(&self) -> usize {
        self.columns().div_ceil(LANES)
    }

    /// Bytes held in memory.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Q4_1(matrix) => matrix.bytes(),
            Self::Q8_0(matrix) => matrix.bytes(),
        }
    }

    /// One row of weights as floats (embedding look-up).
    pub fn dequantise_row(&self, row: usize, out: &mut [f32]) -> Result<(), LaunchError> {
        LaunchError::check_equal("out", self.inner(), out.len())?;
        assert!(row < self.columns());
        match self {
            Self::Q4_1(matrix) => matrix.dequantise_row(row, out),
            Self::Q8_0(matrix) => matrix.dequantise_row(row, out),
        }
        Ok(())
    }

    /// `out[t, n] = Σ_k x[t, k] · w[n, k]` for the columns of some groups.
    ///
    /// Same as the format's `reference`, bit for bit.
    ///
    /// # Safety
    /// While this runs, nobody else may touch the columns of `groups` in `out`.
    pub unsafe fn multiply(
        &self,
        class: Class,
        groups: Range<usize>,
        rows: usize,
        x: &[Block], // [T / 8, K / 32, 8]
        out: &Output<'_>,
    ) -> Result<(), LaunchError> {
        LaunchError::check_equal("x", tiled_len(rows, self.inner() / BLOCK), x.len())?;
        assert!(groups.end <= self.groups());
        assert!(out.first_column + self.columns() <= out.stride);
        assert!(rows * out.stride <= out.buffer.len());
        let (x, _) = x.as_chunks::<TILE_ROWS>();
        match self {
            Self::Q4_1(matrix) => class.run(Multiply { matrix, groups, rows, x, out }),
            Self::Q8_0(matrix) => class.run(Multiply { matrix, groups, rows, x, out }),
        }
        Ok(())
    }
}

/// Where a product goes: columns `first_column …` of a row-major buffer.
#[derive(Debug)]
pub struct Output<'a> {
    /// `[T, stride]`.
    pub buffer: Disjoint<'a, f32>,
    /// Values from one row to the next.
    pub stride: usize,
    /// Column of the matrix's first output.
    pub first_column: usize,
}

struct Multiply<'a, P> {
    matrix: &'a P,
    groups: Range<usize>,
    rows: usize,
    x: &'a [[Block; TILE_ROWS]], // [T / 8, K / 32]
    out: &'a Output<'a>,
}

impl<P: Packed> Task for Multiply<'_, P> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for panel in (0..self.rows).step_by(PANEL_ROWS) {
            for group in self.groups.clone() {
                for row in (panel..self.rows.min(panel + PANEL_ROWS)).step_by(TILE_ROWS) {
                    self.tile(s, group, row);
                }
            }
        }
    }
}

impl<P: Packed> Multiply<'_, P> {
    /// One group × the tile that starts at `row`. A part of a tile is computed with as many rows as
    /// its size rounded up to a power of two; the surplus rows are not stored.
    #[inline(always)]
    fn tile<S: Simd>(&self, s: S, group: usize, row: usize) {
        let count = (self.rows - row).min(TILE_ROWS);
        match (S::WIDE, count) {
            (_, 1) => self.part::<S, 1>(s, group, row, 0, count),
            (true, 2) => self.part::<S, 2>(s, group, row, 0, count),
            (true, 3 | 4) => self.part::<S, 4>(s, group, row, 0, count),
            (true, _) => self.part::<S, TILE_ROWS>(s, group, row, 0, count),
            (false, _) => {
                for first in (0..count).step_by(2) {
                    self.part::<S, 2>(s, group, row, first, count);
                }
            }
        }
    }

    #[inline(always)]
    fn part<S: Simd, const R: usize>(
        &self,
        s: S,
        group: usize,
        row: usize,
        first: usize,
        count: usize,
    ) {
        let blocks = self.matrix.inner() / BLOCK;
        let tile = row / TILE_ROWS;
        let x = &self.x[tile * blocks..(tile + 1) * blocks];
        let sums = self.matrix.tile::<S, R>(s, group, x, first);
        let column = group * LANES;
        let width = LANES.min(self.matrix.columns() - column);
        for (r, sum) in sums.into_iter().enumerate().take(count - first) {
            let start = (row + first + r) * self.out.stride + self.out.first_column + column;
            // SAFETY: the columns of `groups` are this call's alone (contract of `multiply`), and
            // the part is dropped before the next is taken.
            let to = unsafe { self.out.buffer.range_mut(start..start + width) };
            if let Ok(to) = to.try_into() {
                s.store(sum, to);
            } else {
                let mut lanes = [0.0; LANES];
                s.store(sum, &mut lanes);
                to.copy_from_slice(&lanes[..width]);
            }
        }
    }
}

/// Multiplies all columns on the calling thread; for tests and small uses.
pub fn multiply_all(
    class: Class,
    matrix: &Matrix,
    rows: usize,
    x: &[Block],
    out: &mut [f32],
) -> Result<(), LaunchError> {
    let stride = matrix.columns();
    LaunchError::check_equal("out", rows * stride, out.len())?;
    let out = Output { buffer: Disjoint::new(out), stride, first_column: 0 };
    // SAFETY: `out` is borrowed exclusively, and this is the only call that sees it.
    unsafe { matrix.multiply(class, 0..matrix.groups(), rows, x, &out) }
}
