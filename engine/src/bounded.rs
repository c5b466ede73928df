//! Work that may hang in a system call, as a store on a network disk does, and that nobody waits for longer than was said.

use std::time::Duration;

use crate::error::{Error, Result};

/// Does something on a thread of its own, and waits no longer than `limit` for it: a store may hang in a system call.
pub async fn bounded<T: Send + 'static, W: Future<Output = Result<T>>>(
    limit: Duration,
    work: impl FnOnce() -> W + Send + 'static,
) -> Result<T> {
    let runtime = tokio::runtime::Handle::current();
    let timed = move || runtime.block_on(async move { tokio::time::timeout(limit, work()).await });
    // A thread that hangs outlives this, and ends with the process.
    let waited = tokio::time::timeout(limit + Duration::from_millis(100), tokio::task::spawn_blocking(timed)).await;
    match waited {
        Ok(Ok(Ok(done))) => done,
        Ok(Err(error)) => Err(Error::failed("asking a repository panicked").caused_by(error)),
        Ok(Ok(Err(_))) | Err(_) => Err(Error::temporary(format!(
            "it did not answer within {} s",
            limit.as_secs()
        ))),
    }
}
