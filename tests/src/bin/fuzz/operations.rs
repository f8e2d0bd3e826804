//! Sequences of operations, read from the input two bytes each, beside an oracle that is too simple to be wrong.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use cache_daemon::directory::{Description, Directory, Label};
use cache_daemon::tier::disk::{DiskTier, Engine, NewBlock, read_checked};
use cache_daemon::tier::free_frames::FreeFrames;
use kv_protocol::geometry::LayerSet;
use kv_protocol::message::KeyList;
use kv_protocol::ring::{ArenaWriter, Consumer, Producer, Ring};
use kv_protocol::start::Start;
use kv_protocol::{
    Accept, BlockHeader, BlockKey, Dtype, FrameIndex, Generation, Geometry, MissReason,
    NumericsTag, Span, Variant,
};

use super::Target;
use super::parsers::root;

/// See the module.
pub const TARGETS: &[Target] = &[
    Target { name: "ring", run: ring, seeds: some_bytes },
    Target { name: "arena", run: arena, seeds: some_bytes },
    Target { name: "free-frames", run: free_frames, seeds: some_bytes },
    Target { name: "directory", run: directory, seeds: some_bytes },
    Target { name: "slots", run: |bytes| disk(Engine::Slots, bytes), seeds: disk_seeds },
    Target { name: "segments", run: |bytes| disk(Engine::Segments, bytes), seeds: disk_seeds },
];

fn some_bytes() -> Vec<Vec<u8>> {
    vec![(0..=127).collect(), (0..=127).rev().collect()]
}

fn operations(bytes: &[u8]) -> impl Iterator<Item = (u8, u8)> {
    bytes.chunks_exact(2).map(|operation| (operation[0], operation[1]))
}

/// Oracle: a queue of at most as many entries as the ring has. At last a peer publishes nonsense.
fn ring(bytes: &[u8]) {
    const CAPACITY: usize = 4;
    let (head, tail) = (AtomicU32::new(0), AtomicU32::new(0));
    let words: Vec<AtomicU64> = (0..2 * CAPACITY).map(|_| AtomicU64::new(0)).collect();
    let ring = Ring::<2> { head: &head, tail: &tail, words: &words };
    let (mut producer, mut consumer) = (Producer::default(), Consumer::default());
    let mut queue = VecDeque::new();
    for (what, value) in operations(bytes) {
        match what % 8 {
            0..=3 => {
                let entry = [u64::from(value), !u64::from(value)];
                let pushed = producer.push(&ring, &entry).expect("no nonsense yet");
                assert_eq!(pushed, queue.len() < CAPACITY);
                if pushed {
                    queue.push_back(entry);
                }
            }
            4 | 5 => assert_eq!(consumer.pop(&ring), Ok(queue.pop_front())),
            6 => assert_eq!(consumer.peek(&ring), Ok(queue.front().copied())),
            _ => {
                let nonsense = u32::from(value) << ((what >> 3) % 25);
                let side = if value % 2 == 0 { &head } else { &tail };
                side.store(nonsense, Ordering::Relaxed);
                for _ in 0..2 * CAPACITY {
                    let _ = (producer.push(&ring, &[1, 2]), consumer.pop(&ring));
                }
                return;
            }
        }
    }
}

/// Oracle: the spans in use; no two overlap, none leaves the arena, and none is lost.
fn arena(bytes: &[u8]) {
    const BYTES: u32 = 1024;
    let mut arena = ArenaWriter::new(u64::from(BYTES));
    let mut used: VecDeque<(u32, u32)> = VecDeque::new();
    // Close to where the numbers of entries begin anew.
    let (mut entry, mut consumed) = (u32::MAX - 20, u32::MAX - 20);
    for (what, size) in operations(bytes) {
        if what % 2 == 0 && used.pop_front().is_some() {
            consumed = consumed.wrapping_add(1);
        }
        let bytes = u32::from(size) * 2 + 1;
        if let Some(at) = arena.take(bytes, entry, consumed) {
            assert!(at + bytes <= BYTES);
            for (other, length) in &used {
                assert!(at + bytes <= *other || other + length <= at);
            }
            used.push_back((at, bytes));
            entry = entry.wrapping_add(1);
        }
    }
    assert_eq!(arena.take(BYTES, entry, entry), Some(0));
}

/// Oracle: the set of free frames; a frame behind the one asked for is given if it is free.
fn free_frames(bytes: &[u8]) {
    let (mut free, mut oracle) = (FreeFrames::default(), BTreeSet::new());
    for (what, number) in operations(bytes) {
        let frame = u32::from(number);
        if what % 3 == 0 && !oracle.contains(&frame) {
            free.give_back(FrameIndex(frame));
            oracle.insert(frame);
        } else {
            let after = (what % 3 == 1).then_some(FrameIndex(frame));
            let taken = free.take(after).map(|frame| frame.0);
            assert_eq!(taken.is_none(), oracle.is_empty());
            if after.is_some() && oracle.contains(&(frame + 1)) {
                assert_eq!(taken, Some(frame + 1));
            }
            assert!(taken.is_none_or(|taken| oracle.remove(&taken)));
        }
    }
}

