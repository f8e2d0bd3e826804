//! `make bench-disk`: the disk tier's engines against `fio`, the crate foyer, and one file per block.
//!
//! Disk → Host means: read into a frame of a region, header and row checksums checked.
//! A pass reads or writes as many blocks as the tier holds, each once, in random order; passes of all
//! stores and of fio take turns, in another order each round and each in memory of its own, and each
//! number is a median. Before a pass the page cache forgets the store's files: BlobDB and the files go
//! through it. Writes count until they are durable. Raw passes go to `bench/results/disk.json`, the
//! medians as a picture to `docs/disk-throughput.svg`.

#![forbid(unsafe_code)]

mod fio;
mod foyer;
mod store;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::Context as _;
use cache_daemon::tier::disk::{GROUP_MAX, READERS, READS_AT_ONCE};
use clap::Parser;
use colloquy_tests::bars::{self, Panel, Scale};
use colloquy_tests::figures::{figure, median, write_raw};
use serde_json::json;

use fio::{Way, Work};
use foyer::Foyer;
use store::{Blocks, STORES, Store, allocated, forget_cached};

const MIB: u64 = 1 << 20;
/// The engine that the figures are of, and the size.
const SLOTS: &str = STORES[0];
const FIGURE_MIB: u64 = 8;

/// Names of fio's ways; the first is what figures are measured against.
const FIO: [(&str, Way); 3] =
    [("fio", Way::Libaio), ("threads", Way::Threads), ("io_uring", Way::IoUring)];

/// One that takes so long to be written that more than one round, or all overwrites, is not worth the wait.
const SLOW: &str = STORES[2];
const SLOW_OVERWRITES: u64 = 2;
/// Written at once beside reads: a few, spread over the pass.
const MIXED_GROUP: usize = 4;
/// And where the tier is full, and small.
const AMPLIFICATION_GROUP: usize = 16;
/// The crate, in its own process. It reads the newer half of what it was given: it drops by whole regions.
const FOYER: &str = "foyer";
/// Kinds of passes.
const READ: &str = "read";
const WRITE: &str = "write";
const WORKS: [&str; 3] = [READ, WRITE, "read under 30 % writes"];

/// Compares the disk tier's engines with fio.
#[derive(Debug, Parser)]
struct Flags {
    /// A folder on the drive to measure; emptied at the end.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// MiB of the tier for throughput.
    #[arg(long, default_value_t = 1024)]
    mib: u64,
    /// MiB of the tier for amplification.
    #[arg(long, default_value_t = 512)]
    amplification_mib: u64,
    /// How often that tier is written over.
    #[arg(long, default_value_t = 10)]
    overwrites: u64,
    /// Passes a number at 8 MiB, of which the figures are; a third of them at other sizes.
    #[arg(long, default_value_t = 12)]
    rounds: usize,
    /// MiB of the blocks.
    #[arg(long, value_delimiter = ',', default_value = "1,4,8,32")]
    block_mib: Vec<u64>,
    /// Only these stores, for a look at one of them; the results are not kept.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

impl Flags {
    fn rounds(&self, block_mib: u64) -> u64 {
        let rounds = self.rounds as u64;
        if block_mib == FIGURE_MIB { rounds } else { rounds.div_ceil(3) }
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }
}

/// Who takes part in a round.
enum Contender<'a> {
    Fio(&'a (&'static str, Way)),
    Store(&'a (&'static str, Store<'a>)),
    Foyer,
}

/// Bytes a second, by work and store.
type Passes = BTreeMap<(&'static str, &'static str), Vec<f64>>;

/// Reads all that is there.
fn read_pass(store: &Store<'_>, dir: &Path, block: u64, seed: u64) -> anyhow::Result<f64> {
    forget_cached(dir)?;
    let numbers = store.some(store.live_max(), seed);
    let begin = Instant::now();
    store.read_all(&numbers, &AtomicUsize::new(0))?;
    Ok((numbers.len() as u64 * block) as f64 / begin.elapsed().as_secs_f64())
}

fn write_pass(store: &Store<'_>, block: u64) -> anyhow::Result<f64> {
    let groups = store.live_max().div_ceil(GROUP_MAX);
    let count = GROUP_MAX.min(store.live_max());
    let begin = Instant::now();
    for _ in 0..groups {
        store.write_group(count)?;
    }
    Ok((groups * count) as f64 * block as f64 / begin.elapsed().as_secs_f64())
}

/// Reads half of what is there (what stays while others are written) with 30 % writes beside.
fn mixed_pass(store: &Store<'_>, dir: &Path, block: u64, seed: u64) -> anyhow::Result<f64> {
    forget_cached(dir)?;
    let numbers = store.some(store.live_max() / 2, seed);
    let read = AtomicUsize::new(0);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut written = 0;
            while read.load(Ordering::Relaxed) < numbers.len() {
                if 7 * written < 3 * read.load(Ordering::Relaxed) {
                    store.write_group(MIXED_GROUP)?;
                    written += MIXED_GROUP;
                } else {
                    std::thread::yield_now();
                }
            }
            anyhow::Ok(())
        });
        let outcome = store.read_all(&numbers, &read);
        read.store(numbers.len(), Ordering::Relaxed); // Ends the writer after an error, too.
        let took = begin.elapsed();
        writer.join().expect("no panic")?;
        outcome?;
        Ok((numbers.len() as u64 * block) as f64 / took.as_secs_f64())
    })
}

