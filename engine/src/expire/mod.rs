//! Retention: which backups are needed no more, and from where on WAL is kept. What is decided here is written into
//! the log; [`crate::gc`] deletes what nobody uses then.

pub mod rules;

use fairvault_format::proto::{self, log_entry::Kind as Entry};
use serde::Serialize;

use crate::commit::Log;
use crate::error::{Error, Result};
use crate::inspect::info_of;
use crate::postgres::lsn::Lsn;
use crate::restore::target::info;
use rules::{Candidate, Decision, Floor, Retention, believed, days, decide};

/// Time since the newest entry of the log from which on this host's clock is doubted.
const QUIET_S: u64 = 14 * 86_400;

/// How to go about it.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// What to keep.
    pub retention: Retention,
    /// Only say it.
    pub dry_run: bool,
    /// The clock of this host is right, although nothing was written into the log for long.
    pub trust_clock: bool,
}

/// What is to become of a backup.
#[derive(Debug, Clone, Serialize)]
pub struct BackupLine {
    /// Backup.
    pub id: String,
    /// Its type.
    pub r#type: String,
    /// When it ended, RFC 3339.
    pub stopped: String,
    /// It stays.
    pub keep: bool,
    /// Why.
    pub why: String,
}

/// From where on WAL of an incarnation is kept.
#[derive(Debug, Clone, Serialize)]
pub struct WalLine {
    /// Incarnation.
    pub system_identifier: String,
    /// From here on it is continuous.
    pub from_lsn: String,
    /// Why.
    pub why: String,
}

/// What was decided.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Each backup, oldest first.
    pub backups: Vec<BackupLine>,
    /// WAL.
    pub wal: Vec<WalLine>,
}

/// Decides, and writes it into the log.
pub async fn run(log: &mut Log, options: &Options) -> Result<Report> {
    log.refresh().await?;
    let now_us = log.stanza().env().now_us();
    let candidates = candidates(log).await?;
    if !options.trust_clock && options.retention.has_rules() {
        check_clock(log, now_us)?;
    }
    let policy = log.state().policy.clone().unwrap_or_default();
    let floor = Floor {
        age_s: policy.minimum_retention_s,
        fulls: policy.minimum_full,
    };
    let decisions = decide(&candidates, &options.retention, floor, now_us);
    let backups = log.state().backups.clone();
    let kept: Vec<&proto::CommittedBackup> = backups
        .iter()
        .zip(&decisions)
        .filter(|(_, decision)| decision.keep)
        .map(|(backup, _)| backup)
        .collect();
    let wal = wal_limits(log, &candidates, &kept, &options.retention, now_us);
    let lines = backups
        .iter()
        .zip(&decisions)
        .map(|(backup, decision)| line(backup, decision));
    let report = Report {
        backups: lines.collect(),
        wal: wal.iter().map(|(line, _)| line.clone()).collect(),
    };
    if options.dry_run {
        return Ok(report);
    }
    for decision in decisions.iter().filter(|decision| !decision.keep) {
        let entry = proto::Expired {
            backup: decision.id.clone(),
            reason: decision.why.clone(),
        };
        // Somebody may have put a hold on it meanwhile.
        let is_free = |now: &proto::Snapshot| match now.holds.iter().find(|hold| hold.backup == decision.id) {
            Some(hold) => Err(Error::refused(format!(
                "backup {} is held: {}",
                decision.id, hold.reason
            ))),
            None => Ok(()),
        };
        let is_live = |now: &proto::Snapshot| now.backups.iter().any(|backup| info(backup).id == decision.id);
        if is_live(log.state()) {
            log.append(Entry::Expired(entry), is_free).await?;
        }
    }
    for (line, lsn) in wal {
        let known = log.state().wal_expired.iter();
        let system_identifier = line.system_identifier.parse().unwrap_or_default();
        let known = known
            .filter(|e| e.system_identifier == system_identifier)
            .map(|e| e.lsn)
            .max();
        if lsn.0 > known.unwrap_or_default() {
            let entry = proto::WalExpired {
                system_identifier,
                lsn: lsn.0,
                reason: line.why,
            };
            log.append(Entry::WalExpired(entry), |_| Ok(())).await?;
        }
    }
    Ok(report)
}

fn line(backup: &proto::CommittedBackup, decision: &Decision) -> BackupLine {
    let info = info(backup);
    let stopped = jiff::Timestamp::from_microsecond(info.stopped_us).unwrap_or_default();
    BackupLine {
        id: info.id,
        r#type: info.r#type,
        stopped: stopped.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        keep: decision.keep,
        why: decision.why.clone(),
    }
}

