//! Payload in preallocated files of equal slots, reused in place; RocksDB holds where each block is.
//! Byte tables: docs/disk-format.md. Why: docs/adr/0011.
//!
//! A write, in this order; a crash between any two steps leaves the block whole or absent:
//!  1. slots are taken, each the one after its parent's where that is free;
//!  2. header page and payload go into the slot, several blocks at once;
//!  3. fdatasync of each file touched, one for the whole group;
//!  4. one index batch, its log synced. Only now is the block reported as written. Before 3, power
//!     loss could leave an entry whose slot never reached the medium.
//!
//! A removal: the index delete is synced, readers leave, and only then is the slot free. The next
//! write has a higher epoch, so that a slot whose overwrite got lost is told from the block wanted.
//!
//! **Invariant:** a read is served only if the slot's header page is right, names this slot and the
//! epoch that the index has; key, root and row checksums are the caller's to check.

mod buffers;
mod format;
mod index;
mod media;
mod space;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kv_protocol::{BlockKey, ConversationId, Geometry};

use self::buffers::Buffers;
pub use self::format::slot_bytes;
use self::format::{
    Entry, FORMAT_VERSION, FileHeader, PAGE_BYTES, SlotHeader, encode_entry, slot_at,
};
use self::index::{Index, is_corrupt};
use self::media::{Folder, Media, SlotFile};
use self::space::{SlotId, Space};
use super::{
    DiskError, DiskTier, DiskUsage, NewBlock, StoredBlock, StoredConversation, WriteFailure,
};

/// Folder of slot files and index, in the tier's.
pub const FOLDER: &str = "slots";
const INDEX_FOLDER: &str = "index";
/// In that folder: the format's version in decimal digits, written before anything else.
const FORMAT_FILE: &str = "FORMAT";
/// Slot files may take this share of the tier; the rest is for index, log and records (an eighth).
const FILES_SHARE_PERCENT: u64 = 85;
/// Each file is this share of all: small enough that another geometry takes over piece by piece.
const FILE_SHARE: u64 = 32;
const FILE_BYTES_MAX: u64 = 1 << 30;
/// But a group of blocks has room in one, so that one sync does for all, unless that is a quarter.
const FILE_SLOTS_MIN: u64 = super::GROUP_MAX as u64;
/// The file system keeps at least this much free: its fiftieth part of the tier, within bounds.
const RESERVE_SHARE: u64 = 50;
const RESERVE_BYTES_MIN: u64 = 4 << 20;
const RESERVE_BYTES_MAX: u64 = 1 << 30;
/// Blocks written at once. Two threads overlap checksum and copy with the drive; more keep it busy
/// with small blocks.
const WRITE_THREADS: usize = 4;
/// Entries written at once when the index is made again.
const REBUILT_PER_BATCH: usize = 1024;
/// An epoch is the opening in the upper half, a count of writes in the lower.
const EPOCH_OPENING_SHIFT: u32 = 32;

struct State {
    space: Space,
    files: HashMap<u32, (Arc<dyn SlotFile>, u64)>,
    next_epoch: u64,
}

/// A slot taken for a block that is being written.
struct Place {
    file: Arc<dyn SlotFile>,
    slot: SlotHeader,
}

/// See the module.
pub struct SlotTier {
    dir: PathBuf,
    media: Arc<dyn Media>,
    index: Index,
    buffers: Buffers,
    state: Mutex<State>,
    files_bytes_max: u64,
    reserve_bytes: u64,
    /// Blocks whose removal failed: removed when the index takes writes again.
    unremoved: Mutex<Vec<BlockKey>>,
}

impl SlotTier {
    /// Opens or makes the store under `dir`; it takes at most `disk_bytes`, other files there included.
    pub fn open(dir: &Path, disk_bytes: u64) -> Result<Self, DiskError> {
        let home = dir.join(FOLDER);
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
        Self::open_on(media, dir, disk_bytes.saturating_sub(others))
    }

