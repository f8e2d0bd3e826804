//! One generation: its tokens, its device blocks, and how far it has come.
//!
//! ```text
//!           asks the cache        may be placed        takes part in steps       saves its last blocks
//! Unasked ───────────────► Asked ──────────────► Open ─────► Placed ─────► running ─────► closing
//!    ▲                                                          │             │
//!    └──────────────────────── preempted, or its load failed ◄──┴─────────────┘
//! ```
//!
//! **Invariants**
//! - `table` covers `computed` tokens; only the block that `computed` lies in, and those after it, are
//!   written.
//! - `computed < tokens.len()` while it runs: the last token has no KV yet, and the last prompt token
//!   is always computed, because its logits are what the first reply token is drawn from.
//! - A token's skip set depends on its position alone, so that computing it again gives the same KV.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kv_protocol::start::Start;
use kv_protocol::{BlockKey, ConversationId, MissReason};
use tokio::sync::mpsc;

use crate::account::{Account, Withheld};
use crate::adaskip::SkipSet;
use crate::adaskip::importance::ImportanceSum;
use crate::adaskip::policy::Reuse;
use crate::adaskip::presence::SkipSets;
use crate::batch::{BlockId, Importance, LoadId, Phase, Sampling, SequenceId};
use crate::block_pool::Origin;
use crate::request::{CacheUse, CachedTokens, Event, Generate, SamplingParams};

/// Whether a waiting sequence may go on, seen from the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// The cache was not asked yet.
    Unasked,
    /// The cache was asked; until this time the sequence waits for what it brings.
    Asked {
        /// Since the engine's start.
        until: Duration,
    },
    /// Nothing to wait for: what the cache offers is known.
    Open,
    /// Its blocks are reserved and its history is on the way.
    Placed {
        /// From this time on, compute hides what is still to come (`overlap::Rates::load_lead`).
        admit_at: Duration,
    },
}

/// A pinned frame's worth to a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offered {
    /// Leading tokens that are the sequence's own: a whole block, or fewer.
    pub tokens: u32,
    /// How they were computed.
    pub origin: Origin,
}

/// How far it is known where a prompt came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accounting {
    /// Not before its first admission; again so after a load that failed.
    Open,
    /// As its blocks were reserved, unless a load fails.
    Known(Account),
    /// For good: its first token is sampled.
    Counted,
}

/// What frames hold of a sequence's history, by place in its chain.
pub type Offer = BTreeMap<u32, Offered>;

/// What of a history came from where, set when blocks are reserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Whose.
    pub sequence: SequenceId,
    /// Tokens found in device blocks.
    pub device_tokens: u32,
    /// Names the load; none when `blocks` is empty.
    pub load: Option<LoadId>,
    /// Place in the chain, and where it goes. The last one may be filled in part.
    pub blocks: Vec<(u32, BlockId)>,
    /// Tokens that the load brings.
    pub load_tokens: u32,
    /// Loading was possible and computing is faster.
    pub slower_than_recompute: u32,
}

/// How a sequence's extra skipped FFNs are learned in its first decoded tokens.
#[derive(Debug, Clone)]
enum Extras {
    /// None, or none found.
    Off,
    /// Measured so far.
    Learning { window: ImportanceSum, measured: u32 },
    /// From this position on, this set.
    From { position: u32, set: Arc<SkipSet> },
}

/// Tokens to compute next, under one skip set.
#[derive(Debug, Clone)]
pub struct Run {
    /// At most this many tokens from `computed` on.
    pub tokens: u32,
    /// Their set.
    pub skip: Arc<SkipSet>,
    /// Decode when the one sampled last is all there is.
    pub phase: Phase,
}

