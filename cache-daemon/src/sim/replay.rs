//! The tiers under a trace: which blocks are in host memory and on disk when each turn starts.
//!
//! Directory, queue and index are the daemon's; the moves are those of [`crate::transfer`] with a disk that
//! is a rate: one block at a time, reads and writes in turn while both wait, lookups before hints.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use kv_protocol::message::KeyList;
use kv_protocol::{Accept, BlockKey, FrameIndex, MissReason, NumericsTag, RootKey, Variant};
use serde::Serialize;

use super::schedule::{Server, Times, schedule};
use super::trace::Trace;
use crate::directory::{Description, Directory, EntryId, Label, OnDisk};
use crate::key_map::{KeyMap, KeySet};
use crate::policy::{Index, PolicyKind, QueueTicket, Residence, Standing};
use crate::queue::{Queue, TurnId};
use crate::tier::host::{free_high, free_low};

/// Who chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Contender {
    /// The daemon's default.
    LookAhead,
    /// Least recently used first.
    Lru,
    /// First come, first out.
    Fifo,
    /// Small queue, main queue, ghosts.
    #[value(name = "s3-fifo")]
    S3Fifo,
    /// Farthest next use first: look-ahead whose queue holds the future. Only a simulator has it.
    Belady,
}

impl Contender {
    fn policy(self) -> PolicyKind {
        match self {
            Contender::LookAhead | Contender::Belady => PolicyKind::LookAhead,
            Contender::Lru => PolicyKind::Lru,
            Contender::Fifo => PolicyKind::Fifo,
            Contender::S3Fifo => PolicyKind::S3Fifo,
        }
    }
}

/// What is replayed under.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Settings {
    /// Who chooses.
    pub policy: Contender,
    /// Of the host tier.
    pub host_bytes: u64,
    /// Of the disk tier; 0 is none.
    pub disk_bytes: u64,
    /// Bytes a second, reads and writes together.
    pub disk_bytes_per_s: f64,
    /// KV of a token.
    pub token_bytes: u64,
    /// Clients say this long before they ask that they will; 0 is never.
    pub anticipate_us: u64,
    /// Started turns that are not counted.
    pub warm_up_turns: usize,
}

/// What came of it. Turns with history whose blocks are all there are hits; a hit is from host if all
/// of its blocks were in frames when it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// Measured turns.
    pub turns: u64,
    /// Of those, with any history.
    pub turns_with_history: u64,
    /// Whole history in host memory.
    pub turns_host: u64,
    /// Whole history in host memory or on disk, some of it on disk.
    pub turns_disk: u64,
    /// Tokens of history.
    pub tokens: u64,
    /// Of those, in host memory.
    pub tokens_host: u64,
    /// Of those, on disk.
    pub tokens_disk: u64,
    /// Blocks read from disk because of a hint.
    pub promotes_by_hint: u64,
    /// Blocks read from disk because a turn had started without them.
    pub promotes_by_lookup: u64,
    /// Blocks written to disk.
    pub writes: u64,
    /// Blocks that left host memory.
    pub evictions_host: u64,
    /// Blocks that left the disk.
    pub evictions_disk: u64,
    /// Events of the virtual clock.
    pub events: u64,
}

impl Outcome {
    /// Hits, of all measured turns, in percent.
    pub fn hit_rate(&self) -> f64 {
        percent(self.turns_host + self.turns_disk, self.turns)
    }

    /// Hits if nothing were ever dropped, in percent.
    pub fn ceiling(&self) -> f64 {
        percent(self.turns_with_history, self.turns)
    }

