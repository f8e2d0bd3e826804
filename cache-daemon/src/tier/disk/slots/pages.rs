//! Page-aligned private memory, for header pages: payloads go straight between slot and frame.

use std::ops::{Deref, DerefMut};

use super::format::PAGE_BYTES;

/// Whole pages, zeroed at first.
#[derive(Debug)]
pub struct Pages {
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
}

impl Pages {
    /// So many.
    pub fn new(count: usize) -> Self {
        let bytes = count * PAGE_BYTES;
        let memory = vec![0; bytes + PAGE_BYTES]; // An aligned start fits wherever the memory lies.
        let address = memory.as_ptr().addr();
        let start = address.next_multiple_of(PAGE_BYTES) - address;
        Self { memory, start, bytes }
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.bytes]
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.bytes]
    }
}