/// Blocks of two tokens, 0 or 1 each, in chains up to three long; oracle: the set of stored ones.
fn directory(bytes: &[u8]) {
    let (mut directory, mut oracle) = (Directory::default(), BTreeSet::new());
    let numerics = NumericsTag::of("fuzz");
    let label = Label { root: root(), variant: Variant::Exact, numerics, disk_bytes: 4096 };
    let accept = Accept::Own { variant: Variant::Exact, numerics };
    for (what, number) in operations(bytes) {
        let tokens: Vec<u32> = (0..6).map(|bit| u32::from(number >> bit & 1)).collect();
        let start = Start::from(root());
        let keys: Vec<BlockKey> = start.chain(&tokens, 2);
        let place = usize::from(number >> 6) % keys.len();
        match what % 4 {
            0 | 1 if oracle.insert(keys[place]) => {
                let parent = if place == 0 { root().as_parent() } else { keys[place - 1] };
                let tokens: Arc<[u32]> = tokens[2 * place..2 * place + 2].into();
                let description = Description { parent, label, tokens, is_full: true };
                directory.insert(keys[place], &description, 1, FrameIndex(number.into()));
            }
            2 => {
                let removed = directory.remove(&keys[place], MissReason::Evicted);
                assert_eq!(removed.is_some(), oracle.remove(&keys[place]));
            }
            3 if number % 8 == 0 => drop(directory.take_changed()), // Places are given to others now.
            _ => {}
        }
        assert_eq!(directory.len(), oracle.len());
        let known = keys.iter().take_while(|key| oracle.contains(key)).count();
        let list = KeyList { start, accept, keys, tail: Vec::new() };
        let chain = directory.lookup(&list);
        // Behind them come blocks that go on otherwise.
        let found = chain.links.iter().filter(|link| list.keys.contains(&link.key)).count();
        assert_eq!(found, known);
    }
}

/// One page and a half of payload.
fn shape() -> Geometry {
    Geometry::new(4, 3, 1, 128, Dtype::F16, LayerSet::all(3)).expect("a right shape")
}

const DISK_BYTES: u64 = 4 << 20;
/// Fewer than the tier holds.
const BLOCKS: u8 = 24;

fn block(number: u8) -> (BlockHeader, Span) {
    let geometry = shape();
    let (parent, tokens) = (root().as_parent(), vec![u32::from(number); 4]);
    let payload = vec![number; geometry.payload_bytes() as usize];
    let rows = payload.chunks_exact(geometry.row_bytes() as usize);
    let header = BlockHeader {
        key: BlockKey::child(&parent, &tokens),
        parent,
        root: root(),
        variant: Variant::Exact,
        numerics: NumericsTag::of("fuzz"),
        generation: Generation(0),
        created_ms: 1,
        tokens,
        checksums: rows.map(crc32c::crc32c).collect(),
    };
    let span = Span::heap(geometry.payload_bytes());
    span.copy_in(0, &payload);
    (header, span)
}

fn open(engine: Engine, dir: &Path) -> Box<dyn DiskTier> {
    let mut tier = engine.open(dir, DISK_BYTES).expect("whatever lies there is set aside");
    tier.load(&mut |_| {}, &mut |_| {}).expect("whatever is wrong is left out");
    tier
}

/// What the drive did to a file while the daemon was away.
fn spoil(dir: &Path, file: u8, at: u8) {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .expect("it is there")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    let Some(path) = files.get(usize::from(file) % files.len().max(1)) else { return };
    let mut bytes = std::fs::read(path).expect("it is there");
    let length = bytes.len();
    // Near the beginning of some page: headers of files and slots, and payload.
    let at = (usize::from(at) * 4096 / 2 + usize::from(file)) % length.max(1);
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1 << (file % 8);
        std::fs::write(path, bytes).expect("memory takes it");
    }
}

/// Oracle: the set of blocks that are there, and whether it is certain that they are. None is ever wrong.
fn disk(engine: Engine, bytes: &[u8]) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("memory takes files");
    let mut tier = open(engine, dir.path());
    let mut stored: HashMap<u8, bool> = HashMap::new();
    for (order, (what, number)) in (1..).zip(operations(bytes).take(64)) {
        let (number, (header, payload)) = (number % BLOCKS, block(number % BLOCKS));
        let key = header.key;
        match what % 16 {
            0..=6 => {
                let geometry = &shape();
                let new = NewBlock { geometry, header: &header, order, payload: &payload };
                tier.write(&[new], &mut |_, result| result.expect("memory takes it"));
                stored.insert(number, true);
            }
            7 | 8 => {
                tier.remove(&[key]).expect("memory takes it");
                stored.remove(&number);
            }
            9 => {
                tier.erase(&[key], &[]).expect("memory takes it");
                stored.remove(&number);
            }
            10 => tier.probe().expect("memory takes it"),
            11 => tier.reclaim().expect("memory takes it"),
            12 => {
                drop(tier);
                spoil(&dir.path().join(engine.label()), what ^ number, number);
                for certain in stored.values_mut() {
                    *certain = false;
                }
                tier = open(engine, dir.path());
            }
            13 => {
                drop(tier);
                tier = open(engine, dir.path());
            }
            _ => {}
        }
        let found = Span::heap(shape().payload_bytes());
        match (read_checked(&*tier, &key, &root(), &shape(), &found), stored.get(&number)) {
            (Ok(_), Some(_)) => {
                let mut bytes = vec![0; found.bytes() as usize];
                found.copy_out(0, &mut bytes);
                assert!(bytes.iter().all(|byte| *byte == number), "a wrong byte");
            }
            (Ok(_), None) => panic!("block {number} was removed"),
            (Err(error), Some(true)) => panic!("block {number} is lost: {error:?}"),
            (Err(_), _) => {}
        }
    }
}

fn disk_seeds() -> Vec<Vec<u8>> {
    let writes = (0..BLOCKS).flat_map(|number| [0, number]);
    let then = [9, 3, 7, 4, 12, 5, 14, 5, 13, 0, 0, 3, 9, 9, 12, 77, 10, 1, 11, 1];
    vec![writes.chain(then).collect(), then.to_vec()]
}
