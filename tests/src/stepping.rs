//! A backend without an engine: benchmarks say which rows run, and on which blocks.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, bail};
use runtime::adaskip::SkipSet;
use runtime::backend::cpu::{CpuBackend, CpuOptions};
use runtime::batch::{
    Backend as _, BackendEvent, Batch, BlockId, Phase, Row, RowOutput, Sampling, SequenceId,
};
use runtime::weights::gguf::Model;

/// A step that takes longer hangs.
const STEP_DURATION_MAX: Duration = Duration::from_mins(2);

/// A CPU backend and its doorbell.
pub struct Stepping {
    backend: CpuBackend,
    rung: Receiver<()>,
    layers: usize,
}

impl Stepping {
    /// Over a model's weights.
    pub fn new(model: &Model, options: CpuOptions) -> anyhow::Result<Self> {
        let (ring, rung) = channel();
        let ring = Mutex::new(ring);
        let wake = Arc::new(move || {
            if let Ok(ring) = ring.lock() {
                ring.send(()).unwrap_or(()); // Nobody listens once the measurement is over.
            }
        });
        let backend = CpuBackend::new(model, options, wake)?;
        Ok(Self { backend, rung, layers: model.config().layers })
    }

    /// Device blocks.
    pub fn block_count(&self) -> u32 {
        self.backend.geometry().block_count
    }

    /// A row whose likeliest next token is drawn, and of which so many alternatives are reported.
    pub fn row(
        &self,
        sequence: u64,
        phase: Phase,
        position: u32,
        tokens: Vec<u32>,
        block_table: Vec<BlockId>,
        logprobs: Option<u8>,
    ) -> Row {
        Row {
            sequence: SequenceId(sequence),
            phase,
            tokens,
            position,
            block_table,
            skip: Arc::new(SkipSet::none(self.layers)),
            sampling: Some(Sampling {
                temperature: 0.0,
                top_p: 1.0,
                top_k: 0,
                min_p: 0.0,
                seed: 0,
                index: 0,
                logprobs,
                banned: Arc::new([]),
            }),
            measure: false,
            waits: Vec::new(),
        }
    }

    /// Runs a step to its end.
    pub fn step(&mut self, rows: Vec<Row>) -> anyhow::Result<Vec<RowOutput>> {
        self.backend.submit(Batch { rows });
        loop {
            match self.backend.poll() {
                Some(BackendEvent::Step(output)) => return Ok(output.rows),
                Some(other) => bail!("unexpected event {other:?}"),
                None => self.rung.recv_timeout(STEP_DURATION_MAX).context("a step hangs")?,
            }
        }
    }
}
