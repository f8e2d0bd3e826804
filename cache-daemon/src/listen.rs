//! The handshake's socket: one thread accepts, one a connection shakes hands and then waits for the end.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::time::Duration;

use crate::admin::Ask;
use kv_protocol::AttachmentId;
use kv_protocol::handshake::{HELLO_BYTES, Hello, Refusal, Welcome, encode_answer};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

/// Connections at once; more are closed unheard.
const CONNECTIONS_MAX: usize = 32;
/// How long a peer may take to say hello, and the loop to answer.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// What connections tell the loop.
#[derive(Debug)]
pub enum PeerEvent {
    /// A runtime wants to attach.
    Hello {
        /// What it said.
        hello: Box<Hello>,
        /// Its connection: the loop keeps it to hang up.
        socket: UnixStream,
        /// Where the answer goes.
        reply: SyncSender<Result<Welcome, Refusal>>,
    },
    /// A runtime's connection ended.
    Gone {
        /// Its place.
        id: AttachmentId,
        /// Which attachment there.
        incarnation: u32,
    },
    /// The admin API asks.
    Ask(Ask),
    /// A transfer wants to know, or to have done.
    Transfer(crate::migrate::ask::Ask),
    /// The supervisor, or Kubernetes, wants us to end.
    Terminate,
}

/// Accepts for ever, on a thread of its own. `notify` is called after each event.
pub fn spawn(
    listener: UnixListener,
    region: Arc<OwnedFd>,
    events: Sender<PeerEvent>,
    notify: impl Fn() + Send + Sync + Clone + 'static,
) -> std::io::Result<()> {
    let accept = move || {
        let open = Arc::new(AtomicUsize::new(0));
        for socket in listener.incoming() {
            let socket = match socket {
                Ok(socket) => socket,
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    std::thread::sleep(Duration::from_millis(100)); // Out of descriptors, perhaps.
                    continue;
                }
            };
            if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
                open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (region, events) = (region.clone(), events.clone());
            let (notify, count) = (notify.clone(), open.clone());
            let serve = move || {
                if let Err(error) = serve(socket, &region, &events, &notify) {
                    tracing::info!(%error, "connection ended in the handshake");
                }
                count.fetch_sub(1, Ordering::Relaxed);
            };
            if let Err(error) = std::thread::Builder::new().name("peer".into()).spawn(serve) {
                tracing::warn!(%error, "no thread for a connection");
                open.fetch_sub(1, Ordering::Relaxed);
            }
        }
    };
    std::thread::Builder::new().name("accept".into()).spawn(accept)?;
    Ok(())
}

fn serve(
    mut socket: UnixStream,
    region: &OwnedFd,
    events: &Sender<PeerEvent>,
    notify: &impl Fn(),
) -> std::io::Result<()> {
    socket.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
    socket.set_write_timeout(Some(HANDSHAKE_TIMEOUT))?;
    let mut bytes = [0; HELLO_BYTES];
    socket.read_exact(&mut bytes)?;
    let hello = match Hello::decode(&bytes) {
        Ok(hello) => hello,
        Err(error) => {
            tracing::warn!(%error, "hello refused");
            let refusal = match error {
                kv_protocol::handshake::HandshakeError::Geometry(_) => Refusal::Geometry,
                _ => Refusal::Version,
            };
            return socket.write_all(&encode_answer(&Err(refusal)));
        }
    };
    let (reply, answer) = sync_channel(1);
    let event = PeerEvent::Hello { hello: Box::new(hello), socket: socket.try_clone()?, reply };
    events.send(event).map_err(|_| std::io::Error::other("the loop has ended"))?;
    notify();
    let answer = answer.recv_timeout(HANDSHAKE_TIMEOUT).unwrap_or(Err(Refusal::Stopping));
    let welcome = match answer {
        Ok(welcome) => welcome,
        Err(refusal) => return socket.write_all(&encode_answer(&Err(refusal))),
    };
    let sent = send_welcome(&socket, &welcome, region);
    // Attached from here on, whatever happens: the loop must hear of the end.
    if sent.is_ok() {
        socket.set_read_timeout(None)?;
        let mut byte = [0];
        // The runtime never writes: whatever comes, end or nonsense, is the end.
        while matches!(socket.read(&mut byte), Err(error) if error.kind() == std::io::ErrorKind::Interrupted)
        {
        }
    }
    let gone = PeerEvent::Gone { id: welcome.attachment, incarnation: welcome.incarnation };
    let _ = events.send(gone); // The loop is gone: nobody needs to know.
    notify();
    sent
}

fn send_welcome(socket: &UnixStream, welcome: &Welcome, region: &OwnedFd) -> std::io::Result<()> {
    let bytes = encode_answer(&Ok(*welcome));
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [region.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let io = [std::io::IoSlice::new(&bytes)];
    let sent = rustix::net::sendmsg(socket, &io, &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent == bytes.len() { Ok(()) } else { Err(std::io::Error::other("answer cut short")) }
}
