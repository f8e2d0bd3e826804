//! What transfers ask of the loop, which owns all state. Each question is one message and one answer; a
//! transfer that is gone by then is not missed.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use kv_protocol::message::CommitOutcome;
use kv_protocol::record::Record;
use kv_protocol::start::Start;
use kv_protocol::{BlockHeader, BlockKey, ConversationId, Fingerprint, Geometry, RootKey};
use tokio::sync::oneshot;

use super::bundle::BlockBytes;
use crate::listen::PeerEvent;

/// Where an answer goes.
pub type Reply<T> = oneshot::Sender<T>;

/// Why the loop does not do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// Nobody answers any more.
    #[error("this daemon is stopping")]
    Stopping,
    /// More questions than may wait.
    #[error("this daemon has too many transfers under way: ask again later")]
    Busy,
    /// What it has is not known yet.
    #[error("this daemon is still reading what it has on disk: ask again later")]
    Opening,
    /// No runtime was ever attached, so blocks have no shape.
    #[error("this daemon knows no model yet: a runtime must have attached to it once")]
    NoModel,
    /// A tombstone.
    #[error("conversation {0} was deleted here")]
    Deleted(ConversationId),
    /// Of a conversation that was deleted.
    #[error("block {0} was deleted here and is not erased yet: ask again when it is")]
    Erasing(BlockKey),
    /// Not a record that is kept.
    #[error("the record of conversation {0} is none that this daemon keeps")]
    Record(ConversationId),
}

/// The model that a daemon keeps blocks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    /// Shape of its blocks.
    pub geometry: Geometry,
    /// Which.
    pub fingerprint: Fingerprint,
}

/// A conversation's record, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Unix milliseconds.
    pub updated_ms: u64,
    /// Its bytes.
    pub record: Arc<[u8]>,
}

/// Where a record's blocks are to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Model and tenant, and how many of the first blocks are every tenant's.
    pub start: Start,
    /// Of the full blocks.
    pub keys: Vec<BlockKey>,
    /// What the tail follows.
    pub open_parent: BlockKey,
    /// Ids of the tail.
    pub tail: Vec<u32>,
}

/// A question. The answer's type says what it is about.
#[derive(Debug)]
pub enum Ask {
    /// Which model this daemon has.
    Model(Reply<Result<Model, Refused>>),
    /// A conversation's record.
    Record {
        /// Whose.
        conversation: ConversationId,
        /// `None` if it is not known.
        reply: Reply<Result<Option<Kept>, Refused>>,
    },
    /// Which of a record's blocks are here, tails included.
    Present {
        /// Of the record's full blocks and its tail.
        chain: Chain,
        /// In the order of tokens.
        reply: Reply<Result<Vec<BlockKey>, Refused>>,
    },
    /// A copy of a block.
    Copy {
        /// Name.
        key: BlockKey,
        /// Whose.
        root: RootKey,
        /// `None` if it is gone.
        reply: Reply<Result<Option<BlockBytes>, Refused>>,
    },
    /// Which of these blocks are in no tier.
    Missing {
        /// Names.
        keys: Vec<BlockKey>,
        /// In the same order.
        reply: Reply<Vec<BlockKey>>,
    },
    /// Keep a block. The answer may take as long as there is no room for it.
    Place(Box<Incoming>),
    /// Keep a record, unless a newer one is known.
    PutRecord {
        /// Whose.
        conversation: ConversationId,
        /// The record.
        kept: Kept,
        /// Whether it is the newest now.
        reply: Reply<Result<bool, Refused>>,
    },
    /// Which of these blocks are of no record here.
    Unowned {
        /// Names.
        keys: Vec<BlockKey>,
        /// In the same order.
        reply: Reply<Vec<BlockKey>>,
    },
    /// No record came from the remote tier: who asked for it is told.
    NotFetched(ConversationId),
    /// What was to be offloaded before the daemon stops is, or the time is over.
    Offloaded,
}

