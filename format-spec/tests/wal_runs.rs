//! WAL objects opened run by run, on several threads: the same content, and the same refusals, as at once.

use std::sync::Mutex;

use fairvault_format::error::FormatError;
use fairvault_format::header::{HEADER_LEN, Kind};
use fairvault_format::keys::{EpochKeys, Scope};
use fairvault_format::limits::WAL_SECTION_BYTES as RUN;
use fairvault_format::proto::WalHeader;
use fairvault_format::wal::{Compression, WalSealer, open_wal, open_wal_runs, seal_wal};

const SCOPE: Scope = Scope {
    repository: [1; 16],
    stanza: [2; 16],
};
const NAME: &str = "wal/name";

fn keys() -> EpochKeys {
    EpochKeys {
        epoch: 1,
        data_key: Some([1; 32]),
        data_private_key: None,
        id_key: [2; 32],
        meta_key: [3; 32],
        writer_seed: None,
        operator_seed: None,
        public_keys: Default::default(),
    }
}

fn content(len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

/// Opens and puts together again; `None` if it is not divided as usual.
fn open_divided(bytes: &[u8], threads: usize) -> Result<Option<Vec<u8>>, FormatError> {
    let whole = Mutex::new(Vec::new());
    let take = |_: &WalHeader, start: u64, run: &[u8]| {
        let (mut whole, start) = (whole.lock().unwrap(), start as usize);
        let end = start + run.len();
        if whole.len() < end {
            whole.resize(end, 0);
        }
        whole[start..end].copy_from_slice(run);
        Ok(())
    };
    let (head, mut rest) = bytes.split_at(HEADER_LEN.min(bytes.len()));
    let read = |into: &mut Vec<u8>, len: usize| {
        let (now, later) = rest.split_at(len.min(rest.len()));
        into.extend(now);
        rest = later;
        Ok(())
    };
    let opened = open_wal_runs(
        &keys(),
        &SCOPE,
        Kind::WalSegment,
        head,
        NAME,
        threads,
        read,
        |len| Ok(vec![0; len]),
        take,
    )?;
    Ok(opened.map(|_| whole.into_inner().unwrap()))
}

fn open(bytes: &[u8], threads: usize) -> Result<Vec<u8>, FormatError> {
    Ok(open_divided(bytes, threads)?.expect("divided into runs"))
}

#[test]
fn every_number_of_runs_and_threads_gives_the_content() {
    for len in [
        0,
        1,
        RUN - 1,
        RUN,
        RUN + 1,
        2 * RUN,
        3 * RUN - 7,
        4 * RUN,
        5 * RUN,
        7 * RUN + 1025,
    ] {
        let content = content(len);
        let header = WalHeader::default();
        let bytes = seal_wal(&keys(), &SCOPE, Kind::WalSegment, [9; 32], NAME, header, &content, 1).unwrap();
        for threads in [1, 2, 3, 9] {
            assert!(
                open(&bytes, threads).unwrap() == content,
                "{len} bytes, {threads} threads"
            );
        }
        assert!(open_wal(&keys(), &SCOPE, Kind::WalSegment, &bytes, NAME).unwrap().1 == content);
    }
}

/// Runs that begin where others would, and are none of theirs: longer, or empty.
#[test]
fn runs_that_only_begin_alike_are_read_as_a_whole() {
    let content = content(4 * RUN);
    let keys = keys();
    for lengths in [&[RUN, 3 * RUN][..], &[RUN, RUN, RUN, RUN, 0], &[4 * RUN, 0]] {
        let mut sealer = WalSealer::new(&keys, &SCOPE, Kind::WalSegment, [9; 32], NAME, 0, 1).unwrap();
        let mut rest = &content[..];
        for &len in lengths {
            let (run, behind) = rest.split_at(len);
            sealer.run(run).unwrap();
            rest = behind;
        }
        let header = WalHeader {
            content_id: keys.chunk_id(&content).to_vec(),
            ..Default::default()
        };
        let bytes = sealer.finish(header).unwrap();
        for threads in [1, 3] {
            assert_eq!(open_divided(&bytes, threads).unwrap(), None, "{lengths:?}");
        }
        assert!(open_wal(&keys, &SCOPE, Kind::WalSegment, &bytes, NAME).unwrap().1 == content);
    }
}

#[test]
fn runs_of_another_length_are_read_as_a_whole() {
    let content = content(3 * RUN);
    let keys = keys();
    let mut sealer = WalSealer::new(&keys, &SCOPE, Kind::WalSegment, [9; 32], NAME, 0, 1).unwrap();
    content.chunks(RUN / 3).for_each(|run| sealer.run(run).unwrap());
    let header = WalHeader {
        content_id: keys.chunk_id(&content).to_vec(),
        ..Default::default()
    };
    let bytes = sealer.finish(header).unwrap();
    assert_eq!(open_divided(&bytes, 4).unwrap(), None);
    assert!(open_wal(&keys, &SCOPE, Kind::WalSegment, &bytes, NAME).unwrap().1 == content);
}

#[test]
fn what_does_not_match_its_header_is_refused() {
    let content = content(5 * RUN);
    let (keys, id) = (keys(), keys().chunk_id(&content).to_vec());
    let sealed = |id: Vec<u8>, runs: &[&[u8]]| {
        let mut sealer = WalSealer::new(&keys, &SCOPE, Kind::WalSegment, [9; 32], NAME, 0, 1).unwrap();
        runs.iter().for_each(|run| sealer.run(run).unwrap());
        let header = WalHeader {
            content_id: id,
            ..Default::default()
        };
        sealer.finish(header).unwrap()
    };
    let runs: Vec<_> = content.chunks(RUN).collect();
    assert!(open(&sealed(id.clone(), &runs), 2).unwrap() == content);
    let mut exchanged = runs.clone();
    exchanged.swap(1, 3);
    for (bytes, what) in [
        (sealed(vec![0; 32], &runs), "another id"),
        (sealed(id.clone(), &exchanged), "exchanged runs"),
        (sealed(id.clone(), &runs[..4]), "a run less"),
    ] {
        assert!(open(&bytes, 2).is_err(), "{what}");
    }
    let mut bytes = sealed(id, &runs);
    for len in [80, 90, bytes.len() / 2, bytes.len() - 1] {
        assert!(open(&bytes[..len], 2).is_err(), "cut at {len}");
    }
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    assert!(open(&bytes, 2).is_err(), "a flipped bit");
}

/// WAL from `start` on, of records with 100 bytes that differ a little.
fn records(start: u64, len: usize) -> Vec<u8> {
    let (mut out, mut previous) = (Vec::with_capacity(len), start);
    for number in 0u64.. {
        if out.len() % 8192 == 0 {
            let lsn = start + out.len() as u64;
            out.extend([0x10, 0xD1, 0, 0, 1, 0, 0, 0]);
            out.extend(lsn.to_le_bytes());
            out.extend([0; 8]);
        }
        // What does not fit on the page is one longer record to its end.
        let left = 8192 - out.len() % 8192;
        let body = if left < 2 * 128 { left - 24 } else { 104 };
        let lsn = start + out.len() as u64;
        let mut record = (24 + body as u32).to_le_bytes().to_vec();
        record.extend(700u32.to_le_bytes());
        record.extend(previous.to_le_bytes());
        record.extend([0, 200, 0, 0]);
        let body: Vec<u8> = (0..body as u64)
            .map(|at| (number * number + at * at * 7) as u8)
            .collect();
        let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &record);
        record.extend(crc.to_le_bytes());
        out.extend([record, body].concat());
        previous = lsn;
        if out.len() >= len {
            break;
        }
    }
    out.truncate(len);
    out
}

