//! Erasing: what is deleted is gone from the medium, not only from the index. In this order:
//!
//!  1. blocks and records leave the index: nobody finds them;
//!  2. readers leave their slots;
//!  3. every slot that holds no block but may hold bytes of one is punched out of its file and allocated
//!     again: the blocks' slots, and those where an earlier copy may have been left, by an eviction, by
//!     another variant, or by a write that failed. After a start nobody knows which, so the first
//!     erasure punches all free slots;
//!  4. the index is rewritten, so that no log, table or manifest holds what left it.
//!
//! An erasure that was cut short is asked for again: the slots of step 3 are still to be punched.

use kv_protocol::{BlockKey, ConversationId};

use super::SlotTier;
use super::format::slot_at;
use super::home::remove_indexes_aside;
use crate::tier::disk::DiskError;

impl SlotTier {
    /// See the module. The caller excludes other changes.
    pub(super) fn erase_now(
        &self,
        blocks: &[BlockKey],
        conversations: &[ConversationId],
    ) -> Result<(), DiskError> {
        let io = |source| DiskError::Io { what: "erasing", source };
        if !blocks.is_empty() {
            self.remove_sometime(blocks)?;
            self.erase_free_slots().map_err(io)?;
        }
        if !conversations.is_empty() {
            self.index.remove_records(conversations)?;
        }
        self.index.purge(!blocks.is_empty(), conversations)?;
        remove_indexes_aside(&self.home).map_err(io)
    }

    fn erase_free_slots(&self) -> std::io::Result<()> {
        let runs = {
            let state = self.lock();
            self.wait_for_readers(state).space.begin_erasing()
        };
        let mut outcome = Ok(());
        let mut files = Vec::new();
        for run in &runs {
            let (file, from, to) = {
                let state = self.lock();
                let Some(geometry) = state.space.geometry(run.file) else { continue };
                let (from, to) = (slot_at(geometry, run.slot), slot_at(geometry, run.end));
                (state.files[&run.file].0.clone(), from, to)
            };
            let erased = if outcome.is_ok() { file.erase(from, to - from) } else { Ok(()) };
            outcome = outcome.and(erased);
            if files.last().is_none_or(|(last, _)| *last != run.file) {
                files.push((run.file, file));
            }
        }
        for (_, file) in files {
            outcome = outcome.and_then(|()| file.sync());
        }
        let mut state = self.lock();
        for run in runs {
            state.space.end_erasing(&run, outcome.is_ok());
        }
        outcome
    }
}