/// A block that arrives.
#[derive(Debug)]
pub struct Incoming {
    /// For whom: not for one that is deleted meanwhile.
    pub conversation: ConversationId,
    /// Decoded from the bytes.
    pub header: BlockHeader,
    /// All of it.
    pub block: BlockBytes,
    /// Of a commit, as if a runtime had made it.
    pub reply: Reply<Result<CommitOutcome, Refused>>,
}

/// The loop, for those who may wait.
#[derive(Clone)]
pub struct Loop {
    events: Sender<PeerEvent>,
    notify: Arc<dyn Fn() + Send + Sync>,
}

impl Chain {
    /// Of a record.
    pub fn of(record: &Record) -> Self {
        let keys = record.keys();
        let open_parent = record.open_parent(&keys);
        Self { start: record.start(), keys, open_parent, tail: record.tail().to_vec() }
    }
}

impl Loop {
    /// `notify` is called after each question.
    pub fn new(events: Sender<PeerEvent>, notify: impl Fn() + Send + Sync + 'static) -> Self {
        Self { events, notify: Arc::new(notify) }
    }

    async fn ask<T>(&self, question: impl FnOnce(Reply<T>) -> Ask) -> Result<T, Refused> {
        let (reply, answer) = oneshot::channel();
        let event = PeerEvent::Transfer(question(reply));
        self.events.send(event).map_err(|_| Refused::Stopping)?;
        (self.notify)();
        answer.await.map_err(|_| Refused::Stopping)
    }

    fn tell(&self, what: Ask) {
        let _ = self.events.send(PeerEvent::Transfer(what)); // The loop is gone: nobody waits.
        (self.notify)();
    }

    /// See [`Ask::NotFetched`].
    pub fn not_fetched(&self, conversation: ConversationId) {
        self.tell(Ask::NotFetched(conversation));
    }

    /// See [`Ask::Offloaded`].
    pub fn offloaded(&self) {
        self.tell(Ask::Offloaded);
    }

    /// See [`Ask::Model`].
    pub async fn model(&self) -> Result<Model, Refused> {
        self.ask(Ask::Model).await?
    }

    /// See [`Ask::Record`].
    pub async fn record(&self, conversation: ConversationId) -> Result<Option<Kept>, Refused> {
        self.ask(|reply| Ask::Record { conversation, reply }).await?
    }

    /// See [`Ask::Present`].
    pub async fn present(&self, chain: Chain) -> Result<Vec<BlockKey>, Refused> {
        self.ask(|reply| Ask::Present { chain, reply }).await?
    }

    /// See [`Ask::Copy`].
    pub async fn copy(&self, key: BlockKey, root: RootKey) -> Result<Option<BlockBytes>, Refused> {
        self.ask(|reply| Ask::Copy { key, root, reply }).await?
    }

    /// See [`Ask::Missing`].
    pub async fn missing(&self, keys: Vec<BlockKey>) -> Result<Vec<BlockKey>, Refused> {
        self.ask(|reply| Ask::Missing { keys, reply }).await
    }

    /// See [`Ask::Unowned`].
    pub async fn unowned(&self, keys: Vec<BlockKey>) -> Result<Vec<BlockKey>, Refused> {
        self.ask(|reply| Ask::Unowned { keys, reply }).await
    }

    /// See [`Ask::Place`].
    pub async fn place(
        &self,
        conversation: ConversationId,
        header: BlockHeader,
        block: BlockBytes,
    ) -> Result<CommitOutcome, Refused> {
        let place = |reply| Ask::Place(Box::new(Incoming { conversation, header, block, reply }));
        self.ask(place).await?
    }

    /// See [`Ask::PutRecord`].
    pub async fn put_record(
        &self,
        conversation: ConversationId,
        kept: Kept,
    ) -> Result<bool, Refused> {
        self.ask(|reply| Ask::PutRecord { conversation, kept, reply }).await?
    }
}
