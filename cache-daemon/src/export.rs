//! Copies of blocks for transfers out of this daemon: to another daemon, or to the remote tier.
//!
//! A block in a frame is copied by a disk thread while the loop holds the frame; one on disk is read into
//! private memory. Nothing is promoted for an export, no frame is taken, and no block counts as used.

use std::collections::VecDeque;

use kv_protocol::message::FrameHandle;
use kv_protocol::{BlockKey, FrameIndex, MissReason, RootKey};

use crate::key_map::KeyMap;
use crate::migrate::ask::{Chain, Refused, Reply};
use crate::migrate::bundle::BlockBytes;
use crate::store::Store;
use crate::tier::disk::{CopyFrom, Job};
use crate::transfer::DiskState;

/// Copies under way: turns keep most of the disk's readers to themselves.
const COPIES_MAX: usize = 2;
/// Blocks that are asked for and wait; a transfer asks for one or two at a time.
const WAITING_MAX: usize = 64;

type Listing = Reply<Result<Vec<BlockKey>, Refused>>;
type Answer = Reply<Result<Option<BlockBytes>, Refused>>;

/// See the module.
#[derive(Debug, Default)]
pub struct Exports {
    /// While the disk's index is being read.
    asking: Vec<(Chain, Listing)>,
    waiting: VecDeque<(BlockKey, RootKey, Answer)>,
    copying: KeyMap<Vec<Answer>>,
}

impl Store {
    /// Somebody wants to know which of a record's blocks are here: known when the disk's index is read to its
    /// end, and answered then.
    pub(crate) fn want_present(&mut self, chain: Chain, reply: Listing) {
        if self.transfers.disk_state != DiskState::Opening {
            let _ = reply.send(Ok(self.present(&chain))); // Gone meanwhile is as good.
        } else if self.exports.asking.len() >= WAITING_MAX {
            let _ = reply.send(Err(Refused::Opening));
        } else {
            self.exports.asking.push((chain, reply));
        }
    }

    /// In the order of tokens, tails last.
    fn present(&self, chain: &Chain) -> Vec<BlockKey> {
        let ours = |(index, key): &(usize, &BlockKey)| {
            let block = self.directory.get(key);
            let root = chain.start.root_of(*index);
            block.is_some_and(|block| self.directory.label(block).root == root)
        };
        let full = chain.keys.iter().enumerate().filter(ours).map(|(_, key)| *key);
        let tails = self.directory.tails_of(&chain.open_parent, &chain.start.root, &chain.tail);
        full.chain(tails).collect()
    }

    /// Somebody wants a copy of a block.
    pub(crate) fn want_copy(&mut self, key: BlockKey, root: RootKey, reply: Answer) {
        let exports = &mut self.exports;
        if let Some(others) = exports.copying.get_mut(&key) {
            others.push(reply); // Bounded by the transfers there are.
        } else if exports.waiting.len() >= WAITING_MAX {
            let _ = reply.send(Err(Refused::Busy)); // Gone meanwhile is as good.
        } else {
            exports.waiting.push_back((key, root, reply));
        }
    }

    /// Begins the copies that can begin.
    pub(crate) fn begin_copies(&mut self) {
        if self.transfers.disk_state != DiskState::Opening {
            for (chain, reply) in std::mem::take(&mut self.exports.asking) {
                let _ = reply.send(Ok(self.present(&chain)));
            }
        }
        while self.exports.copying.len() < COPIES_MAX
            && let Some((key, root, reply)) = self.exports.waiting.pop_front()
        {
            if reply.is_closed() {
                continue; // The transfer has ended.
            }
            let Some((from, frame)) = self.copy_source(&key, &root) else {
                if self.transfers.disk_state == DiskState::Opening {
                    self.exports.waiting.push_front((key, root, reply));
                    return; // It may be found yet: gone is only what the whole index does not name.
                }
                let _ = reply.send(Ok(None));
                continue;
            };
            if self.disk.read(Job::Copy { key, root, from }).is_err() {
                self.exports.waiting.push_front((key, root, reply)); // The readers are behind.
                return;
            }
            if let (Some(frame), Some(host)) = (frame, &mut self.host) {
                host.hold(frame);
            }
            self.exports.copying.insert(key, vec![reply]);
        }
    }

    fn copy_source(
        &self,
        key: &BlockKey,
        root: &RootKey,
    ) -> Option<(CopyFrom, Option<FrameIndex>)> {
        let host = self.host.as_ref()?;
        let block = self.directory.get(key)?;
        if self.directory.label(block).root != *root {
            return None;
        }
        let table = host.table().clone();
        match block.host {
            Some(frame) => {
                let generation = table.state(frame).ok()?.generation;
                let handle = FrameHandle { frame, generation };
                Some((CopyFrom::Frame { handle, table }, Some(frame)))
            }
            None if block.is_stored() => Some((CopyFrom::Disk(*table.geometry()), None)),
            None => None,
        }
    }

    /// A copy is made, or is not.
    pub(crate) fn copied(
        &mut self,
        key: BlockKey,
        frame: Option<FrameIndex>,
        result: Result<BlockBytes, MissReason>,
    ) {
        if let (Some(frame), Some(host)) = (frame, &mut self.host) {
            host.release_hold(frame);
        }
        let replies = self.exports.copying.remove(&key).unwrap_or_default();
        let copy = match result {
            // Deleted meanwhile: nobody gets it from here on.
            Ok(_) if self.directory.get(&key).is_none() => None,
            Ok(copy) => Some(copy),
            Err(reason) => {
                tracing::warn!(%key, reason = reason.label(), "block not exported");
                let unchanged = self.directory.get(&key).is_some_and(|block| block.host == frame);
                if reason == MissReason::Checksum && unchanged {
                    let place = if frame.is_some() { "frame" } else { "disk block" };
                    self.metrics.corrupt.with_label_values(&[place]).inc();
                    self.forget(&key, reason); // It will not get better.
                }
                None
            }
        };
        for reply in replies {
            let _ = reply.send(Ok(copy.clone())); // Gone meanwhile is as good.
        }
    }
}
