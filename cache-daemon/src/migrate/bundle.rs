//! The bundle: how a conversation travels between daemons, and rests in an object store. Pure.
//!
//! ```text
//! section = header (64 bytes: magic, version, kind, number, length, CRC32C, seal) ‖ body
//! bundle  = manifest, record, keys, (block | absent)*, end
//! ```
//!
//! Sections are numbered from 0 and sealed with a key of this one stream ([`SealKey`]): a section that was
//! changed, left out, moved, or taken from another stream is found before anything of it is used. The byte
//! table is in docs/migration.md.

use bytes::Bytes;
use kv_protocol::geometry::GEOMETRY_BYTES;
use kv_protocol::key::KEY_BYTES;
use kv_protocol::layout::CONVERSATION_RECORD_BYTES_MAX;
use kv_protocol::{
    BlockHeader, BlockKey, ConversationId, Fingerprint, Geometry, HeaderError, RootKey,
};

/// Bytes before a section's body.
pub const SECTION_HEADER_BYTES: usize = 64;
/// Blocks of one conversation: four million tokens at 64 tokens a block.
pub const KEYS_MAX: usize = 1 << 16;

const MAGIC: [u8; 8] = *b"COLQSECT";
const VERSION: u32 = 1;
const OBJECT_CONTEXT: &str = "colloquy 2026-11 bundle at rest";

// Byte table: docs/migration.md, "Section".
const AT_VERSION: usize = 8;
const AT_KIND: usize = 12;
const AT_NUMBER: usize = 16;
const AT_BYTES: usize = 24;
const AT_CRC: usize = 28;
const AT_SEAL: usize = 32;
const _: () = assert!(AT_SEAL + blake3::OUT_LEN == SECTION_HEADER_BYTES);

// Byte table: docs/migration.md, "Manifest".
const AT_FINGERPRINT: usize = GEOMETRY_BYTES;
const AT_ROOT: usize = AT_FINGERPRINT + KEY_BYTES;
const AT_CONVERSATION: usize = AT_ROOT + KEY_BYTES;
const AT_UPDATED: usize = AT_CONVERSATION + KEY_BYTES;
const AT_RECORD_BYTES: usize = AT_UPDATED + 8;
const AT_KEYS: usize = AT_RECORD_BYTES + 4;
const MANIFEST_BYTES: usize = 192;
const _: () = assert!(AT_KEYS + 4 <= MANIFEST_BYTES);

/// Seals the sections of one stream. Who does not have it can neither make a section nor change one.
#[derive(Clone)]
pub struct SealKey(pub(super) [u8; blake3::KEY_LEN]);

impl SealKey {
    /// Of objects in a store: the same for all, so the seal is a digest. Who may write into the store is
    /// the store's affair.
    pub fn of_objects() -> Self {
        Self(blake3::derive_key(OBJECT_CONTEXT, b""))
    }

    fn seal(&self, header: &[u8], body: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(header).update(body);
        hasher.finalize()
    }
}

/// What a conversation is, told first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Manifest {
    /// Shape of its blocks.
    pub geometry: Geometry,
    /// The model.
    pub fingerprint: Fingerprint,
    /// Model and tenant.
    pub root: RootKey,
    /// Name.
    pub conversation: ConversationId,
    /// Of the record; Unix milliseconds.
    pub updated_ms: u64,
    /// Of the record that follows.
    pub record_bytes: u32,
    /// Blocks named in the list that follows.
    pub keys: u32,
}

/// A block on its way: header (generation 0) and payload, in one piece.
#[derive(Clone, PartialEq, Eq)]
pub struct BlockBytes(Bytes);

/// One part of a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Section {
    /// What is to come.
    Manifest(Manifest),
    /// The conversation's record, opaque here.
    Record(Vec<u8>),
    /// Names of its blocks that the source has, in the order of its tokens.
    Keys(Vec<BlockKey>),
    /// A block that was asked for.
    Block(BlockBytes),
    /// A block that was asked for and is gone.
    Absent(BlockKey),
    /// Nothing follows. How many blocks, present and absent, there were.
    End {
        /// Sent.
        blocks: u32,
        /// Said to be absent.
        absent: u32,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Manifest = 1,
    Record = 2,
    Keys = 3,
    Block = 4,
    Absent = 5,
    End = 6,
}

