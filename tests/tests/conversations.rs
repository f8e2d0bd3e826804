//! `kvctl` beside a living runtime: what an operator does to a conversation, its next turn sees.

mod support;

use serde_json::{Value, json};
use support::daemon::Daemon;
use support::{Client, Runtime, beside_us, kvctl, prompt, until_attached, until_recorded};

const USER: &str = "the quick brown fox jumps over the lazy dog, again and again and again, ";

/// A conversation's first message, of several blocks.
fn opening(fruit: &str) -> String {
    format!("{}{fruit} are what I like. {}", USER.repeat(2), USER.repeat(2))
}

fn with_runtime(test: impl FnOnce(&Daemon, &Client)) {
    with_runtime_of(3, &[], test);
}

fn with_runtime_of(layers: usize, flags: &[&str], test: impl FnOnce(&Daemon, &Client)) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("tiny.gguf");
    runtime::weights::random::write_random_gguf(&path, 7, layers).expect("the tiny model");
    let binary = beside_us("cache-daemon", "COLLOQUY_CACHE_DAEMON");
    let daemon = Daemon::start(&binary, dir.path(), 64 << 20, &[]);
    let runtime = Runtime::start(&path, Some(&daemon.socket), flags);
    until_attached(&runtime.client());
    test(&daemon, &runtime.client());
    runtime.stop();
}

/// A turn of a named conversation, recorded: the reply, and the tokens of its prompt.
fn turn(
    daemon: &Daemon,
    client: &Client,
    conversation: &str,
    messages: &[(&str, &str)],
) -> (String, u64) {
    let message = |(role, content): &(&str, &str)| json!({ "role": role, "content": content });
    let messages: Vec<Value> = messages.iter().map(message).collect();
    let answer = client.turn(conversation, &messages);
    let tokens = answer.usage["prompt_tokens"].as_u64().expect("a count");
    until_recorded(daemon, conversation, tokens);
    (answer.text, tokens)
}

