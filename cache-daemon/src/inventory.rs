//! The inventory feed: which conversations are here, and where their KV is, told to routers as it changes.
//!
//! ```text
//! snapshot {epoch, sequence}, conversations, totals, snapshot_end │ changes, each one sequence further │ end {reason}
//! ```
//!
//! What was told of each conversation is kept and compared with what is so, some of it in each step: a turn's
//! end shows at once, a block that moved when the comparison comes round to its conversation. The loop does
//! a bounded piece of that at a time, and nothing while nobody listens.
//!
//! **Invariants**
//! - A subscriber gets the changes behind its snapshot's sequence without a gap, or its stream ends.
//! - Lines count in their order: the last one of a conversation holds, in the snapshot too.
//! - No subscriber delays the loop: one that does not read is ended.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use kv_protocol::{ConversationId, RootKey};
use serde::Serialize;
use tokio::sync::mpsc;

/// Subscribers at once; more are answered 503. A fleet has a few routers.
pub const SUBSCRIBERS_MAX: usize = 16;
/// Lines that may wait for a subscriber: some hundred bytes each, a megabyte together.
pub const BACKLOG_LINES_MAX: usize = 4096;
/// Lines of a snapshot go out while this much of the backlog is free for changes.
const CHANGES_RESERVED: usize = BACKLOG_LINES_MAX / 2;
/// While somebody listens, the loop comes by this often.
pub const STEP_EVERY: Duration = Duration::from_millis(20);
/// Blocks looked at in one step, half a millisecond's work; at most one conversation more.
const STEP_BLOCKS: usize = 4096;
/// Conversations looked at in one step, whatever they have.
const STEP_CONVERSATIONS: usize = 1024;
/// Conversations of one page of the walk.
const PAGE: usize = 256;
/// A subscriber that hears nothing for so long cannot tell silence from death.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);

/// Place in the order of last use.
pub type Age = (u64, ConversationId);

/// One conversation, as it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Model and tenant.
    pub root: RootKey,
    /// Of its history.
    pub tokens: u32,
    /// Of its blocks in frames.
    pub host_bytes: u64,
    /// Of its blocks on disk; a block may be in both.
    pub disk_bytes: u64,
    /// When its last turn ended, Unix milliseconds.
    pub used_ms: u64,
    /// How many blocks were looked at to say this.
    pub blocks: usize,
}

/// All of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Totals {
    /// Conversations on record.
    pub conversations: u64,
    /// Bytes of frames with blocks, conversations' or not.
    pub host_bytes: u64,
    /// Bytes of blocks on disk.
    pub disk_bytes: u64,
}

/// What there is to tell of.
pub trait Stock {
    /// Conversations last used before `age`, the latest first, at most `count`.
    fn before(&self, age: Option<Age>, count: usize) -> Vec<Age>;
    /// One of them.
    fn entry(&self, id: &ConversationId) -> Option<Entry>;
    /// All of them.
    fn totals(&self) -> Totals;
}

/// Why a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The subscriber does not read as fast as things change.
    TooSlow,
    /// The worker ends.
    Stopping,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line<'a> {
    Snapshot {
        epoch: &'a str,
        sequence: u64,
    },
    SnapshotEnd {
        conversations: usize,
    },
    Conversation {
        #[serde(skip_serializing_if = "Option::is_none")]
        sequence: Option<u64>,
        id: String,
        root: String,
        tokens: u32,
        host_bytes: u64,
        disk_bytes: u64,
        used_ms: u64,
    },
    Gone {
        sequence: u64,
        id: String,
    },
    Totals {
        #[serde(skip_serializing_if = "Option::is_none")]
        sequence: Option<u64>,
        #[serde(flatten)]
        totals: Totals,
    },
    Heartbeat {
        sequence: u64,
    },
    End {
        reason: End,
        sequence: u64,
    },
}

impl Line<'_> {
    fn conversation(id: &ConversationId, entry: &Entry, sequence: Option<u64>) -> Self {
        let Entry { root, tokens, host_bytes, disk_bytes, used_ms, .. } = *entry;
        let (id, root) = (hex(&id.0), hex(&root.0));
        Line::Conversation { sequence, id, root, tokens, host_bytes, disk_bytes, used_ms }
    }

    fn bytes(&self) -> Bytes {
        let mut line = serde_json::to_vec(self).expect("numbers and plain text are JSON");
        line.push(b'\n');
        line.into()
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // To a string: cannot fail.
        text
    })
}

/// The loop's end of a stream.
#[derive(Debug)]
pub struct Subscriber {
    lines: mpsc::Sender<Bytes>,
    end: mpsc::Sender<Bytes>,
    place: Place,
}