/// See the module.
#[derive(Debug)]
pub struct Sequence {
    /// Also the order of arrival.
    pub id: SequenceId,
    /// Since the engine's start.
    pub arrived: Duration,
    /// Prompt and reply so far.
    pub tokens: Vec<u32>,
    /// Of `tokens`, the prompt.
    pub prompt_len: u32,
    /// Where its blocks hang.
    pub start: Start,
    /// Of a truncated history, where they hang if it has to be computed anew.
    unbroken: Option<Start>,
    /// Whose turn it is.
    pub conversation: Option<ConversationId>,
    /// What its request lets the cache do.
    pub cache: CacheUse,
    /// Keys of the full blocks of `tokens`.
    pub keys: Vec<BlockKey>,
    /// Device blocks in token order.
    pub table: Vec<BlockId>,
    /// Leading tokens whose KV is in the table.
    pub computed: u32,
    /// Leading tokens whose KV is as this engine's prefill computes it.
    pub own: u32,
    /// Whether it may be admitted.
    pub gate: Gate,
    /// What frames hold for it.
    pub offer: Offer,
    /// Loads on their way into its table.
    pub waits: Vec<LoadId>,
    /// Full blocks of the table that are saved, being saved, or known to be in a frame.
    pub saved_blocks: u32,
    /// Where its prompt came from.
    pub accounting: Accounting,
    /// What it found when its blocks were reserved.
    pub placed: CachedTokens,
    /// Why the rest was not found.
    pub miss: Option<MissReason>,
    /// What was there and could not be had.
    pub withheld: Option<Withheld>,
    /// Whether `Event::Started` was sent.
    pub started: bool,
    /// A load into its table failed: nothing computed since is worth anything.
    pub broken: bool,
    /// After a failed load frames are not tried again.
    pub shuns_frames: bool,
    /// Tokens to generate at most.
    pub tokens_max: u32,
    /// Tokens that end the reply.
    pub stop_tokens: Arc<[u32]>,
    params: SamplingParams,
    banned: Arc<[u32]>,
    events: mpsc::UnboundedSender<Event>,
    extras: Extras,
    tokens_per_block: u32,
}

impl Sequence {
    /// A sequence that just arrived. `unbroken` is where its blocks hang, unless the request says that its
    /// history was truncated.
    pub fn new(
        id: SequenceId,
        arrived: Duration,
        unbroken: Start,
        request: Generate,
        end_tokens: &Arc<[u32]>,
        tokens_per_block: u32,
        sets: &SkipSets,
    ) -> Self {
        let extras = match &sets.extras {
            Some(_) => {
                Extras::Learning { window: ImportanceSum::new(sets.decode.layers()), measured: 0 }
            }
            None => Extras::Off,
        };
        let name = request.conversation.as_ref();
        let conversation = name.map(|name| ConversationId::new(&unbroken.root, name.as_bytes()));
        let truncated = request.start.filter(|start| start.root == unbroken.root);
        let (start, unbroken) = match truncated {
            Some(truncated) => (truncated, Some(unbroken)),
            None => (unbroken, None),
        };
        let mut sequence = Self {
            id,
            arrived,
            prompt_len: request.tokens.len() as u32,
            tokens: request.tokens,
            start,
            unbroken,
            conversation,
            cache: request.cache,
            keys: Vec::new(),
            table: Vec::new(),
            computed: 0,
            own: 0,
            gate: Gate::Unasked,
            offer: Offer::default(),
            waits: Vec::new(),
            saved_blocks: 0,
            accounting: Accounting::Open,
            placed: CachedTokens::default(),
            miss: None,
            withheld: None,
            started: false,
            broken: false,
            shuns_frames: false,
            tokens_max: request.tokens_max,
            stop_tokens: request.stop_tokens,
            banned: if request.sampling.ignore_eos { end_tokens.clone() } else { Arc::from([]) },
            params: request.sampling,
            events: request.events,
            extras,
            tokens_per_block,
        };
        sequence.name_full_blocks();
        sequence
    }

    /// All tokens.
    pub fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Never: a prompt has tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens of the reply.
    pub fn reply_len(&self) -> u32 {
        self.len() - self.prompt_len
    }

    /// Whether all that is missing is the KV of the token sampled last.
    pub fn is_decoding(&self) -> bool {
        self.len() > self.prompt_len && self.computed + 1 == self.len()
    }

