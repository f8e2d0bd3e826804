//! The admin API's socket: made anew at each start, its owner's alone, with a bounded number of connections.

use std::io::{self, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// Pause after a failed accept: out of descriptors, perhaps.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listener with a bound.
pub struct Bounded {
    listener: UnixListener,
    places: Arc<Semaphore>,
    idle_max: Duration,
}

/// Binds `path`, in the place of whatever socket an earlier worker left there.
pub fn bind(path: &Path, connections_max: usize, idle_max: Duration) -> io::Result<Bounded> {
    let told = |what: &str, error: io::Error| {
        io::Error::new(error.kind(), format!("{what} admin socket {}: {error}", path.display()))
    };
    // Bound under a name that nobody asks for, and moved when it is its owner's alone.
    let hidden = path.with_extension("new");
    let _ = std::fs::remove_file(&hidden); // Of a worker that died between the two.
    let listener = UnixListener::bind(&hidden).map_err(|error| told("binding the", error))?;
    let owner_only = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&hidden, owner_only).map_err(|error| told("protecting the", error))?;
    std::fs::rename(&hidden, path).map_err(|error| told("naming the", error))?;
    Ok(Bounded { listener, places: Arc::new(Semaphore::new(connections_max)), idle_max })
}

impl Listener for Bounded {
    type Io = Connection;
    type Addr = ();

    async fn accept(&mut self) -> (Connection, ()) {
        loop {
            let Ok(place) = self.places.clone().acquire_owned().await else {
                return std::future::pending().await; // The semaphore is never closed.
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let idle = Box::pin(tokio::time::sleep(self.idle_max));
                    let idle_max = self.idle_max;
                    return (Connection { stream, idle, idle_max, _place: place }, ());
                }
                Err(error) => {
                    tracing::warn!(%error, "admin: accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection that holds its place, and ends when nothing has moved on it for a while.
pub struct Connection {
    stream: UnixStream,
    idle: Pin<Box<Sleep>>,
    idle_max: Duration,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    /// Counts what moved, or looks at the clock.
    fn moved<T>(
        &mut self,
        polled: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.idle.as_mut().reset(Instant::now() + self.idle_max);
            return polled;
        }
        match self.idle.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.moved(polled, context)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.moved(polled, context)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
