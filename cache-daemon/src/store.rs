//! Blocks in all tiers: directory, host frames and disk together, and what may be done with a block.
//!
//! The moves between tiers are in `crate::moves` and [`crate::transfer`]; this file has what the loop's messages ask for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_protocol::frame::FrameError;
use kv_protocol::message::{CommitOutcome, FoundBlock, FrameHandle, Hint, KeyList, Tier};
use kv_protocol::table::{FrameTable, RegionView};
use kv_protocol::{AttachmentId, BlockHeader, BlockKey, FrameIndex, Geometry, MissReason};

use crate::attachment::{Fetch, ProtocolError};
use crate::conversation::Conversations;
use crate::deletion::Deletions;
use crate::directory::{Block, Chain, Description, Directory, EntryId, Link, OnDisk};
use crate::export::Exports;
use crate::foresight::Foresight;
use crate::import::Imports;
use crate::metrics::Metrics;
use crate::migrate::pace::Paces;
use crate::policy::budget::WriteBudget;
use crate::policy::retention::{Due, Refused, Retention, Retentions, pinned_max};
use crate::policy::{Index, Limits, PolicyKind, QueueTicket};
use crate::queue::{Queue, TurnId};
use crate::tier::disk::{DiskWorkers, Engine};
use crate::tier::host::{HandleError, HostTier, free_high};
use crate::transfer::{Transfers, Waiter};
use crate::verify::Verification;

/// Blocks that one walk for expired ones looks at, a millisecond's work: a million take 16 walks.
const EXPIRED_PER_WALK: usize = 1 << 16;

/// Settings of the store.
#[derive(Debug, Clone, Copy)]
pub struct StoreConfig {
    /// Which blocks leave the tiers first.
    pub policy: PolicyKind,
    /// What keeps the payload on disk.
    pub disk_engine: Engine,
    /// Bytes that the disk tier may take; 0 is no disk.
    pub disk_bytes: u64,
    /// Milliseconds after its last use at which a block is forgotten.
    pub ttl_ms: Option<u64>,
    /// Milliseconds after its last use at which a tail goes to disk.
    pub tail_idle_ms: u64,
    /// Milliseconds after a deletion at which nothing of it is on disk any more.
    pub deletion_deadline_ms: u64,
    /// What a tenant may have before its own blocks leave first.
    pub tenant_share: TenantShare,
    /// Bytes that may be written to disk in a day; `None` is no bound.
    pub write_bytes_per_day: Option<u64>,
}

/// Shares of the tiers, in percent; 100 is no bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct TenantShare {
    /// Of the host tier.
    pub host: u8,
    /// Of the disk tier.
    pub disk: u8,
}

impl Default for TenantShare {
    fn default() -> Self {
        Self { host: 100, disk: 100 }
    }
}

impl TenantShare {
    /// Bounds of tiers that keep so many blocks each. Shares are of what a tier keeps: host frames above the
    /// watermark are kept for nobody. So tenants whose shares come to no more than 100 percent never take from
    /// each other.
    pub(crate) fn limits(self, frames: u32, disk_blocks: u64) -> (Limits, Limits) {
        let limits = |blocks: u64, percent: u8| Limits {
            quota: (percent < 100).then(|| blocks * u64::from(percent) / 100),
            pinned: pinned_max(blocks),
        };
        let in_host = u64::from(frames.saturating_sub(free_high(frames)));
        (limits(in_host, self.host), limits(disk_blocks, self.disk))
    }
}

/// Of a disk tier of `disk_bytes`, what conversations' records may take.
pub(crate) fn record_bytes_max(disk_bytes: u64) -> u64 {
    disk_bytes / 8
}

