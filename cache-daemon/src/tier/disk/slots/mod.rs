//! Payload in preallocated files of equal slots; RocksDB holds where each block is. Byte tables:
//! docs/disk-format.md. Why: docs/adr/0011. Two engines share all of it but the rule that says which slot
//! comes next: [`Placement`].
//!
//! A write, in this order; a crash between any two steps leaves the block whole or absent:
//!  1. slots are taken;
//!  2. header page and payload go into the slot, straight from the frame, several blocks at once;
//!  3. fdatasync of each file touched, one for many blocks, while others are at 2;
//!  4. one index batch, its log synced. Only now is the block reported as written. Before 3, power
//!     loss could leave an entry whose slot never reached the medium.
//!
//! A removal: the index delete is synced, readers leave, and only then is the slot free. The next
//! write has a higher epoch, so that a slot whose overwrite got lost is told from the block wanted.
//!
//! **Invariants**
//! - A read is served only if the slot's header page is right, names this slot and the epoch that the
//!   index has; key, root and row checksums are the caller's to check.
//! - One change at a time (`changing`); reads go on beside it.

mod erasure;
mod format;
mod home;
mod index;
mod media;
mod pages;
mod permits;
mod recovery;
mod segments;
mod space;
#[cfg(test)]
mod tests;
mod writing;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kv_protocol::{BlockHeader, BlockKey, ConversationId, Geometry, Span};

pub use self::format::slot_bytes;
use self::format::{Entry, INDEX_VERSION, SlotHeader, slot_at};
pub(super) use self::home::aside;
use self::home::{folder_bytes, make_home, start_index_anew};
use self::index::{INDEX_VERSION_READ, Index, is_corrupt};
use self::media::{Folder, Media, SlotFile};
use self::pages::Pages;
use self::permits::Permits;
pub use self::space::Placement;
use self::space::{SlotId, Space, Spare};
use super::{
    DiskError, DiskTier, DiskUsage, NewBlock, READS_AT_ONCE, StoredBlock, StoredConversation,
    WriteFailure,
};

const INDEX_FOLDER: &str = "index";
/// Why an index was set aside, in its name.
const CORRUPT: &str = "corrupt";
/// Files may take this share of the tier; the rest is for index, log and records (an eighth).
const FILES_SHARE_PERCENT: u64 = 85;
/// The file system keeps at least this much free: its fiftieth part of the tier, within bounds.
const RESERVE_SHARE: u64 = 50;
const RESERVE_BYTES_MIN: u64 = 4 << 20;
const RESERVE_BYTES_MAX: u64 = 1 << 30;
/// An epoch is the opening in the upper half, a count of writes in the lower.
const EPOCH_OPENING_SHIFT: u32 = 32;

struct State {
    space: Space,
    files: HashMap<u32, (Arc<dyn SlotFile>, u64)>,
    next_epoch: u64,
    /// First epoch of the group that is being written: not in the index yet.
    writing_since: u64,
}

/// See the module.
pub struct SlotTier {
    /// Of files and index.
    home: PathBuf,
    placement: Placement,
    media: Arc<dyn Media>,
    index: Index,
    state: Mutex<State>,
    /// Rung when a reader leaves a slot.
    left: Condvar,
    /// More readers than there are reads at once: the others check what came.
    reading: Permits,
    changing: Mutex<()>,
    /// Of other files in the folder, when the store was opened.
    others_bytes: u64,
    /// What it may take, those included.
    disk_bytes: AtomicU64,
    /// Blocks whose removal failed: removed when the index takes writes again.
    unremoved: Mutex<Vec<BlockKey>>,
}

impl SlotTier {
    /// Opens or makes the store under `dir`; it takes at most `disk_bytes`, other files there included.
    pub fn open(dir: &Path, disk_bytes: u64, placement: Placement) -> Result<Self, DiskError> {
        let home = dir.join(placement.folder());
        make_home(&home)
            .map_err(|source| DiskError::Io { what: "making the folder of slots", source })?;
        let others = folder_bytes(dir).saturating_sub(folder_bytes(&home));
        if others > 0 {
            tracing::warn!(
                dir = %dir.display(), bytes = others,
                "the disk tier is smaller by other files in its folder (an older store, or one set \
                 aside): remove what is not needed"
            );
        }
        let media = Arc::new(Folder::new(&home));
        Self::open_on(media, &home, disk_bytes, others, placement)
    }

