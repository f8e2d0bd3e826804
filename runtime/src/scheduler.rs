//! What runs in the next step: pure decisions over sequences, blocks and rates.
//!
//! One budget of tokens a step, spent in this order:
//! 1. a token of each sequence that decodes, so that nobody's reply stalls behind a long prompt;
//! 2. chunks of prompts that were admitted before, the oldest first;
//! 3. admissions, strictly in order of arrival among those whose history the cache has settled.
//!
//! When the pool is out of blocks, the youngest gives way: first what is only placed, then running
//! sequences, which go back to their place in the queue. Their full blocks were saved behind the
//! compute and keep their names on the device, so that they come back by loading, not by computing.
//! The oldest running sequence is never preempted and every sequence fits the pool alone, hence
//! everything ends.
//!
//! **Invariants** (`tests`)
//! - A batch has at most `step_tokens_max` tokens, and names no sequence twice.
//! - A row's table covers its tokens, and what the row writes nobody else holds.
//! - No sequence is overtaken by a later one, except while it waits for the cache.

use std::collections::VecDeque;
use std::time::Duration;

use crate::adaskip::presence::SkipSets;
use crate::batch::{Batch, LoadId, Row, SequenceId};
use crate::block_pool::{BlockPool, Origin};
use crate::overlap::Rates;
use crate::sequence::{Gate, Placement, Sequence};

/// Waiting sequences whose history may be on its way to the device before they are admitted. Two: the
/// next one's copy hides behind the running step, the one after it keeps the link busy; more would
/// only take blocks from those that run.
pub const PLACED_AHEAD_MAX: usize = 2;

/// Bounds of a step.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sequences that take part.
    pub sequences_max: usize,
    /// Tokens computed, at least one a sequence.
    pub step_tokens_max: u32,
}

/// Everything the scheduler decides over. The engine owns it.
#[derive(Debug)]
pub struct State {
    /// Bounds of a step.
    pub limits: Limits,
    /// Device blocks.
    pub pool: BlockPool,
    /// AdaSkip's sets.
    pub sets: SkipSets,
    /// In the queue, by arrival.
    pub waiting: VecDeque<Sequence>,
    /// Taking part in steps, by admission.
    pub running: Vec<Sequence>,
    /// Finished, holding blocks that are still to be saved; the first to give way.
    pub closing: VecDeque<Sequence>,
    /// Waiting sequences whose chain is another one than the cache was told.
    pub renamed: Vec<SequenceId>,
    next_load: u64,
}

/// What [`schedule`] decided.
#[derive(Debug, Default)]
pub struct Decision {
    /// To submit, unless it has no rows.
    pub batch: Batch,
    /// Sequences that joined, with what was found for them; loads are to be started before the step.
    pub admitted: Vec<SequenceId>,
    /// Blocks reserved in this call.
    pub placed: Vec<Placement>,
    /// Sequences that lost their blocks and wait again.
    pub preempted: Vec<SequenceId>,
    /// Finished sequences that gave way before all their blocks were saved.
    pub unsaved: u32,
}

/// Why no blocks were reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NotPlaced {
    /// The pool has not enough; nothing changed.
    NoRoom,
    /// The chain of a truncated history is not all there: the cache has to be asked for another one.
    Renamed,
}

impl State {
    /// Nothing runs, nothing waits.
    pub fn new(limits: Limits, pool: BlockPool, sets: SkipSets) -> Self {
        assert!(limits.sequences_max > 0, "a step has room for a sequence");
        assert!(
            limits.step_tokens_max as usize >= limits.sequences_max,
            "each decoding sequence gets its token"
        );
        Self {
            limits,
            pool,
            sets,
            waiting: VecDeque::new(),
            running: Vec::new(),
            closing: VecDeque::new(),
            renamed: Vec::new(),
            next_load: 0,
        }
    }

