//! What a stanza has: backups, WAL with its gaps, and the windows that can be restored.

mod breaks;
pub mod damage;

use std::collections::BTreeMap;

use fairvault_format::proto::BackupInfo;
use futures::StreamExt;
use serde::Serialize;

use breaks::Breaks;

use crate::commit::Log;
use crate::error::{Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment};
use crate::postgres::walker::WAL_PAGE;
use crate::restore::reader::Reader;
use crate::restore::target::{format_time, info};
use crate::wal::archive::Archive;
use crate::wal::coverage::{Coverage, Reach};
use crate::wal::summary::summarize;

/// A backup.
#[derive(Debug, Serialize)]
pub struct BackupLine {
    /// Id.
    pub id: String,
    /// full, diff, incr.
    pub r#type: String,
    /// The backup that it was built on, which it does not need to be restored; empty if none.
    pub parent: String,
    /// Why everything was read, if that was not asked for.
    pub no_parent_reason: String,
    /// Versions of the WAL parser that it, or any that it was built on, relies on.
    pub parser_versions: Vec<u32>,
    /// Bytes of the cluster that were read.
    pub read_bytes: u64,
    /// Its cluster.
    pub system_identifier: String,
    /// Server version as in server_version_num.
    pub server_version: u32,
    /// Times, RFC 3339 in UTC.
    pub started: String,
    /// When it ended.
    pub stopped: String,
    /// Start LSN.
    pub start_lsn: String,
    /// Stop LSN.
    pub stop_lsn: String,
    /// Timeline.
    pub timeline: u32,
    /// Bytes of the cluster.
    pub plain_bytes: u64,
    /// Bytes that it added to the repository.
    pub new_stored_bytes: u64,
    /// Files.
    pub files: u64,
    /// Damaged pages of the source.
    pub damaged_pages: u32,
    /// From a standby.
    pub from_standby: bool,
    /// archive or stream.
    pub wal_method: String,
    /// stream, local or sql.
    pub source: String,
    /// Its own WAL is complete.
    pub restorable: bool,
    /// Why it cannot be restored as it is, if `verify` has found that.
    pub damage: Option<String>,
    /// Why it is held, if it is.
    pub hold: Option<String>,
    /// Timelines on which recovery can go on from it.
    #[serde(skip)]
    pub leads_to: Vec<u32>,
    /// Notes.
    pub annotations: BTreeMap<String, String>,
}

/// A continuous range of WAL segments.
#[derive(Debug, Serialize)]
pub struct WalRange {
    /// First segment.
    pub first: String,
    /// Last segment.
    pub last: String,
    /// Number.
    pub segments: u64,
    /// What lies between this range and the one before: `gap` or `expired`.
    pub after: Option<&'static str>,
}

/// WAL of a timeline.
#[derive(Debug, Serialize)]
pub struct TimelineLine {
    /// Its cluster.
    pub system_identifier: String,
    /// Timeline.
    pub timeline: u32,
    /// Where it began, if it is not the first.
    pub began: Option<String>,
    /// Ranges, with gaps or expired WAL between them.
    pub ranges: Vec<WalRange>,
    /// Stored bytes.
    pub stored_bytes: u64,
    /// Why it cannot be followed, if that is so.
    pub problem: Option<String>,
    /// Where it was closed, and why, if that is so: it takes no more WAL.
    pub closed: Option<String>,
}

/// From where to where recovery can go.
#[derive(Debug, Serialize)]
pub struct Window {
    /// Its cluster.
    pub system_identifier: String,
    /// Timeline that is followed.
    pub timeline: u32,
    /// Oldest backup of the window.
    pub backup: String,
    /// First consistent position.
    pub from_lsn: String,
    /// End of continuous WAL.
    pub to_lsn: String,
    /// When the oldest backup ended.
    pub from: String,
    /// Newest commit that is known, if any.
    pub to: Option<String>,
    /// The same, microseconds since 1970; 0 if none is known.
    #[serde(skip)]
    pub to_us: i64,
    /// The first segment that is missing, if later ones are there.
    pub hole: Option<String>,
    /// The last one of that hole.
    pub hole_end: Option<String>,
    /// Where WAL goes on that cannot be replayed, and why.
    pub broken: Option<String>,
}

