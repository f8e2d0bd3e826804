//! The engine over a toy model that notices every wrong byte, and a cache that does what a test says.

mod anticipation;
mod backend;
mod daemon;
mod hits_and_misses;
mod on_cpu;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use kv_protocol::Record;
use kv_protocol::start::Start;
use proptest::prelude::*;
use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::adaskip::policy::Reuse;
use crate::cache_client::Variant;
use crate::request::{CacheUse, CachedTokens, Salt, SamplingParams};
use backend::{Knobs, LAYERS, TOKENS_PER_BLOCK, ToyBackend, VOCABULARY};
use daemon::{Daemon, ToyCache};

/// More turns of the loop than any test needs; beyond it the engine hangs.
const TURNS_MAX: usize = 20_000;

/// An engine on no thread, stepped by the test.
struct Rig {
    engine: Engine<ToyCache>,
    handle: EngineHandle,
    daemon: Arc<Mutex<Daemon>>,
    knobs: Arc<Mutex<Knobs>>,
    clock: Arc<AtomicU64>,
    doorbell: Doorbell,
    /// Longest wait for a backend that has threads of its own.
    patience: Duration,
}

#[derive(Debug, Clone)]
struct RigConfig {
    blocks: u32,
    sequences_max: usize,
    step_tokens_max: usize,
    skip: SkipConfig,
    cached: bool,
    shared_prefixes: Vec<Vec<u32>>,
}

impl RigConfig {
    /// Over the toy model.
    fn rig(self) -> Rig {
        let knobs = Arc::new(Mutex::new(Knobs::default()));
        let clock = Arc::new(AtomicU64::new(0));
        let backend = ToyBackend::new(self.blocks, knobs.clone(), clock.clone());
        let rig = self.over(Box::new(backend), VOCABULARY, Doorbell::new(), knobs.clone(), clock);
        *knobs.lock().unwrap() = Knobs::default();
        rig
    }

    fn over(
        self,
        mut backend: Box<dyn Backend>,
        vocabulary: u32,
        doorbell: Doorbell,
        knobs: Arc<Mutex<Knobs>>,
        clock: Arc<AtomicU64>,
    ) -> Rig {
        let config = EngineConfig {
            context_max: 4096,
            vocabulary,
            end_tokens: Arc::from([0]),
            sequences_max: self.sequences_max,
            step_tokens_max: self.step_tokens_max,
            waiting_max: 64,
            skip: self.skip,
            calibration: (0..30).map(|token| token % vocabulary).collect(),
            fingerprint: [7; 32],
            numerics_tag: 1,
            shared_prefixes: SharedPrefixes::new(
                RootKey::new(&Fingerprint([7; 32]), b""),
                self.shared_prefixes,
                TOKENS_PER_BLOCK.into(),
            ),
            cache_socket: None,
        };
        let (skip, text) = (&config.skip, &config.calibration);
        let sets = learn::skip_sets(skip, text, 4096, 64, backend.as_mut(), &doorbell).unwrap();
        let frame_bytes = backend.geometry().row_bytes() * sets.present_layers.len();
        let daemon = Arc::new(Mutex::new(Daemon::new(frame_bytes)));
        let cache = self.cached.then(|| ToyCache::new(daemon.clone()));
        let stats = EngineStats::new(&prometheus::Registry::new()).unwrap();
        let time = clock.clone();
        let clock_of_engine: Clock =
            Box::new(move || Duration::from_nanos(time.load(Ordering::Relaxed)));
        let (handle, engine) =
            build(config, backend, cache, sets, &doorbell, stats, clock_of_engine).unwrap();
        Rig { engine, handle, daemon, knobs, clock, doorbell, patience: Duration::ZERO }
    }
}

/// A roomy engine with a cache and nothing skipped.
fn roomy() -> RigConfig {
    RigConfig {
        blocks: 256,
        sequences_max: 8,
        step_tokens_max: 16,
        skip: SkipConfig::OFF,
        cached: true,
        shared_prefixes: Vec::new(),
    }
}

/// A request as it came back.
#[derive(Debug, Clone, PartialEq, Default)]
struct Reply {
    tokens: Vec<u32>,
    finish: Option<FinishReason>,
    started: bool,
    is_unbroken: bool,
    is_deleted: bool,
    cached: CachedTokens,
    account: Option<Account>,
    error: Option<GenerateError>,
}

fn request(tokens: &[u32], tokens_max: u32) -> (Generate, mpsc::UnboundedReceiver<Event>) {
    let (events, receiver) = mpsc::unbounded_channel();
    let request = Generate {
        tokens: tokens.to_vec(),
        salt: Salt::default(),
        cache: CacheUse::default(),
        conversation: None,
        start: None,
        sampling: SamplingParams {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            logprobs: None,
            ignore_eos: false,
        },
        tokens_max,
        stop_tokens: Arc::from([]),
        events,
    };
    (request, receiver)
}

fn reply(receiver: &mut mpsc::UnboundedReceiver<Event>) -> Reply {
    let mut reply = Reply::default();
    while let Ok(event) = receiver.try_recv() {
        match event {
            Event::Deleted => reply.is_deleted = true,
            Event::Unbroken => reply.is_unbroken = true,
            Event::Started => {
                assert!(!reply.started, "started twice");
                assert_eq!(reply.account, None, "a prompt before the start");
                reply.started = true;
            }
            Event::Prompt(account) => {
                assert_eq!(reply.account, None, "counted twice");
                assert!(reply.tokens.is_empty(), "a token before its prompt");
                (reply.account, reply.cached) = (Some(account), account.cached);
            }
            Event::Token { token, .. } => reply.tokens.push(token.token),
            Event::Finished(finish) => {
                assert_eq!(reply.finish, None, "finished twice");
                reply.finish = Some(finish);
            }
            Event::Failed(error) => reply.error = Some(error),
        }
    }
    reply
}

