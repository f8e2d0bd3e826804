//! One attached runtime, as the daemon sees it: its rings, its waiting sequences, its unsent answers.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use kv_protocol::handshake::ClientToken;
use kv_protocol::layout::{ARENA_BYTES, CREDIT_ENTRIES};
use kv_protocol::message::{
    ArenaSpan, BlockList, CommitOutcome, FoundBlock, Hint, KeyList, MessageError, SequenceTag,
    Ticket,
};
use kv_protocol::ring::{ArenaWriter, Consumer, Producer, RingCorrupt};
use kv_protocol::table::RegionView;
use kv_protocol::{AttachmentId, Completion, ConversationId, MissReason, Submission};

use crate::foresight::Foretold;
use crate::metrics::Metrics;
use crate::queue::TurnId;
use crate::store::LookedUp;
use crate::tier::host::{HandleError, HostTier};

/// Sequences of one runtime that the daemon remembers. Beyond it hints are ignored.
pub const SEQUENCES_MAX: usize = 4096;
/// Answers that may wait for room in the ring before no more questions are taken.
const OUTBOX_MAX: usize = 256;
/// Frames kept granted, as a share of all.
const CREDIT_SHARE: u32 = 8;
/// Frames kept granted at most.
const CREDITS_MAX: u32 = 64;
const _: () = assert!(CREDITS_MAX <= CREDIT_ENTRIES);

