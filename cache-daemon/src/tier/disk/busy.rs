//! How long the disk has been at work: the time in which at least one job of a kind ran.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
struct State {
    running: u32,
    since: Option<Instant>,
    total: Duration,
}

/// A clock that runs while at least one job does. Its seconds by those of the wall are the disk's share of use.
#[derive(Debug, Default)]
pub struct Busy {
    state: Mutex<State>,
}

impl Busy {
    /// Does a job while the clock runs.
    pub fn during<R>(&self, job: impl FnOnce() -> R) -> R {
        self.begin(Instant::now());
        let result = job();
        self.end(Instant::now());
        result
    }

    fn begin(&self, now: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.running == 0 {
            state.since = Some(now);
        }
        state.running += 1;
    }

    fn end(&self, now: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running -= 1;
        if state.running == 0
            && let Some(since) = state.since.take()
        {
            state.total += now.duration_since(since);
        }
    }

    /// So far, jobs that still run included.
    pub fn total(&self) -> Duration {
        self.total_at(Instant::now())
    }

    fn total_at(&self, now: Instant) -> Duration {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let running = state.since.map_or(Duration::ZERO, |since| now.duration_since(since));
        state.total + running
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_side_by_side_are_busy_once_and_pauses_are_not() {
        let (busy, start) = (Busy::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        busy.begin(at(1));
        busy.begin(at(2));
        busy.end(at(4));
        assert_eq!(busy.total_at(at(5)), Duration::from_secs(4));
        busy.end(at(6));
        busy.begin(at(10));
        busy.end(at(11));
        assert_eq!(busy.total_at(at(20)), Duration::from_secs(6));
    }
}
