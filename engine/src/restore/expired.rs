//! A backup that has expired, for as long as all of it is there.
//!
//! What always holds: no collection that has begun could take any of its content. One that begins later waits for the
//! lease, which whoever reads has taken before the log is read here. Its WAL is not marked before it is collected: what
//! the signed policy does not protect may go at any time, and recovery stops then.

use std::collections::HashSet;

use fairvault_format::names;
use fairvault_format::proto::CommittedBackup;

use crate::commit::Log;
use crate::commit::expired::Expiry;
use crate::error::{Error, Kind, Result};
use crate::gc::history::Past;
use crate::gc::usage;

/// A backup that has expired and can still be read.
#[derive(Debug, Clone)]
pub struct Expired {
    /// The backup.
    pub backup: CommittedBackup,
    /// That it has expired, by whom, when and why, and what keeps it, in words.
    pub note: String,
}

/// The backup with this id that has expired, if there was one. Fails where any of it is gone, and where a collection has
/// begun that may take it.
pub async fn find(log: &Log, id: &str) -> Result<Option<Expired>> {
    // The state of a log, which may come from a snapshot, knows nothing of what has expired.
    let log = Log::replay_backups(log.stanza().clone()).await?;
    let Some(Expiry { backup, said }) = log.expired(id).cloned() else {
        return Ok(None);
    };
    let stanza = log.stanza();
    let gone = |what: &str| {
        Error::not_found(format!(
            "stanza {} has no backup {id:?} any more: it has expired, {said}, and {what} gone",
            stanza.name()
        ))
        .remedy("restore another one: `fairvault info` shows them")
    };
    let list = match usage::read(stanza, &backup.root).await {
        Err(error) if error.kind() == Kind::NotFound => return Err(gone("its manifest is")),
        list => list?,
    };
    let (packs, _) = list.packs.as_chunks::<32>();
    let marks = log.state().open_marks.iter();
    let marked: HashSet<&[u8]> = marks
        .flat_map(|mark| mark.packs.iter().chain(&mark.roots))
        .map(Vec::as_slice)
        .collect();
    if marked.contains(backup.root.as_slice()) || packs.iter().any(|pack| marked.contains(&pack[..])) {
        let why =
            format!("backup {id} has expired, {said}, and a collection has begun that may delete it at any moment");
        return Err(Error::new(Kind::Held, why).remedy(
            "if it is to stay, raise the signed policy (`fairvault policy`); then let `fairvault gc` get to its end, and try again",
        ));
    }
    let listed = stanza.store().list_hashes(names::PACKS).await?;
    let is_lost = |pack: &&[u8; 32]| listed.binary_search_by_key(*pack, |(name, _)| *name).is_err();
    match packs.iter().filter(is_lost).count() {
        0 => {}
        lost => return Err(gone(&format!("{lost} of its {} packs are", packs.len()))),
    }
    let is_kept = Past::of(&log).needed().any(|needed| needed.root == backup.root);
    let kept = match is_kept {
        true => "the signed policy keeps it, and the WAL from it on".to_owned(),
        false => format!(
            "nothing keeps it and its WAL: let no `fairvault gc` run before recovery has got to its target, or raise the \
             signed policy first (`fairvault policy {} --minimum-retention …`)",
            stanza.name()
        ),
    };
    Ok(Some(Expired {
        backup,
        note: format!("backup {id} has expired, {said}; {kept}"),
    }))
}
