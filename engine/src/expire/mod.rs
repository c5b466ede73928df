//! Retention: which backups, and which WAL, are needed no more. What is decided here is written into the log;
//! [`crate::gc`] deletes what nobody uses then.
//!
//! What always holds: it is decided by the entries of the log, each of which is signed by somebody who may say it, and by no
//! snapshot of it; a backup expires only while all that stay instead of it are there: two that decide at once, by other rules
//! or by other damage that they know of, do not take away one another's last one.

pub mod clock;
pub mod rules;
pub mod wal;

use std::collections::HashSet;

use fairvault_format::proto::{self, BackupInfo, CommittedBackup, log_entry::Kind as Entry};
use serde::Serialize;

use crate::commit::Log;
use crate::env::has_fault;
use crate::error::{Error, Result};
use crate::inspect::{damage, info_of};
use crate::postgres::lsn::Lsn;
use crate::restore::target::info;
use crate::wal::archive::Archive;
use crate::wal::coverage::Coverage;
pub(crate) use clock::QUIET_US;
use rules::{Candidate, Decision, Floor, Retention, decide};
use wal::{Expiring, Kept};

/// How to go about it.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// What to keep.
    pub retention: Retention,
    /// Only say it.
    pub dry_run: bool,
    /// The clock of this host is right, although more time than usual seems to lie between the last backups.
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

/// WAL that expires.
#[derive(Debug, Clone, Serialize)]
pub struct WalLine {
    /// Its cluster.
    pub system_identifier: String,
    /// Its timeline.
    pub timeline: u32,
    /// The first position.
    pub from_lsn: String,
    /// The position behind the last.
    pub to_lsn: String,
    /// Segments that are there, whole or in parts.
    pub segments: u64,
}

/// What was decided.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Each backup, oldest first.
    pub backups: Vec<BackupLine>,
    /// WAL that expires.
    pub wal: Vec<WalLine>,
    /// What is to be known of the WAL that stays.
    pub wal_notes: Vec<String>,
    /// What is to be known of backups.
    pub notes: Vec<String>,
}