    /// Adds a sampled token.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.name_full_blocks();
    }

    fn name_full_blocks(&mut self) {
        let size = self.tokens_per_block as usize;
        while (self.keys.len() + 1) * size <= self.tokens.len() {
            let start = self.keys.len() * size;
            let key = BlockKey::child(
                &self.parent_of(self.keys.len()),
                &self.tokens[start..start + size],
            );
            self.keys.push(key);
        }
    }

    /// Whether its first `full` blocks are all that truncations kept: those cannot be computed anew under
    /// their names, for what they followed is gone.
    pub fn has_kept(&self, full: usize) -> bool {
        full >= self.start.kept_blocks()
    }

    /// Not all that truncations kept is to be had. The tokens are computed as an unbroken chain, which has
    /// names of its own.
    pub fn rename(&mut self) {
        let Some(unbroken) = self.unbroken.take() else { return };
        self.start = unbroken;
        self.keys.clear();
        self.name_full_blocks();
        self.reset();
        self.send(Event::Unbroken);
    }

    /// The key before block `index`.
    pub fn parent_of(&self, index: usize) -> BlockKey {
        self.start.parent_of(index, &self.keys)
    }

    /// The tokens to compute next: as far as one skip set goes.
    pub fn next_run(&self, sets: &SkipSets) -> Run {
        let (skip, end) = if self.computed < self.prompt_len {
            (sets.prefill.clone(), self.prompt_len)
        } else {
            match &self.extras {
                Extras::From { position, set } if self.computed >= *position => {
                    (set.clone(), u32::MAX)
                }
                Extras::From { position, .. } => (sets.decode.clone(), *position),
                // What was measured before a preemption is computed again without; the next token, alone.
                Extras::Learning { measured, .. } if self.computed < self.prompt_len + measured => {
                    (sets.decode.clone(), self.prompt_len + measured)
                }
                Extras::Off | Extras::Learning { .. } => (sets.decode.clone(), u32::MAX),
            }
        };
        Run {
            tokens: end.min(self.len()) - self.computed,
            skip,
            phase: if self.is_decoding() { Phase::Decode } else { Phase::Prefill },
        }
    }

    /// Whether the decode row that comes next should be measured.
    pub fn measures(&self) -> bool {
        matches!(self.extras, Extras::Learning { .. }) && self.is_decoding()
    }

    /// Adds what a measured decode row found; after the P-th decides the extras, once. Returns whether
    /// the sequence skips further FFNs from now on.
    pub fn learn(&mut self, row: &Importance, sets: &SkipSets) -> bool {
        let Some(rule) = &sets.extras else { return false };
        let Extras::Learning { window, measured } = &mut self.extras else { return false };
        window.add(row);
        *measured += 1;
        if *measured < rule.learn_tokens {
            return false;
        }
        let set = sets.with_extras(&window.means());
        let gained = set.is_some();
        self.extras = match set {
            Some(set) => Extras::From { position: self.computed, set },
            None => Extras::Off,
        };
        gained
    }

    /// How the next token is drawn.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.params.temperature,
            top_p: self.params.top_p,
            top_k: self.params.top_k,
            min_p: self.params.min_p,
            seed: self.params.seed,
            index: self.reply_len(),
            logprobs: self.params.logprobs,
            banned: self.banned.clone(),
        }
    }

    /// Leading tokens whose KV may come from elsewhere: not the last one, and under `Own` nothing
    /// that this sequence would compute otherwise than a prefill does.
    pub fn reusable(&self, sets: &SkipSets) -> u32 {
        if self.cache.no_read {
            return 0;
        }
        let own_end = match &self.extras {
            _ if !sets.decode_is_own() => self.prompt_len,
            Extras::From { position, .. } => *position,
            // Not decided yet: nothing beyond what is measured is skipped.
            Extras::Off | Extras::Learning { .. } => u32::MAX,
        };
        let limit = match sets.reuse {
            Reuse::Own => own_end,
            Reuse::Any => u32::MAX,
        };
        (self.len() - 1).min(limit)
    }

    /// The next `tokens` were computed under `skip`.
    pub fn advance(&mut self, tokens: u32, skip: &SkipSet, sets: &SkipSets) {
        if self.own == self.computed && *skip == *sets.prefill {
            self.own += tokens;
        }
        self.computed += tokens;
    }

    /// How blocks that end at `end` tokens were computed.
    pub fn origin(&self, end: u32) -> Origin {
        if end <= self.own { Origin::Own } else { Origin::Mixed }
    }

    /// Leading tokens whose KV some reader would take, and may.
    pub fn storable(&self, sets: &SkipSets) -> u32 {
        match sets.reuse {
            _ if self.cache.no_store => 0,
            Reuse::Own => self.own,
            Reuse::Any => self.computed,
        }
    }

    /// [`Self::storable`] once the next `tokens` are computed under `skip`.
    pub fn storable_after(&self, tokens: u32, skip: &SkipSet, sets: &SkipSets) -> u32 {
        match sets.reuse {
            _ if self.cache.no_store => 0,
            Reuse::Own if self.own == self.computed && *skip == *sets.prefill => self.own + tokens,
            Reuse::Own => self.own,
            Reuse::Any => self.computed + tokens,
        }
    }

    /// Back to before it was placed. The caller has released the table.
    pub fn reset(&mut self) {
        self.table.clear();
        self.waits.clear();
        self.computed = 0;
        self.own = 0;
        self.saved_blocks = 0;
        self.offer = Offer::default();
        self.placed = CachedTokens::default();
        self.miss = None;
        self.withheld = None;
        self.broken = false;
        self.gate = Gate::Unasked;
    }

    /// Sends progress to http. A client that is gone is noticed by [`Self::is_abandoned`].
    pub fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// Whether nobody listens any more.
    pub fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }
}
