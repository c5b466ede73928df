//! The WAL of a backup: without all of it from start to stop in the repository, the backup does not count.

use std::time::Duration;

use crate::error::{Context, Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment, WalFile};
use crate::replication::connection::{Connection, MORE_SENDERS, has_no_sender, is_denied};
use crate::wal::archive::Archive;
use crate::wal::same;

/// How often the WAL at the end of a backup is compared once more if that failed, and after what time.
const AGAIN: usize = 3;
const AGAIN_AFTER: Duration = Duration::from_secs(3);

/// The task that streams WAL, if there is one; it does not outlive the backup.
pub struct WalTask {
    task: Option<tokio::task::JoinHandle<Result<()>>>,
    ended: bool,
}

impl WalTask {
    /// The task, if WAL is streamed.
    pub fn new(task: Option<tokio::task::JoinHandle<Result<()>>>) -> Self {
        Self { task, ended: false }
    }

    /// Waits for its end; false if there is none.
    pub async fn finish(&mut self) -> Result<bool> {
        match self.task.as_mut() {
            Some(task) if !self.ended => {
                let outcome = task.await;
                self.ended = true;
                outcome
                    .map_err(|e| Error::failed("streaming WAL panicked").caused_by(e))?
                    .context(|| "streaming the WAL of this backup")?;
                Ok(true)
            }
            task => Ok(task.is_some()),
        }
    }

    /// Completes only if it fails: a backup whose WAL is lost is stopped at once.
    pub async fn failure(&mut self) -> Error {
        match self.finish().await {
            Err(error) => error,
            Ok(_) => std::future::pending().await,
        }
    }
}

impl Drop for WalTask {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// What helps whose role may not replicate, or whose server sends no WAL.
pub fn may_not_stream(error: Error) -> Error {
    match is_denied(&error) {
        false if has_no_sender(&error) => error.remedy(MORE_SENDERS),
        true => error.remedy(
            "archive with `fairvault wal push`, say `--wal archive` if `fairvault wal receive` is running, or let the role \
             replicate (REPLICATION, and a line for it in pg_hba.conf)",
        ),
        false => error,
    }
}

/// The history of the backup's timeline goes with it: recovery is refused without, and nobody else may be
/// archiving it. Those of ancestors are good to have.
pub async fn store_histories(connection: &mut Connection, archive: &Archive, timeline: u32) -> Result<()> {
    let mut wanted = vec![timeline];
    while let Some(number) = wanted.pop() {
        let content = match connection.timeline_history(number).await {
            Ok(None) => continue,
            Ok(Some(content)) => content,
            Err(error) if number == timeline => {
                return Err(error.context(format_args!("asking for the history of timeline {number}")));
            }
            Err(error) => {
                tracing::warn!("the history of timeline {number} is not stored: {error}");
                continue;
            }
        };
        let history = History::parse(number, &content)?;
        if number == timeline {
            wanted.extend(history.ancestors.iter().map(|a| a.timeline));
        }
        archive
            .put(WalFile::History(number), &format!("{number:08X}.history"), content)
            .await?;
    }
    Ok(())
}

/// Waits until `wal push`, or a receiver, has brought every segment from `start` to `stop`.
pub async fn wait_for_archive(
    archive: &Archive,
    timeline: u32,
    start: Lsn,
    stop: Lsn,
    timeout: Duration,
) -> Result<()> {
    let deadline = tokio::time::Instant::now() + timeout;
    let mut segment = Segment::of(timeline, start, archive.segment_size);
    let mut pause = Duration::from_millis(50);
    while segment.start(archive.segment_size) < stop {
        if archive.segment_header(segment).await?.is_some() {
            segment = segment.next();
            continue;
        }
        if tokio::time::Instant::now() > deadline {
            return Err(Error::temporary(format!(
                "{} did not arrive in the repository within {} s, and the backup cannot be restored without it",
                segment.name(archive.segment_size),
                timeout.as_secs()
            ))
            .remedy(
                "look at pg_stat_archiver and the server's log for what archive_command says, or at the receiver if that \
                 archives, or use --wal stream",
            ));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
    Ok(())
}

/// What [`wait_for_archive`] has seen is names: their content must be this server's. Says why that is not known, if it
/// could not be found out just now; `connection` is used first, and then new ones.
pub async fn check_archived(
    archive: &Archive,
    connection: Connection,
    connect: impl AsyncFn() -> Result<Connection>,
    timeline: u32,
    stop: Lsn,
) -> Result<Option<String>> {
    let last = Lsn(stop.0 - 1);
    let mut compared = same::check(archive, timeline, last, async || Ok(connection)).await;
    for _ in 0..AGAIN {
        if !compared.as_ref().is_err_and(|error| error.kind() == Kind::Temporary) {
            break;
        }
        tokio::time::sleep(AGAIN_AFTER).await;
        compared = same::check(archive, timeline, last, &connect).await;
    }
    match compared {
        Err(error) if error.kind() == Kind::Temporary => Ok(Some(format!(
            "the WAL that was archived could not be compared with the server's: {error}"
        ))),
        compared => compared.map(|()| None),
    }
}