async fn candidates(log: &Log) -> Result<Vec<Candidate>> {
    let known = info_of(log).await?;
    let state = log.state();
    let all = state.backups.iter().map(|backup| {
        let info = info(backup);
        Candidate {
            restorable: known.backups.iter().any(|b| b.id == info.id && b.restorable),
            hold: state
                .holds
                .iter()
                .find(|h| h.backup == info.id)
                .map(|h| h.reason.clone()),
            id: info.id,
            kind: info.r#type,
            stopped_us: info.stopped_us,
            system_identifier: info.system_identifier,
        }
    });
    Ok(all.collect())
}

/// A clock that is far ahead would make everything old.
fn check_clock(log: &Log, now_us: i64) -> Result<()> {
    let newest = log.newest_time_us();
    let quiet = u64::try_from(now_us.saturating_sub(newest) / 1_000_000).unwrap_or(0);
    match newest != 0 && quiet > QUIET_S {
        false => Ok(()),
        true => Err(Error::refused(format!(
            "nothing was written into the log of {} for {}: if this host's clock is ahead, backups that are young would expire",
            log.stanza().shown(),
            days(quiet)
        ))
        .remedy("if the clock is right, say so with --trust-clock")),
    }
}

/// From where on WAL is needed, for each incarnation that has kept backups.
fn wal_limits(
    log: &Log,
    candidates: &[Candidate],
    kept: &[&proto::CommittedBackup],
    retention: &Retention,
    now_us: i64,
) -> Vec<(WalLine, Lsn)> {
    let times = believed(candidates, now_us);
    let time_of = |id: &str| {
        let place = candidates.iter().position(|c| c.id == id);
        place.map_or(now_us, |n| times[n])
    };
    let newest = log.state().incarnations.last().map(|i| i.system_identifier);
    let mut limits = Vec::new();
    for incarnation in &log.state().incarnations {
        let system_identifier = incarnation.system_identifier;
        let mut of_it: Vec<_> = kept
            .iter()
            .map(|backup| info(backup))
            .filter(|info| info.system_identifier == system_identifier)
            .collect();
        of_it.sort_by_key(|info| info.start_lsn);
        let before_window = |info: &&proto::BackupInfo| {
            retention.wal.is_some_and(|window| {
                let age = now_us.saturating_sub(time_of(&info.id)) / 1_000_000;
                u64::try_from(age).unwrap_or(0) >= window
            })
        };
        let anchor = of_it.iter().rev().find(before_window).or(of_it.first());
        let limit = match anchor {
            Some(info) => (Lsn(info.start_lsn), format!("recovery starts from backup {}", info.id)),
            // A life of the cluster of which no backup is left.
            None if Some(system_identifier) != newest
                && candidates.iter().any(|c| c.system_identifier == system_identifier) =>
            {
                (
                    Lsn(u64::MAX),
                    "no backup of this life of the cluster is left".to_owned(),
                )
            }
            None => continue,
        };
        let line = WalLine {
            system_identifier: system_identifier.to_string(),
            from_lsn: limit.0.to_string(),
            why: limit.1,
        };
        limits.push((line, limit.0));
    }
    limits
}

/// Holds a backup, or lets go of it.
pub async fn hold(log: &mut Log, backup: &str, reason: &str, released: bool) -> Result<()> {
    log.refresh().await?;
    let id = info(log.backup(backup)?).id;
    let entry = proto::Hold {
        backup: id.clone(),
        reason: reason.chars().take(500).collect(),
        released,
    };
    let allowed = |now: &proto::Snapshot| {
        let is_held = now.holds.iter().any(|hold| hold.backup == id);
        match now.backups.iter().any(|b| info(b).id == id) {
            false => Err(Error::not_found(format!("backup {id} has expired meanwhile"))),
            true if released && !is_held => Err(Error::not_found(format!("backup {id} is not held"))),
            true => Ok(()),
        }
    };
    log.append(Entry::Hold(entry), allowed).await?;
    Ok(())
}

/// Sets what is kept at least, whoever asks for less.
pub async fn set_policy(
    log: &mut Log,
    minimum_retention_s: Option<u64>,
    minimum_full: Option<u32>,
) -> Result<proto::Policy> {
    log.refresh().await?;
    let mut policy = log.state().policy.clone().unwrap_or_default();
    policy.minimum_retention_s = minimum_retention_s.unwrap_or(policy.minimum_retention_s);
    policy.minimum_full = minimum_full.unwrap_or(policy.minimum_full);
    log.append(Entry::Policy(policy.clone()), |_| Ok(())).await?;
    Ok(policy)
}
