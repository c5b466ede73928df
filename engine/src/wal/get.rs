//! `restore_command`: a file from the repositories, or the proof that there is none.
//!
//! PostgreSQL ends recovery, silently, when it is told that a file is absent. So absence is proved at every
//! request: not as a segment in any repository, not as pieces, nothing later on that history, and not below
//! the position that this recovery has to reach. Everything else is an error that stops recovery. A part of
//! a segment also ends recovery: it is given only when no repository has the whole.

use std::path::Path;
use std::sync::Arc;

use super::archive::Archive;
use super::coverage::Coverage;
use fairvault_format::names;

use crate::error::{Context, Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment, WalFile};
use crate::postgres::walker::{Record, WAL_PAGE, Walker, What, begins_inside_record, rmgr};
use crate::stanza::Stanza;
use crate::tally;

/// What the recovery is known to need.
#[derive(Debug, Clone, Copy, Default)]
pub struct Needs {
    /// Recovery must get at least here.
    pub through: Option<Lsn>,
    /// Recovery must not get further: what is archived later was not part of the plan.
    pub until: Option<Lsn>,
    /// Which history it follows.
    pub follow: Follow,
    /// It has a target, which it has reached at `through`: nothing behind that is replayed.
    pub stops: bool,
}

/// The history that a recovery follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Follow {
    /// Not known.
    #[default]
    Unknown,
    /// That of this timeline.
    Timeline(u32),
    /// That of the newest timeline that the requested one leads to.
    Newest,
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
    /// It is at its destination.
    Delivered,
    /// This recovery must not have it.
    NotWanted,
    Missing,
}

/// Serves one request. Repositories are opened in order, as far as they are needed; a failure of one does
/// not matter if another has the whole file, and neither does one that does not know the cluster (`open` says `None`),
/// as long as another does.
pub async fn get<R>(
    repositories: &[R],
    open: impl AsyncFn(&R) -> Result<Option<Archive>>,
    name: &str,
    destination: &Path,
    needs: Needs,
) -> Result<Outcome> {
    let mut asked = None;
    let served = serve(repositories, open, name, destination, needs, &mut asked).await;
    if let (Err(_), Some(stanza)) = (&served, &asked) {
        tally::wal::missed(stanza);
    }
    served
}

/// The same; `asked` becomes the first stanza that could be opened.
async fn serve<R>(
    repositories: &[R],
    open: impl AsyncFn(&R) -> Result<Option<Archive>>,
    name: &str,
    destination: &Path,
    needs: Needs,
    asked: &mut Option<Arc<Stanza>>,
) -> Result<Outcome> {
    let mut archives: Vec<Archive> = Vec::new();
    let mut failure = None;
    for repository in repositories {
        let answer = async {
            let Some(archive) = open(repository).await? else {
                return Ok(None);
            };
            asked.get_or_insert_with(|| archive.stanza.clone());
            // The newest timeline is that of all that were asked.
            let answer = match needs.follow == Follow::Newest && !archives.is_empty() {
                true => delivered(&archive.clone().beside(archives.clone()), name, needs, destination).await?,
                false => delivered(&archive, name, needs, destination).await?,
            };
            Ok(Some((answer, archive)))
        };
        match answer.await {
            Ok(None) => {}
            Ok(Some((Answer::Content(content), archive))) => {
                say_failure(name, failure.as_ref());
                check_tablespaces(&archive, name, &content, needs).await?;
                return deliver(&archive, name, destination, &content).await;
            }
            Ok(Some((Answer::Delivered, archive))) => {
                say_failure(name, failure.as_ref());
                tell(&archive, name, archive.segment_size).await;
                return Ok(Outcome::Delivered);
            }
            // Another one may know a newer history, which wants it.
            Ok(Some((Answer::NotWanted, archive))) if needs.follow == Follow::Newest => archives.push(archive),
            Ok(Some((Answer::NotWanted, _))) => return Ok(Outcome::Absent),
            Ok(Some((Answer::Missing, archive))) => archives.push(archive),
            Err(error) => {
                // What can be tried again says least.
                if failure.as_ref().is_none_or(|f: &Error| f.kind() == Kind::Temporary) {
                    failure = Some(error);
                }
            }
        }
    }
    if let Some(error) = failure {
        // A recovery that was planned may end without a repository that is away, once it has got where it had to: that
        // is proved by those that can be read.
        if error.kind() != Kind::Temporary || needs.through.is_none() || archives.is_empty() {
            return Err(error);
        }
        tracing::warn!("{name}: what can be read has to do: {error}");
        let found = without_whole(archives, name, destination, needs).await;
        return found.context(|| format!("a repository cannot be read ({error})"));
    }
    if archives.is_empty() {
        return Err(
            Error::refused(format!("{name}: no repository knows the cluster that asks for it"))
                .remedy("is this the right stanza? After pg_upgrade, see `fairvault stanza upgrade`"),
        );
    }
    without_whole(archives, name, destination, needs).await
}

