//! From one repository of a stanza to another: backups and WAL that the other does not have.
//!
//! What always holds: nothing in the source is changed, but for a lease that keeps what is read and a note in its log
//! of who read it; the WAL of a backup is proven to be in the target before the backup is committed there; what the
//! target's retention would expire at once is not copied; a copy that died is done by the next one.

mod backup;
mod twins;
pub mod wal;

use std::collections::BTreeMap;
use std::sync::Arc;

use fairvault_format::proto::{self, CommittedBackup, Snapshot};
use fairvault_format::wal::Compression;
use serde::Serialize;
use tokio::sync::watch;

use crate::commit::lease::Lease;
use crate::commit::{Log, state};
use crate::error::{Context, Error, Kind, Result};
use crate::expire;
use crate::expire::rules::{Candidate, Floor, Retention, decide};
use crate::immutable::reliance::{Locks, Reliance};
use crate::manifest::usage;
use crate::progress::Progress;
use crate::restore::target::info;
use crate::wal::archive::Archive;
use twins::Twins;

/// How to go about it.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Only this backup, whatever the retention says; and no WAL but what it needs and what comes after.
    pub backup: Option<String>,
    /// What the target keeps.
    pub retention: Retention,
    /// How WAL is compressed.
    pub compression: Compression,
    /// How long the target's packs must be locked that a copy relies on; without, locks are nobody's concern.
    pub reliance: Option<Reliance>,
}

/// A backup that is, or would be, copied.
#[derive(Debug, Clone, Serialize)]
pub struct BackupLine {
    /// Its id in the source.
    pub id: String,
    /// Its id in the target; empty as long as it is not copied.
    pub copy: String,
    /// full, diff, incr.
    pub r#type: String,
    /// Bytes of packs that the copy stored.
    pub stored_bytes: u64,
}

/// A backup that is not copied, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Left {
    /// Its id in the source.
    pub id: String,
    /// Why.
    pub why: String,
}

/// What there is to do.
#[derive(Debug, Default, Serialize)]
pub struct Plan {
    /// Backups to copy, oldest first.
    pub backups: Vec<BackupLine>,
    /// Stored bytes of packs that they use and no backup uses that both have: about what is fetched.
    pub backup_bytes: u64,
    /// Segments, parts of segments and histories of WAL to copy.
    pub wal_objects: u64,
    /// Their stored bytes.
    pub wal_bytes: u64,
    /// Backups that are not copied.
    pub left: Vec<Left>,
}

/// What was done.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Backups that were copied.
    pub backups: Vec<BackupLine>,
    /// WAL.
    pub wal: wal::Counts,
    /// Backups that are not copied because the target would not keep them.
    pub left: Vec<Left>,
    /// Backups that could not be copied.
    pub failed: Vec<Left>,
    /// What else a person should know.
    pub notes: Vec<String>,
}

/// Fails unless both are of one cluster, and not one and the same.
fn check_pair(source: &Log, target: &Log) -> Result<()> {
    if source.stanza().scope() == target.stanza().scope() {
        return Err(Error::usage(format!(
            "{} and {} are one and the same",
            source.stanza().shown(),
            target.stanza().shown()
        )));
    }
    // An earlier cluster may be unknown to a repository that is younger than the upgrade.
    let newest = |log: &Log| log.state().incarnations.last().copied().unwrap_or_default();
    let (here, there) = (newest(source), newest(target));
    if (here.system_identifier, here.wal_segment_size) != (there.system_identifier, there.wal_segment_size) {
        return Err(Error::refused(format!(
            "{} is of the cluster with system identifier {}, and {} is not",
            source.stanza().shown(),
            here.system_identifier,
            target.stanza().shown()
        ))
        .remedy("create the stanza in both repositories with `fairvault stanza create` and the same server; after pg_upgrade, run `fairvault stanza upgrade` for both"));
    }
    Ok(())
}

/// Whether a repository's stanza was ever of this cluster.
fn knows(log: &Log, system_identifier: u64) -> bool {
    let mut lives = log.state().incarnations.iter();
    lives.any(|life| life.system_identifier == system_identifier)
}

