//! Backups of which it is known that they cannot be restored as they are: their root or one of their packs is gone, or
//! `verify` found a pack damaged. What nobody has looked at yet is not known here: `verify` looks.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use fairvault_format::names;
use fairvault_format::proto::CommittedBackup;

use crate::commit::Log;
use crate::dedup::{distrusted, list_packs};
use crate::error::{Context, Kind, Result};
use crate::gc::usage;
use crate::restore::target::info;
use crate::stanza::Stanza;

/// What is wrong with the backups of a log, by id. Asks for the root of every one of them.
pub async fn of_all(log: &Log) -> Result<BTreeMap<String, String>> {
    let listed = list_packs(log.stanza()).await?;
    let packs = Packs {
        bad: distrusted(log.stanza()).await?,
        listed: Some(listed),
        gone: BTreeSet::new(),
    };
    find(log, packs).await
}

/// The same as far as `verify` has noted it: two requests, if it has found nothing.
pub async fn noted(log: &Log) -> Result<BTreeMap<String, String>> {
    let bad = distrusted(log.stanza()).await?;
    if bad.is_empty() {
        return Ok(BTreeMap::new());
    }
    let packs = Packs {
        bad,
        listed: None,
        gone: BTreeSet::new(),
    };
    find(log, packs).await
}

struct Packs {
    bad: HashSet<[u8; 32]>,
    /// `None`: all are taken to be there.
    listed: Option<HashMap<[u8; 32], u64>>,
    /// What was not listed, and was asked for.
    gone: BTreeSet<[u8; 32]>,
}

async fn find(log: &Log, mut packs: Packs) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for backup in &log.state().backups {
        if let Some(why) = look(log.stanza(), backup, &mut packs).await? {
            found.insert(info(backup).id, why);
        }
    }
    Ok(found)
}

async fn look(stanza: &Stanza, backup: &CommittedBackup, packs: &mut Packs) -> Result<Option<String>> {
    let used = match usage::read(stanza, &backup.root).await {
        Ok(used) => used,
        Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Damaged) => return Ok(Some(error.to_string())),
        Err(error) => return Err(error).context(|| format!("what backup {} uses", info(backup).id)),
    };
    for pack in used.packs.as_chunks::<32>().0 {
        let short = || hex::encode(&pack[..8]);
        if packs.bad.contains(pack) {
            return Ok(Some(format!("pack {}… was found damaged", short())));
        }
        let Some(listed) = &mut packs.listed else { continue };
        // LIST is a hint: what it does not show is asked for.
        if !listed.contains_key(pack) && !packs.gone.contains(pack) {
            match stanza.store().len(&names::pack(pack)).await? {
                Some(len) => _ = listed.insert(*pack, len),
                None => _ = packs.gone.insert(*pack),
            }
        }
        if packs.gone.contains(pack) {
            return Ok(Some(format!("pack {}… is gone", short())));
        }
    }
    Ok(None)
}
