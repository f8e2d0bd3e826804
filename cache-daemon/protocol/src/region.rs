//! Access to mapped memory that another process writes too. The only unsafe module of this crate.
//!
//! Why unsafe: the bytes are not Rust's. What must hold: (1) a [`Mapping`] stays mapped, readable and
//! writable, at one address, as long as it lives; (2) every access lies inside it; (3) no `&[u8]` ever
//! covers it. (1) is the implementer's promise (daemon: `shm/map.rs`, runtime: `cache_client.rs`, both
//! over a memfd sealed against shrinking, so no access can meet a missing page); (2) is asserted in
//! each function here; (3) holds because this module hands out atomics and copies only.

use std::fmt;
use std::sync::Arc;

use crate::sync::{AtomicU32, AtomicU64};

/// Memory shared with another process.
///
/// # Safety
/// `base()` must be 4,096-aligned and point to `bytes()` bytes that are initialised, readable and
/// writable by this process until the value is dropped, at an address that never changes. Nothing in
/// this process may hold a Rust reference to these bytes other than to atomics.
pub unsafe trait Mapping: Send + Sync {
    /// First byte.
    fn base(&self) -> *mut u8;
    /// Length.
    fn bytes(&self) -> usize;
}

/// A region's memory; cheap to clone, keeps the mapping alive.
#[derive(Clone)]
pub struct Region {
    mapping: Arc<dyn Mapping>,
    base: *mut u8,
    bytes: u64,
}

// SAFETY: `base` points into `mapping`, which is Send and Sync and lives as long as this value; all
// access through `base` is by atomics, or by raw copies whose races are excluded or checked above
// (frame states, checksums).
unsafe impl Send for Region {}
// SAFETY: as for Send; no method gives out non-atomic references.
unsafe impl Sync for Region {}

/// Why memory cannot be used as a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// Not even the fixed part fits.
    #[error("a region needs more than {needed} bytes, this mapping has {found}")]
    TooSmall {
        /// Mapped.
        found: u64,
        /// Of header and attachment areas.
        needed: u64,
    },
    /// The mapping is not page aligned.
    #[error("the mapping does not start at a page boundary")]
    Unaligned,
}

impl Region {
    /// Takes a mapping over.
    pub fn new(mapping: Arc<dyn Mapping>) -> Result<Self, RegionError> {
        let (base, bytes) = (mapping.base(), mapping.bytes() as u64);
        if bytes < crate::layout::FRAME_TABLE_AT {
            return Err(RegionError::TooSmall {
                found: bytes,
                needed: crate::layout::FRAME_TABLE_AT,
            });
        }
        if !base.addr().is_multiple_of(crate::layout::PAGE_BYTES as usize) {
            return Err(RegionError::Unaligned);
        }
        Ok(Self { mapping, base, bytes })
    }

    /// Private memory with the same rules: for tests.
    pub fn heap(bytes: u64) -> Self {
        Self::new(Arc::new(Heap::new(bytes as usize))).expect("a page-aligned heap of enough bytes")
    }

    /// Length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether two values see the same mapping.
    pub fn is_same(&self, other: &Region) -> bool {
        Arc::ptr_eq(&self.mapping, &other.mapping)
    }

