//! The store against an oracle, a drive that fails, forgets and lies, and crashes between any two steps.
//!
//! Slot files are in memory here (the index is real): [`Drive`] keeps what was synced apart from what
//! was only written, so that a loss of power can forget it. What this cannot see: a real file system's
//! order of metadata, and O_DIRECT; the daemon's tests and the benchmark run on real files.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64};

use kv_protocol::geometry::LayerSet;
use kv_protocol::{BlockHeader, Dtype, Fingerprint, Generation, NumericsTag, RootKey, Variant};
use proptest::prelude::*;

use super::*;
use crate::tier::disk::check_rows;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EROFS: i32 = 30;
const DISK_BYTES: u64 = 1 << 20;

#[derive(Default)]
struct FileBytes {
    written: Vec<u8>,
    durable: Vec<u8>,
}

/// A drive in memory.
#[derive(Default)]
struct Drive {
    files: Mutex<BTreeMap<u32, Arc<Mutex<FileBytes>>>>,
    faults: Arc<Faults>,
}

/// What goes wrong, and when.
#[derive(Default)]
struct Faults {
    /// Errno of every write, sync and creation from now on; 0 is none.
    writes_fail: AtomicU64,
    /// Errno of every read.
    reads_fail: AtomicU64,
    /// Steps (writes, syncs, index batches) until the power fails; 0 is never.
    steps_left: AtomicU64,
    power_failed: AtomicBool,
    /// Half of the write that the power failed in reaches the drive.
    tears: AtomicBool,
    /// Writes are acknowledged and lost.
    loses_writes: AtomicBool,
    /// Called in the middle of each read.
    during_read: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Faults {
    fn error(errno: &AtomicU64) -> io::Result<()> {
        match errno.load(Ordering::Relaxed) {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code as i32)),
        }
    }

    /// One step towards the power cut; `Ok(false)` is the step in which it happens.
    fn step(&self) -> io::Result<bool> {
        Self::error(&self.writes_fail)?;
        if self.power_failed.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        let cut = match self.steps_left.load(Ordering::Relaxed) {
            0 => false,
            left => {
                self.steps_left.store(left - 1, Ordering::Relaxed);
                left == 1
            }
        };
        if cut {
            self.power_failed.store(true, Ordering::Relaxed);
        }
        Ok(!cut)
    }

    fn whole_step(&self) -> io::Result<()> {
        let done = self.step()?;
        if done { Ok(()) } else { Err(io::Error::from_raw_os_error(EIO)) }
    }
}

impl Drive {
    /// What is there after the power came back: `keep` decides for each page that was not synced.
    fn after_power_loss(&self, mut keep: impl FnMut() -> bool) -> Arc<Self> {
        let files = self.files.lock().unwrap();
        let mut survive = |bytes: &Arc<Mutex<FileBytes>>| {
            let bytes = bytes.lock().unwrap();
            let mut durable = bytes.durable.clone();
            durable.resize(bytes.written.len(), 0);
            let pages = durable.chunks_mut(PAGE_BYTES).zip(bytes.written.chunks(PAGE_BYTES));
            for (old, new) in pages {
                if old != new && keep() {
                    old.copy_from_slice(new);
                }
            }
            Arc::new(Mutex::new(FileBytes { written: durable.clone(), durable }))
        };
        let files = files.iter().map(|(number, bytes)| (*number, survive(bytes))).collect();
        Arc::new(Self { files: Mutex::new(files), faults: Arc::default() })
    }

    fn same_again(&self) -> Arc<Self> {
        self.after_power_loss(|| true)
    }

    fn flip(&self, at: u64, bit: u8) {
        let files = self.files.lock().unwrap();
        let mut at = at as usize;
        for file in files.values() {
            let mut bytes = file.lock().unwrap();
            if at < bytes.written.len() {
                bytes.written[at] ^= 1 << bit;
                return;
            }
            at -= bytes.written.len();
        }
        panic!("{at} is behind the last byte");
    }

