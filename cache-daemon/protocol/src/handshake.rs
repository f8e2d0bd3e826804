//! The two messages of the Unix socket: [`Hello`] from the runtime, [`Welcome`] (with the region's
//! descriptor beside it) or a refusal from the daemon. After them the socket carries nothing: its end
//! says that the peer is gone.

use crate::geometry::{GEOMETRY_BYTES, Geometry, GeometryError};
use crate::key::{Fingerprint, KEY_BYTES};
use crate::layout::AttachmentId;
use crate::version::{LayoutVersion, UnknownVersion};

/// "CLQHELLO".
const HELLO_MAGIC: u64 = u64::from_le_bytes(*b"CLQHELLO");
/// "CLQWELCO".
const WELCOME_MAGIC: u64 = u64::from_le_bytes(*b"CLQWELCO");
/// Bytes of an encoded [`Hello`].
pub const HELLO_BYTES: usize = 128;
/// Bytes of an encoded answer.
pub const WELCOME_BYTES: usize = 64;

/// Drawn at random by each runtime process: tells the daemon who comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientToken(pub [u8; 16]);

/// What a runtime says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Shape of its blocks.
    pub geometry: Geometry,
    /// Its model.
    pub fingerprint: Fingerprint,
    /// Itself.
    pub client: ClientToken,
    /// No copy into or out of frames of an earlier attachment is running: they need no rest.
    pub quiescent: bool,
}

/// What the daemon answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Welcome {
    /// The runtime's place in the region.
    pub attachment: AttachmentId,
    /// Counts attachments in that place.
    pub incarnation: u32,
    /// Of the region; the descriptor must be as long.
    pub region_bytes: u64,
    /// Format of the region that the attachment is for.
    pub format_epoch: u64,
}

/// Why the daemon said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[repr(u32)]
#[non_exhaustive]
pub enum Refusal {
    /// The hello was none, or of another release.
    #[error("the daemon speaks another layout version: run daemon and runtime of one release")]
    Version = 1,
    /// Geometry that describes no block.
    #[error("the daemon does not accept this block geometry")]
    Geometry = 2,
    /// The region has another geometry and blocks of it are still in use; ask again.
    #[error("the region is formatted for another geometry that is still in use; trying again")]
    GeometryBusy = 3,
    /// All places are taken; ask again.
    #[error("all attachments of the region are taken; trying again")]
    Full = 4,
    /// Not one frame fits.
    #[error("the region is too small for one block of this model: raise cache.host.memory")]
    RegionTooSmall = 5,
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    Stopping = 6,
}

/// Why bytes on the socket are no hello or welcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// Not this protocol.
    #[error("handshake starts with {found:#018x}, expected {expected:#018x}: not a Colloquy peer")]
    Magic {
        /// Read.
        found: u64,
        /// Ours.
        expected: u64,
    },
    /// Another layout.
    #[error(transparent)]
    Version(#[from] UnknownVersion),
    /// Not a geometry.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// A code or number that stands for nothing.
    #[error("handshake has the impossible {field} {value}")]
    Value {
        /// Which.
        field: &'static str,
        /// Read.
        value: u64,
    },
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

fn check_start(bytes: &[u8], expected: u64) -> Result<(), HandshakeError> {
    let found = u64::from_le_bytes(part(bytes, 0));
    if found != expected {
        return Err(HandshakeError::Magic { found, expected });
    }
    LayoutVersion::check_current(u32::from_le_bytes(part(bytes, 8)))?;
    Ok(())
}

impl Hello {
    /// Bytes for the socket.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..8].copy_from_slice(&HELLO_MAGIC.to_le_bytes());
        bytes[8..12].copy_from_slice(&(LayoutVersion::CURRENT as u32).to_le_bytes());
        bytes[12] = u8::from(self.quiescent);
        bytes[16..32].copy_from_slice(&self.client.0);
        bytes[32..32 + GEOMETRY_BYTES].copy_from_slice(&self.geometry.encode());
        bytes[96..96 + KEY_BYTES].copy_from_slice(&self.fingerprint.0);
        bytes
    }

    /// Reads a hello.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, HandshakeError> {
        check_start(bytes, HELLO_MAGIC)?;
        Ok(Self {
            geometry: Geometry::decode(&part(bytes, 32))?,
            fingerprint: Fingerprint(part(bytes, 96)),
            client: ClientToken(part(bytes, 16)),
            quiescent: bytes[12] == 1,
        })
    }
}

