//! Bytes of slots, slot files and index entries. Byte tables: docs/disk-format.md.
//!
//! Nothing here trusts what it reads: a wrong magic, version, checksum or count is `None`.

use kv_protocol::geometry::GEOMETRY_BYTES;
use kv_protocol::variant::{NUMERICS_BYTES, VARIANT_BYTES};
use kv_protocol::{BlockHeader, BlockKey, Geometry, NumericsTag, RootKey, Variant};

use super::space::SlotId;
use crate::tier::disk::StoredBlock;

/// Unit of O_DIRECT, of slots, and of the header page.
pub const PAGE_BYTES: usize = 4096;
/// Version of slots and slot files, newest first:
/// 1: first slot files (the BlobDB store before them has no version of its own).
pub const FORMAT_VERSION: u32 = 1;
/// Version of the index's entries, newest first; those of the version before are read as well. Whoever
/// does not know it makes the index again from the slots.
/// 2: what the directory needs to know, a third of the bytes.
/// 1: the block's whole header.
pub const INDEX_VERSION: u32 = 2;

const FILE_MAGIC: u64 = u64::from_le_bytes(*b"COLQFILE");
const SLOT_MAGIC: u64 = u64::from_le_bytes(*b"COLQSLOT");
/// Fields of an entry of version 1, before the block header: version u32 ‖ file u32 ‖ slot u32 ‖ reserved
/// u32 ‖ epoch u64 ‖ order u64 ‖ geometry 64.
const ENTRY_1_FIXED_BYTES: usize = 32 + GEOMETRY_BYTES;

// Fields of an entry, docs/disk-format.md, "Index".
const AT_ENTRY_CRC: usize = 4;
const AT_ENTRY_TOKENS_HELD: usize = 48;
const AT_ENTRY_PARENT: usize = 56;
const AT_ENTRY_ROOT: usize = AT_ENTRY_PARENT + 32;
const AT_ENTRY_VARIANT: usize = AT_ENTRY_ROOT + 32;
const AT_ENTRY_NUMERICS: usize = AT_ENTRY_VARIANT + VARIANT_BYTES;
const AT_ENTRY_TOKENS: usize = AT_ENTRY_NUMERICS + NUMERICS_BYTES;
/// Fields of a slot's header page, before the gap and the block header.
const SLOT_FIXED_BYTES: usize = 48 + GEOMETRY_BYTES;
/// Largest block header of any geometry: 192 + 4 · 256 tokens + 4 · 256 rows.
const BLOCK_HEADER_BYTES_MAX: usize = 192 + 4 * 256 + 4 * 256;
const _: () = assert!(SLOT_FIXED_BYTES + BLOCK_HEADER_BYTES_MAX <= PAGE_BYTES);

/// Bytes of a slot: header page, then the payload in whole pages.
pub fn slot_bytes(geometry: &Geometry) -> u64 {
    PAGE_BYTES as u64 + geometry.payload_bytes().next_multiple_of(PAGE_BYTES as u64)
}

/// Where a slot begins; the first page is the file's.
pub fn slot_at(geometry: &Geometry, slot: u32) -> u64 {
    PAGE_BYTES as u64 + u64::from(slot) * slot_bytes(geometry)
}

/// First page of a slot file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileHeader {
    /// Number of the file; its name says the same.
    pub file: u32,
    /// Slots that follow.
    pub slots: u32,
    /// Shape of all blocks in it.
    pub geometry: Geometry,
}

impl FileHeader {
    /// One page.
    pub fn encode(&self) -> Vec<u8> {
        let mut page = vec![0; PAGE_BYTES];
        put(&mut page, 0, &FILE_MAGIC.to_le_bytes());
        put(&mut page, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut page, 16, &self.file.to_le_bytes());
        put(&mut page, 20, &self.slots.to_le_bytes());
        put(&mut page, 24, &self.geometry.encode());
        seal(&mut page);
        page
    }

    /// Whether it is the first page of a file, whole, that another version of this program wrote.
    pub fn is_of_another_version(page: &[u8]) -> bool {
        let is_first_page = page.len() == PAGE_BYTES && u64_at(page, 0) == FILE_MAGIC;
        is_first_page && u32_at(page, 12) == page_crc(page) && u32_at(page, 8) != FORMAT_VERSION
    }

    /// The page as another version would have it, as far as we know.
    #[cfg(test)]
    pub fn encode_as(&self, version: u32) -> Vec<u8> {
        let mut page = self.encode();
        put(&mut page, 8, &version.to_le_bytes());
        seal(&mut page);
        page
    }

