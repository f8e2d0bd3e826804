//! `POST /v1/conversations/{id}/anticipate`: a client says that a turn will come, because its user has begun
//! to type. The cache daemon then brings the conversation's history near before the turn is asked for.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::error::ApiError;
use super::fields::Fields;
use super::openai::{NAME_BYTES_MAX, take_name};
use super::{Server, read};
use crate::cache_client::ANTICIPATED_FOR;
use crate::request::{Anticipate, Command, Salt};

/// The engine hears of it between two steps.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// `{model?, cache_salt?}`, or no body: 202 once the daemon is told.
pub async fn anticipate(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let service = server.service()?;
    let body = read(&headers, body).await?;
    let mut fields = Fields::of_body(if body.is_empty() { b"{}" } else { &body })?;
    let model: Option<String> = fields.take("model")?;
    let salt = take_name(&mut fields, "cache_salt")?.unwrap_or_default();
    fields.finish()?;
    service.check_model(model.as_deref())?;
    if id.is_empty() || id.len() > NAME_BYTES_MAX {
        return Err(ApiError::field(
            "id",
            format_args!("{} bytes; from 1 to {NAME_BYTES_MAX} are served", id.len()),
        ));
    }
    if service.cache_attached.get() == 0 {
        return Err(ApiError::no_cache());
    }
    let name = service.conversations.name(salt.as_bytes(), &id);
    let record = service.conversations.find(&name).await;
    let record = record.ok_or_else(|| ApiError::no_such_conversation(&id))?;
    let (answer, answered) = oneshot::channel();
    (service.submit)(Command::Anticipate(Anticipate {
        salt: Salt(salt.as_bytes().into()),
        conversation: id.as_str().into(),
        tokens: record.tokens.as_slice().into(),
        start: record.kept.as_ref().map(|kept| kept.start.clone()),
        answer,
    }))?;
    match tokio::time::timeout(ANSWER_TIMEOUT, answered).await {
        Ok(Ok(Ok(()))) => {}
        Ok(_) => return Err(ApiError::no_cache()),
        Err(_elapsed) => return Err(ApiError::unavailable("the engine is busy; try again")),
    }
    let told = json!({
        "object": "conversation.anticipation",
        "conversation": id,
        "tokens": record.tokens.len(),
        "expires_in_seconds": ANTICIPATED_FOR.as_secs(),
    });
    Ok((StatusCode::ACCEPTED, Json(told)))
}
