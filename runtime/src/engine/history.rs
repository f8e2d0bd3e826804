//! Histories on their way: what was asked of the cache for a waiting sequence, and the loads that
//! bring it into device blocks.
//!
//! ```text
//! enqueue ─hint──► near the front ─lookup──► Found ──(on disk)──► Promoted or the deadline ──► Open
//!                                     └───────────────────────────────────────────────────────► Open
//! ```
//!
//! The wait for promotes is bounded by the time that computing takes (design invariant 4): a daemon
//! that is slow, dead or gone costs that time at most, and no step ever waits for it. Where the disk is known to
//! take longer than that, there is no wait: the promote goes on for the next turn's sake.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::account::Withheld;
use crate::adaskip::policy::Reuse;
use crate::batch::{BlockId, LoadBlock, LoadId, LoadPlan, SequenceId};
use crate::block_pool::Origin;
use crate::cache_client::{Accept, CachedBlock, Hint, MissReason, SequenceTag, Start, Tier};
use crate::overlap::Rates;
use crate::request::CachedTokens;
use crate::scheduler::State;
use crate::sequence::{Accounting, Gate, Offer, Offered, Placement, Sequence};

use super::cache::{Cache, Wanted};
use super::saves::Labels;
use super::{Engine, Flight};

/// Waiting sequences whose places are told again when the queue moves; those behind it have time.
const HINTS_AGAIN_MAX: usize = 32;

/// What was asked for one waiting sequence.
#[derive(Debug)]
pub struct Ask {
    sequence: SequenceId,
    /// What was found, by place.
    blocks: Vec<CachedBlock>,
    /// Blocks on their way from disk; not known before the first answer.
    on_disk: Option<u32>,
    /// Of those, the tokens that are waited for, and since when.
    awaited: Option<(u32, Duration)>,
}

/// A load under way. It holds its blocks, and the pins of its frames.
#[derive(Debug)]
pub struct Load {
    sequence: SequenceId,
    /// Full blocks with their place in the chain, and the tail's with none.
    blocks: Vec<(BlockId, Option<u32>)>,
    origins: Vec<Origin>,
    _pins: Vec<CachedBlock>,
    tokens: u32,
    started: Duration,
}

/// All asks and loads of an engine.
#[derive(Debug, Default)]
pub struct Histories {
    asks: HashMap<SequenceTag, Ask>,
    tags: HashMap<SequenceId, SequenceTag>,
    loads: HashMap<LoadId, Load>,
    next_tag: u64,
}

impl Histories {
    /// Whether copies are under way.
    pub fn is_loading(&self) -> bool {
        !self.loads.is_empty()
    }

    /// A name for one turn's talk with the cache.
    pub fn new_tag(&mut self) -> SequenceTag {
        self.next_tag += 1;
        SequenceTag(self.next_tag)
    }
}

impl<C: Cache> Engine<C> {
    /// Tells the cache that a sequence waits. To be followed by a lookup when it is near the front. Its turn may
    /// have been `anticipated`.
    pub(super) fn announce(&mut self, id: SequenceId, anticipated: Option<SequenceTag>) {
        let Some(cache) = &mut self.cache else { return };
        let place = self.state.waiting.partition_point(|other| other.id < id);
        let Some(sequence) = self.state.waiting.get(place) else { return };
        let tokens = sequence.reusable(&self.state.sets);
        if anticipated.is_some() {
            self.stats.anticipations.with_label_values(&["came"]).inc();
        }
        if sequence.id != id || tokens == 0 || sequence.shuns_frames {
            if let Some(tag) = anticipated {
                cache.end(tag);
            }
            return;
        }
        let tokens = Arc::from(&sequence.tokens[..tokens as usize]);
        let wanted = wanted(&self.state, &self.labels, sequence.start.clone(), tokens);
        let tag = anticipated.unwrap_or_else(|| self.histories.new_tag());
        let hint = expected_start(&self.state, &self.rates, place);
        cache.enqueue(tag, wanted, hint);
        self.histories.tags.insert(id, tag);
        let ask = Ask { sequence: id, blocks: Vec::new(), on_disk: None, awaited: None };
        self.histories.asks.insert(tag, ask);
    }

    /// Tells the cache of sequences whose chain is another one by now. Whether there was one.
    pub(super) fn announce_renamed(&mut self) -> bool {
        let renamed = std::mem::take(&mut self.state.renamed);
        for &id in &renamed {
            self.stats.truncated.with_label_values(&["anew"]).inc();
            self.forget_ask(id);
            self.announce(id, None);
        }
        !renamed.is_empty()
    }

