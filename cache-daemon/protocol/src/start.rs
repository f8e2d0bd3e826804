//! Where a chain's blocks hang: under its tenant's root; for a prompt that begins as one that the operator
//! declared as shared, first under the model's public root; for a truncated history, in runs.
//!
//! ```text
//! public root ──► block 0 ─► … ─► block n-1 ┐   every tenant's: the declared prompt and nothing else
//!                                           └ event Private(root) ──► block n ─► …   one tenant's
//!
//! root ──► block 0 ┐   ┌ key of a dropped block ──► block 1 ─► block 2 ┐   ┌ event Truncated ──► block 3 ─► …
//! ```
//!
//! The private part hangs under an event that hashes the tenant's root, so that two tenants with the same
//! prompt meet in the first `n` blocks and never again. The blocks that a truncation kept have their names
//! still, for their KV is what it was; what is computed behind them has other KV than it would have with
//! what was dropped, so it hangs under an event.

use std::sync::Arc;

use crate::key::{BlockKey, Event, RootKey};

/// Runs of a history: one that is truncated again and again loses old runs with their blocks.
pub const RUNS_MAX: usize = 64;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// Model and tenant.
    pub root: RootKey,
    /// What comes before the tenant's own blocks.
    pub shared: Option<Shared>,
    /// All runs of a truncated history, ascending, the first at block 0; none where nothing was dropped.
    pub runs: Arc<[Run]>,
}

/// Leading blocks that are every tenant's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shared {
    /// The model's public root.
    pub root: RootKey,
    /// At least one.
    pub blocks: u32,
}

/// Consecutive blocks of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// What the run's first block follows: the root, a block that was dropped, or an event.
    pub parent: BlockKey,
    /// Place of that block in the history, in blocks.
    pub first_block: u32,
}

impl From<RootKey> for Start {
    fn from(root: RootKey) -> Self {
        Self { root, shared: None, runs: Arc::default() }
    }
}

impl Start {
    /// Blocks that are every tenant's.
    pub fn shared_blocks(&self) -> usize {
        self.shared.map_or(0, |shared| shared.blocks as usize)
    }

    /// Blocks that truncations kept: those before the last event. Computed anew they would be others, since
    /// what they followed is gone; a reader that does not find them all cannot use any behind the first gap.
    pub fn kept_blocks(&self) -> usize {
        self.runs.last().map_or(0, |run| run.first_block as usize)
    }

    /// Under which root the block at `index` is stored.
    pub fn root_of(&self, index: usize) -> RootKey {
        match self.shared {
            Some(shared) if index < shared.blocks as usize => shared.root,
            _ => self.root,
        }
    }

    /// What the block at `index` follows, given the keys before it.
    pub fn parent_of(&self, index: usize, keys: &[BlockKey]) -> BlockKey {
        let run = self.runs.binary_search_by_key(&index, |run| run.first_block as usize);
        match (run, index.checked_sub(1)) {
            (Ok(run), _) => self.runs[run].parent,
            (Err(_), None) => self.root_of(0).as_parent(),
            (Err(_), Some(before)) if index == self.shared_blocks() => {
                self.private_parent(&keys[before])
            }
            (Err(_), Some(before)) => keys[before],
        }
    }

    /// Places of blocks that follow something else than the block before them; ascending, the first is 0.
    pub fn breaks(&self) -> Vec<u32> {
        let mut places = vec![0];
        places.extend(self.shared.map(|shared| shared.blocks));
        places.extend(self.runs.iter().map(|run| run.first_block));
        places.sort_unstable();
        places.dedup();
        places
    }

    /// The run that begins at `place`, given the keys before it.
    pub fn run_at(&self, place: u32, keys: &[BlockKey]) -> Run {
        Run { parent: self.parent_of(place as usize, keys), first_block: place }
    }

    /// What the first private block follows, behind the last shared one.
    pub fn private_parent(&self, shared: &BlockKey) -> BlockKey {
        BlockKey::after(shared, &Event::Private { root: self.root })
    }

    /// Keys of the full blocks of `tokens`; what is left over is the tail.
    pub fn chain(&self, tokens: &[u32], tokens_per_block: u16) -> Vec<BlockKey> {
        let blocks = tokens.chunks_exact(usize::from(tokens_per_block));
        let mut keys = Vec::with_capacity(blocks.len());
        for block in blocks {
            keys.push(BlockKey::child(&self.parent_of(keys.len(), &keys), block));
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Fingerprint;
    use proptest::prelude::*;

    fn root(salt: &[u8]) -> RootKey {
        RootKey::new(&Fingerprint([7; 32]), salt)
    }

    fn start(salt: &[u8], blocks: u32) -> Start {
        let shared = (blocks > 0).then(|| Shared { root: root(b""), blocks });
        Start { shared, ..root(salt).into() }
    }

    proptest! {
        /// Two tenants with one text meet in the shared blocks, which are the public tenant's, and never
        /// again; whatever the text and wherever it ends.
        #[test]
        fn two_tenants_share_exactly_the_declared_blocks(
            tokens in proptest::collection::vec(0u32..3, 4..40),
            blocks in 0u32..6,
        ) {
            let blocks = blocks.min(tokens.len() as u32 / 4);
            let ours = start(b"a", blocks).chain(&tokens, 4);
            let theirs = start(b"b", blocks).chain(&tokens, 4);
            let public = root(b"").chain(&tokens, 4);
            let (shared, own) = ours.split_at(blocks as usize);
            prop_assert_eq!(shared, &theirs[..blocks as usize]);
            prop_assert_eq!(shared, &public[..blocks as usize]);
            for key in own {
                prop_assert!(!theirs.contains(key) && !public.contains(key));
            }
        }

        #[test]
        fn without_a_shared_prompt_a_chain_is_its_roots(
            tokens in proptest::collection::vec(0u32..3, 0..40),
        ) {
            let plain = root(b"a").chain(&tokens, 4);
            prop_assert_eq!(Start::from(root(b"a")).chain(&tokens, 4), plain);
        }
    }
}
