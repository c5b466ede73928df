//! `wal receive`: WAL in the repository seconds after it was written.
//!
//! What always holds: the server is told that WAL is flushed only once it is durable in the repository;
//! WAL is stored in order, and a hole is filled from the server or said; what the server sends for a range
//! that is stored already must be the same bytes. Everything that the network, the server or the store can
//! do to us for a while is followed by another attempt, which begins exactly where the repository ends.

mod current;
mod feed;
pub mod given;
mod journals;
mod origin;
mod pump;
mod runs;
mod slot;
mod spool;
mod spooled;
mod standbys;
mod start;
mod storing;

use std::sync::Arc;
use std::time::Duration;

use fairvault_format::wal::Compression;
use tokio::sync::watch;
use tokio::time::Instant;

use super::archive::Archive;
use crate::commit::Log;
use crate::error::{Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment, WalFile};
use crate::progress::Counter;
use crate::replication::connection::{Connection, Mode, SystemIdentity};
use crate::replication::conninfo::ConnInfo;
use crate::replication::wal_stream::{Told, WalStream};
pub use journals::{AtWork, folder as journals_folder, store as store_journals};
use origin::Origin;
pub use spooled::run as run_with_spool;
use start::{Lessons, Start, Why};
use storing::Guard;

/// What to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// Server.
    pub conninfo: ConnInfo,
    /// Replication slot; it is made if it is not there. Without one, the server may remove WAL that was not
    /// received, and is told nothing about what is flushed.
    pub slot: Option<String>,
    /// Standbys on which a slot of the same name is kept.
    pub standbys: Vec<ConnInfo>,
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
    /// How what is stored is compressed.
    pub compression: Compression,
    /// Bytes of WAL that were taken for the repository so far: for whoever asks.
    pub taken: Arc<Counter>,
}

/// How one connection's work ended, if it did not fail.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// We were asked to stop.
    Stopped,
    /// The timeline ended, or there is a better place to begin: go on with what comes next.
    Next,
}

/// Pause after a failure: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// How long a server may take to let us in and to answer what we ask it first.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the server hears from us at least.
const STATUS: Duration = Duration::from_secs(10);
/// A server that is silent for so long, although it was asked for an answer, is gone.
const SILENCE: Duration = Duration::from_secs(60);

/// Fails if nothing was heard for too long.
fn quiet(last_heard: Instant) -> Result<()> {
    match last_heard.elapsed() > SILENCE {
        true => Err(Error::temporary("the server has been silent for a minute")),
        false => Ok(()),
    }
}

/// Receives until `cancelled` completes, or until something needs a person.
pub async fn run(log: Log, options: &Options, cancelled: impl Future<Output = ()>) -> Result<()> {
    let (stop_in, stop) = watch::channel(false);
    let mut lessons = Lessons::default();
    let guard = Guard::new(log);
    let told = watch::Sender::new(None);
    let trying = keep_trying(stop.clone(), async || {
        once(&guard, options, &mut lessons, &told, stop.clone()).await
    });
    with_standbys(trying, options, &told, cancelled, &stop_in).await
}