    fn open_on(media: Arc<dyn Media>, dir: &Path, disk_bytes: u64) -> Result<Self, DiskError> {
        let home = dir.join(FOLDER).join(INDEX_FOLDER);
        let index = match Index::open(&home, media.clone()) {
            Err(error) if is_corrupt(&error) => start_index_anew(&home, media.clone(), &error)?,
            other => other?,
        };
        let tier = Self {
            dir: dir.to_owned(),
            media,
            index,
            buffers: Buffers::default(),
            state: Mutex::new(State {
                space: Space::default(),
                files: HashMap::new(),
                next_epoch: 0,
            }),
            files_bytes_max: disk_bytes / 100 * FILES_SHARE_PERCENT,
            reserve_bytes: (disk_bytes / RESERVE_SHARE).clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX),
            unremoved: Mutex::default(),
        };
        tier.open_files()?;
        Ok(tier)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the files whose first page is right; the others are removed, they hold nothing readable.
    fn open_files(&self) -> Result<(), DiskError> {
        let io = |what| move |source| DiskError::Io { what, source };
        let mut state = self.lock();
        state.space = Space::default();
        for number in self.media.list().map_err(io("listing slot files"))? {
            let (file, bytes) = self.media.open(number).map_err(io("opening a slot file"))?;
            let mut page = self.buffers.take(PAGE_BYTES);
            let read = if bytes < PAGE_BYTES as u64 { Ok(()) } else { file.read(&mut page, 0) };
            read.map_err(io("reading a slot file"))?;
            let right = FileHeader::decode(&page).filter(|header| {
                bytes >= PAGE_BYTES as u64
                    && header.file == number
                    && slot_at(&header.geometry, header.slots) <= bytes
            });
            if let Some(header) = right {
                state.space.add_file(number, header.geometry, header.slots);
                state.files.insert(number, (file, bytes));
            } else {
                tracing::warn!(file = number, "slot file without a right first page removed");
                self.media.remove(number).map_err(io("removing a slot file"))?;
            }
        }
        Ok(())
    }

    /// Enters what the index says; gives back the highest opening seen and the entries that were wrong.
    fn read_index(&self, found: &mut dyn FnMut(StoredBlock)) -> Result<(u32, u64), DiskError> {
        let mut opening = 0;
        let mut impossible: Vec<Box<[u8]>> = Vec::new();
        let mut wrong = self.index.scan(&mut |Entry { at, epoch, block }| {
            let mut state = self.lock();
            if state.space.occupy(at, block.bytes, epoch, block.order) {
                drop(state);
                opening = opening.max((epoch >> EPOCH_OPENING_SHIFT) as u32);
                found(block);
            } else {
                impossible.push(Box::from(block.key.0)); // Two in one slot, or none there.
            }
        })?;
        wrong.extend(impossible);
        if !wrong.is_empty() {
            self.index.remove_wrong(&wrong)?;
        }
        Ok((opening, wrong.len() as u64))
    }

    /// Reads every slot's header page; of two blocks with one key the higher epoch wins. Payloads are
    /// checked when they are read.
    fn rebuild_index(&self, found: &mut dyn FnMut(StoredBlock)) -> Result<u32, DiskError> {
        let files: Vec<_> = {
            let state = self.lock();
            let shape = |number: &u32| state.space.geometry(*number).copied();
            state.files.iter().filter_map(|(n, file)| Some((*n, file.clone(), shape(n)?))).collect()
        };
        let mut newest: HashMap<BlockKey, (SlotHeader, kv_protocol::BlockHeader)> = HashMap::new();
        let mut page = self.buffers.take(PAGE_BYTES);
        for (number, (file, bytes), geometry) in files {
            let slots = (bytes - PAGE_BYTES as u64) / slot_bytes(&geometry);
            for slot in 0..slots as u32 {
                if let Err(error) = file.read(&mut page, slot_at(&geometry, slot)) {
                    tracing::warn!(file = number, slot, %error, "slot not read: its block is lost");
                    continue;
                }
                let Some((read, header)) = SlotHeader::decode(&page) else { continue };
                if read.at != (SlotId { file: number, slot }) || read.geometry != geometry {
                    continue;
                }
                let known = newest.get(&header.key);
                if known.is_none_or(|(known, _)| known.epoch < read.epoch) {
                    newest.insert(header.key, (read, header));
                }
            }
        }
        if !newest.is_empty() {
            tracing::warn!(blocks = newest.len(), "index rebuilt from the headers of slots");
        }
        let mut opening = 0;
        let mut entries = Vec::new();
        for (key, (slot, header)) in newest {
            let block = slot.stored(&header);
            self.lock().space.occupy(slot.at, block.bytes, slot.epoch, slot.order);
            opening = opening.max((slot.epoch >> EPOCH_OPENING_SHIFT) as u32);
            entries.push((key, encode_entry(&slot, &header)));
            found(block);
            if entries.len() == REBUILT_PER_BATCH {
                self.index.put(&std::mem::take(&mut entries))?;
            }
        }
        self.index.put(&entries)?;
        Ok(opening)
    }

