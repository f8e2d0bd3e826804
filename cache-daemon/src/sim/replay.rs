//! The tiers under a trace: which blocks are in host memory and on disk when each turn starts.
//!
//! Directory, queue and index are the daemon's, and so are the rules of what moves (`crate::moves`). The disk
//! is a rate: one block at a time, reads and writes in turn while both wait, lookups before hints.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;

use kv_protocol::message::KeyList;
use kv_protocol::{Accept, BlockKey, FrameIndex, MissReason, NumericsTag, RootKey, Variant};

use super::faults::{Fault, draw};
use super::pauses::{Own, Pauses};
pub use super::prepare::Prepared;
use super::prepare::Turn;
use super::schedule::Times;
pub use super::settings::{Contender, Faults, Hits, Outcome, Settings};
use crate::directory::{Block, Description, Directory, Label, OnDisk};
use crate::key_map::{KeyMap, KeySet};
use crate::moves::{Catalogue, DiskRoom, Frames, Tiers, Unwritten};
use crate::policy::budget::WriteBudget;
use crate::policy::retention::Retentions;
use crate::policy::{Index, QueueTicket, Residence};
use crate::queue::{Queue, TurnId};

/// Frames of a dead runtime rest for this long, as the daemon has it.
const GRACE_US: u64 = crate::daemon::GRACE.as_micros() as u64;
/// Frames that a runtime holds to fill them.
const CREDITS: u64 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Ended(usize),
    DiskDone(BlockKey, bool),
    Fault(Fault),
    /// The conversation of a turn that ended then was foretold to ask again, and has not.
    GivenUp(usize),
    /// The frames of the runtime that died have rested.
    Rested(u32),
    Foretold(usize),
    Asked(usize),
    Started(usize),
}

#[derive(Debug, Default)]
struct Running {
    pinned: Vec<BlockKey>,
}

/// What a dead runtime held.
#[derive(Debug, Default)]
struct Resting {
    peer: u32,
    pinned: Vec<BlockKey>,
    granted: u64,
}

fn foretold_id(conversation: u32) -> TurnId {
    TurnId(1 << 100 | u128::from(conversation))
}

fn root_of(tenant: u32) -> RootKey {
    let mut root = [0; 32];
    root[..4].copy_from_slice(&tenant.to_le_bytes());
    RootKey(root)
}

pub(super) struct Replay<'a> {
    trace: &'a Prepared,
    settings: Settings,
    outcome: Outcome,
    tenants: BTreeMap<u32, Hits>,
    label: Label,
    host_blocks: u64,
    disk_blocks: u64,
    events: BinaryHeap<Reverse<(u64, Event)>>,
    now_us: u64,
    started: usize,
    directory: Directory,
    queue: Queue,
    index: Index,
    retentions: Retentions,
    budget: WriteBudget,
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
    disk_fails: bool,
    /// Promotes that failed: not tried again before the queue changes.
    failed_hints: KeySet,
    /// Turns asked for and not started.
    waiting: BTreeSet<usize>,
    resting: HashMap<u32, Resting>,
    deaths: u32,
    pauses: Pauses,
    own_pauses: HashMap<u32, Own>,
    /// Conversations foretold to ask again, by the turn that ended.
    foretold: HashMap<u32, usize>,
}

impl<'a> Replay<'a> {
    pub(super) fn new(trace: &'a Prepared, settings: Settings) -> Self {
        let block_bytes = u64::from(trace.block_tokens) * settings.token_bytes;
        let (root, numerics) = (root_of(0), NumericsTag::of("simulator"));
        let host_blocks = settings.host_bytes / block_bytes.max(1);
        let disk_blocks = settings.disk_bytes / block_bytes.max(1);
        let (host, disk) = settings.tenant_share.limits(host_blocks as u32, disk_blocks);
        Self {
            trace,
            settings,
            outcome: Outcome::default(),
            tenants: BTreeMap::new(),
            label: Label { root, variant: Variant::Exact, numerics, disk_bytes: block_bytes },
            host_blocks,
            disk_blocks,
            events: BinaryHeap::new(),
            now_us: 0,
            started: 0,
            directory: Directory::default(),
            queue: Queue::default(),
            index: Index::new(settings.policy.policy(), host, disk),
            retentions: Retentions::new(0),
            budget: WriteBudget::new(settings.write_bytes_per_day),
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
            disk_fails: false,
            failed_hints: KeySet::default(),
            waiting: BTreeSet::new(),
            resting: HashMap::new(),
            deaths: 0,
            pauses: Pauses::default(),
            own_pauses: HashMap::new(),
            foretold: HashMap::new(),
        }
    }

