//! The engine: one thread that owns every sequence, the block pool and the cache client.
//!
//! `step()` = receive → schedule → run, on one screen; what came back from the step before is
//! postprocessed in `receive`. Http speaks to it through an [`EngineHandle`]; the backend, the daemon
//! and http wake it through one doorbell. Nothing in here blocks but the wait for that doorbell.
//!
//! One step is in flight at a time. While it runs, the engine takes requests, asks the cache, and
//! starts the loads of those that come next.

mod anticipation;
mod cache;
mod history;
mod learn;
mod saves;
pub mod stats;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kv_protocol::geometry::LayerSet;
use kv_protocol::message::CommitOutcome;
use kv_protocol::{Dtype, Geometry};
use tokio::sync::oneshot;

use crate::account::{Account, Missing};
use crate::adaskip::SkipSet;
use crate::adaskip::policy::SkipConfig;
use crate::adaskip::presence::SkipSets;
use crate::batch::{Backend, BackendEvent, Phase, RowOutput, SequenceId, StepId, StepOutput};
use crate::block_pool::BlockPool;
use crate::cache_client::{
    CacheClient, CacheConfig, ConversationId, Doorbell, Fingerprint, MissReason, NumericsTag,
    RootKey, Unavailable, Waker,
};
use crate::changes::Changes;
use crate::overlap::Rates;
use crate::request::{Command, Event, FinishReason, Generate, GenerateError};
use crate::scheduler::{self, Limits, State};
use crate::sequence::{Accounting, Sequence};
use crate::shared_prefix::SharedPrefixes;
use crate::variant;
use anticipation::Anticipations;
use cache::Cache;
use history::Histories;
use saves::{Ends, Labels, Saves};
use stats::EngineStats;

/// Commands that http may have under way before the engine takes them: a burst of arrivals between
/// two steps, on top of the waiting queue's own bound.
const COMMANDS_MAX: usize = 1024;
/// Finished sequences that hold their blocks until the last ones are saved; beyond it the oldest lets
/// go. Their blocks are the first that the scheduler takes, so they cost nothing but a list.
const CLOSING_MAX: usize = 64;
/// Questions for conversation records; beyond it the answer is "none".
const QUESTIONS_MAX: usize = 256;
/// After this a conversation record is given up: http falls back to the request's own messages.
const QUESTION_WAIT_MAX: Duration = Duration::from_millis(250);
/// After a shutdown command and the last token, how long saves may still take.
const CLOSING_WAIT_MAX: Duration = Duration::from_secs(2);
/// An idle engine looks around this often, rung or not.
const IDLE_WAIT: Duration = Duration::from_secs(1);
/// While blocks wait for free frames, which the daemon grants without a ring.
const CLOSING_WAIT: Duration = Duration::from_millis(5);
/// A prefill rate is taken from steps with this many prompt tokens, and hardly anything else.
const PREFILL_TOKENS_MIN: u32 = 32;

/// What the engine needs to know; http's `config` has checked it.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Most tokens of prompt and reply together.
    pub context_max: u32,
    /// Token ids are below this.
    pub vocabulary: u32,
    /// End-of-text tokens of the model; never drawn under `ignore_eos`.
    pub end_tokens: Arc<[u32]>,
    /// Sequences that take part in a step.
    pub sequences_max: usize,
    /// Tokens that one step computes at most (prefill chunks and decode together).
    pub step_tokens_max: usize,
    /// Sequences in the queue.
    pub waiting_max: usize,
    /// AdaSkip's settings.
    pub skip: SkipConfig,
    /// The calibration text's token ids; read when `skip` asks for any set.
    pub calibration: Vec<u32>,
    /// Digest of everything that KV depends on (`model::fingerprint`).
    pub fingerprint: [u8; 32],
    /// Digest of how the backend computes (`backend::cpu::numerics_tag`).
    pub numerics_tag: u64,
    /// Prompts whose leading blocks are every tenant's.
    pub shared_prefixes: SharedPrefixes,
    /// The cache daemon's socket; without one nothing is kept beyond the device.
    pub cache_socket: Option<PathBuf>,
}

/// Why the engine did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A setting does not fit the model or the pool: exit code 64.
    #[error("engine settings: {0}")]
    Config(String),
    /// Two engines on one registry.
    #[error("engine metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// No thread.
    #[error("engine thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// How http tasks reach the engine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: SyncSender<Command>,
    waker: Waker,
    stats: EngineStats,
    waiting_max: usize,
    tokens_capacity: u32,
    changes: Arc<Changes>,
}

