//! The stores measured: the daemon's engines, and one file per block as many systems do it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, ensure};
use cache_daemon::shm::map;
use cache_daemon::tier::disk::{
    DiskTier, Engine, GROUP_MAX, NewBlock, READERS, READS_AT_ONCE, check_rows, read_checked,
};
use kv_protocol::geometry::LayerSet;
use kv_protocol::table::RegionView;
use kv_protocol::{
    BlockHeader, BlockKey, Dtype, Fingerprint, Generation, Geometry, NumericsTag, RootKey, Span,
    Variant, layout,
};

/// Payloads that differ, so that no drive finds the same bytes again and again.
const PAYLOADS: usize = 4;
/// Bytes of a row (one layer of a block): as Llama-3.1-8B has them, or all of a smaller block.
const ROW_BYTES: u64 = 256 << 10;
/// Share of the tier that one file per block takes, as the daemon lets its engines.
const STORED_PERCENT: u64 = 80;

/// Blocks of one size, in frames of a region as a daemon has it.
pub struct Blocks {
    pub geometry: Geometry,
    /// Of each payload's rows.
    checksums: Vec<Vec<u32>>,
    memory: Mutex<Memory>,
}

struct Memory {
    payloads: Vec<Span>,
    /// To be read into, one a thread.
    frames: Vec<Span>,
}

impl Memory {
    fn new(geometry: &Geometry) -> anyhow::Result<Self> {
        let frames = (PAYLOADS + READERS) as u64;
        let frame_bytes = layout::FRAME_ENTRY_BYTES
            + BlockHeader::bytes(geometry) as u64
            + geometry.frame_bytes();
        let region_bytes = layout::FRAME_TABLE_AT + layout::PAGE_BYTES + frames * frame_bytes;
        let memfd = map::create(region_bytes, None)?;
        map::fault_extent(&memfd, 0, region_bytes)?;
        let table = RegionView::new(map::map(&memfd)?).format(*geometry)?;
        let mut frames: Vec<Span> = table.frames().map(|frame| table.payload(frame)).collect();
        let payloads: Vec<Span> = frames.drain(..PAYLOADS).collect();
        for (number, payload) in payloads.iter().enumerate() {
            payload.copy_in(0, &bytes_of(number, geometry));
        }
        Ok(Self { payloads, frames })
    }
}

/// Random bytes that follow from a payload's number.
fn bytes_of(number: usize, geometry: &Geometry) -> Vec<u8> {
    let mut bytes = vec![0; geometry.payload_bytes() as usize];
    blake3::Hasher::new_keyed(&[number as u8; 32]).finalize_xof().fill(&mut bytes);
    bytes
}

impl Blocks {
    /// Blocks of `bytes`, a multiple of a row.
    pub fn new(bytes: u64) -> anyhow::Result<Self> {
        let rows = (bytes / ROW_BYTES) as u16;
        let geometry = Geometry::new(64, rows, 8, 128, Dtype::F16, LayerSet::all(rows))?;
        ensure!(geometry.payload_bytes() == bytes, "{bytes} is not a whole number of rows");
        let checksums = |number| {
            let payload = bytes_of(number, &geometry);
            payload.chunks_exact(ROW_BYTES as usize).map(crc32c::crc32c).collect()
        };
        let checksums = (0..PAYLOADS).map(checksums).collect();
        Ok(Self { geometry, checksums, memory: Memory::new(&geometry)?.into() })
    }

    /// Other memory, as each pass of fio has: how fast a drive fills memory depends on where that is, on a
    /// virtual machine by half.
    pub fn renew(&self) -> anyhow::Result<()> {
        let new = Memory::new(&self.geometry)?;
        *self.memory.lock().expect("no panic") = new;
        Ok(())
    }

    pub fn bytes(&self) -> u64 {
        self.geometry.payload_bytes()
    }

    fn payload(&self, number: u32) -> Span {
        self.memory.lock().expect("no panic").payloads[number as usize % PAYLOADS].clone()
    }

    fn frames(&self, count: usize) -> Vec<Span> {
        self.memory.lock().expect("no panic").frames[..count].to_vec()
    }

