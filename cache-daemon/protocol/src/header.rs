//! The header of a block: who it is, how it was computed, and the checksums of its rows.
//!
//! In the region headers lie in an array before the frames, one a frame, written by whoever fills the
//! frame; on disk the same bytes precede the payload. A header is read by copying it out and decoding
//! the copy: it carries its own CRC32C, and the key must follow from parent and tokens.

use crate::bytes::{array_at, u16_at, u32_at, u64_at};
use crate::frame::Generation;
use crate::geometry::Geometry;
use crate::key::{BlockKey, KEY_BYTES, RootKey};
use crate::variant::{NUMERICS_BYTES, NumericsTag, VARIANT_BYTES, Variant};
use crate::version::{LayoutVersion, UnknownVersion};

/// Bytes before the token ids.
pub const HEADER_FIXED_BYTES: usize = 192;

// Byte table: docs/shared-memory.md, "Block header".
const AT_VERSION: usize = 0;
const AT_TOKEN_COUNT: usize = 4;
const AT_ROWS: usize = 6;
const AT_GENERATION: usize = 8;
const AT_CRC: usize = 12;
const AT_CREATED: usize = 16;
const AT_PAYLOAD_BYTES: usize = 24;
const AT_KEY: usize = 32;
const AT_PARENT: usize = AT_KEY + KEY_BYTES;
const AT_ROOT: usize = AT_PARENT + KEY_BYTES;
const AT_VARIANT: usize = AT_ROOT + KEY_BYTES;
const AT_NUMERICS: usize = AT_VARIANT + VARIANT_BYTES;
const _: () = assert!(AT_NUMERICS + NUMERICS_BYTES <= HEADER_FIXED_BYTES);

/// What a frame, or a record on disk, holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockHeader {
    /// Name; follows from `parent` and `tokens`.
    pub key: BlockKey,
    /// The full block before, or the root.
    pub parent: BlockKey,
    /// Model and tenant: a block is only given to readers of the same root.
    pub root: RootKey,
    /// How it was computed.
    pub variant: Variant,
    /// With which arithmetic.
    pub numerics: NumericsTag,
    /// Generation of the frame when it was filled; 0 on disk.
    pub generation: Generation,
    /// Unix time, milliseconds.
    pub created_ms: u64,
    /// Ids of the tokens held; fewer than `tokens_per_block` in a partial block.
    pub tokens: Vec<u32>,
    /// CRC32C of each packed row (present layer).
    pub checksums: Vec<u32>,
}