    /// Takes a slot, making or taking over a file where none is free.
    fn take(&self, block: &NewBlock<'_>, after: Option<SlotId>) -> Result<Place, DiskError> {
        let geometry = block.geometry;
        let mut state = self.lock();
        state.next_epoch += 1;
        let (epoch, order) = (state.next_epoch, block.order);
        let mut at = state.space.take(geometry, after, epoch, order);
        if at.is_none() {
            drop(state);
            self.add_file(geometry)?;
            state = self.lock();
            at = state.space.take(geometry, after, epoch, order);
        }
        let at = at.ok_or(DiskError::Full { needed: slot_bytes(geometry) })?;
        let (file, _) = &state.files[&at.file];
        let slot = SlotHeader { at, epoch, order, geometry: *geometry };
        Ok(Place { file: file.clone(), slot })
    }

    /// Another file for a geometry: within the budget, or in the place of another geometry's.
    fn add_file(&self, geometry: &Geometry) -> Result<(), DiskError> {
        let io = |what| {
            move |source: io::Error| {
                let needed = slot_bytes(geometry);
                if media::is_full(&source) {
                    DiskError::Full { needed }
                } else {
                    DiskError::Io { what, source }
                }
            }
        };
        let slots = (self.files_bytes_max / FILE_SHARE).min(FILE_BYTES_MAX) / slot_bytes(geometry);
        let slots_max = (self.files_bytes_max / 4 / slot_bytes(geometry)).max(1);
        let slots = slots.max(FILE_SLOTS_MIN).min(slots_max).min(u64::from(u32::MAX)) as u32;
        // The last file takes what is left of the budget: whole files alone would strand up to one.
        let slots = loop {
            let taken: u64 = self.lock().files.values().map(|(_, bytes)| bytes).sum();
            let room = self.files_bytes_max.saturating_sub(taken + PAGE_BYTES as u64);
            let fitting = room / slot_bytes(geometry);
            if fitting >= u64::from(slots) {
                break slots;
            }
            // Before a short file, another geometry's: short ones would split groups over many syncs.
            let victim = self.lock().space.victim(geometry);
            match victim {
                Some(victim) => self.drop_file(victim)?,
                None if fitting > 0 => break fitting as u32,
                None => return Err(DiskError::Full { needed: slot_bytes(geometry) }),
            }
        };
        let bytes = slot_at(geometry, slots);
        let left = self.media.available().map_err(io("asking for free space"))?;
        if left < bytes + self.reserve_bytes {
            return Err(DiskError::Full { needed: bytes + self.reserve_bytes });
        }
        let number = self.lock().space.next_file();
        let file = self.media.create(number, bytes).map_err(io("making a slot file"))?;
        let header = FileHeader { file: number, slots, geometry: *geometry }.encode();
        let mut page = self.buffers.take(PAGE_BYTES);
        page.copy_from_slice(&header);
        let begun = file.write(&page, 0).and_then(|()| file.sync());
        if let Err(error) = begun {
            let _ = self.media.remove(number); // `open_files` removes it otherwise.
            return Err(io("beginning a slot file")(error));
        }
        let mut state = self.lock();
        state.space.add_file(number, *geometry, slots);
        state.files.insert(number, (file, bytes));
        Ok(())
    }

