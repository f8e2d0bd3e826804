//! The region as both sides see it: header fields, frame table, rings of an attachment.
//!
//! A thin view; each field's writer is named in [`crate::layout`].

use crate::doorbell::DoorbellWord;
use crate::frame::{FrameError, FrameIndex, FrameState, FrameWord, Generation, Owner};
use crate::geometry::{GEOMETRY_BYTES, Geometry, GeometryError};
use crate::handshake::ClientToken;
use crate::header::{BlockHeader, HeaderError, HeaderView};
use crate::key::{Fingerprint, KEY_BYTES};
use crate::layout::{
    ARENA_BYTES, ATTACHMENTS_MAX, AttachmentId, AttachmentLayout, COMPLETION_ENTRIES,
    CREDIT_ENTRIES, MAGIC, RegionLayout, RegionTooSmall, SUBMISSION_ENTRIES, control, frame_entry,
    region_header,
};
use crate::message::{ArenaSpan, FrameHandle};
use crate::region::{Region, Span};
use crate::ring::Ring;
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::version::{LayoutVersion, UnknownVersion};

/// Why a region's header cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// No magic: not formatted yet.
    #[error("the region is not formatted (magic {found:#018x})")]
    Unformatted {
        /// Read.
        found: u64,
    },
    /// Another layout.
    #[error(transparent)]
    Version(#[from] UnknownVersion),
    /// Not a geometry.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// Not one frame fits.
    #[error(transparent)]
    TooSmall(#[from] RegionTooSmall),
    /// A field that does not follow from the others.
    #[error("the region's header says {field} is {found}, expected {expected}")]
    Field {
        /// Which.
        field: &'static str,
        /// Read.
        found: u64,
        /// From size and geometry.
        expected: u64,
    },
}

/// Life of an attachment's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachmentState {
    /// Nobody's.
    Vacant = 0,
    /// A runtime's.
    Live = 1,
    /// Its runtime is gone, or the daemon was: frames rest for a grace period.
    Resting = 2,
}

/// The parts of a region that are there under every geometry.
#[derive(Debug, Clone)]
pub struct RegionView {
    region: Region,
}

impl RegionView {
    /// Over mapped memory, formatted or not.
    pub fn new(region: Region) -> Self {
        Self { region }
    }

