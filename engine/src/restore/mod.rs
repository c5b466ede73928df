//! The way back: plan → fetch → open → decode → write → recovery settings.
//!
//! What always holds: before a byte is written, the WAL from the backup to the target is proved complete;
//! a directory that is not empty is never touched unless it is an interrupted restore of our own or the
//! caller says so; `pg_control` is written last; success is reported only after everything was synced.

mod compare;
mod crc;
pub mod data;
mod direct;
mod expired;
mod files;
pub mod layout;
pub mod pgmanifest;
pub mod plan;
pub mod ranges;
pub mod reader;
pub mod settings;
mod spans;
mod spare;
pub mod target;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::commit::Log;
use crate::commit::lease::Lease;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::tally;
use crate::wal::push::RESTORED_MARKER;
use fairvault_format::proto;
use plan::{Plan, Unplanned};
use spare::Spares;
use target::{Action, Target, TimelineChoice};

/// The file that marks an unfinished restore.
pub const UNFINISHED_MARKER: &str = "fairvault.restoring";
/// pg_control, written when everything else is there.
pub const CONTROL_FILE: &str = "global/pg_control";

/// What to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to.
    pub directory: PathBuf,
    /// Backup id; `None` to choose for the target.
    pub backup: Option<String>,
    /// How far.
    pub target: Target,
    /// Stop before the target instead of after it.
    pub exclusive: bool,
    /// What to do there.
    pub action: Action,
    /// Which timeline.
    pub timeline: TimelineChoice,
    /// Leave the archive settings as they are.
    pub keep_archiving: bool,
    /// Stay a standby.
    pub standby: bool,
    /// Reuse files that are there.
    pub delta: bool,
    /// Leave pages of zeros out, as holes in their files.
    pub sparse: bool,
    /// Empty the directory first.
    pub force: bool,
    /// Old to new absolute tablespace paths; `all` puts each below the folder.
    pub tablespace_map: Vec<(String, String)>,
    /// Write tablespaces at their original absolute paths.
    pub keep_tablespaces: bool,
    /// The words before `wal get` in restore_command: binary and configuration.
    pub command: String,
}

/// What a restore came to.
#[derive(Debug)]
pub struct Report {
    /// What was done.
    pub plan: Arc<Plan>,
    /// Files written.
    pub files: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Files that were there and right (`delta`).
    pub kept_files: u64,
    /// The repository that it came from.
    pub repository: String,
    /// Why others before it were passed over.
    pub passed_over: Vec<String>,
}

/// A plan, the log that it was made with, and what goes with them.
struct Chosen {
    log: Log,
    /// The other repositories.
    others: Vec<Log>,
    plan: Plan,
    lease: Option<Lease>,
    /// Why repositories before this one were passed over.
    passed_over: Vec<String>,
}

/// Plans with the first repository that has what is wanted, and can be used; WAL counts wherever it is. If there is none,
/// the error of the first is what is wrong.
async fn choose(logs: &[Log], options: &Options, takes_leases: bool) -> Result<Chosen> {
    let began_us = logs.first().map_or(0, |log| log.stanza().env().now_us());
    let mut first: Option<Error> = None;
    let mut passed_over = Vec::new();
    // Without a name it is the cluster that goes on now which is meant, not what a repository that has not heard of an
    // upgrade takes for it.
    let newest = |log: &Log| log.state().incarnations.last().map(|life| life.system_identifier);
    let meant = logs.first().and_then(newest);
    // A backup that is named may have expired in some of them: those come last.
    let is_live = |log: &Log| options.backup.as_deref().is_none_or(|id| log.backup(id).is_ok());
    let mut order: Vec<(usize, &Log)> = logs.iter().enumerate().collect();
    order.sort_by_key(|(_, log)| !is_live(log));
    for (tried, (number, log)) in order.into_iter().enumerate() {
        if options.backup.is_none() && newest(log) != meant {
            let why = format!(
                "not from {}: there, another cluster is the newest; see `fairvault stanza upgrade`",
                log.stanza().shown()
            );
            tracing::warn!("{why}");
            passed_over.push(why);
            continue;
        }
        // The lease first, then the log: what that names is not collected from here on.
        let lease = match takes_leases {
            true => Lease::for_reading(log.stanza(), "restore", "").await,
            false => None,
        };
        let mut log = log.clone();
        let others: Vec<Log> = logs
            .iter()
            .enumerate()
            .filter(|(n, _)| *n != number)
            .map(|(_, log)| log.clone())
            .collect();
        let planned = async {
            log.refresh().await?;
            Plan::make(&log, &others, options).await
        };
        let (error, is_final) = match planned.await {
            Ok(plan) => {
                return Ok(Chosen {
                    log,
                    others,
                    plan,
                    lease,
                    passed_over,
                });
            }
            Err(Unplanned::Here(error)) => (error, false),
            Err(Unplanned::Anywhere(error)) => (error, true),
        };
        release(lease).await;
        if takes_leases {
            note(&mut log, began_us, "", 0, Some(&error)).await;
        }
        if is_final {
            return Err(error);
        }
        if tried + 1 < logs.len() {
            let why = format!("not from {}: {error}", log.stanza().shown());
            tracing::warn!("{why}; trying the next repository");
            passed_over.push(why);
        }
        first.get_or_insert(error);
    }
    Err(first.unwrap_or_else(|| Error::not_found("there is no repository to restore from")))
}

