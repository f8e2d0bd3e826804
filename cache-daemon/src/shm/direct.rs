//! Bytes straight between a file and a [`Span`] of the region: a block is not copied on its way.
//!
//! Why unsafe: the kernel is given addresses. What must hold: each stays readable and writable for the
//! length given until the call returns. A span keeps its mapping alive, a slice is borrowed; the kernel
//! may write what another process writes as well, so whoever reads checks afterwards what came.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::marker::PhantomData;
use std::os::fd::AsRawFd;

use kv_protocol::Span;

/// Pieces of one transfer: header page, payload, last partial page.
const PARTS_MAX: usize = 3;

/// Memory that one call fills or empties, in order.
pub struct Parts<'a> {
    parts: [libc::iovec; PARTS_MAX],
    memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Parts<'a> {
    /// A span between two private pieces; any may be empty.
    pub fn new(before: &'a mut [u8], span: &'a Span, after: &'a mut [u8]) -> Self {
        let span = (span.address(), span.bytes() as usize);
        let parts = [(before.as_mut_ptr(), before.len()), span, (after.as_mut_ptr(), after.len())];
        let parts =
            parts.map(|(base, bytes)| libc::iovec { iov_base: base.cast(), iov_len: bytes });
        Self { parts, memory: PhantomData }
    }

    /// Fills all of it from `at` on.
    pub fn read(mut self, file: &File, at: u64) -> io::Result<()> {
        self.transfer(file, at, libc::preadv, ErrorKind::UnexpectedEof)
    }

    /// Writes all of it from `at` on, or fails and may have written some.
    pub fn write(mut self, file: &File, at: u64) -> io::Result<()> {
        self.transfer(file, at, libc::pwritev, ErrorKind::WriteZero)
    }

    fn transfer(
        &mut self,
        file: &File,
        mut at: u64,
        call: unsafe extern "C" fn(i32, *const libc::iovec, i32, i64) -> isize,
        nothing: ErrorKind,
    ) -> io::Result<()> {
        while self.parts.iter().any(|part| part.iov_len > 0) {
            let parts = (self.parts.as_ptr(), PARTS_MAX as i32);
            // SAFETY: `parts` are `PARTS_MAX` iovecs that live in `self`. Each names memory that was given
            // to `new` and is borrowed, or kept mapped by a borrowed span, for as long as `self`; `skip`
            // only ever takes bytes off their beginnings. No Rust reference covers a span's bytes, and the
            // slices are borrowed exclusively, so the call is the only one in this process to touch them.
            let moved = unsafe { call(file.as_raw_fd(), parts.0, parts.1, at as i64) };
            match moved {
                0 => return Err(nothing.into()),
                1.. => {
                    at += moved as u64;
                    self.skip(moved as usize);
                }
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    fn skip(&mut self, mut bytes: usize) {
        for part in &mut self.parts {
            let taken = bytes.min(part.iov_len);
            part.iov_base = part.iov_base.cast::<u8>().wrapping_add(taken).cast();
            part.iov_len -= taken;
            bytes -= taken;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_from_a_span_is_read_into_another() {
        let file = tempfile::tempfile().unwrap();
        let (from, to) = (Span::heap(5000), Span::heap(5000));
        from.copy_in(0, &[7; 5000]);
        let (mut before, mut after) = ([1; 16], [2; 3]);
        Parts::new(&mut before, &from, &mut after).write(&file, 10).unwrap();
        let (mut head, mut tail) = ([0; 16], [0; 3]);
        Parts::new(&mut head, &to, &mut tail).read(&file, 10).unwrap();
        let mut read = [0; 5000];
        to.copy_out(0, &mut read);
        assert_eq!((head, read, tail), ([1; 16], [7; 5000], [2; 3]));
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(20).unwrap();
        let read = Parts::new(&mut [0; 16], &Span::heap(16), &mut []).read(&file, 0);
        assert_eq!(read.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_transfer_goes_on_where_a_short_one_ended() {
        let span = Span::heap(4);
        let (mut before, mut after) = ([0; 4], [0; 4]);
        let mut parts = Parts::new(&mut before, &span, &mut after);
        for (skipped, left) in [(3, [1, 4, 4]), (2, [0, 3, 4]), (5, [0, 0, 2])] {
            parts.skip(skipped);
            assert_eq!(parts.parts.map(|part| part.iov_len), left);
        }
    }
}
