//! Requests about conversations.

use axum::extract::{Path, Query, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use kv_protocol::record::NAME_BYTES_MAX;
use kv_protocol::{ConversationId, Record};
use serde::{Deserialize, Serialize};

use super::{Admin, Ask, AskError, Deleted, Who};
use crate::records::{ConversationLine, Explanation};

/// Lines of one list.
const LIST_MAX: usize = 1000;
/// Lines of a list that says no number.
const LIST_DEFAULT: usize = 20;

pub(super) fn router() -> Router<Admin> {
    Router::new()
        .route("/conversations", get(list))
        .route("/conversations/{who}", get(explain).delete(delete))
        .route("/conversations/{who}/fork", post(fork))
        .route("/conversations/{who}/truncate", post(truncate))
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    #[default]
    Bytes,
    Used,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    limit: Option<usize>,
    #[serde(default)]
    order: Order,
}

#[derive(Debug, Serialize)]
struct List {
    total: u64,
    conversations: Vec<ConversationLine>,
}

/// Page by page, so that the loop serves turns between.
async fn list(
    State(admin): State<Admin>,
    Query(query): Query<ListQuery>,
) -> Result<Json<List>, AskError> {
    let limit = query.limit.unwrap_or(LIST_DEFAULT).min(LIST_MAX);
    let (mut list, mut total, mut after) = (Vec::new(), 0, None);
    loop {
        let page = admin.ask(|reply| Ask::Page { after, reply }).await?;
        let Some((last, _)) = page.last() else { break };
        after = Some(*last);
        total += page.len() as u64;
        list.extend(page.into_iter().map(|(_, line)| line));
        match query.order {
            Order::Bytes => list.sort_by_key(|line| std::cmp::Reverse(line.bytes())),
            Order::Used if list.len() >= limit => break,
            Order::Used => {}
        }
        list.truncate(limit);
    }
    list.truncate(limit);
    if query.order == Order::Used {
        total = admin.metrics.snapshot().0.conversations;
    }
    Ok(Json(List { total, conversations: list }))
}

/// How the path's last part names a conversation.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum By {
    #[default]
    Name,
    Id,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WhoQuery {
    #[serde(default)]
    by: By,
    root: Option<String>,
}

pub(super) async fn find(
    admin: &Admin,
    who: String,
    query: WhoQuery,
) -> Result<ConversationId, AskError> {
    let who = match query.by {
        By::Name => Who::Name { name: who, root: query.root },
        By::Id => Who::Id(who),
    };
    admin.ask(|reply| Ask::Find { who, reply }).await
}

async fn explain(
    State(admin): State<Admin>,
    Path(who): Path<String>,
    Query(query): Query<WhoQuery>,
) -> Result<Json<Explanation>, AskError> {
    let id = find(&admin, who, query).await?;
    Ok(Json(admin.ask(|reply| Ask::Explain { id, reply }).await?))
}

async fn delete(
    State(admin): State<Admin>,
    Path(who): Path<String>,
    Query(query): Query<WhoQuery>,
) -> Result<Json<Deleted>, AskError> {
    let id = find(&admin, who, query).await?;
    Ok(Json(admin.ask(|reply| Ask::Delete { id, reply }).await?))
}

/// A record that can be worked on, and when it was put.
async fn record(admin: &Admin, id: ConversationId) -> Result<(Record, u64), AskError> {
    let (bytes, updated_ms) = admin.ask(|reply| Ask::Record { id, reply }).await?;
    let record = Record::decode(&bytes).map_err(|error| AskError::Refused(error.to_string()))?;
    Ok((record, updated_ms))
}

fn encoded(record: &Record) -> Result<Vec<u8>, AskError> {
    record.encode().map_err(|error| AskError::Refused(error.to_string()))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ForkBody {
    name: String,
}

/// A copy of the record under another name. Blocks are found by what they hold, and a partial one is never
/// written again: the two share them until they differ.
async fn fork(
    State(admin): State<Admin>,
    Path(who): Path<String>,
    Query(query): Query<WhoQuery>,
    Json(ForkBody { name }): Json<ForkBody>,
) -> Result<Json<Explanation>, AskError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        let bytes = name.len();
        let refused = format!("a name of {bytes} bytes, must be 1 to {NAME_BYTES_MAX}");
        return Err(AskError::Refused(refused));
    }
    let of = find(&admin, who, query).await?;
    let (mut record, _) = record(&admin, of).await?;
    let id = ConversationId::new(&record.root, name.as_bytes());
    record.name = name;
    record.former.clear(); // They are the other's.
    let record = encoded(&record)?;
    admin.ask(|reply| Ask::PutRecord { id, record, replaces: None, reply }).await?;
    Ok(Json(admin.ask(|reply| Ask::Explain { id, reply }).await?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TruncateBody {
    /// Blocks kept at the start.
    #[serde(default)]
    sinks: u32,
    /// Blocks dropped behind them.
    drop: u32,
}

async fn truncate(
    State(admin): State<Admin>,
    Path(who): Path<String>,
    Query(query): Query<WhoQuery>,
    Json(TruncateBody { sinks, drop }): Json<TruncateBody>,
) -> Result<Json<Explanation>, AskError> {
    let id = find(&admin, who, query).await?;
    let (mut record, updated_ms) = record(&admin, id).await?;
    record.truncate(sinks, drop).map_err(|error| AskError::Refused(error.to_string()))?;
    let (record, replaces) = (encoded(&record)?, Some(updated_ms));
    admin.ask(|reply| Ask::PutRecord { id, record, replaces, reply }).await?;
    Ok(Json(admin.ask(|reply| Ask::Explain { id, reply }).await?))
}
