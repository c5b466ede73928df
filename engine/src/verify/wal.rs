//! The WAL archive: every object opens, and what each backup needs of it is there.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};

use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::header::ObjectHeader;
use fairvault_format::proto::{BackupInfo, CommittedBackup, PieceSeal};
use fairvault_format::{limits, names, object as objects, wal};
use futures::StreamExt;

use super::{BackupVerdict, CONCURRENT, Finding, Level, Report};
use crate::commit::Log;
use crate::error::{Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, WalFile};
use crate::progress::Progress;
use crate::restore::reader::Reader;
use crate::restore::target::info;
use crate::stanza::Stanza;
use crate::wal::archive::Archive;
use crate::wal::coverage::Coverage;

/// The kind of a WAL object, by its name; a seal has the name of its segment.
fn kind(object: &str) -> Option<ObjectKind> {
    let name = names::parse_wal(object)?;
    Some(match name.file.len() {
        _ if name.is_piece => ObjectKind::WalPiece,
        24 => ObjectKind::WalSegment,
        _ => ObjectKind::WalSide,
    })
}

/// Opens an object; of a seal, the pieces that it names must be there.
async fn open(stanza: &Stanza, object: &str, listed: &BTreeSet<String>) -> Result<u64> {
    let mut kind = kind(object).ok_or_else(|| Error::damaged("its name is not that of a WAL object"))?;
    let bytes = stanza.store().get(object, limits::WAL_OBJECT_BYTES).await?;
    let keys = stanza.keys_for(&bytes, object)?;
    if kind == ObjectKind::WalSegment && ObjectHeader::decode(&bytes, object)?.kind == ObjectKind::PieceSeal {
        kind = ObjectKind::PieceSeal;
    }
    match kind {
        ObjectKind::PieceSeal => {
            let seal: PieceSeal = objects::open_message(keys, stanza.scope(), kind, &bytes, object, object)?;
            let folder = object.rsplit_once('.').map_or(object, |(name, _)| name);
            let mut named = seal.pieces.iter().map(|piece| format!("{folder}.d/{piece}"));
            if let Some(missing) = named.find(|piece| !listed.contains(piece)) {
                return Err(Error::damaged(format!("it seals {missing}, which is not there")));
            }
        }
        _ => _ = wal::open_wal(keys, stanza.scope(), kind, &bytes, object)?,
    }
    Ok(bytes.len() as u64)
}

/// Whether an object is of a segment that has expired.
fn is_expired(log: &Log, object: &str) -> bool {
    let Some(name) = names::parse_wal(object) else {
        return false;
    };
    let Ok(archive) = Archive::open(log, Some(name.system_identifier), 0) else {
        return false;
    };
    match WalFile::parse(name.file, archive.segment_size) {
        Ok(WalFile::Segment(s) | WalFile::Partial(s) | WalFile::BackupHistory(s)) => archive.is_expired(s),
        _ => false,
    }
}

/// The WAL of every incarnation, listed once, and the objects that are bad.
pub struct Archives {
    bad: BTreeSet<String>,
    known: HashMap<u64, (Archive, Coverage)>,
}

impl Archives {
    /// Opens every WAL object.
    pub async fn check_objects(log: &Log, report: &mut Report, progress: &Progress) -> Self {
        let stanza = log.stanza();
        let mut bad = BTreeSet::new();
        let objects = match stanza.store().list(names::WAL).await {
            Ok(objects) => objects,
            Err(error) => {
                report.note(names::WAL, &error);
                Vec::new()
            }
        };
        let listed: BTreeSet<String> = objects.into_iter().map(|(object, _)| object).collect();
        let checks = listed.iter().map(|object| async {
            let opened = open(stanza, object, &listed).await;
            (object.clone(), opened)
        });
        let mut checks = futures::stream::iter(checks).buffer_unordered(CONCURRENT);
        let mut vanished = Vec::new();
        while let Some((object, opened)) = checks.next().await {
            report.objects += 1;
            match opened {
                Ok(len) => {
                    report.bytes += len;
                    progress.read_bytes.add(len);
                }
                // Whoever receives replaces pieces; what is missing for good shows in what backups need.
                Err(error) if error.kind() == Kind::NotFound && kind(&object) == Some(ObjectKind::WalPiece) => {}
                Err(error) if error.kind() == Kind::NotFound => vanished.push((object, error)),
                Err(error) => {
                    report.note(&object, &error);
                    bad.insert(object);
                }
            }
        }
        // What a collector deletes meanwhile has expired.
        let mut now = log.clone();
        if !vanished.is_empty()
            && let Err(error) = now.refresh().await
        {
            report.note(names::LOG, &error);
        }
        for (object, error) in vanished {
            if !is_expired(&now, &object) {
                report.note(&object, &error);
                bad.insert(object);
            }
        }
        Self {
            bad,
            known: HashMap::new(),
        }
    }

