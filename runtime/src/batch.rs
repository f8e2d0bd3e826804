//! What one step asks of a backend, and what comes back: the seam between engine and backend.
//!
//! The engine thread owns all state and talks to a [`Backend`] in whole steps, never in tensor
//! operations, so that a CPU with a thread pool and a GPU with streams, events and graphs fit behind
//! the same four calls (docs/adr/0004).
//!
//! Loads (frame → device block) and saves (device block → frame) run beside the compute, layer by
//! layer: a row that names a load waits, in each layer, for that layer of that load only.

use std::sync::Arc;

use crate::adaskip::SkipSet;

/// One generation in the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// Index of a device block in the backend's pool; below [`DeviceGeometry::block_count`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// Names a submitted step until its output was polled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId(pub u64);

/// Names a load (frames → device blocks) chosen by the engine; unique for the life of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LoadId(pub u64);

/// Names a save (device block → frame) chosen by the engine; unique for the life of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SaveId(pub u64);

/// Whether a row computes given tokens or the one sampled last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Tokens of the prompt, in chunks.
    Prefill,
    /// One sampled token.
    Decode,
}

/// Shape of the device pool: `[layer][block][kv_head][K|V][token][head_dim]`, 16-bit values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceGeometry {
    /// Transformer layers of the model, skipped ones included.
    pub layers: u16,
    /// KV heads a layer.
    pub kv_heads: u16,
    /// Values a head.
    pub head_dim: u16,
    /// Tokens a block.
    pub tokens_per_block: u16,
    /// Blocks in the pool.
    pub block_count: u32,
}

impl DeviceGeometry {
    /// Bytes of one layer of one block: the unit that moves (`[kv_head][K|V][token][head_dim]`).
    pub fn row_bytes(&self) -> usize {
        usize::from(self.kv_heads)
            * 2
            * usize::from(self.tokens_per_block)
            * usize::from(self.head_dim)
            * 2
    }
}

/// How the next token of a row is chosen from its logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: the smallest set of tokens whose probabilities reach this; 1 is off.
    pub top_p: f32,
    /// Only the k most likely tokens; 0 is off.
    pub top_k: u32,
    /// Only tokens at least this share as likely as the likeliest; 0 is off.
    pub min_p: f32,
    /// Seed of the request.
    pub seed: u64,
    /// Index of the token in the reply: with `seed` it fixes the draw, whatever the batch.
    pub index: u32,
    /// Log-probabilities of this many alternatives, beside the chosen token's own.
    pub logprobs: Option<u8>,
    /// Tokens that may not be drawn (for example end-of-text under `ignore_eos`).
    pub banned: Arc<[u32]>,
}

/// One sequence's share of a step: `tokens` are computed and their K and V stored.
#[derive(Debug, Clone)]
pub struct Row {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// Chooses AdaSkip's set and what is counted.
    pub phase: Phase,
    /// Tokens to compute, at least one; exactly one in decode.
    pub tokens: Vec<u32>,
    /// Position of `tokens[0]`, which is also how many tokens of KV precede it.
    pub position: u32,
    /// Device blocks in token order; covers `position + tokens.len()` tokens.
    pub block_table: Vec<BlockId>,
    /// Sublayers that do not run for this row.
    pub skip: Arc<SkipSet>,
    /// Sample from the last token's logits; `None` in all chunks of a prompt but the last.
    pub sampling: Option<Sampling>,
    /// Return [`Importance`] of the sublayers that ran.
    pub measure: bool,
    /// Loads that fill blocks of this row's table; each layer waits for that layer of each load.
    pub waits: Vec<LoadId>,
}

/// The rows that one step computes together. Rows of one batch never name the same sequence twice.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// At least one.
    pub rows: Vec<Row>,
}

/// How much each sublayer changed its input, summed over tokens (AdaSkip, arXiv 2501.02336, formulas 1 to 3).
/// Index `2 * layer` is the layer's attention, `2 * layer + 1` its FFN.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Importance {
    /// Sum of cos(input, output), where output = input + what the sublayer adds.
    pub similarity_sum: Vec<f64>,
    /// Sum of ‖output‖ / ‖input‖.
    pub scale_sum: Vec<f64>,
    /// Tokens summed; 0 for a sublayer that was skipped.
    pub tokens: Vec<u64>,
}

/// A token and its log-probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub token: u32,
    /// Natural logarithm of its probability, before temperature and filters.
    pub logprob: f32,
}

/// What a step found for one row.
#[derive(Debug, Clone)]
pub struct RowOutput {
    /// As in the row.
    pub sequence: SequenceId,
    /// The sampled token, when the row asked for one.
    pub token: Option<TokenLogprob>,
    /// The likeliest alternatives, when asked for.
    pub alternatives: Vec<TokenLogprob>,
    /// When the row asked to be measured.
    pub importance: Option<Importance>,
    /// The load that failed (checksum, frame gone): nothing this row computed may be used.
    pub failed_load: Option<LoadId>,
}

