//! A walker over physical WAL: pages, records, CRCs and prev-links, and the few records that decide where
//! recovery can go (commits, restore points, switches, tablespaces, parameter changes).
//!
//! What always holds: nothing is believed before its CRC; the walker says where and why it stopped; it
//! never skips over what it does not understand. Formats are those of `access/xlogrecord.h`,
//! `access/xlog_internal.h` and `access/xact.h`, 14 to 19.

use super::lsn::Lsn;
use super::{EPOCH_2000_US, version_of_magic};

/// Size of a WAL page. Servers built with another XLOG_BLCKSZ are refused.
pub const WAL_PAGE: usize = 8192;
const RECORD_HEADER: usize = 24;
const LONG_HEADER: usize = 40;
const SHORT_HEADER: usize = 24;
/// XLogRecordMaxSize.
const RECORD_MAX: usize = 1020 << 20;

const CONTRECORD: u16 = 1;
const LONG: u16 = 2;
const OVERWRITE_CONTRECORD: u16 = 8;

/// Resource managers that the walker knows.
pub mod rmgr {
    /// XLOG
    pub const XLOG: u8 = 0;
    /// Transactions
    pub const XACT: u8 = 1;
    /// Tablespaces
    pub const TBLSPC: u8 = 5;
}

const XLOG_SWITCH: u8 = 0x40;
const XLOG_PARAMETER_CHANGE: u8 = 0x60;
const XLOG_RESTORE_POINT: u8 = 0x70;
const XLOG_END_OF_RECOVERY: u8 = 0x90;

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

fn u32_at(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4)
        .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

/// A record whose CRC was right.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// Where it begins.
    pub lsn: Lsn,
    /// Where the next may begin (8-byte aligned).
    pub end: Lsn,
    /// Where the one before began.
    pub prev: Lsn,
    /// Transaction, 0 if none.
    pub xid: u32,
    /// Resource manager.
    pub rmgr: u8,
    /// Info byte.
    pub info: u8,
    /// Major version that wrote it.
    pub major: u32,
    bytes: &'a [u8],
}

/// A block that a record refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockRef {
    /// Tablespace.
    pub tablespace: u32,
    /// Database.
    pub database: u32,
    /// Relation file number.
    pub relation: u32,
    /// Fork number: 0 main, 1 FSM, 2 VM, 3 init.
    pub fork: u8,
    /// Block number in the relation.
    pub block: u32,
    /// The record holds a full image of the block, or initialises it.
    pub restores_whole: bool,
}

/// A record taken apart.
#[derive(Debug, Default)]
pub struct Decoded<'a> {
    /// Blocks that it refers to.
    pub blocks: Vec<BlockRef>,
    /// Main data.
    pub main: &'a [u8],
}