    /// Forgets a file's blocks, then the file.
    fn drop_file(&self, number: u32) -> Result<(), DiskError> {
        let mut keys = Vec::new();
        self.index.scan(&mut |entry| {
            if entry.at.file == number {
                keys.push(entry.block.key);
            }
        })?;
        tracing::info!(file = number, blocks = keys.len(), "slot file given to another geometry");
        for some in keys.chunks(1024) {
            self.index.remove(some)?;
        }
        {
            let mut state = self.lock();
            state.space.remove_file(number);
            state.files.remove(&number);
        }
        self.media
            .remove(number)
            .map_err(|source| DiskError::Io { what: "removing a slot file", source })
    }

    /// Step 2 for one block.
    fn fill(&self, block: &NewBlock<'_>, place: &Place) -> Result<(), WriteFailure> {
        let geometry = block.geometry;
        let payload_bytes = geometry.payload_bytes() as usize;
        let mut buffer = self.buffers.take(slot_bytes(geometry) as usize);
        let (page, payload) = buffer.split_at_mut(PAGE_BYTES);
        if !(block.fill)(&mut payload[..payload_bytes]) {
            return Err(WriteFailure::Checksum);
        }
        payload[payload_bytes..].fill(0); // Left over from another block, maybe another tenant's.
        place.slot.encode(&block.header.encode(geometry), page);
        let written = place.file.write(&buffer, slot_at(geometry, place.slot.at.slot));
        written.map_err(|source| {
            if is_media_failure(&source) {
                self.lock().space.quarantine(place.slot.at);
            }
            WriteFailure::Disk(DiskError::Io { what: "writing a slot", source })
        })
    }

