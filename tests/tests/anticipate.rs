//! A client says that its user types: the real daemon brings the history from disk before the turn is asked
//! for.

mod support;

use runtime::weights::random::write_tiny_gguf;
use serde_json::{Value, json};
use support::daemon::{Daemon, until};
use support::{Runtime, TOKENS_PER_BLOCK, beside_us, prompt};

/// Of the conversation that comes back.
const HISTORY_TOKENS: u32 = 16 * 12;

/// The region's frames hold this many tokens: the history, or the other conversation, not both.
const HOST_TOKENS: u32 = 16 * 48;

fn start(model: &std::path::Path, dir: &std::path::Path) -> (Daemon, Runtime) {
    let frames = u64::from(HOST_TOKENS) / TOKENS_PER_BLOCK as u64;
    let bytes = support::region_bytes(model, frames);
    let daemon =
        Daemon::start(&beside_us("cache-daemon", "COLLOQUY_CACHE_DAEMON"), dir, bytes, &[]);
    let runtime = Runtime::start(model, Some(&daemon.socket), &["--device-bytes=64Mi"]);
    (daemon, runtime)
}

#[test]
fn an_anticipated_history_is_in_host_memory_before_its_turn_and_is_told_as_from_disk() {
    let dir = tempfile::tempdir().expect("a folder");
    let model = dir.path().join("tiny.gguf");
    write_tiny_gguf(&model, 7).expect("the tiny model");
    let (daemon, runtime) = start(&model, dir.path());
    let client = runtime.client();
    let said = |text: &str| json!({ "role": "user", "content": text });

    // A first turn, which is recorded; then others push its blocks out of the frames.
    let history: String =
        (0..HISTORY_TOKENS).map(|at| char::from(b'a' + (at % 23) as u8)).collect();
    let mut messages = vec![said(&history)];
    let first = client.turn("typing", &messages);
    messages.push(json!({ "role": "assistant", "content": first.text }));
    messages.push(said("and then?"));
    client.clear_device();
    for other in 0.. {
        client.ask(&prompt(other, HOST_TOKENS * 3 / 4), "others");
        let evicted = daemon.status_u64("/evictions_host");
        if evicted >= 2 * u64::from(HOST_TOKENS) / TOKENS_PER_BLOCK as u64 {
            break;
        }
    }
    client.clear_device();
    // A block that is still being written cannot leave, and the history would in its place.
    until("all is on disk", || {
        (daemon.status_u64("/blocks/disk") == daemon.status_u64("/blocks/known")).then_some(())
    });

    let before = daemon.status_u64("/promotes_by_hint");
    assert_eq!(client.anticipate("nobody", &json!({})).0, 404);
    assert_eq!(client.anticipate("nobody", &json!({ "cache_salt": "x" })).0, 404);
    let (status, told) = client.anticipate("typing", &json!({ "model": "test" }));
    assert_eq!((status, &told["conversation"]), (202, &json!("typing")), "{told}");
    // The last token has no KV yet; what is left over of whole blocks is a block as well.
    let stored = told["tokens"].as_u64().expect("a number") - 1;
    let blocks = stored.div_ceil(TOKENS_PER_BLOCK as u64);
    assert!(blocks >= 10, "{told}");
    let promoted = until("the history is in frames", || {
        let promoted = daemon.status_u64("/promotes_by_hint") - before;
        (promoted >= blocks).then_some(promoted)
    });
    assert_eq!(promoted, blocks, "a turn told twice?");

    let by_lookup = daemon.status_u64("/promotes_by_lookup");
    let second = client.turn("typing", &messages);
    assert_eq!(daemon.status_u64("/promotes_by_lookup"), by_lookup, "nothing was left to promote");
    assert_eq!(second.by_tier.disk, stored, "{second:?} of {told}");
    assert_eq!((second.by_tier.host, second.by_tier.device), (0, 0));
    until("no turn waits", || (daemon.status_u64("/sequences") == 0).then_some(()));
    runtime.stop();
}

#[test]
fn without_a_daemon_an_anticipation_is_refused_with_a_sentence() {
    let dir = tempfile::tempdir().expect("a folder");
    let model = dir.path().join("tiny.gguf");
    write_tiny_gguf(&model, 7).expect("the tiny model");
    let runtime = Runtime::start(&model, None, &[]);
    let client = runtime.client();
    let cases = [
        ("typing", json!({}), 503, json!("cache_unavailable")),
        ("typing", json!({ "frobnicate": 1 }), 400, json!("unknown_field")),
        ("typing", json!({ "model": "gpt-4o" }), 404, json!("model_not_found")),
        (&"x".repeat(300), json!({}), 400, Value::Null),
    ];
    for (conversation, body, status, code) in cases {
        let (found, answer) = client.anticipate(conversation, &body);
        assert_eq!((found, &answer["error"]["code"]), (status, &code), "{answer}");
        assert!(
            answer["error"]["message"].as_str().is_some_and(|text| text.len() > 20),
            "{answer}"
        );
    }
    runtime.stop();
}