/// What only a broken peer does: it is detached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// Impossible indices.
    #[error(transparent)]
    Ring(#[from] RingCorrupt),
    /// Not a message, or not a list.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A frame that is not the peer's.
    #[error(transparent)]
    Handle(#[from] HandleError),
    /// A sequence that was never introduced.
    #[error("a lookup names sequence {0}, whose key list never came")]
    UnknownSequence(u64),
}

/// A sequence that waits, or runs.
#[derive(Debug, Default)]
pub struct Waiting {
    /// What it wants to read.
    pub list: Option<Arc<KeyList>>,
    /// Its place, while it waits.
    pub hint: Option<Hint>,
    /// When that was told last.
    pub told_at: Option<Instant>,
    /// By which hint it was foretold, until it is known whether it came.
    pub foretold: Option<Foretold>,
    /// Whether it has asked.
    pub looked_up: bool,
    /// Its promotes under way.
    pub fetch: Option<Fetch>,
}

impl Waiting {
    /// A hint came. An anticipated turn that is in the queue now has come.
    pub fn foretell(&mut self, hint: Hint, metrics: &Metrics) {
        let by = Foretold::by(hint);
        match self.foretold {
            _ if self.looked_up => return, // Its place is told again; it is here already.
            Some(Foretold::Anticipated) if by == Foretold::Queued => {
                Foretold::Anticipated.ended(metrics, true);
            }
            _ => {}
        }
        self.foretold = Some(by);
    }

    /// The turn is here.
    pub fn came(&mut self, metrics: &Metrics) {
        self.looked_up = true;
        if let Some(foretold) = self.foretold.take() {
            foretold.ended(metrics, true);
        }
    }

    /// The turn will not come, or came and found all on the device.
    pub fn left(&mut self, metrics: &Metrics) {
        if let Some(foretold) = self.foretold.take() {
            foretold.ended(metrics, false);
        }
    }
}

/// Blocks on their way from disk for one lookup.
#[derive(Debug)]
pub struct Fetch {
    /// Since when the lookup waits.
    pub since: Instant,
    /// Not yet here.
    pub remaining: usize,
    /// Blocks of the chain that are whole; what has this index or a larger one may be a tail.
    pub whole: u32,
    /// Of those, not yet here.
    pub remaining_whole: u64,
    /// Here, pinned.
    pub arrived: Vec<FoundBlock>,
    /// Why one did not come.
    pub miss: Option<MissReason>,
}

impl Fetch {
    /// For what a lookup found on disk; `None` if that is nothing.
    pub fn of(found: &LookedUp) -> Option<Self> {
        (found.on_disk > 0).then(|| Self {
            since: Instant::now(),
            remaining: found.on_disk,
            whole: found.whole,
            remaining_whole: found.on_disk_whole,
            arrived: Vec::new(),
            miss: None,
        })
    }
}

/// An answer that has not gone out yet.
#[derive(Debug)]
pub enum Outgoing {
    /// See [`Completion::Found`].
    Found {
        /// Whose.
        sequence: SequenceTag,
        /// Pinned.
        blocks: Vec<FoundBlock>,
        /// On their way.
        on_disk: u32,
        /// Why the chain ends.
        miss: Option<MissReason>,
    },
    /// See [`Completion::Promoted`].
    Promoted {
        /// Whose.
        sequence: SequenceTag,
        /// Pinned.
        blocks: Vec<FoundBlock>,
        /// Why one did not come.
        miss: Option<MissReason>,
    },
    /// See [`Completion::Committed`].
    Committed {
        /// Of the commit.
        ticket: Ticket,
        /// Its end.
        outcome: CommitOutcome,
    },
    /// See [`Completion::Conversation`].
    Conversation {
        /// Of the question.
        ticket: Ticket,
        /// The record.
        record: Option<Arc<[u8]>>,
    },
    /// See [`Completion::Changed`].
    Changed {
        /// Which.
        id: ConversationId,
        /// Rather than truncated.
        is_deleted: bool,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Attachment {
    /// Its place.
    pub id: AttachmentId,
    /// Which process.
    pub client: ClientToken,
    /// Counts attachments in the place.
    pub incarnation: u32,
    /// Its sequences.
    pub sequences: HashMap<SequenceTag, Waiting>,
    socket: UnixStream,
    submissions: Consumer,
    completions: Producer,
    credits: Producer,
    arena: ArenaWriter,
    outbox: VecDeque<Outgoing>,
}

impl Attachment {
    /// Over a place that was just opened ([`RegionView::open_attachment`]).
    pub fn new(
        id: AttachmentId,
        client: ClientToken,
        incarnation: u32,
        socket: UnixStream,
    ) -> Self {
        Self {
            id,
            client,
            incarnation,
            sequences: HashMap::new(),
            socket,
            submissions: Consumer::default(),
            completions: Producer::default(),
            credits: Producer::default(),
            arena: ArenaWriter::new(ARENA_BYTES),
            outbox: VecDeque::new(),
        }
    }

    /// Tells the runtime that it is detached: it attaches anew.
    pub fn hang_up(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both); // Gone already is as good.
    }

    /// The next message, with a private copy of the bytes it names. None is taken while too many answers
    /// wait: a runtime that does not read is not read from.
    pub fn next(
        &mut self,
        view: &RegionView,
    ) -> Result<Option<(Submission, Vec<u8>)>, ProtocolError> {
        if self.outbox.len() >= OUTBOX_MAX {
            return Ok(None);
        }
        let ring = view.submissions(self.id);
        let Some(entry) = self.submissions.peek(&ring)? else { return Ok(None) };
        let submission = Submission::decode(&entry)?;
        let span: Option<ArenaSpan> = match submission {
            Submission::Hint { keys, .. } | Submission::Lookup { keys, .. } => keys,
            Submission::PutConversation { record, .. } => Some(record),
            _ => None,
        };
        let bytes = span.map(|span| view.submission_bytes(self.id, span)).unwrap_or_default();
        self.submissions.advance(&ring);
        Ok(Some((submission, bytes)))
    }

    /// Name of a sequence's turn, across attachments.
    pub fn turn(&self, tag: SequenceTag) -> TurnId {
        let attachment = u64::from(self.incarnation) << 32 | u64::from(self.id.code());
        TurnId(u128::from(attachment) << 64 | u128::from(tag.0))
    }

    /// The sequence's entry, made if there is room for one more.
    pub fn sequence(&mut self, tag: SequenceTag) -> Option<&mut Waiting> {
        if !self.sequences.contains_key(&tag) && self.sequences.len() >= SEQUENCES_MAX {
            return None;
        }
        Some(self.sequences.entry(tag).or_default())
    }

    /// Queues an answer; [`Attachment::flush`] sends it.
    pub fn answer(&mut self, answer: Outgoing) {
        self.outbox.push_back(answer);
    }

    /// Moves answers into the ring as far as there is room; `true` if any went.
    pub fn flush(&mut self, view: &RegionView) -> Result<bool, ProtocolError> {
        let mut sent = false;
        while let Some(answer) = self.outbox.pop_front() {
            let Some(completion) = self.try_encode(view, &answer)? else {
                self.outbox.push_front(answer);
                break;
            };
            self.completions.push(&view.completions(self.id), &completion.encode())?;
            sent = true;
        }
        Ok(sent)
    }

    /// `None` while ring or arena have no room.
    fn try_encode(
        &mut self,
        view: &RegionView,
        answer: &Outgoing,
    ) -> Result<Option<Completion>, ProtocolError> {
        let ring = view.completions(self.id);
        if self.completions.room(&ring)? == 0 {
            return Ok(None);
        }
        let consumed = self.completions.head(&ring);
        let mut span = |bytes: &[u8]| {
            let offset = self.arena.take(bytes.len() as u32, self.completions.tail(), consumed)?;
            view.write_completion_bytes(self.id, offset, bytes);
            ArenaSpan::new(offset, bytes.len() as u32)
        };
        let completion = match answer {
            Outgoing::Found { sequence, blocks, on_disk, miss } => span(&BlockList::encode(blocks))
                .map(|blocks| Completion::Found {
                    sequence: *sequence,
                    blocks,
                    on_disk: *on_disk,
                    miss: *miss,
                }),
            Outgoing::Promoted { sequence, blocks, miss } => span(&BlockList::encode(blocks))
                .map(|blocks| Completion::Promoted { sequence: *sequence, blocks, miss: *miss }),
            Outgoing::Committed { ticket, outcome } => {
                Some(Completion::Committed { ticket: *ticket, outcome: *outcome })
            }
            Outgoing::Changed { id, is_deleted } => {
                Some(Completion::Changed { id: *id, is_deleted: *is_deleted })
            }
            Outgoing::Conversation { ticket, record: None } => {
                Some(Completion::Conversation { ticket: *ticket, record: None })
            }
            Outgoing::Conversation { ticket, record: Some(record) } => span(record)
                .map(|record| Completion::Conversation { ticket: *ticket, record: Some(record) }),
        };
        Ok(completion)
    }

    /// Keeps free frames ready in the credit ring; `true` if any was granted.
    pub fn grant(&mut self, view: &RegionView, host: &mut HostTier) -> Result<bool, ProtocolError> {
        let ring = view.credits(self.id);
        let target = (host.table().layout().frame_count() / CREDIT_SHARE).clamp(1, CREDITS_MAX);
        let mut granted = false;
        loop {
            let waiting = CREDIT_ENTRIES - self.credits.room(&ring)?;
            // One frame stays free for promotes, where there is more than one.
            if waiting >= target || (waiting > 0 && host.counts().free <= 1) {
                return Ok(granted);
            }
            let Some(handle) = host.grant(self.id) else {
                return Ok(granted);
            };
            self.credits.push(&ring, &[handle.pack()])?;
            granted = true;
        }
    }
}

/// A place that rests: what it held is reclaimed at `until`.
#[derive(Debug, Clone, Copy)]
pub struct Resting {
    /// Its place.
    pub id: AttachmentId,
    /// When.
    pub until: Instant,
}
