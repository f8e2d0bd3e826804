//! The CPU backend: a compute thread with its pool, a copier thread, and this handle of the engine's.
//!
//! ```text
//! engine ── submit ─► compute thread ── layer i: QKV ─ wait gate(i) ─ store K,V ─ attention ─ FFN
//!        ── load ──► copier ──────────── layer 0 … opens gate 0, layer 1 … opens gate 1, …
//!        ── save ──► copier ──────────── row i as soon as layer i is computed
//!        ◄── poll ── events (each followed by `wake`)
//! ```
//!
//! What the engine keeps to, beyond `batch.rs`: a load is given before the first step that waits
//! for it; blocks being loaded are named only by rows that wait for the load; a load does not name
//! blocks of a step that is still running. A step may write to a block that is being saved: it waits
//! for that save, layer by layer.

mod copier;
mod forward;
mod gate;
mod packed;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use kernels::paged_attention::{AllocateError, KvBlocks, KvShape};
use kernels::pool::Pool;
use kernels::rope::Table;
use kernels::{Class, LaunchError};

pub use copier::{NoProbe, Probe};

use crate::batch::{
    Backend, BackendEvent, Batch, BlockId, DeviceGeometry, LoadId, LoadPlan, SaveId, SavePlan,
    StepId,
};
use crate::model::ROPE_FACTORS;
use crate::weights::gguf::Model;
use copier::{Copier, Queue};
use forward::{Compute, Work};
use gate::Gate;

/// Names the arithmetic. Instruction class and thread count are not in it: the kernels' tests show
/// that they change no bit. Counts up when any kernel's order of operations changes.
const NUMERICS: &str = "cpu f32 q8-activations kernels 1";

/// Digest of how this backend computes: KV computed under another tag may differ in bits.
pub fn numerics_tag() -> u64 {
    let digest = blake3::hash(NUMERICS.as_bytes());
    let (first, _) = digest.as_bytes().split_at(8);
    u64::from_le_bytes(first.try_into().expect("eight bytes"))
}

/// Name of the instruction class that the kernels run with on this CPU.
pub fn instruction_class() -> &'static str {
    Class::detect().name()
}

/// Settings of the backend.
#[derive(Debug, Clone, Copy)]
pub struct CpuOptions {
    /// Threads that compute; 0 takes one a core.
    pub threads: usize,
    /// Bytes of the device pool.
    pub device_bytes: u64,
    /// Tokens a block; a multiple of 16.
    pub tokens_per_block: u16,
}

/// Why the backend cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpuBackendError {
    /// Not one block fits.
    #[error(
        "the device pool of {device_bytes} bytes holds no block of {block_bytes} bytes; raise \
         runtime.deviceMemory (--device-bytes)"
    )]
    PoolTooSmall {
        /// Configured.
        device_bytes: u64,
        /// One block, all layers.
        block_bytes: u64,
    },
    /// Attention tiles do not divide a block.
    #[error("{tokens_per_block} tokens a block; expected a multiple of 16, at least 16")]
    TokensPerBlock {
        /// Configured.
        tokens_per_block: u16,
    },
    /// The pool's memory could not be had.
    #[error(transparent)]
    Allocate(#[from] AllocateError),
    /// The model's sizes do not fit the kernels.
    #[error("the model does not fit the kernels: {0}")]
    Shape(#[from] LaunchError),
    /// A thread could not be started.
    #[error("cannot start a compute thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Blocks cannot outnumber their ids.
const BLOCKS_MAX: u64 = u32::MAX as u64;

/// The engine's end.
pub struct CpuBackend {
    geometry: DeviceGeometry,
    steps: u64,
    work: Option<Sender<Work>>,
    queue: Arc<Queue>,
    events: Receiver<BackendEvent>,
    loads: HashMap<LoadId, Arc<Gate>>,
    saves: HashMap<SaveId, (BlockId, Arc<Gate>)>,
    compute: Option<JoinHandle<()>>,
    copier: Option<JoinHandle<()>>,
}

impl CpuBackend {
    /// Packs the weights and starts the threads. `wake` is called after each event is ready.
    pub fn new(
        model: &Model,
        options: CpuOptions,
        wake: Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Self, CpuBackendError> {
        Self::with_probe(model, options, wake, Arc::new(NoProbe))
    }

    /// As [`CpuBackend::new`], with a [`Probe`] that sees (and may hold back) what happens.
    pub fn with_probe(
        model: &Model,
        options: CpuOptions,
        wake: Arc<dyn Fn() + Send + Sync>,
        probe: Arc<dyn Probe>,
    ) -> Result<Self, CpuBackendError> {
        let config = model.config();
        let geometry = geometry(model, options)?;
        let blocks = Arc::new(KvBlocks::new(
            config.layers,
            geometry.block_count as usize,
            KvShape {
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                tokens_per_block: usize::from(options.tokens_per_block),
            },
        )?);
        let pool_tokens = geometry.block_count as usize * usize::from(options.tokens_per_block);
        let factors = model.tensor(ROPE_FACTORS).and_then(|tensor| tensor.floats());
        let rope = Table::new(
            config.head_dim,
            config.rope_theta,
            factors.as_deref(),
            config.context_max.min(pool_tokens),
        )?;
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, Into::into),
            threads => threads,
        };
        let (work, work_in) = channel();
        let (events_out, events) = channel();
        let queue = Arc::new(Queue::default());
        let compute = Compute::new(
            config.clone(),
            packed::Weights::pack(model)?,
            rope,
            Arc::clone(&blocks),
            Pool::new(threads)?,
            Class::detect(),
        );
        let copier = Copier {
            queue: Arc::clone(&queue),
            blocks,
            layers: config.layers,
            events: events_out.clone(),
            wake: Arc::clone(&wake),
            probe: Arc::clone(&probe),
        };
        let ends = forward::Ends {
            work: work_in,
            queue: Arc::clone(&queue),
            events: events_out,
            wake,
            probe,
        };
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(body)
        };
        let mut backend = Self {
            geometry,
            steps: 0,
            work: Some(work),
            queue,
            events,
            loads: HashMap::new(),
            saves: HashMap::new(),
            compute: None,
            copier: None,
        };
        backend.compute = Some(spawn("compute-0", Box::new(move || compute.run(ends)))?);
        backend.copier = Some(spawn("copier", Box::new(move || copier.run()))?);
        Ok(backend)
    }

    fn assert_threads_live(&self) {
        for thread in [&self.compute, &self.copier].into_iter().flatten() {
            assert!(!thread.is_finished(), "a thread of the backend has panicked");
        }
    }

    /// Gates of saves whose blocks the batch writes to.
    fn saves_of_written_blocks(&self, batch: &Batch) -> Vec<Arc<Gate>> {
        if self.saves.is_empty() {
            return Vec::new();
        }
        let tokens_per_block = usize::from(self.geometry.tokens_per_block);
        let is_written = |block: BlockId| {
            batch.rows.iter().any(|row| {
                let first = row.position as usize / tokens_per_block;
                let last = (row.position as usize + row.tokens.len() - 1) / tokens_per_block;
                row.block_table[first..=last].contains(&block)
            })
        };
        let saves = self.saves.values().filter(|(block, _)| is_written(*block));
        saves.map(|(_, gate)| Arc::clone(gate)).collect()
    }
}

