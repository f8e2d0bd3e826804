//! What goes through the rings: 64-byte entries, eight little-endian words each. Word 0 carries the
//! kind; what does not fit (key lists, block lists, records) lies in the sender's arena.
//!
//! A decoder gets a private copy of the words. Unknown kinds and codes are errors: the peer is detached.

use std::sync::Arc;
use std::time::Duration;

use crate::frame::{FrameIndex, Generation};
use crate::key::{BlockKey, ConversationId, KEY_BYTES, RootKey};
use crate::layout::{ARENA_BYTES, CONVERSATION_RECORD_BYTES_MAX, SEQUENCE_KEYS_MAX};
use crate::start::{RUNS_MAX, Run, Shared, Start};
use crate::variant::{Accept, NUMERICS_BYTES, NumericsTag, VARIANT_BYTES, Variant};

/// An entry as it lies in the ring.
pub type Entry = [u64; 8];

/// The engine's name for a waiting or running sequence; chosen by the runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceTag(pub u64);

/// The runtime's name for something it wants answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// A frame of one generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrameHandle {
    /// Not yet checked against the frame count.
    pub frame: FrameIndex,
    /// Of the grant.
    pub generation: Generation,
}

impl FrameHandle {
    /// As one word: also what a credit is.
    pub fn pack(self) -> u64 {
        u64::from(self.generation.0) << 32 | u64::from(self.frame.0)
    }

    /// Reads [`FrameHandle::pack`].
    pub fn unpack(word: u64) -> Self {
        Self { frame: FrameIndex(word as u32), generation: Generation((word >> 32) as u32) }
    }
}

/// Handles that fit into one entry.
pub const HANDLES_MAX: usize = 7;

/// One to [`HANDLES_MAX`] frame handles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handles {
    words: [u64; HANDLES_MAX],
    count: u32,
}

impl Handles {
    fn decode(count: u32, entry: &[u64]) -> Result<Self, MessageError> {
        if !(1..=HANDLES_MAX as u32).contains(&count) {
            let limit = HANDLES_MAX as u64;
            return Err(MessageError::Bound {
                what: "handles of an entry",
                found: count.into(),
                limit,
            });
        }
        let mut words = [0; HANDLES_MAX];
        words[..count as usize].copy_from_slice(&entry[..count as usize]);
        Ok(Self { words, count })
    }

    /// In the order in which they were put in.
    pub fn iter(&self) -> impl Iterator<Item = FrameHandle> {
        self.words[..self.count as usize].iter().copied().map(FrameHandle::unpack)
    }
}

impl FromIterator<FrameHandle> for Handles {
    /// Panics beyond [`HANDLES_MAX`]: senders take chunks.
    fn from_iter<I: IntoIterator<Item = FrameHandle>>(handles: I) -> Self {
        let (mut words, mut count) = ([0; HANDLES_MAX], 0);
        for handle in handles {
            words[count] = handle.pack();
            count += 1;
        }
        Self { words, count: count as u32 }
    }
}

/// Bytes in the sender's arena; inside it by construction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaSpan {
    offset: u32,
    bytes: u32,
}

impl ArenaSpan {
    /// `None` if it leaves the arena.
    pub fn new(offset: u32, bytes: u32) -> Option<Self> {
        (u64::from(offset) + u64::from(bytes) <= ARENA_BYTES).then_some(Self { offset, bytes })
    }

    /// From the arena's start.
    pub fn offset(self) -> u64 {
        self.offset.into()
    }

    /// Length.
    pub fn bytes(self) -> usize {
        self.bytes as usize
    }

    fn pack(self) -> u64 {
        u64::from(self.bytes) << 32 | u64::from(self.offset)
    }

    fn unpack(word: u64) -> Result<Self, MessageError> {
        let (offset, bytes) = (word as u32, (word >> 32) as u32);
        Self::new(offset, bytes).ok_or(MessageError::Span { offset, bytes })
    }
}

