//! The fast form. Lanes are keys while scoring (no sum across lanes), dimensions while mixing V.
//!
//! A tile's K is rotated, transposed and kept as `[D][tile]` f32 (16 KiB at D = 64); a score is one
//! chain of `D` multiply-adds in order of dimension. Weights below the mask are exactly 0, and
//! mixing stops at the last visible key, so stale values beyond it are never touched.

use super::{Item, TILE_MAX, tile_tokens};
use crate::math::exp;
use crate::rope::turn;
use crate::simd::{LANES, Simd, Task};

/// Queries scored or mixed together: 4 × 4 vectors of accumulators.
const TOGETHER: usize = 4;

type Lanes = [f32; LANES];

/// Memory of one thread, grown to the largest item seen.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    keys: Vec<Lanes>,    // [D, tile] rotated
    weights: Vec<Lanes>, // [queries, tile]
    mixed: Vec<Lanes>,   // [queries, D]
    totals: Vec<Lanes>,  // [queries] sums of weights, by lane
    largest: Vec<f32>,   // [queries] running maximum
}

pub(super) struct Attend<'a> {
    pub item: &'a Item<'a>,
    pub scratch: &'a mut Scratch,
}

impl Task for Attend<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let wide_tile = tile_tokens(self.item.blocks.shape().tokens_per_block) == TILE_MAX;
        match (wide_tile, self.item.blocks.shape().head_dim.is_multiple_of(64)) {
            (true, true) => self.all::<S, 4, 4>(s),
            (true, false) => self.all::<S, 4, 2>(s),
            (false, true) => self.all::<S, 1, 4>(s),
            (false, false) => self.all::<S, 1, 2>(s),
        }
    }
}

/// Calls `$self.$name::<S, V, Q>` with `Q` = 4 while so many queries are left, then the rest.
macro_rules! in_fours {
    ($count:expr, $first:ident, $call4:expr, $call3:expr, $call2:expr, $call1:expr) => {
        let mut $first = 0;
        while $first < $count {
            match $count - $first {
                1 => $call1,
                2 => $call2,
                3 => $call3,
                _ => $call4,
            }
            $first += TOGETHER;
        }
    };
}

impl Attend<'_> {
    /// `KV`: vectors a tile; `DV`: vectors of a head that are mixed at once.
    #[inline(always)]
    fn all<S: Simd, const KV: usize, const DV: usize>(self, s: S) {
        let item = self.item;
        let shape = item.blocks.shape();
        let group = item.heads / shape.kv_heads;
        let queries = item.tokens * group;
        let head_vectors = shape.head_dim / LANES;
        let scratch = self.scratch;
        scratch.keys.resize(shape.head_dim * KV, [0.0; LANES]);
        scratch.weights.resize(queries * KV, [0.0; LANES]);
        scratch.mixed.clear();
        scratch.mixed.resize(queries * head_vectors, [0.0; LANES]);
        scratch.totals.clear();
        scratch.totals.resize(queries, [0.0; LANES]);
        scratch.largest.clear();
        scratch.largest.resize(queries, f32::NEG_INFINITY);

        let tile = KV * LANES;
        let end = item.first_position + item.tokens;
        for tile_start in (0..end).step_by(tile) {
            let block = item.block_table[tile_start / shape.tokens_per_block] as usize;
            // SAFETY: nobody writes this row while the item runs (contract of `attend`).
            let row = unsafe { item.blocks.row(item.layer, block) };
            // head = row[kv_head, K|V, tile's tokens, :]
            let first = item.kv_head * 2 * shape.head_len()
                + tile_start % shape.tokens_per_block * shape.head_dim;
            let keys = &row[first..first + tile * shape.head_dim];
            let first = first + shape.head_len();
            let values = &row[first..first + tile * shape.head_dim];

            let filled = tile.min(end - tile_start);
            rotate_tile::<S, KV>(s, item, keys, tile_start, filled, &mut scratch.keys);
            // Tokens before `skipped` see no key of this tile.
            let skipped = tile_start.saturating_sub(item.first_position) * group;
            let count = queries - skipped;
            in_fours!(
                count,
                q,
                score::<S, KV, 4>(s, item, group, skipped + q, scratch),
                score::<S, KV, 3>(s, item, group, skipped + q, scratch),
                score::<S, KV, 2>(s, item, group, skipped + q, scratch),
                score::<S, KV, 1>(s, item, group, skipped + q, scratch)
            );
            for query in skipped..queries {
                let visible = item.first_position + query / group + 1 - tile_start;
                soften::<S, KV>(s, query, visible.min(tile), head_vectors, scratch);
            }
            // Queries of four tokens may see different numbers of keys; each group of four stops at
            // its first's, then the rest are mixed one by one, so that order stays the key's.
            in_fours!(
                count,
                q,
                mix_some::<S, KV, DV, 4>(s, item, skipped + q, tile_start, values, scratch),
                mix_some::<S, KV, DV, 3>(s, item, skipped + q, tile_start, values, scratch),
                mix_some::<S, KV, DV, 2>(s, item, skipped + q, tile_start, values, scratch),
                mix_some::<S, KV, DV, 1>(s, item, skipped + q, tile_start, values, scratch)
            );
        }

        for query in 0..queries {
            let total = s.reduce_add(s.load(&scratch.totals[query]));
            let inverse = s.splat(1.0 / total);
            let (token, head) = (query / group, item.kv_head * group + query % group);
            let start = ((item.out_row + token) * item.heads + head) * shape.head_dim;
            // SAFETY: the item's rows and heads of `out` are this call's (contract of `attend`).
            let out = unsafe { item.out.range_mut(start..start + shape.head_dim) };
            let (out, _) = out.as_chunks_mut::<LANES>();
            let mixed = &scratch.mixed[query * head_vectors..(query + 1) * head_vectors];
            for (out, mixed) in out.iter_mut().zip(mixed) {
                s.store(s.mul(s.load(mixed), inverse), out);
            }
        }
    }
}