/// Why bytes are not the next section.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// Not a section at all.
    #[error("section starts with {found:02x?}, expected {MAGIC:02x?}: not a bundle")]
    Magic {
        /// Read.
        found: [u8; 8],
    },
    /// Another release's.
    #[error("bundle has version {found}, this build reads {VERSION}: run daemons of one release")]
    Version {
        /// Read.
        found: u32,
    },
    /// Of a section that may not be here, or of none.
    #[error("section {number} has the kind {kind}, which cannot follow here")]
    Kind {
        /// Read.
        kind: u32,
        /// Of the section.
        number: u64,
    },
    /// Left out, repeated or moved.
    #[error("section number {found} came in the place of {expected}")]
    Number {
        /// Read.
        found: u64,
        /// The next.
        expected: u64,
    },
    /// Longer or shorter than its kind can be.
    #[error("section of kind {kind} says that it has {found} bytes, it can have {expected}")]
    Length {
        /// Of the section.
        kind: u32,
        /// Read.
        found: u64,
        /// Most, or exactly.
        expected: u64,
    },
    /// Damaged on the way.
    #[error("section {number} has CRC32C {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// Of the section.
        number: u64,
        /// Read.
        found: u32,
        /// Over header and body.
        computed: u32,
    },
    /// Made or changed by somebody without the key.
    #[error("section {number} is not sealed by the other side: somebody changed it on the way")]
    Seal {
        /// Of the section.
        number: u64,
    },
    /// Whole, and yet impossible inside.
    #[error("section {number} holds no valid {what}: {message}")]
    Body {
        /// Of the section.
        number: u64,
        /// What it was to be.
        what: &'static str,
        /// How it was seen.
        message: String,
    },
    /// The stream went on after its last section, or ended before it.
    #[error("the stream ended {0}")]
    Ended(&'static str),
}

impl BlockBytes {
    /// Bytes that a block of this shape has.
    pub fn len_of(geometry: &Geometry) -> usize {
        BlockHeader::bytes(geometry) + geometry.payload_bytes() as usize
    }

    /// Takes a header and payload in one piece; what it says is checked by who uses it.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes.into())
    }

    /// The header, checked, key and all, and the payload, whose rows are still to be checked against it.
    pub fn split(&self, geometry: &Geometry) -> Result<(BlockHeader, &[u8]), HeaderError> {
        let needed = Self::len_of(geometry);
        if self.0.len() != needed {
            return Err(HeaderError::Truncated { found: self.0.len(), needed });
        }
        let (header, payload) = self.0.split_at(BlockHeader::bytes(geometry));
        Ok((BlockHeader::decode(header, geometry)?, payload))
    }

    /// Header and payload together.
    pub fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }
}

impl std::fmt::Debug for BlockBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockBytes({})", self.0.len())
    }
}

impl Manifest {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; MANIFEST_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.geometry.encode());
        put(AT_FINGERPRINT, &self.fingerprint.0);
        put(AT_ROOT, &self.root.0);
        put(AT_CONVERSATION, &self.conversation.0);
        put(AT_UPDATED, &self.updated_ms.to_le_bytes());
        put(AT_RECORD_BYTES, &self.record_bytes.to_le_bytes());
        put(AT_KEYS, &self.keys.to_le_bytes());
        bytes
    }

    /// Of exactly [`MANIFEST_BYTES`].
    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let manifest = Self {
            geometry: Geometry::decode(&array(bytes, 0)).map_err(|error| error.to_string())?,
            fingerprint: Fingerprint(array(bytes, AT_FINGERPRINT)),
            root: RootKey(array(bytes, AT_ROOT)),
            conversation: ConversationId(array(bytes, AT_CONVERSATION)),
            updated_ms: u64::from_le_bytes(array(bytes, AT_UPDATED)),
            record_bytes: u32::from_le_bytes(array(bytes, AT_RECORD_BYTES)),
            keys: u32::from_le_bytes(array(bytes, AT_KEYS)),
        };
        if manifest.record_bytes > CONVERSATION_RECORD_BYTES_MAX {
            return Err(format!("it announces a record of {} bytes", manifest.record_bytes));
        }
        if manifest.keys as usize > KEYS_MAX {
            return Err(format!("it announces {} blocks", manifest.keys));
        }
        Ok(manifest)
    }
}

