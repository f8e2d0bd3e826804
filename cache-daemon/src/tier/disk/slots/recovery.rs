//! What an opened store holds: from the index, or from the header pages of slots when that is lost.

use std::collections::HashMap;

use kv_protocol::BlockKey;

use super::format::{Entry, FileHeader, PAGE_BYTES, SlotHeader, encode_entry, slot_at, slot_bytes};
use super::pages::Pages;
use super::space::{SlotId, Space};
use super::{EPOCH_OPENING_SHIFT, SlotTier};
use crate::tier::disk::{DiskError, StoredBlock};

/// Entries written at once when the index is made again.
const REBUILT_PER_BATCH: usize = 1024;

impl SlotTier {
    /// Opens the files whose first page is right. Those of another version are set aside; the others are
    /// removed, they hold nothing readable.
    pub(super) fn open_files(&self) -> Result<(), DiskError> {
        let io = |what| move |source| DiskError::Io { what, source };
        let mut state = self.lock();
        state.space = Space::new(self.placement);
        for number in self.media.list().map_err(io("listing slot files"))? {
            let (file, bytes) = self.media.open(number).map_err(io("opening a slot file"))?;
            let mut page = Pages::new(1);
            let read = if bytes < PAGE_BYTES as u64 { Ok(()) } else { file.read(&mut page, 0) };
            read.map_err(io("reading a slot file"))?;
            let right = FileHeader::decode(&page).filter(|header| {
                bytes >= PAGE_BYTES as u64
                    && header.file == number
                    && slot_at(&header.geometry, header.slots) <= bytes
            });
            if let Some(header) = right {
                state.space.add_file(number, header.geometry, header.slots, false);
                state.files.insert(number, (file, bytes));
            } else if FileHeader::is_of_another_version(&page) {
                tracing::warn!(file = number, "slot file of another version set aside");
                self.media.set_aside(number).map_err(io("setting a slot file aside"))?;
            } else {
                tracing::warn!(file = number, "slot file without a right first page removed");
                self.media.remove(number).map_err(io("removing a slot file"))?;
            }
        }
        Ok(())
    }

    /// Enters what the index says; gives back the highest opening seen and the entries that were wrong.
    pub(super) fn read_index(
        &self,
        found: &mut dyn FnMut(StoredBlock),
    ) -> Result<(u32, u64), DiskError> {
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
    pub(super) fn rebuild_index(
        &self,
        found: &mut dyn FnMut(StoredBlock),
    ) -> Result<u32, DiskError> {
        let files: Vec<_> = {
            let state = self.lock();
            let shape = |number: &u32| state.space.geometry(*number).copied();
            state.files.iter().filter_map(|(n, file)| Some((*n, file.clone(), shape(n)?))).collect()
        };
        let mut newest: HashMap<BlockKey, (SlotHeader, kv_protocol::BlockHeader)> = HashMap::new();
        let mut page = Pages::new(1);
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
}
