//! Where everything lies in the region: offsets computed from the region's size and the geometry alone,
//! so that both sides get the same numbers without reading one from shared memory.
//!
//! ```text
//! 0            region header            (4 KiB)
//! 4 KiB        attachment areas         (ATTACHMENTS_MAX × [control · rings · credits · arenas])
//!              frame table              (64 B a frame: word, taken, pins)
//!              block headers            (one a frame)
//!              frames                   (payload only, 4,096-aligned)
//! ```

use crate::geometry::{FRAME_ALIGNMENT, GEOMETRY_BYTES, Geometry};
use crate::header::BlockHeader;
use crate::key::KEY_BYTES;

/// "CLQKVREG" as little-endian bytes; written last by the daemon, so a region with it is formatted.
pub const MAGIC: u64 = u64::from_le_bytes(*b"CLQKVREG");
/// Runtimes that may be attached at once: one that serves, one that still rests after its death, and
/// two for tools and tests.
pub const ATTACHMENTS_MAX: usize = 4;
/// Bytes of the region header, and of an attachment's control page.
pub const PAGE_BYTES: u64 = 4096;
/// Entries of a submission ring. A waiting sequence needs a lookup, an end and some hints; pins are
/// returned in bursts of one a block.
pub const SUBMISSION_ENTRIES: u32 = 1024;
/// Entries of a completion ring: each submission is answered at most once, and promotes come beside.
pub const COMPLETION_ENTRIES: u32 = 2 * SUBMISSION_ENTRIES;
/// Credits that a runtime can hold: far more than one step fills.
pub const CREDIT_ENTRIES: u32 = 256;
/// Bytes of an entry of the two message rings.
pub const ENTRY_BYTES: u64 = 64;
/// Bytes of a credit.
pub const CREDIT_BYTES: u64 = 8;
/// Bytes of each of the two arenas of an attachment: key lists and records on their way.
pub const ARENA_BYTES: u64 = 512 << 10;
/// Longest key list: 4,096 blocks of 64 tokens are 262,144 tokens.
pub const SEQUENCE_KEYS_MAX: u32 = 4096;
/// Longest conversation record.
pub const CONVERSATION_RECORD_BYTES_MAX: u32 = 256 << 10;
/// Bytes of a frame's table entry: one cache line, no false sharing.
pub const FRAME_ENTRY_BYTES: u64 = 64;

const _: () = {
    assert!(SUBMISSION_ENTRIES.is_power_of_two()); // Index by mask.
    assert!(COMPLETION_ENTRIES.is_power_of_two());
    assert!(CREDIT_ENTRIES.is_power_of_two());
    // The longest list and the longest record fit an arena, with room for a second one behind.
    assert!(2 * CONVERSATION_RECORD_BYTES_MAX as u64 <= ARENA_BYTES);
    assert!(2 * (SEQUENCE_KEYS_MAX as u64 * KEY_BYTES as u64 + 4096) <= ARENA_BYTES);
    assert!(16 * (SEQUENCE_KEYS_MAX as u64 + 1) <= ARENA_BYTES); // A lookup's answer.
};

/// Byte offsets in the region header.
pub mod region_header {
    use super::{GEOMETRY_BYTES, KEY_BYTES, PAGE_BYTES};

    /// u64: [`super::MAGIC`].
    pub const MAGIC: u64 = 0;
    /// u32: [`crate::LayoutVersion`].
    pub const VERSION: u64 = 8;
    /// u64: bytes of the region.
    pub const REGION_BYTES: u64 = 16;
    /// u64: counts formats; a handle of an older format is stale.
    pub const FORMAT_EPOCH: u64 = 24;
    /// [`crate::Geometry`], encoded.
    pub const GEOMETRY: u64 = 32;
    /// Fingerprint of the model that attached last.
    pub const FINGERPRINT: u64 = GEOMETRY + GEOMETRY_BYTES as u64;
    /// u32: frames in the table.
    pub const FRAME_COUNT: u64 = FINGERPRINT + KEY_BYTES as u64;
    /// u64: bytes faulted so far, from the region's start.
    pub const FAULTED_BYTES: u64 = 136;
    /// u64: starts of a worker on this region.
    pub const WORKER_STARTS: u64 = 144;
    /// The daemon's doorbell word, alone in its cache line.
    pub const DOORBELL: u64 = 192;
    const _: () = assert!(FRAME_COUNT == 128 && DOORBELL + 64 <= PAGE_BYTES);
}

/// Byte offsets in an attachment's control page; each index word alone in its cache line.
pub mod control {
    use super::PAGE_BYTES;