/// What the target does not have of the source: what is to be copied, oldest first, and what not.
fn missing(source: &Log, target: &Log, options: &Options) -> Result<(Vec<CommittedBackup>, Vec<Left>)> {
    let (here, there) = (source.state(), target.state());
    let is_missing =
        |backup: &&CommittedBackup| state::find_origin(there, &state::origin(here, &info(backup))).is_none();
    let is_known = |backup: &CommittedBackup| knows(target, info(backup).system_identifier);
    if let Some(id) = &options.backup {
        let wanted = source.backup(id)?.clone();
        if !is_known(&wanted) {
            return Err(Error::refused(format!(
                "backup {id} is of an earlier cluster, of which {} has never heard",
                target.stanza().shown()
            )));
        }
        if is_missing(&&wanted) {
            state::has_its_wal(there, &info(&wanted)).context(|| target.stanza().shown().to_owned())?;
        }
        return Ok((
            Some(wanted).filter(|b| is_missing(&b)).into_iter().collect(),
            Vec::new(),
        ));
    }
    let missing = here.backups.iter().filter(is_missing).cloned();
    let (missing, strange): (Vec<_>, Vec<_>) = missing.partition(is_known);
    let (missing, late): (Vec<_>, Vec<_>) = missing
        .into_iter()
        .partition(|backup| state::has_its_wal(there, &info(backup)).is_ok());
    let expiring = expiring(here, there, &missing, target, &options.retention);
    let strange = strange.iter().map(|backup| Left {
        id: info(backup).id,
        why: "it is of an earlier cluster, of which the target has never heard".to_owned(),
    });
    let late = late.iter().map(|backup| Left {
        id: info(backup).id,
        why: "the WAL that it needs has expired in the target".to_owned(),
    });
    let mut left: Vec<Left> = strange.chain(late).collect();
    let mut wanted = Vec::new();
    for backup in missing {
        match expiring.get(&info(&backup).id) {
            None => wanted.push(backup),
            Some(why) => left.push(Left {
                id: info(&backup).id,
                why: format!("the target would not keep it: {why}"),
            }),
        }
    }
    Ok((wanted, left))
}

/// Of those that are missing, the ones that the target would expire at once, and why.
fn expiring(
    here: &Snapshot,
    there: &Snapshot,
    missing: &[CommittedBackup],
    target: &Log,
    retention: &Retention,
) -> BTreeMap<String, String> {
    // As if all of them had been copied, each in its place. The number tells them from the target's own.
    let mut merged = there.clone();
    let own = u64::MAX;
    merged.backups.iter_mut().for_each(|backup| backup.seq = own);
    for (number, backup) in missing.iter().enumerate() {
        let facts = proto::BackupInfo {
            copied_from: Some(state::origin(here, &info(backup))),
            ..info(backup)
        };
        let place = state::place(&merged, Some(&facts));
        let copy = CommittedBackup {
            seq: number as u64,
            info: Some(facts),
            ..backup.clone()
        };
        merged.backups.insert(place, copy);
    }
    let held = |state: &Snapshot, id: &str| {
        let hold = state.holds.iter().find(|hold| hold.backup == id);
        hold.map(|hold| hold.reason.clone())
    };
    let candidates: Vec<Candidate> = merged
        .backups
        .iter()
        .map(|backup| {
            let facts = info(backup);
            Candidate {
                hold: held(if backup.seq == own { there } else { here }, &facts.id),
                id: facts.id,
                kind: facts.r#type,
                stopped_us: facts.stopped_us,
                system_identifier: facts.system_identifier,
                restorable: true,
                damage: None,
                timelines: vec![1],
            }
        })
        .collect();
    let policy = there.policy.clone().unwrap_or_default();
    let floor = Floor {
        age_s: policy.minimum_retention_s,
        fulls: policy.minimum_full,
    };
    let decisions = decide(&candidates, retention, floor, target.stanza().env().now_us());
    let of_source = merged
        .backups
        .iter()
        .zip(decisions)
        .filter(|(backup, _)| backup.seq != own);
    let expiring = of_source.filter(|(_, decision)| !decision.keep);
    expiring.map(|(_, decision)| (decision.id, decision.why)).collect()
}

/// An incarnation of the cluster, and which of its WAL is needed.
struct Needed {
    source: Archive,
    target: Archive,
    from: u64,
    own: wal::Own,
}

/// The WAL from the oldest backup on that the target has or is to have; all of the newest incarnation's, where there is
/// none.
fn needed_wal(source: &Log, target: &Log, wanted: &[CommittedBackup], options: &Options) -> Result<Vec<Needed>> {
    let lives = &source.state().incarnations;
    let mut all = Vec::new();
    for (number, life) in lives.iter().enumerate() {
        let id = life.system_identifier;
        if !knows(target, id) {
            continue;
        }
        let (from, to) = (
            Archive::open(source, Some(id), 0)?,
            Archive::open(target, Some(id), options.compression)?,
        );
        let size = from.segment_size;
        let of_life = |backup: &&CommittedBackup| info(backup).system_identifier == id;
        let own: wal::Own = wanted
            .iter()
            .filter(of_life)
            .map(|backup| {
                let facts = info(backup);
                (
                    facts.stop_timeline,
                    facts.start_lsn / size,
                    facts.stop_lsn.saturating_sub(1) / size,
                )
            })
            .collect();
        let held = target.state().backups.iter().filter(|_| options.backup.is_none());
        let oldest = wanted
            .iter()
            .chain(held)
            .filter(of_life)
            .map(|backup| info(backup).start_lsn / size);
        let is_newest = number + 1 == lives.len();
        let Some(oldest) = oldest.min().or((is_newest && options.backup.is_none()).then_some(0)) else {
            continue;
        };
        all.push(Needed {
            source: from,
            target: to,
            from: oldest,
            own,
        });
    }
    Ok(all)
}

