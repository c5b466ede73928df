//! Which objects are needed, and until when: by the log, and by the backups that it says are to stay.

use std::collections::{HashMap, HashSet};

use fairvault_format::proto::{self, CommittedBackup};
use fairvault_format::{limits, names, sha256};

use super::hidden;
use crate::commit::Log;
use crate::error::{Kind, Result};
use crate::gc::history::Past;
use crate::gc::usage;
use crate::gc::wal::Expired;
use crate::postgres::segment::WalFile;
use crate::restore::target::info;
use crate::stanza::Stanza;

/// What is needed, each until a time in microseconds since 1970.
#[derive(Debug, Default)]
pub struct Needs {
    roots: HashMap<[u8; 32], i64>,
    packs: HashMap<[u8; 32], i64>,
    runs: HashSet<[u8; 32]>,
    wal: HashMap<u64, WalNeeds>,
    expired: Expired,
    /// What everything relies on is needed until then.
    last: i64,
    /// Manifests that are lost: which packs they need is not known.
    pub lost_roots: Vec<String>,
}

/// Of a cluster: from which positions on, until when. What comes after a backup is needed as long as that is.
#[derive(Debug)]
struct WalNeeds {
    segment_size: u64,
    from: Vec<(u64, i64)>,
}

impl Needs {
    /// What a log that was replayed amounts to. `until` says of a backup how long it is needed; what no backup needs is
    /// needed until `least`. Manifests that are hidden count as well.
    pub async fn of(log: &Log, least: i64, until: impl Fn(&CommittedBackup) -> i64) -> Result<Self> {
        let past = Past::of(log);
        let mut this = Self {
            last: least,
            expired: Expired::of(log, &[], &mut Vec::new()).await?,
            ..Default::default()
        };
        let runs = log.state().index_runs.iter();
        this.runs = runs.filter_map(|run| run.as_slice().try_into().ok()).collect();
        for incarnation in &log.state().incarnations {
            let needs = WalNeeds {
                segment_size: incarnation.wal_segment_size,
                from: Vec::new(),
            };
            this.wal.insert(incarnation.system_identifier, needs);
        }
        let live = past.live().iter().map(|backup| (backup, true));
        for (backup, is_live) in live.chain(past.protected().iter().map(|backup| (backup, false))) {
            let Ok(root) = <[u8; 32]>::try_from(backup.root.as_slice()) else {
                continue;
            };
            let list = match usage_of(log.stanza(), &root).await? {
                Some(list) => list,
                None if is_live => {
                    this.lost_roots.push(names::root(&root));
                    continue;
                }
                // Collected before the policy protected it.
                None => continue,
            };
            this.add(backup, root, &list, until(backup));
        }
        // The cluster that is archived now is needed from its beginning on until there is a backup.
        if let Some(newest) = log.state().incarnations.last()
            && let Some(wal) = this.wal.get_mut(&newest.system_identifier)
            && wal.from.is_empty()
        {
            wal.from.push((0, least));
        }
        Ok(this)
    }

    fn add(&mut self, backup: &CommittedBackup, root: [u8; 32], list: &proto::Usage, until: i64) {
        let later = |known: &mut i64| *known = (*known).max(until);
        later(&mut self.last);
        later(self.roots.entry(root).or_insert(until));
        for pack in list.packs.as_chunks::<32>().0 {
            later(self.packs.entry(*pack).or_insert(until));
        }
        let info = info(backup);
        if let Some(wal) = self.wal.get_mut(&info.system_identifier) {
            wal.from.push((info.start_lsn, until));
        }
    }

    /// Until when everything else relies on the log, the keys and the index.
    pub fn last(&self) -> i64 {
        self.last
    }

    /// Until when an object of the stanza is needed; `None` if it is not. Of pieces, only their place counts.
    pub fn until(&self, name: &str) -> Option<i64> {
        let folder = name.split('/').next()?;
        match folder {
            names::KEYS | names::LOG => Some(self.last),
            names::PACKS => self.packs.get(&names::parse_hash(name)?).copied(),
            names::ROOTS => self.roots.get(&names::parse_hash(name)?).copied(),
            names::INDEX => self.runs.contains(&names::parse_hash(name)?).then_some(self.last),
            names::WAL if self.expired.has(name) => None,
            names::WAL => self.wal_until(name),
            _ => None,
        }
    }

