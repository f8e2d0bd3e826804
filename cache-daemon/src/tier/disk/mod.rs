//! The disk tier: a trait for where bytes rest, and the threads that do the waiting.
//!
//! The loop never touches the disk: it sends a [`Job`] and later gets a [`Done`]. One thread writes, in
//! order (a removal overtakes no write); [`READERS`] threads read.
//!
//! **Invariants**
//! - What is read is served only if header, key, root and the CRC32C of each row are right; the row
//!   checksums are also checked before a block is written.
//! - A block is whole or absent, whenever the process dies.

pub mod busy;
mod copies;
mod database;
pub mod engine;
pub mod none;
pub mod rocks;
pub mod slots;
#[cfg(test)]
mod tests;

pub use busy::Busy;
pub use copies::CopyFrom;
pub use engine::Engine;

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kv_protocol::message::FrameHandle;
use kv_protocol::table::FrameTable;
use kv_protocol::{
    BlockHeader, BlockKey, ConversationId, FrameIndex, Generation, Geometry, MissReason,
    NumericsTag, Record, RootKey, Span, Variant,
};

use crate::key_map::KeySet;
use crate::migrate::bundle::BlockBytes;
use crate::outline::Outline;
use crate::tombstone::Tombstone;

/// Reads, and writes, that a drive has to do at once: 8 MB in flight with blocks of a megabyte, which keeps
/// it busy.
pub const READS_AT_ONCE: usize = 8;
/// Threads that read: while some check what came, the drive has others' reads to do.
pub const READERS: usize = READS_AT_ONCE + READS_AT_ONCE / 2;
/// Blocks written as one group: the drive has something to do from its first to its last. They stay in their
/// frames meanwhile, so a group costs no memory.
pub const GROUP_MAX: usize = 64;
/// Jobs that may wait for the writer, and for the readers.
pub const JOBS_MAX: usize = 256;
/// Blocks that a store being opened hands over at once, and parts that may wait for the loop: a million
/// blocks are never in memory twice.
const FOUND_PART_BLOCKS: usize = 256;
const FOUND_PARTS_MAX: usize = 8;
/// Bytes copied before they are checked: what the checksum's three lanes take at once.
const CHECKED_PIECE_BYTES: usize = 24 << 10;
/// Blocks in one removal.
pub const REMOVALS_MAX: usize = 256;

/// Why the disk did not do it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// There is no disk tier.
    #[error("no disk tier is configured (--disk-dir)")]
    Absent,
    /// The database said no; no space is one of its reasons.
    #[error("disk tier in {dir}: {what}: {message}")]
    Database {
        /// Where.
        dir: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The database's words.
        message: String,
    },
    /// The operating system said no.
    #[error("disk tier: {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Its words.
        source: std::io::Error,
    },
    /// No room that may be taken.
    #[error(
        "disk tier has no room for {needed} more bytes: blocks leave host memory unsaved; give the volume more room, or the tier fewer --disk-bytes"
    )]
    Full {
        /// Of a slot, or of a file with the reserve.
        needed: u64,
    },
    /// Bytes read are not what was written.
    #[error("disk tier: {what} is corrupt: {message}")]
    Corrupt {
        /// Which.
        what: &'static str,
        /// How it was seen.
        message: String,
    },
    /// The store refuses writes since one failed.
    #[error("disk tier takes no writes since one failed: {message}")]
    Poisoned {
        /// The first failure.
        message: String,
    },
}

impl DiskError {
    /// Whether there is no room, rather than something broken.
    pub fn is_full(&self) -> bool {
        matches!(self, DiskError::Full { .. })
    }

    /// The same for another block of a group; an operating system's error keeps its code.
    fn repeat(&self) -> Self {
        match self {
            DiskError::Absent => DiskError::Absent,
            DiskError::Database { dir, what, message } => {
                DiskError::Database { dir: dir.clone(), what, message: message.clone() }
            }
            DiskError::Io { what, source } => {
                let same = std::io::Error::from_raw_os_error;
                let source = source.raw_os_error().map_or_else(|| source.kind().into(), same);
                DiskError::Io { what, source }
            }
            DiskError::Full { needed } => DiskError::Full { needed: *needed },
            DiskError::Corrupt { what, message } => {
                DiskError::Corrupt { what, message: message.clone() }
            }
            DiskError::Poisoned { message } => DiskError::Poisoned { message: message.clone() },
        }
    }
}