impl Rig {
    fn submit(&mut self, tokens: &[u32], tokens_max: u32) -> mpsc::UnboundedReceiver<Event> {
        let (request, receiver) = request(tokens, tokens_max);
        self.handle.submit(Command::Generate(request)).unwrap();
        receiver
    }

    fn daemon(&self) -> MutexGuard<'_, Daemon> {
        self.daemon.lock().unwrap()
    }

    fn knobs(&self) -> MutexGuard<'_, Knobs> {
        self.knobs.lock().unwrap()
    }

    /// One turn of the loop; a millisecond passes.
    fn step(&mut self) {
        let again = self.engine.step();
        self.engine.state.pool.self_check();
        if !again && !self.is_idle() {
            self.doorbell.wait(self.patience);
        }
        self.clock.fetch_add(1_000_000, Ordering::Relaxed);
    }

    fn is_idle(&self) -> bool {
        let state = &self.engine.state;
        self.engine.flight.is_none()
            && state.running.is_empty()
            && state.waiting.is_empty()
            && state.closing.is_empty()
            && self.engine.saves.is_empty()
            && !self.engine.histories.is_loading()
    }

    fn run(&mut self) {
        for _turn in 0..TURNS_MAX {
            self.step();
            if self.is_idle() {
                // What was the last to end has its events behind it, too.
                self.step();
                self.step();
                assert_eq!(
                    self.engine.state.pool.free_count(),
                    self.engine.state.pool.block_count(),
                    "an idle engine holds blocks"
                );
                return;
            }
        }
        panic!("the engine hangs: {:?}", self.engine.state);
    }

    fn ask(&mut self, tokens: &[u32], tokens_max: u32) -> Reply {
        let mut receiver = self.submit(tokens, tokens_max);
        self.run();
        reply(&mut receiver)
    }

    fn clear_device(&mut self) -> u32 {
        let (answer, mut cleared) = oneshot::channel();
        self.handle.submit(Command::ClearDeviceCache(answer)).unwrap();
        self.step();
        cleared.try_recv().unwrap()
    }
}

fn prompt(seed: u32, length: u32) -> Vec<u32> {
    (0..length).map(|at| (seed * 7 + at * at * 3 + at * seed) % VOCABULARY).collect()
}

/// What the model says when nothing is cached, nobody else is there, and memory is plenty.
fn cold(skip: SkipConfig, tokens: &[u32], tokens_max: u32) -> Vec<u32> {
    RigConfig { skip, cached: false, ..roomy() }.rig().ask(tokens, tokens_max).tokens
}

/// A conversation's next prompt: everything so far, and what the user says next.
fn next_turn(before: &[u32], reply: &[u32], said: &[u32]) -> Vec<u32> {
    [before, reply, said].concat()
}

#[test]
fn a_reply_ends_at_its_limit_and_at_a_stop_token() {
    let mut rig = roomy().rig();
    let all = rig.ask(&prompt(1, 9), 6);
    assert_eq!((all.tokens.len(), all.finish), (6, Some(FinishReason::Length)));
    let (mut stopped, mut receiver) = request(&prompt(1, 9), 6);
    stopped.stop_tokens = Arc::from([all.tokens[3]]);
    let first = all.tokens.iter().position(|&token| token == all.tokens[3]).unwrap();
    rig.handle.submit(Command::Generate(stopped)).unwrap();
    rig.run();
    let stopped = reply(&mut receiver);
    assert_eq!(stopped.finish, Some(FinishReason::Stop));
    assert_eq!(stopped.tokens, all.tokens[..first]);
}

#[test]
fn a_reply_of_no_tokens_is_only_a_prefill() {
    let reply = roomy().rig().ask(&prompt(1, 9), 0);
    assert_eq!((reply.tokens.len(), reply.finish), (0, Some(FinishReason::Length)));
}

#[test]
fn a_chunked_prompt_gives_the_tokens_of_a_whole_one() {
    let whole = RigConfig { step_tokens_max: 100, ..roomy() }.rig().ask(&prompt(2, 61), 8);
    let chunked = RigConfig { step_tokens_max: 9, ..roomy() }.rig().ask(&prompt(2, 61), 8);
    assert_eq!(whole.tokens, chunked.tokens);
}

#[test]
fn eight_together_get_the_tokens_that_each_gets_alone() {
    let mut rig = roomy().rig();
    let prompts: Vec<Vec<u32>> = (1..=8).map(|seed| prompt(seed, 5 + 3 * seed)).collect();
    let mut receivers: Vec<_> = prompts.iter().map(|prompt| rig.submit(prompt, 12)).collect();
    rig.run();
    assert_eq!(rig.knobs().rows_max, 8);
    for (prompt, receiver) in prompts.iter().zip(&mut receivers) {
        assert_eq!(reply(receiver).tokens, cold(SkipConfig::OFF, prompt, 12));
    }
}

#[test]
fn a_step_never_exceeds_its_budget() {
    let mut rig = RigConfig { step_tokens_max: 11, ..roomy() }.rig();
    let _receivers: Vec<_> = (1..=12).map(|seed| rig.submit(&prompt(seed, 40), 7)).collect();
    rig.run();
    assert_eq!(rig.knobs().tokens_max, 11);
}

