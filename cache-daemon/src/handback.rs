//! The region's way back: when the whole sidecar has died, a runtime still maps the region, and its next
//! hello brings the descriptor along. A new supervisor takes it over, and host frames live on.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use kv_protocol::handshake::{HELLO_BYTES, Hello};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::shm::map;

/// A living runtime tries to attach twice a second: later, nobody has anything to hand back.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How long a peer may take from its connection to its hello.
const HELLO_TIMEOUT: Duration = Duration::from_millis(200);

/// Waits for a runtime that hands back a sealed region of `bytes`. The connection is closed without an
/// answer: the runtime tries again, and meets the worker.
pub fn wait(listener: &UnixListener, bytes: u64) -> Option<OwnedFd> {
    let begin = Instant::now();
    loop {
        let left = PATIENCE.checked_sub(begin.elapsed())?;
        let timeout = Timespec::try_from(left).ok()?;
        let mut polled = [PollFd::new(listener, PollFlags::IN)];
        match rustix::event::poll(&mut polled, Some(&timeout)) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(_) => continue, // A signal: `accept` would wait without an end.
        }
        let Ok((socket, _)) = listener.accept() else { continue };
        match receive(&socket) {
            Ok(Some(descriptor)) if map::is_region(&descriptor, bytes) => return Some(descriptor),
            Ok(Some(_)) => tracing::warn!("a descriptor handed back is not our sealed region"),
            Ok(None) => return None, // A runtime that is new itself: there is nothing to wait for.
            Err(error) => tracing::info!(%error, "a peer said no hello"),
        }
    }
}

/// A hello, and the descriptor that came with it.
fn receive(socket: &UnixStream) -> std::io::Result<Option<OwnedFd>> {
    socket.set_read_timeout(Some(HELLO_TIMEOUT))?;
    let mut bytes = [0; HELLO_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut io = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
    let received = rustix::net::recvmsg(socket, &mut io, &mut ancillary, flags)?;
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    if received.bytes < HELLO_BYTES {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Hello::decode(&bytes).map_err(std::io::Error::other)?;
    Ok(descriptor)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use kv_protocol::geometry::LayerSet;
    use kv_protocol::handshake::ClientToken;
    use kv_protocol::{Dtype, Fingerprint, Geometry};
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

    use super::*;

    const BYTES: u64 = 1 << 20;

    fn hello() -> [u8; HELLO_BYTES] {
        let hello = Hello {
            geometry: Geometry::new(16, 2, 1, 32, Dtype::F16, LayerSet::all(2)).unwrap(),
            fingerprint: Fingerprint([1; 32]),
            client: ClientToken([2; 16]),
            quiescent: true,
        };
        hello.encode()
    }

    /// What `wait` makes of peers that connect one after the other and say this.
    fn waited(peers: &[(&[u8], Option<&OwnedFd>)]) -> Option<OwnedFd> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut open = Vec::new();
        for (bytes, descriptor) in peers {
            let mut socket = UnixStream::connect(&path).unwrap();
            if let Some(descriptor) = descriptor {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                let descriptors = [descriptor.as_fd()];
                ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
                let io = [std::io::IoSlice::new(bytes)];
                rustix::net::sendmsg(&socket, &io, &mut ancillary, SendFlags::NOSIGNAL).unwrap();
            } else {
                socket.write_all(bytes).unwrap();
            }
            open.push(socket);
        }
        wait(&listener, BYTES)
    }

    #[test]
    fn a_sealed_region_is_taken_back_whoever_came_before() {
        let region = map::create(BYTES, None).unwrap();
        let other_size = map::create(2 * BYTES, None).unwrap();
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        let stranger = [7; HELLO_BYTES];
        let hello = hello();
        let peers: [(&[u8], _); 5] = [
            (&stranger, None),
            (&hello[..20], None),
            (&hello, Some(&other_size)),
            (&hello, Some(&file)),
            (&hello, Some(&region)),
        ];
        let taken = waited(&peers).unwrap();
        let inode = |descriptor: &OwnedFd| rustix::fs::fstat(descriptor).unwrap().st_ino;
        assert_eq!(inode(&taken), inode(&region));
    }

    #[test]
    fn a_new_runtime_ends_the_wait() {
        let region = map::create(BYTES, None).unwrap();
        assert!(waited(&[(&hello(), None), (&hello(), Some(&region))]).is_none());
    }

    #[test]
    fn an_unsealed_memory_is_not_taken() {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let unsealed = rustix::fs::memfd_create("unsealed", flags).unwrap();
        rustix::fs::ftruncate(&unsealed, BYTES).unwrap();
        assert!(waited(&[(&hello(), Some(&unsealed)), (&hello(), None)]).is_none());
    }
}
