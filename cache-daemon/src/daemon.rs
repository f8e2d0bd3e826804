//! The loop that owns all state: select → apply → maintain. Everything else sends it events.
//!
//! Its drawback: one slow step delays all attachments. So no step waits (disk and sockets are on threads of
//! their own) and each is bounded by the size of one message, except re-formats and re-claims, which
//! walk all frames and are rare.

mod asks;
mod transfers;

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kv_protocol::handshake::{Hello, Refusal, Welcome};
use kv_protocol::layout::ATTACHMENTS_MAX;
use kv_protocol::message::{ANTICIPATED_FOR, FoundBlock, Hint, KeyList, SequenceTag, Ticket, Tier};
use kv_protocol::sync::Ordering;
use kv_protocol::table::{AttachmentState, RegionView};
use kv_protocol::{AttachmentId, ConversationId, MissReason, Submission};

use crate::admin::{AskError, Deleted, Reply};
use crate::attachment::{Attachment, Fetch, Outgoing, ProtocolError, Resting, Waiting};
use crate::inventory::Inventory;
use crate::listen::PeerEvent;
use crate::metrics::{BlockCounts, DeletionStatus, DiskStatus, Metrics, Snapshot};
use crate::store::Store;
use crate::tier::disk::{DiskError, DiskUsage, Done, Job, RECLAIMING, StoredBlock};
use crate::tier::host::HostTier;
use crate::tier::remote::Remote;
use crate::tombstone::Tombstone;
use crate::transfer::{Arrival, DiskState, Waiter};

/// How long frames of a dead peer rest: a DMA that it started may still be running.
pub const GRACE: Duration = Duration::from_secs(2);
/// How long a restarted worker keeps what a runtime holds until that runtime comes back.
pub const LEASE: Duration = Duration::from_secs(10);
/// How long a runtime with another geometry waits for blocks of the old one to be written.
const REFORMAT_FLUSH_MAX: Duration = Duration::from_secs(2);
/// How long the end may take: less than what is left of a pod's grace period after its runtime.
const STOP_MAX: Duration = Duration::from_secs(20);
/// A worker whose disk tier failed ends after this, to start clean; host frames survive that.
const FAILED_DISK_MAX: Duration = Duration::from_mins(1);
/// The loop turns at least this often, for leases, idle tails and time to live.
const TURN_MAX: Duration = Duration::from_millis(200);
/// Expiry walks the directory this often.
const EXPIRE_EVERY: Duration = Duration::from_secs(1);
/// While there is work, the state that http shows may be this old: showing it costs more than most messages.
const PUBLISH_EVERY: Duration = Duration::from_millis(20);
/// Events applied before maintenance gets its turn.
const EVENTS_PER_TURN: usize = 512;

/// Why the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Asked to, and everything was written in time or not.
    Stopped,
    /// To start clean, since the disk tier failed a while ago.
    DiskFailed,
}

/// Something to apply.
enum Event {
    Peer(PeerEvent),
    Found(Vec<StoredBlock>),
    Disk(Done),
    Submission(AttachmentId, Result<(Submission, Vec<u8>), ProtocolError>),
}

/// Who waits for a record.
enum Asker {
    /// A runtime: its place, which attachment there, its ticket.
    Runtime(AttachmentId, u32, Ticket),
    /// The admin API, which is also told when the record was put.
    Admin(u64, Reply<(Arc<[u8]>, u64)>),
    /// An export, or an offload.
    Transfer(transfers::RecordReply),
}

