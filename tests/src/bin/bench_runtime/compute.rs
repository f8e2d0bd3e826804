//! Speed of the backend alone: prefill and decode on the real model, no engine, no HTTP.

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use runtime::adaskip::SkipSet;
use runtime::backend::cpu::{CpuBackend, CpuOptions};
use runtime::batch::{
    Backend as _, BackendEvent, Batch, BlockId, Phase, Row, Sampling, SequenceId, StepOutput,
};
use runtime::weights::gguf::Model;

const TOKENS_PER_BLOCK: u16 = 64;
const DEVICE_BYTES: u64 = 256 << 20;
/// A step that takes longer hangs.
const STEP_DURATION_MAX: Duration = Duration::from_mins(2);

/// A backend and its doorbell.
pub struct Compute {
    backend: CpuBackend,
    rung: Receiver<()>,
    layers: usize,
    vocab: usize,
}

impl Compute {
    /// Loads the model on `threads` threads.
    pub fn new(model: &Path, threads: usize) -> anyhow::Result<Self> {
        let model = Model::open(model)?;
        let (ring, rung) = channel();
        let ring = Mutex::new(ring);
        let wake = Arc::new(move || {
            if let Ok(ring) = ring.lock() {
                ring.send(()).unwrap_or(()); // Nobody listens once the measurement is over.
            }
        });
        let options =
            CpuOptions { threads, device_bytes: DEVICE_BYTES, tokens_per_block: TOKENS_PER_BLOCK };
        let backend = CpuBackend::new(&model, options, wake)?;
        Ok(Self { backend, rung, layers: model.config().layers, vocab: model.config().vocab })
    }

    fn step(&mut self, rows: Vec<Row>) -> anyhow::Result<StepOutput> {
        self.backend.submit(Batch { rows });
        loop {
            match self.backend.poll() {
                Some(BackendEvent::Step(output)) => return Ok(output),
                Some(other) => bail!("unexpected event {other:?}"),
                None => self.rung.recv_timeout(STEP_DURATION_MAX).context("a step hangs")?,
            }
        }
    }

    fn row(&self, sequence: u32, position: u32, tokens: Vec<u32>, phase: Phase) -> Row {
        let blocks_per_sequence =
            self.backend.geometry().block_count / super::SEQUENCES.max(1) as u32;
        let first = sequence * blocks_per_sequence;
        Row {
            sequence: SequenceId(u64::from(sequence)),
            phase,
            tokens,
            position,
            block_table: (first..first + blocks_per_sequence).map(BlockId).collect(),
            skip: Arc::new(SkipSet::none(self.layers)),
            sampling: Some(Sampling {
                temperature: 0.0,
                top_p: 1.0,
                top_k: 0,
                min_p: 0.0,
                seed: 0,
                index: 0,
                logprobs: None,
                banned: Arc::new([]),
            }),
            measure: false,
            waits: Vec::new(),
        }
    }

    /// Tokens a second of one prefill step of `tokens` tokens, logits for the last only.
    pub fn prefill(&mut self, tokens: usize) -> anyhow::Result<f64> {
        let prompt = super::prompt(tokens, self.vocab);
        let row = self.row(0, 0, prompt, Phase::Prefill);
        let start = Instant::now();
        self.step(vec![row])?;
        Ok(tokens as f64 / start.elapsed().as_secs_f64())
    }

    /// Tokens a second, all sequences together, decoding `steps` tokens each after `context`.
    pub fn decode(&mut self, batch: u32, context: usize, steps: u32) -> anyhow::Result<f64> {
        let mut last = Vec::new();
        for sequence in 0..batch {
            let prompt = super::prompt(context, self.vocab);
            let row = self.row(sequence, 0, prompt, Phase::Prefill);
            let output = self.step(vec![row])?;
            last.push(output.rows[0].token.context("prefill samples")?.token);
        }
        let start = Instant::now();
        for index in 0..steps {
            let rows = (0..batch)
                .zip(&last)
                .map(|(sequence, &token)| {
                    self.row(sequence, context as u32 + index, vec![token], Phase::Decode)
                })
                .collect();
            let output = self.step(rows)?;
            for (last, row) in last.iter_mut().zip(&output.rows) {
                *last = row.token.context("decode samples")?.token;
            }
        }
        Ok(f64::from(batch * steps) / start.elapsed().as_secs_f64())
    }
}
