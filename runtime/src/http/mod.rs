//! The API over HTTP. It holds no state of a generation: a request becomes a command to the engine, and
//! the engine's events become the answer.
//!
//! [`openai`] says what requests mean and how answers look, [`generate`] goes to the engine and back,
//! [`sse`] streams, [`conversations`] keeps the token ids of earlier turns; this file is the routes.

pub mod anticipate;
pub mod conversations;
pub mod error;
pub mod fields;
pub mod generate;
pub mod metrics;
pub mod openai;
pub mod reply;
pub mod sse;

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_stream::StreamExt;

use crate::request::{Command, GenerateError, Keep};
use crate::text::quote;
use crate::text::template::{ChatTemplate, RenderError, TemplateMessage};
use crate::text::tokenizer::{Specials, Tokenizer};
use conversations::Conversations;
use error::ApiError;
use fields::Fields;
use generate::{Generation, Step};
use metrics::Metrics;
use openai::{Answer, Api, NAME_BYTES_MAX, Prompt, ReplyRequest};

/// Bytes of a request's body: 128 k tokens of text, each character escaped, with room to spare.
pub const BODY_BYTES_MAX: usize = 8 << 20;
/// Bytes of an oversized body that are read and dropped, so that its client hears why it was refused.
const DRAIN_BYTES_MAX: usize = 8 * BODY_BYTES_MAX;
/// A body comes within this time, or its connection is not worth keeping.
const BODY_TIMEOUT: Duration = Duration::from_mins(1);
/// The engine clears its pool between two steps.
const CLEAR_TIMEOUT: Duration = Duration::from_secs(30);
/// Headers that name a conversation, ours first.
const CONVERSATION_HEADERS: [&str; 2] = ["x-conversation-id", "x-session-id"];
/// The form of [`Metrics::text`].
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// How http reaches the engine: without blocking.
pub type Submit = Arc<dyn Fn(Command) -> Result<(), GenerateError> + Send + Sync>;

/// Everything that a request needs, once the model is loaded.
pub struct Service {
    /// The name under which the model is served.
    pub model_name: String,
    /// Tokens of prompt and reply together.
    pub context_max: u32,
    /// Tokens that the device pool holds.
    pub tokens_capacity: u32,
    /// The model's.
    pub tokenizer: Tokenizer,
    /// The model's; without one there is no chat, only completions.
    pub template: Option<ChatTemplate>,
    /// Tokens that end a reply.
    pub stop_tokens: Arc<[u32]>,
    /// To the engine.
    pub submit: Submit,
    /// Token ids of earlier turns.
    pub conversations: Conversations,
    /// What http counts.
    pub metrics: Metrics,
    /// 1 while a cache daemon is attached: the engine's own gauge.
    pub cache_attached: prometheus::IntGauge,
    /// Whether admin calls are open.
    pub admin: bool,
    /// When the model was loaded.
    pub created: u64,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("model_name", &self.model_name).finish_non_exhaustive()
    }
}

impl Service {
    /// The prompt text for `messages`; what the client wrote is quoted in it.
    fn render(&self, messages: &[TemplateMessage]) -> Result<String, ApiError> {
        let Some(template) = &self.template else {
            return Err(ApiError::invalid(
                "the model's file has no chat template; use /v1/completions or `prompt_token_ids`",
            ));
        };
        let quoted: Vec<TemplateMessage> = messages
            .iter()
            .map(|message| TemplateMessage {
                role: message.role.clone(),
                content: quote::quote(&self.tokenizer, &message.content),
                name: message.name.as_ref().map(|name| quote::quote(&self.tokenizer, name)),
            })
            .collect();
        template.render(&quoted).map_err(|error: RenderError| ApiError::field("messages", error))
    }

    fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(asked) if asked != self.model_name => {
                Err(ApiError::model_not_found(asked, &self.model_name))
            }
            _ => Ok(()),
        }
    }

    fn describe(&self) -> Value {
        json!({
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "colloquy",
            "max_model_len": self.context_max,
        })
    }
}

/// The server: it listens from the start, serves once it has a [`Service`], and says 503 before that and
/// while it stops.
#[derive(Debug, Default)]
pub struct Server {
    service: OnceLock<Arc<Service>>,
    stopping: AtomicBool,
}

impl Server {
    /// From now on requests are served.
    pub fn open(&self, service: Service) {
        let opened = self.service.set(Arc::new(service)).is_ok();
        debug_assert!(opened, "a server opens once");
    }

    /// From now on the server is not healthy; what runs goes on.
    pub fn stop(&self) {
        // Relaxed: a probe that still sees the old value is the same as one that came earlier.
        self.stopping.store(true, Ordering::Relaxed);
    }

