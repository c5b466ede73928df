//! Where WAL is complete and still cannot be replayed: spells of wal_level = minimal.
//!
//! Archived segments never change, so what their headers said is remembered on this host, and a long archive is
//! looked through once. A record that lies across two segments is left to `restore`, which walks both.

use std::collections::{BTreeMap, BTreeSet};

use futures::StreamExt;
use serde::{Deserialize, Serialize};

use crate::error::{Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment};
use crate::wal::archive::Archive;

/// Headers that are fetched at once.
const PARALLEL: usize = 32;
const FILE: &str = "wal-breaks";

/// What is known of one timeline.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Known {
    /// Ranges of segments that were looked at: first and last number.
    seen: Vec<(u64, u64)>,
    /// Positions of changes to wal_level = minimal.
    minimal: BTreeSet<u64>,
}

impl Known {
    fn has_seen(&self, number: u64) -> bool {
        let after = self.seen.partition_point(|(first, _)| *first <= number);
        after > 0 && number <= self.seen[after - 1].1
    }

    fn see(&mut self, numbers: BTreeSet<u64>) {
        let ranges = std::mem::take(&mut self.seen);
        let all: BTreeSet<(u64, u64)> = ranges.into_iter().chain(numbers.into_iter().map(|n| (n, n))).collect();
        for (first, last) in all {
            match self.seen.last_mut() {
                Some((_, end)) if *end + 1 >= first => *end = (*end).max(last),
                _ => self.seen.push((first, last)),
            }
        }
    }
}

/// What this host knows of an archive.
#[derive(Debug, Default)]
pub struct Breaks {
    timelines: BTreeMap<u32, Known>,
    file: String,
}

impl Breaks {
    /// What is remembered.
    pub fn load(archive: &Archive) -> Self {
        // Another archive epoch may give a name another content.
        let newest = archive.epochs.iter().map(|e| e.epoch).max().unwrap_or(1);
        let file = format!("{FILE}-{:016x}-{newest}", archive.system_identifier);
        let stanza = &archive.stanza;
        let text = stanza.memory().and_then(|memory| memory.note(stanza, &file));
        let timelines = text.and_then(|text| serde_json::from_slice(&text).ok());
        Self {
            timelines: timelines.unwrap_or_default(),
            file,
        }
    }

    /// The first position from `from` on, and before `to`, that recovery along `history` cannot cross.
    pub async fn first(&mut self, archive: &Archive, history: &History, from: Lsn, to: Lsn) -> Result<Option<Lsn>> {
        let segments = history.segments(from, to, archive.segment_size);
        let unseen: Vec<Segment> = segments
            .into_iter()
            .filter(|s| {
                !self
                    .timelines
                    .get(&s.timeline)
                    .is_some_and(|known| known.has_seen(s.number))
            })
            .collect();
        let is_news = !unseen.is_empty();
        let mut headers = futures::stream::iter(unseen)
            .map(|segment| async move { (segment, archive.segment_header(segment).await) })
            .buffer_unordered(PARALLEL);
        let mut seen: BTreeMap<u32, BTreeSet<u64>> = BTreeMap::new();
        while let Some((segment, header)) = headers.next().await {
            match header {
                Ok(Some(header)) => {
                    let known = self.timelines.entry(segment.timeline).or_default();
                    let changes = header.summary.unwrap_or_default().parameter_changes;
                    let minimal = changes.iter().filter(|change| change.wal_level == 0);
                    known.minimal.extend(minimal.map(|change| change.lsn));
                    seen.entry(segment.timeline).or_default().insert(segment.number);
                }
                // Not stored as a whole: to be looked at again.
                Ok(None) => {}
                Err(error) if error.kind() == Kind::Temporary => return Err(error),
                Err(error) => tracing::warn!("{} cannot be read: {error}", segment.name(archive.segment_size)),
            }
        }
        for (timeline, numbers) in seen {
            self.timelines.entry(timeline).or_default().see(numbers);
        }
        if is_news
            && let Some(memory) = archive.stanza.memory()
            && let Ok(text) = serde_json::to_vec(&self.timelines)
        {
            memory.take_note(&archive.stanza, &self.file, &text);
        }
        let belongs = |timeline: u32, lsn: Lsn| match history.end_of(timeline) {
            Ok(end) => end.is_none_or(|end| lsn < end) && history.start_of(timeline).is_none_or(|start| lsn >= start),
            Err(_) => false,
        };
        let all = self.timelines.iter().flat_map(|(&timeline, known)| {
            let positions = known.minimal.iter().map(|&lsn| Lsn(lsn));
            positions.filter(move |&lsn| lsn >= from && lsn < to && belongs(timeline, lsn))
        });
        Ok(all.min())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_grow_together() {
        let mut known = Known::default();
        known.see([3, 4, 5, 9].into());
        assert_eq!(known.seen, [(3, 5), (9, 9)]);
        known.see([6, 8, 7, 1].into());
        assert_eq!(known.seen, [(1, 1), (3, 9)]);
        assert!(known.has_seen(1) && !known.has_seen(2) && known.has_seen(9) && !known.has_seen(10));
    }
}
