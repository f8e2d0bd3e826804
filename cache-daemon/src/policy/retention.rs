//! What was said of single blocks beside their use: their own time to live, and pins. Exceptions, in a map at
//! the side; all other blocks live by the daemon's own time to live, and by their ranks.
//!
//! ```text
//! pinned until T          leaves last ([`Keep::Pinned`]), never by time
//! used, + half its ttl    leaves first ([`Keep::Fading`]): decay
//! used, + its ttl         expires
//! ```
//!
//! A use starts the time to live anew. Of several words about one block (a shared prefix) the longest counts.
//! Pure: the clock is an argument.
//!
//! **Invariants**
//! - `by_due` has each entry once, under its `due_ms`, which is never later than what happens to it next: a use
//!   moves that further away, and is noticed when the entry comes up.
//! - `pinned` counts the entries that are pinned.

use std::collections::BTreeSet;

use kv_protocol::BlockKey;

use super::Keep;
use crate::key_map::KeyMap;

/// Blocks with an exception at once: some 30 MB. Others are refused theirs, and live by the common rules.
pub const RETENTIONS_MAX: usize = 1 << 18;
/// Entries looked at in one call of [`Retentions::due`], a millisecond's work.
const DUE_PER_CALL: usize = 1 << 12;
/// Share of a tier's blocks that may be pinned, so that pins never stop the others from coming.
pub const PINNED_SHARE_PERCENT: u64 = 50;

/// How many blocks may be pinned, of a tier's `blocks`.
pub fn pinned_max(blocks: u64) -> u64 {
    u64::try_from(u128::from(blocks) * u128::from(PINNED_SHARE_PERCENT) / 100).unwrap_or(u64::MAX)
}

/// What may be said of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    /// It expires this long after its last use.
    pub ttl_ms: Option<u64>,
    /// Until then (Unix milliseconds) it leaves last, and does not expire.
    pub pinned_until_ms: Option<u64>,
}

/// Why a word about a block does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// As many blocks are pinned as may be.
    Pins,
    /// As many blocks have exceptions as may have.
    Retentions,
}

/// What became of a block by time alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Its rank is another: it fades, or is pinned no more.
    Changed(BlockKey),
    /// It is to be forgotten.
    Expired(BlockKey),
}

#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_field_names, reason = "the unit comes last")]
struct Kept {
    ttl_ms: Option<u64>,
    pinned_until_ms: Option<u64>,
    /// It fades if this was its last use.
    faded_ms: Option<u64>,
    due_ms: u64,
}

impl Kept {
    fn keep(&self, used_ms: u64) -> Keep {
        match self {
            Kept { pinned_until_ms: Some(_), .. } => Keep::Pinned,
            Kept { faded_ms: Some(at), .. } if *at == used_ms => Keep::Fading,
            _ => Keep::Ordinary,
        }
    }