/// A session that has not ended.
#[derive(Debug, Serialize)]
pub struct SessionLine {
    /// What it does.
    pub what: String,
    /// Where.
    pub host: String,
    /// Since when.
    pub since: String,
}

/// Everything about a stanza.
#[derive(Debug, Serialize)]
pub struct Info {
    /// Name.
    pub stanza: String,
    /// Repository.
    pub repository: String,
    /// Encrypted.
    pub encrypted: bool,
    /// System identifiers, newest last.
    pub system_identifiers: Vec<String>,
    /// Backups, oldest first.
    pub backups: Vec<BackupLine>,
    /// WAL, of the oldest cluster first.
    pub wal: Vec<TimelineLine>,
    /// Restorable windows.
    pub windows: Vec<Window>,
    /// Unfinished sessions.
    pub sessions: Vec<SessionLine>,
}

fn rfc3339(us: i64) -> String {
    jiff::Timestamp::from_microsecond(us)
        .map(|t| t.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
        .unwrap_or_default()
}

/// Collects it.
pub async fn info_of(log: &Log) -> Result<Info> {
    let state = log.state();
    let genesis = state.genesis.clone().unwrap_or_default();
    let mut lives = Lives::read(log).await?;
    let damage = match damage::noted(log).await {
        Err(error) if error.kind() != Kind::Temporary => {
            tracing::warn!("what verify has found damaged is not shown: {error}");
            BTreeMap::new()
        }
        noted => noted?,
    };
    let mut out = Info {
        stanza: log.stanza().name().to_owned(),
        repository: log.stanza().shown().to_owned(),
        encrypted: genesis.encrypted,
        system_identifiers: state
            .incarnations
            .iter()
            .map(|i| i.system_identifier.to_string())
            .collect(),
        backups: Vec::new(),
        wal: lives
            .0
            .iter()
            .flat_map(|life| timelines(&life.archive, &life.coverage))
            .collect(),
        windows: Vec::new(),
        sessions: state
            .open_sessions
            .iter()
            .map(|s| SessionLine {
                what: s
                    .begin
                    .as_ref()
                    .map(|b| format!("{} {}", b.what, b.backup))
                    .unwrap_or_default(),
                host: s.host.clone(),
                since: rfc3339(s.time_us),
            })
            .collect(),
    };
    for backup in &state.backups {
        let i = info(backup);
        let leads_to = match lives.of(i.system_identifier) {
            Some(life) => life.leads_to(&i, &mut out.windows).await?,
            None => Vec::new(),
        };
        out.backups.push(BackupLine {
            id: i.id.clone(),
            r#type: i.r#type.clone(),
            parent: i.parent.clone(),
            no_parent_reason: i.no_parent_reason.clone(),
            parser_versions: i.parser_versions.clone(),
            read_bytes: i.read_bytes,
            system_identifier: i.system_identifier.to_string(),
            server_version: i.server_version,
            started: rfc3339(i.started_us),
            stopped: rfc3339(i.stopped_us),
            start_lsn: Lsn(i.start_lsn).to_string(),
            stop_lsn: Lsn(i.stop_lsn).to_string(),
            timeline: i.stop_timeline,
            plain_bytes: i.plain_bytes,
            new_stored_bytes: i.new_stored_bytes,
            files: i.files,
            damaged_pages: i.damaged_pages,
            from_standby: i.from_standby,
            wal_method: i.wal_method.clone(),
            source: i.source.clone(),
            restorable: !leads_to.is_empty(),
            leads_to,
            damage: damage.get(&info(backup).id).cloned(),
            hold: state.holds.iter().find(|h| h.backup == i.id).map(|h| h.reason.clone()),
            annotations: i.annotations.into_iter().collect(),
        });
    }
    Ok(out)
}

/// The WAL of one incarnation.
struct Life {
    archive: Archive,
    coverage: Coverage,
    breaks: Breaks,
}

/// The incarnations of a stanza, the newest last.
struct Lives(Vec<Life>);

impl Lives {
    async fn read(log: &Log) -> Result<Self> {
        let mut all = Vec::new();
        for incarnation in &log.state().incarnations {
            let archive = Archive::open(log, Some(incarnation.system_identifier), 3)?;
            all.push(Life {
                coverage: Coverage::read(&archive).await?,
                breaks: Breaks::load(&archive),
                archive,
            });
        }
        Ok(Self(all))
    }

    fn of(&mut self, system_identifier: u64) -> Option<&mut Life> {
        let mut all = self.0.iter_mut();
        all.find(|life| life.archive.system_identifier == system_identifier)
    }
}

impl Life {
    /// The timelines along which the WAL of a backup is complete; adds the windows that it opens.
    async fn leads_to(&mut self, i: &BackupInfo, windows: &mut Vec<Window>) -> Result<Vec<u32>> {
        let mut timelines = Vec::new();
        for history in self.coverage.leading_from(i.stop_timeline, Lsn(i.stop_lsn)) {
            let reach = self.coverage.reach(history, Lsn(i.start_lsn));
            let end = end_of(&self.archive, history, &reach).await?;
            if end.lsn.0 < i.stop_lsn {
                continue;
            }
            timelines.push(history.timeline);
            let broken = self
                .breaks
                .first(&self.archive, history, Lsn(i.stop_lsn), end.lsn)
                .await?;
            add_window(windows, &self.archive, history, i, &reach, end, broken).await?;
        }
        Ok(timelines)
    }
}

fn timelines(archive: &Archive, coverage: &Coverage) -> Vec<TimelineLine> {
    let closed = |timeline: u32| {
        let mut closed = archive.closed.iter();
        let found = closed.find(|c| c.system_identifier == archive.system_identifier && c.timeline == timeline)?;
        Some(format!("at {}: {}", Lsn(found.lsn), found.reason))
    };
    let name = |timeline, number| Segment { timeline, number }.name(coverage.segment_size);
    coverage
        .timelines
        .iter()
        .map(|(&timeline, wal)| TimelineLine {
            system_identifier: archive.system_identifier.to_string(),
            timeline,
            began: wal
                .history
                .as_ref()
                .and_then(|h| h.ancestors.last())
                .map(|a| a.end.to_string()),
            problem: match (&wal.history, &wal.history_problem) {
                (Some(_), _) => None,
                (None, Some(problem)) => Some(problem.clone()),
                (None, None) => Some(format!("{timeline:08X}.history is not in the repository")),
            },
            ranges: wal
                .ranges()
                .into_iter()
                .scan(None, |before, (first, last)| {
                    let expired = |number| coverage.is_expired(Segment { timeline, number });
                    let after = before.map(|before: u64| match (before + 1..first).all(expired) {
                        true => "expired",
                        false => "gap",
                    });
                    *before = Some(last);
                    Some(WalRange {
                        first: name(timeline, first),
                        last: name(timeline, last),
                        segments: last - first + 1,
                        after,
                    })
                })
                .collect(),
            stored_bytes: wal.stored_bytes,
            closed: closed(timeline),
        })
        .collect()
}

/// Where WAL along a history ends, parts of the last segment included.
struct End {
    lsn: Lsn,
    /// The newest commit in the part of the last segment, microseconds since 1970; 0 if there is none.
    newest_us: i64,
}

async fn end_of(archive: &Archive, history: &History, reach: &Reach) -> Result<End> {
    let at = |lsn| End { lsn, newest_us: 0 };
    if !reach.has_part {
        return Ok(at(reach.end));
    }
    if !archive.stanza.keys().can_read() {
        // What the names of pieces say.
        let mut end = reach.end.0;
        for piece in archive.piece_list(reach.missing).await? {
            if piece.start <= end {
                end = end.max(piece.end);
            }
        }
        return Ok(at(Lsn(end)));
    }
    let content = Reader::new(archive, history).content(reach.missing).await;
    match content {
        Ok(content) => {
            let content = content.unwrap_or_default();
            let lsn = Lsn(reach.end.0 + content.len() as u64);
            Ok(End {
                lsn,
                newest_us: newest_before(archive, reach.missing, content, lsn),
            })
        }
        Err(error) if error.kind() == Kind::Temporary => Err(error),
        Err(error) => {
            tracing::warn!("a part of a segment is passed over: {error}");
            Ok(at(reach.end))
        }
    }
}

/// The newest commit that a segment has before `end`, microseconds since 1970; 0 if there is none.
fn newest_before(archive: &Archive, segment: Segment, mut content: Vec<u8>, end: Lsn) -> i64 {
    let start = segment.start(archive.segment_size);
    content.truncate(usize::try_from(end.0.saturating_sub(start.0)).unwrap_or(usize::MAX));
    // Nothing begins where zeros begin.
    content.resize(content.len().next_multiple_of(WAL_PAGE), 0);
    summarize(&content, start, archive.segment_size).max_time_us
}

/// So many segments without a commit are looked through for the newest one: a long load is a single transaction.
const COMMITLESS: usize = 512;

/// So many of them are looked at ahead.
const LOOKS: usize = 4;

/// The newest commit before `end`, which whole segments hold: of the last of them that have one.
async fn newest_commit(archive: &Archive, history: &History, from: Lsn, end: Lsn) -> Result<i64> {
    let size = archive.segment_size;
    let segments = history.segments(from, end, size).into_iter().rev().take(COMMITLESS);
    let mut looks = futures::stream::iter(segments)
        .map(async |segment| (segment, newest_in(archive, segment, end).await))
        .buffered(LOOKS);
    while let Some((segment, found)) = looks.next().await {
        match found {
            Ok(0) => {}
            Ok(newest) => return Ok(newest),
            Err(error) if error.kind() == Kind::Temporary => return Err(error),
            Err(error) => tracing::warn!("{} cannot be read: {error}", segment.name(size)),
        }
    }
    Ok(0)
}

/// The newest commit of a segment before `end`.
async fn newest_in(archive: &Archive, segment: Segment, end: Lsn) -> Result<i64> {
    let size = archive.segment_size;
    if segment.end(size) <= end {
        let header = archive.segment_header(segment).await?;
        return Ok(header.and_then(|h| h.summary).map_or(0, |s| s.max_time_us));
    }
    if !archive.stanza.keys().can_read() {
        return Ok(0);
    }
    let content = archive.whole_segment(segment).await?.unwrap_or_default();
    Ok(newest_before(archive, segment, content, end))
}

/// A backup inside a window that is already known adds nothing.
async fn add_window(
    windows: &mut Vec<Window>,
    archive: &Archive,
    history: &History,
    info: &BackupInfo,
    reach: &Reach,
    end: End,
    broken: Option<Lsn>,
) -> Result<()> {
    let (system_identifier, to_lsn) = (
        archive.system_identifier.to_string(),
        broken.unwrap_or(end.lsn).to_string(),
    );
    let is_it =
        |w: &Window| (&w.system_identifier, w.timeline, &w.to_lsn) == (&system_identifier, history.timeline, &to_lsn);
    if windows.iter().any(is_it) {
        return Ok(());
    }
    let from = Lsn(info.start_lsn);
    let newest = match broken {
        None if end.newest_us != 0 => end.newest_us,
        None => newest_commit(archive, history, from, reach.end).await?,
        Some(at) => newest_commit(archive, history, from, at).await?,
    };
    let is_hole = reach.is_hole && !reach.is_expired && broken.is_none();
    windows.push(Window {
        system_identifier,
        timeline: history.timeline,
        backup: info.id.clone(),
        from_lsn: Lsn(info.stop_lsn).to_string(),
        to_lsn,
        from: rfc3339(info.stopped_us),
        to: (newest != 0).then(|| format_time(newest)),
        to_us: newest,
        hole: is_hole.then(|| reach.missing.name(archive.segment_size)),
        hole_end: is_hole.then(|| reach.last_missing.name(archive.segment_size)),
        broken: broken.map(|at| format!("wal_level = minimal at {at}")),
    });
    Ok(())
}
