//! What the inventory tells of, as the store has it.

use kv_protocol::ConversationId;

use crate::inventory::{Age, Entry, Stock, Totals};
use crate::store::Store;
use crate::tier::host::HostTier;

impl Stock for Store {
    fn before(&self, age: Option<Age>, count: usize) -> Vec<Age> {
        self.conversations.before(age).take(count).map(|(age, _)| age).collect()
    }

    fn entry(&self, id: &ConversationId) -> Option<Entry> {
        let known = self.conversations.get(id)?;
        let (host, disk) = self.shares(&known.outline);
        Some(Entry {
            root: known.outline.root,
            tokens: known.outline.tokens,
            host_bytes: host.bytes,
            disk_bytes: disk.bytes,
            used_ms: known.updated_ms,
            blocks: known.outline.blocks.len() + 1,
        })
    }

    fn totals(&self) -> Totals {
        let frames = self.host.as_ref().map(HostTier::counts).unwrap_or_default();
        Totals {
            conversations: self.conversations.len() as u64,
            host_bytes: u64::from(frames.ready + frames.pinned) * self.frame_bytes(),
            disk_bytes: self.transfers.stored_bytes,
        }
    }
}