/// See the module.
pub struct Store {
    pub(crate) config: StoreConfig,
    pub(crate) directory: Directory,
    pub(crate) queue: Queue,
    /// Hinted turns that have left the queue: what makes a ticket out of a place.
    turns_left: u64,
    /// Anticipations so far.
    anticipations: u64,
    pub(crate) index: Index,
    pub(crate) retentions: Retentions,
    pub(crate) budget: WriteBudget,
    /// When the loop last turned.
    pub(crate) now_ms: u64,
    /// `None` until a runtime has brought a geometry.
    pub(crate) host: Option<HostTier>,
    pub(crate) disk: DiskWorkers,
    pub(crate) transfers: Transfers,
    pub(crate) conversations: Conversations,
    pub(crate) deletions: Deletions,
    pub(crate) verification: Verification,
    pub(crate) exports: Exports,
    pub(crate) imports: Imports,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) foresight: Foresight,
    /// Of migrations and the remote tier.
    pub(crate) paces: Paces,
    /// Of the frames, how many may hold blocks.
    pub(crate) host_percent: u8,
    /// Where the next walk for expired blocks begins.
    expiring: usize,
}

/// What a lookup found: blocks pinned now, and how many are on their way.
#[derive(Debug, Default)]
pub struct LookedUp {
    /// In frames, pinned.
    pub pinned: Vec<FoundBlock>,
    /// On disk, promotes asked for.
    pub on_disk: usize,
    /// Leading blocks of the chain that are in its list of whole ones.
    pub whole: u32,
    /// Of those, on disk.
    pub on_disk_whole: u64,
    /// Why the chain ends.
    pub miss: Option<MissReason>,
}

impl Store {
    /// An empty store over disk threads that are opening the disk tier.
    pub fn new(
        config: StoreConfig,
        disk: DiskWorkers,
        metrics: Arc<Metrics>,
        paces: Paces,
    ) -> Self {
        Self {
            config,
            directory: Directory::default(),
            queue: Queue::default(),
            turns_left: 0,
            anticipations: 0,
            index: Index::new(config.policy, Limits::NONE, Limits::NONE),
            retentions: Retentions::new(0),
            budget: WriteBudget::new(config.write_bytes_per_day),
            now_ms: 0,
            host: None,
            disk,
            transfers: Transfers::new(config.disk_bytes, config.disk_engine),
            conversations: Conversations::new(record_bytes_max(config.disk_bytes)),
            deletions: Deletions::default(),
            verification: Verification::default(),
            exports: Exports::default(),
            imports: Imports::default(),
            foresight: Foresight::new(metrics.clone()),
            metrics,
            paces,
            host_percent: 100,
            expiring: 0,
        }
    }

    /// Shape of the blocks, once known.
    pub fn geometry(&self) -> Option<&Geometry> {
        self.host.as_ref().map(|host| host.table().geometry())
    }

    /// Bounds of both tiers, once it is known how many blocks they keep.
    fn limits(&self) -> (Limits, Limits) {
        let Some(host) = &self.host else { return (Limits::NONE, Limits::NONE) };
        let block_bytes = self.config.disk_engine.block_bytes(host.table().geometry());
        let disk_blocks = self.transfers.disk_bytes_limit() / block_bytes.max(1);
        self.config.tenant_share.limits(self.host_frames(host), disk_blocks)
    }

    /// Frames that may hold blocks.
    pub(crate) fn host_frames(&self, host: &HostTier) -> u32 {
        let all = host.table().layout().frame_count();
        (u64::from(all) * u64::from(self.host_percent) / 100).max(1) as u32
    }

    /// A new order of leaving, under the policy and the bounds in force: it learns of the blocks part by part, as
    /// of loaded ones.
    pub(crate) fn rebuild_index(&mut self) {
        let (host, disk) = self.limits();
        self.index = Index::new(self.config.policy, host, disk);
        self.retentions.set_pinned_max(host.pinned.max(disk.pinned));
        self.transfers.settle_again();
    }

    /// What was said of blocks that are known: how long they live without a use, until when they stay. The
    /// longest word counts. How many of them got no pin, or nothing at all: as many have one as may have.
    pub fn retain(&mut self, keys: &[BlockKey], said: Retention, now_ms: u64) -> u32 {
        let mut refused = 0;
        for key in keys {
            let Some(block) = self.directory.get_mut(key) else { continue };
            let result = self.retentions.retain(*key, block.used_ms, said, now_ms);
            if let Err(reason) = result {
                refused += 1;
                let what = match reason {
                    Refused::Pins => "pin",
                    Refused::Retentions => "retention",
                };
                self.metrics.retentions_refused.with_label_values(&[what]).inc();
            }
        }
        refused
    }

