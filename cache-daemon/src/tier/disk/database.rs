//! A RocksDB that takes no writes after one failed, until it is opened again: what it holds is unknown
//! until then. Conversation records, which every engine keeps alike.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use kv_protocol::ConversationId;
use rocksdb::{
    BottommostLevelCompaction, ColumnFamily, CompactOptions, DB, DBRecoveryMode, ErrorKind,
    IteratorMode, Options, WriteBatch, WriteOptions,
};

use super::{DiskError, StoredConversation};

/// Column family of the records; whoever opens a [`Database`] makes it.
pub const CONVERSATION: &str = "conversation";
/// updated_ms u64 ‖ CRC32C of the record u32 ‖ reserved u32.
const RECORD_FIXED_BYTES: usize = 16;
/// The system's words in RocksDB's.
const NO_SUCH_FILE: &str = "No such file or directory";

/// What all engines ask of a database: made when missing, whole up to the last good entry of its log, few
/// threads, few and small logs of its own.
pub fn database_options(wal_bytes_max: u64) -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    options.set_recycle_log_file_num(0); // An old log would keep what was erased.
    options.set_max_total_wal_size(wal_bytes_max);
    options.set_max_background_jobs(2);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options
}

type Open = Box<dyn Fn(&Path) -> Result<DB, rocksdb::Error> + Send + Sync>;

struct State {
    db: Option<DB>,
    failed: Option<String>,
}

/// See the module.
pub struct Database {
    dir: PathBuf,
    /// For errors.
    name: &'static str,
    open: Open,
    syncs: bool,
    state: RwLock<State>,
}

/// The database is there and may be read.
pub struct Reading<'a>(RwLockReadGuard<'a, State>);

impl Reading<'_> {
    /// RocksDB itself.
    pub fn db(&self) -> &DB {
        self.0.db.as_ref().expect("`Database::reading` has looked")
    }

    /// A family that `open` made.
    pub fn family(&self, name: &str) -> &ColumnFamily {
        self.db().cf_handle(name).expect("every family was opened with the database")
    }

    /// A number that RocksDB knows of a family.
    pub fn property(&self, family: &str, name: &str) -> u64 {
        self.db().property_int_value_cf(self.family(family), name).ok().flatten().unwrap_or(0)
    }
}

impl Database {
    /// Opens or makes it by `open`; `syncs` says whether each write is synced.
    pub fn open(
        dir: &Path,
        name: &'static str,
        syncs: bool,
        open: impl Fn(&Path) -> Result<DB, rocksdb::Error> + Send + Sync + 'static,
    ) -> Result<Self, DiskError> {
        let state = RwLock::new(State { db: None, failed: None });
        let database = Self { dir: dir.to_owned(), name, open: Box::new(open), syncs, state };
        database.reopen()?;
        Ok(database)
    }

