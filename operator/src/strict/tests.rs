//! The rules of the definition, evaluated without an API server: what is refused, and in which words.

use super::*;
use crate::fixtures;

const SMOLLM2: &str = include_str!("../../../examples/smollm2.yaml");

fn with_spec(spec: &str) -> String {
    format!(
        "apiVersion: colloquy.dev/v1alpha1\nkind: ConversationModel\nmetadata: {{name: chat}}\nspec: {spec}\n"
    )
}

fn refusal(yaml: &str) -> String {
    model_from_yaml(yaml).expect_err("the model is refused").to_string()
}

#[test]
fn the_examples_are_accepted() {
    for example in [
        SMOLLM2,
        include_str!("../../../examples/smollm2-adaskip.yaml"),
        include_str!("../../../examples/smollm2-uncached.yaml"),
    ] {
        model_from_yaml(example).unwrap();
    }
}

#[test]
fn a_model_needs_little_more_than_a_name_and_weights() {
    let model = model_from_yaml(&with_spec("{model: {name: m, image: i}}")).unwrap();
    assert_eq!(model.spec.replicas, 1);
    assert_eq!(model.spec.runtime.tokens_per_block, 64);
    assert_eq!(model.spec.cache.ttl.to_string(), "1d");
    assert_eq!(model.spec.ada_skip.decode.learn_tokens, 20);
}

#[test]
fn a_bad_spec_is_refused_in_words_that_name_the_field_and_the_remedy() {
    let cases = [
        ("{model: {name: m}}", "exactly one of model.image and model.persistentVolumeClaim"),
        (
            "{model: {name: m, image: i, persistentVolumeClaim: {claimName: c}}}",
            "exactly one of model.image and model.persistentVolumeClaim",
        ),
        ("{model: {name: m, image: i}, replica: 2}", "unknown field \"spec.replica\""),
        (
            "{model: {name: m, image: i}, runtime: {thread: 2}}",
            "unknown field \"spec.runtime.thread\"",
        ),
        ("{model: {name: m, image: i}, replicas: 65}", "spec.replicas: 65 must be at most 64"),
        (
            "{model: {name: m, image: i}, replicas: two}",
            "spec.replicas: \"two\" must be of type integer",
        ),
        ("{model: {image: i}}", "spec.model.name: required"),
        ("{model: {name: m, image: i}, runtime: {threads: 0}}", "must be at least 1"),
        (
            "{model: {name: m, image: i}, runtime: {sequencesMax: 64, stepTokensMax: 32}}",
            "runtime.stepTokensMax must be at least runtime.sequencesMax",
        ),
        ("{model: {name: m, image: i}, runtime: {tokensPerBlock: 40}}", "must be a multiple of 16"),
        ("{model: {name: m, image: i}, runtime: {contextMax: 8}}", "runtime.contextMax must be 0"),
        (
            "{model: {name: m, image: i}, runtime: {deviceMemory: 1Mi}}",
            "runtime.deviceMemory must be at least 64Mi",
        ),
        (
            "{model: {name: m, image: i}, cache: {host: {memory: 63Mi}}}",
            "cache.host.memory must be at least 64Mi",
        ),
        ("{model: {name: m, image: i}, cache: {host: {memory: lots}}}", "\"lots\" is not a size"),
        (
            "{model: {name: m, image: i}, cache: {disk: {size: 100Mi}}}",
            "cache.disk.size must be at least 256Mi",
        ),
        ("{model: {name: m, image: i}, cache: {ttl: 10}}", "must be of type string"),
        (
            "{model: {name: m, image: i}, cache: {policy: Random}}",
            "must be one of [\"LookAhead\",\"Lru\",\"Fifo\"]",
        ),
        (
            "{model: {name: m, image: i}, adaSkip: {prefill: {sublayers: 513}}}",
            "spec.adaSkip.prefill.sublayers: 513 must be at most 512",
        ),
        (
            "{model: {name: m, image: i}, adaSkip: {decode: {extras: true}}}",
            "adaSkip.decode.extras needs adaSkip.decode.sublayers",
        ),
    ];
    for (spec, words) in cases {
        let said = refusal(&with_spec(spec));
        assert!(said.contains(words), "{spec} is refused with:\n{said}\nexpected:\n{words}");
    }
}

#[test]
fn a_name_that_no_service_could_bear_is_refused() {
    let named = |name: &str| {
        with_spec("{model: {name: m, image: i}}").replace("name: chat", &format!("name: {name}"))
    };
    for name in ["9lives", "Chat", "a.b", &"a".repeat(51)] {
        assert!(refusal(&named(name)).contains("metadata.name names pods"), "{name}");
    }
    model_from_yaml(&named(&"a".repeat(50))).unwrap();
}

#[test]
fn another_kind_of_object_is_refused_by_name() {
    let said = refusal("apiVersion: v1\nkind: Pod\nmetadata: {name: p}\n");
    assert!(said.contains("got v1 and Pod"), "{said}");
}

/// A change of a model and the words it is refused with; `None` when it is taken.
type Update = (fn(&mut ConversationModel), Option<&'static str>);

#[test]
fn what_may_not_change_is_refused_and_what_may_is_taken() {
    let updates: [Update; 8] = [
        (|model| model.spec.model.name = "other".into(), Some("model.name is immutable")),
        (|model| model.spec.model.image = Some("other".into()), None),
        (|model| model.spec.replicas = 3, None),
        (|model| model.spec.ada_skip.decode.sublayers = 8, None),
        (
            |model| model.spec.cache.disk.size = crate::api::ByteSize::gibibytes(1),
            Some("cache.disk.size may only grow"),
        ),
        (|model| model.spec.cache.disk.size = crate::api::ByteSize::gibibytes(4), None),
        (
            |model| model.spec.cache.disk.storage_class_name = None,
            Some("cache.disk.storageClassName is immutable"),
        ),
        (
            |model| model.spec.cache.disk.storage_class_name = Some("slow".into()),
            Some("cache.disk.storageClassName is immutable"),
        ),
    ];
    for (change, words) in updates {
        let old = fixtures::model();
        let mut new = old.clone();
        change(&mut new);
        match (new.validate_cel_update(&old), words) {
            (Ok(()), None) => {}
            (Err(errors), Some(words)) => {
                assert!(errors.to_string().contains(words), "{errors}");
            }
            (outcome, words) => panic!("got {outcome:?}, expected {words:?}"),
        }
    }
}

#[test]
fn the_definition_names_no_number_format_that_the_api_server_does_not_know() {
    let yaml = api::crd_yaml();
    assert!(!yaml.contains("format: uint"), "{yaml}");
    assert!(yaml.contains("format: int64"));
}

#[test]
fn the_committed_definition_is_the_generated_one() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for file in api::CRD_FILES {
        let committed = std::fs::read_to_string(root.join(file)).unwrap_or_default();
        assert!(committed == api::crd_yaml(), "{file} is not up to date: run `make generate`");
    }
}
