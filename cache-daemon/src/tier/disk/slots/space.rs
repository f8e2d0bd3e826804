//! Which slots hold what: pure book-keeping, no I/O.
//!
//! ```text
//! Free ──take──► Used ──release──► Free          no reader is in the slot
//!                  └────release──► Draining ──last reader leaves──► Free
//! Used ──quarantine──► Bad                        until the store is opened again
//! Free ──begin_erasing──► Erasing ──end_erasing──► Free
//! ```
//!
//! Which free slot is taken next is the [`Placement`]'s. In place: the one after the parent's, else where a
//! long run begins. Appended: the next of the open file, and a file's slots only again when all of them
//! are free; one empty file is spared for what reclaiming copies.
//!
//! **Invariant:** a slot that a reader is in is never taken.

use std::collections::{BTreeMap, HashMap};

use kv_protocol::Geometry;

use super::format::slot_bytes;

/// A new run leaves this many slots to whoever ends before it, so that both can grow in place.
const RUN_GAP_SLOTS: usize = 16;

/// Which free slot comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Any: slots are reused one by one.
    InPlace,
    /// The next in a segment, which is a file: segments are reused whole.
    Append,
}

impl Placement {
    /// Folder of files and index, in the tier's.
    pub fn folder(self) -> &'static str {
        match self {
            Placement::InPlace => "slots",
            Placement::Append => "segments",
        }
    }
}

/// Whether the spare segment may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spare {
    /// By a new block: no.
    Kept,
    /// By a block that makes another segment empty.
    Used,
}

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
/// Being overwritten with nothing.
const ERASING: Epoch = Epoch::MAX - 1;

/// Neighbouring slots `slot..end` of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Number of the file.
    pub file: u32,
    /// First.
    pub slot: u32,
    /// Behind the last.
    pub end: u32,
}

#[derive(Debug)]
struct FileSpace {
    geometry: Geometry,
    slots: Vec<Epoch>,
    free: usize,
    bad: usize,
    /// Whether a slot is known to hold no byte of any block.
    blank: Vec<bool>,
    /// Appending: slots before this one are not written again until the file is empty.
    cursor: usize,
    newest_order: u64,
}

impl FileSpace {
    fn is_empty(&self) -> bool {
        self.free + self.bad == self.slots.len()
    }

