//! WAL that has expired, and pieces of segments that are complete.
//!
//! What always holds: of WAL that the log says has expired, nothing is deleted that a backup needs which is live, which
//! the signed policy protects, or which a living reader holds; timeline histories stay.

use std::collections::{BTreeMap, BTreeSet};

use fairvault_format::header::{HEADER_LEN, Kind as ObjectKind, ObjectHeader};
use fairvault_format::names;
use fairvault_format::proto::CommittedBackup;

use super::history::Past;
use super::{Options, Report};
use crate::commit::Log;
use crate::commit::lease::Found;
use crate::error::Result;
use crate::expire::wal::{Kept, Needed};
use crate::postgres::segment::WalFile;
use crate::restore::target::info;
use crate::wal::archive::Archive;
use crate::wal::coverage::Coverage;

/// Objects deleted in one go.
const BATCH: usize = 256;

/// Collects the WAL of every incarnation. `readers` are the leases that live, read after the log.
pub async fn collect(log: &Log, readers: &[Found], options: &Options, report: &mut Report) -> Result<()> {
    let past = Past::of(log);
    let policy = log.state().policy.clone().unwrap_or_default();
    let now_us = log.stanza().env().now_us();
    let youngest = now_us.saturating_sub_unsigned(policy.minimum_retention_s.saturating_mul(1_000_000));
    let of = |backup: &CommittedBackup, goes_on: bool| Kept {
        info: info(backup),
        goes_on,
    };
    let live = past.live().iter().map(|b| of(b, info(b).stopped_us > youngest));
    let protected = past.protected().iter().map(|b| of(b, true));
    let held = readers.iter().flat_map(|lease| past.named(lease.backup()));
    let kept: Vec<Kept> = live.chain(protected).chain(held.map(|b| of(b, true))).collect();
    for incarnation in log.state().incarnations.clone() {
        let id = incarnation.system_identifier;
        let archive = Archive::open(log, Some(id), 0)?;
        let needed = match archive.expired.is_empty() {
            true => Needed::default(),
            false => {
                let coverage = Coverage::read(&archive).await?;
                match Needed::of(&coverage, kept.iter().filter(|kept| kept.info.system_identifier == id)) {
                    Ok(needed) => needed,
                    Err(why) => {
                        report.kept.push(format!("all WAL of cluster {id}: {why}"));
                        collect_of(&archive, None, options, report).await?;
                        continue;
                    }
                }
            }
        };
        collect_of(&archive, Some(&needed), options, report).await?;
    }
    Ok(())
}

/// `needed` is what must stay of what has expired; all of it, if it is not known.
async fn collect_of(archive: &Archive, needed: Option<&Needed>, options: &Options, report: &mut Report) -> Result<()> {
    let store = archive.stanza.store();
    let folder = format!("{}/{:016x}", names::WAL, archive.system_identifier);
    let mut gone = Vec::new();
    let mut whole = BTreeSet::new();
    let mut pieces: BTreeMap<String, Vec<(String, u64)>> = BTreeMap::new();
    for (object, len) in store.list(&folder).await? {
        let Some(name) = names::parse_wal(&object) else {
            continue;
        };
        let file = WalFile::parse(name.file, archive.segment_size);
        let Ok(WalFile::Segment(s) | WalFile::Partial(s) | WalFile::BackupHistory(s)) = file else {
            continue;
        };
        if archive.is_expired(s) && needed.is_some_and(|needed| !needed.has(s)) {
            gone.push((object, len));
        } else if name.is_piece {
            let segment = names::wal_file(archive.system_identifier, s.timeline, name.file, name.epoch);
            pieces.entry(segment).or_default().push((object, len));
        } else {
            whole.insert(object);
        }
    }
    for (segment, of_segment) in pieces {
        // Pieces may be the segment: then the object in its name is a seal.
        if whole.contains(&segment) && is_segment(archive, &segment).await? {
            gone.extend(of_segment);
        }
    }
    gone.iter().for_each(|(_, len)| report.wal.add(*len));
    if !options.dry_run {
        for batch in gone.chunks(BATCH) {
            let names: Vec<String> = batch.iter().map(|(name, _)| name.clone()).collect();
            store.delete(&names).await?;
        }
    }
    Ok(())
}

async fn is_segment(archive: &Archive, object: &str) -> Result<bool> {
    let bytes = archive.stanza.store().get_range(object, 0..HEADER_LEN as u64).await?;
    Ok(ObjectHeader::decode(&bytes, object)?.kind == ObjectKind::WalSegment)
}