/// Runs `receiving` and keeps the slots on standbys meanwhile; `cancelled` is passed on as a wish to stop.
async fn with_standbys(
    receiving: impl Future<Output = Result<()>>,
    options: &Options,
    told: &watch::Sender<Told>,
    cancelled: impl Future<Output = ()>,
    stop: &watch::Sender<bool>,
) -> Result<()> {
    let durable = told.subscribe();
    let standbys = async {
        if let Some(slot) = &options.slot {
            standbys::keep(&options.standbys, slot, &durable).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::pin!(receiving, cancelled, standbys);
    loop {
        tokio::select! {
            outcome = &mut receiving => return outcome,
            () = &mut cancelled, if !*stop.borrow() => { stop.send_replace(true); }
            () = &mut standbys => {}
        }
    }
}

/// One attempt after the other, until asked to stop; what may pass is no reason to give up.
async fn keep_trying(mut stop: watch::Receiver<bool>, mut attempt: impl AsyncFnMut() -> Result<Ended>) -> Result<()> {
    let mut pause = PAUSES.0;
    loop {
        let began = Instant::now();
        let outcome = attempt().await;
        let stopping = *stop.borrow();
        match outcome {
            Ok(Ended::Next) if !stopping => tokio::time::sleep(Duration::from_millis(200)).await,
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == Kind::Temporary && !stopping => {
                if began.elapsed() > PAUSES.1 * 2 {
                    pause = PAUSES.0;
                }
                tracing::warn!("{error}; trying again in {} s", pause.as_secs_f32());
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ = stop.wait_for(|stop| *stop) => return Ok(()),
                }
                pause = (pause * 2).min(PAUSES.1);
            }
            Err(error) => return Err(error),
        }
    }
}

/// A server that let us in.
struct Server {
    connection: Connection,
    identity: SystemIdentity,
    segment_size: u64,
    history: Option<Vec<u8>>,
}

impl Server {
    /// Asks again how far the server is, if it cannot have been at `durable` when it was asked.
    async fn catch_up(&mut self, durable: Lsn) -> Result<()> {
        if durable > self.identity.flush {
            self.identity.flush = self.connection.identify().await?.flush;
        }
        Ok(())
    }
}

/// Connects; `slot` is made if it is not there.
async fn connect(options: &Options, slot: Option<&str>) -> Result<Server> {
    let prepare = async {
        let mut connection = Connection::open(&options.conninfo, Mode::Replication).await?;
        let identity = connection.identify().await?;
        let segment_size = connection.wal_segment_size().await?;
        let history = connection.timeline_history(identity.timeline).await?;
        if let Some(name) = slot {
            slot::ensure(&mut connection, name).await?;
        }
        if options.synchronous && connection.show("synchronous_commit").await?.as_deref() == Some("remote_apply") {
            tracing::warn!(
                "synchronous_commit is remote_apply: commits that wait for this receiver wait for ever, since it applies \
                 nothing; set it to on"
            );
        }
        Ok(Server {
            connection,
            identity,
            segment_size,
            history,
        })
    };
    match tokio::time::timeout(PATIENCE, prepare).await {
        Ok(server) => server,
        Err(_) => Err(Error::temporary(format!(
            "the server has not let us in within {} s",
            PATIENCE.as_secs()
        ))),
    }
}

async fn once(
    guard: &Guard,
    options: &Options,
    lessons: &mut Lessons,
    told: &watch::Sender<Told>,
    mut stop: watch::Receiver<bool>,
) -> Result<Ended> {
    let mut server = tokio::select! {
        server = connect(options, options.slot.as_deref()) => server?,
        _ = stop.wait_for(|stop| *stop) => return Ok(Ended::Stopped),
    };
    let archive = {
        let mut log = guard.log().await;
        log.refresh().await?;
        Archive::open(&log, Some(server.identity.system_identifier), options.compression)?
    };
    check_segment_size(&archive, server.segment_size)?;
    let history = store_history(&archive, server.identity.timeline, server.history.take()).await?;
    let in_recovery = server.connection.in_recovery();
    let start = start::find(&archive, &history, &server.identity, lessons).await?;
    // Others archive as well, and a store may be slow: what is there by now may be younger than the server's answer.
    server.catch_up(start.durable(archive.segment_size)).await?;
    start::check(&start, &history, &server.identity, in_recovery, archive.segment_size)?;
    say_start(&start, archive.segment_size, options);
    let (segment, why) = (start.segment, start.why);
    let from = segment.start(archive.segment_size);
    let slot = options.slot.as_deref();
    let (at, received) = match WalStream::start(server.connection, slot, from, segment.timeline).await {
        Ok(mut stream) => {
            stream.tell(told.clone());
            let outcome = pump::run(guard, &archive, options, Origin::Server(stream), start, stop).await;
            (outcome.at, outcome.ended)
        }
        Err(error) => (segment, Err(error)),
    };
    match received {
        // The server removed WAL while we were on our way: the next start finds out what that means.
        Err(error) if is_removed(&error) && at != segment => {
            tracing::warn!("{error}");
            Ok(Ended::Next)
        }
        Err(error) if is_removed(&error) => learn_removed(error, segment, why, archive.segment_size, options, lessons),
        Err(error) => Err(error.context(format_args!("receiving WAL from {from}"))),
        Ok(ended) => Ok(ended),
    }
}

fn check_segment_size(archive: &Archive, of_server: u64) -> Result<()> {
    match of_server == archive.segment_size {
        true => Ok(()),
        false => Err(Error::refused(format!(
            "the server's WAL segments are not of {} bytes, as the stanza's are",
            archive.segment_size
        ))),
    }
}

/// The server no longer has `segment`: whether that matters depends on what it was wanted for.
fn learn_removed(
    error: Error,
    segment: Segment,
    why: Why,
    segment_size: u64,
    options: &Options,
    lessons: &mut Lessons,
) -> Result<Ended> {
    lessons.removed.insert((segment.timeline, segment.number));
    let (name, from) = (segment.name(segment_size), segment.start(segment_size));
    match why {
        Why::Compare => {}
        Why::Hole { before_backup: true } => tracing::warn!(
            "WAL from {name} on is missing, and the server no longer has it: recovery from backups before it ends there"
        ),
        Why::Hole { .. } | Why::End if options.skip_gap => {
            tracing::warn!(
                "WAL from {name} on is missing and is passed over: recovery across it is not possible, take a new backup"
            );
        }
        Why::Hole { .. } | Why::End => {
            return Err(error.context(format_args!("receiving WAL from {from}")).remedy(
                "if the missing segments are still anywhere, archive them with `fairvault wal push`; else take a new backup, and start with --skip-gap",
            ));
        }
    }
    Ok(Ended::Next)
}

fn say_start(start: &Start, segment_size: u64, options: &Options) {
    let through = options.slot.as_ref().map(|s| format!(" through slot {s}"));
    let through = through.unwrap_or_default();
    let timeline = start.segment.timeline;
    match start.why {
        Why::Hole { .. } => tracing::info!(
            "filling what is missing from {} on, on timeline {timeline}{through}",
            start.segment.name(segment_size)
        ),
        Why::End | Why::Compare => tracing::info!(
            "receiving WAL from {} on timeline {timeline}{through}",
            start.durable(segment_size)
        ),
    }
}

/// The server no longer has the WAL: 58P01, undefined_file.
pub(super) fn is_removed(error: &Error) -> bool {
    error.to_string().contains("SQLSTATE 58P01")
}

/// Stores and reads the history of the server's timeline.
async fn store_history(archive: &Archive, timeline: u32, content: Option<Vec<u8>>) -> Result<History> {
    let Some(content) = content else {
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

/// The server has other WAL of a range than what is stored.
pub(super) fn not_the_same(from: Lsn, to: Lsn) -> Error {
    Error::refused(format!(
        "the server sends other WAL from {from} to {to} than what is stored: it was set back or replaced"
    ))
    .remedy(
        "nothing was overwritten; find out which history is the right one, and promote the server to a new timeline",
    )
}

/// Fails if the server is behind what `holder` has of its timeline.
pub(super) fn check_not_behind(server: &SystemIdentity, stored: Lsn, in_recovery: bool, holder: &str) -> Result<()> {
    if stored <= server.flush {
        return Ok(());
    }
    let what = format!(
        "the server has WAL up to {} on timeline {}, and {holder} up to {stored}",
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