fn line(backup: &CommittedBackup) -> BackupLine {
    let facts = info(backup);
    BackupLine {
        id: facts.id,
        copy: String::new(),
        r#type: facts.r#type,
        stored_bytes: 0,
    }
}

/// Says what a copy would do, by listings and usage lists; writes nothing.
pub async fn plan(source: &Log, target: &Log, options: &Options) -> Result<Plan> {
    check_pair(source, target)?;
    let (wanted, left) = missing(source, target, options)?;
    let mut plan = Plan {
        backups: wanted.iter().map(line).collect(),
        left,
        ..Plan::default()
    };
    let mut packs: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
    for backup in &wanted {
        let usage = usage(source.stanza(), &backup.root).await?;
        for (name, live) in usage.packs.chunks(32).zip(&usage.live_bytes) {
            let most = packs.entry(name.to_vec()).or_default();
            *most = (*most).max(*live);
        }
    }
    if let Some((original, _)) = common(source, target, wanted.first()) {
        let usage = usage(source.stanza(), &original.root).await?;
        usage.packs.chunks(32).for_each(|name| _ = packs.remove(name));
    }
    plan.backup_bytes = packs.values().sum();
    for needed in needed_wal(source, target, &wanted, options)? {
        let here = wal::Listing::read(&needed.source, needed.from).await?;
        let here = here.without_expired(&needed.target);
        let there = wal::Listing::read(&needed.target, needed.from).await?;
        let (objects, bytes) = here.missing_in(&there);
        plan.wal_objects += objects;
        plan.wal_bytes += bytes;
    }
    Ok(plan)
}

/// The nearest backup that both have: before `wanted` if there is one, else after it. With its copy.
fn common<'a>(
    source: &'a Log,
    target: &'a Log,
    wanted: Option<&CommittedBackup>,
) -> Option<(&'a CommittedBackup, &'a CommittedBackup)> {
    let (here, there) = (source.state(), target.state());
    let at = wanted.and_then(|wanted| here.backups.iter().position(|b| b.root == wanted.root))?;
    let (before, after) = here.backups.split_at(at);
    let pair = |backup: &'a CommittedBackup| {
        let copy = state::find_origin(there, &state::origin(here, &info(backup)))?;
        Some((backup, copy))
    };
    before.iter().rev().chain(after).find_map(pair)
}

/// Copies. When `cancelled` completes, it stops; what was copied stays.
pub async fn run(
    source: &Log,
    target: &mut Log,
    options: &Options,
    progress: &Arc<Progress>,
    cancelled: impl Future<Output = ()>,
) -> Result<Report> {
    check_pair(source, target)?;
    // What both have already is found out from their manifests.
    for log in [source, &*target] {
        log.stanza().check_reads("copying")?;
    }
    let began_us = source.stanza().env().now_us();
    // The lease first, then the log: what that names is not collected from here on.
    let lease = Lease::for_reading(source.stanza(), state::COPY, "").await;
    let mut source = source.clone();
    let (stop_in, stop) = watch::channel(false);
    let to = target.stanza().shown().to_owned();
    let mut report = Report::default();
    let work = async {
        source.refresh().await?;
        target.refresh().await?;
        copy_all(&source, target, options, progress, lease.as_ref(), &stop, &mut report).await
    };
    let done = {
        tokio::pin!(work);
        tokio::select! {
            done = &mut work => done,
            // What is begun is ended cleanly.
            () = cancelled => {
                let _ = stop_in.send(true);
                work.await
            }
        }
    };
    if let Some(lease) = lease {
        lease.release().await;
    }
    let was_read = progress.read_bytes.get() + progress.wal_bytes.get() > 0;
    if was_read || !report.backups.is_empty() || !report.failed.is_empty() {
        note(&mut source, began_us, &to, &report, done.as_ref().err()).await;
    }
    done?;
    Ok(report)
}

/// Who read what is in the log of the source, where anything was read.
async fn note(source: &mut Log, began_us: i64, to: &str, report: &Report, error: Option<&Error>) {
    let wal = report.wal.segments + report.wal.parts + report.wal.files;
    let of_backups: u64 = report.backups.iter().map(|backup| backup.stored_bytes).sum();
    let mut said = format!(
        "{} backups and {wal} objects of WAL copied to {to}",
        report.backups.len()
    );
    if !report.failed.is_empty() {
        said += &format!(", {} backups could not be", report.failed.len());
    }
    let bytes = of_backups + report.wal.bytes;
    source.note_done("copy", began_us, bytes, said, error).await;
}

