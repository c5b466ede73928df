//! Clock and randomness: the only place that asks the machine for either, so that a simulation can
//! drive both. And deliberate bugs, which show that tests would find them.

use std::sync::Arc;

use fairvault_format::public::Fresh;
use zeroize::Zeroizing;

use crate::error::{Error, Result};

/// Where time and randomness come from.
pub trait Env: Send + Sync + std::fmt::Debug {
    /// Microseconds since 1970-01-01 UTC.
    fn now_us(&self) -> i64;
    /// Fills `buffer` with random bytes fit for keys.
    fn random(&self, buffer: &mut [u8]) -> Result<()>;
}

/// The machine's own.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemEnv;

impl Env for SystemEnv {
    fn now_us(&self) -> i64 {
        jiff::Timestamp::now().as_microsecond()
    }

    fn random(&self, buffer: &mut [u8]) -> Result<()> {
        getrandom::fill(buffer).map_err(|e| Error::failed(format!("the machine gave no random bytes: {e}")))
    }
}

/// A shared environment.
pub type SharedEnv = Arc<dyn Env>;

/// 32 fresh random bytes.
pub fn salt(env: &dyn Env) -> Result<[u8; 32]> {
    let mut salt = [0u8; 32];
    env.random(&mut salt)?;
    Ok(salt)
}

/// What a new object with content is made with.
pub fn fresh(env: &dyn Env) -> Result<Fresh> {
    let mut ephemeral = Zeroizing::new([0u8; 32]);
    env.random(&mut *ephemeral)?;
    Ok(Fresh::new(salt(env)?, *ephemeral))
}

/// 16 fresh random bytes.
pub fn id(env: &dyn Env) -> Result<[u8; 16]> {
    let mut id = [0u8; 16];
    env.random(&mut id)?;
    Ok(id)
}

/// A deliberate bug, to show that tests find it, or less patience, so that tests need not wait: in builds with debug assertions only, and only if `FAIRVAULT_FAULT`
/// names it.
pub(crate) fn has_fault(name: &str) -> bool {
    use std::sync::LazyLock;
    static FAULT: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("FAIRVAULT_FAULT").ok());
    cfg!(debug_assertions) && FAULT.as_deref() == Some(name)
}