/// Why a block was not found, or not given. Zero is "no miss".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum MissReason {
    /// No block of this chain beyond here was ever committed.
    NeverStored = 1,
    /// The parent is known, with other tokens after it.
    Diverged = 2,
    /// Was here, had to leave.
    Evicted = 3,
    /// Its time to live ran out.
    Expired = 4,
    /// Computed with another skip set or other arithmetic.
    Variant = 5,
    /// Belongs to another model or tenant, or has another shape.
    Fingerprint = 6,
    /// Could not be here in time.
    Late = 7,
    /// Bytes were not those that were stored, or could not be read.
    Checksum = 8,
    /// No free frame: all are pinned or being filled.
    Quota = 9,
    /// Computing is faster than loading.
    SlowerThanRecompute = 10,
    /// The disk failed to give it.
    Io = 11,
    /// No daemon.
    Detached = 12,
    /// The request forbids reading.
    NoRead = 13,
    /// There is no cache behind the device.
    Off = 14,
    /// The last token of a prompt is computed even if all is known: the reply is drawn from it.
    LastToken = 15,
}

impl MissReason {
    /// All reasons, for metrics.
    pub const ALL: [MissReason; 15] = [
        MissReason::NeverStored,
        MissReason::Diverged,
        MissReason::Evicted,
        MissReason::Expired,
        MissReason::Variant,
        MissReason::Fingerprint,
        MissReason::Late,
        MissReason::Checksum,
        MissReason::Quota,
        MissReason::SlowerThanRecompute,
        MissReason::Io,
        MissReason::Detached,
        MissReason::NoRead,
        MissReason::Off,
        MissReason::LastToken,
    ];

    /// Label of metrics.
    pub fn label(self) -> &'static str {
        match self {
            MissReason::NeverStored => "never_stored",
            MissReason::Diverged => "diverged",
            MissReason::Evicted => "evicted",
            MissReason::Expired => "expired",
            MissReason::Variant => "variant",
            MissReason::Fingerprint => "fingerprint",
            MissReason::Late => "late",
            MissReason::Checksum => "checksum",
            MissReason::Quota => "quota",
            MissReason::SlowerThanRecompute => "slower_than_recompute",
            MissReason::Io => "io",
            MissReason::Detached => "detached",
            MissReason::NoRead => "no_read",
            MissReason::Off => "off",
            MissReason::LastToken => "last_token",
        }
    }

    fn decode(code: u8) -> Result<Option<Self>, MessageError> {
        if code == 0 {
            return Ok(None);
        }
        Self::ALL
            .into_iter()
            .find(|reason| *reason as u8 == code)
            .map(Some)
            .ok_or(MessageError::Code { field: "miss reason", code: code.into() })
    }

    fn encode(reason: Option<Self>) -> u64 {
        reason.map_or(0, |reason| reason as u64)
    }
}

/// How long an anticipation holds: who has begun to type has sent by then, or gone away. Told again, it
/// begins anew. The runtime ends it at this age; the daemon, should it not, forgets it at twice that.
pub const ANTICIPATED_FOR: Duration = Duration::from_mins(1);

/// What the scheduler knows of a turn to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// It waits in the queue.
    Queued {
        /// 0 starts next.
        place: u32,
        /// Expected start, milliseconds from now.
        start_in_ms: u32,
    },
    /// It is not in the queue yet, but soon: after every queued turn, and in the order of the hints. Holds for
    /// [`ANTICIPATED_FOR`].
    Anticipated,
}

