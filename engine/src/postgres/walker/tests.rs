//! WAL that is made by hand, for what a server does too rarely.

use super::*;

use super::made::{SEGMENT, Wal};

#[test]
fn a_switch_that_crosses_into_the_next_segment_ends_that_one() {
    for left in [8, 16] {
        let mut wal = Wal::new(SEGMENT);
        wal.fill(left);
        let switch = wal.record(rmgr::XLOG, XLOG_SWITCH, 0);
        assert_eq!(switch, 2 * SEGMENT - left);
        wal.pad();
        let next = wal.record(10, 0, 100);
        wal.pad();
        assert_eq!(next, 3 * SEGMENT + LONG_HEADER as u64);

        let mut walker = Walker::new(Lsn(SEGMENT), SEGMENT);
        let mut ends = Vec::new();
        walker.feed(&wal.bytes[..2 * SEGMENT as usize], |r| ends.push((r.lsn.0, r.end.0)));
        assert_eq!(ends.last(), Some(&(switch, 3 * SEGMENT)), "left {left}");
        assert!(walker.stopped().is_none());
        let mut seen = 0;
        walker.feed(&wal.bytes[2 * SEGMENT as usize..], |r| seen = r.lsn.0);
        assert_eq!(seen, next);

        // Seen alone, the middle segment is complete, and the others do not look like it.
        let segments: Vec<_> = wal.bytes.chunks(SEGMENT as usize).collect();
        assert!(begins_with_end_of_switch(segments[1]));
        let mut alone = Walker::new(Lsn(2 * SEGMENT), SEGMENT);
        let mut records = 0;
        alone.feed(&wal.bytes[SEGMENT as usize..], |_| records += 1);
        assert_eq!(records, 1, "that of the segment after");
        assert!(alone.stopped().is_some_and(|stop| stop.at.0 > next));
        assert!(!begins_with_end_of_switch(segments[0]) && !begins_with_end_of_switch(segments[2]));
    }
}

#[test]
fn the_end_of_another_record_that_looks_like_a_switch_ends_nothing() {
    // The last bytes of a record's data, as the end of a switch has them: position, info, rmgr, unused, CRC.
    for tail in [
        [&[0xEE; 8][..], &[0x40, 0, 0, 0, 1, 2, 3, 4]].concat(),
        vec![0x4F, 0, 0, 0, 1, 2, 3, 4],
    ] {
        let mut wal = Wal::new(SEGMENT);
        let length = RECORD_HEADER + 5 + 91;
        wal.fill((length - tail.len()) as u64);
        let crossing = wal.record_with(10, 0, &[&vec![0xEE; 91 - tail.len()][..], &tail].concat());
        assert_eq!(wal.bytes.len(), SEGMENT as usize + LONG_HEADER + tail.len());
        let next = wal.record(10, 0, 100);
        let last = wal.record(10, 0, 20_000);
        wal.pad();
        let second = &wal.bytes[SEGMENT as usize..];
        assert!(!begins_with_end_of_switch(second), "{tail:?}");
        let (mut alone, mut seen) = (Walker::new(Lsn(2 * SEGMENT), SEGMENT), Vec::new());
        alone.feed(second, |r| seen.push(r.lsn.0));
        assert_eq!(seen, [next, last]);
        let (mut all, mut count) = (Walker::new(Lsn(SEGMENT), SEGMENT), 0);
        all.feed(&wal.bytes, |r| count += usize::from(r.lsn.0 >= crossing));
        assert_eq!(count, 3);
    }
}

#[test]
fn a_switch_at_the_very_end_of_a_segment_ends_it() {
    let mut wal = Wal::new(SEGMENT);
    wal.fill(RECORD_HEADER as u64);
    wal.record(rmgr::XLOG, XLOG_SWITCH, 0);
    let mut end = 0;
    let mut walker = Walker::new(Lsn(SEGMENT), SEGMENT);
    walker.feed(&wal.bytes, |r| end = r.end.0);
    assert_eq!(end, 2 * SEGMENT);
}

#[test]
fn a_record_that_was_never_finished_is_overwritten() {
    let mut wal = Wal::new(SEGMENT);
    wal.record(10, 0, 8000);
    let page_end = wal.bytes.len().next_multiple_of(WAL_PAGE);
    // As after a crash: the rest of the page holds the beginning of a record that is not continued.
    let broken = wal.position();
    wal.bytes.extend_from_slice(&20_000u32.to_le_bytes());
    wal.bytes.resize(page_end, 0xAB);
    let at = wal.bytes.len();
    let last = wal.prev;
    wal.page_header(0);
    wal.bytes[at + 2] |= OVERWRITE_CONTRECORD as u8;
    wal.prev = last;
    let next = wal.record(10, 0, 100);
    wal.bytes.resize(wal.bytes.len().next_multiple_of(WAL_PAGE), 0);
    let mut walker = Walker::new(Lsn(SEGMENT), SEGMENT);
    let mut seen = Vec::new();
    walker.feed(&wal.bytes, |r| seen.push(r.lsn.0));
    assert_eq!(seen, [last, next]);
    assert!(broken < next && walker.last_record() == Some(Lsn(next)));
}

/// What an extension writes has the layout of every record: its blocks are known, whatever it means.
#[test]
fn records_of_extensions_are_taken_apart() {
    let mut body = vec![
        // Block 7: main fork, an image of 8192 bytes without hole that is applied, and 3 bytes of data.
        7, 0x30, 3, 0, 0x00, 0x20, 0, 0, 2,
    ];
    for n in [1663u32, 5, 16384, 77] {
        body.extend_from_slice(&n.to_le_bytes());
    }
    // Block 32: of the same relation; initialised by replay, no data.
    body.extend_from_slice(&[32, 0x80 | 0x40, 0, 0]);
    body.extend_from_slice(&78u32.to_le_bytes());
    // Origin, top-level transaction, main data.
    body.extend_from_slice(&[253, 9, 0]);
    body.extend_from_slice(&[252, 1, 2, 3, 4]);
    body.extend_from_slice(&[255, 4]);
    body.extend_from_slice(&[0xAA; 8192 + 3]);
    body.extend_from_slice(b"main");
    let mut wal = Wal::new(SEGMENT);
    let known = wal.record(10, 0, 10);
    let custom = wal.record_of(128, 0x10, &body);
    let last = wal.record_of(255, 0xF0, &body);
    wal.pad();
    let mut seen = Vec::new();
    Walker::new(Lsn(SEGMENT), SEGMENT).feed(&wal.bytes, |record| {
        let decoded = record.decode().expect("it can be taken apart");
        assert!(record.event().is_none());
        seen.push((record.lsn.0, record.rmgr, decoded.blocks, decoded.main.to_vec()));
    });
    let block = |block, has_image| BlockRef {
        tablespace: 1663,
        database: 5,
        relation: 16384,
        fork: 0,
        block,
        has_image,
        restores_whole: true,
    };
    let blocks = vec![block(77, true), block(78, false)];
    assert_eq!(seen.len(), 3);
    assert_eq!(seen[0].0, known);
    assert_eq!(seen[1], (custom, 128, blocks.clone(), b"main".to_vec()));
    assert_eq!(seen[2], (last, 255, blocks, b"main".to_vec()));
}
