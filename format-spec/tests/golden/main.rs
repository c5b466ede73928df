//! Golden vectors: bytes that every version must read. The files are never regenerated; a missing one is
//! written only when `FAIRVAULT_WRITE_VECTORS` is set, for a new kind of object.

mod of_pages;
mod of_public_keys;
mod of_wal;

use std::path::PathBuf;

use fairvault_format::erased::ErasedNote;
use fairvault_format::frame::{FRAME_HEADER_LEN, FrameKey};
use fairvault_format::header::{HEADER_LEN, Kind, ObjectHeader};
use fairvault_format::index::{IndexEntry, IndexRun, PackRef, open_run, seal_run};
use fairvault_format::keys::{self, EpochKeys, KeyRole, Scope, Secret};
use fairvault_format::log::{Signers, open_entry, seal_entry};
use fairvault_format::manifest::{decode_segment, encode_segment};
use fairvault_format::object::{ObjectReader, ObjectWriter, codec, open_message, seal_message};
use fairvault_format::pack::{DirectoryEntry, open_pack, seal_tail};
use fairvault_format::pages::Encoder;
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use fairvault_format::public::Fresh;
use fairvault_format::repository::Repository;
use fairvault_format::{FormatError, names, sha256, wal};
use prost::Message;

const SCOPE: Scope = Scope {
    repository: [0x11; 16],
    stanza: [0x22; 16],
};

fn epoch_keys() -> EpochKeys {
    EpochKeys {
        epoch: 1,
        data_key: Some([1; 32]),
        data_private_key: None,
        id_key: [2; 32],
        meta_key: [3; 32],
        writer_seed: Some([4; 32]),
        operator_seed: Some([5; 32]),
        public_keys: Default::default(),
    }
}

