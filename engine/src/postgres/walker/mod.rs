//! A walker over physical WAL: pages, records, CRCs and prev-links, and the few records that decide where
//! recovery can go (commits, restore points, switches, tablespaces, parameter changes).
//!
//! What always holds: nothing is believed before its CRC; the walker says where and why it stopped; it
//! never skips over what it does not understand. Formats are those of `access/xlogrecord.h`,
//! `access/xlog_internal.h` and `access/xact.h`, 14 to 19.

#[cfg(test)]
pub(crate) mod made;
mod record;
#[cfg(test)]
mod tests;

use super::lsn::Lsn;
use super::version_of_magic;
use record::XLOG_SWITCH;
pub use record::{BlockRef, Decoded, Event, Record, What, rmgr};

/// Size of a WAL page. Servers built with another XLOG_BLCKSZ are refused.
pub const WAL_PAGE: usize = 8192;
const RECORD_HEADER: usize = 24;
const LONG_HEADER: usize = 40;
const SHORT_HEADER: usize = 24;
/// Bytes of a record that are kept: more than any but a logical message has (blocks, subtransactions, dropped
/// relations come first).
const HELD_BYTES: usize = 4 << 20;
/// XLogRecordMaxSize.
const RECORD_MAX: usize = 1020 << 20;

const CONTRECORD: u16 = 1;
const LONG: u16 = 2;
pub(crate) const OVERWRITE_CONTRECORD: u16 = 8;

/// The header of a WAL page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// Major version, by the magic.
    pub major: u32,
    /// Flag bits.
    pub info: u16,
    /// Timeline.
    pub timeline: u32,
    /// LSN of the page.
    pub address: Lsn,
    /// Bytes left of the record that continues here.
    pub remaining: u32,
    /// On the first page of a segment.
    pub long: Option<LongHeader>,
}

/// What the first page of a segment says of its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LongHeader {
    /// System identifier.
    pub system_identifier: u64,
    /// Segment size, bytes.
    pub segment_size: u32,
    /// Page size, bytes.
    pub page_size: u32,
}

impl PageHeader {
    /// Reads a page header.
    pub fn parse(page: &[u8]) -> Result<Self, String> {
        let Some(b) = page.first_chunk::<SHORT_HEADER>() else {
            return Err(format!("{} bytes are no WAL page", page.len()));
        };
        let magic = u16::from_le_bytes([b[0], b[1]]);
        let Some(version) = version_of_magic(magic) else {
            return Err(format!("page magic {magic:04X} is of no known PostgreSQL version"));
        };
        let info = u16::from_le_bytes([b[2], b[3]]);
        let long = match info & LONG != 0 {
            false => None,
            true => {
                let Some(b) = page.first_chunk::<LONG_HEADER>() else {
                    return Err("a cut-off long page header".into());
                };
                Some(LongHeader {
                    system_identifier: u64_at(b, 24),
                    segment_size: u32_at(b, 32),
                    page_size: u32_at(b, 36),
                })
            }
        };
        Ok(Self {
            major: version.major,
            info,
            timeline: u32_at(b, 4),
            address: Lsn(u64_at(b, 8)),
            remaining: u32_at(b, 16),
            long,
        })
    }
}

/// A little-endian number; 0 where there are not enough bytes.
pub(crate) fn u32_at(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4)
        .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

/// Whether a segment, or its beginning, begins with the rest of a record.
pub fn begins_inside_record(segment: &[u8]) -> bool {
    PageHeader::parse(&segment[..segment.len().min(WAL_PAGE)]).is_ok_and(|header| header.info & CONTRECORD != 0)
}

/// Whether the first page of a segment begins with the end of a switch record: then the rest of the segment
/// is empty and the segment is complete. The last bytes of any other record can look like that, so nothing may follow.
pub fn begins_with_end_of_switch(segment: &[u8]) -> bool {
    let page = &segment[..segment.len().min(WAL_PAGE)];
    let Ok(header) = PageHeader::parse(page) else {
        return false;
    };
    // A switch is a bare record header; a cut leaves 16 or 8 bytes of it, with info, rmgr and two unused ones among them.
    let info_at = match header.remaining {
        16 => LONG_HEADER + 8,
        8 => LONG_HEADER,
        _ => return false,
    };
    let end = LONG_HEADER + header.remaining as usize;
    header.info & CONTRECORD != 0
        && header.long.is_some()
        && page.get(info_at).is_some_and(|info| info & 0xF0 == XLOG_SWITCH)
        && page.get(info_at + 1..info_at + 4) == Some(&[rmgr::XLOG, 0, 0])
        && page.len() == WAL_PAGE
        && page[end..].iter().all(|&byte| byte == 0)
}

/// Where and why the walker can go no further.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// The record or page.
    pub at: Lsn,
    /// Why; "end of WAL" reasons and damage look alike.
    pub why: String,
}