/// Rotates the tile's keys and lays them out `[D][tile]`, sixteen tokens at a time.
#[inline(always)]
fn rotate_tile<S: Simd, const KV: usize>(
    s: S,
    item: &Item<'_>,
    keys: &[u16], // [tile, D]
    tile_start: usize,
    filled: usize,
    to: &mut [Lanes], // [D, KV]
) {
    let head_dim = item.blocks.shape().head_dim;
    let (keys, _) = keys.as_chunks::<LANES>();
    let (head_vectors, half_vectors) = (head_dim / LANES, head_dim / LANES / 2);
    for strip in 0..filled.div_ceil(LANES) {
        for i in 0..half_vectors {
            let mut low = [s.splat(0.0); LANES];
            let mut high = low;
            for t in 0..LANES {
                let token = strip * LANES + t;
                let (cos, sin) = item.rope.at(tile_start + token);
                let key = token * head_vectors + i;
                let (l, h) = (s.load_f16(&keys[key]), s.load_f16(&keys[key + half_vectors]));
                (low[t], high[t]) = turn(s, l, h, s.load(&cos[i]), s.load(&sin[i]));
            }
            let (low, high) = (s.transpose(low), s.transpose(high));
            for lane in 0..LANES {
                s.store(low[lane], &mut to[(i * LANES + lane) * KV + strip]);
                s.store(high[lane], &mut to[(i * LANES + lane + head_dim / 2) * KV + strip]);
            }
        }
    }
}

/// Scores of `Q` queries against the tile, into `weights`.
#[inline(always)]
fn score<S: Simd, const KV: usize, const Q: usize>(
    s: S,
    item: &Item<'_>,
    group: usize,
    first: usize,
    scratch: &mut Scratch,
) {
    let head_dim = item.blocks.shape().head_dim;
    let query: [&[f32]; Q] = std::array::from_fn(|q| {
        let (token, head) = ((first + q) / group, item.kv_head * group + (first + q) % group);
        let start = token * item.query_stride + head * head_dim;
        &item.queries[start..start + head_dim]
    });
    let (keys, _) = scratch.keys.as_chunks::<KV>();
    let keys = &keys[..head_dim];
    let mut sums = [[s.splat(0.0); KV]; Q];
    for d in 0..head_dim {
        let key: [S::F; KV] = std::array::from_fn(|v| s.load(&keys[d][v]));
        for (sums, query) in sums.iter_mut().zip(&query) {
            let x = s.splat(query[d]);
            for (sum, key) in sums.iter_mut().zip(key) {
                *sum = s.fma(x, key, *sum);
            }
        }
    }
    let weights = scratch.weights[first * KV..(first + Q) * KV].chunks_exact_mut(KV);
    for (sums, weights) in sums.into_iter().zip(weights) {
        for (sum, weight) in sums.into_iter().zip(weights) {
            s.store(sum, weight);
        }
    }
}

