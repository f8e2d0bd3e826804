//! The engine over the CPU backend and a tiny random model: the same bits, cached or cold, alone or
//! with others. Frames are the toy daemon's; two processes are tested in `tests/`.

use tempfile::NamedTempFile;

use super::*;
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::batch::{Batch, DeviceGeometry, LoadPlan, SavePlan};
use crate::weights::gguf::Model;
use crate::weights::random::write_random_gguf;

const SEED: u64 = 3;
const TOKENS_PER_BLOCK: u16 = 16;

/// The CPU backend rings when it is done; this is only how long a lost ring would cost.
const PATIENCE: Duration = Duration::from_secs(5);

/// The CPU backend, as slow as a second a step by the rig's clock: what is worth loading must not
/// depend on how busy the machine is.
struct Timed(CpuBackend);

impl Backend for Timed {
    fn geometry(&self) -> DeviceGeometry {
        self.0.geometry()
    }

    fn submit(&mut self, batch: Batch) -> StepId {
        self.0.submit(batch)
    }

    fn load(&mut self, plan: LoadPlan) {
        self.0.load(plan);
    }

    fn save(&mut self, plan: SavePlan) {
        self.0.save(plan);
    }

    fn poll(&mut self) -> Option<BackendEvent> {
        let mut event = self.0.poll();
        if let Some(BackendEvent::Step(output)) = &mut event {
            output.compute = Duration::from_secs(1);
        }
        event
    }
}

fn model(layers: usize) -> Model {
    let file = NamedTempFile::new().unwrap();
    write_random_gguf(file.path(), SEED, layers).unwrap();
    Model::open(file.path()).unwrap()
}

fn rig(config: RigConfig) -> Rig {
    rig_of(3, config)
}

fn rig_of(layers: usize, config: RigConfig) -> Rig {
    let model = model(layers);
    let doorbell = Doorbell::new();
    let waker = doorbell.waker();
    let shape = model.config();
    let row_bytes = 2 * 2 * shape.kv_heads * shape.head_dim * usize::from(TOKENS_PER_BLOCK);
    let options = CpuOptions {
        threads: 2,
        device_bytes: u64::from(config.blocks) * (row_bytes * shape.layers) as u64,
        tokens_per_block: TOKENS_PER_BLOCK,
    };
    let backend = CpuBackend::new(&model, options, Arc::new(move || waker.ring())).unwrap();
    assert_eq!(backend.geometry().block_count, config.blocks);
    let vocabulary = shape.vocab as u32;
    let mut rig =
        config.over(Box::new(Timed(backend)), vocabulary, doorbell, Arc::default(), Arc::default());
    rig.patience = PATIENCE;
    rig
}

/// A sampled request: a random model's greedy reply soon repeats itself.
fn submit(rig: &mut Rig, tokens: &[u32], tokens_max: u32) -> mpsc::UnboundedReceiver<Event> {
    let (mut request, receiver) = request(tokens, tokens_max);
    request.sampling.temperature = 1.0;
    request.sampling.seed = 11;
    rig.handle.submit(Command::Generate(request)).unwrap();
    receiver
}

fn ask(rig: &mut Rig, tokens: &[u32], tokens_max: u32) -> Reply {
    let mut receiver = submit(rig, tokens, tokens_max);
    rig.run();
    reply(&mut receiver)
}

fn cold(skip: SkipConfig, tokens: &[u32], tokens_max: u32) -> Vec<u32> {
    ask(&mut rig(RigConfig { skip, cached: false, ..roomy() }), tokens, tokens_max).tokens
}