    /// Of the hits, those from host memory, in percent.
    pub fn host_share(&self) -> f64 {
        percent(self.turns_host, self.turns_host + self.turns_disk)
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

/// A trace with its schedule, ready to be replayed under many settings.
pub struct Prepared {
    block_tokens: u32,
    turns: Vec<Turn>,
}

struct Turn {
    times: Times,
    next: Option<usize>,
    is_first: bool,
    /// Blocks of its history, or of its whole prompt where the trace names them.
    chain: Vec<BlockKey>,
    /// The trace names the blocks: the history is what was seen before.
    is_named: bool,
    history_tokens: u32,
    /// Blocks that are new when it ends; the first follows the last of `chain`.
    makes: Vec<BlockKey>,
    /// Blocks that nothing will read again: cut off, or a tail that has grown.
    drops: Vec<BlockKey>,
}

impl Prepared {
    /// Runs the server over the trace. With `charge_tokens`, each conversation takes the room of that many
    /// tokens from its first turn on, and moves as a whole of that size: the paper's way of counting.
    pub fn new(trace: &Trace, server: &Server, charge_tokens: Option<u32>) -> Self {
        let (times, next) = schedule(trace, server);
        let size = trace.header.block_tokens;
        let mut conversations: HashMap<u32, (Vec<BlockKey>, u32)> = HashMap::new();
        let mut seen = HashSet::new();
        let mut blocks = 0_u64;
        let mut turns = Vec::with_capacity(trace.turns.len());
        for (index, (turn, times)) in trace.turns.iter().zip(times).enumerate() {
            let is_first = seen.insert(turn.conversation);
            let (mut makes, mut drops) = (Vec::new(), Vec::new());
            let (chain, history_tokens);
            if let Some(ids) = &turn.blocks {
                chain = ids.iter().map(|id| named(*id)).collect();
                history_tokens = 0;
            } else {
                let (held, tokens) = conversations.entry(turn.conversation).or_default();
                let cut = turn.cut.div_ceil(size).min(held.len() as u32);
                *tokens = tokens.saturating_sub(cut * size);
                if charge_tokens.is_none() {
                    drops.extend(held.drain(..cut as usize));
                }
                (chain, history_tokens) = (held.clone(), *tokens);
                if charge_tokens.is_none() && *tokens % size != 0 {
                    drops.extend(held.pop());
                }
                *tokens += turn.new + turn.answer;
                let room = charge_tokens.unwrap_or(*tokens).div_ceil(size) as usize;
                while held.len() < room {
                    blocks += 1;
                    held.push(own(blocks));
                    makes.push(own(blocks));
                }
            }
            let is_named = turn.blocks.is_some();
            let next = next[index];
            turns.push(Turn {
                times,
                next,
                is_first,
                chain,
                is_named,
                history_tokens,
                makes,
                drops,
            });
        }
        Self { block_tokens: size, turns }
    }

    /// Most bytes of KV that all conversations have at once when none is forgotten.
    pub fn working_set_bytes(&self, token_bytes: u64) -> u64 {
        let mut last = KeySet::default();
        for turn in &self.turns {
            last.extend(turn.chain.iter().chain(&turn.makes).copied());
            for key in &turn.drops {
                last.remove(key);
            }
        }
        last.len() as u64 * u64::from(self.block_tokens) * token_bytes
    }

    /// Replays the trace.
    pub fn replay(&self, settings: Settings) -> Outcome {
        Replay::new(self, settings).run()
    }
}

/// Blocks that the trace names, and those that it does not, share no key.
fn named(id: u64) -> BlockKey {
    numbered(id, 1)
}

fn own(number: u64) -> BlockKey {
    numbered(number, 2)
}

fn numbered(number: u64, space: u8) -> BlockKey {
    let mut key = [space; 32];
    key[..8].copy_from_slice(&number.to_le_bytes());
    BlockKey(key)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Ended(usize),
    DiskDone(BlockKey, bool),
    Foretold(usize),
    Asked(usize),
    Started(usize),
}

#[derive(Debug, Default)]
struct Running {
    pinned: Vec<BlockKey>,
}

struct Replay<'a> {
    trace: &'a Prepared,
    settings: Settings,
    outcome: Outcome,
    root: RootKey,
    label: Label,
    host_blocks: u64,
    disk_blocks: u64,
    events: BinaryHeap<Reverse<(u64, Event)>>,
    now_us: u64,
    started: usize,
    directory: Directory,
    queue: Queue,
    index: Index,
    running: HashMap<usize, Running>,
    pins: KeyMap<u32>,
    ever: KeySet,
    host_used: u64,
    disk_used: u64,
    /// Asked for by turns that run.
    wanted: VecDeque<BlockKey>,
    waiters: KeyMap<Vec<usize>>,
    dirty: VecDeque<BlockKey>,
    is_dirty: KeySet,
    /// The disk's one job: a block, and whether it is read.
    disk_job: Option<(BlockKey, bool)>,
    was_read: bool,
    changed: Vec<BlockKey>,
}

impl<'a> Replay<'a> {
    fn new(trace: &'a Prepared, settings: Settings) -> Self {
        let block_bytes = u64::from(trace.block_tokens) * settings.token_bytes;
        let (root, numerics) = (RootKey([0; 32]), NumericsTag::of("simulator"));
        Self {
            trace,
            settings,
            outcome: Outcome::default(),
            root,
            label: Label { root, variant: Variant::Exact, numerics, disk_bytes: block_bytes },
            host_blocks: settings.host_bytes / block_bytes.max(1),
            disk_blocks: settings.disk_bytes / block_bytes.max(1),
            events: BinaryHeap::new(),
            now_us: 0,
            started: 0,
            directory: Directory::default(),
            queue: Queue::default(),
            index: Index::new(settings.policy.policy()),
            running: HashMap::new(),
            pins: KeyMap::default(),
            ever: KeySet::default(),
            host_used: 0,
            disk_used: 0,
            wanted: VecDeque::new(),
            waiters: KeyMap::default(),
            dirty: VecDeque::new(),
            is_dirty: KeySet::default(),
            disk_job: None,
            was_read: false,
            changed: Vec::new(),
        }
    }

