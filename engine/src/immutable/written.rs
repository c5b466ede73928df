//! The log as it was written first, where its bucket keeps versions.
//!
//! Whoever may store objects can store another entry above one of the log; with a key that writes, one that opens and
//! follows on the entry before. What can be seen is then another log, and a valid one. A host that remembers nothing and
//! goes on above entries that somebody has deleted makes one, too. What always holds: of each entry, the oldest version
//! that follows on the entry before is the right one, since an entry is stored only where nothing is; nothing of either
//! log is deleted; which of two comes back is asked for where the other one says anything that lasts.

use std::collections::BTreeMap;

use bytes::Bytes;
use fairvault_format::proto::{self, LogEntry, log_entry::Kind as Entry};
use fairvault_format::{limits, names};

use super::hidden::{Hidden, have_same_content};
use crate::commit::Log;
use crate::error::{Error, Kind, Result};
use crate::store::Store;
use crate::store::versions::{Object, Version};

/// Versions of one entry that are read to find the right one, the oldest first, and then the newest. One is in memory at a
/// time. Where there are more, it is not known which one is right.
const TRIES: usize = 1000;

/// What came of reading a log as it was written first.
#[derive(Debug, Default)]
pub struct Found {
    /// Entries of it that cannot be seen.
    pub hidden: Vec<Hidden>,
    /// Another log can be seen.
    pub fork: Option<Fork>,
}

/// Two logs that part at an entry. Each is signed, and follows on the entry before.
#[derive(Debug)]
pub struct Fork {
    /// The first entry that differs.
    at: u64,
    /// The log that can be seen, as far as it can be read.
    seen: Log,
    /// Why it ends there, where that is no entry that does not follow on it: what lies behind is not known.
    cut: Option<String>,
}

/// Reads a log of which nothing was read yet as it was written first, to its end.
pub async fn of_log(log: &mut Log) -> Result<Found> {
    let store = log.stanza().store().clone();
    let several = match store.bucket_or_plain().await?.has_versions {
        true => several_versions(&store).await?,
        false => BTreeMap::new(),
    };
    read(log, several).await
}

/// Fails if entries of a log are hidden, or another log can be seen. `log` is one of which nothing was read yet: it is read
/// only where entries have several versions. That costs a list of these, one request for a thousand.
pub async fn check(log: Log) -> Result<()> {
    let several = several(log.stanza().store()).await?;
    check_these(log, several).await
}

/// Entries, by number, of which [`check`] reads the versions; an error if the bucket may not be asked.
pub async fn several(stanza: &Store) -> Result<BTreeMap<u64, Object>> {
    match stanza.bucket().await?.is_some_and(|bucket| bucket.has_versions) {
        true => several_versions(stanza).await,
        false => Ok(BTreeMap::new()),
    }
}

/// The same as [`check`], for entries that are known to have several versions.
pub async fn check_these(mut log: Log, several: BTreeMap<u64, Object>) -> Result<()> {
    if several.is_empty() {
        return Ok(());
    }
    let store = log.stanza().store().clone();
    match read(&mut log, several).await?.hidden.first() {
        None => Ok(()),
        Some(first) => Err(Error::damaged(format!(
            "{}/{} is hidden: {}",
            store.shown(),
            first.object,
            first.problem
        ))
        .remedy(format!(
            "find out who did that; `fairvault repair {} --dry-run` says more, and without --dry-run brings it back",
            log.stanza().name()
        ))),
    }
}

/// Entries, by number, of which there is more than one content, or none that can be seen.
async fn several_versions(stanza: &Store) -> Result<BTreeMap<u64, Object>> {
    let mut several = BTreeMap::new();
    let mut listing = stanza.versions(&format!("{}/", names::LOG));
    while let Some(page) = listing.next().await? {
        for object in page.into_iter().filter(has_several) {
            let number = object.name.rsplit('/').next().and_then(names::parse_log);
            if let Some(seq) = number.filter(|seq| names::log_context(*seq) == object.name) {
                several.insert(seq, object);
            }
        }
    }
    Ok(several)
}

fn has_several(object: &Object) -> bool {
    !object.is_visible() || !have_same_content(object)
}

async fn read(log: &mut Log, mut several: BTreeMap<u64, Object>) -> Result<Found> {
    let mut found = Found::default();
    loop {
        let after = log.state().seq + 1;
        let at = several.range(after..).next().map(|(seq, _)| *seq);
        let stopped = log.refresh_up_to(at.map_or(u64::MAX, |at| at - 1)).await;
        if stopped.as_ref().is_err_and(|error| error.kind() == Kind::Temporary) {
            return stopped.map(|()| found);
        }
        let is_followed = match several.remove(&(log.state().seq + 1)) {
            Some(object) => follow_oldest(log, &object, &mut found).await?,
            None => false,
        };
        if is_followed {
            continue;
        }
        // None of its versions follows: what can be seen of it is what everybody is stuck at, or an entry of just now.
        let seq = log.state().seq;
        let stopped = match stopped {
            Ok(()) if at.is_some() => log.refresh_up_to(seq + 1).await,
            stopped => stopped,
        };
        if stopped.is_ok() && log.state().seq > seq {
            continue;
        }
        match (stopped, &found.fork) {
            // What comes then is of the other log.
            (Err(error), Some(_)) if error.kind() == Kind::Damaged => {}
            (stopped, _) => stopped?,
        }
        found.read_fork().await?;
        return Ok(found);
    }
}