    /// Takes over what an earlier worker left in the region.
    pub fn adopt_region(&mut self, view: &RegionView) {
        match view.table() {
            Ok(table) => self.adopt_table(table),
            Err(error) => tracing::info!(%error, "starting with an empty host tier"),
        }
    }

    fn adopt_table(&mut self, table: FrameTable) {
        let geometry = *table.geometry();
        let (mut host, mut adopted, corrupt) = HostTier::adopt(table);
        self.metrics.corrupt.with_label_values(&["frame"]).inc_by(corrupt.into());
        adopted.sort_by_key(|block| block.header.created_ms); // Parents before children.
        let count = adopted.len();
        for block in adopted {
            let key = block.header.key;
            if self.directory.get(&key).is_some_and(|known| known.host.is_some()) {
                host.disown(block.frame); // A second copy.
                continue;
            }
            host.set_block(block.frame, key);
            if let Some(known) = self.directory.get_mut(&key) {
                known.host = Some(block.frame);
                continue;
            }
            let is_full = block.header.is_full(&geometry);
            let bytes = self.config.disk_engine.block_bytes(&geometry);
            let description = Description::of(&block.header, is_full, bytes);
            self.directory.insert(key, &description, block.header.created_ms, block.frame);
            self.transfers.mark_dirty(key, is_full);
        }
        tracing::info!(blocks = count, corrupt, %geometry, "host tier adopted");
        self.host = Some(host);
        self.rebuild_index();
    }

    /// Formats the region for a geometry; blocks that are nowhere else are forgotten.
    pub fn format(&mut self, view: &RegionView, geometry: Geometry) -> bool {
        let table = match view.format(geometry) {
            Ok(table) => table,
            Err(error) => {
                tracing::error!(%error, "region not formatted");
                return false;
            }
        };
        let in_host: Vec<BlockKey> =
            self.directory.iter().filter(|(_, b)| b.host.is_some()).map(|(key, _)| *key).collect();
        for key in in_host {
            self.leave_host(&key, MissReason::Evicted);
        }
        self.host = Some(HostTier::adopt(table).0);
        self.rebuild_index();
        tracing::info!(%geometry, epoch = view.format_epoch(), "region formatted");
        true
    }

    /// Whether a format would take something from somebody: pins, fillings, copies under way, blocks
    /// that could still go to disk.
    pub fn is_busy(&self) -> bool {
        let in_use = self.host.as_ref().is_some_and(HostTier::any_in_use);
        in_use || self.transfers.any_under_way()
    }

    /// A turn is foretold; `list` is what it will read.
    pub fn hint(&mut self, id: TurnId, hint: Hint, list: &KeyList) {
        let ticket = self.ticket(id, hint);
        self.directory.learn_branches(list);
        let links = self.directory.lookup(list).links;
        // The rest of the list as well: its blocks may still be on their way here.
        let known = links.len();
        let mut keys: Vec<BlockKey> = links.iter().map(|link| link.key).collect();
        keys.extend(list.keys.iter().skip(known));
        self.queue.place(id, ticket, &keys, known as u64);
    }

    /// When a turn comes, told again.
    pub fn hint_again(&mut self, id: TurnId, hint: Hint) {
        let ticket = self.ticket(id, hint);
        self.queue.move_to(id, ticket);
    }

    /// An anticipated turn keeps its ticket however often it is told.
    fn ticket(&mut self, id: TurnId, hint: Hint) -> QueueTicket {
        match hint {
            Hint::Queued { place, .. } => QueueTicket(self.turns_left + u64::from(place)),
            Hint::Anticipated => {
                let held = self.queue.ticket(id).filter(|ticket| ticket.is_anticipated());
                held.unwrap_or_else(|| {
                    self.anticipations += 1;
                    QueueTicket::anticipated(self.anticipations)
                })
            }
        }
    }

