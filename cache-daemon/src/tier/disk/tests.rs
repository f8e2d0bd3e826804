//! What every engine has to do, on real files; and the blocks that the engines' own tests use.

use std::collections::HashSet;
use std::path::Path;

use clap::ValueEnum as _;
use kv_protocol::geometry::LayerSet;
use kv_protocol::{Dtype, Fingerprint};
use proptest::prelude::*;

use super::*;

const DISK_BYTES: u64 = 64 << 20;

/// A block whose bytes follow from its number and variant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestBlock {
    pub header: BlockHeader,
    pub payload: Vec<u8>,
}

fn root() -> RootKey {
    RootKey::new(&Fingerprint([1; 32]), b"")
}

pub fn block_of(geometry: &Geometry, number: u32, variant: Variant) -> TestBlock {
    let root = root();
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

/// In orders from `order` on; whether each was stored.
pub fn write_all(
    tier: &dyn DiskTier,
    geometry: &Geometry,
    blocks: &[TestBlock],
    order: u64,
) -> Vec<bool> {
    let span = |block: &TestBlock| {
        let span = Span::heap(block.payload.len() as u64);
        span.copy_in(0, &block.payload);
        span
    };
    let spans: Vec<Span> = blocks.iter().map(span).collect();
    let blocks: Vec<NewBlock<'_>> = blocks
        .iter()
        .zip(&spans)
        .zip(order..)
        .map(|((block, payload), order)| NewBlock {
            geometry,
            header: &block.header,
            order,
            payload,
        })
        .collect();
    let mut stored = vec![None; blocks.len()];
    tier.write(&blocks, &mut |at, result| {
        assert_eq!(stored[at].replace(result.is_ok()), None, "block {at} is told of once");
    });
    stored.into_iter().map(|stored| stored.expect("each block is told of")).collect()
}

/// As the daemon reads: everything about the bytes is checked.
pub fn read_block_of(
    tier: &dyn DiskTier,
    geometry: &Geometry,
    key: &BlockKey,
) -> Option<TestBlock> {
    let span = Span::heap(geometry.payload_bytes());
    let header = read_checked(tier, key, &root(), geometry, &span).ok()?;
    let mut payload = vec![0; span.bytes() as usize];
    span.copy_out(0, &mut payload);
    Some(TestBlock { header, payload })
}

fn geometry() -> Geometry {
    // A payload of a page and a half: its slot's last page has room for what was in its frame before.
    Geometry::new(4, 3, 1, 128, Dtype::F16, LayerSet::all(3)).unwrap()
}

fn block(number: u32) -> TestBlock {
    block_of(&geometry(), number, Variant::Exact)
}

fn write(tier: &dyn DiskTier, blocks: &[TestBlock], order: u64) -> Vec<bool> {
    write_all(tier, &geometry(), blocks, order)
}

fn read(tier: &dyn DiskTier, key: &BlockKey) -> Option<TestBlock> {
    read_block_of(tier, &geometry(), key)
}

fn open(engine: Engine, dir: &Path) -> (Box<dyn DiskTier>, HashSet<BlockKey>) {
    let mut tier = engine.open(dir, DISK_BYTES).unwrap();
    let mut keys = HashSet::new();
    tier.load(&mut |block| _ = keys.insert(block.key), &mut |_| {}).unwrap();
    (tier, keys)
}

fn for_each_engine(test: impl Fn(Engine, &Path)) {
    for engine in Engine::value_variants() {
        let dir = tempfile::tempdir().unwrap();
        println!("{}", engine.label());
        test(*engine, dir.path());
    }
}

/// Files under a folder that have these bytes.
fn files_with(dir: &Path, needle: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_with(&path, needle));
        } else {
            let bytes = std::fs::read(&path).unwrap();
            let has = bytes.windows(needle.len()).any(|window| window == needle);
            found.extend(has.then_some(path));
        }
    }
    found
}

#[test]
fn blocks_and_records_survive_a_reopen() {
    for_each_engine(|engine, dir| {
        let id = ConversationId([9; 32]);
        let blocks: Vec<_> = (0..5).map(block).collect();
        {
            let (tier, _) = open(engine, dir);
            assert_eq!(write(&*tier, &blocks, 1), [true; 5]);
            tier.put_conversation(&id, 7, b"record").unwrap();
            tier.flush().unwrap();
        }
        assert_eq!(Engine::of_folder(dir), engine, "the folder tells whose it is");
        let (tier, keys) = open(engine, dir);
        assert_eq!(keys, blocks.iter().map(|block| block.header.key).collect());
        for block in &blocks {
            assert_eq!(read(&*tier, &block.header.key).as_ref(), Some(block));
        }
        assert_eq!(tier.get_conversation(&id).unwrap().as_deref(), Some(&b"record"[..]));
        tier.remove_conversation(&id).unwrap();
        assert_eq!(tier.get_conversation(&id).unwrap(), None);
    });
}

#[test]
fn a_block_that_is_not_what_its_header_says_is_not_stored() {
    for_each_engine(|engine, dir| {
        let (tier, _) = open(engine, dir);
        let mut scribbled = block(1);
        *scribbled.payload.last_mut().unwrap() ^= 1;
        assert_eq!(write(&*tier, &[scribbled, block(2)], 1), [false, true]);
        assert_eq!(read(&*tier, &block(1).header.key), None);
        assert_eq!(read(&*tier, &block(2).header.key), Some(block(2)));
    });
}

