//! RocksDB as the whole disk tier: payloads in a BlobDB column family, index and conversation records
//! beside them. Byte tables: docs/disk-format.md.
//!
//! The WAL is on and payloads go through it (written twice: the price of one atomic batch a block; slot
//! files, the default engine, do better). It is not synced at each write: a killed process loses
//! nothing, a loss of power loses the newest blocks, and both leave a consistent index.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use kv_protocol::geometry::GEOMETRY_BYTES;
use kv_protocol::{BlockHeader, BlockKey, ConversationId, Geometry};
use rocksdb::{
    ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode, IteratorMode,
    Options, WriteBatch, WriteOptions,
};

use super::{
    DiskError, DiskTier, DiskUsage, Engine, NewBlock, StoredBlock, StoredConversation, WriteFailure,
};

const INDEX: &str = "index";
const PAYLOAD: &str = "payload";
const CONVERSATION: &str = "conversation";
/// Version of the index entry, first in it.
const ENTRY_VERSION: u32 = 1;
/// version u32 ‖ reserved u32 ‖ order u64 ‖ geometry 64.
const ENTRY_FIXED_BYTES: usize = 16 + GEOMETRY_BYTES;
/// updated_ms u64 ‖ CRC32C of the record u32 ‖ reserved u32.
const RECORD_FIXED_BYTES: usize = 16;
/// Blob files are this share of the tier, so that whole files die as blocks leave in write order.
const BLOB_FILE_SHARE: u64 = 32;
const BLOB_FILE_BYTES_MAX: u64 = 256 << 20;
const BLOB_FILE_BYTES_MIN: u64 = 1 << 20;
/// Bytes in memory before blobs are written out; replayed from the WAL after a kill.
const WRITE_BUFFER_BYTES: usize = 32 << 20;
/// Bounds the replay after a kill.
const WAL_BYTES_MAX: u64 = 128 << 20;

/// What both engines ask of a database: made when missing, whole up to the last good entry of its log, few
/// threads, few and small logs of its own.
pub fn database_options(wal_bytes_max: u64) -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    options.set_max_total_wal_size(wal_bytes_max);
    options.set_max_background_jobs(2);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options
}

/// See the module.
pub struct RocksTier {
    dir: PathBuf,
    db: DB,
    /// The first failed write: the store takes no more of them ("poisoned"), reads go on.
    failed: Mutex<Option<String>>,
}

impl RocksTier {
    /// Opens or makes the store; `disk_bytes` sizes its files.
    pub fn open(dir: &Path, disk_bytes: u64) -> Result<Self, DiskError> {
        let mut options = database_options(WAL_BYTES_MAX);
        options.set_recycle_log_file_num(0);
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
        let dir = dir.to_owned();
        let db = DB::open_cf_descriptors(&options, &dir, families).map_err(|error| {
            DiskError::Database { dir: dir.clone(), what: "opening", message: error.to_string() }
        })?;
        Ok(Self { dir, db, failed: Mutex::new(None) })
    }

    fn family(&self, name: &str) -> &ColumnFamily {
        self.db.cf_handle(name).expect("every family was opened by `open`")
    }

