//! Parsers of bytes that another program, another machine or a drive gives. Where a checksum stands before the
//! parser, it is made right first, as a peer that means harm would make it.

use cache_daemon::migrate::bundle::{BlockBytes, Decoder, Encoder, Manifest, SealKey, Section};
use cache_daemon::migrate::secret::Signature;
use cache_daemon::reconfigure::Change;
use cache_daemon::sim::trace::Trace;
use cache_daemon::tier::remote::RemoteUrl;
use cache_daemon::tombstone::Tombstone;
use kv_protocol::geometry::{GEOMETRY_BYTES, LayerSet};
use kv_protocol::handshake::{ClientToken, HELLO_BYTES, Hello, decode_answer};
use kv_protocol::key::KEY_BYTES;
use kv_protocol::message::{BlockList, Entry, FoundBlock, FrameHandle, KeyList, Tier};
use kv_protocol::record::{RECORD_VERSION, Record};
use kv_protocol::start::{Run, Start};
use kv_protocol::table::RegionView;
use kv_protocol::{
    Accept, BlockHeader, BlockKey, Completion, Dtype, Fingerprint, FrameIndex, Generation,
    Geometry, NumericsTag, Region, RootKey, Submission, Variant,
};
use operator::api::{ByteSize, Span};
use runtime::http::conversations::Record as Conversation;
use runtime::http::openai::{Api, ReplyRequest};
use runtime::text::metadata::TextMetadata;
use runtime::weights::gguf::Model;
use runtime::weights::random::write_tiny_gguf;

use super::Target;

/// See the module.
pub const TARGETS: &[Target] = &[
    Target { name: "geometry", run: geometry, seeds: || vec![shape().encode().to_vec()] },
    Target { name: "block-header", run: block_header, seeds: || vec![header().encode(&shape())] },
    Target { name: "handshake", run: handshake, seeds: || vec![hello().encode().to_vec()] },
    Target { name: "messages", run: messages, seeds: message_seeds },
    Target { name: "record", run: record, seeds: record_seeds },
    Target { name: "tombstone", run: tombstone, seeds: tombstone_seeds },
    Target { name: "bundle", run: bundle, seeds: bundle_seeds },
    Target { name: "region", run: region, seeds: || vec![vec![0; 64]] },
    Target { name: "texts", run: texts, seeds: text_seeds },
    Target { name: "trace", run: trace, seeds: trace_seeds },
    Target { name: "request", run: request, seeds: request_seeds },
    Target { name: "model-file", run: model_file, seeds: model_seeds },
];

/// A shape with few bytes.
pub fn shape() -> Geometry {
    Geometry::new(4, 3, 1, 4, Dtype::F16, LayerSet::all(3)).expect("a right shape")
}

/// The root of all blocks here.
pub fn root() -> RootKey {
    RootKey::new(&Fingerprint([1; KEY_BYTES]), b"fuzz")
}

fn header() -> BlockHeader {
    let parent = root().as_parent();
    let tokens = vec![5, 6, 7, 8];
    BlockHeader {
        key: BlockKey::child(&parent, &tokens),
        parent,
        root: root(),
        variant: Variant::Exact,
        numerics: NumericsTag::of("fuzz"),
        generation: Generation(3),
        created_ms: 1,
        tokens,
        checksums: vec![1, 2, 3],
    }
}

/// Writes the CRC32C of all bytes, taken as if the checksum were zero, to where it stands.
fn seal(bytes: &mut [u8], at: usize) {
    if let Some(place) = bytes.get_mut(at..at + 4) {
        place.fill(0);
        let crc = crc32c::crc32c(bytes);
        bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// The front of the bytes, or zeros.
fn front<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut front = [0; N];
    let bytes = &bytes[..bytes.len().min(N)];
    front[..bytes.len()].copy_from_slice(bytes);
    front
}

fn geometry(bytes: &[u8]) {
    let bytes: [u8; GEOMETRY_BYTES] = front(bytes);
    if let Ok(geometry) = Geometry::decode(&bytes) {
        assert_eq!(geometry.encode(), bytes);
        assert!(geometry.payload_bytes() <= geometry.frame_bytes());
    }
}

fn block_header(bytes: &[u8]) {
    /// Byte table of the header in design and code: the checksum's place.
    const AT_CRC: usize = 12;
    let mut bytes = bytes.to_vec();
    bytes.truncate(BlockHeader::bytes(&shape()));
    seal(&mut bytes, AT_CRC);
    if let Ok(header) = BlockHeader::decode(&bytes, &shape()) {
        assert_eq!(header.key, BlockKey::child(&header.parent, &header.tokens));
        assert_eq!(BlockHeader::decode(&header.encode(&shape()), &shape()).ok(), Some(header));
    }
}

fn hello() -> Hello {
    Hello {
        geometry: shape(),
        fingerprint: Fingerprint([1; KEY_BYTES]),
        client: ClientToken([2; 16]),
        quiescent: true,
    }
}

fn handshake(bytes: &[u8]) {
    let hello: [u8; HELLO_BYTES] = front(bytes);
    if let Ok(hello) = Hello::decode(&hello) {
        assert_eq!(Hello::decode(&hello.encode()).ok(), Some(hello));
    }
    let _ = decode_answer(&front(bytes));
}

fn entry(bytes: &[u8]) -> Entry {
    let bytes: [u8; 64] = front(bytes);
    let mut entry = Entry::default();
    for (word, bytes) in entry.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(front(bytes));
    }
    entry
}