    /// Puts a sequence into the queue at its place by arrival.
    pub fn enqueue(&mut self, sequence: Sequence) {
        let place = self.waiting.partition_point(|other| other.id < sequence.id);
        self.waiting.insert(place, sequence);
    }

    /// A waiting sequence.
    pub fn waiting_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        let at = self.waiting.binary_search_by_key(&id, |sequence| sequence.id).ok()?;
        Some(&mut self.waiting[at])
    }

    /// A running sequence's place in `running`.
    pub fn running_index(&self, id: SequenceId) -> Option<usize> {
        self.running.iter().position(|sequence| sequence.id == id)
    }

    /// Takes a sequence's blocks away and puts it back into the queue, to start anew.
    pub fn requeue(&mut self, mut sequence: Sequence) {
        self.pool.release_table(&sequence.table);
        sequence.reset();
        self.enqueue(sequence);
    }

    /// A waiting sequence that was placed gives its blocks back.
    pub fn displace(&mut self, id: SequenceId) {
        let Ok(at) = self.waiting.binary_search_by_key(&id, |sequence| sequence.id) else { return };
        let sequence = &mut self.waiting[at];
        self.pool.release_table(&sequence.table);
        sequence.reset();
    }
}

/// Reserves blocks for histories that the cache offers to the first waiting sequences, so that their
/// loads run beside the step that is under way. Leaves a block for each running sequence.
pub fn place_ahead(state: &mut State, now: Duration, rates: &Rates) -> Vec<Placement> {
    let mut placed = Vec::new();
    // What the ones before need: whoever is placed earlier than they are must not be in their way.
    let mut reserved = 0;
    for at in 0..state.waiting.len().min(PLACED_AHEAD_MAX) {
        let sequence = &state.waiting[at];
        if sequence.gate != Gate::Open || sequence.offer.is_empty() {
            let held = sequence.table.len() as u32;
            reserved += state.pool.blocks_for(sequence.len()) - held;
            continue;
        }
        match place(state, at, reserved, now, rates) {
            Ok(placement) => placed.push(placement),
            Err(NotPlaced::Renamed) => reserved += state.pool.blocks_for(state.waiting[at].len()),
            // Not before the others: they would take the blocks it waits for.
            Err(NotPlaced::NoRoom) => break,
        }
    }
    placed
}

/// The next step. `now` is since the engine's start.
pub fn schedule(state: &mut State, now: Duration, rates: &Rates) -> Decision {
    let mut decision = Decision::default();
    let mut budget = state.limits.step_tokens_max;

    let decoding = |sequence: &Sequence| sequence.is_decoding();
    schedule_running(state, &mut decision, &mut budget, decoding);
    schedule_running(state, &mut decision, &mut budget, |sequence| !decoding(sequence));

    // Who just lost its blocks is not given them back in the same breath.
    if !decision.preempted.is_empty() {
        return decision;
    }
    let mut at = 0;
    while at < state.waiting.len() && budget > 0 && state.running.len() < state.limits.sequences_max
    {
        match state.waiting[at].gate {
            Gate::Unasked | Gate::Asked { .. } => {
                at += 1;
                continue;
            }
            Gate::Placed { admit_at } if now < admit_at && !decision.batch.rows.is_empty() => {
                at += 1;
                continue;
            }
            Gate::Placed { .. } => {}
            Gate::Open => match place(state, at, 0, now, rates) {
                Ok(placement) => decision.placed.push(placement),
                Err(NotPlaced::Renamed) => continue,
                // Nothing runs, so that nothing but what waits behind this one can be in its way.
                Err(NotPlaced::NoRoom)
                    if state.running.is_empty() && give_way(state, &mut decision) =>
                {
                    continue;
                }
                // Whoever comes later waits as well: nobody overtakes for blocks.
                Err(NotPlaced::NoRoom) => break,
            },
        }
        let Some(sequence) = state.waiting.remove(at) else { break };
        decision.admitted.push(sequence.id);
        state.running.push(sequence);
        let last = state.running.len() - 1;
        schedule_row(state, last, &mut decision, &mut budget);
    }
    decision
}

