//! What hints were worth: how long before its turn a block came, which blocks came for nothing, which of the
//! foretold turns came.
//!
//! ```text
//! promoted for a hint ──► Waiting ──a lookup finds it──► lead time
//!                            └──leaves its frame────────► wasted bytes
//! ```

use std::sync::Arc;
use std::time::Instant;

use kv_protocol::BlockKey;
use kv_protocol::message::Hint;

use crate::key_map::KeyMap;
use crate::metrics::Metrics;

/// Blocks that hints brought and no lookup has found yet: each is in a frame, so that the frames bound them.
pub struct Foresight {
    metrics: Arc<Metrics>,
    waiting: KeyMap<Instant>,
}

impl Foresight {
    /// Nothing is foreseen.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, waiting: KeyMap::default() }
    }

    /// A hint's block is in its frame.
    pub fn promoted(&mut self, key: BlockKey, now: Instant) {
        self.waiting.insert(key, now);
    }

    /// A lookup found a hint's block.
    pub fn found(&mut self, key: &BlockKey, now: Instant) {
        if let Some(promoted) = self.waiting.remove(key) {
            let lead = now.duration_since(promoted);
            self.metrics.prefetch_lead_seconds.observe(lead.as_secs_f64());
        }
    }

    /// A block of `bytes` leaves its frame; if a hint brought it, for nothing.
    pub fn left(&mut self, key: &BlockKey, bytes: u64) {
        if self.waiting.remove(key).is_some() {
            self.metrics.prefetch_wasted_bytes.inc_by(bytes);
        }
    }
}

/// A turn that was foretold, until it is known whether it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foretold {
    /// By its place in the queue.
    Queued,
    /// By a client whose user types.
    Anticipated,
}

impl Foretold {
    /// By what a hint says.
    pub fn by(hint: Hint) -> Self {
        match hint {
            Hint::Queued { .. } => Self::Queued,
            Hint::Anticipated => Self::Anticipated,
        }
    }

    /// It came, or left without.
    pub fn ended(self, metrics: &Metrics, came: bool) {
        let kind = match self {
            Self::Queued => "queued",
            Self::Anticipated => "anticipated",
        };
        let outcome = if came { "came" } else { "left" };
        metrics.hinted_turns.with_label_values(&[kind, outcome]).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_block_is_found_in_time_or_wasted_but_never_both() {
        let metrics = Metrics::new().unwrap();
        let mut foresight = Foresight::new(metrics.clone());
        let (now, keys) = (Instant::now(), [1, 2, 3].map(|number| BlockKey([number; 32])));
        for key in &keys[..2] {
            foresight.promoted(*key, now);
        }
        foresight.found(&keys[0], now + Duration::from_secs(3));
        for key in &keys {
            foresight.left(key, 4096); // The first was used, the third nobody foresaw.
        }
        assert_eq!(metrics.prefetch_lead_seconds.get_sample_count(), 1);
        assert!((metrics.prefetch_lead_seconds.get_sample_sum() - 3.0).abs() < 1e-9);
        assert_eq!(metrics.prefetch_wasted_bytes.get(), 4096);
    }
}