impl<'a> Record<'a> {
    /// Takes the record apart; `None` if its inside contradicts itself.
    pub fn decode(&self) -> Option<Decoded<'a>> {
        let mut rest = &self.bytes[RECORD_HEADER..];
        let mut blocks: Vec<BlockRef> = Vec::new();
        let mut data_len = 0usize;
        let mut main_len = 0usize;
        let mut last_relation = None;
        let take = |rest: &mut &'a [u8], n: usize| -> Option<&'a [u8]> {
            let (head, tail) = rest.split_at_checked(n)?;
            *rest = tail;
            Some(head)
        };
        while rest.len() > data_len + main_len {
            match take(&mut rest, 1)?[0] {
                255 => {
                    main_len = take(&mut rest, 1)?[0].into();
                    break;
                }
                254 => {
                    main_len = u32_at(take(&mut rest, 4)?, 0) as usize;
                    break;
                }
                253 => {
                    take(&mut rest, 2)?;
                }
                252 => {
                    take(&mut rest, 4)?;
                }
                id if id <= 32 => {
                    let head = take(&mut rest, 3)?;
                    let flags = head[0];
                    data_len = data_len.checked_add(u16::from_le_bytes([head[1], head[2]]).into())?;
                    if flags & 0x10 != 0 {
                        let image = take(&mut rest, 5)?;
                        data_len = data_len.checked_add(u16::from_le_bytes([image[0], image[1]]).into())?;
                        let bimg = image[4];
                        let compressed = if self.major >= 15 {
                            bimg & 0x1C != 0
                        } else {
                            bimg & 2 != 0
                        };
                        if bimg & 1 != 0 && compressed {
                            take(&mut rest, 2)?;
                        }
                    }
                    let relation = match flags & 0x80 != 0 {
                        true => last_relation?,
                        false => {
                            let r = take(&mut rest, 12)?;
                            (u32_at(r, 0), u32_at(r, 4), u32_at(r, 8))
                        }
                    };
                    last_relation = Some(relation);
                    let block = u32_at(take(&mut rest, 4)?, 0);
                    blocks.push(BlockRef {
                        tablespace: relation.0,
                        database: relation.1,
                        relation: relation.2,
                        fork: flags & 0x0F,
                        block,
                        restores_whole: flags & 0x50 != 0,
                    });
                }
                _ => return None,
            }
        }
        (rest.len() == data_len + main_len).then(|| Decoded {
            blocks,
            main: &rest[data_len..],
        })
    }

    /// Whether this is the record that ends a segment early.
    pub fn is_switch(&self) -> bool {
        self.rmgr == rmgr::XLOG && self.info & 0xF0 == XLOG_SWITCH
    }

    /// What the record means for recovery, if anything.
    pub fn event(&self) -> Option<Event> {
        if !matches!(self.rmgr, rmgr::XLOG | rmgr::XACT | rmgr::TBLSPC) {
            return None;
        }
        let what = match (self.rmgr, self.info & 0xF0) {
            (rmgr::XACT, _) => return self.transaction_end(),
            (rmgr::XLOG, XLOG_SWITCH) => What::Switch,
            (rmgr::XLOG, XLOG_RESTORE_POINT) => {
                let main = self.decode()?.main;
                let name = main.get(8..)?.split(|&b| b == 0).next()?;
                What::RestorePoint {
                    time_us: time(main)?,
                    name: String::from_utf8_lossy(name).into_owned(),
                }
            }
            (rmgr::XLOG, XLOG_PARAMETER_CHANGE) => What::ParameterChange {
                wal_level: u32_at(self.decode()?.main.get(20..24)?, 0) as i32,
            },
            (rmgr::XLOG, XLOG_END_OF_RECOVERY) => {
                let main = self.decode()?.main.get(8..16)?;
                What::TimelineStart {
                    timeline: u32_at(main, 0),
                    previous: u32_at(main, 4),
                }
            }
            (rmgr::TBLSPC, 0x00) => {
                let main = self.decode()?.main;
                let path = main.get(4..)?.split(|&b| b == 0).next()?;
                What::TablespaceCreate {
                    oid: u32_at(main, 0),
                    location: String::from_utf8_lossy(path).into_owned(),
                }
            }
            _ => return None,
        };
        Some(Event {
            lsn: self.lsn,
            end: self.end,
            what,
        })
    }

    fn transaction_end(&self) -> Option<Event> {
        let commit = match self.info & 0x70 {
            0x00 | 0x30 => true,
            0x20 | 0x40 => false,
            _ => return None,
        };
        let main = self.decode()?.main;
        let xid = match self.info & 0x70 {
            0x30 | 0x40 => self.prepared_xid(main, commit)?,
            _ => self.xid,
        };
        Some(Event {
            lsn: self.lsn,
            end: self.end,
            what: What::TransactionEnd {
                xid,
                time_us: time(main)?,
                commit,
            },
        })
    }

    /// The transaction in the body of COMMIT PREPARED or ROLLBACK PREPARED.
    fn prepared_xid(&self, main: &[u8], commit: bool) -> Option<u32> {
        if self.info & 0x80 == 0 {
            return None;
        }
        let xinfo = u32_at(main.get(8..12)?, 0);
        let mut at = 12usize;
        let skip_list = |at: &mut usize, item: usize| -> Option<()> {
            let count = u32_at(main.get(*at..*at + 4)?, 0) as usize;
            *at = at.checked_add(4)?.checked_add(count.checked_mul(item)?)?;
            (*at <= main.len()).then_some(())
        };
        if xinfo & 1 != 0 {
            at += 8;
        }
        if xinfo & 2 != 0 {
            skip_list(&mut at, 4)?;
        }
        if xinfo & 4 != 0 {
            skip_list(&mut at, 12)?;
        }
        if xinfo & 0x100 != 0 {
            skip_list(&mut at, if self.major >= 18 { 16 } else { 12 })?;
        }
        if commit && xinfo & 8 != 0 {
            skip_list(&mut at, 16)?;
        }
        (xinfo & 0x10 != 0)
            .then(|| main.get(at..at + 4).map(|b| u32_at(b, 0)))
            .flatten()
    }
}

