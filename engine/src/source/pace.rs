//! A limit on how much is read in a second.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Keeps all readers together below a rate.
pub struct Pace {
    rate: Option<u64>,
    next: Mutex<Instant>,
}

impl Pace {
    /// At most `rate` bytes a second.
    pub fn new(rate: Option<u64>) -> Self {
        Self {
            rate: rate.filter(|&rate| rate > 0),
            next: Mutex::new(Instant::now()),
        }
    }

    /// Waits until `bytes` may be read. Blocks.
    pub fn wait(&self, bytes: u64) {
        std::thread::sleep(self.pause(bytes));
    }

    /// The same, without blocking.
    pub async fn wait_async(&self, bytes: u64) {
        tokio::time::sleep(self.pause(bytes)).await;
    }

    fn pause(&self, bytes: u64) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let now = Instant::now();
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let from = (*next).max(now);
        *next = from + Duration::from_secs_f64(bytes as f64 / rate as f64);
        from.saturating_duration_since(now)
    }
}
