//! `kvctl` beside a living runtime: what an operator does to a conversation, its next turn sees.

mod support;

use std::process::Command;

use serde_json::{Value, json};
use support::daemon::Daemon;
use support::{Client, Runtime, beside_us, prompt};

const USER: &str = "the quick brown fox jumps over the lazy dog, again and again and again, ";

/// A conversation's first message, of several blocks.
fn opening(fruit: &str) -> String {
    format!("{}{fruit} are what I like. {}", USER.repeat(2), USER.repeat(2))
}

fn kvctl(daemon: &Daemon, arguments: &[&str]) -> Value {
    let mut command = Command::new(beside_us("kvctl", "COLLOQUY_KVCTL"));
    command.arg("--json").arg("--socket").arg(daemon.admin_socket()).args(arguments);
    let output = command.output().expect("kvctl starts");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "kvctl {arguments:?}: {told}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn with_runtime(test: impl FnOnce(&Daemon, &Client)) {
    with_runtime_of(3, test);
}

fn with_runtime_of(layers: usize, test: impl FnOnce(&Daemon, &Client)) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("tiny.gguf");
    runtime::weights::random::write_random_gguf(&path, 7, layers).expect("the tiny model");
    let binary = beside_us("cache-daemon", "COLLOQUY_CACHE_DAEMON");
    let daemon = Daemon::start(&binary, dir.path(), 64 << 20, &[]);
    let runtime = Runtime::start(&path, Some(&daemon.socket), &[]);
    test(&daemon, &runtime.client());
    runtime.stop();
}

/// A turn of a named conversation: the reply, and the tokens of its prompt.
fn turn(client: &Client, conversation: &str, messages: &[(&str, &str)]) -> (String, u64) {
    let message = |(role, content): &(&str, &str)| json!({ "role": role, "content": content });
    let messages: Vec<Value> = messages.iter().map(message).collect();
    let answer = client.turn(conversation, &messages);
    let tokens = answer.usage["prompt_tokens"].as_u64().expect("a count");
    (answer.text, tokens)
}

#[test]
fn an_edited_conversation_is_explained_in_words() {
    with_runtime(|daemon, client| {
        let (apples, pears) = (opening("apples"), opening("pears"));
        let (reply, _) = turn(client, "chat", &[("user", &apples)]);
        turn(client, "chat", &[("user", &apples), ("assistant", &reply), ("user", "more")]);
        let fine = kvctl(daemon, &["explain", "chat"]);
        assert_eq!(fine["divergence"], Value::Null, "{fine}");
        turn(client, "chat", &[("user", &pears), ("assistant", &reply), ("user", "more")]);
        let found = kvctl(daemon, &["explain", "chat", "--runtime", client.url()]);
        let divergence = &found["divergence"];
        assert_eq!(divergence["reason"], "edited", "{found}");
        let text = |part: &str| divergence[part].as_str().expect("a text").to_owned();
        let whole = |part: &str| text("shared_text") + &text(part);
        assert!(whole("before_text").contains("apples are"), "{found}");
        assert!(whole("after_text").contains("pears are"), "{found}");
    });
}

#[test]
fn a_truncation_reaches_the_next_turn_of_a_living_runtime() {
    with_runtime(|daemon, client| {
        let opening = opening("plums");
        let second = |name, reply: &str| {
            turn(client, name, &[("user", &opening), ("assistant", reply), ("user", "more")]).1
        };
        let (reply, _) = turn(client, "untouched", &[("user", &opening)]);
        let (same, _) = turn(client, "truncated", &[("user", &opening)]);
        assert_eq!(reply, same);
        let changed = kvctl(daemon, &["truncate", "truncated", "--drop=2"]);
        assert_eq!(changed["conversation"]["dropped_tokens"], 32, "{changed}");
        client.ask(&prompt(1, 16), ""); // The engine has seen what the daemon said before this.
        let dropped = second("untouched", &reply) - second("truncated", &reply);
        assert_eq!(dropped, 32);
        // The turn's record stands on the truncated history.
        let after = kvctl(daemon, &["show", "truncated"]);
        assert_eq!(after["conversation"]["dropped_tokens"], 32, "{after}");
    });
}

