//! Moves between tiers: promotes for lookups and for hints, write-behind, demotes, drops from disk. Which
//! block moves is chosen in `crate::moves`.
//!
//! Each move is begun here and ends in `Store::finish`, when a disk thread has done its part; the loop
//! never waits. Numbers of moves under way are bounded; what is more waits in order.

use std::collections::VecDeque;
use std::time::Instant;

use kv_protocol::message::{FrameHandle, SequenceTag};
use kv_protocol::{
    AttachmentId, BlockHeader, BlockKey, ConversationId, FrameIndex, MissReason, RootKey,
};

use crate::daemon::unix_ms;
use crate::directory::{Block, Description, Label, OnDisk};
use crate::key_map::{KeyMap, KeySet};
use crate::moves::{Catalogue, DiskRoom, Frames, Tiers};
use crate::policy::Residence;
use crate::store::Store;
use crate::tier::disk::{
    Done, Engine, Job, PROBING, RECLAIMING, REMOVALS_MAX, StoredBlock, StoredContent,
    StoredConversation, WriteFailure,
};
use crate::tier::host::HostTier;

/// Blocks read from disk at once: 8 to 16 MB in flight at a block of one or two megabytes.
const READS_MAX: usize = 8;
/// Blocks written at once: a group of the disk tier's.
const WRITES_MAX: usize = crate::tier::disk::GROUP_MAX;
/// Garbage is reclaimed when files take this much more than blocks, in percent.
const GARBAGE_PERCENT: u64 = 30;
/// Below this much garbage reclaiming is not worth its reads.
const GARBAGE_BYTES_MIN: u64 = 32 << 20;

/// Loaded blocks that the policies are told of in one turn of the loop: some milliseconds' work.
const SETTLED_PER_TURN: usize = 4096;

/// First pause before a failed disk tier is tried again, doubled up to [`RETRY_MAX_MS`].
const RETRY_MIN_MS: u64 = 250;
/// Longest such pause: a volume that an operator has repaired is in use soon.
const RETRY_MAX_MS: u64 = 30_000;

/// Who waits for a promote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiter {
    /// Whose.
    pub id: AttachmentId,
    /// Of the attachment.
    pub incarnation: u32,
    /// Of its sequence.
    pub sequence: SequenceTag,
    /// Place in the chain.
    pub index: u32,
}

/// The end of a promote, for those who wait.
#[derive(Debug)]
pub struct Arrival {
    /// The frame, or why there is none.
    pub result: Result<FrameIndex, MissReason>,
    /// Who waits; empty for a hint.
    pub waiters: Vec<Waiter>,
}

/// How the disk tier is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskState {
    /// There is none.
    None,
    /// The index is being read.
    Opening,
    /// In use.
    Ready,
    /// A write failed: reads go on, writes are skipped until one that is tried now and then succeeds.
    Failed,
}

impl DiskState {
    /// For `/status`.
    pub fn label(self) -> &'static str {
        match self {
            DiskState::None => "none",
            DiskState::Opening => "opening",
            DiskState::Ready => "ready",
            DiskState::Failed => "failed",
        }
    }
}

#[derive(Debug)]
struct Reading {
    handle: FrameHandle,
    by_hint: bool,
}

