//! The exporting side: HTTP/2 in clear text on `--migration-listen`. Reads, never changes, this daemon's state.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/conversations/ID` | manifest, record, keys, end |
//! | `POST /v1/blocks`, body root ‖ keys | each block or its absence, in that order, end |
//!
//! Every request is signed, every answer sealed for it ([`super::secret`]). A refusal is a status and a sentence.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kv_protocol::key::KEY_BYTES;
use kv_protocol::{BlockKey, ConversationId, RootKey};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::timeout;

use super::ask::{Loop, Refused};
use super::bundle::{Encoder, SealKey, Section};
use super::describe::{DescribeError, Description};
use super::pace::Pace;
use super::secret::{AuthError, Gate, Secret, Signature, from_hex};
use crate::daemon::unix_ms;
use crate::metrics::Metrics;

/// Header of a request that carries its [`Signature`].
pub const SIGNATURE_HEADER: &str = "colloquy-signature";
/// Blocks that may be asked for in one request.
pub const BATCH_MAX: usize = 64;
/// Bytes that are paced, and handed to the connection, at once.
const PIECE_BYTES: usize = 256 << 10;
/// Connections at once: one or two for each other replica of a fleet that drains. More are closed unheard.
const CONNECTIONS_MAX: usize = 32;
/// Streams of blocks at once; each has up to three blocks in memory.
const STREAMS_MAX: usize = 4;
/// A connection that has signed nothing by then is closed: places are for those who know the secret.
const UNSIGNED_MAX: Duration = Duration::from_secs(3);
/// Requests on one connection at once.
const REQUESTS_PER_CONNECTION: u32 = 4;
/// How long a request's body may take.
const BODY_MAX: Duration = Duration::from_secs(2);
/// How long the other side may take none of an answer: longer than its wait for a free frame.
const STALLED_MAX: Duration = Duration::from_mins(1);
/// A peer that does not answer a ping for as long again is gone.
const PING_EVERY: Duration = Duration::from_secs(10);

/// See the module.
pub struct Exporter {
    /// This daemon's state.
    pub state: Loop,
    /// File of the shared secret.
    pub secret: PathBuf,
    /// Of all answers together.
    pub pace: Pace,
    /// Where exports are counted.
    pub metrics: Arc<Metrics>,
    gate: Mutex<Gate>,
    streams: Arc<Semaphore>,
}

/// Why a request gets no bundle.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Auth(#[from] AuthError),
    #[error("this daemon cannot read its own secret")]
    Secret,
    #[error("the request is none that this daemon knows: {0}")]
    Request(&'static str),
    #[error(transparent)]
    Describe(#[from] DescribeError),
}

impl ServeError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Auth(AuthError::Busy) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Auth(_) => StatusCode::UNAUTHORIZED,
            Self::Secret => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Request(_) => StatusCode::BAD_REQUEST,
            Self::Describe(DescribeError::Refused(refused)) => match refused {
                Refused::Deleted(_) => StatusCode::GONE,
                Refused::Busy | Refused::Opening | Refused::Stopping => {
                    StatusCode::SERVICE_UNAVAILABLE
                }
                _ => StatusCode::CONFLICT,
            },
            Self::Describe(_) => StatusCode::NOT_FOUND,
        }
    }
}

/// An answer's bytes, as they are made.
struct Answer(mpsc::Receiver<Bytes>);

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}

impl Answer {
    fn whole(bytes: impl Into<Bytes>) -> Self {
        let (sender, receiver) = mpsc::channel(1);
        let _ = sender.try_send(bytes.into()); // There is room for one.
        Self(receiver)
    }
}

impl Exporter {
    /// Serves what `state` knows.
    pub fn new(state: Loop, secret: PathBuf, pace: Pace, metrics: Arc<Metrics>) -> Self {
        let streams = Arc::new(Semaphore::new(STREAMS_MAX));
        Self { state, secret, pace, metrics, gate: Mutex::default(), streams }
    }

