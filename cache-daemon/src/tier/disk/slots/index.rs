//! The index of slots in RocksDB: where each block is, and the conversation records. No payload.
//!
//! Each write is synced: what the index says has happened. After a failed write the database takes no
//! more until it is opened again (`reopen`), since what it holds is then unknown.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use kv_protocol::{BlockKey, ConversationId};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType,
    ErrorKind, IteratorMode, Options, ReadOptions, WriteBatch, WriteOptions,
};

use super::format::{Entry, INDEX_VERSION, decode_entry};
use super::media::Media;
use crate::tier::disk::rocks::{database_options, decode_record, encode_record};
use crate::tier::disk::{DiskError, StoredConversation};

const INDEX: &str = "index";
const CONVERSATION: &str = "conversation";
/// In the default family: version u32 of the format; written last, when the index is complete.
const FORMAT_KEY: &[u8] = b"format";
/// The oldest version whose entries are read.
const INDEX_VERSION_READ: u32 = INDEX_VERSION - 1;
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

/// The system's words in RocksDB's.
const NO_SUCH_FILE: &str = "No such file or directory";

struct State {
    db: Option<DB>,
    failed: Option<String>,
}

/// See the module.
pub struct Index {
    dir: PathBuf,
    media: Arc<dyn Media>,
    state: RwLock<State>,
}

/// The database is there and may be read.
struct Reading<'a>(RwLockReadGuard<'a, State>);

