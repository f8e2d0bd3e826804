//! Causal attention of new tokens over K and V that lie in device blocks, K before rotation.
//!
//! One call is one item of work: some consecutive query tokens of one sequence and all query heads
//! of one KV head. It walks the keys tile by tile (a tile is a block, or part of one): rotates the
//! tile's K, scores all queries, and folds the tile into a running softmax. Tiles and the order
//! within them are fixed by token position, so a query's result does not depend on how many queries
//! share the call. K and V are read as rounded to f16 even when this very step computed them.

mod blocks;
mod cpu;
pub mod reference;
#[cfg(test)]
mod tests;

use std::cell::RefCell;

pub use blocks::{AllocateError, KvBlocks, KvShape, Part};

use crate::disjoint::Disjoint;
use crate::error::LaunchError;
use crate::rope::Table;
use crate::simd::{Class, LANES};

/// Largest tile, in tokens.
pub const TILE_MAX: usize = 64;

/// Query vectors (tokens × heads a KV head) that one call takes at most: K's rotation, which a call
/// repeats for its tiles, is then a tenth of its work, and its state stays in the second-level cache.
pub const QUERIES_MAX: usize = 48;

/// Largest error against [`reference::attend`], which works in double precision: sums of `D` and
/// of some hundred products, each rounded at 6e-8, on scores of magnitude ten.
pub const TOLERANCE: f32 = 2.0e-5;

/// Tokens a tile, given tokens a block.
pub fn tile_tokens(tokens_per_block: usize) -> usize {
    if tokens_per_block.is_multiple_of(TILE_MAX) { TILE_MAX } else { LANES }
}

/// One item of work.
#[derive(Debug)]
pub struct Item<'a> {
    /// Where K and V lie.
    pub blocks: &'a KvBlocks,
    /// Which layer of them.
    pub layer: usize,
    /// The sequence's blocks in token order.
    pub block_table: &'a [u32],
    /// Which KV head.
    pub kv_head: usize,
    /// Query heads of the model.
    pub heads: usize,
    /// Rotated and scaled queries of the item's tokens; `query_stride` values from token to token.
    pub queries: &'a [f32], // [T, query_stride], first H · D of each row
    /// See `queries`.
    pub query_stride: usize,
    /// Position of the first query token; the others follow.
    pub first_position: usize,
    /// Query tokens.
    pub tokens: usize,
    /// Rotation of K.
    pub rope: &'a Table,
    /// Where the results go.
    pub out: &'a Disjoint<'a, f32>, // [.., H · D]
    /// Row of `out` of the first query token.
    pub out_row: usize,
}

thread_local! {
    // Grown on first use, then kept: no allocation in a step.
    static SCRATCH: RefCell<cpu::Scratch> = RefCell::default();
}

/// Query tokens that one item may hold.
pub fn tokens_max(heads: usize, kv_heads: usize) -> usize {
    (QUERIES_MAX / (heads / kv_heads)).max(1)
}

/// Computes one item.
///
/// Same as [`reference::attend`] within [`TOLERANCE`]; all classes and all cuts into items give
/// the same bits.
///
/// # Safety
/// While this runs nobody writes layer `layer` of the blocks in `block_table` that hold positions
/// up to the last query, and nobody else touches the item's rows and heads of `out`.
pub unsafe fn attend(class: Class, item: &Item<'_>) -> Result<(), LaunchError> {
    let shape = item.blocks.shape();
    let width = item.heads * shape.head_dim;
    LaunchError::check_equal("rope table's head_dim", shape.head_dim, item.rope.head_dim())?;
    LaunchError::check_multiple("heads", shape.kv_heads, item.heads)?;
    LaunchError::check_multiple("tokens", 1, item.tokens)?;
    let end = item.first_position + item.tokens;
    assert!(item.tokens <= tokens_max(item.heads, shape.kv_heads));
    assert!(item.kv_head < shape.kv_heads);
    assert!(item.query_stride >= width);
    assert!(item.queries.len() >= (item.tokens - 1) * item.query_stride + width);
    assert!(end <= item.block_table.len() * shape.tokens_per_block);
    assert!(end <= item.rope.positions());
    assert!((item.out_row + item.tokens) * width <= item.out.len());
    SCRATCH.with_borrow_mut(|scratch| class.run(cpu::Attend { item, scratch }));
    Ok(())
}

/// Rounds one token's K or V of one head to f16, as the blocks hold it. Values beyond f16's range
/// are cut to its largest.
pub fn store(class: Class, from: &[f32], to: &mut [u16]) -> Result<(), LaunchError> {
    LaunchError::check_multiple("head", LANES, from.len())?;
    LaunchError::check_equal("stored head", from.len(), to.len())?;
    class.run(cpu::Store { from, to });
    Ok(())
}
