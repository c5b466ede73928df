//! A kit: the slots of a stanza as they are stored, wrapped, for when the repository has lost them.
//!
//! What always holds: by its slots, the configured secret opens every key epoch that the log names, or there is no kit; what
//! is no slot of the stanza is left out and named.

use std::collections::BTreeMap;

use fairvault_format::keys::{self, EpochKeys};
use fairvault_format::{limits, names, proto};
use prost::Message;

use super::{Access, Stanza, keys_in, slots};
use crate::commit::Log;
use crate::error::{Error, Kind, Result};

/// What is to be kept of a stanza's slots.
pub struct Kit {
    /// Slots as they are stored, by their names in the stanza's folder.
    pub slots: BTreeMap<String, Vec<u8>>,
    /// Key epochs that the log names; the configured secret opens each of them by one of the slots.
    pub epochs: usize,
    /// Whether it reads by them. The secret of a host that only writes does not.
    pub reads: bool,
    /// Of the slots, those that the repository has lost, and this host remembers.
    pub remembered: Vec<String>,
    /// What is there below `keys/` and is no slot of the stanza, and why.
    pub left_out: Vec<String>,
}

/// Collects the slots that the repository has, and those that this host remembers. `log` has kept all entries.
///
/// Fails if a slot cannot be read for another reason than its content, and if the configured secret does not open every key
/// epoch by what was found.
pub async fn collect(log: &Log, access: &Access) -> Result<Kit> {
    let stanza = log.stanza();
    let mut found: BTreeMap<String, (proto::Slot, Vec<u8>)> = BTreeMap::new();
    let (mut remembered, mut left_out) = (Vec::new(), Vec::new());
    for object in slots::objects(log).await? {
        match read(stanza, &object).await {
            Ok(Some(slot)) => {
                found.insert(object, slot);
            }
            // It was removed, or lost.
            Ok(None) => {}
            Err(error) if matches!(error.kind(), Kind::Damaged | Kind::Unsupported) => {
                left_out.push(error.to_string());
            }
            Err(error) => return Err(error),
        }
    }
    let memory = access.memory.as_ref();
    for slot in memory.and_then(|memory| memory.slots(access)).unwrap_or_default() {
        let object = names::slot(slot.epoch, &slot.name);
        // A host does not hear of a removal by another one.
        let is_removed = slots::removed_by(log, &object, Some(&slot), 0).is_some();
        if is_own(stanza, &object, &slot) && !is_removed && !found.contains_key(&object) {
            let bytes = slot.encode_to_vec();
            remembered.push(object.clone());
            found.insert(object, (slot, bytes));
        }
    }
    let mut reads = true;
    for named in &log.state().key_epochs {
        let of_epoch: Vec<&proto::Slot> = found
            .values()
            .map(|(slot, _)| slot)
            .filter(|slot| slot.epoch == named.epoch)
            .collect();
        reads &= opened(stanza, access, named.epoch, &of_epoch)?.can_read();
    }
    Ok(Kit {
        slots: found.into_iter().map(|(object, (_, bytes))| (object, bytes)).collect(),
        epochs: log.state().key_epochs.len(),
        reads,
        remembered,
        left_out,
    })
}

/// A slot as it is stored; `None` if it is not there, an error if it is no slot of this stanza.
async fn read(stanza: &Stanza, object: &str) -> Result<Option<(proto::Slot, Vec<u8>)>> {
    let Some(bytes) = stanza.store().get_opt(object, limits::SLOT_BYTES).await? else {
        return Ok(None);
    };
    let what = format!("{}/{object}", stanza.shown());
    let slot = keys::decode_slot(&bytes, &what)?;
    match is_own(stanza, object, &slot) {
        true => Ok(Some((slot, bytes.to_vec()))),
        false => Err(Error::damaged(format!("{what} is a slot of another name or stanza"))),
    }
}

fn is_own(stanza: &Stanza, object: &str, slot: &proto::Slot) -> bool {
    let is_named = names::check_name("slot name", &slot.name).is_ok() && names::slot(slot.epoch, &slot.name) == object;
    is_named && keys::slot_scope(slot) == *stanza.scope()
}

/// The keys of an epoch that the configured secret has by these slots, which are of it. An error if it opens none, or if what
/// it opens writes only and no other slot would read.
fn opened(stanza: &Stanza, access: &Access, epoch: u32, slots: &[&proto::Slot]) -> Result<EpochKeys> {
    // Those first that open more.
    let (less, more): (Vec<&proto::Slot>, Vec<&proto::Slot>) = slots.iter().copied().partition(|slot| slot.write_only);
    let can_be_read = !more.is_empty();
    let mut by_order = more.into_iter().chain(less);
    let keys = by_order.find_map(|slot| keys_in(slot, access.secret.as_ref(), stanza.scope()));
    let lacks = |what: &str| {
        Error::refused(format!(
            "{what} key epoch {epoch} of {} is in the repository or remembered by this host: what could be exported would not \
             open everything",
            stanza.shown()
        ))
        .remedy(
            "see `fairvault key list`. Use a secret that opens everything; if slots were lost, do it on a host that remembers \
             them, or bring them back with `fairvault key import` of an earlier file",
        )
    };
    match keys {
        None => Err(lacks("no slot that the given key opens in")),
        Some(keys) if !keys.can_read() && !can_be_read => Err(lacks("no slot that reads")),
        Some(keys) => Ok(keys),
    }
}