    /// The memory.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// The daemon's doorbell.
    pub fn daemon_doorbell(&self) -> DoorbellWord<'_> {
        self.doorbell_at(region_header::DOORBELL)
    }

    /// An attachment's doorbell.
    pub fn doorbell(&self, id: AttachmentId) -> DoorbellWord<'_> {
        self.doorbell_at(AttachmentLayout::of(id).control + control::DOORBELL)
    }

    fn doorbell_at(&self, offset: u64) -> DoorbellWord<'_> {
        DoorbellWord {
            rings: self.region.atomic_u32(offset),
            waiting: self.region.atomic_u32(offset + 4),
        }
    }

    /// Runtime → daemon.
    pub fn submissions(&self, id: AttachmentId) -> Ring<'_, 8> {
        let area = AttachmentLayout::of(id);
        let (head, tail) = (control::SUBMISSION_HEAD, control::SUBMISSION_TAIL);
        self.ring(area.control + head, area.control + tail, area.submissions, SUBMISSION_ENTRIES)
    }

    /// Daemon → runtime.
    pub fn completions(&self, id: AttachmentId) -> Ring<'_, 8> {
        let area = AttachmentLayout::of(id);
        let (head, tail) = (control::COMPLETION_HEAD, control::COMPLETION_TAIL);
        self.ring(area.control + head, area.control + tail, area.completions, COMPLETION_ENTRIES)
    }

    /// Daemon → runtime: free frames.
    pub fn credits(&self, id: AttachmentId) -> Ring<'_, 1> {
        let area = AttachmentLayout::of(id);
        let (head, tail) = (control::CREDIT_HEAD, control::CREDIT_TAIL);
        self.ring(area.control + head, area.control + tail, area.credits, CREDIT_ENTRIES)
    }

    fn ring<const W: usize>(&self, head: u64, tail: u64, at: u64, entries: u32) -> Ring<'_, W> {
        Ring {
            head: self.region.atomic_u32(head),
            tail: self.region.atomic_u32(tail),
            words: self.region.atomics(at, W * entries as usize),
        }
    }

    /// A private copy of bytes that a submission names.
    pub fn submission_bytes(&self, id: AttachmentId, span: ArenaSpan) -> Vec<u8> {
        let at = AttachmentLayout::of(id).submission_arena + span.offset();
        self.region.read(at, span.bytes())
    }

    /// A private copy of bytes that a completion names.
    pub fn completion_bytes(&self, id: AttachmentId, span: ArenaSpan) -> Vec<u8> {
        let at = AttachmentLayout::of(id).completion_arena + span.offset();
        self.region.read(at, span.bytes())
    }

    /// Writes into the submission arena; the caller's arena writer handed out the offset.
    pub fn write_submission_bytes(&self, id: AttachmentId, offset: u32, bytes: &[u8]) {
        assert!(u64::from(offset) + bytes.len() as u64 <= ARENA_BYTES);
        let at = AttachmentLayout::of(id).submission_arena + u64::from(offset);
        self.region.copy_in(at, bytes);
    }

    /// Writes into the completion arena; the caller's arena writer handed out the offset.
    pub fn write_completion_bytes(&self, id: AttachmentId, offset: u32, bytes: &[u8]) {
        assert!(u64::from(offset) + bytes.len() as u64 <= ARENA_BYTES);
        let at = AttachmentLayout::of(id).completion_arena + u64::from(offset);
        self.region.copy_in(at, bytes);
    }

    /// State of an attachment's place; an unknown number rests, the careful choice.
    pub fn attachment_state(&self, id: AttachmentId) -> AttachmentState {
        match self.control_u32(id, control::STATE).load(Ordering::Acquire) {
            0 => AttachmentState::Vacant,
            1 => AttachmentState::Live,
            _ => AttachmentState::Resting,
        }
    }

    /// Written by the daemon.
    pub fn set_attachment_state(&self, id: AttachmentId, state: AttachmentState) {
        self.control_u32(id, control::STATE).store(state as u32, Ordering::Release);
    }

    /// Whose place it is, or was last.
    pub fn client(&self, id: AttachmentId) -> ClientToken {
        let mut token = [0; 16];
        self.region.copy_out(AttachmentLayout::of(id).control + control::CLIENT, &mut token);
        ClientToken(token)
    }

    /// Makes a place ready for a runtime: rings empty, doorbell quiet, incarnation raised.
    pub fn open_attachment(&self, id: AttachmentId, client: ClientToken) -> u32 {
        self.submissions(id).reset();
        self.completions(id).reset();
        self.credits(id).reset();
        self.hints_dropped(id).store(0, Ordering::Relaxed);
        self.region.copy_in(AttachmentLayout::of(id).control + control::CLIENT, &client.0);
        let incarnation = self.control_u32(id, control::INCARNATION);
        let next = incarnation.load(Ordering::Relaxed).wrapping_add(1);
        incarnation.store(next, Ordering::Relaxed);
        self.set_attachment_state(id, AttachmentState::Live);
        next
    }

    /// Hints that found the ring full.
    pub fn hints_dropped(&self, id: AttachmentId) -> &AtomicU32 {
        self.control_u32(id, control::HINTS_DROPPED)
    }

    fn control_u32(&self, id: AttachmentId, offset: u64) -> &AtomicU32 {
        self.region.atomic_u32(AttachmentLayout::of(id).control + offset)
    }

    /// Formats of this region so far.
    pub fn format_epoch(&self) -> u64 {
        self.region.atomic_u64(region_header::FORMAT_EPOCH).load(Ordering::Acquire)
    }

    /// Starts of a worker on this region.
    pub fn worker_starts(&self) -> &AtomicU64 {
        self.region.atomic_u64(region_header::WORKER_STARTS)
    }

    /// Bytes faulted so far.
    pub fn faulted_bytes(&self) -> &AtomicU64 {
        self.region.atomic_u64(region_header::FAULTED_BYTES)
    }

    /// Fingerprint of the model that attached last.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut bytes = [0; KEY_BYTES];
        self.region.copy_out(region_header::FINGERPRINT, &mut bytes);
        Fingerprint(bytes)
    }

    /// Written by the daemon at attach.
    pub fn set_fingerprint(&self, fingerprint: &Fingerprint) {
        self.region.copy_in(region_header::FINGERPRINT, &fingerprint.0);
    }

    /// Writes frame table and header for a geometry. Order matters: (1) the magic goes first, so a
    /// death in between leaves an unformatted region; (2) all frames become free; (3) the header's
    /// fields; (4) the magic, last.
    pub fn format(&self, geometry: Geometry) -> Result<FrameTable, RegionTooSmall> {
        let layout = RegionLayout::new(self.region.bytes(), geometry)?;
        let header_u64 = |at| self.region.atomic_u64(at);
        header_u64(region_header::MAGIC).store(0, Ordering::SeqCst); // Before everything below.
        let table = FrameTable { region: self.region.clone(), layout };
        for frame in table.frames() {
            FrameWord::reset(table.word(frame));
            table.taken(frame).store(0, Ordering::Relaxed);
            for id in AttachmentId::all() {
                table.pins(frame, id).store(0, Ordering::Relaxed);
            }
        }
        self.region
            .atomic_u32(region_header::VERSION)
            .store(LayoutVersion::CURRENT as u32, Ordering::Relaxed);
        header_u64(region_header::REGION_BYTES).store(self.region.bytes(), Ordering::Relaxed);
        header_u64(region_header::FORMAT_EPOCH).fetch_add(1, Ordering::Relaxed);
        self.region.copy_in(region_header::GEOMETRY, &geometry.encode());
        self.region
            .atomic_u32(region_header::FRAME_COUNT)
            .store(layout.frame_count(), Ordering::Relaxed);
        // SYNC region-formatted: pairs with the Acquire in `RegionView::table`.
        header_u64(region_header::MAGIC).store(MAGIC, Ordering::Release);
        Ok(table)
    }

    /// The frame table of a formatted region; every field of the header is checked.
    pub fn table(&self) -> Result<FrameTable, FormatError> {
        // SYNC region-formatted: pairs with the Release in `RegionView::format`.
        let found = self.region.atomic_u64(region_header::MAGIC).load(Ordering::Acquire);
        if found != MAGIC {
            return Err(FormatError::Unformatted { found });
        }
        let version = self.region.atomic_u32(region_header::VERSION).load(Ordering::Relaxed);
        LayoutVersion::check_current(version)?;
        let check = |field, found: u64, expected: u64| {
            if found == expected {
                Ok(())
            } else {
                Err(FormatError::Field { field, found, expected })
            }
        };
        let bytes = self.region.atomic_u64(region_header::REGION_BYTES).load(Ordering::Relaxed);
        check("region bytes", bytes, self.region.bytes())?;
        let mut encoded = [0; GEOMETRY_BYTES];
        self.region.copy_out(region_header::GEOMETRY, &mut encoded);
        let layout = RegionLayout::new(self.region.bytes(), Geometry::decode(&encoded)?)?;
        let frames = self.region.atomic_u32(region_header::FRAME_COUNT).load(Ordering::Relaxed);
        check("frame count", frames.into(), layout.frame_count().into())?;
        Ok(FrameTable { region: self.region.clone(), layout })
    }
}

