//! Frames of the region: what the engine hands to a backend's copier, and what returns pins and credits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kv_protocol::message::FrameHandle;
use kv_protocol::table::FrameTable;
use kv_protocol::{BlockKey, NumericsTag, Variant};

use crate::batch::{ReadFrames, WriteFrame};

/// One attachment, as long as anybody may still touch its frames. The link re-attaches early when the
/// last frame of the old attachment is let go: then no copy can be running.
#[derive(Debug)]
pub(super) struct AttachmentLife {
    pub(super) table: FrameTable,
    /// What was dropped since the client last looked.
    released: Mutex<Released>,
}

/// What is given back by dropping it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Released {
    pub(super) pins: Vec<FrameHandle>,
    /// Pins of frames that do not hold what was found in them.
    pub(super) rejected: Vec<FrameHandle>,
    /// Frames that were taken and not committed.
    pub(super) credits: Vec<FrameHandle>,
}

impl AttachmentLife {
    pub(super) fn new(table: FrameTable) -> Arc<Self> {
        Arc::new(Self { table, released: Mutex::default() })
    }

    fn released(&self) -> MutexGuard<'_, Released> {
        self.released.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pins that nobody will use.
    pub(super) fn release_pins(&self, handles: impl Iterator<Item = FrameHandle>) {
        self.released().pins.extend(handles);
    }

    /// The pin of a frame that does not hold what was found in it.
    pub(super) fn reject(&self, handle: FrameHandle) {
        self.released().rejected.push(handle);
    }

    pub(super) fn take_released(&self) -> Released {
        std::mem::take(&mut self.released())
    }
}

/// What a pinned frame has to hold.
#[derive(Debug)]
pub(super) struct Pinned {
    pub(super) handle: FrameHandle,
    pub(super) key: BlockKey,
    pub(super) variant: Variant,
    pub(super) numerics: NumericsTag,
    pub(super) token_count: u16,
}

/// Frames of one answer, which this runtime may read. Dropping them returns their pins.
#[derive(Debug)]
pub(super) struct PinnedFrames {
    life: Arc<AttachmentLife>,
    pub(super) blocks: Vec<Pinned>,
    /// Places of frames that do not hold their block.
    rejected: Mutex<Vec<usize>>,
}

impl PinnedFrames {
    pub(super) fn new(life: &Arc<AttachmentLife>, blocks: Vec<Pinned>) -> Self {
        Self { life: life.clone(), blocks, rejected: Mutex::default() }
    }
}

impl ReadFrames for PinnedFrames {
    fn checksums(&self, place: usize) -> Option<Vec<u32>> {
        let block = &self.blocks[place];
        let mut copy = Vec::new();
        // With a checksum of its own, and of this generation: from here on the rows tell whether the frame has
        // become another block's.
        let header = self.life.table.header_view(block.handle, &mut copy).ok()?;
        let is_right = header.key() == block.key
            && header.variant() == Ok(block.variant)
            && header.numerics() == block.numerics
            && header.tokens().len() == usize::from(block.token_count);
        is_right.then(|| header.checksums().collect())
    }

    fn read(&self, place: usize, offset: usize, to: &mut [u8]) {
        self.life.table.copy_out(self.blocks[place].handle.frame, offset as u64, to);
    }

    fn reject(&self, place: usize) {
        self.rejected.lock().unwrap_or_else(PoisonError::into_inner).push(place);
    }
}

impl Drop for PinnedFrames {
    fn drop(&mut self) {
        let rejected = self.rejected.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut released = self.life.released();
        for (place, block) in self.blocks.iter().enumerate() {
            if rejected.contains(&place) {
                released.rejected.push(block.handle);
            } else {
                released.pins.push(block.handle);
            }
        }
    }
}

/// A free frame that this runtime may fill. Dropping the last clone of its `Arc` gives it back, if it was not
/// committed.
#[derive(Debug)]
pub(super) struct GrantedFrame {
    life: Arc<AttachmentLife>,
    handle: FrameHandle,
    /// The frame went to the daemon: nothing to give back.
    committed: AtomicBool,
}

impl GrantedFrame {
    pub(super) fn new(life: &Arc<AttachmentLife>, handle: FrameHandle) -> Arc<Self> {
        Arc::new(Self { life: life.clone(), handle, committed: AtomicBool::new(false) })
    }

    pub(super) fn life(&self) -> &Arc<AttachmentLife> {
        &self.life
    }

    pub(super) fn handle(&self) -> FrameHandle {
        self.handle
    }

    pub(super) fn set_committed(&self) {
        self.committed.store(true, Ordering::Relaxed);
    }
}

impl WriteFrame for GrantedFrame {
    fn write(&self, offset: usize, from: &[u8]) {
        self.life.table.copy_in(self.handle.frame, offset as u64, from);
    }
}

impl Drop for GrantedFrame {
    fn drop(&mut self) {
        if !self.committed.load(Ordering::Relaxed) {
            self.life.released().credits.push(self.handle);
        }
    }
}
