//! Which WAL is needed, and which has expired.
//!
//! What always holds: what a kept backup needs for itself stays; after a backup from which recovery goes on, all WAL
//! stays, along every timeline that leads on from there; the newest timeline of the newest cluster loses nothing from
//! its newest backup on, and nothing at all as long as no backup leads to it; where a history is not known, nothing
//! expires that could belong to it.

use std::collections::BTreeMap;

use fairvault_format::proto::{BackupInfo, ExpiredWal};

use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment};
use crate::wal::coverage::Coverage;

/// A backup that is kept.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Its facts.
    pub info: BackupInfo,
    /// Recovery into later WAL starts from it.
    pub goes_on: bool,
}

/// Numbers of the segments that are needed: per timeline, ranges from the first to the last.
#[derive(Debug, Default)]
pub struct Needed {
    ranges: BTreeMap<u32, Vec<(u64, u64)>>,
    segment_size: u64,
}

impl Needed {
    /// What kept backups of one incarnation need; else, why that is not known.
    pub fn of<'a>(coverage: &Coverage, kept: impl IntoIterator<Item = &'a Kept>) -> Result<Self, String> {
        let mut this = Self {
            segment_size: coverage.segment_size,
            ..Self::default()
        };
        for Kept { info, goes_on } in kept {
            let (start, stop) = (Lsn(info.start_lsn), Lsn(info.stop_lsn));
            let timeline = info.stop_timeline;
            let first = History {
                timeline: 1,
                ancestors: Vec::new(),
            };
            let known = coverage.timelines.get(&timeline).and_then(|wal| wal.history.as_ref());
            let own = known.or((timeline == 1).then_some(&first)).ok_or_else(|| {
                format!(
                    "the history of timeline {timeline} is not known, and backup {} is on it",
                    info.id
                )
            })?;
            this.add(own, start, stop);
            if *goes_on {
                this.add(own, start, Lsn(u64::MAX));
                for history in coverage.leading_from(timeline, stop) {
                    this.add(history, start, Lsn(u64::MAX));
                }
            }
        }
        for ranges in this.ranges.values_mut() {
            ranges.sort_unstable();
            let mut joined: Vec<(u64, u64)> = Vec::new();
            for &(first, last) in ranges.iter() {
                match joined.last_mut() {
                    Some((_, end)) if first <= end.saturating_add(1) => *end = (*end).max(last),
                    _ => joined.push((first, last)),
                }
            }
            *ranges = joined;
        }
        Ok(this)
    }

    /// What lies between two positions along a history; between equal ones, nothing. A segment in which it leaves a timeline is needed of both.
    fn add(&mut self, history: &History, from: Lsn, to: Lsn) {
        let ancestors = history.ancestors.iter().map(|ancestor| ancestor.timeline);
        for timeline in ancestors.chain([history.timeline]) {
            let start = history.start_of(timeline).unwrap_or_default().max(from);
            let end = history.end_of(timeline).ok().flatten().unwrap_or(to).min(to);
            if start < end {
                let range = (start.0 / self.segment_size, (end.0 - 1) / self.segment_size);
                self.ranges.entry(timeline).or_default().push(range);
            }
        }
    }

    /// Whether a segment is needed.
    pub fn has(&self, segment: Segment) -> bool {
        let ranges = self.ranges.get(&segment.timeline).map_or(&[][..], Vec::as_slice);
        let after = ranges.partition_point(|(first, _)| *first <= segment.number);
        after > 0 && segment.number <= ranges[after - 1].1
    }

    /// Numbers of a timeline that are not needed: the first, and the one behind the last.
    fn rest(&self, timeline: u32, limit: u64) -> Vec<(u64, u64)> {
        let mut rest = Vec::new();
        let mut from = 0;
        for &(first, last) in self.ranges.get(&timeline).map_or(&[][..], Vec::as_slice) {
            rest.push((from, first.min(limit)));
            from = last.saturating_add(1);
        }
        rest.push((from, limit));
        rest.retain(|(from, to)| from < to);
        rest
    }
}

/// WAL that expires, and how many segments of it are there.
#[derive(Debug, Clone, PartialEq)]
pub struct Expiring {
    /// What the log will say.
    pub wal: ExpiredWal,
    /// Segments, and segments of which there are parts.
    pub segments: u64,
}

