//! New keys for a stanza: a key epoch begins, and the old ones stay for reading.
//!
//! What always holds: slots come before the log entry that names their epoch, and nobody writes with keys that no entry
//! names; before the entry, the secret that is to open the new epoch was seen to open all of them; keys of a rotation
//! that died are used again only if nobody else can know them.

use std::time::Duration;

use fairvault_format::keys::{EpochKeys, Secret};
use fairvault_format::names;
use fairvault_format::proto::{self, log_entry::Kind as Entry};

use super::create::{DataKeys, new_keys};
use super::slots::{self, Opens, Put, SlotObject};
use super::{Access, Stanza, keys_in, read_slot};
use crate::commit::authors::Deed;
use crate::commit::{Log, state};
use crate::env::has_fault;
use crate::error::{Error, Kind, Result};

/// How long it may take to find out who came first, where a rotation has failed.
const LOOK_TIME: Duration = Duration::from_secs(10);

/// How to rotate.
#[derive(Clone, Default)]
pub struct Options {
    /// The secret that opens the stanza from now on, and the name of its slots; without it, the configured one does.
    pub new_secret: Option<Secret>,
    /// Name of the new secret's slots; without it, as it has slots already, or one after the epoch's number.
    pub slot: Option<String>,
    /// Slots of other secrets are left out.
    pub drop_slots: bool,
    /// Content is sealed to a public key from now on; without it, as before.
    pub public_key: bool,
}

/// What was done.
#[derive(Debug, Clone)]
pub struct Rotated {
    /// The epoch that ruled before.
    pub from: u32,
    /// The epoch that rules now.
    pub to: u32,
    /// Slots that open it.
    pub slots: Vec<String>,
    /// Slots that opened the epoch before, and do not open this one.
    pub dropped: Vec<String>,
}

/// What is to be done in one repository.
pub struct Plan {
    /// The epoch that rules.
    from: u32,
    /// The new epoch's keys; its number is theirs.
    keys: EpochKeys,
    slots: Vec<String>,
    dropped: Vec<String>,
}

/// Finds out what a rotation would do; changes nothing.
pub async fn plan(log: &mut Log, access: &Access, options: &Options) -> Result<Plan> {
    log.refresh().await?;
    let stanza = log.stanza();
    slots::check_encrypted(stanza)?;
    slots::check_operator(stanza, "keys are rotated")?;
    // Whoever reads nothing of what there is would be the only one to read what comes.
    stanza.check_reads("a rotation")?;
    let data = match options.public_key {
        true => DataKeys::Public,
        false => DataKeys::of(stanza.keys()),
    };
    let from = state::newest_epoch(log.state());
    let there = slots::all(log).await?;
    let newest = there.iter().map(|slot| slot.epoch).fold(from, u32::max);
    let configured: Vec<&SlotObject> = there
        .iter()
        .filter(|slot| slot.epoch == from && slot.keys(access.secret.as_ref(), stanza).is_some())
        .collect();
    let is_configured = |slot: &&SlotObject| configured.iter().any(|own| own.object == slot.object);
    let secret = options.new_secret.as_ref().or(access.secret.as_ref());
    let slots: Vec<String> = match (&options.new_secret, &options.slot) {
        (None, _) => configured.iter().map(|slot| slot.name.clone()).collect(),
        (Some(_), Some(name)) => vec![name.clone()],
        (Some(_), None) => {
            let has_it = |slot: &&SlotObject| slot.epoch == from && slot.keys(secret, stanza).is_some();
            let there = there.iter().filter(has_it).map(|slot| slot.name.clone());
            let mut names: Vec<String> = there.collect();
            if names.is_empty() {
                names.push(format!("key{}", from + 1));
            }
            names
        }
    };
    slots.iter().try_for_each(|name| names::check_name("slot name", name))?;
    if configured.is_empty() {
        return Err(Error::refused(format!(
            "no slot of {} is opened by the configured secret, which only this host remembers",
            stanza.shown()
        ))
        .remedy("bring its slots back with `fairvault key import`, or configure a secret that has some"));
    }
    // The database host has had the old secret: a private key that is wrapped for it would be no secret.
    if data == DataKeys::Public && !stanza.keys().has_public_key() {
        let same = |new: &Secret| configured.iter().any(|slot| slot.keys(Some(new), stanza).is_some());
        if options.new_secret.as_ref().is_none_or(same) {
            return Err(Error::usage(format!(
                "{} goes over to a public key, and its private key must not be wrapped for the configured secret: that has been \
                 on the database host, which would go on reading everything",
                stanza.shown()
            ))
            .remedy(
                "make a key that no database host has (`fairvault key generate FILE`), and give it with --new-secret-file FILE",
            ));
        }
    }
    let of_others: Vec<String> = there
        .iter()
        .filter(|slot| slot.epoch == from && !is_configured(slot) && !slots.contains(&slot.name))
        .map(|slot| slot.name.clone())
        .collect();
    if !of_others.is_empty() && !options.drop_slots {
        return Err(Error::refused(format!(
            "{} has slots of other secrets, for which new keys cannot be wrapped without these: {}",
            stanza.shown(),
            of_others.join(", ")
        ))
        .remedy(
            "leave them out with --drop-slots: they still open what there is, and nothing that comes after. A secret that is to \
             open that too is added again with `fairvault key add-slot`, under the same name (one that writes only: \
             with --write-only; one that opens no content: with --no-content)",
        ));
    }
    let replaced = configured.iter().map(|slot| slot.name.clone());
    let dropped = replaced.filter(|name| !slots.contains(name)).chain(of_others).collect();
    let keys = match unfinished(stanza, &there, from, &slots, secret).filter(|keys| DataKeys::of(keys) == data) {
        Some(keys) => keys,
        None => {
            let number = newest.checked_add(1).ok_or_else(|| {
                Error::refused(format!(
                    "{} has a slot of the highest possible key epoch",
                    stanza.shown()
                ))
                .remedy("see `fairvault key list`, and delete what no rotation has made")
            })?;
            new_keys(stanza.env(), number, data)?
        }
    };
    Ok(Plan {
        from,
        keys,
        slots,
        dropped,
    })
}

