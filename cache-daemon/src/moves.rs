//! Which blocks move between the tiers: one set of rules, driven by the daemon ([`crate::transfer`]: frames in
//! shared memory, a disk behind threads) and by the simulator ([`crate::sim::replay`]: two counters, and a disk
//! that is a rate). What differs between them is [`Tiers`]' required half; the choices are its provided half.
//!
//! Before each choice the index learns what changed since the last one, so a choice never rests on what a
//! move before it has made untrue.

use kv_protocol::BlockKey;

use crate::directory::{Block, Directory, EntryId, OnDisk};
use crate::policy::budget::{Worth, WriteBudget};
use crate::policy::retention::Retentions;
use crate::policy::{Index, Known, Promote, Residence, Standing, Walk};
use crate::queue::Queue;
use crate::tier::host::{free_high, free_low};

/// Blocks that a walk passes because they have to be written first: it ends there, a fraction of a millisecond's
/// work, and the next turn of the loop finds some of them written.
const PASSED_MAX: usize = 256;
/// Blocks that leave a disk tier that was made smaller, in one turn of the loop: some milliseconds' work.
const DROPPED_PER_TURN: usize = 256;

/// What the rules choose from.
pub(crate) struct Catalogue<'a> {
    pub(crate) directory: &'a mut Directory,
    pub(crate) queue: &'a mut Queue,
    pub(crate) index: &'a mut Index,
    pub(crate) retentions: &'a mut Retentions,
    pub(crate) budget: &'a mut WriteBudget,
}

/// The host tier's frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frames {
    pub(crate) all: u32,
    pub(crate) free: u32,
    /// Will be free: their pages are being allocated.
    pub(crate) coming: u32,
}

impl Frames {
    /// Whether a block may come that nobody waits for: the watermark would not throw it out again.
    fn has_spare(self) -> bool {
        self.free > free_high(self.all)
    }

    /// How many to free now: up to the high watermark, once the low one is passed. While more are coming, only
    /// the one that somebody may wait for: should none come after all, blocks leave one by one.
    fn to_free(self) -> u32 {
        match self.coming {
            0 if self.free < free_low(self.all) => free_high(self.all) - self.free,
            0 => 0,
            _ => u32::from(self.free == 0),
        }
    }
}

/// Why a block is not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unwritten {
    /// The policy gives up nothing on disk for it.
    Room,
    /// The drive has to last.
    Budget,
}

impl Unwritten {
    /// For metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Unwritten::Room => "room",
            Unwritten::Budget => "budget",
        }
    }
}

/// Whether the disk takes a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskRoom {
    /// As it is.
    Fits,
    /// Once others have left.
    Full,
    /// Not even if it were empty.
    Never,
}

/// See the module.
pub(crate) trait Tiers {
    fn catalogue(&mut self) -> Catalogue<'_>;

    /// The clock of retentions and budgets.
    fn now_ms(&self) -> u64;

    /// Blocks whose frames or transfers changed since the last call.
    fn take_changed(&mut self) -> Vec<BlockKey>;

    /// Whether a promote of the block waits or is under way.
    fn is_asked_for(&self, key: &BlockKey) -> bool;

    /// Where the block stands in host memory.
    fn in_host(&self, key: &BlockKey, block: &Block) -> Residence;

    fn frames(&self) -> Frames;

    /// Whether a block that leaves its frame can be saved first.
    fn can_write(&self) -> bool;

    /// The block is to be written; nothing happens if it is waiting for that already.
    fn queue_write(&mut self, key: &BlockKey);

    /// The block leaves its frame, which is free now.
    fn free_frame(&mut self, key: &BlockKey);

    /// Whether `bytes` more fit on disk, writes under way included.
    fn disk_room(&self, bytes: u64) -> DiskRoom;

    /// A stored block leaves the disk.
    fn drop_from_disk(&mut self, key: &BlockKey);