/// Moves under way and waiting.
#[derive(Debug)]
pub struct Transfers {
    pub(crate) disk_state: DiskState,
    /// Why the last write was not done.
    pub(crate) disk_error: Option<String>,
    pub(crate) direct_io: bool,
    engine: Engine,
    /// Whether the store was ever open.
    opened: bool,
    /// While failed: when to try again, and the pause before that.
    retry: Option<(u64, u64)>,
    /// What the tier may take, blocks and all else.
    disk_bytes: u64,
    /// What blocks may take of it.
    disk_bytes_max: u64,
    /// What turned out to fit, below `disk_bytes_max` while the volume has less; and until when.
    disk_bytes_fitting: u64,
    /// What the store believes that it may take.
    disk_bytes_told: u64,
    fitting_until_ms: Option<u64>,
    pub(crate) stored_bytes: u64,
    pub(crate) physical_bytes: u64,
    /// Blocks on disk.
    stored: u64,
    next_order: u64,
    /// How far the policies know of the blocks: after the index was read, and when they begin anew.
    settling: Option<usize>,
    waiters: KeyMap<Vec<Waiter>>,
    /// Asked for by lookups, not begun.
    wanted: VecDeque<BlockKey>,
    reading: KeyMap<Reading>,
    /// Hinted promotes that failed: not tried again before the queue changes.
    failed_hints: KeySet,
    changed: Vec<BlockKey>,
    /// Sealed blocks, and tails that have to go, not begun.
    dirty: VecDeque<BlockKey>,
    /// The same keys: none is queued twice.
    dirty_keys: KeySet,
    /// Partial blocks that wait for their conversation to be idle.
    tails: KeySet,
    writing: usize,
    removals: Vec<BlockKey>,
    record_removals: Vec<ConversationId>,
    /// Removals, reclaims and record writes sent and not done.
    maintaining: usize,
    reclaiming: bool,
    pub(crate) evictions_host: u64,
    pub(crate) evictions_disk: u64,
    pub(crate) promotes_by_hint: u64,
    pub(crate) promotes_by_lookup: u64,
    pub(crate) writes: u64,
}

impl Transfers {
    pub(crate) fn new(disk_bytes: u64, engine: Engine) -> Self {
        Self {
            disk_error: None,
            direct_io: false,
            engine,
            opened: false,
            retry: None,
            disk_state: if disk_bytes > 0 { DiskState::Opening } else { DiskState::None },
            disk_bytes,
            disk_bytes_max: disk_bytes / 100 * engine.stored_percent(),
            disk_bytes_fitting: u64::MAX,
            disk_bytes_told: disk_bytes,
            fitting_until_ms: None,
            stored_bytes: 0,
            physical_bytes: 0,
            stored: 0,
            next_order: 1,
            settling: None,
            waiters: KeyMap::default(),
            wanted: VecDeque::new(),
            reading: KeyMap::default(),
            failed_hints: KeySet::default(),
            changed: Vec::new(),
            dirty: VecDeque::new(),
            dirty_keys: KeySet::default(),
            tails: KeySet::default(),
            writing: 0,
            removals: Vec::new(),
            record_removals: Vec::new(),
            maintaining: 0,
            reclaiming: false,
            evictions_host: 0,
            evictions_disk: 0,
            promotes_by_hint: 0,
            promotes_by_lookup: 0,
            writes: 0,
        }
    }

    /// A block that is in a frame only.
    pub(crate) fn mark_dirty(&mut self, key: BlockKey, is_full: bool) {
        if is_full {
            self.queue_write(key);
        } else {
            self.tails.insert(key);
        }
    }

    fn queue_write(&mut self, key: BlockKey) {
        if self.dirty_keys.insert(key) {
            self.dirty.push_back(key);
        }
    }

    fn next_write(&mut self) -> Option<BlockKey> {
        let key = self.dirty.pop_front()?;
        self.dirty_keys.remove(&key);
        Some(key)
    }

    /// A lookup waits for a block that is on disk.
    pub(crate) fn want(&mut self, key: BlockKey, waiter: Waiter) {
        self.changed.push(key);
        let waiters = self.waiters.entry(key).or_default();
        waiters.push(waiter);
        if waiters.len() == 1 && !self.reading.contains_key(&key) {
            self.wanted.push_back(key);
        }
    }

    pub(crate) fn is_reading(&self, key: &BlockKey) -> bool {
        self.reading.contains_key(key)
    }

    fn retry_hints(&mut self) {
        self.changed.extend(self.failed_hints.drain());
    }

    fn take_waiters(&mut self, key: &BlockKey) -> Vec<Waiter> {
        self.changed.push(*key);
        self.waiters.remove(key).unwrap_or_default()
    }

