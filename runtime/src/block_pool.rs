//! Device blocks: who holds them, what they contain, and which is taken next.
//!
//! ```text
//!            take                       seal / open_tail            release (last holder)
//! free, blank ────► held, blank ────────────────────────► held, named ────────────────► free, named
//!      ▲                 │ release            reuse_prefix (any number of holders) ◄──────────┤
//!      └─────────────────┴────────────── reuse_tail (one holder, blank again) ◄───────────────┤
//!                                        take, when it is the one longest free ◄──────────────┘
//! ```
//!
//! A freed block keeps its name until it is taken for something else, so that device memory is a cache
//! of its own: the longest free block goes first. All operations are O(1), lookups O(blocks found).
//!
//! **Invariants** ([`BlockPool::self_check`])
//! - A block is in the free list exactly when nobody holds it.
//! - The indexes name exactly the blocks that carry that name.
//! - A sequence writes only into blank blocks that it alone holds: naming a block freezes it.

use std::collections::HashMap;
use std::sync::Arc;

use kv_protocol::BlockKey;

use crate::batch::BlockId;

/// How the KV of a block came to be, seen from this engine's prefill set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// As this engine's prefill computes it, and so was everything before it.
    Own,
    /// Something in it, or before it, was computed under another skip set.
    Mixed,
}

/// What a block is known to contain.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    /// Nothing that may be found: fresh, or being written.
    Blank,
    /// All tokens of the block that this key names.
    Full { key: BlockKey, origin: Origin },
    /// The first tokens of a block that follows `parent`; an *open child* of it.
    Tail { parent: BlockKey, tokens: Arc<[u32]>, origin: Origin },
}

#[derive(Debug)]
struct Block {
    holders: u32,
    content: Content,
    /// The attachment under which a frame with this content was last known to exist.
    stored: Option<u64>,
    /// Neighbours in the free list; read only while the block is in it.
    previous: Option<BlockId>,
    next: Option<BlockId>,
}

/// A tail taken over by [`BlockPool::reuse_tail`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReusedTail {
    /// Held by the caller alone, and blank again.
    pub block: BlockId,
    /// Leading tokens of it that hold the KV asked for.
    pub tokens: u32,
    /// How they were computed.
    pub origin: Origin,
}

/// The blocks of one backend. See the module's drawing.
#[derive(Debug)]
pub struct BlockPool {
    tokens_per_block: u32,
    blocks: Vec<Block>,
    full: HashMap<BlockKey, BlockId>,
    tails: HashMap<BlockKey, Vec<BlockId>>,
    /// Longest free, and taken first.
    free_first: Option<BlockId>,
    free_last: Option<BlockId>,
    free_count: u32,
}

impl BlockPool {
    /// All blocks free and blank.
    pub fn new(block_count: u32, tokens_per_block: u16) -> Self {
        let mut pool = Self {
            tokens_per_block: u32::from(tokens_per_block),
            blocks: (0..block_count)
                .map(|_| Block {
                    holders: 0,
                    content: Content::Blank,
                    stored: None,
                    previous: None,
                    next: None,
                })
                .collect(),
            full: HashMap::new(),
            tails: HashMap::new(),
            free_first: None,
            free_last: None,
            free_count: 0,
        };
        for index in 0..block_count {
            pool.push_last(BlockId(index));
        }
        pool
    }

    /// Tokens that a block holds.
    pub fn tokens_per_block(&self) -> u32 {
        self.tokens_per_block
    }

    /// Blocks of the pool.
    pub fn block_count(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Blocks that nobody holds.
    pub fn free_count(&self) -> u32 {
        self.free_count
    }

    /// Blocks needed for `tokens` tokens.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.tokens_per_block)
    }

    /// The block that was free for longest, blank, held by the caller; `None` when all are held.
    pub fn take(&mut self) -> Option<BlockId> {
        let id = self.free_first?;
        self.unlink(id);
        self.forget(id);
        self.block_mut(id).holders = 1;
        Some(id)
    }

    /// One holder more.
    pub fn retain(&mut self, id: BlockId) {
        if self.block(id).holders == 0 {
            self.unlink(id);
        }
        self.block_mut(id).holders += 1;
    }

    /// One holder less. The last one frees the block: a blank one is taken next, a named one last.
    pub fn release(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        assert!(block.holders > 0, "block {id:?} released more often than held");
        block.holders -= 1;
        if block.holders > 0 {
            return;
        }
        if block.content == Content::Blank { self.push_first(id) } else { self.push_last(id) }
    }

