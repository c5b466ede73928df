//! One file a verb: options to engine calls, reports to output.

pub mod audit;
pub mod backup;
pub mod check;
pub mod copy;
pub mod erase;
pub mod expire;
pub mod gc;
pub mod info;
pub mod key;
mod kit;
pub mod lock;
pub mod repair;
pub mod restore;
mod slot;
pub mod stanza;
pub mod verify;
pub mod wal;

use std::sync::Arc;

use fairvault_engine::commit::Log;
use fairvault_engine::error::Result;

use crate::away::Away;
use crate::context::Context;

/// How a command ended, if it did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// Done, with warnings that need a person.
    Warnings,
    /// `wal get`: proven absent.
    Absent,
    /// `verify`, `repair`: damage was found.
    DamageFound,
    /// `gc`: somebody at work has to be waited for.
    Held,
}

/// Completes when the process is asked to stop.
pub async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        let _ = tokio::signal::ctrl_c().await;
        return;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

/// A repository's log, as far as it can be had: an optional one that is away is said to be, and left out.
pub async fn or_left_out(context: &Arc<Context>, stanza: &str, repository: &str) -> Result<Option<Log>> {
    let is_optional = context.is_optional(repository);
    match copy::open(context, stanza, repository, is_optional).await {
        Ok(log) => Ok(Some(log)),
        Err(error) if is_optional => {
            Away::of(context, stanza).alarm(repository, &error);
            tracing::warn!("the optional repository {repository} is left out: run this again when it is back");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