/// Result of one step, rows in the order of the batch.
#[derive(Debug, Clone)]
pub struct StepOutput {
    /// As returned by `submit`.
    pub step: StepId,
    /// One a row.
    pub rows: Vec<RowOutput>,
    /// Compute time of the step, waits for loads excluded.
    pub compute: std::time::Duration,
    /// Time that layers stood waiting for loads.
    pub load_wait: std::time::Duration,
}

/// A frame that the runtime fills, as a backend's copier sees it: rows are present layers, packed.
///
/// The memory may be shared with another process, so access is by copy only, never by reference.
pub trait WriteFrame: Send + Sync + std::fmt::Debug {
    /// Copies `from` into the frame at `offset`. Panics if out of the frame's bounds.
    fn write(&self, offset: usize, from: &[u8]);
}

/// Frames that hold blocks found together, by place; the memory is shared likewise.
pub trait ReadFrames: Send + Sync + std::fmt::Debug {
    /// CRC32C of each packed row of the block that was found at `place`, if the frame still holds that very
    /// block. Asked before its rows are copied: what comes into the frame later has other checksums.
    fn checksums(&self, place: usize) -> Option<Vec<u32>>;
    /// Copies `to.len()` bytes from `offset` in the frame. Panics if out of the frame's bounds.
    fn read(&self, place: usize, offset: usize, to: &mut [u8]);
    /// The frame at `place` does not hold the block: whoever keeps it is told, and nobody gets it again.
    fn reject(&self, place: usize);
}

/// One of the frames that were found together; dropping the last of them gives all back.
#[derive(Debug, Clone)]
pub struct FoundFrame {
    frames: Arc<dyn ReadFrames>,
    place: usize,
}

impl FoundFrame {
    /// The one at `place`.
    pub fn new(frames: Arc<dyn ReadFrames>, place: usize) -> Self {
        Self { frames, place }
    }

    /// See [`ReadFrames::checksums`].
    pub fn checksums(&self) -> Option<Vec<u32>> {
        self.frames.checksums(self.place)
    }

    /// See [`ReadFrames::read`].
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        self.frames.read(self.place, offset, to);
    }

    /// See [`ReadFrames::reject`].
    pub fn reject(&self) {
        self.frames.reject(self.place);
    }
}

/// One block to copy from its frame.
#[derive(Debug, Clone)]
pub struct LoadBlock {
    /// Where the bytes are.
    pub frame: FoundFrame,
    /// Where they go.
    pub block: BlockId,
}

/// A history on its way into the device pool; copied layer by layer, all blocks of layer 0 first.
#[derive(Debug, Clone)]
pub struct LoadPlan {
    /// Chosen by the engine.
    pub id: LoadId,
    /// In token order.
    pub blocks: Vec<LoadBlock>,
    /// Layers that frames hold, ascending: packed row `r` is layer `present_layers[r]`.
    pub present_layers: Arc<[u16]>,
}

/// A computed block on its way into a frame. Starts when the steps submitted before it have produced
/// the block's tokens, layer by layer behind them.
#[derive(Debug, Clone)]
pub struct SavePlan {
    /// Chosen by the engine.
    pub id: SaveId,
    /// Where the bytes are.
    pub block: BlockId,
    /// Where they go.
    pub frame: Arc<dyn WriteFrame>,
    /// As in [`LoadPlan`].
    pub present_layers: Arc<[u16]>,
}

/// What a backend has finished since it was last asked.
#[derive(Debug, Clone)]
pub enum BackendEvent {
    /// A step is done.
    Step(StepOutput),
    /// All layers of a load have arrived, and their checksums were right.
    Loaded(LoadId),
    /// A load failed: checksum of a row. Rows that wait for it are answered with `failed_load`.
    LoadFailed(LoadId),
    /// A block lies in its frame; the CRC32C of each packed row, for the header.
    Saved(SaveId, Arc<[u32]>),
}

/// Where a model is computed. One owner (the engine), no blocking call.
///
/// Steps run in the order they were submitted. A backend calls the `wake` function that it was built
/// with after each event becomes ready to poll.
pub trait Backend: Send {
    /// Shape of the pool.
    fn geometry(&self) -> DeviceGeometry;
    /// Starts a step. Rows are valid by construction (the scheduler's tests say so); a backend
    /// asserts what it relies on for memory safety.
    fn submit(&mut self, batch: Batch) -> StepId;
    /// Starts a load at once; it runs beside the steps.
    fn load(&mut self, plan: LoadPlan);
    /// Starts a save behind the steps submitted so far.
    fn save(&mut self, plan: SavePlan);
    /// The next finished thing, if any.
    fn poll(&mut self) -> Option<BackendEvent>;
}