    fn bytes(&self) -> u64 {
        let files = self.files.lock().unwrap();
        files.values().map(|file| file.lock().unwrap().written.len() as u64).sum()
    }
}

struct DriveFile {
    bytes: Arc<Mutex<FileBytes>>,
    faults: Arc<Faults>,
}

impl SlotFile for DriveFile {
    fn read(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        Faults::error(&self.faults.reads_fail)?;
        let hook = self.faults.during_read.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
        let bytes = self.bytes.lock().unwrap();
        to.copy_from_slice(&bytes.written[at as usize..at as usize + to.len()]);
        Ok(())
    }

    fn write(&self, from: &[u8], at: u64) -> io::Result<()> {
        let whole = self.faults.step()?;
        if self.faults.loses_writes.load(Ordering::Relaxed) {
            return Ok(());
        }
        let tears = self.faults.tears.load(Ordering::Relaxed);
        let length = if whole || !tears { from.len() } else { from.len() / 2 };
        let mut bytes = self.bytes.lock().unwrap();
        bytes.written[at as usize..at as usize + length].copy_from_slice(&from[..length]);
        if whole { Ok(()) } else { Err(io::Error::from_raw_os_error(EIO)) }
    }

    fn sync(&self) -> io::Result<()> {
        self.faults.whole_step()?;
        let mut bytes = self.bytes.lock().unwrap();
        bytes.durable = bytes.written.clone();
        Ok(())
    }
}

impl Media for Drive {
    fn list(&self) -> io::Result<Vec<u32>> {
        Ok(self.files.lock().unwrap().keys().copied().collect())
    }

    fn open(&self, file: u32) -> io::Result<(Arc<dyn SlotFile>, u64)> {
        let bytes = self.files.lock().unwrap()[&file].clone();
        let length = bytes.lock().unwrap().written.len() as u64;
        Ok((Arc::new(DriveFile { bytes, faults: self.faults.clone() }), length))
    }

    fn create(&self, file: u32, bytes: u64) -> io::Result<Arc<dyn SlotFile>> {
        self.faults.whole_step()?;
        let made = FileBytes { written: vec![0; bytes as usize], durable: Vec::new() };
        let made = Arc::new(Mutex::new(made));
        self.files.lock().unwrap().insert(file, made.clone());
        Ok(Arc::new(DriveFile { bytes: made, faults: self.faults.clone() }))
    }

    fn remove(&self, file: u32) -> io::Result<()> {
        self.files.lock().unwrap().remove(&file);
        Ok(())
    }

    fn available(&self) -> io::Result<u64> {
        Ok(1 << 40)
    }

    fn probe(&self) -> io::Result<()> {
        self.faults.whole_step()
    }

    fn before_index_write(&self) -> io::Result<()> {
        self.faults.whole_step()
    }

    fn is_direct(&self) -> bool {
        false
    }
}

fn geometry() -> Geometry {
    Geometry::new(4, 2, 1, 256, Dtype::F16, LayerSet::all(2)).unwrap() // Two pages of payload.
}

/// A block whose bytes follow from its number and variant.
#[derive(Debug, Clone, PartialEq, Eq)]
struct TestBlock {
    header: BlockHeader,
    payload: Vec<u8>,
}

fn block_of(geometry: &Geometry, number: u32, variant: Variant) -> TestBlock {
    let root = RootKey::new(&Fingerprint([1; 32]), b"");
    let tokens = vec![number];
    let mut payload = vec![0; geometry.payload_bytes() as usize];
    let mut seed = blake3::Hasher::new();
    seed.update(&number.to_le_bytes()).update(&variant.encode());
    seed.finalize_xof().fill(&mut payload);
    let rows = payload.chunks_exact(geometry.row_bytes() as usize);
    let header = BlockHeader {
        key: BlockKey::child(&root.as_parent(), &tokens),
        parent: root.as_parent(),
        root,
        variant,
        numerics: NumericsTag::of("test"),
        generation: Generation(0),
        created_ms: 1,
        tokens,
        checksums: rows.map(crc32c::crc32c).collect(),
    };
    TestBlock { header, payload }
}

