//! What a restore will do, decided and proved before anything is written.

use std::path::Path;

use fairvault_format::index::PackRef;
use fairvault_format::proto::{self, FileEntry, FileKind};

use super::Options;
use super::expired;
use super::reader::Reader;
use super::target::{Choice, Reachable, info};
use crate::commit::Log;
use crate::error::{Error, Kind, Result};
use crate::manifest::{FrameRef, Manifest, Placement};
use crate::postgres::lsn::Lsn;
use crate::postgres::walker::{Event, What, rmgr};
use crate::wal::archive::Archive;
use crate::wal::coverage::Coverage;

/// What a restore will do.
#[derive(Debug)]
pub struct Plan {
    /// Target and backup.
    pub reachable: Reachable,
    /// Facts of the backup.
    pub info: proto::BackupInfo,
    /// Files.
    pub files: Vec<FileEntry>,
    /// Packs.
    pub packs: Vec<PackRef>,
    /// Frames.
    pub frames: Vec<FrameRef>,
    /// Placements.
    pub placements: Vec<Placement>,
    /// Tablespaces: oid and where their content goes; `None` for in place.
    pub tablespaces: Vec<(u32, Option<String>)>,
}

/// Why there is no plan.
#[derive(Debug)]
pub enum Unplanned {
    /// What this repository holds, or that it refuses: another one may do.
    Here(Error),
    /// What was asked for, or this host: somebody has to say or do something first. Another repository, which may lack the
    /// newest backups, is no answer.
    Anywhere(Error),
}

impl From<Error> for Unplanned {
    fn from(error: Error) -> Self {
        match error.kind() {
            Kind::Usage | Kind::Interrupted => Self::Anywhere(error),
            _ => Self::Here(error),
        }
    }
}

impl Plan {
    /// Decides, and proves that it can be done.
    /// Its WAL may be spread over this repository and `others`.
    pub async fn make(log: &Log, others: &[Log], options: &Options) -> std::result::Result<Self, Unplanned> {
        let (wanted, expired) = match &options.backup {
            None => (None, None),
            Some(id) => match log.backup(id) {
                Ok(backup) => (Some(backup.clone()), None),
                Err(error) => {
                    let found = expired::find(log, id).await?.ok_or(error)?;
                    (Some(found.backup), Some(found.note))
                }
            },
        };
        let system_identifier = wanted.as_ref().map(|backup| info(backup).system_identifier);
        let archive = Archive::open(log, system_identifier, 3)?;
        let of_cluster = |other: &Log| Archive::open(other, Some(archive.system_identifier), 3).ok();
        let others = others.iter().filter_map(of_cluster).collect();
        let archive = archive.beside(others);
        let coverage = match &expired {
            None => Coverage::read(&archive).await?,
            Some(_) => Coverage::read_with_expired(&archive).await?,
        };
        let choice = Choice::new(log, &archive, &coverage);
        let resolved = choice
            .resolve(wanted.as_ref(), &options.target, options.timeline, options.exclusive)
            .await;
        let reachable = match expired {
            None => resolved?,
            Some(note) => {
                let mut reachable = resolved.map_err(|error| error.context(&note))?;
                tracing::warn!("{note}");
                reachable.notes.insert(0, note);
                reachable
            }
        };
        let info = info(&reachable.backup);
        let tablespaces = tablespaces(&info, options).map_err(Unplanned::Anywhere)?;
        check_replay(&archive, &reachable, &info, options, &tablespaces).await?;
        let manifest = Manifest::read(log.stanza(), &reachable.backup.root).await?;
        if manifest.root.info.as_ref() != Some(&info) {
            let why = "the manifest root is damaged: its facts are not those in the log";
            return Err(Error::damaged(why).into());
        }
        check_links(&info.id, &manifest.files)?;
        Ok(Self {
            reachable,
            info,
            files: manifest.files,
            packs: manifest.packs,
            frames: manifest.frames,
            placements: manifest.placements,
            tablespaces,
        })
    }
}

/// Fails if a manifest brings a link. Those of tablespaces are not in it, and PostgreSQL sends no others; the restored
/// server would write through it, to wherever the host says that took the backup.
fn check_links(backup: &str, files: &[FileEntry]) -> Result<()> {
    match files.iter().find(|file| file.kind() == FileKind::FileSymlink) {
        None => Ok(()),
        Some(link) => Err(Error::refused(format!(
            "backup {backup} brings the link {:?} to {:?}, and a backup has none but those of tablespaces",
            link.path, link.link_target
        ))
        .remedy("find out who took it, and restore another one")),
    }
}

fn tablespaces(info: &proto::BackupInfo, options: &Options) -> Result<Vec<(u32, Option<String>)>> {
    for (old, _) in &options.tablespace_map {
        if old != "all"
            && !info
                .tablespaces
                .iter()
                .any(|t| &t.location == old || t.oid.to_string() == *old)
        {
            let known: Vec<_> = info.tablespaces.iter().map(|t| t.location.as_str()).collect();
            return Err(
                Error::usage(format!("--tablespace-map {old}=…: the backup has no such tablespace"))
                    .remedy(format!("tablespaces: {}", known.join(", "))),
            );
        }
    }
    info.tablespaces
        .iter()
        .map(|t| {
            if t.in_place {
                return Ok((t.oid, None));
            }
            let mapped = options.tablespace_map.iter().find(|(old, _)| old == &t.location || *old == t.oid.to_string());
            let all = options.tablespace_map.iter().find(|(old, _)| old == "all");
            let location = match (mapped, all) {
                (Some((_, new)), _) => new.clone(),
                (None, Some((_, new))) => format!("{}/{}", new.trim_end_matches('/'), t.oid),
                (None, None) if options.keep_tablespaces => t.location.clone(),
                (None, None) => {
                    return Err(Error::refused(format!("tablespace {} is at {} and was not mapped", t.oid, t.location)).remedy(format!(
                        "say where it goes: --tablespace-map {}=/new/folder, or all=/new/folder for every one; --keep-tablespaces writes to the original places",
                        t.location
                    )));
                }
            };
            if !location.starts_with('/') || location.contains('\n') {
                return Err(Error::usage(format!("tablespace folder {location:?} is not an absolute path")));
            }
            Ok((t.oid, Some(location)))
        })
        .collect()
}

