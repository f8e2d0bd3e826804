//! `kvctl explain`: why a conversation's history was computed again, with the words around the place.

use anyhow::Context;
use serde_json::{Value, json};

use crate::client::{Client, post};
use crate::conversations::{Which, facts};
use crate::table::{count, number, print_json, text, when};

#[derive(Debug, clap::Args)]
pub struct Explain {
    #[command(flatten)]
    which: Which,
    /// A runtime of the model, such as http://127.0.0.1:8000, to turn token ids into text.
    #[arg(long, value_name = "URL")]
    runtime: Option<String>,
}

impl Explain {
    pub fn run(&self, client: &Client, as_json: bool) -> anyhow::Result<()> {
        let mut found = client.get(&self.which.path(""))?;
        if let (Some(runtime), true) = (&self.runtime, found["divergence"].is_object()) {
            for part in ["shared", "before", "after"] {
                let text = detokenized(runtime, &found["divergence"][part])?;
                found["divergence"][format!("{part}_text")] = text.into();
            }
        }
        if as_json {
            return print_json(&found);
        }
        print!("{}\n{}", facts(&found), reasons(&found));
        Ok(())
    }
}

fn detokenized(runtime: &str, ids: &Value) -> anyhow::Result<String> {
    if ids.as_array().is_none_or(Vec::is_empty) {
        return Ok(String::new());
    }
    let answer = post(runtime, "/detokenize", &json!({ "tokens": ids }))?;
    answer["prompt"].as_str().map(str::to_owned).context("the runtime gave no text back")
}

fn reasons(found: &Value) -> String {
    let mut lines = Vec::new();
    let divergence = &found["divergence"];
    if divergence.is_object() {
        let what = match text(divergence, "/reason") {
            "edited" => "its history had other tokens than the turn before",
            "shortened" => "its history was cut short",
            "truncated" => "its history was truncated",
            other => other,
        };
        let place = number(divergence, "/shared_tokens");
        let exact = divergence["is_exact"].as_bool() == Some(true);
        lines.push(format!("diverged {}: {what}", when(number(divergence, "/at_ms"))));
        if exact {
            lines.push(format!("first other token: number {}", count(place)));
            for part in ["shared", "before", "after"] {
                let shown = match divergence.get(format!("{part}_text")).and_then(Value::as_str) {
                    Some(text) => format!("{text:?}"),
                    None => format!("tokens {}", divergence[part]),
                };
                lines.push(format!("  {part:<7} {shown}"));
            }
        } else {
            lines.push(format!(
                "first other token: in the block from {} on (the earlier ids are not in memory any more)",
                count(place)
            ));
        }
    } else {
        lines.push("each turn went on from the one before, since the worker started".to_owned());
    }
    let gap = &found["gap"];
    if gap.is_object() {
        let reason = match text(gap, "/reason") {
            "" => "never stored, or nobody remembers why it left",
            reason => reason,
        };
        lines.push(format!(
            "the chain ends at block {} (token {}): {reason}",
            count(number(gap, "/block")),
            count(number(gap, "/token")),
        ));
    } else {
        lines.push("all of its blocks are here".to_owned());
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_texts_stand_under_each_other() {
        let found = json!({
            "divergence": {
                "at_ms": 0, "reason": "edited", "shared_tokens": 1300, "is_exact": true,
                "shared": [1], "before": [2], "after": [3],
                "shared_text": "the cat ", "before_text": "sat", "after_text": "ran",
            },
            "gap": { "block": 20, "token": 1280, "reason": "evicted" },
        });
        let told = reasons(&found);
        let place = "number 1,300\n  shared  \"the cat \"\n  before  \"sat\"\n  after   \"ran\"\n";
        assert!(told.contains(place), "{told}");
        assert!(told.contains("block 20 (token 1,280): evicted"), "{told}");
    }
}
