//! Blocks that arrive from another daemon, or from the remote tier.
//!
//! Each waits, in order, for a frame that nobody needs sooner; a disk thread checks it while copying it into
//! the frame; then it is entered as if a runtime had committed it, and goes to disk by write-behind.
//!
//! **Invariant:** an import takes no frame below the low watermark, and displaces only blocks that no waiting
//! turn will read and that the disk keeps.

use std::collections::VecDeque;

use kv_protocol::message::CommitOutcome;
use kv_protocol::{BlockHeader, BlockKey, ConversationId, FrameIndex, MissReason};

use crate::key_map::KeyMap;
use crate::migrate::ask::{Incoming, Kept, Refused, Reply};
use crate::moves::Tiers;
use crate::store::Store;
use crate::tier::disk::Job;

/// Frames filled at once.
const FILLS_MAX: usize = 4;
/// Blocks that may wait in memory for a frame: those of a few transfers.
const WAITING_MAX: usize = 8;

#[derive(Debug)]
struct Filling {
    frame: FrameIndex,
    conversation: ConversationId,
    reply: Reply<Result<CommitOutcome, Refused>>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Imports {
    waiting: VecDeque<Incoming>,
    filling: KeyMap<Filling>,
}

impl Store {
    /// Which of these blocks are in no tier.
    pub(crate) fn missing(&self, keys: Vec<BlockKey>) -> Vec<BlockKey> {
        keys.into_iter().filter(|key| self.directory.get(key).is_none()).collect()
    }

    /// A block has arrived.
    pub(crate) fn place(&mut self, incoming: Incoming) {
        if self.imports.waiting.len() >= WAITING_MAX {
            let _ = incoming.reply.send(Err(Refused::Busy)); // Gone meanwhile is as good.
        } else {
            self.imports.waiting.push_back(incoming);
        }
    }

    /// A record has arrived: it is kept, unless a newer one is known.
    pub(crate) fn put_imported(
        &mut self,
        id: ConversationId,
        kept: &Kept,
        now_ms: u64,
    ) -> Result<bool, Refused> {
        if self.is_deleted(&id) || self.refuses_record(&id) {
            return Err(Refused::Deleted(id));
        }
        let ours = self.conversations.get(&id).map(|known| known.updated_ms);
        let is_newer = ours.is_none_or(|ours| ours < kept.updated_ms);
        if is_newer {
            let put = self.put_conversation(id, kept.record.to_vec(), kept.updated_ms.min(now_ms));
            put.map_err(|error| {
                tracing::warn!(%id, %error, "imported record refused");
                Refused::Record(id)
            })?;
        }
        Ok(is_newer)
    }

    /// Begins to fill the frames that may be taken.
    pub(crate) fn begin_imports(&mut self) {
        while self.imports.filling.len() < FILLS_MAX
            && let Some(incoming) = self.imports.waiting.pop_front()
        {
            if incoming.reply.is_closed() {
                continue; // The transfer has ended.
            }
            let answer = self.answer_at_once(&incoming);
            if let Some(answer) = answer {
                let _ = incoming.reply.send(answer); // Gone meanwhile is as good.
            } else if !self.has_room_for_import() {
                self.imports.waiting.push_front(incoming);
                return;
            } else if let Err(incoming) = self.begin_filling(incoming) {
                self.imports.waiting.push_front(incoming);
                return;
            }
        }
    }

    fn answer_at_once(&mut self, incoming: &Incoming) -> Option<Result<CommitOutcome, Refused>> {
        let Incoming { conversation, header: BlockHeader { key, parent, .. }, .. } = incoming;
        if self.is_deleted(conversation) {
            Some(Err(Refused::Deleted(*conversation)))
        } else if self.deletions.refuses(*key, parent) {
            Some(Err(Refused::Erasing(*key)))
        } else if self.host.is_none() {
            Some(Err(Refused::NoModel))
        } else if self.directory.get(key).is_some() || self.imports.filling.contains_key(key) {
            Some(Ok(CommitOutcome::Known))
        } else {
            None
        }
    }

    /// Gives the block back if there is no frame, or the readers are behind.
    #[expect(clippy::result_large_err, reason = "the error is the block itself, given back")]
    fn begin_filling(&mut self, incoming: Incoming) -> Result<(), Incoming> {
        let parent = &incoming.header.parent;
        let coming = || self.imports.filling.get(parent).map(|filling| filling.frame);
        let after = self.directory.get(parent).and_then(|block| block.host).or_else(coming);
        let Some(host) = &mut self.host else { return Err(incoming) };
        let Some(handle) = host.grant_behind(after) else { return Err(incoming) };
        let (key, block, table) =
            (incoming.header.key, incoming.block.clone(), host.table().clone());
        if self.disk.read(Job::Fill { key, block, handle, table }).is_err() {
            host.free(handle.frame);
            return Err(incoming);
        }
        let Incoming { conversation, reply, .. } = incoming;
        self.imports.filling.insert(key, Filling { frame: handle.frame, conversation, reply });
        Ok(())
    }

    /// A frame is filled, or is not.
    pub(crate) fn filled(
        &mut self,
        key: BlockKey,
        frame: FrameIndex,
        result: Result<Box<BlockHeader>, MissReason>,
    ) {
        let Some(filling) = self.imports.filling.remove(&key) else { return };
        assert!(filling.frame == frame, "a filling ended in another frame");
        let is_known = self.directory.get(&key).is_some(); // A commit was faster.
        let answer = match result {
            Ok(_) if self.is_deleted(&filling.conversation) => {
                Err(Refused::Deleted(filling.conversation))
            }
            Ok(_) if is_known => Ok(CommitOutcome::Known),
            Ok(header) => {
                let entered = self.enter(&header, frame, self.now_ms).inspect_err(|error| {
                    tracing::error!(frame = frame.0, %error, "frame lost");
                });
                let _ = filling.reply.send(Ok(entered.unwrap_or(CommitOutcome::Refused)));
                return;
            }
            Err(_) => {
                self.metrics.corrupt.with_label_values(&["import"]).inc();
                Ok(CommitOutcome::Refused)
            }
        };
        if let Some(host) = &mut self.host {
            host.free(frame);
        }
        let _ = filling.reply.send(answer); // Gone meanwhile is as good.
    }
}