    async fn of(&mut self, log: &Log, system_identifier: u64) -> Result<(&Archive, &Coverage)> {
        let (archive, coverage) = match self.known.entry(system_identifier) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(slot) => {
                let archive = Archive::open(log, Some(system_identifier), 3)?;
                let coverage = Coverage::read(&archive).await?;
                slot.insert((archive, coverage))
            }
        };
        Ok((archive, coverage))
    }

    /// The WAL that a backup needs for itself, and whether WAL after it has holes.
    pub async fn check_backup(
        &mut self,
        log: &Log,
        backup: &CommittedBackup,
        level: Level,
        verdict: &mut BackupVerdict,
        report: &mut Report,
    ) -> Result<()> {
        let bad = std::mem::take(&mut self.bad);
        let checked = match self.of(log, info(backup).system_identifier).await {
            Ok((archive, coverage)) => {
                let of_cluster = log.state().backups.iter().filter_map(|b| b.info.clone());
                let of_cluster = of_cluster.filter(|i| i.system_identifier == archive.system_identifier);
                let all: Vec<BackupInfo> = of_cluster.collect();
                check_backup(archive, coverage, backup, &all, level, &bad, verdict, report).await
            }
            Err(error) => Err(error),
        };
        self.bad = bad;
        checked
    }
}

/// Reports the first hole behind the start of a backup along a history, and the others before the next backup, where later
/// WAL is there: as findings if somebody was to bring it.
fn report_holes(
    archive: &Archive,
    coverage: &Coverage,
    history: &History,
    info: &BackupInfo,
    all: &[BackupInfo],
    report: &mut Report,
) {
    let size = archive.segment_size;
    // Backups that brought their own WAL promise nothing about what comes after them; an archive does.
    let mut timelines = history.ancestors.iter().map(|a| a.timeline).chain([history.timeline]);
    let is_promised = info.wal_method == "archive"
        || timelines.any(|timeline| coverage.bridges(timeline, all.iter()).contains(&true));
    let belongs = |other: &&BackupInfo| {
        let ended = history.end_of(other.start_timeline);
        ended.is_ok_and(|end| end.is_none_or(|end| Lsn(other.start_lsn) < end))
    };
    let later = all
        .iter()
        .filter(|other| other.start_lsn > info.start_lsn)
        .filter(belongs);
    let next_backup = later.map(|other| other.start_lsn).min().unwrap_or(u64::MAX);
    let mut from = Lsn(info.start_lsn);
    loop {
        let reach = coverage.reach(history, from);
        if !reach.is_hole {
            return;
        }
        let lacks_own =
            reach.end < Lsn(info.stop_lsn) && !(reach.has_part && reach.missing.end(size) >= Lsn(info.stop_lsn));
        if let Some(proof) = coverage
            .proof_of_more(history, reach.missing)
            .filter(|_| !reach.is_expired)
        {
            let part = if reach.has_part {
                "only a part is there"
            } else {
                "it is missing"
            };
            let folder = names::wal_folder(info.system_identifier, reach.missing.timeline);
            let object = format!("{folder}/{}", reach.missing.name(size));
            let problem = format!("{part}, and {proof}: recovery from earlier backups ends before it");
            match is_promised || lacks_own {
                true => report.add(object, problem),
                false => report.gaps.push(Finding { object, problem }),
            }
        }
        match coverage.next_any(history, reach.missing.number + 1) {
            Some(next) if next.saturating_mul(size) < next_backup => from = Lsn(next.saturating_mul(size)),
            _ => return,
        }
    }
}

#[allow(clippy::too_many_arguments)]
async fn check_backup(
    archive: &Archive,
    coverage: &Coverage,
    backup: &CommittedBackup,
    all: &[BackupInfo],
    level: Level,
    bad: &BTreeSet<String>,
    verdict: &mut BackupVerdict,
    report: &mut Report,
) -> Result<()> {
    let info = info(backup);
    let known = coverage.timelines.get(&info.stop_timeline);
    let history = match known.and_then(|wal| wal.history.clone()) {
        Some(history) => history,
        None if info.stop_timeline == 1 => History {
            timeline: 1,
            ancestors: Vec::new(),
        },
        None => {
            let why = known.and_then(|wal| wal.history_problem.clone());
            verdict.problems.push(format!(
                "the history of its timeline {} {}",
                info.stop_timeline,
                why.map_or("is missing".to_owned(), |why| format!("cannot be read: {why}"))
            ));
            return Ok(());
        }
    };
    let (start, stop) = (Lsn(info.start_lsn), Lsn(info.stop_lsn));
    let reach = coverage.reach(&history, start);
    let name = reach.missing.name(archive.segment_size);
    let reader = Reader::new(archive, &history);
    // Recovery may go on along every timeline that leads on from here.
    let onward = coverage.leading_from(info.stop_timeline, stop);
    let onward = onward.into_iter().filter(|other| other.timeline != history.timeline);
    for history in std::iter::once(&history).chain(onward) {
        report_holes(archive, coverage, history, &info, all, report);
    }
    if reach.end < stop && !reach.has_part {
        verdict.problems.push(format!("{name} of its own WAL is missing"));
        return Ok(());
    }
    for segment in reader.segments(start, stop.min(reach.end)) {
        let name = segment.name(archive.segment_size);
        let folder = names::wal_folder(info.system_identifier, segment.timeline);
        if bad
            .iter()
            .any(|object| object.starts_with(&format!("{folder}/{name}.")))
        {
            // A part may be bad while the whole is good: reading tells.
            if let Err(error) = archive.segment_or_parts(segment).await {
                if error.kind() == Kind::Temporary {
                    return Err(error);
                }
                verdict.problems.push(format!("{name} of its own WAL is damaged"));
                return Ok(());
            }
        }
    }
    if level == Level::Data || reach.end < stop {
        let end = reader.walk(start, stop, |_| {}).await?.end;
        if end < stop {
            verdict
                .problems
                .push(format!("its own WAL cannot be read beyond {end}; it needs {stop}"));
        }
    }
    Ok(())
}
