//! A cache whose tiers do what a test says: no processes, no clock, no threads.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use kv_protocol::message::{CommitOutcome, FrameHandle};
use kv_protocol::{BlockKey, FrameIndex, Generation, MissReason};

use super::super::cache::{Cache, Event, Wanted};
use crate::batch::{FoundFrame, ReadFrames, WriteFrame};
use crate::cache_client::{
    CachedBlock, ConversationId, Hint, NewBlock, NumericsTag, SequenceTag, Tier, Unavailable,
    Variant,
};

/// A frame of bytes that the test may spoil at any time.
#[derive(Debug)]
pub struct ToyFrame(Mutex<Vec<u8>>);

impl WriteFrame for ToyFrame {
    fn write(&self, offset: usize, from: &[u8]) {
        self.0.lock().unwrap()[offset..offset + from.len()].copy_from_slice(from);
    }
}

impl ToyFrame {
    fn spoil(&self) {
        self.0.lock().unwrap().iter_mut().for_each(|byte| *byte ^= 0x5A);
    }
}

impl ReadFrames for Stored {
    fn checksums(&self, _place: usize) -> Option<Vec<u32>> {
        Some(self.checksums.to_vec())
    }

    fn read(&self, _place: usize, offset: usize, to: &mut [u8]) {
        to.copy_from_slice(&self.frame.0.lock().unwrap()[offset..offset + to.len()]);
    }

    fn reject(&self, _place: usize) {} // Tests spoil frames that stay.
}

#[derive(Debug, Clone)]
struct Stored {
    parent: BlockKey,
    tokens: Vec<u32>,
    variant: Variant,
    numerics: NumericsTag,
    checksums: Arc<[u32]>,
    frame: Arc<ToyFrame>,
    on_disk: bool,
}

/// What the test sees and turns.
#[derive(Debug, Default)]
pub struct Daemon {
    pub attached: bool,
    /// Frames that may still be taken.
    pub frames: usize,
    /// Lookups are not answered.
    pub is_mute: bool,
    /// Promotes never end.
    pub disk_hangs: bool,
    pub commits: u64,
    pub lookups: u64,
    pub hints: u64,
    attachment: u64,
    frame_bytes: usize,
    blocks: HashMap<BlockKey, Stored>,
    records: HashMap<[u8; 32], Vec<u8>>,
    events: VecDeque<Event<u64>>,
    promoting: VecDeque<(SequenceTag, Vec<CachedBlock>)>,
    next_question: u64,
}

impl Daemon {
    pub fn new(frame_bytes: usize) -> Self {
        Self { attached: true, frames: 10_000, attachment: 1, frame_bytes, ..Self::default() }
    }

    /// A conversation is deleted.
    pub fn delete(&mut self, id: ConversationId) {
        self.blocks.clear();
        self.events.push_back(Event::Changed { id, is_deleted: true });
    }

    /// A block leaves.
    pub fn lose(&mut self, key: &BlockKey) {
        assert!(self.blocks.remove(key).is_some(), "not there");
    }

    /// All blocks go to disk.
    pub fn demote_all(&mut self) {
        self.blocks.values_mut().for_each(|stored| stored.on_disk = true);
    }

    /// One bit of every frame's bytes is another.
    pub fn spoil_all(&mut self) {
        self.blocks.values().for_each(|stored| stored.frame.spoil());
    }

    pub fn detach(&mut self) {
        if self.attached {
            self.attached = false;
            self.attachment += 1;
            self.promoting.clear();
            self.events.clear();
            self.events.push_back(Event::Detached);
        }
    }

    pub fn attach(&mut self) {
        if !self.attached {
            self.attached = true;
            self.events.push_back(Event::Attached);
        }
    }

    /// What was stored, lost.
    pub fn forget(&mut self) {
        self.blocks.clear();
    }

    pub fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// Checksums of the full blocks, by key.
    pub fn checksums(&self, tokens_per_block: u16) -> HashMap<BlockKey, Arc<[u32]>> {
        let full = |stored: &&Stored| stored.tokens.len() == usize::from(tokens_per_block);
        let blocks = self.blocks.iter().filter(|(_, stored)| full(stored));
        blocks.map(|(key, stored)| (*key, stored.checksums.clone())).collect()
    }

    pub fn variants(&self) -> Vec<Variant> {
        self.blocks.values().map(|stored| stored.variant).collect()
    }
}

/// The engine's end.
#[derive(Debug)]
pub struct ToyCache {
    pub daemon: Arc<Mutex<Daemon>>,
    wanted: HashMap<SequenceTag, Wanted>,
}

#[derive(Debug)]
pub struct ToyFree {
    frame: Arc<ToyFrame>,
    attachment: u64,
}

impl ToyCache {
    pub fn new(daemon: Arc<Mutex<Daemon>>) -> Self {
        Self { daemon, wanted: HashMap::new() }
    }

    /// Turns that the daemon knows of, in the order of their tags.
    pub fn tags(&self) -> Vec<SequenceTag> {
        let mut tags: Vec<_> = self.wanted.keys().copied().collect();
        tags.sort_unstable();
        tags
    }
}