fn block(number: u32) -> TestBlock {
    block_of(&geometry(), number, Variant::Exact)
}

fn write_all(tier: &SlotTier, geometry: &Geometry, blocks: &[TestBlock], order: u64) -> Vec<bool> {
    let fills: Vec<_> = blocks
        .iter()
        .map(|block| {
            |to: &mut [u8]| {
                to.copy_from_slice(&block.payload);
                true
            }
        })
        .collect();
    let blocks: Vec<NewBlock<'_>> = blocks
        .iter()
        .zip(&fills)
        .enumerate()
        .map(|(number, (block, fill))| NewBlock {
            geometry,
            header: &block.header,
            order: order + number as u64,
            fill,
        })
        .collect();
    tier.write(&blocks).iter().map(Result::is_ok).collect()
}

fn write(tier: &SlotTier, blocks: &[TestBlock], order: u64) -> Vec<bool> {
    write_all(tier, &geometry(), blocks, order)
}

/// As the daemon reads: everything about the bytes is checked; wrong ones are a miss.
fn read(tier: &SlotTier, key: &BlockKey) -> Option<TestBlock> {
    read_shaped(tier, &geometry(), key)
}

fn read_shaped(tier: &SlotTier, geometry: &Geometry, key: &BlockKey) -> Option<TestBlock> {
    let mut found = None;
    let mut sink = |bytes: &[u8]| {
        let (header, payload) = bytes.split_at(BlockHeader::bytes(geometry));
        let Ok(header) = BlockHeader::decode(header, geometry) else { return };
        if header.key == *key && check_rows(&header, geometry, payload, |_, _| {}) {
            found = Some(TestBlock { header, payload: payload.to_vec() });
        }
    };
    let _ = tier.read(key, &mut sink); // An error is a miss.
    found
}

/// Each opens a database: some ten milliseconds.
const FLIPS_OF_INDEX: usize = 1000;

fn open(drive: &Arc<Drive>, dir: &Path) -> SlotTier {
    open_loaded(drive, dir).0
}

fn open_loaded(drive: &Arc<Drive>, dir: &Path) -> (SlotTier, HashSet<BlockKey>) {
    let mut tier = SlotTier::open_on(drive.clone(), dir, DISK_BYTES).unwrap();
    let keys = load(&mut tier);
    (tier, keys)
}

fn load(tier: &mut SlotTier) -> HashSet<BlockKey> {
    let mut keys = HashSet::new();
    tier.load(&mut |block| _ = keys.insert(block.key), &mut |_| {}).unwrap();
    keys
}

fn home() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join(FOLDER)).unwrap();
    dir
}

/// Xorshift.
fn random() -> impl FnMut(u64) -> u64 {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    move |below| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    }
}

fn lose_index(dir: &Path) {
    std::fs::remove_dir_all(dir.join(FOLDER).join("index")).unwrap();
}

#[test]
fn blocks_and_records_survive_a_reopen_on_real_files() {
    let dir = tempfile::tempdir().unwrap();
    let id = ConversationId([9; 32]);
    let blocks: Vec<_> = (0..5).map(block).collect();
    {
        let mut tier = SlotTier::open(dir.path(), 64 << 20).unwrap();
        load(&mut tier);
        assert_eq!(write(&tier, &blocks, 1), [true; 5]);
        tier.put_conversation(&id, 7, b"record").unwrap();
    }
    let mut tier = SlotTier::open(dir.path(), 64 << 20).unwrap();
    assert_eq!(load(&mut tier), blocks.iter().map(|block| block.header.key).collect());
    for block in &blocks {
        assert_eq!(read(&tier, &block.header.key).as_ref(), Some(block));
    }
    assert_eq!(tier.get_conversation(&id).unwrap().as_deref(), Some(&b"record"[..]));
}