/// See the module.
pub struct Daemon {
    view: RegionView,
    store: Store,
    metrics: Arc<Metrics>,
    peers: Receiver<PeerEvent>,
    disk_done: Receiver<Done>,
    inventory: Inventory,
    attachments: [Option<Attachment>; ATTACHMENTS_MAX],
    resting: Vec<Resting>,
    /// Attachment whose ring is looked at first: none starves.
    next_attachment: usize,
    /// Deletions that are answered when their tombstone is on disk.
    deleting: HashMap<ConversationId, Vec<(Deleted, Reply<Deleted>)>>,
    /// Who waits for the end of a compaction.
    compacting: Option<Reply<DiskUsage>>,
    /// Questions for records that are being read.
    questions: HashMap<ConversationId, Vec<Asker>>,
    queue_changed: bool,
    reformat_since: Option<Instant>,
    stop_since: Option<Instant>,
    flush: Flush,
    disk_failed_since: Option<Instant>,
    expired_at: Instant,
    published_at: Option<Instant>,
    remote: Option<Remote>,
    /// How long ago conversations that are offloaded at the end may have been used.
    remote_on_stop: Option<Duration>,
    offloading: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flush {
    NotAsked,
    Asked,
    Done,
}

impl Daemon {
    /// Over a mapped region and a store; what an earlier worker left in the region is adopted.
    pub fn new(
        view: RegionView,
        mut store: Store,
        metrics: Arc<Metrics>,
        peers: Receiver<PeerEvent>,
        disk_done: Receiver<Done>,
        inventory: Inventory,
    ) -> Self {
        view.worker_starts().fetch_add(1, Ordering::Relaxed);
        store.adopt_region(&view);
        let lease = Instant::now() + LEASE;
        let left_behind = |id: &AttachmentId| view.attachment_state(*id) != AttachmentState::Vacant;
        let resting: Vec<Resting> = AttachmentId::all()
            .filter(left_behind)
            .map(|id| Resting { id, until: lease })
            .collect();
        for rest in &resting {
            view.set_attachment_state(rest.id, AttachmentState::Resting);
        }
        let mut daemon = Self {
            view,
            store,
            metrics,
            peers,
            disk_done,
            inventory,
            attachments: [const { None }; ATTACHMENTS_MAX],
            resting,
            next_attachment: 0,
            deleting: HashMap::new(),
            compacting: None,
            questions: HashMap::new(),
            queue_changed: true,
            reformat_since: None,
            stop_since: None,
            flush: Flush::NotAsked,
            disk_failed_since: None,
            expired_at: Instant::now(),
            published_at: None,
            remote: None,
            remote_on_stop: None,
            offloading: false,
        };
        daemon.publish_at_times(false);
        daemon
    }

    /// With a remote tier; at the end, conversations used within `on_stop` are offloaded.
    #[must_use]
    pub fn with_remote(self, remote: Option<Remote>, on_stop: Option<Duration>) -> Self {
        Self { remote, remote_on_stop: on_stop, ..self }
    }

    /// Turns until asked to stop.
    pub fn run(mut self) -> Ended {
        loop {
            let seen = self.view.daemon_doorbell().seen();
            let mut busy = false;
            for _ in 0..EVENTS_PER_TURN {
                let Some(event) = self.select() else { break };
                self.apply(event);
                busy = true;
            }
            busy |= self.maintain();
            self.publish_at_times(busy);
            if let Some(ended) = self.ended() {
                tracing::info!(?ended, "worker ends");
                self.inventory.stop();
                self.store.disk.join();
                return ended;
            }
            if !busy {
                self.view.daemon_doorbell().wait(seen, self.inventory.rest_max(TURN_MAX));
            }
        }
    }

    /// The next event: peers first, then the disk, then the rings in turn.
    fn select(&mut self) -> Option<Event> {
        if let Ok(event) = self.peers.try_recv() {
            return Some(Event::Peer(event));
        }
        if let Some(blocks) = self.store.disk.found() {
            return Some(Event::Found(blocks));
        }
        if let Ok(done) = self.disk_done.try_recv() {
            return Some(Event::Disk(done));
        }
        for offset in 0..ATTACHMENTS_MAX {
            let place = (self.next_attachment + offset) % ATTACHMENTS_MAX;
            let Some(attachment) = &mut self.attachments[place] else { continue };
            if let Some(next) = attachment.next(&self.view).transpose() {
                self.next_attachment = place + 1;
                return Some(Event::Submission(attachment.id, next));
            }
        }
        None
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Peer(PeerEvent::Hello { hello, socket, reply }) => {
                let answer = self.attach(&hello, socket);
                if let Err(refusal) = answer {
                    self.metrics.refusals.with_label_values(&[refusal_label(refusal)]).inc();
                }
                let _ = reply.send(answer); // Hung up meanwhile: its thread reports the end.
            }
            Event::Peer(PeerEvent::Ask(ask)) => self.ask(ask),
            Event::Peer(PeerEvent::Transfer(ask)) => self.answer_transfer(ask),
            Event::Peer(PeerEvent::Gone { id, incarnation }) => self.gone(id, incarnation),
            Event::Peer(PeerEvent::Terminate) => {
                if self.stop_since.is_none() {
                    self.stop_since = Some(Instant::now());
                    self.begin_offload();
                }
                self.store.transfers.write_tails();
            }
            Event::Found(blocks) => self.store.found_on_disk(blocks),
            Event::Disk(done) => self.disk_done(done),
            Event::Submission(id, submission) => {
                let applied = submission
                    .and_then(|(submission, bytes)| self.submission(id, submission, bytes));
                if let Err(error) = applied {
                    self.detach_broken(id, &error);
                }
            }
        }
    }

