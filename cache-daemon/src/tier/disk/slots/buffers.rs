//! Page-aligned bounce buffers between slots and frames, used again and again.
//!
//! Bytes pass through private memory on purpose: a frame's peer may write at any time, and what is
//! checked must be what is stored, or served.

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, PoisonError};

use super::format::PAGE_BYTES;

/// Most bytes of buffers at once: blocks of 8 MB on all readers' way. One buffer may exceed it.
const BUFFER_BYTES_MAX: usize = 72 << 20;

#[derive(Debug, Default)]
struct Pool {
    idle: Vec<Vec<u8>>,
    /// Of buffers in use and idle.
    bytes: usize,
    in_use: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Buffers {
    pool: Mutex<Pool>,
    returned: Condvar,
}

/// Bytes that start at a page boundary; the contents are left over from earlier use.
pub struct Buffer<'a> {
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
    home: &'a Buffers,
}

impl Buffers {
    /// A buffer of `bytes`; waits while too many bytes are in use.
    pub fn take(&self, bytes: usize) -> Buffer<'_> {
        let needed = bytes + PAGE_BYTES; // So that an aligned start fits wherever the memory lies.
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(fitting) = pool.idle.iter().position(|memory| memory.len() >= needed) {
                let memory = pool.idle.swap_remove(fitting);
                pool.in_use += 1;
                return self.lend(memory, bytes);
            }
            while pool.bytes + needed > BUFFER_BYTES_MAX {
                let Some(small) = pool.idle.pop() else { break };
                pool.bytes -= small.len();
            }
            if pool.in_use == 0 || pool.bytes + needed <= BUFFER_BYTES_MAX {
                pool.bytes += needed;
                pool.in_use += 1;
                return self.lend(vec![0; needed], bytes);
            }
            pool = self.returned.wait(pool).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lend(&self, memory: Vec<u8>, bytes: usize) -> Buffer<'_> {
        let address = memory.as_ptr().addr();
        let start = address.next_multiple_of(PAGE_BYTES) - address;
        Buffer { memory, start, bytes, home: self }
    }
}

impl Deref for Buffer<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.bytes]
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.bytes]
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        let mut pool = self.home.pool.lock().unwrap_or_else(PoisonError::into_inner);
        pool.in_use -= 1;
        pool.idle.push(std::mem::take(&mut self.memory));
        drop(pool);
        self.home.returned.notify_one();
    }
}
