//! Whether a stanza was erased: asked before slots come back that cannot be seen.
//!
//! What always holds: the log decides, opened with every slot that there is, whether it can be seen, is hidden, remembered
//! or about to be imported. The note in the stanza's folder is not signed: whoever may write to the store can leave one. It
//! counts only where the log cannot be read; where the log does not say the same, it stops nothing.

use std::sync::Arc;

use fairvault_format::erased::ErasedNote;
use fairvault_format::proto::{self, Erased};
use fairvault_format::repository::Repository;
use fairvault_format::{limits, names};

use super::{Access, Stanza, erase, read_repository};
use crate::commit::{Log, erased, state};
use crate::error::{Error, Kind, Result};
use crate::immutable::hidden::{self, Hidden};
use crate::immutable::written;
use crate::store::Store;

/// Versions of the note that are read, the oldest first: nothing is written over, so the oldest is the right one.
const TRIES: usize = 16;

/// Where something is that says that the stanza was erased.
struct Note {
    /// How it is called.
    what: String,
    /// What it says; an error if only a newer version can tell, or it cannot be read.
    says: Result<Erased>,
    /// A deletion hides it.
    is_hidden: bool,
}

impl Note {
    /// The error of whoever cannot ask the log, and why that is so.
    fn believed(self, store: &Store, unread: &Error) -> Error {
        let hidden = match self.is_hidden {
            true => ", which is hidden by a deletion",
            false => "",
        };
        let what = self.what;
        match self.says {
            Err(error) => error,
            Ok(found) => erased::error(store.shown(), &found).remedy(format!(
                "that is what {what} says{hidden}, and the log could not be asked: {unread}. If it is not so, somebody with \
                 access to the store made it: run this with the key that opens the stanza, on a host that remembers it or \
                 after `fairvault key import`, and the log decides"
            )),
        }
    }

    /// What is said where the log knows better.
    fn warn(&self) {
        let says = match &self.says {
            Ok(_) => "says that the stanza was erased".to_owned(),
            Err(error) => format!("may say that the stanza was erased ({error})"),
        };
        tracing::warn!(
            "{} {says}, and the log does not: it goes for nothing. Somebody with access to the store made it: find out who, \
             change the credentials, and delete it",
            self.what
        );
    }
}

/// The note in a stanza's folder, or a version of it that the bucket hides. What is no note is passed over.
async fn find(store: &Store) -> Result<Option<Note>> {
    let shown = format!("{}/{}", store.shown(), names::ERASED);
    let mut unread = None;
    let mut take = |what: String, says: Result<Option<Erased>>, is_hidden: bool| match says {
        Ok(None) => Ok(None),
        Ok(Some(found)) => Ok(Some(Note {
            what,
            says: Ok(found),
            is_hidden,
        })),
        Err(error) if error.kind() == Kind::Damaged => {
            tracing::warn!("{what} is no note of an erasure, and goes for nothing: {error}");
            Ok(None)
        }
        Err(error) if matches!(error.kind(), Kind::Temporary | Kind::Interrupted) => Err(error),
        // Of a newer version, or the store gives it to nobody.
        Err(error) => {
            unread = Some(Note {
                what,
                says: Err(error),
                is_hidden,
            });
            Ok(None)
        }
    };
    if let Some(note) = take(shown.clone(), erase::note(store).await, false)? {
        return Ok(Some(note));
    }
    if store.bucket_or_plain().await?.has_versions {
        let what = format!("a version of {shown}");
        for object in store.all_versions(names::ERASED).await? {
            for version in object.contents().filter(|_| object.name == names::ERASED).take(TRIES) {
                let read = store.get_version(names::ERASED, &version.id, limits::REPOSITORY_JSON_BYTES);
                let says = match read.await {
                    Ok(Some(bytes)) => ErasedNote::decode(&bytes, &what)
                        .map(|note| Some(note.erased()))
                        .map_err(Error::from),
                    Ok(None) => Ok(None),
                    Err(error) => Err(error),
                };
                if let Some(note) = take(what.clone(), says, true)? {
                    return Ok(Some(note));
                }
            }
        }
    }
    Ok(unread)
}

/// Opens a stanza with slots that are not in their place, and with what this host remembers; nothing new is remembered.
fn open(access: &Access, slots: &[proto::Slot]) -> Result<Arc<Stanza>> {
    let forgetful = Access {
        memory: None,
        ..access.clone()
    };
    let memory = access.memory.as_ref();
    // The first one that opens says which stanza it is.
    let mut all = memory.and_then(|memory| memory.slots(access)).unwrap_or_default();
    all.extend(slots.iter().cloned());
    let opened = match all.is_empty() {
        true => Err(Error::not_found("there is no key slot that can be read")),
        false => Stanza::open_with(&forgetful, &all),
    };
    match (opened, memory.and_then(|memory| memory.keys(access))) {
        (Err(_), Some((scope, epochs))) => {
            let store = access.repository.folder(&access.stanza);
            Ok(Arc::new(Stanza::new(store, &forgetful, scope, epochs)))
        }
        (opened, _) => opened,
    }
}