    /// Restores what must hold between turns: free frames ahead of demand, credits granted, answers
    /// sent, leases honoured. `true` if that made work for somebody, or there is more to do.
    fn maintain(&mut self) -> bool {
        let now = Instant::now();
        let now_ms = unix_ms();
        self.store.directory.tell_time(now_ms);
        self.end_leases(now);
        if now.duration_since(self.expired_at) >= EXPIRE_EVERY {
            self.expired_at = now;
            self.store.expire(now_ms);
            self.delete_remote_again();
            self.end_anticipations(now);
        }
        if self.stop_since.is_some() {
            self.store.transfers.write_tails(); // Commits still come.
        }
        let settling = self.store.settle_loaded();
        if settling && self.store.transfers.disk_state == DiskState::Ready {
            self.hint_all(); // Their tails may be known now.
        }
        if let Some(host) = &mut self.store.host {
            host.serve_up_to(self.view.faulted_bytes().load(Ordering::Relaxed));
        }
        let queue_changed = std::mem::take(&mut self.queue_changed);
        let failed = self.store.begin_moves(queue_changed, now_ms);
        for arrival in failed {
            self.arrived(&arrival);
        }
        let mut rung = settling | self.inventory.step(&self.store, now);
        for id in AttachmentId::all() {
            match self.serve(id) {
                Ok(served) => rung |= served,
                Err(error) => self.detach_broken(id, &error),
            }
        }
        rung
    }

    /// Grants credits and sends answers.
    fn serve(&mut self, id: AttachmentId) -> Result<bool, ProtocolError> {
        let Some(attachment) = &mut self.attachments[id.index()] else { return Ok(false) };
        let granted = match &mut self.store.host {
            Some(host) => attachment.grant(&self.view, host)?,
            None => false,
        };
        let sent = attachment.flush(&self.view)?;
        if granted || sent {
            self.view.doorbell(id).ring();
        }
        Ok(granted || sent)
    }

    fn attach(&mut self, hello: &Hello, socket: UnixStream) -> Result<Welcome, Refusal> {
        if self.stop_since.is_some() {
            return Err(Refusal::Stopping);
        }
        // The same process again, before or after we saw the end of its last connection.
        for id in AttachmentId::all() {
            if self.view.client(id) != hello.client {
                continue;
            }
            if let Some(old) = self.leave(id) {
                old.hang_up();
                self.rest(id, Instant::now() + GRACE);
            }
            if hello.quiescent {
                self.reclaim(id);
            } else if let Some(rest) = self.resting.iter_mut().find(|rest| rest.id == id) {
                rest.until = rest.until.min(Instant::now() + GRACE);
            }
        }
        self.prepare_geometry(hello)?;
        let vacant = |id: &AttachmentId| {
            self.attachments[id.index()].is_none() && self.resting.iter().all(|rest| rest.id != *id)
        };
        let id = AttachmentId::all().find(vacant).ok_or(Refusal::Full)?;
        let incarnation = self.view.open_attachment(id, hello.client);
        self.view.set_fingerprint(&hello.fingerprint);
        self.attachments[id.index()] = Some(Attachment::new(id, hello.client, incarnation, socket));
        self.metrics.attaches.inc();
        tracing::info!(id = id.index(), incarnation, model = %hello.fingerprint, "attached");
        if let Err(error) = self.serve(id) {
            tracing::error!(%error, "a fresh attachment is broken");
        }
        Ok(Welcome {
            attachment: id,
            incarnation,
            region_bytes: self.view.region().bytes(),
            format_epoch: self.view.format_epoch(),
        })
    }