    /// u32: 0 vacant, 1 live, 2 resting (its peer is gone, its copies may not be).
    pub const STATE: u64 = 0;
    /// u32: counts attachments in this place.
    pub const INCARNATION: u64 = 4;
    /// 16 bytes: drawn by the client process at its start; the same after a re-attach.
    pub const CLIENT: u64 = 8;
    /// The runtime's doorbell word.
    pub const DOORBELL: u64 = 64;
    /// u32, consumer's.
    pub const SUBMISSION_HEAD: u64 = 128;
    /// u32, producer's.
    pub const SUBMISSION_TAIL: u64 = 192;
    /// u32, consumer's.
    pub const COMPLETION_HEAD: u64 = 256;
    /// u32, producer's.
    pub const COMPLETION_TAIL: u64 = 320;
    /// u32, consumer's.
    pub const CREDIT_HEAD: u64 = 384;
    /// u32, producer's.
    pub const CREDIT_TAIL: u64 = 448;
    /// u32: hints that found the ring full; written by the runtime.
    pub const HINTS_DROPPED: u64 = 512;
    const _: () = assert!(HINTS_DROPPED + 64 <= PAGE_BYTES);
}

/// Byte offsets in a frame's table entry.
pub mod frame_entry {
    use super::{ATTACHMENTS_MAX, FRAME_ENTRY_BYTES};

    /// u64: [`crate::frame::FrameWord`]; written by the daemon alone.
    pub const WORD: u64 = 0;
    /// u32: generation whose filling has begun; written by the frame's owner.
    pub const TAKEN: u64 = 8;
    /// u32 an attachment: pins; written by the daemon alone.
    pub const PINS: u64 = 16;
    const _: () = assert!(PINS + 4 * ATTACHMENTS_MAX as u64 <= FRAME_ENTRY_BYTES);
}

/// Place of an attachment; below [`ATTACHMENTS_MAX`] by construction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AttachmentId(u8);

impl AttachmentId {
    /// `None` if there is no such place.
    pub fn new(index: u32) -> Option<Self> {
        ((index as usize) < ATTACHMENTS_MAX).then_some(Self(index as u8))
    }

    /// All places.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..ATTACHMENTS_MAX as u8).map(Self)
    }

    /// As a number.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// As written into frame words.
    pub fn code(self) -> u8 {
        self.0
    }
}

/// Offsets of one attachment's area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttachmentLayout {
    /// Control page.
    pub control: u64,
    /// Runtime → daemon.
    pub submissions: u64,
    /// Daemon → runtime.
    pub completions: u64,
    /// Daemon → runtime: free frames.
    pub credits: u64,
    /// Written by the runtime.
    pub submission_arena: u64,
    /// Written by the daemon.
    pub completion_arena: u64,
}

const SUBMISSIONS_AT: u64 = PAGE_BYTES;
const COMPLETIONS_AT: u64 = SUBMISSIONS_AT + SUBMISSION_ENTRIES as u64 * ENTRY_BYTES;
const CREDITS_AT: u64 = COMPLETIONS_AT + COMPLETION_ENTRIES as u64 * ENTRY_BYTES;
const SUBMISSION_ARENA_AT: u64 =
    (CREDITS_AT + CREDIT_ENTRIES as u64 * CREDIT_BYTES).next_multiple_of(PAGE_BYTES);
const COMPLETION_ARENA_AT: u64 = SUBMISSION_ARENA_AT + ARENA_BYTES;
/// Bytes of an attachment's area.
pub const ATTACHMENT_BYTES: u64 = COMPLETION_ARENA_AT + ARENA_BYTES;
/// First byte behind the attachment areas: the frame table.
pub const FRAME_TABLE_AT: u64 = PAGE_BYTES + ATTACHMENTS_MAX as u64 * ATTACHMENT_BYTES;
const _: () = assert!(ATTACHMENT_BYTES.is_multiple_of(PAGE_BYTES));

impl AttachmentLayout {
    /// Of one place; the same under every geometry.
    pub fn of(id: AttachmentId) -> Self {
        let base = PAGE_BYTES + id.index() as u64 * ATTACHMENT_BYTES;
        Self {
            control: base,
            submissions: base + SUBMISSIONS_AT,
            completions: base + COMPLETIONS_AT,
            credits: base + CREDITS_AT,
            submission_arena: base + SUBMISSION_ARENA_AT,
            completion_arena: base + COMPLETION_ARENA_AT,
        }
    }
}

/// Why a region cannot hold a geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a region of {region_bytes} bytes holds no frame of {frame_bytes} bytes beside {fixed_bytes} bytes \
     of rings and tables; give the daemon more memory (--host-bytes)"
)]
pub struct RegionTooSmall {
    /// Of the region.
    pub region_bytes: u64,
    /// Of one frame.
    pub frame_bytes: u64,
    /// Of header and attachment areas.
    pub fixed_bytes: u64,
}