/// Decides what a restore would do, and proves that it can be done.
pub async fn plan(logs: &[Log], options: &Options) -> Result<Plan> {
    Ok(choose(logs, options, false).await?.plan)
}

/// Restores from the first of the repositories that has what is wanted; WAL, and content that it has lost, also come
/// from the others.
pub async fn run(
    logs: &[Log],
    options: &Options,
    progress: Arc<Progress>,
    cancelled: impl Future<Output = ()>,
) -> Result<Report> {
    progress.phase("planning");
    let began_us = logs.first().map_or(0, |log| log.stanza().env().now_us());
    let Chosen {
        mut log,
        others,
        plan,
        lease,
        passed_over,
    } = choose(logs, options, true).await?;
    let plan = Arc::new(plan);
    if let Some(lease) = &lease
        && let Err(error) = lease.narrow(&plan.info.id).await
    {
        tracing::warn!("the lease goes on to protect every backup: {error}");
    }
    let spares = Arc::new(Spares::new(&log, &plan, &others));
    let work = async {
        progress.phase("preparing the directory");
        let layout = layout::prepare(&plan, options)?;
        progress.total_bytes.set(plan.files.iter().map(|f| f.size).sum());
        progress.phase("copying");
        let written = data::write_all(log.stanza().clone(), &plan, &spares, &layout, options, progress.clone()).await?;
        progress.phase("writing recovery settings");
        let changed = settings::write(&plan, &layout, options, log.stanza())?;
        pgmanifest::write(&plan, &layout, &changed, &written.crcs)?;
        progress.phase("syncing");
        finish(&plan, &layout)?;
        Ok::<_, Error>(written)
    };
    let written = tokio::select! {
        written = work => written,
        () = cancelled => Err(Error::new(crate::error::Kind::Interrupted, "interrupted; the directory is not usable, run the same restore again")),
    };
    release(lease).await;
    if let Ok(spares) = Arc::try_unwrap(spares) {
        spares.release().await;
    }
    let bytes = written.as_ref().map_or(0, |written| written.bytes);
    note(&mut log, began_us, &plan.info.id, bytes, written.as_ref().err()).await;
    let written = written?;
    Ok(Report {
        files: written.files,
        bytes: written.bytes,
        kept_files: written.kept,
        repository: log.stanza().shown().to_owned(),
        passed_over,
        plan,
    })
}

async fn release(lease: Option<Lease>) {
    if let Some(lease) = lease {
        lease.release().await;
    }
}

/// Who read what is in the log.
async fn note(log: &mut Log, began_us: i64, backup: &str, bytes: u64, error: Option<&Error>) {
    let operation = proto::Operation {
        what: "restore".to_owned(),
        subject: backup.to_owned(),
        result: error.map_or("done".to_owned(), |error| format!("failed: {error}")),
        bytes,
        began_us,
    };
    // Of the last recovery on this host, too, if the store answers.
    if log.note(operation, error).await.is_some() {
        tally::say(log).await;
    }
}

/// pg_control into its place, folders synced, the marker of an unfinished restore away.
fn finish(plan: &Plan, layout: &layout::Layout) -> Result<()> {
    for folder in layout.folders(plan) {
        sync_directory(&folder)?;
    }
    let from = layout.directory.join(format!("{CONTROL_FILE}.fairvault"));
    let to = layout.directory.join(CONTROL_FILE);
    std::fs::rename(&from, &to).map_err(|e| Error::io(format_args!("putting {} into place", to.display()), e))?;
    sync_directory(&layout.directory.join("global"))?;
    let locations = plan.tablespaces.iter().filter_map(|(_, location)| location.as_ref());
    sync_above(locations.map(Path::new).chain([layout.directory.as_path()]))?;
    let marker = layout.directory.join(UNFINISHED_MARKER);
    std::fs::remove_file(&marker).map_err(|e| Error::io(format_args!("removing {}", marker.display()), e))?;
    sync_directory(&layout.directory)?;
    Ok(())
}

/// Syncs the folders above those that a restore may have made, each of which may be new. Those that may not be read or
/// written are not, nor are those that cannot be synced (of autofs, squashfs, erofs): nothing was made in them.
fn sync_above<'a>(paths: impl Iterator<Item = &'a Path>) -> Result<()> {
    use std::io::ErrorKind::{InvalidInput, PermissionDenied, ReadOnlyFilesystem};
    let above: BTreeSet<&Path> = paths.flat_map(|path| path.ancestors().skip(1)).collect();
    for folder in above.into_iter().filter(|folder| !folder.as_os_str().is_empty()) {
        match std::fs::File::open(folder).and_then(|folder| folder.sync_all()) {
            Err(e) if matches!(e.kind(), PermissionDenied | ReadOnlyFilesystem | InvalidInput) => {}
            synced => synced.map_err(|e| Error::io(format_args!("syncing {}", folder.display()), e))?,
        }
    }
    Ok(())
}

/// Syncs a folder.
pub fn sync_directory(path: &Path) -> Result<()> {
    std::fs::File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(|e| Error::io(format_args!("syncing {}", path.display()), e))
}

/// Whether a file in the data directory is fairvault's own.
pub fn is_own_marker(name: &str) -> bool {
    name == UNFINISHED_MARKER || name == RESTORED_MARKER
}