    /// Steps 1 to 4 for a group of blocks.
    fn write_group(&self, blocks: &[NewBlock<'_>]) -> Vec<Result<(), WriteFailure>> {
        // 1.
        let mut taken: HashMap<BlockKey, SlotId> = HashMap::new();
        let places: Vec<Result<Place, DiskError>> = blocks
            .iter()
            .map(|block| {
                let parent = &block.header.parent;
                let after = match taken.get(parent) {
                    Some(at) => Some(*at),
                    None => self.index.get(parent)?.map(|entry| entry.at),
                };
                let place = self.take(block, after)?;
                taken.insert(block.header.key, place.slot.at);
                Ok(place)
            })
            .collect();
        // 2.
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(block) = blocks.get(number) else { return done };
                if let Ok(place) = &places[number] {
                    done.push((number, self.fill(block, place)));
                }
            }
        };
        let helpers = WRITE_THREADS.min(blocks.len()).saturating_sub(1);
        let filled: HashMap<usize, Result<(), WriteFailure>> = std::thread::scope(|scope| {
            let helpers: Vec<_> = (0..helpers).map(|_| scope.spawn(work)).collect();
            let own = work();
            let theirs = helpers.into_iter().flat_map(|helper| {
                helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            own.into_iter().chain(theirs).collect()
        });
        let mut results: Vec<Result<(), WriteFailure>> = Vec::new();
        let mut filled = filled;
        for (number, place) in places.iter().enumerate() {
            results.push(match place {
                Ok(_) => filled.remove(&number).expect("each block with a place was filled"),
                Err(error) => Err(WriteFailure::Disk(error.repeat())),
            });
        }
        let good = |results: &[Result<(), WriteFailure>]| -> Vec<usize> {
            (0..results.len()).filter(|number| results[*number].is_ok()).collect()
        };
        // 3.
        let mut synced: HashMap<u32, Result<(), DiskError>> = HashMap::new();
        for number in good(&results) {
            let Ok(place) = &places[number] else { continue };
            let sync = |source| DiskError::Io { what: "syncing a slot file", source };
            let outcome =
                synced.entry(place.slot.at.file).or_insert_with(|| place.file.sync().map_err(sync));
            if let Err(error) = outcome {
                results[number] = Err(WriteFailure::Disk(error.repeat()));
            }
        }
        // 4.
        let (mut entries, mut replaced) = (Vec::new(), Vec::new());
        let mut failed = None;
        for number in good(&results) {
            let Ok(place) = &places[number] else { continue };
            let header = blocks[number].header;
            match self.index.get(&header.key) {
                Ok(old) => replaced.extend(old),
                Err(error) => failed = Some(error),
            }
            entries.push((header.key, encode_entry(&place.slot, header)));
        }
        if failed.is_none() && !entries.is_empty() {
            failed = self.index.put(&entries).err();
        }
        if let Some(error) = failed {
            // The batch may have reached the log all the same: its slots are free only when the index
            // has been opened again and says so. Until then nothing is written, see `Index::apply`.
            for number in good(&results) {
                results[number] = Err(WriteFailure::Disk(error.repeat()));
            }
            return results;
        }
        let mut state = self.lock();
        for entry in replaced {
            state.space.release(entry.at, entry.epoch);
        }
        for (number, place) in places.iter().enumerate() {
            if let (Ok(place), Err(_)) = (place, &results[number]) {
                state.space.release(place.slot.at, place.slot.epoch);
            }
        }
        results
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

    /// Reads the slot of an entry whose reader count is held.
    fn read_slot(
        &self,
        slot: &SlotHeader,
        file: &dyn SlotFile,
        sink: &mut dyn FnMut(&[u8]),
    ) -> Result<(), DiskError> {
        let geometry = &slot.geometry;
        let mut buffer = self.buffers.take(slot_bytes(geometry) as usize);
        file.read(&mut buffer, slot_at(geometry, slot.at.slot))
            .map_err(|source| DiskError::Io { what: "reading a slot", source })?;
        let Some((found, header)) = SlotHeader::decode(&buffer[..PAGE_BYTES]) else {
            let message = format!("{:?} has no right header", slot.at);
            return Err(DiskError::Corrupt { what: "slot", message });
        };
        if found != *slot {
            let message = format!("the index has {slot:?}, its header {found:?}");
            return Err(DiskError::Corrupt { what: "slot", message });
        }
        let header_bytes = header.encode(geometry).len();
        let payload_bytes = geometry.payload_bytes() as usize;
        sink(&buffer[PAGE_BYTES - header_bytes..PAGE_BYTES + payload_bytes]);
        Ok(())
    }
}

/// The drive, rather than its room or its being writable.
fn is_media_failure(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

/// Bytes allocated by the files under a folder.
fn folder_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let bytes = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    };
    entries.flatten().map(bytes).sum()
}

/// A name beside `path` that nothing has.
fn aside(path: &Path, why: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    (1..=u32::MAX)
        .map(|number| path.with_file_name(format!("{name}.{why}-{number}")))
        .find(|path| !path.exists())
        .expect("some number is free")
}

/// Makes the folder. A store of a version that we do not know is set aside first, whole: a newer
/// Colloquy may read it again.
fn make_home(home: &Path) -> io::Result<()> {
    let ours = FORMAT_VERSION.to_string();
    let format = home.join(FORMAT_FILE);
    if home.exists() {
        let found = std::fs::read_to_string(&format).unwrap_or_default();
        if found.trim() == ours {
            return Ok(());
        }
        if std::fs::read_dir(home)?.next().is_some() {
            let digits = found.trim().chars().filter(char::is_ascii_digit).take(10);
            let version: String = digits.collect();
            let aside = aside(home, &format!("version-{version}"));
            tracing::warn!(version, ours, to = %aside.display(), "store set aside");
            std::fs::rename(home, &aside)?;
        }
    }
    std::fs::create_dir_all(home)?;
    let new = home.with_extension("new-format");
    std::fs::write(&new, ours + "\n")?;
    std::fs::File::open(&new)?.sync_all()?;
    std::fs::rename(&new, &format)?;
    std::fs::File::open(home)?.sync_all()
}

/// Sets a corrupt index aside and makes an empty one.
fn start_index_anew(
    home: &Path,
    media: Arc<dyn Media>,
    error: &DiskError,
) -> Result<Index, DiskError> {
    let aside = aside(home, "corrupt");
    tracing::error!(%error, to = %aside.display(), "index set aside; it is made again from the slots");
    std::fs::rename(home, &aside)
        .map_err(|source| DiskError::Io { what: "setting the index aside", source })?;
    Index::open(home, media)
}

impl DiskTier for SlotTier {
    fn load(
        &mut self,
        block: &mut dyn FnMut(StoredBlock),
        conversation: &mut dyn FnMut(StoredConversation),
    ) -> Result<u64, DiskError> {
        let read = if self.index.is_complete()? {
            self.read_index(block)
        } else {
            self.rebuild_index(block).map(|opening| (opening, 0))
        };
        let (opening, corrupt) = match read {
            Err(error) if is_corrupt(&error) => {
                let home = self.dir.join(FOLDER).join(INDEX_FOLDER);
                self.index.close(); // Its lock file is the new one's to take.
                self.index = start_index_anew(&home, self.media.clone(), &error)?;
                self.open_files()?; // What the half-read index had occupied is free again.
                (self.rebuild_index(block)?, 0)
            }
            other => other?,
        };
        let opening = self.index.begin(opening)?;
        self.lock().next_epoch = u64::from(opening) << EPOCH_OPENING_SHIFT;
        Ok(corrupt + self.index.scan_records(conversation)?)
    }