fn found(index: usize, wanted: &Wanted, stored: &Stored) -> Option<CachedBlock> {
    let size = usize::from(wanted.tokens_per_block);
    let rest = &wanted.tokens[index * size..];
    let tokens = stored.tokens.iter().zip(rest).take_while(|(a, b)| a == b).count();
    let takes = wanted.accept.takes(&stored.variant, &stored.numerics);
    let handle = FrameHandle { frame: FrameIndex(0), generation: Generation(0) };
    (takes && tokens > 0).then(|| CachedBlock {
        index: index as u32,
        tokens: tokens as u32,
        is_whole: tokens == stored.tokens.len(),
        frame: FoundFrame::new(Arc::new(stored.clone()), 0),
        variant: stored.variant,
        numerics: stored.numerics,
        tier: if stored.on_disk { Tier::Disk } else { Tier::Host },
        handle,
    })
}

impl Cache for ToyCache {
    type Free = ToyFree;
    type Question = u64;

    fn is_attached(&self) -> bool {
        self.daemon.lock().unwrap().attached
    }

    fn enqueue(&mut self, tag: SequenceTag, wanted: Wanted, hint: Hint) {
        self.wanted.insert(tag, wanted);
        self.hint(tag, hint);
    }

    fn hint(&mut self, tag: SequenceTag, _hint: Hint) {
        assert!(self.wanted.contains_key(&tag), "a hint for a sequence that has ended");
        self.daemon.lock().unwrap().hints += 1;
    }

    fn lookup(&mut self, tag: SequenceTag) -> Result<(), Unavailable> {
        let mut daemon = self.daemon.lock().unwrap();
        let wanted = self.wanted.get(&tag).ok_or(Unavailable)?;
        daemon.lookups += 1;
        if daemon.is_mute {
            return Ok(());
        }
        let keys = wanted.start.chain(&wanted.tokens, wanted.tokens_per_block);
        let mut blocks = Vec::new();
        for (index, key) in keys.iter().enumerate() {
            let Some(stored) = daemon.blocks.get(key) else { break };
            let Some(block) = found(index, wanted, stored) else { break };
            blocks.push(block);
        }
        // Where the chain ends: the child that goes on like this for longest, whole or partial.
        let at = blocks.len();
        let parent = wanted.start.parent_of(at, &keys);
        let children = daemon.blocks.values().filter(|stored| stored.parent == parent);
        let next = children.filter_map(|stored| found(at, wanted, stored));
        blocks.extend(next.max_by_key(|block| block.tokens));
        let covered: u32 = blocks.iter().map(|block| block.tokens).sum();
        let miss = ((covered as usize) < wanted.tokens.len()).then_some(MissReason::NeverStored);
        let (on_disk, in_host): (Vec<_>, Vec<_>) =
            blocks.into_iter().partition(|block| block.tier == Tier::Disk);
        let count = on_disk.len() as u32;
        daemon.events.push_back(Event::Found { tag, blocks: in_host, on_disk: count, miss });
        if count > 0 {
            daemon.promoting.push_back((tag, on_disk));
        }
        Ok(())
    }

    fn end(&mut self, tag: SequenceTag) {
        self.wanted.remove(&tag);
    }

    fn take_frame(&mut self) -> Option<(ToyFree, Arc<dyn WriteFrame>)> {
        let mut daemon = self.daemon.lock().unwrap();
        if !daemon.attached || daemon.frames == 0 {
            return None;
        }
        daemon.frames -= 1;
        let frame = Arc::new(ToyFrame(Mutex::new(vec![0; daemon.frame_bytes])));
        Some((ToyFree { frame: frame.clone(), attachment: daemon.attachment }, frame))
    }

    fn commit(&mut self, free: ToyFree, block: NewBlock) -> Result<(), Unavailable> {
        let mut daemon = self.daemon.lock().unwrap();
        if !daemon.attached || free.attachment != daemon.attachment {
            return Err(Unavailable);
        }
        daemon.commits += 1;
        let key = BlockKey::child(&block.parent, &block.tokens);
        let stored = Stored {
            parent: block.parent,
            tokens: block.tokens,
            variant: block.variant,
            numerics: block.numerics,
            checksums: block.checksums,
            frame: free.frame,
            on_disk: false,
        };
        daemon.blocks.insert(key, stored);
        daemon.events.push_back(Event::Committed(CommitOutcome::Stored));
        Ok(())
    }

    fn put_conversation(&mut self, id: ConversationId, record: Vec<u8>) -> Result<(), Unavailable> {
        self.daemon.lock().unwrap().records.insert(id.0, record);
        Ok(())
    }

    fn get_conversation(&mut self, id: ConversationId) -> Result<u64, Unavailable> {
        let mut daemon = self.daemon.lock().unwrap();
        daemon.next_question += 1;
        let question = daemon.next_question;
        if !daemon.is_mute {
            let record = daemon.records.get(&id.0).cloned();
            daemon.events.push_back(Event::Conversation(question, record));
        }
        Ok(question)
    }

    fn poll(&mut self) -> Option<Event<u64>> {
        let mut daemon = self.daemon.lock().unwrap();
        if let Some(event) = daemon.events.pop_front() {
            return Some(event);
        }
        if daemon.disk_hangs {
            return None;
        }
        let (tag, blocks) = daemon.promoting.pop_front()?;
        Some(Event::Promoted { tag, blocks, miss: None })
    }
}