    /// A turn has begun, or will not. One that never was in the queue left no place there: the tickets of
    /// those that are stay right.
    pub fn turn_left(&mut self, id: TurnId) {
        let left = self.queue.remove(id);
        self.turns_left += u64::from(left.is_some_and(|ticket| !ticket.is_anticipated()));
    }

    /// The block's frame holds it no more; forgets the block if it is nowhere else. The frame itself is
    /// the caller's.
    pub(crate) fn leave_host(&mut self, key: &BlockKey, reason: MissReason) {
        let bytes = self.payload_bytes();
        let Some(block) = self.directory.get_mut(key) else { return };
        block.host = None;
        if std::mem::take(&mut block.hinted) {
            self.foresight.left(key, bytes);
        }
        if block.disk == OnDisk::Absent {
            self.directory.remove(key, reason);
        }
    }

    /// What a block takes in a frame.
    pub(crate) fn payload_bytes(&self) -> u64 {
        self.geometry().map_or(0, Geometry::payload_bytes)
    }

    /// A block's bytes went from one tier to another.
    pub(crate) fn count_moved(&self, from: &str, to: &str) {
        self.metrics.moved_bytes.with_label_values(&[from, to]).inc_by(self.payload_bytes());
    }

    /// What a block takes on disk.
    pub(crate) fn disk_bytes(&self, key: &BlockKey) -> u64 {
        let block = self.directory.get(key);
        block.map_or(0, |block| self.directory.label(block).disk_bytes)
    }

    /// Forgets a block in all tiers.
    pub(crate) fn forget(&mut self, key: &BlockKey, reason: MissReason) {
        let bytes = self.disk_bytes(key);
        let Some(block) = self.directory.remove(key, reason) else { return };
        if block.hinted {
            self.foresight.left(key, self.payload_bytes());
        }
        if let (Some(frame), Some(host)) = (block.host, &mut self.host) {
            host.disown(frame);
        }
        if block.is_stored() {
            self.transfers.unstore(*key, bytes);
        } // While `Writing`, the end of the write finds the block unknown and removes it.
    }

    /// A runtime gives a pin back whose frame does not hold the block: it is read from disk again, or computed.
    pub fn reject(&mut self, handle: FrameHandle, id: AttachmentId) -> Result<(), HandleError> {
        let Some(host) = &mut self.host else { return Ok(()) };
        host.unpin(handle, id)?;
        let Some(key) = host.block(handle.frame) else { return Ok(()) }; // Forgotten already.
        tracing::warn!(%key, frame = handle.frame.0, "a frame is not what was committed");
        self.metrics.corrupt.with_label_values(&["frame"]).inc();
        if self.directory.get(&key).is_some_and(Block::is_stored) {
            host.disown(handle.frame);
            self.leave_host(&key, MissReason::Checksum);
        } else {
            self.forget(&key, MissReason::Checksum);
        }
        Ok(())
    }

    /// A runtime has filled a frame. What it says is checked; the frame is published or free after this.
    pub fn commit(
        &mut self,
        id: AttachmentId,
        handle: FrameHandle,
        now_ms: u64,
    ) -> Result<CommitOutcome, ProtocolError> {
        let Some(host) = &mut self.host else { return Ok(CommitOutcome::Refused) };
        host.check_filling(handle, id)?;
        let frame = handle.frame;
        let header = match host.table().header(handle) {
            Ok(header) => header,
            Err(error) => {
                tracing::warn!(frame = frame.0, %error, "commit refused");
                self.metrics.corrupt.with_label_values(&["commit"]).inc();
                host.free(frame);
                return Ok(CommitOutcome::Refused);
            }
        };
        Ok(self.enter(&header, frame, now_ms).map_err(HandleError::from)?)
    }