/// Numbers and seals the sections of one stream.
pub struct Encoder {
    key: SealKey,
    number: u64,
}

impl Encoder {
    /// Of a new stream.
    pub fn new(key: SealKey) -> Self {
        Self { key, number: 0 }
    }

    /// The next section: its header and its body.
    pub fn section(&mut self, section: Section) -> ([u8; SECTION_HEADER_BYTES], Bytes) {
        let (kind, body): (Kind, Bytes) = match section {
            Section::Manifest(manifest) => (Kind::Manifest, manifest.encode().into()),
            Section::Record(record) => (Kind::Record, record.into()),
            Section::Keys(keys) => {
                (Kind::Keys, keys.iter().flat_map(|key| key.0).collect::<Vec<u8>>().into())
            }
            Section::Block(block) => (Kind::Block, block.0),
            Section::Absent(key) => (Kind::Absent, key.0.to_vec().into()),
            Section::End { blocks, absent } => {
                (Kind::End, [blocks.to_le_bytes(), absent.to_le_bytes()].concat().into())
            }
        };
        let mut header = [0; SECTION_HEADER_BYTES];
        let mut put = |at: usize, value: &[u8]| header[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(AT_VERSION, &VERSION.to_le_bytes());
        put(AT_KIND, &(kind as u32).to_le_bytes());
        put(AT_NUMBER, &self.number.to_le_bytes());
        put(AT_BYTES, &(body.len() as u32).to_le_bytes());
        let crc = crc_of(&header, &body);
        header[AT_CRC..AT_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        let seal = self.key.seal(&header[..AT_SEAL], &body);
        header[AT_SEAL..].copy_from_slice(seal.as_bytes());
        self.number += 1;
        (header, body)
    }
}

/// CRC32C of the header up to its CRC, and of the body.
fn crc_of(header: &[u8; SECTION_HEADER_BYTES], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[..AT_CRC]), body)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// Takes a stream apart again, as it arrives. Holds at most one section.
///
/// After an error it gives only that error: what follows cannot be trusted.
pub struct Decoder {
    key: SealKey,
    number: u64,
    /// Known from the manifest, or told: without it no block is taken.
    geometry: Option<Geometry>,
    header: Vec<u8>,
    body: Vec<u8>,
    body_bytes: Option<(Kind, usize)>,
    blocks: u32,
    absent: u32,
    ended: bool,
    failed: Option<BundleError>,
}

impl Decoder {
    /// Of a new stream.
    pub fn new(key: SealKey, geometry: Option<Geometry>) -> Self {
        Self {
            key,
            number: 0,
            geometry,
            header: Vec::with_capacity(SECTION_HEADER_BYTES),
            body: Vec::new(),
            body_bytes: None,
            blocks: 0,
            absent: 0,
            ended: false,
            failed: None,
        }
    }

    /// Takes from the front of `bytes` what the next section needs; the section when it is complete. To be
    /// called until `bytes` is empty and nothing comes.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Result<Option<Section>, BundleError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.try_next(bytes).inspect_err(|error| self.failed = Some(error.clone()))
    }

    /// At the end of the stream: whether it was the end of the bundle, too.
    pub fn finish(&self) -> Result<(), BundleError> {
        match &self.failed {
            Some(error) => Err(error.clone()),
            None if self.ended => Ok(()),
            None => Err(BundleError::Ended("before its last section")),
        }
    }