#[test]
fn a_block_of_another_shape_is_an_error_and_not_read() {
    for_each_engine(|engine, dir| {
        let (tier, _) = open(engine, dir);
        assert_eq!(write(&*tier, &[block(1)], 1), [true]);
        let other = Geometry::new(4, 2, 1, 128, Dtype::F16, LayerSet::all(2)).unwrap();
        let span = Span::heap(other.payload_bytes());
        let read = tier.read(&block(1).header.key, &other, &span);
        assert!(matches!(read, Err(DiskError::Corrupt { .. })), "{read:?}");
    });
}

/// By a search through every byte of every file: payloads, names, tokens' records, earlier copies.
#[test]
fn what_is_erased_is_in_no_file() {
    for_each_engine(|engine, dir| {
        let (gone, kept) = (ConversationId([0xa7; 32]), ConversationId([0xb8; 32]));
        let erased: Vec<_> = (0..6).map(block).collect();
        let stays: Vec<_> = (6..12).map(block).collect();
        let variant = block_of(&geometry(), 3, Variant::Mixed);
        let evicted = block(20);
        {
            let (tier, _) = open(engine, dir);
            assert_eq!(write(&*tier, &erased[..3], 1), [true; 3]);
            assert_eq!(write(&*tier, &stays, 4), [true; 6]);
            tier.put_conversation(&gone, 1, b"an early secret").unwrap();
            tier.put_conversation(&kept, 1, b"another's secret").unwrap();
        }
        // What follows is in other tables and logs than what came before.
        let (tier, _) = open(engine, dir);
        assert_eq!(write(&*tier, std::slice::from_ref(&variant), 10), [true]);
        assert_eq!(write(&*tier, &erased[3..], 11), [true; 3]);
        assert_eq!(write(&*tier, std::slice::from_ref(&evicted), 20), [true]);
        tier.put_conversation(&gone, 2, b"a late secret").unwrap();
        tier.remove(&[evicted.header.key]).unwrap();
        let traces = || {
            let blocks = erased.iter().chain([&variant, &evicted]);
            let traces = blocks.flat_map(|block| {
                [
                    block.payload[..24].to_vec(),
                    block.payload[3000..].to_vec(),
                    block.header.key.0.to_vec(),
                ]
            });
            traces.chain([b"an early secret".to_vec(), b"a late secret".to_vec()])
        };
        let found = traces().filter(|trace| !files_with(dir, trace).is_empty()).count();
        assert!(found > 10, "{found}: there is something to be erased");
        let mut keys: Vec<_> = erased.iter().map(|block| block.header.key).collect();
        keys.push(evicted.header.key);
        keys.push(block(999).header.key); // Never stored.
        tier.erase(&keys, &[gone]).unwrap();
        for trace in traces() {
            assert_eq!(files_with(dir, &trace), Vec::<PathBuf>::new(), "{trace:?}");
        }
        assert_eq!(tier.get_conversation(&gone).unwrap(), None);
        let record = tier.get_conversation(&kept).unwrap();
        assert_eq!(record.as_deref(), Some(&b"another's secret"[..]));
        for key in &keys {
            assert_eq!(read(&*tier, key), None);
        }
        for block in &stays {
            assert_eq!(read(&*tier, &block.header.key).as_ref(), Some(block));
        }
        assert_eq!(write(&*tier, &erased, 30), [true; 6], "the store goes on");
        drop(tier);
        let (tier, keys) = open(engine, dir);
        assert_eq!(keys.len(), 12);
        assert_eq!(read(&*tier, &erased[5].header.key).as_ref(), Some(&erased[5]));
    });
}

#[derive(Debug, Clone)]
enum Operation {
    Write(Vec<u8>),
    Remove(u8),
    Erase(u8),
    Read(u8),
    Reclaim,
    Probe,
    Reopen,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        6 => proptest::collection::hash_set(0u8..30, 1..6)
            .prop_map(|numbers| Operation::Write(numbers.into_iter().collect())),
        3 => (0u8..30).prop_map(Operation::Remove),
        1 => (0u8..30).prop_map(Operation::Erase),
        4 => (0u8..30).prop_map(Operation::Read),
        1 => Just(Operation::Reclaim),
        1 => Just(Operation::Probe),
        1 => Just(Operation::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn every_engine_agrees_with_a_set(operations in proptest::collection::vec(operation(), 1..30)) {
        for_each_engine(|engine, dir| {
            let mut tier = open(engine, dir).0;
            let mut present: HashSet<u8> = HashSet::new();
            for (order, operation) in operations.iter().enumerate() {
                match operation {
                    Operation::Write(numbers) => {
                        let blocks: Vec<_> = numbers.iter().map(|n| block(u32::from(*n))).collect();
                        let results = write(&*tier, &blocks, 10 * order as u64);
                        assert!(results.iter().all(|stored| *stored));
                        present.extend(numbers);
                    }
                    Operation::Remove(number) => {
                        tier.remove(&[block(u32::from(*number)).header.key]).unwrap();
                        present.remove(number);
                    }
                    Operation::Erase(number) => {
                        tier.erase(&[block(u32::from(*number)).header.key], &[]).unwrap();
                        present.remove(number);
                    }
                    Operation::Read(number) => {
                        let wanted = block(u32::from(*number));
                        let found = read(&*tier, &wanted.header.key);
                        assert_eq!(found, present.contains(number).then_some(wanted));
                    }
                    Operation::Reclaim => tier.reclaim().unwrap(),
                    Operation::Probe => tier.probe().unwrap(),
                    Operation::Reopen => {
                        drop(tier);
                        let keys;
                        (tier, keys) = open(engine, dir);
                        assert_eq!(keys.len(), present.len());
                    }
                }
            }
            for number in 0..30u8 {
                let wanted = block(u32::from(number));
                let found = read(&*tier, &wanted.header.key);
                assert_eq!(found, present.contains(&number).then_some(wanted));
            }
        });
    }
}
