//! Manifests of a host whose key writes only: it cannot read from the repository what it stored there, and an incremental
//! backup needs its parent's manifest. So it keeps a copy of its own.
//!
//! What always holds: a copy is sealed with the stanza's metadata key and says of which root it is, by the hash that the
//! log names; what is missing, damaged, or of another root is no manifest, and everything is read. A copy is complete or
//! not there: it is synced before it has its name.

use std::collections::HashSet;
use std::time::Duration;

use fairvault_format::error::check_limit;
use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::keys::KeyRole;
use fairvault_format::object::{ObjectReader, ObjectWriter, compress};
use fairvault_format::proto::{self, ManifestSegment};
use fairvault_format::{FormatError, limits};
use prost::Message;

use crate::env;
use crate::error::Result;
use crate::manifest::Manifest;
use crate::stanza::Stanza;

/// zstd level of segments: as in the repository.
const LEVEL: i32 = super::manifest::LEVEL;
/// What a copy's file is called, before the hash of its root.
const PREFIX: &str = "manifest-";
/// Where a copy belongs, by its associated data.
const CONTEXT: &str = "remembered manifest";
/// The longest file that is read back.
const MAX_BYTES: u64 = limits::OBJECT_BYTES;

/// How long a copy is kept whose backup the log does not name.
const MAY_COME: Duration = Duration::from_secs(3600);

/// The first section: which manifest it is.
#[derive(Clone, PartialEq, Message)]
struct Head {
    #[prost(bytes = "vec", tag = "1")]
    root_hash: Vec<u8>,
    #[prost(message, optional, tag = "2")]
    usage: Option<proto::Usage>,
    #[prost(message, optional, tag = "3")]
    root: Option<proto::Root>,
    #[prost(uint32, tag = "4")]
    segments: u32,
}

/// Segments of a manifest that is being made.
#[derive(Default)]
pub struct Draft {
    /// Codec, output and plain length of each.
    segments: Vec<(u8, Vec<u8>, usize)>,
}

impl Draft {
    /// Takes the next segment.
    pub fn add(&mut self, segment: &ManifestSegment) {
        let plain = segment.encode_to_vec();
        let (codec, packed) = compress(&plain, LEVEL);
        self.segments.push((codec, packed, plain.len()));
    }

    /// Keeps the manifest of a backup whose root has this hash. What cannot be kept costs a full read, nothing else.
    pub fn keep(self, stanza: &Stanza, root_hash: &[u8; 32], usage: proto::Usage, root: proto::Root) {
        let Some(memory) = stanza.memory() else {
            tracing::warn!(
                "this host has no cache, and its key can write only: the next backup has no parent, and reads everything"
            );
            return;
        };
        let kept = self.seal(stanza, root_hash, usage, root).and_then(|bytes| {
            check_limit("the copy", bytes.len() as u64, MAX_BYTES)?;
            memory.keep(stanza, &file(root_hash), &bytes)
        });
        if let Err(error) = kept {
            tracing::warn!(
                "the manifest of this backup is not kept on this host, and the next backup cannot build on it: {error}"
            );
        }
    }

    fn seal(self, stanza: &Stanza, root_hash: &[u8; 32], usage: proto::Usage, root: proto::Root) -> Result<Vec<u8>> {
        let salt = env::salt(stanza.env())?;
        let mut writer = ObjectWriter::new(stanza.keys(), stanza.scope(), ObjectKind::Root, salt, CONTEXT);
        let head = Head {
            root_hash: root_hash.to_vec(),
            usage: Some(usage),
            root: Some(root),
            segments: self.segments.len() as u32,
        };
        writer.message(KeyRole::Meta, &head)?;
        for (codec, packed, plain_len) in &self.segments {
            writer.encoded_section(KeyRole::Meta, *codec, packed, *plain_len)?;
        }
        Ok(writer.finish())
    }
}

fn file(root_hash: &[u8]) -> String {
    format!("{PREFIX}{}", hex::encode(root_hash))
}

/// The manifest with this root, or why there is none.
pub fn manifest(stanza: &Stanza, root_hash: &[u8]) -> std::result::Result<Manifest, String> {
    const NONE: &str = "this host's key can write only, and it keeps no copy of the manifest";
    let memory = stanza.memory().ok_or(NONE)?;
    let bytes = memory.kept(stanza, &file(root_hash), MAX_BYTES).ok_or(NONE)?;
    open(stanza, root_hash, &bytes)
        .map_err(|error| format!("this host's key can write only, and its copy of the manifest is of no use: {error}"))
}

fn open(stanza: &Stanza, root_hash: &[u8], bytes: &[u8]) -> Result<Manifest> {
    let what = "the copy";
    let keys = stanza.keys_for(bytes, what)?;
    let mut reader = ObjectReader::new(keys, stanza.scope(), ObjectKind::Root, bytes, CONTEXT, what)?;
    let head: Head = reader.message(KeyRole::Meta)?;
    if head.root_hash != root_hash {
        return Err(FormatError::damaged(what, "it is of another backup").into());
    }
    let mut segments = Vec::new();
    for _ in 0..head.segments {
        segments.push(reader.message(KeyRole::Meta)?);
    }
    reader.end()?;
    Manifest::from_messages(
        head.root.unwrap_or_default(),
        head.usage.unwrap_or_default(),
        segments,
        what,
    )
}

