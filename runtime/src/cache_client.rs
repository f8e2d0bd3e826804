//! The only file (with its three helpers) of the runtime that knows that a daemon exists.
//!
//! ```text
//! engine thread                                        link thread                 daemon
//! CacheClient ── hint, lookup, commit, unpin ──► ring ────────────────────────────►
//!             ◄── found, promoted, committed ─── ring ◄────────────────────────────
//!             ◄── attached, detached ───────────────── connect · handshake · map
//! ```
//!
//! **Invariants**
//! - No call blocks: not on the daemon, not on the disk, not on the socket.
//! - The cache may always say no: without a daemon every question is answered by [`Unavailable`].
//! - Whatever is relied on from the region is checked: here what decides which tokens a block stands for; by who
//!   copies the rows that the header is that block's, and each row's checksum. What fails is a miss; what no
//!   daemon would write ends the attachment.
//! - Pins and unused frames go back by dropping them, from whatever thread.
//! - After [`CacheEvent::Detached`] all frames handed out before are invalid: drop them. A copy that is
//!   still running reads whatever is there, and its checksums tell.

mod bell;
mod frames;
mod link;

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{SystemTime, UNIX_EPOCH};

use kv_protocol::layout::{ARENA_BYTES, CONVERSATION_RECORD_BYTES_MAX, SEQUENCE_KEYS_MAX};
use kv_protocol::message::{
    ArenaSpan, BlockList, CommitOutcome, FoundBlock, FrameHandle, HANDLES_MAX, KeyList,
    MessageError, Ticket,
};
use kv_protocol::ring::{ArenaWriter, Consumer, Producer, RingCorrupt};
use kv_protocol::sync::Ordering;
use kv_protocol::table::RegionView;
use kv_protocol::{
    AttachmentId, BlockHeader, BlockKey, Completion, FrameState, Geometry, Submission,
};

use crate::batch::{FoundFrame, WriteFrame};

pub use bell::{Doorbell, Waker};
pub use kv_protocol::message::{ANTICIPATED_FOR, Hint, SequenceTag, Tier};
pub use kv_protocol::start::{Run, Shared, Start};
pub use kv_protocol::{
    Accept, ConversationId, Fingerprint, MissReason, NumericsTag, RootKey, Variant,
};
pub use link::{AttachError, CacheConfig};

use frames::{AttachmentLife, GrantedFrame, Pinned, PinnedFrames};
use link::{Attached, Link, LinkEvent};

/// Link events that can wait for the engine: an attach and its end, twice over.
const LINK_EVENTS_MAX: usize = 4;
/// Messages that may wait for room in the ring. Each belongs to a frame, a sequence or a record of this
/// runtime; records are refused beyond it, the others are bounded by what they belong to.
const RECORDS_WAITING_MAX: usize = 64;

/// So many messages that give something back are sent before the daemon is rung for them.
const GIVEN_BACK_MAX: u32 = 256;

/// There is no daemon now, or it takes no more: go on without the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the cache is not available now")]
pub struct Unavailable;

/// What a sequence would like to read.
#[derive(Debug, Clone)]
pub struct Query {
    start: Start,
    accept: Accept,
    tokens: Arc<[u32]>,
    keys: Arc<[BlockKey]>,
}

impl Query {
    /// Computes the keys of the prompt's full blocks; what follows them is the tail.
    pub fn new(
        start: impl Into<Start>,
        accept: Accept,
        tokens: Arc<[u32]>,
        tokens_per_block: u16,
    ) -> Self {
        let start = start.into();
        let keys = start.chain(&tokens, tokens_per_block).into();
        Self { start, accept, tokens, keys }
    }

    /// Keys of the full blocks, in order.
    pub fn keys(&self) -> &Arc<[BlockKey]> {
        &self.keys
    }
}

