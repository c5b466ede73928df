//! A stanza: one PostgreSQL cluster's part of a repository, opened with its keys.
//!
//! What always holds: a configured key is used or the stanza is refused; the keys' ids are the ids that
//! the log pins; what is written is written with the keys of an epoch that the log names.

pub mod create;
pub mod erase;
pub mod erasure;
pub mod kit;
pub mod memory;
pub mod rotate;
pub mod slots;
mod trace;
pub mod upgrade;

use std::sync::Arc;

use fairvault_format::header::ObjectHeader;
use fairvault_format::keys::{self, EpochKeys, Scope, Secret};
use fairvault_format::{FormatError, limits, names, proto, repository::Repository};

use crate::env::{Env, SharedEnv};
use crate::error::{Error, Kind, Result, WITH_THE_OTHER_KEY};
use crate::store::Store;
use memory::Memory;
pub use trace::Trace;

/// How a stanza is to be opened.
#[derive(Clone)]
pub struct Access {
    /// Repository.
    pub repository: Store,
    /// Stanza name.
    pub stanza: String,
    /// The configured secret; `None` means that the stanza must be unencrypted.
    pub secret: Option<Secret>,
    /// What this host remembers; `None` for nothing.
    pub memory: Option<Memory>,
    /// Whether a passphrase may be stretched now; `wal push` and `wal get` may not.
    pub may_stretch: bool,
    /// Clock and randomness.
    pub env: SharedEnv,
    /// What this process has left in its log so far.
    pub trace: Trace,
}

/// An opened stanza.
#[derive(Clone)]
pub struct Stanza {
    access: Access,
    store: Store,
    scope: Scope,
    /// Every epoch for which a slot opens, the oldest first; the log may not name the last ones yet.
    epochs: Vec<EpochKeys>,
    /// Which of them is written with.
    writing: usize,
    host: String,
    user: String,
}

impl std::fmt::Debug for Stanza {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stanza({})", self.store.shown())
    }
}

/// The repository's description.
pub async fn read_repository(store: &Store) -> Result<Repository> {
    let bytes = store
        .get_opt(names::REPOSITORY, limits::REPOSITORY_JSON_BYTES)
        .await?
        .ok_or_else(|| {
            Error::not_found(format!(
                "{} is not a fairvault repository: it has no {}",
                store.shown(),
                names::REPOSITORY
            ))
            .remedy("check the URL, or make the repository with `fairvault stanza create`")
        })?;
    Ok(Repository::decode(&bytes)?)
}

impl Stanza {
    /// Opens a stanza: finds a slot that the secret opens, or what this host remembers.
    pub async fn open(access: &Access) -> Result<Arc<Self>> {
        names::check_name("stanza name", &access.stanza)?;
        let store = access.repository.folder(&access.stanza);
        if let Some((scope, epochs)) = access.memory.as_ref().and_then(|m| m.keys(access)) {
            return Ok(Arc::new(Self::new(store, access, scope, epochs)));
        }
        let remembered = access.memory.as_ref().and_then(|m| m.slots(access));
        let opened = remembered.map(|slots| open_slots(&slots, access));
        let (scope, epochs) = match opened {
            Some(Ok(opened)) => opened,
            // What is remembered does not open: a slot may have been added since.
            Some(Err(_)) | None => Self::open_from_store(access, &store).await?,
        };
        if let Some(memory) = &access.memory {
            memory.remember_keys(access, &scope, &epochs);
        }
        Ok(Arc::new(Self::new(store, access, scope, epochs)))
    }

    /// Opens a stanza by these slots, whatever the repository has.
    fn open_with(access: &Access, slots: &[proto::Slot]) -> Result<Arc<Self>> {
        let store = access.repository.folder(&access.stanza);
        let (scope, epochs) = open_slots(slots, access)?;
        Ok(Arc::new(Self::new(store, access, scope, epochs)))
    }