    fn write(&self, blocks: &[NewBlock<'_>]) -> Vec<Result<(), WriteFailure>> {
        self.write_group(blocks)
    }

    fn read(&self, key: &BlockKey, sink: &mut dyn FnMut(&[u8])) -> Result<bool, DiskError> {
        let Some(Entry { at, epoch, block }) = self.index.get(key)? else { return Ok(false) };
        let (slot, file) = {
            let mut state = self.lock();
            let Some(geometry) = state.space.geometry(at.file).copied() else { return Ok(false) };
            if !state.space.begin_read(at, epoch) {
                return Ok(false); // Removed since the index was asked.
            }
            let slot = SlotHeader { at, epoch, order: block.order, geometry };
            (slot, state.files[&at.file].0.clone())
        };
        let read = self.read_slot(&slot, &*file, sink);
        self.lock().space.end_read(slot.at);
        read.map(|()| true)
    }

    fn remove(&self, keys: &[BlockKey]) -> Result<(), DiskError> {
        let removed = self.remove_now(keys);
        if removed.is_err() {
            let mut unremoved = self.unremoved.lock().unwrap_or_else(PoisonError::into_inner);
            unremoved.extend(keys);
        }
        removed
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
        self.index.remove_record(id)
    }

    fn usage(&self) -> DiskUsage {
        let files: u64 = self.lock().files.values().map(|(_, bytes)| bytes).sum();
        DiskUsage {
            physical_bytes: files + self.index.physical_bytes(),
            direct_io: self.media.is_direct(),
        }
    }

    /// Slots are reused in place: nothing to do.
    fn reclaim(&self) -> Result<(), DiskError> {
        Ok(())
    }

    /// Each write was synced.
    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    /// Opens the index again, gives slots that failed writes left to nobody back, and tries a write.
    fn probe(&self) -> Result<(), DiskError> {
        let io = |source| DiskError::Io { what: "trying a write", source };
        self.media.probe().map_err(io)?;
        self.index.reopen()?;
        let opening = (self.lock().next_epoch >> EPOCH_OPENING_SHIFT) as u32;
        let opening = self.index.begin(opening)?;
        let mut unremoved = self.unremoved.lock().unwrap_or_else(PoisonError::into_inner);
        self.remove_now(&unremoved)?;
        unremoved.clear();
        drop(unremoved);
        let mut held = std::collections::HashSet::new();
        self.index.scan(&mut |entry| {
            held.insert((entry.at, entry.epoch));
        })?;
        let mut state = self.lock();
        state.next_epoch = u64::from(opening) << EPOCH_OPENING_SHIFT; // A count may have run out.
        state.space.release_all_but(&|at, epoch| held.contains(&(at, epoch)));
        tracing::info!(dir = %self.dir.display(), "the disk tier takes writes again");
        Ok(())
    }
}