/// Frames, their headers and their pins, under one geometry.
#[derive(Debug, Clone)]
pub struct FrameTable {
    region: Region,
    layout: RegionLayout,
}

impl FrameTable {
    /// Offsets and geometry.
    pub fn layout(&self) -> &RegionLayout {
        &self.layout
    }

    /// Shape of the frames.
    pub fn geometry(&self) -> &Geometry {
        self.layout.geometry()
    }

    /// The memory.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// All frames.
    pub fn frames(&self) -> impl Iterator<Item = FrameIndex> + use<> {
        (0..self.layout.frame_count()).map(FrameIndex)
    }

    /// Checks an index that a peer gave.
    pub fn index(&self, frame: FrameIndex) -> Option<FrameIndex> {
        (frame.0 < self.layout.frame_count()).then_some(frame)
    }

    /// State, owner and generation; written by the daemon alone.
    pub fn word(&self, frame: FrameIndex) -> &AtomicU64 {
        self.region.atomic_u64(self.layout.frame_entry(frame) + frame_entry::WORD)
    }

    /// Reads [`FrameTable::word`].
    pub fn state(&self, frame: FrameIndex) -> Result<FrameWord, FrameError> {
        FrameWord::load(self.word(frame))
    }

    /// Performs one arrow of the frame's life.
    pub fn change(
        &self,
        frame: FrameIndex,
        to: FrameState,
        owner: Owner,
    ) -> Result<FrameWord, FrameError> {
        FrameWord::change(self.word(frame), to, owner)
    }