/// Runtime → daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Submission {
    /// A sequence waits, or will; the first hint brings its key list. The only message that a full ring drops.
    Hint {
        /// Whose.
        sequence: SequenceTag,
        /// When its turn comes.
        hint: Hint,
        /// [`KeyList`], unless the daemon has it.
        keys: Option<ArenaSpan>,
    },
    /// Find the longest known prefix, pin what is in host frames, promote what is on disk.
    Lookup {
        /// Whose.
        sequence: SequenceTag,
        /// [`KeyList`], unless the daemon has it.
        keys: Option<ArenaSpan>,
    },
    /// The sequence is done or gone: forget its list, its hints, its promotes.
    End {
        /// Whose.
        sequence: SequenceTag,
    },
    /// Give back one pin of each.
    Unpin(Handles),
    /// Give back one pin of each; the frame does not hold the block that was found in it.
    Reject(Handles),
    /// A granted frame is filled, header and all.
    Commit {
        /// Which.
        handle: FrameHandle,
        /// Answered by [`Completion::Committed`].
        ticket: Ticket,
    },
    /// A granted frame is not needed.
    Abandon(FrameHandle),
    /// Store a conversation record.
    PutConversation {
        /// Under this name.
        id: ConversationId,
        /// The record.
        record: ArenaSpan,
    },
    /// Fetch a conversation record.
    GetConversation {
        /// Under this name.
        id: ConversationId,
        /// Answered by [`Completion::Conversation`].
        ticket: Ticket,
    },
}

/// What became of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CommitOutcome {
    /// The block is in the directory.
    Stored = 1,
    /// The block was there already; the frame is free again.
    Known = 2,
    /// The header did not hold what the daemon checks; the frame is free again.
    Refused = 3,
}

/// Daemon → runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// Answer of a lookup.
    Found {
        /// Whose.
        sequence: SequenceTag,
        /// [`BlockList`]: pinned blocks.
        blocks: ArenaSpan,
        /// Blocks on their way from disk; [`Completion::Promoted`] follows if this is not 0.
        on_disk: u32,
        /// Why the chain ends where it ends; `None` if all of it was found.
        miss: Option<MissReason>,
    },
    /// All promotes of a sequence are over.
    Promoted {
        /// Whose.
        sequence: SequenceTag,
        /// [`BlockList`]: pinned blocks that arrived.
        blocks: ArenaSpan,
        /// Why one did not; later ones may still be in the list.
        miss: Option<MissReason>,
    },
    /// Answer of a commit.
    Committed {
        /// Of the commit.
        ticket: Ticket,
        /// Its end.
        outcome: CommitOutcome,
    },
    /// Answer of a `GetConversation`.
    Conversation {
        /// Of the question.
        ticket: Ticket,
        /// The record, if there is one.
        record: Option<ArenaSpan>,
    },
    /// A record is another than this runtime put or got: an operator truncated or deleted the conversation.
    Changed {
        /// Name.
        id: ConversationId,
        /// Its KV is to be found nowhere any more.
        is_deleted: bool,
    },
}

/// Why an entry, or what it names in the arena, is no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// A number that stands for nothing.
    #[error("ring entry has the unknown {field} {code}")]
    Code {
        /// Which.
        field: &'static str,
        /// Read.
        code: u64,
    },
    /// Bytes outside the arena.
    #[error("ring entry names {bytes} bytes at {offset}, the arena has {ARENA_BYTES}")]
    Span {
        /// Read.
        offset: u32,
        /// Read.
        bytes: u32,
    },
    /// A list whose length does not fit its counts.
    #[error("{list} of {bytes} bytes does not hold what its counts say")]
    List {
        /// Which.
        list: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// A list or record over its bound.
    #[error("{what} is {found}, the bound is {limit}")]
    Bound {
        /// Which.
        what: &'static str,
        /// Read.
        found: u64,
        /// Allowed.
        limit: u64,
    },
}

fn key_words(bytes: &[u8; KEY_BYTES]) -> [u64; 4] {
    let mut words = [0; 4];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        let mut array = [0; 8];
        array.copy_from_slice(chunk);
        *word = u64::from_le_bytes(array);
    }
    words
}

