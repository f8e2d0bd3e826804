//! A buffer that several threads fill at once, each its own part.
//!
//! Why unsafe: the borrow checker cannot see that items of a parallel region write different
//! columns of the same rows. What must hold: ranges that are alive together do not overlap. Who
//! guarantees it: the caller of [`Disjoint::range_mut`], per call, in its SAFETY comment.

use std::marker::PhantomData;
use std::ops::Range;

/// An exclusively borrowed buffer, shared among threads for writing in parts.
#[derive(Debug)]
pub struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out `&mut T` to other threads, which is sending `T`s; that the parts do not
// overlap is the contract of `range_mut`.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: it is an exclusive borrow, which may be sent when its elements may.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Borrows `buffer` for as long as parts of it are handed out.
    pub fn new(buffer: &'a mut [T]) -> Self {
        Self { start: buffer.as_mut_ptr(), len: buffer.len(), borrow: PhantomData }
    }

    /// A second handle to the same buffer; [`Disjoint::range_mut`]'s contract spans both.
    pub fn reborrow(&self) -> Disjoint<'_, T> {
        Disjoint { start: self.start, len: self.len, borrow: PhantomData }
    }

    /// Elements of the whole buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part, for writing. Panics when it lies outside the buffer.
    ///
    /// # Safety
    /// While the part is borrowed, no other call may borrow any of its elements.
    #[expect(clippy::mut_from_ref, reason = "the contract above is what &mut self would give")]
    pub unsafe fn range_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end);
        assert!(range.end <= self.len);
        let start = self.start.wrapping_add(range.start);
        // SAFETY: in bounds (asserted) of a live exclusive borrow; no aliasing by this fn's contract.
        unsafe { std::slice::from_raw_parts_mut(start, range.len()) }
    }
}
