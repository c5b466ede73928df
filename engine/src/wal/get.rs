//! `restore_command`: a file from the repository, or the proof that there is none.
//!
//! PostgreSQL ends recovery, silently, when it is told that a file is absent. So absence is proved at every
//! request: not as a segment, not as pieces, not as a segment again, nothing later on that timeline, and not
//! below the position that this recovery has to reach. Everything else is an error that stops recovery.

use std::io::Write;
use std::path::Path;

use super::archive::Archive;
use super::coverage::Coverage;
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment, WalFile};
use crate::postgres::walker::Walker;

/// What the recovery is known to need.
#[derive(Debug, Clone, Copy, Default)]
pub struct Needs {
    /// Recovery must get at least here.
    pub through: Option<Lsn>,
    /// It follows the history of this timeline.
    pub timeline: Option<u32>,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The file is at its destination.
    Delivered,
    /// It is proven that there is none.
    Absent,
}

/// Serves one request.
pub async fn get(archive: &Archive, name: &str, destination: &Path, needs: Needs) -> Result<Outcome> {
    let file = WalFile::parse(name, archive.segment_size)?;
    match file {
        WalFile::Segment(segment) => segment_request(archive, segment, name, destination, needs).await,
        WalFile::History(timeline) => match archive.file(&file, name).await? {
            Some(content) => deliver(destination, &content),
            None if needs.timeline == Some(timeline) && timeline > 1 => Err(Error::damaged(format!(
                "{name} is needed for this recovery and is not in {}",
                archive.stanza.shown()
            ))),
            None => Ok(Outcome::Absent),
        },
        WalFile::Partial(_) | WalFile::BackupHistory(_) => match archive.file(&file, name).await? {
            Some(content) => deliver(destination, &content),
            None => Ok(Outcome::Absent),
        },
    }
}

async fn segment_request(
    archive: &Archive,
    segment: Segment,
    name: &str,
    destination: &Path,
    needs: Needs,
) -> Result<Outcome> {
    let size = archive.segment_size;
    let history = match needs.timeline {
        None => None,
        Some(timeline) => Some(archive.history(timeline).await?.ok_or_else(|| {
            Error::damaged(format!(
                "the history of timeline {timeline}, which this recovery follows, is not in {}",
                archive.stanza.shown()
            ))
        })?),
    };
    let switch = match &history {
        None => None,
        Some(history) => match history.end_of(segment.timeline) {
            Ok(end) => end,
            // Of a branch that this recovery does not follow.
            Err(_) => return Ok(Outcome::Absent),
        },
    };
    if switch.is_some_and(|end| segment.start(size) >= end) {
        return Ok(Outcome::Absent);
    }
    if let Some(begin) = history.as_ref().and_then(|h| timeline_begin(h, segment.timeline))
        && segment.end(size) <= begin
    {
        return Ok(Outcome::Absent);
    }
    let Some(mut content) = archive.segment_or_parts(segment).await? else {
        return prove_absent(archive, segment, name, needs, history.as_ref()).await;
    };
    if let Some(end) = switch.filter(|&end| end < segment.end(size)) {
        content.truncate((end.0 - segment.start(size).0) as usize);
    }
    if (content.len() as u64) < size {
        if longer_copy_at_hand(destination, name, segment, size, content.len()) {
            return Ok(Outcome::Absent);
        }
        let have = segment.start(size).0 + content.len() as u64;
        if switch.is_none() && needs.through.is_some_and(|through| through.0 > have) {
            return Err(hole(
                archive,
                name,
                format_args!("only the part up to {} is there", Lsn(have)),
            ));
        }
        content.resize(size as usize, 0);
    }
    deliver(destination, &content)
}

/// Where a timeline of a history begins.
fn timeline_begin(history: &History, timeline: u32) -> Option<Lsn> {
    if timeline == history.timeline {
        return history.ancestors.last().map(|a| a.end);
    }
    let at = history.ancestors.iter().position(|a| a.timeline == timeline)?;
    at.checked_sub(1).map(|before| history.ancestors[before].end)
}

fn hole(archive: &Archive, name: &str, why: impl std::fmt::Display) -> Error {
    Error::damaged(format!("{name} is missing in {}: {why}", archive.stanza.shown()))
        .remedy("recovery stops here on purpose: ending it now would silently lose what came after. See `fairvault info` for the points that can be reached")
}

async fn prove_absent(
    archive: &Archive,
    segment: Segment,
    name: &str,
    needs: Needs,
    history: Option<&History>,
) -> Result<Outcome> {
    let start = segment.start(archive.segment_size);
    // A segment of an older timeline may be asked for although the newer one has it.
    let superseded =
        history.is_some_and(|h| h.timeline_at(Lsn(segment.end(archive.segment_size).0 - 1)) != segment.timeline);
    if !superseded && needs.through.is_some_and(|through| through > start) {
        return Err(hole(
            archive,
            name,
            format_args!("this recovery has to reach {}", needs.through.unwrap_or_default()),
        ));
    }
    let coverage = Coverage::read(archive).await?;
    if let Some(wal) = coverage.timelines.get(&segment.timeline) {
        let later = wal
            .segments
            .iter()
            .chain(&wal.parts)
            .find(|&&number| number > segment.number);
        if let (Some(&later), false) = (later, superseded) {
            let later = Segment {
                timeline: segment.timeline,
                number: later,
            }
            .name(archive.segment_size);
            return Err(hole(
                archive,
                name,
                format_args!("{later} is there, so this is a hole, not the end"),
            ));
        }
    }
    Ok(Outcome::Absent)
}

/// pg_wal may hold a copy of the segment that is valid beyond what we have.
fn longer_copy_at_hand(destination: &Path, name: &str, segment: Segment, size: u64, ours: usize) -> bool {
    let Some(local) = destination.parent().map(|p| p.join(name)) else {
        return false;
    };
    let Ok(content) = std::fs::read(local) else {
        return false;
    };
    let mut walker = Walker::new(segment.start(size), size);
    walker.feed(&content, |_| {});
    content.len() as u64 == size && walker.next_record().0.saturating_sub(segment.start(size).0) as usize > ours
}

fn deliver(destination: &Path, content: &[u8]) -> Result<Outcome> {
    let what = || format!("writing {}", destination.display());
    let mut file = std::fs::File::create(destination).map_err(|e| Error::io(what(), e))?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(|e| Error::io(what(), e))?;
    Ok(Outcome::Delivered)
}
