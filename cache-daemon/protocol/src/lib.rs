//! What daemon and runtime share: the names of blocks, the layout of the shared region byte by byte,
//! the rings in it, the life of a frame, and the handshake. No files, no sockets, no threads, no async.
//!
//! Reading order: [`version`], [`geometry`], [`key`], [`header`], [`frame`], [`layout`], [`ring`],
//! [`message`], [`record`], [`handshake`]. The byte tables stand in docs/shared-memory.md.
//!
//! **Invariants**
//! - Only this crate knows byte offsets; daemon and runtime map memory and hand it over as a [`Mapping`].
//! - Whatever is read from the region may be nonsense: it is copied once, then checked; a check that
//!   fails is an error value, never a panic.
//! - Unsafe code is in [`region`] alone: everything above works on atomics and on copies.

mod bytes;
#[cfg(not(loom))]
pub mod doorbell;
pub mod frame;
pub mod geometry;
pub mod handshake;
pub mod header;
pub mod key;
pub mod layout;
pub mod message;
pub mod record;
#[cfg(not(loom))]
pub mod region;
pub mod ring;
pub mod start;
pub mod sync;
#[cfg(not(loom))]
pub mod table;
pub mod variant;
pub mod version;

#[cfg(not(loom))]
pub use doorbell::DoorbellWord;
pub use frame::{FrameIndex, FrameState, Generation};
pub use geometry::{Dtype, Geometry, GeometryError, KEncoding};
pub use header::{BlockHeader, HeaderError};
pub use key::{BlockKey, ConversationId, Event, Fingerprint, RootKey};
pub use layout::{AttachmentId, RegionLayout};
pub use message::{Completion, MissReason, Submission};
pub use record::Record;
#[cfg(not(loom))]
pub use region::{Mapping, Region, RegionError, Span};
pub use variant::{Accept, NumericsTag, Variant};
pub use version::LayoutVersion;
