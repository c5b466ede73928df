//! Runs come back, whatever they are; what claims to be a transformed run is not believed.

use super::*;
use crate::error::FormatError;

/// Numbers that look random, always the same.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn bytes(&mut self, len: usize, values: u64) -> Vec<u8> {
        (0..len).map(|_| self.below(values) as u8).collect()
    }
}

/// WAL as a server writes it, from the beginning of a segment at `start`.
struct Wal {
    start: u64,
    bytes: Vec<u8>,
    magic: u16,
    previous: u64,
    xid: u32,
}

impl Wal {
    fn new(start: u64, magic: u16) -> Self {
        Self {
            start,
            bytes: Vec::new(),
            magic,
            previous: start.wrapping_sub(100),
            xid: 700,
        }
    }

    fn lsn(&self) -> u64 {
        self.start.wrapping_add(self.bytes.len() as u64)
    }

    /// A page header, where one belongs.
    fn begin_page(&mut self, remaining: usize, flags: u8) {
        if in_page(self.lsn()) > 0 {
            return;
        }
        let is_long = self.bytes.is_empty();
        let lsn = self.lsn();
        self.bytes.extend(self.magic.to_le_bytes());
        self.bytes.extend([
            4 | flags | u8::from(remaining > 0) | if is_long { flag::LONG } else { 0 },
            0,
        ]);
        self.bytes.extend(1u32.to_le_bytes());
        self.bytes.extend(lsn.to_le_bytes());
        self.bytes.extend((remaining as u32).to_le_bytes());
        self.bytes.extend([0; 4]);
        if is_long {
            self.bytes.extend(0x1234_5678_9abc_def0u64.to_le_bytes());
            self.bytes.extend((16u32 << 20).to_le_bytes());
            self.bytes.extend((PAGE as u32).to_le_bytes());
        }
    }

    /// A record with this behind its header.
    fn record(&mut self, rmid: u8, info: u8, body: &[u8]) {
        self.begin_page(0, 0);
        let lsn = self.lsn();
        let mut record = ((RECORD_HEADER + body.len()) as u32).to_le_bytes().to_vec();
        record.extend(self.xid.to_le_bytes());
        record.extend(self.previous.to_le_bytes());
        record.extend([info, rmid, 0, 0, 0, 0, 0, 0]);
        record.extend(body);
        let crc = record_crc(&record);
        record[20..24].copy_from_slice(&crc.to_le_bytes());
        let mut rest = &record[..];
        while !rest.is_empty() {
            self.begin_page(rest.len(), 0);
            let (here, behind) = rest.split_at(rest.len().min(PAGE - in_page(self.lsn())));
            self.bytes.extend(here);
            rest = behind;
        }
        while !self.lsn().is_multiple_of(8) {
            self.bytes.push(0);
        }
        self.previous = lsn;
    }

    /// Records as of a mixed load.
    fn load(&mut self, numbers: &mut Numbers, count: usize) {
        for _ in 0..count {
            match numbers.below(10) {
                0 => {
                    self.xid += 1;
                    let main = numbers.bytes(8, 3);
                    self.record(1, 0, &[&[255, 8][..], &main].concat());
                }
                1 => {
                    let len = numbers.below(600) as usize;
                    let main = numbers.bytes(len, 200);
                    let main = [&[254][..], &(len as u32).to_le_bytes(), &main].concat();
                    self.record(10, 0x20, &main);
                }
                2 => {
                    // An origin, a toplevel transaction, two blocks of which the second is of the same relation.
                    let (first, second) = (numbers.bytes(20, 9), numbers.bytes(4, 9));
                    let mut body = vec![253, 1, 0, 252, 7, 0, 0, 0];
                    body.extend(self.block(0, 0x20, first.len(), numbers));
                    body.extend([1, 0xA0, 4, 0, 3, 0, 0, 0, 255, 6]);
                    body.extend([&first[..], &second, b"main .."].concat());
                    body.pop();
                    self.record(11, 0x10, &body);
                }
                3 => self.image(numbers),
                4 => {
                    let junk = numbers.bytes(40, 256);
                    self.record(200, 0x30, &junk);
                }
                _ => {
                    let len = 20 + numbers.below(4) as usize * numbers.below(50) as usize;
                    let tuple = numbers.bytes(len, 30);
                    let mut body = self.block(0, 0x20, tuple.len(), numbers);
                    body.extend([255, 3]);
                    body.extend(tuple);
                    body.extend([numbers.below(99) as u8, 0, 8]);
                    self.record(10, 0, &body);
                }
            }
        }
    }

    fn block(&self, id: u8, flags: u8, len: usize, numbers: &mut Numbers) -> Vec<u8> {
        let mut block = vec![id, flags, len as u8, (len >> 8) as u8];
        block.extend([0x7f, 6, 0, 0, 5, 0, 0, 0, numbers.below(3) as u8, 64, 0, 0]);
        block.extend((numbers.below(1000) as u32).to_le_bytes());
        block
    }

