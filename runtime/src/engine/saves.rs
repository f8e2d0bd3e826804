//! Blocks on their way into frames: begun behind the step that fills them, committed when both the
//! copy and the step are known to be good.

use std::collections::HashMap;
use std::sync::Arc;

use kv_protocol::RootKey;

use crate::adaskip::presence::SkipSets;
use crate::batch::{Backend, BlockId, SaveId, SavePlan, SequenceId, StepId};
use crate::block_pool::{BlockPool, Origin};
use crate::cache_client::{NewBlock, NumericsTag, Variant};
use crate::sequence::Sequence;

use super::cache::Cache;
use super::stats::EngineStats;

/// The labels of what this engine computes.
#[derive(Debug, Clone, Copy)]
pub struct Labels {
    /// Of its prefill set.
    pub own: Variant,
    /// Of its backend.
    pub numerics: NumericsTag,
}

impl Labels {
    /// The label of KV that came to be like this.
    pub fn variant(&self, origin: Origin) -> Variant {
        match origin {
            Origin::Own => self.own,
            Origin::Mixed => Variant::Mixed,
        }
    }

    /// How KV with these labels came to be, seen from this engine.
    pub fn origin(&self, variant: &Variant, numerics: &NumericsTag) -> Origin {
        if *variant == self.own && *numerics == self.numerics { Origin::Own } else { Origin::Mixed }
    }
}

/// One block on its way. It holds its device block, so that nothing is written over it.
#[derive(Debug)]
struct Save<F> {
    sequence: SequenceId,
    block: BlockId,
    frame: F,
    root: RootKey,
    parent: kv_protocol::BlockKey,
    tokens: Vec<u32>,
    variant: Variant,
    /// The step that computes it, while that runs.
    step: Option<StepId>,
    /// Of the copy, when it is done.
    checksums: Option<Arc<[u32]>>,
    /// Not to be committed: its step failed, or its attachment is gone.
    dead: bool,
}

/// All saves of an engine.
#[derive(Debug)]
pub struct Saves<F> {
    under_way: HashMap<SaveId, Save<F>>,
    next: u64,
    /// Counts attachments: blocks stored under an earlier one may be gone.
    pub attachment: u64,
    labels: Labels,
}

/// What a save needs of the engine.
pub struct Ends<'a, C: Cache> {
    /// Copies.
    pub backend: &'a mut dyn Backend,
    /// Takes.
    pub cache: &'a mut C,
    /// Holds.
    pub pool: &'a mut BlockPool,
    /// Which layers are stored, and who reads.
    pub sets: &'a SkipSets,
    /// Counts.
    pub stats: &'a EngineStats,
}

impl<F> Saves<F> {
    /// Nothing under way.
    pub fn new(labels: Labels) -> Self {
        Self { under_way: HashMap::new(), next: 0, attachment: 0, labels }
    }

    /// Whether nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Begins saving the full blocks of `sequence` that end at or before `end` tokens; those beyond
    /// `computed` are filled by `step`. Whether none is left: without a free frame the rest has to wait.
    pub fn save_full<C: Cache<Free = F>>(
        &mut self,
        ends: &mut Ends<'_, C>,
        sequence: &mut Sequence,
        end: u32,
        step: Option<StepId>,
    ) -> bool {
        let size = ends.pool.tokens_per_block();
        while (sequence.saved_blocks + 1) * size <= end {
            let index = sequence.saved_blocks;
            let block = sequence.table[index as usize];
            let filled = (index + 1) * size <= sequence.computed;
            if !(filled && ends.pool.is_stored(block, self.attachment)) {
                let step = if filled { None } else { step };
                // What a running step fills is its own up to the end that `storable_after` gave.
                let origin = if filled {
                    sequence.origin((index + 1) * size)
                } else {
                    ends.origin_ahead(sequence)
                };
                if !self.begin(ends, sequence, index, size, origin, step) {
                    return false;
                }
            }
            sequence.saved_blocks += 1;
        }
        true
    }