/// Refuses WAL that must not, or cannot, be replayed. What it would do to this host, it would do from anywhere.
async fn check_replay(
    archive: &Archive,
    reachable: &Reachable,
    info: &proto::BackupInfo,
    options: &Options,
    tablespaces: &[(u32, Option<String>)],
) -> std::result::Result<(), Unplanned> {
    let reader = Reader::new(archive, &reachable.history);
    let (from, to) = (Lsn(info.start_lsn), reachable.through.max(Lsn(info.stop_lsn)));
    let mut events: Vec<Event> = Vec::new();
    let segments = reader.segments(from, to);
    for (i, &segment) in segments.iter().enumerate() {
        let summary = archive.segment_header(segment).await?.and_then(|h| h.summary);
        let crossing = |s: &proto::WalSummary| {
            s.unfinished && [0, u32::from(rmgr::XLOG) + 1, u32::from(rmgr::TBLSPC) + 1].contains(&s.unfinished_rmgr)
        };
        match summary {
            Some(s) if s.stopped_at == 0 && !crossing(&s) => {
                events.extend(s.tablespaces.iter().map(|t| Event {
                    lsn: Lsn(t.lsn),
                    end: Lsn(t.lsn),
                    what: What::TablespaceCreate {
                        oid: t.oid,
                        location: t.location.clone(),
                    },
                }));
                events.extend(s.parameter_changes.iter().map(|p| Event {
                    lsn: Lsn(p.lsn),
                    end: Lsn(p.lsn),
                    what: What::ParameterChange { wal_level: p.wal_level },
                }));
            }
            _ => {
                let end = segments
                    .get(i + 1)
                    .copied()
                    .unwrap_or(segment)
                    .end(archive.segment_size);
                let walked = reader
                    .walk(segment.start(archive.segment_size), end, |event| {
                        events.push(event.clone())
                    })
                    .await?;
                if let Some(stop) = walked.stop.filter(|stop| stop.at < end.min(to)) {
                    let why = format!(
                        "the WAL cannot be read at {}, and this recovery has to get to {to}: {}",
                        stop.at, stop.why
                    );
                    return Err(Error::damaged(why)
                        .remedy("choose a target before it, or a backup taken after it")
                        .into());
                }
            }
        }
    }
    // The record at the target itself may be replayed too.
    // Replay makes the link anew, to where the record says: that is safe only if the restore writes there anyway.
    let is_planned = |oid: u32, location: &str| {
        tablespaces
            .iter()
            .any(|(planned, to)| *planned == oid && to.as_deref() == Some(location))
    };
    for event in events.iter().filter(|e| e.lsn >= from && e.lsn <= to) {
        match &event.what {
            What::ParameterChange { wal_level: 0 } => {
                let why = format!(
                    "the server ran with wal_level = minimal from {}: PostgreSQL refuses to recover across that",
                    event.lsn
                );
                return Err(Error::not_found(why)
                    .remedy("choose a target before it, or a backup taken after it")
                    .into());
            }
            What::TablespaceCreate { oid, location } if !location.is_empty() && !is_planned(*oid, location) => {
                let inside = Path::new(location).starts_with(&options.directory);
                if !inside && Path::new(location).exists() {
                    let why = format!(
                        "recovery would replay CREATE TABLESPACE {oid} at {} and write into {location}, which exists on this host",
                        event.lsn
                    );
                    return Err(Unplanned::Anywhere(Error::refused(why).remedy(
                        "this could destroy a live server's data: restore on another host, or take a backup that includes the tablespace and map it",
                    )));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_the_caller_can_answer_is_asked_of_no_other_repository() {
        let is_final = |kind: Kind| matches!(Unplanned::from(Error::new(kind, "why")), Unplanned::Anywhere(_));
        for kind in [
            Kind::Failed,
            Kind::NotFound,
            Kind::Damaged,
            Kind::Held,
            Kind::Refused,
            Kind::Unsupported,
            Kind::Temporary,
        ] {
            assert!(!is_final(kind), "{kind:?}");
        }
        assert!(is_final(Kind::Usage) && is_final(Kind::Interrupted));
    }

    #[test]
    fn links_of_a_manifest_are_refused() {
        let entry = |path: &str, kind: FileKind, target: &str| FileEntry {
            path: path.to_owned(),
            kind: kind as i32,
            link_target: target.to_owned(),
            ..Default::default()
        };
        let good = [
            entry("base", FileKind::FileDirectory, ""),
            entry("base/1", FileKind::FileRegular, ""),
        ];
        assert!(check_links("b", &good).is_ok());
        for (path, target) in [
            ("postmaster.opts", "/home/x/.profile"),
            ("base/1", "../../other"),
            ("pg_tblspc/16384", "/srv"),
        ] {
            let files = [good[0].clone(), entry(path, FileKind::FileSymlink, target)];
            let error = check_links("b", &files).unwrap_err();
            assert_eq!(error.kind(), Kind::Refused);
            let said = error.to_string();
            assert!(said.contains(path) && said.contains(target), "{said}");
        }
    }
}
