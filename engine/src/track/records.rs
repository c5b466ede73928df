//! What one WAL record changes. Formats are those of `storage_xlog.h`, `dbcommands_xlog.h`, `xact.h`, `pg_control.h`.

use super::map::{BlockMap, RelationId};
use crate::env::has_fault;
use crate::postgres::walker::{Record, rmgr, u32_at};

/// Fork number of what is tracked.
const MAIN: u32 = 0;
/// XLR_SPECIAL_REL_UPDATE: the record changes relation files other than by the blocks that it names.
const SPECIAL: u8 = 0x01;
/// The last resource manager that 14 to 18 have (LOGICALMSG), and the first one of extensions.
const LAST_KNOWN: u8 = 21;
const FIRST_CUSTOM: u8 = 128;

/// Notes what a record changes.
pub fn note(map: &mut BlockMap, record: &Record<'_>) {
    let lsn = record.lsn;
    let Some(decoded) = record.decode() else {
        return map.everything(format!("the record at {lsn} cannot be taken apart"));
    };
    for block in decoded.blocks.iter().filter(|block| u32::from(block.fork) == MAIN) {
        if record.rmgr == rmgr::BTREE && has_fault("no btree") {
            continue;
        }
        let id = RelationId {
            tablespace: block.tablespace,
            database: block.database,
            relation: block.relation,
        };
        map.relation(id).add(block.block);
    }
    let understood = match record.rmgr {
        rmgr::SMGR | rmgr::XACT if has_fault("no limits") => Some(()),
        rmgr::DBASE if has_fault("no databases") => Some(()),
        rmgr::SMGR => storage(map, record, decoded.main),
        rmgr::DBASE => database(map, record, decoded.main),
        rmgr::XACT => transaction(map, record, decoded.main),
        rmgr::XLOG => return log_itself(map, record, decoded.main),
        _ => None,
    };
    let is_known = record.rmgr <= LAST_KNOWN || record.rmgr >= FIRST_CUSTOM;
    if understood.is_none() && (record.info & SPECIAL != 0 || !is_known) {
        map.everything(format!(
            "the record at {lsn} (resource manager {}, info {:02X}) is not understood",
            record.rmgr, record.info
        ));
    }
}

fn locator(bytes: &[u8]) -> Option<RelationId> {
    let bytes = bytes.get(..12)?;
    Some(RelationId {
        tablespace: u32_at(bytes, 0),
        database: u32_at(bytes, 4),
        relation: u32_at(bytes, 8),
    })
}

fn storage(map: &mut BlockMap, record: &Record<'_>, main: &[u8]) -> Option<()> {
    match record.info & 0xF0 {
        // xl_smgr_create: locator, fork.
        0x10 => {
            let id = locator(main)?;
            if u32_at(main.get(12..16)?, 0) == MAIN {
                map.relation(id).limit_to(0);
            }
        }
        // xl_smgr_truncate: length of the main fork, locator, which forks.
        0x20 => {
            let id = locator(main.get(4..16)?)?;
            map.relation(id).limit_to(u32_at(main, 0));
        }
        _ => return None,
    }
    Some(())
}

fn database(map: &mut BlockMap, record: &Record<'_>, main: &[u8]) -> Option<()> {
    let is_drop = match (record.info & 0xF0, record.major) {
        (0x00, _) => false,
        (0x10, ..=14) => true,
        (0x10, _) => false,
        (0x20, 15..) => true,
        _ => return None,
    };
    let word = |at: usize| Some(u32_at(main.get(at..at + 4)?, 0));
    let database = word(0)?;
    if !is_drop {
        map.database(word(4)?, database);
        return Some(());
    }
    for number in 0..word(4)? as usize {
        map.database(word(8 + number * 4)?, database);
    }
    Some(())
}

/// Relations that a transaction's end drops. They are created anew by a record of their own, if at all.
fn transaction(map: &mut BlockMap, record: &Record<'_>, main: &[u8]) -> Option<()> {
    if !matches!(record.info & 0x70, 0x00 | 0x20 | 0x30 | 0x40) || record.info & 0x80 == 0 {
        return (record.info & SPECIAL == 0).then_some(());
    }
    let word = |at: usize| Some(u32_at(main.get(at..at + 4)?, 0));
    // The time, then flags.
    let flags = word(8)?;
    let mut at = 12;
    if flags & 1 != 0 {
        at += 8;
    }
    if flags & 2 != 0 {
        at += 4 + word(at)? as usize * 4;
    }
    if flags & 4 != 0 {
        let count = word(at)? as usize;
        for number in 0..count {
            let from = at + 4 + number * 12;
            map.relation(locator(main.get(from..from + 12)?)?).limit_to(0);
        }
    }
    Some(())
}

