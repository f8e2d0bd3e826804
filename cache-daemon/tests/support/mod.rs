//! A real daemon as a child process, and a small runtime ("driver") over the real cache client. Every
//! block's bytes follow from its key, so one wrong byte anywhere is seen.
#![allow(dead_code, reason = "each test file uses its own part")]

pub mod faults;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kv_protocol::geometry::LayerSet;
use kv_protocol::message::CommitOutcome;
use kv_protocol::start::{Shared, Start};
use kv_protocol::table::RegionView;
use kv_protocol::{BlockKey, ConversationId, Dtype, Fingerprint, Geometry, Record, RootKey};
use runtime::cache_client::{
    Accept, CacheClient, CacheConfig, CacheEvent, CachedBlock, Doorbell, FreeFrame, Hint,
    MissReason, NewBlock, NumericsTag, Query, SequenceTag, Tier, Variant,
};

/// A test that waits longer than this hangs: it fails. Results never depend on it.
const PATIENCE: Duration = Duration::from_mins(1);

/// The model of these tests: 16 tokens a block, frames of 8 KiB.
pub fn geometry() -> Geometry {
    Geometry::new(16, 4, 1, 32, Dtype::F16, LayerSet::all(4)).expect("a valid geometry")
}

/// Bytes of a region that holds this many frames of [`geometry`].
pub fn region_bytes(frames: u64) -> u64 {
    use kv_protocol::{BlockHeader, layout};
    let header = BlockHeader::bytes(&geometry()) as u64;
    layout::FRAME_TABLE_AT
        + layout::PAGE_BYTES
        + frames * (layout::FRAME_ENTRY_BYTES + header + geometry().frame_bytes())
}

/// The bytes that a block must have.
pub fn payload(key: &BlockKey, geometry: &Geometry) -> Vec<u8> {
    let mut bytes = vec![0; geometry.payload_bytes() as usize];
    blake3::Hasher::new_keyed(&key.0).finalize_xof().fill(&mut bytes);
    bytes
}

/// Waits for something that must come to be.
pub fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A running `cache-daemon supervise`; killed, workers and all, when dropped.
pub struct Daemon {
    supervisor: Child,
    pub socket: PathBuf,
    pub http: SocketAddr,
}

impl Daemon {
    /// Starts one in a folder, which keeps socket and disk tier.
    pub fn start(binary: &Path, dir: &Path, host_bytes: u64, more: &[&str]) -> Self {
        Self::start_in(binary, dir, host_bytes, more, &[])
    }

    /// As `start`, with more variables in its environment.
    pub fn start_in(
        binary: &Path,
        dir: &Path,
        host_bytes: u64,
        more: &[&str],
        environment: &[(&str, &Path)],
    ) -> Self {
        let disk = format!("--disk-dir={}", dir.join("disk").display());
        let more: Vec<&str> = std::iter::once(disk.as_str()).chain(more.iter().copied()).collect();
        Self::spawn(binary, dir, host_bytes, &more, environment)
    }

    /// Starts one whose blocks are in frames only.
    pub fn start_without_disk(binary: &Path, dir: &Path, host_bytes: u64, more: &[&str]) -> Self {
        Self::spawn(binary, dir, host_bytes, more, &[])
    }

    fn spawn(
        binary: &Path,
        dir: &Path,
        host_bytes: u64,
        more: &[&str],
        environment: &[(&str, &Path)],
    ) -> Self {
        let socket = dir.join("daemon.sock");
        let http = free_address();
        let supervisor = Command::new(binary)
            .arg("supervise")
            .arg(format!("--socket={}", socket.display()))
            .arg(format!("--host-bytes={host_bytes}"))
            .arg(format!("--http={http}"))
            .args(more)
            .envs(environment.iter().copied())
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "error".into()))
            .stdin(Stdio::null())
            .spawn()
            .expect("the daemon starts");
        let mut daemon = Self { supervisor, socket, http };
        until("the daemon answers", || {
            let ended = daemon.supervisor.try_wait().expect("our own child");
            assert!(ended.is_none(), "the daemon ended: {ended:?}");
            daemon.try_get("/started")
        });
        daemon
    }

    pub fn supervisor_pid(&self) -> u32 {
        self.supervisor.id()
    }

    /// The present worker.
    pub fn worker_pid(&self) -> Option<i32> {
        let pid = self.supervisor.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    pub fn kill_worker(&self) {
        let pid = until("there is a worker", || self.worker_pid());
        kill(pid, rustix::process::Signal::KILL);
        until("the worker is gone", || (self.worker_pid() != Some(pid)).then_some(()));
    }

    /// The region, by way of the supervisor's descriptor.
    pub fn region(&self) -> RegionView {
        let fds = format!("/proc/{}/fd", self.supervisor_pid());
        let is_region = |path: &PathBuf| {
            let target = std::fs::read_link(path).unwrap_or_default();
            target.to_string_lossy().contains("memfd:colloquy-kv")
        };
        let path = std::fs::read_dir(fds)
            .expect("our own child's descriptors")
            .flatten()
            .map(|entry| entry.path())
            .find(is_region)
            .expect("the supervisor holds the region");
        let file = std::fs::File::options().read(true).write(true).open(path);
        let memfd = file.expect("our own user's").into();
        RegionView::new(cache_daemon::shm::map::map(&memfd).expect("a sealed region"))
    }

    /// SIGTERM, and the exit code.
    pub fn stop(mut self) -> Option<i32> {
        kill(self.supervisor.id() as i32, rustix::process::Signal::TERM);
        let status = until("the daemon has ended", || self.supervisor.try_wait().ok().flatten());
        status.code()
    }

    fn try_get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.http).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.lines().next()?.contains(" 200 ").then(|| body.to_owned())
    }

    pub fn get(&self, path: &str) -> String {
        until("http answers", || self.try_get(path))
    }

    pub fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.get("/status")).expect("status is JSON")
    }

    pub fn status_u64(&self, pointer: &str) -> u64 {
        let status = self.status();
        let value = status.pointer(pointer).and_then(serde_json::Value::as_u64);
        value.unwrap_or_else(|| panic!("no number {pointer} in {status}"))
    }
}