/// Reads on with the oldest version of an entry that follows on the entry before. `false` if none does.
async fn follow_oldest(log: &mut Log, object: &Object, found: &mut Found) -> Result<bool> {
    let store = log.stanza().store().clone();
    let newest = object.versions.first().filter(|newest| !newest.is_marker);
    let mut doubt = None;
    for version in object.contents().take(TRIES).chain(newest) {
        let bytes = match content(&store, object, version).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => continue,
            Err(error) if is_passing_error(&error) => return Err(error),
            // It may be the right one, unless another one proves that it is not.
            Err(error) => {
                doubt.get_or_insert(error);
                continue;
            }
        };
        match log.check_next(&bytes) {
            Ok(()) => {}
            // So may it be for a newer version, which nobody has signed.
            Err(error) if error.kind() == Kind::Unsupported => {
                doubt.get_or_insert(error);
                continue;
            }
            Err(_) => continue,
        }
        let seen = match newest {
            Some(newest) if newest.id == version.id => Some(bytes.clone()),
            // One that nobody can read hides what is below.
            Some(newest) => match content(&store, object, newest).await {
                Err(error) if !is_passing_error(&error) => None,
                seen => seen?,
            },
            None => None,
        };
        if seen.as_ref() != Some(&bytes) {
            if let Some(seen) = seen.filter(|seen| found.fork.is_none() && log.check_next(seen).is_ok()) {
                let mut other = log.clone();
                other.follow(&seen)?;
                found.fork = Some(Fork {
                    at: other.state().seq,
                    seen: other,
                    cut: None,
                });
            }
            found.hidden.push(Hidden::new(&store, object, version));
        }
        log.follow(&bytes)?;
        return Ok(true);
    }
    let count = object.contents().count();
    match doubt {
        _ if count > TRIES => Err(Error::damaged(format!(
            "{}/{} has {count} versions: it does not follow on the entry before, and neither do the oldest {TRIES} of them, \
             which are all that is looked at",
            store.shown(),
            object.name
        ))
        .remedy(format!(
            "find out who did that. If it never was an entry, and none follows on it, `fairvault repair {} --drop-entry {}` \
             takes it away",
            log.stanza().name(),
            log.state().seq + 1
        ))),
        Some(error) => Err(error),
        None => Ok(false),
    }
}

/// Trying again may help.
fn is_passing_error(error: &Error) -> bool {
    matches!(error.kind(), Kind::Temporary | Kind::Interrupted)
}

/// The content of a version; `None` if it is gone, or longer than an entry can be.
async fn content(store: &Store, object: &Object, version: &Version) -> Result<Option<Bytes>> {
    if version.size > limits::LOG_ENTRY_BYTES {
        return Ok(None);
    }
    store
        .get_version(&object.name, &version.id, limits::LOG_ENTRY_BYTES)
        .await
}

impl Found {
    /// Reads the log that can be seen as far as that goes, and says so where it begins.
    async fn read_fork(&mut self) -> Result<()> {
        let Some(fork) = &mut self.fork else {
            return Ok(());
        };
        match fork.seen.refresh().await {
            Ok(()) => {}
            Err(error) if is_passing_error(&error) => return Err(error),
            // It may end in what is left of the first one.
            Err(error) if error.kind() == Kind::Damaged => {}
            Err(error) => fork.cut = Some(error.to_string()),
        }
        let name = names::log_context(fork.at);
        for hidden in self.hidden.iter_mut().filter(|hidden| hidden.object == name) {
            hidden.problem += &format!("; another log begins here, which goes on to {}", fork.goes_on());
        }
        Ok(())
    }
}

/// Entries from `at` on that count.
fn entries(log: &Log, at: u64) -> impl Iterator<Item = &LogEntry> {
    let is_valid = move |entry: &&LogEntry| entry.seq >= at && !log.is_void(entry.seq);
    log.entries().iter().filter(is_valid)
}

/// Where a log ends, and the backups in it from `at` on.
fn end(log: &Log, at: u64) -> String {
    let backups: Vec<&str> = entries(log, at)
        .filter_map(|entry| match &entry.kind {
            Some(Entry::Commit(commit)) => commit.info.as_ref().map(|info| info.id.as_str()),
            _ => None,
        })
        .collect();
    let with = match backups.len() {
        0 => "no new backup".to_owned(),
        1 => format!("backup {}", backups[0]),
        _ => format!("backups {}", backups.join(", ")),
    };
    format!("entry {} with {with}", log.state().seq)
}

/// What an entry says is needed later by nobody: by itself, it is no backup and decides nothing.
fn is_passing(entry: &LogEntry) -> bool {
    matches!(
        entry.kind,
        Some(Entry::Begin(_) | Entry::Announce(_) | Entry::Abort(_) | Entry::Operation(_))
    )
}

