//! Names of the files in pg_wal, and timeline histories.

use std::fmt;

use super::lsn::Lsn;
use crate::error::{Error, Result};

/// Whether `size` is a possible wal_segment_size: a power of two from 1 MiB to 1 GiB.
pub fn valid_segment_size(size: u64) -> bool {
    size.is_power_of_two() && (1 << 20..=1 << 30).contains(&size)
}

/// A complete segment's place: timeline and number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Segment {
    /// Timeline.
    pub timeline: u32,
    /// Start LSN divided by the segment size.
    pub number: u64,
}

impl Segment {
    /// The segment that holds the byte at `lsn`.
    pub fn of(timeline: u32, lsn: Lsn, segment_size: u64) -> Self {
        Self {
            timeline,
            number: lsn.0 / segment_size,
        }
    }

    /// First byte.
    pub fn start(self, segment_size: u64) -> Lsn {
        Lsn(self.number.saturating_mul(segment_size))
    }

    /// One past the last byte.
    pub fn end(self, segment_size: u64) -> Lsn {
        Lsn(self.number.saturating_add(1).saturating_mul(segment_size))
    }

    /// The next one on the same timeline.
    pub fn next(self) -> Self {
        Self {
            number: self.number + 1,
            ..self
        }
    }

    /// PostgreSQL's file name; it depends on the segment size.
    pub fn name(self, segment_size: u64) -> String {
        let per_id = 0x1_0000_0000 / segment_size;
        format!(
            "{:08X}{:08X}{:08X}",
            self.timeline,
            self.number / per_id,
            self.number % per_id
        )
    }

    fn parse(name: &str, segment_size: u64) -> Option<Self> {
        let per_id = 0x1_0000_0000 / segment_size;
        let (high, low) = (hex32(name.get(8..16)?)?, hex32(name.get(16..24)?)?);
        (name.len() == 24 && u64::from(low) < per_id).then_some(Self {
            timeline: hex32(&name[..8])?,
            number: u64::from(high) * per_id + u64::from(low),
        })
    }
}

fn hex32(digits: &str) -> Option<u32> {
    (digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b)))
        .then(|| u32::from_str_radix(digits, 16).ok())
        .flatten()
}

/// What `archive_command` and `restore_command` are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalFile {
    /// A complete segment.
    Segment(Segment),
    /// The last segment of a timeline that ended inside it.
    Partial(Segment),
    /// A backup history file.
    BackupHistory(Segment),
    /// A timeline history.
    History(u32),
}

impl WalFile {
    /// Reads a file name. Names that fit no kind are refused.
    pub fn parse(name: &str, segment_size: u64) -> Result<Self> {
        let bad = || {
            Error::refused(format!(
                "{name:?} is not the name of a WAL file (expected 24 hexadecimal digits, with .partial or .backup, or <timeline>.history)"
            ))
        };
        if let Some(timeline) = name.strip_suffix(".history") {
            return Ok(Self::History(hex32(timeline).filter(|&t| t > 0).ok_or_else(bad)?));
        }
        let segment = |text: &str| Segment::parse(text, segment_size).ok_or_else(bad);
        if !name.is_ascii() {
            return Err(bad());
        }
        match name.len() {
            24 => Ok(Self::Segment(segment(name)?)),
            32 if name.ends_with(".partial") => Ok(Self::Partial(segment(&name[..24])?)),
            40 if name.ends_with(".backup") && name.as_bytes()[24] == b'.' => {
                hex32(&name[25..33]).ok_or_else(bad)?;
                Ok(Self::BackupHistory(segment(&name[..24])?))
            }
            _ => Err(bad()),
        }
    }

    /// The timeline in the name.
    pub fn timeline(&self) -> u32 {
        match self {
            Self::Segment(s) | Self::Partial(s) | Self::BackupHistory(s) => s.timeline,
            Self::History(timeline) => *timeline,
        }
    }
}

/// One line of a timeline history: that timeline ended at `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ancestor {
    /// The timeline that ended.
    pub timeline: u32,
    /// Where the next one began.
    pub end: Lsn,
}

/// The ancestry of a timeline, oldest first, itself not included.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct History {
    /// The timeline that this is the history of.
    pub timeline: u32,
    /// Its ancestors.
    pub ancestors: Vec<Ancestor>,
}