#[test]
fn an_edited_conversation_is_explained_in_words() {
    with_runtime(|daemon, client| {
        let (apples, pears) = (opening("apples"), opening("pears"));
        let (reply, _) = turn(daemon, client, "chat", &[("user", &apples)]);
        turn(daemon, client, "chat", &[("user", &apples), ("assistant", &reply), ("user", "more")]);
        let fine = kvctl(daemon, &["explain", "chat"]);
        assert_eq!(fine["divergence"], Value::Null, "{fine}");
        turn(daemon, client, "chat", &[("user", &pears), ("assistant", &reply), ("user", "more")]);
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
            turn(
                daemon,
                client,
                name,
                &[("user", &opening), ("assistant", reply), ("user", "more")],
            )
            .1
        };
        let (reply, _) = turn(daemon, client, "untouched", &[("user", &opening)]);
        let (same, _) = turn(daemon, client, "truncated", &[("user", &opening)]);
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

/// What is kept is not computed, and stands at other places than it was computed at. In a model of one layer the
/// KV of a token depends on the token alone, so the reply has to be that of the kept ids computed cold, to the last
/// token: if a place were wrong anywhere, it would be another. (From device memory: whether loads pay depends on
/// how fast so small a model is. The engine's tests have them, the next test here too.)
#[test]
fn a_truncated_conversation_goes_on_from_the_kv_that_it_kept() {
    with_runtime_of(1, &[], |daemon, client| {
        let opening = opening("figs");
        let ask = |name: &str, messages: &[(&str, &str)], no_read: bool| {
            let message =
                |(role, content): &(&str, &str)| json!({ "role": role, "content": content });
            let messages: Vec<Value> = messages.iter().map(message).collect();
            let answer = client.chat(&json!({
                "messages": messages, "max_tokens": 40, "temperature": 0, "ignore_eos": true,
                "prompt_cache_key": name, "cache": { "no_read": no_read },
            }));
            until_recorded(
                daemon,
                name,
                answer["usage"]["prompt_tokens"].as_u64().expect("a count"),
            );
            let text = answer["choices"][0]["message"]["content"].as_str().expect("a text");
            (text.to_owned(), answer["usage"]["prompt_tokens_details"].clone())
        };
        let first = [("user", opening.as_str())];
        let (reply, _) = ask("kept", &first, false);
        assert_eq!(ask("computed", &first, false).0, reply);
        for name in ["kept", "computed"] {
            kvctl(daemon, &["truncate", name, "--sinks=2", "--drop=7"]);
        }
        client.ask(&prompt(1, 16), ""); // The engine has seen what the daemon said before this.
        let shown = kvctl(daemon, &["show", "kept"]);
        let kept = shown["conversation"]["tokens"].as_u64().expect("a count") / 16 * 16;
        let second = [first[0], ("assistant", reply.as_str()), ("user", "and then?")];
        let (kept_on, found) = ask("kept", &second, false);
        assert_eq!(found["cached_tokens"], kept, "{found}");
        let (computed, missed) = ask("computed", &second, true);
        assert_eq!(missed["cached_tokens"], 0, "{missed}");
        assert_eq!(kept_on, computed);
        assert_eq!(client.metric("colloquy_runtime_truncated_turns_total"), 2);
        // The turn after that finds all of the last one too, from the record that it left.
        let third =
            [&second[..], &[("assistant", kept_on.as_str()), ("user", "what else?")]].concat();
        let (kept_on, found) = ask("kept", &third, false);
        let (computed, _) = ask("computed", &third, false);
        assert_eq!(kept_on, computed);
        let found = found["cached_tokens"].as_u64().expect("a count");
        assert!(found > kept + 40, "{found}");
        let after = kvctl(daemon, &["explain", "kept"]);
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
    let (reply, _) = turn(&daemon, &before.client(), "chat", &first);
    before.stop();
    kvctl(&daemon, &["truncate", "chat", "--drop=4"]);
    let kept =
        kvctl(&daemon, &["show", "chat"])["conversation"]["tokens"].as_u64().expect("a count");
    let after = Runtime::start(&path, Some(&daemon.socket), &[]);
    until_attached(&after.client());
    let second = [first[0], ("assistant", reply.as_str()), ("user", "more")];
    let message = |(role, content): &(&str, &str)| json!({ "role": role, "content": content });
    let messages: Vec<Value> = second.iter().map(message).collect();
    let answer = after.client().turn("chat", &messages);
    assert_eq!(answer.by_tier.host, kept / 16 * 16, "{}", answer.usage);
    after.stop();
}

/// A chat without an end, in a context for some turns of it. In a model of one layer what is kept has the KV that
/// it would have without what was dropped, so a twin that computes everything says the same all along.
#[test]
fn a_conversation_outgrows_its_context_and_goes_on_from_its_later_half() {
    const CONTEXT: u64 = 768;
    const REPLY: u64 = 48;
    with_runtime_of(1, &["--context-max=768"], |_, client| {
        let ask = |name: &str, messages: &[Value], auto: bool, no_read: bool| {
            client.try_chat(&json!({
                "messages": messages, "max_tokens": REPLY, "temperature": 0, "ignore_eos": true,
                "prompt_cache_key": name, "cache": { "no_read": no_read },
                "truncation": if auto { "auto" } else { "disabled" },
            }))
        };
        let mut messages = vec![json!({ "role": "system", "content": USER })];
        let (mut dropped, mut truncations) = (0, 0);
        for turn in 0..24 {
            messages
                .push(json!({ "role": "user", "content": format!("tell me about number {turn}") }));
            let (status, answer) = ask("kept", &messages, true, false);
            assert_eq!(status, 200, "turn {turn}: {answer}");
            let usage = &answer["usage"];
            let prompt = usage["prompt_tokens"].as_u64().expect("a count");
            assert!(prompt + REPLY <= CONTEXT, "turn {turn}: {usage}");
            // The message, what stands around it, and less than a block of the reply before: never the history.
            let computed =
                prompt - usage["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count");
            assert!(turn == 0 || computed < 90, "turn {turn} computed {computed} tokens: {usage}");
            let dropped_now =
                usage["prompt_tokens_details"]["dropped_tokens"].as_u64().unwrap_or(0);
            assert!(dropped_now >= dropped, "turn {turn}: {usage}");
            truncations += u32::from(dropped_now > dropped);
            dropped = dropped_now;
            let (status, twin) = ask("computed", &messages, true, true);
            assert_eq!((status, &twin["choices"]), (200, &answer["choices"]), "turn {turn}");
            messages.push(answer["choices"][0]["message"].clone());
        }
        assert!(truncations >= 3, "{truncations} truncations");
        assert_eq!(
            client.metric("colloquy_runtime_history_truncations_total"),
            2 * u64::from(truncations)
        );
        // Who does not ask for it gets the error; so does a message that does not fit alone.
        messages.push(json!({ "role": "user", "content": "and now?" }));
        let (status, refused) = ask("other", &messages, false, false);
        assert_eq!((status, &refused["error"]["code"]), (400, &json!("context_length_exceeded")));
        messages.push(json!({ "role": "assistant", "content": "so" }));
        messages.push(json!({ "role": "user", "content": USER.repeat(20) }));
        let (status, refused) = ask("kept", &messages, true, false);
        assert_eq!((status, &refused["error"]["code"]), (400, &json!("context_length_exceeded")));
    });
}

#[test]
fn a_deleted_conversation_is_in_no_device_block_either() {
    with_runtime(|daemon, client| {
        let opening = opening("dates");
        let ask = |name: &str| client.turn(name, &[json!({ "role": "user", "content": opening })]);
        for (name, finds) in [("mine", false), ("same-words", true)] {
            let answer = ask(name);
            assert_eq!(answer.cached_tokens > 0, finds, "what two say is computed once");
            until_recorded(daemon, name, answer.usage["prompt_tokens"].as_u64().expect("a count"));
        }
        for name in ["mine", "same-words"] {
            kvctl(daemon, &["delete", name]);
        }
        client.ask(&prompt(1, 16), ""); // The engine has seen what the daemon said before this.
        assert_eq!(ask("mine").cached_tokens, 0);
    });
}
