//! The WAL of one repository into another: what the target does not have, and a comparison of what both have.
//!
//! What always holds: nothing is overwritten; two contents under one name are an error that names it; every segment is
//! either stored by this copy or was compared with the source's content, now or by an earlier run that this host
//! remembers; the target's fences and closed timelines are looked at after every object.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use fairvault_format::{names, proto, sha256};
use futures::StreamExt;
use serde::Serialize;

use crate::commit::{Log, rotated};
use crate::env::has_fault;
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{Segment, WalFile};
use crate::progress::Progress;
use crate::wal::archive::{Archive, Stored};
use crate::wal::coverage::{Coverage, TimelineWal};

/// Content of segments that is held at once, bytes; and segments at once.
const IN_FLIGHT_BYTES: u64 = 128 << 20;
const AT_ONCE: u64 = 4;

/// Timeline and number of a segment.
type Key = (u32, u64);

/// What a repository has of an incarnation's WAL, with stored bytes.
#[derive(Debug, Default)]
pub struct Listing {
    /// Complete segments.
    pub segments: BTreeMap<Key, u64>,
    /// Segments of which there are pieces or partial files.
    pub parts: BTreeMap<Key, u64>,
    /// Histories and backup histories.
    files: BTreeMap<(u32, String), u64>,
}

impl Listing {
    /// Lists segments from `from` on, and every history.
    pub async fn read(archive: &Archive, from: u64) -> Result<Self> {
        let mut this = Self::default();
        let folder = format!("{}/{:016x}", names::WAL, archive.system_identifier);
        for (object, len) in archive.stanza.store().list(&folder).await? {
            this.add(archive, from, &object, len);
        }
        Ok(this)
    }

    fn add(&mut self, archive: &Archive, from: u64, object: &str, len: u64) {
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
        let size = archive.segment_size;
        // Another partial file of the same segment carries a part of its content's id behind its name.
        let plain = name.split_once("-").map_or(name, |(plain, _)| plain);
        let Ok(file) = WalFile::parse(plain, size) else { return };
        let rules =
            |segment: &Segment| epoch == archive.epoch(timeline, segment.start(size)) && !archive.is_expired(*segment);
        let key = |segment: &Segment| (timeline, segment.number);
        match &file {
            WalFile::Segment(s) if s.number >= from && rules(s) && !is_piece => _ = self.segments.insert(key(s), len),
            WalFile::Segment(s) | WalFile::Partial(s) if s.number >= from && rules(s) => {
                *self.parts.entry(key(s)).or_default() += len;
            }
            WalFile::BackupHistory(s) if s.number >= from && rules(s) => {
                self.files.insert((timeline, name.to_owned()), len);
            }
            WalFile::History(_) => _ = self.files.insert((timeline, name.to_owned()), len),
            _ => {}
        }
    }

    /// Without what has expired in another repository.
    #[must_use]
    pub fn without_expired(mut self, other: &Archive) -> Self {
        let is_live = |&(timeline, number): &Key| !other.is_expired(Segment { timeline, number });
        self.segments.retain(|key, _| is_live(key));
        self.parts.retain(|key, _| is_live(key));
        self.files.retain(|(timeline, name), _| {
            let file = WalFile::parse(name, other.segment_size);
            !matches!(file, Ok(WalFile::BackupHistory(s)) if !is_live(&(*timeline, s.number)))
        });
        self
    }

    /// Segments, parts and files that `other` does not have: their number, and stored bytes.
    pub fn missing_in(&self, other: &Self) -> (u64, u64) {
        let segments = self
            .segments
            .iter()
            .filter(|(key, _)| !other.segments.contains_key(key));
        let is_there = |key: &Key| other.segments.contains_key(key) || other.parts.contains_key(key);
        let of_whole = |key: &Key| self.segments.contains_key(key);
        let parts = self.parts.iter().filter(|(key, _)| !is_there(key) && !of_whole(key));
        let files = self.files.iter().filter(|(key, _)| !other.files.contains_key(key));
        let all = segments.map(|(_, len)| len).chain(parts.map(|(_, len)| len));
        all.chain(files.map(|(_, len)| len))
            .fold((0, 0), |(n, sum), len| (n + 1, sum + len))
    }
}

