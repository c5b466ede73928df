//! Key slots: which secret opens which key epochs.
//!
//! What always holds: a slot that is added opens every epoch that the log names, or adding it again goes on; what is
//! removed is never the last slot of an epoch that the configured secret opens. Of several who remove slots at once, each
//! counts what the others have begun to remove as gone: the log says in which order they have.

use std::collections::BTreeSet;
use std::sync::Arc;

use fairvault_format::keys::{self, EpochKeys, Secret};
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use fairvault_format::{limits, names};

use super::{Access, Stanza, keys_in, read_slot};
use crate::commit::{Log, state};
use crate::env::{self, has_fault};
use crate::error::{Error, Kind, Result};
use crate::store::Created;

/// How often the log may go on while a removal is decided on, before that is given up.
const TRIES: usize = 50;
/// How the entry of a removal begins; a name follows.
const REMOVAL: &str = "removal of key slot";

/// A slot object.
pub struct SlotObject {
    /// Its name in the stanza's folder.
    pub object: String,
    /// The epoch in its name.
    pub epoch: u32,
    /// The slot's name.
    pub name: String,
    /// What it says; `None` if it cannot be read, or is of another stanza.
    pub slot: Option<proto::Slot>,
}

impl SlotObject {
    /// The keys in it, if `secret` opens it. A passphrase is stretched for the answer.
    pub fn keys(&self, secret: Option<&Secret>, stanza: &Stanza) -> Option<EpochKeys> {
        keys_in(self.slot.as_ref()?, secret, stanza.scope())
    }

    /// What tells it from a later slot of the same name.
    fn mark(&self) -> String {
        mark(&self.object, self.slot.as_ref())
    }
}

/// A slot's name, and the beginning of its salt, which no other one has.
fn mark(object: &str, slot: Option<&proto::Slot>) -> String {
    let salt = slot.and_then(|slot| slot.salt.get(..8)).unwrap_or_default();
    match salt {
        [] => format!("{object} (unreadable)"),
        salt => format!("{object} {}", hex::encode(salt)),
    }
}

/// Names of all objects that may be slots of a stanza. One that the log names counts although the store does not list it:
/// what has just been made may be listed late.
pub(super) async fn objects(log: &Log) -> Result<BTreeSet<String>> {
    let listed = log.stanza().store().list(names::KEYS).await?;
    let epochs = log.state().key_epochs.iter();
    let named = epochs.flat_map(|named| named.slots.iter().map(|name| names::slot(named.epoch, name)));
    Ok(listed.into_iter().map(|(name, _)| name).chain(named).collect())
}

/// Every slot object of a stanza, from the repository, by epoch and name.
pub async fn all(log: &Log) -> Result<Vec<SlotObject>> {
    let stanza = log.stanza();
    let mut all = Vec::new();
    for object in objects(log).await? {
        let mut parts = object.rsplit('/');
        let (Some(name), Some(Ok(epoch))) = (parts.next(), parts.next().map(str::parse)) else {
            continue;
        };
        let slot = match read_slot(stanza.store(), &object, &stanza.scope().repository).await {
            Err(error) if error.kind() == Kind::Temporary => return Err(error),
            // It was removed.
            Err(error) if error.kind() == Kind::NotFound => continue,
            read => read.ok(),
        };
        let is_own =
            |slot: &proto::Slot| keys::slot_scope(slot) == *stanza.scope() && slot.epoch == epoch && slot.name == name;
        all.push(SlotObject {
            name: name.to_owned(),
            epoch,
            slot: slot.filter(is_own),
            object,
        });
    }
    all.sort_by(|a, b| (a.epoch, &a.name).cmp(&(b.epoch, &b.name)));
    Ok(all)
}

/// What became of a slot that was to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// It is new.
    New,
    /// It was there, and this secret opens these keys in it.
    Same,
    /// Another one was there.
    Other,
}

/// Wraps `keys` for `secret`.
pub async fn put(stanza: &Stanza, keys: &EpochKeys, name: &str, secret: Option<&Secret>) -> Result<Put> {
    let (store, env) = (stanza.store(), stanza.env());
    let object = names::slot(keys.epoch, name);
    let compare = |there: &[u8]| {
        let slot = keys::decode_slot(there, &object).ok();
        let opened = slot.and_then(|slot| keys_in(&slot, secret, stanza.scope()));
        match opened.is_some_and(|opened| opened.encode() == keys.encode()) {
            true => Put::Same,
            false => Put::Other,
        }
    };
    if let Some(there) = store.get_opt(&object, limits::SLOT_BYTES).await? {
        return Ok(compare(&there));
    }
    let (salt, now) = (env::salt(env)?, env.now_us());
    let sealed = keys::seal_slot(stanza.scope(), keys, name, secret, keys::default_argon2(), salt, now)?;
    match store.create(&object, sealed.into(), limits::SLOT_BYTES).await? {
        Created::Won => Ok(Put::New),
        Created::Lost(there) => Ok(compare(&there)),
    }
}

