//! Which moment: targets as the user says them, and the proof that the repository can reach them.

use std::ops::ControlFlow;

use fairvault_format::proto::{self, BackupInfo};

use super::reader::Reader;
use crate::commit::Log;
use crate::error::{Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::History;
use crate::postgres::walker::What;
use crate::wal::archive::Archive;
use crate::wal::coverage::{Coverage, Reach};

/// Where recovery ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The end of all WAL.
    Latest,
    /// As soon as the backup is consistent.
    Immediate,
    /// A time, microseconds since 1970.
    Time(i64),
    /// A position.
    Lsn(Lsn),
    /// A transaction.
    Xid(u32),
    /// A restore point.
    Name(String),
}

/// What to do at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Wait for a person.
    Pause,
    /// Become a primary.
    Promote,
    /// Stop the server.
    Shutdown,
}

/// Which timeline to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimelineChoice {
    /// The newest that the backup is on the way to.
    Latest,
    /// The backup's own.
    Current,
    /// This one.
    Number(u32),
}

/// A target that can be reached.
#[derive(Debug, Clone)]
pub struct Reachable {
    /// The backup to start from.
    pub backup: proto::CommittedBackup,
    /// The timeline to follow.
    pub history: History,
    /// Recovery must get at least here.
    pub through: Lsn,
    /// Continuous WAL ends here.
    pub wal_end: Lsn,
    /// Recovery must not read beyond this: the target is the end of what is there now.
    pub until: Option<Lsn>,
    /// The timeline is the newest that is known, and PostgreSQL will find it by itself, and those that follow.
    pub is_newest: bool,
    /// The target as PostgreSQL is to be told; `None` for the end of WAL.
    pub setting: Option<(&'static str, String)>,
    /// Things that the user should know.
    pub notes: Vec<String>,
}

/// The backup's facts.
pub fn info(backup: &proto::CommittedBackup) -> BackupInfo {
    backup.info.clone().unwrap_or_default()
}

/// A time as PostgreSQL's settings take it.
pub fn format_time(us: i64) -> String {
    match jiff::Timestamp::from_microsecond(us) {
        Ok(time) => time.strftime("%Y-%m-%d %H:%M:%S.%6f+00").to_string(),
        Err(_) => us.to_string(),
    }
}

/// The choice among backups and timelines for a target.
pub struct Choice<'a> {
    log: &'a Log,
    archive: &'a Archive,
    coverage: &'a Coverage,
}

impl<'a> Choice<'a> {
    /// Over what the repository has.
    pub fn new(log: &'a Log, archive: &'a Archive, coverage: &'a Coverage) -> Self {
        Self { log, archive, coverage }
    }

    /// The history of a timeline that is to be followed: without it, recovery would be refused later.
    fn known_history(&self, timeline: u32) -> Result<History> {
        let wal = self.coverage.timelines.get(&timeline);
        if let Some(history) = wal.and_then(|wal| wal.history.clone()) {
            return Ok(history);
        }
        if timeline == 1 {
            return Ok(History {
                timeline,
                ancestors: Vec::new(),
            });
        }
        let why = wal.and_then(|wal| wal.history_problem.clone());
        Err(Error::damaged(format!(
            "the history of timeline {timeline} cannot be followed: {}",
            why.unwrap_or_else(|| format!("{timeline:08X}.history is not in the repository"))
        ))
        .remedy("archive it from pg_wal of any server that has it with `fairvault wal push`"))
    }

    /// The history to follow from a backup.
    fn history(&self, backup: &BackupInfo, choice: TimelineChoice) -> Result<History> {
        let own = || self.known_history(backup.stop_timeline);
        let leads = |history: &History| match history.end_of(backup.stop_timeline) {
            Ok(None) => true,
            Ok(Some(end)) => end.0 >= backup.stop_lsn,
            Err(_) => false,
        };
        match choice {
            TimelineChoice::Current => own(),
            TimelineChoice::Latest => self
                .coverage
                .histories()
                .rev()
                .find(|h| h.timeline >= backup.stop_timeline && leads(h))
                .cloned()
                .map_or_else(own, Ok),
            TimelineChoice::Number(number) => {
                if !self.coverage.timelines.contains_key(&number) {
                    let known: Vec<_> = self.coverage.timelines.keys().map(u32::to_string).collect();
                    return Err(Error::not_found(format!("there is no WAL of timeline {number}"))
                        .remedy(format!("timelines: {}", known.join(", "))));
                }
                let history = self.known_history(number)?;
                match leads(&history) {
                    true => Ok(history),
                    false => Err(Error::not_found(format!(
                        "backup {} (timeline {}, up to {}) is not on the way to timeline {number}",
                        backup.id,
                        backup.stop_timeline,
                        Lsn(backup.stop_lsn)
                    ))),
                }
            }
        }
    }