/// Rows for the running sequences that `chosen` picks, the oldest first.
fn schedule_running(
    state: &mut State,
    decision: &mut Decision,
    budget: &mut u32,
    chosen: impl Fn(&Sequence) -> bool,
) {
    let mut at = 0;
    // A preemption shortens the list behind `at`, never before it.
    while at < state.running.len() && *budget > 0 {
        if chosen(&state.running[at]) && !has_row(decision, state.running[at].id) {
            schedule_row(state, at, decision, budget);
        }
        at += 1;
    }
}

fn has_row(decision: &Decision, id: SequenceId) -> bool {
    decision.batch.rows.iter().any(|row| row.sequence == id)
}

/// Adds the row of `state.running[at]`, as long as budget and blocks allow; none when there is no block.
fn schedule_row(state: &mut State, at: usize, decision: &mut Decision, budget: &mut u32) {
    let run = state.running[at].next_run(&state.sets);
    let mut tokens = run.tokens.min(*budget);
    let position = state.running[at].computed;
    while (state.running[at].table.len() as u32) < state.pool.blocks_for(position + tokens) {
        if let Some(block) = state.pool.take() {
            state.running[at].table.push(block);
            continue;
        }
        let covered = state.running[at].table.len() as u32 * state.pool.tokens_per_block();
        if covered > position {
            tokens = covered - position;
        } else if !make_room(state, at, decision) {
            return; // Loads or saves hold the rest; the next step tries again.
        }
    }
    let sequence = &state.running[at];
    let ends = position + tokens == sequence.len();
    *budget -= tokens;
    decision.batch.rows.push(Row {
        sequence: sequence.id,
        phase: run.phase,
        tokens: sequence.tokens[position as usize..(position + tokens) as usize].to_vec(),
        position,
        block_table: sequence.table.clone(),
        skip: run.skip,
        sampling: ends.then(|| sequence.sampling()),
        measure: sequence.measures(),
        waits: sequence.waits.clone(),
    });
}

/// Frees blocks for the running sequence `at`: what does not run gives way, then the youngest of those
/// that were admitted later and have no row yet. Whether anything did; copies may still hold its blocks.
fn make_room(state: &mut State, at: usize, decision: &mut Decision) -> bool {
    if give_way(state, decision) {
        return true;
    }
    let youngest = (at + 1..state.running.len())
        .filter(|&other| !has_row(decision, state.running[other].id))
        .max_by_key(|&other| state.running[other].id);
    let Some(youngest) = youngest else { return false };
    let sequence = state.running.remove(youngest);
    decision.preempted.push(sequence.id);
    state.requeue(sequence);
    true
}

/// Takes blocks from what does not run: what is closing, then what is only placed, the last first.
fn give_way(state: &mut State, decision: &mut Decision) -> bool {
    if let Some(closed) = state.closing.pop_front() {
        state.pool.release_table(&closed.table);
        decision.unsaved += 1;
        return true;
    }
    let placed = |sequence: &&Sequence| matches!(sequence.gate, Gate::Placed { .. });
    let Some(id) = state.waiting.iter().rev().find(placed).map(|sequence| sequence.id) else {
        return false;
    };
    state.displace(id);
    decision.preempted.push(id);
    true
}

