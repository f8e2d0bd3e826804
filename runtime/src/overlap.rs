//! When to load a history, when to wait for it, and when to compute it: CachedAttention's buffers as functions of
//! measured rates of the link, the disk and the prefill.
//!
//! A history is copied layer by layer ahead of the compute (ATC'24, section 3.2.1). The copy hides entirely
//! behind the prefill of the new tokens while `T_load * L_hist <= T_pref * L_new`; otherwise it must
//! have begun earlier, by
//!
//! ```text
//! S_buf = B * (T_load * L_hist - T_pref * L_new)          bytes already on the device at the start
//! ```
//!
//! so a load starts while its sequence still waits, and the sequence joins the steps when that much of
//! it has arrived: the others never stand waiting for its layers. Pure: rates and times come in.

use std::time::Duration;

/// Share of a new measurement in a rate: about the last eight count.
const SHARE: f64 = 0.125;

/// Before anything is measured: a small model on two cores, a copy through memory. The first
/// measurements replace them.
const PREFILL_SECONDS_PER_TOKEN: f64 = 1.0 / 250.0;
const LOAD_SECONDS_PER_TOKEN: f64 = 1.0 / 100_000.0;
/// A disk is worth a try.
const PROMOTE_SECONDS_PER_TOKEN: f64 = 0.0;

/// A queue waits at least this long for an answer of the daemon: a round trip through two rings on a
/// busy machine. Below it, recomputing is never worth the trouble of a miss.
pub const ANSWER_WAIT_MIN: Duration = Duration::from_millis(20);

/// Seconds a token takes on each way to the device.
#[derive(Debug, Clone, PartialEq)]
pub struct Rates {
    prefill: Rate,
    load: Rate,
    promote: Rate,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Rate {
    seconds_per_token: f64,
    measured: bool,
}

impl Rate {
    fn guess(seconds_per_token: f64) -> Self {
        Self { seconds_per_token, measured: false }
    }

    fn observe(&mut self, tokens: u32, time: Duration) {
        if tokens == 0 {
            return;
        }
        let seen = time.as_secs_f64() / f64::from(tokens);
        self.seconds_per_token = if self.measured {
            (1.0 - SHARE) * self.seconds_per_token + SHARE * seen
        } else {
            seen
        };
        self.measured = true;
    }

    fn seconds(self, tokens: u32) -> f64 {
        self.seconds_per_token * f64::from(tokens)
    }
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            prefill: Rate::guess(PREFILL_SECONDS_PER_TOKEN),
            load: Rate::guess(LOAD_SECONDS_PER_TOKEN),
            promote: Rate::guess(PROMOTE_SECONDS_PER_TOKEN),
        }
    }
}

impl Rates {
    /// A step computed `tokens` prompt tokens in `time`.
    pub fn observe_prefill(&mut self, tokens: u32, time: Duration) {
        self.prefill.observe(tokens, time);
    }

    /// `tokens` of KV went from frames to device blocks in `time`.
    pub fn observe_load(&mut self, tokens: u32, time: Duration) {
        self.load.observe(tokens, time);
    }

    /// The daemon brought `tokens` of KV from disk in `time`, what was before them in its queue included.
    pub fn observe_promote(&mut self, tokens: u32, time: Duration) {
        self.promote.observe(tokens, time);
    }

    /// It had not brought them after `time`: the rate is no better than that.
    pub fn observe_late_promote(&mut self, tokens: u32, time: Duration) {
        if time.as_secs_f64() > self.promote.seconds(tokens) {
            self.promote.observe(tokens, time);
        }
    }

    /// A promote was not worth waiting for: as with loads, a slow one does not end all for good.
    pub fn doubt_promote(&mut self) {
        self.promote.seconds_per_token *= 1.0 - SHARE;
    }

    /// A load was not worth its time: the rate is trusted a little less, so that one slow copy does not
    /// end all loads for good.
    pub fn doubt_load(&mut self) {
        self.load.seconds_per_token *= 1.0 - SHARE;
    }

    /// Time to compute `tokens`.
    pub fn prefill_time(&self, tokens: u32) -> Duration {
        seconds(self.prefill.seconds(tokens))
    }

    /// How long before its sequence's first step a load of `history` tokens must begin, so that
    /// `new` tokens of compute hide the rest of it: `S_buf / B`.
    pub fn load_lead(&self, history: u32, new: u32) -> Duration {
        seconds(self.load.seconds(history) - self.prefill.seconds(new))
    }

    /// `S_buf`: bytes of the history to have on the device before the first step.
    pub fn read_buffer_bytes(&self, bytes_per_token: u64, history: u32, new: u32) -> u64 {
        let bytes_per_second = bytes_per_token as f64 / self.load.seconds_per_token;
        (bytes_per_second * self.load_lead(history, new).as_secs_f64()).ceil() as u64
    }