    /// Enters the block of a frame that was filled: by a runtime, or by an import. The frame is published
    /// or free after this.
    pub(crate) fn enter(
        &mut self,
        header: &BlockHeader,
        frame: FrameIndex,
        now_ms: u64,
    ) -> Result<CommitOutcome, FrameError> {
        let Some(host) = &mut self.host else { return Ok(CommitOutcome::Refused) };
        let key = header.key;
        if self.deletions.refuses(key, &header.parent) {
            host.free(frame); // Of a turn that began before its conversation was deleted.
            return Ok(CommitOutcome::Refused);
        }
        let geometry = host.table().geometry();
        let is_full = header.is_full(geometry);
        let bytes = self.config.disk_engine.block_bytes(geometry);
        let description = Description::of(header, is_full, bytes);
        let label = self.directory.get(&key).map(|known| *self.directory.label(known));
        if let Some(known) = self.directory.get_mut(&key) {
            (known.used_ms, known.reused) = (now_ms, true);
            if label == Some(description.label) {
                if known.host.is_some() || self.transfers.is_reading(&key) {
                    host.free(frame);
                    return Ok(CommitOutcome::Known);
                }
                // On disk only: the frame spares a promote, and nothing needs to be written again.
                known.host = Some(frame);
                host.publish(frame, key)?;
                return Ok(CommitOutcome::Stored);
            }
            // Other labels: the newest is the likeliest to be read again.
            self.forget(&key, MissReason::Variant);
        }
        let Some(host) = &mut self.host else { return Ok(CommitOutcome::Refused) };
        host.publish(frame, key)?;
        self.directory.insert(key, &description, now_ms, frame);
        self.count_moved("device", "host");
        let Description { parent, label, tokens, .. } = &description;
        self.conversations.goes_on(parent.short(), key.short(), tokens, is_full);
        for tail in self.directory.outgrown(parent, label, tokens) {
            self.forget(&tail, MissReason::Evicted);
        }
        self.transfers.mark_dirty(key, is_full);
        Ok(CommitOutcome::Stored)
    }

    /// Finds the longest known prefix; pins what is in frames and asks for what is on disk.
    pub fn lookup(&mut self, waiter: Waiter, list: &KeyList, now_ms: u64) -> LookedUp {
        self.directory.learn_branches(list);
        let chain = self.directory.lookup(list);
        let whole = self.count_lookup(list, &chain, now_ms);
        let mut found = LookedUp { miss: chain.miss, whole, ..LookedUp::default() };
        let now = Instant::now();
        let Some(host) = &mut self.host else { return found };
        let mut lost = Vec::new();
        for Link { index, key, id } in chain.links {
            let Some(block) = self.directory.at_mut(id) else { continue };
            block.used_ms = now_ms;
            let was_reused = std::mem::replace(&mut block.reused, true);
            let Some(frame) = block.host else {
                self.transfers.want(key, Waiter { index, ..waiter });
                found.on_disk += 1;
                found.on_disk_whole += u64::from(index < found.whole);
                continue;
            };
            if !was_reused && block.disk == OnDisk::Absent {
                self.transfers.mark_dirty(key, block.is_full); // It may not have been worth a write before.
            }
            match host.pin(frame, waiter.id) {
                Ok(handle) => {
                    let hinted = std::mem::take(&mut block.hinted);
                    if hinted {
                        self.foresight.found(&key, now);
                    }
                    let tier = if hinted { Tier::Disk } else { Tier::Host };
                    found.pinned.push(FoundBlock { index, handle, tier });
                }
                Err(error) => {
                    tracing::error!(frame = frame.0, %error, "frame lost");
                    found.miss = Some(MissReason::Checksum);
                    lost.push(key);
                }
            }
        }
        for key in lost {
            self.leave_host(&key, MissReason::Checksum);
        }
        found
    }