    pub(super) fn run(mut self) -> (Outcome, BTreeMap<u32, Hits>) {
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
        if let Some(faults) = &self.settings.faults {
            let end_us = self.trace.turns.iter().map(|turn| turn.times.end_us).max();
            let drawn = draw(faults, end_us.unwrap_or(0)).into_iter();
            self.events.extend(drawn.map(|(at_us, fault)| Reverse((at_us, Event::Fault(fault)))));
        }
        while let Some(Reverse((now_us, event))) = self.events.pop() {
            self.now_us = now_us;
            self.outcome.events += 1;
            self.apply(event);
            self.keep_frames_free();
            self.begin_disk_job();
            #[cfg(test)]
            self.self_check();
        }
        self.outcome.ended_ms = self.now_us / 1000;
        (self.outcome, self.tenants)
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Foretold(turn) | Event::Asked(turn) => {
                if matches!(event, Event::Asked(_)) {
                    self.returned(turn);
                }
                self.waiting.insert(turn);
                if self.settings.policy != Contender::Belady {
                    self.wait(turn, self.trace.turns[turn].times.asked_us);
                }
            }
            Event::Started(turn) => self.start(turn),
            Event::GivenUp(turn) => self.give_up(turn),
            Event::Ended(turn) => {
                self.end(turn);
                self.foretell(turn);
                if let Some(next) = self.trace.turns[turn].next
                    && self.settings.policy == Contender::Belady
                {
                    self.foresee(next);
                }
            }
            Event::DiskDone(key, is_read) => self.disk_done(key, is_read),
            Event::Fault(Fault::PeerDies(peer)) => self.peer_dies(peer),
            Event::Fault(Fault::DiskFails) => {
                // As the daemon does: what waits to be written is no longer.
                self.disk_fails = true;
                self.dirty.clear();
                self.is_dirty.clear();
            }
            Event::Fault(Fault::DiskWorks) => self.disk_works(),
            Event::Rested(death) => self.rested(death),
        }
    }

    /// A conversation's next turn, foretold by its pauses, waits behind all that were told of.
    fn foretell(&mut self, ended: usize) {
        if !self.settings.think_time {
            return;
        }
        let turn = &self.trace.turns[ended];
        let own = self.own_pauses.entry(turn.conversation).or_default();
        let Some(foretold) = self.pauses.foretell(own) else { return };
        let given_up_us = self.now_us + foretold.given_up_after_ms * 1000;
        let ticket = QueueTicket::foretold(self.now_us / 1000 + foretold.returns_after_ms);
        let gone: KeySet = turn.drops.iter().copied().collect();
        let chain = turn.chain.iter().chain(&turn.makes).filter(|key| !gone.contains(*key));
        let chain: Vec<BlockKey> = chain.copied().collect();
        let conversation = turn.conversation;
        self.queue.place(foretold_id(conversation), ticket, &chain, chain.len() as u64);
        self.foretold.insert(conversation, ended);
        self.events.push(Reverse((given_up_us, Event::GivenUp(ended))));
    }

    fn give_up(&mut self, ended: usize) {
        let conversation = self.trace.turns[ended].conversation;
        if self.foretold.get(&conversation) == Some(&ended) {
            self.foretold.remove(&conversation);
            self.queue.remove(foretold_id(conversation));
        }
    }

    fn returned(&mut self, asked: usize) {
        let turn = &self.trace.turns[asked];
        if turn.is_first || !self.settings.think_time {
            return;
        }
        let own = self.own_pauses.entry(turn.conversation).or_default();
        self.pauses.observe(own, (turn.times.asked_us - turn.times.free_us) / 1000);
        if self.foretold.remove(&turn.conversation).is_some() {
            self.queue.remove(foretold_id(turn.conversation));
        }
    }

    fn peer_of(&self, turn: usize) -> u32 {
        let peers = self.settings.faults.map_or(1, |faults| faults.peers);
        self.trace.turns[turn].conversation % peers.max(1)
    }

    /// A runtime dies: what it computed is lost, what it held rests.
    fn peer_dies(&mut self, peer: u32) {
        let mut resting = Resting { peer, ..Resting::default() };
        let of_peer = |turn: &usize| self.peer_of(*turn) == peer;
        let mut running: Vec<usize> = self.running.keys().copied().filter(of_peer).collect();
        let waiting: Vec<usize> = self.waiting.iter().copied().filter(of_peer).collect();
        running.sort_unstable();
        for turn in running {
            resting.pinned.extend(self.running.remove(&turn).unwrap_or_default().pinned);
            self.wait_no_more(turn);
            self.outcome.turns_died += 1;
        }
        for turn in waiting {
            self.queue.remove(TurnId(turn as u128));
        }
        resting.granted = CREDITS.min(self.free());
        self.host_used += resting.granted;
        self.deaths += 1;
        self.resting.insert(self.deaths, resting);
        self.events.push(Reverse((self.now_us + GRACE_US, Event::Rested(self.deaths))));
    }

    /// Its frames are free, and the runtime that took its place tells of the turns that wait.
    fn rested(&mut self, death: u32) {
        let Some(resting) = self.resting.remove(&death) else { return };
        self.host_used -= resting.granted;
        for key in resting.pinned {
            self.unpin(key);
        }
        let of_peer = |turn: &usize| self.peer_of(*turn) == resting.peer;
        let waiting: Vec<usize> = self.waiting.iter().copied().filter(of_peer).collect();
        for turn in waiting {
            if self.settings.policy == Contender::Belady {
                self.foresee(turn);
            } else {
                self.wait(turn, self.trace.turns[turn].times.asked_us);
            }
        }
    }

    fn disk_works(&mut self) {
        self.disk_fails = false;
        let unsaved =
            |(_, block): &(&BlockKey, &Block)| block.host.is_some() && block.disk == OnDisk::Absent;
        let unsaved: Vec<BlockKey> =
            self.directory.iter().filter(unsaved).map(|(key, _)| *key).collect();
        for key in unsaved {
            self.queue_write(&key);
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
        self.retry_hints();
    }

    fn retry_hints(&mut self) {
        self.changed.extend(self.failed_hints.drain());
    }

    fn start(&mut self, index: usize) {
        let turn = &self.trace.turns[index];
        self.queue.remove(TurnId(index as u128));
        self.waiting.remove(&index);
        self.retry_hints();
        let keys: Vec<BlockKey> = if turn.is_named {
            turn.chain.iter().take_while(|key| self.ever.contains(*key)).copied().collect()
        } else {
            turn.chain.clone()
        };
        let needed = keys.len();
        let start = root_of(turn.tenant).into();
        let list = KeyList { start, accept: Accept::Any, keys, tail: Vec::new() };
        let links = self.directory.lookup(&list).links;
        let found = links.iter().zip(&list.keys).take_while(|(link, key)| link.key == **key);
        let found: Vec<BlockKey> = found.map(|(link, _)| link.key).collect();
        let (now_ms, mut running, mut in_host) = (self.now_ms(), Running::default(), 0);
        for key in &found {
            let Some(block) = self.directory.get_mut(key) else { continue };
            let was_reused = std::mem::replace(&mut block.reused, true);
            block.used_ms = now_ms;
            let (is_in_host, is_unsaved) = (block.host.is_some(), block.disk == OnDisk::Absent);
            if !was_reused && is_unsaved {
                self.queue_write(key); // It may not have been worth a write before.
            }
            if is_in_host {
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
            let found = if self.disk_fails { in_host } else { found.len() };
            self.count(turn, needed, found, in_host);
        }
    }

    fn count(&mut self, turn: &Turn, needed: usize, found: usize, in_host: usize) {
        let size = u64::from(self.trace.block_tokens);
        let tokens =
            if turn.is_named { needed as u64 * size } else { u64::from(turn.history_tokens) };
        let of = |blocks: usize| (blocks as u64 * size).min(tokens);
        let of_tenant = self.tenants.entry(turn.tenant).or_default();
        for hits in [&mut self.outcome.hits, of_tenant] {
            hits.turns += 1;
            hits.tokens += tokens;
            hits.tokens_host += of(in_host);
            hits.tokens_disk += of(found) - of(in_host);
            hits.turns_with_history += u64::from(needed > 0);
            if needed > 0 && found == needed {
                hits.turns_host += u64::from(in_host == needed);
                hits.turns_disk += u64::from(in_host < needed);
            }
        }
    }

    /// What the turn had computed is committed, what it pinned is given back.
    fn end(&mut self, index: usize) {
        let turn = &self.trace.turns[index];
        let Some(running) = self.running.remove(&index) else { return }; // It died.
        for key in running.pinned {
            self.unpin(key);
        }
        self.wait_no_more(index);
        for key in &turn.drops {
            self.forget(key);
        }
        let root = root_of(turn.tenant);
        let mut parent = root.as_parent();
        for key in turn.chain.iter().chain(&turn.makes) {
            if !turn.drops.contains(key) {
                self.commit(*key, parent, root);
                parent = *key;
            }
        }
    }

    /// Promotes that come too late are not waited for any more.
    fn wait_no_more(&mut self, index: usize) {
        for key in &self.trace.turns[index].chain {
            if let Some(waiters) = self.waiters.get_mut(key) {
                waiters.retain(|waiter| *waiter != index);
                if waiters.is_empty() {
                    self.waiters.remove(key);
                    self.changed.push(*key);
                }
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

    fn commit(&mut self, key: BlockKey, parent: BlockKey, root: RootKey) {
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
            self.outcome.commits_refused += 1;
            return; // No frame: the block is not kept.
        }
        self.host_used += 1;
        self.outcome.commits += 1;
        if let Some(block) = self.directory.get_mut(&key) {
            (block.used_ms, block.host) = (now_ms, Some(FrameIndex(0)));
            return; // On disk only until now: nothing needs to be written again.
        }
        let (label, tokens) = (Label { root, ..self.label }, Arc::from([]));
        let block = Description { parent, label, tokens, is_full: true };
        self.directory.insert(key, &block, now_ms, FrameIndex(0));
        self.queue_write(&key);
    }

    fn forget(&mut self, key: &BlockKey) {
        let Some(block) = self.directory.remove(key, MissReason::Evicted) else { return };
        self.host_used -= u64::from(block.host.is_some());
        // A write under way ends by finding the block gone.
        self.disk_used -= u64::from(block.is_stored());
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
        let promote = self.choose_promote()?;
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
            if !is_waiting {
                continue;
            }
            if let Err(reason) = self.choose_write(&key, self.label.disk_bytes) {
                self.outcome.writes_spared += u64::from(reason == Unwritten::Budget);
                continue;
            }
            if let Some(block) = self.directory.get_mut(&key) {
                block.disk = OnDisk::Writing;
            }
            self.disk_used += 1;
            return Some((key, false));
        }
        None
    }

    fn disk_done(&mut self, key: BlockKey, is_read: bool) {
        self.disk_job = None;
        self.changed.push(key);
        let failed = self.disk_fails;
        self.outcome.disk_errors += u64::from(failed);
        self.outcome.writes += u64::from(!is_read && !failed);
        let Some(block) = self.directory.get_mut(&key) else {
            // Forgotten meanwhile: its room is free again.
            *(if is_read { &mut self.host_used } else { &mut self.disk_used }) -= 1;
            return;
        };
        match (is_read, failed) {
            (false, false) => block.disk = OnDisk::Stored,
            (false, true) => {
                block.disk = OnDisk::Absent;
                self.disk_used -= 1;
            }
            (true, false) => {
                block.host = Some(FrameIndex(0));
                for waiter in self.waiters.remove(&key).unwrap_or_default() {
                    if let Some(running) = self.running.get_mut(&waiter) {
                        *self.pins.entry(key).or_default() += 1;
                        running.pinned.push(key);
                    }
                }
            }
            (true, true) => {
                self.host_used -= 1;
                // A lookup that waited goes on without it.
                if self.waiters.remove(&key).is_none() {
                    self.failed_hints.insert(key);
                }
            }
        }
    }

    fn free(&self) -> u64 {
        self.host_blocks.saturating_sub(self.host_used)
    }

    /// Panics where the tiers are not what the directory says.
    #[cfg(test)]
    fn self_check(&mut self) {
        self.refresh();
        self.directory.self_check();
        self.index.self_check();
        let blocks = || self.directory.iter().map(|(_, block)| block);
        let in_host = blocks().filter(|block| block.host.is_some()).count() as u64;
        let reading = u64::from(self.disk_job.is_some_and(|(_, is_read)| is_read));
        let resting: u64 = self.resting.values().map(|resting| resting.granted).sum();
        assert_eq!(self.host_used, in_host + reading + resting, "frames");
        assert!(self.host_used <= self.host_blocks, "more frames than there are");
        let on_disk = blocks().filter(|block| block.disk != OnDisk::Absent).count() as u64;
        let is_lost = |(key, is_read): (BlockKey, bool)| {
            !is_read && self.directory.get(&key).is_none_or(|b| b.disk == OnDisk::Absent)
        };
        let lost = u64::from(self.disk_job.is_some_and(is_lost)); // Written for nobody.
        assert_eq!(self.disk_used, on_disk + lost, "room on disk");
        assert!(self.disk_used <= self.disk_blocks, "more on disk than fits");
        for key in self.pins.keys() {
            let block = self.directory.get(key);
            assert!(block.is_none_or(|block| block.host.is_some()), "{key} is pinned in no frame");
        }
    }
}

impl Tiers for Replay<'_> {
    fn catalogue(&mut self) -> Catalogue<'_> {
        Catalogue {
            directory: &mut self.directory,
            queue: &mut self.queue,
            index: &mut self.index,
            retentions: &mut self.retentions,
            budget: &mut self.budget,
        }
    }

    fn now_ms(&self) -> u64 {
        self.now_us / 1000
    }

    fn take_changed(&mut self) -> Vec<BlockKey> {
        std::mem::take(&mut self.changed)
    }

    fn is_asked_for(&self, key: &BlockKey) -> bool {
        self.disk_job == Some((*key, true)) || self.waiters.contains_key(key)
    }

    fn in_host(&self, key: &BlockKey, block: &Block) -> Residence {
        let is_held = self.pins.contains_key(key) || self.disk_job == Some((*key, false));
        match block.host {
            Some(_) if is_held => Residence::Held,
            Some(_) => Residence::Free,
            None if self.is_asked_for(key) || self.failed_hints.contains(key) => Residence::Held,
            None => Residence::Absent,
        }
    }

    fn frames(&self) -> Frames {
        Frames { all: self.host_blocks as u32, free: self.free() as u32, coming: 0 }
    }

    fn can_write(&self) -> bool {
        self.disk_blocks > 0 && !self.disk_fails
    }

    fn queue_write(&mut self, key: &BlockKey) {
        if self.can_write() && self.is_dirty.insert(*key) {
            self.dirty.push_back(*key);
        }
    }

    fn free_frame(&mut self, key: &BlockKey) {
        let Some(block) = self.directory.get_mut(key) else { return };
        block.host = None;
        if !block.is_stored() {
            self.directory.remove(key, MissReason::Evicted);
        }
        self.host_used -= 1;
        self.outcome.evictions_host += 1;
    }

    fn disk_room(&self, _: u64) -> DiskRoom {
        if self.disk_blocks == 0 {
            DiskRoom::Never
        } else if self.disk_used >= self.disk_blocks {
            DiskRoom::Full
        } else {
            DiskRoom::Fits
        }
    }

    fn drop_from_disk(&mut self, key: &BlockKey) {
        let Some(block) = self.directory.get_mut(key) else { return };
        block.disk = OnDisk::Absent;
        if block.host.is_none() {
            self.directory.remove(key, MissReason::Evicted);
        }
        self.disk_used -= 1;
        self.outcome.evictions_disk += 1;
    }
}
