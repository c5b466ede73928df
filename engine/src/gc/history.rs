//! Which backups are needed: those that are live, and those that the signed policy protects although an entry
//! says that they expired.

use std::collections::HashSet;

use fairvault_format::proto::{CommittedBackup, Policy, log_entry::Kind as Entry};

use crate::commit::Log;
use crate::restore::target::info;

/// The backups of a log that was replayed.
pub struct Past {
    live: Vec<CommittedBackup>,
    protected: Vec<CommittedBackup>,
    expired: Vec<CommittedBackup>,
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
        let now = log.stanza().env().now_us();
        let youngest = now.saturating_sub_unsigned(policy.minimum_retention_s.saturating_mul(1_000_000));
        let mut protected: Vec<_> = expired
            .iter()
            .filter(|backup| policy.minimum_retention_s > 0 && info(backup).stopped_us > youngest)
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
            policy,
        }
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
