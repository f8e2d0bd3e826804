//! What an idle engine waits on: one bell that http, the backend and the cache client ring alike.
//!
//! A ring is never lost: it sets a flag under the lock before it wakes, and [`Doorbell::wait`]
//! clears the flag before it returns.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// The waiting end. The engine thread owns it.
#[derive(Debug, Default)]
pub struct Doorbell {
    bell: Arc<Bell>,
}

/// The ringing end.
#[derive(Debug, Clone)]
pub struct Waker {
    bell: Arc<Bell>,
}

#[derive(Debug, Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Doorbell {
    /// A silent bell.
    pub fn new() -> Self {
        Self::default()
    }

    /// A handle that rings this bell.
    pub fn waker(&self) -> Waker {
        Waker { bell: self.bell.clone() }
    }

    /// Returns when the bell was rung since the last call, or after `limit`.
    pub fn wait(&self, limit: Duration) {
        let rung = self.bell.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut rung, _timed_out) = self
            .bell
            .changed
            .wait_timeout_while(rung, limit, |rung| !*rung)
            .unwrap_or_else(PoisonError::into_inner);
        *rung = false;
    }
}

impl Waker {
    /// Wakes the engine, now or when it next waits.
    pub fn ring(&self) {
        *self.bell.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.bell.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_before_the_wait_is_not_lost() {
        let doorbell = Doorbell::new();
        doorbell.waker().ring();
        // Would hang for an hour if the ring were lost.
        doorbell.wait(Duration::from_secs(3600));
    }

    #[test]
    fn a_wait_without_a_ring_ends_at_its_limit() {
        Doorbell::new().wait(Duration::ZERO);
    }
}