#[test]
fn four_turns_from_device_host_and_disk_read_as_they_do_cold() {
    let mut rig = rig(RigConfig { step_tokens_max: 64, ..roomy() });
    let mut tokens = prompt(1, 70);
    let mut tiers = CachedTokens::default();
    for turn in 0..4_u32 {
        match turn {
            2 => drop(rig.clear_device()),
            3 => {
                rig.clear_device();
                rig.daemon().demote_all();
            }
            _ => {}
        }
        let reply = ask(&mut rig, &tokens, 13);
        assert_eq!(reply.tokens, cold(SkipConfig::OFF, &tokens, 13), "turn {turn}");
        assert_eq!(reply.cached.total() > 0, turn > 0);
        tiers.device += reply.cached.device;
        tiers.host += reply.cached.host;
        tiers.disk += reply.cached.disk;
        tokens = next_turn(&tokens, &reply.tokens, &prompt(turn, 9 + turn));
    }
    assert!(tiers.device > 0 && tiers.host > 0 && tiers.disk > 0, "{tiers:?}");
}

#[test]
fn a_request_may_forbid_the_cache_to_read_or_to_store() {
    let mut rig = rig(RigConfig { step_tokens_max: 64, ..roomy() });
    let tokens = prompt(1, 70);
    let mut ask = |cache: CacheUse, clear: bool| {
        let (mut request, mut receiver) = request(&tokens, 13);
        request.cache = cache;
        rig.handle.submit(Command::Generate(request)).unwrap();
        rig.run();
        if clear {
            rig.clear_device();
        }
        let reply = reply(&mut receiver);
        (reply.tokens, reply.cached.total())
    };
    let no_store = CacheUse { no_store: true, ..CacheUse::default() };
    let no_read = CacheUse { no_read: true, ..CacheUse::default() };
    let (first, cached) = ask(no_store, false);
    assert_eq!(cached, 0);
    // Neither the device nor the host has kept anything of it.
    assert_eq!(ask(CacheUse::default(), true), (first.clone(), 0));
    // What the second request stored is there for the third, but not for one that may not read.
    assert_eq!(ask(CacheUse::default(), true), (first.clone(), 69));
    assert_eq!(ask(no_read, false), (first.clone(), 0));
    assert_eq!(ask(no_store, false), (first, 69));
}

#[test]
fn a_block_holds_the_same_bytes_however_its_tokens_were_computed() {
    let mut turns = rig(RigConfig { step_tokens_max: 64, ..roomy() });
    let mut tokens = prompt(1, 70);
    for turn in 0..4_u32 {
        let reply = ask(&mut turns, &tokens, 13);
        tokens = next_turn(&tokens, &reply.tokens, &prompt(turn, 9 + turn));
    }
    let by_turns = turns.daemon().checksums(TOKENS_PER_BLOCK);
    for step_tokens_max in [8, 9, 16, 50, 300] {
        let mut at_once = rig(RigConfig { step_tokens_max, ..roomy() });
        ask(&mut at_once, &tokens, 1);
        let at_once = at_once.daemon().checksums(TOKENS_PER_BLOCK);
        assert!(by_turns.len() >= 7, "{} blocks", by_turns.len());
        for (key, checksums) in &by_turns {
            let same = &at_once[key];
            assert_eq!(same, checksums, "block {key}, {step_tokens_max} tokens a step");
        }
    }
}

#[test]
fn the_same_prompt_gives_the_same_tokens_again_and_again() {
    let tokens = prompt(1, 150);
    let first = cold(SkipConfig::OFF, &tokens, 40);
    let mut rig = rig(RigConfig { cached: false, step_tokens_max: 64, ..roomy() });
    for _again in 0..20 {
        rig.clear_device();
        assert_eq!(ask(&mut rig, &tokens, 40).tokens, first);
    }
}

#[test]
fn eight_together_get_the_tokens_that_each_gets_alone() {
    let mut rig = rig(RigConfig { step_tokens_max: 48, ..roomy() });
    let prompts: Vec<Vec<u32>> = (1..=8).map(|seed| prompt(seed, 5 + 9 * seed)).collect();
    let mut receivers: Vec<_> = prompts.iter().map(|prompt| submit(&mut rig, prompt, 12)).collect();
    rig.run();
    for (prompt, receiver) in prompts.iter().zip(&mut receivers) {
        assert_eq!(reply(receiver).tokens, cold(SkipConfig::OFF, prompt, 12));
    }
}

