//! One look at one model against a fake API server on loopback: which requests are made, in which
//! order, and what becomes of an answer. What a real server makes of them is the end-to-end test's.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::to_bytes;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use kube::runtime::events::{Recorder, Reporter};
use kube::{Client, Config};
use operator::api::ConversationModel;
use operator::desired::pod::ANNOTATION_TEMPLATE;
use operator::desired::{FINALIZER, Images, ReplicaIndex, pod};
use operator::error::Class;
use operator::reconcile::{Context, reconcile};
use operator::strict::model_from_yaml;
use operator::telemetry::Metrics;
use serde_json::{Value, json};

/// Largest body that the fake reads; the operator's objects have a few KiB.
const BODY_MAX: usize = 1 << 20;

/// How the fake API server answers.
#[derive(Clone)]
enum Scenario {
    /// Nothing is there, everything is taken.
    Empty,
    /// A pod is there.
    HasPod(Box<Value>),
    /// A quota forbids pods.
    PodsForbidden,
    /// It is out of order.
    Broken,
}

/// A request that the fake got.
#[derive(Clone, Debug)]
struct Asked {
    method: Method,
    path: String,
    query: String,
    body: Value,
}

impl Asked {
    /// `PATCH pods/smollm2-0`
    fn words(&self) -> String {
        let path = self.path.split("/namespaces/chat/").last().unwrap_or(&self.path);
        format!("{} {path}", self.method)
    }
}

#[derive(Clone)]
struct Fake {
    scenario: Scenario,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Fake {
    async fn start(scenario: Scenario) -> (Self, Arc<Context>) {
        let fake = Self { scenario, asked: Arc::default() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(fake.clone());
        tokio::spawn(axum::serve(listener, router).into_future());
        let config = Config::new(format!("http://{address}").parse().unwrap());
        let client = Client::try_from(config).unwrap();
        let reporter = Reporter { controller: "test".into(), instance: None };
        let context = Context {
            client: client.clone(),
            images: images(),
            recorder: Recorder::new(client, reporter),
            metrics: Metrics::new(),
        };
        (fake, Arc::new(context))
    }

    /// The changes that were asked for, events aside.
    fn changes(&self) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap();
        let changes = asked.iter().filter(|asked| asked.method != Method::GET);
        changes.filter(|asked| !asked.path.contains("/events")).cloned().collect()
    }

    fn words(&self) -> Vec<String> {
        self.changes().iter().map(Asked::words).collect()
    }

    /// The status that was written.
    fn status(&self) -> Value {
        let changes = self.changes();
        let written = changes.iter().find(|asked| asked.path.ends_with("/status")).unwrap();
        written.body["status"].clone()
    }
}

async fn answer(State(fake): State<Fake>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let bytes = to_bytes(body, BODY_MAX).await.unwrap();
    let asked = Asked {
        method: parts.method.clone(),
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        body: serde_json::from_slice(&bytes).unwrap_or(Value::Null),
    };
    fake.asked.lock().unwrap().push(asked.clone());
    let refuse = |code: u16, reason: &str, message: &str| {
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
            "code": code, "reason": reason, "message": message});
        (StatusCode::from_u16(code).unwrap(), axum::Json(status)).into_response()
    };
    let give = |value: Value| axum::Json(value).into_response();
    let list = |items: Vec<Value>| give(json!({"metadata": {}, "items": items}));

    let is_pod = asked.path.contains("/pods/");
    match (&fake.scenario, &parts.method) {
        (Scenario::Broken, _) => refuse(500, "InternalError", "etcd is away"),
        (Scenario::PodsForbidden, &Method::PATCH) if is_pod => {
            refuse(403, "Forbidden", "pods \"smollm2-0\" is forbidden: exceeded quota: small")
        }
        (Scenario::HasPod(pod), &Method::GET) if asked.path.ends_with("/pods") => {
            list(vec![*pod.clone()])
        }
        (_, &Method::GET) if asked.query.contains("Selector=") => list(vec![]),
        (_, &Method::GET) => refuse(404, "NotFound", "not found"),
        (_, &Method::DELETE) => {
            give(json!({"kind": "Status", "apiVersion": "v1", "status": "Success"}))
        }
        (_, &Method::PATCH) if asked.path.contains("conversationmodels") => {
            give(serde_json::to_value(model(true)).unwrap())
        }
        _ => give(asked.body),
    }
}

