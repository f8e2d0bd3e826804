//! Which slots hold what: pure book-keeping, no I/O.
//!
//! ```text
//! Free ──take──► Used ──release──► Free          no reader is in the slot
//!                  └────release──► Draining ──last reader leaves──► Free
//! Used ──quarantine──► Bad                        until the store is opened again
//! ```
//!
//! **Invariant:** a slot that a reader is in is never taken.

use std::collections::{BTreeMap, HashMap};

use kv_protocol::Geometry;

use super::format::slot_bytes;

/// A new run leaves this many slots to whoever ends before it, so that both can grow in place.
const RUN_GAP_SLOTS: usize = 16;

/// A slot of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId {
    /// Number of the file.
    pub file: u32,
    /// Place in it.
    pub slot: u32,
}

/// What is true of few slots at a time, beside what [`Epoch`] says of all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Visit {
    readers: u32,
    /// Released while readers were in it: free when the last leaves.
    is_draining: bool,
}

/// Epoch of the write that a slot holds, and 0 for a free one: epochs begin at 1. A million slots take
/// 8 MB.
type Epoch = u64;
const FREE: Epoch = 0;
/// The medium failed there. No write gets so far.
const BAD: Epoch = Epoch::MAX;

#[derive(Debug)]
struct FileSpace {
    geometry: Geometry,
    slots: Vec<Epoch>,
    free: usize,
    newest_order: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Space {
    files: BTreeMap<u32, FileSpace>,
    /// Slots that readers are in.
    visits: HashMap<SlotId, Visit>,
    /// Never given again: a reader of a removed file leaves no other's slot.
    newest_file: u32,
}

impl Space {
    /// A file whose slots are all free.
    pub fn add_file(&mut self, file: u32, geometry: Geometry, slots: u32) {
        let slots = vec![FREE; slots as usize];
        let free = slots.len();
        self.newest_file = self.newest_file.max(file);
        self.files.insert(file, FileSpace { geometry, slots, free, newest_order: 0 });
    }

    /// Forgets a file.
    pub fn remove_file(&mut self, file: u32) {
        self.files.remove(&file);
    }

    /// A number that no file has or had.
    pub fn next_file(&self) -> u32 {
        self.newest_file + 1
    }

    /// Shape of a file's blocks.
    pub fn geometry(&self, file: u32) -> Option<&Geometry> {
        self.files.get(&file).map(|file| &file.geometry)
    }

    /// Takes a free slot: the one after `after` if it is free, else where a long run begins.
    pub fn take(
        &mut self,
        geometry: &Geometry,
        after: Option<SlotId>,
        epoch: u64,
        order: u64,
    ) -> Option<SlotId> {
        let next = after.map(|after| SlotId { slot: after.slot + 1, ..after });
        let next = next.filter(|next| {
            self.files.get(&next.file).is_some_and(|file| {
                file.geometry == *geometry && file.slots.get(next.slot as usize) == Some(&FREE)
            })
        });
        let at = next.or_else(|| self.begin_run(geometry))?;
        let file = self.files.get_mut(&at.file)?;
        file.free -= 1;
        file.newest_order = file.newest_order.max(order);
        file.slots[at.slot as usize] = epoch;
        Some(at)
    }

    /// In the emptiest file of the geometry, the longest run of free slots.
    fn begin_run(&self, geometry: &Geometry) -> Option<SlotId> {
        let fitting =
            self.files.iter().filter(|(_, file)| file.geometry == *geometry && file.free > 0);
        let (number, file) = fitting.max_by_key(|(_, file)| file.free)?;
        let (mut longest, mut at) = (0..0, 0);
        for run in file.slots.chunk_by(|a, b| (*a == FREE) == (*b == FREE)) {
            if run[0] == FREE && run.len() > longest.len() {
                longest = at..at + run.len();
            }
            at += run.len();
        }
        let follows_another = longest.start > 0;
        let gap =
            if follows_another && longest.len() > 2 * RUN_GAP_SLOTS { RUN_GAP_SLOTS } else { 0 };
        Some(SlotId { file: *number, slot: (longest.start + gap) as u32 })
    }

