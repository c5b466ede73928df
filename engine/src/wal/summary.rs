//! What one WAL segment says of itself, for planning recoveries without opening data.
//!
//! It sees one segment alone: a record that crosses into the next segment is reported as unfinished, and
//! whoever depends on it walks both segments, or puts it together from what the block maps of both hold.

use fairvault_format::proto;
use prost::Message;

use crate::postgres::lsn::Lsn;
use crate::postgres::walker::{Record, WAL_PAGE, Walker, What, begins_with_end_of_switch};
use crate::track::segment::Collector;

/// Version of the walker, recorded in summaries.
pub const PARSER_VERSION: u32 = 2;

/// A larger block map is not kept: whoever needs it reads the segment.
const MAP_BYTES: usize = 1 << 20;

/// Makes a summary of bytes as they come.
#[derive(Debug)]
pub struct Summarizer {
    walker: Walker,
    out: proto::WalSummary,
    map: Collector,
    /// Bytes that are no whole page yet.
    page: Vec<u8>,
    at_start: bool,
}

impl Summarizer {
    /// For WAL that begins at `start`.
    pub fn new(start: Lsn, segment_size: u64) -> Self {
        Self {
            walker: Walker::new(start, segment_size),
            out: proto::WalSummary {
                parser_version: PARSER_VERSION,
                ..Default::default()
            },
            page: Vec::new(),
            map: Collector::default(),
            at_start: true,
        }
    }

    /// Takes the next bytes.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        if !self.page.is_empty() {
            let take = (WAL_PAGE - self.page.len()).min(bytes.len());
            self.page.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.page.len() == WAL_PAGE {
                let page = std::mem::take(&mut self.page);
                self.pages(&page);
            }
        }
        let whole = bytes.len() / WAL_PAGE * WAL_PAGE;
        self.pages(&bytes[..whole]);
        self.page.extend_from_slice(&bytes[whole..]);
    }

    fn pages(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if std::mem::take(&mut self.at_start) {
            self.out.switched = begins_with_end_of_switch(bytes);
        }
        let (out, map) = (&mut self.out, &mut self.map);
        self.walker.feed(bytes, |record| {
            note(out, record);
            map.take(record);
        });
    }

    /// The summary, to be kept. Whole segments only: a page that is not complete is not looked at.
    pub fn finish(self) -> proto::WalSummary {
        let mut out = self.finish_with_map();
        out.map = out.map.filter(|map| map.encoded_len() <= MAP_BYTES);
        out
    }

    /// The summary with its block map, however large that is.
    pub fn finish_with_map(self) -> proto::WalSummary {
        let Self {
            walker, mut out, map, ..
        } = self;
        out.map = map.finish(&walker);
        out.next_record = walker.next_record().0;
        if let Some(rmgr) = walker.unfinished() {
            out.unfinished = true;
            out.unfinished_rmgr = rmgr.map_or(0, |r| u32::from(r) + 1);
        }
        if let Some(stop) = walker.stopped() {
            out.stopped_at = stop.at.0;
            out.stopped_why = stop.why.clone();
        }
        out
    }
}

fn note(out: &mut proto::WalSummary, record: &Record<'_>) {
    out.records += 1;
    if out.first_record == 0 {
        out.first_record = record.lsn.0;
    }
    let Some(event) = record.event() else { return };
    let lsn = event.lsn.0;
    match event.what {
        What::TransactionEnd { time_us, .. } => {
            out.min_time_us = if out.min_time_us == 0 {
                time_us
            } else {
                out.min_time_us.min(time_us)
            };
            out.max_time_us = out.max_time_us.max(time_us);
        }
        What::RestorePoint { time_us, name } => out.restore_points.push(proto::RestorePoint { lsn, time_us, name }),
        What::TablespaceCreate { oid, location } => {
            out.tablespaces.push(proto::TablespaceCreate { lsn, oid, location });
        }
        What::ParameterChange { wal_level } => out.parameter_changes.push(proto::ParameterChange { lsn, wal_level }),
        What::TimelineStart { timeline, previous } => {
            out.timeline_starts.push(proto::TimelineStart {
                lsn,
                timeline,
                previous,
            });
        }
        What::Switch => out.switched = true,
    }
}

/// Walks `content`, which begins at `start`.
pub fn summarize(content: &[u8], start: Lsn, segment_size: u64) -> proto::WalSummary {
    let mut summarizer = Summarizer::new(start, segment_size);
    summarizer.feed(content);
    summarizer.finish()
}

/// Whether it may be wrong: version 1 said of some segments with records that they are the end of a switch and no more.
pub fn may_be_wrong(summary: &proto::WalSummary) -> bool {
    summary.parser_version == 1 && summary.switched && summary.records == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::walker::made::{SEGMENT, Wal};

    /// A clock that was set back, or two backends that took their times in one order and wrote in the other.
    #[test]
    fn times_that_go_back_are_between_the_least_and_the_greatest() {
        const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;
        let mut wal = Wal::new(16 * SEGMENT);
        for seconds in [30i64, 10, 20] {
            wal.record_with(1, 0, &(seconds * 1_000_000).to_le_bytes());
        }
        wal.pad();
        let summary = summarize(&wal.bytes, Lsn(16 * SEGMENT), SEGMENT);
        assert_eq!(summary.min_time_us, POSTGRES_EPOCH_US + 10_000_000);
        assert_eq!(summary.max_time_us, POSTGRES_EPOCH_US + 30_000_000);
    }

    #[test]
    fn any_cut_gives_the_same_summary() {
        let mut wal = vec![0u8; 4 * WAL_PAGE];
        wal[..2].copy_from_slice(&0xD110u16.to_le_bytes());
        let whole = summarize(&wal, Lsn(0), 1 << 20);
        for step in [1, 100, WAL_PAGE - 1, WAL_PAGE, WAL_PAGE + 1] {
            let mut cut = Summarizer::new(Lsn(0), 1 << 20);
            wal.chunks(step).for_each(|bytes| cut.feed(bytes));
            assert_eq!(cut.finish(), whole, "{step}");
        }
    }
}
