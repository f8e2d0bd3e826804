//! Requests to a daemon's admin socket, and to a runtime's port.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// Longest wait for an answer: the daemon gives up before.
const ANSWER_MAX: Duration = Duration::from_mins(1);
/// Bytes of an answer: a thousand conversations are a few hundred KiB.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// What a name in a path keeps as it is.
const NAME: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b':');

/// A daemon's admin socket.
pub struct Client {
    socket: PathBuf,
}

/// A text in a path or a query.
pub fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NAME).to_string()
}

impl Client {
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.text(Method::GET, path, None)?)?)
    }

    pub fn send(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.text(method, path, body)?)?)
    }

    /// The answer as it is.
    pub fn text(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<String> {
        block_on(async {
            let stream = self.connect().await?;
            exchange(stream, "localhost", method, path, body).await
        })
    }

    /// Posts what may take long: `see` is given each line of the answer but the last, which comes back.
    pub fn lines(
        &self,
        path: &str,
        body: Option<&Value>,
        mut see: impl FnMut(&Value),
    ) -> anyhow::Result<Value> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let stream = self.connect().await?;
            let mut answer = request(stream, "localhost", Method::POST, path, body).await?;
            if !answer.status().is_success() {
                return Ok(serde_json::from_str(&whole(answer).await?)?);
            }
            let (mut text, mut last) = (Vec::new(), None);
            loop {
                let frame = tokio::time::timeout(ANSWER_MAX, answer.frame()).await;
                let Some(frame) = frame.with_context(late)? else { break };
                text.extend_from_slice(&frame?.into_data().unwrap_or_default());
                while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
                    let line: Value = serde_json::from_slice(&text[..end])?;
                    text.drain(..=end);
                    last.replace(line).iter().for_each(&mut see);
                }
            }
            let last = last.context("the answer broke off")?;
            match last["error"].as_str() {
                Some(error) => bail!("{error}"),
                None => Ok(last),
            }
        })
    }

    async fn connect(&self) -> anyhow::Result<UnixStream> {
        UnixStream::connect(&self.socket).await.map_err(|error| {
            let path = self.socket.display();
            let check = match error.kind() {
                ErrorKind::NotFound => {
                    "no such file: is this the daemon's container, and is --socket the daemon's \
                         --admin-socket (by default admin.sock beside its --socket)?"
                }
                ErrorKind::ConnectionRefused => {
                    "nobody listens: the daemon's worker is down or just starting; its log says why"
                }
                ErrorKind::PermissionDenied => {
                    "the socket is its owner's alone: run as the daemon's user"
                }
                _ => "is the daemon running here?",
            };
            anyhow::anyhow!("cannot reach the cache daemon at {path} ({error}); {check}")
        })
    }
}

/// Posts to a server at `http://host:port`.
pub fn post(url: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
    let address = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
    let address =
        address.with_context(|| format!("{url:?} is not of the form http://host:port"))?;
    ensure!(!address.contains('/'), "{url:?} is not of the form http://host:port");
    let answer = block_on(async {
        let stream = TcpStream::connect(address).await;
        let stream = stream.with_context(|| format!("cannot reach a runtime at {address}"))?;
        exchange(stream, address, Method::POST, path, Some(body)).await
    })?;
    Ok(serde_json::from_str(&answer)?)
}

fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { tokio::time::timeout(ANSWER_MAX, work).await.with_context(late)? })
}

fn late() -> String {
    format!("no answer within {} s", ANSWER_MAX.as_secs())
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    host: &str,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<String> {
    whole(request(stream, host, method, path, body).await?).await
}

async fn request(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    host: &str,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<Response<Incoming>> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection); // Its error comes back by the request.
    let body = body.map(Value::to_string).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, host)
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))?;
    Ok(sender.send_request(request).await?)
}

async fn whole(answer: Response<Incoming>) -> anyhow::Result<String> {
    let status = answer.status();
    let bytes = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
    let bytes = bytes.map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?.to_bytes();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    if status.is_success() {
        return Ok(text);
    }
    let told: Option<Value> = serde_json::from_str(&text).ok();
    let message = told.as_ref().and_then(|told| {
        let error = told.get("error")?;
        error.as_str().or_else(|| error.get("message")?.as_str())
    });
    bail!("{}", message.map_or_else(|| format!("{status}: {}", text.trim()), str::to_owned))
}