    /// Formats the region if this runtime's blocks have another shape, and nobody uses the old ones.
    fn prepare_geometry(&mut self, hello: &Hello) -> Result<(), Refusal> {
        if self.store.geometry() == Some(&hello.geometry) {
            return Ok(());
        }
        let layout = kv_protocol::RegionLayout::new(self.view.region().bytes(), hello.geometry);
        if let Err(error) = layout {
            tracing::error!(%error, "attach refused");
            return Err(Refusal::RegionTooSmall);
        }
        let attached = self.attachments.iter().any(Option::is_some) || !self.resting.is_empty();
        let since = *self.reformat_since.get_or_insert_with(Instant::now);
        self.store.transfers.write_tails();
        let waited = since.elapsed() >= REFORMAT_FLUSH_MAX;
        let unsaved = self.store.is_busy() && !waited;
        let in_use = self.store.host.as_ref().is_some_and(super::tier::host::HostTier::any_in_use);
        if attached || in_use || unsaved {
            return Err(Refusal::GeometryBusy);
        }
        self.reformat_since = None;
        if self.store.format(&self.view, hello.geometry) {
            Ok(())
        } else {
            Err(Refusal::RegionTooSmall)
        }
    }

    fn gone(&mut self, id: AttachmentId, incarnation: u32) {
        let is_present = self.attachments[id.index()]
            .as_ref()
            .is_some_and(|attachment| attachment.incarnation == incarnation);
        if is_present {
            tracing::info!(id = id.index(), incarnation, "detached");
            self.leave(id);
            self.rest(id, Instant::now() + GRACE);
        }
    }

    fn detach_broken(&mut self, id: AttachmentId, error: &ProtocolError) {
        tracing::error!(id = id.index(), %error, "detached: the peer wrote nonsense");
        self.metrics.protocol_errors.inc();
        if let Some(attachment) = self.leave(id) {
            attachment.hang_up();
            self.rest(id, Instant::now() + GRACE);
        }
    }

    /// Ends an attachment; its turns wait no more.
    fn leave(&mut self, id: AttachmentId) -> Option<Attachment> {
        let attachment = self.attachments[id.index()].take()?;
        for (tag, waiting) in &attachment.sequences {
            self.store.turn_left(attachment.turn(*tag));
            if let Some(fetch) = &waiting.fetch {
                self.store.count_given_up(fetch);
            }
        }
        Some(attachment)
    }

    fn rest(&mut self, id: AttachmentId, until: Instant) {
        self.view.set_attachment_state(id, AttachmentState::Resting);
        self.queue_changed = true;
        self.resting.push(Resting { id, until });
    }

    fn reclaim(&mut self, id: AttachmentId) {
        self.resting.retain(|rest| rest.id != id);
        if let Some(host) = &mut self.store.host {
            host.reclaim(id);
        }
        self.view.set_attachment_state(id, AttachmentState::Vacant);
    }

    fn end_leases(&mut self, now: Instant) {
        let over: Vec<AttachmentId> =
            self.resting.iter().filter(|rest| rest.until <= now).map(|rest| rest.id).collect();
        for id in over {
            tracing::info!(id = id.index(), "frames of a gone runtime reclaimed");
            self.reclaim(id);
        }
    }

    /// Turns that were foretold and did not come wait no more. Their key lists stay until the runtime ends
    /// them: it may still ask.
    fn end_anticipations(&mut self, now: Instant) {
        for attachment in self.attachments.iter_mut().flatten() {
            let is_over = |waiting: &Waiting| {
                let told_at = waiting.told_at.filter(|_| waiting.hint == Some(Hint::Anticipated));
                told_at.is_some_and(|at| now.duration_since(at) >= 2 * ANTICIPATED_FOR)
            };
            let over = attachment.sequences.iter().filter(|(_, waiting)| is_over(waiting));
            let over: Vec<SequenceTag> = over.map(|(tag, _)| *tag).collect();
            for tag in over {
                self.store.turn_left(attachment.turn(tag));
                if let Some(waiting) = attachment.sequences.get_mut(&tag) {
                    waiting.hint = None;
                }
                self.queue_changed = true;
            }
        }
    }