/// Recovery goes on, and somebody should know that it did so by another repository.
fn say_failure(name: &str, failure: Option<&Error>) {
    if let Some(error) = failure {
        tracing::warn!("{name} is taken from another repository: {error}");
    }
}

/// No repository that can be read has the whole file: a part of it, or the proof that there is none. They count as one
/// here: what one has, another need not have.
async fn without_whole(archives: Vec<Archive>, name: &str, destination: &Path, needs: Needs) -> Result<Outcome> {
    let mut archives = archives.into_iter();
    let first = archives
        .next()
        .ok_or_else(|| Error::failed("no repository was asked"))?;
    let archive = first.beside(archives.collect());
    let mut best = None;
    let mut proof = Ok(());
    if let WalFile::Segment(segment) = WalFile::parse(name, archive.segment_size)? {
        let request = Request::new(&archive, segment, needs).await?;
        if !request.wanted() {
            return Ok(Outcome::Absent);
        }
        let mut part = archive.parts(segment).await?;
        request.cut(&mut part);
        proof = check_end(&archive, &request, name, part.len()).await;
        best = Some((part, request)).filter(|(part, _)| !part.is_empty());
    }
    // The segment may have been completed since the first look, and its parts removed under our eyes.
    if let Answer::Content(content) = whole(&archive, name, needs).await? {
        check_tablespaces(&archive, name, &content, needs).await?;
        return deliver(&archive, name, destination, &content).await;
    }
    match best {
        Some((part, request)) => deliver_part(&archive, &request, name, destination, part, proof).await,
        None => proof.map(|()| Outcome::Absent),
    }
}

/// The plan of a restore has looked at the WAL that it knew. What was archived since may create a tablespace
/// in a folder of this host that is not the copy's: replaying that could destroy another server's data.
async fn check_tablespaces(archive: &Archive, name: &str, content: &[u8], needs: Needs) -> Result<()> {
    let size = archive.segment_size;
    let (Ok(WalFile::Segment(segment)), Some(through)) = (WalFile::parse(name, size), needs.through) else {
        return Ok(());
    };
    if needs.stops || segment.end(size) <= through {
        return Ok(());
    }
    // A record that crosses is replayed with the segment that it ends in.
    let before = match begins_inside_record(content) {
        true => tablespace_before(archive, segment, through).await?,
        false => None,
    };
    let start = before.as_ref().map_or(segment, |(before, _)| *before).start(size);
    let mut found = None;
    let mut walker = Walker::new(start, size);
    let mut look = |record: &Record<'_>| {
        if let Some(What::TablespaceCreate { oid, location }) = record.event().map(|event| event.what)
            && record.lsn >= through
            && is_of_another(oid, &location)
        {
            found = Some((record.lsn, location));
        }
    };
    if let Some((_, content)) = &before {
        walker.feed(content, &mut look);
    }
    // What is no whole page holds no whole record.
    walker.feed(&content[..content.len() / WAL_PAGE * WAL_PAGE], &mut look);
    match found {
        None => Ok(()),
        Some((lsn, location)) => Err(Error::refused(format!(
            "{name} creates a tablespace at {lsn} in {location}, which exists on this host and is not of this copy"
        ))
        .remedy(
            "it was created after the restore was planned: restore again with a target before it, or on another host",
        )),
    }
}

/// The segment before `segment` if a record may cross from there that creates a tablespace and that the plan has not
/// seen.
async fn tablespace_before(archive: &Archive, segment: Segment, through: Lsn) -> Result<Option<(Segment, Vec<u8>)>> {
    let Some(number) = segment.number.checked_sub(1) else {
        return Ok(None);
    };
    let before = Segment { number, ..segment };
    if before.end(archive.segment_size) <= through {
        return Ok(None);
    }
    let header = match archive.segment_header(before).await {
        // Recovery has it from elsewhere.
        Err(error) if error.kind() != Kind::Temporary => return Ok(None),
        header => header?,
    };
    let rmgr = header.and_then(|h| h.summary).map(|summary| summary.unfinished_rmgr);
    if rmgr.is_some_and(|rmgr| rmgr != 0 && rmgr != u32::from(rmgr::TBLSPC) + 1) {
        return Ok(None);
    }
    // Where nobody has it, recovery has it from elsewhere, and has passed it.
    let mut content = archive.segment_or_parts(before).await?;
    // A timeline begins with a copy of what its parent had of the segment.
    if content.is_none()
        && let Some(parent) = archive
            .history(segment.timeline)
            .await?
            .and_then(|h| h.ancestors.last().copied())
    {
        let timeline = parent.timeline;
        content = archive.segment_or_parts(Segment { timeline, ..before }).await?;
    }
    let whole = content.filter(|content| content.len() as u64 == archive.segment_size);
    Ok(whole.map(|content| (before, content)))
}