    /// A full-page image, of whichever kind, and perhaps data of its block.
    fn image(&mut self, numbers: &mut Numbers) {
        let kind = numbers.below(4);
        let data = if numbers.below(3) == 0 { 30 } else { 0 };
        let page = page(numbers);
        let (lower, upper) = (u16_at(&page, 12), u16_at(&page, 14));
        let compressed = if self.magic >= 0xD110 { 4 } else { 2 };
        let (image, hole, flags) = match kind {
            0 => (page.clone(), 0, 0),
            1 => (numbers.bytes(1500, 256), lower, 1 | compressed),
            _ => ([&page[..lower], &page[upper..]].concat(), lower, 1),
        };
        let mut body = vec![0, 0x10 | if data > 0 { 0x20 } else { 0 }, data as u8, 0];
        body.extend((image.len() as u16).to_le_bytes());
        body.extend((hole as u16).to_le_bytes());
        body.push(flags);
        if kind == 1 {
            body.extend([9, 0]);
        }
        body.extend([0x7f, 6, 0, 0, 5, 0, 0, 0, 1, 64, 0, 0, 8, 0, 0, 0]);
        if kind == 3 {
            body.extend([255, 2]);
        }
        body.extend(image);
        body.extend(numbers.bytes(data, 9));
        if kind == 3 {
            body.extend([1, 2]);
        }
        self.record(if kind == 3 { 10 } else { 0 }, 0xB0, &body);
    }
}

