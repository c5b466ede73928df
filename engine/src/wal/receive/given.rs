//! Receiving from somebody in the same process who has WAL, and is no server: a simulation.
//!
//! What always holds: from where the repository ends to what is reported as durable, it is the work that is done for a
//! server; only the connection is left out, and the attempts that follow on a failure.

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use super::origin::Origin;
use super::start::{self, Lessons};
use super::storing::Guard;
use super::{Options, check_segment_size, pump};
use crate::commit::Log;
use crate::error::Result;
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::History;
use crate::replication::connection::SystemIdentity;
use crate::wal::archive::Archive;

/// Somebody who hands over WAL.
#[derive(Debug)]
pub struct Given {
    /// Runs of WAL, each beginning where the one before ended.
    pub wal: mpsc::Receiver<(Lsn, Bytes)>,
    /// Up to where it is durable in the repository; 0 as long as that is not known.
    pub durable: watch::Sender<Lsn>,
}

/// One attempt, until nothing more is handed over. `identify` says who it is, and up to where there is WAL; `hand_over` is
/// told where WAL must begin.
pub async fn receive(
    log: Log,
    options: &Options,
    identify: impl Fn() -> SystemIdentity,
    segment_size: u64,
    hand_over: impl FnOnce(Lsn) -> Given,
) -> Result<()> {
    let identity = identify();
    let guard = Guard::new(log);
    let archive = {
        let mut log = guard.log().await;
        log.refresh().await?;
        Archive::open(&log, Some(identity.system_identifier), options.compression)?
    };
    check_segment_size(&archive, segment_size)?;
    let history = History {
        timeline: identity.timeline,
        ancestors: Vec::new(),
    };
    let start = start::find(&archive, &history, &identity, &Lessons::default()).await?;
    start::check(&start, &history, &identify(), false, archive.segment_size)?;
    let given = hand_over(start.segment.start(archive.segment_size));
    let (_stop, never) = watch::channel(false);
    let outcome = pump::run(&guard, &archive, options, Origin::Given(given), start, never).await;
    outcome.ended.map(|_| ())
}
