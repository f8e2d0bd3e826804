//! The device pool: `[layer][block][kv_head][K|V][token][head_dim]`, f16, one allocation.
//!
//! Why unsafe: compute threads and a copier touch different rows of the pool at once, which no
//! borrow of the whole can express. What must hold: a row (one layer of one block) has either one
//! kind of reader or one writer at a time. Who guarantees it: the caller of each accessor, by the
//! order of its steps, loads and saves.

use std::alloc::Layout;
use std::ptr::NonNull;

/// Sizes within one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// KV heads.
    pub kv_heads: usize,
    /// Values a head; a multiple of 32.
    pub head_dim: usize,
    /// Tokens a block; a multiple of 16.
    pub tokens_per_block: usize,
}

impl KvShape {
    /// Values of one layer of one block.
    pub fn row_len(&self) -> usize {
        self.kv_heads * 2 * self.head_len()
    }

    /// Values of K (or V) of one head of a row.
    pub fn head_len(&self) -> usize {
        self.tokens_per_block * self.head_dim
    }
}

/// Key or value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Before rotation.
    Key = 0,
    /// As computed.
    Value = 1,
}

/// The pool's memory could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot allocate {bytes} bytes for the device pool; lower runtime.deviceMemory")]
pub struct AllocateError {
    /// What was asked for.
    pub bytes: usize,
}

/// The pool.
#[derive(Debug)]
pub struct KvBlocks {
    start: NonNull<u16>,
    layout: Layout,
    shape: KvShape,
    layers: usize,
    blocks: usize,
}

// SAFETY: plain memory; who may touch which row when is the contract of the accessors.
unsafe impl Send for KvBlocks {}
// SAFETY: as above.
unsafe impl Sync for KvBlocks {}

impl KvBlocks {
    /// Allocates zeroed blocks. The system hands out the pages when they are first touched.
    pub fn new(layers: usize, blocks: usize, shape: KvShape) -> Result<Self, AllocateError> {
        assert!(shape.head_dim.is_multiple_of(32));
        assert!(shape.tokens_per_block.is_multiple_of(16));
        assert!(shape.row_len() > 0);
        let cells = layers.checked_mul(blocks).and_then(|rows| rows.checked_mul(shape.row_len()));
        let bytes = cells.and_then(|cells| cells.checked_mul(2)).unwrap_or(usize::MAX);
        let layout = Layout::from_size_align(bytes, 64).map_err(|_| AllocateError { bytes })?;
        assert!(bytes > 0);
        // SAFETY: the size is not zero (asserted).
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        let start = NonNull::new(start.cast()).ok_or(AllocateError { bytes })?;
        Ok(Self { start, layout, shape, layers, blocks })
    }

    /// Sizes within a row.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Where row (layer, block) starts, in values.
    fn row_start(&self, layer: usize, block: usize) -> usize {
        assert!(layer < self.layers);
        assert!(block < self.blocks);
        (layer * self.blocks + block) * self.shape.row_len() // row = pool[layer, block, …]
    }

    /// One layer of one block, `[kv_head][K|V][token][head_dim]`.
    ///
    /// # Safety
    /// Nobody writes the row while the slice is borrowed.
    #[inline]
    pub unsafe fn row(&self, layer: usize, block: usize) -> &[u16] {
        let start = self.start.as_ptr().wrapping_add(self.row_start(layer, block));
        // SAFETY: in bounds (`row_start` asserts the indices) of memory that lives as long as
        // `self`, initialised by `alloc_zeroed`; no writer by this fn's contract.
        unsafe { std::slice::from_raw_parts(start, self.shape.row_len()) }
    }

    /// One layer of one block, for writing.
    ///
    /// # Safety
    /// Nobody else reads or writes the row while the slice is borrowed.
    #[expect(clippy::mut_from_ref, reason = "the contract above is what &mut self would give")]
    pub unsafe fn row_mut(&self, layer: usize, block: usize) -> &mut [u16] {
        let start = self.start.as_ptr().wrapping_add(self.row_start(layer, block));
        // SAFETY: as in `row`; exclusive by this fn's contract.
        unsafe { std::slice::from_raw_parts_mut(start, self.shape.row_len()) }
    }

    /// K or V of one token of one head, for writing.
    ///
    /// # Safety
    /// Nobody else reads or writes these values while the slice is borrowed.
    #[expect(clippy::mut_from_ref, reason = "the contract above is what &mut self would give")]
    pub unsafe fn token_mut(
        &self,
        (layer, block): (usize, usize),
        kv_head: usize,
        part: Part,
        token: usize,
    ) -> &mut [u16] {
        assert!(kv_head < self.shape.kv_heads);
        assert!(token < self.shape.tokens_per_block);
        // values = row[kv_head, part, token, :]
        let head = (kv_head * 2 + part as usize) * self.shape.head_len();
        let offset = self.row_start(layer, block) + head + token * self.shape.head_dim;
        let start = self.start.as_ptr().wrapping_add(offset);
        // SAFETY: as in `row`, with the indices asserted; exclusive by this fn's contract.
        unsafe { std::slice::from_raw_parts_mut(start, self.shape.head_dim) }
    }
}

impl Drop for KvBlocks {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { std::alloc::dealloc(self.start.as_ptr().cast(), self.layout) }
    }
}