#[test]
fn the_second_turn_finds_the_first_on_the_device_down_to_its_tail() {
    let mut rig = roomy().rig();
    let first = prompt(3, 21);
    let answer = rig.ask(&first, 6).tokens;
    let second = next_turn(&first, &answer, &[1, 2, 3]);
    let reply = rig.ask(&second, 5);
    // All but the last sampled token, which has no KV yet, and what was just said.
    assert_eq!(reply.cached, CachedTokens { device: 26, host: 0, disk: 0 });
    assert_eq!(reply.tokens, cold(SkipConfig::OFF, &second, 5));
    assert!(reply.started);
}

#[test]
fn the_last_prompt_token_is_always_computed() {
    let mut rig = roomy().rig();
    let tokens = prompt(3, 20);
    let first = rig.ask(&tokens, 1);
    let again = rig.ask(&tokens, 1);
    assert_eq!(again.tokens, first.tokens);
    // Four blocks and no more: the fifth holds the last token, and is shared.
    assert_eq!(again.cached.device, 16);
}

#[test]
fn a_turn_with_an_empty_device_is_loaded_from_frames_and_reads_the_same() {
    let mut rig = roomy().rig();
    let first = prompt(4, 21);
    let answer = rig.ask(&first, 6).tokens;
    assert!(rig.clear_device() > 0);
    let second = next_turn(&first, &answer, &[9, 8]);
    let reply = rig.ask(&second, 5);
    assert_eq!(reply.cached, CachedTokens { device: 0, host: 26, disk: 0 });
    assert_eq!(reply.tokens, cold(SkipConfig::OFF, &second, 5));
    assert_eq!(rig.knobs().waiting_rows, 1);
}

#[test]
fn what_was_on_disk_when_the_request_came_is_counted_as_disk() {
    let mut rig = roomy().rig();
    let first = prompt(4, 21);
    let answer = rig.ask(&first, 6).tokens;
    rig.clear_device();
    rig.daemon().demote_all();
    let second = next_turn(&first, &answer, &[9, 8]);
    let reply = rig.ask(&second, 5);
    assert_eq!(reply.cached, CachedTokens { device: 0, host: 0, disk: 26 });
    assert_eq!(reply.tokens, cold(SkipConfig::OFF, &second, 5));
}

#[test]
fn a_device_prefix_is_continued_by_frames() {
    // The pool holds the first conversation and hardly more, so that the second takes some of it.
    let mut rig = RigConfig { blocks: 14, ..roomy() }.rig();
    let first = prompt(5, 30);
    let answer = rig.ask(&first, 6).tokens;
    let _other = rig.ask(&prompt(6, 24), 4);
    let second = next_turn(&first, &answer, &[9, 8]);
    let reply = rig.ask(&second, 5);
    assert!(reply.cached.device > 0, "{:?}", reply.cached);
    assert!(reply.cached.host > 0, "{:?}", reply.cached);
    assert_eq!(reply.cached.total(), 35);
    assert_eq!(reply.tokens, cold(SkipConfig::OFF, &second, 5));
}

#[test]
fn two_salts_share_nothing() {
    let mut rig = roomy().rig();
    let tokens = prompt(4, 21);
    rig.ask(&tokens, 6);
    let (mut other, mut receiver) = request(&tokens, 6);
    other.salt = Salt(Arc::from(*b"somebody else"));
    rig.handle.submit(Command::Generate(other)).unwrap();
    rig.run();
    assert_eq!(reply(&mut receiver).cached.total(), 0);
}

#[test]
fn two_salts_share_the_declared_prompts_blocks_and_nothing_else() {
    let declared = prompt(4, 18);
    for clear in [false, true] {
        let mut rig = RigConfig { shared_prefixes: vec![declared.clone()], ..roomy() }.rig();
        let tokens = next_turn(&declared, &[], &prompt(6, 11));
        let mut ask = |salt: &'static [u8], tokens: &[u32]| {
            let (mut request, mut receiver) = request(tokens, 6);
            request.salt = Salt(Arc::from(salt));
            rig.handle.submit(Command::Generate(request)).unwrap();
            rig.run();
            if clear {
                rig.clear_device();
            }
            let reply = reply(&mut receiver);
            assert_eq!(reply.tokens, cold(SkipConfig::OFF, tokens, 6));
            reply.cached.total()
        };
        assert_eq!(ask(b"one", &tokens), 0);
        // Four whole blocks of the declared eighteen tokens; the fifth has others too.
        assert_eq!(ask(b"two", &tokens), 16);
        assert_eq!(ask(b"", &tokens), 16);
        assert_eq!(ask(b"one", &tokens), 28);
        assert_eq!(ask(b"two", &tokens), 28);
        let other = prompt(9, 29);
        assert_eq!((ask(b"one", &other), ask(b"two", &other)), (0, 0));
    }
}

/// Where the blocks of a truncated history hang, and the prompt that goes on from it.
fn truncated(tokens: &[u32], sinks: u32, dropped: u32, said: &[u32]) -> (Start, Vec<u32>) {
    truncated_in_blocks_of(TOKENS_PER_BLOCK, tokens, sinks, dropped, said)
}

fn truncated_in_blocks_of(
    tokens_per_block: u16,
    tokens: &[u32],
    sinks: u32,
    dropped: u32,
    said: &[u32],
) -> (Start, Vec<u32>) {
    let root = RootKey::new(&Fingerprint([7; 32]), b"");
    let mut record = Record::new(root, String::new(), tokens_per_block, tokens.to_vec());
    record.truncate(sinks, dropped).unwrap();
    (record.start(), next_turn(&record.tokens, &[], said))
}

