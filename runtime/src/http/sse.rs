//! A reply as server-sent events. One task per stream reads the engine and writes chunks; when the
//! client leaves, the task ends, and with it the generation.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::error::ApiError;
use super::generate::{Generation, Step};
use super::openai::{Answer, Place};
use super::{Service, reply::Delta};

/// Chunks between the engine and a slow client; behind them the events themselves wait, bounded by the
/// reply's length.
const CHUNKS_MAX: usize = 32;
/// Proxies close connections that say nothing for some tens of seconds.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// The last event of every stream.
const DONE: &str = "[DONE]";

/// Streams `generation`. Errors that come before its first event keep their status; one that has waited
/// in the queue for a while is answered with keep-alives instead, and errors follow in the stream.
pub async fn stream(
    service: std::sync::Arc<Service>,
    mut generation: Generation,
    answer: Answer,
) -> Result<Response, ApiError> {
    let first = match tokio::time::timeout(KEEP_ALIVE, generation.next()).await {
        Ok(step) => Some(step?),
        Err(_still_queued) => None,
    };
    let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
    tokio::spawn(async move {
        let writer = Writer { service, answer, sender, characters: 0 };
        // A failure to send means that the client has gone: nothing is left to do.
        let _ = writer.run(generation, first).await;
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive");
    Ok(Sse::new(ReceiverStream::new(receiver)).keep_alive(keep_alive).into_response())
}

/// The client's end of the stream is closed.
struct Gone;

struct Writer {
    service: std::sync::Arc<Service>,
    answer: Answer,
    sender: mpsc::Sender<Result<Event, Infallible>>,
    /// Characters of text sent so far.
    characters: usize,
}

impl Writer {
    async fn run(mut self, mut generation: Generation, first: Option<Step>) -> Result<(), Gone> {
        self.chunk(Delta::default(), Place::First).await?;
        let mut step = first;
        loop {
            match step.take() {
                None | Some(Step::Started) => {}
                Some(Step::Delta(delta)) if delta.is_empty() => {}
                Some(Step::Delta(delta)) => self.chunk(delta, Place::Middle).await?,
                Some(Step::Finished(delta, reason)) => {
                    // Text before the reason, as clients expect the last chunk to be empty.
                    if !delta.is_empty() {
                        self.chunk(delta, Place::Middle).await?;
                    }
                    self.chunk(Delta::default(), Place::Last(reason)).await?;
                    if let Some(usage) = self.answer.usage_chunk(generation.usage()) {
                        self.json(&usage).await?;
                    }
                    return self.send(Event::default().data(DONE)).await;
                }
            }
            let next = tokio::select! {
                next = generation.next() => next,
                () = self.sender.closed() => return Err(Gone),
            };
            match next {
                Ok(next) => step = Some(next),
                Err(error) => {
                    self.json(&error.body()).await?;
                    return self.send(Event::default().data(DONE)).await;
                }
            }
        }
    }

    async fn chunk(&mut self, delta: Delta, place: Place) -> Result<(), Gone> {
        let tokenizer = &self.service.tokenizer;
        let offset = self.characters;
        self.characters += delta.text.chars().count();
        let chunk = self.answer.chunk(tokenizer, &delta.text, &delta.reports, offset, place);
        self.json(&chunk).await
    }

    async fn json(&self, value: &Value) -> Result<(), Gone> {
        self.send(Event::default().data(value.to_string())).await
    }

    async fn send(&self, event: Event) -> Result<(), Gone> {
        self.sender.send(Ok(event)).await.map_err(|_closed| Gone)
    }
}