    /// Generation whose filling has begun; written by the frame's owner.
    pub fn taken(&self, frame: FrameIndex) -> &AtomicU32 {
        self.region.atomic_u32(self.layout.frame_entry(frame) + frame_entry::TAKEN)
    }

    /// Whether the owner has begun to fill the frame's present generation.
    pub fn is_taken(&self, frame: FrameIndex, generation: Generation) -> bool {
        self.taken(frame).load(Ordering::Acquire) == generation.0
    }

    /// Pins of one attachment; written by the daemon alone.
    pub fn pins(&self, frame: FrameIndex, id: AttachmentId) -> &AtomicU32 {
        const _: () = assert!(ATTACHMENTS_MAX <= 8);
        let offset = frame_entry::PINS + 4 * id.index() as u64;
        self.region.atomic_u32(self.layout.frame_entry(frame) + offset)
    }

    /// Pins of all attachments.
    pub fn pin_count(&self, frame: FrameIndex) -> u64 {
        AttachmentId::all().map(|id| u64::from(self.pins(frame, id).load(Ordering::Relaxed))).sum()
    }

    /// Writes a frame's header; only its owner does, while it is `Filling`.
    pub fn write_header(&self, frame: FrameIndex, header: &BlockHeader) {
        self.region.copy_in(self.layout.header(frame), &header.encode(self.geometry()));
    }

    /// A checked private copy of a frame's header. The header must be of the frame's generation.
    pub fn header(&self, handle: FrameHandle) -> Result<BlockHeader, HeaderError> {
        self.header_view(handle, &mut Vec::new())?.decode()
    }