    fn open_on(
        media: Arc<dyn Media>,
        home: &Path,
        disk_bytes: u64,
        others_bytes: u64,
        placement: Placement,
    ) -> Result<Self, DiskError> {
        let index_home = home.join(INDEX_FOLDER);
        let index = match Index::open(&index_home, media.clone()) {
            Err(error) if is_corrupt(&error) => {
                tracing::error!(%error, "the index cannot be opened");
                start_index_anew(&index_home, media.clone(), CORRUPT)?
            }
            other => other?,
        };
        let space = Space::new(placement);
        let tier = Self {
            home: home.to_owned(),
            placement,
            media,
            index,
            state: Mutex::new(State {
                space,
                files: HashMap::new(),
                next_epoch: 0,
                writing_since: 0,
            }),
            left: Condvar::new(),
            reading: Permits::new(READS_AT_ONCE),
            changing: Mutex::default(),
            others_bytes,
            disk_bytes: disk_bytes.into(),
            unremoved: Mutex::default(),
        };
        tier.open_files()?;
        Ok(tier)
    }

    fn files_bytes_max(&self) -> u64 {
        let disk_bytes = self.disk_bytes.load(Ordering::Relaxed);
        disk_bytes.saturating_sub(self.others_bytes) / 100 * FILES_SHARE_PERCENT
    }

