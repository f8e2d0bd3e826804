//! A system prompt that the operator declared as shared, over a real daemon: two tenants find each other's
//! blocks of it, and nothing else of each other.

mod support;

use std::path::PathBuf;

use runtime::weights::random::write_tiny_gguf;
use serde_json::{Value, json};
use support::daemon::Daemon;
use support::{
    Runtime, TOKENS_PER_BLOCK, beside_us, kvctl, kvctl_refuses, prompt, region_bytes,
    until_attached, until_recorded,
};

const SYSTEM: &str = "You are the help desk of a railway. Answer in one sentence. Be kind, be brief, and \
                      never promise that a train is on time, since nobody can know that.";

fn model_and_daemon() -> (tempfile::TempDir, PathBuf, Daemon) {
    let dir = tempfile::tempdir().expect("a folder");
    let model = dir.path().join("tiny.gguf");
    write_tiny_gguf(&model, 7).expect("the tiny model");
    let binary = beside_us("cache-daemon", "COLLOQUY_CACHE_DAEMON");
    let daemon = Daemon::start(&binary, dir.path(), region_bytes(&model, 200), &[]);
    (dir, model, daemon)
}

#[test]
fn two_tenants_share_the_declared_prompt_through_the_daemon_and_nothing_else() {
    let (_dir, model, daemon) = model_and_daemon();
    let declared = format!("--shared-prefix={SYSTEM}");
    let runtime = Runtime::start(&model, Some(&daemon.socket), &["--device-bytes=64Mi", &declared]);
    let cold = Runtime::start(&model, None, &["--device-bytes=64Mi"]);
    let client = runtime.client();
    let ask = |system: &str, said: &str, salt: &str| -> Value {
        let body = json!({
            "messages": [
                { "role": "system", "content": system },
                { "role": "user", "content": said },
            ],
            "max_tokens": 6, "temperature": 0, "ignore_eos": true, "cache_salt": salt,
        });
        let reply = client.chat(&body);
        let uncached = cold.client().chat(&json!({
            "messages": body["messages"], "max_tokens": 6, "temperature": 0, "ignore_eos": true,
            "cache": { "no_read": true },
        }));
        assert_eq!(reply["choices"][0]["message"], uncached["choices"][0]["message"]);
        client.clear_device(); // What comes next comes through the daemon.
        reply["usage"].clone()
    };
    let host =
        |usage: &Value| usage["prompt_tokens_details"]["cached_tokens_by_tier"]["host"].as_u64();
    let said = "When does the next train to the sea leave, and from which platform does it go?";

    let first = ask(SYSTEM, said, "one");
    assert_eq!(host(&first), Some(0), "{first}");
    let other_tenant = ask(SYSTEM, said, "two");
    let shared = host(&other_tenant).expect("a number");
    // As many whole blocks as the declared prompt has, about a token a byte; not the question, though the
    // other tenant asked the very same one.
    assert_eq!(shared % TOKENS_PER_BLOCK as u64, 0, "{other_tenant}");
    let prompt = other_tenant["prompt_tokens"].as_u64().expect("a number");
    assert!(shared >= 5 * TOKENS_PER_BLOCK as u64, "{other_tenant}");
    assert!(shared + 2 * TOKENS_PER_BLOCK as u64 <= prompt, "{other_tenant}");
    assert_eq!(host(&ask(SYSTEM, said, "")), Some(shared), "so does a tenant without a salt");
    // Each finds all of its own.
    assert_eq!(host(&ask(SYSTEM, said, "one")), Some(prompt - 1));
    // A prompt that nobody declared is not shared.
    let undeclared = SYSTEM.to_uppercase();
    ask(&undeclared, said, "one");
    let usage = ask(&undeclared, said, "two");
    assert!(host(&usage) < Some(TOKENS_PER_BLOCK as u64), "{usage}");
    runtime.stop();
    cold.stop();
}

#[test]
fn a_truncation_keeps_what_every_tenant_shares() {
    let (_dir, model, daemon) = model_and_daemon();
    let declared = format!("--shared-prefix={SYSTEM}");
    let runtime = Runtime::start(&model, Some(&daemon.socket), &[&declared]);
    let client = runtime.client();
    until_attached(&client);
    let ask = |messages: &Value| -> Value {
        let answer = client.chat(&json!({
            "messages": messages, "max_tokens": 6, "temperature": 0, "ignore_eos": true,
            "cache_salt": "one", "prompt_cache_key": "chat",
        }));
        until_recorded(
            &daemon,
            "chat",
            answer["usage"]["prompt_tokens"].as_u64().expect("a count"),
        );
        client.clear_device();
        answer
    };
    let said =
        "When does the next train to the sea leave, and from which platform does it go? ".repeat(2);
    let mut messages = json!([
        { "role": "system", "content": SYSTEM }, { "role": "user", "content": said },
    ]);
    let first = ask(&messages);
    let half = kvctl_refuses(&daemon, &["truncate", "chat", "--sinks=1", "--drop=2"]);
    assert!(half.contains("a prompt that all tenants share"), "{half}");
    let size = TOKENS_PER_BLOCK as u64;
    let shared: u64 = half.split_whitespace().find_map(|word| word.parse().ok()).expect("a count");
    let shown = kvctl(&daemon, &["truncate", "chat", &format!("--sinks={shared}"), "--drop=3"]);
    let kept = shown["conversation"]["tokens"].as_u64().expect("a count") / size * size;
    client.ask(&prompt(1, 16), ""); // The engine has seen what the daemon said before this.
    client.clear_device();
    for message in
        [first["choices"][0]["message"].clone(), json!({ "role": "user", "content": "more" })]
    {
        messages.as_array_mut().expect("a list").push(message);
    }
    let usage = ask(&messages)["usage"].clone();
    let details = &usage["prompt_tokens_details"];
    assert_eq!(details["cached_tokens_by_tier"]["host"], kept, "{usage}");
    assert_eq!(details["dropped_tokens"], 3 * size, "{usage}");
    runtime.stop();
}