    fn wal_until(&self, name: &str) -> Option<i64> {
        let names::WalName {
            system_identifier,
            file,
            ..
        } = names::parse_wal(name)?;
        let wal = self.wal.get(&system_identifier)?;
        if file.ends_with(".history") {
            return wal.from.iter().map(|(_, until)| *until).max();
        }
        let Ok(WalFile::Segment(segment)) = WalFile::parse(file.get(..24)?, wal.segment_size) else {
            return None;
        };
        let end = segment.end(wal.segment_size).0;
        let backups = wal.from.iter().filter(|(start, _)| *start < end);
        backups.map(|(_, until)| *until).max()
    }
}

/// What a backup uses, also where its manifest is hidden; `None` if it is lost.
async fn usage_of(stanza: &Stanza, root: &[u8; 32]) -> Result<Option<proto::Usage>> {
    let (store, name) = (stanza.store(), names::root(root));
    let bytes = match store.get_opt(&name, limits::OBJECT_BYTES).await {
        Ok(Some(bytes)) if sha256(&bytes) == *root => bytes,
        Ok(_) => match hidden::right_content(store, &name).await? {
            Some(bytes) => bytes,
            None => return Ok(None),
        },
        Err(error) if error.kind() == Kind::Damaged => return Ok(None),
        Err(error) => return Err(error),
    };
    match usage::open(stanza, root, &bytes) {
        Ok(list) => Ok(Some(list)),
        Err(error) if error.kind() == Kind::Damaged => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_needed_by_what_uses_them() {
        let mut needs = Needs {
            last: 5,
            ..Default::default()
        };
        needs.runs.insert([3; 32]);
        let wal = WalNeeds {
            segment_size: 16 << 20,
            from: Vec::new(),
        };
        needs.wal.insert(7, wal);
        let backup = |start_lsn| CommittedBackup {
            info: Some(proto::BackupInfo {
                system_identifier: 7,
                start_lsn,
                ..Default::default()
            }),
            ..Default::default()
        };
        let list = |packs: &[u8]| proto::Usage {
            packs: packs.iter().flat_map(|pack| [*pack; 32]).collect(),
            live_bytes: Vec::new(),
        };
        needs.add(&backup(0x0300_0028), [1; 32], &list(&[1, 2]), 10);
        needs.add(&backup(0x0500_0028), [2; 32], &list(&[2]), 20);

        assert_eq!(needs.until(&names::pack(&[1; 32])), Some(10));
        assert_eq!(needs.until(&names::pack(&[2; 32])), Some(20));
        assert_eq!(needs.until(&names::pack(&[3; 32])), None);
        assert_eq!(needs.until(&names::root(&[1; 32])), Some(10));
        assert_eq!(needs.until(&names::index_run(&[3; 32])), Some(20));
        assert_eq!(needs.until(&names::index_run(&[4; 32])), None);
        assert_eq!(needs.until(&names::log_context(9)), Some(20));
        assert_eq!(needs.until("leases/00"), None);

        let wal = |file: &str| needs.until(&format!("wal/0000000000000007/00000001/{file}"));
        assert_eq!(wal("000000010000000000000002.0001"), None);
        assert_eq!(wal("000000010000000000000003.0001"), Some(10));
        assert_eq!(wal("000000010000000000000005.0001"), Some(20));
        assert_eq!(wal("000000010000000000000003.partial-0123abcd.0001"), Some(10));
        assert_eq!(wal("000000010000000000000003.00000028.backup.0001"), Some(10));
        assert_eq!(wal("00000002.history.0001"), Some(20));
        assert_eq!(
            wal("000000010000000000000004.d/0000000004000000-0000000004000100.0001"),
            Some(10)
        );
        assert_eq!(needs.until("wal/0000000000000008/00000001/00000002.history.0001"), None);
    }
}