    /// When to look at it next.
    fn next_ms(&self, used_ms: u64) -> u64 {
        let ttl_ms = self.ttl_ms.unwrap_or(0);
        let lives_ms = if self.faded_ms == Some(used_ms) { ttl_ms } else { ttl_ms / 2 };
        self.pinned_until_ms.unwrap_or_else(|| used_ms.saturating_add(lives_ms))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Retentions {
    of: KeyMap<Kept>,
    by_due: BTreeSet<(u64, BlockKey)>,
    pinned: u64,
    pinned_max: u64,
}

impl Retentions {
    /// None yet; at most `pinned_max` blocks are pinned at once.
    pub fn new(pinned_max: u64) -> Self {
        Self { of: KeyMap::default(), by_due: BTreeSet::new(), pinned: 0, pinned_max }
    }

    /// From now on so many may be pinned; those that are stay pinned.
    pub fn set_pinned_max(&mut self, pinned_max: u64) {
        self.pinned_max = pinned_max;
    }

    /// Blocks pinned.
    pub fn pinned(&self) -> u64 {
        self.pinned
    }

    /// Whether the common time to live does not count for a block.
    pub fn has(&self, key: &BlockKey) -> bool {
        self.of.contains_key(key)
    }

    /// How a block stands, whose last use is this.
    pub fn keep(&self, key: &BlockKey, used_ms: u64) -> Keep {
        self.of.get(key).map_or(Keep::Ordinary, |kept| kept.keep(used_ms))
    }

    /// Something is said of a known block. A pin that is refused leaves its time to live in force.
    pub fn retain(
        &mut self,
        key: BlockKey,
        used_ms: u64,
        said: Retention,
        now_ms: u64,
    ) -> Result<(), Refused> {
        let old = self.of.get(&key).copied();
        if old.is_none() && self.of.len() >= RETENTIONS_MAX {
            return Err(Refused::Retentions);
        }
        let was_pinned = old.is_some_and(|kept| kept.pinned_until_ms.is_some());
        let mut pin = said.pinned_until_ms.filter(|until_ms| *until_ms > now_ms);
        let is_refused = pin.is_some() && !was_pinned && self.pinned >= self.pinned_max;
        if is_refused {
            pin = None;
        }
        let pinned_until_ms = pin.max(old.and_then(|kept| kept.pinned_until_ms));
        let ttl_ms = said.ttl_ms.max(old.and_then(|kept| kept.ttl_ms));
        if ttl_ms.is_some() || pinned_until_ms.is_some() {
            self.pinned += u64::from(pinned_until_ms.is_some() && !was_pinned);
            let kept = Kept { ttl_ms, pinned_until_ms, faded_ms: None, due_ms: 0 };
            self.set(key, used_ms, kept);
        }
        if is_refused { Err(Refused::Pins) } else { Ok(()) }
    }

    fn set(&mut self, key: BlockKey, used_ms: u64, mut kept: Kept) {
        kept.due_ms = kept.next_ms(used_ms);
        if let Some(old) = self.of.insert(key, kept) {
            self.by_due.remove(&(old.due_ms, key));
        }
        self.by_due.insert((kept.due_ms, key));
    }

    /// A block is known no more.
    pub fn forget(&mut self, key: &BlockKey) {
        if let Some(kept) = self.of.remove(key) {
            self.by_due.remove(&(kept.due_ms, *key));
            self.pinned -= u64::from(kept.pinned_until_ms.is_some());
        }
    }

    /// What time has changed by now, in bounded steps: what is left over comes with the next call. `used_ms`:
    /// a block's last use, if it is known.
    pub fn due(&mut self, now_ms: u64, used_ms: impl Fn(&BlockKey) -> Option<u64>) -> Vec<Due> {
        let mut came_due = Vec::new();
        for _ in 0..DUE_PER_CALL {
            let Some(&(due_ms, key)) = self.by_due.first() else { break };
            if due_ms > now_ms {
                break;
            }
            let (Some(kept), Some(used_ms)) = (self.of.get(&key).copied(), used_ms(&key)) else {
                self.forget(&key);
                continue;
            };
            let pinned_until_ms = kept.pinned_until_ms.filter(|until_ms| *until_ms > now_ms);
            self.pinned -= u64::from(pinned_until_ms != kept.pinned_until_ms);
            let now = Kept { pinned_until_ms, ..kept };
            let lived_ms = now_ms.saturating_sub(used_ms);
            let change = match kept.ttl_ms {
                _ if pinned_until_ms.is_some() => None,
                Some(ttl_ms) if lived_ms >= ttl_ms => {
                    self.set(key, used_ms, now);
                    self.forget(&key);
                    came_due.push(Due::Expired(key));
                    continue;
                }
                Some(ttl_ms) if lived_ms >= ttl_ms / 2 => Some(used_ms),
                Some(_) => None,
                None => {
                    self.set(key, used_ms, now);
                    self.forget(&key); // A pin that ended: the common rules count again.
                    came_due.push(Due::Changed(key));
                    continue;
                }
            };
            let now = Kept { faded_ms: change, ..now };
            if now.keep(used_ms) != kept.keep(used_ms) {
                came_due.push(Due::Changed(key));
            }
            self.set(key, used_ms, now);
        }
        came_due
    }

    /// Panics where the module's invariants do not hold.
    #[cfg(test)]
    fn self_check(&self) {
        let by_due: BTreeSet<_> = self.of.iter().map(|(key, kept)| (kept.due_ms, *key)).collect();
        assert_eq!(by_due, self.by_due);
        let is_pinned = |kept: &&Kept| kept.pinned_until_ms.is_some();
        assert_eq!(self.of.values().filter(is_pinned).count() as u64, self.pinned);
        assert!(self.pinned <= self.pinned_max, "more pinned than may be");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn key(number: u8) -> BlockKey {
        BlockKey([number; 32])
    }

    fn ttl(ttl_ms: u64) -> Retention {
        Retention { ttl_ms: Some(ttl_ms), pinned_until_ms: None }
    }

    fn pin(until_ms: u64) -> Retention {
        Retention { ttl_ms: None, pinned_until_ms: Some(until_ms) }
    }

    #[test]
    fn a_block_fades_at_half_its_time_and_expires_at_its_end() {
        let mut kept = Retentions::new(9);
        kept.retain(key(1), 1000, ttl(100), 1000).unwrap();
        let used = |_: &BlockKey| Some(1000);
        assert_eq!(kept.due(1049, used), []);
        assert_eq!(kept.due(1050, used), [Due::Changed(key(1))]);
        assert_eq!(kept.keep(&key(1), 1000), Keep::Fading);
        assert_eq!(kept.keep(&key(1), 1060), Keep::Ordinary, "a use ends it at once");
        assert_eq!(kept.due(1099, used), []);
        assert_eq!(kept.due(1100, used), [Due::Expired(key(1))]);
        assert!(!kept.has(&key(1)));
    }

    #[test]
    fn a_pinned_block_does_not_expire_before_its_time() {
        let mut kept = Retentions::new(9);
        let both = Retention { ttl_ms: Some(10), pinned_until_ms: Some(500) };
        kept.retain(key(1), 0, both, 0).unwrap();
        kept.retain(key(2), 0, pin(300), 0).unwrap();
        assert_eq!(kept.due(299, |_| Some(0)), []);
        assert_eq!(kept.due(499, |_| Some(0)), [Due::Changed(key(2))]);
        assert_eq!(kept.keep(&key(1), 0), Keep::Pinned);
        assert_eq!(kept.due(500, |_| Some(0)), [Due::Expired(key(1))]);
        assert_eq!(kept.pinned(), 0);
    }

    #[test]
    fn pins_over_the_bound_are_refused_and_come_free_with_their_blocks() {
        let mut kept = Retentions::new(1);
        kept.retain(key(1), 0, pin(500), 0).unwrap();
        assert_eq!(kept.retain(key(2), 0, pin(500), 0), Err(Refused::Pins));
        assert_eq!(kept.keep(&key(2), 0), Keep::Ordinary);
        kept.retain(key(1), 0, pin(900), 0).unwrap(); // The same block, for longer.
        kept.forget(&key(1));
        kept.retain(key(2), 0, pin(500), 0).unwrap();
    }

    #[derive(Debug, Clone)]
    enum Step {
        Say(u8, Option<u64>, Option<u64>),
        Use(u8),
        Forget(u8),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let (ttl, pin) = (proptest::option::of(1u64..60), proptest::option::of(1u64..60));
        prop_oneof![
            (0u8..6, ttl, pin).prop_map(|(block, ttl, pin)| Step::Say(block, ttl, pin)),
            (0u8..6).prop_map(Step::Use),
            (0u8..6).prop_map(Step::Forget),
            (1u64..40).prop_map(Step::Wait),
        ]
    }

    /// A block of the oracle: last use, time to live, pinned until.
    type Said = (u64, Option<u64>, Option<u64>);

    proptest! {
        /// Oracle: look at every block at every step.
        #[test]
        fn time_does_to_blocks_what_was_said(steps in proptest::collection::vec(step(), 1..80)) {
            let mut kept = Retentions::new(2);
            let mut blocks: BTreeMap<u8, Said> = (0..6).map(|block| (block, (0, None, None))).collect();
            let mut now_ms = 0;
            for step in steps {
                match step {
                    Step::Say(block, ttl_ms, pin) => {
                        let Some((used_ms, ttl, until)) = blocks.get(&block).copied() else { continue };
                        let pinned_until_ms = pin.map(|pin| now_ms + pin);
                        let said = Retention { ttl_ms, pinned_until_ms };
                        let result = kept.retain(key(block), used_ms, said, now_ms);
                        let pinned = blocks.values().filter(|(_, _, until)| until.is_some()).count();
                        let is_refused = pin.is_some() && until.is_none() && pinned >= 2;
                        prop_assert_eq!(result.is_err(), is_refused);
                        let until = until.max(pinned_until_ms.filter(|_| !is_refused));
                        blocks.insert(block, (used_ms, ttl.max(ttl_ms), until));
                    }
                    Step::Use(block) => {
                        blocks.entry(block).and_modify(|(used_ms, ..)| *used_ms = now_ms);
                    }
                    Step::Forget(block) => {
                        blocks.remove(&block);
                        kept.forget(&key(block));
                    }
                    Step::Wait(ms) => now_ms += ms,
                }
                let used = |key: &BlockKey| blocks.get(&key.0[0]).map(|(used_ms, ..)| *used_ms);
                for due in kept.due(now_ms, used) {
                    if let Due::Expired(key) = due {
                        let (used_ms, ttl, until) = blocks.remove(&key.0[0]).unwrap();
                        prop_assert!(until.is_none_or(|until| until <= now_ms), "pinned");
                        prop_assert!(used_ms + ttl.unwrap() <= now_ms, "not yet");
                    }
                }
                kept.self_check();
                for (block, (used_ms, ttl, until)) in &mut blocks {
                    *until = until.filter(|until| *until > now_ms);
                    let lived_ms = now_ms - *used_ms;
                    let wanted = match (*until, *ttl) {
                        (Some(_), _) => Keep::Pinned,
                        (None, Some(ttl)) => {
                            prop_assert!(lived_ms < ttl, "expired, and not told");
                            if lived_ms >= ttl / 2 { Keep::Fading } else { Keep::Ordinary }
                        }
                        (None, None) => Keep::Ordinary,
                    };
                    prop_assert_eq!(kept.keep(&key(*block), *used_ms), wanted);
                }
            }
        }
    }
}
