//! How many bytes may be written to disk: a drive's life is a number of bytes. A token bucket over the day's
//! bytes; when it runs short, what was never used again goes without. Pure: the clock is an argument.
//!
//! ```text
//! full ─────────── everything is written
//! half ─────────── only what was used again, or a queued turn needs
//! empty ────────── nothing
//! ```
//!
//! A conversation's new blocks count as used again when the block before them was: it has come back once, and
//! those that have come back come back more often.

/// The bucket holds what this long may write: an hour's peak is levelled out, a day's is not.
const BURST_MS: u64 = 3_600_000;
const DAY_MS: u64 = 86_400_000;

/// What speaks for a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Worth {
    /// It, or what it continues, was read again after it was made; or a queued turn will read it.
    Proven,
    /// Nothing yet.
    Unproven,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct WriteBudget {
    /// `None`: no bound.
    bytes_per_day: Option<u64>,
    left: f64,
    at_ms: Option<u64>,
}

impl WriteBudget {
    /// A full bucket.
    pub fn new(bytes_per_day: Option<u64>) -> Self {
        let mut budget = Self { bytes_per_day, left: 0.0, at_ms: None };
        budget.left = budget.bytes_max();
        budget
    }

    /// Another bound from now on; what was saved up stays, as far as it fits. The first one begins full.
    pub fn set(&mut self, bytes_per_day: Option<u64>) {
        if self.bytes_per_day.is_none() {
            self.left = f64::MAX;
        }
        self.bytes_per_day = bytes_per_day;
        self.left = self.left.min(self.bytes_max());
    }

    /// Bytes that may be written in a day.
    pub fn bytes_per_day(&self) -> Option<u64> {
        self.bytes_per_day
    }

    fn bytes_max(&self) -> f64 {
        self.bytes_per_day.unwrap_or(0) as f64 * BURST_MS as f64 / DAY_MS as f64
    }

    fn fill(&mut self, now_ms: u64) {
        let since_ms = now_ms.saturating_sub(*self.at_ms.get_or_insert(now_ms));
        self.at_ms = self.at_ms.max(Some(now_ms));
        let more = self.bytes_per_day.unwrap_or(0) as f64 * since_ms as f64 / DAY_MS as f64;
        self.left = (self.left + more).min(self.bytes_max());
    }

    /// Whether a block may be written now. A block larger than the whole bucket waits until that is full.
    pub fn allows(&mut self, bytes: u64, worth: Worth, now_ms: u64) -> bool {
        if self.bytes_per_day.is_none() {
            return true;
        }
        self.fill(now_ms);
        let floor = match worth {
            Worth::Proven => 0.0,
            Worth::Unproven => self.bytes_max() / 2.0,
        };
        self.left >= (floor + bytes as f64).min(self.bytes_max()) && self.bytes_max() > 0.0
    }

    /// A block is written.
    pub fn spend(&mut self, bytes: u64) {
        if self.bytes_per_day.is_some() {
            self.left -= bytes as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn without_a_bound_everything_is_written() {
        let mut budget = WriteBudget::new(None);
        budget.spend(u64::MAX);
        assert!(budget.allows(u64::MAX, Worth::Unproven, 5));
    }

    #[test]
    fn when_it_runs_short_what_was_used_again_is_written_before_the_rest() {
        let mut budget = WriteBudget::new(Some(24 * 100)); // A hundred bytes an hour.
        let mut write = |worth| {
            let allowed = budget.allows(10, worth, 0);
            budget.spend(if allowed { 10 } else { 0 });
            allowed
        };
        let unproven = (0..10).filter(|_| write(Worth::Unproven)).count();
        let proven = (0..10).filter(|_| write(Worth::Proven)).count();
        assert_eq!((unproven, proven), (5, 5));
    }

    #[test]
    fn another_bound_holds_from_now_on() {
        let mut budget = WriteBudget::new(None);
        budget.set(Some(2400));
        assert!(budget.allows(100, Worth::Proven, 0));
        budget.spend(100);
        assert!(!budget.allows(10, Worth::Proven, 0));
        budget.set(None);
        assert!(budget.allows(u64::MAX, Worth::Unproven, 0));
    }

    #[test]
    fn a_budget_of_nothing_writes_nothing() {
        assert!(!WriteBudget::new(Some(0)).allows(0, Worth::Proven, 9));
    }

    proptest! {
        /// Over any stretch of time no more than the bucket and what ran into it meanwhile, and one block.
        #[test]
        fn no_more_is_written_than_the_day_allows(
            bytes_per_day in 1u64..1_000_000_000,
            writes in proptest::collection::vec((0u64..600_000, 1u64..1_000_000, any::<bool>()), 1..100),
        ) {
            let mut budget = WriteBudget::new(Some(bytes_per_day));
            let (mut now_ms, mut written, mut largest) = (0, 0, 0);
            for (wait_ms, bytes, is_proven) in writes {
                now_ms += wait_ms;
                largest = largest.max(bytes);
                let worth = if is_proven { Worth::Proven } else { Worth::Unproven };
                if budget.allows(bytes, worth, now_ms) {
                    budget.spend(bytes);
                    written += bytes;
                }
                let most = bytes_per_day as f64 * (BURST_MS + now_ms) as f64 / DAY_MS as f64;
                prop_assert!(written as f64 <= most + largest as f64 + 1.0);
            }
        }
    }
}