impl EngineHandle {
    /// Conversations that the daemon has changed.
    pub fn changes(&self) -> &Arc<Changes> {
        &self.changes
    }

    /// Hands a command over without blocking, and wakes the engine.
    pub fn submit(&self, command: Command) -> Result<(), GenerateError> {
        let waiting = self.stats.requests_waiting.get().unsigned_abs() as usize;
        if matches!(command, Command::Generate(_)) && waiting >= self.waiting_max {
            return Err(GenerateError::QueueFull { waiting: self.waiting_max });
        }
        let sent = self.commands.try_send(command);
        self.waker.ring();
        sent.map_err(|error| match error {
            TrySendError::Full(_) => GenerateError::QueueFull { waiting: COMMANDS_MAX },
            TrySendError::Disconnected(_) => GenerateError::ShuttingDown,
        })
    }

    /// Tokens that the whole device pool holds: prompt + `tokens_max` above this is refused with
    /// [`GenerateError::TooLarge`], so http clamps its default for `tokens_max` to it.
    pub fn tokens_capacity(&self) -> u32 {
        self.tokens_capacity
    }

    /// What the engine counts.
    pub fn stats(&self) -> &EngineStats {
        &self.stats
    }
}

/// Learns the skip sets (blocks for as long as that takes), then starts the engine's thread.
///
/// `doorbell` is the one that the backend's wake function rings. The thread ends after
/// [`Command::Shutdown`], when the running sequences are done.
pub fn start(
    config: EngineConfig,
    mut backend: Box<dyn Backend>,
    doorbell: Doorbell,
    registry: &prometheus::Registry,
) -> Result<(EngineHandle, JoinHandle<()>), StartError> {
    let stats = EngineStats::new(registry)?;
    let sets = learn::skip_sets(
        &config.skip,
        &config.calibration,
        config.context_max,
        config.step_tokens_max as u32,
        backend.as_mut(),
        &doorbell,
    )?;
    let cache = match &config.cache_socket {
        Some(socket) => attach(socket.clone(), &config, &sets, backend.as_ref(), doorbell.waker())?,
        None => None,
    };
    let started = Instant::now();
    let clock = Box::new(move || started.elapsed());
    let (handle, mut engine) = build(config, backend, cache, sets, &doorbell, stats, clock)?;
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
        engine.run(&doorbell);
    })?;
    Ok((handle, thread))
}

/// The cache client for the layers that `sets` store; none when they store no layer.
fn attach(
    socket: PathBuf,
    config: &EngineConfig,
    sets: &SkipSets,
    backend: &dyn Backend,
    waker: Waker,
) -> Result<Option<CacheClient>, StartError> {
    if sets.present_layers.is_empty() {
        return Ok(None);
    }
    let device = backend.geometry();
    let geometry = Geometry::new(
        device.tokens_per_block,
        device.layers,
        device.kv_heads,
        device.head_dim,
        Dtype::F16,
        sets.present_layers.iter().copied().collect::<LayerSet>(),
    )
    .map_err(|error| StartError::Config(error.to_string()))?;
    let fingerprint = Fingerprint(config.fingerprint);
    Ok(Some(CacheClient::spawn(CacheConfig { socket, geometry, fingerprint }, waker)?))
}

