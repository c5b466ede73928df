//! What lies under a name of the log and is no entry: whoever may create objects can put something there, and a torn file
//! can be there after a crash. Where the next entry belongs, nobody gets past it, and nothing can be restored, until it is
//! taken away; under a later name, it is in the way when the log comes there.
//!
//! What always holds: only what is behind the last good entry goes, and has no entry behind it; what this secret merely
//! cannot open, what a newer version wrote, and what this host has seen as an entry, stays. That it went is an entry
//! itself: in its place, if that is the next one.

use bytes::Bytes;
use fairvault_format::header::ObjectHeader;
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use fairvault_format::{limits, names, sha256};

use crate::commit::{Log, state};
use crate::error::{Error, Kind, Result};
use crate::immutable::written;
use crate::stanza::{Access, Stanza};
use crate::store::Store;

/// An object that nobody gets past.
#[derive(Debug)]
pub struct NoEntry {
    log: Log,
    /// Its name.
    pub object: String,
    /// Why it is no entry.
    pub problem: String,
    /// Its length, bytes.
    pub len: u64,
    /// What it holds, but no more than an entry may have.
    pub content: Bytes,
}

/// Length and content of an object, which may be larger than anything of ours.
async fn peek(store: &Store, object: &str) -> Result<Option<(u64, Bytes)>> {
    let content = match store.len(object).await? {
        None => return Ok(None),
        Some(0) => (0, Bytes::new()),
        Some(len) => (len, store.get_range(object, 0..len.min(limits::LOG_ENTRY_BYTES)).await?),
    };
    Ok(Some(content))
}

/// Finds it; an error if what `seq` names is an entry, is not there, or must not go. Where the log is stuck, what it is
/// stuck at goes first: else it could not say what went.
pub async fn find(access: &Access, seq: u64) -> Result<NoEntry> {
    let stanza = Stanza::open(access).await?;
    let mut log = Log::unread(stanza.clone());
    // An older version of it may be a good one.
    let stuck = match written::of_log(&mut log).await {
        Ok(found) => {
            log.mark_read();
            if !found.hidden.is_empty() || found.fork.is_some() {
                return Err(
                    Error::refused(format!("entries of the log of {} are hidden", stanza.shown()))
                        .remedy("bring them back first, with `fairvault repair`"),
                );
            }
            None
        }
        Err(error) => Some(error),
    };
    let next = log.state().seq + 1;
    let object = names::log_context(seq);
    let problem = match stuck {
        None => behind_the_end(&log, seq).await?,
        Some(error) if matches!(error.kind(), Kind::Temporary | Kind::Unsupported | Kind::Interrupted) => {
            return Err(error);
        }
        Some(error) if next != seq => {
            return Err(Error::refused(format!(
                "the log of {} can be read up to entry {}, so it would be --drop-entry {next}, not {seq}: {error}",
                stanza.shown(),
                next - 1
            )));
        }
        Some(error) => error,
    };
    if seq == 1 {
        return Err(problem.remedy("the first entry is what the stanza was created with: bring it back from a copy"));
    }
    // If it was an entry once, somebody may remember it.
    log.check_seen()?;
    // With the keys that the log has led to.
    let stanza = log.stanza().clone();
    let newest = log.state().key_epochs.last();
    if newest.is_some_and(|newest| stanza.keys_of(newest.epoch).is_err()) {
        return Err(problem.remedy("use a secret that opens every key epoch of the stanza"));
    }
    let Some((len, content)) = peek(stanza.store(), &object).await? else {
        return Err(problem);
    };
    let epoch = ObjectHeader::decode(&content, &object).map(|header| header.epoch);
    let known = state::newest_epoch(log.state()).max(stanza.newest_slot());
    if epoch.is_ok_and(|epoch| epoch <= known && stanza.keys_of(epoch).is_err()) {
        return Err(problem.remedy("use a secret that opens every key epoch of the stanza"));
    }
    let later = log.names_after(&object).await?;
    if let Some(later) = log.first_entry(&later).await? {
        return Err(Error::damaged(format!(
            "{}/{object} cannot be read ({problem}), and {later} follows on it: it was an entry once",
            stanza.shown()
        ))
        .remedy(
            "bring it back from a copy of the repository, or from an older version where the bucket keeps versions",
        ));
    }
    Ok(NoEntry {
        log,
        object,
        problem: problem.to_string(),
        len,
        content,
    })
}

/// Why what lies behind the end of a log is no entry; an error if it may be one, or if one before it is missing.
async fn behind_the_end(log: &Log, seq: u64) -> Result<Error> {
    let stanza = log.stanza();
    let object = names::log_context(seq);
    let there = match seq > log.state().seq {
        true => peek(stanza.store(), &object).await?,
        false => None,
    };
    let Some((_, content)) = there else {
        return Err(Error::refused(format!(
            "the log of {} can be read up to its end, entry {}, and behind that there is no {object}: there is nothing to drop",
            stanza.shown(),
            log.state().seq
        )));
    };
    // Fails if entries are missing. Somebody may also have written on just now.
    log.clone().refresh_proven().await?;
    match log.check_entry(&object, &content) {
        Ok(()) => Err(Error::damaged(format!(
            "{}/{object} is an entry, and others before it are missing",
            stanza.shown()
        ))
        .remedy("bring them back from a copy of the repository")),
        Err(error) if error.kind() == Kind::Unsupported => Err(error),
        Err(error) => Ok(error),
    }
}

impl NoEntry {
    /// Whether `content` is all of it.
    pub fn is_all(&self) -> bool {
        self.len == self.content.len() as u64
    }

    /// Takes it away, and says so in the log.
    pub async fn drop(mut self) -> Result<()> {
        let stanza = self.log.stanza().clone();
        let began_us = stanza.env().now_us();
        match peek(stanza.store(), &self.object).await? {
            Some(now) if now == (self.len, self.content.clone()) => {
                stanza.store().delete(std::slice::from_ref(&self.object)).await?
            }
            Some(_) => {
                return Err(
                    Error::temporary(format!("{}/{} is another object by now", stanza.shown(), self.object))
                        .remedy("run this again, from one place at a time"),
                );
            }
            None => {}
        }
        let operation = proto::Operation {
            what: "repair".to_owned(),
            subject: self.object.clone(),
            result: format!(
                "what lay here was no entry, and was dropped: {} bytes, SHA-256 of {} {}",
                self.len,
                match self.is_all() {
                    true => "them".to_owned(),
                    false => format!("the first {}", self.content.len()),
                },
                hex::encode(sha256(&self.content))
            ),
            bytes: self.len,
            began_us,
        };
        self.log.append(Entry::Operation(operation), |_| Ok(())).await?;
        Ok(())
    }
}