/// A block to be written, from where it lies.
pub struct NewBlock<'a> {
    /// Shape.
    pub geometry: &'a Geometry,
    /// Generation 0: that is a frame's, on disk there is none.
    pub header: &'a BlockHeader,
    /// Of this write.
    pub order: u64,
    /// Others may write these bytes at any time: what is stored is checked again when it is read.
    pub payload: &'a Span,
}

impl NewBlock<'_> {
    /// Whether the payload is what the header vouches for; engines ask before they store it.
    pub fn is_right(&self) -> bool {
        check_rows(self.header, self.geometry, self.payload)
    }
}

/// A block that a restarted worker finds on disk: what the directory needs of its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBlock {
    /// Name.
    pub key: BlockKey,
    /// The full block before, or the root.
    pub parent: BlockKey,
    /// Model and tenant.
    pub root: RootKey,
    /// How it was computed.
    pub variant: Variant,
    /// With which arithmetic.
    pub numerics: NumericsTag,
    /// Unix milliseconds.
    pub created_ms: u64,
    /// Ids of a partial block's tokens; of a full block only the first.
    pub tokens: Arc<[u32]>,
    /// Whether all token places are taken.
    pub is_full: bool,
    /// What it takes.
    pub bytes: u64,
    /// Of its write.
    pub order: u64,
}

impl StoredBlock {
    /// Of a block that takes `bytes`.
    pub fn new(header: &BlockHeader, geometry: &Geometry, bytes: u64, order: u64) -> Self {
        let BlockHeader { key, parent, root, variant, numerics, created_ms, .. } = *header;
        let is_full = header.is_full(geometry);
        let known = if is_full { 1 } else { header.tokens.len() };
        let tokens = header.tokens[..known].into();
        Self { key, parent, root, variant, numerics, created_ms, tokens, is_full, bytes, order }
    }
}

/// What a restarted worker finds on disk under a conversation's id.
#[derive(Debug, Clone)]
pub struct StoredConversation {
    /// Name.
    pub id: ConversationId,
    /// Unix milliseconds.
    pub updated_ms: u64,
    /// Of the record.
    pub bytes: u64,
    /// What the bytes are.
    pub content: StoredContent,
}

/// What the bytes under a conversation's id are.
#[derive(Debug, Clone)]
pub enum StoredContent {
    /// A record.
    Record(Box<Outline>),
    /// What is left of a deleted conversation.
    Tombstone(Tombstone),
    /// Of another release, or wrong.
    Unreadable,
}

impl StoredConversation {
    /// Of the bytes stored.
    pub fn read(id: ConversationId, updated_ms: u64, bytes: &[u8]) -> Self {
        let record = || {
            let record = Record::decode(bytes).ok()?;
            let is_named = ConversationId::new(&record.root, record.name.as_bytes()) == id;
            is_named.then(|| Box::new(Outline::of(&record, &record.keys())))
        };
        let content = match Tombstone::decode(bytes) {
            Some(tombstone) => StoredContent::Tombstone(tombstone),
            None => record().map_or(StoredContent::Unreadable, StoredContent::Record),
        };
        Self { id, updated_ms, bytes: bytes.len() as u64, content }
    }
}

/// What the store takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct DiskUsage {
    /// Bytes of files, garbage included.
    pub physical_bytes: u64,
    /// Whether payloads pass the page cache by.
    pub direct_io: bool,
}