    /// Counts the tokens of whole blocks: what is in frames is a hit now, what is on its way when it arrives.
    /// How many whole blocks the chain has.
    fn count_lookup(&self, list: &KeyList, chain: &Chain, now_ms: u64) -> u32 {
        let tokens = self.tokens_per_block();
        let is_listed = |(key, link): &(&BlockKey, &Link)| **key == link.key;
        let whole = list.keys.iter().zip(&chain.links).take_while(is_listed).count();
        let (mut host, mut hinted) = (0, 0);
        for link in &chain.links[..whole] {
            match self.directory.at(link.id) {
                Some(Block { host: Some(_), hinted: true, .. }) => hinted += 1,
                Some(Block { host: Some(_), .. }) => host += 1,
                _ => {}
            }
        }
        let asked = list.keys.len() as u64;
        let missing = asked - whole as u64;
        self.metrics.lookup_tokens.inc_by(asked * tokens);
        self.metrics.hit_tokens.with_label_values(&["host"]).inc_by(host * tokens);
        self.metrics.hit_tokens.with_label_values(&["disk"]).inc_by(hinted * tokens);
        if let Some(reason) = chain.miss {
            let missed = self.metrics.miss_tokens.with_label_values(&[reason.label()]);
            missed.inc_by(missing * tokens);
        }
        if let (Some(MissReason::Evicted), Some(gone_ms)) = (chain.miss, chain.gone_ms) {
            let after = Duration::from_millis(now_ms.saturating_sub(gone_ms));
            self.metrics.evicted_then_wanted_seconds.observe(after.as_secs_f64());
        }
        whole as u32
    }

    /// One block of a lookup arrived, or did not.
    pub(crate) fn count_arrival(&self, fetch: &mut Fetch, index: u32, miss: Option<MissReason>) {
        if fetch.remaining == 0 {
            self.metrics.late_stall_seconds.observe(fetch.since.elapsed().as_secs_f64());
        }
        if index >= fetch.whole {
            return;
        }
        fetch.remaining_whole = fetch.remaining_whole.saturating_sub(1);
        let counter = match miss {
            None => self.metrics.hit_tokens.with_label_values(&["disk"]),
            Some(reason) => self.metrics.miss_tokens.with_label_values(&[reason.label()]),
        };
        counter.inc_by(self.tokens_per_block());
    }

    /// Who waited for the rest of a lookup's blocks does not any more.
    pub(crate) fn count_given_up(&self, fetch: &Fetch) {
        self.metrics.late_stall_seconds.observe(fetch.since.elapsed().as_secs_f64());
        let late = self.metrics.miss_tokens.with_label_values(&[MissReason::Late.label()]);
        late.inc_by(fetch.remaining_whole * self.tokens_per_block());
    }

    fn tokens_per_block(&self) -> u64 {
        self.geometry().map_or(0, |geometry| geometry.tokens_per_block().into())
    }

    /// Everything that the settings and the clock make unwanted.
    pub fn expire(&mut self, now_ms: u64) {
        let oldest_ms = self.config.ttl_ms.map_or(0, |ttl| now_ms.saturating_sub(ttl));
        let from = std::mem::take(&mut self.expiring);
        for id in self.conversations.expire(oldest_ms) {
            self.transfers.remove_conversation(id);
        }
        self.now_ms = now_ms;
        self.end_retentions();
        if oldest_ms == 0 {
            return;
        }
        let (part, next) = self.directory.part(from, EXPIRED_PER_WALK);
        self.expiring = next.unwrap_or_default();
        let is_old = |id: &EntryId| {
            let key = self.directory.key(*id);
            self.directory.at(*id).is_some_and(|block| block.used_ms < oldest_ms)
                && !self.retentions.has(key)
                && !self.transfers.is_reading(key)
        };
        let expired: Vec<BlockKey> =
            part.into_iter().filter(is_old).map(|id| *self.directory.key(id)).collect();
        for key in expired {
            self.forget(&key, MissReason::Expired);
            self.metrics.expirations.inc();
        }
    }

    /// Blocks whose own time is up are forgotten; those that fade, or are pinned no more, have other ranks.
    fn end_retentions(&mut self) {
        let used_ms = |key: &BlockKey| self.directory.get(key).map(|block| block.used_ms);
        for due in self.retentions.due(self.now_ms, used_ms) {
            match due {
                Due::Changed(key) => {
                    self.directory.get_mut(&key);
                }
                Due::Expired(key) => {
                    self.forget(&key, MissReason::Expired);
                    self.metrics.expirations.inc();
                }
            }
        }
    }
}