/// Turns one query's scores into weights against its running maximum, and rescales what it has
/// gathered when the maximum grew.
#[inline(always)]
fn soften<S: Simd, const KV: usize>(
    s: S,
    query: usize,
    visible: usize,
    head_vectors: usize,
    scratch: &mut Scratch,
) {
    let weights = &mut scratch.weights[query * KV..(query + 1) * KV];
    let mut scores = [s.splat(0.0); KV];
    let mut top = s.splat(f32::NEG_INFINITY);
    for v in 0..KV {
        let shown = visible.saturating_sub(v * LANES).min(LANES);
        scores[v] = s.keep_first(s.load(&weights[v]), shown, f32::NEG_INFINITY);
        top = s.max(top, scores[v]);
    }
    let before = scratch.largest[query];
    let tile_largest = s.reduce_max(top);
    let largest = if tile_largest > before { tile_largest } else { before };
    let mut total = s.load(&scratch.totals[query]);
    if largest > before {
        scratch.largest[query] = largest;
        let shrink = exp(s, s.splat(before - largest));
        total = s.mul(total, shrink);
        for mixed in &mut scratch.mixed[query * head_vectors..(query + 1) * head_vectors] {
            s.store(s.mul(s.load(mixed), shrink), mixed);
        }
    }
    for v in 0..KV {
        let weight = exp(s, s.sub(scores[v], s.splat(largest)));
        total = s.add(total, weight);
        s.store(weight, &mut weights[v]);
    }
    s.store(total, &mut scratch.totals[query]);
}

/// Adds the tile's values, weighted, to `Q` queries.
#[inline(always)]
fn mix_some<S: Simd, const KV: usize, const DV: usize, const Q: usize>(
    s: S,
    item: &Item<'_>,
    first: usize,
    tile_start: usize,
    values: &[u16], // [tile, D]
    scratch: &mut Scratch,
) {
    let group = item.heads / item.blocks.shape().kv_heads;
    let visible =
        |query: usize| (item.first_position + query / group + 1 - tile_start).min(KV * LANES);
    let common = visible(first);
    mix::<S, KV, DV, Q>(s, item, first, 0..common, values, scratch);
    for query in first..first + Q {
        if visible(query) > common {
            mix::<S, KV, DV, 1>(s, item, query, common..visible(query), values, scratch);
        }
    }
}

#[inline(always)]
fn mix<S: Simd, const KV: usize, const DV: usize, const Q: usize>(
    s: S,
    item: &Item<'_>,
    first: usize,
    keys: std::ops::Range<usize>,
    values: &[u16], // [tile, D]
    scratch: &mut Scratch,
) {
    let head_vectors = item.blocks.shape().head_dim / LANES;
    let (values, _) = values.as_chunks::<LANES>();
    let weights: [&[f32]; Q] = std::array::from_fn(|q| {
        let row = &scratch.weights[(first + q) * KV..(first + q + 1) * KV];
        &row.as_flattened()[..keys.end]
    });
    for chunk in (0..head_vectors).step_by(DV) {
        let mut sums: [[S::F; DV]; Q] = std::array::from_fn(|q| {
            std::array::from_fn(|v| s.load(&scratch.mixed[(first + q) * head_vectors + chunk + v]))
        });
        for key in keys.clone() {
            let value: [S::F; DV] =
                std::array::from_fn(|v| s.load_f16(&values[key * head_vectors + chunk + v]));
            for (sums, weights) in sums.iter_mut().zip(&weights) {
                let weight = s.splat(weights[key]);
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum = s.fma(weight, value, *sum);
                }
            }
        }
        for (q, sums) in sums.into_iter().enumerate() {
            let start = (first + q) * head_vectors + chunk;
            for (sum, mixed) in sums.into_iter().zip(&mut scratch.mixed[start..start + DV]) {
                s.store(sum, mixed);
            }
        }
    }
}

pub(super) struct Store<'a> {
    pub from: &'a [f32],
    pub to: &'a mut [u16],
}

/// Largest finite f16.
const F16_MAX: f32 = 65_504.0;

impl Task for Store<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (from, _) = self.from.as_chunks::<LANES>();
        let (to, _) = self.to.as_chunks_mut::<LANES>();
        for (from, to) in from.iter().zip(to) {
            let cut = s.max(s.min(s.load(from), s.splat(F16_MAX)), s.splat(-F16_MAX));
            s.store_f16(cut, to);
        }
    }
}
