//! The stores measured: the daemon's engines, and one file per block as many systems do it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, bail, ensure};
use cache_daemon::tier::disk::{DiskTier, Engine, GROUP_MAX, NewBlock, check_rows, copy_rows};
use kv_protocol::geometry::LayerSet;
use kv_protocol::{
    BlockHeader, BlockKey, Dtype, Fingerprint, Generation, Geometry, NumericsTag, RootKey, Variant,
};

/// Payloads that differ, so that no drive finds the same bytes again and again.
const PAYLOADS: usize = 4;
/// Bytes of a row (one layer of a block): as Llama-3.1-8B has them, or all of a smaller block.
const ROW_BYTES: u64 = 256 << 10;
/// Share of the tier that the daemon lets blocks take.
const STORED_PERCENT: u64 = 80;

/// Blocks of one size.
pub struct Blocks {
    pub geometry: Geometry,
    payloads: Vec<(Vec<u8>, Vec<u32>)>,
}

impl Blocks {
    /// Blocks of `bytes`, a multiple of a row.
    pub fn new(bytes: u64) -> anyhow::Result<Self> {
        let rows = (bytes / ROW_BYTES) as u16;
        let geometry = Geometry::new(64, rows, 8, 128, Dtype::F16, LayerSet::all(rows))?;
        ensure!(geometry.payload_bytes() == bytes, "{bytes} is not a whole number of rows");
        let payload = |number: usize| {
            let mut payload = vec![0; bytes as usize];
            blake3::Hasher::new_keyed(&[number as u8; 32]).finalize_xof().fill(&mut payload);
            let rows = payload.chunks_exact(ROW_BYTES as usize);
            let checksums = rows.map(crc32c::crc32c).collect();
            (payload, checksums)
        };
        Ok(Self { geometry, payloads: (0..PAYLOADS).map(payload).collect() })
    }

    pub fn bytes(&self) -> u64 {
        self.geometry.payload_bytes()
    }

    fn payload(&self, number: u32) -> &[u8] {
        &self.payloads[number as usize % PAYLOADS].0
    }

    fn header(&self, number: u32) -> BlockHeader {
        let root = RootKey::new(&Fingerprint([1; 32]), b"");
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
            checksums: self.payloads[number as usize % PAYLOADS].1.clone(),
        }
    }
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
pub const STORES: [&str; 3] = ["slots", "blobdb", "files"];

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
            "blobdb" => Kind::Tier(Engine::BlobDb, Engine::BlobDb.open(dir, disk_bytes)?),
            _ => Kind::Files(dir.to_owned()),
        };
        let block_bytes = match &kind {
            Kind::Tier(engine, _) => engine.block_bytes(&blocks.geometry),
            Kind::Files(_) => blocks.bytes(),
        };
        let live_max = (disk_bytes / 100 * STORED_PERCENT / block_bytes) as usize;
        ensure!(live_max > 2 * GROUP_MAX || blocks.bytes() > 8 << 20, "give --bytes more");
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
        let fill = |number: u32, header: &BlockHeader, to: &mut [u8]| {
            let payload = self.blocks.payload(number);
            copy_rows(header, &self.blocks.geometry, to, |at, row| {
                row.copy_from_slice(&payload[at as usize..][..row.len()]);
            })
        };
        let fills: Vec<_> = numbers
            .iter()
            .zip(&headers)
            .map(|(number, header)| move |to: &mut [u8]| fill(*number, header, to))
            .collect();
        let new: Vec<_> = headers
            .iter()
            .zip(&fills)
            .zip(numbers)
            .map(|((header, fill), number)| NewBlock {
                geometry: &self.blocks.geometry,
                header,
                order: u64::from(*number) + 1,
                fill,
            })
            .collect();
        for result in tier.write(&new) {
            if let Err(failure) = result {
                bail!("a block was not written: {failure:?}");
            }
        }
        Ok(())
    }

    fn write_file(&self, dir: &Path, number: u32) -> anyhow::Result<()> {
        let header = self.blocks.header(number);
        ensure!(check_rows(&header, &self.blocks.geometry, self.blocks.payload(number), |_, _| {}));
        let (new, path) = (dir.join("new"), dir.join(number.to_string()));
        let mut file = File::create(&new)?;
        file.write_all(&header.encode(&self.blocks.geometry))?;
        file.write_all(self.blocks.payload(number))?;
        file.sync_data()?;
        Ok(std::fs::rename(new, path)?)
    }

    /// Reads a block into `frame`, checked as the daemon checks it.
    fn read(&self, number: u32, frame: &mut [u8]) -> anyhow::Result<()> {
        let geometry = &self.blocks.geometry;
        let key = self.blocks.header(number).key;
        let mut is_right = false;
        let mut sink = |bytes: &[u8]| {
            let (header, payload) = bytes.split_at(BlockHeader::bytes(geometry));
            let Ok(header) = BlockHeader::decode(header, geometry) else { return };
            is_right = header.key == key
                && check_rows(&header, geometry, payload, |at, row| {
                    frame[at as usize..][..row.len()].copy_from_slice(row);
                });
        };
        match &self.kind {
            Kind::Tier(_, tier) => ensure!(tier.read(&key, &mut sink)?, "block {number} is gone"),
            Kind::Files(dir) => sink(&std::fs::read(dir.join(number.to_string()))?),
        }
        ensure!(is_right, "block {number} was read wrong");
        Ok(())
    }

    /// Reads each of `numbers` once on `threads` threads; `read` counts blocks as they arrive.
    pub fn read_all(
        &self,
        numbers: &[u32],
        threads: usize,
        read: &AtomicUsize,
    ) -> anyhow::Result<()> {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let work = || {
                let mut frame = vec![1; self.blocks.bytes() as usize];
                while let Some(number) = numbers.get(next.fetch_add(1, Ordering::Relaxed)) {
                    self.read(*number, &mut frame)?;
                    read.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            };
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
        })
    }

    /// The blocks that are there, shuffled; the oldest are left out, they go first.
    pub fn some(&self, count: usize, seed: u64) -> Vec<u32> {
        let live = self.live.lock().expect("no panic");
        let mut numbers: Vec<u32> = live.iter().rev().take(count).copied().collect();
        let mut state = seed;
        for last in (1..numbers.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            numbers.swap(last, (state >> 33) as usize % (last + 1));
        }
        numbers
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