    /// `None` for whatever is not a page of this version, whole and right.
    pub fn decode(page: &[u8]) -> Option<Self> {
        check(page, FILE_MAGIC)?;
        Some(Self {
            file: u32_at(page, 16),
            slots: u32_at(page, 20),
            geometry: Geometry::decode(page[24..24 + GEOMETRY_BYTES].try_into().ok()?).ok()?,
        })
    }
}

/// What a slot's header page says about the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotHeader {
    /// Where the page believes to be: a misdirected write is found by it.
    pub at: SlotId,
    /// Of this write: larger than that of any write before it.
    pub epoch: u64,
    /// Of the block, for eviction in order of writes.
    pub order: u64,
    /// Shape of the payload.
    pub geometry: Geometry,
}

impl SlotHeader {
    /// A block in this slot, as the directory needs to know it.
    pub fn stored(&self, header: &BlockHeader) -> StoredBlock {
        StoredBlock::new(header, &self.geometry, slot_bytes(&self.geometry), self.order)
    }

    /// Writes the header page; `block` ends where the payload begins, so that both are one span.
    pub fn encode(&self, block: &[u8], page: &mut [u8]) {
        assert!(block.len() <= BLOCK_HEADER_BYTES_MAX, "a block header fits beside the fields");
        page.fill(0);
        put(page, 0, &SLOT_MAGIC.to_le_bytes());
        put(page, 8, &FORMAT_VERSION.to_le_bytes());
        put(page, 16, &self.epoch.to_le_bytes());
        put(page, 24, &self.order.to_le_bytes());
        put(page, 32, &self.at.file.to_le_bytes());
        put(page, 36, &self.at.slot.to_le_bytes());
        put(page, 40, &(block.len() as u32).to_le_bytes());
        put(page, 48, &self.geometry.encode());
        put(page, PAGE_BYTES - block.len(), block);
        seal(page);
    }

    /// Fields and block header; `None` for whatever is not a page of this version, whole and right.
    pub fn decode(page: &[u8]) -> Option<(Self, BlockHeader)> {
        check(page, SLOT_MAGIC)?;
        let geometry = Geometry::decode(page[48..48 + GEOMETRY_BYTES].try_into().ok()?).ok()?;
        let block_bytes = u32_at(page, 40) as usize;
        if block_bytes != BlockHeader::bytes(&geometry) {
            return None;
        }
        let block = BlockHeader::decode(&page[PAGE_BYTES - block_bytes..], &geometry).ok()?;
        let at = SlotId { file: u32_at(page, 32), slot: u32_at(page, 36) };
        let header = Self { at, epoch: u64_at(page, 16), order: u64_at(page, 24), geometry };
        Some((header, block))
    }
}

/// What the index has under a block's key.
#[derive(Debug)]
pub struct Entry {
    /// Where the block is.
    pub at: SlotId,
    /// Of its write.
    pub epoch: u64,
    /// What the directory needs to know.
    pub block: StoredBlock,
}

/// Bytes of an entry.
pub fn encode_entry(slot: &SlotHeader, header: &BlockHeader) -> Vec<u8> {
    let block = slot.stored(header);
    let mut entry = Vec::with_capacity(AT_ENTRY_TOKENS + 4 * block.tokens.len());
    entry.extend_from_slice(&INDEX_VERSION.to_le_bytes());
    entry.extend_from_slice(&[0; 4]); // CRC
    entry.extend_from_slice(&slot.at.file.to_le_bytes());
    entry.extend_from_slice(&slot.at.slot.to_le_bytes());
    entry.extend_from_slice(&slot.epoch.to_le_bytes());
    entry.extend_from_slice(&slot.order.to_le_bytes());
    entry.extend_from_slice(&block.created_ms.to_le_bytes());
    entry.extend_from_slice(&block.bytes.to_le_bytes());
    entry.extend_from_slice(&(header.tokens.len() as u32).to_le_bytes());
    entry.extend_from_slice(&u32::from(block.is_full).to_le_bytes());
    entry.extend_from_slice(&block.parent.0);
    entry.extend_from_slice(&block.root.0);
    entry.extend_from_slice(&block.variant.encode());
    entry.extend_from_slice(&block.numerics.0);
    entry.extend(block.tokens.iter().flat_map(|token| token.to_le_bytes()));
    let crc = entry_crc(&header.key.0, &entry);
    put(&mut entry, AT_ENTRY_CRC, &crc.to_le_bytes());
    entry
}

fn entry_crc(key: &[u8], entry: &[u8]) -> u32 {
    let before = crc32c::crc32c_append(crc32c::crc32c(key), &entry[..AT_ENTRY_CRC]);
    crc32c::crc32c_append(before, &entry[AT_ENTRY_CRC + 4..])
}

