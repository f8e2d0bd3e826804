//! A walk through all stored blocks that reads each and checks it, a bounded part at a time, on the disk's
//! reading threads. What is bad is forgotten, as when a lookup finds it.
//!
//! Paced: `BYTES_PER_S`, one part under way at a time, and none while a lookup waits for the disk.

use kv_protocol::{BlockKey, MissReason};
use serde::Serialize;

use crate::moves::Tiers;
use crate::store::Store;
use crate::tier::disk::Job;

/// Read in a second: a tenth of what a good drive gives, so that promotes hardly notice.
const BYTES_PER_S: u64 = 512 << 20;
/// Read in one part: an eighth of a second's.
const PART_BYTES: u64 = BYTES_PER_S / 8;
/// Blocks of one part, and places of the directory looked at for it.
const PART_BLOCKS: usize = 256;
const PART_PLACES: usize = 4096;
/// Bad blocks named; more are only counted.
const NAMED_MAX: usize = 100;

/// How far the check is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// Whether one runs.
    pub state: State,
    /// Places of the directory done.
    pub places_done: u64,
    /// Places there are.
    pub places: u64,
    /// Blocks read.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks that are not what was stored.
    pub bad: u64,
    /// Blocks that the disk did not give; they stay.
    pub unread: u64,
    /// Blocks that were not read, since they have another shape than those in frames.
    pub other_geometry: u64,
    /// The first of the bad ones.
    pub named: Vec<Named>,
    #[serde(skip)]
    under_way: bool,
    #[serde(skip)]
    not_before_ms: u64,
}

/// Whether a check runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// None was asked for since the worker started.
    #[default]
    Never,
    /// Now.
    Running,
    /// To its end.
    Done,
}

/// A bad block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Named {
    /// Its key, shortened.
    pub key: String,
    /// What was wrong.
    pub reason: &'static str,
}

/// Why no check begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// Blocks cannot be read without their shape.
    #[error(
        "no runtime has attached yet, so the shape of the blocks is not known: start one first"
    )]
    NoGeometry,
}

impl Store {
    /// How far the check is.
    pub fn verification(&self) -> Verification {
        self.verification.clone()
    }

    /// Begins a check, unless one runs.
    pub fn verify(&mut self) -> Result<Verification, VerifyError> {
        if self.geometry().is_none() {
            return Err(VerifyError::NoGeometry);
        }
        if self.verification.state != State::Running {
            self.verification = Verification { state: State::Running, ..Verification::default() };
        }
        Ok(self.verification())
    }

    /// The next part, if it is time.
    pub(crate) fn begin_verifying(&mut self, now_ms: u64) {
        let state = &self.verification;
        let is_time = state.state == State::Running
            && !state.under_way
            && now_ms >= state.not_before_ms
            && !self.transfers.any_reads();
        let Some(geometry) = self.geometry().copied().filter(|_| is_time) else { return };
        let block_bytes = self.config.disk_engine.block_bytes(&geometry);
        let blocks_max = (PART_BYTES / block_bytes).clamp(1, PART_BLOCKS as u64) as usize;
        let from = state.places_done as usize;
        let (mut blocks, mut others, mut next) = (Vec::new(), 0, from);
        let (part, end) = self.directory.part(from, PART_PLACES);
        for id in part {
            if blocks.len() == blocks_max {
                break;
            }
            next = id.0 as usize + 1;
            let Some(block) = self.directory.at(id).filter(|block| block.is_stored()) else {
                continue;
            };
            let label = self.directory.label(block);
            if label.disk_bytes == block_bytes {
                blocks.push((*self.directory.key(id), label.root));
            } else {
                others += 1;
            }
        }
        if blocks.len() < blocks_max {
            next = end.unwrap_or(self.directory.places());
        }
        let count = blocks.len() as u64;
        let job = Job::Verify { blocks, geometry };
        if count > 0 && self.disk.read(job).is_err() {
            return; // The readers are behind.
        }
        let places = self.directory.places() as u64;
        let state = &mut self.verification;
        state.under_way = count > 0;
        state.other_geometry += others;
        state.bytes += count * block_bytes;
        state.not_before_ms = now_ms + 1000 * count * block_bytes / BYTES_PER_S;
        (state.places_done, state.places) = (next as u64, places);
        if state.places_done >= places && count == 0 {
            state.state = State::Done;
        }
    }

    /// The end of a part.
    pub(crate) fn verified(&mut self, blocks: Vec<(BlockKey, Option<MissReason>)>) {
        self.verification.under_way = false;
        for (key, reason) in blocks {
            self.verification.blocks += 1;
            let is_there = self.directory.get(&key).is_some_and(crate::directory::Block::is_stored);
            match reason.filter(|_| is_there) {
                None => {}
                Some(MissReason::Io) => self.verification.unread += 1,
                Some(reason) => {
                    tracing::warn!(%key, reason = reason.label(), "a stored block is bad");
                    self.metrics.corrupt.with_label_values(&["disk block"]).inc();
                    self.verification.bad += 1;
                    if self.verification.named.len() < NAMED_MAX {
                        let named = Named { key: key.to_string(), reason: reason.label() };
                        self.verification.named.push(named);
                    }
                    self.drop_bad(&key, reason);
                }
            }
        }
        if self.verification.places_done >= self.verification.places {
            self.verification.state = State::Done;
        }
    }

    /// What the disk has of a block is not to be read; what a frame has is as good as before.
    fn drop_bad(&mut self, key: &BlockKey, reason: MissReason) {
        let in_frame = self.directory.get(key).and_then(|block| block.host);
        if in_frame.is_none() {
            return self.forget(key, reason);
        }
        self.drop_from_disk(key);
        let is_full = self.directory.get(key).is_some_and(|block| block.is_full);
        self.transfers.mark_dirty(*key, is_full); // Written again, behind the removal.
    }

    /// Begins to give garbage back; `false` if the disk is busy with it, or away.
    pub(crate) fn begin_compaction(&mut self) -> bool {
        let transfers = &mut self.transfers;
        if !transfers.can_write() || self.disk.write(Job::Reclaim).is_err() {
            return false;
        }
        transfers.record_sent();
        true
    }
}