    async fn open_from_store(access: &Access, store: &Store) -> Result<(Scope, Vec<EpochKeys>)> {
        let repository = read_repository(&access.repository).await?;
        let (slots, unusable) = read_slots(store, &access.stanza, &repository).await?;
        match open_slots(&slots, access) {
            Ok(opened) => {
                if let Some(memory) = access.memory.as_ref().filter(|_| unusable.is_empty()) {
                    memory.remember_slots(access, &slots);
                }
                Ok(opened)
            }
            // The one that would have opened may be among those that could not be read.
            Err(error) => Err(unusable.into_iter().next().unwrap_or(error)),
        }
    }

    fn new(store: Store, access: &Access, scope: Scope, epochs: Vec<EpochKeys>) -> Self {
        Self {
            access: access.clone(),
            store,
            scope,
            epochs,
            // Until the log was read: the only one that it is certain to name.
            writing: 0,
            host: host_name(),
            user: user_name(),
        }
    }

    /// The same, writing with the keys of an epoch that the log names. If those are not known, the slots are read again:
    /// they may be newer than what this host remembers, or than this process.
    pub async fn in_epoch(&self, named: &proto::KeyEpoch) -> Result<Self> {
        if let Some(known) = self.with(named.epoch) {
            return Ok(known);
        }
        let (scope, mut epochs) = Self::open_from_store(&self.access, &self.store).await?;
        if scope != self.scope {
            return Err(Error::damaged(format!(
                "the key slots of {} are of another stanza now",
                self.shown()
            )));
        }
        if epochs.iter().all(|keys| keys.epoch != named.epoch) {
            epochs.extend(self.named_slot(named).await?);
        }
        if let Some(memory) = self.memory() {
            memory.remember_keys(&self.access, &scope, &epochs);
        }
        let anew = Self { epochs, ..self.clone() };
        anew.with(named.epoch).ok_or_else(|| {
            Error::refused(format!(
                "the keys of {} were rotated: key epoch {} rules, which the given key does not open",
                self.shown(),
                named.epoch
            ))
            .remedy(
                "configure the new key, or have it opened for this one with `fairvault key add-slot`; if its slots were \
                 lost, bring them back with `fairvault key import`",
            )
        })
    }

    /// The keys of an epoch by the names of its slots: what is new may not be listed yet.
    async fn named_slot(&self, named: &proto::KeyEpoch) -> Result<Option<EpochKeys>> {
        for name in &named.slots {
            match read_slot(&self.store, &names::slot(named.epoch, name), &self.scope.repository).await {
                Ok(slot) if slot.kind() == proto::SlotKind::SlotPassphrase && !self.access.may_stretch => {}
                Ok(slot) => match keys_in(&slot, self.access.secret.as_ref(), &self.scope) {
                    None => {}
                    keys => return Ok(keys),
                },
                Err(error) if error.kind() == Kind::Temporary => return Err(error),
                Err(error) => tracing::debug!("a key slot is passed over: {error}"),
            }
        }
        Ok(None)
    }

    fn with(&self, epoch: u32) -> Option<Self> {
        let writing = self.epochs.iter().position(|keys| keys.epoch == epoch)?;
        Some(Self {
            writing,
            ..self.clone()
        })
    }

    /// The same, writing with the newest keys that the log had named when this host last saw it: for what is written
    /// while the repository is away.
    pub fn as_remembered(&self) -> Self {
        let head = self.memory().and_then(|memory| memory.head(self).ok().flatten());
        let newest = head.and_then(|state| state.key_epochs.last().map(|named| named.epoch));
        newest
            .and_then(|epoch| self.with(epoch))
            .unwrap_or_else(|| self.clone())
    }