/// `None` for whatever is not an entry of a known version under its own key, whole and right.
pub fn decode_entry(key: &[u8], entry: &[u8]) -> Option<Entry> {
    let version = entry.get(..4)?;
    match u32_at(version, 0) {
        INDEX_VERSION => decode_entry_2(key, entry),
        1 => decode_entry_1(key, entry),
        _ => None,
    }
}

fn decode_entry_2(key: &[u8], entry: &[u8]) -> Option<Entry> {
    let tokens = entry.get(AT_ENTRY_TOKENS..)?;
    if u32_at(entry, AT_ENTRY_CRC) != entry_crc(key, entry) {
        return None;
    }
    let is_full = match u32_at(entry, AT_ENTRY_TOKENS_HELD + 4) {
        0 => false,
        1 => true,
        _ => return None,
    };
    let named = if is_full { 1 } else { u32_at(entry, AT_ENTRY_TOKENS_HELD) as usize };
    if tokens.len() % 4 != 0 || tokens.len() / 4 != named {
        return None;
    }
    let block = StoredBlock {
        key: BlockKey(key.try_into().ok()?),
        parent: BlockKey(array_at(entry, AT_ENTRY_PARENT)),
        root: RootKey(array_at(entry, AT_ENTRY_ROOT)),
        variant: Variant::decode(&array_at(entry, AT_ENTRY_VARIANT)).ok()?,
        numerics: NumericsTag(array_at(entry, AT_ENTRY_NUMERICS)),
        created_ms: u64_at(entry, 32),
        tokens: tokens.chunks_exact(4).map(|token| u32_at(token, 0)).collect(),
        is_full,
        bytes: u64_at(entry, 40),
        order: u64_at(entry, 24),
    };
    let at = SlotId { file: u32_at(entry, 8), slot: u32_at(entry, 12) };
    Some(Entry { at, epoch: u64_at(entry, 16), block })
}

fn decode_entry_1(key: &[u8], entry: &[u8]) -> Option<Entry> {
    let (fixed, block) = entry.split_at_checked(ENTRY_1_FIXED_BYTES)?;
    let geometry = Geometry::decode(&array_at(fixed, 32)).ok()?;
    let header = BlockHeader::decode(block, &geometry).ok()?;
    let at = SlotId { file: u32_at(fixed, 4), slot: u32_at(fixed, 8) };
    let slot = SlotHeader { at, epoch: u64_at(fixed, 16), order: u64_at(fixed, 24), geometry };
    let block = slot.stored(&header);
    (header.key.0 == key).then_some(Entry { at, epoch: slot.epoch, block })
}

/// An entry as version 1 wrote it.
#[cfg(test)]
pub fn encode_entry_1(slot: &SlotHeader, header: &BlockHeader) -> Vec<u8> {
    let mut entry = Vec::new();
    for word in [1, slot.at.file, slot.at.slot, 0] {
        entry.extend_from_slice(&word.to_le_bytes());
    }
    entry.extend_from_slice(&slot.epoch.to_le_bytes());
    entry.extend_from_slice(&slot.order.to_le_bytes());
    entry.extend_from_slice(&slot.geometry.encode());
    entry.extend_from_slice(&header.encode(&slot.geometry));
    entry
}

/// The CRC32C at 12 covers the rest of the page.
fn seal(page: &mut [u8]) {
    let crc = page_crc(page);
    put(page, 12, &crc.to_le_bytes());
}

fn check(page: &[u8], magic: u64) -> Option<()> {
    let known = page.len() == PAGE_BYTES
        && u64_at(page, 0) == magic
        && u32_at(page, 8) == FORMAT_VERSION
        && u32_at(page, 12) == page_crc(page);
    known.then_some(())
}

fn page_crc(page: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&page[..12]), &page[16..])
}

fn put(page: &mut [u8], at: usize, value: &[u8]) {
    page[at..at + value.len()].copy_from_slice(value);
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|byte| bytes[at + byte])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

#[cfg(test)]
mod tests {
    use kv_protocol::geometry::LayerSet;
    use kv_protocol::{Dtype, Fingerprint, Generation};
    use proptest::prelude::*;

    use super::*;

    const TOKENS_PER_BLOCK: u16 = 16;
    /// A slot's page, by the place of what a writer of nonsense may aim at.
    const PAGE_FIELDS_BYTES: usize = SLOT_FIXED_BYTES + 16;

    fn geometry() -> Geometry {
        Geometry::new(TOKENS_PER_BLOCK, 2, 1, 64, Dtype::F16, LayerSet::all(2)).unwrap()
    }

