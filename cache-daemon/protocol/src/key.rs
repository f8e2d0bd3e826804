//! Names of blocks: a BLAKE3 chain over everything that a block's K and V depend on.
//!
//! ```text
//! root  = H("root",  fingerprint ‖ salt)                    one a model and tenant
//! child = H("block", parent ‖ token count ‖ token ids)      parent is the root, a full block, or an event
//! after = H("event", parent ‖ kind ‖ its numbers)           a link without a block: [`Event`]
//! ```
//!
//! A key therefore says which model, which tenant and which tokens from position 0 on. Lookups compare
//! token ids all the same: a hash alone never vouches for content.

use std::fmt;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;

const ROOT_CONTEXT: &str = "colloquy 2026-09 kv root";
const BLOCK_CONTEXT: &str = "colloquy 2026-09 kv block";
const EVENT_CONTEXT: &str = "colloquy 2026-11 kv event";
const CONVERSATION_CONTEXT: &str = "colloquy 2026-09 conversation";

/// Digest of a model: weights, architecture, quantisation, dtype, layout.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; KEY_BYTES]);

/// Start of a chain: a model under one tenant's salt.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RootKey(pub [u8; KEY_BYTES]);

/// Name of a block, full or partial.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockKey(pub [u8; KEY_BYTES]);

impl Ord for BlockKey {
    /// By bytes. The first eight decide all but always, without a call of `memcmp`: the daemon sorts many keys.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let first = |key: &Self| {
            let mut word = [0; 8];
            word.copy_from_slice(&key.0[..8]);
            u64::from_be_bytes(word)
        };
        first(self).cmp(&first(other)).then_with(|| self.0.cmp(&other.0))
    }
}

impl PartialOrd for BlockKey {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// What happened to a history between two blocks: what follows has other KV than without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Tokens were taken out of the history.
    Truncated {
        /// Tokens kept at its start.
        sinks: u32,
        /// Tokens dropped behind them.
        dropped: u32,
    },
    /// The blocks before are every tenant's; from here on they are one tenant's.
    Private {
        /// The tenant's.
        root: RootKey,
    },
}

/// Name of a conversation: the client's own, salted with the tenant.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConversationId(pub [u8; KEY_BYTES]);

impl RootKey {
    /// Two salts, or two models, never share a block.
    pub fn new(fingerprint: &Fingerprint, salt: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
        hasher.update(&fingerprint.0);
        hasher.update(&(salt.len() as u64).to_le_bytes());
        hasher.update(salt);
        Self(*hasher.finalize().as_bytes())
    }

    /// The root in the place of a parent, for the first block of a chain.
    pub fn as_parent(&self) -> BlockKey {
        BlockKey(self.0)
    }

    /// Keys of the full blocks of `tokens`; what is left over (fewer than `tokens_per_block`) is the tail.
    pub fn chain(&self, tokens: &[u32], tokens_per_block: u16) -> Vec<BlockKey> {
        let mut parent = self.as_parent();
        tokens
            .chunks_exact(usize::from(tokens_per_block))
            .map(|block| {
                parent = BlockKey::child(&parent, block);
                parent
            })
            .collect()
    }
}

impl BlockKey {
    /// Key of the block that follows `parent` and holds `tokens`.
    pub fn child(parent: &BlockKey, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(BLOCK_CONTEXT);
        hasher.update(&parent.0);
        hasher.update(&(tokens.len() as u32).to_le_bytes());
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// What the first block after an event has as its parent. No block has this name.
    pub fn after(parent: &BlockKey, event: &Event) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(EVENT_CONTEXT);
        hasher.update(&parent.0);
        match event {
            Event::Truncated { sinks, dropped } => {
                for word in [1, *sinks, *dropped] {
                    hasher.update(&u32::to_le_bytes(word));
                }
            }
            Event::Private { root } => {
                hasher.update(&u32::to_le_bytes(2));
                hasher.update(&root.0);
            }
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// First eight bytes: enough to tell keys apart in logs and in the list of evicted keys.
    pub fn short(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[..8]);
        u64::from_le_bytes(bytes)
    }
}

impl ConversationId {
    /// The client's name for a conversation under a tenant's root.
    pub fn new(root: &RootKey, name: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(CONVERSATION_CONTEXT);
        hasher.update(&root.0);
        hasher.update(name);
        Self(*hasher.finalize().as_bytes())
    }
}

macro_rules! hex_names {
    ($($name:ident),*) => {$(
        impl $name {
            /// All of it, in hexadecimal digits.
            pub fn hex(&self) -> String {
                use std::fmt::Write as _;
                self.0.iter().fold(String::new(), |mut digits, byte| {
                    let _ = write!(digits, "{byte:02x}"); // A string takes all.
                    digits
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    )*};
}
hex_names!(Fingerprint, RootKey, BlockKey, ConversationId);

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: Fingerprint = Fingerprint([7; KEY_BYTES]);

    #[test]
    fn two_salts_share_no_key() {
        let tokens: Vec<u32> = (0..128).collect();
        let ours = RootKey::new(&MODEL, b"a").chain(&tokens, 64);
        let theirs = RootKey::new(&MODEL, b"b").chain(&tokens, 64);
        assert!(ours.iter().all(|key| !theirs.contains(key)));
    }

    #[test]
    fn a_key_depends_on_all_tokens_before_it() {
        let root = RootKey::new(&MODEL, b"");
        let mut tokens: Vec<u32> = (0..192).collect();
        let before = root.chain(&tokens, 64);
        tokens[70] += 1;
        let after = root.chain(&tokens, 64);
        assert_eq!(before[0], after[0]);
        assert_ne!(before[1], after[1]);
        assert_ne!(before[2], after[2]);
    }

    #[test]
    fn a_partial_block_and_the_full_one_have_different_keys() {
        let parent = RootKey::new(&MODEL, b"").as_parent();
        assert_ne!(BlockKey::child(&parent, &[1, 2]), BlockKey::child(&parent, &[1, 2, 3]));
    }

    #[test]
    fn the_tail_is_not_part_of_the_chain() {
        let tokens: Vec<u32> = (0..130).collect();
        assert_eq!(RootKey::new(&MODEL, b"").chain(&tokens, 64).len(), 2);
    }
}