/// Since when a slot is there, for a message; who made it, it does not say. Empty if it cannot be read.
pub(super) fn since(object: &str, slot: Option<&proto::Slot>) -> String {
    let Some(slot) = slot else {
        return String::new();
    };
    let time = jiff::Timestamp::from_microsecond(slot.created_us).unwrap_or_default();
    format!(": {object} was made at {}", time.strftime("%Y-%m-%dT%H:%M:%SZ"))
}

fn taken(stanza: &Stanza, name: &str) -> Error {
    Error::refused(format!(
        "stanza {} already has another slot {name:?}, which this secret does not open",
        stanza.name()
    ))
    .remedy("choose another name")
}

/// Fails unless the given key has what an operator signs with; `what` is what needs that.
pub(crate) fn check_operator(stanza: &Stanza, what: &str) -> Result<()> {
    match stanza.keys().operator_seed.is_some() {
        true => Ok(()),
        false => Err(Error::refused(format!(
            "{what} with the operator's key, and the given one opens {} without it",
            stanza.shown()
        ))
        .remedy("run it where the operator's key is, or give that with --key-file")),
    }
}

pub(super) fn check_encrypted(stanza: &Stanza) -> Result<()> {
    match stanza.has_secret() {
        true => Ok(()),
        false => Err(Error::refused(format!(
            "stanza {} is not encrypted: its keys lie open in the repository, and no slot protects them",
            stanza.name()
        ))),
    }
}

/// What a slot is to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opens {
    /// Everything that the configured secret opens.
    All,
    /// What a host needs that writes, and never reads what was written.
    Writing,
    /// What a host needs that expires and collects, and never reads what was written: it says what an operator says.
    Deciding,
}

impl Opens {
    /// As much of an epoch's keys.
    fn of(self, keys: &EpochKeys) -> EpochKeys {
        match self {
            Self::All => keys.clone(),
            Self::Writing => keys.write_only(),
            Self::Deciding => keys.without_content(),
        }
    }
}

/// Wraps every epoch that the log names for `secret`, as far as that is not done yet; adds the new objects to `made`.
pub(super) async fn open_all(
    log: &Log,
    name: &str,
    secret: &Secret,
    opens: Opens,
    made: &mut Vec<String>,
) -> Result<()> {
    let stanza = log.stanza();
    for named in &log.state().key_epochs {
        let keys = stanza.keys_of(named.epoch)?;
        match put(stanza, &opens.of(keys), name, Some(secret)).await? {
            Put::New => made.push(names::slot(keys.epoch, name)),
            Put::Same => {}
            Put::Other => return Err(taken(stanza, name)),
        }
    }
    Ok(())
}

/// Deletes slots that were made while somebody erased the stanza, and may not have seen them.
pub(super) async fn withdraw_if_erased(stanza: &Arc<Stanza>, made: &[String]) {
    if made.is_empty() {
        return;
    }
    let replayed = Log::unread(stanza.clone()).also_erased().replayed().await;
    if !replayed.is_ok_and(|log| log.state().erased.is_some()) {
        return;
    }
    match stanza.store().delete(made).await {
        Ok(()) => tracing::warn!(
            "{} was erased: slots that were made meanwhile are deleted",
            stanza.shown()
        ),
        Err(error) => tracing::error!(
            "{} was erased, and slots that were made meanwhile are still there: {}. Run `fairvault key erase` again: {error}",
            stanza.shown(),
            made.join(", ")
        ),
    }
}

/// Fails unless a slot can be made that opens only what it is to open.
async fn check_can_be_added(log: &Log, name: &str, secret: &Secret, opens: Opens) -> Result<()> {
    let stanza = log.stanza();
    names::check_name("slot name", name)?;
    check_encrypted(stanza)?;
    check_operator(stanza, "slots are added")?;
    // One that lacks what the given key lacks would pass for one that opens everything.
    stanza.check_reads("adding a slot")?;
    if opens == Opens::All {
        return Ok(());
    }
    if !stanza.keys().has_public_key() {
        return Err(Error::refused(format!(
            "the content of {} is sealed with one key, which opens it as well: a host without it could not write",
            stanza.shown()
        ))
        .remedy(format!(
            "begin a key epoch with a public key first: fairvault key rotate {} --public-key",
            stanza.name()
        )));
    }
    let decides = opens == Opens::Deciding;
    for slot in all(log).await?.into_iter().filter(|slot| slot.name != name) {
        let Some(keys) = slot.keys(Some(secret), stanza) else {
            continue;
        };
        let why = match keys.can_read() {
            true => "which reads: a slot that opens less would take nothing from it",
            false if keys.operator_seed.is_some() == decides => continue,
            false => "and which of the two a host would take is not certain",
        };
        return Err(
            Error::refused(format!("this secret opens slot {} already, {why}", slot.name))
                .remedy("make a key of its own for the host: fairvault key generate FILE"),
        );
    }
    Ok(())
}

