//! Collection: what no backup and no reader needs is deleted.
//!
//! Mark and sweep, ordered by the log. A *mark* names what nothing used when it was written; sessions that begin
//! after it never use that again. The *sweep* waits until every session that began before the mark has ended, then
//! reads the leases, and deletes what is still unused. So what is deleted can be in nobody's hands.
//!
//! What always holds: the state is computed from all entries of the log, not from a snapshot; what the signed
//! policy protects stays, whatever the log says has expired; what a backup uses is known from its usage list, or
//! nothing is deleted; nor is anything where a bucket that keeps versions hides an entry of the log; whoever comes after
//! an interrupted collector goes on where that stopped. No data key is needed. In a bucket that keeps versions, what was
//! deleted is deleted for good once its lock has ended (`versions`). Of WAL and versions that were deleted, a note in the log tells.
//! Who is waited for holds up sweeps only: WAL, snapshots and versions are collected all the same.
//!
//! Memory: something for each pack that is listed or used, for each backup, run and entry of the log; one usage list and
//! one index run at a time; nothing for each chunk.

pub(crate) mod history;
pub(crate) mod runs;
pub(crate) mod sweep;
pub(crate) mod usage;
mod versions;
pub(crate) mod wal;

use std::collections::HashSet;
use std::time::Duration;

use fairvault_format::proto::log_entry::Kind as Entry;
use fairvault_format::{names, proto};
use serde::Serialize;

use crate::commit::Log;
use crate::commit::lease;
use crate::error::{Context, Error, Result};
use crate::immutable::written;
use crate::progress::Progress;
use crate::stanza::slots;
use usage::Usage;
pub use versions::Versions;

/// Packs that one mark names at most.
const MARK_PACKS: usize = 16_384;
/// Snapshots of the log that are kept.
pub(crate) const SNAPSHOTS: usize = 4;

/// How to go about it.
#[derive(Debug, Clone)]
pub struct Options {
    /// Only say what would be deleted.
    pub dry_run: bool,
    /// How long a heartbeat is waited for before its owner counts as dead.
    pub patience: Duration,
}

/// A kind of objects, and what became of them.
#[derive(Debug, Clone, Copy, Default, Serialize, PartialEq, Eq)]
pub struct Count {
    /// Objects.
    pub objects: u64,
    /// Their stored bytes.
    pub bytes: u64,
}

impl Count {
    pub(crate) fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes += bytes;
    }
}

/// What was done, or would be.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Packs.
    pub packs: Count,
    /// Manifest roots.
    pub roots: Count,
    /// Index runs.
    pub index_runs: Count,
    /// WAL that has expired, and pieces of complete segments.
    pub wal: Count,
    /// Snapshots of the log.
    pub snapshots: Count,
    /// Packs that later backups do not use any more, since little of them is used.
    pub thin_packs: Count,
    /// Versions of what was deleted, now or by an earlier run; `None` in a store that keeps none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub versions: Option<Versions>,
    /// Why something was kept although it has expired.
    pub kept: Vec<String>,
    /// Whose end is waited for; then this is not all.
    pub waiting: Vec<String>,
}

impl Report {
    /// Stored bytes of what sweeps have deleted.
    fn swept_bytes(&self) -> u64 {
        self.packs.bytes + self.roots.bytes + self.index_runs.bytes
    }
}

/// Collects a stanza.
pub async fn run(log: &Log, options: &Options, progress: &Progress) -> Result<Report> {
    progress.phase("reading the log");
    let stanza = log.stanza().clone();
    if !options.dry_run {
        slots::check_operator(&stanza, "what nothing needs is deleted")?;
    }
    let began_us = stanza.env().now_us();
    let mut log = Log::replay_backups(stanza).await?;
    // Of two logs, nobody knows which one is to stay: what either needs is kept.
    let checked = written::check(Log::unread(log.stanza().clone())).await;
    checked.context(|| "nothing is deleted")?;
    let mut report = Report::default();
    let done = collect(&mut log, options, progress, &mut report).await;
    if !options.dry_run {
        note(&mut log, began_us, &report, done.as_ref().err()).await;
    }
    done?;
    report.kept.sort();
    report.kept.dedup();
    Ok(report)
}

/// Of WAL and versions that were deleted, no sweep speaks, and of what a sweep that failed has deleted, none does yet.
/// Where nothing was, there is nothing to be noted.
async fn note(log: &mut Log, began_us: i64, report: &Report, error: Option<&Error>) {
    let versions = report.versions.as_ref().map(|versions| versions.deleted);
    let (wal, for_good) = (report.wal, versions.unwrap_or_default());
    let swept = report.packs.objects + report.roots.objects + report.index_runs.objects;
    if wal.objects + for_good.objects == 0 && (error.is_none() || swept == 0) {
        return;
    }
    // In a bucket that keeps versions, nothing is gone before these are.
    let bytes = versions.map_or(wal.bytes, |versions| versions.bytes);
    let mut deleted = format!(
        "{} objects of WAL and {} old versions deleted",
        wal.objects, for_good.objects
    );
    // With those of sweeps that ended before, which have said so.
    if error.is_some() {
        deleted += &format!(", {swept} packs, manifests and index runs swept");
    }
    log.note_done("gc", began_us, bytes, deleted, error).await;
}

