//! Where to begin: exactly where the repository ends, on the server's history.

use super::check_not_behind;
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment};
use crate::replication::connection::SystemIdentity;
use crate::wal::archive::Archive;
use crate::wal::coverage::Coverage;

/// The first segment to receive, from its beginning, and what is stored of it already.
pub struct Start {
    /// Segment.
    pub segment: Segment,
    /// What its pieces hold; the server must send the same.
    pub have: Vec<u8>,
    /// The pieces: start, end, object.
    pub pieces: Vec<(u64, u64, String)>,
}

impl Start {
    /// Up to where WAL is durable.
    pub fn durable(&self, segment_size: u64) -> Lsn {
        Lsn(self.segment.start(segment_size).0 + self.have.len() as u64)
    }
}

/// From the segment that the server writes now.
pub fn at_server(archive: &Archive, server: &SystemIdentity) -> Start {
    Start {
        segment: Segment::of(server.timeline, server.flush, archive.segment_size),
        have: Vec::new(),
        pieces: Vec::new(),
    }
}

/// Finds it.
pub async fn find(
    archive: &Archive,
    history: &History,
    server: &SystemIdentity,
    in_recovery: bool,
    skip_gap: bool,
) -> Result<Start> {
    let size = archive.segment_size;
    let coverage = Coverage::read(archive).await?;
    let segment = match anchor(archive, history, &coverage) {
        // Nothing is there: from the segment that is being written.
        None => Segment::of(server.timeline, server.flush, size),
        Some(from) => {
            let reach = coverage.reach(history, from);
            match reach.is_hole && skip_gap {
                false => reach.missing,
                true => {
                    let newest = coverage.newest(history).unwrap_or(reach.missing);
                    tracing::warn!(
                        "WAL from {} on is missing and is passed over: recovery across it is not possible, take a new backup",
                        reach.missing.name(size)
                    );
                    coverage.reach(history, newest.start(size)).missing
                }
            }
        }
    };
    let (have, pieces) = archive.pieces(segment).await?;
    let start = Start { segment, have, pieces };
    let is_current = segment.timeline == server.timeline;
    if is_current {
        check_not_behind(server, start.durable(size), in_recovery)?;
    } else if history.end_of(segment.timeline).is_err() {
        return Err(Error::refused(format!(
            "timeline {} is not in the history of the server's timeline {}",
            segment.timeline, server.timeline
        )));
    }
    Ok(start)
}

/// From where WAL must be continuous: the newest backup on this history, else the oldest WAL.
fn anchor(archive: &Archive, history: &History, coverage: &Coverage) -> Option<Lsn> {
    let belongs = |timeline: u32, lsn: Lsn| match history.end_of(timeline) {
        Ok(None) => true,
        Ok(Some(end)) => lsn <= end,
        Err(_) => false,
    };
    let backups = archive
        .backups
        .iter()
        .filter(|(timeline, stop)| belongs(*timeline, *stop));
    backups
        .map(|(_, stop)| Lsn(stop.0.saturating_sub(1)))
        .max()
        .or_else(|| coverage.oldest(history).map(|s| s.start(archive.segment_size)))
}
