//! Which engine keeps the payload, and what the store has to know about it.

use std::path::Path;

use kv_protocol::{BlockHeader, Geometry};

use super::rocks::RocksTier;
use super::slots::{self, Placement, SlotTier};
use super::{DiskError, DiskTier};

/// Engines of the disk tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// Preallocated files of equal slots, reused in place; RocksDB is the index only.
    Slots,
    /// The same files as segments: appended to, and reused when they are empty.
    Segments,
    /// RocksDB alone, payload in blob files.
    #[value(name = "blobdb")]
    BlobDb,
}

impl Engine {
    /// The engine of a folder where none was asked for: a store of an earlier version stays readable
    /// by its own engine.
    pub fn of_folder(dir: &Path) -> Self {
        let has = |placement: Placement| dir.join(placement.folder()).exists();
        if has(Placement::InPlace) {
            Engine::Slots
        } else if has(Placement::Append) {
            Engine::Segments
        } else if dir.join("CURRENT").exists() {
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
            Engine::Slots => Box::new(SlotTier::open(dir, disk_bytes, Placement::InPlace)?),
            Engine::Segments => Box::new(SlotTier::open(dir, disk_bytes, Placement::Append)?),
            Engine::BlobDb => Box::new(RocksTier::open(dir, disk_bytes)?),
        })
    }

    /// For `/status`.
    pub fn label(self) -> &'static str {
        match self {
            Engine::Slots => "slots",
            Engine::Segments => "segments",
            Engine::BlobDb => "blobdb",
        }
    }

    /// Bytes that a block takes.
    pub fn block_bytes(self, geometry: &Geometry) -> u64 {
        match self {
            Engine::Slots | Engine::Segments => slots::slot_bytes(geometry),
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

    /// Of the disk's bytes, what blocks may take; the rest is for index, records and garbage. Segments that
    /// are full of blocks are not reclaimed: a tenth of them is left free to choose among.
    pub fn stored_percent(self) -> u64 {
        match self {
            Engine::Slots | Engine::BlobDb => 80,
            Engine::Segments => 70,
        }
    }
}
