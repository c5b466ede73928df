//! The block map of one segment, made while it is archived and kept in its header, and the chain of many.
//!
//! What always holds: a record that crosses segments is noted from its parts; segments follow each other because each
//! first record names the last one before it. A chain that does not hold is an error, and then everything is read.

#[cfg(test)]
mod tests;

use fairvault_format::proto::{self, SegmentMap};

use super::map::{BlockMap, RelationId};
use super::{FAULTY_PARSERS, PARSER_VERSION, records};
use crate::postgres::lsn::Lsn;
use crate::postgres::walker::{Record, Walker};

/// Makes the map of a segment, record by record.
#[derive(Debug, Default)]
pub struct Collector {
    map: BlockMap,
    first_previous: u64,
    last_record: u64,
}

impl Collector {
    /// Takes the next record.
    pub fn take(&mut self, record: &Record<'_>) {
        if self.last_record == 0 {
            self.first_previous = record.prev.0;
        }
        self.last_record = record.lsn.0;
        records::note(&mut self.map, record);
    }

    /// The map, once all of the segment went through `walker`; `None` if a record that crosses its ends is too large.
    pub fn finish(self, walker: &Walker) -> Option<SegmentMap> {
        let (head, tail) = (walker.head()?, walker.tail()?);
        Some(SegmentMap {
            parser_version: PARSER_VERSION,
            server_major: walker.major(),
            changes: Some(to_message(&self.map)),
            first_previous: self.first_previous,
            last_record: self.last_record,
            head: head.to_vec(),
            tail: tail.to_vec(),
            drops_unfinished: walker.drops_unfinished(),
        })
    }
}

fn to_message(map: &BlockMap) -> proto::BlockChanges {
    proto::BlockChanges {
        relations: map
            .relations()
            .map(|(id, changes)| {
                let mut last = 0;
                let differences = changes
                    .blocks(0, u32::MAX)
                    .map(|block| block - std::mem::replace(&mut last, block));
                proto::RelationChanges {
                    tablespace: id.tablespace,
                    database: id.database,
                    relation: id.relation,
                    is_cut: changes.limit().is_some(),
                    limit: changes.limit().unwrap_or_default(),
                    blocks: differences.collect(),
                }
            })
            .collect(),
        databases: map
            .databases()
            .map(|(tablespace, database)| proto::DatabaseChange { tablespace, database })
            .collect(),
        unknown: map.unknown().unwrap_or_default().to_owned(),
    }
}

/// Adds what a message says to `map`; `Err` if it contradicts itself.
fn add_message(map: &mut BlockMap, message: &proto::BlockChanges) -> Result<(), String> {
    for relation in &message.relations {
        let changes = map.relation(RelationId {
            tablespace: relation.tablespace,
            database: relation.database,
            relation: relation.relation,
        });
        if relation.is_cut {
            changes.limit_to(relation.limit);
        }
        let mut block = 0u32;
        for difference in &relation.blocks {
            block = block.checked_add(*difference).ok_or("its blocks are out of range")?;
            changes.add(block);
        }
    }
    for database in &message.databases {
        map.database(database.tablespace, database.database);
    }
    if !message.unknown.is_empty() {
        map.everything(message.unknown.as_str());
    }
    Ok(())
}

/// Whether a kept map may be used: whoever made it is known, and not distrusted.
pub fn is_usable(map: &SegmentMap, distrusted: &[proto::DistrustParser]) -> bool {
    (1..=PARSER_VERSION).contains(&map.parser_version)
        && !FAULTY_PARSERS.contains(&map.parser_version)
        && distrusted.iter().all(|d| d.parser_version != map.parser_version)
}

/// Segments that follow each other, and what they change together.
#[derive(Debug, Default)]
pub struct Chain {
    map: BlockMap,
    began: bool,
    /// Where the last record that is complete began.
    last: u64,
    /// The record that is not: where it began, and its bytes so far.
    open: Option<(u64, Vec<u8>)>,
}

impl Chain {
    /// Takes the next segment. `to`: what lies behind is not needed.
    pub fn push(&mut self, summary: &proto::WalSummary, to: Lsn) -> Result<(), String> {
        let map = summary.map.as_ref().ok_or("it has no block map")?;
        if summary.stopped_at != 0 && summary.stopped_at < to.0 {
            return Err(format!(
                "it cannot be read at {}: {}",
                Lsn(summary.stopped_at),
                summary.stopped_why
            ));
        }
        if map.drops_unfinished {
            self.open = None;
        }
        match self.open.take() {
            Some((at, mut bytes)) => {
                bytes.extend_from_slice(&map.head);
                match Record::assemble(&bytes, Lsn(at), map.server_major) {
                    Some(record) => {
                        if record.prev.0 != self.last && self.last != 0 {
                            return Err(self.breaks(record.prev, Lsn(at)));
                        }
                        records::note(&mut self.map, &record);
                        self.last = at;
                    }
                    // It is longer than this segment, too.
                    None if summary.first_record == 0 && !summary.unfinished => {
                        self.open = Some((at, bytes));
                        self.map.made_by(map.parser_version);
                        return Ok(());
                    }
                    None => return Err(format!("the record at {} is not whole", Lsn(at))),
                }
            }
            None if self.began && !map.head.is_empty() => {
                return Err("it begins with the rest of a record that did not begin".to_owned());
            }
            None => {}
        }
        self.began = true;
        if summary.first_record != 0 {
            if self.last != 0 && map.first_previous != self.last {
                return Err(self.breaks(Lsn(map.first_previous), Lsn(summary.first_record)));
            }
            self.last = map.last_record;
        }
        add_message(&mut self.map, &map.changes.clone().unwrap_or_default())?;
        self.map.made_by(map.parser_version);
        if summary.unfinished {
            self.open = Some((summary.next_record, map.tail.clone()));
        }
        Ok(())
    }

    /// Whether every record before `to` is noted, if the segments so far end at `end`.
    pub fn is_complete(&self, end: Lsn, to: Lsn) -> bool {
        end >= to && self.open.as_ref().is_none_or(|(at, _)| *at >= to.0)
    }

    /// What they change.
    pub fn finish(self) -> BlockMap {
        self.map
    }

    fn breaks(&self, previous: Lsn, at: Lsn) -> String {
        format!(
            "the record at {at} says that {previous} comes before it, and it is {}",
            Lsn(self.last)
        )
    }
}