/// Decides, and writes it into the log.
pub async fn run(log: &mut Log, options: &Options) -> Result<Report> {
    log.prove().await?;
    let now_us = log.stanza().env().now_us();
    let mut report = Report::default();
    let mut candidates = candidates(log, &options.retention, now_us).await?;
    // Which WAL stays depends on it, too, although every backup stays.
    let decides = options.retention.has_rules() || options.retention.wal.is_some();
    let policy = log.state().policy.clone().unwrap_or_default();
    // By numbers alone nothing is too old.
    if !options.trust_clock && (options.retention.has_times() || policy.minimum_retention_s > 0) && decides {
        clock::check(log, now_us)?;
    }
    let floor = Floor {
        age_s: policy.minimum_retention_s,
        fulls: policy.minimum_full,
    };
    if decides {
        let mut damage = damage::of_all(log).await?;
        for candidate in &mut candidates {
            candidate.damage = damage.remove(&candidate.id);
            if let Some(why) = &candidate.damage {
                report.notes.push(format!(
                    "backup {} cannot be restored as it is, and takes the place of no other: {why}",
                    candidate.id
                ));
            }
        }
    }
    let decisions = decide(&candidates, &options.retention, floor, now_us);
    let backups = log.state().backups.clone();
    let lines = backups
        .iter()
        .zip(&decisions)
        .map(|(backup, decision)| line(backup, decision));
    report.backups = lines.collect();
    let kept: Vec<(CommittedBackup, bool)> = backups
        .iter()
        .zip(&decisions)
        .filter(|(_, decision)| decision.keep)
        .map(|(backup, decision)| (backup.clone(), decision.goes_on))
        .collect();
    let judged = candidates.iter().zip(&decisions);
    let proven: HashSet<u64> = judged
        .filter(|(candidate, decision)| decision.keep && candidate.is_good())
        .map(|(candidate, _)| candidate.system_identifier)
        .collect();
    let expiring = match decides {
        true => expiring_wal(log, &kept, &proven, &mut report.wal_notes).await?,
        false => Vec::new(),
    };
    report.wal = expiring.iter().map(wal_line).collect();
    if options.dry_run {
        return Ok(report);
    }
    let judged = log.state().clone();
    for decision in decisions.iter().filter(|decision| !decision.keep) {
        let facts = backups.iter().map(info).find(|info| info.id == decision.id);
        let entry = proto::Expired {
            backup: decision.id.clone(),
            reason: decision.why.clone(),
            bytes: facts.map_or(0, |info| info.new_stored_bytes),
        };
        let is_free = |now: &proto::Snapshot| match now.policy == judged.policy {
            true => may_expire(&decision.id, kept.iter().map(|(backup, _)| backup), now),
            false => Err(Error::temporary("the signed policy was changed meanwhile").remedy("run this again")),
        };
        let is_live = |now: &proto::Snapshot| now.backups.iter().any(|backup| info(backup).id == decision.id);
        if is_live(log.state()) {
            log.append(Entry::Expired(entry), is_free).await?;
        }
    }
    // A backup that was committed meanwhile may need what nobody seemed to need.
    let is_same = |now: &proto::Snapshot| {
        let left = now.backups.iter().map(|backup| &backup.root);
        match left.eq(kept.iter().map(|(backup, _)| &backup.root))
            && now.policy == judged.policy
            && now.incarnations == judged.incarnations
        {
            true => Ok(()),
            false => Err(
                Error::temporary("a backup was committed meanwhile, and may need WAL that was to expire")
                    .remedy("run this again"),
            ),
        }
    };
    for wal in expiring {
        log.append(Entry::ExpiredWal(wal.wal), is_same).await?;
    }
    Ok(report)
}

/// Fails if a backup, although it was decided that it goes and that `kept` stay, may not go in the state that its entry
/// would follow: somebody has put a hold on it, or one of those that stay has expired meanwhile.
fn may_expire<'a>(id: &str, mut kept: impl Iterator<Item = &'a CommittedBackup>, now: &proto::Snapshot) -> Result<()> {
    if let Some(hold) = now.holds.iter().find(|hold| hold.backup == id) {
        return Err(Error::refused(format!("backup {id} is held: {}", hold.reason)));
    }
    let there: HashSet<&[u8]> = now.backups.iter().map(|backup| backup.root.as_slice()).collect();
    let is_gone = |backup: &&CommittedBackup| !there.contains(backup.root.as_slice());
    match kept.find(is_gone) {
        None => Ok(()),
        Some(gone) => Err(Error::temporary(format!(
            "backup {} has expired meanwhile, and was to stay when it was decided that {id} goes: {id} stays",
            info(gone).id
        ))
        .remedy("run this again; if two hosts expire backups, have them keep the same")),
    }
}

/// Backups at work need WAL from a position that the log does not know: it is behind every backup that was complete
/// when they began. The newest of those stands for them, with all WAL after it. `lives` if they may be of this cluster.
fn at_work(log: &Log, system_identifier: u64, lives: bool) -> std::result::Result<Vec<Kept>, String> {
    let state = log.state();
    let sessions = state
        .open_sessions
        .iter()
        .filter(|_| lives && !has_fault("expired wal"));
    let stands_for = |session: &proto::OpenSession| {
        let complete = state.backups.iter().filter(|backup| backup.seq < session.seq);
        let of_cluster = complete
            .map(info)
            .filter(|info| info.system_identifier == system_identifier);
        let newest = of_cluster.max_by_key(|info| (info.stop_timeline, info.stop_lsn));
        newest.ok_or_else(|| {
            format!(
                "a backup is at work on {}, and none is there from before it",
                session.host
            )
        })
    };
    let kept = |info: BackupInfo| Kept {
        info: BackupInfo {
            start_lsn: info.stop_lsn,
            ..info
        },
        goes_on: true,
    };
    sessions.map(stands_for).map(|info| info.map(kept)).collect()
}