/// Where blocks and records rest. Calls may take as long as a disk takes.
pub trait DiskTier: Send + Sync {
    /// Reads the whole index, once, before anything else; gives back how many entries were corrupt (and
    /// are gone now). Conversations first: a deleted one's blocks are not to be seen. A block may be given
    /// twice.
    fn load(
        &mut self,
        block: &mut dyn FnMut(StoredBlock),
        conversation: &mut dyn FnMut(StoredConversation),
    ) -> Result<u64, DiskError>;
    /// Stores blocks, each whole or not at all. The outcome of each is told as soon as it is known, with the
    /// block's place among `blocks`, in any order.
    fn write(&self, blocks: &[NewBlock<'_>], tell: &mut dyn FnMut(usize, Result<(), WriteFailure>));
    /// Fills `payload` and gives the header back, if there is such a block of that shape. The rows are the
    /// caller's to check, and so is who the block is; after an error `payload` holds anything.
    fn read(
        &self,
        key: &BlockKey,
        geometry: &Geometry,
        payload: &Span,
    ) -> Result<Option<BlockHeader>, DiskError>;
    /// Forgets blocks; their bytes may stay until others need the room.
    fn remove(&self, keys: &[BlockKey]) -> Result<(), DiskError>;
    /// Forgets blocks and records; no file of the store holds a byte of them when it returns, nor of
    /// earlier copies. After an error the same call, made again, does what was left.
    fn erase(&self, blocks: &[BlockKey], conversations: &[ConversationId])
    -> Result<(), DiskError>;
    /// Stores a record.
    fn put_conversation(
        &self,
        id: &ConversationId,
        updated_ms: u64,
        record: &[u8],
    ) -> Result<(), DiskError>;
    /// Fetches a record.
    fn get_conversation(&self, id: &ConversationId) -> Result<Option<Vec<u8>>, DiskError>;
    /// Forgets a record.
    fn remove_conversation(&self, id: &ConversationId) -> Result<(), DiskError>;
    /// What it takes.
    fn usage(&self) -> DiskUsage;
    /// It may take so much from now on. What it has taken already, it keeps.
    fn resize(&self, disk_bytes: u64);
    /// Gives garbage back to the file system; may be long.
    fn reclaim(&self) -> Result<(), DiskError>;
    /// Everything written so far survives a loss of power after this.
    fn flush(&self) -> Result<(), DiskError>;
    /// After a failure: whether writes go through again, and makes them if they can be made to.
    fn probe(&self) -> Result<(), DiskError>;
}

/// [`Done::Maintained::what`] of a [`Job::Reclaim`].
pub const RECLAIMING: &str = "reclaiming space";
/// [`Done::Maintained::what`] of a [`Job::Probe`].
pub const PROBING: &str = "trying whether writes go through";

/// What is to be gone from the medium.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Erasure {
    /// Blocks, known or not.
    pub blocks: Vec<BlockKey>,
    /// Records.
    pub conversations: Vec<ConversationId>,
}

/// Work for a disk thread.
#[derive(Debug)]
pub enum Job {
    /// Copy a frame to disk. The loop holds the frame.
    Write {
        /// Name.
        key: BlockKey,
        /// Where its bytes are.
        handle: FrameHandle,
        /// The region.
        table: FrameTable,
        /// Of this write.
        order: u64,
    },
    /// Copy a block from disk into a granted frame, header and payload.
    Read {
        /// Name.
        key: BlockKey,
        /// Whose.
        root: RootKey,
        /// Where its bytes go.
        handle: FrameHandle,
        /// The region.
        table: FrameTable,
    },
    /// Copy a block into private memory, for an export.
    Copy {
        /// Name.
        key: BlockKey,
        /// Whose.
        root: RootKey,
        /// A held frame, or the store.
        from: CopyFrom,
    },
    /// Copy an imported block into a granted frame, header and payload.
    Fill {
        /// Name.
        key: BlockKey,
        /// Its bytes.
        block: BlockBytes,
        /// Where they go.
        handle: FrameHandle,
        /// The region.
        table: FrameTable,
    },
    /// Forget blocks.
    Remove(Vec<BlockKey>),
    /// Store a record.
    PutConversation {
        /// Name.
        id: ConversationId,
        /// Unix milliseconds.
        updated_ms: u64,
        /// The record.
        record: Arc<[u8]>,
    },
    /// Fetch a record.
    GetConversation {
        /// Name.
        id: ConversationId,
    },
    /// Forget a record.
    RemoveConversation(ConversationId),
    /// Put a tombstone in the place of a record, so that it survives a loss of power.
    Bury {
        /// Name.
        id: ConversationId,
        /// What stays.
        tombstone: Tombstone,
    },
    /// Read blocks and check them.
    Verify {
        /// Name and root of each.
        blocks: Vec<(BlockKey, RootKey)>,
        /// Their shape.
        geometry: Geometry,
    },
    /// Forget blocks and records, and leave nothing of them on the medium.
    Erase(Erasure),
    /// The store may take so many bytes from now on.
    Resize(u64),
    /// Give garbage back.
    Reclaim,
    /// Make everything durable.
    Flush,
    /// Find out whether a store that failed takes writes again.
    Probe,
}

/// What a disk thread has done.
#[derive(Debug)]
pub enum Done {
    /// The store is open, its blocks are in [`DiskWorkers::found`]; records found in it.
    Loaded {
        /// Records.
        conversations: Vec<StoredConversation>,
        /// Entries that were not to be trusted.
        corrupt: u64,
        /// Of the store as it was found.
        usage: DiskUsage,
    },
    /// The store could not be opened: the tier stays empty.
    LoadFailed(DiskError),
    /// End of a write.
    Written {
        /// Name.
        key: BlockKey,
        /// To be released.
        frame: FrameIndex,
        /// Stored, wrong (checksum), or failed.
        result: Result<(), WriteFailure>,
    },
    /// End of a read.
    Read {
        /// Name.
        key: BlockKey,
        /// Filled, unless the result is a miss.
        frame: FrameIndex,
        /// The header found.
        result: Result<Box<BlockHeader>, MissReason>,
    },
    /// End of a copy.
    Copied {
        /// Name.
        key: BlockKey,
        /// To be released, if it came from one.
        frame: Option<FrameIndex>,
        /// The copy, or why there is none.
        result: Result<BlockBytes, MissReason>,
    },
    /// End of a filling.
    Filled {
        /// Name.
        key: BlockKey,
        /// Filled, unless the result is a miss.
        frame: FrameIndex,
        /// The header written.
        result: Result<Box<BlockHeader>, MissReason>,
    },
    /// A record, if there is one.
    Conversation {
        /// Name.
        id: ConversationId,
        /// The record.
        record: Option<Vec<u8>>,
    },
    /// A record was stored, or not.
    ConversationPut {
        /// Name.
        id: ConversationId,
        /// Of the put.
        updated_ms: u64,
        /// Whether it is on disk.
        stored: bool,
    },
    /// Blocks were read: what is wrong with each, if anything.
    Verified(Vec<(BlockKey, Option<MissReason>)>),
    /// A tombstone was put, or not.
    Buried {
        /// Name.
        id: ConversationId,
        /// Why not.
        error: Option<DiskError>,
    },
    /// End of another job that can fail.
    Maintained {
        /// Which.
        what: &'static str,
        /// Why not.
        error: Option<DiskError>,
        /// After it.
        usage: DiskUsage,
    },
    /// End of an erasure.
    Erased {
        /// What was asked for.
        erasure: Erasure,
        /// Why some of it may still be there: ask again.
        error: Option<DiskError>,
        /// After it.
        usage: DiskUsage,
    },
    /// End of a flush.
    Flushed,
}

/// Why a block was not written.
#[derive(Debug)]
pub enum WriteFailure {
    /// The frame's bytes are not those that the header vouches for.
    Checksum,
    /// The store.
    Disk(DiskError),
}

/// Handle of the loop on the disk threads. Dropping it ends them after the jobs that wait.
pub struct DiskWorkers {
    writer: SyncSender<Job>,
    readers: SyncSender<Job>,
    found: Receiver<Vec<StoredBlock>>,
    threads: Vec<std::thread::JoinHandle<()>>,
    /// While a thread reads.
    pub reading: Arc<Busy>,
    /// While the writer does anything.
    pub writing: Arc<Busy>,
}

type Opened = Arc<OnceLock<Option<Box<dyn DiskTier>>>>;

impl DiskWorkers {
    /// Starts the threads; `open` runs on the writer and may be slow. `notify` is called after each `Done`.
    pub fn spawn(
        open: impl FnOnce() -> Result<Box<dyn DiskTier>, DiskError> + Send + 'static,
        done: Sender<Done>,
        notify: impl Fn() + Send + Sync + Clone + 'static,
    ) -> std::io::Result<Self> {
        let opened: Opened = Arc::new(OnceLock::new());
        let (give, found) = sync_channel(FOUND_PARTS_MAX);
        let (writer, writer_jobs) = sync_channel(JOBS_MAX);
        let (readers, reader_jobs) = sync_channel(JOBS_MAX);
        let reader_jobs = Arc::new(Mutex::new(reader_jobs));
        let mut threads = Vec::new();
        let (reading, writing): (Arc<Busy>, Arc<Busy>) = Default::default();
        let report = {
            let notify = notify.clone();
            move |event| {
                let _ = done.send(event); // The loop is gone: nobody needs to know.
                notify();
            }
        };
        let spawn = |name: String, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name).spawn(body)
        };
        {
            let (opened, report, writing) = (opened.clone(), report.clone(), writing.clone());
            threads.push(spawn(
                "disk-writer".into(),
                Box::new(move || {
                    let tier = open().and_then(|tier| load(tier, &give, &notify, &report));
                    drop(give);
                    let tier = match tier {
                        Ok(tier) => Some(tier),
                        Err(error) => {
                            report(Done::LoadFailed(error));
                            None
                        }
                    };
                    let tier = opened.get_or_init(|| tier);
                    let mut next = None;
                    while let Some(job) = next.take().or_else(|| writer_jobs.recv().ok()) {
                        let group = Group::collect(job, &writer_jobs, &mut next);
                        writing.during(|| group.perform(tier.as_deref(), &report));
                    }
                }),
            )?);
        }
        for number in 0..READERS {
            let (opened, report, jobs) = (opened.clone(), report.clone(), reader_jobs.clone());
            let reading = reading.clone();
            threads.push(spawn(
                format!("disk-reader-{number}"),
                Box::new(move || {
                    while let Some(job) = next_job(&jobs) {
                        let tier = opened.wait().as_deref();
                        report(reading.during(|| perform(job, tier)));
                    }
                }),
            )?);
        }
        Ok(Self { writer, readers, found, threads, reading, writing })
    }

    /// Sends work to the writer; gives it back if too much waits already.
    #[expect(clippy::result_large_err, reason = "the error is the job itself, given back")]
    pub fn write(&self, job: Job) -> Result<(), Job> {
        send(&self.writer, job)
    }

    /// Sends work to the readers; gives it back if too much waits already.
    #[expect(clippy::result_large_err, reason = "the error is the job itself, given back")]
    pub fn read(&self, job: Job) -> Result<(), Job> {
        send(&self.readers, job)
    }

    /// The next blocks found in the store, if there are some now.
    pub fn found(&self) -> Option<Vec<StoredBlock>> {
        self.found.try_recv().ok()
    }

    /// Ends the threads after the jobs that wait, and closes the store.
    pub fn join(self) {
        drop((self.writer, self.readers, self.found));
        for thread in self.threads {
            let _ = thread.join(); // A panicked disk thread has said so already.
        }
    }
}