    fn service(&self) -> Result<Arc<Service>, ApiError> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(GenerateError::ShuttingDown.into());
        }
        let loading = || ApiError::unavailable("the model is still loading");
        self.service.get().cloned().ok_or_else(loading)
    }
}

/// Serves until `stop` resolves, then finishes what runs.
pub async fn serve(
    listener: TcpListener,
    server: Arc<Server>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let listener = listener.tap_io(|connection| {
        // A token is a small packet that must not wait for the next one.
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY refused");
        }
    });
    axum::serve(listener, routes(server)).with_graceful_shutdown(stop).await
}

/// All routes.
pub fn routes(server: Arc<Server>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/v1/conversations/{id}/anticipate", post(anticipate::anticipate))
        .route("/health", get(health))
        .route("/version", get(version))
        .route("/metrics", get(metrics_text))
        .route("/admin/device-cache/clear", post(clear_device_cache))
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(server.clone(), count))
        .with_state(server)
}

/// Metric label of a path: a closed set, whatever clients ask for.
fn route_label(path: &str) -> &'static str {
    const ROUTES: [&str; 9] = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/version",
        "/metrics",
        "/admin/device-cache/clear",
    ];
    if path.starts_with("/v1/models/") {
        return "/v1/models/{model}";
    }
    if path.starts_with("/v1/conversations/") && path.ends_with("/anticipate") {
        return "/v1/conversations/{id}/anticipate";
    }
    ROUTES.into_iter().find(|route| *route == path).unwrap_or("other")
}

async fn count(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let route = route_label(request.uri().path());
    let response = next.run(request).await;
    if let Some(service) = server.service.get() {
        service.metrics.answered(route, response.status().as_u16());
    }
    response
}

async fn chat(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    reply(server, Api::Chat, headers, body).await
}

async fn completions(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    reply(server, Api::Completions, headers, body).await
}

async fn reply(
    server: Arc<Server>,
    api: Api,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let service = server.service()?;
    let body = read(&headers, body).await?;
    let request = ReplyRequest::parse(api, &body)?;
    drop(body);
    service.check_model(request.model.as_deref())?;
    let conversation = match conversation_header(&headers)? {
        None => request.conversation.clone(),
        named => named,
    };
    let is_recorded = conversation.is_some() && matches!(request.prompt, Prompt::Messages(_));
    if request.cache.keep != Keep::default() && !is_recorded {
        return Err(ApiError::field(
            "cache",
            "`ttl_seconds` and `pin_until` are a conversation's: send messages, and name it \
             (`X-Conversation-Id` or `prompt_cache_key`)",
        ));
    }
    let answer = Answer::new(api, &request, &service.model_name);
    let mut generation =
        Generation::start(service.clone(), &request, conversation, arrived).await?;
    if request.stream {
        return sse::stream(service, generation, answer).await;
    }
    let (mut text, mut reports) = (String::new(), Vec::new());
    loop {
        let (delta, finished) = match generation.next().await? {
            Step::Started => continue,
            Step::Delta(delta) => (delta, None),
            Step::Finished(delta, reason) => (delta, Some(reason)),
        };
        text.push_str(&delta.text);
        reports.extend(delta.reports);
        if let Some(reason) = finished {
            let usage = generation.usage();
            let whole = answer.whole(&service.tokenizer, &text, &reports, reason, usage);
            return Ok(Json(whole).into_response());
        }
    }
}

/// Reads a body within its bounds of size and time.
async fn read(headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > BODY_BYTES_MAX as u64)
        && headers.contains_key(header::EXPECT)
    {
        return Err(ApiError::body_too_large(BODY_BYTES_MAX)); // The client asked before it sends.
    }
    let gather = async {
        let mut parts = body.into_data_stream();
        let (mut bytes, mut length) = (Vec::new(), 0);
        while let Some(part) = parts.next().await {
            let part =
                part.map_err(|error| ApiError::invalid(format!("the body broke off: {error}")))?;
            length += part.len();
            if length <= BODY_BYTES_MAX {
                bytes.extend_from_slice(&part);
            } else if length <= DRAIN_BYTES_MAX {
                // Read to its end all the same: a client that is still sending when the connection
                // closes sees a broken pipe and never our answer.
                bytes = Vec::new();
            } else {
                break;
            }
        }
        if length > BODY_BYTES_MAX {
            return Err(ApiError::body_too_large(BODY_BYTES_MAX));
        }
        Ok(Bytes::from(bytes))
    };
    match tokio::time::timeout(BODY_TIMEOUT, gather).await {
        Ok(read) => read,
        Err(_elapsed) => Err(ApiError::body_timeout(BODY_TIMEOUT.as_secs())),
    }
}

