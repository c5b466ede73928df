//! Index runs without the packs that are gone. What is left of several runs becomes one, so that their number does not
//! grow for ever. In memory are one run at a time, and what is left of those before it as long as that is little.

use std::collections::{HashMap, HashSet};

use fairvault_format::index::{IndexEntry, IndexRun};

use super::Sizes;
use crate::commit::Log;
use crate::dedup::{read_run, store_run};
use crate::error::{Kind, Result};
use crate::stanza::Stanza;

/// Entries of runs that are joined, 768 KiB: few runs are few requests for a backup that reads the index, and small ones
/// are little to write again when some of their packs go.
const RUN_ENTRIES: usize = 1 << 14;

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
    let mut joined = IndexRun::default();
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
        if joined.entries.len() + rest.entries.len() > RUN_ENTRIES && !joined.packs.is_empty() {
            let full = std::mem::take(&mut joined);
            changes.new.push(store_run(stanza, full).await?.to_vec());
        }
        join(&mut joined, rest);
    }
    if !joined.packs.is_empty() {
        changes.new.push(store_run(stanza, joined).await?.to_vec());
    }
    Ok(changes)
}

/// Adds a run to another: its packs come behind those that are there. What both name is named once.
fn join(all: &mut IndexRun, more: IndexRun) {
    let mut known: HashMap<[u8; 32], u32> = HashMap::with_capacity(all.packs.len());
    for (number, pack) in all.packs.iter().enumerate() {
        known.insert(pack.name, number as u32);
    }
    let mut numbers = Vec::with_capacity(more.packs.len());
    for pack in more.packs {
        numbers.push(*known.entry(pack.name).or_insert_with(|| {
            all.packs.push(pack);
            all.packs.len() as u32 - 1
        }));
    }
    let entries = more.entries.into_iter().map(|entry| IndexEntry {
        pack: numbers[entry.pack as usize],
        ..entry
    });
    all.entries.extend(entries);
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
    use fairvault_format::index::PackRef;

    use super::*;

    fn pack(n: u8) -> PackRef {
        PackRef {
            name: [n; 32],
            header: ObjectHeader::new(Kind::Pack, 1, [n; 32]),
        }
    }

    fn entry(id: u8, pack: u32) -> IndexEntry {
        IndexEntry {
            id: [id; 32],
            pack,
            ordinal: 0,
            offset: 80,
            stored_len: 9,
        }
    }

    #[test]
    fn joined_runs_name_each_pack_once() {
        let mut all = IndexRun::default();
        join(
            &mut all,
            IndexRun {
                packs: vec![pack(1), pack(2)],
                entries: vec![entry(1, 0), entry(2, 1)],
            },
        );
        join(
            &mut all,
            IndexRun {
                packs: vec![pack(3), pack(1)],
                entries: vec![entry(3, 0), entry(4, 1)],
            },
        );
        assert_eq!(all.packs, [pack(1), pack(2), pack(3)]);
        assert_eq!(all.entries, [entry(1, 0), entry(2, 1), entry(3, 2), entry(4, 0)]);
    }

    #[test]
    fn entries_follow_their_packs() {
        let run = IndexRun {
            packs: vec![pack(1), pack(2), pack(3)],
            entries: vec![entry(1, 2), entry(2, 0), entry(3, 1)],
        };
        let rest = filtered(run, &HashSet::from([[1; 32], [9; 32]]));
        assert_eq!(rest.packs, [pack(2), pack(3)]);
        assert_eq!(rest.entries, [entry(1, 1), entry(3, 0)]);
    }
}