fn images() -> Images {
    Images {
        runtime: "runtime:1".into(),
        cache_daemon: "cache-daemon:1".into(),
        pull_policy: "Never".into(),
    }
}

/// The example, as the API server would hand it out.
fn model(accepted: bool) -> ConversationModel {
    let mut model = model_from_yaml(include_str!("../../examples/smollm2.yaml")).unwrap();
    model.metadata.uid = Some("the-model".into());
    model.metadata.resource_version = Some("7".into());
    model.metadata.generation = Some(1);
    model.metadata.finalizers = accepted.then(|| vec![FINALIZER.into()]);
    model
}

#[tokio::test]
async fn a_new_model_is_made_in_order_by_one_field_manager() {
    let (fake, context) = Fake::start(Scenario::Empty).await;
    reconcile(Arc::new(model(false)), context).await.unwrap();
    let expected = [
        "PATCH conversationmodels/smollm2",
        "PATCH services/smollm2",
        "PATCH persistentvolumeclaims/smollm2-0-kv",
        "PATCH pods/smollm2-0",
        "PATCH conversationmodels/smollm2/status",
    ];
    assert_eq!(fake.words(), expected);
    let changes = fake.changes();
    assert!(changes.iter().all(|asked| asked.query.contains("fieldManager=colloquy-operator")));
    let finalizer = &changes[0].body["metadata"];
    assert_eq!(
        finalizer["resourceVersion"], "7",
        "a model that has changed is not patched blindly"
    );
    assert_eq!(changes[4].body["metadata"]["uid"], "the-model", "a successor gets no old status");
}

#[tokio::test]
async fn a_refused_pod_becomes_the_model_s_condition_and_stops_nothing_else() {
    let (fake, context) = Fake::start(Scenario::PodsForbidden).await;
    reconcile(Arc::new(model(true)), context).await.unwrap();
    let ready = fake.status()["conditions"][0].clone();
    assert_eq!(ready["reason"], "Refused");
    let message = ready["message"].as_str().unwrap();
    assert!(message.ends_with("exceeded quota: small"), "{message}");
    assert!(fake.words().contains(&"PATCH services/smollm2".to_owned()));
}

#[tokio::test]
async fn a_server_that_is_out_of_order_is_asked_again_and_nothing_is_changed() {
    let (fake, context) = Fake::start(Scenario::Broken).await;
    let error = reconcile(Arc::new(model(true)), context).await.unwrap_err();
    assert_eq!(error.class(), Class::Retry);
    assert!(error.to_string().contains("chat/smollm2"), "{error}");
    assert_eq!(fake.words(), [""; 0]);
}

#[tokio::test]
async fn a_pod_of_a_former_spec_is_deleted_by_its_uid_and_not_created_in_the_same_look() {
    let model = model(true);
    let mut pod = pod::pod(&model, ReplicaIndex(0), &images());
    pod.metadata.uid = Some("the-pod".into());
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert(ANNOTATION_TEMPLATE.into(), "of-a-former-spec".into());
    let scenario = Scenario::HasPod(Box::new(serde_json::to_value(&pod).unwrap()));
    let (fake, context) = Fake::start(scenario).await;
    reconcile(Arc::new(model), context).await.unwrap();
    let changes = fake.changes();
    let delete = changes.iter().find(|asked| asked.method == Method::DELETE).unwrap();
    assert_eq!(delete.words(), "DELETE pods/smollm2-0");
    assert_eq!(delete.body["preconditions"]["uid"], "the-pod");
    assert!(!fake.words().contains(&"PATCH pods/smollm2-0".to_owned()));
}