    /// The next slot to append to.
    fn next(&self) -> Option<usize> {
        let from = if self.is_empty() { 0 } else { self.cursor };
        (from..self.slots.len()).find(|slot| self.slots[*slot] == FREE)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Space {
    placement: Placement,
    files: BTreeMap<u32, FileSpace>,
    /// Slots that readers are in.
    visits: HashMap<SlotId, Visit>,
    /// Never given again: a reader of a removed file leaves no other's slot.
    newest_file: u32,
}

impl Space {
    /// Without files.
    pub fn new(placement: Placement) -> Self {
        Self { placement, files: BTreeMap::new(), visits: HashMap::new(), newest_file: 0 }
    }

    /// A file whose slots are all free, and blank if it was just made.
    pub fn add_file(&mut self, file: u32, geometry: Geometry, slots: u32, is_new: bool) {
        let blank = vec![is_new; slots as usize];
        let slots = vec![FREE; slots as usize];
        let free = slots.len();
        self.newest_file = self.newest_file.max(file);
        let space = FileSpace { geometry, slots, free, bad: 0, blank, cursor: 0, newest_order: 0 };
        self.files.insert(file, space);
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

    /// Takes a free slot; `after` is the parent's.
    pub fn take(
        &mut self,
        geometry: &Geometry,
        after: Option<SlotId>,
        spare: Spare,
        epoch: u64,
        order: u64,
    ) -> Option<SlotId> {
        let at = match self.placement {
            Placement::InPlace => self.after(geometry, after).or_else(|| self.begin_run(geometry)),
            Placement::Append => self.append(geometry, spare),
        };
        let at = at?;
        let file = self.files.get_mut(&at.file)?;
        file.free -= 1;
        file.newest_order = file.newest_order.max(order);
        file.cursor = at.slot as usize + 1;
        file.slots[at.slot as usize] = epoch;
        file.blank[at.slot as usize] = false;
        Some(at)
    }

    fn after(&self, geometry: &Geometry, after: Option<SlotId>) -> Option<SlotId> {
        let next = after.map(|after| SlotId { slot: after.slot + 1, ..after })?;
        let file = self.files.get(&next.file)?;
        let is_free = file.slots.get(next.slot as usize) == Some(&FREE);
        (file.geometry == *geometry && is_free).then_some(next)
    }

    /// In a file that is begun, else in an empty one.
    fn append(&self, geometry: &Geometry, spare: Spare) -> Option<SlotId> {
        let fitting = self.files.iter().filter(|(_, file)| file.geometry == *geometry);
        let (empty, begun): (Vec<_>, Vec<_>) = fitting.partition(|(_, file)| file.is_empty());
        let place = |(number, file): &(&u32, &FileSpace)| {
            file.next().map(|slot| SlotId { file: **number, slot: slot as u32 })
        };
        let kept = usize::from(spare == Spare::Kept);
        begun.iter().find_map(place).or_else(|| empty.iter().skip(kept).find_map(place))
    }

    /// Of the full segments, the one with the fewest blocks: those blocks. `None` if none has a free slot.
    /// Passes segments over that have a block of epoch `since` or later.
    pub fn emptiest(&self, geometry: &Geometry, since: u64) -> Option<Vec<(SlotId, u64)>> {
        let is_written = |file: &FileSpace| {
            file.slots.iter().any(|epoch| (since..ERASING).contains(epoch) && *epoch != FREE)
        };
        let full = self.files.iter().filter(|(_, file)| {
            let is_full = !file.is_empty() && file.next().is_none();
            file.geometry == *geometry && is_full && !is_written(file)
        });
        let (number, file) = full.filter(|(_, file)| file.free > 0).max_by_key(|(_, f)| f.free)?;
        let slots = file.slots.iter().enumerate();
        let used = slots.filter(|(_, epoch)| !matches!(**epoch, FREE | BAD | ERASING));
        let used = used.map(|(n, epoch)| (SlotId { file: *number, slot: n as u32 }, *epoch));
        let is_draining = |at: &SlotId| self.visits.get(at).is_some_and(|visit| visit.is_draining);
        Some(used.filter(|(at, _)| !is_draining(at)).collect())
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
        if *slot != FREE || matches!(epoch, FREE | BAD | ERASING) {
            return false;
        }
        *slot = epoch;
        file.free -= 1;
        file.cursor = file.cursor.max(at.slot as usize + 1);
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
            self.files.get_mut(&at.file).expect("it has the slot").bad += 1;
        }
    }

    /// Whether a reader is in a slot whose block is gone.
    pub fn is_draining(&self) -> bool {
        self.visits.values().any(|visit| visit.is_draining)
    }

    /// All slots that hold no block and may hold bytes of one. Nobody takes them before `end_erasing`.
    pub fn begin_erasing(&mut self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (number, file) in &mut self.files {
            for slot in 0..file.slots.len() {
                if !matches!(file.slots[slot], FREE | BAD) || file.blank[slot] {
                    continue;
                }
                if file.slots[slot] == FREE {
                    file.slots[slot] = ERASING;
                    file.free -= 1;
                }
                let slot = slot as u32;
                match runs.last_mut() {
                    Some(run) if run.file == *number && run.end == slot => run.end += 1,
                    _ => runs.push(Run { file: *number, slot, end: slot + 1 }),
                }
            }
        }
        runs
    }

    /// Gives slots of `begin_erasing` back.
    pub fn end_erasing(&mut self, run: &Run, is_blank: bool) {
        let Some(file) = self.files.get_mut(&run.file) else { return };
        for slot in run.slot as usize..run.end as usize {
            if file.slots[slot] == ERASING {
                file.slots[slot] = FREE;
                file.free += 1;
            }
            file.blank[slot] = is_blank;
        }
    }

    /// Releases what `is_held` does not know: slots whose write failed in an unknown way.
    pub fn release_all_but(&mut self, is_held: &dyn Fn(SlotId, u64) -> bool) {
        let mut used = Vec::new();
        for (file, space) in &self.files {
            let slots = space.slots.iter().enumerate();
            let held = slots.filter(|(_, epoch)| !matches!(**epoch, FREE | BAD | ERASING));
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
        let loss = |file: &FileSpace| if file.is_empty() { 0 } else { file.newest_order };
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
            let count = |state| file.slots.iter().filter(|epoch| **epoch == state).count();
            assert_eq!((count(FREE), count(BAD), count(ERASING)), (file.free, file.bad, 0));
            let used = file.slots.iter().zip(&file.blank).filter(|(epoch, _)| **epoch != FREE);
            assert!(used.into_iter().all(|(epoch, blank)| *epoch == BAD || !blank), "blocks");
        }
    }
}