    fn run(mut self) -> Outcome {
        for (index, turn) in self.trace.turns.iter().enumerate() {
            let Times { free_us, asked_us, start_us, end_us } = turn.times;
            self.events.push(Reverse((asked_us, Event::Asked(index))));
            self.events.push(Reverse((start_us, Event::Started(index))));
            self.events.push(Reverse((end_us, Event::Ended(index))));
            let foretold_us = asked_us.saturating_sub(self.settings.anticipate_us).max(free_us);
            if foretold_us < asked_us && !turn.is_first {
                self.events.push(Reverse((foretold_us, Event::Foretold(index))));
            }
            if self.settings.policy == Contender::Belady && turn.is_first && turn.is_named {
                self.foresee(index);
            }
        }
        while let Some(Reverse((now_us, event))) = self.events.pop() {
            self.now_us = now_us;
            self.outcome.events += 1;
            self.apply(event);
            self.keep_frames_free();
            self.begin_disk_job();
        }
        self.outcome
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Foretold(turn) | Event::Asked(turn) => {
                if self.settings.policy != Contender::Belady {
                    self.wait(turn, self.trace.turns[turn].times.asked_us);
                }
            }
            Event::Started(turn) => self.start(turn),
            Event::Ended(turn) => {
                self.end(turn);
                if let Some(next) = self.trace.turns[turn].next
                    && self.settings.policy == Contender::Belady
                {
                    self.foresee(next);
                }
            }
            Event::DiskDone(key, is_read) => self.disk_done(key, is_read),
        }
    }

    /// Belady: the future is in the queue.
    fn foresee(&mut self, turn: usize) {
        self.wait(turn, self.trace.turns[turn].times.start_us);
    }

    fn wait(&mut self, turn: usize, ticket_us: u64) {
        let chain = &self.trace.turns[turn].chain;
        let known = chain.iter().take_while(|key| self.directory.get(key).is_some()).count();
        self.queue.place(TurnId(turn as u128), QueueTicket(ticket_us), chain, known as u64);
    }

    fn now_ms(&self) -> u64 {
        self.now_us / 1000
    }

