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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_wait_for_what_all_of_them_have_read() {
        let pace = Pace::new(Some(1 << 20));
        // The first may read at once; each other one when the rate allows what was read before.
        assert_eq!(pace.pause(1 << 20), Duration::ZERO);
        let second = pace.pause(2 << 20);
        let third = pace.pause(1);
        for (pause, seconds) in [(second, 1.0), (third, 3.0)] {
            let pause = pause.as_secs_f64();
            assert!(pause <= seconds && pause > seconds - 0.9, "{pause} of {seconds}");
        }
    }

    #[test]
    fn without_a_rate_nobody_waits() {
        for rate in [None, Some(0)] {
            let pace = Pace::new(rate);
            assert_eq!(pace.pause(u64::MAX), Duration::ZERO);
            assert_eq!(pace.pause(1), Duration::ZERO);
        }
    }
}