/// The first byte says which: the other kinds of the two rings, or of the two lists.
fn messages(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 4 {
        0 => {
            if let Ok(message) = Submission::decode(&entry(bytes)) {
                assert_eq!(Submission::decode(&message.encode()), Ok(message));
            }
        }
        1 => {
            if let Ok(message) = Completion::decode(&entry(bytes)) {
                assert_eq!(Completion::decode(&message.encode()), Ok(message));
            }
        }
        2 => {
            if let Ok(list) = KeyList::decode(bytes) {
                assert_eq!(KeyList::decode(&list.encode()), Ok(list));
            }
        }
        _ => {
            if let Ok(list) = BlockList::decode(bytes) {
                assert_eq!(BlockList::encode(&list), bytes);
            }
        }
    }
}

fn message_seeds() -> Vec<Vec<u8>> {
    let run = |first_block| Run { parent: BlockKey([5; KEY_BYTES]), first_block };
    let list = |runs: &[u32]| {
        let start = Start { runs: runs.iter().map(|place| run(*place)).collect(), ..root().into() };
        let keys = vec![BlockKey([3; KEY_BYTES]); 2];
        KeyList { start, accept: Accept::Any, keys, tail: vec![1, 2] }.encode()
    };
    let handle = FrameHandle { frame: FrameIndex(1), generation: Generation(2) };
    let found = BlockList::encode(&[FoundBlock { index: 0, handle, tier: Tier::Host }]);
    // Each kind of entry by its number in the first word.
    let entries = (0..16_u8).flat_map(|kind| [vec![0, kind], vec![1, kind]]);
    let lists = [[vec![2], list(&[])].concat(), [vec![2], list(&[0, 2])].concat()];
    entries.chain(lists).chain([[vec![3], found].concat()]).collect()
}

fn record(bytes: &[u8]) {
    const AT_CRC: usize = 4;
    let mut bytes = bytes.to_vec();
    seal(&mut bytes, AT_CRC);
    if let Ok(record) = Record::decode(&bytes) {
        let keys = record.keys();
        let _ = (record.start(), record.open_parent(&keys));
        let again = record.encode().ok();
        if bytes.first_chunk() == Some(&RECORD_VERSION.to_le_bytes()) {
            assert_eq!(again.as_ref(), Some(&bytes));
        } else if let Some(again) = again {
            // Of the version before; too long a record with what this one adds is not written again.
            assert_eq!(Record::decode(&again).as_ref(), Ok(&record));
        }
        let (sinks, dropped) = (u32::from(bytes[8]), u32::from(bytes[16]));
        let mut truncated = record;
        if truncated.truncate(sinks, dropped).is_ok() {
            let kept = [&keys[..sinks as usize], &keys[(sinks + dropped) as usize..]].concat();
            assert_eq!(truncated.keys(), kept);
        }
    }
    let _ = Conversation::from_bytes(&bytes, 1000);
}

fn record_seeds() -> Vec<Vec<u8>> {
    let record = |tokens: Vec<u32>| Record::new(root(), "a name".to_owned(), 4, tokens);
    let mut truncated = record((0..40).collect());
    truncated.truncate(2, 3).expect("ten blocks");
    let all = [record(vec![]), record((0..40).collect()), truncated];
    all.map(|record| record.encode().expect("it is small")).to_vec()
}

fn tombstone(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    if bytes.len() > 8 {
        let crc = crc32c::crc32c(&bytes[8..]);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    }
    if let Some(tombstone) = Tombstone::decode(&bytes) {
        assert_eq!(tombstone.encode(), bytes);
    }
}

fn tombstone_seeds() -> Vec<Vec<u8>> {
    vec![Tombstone { deleted_ms: 7, keys: vec![BlockKey([3; KEY_BYTES]); 2] }.encode()]
}

/// As objects of a remote store come: whoever may write there has the seal's key. The first byte says in
/// pieces of which size.
fn bundle(bytes: &[u8]) {
    let Some((piece, bytes)) = bytes.split_first() else { return };
    let mut decoder = Decoder::new(SealKey::of_objects(), None);
    'stream: for mut piece in bytes.chunks(usize::from(*piece) + 1) {
        loop {
            match decoder.next(&mut piece) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => break 'stream,
            }
        }
    }
    let _ = decoder.finish();
    let _ = BlockBytes::new(bytes.to_vec()).split(&shape());
}

