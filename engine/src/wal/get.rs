//! `restore_command`: a file from the repositories, or the proof that there is none.
//!
//! PostgreSQL ends recovery, silently, when it is told that a file is absent. So absence is proved at every
//! request: not as a segment in any repository, not as pieces, nothing later on that history, and not below
//! the position that this recovery has to reach. Everything else is an error that stops recovery. A part of
//! a segment also ends recovery: it is given only when no repository has the whole.

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
    /// Recovery must not get further: what is archived later was not part of the plan.
    pub until: Option<Lsn>,
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

/// What one repository says about a file as a whole.
enum Answer {
    Content(Vec<u8>),
    /// This recovery must not have it.
    NotWanted,
    Missing,
}

/// Serves one request. Repositories are opened in order, as far as they are needed; a failure of one does
/// not matter if another has the whole file.
pub async fn get<R>(
    repositories: &[R],
    open: impl AsyncFn(&R) -> Result<Archive>,
    name: &str,
    destination: &Path,
    needs: Needs,
) -> Result<Outcome> {
    let mut archives = Vec::new();
    let mut failure = None;
    for repository in repositories {
        let answer = async {
            let archive = open(repository).await?;
            Ok((whole(&archive, name, needs).await?, archive))
        };
        match answer.await {
            Ok((Answer::Content(content), _)) => return deliver(destination, &content),
            Ok((Answer::NotWanted, _)) => return Ok(Outcome::Absent),
            Ok((Answer::Missing, archive)) => archives.push(archive),
            Err(error) => failure = Some(error),
        }
    }
    if let Some(error) = failure {
        return Err(error);
    }
    let mut best: Option<(Vec<u8>, Request)> = None;
    for archive in &archives {
        let WalFile::Segment(segment) = WalFile::parse(name, archive.segment_size)? else {
            continue;
        };
        let request = Request::new(archive, segment, needs).await?;
        let mut part = archive.parts(segment).await?;
        request.cut(&mut part);
        if part.len() > best.as_ref().map_or(0, |(content, _)| content.len()) {
            best = Some((part, request));
        }
    }
    if let Some((part, request)) = best {
        return deliver_part(&request, name, destination, part);
    }
    for archive in &archives {
        let WalFile::Segment(segment) = WalFile::parse(name, archive.segment_size)? else {
            continue;
        };
        prove_absent(archive, &Request::new(archive, segment, needs).await?, name).await?;
    }
    Ok(Outcome::Absent)
}

/// Looks for a file as a whole.
async fn whole(archive: &Archive, name: &str, needs: Needs) -> Result<Answer> {
    let file = WalFile::parse(name, archive.segment_size)?;
    if let WalFile::Segment(segment) = file {
        let request = Request::new(archive, segment, needs).await?;
        if !request.wanted() {
            return Ok(Answer::NotWanted);
        }
        let Some(mut content) = archive.whole_segment(segment).await? else {
            return Ok(Answer::Missing);
        };
        request.cut(&mut content);
        content.resize(archive.segment_size as usize, 0);
        return Ok(Answer::Content(content));
    }
    match (archive.file(&file, name).await?, file) {
        (Some(content), _) => Ok(Answer::Content(content)),
        (None, WalFile::History(timeline)) if needs.timeline == Some(timeline) && timeline > 1 => {
            Err(Error::damaged(format!(
                "{name} is needed for this recovery and is not in {}",
                archive.stanza.shown()
            )))
        }
        (None, _) => Ok(Answer::Missing),
    }
}

/// A request for a segment, with what it is for.
struct Request {
    segment: Segment,
    size: u64,
    needs: Needs,
    /// The history that recovery follows, if that is known.
    history: Option<History>,
    shown: String,
}

impl Request {
    async fn new(archive: &Archive, segment: Segment, needs: Needs) -> Result<Self> {
        let history = match needs.timeline {
            None => None,
            Some(timeline) => Some(archive.history(timeline).await?.ok_or_else(|| {
                Error::damaged(format!(
                    "the history of timeline {timeline}, which this recovery follows, is not in {}",
                    archive.stanza.shown()
                ))
            })?),
        };
        Ok(Self {
            segment,
            size: archive.segment_size,
            needs,
            history,
            shown: archive.stanza.shown().to_owned(),
        })
    }

    fn start(&self) -> Lsn {
        self.segment.start(self.size)
    }

    fn end(&self) -> Lsn {
        self.segment.end(self.size)
    }