    fn begin_reading(&mut self, key: BlockKey, reading: Reading) {
        self.changed.push(key);
        self.reading.insert(key, reading);
    }

    pub(crate) fn any_under_way(&self) -> bool {
        let writes = self.writing > 0 || (self.can_write() && !self.dirty.is_empty());
        writes || !self.reading.is_empty()
    }

    /// Failed in a way that only a new worker can mend.
    pub(crate) fn is_beyond_recovery(&self) -> bool {
        self.disk_state == DiskState::Failed && !self.opened
    }

    pub(crate) fn can_write(&self) -> bool {
        matches!(self.disk_state, DiskState::Ready | DiskState::Opening)
    }

    /// Whether everything that was to be written is.
    pub(crate) fn is_written(&self) -> bool {
        let nothing_waits = self.dirty.is_empty() || !self.can_write();
        nothing_waits && self.writing == 0 && self.maintaining == 0
    }

    /// All tails go to disk now.
    pub(crate) fn write_tails(&mut self) {
        for key in std::mem::take(&mut self.tails) {
            self.queue_write(key);
        }
    }

    /// A block that counts as stored goes.
    pub(crate) fn unstore(&mut self, key: BlockKey, bytes: u64) {
        self.uncount_stored(bytes);
        self.removals.push(key);
    }

    /// As `unstore`, for a block that somebody else takes off the disk.
    pub(crate) fn uncount_stored(&mut self, bytes: u64) {
        self.stored -= 1;
        self.stored_bytes -= bytes;
    }

    /// Whether a lookup or a hint waits for the disk.
    pub(crate) fn any_reads(&self) -> bool {
        !self.wanted.is_empty() || !self.reading.is_empty()
    }

    /// Whether blocks wait to be removed.
    pub(crate) fn any_removals(&self) -> bool {
        !self.removals.is_empty()
    }

    pub(crate) fn remove_conversation(&mut self, id: ConversationId) {
        self.record_removals.push(id);
    }

    pub(crate) fn record_sent(&mut self) {
        self.maintaining += 1;
    }

    fn count_stored(&mut self, bytes: u64) {
        self.stored += 1;
        self.stored_bytes += bytes;
    }

    /// Bytes that the tier may take.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    /// Another bound; what is over it leaves part by part.
    pub(crate) fn set_disk_bytes(&mut self, bytes: u64) {
        self.disk_bytes = bytes;
        self.disk_bytes_max = bytes / 100 * self.engine.stored_percent();
        self.disk_bytes_fitting = u64::MAX; // To be found out anew.
    }

    /// Bytes that blocks may take.
    pub(crate) fn disk_bytes_limit(&self) -> u64 {
        self.disk_bytes_max
    }

    /// The policies know of no block, and are told of all.
    pub(crate) fn settle_again(&mut self) {
        self.settling = Some(0);
    }

    pub(crate) fn stored_blocks(&self) -> u64 {
        self.stored
    }
}

impl Store {
    /// Begins whatever can begin. Promotes that cannot be are returned.
    pub(crate) fn begin_moves(&mut self, queue_changed: bool, now_ms: u64) -> Vec<Arrival> {
        self.now_ms = now_ms;
        if queue_changed {
            self.transfers.retry_hints();
        }
        self.choose_tails(now_ms);
        self.keep_frames_free();
        let failed = self.begin_reads();
        self.begin_copies();
        self.begin_imports();
        self.begin_writes();
        self.begin_maintenance();
        self.begin_erasure(now_ms);
        self.begin_verifying(now_ms);
        self.retry_disk(now_ms);
        failed
    }

    fn choose_tails(&mut self, now_ms: u64) {
        let idle_ms = now_ms.saturating_sub(self.config.tail_idle_ms);
        let directory = &self.directory;
        let is_idle =
            |key: &BlockKey| directory.get(key).is_none_or(|block| block.used_ms <= idle_ms);
        let idle: Vec<BlockKey> = self.transfers.tails.extract_if(is_idle).collect();
        for key in idle {
            self.transfers.queue_write(key);
        }
    }