/// Whether the log says that the stanza was erased, entries that are hidden included; an error if it does not say.
async fn in_log(access: &Access, slots: &[proto::Slot]) -> Result<Option<Erased>> {
    let stanza = open(access, slots)?;
    // A head that cannot be read says nothing: the log does.
    let memory = access.memory.as_ref();
    let head = memory.and_then(|memory| memory.head(&stanza).ok().flatten());
    if let Some(found) = head.and_then(|head| head.erased) {
        return Ok(Some(found));
    }
    let mut log = Log::unread(stanza).also_erased();
    let stopped = match written::of_log(&mut log).await {
        Ok(found) => {
            log.mark_read();
            // Either may say so, and what lies behind the one is of the other.
            if let Some(fork) = &found.fork {
                return match log.state().erased.clone().or_else(|| fork.erased()) {
                    None if fork.is_cut() => Err(Error::damaged(format!(
                        "there are two logs, and the one that can be seen cannot be read behind entry {}",
                        fork.end()
                    ))),
                    found => Ok(found),
                };
            }
            None
        }
        Err(error) => Some(error),
    };
    let (seq, newest) = (log.state().seq, state::newest_epoch(log.state()));
    let is_stuck = stopped.is_some();
    match (&log.state().erased, stopped) {
        (Some(found), _) => return Ok(Some(found.clone())),
        // It goes on, and here it cannot be followed.
        (None, Some(error))
            if seq == 0
                || matches!(error.kind(), Kind::Temporary | Kind::Interrupted)
                || log.stanza().keys_of(newest).is_err() =>
        {
            return Err(error);
        }
        (None, None) if seq == 0 => {
            return Err(Error::not_found(format!("{} has no log", log.stanza().shown())));
        }
        (None, _) => {}
    }
    // What it stopped at, and what lies behind that, is no entry, or an end that is not known.
    let from = if is_stuck { seq } else { seq + 1 };
    let later = log.names_after(&names::log_context(from)).await?;
    match log.first_entry(&later).await? {
        None => Ok(None),
        Some(later) => Err(Error::damaged(format!(
            "it can be read up to entry {seq}, and {later} is there"
        ))),
    }
}

/// Fails if slots must not come back; returns whether there is a note that the log belies. `way` is what there is to do
/// where the log says so itself.
async fn check(access: &Access, store: &Store, note: Option<Note>, slots: &[proto::Slot], way: &str) -> Result<bool> {
    match (in_log(access, slots).await, note) {
        (Ok(Some(found)), _) => Err(erased::error(store.shown(), &found).remedy(format!("its log says so: {way}"))),
        (Ok(None), None) => Ok(false),
        (Ok(None), Some(note)) => {
            note.warn();
            Ok(true)
        }
        (Err(error), _) if error.kind() == Kind::Temporary => Err(error),
        (Err(error), Some(note)) => Err(note.believed(store, &error)),
        // Whoever can open it is told then.
        (Err(error), None) => {
            tracing::debug!("the log does not say whether the stanza was erased: {error}");
            Ok(false)
        }
    }
}

/// Fails if what hides slots is an erasure. `found` is what [`hidden::of_opening`] has found. Returns whether there is a
/// note that says so, and the log does not.
pub async fn check_repair(access: &Access, found: &[Hidden]) -> Result<bool> {
    let store = access.repository.folder(&access.stanza);
    let note = find(&store).await?;
    if note.is_none() && !found.iter().any(hidden::is_slot) {
        return Ok(false);
    }
    let mut slots = hidden::slots(&store, found).await?;
    // Slots of another repository may be here, too, and open with the same key.
    let description = match found.iter().find(|hidden| hidden.object == names::REPOSITORY) {
        Some(hidden) => match hidden.read().await? {
            Some(bytes) => Repository::decode(&bytes).map_err(Error::from),
            None => Err(Error::not_found(format!("{} is gone", names::REPOSITORY))),
        },
        None => read_repository(&access.repository).await,
    };
    match description.and_then(|repository| repository.id().map_err(Error::from)) {
        Ok(id) => slots.retain(|slot| slot.repository_id == id),
        Err(error) if error.kind() == Kind::Temporary => return Err(error),
        Err(error) => tracing::debug!("which repository this is cannot be read: {error}"),
    }
    check(
        access,
        &store,
        note,
        &slots,
        "slots that were destroyed are not brought back",
    )
    .await
}

/// Fails if these slots must not be brought back: the stanza was erased, as the log says that they open, or a note where
/// they open none. Where the configured secret opens none of them and there is no note, the log is for those to read who
/// can.
pub async fn check_import(access: &Access, slots: &[proto::Slot]) -> Result<()> {
    let store = access.repository.folder(&access.stanza);
    let note = find(&store).await?;
    let way =
        "there is no way back into it here; what is stored is read from an exported file by the independent reader";
    check(access, &store, note, slots, way).await?;
    Ok(())
}