/// Reserves blocks for what device and cache hold of a waiting sequence's history; [`NotPlaced::NoRoom`]
/// when the pool has not enough for all its tokens beside `reserved` blocks and one for each running
/// sequence.
fn place(
    state: &mut State,
    at: usize,
    reserved: u32,
    now: Duration,
    rates: &Rates,
) -> Result<Placement, NotPlaced> {
    let State { pool, waiting, sets, running, renamed, next_load, .. } = state;
    let sequence = &mut waiting[at];
    let size = pool.tokens_per_block();
    let usable = sequence.reusable(sets);
    let full_max = (usable / size) as usize;

    let device = pool.reuse_prefix(&sequence.keys[..full_max]);
    // Room for the whole prompt, and for the next block of each that runs: less would preempt at once.
    let missing = pool.blocks_for(sequence.len()) - device.len() as u32;
    if pool.free_count() < missing + running.len() as u32 + reserved {
        let blocks: Vec<_> = device.iter().map(|&(block, _)| block).collect();
        pool.release_table(&blocks);
        return Err(NotPlaced::NoRoom);
    }

    let offered =
        |index: usize| sequence.offer.get(&(index as u32)).map_or(0, |block| block.tokens);
    let end_of_offer =
        (device.len()..full_max).find(|&index| offered(index) < size).unwrap_or(full_max);
    // What follows the last full block: the better of a tail on the device and one in a frame.
    let tails = |full: usize| {
        let start = full * size as usize;
        let rest = &sequence.tokens[start..usable as usize];
        let on_device = pool.tail_len(&sequence.parent_of(full), rest);
        (on_device, offered(full).min(rest.len() as u32))
    };
    let mut full = end_of_offer;
    let (mut device_tail, mut frame_tail) = tails(full);
    if frame_tail <= device_tail {
        frame_tail = 0;
    }
    let mut load_tokens = (full - device.len()) as u32 * size + frame_tail;
    let mut slower_than_recompute = 0;
    if load_tokens > 0 && !rates.load_pays(load_tokens) {
        slower_than_recompute = std::mem::take(&mut load_tokens);
        full = device.len();
        (device_tail, frame_tail) = (tails(full).0, 0);
    }
    if !sequence.has_kept(full) {
        let blocks: Vec<_> = device.iter().map(|&(block, _)| block).collect();
        pool.release_table(&blocks);
        sequence.rename();
        renamed.push(sequence.id);
        return Err(NotPlaced::Renamed);
    }

    // From here on nothing fails: the blocks are there. The tail first, or it might be among those taken.
    let tail = (frame_tail == 0 && device_tail > 0)
        .then(|| {
            let rest = &sequence.tokens[full * size as usize..usable as usize];
            pool.reuse_tail(&sequence.parent_of(full), rest)
        })
        .flatten();
    let mut own = true;
    let mut own_tokens = 0;
    let mut cover = |origin: Origin, tokens: u32| {
        own &= origin == Origin::Own;
        own_tokens += if own { tokens } else { 0 };
    };
    let mut blocks = Vec::new();
    for (block, origin) in &device {
        sequence.table.push(*block);
        cover(*origin, size);
    }
    for index in device.len()..full {
        let block = pool.take().expect("counted above");
        sequence.table.push(block);
        blocks.push((index as u32, block));
        cover(sequence.offer[&(index as u32)].origin, size);
    }
    let mut device_tokens = device.len() as u32 * size;
    let mut tail_tokens = 0;
    if frame_tail > 0 {
        let block = pool.take().expect("counted above");
        sequence.table.push(block);
        blocks.push((full as u32, block));
        cover(sequence.offer[&(full as u32)].origin, frame_tail);
        tail_tokens = frame_tail;
    } else if let Some(tail) = tail {
        sequence.table.push(tail.block);
        cover(tail.origin, tail.tokens);
        device_tokens += tail.tokens;
        tail_tokens = tail.tokens;
    }
    sequence.computed = full as u32 * size + tail_tokens;
    sequence.own = own_tokens;
    let load = (!blocks.is_empty()).then(|| {
        *next_load += 1;
        LoadId(*next_load)
    });
    sequence.waits = load.into_iter().collect();
    let new_tokens = sequence.len() - sequence.computed;
    sequence.gate = Gate::Placed { admit_at: now + rates.load_lead(load_tokens, new_tokens) };
    Ok(Placement {
        sequence: sequence.id,
        device_tokens,
        load,
        blocks,
        load_tokens,
        slower_than_recompute,
    })
}