    /// Lookups first, then what hints say, in the order of turns.
    fn begin_reads(&mut self) -> Vec<Arrival> {
        let mut failed = Vec::new();
        while self.transfers.reading.len() < READS_MAX
            && let Some(key) = self.transfers.wanted.pop_front()
        {
            let Some(block) = self.directory.get(&key) else {
                failed.extend(self.give_up(&key, MissReason::Evicted));
                continue;
            };
            if let Some(frame) = block.host {
                // Came by another way meanwhile: a commit.
                let waiters = self.transfers.take_waiters(&key);
                failed.push(Arrival { result: Ok(frame), waiters });
                continue;
            }
            let root = self.directory.label(block).root;
            let Some(host) = &self.host else { break };
            if host.counts().free == 0 && !self.make_frame_free() {
                // Room may come from writes under way; pins may be held for long.
                if self.transfers.any_writes() {
                    self.transfers.wanted.push_front(key);
                    break;
                }
                failed.extend(self.give_up(&key, MissReason::Quota));
                continue;
            }
            if !self.begin_read(key, root, false) {
                self.transfers.wanted.push_front(key);
                break;
            }
        }
        while self.transfers.reading.len() < READS_MAX && self.transfers.wanted.is_empty() {
            let Some(promote) = self.choose_promote() else { break };
            let key = *self.directory.key(promote.id);
            let block = self.directory.at(promote.id);
            let Some(root) = block.map(|block| self.directory.label(block).root) else { break };
            if !self.begin_read(key, root, true) {
                break;
            }
        }
        failed
    }

    /// `false` if there is no frame, or the readers are behind.
    fn begin_read(&mut self, key: BlockKey, root: RootKey, by_hint: bool) -> bool {
        let after = self.frame_of_parent(&key);
        let Some(host) = &mut self.host else { return false };
        let Some(handle) = host.grant_behind(after) else { return false };
        let job = Job::Read { key, root, handle, table: host.table().clone() };
        if self.disk.read(job).is_err() {
            host.free(handle.frame);
            return false;
        }
        self.transfers.begin_reading(key, Reading { handle, by_hint });
        true
    }

    /// Where the block before it is, or will be.
    fn frame_of_parent(&self, key: &BlockKey) -> Option<FrameIndex> {
        let (parent, block) = self.directory.parent(self.directory.find(key)?)?;
        let coming = || self.transfers.reading.get(parent).map(|reading| reading.handle.frame);
        block.host.or_else(coming)
    }

    fn give_up(&mut self, key: &BlockKey, reason: MissReason) -> Option<Arrival> {
        self.metrics.promote_failures.with_label_values(&[reason.label()]).inc();
        let waiters = self.transfers.take_waiters(key);
        if waiters.is_empty() {
            return None;
        }
        Some(Arrival { result: Err(reason), waiters })
    }

    fn begin_writes(&mut self) {
        if !self.transfers.can_write() {
            // Nothing can be written: blocks leave the host tier unsaved.
            self.transfers.dirty.clear();
            self.transfers.dirty_keys.clear();
            self.transfers.tails.clear();
            return;
        }
        if self.transfers.disk_state == DiskState::Opening {
            return;
        }
        if !self.shrink_disk() {
            self.send_removals();
            return; // First what is over the bound leaves.
        }
        while self.transfers.writing < WRITES_MAX {
            let Some(key) = self.transfers.next_write() else { return };
            let (Some(block), Some(host)) = (self.directory.get(&key), &mut self.host) else {
                continue; // Forgotten meanwhile.
            };
            let (Some(frame), OnDisk::Absent) = (block.host, block.disk) else { continue };
            let table = host.table().clone();
            let Ok(word) = table.state(frame) else { continue };
            let handle = FrameHandle { frame, generation: word.generation };
            let bytes = self.transfers.engine.block_bytes(table.geometry());
            if let Err(reason) = self.choose_write(&key, bytes) {
                self.metrics.writes_skipped.with_label_values(&[reason.label()]).inc();
                continue;
            }
            self.send_removals(); // Their room may be this block's.
            let Some(host) = &mut self.host else { return };
            let order = self.transfers.next_order;
            let job = Job::Write { key, handle, table, order };
            if self.disk.write(job).is_err() {
                self.transfers.dirty.push_front(key);
                self.transfers.dirty_keys.insert(key);
                return; // The writer is behind.
            }
            self.transfers.next_order += 1;
            self.transfers.writing += 1;
            host.hold(frame);
            if let Some(block) = self.directory.get_mut(&key) {
                block.disk = OnDisk::Writing;
            }
        }
    }