/// Completes when somebody wishes an end.
async fn stopped(stop: &watch::Receiver<bool>) {
    let _ = stop.clone().wait_for(|stop| *stop).await;
}

async fn copy_all(
    source: &Log,
    target: &mut Log,
    options: &Options,
    progress: &Arc<Progress>,
    lease: Option<&Lease>,
    stop: &watch::Receiver<bool>,
    report: &mut Report,
) -> Result<()> {
    let (wanted, left) = missing(source, target, options)?;
    report.left = left;
    progress
        .total_bytes
        .set(wanted.iter().map(|backup| info(backup).plain_bytes).sum());
    progress.phase("copying WAL");
    let mut proven = BTreeMap::new();
    for needed in needed_wal(source, target, &wanted, options)? {
        let copy = wal::Copy {
            source: &needed.source,
            source_log: source,
            target: &needed.target,
            from: needed.from,
            own: needed.own,
            progress,
        };
        let (counts, of_life) = tokio::select! {
            copied = copy.run(target, &mut report.notes) => copied?,
            () = stopped(stop) => return Err(Error::interrupted()),
        };
        report.wal += counts;
        proven.insert(needed.source.system_identifier, of_life);
    }
    let locks = match wanted.is_empty() {
        true => Locks::default(),
        false => {
            let mut notes = Vec::new();
            let locks = Locks::of(target, options.reliance.clone(), &mut notes).await?;
            backup::say(target.stanza(), &notes);
            locks
        }
    };
    let mut twins = Twins::default();
    for backup in &wanted {
        let facts = info(backup);
        if let Some(lease) = lease
            && let Err(error) = lease.narrow(&facts.id).await
        {
            tracing::warn!("the lease does not say what is read: {error}");
        }
        let copied = async {
            let of_life = proven.get(&facts.system_identifier);
            of_life
                .ok_or_else(|| Error::failed("its WAL was not copied"))?
                .check(&facts)?;
            if let Some((original, there)) = common(source, target, Some(backup)) {
                let (original, there) = (original.clone(), there.clone());
                let to = target.stanza().clone();
                twins.learn((source.stanza(), &original), (&to, &there)).await?;
            }
            backup::copy(source, target, backup, &mut twins, &locks, progress, stop).await
        };
        match copied.await {
            Ok(copy) => {
                report.backups.push(BackupLine {
                    copy: copy.id,
                    stored_bytes: copy.new_stored_bytes,
                    ..line(backup)
                });
                // Before anything else can fail: without it, the target might not keep it.
                carry_holds(source, target, &mut report.notes).await;
            }
            Err(error) if error.kind() == Kind::Held => {
                target.refresh().await?;
                // Another copy was faster.
                if state::find_origin(target.state(), &state::origin(source.state(), &facts)).is_none() {
                    return Err(error);
                }
            }
            // It has expired there since the copy began.
            Err(error) if error.kind() == Kind::Refused && state::has_its_wal(target.state(), &facts).is_err() => {
                report.left.push(Left {
                    id: facts.id,
                    why: "the WAL that it needs has expired in the target".to_owned(),
                });
            }
            // Damage of one backup does not stand in the way of another.
            Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => report.failed.push(Left {
                id: facts.id,
                why: error.to_string(),
            }),
            Err(error) => return Err(error),
        }
    }
    carry_holds(source, target, &mut report.notes).await;
    Ok(())
}

/// What is held in the source is held in the target too: a hold may have been said while that was away.
async fn carry_holds(source: &Log, target: &mut Log, notes: &mut Vec<String>) {
    for hold in &source.state().holds {
        let held = source
            .state()
            .backups
            .iter()
            .find(|backup| info(backup).id == hold.backup);
        let copy = held.and_then(|b| state::find_origin(target.state(), &state::origin(source.state(), &info(b))));
        let Some(id) = copy.map(|copy| info(copy).id) else {
            continue;
        };
        if target.state().holds.iter().any(|other| other.backup == id) {
            continue;
        }
        if let Err(error) = expire::hold(target, &id, &hold.reason, false).await {
            notes.push(format!(
                "backup {id} is held in {}, and not there: {error}",
                source.stanza().shown()
            ));
        }
    }
}

impl std::ops::AddAssign for wal::Counts {
    fn add_assign(&mut self, other: Self) {
        self.segments += other.segments;
        self.parts += other.parts;
        self.files += other.files;
        self.bytes += other.bytes;
        self.compared += other.compared;
    }
}
