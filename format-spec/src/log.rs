//! Log entries: signed, chained, sealed (SPEC.md, section 7).

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use prost::Message;

use crate::error::{FormatError, Result, check_limit};
use crate::header::Kind;
use crate::keys::{EpochKeys, Scope};
use crate::object::{open_message, seal_message};
use crate::proto::{LogEntry, Role, SignedEntry, log_entry::Kind as Entry};
use crate::{limits, names};

const SIGNED_PREFIX: &[u8] = b"fairvault/1 log entry";

/// Whether a signature is good.
fn is_signed(key: &[u8; 32], message: &[u8], signature: &[u8; 64]) -> bool {
    let is_good = || {
        let signature = Signature::from_bytes(signature);
        VerifyingKey::from_bytes(key).is_ok_and(|key| key.verify_strict(message, &signature).is_ok())
    };
    #[cfg(debug_assertions)]
    let is_good = || crate::known_good::or_else(key, message, signature, is_good);
    is_good()
}

/// The public keys that may sign in a stanza: those of every key epoch seen so far, each for entries of its epoch.
#[derive(Debug, Clone, Default)]
pub struct Signers {
    writers: Vec<(u32, [u8; 32])>,
    operators: Vec<(u32, [u8; 32])>,
}

impl Signers {
    /// Adds the role keys of an epoch.
    pub fn add(&mut self, epoch: &crate::proto::KeyEpoch) {
        if let Ok(key) = epoch.writer_public_key.as_slice().try_into() {
            self.writers.push((epoch.epoch, key));
        }
        if let Ok(key) = epoch.operator_public_key.as_slice().try_into() {
            self.operators.push((epoch.epoch, key));
        }
    }
}

/// Who must sign an entry; `None` for a kind that this version does not know.
pub fn required_role(entry: &LogEntry) -> Option<Role> {
    Some(match entry.kind.as_ref()? {
        Entry::Begin(_)
        | Entry::Announce(_)
        | Entry::Commit(_)
        | Entry::Abort(_)
        | Entry::ArchiveEpoch(_)
        | Entry::Operation(_)
        | Entry::Incarnation(_) => Role::Writer,
        Entry::Genesis(_)
        | Entry::SetFence(_)
        | Entry::Expired(_)
        | Entry::ExpiredWal(_)
        | Entry::Hold(_)
        | Entry::GcMark(_)
        | Entry::GcSwept(_)
        | Entry::KeyEpoch(_)
        | Entry::Policy(_)
        | Entry::DistrustParser(_)
        | Entry::CloseTimeline(_)
        | Entry::Erasure(_) => Role::Operator,
    })
}

/// Signs and seals an entry for its place in the log.
pub fn seal_entry(keys: &EpochKeys, scope: &Scope, salt: [u8; 32], entry: &LogEntry) -> Result<Vec<u8>> {
    let missing = |secret| FormatError::MissingSecret {
        what: format!("log entry {}", entry.seq),
        secret,
    };
    let (seed, role) = match required_role(entry) {
        Some(Role::Writer) => match (&keys.writer_seed, &keys.operator_seed) {
            (Some(seed), _) => (seed, Role::Writer),
            (None, Some(seed)) => (seed, Role::Operator),
            (None, None) => return Err(missing("a writer key")),
        },
        _ => (
            keys.operator_seed.as_ref().ok_or_else(|| missing("the operator key"))?,
            Role::Operator,
        ),
    };
    let body = entry.encode_to_vec();
    let signature = SigningKey::from_bytes(seed).sign(&[SIGNED_PREFIX, &body].concat());
    let signed = SignedEntry {
        body,
        signature: signature.to_bytes().to_vec(),
        role: role as i32,
    };
    seal_message(
        keys,
        scope,
        Kind::LogEntry,
        salt,
        &names::log_context(entry.seq),
        &signed,
    )
}

