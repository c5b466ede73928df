//! Index runs without the packs that are gone. One run is in memory at a time.

use std::collections::HashSet;

use fairvault_format::index::IndexRun;

use super::Sizes;
use crate::commit::Log;
use crate::dedup::{read_run, store_run};
use crate::error::{Kind, Result};
use crate::stanza::Stanza;

/// What a sweep does to the index.
#[derive(Debug, Default)]
pub struct Changes {
    /// Runs that are withdrawn.
    pub withdrawn: Vec<Vec<u8>>,
    /// Runs in their place.
    pub new: Vec<Vec<u8>>,
}

/// A run that can be read; `None`, with a warning, for one that cannot: it only costs its savings.
async fn readable(stanza: &Stanza, hash: &[u8]) -> Result<Option<IndexRun>> {
    match read_run(stanza, hash).await {
        Ok(run) => Ok(Some(run)),
        Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => {
            tracing::warn!("a part of the index is withdrawn: {error}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Whether any live run names one of these packs.
pub async fn name_any(log: &Log, packs: &Sizes) -> Result<bool> {
    if packs.is_empty() {
        return Ok(false);
    }
    let packs: HashSet<[u8; 32]> = packs.iter().map(|(pack, _)| *pack).collect();
    for hash in &log.state().index_runs {
        let run = readable(log.stanza(), hash).await?.unwrap_or_default();
        if run.packs.iter().any(|pack| packs.contains(&pack.name)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Stores runs without `packs` in the place of those that name them.
pub async fn without(log: &Log, packs: &HashSet<[u8; 32]>) -> Result<Changes> {
    let stanza = log.stanza();
    let mut changes = Changes::default();
    for hash in &log.state().index_runs {
        let Some(run) = readable(stanza, hash).await? else {
            changes.withdrawn.push(hash.clone());
            continue;
        };
        if !run.packs.iter().any(|pack| packs.contains(&pack.name)) {
            continue;
        }
        changes.withdrawn.push(hash.clone());
        let rest = filtered(run, packs);
        if rest.packs.is_empty() {
            continue;
        }
        changes.new.push(store_run(stanza, rest).await?.to_vec());
    }
    Ok(changes)
}

fn filtered(run: IndexRun, without: &HashSet<[u8; 32]>) -> IndexRun {
    let mut numbers = Vec::with_capacity(run.packs.len());
    let mut packs = Vec::new();
    for pack in run.packs {
        let stays = !without.contains(&pack.name);
        numbers.push(stays.then_some(packs.len() as u32));
        if stays {
            packs.push(pack);
        }
    }
    let mut entries = run.entries;
    entries.retain_mut(|entry| match numbers[entry.pack as usize] {
        Some(number) => {
            entry.pack = number;
            true
        }
        None => false,
    });
    IndexRun { packs, entries }
}

#[cfg(test)]
mod tests {
    use fairvault_format::header::{Kind, ObjectHeader};
    use fairvault_format::index::{IndexEntry, PackRef};

    use super::*;

    #[test]
    fn entries_follow_their_packs() {
        let pack = |n: u8| PackRef {
            name: [n; 32],
            header: ObjectHeader::new(Kind::Pack, 1, [n; 32]),
        };
        let entry = |id: u8, pack| IndexEntry {
            id: [id; 32],
            pack,
            ordinal: 0,
            offset: 80,
            stored_len: 9,
        };
        let run = IndexRun {
            packs: vec![pack(1), pack(2), pack(3)],
            entries: vec![entry(1, 2), entry(2, 0), entry(3, 1)],
        };
        let rest = filtered(run, &HashSet::from([[1; 32], [9; 32]]));
        assert_eq!(rest.packs, [pack(2), pack(3)]);
        assert_eq!(rest.entries, [entry(1, 1), entry(3, 0)]);
    }
}