    fn try_next(&mut self, bytes: &mut &[u8]) -> Result<Option<Section>, BundleError> {
        if self.ended {
            let rest = bytes.is_empty();
            return if rest { Ok(None) } else { Err(BundleError::Ended("with bytes after it")) };
        }
        if self.body_bytes.is_none() {
            take(bytes, &mut self.header, SECTION_HEADER_BYTES);
            if self.header.len() < SECTION_HEADER_BYTES {
                return Ok(None);
            }
            let (kind, length) = self.check_header()?;
            self.body = Vec::with_capacity(length); // Bounded by the kind: checked.
            self.body_bytes = Some((kind, length));
        }
        let Some((kind, length)) = self.body_bytes else { return Ok(None) };
        take(bytes, &mut self.body, length);
        if self.body.len() < length {
            return Ok(None);
        }
        let section = self.check_section(kind)?;
        self.body_bytes = None;
        self.header.clear();
        self.number += 1;
        Ok(Some(section))
    }

    fn check_header(&self) -> Result<(Kind, usize), BundleError> {
        let header = &self.header;
        let found = array(header, 0);
        if found != MAGIC {
            return Err(BundleError::Magic { found });
        }
        let version = u32::from_le_bytes(array(header, AT_VERSION));
        if version != VERSION {
            return Err(BundleError::Version { found: version });
        }
        let found = u64::from_le_bytes(array(header, AT_NUMBER));
        if found != self.number {
            return Err(BundleError::Number { found, expected: self.number });
        }
        let code = u32::from_le_bytes(array(header, AT_KIND));
        let geometry = self.geometry.as_ref();
        let (kind, least, most) = match (code, geometry) {
            (1, None) => (Kind::Manifest, MANIFEST_BYTES, MANIFEST_BYTES),
            (2, _) => (Kind::Record, 0, CONVERSATION_RECORD_BYTES_MAX as usize),
            (3, _) => (Kind::Keys, 0, KEYS_MAX * KEY_BYTES),
            (4, Some(geometry)) => {
                let exact = BlockBytes::len_of(geometry);
                (Kind::Block, exact, exact)
            }
            (5, _) => (Kind::Absent, KEY_BYTES, KEY_BYTES),
            (6, _) => (Kind::End, 8, 8),
            (kind, _) => return Err(BundleError::Kind { kind, number: self.number }),
        };
        let length = u32::from_le_bytes(array(header, AT_BYTES)) as usize;
        if !(least..=most).contains(&length) {
            let (found, expected) = (length as u64, most as u64);
            return Err(BundleError::Length { kind: code, found, expected });
        }
        Ok((kind, length))
    }

    fn check_section(&mut self, kind: Kind) -> Result<Section, BundleError> {
        let number = self.number;
        let header: [u8; SECTION_HEADER_BYTES] = array(&self.header, 0);
        let found = u32::from_le_bytes(array(&header, AT_CRC));
        let computed = crc_of(&header, &self.body);
        if found != computed {
            return Err(BundleError::Checksum { number, found, computed });
        }
        let seal = blake3::Hash::from_bytes(array(&header, AT_SEAL));
        if self.key.seal(&header[..AT_SEAL], &self.body) != seal {
            return Err(BundleError::Seal { number }); // Compared in constant time by `blake3::Hash`.
        }
        let wrong = |what, message| BundleError::Body { number, what, message };
        let body = std::mem::take(&mut self.body);
        Ok(match kind {
            Kind::Manifest => {
                let manifest =
                    Manifest::decode(&body).map_err(|message| wrong("manifest", message))?;
                self.geometry = Some(manifest.geometry);
                Section::Manifest(manifest)
            }
            Kind::Record => Section::Record(body),
            Kind::Keys => {
                let keys = body.chunks_exact(KEY_BYTES);
                if !keys.remainder().is_empty() {
                    let message = format!("{} bytes", body.len());
                    return Err(wrong("list of keys", message));
                }
                Section::Keys(keys.map(|key| BlockKey(array(key, 0))).collect())
            }
            Kind::Block => {
                self.blocks += 1;
                Section::Block(BlockBytes(body.into()))
            }
            Kind::Absent => {
                self.absent += 1;
                Section::Absent(BlockKey(array(&body, 0)))
            }
            Kind::End => {
                let told =
                    (u32::from_le_bytes(array(&body, 0)), u32::from_le_bytes(array(&body, 4)));
                let (blocks, absent) = (self.blocks, self.absent);
                if told != (blocks, absent) {
                    let message = format!("{told:?} blocks told, {:?} came", (blocks, absent));
                    return Err(wrong("end", message));
                }
                self.ended = true;
                Section::End { blocks, absent }
            }
        })
    }
}