/// A heap page with a few tuples.
fn page(numbers: &mut Numbers) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    let (mut lower, mut upper) = (24, PAGE);
    for number in 1..=numbers.below(100) as u16 {
        upper -= 64;
        page[upper..upper + 24].copy_from_slice(&[
            1,
            2,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            8,
            0,
            number as u8,
            0,
            2,
            0,
            0,
            8,
            24,
            0,
        ]);
        let body = numbers.bytes(40, 20);
        page[upper + 24..upper + 64].copy_from_slice(&body);
        let pointer = upper as u32 | 1 << 15 | 64 << 17;
        page[lower..lower + 4].copy_from_slice(&pointer.to_le_bytes());
        lower += 4;
    }
    for (at, value) in [(12, lower), (14, upper), (16, PAGE), (18, PAGE | 4)] {
        page[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
    page
}

fn decode(transformed: &[u8], len: usize) -> crate::error::Result<Vec<u8>> {
    // What is in the buffer must not matter.
    let mut run = vec![0xee; len];
    Decoder::default().decode(transformed, &mut run, "x").map(|()| run)
}

/// Fails unless a run comes back; returns how many records were found in it.
fn comes_back(encoder: &mut Encoder, run: &[u8], start: u64) -> usize {
    let mut out = Vec::new();
    let count = encoder.encode(run, start, &mut out);
    if count > 0 {
        assert!(decode(&out, run.len()).unwrap() == run, "{count} records at {start}");
    }
    count
}

fn wal(seed: u64, start: u64, magic: u16, count: usize) -> Wal {
    let mut wal = Wal::new(start, magic);
    wal.load(&mut Numbers(seed), count);
    wal
}

#[test]
fn wal_of_all_kinds_comes_back() {
    let mut encoder = Encoder::default();
    for (round, magic) in [0xD10D, 0xD110, 0xD113, 0xD116, 0xD118, 0xD122].into_iter().enumerate() {
        for count in [1, 5, 40, 900] {
            let wal = wal(round as u64, 16 << 20, magic, count);
            assert_eq!(comes_back(&mut encoder, &wal.bytes, wal.start), count);
        }
    }
}

#[test]
fn a_run_that_begins_and_ends_anywhere_comes_back() {
    let (mut encoder, mut numbers) = (Encoder::default(), Numbers(7));
    let wal = wal(3, 16 << 20, 0xD110, 600);
    for _ in 0..300 {
        let from = numbers.below(wal.bytes.len() as u64) as usize;
        let to = from + numbers.below((wal.bytes.len() - from) as u64) as usize;
        let (run, start) = (&wal.bytes[from..to], wal.start + from as u64);
        let found = comes_back(&mut encoder, run, start);
        // From the second page on there are records, unless one is longer than that.
        if run.len() > 10 * PAGE && start.is_multiple_of(8) {
            assert!(found > 0, "none of {} bytes from {from}", run.len());
        }
        // As if it was from somewhere else.
        comes_back(&mut encoder, run, numbers.below(1 << 40));
    }
    assert!(comes_back(&mut encoder, &wal.bytes[3 * PAGE..], wal.start + 3 * PAGE as u64) > 100);
}

#[test]
fn unused_rest_of_a_segment_costs_nothing() {
    let mut wal = wal(4, 16 << 20, 0xD110, 30);
    let mut encoder = Encoder::default();
    let mut short = Vec::new();
    assert_eq!(encoder.encode(&wal.bytes, wal.start, &mut short), 30);
    wal.record(0, 0x40, &[]);
    wal.bytes.resize(1 << 20, 0);
    let mut long = Vec::new();
    assert_eq!(encoder.encode(&wal.bytes, wal.start, &mut long), 31);
    assert!(long.len() < short.len() + 60, "{} and {}", long.len(), short.len());
    assert!(decode(&long, wal.bytes.len()).unwrap() == wal.bytes);
}

#[test]
fn damaged_wal_comes_back() {
    let (mut encoder, mut numbers) = (Encoder::default(), Numbers(8));
    let wal = wal(5, 1 << 30, 0xD116, 120);
    for _ in 0..2000 {
        let mut bytes = wal.bytes.clone();
        for _ in 0..=numbers.below(3) {
            let at = numbers.below(bytes.len() as u64) as usize;
            // Mostly where page headers are.
            let at = if numbers.below(3) == 0 {
                at
            } else {
                at / PAGE * PAGE + at % 48
            };
            if let Some(byte) = bytes.get_mut(at) {
                *byte = numbers.below(256) as u8;
            }
        }
        comes_back(&mut encoder, &bytes, wal.start);
    }
}

#[test]
fn garbage_comes_back() {
    let (mut encoder, mut numbers) = (Encoder::default(), Numbers(9));
    for len in [0, 1, 7, 24, 40, 100, PAGE, 3 * PAGE + 5] {
        let bytes = numbers.bytes(len, 256);
        assert_eq!(comes_back(&mut encoder, &bytes, 0), 0);
        assert_eq!(comes_back(&mut encoder, &vec![0; len], u64::MAX - 7), 0);
    }
    // Records whose inside is garbage, but whose CRC is right.
    let mut wal = Wal::new(u64::MAX << 24, 0xD118);
    for round in 0..2000 {
        let len = numbers.below(if round % 50 == 0 { 20_000 } else { 90 }) as usize;
        let values = if round % 2 == 0 { 256 } else { 34 };
        let body = numbers.bytes(len, values);
        let rmid = numbers.below(3) as u8;
        wal.record(rmid, 0, &body);
    }
    assert_eq!(comes_back(&mut encoder, &wal.bytes, wal.start), 2000);
}

#[test]
fn what_does_not_look_as_expected_in_page_headers_is_kept() {
    let mut wal = wal(6, 16 << 20, 0xD110, 300);
    // Timeline, BKP_REMOVABLE and padding of single pages; a long header in the middle is no page that follows.
    wal.bytes[PAGE + 4] = 9;
    wal.bytes[2 * PAGE + 2] ^= 4;
    wal.bytes[3 * PAGE + 20] = 7;
    wal.bytes[4 * PAGE + 16] ^= 0x55;
    assert_eq!(comes_back(&mut Encoder::default(), &wal.bytes, wal.start), 300);
}

#[test]
fn a_hostile_input_is_an_error() {
    let mut numbers = Numbers(10);
    let wal = wal(7, 16 << 20, 0xD110, 150);
    let mut good = Vec::new();
    Encoder::default().encode(&wal.bytes, wal.start, &mut good);
    for len in (0..good.len()).step_by(7) {
        assert!(decode(&good[..len], wal.bytes.len()).is_err(), "{len}");
    }
    let mut long = good.clone();
    long.push(0);
    assert!(decode(&long, wal.bytes.len()).is_err());
    for other in [0, 1, wal.bytes.len() / 2, wal.bytes.len() - 9] {
        assert!(decode(&good, other).is_err(), "into {other} bytes");
    }
    let mut newer = good.clone();
    newer[0] = 2;
    assert!(matches!(
        decode(&newer, wal.bytes.len()),
        Err(FormatError::Unsupported { .. })
    ));
    for round in 0..20_000 {
        let mut bad = good.clone();
        for _ in 0..=numbers.below(4) {
            let most = if round % 2 == 0 { 2000 } else { bad.len() as u64 };
            let at = numbers.below(most) as usize;
            bad[at] = numbers.below(256) as u8;
        }
        if let Ok(run) = decode(&bad, wal.bytes.len()) {
            assert_eq!(run.len(), wal.bytes.len());
        }
    }
}

#[test]
fn only_what_comes_back_is_given_out() {
    let wal = wal(8, 16 << 20, 0xD110, 50);
    let mut checked = Checked::default();
    let transformed = checked.transform(&wal.bytes, wal.start).map(<[u8]>::to_vec);
    assert!(decode(&transformed.unwrap(), wal.bytes.len()).unwrap() == wal.bytes);
    assert!(checked.transform(b"no WAL", 8).is_none());
}
