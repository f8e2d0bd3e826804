//! Conversation records: opaque bytes under a name. The index of all, and the bytes of the newest.
//!
//! A record put is answered from memory until it is on disk, and after that while it is recent: a `get`
//! right after a `put` never races the disk.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use kv_protocol::ConversationId;

/// Bytes of recent records kept in memory.
const RECENT_BYTES_MAX: u64 = 16 << 20;
/// Records known at once, whatever their size.
const RECORDS_MAX: usize = 1 << 20;

#[derive(Debug, Clone, Copy)]
struct Known {
    updated_ms: u64,
    bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Conversations {
    known: HashMap<ConversationId, Known>,
    by_age: BTreeSet<(u64, ConversationId)>,
    bytes: u64,
    bytes_max: u64,
    recent: HashMap<ConversationId, Arc<[u8]>>,
    recent_order: VecDeque<ConversationId>,
    recent_bytes: u64,
}

impl Conversations {
    /// At most `bytes_max` bytes of records are known; the oldest leave.
    pub fn new(bytes_max: u64) -> Self {
        Self {
            known: HashMap::new(),
            by_age: BTreeSet::new(),
            bytes: 0,
            bytes_max,
            recent: HashMap::new(),
            recent_order: VecDeque::new(),
            recent_bytes: 0,
        }
    }

    /// Records known.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Whether a record is known.
    pub fn contains(&self, id: &ConversationId) -> bool {
        self.known.contains_key(id)
    }

    /// A record found on disk, older than whatever was put since.
    pub fn found(&mut self, id: ConversationId, updated_ms: u64, bytes: u64) {
        if !self.contains(&id) {
            self.set(id, updated_ms, bytes);
        }
    }

    fn set(&mut self, id: ConversationId, updated_ms: u64, bytes: u64) {
        self.forget(&id);
        self.known.insert(id, Known { updated_ms, bytes });
        self.by_age.insert((updated_ms, id));
        self.bytes += bytes;
    }

    /// A new or newer record.
    pub fn put(&mut self, id: ConversationId, updated_ms: u64, record: Arc<[u8]>) {
        self.set(id, updated_ms, record.len() as u64);
        self.recent_bytes += record.len() as u64;
        self.recent.insert(id, record);
        self.recent_order.push_back(id);
        while self.recent_bytes > RECENT_BYTES_MAX {
            let Some(oldest) = self.recent_order.pop_front() else { break };
            self.drop_recent(&oldest);
        }
    }

    fn drop_recent(&mut self, id: &ConversationId) {
        if let Some(record) = self.recent.remove(id) {
            self.recent_bytes -= record.len() as u64;
        }
    }

    /// A record that is in memory.
    pub fn recent(&self, id: &ConversationId) -> Option<&Arc<[u8]>> {
        self.recent.get(id)
    }

    /// Forgets a record.
    pub fn forget(&mut self, id: &ConversationId) {
        if let Some(known) = self.known.remove(id) {
            self.by_age.remove(&(known.updated_ms, *id));
            self.bytes -= known.bytes;
        }
        if self.recent.contains_key(id) {
            self.drop_recent(id);
            self.recent_order.retain(|other| other != id);
        }
    }

    /// Forgets, and names, records that are over a bound or older than `oldest_ms`.
    pub fn expire(&mut self, oldest_ms: u64) -> Vec<ConversationId> {
        let mut gone = Vec::new();
        while let Some(&(updated_ms, id)) = self.by_age.first() {
            let is_over = self.bytes > self.bytes_max || self.known.len() > RECORDS_MAX;
            if !is_over && updated_ms >= oldest_ms {
                break;
            }
            self.forget(&id);
            gone.push(id);
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u8) -> ConversationId {
        ConversationId([number; 32])
    }

    #[test]
    fn the_oldest_leave_when_bytes_run_out() {
        let mut conversations = Conversations::new(10);
        for number in 0..4 {
            conversations.put(id(number), number.into(), vec![0; 4].into());
        }
        assert_eq!(conversations.expire(0), [id(0), id(1)]);
        assert!(conversations.contains(&id(2)));
        assert!(conversations.recent(&id(0)).is_none());
    }

    #[test]
    fn a_record_found_on_disk_does_not_replace_a_newer_one() {
        let mut conversations = Conversations::new(100);
        conversations.put(id(1), 9, vec![1].into());
        conversations.found(id(1), 5, 50);
        assert_eq!(conversations.expire(9), []);
        assert_eq!(conversations.expire(10), [id(1)]);
    }

    #[test]
    fn putting_again_replaces_the_bytes() {
        let mut conversations = Conversations::new(100);
        for round in 0..1000u64 {
            conversations.put(id(1), round, vec![0; 60].into());
        }
        assert_eq!((conversations.len(), conversations.bytes), (1, 60));
        assert_eq!((conversations.recent_order.len(), conversations.recent_bytes), (1, 60));
    }
}
