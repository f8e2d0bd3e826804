//! Models for tests.

use serde_json::json;

use crate::api::ConversationModel;
use crate::desired::Images;

/// The model of `examples/smollm2.yaml`, as the API server would hand it out.
pub fn model() -> ConversationModel {
    serde_json::from_value(json!({
        "apiVersion": "colloquy.dev/v1alpha1",
        "kind": "ConversationModel",
        "metadata": {
            "name": "smollm2", "namespace": "chat", "generation": 3,
            "uid": "6f2d6c9e-0000-4000-8000-000000000001",
            "finalizers": ["colloquy.dev/cleanup"],
        },
        "spec": {
            "replicas": 1,
            "model": {
                "name": "smollm2-135m-instruct",
                "image": "colloquy.dev/smollm2-135m-instruct:q4_1",
            },
            "runtime": {"contextMax": 8192},
            "cache": {"disk": {"storageClassName": "local"}},
        },
    }))
    .expect("the fixture is a model")
}

/// Images as the chart gives them.
pub fn images() -> Images {
    Images {
        runtime: "colloquy.dev/runtime:0.1.0".into(),
        cache_daemon: "colloquy.dev/cache-daemon:0.1.0".into(),
        pull_policy: "IfNotPresent".into(),
    }
}