/// What expires of one incarnation's WAL; else, why nothing does. `is_newest` if the cluster of the incarnation is the
/// one that lives, or may be.
pub fn expiring(
    coverage: &Coverage,
    kept: &[Kept],
    system_identifier: u64,
    is_newest: bool,
) -> Result<Vec<Expiring>, String> {
    if kept.is_empty() && is_newest {
        return Err("there is no backup of this cluster".to_owned());
    }
    let needed = Needed::of(coverage, kept)?;
    let leads_to = |timeline: u32| {
        let mut going_on = kept.iter().filter(|kept| kept.goes_on);
        going_on.any(|Kept { info, .. }| {
            let mut histories = coverage.leading_from(info.stop_timeline, Lsn(info.stop_lsn));
            histories.any(|history| history.timeline == timeline)
        })
    };
    let newest = coverage.timelines.keys().next_back().copied();
    let mut all = Vec::new();
    for (&timeline, wal) in &coverage.timelines {
        let is_last = newest == Some(timeline);
        let is_lived = is_last && is_newest;
        if wal.history.is_none() || is_lived && !leads_to(timeline) {
            continue;
        }
        // Of a timeline that was left, what is not complete may be what somebody is still writing.
        let (last, part) = (wal.segments.last(), wal.parts.last());
        let last = if kept.is_empty() { last.max(part) } else { last };
        let limit = last.map_or(0, |last| last.saturating_add(1));
        for (from, to) in needed.rest(timeline, limit) {
            let there: Vec<u64> = wal
                .segments
                .range(from..to)
                .chain(wal.parts.range(from..to))
                .copied()
                .collect();
            let Some(last) = there.iter().max() else {
                continue;
            };
            let (from_lsn, to_lsn) = (
                from.saturating_mul(coverage.segment_size),
                (last + 1).saturating_mul(coverage.segment_size),
            );
            all.push(Expiring {
                segments: there.len() as u64,
                wal: ExpiredWal {
                    system_identifier,
                    timeline,
                    from_lsn,
                    to_lsn,
                    reason: "no backup that is kept needs it".to_owned(),
                    bytes: (there.len() as u64).saturating_mul(coverage.segment_size),
                },
            });
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::segment::Ancestor;
    use crate::wal::coverage::TimelineWal;

    const SIZE: u64 = 100;

    fn timeline(number: u32, ancestors: &[(u32, u64)], segments: std::ops::Range<u64>) -> (u32, TimelineWal) {
        let ancestors = ancestors.iter().map(|&(timeline, end)| Ancestor {
            timeline,
            end: Lsn(end),
        });
        let wal = TimelineWal {
            segments: segments.collect(),
            history: Some(History {
                timeline: number,
                ancestors: ancestors.collect(),
            }),
            ..TimelineWal::default()
        };
        (number, wal)
    }

    fn backup(timeline: u32, start: u64, stop: u64, goes_on: bool) -> Kept {
        Kept {
            info: BackupInfo {
                stop_timeline: timeline,
                start_lsn: start,
                stop_lsn: stop,
                ..BackupInfo::default()
            },
            goes_on,
        }
    }

    fn expire(timelines: &[(u32, TimelineWal)], kept: &[Kept]) -> Vec<(u32, u64, u64)> {
        let coverage = Coverage::of(SIZE, timelines.iter().cloned().collect());
        let all = expiring(&coverage, kept, 7, true).unwrap();
        all.iter()
            .map(|e| (e.wal.timeline, e.wal.from_lsn / SIZE, e.wal.to_lsn / SIZE))
            .collect()
    }

    #[test]
    fn what_lies_before_the_oldest_backup_goes() {
        let one = [timeline(1, &[], 1..20)];
        assert_eq!(expire(&one, &[backup(1, 550, 620, true)]), [(1, 0, 5)]);
        assert_eq!(expire(&one, &[backup(1, 10, 50, true)]), []);
    }

    #[test]
    fn a_backup_without_later_wal_is_an_island() {
        let one = [timeline(1, &[], 1..20)];
        let kept = [backup(1, 310, 420, false), backup(1, 1010, 1050, true)];
        assert_eq!(expire(&one, &kept), [(1, 0, 3), (1, 5, 10)]);
        // What is not there any more is not said again.
        let left = [timeline(1, &[], 10..20)];
        assert_eq!(expire(&left, &kept), []);
    }

    #[test]
    fn a_promotion_is_followed() {
        // Timeline 2 left 1 at 550; what 1 had beyond that is of no use once only backups of 2 are kept.
        let both = [timeline(1, &[], 1..9), timeline(2, &[(1, 550)], 5..20)];
        assert_eq!(expire(&both, &[backup(1, 210, 240, true)]), [(1, 0, 2)]);
        assert_eq!(expire(&both, &[backup(2, 710, 740, true)]), [(1, 0, 9), (2, 0, 7)]);
        // A backup of 1 from behind the switch leads to nowhere but 1: nothing leads to the newest timeline.
        assert_eq!(expire(&both, &[backup(1, 610, 640, true)]), [(1, 0, 6)]);
    }

    #[test]
    fn recovery_to_an_earlier_point_leaves_a_branch() {
        // From 350 on, timeline 2 went another way, and has no backup yet.
        let both = [timeline(1, &[], 1..30), timeline(2, &[(1, 350)], 3..6)];
        let (old, later) = (backup(1, 210, 240, true), backup(1, 1010, 1040, true));
        assert_eq!(expire(&both, &[old.clone(), later.clone()]), [(1, 0, 2)]);
        // Without the one that leads to it, timeline 2 is still left alone.
        assert_eq!(expire(&both, &[later]), [(1, 0, 10)]);
        // A backup of its own: the branch that was left goes, as far as it is complete.
        assert_eq!(expire(&both, &[backup(2, 410, 440, true)]), [(1, 0, 30), (2, 0, 4)]);
        // The old one as an island.
        let island = backup(1, 210, 240, false);
        assert_eq!(
            expire(&both, &[island, backup(2, 410, 440, true)]),
            [(1, 0, 2), (1, 3, 30), (2, 0, 4)]
        );
    }

    #[test]
    fn what_is_not_known_stays() {
        let mut unknown = timeline(2, &[(1, 350)], 3..6);
        unknown.1.history = None;
        let timelines = [timeline(1, &[], 1..9), unknown, timeline(3, &[(1, 450)], 4..9)];
        assert_eq!(expire(&timelines, &[backup(3, 710, 720, true)]), [(1, 0, 9), (3, 0, 7)]);
        let coverage = Coverage::of(SIZE, timelines.into_iter().collect());
        assert!(expiring(&coverage, &[backup(2, 400, 420, true)], 7, true).is_err());
        assert!(expiring(&coverage, &[], 7, true).is_err());
        // Of a cluster that was upgraded and has no backup any more, nothing is of use, but what is not known.
        let all = expiring(&coverage, &[], 7, false).unwrap();
        assert_eq!(all.iter().map(|e| e.wal.timeline).collect::<Vec<_>>(), [1, 3]);
    }
}
