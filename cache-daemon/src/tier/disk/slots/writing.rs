//! Writing blocks: the four steps of the module above, for a group of them.

use std::collections::{HashMap, HashSet};
use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};

use kv_protocol::{BlockKey, Geometry};

use super::SlotTier;
use super::format::{FileHeader, PAGE_BYTES, SlotHeader, encode_entry, slot_at, slot_bytes};
use super::media::{self, SlotFile};
use super::pages::Pages;
use super::permits::Permits;
use super::space::{Placement, SlotId, Spare};
use crate::tier::disk::{DiskError, NewBlock, READERS, READS_AT_ONCE, WriteFailure};

/// Each file is this share of all: small enough that another geometry takes over piece by piece.
const FILE_SHARE: u64 = 32;
const FILE_BYTES_MAX: u64 = 1 << 30;
/// But a group of blocks has room in few, so that few syncs do for all, unless there are too few files then.
pub const FILE_SLOTS_MIN: u64 = 8;
const FILES_MIN: u64 = 4;
/// One of them is always spare.
const SEGMENTS_MIN: u64 = 16;
/// Threads that write: while some check what is to be written, the drive has others' writes to do.
const WRITERS: usize = READERS;
/// Blocks with one sync of each of their files, and one of the index's log: some milliseconds, beside the forty
/// that 16 blocks of 8 MB take.
const SYNCED_AT_ONCE: usize = 16;

/// A slot taken for a block that is being written.
pub struct Place {
    pub file: Arc<dyn SlotFile>,
    pub slot: SlotHeader,
}

