//! The host tier: frames of the region, which of them are free, and who holds the others.
//!
//! **Invariants**
//! - All state changes go through [`kv_protocol::frame`]'s table; this file adds what the region does not
//!   say: which block a frame holds, and how many of our own disk threads read it (`holds`).
//! - A frame with pins is `Pinned`; one without is not. A worker that dies between the two writes leaves
//!   a difference that [`HostTier::adopt`] repairs.
//! - A frame whose block is forgotten while it is pinned or held is an *orphan*: free when let go.
//! - A free frame is given only when its pages are there ([`HostTier::serve_up_to`]): they are charged to the
//!   daemon's container, and whoever fills it does not wait for the kernel.

use kv_protocol::frame::{FrameError, Owner};
use kv_protocol::layout::ATTACHMENTS_MAX;
use kv_protocol::message::FrameHandle;
use kv_protocol::sync::Ordering;
use kv_protocol::table::FrameTable;
use kv_protocol::{AttachmentId, BlockHeader, BlockKey, FrameIndex, FrameState};

use super::free_frames::FreeFrames;

/// Low watermark: one frame in this many is kept free, ahead of demand.
const FREE_SHARE_LOW: u32 = 16;
/// High watermark: eviction goes on to here, so that it runs in rounds.
const FREE_SHARE_HIGH: u32 = 8;

/// Frames below which eviction begins, of `frames` in all.
pub fn free_low(frames: u32) -> u32 {
    (frames / FREE_SHARE_LOW).max(1)
}

/// Free frames up to which eviction goes on, of `frames` in all.
pub fn free_high(frames: u32) -> u32 {
    (frames / FREE_SHARE_HIGH).max(2)
}

/// Why a peer's handle is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandleError {
    /// Outside the table.
    #[error("frame {frame} does not exist: the region has {count}")]
    NoSuchFrame {
        /// Named.
        frame: u32,
        /// In the table.
        count: u32,
    },
    /// Not the state, generation or owner that the message needs.
    #[error("frame {frame} is not {expected} with that generation and owner")]
    Stale {
        /// Named.
        frame: u32,
        /// Needed.
        expected: &'static str,
    },
    /// A pin that was never given.
    #[error("frame {frame} has no pin of this attachment")]
    NotPinned {
        /// Named.
        frame: u32,
    },
    /// The word itself.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

#[derive(Debug, Clone, Default)]
struct Info {
    block: Option<BlockKey>,
    holds: u32,
}

/// Frames by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct FrameCounts {
    /// Empty, its pages faulted.
    pub free: u32,
    /// Granted.
    pub filling: u32,
    /// With a block.
    pub ready: u32,
    /// With a block that is read.
    pub pinned: u32,
}

/// See the module.
#[derive(Debug)]
pub struct HostTier {
    table: FrameTable,
    info: Vec<Info>,
    free: FreeFrames,
    /// Frames from here on have no pages yet; a block may be in one all the same, if its filler faulted it.
    served: u32,
    /// The frame that each attachment was granted last: the next one lies behind it.
    granted_last: [Option<FrameIndex>; ATTACHMENTS_MAX],
    counts: FrameCounts,
    changed: Vec<BlockKey>,
}

/// A block found in the region by a restarted worker.
#[derive(Debug)]
pub struct Adopted {
    /// Where.
    pub frame: FrameIndex,
    /// Its checked header.
    pub header: BlockHeader,
}

impl HostTier {
    /// Over a region that was just formatted, or that an earlier worker left: frames are repaired, blocks
    /// are returned for the directory. Second: frames whose header was not to be trusted. No free frame is
    /// given before [`HostTier::serve_up_to`].
    pub fn adopt(table: FrameTable) -> (Self, Vec<Adopted>, u32) {
        let count = table.layout().frame_count();
        let info = vec![Info::default(); count as usize];
        let mut host = Self {
            table,
            info,
            free: FreeFrames::default(),
            served: 0,
            granted_last: [None; ATTACHMENTS_MAX],
            counts: FrameCounts::default(),
            changed: Vec::new(),
        };
        let (mut adopted, mut corrupt) = (Vec::new(), 0);
        for frame in host.table.frames() {
            match host.adopt_frame(frame) {
                Ok(Some(block)) => adopted.push(block),
                Ok(None) => {}
                Err(_) => {
                    corrupt += 1;
                    for id in AttachmentId::all() {
                        host.table.pins(frame, id).store(0, Ordering::Relaxed);
                    }
                    kv_protocol::frame::FrameWord::reset(host.table.word(frame));
                }
            }
        }
        host.recount();
        (host, adopted, corrupt)
    }

