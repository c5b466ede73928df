//! What WAL the repository has: per timeline, with gaps, and along a history.

use std::collections::{BTreeMap, BTreeSet};

use fairvault_format::names;
use fairvault_format::proto::BackupInfo;

use super::archive::Archive;
use crate::error::{Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment, WalFile};

/// The WAL of one timeline.
#[derive(Debug, Default, Clone)]
pub struct TimelineWal {
    /// Numbers of complete segments.
    pub segments: BTreeSet<u64>,
    /// Segments of which there are pieces or a partial file.
    pub parts: BTreeSet<u64>,
    /// Its history; `None` if there is none, or if it cannot be read.
    pub history: Option<History>,
    /// Why the history cannot be read, if that is so.
    pub history_problem: Option<String>,
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

    /// The newest segment of which anything is there.
    fn last(&self) -> Option<u64> {
        self.segments.last().max(self.parts.last()).copied()
    }
}

/// All WAL of an incarnation.
#[derive(Debug, Default, Clone)]
pub struct Coverage {
    /// By timeline.
    pub timelines: BTreeMap<u32, TimelineWal>,
    /// wal_segment_size, bytes.
    pub segment_size: u64,
    /// Timelines and positions up to which WAL was once there, because a backup says so.
    proven: Vec<(u32, Lsn)>,
    /// What has expired, of every repository: timeline, first and last position.
    expired: Vec<(u32, Lsn, Lsn)>,
}

/// Everything of an incarnation.
fn folder(archive: &Archive) -> String {
    format!("{}/{:016x}", names::WAL, archive.system_identifier)
}

fn ranges(archive: &Archive) -> impl Iterator<Item = (u32, Lsn, Lsn)> {
    let all = archive.expired.iter();
    all.map(|wal| (wal.timeline, Lsn(wal.from_lsn), Lsn(wal.to_lsn)))
}

/// How far WAL goes without a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// End of the last segment that is there as a whole.
    pub end: Lsn,
    /// The segment that comes next and is not there as a whole.
    pub missing: Segment,
    /// A part of it is there: how far that goes, its content tells.
    pub has_part: bool,
    /// WAL of this history beyond that segment is, or once was, there: a hole, not the end.
    pub is_hole: bool,
    /// That segment is not there because it has expired.
    pub is_expired: bool,
    /// The last one that is missing, if there is a next one.
    pub last_missing: Segment,
}

impl Coverage {
    /// Of timelines that are known already.
    pub fn of(segment_size: u64, timelines: BTreeMap<u32, TimelineWal>) -> Self {
        Self {
            timelines,
            segment_size,
            ..Default::default()
        }
    }

    /// Lists what is there.
    pub async fn read(archive: &Archive) -> Result<Self> {
        let mut this = Self::empty(archive);
        let folder = folder(archive);
        for (object, size) in archive.stanza.store().list(&folder).await? {
            this.add(archive, &object, size);
        }
        for other in &archive.others {
            match other.stanza.store().list(&folder).await {
                Ok(listed) => listed.iter().for_each(|(object, size)| this.add(other, object, *size)),
                Err(error) => tracing::warn!("WAL in {} does not count: {error}", other.stanza.shown()),
            }
            this.proven.extend(&other.backups);
            this.expired.extend(ranges(other));
        }
        this.read_histories(archive).await?;
        Ok(this)
    }

    /// The same with WAL that has expired, as far as it is still there.
    pub async fn read_with_expired(archive: &Archive) -> Result<Self> {
        let this = Self::read(&archive.clone().with_expired()).await?;
        // It still says why the rest is not.
        let expired = archive.all().flat_map(ranges).collect();
        Ok(Self { expired, ..this })
    }

    /// The same from a segment on: one request a timeline where there is little behind it.
    pub async fn read_from(archive: &Archive, number: u64) -> Result<Self> {
        let mut this = Self::empty(archive);
        let folder = folder(archive);
        // One that cannot be read is an error: what it has may be what tells a hole from the end.
        for one in archive.all() {
            let store = one.stanza.store();
            for name in store.folder(&folder).folders().await? {
                let Ok(timeline) = u32::from_str_radix(&name, 16) else {
                    continue;
                };
                this.timelines.entry(timeline).or_default();
                let first = Segment { timeline, number }.name(archive.segment_size);
                let of_timeline = format!("{folder}/{name}");
                let listed = store
                    .list_after(&of_timeline, &format!("{of_timeline}/{first}"), &of_timeline)
                    .await?;
                for object in listed {
                    this.add(one, &object, 0);
                }
            }
        }
        for other in &archive.others {
            this.proven.extend(&other.backups);
            this.expired.extend(ranges(other));
        }
        this.read_histories(archive).await?;
        Ok(this)
    }

