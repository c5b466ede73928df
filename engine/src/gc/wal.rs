//! WAL that has expired, and pieces of segments that are complete.
//!
//! What always holds: of WAL that the log says has expired, nothing is deleted that a backup needs which is live, which
//! the signed policy protects, or which a living reader holds; timeline histories stay.

use std::collections::{BTreeMap, BTreeSet};

use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::names;
use fairvault_format::proto::CommittedBackup;

use super::history::Past;
use super::{Options, Report};
use crate::commit::Log;
use crate::commit::lease::Found;
use crate::error::Result;
use crate::expire::wal::{Kept, Needed};
use crate::immutable::pieces::is_genuine;
use crate::postgres::segment::{Segment, WalFile};
use crate::restore::target::info;
use crate::wal::archive::Archive;
use crate::wal::coverage::Coverage;

/// Objects deleted in one go.
const BATCH: usize = 256;

/// WAL that the log says has expired, and what of it must stay all the same.
#[derive(Default)]
pub struct Expired {
    /// By incarnation: what of it is needed; `None` if that is not known, and all of it stays.
    lives: BTreeMap<u64, (Archive, Option<Needed>)>,
}

impl std::fmt::Debug for Expired {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.lives.keys()).finish()
    }
}

impl Expired {
    /// Of a log that was replayed. `readers` are the leases that live, read after the log. Adds to `kept` why some stays.
    pub async fn of(log: &Log, readers: &[Found], kept: &mut Vec<String>) -> Result<Self> {
        let past = Past::of(log);
        let of = |backup: &CommittedBackup, goes_on: bool| Kept {
            info: info(backup),
            goes_on,
        };
        let live = past.live().iter().map(|b| of(b, past.is_young(b)));
        let protected = past.protected().iter().map(|b| of(b, true));
        let held = readers.iter().flat_map(|lease| past.named(lease.backup()));
        let backups: Vec<Kept> = live.chain(protected).chain(held.map(|b| of(b, true))).collect();
        let mut this = Self::default();
        for incarnation in &log.state().incarnations {
            let id = incarnation.system_identifier;
            let archive = Archive::open(log, Some(id), 0)?;
            let needed = match archive.expired.is_empty() {
                true => Some(Needed::default()),
                false => {
                    let coverage = Coverage::read(&archive).await?;
                    let of_life = backups.iter().filter(|kept| kept.info.system_identifier == id);
                    // Whoever opens no content may be kept from reading histories that are whole.
                    let reads = log.stanza().check_reads("reading histories").is_ok();
                    let unread = unread_history(&coverage).filter(|_| !reads);
                    unread
                        .map_or_else(|| Needed::of(&coverage, of_life), Err)
                        .map_err(|why| kept.push(format!("all WAL of cluster {id}: {why}")))
                        .ok()
                }
            };
            this.lives.insert(id, (archive, needed));
        }
        Ok(this)
    }

    /// Whether an object has expired and may go.
    pub fn has(&self, object: &str) -> bool {
        let Some(name) = names::parse_wal(object) else {
            return false;
        };
        let Some((archive, Some(needed))) = self.lives.get(&name.system_identifier) else {
            return false;
        };
        match segment(&name, archive.segment_size) {
            Some(segment) => archive.is_expired(segment) && !needed.has(segment),
            None => false,
        }
    }
}

/// A timeline of which it is not known where it leads from, in words: then neither is which WAL a backup goes on with.
fn unread_history(coverage: &Coverage) -> Option<String> {
    coverage.timelines.iter().find_map(|(timeline, wal)| {
        let why = wal.history_problem.as_ref()?;
        Some(format!("the history of timeline {timeline} cannot be read: {why}"))
    })
}

/// The segment that an object belongs to; histories belong to none.
fn segment(name: &names::WalName<'_>, segment_size: u64) -> Option<Segment> {
    // Another partial file of the same segment carries a part of its content's id behind its name.
    let plain = name.file.split_once('-').map_or(name.file, |(plain, _)| plain);
    match WalFile::parse(plain, segment_size) {
        Ok(WalFile::Segment(s) | WalFile::Partial(s) | WalFile::BackupHistory(s)) => Some(s),
        _ => None,
    }
}

/// Collects the WAL of every incarnation.
pub async fn collect(log: &Log, expired: &Expired, options: &Options, report: &mut Report) -> Result<()> {
    for incarnation in &log.state().incarnations {
        let archive = Archive::open(log, Some(incarnation.system_identifier), 0)?;
        collect_of(&archive, expired, options, report).await?;
    }
    Ok(())
}

async fn collect_of(archive: &Archive, expired: &Expired, options: &Options, report: &mut Report) -> Result<()> {
    let store = archive.stanza.store();
    let folder = format!("{}/{:016x}", names::WAL, archive.system_identifier);
    let mut gone = Vec::new();
    let mut whole = BTreeSet::new();
    let mut pieces: BTreeMap<String, Vec<(String, u64)>> = BTreeMap::new();
    for (object, len) in store.list(&folder).await? {
        let Some(name) = names::parse_wal(&object) else {
            continue;
        };
        if expired.has(&object) {
            gone.push((object, len));
        } else if name.is_piece {
            let segment = names::wal_file(archive.system_identifier, name.timeline, name.file, name.epoch);
            pieces.entry(segment).or_default().push((object, len));
        } else {
            whole.insert(object);
        }
    }
    for (segment, of_segment) in pieces {
        // Pieces may be the segment: then the object in its name is a seal.
        if whole.contains(&segment) && is_genuine(&archive.stanza, ObjectKind::WalSegment, &segment).await? {
            gone.extend(of_segment);
        }
    }
    for batch in gone.chunks(BATCH) {
        if !options.dry_run {
            let names: Vec<String> = batch.iter().map(|(name, _)| name.clone()).collect();
            store.delete(&names).await?;
        }
        // What could not be deleted is not counted.
        batch.iter().for_each(|(_, len)| report.wal.add(*len));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::coverage::TimelineWal;

    #[test]
    fn a_history_that_cannot_be_read_is_named() {
        let wal = |problem: Option<&str>| TimelineWal {
            history_problem: problem.map(str::to_owned),
            ..Default::default()
        };
        let of = |problem| Coverage::of(1 << 20, BTreeMap::from([(1, wal(None)), (2, wal(problem))]));
        assert_eq!(unread_history(&of(None)), None);
        let said = unread_history(&of(Some("it is sealed"))).unwrap_or_default();
        assert!(said.contains("timeline 2") && said.contains("it is sealed"), "{said}");
    }
}