/// What was done.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub struct Counts {
    /// Segments that were stored.
    pub segments: u64,
    /// Parts of segments that were stored.
    pub parts: u64,
    /// Histories that were stored.
    pub files: u64,
    /// Bytes of WAL that were stored.
    pub bytes: u64,
    /// Segments that both had, whose content was compared.
    pub compared: u64,
}

/// What the target has of the source, by content.
#[derive(Debug)]
pub struct Proven {
    coverage: Coverage,
    /// Bytes of segments that are not there as a whole.
    parts: BTreeMap<Key, u64>,
}

impl Proven {
    /// Fails unless the WAL that a backup needs is proven to be there.
    pub fn check(&self, info: &proto::BackupInfo) -> Result<()> {
        let size = self.coverage.segment_size;
        let (start, stop) = (Lsn(info.start_lsn), Lsn(info.stop_lsn));
        let mut missing = None;
        for history in self.coverage.leading_from(info.stop_timeline, stop) {
            let reach = self.coverage.reach(history, start);
            let of_history = |timeline: u32| history.end_of(timeline).is_ok();
            let part = self.parts.iter().filter(|((timeline, number), _)| {
                reach.has_part && *number == reach.missing.number && of_history(*timeline)
            });
            let part = part.map(|(_, len)| *len).max().unwrap_or(0);
            if reach.end.0 + part >= stop.0 {
                return Ok(());
            }
            missing.get_or_insert(reach.missing);
        }
        let missing = missing.map_or_else(
            || format!("the history of timeline {}", info.stop_timeline),
            |segment| segment.name(size),
        );
        Err(Error::not_found(format!(
            "backup {} needs WAL up to {stop}, and {missing} is not in the repository that it is copied from",
            info.id
        )))
    }
}

/// Segments of backups that are to be copied: first and last, on a timeline.
pub type Own = Vec<(u32, u64, u64)>;

/// One copy of an incarnation's WAL.
pub struct Copy<'a> {
    /// From here.
    pub source: &'a Archive,
    /// The log that it was opened with.
    pub source_log: &'a Log,
    /// To there.
    pub target: &'a Archive,
    /// The first segment that is needed.
    pub from: u64,
    /// What a memory is not enough for.
    pub own: Own,
    /// Counters.
    pub progress: &'a Progress,
}

enum Done {
    Stored(u64),
    Compared,
    Remembered,
    Closed,
    Expired,
}

