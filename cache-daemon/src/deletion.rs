//! Deleting conversations: unreadable before the answer, gone from disk within a deadline.
//!
//! ```text
//! delete ─► record and blocks leave memory's indexes ─► tombstone on disk ─► answer … erasure ─► short tombstone
//! ```
//!
//! 1. Record and blocks leave the directory; promotes and writes under way end as misses; a frame that is
//!    pinned stays with who pinned it, and is free after.
//! 2. A tombstone with the blocks' keys replaces the record on disk, synced. Only then is the request
//!    answered: a worker that starts from here on serves none of these blocks.
//! 3. Within half the deadline, many deletions together, the disk tier erases blocks and records. The
//!    tombstone stays without keys, so that an import of an older copy is refused.
//!
//! Until 3 is done nobody may store the blocks, nor what follows them: a turn that was running when its
//! conversation was deleted does not bring it back.

use std::collections::{BTreeSet, HashMap};

use kv_protocol::{BlockKey, ConversationId, MissReason};

use crate::directory::OnDisk;
use crate::doomed::{Doomed, doomed};
use crate::key_map::KeySet;
use crate::store::Store;
use crate::tier::disk::{DiskError, Erasure, Job};
use crate::tombstone::Tombstone;
use crate::transfer::DiskState;

/// Tombstones kept; the oldest go. A hundred bytes each.
const TOMBSTONES_MAX: usize = 1 << 16;
/// How long a tombstone is kept: longer than anybody keeps an export to import it again.
const TOMBSTONE_MAX_MS: u64 = 30 * 24 * 3600 * 1000;
/// Deletions that wait for their erasure; more are refused. What they name fits in memory many times.
const WAITING_MAX: usize = 4096;
/// Keys that wait for their erasure.
const DOOMED_MAX: usize = 1 << 20;
/// Pause after an erasure that failed.
const RETRY_MS: u64 = 1000;

/// A deletion whose blocks are still on disk.
#[derive(Debug)]
struct Waiting {
    id: ConversationId,
    tombstone: Tombstone,
}

/// Tombstones, and what is to be erased. Pure data.
#[derive(Debug, Default)]
pub struct Deletions {
    tombstones: HashMap<ConversationId, u64>,
    by_age: BTreeSet<(u64, ConversationId)>,
    /// The oldest first.
    waiting: Vec<Waiting>,
    /// Given to the disk.
    erasing: Vec<Waiting>,
    /// All keys of both.
    doomed: KeySet,
    /// Erased; their tombstones without keys are not on disk yet.
    short: Vec<(ConversationId, Tombstone)>,
    not_before_ms: u64,
    /// Found on disk by a restarted worker, and when they were made: the remote tier is told again.
    pub(crate) found: Vec<(ConversationId, u64)>,
}

impl Deletions {
    /// Whether a conversation was deleted, and not begun anew since.
    pub fn is_deleted(&self, id: &ConversationId) -> bool {
        self.tombstones.contains_key(id)
    }

    /// Whether it is too early for a record under this id.
    fn is_waiting(&self, id: &ConversationId) -> bool {
        self.waiting.iter().chain(&self.erasing).any(|waiting| waiting.id == *id)
    }

    /// Deletions whose blocks may still be on disk, and when the oldest was made.
    pub fn waiting(&self) -> (usize, Option<u64>) {
        let all = || self.erasing.iter().chain(&self.waiting);
        (all().count(), all().map(|waiting| waiting.tombstone.deleted_ms).min())
    }

    fn is_full(&self) -> bool {
        self.waiting.len() + self.erasing.len() >= WAITING_MAX || self.doomed.len() >= DOOMED_MAX
    }

    fn bury(&mut self, id: ConversationId, tombstone: Tombstone) {
        self.revive(&id);
        self.tombstones.insert(id, tombstone.deleted_ms);
        self.by_age.insert((tombstone.deleted_ms, id));
        if !tombstone.keys.is_empty() {
            self.doomed.extend(&tombstone.keys);
            self.waiting.push(Waiting { id, tombstone });
        }
    }

    /// The conversation has begun anew.
    fn revive(&mut self, id: &ConversationId) {
        if let Some(deleted_ms) = self.tombstones.remove(id) {
            self.by_age.remove(&(deleted_ms, *id));
        }
    }

    /// Whether a block may not be stored now. One that may not dooms what follows it.
    pub fn refuses(&mut self, key: BlockKey, parent: &BlockKey) -> bool {
        if self.doomed.is_empty() {
            return false;
        }
        let refused = self.doomed.contains(&key) || self.doomed.contains(parent);
        if refused && self.doomed.len() < 2 * DOOMED_MAX {
            self.doomed.insert(key);
        }
        refused
    }

    /// What is to be erased now, if it is time.
    fn due(&mut self, now_ms: u64, erase_after_ms: u64) -> Option<Erasure> {
        let oldest = self.waiting.first()?.tombstone.deleted_ms;
        let is_due =
            now_ms >= oldest.saturating_add(erase_after_ms) && now_ms >= self.not_before_ms;
        if !is_due || !self.erasing.is_empty() {
            return None;
        }
        self.erasing = std::mem::take(&mut self.waiting);
        let keys = self.erasing.iter().flat_map(|waiting| &waiting.tombstone.keys);
        Some(Erasure {
            blocks: keys.copied().collect(),
            conversations: self.erasing.iter().map(|waiting| waiting.id).collect(),
        })
    }