impl Rig {
    fn ask_from(&mut self, start: &Start, tokens: &[u32], tokens_max: u32) -> Reply {
        let (mut request, mut receiver) = request(tokens, tokens_max);
        request.start = Some(start.clone());
        self.handle.submit(Command::Generate(request)).unwrap();
        self.run();
        reply(&mut receiver)
    }
}

#[test]
fn a_truncated_history_goes_on_from_what_was_kept_in_every_tier() {
    let history = prompt(3, 38);
    let (start, tokens) = truncated(&history, 1, 4, &prompt(5, 7));
    let mut rig = roomy().rig();
    rig.ask(&history, 1);
    // Five blocks of nine are kept: from the device, then from frames.
    let device = rig.ask_from(&start, &tokens, 6);
    assert_eq!((device.cached.device, device.cached.host), (20, 0));
    rig.clear_device();
    let frames = rig.ask_from(&start, &tokens, 6);
    assert_eq!((frames.cached.device, frames.cached.host), (0, 28), "the turn before is there too");
    assert_eq!((device.tokens.as_slice(), device.is_unbroken), (frames.tokens.as_slice(), false));
    // Its KV is that of the whole history: computed without what was dropped it would be another.
    assert_ne!(device.tokens, cold(SkipConfig::OFF, &tokens, 6));
    // Nobody else finds it: the same ids in an unbroken chain share the first block, and no second one.
    let unbroken = rig.ask(&tokens, 6);
    assert!((4..8).contains(&unbroken.cached.total()));
    assert_eq!(unbroken.tokens, cold(SkipConfig::OFF, &tokens, 6));
    assert_eq!(rig.engine.stats.truncated.with_label_values(&["found"]).get(), 2);
}

#[test]
fn what_a_truncation_kept_and_is_gone_is_computed_as_an_unbroken_chain() {
    let history = prompt(3, 38);
    let (start, tokens) = truncated(&history, 1, 4, &prompt(5, 7));
    let expected = cold(SkipConfig::OFF, &tokens, 6);
    for lost in [0, 5, 6, 8] {
        let mut rig = roomy().rig();
        rig.ask(&history, 1);
        rig.clear_device();
        let keys = RootKey::new(&Fingerprint([7; 32]), b"").chain(&history, TOKENS_PER_BLOCK);
        rig.daemon().lose(&keys[lost]);
        let anew = rig.ask_from(&start, &tokens, 6);
        assert_eq!((&anew.tokens, anew.is_unbroken), (&expected, true), "block {lost}");
        assert!(anew.cached.total() < if lost == 0 { 4 } else { 8 }, "block {lost}");
        // What was computed now has names of its own, and the whole history still those of before.
        rig.clear_device();
        let again = rig.ask(&tokens, 6);
        assert_eq!((again.tokens, again.cached.host), (anew.tokens, 28));
        rig.clear_device();
        assert_eq!(rig.ask(&history, 6).tokens, cold(SkipConfig::OFF, &history, 6));
        assert_eq!(rig.engine.stats.truncated.with_label_values(&["anew"]).get(), 1);
    }
}

#[test]
fn without_a_cache_a_truncated_history_is_computed_anew() {
    let history = prompt(3, 38);
    let (start, tokens) = truncated(&history, 1, 4, &prompt(5, 7));
    let expected = cold(SkipConfig::OFF, &tokens, 6);
    let mut rig = RigConfig { cached: false, ..roomy() }.rig();
    let anew = rig.ask_from(&start, &tokens, 6);
    assert_eq!((anew.tokens, anew.is_unbroken), (expected.clone(), true));
    // Neither does a request that reads nothing use it, nor one that says another tenant's.
    let mut rig = roomy().rig();
    rig.ask(&history, 1);
    let (mut unread, mut receiver) = request(&tokens, 6);
    (unread.start, unread.cache.no_read) = (Some(start.clone()), true);
    rig.handle.submit(Command::Generate(unread)).unwrap();
    rig.run();
    assert_eq!(reply(&mut receiver).tokens, expected);
    let other = Start { root: RootKey([9; 32]), ..start };
    assert_eq!(rig.ask_from(&other, &tokens, 6).tokens, expected);
}

#[test]
fn truncated_histories_survive_preemption() {
    // Room for two of three sequences; whoever is preempted finds what was kept, or computes all anew.
    let mut rig = RigConfig { blocks: 26, ..roomy() }.rig();
    let histories: Vec<Vec<u32>> = (1..=3).map(|seed| prompt(seed, 21)).collect();
    for history in &histories {
        rig.ask(history, 1);
    }
    let turns: Vec<_> =
        histories.iter().map(|history| truncated(history, 1, 2, &prompt(8, 3))).collect();
    let mut roomy = roomy().rig();
    for history in &histories {
        roomy.ask(history, 1);
    }
    let mut receivers: Vec<_> = turns
        .iter()
        .map(|(start, tokens)| {
            let (mut request, receiver) = request(tokens, 28);
            request.start = Some(start.clone());
            rig.handle.submit(Command::Generate(request)).unwrap();
            receiver
        })
        .collect();
    rig.run();
    assert!(rig.engine.stats.preemptions.get() > 0);
    for ((start, tokens), receiver) in turns.iter().zip(&mut receivers) {
        let told = reply(receiver);
        assert!(!told.is_unbroken, "all of it was in frames");
        assert_eq!(told.tokens, roomy.ask_from(start, tokens, 28).tokens);
    }
}

