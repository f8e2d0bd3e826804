//! foyer's disk cache, driven by `bench_disk` line by line: `write N` stores N new values, `read N SEED`
//! reads the N newest in random order. Answers: bytes a second, and how many were found.
//!
//! A value read is copied to where a frame would be; foyer checks its checksum. Values count as written
//! when the files are synced. Arguments: folder, MiB of the cache, MiB of a value, requests at once.

use std::fs::File;
use std::io::BufRead as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::Context as _;
use bytes::Bytes;
use foyer::{
    BlockEngineConfig, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder,
    PsyncIoEngineConfig,
};
use futures_util::future::join_all;

const MIB: usize = 1 << 20;
/// Values written before a sync, as the daemon's writer does.
const GROUP: u64 = 8;
/// Threads' worth of writing at once.
const FLUSHERS: usize = 4;
/// Values that differ.
const PAYLOADS: u64 = 4;

fn payload(number: u64, bytes: usize) -> Bytes {
    let mut state = number + 1;
    let word = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..bytes / 8).flat_map(word).collect::<Vec<u8>>().into()
}

fn sync(dir: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        File::open(entry?.path())?.sync_data()?;
    }
    Ok(())
}

async fn write(
    cache: &HybridCache<u64, Bytes>,
    dir: &Path,
    payloads: &[Bytes],
    keys: std::ops::Range<u64>,
) -> anyhow::Result<()> {
    for first in keys.clone().step_by(GROUP as usize) {
        for key in first..keys.end.min(first + GROUP) {
            let value = payloads[(key % PAYLOADS) as usize].clone();
            cache.storage_writer(key).force().insert(value);
        }
        cache.storage().wait().await;
        sync(dir)?;
    }
    Ok(())
}

async fn read(
    cache: &HybridCache<u64, Bytes>,
    keys: &[u64],
    frames: &[Mutex<Vec<u8>>],
) -> anyhow::Result<usize> {
    let (next, found) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = async |frame: &Mutex<Vec<u8>>| -> anyhow::Result<()> {
        while let Some(key) = keys.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Some(entry) = cache.get(key).await? {
                frame.lock().expect("no panic").copy_from_slice(entry.value());
                found.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    join_all(frames.iter().map(work)).await.into_iter().collect::<anyhow::Result<()>>()?;
    Ok(found.into_inner())
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, cache_mib, block_mib, depth] = arguments.as_slice() else {
        anyhow::bail!("give folder, MiB of the cache, MiB of a value, requests at once");
    };
    let dir = Path::new(dir);
    let (cache_bytes, bytes) = (cache_mib.parse::<usize>()? * MIB, block_mib.parse::<usize>()? * MIB);
    let depth: usize = depth.parse()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let cache: HybridCache<u64, Bytes> = runtime.block_on(async {
        let device =
            FsDeviceBuilder::new(dir).with_capacity(cache_bytes).with_direct(true).build()?;
        let engine = BlockEngineConfig::new(device)
            .with_block_size((cache_bytes / 32).max(2 * bytes).next_multiple_of(MIB))
            .with_flushers(FLUSHERS)
            .with_buffer_pool_size(2 * GROUP as usize * (bytes + MIB))
            // What is beyond it is dropped without a word: a group has to fit.
            .with_submit_queue_size_threshold(2 * GROUP as usize * (bytes + MIB));
        let builder = HybridCacheBuilder::new().memory(1).with_weighter(|_, value: &Bytes| value.len());
        let builder = builder.storage().with_io_engine_config(PsyncIoEngineConfig::new());
        anyhow::Ok(builder.with_engine_config(engine).build().await?)
    })?;
    let payloads: Vec<Bytes> = (0..PAYLOADS).map(|number| payload(number, bytes)).collect();
    let frames: Vec<_> = (0..depth).map(|_| Mutex::new(vec![1; bytes])).collect();
    let mut written = 0_u64;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let count: u64 = words.get(1).context("a count")?.parse()?;
        let begin;
        let done = if words[0] == "write" {
            begin = Instant::now();
            runtime.block_on(write(&cache, dir, &payloads, written..written + count))?;
            written += count;
            count as usize
        } else {
            let mut keys: Vec<u64> = (written - count.min(written)..written).collect();
            let mut state: u64 = words.get(2).context("a seed")?.parse()?;
            for last in (1..keys.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                keys.swap(last, (state >> 33) as usize % (last + 1));
            }
            begin = Instant::now();
            runtime.block_on(read(&cache, &keys, &frames))?
        };
        let rate = (done * bytes) as f64 / begin.elapsed().as_secs_f64();
        println!("{rate} {done}");
    }
    Ok(())
}