    fn start(&mut self, index: usize) {
        let turn = &self.trace.turns[index];
        self.queue.remove(TurnId(index as u128));
        let keys: Vec<BlockKey> = if turn.is_named {
            turn.chain.iter().take_while(|key| self.ever.contains(*key)).copied().collect()
        } else {
            turn.chain.clone()
        };
        let needed = keys.len();
        let list = KeyList { root: self.root, accept: Accept::Any, keys, tail: Vec::new() };
        let links = self.directory.lookup(&list).links;
        let found = links.iter().zip(&list.keys).take_while(|(link, key)| link.key == **key);
        let found: Vec<BlockKey> = found.map(|(link, _)| link.key).collect();
        let (now_ms, mut running, mut in_host) = (self.now_ms(), Running::default(), 0);
        for key in &found {
            let Some(block) = self.directory.get_mut(key) else { continue };
            block.used_ms = now_ms;
            if block.host.is_some() {
                in_host += 1;
                *self.pins.entry(*key).or_default() += 1;
                running.pinned.push(*key);
                continue;
            }
            let waiters = self.waiters.entry(*key).or_default();
            waiters.push(index);
            if waiters.len() == 1 && self.disk_job != Some((*key, true)) {
                self.wanted.push_back(*key);
            }
        }
        self.running.insert(index, running);
        self.started += 1;
        if self.started > self.settings.warm_up_turns {
            self.count(turn, needed, found.len(), in_host);
        }
    }

    fn count(&mut self, turn: &Turn, needed: usize, found: usize, in_host: usize) {
        let size = u64::from(self.trace.block_tokens);
        let tokens =
            if turn.is_named { needed as u64 * size } else { u64::from(turn.history_tokens) };
        let of = |blocks: usize| (blocks as u64 * size).min(tokens);
        let outcome = &mut self.outcome;
        outcome.turns += 1;
        outcome.tokens += tokens;
        outcome.tokens_host += of(in_host);
        outcome.tokens_disk += of(found) - of(in_host);
        outcome.turns_with_history += u64::from(needed > 0);
        if needed > 0 && found == needed {
            outcome.turns_host += u64::from(in_host == needed);
            outcome.turns_disk += u64::from(in_host < needed);
        }
    }

    /// What the turn had computed is committed, what it pinned is given back.
    fn end(&mut self, index: usize) {
        let turn = &self.trace.turns[index];
        for key in self.running.remove(&index).unwrap_or_default().pinned {
            self.unpin(key);
        }
        for key in &turn.chain {
            // Promotes that came too late are not waited for any more.
            if let Some(waiters) = self.waiters.get_mut(key) {
                waiters.retain(|waiter| *waiter != index);
                if waiters.is_empty() {
                    self.waiters.remove(key);
                    self.changed.push(*key);
                }
            }
        }
        for key in &turn.drops {
            self.forget(key);
        }
        let mut parent = self.root.as_parent();
        for key in turn.chain.iter().chain(&turn.makes) {
            if !turn.drops.contains(key) {
                self.commit(*key, parent);
                parent = *key;
            }
        }
    }

    fn unpin(&mut self, key: BlockKey) {
        if let Some(pins) = self.pins.get_mut(&key) {
            *pins -= 1;
            if *pins == 0 {
                self.pins.remove(&key);
                self.changed.push(key);
            }
        }
    }

    fn commit(&mut self, key: BlockKey, parent: BlockKey) {
        self.ever.insert(key);
        let now_ms = self.now_ms();
        let known = self.directory.get(&key).map(|block| block.host.is_some());
        let is_coming = self.disk_job == Some((key, true));
        if known == Some(true) || is_coming {
            if let Some(block) = self.directory.get_mut(&key) {
                block.used_ms = now_ms;
            }
            return;
        }
        if self.host_used >= self.host_blocks && !self.make_frame_free() {
            return; // No frame: the block is not kept.
        }
        self.host_used += 1;
        if let Some(block) = self.directory.get_mut(&key) {
            (block.used_ms, block.host) = (now_ms, Some(FrameIndex(0)));
            return; // On disk only until now: nothing needs to be written again.
        }
        let (label, tokens) = (self.label, Arc::from([]));
        let block = Description { parent, label, tokens, is_full: true };
        self.directory.insert(key, &block, now_ms, FrameIndex(0));
        self.make_dirty(key);
    }

