//! The index of slots in RocksDB: where each block is, and the conversation records. No payload.
//!
//! Each write is synced: what the index says has happened. After a failed write the database takes no
//! more until it is opened again (`reopen`).

use std::path::Path;
use std::sync::Arc;

use kv_protocol::{BlockKey, ConversationId};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBCompressionType, IteratorMode, Options,
    ReadOptions, WriteBatch,
};

use super::format::{Entry, INDEX_VERSION, decode_entry};
use super::media::Media;
use crate::tier::disk::database::{
    CONVERSATION, Database, Reading, database_options, encode_record,
};
use crate::tier::disk::{DiskError, StoredConversation};

const INDEX: &str = "index";
/// In the default family: version u32 of the format; written last, when the index is complete.
const FORMAT_KEY: &[u8] = b"format";
/// The oldest version whose entries are read.
pub const INDEX_VERSION_READ: u32 = INDEX_VERSION - 1;
/// In the default family: openings so far, u32; the upper half of each epoch.
const OPENINGS_KEY: &[u8] = b"openings";
/// Bounds the replay after a kill, and the log's share of the disk.
const WAL_BYTES_MAX: u64 = 16 << 20;
const WRITE_BUFFER_BYTES: usize = 8 << 20;
/// Of all families' blocks, filters and indices in memory: a million entries are in 250 MB of files, and
/// what is asked for is in few of their blocks.
const BLOCK_CACHE_BYTES: usize = 8 << 20;
/// Fewer index entries than RocksDB's 4 KiB make, and a fraction of what a miss then reads of a payload.
const TABLE_BLOCK_BYTES: usize = 16 << 10;
/// Most keys asked for when a block is written are new: one in a hundred reads a block for nothing.
const BLOOM_BITS_PER_KEY: f64 = 10.0;
/// Ahead of a walk through all entries.
const SCAN_READAHEAD_BYTES: usize = 2 << 20;

/// See the module.
pub struct Index {
    database: Database,
    media: Arc<dyn Media>,
}

fn open_database(dir: &Path) -> Result<DB, rocksdb::Error> {
    let mut options = database_options(WAL_BYTES_MAX);
    options.set_db_write_buffer_size(2 * WRITE_BUFFER_BYTES);
    let mut tables = BlockBasedOptions::default();
    tables.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_BYTES));
    tables.set_cache_index_and_filter_blocks(true);
    tables.set_block_size(TABLE_BLOCK_BYTES);
    tables.set_bloom_filter(BLOOM_BITS_PER_KEY, false);
    let family = |name| {
        let mut options = Options::default();
        options.set_block_based_table_factory(&tables);
        options.set_compression_type(DBCompressionType::None);
        options.set_write_buffer_size(WRITE_BUFFER_BYTES);
        ColumnFamilyDescriptor::new(name, options)
    };
    DB::open_cf_descriptors(&options, dir, ["default", INDEX, CONVERSATION].map(family))
}

/// Whether the bytes are wrong, as against a drive that does not give them.
pub fn is_corrupt(error: &DiskError) -> bool {
    matches!(error, DiskError::Corrupt { .. })
}

impl Index {
    /// Opens or makes the database.
    pub fn open(dir: &Path, media: Arc<dyn Media>) -> Result<Self, DiskError> {
        Ok(Self { database: Database::open(dir, "index", true, open_database)?, media })
    }

    /// See [`Database::reopen`].
    pub fn reopen(&self) -> Result<(), DiskError> {
        self.database.reopen()
    }

    /// See [`Database::close`].
    pub fn close(&self) {
        self.database.close();
    }