    /// Its folder.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.access.stanza
    }

    /// How it is called in messages.
    pub fn shown(&self) -> &str {
        self.store.shown()
    }

    /// Its ids.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Clock and randomness.
    pub fn env(&self) -> &dyn Env {
        &*self.access.env
    }

    /// This host's name, for the log.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Who runs this process, for the log.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// How it was opened.
    pub(crate) fn access(&self) -> &Access {
        &self.access
    }

    /// What this process has left in its log so far.
    pub fn trace(&self) -> &Trace {
        &self.access.trace
    }

    /// The same with a trace of its own: for entries about what others have done.
    pub(crate) fn untraced(&self) -> Self {
        let access = Access {
            trace: Trace::default(),
            ..self.access.clone()
        };
        Self { access, ..self.clone() }
    }

    /// Whether a key is configured.
    pub fn has_secret(&self) -> bool {
        self.access.secret.is_some()
    }

    /// What this host remembers of the stanza's keys, and of what they open, goes.
    pub(crate) fn forget_keys(&self) {
        if let Some(memory) = &self.access.memory {
            memory.forget_stanza(&self.access);
        }
    }

    /// What this host remembers.
    pub fn memory(&self) -> Option<&Memory> {
        self.access.memory.as_ref()
    }

    /// Keys for writing: those of the newest epoch that the log names, in the stanza of a [`Log`](crate::commit::Log).
    pub fn keys(&self) -> &EpochKeys {
        // `open_slots` fails on an empty list, and nothing removes from it.
        &self.epochs[self.writing]
    }

    /// The newest epoch for which a slot opens. The log does not name that of a rotation that was not finished.
    pub fn newest_slot(&self) -> u32 {
        self.epochs.iter().map(|keys| keys.epoch).max().unwrap_or_default()
    }

    /// Fails if there is content that the given key does not open, because it is one that writes only.
    pub fn check_reads(&self, what: &str) -> Result<()> {
        match self.epochs.iter().all(EpochKeys::can_read) {
            true => Ok(()),
            false => Err(Error::refused(format!(
                "this host's key can write only: {what} needs the private key of {}",
                self.shown()
            ))
            .remedy(WITH_THE_OTHER_KEY)),
        }
    }

    /// Keys of an epoch: for reading.
    pub fn keys_of(&self, epoch: u32) -> Result<&EpochKeys> {
        self.epochs.iter().find(|k| k.epoch == epoch).ok_or_else(|| {
            Error::refused(format!(
                "{} has objects of key epoch {epoch}, which the given key does not open",
                self.shown()
            ))
            .remedy("if keys were rotated just now, start again; `fairvault key list` says which slots open what")
        })
    }

    /// Keys for the object that begins with `bytes`.
    pub fn keys_for(&self, bytes: &[u8], what: &str) -> Result<&EpochKeys> {
        self.keys_of(ObjectHeader::decode(bytes, what)?.epoch)
    }
}

type Slots = Vec<proto::Slot>;

/// The slots that can be read, and why others cannot.
async fn read_slots(store: &Store, stanza: &str, repository: &Repository) -> Result<(Slots, Vec<Error>)> {
    let mut slots = Slots::new();
    let mut unusable = Vec::new();
    for (name, _) in store.list(names::KEYS).await? {
        match read_slot(store, &name, &repository.id()?).await {
            Ok(slot) => slots.push(slot),
            // It may be the only one of its epoch.
            Err(error) if error.kind() == Kind::Temporary => return Err(error),
            Err(error) => unusable.push(error),
        }
    }
    for error in &unusable {
        tracing::warn!("a key slot is passed over: {error}");
    }
    if slots.is_empty() {
        erase::check_note(store).await?;
        return Err(match unusable.pop() {
            Some(error) => error,
            None => Error::not_found(format!("there is no stanza {stanza:?} in {}", store.shown())).remedy(format!(
                "create it with `fairvault stanza create {stanza}`, or see `fairvault stanza list`"
            )),
        });
    }
    Ok((slots, unusable))
}

/// Reads a key slot of a repository, without opening it.
pub async fn read_slot(store: &Store, name: &str, repository: &[u8; 16]) -> Result<proto::Slot> {
    let what = format!("{}/{name}", store.shown());
    let slot = keys::decode_slot(&store.get(name, limits::SLOT_BYTES).await?, &what)?;
    match slot.repository_id == repository {
        true => Ok(slot),
        false => Err(Error::damaged(format!("{what} is a key of another repository"))),
    }
}