    /// Finds the newest backup from which `target` can be reached, if none is `wanted`, or says what is in the way.
    pub async fn resolve(
        &self,
        wanted: Option<&proto::CommittedBackup>,
        target: &Target,
        timeline: TimelineChoice,
        exclusive: bool,
    ) -> Result<Reachable> {
        let candidates: Vec<_> = match wanted {
            Some(backup) => vec![backup.clone()],
            None => self
                .log
                .state()
                .backups
                .iter()
                .rev()
                .filter(|b| info(b).system_identifier == self.archive.system_identifier)
                .cloned()
                .collect(),
        };
        if candidates.is_empty() {
            self.log.backup("latest")?;
            return Err(Error::not_found("there is no backup of this cluster")
                .remedy("take one; those of the cluster before an upgrade are restored by name, with --backup"));
        }
        let mut first_failure = None;
        let mut notes = Vec::new();
        for backup in candidates {
            match self.reach_from(&backup, target, timeline, exclusive).await {
                Ok(mut reachable) => {
                    reachable.notes.extend(notes);
                    return Ok(reachable);
                }
                Err(error) if error.kind() == Kind::NotFound => {
                    first_failure.get_or_insert(error);
                }
                // Damage around one backup does not stand in the way of an older one.
                Err(error) if error.kind() == Kind::Damaged && wanted.is_none() => {
                    notes.push(format!("backup {} is passed over: {error}", info(&backup).id));
                    first_failure.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(first_failure.unwrap_or_else(|| Error::not_found("no backup reaches the target")))
    }

    async fn reach_from(
        &self,
        backup: &proto::CommittedBackup,
        target: &Target,
        choice: TimelineChoice,
        exclusive: bool,
    ) -> Result<Reachable> {
        let info = info(backup);
        let history = self.history(&info, choice)?;
        let (start, stop) = (Lsn(info.start_lsn), Lsn(info.stop_lsn));
        let reach = self.coverage.reach(&history, start);
        let reader = Reader::new(self.archive, &history);
        let mut end = reach.end;
        if reach.has_part {
            let part = reader.content(reach.missing).await?.map_or(0, |c| c.len() as u64);
            end = Lsn(end.0 + part);
        }
        if end < stop {
            return Err(self.incomplete(&info, &reach, "the backup itself needs WAL up to", stop));
        }
        let mut found = Reachable {
            backup: backup.clone(),
            history: history.clone(),
            through: stop,
            wal_end: end,
            // What lies behind a hole is never asked for; PostgreSQL reads ahead of what it replays.
            until: reach.is_hole.then_some(end),
            is_newest: choice == TimelineChoice::Latest
                && self
                    .coverage
                    .timelines
                    .keys()
                    .all(|&timeline| timeline <= history.timeline)
                && (2..=history.timeline).all(|t| self.coverage.histories().any(|h| h.timeline == t)),
            setting: None,
            notes: Vec::new(),
        };
        if choice == TimelineChoice::Latest {
            let unknown = self.coverage.timelines.iter().filter(|(_, wal)| wal.history.is_none());
            for (timeline, _) in unknown.filter(|(timeline, _)| **timeline > history.timeline) {
                found.notes.push(format!(
                    "WAL of timeline {timeline} is there, but not its history: it cannot be followed"
                ));
            }
        }
        match target {
            Target::Latest => {
                if reach.is_hole {
                    found.notes.push(self.hole_note(&reach));
                }
                found.through = self.records_end(&reader, start.max(stop), end).await?;
            }
            Target::Immediate => self.immediate(&reader, stop, &mut found).await?,
            Target::Time(time_us) => {
                self.time(&reader, &info, (*time_us, exclusive), &reach, &mut found)
                    .await?
            }
            Target::Lsn(lsn) => self.lsn(&reader, &info, *lsn, &reach, &mut found).await?,
            Target::Xid(_) | Target::Name(_) => {
                self.search(&reader, &info, target, exclusive, &reach, &mut found)
                    .await?
            }
        }
        if found.setting.is_some() {
            // Nothing behind the segment of the target is needed, whatever becomes of it.
            let size = self.archive.segment_size;
            found.until = Some(Lsn(found.through.0.div_ceil(size) * size));
        }
        Ok(found)
    }

    /// PostgreSQL stops at the first record behind the point of consistency, which it has to read, and which may lie in
    /// the next segment. Where there is none, the end of the WAL is that point.
    async fn immediate(&self, reader: &Reader<'_>, stop: Lsn, found: &mut Reachable) -> Result<()> {
        let size = self.archive.segment_size;
        let mut next = None;
        let from = Lsn(stop.0.saturating_sub(1) / size * size);
        let search = reader.walk_records(from, found.wal_end, |record| match record.lsn < stop {
            true => ControlFlow::Continue(()),
            false => {
                next = Some(record.end);
                ControlFlow::Break(())
            }
        });
        search.await?;
        match next {
            Some(end) => {
                found.through = end.min(found.wal_end).max(stop);
                found.setting = Some(("recovery_target", "immediate".to_owned()));
            }
            None => {
                found.until = Some(found.wal_end);
                found.notes.push(format!(
                    "the WAL in the repository ends where the backup becomes consistent ({stop}): recovery goes there"
                ));
            }
        }
        Ok(())
    }

    async fn time(
        &self,
        reader: &Reader<'_>,
        info: &BackupInfo,
        (time_us, exclusive): (i64, bool),
        reach: &Reach,
        found: &mut Reachable,
    ) -> Result<()> {
        let (start, stop) = (Lsn(info.start_lsn), Lsn(info.stop_lsn));
        let before = match reader.newest_commit(start, stop).await? {
            Some(newest) => newest,
            // Without a commit that is known, only the clock of the host that took the backup is left.
            None => reader.newest_commit_before(start).await?.unwrap_or(info.started_us),
        };
        if before > time_us || exclusive && before == time_us {
            return Err(Error::not_found(format!(
                "backup {} holds what was committed up to {}, after the target {}",
                info.id,
                format_time(before),
                format_time(time_us)
            ))
            .remedy(
                "an older backup is needed for it, or a later target; see `fairvault info` for the restorable window",
            ));
        }
        match reader
            .first_commit_after(time_us, exclusive, stop, found.wal_end)
            .await?
        {
            Some(at) => {
                found.through = found.through.max(at);
                found.setting = Some(("recovery_target_time", format_time(time_us)));
                Ok(())
            }
            None if reach.is_hole => Err(self.incomplete(
                info,
                reach,
                "no commit later than the target comes before a hole in the WAL; the target is",
                stop,
            )),
            None => {
                found.until = Some(found.wal_end);
                found.through = self.records_end(reader, stop, found.wal_end).await?;
                found.notes.push(format!(
                    "no commit after {} is in the repository: recovery goes to the end of the WAL ({})",
                    format_time(time_us),
                    found.wal_end
                ));
                Ok(())
            }
        }
    }

    async fn lsn(
        &self,
        reader: &Reader<'_>,
        info: &BackupInfo,
        lsn: Lsn,
        reach: &Reach,
        found: &mut Reachable,
    ) -> Result<()> {
        let stop = Lsn(info.stop_lsn);
        if lsn < stop {
            return Err(Error::not_found(format!(
                "backup {} is consistent at {stop}, after the target {lsn}",
                info.id
            )));
        }
        if lsn >= found.wal_end && reach.has_part && !reach.is_hole {
            return Err(Error::not_found(format!(
                "WAL in the repository ends at {}: {lsn} is never reached",
                found.wal_end
            ))
            .remedy("use --target latest, or an earlier position"));
        }
        if lsn >= found.wal_end {
            return Err(self.incomplete(info, reach, "the target needs WAL up to", lsn));
        }
        let segment_start = Lsn(lsn.0 / self.archive.segment_size * self.archive.segment_size);
        // PostgreSQL stops at the first record that begins at or after the target: there must be one.
        let mut stops_at = None;
        let walked = reader
            .walk_records(segment_start.max(Lsn(info.start_lsn)), found.wal_end, |record| {
                if record.lsn < lsn {
                    return ControlFlow::Continue(());
                }
                stops_at = Some(record.end);
                ControlFlow::Break(())
            })
            .await?;
        let Some(stops_at) = stops_at else {
            return Err(Error::not_found(format!(
                "the last record in the repository begins at {}: {lsn} is never reached",
                walked.last_record.unwrap_or_default()
            ))
            .remedy("use --target latest, or an earlier position"));
        };
        found.through = stops_at.min(found.wal_end).max(stop);
        found.setting = Some(("recovery_target_lsn", lsn.to_string()));
        Ok(())
    }

    async fn search(
        &self,
        reader: &Reader<'_>,
        info: &BackupInfo,
        target: &Target,
        exclusive: bool,
        reach: &Reach,
        found: &mut Reachable,
    ) -> Result<()> {
        let stop = Lsn(info.stop_lsn);
        let mut hit = None;
        reader
            .walk_records(Lsn(info.start_lsn), found.wal_end, |record| {
                let Some(event) = record.event() else {
                    return ControlFlow::Continue(());
                };
                let matches = match (&event.what, target) {
                    (What::TransactionEnd { xid, .. }, Target::Xid(wanted)) => xid == wanted,
                    (What::RestorePoint { name, .. }, Target::Name(wanted)) => name == wanted,
                    _ => false,
                };
                if !matches {
                    return ControlFlow::Continue(());
                }
                hit = Some(event.end);
                ControlFlow::Break(())
            })
            .await?;
        let shown = match target {
            Target::Xid(xid) => format!("transaction {xid}"),
            Target::Name(name) => format!("restore point {name:?}"),
            _ => String::new(),
        };
        let Some(at) = hit else {
            let mut error = Error::not_found(format!(
                "{shown} is not in the WAL from backup {} to {}",
                info.id, found.wal_end
            ));
            if reach.is_hole {
                error = error.remedy(self.hole_note(reach));
            }
            return Err(error);
        };
        if at <= stop {
            return Err(Error::not_found(format!(
                "{shown} is at {at}, before backup {} is consistent ({stop})",
                info.id
            ))
            .remedy("an older backup is needed for it"));
        }
        found.through = at;
        found.setting = Some(match target {
            Target::Xid(xid) => ("recovery_target_xid", xid.to_string()),
            Target::Name(name) => ("recovery_target_name", name.clone()),
            _ => return Ok(()),
        });
        if exclusive && matches!(target, Target::Name(_)) {
            found
                .notes
                .push("a restore point has no effect of its own: exclusive makes no difference".to_owned());
        }
        Ok(())
    }

    /// Where the records end in WAL that ends at `end`: a part may end inside one.
    async fn records_end(&self, reader: &Reader<'_>, from: Lsn, end: Lsn) -> Result<Lsn> {
        let size = self.archive.segment_size;
        // A record may have begun in the segment before.
        let last = end.0.saturating_sub(1) / size * size;
        let walked = reader
            .walk(Lsn(last.saturating_sub(size)).max(from), end, |_| {})
            .await?;
        Ok(walked.end.max(from).min(end))
    }

    fn hole_note(&self, reach: &Reach) -> String {
        let name = reach.missing.name(self.archive.segment_size);
        let what = match reach.is_expired {
            true => "has expired",
            false => "is missing while later WAL is there",
        };
        format!(
            "{name} {what}: what comes after {} cannot be reached from this backup",
            reach.end
        )
    }

    fn incomplete(&self, info: &BackupInfo, reach: &Reach, need: &str, lsn: Lsn) -> Error {
        let state = if reach.is_expired {
            "has expired"
        } else {
            "is not in the repository"
        };
        Error::not_found(format!(
            "backup {}: {need} {lsn}, and {} {state}",
            info.id,
            reach.missing.name(self.archive.segment_size)
        ))
        .remedy(format!(
            "continuous WAL from this backup ends at {}; see `fairvault info` for every restorable window",
            reach.end
        ))
    }
}
