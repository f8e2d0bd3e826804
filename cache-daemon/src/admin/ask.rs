//! What the admin API asks the loop.

use std::sync::Arc;

use kv_protocol::ConversationId;
use serde::Serialize;
use tokio::sync::oneshot;

use crate::conversation::Age;
use crate::reconfigure::{Change, InForce};
use crate::records::{ConversationLine, Explanation};
use crate::tier::disk::DiskUsage;
use crate::verify::Verification;

/// Where an answer goes. Dropped without one, it says that the worker is stopping.
#[derive(Debug)]
pub struct Reply<T>(pub(super) oneshot::Sender<Result<T, AskError>>);

impl<T> Reply<T> {
    /// Answers; who asked may be gone, which is as good.
    pub fn send(self, answer: Result<T, AskError>) {
        let _ = self.0.send(answer);
    }
}

/// A conversation as people name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Who {
    /// By the client's own name; of one root, if several have such a conversation.
    Name {
        /// The name.
        name: String,
        /// First digits of the root.
        root: Option<String>,
    },
    /// By the first digits of its id.
    Id(String),
}

/// A question to the loop. Each is answered within a turn unless it says otherwise.
#[derive(Debug)]
pub enum Ask {
    /// The next conversations, the most recently used first.
    Page {
        /// Behind this one.
        after: Option<Age>,
        /// Lines, each with its age. Empty at the end.
        reply: Reply<Vec<(Age, ConversationLine)>>,
    },
    /// The id of one.
    Find {
        /// Which.
        who: Who,
        /// Its id.
        reply: Reply<ConversationId>,
    },
    /// Where a conversation's blocks are, and why its last turn missed.
    Explain {
        /// Which.
        id: ConversationId,
        /// All about it.
        reply: Reply<Explanation>,
    },
    /// A conversation's record, from disk if need be.
    Record {
        /// Which.
        id: ConversationId,
        /// Its bytes, and when they were put.
        reply: Reply<(Arc<[u8]>, u64)>,
    },
    /// Keep a record, new or in the place of another.
    PutRecord {
        /// Whose.
        id: ConversationId,
        /// Its bytes.
        record: Vec<u8>,
        /// When the record in whose place it comes was put; `None`: there must be none.
        replaces: Option<u64>,
        /// Done.
        reply: Reply<()>,
    },
    /// Forget a conversation; answered when that is on disk.
    Delete {
        /// Which.
        id: ConversationId,
        /// What it did.
        reply: Reply<Deleted>,
    },
    /// How far the check of all stored blocks is.
    Verify {
        /// Begin one, if none runs.
        begin: bool,
        /// How far.
        reply: Reply<Verification>,
    },
    /// The settings in force.
    Config {
        /// Change these before.
        change: Change,
        /// After it.
        reply: Reply<InForce>,
    },
    /// Give garbage of the disk tier back; answered when that is done.
    Compact {
        /// What the tier takes after it.
        reply: Reply<DiskUsage>,
    },
}

/// What a deletion did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Deleted {
    /// Blocks that are unreadable now.
    pub blocks: u64,
    /// Blocks of its history that stay, for others.
    pub blocks_shared: u64,
    /// When the disk tier has erased them, Unix milliseconds; `None`: there is none.
    pub erased_by_ms: Option<u64>,
}

/// Why an ask is not answered as hoped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// None of that name.
    #[error("no conversation {who} is on record here; `kvctl top` lists those that are")]
    NoConversation {
        /// As asked for.
        who: String,
    },
    /// Several.
    #[error("{count} conversations are called {who}; say which by --root: {roots}")]
    Ambiguous {
        /// As asked for.
        who: String,
        /// How many.
        count: usize,
        /// Theirs, some of them.
        roots: String,
    },
    /// A turn, or another request, was faster.
    #[error(
        "conversation {who} has changed meanwhile, or is there already; look at it and ask again"
    )]
    Changed {
        /// Which.
        who: String,
    },
    /// Makes no sense.
    #[error("{0}")]
    Refused(String),
    /// Makes sense later.
    #[error("{0}")]
    NotNow(String),
    /// The loop, or the disk behind it, is slow.
    #[error("no answer from the daemon's loop within {seconds} s; `kvctl status` shows its state")]
    Late {
        /// Waited.
        seconds: u64,
    },
    /// The worker ends.
    #[error("the daemon's worker is stopping; ask the next one")]
    Stopping,
    /// The path of the request.
    #[error("no such request; docs/conversations.md has the list")]
    NoSuchPath,
}