    fn submission(
        &mut self,
        id: AttachmentId,
        submission: Submission,
        bytes: Vec<u8>,
    ) -> Result<(), ProtocolError> {
        let now_ms = unix_ms();
        let Some(attachment) = &mut self.attachments[id.index()] else { return Ok(()) };
        match submission {
            Submission::Hint { sequence, hint, keys } => {
                self.metrics.hints.inc();
                let list = keys.map(|_| KeyList::decode(&bytes)).transpose()?;
                let turn = attachment.turn(sequence);
                if let Some(waiting) = attachment.sequence(sequence) {
                    let is_first = waiting.hint.replace(hint).is_none() || list.is_some();
                    waiting.told_at = Some(Instant::now());
                    waiting.foretell(hint, &self.metrics);
                    if let Some(list) = list {
                        waiting.list = Some(Arc::new(list));
                    }
                    match &waiting.list {
                        Some(list) if is_first => self.store.hint(turn, hint, list),
                        _ => self.store.hint_again(turn, hint),
                    }
                    self.queue_changed = true;
                }
            }
            Submission::Lookup { sequence, keys } => {
                self.metrics.lookups.inc();
                let list = keys.map(|_| KeyList::decode(&bytes)).transpose()?.map(Arc::new);
                let known = attachment.sequences.get(&sequence).and_then(|w| w.list.clone());
                let list = list.or(known).ok_or(ProtocolError::UnknownSequence(sequence.0))?;
                let incarnation = attachment.incarnation;
                let waiter = Waiter { id, incarnation, sequence, index: 0 };
                let found = self.store.lookup(waiter, &list, now_ms);
                if let Some(reason) = found.miss {
                    self.metrics.misses.with_label_values(&[reason.label()]).inc();
                }
                if let Some(waiting) = attachment.sequence(sequence) {
                    waiting.list = Some(list);
                    waiting.fetch = Fetch::of(&found);
                    waiting.came(&self.metrics);
                }
                attachment.answer(Outgoing::Found {
                    sequence,
                    blocks: found.pinned,
                    on_disk: found.on_disk as u32,
                    miss: found.miss,
                });
            }
            Submission::End { sequence } => {
                self.store.turn_left(attachment.turn(sequence));
                if let Some(mut ended) = attachment.sequences.remove(&sequence) {
                    ended.left(&self.metrics);
                    if let Some(fetch) = ended.fetch {
                        self.store.count_given_up(&fetch);
                        for block in fetch.arrived {
                            if let Some(host) = &mut self.store.host {
                                host.unpin(block.handle, id)?;
                            }
                        }
                    }
                }
                self.queue_changed = true;
            }
            Submission::Unpin(handles) => {
                if let Some(host) = &mut self.store.host {
                    for handle in handles.iter() {
                        host.unpin(handle, id)?;
                    }
                }
            }
            Submission::Reject(handles) => {
                for handle in handles.iter() {
                    self.store.reject(handle, id)?;
                }
            }
            Submission::Commit { handle, ticket } => {
                let outcome = self.store.commit(id, handle, now_ms)?;
                self.metrics.commits.with_label_values(&[outcome_label(outcome)]).inc();
                attachment.answer(Outgoing::Committed { ticket, outcome });
            }
            Submission::Abandon(handle) => {
                if let Some(host) = &mut self.store.host {
                    host.check_filling(handle, id)?;
                    host.free(handle.frame);
                }
            }
            Submission::PutConversation { id, .. } => {
                if let Err(error) = self.store.put_conversation(id, bytes, now_ms) {
                    tracing::warn!(%error, "record refused");
                    self.metrics.corrupt.with_label_values(&["record"]).inc();
                }
            }
            Submission::GetConversation { id: name, ticket } => {
                let asker = Asker::Runtime(id, attachment.incarnation, ticket);
                self.get_conversation(name, asker);
            }
        }
        Ok(())
    }

