//! Which engine keeps the payload, and what the store has to know about it.

use std::path::Path;

use kv_protocol::{BlockHeader, Geometry};

use super::rocks::RocksTier;
use super::slots::{self, SlotTier};
use super::{DiskError, DiskTier};

/// Engines of the disk tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// Preallocated files of equal slots, reused in place; RocksDB is the index only.
    Slots,
    /// RocksDB alone, payload in blob files.
    #[value(name = "blobdb")]
    BlobDb,
}

impl Engine {
    /// The engine of a folder where none was asked for: a store of an earlier version stays readable
    /// by its own engine.
    pub fn of_folder(dir: &Path) -> Self {
        let has_blobs = dir.join("CURRENT").exists() && !dir.join(slots::FOLDER).exists();
        if has_blobs {
            tracing::info!(
                dir = %dir.display(),
                "the disk tier goes on with its BlobDB store; --disk-engine=slots, or an empty \
                 folder, starts a faster one"
            );
            Engine::BlobDb
        } else {
            Engine::Slots
        }
    }

    /// Opens or makes a store that takes at most `disk_bytes`.
    pub fn open(self, dir: &Path, disk_bytes: u64) -> Result<Box<dyn DiskTier>, DiskError> {
        Ok(match self {
            Engine::Slots => Box::new(SlotTier::open(dir, disk_bytes)?),
            Engine::BlobDb => Box::new(RocksTier::open(dir, disk_bytes)?),
        })
    }

    /// For `/status`.
    pub fn label(self) -> &'static str {
        match self {
            Engine::Slots => "slots",
            Engine::BlobDb => "blobdb",
        }
    }

    /// Bytes that a block takes.
    pub fn block_bytes(self, geometry: &Geometry) -> u64 {
        match self {
            Engine::Slots => slots::slot_bytes(geometry),
            // Payload, header in both families, keys.
            Engine::BlobDb => {
                geometry.payload_bytes() + 2 * BlockHeader::bytes(geometry) as u64 + 256
            }
        }
    }

    /// Whether removed blocks leave garbage that has to be collected.
    pub fn leaves_garbage(self) -> bool {
        self == Engine::BlobDb
    }

    /// Whether a store that failed can take writes again without being opened anew.
    pub fn recovers(self) -> bool {
        self == Engine::Slots
    }
}
