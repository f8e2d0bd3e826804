//! What is left of a deleted conversation: its id, when, and which blocks are still to be erased from disk.
//! Byte table: docs/conversations.md.
//!
//! Stored in the place of the record, so that a restarted worker goes on with the erasure and serves none of
//! the blocks, and so that an import of an older copy is refused.

use kv_protocol::BlockKey;
use kv_protocol::key::KEY_BYTES;

/// First word of a tombstone, where a record has its version.
const TOMBSTONE_VERSION: u32 = 0x8000_0001;
/// Blocks of one deletion: those of the longest record and of its former histories, and some to spare for
/// what goes on from its end.
pub const KEYS_MAX: usize = 1 << 17;
/// Version and CRC, time, count.
const FIXED_BYTES: usize = 24;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tombstone {
    /// Unix milliseconds.
    pub deleted_ms: u64,
    /// Blocks that may still have bytes on disk.
    pub keys: Vec<BlockKey>,
}

impl Tombstone {
    /// Whether stored bytes claim to be one.
    pub fn is_one(bytes: &[u8]) -> bool {
        bytes.starts_with(&TOMBSTONE_VERSION.to_le_bytes())
    }

    /// Bytes for the disk.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIXED_BYTES + KEY_BYTES * self.keys.len());
        bytes.extend_from_slice(&TOMBSTONE_VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.deleted_ms.to_le_bytes());
        bytes.extend_from_slice(&(self.keys.len() as u64).to_le_bytes());
        self.keys.iter().for_each(|key| bytes.extend_from_slice(&key.0));
        let crc = crc32c::crc32c(&bytes[8..]);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// `None` for whatever is not one, or not whole.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (fixed, keys) = bytes.split_at_checked(FIXED_BYTES)?;
        let word = |at: usize| Some(u64::from_le_bytes(fixed[at..at + 8].try_into().ok()?));
        let crc = u32::from_le_bytes(fixed[4..8].try_into().ok()?);
        let is_whole = Self::is_one(fixed)
            && crc == crc32c::crc32c(&bytes[8..])
            && keys.len().is_multiple_of(KEY_BYTES)
            && word(16)? == (keys.len() / KEY_BYTES) as u64;
        if !is_whole {
            return None;
        }
        let key = |bytes: &[u8]| Some(BlockKey(bytes.try_into().ok()?));
        let keys = keys.chunks_exact(KEY_BYTES).map(key).collect::<Option<_>>()?;
        Some(Self { deleted_ms: word(8)?, keys })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_tombstone_reads_back_and_one_flipped_bit_is_found(
            deleted_ms: u64,
            keys in proptest::collection::vec(any::<[u8; 32]>(), 0..20),
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let keys = keys.into_iter().map(BlockKey).collect();
            let tombstone = Tombstone { deleted_ms, keys };
            let mut bytes = tombstone.encode();
            prop_assert_eq!(Tombstone::decode(&bytes), Some(tombstone));
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(Tombstone::decode(&bytes), None);
        }

        #[test]
        fn random_bytes_are_no_tombstone(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(Tombstone::decode(&bytes), None);
            bytes.splice(..bytes.len().min(4), TOMBSTONE_VERSION.to_le_bytes());
            prop_assert_eq!(Tombstone::decode(&bytes), None);
        }
    }
}