    fn header(&self, number: u32) -> BlockHeader {
        let root = root();
        let parent = root.as_parent();
        let tokens: Vec<u32> = (0..64).map(|token| number * 64 + token).collect();
        BlockHeader {
            key: BlockKey::child(&parent, &tokens),
            parent,
            root,
            variant: Variant::Exact,
            numerics: NumericsTag::of("bench"),
            generation: Generation(0),
            created_ms: 1,
            tokens,
            checksums: self.checksums[number as usize % PAYLOADS].clone(),
        }
    }
}

fn root() -> RootKey {
    RootKey::new(&Fingerprint([1; 32]), b"")
}

enum Kind {
    Tier(Engine, Box<dyn DiskTier>),
    Files(PathBuf),
}

/// A store that is kept as full as the daemon keeps it: the oldest blocks go first.
pub struct Store<'a> {
    blocks: &'a Blocks,
    kind: Kind,
    live: Mutex<VecDeque<u32>>,
    next: Mutex<u32>,
    live_max: usize,
}

/// What of it is measured under which name.
pub const STORES: [&str; 4] = ["slots", "segments", "blobdb", "files"];

impl<'a> Store<'a> {
    /// An empty store of one of [`STORES`] in an empty folder.
    pub fn open(
        name: &str,
        dir: &Path,
        disk_bytes: u64,
        blocks: &'a Blocks,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let kind = match name {
            "slots" => Kind::Tier(Engine::Slots, Engine::Slots.open(dir, disk_bytes)?),
            "segments" => Kind::Tier(Engine::Segments, Engine::Segments.open(dir, disk_bytes)?),
            "blobdb" => Kind::Tier(Engine::BlobDb, Engine::BlobDb.open(dir, disk_bytes)?),
            _ => Kind::Files(dir.to_owned()),
        };
        let block_bytes = match &kind {
            Kind::Tier(engine, _) => engine.block_bytes(&blocks.geometry),
            Kind::Files(_) => blocks.bytes(),
        };
        let percent = match &kind {
            Kind::Tier(engine, _) => engine.stored_percent(),
            Kind::Files(_) => STORED_PERCENT,
        };
        let live_max = (disk_bytes / 100 * percent / block_bytes) as usize;
        ensure!(live_max > 16, "give --mib more");
        Ok(Self { blocks, kind, live: Mutex::default(), next: Mutex::new(0), live_max })
    }

    pub fn live_max(&self) -> usize {
        self.live_max
    }

    pub fn live_bytes(&self) -> u64 {
        self.live.lock().expect("no panic").len() as u64 * self.blocks.bytes()
    }

    /// Writes a group as the daemon's writer does: room first, then the blocks, durable at the end.
    pub fn write_group(&self, count: usize) -> anyhow::Result<()> {
        let count = count.min(GROUP_MAX).min(self.live_max);
        let (mut oldest, mut numbers) = (Vec::new(), Vec::new());
        {
            let (mut live, mut next) =
                (self.live.lock().expect("no panic"), self.next.lock().expect("no panic"));
            while live.len() + count > self.live_max {
                oldest.extend(live.pop_front());
            }
            for _ in 0..count {
                numbers.push(*next);
                *next += 1;
            }
        }
        match &self.kind {
            Kind::Tier(engine, tier) => {
                if !oldest.is_empty() {
                    let key = |number: &u32| self.blocks.header(*number).key;
                    tier.remove(&oldest.iter().map(key).collect::<Vec<_>>())?;
                }
                self.write_tier(&**tier, &numbers)?;
                let live = self.live_bytes() + numbers.len() as u64 * self.blocks.bytes();
                let garbage = tier.usage().physical_bytes.saturating_sub(live);
                // As the daemon does (`transfer.rs`).
                if engine.leaves_garbage() && garbage > 32 << 20 && garbage > live / 100 * 30 {
                    tier.reclaim()?;
                }
            }
            Kind::Files(dir) => {
                for number in oldest {
                    std::fs::remove_file(dir.join(number.to_string()))?;
                }
                for number in &numbers {
                    self.write_file(dir, *number)?;
                }
            }
        }
        self.live.lock().expect("no panic").extend(numbers);
        Ok(())
    }

    fn write_tier(&self, tier: &dyn DiskTier, numbers: &[u32]) -> anyhow::Result<()> {
        let headers: Vec<_> = numbers.iter().map(|number| self.blocks.header(*number)).collect();
        let payloads: Vec<_> = numbers.iter().map(|number| self.blocks.payload(*number)).collect();
        let blocks: Vec<NewBlock<'_>> = headers
            .iter()
            .zip(&payloads)
            .zip(numbers)
            .map(|((header, payload), number)| NewBlock {
                geometry: &self.blocks.geometry,
                header,
                order: u64::from(*number) + 1,
                payload,
            })
            .collect();
        let mut failures = Vec::new();
        tier.write(&blocks, &mut |_, result| failures.extend(result.err()));
        ensure!(failures.is_empty(), "blocks were not written: {failures:?}");
        Ok(())
    }

    fn write_file(&self, dir: &Path, number: u32) -> anyhow::Result<()> {
        let header = self.blocks.header(number);
        let payload = self.blocks.payload(number);
        ensure!(check_rows(&header, &self.blocks.geometry, &payload), "a frame is wrong");
        let mut bytes = vec![0; payload.bytes() as usize];
        payload.copy_out(0, &mut bytes);
        let (new, path) = (dir.join("new"), dir.join(number.to_string()));
        let mut file = File::create(&new)?;
        file.write_all(&header.encode(&self.blocks.geometry))?;
        file.write_all(&bytes)?;
        file.sync_data()?;
        Ok(std::fs::rename(new, path)?)
    }

    /// Reads a block into `frame`, checked as the daemon checks it.
    fn read(&self, number: u32, frame: &Span) -> anyhow::Result<()> {
        let geometry = &self.blocks.geometry;
        let key = self.blocks.header(number).key;
        match &self.kind {
            Kind::Tier(_, tier) => {
                let read = read_checked(&**tier, &key, &root(), geometry, frame);
                ensure!(read.is_ok(), "block {number} was not read: {read:?}");
            }
            Kind::Files(dir) => {
                let bytes = std::fs::read(dir.join(number.to_string()))?;
                let (header, payload) = bytes.split_at(BlockHeader::bytes(geometry));
                frame.copy_in(0, payload);
                let header = BlockHeader::decode(header, geometry)?;
                let is_right = header.key == key && check_rows(&header, geometry, frame);
                ensure!(is_right, "block {number} was read wrong");
            }
        }
        Ok(())
    }

    /// Reads each of `numbers` once, on as many threads as the daemon does; `read` counts blocks as they arrive.
    pub fn read_all(&self, numbers: &[u32], read: &AtomicUsize) -> anyhow::Result<()> {
        let threads = match self.kind {
            Kind::Tier(..) => READERS,
            Kind::Files(_) => READS_AT_ONCE,
        };
        let next = AtomicUsize::new(0);
        let work = &|frame: &Span| -> anyhow::Result<()> {
            while let Some(number) = numbers.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.read(*number, frame)?;
                read.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let frames = self.blocks.frames(threads).into_iter();
            let threads: Vec<_> = frames.map(|frame| scope.spawn(move || work(&frame))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
        })
    }

    /// The blocks that are there, shuffled; the oldest are left out, they go first.
    pub fn some(&self, count: usize, seed: u64) -> Vec<u32> {
        let live = self.live.lock().expect("no panic");
        let mut numbers: Vec<u32> = live.iter().rev().take(count).copied().collect();
        shuffle(&mut numbers, seed);
        numbers
    }
}

/// The same order for the same seed.
pub fn shuffle<T>(all: &mut [T], seed: u64) {
    let mut state = seed;
    for last in (1..all.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        all.swap(last, (state >> 33) as usize % (last + 1));
    }
}

/// Files under `dir`, synced and out of the page cache: the next read comes from the drive.
pub fn forget_cached(dir: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        // RocksDB removes files in the background: what is gone has nothing in the cache.
        let file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            other => other.with_context(|| format!("opening {}", path.display()))?,
        };
        if file.metadata()?.is_dir() {
            forget_cached(&path)?;
        } else {
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    Ok(())
}

/// Bytes allocated under `dir`.
pub fn allocated(dir: &Path) -> anyhow::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        // Without metadata: a compaction took it away meanwhile.
        let Ok(metadata) = entry.metadata() else { continue };
        bytes +=
            if metadata.is_dir() { allocated(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(bytes)
}