#[test]
fn nothing_of_a_deleted_conversation_stays_not_even_of_a_turn_that_runs() {
    let tokens = prompt(4, 30);
    let root = RootKey::new(&Fingerprint([7; 32]), b"");
    // Deleted before the turn is admitted, in its prompt, in its reply, after it.
    for turns_of_the_loop in [0, 1, 2, 3, 6, 200] {
        let mut rig = roomy().rig();
        rig.ask(&tokens, 1);
        let (mut turn, mut receiver) = request(&next_turn(&tokens, &[], &prompt(5, 9)), 20);
        turn.conversation = Some("chat".into());
        rig.handle.submit(Command::Generate(turn)).unwrap();
        for _ in 0..turns_of_the_loop {
            rig.step();
        }
        rig.daemon().delete(ConversationId::new(&root, b"chat"));
        rig.run();
        let told = reply(&mut receiver);
        assert_eq!(told.tokens.len(), 20, "it is not disturbed");
        assert_eq!(told.is_deleted, turns_of_the_loop < 200);
        assert_eq!(rig.ask(&tokens, 1).cached.total(), 0, "after {turns_of_the_loop}");
    }
}

#[test]
fn preempted_sequences_get_the_tokens_of_those_that_were_not() {
    for cached in [true, false] {
        // Three sequences of 40 tokens at the end, room for two.
        let mut rig = RigConfig { blocks: 22, cached, ..roomy() }.rig();
        let prompts: Vec<Vec<u32>> = (1..=3).map(|seed| prompt(seed, 12)).collect();
        let mut receivers: Vec<_> = prompts.iter().map(|prompt| rig.submit(prompt, 28)).collect();
        rig.run();
        assert!(rig.engine.stats.preemptions.get() > 0);
        for (prompt, receiver) in prompts.iter().zip(&mut receivers) {
            assert_eq!(reply(receiver).tokens, cold(SkipConfig::OFF, prompt, 28));
        }
    }
}

#[test]
fn what_a_preempted_sequence_had_computed_comes_back_by_loading() {
    let mut rig = RigConfig { blocks: 22, ..roomy() }.rig();
    let _receivers: Vec<_> = (1..=3).map(|seed| rig.submit(&prompt(seed, 12), 28)).collect();
    rig.run();
    assert!(rig.engine.stats.preemptions.get() > 0);
    assert!(rig.engine.stats.loads.with_label_values(&["done"]).get() > 0);
}

#[test]
fn nobody_starves_and_nobody_is_overtaken() {
    let mut rig = RigConfig { blocks: 24, sequences_max: 3, cached: false, ..roomy() }.rig();
    let mut receivers: Vec<_> = (1..=20)
        .map(|seed| rig.submit(&prompt(seed, 10 + 11 * (seed % 5)), 1 + seed % 9))
        .collect();
    rig.run();
    for receiver in &mut receivers {
        assert!(reply(receiver).finish.is_some());
    }
    assert!(rig.knobs().first_rows.is_sorted());
}

#[test]
fn a_frame_with_other_bytes_costs_time_and_no_token() {
    let mut rig = roomy().rig();
    let (first, other) = (prompt(4, 21), prompt(5, 15));
    let answer = rig.ask(&first, 6).tokens;
    rig.clear_device();
    rig.daemon().spoil_all();
    let second = next_turn(&first, &answer, &[9, 8]);
    let mut spoiled = rig.submit(&second, 5);
    let mut beside = rig.submit(&other, 9);
    rig.run();
    let spoiled = reply(&mut spoiled);
    assert_eq!(spoiled.tokens, cold(SkipConfig::OFF, &second, 5));
    assert_eq!(spoiled.cached.total(), 0);
    assert_eq!(reply(&mut beside).tokens, cold(SkipConfig::OFF, &other, 9));
    assert_eq!(rig.engine.stats.loads.with_label_values(&["failed"]).get(), 1);
}

#[test]
fn a_daemon_that_does_not_answer_costs_no_more_than_computing() {
    for knob in [
        |daemon: &mut Daemon| daemon.is_mute = true,
        |daemon: &mut Daemon| {
            daemon.demote_all();
            daemon.disk_hangs = true;
        },
    ] {
        let mut rig = roomy().rig();
        let first = prompt(4, 61);
        let answer = rig.ask(&first, 6).tokens;
        rig.clear_device();
        knob(&mut rig.daemon());
        let before = (rig.engine.clock)();
        let second = next_turn(&first, &answer, &[9, 8]);
        let limit = rig.engine.rates.prefill_time(second.len() as u32);
        let mut receiver = rig.submit(&second, 5);
        while !has_started(&mut receiver) {
            rig.step();
            let waited = (rig.engine.clock)().saturating_sub(before);
            assert!(waited <= limit + Duration::from_millis(20), "waited {waited:?} of {limit:?}");
        }
        rig.run();
    }
}

fn has_started(receiver: &mut mpsc::UnboundedReceiver<Event>) -> bool {
    matches!(receiver.try_recv(), Ok(Event::Started))
}