    fn slot() -> SlotHeader {
        let at = SlotId { file: 3, slot: 7 };
        SlotHeader { at, epoch: 1 << 32 | 5, order: 9, geometry: geometry() }
    }

    fn header(tokens: u32) -> BlockHeader {
        let root = RootKey::new(&Fingerprint([1; 32]), b"tenant");
        let tokens: Vec<u32> = (100..100 + tokens).collect();
        BlockHeader {
            key: BlockKey::child(&root.as_parent(), &tokens),
            parent: root.as_parent(),
            root,
            variant: Variant::Mixed,
            numerics: NumericsTag::of("test"),
            generation: Generation(0),
            created_ms: 77,
            tokens,
            checksums: vec![1, 2],
        }
    }

    /// With the checksum that an entry of these bytes would have: whoever writes to the volume can
    /// compute one.
    fn sealed_entry(key: &[u8], mut entry: Vec<u8>) -> Vec<u8> {
        if entry.len() >= AT_ENTRY_CRC + 4 {
            let crc = entry_crc(key, &entry);
            put(&mut entry, AT_ENTRY_CRC, &crc.to_le_bytes());
        }
        entry
    }

    proptest! {
        #[test]
        fn an_entry_comes_back(tokens in 1..=u32::from(TOKENS_PER_BLOCK)) {
            let (slot, header) = (slot(), header(tokens));
            for entry in [encode_entry(&slot, &header), encode_entry_1(&slot, &header)] {
                let found = decode_entry(&header.key.0, &entry).unwrap();
                prop_assert_eq!((found.at, found.epoch), (slot.at, slot.epoch));
                prop_assert_eq!(found.block, slot.stored(&header));
            }
        }

        #[test]
        fn an_entry_with_a_flipped_bit_is_none(tokens in 1..=16u32, at: usize, bit in 0u8..8) {
            let header = header(tokens);
            let mut entry = encode_entry(&slot(), &header);
            let at = at % entry.len();
            entry[at] ^= 1 << bit;
            prop_assert!(decode_entry(&header.key.0, &entry).is_none());
        }

        /// A splice of an entry and of other bytes, at any length, its checksum right.
        #[test]
        fn no_sealed_entry_panics(
            tokens in 1..=16u32,
            splice in proptest::collection::vec(any::<u8>(), 0..64),
            at: usize,
            length in 0..400usize,
            other_key: bool,
        ) {
            let header = header(tokens);
            let mut entry = encode_entry(&slot(), &header);
            let at = at % entry.len();
            let end = (at + splice.len()).min(entry.len());
            entry[at..end].copy_from_slice(&splice[..end - at]);
            entry.resize(length, 0xff);
            let key = if other_key { &splice[..] } else { &header.key.0[..] };
            if let Some(found) = decode_entry(key, &sealed_entry(key, entry)) {
                prop_assert!(found.block.tokens.len() <= length / 4);
            }
        }

        #[test]
        fn no_entry_of_version_1_panics(
            splice in proptest::collection::vec(any::<u8>(), 0..64), at: usize, length in 0..700usize,
        ) {
            let header = header(16);
            let mut entry = encode_entry_1(&slot(), &header);
            let at = at % entry.len();
            let end = (at + splice.len()).min(entry.len());
            entry[at..end].copy_from_slice(&splice[..end - at]);
            entry.truncate(length);
            let _ = decode_entry(&header.key.0, &entry);
        }

        /// Of slots and of files alike.
        #[test]
        fn no_sealed_page_panics(
            splice in proptest::collection::vec(any::<u8>(), 1..32),
            at in 16..PAGE_FIELDS_BYTES,
            of_a_file: bool,
        ) {
            let mut page = vec![0; PAGE_BYTES];
            if of_a_file {
                page = FileHeader { file: 1, slots: 8, geometry: geometry() }.encode();
            } else {
                slot().encode(&header(16).encode(&geometry()), &mut page);
            }
            put(&mut page, at, &splice);
            seal(&mut page);
            let _ = (FileHeader::decode(&page), SlotHeader::decode(&page));
        }

        #[test]
        fn a_page_with_a_flipped_bit_is_none(at in 0..PAGE_BYTES, bit in 0u8..8) {
            let mut page = vec![0; PAGE_BYTES];
            slot().encode(&header(16).encode(&geometry()), &mut page);
            prop_assert!(SlotHeader::decode(&page).is_some());
            page[at] ^= 1 << bit;
            prop_assert!(SlotHeader::decode(&page).is_none());
        }
    }
}
