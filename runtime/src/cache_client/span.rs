//! Spans of frames: what the engine hands to a backend's copier, and what returns pins and credits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kv_protocol::FrameIndex;
use kv_protocol::message::FrameHandle;
use kv_protocol::table::FrameTable;

use crate::batch::FrameBytes;

/// One attachment, as long as anybody may still touch its frames. The link re-attaches early when the
/// last span of the old attachment is gone: then no copy can be running.
#[derive(Debug)]
pub(super) struct AttachmentLife {
    pub(super) table: FrameTable,
    /// Spans dropped since the client last looked.
    released: Mutex<Released>,
}

/// What dropped spans give back.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Released {
    pub(super) pins: Vec<FrameHandle>,
    /// Frames that were taken and not committed.
    pub(super) credits: Vec<FrameHandle>,
}

impl AttachmentLife {
    pub(super) fn new(table: FrameTable) -> Arc<Self> {
        Arc::new(Self { table, released: Mutex::default() })
    }

    /// Pins that nobody will use.
    pub(super) fn release_pins(&self, handles: impl Iterator<Item = FrameHandle>) {
        self.released.lock().unwrap_or_else(PoisonError::into_inner).pins.extend(handles);
    }

    pub(super) fn take_released(&self) -> Released {
        std::mem::take(&mut self.released.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    Pin,
    Credit,
}

/// One frame that this runtime may read (pinned) or fill (granted). Dropping the last clone of its
/// `Arc` returns the pin, or the frame if it was not committed.
#[derive(Debug)]
pub struct FrameSpan {
    life: Arc<AttachmentLife>,
    handle: FrameHandle,
    hold: Hold,
    /// The frame went to the daemon: nothing to give back.
    committed: AtomicBool,
}

impl FrameSpan {
    pub(super) fn pinned(life: &Arc<AttachmentLife>, handle: FrameHandle) -> Arc<Self> {
        Arc::new(Self {
            life: life.clone(),
            handle,
            hold: Hold::Pin,
            committed: AtomicBool::new(false),
        })
    }

    pub(super) fn granted(life: &Arc<AttachmentLife>, handle: FrameHandle) -> Arc<Self> {
        Arc::new(Self {
            life: life.clone(),
            handle,
            hold: Hold::Credit,
            committed: AtomicBool::new(false),
        })
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

    /// Place of the frame in the region, for logs and tests.
    pub fn frame(&self) -> FrameIndex {
        self.handle.frame
    }
}

impl FrameBytes for FrameSpan {
    fn read(&self, offset: usize, to: &mut [u8]) {
        self.life.table.copy_out(self.handle.frame, offset as u64, to);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        assert!(self.hold == Hold::Credit, "a pinned frame is read-only");
        self.life.table.copy_in(self.handle.frame, offset as u64, from);
    }
}

impl Drop for FrameSpan {
    fn drop(&mut self) {
        if self.hold == Hold::Credit && self.committed.load(Ordering::Relaxed) {
            return;
        }
        let mut released = self.life.released.lock().unwrap_or_else(PoisonError::into_inner);
        match self.hold {
            Hold::Pin => released.pins.push(self.handle),
            Hold::Credit => released.credits.push(self.handle),
        }
    }
}