    /// Of each backup of a timeline and the next one: whether the WAL between them is there. Then it was archived for its
    /// own sake, not only with backups, and a hole is a loss. What a backup streams beyond its end reaches no other one.
    pub fn bridges<'a>(&self, timeline: u32, backups: impl Iterator<Item = &'a BackupInfo>) -> Vec<bool> {
        let of_timeline = backups.filter(|b| (b.start_timeline, b.stop_timeline) == (timeline, timeline));
        let mut ranges: Vec<(u64, u64)> = of_timeline
            .map(|b| {
                (
                    b.start_lsn / self.segment_size,
                    b.stop_lsn.saturating_sub(1) / self.segment_size,
                )
            })
            .collect();
        ranges.sort_unstable();
        // One that lies within, or begins before the end of, another one brings nothing of its own.
        ranges.dedup_by(|next, before| {
            let is_within = next.0 <= before.1 + 1;
            before.1 = before.1.max(if is_within { next.1 } else { 0 });
            is_within
        });
        let between = ranges.windows(2).map(|pair| pair[0].1 + 1..pair[1].0);
        between
            .map(|mut numbers| numbers.all(|number| self.has_whole(timeline, number)))
            .collect()
    }

    fn empty(archive: &Archive) -> Self {
        Self {
            segment_size: archive.segment_size,
            proven: archive.backups.clone(),
            expired: ranges(archive).collect(),
            ..Default::default()
        }
    }

    /// Adds an object. Of a segment, only what stands under the ruling archive epoch counts, and has not expired.
    fn add(&mut self, archive: &Archive, object: &str, size: u64) {
        let Some(names::WalName {
            timeline,
            file: name,
            epoch,
            is_piece,
            ..
        }) = names::parse_wal(object)
        else {
            return;
        };
        let wal = self.timelines.entry(timeline).or_default();
        wal.stored_bytes += size;
        let Ok(WalFile::Segment(segment) | WalFile::Partial(segment)) = WalFile::parse(name, self.segment_size) else {
            return;
        };
        if epoch != archive.epoch(timeline, segment.start(self.segment_size)) || archive.is_expired(segment) {
            return;
        }
        match is_piece || name.len() != 24 {
            true => _ = wal.parts.insert(segment.number),
            false => _ = wal.segments.insert(segment.number),
        }
    }

    async fn read_histories(&mut self, archive: &Archive) -> Result<()> {
        for (&timeline, wal) in &mut self.timelines {
            // A history that is damaged matters only to who follows it.
            match archive.history(timeline).await {
                Ok(history) => wal.history = history,
                Err(error) if error.kind() == Kind::Temporary => return Err(error),
                Err(error) => wal.history_problem = Some(error.to_string()),
            }
        }
        Ok(())
    }

    /// The histories that are known.
    pub fn histories(&self) -> impl DoubleEndedIterator<Item = &History> {
        self.timelines.values().filter_map(|wal| wal.history.as_ref())
    }

    /// The histories that lead on from a backup that ended at `stop` of `timeline`.
    pub fn leading_from(&self, timeline: u32, stop: Lsn) -> impl DoubleEndedIterator<Item = &History> {
        self.histories().filter(move |history| match history.end_of(timeline) {
            Ok(end) => end.is_none_or(|end| end >= stop),
            Err(_) => false,
        })
    }

    /// The oldest segment along a history from which on WAL should be continuous, of those of which anything is there:
    /// before it, WAL may have expired but for what single backups need.
    pub fn oldest(&self, history: &History) -> Option<Segment> {
        let expired = self.expired.iter().filter_map(|(timeline, from, to)| {
            let end = history.end_of(*timeline).ok()?.unwrap_or(Lsn(u64::MAX));
            (*from < end).then_some((*to).min(end).0 / self.segment_size)
        });
        let number = expired.max().unwrap_or(0);
        self.along(history, |wal| {
            let first = [&wal.segments, &wal.parts].map(|known| known.range(number..).next().copied());
            first.into_iter().flatten().min()
        })
        .min_by_key(|segment| segment.number)
    }

    /// Whether a segment is absent because it has expired.
    pub fn is_expired(&self, segment: Segment) -> bool {
        let (start, end) = (segment.start(self.segment_size), segment.end(self.segment_size));
        let mut expired = self.expired.iter();
        expired.any(|(timeline, from, to)| *timeline == segment.timeline && *from <= start && end <= *to)
    }

    /// One segment of each timeline of a history, as far as it belongs to it.
    fn along(&self, history: &History, choose: impl Fn(&TimelineWal) -> Option<u64>) -> impl Iterator<Item = Segment> {
        self.timelines.iter().filter_map(move |(&timeline, wal)| {
            let end = history.end_of(timeline).ok()?;
            let number = choose(wal)?;
            let limit = end.map_or(u64::MAX, |end| end.0.saturating_sub(1) / self.segment_size);
            (number <= limit).then_some(Segment { timeline, number })
        })
    }

    /// Whether a segment is there as a whole.
    pub fn has_whole(&self, timeline: u32, number: u64) -> bool {
        self.timelines
            .get(&timeline)
            .is_some_and(|t| t.segments.contains(&number))
    }

    /// Whether something of segment `number` is there on any timeline that it can be read from along `history`.
    fn has_part(&self, history: &History, number: u64) -> bool {
        let start = Lsn(number.saturating_mul(self.segment_size));
        let last = Lsn(start.0.saturating_add(self.segment_size - 1));
        let owner = history.timeline_at(last);
        let switched_inside = history
            .ancestors
            .iter()
            .filter(|a| a.end > start && a.end <= last)
            .map(|a| a.timeline);
        let has = |timeline: u32| {
            self.timelines
                .get(&timeline)
                .is_some_and(|t| t.segments.contains(&number) || t.parts.contains(&number))
        };
        std::iter::once(owner).chain(switched_inside).any(has)
    }

    /// The first segment from `number` on of which anything is there, along `history`.
    pub fn next_any(&self, history: &History, number: u64) -> Option<u64> {
        let firsts = self.timelines.iter().filter_map(|(&timeline, wal)| {
            let end = history.end_of(timeline).ok()?;
            let begin = history.start_of(timeline).map_or(0, |lsn| lsn.0 / self.segment_size);
            let from = number.max(begin);
            let first = [&wal.segments, &wal.parts].map(|known| known.range(from..).next().copied());
            let first = first.into_iter().flatten().min()?;
            // Of a timeline that ended, only segments that it filled lead on.
            let filled = end.map_or(u64::MAX, |end| end.0 / self.segment_size);
            (first < filled).then_some(first)
        });
        firsts.min()
    }

    /// How far recovery along `history` gets from `from` on.
    pub fn reach(&self, history: &History, from: Lsn) -> Reach {
        let mut number = from.0 / self.segment_size;
        let owner = |number: u64| {
            history.timeline_at(Lsn(number
                .saturating_add(1)
                .saturating_mul(self.segment_size)
                .saturating_sub(1)))
        };
        // Only what its last byte belongs to leads on to the next segment.
        while self.has_whole(owner(number), number) {
            number += 1;
        }
        let missing = Segment {
            timeline: owner(number),
            number,
        };
        let next = self.next_any(history, number + 1);
        let last = next.map_or(number, |next| next - 1);
        Reach {
            last_missing: Segment {
                timeline: owner(last),
                number: last,
            },
            end: missing.start(self.segment_size),
            missing,
            has_part: self.has_part(history, number),
            is_hole: self.proof_of_more(history, missing).is_some(),
            is_expired: self.is_expired(missing),
        }
    }

    /// What proves that there was WAL of `history` beyond `segment`, if anything does.
    pub fn proof_of_more(&self, history: &History, segment: Segment) -> Option<String> {
        let size = self.segment_size;
        let (start, end) = (segment.start(size), segment.end(size));
        // Up to where WAL of `timeline` belongs to `history`; None if it does not.
        let belongs = |timeline: u32| match history.end_of(timeline) {
            Ok(None) => Some(Lsn(u64::MAX)),
            Ok(Some(end)) => Some(end),
            Err(_) => None,
        };
        for (&timeline, wal) in &self.timelines {
            let Some(limit) = belongs(timeline) else { continue };
            let last = wal.last().map(|last| last.min(limit.0.saturating_sub(1) / size));
            if let Some(number) = last.filter(|&last| last > segment.number) {
                return Some(format!("{} is there", Segment { timeline, number }.name(size)));
            }
        }
        // A timeline that branched off later shows how far this one went.
        for other in self.histories() {
            let branched = other.ancestors.iter().find(|a| a.timeline == history.timeline);
            if let Some(ancestor) = branched.filter(|a| a.end > end) {
                return Some(format!("timeline {} branched off at {}", other.timeline, ancestor.end));
            }
        }
        let beyond = if self.has_part(history, segment.number) {
            end
        } else {
            start
        };
        self.proven
            .iter()
            .find(|(timeline, stop)| *stop > beyond && belongs(*timeline).is_some_and(|limit| *stop <= limit))
            .map(|(_, stop)| format!("a backup ended at {stop}"))
    }
}