/// How far a subscriber is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Waits until all conversations are known.
    Waiting,
    /// Has got the snapshot up to here.
    Snapshot(Option<ConversationId>),
    /// Has got all of it.
    Live,
}

/// The reader's end: lines, then the last one.
#[derive(Debug)]
pub struct Subscription {
    /// What happens.
    pub lines: mpsc::Receiver<Bytes>,
    /// Why nothing more does.
    pub end: mpsc::Receiver<Bytes>,
}

/// Both ends of a stream.
pub fn subscribe() -> (Subscriber, Subscription) {
    let (lines, lines_out) = mpsc::channel(BACKLOG_LINES_MAX);
    let (end, end_out) = mpsc::channel(1);
    (
        Subscriber { lines, end, place: Place::Waiting },
        Subscription { lines: lines_out, end: end_out },
    )
}

impl Subscriber {
    /// `false` if it is behind, or gone.
    fn send(&self, line: &Bytes) -> bool {
        self.lines.try_send(line.clone()).is_ok()
    }

    fn end(self, reason: End, sequence: u64) {
        let _ = self.end.try_send(Line::End { reason, sequence }.bytes()); // Gone already is as good.
    }
}

/// How far a walk through all conversations is, from the latest back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Walk {
    Over,
    From(Option<Age>),
}

/// See the module.
#[derive(Debug)]
pub struct Inventory {
    /// Another one with every start of a worker: sequences of different epochs have nothing in common.
    epoch: String,
    sequence: u64,
    new: Receiver<Subscriber>,
    subscribers: Vec<Subscriber>,
    told: BTreeMap<ConversationId, Entry>,
    totals: Totals,
    /// The walk through all conversations, when there may be some that were not told of.
    walk: Walk,
    /// Whether there was a whole walk.
    is_complete: bool,
    /// The latest use that was told of.
    newest_ms: u64,
    /// How far the comparison is.
    compared: Option<ConversationId>,
    stepped_at: Option<Instant>,
    spoke_at: Option<Instant>,
}