    fn send_removals(&mut self) {
        let transfers = &mut self.transfers;
        while !transfers.removals.is_empty() {
            let rest = transfers.removals.len().saturating_sub(REMOVALS_MAX);
            let batch = transfers.removals.split_off(rest);
            if let Err(Job::Remove(batch)) = self.disk.write(Job::Remove(batch)) {
                transfers.removals.extend(batch);
                return;
            }
            transfers.maintaining += 1;
        }
    }

    fn begin_maintenance(&mut self) {
        self.send_removals();
        let transfers = &mut self.transfers;
        let bytes = transfers.disk_bytes;
        if bytes != transfers.disk_bytes_told && self.disk.write(Job::Resize(bytes)).is_ok() {
            transfers.disk_bytes_told = bytes;
            transfers.maintaining += 1;
        }
        while let Some(id) = transfers.record_removals.pop() {
            if self.disk.write(Job::RemoveConversation(id)).is_err() {
                transfers.record_removals.push(id);
                return;
            }
            transfers.maintaining += 1;
        }
        let garbage = transfers.physical_bytes.saturating_sub(transfers.stored_bytes);
        let is_much =
            garbage > GARBAGE_BYTES_MIN && garbage > transfers.stored_bytes / 100 * GARBAGE_PERCENT;
        let collects = transfers.engine.leaves_garbage() && is_much;
        if collects && !transfers.reclaiming && self.disk.write(Job::Reclaim).is_ok() {
            transfers.reclaiming = true;
            transfers.maintaining += 1;
        }
    }

    /// A failed store is tried again, with growing pauses.
    fn retry_disk(&mut self, now_ms: u64) {
        let transfers = &mut self.transfers;
        if transfers.disk_bytes_fitting < u64::MAX {
            let until_ms = *transfers.fitting_until_ms.get_or_insert(now_ms + RETRY_MAX_MS);
            if now_ms >= until_ms {
                transfers.disk_bytes_fitting = u64::MAX; // There may be more room by now.
                transfers.fitting_until_ms = None;
            }
        }
        if transfers.disk_state != DiskState::Failed || !transfers.opened {
            return;
        }
        let (at_ms, pause_ms) =
            *transfers.retry.get_or_insert((now_ms + RETRY_MIN_MS, RETRY_MIN_MS));
        if now_ms >= at_ms && self.disk.write(Job::Probe).is_ok() {
            let pause_ms = (2 * pause_ms).min(RETRY_MAX_MS);
            transfers.retry = Some((now_ms + pause_ms, pause_ms));
            transfers.maintaining += 1;
        }
    }

    /// Writes go through again: what is in frames only is queued.
    fn disk_recovered(&mut self) {
        tracing::info!("the disk tier is in use again");
        self.transfers.disk_state = DiskState::Ready;
        self.transfers.disk_error = None;
        self.transfers.retry = None;
        let unsaved =
            |(_, block): &(&BlockKey, &Block)| block.host.is_some() && block.disk == OnDisk::Absent;
        for (key, block) in self.directory.iter().filter(unsaved) {
            self.transfers.mark_dirty(*key, block.is_full);
        }
    }