/// Walks contiguous WAL that is fed page by page. It may start in the middle: what belongs to a record
/// that began earlier is passed over.
#[derive(Debug)]
pub struct Walker {
    segment_size: u64,
    position: Lsn,
    /// The beginning of the record that is not complete: up to [`HELD_BYTES`].
    record: Vec<u8>,
    /// Bytes of it that have come, and their CRC behind the record header.
    record_seen: usize,
    record_crc: u32,
    record_at: Lsn,
    record_len: usize,
    skip: usize,
    /// What was passed over at the beginning: up to [`HELD_BYTES`], and how much it was.
    head: Vec<u8>,
    head_seen: usize,
    /// The first page says that the record before it goes on nowhere.
    drops: bool,
    first: bool,
    prev: Option<Lsn>,
    switched: bool,
    stop: Option<Stop>,
    timeline: u32,
    major: u32,
}

impl Walker {
    /// A walker whose first page is at `start`, which must be a page boundary.
    pub fn new(start: Lsn, segment_size: u64) -> Self {
        Self {
            segment_size,
            position: start,
            record: Vec::new(),
            record_seen: 0,
            record_crc: 0,
            record_at: start,
            record_len: 0,
            skip: 0,
            head: Vec::new(),
            head_seen: 0,
            drops: false,
            first: true,
            prev: None,
            switched: false,
            stop: None,
            timeline: 0,
            major: 0,
        }
    }

    /// Why it stopped, if it did.
    pub fn stopped(&self) -> Option<&Stop> {
        self.stop.as_ref()
    }

    /// Timeline in the newest page header.
    pub fn timeline(&self) -> u32 {
        self.timeline
    }

    /// Major version that wrote the newest page; 0 before the first.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// Where the next record begins, or began if it is not complete yet.
    pub fn next_record(&self) -> Lsn {
        if self.record.is_empty() {
            Lsn(self.position.0 + self.skip as u64)
        } else {
            self.record_at
        }
    }

    /// The record that began and is not complete: its resource manager, if that much of it is there.
    pub fn unfinished(&self) -> Option<Option<u8>> {
        (!self.record.is_empty()).then(|| self.record.get(17).copied())
    }

    /// Of the record that began before the first page: its bytes, without page headers. `None` if they are too many.
    pub fn head(&self) -> Option<&[u8]> {
        (self.head.len() == self.head_seen).then_some(&self.head)
    }

    /// Of the record that is not complete: the same.
    pub fn tail(&self) -> Option<&[u8]> {
        (self.record.is_empty() || self.record.len() == self.record_seen).then_some(&self.record)
    }

    /// Whether the record that began before the first page goes on nowhere: the server crashed while it wrote it.
    pub fn drops_unfinished(&self) -> bool {
        self.drops
    }

    /// Where the last complete record began.
    pub fn last_record(&self) -> Option<Lsn> {
        self.prev
    }

    fn halt(&mut self, at: Lsn, why: impl Into<String>) {
        self.stop = Some(Stop { at, why: why.into() });
    }