#[test]
fn a_lost_or_corrupt_index_is_made_again_and_the_newest_write_wins() {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let old = block_of(&geometry(), 1, Variant::Exact);
    let new = block_of(&geometry(), 1, Variant::Mixed);
    {
        let tier = open(&drive, dir.path());
        assert_eq!(write(&tier, &[old, block(2)], 1), [true; 2]);
        assert_eq!(write(&tier, std::slice::from_ref(&new), 3), [true]);
    }
    lose_index(dir.path());
    {
        let (tier, keys) = open_loaded(&drive, dir.path());
        assert_eq!(keys.len(), 2);
        assert_eq!(read(&tier, &new.header.key), Some(new.clone()));
        assert_eq!(read(&tier, &block(2).header.key), Some(block(2)));
    }
    let index = dir.path().join(FOLDER).join("index");
    for entry in std::fs::read_dir(&index).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("MANIFEST") {
            std::fs::write(entry.path(), b"nothing of the kind").unwrap();
        }
    }
    let tier = open(&drive, dir.path());
    assert_eq!(read(&tier, &new.header.key), Some(new));
    assert!(index.with_file_name("index.corrupt-1").exists(), "set aside, not deleted");
}

#[test]
fn an_index_of_the_version_before_is_read_and_one_of_a_version_after_is_made_again() {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let blocks: Vec<_> = (0..3).map(block).collect();
    {
        let tier = open(&drive, dir.path());
        assert_eq!(write(&tier, &blocks, 1), [true; 3]);
        let entry = |block: &TestBlock| {
            let Entry { at, epoch, block: stored } = tier.index.get(&block.header.key)?.unwrap();
            let slot = SlotHeader { at, epoch, order: stored.order, geometry: geometry() };
            Ok::<_, DiskError>((block.header.key, format::encode_entry_1(&slot, &block.header)))
        };
        let entries: Vec<_> = blocks.iter().map(|block| entry(block).unwrap()).collect();
        tier.index.put(&entries).unwrap();
        tier.index.set_version(1).unwrap();
    }
    {
        let (tier, keys) = open_loaded(&drive, dir.path());
        assert_eq!(keys.len(), 3);
        for block in &blocks {
            assert_eq!(read(&tier, &block.header.key).as_ref(), Some(block));
        }
        let unreadable: Vec<_> =
            blocks.iter().map(|block| (block.header.key, b"newer".to_vec())).collect();
        tier.index.put(&unreadable).unwrap();
        tier.index.set_version(3).unwrap();
    }
    let (tier, keys) = open_loaded(&drive, dir.path());
    assert_eq!(keys.len(), 3);
    assert_eq!(read(&tier, &blocks[1].header.key).as_ref(), Some(&blocks[1]));
}

#[test]
fn a_store_of_an_unknown_version_is_set_aside_whole() {
    let dir = tempfile::tempdir().unwrap();
    {
        let mut tier = SlotTier::open(dir.path(), 64 << 20).unwrap();
        load(&mut tier);
        assert_eq!(write(&tier, &[block(1)], 1), [true]);
    }
    std::fs::write(dir.path().join(FOLDER).join(FORMAT_FILE), "77\n").unwrap();
    let mut tier = SlotTier::open(dir.path(), 64 << 20).unwrap();
    assert!(load(&mut tier).is_empty());
    assert_eq!(write(&tier, &[block(1)], 1), [true]);
    let aside = dir.path().join("slots.version-77-1");
    assert!(aside.join("index").exists());
    assert!(aside.join("slots-000001").exists());
}

