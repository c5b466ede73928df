//! Backups that have expired, as the entries of a log say.
//!
//! What always holds: only what was live when its expiry was written is here. A commit that never counted is no backup,
//! whatever the entry that came later takes away.

use fairvault_format::proto::{CommittedBackup, LogEntry, Snapshot, log_entry::Kind as Entry};

use super::Log;
use super::authors::who;
use super::erased::shown_text;

/// A backup that has expired.
#[derive(Debug, Clone)]
pub struct Expiry {
    /// The backup.
    pub backup: CommittedBackup,
    /// By whom, when and why, in words: `by root on db1 at … (entry 7 of the log): reason`.
    pub said: String,
}

impl Expiry {
    /// What an entry takes away from the state that it follows on.
    pub(super) fn of(state: &Snapshot, entry: &LogEntry) -> Option<Self> {
        let Some(Entry::Expired(expired)) = &entry.kind else {
            return None;
        };
        let is_it = |b: &&CommittedBackup| b.info.as_ref().is_some_and(|info| info.id == expired.backup);
        let because = match expired.reason.as_str() {
            "" => String::new(),
            reason => format!(": {}", shown_text(reason)),
        };
        let by = who(&entry.user, &entry.host, entry.time_us, entry.seq);
        Some(Self {
            backup: state.backups.iter().find(is_it)?.clone(),
            said: format!("by {by}{because}"),
        })
    }
}

impl Log {
    /// Of a log that was replayed: the backup with this id that has expired, or else the copy of it. Of several, the last.
    pub fn expired(&self, id: &str) -> Option<&Expiry> {
        let all = || {
            let newest_first = self.expired.iter().rev();
            newest_first.filter_map(|expiry| Some((expiry.backup.info.as_ref()?, expiry)))
        };
        let named = all().find(|(info, _)| info.id == id);
        let copy = || {
            all().find(|(info, _)| {
                let original = info.copied_from.as_ref();
                original.is_some_and(|original| original.backup == id)
            })
        };
        named.or_else(copy).map(|(_, expiry)| expiry)
    }
}

#[cfg(test)]
mod tests {
    use fairvault_format::proto::{BackupInfo, Expired, Hold};

    use super::*;

    #[test]
    fn what_was_live_has_expired_and_nothing_else() {
        let backup = |id: &str, root: u8| CommittedBackup {
            root: vec![root; 32],
            info: Some(BackupInfo {
                id: id.to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let state = Snapshot {
            backups: vec![backup("a", 1), backup("b", 2)],
            ..Default::default()
        };
        let entry = |kind| LogEntry {
            seq: 7,
            host: "db1".to_owned(),
            user: "root".to_owned(),
            kind: Some(kind),
            ..Default::default()
        };
        let expired = |backup: &str, reason: &str| {
            entry(Entry::Expired(Expired {
                backup: backup.to_owned(),
                reason: reason.to_owned(),
                ..Default::default()
            }))
        };
        let found = Expiry::of(&state, &expired("b", "no rule\nkeeps it")).unwrap();
        assert_eq!(found.backup.root, [2; 32]);
        assert_eq!(
            found.said,
            "by root on db1 at 1970-01-01T00:00:00Z (entry 7 of the log): no rule\u{fffd}keeps it"
        );
        assert!(Expiry::of(&state, &expired("c", "")).is_none());
        assert!(Expiry::of(&state, &entry(Entry::Hold(Hold::default()))).is_none());
    }
}
