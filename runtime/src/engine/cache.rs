//! The cache as the engine sees it: a few calls that never block, and events. [`CacheClient`] is the one
//! that serves; the engine's tests bring another, whose tiers do what a test says.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;

use kv_protocol::message::CommitOutcome;

use crate::batch::WriteFrame;
use crate::cache_client::{
    Accept, CacheClient, CacheEvent, CachedBlock, ConversationId, FreeFrame, Hint, MissReason,
    NewBlock, Query, QuestionId, SequenceTag, Start, Unavailable,
};

/// What a waiting sequence would like to read.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Where its blocks hang.
    pub start: Start,
    /// Which blocks it takes.
    pub accept: Accept,
    /// All tokens whose KV it could use; what follows the last full block is the tail.
    pub tokens: Arc<[u32]>,
    /// Size of a block.
    pub tokens_per_block: u16,
}

/// What happened since the last poll.
#[derive(Debug)]
pub enum Event<Q> {
    /// Lookups work from now on.
    Attached,
    /// Frames are invalid, and what was asked is not answered.
    Detached,
    /// Answer of a lookup.
    Found {
        /// Whose.
        tag: SequenceTag,
        /// In frames now.
        blocks: Vec<CachedBlock>,
        /// On their way; `Promoted` follows if not 0.
        on_disk: u32,
        /// Why the chain ends early.
        miss: Option<MissReason>,
    },
    /// What was on its way is here, or will not come.
    Promoted {
        /// Whose.
        tag: SequenceTag,
        /// Arrived.
        blocks: Vec<CachedBlock>,
        /// Why one did not.
        miss: Option<MissReason>,
    },
    /// A commit is over.
    Committed(CommitOutcome),
    /// Answer of `get_conversation`.
    Conversation(Q, Option<Vec<u8>>),
    /// An operator has changed a conversation.
    Changed {
        /// Its record is another one now, or none.
        id: ConversationId,
        /// Nothing of it may be found any more.
        is_deleted: bool,
    },
}

/// See the module.
pub trait Cache: Send {
    /// A frame that may be filled; dropping it gives it back.
    type Free: Debug + Send;
    /// Names a question until it is answered.
    type Question: Copy + Eq + Hash + Debug + Send;

    /// Whether lookups work.
    fn is_attached(&self) -> bool;
    /// A sequence waits: its keys, place and expected start. May be lost.
    fn enqueue(&mut self, tag: SequenceTag, wanted: Wanted, hint: Hint);
    /// A waiting sequence has another place.
    fn hint(&mut self, tag: SequenceTag, hint: Hint);
    /// Asks what is where, and pins it.
    fn lookup(&mut self, tag: SequenceTag) -> Result<(), Unavailable>;
    /// The sequence asks for no more.
    fn end(&mut self, tag: SequenceTag);
    /// A free frame, and its bytes.
    fn take_frame(&mut self) -> Option<(Self::Free, Arc<dyn WriteFrame>)>;
    /// Gives a filled frame away.
    fn commit(&mut self, frame: Self::Free, block: NewBlock) -> Result<(), Unavailable>;
    /// Stores a conversation record, best effort.
    fn put_conversation(&mut self, id: ConversationId, record: Vec<u8>) -> Result<(), Unavailable>;
    /// Asks for a conversation record.
    fn get_conversation(&mut self, id: ConversationId) -> Result<Self::Question, Unavailable>;
    /// The next event, if any.
    fn poll(&mut self) -> Option<Event<Self::Question>>;
}

impl Cache for CacheClient {
    type Free = FreeFrame;
    type Question = QuestionId;

    fn is_attached(&self) -> bool {
        CacheClient::is_attached(self)
    }

    fn enqueue(&mut self, tag: SequenceTag, wanted: Wanted, hint: Hint) {
        let Wanted { start, accept, tokens, tokens_per_block } = wanted;
        let query = Query::new(start, accept, tokens, tokens_per_block);
        CacheClient::enqueue(self, tag, query, hint);
    }

    fn hint(&mut self, tag: SequenceTag, hint: Hint) {
        CacheClient::hint(self, tag, hint);
    }

    fn lookup(&mut self, tag: SequenceTag) -> Result<(), Unavailable> {
        CacheClient::lookup(self, tag)
    }

    fn end(&mut self, tag: SequenceTag) {
        CacheClient::end(self, tag);
    }

    fn take_frame(&mut self) -> Option<(FreeFrame, Arc<dyn WriteFrame>)> {
        let frame = CacheClient::take_frame(self)?;
        let bytes = frame.bytes();
        Some((frame, bytes))
    }

    fn commit(&mut self, frame: FreeFrame, block: NewBlock) -> Result<(), Unavailable> {
        CacheClient::commit(self, frame, block).map(|_commit| ())
    }

    fn put_conversation(&mut self, id: ConversationId, record: Vec<u8>) -> Result<(), Unavailable> {
        CacheClient::put_conversation(self, id, record)
    }

    fn get_conversation(&mut self, id: ConversationId) -> Result<QuestionId, Unavailable> {
        CacheClient::get_conversation(self, id)
    }

    fn poll(&mut self) -> Option<Event<QuestionId>> {
        Some(match CacheClient::poll(self)? {
            CacheEvent::Attached => Event::Attached,
            CacheEvent::Detached => Event::Detached,
            CacheEvent::Found { sequence, blocks, on_disk, miss } => {
                Event::Found { tag: sequence, blocks, on_disk, miss }
            }
            CacheEvent::Promoted { sequence, blocks, miss } => {
                Event::Promoted { tag: sequence, blocks, miss }
            }
            CacheEvent::Committed { outcome, .. } => Event::Committed(outcome),
            CacheEvent::Conversation { question, record } => Event::Conversation(question, record),
            CacheEvent::Changed { id, is_deleted } => Event::Changed { id, is_deleted },
        })
    }
}
