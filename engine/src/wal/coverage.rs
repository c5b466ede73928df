//! What WAL the repository has: per timeline, with gaps, and along a history.

use std::collections::{BTreeMap, BTreeSet};

use fairvault_format::names;

use super::archive::Archive;
use crate::error::Result;
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment, WalFile};

/// The WAL of one timeline.
#[derive(Debug, Default, Clone)]
pub struct TimelineWal {
    /// Numbers of complete segments.
    pub segments: BTreeSet<u64>,
    /// Segments of which there are pieces or a partial file.
    pub parts: BTreeSet<u64>,
    /// Its history.
    pub history: History,
    /// Stored bytes.
    pub stored_bytes: u64,
}

impl TimelineWal {
    /// Continuous ranges of complete segments: first and last number of each.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let mut out: Vec<(u64, u64)> = Vec::new();
        for &number in &self.segments {
            match out.last_mut() {
                Some((_, last)) if *last + 1 == number => *last = number,
                _ => out.push((number, number)),
            }
        }
        out
    }
}

/// All WAL of an incarnation.
#[derive(Debug, Default, Clone)]
pub struct Coverage {
    /// By timeline.
    pub timelines: BTreeMap<u32, TimelineWal>,
    /// wal_segment_size, bytes.
    pub segment_size: u64,
}

/// How far WAL goes without a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// End of the last segment that is there.
    pub end: Lsn,
    /// The segment that comes next and is not there.
    pub missing: Segment,
    /// Something later on this history is there: a hole, not the end.
    pub is_hole: bool,
}

impl Coverage {
    /// Lists what is there.
    pub async fn read(archive: &Archive) -> Result<Self> {
        let folder = format!("{}/{:016x}", names::WAL, archive.system_identifier);
        let mut this = Self {
            segment_size: archive.segment_size,
            ..Default::default()
        };
        for (object, size) in archive.stanza.store().list(&folder).await? {
            let rest: Vec<&str> = object[folder.len() + 1..].split('/').collect();
            let Some(timeline) = rest.first().and_then(|t| u32::from_str_radix(t, 16).ok()) else {
                continue;
            };
            let wal = this.timelines.entry(timeline).or_default();
            wal.history.timeline = timeline;
            wal.stored_bytes += size;
            match rest.as_slice() {
                [_, file] => {
                    let Some((name, _)) = names::parse_wal_file(file) else {
                        continue;
                    };
                    match WalFile::parse(name, archive.segment_size) {
                        Ok(WalFile::Segment(segment)) => _ = wal.segments.insert(segment.number),
                        Ok(WalFile::Partial(segment)) => _ = wal.parts.insert(segment.number),
                        _ => {}
                    }
                }
                [_, folder, _] => {
                    let name = folder.trim_end_matches(".d");
                    if let Ok(WalFile::Segment(segment)) = WalFile::parse(name, archive.segment_size) {
                        wal.parts.insert(segment.number);
                    }
                }
                _ => {}
            }
        }
        for (&timeline, wal) in &mut this.timelines {
            if let Some(history) = archive.history(timeline).await? {
                wal.history = history;
            }
        }
        Ok(this)
    }

    fn has(&self, timeline: u32, number: u64) -> bool {
        self.timelines
            .get(&timeline)
            .is_some_and(|t| t.segments.contains(&number) || t.parts.contains(&number))
    }

    /// Timelines that a segment may be read from along `history`, newest first.
    fn candidates(&self, history: &History, number: u64) -> Vec<u32> {
        let start = Lsn(number * self.segment_size);
        let last = Lsn(start.0 + self.segment_size - 1);
        let mut out = vec![history.timeline_at(last)];
        out.extend(
            history
                .ancestors
                .iter()
                .rev()
                .filter(|a| a.end > start && a.end <= last)
                .map(|a| a.timeline),
        );
        out.dedup();
        out
    }

    /// How far recovery along `history` gets from `from` on.
    pub fn reach(&self, history: &History, from: Lsn) -> Reach {
        let mut number = from.0 / self.segment_size;
        loop {
            let candidates = self.candidates(history, number);
            if !candidates.iter().any(|&t| self.has(t, number)) {
                break;
            }
            number += 1;
        }
        let missing = Segment {
            timeline: self.candidates(history, number)[0],
            number,
        };
        let is_hole = self.timelines.iter().any(|(&timeline, wal)| {
            let end = history.end_of(timeline);
            let last = wal.segments.iter().chain(&wal.parts).max();
            match (end, last) {
                (Ok(None), Some(&last)) => last > number,
                (Ok(Some(end)), Some(&last)) => last.min((end.0 - 1) / self.segment_size) > number,
                _ => false,
            }
        });
        Reach {
            end: missing.start(self.segment_size),
            missing,
            is_hole,
        }
    }
}
