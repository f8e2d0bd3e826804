//! Free frames as runs of neighbours, so that a conversation's blocks lie side by side: one strided copy
//! a layer takes them to the device. Pure book-keeping.
//!
//! **Invariant:** runs are not empty, do not overlap and do not touch; `by_length` has each of them once.

use std::collections::{BTreeMap, BTreeSet};

use kv_protocol::FrameIndex;

/// A new run leaves this many frames to whoever ends before it, so that both can grow in place: 1,024
/// tokens at 64 a block.
const RUN_GAP_FRAMES: u32 = 16;

/// See the module.
#[derive(Debug, Default)]
pub struct FreeFrames {
    /// First frame → length.
    runs: BTreeMap<u32, u32>,
    /// Length, first frame.
    by_length: BTreeSet<(u32, u32)>,
}

impl FreeFrames {
    /// Takes the frame behind `after` if it is free, else one where a long run begins.
    pub fn take(&mut self, after: Option<FrameIndex>) -> Option<FrameIndex> {
        let next = after.and_then(|after| after.0.checked_add(1));
        if let Some(next) = next
            && let Some((start, length)) = self.run_of(next)
        {
            self.split(start, length, next);
            return Some(FrameIndex(next));
        }
        let &(length, start) = self.by_length.last()?;
        let is_behind_another = start > 0;
        let gap = if is_behind_another && length > 2 * RUN_GAP_FRAMES { RUN_GAP_FRAMES } else { 0 };
        self.split(start, length, start + gap);
        Some(FrameIndex(start + gap))
    }

    /// Whether a frame is free.
    pub fn contains(&self, frame: FrameIndex) -> bool {
        self.run_of(frame.0).is_some()
    }

    /// Puts a frame back that was not free.
    pub fn give_back(&mut self, frame: FrameIndex) {
        debug_assert!(self.run_of(frame.0).is_none(), "frame {} is free already", frame.0);
        let (mut start, mut length) = (frame.0, 1);
        let before =
            self.runs.range(..frame.0).next_back().map(|(start, length)| (*start, *length));
        if let Some((before, before_length)) = before
            && before + before_length == frame.0
        {
            self.remove(before, before_length);
            (start, length) = (before, before_length + 1);
        }
        if let Some(behind_length) = self.runs.get(&(frame.0 + 1)).copied() {
            self.remove(frame.0 + 1, behind_length);
            length += behind_length;
        }
        self.insert(start, length);
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.by_length.clear();
    }

    fn run_of(&self, frame: u32) -> Option<(u32, u32)> {
        let (start, length) = self.runs.range(..=frame).next_back()?;
        (frame - start < *length).then_some((*start, *length))
    }

    /// Takes `frame` out of a run that has it.
    fn split(&mut self, start: u32, length: u32, frame: u32) {
        self.remove(start, length);
        let (left, right) = (frame - start, start + length - frame - 1);
        if left > 0 {
            self.insert(start, left);
        }
        if right > 0 {
            self.insert(frame + 1, right);
        }
    }

    fn insert(&mut self, start: u32, length: u32) {
        self.runs.insert(start, length);
        self.by_length.insert((length, start));
    }

    fn remove(&mut self, start: u32, length: u32) {
        self.runs.remove(&start);
        self.by_length.remove(&(length, start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn filled(frames: u32) -> FreeFrames {
        let mut free = FreeFrames::default();
        (0..frames).for_each(|frame| free.give_back(FrameIndex(frame)));
        free
    }

    #[test]
    fn two_conversations_that_grow_in_turn_lie_in_one_run_each() {
        let mut free = filled(64);
        let (mut first, mut second) = (free.take(None), None);
        second = free.take(second);
        for _ in 1..RUN_GAP_FRAMES {
            let (a, b) = (free.take(first), free.take(second));
            assert_eq!(a.map(|frame| frame.0), first.map(|frame| frame.0 + 1));
            assert_eq!(b.map(|frame| frame.0), second.map(|frame| frame.0 + 1));
            (first, second) = (a, b);
        }
    }

    proptest! {
        /// Oracle: a set of frames.
        #[test]
        fn each_free_frame_is_given_once_and_the_neighbour_where_it_is_free(
            steps in proptest::collection::vec((any::<bool>(), 0u32..80), 1..400),
        ) {
            let mut free = filled(80);
            let mut set: BTreeSet<u32> = (0..80).collect();
            for (gives, frame) in steps {
                if gives {
                    if set.insert(frame) {
                        free.give_back(FrameIndex(frame));
                    }
                    continue;
                }
                let taken = free.take(Some(FrameIndex(frame)));
                prop_assert_eq!(taken.is_some(), !set.is_empty());
                let Some(taken) = taken else { continue };
                if set.contains(&(frame + 1)) {
                    prop_assert_eq!(taken.0, frame + 1);
                }
                prop_assert!(set.remove(&taken.0), "frame {} was not free", taken.0);
            }
            while let Some(taken) = free.take(None) {
                prop_assert!(set.remove(&taken.0));
            }
            prop_assert!(set.is_empty());
        }
    }
}