/// An engine that nobody runs yet.
fn build<C: Cache>(
    config: EngineConfig,
    backend: Box<dyn Backend>,
    cache: Option<C>,
    sets: SkipSets,
    doorbell: &Doorbell,
    stats: EngineStats,
    clock: Clock,
) -> Result<(EngineHandle, Engine<C>), StartError> {
    let geometry = backend.geometry();
    if config.sequences_max == 0 || config.step_tokens_max < config.sequences_max {
        return Err(StartError::Config(format!(
            "a step of {} tokens is too small for {} sequences; raise stepTokensMax",
            config.step_tokens_max, config.sequences_max
        )));
    }
    if geometry.block_count == 0 {
        return Err(StartError::Config(
            "the device pool holds no block; raise deviceMemory".into(),
        ));
    }
    let (commands, received) = sync_channel(COMMANDS_MAX);
    let pool_tokens = geometry.block_count.saturating_mul(geometry.tokens_per_block.into());
    let handle = EngineHandle {
        commands,
        waker: doorbell.waker(),
        stats: stats.clone(),
        waiting_max: config.waiting_max,
        tokens_capacity: pool_tokens.min(config.context_max),
        changes: Arc::default(),
    };
    let labels = Labels {
        own: variant::of(&sets.prefill),
        numerics: NumericsTag::of(&format!("{:016x}", config.numerics_tag)),
    };
    for (phase, set) in [("prefill", &sets.prefill), ("decode", &sets.decode)] {
        let skipped = set.skipped().count();
        stats.skipped_sublayers.with_label_values(&[phase]).set(skipped as i64);
        tracing::info!(phase, skipped = ?set.skipped().collect::<Vec<_>>(), "skip set");
    }
    stats.blocks.set(geometry.block_count.into());
    let limits = Limits {
        sequences_max: config.sequences_max,
        step_tokens_max: config.step_tokens_max as u32,
    };
    let pool = BlockPool::new(geometry.block_count, geometry.tokens_per_block);
    let engine = Engine {
        backend,
        cache,
        state: State::new(limits, pool, sets),
        rates: Rates::default(),
        histories: Histories::default(),
        anticipations: Anticipations::default(),
        saves: Saves::new(labels),
        labels,
        flight: None,
        questions: HashMap::new(),
        changes: handle.changes.clone(),
        commands: received,
        clock,
        next_sequence: 0,
        stopping: None,
        stats,
        fingerprint: Fingerprint(config.fingerprint),
        config,
    };
    Ok((handle, engine))
}

/// Time since the engine's start.
type Clock = Box<dyn Fn() -> Duration + Send>;

/// A question for a conversation record, and until when it may be open.
type Question = (oneshot::Sender<Option<Vec<u8>>>, Duration);

/// Owner of all state. `C` is the cache client, or a test's.
struct Engine<C: Cache> {
    backend: Box<dyn Backend>,
    cache: Option<C>,
    state: State,
    rates: Rates,
    histories: Histories,
    anticipations: Anticipations,
    saves: Saves<C::Free>,
    labels: Labels,
    flight: Option<Flight>,
    questions: HashMap<C::Question, Question>,
    changes: Arc<Changes>,
    commands: Receiver<Command>,
    clock: Clock,
    next_sequence: u64,
    /// Since when no request is taken any more.
    stopping: Option<Duration>,
    stats: EngineStats,
    fingerprint: Fingerprint,
    config: EngineConfig,
}

/// A submitted step.
#[derive(Debug)]
struct Flight {
    step: StepId,
    rows: Vec<FlightRow>,
}

#[derive(Debug)]
struct FlightRow {
    sequence: SequenceId,
    phase: Phase,
    tokens: u32,
    skip: Arc<SkipSet>,
    samples: bool,
}

impl Flight {
    /// Whether its rows have all been answered.
    fn is_over(&self) -> bool {
        self.rows.is_empty()
    }
}

impl<C: Cache> Engine<C> {
    fn run(&mut self, doorbell: &Doorbell) {
        while !self.is_done() {
            if !self.step() {
                doorbell.wait(self.wait_max());
            }
        }
        self.refuse_the_rest();
    }

    /// One turn of the loop. Whether the next one has something to do already.
    fn step(&mut self) -> bool {
        self.receive_commands();
        self.receive_cache();
        self.receive_backend();
        self.drop_abandoned();
        self.end_anticipations();
        self.ask_cache();
        self.load_ahead();
        self.save_closing();
        let again = self.flight.is_none() && self.launch();
        self.count();
        self.announce_renamed() || again
    }

    /// Schedules and submits a step; its blocks that become full are saved behind it. Whether nothing
    /// could run, and something changed so that it may now.
    fn launch(&mut self) -> bool {
        self.restart_broken();
        let now = (self.clock)();
        let decision = scheduler::schedule(&mut self.state, now, &self.rates);
        // 1. Loads first: a row may only wait for a load that the backend knows.
        for placement in decision.placed {
            self.start_load(&placement);
        }
        // 2. Then the queue is told, before anything of this step can end.
        for &id in &decision.preempted {
            self.stats.preemptions.inc();
            self.forget_ask(id);
            self.announce(id, None);
        }
        for &id in &decision.admitted {
            self.admitted(id, now);
        }
        if !decision.admitted.is_empty() {
            self.hint_again();
        }
        self.stats.saves.with_label_values(&["gave_way"]).inc_by(decision.unsaved.into());
        if decision.batch.rows.is_empty() {
            return !decision.preempted.is_empty() && !self.histories.is_loading();
        }
        let rows: Vec<FlightRow> = decision
            .batch
            .rows
            .iter()
            .map(|row| FlightRow {
                sequence: row.sequence,
                phase: row.phase,
                tokens: row.tokens.len() as u32,
                skip: row.skip.clone(),
                samples: row.sampling.is_some(),
            })
            .collect();
        let tokens: u32 = rows.iter().map(|row| row.tokens).sum();
        self.stats.step_tokens.observe(tokens.into());
        let step = self.backend.submit(decision.batch);
        // 3. Saves last: they start behind the steps submitted before them.
        self.save_behind(step, &rows);
        self.flight = Some(Flight { step, rows });
        false
    }

