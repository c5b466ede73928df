//! WAL along a history, as a recovery will read it: looked through before anything is restored.

use std::ops::ControlFlow;

use crate::error::Result;
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment};
use crate::postgres::walker::{Event, Record, Stop, WAL_PAGE, Walker, What};
use crate::wal::archive::Archive;

/// Segments before a backup that are asked for the newest commit.
const LOOK_BACK: usize = 16;

/// What a walk over WAL came to.
#[derive(Debug, Clone)]
pub struct Walked {
    /// Where the next record would begin.
    pub end: Lsn,
    /// Where the last complete record began.
    pub last_record: Option<Lsn>,
    /// Why it went no further, if it is not just that there is no more.
    pub stop: Option<Stop>,
}

/// Reads WAL summaries and content along a history.
pub struct Reader<'a> {
    archive: &'a Archive,
    history: &'a History,
}

impl<'a> Reader<'a> {
    /// A reader along `history`.
    pub fn new(archive: &'a Archive, history: &'a History) -> Self {
        Self { archive, history }
    }

    /// The segments that hold the bytes from `from` to `to`.
    pub fn segments(&self, from: Lsn, to: Lsn) -> Vec<Segment> {
        self.history.segments(from, to, self.archive.segment_size)
    }

    /// Content of a segment: the longest that a timeline of the history has, possibly cut short.
    pub async fn content(&self, segment: Segment) -> Result<Option<Vec<u8>>> {
        let size = self.archive.segment_size;
        let mut timelines = vec![segment.timeline];
        timelines.extend(
            self.history
                .ancestors
                .iter()
                .rev()
                .filter(|a| a.end > segment.start(size) && a.timeline < segment.timeline)
                .map(|a| a.timeline),
        );
        let mut best: Option<Vec<u8>> = None;
        for timeline in timelines {
            let Some(mut content) = self.archive.segment_or_parts(Segment { timeline, ..segment }).await? else {
                continue;
            };
            if let Ok(Some(end)) = self.history.end_of(timeline)
                && end < segment.end(size)
            {
                content.truncate(end.0.saturating_sub(segment.start(size).0) as usize);
            }
            if content.len() as u64 == size {
                return Ok(Some(content));
            }
            if best.as_ref().is_none_or(|best| best.len() < content.len()) {
                best = Some(content);
            }
        }
        Ok(best)
    }

    /// Walks the WAL from the segment of `from` to `to` and reports events.
    pub async fn walk(&self, from: Lsn, to: Lsn, mut on_event: impl FnMut(&Event)) -> Result<Walked> {
        self.walk_records(from, to, |record| {
            if let Some(event) = record.event() {
                on_event(&event);
            }
            ControlFlow::Continue(())
        })
        .await
    }

    /// The same for every record, until one of them is enough: then no further segment is fetched.
    pub async fn walk_records(
        &self,
        from: Lsn,
        to: Lsn,
        mut on_record: impl FnMut(&Record<'_>) -> ControlFlow<()>,
    ) -> Result<Walked> {
        let mut enough = false;
        let size = self.archive.segment_size;
        let mut walker: Option<Walker> = None;
        for segment in self.segments(from, to) {
            let Some(mut content) = self.content(segment).await? else {
                break;
            };
            let walker = walker.get_or_insert_with(|| Walker::new(segment.start(size), size));
            let full = content.len() as u64 == size;
            // A part may end inside a page: its last records count too.
            content.resize(content.len().next_multiple_of(WAL_PAGE), 0);
            walker.feed(&content, |record| {
                enough = enough || on_record(record).is_break();
            });
            if enough || walker.stopped().is_some() || !full {
                break;
            }
        }
        Ok(Walked {
            end: walker
                .as_ref()
                .map_or(from, |w| w.stopped().map_or(w.next_record(), |s| s.at)),
            last_record: walker.as_ref().and_then(Walker::last_record),
            stop: walker.and_then(|w| w.stopped().cloned()),
        })
    }

    /// The newest commit or abort that ends at or before `to`, looking at the segments from `from` on.
    pub async fn newest_commit(&self, from: Lsn, to: Lsn) -> Result<Option<i64>> {
        let mut newest = None;
        self.walk(from, to, |event| {
            if let What::TransactionEnd { time_us, .. } = event.what
                && event.end <= to
            {
                newest = newest.max(Some(time_us));
            }
        })
        .await?;
        Ok(newest)
    }

    /// The newest commit or abort in the archived segments before that of `lsn`, if one of the last few has any.
    pub async fn newest_commit_before(&self, lsn: Lsn) -> Result<Option<i64>> {
        let size = self.archive.segment_size;
        let mut number = lsn.0 / size;
        for _ in 0..LOOK_BACK {
            let Some(earlier) = number.checked_sub(1) else {
                return Ok(None);
            };
            number = earlier;
            let timeline = self.history.timeline_at(Lsn(number * size + size - 1));
            match self
                .archive
                .segment_header(Segment { timeline, number })
                .await?
                .and_then(|h| h.summary)
            {
                None => return Ok(None),
                Some(summary) if summary.max_time_us != 0 => return Ok(Some(summary.max_time_us)),
                Some(_) => {}
            }
        }
        Ok(None)
    }

    /// The first commit or abort that recovery to `time_us` must not replay, from `from` to `to`: where it ends.
    pub async fn first_commit_after(&self, time_us: i64, exclusive: bool, from: Lsn, to: Lsn) -> Result<Option<Lsn>> {
        let is_after = |at: i64| at > time_us || exclusive && at == time_us;
        let size = self.archive.segment_size;
        for segment in self.segments(from, to) {
            let header = self.archive.segment_header(segment).await?;
            let summary = header.and_then(|h| h.summary);
            let look = match &summary {
                // A record that crosses into the next segment is in neither summary.
                Some(s) => is_after(s.max_time_us) || s.unfinished && s.unfinished_rmgr <= 2 || s.stopped_at != 0,
                None => true,
            };
            if !look {
                continue;
            }
            let end = segment.next().end(size).min(Lsn(to.0.max(segment.end(size).0)));
            let mut found = None;
            self.walk(segment.start(size).max(from), end, |event| {
                if let What::TransactionEnd { time_us: at, .. } = event.what
                    && is_after(at)
                    && event.lsn >= from
                    && found.is_none()
                {
                    found = Some(event.end);
                }
            })
            .await?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}
