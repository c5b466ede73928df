//! Key slots: which secret opens which key epochs.
//!
//! What always holds: a slot that is added opens every epoch that the log names, or adding it again goes on; what is
//! removed is never the last slot of an epoch that the configured secret opens.

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
}

/// Every slot object of a stanza, from the repository, by epoch and name. One that the log names counts although the store
/// does not list it: what has just been made may be listed late.
pub async fn all(log: &Log) -> Result<Vec<SlotObject>> {
    let stanza = log.stanza();
    let listed = stanza.store().list(names::KEYS).await?;
    let epochs = log.state().key_epochs.iter();
    let named = epochs.flat_map(|named| named.slots.iter().map(|name| names::slot(named.epoch, name)));
    let objects: BTreeSet<String> = listed.into_iter().map(|(name, _)| name).chain(named).collect();
    let mut all = Vec::new();
    for object in objects {
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
        let wrapped = match opens {
            Opens::All => put(stanza, keys, name, Some(secret)).await?,
            Opens::Writing => put(stanza, &keys.write_only(), name, Some(secret)).await?,
        };
        match wrapped {
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
    let others = all(log).await?.into_iter().filter(|slot| slot.name != name);
    for slot in others.filter(|slot| slot.slot.as_ref().is_some_and(|slot| !slot.write_only)) {
        if slot.keys(Some(secret), stanza).is_some_and(|keys| keys.can_read()) {
            return Err(Error::refused(format!(
                "this secret opens slot {} already, which reads: a slot that writes only would take nothing from it",
                slot.name
            ))
            .remedy("make a key of its own for the host: fairvault key generate FILE"));
        }
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
        };
        let mut said = operation(log.stanza(), what);
        if let Err(error) = &wrapped {
            said.result = format!("{new} objects of it; then it failed: {error}");
        }
        log.note(said, wrapped.as_ref().err()).await;
    }
    wrapped.map(|()| new)
}

/// Removes the slots of a name; returns how many there were. That it began is in the log before the first one goes: whatever
/// dies then, somebody knows of it.
pub async fn remove(log: &mut Log, access: &Access, name: &str) -> Result<usize> {
    check_encrypted(log.stanza())?;
    log.refresh().await?;
    let stanza = log.stanza().clone();
    check_operator(&stanza, "slots are removed")?;
    let (gone, rest): (Vec<_>, Vec<_>) = all(log).await?.into_iter().partition(|slot| slot.name == name);
    if gone.is_empty() {
        return Err(Error::not_found(format!(
            "stanza {} has no slot {name:?}",
            stanza.name()
        )));
    }
    for named in &log.state().key_epochs {
        let mut others = rest.iter().filter(|slot| slot.epoch == named.epoch);
        let reads = |slot: &SlotObject| {
            slot.keys(access.secret.as_ref(), &stanza)
                .is_some_and(|keys| keys.can_read())
        };
        if !others.any(reads) {
            return Err(Error::refused(format!(
                "without slot {name}, the configured secret does not open key epoch {} of stanza {}",
                named.epoch,
                stanza.name()
            ))
            .remedy(
                "configure the secret that is to stay, one that opens everything (`fairvault key check`); another one is \
                 added with `fairvault key add-slot`",
            ));
        }
    }
    let what = format!("removal of key slot {name}");
    let said = proto::Operation {
        result: "began".to_owned(),
        ..operation(&stanza, what.clone())
    };
    let began_us = said.began_us;
    log.append(Entry::Operation(said), |_| Ok(())).await?;
    let objects: Vec<String> = gone.into_iter().map(|slot| slot.object).collect();
    let deleted = stanza.store().delete(&objects).await;
    forget(access);
    match &deleted {
        Ok(()) => {
            let said = operation(&stanza, format!("key slot {name} removed"));
            log.note(proto::Operation { began_us, ..said }, None).await
        }
        // Some of them may be gone.
        Err(error) => log.note_end(&what, began_us, 0, Err(error)).await,
    };
    deleted.map(|()| objects.len())
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