#[test]
fn a_slot_is_not_reused_under_a_reader() {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let tier = Arc::new(open(&drive, dir.path()));
    let victim = block(1);
    assert_eq!(write(&tier, std::slice::from_ref(&victim), 1), [true]);
    // In the middle of the read the block is removed, and the whole tier is written full.
    let (inside, key) = (tier.clone(), victim.header.key);
    *drive.faults.during_read.lock().unwrap() = Some(Box::new(move || {
        inside.remove(&[key]).unwrap();
        let stored = (100..400).filter(|number| write(&inside, &[block(*number)], 2)[0]).count();
        assert!(stored > 50, "only {stored} fit");
    }));
    assert_eq!(read(&tier, &key), Some(victim), "its own bytes, to the end");
    assert_eq!(read(&tier, &key), None);
    assert_eq!(write(&tier, &[block(1000)], 500), [true], "the reader has left: there is a slot");
    tier.lock().space.self_check();
}

/// The drive acknowledged the second write of a block and lost it. Key and root of what lies there are
/// those asked for, and all checksums are right: only the epoch tells.
#[test]
fn an_overwrite_that_got_lost_is_told_by_the_epoch() {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let old = block_of(&geometry(), 1, Variant::Exact);
    let new = block_of(&geometry(), 1, Variant::Mixed);
    let key = old.header.key;
    let tier = open(&drive, dir.path());
    assert_eq!(write(&tier, &[old], 1), [true]);
    let before = tier.index.get(&key).unwrap().unwrap().at;
    tier.remove(&[key]).unwrap();
    drive.faults.loses_writes.store(true, Ordering::Relaxed);
    assert_eq!(write(&tier, &[new], 2), [true]);
    assert_eq!(tier.index.get(&key).unwrap().unwrap().at, before, "the same slot");
    assert_eq!(read(&tier, &key), None);
}

fn index_files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(dir.join(FOLDER).join(INDEX_FOLDER)).unwrap().flatten();
    let files = entries.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().unwrap().to_string_lossy();
        !name.starts_with("LOG") && name != "LOCK" // What RocksDB never reads.
    });
    let mut files: Vec<_> = files
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .filter(|(_, bytes)| !bytes.is_empty())
        .collect();
    files.sort();
    files
}