/// Whether a folder exists and is not where this data directory (restore_command runs in it) has the tablespace.
fn is_of_another(oid: u32, location: &str) -> bool {
    let ours = std::fs::read_link(format!("pg_tblspc/{oid}")).is_ok_and(|link| link == Path::new(location));
    !location.is_empty() && !ours && Path::new(location).exists()
}

/// Writes a whole segment that the recovery is known to need to `destination`, for fetching ahead; `false` if
/// there is any doubt.
pub async fn ahead(archive: &Archive, segment: Segment, needs: Needs, destination: &Path) -> Result<bool> {
    let size = archive.segment_size;
    if needs.through.is_none_or(|through| segment.end(size) > through) {
        return Ok(false);
    }
    let name = segment.name(size);
    match delivered(archive, &name, needs, destination).await? {
        Answer::Delivered => {}
        Answer::Content(content) => write(destination, &content)?,
        Answer::NotWanted | Answer::Missing => return Ok(false),
    }
    // Recovery may wait for it.
    if tally::wal::fetched(&archive.stanza, &name, size) && may_say(archive) {
        tokio::spawn(tally::say_in(archive.stanza.clone()));
    }
    Ok(true)
}

/// Looks for a file as a whole. A segment that this recovery may have to its end goes to its destination without
/// being held.
async fn delivered(archive: &Archive, name: &str, needs: Needs, destination: &Path) -> Result<Answer> {
    if let WalFile::Segment(segment) = WalFile::parse(name, archive.segment_size)? {
        // Without the history that tells whether it is wanted, others may know.
        let Some(request) = Request::find(archive, segment, needs).await? else {
            return Ok(Answer::Missing);
        };
        let is_planned = needs.through.is_none_or(|through| request.end() <= through);
        if request.wanted() && is_planned && request.ends().all(|end| end >= request.end()) {
            return Ok(match archive.write_whole(segment, destination).await? {
                true => Answer::Delivered,
                false => Answer::Missing,
            });
        }
    }
    whole(archive, name, needs).await
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
        (None, WalFile::History(timeline)) if needs.follow == Follow::Timeline(timeline) && timeline > 1 => {
            Err(Error::damaged(format!(
                "{name} is needed for this recovery and is not in {}",
                archive.stanza.shown()
            )))
        }
        (None, _) => Ok(Answer::Missing),
    }
}

/// The newest history in the archive that `timeline` is a part of.
async fn newest_history(archive: &Archive, timeline: u32) -> Result<Option<History>> {
    let folder = format!("{}/{:016x}", names::WAL, archive.system_identifier);
    let mut known: Vec<u32> = Vec::new();
    for archive in archive.all() {
        let names = archive.stanza.store().folder(&folder).folders().await?;
        let timelines = names.iter().filter_map(|name| u32::from_str_radix(name, 16).ok());
        known.extend(timelines.filter(|&t| t >= timeline));
    }
    known.sort_unstable();
    for candidate in known.into_iter().rev() {
        match archive.history(candidate).await {
            Ok(Some(history)) if history.end_of(timeline).is_ok() => return Ok(Some(history)),
            Err(error) if error.kind() == Kind::Temporary => return Err(error),
            _ => {}
        }
    }
    Ok(None)
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
        Self::find(archive, segment, needs).await?.ok_or_else(|| {
            Error::damaged(format!(
                "the history of the timeline that this recovery follows is not in {}",
                archive.stanza.shown()
            ))
        })
    }

    /// `None` if the archive does not have the history that this recovery follows.
    async fn find(archive: &Archive, segment: Segment, needs: Needs) -> Result<Option<Self>> {
        let history = match needs.follow {
            Follow::Unknown => None,
            Follow::Newest => newest_history(archive, segment.timeline).await?,
            Follow::Timeline(timeline) => match archive.history(timeline).await? {
                None => return Ok(None),
                found => found,
            },
        };
        Ok(Some(Self {
            segment,
            size: archive.segment_size,
            needs,
            history,
            shown: archive.stanza.shown().to_owned(),
        }))
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

    /// Where this recovery must not read on.
    fn ends(&self) -> impl Iterator<Item = Lsn> {
        [self.switch(), self.needs.until].into_iter().flatten()
    }

    /// Cuts content where this recovery must not read on.
    fn cut(&self, content: &mut Vec<u8>) {
        for end in self.ends() {
            content.truncate(usize::try_from(end.0.saturating_sub(self.start().0)).unwrap_or(usize::MAX));
        }
    }

    fn hole(&self, name: &str, why: impl std::fmt::Display) -> Error {
        Error::damaged(format!("{name} is missing in {}: {why}", self.shown))
            .remedy("recovery stops here on purpose: ending it now would silently lose what came after. See `fairvault info` for the points that can be reached")
    }
}

