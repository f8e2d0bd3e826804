//! What records ask of the store: a put, with what it says of the turn before; where a conversation's blocks
//! are; and what its next turn would find.

use std::sync::Arc;

use kv_protocol::record::RecordError;
use kv_protocol::{BlockKey, ConversationId, MissReason, Record};
use serde::Serialize;

use crate::conversation::{Age, Known};
use crate::directory::{Block, EntryId};
use crate::outline::{Divergence, Outline, divergence};
use crate::policy::retention::Retention;
use crate::store::Store;
use crate::tier::disk::Job;
use crate::transfer::DiskState;

/// Why a record is not kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PutError {
    /// No record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Another conversation's.
    #[error("a record of conversation {of} was put under the id {under}")]
    Id {
        /// By its root and name.
        of: ConversationId,
        /// Given.
        under: ConversationId,
    },
    /// Deleted a moment ago: the record is of a turn that began before.
    #[error("conversation {0} was deleted and is not erased from disk yet")]
    Deleted(ConversationId),
}

/// Blocks and bytes in one tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Share {
    /// Blocks.
    pub blocks: u64,
    /// What they take there.
    pub bytes: u64,
}

impl Share {
    fn add(&mut self, bytes: u64) {
        self.blocks += 1;
        self.bytes += bytes;
    }
}

/// One conversation as lists show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConversationLine {
    /// Hash of root and name, in hexadecimal digits.
    pub id: String,
    /// The client's own name.
    pub name: String,
    /// Model and tenant, shortened.
    pub root: String,
    /// Of the kept history.
    pub tokens: u32,
    /// Taken out by truncations.
    pub dropped_tokens: u32,
    /// Blocks of the history, the partial one included.
    pub blocks: u64,
    /// Of those, in frames.
    pub host: Share,
    /// Of those, on disk; a block may be in both.
    pub disk: Share,
    /// End of the last turn, Unix milliseconds.
    pub used_ms: u64,
    /// When its blocks run out of time if it is not used again, Unix milliseconds.
    pub expires_ms: Option<u64>,
    /// Until when its blocks do not leave, Unix milliseconds.
    pub pinned_until_ms: Option<u64>,
}

impl ConversationLine {
    /// Bytes in all tiers.
    pub fn bytes(&self) -> u64 {
        self.host.bytes + self.disk.bytes
    }
}

/// Where a chain ends, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// First full block that is nowhere.
    pub block: u64,
    /// Its first token's place.
    pub token: u64,
    /// `evicted`, `expired`, …; nothing if nobody remembers.
    pub reason: Option<&'static str>,
}

/// Why a conversation was computed anew, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Which.
    pub conversation: ConversationLine,
    /// Tokens that its next turn finds, if it goes on from this history.
    pub tokens_found: u64,
    /// The first gap in its chain.
    pub gap: Option<Gap>,
    /// Where its last turn did not go on from the one before; since the worker started.
    pub divergence: Option<Box<Divergence>>,
}

impl Store {
    /// Keeps a record; it goes to disk as soon as the disk takes it.
    pub fn put_conversation(
        &mut self,
        id: ConversationId,
        bytes: Vec<u8>,
        now_ms: u64,
    ) -> Result<(), PutError> {
        let mut record = Record::decode(&bytes)?;
        let of = ConversationId::new(&record.root, record.name.as_bytes());
        if of != id {
            return Err(PutError::Id { of, under: id });
        }
        if self.refuses_record(&id) {
            return Err(PutError::Deleted(id));
        }
        self.begins_anew(&id);
        let keys = record.keys();
        let mut outline = Outline::of(&record, &keys);
        if let Some(before) = self.conversations.get(&id).map(|known| &known.outline) {
            let bytes_before = self.conversations.recent(&id);
            let record_before = bytes_before.and_then(|bytes| Record::decode(bytes).ok());
            let found = divergence(before, record_before.as_ref(), &record, &outline, now_ms);
            // The old end may be a partial block that the new history has no use for.
            let short = |(id, _): (EntryId, &Block)| self.directory.key(id).short();
            let ends = found.is_some().then(|| self.directory.ends_of(before).map(short));
            let ends: Vec<u64> = ends.into_iter().flatten().collect();
            outline.divergence = found.map(Box::new).or_else(|| before.divergence.clone());
            outline.succeed(before, ends);
            if self.transfers.disk_state != DiskState::Opening {
                let is_known = |short: &u64| self.directory.find_short(*short, &outline.root);
                let known = outline.former.iter().filter(|short| is_known(short).is_some());
                outline.former = known.copied().collect(); // The others have left: nothing to delete.
            }
        }
        record.former.clone_from(&outline.former);
        let bytes: Arc<[u8]> = match record.encode() {
            Ok(bytes) => bytes.into(),
            Err(_) => bytes.into(), // Too long with what the daemon adds.
        };
        self.conversations.put(id, now_ms, bytes.clone(), outline);
        self.retain_chain(&id, now_ms);
        self.send_record(id, now_ms, bytes);
        Ok(())
    }