fn wal_line(expiring: &Expiring) -> WalLine {
    WalLine {
        system_identifier: expiring.wal.system_identifier.to_string(),
        timeline: expiring.wal.timeline,
        from_lsn: Lsn(expiring.wal.from_lsn).to_string(),
        to_lsn: Lsn(expiring.wal.to_lsn).to_string(),
        segments: expiring.segments,
    }
}

/// Whether the `n`th of these clusters has had no successor: one that came later, and of which `proven` says that recovery
/// can begin from a backup of it. Every writer may say that another cluster came; that alone ends nothing.
fn lives_on(lives: &[proto::Incarnation], n: usize, proven: &HashSet<u64>) -> bool {
    let mut later = lives.iter().skip(n + 1);
    later.all(|life| !proven.contains(&life.system_identifier))
}

/// The WAL that backups need no more, of every incarnation; adds what else there is to say. `proven` are the clusters of
/// which a backup stays from which recovery can begin.
async fn expiring_wal(
    log: &Log,
    kept: &[(CommittedBackup, bool)],
    proven: &HashSet<u64>,
    notes: &mut Vec<String>,
) -> Result<Vec<Expiring>> {
    let lives = &log.state().incarnations;
    let mut all = Vec::new();
    for (n, life) in lives.iter().enumerate() {
        let id = life.system_identifier;
        let lives_on = lives_on(lives, n, proven);
        let of_life: Vec<Kept> = kept
            .iter()
            .map(|(backup, goes_on)| Kept {
                info: info(backup),
                goes_on: *goes_on,
            })
            .filter(|kept| kept.info.system_identifier == id)
            .collect();
        if of_life.is_empty() && lives_on {
            continue;
        }
        let of_life = match at_work(log, id, lives_on) {
            Ok(at_work) => of_life.into_iter().chain(at_work).collect::<Vec<_>>(),
            Err(why) => {
                notes.push(format!("no WAL of cluster {id} expires: {why}"));
                continue;
            }
        };
        let coverage = Coverage::read(&Archive::open(log, Some(id), 0)?).await?;
        match wal::expiring(&coverage, &of_life, id, lives_on) {
            Ok(expiring) => all.extend(expiring),
            Err(why) => notes.push(format!("no WAL of cluster {id} expires: {why}")),
        }
        let oldest = of_life
            .iter()
            .filter(|kept| kept.goes_on && kept.info.start_lsn < kept.info.stop_lsn);
        if let Some(oldest) = oldest.min_by_key(|kept| kept.info.start_lsn) {
            notes.push(format!(
                "WAL from {} on stays: recovery into it starts from backup {}",
                Lsn(oldest.info.start_lsn),
                oldest.info.id
            ));
        }
    }
    Ok(all)
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

async fn candidates(log: &Log, retention: &Retention, now_us: i64) -> Result<Vec<Candidate>> {
    let known = info_of(log).await?;
    let state = log.state();
    let window_us = retention.wal.unwrap_or(0).saturating_mul(1_000_000);
    let begin_us = now_us.saturating_sub_unsigned(window_us);
    // Recovery into the window does not go to a timeline whose last commit is older; the newest one lives.
    let is_in_window = |system_identifier: &str, timeline: u32| {
        let of_cluster = || {
            known
                .windows
                .iter()
                .filter(|w| w.system_identifier == system_identifier)
        };
        let newest = of_cluster().map(|w| w.timeline).max();
        let of_timeline = || of_cluster().filter(|w| w.timeline == timeline);
        let is_over = of_timeline().all(|w| w.to_us != 0 && w.to_us < begin_us);
        newest == Some(timeline) || !is_over
    };
    let all = state.backups.iter().map(|backup| {
        let info = info(backup);
        let line = known.backups.iter().find(|b| b.id == info.id);
        let timelines = line.map_or(&[][..], |line| &line.leads_to).iter().copied();
        let cluster = info.system_identifier.to_string();
        Candidate {
            restorable: line.is_some_and(|line| line.restorable),
            damage: None,
            timelines: timelines.filter(|timeline| is_in_window(&cluster, *timeline)).collect(),
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
    // What is not said stays as it is.
    log.prove().await?;
    let mut policy = log.state().policy.clone().unwrap_or_default();
    policy.minimum_retention_s = minimum_retention_s.unwrap_or(policy.minimum_retention_s);
    policy.minimum_full = minimum_full.unwrap_or(policy.minimum_full);
    log.append(Entry::Policy(policy.clone()), |_| Ok(())).await?;
    Ok(policy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn backup(id: &str) -> CommittedBackup {
        CommittedBackup {
            root: id.as_bytes().to_vec(),
            info: Some(BackupInfo {
                id: id.to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn state(ids: &[&str]) -> proto::Snapshot {
        proto::Snapshot {
            backups: ids.iter().map(|id| backup(id)).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn nothing_expires_without_all_that_stays_instead_of_it() {
        let (kept, both) = ([backup("c"), backup("d")], state(&["a", "b", "c", "d"]));
        assert!(may_expire("a", kept.iter(), &both).is_ok());
        // The first of two is gone already, by this one or by another with the same rules; a new one was committed.
        assert!(may_expire("b", kept.iter(), &state(&["b", "c", "d", "e"])).is_ok());
        // Somebody who takes c for damaged, or keeps less, was faster.
        for left in [&["a", "b", "d"][..], &["a", "b"], &["a"], &["a", "e"], &[]] {
            let error = may_expire("a", kept.iter(), &state(left)).err();
            assert!(
                error.is_some_and(|error| error.kind() == Kind::Temporary && error.to_string().contains("a stays")),
                "{left:?}"
            );
        }
        // Another one under its id does not take its place.
        let mut other = both.clone();
        other.backups[2].root = b"another".to_vec();
        assert!(may_expire("a", kept.iter(), &other).is_err());
    }

    #[test]
    fn a_hold_that_was_put_meanwhile_counts() {
        let mut held = state(&["a", "c"]);
        held.holds.push(proto::Hold {
            backup: "a".to_owned(),
            reason: "a court".to_owned(),
            ..Default::default()
        });
        let error = may_expire("a", [backup("c")].iter(), &held).err();
        assert!(error.is_some_and(|error| error.kind() == Kind::Refused && error.to_string().contains("a court")));
    }

    /// Two that see different damage would each take away what the other one keeps: whoever is second does not.
    #[test]
    fn of_two_that_would_leave_nothing_one_is_stopped() {
        let mut now = state(&["a", "b"]);
        for (goes, stays) in [("a", "b"), ("b", "a")] {
            if may_expire(goes, [backup(stays)].iter(), &now).is_ok() {
                now.backups.retain(|backup| info(backup).id != goes);
            }
        }
        assert_eq!(now.backups, [backup("b")]);
    }

    /// Whoever has a key that writes can say that another cluster came, and commit what is no backup of it.
    #[test]
    fn a_cluster_ends_with_a_backup_of_the_next_one() {
        let lives = [1, 2, 3].map(|system_identifier| proto::Incarnation {
            system_identifier,
            ..Default::default()
        });
        let living = |proven: &[u64]| {
            let proven = proven.iter().copied().collect();
            [0, 1, 2].map(|n| lives_on(&lives, n, &proven))
        };
        assert_eq!(living(&[1, 2, 3]), [false, false, true]);
        assert_eq!(living(&[1]), [true, true, true]);
        assert_eq!(living(&[1, 2]), [false, true, true]);
        // One that the log does not know is none.
        assert_eq!(living(&[1, 4]), [true, true, true]);
    }
}
