//! Clocks that are wrong.

use fairvault_engine::env::{Env, SystemEnv};
use fairvault_engine::error::Result;

const DAY_US: i64 = 86_400_000_000;

/// A machine whose clock is ahead.
#[derive(Debug)]
pub struct Ahead {
    /// By so many days; behind, if negative.
    pub days: i64,
}

impl Env for Ahead {
    fn now_us(&self) -> i64 {
        SystemEnv.now_us() + self.days * DAY_US
    }

    fn random(&self, buffer: &mut [u8]) -> Result<()> {
        SystemEnv.random(buffer)
    }
}