/// Forgets copies that no backup will build on: all but those of the newest backup and of the newest one without a
/// parent, of each cluster.
pub fn forget_others(stanza: &Stanza, state: &proto::Snapshot) {
    let Some(memory) = stanza.memory() else { return };
    let there: HashSet<String> = memory.list_kept(stanza, PREFIX).into_iter().collect();
    let mut needed = HashSet::new();
    let mut seen = HashSet::new();
    for backup in state.backups.iter().rev() {
        let Some(info) = &backup.info else { continue };
        let name = file(&backup.root);
        if !there.contains(&name) {
            continue;
        }
        let is_base = info.parent.is_empty();
        // The newest of its kind, of those that are there.
        let is_newest = seen.insert((info.system_identifier, false));
        let is_newest_base = is_base && seen.insert((info.system_identifier, true));
        if is_newest || is_newest_base {
            needed.insert(name);
        }
    }
    let known: HashSet<String> = state.backups.iter().map(|backup| file(&backup.root)).collect();
    for name in there.difference(&needed) {
        // A backup that is committed just now is not in the log that was read.
        if known.contains(name) || !memory.is_younger(stanza, name, MAY_COME) {
            memory.forget(stanza, name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fairvault_format::keys::Secret;

    use super::*;
    use crate::env::SystemEnv;
    use crate::stanza::memory::Memory;
    use crate::stanza::{Access, create};
    use crate::store::url::RepositoryUrl;

    /// A stanza in a folder, with a memory in it.
    async fn stanza(folder: &std::path::Path) -> Arc<Stanza> {
        let url = RepositoryUrl {
            url: format!("file://{}", folder.join("vault").display()),
            ..Default::default()
        };
        let access = Access {
            repository: url.open(true).unwrap(),
            stanza: "acme".to_owned(),
            secret: Some(Secret::Key([7; 32])),
            memory: Some(Memory::new(folder.join("cache"))),
            may_stretch: true,
            env: Arc::new(SystemEnv),
            trace: Default::default(),
        };
        let cluster = create::Cluster {
            system_identifier: 7,
            major: 15,
            wal_segment_size: 16 << 20,
        };
        let log = create::create_with(&access, cluster, "main", create::DataKeys::Public)
            .await
            .unwrap();
        log.stanza().clone()
    }

    fn draft(path: &str) -> Draft {
        let mut draft = Draft::default();
        draft.add(&ManifestSegment {
            files: vec![proto::FileEntry {
                path: path.to_owned(),
                ..Default::default()
            }],
            ..Default::default()
        });
        draft
    }

    fn backup(root: [u8; 32], parent: &str) -> proto::CommittedBackup {
        proto::CommittedBackup {
            root: root.to_vec(),
            info: Some(proto::BackupInfo {
                parent: parent.to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn a_copy_is_of_one_root_and_whole_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let stanza = stanza(folder.path()).await;
        assert!(manifest(&stanza, &[1; 32]).unwrap_err().contains("keeps no copy"));
        draft("a").keep(&stanza, &[1; 32], Default::default(), Default::default());
        let found = manifest(&stanza, &[1; 32]).unwrap();
        assert_eq!(found.files.len(), 1);
        let place = stanza.memory().unwrap().place(&stanza);
        let path = place.join(file(&[1; 32]));
        // Under another root's name, cut off, and with any byte flipped, it is none.
        let good = std::fs::read(&path).unwrap();
        std::fs::copy(&path, place.join(file(&[2; 32]))).unwrap();
        assert!(manifest(&stanza, &[2; 32]).unwrap_err().contains("of another backup"));
        std::fs::write(&path, &good[..good.len() - 1]).unwrap();
        assert!(manifest(&stanza, &[1; 32]).is_err());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert!(manifest(&stanza, &[1; 32]).is_err(), "byte {at}");
        }
        std::fs::write(&path, &good).unwrap();
        assert!(manifest(&stanza, &[1; 32]).is_ok());
    }

    #[tokio::test]
    async fn what_nothing_will_build_on_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let stanza = stanza(folder.path()).await;
        for root in 1..=6 {
            draft("a").keep(&stanza, &[root; 32], Default::default(), Default::default());
        }
        // 6 was never committed, and 5 was made elsewhere.
        stanza.memory().unwrap().forget(&stanza, &file(&[5; 32]));
        let state = proto::Snapshot {
            backups: vec![
                backup([1; 32], ""),
                backup([2; 32], ""),
                backup([3; 32], "x"),
                backup([4; 32], "x"),
                backup([5; 32], "x"),
            ],
            ..Default::default()
        };
        forget_others(&stanza, &state);
        let mut left = stanza.memory().unwrap().list_kept(&stanza, PREFIX);
        left.sort();
        assert_eq!(left, [file(&[2; 32]), file(&[4; 32]), file(&[6; 32])]);
        // What the log does not name after an hour, it never will.
        let place = stanza.memory().unwrap().place(&stanza);
        let old = std::time::SystemTime::now() - MAY_COME - Duration::from_secs(60);
        let copy = std::fs::File::options().write(true).open(place.join(file(&[6; 32])));
        copy.unwrap().set_modified(old).unwrap();
        forget_others(&stanza, &state);
        assert!(!place.join(file(&[6; 32])).exists() && place.join(file(&[4; 32])).exists());
    }
}
