//! What was done with a stanza: its log, verified from its first entry on, in words.
//!
//! What always holds: every line was signed by a key that may say it, follows on the one before, is still what this host
//! saw there, and is what a bucket that keeps versions had there first; or there is an error instead of lines.

use std::sync::Arc;

use fairvault_format::proto::{LogEntry, log_entry::Kind as Entry};
use serde::Serialize;

use crate::commit::Log;
use crate::error::{Kind, Result};
use crate::immutable::written;
use crate::postgres::lsn::Lsn;
use crate::stanza::Stanza;

/// An entry of the log.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// Its number.
    pub seq: u64,
    /// When it was written, by its writer's clock, RFC 3339.
    pub time: String,
    /// Where.
    pub host: String,
    /// By whom; empty if that is not known.
    pub user: String,
    /// What sort of entry it is.
    pub kind: &'static str,
    /// What it says.
    pub what: String,
    /// How much that was, where it is known: read, stored or deleted.
    pub bytes: u64,
    /// Its writer had been fenced before, or had keys that were rotated before: it has no effect.
    pub void: bool,
}

/// All that a stanza's log says.
#[derive(Debug, Serialize)]
pub struct Audit {
    /// Lines, oldest first.
    pub lines: Vec<Line>,
    /// SHA-256 of the newest entry: compare it with what another host sees.
    pub head: String,
}

/// Reads and verifies a stanza's log.
pub async fn read(stanza: Arc<Stanza>) -> Result<Audit> {
    let log = Log::unread(stanza.clone()).also_erased().replayed().await?;
    let several = written::several(stanza.store()).await;
    match several {
        // Not every reader may ask. Whoever may is told of each entry that cannot be read.
        Err(error) if error.kind() == Kind::Failed => {
            tracing::warn!("whether another log was there before is not looked at: {error}");
        }
        several => written::check_these(Log::unread(stanza).also_erased(), several?).await?,
    }
    if log.state().erased.is_some() {
        log.stanza().forget_keys();
    }
    let entries = log.entries().iter();
    let lines = entries.map(|entry| line(entry, log.is_void(entry.seq))).collect();
    Ok(Audit {
        lines,
        head: hex::encode(&log.state().head),
    })
}

fn line(entry: &LogEntry, void: bool) -> Line {
    let (kind, what) = entry.kind.as_ref().map_or(("", String::new()), words);
    let time = jiff::Timestamp::from_microsecond(entry.time_us).unwrap_or_default();
    Line {
        seq: entry.seq,
        time: time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        host: entry.host.clone(),
        user: entry.user.clone(),
        kind,
        what,
        bytes: entry.kind.as_ref().map_or(0, bytes),
        void,
    }
}

/// How much an entry is about.
fn bytes(entry: &Entry) -> u64 {
    match entry {
        Entry::Commit(commit) => commit.info.as_ref().map_or(0, |info| info.new_stored_bytes),
        Entry::Expired(expired) => expired.bytes,
        Entry::ExpiredWal(wal) => wal.bytes,
        Entry::GcSwept(swept) => swept.bytes,
        Entry::Operation(operation) => operation.bytes,
        _ => 0,
    }
}

/// The same in words, behind others; nothing where it is not known.
fn amount(bytes: u64) -> String {
    match bytes {
        0 => String::new(),
        1..1_048_576 => format!(", {} KiB", bytes.div_ceil(1 << 10)),
        _ => format!(", {} MiB", bytes.div_ceil(1 << 20)),
    }
}