impl Copy<'_> {
    /// Copies. Adds to `notes` what a person should know.
    pub async fn run(&self, log: &mut Log, notes: &mut Vec<String>) -> Result<(Counts, Proven)> {
        let (source, target) = (self.source, self.target);
        let here = Listing::read(source, self.from).await?.without_expired(target);
        let there = Listing::read(target, self.from).await?;
        let mut counts = Counts::default();
        for (timeline, name) in here.files.keys() {
            let file = WalFile::parse(name, source.segment_size)?;
            let is_history = matches!(file, WalFile::History(_));
            if !is_history && there.files.contains_key(&(*timeline, name.clone())) {
                continue;
            }
            let Some(content) = source.file(&file, name).await? else {
                continue;
            };
            if target.put(file, name, content).await? == Stored::New {
                counts.files += 1;
            }
        }
        let mut timelines: BTreeMap<u32, TimelineWal> = BTreeMap::new();
        for timeline in here
            .segments
            .keys()
            .chain(here.parts.keys())
            .map(|key| key.0)
            .collect::<BTreeSet<_>>()
        {
            let mut wal = TimelineWal::default();
            match source.history(timeline).await {
                Ok(history) => wal.history = history,
                Err(error) => wal.history_problem = Some(error.to_string()),
            }
            timelines.insert(timeline, wal);
        }
        let mut memory = Memory::load(source, target);
        let all: Vec<Key> = here.segments.keys().copied().collect();
        let at_once = (IN_FLIGHT_BYTES / source.segment_size).clamp(1, AT_ONCE) as usize;
        let remembered = memory.ranges.clone();
        let copying = all.into_iter().map(|key| {
            let (is_there, known) = (there.segments.contains_key(&key), contains(&remembered, key));
            async move { Ok::<_, Error>((key, self.segment(key, is_there, known).await?)) }
        });
        let mut copying = futures::stream::iter(copying).buffer_unordered(at_once);
        let mut closed = BTreeSet::new();
        let outcome = async {
            while let Some(done) = copying.next().await {
                let (key, done) = done?;
                match done {
                    Done::Stored(bytes) => {
                        counts.segments += 1;
                        counts.bytes += bytes;
                        self.check(log).await?;
                    }
                    Done::Compared => counts.compared += 1,
                    Done::Remembered => {}
                    Done::Closed => {
                        closed.insert(key.0);
                        continue;
                    }
                    Done::Expired => continue,
                }
                memory.add(key);
                timelines.entry(key.0).or_default().segments.insert(key.1);
            }
            Ok::<_, Error>(())
        };
        let outcome = outcome.await;
        drop(copying);
        memory.save(target);
        outcome?;
        let mut parts = BTreeMap::new();
        for key in here.parts.keys().filter(|key| !here.segments.contains_key(key)) {
            match self.part(*key).await? {
                Part::None => {}
                Part::Closed => _ = closed.insert(key.0),
                Part::Whole => _ = timelines.entry(key.0).or_default().segments.insert(key.1),
                Part::Len { len, added } => {
                    if added > 0 {
                        counts.parts += 1;
                        counts.bytes += added;
                        self.check(log).await?;
                    }
                    timelines.entry(key.0).or_default().parts.insert(key.1);
                    parts.insert(*key, len);
                }
            }
        }
        notes.extend(closed.into_iter().map(|timeline| {
            format!(
                "timeline {timeline} is closed in {}: WAL of it beyond that was left out",
                target.stanza.shown()
            )
        }));
        let coverage = Coverage::of(source.segment_size, timelines);
        Ok((counts, Proven { coverage, parts }))
    }

    /// Fails if what was stored in the target may not count, or is of keys that were rotated since.
    async fn check(&self, log: &mut Log) -> Result<()> {
        self.target.check_fence(log).await?;
        match log.stanza().keys().epoch == self.target.stanza.keys().epoch {
            true => Ok(()),
            false => Err(rotated(&self.target.stanza)),
        }
    }

    fn is_own(&self, (timeline, number): Key) -> bool {
        self.own
            .iter()
            .any(|&(t, first, last)| t == timeline && (first..=last).contains(&number))
    }

    /// Whether the target refuses WAL of a timeline up to `end`.
    fn is_closed(&self, timeline: u32, end: Lsn) -> bool {
        self.target.closed_at(timeline).is_some_and(|at| at < end)
    }

    async fn segment(&self, key: Key, is_there: bool, is_known: bool) -> Result<Done> {
        let (source, target) = (self.source, self.target);
        let segment = Segment {
            timeline: key.0,
            number: key.1,
        };
        if is_there && is_known && !self.is_own(key) || has_fault("unproven copy") {
            return Ok(Done::Remembered);
        }
        if !is_there && self.is_closed(key.0, segment.end(source.segment_size)) {
            return Ok(Done::Closed);
        }
        let Some((header, content)) = source.whole_with_header(segment).await? else {
            return self.gone(segment).await;
        };
        self.progress.wal_bytes.add(content.len() as u64);
        match target.has_content(segment, &content).await? {
            Some(true) => return Ok(Done::Compared),
            Some(false) => return Err(self.differs(segment)),
            None => {}
        }
        let summary = header.summary.unwrap_or_default();
        let len = content.len() as u64;
        Ok(match target.put_whole(segment, summary, content).await? {
            Stored::New => Done::Stored(len),
            _ => Done::Compared,
        })
    }

    /// A segment that was listed is not there: that is damage, unless it has expired since.
    async fn gone(&self, segment: Segment) -> Result<Done> {
        let mut log = self.source_log.clone();
        log.refresh().await?;
        let now = Archive::open(&log, Some(self.source.system_identifier), 0)?;
        match now.is_expired(segment) {
            true => Ok(Done::Expired),
            false => Err(Error::damaged(format!(
                "{} was listed in {} and is not there",
                segment.name(self.source.segment_size),
                self.source.stanza.shown()
            ))),
        }
    }

    fn differs(&self, segment: Segment) -> Error {
        let context = format!("compared with {}", self.source.stanza.shown());
        self.target.contradicts(segment).context(context)
    }

    /// What there is of a segment that was not complete when it was listed.
    async fn part(&self, (timeline, number): Key) -> Result<Part> {
        let (source, target) = (self.source, self.target);
        let (segment, size) = (Segment { timeline, number }, source.segment_size);
        let Some(content) = source.segment_or_parts(segment).await? else {
            return Ok(Part::None);
        };
        let there = target.segment_or_parts(segment).await?.unwrap_or_default();
        let common = there.len().min(content.len());
        if there[..common] != content[..common] {
            return Err(self.differs(segment));
        }
        let len = content.len() as u64;
        if content.len() > there.len() {
            let start = segment.start(size);
            if self.is_closed(timeline, Lsn(start.0 + len)) {
                return Ok(Part::Closed);
            }
            // Pieces may be all of it, and not make it a segment before they are sealed.
            if len == size && source.segment_stored(segment).await?.is_some() {
                // Completed since.
                let done = self.segment((timeline, number), false, false).await?;
                return Ok(match done {
                    Done::Closed => Part::Closed,
                    Done::Expired => Part::None,
                    _ => Part::Whole,
                });
            }
            target
                .put_piece(segment, there.len() as u64, content[there.len()..].to_vec())
                .await?;
            // Behind a partial file, a piece is behind nothing that pieces are joined to.
            if target.parts(segment).await?.len() < content.len() {
                target.put_piece(segment, 0, content.clone()).await?;
            }
        }
        let added = len.saturating_sub(there.len() as u64);
        let is_whole = there.len() as u64 == size && target.segment_stored(segment).await?.is_some();
        Ok(match is_whole {
            true => Part::Whole,
            false => Part::Len { len, added },
        })
    }
}

