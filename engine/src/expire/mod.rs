//! Retention: which backups are needed no more. What is decided here is written into the log; [`crate::gc`] deletes
//! what nobody uses then. WAL does not expire yet.

pub mod rules;

use fairvault_format::proto::{self, log_entry::Kind as Entry};
use serde::Serialize;

use crate::commit::Log;
use crate::error::{Error, Result};
use crate::inspect::info_of;
use crate::restore::target::info;
use rules::{Candidate, Decision, Floor, Retention, days, decide};

/// Time between backups from which on this host's clock is doubted.
const QUIET_S: u64 = 45 * 86_400;

/// How to go about it.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// What to keep.
    pub retention: Retention,
    /// Only say it.
    pub dry_run: bool,
    /// The clock of this host is right, although long times seem to lie between the last backups.
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

/// What was decided.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Each backup, oldest first.
    pub backups: Vec<BackupLine>,
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
    let lines = backups
        .iter()
        .zip(&decisions)
        .map(|(backup, decision)| line(backup, decision));
    let report = Report {
        backups: lines.collect(),
    };
    if options.dry_run {
        return Ok(report);
    }
    let judged = log.state().clone();
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
            None if now.policy != judged.policy => Err(Error::temporary("the signed policy was changed meanwhile")),
            None => Ok(()),
        };
        let is_live = |now: &proto::Snapshot| now.backups.iter().any(|backup| info(backup).id == decision.id);
        if is_live(log.state()) {
            log.append(Entry::Expired(entry), is_free).await?;
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

/// A clock that is far ahead would make everything old: also if the newest backup was taken by it.
fn check_clock(log: &Log, now_us: i64) -> Result<()> {
    let mut times: Vec<i64> = log.state().backups.iter().map(|b| info(b).stopped_us).collect();
    times.push(now_us);
    times.sort_unstable();
    let last = times.iter().rev().zip(times.iter().rev().skip(1)).take(2);
    let quiet = last
        .map(|(later, earlier)| later.saturating_sub(*earlier))
        .max()
        .unwrap_or(0);
    let quiet = u64::try_from(quiet / 1_000_000).unwrap_or(0);
    match quiet > QUIET_S {
        false => Ok(()),
        true => Err(Error::refused(format!(
            "between the last backups of {}, or since the last one, {} seem to have passed: if this host's clock is ahead, backups that are young would expire",
            log.stanza().shown(),
            days(quiet)
        ))
        .remedy("if the clock is right, say so with --trust-clock")),
    }
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
