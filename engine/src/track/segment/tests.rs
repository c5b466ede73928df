//! Chains of segments that are made by hand: what holds together, and what does not.

use fairvault_format::header::Kind;
use fairvault_format::keys::{EpochKeys, Scope};
use fairvault_format::names;
use fairvault_format::proto::WalSummary;
use fairvault_format::wal::open_header;

use super::*;
use crate::postgres::walker::made::{SEGMENT, Wal};
use crate::postgres::walker::{OVERWRITE_CONTRECORD, WAL_PAGE, rmgr};
use crate::track::map::Changes;
use crate::wal::summary::Summarizer;

const ID: RelationId = RelationId {
    tablespace: 1663,
    database: 5,
    relation: 16384,
};

/// What a record that names a block of [`ID`] has behind its header, with so much main data.
fn naming(block: u32, main: usize) -> Vec<u8> {
    let mut body = vec![0, 0, 0, 0];
    for number in [ID.tablespace, ID.database, ID.relation, block] {
        body.extend_from_slice(&number.to_le_bytes());
    }
    body.push(254);
    body.extend_from_slice(&(main as u32).to_le_bytes());
    body.resize(body.len() + main, 0xEE);
    body
}

const HEAP: u8 = 10;

/// The summaries of its segments, each made alone.
fn summaries(wal: &Wal) -> Vec<WalSummary> {
    let one = |(number, content): (usize, &[u8])| {
        let mut summarizer = Summarizer::new(Lsn(wal.start + number as u64 * SEGMENT), SEGMENT);
        summarizer.feed(content);
        summarizer.finish_with_map()
    };
    wal.bytes.chunks(SEGMENT as usize).enumerate().map(one).collect()
}

/// What a chain of segments makes of them, up to `to`.
fn chain<'a>(segments: impl IntoIterator<Item = &'a WalSummary>, to: u64) -> Result<Chain, String> {
    let mut chain = Chain::default();
    for segment in segments {
        chain.push(segment, Lsn(to))?;
    }
    Ok(chain)
}

/// Three segments; block 1 is named in the first, block 2 by a record that goes on through all of the second, block 3
/// in the third.
fn over_three(last_length: usize) -> Wal {
    let mut wal = Wal::new(SEGMENT);
    wal.record_of(HEAP, 0, &naming(1, 100));
    wal.fill(3000);
    wal.record_of(HEAP, 0, &naming(9, last_length));
    wal.record_of(HEAP, 0, &naming(2, SEGMENT as usize + 200_000));
    wal.record_of(HEAP, 0, &naming(3, 10));
    wal.pad();
    wal
}

#[test]
fn a_record_may_go_on_through_a_whole_segment() {
    let wal = over_three(500);
    let (all, to) = (summaries(&wal), wal.prev);
    assert_eq!(all.len(), 3);
    assert!(all[0].unfinished && all[1].first_record == 0 && all[2].first_record != 0);
    // Of its parts alone, nobody knows what it changes.
    let two = chain(&all[..2], to).expect("so far it holds");
    assert!(!two.is_complete(Lsn(3 * SEGMENT), Lsn(to)) && two.open.is_some());
    assert!(
        two.is_complete(Lsn(3 * SEGMENT), Lsn(all[0].next_record)),
        "up to where it begins, all is known"
    );
    let whole = chain(&all, to).expect("it holds");
    assert!(whole.is_complete(Lsn(4 * SEGMENT), Lsn(to)));
    assert!(
        !whole.is_complete(Lsn(4 * SEGMENT), Lsn(4 * SEGMENT + 1)),
        "what comes later is not known"
    );
    let map = whole.finish();
    assert!(map.unknown().is_none());
    for block in [1, 2, 3, 9] {
        assert!(map.has(ID, block), "{block}");
    }
    assert!(!map.has(ID, 4));
    // Whoever made any of them is known, although it said nothing but that a record goes on.
    let mut kept = all;
    for (segment, version) in kept.iter_mut().zip([7, 8, 9]) {
        segment.map.get_or_insert_default().parser_version = version;
    }
    let map = chain(&kept, to).expect("it holds").finish();
    assert!(map.parsers().eq([7, 8, 9]));
}

#[test]
fn segments_that_do_not_follow_each_other_are_an_error() {
    let wal = over_three(500);
    let (all, to) = (summaries(&wal), wal.prev);
    for order in [vec![0, 2], vec![0, 0], vec![0, 1, 1, 2], vec![0, 1, 2, 0]] {
        let picked = order.iter().map(|&number| &all[number]);
        // Where a part of the record is missing, or there twice, it is not whole.
        let chained = chain(picked, to);
        assert!(chained.is_err(), "{order:?}");
    }
    // The rest of a record that did not begin.
    let mut plain = Wal::new(SEGMENT);
    plain.record_of(HEAP, 0, &naming(1, 100));
    plain.fill(0);
    plain.record_of(HEAP, 0, &naming(2, 100));
    plain.pad();
    let complete = summaries(&plain);
    assert!(chain(&complete, plain.prev).is_ok());
    let error = chain([&complete[0], &all[1]], to).expect_err("it did not begin");
    assert!(error.contains("did not begin"), "{error}");
}