/// A block that this runtime has pinned in a frame.
#[derive(Debug, Clone)]
pub struct CachedBlock {
    /// Place in the chain: tokens from `index * tokens_per_block` on.
    pub index: u32,
    /// Leading tokens that are the query's own: a whole block, or fewer of a tail.
    pub tokens: u32,
    /// Whether those are all that the block has.
    pub is_whole: bool,
    /// The bytes; dropping the last of an answer returns the pins.
    pub frame: FoundFrame,
    /// How it was computed.
    pub variant: Variant,
    /// With which arithmetic.
    pub numerics: NumericsTag,
    /// Where it was when the lookup came.
    pub tier: Tier,
    /// Place of the frame in the region, for logs and tests.
    pub handle: FrameHandle,
}

/// What happened since the last poll.
#[derive(Debug)]
pub enum CacheEvent {
    /// A daemon is there; lookups work from now on.
    Attached,
    /// It is gone: frames are invalid, open lookups, commits and questions will not be answered.
    Detached,
    /// Answer of a lookup.
    Found {
        /// Whose.
        sequence: SequenceTag,
        /// Ascending by index; may have gaps that are on their way from disk. The last may be a block of
        /// which only the first `tokens` are the query's.
        blocks: Vec<CachedBlock>,
        /// How many are on their way; `Promoted` follows if not 0.
        on_disk: u32,
        /// Why the chain ends before the query's last token; `None` if it does not.
        miss: Option<MissReason>,
    },
    /// All blocks that were on disk have arrived, or will not.
    Promoted {
        /// Whose.
        sequence: SequenceTag,
        /// Those that arrived, ascending by index.
        blocks: Vec<CachedBlock>,
        /// Why one did not.
        miss: Option<MissReason>,
    },
    /// A commit is over.
    Committed {
        /// Of the commit.
        commit: CommitId,
        /// Stored, known already, or refused.
        outcome: CommitOutcome,
    },
    /// Answer of `get_conversation`.
    Conversation {
        /// Of the question.
        question: QuestionId,
        /// The record, if there is one.
        record: Option<Vec<u8>>,
    },
    /// An operator has changed a conversation.
    Changed {
        /// Its record is another one now, or none.
        id: ConversationId,
        /// Nothing of it may be found any more.
        is_deleted: bool,
    },
}

/// Names a commit until it is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CommitId(u64);

/// Names a question until it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QuestionId(u64);

/// A free frame that this runtime may fill. Dropping it without a commit gives it back.
#[derive(Debug)]
pub struct FreeFrame {
    frame: Arc<GrantedFrame>,
}

impl FreeFrame {
    /// Where a backend's copier writes; may outlive this value.
    pub fn bytes(&self) -> Arc<dyn WriteFrame> {
        self.frame.clone()
    }
}

/// Describes the block in a filled frame.
#[derive(Debug, Clone)]
pub struct NewBlock {
    /// Model and tenant.
    pub root: RootKey,
    /// The full block before, or `root.as_parent()`.
    pub parent: BlockKey,
    /// Its tokens: `tokens_per_block`, or fewer for a tail.
    pub tokens: Vec<u32>,
    /// How it was computed.
    pub variant: Variant,
    /// With which arithmetic.
    pub numerics: NumericsTag,
    /// CRC32C of each packed row.
    pub checksums: Arc<[u32]>,
}

/// Counters for the runtime's metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheStats {
    /// Attachments so far.
    pub attaches: u64,
    /// Hints that found the ring full.
    pub hints_dropped: u64,
    /// Attachments ended because the daemon wrote nonsense.
    pub daemon_errors: u64,
    /// Found blocks that failed a check here.
    pub blocks_rejected: u64,
}

