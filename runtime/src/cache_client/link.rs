//! The link to the daemon: a thread that connects, shakes hands, maps the region, waits for the
//! socket's end, and begins again. Nothing here runs on the engine thread.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use kv_protocol::handshake::{
    ClientToken, HandshakeError, Hello, Refusal, WELCOME_BYTES, Welcome, decode_answer,
};
use kv_protocol::table::{FormatError, RegionView};
use kv_protocol::{Fingerprint, Geometry, Mapping, Region, RegionError};
use rustix::fs::SealFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::bell::Waker;
use super::frames::AttachmentLife;

/// First pause after a failed attach; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(5);
/// A daemon that comes back is found within this.
const RETRY_MAX: Duration = Duration::from_millis(500);
/// How long a daemon may take to answer the handshake.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a re-attach waits for copies of the old attachment to end; after it the daemon lets their
/// frames rest instead.
const QUIESCENCE_MAX: Duration = Duration::from_secs(1);

/// Where the daemon is, and what blocks look like.
#[derive(Debug, Clone)]
pub struct CacheConfig {
    /// The daemon's Unix socket.
    pub socket: PathBuf,
    /// Shape of this model's blocks.
    pub geometry: Geometry,
    /// The model.
    pub fingerprint: Fingerprint,
}

/// Why an attach failed; logged, and tried again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Socket, or descriptor.
    #[error("cache daemon at {socket}: {source}")]
    Io {
        /// Where.
        socket: PathBuf,
        /// What.
        source: std::io::Error,
    },
    /// The answer is none.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The daemon said no.
    #[error("cache daemon refused: {0}")]
    Refused(#[from] Refusal),
    /// No descriptor came with the answer, or one that could be cut short under us.
    #[error("the region's descriptor is {0}")]
    Descriptor(&'static str),
    /// Memory that is no region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// A region that is not what the daemon said.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Formatted for another model.
    #[error("the region is formatted for {region}, this runtime has {ours}")]
    Geometry {
        /// Found.
        region: Box<Geometry>,
        /// Ours.
        ours: Box<Geometry>,
    },
}

/// A fresh attachment, for the engine thread.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) view: RegionView,
    pub(super) welcome: Welcome,
    pub(super) life: Arc<AttachmentLife>,
    /// Closing it detaches.
    pub(super) socket: UnixStream,
}

/// What the link tells the engine thread.
#[derive(Debug)]
pub(super) enum LinkEvent {
    Attached(Box<Attached>),
    /// The attachment announced last is over.
    Gone,
}

/// A running link; dropping it ends the thread soon (it is not joined: it may sit in a system call).
#[derive(Debug)]
pub(super) struct Link {
    /// Dropped to stop.
    _stop: Sender<()>,
    socket: Arc<Mutex<Option<UnixStream>>>,
}

impl Link {
    pub(super) fn spawn(
        config: CacheConfig,
        waker: Waker,
        events: SyncSender<LinkEvent>,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = std::sync::mpsc::channel();
        let socket = Arc::new(Mutex::new(None));
        let mut worker = Worker {
            config,
            client: ClientToken(*uuid::Uuid::new_v4().as_bytes()),
            waker,
            events,
            stopped,
            socket: socket.clone(),
            mapped: None,
            previous: Weak::new(),
        };
        std::thread::Builder::new().name("cache-link".into()).spawn(move || worker.run())?;
        Ok(Self { _stop: stop, socket })
    }

    /// Ends the present attachment: the thread sees the socket's end and attaches anew.
    pub(super) fn hang_up(&self) {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(socket) = socket.as_ref() {
            let _ = socket.shutdown(std::net::Shutdown::Both); // Already gone is as good.
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.hang_up();
    }
}

struct Mapped {
    file: File,
    /// Device and inode.
    identity: (u64, u64),
    region: Region,
}

struct Worker {
    config: CacheConfig,
    client: ClientToken,
    waker: Waker,
    events: SyncSender<LinkEvent>,
    stopped: Receiver<()>,
    socket: Arc<Mutex<Option<UnixStream>>>,
    /// The region mapped last: a worker that restarts passes the same memory again, and a supervisor
    /// that restarts gets it back from here.
    mapped: Option<Mapped>,
    previous: Weak<AttachmentLife>,
}

impl Worker {
    fn run(&mut self) {
        let mut pause = RETRY_MIN;
        let mut told: Option<String> = None;
        loop {
            match self.attach() {
                Ok(attached) => {
                    tracing::info!(
                        attachment = attached.welcome.attachment.index(),
                        "cache attached"
                    );
                    (pause, told) = (RETRY_MIN, None);
                    if !self.serve(attached) {
                        return;
                    }
                    tracing::info!("cache detached");
                }
                Err(error) => {
                    let text = error.to_string();
                    if told.as_ref() != Some(&text) {
                        tracing::warn!(%error, "no cache for now; requests are computed in full");
                        told = Some(text);
                    }
                    if !self.pause(pause) {
                        return;
                    }
                    pause = (2 * pause).min(RETRY_MAX);
                }
            }
        }
    }

    /// `false` when the client is gone.
    fn pause(&self, length: Duration) -> bool {
        matches!(self.stopped.recv_timeout(length), Err(RecvTimeoutError::Timeout))
    }