/// In its log, in its tables, in what says which of them count.
#[test]
fn a_flipped_bit_of_the_index_costs_blocks_at_most() {
    let (origin, drive) = (home(), Arc::new(Drive::default()));
    let blocks: Vec<_> = (0..12).map(block).collect();
    for half in blocks.chunks(6) {
        let tier = open(&drive, origin.path()); // The second opening makes a table of the first's log.
        assert_eq!(write(&tier, half, 1), [true; 6]);
    }
    let files = index_files(origin.path());
    let mut random = random();
    let (mut whole, mut found_by_slots, mut missed) = (0, 0, 0);
    for flip in 0..FLIPS_OF_INDEX {
        let dir = home();
        let index = dir.path().join(FOLDER).join(INDEX_FOLDER);
        std::fs::create_dir(&index).unwrap();
        for (number, (path, bytes)) in files.iter().enumerate() {
            let mut bytes = bytes.clone();
            if number == flip % files.len() {
                let at = random(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << random(8);
            }
            std::fs::write(index.join(path.file_name().unwrap()), bytes).unwrap();
        }
        let (tier, keys) = open_loaded(&drive.same_again(), dir.path());
        for block in &blocks {
            match read(&tier, &block.header.key) {
                Some(found) => assert_eq!(&found, block),
                None => missed += 1,
            }
        }
        let aside = std::fs::read_dir(index.parent().unwrap()).unwrap().count() > 1;
        whole += u32::from(keys.len() == 12 && !aside);
        found_by_slots += u32::from(keys.len() == 12 && aside);
    }
    println!("{whole} whole, {found_by_slots} made again from the slots, {missed} blocks missed");
    assert!(found_by_slots > 0, "no flip was in what counts");
}

#[test]
fn every_flipped_bit_is_a_miss_or_harmless_never_wrong_bytes() {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let tier = open(&drive, dir.path());
    let blocks: Vec<_> = (0..12).map(block).collect();
    assert_eq!(write(&tier, &blocks, 1), [true; 12]);
    let mut random = random();
    let mut misses = 0;
    for _ in 0..8000 {
        let bit = random(8) as u8;
        // Half of them where blocks are, a quarter in a header page.
        let slot = PAGE_BYTES as u64 + random(12) * slot_bytes(&geometry());
        let at = match random(4) {
            0 => slot + random(PAGE_BYTES as u64),
            1 | 2 => slot + random(slot_bytes(&geometry())),
            _ => random(drive.bytes()),
        };
        drive.flip(at, bit);
        for block in &blocks {
            match read(&tier, &block.header.key) {
                None => misses += 1,
                Some(found) => assert_eq!(&found, block, "bit {bit} of byte {at}"),
            }
        }
        drive.flip(at, bit);
    }
    assert!(misses > 3000, "{misses} misses");
    // And where the index is made from such slots.
    for _ in 0..40 {
        let at = PAGE_BYTES as u64 + random(12 * slot_bytes(&geometry()));
        drive.flip(at, random(8) as u8);
    }
    drop(tier);
    lose_index(dir.path());
    let tier = open(&drive, dir.path());
    for block in &blocks {
        assert!(read(&tier, &block.header.key).is_none_or(|found| found == *block));
    }
}

#[test]
fn a_full_drive_an_ill_one_and_a_read_only_one_cost_stores_and_nothing_else() {
    for errno in [ENOSPC, EIO, EROFS] {
        let (dir, drive) = (home(), Arc::new(Drive::default()));
        let tier = open(&drive, dir.path());
        assert_eq!(write(&tier, &[block(1), block(2), block(5)], 1), [true; 3]);
        drive.faults.writes_fail.store(errno as u64, Ordering::Relaxed);
        assert_eq!(write(&tier, &[block(3), block(4)], 3), [false; 2]);
        assert!(tier.remove(&[block(1).header.key]).is_err());
        assert!(tier.probe().is_err());
        assert_eq!(read(&tier, &block(2).header.key), Some(block(2)), "reads go on");
        drive.faults.writes_fail.store(0, Ordering::Relaxed);
        tier.probe().unwrap();
        assert_eq!(write(&tier, &[block(3), block(4)], 5), [true; 2], "errno {errno}");
        assert_eq!(read(&tier, &block(1).header.key), None, "the removal was made up for");
        assert_eq!(read(&tier, &block(3).header.key), Some(block(3)));
        drive.faults.reads_fail.store(EIO as u64, Ordering::Relaxed);
        assert_eq!(read(&tier, &block(3).header.key), None);
        drive.faults.reads_fail.store(0, Ordering::Relaxed);
        assert_eq!(read(&tier, &block(3).header.key), Some(block(3)), "the entry stayed");
        let bad = if errno == EIO { 2 } else { 0 }; // Slots that are not tried again.
        assert_eq!(tier.lock().space.used(), 4 + bad, "no slot leaked after errno {errno}");
    }
}

#[test]
fn a_power_cut_after_any_step_leaves_each_block_whole_or_absent() {
    let mut cuts = 0;
    for tears in [false, true] {
        for step in 1.. {
            let (dir, drive) = (home(), Arc::new(Drive::default()));
            let tier = open(&drive, dir.path());
            let (kept, replaced) = (block(1), block(2));
            assert_eq!(write(&tier, &[kept.clone(), replaced.clone()], 1), [true; 2]);
            drive.faults.tears.store(tears, Ordering::Relaxed);
            drive.faults.steps_left.store(step, Ordering::Relaxed);
            let removed = tier.remove(&[replaced.header.key]).is_ok();
            let new: Vec<_> = (10..14).map(block).collect();
            let written = write(&tier, &new, 3);
            let is_cut = drive.faults.power_failed.load(Ordering::Relaxed);
            drop(tier);
            for lost_index in [false, true] {
                let mut coin = step;
                let drive = drive.after_power_loss(|| {
                    coin = coin.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    coin >> 63 == 0
                });
                if lost_index {
                    lose_index(dir.path());
                }
                let tier = open(&drive, dir.path());
                assert_eq!(read(&tier, &kept.header.key).as_ref(), Some(&kept));
                let found = read(&tier, &replaced.header.key);
                assert!(found.is_none_or(|found| found == replaced));
                if removed && !lost_index {
                    assert_eq!(read(&tier, &replaced.header.key), None);
                }
                for (block, written) in new.iter().zip(&written) {
                    let found = read(&tier, &block.header.key);
                    assert!(found.as_ref().is_none_or(|found| found == block), "step {step}");
                    if *written {
                        assert_eq!(found.as_ref(), Some(block), "reported after step {step}");
                    }
                }
                // The store goes on.
                assert_eq!(write(&tier, &[block(99)], 50), [true]);
                tier.lock().space.self_check();
            }
            if !is_cut {
                break;
            }
            cuts += 1;
        }
    }
    assert!(cuts >= 12, "only {cuts} steps were cut");
}

#[test]
fn another_geometry_takes_over_the_oldest_files_and_the_budget_holds() {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let tier = open(&drive, dir.path());
    let first: Vec<_> = (0..60).map(block).collect();
    let stored = first.chunks(8).enumerate().flat_map(|(n, some)| write(&tier, some, 8 * n as u64));
    let stored = stored.filter(|stored| *stored).count();
    assert_eq!(stored, 60);
    let wide = Geometry::new(4, 4, 1, 512, Dtype::F16, LayerSet::all(4)).unwrap();
    let blocks: Vec<_> = (100..110).map(|number| block_of(&wide, number, Variant::Exact)).collect();
    for (number, block) in blocks.iter().enumerate() {
        assert_eq!(
            write_all(&tier, &wide, std::slice::from_ref(block), 100 + number as u64),
            [true]
        );
        assert!(drive.bytes() <= DISK_BYTES / 100 * FILES_SHARE_PERCENT);
    }
    let gone = |block: &&TestBlock| read(&tier, &block.header.key).is_none();
    let (old, new) = first.split_at(30);
    assert!(old.iter().filter(gone).count() >= new.iter().filter(gone).count(), "oldest first");
    assert!(first.iter().any(|block| gone(&block)));
    for block in &blocks {
        assert_eq!(read_shaped(&tier, &wide, &block.header.key).as_ref(), Some(block));
    }
}

#[test]
fn a_last_file_of_fewer_slots_takes_what_the_budget_has_left() {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let budget = DISK_BYTES / 100 * FILES_SHARE_PERCENT;
    let slot = slot_bytes(&geometry());
    let whole_files = budget / slot_at(&geometry(), FILE_SLOTS_MIN as u32);
    let left = budget - whole_files * slot_at(&geometry(), FILE_SLOTS_MIN as u32);
    let short = (left - PAGE_BYTES as u64) / slot;
    assert!(short > 0 && short < FILE_SLOTS_MIN, "the sizes here leave room for a short file");
    let fitting = (whole_files * FILE_SLOTS_MIN + short) as u32;
    let blocks: Vec<_> = (0..fitting).map(block).collect();
    let keys: HashSet<_> = blocks.iter().map(|block| block.header.key).collect();
    let tier = open(&drive, dir.path());
    for (number, some) in blocks.chunks(8).enumerate() {
        assert!(write(&tier, some, 8 * number as u64).iter().all(|stored| *stored));
    }
    assert_eq!(write(&tier, &[block(fitting)], u64::from(fitting)), [false]);
    assert!(drive.bytes() <= budget);
    drop(tier);
    let (tier, found) = open_loaded(&drive, dir.path());
    assert_eq!(found, keys);
    drop(tier);
    lose_index(dir.path());
    let (tier, found) = open_loaded(&drive, dir.path());
    assert_eq!(found, keys);
    for block in &blocks {
        assert_eq!(read(&tier, &block.header.key).as_ref(), Some(block));
    }
}

#[test]
fn a_conversations_blocks_take_neighbouring_slots() {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let tier = open(&drive, dir.path());
    let mut at = Vec::new();
    let root = RootKey::new(&Fingerprint([1; 32]), b"");
    let mut parent = root.as_parent();
    for number in 0..2 {
        let mut next = block(number);
        next.header.parent = parent;
        next.header.key = BlockKey::child(&parent, &next.header.tokens);
        parent = next.header.key;
        assert_eq!(write(&tier, &[next], 1), [true]);
        at.push(tier.index.get(&parent).unwrap().unwrap().at);
    }
    assert_eq!((at[1].file, at[1].slot), (at[0].file, at[0].slot + 1));
}

#[derive(Debug, Clone)]
enum Operation {
    Write(Vec<u8>),
    Remove(u8),
    Read(u8),
    Fail(bool),
    Reopen { lose_index: bool },
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        5 => proptest::collection::hash_set(0u8..40, 1..6)
            .prop_map(|numbers| Operation::Write(numbers.into_iter().collect())),
        3 => (0u8..40).prop_map(Operation::Remove),
        4 => (0u8..40).prop_map(Operation::Read),
        1 => any::<bool>().prop_map(Operation::Fail),
        1 => any::<bool>().prop_map(|lose_index| Operation::Reopen { lose_index }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The oracle: what was reported as written and not removed since is there; what was removed is
    /// not, unless the index was lost since; nothing is ever wrong.
    #[test]
    fn the_store_agrees_with_a_set(operations in proptest::collection::vec(operation(), 1..30)) {
        let (dir, mut drive) = (home(), Arc::new(Drive::default()));
        let mut tier = open(&drive, dir.path());
        let (mut present, mut maybe) = (HashSet::new(), HashSet::new());
        let mut failing = false;
        for (order, operation) in operations.into_iter().enumerate() {
            match operation {
                Operation::Write(numbers) => {
                    let blocks: Vec<_> = numbers.iter().map(|n| block(u32::from(*n))).collect();
                    let results = write(&tier, &blocks, 10 * order as u64);
                    for (number, stored) in numbers.into_iter().zip(results) {
                        prop_assert_eq!(stored, !failing);
                        if stored {
                            present.insert(number);
                            maybe.remove(&number);
                        } else if !present.contains(&number) {
                            maybe.insert(number);
                        }
                    }
                }
                Operation::Remove(number) => {
                    let removed = tier.remove(&[block(u32::from(number)).header.key]).is_ok();
                    prop_assert_eq!(removed, !failing);
                    let was = present.remove(&number);
                    if removed {
                        maybe.remove(&number);
                    } else if was {
                        maybe.insert(number);
                    }
                }
                Operation::Read(number) => {
                    let wanted = block(u32::from(number));
                    let found = read(&tier, &wanted.header.key);
                    if present.contains(&number) {
                        prop_assert_eq!(found, Some(wanted));
                    } else if maybe.contains(&number) {
                        prop_assert!(found.is_none_or(|found| found == wanted));
                    } else {
                        prop_assert_eq!(found, None);
                    }
                }
                Operation::Fail(fail) => {
                    let errno = if fail { ENOSPC as u64 } else { 0 };
                    drive.faults.writes_fail.store(errno, Ordering::Relaxed);
                    if failing && !fail {
                        tier.probe().unwrap();
                    }
                    failing = fail;
                }
                Operation::Reopen { lose_index: lose } => {
                    drop(tier);
                    failing = false;
                    drive = drive.same_again();
                    if lose {
                        lose_index(dir.path());
                        maybe.extend((0..40).filter(|number| !present.contains(number)));
                    }
                    let keys;
                    (tier, keys) = open_loaded(&drive, dir.path());
                    for number in &present {
                        prop_assert!(keys.contains(&block(u32::from(*number)).header.key));
                    }
                }
            }
            tier.lock().space.self_check();
        }
    }
}
