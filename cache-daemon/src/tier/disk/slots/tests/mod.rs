//! The store against an oracle, a drive that fails, forgets and lies, and crashes between any two steps;
//! under both placements. The index is a real one.

mod drive;

use std::sync::atomic::Ordering;

use kv_protocol::geometry::LayerSet;
use kv_protocol::{Dtype, Fingerprint, RootKey, Variant};
use proptest::prelude::*;

use self::drive::{Drive, EIO, ENOSPC, EROFS};
use super::format::PAGE_BYTES;
use super::home::FORMAT_FILE;
use super::writing::FILE_SLOTS_MIN;
use super::*;
use crate::tier::disk::tests::{TestBlock, block_of, read_block_of, write_all};

const DISK_BYTES: u64 = 1 << 20;
/// Folder of the store, in the test's.
const HOME: &str = "store";

fn geometry() -> Geometry {
    Geometry::new(4, 2, 1, 256, Dtype::F16, LayerSet::all(2)).unwrap() // Two pages of payload.
}

fn block(number: u32) -> TestBlock {
    block_of(&geometry(), number, Variant::Exact)
}

fn write(tier: &SlotTier, blocks: &[TestBlock], order: u64) -> Vec<bool> {
    write_all(tier, &geometry(), blocks, order)
}

fn read(tier: &SlotTier, key: &BlockKey) -> Option<TestBlock> {
    read_block_of(tier, &geometry(), key)
}

