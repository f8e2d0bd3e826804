//! A backend that computes a toy model, exactly: each token's KV is a hash of everything before it,
//! read from the blocks that the row names. One wrong table, one block overwritten too early, one
//! frame mixed up, and the next token is another one.
//!
//! It also checks every batch against what the engine promises (`batch.rs`, compute's rules).

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::batch::{
    Backend, BackendEvent, Batch, BlockId, DeviceGeometry, Importance, LoadBlock, LoadId, LoadPlan,
    Phase, Row, RowOutput, SaveId, SavePlan, SequenceId, StepId, StepOutput, TokenLogprob,
};

pub const VOCABULARY: u32 = 50;
pub const LAYERS: u16 = 3;
pub const TOKENS_PER_BLOCK: u16 = 4;
/// A token of compute on the rig's clock.
const TOKEN_TIME: Duration = Duration::from_millis(1);

/// What a test turns while the engine runs.
#[derive(Debug, Default)]
pub struct Knobs {
    /// Loads arrive only after this is false again.
    pub loads_held: bool,
    /// Saves are reported before the step that they follow.
    pub saves_first: bool,
    /// Steps with rows so far.
    pub steps: u64,
    /// Most rows and most tokens in a step so far.
    pub rows_max: usize,
    pub tokens_max: usize,
    /// Rows that waited for a load, so far.
    pub waiting_rows: u64,
    /// Order in which sequences had their first row.
    pub first_rows: Vec<SequenceId>,
}

enum Work {
    Step(StepId, Batch),
    Save(SavePlan),
}

pub struct ToyBackend {
    geometry: DeviceGeometry,
    pool: Vec<u8>,
    work: VecDeque<Work>,
    loads: VecDeque<LoadPlan>,
    /// Loads that ended badly, while rows may still name them.
    failed: HashSet<LoadId>,
    known: HashSet<LoadId>,
    events: VecDeque<BackendEvent>,
    knobs: Arc<Mutex<Knobs>>,
    clock: Arc<AtomicU64>,
    next_step: u64,
    /// Skip decisions of one row, to compare repeated computations of a position.
    seen: HashMap<SequenceId, u64>,
}

