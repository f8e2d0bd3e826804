//! Requests that move conversations. The answer is a line of JSON a second while it lasts, and one at the end;
//! a transfer goes on to its end if nobody listens any more.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::routing::post;
use axum::{Json, Router};
use kv_protocol::{ConversationId, RootKey};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::task::{JoinError, JoinHandle};

use super::Admin;
use super::ask::AskError;
use super::conversations::{WhoQuery, find};
use crate::migrate::desk::{From, Import, NotConfigured};
use crate::migrate::secret::from_hex;

/// How often a transfer says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// [`ImportBody::from`] of the remote tier.
const FROM_REMOTE: &str = "remote";

pub(super) fn router() -> Router<Admin> {
    Router::new()
        .route("/imports", post(import))
        .route("/conversations/{who}/offload", post(offload))
}

/// Of a conversation that is not here yet.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ImportBody {
    /// In 64 hexadecimal digits; or else a name.
    id: Option<String>,
    /// The client's own.
    name: Option<String>,
    /// In 64 hexadecimal digits; by default this daemon's model without a salt.
    root: Option<String>,
    /// Host and port of another daemon's `--migration-listen`, or `remote`.
    from: String,
}

async fn import(
    State(admin): State<Admin>,
    Json(body): Json<ImportBody>,
) -> Result<Body, AskError> {
    let id = body.id(&admin).await?;
    let from = match body.from.as_str() {
        FROM_REMOTE => From::Remote,
        address => From::Daemon(address.to_owned()),
    };
    let Import { shown, end } = admin.desk.import(id, from)?;
    Ok(lines(end, move || json!(&*shown.borrow())))
}

impl ImportBody {
    async fn id(&self, admin: &Admin) -> Result<ConversationId, AskError> {
        let refused = |message: &str| AskError::Refused(message.to_owned());
        let digits = |text: &String| {
            from_hex(text)
                .ok_or_else(|| AskError::Refused(format!("{text:?} is not 64 hexadecimal digits")))
        };
        match (&self.id, &self.name) {
            (Some(id), None) => Ok(ConversationId(digits(id)?)),
            (None, Some(name)) => {
                let root = if let Some(root) = &self.root {
                    RootKey(digits(root)?)
                } else {
                    let model = admin.desk.model().await;
                    let model = model.map_err(|error| AskError::NotNow(error.to_string()))?;
                    RootKey::new(&model.fingerprint, b"")
                };
                Ok(ConversationId::new(&root, name.as_bytes()))
            }
            _ => Err(refused("either an id or a name")),
        }
    }
}

async fn offload(
    State(admin): State<Admin>,
    Path(who): Path<String>,
    Query(query): Query<WhoQuery>,
) -> Result<Body, AskError> {
    let id = find(&admin, who, query).await?;
    Ok(lines(admin.desk.offload(id)?, || json!({})))
}

/// What a transfer shows while it lasts, and its end.
fn lines<T, E>(end: JoinHandle<Result<T, E>>, show: impl Fn() -> Value + Send + 'static) -> Body
where
    T: Serialize + Send + 'static,
    E: std::error::Error + Send + 'static,
{
    let lines = futures::stream::unfold(Some((end, show)), async |under_way| {
        let (mut end, show) = under_way?;
        let (line, rest) = tokio::select! {
            end = &mut end => (last_line(end), None),
            () = tokio::time::sleep(PROGRESS_EVERY) => (told(show(), false), Some((end, show))),
        };
        Some((Ok::<_, Infallible>(format!("{line}\n")), rest))
    });
    Body::from_stream(lines)
}

fn last_line<T: Serialize, E: std::error::Error>(end: Result<Result<T, E>, JoinError>) -> Value {
    match end {
        Ok(Ok(done)) => told(json!(done), true),
        Ok(Err(error)) => json!({ "error": error.to_string() }),
        Err(_) => json!({ "error": "the transfer failed; the daemon's log says why" }),
    }
}

fn told(mut line: Value, done: bool) -> Value {
    line["done"] = done.into();
    line
}

impl std::convert::From<NotConfigured> for AskError {
    fn from(error: NotConfigured) -> Self {
        Self::Refused(error.to_string())
    }
}
