#![no_main]
//! WAL pages and records: pages of any content, and records of any content with right headers, lengths and CRCs, which lie
//! across pages and segments and may be overwritten before they end.
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::postgres::walker::Walker;
use fairvault_engine::wal::summary::{Summarizer, summarize};
use libfuzzer_sys::fuzz_target;

const PAGE: usize = 8192;
const SEGMENT: u64 = 1 << 20;
/// The last pages of a segment and the first ones of the next.
const START: u64 = 16 * SEGMENT - 4 * PAGE as u64;
/// Of the versions 14 to 19.
const MAGIC: [u16; 6] = [0xD10D, 0xD110, 0xD113, 0xD116, 0xD118, 0xD122];

const CONTRECORD: u16 = 1;
const LONG: u16 = 2;
const OVERWRITE: u16 = 8;

fuzz_target!(|data: &[u8]| {
    let [version, how, data @ ..] = data else { return };
    let magic = MAGIC[usize::from(*version) % MAGIC.len()];
    let (start, content, written) = match how % 2 {
        0 => (16 * SEGMENT, pages(magic, 16 * SEGMENT, data), None),
        _ => {
            let (content, written) = Records::of(magic, data);
            (START, content, written)
        }
    };
    let mut seen = Vec::new();
    let mut walker = Walker::new(Lsn(start), SEGMENT);
    walker.feed(&content, |record| {
        let _ = record.decode();
        let _ = record.event();
        seen.push(record.lsn);
    });
    // What a server writes is seen, all of it, unless something in it ends the WAL or the segment.
    if let Some(written) = written {
        let len = seen.len().min(written.len());
        assert_eq!(seen[..len], written[..len]);
        let is_over = walker.stopped().is_some();
        assert!(is_over || seen.len() == written.len(), "{seen:?} {written:?}");
    }
    // In any cut, the same.
    let mut cut = Summarizer::new(Lsn(start), SEGMENT);
    for part in content.chunks(usize::from(*how) * 97 + 1) {
        cut.feed(part);
    }
    assert_eq!(cut.finish(), summarize(&content, Lsn(start), SEGMENT));
});

/// Content with right page headers, and the first record's CRC.
fn pages(magic: u16, start: u64, data: &[u8]) -> Vec<u8> {
    let mut content = data.to_vec();
    content.resize(content.len().next_multiple_of(PAGE).max(PAGE), 0);
    for (number, page) in content.chunks_exact_mut(PAGE).enumerate() {
        page[..2].copy_from_slice(&magic.to_le_bytes());
        page[8..16].copy_from_slice(&(start + (number * PAGE) as u64).to_le_bytes());
    }
    let at = if content[2] & 2 != 0 { 40 } else { 24 };
    let len = u32::from_le_bytes([content[at], content[at + 1], content[at + 2], content[at + 3]]) as usize;
    if (24..PAGE - at).contains(&len) {
        let crc = crc(&content[at..at + len]);
        content[at + 20..at + 24].copy_from_slice(&crc.to_le_bytes());
    }
    content
}

/// Records one after the other, as a server writes them.
struct Records {
    magic: u16,
    bytes: Vec<u8>,
    prev: u64,
    /// Where those begin that are complete.
    written: Vec<Lsn>,
    /// Behind a switch, the rest of a segment counts for nothing.
    has_switch: bool,
}

impl Records {
    /// Each four bytes of the input say what a record is, and what follows is its body.
    fn of(magic: u16, mut data: &[u8]) -> (Vec<u8>, Option<Vec<Lsn>>) {
        let mut this = Self {
            magic,
            bytes: Vec::new(),
            prev: 0,
            written: Vec::new(),
            has_switch: false,
        };
        while let [rmgr, info, low, high, rest @ ..] = data {
            let len = usize::from(*low) | usize::from(high & 0x3F) << 8;
            let (body, rest) = rest.split_at(rest.len().min(len));
            data = rest;
            this.record(*rmgr, *info, body, len, high & 0xC0 == 0xC0);
            if this.bytes.len() > 8 * PAGE {
                break;
            }
        }
        this.bytes.resize(this.bytes.len().next_multiple_of(PAGE).max(PAGE), 0);
        (this.bytes, (!this.has_switch).then_some(this.written))
    }

    /// One that `is_cut` ends with its first page, and the next page says so.
    fn record(&mut self, rmgr: u8, info: u8, body: &[u8], len: usize, is_cut: bool) {
        if self.bytes.len().is_multiple_of(PAGE) {
            self.header(0, 0);
        }
        let at = START + self.bytes.len() as u64;
        let mut record = Vec::with_capacity(24 + len);
        record.extend_from_slice(&(24 + len as u32).to_le_bytes());
        record.extend_from_slice(&7u32.to_le_bytes());
        record.extend_from_slice(&self.prev.to_le_bytes());
        record.extend_from_slice(&[info, rmgr, 0, 0, 0, 0, 0, 0]);
        record.extend_from_slice(body);
        record.resize(24 + len, 0);
        let crc = crc(&record);
        record[20..24].copy_from_slice(&crc.to_le_bytes());
        for (written, byte) in record.iter().enumerate() {
            if self.bytes.len().is_multiple_of(PAGE) {
                if is_cut {
                    self.header(OVERWRITE, 0);
                    return;
                }
                self.header(CONTRECORD, record.len() - written);
            }
            self.bytes.push(*byte);
        }
        self.prev = at;
        self.written.push(Lsn(at));
        self.has_switch |= rmgr == 0 && info & 0xF0 == 0x40;
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }

    fn header(&mut self, info: u16, remaining: usize) {
        let at = START + self.bytes.len() as u64;
        let long = at.is_multiple_of(SEGMENT);
        self.bytes.extend_from_slice(&self.magic.to_le_bytes());
        self.bytes
            .extend_from_slice(&(info | if long { LONG } else { 0 }).to_le_bytes());
        self.bytes.extend_from_slice(&1u32.to_le_bytes());
        self.bytes.extend_from_slice(&at.to_le_bytes());
        self.bytes.extend_from_slice(&(remaining as u32).to_le_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        if long {
            self.bytes.extend_from_slice(&7u64.to_le_bytes());
            self.bytes.extend_from_slice(&(SEGMENT as u32).to_le_bytes());
            self.bytes.extend_from_slice(&(PAGE as u32).to_le_bytes());
        }
    }
}

fn crc(record: &[u8]) -> u32 {
    let mut sum = !0u32;
    for &byte in record[24..].iter().chain(&record[..20]) {
        sum ^= u32::from(byte);
        for _ in 0..8 {
            sum = if sum & 1 != 0 { sum >> 1 ^ 0x82F6_3B78 } else { sum >> 1 };
        }
    }
    !sum
}