/// The stored vector; `made` is written if there is none yet and that was asked for.
fn vector(name: &str, made: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("vectors/v1").join(name);
    if !path.exists() && std::env::var_os("FAIRVAULT_WRITE_VECTORS").is_some() {
        std::fs::write(&path, made).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn header() {
    let header = ObjectHeader::new(Kind::Pack, 1, [7; 32]);
    let stored = vector("header", &header.encode());
    assert_eq!(stored, header.encode());
    assert_eq!(ObjectHeader::decode(&stored, "vector").unwrap(), header);
}

#[test]
fn repository() {
    let repository = Repository::new([0x11; 16]);
    let stored = vector("fairvault.json", &repository.encode());
    assert_eq!(Repository::decode(&stored).unwrap(), repository);
}

#[test]
fn pack() {
    let keys = epoch_keys();
    let header = ObjectHeader::new(Kind::Pack, 1, [8; 32]);
    let key = FrameKey::new(&keys, &SCOPE, &header).unwrap();
    let chunks: [Vec<u8>; 2] = [b"a chunk that is stored raw".to_vec(), vec![9u8; 4096]];
    let mut made = header.encode().to_vec();
    let mut entries = Vec::new();
    for (ordinal, chunk) in chunks.iter().enumerate() {
        let (codec, body) = fairvault_format::object::compress(chunk, 3);
        assert_eq!(codec, if ordinal == 0 { codec::RAW } else { codec::ZSTD });
        let mut frame = vec![0; FRAME_HEADER_LEN];
        frame.extend(body);
        key.seal(ordinal as u32, codec, chunk.len() as u32, &mut frame);
        entries.push(DirectoryEntry {
            id: keys.chunk_id(chunk),
            stored_len: frame.len() as u32,
            plain_len: chunk.len() as u32,
        });
        made.extend(frame);
    }
    made.extend(seal_tail(&keys, &SCOPE, &header, &entries).unwrap());
    let stored = vector("pack", &made);
    let (found, directory) = open_pack(&keys, &SCOPE, &stored, "vector").unwrap();
    assert_eq!(found, header);
    let mut at = HEADER_LEN;
    for (ordinal, (chunk, entry)) in chunks.iter().zip(&directory).enumerate() {
        let frame = &stored[at..at + entry.stored_len as usize];
        assert_eq!(&key.open(ordinal as u32, frame, "vector").unwrap(), chunk);
        assert!(
            key.open(ordinal as u32 + 1, frame, "vector").is_err(),
            "a frame at another place"
        );
        assert_eq!(entry.id, keys.chunk_id(chunk));
        at += entry.stored_len as usize;
    }
}

#[test]
fn index_run() {
    let keys = epoch_keys();
    let header = ObjectHeader::new(Kind::Pack, 1, [8; 32]);
    let run = IndexRun {
        packs: vec![PackRef { name: [6; 32], header }],
        entries: vec![IndexEntry {
            id: [1; 32],
            pack: 0,
            ordinal: 0,
            offset: 80,
            stored_len: 50,
        }],
    };
    let stored = vector("index-run", &seal_run(&keys, &SCOPE, [10; 32], run.clone()).unwrap());
    assert_eq!(open_run(&keys, &SCOPE, &stored, "vector").unwrap(), run);
}

#[test]
fn root() {
    let keys = epoch_keys();
    let root = proto::Root {
        info: Some(proto::BackupInfo {
            id: "20261122-120000F".into(),
            start_lsn: 1 << 24,
            ..Default::default()
        }),
        ..Default::default()
    };
    let usage = proto::Usage {
        packs: vec![6; 32],
        live_bytes: vec![50],
    };
    let mut writer = ObjectWriter::new(&keys, &SCOPE, Kind::Root, [11; 32], "");
    writer.message(KeyRole::Meta, &usage).unwrap();
    writer.message(KeyRole::Data, &root).unwrap();
    let stored = vector("root", &writer.finish());
    let mut reader = ObjectReader::new(&keys, &SCOPE, Kind::Root, &stored, "", "vector").unwrap();
    assert_eq!(reader.message::<proto::Usage>(KeyRole::Meta).unwrap(), usage);
    assert_eq!(reader.message::<proto::Root>(KeyRole::Data).unwrap(), root);
    reader.end().unwrap();
}

/// A file of three runs, of which one is in a frame of its own, and one that follows on them.
#[test]
fn relative_columns() {
    let file = |path: &str, size: u64, extents: &[(u64, u32, u32, u32)]| proto::FileEntry {
        path: path.to_owned(),
        size,
        extents: Some(proto::Extents {
            file_offset: extents.iter().map(|extent| extent.0).collect(),
            len: extents.iter().map(|extent| extent.1).collect(),
            frame: extents.iter().map(|extent| extent.2).collect(),
            frame_offset: extents.iter().map(|extent| extent.3).collect(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let segment = proto::ManifestSegment {
        pack_names: vec![vec![6; 32], vec![7; 32]],
        frames: Some(proto::FrameTable {
            ids: [[1; 32], [2; 32], [3; 32]].concat(),
            pack: vec![0, 0, 1],
            ordinal: vec![0, 1, 9],
            offset: vec![80, 380, 5000],
            stored_len: vec![300, 200, 100],
            plain_len: vec![24576, 8192, 8192],
            ..Default::default()
        }),
        files: vec![
            file(
                "a",
                24576,
                &[(0, 8192, 0, 0), (8192, 8192, 2, 0), (16384, 8192, 0, 16384)],
            ),
            file("b", 16384, &[(8192, 8192, 1, 0)]),
        ],
    };
    let stored = vector("manifest-segment", &encode_segment(segment.clone()));
    assert_eq!(decode_segment(&stored, "vector").unwrap(), segment);
    let stored = proto::ManifestSegment::decode(stored.as_slice()).unwrap();
    let extents: Vec<_> = stored.files.iter().filter_map(|file| file.extents.as_ref()).collect();
    assert!(extents[0].file_offset.is_empty() && extents[1].file_offset == [8192]);
    assert_eq!(
        (&extents[0].frame_step, &extents[1].frame_step),
        (&vec![0, 1, -3], &vec![0])
    );
    let frames = stored.frames.unwrap();
    assert_eq!(
        (frames.ordinal_step, frames.offset_step),
        (vec![0, 0, 7], vec![80, 0, 4420])
    );
}

#[test]
fn log_entries() {
    let keys = epoch_keys();
    let bundle = keys.to_bundle();
    let genesis = proto::LogEntry {
        seq: 1,
        previous: vec![0; 32],
        time_us: 1_800_000_000_000_000,
        nonce: vec![1; 16],
        host: "host".into(),
        kind: Some(Entry::Genesis(proto::Genesis {
            repository_id: SCOPE.repository.to_vec(),
            stanza_id: SCOPE.stanza.to_vec(),
            stanza: "acme".into(),
            encrypted: true,
            key_epoch: Some(proto::KeyEpoch {
                epoch: 1,
                writer_public_key: bundle.writer_public_key.clone(),
                operator_public_key: bundle.operator_public_key.clone(),
                ..Default::default()
            }),
            ..Default::default()
        })),
        ..Default::default()
    };
    let first = vector("log-1-genesis", &seal_entry(&keys, &SCOPE, [12; 32], &genesis).unwrap());
    assert_eq!(
        open_entry(&keys, &SCOPE, &first, 1, &[0; 32], &Signers::default()).unwrap(),
        genesis
    );
    let mut signers = Signers::default();
    if let Some(Entry::Genesis(g)) = &genesis.kind {
        signers.add(g.key_epoch.as_ref().unwrap());
    }
    let begin = proto::LogEntry {
        seq: 2,
        previous: sha256(&first).to_vec(),
        kind: Some(Entry::Begin(proto::Begin {
            session: vec![3; 16],
            what: "backup".into(),
            ..Default::default()
        })),
        ..Default::default()
    };
    let second = vector("log-2-begin", &seal_entry(&keys, &SCOPE, [13; 32], &begin).unwrap());
    assert_eq!(
        open_entry(&keys, &SCOPE, &second, 2, &sha256(&first), &signers).unwrap(),
        begin
    );
    assert!(
        open_entry(&keys, &SCOPE, &second, 2, &[0; 32], &signers).is_err(),
        "a broken chain"
    );
    assert!(
        open_entry(&keys, &SCOPE, &second, 2, &sha256(&first), &Signers::default()).is_err(),
        "a stranger's"
    );
    // A writer may not say what only the operator may.
    let writer_only = EpochKeys {
        operator_seed: None,
        ..epoch_keys()
    };
    let expired = proto::LogEntry {
        kind: Some(Entry::Expired(proto::Expired::default())),
        ..begin
    };
    assert!(seal_entry(&writer_only, &SCOPE, [14; 32], &expired).is_err());
}

#[test]
fn slots() {
    let keys = epoch_keys();
    let cheap = proto::Argon2Params {
        memory_kib: 64,
        passes: 1,
        lanes: 1,
    };
    let secrets = [
        ("slot-unsealed", None),
        ("slot-key", Some(Secret::Key([21; 32]))),
        ("slot-passphrase", Some(Secret::Passphrase(b"correct horse".to_vec()))),
    ];
    for (name, secret) in secrets {
        let made = keys::seal_slot(&SCOPE, &keys, "main", secret.as_ref(), cheap, [16; 32], 1).unwrap();
        let slot = keys::decode_slot(&vector(name, &made), name).unwrap();
        assert_eq!(keys::slot_scope(&slot), SCOPE);
        let opened = keys::open_slot(&slot, secret.as_ref(), name).unwrap();
        assert_eq!(*opened.encode(), *keys.encode());
        if secret.is_some() {
            assert!(keys::open_slot(&slot, Some(&Secret::Key([99; 32])), name).is_err());
        }
    }
}

#[test]
fn newer_repositories_are_unsupported_not_damaged() {
    let keys = epoch_keys();
    let good = std::fs::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("vectors/v1/index-run")).unwrap();
    for (at, value) in [(4, 2u8), (5, 77), (6, 1), (12, 9), (81, 5), (81, 2), (81, 3)] {
        let mut newer = good.clone();
        newer[at] = value;
        let error = open_run(&keys, &SCOPE, &newer, "object").unwrap_err();
        assert!(
            matches!(error, fairvault_format::FormatError::Unsupported { .. }),
            "byte {at}: {error}"
        );
    }
    for json in [
        "{\"format\":\"fairvault\",\"version\":2}",
        "{\"format\":\"fairvault\",\"version\":1,\"repository\":\"00\",\"features\":[\"x\"]}",
    ] {
        let error = Repository::decode(json.as_bytes()).unwrap_err();
        assert!(
            matches!(error, fairvault_format::FormatError::Unsupported { .. }),
            "{error}"
        );
    }
}

#[test]
fn erased_note() {
    let erased = proto::Erased {
        seq: 9,
        time_us: 1_800_000_000_000_000,
        host: "host".into(),
        user: "user".into(),
        reason: "why".into(),
    };
    let stored = vector("erased", &ErasedNote::new(&erased).encode());
    // The reason is the log's alone.
    let noted = proto::Erased {
        reason: String::new(),
        ..erased
    };
    assert_eq!(ErasedNote::decode(&stored, "vector").unwrap().erased(), noted);
    let newer = String::from_utf8(stored)
        .unwrap()
        .replace("\"version\": 1", "\"version\": 2");
    let refused = ErasedNote::decode(newer.as_bytes(), "vector").unwrap_err();
    assert!(matches!(refused, FormatError::Unsupported { .. }), "{refused}");
}

#[test]
fn an_object_of_a_mode_that_its_epoch_does_not_have_is_damaged() {
    let symmetric = EpochKeys {
        data_private_key: None,
        data_key: Some([5; 32]),
        public_keys: Default::default(),
        ..epoch_keys()
    };
    let with_public_key = EpochKeys {
        data_key: None,
        data_private_key: Some([6; 32]),
        ..symmetric.clone()
    };
    let fresh = || Fresh::new([1; 32], [2; 32]);
    let (header, _) = with_public_key.seal_data(&SCOPE, Kind::Pack, fresh()).unwrap();
    for keys in [symmetric.clone(), symmetric.write_only()] {
        let refused = keys.object_key(&SCOPE, &header, KeyRole::Data).err().unwrap();
        assert!(matches!(refused, FormatError::Damaged { .. }), "{refused}");
    }
    let refused = with_public_key
        .write_only()
        .object_key(&SCOPE, &header, KeyRole::Data)
        .err()
        .unwrap();
    assert!(matches!(refused, FormatError::WriteOnly { .. }), "{refused}");
}
