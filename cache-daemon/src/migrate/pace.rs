//! A [`Bucket`] that all transfers of one direction share, with a clock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::bucket::Bucket;

/// Of all that leaves this daemon for other places, and of all that comes from there.
#[derive(Debug, Clone)]
pub struct Paces {
    /// To other daemons, and to the remote tier.
    pub sending: Pace,
    /// From there.
    pub receiving: Pace,
}

impl Paces {
    /// Each at most so many bytes a second; 0 is no limit.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { sending: Pace::new(bytes_per_second), receiving: Pace::new(bytes_per_second) }
    }

    /// Another rate for both.
    pub fn set(&self, bytes_per_second: u64) {
        self.sending.set(bytes_per_second);
        self.receiving.set(bytes_per_second);
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Pace {
    bucket: Arc<Mutex<Bucket>>,
    start: Instant,
}

impl Pace {
    /// At most so many bytes a second; 0 is no limit.
    pub fn new(bytes_per_second: u64) -> Self {
        let bucket = Arc::new(Mutex::new(Bucket::new(bytes_per_second)));
        Self { bucket, start: Instant::now() }
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Bucket::set`].
    pub fn set(&self, bytes_per_second: u64) {
        self.lock().set(bytes_per_second);
    }

    /// See [`Bucket::bytes_per_second`].
    pub fn bytes_per_second(&self) -> u64 {
        self.lock().bytes_per_second()
    }

    /// Waits until `bytes` more may go.
    pub async fn wait(&self, bytes: u64) {
        let now = self.start.elapsed();
        let wait = self.lock().take(now, bytes);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}
