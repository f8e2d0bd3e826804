//! A [`Bucket`] that all transfers of one direction share, with a clock.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;

use super::bucket::Bucket;

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

    /// Waits until `bytes` more may go.
    pub async fn wait(&self, bytes: u64) {
        let now = self.start.elapsed();
        let wait = self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(now, bytes);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}
