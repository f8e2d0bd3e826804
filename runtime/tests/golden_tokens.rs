//! Token ids of 200 strings against llama.cpp's (`tests/golden/`, `make golden` makes them again).

mod common;

use runtime::text::metadata::TextMetadata;
use runtime::text::tokenizer::{Specials, Tokenizer};
use runtime::weights::gguf::Model;
use serde_json::Value;

const GOLDEN: &str = include_str!("../../tests/golden/tokens.json");

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("ids")
}

#[test]
fn token_ids_equal_llama_cpps_for_200_strings() {
    let Some(path) = common::smollm2() else { return };
    let model = Model::open(&path).unwrap();
    let metadata = TextMetadata::from_gguf(model.metadata()).unwrap();
    let tokenizer = Tokenizer::new(&metadata).unwrap();
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let entries = golden["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 200);
    let mut wrong = Vec::new();
    for entry in entries {
        let text = entry["text"].as_str().unwrap();
        for (specials, name) in [(Specials::Parse, "parsed"), (Specials::Text, "plain")] {
            let (ours, theirs) = (tokenizer.encode(text, specials), ids(&entry[name]));
            if ours != theirs {
                wrong.push(format!("{text:?} {name}: ours {ours:?}, llama.cpp {theirs:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of 400 differ:\n{}", wrong.len(), wrong.join("\n"));
}