    /// Accepts for ever.
    pub async fn serve(self, address: SocketAddr) {
        let listener = crate::http::bind(address).await;
        let exporter = Arc::new(self);
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await; // Out of descriptors, perhaps.
                    continue;
                }
            };
            let _ = stream.set_nodelay(true); // Slower without it, no worse.
            let Ok(permit) = connections.clone().try_acquire_owned() else { continue };
            tokio::spawn(exporter.clone().connection(stream, peer, permit));
        }
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        _permit: OwnedSemaphorePermit,
    ) {
        let (signed, is_signed) = watch::channel(false);
        let service = service_fn(move |request| {
            let (exporter, signed) = (self.clone(), signed.clone());
            async move { Ok::<_, Infallible>(exporter.answer(request, peer, &signed).await) }
        });
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_EVERY)
            .max_concurrent_streams(REQUESTS_PER_CONNECTION)
            .max_send_buf_size(PIECE_BYTES)
            .serve_connection(TokioIo::new(stream), service);
        tokio::select! {
            served = connection => {
                if let Err(error) = served {
                    tracing::info!(%peer, %error, "connection of a migration ended");
                }
            }
            () = unsigned(is_signed) => tracing::info!(%peer, "connection without a signed request closed"),
        }
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        peer: SocketAddr,
        signed: &watch::Sender<bool>,
    ) -> Response<Answer> {
        let (status, body) = match self.try_answer(request, signed).await {
            Ok(body) => (StatusCode::OK, body),
            Err(error) => {
                tracing::warn!(%peer, %error, "export refused");
                self.metrics.exports.with_label_values(&["refused"]).inc();
                (error.status(), Answer::whole(error.to_string()))
            }
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        response
    }

    async fn try_answer(
        &self,
        request: Request<Incoming>,
        signed: &watch::Sender<bool>,
    ) -> Result<Answer, ServeError> {
        let (head, body) = request.into_parts();
        let body = Limited::new(body, KEY_BYTES * (1 + BATCH_MAX)).collect();
        let body = timeout(BODY_MAX, body).await.map_err(|_| ServeError::Request("no body"))?;
        let body = body.map_err(|_| ServeError::Request("its body is too long"))?.to_bytes();
        let signature = head.headers.get(SIGNATURE_HEADER).and_then(|value| value.to_str().ok());
        let signature = Signature::decode(signature.ok_or(AuthError::Unsigned)?)?;
        let secret = Secret::read(&self.secret).map_err(|error| {
            tracing::error!(%error, "no export");
            ServeError::Secret
        })?;
        let path = head.uri.path();
        secret.verify(head.method.as_str(), path, &body, &signature)?;
        self.gate.lock().unwrap_or_else(PoisonError::into_inner).admit(unix_ms(), &signature)?;
        signed.send_replace(true);
        let key = secret.answer_key(&signature);
        match (&head.method, path.strip_prefix("/v1/").unwrap_or_default()) {
            (&Method::POST, "blocks") => self.blocks(&body, key),
            (&Method::GET, path) => {
                let id = path.strip_prefix("conversations/").and_then(from_hex);
                let id = id.ok_or(ServeError::Request("no such path"))?;
                self.describe(ConversationId(id), key).await
            }
            _ => Err(ServeError::Request("no such method")),
        }
    }

    async fn describe(&self, id: ConversationId, key: SealKey) -> Result<Answer, ServeError> {
        let description = Description::of(&self.state, id).await?;
        let mut encoder = Encoder::new(key);
        let mut bytes = Vec::new();
        for section in description.into_sections() {
            let (header, body) = encoder.section(section);
            bytes.extend_from_slice(&header);
            bytes.extend_from_slice(&body);
        }
        Ok(Answer::whole(bytes))
    }

    fn blocks(&self, body: &[u8], key: SealKey) -> Result<Answer, ServeError> {
        let mut keys = body.chunks_exact(KEY_BYTES).map(|key| {
            let mut bytes = [0; KEY_BYTES];
            bytes.copy_from_slice(key);
            bytes
        });
        let root = RootKey(keys.next().ok_or(ServeError::Request("it names no root"))?);
        let keys: Vec<BlockKey> = keys.map(BlockKey).collect();
        let streams = self.streams.clone();
        let permit = streams.try_acquire_owned().map_err(|_| DescribeError::from(Refused::Busy))?;
        let (sender, receiver) = mpsc::channel(1);
        let stream = Stream {
            state: self.state.clone(),
            pace: self.pace.clone(),
            metrics: self.metrics.clone(),
            encoder: Encoder::new(key),
            sender,
            _permit: permit,
        };
        tokio::spawn(stream.send_all(root, keys));
        Ok(Answer(receiver))
    }
}

/// Returns when a connection has had its time and signed nothing.
async fn unsigned(is_signed: watch::Receiver<bool>) {
    tokio::time::sleep(UNSIGNED_MAX).await;
    if *is_signed.borrow() {
        std::future::pending::<()>().await;
    }
}

/// Blocks on their way out.
struct Stream {
    state: Loop,
    pace: Pace,
    metrics: Arc<Metrics>,
    encoder: Encoder,
    sender: mpsc::Sender<Bytes>,
    _permit: OwnedSemaphorePermit,
}

impl Stream {
    /// An answer that ends without its last section tells the other side that something went wrong.
    async fn send_all(mut self, root: RootKey, keys: Vec<BlockKey>) {
        let (mut blocks, mut absent) = (0, 0);
        for key in keys {
            let section = match self.state.copy(key, root).await {
                Ok(Some(block)) => Section::Block(block),
                Ok(None) => Section::Absent(key),
                Err(error) => {
                    tracing::warn!(%error, "export ended early");
                    return;
                }
            };
            match section {
                Section::Block(_) => blocks += 1,
                _ => absent += 1,
            }
            if !self.send(section).await {
                self.metrics.exports.with_label_values(&["broken"]).inc();
                return;
            }
        }
        if self.send(Section::End { blocks, absent }).await {
            self.metrics.exports.with_label_values(&["done"]).inc();
            self.metrics.exported_blocks.inc_by(blocks.into());
        }
    }

    /// `false` if the other side takes no more.
    async fn send(&mut self, section: Section) -> bool {
        let (header, mut body) = self.encoder.section(section);
        let mut next = Some(Bytes::copy_from_slice(&header));
        while let Some(piece) = next {
            let bytes = piece.len() as u64;
            self.pace.wait(bytes).await;
            if !matches!(timeout(STALLED_MAX, self.sender.send(piece)).await, Ok(Ok(()))) {
                return false;
            }
            self.metrics.exported_bytes.inc_by(bytes);
            next = (!body.is_empty()).then(|| body.split_to(PIECE_BYTES.min(body.len())));
        }
        true
    }
}