/// The suite, under each placement.
macro_rules! under_both {
    ($($name:ident)*) => {
        mod in_place {
            $(#[test] fn $name() { super::$name(super::Placement::InPlace); })*
        }
        mod appended {
            $(#[test] fn $name() { super::$name(super::Placement::Append); })*
        }
    };
}

under_both! {
    a_lost_or_corrupt_index_is_made_again_and_the_newest_write_wins
    an_index_of_the_version_before_is_read_and_one_of_a_version_after_is_made_again
    a_store_of_an_unknown_version_is_set_aside_whole
    a_slot_is_not_reused_under_a_reader
    every_flipped_bit_is_a_miss_or_harmless_never_wrong_bytes
    a_full_drive_an_ill_one_and_a_read_only_one_cost_stores_and_nothing_else
    a_power_cut_after_any_step_leaves_each_block_whole_or_absent
    another_geometry_takes_over_the_oldest_files_and_the_budget_holds
    a_store_that_may_take_more_does_so
    a_conversations_blocks_take_neighbouring_slots
    an_erased_block_is_on_no_page_and_its_slot_is_used_again
    an_erasure_cut_short_is_made_good_when_it_is_asked_for_again
    an_erasure_waits_for_a_reader_of_what_it_erases
    the_store_agrees_with_a_set
}

/// Each opens a database: some ten milliseconds.
const FLIPS_OF_INDEX: usize = 1000;

fn open(placement: Placement, drive: &Arc<Drive>, dir: &Path) -> SlotTier {
    open_loaded(placement, drive, dir).0
}

fn open_loaded(
    placement: Placement,
    drive: &Arc<Drive>,
    dir: &Path,
) -> (SlotTier, HashSet<BlockKey>) {
    let home = dir.join(HOME);
    let mut tier = SlotTier::open_on(drive.clone(), &home, DISK_BYTES, 0, placement).unwrap();
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
    std::fs::create_dir_all(dir.path().join(HOME)).unwrap();
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
    std::fs::remove_dir_all(dir.join(HOME).join("index")).unwrap();
}

fn a_lost_or_corrupt_index_is_made_again_and_the_newest_write_wins(placement: Placement) {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let old = block_of(&geometry(), 1, Variant::Exact);
    let new = block_of(&geometry(), 1, Variant::Mixed);
    {
        let tier = open(placement, &drive, dir.path());
        assert_eq!(write(&tier, &[old, block(2)], 1), [true; 2]);
        assert_eq!(write(&tier, std::slice::from_ref(&new), 3), [true]);
    }
    lose_index(dir.path());
    {
        let (tier, keys) = open_loaded(placement, &drive, dir.path());
        assert_eq!(keys.len(), 2);
        assert_eq!(read(&tier, &new.header.key), Some(new.clone()));
        assert_eq!(read(&tier, &block(2).header.key), Some(block(2)));
    }
    let index = dir.path().join(HOME).join("index");
    for entry in std::fs::read_dir(&index).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("MANIFEST") {
            std::fs::write(entry.path(), b"nothing of the kind").unwrap();
        }
    }
    let tier = open(placement, &drive, dir.path());
    assert_eq!(read(&tier, &new.header.key), Some(new));
    assert!(index.with_file_name("index.corrupt-1").exists(), "set aside, not deleted");
}

fn an_index_of_the_version_before_is_read_and_one_of_a_version_after_is_made_again(
    placement: Placement,
) {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let blocks: Vec<_> = (0..3).map(block).collect();
    {
        let tier = open(placement, &drive, dir.path());
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
        let (tier, keys) = open_loaded(placement, &drive, dir.path());
        assert_eq!(keys.len(), 3);
        for block in &blocks {
            assert_eq!(read(&tier, &block.header.key).as_ref(), Some(block));
        }
        let unreadable: Vec<_> =
            blocks.iter().map(|block| (block.header.key, b"newer".to_vec())).collect();
        tier.index.put(&unreadable).unwrap();
        tier.index.set_version(3).unwrap();
    }
    let (tier, keys) = open_loaded(placement, &drive, dir.path());
    assert_eq!(keys.len(), 3);
    assert_eq!(read(&tier, &blocks[1].header.key).as_ref(), Some(&blocks[1]));
    let aside = dir.path().join(HOME).join("index.version-3-1");
    assert!(aside.join("CURRENT").exists(), "set aside, not deleted");
    tier.erase(&[blocks[1].header.key], &[]).unwrap();
    assert!(!aside.exists(), "but what is erased is in no file");
}

#[test]
fn a_slot_file_of_an_unknown_version_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let open = || {
        let mut tier = SlotTier::open(dir.path(), 64 << 20, Placement::InPlace).unwrap();
        let keys = load(&mut tier);
        (tier, keys)
    };
    assert_eq!(write(&open().0, &[block(1)], 1), [true]);
    let file = dir.path().join("slots/slots-000001");
    let mut bytes = std::fs::read(&file).unwrap();
    let newer = format::FileHeader::decode(&bytes[..PAGE_BYTES]).unwrap().encode_as(7);
    bytes[..PAGE_BYTES].copy_from_slice(&newer);
    std::fs::write(&file, &bytes).unwrap();
    let (tier, keys) = open();
    assert!(keys.is_empty());
    assert_eq!(std::fs::read(file.with_file_name("slots-000001.version-1")).unwrap(), bytes);
    assert_eq!(write(&tier, &[block(1)], 1), [true]);
    assert_eq!(read(&tier, &block(1).header.key), Some(block(1)));
}

fn a_store_of_an_unknown_version_is_set_aside_whole(placement: Placement) {
    let dir = tempfile::tempdir().unwrap();
    {
        let mut tier = SlotTier::open(dir.path(), 64 << 20, placement).unwrap();
        load(&mut tier);
        assert_eq!(write(&tier, &[block(1)], 1), [true]);
    }
    let home = dir.path().join(placement.folder());
    std::fs::write(home.join(FORMAT_FILE), "77\n").unwrap();
    let mut tier = SlotTier::open(dir.path(), 64 << 20, placement).unwrap();
    assert!(load(&mut tier).is_empty());
    assert_eq!(write(&tier, &[block(1)], 1), [true]);
    let aside = home.with_file_name(format!("{}.version-77-1", placement.folder()));
    assert!(aside.join("index").exists());
    assert!(aside.join("slots-000001").exists());
}

