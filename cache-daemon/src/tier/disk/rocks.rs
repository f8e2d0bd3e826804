//! RocksDB as the whole disk tier: payloads in a BlobDB column family, index and conversation records
//! beside them. Byte tables: docs/disk-format.md.
//!
//! The WAL is on and payloads go through it (written twice: the price of one atomic batch a block; slot
//! files, the default engine, do better). It is not synced at each write: a killed process loses
//! nothing, a loss of power loses the newest blocks, and both leave a consistent index.

use std::path::Path;

use kv_protocol::geometry::GEOMETRY_BYTES;
use kv_protocol::{BlockHeader, BlockKey, ConversationId, Geometry, Span};
use rocksdb::{ColumnFamilyDescriptor, DB, DBCompressionType, IteratorMode, Options, WriteBatch};

use super::database::{CONVERSATION, Database, Reading, database_options, encode_record};
use super::slots::aside;
use super::{
    DiskError, DiskTier, DiskUsage, Engine, NewBlock, StoredBlock, StoredConversation, WriteFailure,
};

const INDEX: &str = "index";
const PAYLOAD: &str = "payload";
/// Version of the index entry, first in it.
const ENTRY_VERSION: u32 = 1;
/// Version of the store: in the default family, u32. Stores of the first version may lack it.
const FORMAT_KEY: &[u8] = b"format";
const FORMAT_VERSION: u32 = 1;
/// In the default family, empty: written when a failed store is tried again.
const PROBE_KEY: &[u8] = b"probe";
/// version u32 ‖ reserved u32 ‖ order u64 ‖ geometry 64.
const ENTRY_FIXED_BYTES: usize = 16 + GEOMETRY_BYTES;
/// Blob files are this share of the tier, so that whole files die as blocks leave in write order.
const BLOB_FILE_SHARE: u64 = 32;
const BLOB_FILE_BYTES_MAX: u64 = 256 << 20;
const BLOB_FILE_BYTES_MIN: u64 = 1 << 20;
/// Bytes in memory before blobs are written out; replayed from the WAL after a kill.
const WRITE_BUFFER_BYTES: usize = 32 << 20;
/// Bounds the replay after a kill.
const WAL_BYTES_MAX: u64 = 128 << 20;

/// See the module.
pub struct RocksTier {
    database: Database,
}

fn open_database(dir: &Path, disk_bytes: u64) -> Result<DB, rocksdb::Error> {
    let options = database_options(WAL_BYTES_MAX);
    let small = || {
        let mut options = Options::default();
        options.set_compression_type(DBCompressionType::None);
        options.set_write_buffer_size(8 << 20);
        options
    };
    let mut blobs = small();
    let blob_file_bytes =
        (disk_bytes / BLOB_FILE_SHARE).clamp(BLOB_FILE_BYTES_MIN, BLOB_FILE_BYTES_MAX);
    blobs.set_write_buffer_size(WRITE_BUFFER_BYTES);
    blobs.set_enable_blob_files(true);
    blobs.set_min_blob_size(0); // Every payload, however small the model.
    blobs.set_blob_file_size(blob_file_bytes);
    blobs.set_blob_compression_type(DBCompressionType::None);
    blobs.set_enable_blob_gc(true);
    blobs.set_blob_gc_age_cutoff(1.0); // `reclaim` looks at all files, not at the oldest quarter.
    blobs.set_blob_gc_force_threshold(0.5);
    let families = vec![
        ColumnFamilyDescriptor::new("default", small()),
        ColumnFamilyDescriptor::new(INDEX, small()),
        ColumnFamilyDescriptor::new(PAYLOAD, blobs),
        ColumnFamilyDescriptor::new(CONVERSATION, small()),
    ];
    DB::open_cf_descriptors(&options, dir, families)
}

impl RocksTier {
    /// Opens or makes the store; `disk_bytes` sizes its files.
    pub fn open(dir: &Path, disk_bytes: u64) -> Result<Self, DiskError> {
        let open = |dir: &Path| {
            let open = move |dir: &Path| open_database(dir, disk_bytes);
            Ok(Self { database: Database::open(dir, "store", false, open)? })
        };
        let tier: Self = open(dir)?;
        let found = tier.version()?;
        if matches!(found, None | Some(FORMAT_VERSION)) {
            return tier.begin();
        }
        let found = found.unwrap_or_default();
        drop(tier);
        set_aside(dir, found).map_err(|source| DiskError::Io {
            what: "setting a store of another version aside",
            source,
        })?;
        open(dir)?.begin()
    }