/// Marks and sweeps; `false` if somebody's end has to be waited for.
async fn sweep_all(log: &mut Log, options: &Options, progress: &Progress, report: &mut Report) -> Result<bool> {
    let stanza = log.stanza().clone();
    if !options.dry_run {
        progress.phase("finishing what an earlier collection began");
        for mark in log.state().open_marks.clone() {
            if !sweep::run(log, &mark, options, report).await? {
                return Ok(false);
            }
        }
    }
    loop {
        progress.phase("finding what is not used");
        let (past, usage) = Usage::of_needed(log).await?;
        report.kept = past.kept_by_policy();
        let mut unused = stanza.store().list_hashes(names::PACKS).await?;
        let thin = usage.thin(&unused);
        unused.retain(|(hash, _)| !usage.uses(hash));
        let is_all = unused.len() <= MARK_PACKS;
        unused.truncate(MARK_PACKS);
        unused.shrink_to_fit();
        drop(usage);
        let roots = stanza.store().list_hashes(names::ROOTS).await?;
        let known: HashSet<&[u8]> = past.needed().map(|backup| backup.root.as_slice()).collect();
        let runs = stanza.store().list_hashes(names::INDEX).await?;
        let live: HashSet<&[u8]> = log.state().index_runs.iter().map(Vec::as_slice).collect();
        let mark = proto::GcMark {
            packs: unused.iter().map(|(hash, _)| hash.to_vec()).collect(),
            roots: unknown(&roots, &known),
            index_runs: unknown(&runs, &live),
            seq: 0,
        };
        let is_empty = mark.packs.is_empty() && mark.roots.is_empty() && mark.index_runs.is_empty();
        if options.dry_run {
            unused.iter().for_each(|(_, len)| report.packs.add(*len));
            count(&roots, &mark.roots, &mut report.roots);
            count(&runs, &mark.index_runs, &mut report.index_runs);
            break;
        }
        // Thin packs leave the index with the next sweep.
        if is_empty && !runs::name_any(log, &thin).await? {
            break;
        }
        log.append(Entry::GcMark(mark), |_| Ok(())).await?;
        let Some(mark) = log.state().open_marks.last().cloned() else {
            continue;
        };
        progress.phase("deleting");
        if !sweep::run(log, &mark, options, report).await? {
            return Ok(false);
        }
        if is_all {
            break;
        }
    }
    Ok(true)
}

async fn collect(log: &mut Log, options: &Options, progress: &Progress, report: &mut Report) -> Result<()> {
    let is_swept = sweep_all(log, options, progress, report).await?;
    let stanza = log.stanza().clone();
    if !options.dry_run && is_swept {
        // With nothing to sweep, nobody has looked at them; those at work hold up nothing.
        let later = log.state().seq + 1;
        sweep::end_dead_sessions(log, later, options).await?;
    }
    progress.phase("collecting WAL and leases");
    // Whoever takes a lease later reads a log that says what has expired.
    log.refresh().await?;
    let leases = lease::all(&stanza).await?;
    // Where somebody has been waited for already, all that hold a lease count as alive, and nobody waits for them.
    let living = match options.dry_run || !is_swept {
        true => leases.clone(),
        false => lease::living(&stanza, leases.clone(), options.patience).await?,
    };
    let expired = wal::Expired::of(log, &living, &mut report.kept).await?;
    wal::collect(log, &expired, options, report).await?;
    if !options.dry_run {
        let is_dead = |found: &lease::Found| living.iter().all(|other| other.name != found.name);
        let dead: Vec<_> = leases.into_iter().filter(is_dead).collect();
        lease::bury(&stanza, &dead).await?;
    }
    collect_snapshots(log, options, report).await?;
    versions::purge(log, &expired, options, report, progress).await
}

/// Objects that are named by their hash, with their lengths, sorted.
type Sizes = Vec<([u8; 32], u64)>;

fn unknown(sizes: &Sizes, known: &HashSet<&[u8]>) -> Vec<Vec<u8>> {
    let hashes = sizes.iter().map(|(hash, _)| hash);
    hashes
        .filter(|hash| !known.contains(&hash[..]))
        .map(|hash| hash.to_vec())
        .collect()
}

fn count(sizes: &Sizes, hashes: &[Vec<u8>], into: &mut Count) {
    for hash in hashes {
        if let Ok(at) = sizes.binary_search_by(|(name, _)| name[..].cmp(hash)) {
            into.add(sizes[at].1);
        }
    }
}

/// Older snapshots than the newest few serve nobody: the log itself is kept.
async fn collect_snapshots(log: &Log, options: &Options, report: &mut Report) -> Result<()> {
    let store = log.stanza().store();
    let mut listed = store.list(names::SNAPSHOTS).await?;
    listed.truncate(listed.len().saturating_sub(SNAPSHOTS));
    listed.iter().for_each(|(_, len)| report.snapshots.add(*len));
    if !options.dry_run {
        let names: Vec<String> = listed.into_iter().map(|(name, _)| name).collect();
        store.delete(&names).await?;
    }
    Ok(())
}