/// The kind of an entry as the specification calls it, and what it says.
fn words(entry: &Entry) -> (&'static str, String) {
    let because = |reason: &str| match reason {
        "" => String::new(),
        reason => format!(": {reason}"),
    };
    match entry {
        Entry::Genesis(genesis) => {
            let how = if genesis.encrypted {
                "encrypted"
            } else {
                "NOT encrypted"
            };
            ("genesis", format!("stanza {} was created, {how}", genesis.stanza))
        }
        Entry::Begin(begin) => ("begin", format!("{} {} began", begin.what, begin.backup)),
        Entry::Announce(announce) => {
            let runs = announce.index_runs.len();
            ("announce", format!("{runs} parts of the index were announced"))
        }
        Entry::Commit(commit) => {
            let info = commit.info.clone().unwrap_or_default();
            let stored = info.new_stored_bytes.div_ceil(1 << 10);
            ("commit", format!("backup {} is complete, {stored} KiB added", info.id))
        }
        Entry::Abort(abort) => (
            "abort",
            format!("a session ended without a backup{}", because(&abort.reason)),
        ),
        Entry::SetFence(fence) => {
            let count = fence.sessions.len();
            (
                "fence",
                format!("{count} sessions were ended{}", because(&fence.reason)),
            )
        }
        Entry::ArchiveEpoch(epoch) => {
            let at = Lsn(epoch.lsn);
            (
                "archive-epoch",
                format!("archive epoch {} rules from {at} on", epoch.epoch),
            )
        }
        Entry::Expired(expired) => (
            "expired",
            format!(
                "backup {} has expired{}{}",
                expired.backup,
                amount(expired.bytes),
                because(&expired.reason)
            ),
        ),
        Entry::ExpiredWal(wal) => (
            "expired-wal",
            format!(
                "WAL of timeline {} from {} to {} has expired{}{}",
                wal.timeline,
                Lsn(wal.from_lsn),
                Lsn(wal.to_lsn),
                amount(wal.bytes),
                because(&wal.reason)
            ),
        ),
        Entry::Hold(hold) => {
            let how = if hold.released { "is no longer held" } else { "is held" };
            ("hold", format!("backup {} {how}{}", hold.backup, because(&hold.reason)))
        }
        Entry::GcMark(mark) => {
            let (packs, roots, runs) = (mark.packs.len(), mark.roots.len(), mark.index_runs.len());
            (
                "gc-mark",
                format!("to be collected: {packs} packs, {roots} manifests, {runs} parts of the index"),
            )
        }
        Entry::GcSwept(swept) => {
            let kept = swept.kept.len();
            (
                "gc-swept",
                format!(
                    "what entry {} marked was collected, but {kept} packs{}",
                    swept.mark,
                    amount(swept.bytes)
                ),
            )
        }
        Entry::KeyEpoch(epoch) => {
            let how = match epoch.data_public_key.is_empty() {
                true => "",
                false => ", with a public key for content",
            };
            (
                "key-epoch",
                format!(
                    "key epoch {} began, opened by {}{how}",
                    epoch.epoch,
                    epoch.slots.join(", ")
                ),
            )
        }
        Entry::Policy(policy) => {
            let (age, fulls) = (policy.minimum_retention_s, policy.minimum_full);
            (
                "policy",
                format!("backups are kept for at least {age} s, and {fulls} full ones always"),
            )
        }
        Entry::Incarnation(incarnation) => (
            "incarnation",
            format!(
                "the cluster is PostgreSQL {} with system identifier {} from now on",
                incarnation.server_major, incarnation.system_identifier
            ),
        ),
        Entry::DistrustParser(parser) => {
            let version = parser.parser_version;
            (
                "distrust-parser",
                format!(
                    "block maps of parser {version} are distrusted{}",
                    because(&parser.reason)
                ),
            )
        }
        Entry::CloseTimeline(closed) => {
            let how = if closed.reopened { "was reopened" } else { "was closed" };
            let (timeline, at) = (closed.timeline, Lsn(closed.lsn));
            (
                "close-timeline",
                format!("timeline {timeline} {how} at {at}{}", because(&closed.reason)),
            )
        }
        Entry::Operation(operation) => {
            let subject = match operation.subject.as_str() {
                "" => String::new(),
                // An object's name.
                subject if subject.contains('/') => format!(" of {subject}"),
                subject => format!(" of backup {subject}"),
            };
            let amount = amount(operation.bytes);
            (
                "operation",
                format!("{}{subject}{amount}: {}", operation.what, operation.result),
            )
        }
        Entry::Erasure(erasure) => (
            "erasure",
            format!(
                "the stanza was erased: its key slots are destroyed{}",
                because(&erasure.reason)
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairvault_format::{names, proto};

    #[test]
    fn an_operation_is_about_a_backup_or_an_object() {
        let said = |subject: &str| {
            let operation = proto::Operation {
                what: "repair".to_owned(),
                subject: subject.to_owned(),
                result: "done".to_owned(),
                ..Default::default()
            };
            words(&Entry::Operation(operation)).1
        };
        assert_eq!(said(""), "repair: done");
        assert_eq!(said("20260101-000000F"), "repair of backup 20260101-000000F: done");
        let object = names::log_context(57);
        assert_eq!(said(&object), format!("repair of {object}: done"));
    }
}