fn hash(parts: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

impl ToyBackend {
    pub fn new(block_count: u32, knobs: Arc<Mutex<Knobs>>, clock: Arc<AtomicU64>) -> Self {
        let geometry = DeviceGeometry {
            layers: LAYERS,
            kv_heads: 1,
            head_dim: 4,
            tokens_per_block: TOKENS_PER_BLOCK,
            block_count,
        };
        let bytes = geometry.row_bytes() * usize::from(LAYERS) * block_count as usize;
        Self {
            geometry,
            pool: vec![0xA5; bytes],
            work: VecDeque::new(),
            loads: VecDeque::new(),
            failed: HashSet::new(),
            known: HashSet::new(),
            events: VecDeque::new(),
            knobs,
            clock,
            next_step: 0,
            seen: HashMap::new(),
        }
    }

    fn row_at(&self, layer: u16, block: BlockId) -> usize {
        let rows = usize::from(layer) * self.geometry.block_count as usize + block.0 as usize;
        rows * self.geometry.row_bytes()
    }

    fn slot(&self, layer: usize, table: &[BlockId], position: u32) -> (usize, usize) {
        let size = u32::from(TOKENS_PER_BLOCK);
        let row = self.row_at(layer as u16, table[(position / size) as usize]);
        let k = row + 8 * (position % size) as usize;
        (k, k + 8 * size as usize)
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.pool[at..at + 8].try_into().unwrap())
    }

    /// One token through the toy model; its final state.
    fn forward(&mut self, row: &Row, offset: usize) -> u64 {
        let position = row.position + offset as u32;
        let mut x = hash((row.tokens[offset], position));
        for layer in 0..usize::from(LAYERS) {
            let scale = |sublayer: usize| row.skip.scale[sublayer].to_bits();
            if !row.skip.attention[layer] || row.skip.backfill[layer] {
                let (k, v) = self.slot(layer, &row.block_table, position);
                let kv = hash((x, layer, "kv"));
                self.pool[k..k + 8].copy_from_slice(&kv.to_le_bytes());
                self.pool[v..v + 8].copy_from_slice(&(!kv).to_le_bytes());
            }
            x = if row.skip.attention[layer] {
                hash((x, scale(2 * layer), "no attention"))
            } else {
                let history: Vec<u64> = (0..=position)
                    .map(|at| {
                        let (k, v) = self.slot(layer, &row.block_table, at);
                        assert_eq!(
                            self.word(k),
                            !self.word(v),
                            "slot {at} of layer {layer} is torn"
                        );
                        self.word(k)
                    })
                    .collect();
                hash((x, history))
            };
            x = if row.skip.ffn[layer] {
                hash((x, scale(2 * layer + 1), "no ffn"))
            } else {
                hash((x, "ffn"))
            };
        }
        x
    }

    /// Sublayers get less similar towards the middle; every FFN is more similar in decode.
    fn importance(row: &Row) -> Importance {
        let tokens = row.tokens.len() as u64;
        let decode = if row.phase == Phase::Decode { 0.05 } else { 0.0 };
        let mut importance = Importance::default();
        for sublayer in 0..2 * usize::from(LAYERS) {
            let runs = !row.skip.skips(sublayer);
            let similarity = [0.95, 0.6, 0.7, 0.92, 0.97, 0.9][sublayer]
                + if sublayer % 2 == 1 { decode } else { 0.0 };
            let counted = if runs { tokens } else { 0 };
            importance.similarity_sum.push(similarity * counted as f64);
            importance.scale_sum.push((1.0 + 0.01 * sublayer as f64) * counted as f64);
            importance.tokens.push(counted);
        }
        importance
    }

    fn check(&self, batch: &Batch) {
        let size = u32::from(TOKENS_PER_BLOCK);
        let mut rows: HashMap<SequenceId, &Row> = HashMap::new();
        for row in &batch.rows {
            assert!(rows.insert(row.sequence, row).is_none(), "{:?} has two rows", row.sequence);
            assert!(!row.tokens.is_empty(), "an empty row");
            assert!(row.phase == Phase::Prefill || row.tokens.len() == 1, "decode of many tokens");
            let end = row.position + row.tokens.len() as u32;
            assert!(row.block_table.len() as u32 * size >= end, "a table that is too short");
            let written = &row.block_table[(row.position / size) as usize..];
            for other in batch.rows.iter().filter(|other| other.sequence != row.sequence) {
                let shared = written.iter().find(|block| other.block_table.contains(block));
                assert_eq!(shared, None, "written by one row, named by another");
            }
            for load in &self.loads {
                let named = load.blocks.iter().any(|to| row.block_table.contains(&to.block));
                assert!(!named || row.waits.contains(&load.id), "reads a block being loaded");
            }
            for load in &row.waits {
                assert!(self.known.contains(load), "waits for a load that was never started");
            }
        }
    }

    fn do_loads(&mut self) {
        while let Some(plan) = self.loads.pop_front() {
            let bytes = self.geometry.row_bytes();
            let checksums = |to: &LoadBlock| to.frame.checksums().expect("a toy frame is kept");
            let checksums: Vec<Vec<u32>> = plan.blocks.iter().map(checksums).collect();
            let mut good = true;
            for (row, &layer) in plan.present_layers.iter().enumerate() {
                for (to, checksums) in plan.blocks.iter().zip(&checksums) {
                    let mut copy = vec![0; bytes];
                    to.frame.read(row * bytes, &mut copy);
                    good &= crc32c::crc32c(&copy) == checksums[row];
                    let at = self.row_at(layer, to.block);
                    self.pool[at..at + bytes].copy_from_slice(&copy);
                }
            }
            self.events.push_back(if good {
                BackendEvent::Loaded(plan.id)
            } else {
                self.failed.insert(plan.id);
                BackendEvent::LoadFailed(plan.id)
            });
        }
    }

    fn do_step(&mut self, step: StepId, batch: &Batch) {
        let mut tokens = 0;
        let mut rows = Vec::new();
        for row in &batch.rows {
            tokens += row.tokens.len();
            let failed_load = row.waits.iter().copied().find(|load| self.failed.contains(load));
            let mut x = 0;
            if failed_load.is_none() {
                for offset in 0..row.tokens.len() {
                    x = self.forward(row, offset);
                }
            }
            let token = TokenLogprob { token: (x % u64::from(VOCABULARY)) as u32, logprob: -1.0 };
            rows.push(RowOutput {
                sequence: row.sequence,
                token: row.sampling.as_ref().map(|_| token),
                alternatives: Vec::new(),
                importance: row.measure.then(|| Self::importance(row)),
                failed_load,
            });
        }
        let compute = TOKEN_TIME * tokens as u32;
        self.clock.fetch_add(compute.as_nanos() as u64, Ordering::Relaxed);
        let output = StepOutput { step, rows, compute, load_wait: Duration::ZERO };
        self.events.push_back(BackendEvent::Step(output));
    }

    fn do_save(&mut self, plan: &SavePlan) -> (SaveId, Arc<[u32]>) {
        let bytes = self.geometry.row_bytes();
        let checksums = plan.present_layers.iter().enumerate().map(|(row, &layer)| {
            let at = self.row_at(layer, plan.block);
            plan.frame.write(row * bytes, &self.pool[at..at + bytes]);
            crc32c::crc32c(&self.pool[at..at + bytes])
        });
        (plan.id, checksums.collect())
    }
}

