//! Who wrote what this process has read of a log: for those who come second.
//!
//! What always holds: it is for messages alone, and decides nothing; entries without effect have no author. What a process
//! has from a snapshot, or this host remembers, has none either: whoever comes second has read the entry that came first.

use std::collections::BTreeMap;

use fairvault_format::proto::{LogEntry, log_entry::Kind as Entry};

use super::Log;
use super::erased::shown_text;

/// What somebody else may have done first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Deed {
    /// The stanza was created.
    Creation,
    /// A key epoch began.
    Rotation,
    /// The stanza goes on with another cluster.
    Upgrade,
    /// A timeline was closed, or reopened.
    Closing,
}

impl Deed {
    /// What an entry does. `begins_epoch`: it names a key epoch, and that rules from there on.
    fn of(entry: &LogEntry, begins_epoch: bool) -> Option<Self> {
        match entry.kind.as_ref()? {
            Entry::Genesis(_) => Some(Self::Creation),
            Entry::KeyEpoch(_) if begins_epoch => Some(Self::Rotation),
            Entry::Incarnation(_) => Some(Self::Upgrade),
            Entry::CloseTimeline(_) => Some(Self::Closing),
            _ => None,
        }
    }
}

/// Who did it last, and when, in words.
#[derive(Debug, Clone, Default)]
pub(super) struct Authors(BTreeMap<Deed, String>);

impl Authors {
    /// An entry was read that has an effect.
    pub(super) fn see(&mut self, entry: &LogEntry, begins_epoch: bool) {
        if let Some(deed) = Deed::of(entry, begins_epoch) {
            let author = who(&entry.user, &entry.host, entry.time_us, entry.seq);
            self.0.insert(deed, author);
        }
    }

    fn of(&self, deed: Deed) -> String {
        self.0
            .get(&deed)
            .map(|author| format!(": {author}"))
            .unwrap_or_default()
    }
}

impl Log {
    /// Who did it last, and when, for a message: `: root on db1 at … (entry 7 of the log)`. Empty if this process has not
    /// read the entry.
    pub fn whose(&self, deed: Deed) -> String {
        self.authors.of(deed)
    }
}

/// Who wrote an entry, and when: `root on db1 at … (entry 7 of the log)`.
pub(super) fn who(user: &str, host: &str, time_us: i64, seq: u64) -> String {
    let time = jiff::Timestamp::from_microsecond(time_us).unwrap_or_default();
    let user = match user {
        "" => "somebody".to_owned(),
        user => shown_text(user),
    };
    format!(
        "{user} on {} at {} (entry {seq} of the log)",
        shown_text(host),
        time.strftime("%Y-%m-%dT%H:%M:%SZ")
    )
}

#[cfg(test)]
mod tests {
    use fairvault_format::proto::{CloseTimeline, Hold, Incarnation, KeyEpoch};

    use super::*;

    fn entry(seq: u64, user: &str, kind: Entry) -> LogEntry {
        LogEntry {
            seq,
            time_us: 86_400_000_000,
            host: "db1".to_owned(),
            user: user.to_owned(),
            kind: Some(kind),
            ..Default::default()
        }
    }

    #[test]
    fn the_last_one_who_did_it_is_named() {
        let mut authors = Authors::default();
        assert_eq!(authors.of(Deed::Upgrade), "");
        authors.see(&entry(7, "root", Entry::Incarnation(Incarnation::default())), false);
        authors.see(&entry(8, "", Entry::Incarnation(Incarnation::default())), false);
        authors.see(
            &entry(9, "x\u{1b}[2J", Entry::CloseTimeline(CloseTimeline::default())),
            false,
        );
        authors.see(&entry(10, "root", Entry::Hold(Hold::default())), false);
        assert_eq!(
            authors.of(Deed::Upgrade),
            ": somebody on db1 at 1970-01-02T00:00:00Z (entry 8 of the log)"
        );
        // What others have written is shown in one line.
        let closing = authors.of(Deed::Closing);
        assert!(closing.contains("entry 9") && !closing.contains('\u{1b}'), "{closing}");
    }

    #[test]
    fn an_epoch_that_does_not_rule_has_no_author() {
        let mut authors = Authors::default();
        authors.see(&entry(7, "root", Entry::KeyEpoch(KeyEpoch::default())), false);
        assert_eq!(authors.of(Deed::Rotation), "");
        authors.see(&entry(8, "root", Entry::KeyEpoch(KeyEpoch::default())), true);
        assert!(authors.of(Deed::Rotation).contains("root on db1"));
    }
}