/// Wraps all epochs, also those that begin meanwhile.
async fn wrap(log: &mut Log, name: &str, secret: &Secret, opens: Opens, made: &mut Vec<String>) -> Result<()> {
    loop {
        let before = state::newest_epoch(log.state());
        if has_fault("add-slot is slow") {
            tokio::time::sleep(std::time::Duration::from_secs(10)).await;
        }
        open_all(log, name, secret, opens, made).await?;
        // Keys may be rotated or destroyed just now, by somebody who did not see this slot yet.
        log.refresh().await?;
        if state::newest_epoch(log.state()) == before {
            return Ok(());
        }
    }
}

/// Lets another secret open a stanza, all epochs of it; returns for how many that is new.
pub async fn add(log: &mut Log, access: &Access, name: &str, secret: &Secret, opens: Opens) -> Result<usize> {
    log.refresh().await?;
    check_can_be_added(log, name, secret, opens).await?;
    let mut made = Vec::new();
    let wrapped = wrap(log, name, secret, opens, &mut made).await;
    if wrapped.is_err() {
        withdraw_if_erased(log.stanza(), &made).await;
    }
    let new = made.len();
    forget(access);
    // What was made before it failed opens something, too.
    if new > 0 {
        let what = match opens {
            Opens::All => format!("key slot {name} added"),
            Opens::Writing => format!("key slot {name} added, which writes only"),
            Opens::Deciding => {
                format!("key slot {name} added, which decides as an operator's does, and opens no content")
            }
        };
        let mut said = operation(log.stanza(), what);
        if let Err(error) = &wrapped {
            said.result = format!("{new} objects of it; then it failed: {error}");
        }
        log.note(said, wrapped.as_ref().err()).await;
    }
    wrapped.map(|()| new)
}

/// Removes the slots of a name; returns how many there were. The log says so before the first one goes, and what came of it
/// after that.
pub async fn remove(log: &mut Log, access: &Access, name: &str) -> Result<usize> {
    check_encrypted(log.stanza())?;
    // What others have begun to remove is in its entries.
    *log = Log::replay(log.stanza().clone()).await?;
    let stanza = log.stanza().clone();
    check_operator(&stanza, "slots are removed")?;
    let began_us = stanza.env().now_us();
    let gone = decide(log, access, name, began_us).await?;
    let objects: Vec<String> = gone.into_iter().map(|slot| slot.object).collect();
    let deleted = match has_fault("remove-slot") {
        true => Err(Error::failed("the removal dies before it deletes, as was asked for")),
        false => stanza.store().delete(&objects).await,
    };
    forget(access);
    let (what, end) = match &deleted {
        Ok(()) => (format!("key slot {name} removed"), Ok("done".to_owned())),
        // Some of them may be gone.
        Err(error) => (format!("{REMOVAL} {name}"), Err(error)),
    };
    log.note_end(&what, began_us, 0, end).await;
    deleted.map(|()| objects.len())
}

/// Finds out what goes with a slot, and says it in the log, if the configured secret still opens everything then. `log` has
/// kept all entries.
async fn decide(log: &mut Log, access: &Access, name: &str, began_us: i64) -> Result<Vec<SlotObject>> {
    for _ in 0..TRIES {
        let (gone, rest): (Vec<_>, Vec<_>) = all(log).await?.into_iter().partition(|slot| slot.name == name);
        if gone.is_empty() {
            return Err(Error::not_found(format!(
                "stanza {} has no slot {name:?}",
                log.stanza().name()
            )));
        }
        let kept = kept(log, access, name, &rest)?;
        let marks: Vec<String> = gone.iter().map(SlotObject::mark).collect();
        let said = proto::Operation {
            result: format!("began: {}", marks.join(", ")),
            began_us,
            ..operation(log.stanza(), format!("{REMOVAL} {name}"))
        };
        if begin_removal(log, &said, &kept).await? {
            return Ok(gone);
        }
    }
    Err(busy(log.stanza()))
}