    /// A slot of that size which the index says is in use; `false` if that cannot be.
    pub fn occupy(&mut self, at: SlotId, bytes: u64, epoch: u64, order: u64) -> bool {
        let Some(file) = self.files.get_mut(&at.file) else { return false };
        if slot_bytes(&file.geometry) != bytes {
            return false;
        }
        let Some(slot) = file.slots.get_mut(at.slot as usize) else { return false };
        if *slot != FREE || matches!(epoch, FREE | BAD) {
            return false;
        }
        *slot = epoch;
        file.free -= 1;
        file.newest_order = file.newest_order.max(order);
        true
    }

    fn slot(&mut self, at: SlotId) -> Option<&mut Epoch> {
        self.files.get_mut(&at.file)?.slots.get_mut(at.slot as usize)
    }

    fn holds(&mut self, at: SlotId, epoch: u64) -> bool {
        let is_free = self.visits.get(&at).is_some_and(|visit| visit.is_draining);
        !is_free && epoch != FREE && self.slot(at).is_some_and(|slot| *slot == epoch)
    }

    /// A reader enters; `false` if the slot is not of that write any more.
    pub fn begin_read(&mut self, at: SlotId, epoch: u64) -> bool {
        let holds = self.holds(at, epoch);
        if holds {
            self.visits.entry(at).or_default().readers += 1;
        }
        holds
    }

    /// The reader leaves.
    pub fn end_read(&mut self, at: SlotId) {
        let Some(visit) = self.visits.get_mut(&at) else { return };
        visit.readers -= 1;
        if visit.readers == 0 {
            let is_draining = visit.is_draining;
            self.visits.remove(&at);
            if is_draining {
                self.free(at);
            }
        }
    }

    /// The slot's block is gone from the index.
    pub fn release(&mut self, at: SlotId, epoch: u64) {
        if !self.holds(at, epoch) {
            return; // Released before, and perhaps another's now.
        }
        match self.visits.get_mut(&at) {
            Some(visit) => visit.is_draining = true,
            None => self.free(at),
        }
    }

    fn free(&mut self, at: SlotId) {
        if let Some(file) = self.files.get_mut(&at.file) {
            file.slots[at.slot as usize] = FREE;
            file.free += 1;
        }
    }

    /// The medium failed there: the slot is not tried again.
    pub fn quarantine(&mut self, at: SlotId) {
        if let Some(slot) = self.slot(at) {
            *slot = BAD;
        }
    }

    /// Releases what `is_held` does not know: slots whose write failed in an unknown way.
    pub fn release_all_but(&mut self, is_held: &dyn Fn(SlotId, u64) -> bool) {
        let mut used = Vec::new();
        for (file, space) in &self.files {
            let slots = space.slots.iter().enumerate();
            let held = slots.filter(|(_, epoch)| !matches!(**epoch, FREE | BAD));
            used.extend(held.map(|(n, epoch)| (SlotId { file: *file, slot: n as u32 }, *epoch)));
        }
        for (at, epoch) in used {
            if !is_held(at, epoch) {
                self.release(at, epoch);
            }
        }
    }

    /// The file of another geometry that loses the least: an empty one, else the one written longest
    /// ago. Files with readers are passed over.
    pub fn victim(&self, geometry: &Geometry) -> Option<u32> {
        let is_quiet = |file| self.visits.keys().all(|at| at.file != file);
        let others = self
            .files
            .iter()
            .filter(|(number, file)| file.geometry != *geometry && is_quiet(**number));
        let loss =
            |file: &FileSpace| if file.free == file.slots.len() { 0 } else { file.newest_order };
        others.min_by_key(|(_, file)| loss(file)).map(|(number, _)| *number)
    }

    /// Slots in use, those that drain included.
    #[cfg(test)]
    pub fn used(&self) -> usize {
        self.files.values().map(|file| file.slots.len() - file.free).sum()
    }

    /// Counts agree with states.
    #[cfg(test)]
    pub fn self_check(&self) {
        for file in self.files.values() {
            let free = file.slots.iter().filter(|epoch| **epoch == FREE);
            assert_eq!(free.count(), file.free);
        }
    }
}
