//! WAL that has expired, and pieces of segments that are complete.
//!
//! What always holds: only an entry of the log says from where on WAL is kept; below that, what a backup needs for
//! itself stays as long as the backup is needed or read. Histories of timelines stay: they are small, and tell
//! branches apart.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use fairvault_format::header::{HEADER_LEN, Kind as ObjectKind, ObjectHeader};
use fairvault_format::names;
use fairvault_format::proto::CommittedBackup;

use super::history::Past;
use super::{Options, Report};
use crate::commit::Log;
use crate::commit::lease::{self, Found};
use crate::error::Result;
use crate::postgres::segment::WalFile;
use crate::restore::target::info;
use crate::wal::archive::Archive;

/// Objects deleted in one go.
const BATCH: usize = 256;

/// Numbers of the segments that a backup needs for itself.
pub fn own_segments(backup: &CommittedBackup, segment_size: u64) -> RangeInclusive<u64> {
    let info = info(backup);
    let size = segment_size.max(1);
    info.start_lsn / size..=info.stop_lsn.saturating_sub(1) / size
}

/// Collects the WAL of every incarnation.
pub async fn collect(log: &Log, past: &Past, leases: &[Found], options: &Options, report: &mut Report) -> Result<()> {
    let living = lease::living(
        log.stanza(),
        leases.to_vec(),
        match leases.is_empty() {
            true => std::time::Duration::ZERO,
            false => options.patience,
        },
    );
    let living = living.await?;
    for incarnation in log.state().incarnations.clone() {
        let archive = Archive::open(log, Some(incarnation.system_identifier), 0)?;
        let expired = log.state().wal_expired.iter();
        let below = expired
            .filter(|e| e.system_identifier == incarnation.system_identifier)
            .map(|e| e.lsn / archive.segment_size)
            .max()
            .unwrap_or_default();
        let needed = past
            .needed()
            .chain(living.iter().flat_map(|lease| past.named(lease.backup())));
        let own: Vec<_> = needed
            .filter(|backup| info(backup).system_identifier == incarnation.system_identifier)
            .map(|backup| own_segments(backup, archive.segment_size))
            .collect();
        let is_expired = |number: u64| number < below && !own.iter().any(|range| range.contains(&number));
        collect_of(&archive, is_expired, options, report).await?;
    }
    Ok(())
}

async fn collect_of(
    archive: &Archive,
    is_expired: impl Fn(u64) -> bool,
    options: &Options,
    report: &mut Report,
) -> Result<()> {
    let store = archive.stanza.store();
    let folder = format!("{}/{:016x}", names::WAL, archive.system_identifier);
    let mut gone = Vec::new();
    let mut whole = BTreeSet::new();
    let mut pieces: BTreeMap<String, Vec<(String, u64)>> = BTreeMap::new();
    for (object, len) in store.list(&folder).await? {
        let parts: Vec<&str> = object[folder.len() + 1..].split('/').collect();
        // Of a piece, its segment and its archive epoch.
        let (name, piece_of) = match parts.as_slice() {
            [_, file] => match names::parse_wal_file(file) {
                Some((name, _)) => (name, None),
                None => continue,
            },
            [_, of, file] => match names::parse_piece(file) {
                Some((_, _, epoch)) => (of.trim_end_matches(".d"), Some(epoch)),
                None => continue,
            },
            _ => continue,
        };
        let file = WalFile::parse(name, archive.segment_size);
        let Ok(WalFile::Segment(s) | WalFile::Partial(s) | WalFile::BackupHistory(s)) = file else {
            continue;
        };
        if is_expired(s.number) {
            gone.push((object, len));
        } else if let Some(epoch) = piece_of {
            let segment = names::wal_file(archive.system_identifier, s.timeline, name, epoch);
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