    fn adopt_frame(&self, frame: FrameIndex) -> Result<Option<Adopted>, FrameError> {
        let word = self.table.state(frame)?;
        let pins = self.table.pin_count(frame);
        match word.state {
            FrameState::Free => return Ok(None),
            FrameState::Filling => {
                // Our own promote died with the worker; a runtime's filling goes on.
                if word.owner == Owner::Daemon {
                    self.table.change(frame, FrameState::Free, Owner::Daemon)?;
                }
                return Ok(None);
            }
            FrameState::Ready if pins > 0 => {
                self.table.change(frame, FrameState::Pinned, Owner::Daemon)?;
            }
            FrameState::Pinned if pins == 0 => {
                self.table.change(frame, FrameState::Ready, Owner::Daemon)?;
            }
            FrameState::Ready | FrameState::Pinned => {}
        }
        let handle = FrameHandle { frame, generation: word.generation };
        match self.table.header(handle) {
            Ok(header) => Ok(Some(Adopted { frame, header })),
            Err(error) => {
                tracing::warn!(frame = frame.0, %error, "block forgotten: its header is corrupt");
                if pins == 0 {
                    self.table.change(frame, FrameState::Free, Owner::Daemon)?;
                }
                Ok(None)
            }
        }
    }

    fn recount(&mut self) {
        self.free.clear();
        self.counts = FrameCounts::default();
        for frame in self.table.frames() {
            match self.table.state(frame).map(|word| word.state) {
                Ok(FrameState::Filling) => self.counts.filling += 1,
                Ok(FrameState::Ready) => self.counts.ready += 1,
                Ok(FrameState::Pinned) => self.counts.pinned += 1,
                // Free ones are counted when their pages are there; what cannot be read is lost until the
                // next adopt.
                Ok(FrameState::Free) | Err(_) => {}
            }
        }
    }

    /// The region's pages are there up to `bytes`: free frames below may be given.
    pub fn serve_up_to(&mut self, bytes: u64) {
        let layout = *self.table.layout();
        while self.served < layout.frame_count()
            && layout.frame(FrameIndex(self.served)) + layout.geometry().payload_bytes() <= bytes
        {
            let frame = FrameIndex(self.served);
            self.served += 1;
            if matches!(self.table.state(frame), Ok(word) if word.state == FrameState::Free) {
                self.counts.free += 1;
                self.free.give_back(frame);
            }
        }
    }

    /// The region's table.
    pub fn table(&self) -> &FrameTable {
        &self.table
    }

    /// Frames by state.
    pub fn counts(&self) -> FrameCounts {
        self.counts
    }

    /// Frames whose pages are not there yet.
    pub fn coming(&self) -> u32 {
        self.table.layout().frame_count() - self.served
    }

    fn count_mut(&mut self, state: FrameState) -> &mut u32 {
        match state {
            FrameState::Free => &mut self.counts.free,
            FrameState::Filling => &mut self.counts.filling,
            FrameState::Ready => &mut self.counts.ready,
            FrameState::Pinned => &mut self.counts.pinned,
        }
    }

    fn change(
        &mut self,
        frame: FrameIndex,
        to: FrameState,
        owner: Owner,
    ) -> Result<FrameHandle, FrameError> {
        let from = self.table.state(frame)?.state;
        let word = self.table.change(frame, to, owner)?;
        let is_served = |state| state != FrameState::Free || frame.0 < self.served;
        let (leaves, enters) = (is_served(from), is_served(to));
        let left = self.count_mut(from);
        *left = left.saturating_sub(u32::from(leaves)); // Where a peer wrote the word, none was counted.
        *self.count_mut(to) += u32::from(enters);
        self.note(frame);
        Ok(FrameHandle { frame, generation: word.generation })
    }

    fn note(&mut self, frame: FrameIndex) {
        self.changed.extend(self.info[frame.0 as usize].block);
    }