    /// The end of a disk job. Second: promotes that ended with it.
    pub(crate) fn finish(&mut self, done: Done) -> Option<Arrival> {
        match done {
            Done::Loaded { conversations, corrupt, usage } => {
                self.transfers.opened = true;
                self.transfers.physical_bytes = usage.physical_bytes;
                self.transfers.direct_io = usage.direct_io;
                self.loaded(conversations, corrupt);
            }
            Done::LoadFailed(error) => self.disk_failed(&error),
            Done::Written { key, frame, result } => self.written(key, frame, result),
            Done::Read { key, frame, result } => return self.read(key, frame, result),
            Done::Copied { key, frame, result } => self.copied(key, frame, result),
            Done::Filled { key, frame, result } => self.filled(key, frame, result),
            Done::Maintained { what, error, usage } => {
                self.transfers.maintaining -= 1;
                self.transfers.physical_bytes = usage.physical_bytes;
                if what == RECLAIMING {
                    self.transfers.reclaiming = false;
                }
                match error {
                    Some(error) => self.disk_failed(&error),
                    None if what == PROBING => self.disk_recovered(),
                    None => {}
                }
            }
            Done::ConversationPut { .. } | Done::Buried { .. } => self.transfers.maintaining -= 1,
            Done::Verified(blocks) => self.verified(blocks),
            Done::Erased { error, usage, .. } => {
                self.transfers.maintaining -= 1;
                self.transfers.physical_bytes = usage.physical_bytes;
                self.end_erasure(error.as_ref(), unix_ms());
            }
            Done::Conversation { .. } | Done::Flushed => {} // The loop's own.
        }
        None
    }

    fn disk_failed(&mut self, error: &dyn std::error::Error) {
        self.metrics.disk_errors.inc();
        self.transfers.disk_error = Some(error.to_string());
        if self.transfers.disk_state != DiskState::Failed {
            tracing::error!(%error, "the disk tier takes no writes for now");
            self.transfers.disk_state = DiskState::Failed;
        }
    }

    /// Blocks that the disk tier's index names: they may be looked up from now on.
    pub(crate) fn found_on_disk(&mut self, blocks: Vec<StoredBlock>) {
        for block in blocks {
            let StoredBlock { key, created_ms, order, bytes, .. } = block;
            let description = Description::of_stored(block);
            self.transfers.next_order = self.transfers.next_order.max(order + 1);
            let label = self.directory.get(&key).map(|known| *self.directory.label(known));
            match self.directory.get_mut(&key) {
                Some(known) if known.disk != OnDisk::Absent => continue, // Named twice.
                Some(known) if label == Some(description.label) => known.disk = OnDisk::Stored,
                Some(_) => {
                    // Replaced by another variant while the index was read.
                    self.transfers.removals.push(key);
                    continue;
                }
                None => {
                    self.directory.load(key, &description, created_ms);
                }
            }
            self.transfers.count_stored(bytes);
        }
    }

    /// The index has been read to its end.
    fn loaded(&mut self, conversations: Vec<StoredConversation>, corrupt: u64) {
        let blocks = self.transfers.stored;
        let records = conversations.len();
        tracing::info!(blocks, records, corrupt, "disk tier opened");
        self.metrics.corrupt.with_label_values(&["disk index"]).inc_by(corrupt);
        for StoredConversation { id, updated_ms, bytes, content } in conversations {
            match content {
                StoredContent::Record(outline) => {
                    self.conversations.found(id, updated_ms, bytes, *outline);
                    self.retain_chain(&id, unix_ms());
                }
                StoredContent::Tombstone(tombstone) => self.found_tombstone(id, tombstone),
                StoredContent::Unreadable => {
                    tracing::warn!(conversation = %id, "a record of another release is forgotten");
                    self.transfers.remove_conversation(id);
                }
            }
        }
        self.transfers.settling = Some(0);
    }