#[test]
fn others_go_on_while_one_waits_for_the_disk() {
    let mut rig = roomy().rig();
    let first = prompt(4, 61);
    let answer = rig.ask(&first, 6).tokens;
    rig.clear_device();
    rig.daemon().demote_all();
    rig.daemon().disk_hangs = true;
    let mut waits = rig.submit(&next_turn(&first, &answer, &[9, 8]), 5);
    let mut goes = rig.submit(&prompt(5, 9), 3);
    while reply(&mut goes).finish.is_none() {
        assert!(!has_started(&mut waits));
        rig.step();
    }
    rig.daemon().disk_hangs = false;
    rig.run();
    assert!(reply(&mut waits).cached.disk > 0);
}

#[test]
fn a_load_begins_while_another_sequence_computes() {
    let mut rig = roomy().rig();
    let first = prompt(4, 61);
    let answer = rig.ask(&first, 6).tokens;
    rig.clear_device();
    // Loads seem slow: 60 tokens of history hide behind none of the two new ones.
    rig.engine.rates.observe_load(1, Duration::from_micros(900));
    let _running = rig.submit(&prompt(6, 8), 40);
    rig.step();
    rig.step();
    rig.knobs().loads_held = true;
    let mut next = rig.submit(&next_turn(&first, &answer, &[9, 8]), 5);
    for _turn in 0..8 {
        rig.step();
    }
    assert!(rig.engine.histories.is_loading(), "the copy runs");
    assert_eq!(rig.engine.state.running.len(), 1, "and nobody waits in a step for it");
    rig.knobs().loads_held = false;
    rig.run();
    assert!(reply(&mut next).cached.host > 0);
}

#[test]
fn a_cancelled_sequence_gives_its_blocks_back_wherever_it_is() {
    let mut rig = RigConfig { sequences_max: 2, ..roomy() }.rig();
    let first = prompt(4, 21);
    let answer = rig.ask(&first, 6).tokens;
    rig.clear_device();
    rig.knobs().loads_held = true;
    let loading = rig.submit(&next_turn(&first, &answer, &[9, 8]), 5);
    let running = rig.submit(&prompt(6, 18), 100);
    let waiting = rig.submit(&prompt(7, 18), 100);
    for _turn in 0..4 {
        rig.step();
    }
    drop((loading, running, waiting));
    rig.step();
    rig.knobs().loads_held = false;
    rig.run();
    assert_eq!(rig.engine.stats.cancelled.get(), 3);
}

#[test]
fn what_cannot_be_served_is_refused_with_its_reason() {
    let mut rig = RigConfig { blocks: 10, ..roomy() }.rig();
    assert_eq!(rig.ask(&[], 5).error, Some(GenerateError::EmptyPrompt));
    assert_eq!(
        rig.ask(&[1, VOCABULARY], 5).error,
        Some(GenerateError::UnknownToken { token: VOCABULARY, vocabulary: VOCABULARY })
    );
    assert_eq!(
        rig.ask(&prompt(1, 20), 21).error,
        Some(GenerateError::TooLarge { needed: 11, have: 10 })
    );
    assert_eq!(
        rig.ask(&prompt(1, 20), u32::MAX).error,
        Some(GenerateError::ContextTooLong { prompt: 20, reply: u32::MAX, context: 4096 })
    );
    assert_eq!(rig.ask(&prompt(1, 20), 20).tokens.len(), 20);
}

#[test]
fn a_full_queue_refuses_and_says_so() {
    let mut rig = roomy().rig();
    let mut receivers: Vec<_> = (0..70).map(|_| rig.submit(&prompt(1, 8), 2)).collect();
    rig.step();
    let refused = receivers
        .iter_mut()
        .map(reply)
        .filter(|reply| reply.error == Some(GenerateError::QueueFull { waiting: 64 }));
    assert_eq!(refused.count(), 6);
    rig.run();
}

#[test]
fn a_shutdown_finishes_what_runs_and_refuses_what_waits() {
    let mut rig = RigConfig { sequences_max: 1, ..roomy() }.rig();
    let mut running = rig.submit(&prompt(1, 8), 9);
    let mut waiting = rig.submit(&prompt(2, 8), 9);
    while rig.engine.state.running.is_empty() {
        rig.step();
    }
    rig.handle.submit(Command::Shutdown).unwrap();
    let mut late = rig.submit(&prompt(3, 8), 9);
    while !rig.engine.is_done() {
        rig.step();
    }
    assert_eq!(reply(&mut running).tokens.len(), 9);
    assert_eq!(reply(&mut waiting).error, Some(GenerateError::ShuttingDown));
    assert_eq!(reply(&mut late).error, Some(GenerateError::ShuttingDown));
    assert_eq!(rig.daemon().block_count(), 4, "all blocks and the tail are saved");
}

#[test]
fn records_of_conversations_pass_through_and_a_mute_daemon_is_a_none() {
    let mut rig = roomy().rig();
    let get = |rig: &mut Rig| {
        let (answer, receiver) = oneshot::channel();
        rig.handle.submit(Command::GetConversation { id: [5; 32], answer }).unwrap();
        receiver
    };
    rig.handle.submit(Command::PutConversation { id: [5; 32], record: vec![1, 2] }).unwrap();
    let mut known = get(&mut rig);
    rig.step();
    rig.step();
    assert_eq!(known.try_recv(), Ok(Some(vec![1, 2])));
    rig.daemon().is_mute = true;
    let mut unanswered = get(&mut rig);
    for _turn in 0..300 {
        rig.step();
    }
    assert_eq!(unanswered.try_recv(), Ok(None));
}

