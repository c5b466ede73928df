//! One record taken apart: the blocks that it refers to, and what it means for recovery.

use super::super::EPOCH_2000_US;
use super::super::lsn::Lsn;
use super::{RECORD_HEADER, u32_at, u64_at};

/// Resource managers that the walker knows.
pub mod rmgr {
    /// XLOG
    pub const XLOG: u8 = 0;
    /// Transactions
    pub const XACT: u8 = 1;
    /// Files of relations
    pub const SMGR: u8 = 2;
    /// Databases
    pub const DBASE: u8 = 4;
    /// B-trees
    pub const BTREE: u8 = 11;
    /// Tablespaces
    pub const TBLSPC: u8 = 5;
}

pub(super) const XLOG_SWITCH: u8 = 0x40;
const XLOG_PARAMETER_CHANGE: u8 = 0x60;
const XLOG_RESTORE_POINT: u8 = 0x70;
const XLOG_END_OF_RECOVERY: u8 = 0x90;

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
    pub(super) bytes: &'a [u8],
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
    /// The record holds an image of the block.
    pub has_image: bool,
    /// Replay makes the whole block: from an image that is applied, or by initialising it.
    pub restores_whole: bool,
}

/// A record taken apart.
#[derive(Debug, Default)]
pub struct Decoded<'a> {
    /// Blocks that it refers to.
    pub blocks: Vec<BlockRef>,
    /// Main data; of a record of more than 4 MiB, its beginning.
    pub main: &'a [u8],
}

impl<'a> Record<'a> {
    /// A record from all its bytes, without page headers; `None` if these are not all, or its CRC is wrong.
    pub fn assemble(bytes: &'a [u8], lsn: Lsn, major: u32) -> Option<Self> {
        let (head, body) = bytes.split_at_checked(RECORD_HEADER)?;
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &head[..20]);
        (u32_at(head, 0) as usize == bytes.len() && crc == u32_at(head, 20)).then(|| Self {
            lsn,
            end: Lsn(lsn.0 + bytes.len() as u64),
            prev: Lsn(u64_at(head, 8)),
            xid: u32_at(head, 4),
            rmgr: head[17],
            info: head[16],
            major,
            bytes,
        })
    }

    /// A record that no WAL holds.
    #[cfg(test)]
    pub(crate) fn for_tests(bytes: &'a [u8], lsn: Lsn, rmgr: u8, info: u8, major: u32) -> Self {
        Self {
            lsn,
            end: Lsn(lsn.0 + bytes.len() as u64),
            prev: Lsn(0),
            xid: 0,
            rmgr,
            info,
            major,
            bytes,
        }
    }

    /// Takes the record apart; `None` if its inside contradicts itself.
    pub fn decode(&self) -> Option<Decoded<'a>> {
        let mut rest = &self.bytes[RECORD_HEADER..];
        // Of a huge record, the end is not here.
        let cut = (self.total_len() as usize).saturating_sub(self.bytes.len());
        let mut blocks: Vec<BlockRef> = Vec::new();
        let mut data_len = 0usize;
        let mut main_len = 0usize;
        let mut last_relation = None;
        let take = |rest: &mut &'a [u8], n: usize| -> Option<&'a [u8]> {
            let (head, tail) = rest.split_at_checked(n)?;
            *rest = tail;
            Some(head)
        };
        while rest.len() + cut > data_len + main_len {
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
                    let mut applied = false;
                    if flags & 0x10 != 0 {
                        let image = take(&mut rest, 5)?;
                        data_len = data_len.checked_add(u16::from_le_bytes([image[0], image[1]]).into())?;
                        let bimg = image[4];
                        let compressed = if self.major >= 15 {
                            bimg & 0x1C != 0
                        } else {
                            bimg & 2 != 0
                        };
                        // An image that only checks consistency is not applied.
                        applied = bimg & if self.major >= 15 { 2 } else { 4 } != 0;
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
                        has_image: flags & 0x10 != 0,
                        restores_whole: applied || flags & 0x40 != 0,
                    });
                }
                _ => return None,
            }
        }
        (rest.len() + cut == data_len + main_len).then(|| Decoded {
            blocks,
            main: rest.get(data_len..).unwrap_or_default(),
        })
    }

    /// Its length, bytes, without padding (xl_tot_len).
    pub fn total_len(&self) -> u32 {
        u32_at(self.bytes, 0)
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