    fn make_dirty(&mut self, key: BlockKey) {
        if self.disk_blocks > 0 && self.is_dirty.insert(key) {
            self.dirty.push_back(key);
        }
    }

    fn forget(&mut self, key: &BlockKey) {
        let Some(block) = self.directory.remove(key, MissReason::Evicted) else { return };
        self.host_used -= u64::from(block.host.is_some());
        // A write under way ends by finding the block gone.
        self.disk_used -= u64::from(block.is_stored());
    }

    fn refresh(&mut self) {
        let mut keys = self.queue.take_changed();
        keys.append(&mut self.changed);
        let mut changed: Vec<EntryId> =
            keys.iter().filter_map(|key| self.directory.find(key)).collect();
        changed.extend(self.directory.take_changed());
        changed.sort_unstable();
        changed.dedup();
        for id in changed {
            let standing = self.standing(id);
            self.index.set(id, self.directory.key(id), standing.as_ref());
        }
    }

    fn standing(&self, id: EntryId) -> Option<Standing> {
        let block = self.directory.at(id)?;
        let key = self.directory.key(id);
        let is_asked_for = self.disk_job == Some((*key, true)) || self.waiters.contains_key(key);
        let is_held = self.pins.contains_key(key) || self.disk_job == Some((*key, false));
        let host = match block.host {
            Some(_) if !is_held => Residence::Free,
            None if !is_asked_for => Residence::Absent,
            _ => Residence::Held,
        };
        let disk = match block.disk {
            OnDisk::Absent => Residence::Absent,
            OnDisk::Stored if !is_asked_for => Residence::Free,
            OnDisk::Stored | OnDisk::Writing => Residence::Held,
        };
        Some(Standing { known: block.known(self.queue.first_turn(key)), host, disk })
    }

    fn free(&self) -> u64 {
        self.host_blocks.saturating_sub(self.host_used)
    }

    fn keep_frames_free(&mut self) {
        let frames = self.host_blocks as u32;
        if self.free() >= u64::from(free_low(frames)) {
            return;
        }
        let mut passed = None;
        for _ in 0..u64::from(free_high(frames)).saturating_sub(self.free()) {
            self.refresh();
            let Some(victim) = self.index.host_victim(passed.as_ref()) else { return };
            if !self.demote(&self.directory.key(victim.id).clone()) {
                passed = Some(victim);
            }
        }
    }

    fn make_frame_free(&mut self) -> bool {
        self.refresh();
        let mut passed = None;
        while let Some(victim) = self.index.host_victim(passed.as_ref()) {
            if self.demote(&self.directory.key(victim.id).clone()) {
                return true;
            }
            passed = Some(victim);
        }
        false
    }

    /// Frees a block's frame if the disk has the block, or cannot have it; else it waits for its write.
    fn demote(&mut self, key: &BlockKey) -> bool {
        let Some(block) = self.directory.get(key) else { return false };
        if !block.is_stored() && self.disk_blocks > 0 {
            if self.is_dirty.contains(key) || block.disk == OnDisk::Writing {
                return false;
            }
            if self.make_disk_room(key) {
                self.make_dirty(*key);
                return false;
            }
        }
        let Some(block) = self.directory.get_mut(key) else { return false };
        block.host = None;
        let is_stored = block.is_stored();
        if !is_stored {
            self.directory.remove(key, MissReason::Evicted);
        }
        self.host_used -= 1;
        self.outcome.evictions_host += 1;
        true
    }

