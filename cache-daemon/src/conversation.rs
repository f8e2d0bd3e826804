//! Conversation records: the index of all, with an outline of each, and the bytes of the newest.
//!
//! A record put is answered from memory until it is on disk, and after that while it is recent: a `get`
//! right after a `put` never races the disk.
//!
//! **Invariants**
//! - `owners` counts, for each block's short name, the records whose chain has the block.
//! - `ends` names, for each block behind which a conversation may go on, those conversations: the last one
//!   of its chain, and those stored behind that.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use kv_protocol::ConversationId;

use crate::outline::Outline;

/// Bytes of recent records kept in memory.
const RECENT_BYTES_MAX: u64 = 16 << 20;
/// Records known at once, whatever their size.
const RECORDS_MAX: usize = 1 << 20;
/// Conversations with one end that are looked at for a new block: a popular prompt may have more.
const ENDS_SCANNED_MAX: usize = 4096;

/// What is known of a record.
#[derive(Debug, Clone)]
pub struct Known {
    /// Of the put, Unix milliseconds.
    pub updated_ms: u64,
    /// Of the record.
    pub bytes: u64,
    /// What it says.
    pub outline: Outline,
}

/// Place in the order of last use.
pub type Age = (u64, ConversationId);

/// See the module.
#[derive(Debug)]
pub struct Conversations {
    known: HashMap<ConversationId, Known>,
    by_age: BTreeSet<Age>,
    owners: HashMap<u64, u32>,
    ends: HashMap<u64, HashSet<ConversationId>>,
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
            owners: HashMap::new(),
            ends: HashMap::new(),
            bytes: 0,
            bytes_max,
            recent: HashMap::new(),
            recent_order: VecDeque::new(),
            recent_bytes: 0,
        }
    }

    /// Another bound; the next `expire` keeps it.
    pub fn set_bytes_max(&mut self, bytes_max: u64) {
        self.bytes_max = bytes_max;
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

    /// What is known of one.
    pub fn get(&self, id: &ConversationId) -> Option<&Known> {
        self.known.get(id)
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&ConversationId, &Known)> {
        self.known.iter()
    }

    /// Those last used before `age`, the most recently used first.
    pub fn before(&self, age: Option<Age>) -> impl Iterator<Item = (Age, &Known)> {
        let end = age.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let ages = self.by_age.range((std::ops::Bound::Unbounded, end)).rev();
        ages.filter_map(|age| Some((*age, self.known.get(&age.1)?)))
    }

    /// How many records have a block in their chain.
    pub fn owners(&self, block: u64) -> u32 {
        self.owners.get(&block).copied().unwrap_or_default()
    }

    /// A record found on disk, older than whatever was put since.
    pub fn found(&mut self, id: ConversationId, updated_ms: u64, bytes: u64, outline: Outline) {
        if !self.contains(&id) {
            self.set(id, Known { updated_ms, bytes, outline });
        }
    }

    fn set(&mut self, id: ConversationId, known: Known) {
        self.forget(&id);
        for block in &known.outline.blocks {
            *self.owners.entry(*block).or_default() += 1;
        }
        self.ends.entry(known.outline.open).or_default().insert(id);
        self.by_age.insert((known.updated_ms, id));
        self.bytes += known.bytes;
        self.known.insert(id, known);
    }

    /// A new or newer record.
    pub fn put(
        &mut self,
        id: ConversationId,
        updated_ms: u64,
        record: Arc<[u8]>,
        outline: Outline,
    ) {
        self.set(id, Known { updated_ms, bytes: record.len() as u64, outline });
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

    /// A block is stored: if it goes on where a conversation ends, it is that conversation's.
    pub fn goes_on(&mut self, parent: u64, block: u64, tokens: &[u32], is_full: bool) {
        let Some(here) = self.ends.get(&parent) else { return };
        let mut found = Vec::new();
        for id in here.iter().take(ENDS_SCANNED_MAX) {
            let Some(Known { outline, .. }) = self.known.get_mut(id) else { continue };
            let is_end = outline.open == parent;
            let is_ours = !is_end || outline.tail.is_empty() || outline.is_tail(tokens);
            if is_ours && outline.add_former(block) {
                found.push(*id);
            }
        }
        if is_full && !found.is_empty() {
            self.ends.entry(block).or_default().extend(found);
        }
    }

    /// Whether a partial block with these ids is the end of another conversation as well.
    pub fn is_end_of_another(&self, parent: u64, tokens: &[u32], id: &ConversationId) -> bool {
        let here = self.ends.get(&parent).into_iter().flatten().take(ENDS_SCANNED_MAX);
        let known = here.filter(|other| *other != id).filter_map(|other| self.known.get(other));
        known.map(|known| &known.outline).any(|it| it.open == parent && it.is_tail(tokens))
    }

    /// A record that is in memory.
    pub fn recent(&self, id: &ConversationId) -> Option<&Arc<[u8]>> {
        self.recent.get(id)
    }

    /// Forgets a record.
    pub fn forget(&mut self, id: &ConversationId) -> Option<Known> {
        if self.recent.contains_key(id) {
            self.drop_recent(id);
            self.recent_order.retain(|other| other != id);
        }
        let known = self.known.remove(id)?;
        self.by_age.remove(&(known.updated_ms, *id));
        self.bytes -= known.bytes;
        for end in known.outline.former.iter().chain([&known.outline.open]) {
            if let Some(here) = self.ends.get_mut(end) {
                here.remove(id);
                if here.is_empty() {
                    self.ends.remove(end);
                }
            }
        }
        for block in &known.outline.blocks {
            if let Some(owners) = self.owners.get_mut(block) {
                *owners -= 1;
                if *owners == 0 {
                    self.owners.remove(block);
                }
            }
        }
        Some(known)
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
    use kv_protocol::{Fingerprint, Record, RootKey};

    fn id(number: u8) -> ConversationId {
        ConversationId([number; 32])
    }

    fn outline(tokens: u32) -> Outline {
        let root = RootKey::new(&Fingerprint([1; 32]), b"");
        let record = Record::new(root, String::new(), 4, (0..tokens).collect());
        Outline::of(&record, &record.keys())
    }

    #[test]
    fn the_oldest_leave_when_bytes_run_out() {
        let mut conversations = Conversations::new(10);
        for number in 0..4 {
            conversations.put(id(number), number.into(), vec![0; 4].into(), outline(0));
        }
        assert_eq!(conversations.expire(0), [id(0), id(1)]);
        assert!(conversations.contains(&id(2)));
        assert!(conversations.recent(&id(0)).is_none());
    }

    #[test]
    fn a_record_found_on_disk_does_not_replace_a_newer_one() {
        let mut conversations = Conversations::new(100);
        conversations.put(id(1), 9, vec![1].into(), outline(0));
        conversations.found(id(1), 5, 50, outline(0));
        assert_eq!(conversations.expire(9), []);
        assert_eq!(conversations.expire(10), [id(1)]);
    }

    #[test]
    fn putting_again_replaces_the_bytes() {
        let mut conversations = Conversations::new(100);
        for round in 0..1000u64 {
            conversations.put(id(1), round, vec![0; 60].into(), outline(0));
        }
        assert_eq!((conversations.len(), conversations.bytes), (1, 60));
        assert_eq!((conversations.recent_order.len(), conversations.recent_bytes), (1, 60));
    }

    #[test]
    fn a_block_has_as_many_owners_as_records_with_it() {
        let mut conversations = Conversations::new(1000);
        let (short, long) = (outline(8), outline(12));
        conversations.put(id(1), 1, vec![0].into(), short.clone());
        conversations.found(id(2), 2, 1, long.clone());
        let owners = |conversations: &Conversations| {
            long.blocks.iter().map(|block| conversations.owners(*block)).collect::<Vec<u32>>()
        };
        assert_eq!(owners(&conversations), [2, 2, 1]);
        conversations.put(id(1), 3, vec![0].into(), long.clone());
        assert_eq!(owners(&conversations), [2, 2, 2]);
        conversations.forget(&id(2));
        assert_eq!(owners(&conversations), [1, 1, 1]);
        assert_eq!(conversations.expire(u64::MAX), [id(1)]);
        assert!(conversations.owners.is_empty() && conversations.ends.is_empty());
    }

    #[test]
    fn blocks_stored_behind_an_end_are_the_conversations_until_the_next_record() {
        let mut conversations = Conversations::new(1000);
        let first = outline(6); // Ends with 4, 5 behind one full block.
        let end = first.open;
        conversations.put(id(1), 1, vec![0].into(), first);
        conversations.goes_on(end, 70, &[9, 9, 9, 9], true);
        conversations.goes_on(end, 71, &[4, 5, 9, 9], true);
        conversations.goes_on(71, 72, &[1, 2, 3, 4], true);
        conversations.goes_on(72, 73, &[1], false);
        assert_eq!(conversations.get(&id(1)).unwrap().outline.former, [71, 72, 73]);
        conversations.put(id(1), 2, vec![0].into(), outline(6));
        conversations.goes_on(71, 74, &[1, 2, 3, 4], true);
        assert!(conversations.get(&id(1)).unwrap().outline.former.is_empty());
        conversations.forget(&id(1));
        assert!(conversations.ends.is_empty());
    }

    #[test]
    fn pages_go_from_the_last_used_back() {
        let mut conversations = Conversations::new(1000);
        for number in 0..5 {
            conversations.put(id(number), number.into(), vec![0].into(), outline(0));
        }
        let first: Vec<Age> = conversations.before(None).take(2).map(|(age, _)| age).collect();
        assert_eq!(first, [(4, id(4)), (3, id(3))]);
        let rest = conversations.before(first.last().copied());
        assert_eq!(rest.map(|(age, _)| age.0).collect::<Vec<u64>>(), [2, 1, 0]);
    }
}