    /// Blocks whose frames were pinned, held or let go since the last call.
    pub fn take_changed(&mut self) -> Vec<BlockKey> {
        std::mem::take(&mut self.changed)
    }

    /// Takes a free frame for an attachment to fill: behind the one before it, where that is free.
    pub fn grant(&mut self, id: AttachmentId) -> Option<FrameHandle> {
        let after = self.granted_last[id.index()];
        let handle = self.take(after, Owner::Attachment(id.code()))?;
        self.granted_last[id.index()] = Some(handle.frame);
        Some(handle)
    }

    /// Takes a free frame for ourselves to fill: behind `after`, where that is free.
    pub fn grant_behind(&mut self, after: Option<FrameIndex>) -> Option<FrameHandle> {
        self.take(after, Owner::Daemon)
    }

    fn take(&mut self, after: Option<FrameIndex>, owner: Owner) -> Option<FrameHandle> {
        loop {
            let frame = self.free.take(after)?;
            match self.change(frame, FrameState::Filling, owner) {
                Ok(handle) => return Some(handle),
                // A peer wrote the word: the frame is lost until a restart, the others are not.
                Err(error) => tracing::error!(frame = frame.0, %error, "frame lost"),
            }
        }
    }

    /// Checks that a peer's handle names a frame that it is filling.
    pub fn check_filling(&self, handle: FrameHandle, id: AttachmentId) -> Result<(), HandleError> {
        let word = self.checked_word(handle)?;
        let is_theirs = word.owner == Owner::Attachment(id.code());
        if word.state != FrameState::Filling || word.generation != handle.generation || !is_theirs {
            let expected = "filling";
            return Err(HandleError::Stale { frame: handle.frame.0, expected });
        }
        Ok(())
    }

    fn checked_word(
        &self,
        handle: FrameHandle,
    ) -> Result<kv_protocol::frame::FrameWord, HandleError> {
        let count = self.table.layout().frame_count();
        let frame = handle.frame;
        self.table.index(frame).ok_or(HandleError::NoSuchFrame { frame: frame.0, count })?;
        Ok(self.table.state(frame)?)
    }

    /// A filled frame becomes readable.
    pub fn publish(&mut self, frame: FrameIndex, key: BlockKey) -> Result<(), FrameError> {
        self.change(frame, FrameState::Ready, Owner::Daemon)?;
        self.info[frame.0 as usize].block = Some(key);
        Ok(())
    }

    /// Names the block of an adopted frame.
    pub fn set_block(&mut self, frame: FrameIndex, key: BlockKey) {
        self.info[frame.0 as usize].block = Some(key);
    }

    /// The block that a frame holds.
    pub fn block(&self, frame: FrameIndex) -> Option<BlockKey> {
        self.info[frame.0 as usize].block
    }

    /// A frame in `Filling` that will not be filled, or in `Ready` that is not wanted, becomes free.
    pub fn free(&mut self, frame: FrameIndex) {
        self.info[frame.0 as usize].block = None;
        // Our list knows better than the word, which a peer can write: two owners of a frame would be worse
        // than none.
        if self.free.contains(frame) {
            tracing::error!(frame = frame.0, "frame lost: a peer wrote the word of a free one");
            return;
        }
        match self.change(frame, FrameState::Free, Owner::Daemon) {
            Ok(_) if frame.0 < self.served => self.free.give_back(frame),
            Ok(_) => {} // Given when its pages are there.
            Err(error) => tracing::error!(frame = frame.0, %error, "frame lost"),
        }
    }

    /// The block of a frame is forgotten: the frame becomes free now, or when it is let go.
    pub fn disown(&mut self, frame: FrameIndex) {
        self.info[frame.0 as usize].block = None;
        self.free_orphan(frame);
    }

    fn free_orphan(&mut self, frame: FrameIndex) {
        let info = &self.info[frame.0 as usize];
        let is_ready =
            matches!(self.table.state(frame), Ok(word) if word.state == FrameState::Ready);
        if info.block.is_none() && info.holds == 0 && is_ready {
            self.free(frame);
        }
    }

    /// Whether a frame may be evicted now.
    pub fn is_evictable(&self, frame: FrameIndex) -> bool {
        let is_ready =
            matches!(self.table.state(frame), Ok(word) if word.state == FrameState::Ready);
        is_ready && self.info[frame.0 as usize].holds == 0
    }

