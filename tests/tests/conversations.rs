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
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("tiny.gguf");
    runtime::weights::random::write_tiny_gguf(&path, 7).expect("the tiny model");
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