    fn version(&self) -> Result<Option<u32>, DiskError> {
        let found = self.database.reading()?.db().get(FORMAT_KEY);
        let found = found.map_err(self.database.error("reading the format"))?;
        Ok(found.map(|value| value.try_into().map_or(u32::MAX, u32::from_le_bytes)))
    }

    fn begin(self) -> Result<Self, DiskError> {
        let version = FORMAT_VERSION.to_le_bytes();
        self.apply("writing the format", |_, batch| batch.put(FORMAT_KEY, version))?;
        Ok(self)
    }

    fn apply(
        &self,
        what: &'static str,
        fill: impl FnOnce(&Reading<'_>, &mut WriteBatch),
    ) -> Result<(), DiskError> {
        self.database.apply(what, || Ok(()), fill)
    }

    fn write_one(&self, block: &NewBlock<'_>) -> Result<(), WriteFailure> {
        if !block.is_right() {
            return Err(WriteFailure::Checksum);
        }
        let (geometry, key) = (block.geometry, block.header.key.0);
        let header = block.header.encode(geometry);
        let mut record = vec![0; header.len() + block.payload.bytes() as usize];
        record[..header.len()].copy_from_slice(&header);
        block.payload.copy_out(0, &mut record[header.len()..]);
        let written = self.apply("writing a block", |reading, batch| {
            batch.put_cf(reading.family(PAYLOAD), key, &record);
            let entry = encode_entry(geometry, &header, block.order);
            batch.put_cf(reading.family(INDEX), key, entry);
        });
        written.map_err(WriteFailure::Disk)
    }
}

/// Moves the files of a store that we do not know into a folder beside those of other engines.
fn set_aside(dir: &Path, version: u32) -> std::io::Result<()> {
    let aside = aside(&dir.join("blobdb"), &format!("version-{version}"));
    tracing::warn!(version, ours = FORMAT_VERSION, to = %aside.display(), "store set aside");
    std::fs::create_dir(&aside)?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::rename(entry.path(), aside.join(entry.file_name()))?;
        }
    }
    std::fs::File::open(dir)?.sync_all()
}

fn encode_entry(geometry: &Geometry, header: &[u8], order: u64) -> Vec<u8> {
    let mut entry = Vec::with_capacity(ENTRY_FIXED_BYTES + header.len());
    entry.extend_from_slice(&ENTRY_VERSION.to_le_bytes());
    entry.extend_from_slice(&[0; 4]);
    entry.extend_from_slice(&order.to_le_bytes());
    entry.extend_from_slice(&geometry.encode());
    entry.extend_from_slice(header);
    entry
}

/// `None` for whatever is not an entry of this version, whole and right.
fn decode_entry(key: &[u8], entry: &[u8]) -> Option<StoredBlock> {
    let (fixed, header) = entry.split_at_checked(ENTRY_FIXED_BYTES)?;
    let version = u32::from_le_bytes(fixed[0..4].try_into().ok()?);
    if version != ENTRY_VERSION {
        return None;
    }
    let order = u64::from_le_bytes(fixed[8..16].try_into().ok()?);
    let geometry = Geometry::decode(fixed[16..].try_into().ok()?).ok()?;
    let header = BlockHeader::decode(header, &geometry).ok()?;
    let bytes = Engine::BlobDb.block_bytes(&geometry);
    (header.key.0 == key).then(|| StoredBlock::new(&header, &geometry, bytes, order))
}

impl DiskTier for RocksTier {
    fn load(
        &mut self,
        block: &mut dyn FnMut(StoredBlock),
        conversation: &mut dyn FnMut(StoredConversation),
    ) -> Result<u64, DiskError> {
        let records = self.database.scan_records(|| Ok(()), conversation)?;
        let mut corrupt = Vec::new();
        {
            let reading = self.database.reading()?;
            for entry in reading.db().iterator_cf(reading.family(INDEX), IteratorMode::Start) {
                let (key, value) = entry.map_err(self.database.error("reading the index"))?;
                match decode_entry(&key, &value) {
                    Some(stored) => block(stored),
                    None => corrupt.push(key),
                }
            }
        }
        if !corrupt.is_empty() {
            self.apply("removing corrupt entries", |reading, batch| {
                for key in &corrupt {
                    batch.delete_cf(reading.family(INDEX), key);
                    batch.delete_cf(reading.family(PAYLOAD), key);
                }
            })?;
        }
        Ok(corrupt.len() as u64 + records)
    }