    /// What a record says of how long its blocks stay holds for those that are known.
    pub(crate) fn retain_chain(&mut self, id: &ConversationId, now_ms: u64) {
        let Some(Known { outline, .. }) = self.conversations.get(id) else { return };
        let Outline { ttl_ms, pinned_until_ms, .. } = *outline;
        if ttl_ms.is_none() && pinned_until_ms.is_none() {
            return;
        }
        let full = outline.blocks.iter();
        let full = full.filter_map(|short| self.directory.find_short(*short, &outline.root));
        let all = full.chain(self.directory.ends_of(outline));
        let keys: Vec<BlockKey> = all.map(|(id, _)| *self.directory.key(id)).collect();
        self.retain(&keys, Retention { ttl_ms, pinned_until_ms }, now_ms);
    }

    /// Best effort: a disk that is too far behind does not get it.
    pub(crate) fn send_record(&mut self, id: ConversationId, updated_ms: u64, record: Arc<[u8]>) {
        let job = Job::PutConversation { id, updated_ms, record };
        if self.transfers.can_write() && self.disk.write(job).is_ok() {
            self.transfers.record_sent();
        }
    }

    /// Conversations last used before `age`, the most recently used first: as many as a bounded number of
    /// blocks allows, and at least one if there is one.
    pub fn page(&self, age: Option<Age>, blocks_max: usize) -> Vec<(Age, ConversationLine)> {
        let mut looked_at = 0;
        let mut lines = Vec::new();
        for (age, known) in self.conversations.before(age) {
            looked_at += known.outline.blocks.len() + 1;
            if looked_at > blocks_max && !lines.is_empty() {
                break;
            }
            lines.push((age, self.line(&age.1, known)));
        }
        lines
    }

    /// What a conversation has in frames, and on disk.
    pub(crate) fn shares(&self, outline: &Outline) -> (Share, Share) {
        let (mut host, mut disk) = (Share::default(), Share::default());
        let frame_bytes = self.frame_bytes();
        let full = (0..outline.blocks.len()).filter_map(|index| self.block_of(outline, index));
        for block in full.chain(self.directory.ends_of(outline).map(|(_, block)| block)) {
            if block.host.is_some() {
                host.add(frame_bytes);
            }
            if block.is_stored() {
                disk.add(self.directory.label(block).disk_bytes);
            }
        }
        (host, disk)
    }

    /// A full block of a conversation, or of what it shares with every tenant.
    fn block_of(&self, outline: &Outline, index: usize) -> Option<&Block> {
        let short = outline.blocks.get(index)?;
        self.directory.find_short(*short, &outline.root_of(index)).map(|(_, block)| block)
    }

    /// What a block takes in the host tier.
    pub(crate) fn frame_bytes(&self) -> u64 {
        self.geometry().map_or(0, kv_protocol::Geometry::frame_bytes)
    }

    fn line(&self, id: &ConversationId, known: &Known) -> ConversationLine {
        let Known { updated_ms, outline, .. } = known;
        let (host, disk) = self.shares(outline);
        let ttl_ms = outline.ttl_ms.or(self.config.ttl_ms);
        ConversationLine {
            id: id.hex(),
            name: outline.name.to_string(),
            root: outline.root.to_string(),
            tokens: outline.tokens,
            dropped_tokens: outline.dropped_tokens,
            blocks: outline.blocks.len() as u64 + u64::from(!outline.tail.is_empty()),
            host,
            disk,
            used_ms: *updated_ms,
            expires_ms: ttl_ms.map(|ttl| updated_ms.saturating_add(ttl)),
            pinned_until_ms: outline.pinned_until_ms,
        }
    }

    /// One conversation, in full.
    pub fn explain(&self, id: &ConversationId) -> Option<Explanation> {
        let known = self.conversations.get(id)?;
        let outline = &known.outline;
        let is_there = |index: &usize| self.block_of(outline, *index).is_some();
        let found = (0..outline.blocks.len()).take_while(is_there).count();
        let tokens_per_block = u64::from(outline.tokens_per_block);
        let gap = outline.blocks.get(found).map(|short| Gap {
            block: found as u64,
            token: found as u64 * tokens_per_block,
            reason: self.directory.why_left(*short).map(MissReason::label),
        });
        let in_tail = |id| self.directory.tail(id).map_or(0, |tail| tail.len());
        let tails = self.directory.ends_of(outline);
        let tails = tails.map(|(id, _)| in_tail(id).min(outline.tail.len()) as u64);
        let in_tail = if gap.is_none() { tails.max().unwrap_or_default() } else { 0 };
        Some(Explanation {
            conversation: self.line(id, known),
            tokens_found: found as u64 * tokens_per_block + in_tail,
            gap,
            divergence: outline.divergence.clone(),
        })
    }
}
