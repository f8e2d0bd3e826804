//! The life of a frame: one drawing, one table, one function that performs it.
//!
//! ```text
//! Free ──grant──► Filling ──publish──► Ready ◄──pin / unpin──► Pinned
//!  ▲                 │ abandon           │ evict
//!  └─────────────────┴───────────────────┘
//! ```
//!
//! **Invariants**
//! - Only the daemon changes a frame's word. State, owner and generation are one 64-bit word, so that
//!   no reader sees the state of one generation beside another's number.
//! - The generation grows with each grant; a handle of an older generation is stale and is refused.
//! - Whoever fills says so in the entry's `taken` word: a granted frame that nobody took is empty and
//!   free at once when its owner dies; a taken one rests, for a copy may still be running.

use crate::sync::{AtomicU64, Ordering};

/// Index of a frame in the region's table. What comes from a peer is checked against the frame count
/// before it becomes one ([`crate::table::FrameTable::index`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrameIndex(pub u32);

/// Counts the grants of one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub u32);

/// What a frame is good for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameState {
    /// Empty.
    Free = 0,
    /// Granted to its owner, who may write it.
    Filling = 1,
    /// Holds a block; may be evicted.
    Ready = 2,
    /// Holds a block that at least one attachment reads.
    Pinned = 3,
}

impl FrameState {
    /// All states, for tables and metrics.
    pub const ALL: [FrameState; 4] =
        [FrameState::Free, FrameState::Filling, FrameState::Ready, FrameState::Pinned];

    /// The drawing above, as a table.
    pub fn may_become(self, to: FrameState) -> bool {
        use FrameState::{Filling, Free, Pinned, Ready};
        matches!(
            (self, to),
            (Free, Filling) | (Filling, Ready | Free) | (Ready, Pinned | Free) | (Pinned, Ready)
        )
    }

    /// Label of metrics.
    pub fn label(self) -> &'static str {
        match self {
            FrameState::Free => "free",
            FrameState::Filling => "filling",
            FrameState::Ready => "ready",
            FrameState::Pinned => "pinned",
        }
    }
}

impl TryFrom<u8> for FrameState {
    type Error = u8;

    fn try_from(code: u8) -> Result<Self, u8> {
        FrameState::ALL.into_iter().find(|state| *state as u8 == code).ok_or(code)
    }
}

/// Who may write a frame in `Filling`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The daemon: a promote from disk.
    Daemon,
    /// The attachment in this place.
    Attachment(u8),
}

const OWNER_DAEMON: u8 = 0xff;

/// A frame's word, taken apart: `generation << 32 | owner << 8 | state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameWord {
    /// See [`FrameState`].
    pub state: FrameState,
    /// Who fills, or filled, the frame.
    pub owner: Owner,
    /// See [`Generation`].
    pub generation: Generation,
}

impl FrameWord {
    fn pack(self) -> u64 {
        let owner = match self.owner {
            Owner::Daemon => OWNER_DAEMON,
            Owner::Attachment(index) => index,
        };
        u64::from(self.generation.0) << 32 | u64::from(owner) << 8 | self.state as u64
    }

    fn unpack(word: u64) -> Result<Self, FrameError> {
        let bytes = word.to_le_bytes();
        let state = FrameState::try_from(bytes[0]).map_err(|_| FrameError::Corrupt { word })?;
        let owner = match bytes[1] {
            OWNER_DAEMON => Owner::Daemon,
            index => Owner::Attachment(index),
        };
        Ok(Self { state, owner, generation: Generation((word >> 32) as u32) })
    }

    /// Reads a frame's word.
    pub fn load(word: &AtomicU64) -> Result<Self, FrameError> {
        // SYNC frame-published: pairs with the Release in `FrameWord::change`.
        Self::unpack(word.load(Ordering::Acquire))
    }