    /// Releases the blocks of a table, the last first, so that a prefix outlives what follows it.
    pub fn release_table(&mut self, table: &[BlockId]) {
        for &id in table.iter().rev() {
            self.release(id);
        }
    }

    /// Holders of a block.
    pub fn holders(&self, id: BlockId) -> u32 {
        self.block(id).holders
    }

    /// Whether the caller, holding `id`, may write into it.
    pub fn is_writable(&self, id: BlockId) -> bool {
        self.block(id).holders == 1 && self.block(id).content == Content::Blank
    }

    /// Names a full block, from now on to be found and never written. When another block has the
    /// name already, the one of [`Origin::Own`] keeps it.
    pub fn seal(&mut self, id: BlockId, key: BlockKey, origin: Origin) {
        if let Some(&other) = self.full.get(&key) {
            let keeps =
                matches!(self.block(other).content, Content::Full { origin: Origin::Own, .. });
            if other == id || keeps || origin == Origin::Mixed {
                return;
            }
            self.forget(other);
        }
        self.forget(id);
        self.block_mut(id).content = Content::Full { key, origin };
        self.full.insert(key, id);
    }

    /// Names a block by its first `tokens`, which follow the block `parent`.
    pub fn open_tail(&mut self, id: BlockId, parent: BlockKey, tokens: Arc<[u32]>, origin: Origin) {
        assert!(
            !tokens.is_empty() && (tokens.len() as u32) < self.tokens_per_block,
            "a tail is neither empty nor full"
        );
        self.forget(id);
        self.block_mut(id).content = Content::Tail { parent, tokens, origin };
        self.tails.entry(parent).or_default().push(id);
    }

    /// The blocks of the longest known prefix of `keys`, each held once more by the caller.
    pub fn reuse_prefix(&mut self, keys: &[BlockKey]) -> Vec<(BlockId, Origin)> {
        let mut found = Vec::new();
        for key in keys {
            let Some(&id) = self.full.get(key) else { break };
            let Content::Full { origin, .. } = self.block(id).content else { break };
            self.retain(id);
            found.push((id, origin));
        }
        found
    }

    /// Blocks that [`Self::reuse_prefix`] would find.
    pub fn prefix_len(&self, keys: &[BlockKey]) -> usize {
        keys.iter().take_while(|key| self.full.contains_key(*key)).count()
    }

    /// How many leading ones of `tokens` the best free open child of `parent` holds.
    pub fn tail_len(&self, parent: &BlockKey, tokens: &[u32]) -> u32 {
        self.best_tail(parent, tokens).map_or(0, |(_, common)| common)
    }

    /// Takes over the open child of `parent` that shares the most leading tokens with `tokens`. Only
    /// a free one: what others hold cannot be written, and nothing copies on the device.
    pub fn reuse_tail(&mut self, parent: &BlockKey, tokens: &[u32]) -> Option<ReusedTail> {
        let (block, common) = self.best_tail(parent, tokens)?;
        let Content::Tail { origin, .. } = self.block(block).content else { return None };
        self.unlink(block);
        self.forget(block);
        self.block_mut(block).holders = 1;
        Some(ReusedTail { block, tokens: common, origin })
    }

    /// Forgets all names. What sequences hold stays theirs, but is found no more. Returns how many
    /// blocks had one.
    pub fn forget_all(&mut self) -> u32 {
        let mut forgotten = 0;
        for index in 0..self.block_count() {
            let id = BlockId(index);
            if self.block(id).content != Content::Blank {
                self.forget(id);
                forgotten += 1;
            }
        }
        forgotten
    }

    /// Notes that a frame of attachment `attachment` holds this block's content too.
    pub fn set_stored(&mut self, id: BlockId, attachment: u64) {
        self.block_mut(id).stored = Some(attachment);
    }

    /// Whether a frame of attachment `attachment` is known to hold this block's content.
    pub fn is_stored(&self, id: BlockId, attachment: u64) -> bool {
        self.block(id).stored == Some(attachment)
    }