impl Daemon {
    /// Where the admin API is.
    pub fn admin_socket(&self) -> PathBuf {
        self.socket.with_file_name("admin.sock")
    }

    /// Asks the admin API: status and answer.
    pub fn admin(
        &self,
        method: &str,
        path: &str,
        body: &serde_json::Value,
    ) -> (u16, serde_json::Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let answer = until("the admin API answers", || {
            let mut stream = std::os::unix::net::UnixStream::connect(self.admin_socket()).ok()?;
            stream.set_read_timeout(Some(PATIENCE)).ok()?;
            let length = body.len();
            write!(
                stream,
                "{method} {path} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
            )
            .ok()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).ok()?;
            Some(answer)
        });
        let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        let body = serde_json::from_str(body).unwrap_or_else(|_| body.into());
        (status.expect("a status"), body)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.supervisor.kill(); // Its worker dies with it.
        let _ = self.supervisor.wait();
    }
}

pub fn kill(pid: i32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, signal); // Gone already is as good.
    }
}

/// The daemon is gone, or went, in the middle of something.
#[derive(Debug)]
pub struct Detached;

/// What a load found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Blocks that were in frames.
    pub host: usize,
    /// Blocks that came from disk.
    pub disk: usize,
    /// Tokens covered without a gap from the start.
    pub tokens: usize,
    /// Why it ended where it ended.
    pub miss: Option<MissReason>,
}

/// A small runtime: saves and loads conversations, and checks each byte it loads.
pub struct Driver {
    pub client: CacheClient,
    doorbell: Doorbell,
    geometry: Geometry,
    pub start: Start,
    next_sequence: u64,
}

pub const NUMERICS: &str = "driver";

impl Driver {
    /// Starts a client; the daemon need not be there.
    pub fn spawn(socket: &Path, geometry: Geometry, salt: &[u8]) -> Self {
        let fingerprint = Fingerprint([geometry.layers() as u8; 32]);
        let doorbell = Doorbell::new();
        let config = CacheConfig { socket: socket.to_owned(), geometry, fingerprint };
        let client = CacheClient::spawn(config, doorbell.waker()).expect("a thread");
        let start = RootKey::new(&fingerprint, salt).into();
        Self { client, doorbell, geometry, start, next_sequence: 0 }
    }

    /// Starts a client and waits until it is attached.
    pub fn attach(socket: &Path, geometry: Geometry) -> Self {
        let mut driver = Self::spawn(socket, geometry, b"");
        driver.wait_attached();
        driver
    }

    pub fn wait_attached(&mut self) {
        while !self.client.is_attached() {
            let _ = self.next_event(); // Detached, at most.
        }
    }

    pub fn root(&self) -> RootKey {
        self.start.root
    }

    /// From now on the first blocks of each conversation are every tenant's.
    pub fn share(&mut self, blocks: u32) {
        let root = RootKey::new(&Fingerprint([77; 32]), b"public");
        self.start.shared = Some(Shared { root, blocks });
    }

    /// A record of a conversation as the runtime puts it, and its id.
    pub fn record(&self, name: &str, tokens: &[u32]) -> (ConversationId, Record) {
        let id = ConversationId::new(&self.root(), name.as_bytes());
        let tokens_per_block = self.geometry.tokens_per_block();
        let (start, is_truncated) = (self.start.clone(), !self.start.runs.is_empty());
        let record = Record::new(start, name.to_owned(), tokens_per_block, tokens.to_vec());
        (id, Record { dropped_tokens: is_truncated.into(), ..record })
    }