    /// Whether anything still uses a frame's bytes.
    pub fn any_in_use(&self) -> bool {
        self.counts.pinned > 0 || self.counts.filling > 0 || self.info.iter().any(|i| i.holds > 0)
    }

    /// A disk thread begins to read a frame.
    pub fn hold(&mut self, frame: FrameIndex) {
        self.info[frame.0 as usize].holds += 1;
        self.note(frame);
    }

    /// A disk thread has read a frame.
    pub fn release_hold(&mut self, frame: FrameIndex) {
        let info = &mut self.info[frame.0 as usize];
        info.holds = info.holds.saturating_sub(1);
        self.note(frame);
        self.free_orphan(frame);
    }

    /// Pins a frame for an attachment. The count goes first: a worker that dies in between leaves pins
    /// without the state, which `adopt` repairs.
    pub fn pin(&mut self, frame: FrameIndex, id: AttachmentId) -> Result<FrameHandle, FrameError> {
        self.table.pins(frame, id).fetch_add(1, Ordering::Relaxed);
        let word = self.table.state(frame)?;
        match word.state {
            FrameState::Pinned => Ok(FrameHandle { frame, generation: word.generation }),
            _ => self.change(frame, FrameState::Pinned, Owner::Daemon).inspect_err(|_| {
                self.table.pins(frame, id).fetch_sub(1, Ordering::Relaxed);
            }),
        }
    }

    /// Takes one pin back.
    pub fn unpin(&mut self, handle: FrameHandle, id: AttachmentId) -> Result<(), HandleError> {
        let word = self.checked_word(handle)?;
        let frame = handle.frame;
        if word.generation != handle.generation {
            return Err(HandleError::Stale { frame: frame.0, expected: "pinned" });
        }
        let pins = self.table.pins(frame, id);
        if pins.load(Ordering::Relaxed) == 0 {
            return Err(HandleError::NotPinned { frame: frame.0 });
        }
        pins.fetch_sub(1, Ordering::Relaxed);
        self.settle(frame)?;
        Ok(())
    }

    /// A frame whose last pin is gone is `Ready`, or free if its block is forgotten.
    fn settle(&mut self, frame: FrameIndex) -> Result<(), FrameError> {
        if self.table.pin_count(frame) == 0 && self.table.state(frame)?.state == FrameState::Pinned
        {
            self.change(frame, FrameState::Ready, Owner::Daemon)?;
            self.free_orphan(frame);
        }
        Ok(())
    }

