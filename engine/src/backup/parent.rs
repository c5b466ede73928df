//! Which earlier backup a new one builds on, and why none if there is none.
//!
//! What always holds: a parent is of the same cluster, version, checksum state and timeline, and had ended before its
//! child begins; all WAL between the two is walked. Anything else reads everything.

use std::sync::Arc;

use fairvault_format::keys::EpochKeys;
use fairvault_format::proto;

use super::{Kind, Options, remembered};
use crate::commit::Log;
use crate::dedup::{self, Index};
use crate::env::has_fault;
use crate::error::{Error, Kind as ErrorKind, Result};
use crate::manifest::Manifest;
use crate::postgres::BLOCK_BYTES;
use crate::postgres::lsn::Lsn;
use crate::stanza::Stanza;
use crate::track::FAULTY_PARSERS;
use crate::track::range::{self, Range};
use crate::track::selection::Basis;
use crate::wal::archive::Archive;

/// What is known of a backup that has begun.
pub struct Child {
    /// System identifier.
    pub system_identifier: u64,
    /// As server_version_num.
    pub server_version: u32,
    /// The cluster has checksums.
    pub checksums: bool,
    /// Where it begins.
    pub start: Lsn,
    /// On which timeline.
    pub timeline: u32,
    /// Why it is not known that the WAL in the repository is this server's, if it is not.
    pub doubt: Option<Error>,
}

/// What there is to build on.
pub enum Choice {
    /// This.
    Parent(Arc<Basis>),
    /// Nothing, and why.
    None(String),
}

/// Whether a state has a backup that one of `kind` may build on, as far as that is known before it begins.
pub fn is_there(state: &proto::Snapshot, kind: Kind, system_identifier: u64) -> bool {
    candidates(state, kind, system_identifier).next().is_some()
}

/// Newest first.
fn candidates(
    state: &proto::Snapshot,
    kind: Kind,
    system_identifier: u64,
) -> impl Iterator<Item = (&proto::CommittedBackup, &proto::BackupInfo)> {
    let of_kind = move |info: &proto::BackupInfo| match kind {
        Kind::Full => false,
        Kind::Diff => info.r#type == "full" || info.parent.is_empty(),
        Kind::Auto | Kind::Incr => true,
    };
    let infos = state.backups.iter().filter_map(|b| Some((b, b.info.as_ref()?)));
    let mut found: Vec<_> = infos
        .filter(|(_, info)| info.system_identifier == system_identifier && of_kind(info))
        .collect();
    found.sort_by_key(|(_, info)| std::cmp::Reverse(info.stop_lsn));
    found.into_iter()
}

/// Chooses for a backup that has begun.
pub async fn choose(log: &Log, archive: &Archive, options: &Options, index: &Index, child: &Child) -> Result<Choice> {
    if options.kind == Kind::Full {
        return Ok(Choice::None("a full backup was asked for".to_owned()));
    }
    if let Some(doubt) = &child.doubt {
        return Ok(Choice::None(format!(
            "the WAL in the repository could not be compared with the server's: {doubt}"
        )));
    }
    let mut why_not = None;
    for (backup, info) in candidates(log.state(), options.kind, child.system_identifier) {
        let cannot = |why: String| format!("backup {} cannot be its parent: {why}", info.id);
        let why = match obstacle(info, child, &log.state().distrusted) {
            // An older one may be of a cluster as this is again: what was in between counts all the same.
            Some(Obstacle::Changed(why)) => {
                why_not.get_or_insert(cannot(why));
                break;
            }
            Some(Obstacle::Own(why)) => cannot(why),
            None => match manifest(log.stanza(), backup).await? {
                Ok(manifest) => return with_parent(log, archive, options, index, manifest, info, child.start).await,
                Err(why) if log.stanza().keys().can_read() => {
                    return Ok(Choice::None(format!("the manifest of backup {}: {why}", info.id)));
                }
                // This host may keep that of an older one.
                Err(why) => format!("the manifest of backup {}: {why}", info.id),
            },
        };
        // The newest one says most.
        why_not.get_or_insert(why);
    }
    Ok(Choice::None(why_not.unwrap_or_else(|| {
        "there is no earlier backup of this cluster".to_owned()
    })))
}

/// Why a backup cannot be the parent.
#[derive(Debug, PartialEq, Eq)]
enum Obstacle {
    /// The server has changed since, on this timeline: no older one can be the parent either.
    Changed(String),
    /// This one cannot.
    Own(String),
}