/// Why an attachment is ended from this side.
#[derive(Debug, thiserror::Error)]
enum DaemonError {
    #[error(transparent)]
    Ring(#[from] RingCorrupt),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("the daemon named frame {0}, which the region does not have")]
    Frame(u32),
}

/// A message on its way into the ring, with what it will write into the arena.
#[derive(Debug)]
enum Pending {
    Plain(Submission),
    Lookup(SequenceTag),
    Put { id: ConversationId, record: Vec<u8> },
}

#[derive(Debug)]
struct Asked {
    query: Query,
    /// The daemon has the key list.
    introduced: bool,
}

#[derive(Debug)]
struct Attachment {
    view: RegionView,
    id: AttachmentId,
    life: Arc<AttachmentLife>,
    /// Kept open: its end tells the daemon that we are gone.
    _socket: UnixStream,
    submissions: Producer,
    completions: Consumer,
    credits: Consumer,
    arena: ArenaWriter,
    pending: VecDeque<Pending>,
    /// Messages that the daemon was not rung for.
    given_back: u32,
}

/// The engine's end of the cache.
#[derive(Debug)]
pub struct CacheClient {
    geometry: Geometry,
    link: Link,
    link_events: Receiver<LinkEvent>,
    attachment: Option<Attachment>,
    sequences: HashMap<SequenceTag, Asked>,
    events: VecDeque<CacheEvent>,
    next_ticket: u64,
    stats: CacheStats,
}

impl CacheClient {
    /// Starts the link; the daemon need not be there yet. `waker` is rung when there is something to poll.
    pub fn spawn(config: CacheConfig, waker: Waker) -> std::io::Result<Self> {
        let (sender, link_events) = std::sync::mpsc::sync_channel(LINK_EVENTS_MAX);
        let geometry = config.geometry;
        Ok(Self {
            geometry,
            link: Link::spawn(config, waker, sender)?,
            link_events,
            attachment: None,
            sequences: HashMap::new(),
            events: VecDeque::new(),
            next_ticket: 0,
            stats: CacheStats::default(),
        })
    }

    /// Whether a daemon is attached, as far as the engine thread has seen.
    pub fn is_attached(&self) -> bool {
        self.attachment.is_some()
    }

    /// Shape of the blocks.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Counters.
    pub fn stats(&self) -> CacheStats {
        self.stats
    }

    /// A sequence waits for its turn: tells the daemon its keys, place and expected start. Never fails: a
    /// hint may be lost.
    pub fn enqueue(&mut self, sequence: SequenceTag, query: Query, hint: Hint) {
        self.sequences.insert(sequence, Asked { query, introduced: false });
        self.hint(sequence, hint);
    }

    /// A waiting sequence has another place or start.
    pub fn hint(&mut self, sequence: SequenceTag, hint: Hint) {
        let Some(asked) = self.sequences.get_mut(&sequence) else { return };
        let Some(attachment) = &mut self.attachment else { return };
        let sent = attachment.send_hint(sequence, asked, hint);
        let sent = sent.unwrap_or(false); // A corrupt ring shows at the next poll.
        if !sent {
            attachment.view.hints_dropped(attachment.id).fetch_add(1, Ordering::Relaxed);
            self.stats.hints_dropped += 1;
        }
    }

    /// Asks what is where; pins what is in host frames, starts the promote of what is on disk. The
    /// sequence must have been enqueued. Answered by `Found`, or by `Detached`.
    pub fn lookup(&mut self, sequence: SequenceTag) -> Result<(), Unavailable> {
        if !self.sequences.contains_key(&sequence) {
            return Err(Unavailable);
        }
        self.send(Pending::Lookup(sequence))
    }

    /// The sequence is done or gone; blocks found for it later are given back unseen. Blocks that the
    /// engine holds stay pinned until dropped.
    pub fn end(&mut self, sequence: SequenceTag) {
        if self.sequences.remove(&sequence).is_some() {
            let _ = self.send(Pending::Plain(Submission::End { sequence })); // No daemon, nothing to forget.
        }
    }

    /// A free frame, without a word to the daemon; `None` if none is granted now.
    pub fn take_frame(&mut self) -> Option<FreeFrame> {
        let attachment = self.attachment.as_mut()?;
        match attachment.take_frame() {
            Ok(frame) => frame,
            Err(error) => {
                self.drop_attachment(&error);
                None
            }
        }
    }