/// Records about the WAL itself. None but full-page images changes a block, and those name it.
fn log_itself(map: &mut BlockMap, record: &Record<'_>, main: &[u8]) {
    let lsn = record.lsn;
    match record.info & 0xF0 {
        // wal_level = minimal leaves changes out.
        0x60 if main.get(20..24).is_none_or(|level| u32_at(level, 0) == 0) => {
            map.everything(format!("wal_level was minimal from {lsn} on"));
        }
        // Checkpoints, next OID, switch, end of backup, parameters, restore point, full-page writes, end of recovery,
        // full-page images, overwritten continuation, redo point.
        0x00..=0xB0 | 0xD0 | 0xE0 => {}
        other => map.everything(format!(
            "the record at {lsn} (XLOG, info {other:02X}) is not understood"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::lsn::Lsn;

    /// A record with nothing but main data.
    fn noted(rmgr: u8, info: u8, major: u32, main: &[u8]) -> BlockMap {
        let mut bytes = vec![0u8; 24];
        if !main.is_empty() {
            bytes.extend([255, main.len() as u8]);
            bytes.extend(main);
        }
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        let mut map = BlockMap::default();
        let record = Record::for_tests(&bytes, Lsn(0x100), rmgr, info, major);
        note(&mut map, &record);
        map
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn id(relation: u32) -> RelationId {
        RelationId {
            tablespace: 1663,
            database: 5,
            relation,
        }
    }

    #[test]
    fn records_that_name_no_block_set_limits() {
        let created = noted(rmgr::SMGR, 0x11, 15, &words(&[1663, 5, 77, 0]));
        assert!(created.has(id(77), 0) && !created.has(id(78), 0));
        let of_a_map = noted(rmgr::SMGR, 0x11, 15, &words(&[1663, 5, 77, 2]));
        assert_eq!(of_a_map, BlockMap::default());
        let cut = noted(rmgr::SMGR, 0x21, 15, &words(&[6, 1663, 5, 77, 7]));
        assert!(cut.has(id(77), 6) && !cut.has(id(77), 5));
        for (info, major, main) in [
            (0x00, 14, words(&[5, 1663, 1, 1663])),
            (0x10, 14, words(&[5, 1, 1663])),
            (0x00, 15, words(&[5, 1663, 1, 1663])),
            (0x10, 15, words(&[5, 1663])),
            (0x20, 15, words(&[5, 2, 1700, 1663])),
        ] {
            let map = noted(rmgr::DBASE, info | SPECIAL, major, &main);
            assert!(map.has(id(1), 0) && map.unknown().is_none(), "{info:02X} of {major}");
        }
        // Time, flags: database, subtransactions, dropped relations.
        let mut commit = vec![0u8; 8];
        commit.extend(words(&[7, 5, 1663, 2, 900, 901, 2, 1663, 5, 77, 1663, 5, 78]));
        for info in [0x80, 0xA0, 0xB0, 0xC0] {
            let dropped = noted(rmgr::XACT, info | SPECIAL, 15, &commit);
            assert!(dropped.has(id(77), 0) && dropped.has(id(78), 0) && dropped.unknown().is_none());
        }
    }

    #[test]
    fn what_is_not_understood_is_everything() {
        let mut cut_off = vec![0u8; 8];
        cut_off.extend(words(&[4, 9, 1663]));
        let mut minimal = vec![0u8; 20];
        minimal.extend(words(&[0]));
        for (rmgr, info, main) in [
            (rmgr::SMGR, 0x31, words(&[1, 2, 3, 4])),
            (rmgr::SMGR, 0x11, words(&[1, 2])),
            (rmgr::DBASE, 0x31, words(&[1, 2, 3, 4])),
            (rmgr::DBASE, 0x21, words(&[5, 100, 1663])),
            (rmgr::XACT, 0x81, cut_off),
            (rmgr::XLOG, 0x60, minimal),
            (rmgr::XLOG, 0xF0, Vec::new()),
            (10, 0x01, Vec::new()),
            (200, 0x01, Vec::new()),
            (30, 0x00, Vec::new()),
        ] {
            let map = noted(rmgr, info, 15, &main);
            assert!(map.unknown().is_some(), "resource manager {rmgr}, info {info:02X}");
        }
        let mut replica = vec![0u8; 20];
        replica.extend(words(&[1]));
        for (rmgr, info, main) in [
            (10, 0x00, Vec::new()),
            (200, 0x00, Vec::new()),
            (rmgr::XLOG, 0x60, replica),
            (rmgr::XACT, 0x00, vec![0; 8]),
        ] {
            assert_eq!(noted(rmgr, info, 15, &main), BlockMap::default(), "{rmgr} {info:02X}");
        }
    }
}