#[test]
fn without_free_frames_the_reply_is_the_same_and_saving_goes_on_later() {
    let mut rig = roomy().rig();
    rig.daemon().frames = 2;
    let first = prompt(4, 21);
    let mut receiver = rig.submit(&first, 6);
    for _turn in 0..50 {
        rig.step();
    }
    let answer = reply(&mut receiver).tokens;
    assert_eq!(answer, cold(SkipConfig::OFF, &first, 6));
    assert_eq!(rig.daemon().block_count(), 2);
    rig.daemon().frames = 100;
    rig.run();
    assert_eq!(rig.daemon().block_count(), 7);
}

#[test]
fn a_daemon_that_forgot_everything_is_given_what_the_device_still_has() {
    let mut rig = roomy().rig();
    let first = prompt(4, 21);
    let answer = rig.ask(&first, 6).tokens;
    rig.daemon().detach();
    rig.step();
    rig.daemon().forget();
    rig.daemon().attach();
    let second = next_turn(&first, &answer, &[9, 8]);
    let third = next_turn(&second, &rig.ask(&second, 5).tokens, &[3]);
    rig.clear_device();
    let reply = rig.ask(&third, 3);
    assert_eq!(reply.cached.host, second.len() as u32 + 4);
    assert_eq!(reply.tokens, cold(SkipConfig::OFF, &third, 3));
}

mod skipping {
    use super::*;

    const OWN: SkipConfig = SkipConfig {
        prefill_sublayers: 2,
        decode_sublayers: 3,
        learn_tokens: 4,
        extras: false,
        reuse: Reuse::Own,
    };

    #[test]
    fn both_sets_come_from_one_ranking_and_may_differ() {
        let sets = RigConfig { skip: OWN, ..roomy() }.rig().engine.state.sets;
        // Similarities: attention 0.95, 0.7, 0.97; FFN 0.6, 0.92, 0.9.
        assert_eq!(sets.prefill.skipped().collect::<Vec<_>>(), [0, 4]);
        assert_eq!(sets.decode.skipped().collect::<Vec<_>>(), [0, 3, 4]);
        assert_eq!(*sets.present_layers, [1]);
    }

    #[test]
    fn more_sublayers_than_the_model_has_are_refused() {
        let doorbell = Doorbell::new();
        let knobs = Arc::new(Mutex::new(Knobs::default()));
        let mut backend = ToyBackend::new(8, knobs, Arc::default());
        let config = SkipConfig { prefill_sublayers: 2 * usize::from(LAYERS), ..OWN };
        let refused = learn::skip_sets(&config, &[1, 2], 64, 16, &mut backend, &doorbell);
        assert!(matches!(refused, Err(StartError::Config(_))));
    }

    #[test]
    fn what_decode_computed_is_healed_and_cached_equals_cold() {
        let mut rig = RigConfig { skip: OWN, ..roomy() }.rig();
        let first = prompt(4, 22);
        let answer = rig.ask(&first, 9).tokens;
        let second = next_turn(&first, &answer, &[9, 8]);
        let on_device = rig.ask(&second, 5);
        // The prompt, and nothing that decode computed under its other set.
        assert_eq!(on_device.cached.total(), 22);
        assert_eq!(on_device.tokens, cold(OWN, &second, 5));
        let third = next_turn(&second, &on_device.tokens, &[5]);
        rig.clear_device();
        let from_frames = rig.ask(&third, 5);
        assert_eq!(from_frames.cached.host, second.len() as u32);
        assert_eq!(from_frames.tokens, cold(OWN, &third, 5));
        assert!(rig.daemon().variants().iter().all(|variant| matches!(variant, Variant::Skip(_))));
    }

    #[test]
    fn equal_sets_leave_nothing_to_heal() {
        let skip = SkipConfig { decode_sublayers: 2, ..OWN };
        let mut rig = RigConfig { skip, ..roomy() }.rig();
        let first = prompt(4, 22);
        let answer = rig.ask(&first, 9).tokens;
        let second = next_turn(&first, &answer, &[9, 8]);
        rig.clear_device();
        let reply = rig.ask(&second, 5);
        assert_eq!(reply.cached.host, 30);
        assert_eq!(reply.tokens, cold(skip, &second, 5));
    }

    #[test]
    fn reuse_any_takes_what_decode_computed_and_labels_it_mixed() {
        let skip = SkipConfig { reuse: Reuse::Any, ..OWN };
        let mut rig = RigConfig { skip, ..roomy() }.rig();
        let first = prompt(4, 22);
        let answer = rig.ask(&first, 9).tokens;
        let second = next_turn(&first, &answer, &[9, 8]);
        rig.clear_device();
        assert_eq!(rig.ask(&second, 5).cached.host, 30);
        assert!(rig.daemon().variants().contains(&Variant::Mixed));
    }

    #[test]
    fn preemption_computes_each_token_under_its_own_set_again() {
        for (learn_tokens, extras) in [(4, false), (4, true)] {
            let skip = SkipConfig { learn_tokens, extras, ..OWN };
            let mut rig = RigConfig { blocks: 22, skip, ..roomy() }.rig();
            let prompts: Vec<Vec<u32>> = (1..=3).map(|seed| prompt(seed, 12)).collect();
            let mut receivers: Vec<_> =
                prompts.iter().map(|prompt| rig.submit(prompt, 28)).collect();
            rig.run();
            assert!(rig.engine.stats.preemptions.get() > 0);
            for (prompt, receiver) in prompts.iter().zip(&mut receivers) {
                assert_eq!(reply(receiver).tokens, cold(skip, prompt, 28));
            }
        }
    }

