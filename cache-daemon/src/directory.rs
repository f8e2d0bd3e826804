//! The directory: which blocks exist, what they follow, and in which tiers they are. Pure data.
//!
//! **Invariants** (checked by `Directory::self_check` in tests)
//! - A key is in `blocks` exactly while the block is in at least one tier.
//! - `children[parent]` lists exactly the known blocks with that parent: the full ones, and the partial
//!   ones that make open children ("Tail blocks").
//! - A partial block never has children: its key is nobody's parent.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use kv_protocol::message::KeyList;
use kv_protocol::{BlockHeader, BlockKey, FrameIndex, MissReason, NumericsTag, RootKey, Variant};

use crate::key_map::KeyMap;
use crate::policy::{Known, QueueTicket};

/// Blocks whose leaving is remembered, to name the reason of a later miss.
const GONE_MAX: usize = 1 << 16;
/// Open children offered for a chain whose next tokens only the runtime knows.
const CANDIDATES_MAX: usize = 4;
/// Children of one parent that are looked at: a popular prefix may have thousands.
const CHILDREN_SCANNED_MAX: usize = 256;

/// Where a block stands with the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDisk {
    /// Not there.
    Absent,
    /// A write is under way.
    Writing,
    /// There; the order of its write.
    Stored {
        /// Grows with each write.
        order: u64,
    },
}

/// A known block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The full block before, or the root.
    pub parent: BlockKey,
    /// Model and tenant.
    pub root: RootKey,
    /// Ids of its tokens.
    pub tokens: Arc<[u32]>,
    /// How it was computed.
    pub variant: Variant,
    /// With which arithmetic.
    pub numerics: NumericsTag,
    /// Whether all token places are taken.
    pub is_full: bool,
    /// Blocks before it, as far as they were known when it came.
    pub depth: u32,
    /// Last commit, lookup or promote; Unix milliseconds.
    pub used_ms: u64,
    /// Order of arrival in the host tier.
    pub arrival: u64,
    /// Its frame, if it is in the host tier.
    pub host: Option<FrameIndex>,
    /// Where it stands with the disk.
    pub disk: OnDisk,
    /// A hint brought it from disk, and no lookup has found it since. The first one that does is told
    /// `Disk`: that is where its turn's KV was kept, however early the hint was.
    pub hinted: bool,
}

impl Block {
    /// A block as its header describes it, in no tier yet.
    pub fn new(header: &BlockHeader, is_full: bool) -> Self {
        Self {
            parent: header.parent,
            root: header.root,
            tokens: header.tokens.as_slice().into(),
            variant: header.variant,
            numerics: header.numerics,
            is_full,
            depth: 0,
            used_ms: header.created_ms,
            arrival: 0,
            host: None,
            disk: OnDisk::Absent,
            hinted: false,
        }
    }

    /// Whether it is on disk.
    pub fn is_stored(&self) -> bool {
        matches!(self.disk, OnDisk::Stored { .. })
    }

    /// What policies may know of it.
    pub fn known(&self, turn: Option<QueueTicket>) -> Known {
        let Block { used_ms, arrival, depth, .. } = *self;
        Known { used_ms, arrival, depth, turn, returns_ms: None }
    }

    /// Whether two blocks may stand for each other.
    pub fn has_labels_of(&self, other: &Block) -> bool {
        self.root == other.root && self.variant == other.variant && self.numerics == other.numerics
    }
}

/// Part of a chain: place and name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// In blocks from the chain's start.
    pub index: u32,
    /// Name.
    pub key: BlockKey,
}

/// What a lookup found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chain {
    /// The longest known prefix, then open children of its last block (all with the same index).
    pub links: Vec<Link>,
    /// Why the prefix ends before the list does.
    pub miss: Option<MissReason>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Directory {
    blocks: KeyMap<Block>,
    children: KeyMap<Vec<BlockKey>>,
    gone: HashMap<u64, MissReason>,
    gone_order: VecDeque<u64>,
    changed: Vec<BlockKey>,
}