#[expect(clippy::result_large_err, reason = "the error is the job itself, given back")]
fn send(queue: &SyncSender<Job>, job: Job) -> Result<(), Job> {
    queue.try_send(job).map_err(|error| match error {
        TrySendError::Full(job) | TrySendError::Disconnected(job) => job,
    })
}

fn next_job(jobs: &Mutex<Receiver<Job>>) -> Option<Job> {
    jobs.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

/// Hands over what the store holds part by part, no faster than the loop takes it.
fn load(
    mut tier: Box<dyn DiskTier>,
    give: &SyncSender<Vec<StoredBlock>>,
    notify: &impl Fn(),
    report: &impl Fn(Done),
) -> Result<Box<dyn DiskTier>, DiskError> {
    let (mut blocks, mut conversations) = (Vec::new(), Vec::new());
    let deleted = RefCell::new(KeySet::default());
    let hand_over = |blocks: &mut Vec<StoredBlock>| {
        let part = std::mem::replace(blocks, Vec::with_capacity(FOUND_PART_BLOCKS));
        if give.send(part).is_ok() {
            notify(); // The loop is gone otherwise, and this process soon.
        }
    };
    let mut found = |block: StoredBlock| {
        if deleted.borrow().contains(&block.key) {
            return; // Still to be erased; nobody is to see it.
        }
        blocks.push(block);
        if blocks.len() == FOUND_PART_BLOCKS {
            hand_over(&mut blocks);
        }
    };
    let mut record = |record: StoredConversation| {
        if let StoredContent::Tombstone(tombstone) = &record.content {
            deleted.borrow_mut().extend(&tombstone.keys);
        }
        conversations.push(record);
    };
    let corrupt = tier.load(&mut found, &mut record)?;
    hand_over(&mut blocks);
    let usage = tier.usage();
    report(Done::Loaded { conversations, corrupt, usage });
    Ok(tier)
}

/// Jobs that the writer does at one go: removals, then writes (which may need the removals' room), then
/// at most one job of another kind. A removal overtakes no write of its own block.
#[derive(Default)]
struct Group {
    removals: Vec<Vec<BlockKey>>,
    writes: Vec<WriteJob>,
    last: Option<Job>,
}

struct WriteJob {
    key: BlockKey,
    handle: FrameHandle,
    table: FrameTable,
    order: u64,
}

impl Group {
    /// `first` and what waits behind it; the job that does not fit in is left in `next`.
    fn collect(first: Job, waiting: &Receiver<Job>, next: &mut Option<Job>) -> Self {
        let mut group = Self::default();
        let mut job = Some(first);
        while let Some(some) = job {
            match some {
                Job::Write { key, handle, table, order } => {
                    group.writes.push(WriteJob { key, handle, table, order });
                }
                Job::Remove(keys) => {
                    if group.writes.iter().any(|write| keys.contains(&write.key)) {
                        *next = Some(Job::Remove(keys));
                        return group;
                    }
                    group.removals.push(keys);
                }
                other => {
                    group.last = Some(other);
                    return group;
                }
            }
            if group.writes.len() == GROUP_MAX {
                return group;
            }
            job = waiting.try_recv().ok();
        }
        group
    }

    fn perform(self, tier: Option<&dyn DiskTier>, report: &impl Fn(Done)) {
        let none = none::NoDisk;
        let store: &dyn DiskTier = tier.unwrap_or(&none);
        if !self.removals.is_empty() {
            let mut error = store.remove(&self.removals.concat()).err();
            for _ in &self.removals {
                let (what, error, usage) = ("removing blocks", error.take(), store.usage());
                report(Done::Maintained { what, error, usage });
            }
        }
        write_blocks(store, &self.writes, report);
        if let Some(job) = self.last {
            report(perform(job, tier));
        }
    }
}

fn perform(job: Job, tier: Option<&dyn DiskTier>) -> Done {
    let none = none::NoDisk;
    let tier: &dyn DiskTier = tier.unwrap_or(&none);
    let maintained = |what, result: Result<(), DiskError>| Done::Maintained {
        what,
        error: result.err(),
        usage: tier.usage(),
    };
    match job {
        Job::Write { key, handle, .. } => {
            unreachable!("a write of {key} from {handle:?} is part of a group")
        }
        Job::Read { key, root, handle, table } => Done::Read {
            key,
            frame: handle.frame,
            result: read_block(tier, &key, &root, handle, &table).map(Box::new),
        },
        Job::Copy { key, root, from } => {
            let result = copies::copy(tier, &key, &root, &from);
            let frame = match from {
                CopyFrom::Frame { handle, .. } => Some(handle.frame),
                CopyFrom::Disk(_) => None,
            };
            Done::Copied { key, frame, result }
        }
        Job::Fill { key, block, handle, table } => {
            let result = copies::fill(&block, handle, &table).map(Box::new);
            Done::Filled { key, frame: handle.frame, result }
        }
        Job::Remove(keys) => maintained("removing blocks", tier.remove(&keys)),
        Job::PutConversation { id, updated_ms, record } => {
            let stored = tier.put_conversation(&id, updated_ms, &record);
            if let Err(error) = &stored {
                tracing::warn!(%error, "conversation record not stored");
            }
            Done::ConversationPut { id, updated_ms, stored: stored.is_ok() }
        }
        Job::GetConversation { id } => {
            let record = tier.get_conversation(&id).unwrap_or_else(|error| {
                tracing::warn!(%error, "conversation record not read");
                None
            });
            Done::Conversation { id, record }
        }
        Job::RemoveConversation(id) => {
            maintained("removing a record", tier.remove_conversation(&id))
        }
        Job::Erase(erasure) => {
            let error = tier.erase(&erasure.blocks, &erasure.conversations).err();
            Done::Erased { erasure, error, usage: tier.usage() }
        }
        Job::Verify { blocks, geometry } => {
            let payload = Span::heap(geometry.payload_bytes());
            let check =
                |(key, root)| (key, read_checked(tier, &key, &root, &geometry, &payload).err());
            Done::Verified(blocks.into_iter().map(check).collect())
        }
        Job::Bury { id, tombstone } => {
            let put = tier.put_conversation(&id, tombstone.deleted_ms, &tombstone.encode());
            Done::Buried { id, error: put.and_then(|()| tier.flush()).err() }
        }
        Job::Resize(disk_bytes) => {
            tier.resize(disk_bytes);
            maintained("another size", Ok(()))
        }
        Job::Reclaim => maintained(RECLAIMING, tier.reclaim()),
        Job::Probe => maintained(PROBING, tier.probe()),
        Job::Flush => {
            if let Err(error) = tier.flush() {
                tracing::warn!(%error, "flush failed");
            }
            Done::Flushed
        }
    }
}

/// Stores what frames hold, if it is what their headers vouch for.
fn write_blocks(tier: &dyn DiskTier, jobs: &[WriteJob], report: &impl Fn(Done)) {
    let tell = |job: &WriteJob, result| {
        report(Done::Written { key: job.key, frame: job.handle.frame, result });
    };
    let mut found: Vec<(&WriteJob, BlockHeader, Span)> = Vec::new();
    for job in jobs {
        match job.table.header(job.handle) {
            Ok(mut header) if header.key == job.key => {
                header.generation = Generation(0);
                found.push((job, header, job.table.payload(job.handle.frame)));
            }
            _ => tell(job, Err(WriteFailure::Checksum)),
        }
    }
    let mut blocks = Vec::with_capacity(found.len());
    for (job, header, payload) in &found {
        let (geometry, order) = (job.table.geometry(), job.order);
        blocks.push(NewBlock { geometry, header, order, payload });
    }
    tier.write(&blocks, &mut |number, result| tell(found[number].0, result));
}

/// Reads a block straight into a granted frame, header last. Until the loop publishes the frame, and after
/// a failed check for good, it is nobody's to read.
fn read_block(
    tier: &dyn DiskTier,
    key: &BlockKey,
    root: &RootKey,
    handle: FrameHandle,
    table: &FrameTable,
) -> Result<BlockHeader, MissReason> {
    let payload = table.payload(handle.frame);
    let mut header = read_checked(tier, key, root, table.geometry(), &payload)?;
    header.generation = handle.generation;
    table.write_header(handle.frame, &header);
    Ok(header)
}

/// Reads a block into `payload` and checks everything about it there. After a miss `payload` holds anything.
pub fn read_checked(
    tier: &dyn DiskTier,
    key: &BlockKey,
    root: &RootKey,
    geometry: &Geometry,
    payload: &Span,
) -> Result<BlockHeader, MissReason> {
    let header = match tier.read(key, geometry, payload) {
        Ok(Some(header)) => header,
        Ok(None) => return Err(MissReason::Evicted),
        Err(error) => {
            tracing::warn!(%key, %error, "block not read");
            let is_wrong = matches!(error, DiskError::Corrupt { .. });
            return Err(if is_wrong { MissReason::Checksum } else { MissReason::Io });
        }
    };
    if header.key != *key || header.root != *root {
        return Err(MissReason::Fingerprint);
    }
    if !check_rows(&header, geometry, payload) {
        return Err(MissReason::Checksum);
    }
    Ok(header)
}

/// Whether each row of a payload is what the header vouches for. Looks at private copies of small pieces,
/// which stay in the processor's first cache: the bytes may change at any time, so no reference covers
/// them.
pub fn check_rows(header: &BlockHeader, geometry: &Geometry, payload: &Span) -> bool {
    let row_bytes = geometry.row_bytes();
    let rows = geometry.payload_bytes() / row_bytes;
    if payload.bytes() != rows * row_bytes || header.checksums.len() as u64 != rows {
        return false;
    }
    let mut piece = vec![0; CHECKED_PIECE_BYTES];
    header.checksums.iter().zip(0..).all(|(crc, row)| {
        let (mut found, mut at, end) = (0, row * row_bytes, (row + 1) * row_bytes);
        while at < end {
            let piece = &mut piece[..(end - at).min(CHECKED_PIECE_BYTES as u64) as usize];
            payload.copy_out(at, piece);
            found = crc32c::crc32c_append(found, piece);
            at += piece.len() as u64;
        }
        found == *crc
    })
}