    #[test]
    fn every_sequence_may_get_extras_not_only_the_first() {
        let skip = SkipConfig { decode_sublayers: 2, extras: true, ..OWN };
        let mut rig = RigConfig { skip, ..roomy() }.rig();
        for seed in 1..=25 {
            rig.ask(&prompt(seed, 9), 8);
            assert_eq!(rig.engine.stats.extras_sequences.get(), u64::from(seed));
        }
    }

    #[test]
    fn a_reply_with_extras_is_reused_up_to_where_they_began() {
        let skip = SkipConfig { decode_sublayers: 2, extras: true, ..OWN };
        let mut rig = RigConfig { skip, ..roomy() }.rig();
        let first = prompt(4, 22);
        let answer = rig.ask(&first, 12).tokens;
        let second = next_turn(&first, &answer, &[9, 8]);
        let reply = rig.ask(&second, 5);
        assert_eq!(reply.cached.total(), 22 + skip.learn_tokens);
        assert_eq!(reply.tokens, cold(skip, &second, 5));
    }
}

/// What may happen to an engine, in any order.
#[derive(Debug, Clone)]
enum Happening {
    Ask { conversation: usize, said: u32, reply: u32 },
    Step(u8),
    Cancel(usize),
    Detach,
    Attach,
    Forget,
    Demote,
    Spoil,
    HoldLoads(bool),
    SavesFirst(bool),
    Mute(bool),
    Frames(usize),
    ClearDevice,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        6 => (0..4_usize, 1..9_u32, 1..12_u32)
            .prop_map(|(conversation, said, reply)| Happening::Ask { conversation, said, reply }),
        8 => (1..20_u8).prop_map(Happening::Step),
        1 => any::<usize>().prop_map(Happening::Cancel),
        1 => Just(Happening::Detach),
        2 => Just(Happening::Attach),
        1 => Just(Happening::Forget),
        1 => Just(Happening::Demote),
        1 => Just(Happening::Spoil),
        1 => any::<bool>().prop_map(Happening::HoldLoads),
        1 => any::<bool>().prop_map(Happening::SavesFirst),
        1 => any::<bool>().prop_map(Happening::Mute),
        1 => (0..30_usize).prop_map(Happening::Frames),
        1 => Just(Happening::ClearDevice),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Design invariants 2, 3 and 7 in one: whatever happens to daemon, frames and clients, each reply
    /// is the cold one, nothing hangs, and nothing is left held.
    #[test]
    fn whatever_happens_costs_time_and_never_a_token(
        happenings in prop::collection::vec(happening(), 1..60),
        blocks in 18..60_u32,
        sequences_max in 1..5_usize,
        step_tokens_max in 5..24_usize,
        skipping in 0..4_u8,
    ) {
        let skip = SkipConfig {
            prefill_sublayers: usize::from(skipping),
            decode_sublayers: usize::from(skipping / 2),
            extras: skipping == 3,
            learn_tokens: 3,
            reuse: Reuse::Own,
        };
        let mut rig = RigConfig { blocks, sequences_max, step_tokens_max, skip, cached: true, shared_prefixes: vec![] }.rig();
        let capacity = blocks * u32::from(TOKENS_PER_BLOCK);
        let mut conversations: Vec<Vec<u32>> = (0..4).map(|seed| prompt(seed, 6)).collect();
        let mut open = Vec::new();
        for happening in happenings {
            match happening {
                Happening::Ask { conversation, said, reply } => {
                    let tokens = &mut conversations[conversation];
                    tokens.extend(prompt(said, said));
                    if tokens.len() as u32 + reply > capacity {
                        continue;
                    }
                    // The next turn holds this one's reply, as a client would send it.
                    let prompt = tokens.clone();
                    tokens.extend(cold(skip, &prompt, reply));
                    let receiver = rig.submit(&prompt, reply);
                    open.push((prompt, reply, receiver));
                }
                Happening::Step(turns) => (0..turns).for_each(|_| rig.step()),
                Happening::Cancel(which) if !open.is_empty() => {
                    let which = which % open.len();
                    drop(open.swap_remove(which));
                }
                Happening::Cancel(_) => {}
                Happening::Detach => rig.daemon().detach(),
                Happening::Attach => rig.daemon().attach(),
                Happening::Forget => rig.daemon().forget(),
                Happening::Demote => rig.daemon().demote_all(),
                Happening::Spoil => rig.daemon().spoil_all(),
                Happening::HoldLoads(held) => rig.knobs().loads_held = held,
                Happening::SavesFirst(first) => rig.knobs().saves_first = first,
                Happening::Mute(mute) => rig.daemon().is_mute = mute,
                Happening::Frames(frames) => rig.daemon().frames = frames,
                Happening::ClearDevice => drop(rig.clear_device()),
            }
        }
        rig.knobs().loads_held = false;
        rig.daemon().frames = 10_000;
        rig.run();
        prop_assert!(rig.knobs().tokens_max <= step_tokens_max);
        prop_assert!(rig.knobs().rows_max <= sequences_max);
        hits_and_misses::add_up(&rig);
        for (prompt, tokens_max, mut receiver) in open {
            let reply = reply(&mut receiver);
            prop_assert_eq!(reply.error, None);
            prop_assert_eq!(reply.finish, Some(FinishReason::Length));
            prop_assert_eq!(reply.tokens, cold(skip, &prompt, tokens_max));
            let account = reply.account.expect("each prompt is counted");
            prop_assert_eq!(account.total() as usize, prompt.len());
            prop_assert!(reply.cached.total() < prompt.len() as u32);
        }
    }
}
