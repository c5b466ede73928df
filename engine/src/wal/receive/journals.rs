//! Journals in a repository that is a folder: what a synchronous receiver without a spool of its own appends
//! to, one fsync a batch, where a piece would cost a new file and its folder.
//!
//! What always holds: they lie in the stanza's own folder of the repository, and so last as long as it does;
//! whoever restores stores first what a receiver that is gone has left in them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fairvault_format::wal::Compression;
use tokio::sync::watch;

use super::spool::Spool;
use super::{Options, spooled};
use crate::commit::Log;
use crate::error::{Context, Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;
use crate::replication::conninfo::ConnInfo;
use crate::stanza::Stanza;
use crate::wal::archive::Archive;
use crate::wal::known::Known;

/// In a stanza's folder; a folder for each host below.
const FOLDER: &str = "journals";
/// How long a receiver at work is given to store what it has acknowledged: its flush_interval may be long.
const PATIENCE: Duration = Duration::from_secs(600);

/// Where a receiver on this host keeps its journals, if the repository is a folder. Journals are sealed with the metadata
/// key, which every host has: one that must not read what others store leaves none in the repository.
pub fn folder(stanza: &Stanza) -> Result<Option<PathBuf>> {
    let Some(directory) = stanza.store().directory() else {
        return Ok(None);
    };
    if !stanza.keys().can_read() {
        return Err(Error::refused(format!(
            "this host's key can write only, and journals in the repository {} would be WAL that every such key opens",
            stanza.shown()
        ))
        .remedy("give --synchronous a spool on this host's own disk (--spool, or receive_spool), or receive where the operator's key is"));
    }
    let host = stanza.host().replace('/', "_");
    Ok(Some(directory.join(FOLDER).join(host)))
}

/// What to do about a receiver that is at work: it stores its journals by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtWork {
    /// Wait until it has stored what it has acknowledged so far.
    Wait,
    /// Leave it alone.
    Leave,
}

/// Stores what receivers that are gone have left in journals of the repository, whatever host they ran on, as pieces
/// and segments that are compressed like this.
pub async fn store(stanza: &Arc<Stanza>, compression: Compression, at_work: AtWork) -> Result<()> {
    let Some(folder) = stanza.store().directory().map(|d| d.join(FOLDER)) else {
        return Ok(());
    };
    let listing = |e| Error::io(format_args!("listing {}", folder.display()), e);
    let hosts = match std::fs::read_dir(&folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        hosts => hosts.map_err(listing)?,
    };
    for host in hosts {
        let host = host.map_err(listing)?.path();
        // Nothing is locked or written where there is nothing to store.
        if !has_journals(&host) {
            continue;
        }
        let stored = store_one(stanza, host.clone(), compression, at_work).await;
        stored.map_err(|error| {
            let what = format_args!("storing acknowledged WAL from {}", host.display());
            error.context(what).remedy(
                "without it, recovery ends before what was acknowledged. Work where the repository can be written, \
                 or move that folder out of the repository to do without",
            )
        })?;
    }
    Ok(())
}

fn has_journals(folder: &Path) -> bool {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    files
        .into_iter()
        .any(|file| file.path().extension().is_some_and(|e| e == "wal"))
}

async fn store_one(stanza: &Arc<Stanza>, folder: PathBuf, compression: Compression, at_work: AtWork) -> Result<()> {
    let spool = match Spool::open(stanza.clone(), folder.clone(), u64::MAX) {
        Err(error) if error.kind() == Kind::Held => {
            return match at_work {
                AtWork::Wait => wait_for_receiver(stanza, folder, compression).await,
                AtWork::Leave => Ok(()),
            };
        }
        spool => spool?,
    };
    let Some(end) = spool.end() else {
        return Ok(());
    };
    // No more comes: what the repository has beyond the journals is not waited for.
    for timeline in spool.timelines() {
        spool.end_timeline(timeline);
    }
    let options = Options {
        conninfo: ConnInfo::parse("").context(|| "no server")?,
        slot: None,
        standbys: Vec::new(),
        flush_interval: Duration::ZERO,
        piece_size: 4 << 20,
        synchronous: false,
        keep_pieces: false,
        skip_gap: false,
        compression,
        taken: Arc::default(),
    };
    let (stop_in, stop) = watch::channel(false);
    let mut changes = spool.changes();
    let storing = spooled::store_only(stanza.clone(), &spool, &options, stop);
    tokio::pin!(storing);
    while !spool.is_stored() {
        tokio::select! {
            ended = &mut storing => { ended?; break }
            _ = changes.changed() => {}
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
    }
    stop_in.send_replace(true);
    if spool.is_stored() {
        tracing::info!(
            "WAL up to {} on timeline {} was stored from journals",
            end.lsn,
            end.timeline
        );
        spool.clear();
        return Ok(());
    }
    Err(Error::failed("not all of it could be stored"))
}

/// Waits until a receiver at work has stored what it has acknowledged so far.
async fn wait_for_receiver(stanza: &Arc<Stanza>, folder: PathBuf, compression: Compression) -> Result<()> {
    let Some((cluster, end)) = Spool::look(stanza.clone(), folder)? else {
        return Ok(());
    };
    let log = Log::open_to_archive(stanza.clone()).await?;
    let archive = Archive::open(&log, Some(cluster.system_identifier), compression)?;
    let last = Segment::of(end.timeline, Lsn(end.lsn.0 - 1), cluster.segment_size);
    let began = tokio::time::Instant::now();
    tracing::info!(
        "a receiver is at work: waiting until it has stored WAL up to {}",
        end.lsn
    );
    loop {
        // Its pieces are joined, and replaced by the segment, under our eyes.
        match Known::of(&archive, last).await {
            Ok(known) if last.start(cluster.segment_size).0 + known.end as u64 >= end.lsn.0 => return Ok(()),
            Err(error) if !matches!(error.kind(), Kind::Temporary | Kind::NotFound) => return Err(error),
            _ => {}
        }
        if began.elapsed() > PATIENCE {
            return Err(Error::temporary(format!(
                "a receiver at work has acknowledged WAL up to {}, and not stored it yet",
                end.lsn
            )));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
