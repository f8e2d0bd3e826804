//! One step on the compute thread: embed, walk the sublayers, project, sample.
//!
//! All tokens of all rows go through a layer together. A sublayer works on a *list* of token
//! indices, so rows with different skip sets share one matrix product. What a sublayer adds is not
//! applied at once but by the next sublayer's prologue (*pending*), in the same pass that
//! normalises and quantises.
//!
//! Why unsafe: items of a parallel region write parts of one buffer, and the device pool is shared
//! with the copier. What must hold: parts do not overlap; rows of the pool are written by one side
//! at a time. Who guarantees it: each region below cuts its buffers by item; the engine keeps to
//! the contract in `mod.rs`, and gates are waited for before the pool is read or written.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use kernels::disjoint::Disjoint;
use kernels::matmul::{Matrix, Output};
use kernels::paged_attention::{self, Item, KvBlocks, Part};
use kernels::pool::Pool;
use kernels::quantise::{self, Block, tiled_len};
use kernels::rope::{self, Table};
use kernels::swiglu::swiglu;
use kernels::{Class, rmsnorm};

use super::copier::{Computed, Probe, Queue};
use super::gate::{Arrival, Gate};
use super::packed::{Layer, Weights};
use crate::batch::{BackendEvent, Batch, Importance, LoadId, Row, RowOutput, StepId, StepOutput};
use crate::model::Config;
use crate::sampler::{Sampled, sample};

/// Tokens an item of the light regions (norms, rotation, gating): some microseconds of work.
const TOKENS_PER_ITEM: usize = 8;

/// Items a thread in a matrix product: enough that a late thread leaves little to wait for.
const ITEMS_PER_THREAD: usize = 8;

/// The shapes of all kernel calls follow from a checked config.
const SHAPES_FIT: &str = "shapes follow from the config";

/// A step on its way to the compute thread.
pub struct Work {
    pub step: StepId,
    pub batch: Batch,
    /// For each row, the loads it waits for that are not known to have arrived.
    pub waits: Vec<Vec<(LoadId, Arc<Gate>)>>,
    /// Saves of blocks that this step writes to.
    pub saves: Vec<Arc<Gate>>,
}

/// The compute thread's connections.
pub struct Ends {
    pub work: Receiver<Work>,
    pub queue: Arc<Queue>,
    pub events: Sender<BackendEvent>,
    pub wake: Arc<dyn Fn() + Send + Sync>,
    pub probe: Arc<dyn Probe>,
}

/// Rings even when the thread panics, so that the engine finds it dead instead of waiting.
struct WakeOnDrop(Arc<dyn Fn() + Send + Sync>);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// What a row does in one sublayer.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    Run,
    /// Output is `scale · input`.
    Skip(f32),
    /// As `Skip`, but K and V are computed and stored.
    Backfill(f32),
    /// A load of the row failed: nothing more is computed for it.
    Gone,
}

/// A row of the batch and where its tokens lie in the step's order.
struct Span<'a> {
    row: &'a Row,
    block_table: Vec<u32>,
    first: usize,
    failed: Option<LoadId>,
}

impl Span<'_> {
    fn tokens(&self) -> Range<usize> {
        self.first..self.first + self.row.tokens.len()
    }

    fn attention_mode(&self, layer: usize) -> Mode {
        let skip = &self.row.skip;
        match (self.failed, skip.attention[layer], skip.backfill[layer]) {
            (Some(_), _, _) => Mode::Gone,
            (None, false, _) => Mode::Run,
            (None, true, false) => Mode::Skip(skip.scale[2 * layer]),
            (None, true, true) => Mode::Backfill(skip.scale[2 * layer]),
        }
    }

    fn ffn_mode(&self, layer: usize) -> Mode {
        let skip = &self.row.skip;
        match (self.failed, skip.ffn[layer]) {
            (Some(_), _) => Mode::Gone,
            (None, false) => Mode::Run,
            (None, true) => Mode::Skip(skip.scale[2 * layer + 1]),
        }
    }
}

/// A token that is in no list.
const NOWHERE: usize = usize::MAX;