/// A time at the beginning of main data, as microseconds since 1970.
fn time(main: &[u8]) -> Option<i64> {
    (u64_at(main.get(..8)?, 0) as i64).checked_add(EPOCH_2000_US)
}

/// A record that matters for recovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Where the record begins.
    pub lsn: Lsn,
    /// Where it ends.
    pub end: Lsn,
    /// What it says.
    pub what: What,
}

/// The kinds of [`Event`]. Times are microseconds since 1970-01-01 UTC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// Commit or abort, of a prepared transaction too.
    TransactionEnd {
        /// The transaction.
        xid: u32,
        /// When.
        time_us: i64,
        /// Commit or abort.
        commit: bool,
    },
    /// `pg_create_restore_point`.
    RestorePoint {
        /// When.
        time_us: i64,
        /// Its name.
        name: String,
    },
    /// The rest of the segment is empty.
    Switch,
    /// Replay will make a link to this absolute path.
    TablespaceCreate {
        /// Tablespace.
        oid: u32,
        /// Absolute path, empty for an in-place one.
        location: String,
    },
    /// Settings changed; wal_level 0 is minimal.
    ParameterChange {
        /// The new wal_level.
        wal_level: i32,
    },
    /// A promotion.
    TimelineStart {
        /// The new timeline.
        timeline: u32,
        /// The one before.
        previous: u32,
    },
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
    record: Vec<u8>,
    record_at: Lsn,
    record_len: usize,
    skip: usize,
    first: bool,
    prev: Option<Lsn>,
    switched: bool,
    stop: Option<Stop>,
    timeline: u32,
}

impl Walker {
    /// A walker whose first page is at `start`, which must be a page boundary.
    pub fn new(start: Lsn, segment_size: u64) -> Self {
        Self {
            segment_size,
            position: start,
            record: Vec::new(),
            record_at: start,
            record_len: 0,
            skip: 0,
            first: true,
            prev: None,
            switched: false,
            stop: None,
            timeline: 0,
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

    /// Whether the last record seen ended its segment.
    pub fn switched(&self) -> bool {
        self.switched
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
            } else if self.skip == 0 && remaining != self.record_len.saturating_sub(self.record.len()) {
                return self.halt(self.record_at, "the record and its continuation disagree");
            }
        } else if header.info & OVERWRITE_CONTRECORD != 0 {
            self.record.clear();
            self.skip = 0;
        } else if !self.first && (!self.record.is_empty() || self.skip != 0) {
            return self.halt(self.record_at, "the record is not continued on the next page");
        }
        self.first = false;
        if self.skip > 0 {
            let here = self.skip.min(WAL_PAGE - offset);
            self.skip -= here;
            offset += here.next_multiple_of(8).min(WAL_PAGE - offset);
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
        let here = (self.record_len - self.record.len()).min(WAL_PAGE - offset);
        self.record.extend_from_slice(&page[offset..offset + here]);
        let end = (offset + here).next_multiple_of(8);
        if self.record.len() == self.record_len {
            let record = std::mem::take(&mut self.record);
            self.complete(
                &record,
                self.record_at,
                Lsn(self.position.0 + end as u64),
                major,
                on_record,
            );
        }
        end
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
                self.complete(record, lsn, Lsn(self.position.0 + end as u64), major, on_record);
                end
            }
            None => {
                self.record_at = lsn;
                self.record_len = len;
                self.record.extend_from_slice(&page[offset..]);
                WAL_PAGE
            }
        }
    }

    fn complete(&mut self, bytes: &[u8], lsn: Lsn, end: Lsn, major: u32, on_record: &mut impl FnMut(&Record<'_>)) {
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[RECORD_HEADER..]), &bytes[..20]);
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
            record.end = Lsn(lsn.0 / self.segment_size * self.segment_size + self.segment_size);
        }
        on_record(&record);
    }
}