fn key_bytes(words: &[u64]) -> [u8; KEY_BYTES] {
    let mut bytes = [0; KEY_BYTES];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn optional_span(word: u64) -> Result<Option<ArenaSpan>, MessageError> {
    if word == 0 { Ok(None) } else { ArenaSpan::unpack(word).map(Some) }
}

impl Submission {
    /// Words for the ring.
    pub fn encode(&self) -> Entry {
        let span = |keys: Option<ArenaSpan>| keys.map_or(0, ArenaSpan::pack);
        match *self {
            Submission::Hint { sequence, hint, keys } => {
                let (when, anticipated) = match hint {
                    Hint::Queued { place, start_in_ms } => {
                        (u64::from(place) << 32 | u64::from(start_in_ms), 0)
                    }
                    Hint::Anticipated => (0, 1),
                };
                [1, sequence.0, when, span(keys), anticipated, 0, 0, 0]
            }
            Submission::Lookup { sequence, keys } => [2, sequence.0, span(keys), 0, 0, 0, 0, 0],
            Submission::End { sequence } => [3, sequence.0, 0, 0, 0, 0, 0, 0],
            Submission::Unpin(handles) => {
                let [a, b, c, d, e, f, g] = handles.words;
                [4 | u64::from(handles.count) << 32, a, b, c, d, e, f, g]
            }
            Submission::Reject(handles) => {
                let [a, b, c, d, e, f, g] = handles.words;
                [9 | u64::from(handles.count) << 32, a, b, c, d, e, f, g]
            }
            Submission::Commit { handle, ticket } => [5, handle.pack(), ticket.0, 0, 0, 0, 0, 0],
            Submission::Abandon(handle) => [6, handle.pack(), 0, 0, 0, 0, 0, 0],
            Submission::PutConversation { id, record } => {
                let [a, b, c, d] = key_words(&id.0);
                [7, a, b, c, d, record.pack(), 0, 0]
            }
            Submission::GetConversation { id, ticket } => {
                let [a, b, c, d] = key_words(&id.0);
                [8, a, b, c, d, ticket.0, 0, 0]
            }
        }
    }

    /// Reads a private copy of an entry.
    pub fn decode(entry: &Entry) -> Result<Self, MessageError> {
        let sequence = SequenceTag(entry[1]);
        let handle = FrameHandle::unpack(entry[1]);
        let (kind, count) = (entry[0] as u32, (entry[0] >> 32) as u32);
        if count != 0 && !matches!(kind, 4 | 9) {
            return Err(MessageError::Code { field: "submission kind", code: entry[0] });
        }
        Ok(match kind {
            1 => Submission::Hint {
                sequence,
                hint: match entry[4] {
                    0 => Hint::Queued {
                        place: (entry[2] >> 32) as u32,
                        start_in_ms: entry[2] as u32,
                    },
                    1 => Hint::Anticipated,
                    code => return Err(MessageError::Code { field: "hint kind", code }),
                },
                keys: optional_span(entry[3])?,
            },
            2 => Submission::Lookup { sequence, keys: optional_span(entry[2])? },
            3 => Submission::End { sequence },
            4 => Submission::Unpin(Handles::decode(count, &entry[1..])?),
            9 => Submission::Reject(Handles::decode(count, &entry[1..])?),
            5 => Submission::Commit { handle, ticket: Ticket(entry[2]) },
            6 => Submission::Abandon(handle),
            7 => {
                let record = ArenaSpan::unpack(entry[5])?;
                let limit = u64::from(CONVERSATION_RECORD_BYTES_MAX);
                if record.bytes() as u64 > limit {
                    let found = record.bytes() as u64;
                    return Err(MessageError::Bound { what: "conversation record", found, limit });
                }
                Submission::PutConversation { id: ConversationId(key_bytes(&entry[1..5])), record }
            }
            8 => Submission::GetConversation {
                id: ConversationId(key_bytes(&entry[1..5])),
                ticket: Ticket(entry[5]),
            },
            _ => return Err(MessageError::Code { field: "submission kind", code: entry[0] }),
        })
    }
}

impl Completion {
    /// Words for the ring.
    pub fn encode(&self) -> Entry {
        match *self {
            Completion::Found { sequence, blocks, on_disk, miss } => {
                let end = MissReason::encode(miss);
                [1, sequence.0, blocks.pack(), on_disk.into(), end, 0, 0, 0]
            }
            Completion::Promoted { sequence, blocks, miss } => {
                [2, sequence.0, blocks.pack(), MissReason::encode(miss), 0, 0, 0, 0]
            }
            Completion::Committed { ticket, outcome } => {
                [3, ticket.0, outcome as u64, 0, 0, 0, 0, 0]
            }
            Completion::Conversation { ticket, record } => {
                let (there, span) = record.map_or((0, 0), |span| (1, span.pack()));
                [4, ticket.0, there, span, 0, 0, 0, 0]
            }
            Completion::Changed { id, is_deleted } => {
                let [a, b, c, d] = key_words(&id.0);
                [5, a, b, c, d, is_deleted.into(), 0, 0]
            }
        }
    }

    /// Reads a private copy of an entry.
    pub fn decode(entry: &Entry) -> Result<Self, MessageError> {
        let miss = |code: u64| MissReason::decode(u8::try_from(code).unwrap_or(u8::MAX));
        Ok(match entry[0] {
            1 => Completion::Found {
                sequence: SequenceTag(entry[1]),
                blocks: ArenaSpan::unpack(entry[2])?,
                on_disk: entry[3] as u32,
                miss: miss(entry[4])?,
            },
            2 => Completion::Promoted {
                sequence: SequenceTag(entry[1]),
                blocks: ArenaSpan::unpack(entry[2])?,
                miss: miss(entry[3])?,
            },
            3 => Completion::Committed {
                ticket: Ticket(entry[1]),
                outcome: match entry[2] {
                    1 => CommitOutcome::Stored,
                    2 => CommitOutcome::Known,
                    3 => CommitOutcome::Refused,
                    code => return Err(MessageError::Code { field: "commit outcome", code }),
                },
            },
            4 => Completion::Conversation {
                ticket: Ticket(entry[1]),
                record: match entry[2] {
                    0 => None,
                    _ => Some(ArenaSpan::unpack(entry[3])?),
                },
            },
            5 => Completion::Changed {
                id: ConversationId(key_bytes(&entry[1..5])),
                is_deleted: match entry[5] {
                    0 => false,
                    1 => true,
                    code => return Err(MessageError::Code { field: "kind of a change", code }),
                },
            },
            code => return Err(MessageError::Code { field: "completion kind", code }),
        })
    }
}

/// What a sequence wants to read: written once into the arena, then named by its sequence.
///
/// `kind u32 ‖ keys u32 ‖ tail u32 ‖ shared blocks u32 ‖ variant 32 ‖ numerics 16 ‖ root 32 ‖ shared root 32 ‖
/// runs u32 ‖ keys 32 each ‖ runs 36 each: parent 32, first block u32 ‖ tail u32 each`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyList {
    /// Where the blocks hang.
    pub start: Start,
    /// Which blocks it takes.
    pub accept: Accept,
    /// Of the full blocks, in order.
    pub keys: Vec<BlockKey>,
    /// Token ids that follow the last full block; fewer than a block.
    pub tail: Vec<u32>,
}