    /// Whether loading `tokens` from frames is faster than computing them.
    pub fn load_pays(&self, tokens: u32) -> bool {
        self.load.seconds(tokens) < self.prefill.seconds(tokens)
    }

    /// Whether waiting until `tokens` have come from disk, and loading them, is faster than computing them.
    pub fn promote_pays(&self, tokens: u32) -> bool {
        let seconds = self.promote.seconds(tokens) + self.load.seconds(tokens);
        seconds < self.prefill.seconds(tokens)
    }

    /// How long a sequence may stay queued for `tokens` that the daemon brings: no longer than
    /// computing them takes, but never less than [`ANSWER_WAIT_MIN`].
    pub fn promote_wait_max(&self, tokens: u32) -> Duration {
        seconds(self.prefill.seconds(tokens) - self.load.seconds(tokens)).max(ANSWER_WAIT_MIN)
    }
}

/// A duration of what may be negative or not finite.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The paper's LLaMA-65B on four A100: about 96 µs a token to load, 180 µs to compute.
    fn paper() -> Rates {
        let mut rates = Rates::default();
        rates.observe_load(2048, Duration::from_millis(192));
        rates.observe_prefill(2000, Duration::from_millis(360));
        rates
    }

    #[test]
    fn the_papers_buffer_is_needed_once_history_is_1_9_times_the_new_tokens() {
        let rates = paper();
        assert_eq!(rates.load_lead(1900, 1020), Duration::ZERO);
        assert!(rates.load_lead(1950, 1000) > Duration::ZERO);
    }

    #[test]
    fn the_read_buffer_is_the_part_of_the_history_that_compute_does_not_hide() {
        let rates = paper();
        // 0.192 s to load 2,048 tokens of 2.5 MB each, 0.018 s to compute 100: all but 192 tokens.
        let bytes = rates.read_buffer_bytes(2_500_000, 2048, 100);
        let tokens = bytes as f64 / 2_500_000.0;
        assert!((tokens - 1856.0).abs() < 1.0, "{tokens} tokens");
    }

    #[test]
    fn a_history_that_loads_slower_than_it_computes_is_computed() {
        let mut rates = paper();
        assert!(rates.load_pays(1000));
        for _slow in 0..8 {
            rates.observe_load(1000, Duration::from_secs(1));
        }
        assert!(!rates.load_pays(1000));
    }

    #[test]
    fn a_slow_copy_does_not_end_all_loads_for_good() {
        let mut rates = paper();
        for _slow in 0..8 {
            rates.observe_load(1000, Duration::from_secs(1));
        }
        let refusals = std::iter::from_fn(|| (!rates.load_pays(1000)).then(|| rates.doubt_load()));
        assert!(refusals.take(100).count() < 100);
    }

    #[test]
    fn a_history_that_comes_from_disk_slower_than_it_computes_is_not_waited_for() {
        let mut rates = paper();
        assert!(rates.promote_pays(1000), "a disk that was never seen is tried");
        rates.observe_promote(1000, Duration::from_millis(60));
        assert!(rates.promote_pays(1000), "60 + 94 ms against 180");
        for _late in 0..16 {
            rates.observe_late_promote(1000, Duration::from_millis(100));
        }
        assert!(!rates.promote_pays(1000), "100 + 94 ms");
        let refusals =
            std::iter::from_fn(|| (!rates.promote_pays(1000)).then(|| rates.doubt_promote()));
        assert!(refusals.take(100).count() < 100, "and it is tried again");
    }

    #[test]
    fn a_deadline_teaches_nothing_about_a_disk_known_to_be_slower() {
        let mut rates = paper();
        rates.observe_promote(1000, Duration::from_secs(2));
        let before = rates.clone();
        rates.observe_late_promote(1000, Duration::from_millis(100));
        assert_eq!(rates, before);
    }

    #[test]
    fn a_wait_for_the_disk_is_no_longer_than_computing() {
        let rates = paper();
        assert!(rates.promote_wait_max(10_000) <= rates.prefill_time(10_000));
        assert_eq!(rates.promote_wait_max(1), ANSWER_WAIT_MIN);
    }

    proptest! {
        #[test]
        fn no_measurement_makes_a_time_that_is_none(
            tokens: u32, nanos: u64, history: u32, new: u32, bytes: u64,
        ) {
            let mut rates = Rates::default();
            rates.observe_load(tokens, Duration::from_nanos(nanos));
            rates.observe_prefill(tokens, Duration::from_nanos(nanos));
            let _ = rates.load_lead(history, new);
            let _ = rates.read_buffer_bytes(bytes, history, new);
            prop_assert!(rates.promote_wait_max(history) >= ANSWER_WAIT_MIN);
        }
    }
}