impl Fork {
    /// The last entry of the log that can be seen, as far as it can be read.
    pub fn end(&self) -> u64 {
        self.seen.state().seq
    }

    /// What lies behind that is not known.
    pub fn is_cut(&self) -> bool {
        self.cut.is_some()
    }

    /// What the log that can be seen says of an erasure.
    pub fn erased(&self) -> Option<proto::Erased> {
        self.seen.state().erased.clone()
    }

    /// Where the log that can be seen ends, in words.
    fn goes_on(&self) -> String {
        let end = end(&self.seen, self.at);
        match &self.cut {
            None => end,
            Some(why) => format!("{end}, and where it cannot be read from there on ({why})"),
        }
    }

    /// Whether the log that was written first may come back: because somebody wants it, who names the entry, or because
    /// the other one says nothing that lasts. An error that says what each of them has if not, or if this host saw neither.
    pub fn decide(&self, first: &Log, wanted: Option<u64>) -> Result<()> {
        let at = self.at;
        if first.check_seen().is_err() {
            self.seen.check_seen()?;
        }
        let may = match wanted {
            Some(wanted) => wanted == at,
            None => !self.is_cut() && entries(&self.seen, at).all(is_passing),
        };
        if may {
            return Ok(());
        }
        let stanza = first.stanza();
        Err(Error::damaged(format!(
            "{} has two logs that part at entry {at}: the one that was written first goes on to {}; the one that can be \
             seen hides it, and goes on to {}",
            stanza.shown(),
            end(first, at),
            self.goes_on()
        ))
        .remedy(format!(
            "find out who wrote the second one. `fairvault repair {} --older-log {at}` brings back the first one, and what \
             the second one says is lost then: if you want its backups, `fairvault copy` them into another repository before",
            stanza.name()
        )))
    }

    /// Makes room for the log that was written first, which is `log`: where the other one is longer, its entries get others
    /// above them that follow on the first one, and so does whatever lies behind what could be read of it: an earlier run
    /// may have died here. What this host saw of the other one it forgets. For what was decided.
    pub async fn make_room(&self, log: &mut Log) -> Result<()> {
        if log.check_seen().is_err() {
            log.remember_instead();
        }
        let from = log.state().seq + 1;
        while log.state().seq < self.seen.state().seq || log.has_other_next().await? {
            let operation = proto::Operation {
                what: "repair".to_owned(),
                result: format!(
                    "another log, which had begun at entry {}, had an entry here: the bucket keeps it as an older version",
                    self.at
                ),
                began_us: log.stanza().env().now_us(),
                ..Default::default()
            };
            log.append_over(Entry::Operation(operation)).await?;
        }
        if log.state().seq >= from {
            tracing::warn!(
                "entries {from} to {} of the log that could be seen are older versions from now on",
                log.state().seq
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: Entry) -> LogEntry {
        LogEntry {
            kind: Some(kind),
            ..Default::default()
        }
    }

    #[test]
    fn what_lasts_is_not_given_up_without_asking() {
        for passing in [
            Entry::Begin(proto::Begin::default()),
            Entry::Announce(proto::Announce::default()),
            Entry::Abort(proto::Abort::default()),
            Entry::Operation(proto::Operation::default()),
        ] {
            assert!(is_passing(&entry(passing)));
        }
        for lasting in [
            Entry::Commit(proto::Commit::default()),
            Entry::Incarnation(proto::Incarnation::default()),
            Entry::Expired(proto::Expired::default()),
            Entry::KeyEpoch(proto::KeyEpoch::default()),
            Entry::Policy(proto::Policy::default()),
            Entry::GcMark(proto::GcMark::default()),
        ] {
            assert!(!is_passing(&entry(lasting)));
        }
        assert!(!is_passing(&LogEntry::default()), "a kind of a newer version");
    }

    #[test]
    fn entries_with_one_content_are_not_looked_at() {
        let version = |id: &str, etag: &str, is_marker| Version {
            id: id.to_owned(),
            is_marker,
            modified_us: 0,
            size: 5,
            etag: etag.to_owned(),
        };
        let object = |versions: &[Version]| Object {
            name: names::log_context(7),
            versions: versions.to_vec(),
        };
        let (first, again) = (version("1", "a", false), version("2", "a", false));
        let (other, marker) = (version("3", "b", false), version("4", "", true));
        assert!(!has_several(&object(std::slice::from_ref(&first))));
        assert!(!has_several(&object(&[again, marker.clone(), first.clone()])));
        assert!(has_several(&object(&[other.clone(), first.clone()])));
        assert!(has_several(&object(&[marker, first.clone()])));
        // Where the store names no content, nothing is known to be the same.
        let (one, two) = (version("1", "", false), version("2", "", false));
        assert!(has_several(&object(&[two, one])));
        // What was there first is among them, whatever lies above it.
        assert!(has_several(&object(&[first.clone(), other, first])));
    }
}