/// Two histories that parted: the record before the first one of a segment began elsewhere.
#[test]
fn a_segment_of_another_history_is_an_error() {
    let of = |length: usize| {
        let mut wal = Wal::new(SEGMENT);
        wal.record_of(HEAP, 0, &naming(1, length));
        wal.fill(0);
        wal.record_of(HEAP, 0, &naming(2, 100));
        wal.record_of(HEAP, 0, &naming(3, 100));
        wal.pad();
        (summaries(&wal), wal.prev)
    };
    let ((one, to), (other, _)) = (of(100), of(1000));
    assert!(chain(&one, to).is_ok() && chain(&other, to).is_ok());
    let error = chain([&one[0], &other[1]], to).expect_err("it is of another history");
    assert!(error.contains("comes before it"), "{error}");
    // Without a map, or with one that contradicts itself, nothing is known.
    let without = WalSummary {
        map: None,
        ..one[1].clone()
    };
    assert!(chain([&one[0], &without], to).is_err_and(|error| error.contains("no block map")));
    let mut broken = one[1].clone();
    let map = broken.map.get_or_insert_default();
    map.changes.get_or_insert_default().relations[0].blocks = vec![u32::MAX, 2];
    assert!(chain([&one[0], &broken], to).is_err_and(|error| error.contains("out of range")));
    // What cannot be read matters only if it is needed.
    let mut torn = one[1].clone();
    (torn.stopped_at, torn.stopped_why) = (to - 8, "torn".to_owned());
    assert!(chain([&one[0], &torn], to).is_err_and(|error| error.contains("torn")));
    assert!(chain([&one[0], &torn], to - 8).is_ok());
}

/// After a crash, the record that was being written goes on nowhere, and the next segment says so.
#[test]
fn a_record_that_a_crash_cut_off_is_dropped() {
    let mut wal = Wal::new(SEGMENT);
    wal.record_of(HEAP, 0, &naming(1, 100));
    wal.fill(2000);
    let last = wal.prev;
    // It begins here, and is as long as several pages.
    let record = [&20_000u32.to_le_bytes()[..], &[0xAB; 1996]].concat();
    wal.bytes.extend_from_slice(&record);
    let at = wal.bytes.len();
    assert_eq!(at as u64, SEGMENT);
    wal.page_header(0);
    wal.bytes[at + 2] |= OVERWRITE_CONTRECORD as u8;
    wal.prev = last;
    let next = wal.record_of(HEAP, 0, &naming(2, 100));
    wal.record_of(HEAP, 0, &naming(3, 100));
    wal.bytes.resize(wal.bytes.len().next_multiple_of(WAL_PAGE), 0);
    let all = summaries(&wal);
    assert!(all[0].unfinished && all[1].map.as_ref().is_some_and(|map| map.drops_unfinished));
    let chained = chain(&all, next).expect("it holds");
    assert!(chained.is_complete(Lsn(3 * SEGMENT), Lsn(next)));
    let map = chained.finish();
    assert!(map.has(ID, 1) && map.has(ID, 2) && !map.has(ID, 4));
    // Without that word, the record is missing its end.
    let mut silent = all[1].clone();
    silent.map.get_or_insert_default().drops_unfinished = false;
    assert!(chain([&all[0], &silent], next).is_err());
}