enum Part {
    None,
    Closed,
    Whole,
    Len { len: u64, added: u64 },
}

/// Ranges of segments by timeline: first and last number.
type Ranges = BTreeMap<u32, BTreeMap<u64, u64>>;

fn contains(ranges: &Ranges, (timeline, number): Key) -> bool {
    let of_timeline = ranges.get(&timeline);
    let before = of_timeline.and_then(|ranges| ranges.range(..=number).next_back());
    before.is_some_and(|(_, &last)| number <= last)
}

fn insert(ranges: &mut Ranges, (timeline, number): Key) {
    if contains(ranges, (timeline, number)) {
        return;
    }
    let of_timeline = ranges.entry(timeline).or_default();
    let last = of_timeline.remove(&number.saturating_add(1)).unwrap_or(number);
    match of_timeline.range_mut(..number).next_back() {
        Some((_, end)) if *end + 1 == number => *end = last,
        _ => _ = of_timeline.insert(number, last),
    }
}

/// Which segments this host has seen to be the same in both: objects are never overwritten, so they still are.
struct Memory {
    name: String,
    ranges: Ranges,
}

impl Memory {
    fn load(source: &Archive, target: &Archive) -> Self {
        let between = format!(
            "{:?} {:?} {:?} {:?} {}",
            source.stanza.scope(),
            target.stanza.scope(),
            source.epochs,
            target.epochs,
            source.system_identifier
        );
        let name = format!("compared-{}", hex::encode(&sha256(between.as_bytes())[..8]));
        let note = target
            .stanza
            .memory()
            .and_then(|memory| memory.note(&target.stanza, &name));
        let text = String::from_utf8(note.unwrap_or_default()).unwrap_or_default();
        let mut ranges = Ranges::new();
        for line in text.lines() {
            let words: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
            if let [timeline, first, last] = words[..]
                && let Ok(timeline) = u32::try_from(timeline)
            {
                ranges.entry(timeline).or_default().insert(first, last);
            }
        }
        Self { name, ranges }
    }

    fn add(&mut self, key: Key) {
        insert(&mut self.ranges, key);
    }

    fn save(&self, target: &Archive) {
        let mut text = String::new();
        for (timeline, ranges) in &self.ranges {
            for (first, last) in ranges {
                let _ = writeln!(text, "{timeline} {first} {last}");
            }
        }
        if let Some(memory) = target.stanza.memory() {
            memory.take_note(&target.stanza, &self.name, text.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_grow_together_and_hold_what_was_added() {
        let mut ranges = Ranges::new();
        for number in [5, 7, 6, 1, 2, 9, 6] {
            insert(&mut ranges, (1, number));
        }
        insert(&mut ranges, (2, 4));
        assert_eq!(ranges[&1], BTreeMap::from([(1, 2), (5, 7), (9, 9)]));
        let held: Vec<u64> = (0..12).filter(|&number| contains(&ranges, (1, number))).collect();
        assert_eq!(held, [1, 2, 5, 6, 7, 9]);
        assert!(!contains(&ranges, (2, 5)) && !contains(&ranges, (3, 4)) && contains(&ranges, (2, 4)));
    }
}