const KEY_LIST_FIXED_BYTES: usize = 16 + VARIANT_BYTES + NUMERICS_BYTES + 2 * KEY_BYTES + 4;
const RUN_BYTES: usize = KEY_BYTES + 4;

impl KeyList {
    /// Bytes for the arena; lists longer than [`SEQUENCE_KEYS_MAX`] are cut there (a shorter prefix
    /// is looked up) and lose their tail.
    pub fn encode(&self) -> Vec<u8> {
        let cut = self.keys.len() > SEQUENCE_KEYS_MAX as usize;
        let keys = &self.keys[..self.keys.len().min(SEQUENCE_KEYS_MAX as usize)];
        let tail: &[u32] = if cut { &[] } else { &self.tail };
        // Those behind the keys that are told say nothing; one right behind them, what the tail follows.
        let told = self.start.runs.partition_point(|run| run.first_block as usize <= keys.len());
        let runs = &self.start.runs[..told.min(RUNS_MAX)];
        let mut bytes = Vec::with_capacity(
            KEY_LIST_FIXED_BYTES + KEY_BYTES * keys.len() + RUN_BYTES * runs.len() + 4 * tail.len(),
        );
        let (kind, variant, numerics) = match self.accept {
            Accept::Own { variant, numerics } => (1u32, variant.encode(), numerics.0),
            Accept::Any => (2, [0; VARIANT_BYTES], [0; NUMERICS_BYTES]),
        };
        let shared = self.start.shared;
        let shared_blocks = shared.map_or(0, |shared| shared.blocks.min(keys.len() as u32));
        for count in [kind, keys.len() as u32, tail.len() as u32, shared_blocks] {
            bytes.extend_from_slice(&count.to_le_bytes());
        }
        bytes.extend_from_slice(&variant);
        bytes.extend_from_slice(&numerics);
        bytes.extend_from_slice(&self.start.root.0);
        bytes.extend_from_slice(&shared.map_or([0; KEY_BYTES], |shared| shared.root.0));
        bytes.extend_from_slice(&(runs.len() as u32).to_le_bytes());
        for key in keys {
            bytes.extend_from_slice(&key.0);
        }
        for run in runs {
            bytes.extend_from_slice(&run.parent.0);
            bytes.extend_from_slice(&run.first_block.to_le_bytes());
        }
        for token in tail {
            bytes.extend_from_slice(&token.to_le_bytes());
        }
        bytes
    }

