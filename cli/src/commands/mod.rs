//! One file a verb: options to engine calls, reports to output.

pub mod audit;
pub mod backup;
pub mod check;
pub mod expire;
pub mod gc;
pub mod info;
pub mod key;
pub mod repair;
pub mod restore;
pub mod stanza;
pub mod verify;
pub mod wal;

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