    /// Tells the cache where the first waiting sequences stand now.
    pub(super) fn hint_again(&mut self) {
        let Some(cache) = &mut self.cache else { return };
        for place in 0..self.state.waiting.len().min(HINTS_AGAIN_MAX) {
            if let Some(tag) = self.histories.tags.get(&self.state.waiting[place].id) {
                cache.hint(*tag, expected_start(&self.state, &self.rates, place));
            }
        }
    }

    /// Asks the cache for the sequences near the front, and opens the gate of those that need not, or
    /// may no longer, wait for it.
    pub(super) fn ask_cache(&mut self) {
        let now = (self.clock)();
        let State { waiting, pool, sets, limits, .. } = &mut self.state;
        for sequence in waiting.iter_mut().take(limits.sequences_max) {
            match sequence.gate {
                Gate::Asked { until } if now >= until => {
                    let tag = self.histories.tags.get(&sequence.id);
                    let mut ask = tag.and_then(|tag| self.histories.asks.get_mut(tag));
                    let on_disk = ask.as_ref().and_then(|ask| ask.on_disk);
                    let tokens =
                        on_disk.map_or(u32::MAX, |blocks| blocks * pool.tokens_per_block());
                    sequence.withheld = Some(Withheld { reason: MissReason::Late, tokens });
                    sequence.gate = Gate::Open;
                    if let Some((tokens, since)) = ask.as_mut().and_then(|ask| ask.awaited.take()) {
                        self.rates.observe_late_promote(tokens, now.saturating_sub(since));
                    }
                }
                Gate::Unasked => {
                    sequence.gate = Gate::Open;
                    let Some(cache) = self.cache.as_mut().filter(|cache| cache.is_attached())
                    else {
                        sequence.miss = Some(MissReason::Detached);
                        continue;
                    };
                    let Some(tag) = self.histories.tags.get(&sequence.id) else { continue };
                    let wanted = sequence.reusable(sets);
                    let full = (wanted / pool.tokens_per_block()) as usize;
                    let here = pool.prefix_len(&sequence.keys[..full]);
                    let start = here * pool.tokens_per_block() as usize;
                    let tail = pool.tail_len(
                        &sequence.parent_of(here),
                        &sequence.tokens[start..wanted as usize],
                    );
                    let missing = wanted - start as u32 - tail;
                    if missing > 0 && cache.lookup(*tag).is_ok() {
                        let until = now + self.rates.promote_wait_max(missing);
                        sequence.gate = Gate::Asked { until };
                    }
                }
                Gate::Asked { .. } | Gate::Open | Gate::Placed { .. } => {}
            }
        }
    }