/// The keys in a slot, if it belongs to this stanza and is opened by `secret`, or needs none and none is given.
pub fn keys_in(slot: &proto::Slot, secret: Option<&Secret>, scope: &Scope) -> Option<EpochKeys> {
    let may_open = match secret {
        Some(secret) => keys::slot_takes(slot, secret),
        None => slot.kind() == proto::SlotKind::SlotUnsealed,
    };
    let is_own = may_open && keys::slot_scope(slot) == *scope;
    is_own.then(|| keys::open_slot(slot, secret, &slot.name).ok()).flatten()
}

fn open_slots(slots: &[proto::Slot], access: &Access) -> Result<(Scope, Vec<EpochKeys>)> {
    let stanza = &access.stanza;
    let unsealed = |slot: &proto::Slot| slot.kind() == proto::SlotKind::SlotUnsealed;
    let mut epochs: Vec<EpochKeys> = Vec::new();
    let mut scope = None;
    let mut failures: Vec<Error> = Vec::new();
    let mut wrong = 0;
    // Of slots that one secret opens, those come first that open more.
    let (less, more): (Vec<_>, Vec<_>) = slots.iter().partition(|slot| slot.write_only);
    for slot in more.into_iter().chain(less) {
        let usable = match &access.secret {
            Some(secret) => keys::slot_takes(slot, secret),
            None => unsealed(slot),
        };
        // The first slot that opens says which stanza this is; slots of another one do not count.
        let foreign = scope.is_some_and(|known| known != keys::slot_scope(slot));
        if !usable || foreign || epochs.iter().any(|k| k.epoch == slot.epoch) {
            continue;
        }
        if slot.kind() == proto::SlotKind::SlotPassphrase && !access.may_stretch {
            failures.push(Error::refused(format!(
                "stanza {stanza} is opened by a passphrase, and this host has no cached key"
            ))
            .remedy(
                "run `fairvault check` once as this user, or use a key file: archiving never pays for the passphrase",
            ));
            continue;
        }
        match keys::open_slot(slot, access.secret.as_ref(), &format!("key slot {:?}", slot.name)) {
            Ok(keys) => {
                scope = Some(keys::slot_scope(slot));
                epochs.push(keys);
            }
            Err(FormatError::DoesNotOpen { .. }) => wrong += 1,
            Err(error) => failures.push(error.into()),
        }
    }
    epochs.sort_by_key(|k| k.epoch);
    if let Some(scope) = scope {
        return Ok((scope, epochs));
    }
    if let Some(error) = failures.pop() {
        return Err(error);
    }
    let kinds: Vec<_> = slots
        .iter()
        .map(|s| s.kind().as_str_name().trim_start_matches("SLOT_").to_lowercase())
        .collect();
    Err(match (&access.secret, wrong) {
        (Some(_), 0) if slots.iter().all(unsealed) => {
            Error::refused(format!("a key is configured, and stanza {stanza} is not encrypted"))
                .remedy("remove the key from the configuration if that is meant, or create an encrypted stanza")
        }
        (Some(_), 0) => Error::new(
            Kind::Refused,
            format!("the configured key is of a kind that no slot of stanza {stanza} takes"),
        )
        .remedy(format!("its slots: {}", kinds.join(", "))),
        (Some(_), _) => Error::new(
            Kind::Refused,
            format!("wrong key for stanza {stanza}: it opens none of its slots"),
        )
        .remedy("nothing was read or written; check the key file, passphrase or command of this stanza"),
        (None, _) => Error::new(
            Kind::Refused,
            format!("stanza {stanza} is encrypted and no key is configured"),
        )
        .remedy("set `key` for the stanza, or give --key-file or --passphrase-file"),
    })
}

/// Who runs this process: name where that is known, or number.
fn user_name() -> String {
    use std::os::unix::fs::MetadataExt;
    let Ok(me) = std::fs::metadata("/proc/self") else {
        return String::new();
    };
    let uid = me.uid().to_string();
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let mut lines = users.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let found = lines.find(|fields| fields.get(2) == Some(&uid.as_str()));
    found.map_or(uid.clone(), |fields| fields[0].to_owned())
}

/// This machine's name.
fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|s| s.trim().to_owned())
        .unwrap_or_else(|_| "unknown".to_owned())
}
