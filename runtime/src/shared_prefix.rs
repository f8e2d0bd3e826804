//! Prompts that the operator declared as shared: their leading blocks are every tenant's.

use std::sync::Arc;

use kv_protocol::RootKey;
use kv_protocol::start::{Shared, Start};

/// Declared prompts as token ids. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SharedPrefixes {
    public: RootKey,
    prompts: Arc<[Vec<u32>]>,
    tokens_per_block: u32,
}

impl SharedPrefixes {
    /// Under the model's `public` root.
    pub fn new(public: RootKey, prompts: Vec<Vec<u32>>, tokens_per_block: u32) -> Self {
        Self { public, prompts: prompts.into(), tokens_per_block }
    }

    /// Where a tenant's chain for a prompt begins: of its blocks those are shared whose tokens, and all
    /// before them, are a declared prompt's.
    pub fn start(&self, root: RootKey, tokens: &[u32]) -> Start {
        let same = |prompt: &Vec<u32>| {
            prompt.iter().zip(tokens).take_while(|(declared, asked)| declared == asked).count()
        };
        let longest = self.prompts.iter().map(same).max().unwrap_or(0) as u32;
        let blocks = longest / self.tokens_per_block;
        // The public tenant's chain is the declared prompt's already.
        let is_split = blocks > 0 && root != self.public;
        let shared = is_split.then_some(Shared { root: self.public, blocks });
        Start { shared, ..root.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_protocol::Fingerprint;

    #[test]
    fn only_whole_blocks_of_a_declared_prompt_are_shared() {
        let root = |salt: &[u8]| RootKey::new(&Fingerprint([1; 32]), salt);
        let declared: Vec<u32> = (0..10).collect();
        let prefixes = SharedPrefixes::new(root(b""), vec![vec![9, 9], declared.clone()], 4);
        let blocks = |tokens: &[u32]| prefixes.start(root(b"tenant"), tokens).shared_blocks();
        assert_eq!(blocks(&declared), 2);
        assert_eq!(blocks(&[declared.as_slice(), &[1, 2, 3]].concat()), 2);
        assert_eq!(blocks(&declared[..7]), 1);
        let mut edited = declared.clone();
        edited[4] = 77;
        assert_eq!(blocks(&edited), 1);
        edited[0] = 77;
        assert_eq!(blocks(&edited), 0);
        assert_eq!(prefixes.start(root(b""), &declared).shared, None);
        let none = SharedPrefixes::new(root(b""), vec![], 4);
        assert_eq!(none.start(root(b"tenant"), &declared).shared, None);
    }
}