/// What one token is about to get from the sublayer before.
#[derive(Debug, Clone, Copy)]
struct Pending {
    /// Row of `delta`, or [`NOWHERE`].
    delta: usize,
}

/// Similarity and norm ratio of one token over one sublayer; NaN where it did not run.
type Change = [f64; 2];

/// Buffers of a step, grown to the largest seen.
#[derive(Default)]
struct Buffers {
    x: Vec<f32>,           // [T, hidden] residual stream
    quantised: Vec<Block>, // [list / 8, K / 32, 8] input of the next product
    qkv: Vec<f32>,         // [list, query width + 2 · KV width]
    mixed: Vec<f32>,       // [list, query width] attention's result
    gate_up: Vec<f32>,     // [list, 2 · ffn]
    delta: Vec<f32>,       // [list, hidden] what the sublayer adds
    logits: Vec<f32>,      // [S, vocab]
    pending: Vec<Pending>, // [T]
    modes: Vec<Mode>,      // [T]
    place: Vec<usize>,     // [T] index in `list`, or NOWHERE
    list: Vec<usize>,      // Tokens that the sublayer works on: those that run, then backfills.
    changes: Vec<Change>,  // [2 · layers, T] when a row is measured
    items: Vec<AttentionItem>,
}

#[derive(Clone, Copy)]
struct AttentionItem {
    span: usize,
    offset: usize,
    tokens: usize,
    kv_head: usize,
}

thread_local! {
    // One row of floats between two kernels; grown once.
    static ROW: RefCell<Vec<f32>> = RefCell::default();
}

fn with_row<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    ROW.with_borrow_mut(|row| {
        if row.len() < len {
            row.resize(len, 0.0);
        }
        body(&mut row[..len])
    })
}

fn grown<T: Clone>(buffer: &mut Vec<T>, len: usize, value: T) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, value);
    }
    &mut buffer[..len]
}

/// The compute thread.
pub struct Compute {
    config: Config,
    weights: Weights,
    rope: Table,
    blocks: Arc<KvBlocks>,
    pool: Pool,
    class: Class,
    buffers: Buffers,
}

impl Compute {
    pub fn new(
        config: Config,
        weights: Weights,
        rope: Table,
        blocks: Arc<KvBlocks>,
        pool: Pool,
        class: Class,
    ) -> Self {
        Self { config, weights, rope, blocks, pool, class, buffers: Buffers::default() }
    }

    /// Runs steps until the engine's end is dropped.
    #[expect(clippy::needless_pass_by_value, reason = "the connections end with the thread")]
    pub fn run(mut self, ends: Ends) {
        let _wake = WakeOnDrop(Arc::clone(&ends.wake));
        while let Ok(work) = ends.work.recv() {
            let output = self.step(&work, &ends);
            // A closed channel means that the backend is being dropped.
            drop(ends.events.send(BackendEvent::Step(output)));
            (ends.wake)();
        }
    }

    fn step(&mut self, work: &Work, ends: &Ends) -> StepOutput {
        let start = Instant::now();
        let mut waited = Duration::ZERO;
        let mut spans = self.spans(&work.batch);
        self.embed(&spans);
        for layer in 0..self.config.layers {
            self.attention(layer, &mut spans, work, ends, &mut waited);
            self.ffn(layer, &spans);
            ends.queue.computed(Computed { step: work.step.0, layers: layer + 1 });
            ends.probe.computed_layer(work.step, layer);
        }
        self.settle_last(&spans);
        ends.queue.computed(Computed { step: work.step.0 + 1, layers: 0 });
        let sampled = self.project_and_sample(&spans);
        let rows = spans
            .iter()
            .zip(sampled)
            .map(|(span, sampled)| {
                let (token, alternatives) =
                    sampled.map_or((None, Vec::new()), |s| (Some(s.token), s.alternatives));
                RowOutput {
                    sequence: span.row.sequence,
                    token,
                    alternatives,
                    importance: span.row.measure.then(|| self.importance(span)),
                    failed_load: span.failed,
                }
            })
            .collect();
        let compute = start.elapsed().saturating_sub(waited);
        StepOutput { step: work.step, rows, compute, load_wait: waited }
    }

