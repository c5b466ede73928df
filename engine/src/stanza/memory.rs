//! What a host remembers of a stanza: slots, the unwrapped key of a passphrase, the log as it last saw it.
//!
//! It makes archiving cheap (no key derivation, one request to see that the log did not grow) and lets a
//! host notice that a repository was rolled back. Losing it costs time and that notice, nothing else; a state of the log
//! that is there and does not open is not lost: that is said, and it is not written over. What all entries of the log have
//! made is kept apart from what may have begun with a snapshot (`proven`), for the version that read it.
//! A host whose key writes only keeps manifests here, too (`backup::remembered`): without them it reads everything.
//! Files have mode 0600 in a folder of mode 0700; keys are kept only for stanzas opened by a passphrase.

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fairvault_format::header::{Kind as ObjectKind, ObjectHeader};
use fairvault_format::keys::{EpochKeys, Scope, Secret};
use fairvault_format::{keys, object, proto, sha256};
use prost::Message;
use rustix::fs::OFlags;
use zeroize::{Zeroize, Zeroizing};

use super::{Access, Stanza};
use crate::env;
use crate::error::{Error, Result};

/// File of the proven state: another version reads all of the log once.
const PROVEN: &str = concat!("proven-", env!("CARGO_PKG_VERSION"));

/// File of the state as it was last seen.
const HEAD: &str = "head";

/// A folder of memories.
#[derive(Debug, Clone)]
pub struct Memory {
    root: PathBuf,
}

/// How long whoever only reads WAL does not look again whether the log was rolled back.
const HEAD_IS_FRESH: Duration = Duration::from_secs(60);
/// Longest file that is read back.
const MAX_BYTES: u64 = 64 << 20;
/// Longest note that is changed in its place.
const NOTE_BYTES: u64 = 64 << 10;
/// How often a note is looked at that somebody else changes just now, and after what time again.
const LOOKS: usize = 200;
const PAUSE: Duration = Duration::from_millis(1);