/// The keys that an earlier rotation has left behind, if all of their slots are such as this one would make: then no other
/// secret opens them.
fn unfinished(
    stanza: &Stanza,
    there: &[SlotObject],
    from: u32,
    wanted: &[String],
    secret: Option<&Secret>,
) -> Option<EpochKeys> {
    let newest = there
        .iter()
        .map(|slot| slot.epoch)
        .max()
        .filter(|epoch| *epoch > from)?;
    let mut keys: Option<EpochKeys> = None;
    for slot in there.iter().filter(|slot| slot.epoch == newest) {
        let opened = slot.keys(secret, stanza).filter(|_| wanted.contains(&slot.name))?;
        if keys.as_ref().is_some_and(|keys| keys.encode() != opened.encode()) {
            return None;
        }
        keys = Some(opened);
    }
    keys
}

/// Carries out what [`plan`] has found.
pub async fn rotate(log: &Log, access: &Access, options: &Options, plan: Plan) -> Result<Rotated> {
    let mut made = Vec::new();
    let (from, operator) = (plan.from, plan.keys.public_keys().operator);
    match carry_out(log, access, options, plan, &mut made).await {
        Ok(done) => Ok(done),
        Err(error) => {
            slots::withdraw_if_erased(log.stanza(), &made).await;
            Err(match outrun(log, from, operator, &error).await {
                Some(who) => held(log.stanza(), &who),
                None => error,
            })
        }
    }
}

/// The error of whoever comes second; `who` says what is known of the first.
fn held(stanza: &Stanza, who: &str) -> Error {
    Error::new(
        Kind::Held,
        format!("somebody else rotates the keys of {} just now{who}", stanza.shown()),
    )
    .remedy("see `fairvault key list`; to rotate once more, run it again")
}

/// Who has begun an epoch that follows on `from`, and when; `None` if that is not known, or if it was this rotation.
async fn outrun(log: &Log, from: u32, operator: Option<[u8; 32]>, error: &Error) -> Option<String> {
    let mut log = log.clone();
    // Its keys may be such as this host's secret does not open: the entry that names them is read all the same.
    let _ = tokio::time::timeout(LOOK_TIME, log.refresh()).await;
    let newest = log.state().key_epochs.last().filter(|newest| newest.epoch > from)?;
    let is_own = operator.is_some_and(|own| newest.operator_public_key == own);
    (!is_own || error.kind() == Kind::Held).then(|| log.whose(Deed::Rotation))
}

/// The same; slots that it makes are in `made`.
async fn carry_out(
    log: &Log,
    access: &Access,
    options: &Options,
    plan: Plan,
    made: &mut Vec<String>,
) -> Result<Rotated> {
    let stanza = log.stanza();
    let Plan {
        from,
        keys,
        slots,
        dropped,
    } = plan;
    // What there is comes first: a secret that opens only what is to come would be worth nothing.
    if let Some(secret) = &options.new_secret {
        for name in &slots {
            slots::open_all(log, name, secret, Opens::All, made).await?;
        }
    }
    let secret = options.new_secret.as_ref().or(access.secret.as_ref());
    for name in &slots {
        match slots::put(stanza, &keys, name, secret).await? {
            Put::New => made.push(names::slot(keys.epoch, name)),
            Put::Same => {}
            Put::Other => {
                let object = names::slot(keys.epoch, name);
                let slot = read_slot(stanza.store(), &object, &stanza.scope().repository).await;
                return Err(held(stanza, &slots::since(&object, slot.ok().as_ref())));
            }
        }
    }
    if has_fault("rotate") {
        return Err(Error::failed("the rotation dies before its entry, as was asked for"));
    }
    // With the new secret alone, from the repository alone, all of the log: what does not open now must not be named.
    let proof = Access {
        secret: secret.cloned(),
        memory: None,
        ..access.clone()
    };
    let mut log = Log::replay(Stanza::open(&proof).await?).await?;
    for name in &slots {
        let object = names::slot(keys.epoch, name);
        let slot = read_slot(stanza.store(), &object, &stanza.scope().repository).await?;
        let opened = keys_in(&slot, secret, stanza.scope());
        if opened.is_none_or(|opened| opened.encode() != keys.encode()) {
            return Err(held(stanza, &slots::since(&object, Some(&slot))));
        }
    }
    let bundle = keys.to_bundle();
    let entry = proto::KeyEpoch {
        epoch: keys.epoch,
        writer_public_key: bundle.writer_public_key.clone(),
        operator_public_key: bundle.operator_public_key.clone(),
        data_public_key: bundle.data_public_key.clone(),
        slots: slots.clone(),
    };
    let unchanged = |now: &proto::Snapshot| match state::newest_epoch(now) == from {
        true => Ok(()),
        false => Err(held(stanza, "")),
    };
    log.append(Entry::KeyEpoch(entry), unchanged).await?;
    // This host goes on with the new keys at once, also where a passphrase must not be stretched.
    slots::forget(access);
    let remembering = Access {
        memory: access.memory.clone(),
        ..proof
    };
    Log::open(Stanza::open(&remembering).await?).await?;
    Ok(Rotated {
        from,
        to: keys.epoch,
        slots,
        dropped,
    })
}
