//! What http tasks and the engine say to each other. Http holds no state of a generation: it sends a
//! [`Command`] over one bounded channel and reads [`Event`]s from the channel inside it.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::account::Account;
use crate::cache_client::{Start, Unavailable};

/// What the client asked to be generated; token ids are final (template and tokenizer ran before).
#[derive(Debug)]
pub struct Generate {
    /// Prompt; not empty.
    pub tokens: Vec<u32>,
    /// Tenant and `cache_salt`, hashed into the root of the block keys: two salts never share KV.
    pub salt: Salt,
    /// What the cache may do for it.
    pub cache: CacheUse,
    /// The client's name for the conversation, if it gave one; kept beside its record.
    pub conversation: Option<Arc<str>>,
    /// Of a truncated conversation, where its blocks hang. Of others the prompt says it.
    pub start: Option<Start>,
    /// Sampling settings; `seed` is drawn by http where the client gave none.
    pub sampling: SamplingParams,
    /// Most tokens to generate; http has checked that prompt + this fits the context.
    pub tokens_max: u32,
    /// Tokens that end the reply (end-of-text and the request's own).
    pub stop_tokens: Arc<[u32]>,
    /// Where events go. When the receiver is dropped the engine cancels the sequence.
    pub events: mpsc::UnboundedSender<Event>,
}

/// A turn that its client says will come: its user has begun to type.
#[derive(Debug)]
pub struct Anticipate {
    /// See [`Generate::salt`].
    pub salt: Salt,
    /// The client's name for the conversation.
    pub conversation: Arc<str>,
    /// The conversation so far, as its record has it: what the turn's prompt will begin with.
    pub tokens: Arc<[u32]>,
    /// See [`Generate::start`].
    pub start: Option<Start>,
    /// Told, or there is nobody to tell.
    pub answer: oneshot::Sender<Result<(), Unavailable>>,
}

/// See [`Generate::salt`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Salt(pub Arc<[u8]>);

/// How long a conversation's KV stays, as its client wishes; holds for later turns that say nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Keep {
    /// Milliseconds after its last use; `None`: as the daemon is set.
    pub ttl_ms: Option<u64>,
    /// Unix milliseconds until which its blocks do not leave.
    pub pinned_until_ms: Option<u64>,
}

impl Keep {
    /// As `newer` says; as before where it says nothing.
    #[must_use]
    pub fn then(self, newer: Self) -> Self {
        Self {
            ttl_ms: newer.ttl_ms.or(self.ttl_ms),
            pinned_until_ms: newer.pinned_until_ms.or(self.pinned_until_ms),
        }
    }
}

/// What a request lets the cache do: the words of HTTP's `Cache-Control`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheUse {
    /// Everything is computed, whatever is known. What comes of it is kept as ever.
    pub no_read: bool,
    /// Nothing that this request computes stays in any tier, and its turn is not recorded.
    pub no_store: bool,
    /// For how long what is stored stays.
    pub keep: Keep,
}

/// As in the OpenAI API and vLLM's extensions.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus; 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 0 is off.
    pub min_p: f32,
    /// Same seed, same tokens → same reply.
    pub seed: u64,
    /// Alternatives to report, beside the chosen token.
    pub logprobs: Option<u8>,
    /// End-of-text is never drawn.
    pub ignore_eos: bool,
}

/// Prompt tokens that were not computed, by the tier in which their KV was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CachedTokens {
    /// In device blocks.
    pub device: u32,
    /// In host frames.
    pub host: u32,
    /// On disk when the request arrived.
    pub disk: u32,
}

impl CachedTokens {
    /// With the tiers' names: metric labels and fields of `usage`.
    pub fn by_tier(self) -> [(&'static str, u32); 3] {
        [("device", self.device), ("host", self.host), ("disk", self.disk)]
    }

    /// Of all tiers.
    pub fn total(self) -> u32 {
        self.device + self.host + self.disk
    }
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token (which is not part of the reply).
    Stop,
    /// `tokens_max` reached.
    Length,
}

/// Progress of one generation, in order: `Started` and `Prompt` once, tokens, one `Finished`; or a `Failed`.
/// `Unbroken` comes at most once, before any of them or after a preemption; `Deleted` may come at any time.
#[derive(Debug, Clone)]
pub enum Event {
    /// The conversation was deleted: its turn goes on and is not recorded.
    Deleted,
    /// Not all that a truncation kept was found: the history is computed anew, as one unbroken chain.
    Unbroken,
    /// Admitted.
    Started,
    /// The prompt's KV is complete: where each of its tokens came from, for good.
    Prompt(Account),
    /// One more token of the reply.
    Token {
        /// Id and log-probability.
        token: crate::batch::TokenLogprob,
        /// Alternatives, when asked for.
        alternatives: Vec<crate::batch::TokenLogprob>,
    },
    /// The end.
    Finished(FinishReason),
    /// The engine cannot serve this (for example shutting down); nothing follows.
    Failed(GenerateError),
}

/// Why the engine refused or gave up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The waiting queue is at its bound: 503 with `Retry-After`.
    #[error("{waiting} requests are already waiting, which is the limit; try again shortly")]
    QueueFull {
        /// The bound.
        waiting: usize,
    },
    /// More KV than the whole device pool holds: 400.
    #[error(
        "the request needs {needed} device blocks, the pool has {have}; raise runtime.deviceMemory"
    )]
    TooLarge {
        /// Blocks of prompt + reply.
        needed: u32,
        /// Blocks of the pool.
        have: u32,
    },
    /// Nothing to continue: 400.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A token id of `prompt_token_ids` that the model does not know: 400.
    #[error("token id {token} is outside the model's vocabulary of {vocabulary}")]
    UnknownToken {
        /// The first such token.
        token: u32,
        /// Ids are below this.
        vocabulary: u32,
    },
    /// Prompt and reply do not fit the context: 400.
    #[error("prompt ({prompt} tokens) + reply ({reply}) exceed the context of {context} tokens")]
    ContextTooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        reply: u32,
        /// Most of both together.
        context: u32,
    },
    /// The backend answered without the token that it was asked for: 500, and a bug.
    #[error("the backend gave no token; this is a bug, please report it")]
    Backend,
    /// The server is stopping: 503.
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// From http to the engine.
#[derive(Debug)]
pub enum Command {
    /// Generate a reply.
    Generate(Generate),
    /// Forget what device blocks hold (benchmarks, `POST /admin/device-cache/clear`); answers when
    /// done with the number of blocks that were forgotten.
    ClearDeviceCache(oneshot::Sender<u32>),
    /// Store a conversation record (opaque bytes) with the daemon, best effort.
    PutConversation {
        /// Id, salted with the tenant.
        id: [u8; 32],
        /// What http wants back later.
        record: Vec<u8>,
    },
    /// Fetch a conversation record; `None` when there is none or no daemon answers in time.
    GetConversation {
        /// Id, salted with the tenant.
        id: [u8; 32],
        /// Where the answer goes.
        answer: oneshot::Sender<Option<Vec<u8>>>,
    },
    /// Have a conversation's history brought near before its turn is asked for.
    Anticipate(Anticipate),
    /// Finish running sequences, commit tails, stop.
    Shutdown,
}