/// The conversation that a header names.
fn conversation_header(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    for name in CONVERSATION_HEADERS {
        let Some(value) = headers.get(name) else { continue };
        let id = value
            .to_str()
            .map_err(|_| ApiError::field(name, "only visible ASCII characters are served"))?;
        if id.is_empty() || id.len() > NAME_BYTES_MAX {
            return Err(ApiError::field(
                name,
                format_args!("{} bytes; from 1 to {NAME_BYTES_MAX} are served", id.len()),
            ));
        }
        return Ok(Some(id.to_owned()));
    }
    Ok(None)
}

async fn models(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    Ok(Json(json!({ "object": "list", "data": [server.service()?.describe()] })))
}

async fn model(
    State(server): State<Arc<Server>>,
    Path(model): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let service = server.service()?;
    service.check_model(Some(&model))?;
    Ok(Json(service.describe()))
}

/// `{prompt | messages, add_special_tokens?, model?}` → ids, as in vLLM.
async fn tokenize(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let service = server.service()?;
    let mut fields = Fields::of_body(&read(&headers, body).await?)?;
    let model: Option<String> = fields.take("model")?;
    let prompt: Option<String> = fields.take("prompt")?;
    let messages: Option<Vec<Value>> = fields.take("messages")?;
    let add_special: bool = fields.take("add_special_tokens")?.unwrap_or(true);
    fields.finish()?;
    service.check_model(model.as_deref())?;
    let messages = messages
        .map(|messages| {
            let named = messages.into_iter().enumerate();
            named
                .map(|(index, value)| openai::parse_message(&format!("messages[{index}]"), value))
                .collect::<Result<Vec<_>, _>>()
        })
        .transpose()?;
    let max_model_len = service.context_max;
    let tokens = tokio::task::spawn_blocking(move || match (prompt, messages) {
        (Some(text), None) => {
            let ids = service.tokenizer.encode(&text, Specials::Parse);
            Ok(if add_special { service.tokenizer.with_bos(ids) } else { ids })
        }
        (None, Some(messages)) => {
            let ids = quote::encode(&service.tokenizer, &service.render(&messages)?);
            Ok(service.tokenizer.with_bos(ids))
        }
        _ => Err(ApiError::field("prompt", "give either `prompt` or `messages`")),
    })
    .await
    .map_err(|error| ApiError::internal(format!("tokenising failed: {error}")))??;
    Ok(Json(json!({ "count": tokens.len(), "max_model_len": max_model_len, "tokens": tokens })))
}

/// `{tokens, model?}` → text, control tokens included.
async fn detokenize(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let service = server.service()?;
    let mut fields = Fields::of_body(&read(&headers, body).await?)?;
    let model: Option<String> = fields.take("model")?;
    let tokens: Option<Vec<u32>> = fields.take("tokens")?;
    fields.finish()?;
    service.check_model(model.as_deref())?;
    let tokens = tokens.ok_or_else(|| ApiError::field("tokens", "this field is required"))?;
    let vocabulary = service.tokenizer.vocabulary_size();
    if let Some(id) = tokens.iter().find(|id| **id as usize >= vocabulary) {
        return Err(ApiError::field(
            "tokens",
            format_args!("{id} is no token; the vocabulary has {vocabulary}"),
        ));
    }
    Ok(Json(json!({ "prompt": service.tokenizer.decode(&tokens) })))
}

/// 200 when a request would be served now.
async fn health(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    server.service()?;
    Ok(Json(json!({ "status": "ok" })))
}

async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

async fn metrics_text(State(server): State<Arc<Server>>) -> Result<Response, ApiError> {
    // Also while stopping: the last scrape is worth having.
    let loading = || ApiError::unavailable("the model is still loading");
    let service = server.service.get().ok_or_else(loading)?;
    Ok(([(header::CONTENT_TYPE, METRICS_TYPE)], service.metrics.text()).into_response())
}

/// The body says nothing, but is read: hyper closes a connection whose request it could not read whole
/// before the answer, and the client's next request on it would fail.
async fn clear_device_cache(
    State(server): State<Arc<Server>>,
    _body: Bytes,
) -> Result<Json<Value>, ApiError> {
    let service = server.service()?;
    if !service.admin {
        return Err(ApiError::no_such_path("POST", "/admin/device-cache/clear (needs --admin)"));
    }
    let (answer, answered) = oneshot::channel();
    (service.submit)(Command::ClearDeviceCache(answer))?;
    match tokio::time::timeout(CLEAR_TIMEOUT, answered).await {
        Ok(Ok(blocks)) => Ok(Json(json!({ "blocks_cleared": blocks }))),
        Ok(Err(_dropped)) => Err(ApiError::internal("the engine stopped")),
        Err(_elapsed) => Err(ApiError::unavailable("the engine is busy; try again")),
    }
}

async fn no_such_path(method: Method, uri: Uri) -> ApiError {
    ApiError::no_such_path(method.as_str(), uri.path())
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::wrong_method(method.as_str(), uri.path())
}

/// Seconds since 1970, for `created` fields.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