fn a_slot_is_not_reused_under_a_reader(placement: Placement) {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let tier = Arc::new(open(placement, &drive, dir.path()));
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
    let placement = Placement::InPlace;
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let old = block_of(&geometry(), 1, Variant::Exact);
    let new = block_of(&geometry(), 1, Variant::Mixed);
    let key = old.header.key;
    let tier = open(placement, &drive, dir.path());
    assert_eq!(write(&tier, &[old], 1), [true]);
    let before = tier.index.get(&key).unwrap().unwrap().at;
    tier.remove(&[key]).unwrap();
    drive.faults.loses_writes.store(true, Ordering::Relaxed);
    assert_eq!(write(&tier, &[new], 2), [true]);
    assert_eq!(tier.index.get(&key).unwrap().unwrap().at, before, "the same slot");
    assert_eq!(read(&tier, &key), None);
}

fn index_files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(dir.join(HOME).join(INDEX_FOLDER)).unwrap().flatten();
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
    let placement = Placement::InPlace;
    let (origin, drive) = (home(), Arc::new(Drive::default()));
    let blocks: Vec<_> = (0..12).map(block).collect();
    for half in blocks.chunks(6) {
        let tier = open(placement, &drive, origin.path()); // The second opening makes a table of the first's log.
        assert_eq!(write(&tier, half, 1), [true; 6]);
    }
    let files = index_files(origin.path());
    let mut random = random();
    let (mut whole, mut found_by_slots, mut missed) = (0, 0, 0);
    for flip in 0..FLIPS_OF_INDEX {
        let dir = home();
        let index = dir.path().join(HOME).join(INDEX_FOLDER);
        std::fs::create_dir(&index).unwrap();
        for (number, (path, bytes)) in files.iter().enumerate() {
            let mut bytes = bytes.clone();
            if number == flip % files.len() {
                let at = random(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << random(8);
            }
            std::fs::write(index.join(path.file_name().unwrap()), bytes).unwrap();
        }
        let (tier, keys) = open_loaded(placement, &drive.same_again(), dir.path());
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

fn every_flipped_bit_is_a_miss_or_harmless_never_wrong_bytes(placement: Placement) {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let tier = open(placement, &drive, dir.path());
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
    assert!(misses > 1500, "{misses} misses");
    // And where the index is made from such slots.
    for _ in 0..40 {
        let at = PAGE_BYTES as u64 + random(12 * slot_bytes(&geometry()));
        drive.flip(at, random(8) as u8);
    }
    drop(tier);
    lose_index(dir.path());
    let tier = open(placement, &drive, dir.path());
    for block in &blocks {
        assert!(read(&tier, &block.header.key).is_none_or(|found| found == *block));
    }
}

fn a_full_drive_an_ill_one_and_a_read_only_one_cost_stores_and_nothing_else(placement: Placement) {
    for errno in [ENOSPC, EIO, EROFS] {
        let (dir, drive) = (home(), Arc::new(Drive::default()));
        let tier = open(placement, &drive, dir.path());
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
        // Slots that are not tried again: a segment has one left, and another cannot be made.
        let bad = match (errno, placement) {
            (EIO, Placement::InPlace) => 2,
            (EIO, Placement::Append) => 1,
            _ => 0,
        };
        assert_eq!(tier.lock().space.used(), 4 + bad, "no slot leaked after errno {errno}");
    }
}

fn a_power_cut_after_any_step_leaves_each_block_whole_or_absent(placement: Placement) {
    let mut cuts = 0;
    for tears in [false, true] {
        for step in 1.. {
            let (dir, drive) = (home(), Arc::new(Drive::default()));
            let tier = open(placement, &drive, dir.path());
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
                let tier = open(placement, &drive, dir.path());
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

fn another_geometry_takes_over_the_oldest_files_and_the_budget_holds(placement: Placement) {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let tier = open(placement, &drive, dir.path());
    let first: Vec<_> = (0..50).map(block).collect();
    let stored = first.chunks(8).enumerate().flat_map(|(n, some)| write(&tier, some, 8 * n as u64));
    let stored = stored.filter(|stored| *stored).count();
    assert_eq!(stored, 50);
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
    let (old, new) = first.split_at(25);
    assert!(old.iter().filter(gone).count() >= new.iter().filter(gone).count(), "oldest first");
    assert!(first.iter().any(|block| gone(&block)));
    for block in &blocks {
        assert_eq!(read_block_of(&tier, &wide, &block.header.key).as_ref(), Some(block));
    }
}

fn a_store_that_may_take_more_does_so(placement: Placement) {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let tier = open(placement, &drive, dir.path());
    let stores = |number: u32| write(&tier, &[block(number)], number.into()) == [true];
    let full = (0..10_000).find(|number| !stores(*number)).unwrap();
    tier.resize(2 * DISK_BYTES);
    let more = (full..10_000).find(|number| !stores(*number)).unwrap();
    assert!(more > full + full / 2, "{full} blocks before, {more} after");
    assert!(drive.bytes() <= 2 * DISK_BYTES / 100 * FILES_SHARE_PERCENT);
    tier.resize(DISK_BYTES); // What it has, it keeps.
    for number in 0..more {
        assert_eq!(read(&tier, &block(number).header.key), Some(block(number)));
    }
}

#[test]
fn a_last_file_of_fewer_slots_takes_what_the_budget_has_left() {
    let placement = Placement::InPlace;
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
    let tier = open(placement, &drive, dir.path());
    for (number, some) in blocks.chunks(8).enumerate() {
        assert!(write(&tier, some, 8 * number as u64).iter().all(|stored| *stored));
    }
    assert_eq!(write(&tier, &[block(fitting)], u64::from(fitting)), [false]);
    assert!(drive.bytes() <= budget);
    drop(tier);
    let (tier, found) = open_loaded(placement, &drive, dir.path());
    assert_eq!(found, keys);
    drop(tier);
    lose_index(dir.path());
    let (tier, found) = open_loaded(placement, &drive, dir.path());
    assert_eq!(found, keys);
    for block in &blocks {
        assert_eq!(read(&tier, &block.header.key).as_ref(), Some(block));
    }
}

fn a_conversations_blocks_take_neighbouring_slots(placement: Placement) {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let tier = open(placement, &drive, dir.path());
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

/// What only this block's bytes have: of its payload, and its name.
fn traces(block: &TestBlock) -> [&[u8]; 2] {
    [&block.payload[100..132], &block.header.key.0]
}

fn an_erased_block_is_on_no_page_and_its_slot_is_used_again(placement: Placement) {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let tier = open(placement, &drive, dir.path());
    let variants =
        [block_of(&geometry(), 1, Variant::Exact), block_of(&geometry(), 1, Variant::Mixed)];
    let (removed, kept) = (block(2), block(3));
    for (order, block) in variants.iter().chain([&removed, &kept]).enumerate() {
        assert_eq!(write(&tier, std::slice::from_ref(block), order as u64), [true]);
    }
    tier.remove(&[removed.header.key]).unwrap();
    let erased = [&variants[0], &variants[1], &removed];
    for block in erased {
        assert!(
            traces(block).iter().all(|trace| drive.contains(trace)),
            "it is there to be erased"
        );
    }
    tier.erase(&[variants[0].header.key, removed.header.key], &[]).unwrap();
    for block in erased {
        assert!(!traces(block).iter().any(|trace| drive.contains(trace)));
    }
    assert_eq!(read(&tier, &kept.header.key), Some(kept.clone()));
    assert_eq!(tier.lock().space.used(), 1);
    tier.lock().space.self_check();
    drop(tier);
    lose_index(dir.path());
    let (tier, keys) = open_loaded(placement, &drive, dir.path());
    assert_eq!(keys, [kept.header.key].into(), "nothing brings it back");
    assert_eq!(write(&tier, &variants[..1], 9), [true]);
    assert_eq!(read(&tier, &variants[0].header.key).as_ref(), Some(&variants[0]));
}

fn an_erasure_cut_short_is_made_good_when_it_is_asked_for_again(placement: Placement) {
    let mut cuts = 0;
    for step in 1.. {
        let (dir, drive) = (home(), Arc::new(Drive::default()));
        let tier = open(placement, &drive, dir.path());
        let (erased, kept) = (block(1), block(2));
        assert_eq!(write(&tier, &[erased.clone(), kept.clone()], 1), [true; 2]);
        drive.faults.steps_left.store(step, Ordering::Relaxed);
        let done = tier.erase(&[erased.header.key], &[]).is_ok();
        drop(tier);
        let drive = drive.after_power_loss(|| step % 2 == 0);
        let tier = open(placement, &drive, dir.path());
        if !done {
            cuts += 1;
            tier.erase(&[erased.header.key], &[]).unwrap();
        }
        assert!(!traces(&erased).iter().any(|trace| drive.contains(trace)), "step {step}");
        assert_eq!(read(&tier, &erased.header.key), None);
        assert_eq!(read(&tier, &kept.header.key), Some(kept));
        if done {
            break;
        }
    }
    assert!(cuts >= 3, "only {cuts} steps were cut"); // Index, slots, sync.
}

fn an_erasure_waits_for_a_reader_of_what_it_erases(placement: Placement) {
    let (dir, drive) = (home(), Arc::new(Drive::default()));
    let tier = Arc::new(open(placement, &drive, dir.path()));
    let victim = block(1);
    assert_eq!(write(&tier, std::slice::from_ref(&victim), 1), [true]);
    let key = victim.header.key;
    let (started, eraser) = (Arc::new(Mutex::new(None)), tier.clone());
    let (slot, watched) = (started.clone(), tier.clone());
    *drive.faults.during_read.lock().unwrap() = Some(Box::new(move || {
        let erasing = std::thread::spawn(move || eraser.erase(&[key], &[]).unwrap());
        while watched.index.get(&key).unwrap().is_some() {
            std::thread::yield_now(); // Until it waits for us, or does not and punches.
        }
        *slot.lock().unwrap() = Some(erasing);
    }));
    assert_eq!(read(&tier, &key).as_ref(), Some(&victim), "its own bytes, to the end");
    let erasing = started.lock().unwrap().take().unwrap();
    erasing.join().unwrap();
    assert!(!traces(&victim).iter().any(|trace| drive.contains(trace)));
}

/// Every second block of full segments leaves; what is written then makes the rest move.
#[test]
fn a_power_cut_while_a_segment_is_reclaimed_loses_no_block() {
    let placement = Placement::Append;
    let mut cuts = 0;
    for step in 1.. {
        let (dir, drive) = (home(), Arc::new(Drive::default()));
        let tier = open(placement, &drive, dir.path());
        let blocks: Vec<_> = (0..60).map(block).collect();
        for (number, some) in blocks.chunks(6).enumerate() {
            assert_eq!(write(&tier, some, 6 * number as u64), [true; 6]);
        }
        assert_eq!(write(&tier, &[block(99)], 99), [false], "full of blocks that are wanted");
        let (gone, kept): (Vec<_>, Vec<_>) = (0..60).partition(|number| number % 2 == 0);
        let keys: Vec<_> = gone.iter().map(|number| blocks[*number].header.key).collect();
        tier.remove(&keys).unwrap();
        drive.faults.steps_left.store(step, Ordering::Relaxed);
        let written = write(&tier, &[block(100), block(101)], 200);
        drop(tier);
        let drive = drive.after_power_loss(|| step % 2 == 0);
        let tier = open(placement, &drive, dir.path());
        for number in &kept {
            let block = &blocks[*number];
            assert_eq!(read(&tier, &block.header.key).as_ref(), Some(block), "step {step}");
        }
        for number in &gone {
            assert_eq!(read(&tier, &blocks[*number].header.key), None);
        }
        tier.lock().space.self_check();
        if written == [true; 2] {
            assert_eq!(read(&tier, &block(101).header.key), Some(block(101)));
            break;
        }
        cuts += 1;
    }
    assert!(cuts >= 7, "only {cuts} steps were cut"); // Two copies and two new blocks.
}

/// Blocks in the oracle test: with what is being written again, fewer than segments can hold.
const NUMBERS: u8 = 32;

#[derive(Debug, Clone)]
enum Operation {
    Write(Vec<u8>),
    Remove(u8),
    Erase(u8),
    Read(u8),
    Fail(bool),
    Reopen { lose_index: bool },
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        5 => proptest::collection::hash_set(0..NUMBERS, 1..6)
            .prop_map(|numbers| Operation::Write(numbers.into_iter().collect())),
        3 => (0..NUMBERS).prop_map(Operation::Remove),
        1 => (0..NUMBERS).prop_map(Operation::Erase),
        4 => (0..NUMBERS).prop_map(Operation::Read),
        1 => any::<bool>().prop_map(Operation::Fail),
        1 => any::<bool>().prop_map(|lose_index| Operation::Reopen { lose_index }),
    ]
}

/// The oracle: what was reported as written and not removed since is there; what was removed is not,
/// unless the index was lost since; what was erased is not, whatever is lost; nothing is ever wrong.
fn the_store_agrees_with_a_set(placement: Placement) {
    proptest!(ProptestConfig::with_cases(24), |(
        operations in proptest::collection::vec(operation(), 1..30)
    )| check_operations(placement, operations));
}

fn check_operations(placement: Placement, operations: Vec<Operation>) {
    let (dir, mut drive) = (home(), Arc::new(Drive::default()));
    let mut tier = open(placement, &drive, dir.path());
    let (mut present, mut maybe) = (HashSet::new(), HashSet::new());
    let mut gone: HashSet<u8> = HashSet::new(); // From the medium.
    let mut failing = false;
    for (order, operation) in operations.into_iter().enumerate() {
        match operation {
            Operation::Write(numbers) => {
                let blocks: Vec<_> = numbers.iter().map(|n| block(u32::from(*n))).collect();
                let results = write(&tier, &blocks, 10 * order as u64);
                for (number, stored) in numbers.into_iter().zip(results) {
                    assert_eq!(stored, !failing);
                    gone.remove(&number);
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
                assert_eq!(removed, !failing);
                let was = present.remove(&number);
                if removed {
                    maybe.remove(&number);
                } else if was {
                    maybe.insert(number);
                }
            }
            Operation::Erase(number) => {
                let erased = tier.erase(&[block(u32::from(number)).header.key], &[]).is_ok();
                assert_eq!(erased, !failing);
                let was = present.remove(&number);
                if erased {
                    maybe.remove(&number);
                    // Nor does anything bring back what was removed before.
                    gone = (0..NUMBERS)
                        .filter(|n| !present.contains(n) && !maybe.contains(n))
                        .collect();
                } else if was {
                    maybe.insert(number);
                }
            }
            Operation::Read(number) => {
                let wanted = block(u32::from(number));
                let found = read(&tier, &wanted.header.key);
                if present.contains(&number) {
                    assert_eq!(found, Some(wanted));
                } else if maybe.contains(&number) {
                    assert!(found.is_none_or(|found| found == wanted));
                } else {
                    assert_eq!(found, None);
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
                    let may_come_back = |n: &u8| !present.contains(n) && !gone.contains(n);
                    maybe.extend((0..NUMBERS).filter(may_come_back));
                }
                let keys;
                (tier, keys) = open_loaded(placement, &drive, dir.path());
                for number in &present {
                    assert!(keys.contains(&block(u32::from(*number)).header.key));
                }
            }
        }
        tier.lock().space.self_check();
    }
}