    /// Reads a private copy.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let wrong_length = MessageError::List { list: "key list", bytes: bytes.len() };
        let (fixed, rest) = bytes.split_at_checked(KEY_LIST_FIXED_BYTES).ok_or(wrong_length)?;
        let count = |at: usize| u32_le(&fixed[4 * at..4 * at + 4]);
        let (keys, tail, shared_blocks) = (count(1), count(2), count(3));
        if keys > SEQUENCE_KEYS_MAX {
            let (found, limit) = (keys.into(), SEQUENCE_KEYS_MAX.into());
            return Err(MessageError::Bound { what: "keys of a list", found, limit });
        }
        if tail > u32::from(crate::geometry::TOKENS_PER_BLOCK_MAX) {
            let limit = crate::geometry::TOKENS_PER_BLOCK_MAX.into();
            return Err(MessageError::Bound { what: "tail of a list", found: tail.into(), limit });
        }
        if shared_blocks > keys {
            let (found, limit) = (shared_blocks.into(), keys.into());
            return Err(MessageError::Bound { what: "shared blocks of a list", found, limit });
        }
        let runs = u32_le(&fixed[KEY_LIST_FIXED_BYTES - 4..]);
        if runs > RUNS_MAX as u32 {
            let (found, limit) = (runs.into(), RUNS_MAX as u64);
            return Err(MessageError::Bound { what: "runs of a list", found, limit });
        }
        let (key_part, rest) =
            rest.split_at_checked(KEY_BYTES * keys as usize).ok_or(wrong_length)?;
        let (run_part, tail_part) =
            rest.split_at_checked(RUN_BYTES * runs as usize).ok_or(wrong_length)?;
        if tail_part.len() != 4 * tail as usize {
            return Err(wrong_length);
        }
        let accept = match count(0) {
            1 => Accept::Own {
                variant: Variant::decode(&array(&fixed[16..48])).map_err(|unknown| {
                    MessageError::Code { field: "variant", code: unknown.code.into() }
                })?,
                numerics: NumericsTag(array(&fixed[48..64])),
            },
            2 => Accept::Any,
            code => return Err(MessageError::Code { field: "accept kind", code: code.into() }),
        };
        let run = |bytes: &[u8]| Run {
            parent: BlockKey(array(&bytes[..KEY_BYTES])),
            first_block: u32_le(&bytes[KEY_BYTES..]),
        };
        let runs: Arc<[Run]> = run_part.chunks_exact(RUN_BYTES).map(run).collect();
        // Ascending, and none behind what follows the last key.
        let limits = runs.iter().skip(1).map(|next| next.first_block).chain([keys + 1]);
        if let Some((run, limit)) =
            runs.iter().zip(limits).find(|(run, limit)| run.first_block >= *limit)
        {
            let (found, limit) = (run.first_block.into(), limit.saturating_sub(1).into());
            return Err(MessageError::Bound { what: "place of a run", found, limit });
        }
        Ok(Self {
            start: Start {
                runs,
                root: RootKey(array(&fixed[64..96])),
                shared: (shared_blocks > 0).then(|| Shared {
                    root: RootKey(array(&fixed[96..128])),
                    blocks: shared_blocks,
                }),
            },
            accept,
            keys: key_part.chunks_exact(KEY_BYTES).map(|key| BlockKey(array(key))).collect(),
            tail: tail_part.chunks_exact(4).map(u32_le).collect(),
        })
    }
}

