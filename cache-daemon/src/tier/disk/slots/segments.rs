//! Whole-segment reclaim: a segment is written again when no block is left in it.
//!
//! Blocks that leave in the order in which they came leave empty segments behind, and nothing is copied.
//! Otherwise the segment with the fewest blocks is emptied into the spare one, which it then replaces. A
//! copy is a write like any other: header, place and epoch are new, the index changes when the copy is
//! durable, and a reader of the old slot reads on.

use kv_protocol::{BlockHeader, Geometry, Span};

use super::format::{SlotHeader, slot_bytes};
use super::space::{Placement, SlotId, Spare};
use super::{SlotTier, read_slot};
use crate::tier::disk::{DiskError, NewBlock, WriteFailure};

/// Blocks that are in memory at once: one is written while another is checked.
const COPIED_AT_ONCE: usize = 2;

struct Live {
    slot: SlotHeader,
    header: BlockHeader,
    payload: Span,
}

impl SlotTier {
    /// Whether a full store makes room by itself. What reclaiming copies has room in the spare segment.
    pub(super) fn reclaims(&self, spare: Spare) -> bool {
        self.placement == Placement::Append && spare == Spare::Kept
    }

    /// Empties a segment, or leaves only what readers are in; `Full` if each is full of blocks. The caller
    /// excludes other changes.
    pub(super) fn reclaim_segment(&self, geometry: &Geometry) -> Result<(), DiskError> {
        let live = {
            let state = self.lock();
            state.space.emptiest(geometry, state.writing_since)
        };
        let live = live.ok_or(DiskError::Full { needed: slot_bytes(geometry) })?;
        tracing::debug!(blocks = live.len(), "a segment is reclaimed");
        for some in live.chunks(COPIED_AT_ONCE) {
            self.copy_away(some, geometry)?;
        }
        Ok(())
    }

    fn copy_away(&self, slots: &[(SlotId, u64)], geometry: &Geometry) -> Result<(), DiskError> {
        let mut blocks = Vec::new();
        for (at, epoch) in slots {
            match self.read_live(*at, *epoch, geometry) {
                Ok(live) => blocks.push(live),
                Err(DiskError::Corrupt { message, .. }) => {
                    tracing::warn!(%message, "block lost while its segment is reclaimed");
                    self.remove_at(*at)?;
                }
                Err(error) => return Err(error),
            }
        }
        let new: Vec<NewBlock<'_>> = blocks
            .iter()
            .map(|Live { slot, header, payload }| NewBlock {
                geometry,
                header,
                order: slot.order,
                payload,
            })
            .collect();
        let mut results = Vec::new();
        self.write_group(&new, Spare::Used, &mut |at, result| results.push((at, result)));
        for (at, result) in results {
            let live = &blocks[at];
            match result {
                Ok(()) => {}
                Err(WriteFailure::Checksum) => {
                    tracing::warn!(key = %live.header.key, "corrupt block lost");
                    self.remove_at(live.slot.at)?;
                }
                Err(WriteFailure::Disk(error)) => return Err(error),
            }
        }
        Ok(())
    }

    fn read_live(&self, at: SlotId, epoch: u64, geometry: &Geometry) -> Result<Live, DiskError> {
        let file = self.lock().files[&at.file].0.clone();
        let payload = Span::heap(geometry.payload_bytes());
        let (slot, header) = read_slot(&*file, at, geometry, &payload)?;
        let entry = self.index.get(&header.key)?;
        if slot.epoch != epoch || entry.is_none_or(|entry| (entry.at, entry.epoch) != (at, epoch)) {
            let message = format!("{at:?} of epoch {epoch} holds {slot:?}");
            return Err(DiskError::Corrupt { what: "slot", message });
        }
        Ok(Live { slot, header, payload })
    }

    /// Forgets whatever the index has in a slot whose header does not say what that is.
    fn remove_at(&self, at: SlotId) -> Result<(), DiskError> {
        let mut keys = Vec::new();
        self.index.scan(&mut |entry| {
            if entry.at == at {
                keys.push(entry.block.key);
            }
        })?;
        self.remove_sometime(&keys)
    }
}