/// Moves bytes from the front of `from` to `to`, until that has `length`.
fn take(from: &mut &[u8], to: &mut Vec<u8>, length: usize) {
    let count = from.len().min(length - to.len());
    let (taken, rest) = from.split_at(count);
    to.extend_from_slice(taken);
    *from = rest;
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_protocol::geometry::LayerSet;
    use kv_protocol::{Dtype, Generation, NumericsTag, Variant};
    use proptest::prelude::*;

    fn geometry() -> Geometry {
        Geometry::new(4, 2, 1, 4, Dtype::F16, LayerSet::all(2)).unwrap()
    }

    fn key() -> SealKey {
        SealKey([9; 32])
    }

    fn root() -> RootKey {
        RootKey::new(&Fingerprint([1; 32]), b"tenant")
    }

    fn block(tokens: &[u32]) -> BlockBytes {
        let payload: Vec<u8> = (0..geometry().payload_bytes()).map(|byte| byte as u8).collect();
        let rows = payload.chunks_exact(geometry().row_bytes() as usize);
        let header = BlockHeader {
            key: BlockKey::child(&root().as_parent(), tokens),
            parent: root().as_parent(),
            root: root(),
            variant: Variant::Exact,
            numerics: NumericsTag::of("test"),
            generation: Generation(0),
            created_ms: 7,
            tokens: tokens.to_vec(),
            checksums: rows.map(crc32c::crc32c).collect(),
        };
        BlockBytes::new([header.encode(&geometry()), payload].concat())
    }

    fn bundle() -> Vec<Section> {
        let gone = BlockKey([3; 32]);
        let blocks = [block(&[1, 2, 3, 4]), block(&[5])];
        let manifest = Manifest {
            geometry: geometry(),
            fingerprint: Fingerprint([1; 32]),
            root: root(),
            conversation: ConversationId([2; 32]),
            updated_ms: 5,
            record_bytes: 3,
            keys: 3,
        };
        let keys = vec![BlockKey([1; 32]), gone, BlockKey([2; 32])];
        let [first, last] = blocks.map(Section::Block);
        vec![
            Section::Manifest(manifest),
            Section::Record(vec![1, 2, 3]),
            Section::Keys(keys),
            first,
            Section::Absent(gone),
            last,
            Section::End { blocks: 2, absent: 1 },
        ]
    }

    fn encode(sections: Vec<Section>, key: SealKey) -> Vec<u8> {
        let mut encoder = Encoder::new(key);
        let encoded = sections.into_iter().map(|section| encoder.section(section));
        encoded.flat_map(|(header, body)| [&header[..], &body].concat()).collect()
    }

    /// In pieces of `piece` bytes.
    fn decode(bytes: &[u8], key: SealKey, piece: usize) -> Result<Vec<Section>, BundleError> {
        let mut decoder = Decoder::new(key, None);
        let mut sections = Vec::new();
        for mut piece in bytes.chunks(piece.max(1)) {
            while let Some(section) = decoder.next(&mut piece)? {
                sections.push(section);
            }
        }
        decoder.finish().map(|()| sections)
    }

    #[test]
    fn a_block_is_split_only_where_its_header_is_right() {
        let good = block(&[1, 2]);
        let (header, payload) = good.split(&geometry()).unwrap();
        assert_eq!(
            (header.tokens, payload.len()),
            (vec![1, 2], geometry().payload_bytes() as usize)
        );
        for at in 0..BlockHeader::bytes(&geometry()) {
            let mut spoilt = good.0.to_vec();
            spoilt[at] ^= 4;
            assert!(BlockBytes::new(spoilt).split(&geometry()).is_err(), "byte {at}");
        }
        assert!(BlockBytes::new(good.0[1..].to_vec()).split(&geometry()).is_err());
    }

    #[test]
    fn another_stream_is_refused_whole() {
        let bytes = encode(bundle(), key());
        let refused = decode(&bytes, SealKey([8; 32]), 64);
        assert_eq!(refused, Err(BundleError::Seal { number: 0 }));
    }

    #[test]
    fn a_section_left_out_or_repeated_is_found() {
        for place in 0..bundle().len() - 1 {
            let mut encoder = Encoder::new(key());
            let parts: Vec<Vec<u8>> = bundle()
                .into_iter()
                .map(|section| encoder.section(section))
                .map(|(header, body)| [&header[..], &body].concat())
                .collect();
            let (mut without, mut twice) = (parts.clone(), parts.clone());
            without.remove(place);
            twice.insert(place, parts[place].clone());
            assert!(decode(&without.concat(), key(), 100).is_err(), "without {place}");
            assert!(decode(&twice.concat(), key(), 100).is_err(), "twice {place}");
        }
    }

    #[test]
    fn a_block_before_its_geometry_is_refused_before_memory_is_taken() {
        let bytes = encode(vec![Section::Block(block(&[1]))], key());
        assert_eq!(decode(&bytes, key(), 64), Err(BundleError::Kind { kind: 4, number: 0 }));
        let mut huge = encode(vec![Section::Record(vec![0; 8])], key());
        huge[AT_BYTES..AT_BYTES + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(decode(&huge, key(), 64), Err(BundleError::Length { .. })));
    }

    proptest! {
        #[test]
        fn a_bundle_reads_back_however_it_is_cut(piece in 1usize..600) {
            prop_assert_eq!(decode(&encode(bundle(), key()), key(), piece), Ok(bundle()));
        }

        #[test]
        fn one_flipped_bit_is_found(at: prop::sample::Index, bit in 0u8..8) {
            let mut bytes = encode(bundle(), key());
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(decode(&bytes, key(), 128).is_err());
        }

        #[test]
        fn a_stream_that_breaks_off_is_not_whole(length: prop::sample::Index) {
            let bytes = encode(bundle(), key());
            let cut = &bytes[..length.index(bytes.len())];
            let ended = BundleError::Ended("before its last section");
            prop_assert_eq!(decode(cut, key(), 128), Err(ended));
        }

        #[test]
        fn random_bytes_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
            piece in 1usize..100,
        ) {
            prop_assert!(decode(&bytes, key(), piece).is_err());
            let _ = BlockBytes::new(bytes).split(&geometry());
        }

        /// Sealed by a peer that has the secret and lost its mind.
        #[test]
        fn sealed_nonsense_never_panics(
            kind in 0u32..8,
            body in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut bytes = encode(vec![Section::Record(body)], key());
            bytes[AT_KIND..AT_KIND + 4].copy_from_slice(&kind.to_le_bytes());
            let (header, body) = bytes.split_at_mut(SECTION_HEADER_BYTES);
            let crc = crc_of(&array(header, 0), body);
            header[AT_CRC..AT_CRC + 4].copy_from_slice(&crc.to_le_bytes());
            let seal = key().seal(&header[..AT_SEAL], body);
            header[AT_SEAL..].copy_from_slice(seal.as_bytes());
            prop_assert!(decode(&bytes, key(), 64).is_err()); // Never an end.
        }
    }
}