/// Where a found block was kept since the last turn that used it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Tier {
    /// In a frame.
    Host = 1,
    /// On disk, even if a hint has promoted it before the lookup.
    Disk = 2,
}

/// One pinned block of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FoundBlock {
    /// Place in the chain; the number of full blocks asked for is the tail's.
    pub index: u32,
    /// Where its bytes are.
    pub handle: FrameHandle,
    /// Where they came from.
    pub tier: Tier,
}

/// An answer's blocks, 16 bytes each: `index u32 ‖ frame u32 ‖ generation u32 ‖ tier u32`.
pub struct BlockList;

impl BlockList {
    /// Bytes of one entry.
    pub const ENTRY_BYTES: usize = 16;

    /// Bytes for the arena.
    pub fn encode(blocks: &[FoundBlock]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::ENTRY_BYTES * blocks.len());
        for block in blocks {
            let FrameHandle { frame, generation } = block.handle;
            for word in [block.index, frame.0, generation.0, block.tier as u32] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
        }
        bytes
    }

    /// Reads a private copy.
    pub fn decode(bytes: &[u8]) -> Result<Vec<FoundBlock>, MessageError> {
        if !bytes.len().is_multiple_of(Self::ENTRY_BYTES) {
            return Err(MessageError::List { list: "block list", bytes: bytes.len() });
        }
        let block = |entry: &[u8]| {
            let word = |at: usize| u32_le(&entry[4 * at..4 * at + 4]);
            let tier = match word(3) {
                1 => Tier::Host,
                2 => Tier::Disk,
                code => return Err(MessageError::Code { field: "tier", code: code.into() }),
            };
            let handle =
                FrameHandle { frame: FrameIndex(word(1)), generation: Generation(word(2)) };
            Ok(FoundBlock { index: word(0), handle, tier })
        };
        bytes.chunks_exact(Self::ENTRY_BYTES).map(block).collect()
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}