    /// Begins saving the first tokens of the block that `end` lies in. Whether that is done with.
    pub fn save_tail<C: Cache<Free = F>>(
        &mut self,
        ends: &mut Ends<'_, C>,
        sequence: &Sequence,
        end: u32,
    ) -> bool {
        let size = ends.pool.tokens_per_block();
        let tokens = end % size;
        let index = end / size;
        tokens == 0
            || ends.pool.is_stored(sequence.table[index as usize], self.attachment)
            || self.begin(ends, sequence, index, tokens, sequence.origin(end), None)
    }

    fn begin<C: Cache<Free = F>>(
        &mut self,
        ends: &mut Ends<'_, C>,
        sequence: &Sequence,
        index: u32,
        tokens: u32,
        origin: Origin,
        step: Option<StepId>,
    ) -> bool {
        let Some((frame, bytes)) = ends.cache.take_frame() else {
            ends.stats.saves.with_label_values(&["no_frame"]).inc();
            return false;
        };
        let start = (index * ends.pool.tokens_per_block()) as usize;
        let block = sequence.table[index as usize];
        ends.pool.retain(block);
        self.next += 1;
        let id = SaveId(self.next);
        ends.backend.save(SavePlan {
            id,
            block,
            frame: bytes,
            present_layers: ends.sets.present_layers.clone(),
        });
        self.under_way.insert(
            id,
            Save {
                sequence: sequence.id,
                block,
                frame,
                root: sequence.start.root_of(index as usize),
                parent: sequence.parent_of(index as usize),
                tokens: sequence.tokens[start..start + tokens as usize].to_vec(),
                variant: self.labels.variant(origin),
                step,
                checksums: None,
                dead: false,
            },
        );
        true
    }

    /// A copy is done.
    pub fn copied<C: Cache<Free = F>>(
        &mut self,
        ends: &mut Ends<'_, C>,
        id: SaveId,
        checksums: Arc<[u32]>,
    ) {
        let Some(save) = self.under_way.get_mut(&id) else { return };
        save.checksums = Some(checksums);
        self.settle(ends, id);
    }

    /// A step is done; `failed` names the sequences whose rows are worth nothing.
    pub fn stepped<C: Cache<Free = F>>(
        &mut self,
        ends: &mut Ends<'_, C>,
        step: StepId,
        failed: &[SequenceId],
    ) {
        let mut waited: Vec<SaveId> = Vec::new();
        for (&id, save) in &mut self.under_way {
            if save.step == Some(step) {
                save.step = None;
                save.dead |= failed.contains(&save.sequence);
                waited.push(id);
            }
        }
        waited.sort_unstable(); // In chain order: a child is not committed before its parent.
        for id in waited {
            self.settle(ends, id);
        }
    }

    /// The attachment is gone, and with it the frames.
    pub fn detached(&mut self) {
        self.under_way.values_mut().for_each(|save| save.dead = true);
    }

    /// Commits what is copied and computed.
    fn settle<C: Cache<Free = F>>(&mut self, ends: &mut Ends<'_, C>, id: SaveId) {
        let ready = |save: &Save<F>| save.step.is_none() && save.checksums.is_some();
        if !self.under_way.get(&id).is_some_and(ready) {
            return;
        }
        let Some(save) = self.under_way.remove(&id) else { return };
        ends.pool.release(save.block);
        let Some(checksums) = save.checksums else { return };
        if save.dead {
            ends.stats.saves.with_label_values(&["dropped"]).inc();
            return;
        }
        let block = NewBlock {
            root: save.root,
            parent: save.parent,
            tokens: save.tokens,
            variant: save.variant,
            numerics: self.labels.numerics,
            checksums,
        };
        if ends.cache.commit(save.frame, block).is_ok() {
            ends.pool.set_stored(save.block, self.attachment);
        } else {
            ends.stats.saves.with_label_values(&["dropped"]).inc();
        }
    }
}

impl<C: Cache> Ends<'_, C> {
    /// How what the next step computes for `sequence` will have come to be, given that it is stored.
    fn origin_ahead(&self, sequence: &Sequence) -> Origin {
        let run = sequence.next_run(self.sets);
        if sequence.own == sequence.computed && *run.skip == *self.sets.prefill {
            Origin::Own
        } else {
            Origin::Mixed
        }
    }
}