    fn make_disk_room(&mut self, key: &BlockKey) -> bool {
        let Some(id) = self.directory.find(key) else { return false };
        let Some(block) = self.directory.at(id) else { return false };
        let incoming = block.known(self.queue.first_turn(key));
        while self.disk_used >= self.disk_blocks {
            self.refresh();
            let Some(victim) = self.index.disk_victim(id, &incoming, None) else { return false };
            let victim = *self.directory.key(victim.id);
            let Some(block) = self.directory.get_mut(&victim) else { return false };
            block.disk = OnDisk::Absent;
            if block.host.is_none() {
                self.directory.remove(&victim, MissReason::Evicted);
            }
            self.disk_used -= 1;
            self.outcome.evictions_disk += 1;
        }
        true
    }

    fn begin_disk_job(&mut self) {
        if self.disk_job.is_some() || self.disk_blocks == 0 {
            return;
        }
        let job = if self.was_read {
            self.next_write().or_else(|| self.next_read())
        } else {
            self.next_read().or_else(|| self.next_write())
        };
        let Some((key, is_read)) = job else { return };
        self.disk_job = Some((key, is_read));
        self.was_read = is_read;
        self.changed.push(key);
        let bytes = u64::from(self.trace.block_tokens) * self.settings.token_bytes;
        let took_us = bytes as f64 / self.settings.disk_bytes_per_s * 1e6;
        let done_us = self.now_us + took_us.max(1.0) as u64;
        self.events.push(Reverse((done_us, Event::DiskDone(key, is_read))));
    }

    fn next_read(&mut self) -> Option<(BlockKey, bool)> {
        while let Some(key) = self.wanted.pop_front() {
            let is_still_wanted = self.waiters.contains_key(&key);
            let is_on_disk_only =
                self.directory.get(&key).is_some_and(|b| b.host.is_none() && b.is_stored());
            if !is_still_wanted || !is_on_disk_only {
                continue;
            }
            if self.free() == 0 && !self.make_frame_free() {
                self.wanted.push_front(key);
                return None;
            }
            self.host_used += 1;
            self.outcome.promotes_by_lookup += 1;
            return Some((key, true));
        }
        self.refresh();
        let promote = self.index.promote(&self.queue, self.host_blocks)?;
        let spare = self.free() > u64::from(free_high(self.host_blocks as u32));
        if !spare {
            let turn_of = |id| self.queue.first_turn(self.directory.key(id));
            let victim = self.index.displaced_by(promote.turn, turn_of)?;
            if !self.demote(&self.directory.key(victim.id).clone()) {
                return None;
            }
        }
        self.host_used += 1;
        self.outcome.promotes_by_hint += 1;
        Some((*self.directory.key(promote.id), true))
    }

    fn next_write(&mut self) -> Option<(BlockKey, bool)> {
        while let Some(key) = self.dirty.pop_front() {
            self.is_dirty.remove(&key);
            let is_waiting = self
                .directory
                .get(&key)
                .is_some_and(|block| block.host.is_some() && block.disk == OnDisk::Absent);
            if !is_waiting || !self.make_disk_room(&key) {
                continue;
            }
            if let Some(block) = self.directory.get_mut(&key) {
                block.disk = OnDisk::Writing;
            }
            self.disk_used += 1;
            self.outcome.writes += 1;
            return Some((key, false));
        }
        None
    }

    fn disk_done(&mut self, key: BlockKey, is_read: bool) {
        self.disk_job = None;
        self.changed.push(key);
        let Some(block) = self.directory.get_mut(&key) else {
            // Forgotten meanwhile: its room is free again.
            *(if is_read { &mut self.host_used } else { &mut self.disk_used }) -= 1;
            return;
        };
        if !is_read {
            block.disk = OnDisk::Stored;
            return;
        }
        block.host = Some(FrameIndex(0));
        for waiter in self.waiters.remove(&key).unwrap_or_default() {
            if let Some(running) = self.running.get_mut(&waiter) {
                *self.pins.entry(key).or_default() += 1;
                running.pinned.push(key);
            }
        }
    }
}