    /// Performs one arrow of the drawing, and nothing else. A grant (`Free` → `Filling`) names the new
    /// owner and raises the generation; all other arrows keep both.
    pub fn change(
        word: &AtomicU64,
        to: FrameState,
        new_owner: Owner,
    ) -> Result<FrameWord, FrameError> {
        let current = word.load(Ordering::Relaxed); // The daemon is the only writer.
        let from = Self::unpack(current)?;
        if !from.state.may_become(to) {
            return Err(FrameError::Transition { from: from.state, to });
        }
        let next = if to == FrameState::Filling {
            let generation = Generation(from.generation.0.wrapping_add(1));
            FrameWord { state: to, owner: new_owner, generation }
        } else {
            FrameWord { state: to, ..from }
        };
        // SYNC frame-published: what was written before the frame became Ready is seen by whoever
        // loads the word.
        match word.compare_exchange(current, next.pack(), Ordering::Release, Ordering::Relaxed) {
            Ok(_) => Ok(next),
            // Somebody else wrote a word that only the daemon may write.
            Err(word) => Err(FrameError::Corrupt { word }),
        }
    }

    /// Writes a free frame, whatever the word was: formatting, and repair of a corrupt word. The
    /// generation stays ahead of every handle given out before.
    pub fn reset(word: &AtomicU64) {
        let generation = Generation(((word.load(Ordering::Relaxed) >> 32) as u32).wrapping_add(1));
        let free = FrameWord { state: FrameState::Free, owner: Owner::Daemon, generation };
        word.store(free.pack(), Ordering::Release);
    }
}

/// Why a frame did not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The word holds no state that this layout knows, or another process wrote it.
    #[error("frame word {word:#018x} is corrupt: only the daemon may write it")]
    Corrupt {
        /// Read.
        word: u64,
    },
    /// Not an arrow of the drawing.
    #[error("a frame cannot go from {from:?} to {to:?}")]
    Transition {
        /// State found.
        from: FrameState,
        /// State wanted.
        to: FrameState,
    },
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use FrameState::{Filling, Free, Pinned, Ready};

    fn word_in(state: FrameState) -> AtomicU64 {
        AtomicU64::new(
            FrameWord { state, owner: Owner::Attachment(1), generation: Generation(7) }.pack(),
        )
    }

    #[test]
    fn exactly_the_drawn_arrows_are_possible() {
        let drawn = [
            (Free, Filling),
            (Filling, Ready),
            (Filling, Free),
            (Ready, Pinned),
            (Ready, Free),
            (Pinned, Ready),
        ];
        for from in FrameState::ALL {
            for to in FrameState::ALL {
                let word = word_in(from);
                let changed = FrameWord::change(&word, to, Owner::Daemon);
                assert_eq!(changed.is_ok(), drawn.contains(&(from, to)), "{from:?} to {to:?}");
                let expected = if changed.is_ok() { to } else { from };
                assert_eq!(FrameWord::load(&word).unwrap().state, expected);
            }
        }
    }

    #[test]
    fn a_grant_raises_the_generation_and_names_the_owner() {
        let word = word_in(Free);
        let granted = FrameWord::change(&word, Filling, Owner::Attachment(3)).unwrap();
        assert_eq!(granted.generation, Generation(8));
        assert_eq!(granted.owner, Owner::Attachment(3));
        let ready = FrameWord::change(&word, Ready, Owner::Daemon).unwrap();
        assert_eq!((ready.generation, ready.owner), (Generation(8), Owner::Attachment(3)));
    }

    #[test]
    fn a_corrupt_word_is_named_and_can_be_reset() {
        let word = AtomicU64::new(0x0000_0009_0000_00ee);
        assert!(matches!(FrameWord::load(&word), Err(FrameError::Corrupt { .. })));
        FrameWord::reset(&word);
        let free = FrameWord::load(&word).unwrap();
        assert_eq!((free.state, free.generation), (Free, Generation(10)));
    }

    proptest::proptest! {
        #[test]
        fn any_word_is_an_error_or_itself(word: u64) {
            if let Ok(frame) = FrameWord::unpack(word) {
                proptest::prop_assert_eq!(frame.pack() & 0xffff_ffff_0000_ffff, word & 0xffff_ffff_0000_ffff);
            }
        }
    }
}