fn throughput(
    flags: &Flags,
    dir: &Path,
    foyer: Option<&Path>,
    block_mib: u64,
) -> anyhow::Result<Passes> {
    let block = block_mib * MIB;
    let blocks = Blocks::new(block)?;
    let folder = |name: &str| dir.join(format!("{name}-{block_mib}"));
    let mut stores = Vec::new();
    for name in STORES.into_iter().filter(|name| *name == SLOTS || flags.wants(name)) {
        let store = Store::open(name, &folder(name), flags.mib * MIB, &blocks)?;
        for _ in 0..2 {
            write_pass(&store, block)?; // Full, and each place written once before it is measured.
        }
        stores.push((name, store));
    }
    let peer_count = stores[0].1.live_max();
    let peer = foyer.map(|binary| {
        std::fs::create_dir_all(folder(FOYER))?;
        let mut peer = Foyer::start(binary, &folder(FOYER), flags.mib, block_mib, READS_AT_ONCE)?;
        peer.pass("write", 2 * peer_count, 0)?;
        anyhow::Ok(peer)
    });
    let mut peer = peer.transpose()?;
    // A file for each way: whatever caches the drive has, all files are as warm as the stores.
    let fio_file = |way: Way| dir.join(format!("fio-{way:?}"));
    let fio_bytes = stores[0].1.live_max() as u64 * block;
    let fio = |way, work| fio::pass(way, &[fio_file(way)], work, fio_bytes, block, READS_AT_ONCE);
    // What figures are measured against reads the very files that the store reads, wherever on the drive they are.
    let same_files = || -> anyhow::Result<f64> {
        let (files, bytes) = slot_files(&folder(SLOTS))?;
        fio::pass(FIO[0].1, &files, Work::Read, bytes, block, READS_AT_ONCE)
    };
    for (_, way) in FIO {
        fio(way, Work::Write)?;
    }
    let mut contenders: Vec<Contender<'_>> =
        FIO.iter().filter(|(name, _)| flags.wants(name)).map(Contender::Fio).collect();
    contenders.extend(stores.iter().map(Contender::Store));
    contenders.extend(peer.as_ref().map(|_| Contender::Foyer));
    let mut passes = Passes::new();
    for round in 0..flags.rounds(block_mib) {
        for (number, work) in (0..).zip(WORKS) {
            store::shuffle(&mut contenders, 3 * round + number);
            for contender in &contenders {
                blocks.renew()?;
                let (name, rate) = match (contender, work) {
                    (Contender::Store((name, _)), _) if *name == SLOW && round > 0 => continue,
                    (Contender::Fio((name, Way::Libaio)), READ) => (*name, same_files()?),
                    (Contender::Fio((name, way)), READ) => (*name, fio(*way, Work::Read)?),
                    (Contender::Fio((name, way)), WRITE) => (*name, fio(*way, Work::Write)?),
                    (Contender::Fio((name, way)), _) => (*name, fio(*way, Work::Mixed)?),
                    (Contender::Store((name, store)), READ) => {
                        (*name, read_pass(store, &folder(name), block, round)?)
                    }
                    (Contender::Store((name, store)), WRITE) => (*name, write_pass(store, block)?),
                    (Contender::Store((name, store)), _) => {
                        (*name, mixed_pass(store, &folder(name), block, round)?)
                    }
                    (Contender::Foyer, READ | WRITE) => {
                        let Some(peer) = &mut peer else { continue };
                        let count = if work == READ { peer_count / 2 } else { peer_count };
                        (FOYER, peer.pass(work, count, round)?)
                    }
                    (Contender::Foyer, _) => continue,
                };
                passes.entry((work, name)).or_default().push(rate);
            }
        }
    }
    let names: Vec<_> = stores.iter().map(|(name, _)| *name).chain(foyer.map(|_| FOYER)).collect();
    drop((stores, peer));
    for name in names {
        std::fs::remove_dir_all(folder(name))?;
    }
    for (_, way) in FIO {
        std::fs::remove_file(fio_file(way))?;
    }
    Ok(passes)
}

/// The store's files but a shorter last one, and the bytes of each.
fn slot_files(dir: &Path) -> anyhow::Result<(Vec<PathBuf>, u64)> {
    let mut files: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    for entry in std::fs::read_dir(dir.join(SLOTS))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("slots-") {
            files.entry(entry.metadata()?.len()).or_default().push(entry.path());
        }
    }
    let (bytes, files) = files.pop_last().context("the store has no files")?;
    Ok((files, bytes))
}

/// Bytes that this process had written to drives.
fn written_bytes() -> anyhow::Result<u64> {
    let io = std::fs::read_to_string("/proc/self/io")?;
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.context("/proc/self/io has no write_bytes")?.parse().context("write_bytes")
}