impl SlotTier {
    /// Takes a slot. Where none is free: makes a file, takes one over, or empties a segment.
    fn take(
        &self,
        block: &NewBlock<'_>,
        after: Option<SlotId>,
        spare: Spare,
    ) -> Result<Place, DiskError> {
        let geometry = block.geometry;
        let mut may_reclaim = self.reclaims(spare);
        loop {
            {
                let mut state = self.lock();
                state.next_epoch += 1;
                let (epoch, order) = (state.next_epoch, block.order);
                if let Some(at) = state.space.take(geometry, after, spare, epoch, order) {
                    let (file, _) = &state.files[&at.file];
                    let slot = SlotHeader { at, epoch, order, geometry: *geometry };
                    return Ok(Place { file: file.clone(), slot });
                }
            }
            match self.add_file(geometry) {
                Err(DiskError::Full { .. }) if may_reclaim => {
                    self.reclaim_segment(geometry)?;
                    may_reclaim = false; // There is room now, or a reader stays where there should be.
                }
                added => added?,
            }
        }
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
        let slots =
            (self.files_bytes_max() / FILE_SHARE).min(FILE_BYTES_MAX) / slot_bytes(geometry);
        let files_min = match self.placement {
            Placement::InPlace => FILES_MIN,
            Placement::Append => SEGMENTS_MIN,
        };
        let slots_max = (self.files_bytes_max() / files_min / slot_bytes(geometry)).max(1);
        let slots = slots.max(FILE_SLOTS_MIN).min(slots_max).min(u64::from(u32::MAX)) as u32;
        // The last file takes what is left of the budget: whole files alone would strand up to one.
        let slots = loop {
            let taken: u64 = self.lock().files.values().map(|(_, bytes)| bytes).sum();
            let room = self.files_bytes_max().saturating_sub(taken + PAGE_BYTES as u64);
            let fitting = room / slot_bytes(geometry);
            if fitting >= u64::from(slots) {
                break slots;
            }
            // Before a short file, another geometry's: short ones would split groups over many syncs.
            let victim = self.lock().space.victim(geometry);
            match victim {
                Some(victim) => self.drop_file(victim)?,
                None if fitting > 0 && self.placement == Placement::InPlace => {
                    break fitting as u32;
                }
                None => return Err(DiskError::Full { needed: slot_bytes(geometry) }),
            }
        };
        let bytes = slot_at(geometry, slots);
        let left = self.media.available().map_err(io("asking for free space"))?;
        if left < bytes + self.reserve_bytes() {
            return Err(DiskError::Full { needed: bytes + self.reserve_bytes() });
        }
        let number = self.lock().space.next_file();
        let file = self.media.create(number, bytes).map_err(io("making a slot file"))?;
        let header = FileHeader { file: number, slots, geometry: *geometry }.encode();
        let mut page = Pages::new(1);
        page.copy_from_slice(&header);
        let begun = file.write(&page, 0).and_then(|()| file.sync());
        if let Err(error) = begun {
            let _ = self.media.remove(number); // `open_files` removes it otherwise.
            return Err(io("beginning a slot file")(error));
        }
        let mut state = self.lock();
        state.space.add_file(number, *geometry, slots, true);
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
    fn fill(&self, block: &NewBlock<'_>, place: &Place, turns: &Turns) -> Result<(), WriteFailure> {
        if !turns.checks.during(|| block.is_right()) {
            return Err(WriteFailure::Checksum);
        }
        let geometry = block.geometry;
        let mut page = Pages::new(1);
        place.slot.encode(&block.header.encode(geometry), &mut page);
        let at = slot_at(geometry, place.slot.at.slot);
        let written = turns.writes.during(|| place.file.write_slot(&mut page, block.payload, at));
        written.map_err(|source| {
            if is_media_failure(&source) {
                self.lock().space.quarantine(place.slot.at);
            }
            // No space is a failure, too: what was allocated ahead is there, or something is wrong.
            WriteFailure::Disk(DiskError::Io { what: "writing a slot", source })
        })
    }

    /// Steps 1 to 4 for a group of blocks: while some are synced and entered, others are filled. The caller
    /// excludes other changes.
    pub(super) fn write_group(
        &self,
        blocks: &[NewBlock<'_>],
        spare: Spare,
        tell: &mut dyn FnMut(usize, Result<(), WriteFailure>),
    ) {
        if spare == Spare::Kept {
            let mut state = self.lock();
            state.writing_since = state.next_epoch + 1;
        }
        let mut placed = Vec::new();
        for (number, place) in self.take_places(blocks, spare).into_iter().enumerate() {
            match place {
                Ok(place) => placed.push((number, place)),
                Err(error) => tell(number, Err(WriteFailure::Disk(error))),
            }
        }
        let next = AtomicUsize::new(0);
        let turns = Turns::new();
        let (give, filled) = channel();
        let fill = |give: Sender<_>| {
            while let Some((number, place)) = placed.get(next.fetch_add(1, Ordering::Relaxed)) {
                let result = self.fill(&blocks[*number], place, &turns);
                let _ = give.send(Filled { number: *number, place, result }); // It is taken till the end.
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..WRITERS.min(placed.len()) {
                let give = give.clone();
                scope.spawn(|| fill(give));
            }
            drop(give);
            let mut unsynced = HashMap::new();
            loop {
                let mut some: Vec<Filled<'_>> = filled.iter().take(SYNCED_AT_ONCE).collect();
                if some.is_empty() {
                    return;
                }
                self.enter(blocks, &mut some, &mut unsynced);
                for Filled { number, result, .. } in some {
                    tell(number, result);
                }
            }
        });
    }

    /// Step 1 for a group of blocks.
    fn take_places(&self, blocks: &[NewBlock<'_>], spare: Spare) -> Vec<Result<Place, DiskError>> {
        let mut taken: HashMap<BlockKey, SlotId> = HashMap::new();
        let take = |block: &NewBlock<'_>| {
            let parent = &block.header.parent;
            let after = match taken.get(parent) {
                Some(at) => Some(*at),
                None => self.index.get(parent)?.map(|entry| entry.at),
            };
            let place = self.take(block, after, spare)?;
            taken.insert(block.header.key, place.slot.at);
            Ok(place)
        };
        blocks.iter().map(take).collect()
    }

    /// Steps 3 and 4 for blocks that have been filled, or could not be. `unsynced`: files of which a sync has
    /// failed; what was written before may be lost, and a later sync would not say so.
    fn enter(
        &self,
        blocks: &[NewBlock<'_>],
        filled: &mut [Filled<'_>],
        unsynced: &mut HashMap<u32, DiskError>,
    ) {
        // 3.
        let mut synced = HashSet::new();
        for Filled { place, result, .. } in filled.iter_mut().filter(|one| one.result.is_ok()) {
            let file = place.slot.at.file;
            if synced.insert(file)
                && let Err(source) = place.file.sync()
            {
                unsynced.insert(file, DiskError::Io { what: "syncing a slot file", source });
            }
            if let Some(error) = unsynced.get(&file) {
                *result = Err(WriteFailure::Disk(error.repeat()));
            }
        }
        // 4.
        let (mut entries, mut replaced) = (Vec::new(), Vec::new());
        let mut failed = None;
        for Filled { number, place, .. } in filled.iter().filter(|one| one.result.is_ok()) {
            let header = blocks[*number].header;
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
            for Filled { result, .. } in filled.iter_mut().filter(|one| one.result.is_ok()) {
                *result = Err(WriteFailure::Disk(error.repeat()));
            }
            return;
        }
        let mut state = self.lock();
        for entry in replaced {
            state.space.release(entry.at, entry.epoch);
        }
        for Filled { place, .. } in filled.iter().filter(|one| one.result.is_err()) {
            state.space.release(place.slot.at, place.slot.epoch);
        }
    }
}

/// Who may do what at once.
struct Turns {
    /// One a core: more at once would all end late, and the drive would wait for the first.
    checks: Permits,
    writes: Permits,
}

impl Turns {
    fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        Self { checks: Permits::new(cores), writes: Permits::new(READS_AT_ONCE) }
    }
}

/// A block after step 2.
struct Filled<'a> {
    /// Among the blocks of the group.
    number: usize,
    place: &'a Place,
    result: Result<(), WriteFailure>,
}

/// The drive, rather than its room or its being writable.
fn is_media_failure(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}
