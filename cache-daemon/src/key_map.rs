//! Hash tables by block key. A key is a cryptographic hash already: eight of its bytes, mixed with a
//! secret of the table's own (clients choose tokens, so they could search for keys of one bucket), are
//! as good as hashing all 32 anew, which took a quarter of the daemon's time.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hasher, RandomState};

use kv_protocol::BlockKey;

/// A map by block key.
pub type KeyMap<V> = HashMap<BlockKey, V, KeyState>;
/// A set of block keys.
pub type KeySet = HashSet<BlockKey, KeyState>;

/// Odd, with its bits well spread: the golden ratio's.
const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;

/// A table's secret.
#[derive(Debug, Clone, Copy)]
pub struct KeyState(u64);

impl Default for KeyState {
    fn default() -> Self {
        Self(RandomState::new().build_hasher().finish())
    }
}

impl BuildHasher for KeyState {
    type Hasher = KeyHasher;

    fn build_hasher(&self) -> KeyHasher {
        KeyHasher(self.0)
    }
}

/// See the module.
#[derive(Debug)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        let mut word = [0; 8];
        let count = bytes.len().min(8);
        word[..count].copy_from_slice(&bytes[..count]);
        let wide = u128::from(self.0 ^ u64::from_le_bytes(word)) * u128::from(MULTIPLIER);
        self.0 = wide as u64 ^ (wide >> 64) as u64;
    }

    fn write_usize(&mut self, _length: usize) {} // All keys are of one length.

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_spread_over_all_buckets_and_tables_differ() {
        let (one, other) = (KeyState::default(), KeyState::default());
        let key = |number: u64| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            BlockKey(key)
        };
        let mut buckets = vec![0; 64];
        for number in 0..6400 {
            buckets[(one.hash_one(key(number)) >> 58) as usize] += 1;
        }
        assert!(buckets.iter().all(|count| (50..200).contains(count)), "{buckets:?}");
        assert_ne!(one.hash_one(key(1)), other.hash_one(key(1)));
    }
}