/// Offsets that depend on the geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionLayout {
    geometry: Geometry,
    region_bytes: u64,
    frame_count: u32,
    headers_at: u64,
    frames_at: u64,
}

impl RegionLayout {
    /// As many frames as the region's bytes allow, at least one.
    pub fn new(region_bytes: u64, geometry: Geometry) -> Result<Self, RegionTooSmall> {
        let header_bytes = BlockHeader::bytes(&geometry) as u64;
        let frame_bytes = geometry.frame_bytes();
        let room = region_bytes.saturating_sub(FRAME_TABLE_AT + FRAME_ALIGNMENT);
        let count = room / (FRAME_ENTRY_BYTES + header_bytes + frame_bytes);
        if count == 0 {
            let fixed_bytes = FRAME_TABLE_AT + FRAME_ALIGNMENT;
            return Err(RegionTooSmall { region_bytes, frame_bytes, fixed_bytes });
        }
        let frame_count = u32::try_from(count).unwrap_or(u32::MAX);
        let headers_at = FRAME_TABLE_AT + u64::from(frame_count) * FRAME_ENTRY_BYTES;
        let frames_at =
            (headers_at + u64::from(frame_count) * header_bytes).next_multiple_of(FRAME_ALIGNMENT);
        let layout = Self { geometry, region_bytes, frame_count, headers_at, frames_at };
        assert!(frames_at + u64::from(frame_count) * frame_bytes <= region_bytes);
        Ok(layout)
    }

    /// Shape of the frames.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Of the whole region.
    pub fn region_bytes(&self) -> u64 {
        self.region_bytes
    }

    /// Frames in the table.
    pub fn frame_count(&self) -> u32 {
        self.frame_count
    }

    /// Table entry of a frame.
    pub fn frame_entry(&self, frame: crate::FrameIndex) -> u64 {
        assert!(frame.0 < self.frame_count, "frame {} of {}", frame.0, self.frame_count);
        FRAME_TABLE_AT + u64::from(frame.0) * FRAME_ENTRY_BYTES
    }

    /// Header of a frame.
    pub fn header(&self, frame: crate::FrameIndex) -> u64 {
        assert!(frame.0 < self.frame_count, "frame {} of {}", frame.0, self.frame_count);
        self.headers_at + u64::from(frame.0) * BlockHeader::bytes(&self.geometry) as u64
    }

    /// Payload of a frame.
    pub fn frame(&self, frame: crate::FrameIndex) -> u64 {
        assert!(frame.0 < self.frame_count, "frame {} of {}", frame.0, self.frame_count);
        self.frames_at + u64::from(frame.0) * self.geometry.frame_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FrameIndex;
    use crate::geometry::{Dtype, LayerSet};

    #[test]
    fn parts_of_a_region_do_not_overlap_and_frames_are_aligned() {
        for (tokens, layers, mib) in [(64, 30, 64), (16, 2, 8), (256, 200, 900), (1, 1, 6)] {
            let geometry =
                Geometry::new(tokens, layers, 3, 64, Dtype::F16, LayerSet::all(layers)).unwrap();
            let layout = RegionLayout::new(mib << 20, geometry).unwrap();
            let last = FrameIndex(layout.frame_count() - 1);
            assert!(layout.frame_entry(last) + FRAME_ENTRY_BYTES <= layout.header(FrameIndex(0)));
            let header_bytes = BlockHeader::bytes(&geometry) as u64;
            assert!(layout.header(last) + header_bytes <= layout.frame(FrameIndex(0)));
            assert!(layout.frame(last) + geometry.frame_bytes() <= mib << 20);
            assert_eq!(layout.frame(last) % FRAME_ALIGNMENT, 0);
        }
    }

    #[test]
    fn a_region_too_small_for_one_frame_is_refused_with_both_sizes() {
        let geometry = Geometry::new(64, 30, 3, 64, Dtype::F16, LayerSet::all(30)).unwrap();
        let refused = RegionLayout::new(5 << 20, geometry).unwrap_err();
        assert_eq!(refused.frame_bytes, geometry.frame_bytes());
    }

    #[test]
    fn attachment_areas_lie_between_header_and_frame_table() {
        let areas: Vec<_> = AttachmentId::all().map(AttachmentLayout::of).collect();
        assert_eq!(areas[0].control, PAGE_BYTES);
        assert_eq!(areas[3].completion_arena + ARENA_BYTES, FRAME_TABLE_AT);
        assert!(AttachmentId::new(ATTACHMENTS_MAX as u32).is_none());
    }
}