    fn reserve_bytes(&self) -> u64 {
        let share = self.disk_bytes.load(Ordering::Relaxed) / RESERVE_SHARE;
        share.clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No other write, removal or erasure runs while the guard lives.
    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no reader is in a slot whose block is gone. New readers do not come there.
    fn wait_for_readers<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while state.space.is_draining() {
            state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    fn remove_now(&self, keys: &[BlockKey]) -> Result<(), DiskError> {
        let mut entries = Vec::new();
        for key in keys {
            entries.extend(self.index.get(key)?);
        }
        self.index.remove(keys)?;
        let mut state = self.lock();
        for entry in entries {
            state.space.release(entry.at, entry.epoch);
        }
        Ok(())
    }

    fn set_index_aside(&mut self, why: &str) -> Result<(), DiskError> {
        self.index.close(); // Its lock file is the new one's to take.
        self.index = start_index_anew(&self.home.join(INDEX_FOLDER), self.media.clone(), why)?;
        Ok(())
    }

    /// What cannot be removed now is when the store takes writes again.
    fn remove_sometime(&self, keys: &[BlockKey]) -> Result<(), DiskError> {
        let removed = self.remove_now(keys);
        if removed.is_err() {
            let mut unremoved = self.unremoved.lock().unwrap_or_else(PoisonError::into_inner);
            unremoved.extend(keys);
        }
        removed
    }
}

/// Reads a slot: what its header page says, if that page is right and of this slot and shape.
fn read_slot(
    file: &dyn SlotFile,
    at: SlotId,
    geometry: &Geometry,
    payload: &Span,
) -> Result<(SlotHeader, BlockHeader), DiskError> {
    let mut page = Pages::new(1);
    file.read_slot(&mut page, payload, slot_at(geometry, at.slot))
        .map_err(|source| DiskError::Io { what: "reading a slot", source })?;
    match SlotHeader::decode(&page) {
        Some((slot, header)) if slot.at == at && slot.geometry == *geometry => Ok((slot, header)),
        found => {
            let message = format!("{at:?} has no right header: {:?}", found.map(|(slot, _)| slot));
            Err(DiskError::Corrupt { what: "slot", message })
        }
    }
}

impl DiskTier for SlotTier {
    fn load(
        &mut self,
        block: &mut dyn FnMut(StoredBlock),
        conversation: &mut dyn FnMut(StoredConversation),
    ) -> Result<u64, DiskError> {
        let version = self.index.version()?;
        let is_read = |version| (INDEX_VERSION_READ..=INDEX_VERSION).contains(&version);
        let records =
            match version.is_none_or(is_read).then(|| self.index.scan_records(conversation)) {
                Some(Err(error)) if is_corrupt(&error) => 0, // So is the rest, then: made anew below.
                Some(records) => records?,
                None => 0,
            };
        let read = match version {
            Some(INDEX_VERSION_READ..=INDEX_VERSION) => self.read_index(block),
            None => self.rebuild_index(block).map(|opening| (opening, 0)),
            Some(version) => {
                self.set_index_aside(&format!("version-{version}"))?;
                self.rebuild_index(block).map(|opening| (opening, 0))
            }
        };
        let (opening, corrupt) = match read {
            Err(error) if is_corrupt(&error) => {
                tracing::error!(%error, "the index cannot be read");
                self.set_index_aside(CORRUPT)?;
                self.open_files()?; // What the half-read index had occupied is free again.
                (self.rebuild_index(block)?, 0)
            }
            other => other?,
        };
        let opening = self.index.begin(opening)?;
        self.lock().next_epoch = u64::from(opening) << EPOCH_OPENING_SHIFT;
        Ok(corrupt + records)
    }

    fn write(
        &self,
        blocks: &[NewBlock<'_>],
        tell: &mut dyn FnMut(usize, Result<(), WriteFailure>),
    ) {
        let _change = self.change();
        self.write_group(blocks, Spare::Kept, tell);
    }

    fn read(
        &self,
        key: &BlockKey,
        geometry: &Geometry,
        payload: &Span,
    ) -> Result<Option<BlockHeader>, DiskError> {
        let Some(Entry { at, epoch, block }) = self.index.get(key)? else { return Ok(None) };
        let file = {
            let mut state = self.lock();
            let Some(found) = state.space.geometry(at.file) else { return Ok(None) };
            if found != geometry {
                let message = format!("it holds a block of {found}, not of {geometry}");
                return Err(DiskError::Corrupt { what: "slot", message });
            }
            if !state.space.begin_read(at, epoch) {
                return Ok(None); // Removed since the index was asked.
            }
            state.files[&at.file].0.clone()
        };
        let read = self.reading.during(|| read_slot(&*file, at, geometry, payload));
        self.lock().space.end_read(at);
        self.left.notify_all();
        let (slot, header) = read?;
        if (slot.epoch, slot.order) != (epoch, block.order) {
            let message = format!("{at:?} is of epoch {}, the index has {epoch}", slot.epoch);
            return Err(DiskError::Corrupt { what: "slot", message });
        }
        Ok(Some(header))
    }

    fn remove(&self, keys: &[BlockKey]) -> Result<(), DiskError> {
        let _change = self.change();
        self.remove_sometime(keys)
    }

    fn erase(
        &self,
        blocks: &[BlockKey],
        conversations: &[ConversationId],
    ) -> Result<(), DiskError> {
        let _change = self.change();
        self.erase_now(blocks, conversations)
    }

    fn put_conversation(
        &self,
        id: &ConversationId,
        updated_ms: u64,
        record: &[u8],
    ) -> Result<(), DiskError> {
        self.index.put_record(id, updated_ms, record)
    }

    fn get_conversation(&self, id: &ConversationId) -> Result<Option<Vec<u8>>, DiskError> {
        self.index.get_record(id)
    }

    fn remove_conversation(&self, id: &ConversationId) -> Result<(), DiskError> {
        self.index.remove_records(&[*id])
    }

    fn usage(&self) -> DiskUsage {
        let files: u64 = self.lock().files.values().map(|(_, bytes)| bytes).sum();
        DiskUsage {
            physical_bytes: files + self.index.physical_bytes(),
            direct_io: self.media.is_direct(),
        }
    }

    fn resize(&self, disk_bytes: u64) {
        self.disk_bytes.store(disk_bytes, Ordering::Relaxed);
    }

    /// Slots are reused, and segments reclaimed when room is needed: nothing to do.
    fn reclaim(&self) -> Result<(), DiskError> {
        Ok(())
    }

    /// Each write was synced.
    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    /// Opens the index again, gives slots that failed writes left to nobody back, and tries a write.
    fn probe(&self) -> Result<(), DiskError> {
        let _change = self.change();
        let io = |source| DiskError::Io { what: "trying a write", source };
        self.media.probe().map_err(io)?;
        self.index.reopen()?;
        let opening = (self.lock().next_epoch >> EPOCH_OPENING_SHIFT) as u32;
        let opening = self.index.begin(opening)?;
        let mut unremoved = self.unremoved.lock().unwrap_or_else(PoisonError::into_inner);
        self.remove_now(&unremoved)?;
        unremoved.clear();
        drop(unremoved);
        let mut held = HashSet::new();
        self.index.scan(&mut |entry| {
            held.insert((entry.at, entry.epoch));
        })?;
        let mut state = self.lock();
        state.next_epoch = u64::from(opening) << EPOCH_OPENING_SHIFT; // A count may have run out.
        state.space.release_all_but(&|at, epoch| held.contains(&(at, epoch)));
        tracing::info!(home = %self.home.display(), "the disk tier takes writes again");
        Ok(())
    }
}
