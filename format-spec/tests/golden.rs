//! Golden vectors: bytes that every version must read. The files are never regenerated; a missing one is
//! written only when `FAIRVAULT_WRITE_VECTORS` is set, for a new kind of object.

use std::path::PathBuf;

use fairvault_format::erased::ErasedNote;
use fairvault_format::frame::{FRAME_HEADER_LEN, FrameKey};
use fairvault_format::header::{HEADER_LEN, Kind, ObjectHeader};
use fairvault_format::index::{IndexEntry, IndexRun, PackRef, open_run, seal_run};
use fairvault_format::keys::{self, EpochKeys, KeyRole, Scope, Secret};
use fairvault_format::log::{Signers, open_entry, seal_entry};
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

/// A page with these items.
fn page(items: &[&[u8]], special: usize) -> Vec<u8> {
    let mut page = vec![0u8; 8192];
    let mut upper = 8192 - special;
    for (number, item) in items.iter().enumerate() {
        upper -= item.len().next_multiple_of(8);
        page[upper..upper + item.len()].copy_from_slice(item);
        let pointer = upper as u32 | 1 << 15 | (item.len() as u32) << 17;
        page[24 + 4 * number..28 + 4 * number].copy_from_slice(&pointer.to_le_bytes());
    }
    let lower = 24 + 4 * items.len();
    for (at, value) in [(0, 7), (12, lower), (14, upper), (16, 8192 - special), (18, 8196)] {
        page[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
    page[8192 - special..].fill(3);
    page
}

/// A heap tuple of block 9 at line pointer `number`.
fn tuple(number: u8, offset: u8, body: &[u8]) -> Vec<u8> {
    let mut tuple = vec![
        number, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, number, 0, 3, 0, 1, 8, offset,
    ];
    tuple.resize(offset.into(), 0x55);
    tuple.extend(body);
    tuple
}

/// Pages of every kind, and a tail.
fn pages_chunk() -> Vec<u8> {
    let tuples = [
        tuple(1, 24, b"twelve bytes"),
        tuple(2, 32, b"with a null bitmap, and longer than what becomes columns"),
        tuple(3, 24, b""),
        tuple(4, 48, b"a bitmap of several words"),
    ];
    let tuples: Vec<&[u8]> = tuples.iter().map(Vec::as_slice).collect();
    let mut chunk = page(&tuples, 0);
    let mut left = page(&tuples[..2], 0);
    left[4000] = 1;
    chunk.extend(left);
    chunk.extend(page(
        &[
            b"\0\0\x01\0\x02\0\x10\0keyvalue",
            b"\0\0\x01\0\x03\0\x10\0keyvaluf",
            b"short",
        ],
        16,
    ));
    chunk.extend([0; 8192]);
    chunk.extend((0..8192u32).map(|i| (i * i % 251) as u8));
    chunk.extend(b"a tail");
    chunk
}

#[test]
fn pages() {
    let (keys, chunk) = (epoch_keys(), pages_chunk());
    let header = ObjectHeader::new(Kind::Pack, 1, [18; 32]);
    let key = FrameKey::new(&keys, &SCOPE, &header).unwrap();
    let plan = Encoder::default().propose(&chunk, 2, 1);
    let (mut transformed, mut frame) = (Vec::new(), vec![0; FRAME_HEADER_LEN]);
    assert_eq!(Encoder::default().encode(&chunk, &plan, &mut transformed), 3);
    frame.extend(zstd::bulk::compress(&transformed, 1).unwrap());
    key.seal(0, codec::PAGES, chunk.len() as u32, &mut frame);
    let stored = vector("frame-pages", &frame);
    assert_eq!(key.open(0, &stored, "vector").unwrap(), chunk);
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
fn wal_segment() {
    let keys = epoch_keys();
    let context = names::wal_file(0x1234, 1, "000000010000000000000001", 1);
    let header = proto::WalHeader {
        name: "000000010000000000000001".into(),
        timeline: 1,
        ..Default::default()
    };
    let content = vec![0xABu8; 10_000];
    let made = wal::seal_wal(&keys, &SCOPE, Kind::WalSegment, [15; 32], &context, header, &content, 3).unwrap();
    let stored = vector("wal-segment", &made);
    let (found, plain) = wal::open_wal(&keys, &SCOPE, Kind::WalSegment, &stored, &context).unwrap();
    assert_eq!((found.timeline, plain), (1, content));
    let elsewhere = names::wal_file(0x1234, 1, "000000010000000000000002", 1);
    assert!(
        wal::open_wal(&keys, &SCOPE, Kind::WalSegment, &stored, &elsewhere).is_err(),
        "under another name"
    );
}

/// The block map of a segment that begins and ends in the middle of a record: blocks, a relation that was cut, one that
/// was made, a shared one, and a database that was copied. The engine makes it of WAL (its `track::segment` tests).
fn segment_map() -> proto::SegmentMap {
    let of = |tablespace, database, relation, limit: Option<u32>, blocks: &[u32]| proto::RelationChanges {
        tablespace,
        database,
        relation,
        is_cut: limit.is_some(),
        limit: limit.unwrap_or_default(),
        blocks: blocks.to_vec(),
    };
    proto::SegmentMap {
        parser_version: 2,
        server_major: 15,
        changes: Some(proto::BlockChanges {
            relations: vec![
                // Blocks 0, 1, 300 and 131079, which is in the second file.
                of(1663, 5, 16384, None, &[0, 1, 299, 130_779]),
                of(1663, 5, 16385, Some(7), &[2]),
                of(1663, 5, 16386, Some(0), &[0]),
                of(1664, 0, 1262, None, &[3]),
            ],
            databases: vec![proto::DatabaseChange {
                tablespace: 1663,
                database: 6,
            }],
            unknown: String::new(),
        }),
        first_previous: 0x1FFFD8,
        last_record: 0x200258,
        // Of a record that names block 9, from the block's number on; and of one that has 49 bytes.
        head: vec![9, 0, 0, 0, 254, 3, 0, 0, 0, 0xEE, 0xEE, 0xEE],
        tail: [49u64.to_le_bytes(), 0x200258u64.to_le_bytes()].concat(),
        drops_unfinished: false,
    }
}

/// Its bytes, by hand, field by field.
const SEGMENT_MAP: &str = concat!(
    // parser_version, server_major, and how long changes are
    "0802100f1a48",
    // 1663/5/16384
    "0a1208ff0c1005188080013207",
    "0001ab02dbfd07",
    // 1663/5/16385, cut at 7
    "0a1008ff0c10051881800120012807320102",
    // 1663/5/16386, made
    "0a0e08ff0c1005188280012001320100",
    // 1664/0/1262
    "0a0908800d18ee09320103",
    // database 1663/6
    "120508ff0c1006",
    // first_previous, last_record
    "20d8ff7f28d8848001",
    // head
    "320c09000000fe03000000eeeeee",
    // tail
    "3a1031000000000000005802200000000000",
);

/// What a segment of 1 MiB says of itself, and its context.
fn segment_header(number: u64, summary: proto::WalSummary) -> (proto::WalHeader, String) {
    let name = format!("0000000100000000{number:08X}");
    let context = names::wal_file(0x1234, 1, &name, 1);
    let header = proto::WalHeader {
        name,
        system_identifier: 0x1234,
        timeline: 1,
        start_lsn: number << 20,
        end_lsn: (number + 1) << 20,
        segment_size: 1 << 20,
        summary: Some(summary),
        ..Default::default()
    };
    (header, context)
}

#[test]
fn wal_map() {
    let (keys, map) = (epoch_keys(), segment_map());
    assert_eq!(hex::encode(map.encode_to_vec()), SEGMENT_MAP);
    let bytes = hex::decode(SEGMENT_MAP).unwrap();
    assert_eq!(proto::SegmentMap::decode(bytes.as_slice()).unwrap(), map);
    let summary = proto::WalSummary {
        first_record: 0x200038,
        next_record: 0x2FFFF0,
        records: 11,
        unfinished: true,
        parser_version: 2,
        map: Some(map),
        ..Default::default()
    };
    let (header, context) = segment_header(2, summary.clone());
    let content = vec![0xABu8; 1 << 20];
    let made = wal::seal_wal(&keys, &SCOPE, Kind::WalSegment, [28; 32], &context, header, &content, 3).unwrap();
    let stored = vector("wal-map", &made);
    let found = wal::open_header(&keys, &SCOPE, Kind::WalSegment, &stored, &context).unwrap();
    assert_eq!(found.summary, Some(summary));
    // A host that only writes reads it as well.
    let planned = wal::open_header(&keys.write_only(), &SCOPE, Kind::WalSegment, &stored, &context).unwrap();
    assert_eq!(planned, found);
    let (_, plain) = wal::open_wal(&keys, &SCOPE, Kind::WalSegment, &stored, &context).unwrap();
    assert!(plain == content);
}

/// Pieces that are a segment, with a map of which nothing can be known: the next segment, after a crash.
#[test]
fn piece_seal() {
    let keys = epoch_keys();
    let summary = proto::WalSummary {
        first_record: 0x300028,
        next_record: 0x400000,
        records: 2,
        parser_version: 2,
        map: Some(proto::SegmentMap {
            parser_version: 2,
            server_major: 15,
            changes: Some(proto::BlockChanges {
                relations: vec![proto::RelationChanges {
                    tablespace: 1663,
                    database: 5,
                    relation: 16384,
                    blocks: vec![5],
                    ..Default::default()
                }],
                databases: Vec::new(),
                unknown: "the record at 0/300060 (resource manager 30, info 00) is not understood".into(),
            }),
            first_previous: 0x200258,
            last_record: 0x300060,
            drops_unfinished: true,
            ..Default::default()
        }),
        ..Default::default()
    };
    let (header, context) = segment_header(3, summary);
    let piece = |start: u64, end: u64| format!("{start:016X}-{end:016X}.0001");
    let seal = proto::PieceSeal {
        header: Some(proto::WalHeader {
            content_id: keys.chunk_id(&vec![0xCD; 1 << 20]).to_vec(),
            content_len: 1 << 20,
            ..header
        }),
        pieces: vec![piece(0x300000, 0x380000), piece(0x380000, 0x400000)],
    };
    let made = seal_message(&keys, &SCOPE, Kind::PieceSeal, [29; 32], &context, &seal).unwrap();
    let stored = vector("piece-seal", &made);
    let found: proto::PieceSeal = open_message(&keys, &SCOPE, Kind::PieceSeal, &stored, &context, "vector").unwrap();
    assert_eq!(found, seal);
    assert!(
        open_message::<proto::PieceSeal>(&keys, &SCOPE, Kind::WalSegment, &stored, &context, "vector").is_err(),
        "a segment"
    );
}

/// A page of WAL at the beginning of a segment, with records of several classes, an image, and one that goes on.
fn wal_pages(start: u64) -> Vec<u8> {
    let mut wal: Vec<u8> = Vec::new();
    let mut previous = start - 48;
    let header = |wal: &[u8], flags: u8, remaining: usize| {
        let mut header = vec![0x10, 0xD1, 4 | flags, 0, 1, 0, 0, 0];
        header.extend((start + wal.len() as u64).to_le_bytes());
        header.extend((remaining as u64).to_le_bytes());
        header
    };
    wal.extend(header(&wal, 2, 0));
    wal.extend([1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 0, 0x20, 0, 0]);
    let insert = |number: u8, text: &[u8]| {
        let mut body = vec![
            0,
            0x20,
            text.len() as u8,
            0,
            127,
            6,
            0,
            0,
            5,
            0,
            0,
            0,
            1,
            64,
            0,
            0,
            number / 8,
            0,
            0,
            0,
            255,
            3,
        ];
        body.extend(text);
        body.extend([number % 8, 0, 8]);
        (10, 0x00, body)
    };
    let mut records: Vec<(u8, u8, Vec<u8>)> = (0..80).map(|number| insert(number, b"of one length")).collect();
    records.extend((0..24).map(|number| {
        insert(
            number,
            &b"of many lengths, some longer than what becomes columns of bytes"[..20 + number as usize],
        )
    }));
    records.push((1, 0x00, vec![255, 8, 1, 2, 3, 4, 5, 6, 7, 8]));
    // An image with a hole, and one that is compressed.
    let page = page(&[&tuple(1, 24, &[7; 1400]), &tuple(2, 24, b"")], 0);
    let (lower, upper) = (32usize, 8192 - 1424 - 24);
    let image = [&page[..lower], &page[upper..]].concat();
    let head = |len: usize, flags: u8| {
        let mut head = vec![0, 0x10, 0, 0, len as u8, (len >> 8) as u8, lower as u8, 0, flags];
        head.extend(if flags & 0x1C == 0 { vec![] } else { vec![9, 0] });
        head.extend([127, 6, 0, 0, 5, 0, 0, 0, 1, 64, 0, 0, 3, 0, 0, 0]);
        head
    };
    records.push((0, 0xB0, [head(image.len(), 3), image].concat()));
    records.push((0, 0xB0, [head(1100, 7), vec![0x42; 1100]].concat()));
    records.push((200, 0x70, b"nobody knows what this is".to_vec()));
    for (rmid, info, body) in records {
        let lsn = start + wal.len() as u64;
        let mut record = (24 + body.len() as u32).to_le_bytes().to_vec();
        record.extend(700u32.to_le_bytes());
        record.extend(previous.to_le_bytes());
        record.extend([info, rmid, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &record);
        record.extend(crc.to_le_bytes());
        record.extend(body);
        let here = record.len().min(8192 - wal.len() % 8192);
        wal.extend(&record[..here]);
        if here < record.len() {
            wal.extend(header(&wal, 1, record.len() - here));
            wal.extend(&record[here..]);
        }
        wal.resize(wal.len().next_multiple_of(8), 0);
        previous = lsn;
    }
    wal.extend(b"the end");
    wal.resize(3 * 8192, 0);
    wal
}

#[test]
fn wal_records() {
    let keys = epoch_keys();
    let start = 1 << 24;
    let context = names::wal_file(0x1234, 1, "000000010000000000000001", 1);
    let header = proto::WalHeader {
        name: "000000010000000000000001".into(),
        timeline: 1,
        start_lsn: start,
        ..Default::default()
    };
    let content = wal_pages(start);
    let records = wal::Compression {
        level: 3,
        records: true,
    };
    let made = wal::seal_wal(
        &keys,
        &SCOPE,
        Kind::WalSegment,
        [19; 32],
        &context,
        header,
        &content,
        records,
    )
    .unwrap();
    let stored = vector("wal-records", &made);
    let first = ObjectReader::new(&keys, &SCOPE, Kind::WalSegment, &stored, &context, "vector").unwrap();
    let second = first.next_section_end().unwrap();
    assert_eq!(stored[second + 1], codec::RECORDS);
    let (_, plain) = wal::open_wal(&keys, &SCOPE, Kind::WalSegment, &stored, &context).unwrap();
    assert!(plain == content);
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

/// Keys of an epoch with a public key for content.
fn public_epoch_keys() -> EpochKeys {
    EpochKeys {
        data_key: None,
        data_private_key: Some([6; 32]),
        ..epoch_keys()
    }
}

/// What a host has of them that writes only: no secret from which anything opens that was sealed.
#[test]
fn write_only_slot() {
    let (keys, secret) = (public_epoch_keys(), Secret::Key([9; 32]));
    let seal = |keys: &EpochKeys, name: &str, salt| {
        keys::seal_slot(&SCOPE, keys, name, Some(&secret), keys::default_argon2(), salt, 7).unwrap()
    };
    let stored = vector("slot-write-only", &seal(&keys.write_only(), "host", [20; 32]));
    let slot = keys::decode_slot(&stored, "vector").unwrap();
    assert!(slot.write_only);
    let opened = keys::open_slot(&slot, Some(&secret), "vector").unwrap();
    assert!(!opened.can_read() && opened.has_public_key());
    let bundle = opened.to_bundle();
    let mut expected = keys.to_bundle();
    // Nothing of the bundle but what a writer needs; and no private half hides in another field.
    expected.data_private_key.clear();
    expected.operator_seed.clear();
    assert_eq!(bundle, expected);
    let whole = opened.encode().to_vec();
    for private in [[6u8; 32], [5; 32]] {
        assert!(!whole.windows(32).any(|part| part == private), "a private key is in it");
    }
    let full = vector("slot-public-key-epoch", &seal(&keys, "main", [21; 32]));
    let slot = keys::decode_slot(&full, "vector").unwrap();
    assert!(!slot.write_only);
    let opened = keys::open_slot(&slot, Some(&secret), "vector").unwrap();
    assert!(opened.can_read());
    assert_eq!(opened.encode(), keys.encode());
    // What it says of itself is authenticated.
    let mut claimed = slot.clone();
    claimed.write_only = true;
    assert!(keys::open_slot(&claimed, Some(&secret), "vector").is_err());
}

#[test]
fn pack_for_a_public_key() {
    let (keys, plain) = (public_epoch_keys(), b"hello, vault".to_vec());
    let host = keys.write_only();
    let fresh = Fresh::new([22; 32], [23; 32]);
    let (header, key) = FrameKey::of_new_pack(&host, &SCOPE, fresh).unwrap();
    let mut buffer = vec![0u8; FRAME_HEADER_LEN];
    buffer.extend_from_slice(&plain);
    key.seal(0, codec::RAW, plain.len() as u32, &mut buffer);
    let entry = DirectoryEntry {
        id: keys.chunk_id(&plain),
        stored_len: buffer.len() as u32,
        plain_len: plain.len() as u32,
    };
    let mut made = header.encode().to_vec();
    made.extend_from_slice(&buffer);
    made.extend_from_slice(&seal_tail(&host, &SCOPE, &header, &[entry]).unwrap());
    let stored = vector("pack-public-key", &made);
    assert_eq!(stored, made, "the same randomness makes the same object");
    assert_eq!(stored[12], 1);
    // The host reads the directory, which is metadata, and not the frame.
    let (found, entries) = open_pack(&host, &SCOPE, &stored, "vector").unwrap();
    assert_eq!((found, &entries), (header, &vec![entry]));
    let refused = FrameKey::new(&host, &SCOPE, &found).map(|_| ()).unwrap_err();
    assert!(matches!(refused, FormatError::WriteOnly { .. }), "{refused}");
    let frame = &stored[HEADER_LEN..HEADER_LEN + entry.stored_len as usize];
    let opened = FrameKey::new(&keys, &SCOPE, &found).unwrap().open(0, frame, "vector");
    assert_eq!(opened.unwrap(), plain);
    // Another private key opens nothing, and nobody takes a symmetric object for one of this epoch.
    let stranger = EpochKeys {
        data_private_key: Some([60; 32]),
        ..public_epoch_keys()
    };
    let opened = FrameKey::new(&stranger, &SCOPE, &found)
        .unwrap()
        .open(0, frame, "vector");
    assert!(matches!(opened, Err(FormatError::DoesNotOpen { .. })));
    let symmetric = ObjectHeader::new(Kind::Pack, 1, [22; 32]);
    assert!(FrameKey::new(&keys, &SCOPE, &symmetric).is_err());
    // Without randomness of its own, nothing is sealed to a public key.
    assert!(FrameKey::of_new_pack(&host, &SCOPE, [22; 32]).is_err());
}

#[test]
fn wal_for_a_public_key() {
    let keys = public_epoch_keys();
    let host = keys.write_only();
    let context = names::wal_file(0x1234, 2, "00000002.history", 1);
    let content = b"1\t0/5000000\tno recovery target specified\n".to_vec();
    let header = proto::WalHeader {
        name: "00000002.history".into(),
        timeline: 2,
        history: content.clone(),
        ..Default::default()
    };
    let fresh = Fresh::new([24; 32], [25; 32]);
    let made = wal::seal_wal(&host, &SCOPE, Kind::WalSide, fresh, &context, header, &content, 3).unwrap();
    let stored = vector("wal-public-key", &made);
    assert_eq!(stored[12], 1);
    let found = wal::open_header(&host, &SCOPE, Kind::WalSide, &stored, &context).unwrap();
    assert_eq!(
        (found.history, found.content_id),
        (content.clone(), host.chunk_id(&content).to_vec())
    );
    let refused = wal::open_wal(&host, &SCOPE, Kind::WalSide, &stored, &context).unwrap_err();
    assert!(matches!(refused, FormatError::WriteOnly { .. }), "{refused}");
    let (_, plain) = wal::open_wal(&keys, &SCOPE, Kind::WalSide, &stored, &context).unwrap();
    assert_eq!(plain, content);
}

#[test]
fn root_for_a_public_key() {
    let keys = public_epoch_keys();
    let root = proto::Root {
        info: Some(proto::BackupInfo {
            id: "20260101-000000F".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let usage = proto::Usage {
        packs: vec![6; 32],
        live_bytes: vec![50],
    };
    let host = keys.write_only();
    let fresh = Fresh::new([26; 32], [27; 32]);
    let mut writer = ObjectWriter::with_data(&host, &SCOPE, Kind::Root, fresh, "").unwrap();
    writer.message(KeyRole::Meta, &usage).unwrap();
    writer.message(KeyRole::Data, &root).unwrap();
    let stored = vector("root-public-key", &writer.finish());
    let mut reader = ObjectReader::new(&host, &SCOPE, Kind::Root, &stored, "", "vector").unwrap();
    assert_eq!(reader.message::<proto::Usage>(KeyRole::Meta).unwrap(), usage);
    let refused = reader.message::<proto::Root>(KeyRole::Data).unwrap_err();
    assert!(matches!(refused, FormatError::WriteOnly { .. }), "{refused}");
    let mut reader = ObjectReader::new(&keys, &SCOPE, Kind::Root, &stored, "", "vector").unwrap();
    reader.section(KeyRole::Meta).unwrap();
    assert_eq!(reader.message::<proto::Root>(KeyRole::Data).unwrap(), root);
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