    /// Brings the index up to date with what changed since the last choice.
    fn refresh(&mut self) {
        let mut keys = self.take_changed();
        let Catalogue { directory, queue, .. } = self.catalogue();
        keys.append(&mut queue.take_changed());
        let mut changed: Vec<EntryId> = keys.iter().filter_map(|key| directory.find(key)).collect();
        changed.extend(directory.take_changed());
        changed.sort_unstable();
        changed.dedup();
        for id in changed {
            self.refresh_one(id);
        }
    }

    fn refresh_one(&mut self, id: EntryId) {
        let Catalogue { directory, queue, retentions, .. } = self.catalogue();
        let key = *directory.key(id);
        let block = directory.at(id).cloned();
        if block.is_none() {
            retentions.forget(&key);
        }
        let known = block.as_ref().map(|block| {
            let keep = retentions.keep(&key, block.used_ms);
            Known { keep, ..directory.known(block, queue.first_turn(&key)) }
        });
        let standing = block.zip(known).map(|(block, known)| {
            let disk = match block.disk {
                OnDisk::Absent => Residence::Absent,
                OnDisk::Stored if !self.is_asked_for(&key) => Residence::Free,
                OnDisk::Stored | OnDisk::Writing => Residence::Held,
            };
            Standing { known, host: self.in_host(&key, &block), disk }
        });
        self.catalogue().index.set(id, &key, standing.as_ref());
    }

    /// Demotes until the high watermark, once the low one is passed: a frame is free before it is asked for.
    fn keep_frames_free(&mut self) {
        let (mut walk, mut passed) = (Walk::default(), 0);
        for _ in 0..self.frames().to_free() {
            self.refresh();
            let Catalogue { directory, index, .. } = self.catalogue();
            let Some(victim) = index.host_victim(&mut walk) else { return };
            let key = *directory.key(victim.id);
            // Frames whose blocks are being written will be free soon.
            if !self.demote(&key) {
                self.catalogue().index.pass_host(&mut walk, victim);
                passed += 1;
                if passed == PASSED_MAX {
                    return;
                }
            }
        }
    }

    /// Frees the first frame that can be freed now; the blocks before it go to disk first.
    fn make_frame_free(&mut self) -> bool {
        self.refresh();
        let mut walk = Walk::default();
        for _ in 0..PASSED_MAX {
            let Catalogue { directory, index, .. } = self.catalogue();
            let Some(victim) = index.host_victim(&mut walk) else { return false };
            let key = *directory.key(victim.id);
            if self.demote(&key) {
                return true;
            }
            self.catalogue().index.pass_host(&mut walk, victim);
        }
        false
    }

    /// Frees a block's frame if the disk has the block, or cannot have it; else it is written first.
    fn demote(&mut self, key: &BlockKey) -> bool {
        let can_write = self.can_write();
        let Some(block) = self.catalogue().directory.get(key).cloned() else { return false };
        if self.in_host(key, &block) != Residence::Free {
            return false;
        }
        if !block.is_stored() && can_write {
            self.queue_write(key);
            return false;
        }
        self.free_frame(key);
        true
    }

    /// What to bring from disk before it is asked for, if it may come: into a frame that the watermark does
    /// not need, or in the place of a block that no turn needs as soon. Else what it displaces would come back
    /// for an earlier turn.
    fn choose_promote(&mut self) -> Option<Promote> {
        self.refresh();
        let frames = self.frames();
        let Catalogue { directory, queue, index, .. } = self.catalogue();
        let promote = index.promote(queue, frames.all.into())?;
        if frames.has_spare() {
            return Some(promote);
        }
        let turn_of = |id| queue.first_turn(directory.key(id));
        let victim = index.displaced_by(&promote, turn_of)?;
        let key = *directory.key(victim.id);
        self.demote(&key).then_some(promote)
    }