/// What is kept is loaded, not computed, and stands at other places than it was computed at. In a model of one
/// layer the KV of a token depends on the token alone, so the reply has to be that of the kept ids computed cold,
/// to the last token: if a place were wrong anywhere, it would be another.
#[test]
fn a_truncated_conversation_goes_on_from_the_kv_that_it_kept() {
    with_runtime_of(1, |daemon, client| {
        let opening = opening("figs");
        let ask = |name: &str, messages: &[(&str, &str)], no_read: bool| {
            let message =
                |(role, content): &(&str, &str)| json!({ "role": role, "content": content });
            let messages: Vec<Value> = messages.iter().map(message).collect();
            let answer = client.chat(&json!({
                "messages": messages, "max_tokens": 40, "temperature": 0, "ignore_eos": true,
                "prompt_cache_key": name, "cache": { "no_read": no_read },
            }));
            let text = answer["choices"][0]["message"]["content"].as_str().expect("a text");
            (text.to_owned(), answer["usage"]["prompt_tokens_details"].clone())
        };
        let first = [("user", opening.as_str())];
        let (reply, _) = ask("loaded", &first, false);
        assert_eq!(ask("computed", &first, false).0, reply);
        for name in ["loaded", "computed"] {
            kvctl(daemon, &["truncate", name, "--sinks=2", "--drop=7"]);
        }
        client.ask(&prompt(1, 16), ""); // The engine has seen what the daemon said before this.
        client.clear_device();
        let shown = kvctl(daemon, &["show", "loaded"]);
        let kept = shown["conversation"]["tokens"].as_u64().expect("a count") / 16 * 16;
        let second = [first[0], ("assistant", reply.as_str()), ("user", "and then?")];
        let (loaded, found) = ask("loaded", &second, false);
        assert_eq!(found["cached_tokens_by_tier"]["host"], kept, "{found}");
        let (computed, missed) = ask("computed", &second, true);
        assert_eq!(missed["cached_tokens"], 0, "{missed}");
        assert_eq!(loaded, computed);
        assert_eq!(client.metric("colloquy_runtime_truncated_turns_total"), 2);
        // The turn after that finds all of the last one too, from the record that it left.
        client.clear_device();
        let third =
            [&second[..], &[("assistant", loaded.as_str()), ("user", "what else?")]].concat();
        let (loaded, found) = ask("loaded", &third, false);
        let (computed, _) = ask("computed", &third, false);
        assert_eq!(loaded, computed);
        let host = found["cached_tokens_by_tier"]["host"].as_u64().expect("a count");
        assert!(host > kept + 40, "{found}");
        let after = kvctl(daemon, &["explain", "loaded"]);
        assert_eq!(
            (&after["gap"], &after["conversation"]["dropped_tokens"]),
            (&Value::Null, &json!(112))
        );
    });
}

#[test]
fn a_truncated_conversation_survives_its_runtime() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("tiny.gguf");
    runtime::weights::random::write_tiny_gguf(&path, 7).expect("the tiny model");
    let binary = beside_us("cache-daemon", "COLLOQUY_CACHE_DAEMON");
    let daemon = Daemon::start(&binary, dir.path(), 64 << 20, &[]);
    let opening = opening("dates");
    let first = [("user", opening.as_str())];
    let before = Runtime::start(&path, Some(&daemon.socket), &[]);
    let (reply, _) = turn(&before.client(), "chat", &first);
    before.stop();
    kvctl(&daemon, &["truncate", "chat", "--drop=4"]);
    let kept =
        kvctl(&daemon, &["show", "chat"])["conversation"]["tokens"].as_u64().expect("a count");
    let after = Runtime::start(&path, Some(&daemon.socket), &[]);
    let second = [first[0], ("assistant", reply.as_str()), ("user", "more")];
    let message = |(role, content): &(&str, &str)| json!({ "role": role, "content": content });
    let messages: Vec<Value> = second.iter().map(message).collect();
    let answer = after.client().turn("chat", &messages);
    assert_eq!(answer.by_tier.host, kept / 16 * 16, "{}", answer.usage);
    after.stop();
}