    /// Saves a turn: its blocks, then its record.
    pub fn save_turn(&mut self, name: &str, tokens: &[u32]) -> Result<ConversationId, Detached> {
        self.save(tokens)?;
        let (id, record) = self.record(name, tokens);
        let bytes = record.encode().expect("a record within its bounds");
        self.client.put_conversation(id, bytes).map_err(|_| Detached)?;
        assert!(self.ask(id)?.is_some(), "the record that was just put");
        Ok(id)
    }

    /// The daemon's record of a conversation.
    pub fn ask(&mut self, id: ConversationId) -> Result<Option<Vec<u8>>, Detached> {
        let question = self.client.get_conversation(id).map_err(|_| Detached)?;
        loop {
            match self.next_event()? {
                CacheEvent::Conversation { question: of, record } if of == question => {
                    return Ok(record);
                }
                _ => {}
            }
        }
    }

    fn accept() -> Accept {
        Accept::Own { variant: Variant::Exact, numerics: NumericsTag::of(NUMERICS) }
    }

    pub fn query(&self, tokens: &[u32]) -> Query {
        let tokens: Arc<[u32]> = tokens.into();
        Query::new(self.start.clone(), Self::accept(), tokens, self.geometry.tokens_per_block())
    }

    /// The next event; `Err` if it is the end of the attachment.
    pub fn next_event(&mut self) -> Result<CacheEvent, Detached> {
        let begin = Instant::now();
        loop {
            match self.client.poll() {
                Some(CacheEvent::Detached) => return Err(Detached),
                Some(event) => return Ok(event),
                None => self.doorbell.wait(Duration::from_millis(50)),
            }
            assert!(begin.elapsed() < PATIENCE, "waited in vain for an event");
        }
    }

    /// Commits all blocks of a conversation, tail included.
    pub fn save(&mut self, tokens: &[u32]) -> Result<Vec<CommitOutcome>, Detached> {
        self.save_with(tokens, |_| {})
    }

    /// As `save`; `pause` is called between the rows of each block.
    pub fn save_with(
        &mut self,
        tokens: &[u32],
        mut pause: impl FnMut(usize),
    ) -> Result<Vec<CommitOutcome>, Detached> {
        let (mut open, mut outcomes, mut keys) = (0, Vec::new(), Vec::new());
        for block in tokens.chunks(usize::from(self.geometry.tokens_per_block())) {
            let begin = Instant::now();
            let frame = loop {
                if let Some(frame) = self.client.take_frame() {
                    break frame;
                }
                match self.client.poll() {
                    Some(CacheEvent::Detached) => return Err(Detached),
                    Some(CacheEvent::Committed { outcome, .. }) => {
                        open -= 1;
                        outcomes.push(outcome);
                    }
                    Some(_) => {}
                    None if !self.client.is_attached() => return Err(Detached),
                    None => self.doorbell.wait(Duration::from_millis(50)),
                }
                assert!(begin.elapsed() < PATIENCE, "waited in vain for a free frame");
            };
            let block = self.fill(&frame, &keys, block, &mut pause);
            keys.push(BlockKey::child(&block.parent, &block.tokens));
            self.client.commit(frame, block).map_err(|_| Detached)?;
            open += 1;
        }
        while open > 0 {
            if let CacheEvent::Committed { outcome, .. } = self.next_event()? {
                open -= 1;
                outcomes.push(outcome);
            }
        }
        Ok(outcomes)
    }

    /// Writes the bytes that a block must have into a frame; `pause` is called between its rows. `keys` are
    /// of the blocks before it.
    pub fn fill(
        &self,
        frame: &FreeFrame,
        keys: &[BlockKey],
        tokens: &[u32],
        mut pause: impl FnMut(usize),
    ) -> NewBlock {
        let parent = self.start.parent_of(keys.len(), keys);
        let bytes = payload(&BlockKey::child(&parent, tokens), &self.geometry);
        let rows: Vec<&[u8]> = bytes.chunks(self.geometry.row_bytes() as usize).collect();
        for (row, bytes) in rows.iter().enumerate() {
            frame.bytes().write(row * bytes.len(), bytes);
            pause(row);
        }
        NewBlock {
            root: self.start.root_of(keys.len()),
            parent,
            tokens: tokens.to_vec(),
            variant: Variant::Exact,
            numerics: NumericsTag::of(NUMERICS),
            checksums: rows.iter().map(|row| crc32c::crc32c(row)).collect(),
        }
    }