    fn attach(&mut self) -> Result<Attached, AttachError> {
        let path = self.config.socket.clone();
        let io = |source| AttachError::Io { socket: path.clone(), source };
        let mut socket = UnixStream::connect(&path).map_err(io)?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(io)?;
        let hello = Hello {
            geometry: self.config.geometry,
            fingerprint: self.config.fingerprint,
            client: self.client,
            quiescent: self.previous.strong_count() == 0,
        };
        send_hello(&socket, &hello, self.mapped.as_ref().map(|mapped| &mapped.file)).map_err(io)?;
        let (welcome, descriptor) = receive_welcome(&mut socket, &path)?;
        let region = self.map(descriptor, &welcome, &path)?;
        let view = RegionView::new(region);
        let table = view.table()?;
        if *table.geometry() != self.config.geometry {
            return Err(AttachError::Geometry {
                region: Box::new(*table.geometry()),
                ours: Box::new(self.config.geometry),
            });
        }
        socket.set_read_timeout(None).map_err(io)?;
        let life = AttachmentLife::new(table);
        Ok(Attached { view, welcome, life, socket })
    }

    /// Maps the region, or finds that it is mapped.
    fn map(
        &mut self,
        descriptor: OwnedFd,
        welcome: &Welcome,
        path: &std::path::Path,
    ) -> Result<Region, AttachError> {
        let io = |source| AttachError::Io { socket: path.to_owned(), source };
        let seals = rustix::fs::fcntl_get_seals(&descriptor).map_err(|errno| io(errno.into()))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(AttachError::Descriptor("not sealed against shrinking"));
        }
        let file = File::from(descriptor);
        let metadata = file.metadata().map_err(io)?;
        if metadata.len() != welcome.region_bytes {
            return Err(AttachError::Descriptor("not as long as the daemon said"));
        }
        let identity = {
            use std::os::unix::fs::MetadataExt;
            (metadata.dev(), metadata.ino())
        };
        if let Some(mapped) = &self.mapped
            && mapped.identity == identity
            && mapped.region.bytes() == welcome.region_bytes
        {
            return Ok(mapped.region.clone());
        }
        let region = Region::new(Arc::new(SharedMap::new(&file).map_err(io)?))?;
        self.mapped = Some(Mapped { file, identity, region: region.clone() });
        Ok(region)
    }

    /// Announces an attachment and waits for its end; `false` when the client is gone.
    fn serve(&mut self, attached: Attached) -> bool {
        let Ok(mut socket) = attached.socket.try_clone() else { return true };
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) =
            attached.socket.try_clone().ok();
        self.previous = Arc::downgrade(&attached.life);
        self.waker.switch(attached.view.clone(), attached.welcome.attachment);
        if self.events.send(LinkEvent::Attached(Box::new(attached))).is_err() {
            return false;
        }
        self.waker.ring();
        // The daemon never writes: whatever comes, end or nonsense, is the end.
        let mut byte = [0];
        while matches!(socket.read(&mut byte), Err(error) if error.kind() == std::io::ErrorKind::Interrupted)
        {
        }
        let _ = socket.shutdown(std::net::Shutdown::Both);
        if self.events.send(LinkEvent::Gone).is_err() {
            return false;
        }
        self.waker.ring();
        // The engine lets go of its spans; then no copy can be running and nothing needs to rest.
        let begin = Instant::now();
        while self.previous.strong_count() > 0 && begin.elapsed() < QUIESCENCE_MAX {
            if !self.pause(Duration::from_millis(1)) {
                return false;
            }
        }
        true
    }
}

/// Says hello. The region mapped last goes along: only a supervisor that has lost its own takes it.
fn send_hello(socket: &UnixStream, hello: &Hello, region: Option<&File>) -> std::io::Result<()> {
    let bytes = hello.encode();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = region.into_iter().map(AsFd::as_fd).collect();
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let io = [std::io::IoSlice::new(&bytes)];
    let sent = rustix::net::sendmsg(socket, &io, &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent == bytes.len() { Ok(()) } else { Err(std::io::Error::other("hello cut short")) }
}

fn receive_welcome(
    socket: &mut UnixStream,
    path: &std::path::Path,
) -> Result<(Welcome, OwnedFd), AttachError> {
    let io = |source| AttachError::Io { socket: path.to_owned(), source };
    let mut bytes = [0; WELCOME_BYTES];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        &*socket,
        &mut [std::io::IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .map_err(|errno| io(errno.into()))?;
    let mut descriptor = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            descriptor = descriptors.into_iter().next();
        }
    }
    socket.read_exact(&mut bytes[received.bytes..]).map_err(io)?;
    let welcome = decode_answer(&bytes)??;
    let descriptor = descriptor.ok_or(AttachError::Descriptor("missing"))?;
    Ok((welcome, descriptor))
}

/// The region, mapped shared. Unsafe is the promise of [`Mapping`], nothing else.
#[derive(Debug)]
struct SharedMap(memmap2::MmapRaw);

impl SharedMap {
    fn new(file: &File) -> std::io::Result<Self> {
        memmap2::MmapOptions::new().map_raw(file).map(Self)
    }
}

// SAFETY: an `MmapRaw` is page aligned, readable, writable and stays at its address until dropped. All
// its bytes are backed: the length is the file's at mapping time, and the file is sealed against
// shrinking (checked in `Worker::map` before this is made). Nothing else in this process refers to
// the bytes: the map is private to this type.
unsafe impl Mapping for SharedMap {
    fn base(&self) -> *mut u8 {
        self.0.as_mut_ptr()
    }

    fn bytes(&self) -> usize {
        self.0.len()
    }
}
