//! Learns AdaSkip's sets from the calibration text, before the engine serves.

use std::sync::Arc;
use std::time::Duration;

use crate::adaskip::SkipSet;
use crate::adaskip::importance::ImportanceSum;
use crate::adaskip::policy::SkipConfig;
use crate::adaskip::presence::SkipSets;
use crate::batch::{Backend, BackendEvent, Batch, BlockId, Phase, Row, SequenceId};
use crate::cache_client::Doorbell;

use super::StartError;

/// The calibration's own name; those of requests count from 1.
const CALIBRATION: SequenceId = SequenceId(0);
/// A backend that rings no bell in this time is looked at anyway.
const POLL: Duration = Duration::from_millis(100);

/// Runs `text` once, nothing skipped, and chooses by what each sublayer changed. Without sublayers to
/// skip nothing is run.
pub fn skip_sets(
    config: &SkipConfig,
    text: &[u32],
    tokens_max: u32,
    step_tokens_max: u32,
    backend: &mut dyn Backend,
    doorbell: &Doorbell,
) -> Result<SkipSets, StartError> {
    let geometry = backend.geometry();
    let layers = usize::from(geometry.layers);
    for (name, sublayers) in
        [("prefill", config.prefill_sublayers), ("decode", config.decode_sublayers)]
    {
        // The last sublayer of a model that skips all others would compute a bigram.
        if sublayers >= 2 * layers {
            return Err(StartError::Config(format!(
                "adaSkip.{name}.sublayers is {sublayers}, the model has {} sublayers; choose fewer",
                2 * layers
            )));
        }
    }
    if config.is_off() {
        return Ok(SkipSets::exact(layers));
    }
    let pool_tokens = geometry.block_count.saturating_mul(u32::from(geometry.tokens_per_block));
    let text = &text[..text.len().min(tokens_max.min(pool_tokens) as usize)];
    if text.is_empty() {
        return Err(StartError::Config("the calibration text has no tokens".into()));
    }
    let blocks = (text.len() as u32).div_ceil(geometry.tokens_per_block.into());
    let block_table: Vec<BlockId> = (0..blocks).map(BlockId).collect();
    let none = Arc::new(SkipSet::none(layers));
    let mut sum = ImportanceSum::new(layers);
    let mut position = 0;
    for chunk in text.chunks(step_tokens_max as usize) {
        let row = Row {
            sequence: CALIBRATION,
            phase: Phase::Prefill,
            tokens: chunk.to_vec(),
            position,
            block_table: block_table.clone(),
            skip: none.clone(),
            sampling: None,
            measure: true,
            waits: Vec::new(),
        };
        position += chunk.len() as u32;
        backend.submit(Batch { rows: vec![row] });
        let output = loop {
            match backend.poll() {
                Some(BackendEvent::Step(output)) => break output,
                Some(_) => {}
                None => doorbell.wait(POLL),
            }
        };
        output.rows.iter().filter_map(|row| row.importance.as_ref()).for_each(|row| sum.add(row));
    }
    Ok(SkipSets::new(config, &sum.means()))
}