fn geometry(model: &Model, options: CpuOptions) -> Result<DeviceGeometry, CpuBackendError> {
    let config = model.config();
    let tokens_per_block = options.tokens_per_block;
    if tokens_per_block == 0 || !tokens_per_block.is_multiple_of(16) {
        return Err(CpuBackendError::TokensPerBlock { tokens_per_block });
    }
    let mut geometry = DeviceGeometry {
        layers: config.layers as u16,
        kv_heads: config.kv_heads as u16,
        head_dim: config.head_dim as u16,
        tokens_per_block,
        block_count: 0,
    };
    let block_bytes = geometry.row_bytes() as u64 * config.layers as u64;
    let device_bytes = options.device_bytes;
    geometry.block_count = (device_bytes / block_bytes).min(BLOCKS_MAX) as u32;
    if geometry.block_count == 0 {
        return Err(CpuBackendError::PoolTooSmall { device_bytes, block_bytes });
    }
    Ok(geometry)
}

impl Backend for CpuBackend {
    fn geometry(&self) -> DeviceGeometry {
        self.geometry
    }

    fn submit(&mut self, batch: Batch) -> StepId {
        self.assert_threads_live();
        let step = StepId(self.steps);
        self.steps += 1;
        // A load that is not here any more has arrived, and the engine knows.
        let waits = batch
            .rows
            .iter()
            .map(|row| {
                let gate = |id: &LoadId| Some((*id, Arc::clone(self.loads.get(id)?)));
                row.waits.iter().filter_map(gate).collect()
            })
            .collect();
        let saves = self.saves_of_written_blocks(&batch);
        let work = self.work.as_ref().expect("the backend is not being dropped");
        work.send(Work { step, batch, waits, saves }).expect("the compute thread lives");
        step
    }

    fn load(&mut self, plan: LoadPlan) {
        let gate = Arc::new(Gate::default());
        assert!(plan.present_layers.is_sorted());
        assert!(plan.present_layers.last().is_none_or(|&layer| layer < self.geometry.layers));
        let previous = self.loads.insert(plan.id, Arc::clone(&gate));
        assert!(previous.is_none(), "load {:?} was given twice", plan.id);
        self.queue.load(plan, gate);
    }

    fn save(&mut self, plan: SavePlan) {
        let gate = Arc::new(Gate::default());
        assert!(!plan.present_layers.is_empty());
        assert!(plan.present_layers.is_sorted());
        assert!(plan.present_layers.last().is_some_and(|&layer| layer < self.geometry.layers));
        let previous = self.saves.insert(plan.id, (plan.block, Arc::clone(&gate)));
        assert!(previous.is_none(), "save {:?} was given twice", plan.id);
        self.queue.save(plan, self.steps, gate);
    }

    fn poll(&mut self) -> Option<BackendEvent> {
        let Ok(event) = self.events.try_recv() else {
            self.assert_threads_live();
            return None;
        };
        match &event {
            BackendEvent::Loaded(id) | BackendEvent::LoadFailed(id) => {
                self.loads.remove(id);
            }
            BackendEvent::Saved(id, _) => {
                self.saves.remove(id);
            }
            BackendEvent::Step(_) => {}
        }
        Some(event)
    }
}

impl Drop for CpuBackend {
    fn drop(&mut self) {
        // 1. No more steps; the one in work may still need the copier. 2. The copier.
        drop(self.work.take());
        if let Some(compute) = self.compute.take() {
            drop(compute.join());
        }
        self.queue.stop();
        if let Some(copier) = self.copier.take() {
            drop(copier.join());
        }
    }
}
