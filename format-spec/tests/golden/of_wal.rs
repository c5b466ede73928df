//! WAL: segments, their block maps, seals of pieces, and records that were taken apart.

use super::*;
use crate::of_pages::{page, tuple};

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