/// Locks a file that others have for no longer than a small write takes; an error if one of them does not let go of it.
fn lock(file: &File) -> std::io::Result<()> {
    for _ in 0..LOOKS {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Err(std::io::ErrorKind::WouldBlock.into())
}

impl Memory {
    /// A memory below `root`, which is made when first needed.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Its folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn folder(&self, shown: &str) -> PathBuf {
        self.root.join(hex::encode(&sha256(shown.as_bytes())[..12]))
    }

    fn access_folder(&self, access: &Access) -> PathBuf {
        self.folder(&format!("{}/{}", access.repository.shown(), access.stanza))
    }

    fn write(&self, folder: &Path, file: &str, bytes: &[u8]) {
        let attempt = || -> std::io::Result<()> {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
            let temporary = folder.join(format!("{file}.{}", std::process::id()));
            let mut out = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            out.write_all(bytes)?;
            std::fs::rename(&temporary, folder.join(file))
        };
        if let Err(error) = attempt() {
            tracing::debug!("nothing is remembered in {}: {error}", folder.display());
        }
    }

    fn read(folder: &Path, file: &str) -> Option<Zeroizing<Vec<u8>>> {
        Self::read_at_most(folder, file, MAX_BYTES)
    }

    fn read_at_most(folder: &Path, file: &str, limit: u64) -> Option<Zeroizing<Vec<u8>>> {
        let path = folder.join(file);
        let meta = std::fs::metadata(&path).ok()?;
        // Only a file that is ours and that nobody else can touch is believed.
        let ours = std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == meta.uid());
        (ours && meta.permissions().mode() & 0o077 == 0 && meta.len() <= limit).then_some(())?;
        std::fs::read(path).ok().map(Zeroizing::new)
    }

    /// The slots of a stanza.
    pub fn slots(&self, access: &Access) -> Option<Vec<proto::Slot>> {
        let bytes = Self::read(&self.access_folder(access), "slots")?;
        let snapshot = proto::Snapshot::decode(bytes.as_slice()).ok()?;
        let slots: Vec<_> = snapshot
            .slots
            .iter()
            .filter_map(|s| keys::decode_slot(s, "slot").ok())
            .collect();
        // A secret that none of them takes may belong to a slot that was added since.
        let fits = slots.iter().any(|slot| match &access.secret {
            Some(secret) => keys::open_slot_cheaply(slot, secret),
            None => slot.kind() == proto::SlotKind::SlotUnsealed,
        });
        fits.then_some(slots)
    }

    /// Remembers slots.
    pub fn remember_slots(&self, access: &Access, slots: &[proto::Slot]) {
        let snapshot = proto::Snapshot {
            slots: slots.iter().map(Message::encode_to_vec).collect(),
            ..Default::default()
        };
        self.write(&self.access_folder(access), "slots", &snapshot.encode_to_vec());
    }

    /// Where a stanza is remembered, if anything of it is.
    pub fn knows(&self, access: &Access) -> Option<PathBuf> {
        let folder = self.access_folder(access);
        [HEAD, "slots", "keys"]
            .iter()
            .any(|file| folder.join(file).exists())
            .then_some(folder)
    }

    /// Forgets the slots of a stanza, because there is a new one.
    pub fn forget_slots(&self, access: &Access) {
        let _ = std::fs::remove_file(self.access_folder(access).join("slots"));
    }

    /// Where a stanza is remembered.
    pub fn place(&self, stanza: &Stanza) -> PathBuf {
        self.folder(stanza.shown())
    }

    /// Unwrapped keys of a stanza that is opened by this very passphrase.
    pub fn keys(&self, access: &Access) -> Option<(Scope, Vec<EpochKeys>)> {
        let Some(Secret::Passphrase(passphrase)) = &access.secret else {
            return None;
        };
        let bytes = Self::read(&self.access_folder(access), "keys")?;
        let mut stored = proto::Snapshot::decode(bytes.as_slice()).ok()?;
        let bundles = Zeroizing::new(std::mem::take(&mut stored.slots));
        let scope = stored.genesis.as_ref()?;
        let scope = Scope {
            repository: scope.repository_id.as_slice().try_into().ok()?,
            stanza: scope.stanza_id.as_slice().try_into().ok()?,
        };
        let epochs: Vec<_> = bundles
            .iter()
            .filter_map(|b| EpochKeys::decode(b, "cached key").ok())
            .collect();
        let newest = epochs.last()?;
        // Bound to the passphrase by a keyed hash, so that a changed passphrase is not passed over.
        (newest.chunk_id(passphrase)[..] == stored.head).then_some((scope, epochs))
    }

    /// Remembers unwrapped keys, if a passphrase opened them. What another secret left here, which may open more, goes.
    pub fn remember_keys(&self, access: &Access, scope: &Scope, epochs: &[EpochKeys]) {
        let (Some(Secret::Passphrase(passphrase)), Some(newest)) = (&access.secret, epochs.last()) else {
            let _ = std::fs::remove_file(self.access_folder(access).join("keys"));
            return;
        };
        let mut stored = proto::Snapshot {
            genesis: Some(proto::Genesis {
                repository_id: scope.repository.to_vec(),
                stanza_id: scope.stanza.to_vec(),
                ..Default::default()
            }),
            head: newest.chunk_id(passphrase).to_vec(),
            slots: epochs.iter().map(|k| k.encode().to_vec()).collect(),
            ..Default::default()
        };
        let bytes = Zeroizing::new(stored.encode_to_vec());
        stored.slots.zeroize();
        self.write(&self.access_folder(access), "keys", &bytes);
    }

    /// A note about a stanza: what can be found out again.
    pub fn note(&self, stanza: &Stanza, name: &str) -> Option<Vec<u8>> {
        Some(Self::read(&self.folder(stanza.shown()), name)?.to_vec())
    }

    /// Takes a note.
    pub fn take_note(&self, stanza: &Stanza, name: &str, bytes: &[u8]) {
        self.write(&self.folder(stanza.shown()), name, bytes);
    }

    /// Whether there is such a note.
    pub fn has_note(&self, access: &Access, name: &str) -> bool {
        self.access_folder(access).join(name).exists()
    }

    /// Changes a note, one process after the other; `None` if it cannot be. Nothing is synced, and after a crash the note
    /// may be anything: `change` is given what there is. Where another user owns the folder, a link in it leads to no file
    /// of somebody else, and nothing in it is waited for.
    pub fn change_note<T>(&self, access: &Access, name: &str, change: impl FnOnce(&[u8]) -> (Vec<u8>, T)) -> Option<T> {
        let folder = self.access_folder(access);
        let attempt = || -> std::io::Result<T> {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32);
            let file = options.open(folder.join(name))?;
            lock(&file)?;
            let mut before = Vec::new();
            (&file).take(NOTE_BYTES).read_to_end(&mut before)?;
            let (after, changed) = change(&before);
            if after != before {
                file.write_all_at(&after, 0)?;
                file.set_len(after.len() as u64)?;
            }
            Ok(changed)
        };
        let changed = attempt();
        changed
            .inspect_err(|error| tracing::debug!("nothing is noted in {}: {error}", folder.display()))
            .ok()
    }

    /// Keeps a file of a stanza: it is synced before it has its name.
    pub fn keep(&self, stanza: &Stanza, name: &str, bytes: &[u8]) -> Result<()> {
        let folder = self.folder(stanza.shown());
        let temporary = folder.join(format!("{name}.{}", std::process::id()));
        let attempt = || -> std::io::Result<()> {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
            let mut options = std::fs::OpenOptions::new();
            let mut out = options
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            out.write_all(bytes)?;
            out.sync_all()?;
            std::fs::rename(&temporary, folder.join(name))?;
            std::fs::File::open(&folder)?.sync_all()
        };
        attempt().map_err(|error| {
            let _ = std::fs::remove_file(&temporary);
            Error::io(format_args!("writing {}", folder.join(name).display()), error)
        })
    }

    /// A file that was kept, if it is no longer than that and nobody else can touch it.
    pub fn kept(&self, stanza: &Stanza, name: &str, limit: u64) -> Option<Zeroizing<Vec<u8>>> {
        Self::read_at_most(&self.folder(stanza.shown()), name, limit)
    }

    /// Whether a file was written less than that ago.
    pub fn is_younger(&self, stanza: &Stanza, name: &str, age: Duration) -> bool {
        let path = self.folder(stanza.shown()).join(name);
        let written = std::fs::metadata(path).and_then(|meta| meta.modified());
        written.is_ok_and(|at| at.elapsed().is_ok_and(|now| now < age))
    }

    /// Names of files that begin like this.
    pub fn list_kept(&self, stanza: &Stanza, prefix: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder(stanza.shown()))
            .into_iter()
            .flatten()
            .flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| name.starts_with(prefix)).collect()
    }

    /// Forgets a file.
    pub fn forget(&self, stanza: &Stanza, name: &str) {
        let _ = std::fs::remove_file(self.folder(stanza.shown()).join(name));
    }

    /// Forgets a stanza that was erased: its keys, and what they open. That its log was seen stays.
    pub fn forget_stanza(&self, access: &Access) {
        let entries = std::fs::read_dir(self.access_folder(access))
            .into_iter()
            .flatten()
            .flatten();
        for entry in entries.filter(|entry| entry.file_name() != HEAD) {
            let _ = std::fs::remove_file(entry.path());
        }
    }

    /// The log's state as it was last seen. An error if there is one that does not open: its keys may be such as a
    /// repository that was rolled back does not have any more.
    pub fn head(&self, stanza: &Stanza) -> Result<Option<proto::Snapshot>> {
        let folder = self.folder(stanza.shown());
        let Some(bytes) = Self::read(&folder, HEAD) else {
            return Ok(None);
        };
        Self::open(stanza, HEAD, &bytes).map(Some).map_err(|error| {
            let path = folder.join(HEAD).display().to_string();
            Error::damaged(format!(
                "{path} does not open, and says what this host saw of the log of {}: that was rolled back or replaced since, or \
                 the file is damaged",
                stanza.shown()
            ))
            .caused_by(error)
            .remedy(format!(
                "look at what the log says now (`fairvault audit {}` with another folder as --cache): if nothing of late is \
                 missing there, no backup and no rotation of keys, delete {path}",
                stanza.name()
            ))
        })
    }

    /// The key epoch under which the log's state was last seen, whether that opens or not.
    pub fn head_epoch(&self, stanza: &Stanza) -> Option<u32> {
        let bytes = Self::read(&self.folder(stanza.shown()), HEAD)?;
        ObjectHeader::decode(&bytes, HEAD).ok().map(|header| header.epoch)
    }

    /// The log's state as this host has last had it from all entries.
    pub fn proven(&self, stanza: &Stanza) -> Option<proto::Snapshot> {
        let bytes = Self::read(&self.folder(stanza.shown()), PROVEN)?;
        Self::open(stanza, PROVEN, &bytes).ok()
    }

    fn open(stanza: &Stanza, file: &str, bytes: &[u8]) -> Result<proto::Snapshot> {
        let what = "what is remembered of the log";
        let keys = stanza.keys_for(bytes, what)?;
        let opened = object::open_message(keys, stanza.scope(), ObjectKind::Snapshot, bytes, file, what)?;
        Ok(opened)
    }

    /// Whether the remembered head was found in the repository within the last minute.
    pub fn head_is_fresh(&self, stanza: &Stanza) -> bool {
        let folder = self.folder(stanza.shown());
        let seen = std::fs::metadata(folder.join("seen")).and_then(|meta| meta.modified());
        // A time from the future proves nothing.
        seen.is_ok_and(|seen| seen.elapsed().is_ok_and(|age| age < HEAD_IS_FRESH))
    }

    /// The remembered head was found in the repository just now.
    pub fn saw_head(&self, stanza: &Stanza) {
        self.write(&self.folder(stanza.shown()), "seen", &[]);
    }

    /// Remembers the log's state, synced: one that a crash has torn would have to be looked at by somebody. One that is there
    /// and does not open has to be, and is not written over.
    pub fn remember_head(&self, stanza: &Stanza, state: &proto::Snapshot) {
        let kept = match (self.head(stanza), Self::seal(stanza, HEAD, state)) {
            (Ok(_), Some(bytes)) => self.keep(stanza, HEAD, &bytes),
            (Err(error), _) => Err(error),
            (_, None) => return,
        };
        if let Err(error) = kept {
            tracing::debug!("the state of the log is not remembered: {error}");
        }
    }

    /// Remembers the log's state that all of its entries have made.
    pub fn remember_proven(&self, stanza: &Stanza, state: &proto::Snapshot) {
        if let Some(bytes) = Self::seal(stanza, PROVEN, state) {
            self.write(&self.folder(stanza.shown()), PROVEN, &bytes);
        }
    }

    fn seal(stanza: &Stanza, file: &str, state: &proto::Snapshot) -> Option<Vec<u8>> {
        let salt = env::salt(stanza.env()).ok()?;
        object::seal_message(stanza.keys(), stanza.scope(), ObjectKind::Snapshot, salt, file, state).ok()
    }
}