    /// Panics when an invariant of the module does not hold. For tests.
    pub fn self_check(&self) {
        let mut seen = 0;
        let mut previous = None;
        let mut at = self.free_first;
        while let Some(id) = at {
            assert_eq!(self.block(id).holders, 0, "{id:?} is free and held");
            assert_eq!(self.block(id).previous, previous, "{id:?} has another predecessor");
            previous = at;
            at = self.block(id).next;
            seen += 1;
            assert!(seen <= self.block_count(), "the free list runs in a circle");
        }
        assert_eq!(self.free_last, previous);
        assert_eq!(seen, self.free_count);
        let held = self.blocks.iter().filter(|block| block.holders > 0).count() as u32;
        assert_eq!(held + self.free_count, self.block_count());
        for (key, &id) in &self.full {
            assert!(
                matches!(&self.block(id).content, Content::Full { key: own, .. } if own == key),
                "{id:?} does not carry {key}"
            );
        }
        for (parent, children) in &self.tails {
            assert!(!children.is_empty(), "{parent} has an empty list of open children");
            for &id in children {
                assert!(
                    matches!(&self.block(id).content, Content::Tail { parent: own, .. } if own == parent),
                    "{id:?} is no open child of {parent}"
                );
            }
        }
        let named = self.blocks.iter().filter(|block| block.content != Content::Blank).count();
        let indexed = self.full.len() + self.tails.values().map(Vec::len).sum::<usize>();
        assert_eq!(named, indexed);
    }

    fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id.0 as usize]
    }

    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.0 as usize]
    }

    fn best_tail(&self, parent: &BlockKey, tokens: &[u32]) -> Option<(BlockId, u32)> {
        let children = self.tails.get(parent)?;
        children
            .iter()
            .filter(|&&id| self.block(id).holders == 0)
            .map(|&id| {
                let Content::Tail { tokens: held, .. } = &self.block(id).content else {
                    return (id, 0);
                };
                let common = held.iter().zip(tokens).take_while(|(a, b)| a == b).count();
                (id, common as u32)
            })
            .filter(|&(_, common)| common > 0)
            .max_by_key(|&(_, common)| common)
    }

    /// Drops a block's name from the index and from the block.
    fn forget(&mut self, id: BlockId) {
        let content = std::mem::replace(&mut self.block_mut(id).content, Content::Blank);
        self.block_mut(id).stored = None;
        match content {
            Content::Blank => {}
            Content::Full { key, .. } => {
                self.full.remove(&key);
            }
            Content::Tail { parent, .. } => {
                let children = self.tails.get_mut(&parent).expect("self_check: tails are indexed");
                children.retain(|&child| child != id);
                if children.is_empty() {
                    self.tails.remove(&parent);
                }
            }
        }
    }

    fn unlink(&mut self, id: BlockId) {
        let (previous, next) = (self.block(id).previous, self.block(id).next);
        match previous {
            Some(previous) => self.block_mut(previous).next = next,
            None => self.free_first = next,
        }
        match next {
            Some(next) => self.block_mut(next).previous = previous,
            None => self.free_last = previous,
        }
        let block = self.block_mut(id);
        block.previous = None;
        block.next = None;
        self.free_count -= 1;
    }

    fn push_last(&mut self, id: BlockId) {
        let last = self.free_last.replace(id);
        match last {
            Some(last) => self.block_mut(last).next = Some(id),
            None => self.free_first = Some(id),
        }
        self.block_mut(id).previous = last;
        self.free_count += 1;
    }

    fn push_first(&mut self, id: BlockId) {
        let first = self.free_first.replace(id);
        match first {
            Some(first) => self.block_mut(first).previous = Some(id),
            None => self.free_last = Some(id),
        }
        self.block_mut(id).next = first;
        self.free_count += 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOKENS: u16 = 4;

    fn key(name: u8) -> BlockKey {
        BlockKey([name; 32])
    }

    #[test]
    fn a_freed_block_is_found_until_it_is_taken_for_something_else() {
        let mut pool = BlockPool::new(2, TOKENS);
        let block = pool.take().unwrap();
        pool.seal(block, key(1), Origin::Own);
        pool.release(block);
        assert_eq!(pool.reuse_prefix(&[key(1)]), [(block, Origin::Own)]);
        pool.release(block);
        // The blank block goes first, then the named one: now its name is gone.
        pool.take().unwrap();
        assert_eq!(pool.take(), Some(block));
        assert_eq!(pool.prefix_len(&[key(1)]), 0);
        assert_eq!(pool.take(), None);
    }

    #[test]
    fn the_block_that_was_free_for_longest_goes_first_and_a_prefix_outlives_its_end() {
        let mut pool = BlockPool::new(3, TOKENS);
        let table: Vec<BlockId> = (1..=3)
            .map(|name| {
                let block = pool.take().unwrap();
                pool.seal(block, key(name), Origin::Own);
                block
            })
            .collect();
        pool.release_table(&table);
        assert_eq!(pool.take(), Some(table[2]));
        assert_eq!(pool.prefix_len(&[key(1), key(2), key(3)]), 2);
    }

    #[test]
    fn a_gap_ends_a_prefix() {
        let mut pool = BlockPool::new(2, TOKENS);
        let block = pool.take().unwrap();
        pool.seal(block, key(2), Origin::Own);
        assert_eq!(pool.prefix_len(&[key(1), key(2)]), 0);
    }

    #[test]
    fn a_tail_is_taken_over_by_one_and_only_while_nobody_holds_it() {
        let mut pool = BlockPool::new(2, TOKENS);
        let block = pool.take().unwrap();
        pool.open_tail(block, key(1), Arc::from([7, 8, 9]), Origin::Own);
        assert_eq!(pool.reuse_tail(&key(1), &[7, 8]), None);
        pool.release(block);
        assert_eq!(pool.tail_len(&key(1), &[7, 8, 5]), 2);
        let tail = pool.reuse_tail(&key(1), &[7, 8, 5]).unwrap();
        assert_eq!((tail.block, tail.tokens), (block, 2));
        assert!(pool.is_writable(block));
        assert_eq!(pool.reuse_tail(&key(1), &[7, 8]), None);
        pool.self_check();
    }

    #[test]
    fn a_tail_with_other_tokens_is_not_taken() {
        let mut pool = BlockPool::new(1, TOKENS);
        let block = pool.take().unwrap();
        pool.open_tail(block, key(1), Arc::from([7]), Origin::Own);
        pool.release(block);
        assert_eq!(pool.reuse_tail(&key(1), &[8]), None);
        assert_eq!(pool.reuse_tail(&key(2), &[7]), None);
    }

    #[test]
    fn a_block_computed_as_prefill_does_replaces_a_mixed_one_of_the_same_name() {
        let mut pool = BlockPool::new(2, TOKENS);
        let (mixed, own) = (pool.take().unwrap(), pool.take().unwrap());
        pool.seal(mixed, key(1), Origin::Mixed);
        pool.seal(own, key(1), Origin::Own);
        assert_eq!(pool.reuse_prefix(&[key(1)]), [(own, Origin::Own)]);
        pool.self_check();
    }

    #[test]
    fn a_forgotten_block_stays_with_its_holder() {
        let mut pool = BlockPool::new(1, TOKENS);
        let block = pool.take().unwrap();
        pool.seal(block, key(1), Origin::Own);
        assert_eq!(pool.forget_all(), 1);
        assert_eq!(pool.holders(block), 1);
        assert_eq!(pool.prefix_len(&[key(1)]), 0);
        pool.self_check();
    }

    /// What the pool is checked against: no lists, no indexes, everything searched.
    #[derive(Default)]
    struct Oracle {
        blocks: HashMap<u32, (u32, Content)>,
    }

    impl Oracle {
        fn prefix(&self, keys: &[BlockKey]) -> usize {
            let known = |wanted: &BlockKey| {
                self.blocks.values().any(
                    |(_, content)| matches!(content, Content::Full { key, .. } if key == wanted),
                )
            };
            keys.iter().take_while(|key| known(key)).count()
        }

        fn tail(&self, wanted: &BlockKey, tokens: &[u32]) -> usize {
            let common = |held: &[u32]| held.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            self.blocks
                .values()
                .filter_map(|(holders, content)| match content {
                    Content::Tail { parent, tokens, .. } if *holders == 0 && parent == wanted => {
                        Some(common(tokens))
                    }
                    _ => None,
                })
                .max()
                .unwrap_or(0)
        }
    }

    #[derive(Debug, Clone)]
    enum Operation {
        Take,
        Retain(usize),
        Release(usize),
        Seal(usize, u8, bool),
        OpenTail(usize, u8, Vec<u32>),
        ReusePrefix(Vec<u8>),
        ReuseTail(u8, Vec<u32>),
        ForgetAll,
    }

    fn operation() -> impl Strategy<Value = Operation> {
        let tokens = || prop::collection::vec(0..2_u32, 1..4);
        prop_oneof![
            4 => Just(Operation::Take),
            1 => any::<usize>().prop_map(Operation::Retain),
            4 => any::<usize>().prop_map(Operation::Release),
            3 => (any::<usize>(), 0..4_u8, any::<bool>())
                .prop_map(|(at, name, own)| Operation::Seal(at, name, own)),
            3 => (any::<usize>(), 0..4_u8, tokens())
                .prop_map(|(at, name, tokens)| Operation::OpenTail(at, name, tokens)),
            2 => prop::collection::vec(0..4_u8, 1..4).prop_map(Operation::ReusePrefix),
            2 => (0..4_u8, tokens()).prop_map(|(name, tokens)| Operation::ReuseTail(name, tokens)),
            1 => Just(Operation::ForgetAll),
        ]
    }

    proptest! {
        #[test]
        fn the_pool_agrees_with_a_search_through_all_blocks(
            operations in prop::collection::vec(operation(), 1..200),
        ) {
            let mut pool = BlockPool::new(6, TOKENS);
            let mut oracle = Oracle::default();
            // One entry a hold; an operation on "some held block" picks one of them.
            let mut held: Vec<BlockId> = Vec::new();
            for operation in operations {
                match operation {
                    Operation::Take => {
                        let free = 6 - oracle.blocks.values().filter(|(holders, _)| *holders > 0).count();
                        let taken = pool.take();
                        prop_assert_eq!(taken.is_some(), free > 0);
                        if let Some(id) = taken {
                            let before = oracle.blocks.insert(id.0, (1, Content::Blank));
                            prop_assert!(before.is_none_or(|(holders, _)| holders == 0));
                            held.push(id);
                        }
                    }
                    Operation::Retain(at) if !held.is_empty() => {
                        let id = held[at % held.len()];
                        pool.retain(id);
                        oracle.blocks.get_mut(&id.0).unwrap().0 += 1;
                        held.push(id);
                    }
                    Operation::Release(at) if !held.is_empty() => {
                        let id = held.swap_remove(at % held.len());
                        pool.release(id);
                        oracle.blocks.get_mut(&id.0).unwrap().0 -= 1;
                    }
                    Operation::Seal(at, name, own) if !held.is_empty() => {
                        let id = held[at % held.len()];
                        let origin = if own { Origin::Own } else { Origin::Mixed };
                        pool.seal(id, key(name), origin);
                        let other = oracle.blocks.iter().find_map(|(&other, (_, content))| match content {
                            Content::Full { key: named, origin } if *named == key(name) => {
                                Some((other, *origin))
                            }
                            _ => None,
                        });
                        match other {
                            Some((_, Origin::Own)) => {}
                            Some((_, Origin::Mixed)) if origin == Origin::Mixed => {}
                            Some((other, _)) if other == id.0 => {}
                            other => {
                                if let Some((other, _)) = other {
                                    oracle.blocks.get_mut(&other).unwrap().1 = Content::Blank;
                                }
                                oracle.blocks.get_mut(&id.0).unwrap().1 =
                                    Content::Full { key: key(name), origin };
                            }
                        }
                    }
                    Operation::OpenTail(at, name, tokens) if !held.is_empty() => {
                        let id = held[at % held.len()];
                        let tokens: Arc<[u32]> = tokens.into();
                        pool.open_tail(id, key(name), tokens.clone(), Origin::Own);
                        oracle.blocks.get_mut(&id.0).unwrap().1 =
                            Content::Tail { parent: key(name), tokens, origin: Origin::Own };
                    }
                    Operation::ReusePrefix(names) => {
                        let keys: Vec<BlockKey> = names.into_iter().map(key).collect();
                        let found = pool.reuse_prefix(&keys);
                        prop_assert_eq!(found.len(), oracle.prefix(&keys));
                        for (id, _) in found {
                            oracle.blocks.get_mut(&id.0).unwrap().0 += 1;
                            held.push(id);
                        }
                    }
                    Operation::ReuseTail(name, tokens) => {
                        let best = oracle.tail(&key(name), &tokens);
                        let reused = pool.reuse_tail(&key(name), &tokens);
                        prop_assert_eq!(reused.map_or(0, |tail| tail.tokens as usize), best);
                        if let Some(tail) = reused {
                            oracle.blocks.insert(tail.block.0, (1, Content::Blank));
                            held.push(tail.block);
                        }
                    }
                    Operation::ForgetAll => {
                        pool.forget_all();
                        for (_, content) in oracle.blocks.values_mut() {
                            *content = Content::Blank;
                        }
                    }
                    _ => {}
                }
                pool.self_check();
                for (&id, (holders, content)) in &oracle.blocks {
                    prop_assert_eq!(pool.holders(BlockId(id)), *holders);
                    prop_assert_eq!(&pool.block(BlockId(id)).content, content);
                }
            }
        }
    }
}