/// Why bytes are not the header of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Too few bytes for the geometry.
    #[error("block header has {found} bytes, this geometry needs {needed}")]
    Truncated {
        /// Given.
        found: usize,
        /// For the geometry.
        needed: usize,
    },
    /// The header's own checksum.
    #[error("block header has CRC32C {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// Stored.
        found: u32,
        /// Over the bytes.
        computed: u32,
    },
    /// Another layout.
    #[error(transparent)]
    Version(#[from] UnknownVersion),
    /// A count that the geometry does not allow.
    #[error("block header says {field} is {found}, this geometry allows {expected}")]
    Count {
        /// Which.
        field: &'static str,
        /// Read.
        found: u64,
        /// Bound or exact value.
        expected: u64,
    },
    /// The key does not follow from parent and tokens.
    #[error("block header names key {found}, its parent and tokens give {computed}")]
    Key {
        /// Stored.
        found: BlockKey,
        /// From parent and tokens.
        computed: BlockKey,
    },
    /// Unknown variant code.
    #[error(transparent)]
    Variant(#[from] crate::variant::UnknownVariant),
}

impl BlockHeader {
    /// Bytes of a header under a geometry: a multiple of 64, so that no two headers share a cache line.
    pub fn bytes(geometry: &Geometry) -> usize {
        let tokens = usize::from(geometry.tokens_per_block());
        let rows = usize::from(geometry.present_count());
        (HEADER_FIXED_BYTES + 4 * tokens + 4 * rows).next_multiple_of(64)
    }

    /// Whether all token places are taken; a full block can have children in the chain.
    pub fn is_full(&self, geometry: &Geometry) -> bool {
        self.tokens.len() == usize::from(geometry.tokens_per_block())
    }

    /// Bytes for the region or the disk. Counts must fit the geometry: a caller's bug otherwise.
    pub fn encode(&self, geometry: &Geometry) -> Vec<u8> {
        let tokens_max = usize::from(geometry.tokens_per_block());
        assert!(!self.tokens.is_empty(), "a block holds at least one token");
        assert!(self.tokens.len() <= tokens_max, "more tokens than a block holds");
        assert!(self.checksums.len() == usize::from(geometry.present_count()), "one CRC a row");
        let mut bytes = vec![0; Self::bytes(geometry)];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(AT_VERSION, &(LayoutVersion::CURRENT as u32).to_le_bytes());
        put(AT_TOKEN_COUNT, &(self.tokens.len() as u16).to_le_bytes());
        put(AT_ROWS, &(self.checksums.len() as u16).to_le_bytes());
        put(AT_GENERATION, &self.generation.0.to_le_bytes());
        put(AT_CREATED, &self.created_ms.to_le_bytes());
        put(AT_PAYLOAD_BYTES, &geometry.payload_bytes().to_le_bytes());
        put(AT_KEY, &self.key.0);
        put(AT_PARENT, &self.parent.0);
        put(AT_ROOT, &self.root.0);
        put(AT_VARIANT, &self.variant.encode());
        put(AT_NUMERICS, &self.numerics.0);
        for (index, token) in self.tokens.iter().enumerate() {
            put(HEADER_FIXED_BYTES + 4 * index, &token.to_le_bytes());
        }
        for (index, checksum) in self.checksums.iter().enumerate() {
            put(HEADER_FIXED_BYTES + 4 * (tokens_max + index), &checksum.to_le_bytes());
        }
        let crc = header_crc(&bytes);
        bytes[AT_CRC..AT_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a private copy of header bytes. Everything is checked; the order is cheapest first.
    pub fn decode(bytes: &[u8], geometry: &Geometry) -> Result<Self, HeaderError> {
        HeaderView::new(bytes, geometry)?.decode()
    }
}

/// A private copy of header bytes whose checksum, version and counts are right, read in place.
#[derive(Debug, Clone, Copy)]
pub struct HeaderView<'a> {
    bytes: &'a [u8],
    tokens: &'a [u8],
    checksums: &'a [u8],
}

impl<'a> HeaderView<'a> {
    /// Checks all but the key.
    pub fn new(bytes: &'a [u8], geometry: &Geometry) -> Result<Self, HeaderError> {
        let needed = BlockHeader::bytes(geometry);
        if bytes.len() < needed {
            return Err(HeaderError::Truncated { found: bytes.len(), needed });
        }
        let bytes = &bytes[..needed];
        let found = u32_at(bytes, AT_CRC);
        let computed = header_crc(bytes);
        if found != computed {
            return Err(HeaderError::Checksum { found, computed });
        }
        LayoutVersion::try_from(u32_at(bytes, AT_VERSION))?;
        let count = |field, found: u64, expected: u64, good: bool| {
            if good { Ok(()) } else { Err(HeaderError::Count { field, found, expected }) }
        };
        let tokens_max = usize::from(geometry.tokens_per_block());
        let token_count = usize::from(u16_at(bytes, AT_TOKEN_COUNT));
        let fits = (1..=tokens_max).contains(&token_count);
        count("token count", token_count as u64, tokens_max as u64, fits)?;
        let rows = u16_at(bytes, AT_ROWS);
        let rows_expected = geometry.present_count();
        count("row count", rows.into(), rows_expected.into(), rows == rows_expected)?;
        let payload = u64_at(bytes, AT_PAYLOAD_BYTES);
        let payload_expected = geometry.payload_bytes();
        count("payload bytes", payload, payload_expected, payload == payload_expected)?;
        let (tokens, rest) = bytes[HEADER_FIXED_BYTES..].split_at(4 * tokens_max);
        Ok(Self {
            bytes,
            tokens: &tokens[..4 * token_count],
            checksums: &rest[..4 * usize::from(rows)],
        })
    }

    /// See [`BlockHeader::key`].
    pub fn key(&self) -> BlockKey {
        BlockKey(array_at(self.bytes, AT_KEY))
    }

    /// See [`BlockHeader::parent`].
    pub fn parent(&self) -> BlockKey {
        BlockKey(array_at(self.bytes, AT_PARENT))
    }

    /// See [`BlockHeader::root`].
    pub fn root(&self) -> RootKey {
        RootKey(array_at(self.bytes, AT_ROOT))
    }

    /// See [`BlockHeader::variant`].
    pub fn variant(&self) -> Result<Variant, HeaderError> {
        Ok(Variant::decode(&array_at(self.bytes, AT_VARIANT))?)
    }

    /// See [`BlockHeader::numerics`].
    pub fn numerics(&self) -> NumericsTag {
        NumericsTag(array_at(self.bytes, AT_NUMERICS))
    }

    /// See [`BlockHeader::generation`].
    pub fn generation(&self) -> Generation {
        Generation(u32_at(self.bytes, AT_GENERATION))
    }

    /// See [`BlockHeader::tokens`].
    pub fn tokens(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.tokens.chunks_exact(4).map(|word| u32_at(word, 0))
    }

    /// How many leading tokens are those of `asked`.
    pub fn tokens_shared(&self, asked: &[u32]) -> usize {
        let pairs = || self.tokens().zip(asked);
        // Nearly always all of them: compared at once, without a branch a token.
        if pairs().fold(0, |differs, (have, want)| differs | (have ^ want)) == 0 {
            return pairs().len();
        }
        pairs().take_while(|(have, want)| have == *want).count()
    }

    /// See [`BlockHeader::checksums`].
    pub fn checksums(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.checksums.chunks_exact(4).map(|word| u32_at(word, 0))
    }

    /// All of it, the key checked too.
    pub fn decode(&self) -> Result<BlockHeader, HeaderError> {
        let tokens: Vec<u32> = self.tokens().collect();
        let parent = self.parent();
        let key = self.key();
        let computed = BlockKey::child(&parent, &tokens);
        if key != computed {
            return Err(HeaderError::Key { found: key, computed });
        }
        Ok(BlockHeader {
            key,
            parent,
            root: self.root(),
            variant: self.variant()?,
            numerics: self.numerics(),
            generation: self.generation(),
            created_ms: u64_at(self.bytes, AT_CREATED),
            tokens,
            checksums: self.checksums().collect(),
        })
    }
}

/// CRC32C of the header with its own field taken as zero.
fn header_crc(bytes: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&bytes[..AT_CRC]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[AT_CRC + 4..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Dtype, LayerSet};
    use crate::key::Fingerprint;
    use proptest::prelude::*;

    fn geometry() -> Geometry {
        Geometry::new(8, 3, 1, 4, Dtype::F16, LayerSet::all(3)).unwrap()
    }

    fn header(tokens: Vec<u32>) -> BlockHeader {
        let root = RootKey::new(&Fingerprint([1; KEY_BYTES]), b"tenant");
        let parent = root.as_parent();
        BlockHeader {
            key: BlockKey::child(&parent, &tokens),
            parent,
            root,
            variant: Variant::Exact,
            numerics: NumericsTag::of("test"),
            generation: Generation(3),
            created_ms: 5,
            tokens,
            checksums: vec![1, 2, 3],
        }
    }

    #[test]
    fn full_and_partial_headers_read_back() {
        for tokens in [vec![9], (0..8).collect::<Vec<u32>>()] {
            let header = header(tokens);
            let bytes = header.encode(&geometry());
            assert_eq!(BlockHeader::decode(&bytes, &geometry()), Ok(header));
        }
    }

    #[test]
    fn a_key_that_does_not_follow_from_the_tokens_is_refused() {
        let mut forged = header(vec![1, 2, 3]);
        forged.tokens[1] = 7;
        let bytes = forged.encode(&geometry());
        let refused = BlockHeader::decode(&bytes, &geometry());
        assert!(matches!(refused, Err(HeaderError::Key { .. })), "{refused:?}");
    }

    proptest! {
        #[test]
        fn one_flipped_bit_is_found(at in 0usize..256, bit in 0u8..8) {
            let mut bytes = header(vec![4, 5]).encode(&geometry());
            prop_assume!(at < bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(BlockHeader::decode(&bytes, &geometry()).is_err());
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = BlockHeader::decode(&bytes, &geometry());
        }

        /// Past the checksum too: a peer can compute one.
        #[test]
        fn random_bytes_with_a_right_checksum_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 256)) {
            bytes[AT_VERSION..AT_VERSION + 4].copy_from_slice(&1u32.to_le_bytes());
            bytes.resize(BlockHeader::bytes(&geometry()), 0);
            let crc = header_crc(&bytes);
            bytes[AT_CRC..AT_CRC + 4].copy_from_slice(&crc.to_le_bytes());
            prop_assert!(BlockHeader::decode(&bytes, &geometry()).is_err());
        }
    }
}
