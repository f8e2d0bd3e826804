//! Many random turns over a real daemon that is killed in between: each prompt token of each answer is one
//! hit or one miss, and the runtime's counters say the same as the answers together.

mod support;

use std::collections::BTreeMap;

use runtime::weights::random::write_tiny_gguf;
use serde_json::Value;
use support::daemon::Daemon;
use support::{Runtime, TOKENS_PER_BLOCK, beside_us, prompt, region_bytes};

const TURNS: u32 = 120;
/// A worker dies after so many turns.
const TURNS_PER_LIFE: u32 = 24;
const CONVERSATIONS: u32 = 5;

/// Numbers from 0 to `below`, the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, below: u32) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(below)) as u32
    }
}

/// Adds one answer's hits and misses, and checks that they are the prompt.
fn add(sums: &mut BTreeMap<String, u64>, usage: &Value) {
    let details = &usage["prompt_tokens_details"];
    let mut counted = 0;
    for kind in ["cached_tokens_by_tier", "missed_tokens_by_reason"] {
        for (label, tokens) in details[kind].as_object().expect("an object") {
            let tokens = tokens.as_u64().expect("a number of tokens");
            counted += tokens;
            *sums.entry(label.clone()).or_default() += tokens;
        }
    }
    assert_eq!(Some(counted), usage["prompt_tokens"].as_u64(), "{usage}");
}

#[test]
fn hits_and_misses_are_the_prompts_whatever_happens_to_the_daemon() {
    let dir = tempfile::tempdir().expect("a folder");
    let model = dir.path().join("tiny.gguf");
    write_tiny_gguf(&model, 7).expect("the tiny model");
    let frames = 24 * 16 / TOKENS_PER_BLOCK as u64;
    let binary = beside_us("cache-daemon", "COLLOQUY_CACHE_DAEMON");
    let daemon = Daemon::start(&binary, dir.path(), region_bytes(&model, frames), &[]);
    let runtime = Runtime::start(&model, Some(&daemon.socket), &["--device-bytes=64Mi"]);
    let client = runtime.client();
    let mut random = Random(11);
    let mut lengths = [40_u32; CONVERSATIONS as usize];
    let (mut sums, mut prompts) = (BTreeMap::new(), 0);
    for turn in 1..=TURNS {
        let conversation = random.below(CONVERSATIONS);
        let length = &mut lengths[conversation as usize];
        *length = if *length > 400 { 30 } else { *length + random.below(40) };
        let mut tokens = prompt(conversation, *length);
        if random.below(6) == 0 {
            let edited = random.below(*length) as usize;
            tokens[edited] = 3 + random.below(200); // Said otherwise than before.
        }
        let salt = if random.below(8) == 0 { "another" } else { "" };
        let answer = client.ask(&tokens, salt);
        prompts += u64::from(*length);
        add(&mut sums, &answer.usage);
        if random.below(3) == 0 {
            client.clear_device();
        }
        if turn % TURNS_PER_LIFE == 0 {
            daemon.kill_worker();
        }
    }
    assert_eq!(sums.values().sum::<u64>(), prompts);
    let counted = |name: &str| client.metric(&format!("colloquy_runtime_{name}"));
    assert_eq!(counted("cache_query_tokens_total"), prompts);
    let both = counted("cache_hit_tokens_total") + counted("cache_miss_tokens_total");
    assert_eq!(both, prompts, "{sums:?}");
    let counted = |labels: &[&str]| labels.iter().filter_map(|label| sums.get(*label)).sum::<u64>();
    for label in ["device", "host", "never_stored", "diverged", "detached", "last_token"] {
        assert!(counted(&[label]) > 0, "no {label} in {sums:?}");
    }
    // Whether a disk is worth waiting for, and how long, is measured: one of these it is.
    assert!(counted(&["disk", "late", "slower_than_recompute"]) > 0, "{sums:?}");
    println!("{prompts} prompt tokens of {TURNS} turns: {sums:?}");
    runtime.stop();
}