    /// Tells the daemon that a conversation's turn will come.
    pub fn enqueue(&mut self, tokens: &[u32], place: u32) -> SequenceTag {
        self.next_sequence += 1;
        let sequence = SequenceTag(self.next_sequence);
        let query = self.query(tokens);
        self.client.enqueue(sequence, query, Hint::Queued { place, start_in_ms: 0 });
        sequence
    }

    /// Looks a conversation up and checks each byte of what was found.
    pub fn load(&mut self, tokens: &[u32]) -> Result<Loaded, Detached> {
        let sequence = self.enqueue(tokens, 0);
        self.load_enqueued(sequence, tokens)
    }

    /// As `load`, for a sequence that was enqueued before.
    pub fn load_enqueued(
        &mut self,
        sequence: SequenceTag,
        tokens: &[u32],
    ) -> Result<Loaded, Detached> {
        let (blocks, miss) = self.pin(sequence)?;
        let loaded = self.check(tokens, &blocks, miss);
        drop(blocks);
        self.client.end(sequence);
        Ok(loaded)
    }

    /// All blocks of a sequence that there are, pinned.
    pub fn pin(
        &mut self,
        sequence: SequenceTag,
    ) -> Result<(Vec<CachedBlock>, Option<MissReason>), Detached> {
        self.client.lookup(sequence).map_err(|_| Detached)?;
        let (mut all, mut first_miss) = (Vec::new(), None);
        loop {
            match self.next_event()? {
                CacheEvent::Found { sequence: of, blocks, on_disk, miss } if of == sequence => {
                    all.extend(blocks);
                    first_miss = miss;
                    if on_disk == 0 {
                        break;
                    }
                }
                CacheEvent::Promoted { sequence: of, blocks, miss } if of == sequence => {
                    all.extend(blocks);
                    first_miss = miss.or(first_miss);
                    break;
                }
                _ => {}
            }
        }
        all.sort_by_key(|block: &CachedBlock| block.index);
        Ok((all, first_miss))
    }

    /// Panics at the first wrong byte.
    pub fn check(
        &self,
        tokens: &[u32],
        blocks: &[CachedBlock],
        miss: Option<MissReason>,
    ) -> Loaded {
        let mut loaded = Loaded { miss, ..Loaded::default() };
        let tokens_per_block = usize::from(self.geometry.tokens_per_block());
        for (place, block) in blocks.iter().enumerate() {
            match block.tier {
                Tier::Host => loaded.host += 1,
                Tier::Disk => loaded.disk += 1,
            }
            self.check_bytes(tokens, block);
            if place == block.index as usize {
                loaded.tokens = place * tokens_per_block + block.tokens as usize;
            }
        }
        loaded
    }

    /// The block's bytes, by its checksums and by its key.
    pub fn check_bytes(&self, tokens: &[u32], block: &CachedBlock) {
        assert!(self.are_as_stored(tokens, block), "wrong checksum in block {}", block.index);
    }

    /// Whether the block's checksums say that its bytes are those that were stored. Panics where they say so
    /// and the bytes are not those that its key gives.
    pub fn are_as_stored(&self, tokens: &[u32], block: &CachedBlock) -> bool {
        let tokens_per_block = usize::from(self.geometry.tokens_per_block());
        let Some(checksums) = block.frame.checksums() else { return false };
        let mut bytes = vec![0; self.geometry.payload_bytes() as usize];
        block.frame.read(0, &mut bytes);
        let rows = bytes.chunks(self.geometry.row_bytes() as usize);
        if rows.zip(&checksums).any(|(row, crc)| crc32c::crc32c(row) != *crc) {
            return false;
        }
        // A block whose tokens are all ours has the bytes that its key gives.
        let start = block.index as usize * tokens_per_block;
        let before = self.start.chain(&tokens[..start], tokens_per_block as u16);
        let parent = self.start.parent_of(before.len(), &before);
        let key = BlockKey::child(&parent, &tokens[start..start + block.tokens as usize]);
        if block.tokens as usize == tokens_per_block {
            assert!(bytes == payload(&key, &self.geometry), "wrong bytes in block {}", block.index);
        }
        true
    }

    /// Waits until something may have happened.
    pub fn rest(&self, longest: Duration) {
        self.doorbell.wait(longest);
    }
}

/// An address where nobody listens, for a server of this test: on a loopback address of its own, so that no
/// other server, and no client's end of a connection, gets its port before it does.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let process = (std::process::id() % 250) as u8 + 1;
    let ip = Ipv4Addr::new(127, process, (number / 250) as u8, (number % 250) as u8 + 1);
    let probe = TcpListener::bind((ip, 0)).expect("a loopback address");
    probe.local_addr().expect("its address")
}

/// Token ids of a test conversation.
pub fn conversation(number: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|position| number * 100_000 + position).collect()
}