fn u32_le(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(array(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span() -> ArenaSpan {
        ArenaSpan::new(128, 64).unwrap()
    }

    fn handle() -> FrameHandle {
        FrameHandle { frame: FrameIndex(5), generation: Generation(6) }
    }

    #[test]
    fn each_submission_reads_back() {
        let sequence = SequenceTag(77);
        let id = ConversationId([3; 32]);
        let all = [
            Submission::Hint {
                sequence,
                hint: Hint::Queued { place: 4, start_in_ms: 900 },
                keys: Some(span()),
            },
            Submission::Hint { sequence, hint: Hint::Anticipated, keys: Some(span()) },
            Submission::Lookup { sequence, keys: None },
            Submission::End { sequence },
            Submission::Unpin([handle()].into_iter().collect()),
            Submission::Unpin([handle(); HANDLES_MAX].into_iter().collect()),
            Submission::Reject([handle()].into_iter().collect()),
            Submission::Commit { handle: handle(), ticket: Ticket(1) },
            Submission::Abandon(handle()),
            Submission::PutConversation { id, record: span() },
            Submission::GetConversation { id, ticket: Ticket(2) },
        ];
        for message in all {
            assert_eq!(Submission::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn each_completion_reads_back() {
        let sequence = SequenceTag(77);
        let miss = Some(MissReason::Evicted);
        let all = [
            Completion::Found { sequence, blocks: span(), on_disk: 3, miss },
            Completion::Promoted { sequence, blocks: span(), miss: None },
            Completion::Committed { ticket: Ticket(9), outcome: CommitOutcome::Known },
            Completion::Conversation { ticket: Ticket(9), record: None },
            Completion::Conversation { ticket: Ticket(9), record: Some(span()) },
            Completion::Changed { id: ConversationId([3; 32]), is_deleted: false },
            Completion::Changed { id: ConversationId([3; 32]), is_deleted: true },
        ];
        for message in all {
            assert_eq!(Completion::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn lists_read_back() {
        let run = |(key, first_block)| Run { parent: BlockKey([key; 32]), first_block };
        let list = KeyList {
            start: Start {
                root: RootKey([1; 32]),
                shared: Some(Shared { root: RootKey([9; 32]), blocks: 1 }),
                runs: [(4, 0), (6, 1), (7, 2)].map(run).into(),
            },
            accept: Accept::Own { variant: Variant::Exact, numerics: NumericsTag::of("x") },
            keys: vec![BlockKey([2; 32]), BlockKey([3; 32])],
            tail: vec![5, 6, 7],
        };
        assert_eq!(KeyList::decode(&list.encode()), Ok(list));
        let blocks = [FoundBlock { index: 1, handle: handle(), tier: Tier::Disk }];
        assert_eq!(BlockList::decode(&BlockList::encode(&blocks)), Ok(blocks.to_vec()));
    }

    #[test]
    fn runs_that_do_not_ascend_or_hang_behind_the_end_are_refused() {
        let list = |places: &[u32]| {
            let run = |&first_block| Run { parent: BlockKey([7; 32]), first_block };
            let runs = places.iter().map(run).collect();
            let start = Start { runs, ..RootKey([1; 32]).into() };
            let list =
                KeyList { start, accept: Accept::Any, keys: vec![BlockKey([2; 32])], tail: vec![] };
            KeyList::decode(&list.encode())
        };
        assert!(list(&[0, 1]).is_ok());
        assert!(list(&[0, 0]).is_err());
        assert!(list(&[1, 0]).is_err());
        // One that says nothing of these keys is not told.
        assert_eq!(list(&[0, 2]).map(|list| list.start.runs.len()), Ok(1));
        let mut bytes = KeyList {
            start: Start {
                runs: [Run { parent: BlockKey([7; 32]), first_block: 0 }].into(),
                ..RootKey([1; 32]).into()
            },
            accept: Accept::Any,
            keys: vec![],
            tail: vec![],
        }
        .encode();
        let at = bytes.len() - 4;
        bytes[at] = 1;
        assert!(KeyList::decode(&bytes).is_err());
    }

    #[test]
    fn a_list_over_its_bound_is_cut_to_a_prefix_without_tail() {
        let list = KeyList {
            start: RootKey([1; 32]).into(),
            accept: Accept::Any,
            keys: vec![BlockKey([2; 32]); SEQUENCE_KEYS_MAX as usize + 1],
            tail: vec![5],
        };
        let read = KeyList::decode(&list.encode()).unwrap();
        assert_eq!((read.keys.len(), read.tail.len()), (SEQUENCE_KEYS_MAX as usize, 0));
    }

    proptest! {
        #[test]
        fn random_entries_never_panic(mut entry: Entry, kind in 0u64..10) {
            let _ = Submission::decode(&entry);
            let _ = Completion::decode(&entry);
            entry[0] = kind; // Past the first check too.
            let _ = Submission::decode(&entry);
            let _ = Completion::decode(&entry);
        }

        #[test]
        fn random_lists_never_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..512),
            counts in [0u32..3, 0..20, 0..20],
        ) {
            let _ = KeyList::decode(&bytes);
            let _ = BlockList::decode(&bytes);
            if bytes.len() >= 12 {
                for (at, count) in counts.into_iter().enumerate() {
                    bytes[4 * at..4 * at + 4].copy_from_slice(&count.to_le_bytes());
                }
                let _ = KeyList::decode(&bytes);
            }
        }
    }
}