    /// The disk has not got, or not done, an erasure: it is done again.
    fn not_erased(&mut self, now_ms: u64) {
        self.erasing.append(&mut self.waiting);
        self.waiting = std::mem::take(&mut self.erasing);
        self.not_before_ms = now_ms + RETRY_MS;
    }

    /// An erasure is done: its tombstones need no keys any more.
    fn erased(&mut self) {
        let done = std::mem::take(&mut self.erasing);
        self.doomed = self.waiting.iter().flat_map(|w| &w.tombstone.keys).copied().collect();
        let short = done.into_iter().map(|Waiting { id, tombstone }| {
            (id, Tombstone { deleted_ms: tombstone.deleted_ms, keys: Vec::new() })
        });
        let is_last = |(id, tombstone): &(ConversationId, Tombstone)| {
            self.tombstones.get(id) == Some(&tombstone.deleted_ms)
        };
        self.short.extend(short.filter(is_last));
    }

    /// Forgets, and names, tombstones that are over a bound.
    fn expire(&mut self, now_ms: u64) -> Vec<ConversationId> {
        let mut gone = Vec::new();
        while let Some(&(deleted_ms, id)) = self.by_age.first() {
            let is_old = deleted_ms.saturating_add(TOMBSTONE_MAX_MS) < now_ms;
            if !(is_old || self.tombstones.len() > TOMBSTONES_MAX) || self.is_waiting(&id) {
                break;
            }
            self.revive(&id);
            gone.push(id);
        }
        gone
    }
}

/// Why a conversation is not deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeleteError {
    /// Its blocks on disk are not all known.
    #[error("the disk tier's index is still being read: ask again when `kvctl status` says ready")]
    Opening,
    /// Too many at once.
    #[error("{WAITING_MAX} deletions wait to be erased from disk: ask again later")]
    Full,
    /// None of that id.
    #[error("no such conversation")]
    Unknown,
}

impl Store {
    /// Whether a conversation was deleted, so that an older copy is not to be imported.
    pub fn is_deleted(&self, id: &ConversationId) -> bool {
        self.deletions.is_deleted(id)
    }

    /// Whether a record may not be kept under this id yet.
    pub(crate) fn refuses_record(&self, id: &ConversationId) -> bool {
        self.deletions.is_waiting(id)
    }

    /// The conversation begins anew: its tombstone is replaced.
    pub(crate) fn begins_anew(&mut self, id: &ConversationId) {
        self.deletions.revive(id);
    }

    /// Makes a conversation unreadable. What is to be put on disk before that is told to anybody.
    pub fn delete(
        &mut self,
        id: &ConversationId,
        now_ms: u64,
    ) -> Result<(Doomed, Tombstone), DeleteError> {
        if self.transfers.disk_state == DiskState::Opening {
            return Err(DeleteError::Opening);
        }
        if self.deletions.is_full() {
            return Err(DeleteError::Full);
        }
        let doomed = doomed(&self.directory, &self.conversations, id);
        let doomed = doomed.ok_or(DeleteError::Unknown)?;
        self.conversations.forget(id);
        for key in &doomed.keys {
            self.forget_for_erasure(key);
        }
        let mut keys = doomed.keys.clone();
        if keys.is_empty() {
            // Nothing is known of blocks that left the tier, but their bytes may be in free places: this
            // name, which no block has, lets the erasure look there all the same.
            keys.push(BlockKey(id.0));
        }
        let tombstone = Tombstone { deleted_ms: now_ms, keys };
        self.deletions.bury(*id, tombstone.clone());
        Ok((doomed, tombstone))
    }

    /// As `forget`; the disk tier keeps what it has until it erases it.
    fn forget_for_erasure(&mut self, key: &BlockKey) {
        let bytes = self.disk_bytes(key);
        // Nobody learns from a miss that it was here.
        let Some(block) = self.directory.remove(key, MissReason::NeverStored) else { return };
        if let (Some(frame), Some(host)) = (block.host, &mut self.host) {
            host.disown(frame);
        }
        if block.disk == OnDisk::Stored {
            self.transfers.uncount_stored(bytes);
        } // While `Writing`, the end of the write finds the block unknown and removes it.
    }

    /// A tombstone that a restarted worker finds.
    pub(crate) fn found_tombstone(&mut self, id: ConversationId, tombstone: Tombstone) {
        if tombstone.keys.is_empty() && self.conversations.contains(&id) {
            return; // Begun anew meanwhile.
        }
        // What was put or stored before this was known goes again: it may be what was deleted.
        self.conversations.forget(&id);
        for key in &tombstone.keys {
            self.forget_for_erasure(key);
        }
        self.deletions.found.push((id, tombstone.deleted_ms));
        self.deletions.bury(id, tombstone);
    }