    /// Address of `offset`, for `bytes` bytes aligned to `align`. Panics outside the region: offsets
    /// come from [`crate::layout`] or were checked when a peer named them.
    fn at(&self, offset: u64, bytes: u64, align: u64) -> *mut u8 {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "{bytes} bytes at {offset} of {self:?}");
        assert!(offset.is_multiple_of(align), "offset {offset} is not aligned to {align}");
        self.base.wrapping_add(offset as usize)
    }

    /// An atomic word.
    #[expect(clippy::cast_ptr_alignment, reason = "`at` asserts the alignment")]
    pub fn atomic_u32(&self, offset: u64) -> &AtomicU32 {
        let word = self.at(offset, 4, 4).cast::<u32>();
        // SAFETY: inside the mapping and aligned (asserted in `at`; the base is page aligned). The
        // mapping lives as long as `self`. All access in this process is atomic or by raw copies of
        // other offsets (invariant 3 of the module).
        unsafe { AtomicU32::from_ptr(word) }
    }

    /// An atomic word.
    #[expect(clippy::cast_ptr_alignment, reason = "`at` asserts the alignment")]
    pub fn atomic_u64(&self, offset: u64) -> &AtomicU64 {
        let word = self.at(offset, 8, 8).cast::<u64>();
        // SAFETY: as in `atomic_u32`, with 8 bytes.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// Neighbouring atomic words.
    #[expect(clippy::cast_ptr_alignment, reason = "`at` asserts the alignment")]
    pub fn atomics(&self, offset: u64, count: usize) -> &[AtomicU64] {
        let first = self.at(offset, 8 * count as u64, 8).cast::<AtomicU64>().cast_const();
        // SAFETY: `8 * count` bytes from `first` are inside the mapping and aligned (asserted in `at`);
        // `AtomicU64` has the layout of `u64`, any bytes are a value; lifetime as in `atomic_u32`.
        unsafe { std::slice::from_raw_parts(first, count) }
    }

    /// Copies bytes out. A concurrent writer makes the copy a mixture; whoever calls checks it.
    pub fn copy_out(&self, offset: u64, to: &mut [u8]) {
        let from = self.at(offset, to.len() as u64, 1).cast_const();
        // SAFETY: the source is inside the mapping (asserted in `at`), the target is a live exclusive
        // slice of private memory: they do not overlap. Bytes need no alignment and are initialised.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies bytes in. The frame state, or the ring's order, excludes other writers.
    pub fn copy_in(&self, offset: u64, from: &[u8]) {
        let to = self.at(offset, from.len() as u64, 1);
        // SAFETY: the target is inside the mapping (asserted in `at`), the source is private memory:
        // they do not overlap. No Rust reference covers the target (invariant 3 of the module).
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// A private copy.
    pub fn read(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut copy = vec![0; bytes];
        self.copy_out(offset, &mut copy);
        copy
    }

    /// A part of it. Panics outside.
    pub fn span(&self, offset: u64, bytes: u64) -> Span {
        self.at(offset, bytes, 1);
        Span { region: self.clone(), at: offset, bytes }
    }
}

/// Consecutive bytes of a region, or private pages under the same rules: a block's payload on its way to
/// or from a drive. Keeps the mapping alive.
#[derive(Debug, Clone)]
pub struct Span {
    region: Region,
    at: u64,
    bytes: u64,
}

impl Span {
    /// Zeroed private pages.
    pub fn heap(bytes: u64) -> Self {
        let heap = Heap::new(bytes as usize);
        let region = Region { base: heap.base, mapping: Arc::new(heap), bytes };
        region.span(0, bytes)
    }

    /// Length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A part of it. Panics outside.
    #[must_use]
    pub fn part(&self, offset: u64, bytes: u64) -> Self {
        self.check(offset, bytes);
        Self { region: self.region.clone(), at: self.at + offset, bytes }
    }

    /// As [`Region::copy_out`].
    pub fn copy_out(&self, offset: u64, to: &mut [u8]) {
        self.check(offset, to.len() as u64);
        self.region.copy_out(self.at + offset, to);
    }

    /// As [`Region::copy_in`].
    pub fn copy_in(&self, offset: u64, from: &[u8]) {
        self.check(offset, from.len() as u64);
        self.region.copy_in(self.at + offset, from);
    }

    /// The first of [`Span::bytes`] bytes, for a system call that reads or writes them. They stay mapped,
    /// readable and writable while this value lives; others may write them at any time.
    pub fn address(&self) -> *mut u8 {
        self.region.at(self.at, self.bytes, 1)
    }

    fn check(&self, offset: u64, bytes: u64) {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "{bytes} bytes at {offset} of {self:?}");
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a region of {} bytes", self.bytes)
    }
}

/// Zeroed pages of the heap.
struct Heap {
    base: *mut u8,
    layout: std::alloc::Layout,
}

// SAFETY: the allocation is owned by this value alone and reached through `Region` only.
unsafe impl Send for Heap {}
// SAFETY: as for Send.
unsafe impl Sync for Heap {}

impl Heap {
    fn new(bytes: usize) -> Self {
        let layout = std::alloc::Layout::from_size_align(bytes.max(1), 4096).expect("a size");
        // SAFETY: the layout's size is not zero.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        if base.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Self { base, layout }
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { std::alloc::dealloc(self.base, self.layout) }
    }
}

// SAFETY: the allocation is page aligned, zero-initialised, and lives until drop; its bytes are reached
// through `Region` only.
unsafe impl Mapping for Heap {
    fn base(&self) -> *mut u8 {
        self.base
    }

    fn bytes(&self) -> usize {
        self.layout.size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::FRAME_TABLE_AT;
    use crate::sync::Ordering;

    #[test]
    fn bytes_written_are_read_back_and_words_share_them() {
        let region = Region::heap(FRAME_TABLE_AT + 4096);
        region.copy_in(FRAME_TABLE_AT, &0x0102_0304_0506_0708u64.to_le_bytes());
        assert_eq!(
            region.atomic_u64(FRAME_TABLE_AT).load(Ordering::Relaxed),
            0x0102_0304_0506_0708
        );
        assert_eq!(region.read(FRAME_TABLE_AT + 6, 2), [2, 1]);
    }

    #[test]
    fn a_part_of_a_span_is_the_same_memory() {
        let region = Region::heap(FRAME_TABLE_AT + 4096);
        let part = region.span(FRAME_TABLE_AT, 4096).part(100, 8);
        part.copy_in(2, &[7, 8]);
        assert_eq!(region.read(FRAME_TABLE_AT + 102, 2), [7, 8]);
        assert_eq!(part.address().addr(), region.span(FRAME_TABLE_AT + 100, 1).address().addr());
        assert!(Span::heap(5).address().addr().is_multiple_of(4096));
    }

    #[test]
    #[should_panic(expected = "bytes at")]
    fn a_part_beyond_a_span_is_refused() {
        let _ = Region::heap(FRAME_TABLE_AT).span(0, 16).part(8, 9);
    }

    #[test]
    #[should_panic(expected = "bytes at")]
    fn an_offset_outside_is_refused() {
        let region = Region::heap(FRAME_TABLE_AT);
        region.read(FRAME_TABLE_AT - 4, 8);
    }
}