    /// Gives a filled frame to the daemon. All bytes must have been written. Answered by `Committed`,
    /// or by `Detached`.
    #[expect(clippy::needless_pass_by_value, reason = "a frame can be committed once")]
    pub fn commit(&mut self, frame: FreeFrame, block: NewBlock) -> Result<CommitId, Unavailable> {
        let attachment = self.attachment.as_mut().ok_or(Unavailable)?;
        if !Arc::ptr_eq(frame.frame.life(), &attachment.life) {
            return Err(Unavailable); // Taken under an earlier attachment.
        }
        let handle = frame.frame.handle();
        let header = BlockHeader {
            key: BlockKey::child(&block.parent, &block.tokens),
            parent: block.parent,
            root: block.root,
            variant: block.variant,
            numerics: block.numerics,
            generation: handle.generation,
            created_ms: unix_ms(),
            tokens: block.tokens,
            checksums: block.checksums.to_vec(),
        };
        attachment.life.table.write_header(handle.frame, &header);
        frame.frame.set_committed();
        let ticket = self.ticket();
        self.send(Pending::Plain(Submission::Commit { handle, ticket: Ticket(ticket) }))?;
        Ok(CommitId(ticket))
    }

    /// Stores a conversation record, best effort.
    pub fn put_conversation(
        &mut self,
        id: ConversationId,
        record: Vec<u8>,
    ) -> Result<(), Unavailable> {
        if record.len() > CONVERSATION_RECORD_BYTES_MAX as usize {
            return Err(Unavailable);
        }
        let attachment = self.attachment.as_ref().ok_or(Unavailable)?;
        let waiting =
            attachment.pending.iter().filter(|message| matches!(message, Pending::Put { .. }));
        if waiting.count() >= RECORDS_WAITING_MAX {
            return Err(Unavailable);
        }
        self.send(Pending::Put { id, record })
    }

    /// Asks for a conversation record. Answered by `Conversation`, or by `Detached`.
    pub fn get_conversation(&mut self, id: ConversationId) -> Result<QuestionId, Unavailable> {
        let ticket = self.ticket();
        let question = Submission::GetConversation { id, ticket: Ticket(ticket) };
        self.send(Pending::Plain(question))?;
        Ok(QuestionId(ticket))
    }

    /// The next thing that happened, if any. Call until `None`, after each ring of the doorbell.
    pub fn poll(&mut self) -> Option<CacheEvent> {
        self.poll_link();
        if self.events.is_empty()
            && let Err(error) = self.poll_rings()
        {
            self.drop_attachment(&error);
        }
        self.events.pop_front()
    }

    fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    fn poll_link(&mut self) {
        loop {
            match self.link_events.try_recv() {
                Ok(LinkEvent::Attached(attached)) => self.attached(*attached),
                Ok(LinkEvent::Gone) => self.detached(),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }

    fn attached(&mut self, attached: Attached) {
        self.detached();
        let Attached { view, welcome, life, socket } = attached;
        self.attachment = Some(Attachment {
            view,
            id: welcome.attachment,
            life,
            _socket: socket,
            submissions: Producer::default(),
            completions: Consumer::default(),
            credits: Consumer::default(),
            arena: ArenaWriter::new(ARENA_BYTES),
            pending: VecDeque::new(),
            given_back: 0,
        });
        self.stats.attaches += 1;
        self.events.push_back(CacheEvent::Attached);
    }

    fn detached(&mut self) {
        if self.attachment.take().is_none() {
            return;
        }
        // Blocks and answers of the old attachment that nobody has seen yet go with it.
        self.events.clear();
        self.sequences.values_mut().for_each(|asked| asked.introduced = false);
        self.events.push_back(CacheEvent::Detached);
    }

    /// The daemon wrote what no daemon writes: hang up, and attach anew.
    fn drop_attachment(&mut self, error: &DaemonError) {
        tracing::error!(%error, "the cache daemon wrote nonsense; attaching anew");
        self.stats.daemon_errors += 1;
        self.link.hang_up();
        self.detached();
    }

    fn send(&mut self, message: Pending) -> Result<(), Unavailable> {
        let attachment = self.attachment.as_mut().ok_or(Unavailable)?;
        attachment.pending.push_back(message);
        attachment.flush(&mut self.sequences).map_err(|error| {
            self.drop_attachment(&error);
            Unavailable
        })
    }

    fn poll_rings(&mut self) -> Result<(), DaemonError> {
        let Some(attachment) = &mut self.attachment else { return Ok(()) };
        attachment.return_released();
        attachment.flush(&mut self.sequences)?;
        while let Some((completion, bytes)) = attachment.next_completion()? {
            let event = match completion {
                Completion::Found { sequence, on_disk, miss, .. } => {
                    let found = BlockList::decode(&bytes)?;
                    let (blocks, rejected) =
                        attachment.check_blocks(self.sequences.get(&sequence), &found)?;
                    self.stats.blocks_rejected += u64::from(rejected);
                    let miss = if rejected > 0 { Some(MissReason::Checksum) } else { miss };
                    CacheEvent::Found { sequence, blocks, on_disk, miss }
                }
                Completion::Promoted { sequence, miss, .. } => {
                    let found = BlockList::decode(&bytes)?;
                    let (blocks, rejected) =
                        attachment.check_blocks(self.sequences.get(&sequence), &found)?;
                    self.stats.blocks_rejected += u64::from(rejected);
                    let miss = if rejected > 0 { Some(MissReason::Checksum) } else { miss };
                    CacheEvent::Promoted { sequence, blocks, miss }
                }
                Completion::Committed { ticket, outcome } => {
                    CacheEvent::Committed { commit: CommitId(ticket.0), outcome }
                }
                Completion::Conversation { ticket, record } => CacheEvent::Conversation {
                    question: QuestionId(ticket.0),
                    record: record.map(|_| bytes),
                },
                Completion::Changed { id, is_deleted } => CacheEvent::Changed { id, is_deleted },
            };
            let ended = match &event {
                CacheEvent::Found { sequence, .. } | CacheEvent::Promoted { sequence, .. } => {
                    !self.sequences.contains_key(sequence)
                }
                _ => false,
            };
            if !ended {
                self.events.push_back(event);
            } // Else the event is dropped here, and its pins with it.
        }
        attachment.return_released();
        attachment.flush(&mut self.sequences)
    }
}

impl Attachment {
    fn ring_daemon(&self) {
        self.view.daemon_doorbell().ring();
    }

    /// Index up to which the daemon has given submissions back.
    fn consumed(&self) -> u32 {
        self.submissions.head(&self.view.submissions(self.id))
    }

    fn write_arena(&mut self, bytes: &[u8]) -> Option<ArenaSpan> {
        let consumed = self.consumed();
        let offset = self.arena.take(bytes.len() as u32, self.submissions.tail(), consumed)?;
        self.view.write_submission_bytes(self.id, offset, bytes);
        ArenaSpan::new(offset, bytes.len() as u32)
    }

    /// Key list of a sequence, if the daemon needs it and there is room: `Err(())` if there is none.
    fn introduce(&mut self, asked: &Asked) -> Result<Option<ArenaSpan>, ()> {
        if asked.introduced {
            return Ok(None);
        }
        let Query { start, accept, tokens, keys } = &asked.query;
        let tokens_per_block = usize::from(self.life.table.geometry().tokens_per_block());
        let tail = tokens[keys.len() * tokens_per_block..].to_vec();
        let list = KeyList { start: start.clone(), accept: *accept, keys: keys.to_vec(), tail };
        self.write_arena(&list.encode()).map(Some).ok_or(())
    }

    fn room(&self) -> Result<bool, RingCorrupt> {
        Ok(self.submissions.room(&self.view.submissions(self.id))? > 0)
    }

    fn push(&mut self, message: &Submission) -> Result<bool, RingCorrupt> {
        let ring = self.view.submissions(self.id);
        self.submissions.push(&ring, &message.encode())
    }

    fn send_hint(
        &mut self,
        sequence: SequenceTag,
        asked: &mut Asked,
        hint: Hint,
    ) -> Result<bool, DaemonError> {
        // Behind waiting messages a hint would come late and in the wrong order.
        if !self.pending.is_empty() || !self.room()? {
            return Ok(false);
        }
        let Ok(keys) = self.introduce(asked) else { return Ok(false) };
        self.push(&Submission::Hint { sequence, hint, keys })?;
        asked.introduced = true;
        if keys.is_some() {
            self.ring_daemon();
        } // Another place of a known turn can wait for the next ring: that of the turn before it that left.
        Ok(true)
    }

    /// Moves waiting messages into the ring as far as there is room.
    fn flush(&mut self, sequences: &mut HashMap<SequenceTag, Asked>) -> Result<(), DaemonError> {
        let mut urgent = false;
        while let Some(message) = self.pending.pop_front() {
            if !self.room()? {
                self.pending.push_front(message);
                break;
            }
            let submission = match &message {
                Pending::Plain(submission) => Some(*submission),
                Pending::Lookup(sequence) => match sequences.get_mut(sequence) {
                    None => continue, // Ended before it was asked.
                    Some(asked) => match self.introduce(asked) {
                        Err(()) => None,
                        Ok(keys) => {
                            asked.introduced = true;
                            Some(Submission::Lookup { sequence: *sequence, keys })
                        }
                    },
                },
                Pending::Put { id, record } => self
                    .write_arena(record)
                    .map(|record| Submission::PutConversation { id: *id, record }),
            };
            let Some(submission) = submission else {
                self.pending.push_front(message); // The arena is full: the daemon is behind.
                break;
            };
            self.push(&submission)?;
            if gives_back(&submission) {
                self.given_back += 1;
            } else {
                urgent = true;
            }
        }
        if urgent || self.given_back >= GIVEN_BACK_MAX {
            self.ring_daemon();
            self.given_back = 0;
        }
        Ok(())
    }

    fn return_released(&mut self) {
        let released = self.life.take_released();
        for pins in released.pins.chunks(HANDLES_MAX) {
            let handles = pins.iter().copied().collect();
            self.pending.push_back(Pending::Plain(Submission::Unpin(handles)));
        }
        for rejected in released.rejected.chunks(HANDLES_MAX) {
            let handles = rejected.iter().copied().collect();
            self.pending.push_back(Pending::Plain(Submission::Reject(handles)));
        }
        for handle in released.credits {
            self.pending.push_back(Pending::Plain(Submission::Abandon(handle)));
        }
    }

    /// The next completion, with a private copy of the arena bytes it names.
    fn next_completion(&mut self) -> Result<Option<(Completion, Vec<u8>)>, DaemonError> {
        let ring = self.view.completions(self.id);
        let Some(entry) = self.completions.peek(&ring)? else { return Ok(None) };
        let completion = Completion::decode(&entry)?;
        let span = match completion {
            Completion::Found { blocks, .. } | Completion::Promoted { blocks, .. } => Some(blocks),
            Completion::Conversation { record, .. } => record,
            Completion::Committed { .. } | Completion::Changed { .. } => None,
        };
        let bytes = span.map(|span| self.view.completion_bytes(self.id, span)).unwrap_or_default();
        self.completions.advance(&ring);
        Ok(Some((completion, bytes)))
    }

    fn take_frame(&mut self) -> Result<Option<FreeFrame>, DaemonError> {
        let ring = self.view.credits(self.id);
        // Every frame that is taken goes back by a message, and the daemon grants anew when it reads one. Only
        // who takes the last frame has to say that more are wanted.
        let Some([word]) = self.credits.pop(&ring)? else {
            self.ring_daemon();
            return Ok(None);
        };
        let handle = FrameHandle::unpack(word);
        let table = &self.life.table;
        let frame = table.index(handle.frame).ok_or(DaemonError::Frame(handle.frame.0))?;
        let state = table.state(frame).map_err(|_| DaemonError::Frame(frame.0))?;
        if state.state != FrameState::Filling || state.generation != handle.generation {
            return Err(DaemonError::Frame(frame.0));
        }
        // SYNC frame-taken: the daemon that finds this frame without us lets it rest.
        table.taken(frame).store(handle.generation.0, Ordering::Release);
        Ok(Some(FreeFrame { frame: GrantedFrame::new(&self.life, handle) }))
    }

    /// Checks found blocks against what was asked; pins of those that are rejected go back. Second: how many
    /// were.
    fn check_blocks(
        &self,
        asked: Option<&Asked>,
        found: &[FoundBlock],
    ) -> Result<(Vec<CachedBlock>, u32), DaemonError> {
        for block in found {
            let frame = block.handle.frame;
            self.life.table.index(frame).ok_or(DaemonError::Frame(frame.0))?;
        }
        let Some(asked) = asked else {
            self.life.release_pins(found.iter().map(|block| block.handle));
            return Ok((Vec::new(), 0));
        };
        let count = found.len();
        let (mut right, mut pinned) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let (mut rejected, mut copy) = (0, Vec::new());
        let last = found.iter().map(|block| block.index).max();
        for block in found {
            let ends = Some(block.index) == last;
            match self.check_block(&asked.query, block, ends, &mut copy) {
                Ok((tokens, pin)) if tokens > 0 => {
                    right.push((block, tokens));
                    pinned.push(pin);
                }
                Ok(_) => self.life.release_pins(std::iter::once(block.handle)),
                Err(Rejected) => {
                    self.life.reject(block.handle);
                    rejected += 1;
                }
            }
        }
        let frames = Arc::new(PinnedFrames::new(&self.life, pinned));
        let blocks = right.into_iter().enumerate().map(|(place, (block, tokens))| {
            let Pinned { variant, numerics, token_count, .. } = frames.blocks[place];
            CachedBlock {
                index: block.index,
                tokens: tokens.into(),
                is_whole: tokens == token_count,
                frame: FoundFrame::new(frames.clone(), place),
                variant,
                numerics,
                tier: block.tier,
                handle: block.handle,
            }
        });
        let mut blocks: Vec<CachedBlock> = blocks.collect();
        // Of several open children (a tail, or a block that goes on differently) the one that helps most.
        blocks.sort_by_key(|block| (block.index, std::cmp::Reverse(block.tokens)));
        blocks.dedup_by_key(|block| block.index);
        Ok((blocks, rejected))
    }

    /// Leading tokens that are the query's own, and what the frame has to hold; no tokens: a child of the
    /// chain's last block that goes on with others. `ends`: no block of the answer comes after it.
    fn check_block(
        &self,
        query: &Query,
        block: &FoundBlock,
        ends: bool,
        copy: &mut Vec<u8>,
    ) -> Result<(u16, Pinned), Rejected> {
        let FoundBlock { index, handle, .. } = *block;
        let index = index as usize;
        if index > query.keys.len() || index > SEQUENCE_KEYS_MAX as usize {
            return Err(Rejected);
        }
        let table = &self.life.table;
        let tokens_per_block = table.geometry().tokens_per_block();
        // Only where a chain ends may it go on with a block that shares but some tokens. Any other has to be the
        // one that was asked for. Whether it is, the copier sees when it reads the header with the rows'
        // checksums: memory is not fetched for it in an engine's step.
        if !ends
            && let (Some(key), Accept::Own { variant, numerics }) =
                (query.keys.get(index), query.accept)
        {
            let token_count = tokens_per_block;
            let pinned = Pinned { handle, key: *key, variant, numerics, token_count };
            return Ok((tokens_per_block, pinned));
        }
        let header = table.header_view(handle, copy).map_err(|_| Rejected)?;
        let (variant, numerics) = (header.variant().map_err(|_| Rejected)?, header.numerics());
        let is_acceptable = query.accept.takes(&variant, &numerics);
        if !is_acceptable || header.root() != query.start.root_of(index) {
            return Err(Rejected);
        }
        if header.parent() != query.start.parent_of(index, &query.keys) {
            return Err(Rejected);
        }
        let start = index * usize::from(tokens_per_block);
        let asked = query.tokens.get(start..).ok_or(Rejected)?;
        // Parent and tokens are what the key stands for: it need not be computed again.
        let tokens = header.tokens_shared(asked) as u16;
        let token_count = header.tokens().len() as u16;
        Ok((tokens, Pinned { handle, key: header.key(), variant, numerics, token_count }))
    }
}

/// Whether the daemon may read it at its leisure: with the next message that asks for something, or when it looks
/// for itself, five times a second. A wake-up is a system call in the middle of an engine's step.
fn gives_back(submission: &Submission) -> bool {
    use Submission::{Abandon, End, Reject, Unpin};
    matches!(submission, Unpin(_) | Reject(_) | Abandon(_) | End { .. })
}

/// A found block is not what was asked for.
struct Rejected;

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