    fn get_conversation(&mut self, name: ConversationId, asker: Asker) {
        let recent = self.store.conversations.recent(&name).cloned();
        let may_be_on_disk = self.store.conversations.contains(&name)
            || self.store.transfers.disk_state == DiskState::Opening;
        if recent.is_none() && may_be_on_disk {
            let asked = self.questions.contains_key(&name);
            if asked || self.store.disk.read(Job::GetConversation { id: name }).is_ok() {
                self.questions.entry(name).or_default().push(asker);
                return;
            }
        } else if recent.is_none()
            && matches!(asker, Asker::Runtime(..))
            && (self.questions.contains_key(&name) || self.may_fetch(name))
        {
            self.questions.entry(name).or_default().push(asker);
            return;
        }
        self.give_record(&name, asker, recent);
    }

    fn give_record(&mut self, name: &ConversationId, asker: Asker, record: Option<Arc<[u8]>>) {
        match asker {
            Asker::Runtime(id, incarnation, ticket) => {
                if let Some(attachment) = &mut self.attachments[id.index()]
                    && attachment.incarnation == incarnation
                {
                    attachment.answer(Outgoing::Conversation { ticket, record });
                }
            }
            Asker::Admin(updated_ms, reply) => reply.send(match record {
                Some(record) => Ok((record, updated_ms)),
                None => Err(asks::no_conversation(name)),
            }),
            Asker::Transfer(reply) => {
                let _ = reply.send(Ok(self.kept(name, record))); // Gone meanwhile is as good.
            }
        }
    }

    fn answer_questions(&mut self, name: &ConversationId, record: Option<&Arc<[u8]>>) {
        for asker in self.questions.remove(name).unwrap_or_default() {
            self.give_record(name, asker, record.cloned());
        }
    }

    fn disk_done(&mut self, done: Done) {
        match done {
            Done::Conversation { id: name, record } => {
                // A deletion may have been faster than the read.
                let record = record.filter(|_| !self.store.is_deleted(&name));
                let record = record.filter(|bytes| !Tombstone::is_one(bytes));
                let record: Option<Arc<[u8]>> = record.map(Into::into);
                self.answer_questions(&name, record.as_ref());
            }
            Done::Flushed => self.flush = Flush::Done,
            Done::Buried { id, error } => {
                self.buried(&id, error.as_ref());
                self.store.finish(Done::Buried { id, error });
            }
            done => {
                while matches!(done, Done::Loaded { .. })
                    && let Some(blocks) = self.store.disk.found()
                {
                    self.store.found_on_disk(blocks); // Sent before, so here by now.
                }
                if let Done::Maintained { what: RECLAIMING, usage, error } = &done
                    && let Some(reply) = self.compacting.take()
                {
                    let failed = |error: &DiskError| Err(AskError::NotNow(error.to_string()));
                    reply.send(error.as_ref().map_or(Ok(*usage), failed));
                }
                if let Some(arrival) = self.store.finish(done) {
                    self.arrived(&arrival);
                }
            }
        }
    }

    /// What the waiting turns will read, told again.
    fn hint_all(&mut self) {
        for attachment in self.attachments.iter().flatten() {
            for (tag, waiting) in &attachment.sequences {
                if let (Some(hint), Some(list)) = (waiting.hint, &waiting.list) {
                    self.store.hint(attachment.turn(*tag), hint, list);
                }
            }
        }
        self.queue_changed = true;
    }

    /// A promote ended: pins the block for who waits, and answers those whose last one it was.
    fn arrived(&mut self, arrival: &Arrival) {
        for waiter in &arrival.waiters {
            let Some(attachment) = &mut self.attachments[waiter.id.index()] else { continue };
            if attachment.incarnation != waiter.incarnation {
                continue;
            }
            let Some(waiting) = attachment.sequences.get_mut(&waiter.sequence) else { continue };
            let Some(fetch) = &mut waiting.fetch else { continue };
            fetch.remaining = fetch.remaining.saturating_sub(1);
            let pinned = arrival.result.and_then(|frame| {
                let host = self.store.host.as_mut().ok_or(MissReason::Evicted)?;
                host.pin(frame, waiter.id).map_err(|_| MissReason::Checksum)
            });
            self.store.count_arrival(fetch, waiter.index, pinned.as_ref().err().copied());
            match pinned {
                Ok(handle) => {
                    let index = waiter.index;
                    fetch.arrived.push(FoundBlock { index, handle, tier: Tier::Disk });
                }
                Err(reason) => {
                    self.metrics.misses.with_label_values(&[reason.label()]).inc();
                    fetch.miss = Some(reason);
                }
            }
            if fetch.remaining == 0 {
                let Some(Fetch { mut arrived, miss, .. }) = waiting.fetch.take() else { continue };
                arrived.sort_by_key(|block| block.index);
                let sequence = waiter.sequence;
                attachment.answer(Outgoing::Promoted { sequence, blocks: arrived, miss });
            }
        }
    }

