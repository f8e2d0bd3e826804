//! The importing side's end of the wire: asks another daemon, and takes its sealed answers apart.

use std::path::PathBuf;
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kv_protocol::{BlockKey, ConversationId, Geometry, RootKey};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::bundle::{Decoder, Section};
use super::pull::{Arrived, Described, Source, SourceError};
use super::secret::{NONCE_BYTES, Secret, hex};
use super::server::SIGNATURE_HEADER;
use crate::daemon::unix_ms;

/// How long a connection may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long the other side may say nothing: it paces in pieces, so even a slow one says something.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Bytes on their way to us that we have not taken: half a block or more of a large model.
const WINDOW_BYTES: u32 = 2 << 20;
/// Bytes of a refusal's sentence.
const SENTENCE_BYTES_MAX: usize = 1024;

/// Another daemon.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Host and port of its `--migration-listen`.
    pub address: String,
    /// File of the shared secret.
    pub secret: PathBuf,
}

impl Source for Peer {
    async fn describe(&self, id: ConversationId) -> Result<Described, SourceError> {
        let path = format!("/v1/conversations/{}", hex(&id.0));
        let mut answer = self.ask(Method::GET, &path, Bytes::new(), None).await?;
        let mut next = async || answer.next().await?.ok_or(SourceError::Unexpected);
        let (manifest, record, keys) = (next().await?, next().await?, next().await?);
        Described::new(manifest, record, keys)
    }

    async fn blocks(
        &self,
        geometry: &Geometry,
        root: &RootKey,
        keys: &[BlockKey],
        into: &mpsc::Sender<Arrived>,
    ) -> Result<(), SourceError> {
        let names = std::iter::once(root.0).chain(keys.iter().map(|key| key.0));
        let body: Vec<u8> = names.flatten().collect();
        let mut answer = self.ask(Method::POST, "/v1/blocks", body.into(), Some(*geometry)).await?;
        loop {
            let arrived = match answer.next().await? {
                Some(Section::Block(block)) => Arrived::Block(block),
                Some(Section::Absent(key)) => Arrived::Absent(key),
                Some(Section::End { .. }) => return Ok(()),
                Some(_) | None => return Err(SourceError::Unexpected),
            };
            if into.send(arrived).await.is_err() {
                return Ok(()); // Who wanted them has said why not.
            }
        }
    }
}

impl Peer {
    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        geometry: Option<Geometry>,
    ) -> Result<Answer, SourceError> {
        let secret = Secret::read(&self.secret)?;
        let (mut sender, connection) = self.connect().await?;
        let mut nonce = [0; NONCE_BYTES];
        rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| SourceError::Random(error.into()))?;
        let signature = secret.sign(method.as_str(), path, &body, unix_ms(), nonce);
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address))
            .header(SIGNATURE_HEADER, signature.encode())
            .body(Full::new(body))
            .map_err(|error| self.failed(&error))?;
        let response = self.patiently(sender.send_request(request)).await?;
        let (head, body) = response.into_parts();
        if head.status != StatusCode::OK {
            let sentence = Limited::new(body, SENTENCE_BYTES_MAX).collect();
            let sentence = timeout(SILENCE_MAX, sentence).await.ok().and_then(Result::ok);
            let sentence = sentence.map(http_body_util::Collected::to_bytes).unwrap_or_default();
            return Err(SourceError::Refused {
                address: self.address.clone(),
                status: head.status.as_u16(),
                sentence: String::from_utf8_lossy(&sentence).into_owned(),
            });
        }
        let decoder = Decoder::new(secret.answer_key(&signature), geometry);
        Ok(Answer {
            peer: self.clone(),
            body,
            chunk: Bytes::new(),
            decoder,
            _connection: connection,
        })
    }

    async fn connect(&self) -> Result<(SendRequest<Full<Bytes>>, Connection), SourceError> {
        let stream = timeout(CONNECT_MAX, TcpStream::connect(&self.address)).await;
        let stream = stream.map_err(|_| self.silent(CONNECT_MAX))?;
        let stream = stream.map_err(|error| self.failed(&error))?;
        let _ = stream.set_nodelay(true); // Slower without it, no worse.
        let handshake = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .handshake(TokioIo::new(stream));
        let (sender, connection) = self.patiently(handshake).await?;
        let task = tokio::spawn(async move {
            let _ = connection.await; // What is wrong with it, its requests say.
        });
        Ok((sender, Connection(task)))
    }

    async fn patiently<T>(
        &self,
        call: impl Future<Output = Result<T, hyper::Error>>,
    ) -> Result<T, SourceError> {
        let done = timeout(SILENCE_MAX, call).await.map_err(|_| self.silent(SILENCE_MAX))?;
        done.map_err(|error| self.failed(&error))
    }

    fn silent(&self, waited: Duration) -> SourceError {
        SourceError::Silent { address: self.address.clone(), waited }
    }

    fn failed(&self, error: &dyn std::error::Error) -> SourceError {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            message = format!("{message}: {error}");
            cause = error.source();
        }
        SourceError::Wire { address: self.address.clone(), message }
    }
}

/// A connection's task: it ends with its answer.
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Answer {
    peer: Peer,
    body: Incoming,
    chunk: Bytes,
    decoder: Decoder,
    _connection: Connection,
}

impl Answer {
    /// The next section; `None` at the end, if that is the bundle's.
    async fn next(&mut self) -> Result<Option<Section>, SourceError> {
        loop {
            let mut rest = &self.chunk[..];
            let section = self.decoder.next(&mut rest)?;
            let taken = self.chunk.len() - rest.len();
            self.chunk.advance(taken);
            if section.is_some() {
                return Ok(section);
            }
            let frame = timeout(SILENCE_MAX, self.body.frame()).await;
            let Some(frame) = frame.map_err(|_| self.peer.silent(SILENCE_MAX))? else {
                self.decoder.finish()?;
                return Ok(None);
            };
            let frame = frame.map_err(|error| self.peer.failed(&error))?;
            self.chunk = frame.into_data().unwrap_or_default();
        }
    }
}