/// A part ends recovery where it ends, so it is given only if nothing speaks against that.
async fn deliver_part(
    archive: &Archive,
    request: &Request,
    name: &str,
    destination: &Path,
    mut part: Vec<u8>,
    proof: Result<()>,
) -> Result<Outcome> {
    let local = copy_at_hand(destination, name, request);
    let have = request.start().0 + part.len().max(local) as u64;
    let cut_on_purpose = request.switch().is_some_and(|end| end.0 == have);
    if !cut_on_purpose && request.needs.through.is_some_and(|through| through.0 > have) {
        return Err(request.hole(name, format_args!("only the part up to {} is there", Lsn(have))));
    }
    proof?;
    if local > part.len() {
        return Ok(Outcome::Absent);
    }
    part.resize(request.size as usize, 0);
    check_tablespaces(archive, name, &part, request.needs).await?;
    deliver(archive, name, destination, &part).await
}

/// Proves that recovery may end with the first `part` bytes of the segment, which may be none.
async fn check_end(archive: &Archive, request: &Request, name: &str, part: usize) -> Result<()> {
    let through = request.needs.through.unwrap_or_default();
    let segment = request.segment;
    if part == 0 && through > request.begin() {
        let newer_has_it = match &request.history {
            Some(history) if request.is_superseded() => {
                let timeline = history.timeline_at(Lsn(request.end().0 - 1));
                archive.segment_header(Segment { timeline, ..segment }).await?.is_some()
            }
            _ => false,
        };
        if !newer_has_it {
            return Err(request.hole(name, format_args!("this recovery has to reach {through}")));
        }
    }
    let planned = request.needs.until.is_some_and(|until| request.end() >= until);
    if request.is_superseded() || planned {
        return Ok(());
    }
    let coverage = Coverage::read_from(archive, segment.number).await?;
    let own = History {
        timeline: segment.timeline,
        ancestors: Vec::new(),
    };
    let history = request.history.as_ref().unwrap_or(&own);
    match coverage.proof_of_more(history, segment) {
        None => Ok(()),
        Some(proof) => Err(request.hole(name, format_args!("{proof}, so this is a hole, not the end"))),
    }
}

/// Valid bytes of a copy of the segment that pg_wal holds.
fn copy_at_hand(destination: &Path, name: &str, request: &Request) -> usize {
    let Some(local) = destination.parent().map(|p| p.join(name)) else {
        return 0;
    };
    let Ok(content) = std::fs::read(local) else { return 0 };
    let mut walker = Walker::new(request.start(), request.size);
    walker.feed(&content, |_| {});
    if content.len() as u64 != request.size {
        return 0;
    }
    let end = walker.stopped().map_or(walker.next_record(), |stop| stop.at);
    usize::try_from(end.0.saturating_sub(request.start().0)).unwrap_or(0)
}

async fn deliver(archive: &Archive, name: &str, destination: &Path, content: &[u8]) -> Result<Outcome> {
    write(destination, content)?;
    tell(archive, name, content.len() as u64).await;
    Ok(Outcome::Delivered)
}

/// Not synced: after a crash, recovery asks again, and what it keeps it syncs itself.
fn write(destination: &Path, content: &[u8]) -> Result<()> {
    let what = || format!("writing {}", destination.display());
    std::fs::write(destination, content).map_err(|e| Error::io(what(), e))
}

/// Counts what was delivered, for the audit.
async fn tell(archive: &Archive, name: &str, bytes: u64) {
    if tally::wal::fetched(&archive.stanza, name, bytes) && may_say(archive) {
        tally::say_in(archive.stanza.clone()).await;
    }
}

/// Where nothing but a promise keeps writers apart, whoever fetches is none of them: a standby is another host.
fn may_say(archive: &Archive) -> bool {
    !archive.stanza.store().settings().single_writer
}
