//! Where to begin: where the repository has its oldest hole that the server can still fill, else exactly
//! where the repository ends.

use std::collections::BTreeSet;

use super::check_not_behind;
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment};
use crate::replication::connection::SystemIdentity;
use crate::wal::archive::Archive;
use crate::wal::coverage::Coverage;
use crate::wal::known::Known;

/// The first segment to receive, from its beginning.
pub struct Start {
    /// Segment.
    pub segment: Segment,
    /// What is stored of it already.
    pub known: Known,
    /// Numbers of segments of its timeline of which anything is there: compared when they come again.
    pub there: BTreeSet<u64>,
    /// Why here.
    pub why: Why,
}

/// What a start is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The repository ends here.
    End,
    /// The last whole segment: what the server has must be the same.
    Compare,
    /// WAL is missing from here on, and later WAL is there.
    Hole {
        /// The newest backup does not need it.
        before_backup: bool,
    },
}

impl Start {
    /// Up to where WAL is durable. Pieces, though they be all of a segment, do not make it one.
    pub fn durable(&self, segment_size: u64) -> Lsn {
        let known = Lsn(self.segment.start(segment_size).0 + self.known.end as u64);
        match self.known.is_whole {
            true => known,
            false => known.min(Lsn(self.segment.end(segment_size).0 - 1)),
        }
    }
}

/// What the attempts before this one have found out.
#[derive(Debug, Default)]
pub struct Lessons {
    /// Segments that the server no longer has.
    pub removed: BTreeSet<(u32, u64)>,
    /// Segments that are to be asked for later, because the server is away.
    pub postponed: BTreeSet<(u32, u64)>,
}

impl Lessons {
    fn is_removed(&self, segment: Segment) -> bool {
        let key = (segment.timeline, segment.number);
        self.removed.contains(&key) || self.postponed.contains(&key)
    }
}

/// Finds it.
pub async fn find(archive: &Archive, history: &History, server: &SystemIdentity, lessons: &Lessons) -> Result<Start> {
    let size = archive.segment_size;
    let coverage = Coverage::read(archive).await?;
    let now = Segment::of(server.timeline, server.flush, size);
    let (mut segment, mut why) = match coverage.oldest(history) {
        // Nothing is there: from the segment that is being written.
        None => (now, Why::End),
        Some(oldest) => first_to_receive(archive, &coverage, history, oldest, lessons).unwrap_or((now, Why::End)),
    };
    let mut known = Known::pieces(archive, segment).await?;
    if why == Why::End && known.end == 0 {
        let previous = segment
            .number
            .checked_sub(1)
            .map(|number| Segment { number, ..segment });
        let comparable = previous.filter(|p| !lessons.is_removed(*p) && coverage.has_whole(p.timeline, p.number));
        if let Some(previous) = comparable
            && let Some((epoch, header)) = archive.segment_stored(previous).await?
        {
            (segment, why) = (previous, Why::Compare);
            known = Known::whole(archive, epoch, &header)?;
        }
    }
    Ok(Start {
        there: there(&coverage, segment),
        segment,
        known,
        why,
    })
}

/// At `segment`, wherever the repository ends: what is stored of it is compared.
pub async fn at(archive: &Archive, segment: Segment) -> Result<Start> {
    let coverage = Coverage::read_from(archive, segment.number).await?;
    Ok(Start {
        there: there(&coverage, segment),
        known: Known::of(archive, segment).await?,
        segment,
        why: Why::End,
    })
}

fn there(coverage: &Coverage, segment: Segment) -> BTreeSet<u64> {
    let wal = coverage.timelines.get(&segment.timeline);
    wal.map(|wal| wal.segments.union(&wal.parts).copied().collect())
        .unwrap_or_default()
}

/// Fails if the server cannot be the one that the stored WAL is of.
pub fn check(
    start: &Start,
    history: &History,
    server: &SystemIdentity,
    in_recovery: bool,
    segment_size: u64,
) -> Result<()> {
    let timeline = start.segment.timeline;
    if timeline == server.timeline {
        return check_not_behind(server, start.durable(segment_size), in_recovery, "the repository");
    }
    match history.end_of(timeline) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::refused(format!(
            "timeline {timeline} is not in the history of the server's timeline {}",
            server.timeline
        ))),
    }
}

/// `None` if the server no longer has what would come next.
fn first_to_receive(
    archive: &Archive,
    coverage: &Coverage,
    history: &History,
    oldest: Segment,
    lessons: &Lessons,
) -> Option<(Segment, Why)> {
    let size = archive.segment_size;
    let backup = newest_backup(archive, history).unwrap_or_default();
    let mut from = oldest.start(size);
    loop {
        let missing = coverage.reach(history, from).missing;
        let next = coverage.next_any(history, missing.number + 1);
        if !lessons.is_removed(missing) {
            let before_backup = missing.end(size) <= backup;
            return Some((missing, next.map_or(Why::End, |_| Why::Hole { before_backup })));
        }
        from = Lsn(next?.saturating_mul(size));
    }
}

/// Where the newest backup of a history ended.
fn newest_backup(archive: &Archive, history: &History) -> Option<Lsn> {
    let belongs = |timeline: u32, lsn: Lsn| match history.end_of(timeline) {
        Ok(None) => true,
        Ok(Some(end)) => lsn <= end,
        Err(_) => false,
    };
    let backups = archive.backups.iter();
    backups
        .filter(|(timeline, stop)| belongs(*timeline, *stop))
        .map(|(_, stop)| *stop)
        .max()
}