impl Directory {
    /// Known blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// A block.
    pub fn get(&self, key: &BlockKey) -> Option<&Block> {
        self.blocks.get(key)
    }

    /// A block, to change its tiers or its use.
    pub fn get_mut(&mut self, key: &BlockKey) -> Option<&mut Block> {
        self.changed.push(*key);
        self.blocks.get_mut(key)
    }

    /// Blocks that came, went or changed since the last call.
    pub fn take_changed(&mut self) -> Vec<BlockKey> {
        std::mem::take(&mut self.changed)
    }

    /// All blocks.
    pub fn iter(&self) -> impl Iterator<Item = (&BlockKey, &Block)> {
        self.blocks.iter()
    }

    /// Adds a block, which must be unknown and in at least one tier.
    pub fn insert(&mut self, key: BlockKey, mut block: Block) {
        assert!(!self.blocks.contains_key(&key), "block {key} is known already");
        block.depth = self.blocks.get(&block.parent).map_or(0, |parent| parent.depth + 1);
        self.children.entry(block.parent).or_default().push(key);
        self.gone.remove(&key.short());
        self.changed.push(key);
        self.blocks.insert(key, block);
    }

    /// Forgets a block, and remembers why.
    pub fn remove(&mut self, key: &BlockKey, reason: MissReason) -> Option<Block> {
        let block = self.blocks.remove(key)?;
        self.changed.push(*key);
        if let Some(siblings) = self.children.get_mut(&block.parent) {
            siblings.retain(|sibling| sibling != key);
            if siblings.is_empty() {
                self.children.remove(&block.parent);
            }
        }
        if self.gone.insert(key.short(), reason).is_none() {
            self.gone_order.push_back(key.short());
        }
        while self.gone_order.len() > GONE_MAX {
            if let Some(oldest) = self.gone_order.pop_front() {
                self.gone.remove(&oldest);
            }
        }
        Some(block)
    }

    /// Partial siblings that `tokens` continue: a block that grew past its tail replaces the tail.
    pub fn outgrown(&self, key: &BlockKey) -> Vec<BlockKey> {
        let Some(block) = self.blocks.get(key) else { return Vec::new() };
        let is_outgrown = |sibling: &&BlockKey| {
            self.blocks.get(sibling).is_some_and(|tail| {
                !tail.is_full
                    && tail.tokens.len() < block.tokens.len()
                    && block.tokens.starts_with(&tail.tokens)
                    && tail.has_labels_of(block)
            })
        };
        self.children_of(&block.parent).filter(is_outgrown).copied().collect()
    }

    fn children_of(&self, parent: &BlockKey) -> impl Iterator<Item = &BlockKey> {
        self.children.get(parent).into_iter().flatten().rev().take(CHILDREN_SCANNED_MAX)
    }

