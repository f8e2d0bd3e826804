//! A token bucket: how long the next bytes have to wait so that no more than a rate goes over the wire.
//! Pure: the clock is an argument.

use std::time::Duration;

/// Bytes that may go at once after a pause, as time at the full rate: long enough that timers of a
/// millisecond cost no throughput, short enough that a link is not flooded.
const BURST: Duration = Duration::from_millis(50);

/// See the module.
#[derive(Debug, Clone)]
pub struct Bucket {
    /// `None` is no limit.
    bytes_per_second: Option<u64>,
    /// When everything taken so far will have gone at the rate.
    paid_until: Duration,
}

impl Bucket {
    /// A full one; a rate of 0 is no limit.
    pub fn new(bytes_per_second: u64) -> Self {
        let bytes_per_second = (bytes_per_second > 0).then_some(bytes_per_second);
        Self { bytes_per_second, paid_until: Duration::ZERO }
    }

    /// Another rate from now on; 0 is no limit. What was taken is paid for at the rate it was taken at.
    pub fn set(&mut self, bytes_per_second: u64) {
        self.bytes_per_second = (bytes_per_second > 0).then_some(bytes_per_second);
    }

    /// The rate; 0 is no limit.
    pub fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second.unwrap_or(0)
    }

    /// Takes `bytes` at `now`; they may go after the time given back. More bytes than a burst may be taken
    /// at once: they are paid for before the next ones.
    pub fn take(&mut self, now: Duration, bytes: u64) -> Duration {
        let Some(rate) = self.bytes_per_second else { return Duration::ZERO };
        let earliest = now.saturating_sub(BURST);
        let start = self.paid_until.max(earliest);
        self.paid_until = start + Duration::from_secs_f64(bytes as f64 / rate as f64);
        start.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn without_a_rate_nothing_waits() {
        let mut bucket = Bucket::new(0);
        assert_eq!(bucket.take(Duration::ZERO, u64::MAX), Duration::ZERO);
        assert_eq!(bucket.take(Duration::ZERO, u64::MAX), Duration::ZERO);
    }

    proptest! {
        /// Oracle: over any stretch of time, no more than the rate, one burst and one taking.
        #[test]
        fn no_stretch_of_time_sees_more_than_the_rate(
            takes in proptest::collection::vec((0u64..300, 1u64..100_000), 1..60),
        ) {
            let rate = 1_000_000;
            let mut bucket = Bucket::new(rate);
            let (mut now, mut sent) = (Duration::ZERO, Vec::new());
            for (pause_ms, bytes) in takes {
                now += Duration::from_millis(pause_ms);
                now += bucket.take(now, bytes); // Whoever takes, waits.
                sent.push((now, bytes));
            }
            for (first, (from, _)) in sent.iter().enumerate() {
                let mut sum = 0;
                for (until, bytes) in &sent[first..] {
                    let stretch = until.saturating_sub(*from) + BURST;
                    let allowed = rate as f64 * stretch.as_secs_f64();
                    prop_assert!(sum as f64 <= allowed + 100_000.0, "{sum} bytes, {allowed}");
                    sum += bytes;
                }
            }
        }

        /// And nobody waits longer than the rate asks for.
        #[test]
        fn the_rate_is_reached(sizes in proptest::collection::vec(1u64..100_000, 1..60)) {
            let mut bucket = Bucket::new(1_000_000);
            let mut now = Duration::from_secs(1);
            for bytes in &sizes {
                now += bucket.take(now, *bytes);
            }
            let all = Duration::from_secs_f64(sizes.iter().sum::<u64>() as f64 / 1e6);
            prop_assert!(now <= Duration::from_secs(1) + all);
        }
    }
}