    /// Begins an erasure when it is time for one.
    pub(crate) fn begin_erasure(&mut self, now_ms: u64) {
        for id in self.deletions.expire(now_ms) {
            self.transfers.remove_conversation(id);
        }
        self.shorten_tombstones();
        let state = self.transfers.disk_state;
        if state == DiskState::Opening || self.transfers.any_removals() {
            return;
        }
        let erase_after_ms = self.config.deletion_deadline_ms / 2;
        let Some(erasure) = self.deletions.due(now_ms, erase_after_ms) else { return };
        if state == DiskState::None {
            self.deletions.erased();
            self.deletions.short.clear(); // There is nowhere to put them.
        } else if self.disk.write(Job::Erase(erasure)).is_ok() {
            self.transfers.record_sent();
        } else {
            self.deletions.not_erased(now_ms);
        }
    }

    /// The end of an erasure; one that failed is done again.
    pub(crate) fn end_erasure(&mut self, error: Option<&DiskError>, now_ms: u64) {
        if let Some(error) = error {
            tracing::error!(%error, "deleted conversations are not erased yet");
            self.transfers.disk_error = Some(error.to_string());
            self.deletions.not_erased(now_ms);
            return;
        }
        self.deletions.erased();
    }

    /// Tombstones without keys go where the erasure took the ones with keys; as many as the disk takes now.
    fn shorten_tombstones(&mut self) {
        while let Some((id, tombstone)) = self.deletions.short.pop() {
            if !self.deletions.is_deleted(&id) {
                continue; // Begun anew meanwhile.
            }
            let (updated_ms, record) = (tombstone.deleted_ms, tombstone.encode().into());
            if self.disk.write(Job::PutConversation { id, updated_ms, record }).is_err() {
                self.deletions.short.push((id, tombstone));
                return;
            }
            self.transfers.record_sent();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u8) -> ConversationId {
        ConversationId([number; 32])
    }

    fn key(number: u8) -> BlockKey {
        BlockKey([number; 32])
    }

    fn tombstone(deleted_ms: u64, keys: &[u8]) -> Tombstone {
        Tombstone { deleted_ms, keys: keys.iter().map(|number| key(*number)).collect() }
    }

    #[test]
    fn an_erasure_is_due_half_a_deadline_after_the_oldest_deletion_and_takes_all() {
        let mut deletions = Deletions::default();
        deletions.bury(id(1), tombstone(1000, &[1, 2]));
        deletions.bury(id(2), tombstone(1400, &[3]));
        assert_eq!(deletions.due(1499, 500), None);
        let erasure = deletions.due(1500, 500).unwrap();
        assert_eq!(erasure.blocks, [key(1), key(2), key(3)]);
        assert_eq!(erasure.conversations, [id(1), id(2)]);
        deletions.bury(id(3), tombstone(1500, &[4]));
        assert_eq!(deletions.due(9000, 500), None, "one at a time");
        assert_eq!(deletions.waiting(), (3, Some(1000)));
        deletions.erased();
        assert_eq!(deletions.short, [(id(1), tombstone(1000, &[])), (id(2), tombstone(1400, &[]))]);
        assert_eq!(deletions.due(9000, 500).unwrap().blocks, [key(4)]);
    }

    #[test]
    fn an_erasure_that_failed_is_done_again_in_order_and_not_at_once() {
        let mut deletions = Deletions::default();
        deletions.bury(id(1), tombstone(0, &[1]));
        deletions.due(10, 0).unwrap();
        deletions.bury(id(2), tombstone(5, &[2]));
        deletions.not_erased(10);
        assert_eq!(deletions.due(11, 0), None);
        assert_eq!(deletions.due(10 + RETRY_MS, 0).unwrap().blocks, [key(1), key(2)]);
    }

    #[test]
    fn doomed_blocks_and_what_follows_them_are_refused_until_they_are_erased() {
        let mut deletions = Deletions::default();
        assert!(!deletions.refuses(key(1), &key(0)));
        deletions.bury(id(1), tombstone(0, &[1]));
        assert!(deletions.refuses(key(1), &key(0)));
        assert!(deletions.refuses(key(2), &key(1)));
        assert!(deletions.refuses(key(3), &key(2)));
        assert!(!deletions.refuses(key(4), &key(0)));
        deletions.due(0, 0).unwrap();
        assert!(deletions.refuses(key(1), &key(0)));
        deletions.erased();
        assert!(!deletions.refuses(key(1), &key(0)));
        assert!(deletions.is_deleted(&id(1)));
    }

    #[test]
    fn tombstones_are_bounded_in_time() {
        let mut deletions = Deletions::default();
        deletions.bury(id(1), tombstone(0, &[]));
        deletions.bury(id(2), tombstone(10, &[]));
        assert_eq!(deletions.expire(TOMBSTONE_MAX_MS), []);
        assert_eq!(deletions.expire(TOMBSTONE_MAX_MS + 1), [id(1)]);
        assert!(deletions.is_deleted(&id(2)) && !deletions.is_deleted(&id(1)));
    }
}