    fn error(&self, what: &'static str) -> impl Fn(rocksdb::Error) -> DiskError + '_ {
        move |error| DiskError::Database { dir: self.dir.clone(), what, message: error.to_string() }
    }

    /// Writes a batch; after a failure no more are taken, since what RocksDB holds is then unknown.
    fn apply(&self, what: &'static str, batch: WriteBatch) -> Result<(), DiskError> {
        let mut failed = self.failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(message) = failed.clone() {
            return Err(DiskError::Poisoned { message });
        }
        self.db.write_opt(batch, &WriteOptions::default()).map_err(|error| {
            *failed = Some(error.to_string());
            self.error(what)(error)
        })
    }
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

/// Bytes of a conversation record, in this store and in the slots' index.
pub fn encode_record(updated_ms: u64, record: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(RECORD_FIXED_BYTES + record.len());
    value.extend_from_slice(&updated_ms.to_le_bytes());
    value.extend_from_slice(&crc32c::crc32c(record).to_le_bytes());
    value.extend_from_slice(&[0; 4]);
    value.extend_from_slice(record);
    value
}

/// Time and bytes of a record, if it is whole.
pub fn decode_record(value: &[u8]) -> Option<(u64, &[u8])> {
    let (fixed, record) = value.split_at_checked(RECORD_FIXED_BYTES)?;
    let updated_ms = u64::from_le_bytes(fixed[0..8].try_into().ok()?);
    let crc = u32::from_le_bytes(fixed[8..12].try_into().ok()?);
    (crc32c::crc32c(record) == crc).then_some((updated_ms, record))
}

impl DiskTier for RocksTier {
    fn load(
        &mut self,
        block: &mut dyn FnMut(StoredBlock),
        conversation: &mut dyn FnMut(StoredConversation),
    ) -> Result<u64, DiskError> {
        let (mut corrupt, mut count) = (WriteBatch::default(), 0);
        for entry in self.db.iterator_cf(self.family(INDEX), IteratorMode::Start) {
            let (key, value) = entry.map_err(self.error("reading the index"))?;
            if let Some(stored) = decode_entry(&key, &value) {
                block(stored);
            } else {
                count += 1;
                corrupt.delete_cf(self.family(INDEX), &key);
                corrupt.delete_cf(self.family(PAYLOAD), &key);
            }
        }
        for entry in self.db.iterator_cf(self.family(CONVERSATION), IteratorMode::Start) {
            let (key, value) = entry.map_err(self.error("reading conversations"))?;
            let entry = (<[u8; 32]>::try_from(&*key), decode_record(&value));
            if let (Ok(id), Some((updated_ms, record))) = entry {
                let bytes = record.len() as u64;
                conversation(StoredConversation { id: ConversationId(id), updated_ms, bytes });
            } else {
                count += 1;
                corrupt.delete_cf(self.family(CONVERSATION), &key);
            }
        }
        if count > 0 {
            self.apply("removing corrupt entries", corrupt)?;
        }
        Ok(count)
    }

    fn write(&self, blocks: &[NewBlock<'_>]) -> Vec<Result<(), WriteFailure>> {
        let write = |block: &NewBlock<'_>| {
            let (geometry, key) = (block.geometry, block.header.key.0);
            let header = block.header.encode(geometry);
            let mut record = vec![0; header.len() + geometry.payload_bytes() as usize];
            record[..header.len()].copy_from_slice(&header);
            if !(block.fill)(&mut record[header.len()..]) {
                return Err(WriteFailure::Checksum);
            }
            let mut batch = WriteBatch::default();
            batch.put_cf(self.family(PAYLOAD), key, &record);
            batch.put_cf(self.family(INDEX), key, encode_entry(geometry, &header, block.order));
            self.apply("writing a block", batch).map_err(WriteFailure::Disk)
        };
        blocks.iter().map(write).collect()
    }

    fn read(&self, key: &BlockKey, sink: &mut dyn FnMut(&[u8])) -> Result<bool, DiskError> {
        let found = self.db.get_pinned_cf(self.family(PAYLOAD), key.0);
        let Some(value) = found.map_err(self.error("reading a block"))? else { return Ok(false) };
        sink(&value);
        Ok(true)
    }

    fn remove(&self, keys: &[BlockKey]) -> Result<(), DiskError> {
        let mut batch = WriteBatch::default();
        for key in keys {
            batch.delete_cf(self.family(INDEX), key.0);
            batch.delete_cf(self.family(PAYLOAD), key.0);
        }
        self.apply("removing blocks", batch)
    }

    fn put_conversation(
        &self,
        id: &ConversationId,
        updated_ms: u64,
        record: &[u8],
    ) -> Result<(), DiskError> {
        let mut batch = WriteBatch::default();
        batch.put_cf(self.family(CONVERSATION), id.0, encode_record(updated_ms, record));
        self.apply("writing a conversation record", batch)
    }

    fn get_conversation(&self, id: &ConversationId) -> Result<Option<Vec<u8>>, DiskError> {
        let value = self.db.get_pinned_cf(self.family(CONVERSATION), id.0);
        let value = value.map_err(self.error("reading a conversation record"))?;
        Ok(value.and_then(|value| decode_record(&value).map(|(_, record)| record.to_vec())))
    }

    fn remove_conversation(&self, id: &ConversationId) -> Result<(), DiskError> {
        let mut batch = WriteBatch::default();
        batch.delete_cf(self.family(CONVERSATION), id.0);
        self.apply("removing a conversation record", batch)
    }

    fn usage(&self) -> DiskUsage {
        let property = |family, name| {
            self.db.property_int_value_cf(self.family(family), name).ok().flatten().unwrap_or(0)
        };
        let mut physical_bytes = property(PAYLOAD, "rocksdb.total-blob-file-size");
        for family in [INDEX, PAYLOAD, CONVERSATION] {
            physical_bytes += property(family, "rocksdb.total-sst-files-size");
            physical_bytes += property(family, "rocksdb.cur-size-all-mem-tables");
        }
        DiskUsage { physical_bytes, direct_io: false }
    }

    fn reclaim(&self) -> Result<(), DiskError> {
        self.db.flush_cf(self.family(PAYLOAD)).map_err(self.error("flushing payloads"))?;
        self.db.compact_range_cf(self.family(PAYLOAD), None::<&[u8]>, None::<&[u8]>);
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.db.flush_wal(true).map_err(self.error("syncing the log"))
    }

    /// A failed database stays so: the worker opens it anew.
    fn probe(&self) -> Result<(), DiskError> {
        let failed = self.failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        failed.clone().map_or(Ok(()), |message| Err(DiskError::Poisoned { message }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_protocol::geometry::LayerSet;
    use kv_protocol::{Dtype, Fingerprint, Generation, NumericsTag, RootKey, Variant};

    fn geometry() -> Geometry {
        Geometry::new(4, 2, 1, 4, Dtype::F16, LayerSet::all(2)).unwrap()
    }

    fn header(tokens: &[u32], payload: &[u8]) -> BlockHeader {
        let root = RootKey::new(&Fingerprint([1; 32]), b"");
        let rows = payload.chunks_exact(geometry().row_bytes() as usize);
        BlockHeader {
            key: BlockKey::child(&root.as_parent(), tokens),
            parent: root.as_parent(),
            root,
            variant: Variant::Exact,
            numerics: NumericsTag::of("test"),
            generation: Generation(0),
            created_ms: 1,
            tokens: tokens.to_vec(),
            checksums: rows.map(crc32c::crc32c).collect(),
        }
    }

    fn write(tier: &RocksTier, tokens: &[u32], order: u64) -> BlockHeader {
        let payload = vec![tokens[0] as u8; geometry().payload_bytes() as usize];
        let header = header(tokens, &payload);
        let fill = |to: &mut [u8]| {
            to.copy_from_slice(&payload);
            true
        };
        let block = NewBlock { geometry: &geometry(), header: &header, order, fill: &fill };
        assert!(tier.write(&[block])[0].is_ok());
        header
    }

    fn load(tier: &mut RocksTier) -> (Vec<StoredBlock>, u64) {
        let mut blocks = Vec::new();
        let corrupt = tier.load(&mut |block| blocks.push(block), &mut |_| {}).unwrap();
        (blocks, corrupt)
    }

    #[test]
    fn blocks_and_records_survive_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let id = ConversationId([9; 32]);
        let header = {
            let tier = RocksTier::open(dir.path(), 1 << 24).unwrap();
            tier.put_conversation(&id, 7, b"record").unwrap();
            write(&tier, &[1, 2, 3, 4], 5)
        };
        let mut tier = RocksTier::open(dir.path(), 1 << 24).unwrap();
        let (blocks, corrupt) = load(&mut tier);
        assert_eq!((blocks.len(), corrupt), (1, 0));
        assert_eq!((blocks[0].key, blocks[0].order), (header.key, 5));
        let mut bytes = Vec::new();
        assert!(tier.read(&header.key, &mut |value| bytes = value.to_vec()).unwrap());
        let (_, payload) = bytes.split_at(BlockHeader::bytes(&geometry()));
        assert!(super::super::check_rows(&header, &geometry(), payload, |_, _| {}));
        assert_eq!(tier.get_conversation(&id).unwrap().as_deref(), Some(&b"record"[..]));
    }

    #[test]
    fn a_removed_block_is_gone_from_index_and_payload() {
        let dir = tempfile::tempdir().unwrap();
        let mut tier = RocksTier::open(dir.path(), 1 << 24).unwrap();
        let header = write(&tier, &[1], 1);
        tier.remove(&[header.key]).unwrap();
        assert!(!tier.read(&header.key, &mut |_| {}).unwrap());
        assert!(load(&mut tier).0.is_empty());
    }

    #[test]
    fn a_torn_index_entry_is_dropped_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let mut tier = RocksTier::open(dir.path(), 1 << 24).unwrap();
        let good = write(&tier, &[1], 1);
        let torn = write(&tier, &[2], 2);
        let entry = tier.db.get_cf(tier.family(INDEX), torn.key.0).unwrap().unwrap();
        tier.db.put_cf(tier.family(INDEX), torn.key.0, &entry[..entry.len() / 2]).unwrap();
        let (blocks, corrupt) = load(&mut tier);
        assert_eq!((blocks.len(), corrupt), (1, 1));
        assert_eq!(blocks[0].key, good.key);
    }

    #[test]
    fn a_corrupt_record_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let tier = RocksTier::open(dir.path(), 1 << 24).unwrap();
        let id = ConversationId([9; 32]);
        tier.put_conversation(&id, 7, b"record").unwrap();
        let mut value = tier.db.get_cf(tier.family(CONVERSATION), id.0).unwrap().unwrap();
        *value.last_mut().unwrap() ^= 1;
        tier.db.put_cf(tier.family(CONVERSATION), id.0, value).unwrap();
        assert_eq!(tier.get_conversation(&id).unwrap(), None);
    }

    #[test]
    fn reclaim_gives_the_space_of_removed_blocks_back() {
        let dir = tempfile::tempdir().unwrap();
        let tier = RocksTier::open(dir.path(), 1 << 24).unwrap();
        let wide = Geometry::new(64, 16, 4, 64, Dtype::F16, LayerSet::all(16)).unwrap();
        let payload = vec![7; wide.payload_bytes() as usize];
        let mut keys = Vec::new();
        for number in 0..8 {
            let mut header = header(&[number], &[]);
            header.checksums = vec![0; 16];
            let fill = |to: &mut [u8]| {
                to.copy_from_slice(&payload);
                true
            };
            let block =
                NewBlock { geometry: &wide, header: &header, order: number.into(), fill: &fill };
            assert!(tier.write(&[block])[0].is_ok());
            keys.push(header.key);
        }
        tier.reclaim().unwrap();
        let before = tier.usage().physical_bytes;
        tier.remove(&keys[..6]).unwrap();
        tier.reclaim().unwrap();
        let after = tier.usage().physical_bytes;
        assert!(after < before / 2, "{before} bytes before, {after} after");
    }
}