    fn spans<'a>(&self, batch: &'a Batch) -> Vec<Span<'a>> {
        let tokens_per_block = self.blocks.shape().tokens_per_block;
        let mut first = 0;
        batch
            .rows
            .iter()
            .map(|row| {
                let end = row.position as usize + row.tokens.len();
                assert!(!row.tokens.is_empty());
                assert!(end <= row.block_table.len() * tokens_per_block);
                assert!(end <= self.rope.positions());
                assert_eq!(row.skip.attention.len(), self.config.layers);
                let block_table = row.block_table.iter().map(|block| block.0).collect();
                let span = Span { row, block_table, first, failed: None };
                first += row.tokens.len();
                span
            })
            .collect()
    }

    /// Looks the tokens up and forgets what an earlier step left pending.
    fn embed(&mut self, spans: &[Span<'_>]) {
        let hidden = self.config.hidden;
        let tokens: Vec<u32> = spans.iter().flat_map(|span| &span.row.tokens).copied().collect();
        let count = tokens.len();
        let measured = spans.iter().any(|span| span.row.measure);
        let buffers = &mut self.buffers;
        buffers.pending.clear();
        buffers.pending.resize(count, Pending { delta: NOWHERE });
        buffers.modes.clear();
        buffers.modes.resize(count, Mode::Run);
        buffers.changes.clear();
        if measured {
            buffers.changes.resize(2 * self.config.layers * count, [f64::NAN; 2]);
        }
        let x = Disjoint::new(grown(&mut buffers.x, count * hidden, 0.0));
        let embedding = &self.weights.embedding;
        self.pool.run(count.div_ceil(TOKENS_PER_ITEM), &|item| {
            for t in chunk(item, count) {
                // SAFETY: token t belongs to this item alone.
                let x = unsafe { x.range_mut(t * hidden..(t + 1) * hidden) };
                embedding.dequantise_row(tokens[t] as usize, x).expect(SHAPES_FIT);
            }
        });
    }

    /// Lists the tokens that sublayer `sublayer` works on; applies what is pending, normalises and
    /// quantises the listed, scales the skipped. Returns how many run and how many are listed.
    fn prologue(
        &mut self,
        sublayer: usize,
        spans: &[Span<'_>],
        mode: impl Fn(&Span<'_>) -> Mode,
    ) -> (usize, usize) {
        let hidden = self.config.hidden;
        let layer = &self.weights.layers[sublayer / 2];
        let norm = if sublayer.is_multiple_of(2) { &layer.attention_norm } else { &layer.ffn_norm };
        let epsilon = self.config.norm_epsilon;
        let class = self.class;
        let b = &mut self.buffers;
        let count = b.modes.len();
        b.list.clear();
        for span in spans {
            let mode = mode(span);
            b.modes[span.tokens()].fill(mode);
            if mode == Mode::Run {
                b.list.extend(span.tokens());
            }
        }
        let running = b.list.len();
        for span in spans {
            if matches!(b.modes[span.first], Mode::Backfill(_)) {
                b.list.extend(span.tokens());
            }
        }
        let listed = b.list.len();
        b.place.clear();
        b.place.resize(count, NOWHERE);
        for (index, &t) in b.list.iter().enumerate() {
            b.place[t] = index;
        }
        let row_blocks = hidden / quantise::BLOCK;
        let tiles = grown(&mut b.quantised, tiled_len(listed, row_blocks), Block::ZERO);
        let quantised = Disjoint::new(tiles);
        let x = Disjoint::new(&mut b.x[..count * hidden]);
        let changes = Disjoint::new(&mut b.changes);
        let (delta, pending, modes, place) = (&b.delta, &b.pending, &b.modes, &b.place);
        self.pool.run(count.div_ceil(TOKENS_PER_ITEM), &|item| {
            for t in chunk(item, count) {
                // SAFETY: token t belongs to this item alone.
                let x = unsafe { x.range_mut(t * hidden..(t + 1) * hidden) };
                let change = change_of(sublayer, t, count, changes.len());
                // SAFETY: as above; an empty range when nothing is measured.
                let change = unsafe { changes.range_mut(change) };
                settle(pending[t], delta, x, change.first_mut());
                if place[t] != NOWHERE {
                    with_row(hidden, |normed| {
                        rmsnorm::rmsnorm(class, x, norm, epsilon, normed).expect(SHAPES_FIT);
                        // SAFETY: places are distinct.
                        unsafe { quantise::quantise(class, normed, place[t], &quantised) }
                            .expect(SHAPES_FIT);
                    });
                }
                if let Mode::Skip(scale) | Mode::Backfill(scale) = modes[t] {
                    for x in x.iter_mut() {
                        *x *= scale;
                    }
                }
            }
        });
        for (pending, &place) in b.pending.iter_mut().zip(&b.place) {
            pending.delta = if place < running { place } else { NOWHERE };
        }
        (running, listed)
    }

    /// Applies what the last sublayer left pending.
    fn settle_last(&mut self, spans: &[Span<'_>]) {
        let (hidden, sublayers) = (self.config.hidden, 2 * self.config.layers);
        let count = spans.iter().map(|span| span.row.tokens.len()).sum();
        let b = &mut self.buffers;
        for t in 0..count {
            let change = change_of(sublayers, t, count, b.changes.len());
            let x = &mut b.x[t * hidden..(t + 1) * hidden];
            settle(b.pending[t], &b.delta, x, b.changes[change].first_mut());
        }
    }

    fn attention(
        &mut self,
        layer: usize,
        spans: &mut [Span<'_>],
        work: &Work,
        ends: &Ends,
        waited: &mut Duration,
    ) {
        let (running, listed) = self.prologue(2 * layer, spans, |span| span.attention_mode(layer));
        if listed == 0 {
            return;
        }
        let (queries, kv) = (self.config.query_width(), self.config.kv_width());
        let (hidden, width) = (self.config.hidden, queries + 2 * kv);
        let weights = &self.weights.layers[layer];
        let b = &mut self.buffers;

        let row_blocks = hidden / quantise::BLOCK;
        let x = |rows| (rows, &b.quantised[..tiled_len(rows, row_blocks)]);
        let out = |first_column, buffer| Output { buffer, stride: width, first_column };
        let [q, k, v] = &weights.qkv;
        {
            let qkv = Disjoint::new(grown(&mut b.qkv, listed * width, 0.0));
            let (q_out, k_out, v_out) = (
                out(0, qkv.reborrow()),
                out(queries, qkv.reborrow()),
                out(queries + kv, qkv.reborrow()),
            );
            let products = [
                Product { matrix: q, x: x(running), out: &q_out },
                Product { matrix: k, x: x(listed), out: &k_out },
                Product { matrix: v, x: x(listed), out: &v_out },
            ];
            multiply(&mut self.pool, self.class, &products);
        }

        for gate in &work.saves {
            gate.wait(layer, waited);
        }
        // Before the row's own K and V are stored, not only before they are read: a tail that is being
        // loaded shares its block with the first new tokens.
        ends.probe.waits_for_loads(work.step, layer);
        for (span, waits) in spans.iter_mut().zip(&work.waits) {
            if matches!(span.attention_mode(layer), Mode::Run | Mode::Backfill(_)) {
                let failed =
                    |(_, gate): &&(LoadId, Arc<Gate>)| gate.wait(layer, waited) == Arrival::Failed;
                span.failed = waits.iter().find(failed).map(|(id, _)| *id);
            }
        }
        self.rotate_and_store(layer, spans, running, listed);
        self.mix(layer, spans, running);

        let b = &mut self.buffers;
        let row_blocks = queries / quantise::BLOCK;
        let tiles = grown(&mut b.quantised, tiled_len(running, row_blocks), Block::ZERO);
        {
            let (tiles, mixed, class) = (Disjoint::new(&mut *tiles), &b.mixed, self.class);
            self.pool.run(running.div_ceil(TOKENS_PER_ITEM), &|item| {
                for index in chunk(item, running) {
                    let row = &mixed[index * queries..(index + 1) * queries];
                    // SAFETY: the row of `index` belongs to this item alone.
                    unsafe { quantise::quantise(class, row, index, &tiles) }.expect(SHAPES_FIT);
                }
            });
        }
        let weights = &self.weights.layers[layer];
        let delta = Disjoint::new(grown(&mut b.delta, running * hidden, 0.0));
        let out = Output { buffer: delta, stride: hidden, first_column: 0 };
        let product = Product { matrix: &weights.attention_output, x: (running, tiles), out: &out };
        multiply(&mut self.pool, self.class, &[product]);
    }

    /// Adds biases, rotates queries, writes K and V to the device blocks.
    fn rotate_and_store(
        &mut self,
        layer: usize,
        spans: &[Span<'_>],
        running: usize,
        listed: usize,
    ) {
        let config = &self.config;
        let (queries, kv) = (config.query_width(), config.kv_width());
        let (width, head_dim) = (queries + 2 * kv, config.head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let tokens_per_block = self.blocks.shape().tokens_per_block;
        let bias = self.weights.layers[layer].qkv_bias.as_ref();
        let (class, rope, blocks) = (self.class, &self.rope, &*self.blocks);
        let b = &mut self.buffers;
        let qkv = Disjoint::new(&mut b.qkv[..listed * width]);
        let list = &b.list;
        self.pool.run(listed.div_ceil(TOKENS_PER_ITEM), &|item| {
            for index in chunk(item, listed) {
                let t = list[index];
                let span = &spans[spans.partition_point(|span| span.first <= t) - 1];
                let position = span.row.position as usize + t - span.first;
                // SAFETY: the row of `index` belongs to this item alone.
                let row = unsafe { qkv.range_mut(index * width..(index + 1) * width) };
                let (q, rest) = row.split_at_mut(queries);
                let (k, v) = rest.split_at_mut(kv);
                if let Some([bias_q, bias_k, bias_v]) = bias {
                    add(q, bias_q);
                    add(k, bias_k);
                    add(v, bias_v);
                }
                if index < running {
                    rope::rotate(class, rope, position, scale, q).expect(SHAPES_FIT);
                }
                let block = span.block_table[position / tokens_per_block] as usize;
                let token = position % tokens_per_block;
                for (part, values) in [(Part::Key, &*k), (Part::Value, &*v)] {
                    for (kv_head, values) in values.chunks_exact(head_dim).enumerate() {
                        // SAFETY: a token has one slot; the copier is done with the block (saves
                        // were waited for, loads of it are ordered by the engine), and attention
                        // starts after this region.
                        let to = unsafe { blocks.token_mut((layer, block), kv_head, part, token) };
                        paged_attention::store(class, values, to).expect(SHAPES_FIT);
                    }
                }
            }
        });
    }

    /// Attention of all running rows into `mixed`.
    fn mix(&mut self, layer: usize, spans: &[Span<'_>], running: usize) {
        let config = &self.config;
        let (queries, kv) = (config.query_width(), config.kv_width());
        let width = queries + 2 * kv;
        let tokens_max = paged_attention::tokens_max(config.heads, config.kv_heads);
        let (class, rope, blocks, heads) = (self.class, &self.rope, &*self.blocks, config.heads);
        let b = &mut self.buffers;
        b.items.clear();
        for (index, span) in spans.iter().enumerate() {
            if span.attention_mode(layer) != Mode::Run {
                continue;
            }
            for offset in (0..span.row.tokens.len()).step_by(tokens_max) {
                let tokens = tokens_max.min(span.row.tokens.len() - offset);
                b.items.extend((0..config.kv_heads).map(|kv_head| AttentionItem {
                    span: index,
                    offset,
                    tokens,
                    kv_head,
                }));
            }
        }
        b.items.reverse(); // Late positions see most keys: the longest items start first.
        let out = Disjoint::new(grown(&mut b.mixed, running * queries, 0.0));
        let (items, place, qkv) = (&b.items, &b.place, &b.qkv);
        self.pool.run(items.len(), &|index| {
            let item = items[index];
            let span = &spans[item.span];
            let out_row = place[span.first + item.offset];
            let item = Item {
                blocks,
                layer,
                block_table: &span.block_table,
                kv_head: item.kv_head,
                heads,
                queries: &qkv[out_row * width..],
                query_stride: width,
                first_position: span.row.position as usize + item.offset,
                tokens: item.tokens,
                rope,
                out: &out,
                out_row,
            };
            // SAFETY: this layer's loads have arrived and its K and V are stored; later steps have
            // not begun. Items differ in tokens or head, so their results do not overlap.
            unsafe { paged_attention::attend(class, &item) }.expect(SHAPES_FIT);
        });
    }

    fn ffn(&mut self, layer: usize, spans: &[Span<'_>]) {
        let (running, _) = self.prologue(2 * layer + 1, spans, |span| span.ffn_mode(layer));
        if running == 0 {
            return;
        }
        let (hidden, ffn, class) = (self.config.hidden, self.config.ffn, self.class);
        let weights: &Layer = &self.weights.layers[layer];
        let b = &mut self.buffers;
        let x = (running, &b.quantised[..tiled_len(running, hidden / quantise::BLOCK)]);
        {
            let gate_up = Disjoint::new(grown(&mut b.gate_up, running * 2 * ffn, 0.0));
            let out =
                |first_column| Output { buffer: gate_up.reborrow(), stride: 2 * ffn, first_column };
            let (gate_out, up_out) = (out(0), out(ffn));
            let [gate, up] = &weights.gate_up;
            let products = [
                Product { matrix: gate, x, out: &gate_out },
                Product { matrix: up, x, out: &up_out },
            ];
            multiply(&mut self.pool, class, &products);
        }
        let row_blocks = ffn / quantise::BLOCK;
        let tiles = grown(&mut b.quantised, tiled_len(running, row_blocks), Block::ZERO);
        {
            let tiles = Disjoint::new(&mut *tiles);
            let gate_up = &b.gate_up;
            self.pool.run(running.div_ceil(TOKENS_PER_ITEM), &|item| {
                for index in chunk(item, running) {
                    let row = &gate_up[index * 2 * ffn..(index + 1) * 2 * ffn];
                    let (gate, up) = row.split_at(ffn);
                    with_row(ffn, |gated| {
                        swiglu(class, gate, up, gated).expect(SHAPES_FIT);
                        // SAFETY: the row of `index` belongs to this item alone.
                        unsafe { quantise::quantise(class, gated, index, &tiles) }
                            .expect(SHAPES_FIT);
                    });
                }
            });
        }
        let delta = Disjoint::new(grown(&mut b.delta, running * hidden, 0.0));
        let out = Output { buffer: delta, stride: hidden, first_column: 0 };
        multiply(
            &mut self.pool,
            class,
            &[Product { matrix: &weights.down, x: (running, tiles), out: &out }],
        );
    }

    /// Logits of the rows that sample, and their tokens.
    fn project_and_sample(&mut self, spans: &[Span<'_>]) -> Vec<Option<Sampled>> {
        let (hidden, vocab, class) = (self.config.hidden, self.config.vocab, self.class);
        let sampling: Vec<&Span<'_>> = spans
            .iter()
            .filter(|span| span.row.sampling.is_some() && span.failed.is_none())
            .collect();
        let head = self.weights.head();
        let b = &mut self.buffers;
        let row_blocks = hidden / quantise::BLOCK;
        let tiles = grown(&mut b.quantised, tiled_len(sampling.len(), row_blocks), Block::ZERO);
        {
            let tiles = Disjoint::new(&mut *tiles);
            for (index, span) in sampling.iter().enumerate() {
                let last = span.tokens().end - 1;
                with_row(hidden, |normed| {
                    let x = &b.x[last * hidden..(last + 1) * hidden];
                    let (norm, epsilon) = (&self.weights.output_norm, self.config.norm_epsilon);
                    rmsnorm::rmsnorm(class, x, norm, epsilon, normed).expect(SHAPES_FIT);
                    // SAFETY: one row after another, on this thread.
                    unsafe { quantise::quantise(class, normed, index, &tiles) }.expect(SHAPES_FIT);
                });
            }
        }
        if !sampling.is_empty() {
            let logits = Disjoint::new(grown(&mut b.logits, sampling.len() * vocab, 0.0));
            let out = Output { buffer: logits, stride: vocab, first_column: 0 };
            let product = Product { matrix: head, x: (sampling.len(), tiles), out: &out };
            multiply(&mut self.pool, class, &[product]);
        }
        let mut drawn: Vec<Option<Sampled>> = vec![None; sampling.len()];
        {
            let drawn = Disjoint::new(&mut drawn);
            let logits = &b.logits;
            self.pool.run(sampling.len(), &|index| {
                let logits = &logits[index * vocab..(index + 1) * vocab];
                let settings = sampling[index].row.sampling.as_ref().expect("filtered above");
                // SAFETY: each index is one item.
                let drawn = unsafe { drawn.range_mut(index..index + 1) };
                drawn[0] = Some(sample(logits, settings));
            });
        }
        let mut drawn = drawn.into_iter();
        spans
            .iter()
            .map(|span| match (&span.row.sampling, span.failed) {
                (Some(_), None) => drawn.next().flatten(),
                _ => None,
            })
            .collect()
    }

    fn importance(&self, span: &Span<'_>) -> Importance {
        let count = self.buffers.modes.len();
        let mut importance = Importance::default();
        for sublayer in 0..2 * self.config.layers {
            let (mut similarity, mut scale, mut tokens) = (0.0, 0.0, 0);
            for change in &self.buffers.changes[sublayer * count..][span.tokens()] {
                if !change[0].is_nan() {
                    similarity += change[0];
                    scale += change[1];
                    tokens += 1;
                }
            }
            importance.similarity_sum.push(similarity);
            importance.scale_sum.push(scale);
            importance.tokens.push(tokens);
        }
        importance
    }
}

/// Items of a region over `count` tokens.
fn chunk(item: usize, count: usize) -> Range<usize> {
    item * TOKENS_PER_ITEM..count.min((item + 1) * TOKENS_PER_ITEM)
}

/// Where the change made by the sublayer before `sublayer` is kept; empty when nothing is measured.
fn change_of(sublayer: usize, token: usize, count: usize, changes: usize) -> Range<usize> {
    if changes == 0 || sublayer == 0 {
        return 0..0;
    }
    let at = (sublayer - 1) * count + token;
    at..at + 1
}

/// `x += delta`; notes how much that changed `x` when asked to.
fn settle(pending: Pending, delta: &[f32], x: &mut [f32], change: Option<&mut Change>) {
    if pending.delta == NOWHERE {
        return;
    }
    let delta = &delta[pending.delta * x.len()..(pending.delta + 1) * x.len()];
    if let Some(change) = change {
        *change = compare(x, delta);
    }
    add(x, delta);
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Cosine and norm ratio of `x` and `x + delta`.
fn compare(x: &[f32], delta: &[f32]) -> Change {
    let (mut dot, mut before, mut after) = (0.0, 0.0, 0.0);
    for (&x, &delta) in x.iter().zip(delta) {
        let (a, b) = (f64::from(x), f64::from(x + delta));
        dot += a * b;
        before += a * a;
        after += b * b;
    }
    if before == 0.0 || after == 0.0 {
        return [0.0, 1.0]; // Nothing to compare; a zero row is no reason to skip.
    }
    [dot / (before.sqrt() * after.sqrt()), (after / before).sqrt()]
}

struct Product<'a> {
    matrix: &'a Matrix,
    /// Rows, and their tiles.
    x: (usize, &'a [Block]),
    out: &'a Output<'a>,
}

/// Computes several products of disjoint outputs in one region, cut by output columns.
fn multiply(pool: &mut Pool, class: Class, products: &[Product<'_>]) {
    let groups = |product: &Product<'_>| {
        if product.x.0 == 0 { 0 } else { product.matrix.groups() }
    };
    let total: usize = products.iter().map(groups).sum();
    let per_item = (total / (pool.threads() * ITEMS_PER_THREAD)).max(1);
    let items = |product: &Product<'_>| groups(product).div_ceil(per_item);
    pool.run(products.iter().map(items).sum(), &|mut item| {
        for product in products {
            if item < items(product) {
                let groups = item * per_item..groups(product).min((item + 1) * per_item);
                // SAFETY: products write different columns or buffers, items different groups.
                unsafe {
                    product.matrix.multiply(class, groups, product.x.0, product.x.1, product.out)
                }
                .expect(SHAPES_FIT);
                return;
            }
            item -= items(product);
        }
    });
}