fn busy(stanza: &Stanza) -> Error {
    Error::temporary(format!(
        "the log of {} goes on too fast for a removal to be decided on",
        stanza.shown()
    ))
    .remedy("nothing was removed; run it again when fewer are at work")
}

/// A slot for each key epoch that the log names, which opens it for the configured secret without the slots of `name`, and
/// reads; an error if one of the epochs has none. What somebody removes counts as gone, whether it still is there or not.
fn kept<'a>(log: &Log, access: &Access, name: &str, rest: &'a [SlotObject]) -> Result<Vec<&'a SlotObject>> {
    let stanza = log.stanza();
    let mut kept = Vec::new();
    for named in &log.state().key_epochs {
        let others = rest.iter().filter(|slot| slot.epoch == named.epoch);
        let (stay, go): (Vec<_>, Vec<_>) =
            others.partition(|slot| removed_by(log, &slot.object, slot.slot.as_ref(), 0).is_none());
        let reads = |slot: &&SlotObject| {
            slot.keys(access.secret.as_ref(), stanza)
                .is_some_and(|keys| keys.can_read())
        };
        match stay.into_iter().find(reads) {
            Some(slot) => kept.push(slot),
            None => return Err(last(log, name, named.epoch, &go)),
        }
    }
    Ok(kept)
}

/// The error of whoever would remove the last slot of an epoch; `go` are others of it that are removed already.
fn last(log: &Log, name: &str, epoch: u32, go: &[&SlotObject]) -> Error {
    let stanza = log.stanza();
    let said = go.iter().filter_map(|slot| {
        let entry = removed_by(log, &slot.object, slot.slot.as_ref(), 0)?;
        Some(format!("{} (entry {entry} of the log)", slot.name))
    });
    let said: Vec<String> = said.collect();
    let (but, more) = match said.as_slice() {
        [] => (String::new(), ""),
        said => (
            format!(
                "; not counted is what is there and was to be removed: slot {}",
                said.join(", ")
            ),
            ". What was to be removed and is to stay gets another slot, of another name: that one counts",
        ),
    };
    Error::refused(format!(
        "without slot {name}, the configured secret does not open key epoch {epoch} of stanza {}{but}",
        stanza.name()
    ))
    .remedy(format!(
        "configure the secret that is to stay, one that opens everything (`fairvault key check`); another one is added with \
         `fairvault key add-slot`{more}"
    ))
}

/// The entry behind number `after` that says that this very slot is removed. `log` has kept all entries.
pub(super) fn removed_by(log: &Log, object: &str, slot: Option<&proto::Slot>, after: u64) -> Option<u64> {
    let name = object.rsplit('/').next()?;
    let (what, mark) = (format!("{REMOVAL} {name}"), mark(object, slot));
    let says_so = |entry: &&proto::LogEntry| match &entry.kind {
        Some(Entry::Operation(said)) => said.what == what && said.result.contains(&mark) && !log.is_void(entry.seq),
        _ => false,
    };
    let mut behind = log.entries().iter().rev().take_while(|entry| entry.seq > after);
    behind.find(says_so).map(|entry| entry.seq)
}

/// Says in the log that a removal begins; `false` if that has to be decided on anew: one of the slots that were to stay is
/// removed by somebody else meanwhile, or other keys rule.
async fn begin_removal(log: &mut Log, said: &proto::Operation, kept: &[&SlotObject]) -> Result<bool> {
    let newest = state::newest_epoch(log.state());
    for _ in 0..TRIES {
        let seen = log.state().seq;
        let unchanged = |now: &proto::Snapshot| match now.seq == seen {
            true => Ok(()),
            false => Err(Error::temporary("others have written to the log")),
        };
        match log.append(Entry::Operation(said.clone()), unchanged).await {
            Ok(_) => return Ok(true),
            Err(error) if log.state().seq == seen => return Err(error),
            // What they have said decides.
            Err(_) => {}
        }
        let goes = |slot: &&SlotObject| removed_by(log, &slot.object, slot.slot.as_ref(), seen).is_some();
        if kept.iter().any(goes) || state::newest_epoch(log.state()) != newest {
            return Ok(false);
        }
    }
    Err(busy(log.stanza()))
}

/// What this host remembers of slots is no longer true.
pub(super) fn forget(access: &Access) {
    if let Some(memory) = &access.memory {
        memory.forget_slots(access);
    }
}

fn operation(stanza: &Stanza, what: String) -> proto::Operation {
    proto::Operation {
        what,
        result: "done".to_owned(),
        began_us: stanza.env().now_us(),
        ..Default::default()
    }
}