    /// Closes the database and opens it again: after a failed write.
    pub fn reopen(&self) -> Result<(), DiskError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.db = None; // Closed first: its lock file is its own.
        state.db = Some((self.open)(&self.dir).map_err(self.error("opening"))?);
        state.failed = None;
        Ok(())
    }

    /// Whether the drive takes a small write. A database that was closed and cannot be opened again gives
    /// nothing, so whoever reopens one in doubt asks this first.
    pub fn try_write(&self) -> Result<(), DiskError> {
        let path = self.dir.join("probe");
        let written = File::create(&path).and_then(|mut file| {
            file.write_all(&[0; 4096])?;
            file.sync_data()?;
            std::fs::remove_file(&path)
        });
        written.map_err(|source| DiskError::Io { what: "trying a write", source })
    }

    /// Lets go of the database: nothing can be read until `reopen`.
    pub fn close(&self) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).db = None;
    }

    /// RocksDB's error as ours.
    pub fn error(&self, what: &'static str) -> impl Fn(rocksdb::Error) -> DiskError + '_ {
        move |error| {
            let (dir, message) = (self.dir.clone(), error.to_string());
            match error.kind() {
                // A manifest that is gone or garbled is told as an invalid argument.
                ErrorKind::Corruption | ErrorKind::InvalidArgument => {
                    DiskError::Corrupt { what: self.name, message }
                }
                // So is a name in it that a flipped bit made another file's; RocksDB has no kind for it.
                ErrorKind::IOError if message.contains(NO_SUCH_FILE) => {
                    DiskError::Corrupt { what: self.name, message }
                }
                _ => DiskError::Database { dir, what, message },
            }
        }
    }

    /// Keeps the database open while the value lives.
    pub fn reading(&self) -> Result<Reading<'_>, DiskError> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        if state.db.is_none() {
            let message = "it could not be opened again".to_owned();
            let dir = self.dir.clone();
            return Err(DiskError::Database { dir, what: "reading", message });
        }
        Ok(Reading(state))
    }

    /// The first failed write since it was opened.
    fn check(reading: &Reading<'_>) -> Result<(), DiskError> {
        match &reading.0.failed {
            Some(message) => Err(DiskError::Poisoned { message: message.clone() }),
            None => Ok(()),
        }
    }

    fn fail<T>(&self, result: Result<T, DiskError>) -> Result<T, DiskError> {
        if let Err(error) = &result {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            state.failed.get_or_insert(error.to_string());
        }
        result
    }

    /// Writes what `fill` puts into a batch, if `before` allows it.
    pub fn apply(
        &self,
        what: &'static str,
        before: impl FnOnce() -> io::Result<()>,
        fill: impl FnOnce(&Reading<'_>, &mut WriteBatch),
    ) -> Result<(), DiskError> {
        let result = {
            let reading = self.reading()?;
            Self::check(&reading)?;
            let mut batch = WriteBatch::default();
            fill(&reading, &mut batch);
            let mut options = WriteOptions::default();
            options.set_sync(self.syncs);
            let allowed = before().map_err(|source| DiskError::Io { what, source });
            allowed.and_then(|()| reading.db().write_opt(batch, &options).map_err(self.error(what)))
        };
        self.fail(result)
    }

    /// After removals: no log, table or manifest holds what was removed. Rewrites the families in `whole`,
    /// and of the records' what lies around `records`.
    pub fn purge(&self, whole: &[&str], records: &[ConversationId]) -> Result<(), DiskError> {
        let purged = {
            let reading = self.reading()?;
            Self::check(&reading)?;
            let db = reading.db();
            let mut options = CompactOptions::default();
            // Else the last level, where old values and the marks of their removal meet, stays as it is.
            options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
            let flush = |name: &&str| db.flush_cf(reading.family(name));
            // All: a log is old when none of the families needs it.
            let flushed = ["default", CONVERSATION].iter().chain(whole).try_for_each(flush);
            flushed.map_err(self.error("flushing")).and_then(|()| {
                let failures = reading.property("default", "rocksdb.background-errors");
                for name in whole {
                    let family = reading.family(name);
                    db.compact_range_cf_opt(family, None::<&[u8]>, None::<&[u8]>, &options);
                }
                for id in records {
                    let family = reading.family(CONVERSATION);
                    db.compact_range_cf_opt(family, Some(id.0), Some(id.0), &options);
                }
                // The calls give no result.
                if reading.property("default", "rocksdb.background-errors") > failures {
                    let (dir, what) = (self.dir.clone(), "compacting");
                    let message = "a compaction failed; RocksDB's LOG tells why".to_owned();
                    return Err(DiskError::Database { dir, what, message });
                }
                Ok(())
            })
        };
        self.fail(purged)?;
        // Old files are deleted in the background, and the manifest names their keys: both end here.
        self.reopen()
    }

    /// Gives every record to `found`; those that are not right are removed and counted.
    pub fn scan_records(
        &self,
        before: impl FnOnce() -> io::Result<()>,
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
                    found(StoredConversation::read(ConversationId(id), updated_ms, record));
                } else {
                    wrong.push(key);
                }
            }
        }
        if !wrong.is_empty() {
            self.apply("removing corrupt records", before, |reading, batch| {
                for key in &wrong {
                    batch.delete_cf(reading.family(CONVERSATION), key);
                }
            })?;
        }
        Ok(wrong.len() as u64)
    }

    /// Fetches a record.
    pub fn get_record(&self, id: &ConversationId) -> Result<Option<Vec<u8>>, DiskError> {
        let reading = self.reading()?;
        let value = reading.db().get_pinned_cf(reading.family(CONVERSATION), id.0);
        let value = value.map_err(self.error("reading a conversation record"))?;
        Ok(value.and_then(|value| decode_record(&value).map(|(_, record)| record.to_vec())))
    }
}

/// Bytes of a conversation record.
pub fn encode_record(updated_ms: u64, record: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(RECORD_FIXED_BYTES + record.len());
    value.extend_from_slice(&updated_ms.to_le_bytes());
    value.extend_from_slice(&crc32c::crc32c(record).to_le_bytes());
    value.extend_from_slice(&[0; 4]);
    value.extend_from_slice(record);
    value
}

/// Time and bytes of a record, if it is whole.
fn decode_record(value: &[u8]) -> Option<(u64, &[u8])> {
    let (fixed, record) = value.split_at_checked(RECORD_FIXED_BYTES)?;
    let updated_ms = u64::from_le_bytes(fixed[0..8].try_into().ok()?);
    let crc = u32::from_le_bytes(fixed[8..12].try_into().ok()?);
    (crc32c::crc32c(record) == crc).then_some((updated_ms, record))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_with_a_flipped_bit_is_none() {
        let value = encode_record(7, b"record");
        assert_eq!(decode_record(&value), Some((7, &b"record"[..])));
        for bit in 0..8 * value.len() {
            let mut value = value.clone();
            value[bit / 8] ^= 1 << (bit % 8);
            let found = decode_record(&value);
            assert!(found.is_none_or(|(_, record)| record == b"record"), "bit {bit}");
        }
    }
}