/// Opens entry `seq`, checks its signature and its place. `previous` is the SHA-256 of the entry before.
/// For entry 1 the signers come from the entry itself, and the caller compares them with its own keys. Whether the epoch
/// of `keys` rules at that place, the caller decides.
pub fn open_entry(
    keys: &EpochKeys,
    scope: &Scope,
    bytes: &[u8],
    seq: u64,
    previous: &[u8; 32],
    signers: &Signers,
) -> Result<LogEntry> {
    let what = format!("log entry {seq}");
    let (signed, entry) = unseal(keys, scope, bytes, seq, &what)?;
    if entry.previous != previous {
        return Err(FormatError::damaged(
            what,
            "it does not follow the entry before it (the hash chain is broken)",
        ));
    }
    let Some(required) = required_role(&entry) else {
        return Err(FormatError::unsupported(what, "an entry of unknown kind"));
    };
    let genesis_signers = match &entry.kind {
        Some(Entry::Genesis(genesis)) if seq == 1 => {
            let mut own = Signers::default();
            if let Some(epoch) = &genesis.key_epoch {
                own.add(epoch);
            }
            Some(own)
        }
        Some(Entry::Genesis(_)) => return Err(FormatError::damaged(what, "a genesis entry that is not the first")),
        _ => None,
    };
    let signers = genesis_signers.as_ref().unwrap_or(signers);
    let allowed = match (signed.role(), required) {
        (Role::Operator, _) => &signers.operators,
        (Role::Writer, Role::Writer) => &signers.writers,
        (role, required) => {
            return Err(FormatError::damaged(
                what,
                format!("it is signed as {role:?} and needs {required:?}"),
            ));
        }
    };
    check_signature(keys, &signed, allowed, what)?;
    Ok(entry)
}

/// Opens entry `seq` where the one before it is not known, and checks that a key of its epoch has signed it. Its place in
/// the chain is not checked, and neither is whether that key may say this: it shows that there was such an entry, and
/// counts for nothing else. An entry of unknown kind is one as well.
pub fn open_unchained(keys: &EpochKeys, scope: &Scope, bytes: &[u8], seq: u64, signers: &Signers) -> Result<LogEntry> {
    let what = format!("log entry {seq}");
    let (signed, entry) = unseal(keys, scope, bytes, seq, &what)?;
    let allowed = match signed.role() {
        Role::Operator => &signers.operators,
        Role::Writer => &signers.writers,
        role => return Err(FormatError::damaged(what, format!("it is signed as {role:?}"))),
    };
    check_signature(keys, &signed, allowed, what)?;
    Ok(entry)
}

/// Opens entry `seq`; nothing is checked but its number.
fn unseal(keys: &EpochKeys, scope: &Scope, bytes: &[u8], seq: u64, what: &str) -> Result<(SignedEntry, LogEntry)> {
    check_limit(what, bytes.len() as u64, limits::LOG_ENTRY_BYTES)?;
    let signed: SignedEntry = open_message(keys, scope, Kind::LogEntry, bytes, &names::log_context(seq), what)?;
    let entry = LogEntry::decode(signed.body.as_slice()).map_err(|e| FormatError::damaged(what, e.to_string()))?;
    match entry.seq == seq {
        true => Ok((signed, entry)),
        false => Err(FormatError::damaged(
            what,
            format!("it says that it is entry {}", entry.seq),
        )),
    }
}

/// Fails unless one of the `allowed` keys of the epoch of `keys` has signed it.
fn check_signature(keys: &EpochKeys, signed: &SignedEntry, allowed: &[(u32, [u8; 32])], what: String) -> Result<()> {
    let message = [SIGNED_PREFIX, signed.body.as_slice()].concat();
    let good = <&[u8; 64]>::try_from(signed.signature.as_slice()).is_ok_and(|signature| {
        let mut allowed = allowed.iter().filter(|(epoch, _)| *epoch == keys.epoch);
        allowed.any(|(_, key)| is_signed(key, &message, signature))
    });
    match good {
        true => Ok(()),
        false => Err(FormatError::damaged(
            what,
            "its signature is not of a key that may say this",
        )),
    }
}
