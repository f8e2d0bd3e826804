//! Speed of the backend alone: prefill and decode on the real model, no engine, no HTTP.

use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use colloquy_tests::stepping::Stepping;
use runtime::backend::cpu::CpuOptions;
use runtime::batch::{BlockId, Phase, Row};
use runtime::weights::gguf::Model;

const TOKENS_PER_BLOCK: u16 = 64;
const DEVICE_BYTES: u64 = 256 << 20;

/// A backend whose blocks are dealt to [`super::SEQUENCES`] sequences.
pub struct Compute {
    backend: Stepping,
    vocab: usize,
}

impl Compute {
    /// Loads the model on `threads` threads.
    pub fn new(model: &Path, threads: usize) -> anyhow::Result<Self> {
        let model = Model::open(model)?;
        let options =
            CpuOptions { threads, device_bytes: DEVICE_BYTES, tokens_per_block: TOKENS_PER_BLOCK };
        Ok(Self { backend: Stepping::new(&model, options)?, vocab: model.config().vocab })
    }

    fn row(&self, sequence: u32, position: u32, tokens: Vec<u32>, phase: Phase) -> Row {
        let blocks_per_sequence = self.backend.block_count() / super::SEQUENCES.max(1) as u32;
        let first = sequence * blocks_per_sequence;
        let table = (first..first + blocks_per_sequence).map(BlockId).collect();
        self.backend.row(sequence.into(), phase, position, tokens, table, None)
    }

    /// Tokens a second of one prefill step of `tokens` tokens, logits for the last only.
    pub fn prefill(&mut self, tokens: usize) -> anyhow::Result<f64> {
        let prompt = super::prompt(tokens, self.vocab);
        let row = self.row(0, 0, prompt, Phase::Prefill);
        let start = Instant::now();
        self.backend.step(vec![row])?;
        Ok(tokens as f64 / start.elapsed().as_secs_f64())
    }

    /// Tokens a second, all sequences together, decoding `steps` tokens each after `context`.
    pub fn decode(&mut self, batch: u32, context: usize, steps: u32) -> anyhow::Result<f64> {
        let mut last = Vec::new();
        for sequence in 0..batch {
            let prompt = super::prompt(context, self.vocab);
            let row = self.row(sequence, 0, prompt, Phase::Prefill);
            let output = self.backend.step(vec![row])?;
            last.push(output[0].token.context("prefill samples")?.token);
        }
        let start = Instant::now();
        for index in 0..steps {
            let rows = (0..batch)
                .zip(&last)
                .map(|(sequence, &token)| {
                    self.row(sequence, context as u32 + index, vec![token], Phase::Decode)
                })
                .collect();
            let output = self.backend.step(rows)?;
            for (last, row) in last.iter_mut().zip(&output) {
                *last = row.token.context("decode samples")?.token;
            }
        }
        Ok(f64::from(batch * steps) / start.elapsed().as_secs_f64())
    }
}