/// One record that ends at `end`, which is in the same segment.
fn fill_to(wal: &mut Wal, end: u64) {
    let page = WAL_PAGE as u64;
    let headers = (end - 1) / page - wal.position() / page;
    // Page headers in between have 24 bytes, a record's header has 24, its tag and length 5.
    let main = end - wal.position() - headers * 24 - 24 - 5;
    wal.record(HEAP, 0, main as usize);
    assert_eq!(wal.position(), end);
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Three segments; of the second one, the golden vector `wal-map` has the map.
fn of_the_golden_vector() -> Wal {
    let of = |id: RelationId, block: u32| {
        let mut body = naming(block, 0);
        body[4..16].copy_from_slice(&words(&[id.tablespace, id.database, id.relation]));
        body
    };
    let cut = RelationId { relation: 16385, ..ID };
    let made = RelationId { relation: 16386, ..ID };
    let mut wal = Wal::new(SEGMENT);
    wal.fill(40);
    assert_eq!(wal.record_of(HEAP, 0, &naming(9, 3)), 0x1FFFD8);
    for block in [300, 0, 131_079, 1] {
        wal.record_of(HEAP, 0, &of(ID, block));
    }
    wal.record_with(rmgr::SMGR, 0x11, &words(&[1663, 5, 16386, 0]));
    wal.record_of(HEAP, 0, &of(made, 0));
    wal.record_with(rmgr::SMGR, 0x21, &words(&[7, 1663, 5, 16385, 7]));
    wal.record_of(HEAP, 0, &of(cut, 2));
    let shared = RelationId {
        tablespace: 1664,
        database: 0,
        relation: 1262,
    };
    wal.record_of(HEAP, 0, &of(shared, 3));
    wal.record_with(rmgr::DBASE, 0x01, &words(&[6, 1663, 1, 1663]));
    fill_to(&mut wal, 3 * SEGMENT - 16);
    assert_eq!(wal.record_of(HEAP, 0, &naming(4, 0)), 0x2FFFF0);
    wal.pad();
    wal
}

/// What version 0.1.0 wrote is what this parser makes of the same WAL, and is understood as it was meant.
#[test]
fn the_map_of_the_golden_vector_is_what_its_wal_makes() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../format-spec/vectors/v1/wal-map");
    let stored = std::fs::read(path).expect("the vector is there");
    // As in format-spec/tests/golden/.
    let keys = EpochKeys {
        epoch: 1,
        data_key: Some([1; 32]),
        data_private_key: None,
        id_key: [2; 32],
        meta_key: [3; 32],
        writer_seed: Some([4; 32]),
        operator_seed: Some([5; 32]),
        public_keys: Default::default(),
    };
    let scope = Scope {
        repository: [0x11; 16],
        stanza: [0x22; 16],
    };
    let context = names::wal_file(0x1234, 1, "000000010000000000000002", 1);
    let header = open_header(&keys, &scope, Kind::WalSegment, &stored, &context).expect("the vector opens");
    let golden = header.summary.expect("it has a summary");

    let wal = of_the_golden_vector();
    let (all, to) = (summaries(&wal), wal.prev);
    assert_eq!(all.len(), 3);
    // A later parser makes the same of what is here.
    let mut made = all[1].clone();
    made.parser_version = golden.parser_version;
    made.map.get_or_insert_default().parser_version = 2;
    assert_eq!(made, golden);

    let map = chain([&all[0], &golden, &all[2]], to).expect("it holds").finish();
    assert!(map.unknown().is_none());
    let blocks = |id| map.changes(id).map(|c| c.blocks(0, u32::MAX).collect::<Vec<u32>>());
    let limit = |id| map.changes(id).and_then(Changes::limit);
    let of = |relation| RelationId { relation, ..ID };
    // Blocks 9 and 4 are of records that are in two segments each.
    assert_eq!(blocks(ID), Some(vec![0, 1, 4, 9, 300, 131_079]));
    assert_eq!((blocks(of(16385)), limit(of(16385))), (Some(vec![2]), Some(7)));
    assert_eq!((blocks(of(16386)), limit(of(16386))), (Some(vec![0]), Some(0)));
    let shared = RelationId {
        tablespace: 1664,
        database: 0,
        relation: 1262,
    };
    assert_eq!((blocks(shared), limit(shared), limit(ID)), (Some(vec![3]), None, None));
    assert_eq!(map.relations().count(), 4);
    assert_eq!(map.databases().collect::<Vec<_>>(), [(1663, 6)]);
    // The parser that made it is relied on, unless somebody says otherwise.
    let golden = golden.map.expect("it has a map");
    let distrust = |parser_version| proto::DistrustParser {
        parser_version,
        reason: String::new(),
    };
    assert!(is_usable(&golden, &[]) && is_usable(&golden, &[distrust(1)]));
    assert!(!is_usable(&golden, &[distrust(2)]));
    for parser_version in [0, 1, PARSER_VERSION + 1] {
        let other = SegmentMap {
            parser_version,
            ..golden.clone()
        };
        assert!(!is_usable(&other, &[]), "{parser_version}");
    }
}

/// Differences, limits and doubt: what is kept of a map says the same when it is read.
#[test]
fn a_map_is_read_as_it_was_written() {
    let mut map = BlockMap::default();
    for (relation, limit, blocks) in [
        (1, None, vec![0]),
        (2, None, vec![u32::MAX - 1]),
        (3, Some(0), vec![]),
        (4, Some(9), vec![0, 63, 64, 127, 128, 131_072, u32::MAX - 1]),
    ] {
        let changes = map.relation(RelationId { relation, ..ID });
        blocks.into_iter().for_each(|block| changes.add(block));
        if let Some(limit) = limit {
            changes.limit_to(limit);
        }
    }
    map.database(1663, 6);
    let mut again = BlockMap::default();
    add_message(&mut again, &to_message(&map)).expect("it holds");
    assert_eq!(again, map);
    map.everything("a record is not understood");
    let mut doubted = BlockMap::default();
    add_message(&mut doubted, &to_message(&map)).expect("it holds");
    assert_eq!(doubted, map);
    // Adding to what is known already loses nothing.
    add_message(&mut again, &to_message(&map)).expect("it holds");
    assert_eq!(again, map);
}