    fn receive_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Generate(request) => self.enqueue(request),
                Command::ClearDeviceCache(answer) => {
                    let _ = answer.send(self.state.pool.forget_all());
                }
                Command::PutConversation { id, record } => {
                    if let Some(cache) = &mut self.cache {
                        // Best effort: without the record the client's messages are tokenised anew.
                        let _ = cache.put_conversation(ConversationId(id), record);
                    }
                }
                Command::GetConversation { id, answer } => {
                    let question = match &mut self.cache {
                        Some(cache) if self.questions.len() < QUESTIONS_MAX => {
                            cache.get_conversation(ConversationId(id)).ok()
                        }
                        _ => None,
                    };
                    match question {
                        Some(question) => {
                            let until = (self.clock)() + QUESTION_WAIT_MAX;
                            self.questions.insert(question, (answer, until));
                        }
                        None => drop(answer.send(None)),
                    }
                }
                Command::Anticipate(turn) => {
                    let told = self.anticipate(&turn);
                    let _ = turn.answer.send(told);
                }
                Command::Shutdown => {
                    self.stopping.get_or_insert((self.clock)());
                    for sequence in std::mem::take(&mut self.state.waiting) {
                        self.state.pool.release_table(&sequence.table);
                        self.forget_ask(sequence.id);
                        sequence.send(Event::Failed(GenerateError::ShuttingDown));
                    }
                }
            }
        }
    }

    /// Puts a request into the queue, or says why not. Everything in it may come from outside.
    fn enqueue(&mut self, request: Generate) {
        if let Err(error) = self.check(&request) {
            let _ = request.events.send(Event::Failed(error));
            return;
        }
        self.next_sequence += 1;
        let id = SequenceId(self.next_sequence);
        let root = RootKey::new(&self.fingerprint, &request.salt.0);
        let unbroken = self.config.shared_prefixes.start(root, &request.tokens);
        let sequence = Sequence::new(
            id,
            (self.clock)(),
            unbroken,
            request,
            &self.config.end_tokens,
            self.state.pool.tokens_per_block(),
            &self.state.sets,
        );
        let anticipated = sequence.conversation.and_then(|id| self.anticipations.take(id));
        self.state.enqueue(sequence);
        self.announce(id, anticipated);
    }

    /// A conversation is deleted. Which device blocks are its own nobody knows, for blocks are named by what
    /// they hold: all are forgotten, and others come back from frames. Of turns that run nothing stays.
    fn forget(&mut self, conversation: ConversationId) {
        let State { pool, waiting, running, .. } = &mut self.state;
        pool.forget_all();
        let is_its = |sequence: &&mut Sequence| sequence.conversation == Some(conversation);
        for sequence in waiting.iter_mut().chain(running).filter(is_its) {
            sequence.cache.no_store = true;
            sequence.send(Event::Deleted);
        }
    }

    fn check(&self, request: &Generate) -> Result<(), GenerateError> {
        if self.stopping.is_some() {
            return Err(GenerateError::ShuttingDown);
        }
        if self.state.waiting.len() >= self.config.waiting_max {
            return Err(GenerateError::QueueFull { waiting: self.config.waiting_max });
        }
        if request.tokens.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        let vocabulary = self.config.vocabulary;
        if let Some(&token) = request.tokens.iter().find(|&&token| token >= vocabulary) {
            return Err(GenerateError::UnknownToken { token, vocabulary });
        }
        let prompt = request.tokens.len();
        let tokens = prompt as u64 + u64::from(request.tokens_max);
        if tokens > u64::from(self.config.context_max) {
            let (reply, context) = (request.tokens_max, self.config.context_max);
            return Err(GenerateError::ContextTooLong { prompt, reply, context });
        }
        let needed = self.state.pool.blocks_for(tokens as u32);
        let have = self.state.pool.block_count();
        if needed > have {
            return Err(GenerateError::TooLarge { needed, have });
        }
        Ok(())
    }

    fn receive_cache(&mut self) {
        while let Some(event) = self.cache.as_mut().and_then(Cache::poll) {
            match event {
                cache::Event::Attached => {
                    tracing::info!("the cache daemon is attached");
                    self.stats.cache_attached.set(1);
                    self.saves.attachment += 1;
                    self.reattached();
                    self.hint_again();
                    self.anticipate_again();
                }
                cache::Event::Detached => {
                    tracing::warn!("the cache daemon is gone; going on without");
                    self.stats.cache_attached.set(0);
                    self.saves.detached();
                    self.reattached();
                    for (_, (answer, _)) in self.questions.drain() {
                        let _ = answer.send(None);
                    }
                }
                cache::Event::Found { tag, blocks, on_disk, miss } => {
                    self.found(tag, blocks, on_disk, miss);
                }
                cache::Event::Promoted { tag, blocks, miss } => self.promoted(tag, blocks, miss),
                cache::Event::Committed(outcome) => {
                    let outcome = match outcome {
                        CommitOutcome::Stored => "stored",
                        CommitOutcome::Known => "known",
                        CommitOutcome::Refused => "refused",
                    };
                    self.stats.saves.with_label_values(&[outcome]).inc();
                }
                cache::Event::Conversation(question, record) => {
                    if let Some((answer, _)) = self.questions.remove(&question) {
                        let _ = answer.send(record);
                    }
                }
                cache::Event::Changed { id, is_deleted } => {
                    self.changes.changed(id);
                    if is_deleted {
                        self.forget(id);
                    }
                }
            }
        }
        let now = (self.clock)();
        for (_, (answer, _)) in self.questions.extract_if(|_, (_, until)| now >= *until) {
            let _ = answer.send(None);
        }
    }

    fn receive_backend(&mut self) {
        while let Some(event) = self.backend.poll() {
            match event {
                BackendEvent::Step(output) => self.postprocess(output),
                BackendEvent::Loaded(id) => self.loaded(id),
                BackendEvent::LoadFailed(id) => self.load_failed(id),
                BackendEvent::Saved(id, checksums) => {
                    self.with_ends(|saves, ends, _| saves.copied(ends, id, checksums));
                }
            }
        }
    }

    /// Takes over what a step computed: names full blocks, hands tokens out, ends replies.
    fn postprocess(&mut self, output: StepOutput) {
        let Some(flight) = self.flight.take() else { return };
        assert_eq!(flight.step, output.step, "one step is in flight at a time");
        self.stats.step_seconds.observe(output.compute.as_secs_f64());
        self.stats.load_wait_seconds.observe(output.load_wait.as_secs_f64());
        let tokens_of = |phase: Phase| -> u32 {
            flight.rows.iter().filter(|row| row.phase == phase).map(|row| row.tokens).sum()
        };
        let (prompt, decoded) = (tokens_of(Phase::Prefill), tokens_of(Phase::Decode));
        if prompt >= PREFILL_TOKENS_MIN.max(8 * decoded) {
            self.rates.observe_prefill(prompt + decoded, output.compute);
        }
        let mut failed = Vec::new();
        let mut ended = Vec::new();
        for (row, result) in flight.rows.iter().zip(output.rows) {
            let Some(at) = self.state.running_index(row.sequence) else { continue };
            let sequence = &mut self.state.running[at];
            if result.failed_load.is_some() || sequence.broken {
                sequence.broken = true;
                failed.push(row.sequence);
                continue;
            }
            let was = sequence.computed;
            sequence.advance(row.tokens, &row.skip, &self.state.sets);
            self.name_full_blocks(at, was);
            if let Some(importance) = &result.importance {
                let sequence = &mut self.state.running[at];
                if sequence.learn(importance, &self.state.sets) {
                    self.stats.extras_sequences.inc();
                }
            }
            if row.samples
                && let Some(end) = self.sampled(at, result)
            {
                ended.push((row.sequence, end));
            }
        }
        self.with_ends(|saves, ends, _| saves.stepped(ends, flight.step, &failed));
        for (id, end) in ended {
            if let Some(at) = self.state.running_index(id) {
                let sequence = self.state.running.remove(at);
                sequence.send(end);
                self.close(sequence);
            }
        }
    }

    /// Takes a sampled token over. Whether, and how, the reply ends with it.
    fn sampled(&mut self, at: usize, result: RowOutput) -> Option<Event> {
        self.count_prompt(at);
        let sequence = &mut self.state.running[at];
        let Some(token) = result.token else {
            return Some(Event::Failed(GenerateError::Backend));
        };
        self.stats.generated_tokens.inc();
        if sequence.stop_tokens.contains(&token.token) {
            return Some(Event::Finished(FinishReason::Stop));
        }
        if sequence.reply_len() < sequence.tokens_max {
            sequence.push(token.token);
            sequence.send(Event::Token { token, alternatives: result.alternatives });
        }
        (sequence.reply_len() >= sequence.tokens_max)
            .then_some(Event::Finished(FinishReason::Length))
    }

    /// Names the blocks that became full since `was` tokens, so that others find them.
    fn name_full_blocks(&mut self, at: usize, was: u32) {
        let State { pool, running, sets, .. } = &mut self.state;
        let sequence = &running[at];
        let size = pool.tokens_per_block();
        for index in was / size..sequence.storable(sets).min(sequence.computed) / size {
            let (block, key) = (sequence.table[index as usize], sequence.keys[index as usize]);
            pool.seal(block, key, sequence.origin((index + 1) * size));
        }
    }

    /// A sequence joined the steps.
    fn admitted(&mut self, id: SequenceId, now: Duration) {
        let Some(at) = self.state.running_index(id) else { return };
        // Preempted before: its second look at the cache is not a new hit.
        if self.state.running[at].accounting == Accounting::Open {
            let account = self.account(&self.state.running[at]);
            self.state.running[at].accounting = Accounting::Known(account);
            if self.state.running[at].start.kept_blocks() > 0 {
                self.stats.truncated.with_label_values(&["found"]).inc();
            }
        }
        let sequence = &mut self.state.running[at];
        if !std::mem::replace(&mut sequence.started, true) {
            self.stats.queue_seconds.observe(now.saturating_sub(sequence.arrived).as_secs_f64());
            sequence.send(Event::Started);
        }
    }

    /// Where the prompt of a sequence comes from, as its blocks are reserved now.
    fn account(&self, sequence: &Sequence) -> Account {
        let for_all = |end| Missing { withheld: None, end };
        let missing = if sequence.cache.no_read {
            for_all(MissReason::NoRead)
        } else if sequence.shuns_frames {
            for_all(MissReason::Checksum)
        } else if self.cache.is_none() {
            for_all(MissReason::Off)
        } else {
            let end = sequence.miss.unwrap_or(MissReason::NeverStored);
            Missing { withheld: sequence.withheld, end }
        };
        Account::new(sequence.prompt_len, sequence.placed, missing)
    }

    /// Counts where a prompt came from, once: its KV is complete, so that no load can fail any more.
    fn count_prompt(&mut self, at: usize) {
        let sequence = &mut self.state.running[at];
        let Accounting::Known(account) = sequence.accounting else { return };
        sequence.accounting = Accounting::Counted;
        sequence.send(Event::Prompt(account));
        self.stats.count_prompt(&account);
    }

    /// Ends a sequence: its last block is named and, with the others, saved.
    fn close(&mut self, mut sequence: Sequence) {
        self.forget_ask(sequence.id);
        let State { pool, sets, closing, .. } = &mut self.state;
        let storable = sequence.storable(sets);
        if sequence.broken || storable == 0 {
            pool.release_table(&sequence.table);
            return;
        }
        let size = pool.tokens_per_block();
        let (full, tail) = ((storable / size) as usize, storable % size);
        let kept = full + usize::from(tail > 0);
        let surplus = sequence.table.split_off(kept);
        pool.release_table(&surplus);
        if tail > 0 {
            let tokens = Arc::from(&sequence.tokens[full * size as usize..storable as usize]);
            let (parent, origin) = (sequence.parent_of(full), sequence.origin(storable));
            pool.open_tail(sequence.table[full], parent, tokens, origin);
        }
        closing.push_back(sequence);
        if closing.len() > CLOSING_MAX
            && let Some(oldest) = closing.pop_front()
        {
            pool.release_table(&oldest.table);
            self.stats.saves.with_label_values(&["gave_way"]).inc();
        }
    }

    /// Saves the blocks of a submitted step that become full in it.
    fn save_behind(&mut self, step: StepId, rows: &[FlightRow]) {
        for row in rows {
            self.with_ends(|saves, ends, state| {
                let Some(at) = state.iter().position(|s| s.id == row.sequence) else { return };
                let sequence = &mut state[at];
                let end = sequence.storable_after(row.tokens, &row.skip, ends.sets);
                saves.save_full(ends, sequence, end, Some(step));
            });
        }
    }

    /// Goes on saving what finished sequences hold; lets go of those that are done.
    fn save_closing(&mut self) {
        let mut closing = std::mem::take(&mut self.state.closing);
        closing.retain_mut(|sequence| {
            let done = self.with_ends(|saves, ends, _| {
                let end = sequence.storable(ends.sets);
                !ends.cache.is_attached()
                    || saves.save_full(ends, sequence, end, None)
                        && saves.save_tail(ends, sequence, end)
            });
            let done = done.unwrap_or(true);
            if done {
                self.state.pool.release_table(&sequence.table);
            }
            !done
        });
        self.state.closing = closing;
    }

    /// Lends the saves what they need; nothing to do without a cache.
    fn with_ends<R>(
        &mut self,
        act: impl FnOnce(&mut Saves<C::Free>, &mut Ends<'_, C>, &mut Vec<Sequence>) -> R,
    ) -> Option<R> {
        let cache = self.cache.as_mut()?;
        let State { pool, sets, running, .. } = &mut self.state;
        let mut ends =
            Ends { backend: self.backend.as_mut(), cache, pool, sets, stats: &self.stats };
        Some(act(&mut self.saves, &mut ends, running))
    }

    /// Drops sequences whose client went away; what they computed is kept like any other.
    fn drop_abandoned(&mut self) {
        let gone = |sequence: &Sequence| sequence.is_abandoned();
        while let Some(at) = self.state.waiting.iter().position(gone) {
            let Some(sequence) = self.state.waiting.remove(at) else { break };
            self.state.pool.release_table(&sequence.table);
            self.forget_ask(sequence.id);
            self.stats.cancelled.inc();
        }
        if self.flight.is_some() {
            return; // The step names the blocks of those that run.
        }
        while let Some(at) = self.state.running.iter().position(gone) {
            let mut sequence = self.state.running.remove(at);
            // What is still on its way may yet prove bad: nothing is built on it.
            sequence.broken |= !sequence.waits.is_empty();
            self.stats.cancelled.inc();
            self.close(sequence);
        }
    }

    fn count(&self) {
        self.stats.requests_running.set(self.state.running.len() as i64);
        self.stats.requests_waiting.set(self.state.waiting.len() as i64);
        let used = self.state.pool.block_count() - self.state.pool.free_count();
        self.stats.blocks_used.set(used.into());
    }

    /// How long there is nothing to do unless somebody rings.
    fn wait_max(&self) -> Duration {
        let now = (self.clock)();
        let questions = self.questions.values().map(|(_, until)| *until).min();
        let anticipated = self.anticipations.next_end();
        let deadlines = [self.next_deadline(), questions, anticipated].into_iter().flatten();
        let rest = deadlines.map(|until| until.saturating_sub(now)).min().unwrap_or(IDLE_WAIT);
        let limit = if self.state.closing.is_empty() { IDLE_WAIT } else { CLOSING_WAIT };
        rest.min(limit)
    }

    /// Whether the thread may end: told to, nothing runs, and what is to be saved is saved, or has had
    /// its time.
    fn is_done(&self) -> bool {
        let Some(since) = self.stopping else { return false };
        let idle =
            self.flight.is_none() && self.state.running.is_empty() && self.state.waiting.is_empty();
        let saved = self.state.closing.is_empty() && self.saves.is_empty();
        idle && (saved || (self.clock)() >= since + CLOSING_WAIT_MAX)
    }

    /// Answers what came too late.
    fn refuse_the_rest(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Generate(request) => {
                    let _ = request.events.send(Event::Failed(GenerateError::ShuttingDown));
                }
                Command::GetConversation { answer, .. } => drop(answer.send(None)),
                Command::Anticipate(turn) => drop(turn.answer.send(Err(Unavailable))),
                Command::ClearDeviceCache(_)
                | Command::PutConversation { .. }
                | Command::Shutdown => {}
            }
        }
    }
}