impl Backend for ToyBackend {
    fn geometry(&self) -> DeviceGeometry {
        self.geometry
    }

    fn submit(&mut self, batch: Batch) -> StepId {
        self.check(&batch);
        let mut knobs = self.knobs.lock().unwrap();
        knobs.steps += 1;
        knobs.rows_max = knobs.rows_max.max(batch.rows.len());
        let tokens = batch.rows.iter().map(|row| row.tokens.len()).sum();
        knobs.tokens_max = knobs.tokens_max.max(tokens);
        for row in &batch.rows {
            knobs.waiting_rows += u64::from(!row.waits.is_empty());
            if self.seen.insert(row.sequence, 1).is_none() {
                knobs.first_rows.push(row.sequence);
            }
        }
        drop(knobs);
        self.next_step += 1;
        self.work.push_back(Work::Step(StepId(self.next_step), batch));
        StepId(self.next_step)
    }

    fn load(&mut self, plan: LoadPlan) {
        for to in &plan.blocks {
            let named = self.work.iter().any(|work| match work {
                Work::Step(_, batch) => {
                    batch.rows.iter().any(|row| row.block_table.contains(&to.block))
                }
                Work::Save(save) => save.block == to.block,
            });
            assert!(!named, "a load into a block that a step or a save still names");
        }
        self.known.insert(plan.id);
        self.loads.push_back(plan);
    }

    fn save(&mut self, plan: SavePlan) {
        self.work.push_back(Work::Save(plan));
    }

    fn poll(&mut self) -> Option<BackendEvent> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        let knobs = self.knobs.lock().unwrap();
        let (held, saves_first) = (knobs.loads_held, knobs.saves_first);
        drop(knobs);
        if !held {
            self.do_loads();
        }
        let waits = |row: &Row, loads: &VecDeque<LoadPlan>| {
            row.waits.iter().any(|id| loads.iter().any(|load| load.id == *id))
        };
        let mut steps = Vec::new();
        while let Some(work) = self.work.pop_front() {
            match work {
                Work::Step(_, ref batch)
                    if batch.rows.iter().any(|row| waits(row, &self.loads)) =>
                {
                    self.work.push_front(work);
                    break;
                }
                Work::Step(step, batch) => {
                    self.do_step(step, &batch);
                    if saves_first {
                        steps.extend(self.events.pop_back());
                    }
                }
                Work::Save(plan) => {
                    let (id, checksums) = self.do_save(&plan);
                    self.events.push_back(BackendEvent::Saved(id, checksums));
                }
            }
        }
        self.events.extend(steps);
        self.events.pop_front()
    }
}
