//! The admin API: HTTP on a Unix socket of mode 0600. It holds no state: a request goes to the loop as an
//! [`Ask`] and is answered from there. Table of requests: docs/conversations.md.
//!
//! Bounds: `CONNECTIONS_MAX` connections (more wait unaccepted), one request at a time on each, bodies of
//! `BODY_BYTES_MAX`, `ANSWER_MAX` for the loop's answer, `IDLE_MAX` without a byte either way.

mod ask;
mod conversations;
mod socket;
mod transfers;

pub use ask::{Ask, AskError, Deleted, Reply, Who};

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use tokio::sync::oneshot;

use crate::listen::PeerEvent;
use crate::metrics::{Metrics, Snapshot};
use crate::migrate::desk::Desk;
use crate::reconfigure::{Change, InForce};
use crate::tier::disk::DiskUsage;
use crate::verify::Verification;

/// Connections at once: a person, some scripts, and migrations.
const CONNECTIONS_MAX: usize = 16;
/// Bytes of a request's body: names and numbers.
const BODY_BYTES_MAX: usize = 64 << 10;
/// Longest wait for the loop: it turns within milliseconds, an answer from disk takes as long as a disk does.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// A connection on which nothing moves for so long is closed.
const IDLE_MAX: Duration = Duration::from_mins(1);
const _: () = assert!(IDLE_MAX.as_secs() > ANSWER_MAX.as_secs());

/// The way to the loop.
#[derive(Clone)]
pub struct Admin {
    events: Sender<PeerEvent>,
    notify: Arc<dyn Fn() + Send + Sync>,
    metrics: Arc<Metrics>,
    desk: Desk,
}

impl Admin {
    /// Asks the loop and waits for its answer, not longer than `ANSWER_MAX`.
    pub async fn ask<T>(&self, ask: impl FnOnce(Reply<T>) -> Ask) -> Result<T, AskError> {
        let (reply, answer) = oneshot::channel();
        let event = PeerEvent::Ask(ask(Reply(reply)));
        self.events.send(event).map_err(|_| AskError::Stopping)?;
        (self.notify)();
        match tokio::time::timeout(ANSWER_MAX, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(AskError::Stopping),
            Err(_) => Err(AskError::Late { seconds: ANSWER_MAX.as_secs() }),
        }
    }
}

/// Serves on a thread of its own.
pub fn spawn(
    path: &Path,
    metrics: Arc<Metrics>,
    desk: Desk,
    events: Sender<PeerEvent>,
    notify: impl Fn() + Send + Sync + 'static,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = {
        let _inside = runtime.enter();
        socket::bind(path, CONNECTIONS_MAX, IDLE_MAX)?
    };
    let router = router(Admin { events, notify: Arc::new(notify), metrics, desk });
    let serve = async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the admin API ended");
        }
    };
    std::thread::Builder::new().name("admin".into()).spawn(move || runtime.block_on(serve))?;
    Ok(())
}

fn router(admin: Admin) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/metrics", get(|State(admin): State<Admin>| async move { admin.metrics.text() }))
        .route("/verify", get(verification).post(verify))
        .route("/compact", post(compact))
        .route("/config", get(config).patch(reconfigure))
        .merge(conversations::router())
        .merge(transfers::router())
        .fallback(|| async { AskError::NoSuchPath })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(admin)
}

async fn status(State(admin): State<Admin>) -> Json<Snapshot> {
    Json(admin.metrics.snapshot().0)
}

async fn verification(State(admin): State<Admin>) -> Result<Json<Verification>, AskError> {
    Ok(Json(admin.ask(|reply| Ask::Verify { begin: false, reply }).await?))
}

async fn verify(State(admin): State<Admin>) -> Result<Json<Verification>, AskError> {
    Ok(Json(admin.ask(|reply| Ask::Verify { begin: true, reply }).await?))
}

async fn config(State(admin): State<Admin>) -> Result<Json<InForce>, AskError> {
    let change = Change::default();
    Ok(Json(admin.ask(|reply| Ask::Config { change, reply }).await?))
}

async fn reconfigure(
    State(admin): State<Admin>,
    change: Result<Json<Change>, JsonRejection>,
) -> Result<Json<InForce>, AskError> {
    let Json(change) = change.map_err(|error| AskError::Refused(error.body_text()))?;
    Ok(Json(admin.ask(|reply| Ask::Config { change, reply }).await?))
}

async fn compact(State(admin): State<Admin>) -> Result<Json<DiskUsage>, AskError> {
    Ok(Json(admin.ask(|reply| Ask::Compact { reply }).await?))
}

impl IntoResponse for AskError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NoConversation { .. } | Self::NoSuchPath => StatusCode::NOT_FOUND,
            Self::Ambiguous { .. } | Self::Changed { .. } => StatusCode::CONFLICT,
            Self::Refused(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Late { .. } => StatusCode::GATEWAY_TIMEOUT,
            Self::Stopping | Self::NotNow(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, Json(serde_json::json!({ "error": self.to_string() }))).into_response()
    }
}