/// Bytes for the socket.
pub fn encode_answer(answer: &Result<Welcome, Refusal>) -> [u8; WELCOME_BYTES] {
    let mut bytes = [0; WELCOME_BYTES];
    bytes[0..8].copy_from_slice(&WELCOME_MAGIC.to_le_bytes());
    bytes[8..12].copy_from_slice(&(LayoutVersion::CURRENT as u32).to_le_bytes());
    match answer {
        Err(refusal) => bytes[12..16].copy_from_slice(&(*refusal as u32).to_le_bytes()),
        Ok(welcome) => {
            let place = welcome.attachment.index() as u32;
            bytes[16..20].copy_from_slice(&place.to_le_bytes());
            bytes[20..24].copy_from_slice(&welcome.incarnation.to_le_bytes());
            bytes[24..32].copy_from_slice(&welcome.region_bytes.to_le_bytes());
            bytes[32..40].copy_from_slice(&welcome.format_epoch.to_le_bytes());
        }
    }
    bytes
}

/// Reads the daemon's answer.
pub fn decode_answer(
    bytes: &[u8; WELCOME_BYTES],
) -> Result<Result<Welcome, Refusal>, HandshakeError> {
    check_start(bytes, WELCOME_MAGIC)?;
    let refusal = match u32::from_le_bytes(part(bytes, 12)) {
        0 => {
            let place = u32::from_le_bytes(part(bytes, 16));
            let attachment = AttachmentId::new(place)
                .ok_or(HandshakeError::Value { field: "attachment", value: place.into() })?;
            return Ok(Ok(Welcome {
                attachment,
                incarnation: u32::from_le_bytes(part(bytes, 20)),
                region_bytes: u64::from_le_bytes(part(bytes, 24)),
                format_epoch: u64::from_le_bytes(part(bytes, 32)),
            }));
        }
        1 => Refusal::Version,
        2 => Refusal::Geometry,
        3 => Refusal::GeometryBusy,
        4 => Refusal::Full,
        5 => Refusal::RegionTooSmall,
        6 => Refusal::Stopping,
        code => return Err(HandshakeError::Value { field: "refusal", value: code.into() }),
    };
    Ok(Err(refusal))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Dtype, LayerSet};
    use proptest::prelude::*;

    #[test]
    fn a_hello_reads_back() {
        let hello = Hello {
            geometry: Geometry::new(64, 30, 3, 64, Dtype::F16, LayerSet::all(30)).unwrap(),
            fingerprint: Fingerprint([4; KEY_BYTES]),
            client: ClientToken([5; 16]),
            quiescent: true,
        };
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }

    #[test]
    fn answers_read_back() {
        let welcome = Welcome {
            attachment: AttachmentId::new(2).unwrap(),
            incarnation: 7,
            region_bytes: 1 << 30,
            format_epoch: 3,
        };
        for answer in [Ok(welcome), Err(Refusal::Full), Err(Refusal::Stopping)] {
            assert_eq!(decode_answer(&encode_answer(&answer)), Ok(answer));
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(seed: u8, mut bytes in proptest::collection::vec(any::<u8>(), HELLO_BYTES)) {
            if seed % 2 == 0 {
                bytes[0..8].copy_from_slice(&HELLO_MAGIC.to_le_bytes());
                bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
            }
            let _ = Hello::decode(&part(&bytes, 0));
            if seed % 2 == 0 {
                bytes[0..8].copy_from_slice(&WELCOME_MAGIC.to_le_bytes());
                bytes[12..16].copy_from_slice(&u32::from(seed % 8).to_le_bytes());
            }
            let _ = decode_answer(&part(&bytes, 0));
        }
    }
}
