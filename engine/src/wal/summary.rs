//! What one WAL segment says of itself, for planning recoveries without opening data.
//!
//! It sees one segment alone: a record that crosses into the next segment is reported as unfinished, and
//! whoever depends on it walks both segments.

use fairvault_format::proto;

use crate::postgres::lsn::Lsn;
use crate::postgres::walker::{Walker, What};

/// Version of the walker, recorded in summaries.
pub const PARSER_VERSION: u32 = 1;

/// Walks `content`, which begins at `start`.
pub fn summarize(content: &[u8], start: Lsn, segment_size: u64) -> proto::WalSummary {
    let mut walker = Walker::new(start, segment_size);
    let mut out = proto::WalSummary {
        parser_version: PARSER_VERSION,
        ..Default::default()
    };
    walker.feed(content, |record| {
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
            What::ParameterChange { wal_level } => {
                out.parameter_changes.push(proto::ParameterChange { lsn, wal_level })
            }
            What::TimelineStart { timeline, previous } => {
                out.timeline_starts.push(proto::TimelineStart {
                    lsn,
                    timeline,
                    previous,
                });
            }
            What::Switch => out.switched = true,
        }
    });
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