impl Reading<'_> {
    fn db(&self) -> &DB {
        self.0.db.as_ref().expect("`Index::reading` has looked")
    }

    fn family(&self, name: &str) -> &ColumnFamily {
        self.db().cf_handle(name).expect("every family was opened by `open_database`")
    }
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
        let state = RwLock::new(State { db: None, failed: None });
        let index = Self { dir: dir.to_owned(), media, state };
        index.reopen()?;
        Ok(index)
    }

    /// Closes the database and opens it again: after a failed write.
    pub fn reopen(&self) -> Result<(), DiskError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.db = None; // Closed first: its lock file is its own.
        state.db = Some(open_database(&self.dir).map_err(self.error("opening the index"))?);
        state.failed = None;
        Ok(())
    }

    /// Lets go of the database: nothing can be read until `reopen`.
    pub fn close(&self) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).db = None;
    }

    fn error(&self, what: &'static str) -> impl Fn(rocksdb::Error) -> DiskError + '_ {
        move |error| {
            let (dir, message) = (self.dir.clone(), error.to_string());
            match error.kind() {
                // A manifest that is gone or garbled is told as an invalid argument.
                ErrorKind::Corruption | ErrorKind::InvalidArgument => {
                    DiskError::Corrupt { what: "index", message }
                }
                // So is a name in it that a flipped bit made another file's; RocksDB has no kind for it.
                ErrorKind::IOError if message.contains(NO_SUCH_FILE) => {
                    DiskError::Corrupt { what: "index", message }
                }
                _ => DiskError::Database { dir, what, message },
            }
        }
    }

    fn reading(&self) -> Result<Reading<'_>, DiskError> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        if state.db.is_none() {
            let message = "it could not be opened again".to_owned();
            let dir = self.dir.clone();
            return Err(DiskError::Database { dir, what: "reading the index", message });
        }
        Ok(Reading(state))
    }

    /// Writes and syncs what `fill` puts into a batch.
    fn apply(
        &self,
        what: &'static str,
        fill: impl FnOnce(&Reading<'_>, &mut WriteBatch),
    ) -> Result<(), DiskError> {
        let result = {
            let reading = self.reading()?;
            if let Some(message) = &reading.0.failed {
                return Err(DiskError::Poisoned { message: message.clone() });
            }
            let mut batch = WriteBatch::default();
            fill(&reading, &mut batch);
            let mut options = WriteOptions::default();
            options.set_sync(true);
            let allowed = self.media.before_index_write();
            let allowed = allowed.map_err(|source| DiskError::Io { what, source });
            allowed.and_then(|()| reading.db().write_opt(batch, &options).map_err(self.error(what)))
        };
        if let Err(error) = &result {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            state.failed.get_or_insert(error.to_string());
        }
        result
    }

    fn number(&self, key: &[u8]) -> Result<Option<u32>, DiskError> {
        let value = self.reading()?.db().get(key).map_err(self.error("reading the format"))?;
        Ok(value.and_then(|value| Some(u32::from_le_bytes(value.try_into().ok()?))))
    }

    /// Whether there is an index, and its making was not cut short.
    pub fn is_complete(&self) -> Result<bool, DiskError> {
        Ok(matches!(self.number(FORMAT_KEY)?, Some(INDEX_VERSION_READ..=INDEX_VERSION)))
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
        let reading = self.reading()?;
        let value = reading.db().get_pinned_cf(reading.family(INDEX), key.0);
        let value = value.map_err(self.error("reading the index"))?;
        Ok(value.and_then(|value| decode_entry(&key.0, &value)))
    }

    /// Gives every block to `block`; the keys of entries that are not right are returned.
    pub fn scan(&self, block: &mut dyn FnMut(Entry)) -> Result<Vec<Box<[u8]>>, DiskError> {
        let reading = self.reading()?;
        let mut wrong = Vec::new();
        let mut options = ReadOptions::default();
        options.set_readahead_size(SCAN_READAHEAD_BYTES);
        options.fill_cache(false); // It would leave nothing of what is asked for in it.
        let family = reading.family(INDEX);
        for item in reading.db().iterator_cf_opt(family, options, IteratorMode::Start) {
            let (key, value) = item.map_err(self.error("reading the index"))?;
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

    /// Gives every record to `found`; those that are not right are removed and counted.
    pub fn scan_records(
        &self,
        found: &mut dyn FnMut(StoredConversation),
    ) -> Result<u64, DiskError> {
        let mut wrong = Vec::new();
        {
            let reading = self.reading()?;
            for item in reading.db().iterator_cf(reading.family(CONVERSATION), IteratorMode::Start)
            {
                let (key, value) = item.map_err(self.error("reading conversations"))?;
                let known = (<[u8; 32]>::try_from(&*key), decode_record(&value));
                if let (Ok(id), Some((updated_ms, record))) = known {
                    let bytes = record.len() as u64;
                    found(StoredConversation { id: ConversationId(id), updated_ms, bytes });
                } else {
                    wrong.push(key);
                }
            }
        }
        if !wrong.is_empty() {
            self.apply("removing corrupt records", |reading, batch| {
                for key in &wrong {
                    batch.delete_cf(reading.family(CONVERSATION), key);
                }
            })?;
        }
        Ok(wrong.len() as u64)
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

    /// Fetches a record.
    pub fn get_record(&self, id: &ConversationId) -> Result<Option<Vec<u8>>, DiskError> {
        let reading = self.reading()?;
        let value = reading.db().get_pinned_cf(reading.family(CONVERSATION), id.0);
        let value = value.map_err(self.error("reading a conversation record"))?;
        Ok(value.and_then(|value| decode_record(&value).map(|(_, record)| record.to_vec())))
    }

    /// Forgets a record.
    pub fn remove_record(&self, id: &ConversationId) -> Result<(), DiskError> {
        self.apply("removing a conversation record", |reading, batch| {
            batch.delete_cf(reading.family(CONVERSATION), id.0);
        })
    }

    /// Bytes of the database, by its own account.
    pub fn physical_bytes(&self) -> u64 {
        let Ok(reading) = self.reading() else { return 0 };
        let property = |family, name| {
            let value = reading.db().property_int_value_cf(reading.family(family), name);
            value.ok().flatten().unwrap_or(0)
        };
        let families = [INDEX, CONVERSATION].map(|family| {
            property(family, "rocksdb.total-sst-files-size")
                + property(family, "rocksdb.cur-size-all-mem-tables")
        });
        families.iter().sum()
    }
}