    /// Tells the policies of loaded blocks, some in each turn; only then may blocks leave the disk, so only
    /// then are others written. `true` while there are more.
    pub(crate) fn settle_loaded(&mut self) -> bool {
        let Some(from) = self.transfers.settling else { return false };
        self.transfers.settling = self.directory.settle(from, SETTLED_PER_TURN);
        self.refresh();
        let is_opening = self.transfers.disk_state == DiskState::Opening;
        if self.transfers.settling.is_none() && is_opening && self.transfers.opened {
            self.transfers.disk_state = DiskState::Ready;
        }
        true
    }

    fn written(&mut self, key: BlockKey, frame: FrameIndex, result: Result<(), WriteFailure>) {
        self.transfers.writing -= 1;
        let engine = self.transfers.engine;
        let bytes = self.geometry().map_or(0, |geometry| engine.block_bytes(geometry));
        if let Some(host) = &mut self.host {
            host.release_hold(frame);
        }
        let is_ours = self
            .directory
            .get(&key)
            .is_some_and(|block| block.disk == OnDisk::Writing && block.host == Some(frame));
        match result {
            Ok(()) => {
                self.transfers.writes += 1;
                self.transfers.disk_error = None;
                self.metrics.writes.inc();
                self.count_moved("host", "disk");
                self.transfers.count_stored(bytes);
                match self.directory.get_mut(&key) {
                    Some(block) if is_ours => block.disk = OnDisk::Stored,
                    _ => self.transfers.unstore(key, bytes), // Forgotten meanwhile.
                }
            }
            Err(failure) => {
                self.metrics.writes_skipped.with_label_values(&["failure"]).inc();
                if let Some(block) = self.directory.get_mut(&key)
                    && is_ours
                {
                    block.disk = OnDisk::Absent;
                }
                match failure {
                    WriteFailure::Disk(error) if error.is_full() => {
                        // The next write makes its room by dropping the oldest, as in a full tier.
                        self.transfers.disk_bytes_fitting = self.transfers.stored_bytes;
                        self.transfers.disk_error = Some(error.to_string());
                    }
                    WriteFailure::Disk(error) => self.disk_failed(&error),
                    WriteFailure::Checksum if is_ours => {
                        tracing::warn!(%key, "block forgotten: its frame is not what was committed");
                        self.metrics.corrupt.with_label_values(&["frame"]).inc();
                        self.forget(&key, MissReason::Checksum);
                    }
                    WriteFailure::Checksum => {}
                }
            }
        }
    }

    fn read(
        &mut self,
        key: BlockKey,
        frame: FrameIndex,
        result: Result<Box<BlockHeader>, MissReason>,
    ) -> Option<Arrival> {
        let reading = self.transfers.reading.remove(&key)?;
        let waiters = self.transfers.take_waiters(&key);
        let host = self.host.as_mut()?;
        assert!(reading.handle.frame == frame, "a read ended in another frame");
        let header = match result {
            Ok(header) => header,
            Err(reason) => {
                host.free(frame);
                self.metrics.promote_failures.with_label_values(&[reason.label()]).inc();
                if reading.by_hint {
                    self.transfers.failed_hints.insert(key);
                }
                if reason != MissReason::Io {
                    if reason != MissReason::Evicted {
                        self.metrics.corrupt.with_label_values(&["disk block"]).inc();
                    }
                    self.forget(&key, reason); // It will not get better.
                }
                return Some(Arrival { result: Err(reason), waiters });
            }
        };
        let label = self.directory.get(&key).map(|block| *self.directory.label(block));
        let is_same = label.is_some_and(|Label { root, variant, numerics, .. }| {
            (root, variant, numerics) == (header.root, header.variant, header.numerics)
        });
        let wanted = self.directory.get_mut(&key).filter(|block| is_same && block.host.is_none());
        let Some(block) = wanted else {
            host.free(frame);
            let other = self.directory.get(&key).and_then(|block| block.host);
            return Some(Arrival { result: other.ok_or(MissReason::Evicted), waiters });
        };
        if let Err(error) = host.publish(frame, key) {
            tracing::error!(frame = frame.0, %error, "frame lost");
            return Some(Arrival { result: Err(MissReason::Checksum), waiters });
        }
        block.host = Some(frame);
        block.hinted = reading.by_hint && waiters.is_empty();
        if block.hinted {
            self.foresight.promoted(key, Instant::now());
        }
        self.count_moved("disk", "host");
        if reading.by_hint {
            self.transfers.promotes_by_hint += 1;
            self.metrics.promotes.with_label_values(&["hint"]).inc();
        } else {
            self.transfers.promotes_by_lookup += 1;
            self.metrics.promotes.with_label_values(&["lookup"]).inc();
        }
        Some(Arrival { result: Ok(frame), waiters })
    }
}