    /// Where the segment's timeline ends on the way of this recovery.
    fn switch(&self) -> Option<Lsn> {
        let history = self.history.as_ref()?;
        history.end_of(self.segment.timeline).ok().flatten()
    }

    /// Where the segment's timeline begins on the way of this recovery.
    fn begin(&self) -> Lsn {
        let begin = self.history.as_ref().and_then(|h| h.start_of(self.segment.timeline));
        begin.unwrap_or_default().max(self.start())
    }

    /// A newer timeline of this recovery holds the end of the segment.
    fn is_superseded(&self) -> bool {
        self.switch().is_some_and(|end| end < self.end())
    }

    /// Whether this recovery may have the segment at all.
    fn wanted(&self) -> bool {
        let of_history = self
            .history
            .as_ref()
            .is_none_or(|h| h.end_of(self.segment.timeline).is_ok());
        of_history
            && self.begin() < self.end()
            && self.switch().is_none_or(|end| self.start() < end)
            && self.needs.until.is_none_or(|until| self.start() < until)
    }

    /// Cuts content where this recovery must not read on.
    fn cut(&self, content: &mut Vec<u8>) {
        for end in [self.switch(), self.needs.until].into_iter().flatten() {
            content.truncate(usize::try_from(end.0.saturating_sub(self.start().0)).unwrap_or(usize::MAX));
        }
    }

    fn hole(&self, name: &str, why: impl std::fmt::Display) -> Error {
        Error::damaged(format!("{name} is missing in {}: {why}", self.shown))
            .remedy("recovery stops here on purpose: ending it now would silently lose what came after. See `fairvault info` for the points that can be reached")
    }
}

fn deliver_part(request: &Request, name: &str, destination: &Path, mut part: Vec<u8>) -> Result<Outcome> {
    if longer_copy_at_hand(destination, name, request, part.len()) {
        return Ok(Outcome::Absent);
    }
    let have = Lsn(request.start().0 + part.len() as u64);
    let cut_on_purpose = request.switch() == Some(have);
    if !cut_on_purpose && request.needs.through.is_some_and(|through| through > have) {
        return Err(request.hole(name, format_args!("only the part up to {have} is there")));
    }
    part.resize(request.size as usize, 0);
    deliver(destination, &part)
}

async fn prove_absent(archive: &Archive, request: &Request, name: &str) -> Result<()> {
    let through = request.needs.through.unwrap_or_default();
    let segment = request.segment;
    let newer_has_it = match &request.history {
        Some(history) if request.is_superseded() => {
            let timeline = history.timeline_at(Lsn(request.end().0 - 1));
            archive.segment_header(Segment { timeline, ..segment }).await?.is_some()
        }
        _ => false,
    };
    let from = if request.is_superseded() {
        request.start()
    } else {
        request.begin()
    };
    if through > from && !newer_has_it {
        return Err(request.hole(name, format_args!("this recovery has to reach {through}")));
    }
    if request.is_superseded() {
        return Ok(());
    }
    let coverage = Coverage::read(archive).await?;
    let own = History {
        timeline: segment.timeline,
        ancestors: Vec::new(),
    };
    let history = request.history.as_ref().unwrap_or(&own);
    let within_plan = |until: Lsn| request.end() >= until;
    if let Some(proof) = coverage.proof_of_more(history, segment)
        && !request.needs.until.is_some_and(within_plan)
    {
        // It may have been archived between the two looks.
        if archive.segment_or_parts(segment).await?.is_some() {
            return Err(Error::temporary(format!("{name} was archived just now: ask again")));
        }
        return Err(request.hole(name, format_args!("{proof}, so this is a hole, not the end")));
    }
    Ok(())
}

/// pg_wal may hold a copy of the segment that is valid beyond what we have.
fn longer_copy_at_hand(destination: &Path, name: &str, request: &Request, ours: usize) -> bool {
    let Some(local) = destination.parent().map(|p| p.join(name)) else {
        return false;
    };
    let Ok(content) = std::fs::read(local) else {
        return false;
    };
    let mut walker = Walker::new(request.start(), request.size);
    walker.feed(&content, |_| {});
    content.len() as u64 == request.size && walker.next_record().0.saturating_sub(request.start().0) as usize > ours
}

fn deliver(destination: &Path, content: &[u8]) -> Result<Outcome> {
    let what = || format!("writing {}", destination.display());
    let mut file = std::fs::File::create(destination).map_err(|e| Error::io(what(), e))?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(|e| Error::io(what(), e))?;
    Ok(Outcome::Delivered)
}