    /// Takes the next pages; `bytes` that are no multiple of a page are cut. Calls `on_record` for each
    /// complete record. Returns false once it has stopped.
    pub fn feed(&mut self, bytes: &[u8], mut on_record: impl FnMut(&Record<'_>)) -> bool {
        for page in bytes.as_chunks::<WAL_PAGE>().0 {
            if self.stop.is_some() {
                return false;
            }
            self.page(page, &mut on_record);
            self.position = Lsn(self.position.0 + WAL_PAGE as u64);
        }
        self.stop.is_none()
    }

    fn page(&mut self, page: &[u8; WAL_PAGE], on_record: &mut impl FnMut(&Record<'_>)) {
        let at = self.position;
        if self.switched {
            if !at.0.is_multiple_of(self.segment_size) {
                return;
            }
            self.switched = false;
        }
        let header = match PageHeader::parse(page) {
            Ok(header) => header,
            Err(why) => return self.halt(at, why),
        };
        if header.address != at {
            return self.halt(at, format!("the page says that it is {}", header.address));
        }
        if let Some(long) = header.long
            && (u64::from(long.segment_size) != self.segment_size || long.page_size as usize != WAL_PAGE)
        {
            return self.halt(
                at,
                format!(
                    "segment size {} and page size {} are not expected",
                    long.segment_size, long.page_size
                ),
            );
        }
        self.timeline = header.timeline;
        self.major = header.major;
        let mut offset = if header.long.is_some() {
            LONG_HEADER
        } else {
            SHORT_HEADER
        };
        if header.info & CONTRECORD != 0 {
            let remaining = header.remaining as usize;
            if self.first {
                self.skip = remaining;
            } else if self.record.is_empty() && self.skip == 0 {
                return self.halt(at, "a continuation of a record that did not begin");
            } else if self.skip == 0 && remaining != self.record_len.saturating_sub(self.record_seen) {
                return self.halt(self.record_at, "the record and its continuation disagree");
            }
        } else if header.info & OVERWRITE_CONTRECORD != 0 {
            self.record.clear();
            self.skip = 0;
            self.drops |= self.first;
        } else if !self.first && (!self.record.is_empty() || self.skip != 0) {
            return self.halt(self.record_at, "the record is not continued on the next page");
        }
        // A switch that began in the segment before leaves the rest of this one empty.
        let ends_switch = self.first && begins_with_end_of_switch(page);
        self.first = false;
        if self.skip > 0 {
            let here = self.skip.min(WAL_PAGE - offset);
            let room = HELD_BYTES.saturating_sub(self.head.len()).min(here);
            self.head.extend_from_slice(&page[offset..offset + room]);
            self.head_seen += here;
            self.skip -= here;
            offset += here.next_multiple_of(8).min(WAL_PAGE - offset);
        }
        if ends_switch {
            self.switched = true;
            return;
        }
        let mut offset = if self.record.is_empty() {
            offset
        } else {
            self.continue_record(page, offset, header.major, on_record)
        };
        while offset < WAL_PAGE && self.stop.is_none() && !self.switched && self.skip == 0 {
            offset = self.begin_record(page, offset, header.major, on_record);
        }
    }

    fn continue_record(
        &mut self,
        page: &[u8],
        offset: usize,
        major: u32,
        on_record: &mut impl FnMut(&Record<'_>),
    ) -> usize {
        let here = (self.record_len - self.record_seen).min(WAL_PAGE - offset);
        self.hold(&page[offset..offset + here]);
        let end = (offset + here).next_multiple_of(8);
        if self.record_seen == self.record_len {
            let record = std::mem::take(&mut self.record);
            let crc = crc32c::crc32c_append(self.record_crc, record.get(..20).unwrap_or_default());
            let end = Lsn(self.position.0 + end as u64);
            self.complete(&record, crc, self.record_at, end, major, on_record);
        }
        end
    }

    /// Takes bytes of the record that is not complete. Of a huge one, only the beginning is kept: what a
    /// record refers to stands there.
    fn hold(&mut self, bytes: &[u8]) {
        let header = RECORD_HEADER.saturating_sub(self.record_seen).min(bytes.len());
        self.record_crc = crc32c::crc32c_append(self.record_crc, &bytes[header..]);
        self.record_seen += bytes.len();
        let room = HELD_BYTES.saturating_sub(self.record.len()).min(bytes.len());
        self.record.extend_from_slice(&bytes[..room]);
    }

    fn begin_record(
        &mut self,
        page: &[u8],
        offset: usize,
        major: u32,
        on_record: &mut impl FnMut(&Record<'_>),
    ) -> usize {
        let lsn = Lsn(self.position.0 + offset as u64);
        let len = u32_at(page, offset) as usize;
        if len == 0 {
            self.halt(lsn, "no record begins here (end of the written WAL)");
            return WAL_PAGE;
        }
        if !(RECORD_HEADER..=RECORD_MAX).contains(&len) {
            self.halt(lsn, format!("a record of {len} bytes is not possible"));
            return WAL_PAGE;
        }
        match page.get(offset..offset + len) {
            Some(record) => {
                let end = (offset + len).next_multiple_of(8);
                let crc = crc32c::crc32c_append(crc32c::crc32c(&record[RECORD_HEADER..]), &record[..20]);
                self.complete(record, crc, lsn, Lsn(self.position.0 + end as u64), major, on_record);
                end
            }
            None => {
                self.record_at = lsn;
                self.record_len = len;
                (self.record_seen, self.record_crc) = (0, 0);
                self.hold(&page[offset..]);
                WAL_PAGE
            }
        }
    }

    fn complete(
        &mut self,
        bytes: &[u8],
        crc: u32,
        lsn: Lsn,
        end: Lsn,
        major: u32,
        on_record: &mut impl FnMut(&Record<'_>),
    ) {
        if crc != u32_at(bytes, 20) {
            return self.halt(lsn, "the record's CRC is wrong (damage, or the end of the written WAL)");
        }
        let prev = Lsn(u64_at(bytes, 8));
        if self.prev.is_some_and(|known| known != prev) {
            return self.halt(lsn, format!("the record says that {prev} comes before it"));
        }
        self.prev = Some(lsn);
        let mut record = Record {
            lsn,
            end,
            prev,
            xid: u32_at(bytes, 4),
            info: bytes[16],
            rmgr: bytes[17],
            major,
            bytes,
        };
        if record.is_switch() {
            self.switched = true;
            // A switch that crosses into the next segment ends that one.
            record.end = Lsn(end.0.div_ceil(self.segment_size) * self.segment_size);
        }
        on_record(&record);
    }
}