    /// As [`FrameTable::header`], in a buffer of the caller's, without the check that the key follows from
    /// parent and tokens: for a reader that compares the tokens anyway.
    pub fn header_view<'a>(
        &self,
        handle: FrameHandle,
        copy: &'a mut Vec<u8>,
    ) -> Result<HeaderView<'a>, HeaderError> {
        copy.resize(BlockHeader::bytes(self.geometry()), 0);
        self.region.copy_out(self.layout.header(handle.frame), copy);
        let header = HeaderView::new(copy, self.geometry())?;
        if header.generation() != handle.generation {
            return Err(HeaderError::Count {
                field: "generation",
                found: header.generation().0.into(),
                expected: handle.generation.0.into(),
            });
        }
        Ok(header)
    }

    /// Copies payload out of a frame. Panics outside the frame.
    pub fn copy_out(&self, frame: FrameIndex, offset: u64, to: &mut [u8]) {
        self.check_span(offset, to.len());
        self.region.copy_out(self.layout.frame(frame) + offset, to);
    }

    /// Copies payload into a frame. Panics outside the frame.
    pub fn copy_in(&self, frame: FrameIndex, offset: u64, from: &[u8]) {
        self.check_span(offset, from.len());
        self.region.copy_in(self.layout.frame(frame) + offset, from);
    }

    /// The payload of a frame, without what fills its last page up.
    pub fn payload(&self, frame: FrameIndex) -> Span {
        self.region.span(self.layout.frame(frame), self.geometry().payload_bytes())
    }

    fn check_span(&self, offset: u64, bytes: usize) {
        let end = offset.checked_add(bytes as u64);
        let frame_bytes = self.geometry().frame_bytes();
        assert!(
            end.is_some_and(|end| end <= frame_bytes),
            "{bytes} bytes at {offset} leave a frame of {frame_bytes}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Dtype, LayerSet};

    fn geometry() -> Geometry {
        Geometry::new(8, 2, 1, 8, Dtype::F16, LayerSet::all(2)).unwrap()
    }

    #[test]
    fn a_formatted_region_is_read_with_the_same_table() {
        let view = RegionView::new(Region::heap(6 << 20));
        assert!(matches!(view.table(), Err(FormatError::Unformatted { .. })));
        let table = view.format(geometry()).unwrap();
        assert_eq!(view.table().unwrap().layout(), table.layout());
        assert_eq!(view.format_epoch(), 1);
        assert!(table.frames().all(|f| table.state(f).unwrap().state == FrameState::Free));
    }

    #[test]
    fn a_header_with_a_foreign_frame_count_is_refused() {
        let view = RegionView::new(Region::heap(6 << 20));
        view.format(geometry()).unwrap();
        view.region().atomic_u32(region_header::FRAME_COUNT).store(1 << 30, Ordering::Relaxed);
        assert!(matches!(view.table(), Err(FormatError::Field { field: "frame count", .. })));
    }

    #[test]
    fn formatting_again_makes_old_handles_stale() {
        let view = RegionView::new(Region::heap(6 << 20));
        let table = view.format(geometry()).unwrap();
        let frame = FrameIndex(0);
        let granted = table.change(frame, FrameState::Filling, Owner::Daemon).unwrap();
        let table = view.format(geometry()).unwrap();
        assert_ne!(table.state(frame).unwrap().generation, granted.generation);
    }

    #[test]
    #[should_panic(expected = "leave a frame")]
    fn a_copy_beyond_the_frame_is_refused() {
        let view = RegionView::new(Region::heap(6 << 20));
        let table = view.format(geometry()).unwrap();
        table.copy_in(FrameIndex(0), table.geometry().frame_bytes() - 1, &[0, 0]);
    }

    proptest::proptest! {
        /// Whatever a peer writes over header, frame states, pins and block headers: an error, or a table
        /// whose frames can be looked at.
        #[test]
        fn scribbles_over_the_metadata_never_panic(
            scribbles in proptest::collection::vec(
                (proptest::num::u64::ANY, proptest::collection::vec(proptest::num::u8::ANY, 1..16)),
                1..8,
            ),
        ) {
            let view = RegionView::new(Region::heap(6 << 20));
            let table = view.format(geometry()).unwrap();
            let metadata_bytes = table.layout().frame(FrameIndex(0));
            for (at, bytes) in scribbles {
                view.region().copy_in(at % (metadata_bytes - 16), &bytes);
            }
            if let Ok(table) = view.table() {
                for frame in table.frames() {
                    let _ = (table.state(frame), table.pin_count(frame));
                    let _ = table.header(FrameHandle { frame, generation: Generation(1) });
                }
            }
        }
    }
}