/// Bytes written to the drive, and bytes taken there at most, each over the payload's.
fn amplification(flags: &Flags, dir: &Path, name: &str) -> anyhow::Result<(f64, f64)> {
    let blocks = Blocks::new(FIGURE_MIB * MIB)?;
    let dir = dir.join(format!("{name}-amplification"));
    let store = Store::open(name, &dir, flags.amplification_mib * MIB, &blocks)?;
    write_pass(&store, blocks.bytes())?; // Full from here on.
    forget_cached(&dir)?;
    let before = written_bytes()?;
    let overwrites = if name == SLOW { SLOW_OVERWRITES } else { flags.overwrites };
    let total = overwrites * flags.amplification_mib * MIB;
    let (mut written, mut taken) = (0, 0);
    while written < total {
        store.write_group(AMPLIFICATION_GROUP)?;
        written += AMPLIFICATION_GROUP as u64 * blocks.bytes();
        taken = taken.max(allocated(&dir)?);
    }
    forget_cached(&dir)?; // What was put off counts.
    let write = (written_bytes()? - before) as f64 / written as f64;
    let space = taken as f64 / store.live_bytes() as f64;
    drop(store);
    std::fs::remove_dir_all(&dir)?;
    Ok((write, space))
}

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let home = std::env::var_os("COLLOQUY_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/colloquy"),
        PathBuf::from,
    );
    let dir = flags.dir.clone().unwrap_or_else(|| home.join("bench-disk"));
    if dir.exists() {
        std::fs::remove_dir_all(&dir)?; // Of a run that was ended.
    }
    std::fs::create_dir_all(&dir)?;
    let mut raw = Vec::new();
    let others = flags.rounds(0);
    println!("GB/s, median of {} passes ({others} not at 8) over {} MiB", flags.rounds, flags.mib);
    let foyer = foyer::binary(&home).filter(|_| flags.wants(FOYER));
    if foyer.is_none() && flags.only.is_empty() {
        println!("without foyer: `make bench-disk` builds it");
    }
    let names =
        FIO.into_iter().map(|(name, _)| name).chain(STORES).chain(foyer.as_ref().map(|_| FOYER));
    let names: Vec<&str> = names.collect();
    let columns = names.iter().map(|name| format!("{name:>10}")).collect::<Vec<_>>().concat();
    println!("{:>6}  {:24}{columns}", "MiB", "");
    let mut panels = WORKS.map(|work| Panel {
        title: format!("{work}, GB/s"),
        scale: Scale::Linear,
        limits: Vec::new(),
        groups: Vec::new(),
    });
    for block_mib in &flags.block_mib {
        let passes = throughput(&flags, &dir, foyer.as_deref(), *block_mib)?;
        for (work, panel) in WORKS.into_iter().zip(&mut panels) {
            let of = |name| Some(median(passes.get(&(work, name))?));
            let rates: Vec<Option<f64>> = names.iter().map(|name| of(*name)).collect();
            let column = |rate: &Option<f64>| {
                rate.map_or_else(|| format!("{:>10}", "-"), |rate| format!("{:>10.2}", rate / 1e9))
            };
            let columns = rates.iter().map(column).collect::<Vec<_>>().concat();
            println!("{block_mib:>6}  {work:24}{columns}");
            let scaled = rates.iter().map(|rate| rate.map(|rate| rate / 1e9)).collect();
            panel.groups.push((format!("{block_mib} MiB"), scaled));
            let ratio = of(SLOTS).zip(of(FIO[0].0)).map_or(0.0, |(slots, fio)| slots / fio);
            if *block_mib == FIGURE_MIB {
                match work {
                    READ => figure("disk_read_vs_fio", ratio, "ratio"),
                    WRITE => figure("disk_write_vs_fio", ratio, "ratio"),
                    _ => figure("disk_mixed_read_vs_fio", ratio, "ratio"),
                }
            }
        }
        for ((work, name), rates) in passes {
            raw.push(json!({
                "block_mib": block_mib, "work": work, "store": name, "bytes_per_second": rates,
            }));
        }
    }
    if !flags.only.is_empty() {
        return Ok(std::fs::remove_dir_all(&dir)?);
    }
    bars::draw("disk-throughput", &names, &panels)?;
    let mut amplifications = Vec::new();
    for name in STORES {
        let (write, space) = amplification(&flags, &dir, name)?;
        println!("{name}: write amplification {write:.3}, space amplification {space:.3}");
        if name == SLOTS {
            figure("write_amplification", write, "ratio");
            figure("space_amplification", space, "ratio");
        }
        amplifications.push(json!({ "store": name, "write": write, "space": space }));
    }
    std::fs::remove_dir_all(&dir)?;
    let report = json!({
        "mib": flags.mib, "rounds": flags.rounds, "depth": READS_AT_ONCE, "readers": READERS, "group": GROUP_MAX,
        "amplification_mib": flags.amplification_mib, "overwrites": flags.overwrites,
        "throughput": raw, "amplification": amplifications,
    });
    write_raw("disk", &report)
}
