//! Backups of which it is known that they cannot be restored as they are: their root or one of their packs is gone, or
//! `verify` found a pack damaged. What nobody has looked at yet is not known here: `verify` looks.

use std::collections::{BTreeMap, HashMap, HashSet};

use fairvault_format::proto::CommittedBackup;
use fairvault_format::{limits, names, sha256};
use futures::StreamExt;

use crate::commit::Log;
use crate::dedup::{distrusted, list_packs};
use crate::error::{Context, Kind, Result};
use crate::gc::usage;
use crate::restore::target::info;
use crate::stanza::Stanza;

/// Roots that are fetched at once.
const PARALLEL: usize = 16;

/// What is wrong with the backups of a log, by id. Asks for the root of every one of them.
pub async fn of_all(log: &Log) -> Result<BTreeMap<String, String>> {
    let stanza = log.stanza();
    let packs = Packs {
        marked: distrusted(stanza).await?,
        bad: HashSet::new(),
        there: list_packs(stanza).await?.into_keys().map(|pack| (pack, true)).collect(),
        looks_for_gone: true,
    };
    find(log, packs).await
}

/// The same as far as `verify` has noted it: one request, if it has found nothing.
pub async fn noted(log: &Log) -> Result<BTreeMap<String, String>> {
    let marked = distrusted(log.stanza()).await?;
    if marked.is_empty() {
        return Ok(BTreeMap::new());
    }
    let packs = Packs {
        marked,
        bad: HashSet::new(),
        there: HashMap::new(),
        looks_for_gone: false,
    };
    find(log, packs).await
}

struct Packs {
    /// Found damaged, at some time.
    marked: HashSet<[u8; 32]>,
    /// Of these, those that still are.
    bad: HashSet<[u8; 32]>,
    /// Whether a pack is there, as far as that was asked.
    there: HashMap<[u8; 32], bool>,
    looks_for_gone: bool,
}

impl Packs {
    /// What is wrong with a pack.
    async fn problem(&mut self, stanza: &Stanza, pack: &[u8; 32]) -> Result<Option<&'static str>> {
        let name = names::pack(pack);
        if self.bad.contains(pack) {
            return Ok(Some("was found damaged"));
        }
        if self.marked.contains(pack) {
            // It may have been brought back since. Marks are few.
            match stanza.store().get_opt(&name, limits::PACK_BYTES).await {
                Ok(Some(bytes)) if sha256(&bytes) == *pack => _ = self.marked.remove(pack),
                Err(error) if error.kind() == Kind::Temporary => return Err(error),
                _ => {
                    self.bad.insert(*pack);
                    return Ok(Some("was found damaged"));
                }
            }
        }
        if !self.looks_for_gone {
            return Ok(None);
        }
        let is_there = match self.there.get(pack) {
            Some(known) => *known,
            // LIST is a hint: what it does not show is asked for.
            None => {
                let found = stanza.store().len(&name).await?.is_some();
                *self.there.entry(*pack).or_insert(found)
            }
        };
        Ok((!is_there).then_some("is gone"))
    }
}

async fn find(log: &Log, mut packs: Packs) -> Result<BTreeMap<String, String>> {
    let stanza = log.stanza();
    let backups: Vec<CommittedBackup> = log.state().backups.clone();
    let mut lists = futures::stream::iter(backups)
        .map(async |backup| {
            let used = usage::read(stanza, &backup.root).await;
            (info(&backup).id, used)
        })
        .buffered(PARALLEL);
    let mut found = BTreeMap::new();
    while let Some((id, used)) = lists.next().await {
        let used = match used {
            Ok(used) => used,
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Damaged) => {
                found.insert(id, error.to_string());
                continue;
            }
            Err(error) => return Err(error).context(|| format!("what backup {id} uses")),
        };
        for pack in used.packs.as_chunks::<32>().0 {
            if let Some(problem) = packs.problem(stanza, pack).await? {
                found.insert(id, format!("pack {}… {problem}", hex::encode(&pack[..8])));
                break;
            }
        }
    }
    Ok(found)
}