impl History {
    /// Parses a `.history` file.
    pub fn parse(timeline: u32, content: &[u8]) -> Result<Self> {
        let bad = |why: String| Error::damaged(format!("history of timeline {timeline} is damaged: {why}"));
        // The reason behind the numbers may be a restore point's name in any encoding.
        let text = String::from_utf8_lossy(content);
        let mut ancestors: Vec<Ancestor> = Vec::new();
        for line in text
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty() && !l.starts_with('#'))
        {
            let mut fields = line.split_whitespace();
            let number = fields.next().and_then(|t| t.parse().ok());
            let end = fields.next().and_then(|l| l.parse().ok());
            let (Some(number), Some(end)) = (number, end) else {
                return Err(bad(format!("line {line:?}")));
            };
            if ancestors.last().is_some_and(|last| last.timeline >= number) || number >= timeline {
                return Err(bad(format!("timelines out of order at {line:?}")));
            }
            ancestors.push(Ancestor { timeline: number, end });
        }
        // A recovery that ended before an earlier switch of the timeline that it followed writes ends that
        // decrease: what counts is where the way to this timeline left each of them.
        for at in (1..ancestors.len()).rev() {
            ancestors[at - 1].end = ancestors[at - 1].end.min(ancestors[at].end);
        }
        Ok(Self { timeline, ancestors })
    }

    /// Where `timeline` ended on the way to this one; `None` if it is this one; an error if it is not an
    /// ancestor.
    pub fn end_of(&self, timeline: u32) -> std::result::Result<Option<Lsn>, NotAnAncestor> {
        if timeline == self.timeline {
            return Ok(None);
        }
        self.ancestors
            .iter()
            .find(|a| a.timeline == timeline)
            .map(|a| Some(a.end))
            .ok_or(NotAnAncestor)
    }

    /// Where `timeline` began on the way to this one; `None` for the first one, and for strangers.
    pub fn start_of(&self, timeline: u32) -> Option<Lsn> {
        let at = match timeline == self.timeline {
            true => self.ancestors.len(),
            false => self.ancestors.iter().position(|a| a.timeline == timeline)?,
        };
        at.checked_sub(1).map(|before| self.ancestors[before].end)
    }

    /// The timeline that owns the byte at `lsn`.
    pub fn timeline_at(&self, lsn: Lsn) -> u32 {
        self.ancestors
            .iter()
            .find(|a| lsn < a.end)
            .map_or(self.timeline, |a| a.timeline)
    }

    /// The segments that recovery along this history needs to get from `from` (on `timeline`) to `to`
    /// (exclusive). A segment in which a timeline switch falls is read from the newer timeline.
    pub fn segments(&self, from: Lsn, to: Lsn, segment_size: u64) -> Vec<Segment> {
        let mut out = Vec::new();
        let mut number = from.0 / segment_size;
        while number.saturating_mul(segment_size) < to.0 {
            let last_byte = Lsn(((number + 1).saturating_mul(segment_size)).min(to.0).saturating_sub(1)).max(from);
            out.push(Segment {
                timeline: self.timeline_at(last_byte),
                number,
            });
            number += 1;
        }
        out
    }
}

/// The timeline is not in a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotAnAncestor;

impl fmt::Display for NotAnAncestor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the timeline is not an ancestor")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 16 << 20;

    #[test]
    fn names_round_trip_for_every_segment_size() {
        for shift in 20..=30 {
            let size = 1u64 << shift;
            for number in [0, 1, 255, 256, 4095, 4096, 70_000] {
                let segment = Segment { timeline: 3, number };
                let name = segment.name(size);
                assert_eq!(
                    WalFile::parse(&name, size).unwrap(),
                    WalFile::Segment(segment),
                    "{name} at {size}"
                );
            }
        }
    }

    #[test]
    fn strange_names_are_refused() {
        for name in [
            "",
            "0",
            "00000001000000000000000G",
            "000000010000000000000FFF",
            "../etc/passwd",
            "0000000é.history",
            "00000000.history",
            "000000010000000000000001.backup",
            "00000001000000000000000a",
        ] {
            assert!(WalFile::parse(name, SIZE).is_err(), "{name}");
        }
        assert!(WalFile::parse("000000010000000000000001.00000028.backup", SIZE).is_ok());
    }

    #[test]
    fn histories_choose_the_timeline_of_a_position() {
        let history = History::parse(
            3,
            b"1\t0/3000100\tno recovery target specified\n\n2\t0/5000000\tbefore x\n",
        )
        .unwrap();
        assert_eq!(history.timeline_at(Lsn(0x3000000)), 1);
        assert_eq!(history.timeline_at(Lsn(0x3000100)), 2);
        assert_eq!(history.timeline_at(Lsn(0x5000000)), 3);
        let names: Vec<_> = history
            .segments(Lsn(0x2000028), Lsn(0x6000001), SIZE)
            .iter()
            .map(|s| (s.timeline, s.number))
            .collect();
        assert_eq!(names, [(1, 2), (2, 3), (2, 4), (3, 5), (3, 6)]);
        assert!(history.end_of(4).is_err());
        // A recovery along timeline 2 that ended before timeline 1 did.
        let early = History::parse(3, b"1\t0/60164E0\tx\n2\t0/4000090\tx\n").unwrap();
        assert_eq!(early.end_of(1), Ok(Some(Lsn(0x4000090))));
        assert_eq!(early.timeline_at(Lsn(0x4000080)), 1);
        assert_eq!(early.timeline_at(Lsn(0x4000090)), 3);
        assert!(History::parse(2, b"2 0/1 x").is_err());
        assert!(History::parse(2, b"nonsense").is_err());
    }
}