/// Codecs of the sections behind the first.
fn codecs(bytes: &[u8]) -> Vec<u8> {
    let (mut at, mut all) = (80, Vec::new());
    while at < bytes.len() {
        all.push(bytes[at + 1]);
        at += 16 + u32::from_le_bytes([bytes[at + 4], bytes[at + 5], bytes[at + 6], bytes[at + 7]]) as usize;
    }
    all.split_off(1)
}

#[test]
fn runs_of_records_give_the_content_and_others_are_as_before() {
    let start = 1 << 30;
    let compression = Compression {
        level: 1,
        records: true,
    };
    for (kind, content, expected) in [
        (Kind::WalSegment, records(start, 2 * RUN + 4096), vec![3, 3, 3]),
        (Kind::WalPiece, records(start, 20_000), vec![3]),
        (Kind::WalSide, [records(start, RUN), content(RUN)].concat(), vec![3, 1]),
        (Kind::WalSegment, vec![7; 2 * RUN], vec![1, 1]),
        (
            Kind::WalSide,
            b"1\t0/3000000\tno recovery target specified\n".to_vec(),
            vec![0],
        ),
        (Kind::WalPiece, Vec::new(), vec![]),
    ] {
        let header = WalHeader {
            start_lsn: start,
            ..Default::default()
        };
        let bytes = seal_wal(
            &keys(),
            &SCOPE,
            kind,
            [9; 32],
            NAME,
            header.clone(),
            &content,
            compression,
        )
        .unwrap();
        assert_eq!(codecs(&bytes), expected);
        assert!(open_wal(&keys(), &SCOPE, kind, &bytes, NAME).unwrap().1 == content);
        if kind == Kind::WalSegment {
            assert!(open(&bytes, 3).unwrap() == content);
        }
        // Never larger than without.
        let plain = seal_wal(&keys(), &SCOPE, kind, [9; 32], NAME, header, &content, 1).unwrap();
        assert!(bytes.len() <= plain.len(), "{} and {}", bytes.len(), plain.len());
    }
}