    /// The longest known prefix of a list that its reader takes.
    pub fn lookup(&self, list: &KeyList) -> Chain {
        let mut chain = Chain::default();
        let mut parent = list.root.as_parent();
        for key in &list.keys {
            match self.blocks.get(key) {
                Some(block) if block.root != list.root => {
                    chain.miss = Some(MissReason::Fingerprint);
                }
                Some(block) if !list.accept.takes(&block.variant, &block.numerics) => {
                    chain.miss = Some(MissReason::Variant);
                }
                Some(_) => {
                    chain.links.push(Link { index: chain.links.len() as u32, key: *key });
                    parent = *key;
                    continue;
                }
                None => chain.miss = Some(self.why_gone(key, &parent, list)),
            }
            break;
        }
        let index = chain.links.len() as u32;
        let takes = |key: &BlockKey| {
            self.blocks.get(key).filter(|block| {
                block.root == list.root && list.accept.takes(&block.variant, &block.numerics)
            })
        };
        if index as usize == list.keys.len() {
            // The tail's tokens are known here: the child that shares most of them.
            let shared = |key: &BlockKey| {
                takes(key).map_or(0, |block| {
                    block.tokens.iter().zip(&list.tail).take_while(|(a, b)| a == b).count()
                })
            };
            let best = self.children_of(&parent).map(|key| (shared(key), key)).max_by_key(|c| c.0);
            if let Some((1.., key)) = best {
                chain.links.push(Link { index, key: *key });
            }
        } else if chain.miss != Some(MissReason::Variant) {
            // Only the runtime knows the next tokens: it compares. Blocks in frames first.
            let mut open: Vec<(&BlockKey, &Block)> =
                self.children_of(&parent).filter_map(|key| Some((key, takes(key)?))).collect();
            open.sort_by_key(|(_, block)| (block.is_full, std::cmp::Reverse(block.used_ms)));
            let any_in_host = open.iter().any(|(_, block)| block.host.is_some());
            open.retain(|(_, block)| !any_in_host || block.host.is_some());
            let offered = open.iter().take(CANDIDATES_MAX);
            chain.links.extend(offered.map(|(key, _)| Link { index, key: **key }));
        }
        chain
    }

    fn why_gone(&self, key: &BlockKey, parent: &BlockKey, list: &KeyList) -> MissReason {
        // Under the root every other conversation is a sibling: that is no divergence.
        let has_siblings = *parent != list.root.as_parent() && self.children.contains_key(parent);
        match self.gone.get(&key.short()) {
            Some(reason) => *reason,
            None if has_siblings => MissReason::Diverged,
            None => MissReason::NeverStored,
        }
    }