    /// Whether a block may come from another daemon or the remote tier: into a frame that the watermark does
    /// not need, or in the place of a block that no waiting turn will read and that the disk keeps.
    fn has_room_for_import(&mut self) -> bool {
        if self.frames().has_spare() {
            return true;
        }
        self.refresh();
        let can_write = self.can_write();
        let Catalogue { directory, queue, index, .. } = self.catalogue();
        let Some(victim) = index.host_victim(&mut Walk::default()) else { return false };
        let key = *directory.key(victim.id);
        let is_needed = queue.first_turn(&key).is_some();
        let is_kept = can_write || directory.get(&key).is_some_and(Block::is_stored);
        // One that is not stored yet is written first: there is room soon.
        let demoted = !is_needed && is_kept && self.demote(&key);
        demoted && self.frames().free > free_low(self.frames().all)
    }

    /// Whether a block that is in a frame is written now: the drive's budget allows it, and the disk has room
    /// or makes some. A block that is not leaves its frame all the same when frames run out.
    fn choose_write(&mut self, key: &BlockKey, bytes: u64) -> Result<(), Unwritten> {
        let now_ms = self.now_ms();
        let Catalogue { directory, queue, budget, .. } = self.catalogue();
        let is_proven =
            directory.get(key).is_some_and(|block| block.reused) || queue.first_turn(key).is_some();
        let worth = if is_proven { Worth::Proven } else { Worth::Unproven };
        let unwritten = if !budget.allows(bytes, worth, now_ms) {
            Unwritten::Budget
        } else if !self.make_disk_room(key, bytes) {
            Unwritten::Room
        } else {
            self.catalogue().budget.spend(bytes);
            return Ok(());
        };
        self.leave_unsaved(key);
        Err(unwritten)
    }

    /// Drops blocks from disk until `bytes` more fit, those first that the policy gives up first. A block
    /// that would itself be the first to leave does not come.
    fn make_disk_room(&mut self, key: &BlockKey, bytes: u64) -> bool {
        let Catalogue { directory, queue, retentions, .. } = self.catalogue();
        let Some(id) = directory.find(key) else { return false };
        let Some(block) = directory.at(id) else { return false };
        let keep = retentions.keep(key, block.used_ms);
        let incoming = Known { keep, ..directory.known(block, queue.first_turn(key)) };
        loop {
            match self.disk_room(bytes) {
                DiskRoom::Fits => return true,
                DiskRoom::Never => return false,
                DiskRoom::Full => {}
            }
            self.refresh();
            let Catalogue { directory, index, .. } = self.catalogue();
            let Some(victim) = index.disk_victim(id, &incoming) else { return false };
            let key = *directory.key(victim.id);
            self.drop_from_disk(&key);
        }
    }

    /// Drops blocks from a disk tier that holds more than it may, some in each turn. `true` if it does not.
    fn shrink_disk(&mut self) -> bool {
        for _ in 0..DROPPED_PER_TURN {
            if self.disk_room(0) == DiskRoom::Fits {
                return true;
            }
            self.refresh();
            let Catalogue { directory, index, .. } = self.catalogue();
            let Some(victim) = index.first_on_disk() else { return false };
            let key = *directory.key(victim.id);
            self.drop_from_disk(&key);
        }
        self.disk_room(0) == DiskRoom::Fits
    }

    /// Its frame is free, if frames run out.
    fn leave_unsaved(&mut self, key: &BlockKey) {
        let is_short = self.frames().to_free() > 0;
        let Some(block) = self.catalogue().directory.get(key).cloned() else { return };
        if is_short && self.in_host(key, &block) == Residence::Free {
            self.free_frame(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_freed_in_rounds_and_not_while_more_are_coming() {
        let to_free = |free, coming| Frames { all: 64, free, coming }.to_free();
        assert_eq!((to_free(4, 0), to_free(3, 0), to_free(0, 0)), (0, 5, 8));
        assert_eq!((to_free(3, 50), to_free(0, 50)), (0, 1));
    }
}