    fn write(
        &self,
        blocks: &[NewBlock<'_>],
        tell: &mut dyn FnMut(usize, Result<(), WriteFailure>),
    ) {
        blocks.iter().enumerate().for_each(|(at, block)| tell(at, self.write_one(block)));
    }

    /// Through a copy of RocksDB's own.
    fn read(
        &self,
        key: &BlockKey,
        geometry: &Geometry,
        payload: &Span,
    ) -> Result<Option<BlockHeader>, DiskError> {
        let reading = self.database.reading()?;
        let found = reading.db().get_pinned_cf(reading.family(PAYLOAD), key.0);
        let Some(value) = found.map_err(self.database.error("reading a block"))? else {
            return Ok(None);
        };
        let corrupt = |message| DiskError::Corrupt { what: "block", message };
        let header_bytes = BlockHeader::bytes(geometry);
        if value.len() as u64 != header_bytes as u64 + payload.bytes() {
            return Err(corrupt(format!("it has {} bytes: cut short, or another's", value.len())));
        }
        let (header, bytes) = value.split_at(header_bytes);
        let header = BlockHeader::decode(header, geometry);
        let header = header.map_err(|error| corrupt(error.to_string()))?;
        payload.copy_in(0, bytes);
        Ok(Some(header))
    }

    fn remove(&self, keys: &[BlockKey]) -> Result<(), DiskError> {
        self.apply("removing blocks", |reading, batch| {
            for key in keys {
                batch.delete_cf(reading.family(INDEX), key.0);
                batch.delete_cf(reading.family(PAYLOAD), key.0);
            }
        })
    }

    /// Rewrites all payloads: blob files hold what was removed until they are collected.
    fn erase(
        &self,
        blocks: &[BlockKey],
        conversations: &[ConversationId],
    ) -> Result<(), DiskError> {
        self.apply("erasing", |reading, batch| {
            for key in blocks {
                batch.delete_cf(reading.family(INDEX), key.0);
                batch.delete_cf(reading.family(PAYLOAD), key.0);
            }
            for id in conversations {
                batch.delete_cf(reading.family(CONVERSATION), id.0);
            }
        })?;
        self.database.purge(if blocks.is_empty() { &[] } else { &[INDEX, PAYLOAD] }, conversations)
    }

    /// Its files are as large as they were when it was opened; how many there are is the daemon's to bound.
    fn resize(&self, _disk_bytes: u64) {}

    fn put_conversation(
        &self,
        id: &ConversationId,
        updated_ms: u64,
        record: &[u8],
    ) -> Result<(), DiskError> {
        self.apply("writing a conversation record", |reading, batch| {
            batch.put_cf(reading.family(CONVERSATION), id.0, encode_record(updated_ms, record));
        })
    }

    fn get_conversation(&self, id: &ConversationId) -> Result<Option<Vec<u8>>, DiskError> {
        self.database.get_record(id)
    }

    fn remove_conversation(&self, id: &ConversationId) -> Result<(), DiskError> {
        self.apply("removing a conversation record", |reading, batch| {
            batch.delete_cf(reading.family(CONVERSATION), id.0);
        })
    }

    fn usage(&self) -> DiskUsage {
        let Ok(reading) = self.database.reading() else { return DiskUsage::default() };
        let mut physical_bytes = reading.property(PAYLOAD, "rocksdb.total-blob-file-size");
        for family in [INDEX, PAYLOAD, CONVERSATION] {
            physical_bytes += reading.property(family, "rocksdb.total-sst-files-size");
            physical_bytes += reading.property(family, "rocksdb.cur-size-all-mem-tables");
        }
        DiskUsage { physical_bytes, direct_io: false }
    }

    fn reclaim(&self) -> Result<(), DiskError> {
        let reading = self.database.reading()?;
        let flushed = reading.db().flush_cf(reading.family(PAYLOAD));
        flushed.map_err(self.database.error("flushing payloads"))?;
        reading.db().compact_range_cf(reading.family(PAYLOAD), None::<&[u8]>, None::<&[u8]>);
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        let reading = self.database.reading()?;
        reading.db().flush_wal(true).map_err(self.database.error("syncing the log"))
    }

    /// Opens the database again and tries a write; a drive that takes none costs no read.
    fn probe(&self) -> Result<(), DiskError> {
        self.database.try_write()?;
        self.database.reopen()?;
        self.apply("trying a write", |_, batch| batch.put(PROBE_KEY, []))?;
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::disk::tests::{TestBlock, block_of, write_all};
    use kv_protocol::geometry::LayerSet;
    use kv_protocol::{Dtype, Variant};

    fn geometry() -> Geometry {
        Geometry::new(4, 2, 1, 4, Dtype::F16, LayerSet::all(2)).unwrap()
    }

    fn write(tier: &RocksTier, number: u32) -> TestBlock {
        let block = block_of(&geometry(), number, Variant::Exact);
        assert_eq!(write_all(tier, &geometry(), std::slice::from_ref(&block), 1), [true]);
        block
    }

    fn change(tier: &RocksTier, family: &str, key: &[u8], change: impl Fn(&mut Vec<u8>)) {
        let reading = tier.database.reading().unwrap();
        let mut value = reading.db().get_cf(reading.family(family), key).unwrap().unwrap();
        change(&mut value);
        reading.db().put_cf(reading.family(family), key, value).unwrap();
    }

    #[test]
    fn a_torn_index_entry_is_dropped_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let mut tier = RocksTier::open(dir.path(), 1 << 24).unwrap();
        let (good, torn) = (write(&tier, 1), write(&tier, 2));
        change(&tier, INDEX, &torn.header.key.0, |entry| entry.truncate(entry.len() / 2));
        let mut blocks = Vec::new();
        let corrupt = tier.load(&mut |block| blocks.push(block.key), &mut |_| {}).unwrap();
        assert_eq!((blocks, corrupt), (vec![good.header.key], 1));
    }

    #[test]
    fn a_store_of_an_unknown_version_is_set_aside_and_one_without_a_version_is_ours() {
        let dir = tempfile::tempdir().unwrap();
        let open = || RocksTier::open(dir.path(), 1 << 24).unwrap();
        let blocks = |mut tier: RocksTier| {
            let mut blocks = 0;
            tier.load(&mut |_| blocks += 1, &mut |_| {}).unwrap();
            blocks
        };
        let tier = open();
        write(&tier, 1);
        tier.apply("a test", |_, batch| batch.delete(FORMAT_KEY)).unwrap();
        drop(tier);
        assert_eq!(blocks(open()), 1, "as the first builds left it");
        change(&open(), "default", FORMAT_KEY, |version| version[0] = 77);
        assert_eq!(blocks(open()), 0);
        assert!(dir.path().join("blobdb.version-77-1/CURRENT").exists());
        write(&open(), 2);
        assert_eq!(blocks(open()), 1, "the new store goes on");
    }

    #[test]
    fn a_corrupt_record_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let tier = RocksTier::open(dir.path(), 1 << 24).unwrap();
        let id = ConversationId([9; 32]);
        tier.put_conversation(&id, 7, b"record").unwrap();
        change(&tier, CONVERSATION, &id.0, |record| *record.last_mut().unwrap() ^= 1);
        assert_eq!(tier.get_conversation(&id).unwrap(), None);
    }