#[test]
fn preempted_sequences_get_the_tokens_of_those_that_were_not() {
    for cached in [true, false] {
        // Three sequences of seven blocks at the end, room for two.
        let mut rig = rig(RigConfig { blocks: 15, step_tokens_max: 64, cached, ..roomy() });
        let prompts: Vec<Vec<u32>> = (1..=3).map(|seed| prompt(seed, 40)).collect();
        let mut receivers: Vec<_> =
            prompts.iter().map(|prompt| submit(&mut rig, prompt, 66)).collect();
        rig.run();
        assert!(rig.engine.stats.preemptions.get() > 0);
        for (prompt, receiver) in prompts.iter().zip(&mut receivers) {
            assert_eq!(reply(receiver).tokens, cold(SkipConfig::OFF, prompt, 66));
        }
    }
}

#[test]
fn spoiled_frames_are_noticed_by_their_checksums() {
    let mut rig = rig(RigConfig { step_tokens_max: 64, ..roomy() });
    let first = prompt(1, 70);
    let answer = ask(&mut rig, &first, 13).tokens;
    rig.clear_device();
    rig.daemon().spoil_all();
    let second = next_turn(&first, &answer, &[9, 8, 7]);
    assert_eq!(ask(&mut rig, &second, 13).tokens, cold(SkipConfig::OFF, &second, 13));
    assert_eq!(rig.engine.stats.loads.with_label_values(&["failed"]).get(), 1);
}

#[test]
fn with_a_prefill_set_unlike_the_decode_set_cached_equals_cold() {
    let skip = SkipConfig {
        prefill_sublayers: 2,
        decode_sublayers: 3,
        learn_tokens: 4,
        extras: true,
        ..SkipConfig::OFF
    };
    let mut rig = rig(RigConfig { skip, step_tokens_max: 64, ..roomy() });
    let sets = rig.engine.state.sets.clone();
    assert_ne!(sets.prefill, sets.decode);
    let mut tokens = prompt(1, 70);
    for turn in 0..3_u32 {
        rig.clear_device();
        let reply = ask(&mut rig, &tokens, 21);
        assert_eq!(reply.tokens, cold(skip, &tokens, 21), "turn {turn}");
        assert_eq!(reply.cached.host > 0, turn > 0);
        tokens = next_turn(&tokens, &reply.tokens, &prompt(turn, 9));
    }
}

/// The KV of a token of a model of one layer depends on the token alone. What a truncation kept, rotated to its new
/// places, is then what computing the kept ids gives: the same tokens are drawn, from device blocks and from frames.
#[test]
fn kept_kv_at_its_new_places_is_what_computing_it_there_gives() {
    let history: Vec<u32> = prompt(5, 16 * 9 + 7);
    for (sinks, dropped) in [(0, 1), (1, 4), (3, 2), (2, 7)] {
        let (start, tokens) =
            truncated_in_blocks_of(TOKENS_PER_BLOCK, &history, sinks, dropped, &prompt(8, 11));
        let kept = (9 - dropped) * 16;
        let mut cold = rig_of(1, RigConfig { cached: false, ..roomy() });
        let mut receiver = submit(&mut cold, &tokens, 24);
        cold.run();
        let expected = reply(&mut receiver).tokens;
        let mut rig = rig_of(1, roomy());
        rig.ask(&history, 1);
        for tier in ["device", "host"] {
            if tier == "host" {
                rig.clear_device();
            }
            let (mut request, mut receiver) = request(&tokens, 24);
            (request.sampling.temperature, request.sampling.seed) = (1.0, 11);
            request.start = Some(start.clone());
            request.cache.no_store = true;
            rig.handle.submit(Command::Generate(request)).unwrap();
            rig.run();
            let told = reply(&mut receiver);
            let found = if tier == "host" { told.cached.host } else { told.cached.device };
            assert_eq!((found, told.is_unbroken), (kept, false), "{tier}");
            assert_eq!(
                told.tokens, expected,
                "{sinks} kept at the start, {dropped} dropped, {tier}"
            );
        }
    }
}
