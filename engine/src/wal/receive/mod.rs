//! `wal receive`: WAL in the repository seconds after it was written.
//!
//! What always holds: the server is told that WAL is flushed only once it is durable in the repository;
//! WAL is stored in order and without a hole; what the server sends for a range that is stored already must
//! be the same bytes. Everything that the network, the server or the store can do to us for a while is
//! followed by another attempt, which begins exactly where the repository ends.

mod pump;
mod slot;
mod start;

use std::time::Duration;

use super::archive::Archive;
use crate::commit::Log;
use crate::error::{Error, Kind, Result};
use crate::postgres::segment::{History, WalFile};
use crate::replication::connection::{Connection, Mode, SystemIdentity};
use crate::replication::conninfo::ConnInfo;
use crate::replication::wal_stream::WalStream;

/// What to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// Server.
    pub conninfo: ConnInfo,
    /// Replication slot; it is made if it is not there. Without one, the server may remove WAL that was not
    /// received, and is told nothing about what is flushed.
    pub slot: Option<String>,
    /// How long WAL may wait before it is stored as a piece.
    pub flush_interval: Duration,
    /// Bytes that are stored as a piece at once.
    pub piece_size: u64,
    /// Store as soon as anything arrives: commits on the server wait for it.
    pub synchronous: bool,
    /// Leave pieces where they are, and seal them as the segment, instead of storing the segment anew.
    pub keep_pieces: bool,
    /// After a hole that nobody can fill any more: begin behind it.
    pub skip_gap: bool,
    /// zstd level.
    pub level: i32,
}

/// How one connection's work ended, if it did not fail.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// We were asked to stop.
    Stopped,
    /// The timeline ended, or somebody else ended the stream politely: go on with what comes next.
    Next,
}

/// Pause after a failure: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));

/// Receives until `cancelled` completes, or until something needs a person.
pub async fn run(log: &mut Log, options: &Options, cancelled: impl Future<Output = ()>) -> Result<()> {
    tokio::pin!(cancelled);
    let (stop_in, stop) = tokio::sync::watch::channel(false);
    let mut pause = PAUSES.0;
    let mut stopping = false;
    loop {
        let began = tokio::time::Instant::now();
        let attempt = once(log, options, stop.clone());
        tokio::pin!(attempt);
        let outcome = loop {
            tokio::select! {
                outcome = &mut attempt => break outcome,
                () = &mut cancelled, if !stopping => {
                    stopping = true;
                    let _ = stop_in.send(true);
                }
            }
        };
        match outcome {
            Ok(Ended::Stopped) => return Ok(()),
            Ok(Ended::Next) if !stopping => tokio::time::sleep(Duration::from_millis(200)).await,
            Err(error) if error.kind() == Kind::Temporary && !stopping => {
                if began.elapsed() > PAUSES.1 * 2 {
                    pause = PAUSES.0;
                }
                tracing::warn!("{error}; trying again in {} s", pause.as_secs_f32());
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = &mut cancelled => return Ok(()),
                }
                pause = (pause * 2).min(PAUSES.1);
            }
            Ok(Ended::Next) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

async fn once(log: &mut Log, options: &Options, stop: tokio::sync::watch::Receiver<bool>) -> Result<Ended> {
    let mut connection = Connection::open(&options.conninfo, Mode::Replication).await?;
    let server = connection.identify().await?;
    log.refresh().await?;
    let archive = Archive::open(log, Some(server.system_identifier), options.level)?;
    if connection.wal_segment_size().await? != archive.segment_size {
        return Err(Error::refused(format!(
            "the server's WAL segments are not of {} bytes, as the stanza's are",
            archive.segment_size
        )));
    }
    let history = store_history(&mut connection, &archive, server.timeline).await?;
    if let Some(name) = &options.slot {
        slot::ensure(&mut connection, name).await?;
    }
    let start = start::find(&archive, &history, &server, connection.in_recovery(), options.skip_gap).await?;
    let from = start.segment.start(archive.segment_size);
    tracing::info!(
        "receiving WAL from {} on timeline {}{}",
        start.durable(archive.segment_size),
        start.segment.timeline,
        options
            .slot
            .as_ref()
            .map(|s| format!(" through slot {s}"))
            .unwrap_or_default()
    );
    let slot = options.slot.as_deref();
    let (stream, start) = match WalStream::start(connection, slot, from, start.segment.timeline).await {
        Ok(stream) => (stream, start),
        Err(error) if is_removed(&error) && options.skip_gap => {
            tracing::warn!("{error}");
            let start = start::at_server(&archive, &server);
            tracing::warn!(
                "WAL from {from} to {} is passed over: recovery across it is not possible, take a new backup",
                start.durable(archive.segment_size)
            );
            let connection = Connection::open(&options.conninfo, Mode::Replication).await?;
            let from = start.segment.start(archive.segment_size);
            let stream = WalStream::start(connection, slot, from, start.segment.timeline).await?;
            (stream, start)
        }
        Err(error) if is_removed(&error) => {
            return Err(error.context(format_args!("receiving WAL from {from}")).remedy(
                "if the missing segments are still anywhere, archive them with `fairvault wal push`; else take a new backup, and start with --skip-gap",
            ));
        }
        Err(error) => return Err(error.context(format_args!("receiving WAL from {from}"))),
    };
    pump::run(log, &archive, options, stream, start, stop).await
}

/// The server no longer has the WAL.
fn is_removed(error: &Error) -> bool {
    error.to_string().contains("has already been removed")
}

/// Stores and reads the history of the server's timeline.
async fn store_history(connection: &mut Connection, archive: &Archive, timeline: u32) -> Result<History> {
    let Some(content) = connection.timeline_history(timeline).await? else {
        return Ok(History {
            timeline,
            ancestors: Vec::new(),
        });
    };
    let history = History::parse(timeline, &content)?;
    archive
        .put(WalFile::History(timeline), &format!("{timeline:08X}.history"), content)
        .await?;
    Ok(history)
}

/// Fails if the server is behind what is stored of its timeline.
fn check_not_behind(server: &SystemIdentity, stored: crate::postgres::lsn::Lsn, in_recovery: bool) -> Result<()> {
    if stored <= server.flush {
        return Ok(());
    }
    let what = format!(
        "the server has WAL up to {} on timeline {}, and the repository up to {stored}",
        server.flush, server.timeline
    );
    match in_recovery {
        // A standby may lag behind what its primary archived.
        true => Err(Error::temporary(format!("{what}: waiting for the standby"))),
        false => Err(Error::refused(what).remedy(
            "the server was set back (a snapshot, a restored copy), or it is another one: find out which history is the right one. \
             A server that was set back must be promoted to a new timeline before its WAL can be stored",
        )),
    }
}