    #[test]
    fn a_probe_of_a_drive_that_takes_no_writes_costs_no_read() {
        let dir = tempfile::tempdir().unwrap();
        let tier = RocksTier::open(dir.path(), 1 << 24).unwrap();
        let block = write(&tier, 1);
        std::fs::create_dir(dir.path().join("probe")).unwrap(); // No file can be written there.
        tier.probe().unwrap_err();
        let reading = tier.database.reading().unwrap();
        let found = reading.db().get_cf(reading.family(PAYLOAD), block.header.key.0).unwrap();
        assert!(found.is_some());
    }

    #[test]
    fn reclaim_gives_the_space_of_removed_blocks_back() {
        let dir = tempfile::tempdir().unwrap();
        let tier = RocksTier::open(dir.path(), 1 << 24).unwrap();
        let wide = Geometry::new(64, 16, 4, 64, Dtype::F16, LayerSet::all(16)).unwrap();
        let blocks: Vec<_> = (0..8).map(|n| block_of(&wide, n, Variant::Exact)).collect();
        assert_eq!(write_all(&tier, &wide, &blocks, 1), [true; 8]);
        tier.reclaim().unwrap();
        let before = tier.usage().physical_bytes;
        let keys: Vec<_> = blocks[..6].iter().map(|block| block.header.key).collect();
        tier.remove(&keys).unwrap();
        tier.reclaim().unwrap();
        let after = tier.usage().physical_bytes;
        assert!(after < before / 2, "{before} bytes before, {after} after");
    }
}