impl Tiers for Store {
    fn catalogue(&mut self) -> Catalogue<'_> {
        Catalogue {
            directory: &mut self.directory,
            queue: &mut self.queue,
            index: &mut self.index,
            retentions: &mut self.retentions,
            budget: &mut self.budget,
        }
    }

    fn now_ms(&self) -> u64 {
        self.now_ms
    }

    fn take_changed(&mut self) -> Vec<BlockKey> {
        let mut keys = std::mem::take(&mut self.transfers.changed);
        keys.extend(self.host.iter_mut().flat_map(HostTier::take_changed));
        keys
    }

    fn is_asked_for(&self, key: &BlockKey) -> bool {
        self.transfers.reading.contains_key(key) || self.transfers.waiters.contains_key(key)
    }

    fn in_host(&self, key: &BlockKey, block: &Block) -> Residence {
        match (block.host, &self.host) {
            (Some(frame), Some(host)) if host.is_evictable(frame) => Residence::Free,
            (Some(_), _) => Residence::Held,
            (None, _) if self.is_asked_for(key) => Residence::Held,
            (None, _) if self.transfers.failed_hints.contains(key) => Residence::Held,
            (None, _) => Residence::Absent,
        }
    }

    fn frames(&self) -> Frames {
        // Frames that may hold no block are neither there nor free.
        let of = |host: &HostTier| {
            let all = self.host_frames(host);
            let unused = host.table().layout().frame_count() - all;
            let free = host.counts().free.saturating_sub(unused);
            Frames { all, free, coming: host.coming() }
        };
        self.host.as_ref().map_or(Frames { all: 0, free: 0, coming: 0 }, of)
    }

    fn can_write(&self) -> bool {
        self.transfers.can_write()
    }

    fn queue_write(&mut self, key: &BlockKey) {
        self.transfers.tails.remove(key);
        self.transfers.queue_write(*key);
    }

    fn free_frame(&mut self, key: &BlockKey) {
        let frame = self.directory.get(key).and_then(|block| block.host);
        if let (Some(frame), Some(host)) = (frame, &mut self.host) {
            host.free(frame);
            self.leave_host(key, MissReason::Evicted);
            self.transfers.evictions_host += 1;
            self.metrics.evictions.with_label_values(&["host"]).inc();
        }
    }

    fn disk_room(&self, bytes: u64) -> DiskRoom {
        let limit = self.transfers.disk_bytes_max.min(self.transfers.disk_bytes_fitting);
        let under_way = self.transfers.writing as u64 * bytes;
        if bytes > limit {
            DiskRoom::Never
        } else if self.transfers.stored_bytes + under_way + bytes > limit {
            DiskRoom::Full
        } else {
            DiskRoom::Fits
        }
    }

    fn drop_from_disk(&mut self, key: &BlockKey) {
        let bytes = self.disk_bytes(key);
        let Some(block) = self.directory.get_mut(key).filter(|block| block.is_stored()) else {
            return;
        };
        block.disk = OnDisk::Absent;
        if block.host.is_none() {
            self.directory.remove(key, MissReason::Evicted);
        }
        self.transfers.unstore(*key, bytes);
        self.transfers.evictions_disk += 1;
        self.metrics.evictions.with_label_values(&["disk"]).inc();
    }
}

impl Transfers {
    fn any_writes(&self) -> bool {
        self.writing > 0 || (self.disk_state == DiskState::Ready && !self.dirty.is_empty())
    }
}