    /// The first deadline of a sequence that waits for the cache.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        let until = |sequence: &Sequence| match sequence.gate {
            Gate::Asked { until } => Some(until),
            _ => None,
        };
        self.state.waiting.iter().filter_map(until).min()
    }

    /// The cache has found blocks; `on_disk` others are on their way, and are waited for if they can be here
    /// before they could be computed. `miss` says why the chain ends.
    pub(super) fn found(
        &mut self,
        tag: SequenceTag,
        blocks: Vec<CachedBlock>,
        on_disk: u32,
        miss: Option<MissReason>,
    ) {
        let now = (self.clock)();
        let tokens = on_disk * self.state.pool.tokens_per_block();
        let Some(ask) = self.histories.asks.get_mut(&tag) else { return };
        ask.on_disk = Some(on_disk);
        let Some(sequence) = self.state.waiting_mut(ask.sequence) else { return };
        sequence.miss = miss;
        let is_asked = matches!(sequence.gate, Gate::Asked { .. });
        if is_asked && on_disk > 0 && self.rates.promote_pays(tokens) {
            ask.awaited = Some((tokens, now));
        } else if is_asked {
            if on_disk > 0 {
                self.rates.doubt_promote();
                let reason = MissReason::SlowerThanRecompute;
                sequence.withheld = Some(Withheld { reason, tokens });
            }
            sequence.gate = Gate::Open;
        }
        self.offer(tag, blocks);
    }

    /// What was on its way is here. `miss` says why one block did not come.
    pub(super) fn promoted(
        &mut self,
        tag: SequenceTag,
        blocks: Vec<CachedBlock>,
        miss: Option<MissReason>,
    ) {
        let (now, size) = ((self.clock)(), self.state.pool.tokens_per_block());
        let Some(ask) = self.histories.asks.get_mut(&tag) else { return };
        if let Some((tokens, since)) = ask.awaited.take() {
            self.rates.observe_promote(tokens, now.saturating_sub(since));
        }
        let on_disk = ask.on_disk.replace(0).unwrap_or(0);
        let tokens = on_disk.saturating_sub(blocks.len() as u32) * size;
        if let Some(sequence) = self.offer(tag, blocks) {
            sequence.withheld = miss.map(|reason| Withheld { reason, tokens });
            if matches!(sequence.gate, Gate::Asked { .. }) {
                sequence.gate = Gate::Open;
            }
        }
    }

    /// Offers a waiting sequence what is in frames for it.
    fn offer(&mut self, tag: SequenceTag, blocks: Vec<CachedBlock>) -> Option<&mut Sequence> {
        let tokens_per_block = self.state.pool.tokens_per_block();
        let ask = self.histories.asks.get_mut(&tag)?;
        let sequence = self.state.waiting_mut(ask.sequence)?;
        ask.blocks.extend(blocks);
        // Of several blocks for one place the one that helps most.
        ask.blocks.sort_by_key(|block| (block.index, Reverse(block.tokens)));
        ask.blocks.dedup_by_key(|block| block.index);
        let offered = ask.blocks.iter().map(|block| {
            let origin = self.labels.origin(&block.variant, &block.numerics);
            (block.index, Offered { tokens: block.tokens, origin })
        });
        sequence.offer = offered.collect();
        // A chain that ends behind the whole of a tail has not gone another way than before: it goes on.
        let goes_on =
            ask.blocks.last().is_some_and(|last| last.is_whole && last.tokens < tokens_per_block);
        sequence.miss = sequence.miss.filter(|miss| !goes_on || *miss != MissReason::Diverged);
        Some(sequence)
    }

    /// The daemon is gone, or another one is there: what was found or asked under the old attachment is
    /// void. Sequences that were not placed yet ask again, or go on without.
    pub(super) fn reattached(&mut self) {
        for ask in self.histories.asks.values_mut() {
            (ask.blocks, ask.on_disk, ask.awaited) = (Vec::new(), None, None);
        }
        for sequence in &mut self.state.waiting {
            if !matches!(sequence.gate, Gate::Placed { .. }) {
                sequence.gate = Gate::Unasked;
                sequence.offer = Offer::default();
                sequence.withheld = None;
            }
        }
    }

    /// Starts the loads of the next sequences while the current step runs.
    pub(super) fn load_ahead(&mut self) {
        let now = (self.clock)();
        for placement in crate::scheduler::place_ahead(&mut self.state, now, &self.rates) {
            self.start_load(&placement);
        }
    }

    /// Starts the load of a sequence whose blocks were just reserved, and notes what was found where.
    pub(super) fn start_load(&mut self, placement: &Placement) {
        let id = placement.sequence;
        let mut cached =
            CachedTokens { device: placement.device_tokens, ..CachedTokens::default() };
        let blocks = self.forget_ask(id).map(|ask| ask.blocks).unwrap_or_default();
        if placement.slower_than_recompute > 0 {
            self.rates.doubt_load();
        }
        if let Some(load) = placement.load {
            let size = self.state.pool.tokens_per_block();
            let mut plan = Vec::with_capacity(placement.blocks.len());
            let mut held = Vec::with_capacity(placement.blocks.len());
            let mut origins = Vec::with_capacity(placement.blocks.len());
            let mut left = placement.load_tokens;
            for &(index, block) in &placement.blocks {
                let found = blocks.binary_search_by_key(&index, |found| found.index);
                let found = &blocks[found.expect("only offered blocks are placed")];
                let tokens = left.min(size);
                left -= tokens;
                match found.tier {
                    Tier::Host => cached.host += tokens,
                    Tier::Disk => cached.disk += tokens,
                }
                self.state.pool.retain(block);
                if tokens == size {
                    // Else the next step would save what has just come from a frame.
                    self.state.pool.set_stored(block, self.saves.attachment);
                }
                held.push((block, (tokens == size).then_some(index)));
                origins.push(self.labels.origin(&found.variant, &found.numerics));
                plan.push(LoadBlock { frame: found.frame.clone(), block });
            }
            let present_layers = self.state.sets.present_layers.clone();
            self.backend.load(LoadPlan { id: load, blocks: plan, present_layers });
            let started = (self.clock)();
            let load_state = Load {
                sequence: id,
                blocks: held,
                origins,
                _pins: blocks,
                tokens: placement.load_tokens,
                started,
            };
            self.histories.loads.insert(load, load_state);
        }
        let tokens = placement.slower_than_recompute;
        if let Some(sequence) = self.sequence_mut(id) {
            sequence.placed = cached;
            if tokens > 0 {
                let reason = MissReason::SlowerThanRecompute;
                sequence.withheld = Some(Withheld { reason, tokens });
            }
        }
    }

    /// All layers of a load have arrived: its blocks are as good as computed ones.
    pub(super) fn loaded(&mut self, id: LoadId) {
        let Some(load) = self.histories.loads.remove(&id) else { return };
        self.rates.observe_load(load.tokens, (self.clock)().saturating_sub(load.started));
        self.stats.loads.with_label_values(&["done"]).inc();
        let attachment = self.saves.attachment;
        if let Some(sequence) = self.sequence_mut(load.sequence)
            && sequence.waits.contains(&id)
        {
            sequence.waits.retain(|&waited| waited != id);
            let keys: Vec<_> = load
                .blocks
                .iter()
                .map(|(_, index)| index.map(|at| sequence.keys[at as usize]))
                .collect();
            let stays = !sequence.cache.no_store;
            for (((block, _), key), origin) in load.blocks.iter().zip(keys).zip(&load.origins) {
                if let Some(key) = key.filter(|_| stays) {
                    self.state.pool.seal(*block, key, *origin);
                    self.state.pool.set_stored(*block, attachment);
                }
            }
        }
        load.blocks.iter().for_each(|&(block, _)| self.state.pool.release(block));
    }

    /// A load failed. Its sequence starts over, by computing, when no step names it any more.
    pub(super) fn load_failed(&mut self, id: LoadId) {
        let Some(load) = self.histories.loads.remove(&id) else { return };
        self.stats.loads.with_label_values(&["failed"]).inc();
        tracing::warn!(sequence = load.sequence.0, "a load failed its checksum; recomputing");
        if let Some(sequence) = self.sequence_mut(load.sequence)
            && sequence.waits.contains(&id)
        {
            sequence.broken = true;
        }
        load.blocks.iter().for_each(|&(block, _)| self.state.pool.release(block));
    }

    /// The cache need not think of this sequence any more. What was pinned for it is returned.
    pub(super) fn forget_ask(&mut self, id: SequenceId) -> Option<Ask> {
        let tag = self.histories.tags.remove(&id)?;
        if let Some(cache) = &mut self.cache {
            cache.end(tag);
        }
        self.histories.asks.remove(&tag)
    }

    /// Puts sequences whose load failed back into the queue, without frames. Not while a step runs.
    pub(super) fn restart_broken(&mut self) {
        debug_assert!(self.flight.as_ref().is_none_or(Flight::is_over), "a step names its blocks");
        let State { waiting, running, .. } = &mut self.state;
        let broken = |sequence: &&Sequence| sequence.broken;
        let ids: Vec<SequenceId> = waiting
            .iter()
            .filter(broken)
            .chain(running.iter().filter(broken))
            .map(|s| s.id)
            .collect();
        for id in ids {
            let computed = self.sequence_mut(id).map_or(0, |sequence| sequence.computed);
            self.stats.recomputed_tokens.inc_by(computed.into());
            match self.state.running_index(id) {
                Some(at) => {
                    let sequence = self.state.running.remove(at);
                    self.state.requeue(sequence);
                }
                None => self.state.displace(id),
            }
            if let Some(sequence) = self.state.waiting_mut(id) {
                sequence.shuns_frames = true;
                // Unless its prompt was complete once: then this is KV of its own that has to come again.
                if matches!(sequence.accounting, Accounting::Known(_)) {
                    sequence.accounting = Accounting::Open;
                }
            }
        }
    }

    /// A sequence, wherever it is.
    pub(super) fn sequence_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        match self.state.running_index(id) {
            Some(at) => self.state.running.get_mut(at),
            None => self.state.waiting_mut(id),
        }
    }
}

/// What a turn with these tokens would like to read.
pub(super) fn wanted(state: &State, labels: &Labels, start: Start, tokens: Arc<[u32]>) -> Wanted {
    let accept = match state.sets.reuse {
        Reuse::Own => Accept::Own { variant: labels.own, numerics: labels.numerics },
        Reuse::Any => Accept::Any,
    };
    let tokens_per_block = state.pool.tokens_per_block() as u16;
    Wanted { start, accept, tokens, tokens_per_block }
}

/// When the sequence at `place` of the queue is expected to start: when all before it are computed.
fn expected_start(state: &State, rates: &Rates, place: usize) -> Hint {
    let running = state.running.iter().map(|sequence| sequence.len() - sequence.computed);
    let ahead = state.waiting.iter().take(place).map(|s| s.len() - s.computed);
    let tokens = running.chain(ahead).fold(0_u32, u32::saturating_add);
    let start_in_ms = rates.prefill_time(tokens).as_millis().try_into().unwrap_or(u32::MAX);
    Hint::Queued { place: place as u32, start_in_ms }
}