    /// Takes everything back that an attachment had: pins, and frames that it was filling.
    pub fn reclaim(&mut self, id: AttachmentId) {
        for frame in self.table.frames() {
            let pins = self.table.pins(frame, id);
            if pins.load(Ordering::Relaxed) > 0 {
                pins.store(0, Ordering::Relaxed);
                if let Err(error) = self.settle(frame) {
                    tracing::error!(frame = frame.0, %error, "frame lost");
                }
            }
            if let Ok(word) = self.table.state(frame)
                && word.state == FrameState::Filling
                && word.owner == Owner::Attachment(id.code())
            {
                self.free(frame);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_protocol::geometry::LayerSet;
    use kv_protocol::table::RegionView;
    use kv_protocol::{Dtype, Fingerprint, Geometry, NumericsTag, Region, RootKey, Variant};

    const FLIPS: usize = 1000;

    /// A peer says that it fills a frame which is free.
    #[test]
    fn a_free_frame_that_a_peer_claims_is_given_to_nobody_twice() {
        let (_view, mut host) = host();
        let frames = host.table.layout().frame_count();
        let last = FrameIndex(frames - 1);
        let filling = host.grant(id(0)).unwrap();
        let claimed = host.table.word(filling.frame).load(Ordering::Relaxed);
        host.table.word(last).store(claimed, Ordering::Relaxed);
        host.reclaim(id(0));
        let mut given = std::collections::HashSet::new();
        while let Some(handle) = host.grant(id(1)) {
            assert!(given.insert(handle.frame), "{:?} was given twice", handle.frame);
        }
        assert_eq!(given.len() as u32, frames - 1, "all but the one that is lost");
    }

    fn host() -> (RegionView, HostTier) {
        let view = RegionView::new(Region::heap(6 << 20));
        let geometry = Geometry::new(4, 2, 1, 4, Dtype::F16, LayerSet::all(2)).unwrap();
        let table = view.format(geometry).unwrap();
        (view.clone(), adopt(&view, table).0)
    }

    fn adopt(view: &RegionView, table: FrameTable) -> (HostTier, Vec<Adopted>, u32) {
        let (mut host, adopted, corrupt) = HostTier::adopt(table);
        host.serve_up_to(view.region().bytes());
        (host, adopted, corrupt)
    }

    fn id(index: u32) -> AttachmentId {
        AttachmentId::new(index).unwrap()
    }

    #[test]
    fn counts_follow_the_states() {
        let (_, mut host) = host();
        let all = host.counts().free;
        let handle = host.grant_behind(None).unwrap();
        assert_eq!((host.counts().free, host.counts().filling), (all - 1, 1));
        host.publish(handle.frame, BlockKey([1; 32])).unwrap();
        host.pin(handle.frame, id(0)).unwrap();
        host.pin(handle.frame, id(1)).unwrap();
        assert_eq!((host.counts().ready, host.counts().pinned), (0, 1));
        host.unpin(handle, id(0)).unwrap();
        assert_eq!(host.counts().pinned, 1);
        host.unpin(handle, id(1)).unwrap();
        assert_eq!((host.counts().ready, host.counts().pinned), (1, 0));
    }

    #[test]
    fn a_frame_is_given_when_its_pages_are_there() {
        let (view, _) = host();
        let table = view.table().unwrap();
        let layout = *table.layout();
        let (mut host, _, _) = HostTier::adopt(table);
        assert!(host.grant(id(0)).is_none());
        host.serve_up_to(layout.frame(FrameIndex(2))); // Two frames end before it.
        assert_eq!(host.counts().free, 2);
        let first = host.grant(id(0)).unwrap();
        assert!(host.grant(id(0)).is_some());
        assert!(host.grant(id(0)).is_none());
        host.free(first.frame);
        assert_eq!(host.counts().free, 1);
        host.serve_up_to(view.region().bytes());
        assert_eq!(host.counts().free, layout.frame_count() - 1);
    }

    #[test]
    fn an_attachments_frames_are_neighbours() {
        let (_, mut host) = host();
        let first = host.grant(id(0)).unwrap().frame;
        let other = host.grant(id(1)).unwrap().frame;
        let second = host.grant(id(0)).unwrap().frame;
        assert_eq!(second.0, first.0 + 1);
        assert_eq!(host.grant_behind(Some(other)).unwrap().frame.0, other.0 + 1);
    }

    #[test]
    fn evicting_a_pinned_or_held_frame_is_refused() {
        let (_, mut host) = host();
        let handle = host.grant_behind(None).unwrap();
        host.publish(handle.frame, BlockKey([1; 32])).unwrap();
        assert!(host.is_evictable(handle.frame));
        host.hold(handle.frame);
        assert!(!host.is_evictable(handle.frame));
        host.release_hold(handle.frame);
        host.pin(handle.frame, id(0)).unwrap();
        assert!(!host.is_evictable(handle.frame));
    }

    #[test]
    fn a_forgotten_block_keeps_its_frame_until_the_last_pin() {
        let (_, mut host) = host();
        let all = host.counts().free;
        let handle = host.grant_behind(None).unwrap();
        host.publish(handle.frame, BlockKey([1; 32])).unwrap();
        host.pin(handle.frame, id(0)).unwrap();
        host.disown(handle.frame);
        assert_eq!(host.counts().free, all - 1);
        host.unpin(handle, id(0)).unwrap();
        assert_eq!(host.counts().free, all);
    }

    #[test]
    fn one_attachment_cannot_unpin_for_another_or_commit_anothers_frame() {
        let (_, mut host) = host();
        let handle = host.grant(id(0)).unwrap();
        assert!(host.check_filling(handle, id(1)).is_err());
        host.publish(handle.frame, BlockKey([1; 32])).unwrap();
        host.pin(handle.frame, id(0)).unwrap();
        assert_eq!(host.unpin(handle, id(1)), Err(HandleError::NotPinned { frame: 0 }));
        let foreign = FrameHandle { frame: FrameIndex(1 << 30), ..handle };
        assert!(matches!(host.unpin(foreign, id(0)), Err(HandleError::NoSuchFrame { .. })));
    }

    #[test]
    fn reclaiming_takes_back_pins_and_fillings_of_one_attachment_only() {
        let (_, mut host) = host();
        let all = host.counts().free;
        host.grant(id(0)).unwrap();
        host.grant(id(1)).unwrap();
        host.reclaim(id(0));
        assert_eq!((host.counts().free, host.counts().filling), (all - 1, 1));
    }

    #[test]
    fn a_restart_repairs_what_a_death_between_two_writes_left() {
        let (view, mut host) = host();
        let handle = host.grant_behind(None).unwrap();
        host.publish(handle.frame, BlockKey([1; 32])).unwrap();
        // Died after the count, before the state.
        host.table().pins(handle.frame, id(0)).store(1, Ordering::Relaxed);
        let promote = host.grant_behind(None).unwrap();
        let filling = host.grant(id(0)).unwrap();
        let (host, adopted, _) = adopt(&view, view.table().unwrap());
        assert!(adopted.is_empty()); // The header was never written.
        let state = |frame| host.table().state(frame).unwrap().state;
        assert_eq!(state(handle.frame), FrameState::Pinned);
        assert_eq!(state(promote.frame), FrameState::Free);
        assert_eq!(state(filling.frame), FrameState::Filling);
    }

    #[test]
    fn a_torn_frame_word_costs_a_frame_not_the_worker() {
        let (view, host) = host();
        host.table().word(FrameIndex(0)).store(0xdead_beef_dead_beef, Ordering::Relaxed);
        let (host, _, corrupt) = adopt(&view, view.table().unwrap());
        assert_eq!(corrupt, 1);
        assert_eq!(host.counts().free, host.table().layout().frame_count());
    }

    fn header(number: u32, handle: FrameHandle) -> BlockHeader {
        let root = RootKey::new(&Fingerprint([1; 32]), b"");
        let tokens: Vec<u32> = (4 * number..4 * number + 4).collect();
        BlockHeader {
            key: BlockKey::child(&root.as_parent(), &tokens),
            parent: root.as_parent(),
            root,
            variant: Variant::Exact,
            numerics: NumericsTag::of("test"),
            generation: handle.generation,
            created_ms: 1,
            tokens,
            checksums: vec![1, 2],
        }
    }

    /// In the states, pins and headers of frames that hold blocks: a restarted worker takes over what is
    /// right and forgets the rest.
    #[test]
    fn a_flipped_bit_of_frame_metadata_costs_a_frame_at_most() {
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        let mut forgotten = 0;
        for _ in 0..FLIPS {
            let (view, mut host) = host();
            let mut headers = Vec::new();
            for number in 0..8 {
                let handle = host.grant_behind(None).unwrap();
                headers.push((handle.frame, header(number, handle)));
                host.table().write_header(handle.frame, &headers[number as usize].1);
                host.publish(handle.frame, headers[number as usize].1.key).unwrap();
            }
            let frame = headers[random(8) as usize].0;
            let table = host.table();
            match random(4) {
                0 => _ = table.word(frame).fetch_xor(1 << random(64), Ordering::Relaxed),
                1 => {
                    let pins = table.pins(frame, id(random(2) as u32));
                    pins.fetch_xor(1 << random(32), Ordering::Relaxed);
                }
                _ => {
                    let header_bytes = BlockHeader::bytes(table.geometry()) as u64;
                    let at = table.layout().header(frame) + random(header_bytes);
                    let mut byte = [0];
                    view.region().copy_out(at, &mut byte);
                    view.region().copy_in(at, &[byte[0] ^ 1 << random(8)]);
                }
            }
            let (host, adopted, _) = adopt(&view, view.table().unwrap());
            for block in &adopted {
                assert!(headers.contains(&(block.frame, block.header.clone())));
            }
            assert!(adopted.len() >= 7, "one frame was struck");
            forgotten += 8 - adopted.len();
            let counts = host.counts();
            let known = counts.free + counts.filling + counts.ready + counts.pinned;
            assert!(known >= host.table().layout().frame_count() - 1);
        }
        // A flipped pin count forgets nothing, it holds a frame until its attachment's lease ends.
        assert!(forgotten > FLIPS / 2, "{forgotten} of {FLIPS} forgotten");
    }
}