    /// Panics where an invariant of the module does not hold.
    #[cfg(test)]
    pub fn self_check(&self) {
        for (key, block) in &self.blocks {
            assert!(block.host.is_some() || block.disk != OnDisk::Absent, "{key} is nowhere");
            assert!(self.children[&block.parent].contains(key), "{key} is not its parent's child");
        }
        let listed: usize = self.children.values().map(Vec::len).sum();
        assert_eq!(listed, self.blocks.len(), "a child is listed twice, or is unknown");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_protocol::{Accept, Fingerprint, Generation};
    use proptest::prelude::*;

    const TOKENS_PER_BLOCK: u16 = 4;

    fn root() -> RootKey {
        RootKey::new(&Fingerprint([1; 32]), b"")
    }

    fn own() -> Accept {
        Accept::Own { variant: Variant::Exact, numerics: NumericsTag::of("test") }
    }

    fn list(tokens: &[u32], accept: Accept) -> KeyList {
        let keys = root().chain(tokens, TOKENS_PER_BLOCK);
        let tail = tokens[keys.len() * usize::from(TOKENS_PER_BLOCK)..].to_vec();
        KeyList { root: root(), accept, keys, tail }
    }

    /// Stores a conversation as the runtime does: full blocks, then a tail.
    fn store(directory: &mut Directory, tokens: &[u32], variant: Variant) {
        let mut parent = root().as_parent();
        for part in tokens.chunks(usize::from(TOKENS_PER_BLOCK)) {
            let key = BlockKey::child(&parent, part);
            let header = BlockHeader {
                key,
                parent,
                root: root(),
                variant,
                numerics: NumericsTag::of("test"),
                generation: Generation(1),
                created_ms: 1,
                tokens: part.to_vec(),
                checksums: vec![],
            };
            let mut block = Block::new(&header, part.len() == usize::from(TOKENS_PER_BLOCK));
            block.host = Some(FrameIndex(directory.len() as u32));
            if directory.get(&key).is_none() {
                directory.insert(key, block);
                for tail in directory.outgrown(&key) {
                    directory.remove(&tail, MissReason::Evicted);
                }
            }
            parent = key;
        }
    }

    #[test]
    fn a_conversation_is_found_with_its_tail() {
        let mut directory = Directory::default();
        store(&mut directory, &[1, 2, 3, 4, 5, 6], Variant::Exact);
        let chain = directory.lookup(&list(&[1, 2, 3, 4, 5, 6, 7], own()));
        assert_eq!(chain.links.iter().map(|link| link.index).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(chain.miss, None);
    }

    #[test]
    fn a_tail_is_offered_when_the_conversation_has_grown_by_whole_blocks() {
        let mut directory = Directory::default();
        store(&mut directory, &[1, 2, 3, 4, 5, 6], Variant::Exact);
        let grown: Vec<u32> = (1..=15).collect();
        let chain = directory.lookup(&list(&grown, own()));
        assert_eq!(chain.links.iter().map(|link| link.index).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(chain.miss, Some(MissReason::Diverged));
    }

    #[test]
    fn a_block_that_grew_past_its_tail_replaces_it() {
        let mut directory = Directory::default();
        store(&mut directory, &[1, 2, 3, 4, 5, 6], Variant::Exact);
        store(&mut directory, &[1, 2, 3, 4, 5, 6, 7], Variant::Exact);
        assert_eq!(directory.len(), 2);
        store(&mut directory, &[1, 2, 3, 4, 5, 6, 7, 8], Variant::Exact);
        assert_eq!(directory.len(), 2);
        directory.self_check();
    }

    #[test]
    fn own_readers_do_not_see_another_variant() {
        let mut directory = Directory::default();
        store(&mut directory, &[1, 2, 3, 4, 5], Variant::Mixed);
        let chain = directory.lookup(&list(&[1, 2, 3, 4, 5], own()));
        assert_eq!((chain.links.len(), chain.miss), (0, Some(MissReason::Variant)));
        assert_eq!(directory.lookup(&list(&[1, 2, 3, 4, 5], Accept::Any)).links.len(), 2);
    }

    #[test]
    fn misses_say_why() {
        let mut directory = Directory::default();
        let tokens: Vec<u32> = (0..12).collect();
        let miss = |directory: &Directory| directory.lookup(&list(&tokens, own())).miss;
        assert_eq!(miss(&directory), Some(MissReason::NeverStored));
        store(&mut directory, &tokens, Variant::Exact);
        assert_eq!(miss(&directory), None);
        let last = root().chain(&tokens, TOKENS_PER_BLOCK)[2];
        directory.remove(&last, MissReason::Expired);
        assert_eq!(miss(&directory), Some(MissReason::Expired));
    }

    proptest! {
        /// Oracle: the longest common prefix with any stored conversation, in whole blocks.
        #[test]
        fn a_lookup_finds_the_longest_stored_prefix(
            stored in proptest::collection::vec(proptest::collection::vec(0u32..2, 1..14), 0..8),
            asked in proptest::collection::vec(0u32..2, 1..14),
            removed in proptest::collection::vec(any::<prop::sample::Index>(), 0..3),
        ) {
            let mut directory = Directory::default();
            for tokens in &stored {
                store(&mut directory, tokens, Variant::Exact);
                directory.self_check();
            }
            for index in removed {
                let mut keys: Vec<BlockKey> = directory.iter().map(|(key, _)| *key).collect();
                keys.sort_unstable();
                if !keys.is_empty() {
                    directory.remove(index.get(&keys), MissReason::Evicted);
                    directory.self_check();
                }
            }
            let list = list(&asked, own());
            let expected = list.keys.iter().take_while(|key| directory.get(key).is_some()).count();
            let chain = directory.lookup(&list);
            let whole = chain.links.iter().filter(|link| list.keys.contains(&link.key)).count();
            prop_assert_eq!(whole, expected);
            if expected == list.keys.len() {
                for link in &chain.links[whole..] {
                    prop_assert_eq!(directory.get(&link.key).unwrap().tokens[0], list.tail[0]);
                }
            }
        }
    }
}
