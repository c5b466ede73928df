//! Which backups are needed: those that are live, and those that the signed policy protects although an entry
//! says that they expired.
//!
//! What always holds: what the policy protects is as old as the newest backup says, not as this host's clock does: one
//! that is ahead makes nothing old.

use std::collections::HashSet;

use fairvault_format::proto::{CommittedBackup, Policy, log_entry::Kind as Entry};

use crate::commit::Log;
use crate::expire::QUIET_US;
use crate::expire::rules::believed;
use crate::restore::target::info;

/// The backups of a log that was replayed.
pub struct Past {
    live: Vec<CommittedBackup>,
    protected: Vec<CommittedBackup>,
    expired: Vec<CommittedBackup>,
    /// Entries of backups that are younger than what the policy keeps.
    young: HashSet<u64>,
    policy: Policy,
}

impl Past {
    /// What the entries amount to.
    pub fn of(log: &Log) -> Self {
        let state = log.state();
        let live = state.backups.clone();
        let policy = state.policy.clone().unwrap_or_default();
        let roots: HashSet<&[u8]> = live.iter().map(|backup| backup.root.as_slice()).collect();
        let mut expired = Vec::new();
        let mut committed = Vec::new();
        for entry in log.entries().iter().filter(|entry| !log.is_void(entry.seq)) {
            match &entry.kind {
                Some(Entry::Commit(commit)) => committed.push(CommittedBackup {
                    seq: entry.seq,
                    root: commit.root.clone(),
                    info: commit.info.clone(),
                    key_epoch: 0,
                }),
                Some(Entry::Expired(gone)) => {
                    let is_it = |backup: &CommittedBackup| info(backup).id == gone.backup;
                    // All commits of that id: a second one does no harm here, it is merely protected.
                    expired.extend(committed.iter().filter(|backup| is_it(backup)).cloned());
                }
                _ => {}
            }
        }
        let mut seen = HashSet::new();
        expired.retain(|backup: &CommittedBackup| {
            !roots.contains(backup.root.as_slice()) && seen.insert(backup.root.clone())
        });
        let young = young(&committed, &policy, log.stanza().env().now_us());
        let mut protected: Vec<_> = expired
            .iter()
            .filter(|backup| young.contains(&backup.seq))
            .cloned()
            .collect();
        let is_full = |backup: &&CommittedBackup| info(backup).r#type == "full";
        let fulls = live.iter().filter(is_full).count() + protected.iter().filter(is_full).count();
        let missing = (policy.minimum_full as usize).saturating_sub(fulls);
        let newest = expired.iter().rev().filter(is_full);
        let more: Vec<_> = newest
            .filter(|backup| protected.iter().all(|p| p.root != backup.root))
            .take(missing)
            .cloned()
            .collect();
        protected.extend(more);
        Self {
            live,
            protected,
            expired,
            young,
            policy,
        }
    }

    /// Whether a backup is younger than what the policy keeps.
    pub fn is_young(&self, backup: &CommittedBackup) -> bool {
        self.young.contains(&backup.seq)
    }

    /// Backups that have not expired.
    pub fn live(&self) -> &[CommittedBackup] {
        &self.live
    }

    /// Expired ones that the policy protects, as far as they are still there.
    pub fn protected(&self) -> &[CommittedBackup] {
        &self.protected
    }

    /// Backups whose content must stay.
    pub fn needed(&self) -> impl Iterator<Item = &CommittedBackup> {
        self.live.iter().chain(&self.protected)
    }

    /// Every backup with this id that was ever committed, or all of them for an empty id.
    pub fn named<'a>(&'a self, id: &'a str) -> impl Iterator<Item = &'a CommittedBackup> {
        let all = self.live.iter().chain(&self.expired);
        all.filter(move |backup| id.is_empty() || info(backup).id == id)
    }

    /// What is kept against what the log says, in words.
    pub fn kept_by_policy(&self) -> Vec<String> {
        let lines = self.protected.iter().map(|backup| {
            format!(
                "backup {} has expired, and the signed policy keeps backups for {} and {} full ones: its content stays",
                info(backup).id,
                jiff::SignedDuration::from_secs(self.policy.minimum_retention_s.try_into().unwrap_or(i64::MAX)),
                self.policy.minimum_full
            )
        });
        lines.collect()
    }
}

/// Backups that may have been taken by a clock that is ahead: where they are always that rare, they were not.
const DOUBTS: usize = 2;

/// Entries of the backups, all that were ever committed, that are younger than what the policy keeps.
fn young(committed: &[CommittedBackup], policy: &Policy, now_us: i64) -> HashSet<u64> {
    let kept_us = policy.minimum_retention_s.saturating_mul(1_000_000);
    let times = believed(committed.iter().map(|backup| info(backup).stopped_us).collect(), now_us);
    // A backup that was taken long after the one before may have been taken by a clock that is ahead.
    let is_in_doubt = |pair: &&[i64]| pair[1].saturating_sub(pair[0]) > QUIET_US;
    let doubts = times.windows(2).rev().take(DOUBTS).take_while(is_in_doubt).count();
    let newest = times.iter().rev().nth(doubts).copied().unwrap_or_default();
    let ages = committed.iter().zip(&times);
    ages.filter(|(_, time)| kept_us > 0 && **time > newest.saturating_sub_unsigned(kept_us))
        .map(|(backup, _)| backup.seq)
        .collect()
}

#[cfg(test)]
mod tests {
    use fairvault_format::proto::BackupInfo;

    use super::*;

    const DAY: i64 = 86_400_000_000;

    #[test]
    fn no_clock_makes_old_what_the_policy_protects() {
        let times = [1, 20, 3, 40, 41].map(|day| day * DAY);
        let backup = |(seq, stopped_us)| CommittedBackup {
            seq,
            info: Some(BackupInfo {
                stopped_us,
                ..Default::default()
            }),
            ..Default::default()
        };
        let committed: Vec<_> = (1..).zip(times).map(backup).collect();
        let policy = |days: u64| Policy {
            minimum_retention_s: days * 86_400,
            ..Default::default()
        };
        let young = |days, now: i64| {
            let mut seqs: Vec<u64> = young(&committed, &policy(days), now * DAY).into_iter().collect();
            seqs.sort_unstable();
            seqs
        };
        assert!(young(0, 41).is_empty());
        // The third was taken by a host whose clock was behind: it is no older than the one before.
        assert_eq!(young(30, 41), [2, 3, 4, 5]);
        assert_eq!(young(10, 41), [4, 5]);
        // Years ahead.
        assert_eq!(young(30, 4100), [2, 3, 4, 5]);
        // So is that of the host that took the newest one.
        let mut ahead = committed.clone();
        if let Some(info) = &mut ahead[4].info {
            info.stopped_us = 4100 * DAY;
        }
        let young_then = super::young(&ahead, &policy(30), 4100 * DAY);
        assert!(
            [2, 3, 4, 5].iter().all(|seq| young_then.contains(seq)),
            "{young_then:?}"
        );
        // This host's clock is behind: what comes from the future is of now.
        assert_eq!(young(10, 22), [2, 3, 4, 5]);
    }
}
