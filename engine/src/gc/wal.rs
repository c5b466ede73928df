//! Pieces of segments that are complete. WAL itself does not expire yet.

use std::collections::{BTreeMap, BTreeSet};

use fairvault_format::header::{HEADER_LEN, Kind as ObjectKind, ObjectHeader};
use fairvault_format::names;

use super::{Options, Report};
use crate::commit::Log;
use crate::error::Result;
use crate::postgres::segment::WalFile;
use crate::wal::archive::Archive;

/// Objects deleted in one go.
const BATCH: usize = 256;

/// Collects pieces of every incarnation.
pub async fn collect(log: &Log, options: &Options, report: &mut Report) -> Result<()> {
    for incarnation in log.state().incarnations.clone() {
        let archive = Archive::open(log, Some(incarnation.system_identifier), 0)?;
        collect_of(&archive, options, report).await?;
    }
    Ok(())
}

async fn collect_of(archive: &Archive, options: &Options, report: &mut Report) -> Result<()> {
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
        if let Some(epoch) = piece_of {
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
