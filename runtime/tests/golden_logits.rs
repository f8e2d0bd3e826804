//! Log-probabilities and greedy continuations against llama.cpp's (`tests/golden/`), through the whole
//! server: API, engine, backend.
//!
//! # Tolerance
//!
//! Both sides quantise activations to eight bits in front of the quantised weights, but not with the same
//! numbers: llama.cpp rounds each block's scale to f16 and keeps the KV of these runs in f32, we keep
//! scales in f32 and the KV in f16, and sums are taken in another order. A rounding that falls the other
//! way moves an activation by half a step, 0.4 % of its block's largest value; such moves are random and
//! add up as a square root over 60 sublayers, to a few per cent of a logit's spread (about 3 nats).
//! [`LOGPROB_TOLERANCE`] is that bound. A wrong rotation, mask, norm or scale moves log-probabilities by
//! whole nats.

mod common;

use std::collections::HashMap;

use common::Runtime;
use serde_json::{Value, json};

const GOLDEN: &str = include_str!("../../tests/golden/logits.json");

/// Nats; see above.
const LOGPROB_TOLERANCE: f64 = 0.25;
/// A step whose best two tokens lie closer than two of them may go either way.
const LEAD_CLEAR: f64 = 2.0 * LOGPROB_TOLERANCE;
/// Mean over the tokens compared: random differences cancel, a systematic one does not.
const MEAN_TOLERANCE: f64 = 0.1;

/// The reply's tokens by their bytes, and for each the likeliest ones with their log-probabilities.
fn reports(answer: &Value) -> Vec<(Value, HashMap<String, f64>)> {
    let content = answer["choices"][0]["logprobs"]["content"].as_array().expect("logprobs");
    let of = |report: &Value| {
        let top = report["top_logprobs"].as_array().unwrap();
        let pairs = top.iter().map(|t| (t["bytes"].to_string(), t["logprob"].as_f64().unwrap()));
        (report["bytes"].clone(), pairs.collect())
    };
    content.iter().map(of).collect()
}

#[test]
fn logprobs_and_greedy_tokens_agree_with_llama_cpp() {
    let Some(path) = common::smollm2() else { return };
    let runtime = Runtime::start(&path, &[]);
    let bytes_of = |token: &Value| {
        let text = runtime.post("/detokenize", &json!({ "tokens": [token] })).ok();
        json!(text["prompt"].as_str().unwrap().as_bytes())
    };
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let (mut sum, mut count) = (0.0, 0);
    for entry in golden["entries"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        let greedy = entry["greedy"].as_array().unwrap();
        let answer = runtime.chat(&json!({
            "prompt_token_ids": entry["token_ids"], "temperature": 0, "max_tokens": greedy.len(),
            "logprobs": true, "top_logprobs": 20, "cache_salt": name,
        }));
        let reports = reports(&answer);

        let (_, ours) = &reports[0];
        let mut worst: f64 = 0.0;
        let theirs = entry["top"].as_array().unwrap();
        let floor = theirs.last().unwrap()[1].as_f64().unwrap();
        for pair in theirs {
            let logprob = pair[1].as_f64().unwrap();
            // A partial character has no text to compare by, and the last few may change places with
            // what comes behind them.
            match ours.get(&bytes_of(&pair[0]).to_string()) {
                Some(our) => {
                    worst = worst.max((our - logprob).abs());
                    sum += our - logprob;
                    count += 1;
                }
                None => assert!(
                    logprob < floor + LOGPROB_TOLERANCE || bytes_of(&pair[0]).to_string().contains("239"),
                    "{name}: token {} ({logprob}) is not among our likeliest",
                    pair[0]
                ),
            }
        }
        assert!(worst <= LOGPROB_TOLERANCE, "{name}: a log-probability is {worst} nats away");

        let mut equal = 0;
        for (step, (our, _)) in greedy.iter().zip(&reports) {
            if *our != bytes_of(&step["token"]) {
                let lead = step["lead"].as_f64().unwrap();
                assert!(lead < LEAD_CLEAR, "{name}: step {equal} differs, where the lead is {lead}");
                break; // From here on the two continue different texts.
            }
            equal += 1;
        }
        eprintln!("{name}: worst {worst:.3} nats, {equal} of {} greedy tokens equal", greedy.len());
    }
    let mean = sum / f64::from(count);
    assert!(mean.abs() <= MEAN_TOLERANCE, "log-probabilities are {mean} nats away on average");
}