fn obstacle(info: &proto::BackupInfo, child: &Child, distrusted: &[proto::DistrustParser]) -> Option<Obstacle> {
    let (version, timeline, start) = (child.server_version, child.timeline, child.start);
    if (info.start_timeline, info.stop_timeline) != (timeline, timeline) {
        return Some(Obstacle::Own(format!(
            "it is of timeline {}, and this is {timeline}",
            info.stop_timeline
        )));
    }
    // What comes after this backup's beginning has changed nothing before it.
    if Lsn(info.stop_lsn) > start {
        return Some(Obstacle::Own(format!(
            "it ended at {}, and this one begins at {start}",
            Lsn(info.stop_lsn)
        )));
    }
    if info.server_version != version {
        return Some(Obstacle::Changed(format!(
            "it is of server version {}, and this is {version}",
            info.server_version
        )));
    }
    if info.data_checksums != child.checksums {
        return Some(Obstacle::Changed("checksums were switched on or off since".to_owned()));
    }
    if info.block_size != BLOCK_BYTES {
        return Some(Obstacle::Changed("its pages have another size".to_owned()));
    }
    let bad = distrusted.iter().map(|d| d.parser_version).chain(FAULTY_PARSERS);
    let parser = bad.into_iter().find(|version| info.parser_versions.contains(version))?;
    Some(Obstacle::Own(format!(
        "it was built with parser {parser}, which is distrusted"
    )))
}

/// The manifest of a backup: from the repository, or what this host keeps of it where its key does not open that; or why
/// there is none.
async fn manifest(stanza: &Stanza, backup: &proto::CommittedBackup) -> Result<std::result::Result<Manifest, String>> {
    let can_read = stanza.keys_of(backup.key_epoch).is_ok_and(EpochKeys::can_read);
    if !can_read {
        return Ok(remembered::manifest(stanza, &backup.root));
    }
    match Manifest::read(stanza, &backup.root).await {
        Ok(manifest) => Ok(Ok(manifest)),
        // The repository is away: so it is for all else.
        Err(error) if error.kind() == ErrorKind::Temporary => Err(error),
        Err(error) => Ok(Err(error.to_string())),
    }
}

async fn with_parent(
    log: &Log,
    archive: &Archive,
    options: &Options,
    index: &Index,
    manifest: Manifest,
    info: &proto::BackupInfo,
    start: Lsn,
) -> Result<Choice> {
    let stanza = log.stanza();
    let size = archive.segment_size;
    let range = Range {
        timeline: info.start_timeline,
        from: Lsn(match has_fault("parent's stop") {
            true => info.stop_lsn,
            false => info.start_lsn,
        }),
        // Off by one: of a segment, all counts or nothing.
        to: Lsn(match has_fault("a segment early") {
            true => (start.0 / size).saturating_sub(1) * size,
            false => start.0,
        }),
    };
    let distrusted = &log.state().distrusted;
    let map = range::changes(archive, &options.conninfo, distrusted, range).await;
    if let Some(why) = map.unknown() {
        return Ok(Choice::None(format!(
            "what changed since backup {} is not known: {why}",
            info.id
        )));
    }
    let good = dedup::usable_packs(stanza, log.state(), index, &manifest).await?;
    let is_good = |pack: u32| good[pack as usize];
    Ok(Choice::Parent(Arc::new(Basis::new(
        info.clone(),
        manifest,
        map,
        start,
        is_good,
    ))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each thing that must be the same, changed by itself.
    #[test]
    fn whatever_must_be_the_same_is_an_obstacle_if_it_is_not() {
        let child = Child {
            system_identifier: 7,
            server_version: 150_018,
            checksums: true,
            start: Lsn(500),
            timeline: 2,
            doubt: None,
        };
        let parent = proto::BackupInfo {
            system_identifier: 7,
            server_version: 150_018,
            data_checksums: true,
            stop_lsn: 500,
            start_timeline: 2,
            stop_timeline: 2,
            block_size: BLOCK_BYTES,
            parser_versions: vec![2],
            ..Default::default()
        };
        assert_eq!(obstacle(&parent, &child, &[]), None);
        type Change = fn(&mut proto::BackupInfo);
        // And whether older ones are out of the question, too.
        let changes: [(Change, bool, &str); 8] = [
            (|p| p.server_version = 150_017, true, "server version 150017"),
            (|p| p.server_version = 140_018, true, "server version 140018"),
            (|p| p.data_checksums = false, true, "checksums"),
            (|p| p.stop_lsn = 501, false, "it ended at"),
            (|p| p.start_timeline = 1, false, "timeline"),
            (|p| p.stop_timeline = 1, false, "of timeline 1"),
            (|p| p.block_size = 4096, true, "pages"),
            (|p| p.parser_versions = vec![1, 2], false, "parser 1"),
        ];
        let told = |info: &proto::BackupInfo| match obstacle(info, &child, &[]) {
            Some(Obstacle::Changed(why)) => (true, why),
            Some(Obstacle::Own(why)) => (false, why),
            None => (false, String::new()),
        };
        for (change, ends, word) in changes {
            let mut changed = parent.clone();
            change(&mut changed);
            let (is_change, why) = told(&changed);
            assert!(why.contains(word), "{why:?} does not say {word:?}");
            assert_eq!(is_change, ends, "{why}");
            // On another timeline, or behind the beginning, it says nothing of what is older.
            changed.stop_lsn = 501;
            assert!(!told(&changed).0, "{word}");
        }
        let distrusted = proto::DistrustParser {
            parser_version: 2,
            reason: String::new(),
        };
        assert!(obstacle(&parent, &child, &[distrusted]).is_some());
    }
}