    fn ended(&mut self) -> Option<Ended> {
        if self.store.transfers.is_beyond_recovery() {
            let since = *self.disk_failed_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= FAILED_DISK_MAX {
                return Some(Ended::DiskFailed);
            }
        }
        let since = self.stop_since?;
        if since.elapsed() >= STOP_MAX {
            tracing::warn!("stopping with blocks unwritten");
            return Some(Ended::Stopped);
        }
        let opening = self.store.transfers.disk_state == DiskState::Opening;
        if !opening && self.store.transfers.is_written() && self.flush == Flush::NotAsked {
            let asked = self.store.disk.write(Job::Flush).is_ok();
            self.flush = if asked { Flush::Asked } else { Flush::NotAsked };
        }
        (self.flush == Flush::Done && !self.offloading).then_some(Ended::Stopped)
    }

    /// Shows the state, always before the loop rests.
    fn publish_at_times(&mut self, busy: bool) {
        let is_recent = self.published_at.is_some_and(|at| at.elapsed() < PUBLISH_EVERY);
        if !(busy && is_recent) {
            self.publish();
            self.published_at = Some(Instant::now());
        }
    }

    fn publish(&self) {
        let (transfers, disk) = (&self.store.transfers, &self.store.disk);
        self.metrics.disk_busy(disk.reading.total(), disk.writing.total());
        let frames = self.store.host.as_ref().map(HostTier::counts).unwrap_or_default();
        let sequences = self.attachments.iter().flatten().map(|a| a.sequences.len() as u32).sum();
        self.metrics.publish(Snapshot {
            geometry: self.store.geometry().map(ToString::to_string),
            fingerprint: self.store.geometry().map(|_| self.view.fingerprint().to_string()),
            format_epoch: self.view.format_epoch(),
            worker_starts: self.view.worker_starts().load(Ordering::Relaxed),
            region_bytes: self.view.region().bytes(),
            faulted_bytes: self.view.faulted_bytes().load(Ordering::Relaxed),
            frames,
            blocks: BlockCounts {
                known: self.store.directory.len() as u64,
                host: u64::from(frames.ready + frames.pinned),
                disk: transfers.stored_blocks(),
            },
            attachments: self.attachments.iter().flatten().count() as u32,
            sequences,
            conversations: self.store.conversations.len() as u64,
            deletions: {
                let (waiting, oldest_ms) = self.store.deletions.waiting();
                DeletionStatus { waiting: waiting as u64, oldest_ms }
            },
            policy: format!("{:?}", self.store.config.policy),
            disk: DiskStatus {
                state: transfers.disk_state.label(),
                stored_bytes: transfers.stored_bytes,
                physical_bytes: transfers.physical_bytes,
                bytes_max: self.store.config.disk_bytes,
                engine: self.store.config.disk_engine.label(),
                direct_io: transfers.direct_io,
                error: transfers.disk_error.clone(),
            },
            promotes_by_hint: transfers.promotes_by_hint,
            promotes_by_lookup: transfers.promotes_by_lookup,
            evictions_host: transfers.evictions_host,
            evictions_disk: transfers.evictions_disk,
            writes: transfers.writes,
        });
    }
}

fn refusal_label(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Version => "version",
        Refusal::Geometry => "geometry",
        Refusal::GeometryBusy => "geometry_busy",
        Refusal::Full => "full",
        Refusal::RegionTooSmall => "region_too_small",
        Refusal::Stopping => "stopping",
        _ => "other",
    }
}

fn outcome_label(outcome: kv_protocol::message::CommitOutcome) -> &'static str {
    use kv_protocol::message::CommitOutcome::{Known, Refused, Stored};
    match outcome {
        Stored => "stored",
        Known => "known",
        Refused => "refused",
    }
}

/// The time, for what is compared with times on disk.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