fn bundle_seeds() -> Vec<Vec<u8>> {
    let mut encoder = Encoder::new(SealKey::of_objects());
    let record = record_seeds().remove(1);
    let manifest = Manifest {
        geometry: shape(),
        fingerprint: Fingerprint([1; KEY_BYTES]),
        root: root(),
        conversation: kv_protocol::ConversationId([4; KEY_BYTES]),
        updated_ms: 9,
        record_bytes: record.len() as u32,
        keys: 1,
    };
    let block = [header().encode(&shape()), vec![0; shape().payload_bytes() as usize]].concat();
    let sections = [
        Section::Manifest(manifest),
        Section::Record(record),
        Section::Keys(vec![header().key]),
        Section::Block(BlockBytes::new(block)),
        Section::End { blocks: 1, absent: 0 },
    ];
    let mut bytes = vec![200];
    for section in sections {
        let (header, body) = encoder.section(section);
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(&body);
    }
    vec![bytes]
}

/// A peer scribbles over the region: pieces of ten bytes, two for the place and eight for the word.
fn region(bytes: &[u8]) {
    let view = RegionView::new(Region::heap(6 << 20));
    let table = view.format(shape()).expect("there is room");
    let metadata_bytes = table.layout().frame(FrameIndex(0));
    for scribble in bytes.chunks_exact(10) {
        let (at, word) = scribble.split_at(2);
        // Words, from the places where most of the control words are to the last header.
        let at = u64::from(u16::from_le_bytes(front(at))) * 8;
        view.region().copy_in(at % (metadata_bytes - 8), word);
    }
    if let Ok(table) = view.table() {
        for frame in table.frames() {
            let _ = (table.state(frame), table.pin_count(frame));
            let _ = table.header(FrameHandle { frame, generation: Generation(1) });
        }
    }
}

/// What people and peers write: addresses, signatures, sizes, settings.
fn texts(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Change>(bytes);
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = text.parse::<RemoteUrl>();
    if let Ok(signature) = Signature::decode(text) {
        assert!(Signature::decode(&signature.encode()).is_ok());
    }
    if let Ok(size) = text.parse::<ByteSize>() {
        assert_eq!(size.to_string().parse::<ByteSize>().ok(), Some(size));
    }
    let _ = text.parse::<Span>();
    let _ = cache_daemon::config::parse_bytes(text);
}

fn text_seeds() -> Vec<Vec<u8>> {
    let hex = "0123456789abcdef".repeat(4);
    let signature = format!("1700000000000.{}.{hex}", &hex[..32]);
    let texts = [
        r#"{"policy": "lru", "disk_bytes": 1, "tenant_host_share": 50}"#,
        "s3://bucket/prefix?endpoint=http://127.0.0.1:1&region=x",
        "file:///some/folder",
        &signature,
        "1.5Gi",
        "90s",
        "512MiB",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}

fn trace(bytes: &[u8]) {
    if let Ok(trace) = Trace::read(bytes) {
        let mut written = Vec::new();
        trace.write(&mut written).expect("memory takes it");
        assert_eq!(Trace::read(written.as_slice()).ok(), Some(trace));
    }
}

fn trace_seeds() -> Vec<Vec<u8>> {
    let lines = [
        r#"{"colloquy_trace":1,"name":"a","block_tokens":64}"#,
        r#"{"conversation":1,"at_ms":0,"new":10,"answer":5}"#,
        r#"{"conversation":1,"tenant":2,"after_ms":9,"cut":3,"new":1,"answer":1,"blocks":[1,2]}"#,
    ];
    vec![lines.join("\n").into_bytes()]
}

fn request(bytes: &[u8]) {
    for api in [Api::Chat, Api::Completions] {
        let _ = ReplyRequest::parse(api, bytes);
    }
}

fn request_seeds() -> Vec<Vec<u8>> {
    let bodies = [
        r#"{"model":"m","messages":[{"role":"user","content":"Hi"}],"max_tokens":4,"stream":true,
            "stream_options":{"include_usage":true},"stop":["a"],"temperature":0.5,"seed":1,
            "cache":{"no_read":true,"ttl_seconds":5},"prompt_cache_key":"c","cache_salt":"s"}"#,
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"}]}],"logprobs":true}"#,
        r#"{"prompt":"Hi","max_tokens":1,"logprobs":2,"top_p":0.9,"top_k":3}"#,
        r#"{"prompt_token_ids":[1,2,3]}"#,
    ];
    bodies.map(|body| body.as_bytes().to_vec()).to_vec()
}

/// A model file: what stands before the weights, which are too many to be changed to any purpose.
fn model_file(bytes: &[u8]) {
    let folder = tempfile::tempdir_in("/dev/shm").expect("memory takes a file");
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).expect("memory takes a file");
    if let Ok(model) = Model::open(&path) {
        let _ = TextMetadata::from_gguf(model.metadata());
    }
}

fn model_seeds() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tiny.gguf");
    write_tiny_gguf(&path, 1).expect("a small file");
    vec![std::fs::read(path).expect("it was written")]
}