    fn error(&self) -> impl Fn(rocksdb::Error) -> DiskError + '_ {
        self.database.error("reading the index")
    }

    fn apply(
        &self,
        what: &'static str,
        fill: impl FnOnce(&Reading<'_>, &mut WriteBatch),
    ) -> Result<(), DiskError> {
        self.database.apply(what, || self.media.before_index_write(), fill)
    }

    fn number(&self, key: &[u8]) -> Result<Option<u32>, DiskError> {
        let value = self.database.reading()?.db().get(key).map_err(self.error())?;
        Ok(value.and_then(|value| Some(u32::from_le_bytes(value.try_into().ok()?))))
    }

    /// Of the format; `None` if there is no index, or its making was cut short.
    pub fn version(&self) -> Result<Option<u32>, DiskError> {
        self.number(FORMAT_KEY)
    }

    /// Marks the index as complete and begins a new opening, whose epochs are above all others:
    /// `above` is the highest opening seen in slots.
    pub fn begin(&self, above: u32) -> Result<u32, DiskError> {
        let opening = self.number(OPENINGS_KEY)?.unwrap_or(0).max(above) + 1;
        self.apply("beginning an opening", |_, batch| {
            batch.put(OPENINGS_KEY, opening.to_le_bytes());
            batch.put(FORMAT_KEY, INDEX_VERSION.to_le_bytes());
        })?;
        Ok(opening)
    }

    /// As if another version had written the index.
    #[cfg(test)]
    pub fn set_version(&self, version: u32) -> Result<(), DiskError> {
        self.apply("a test", |_, batch| batch.put(FORMAT_KEY, version.to_le_bytes()))
    }

    /// Adds blocks, all or none.
    pub fn put(&self, entries: &[(BlockKey, Vec<u8>)]) -> Result<(), DiskError> {
        self.apply("writing the index", |reading, batch| {
            for (key, entry) in entries {
                batch.put_cf(reading.family(INDEX), key.0, entry);
            }
        })
    }

    /// Forgets blocks.
    pub fn remove(&self, keys: &[BlockKey]) -> Result<(), DiskError> {
        self.apply("removing from the index", |reading, batch| {
            for key in keys {
                batch.delete_cf(reading.family(INDEX), key.0);
            }
        })
    }

    /// A block, if there is a right entry.
    pub fn get(&self, key: &BlockKey) -> Result<Option<Entry>, DiskError> {
        let reading = self.database.reading()?;
        let value = reading.db().get_pinned_cf(reading.family(INDEX), key.0);
        let value = value.map_err(self.error())?;
        Ok(value.and_then(|value| decode_entry(&key.0, &value)))
    }

    /// Gives every block to `block`; the keys of entries that are not right are returned.
    pub fn scan(&self, block: &mut dyn FnMut(Entry)) -> Result<Vec<Box<[u8]>>, DiskError> {
        let reading = self.database.reading()?;
        let mut wrong = Vec::new();
        let mut options = ReadOptions::default();
        options.set_readahead_size(SCAN_READAHEAD_BYTES);
        options.fill_cache(false); // It would leave nothing of what is asked for in it.
        let family = reading.family(INDEX);
        for item in reading.db().iterator_cf_opt(family, options, IteratorMode::Start) {
            let (key, value) = item.map_err(self.error())?;
            match decode_entry(&key, &value) {
                Some(entry) => block(entry),
                None => wrong.push(key),
            }
        }
        Ok(wrong)
    }

    /// Forgets entries by their raw keys.
    pub fn remove_wrong(&self, keys: &[Box<[u8]>]) -> Result<(), DiskError> {
        self.apply("removing corrupt entries", |reading, batch| {
            for key in keys {
                batch.delete_cf(reading.family(INDEX), key);
            }
        })
    }

    /// After removals: nothing of them is in the database's files. The blocks' family is small and its
    /// keys are scattered, so it is rewritten as a whole.
    pub fn purge(&self, any_blocks: bool, records: &[ConversationId]) -> Result<(), DiskError> {
        self.database.purge(if any_blocks { &[INDEX] } else { &[] }, records)
    }

    /// See [`Database::scan_records`].
    pub fn scan_records(
        &self,
        found: &mut dyn FnMut(StoredConversation),
    ) -> Result<u64, DiskError> {
        self.database.scan_records(|| self.media.before_index_write(), found)
    }

    /// Stores a record.
    pub fn put_record(
        &self,
        id: &ConversationId,
        updated_ms: u64,
        record: &[u8],
    ) -> Result<(), DiskError> {
        self.apply("writing a conversation record", |reading, batch| {
            batch.put_cf(reading.family(CONVERSATION), id.0, encode_record(updated_ms, record));
        })
    }

    /// See [`Database::get_record`].
    pub fn get_record(&self, id: &ConversationId) -> Result<Option<Vec<u8>>, DiskError> {
        self.database.get_record(id)
    }

    /// Forgets records.
    pub fn remove_records(&self, ids: &[ConversationId]) -> Result<(), DiskError> {
        self.apply("removing conversation records", |reading, batch| {
            for id in ids {
                batch.delete_cf(reading.family(CONVERSATION), id.0);
            }
        })
    }

    /// Bytes of the database, by its own account.
    pub fn physical_bytes(&self) -> u64 {
        let Ok(reading) = self.database.reading() else { return 0 };
        let bytes = |family| {
            reading.property(family, "rocksdb.total-sst-files-size")
                + reading.property(family, "rocksdb.cur-size-all-mem-tables")
        };
        [INDEX, CONVERSATION].map(bytes).iter().sum()
    }
}