impl Inventory {
    /// Nobody listens; those who want to come from `new`.
    pub fn new(new: Receiver<Subscriber>) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            epoch: format!("{:016x}", since.as_nanos() as u64),
            sequence: 0,
            new,
            subscribers: Vec::new(),
            told: BTreeMap::new(),
            totals: Totals::default(),
            walk: Walk::Over,
            is_complete: false,
            newest_ms: 0,
            compared: None,
            stepped_at: None,
            spoke_at: None,
        }
    }

    /// How long the loop may rest.
    pub fn rest_max(&self, otherwise: Duration) -> Duration {
        if self.subscribers.is_empty() { otherwise } else { otherwise.min(STEP_EVERY) }
    }

    /// A bounded piece of work, if it is time for one; `true` if the next should follow at once.
    pub fn step(&mut self, stock: &impl Stock, now: Instant) -> bool {
        self.subscribers.retain(|subscriber| !subscriber.lines.is_closed());
        while let Ok(subscriber) = self.new.try_recv() {
            self.subscribers.push(subscriber);
        }
        if self.subscribers.is_empty() {
            self.forget();
            return false;
        }
        let is_early = self.stepped_at.is_some_and(|at| now.duration_since(at) < STEP_EVERY);
        if is_early && self.walk == Walk::Over && self.is_complete {
            return false;
        }
        self.stepped_at = Some(now);
        // A half for each: long conversations that were used last, looked at in every step, must not keep the
        // walk from going on.
        let half = || Budget { blocks: STEP_BLOCKS / 2, conversations: STEP_CONVERSATIONS / 2 };
        if self.is_complete {
            self.tell_latest(stock, &mut half());
        } else {
            self.begin_walk();
        }
        let mut budget = half();
        self.walk(stock, &mut budget);
        if self.is_complete {
            self.compare(stock, &mut budget);
            self.tell_totals(stock.totals());
            self.tell_snapshots();
            self.beat(now);
        }
        self.walk != Walk::Over
    }

    /// The worker ends: so do the streams.
    pub fn stop(&mut self) {
        for subscriber in self.subscribers.drain(..) {
            subscriber.end(End::Stopping, self.sequence);
        }
    }

    fn forget(&mut self) {
        if self.is_complete || self.walk != Walk::Over {
            self.told.clear();
            (self.walk, self.is_complete, self.newest_ms) = (Walk::Over, false, 0);
            self.compared = None;
        }
    }

    /// What was used since the last step. Not those beyond the budget: the comparison finds them.
    fn tell_latest(&mut self, stock: &impl Stock, budget: &mut Budget) {
        let newest_ms = self.newest_ms;
        let latest = stock.before(None, PAGE).into_iter();
        for (_, id) in latest.take_while(|(used_ms, _)| *used_ms >= newest_ms) {
            if budget.is_left() {
                self.look(stock, id, budget);
            }
        }
    }

    fn begin_walk(&mut self) {
        if self.walk == Walk::Over {
            self.walk = Walk::From(None);
        }
    }

    /// Goes on through all conversations, and tells of those that nobody heard of.
    fn walk(&mut self, stock: &impl Stock, budget: &mut Budget) {
        while let Walk::From(from) = self.walk
            && budget.is_left()
        {
            let page = stock.before(from, PAGE);
            if page.is_empty() {
                (self.walk, self.is_complete) = (Walk::Over, true);
            }
            for age in page {
                if !budget.is_left() {
                    return;
                }
                self.look(stock, age.1, budget);
                self.walk = Walk::From(Some(age));
            }
        }
    }

    /// Compares some of what was told with what is so.
    fn compare(&mut self, stock: &impl Stock, budget: &mut Budget) {
        while budget.is_left() {
            let from = self.compared.map_or(Bound::Unbounded, Bound::Excluded);
            let next = self.told.range((from, Bound::Unbounded)).next().map(|(id, _)| *id);
            self.compared = next;
            let Some(id) = next else {
                if stock.totals().conversations != self.told.len() as u64 {
                    self.begin_walk();
                }
                return;
            };
            self.look(stock, id, budget);
        }
    }

    /// Tells what has changed of one conversation.
    fn look(&mut self, stock: &impl Stock, id: ConversationId, budget: &mut Budget) {
        let entry = stock.entry(&id);
        budget.take(entry.map_or(0, |entry| entry.blocks));
        match entry {
            Some(entry) if self.told.get(&id) != Some(&entry) => {
                self.newest_ms = self.newest_ms.max(entry.used_ms);
                self.told.insert(id, entry);
                self.tell(|sequence| Line::conversation(&id, &entry, Some(sequence)));
            }
            None if self.told.remove(&id).is_some() => {
                self.tell(|sequence| Line::Gone { sequence, id: hex(&id.0) });
            }
            Some(_) | None => {}
        }
    }

    fn tell_totals(&mut self, totals: Totals) {
        if self.totals != totals {
            self.totals = totals;
            self.tell(|sequence| Line::Totals { sequence: Some(sequence), totals });
        }
    }

    /// One change, to all who have at least begun.
    fn tell<'a>(&mut self, line: impl FnOnce(u64) -> Line<'a>) {
        self.sequence += 1;
        let line = line(self.sequence).bytes();
        self.send_all(&line);
    }

    fn send_all(&mut self, line: &Bytes) {
        let hears = |subscriber: &Subscriber| subscriber.place != Place::Waiting;
        let is_behind = |subscriber: &mut Subscriber| hears(subscriber) && !subscriber.send(line);
        for subscriber in self.subscribers.extract_if(.., is_behind) {
            tracing::warn!("a subscriber of the inventory does not read; its stream ends");
            subscriber.end(End::TooSlow, self.sequence);
        }
    }

    /// Goes on with the snapshots of those who have not got theirs, as far as they read.
    fn tell_snapshots(&mut self) {
        let Self { subscribers, told, totals, epoch, sequence, .. } = self;
        for subscriber in subscribers {
            while subscriber.lines.capacity() > CHANGES_RESERVED && subscriber.place != Place::Live
            {
                let Place::Snapshot(from) = subscriber.place else {
                    subscriber.send(&Line::Snapshot { epoch, sequence: *sequence }.bytes());
                    subscriber.place = Place::Snapshot(None);
                    continue;
                };
                let from = from.map_or(Bound::Unbounded, Bound::Excluded);
                if let Some((id, entry)) = told.range((from, Bound::Unbounded)).next() {
                    subscriber.send(&Line::conversation(id, entry, None).bytes());
                    subscriber.place = Place::Snapshot(Some(*id));
                } else {
                    subscriber.send(&Line::Totals { sequence: None, totals: *totals }.bytes());
                    subscriber.send(&Line::SnapshotEnd { conversations: told.len() }.bytes());
                    subscriber.place = Place::Live;
                }
            }
        }
    }

    fn beat(&mut self, now: Instant) {
        if self.spoke_at.is_none_or(|at| now.duration_since(at) >= HEARTBEAT_EVERY) {
            self.spoke_at = Some(now);
            let line = Line::Heartbeat { sequence: self.sequence }.bytes();
            self.send_all(&line);
        }
    }
}

/// What is left of a step.
struct Budget {
    blocks: usize,
    conversations: usize,
}

impl Budget {
    fn is_left(&self) -> bool {
        self.blocks > 0 && self.conversations > 0
    }

    fn take(&mut self, blocks: usize) {
        self.blocks = self.blocks.saturating_sub(blocks);
        self.conversations = self.conversations.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests;
