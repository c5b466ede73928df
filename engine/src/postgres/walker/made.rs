//! WAL that is made by hand, for tests.

use super::*;

/// Bytes of its segments.
pub(crate) const SEGMENT: u64 = 1 << 20;

/// A writer of WAL in memory, from the start of a segment.
pub(crate) struct Wal {
    pub start: u64,
    pub bytes: Vec<u8>,
    /// Where the last record began.
    pub prev: u64,
}

impl Wal {
    pub fn new(start: u64) -> Self {
        Self {
            start,
            bytes: Vec::new(),
            prev: 0,
        }
    }

    pub fn position(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    pub fn page_header(&mut self, remaining: usize) {
        let at = self.position();
        let long = at.is_multiple_of(SEGMENT);
        let info = if long { LONG } else { 0 } | if remaining > 0 { CONTRECORD } else { 0 };
        let mut header = Vec::new();
        header.extend_from_slice(&0xD110u16.to_le_bytes());
        header.extend_from_slice(&info.to_le_bytes());
        header.extend_from_slice(&1u32.to_le_bytes());
        header.extend_from_slice(&at.to_le_bytes());
        header.extend_from_slice(&(remaining as u32).to_le_bytes());
        header.resize(SHORT_HEADER, 0);
        if long {
            header.extend_from_slice(&7u64.to_le_bytes());
            header.extend_from_slice(&(SEGMENT as u32).to_le_bytes());
            header.extend_from_slice(&(WAL_PAGE as u32).to_le_bytes());
        }
        self.bytes.extend(header);
    }

    /// Bytes of a record, with page headers in between; returns where it began.
    pub fn put(&mut self, record: &[u8]) -> u64 {
        if self.position().is_multiple_of(WAL_PAGE as u64) {
            self.page_header(0);
        }
        let lsn = self.position();
        for (written, byte) in record.iter().enumerate() {
            if self.position().is_multiple_of(WAL_PAGE as u64) {
                self.page_header(record.len() - written);
            }
            self.bytes.push(*byte);
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        lsn
    }

    pub fn record(&mut self, rmgr: u8, info: u8, main: usize) -> u64 {
        self.record_with(rmgr, info, &vec![0xEE; main])
    }

    pub fn record_with(&mut self, rmgr: u8, info: u8, main: &[u8]) -> u64 {
        let mut body = Vec::new();
        if !main.is_empty() {
            body.push(254);
            body.extend_from_slice(&(main.len() as u32).to_le_bytes());
            body.extend_from_slice(main);
        }
        self.record_of(rmgr, info, &body)
    }

    /// A record with this after its header.
    pub fn record_of(&mut self, rmgr: u8, info: u8, body: &[u8]) -> u64 {
        let mut record = Vec::new();
        record.extend_from_slice(&((RECORD_HEADER + body.len()) as u32).to_le_bytes());
        record.extend_from_slice(&0u32.to_le_bytes());
        record.extend_from_slice(&self.prev.to_le_bytes());
        record.extend_from_slice(&[info, rmgr, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &record);
        record.extend_from_slice(&crc.to_le_bytes());
        record.extend(body);
        self.prev = self.put(&record);
        self.prev
    }

    /// Records up to `left` bytes before the end of the first segment.
    pub fn fill(&mut self, left: u64) {
        let end = self.start + SEGMENT - left;
        while end - self.position() > 4096 {
            self.record(10, 0, 1000);
        }
        // The last one fits exactly: header, tag and length, data; a page header may come in between.
        let mut need = (end - self.position()) as usize;
        if self.position() / WAL_PAGE as u64 != (end - 1) / WAL_PAGE as u64 {
            need -= SHORT_HEADER;
        }
        self.record(10, 0, need - RECORD_HEADER - 5);
        assert_eq!(self.position(), end);
    }

    pub fn pad(&mut self) {
        let len = self.bytes.len().next_multiple_of(SEGMENT as usize);
        self.bytes.resize(len, 0);
    }
}
