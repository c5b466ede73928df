//! What backups use of which packs, from the usage lists of their roots.

use std::collections::HashMap;

use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::keys::KeyRole;
use fairvault_format::object::ObjectReader;
use fairvault_format::proto::CommittedBackup;
use fairvault_format::{limits, names, proto, sha256};

use super::Sizes;
use super::history::Past;
use crate::commit::Log;
use crate::error::{Context, Error, Kind, Result};
use crate::immutable::hidden::right_content;
use crate::stanza::Stanza;

/// A pack of which no backup uses more than one part in this many is left to run dry.
const THIN: u64 = 10;

/// Packs in use, with the most stored bytes that one backup uses of each. 40 bytes a pack.
#[derive(Debug, Default)]
pub struct Usage {
    packs: HashMap<[u8; 32], u64>,
}

impl Usage {
    /// Reads the lists of all backups that are needed. One that cannot be read is an error: what it uses is not
    /// known, so nothing may be deleted.
    pub async fn of_needed(log: &mut Log) -> Result<(Past, Self)> {
        loop {
            let past = Past::of(log);
            let seq = log.state().seq;
            match Self::of(log.stanza(), &past).await {
                Ok(this) => return Ok((past, this)),
                // It may have expired, and been collected, since the log was read.
                Err(error) if error.kind() == Kind::NotFound => {
                    log.refresh().await?;
                    if log.state().seq == seq {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn of(stanza: &Stanza, past: &Past) -> Result<Self> {
        let mut this = Self::default();
        for backup in past.live() {
            this.add(stanza, backup).await?;
        }
        for backup in past.protected() {
            match this.add(stanza, backup).await {
                Err(error) if error.kind() == Kind::NotFound => _ = this.add_hidden(stanza, backup).await?,
                added => added?,
            }
        }
        Ok(this)
    }

    /// Adds what a backup uses.
    pub async fn add(&mut self, stanza: &Stanza, backup: &CommittedBackup) -> Result<()> {
        let list = read(stanza, &backup.root).await.context(|| {
            let id = backup.info.as_ref().map(|info| info.id.as_str()).unwrap_or_default();
            format!("nothing is deleted, since it is not known what backup {id} uses")
        })?;
        self.add_list(&list);
        Ok(())
    }

    /// Adds what a backup uses whose root cannot be seen. Either it was collected before the policy protected the backup, or
    /// somebody has hidden it: then the bucket still has it, and what is hidden is no reason to delete anything. `false` if
    /// it is gone.
    pub(super) async fn add_hidden(&mut self, stanza: &Stanza, backup: &CommittedBackup) -> Result<bool> {
        let Ok(hash) = <[u8; 32]>::try_from(backup.root.as_slice()) else {
            return Ok(false);
        };
        let hidden = right_content(stanza.store(), &names::root(&hash)).await;
        let hidden = hidden.context(|| {
            let id = backup.info.as_ref().map(|info| info.id.as_str()).unwrap_or_default();
            format!("nothing is deleted, since it is not known whether the bucket has what backup {id} uses")
        })?;
        if let Some(bytes) = hidden {
            self.add_list(&open(stanza, &hash, &bytes)?);
            return Ok(true);
        }
        // It may be seen again by now.
        match self.add(stanza, backup).await {
            Err(error) if error.kind() == Kind::NotFound => Ok(false),
            added => added.map(|()| true),
        }
    }

    /// Adds a list.
    pub fn add_list(&mut self, list: &proto::Usage) {
        let (packs, _) = list.packs.as_chunks::<32>();
        for (pack, live) in packs
            .iter()
            .zip(list.live_bytes.iter().chain(std::iter::repeat(&u64::MAX)))
        {
            let known = self.packs.entry(*pack).or_default();
            *known = (*known).max(*live);
        }
    }

    /// Whether a backup uses the pack.
    pub fn uses(&self, pack: &[u8]) -> bool {
        <&[u8; 32]>::try_from(pack).is_ok_and(|pack| self.packs.contains_key(pack))
    }

    /// Packs of which little is used, with their stored bytes.
    pub fn thin(&self, listed: &Sizes) -> Sizes {
        let is_thin = |(pack, len): &&([u8; 32], u64)| {
            let live = self.packs.get(pack);
            live.is_some_and(|live| live.saturating_mul(THIN) < *len)
        };
        listed.iter().filter(is_thin).copied().collect()
    }
}

/// The usage list of a root. The data key is not needed.
pub async fn read(stanza: &Stanza, root: &[u8]) -> Result<proto::Usage> {
    let hash = root
        .try_into()
        .map_err(|_| Error::damaged("the log names a root without a hash"))?;
    let bytes = stanza.store().get(&names::root(&hash), limits::OBJECT_BYTES).await?;
    open(stanza, &hash, &bytes)
}

/// The usage list in the bytes of a root.
pub fn open(stanza: &Stanza, hash: &[u8; 32], bytes: &[u8]) -> Result<proto::Usage> {
    let name = names::root(hash);
    if sha256(bytes) != *hash {
        return Err(Error::damaged(format!(
            "{}/{name} does not match its name",
            stanza.shown()
        )));
    }
    let keys = stanza.keys_for(bytes, &name)?;
    let mut reader = ObjectReader::new(keys, stanza.scope(), ObjectKind::Root, bytes, "", &name)?;
    Ok(reader.message(KeyRole::Meta)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_is_thin_if_no_backup_uses_much_of_it() {
        let mut usage = Usage::default();
        let list = |pack: u8, live| proto::Usage {
            packs: vec![pack; 32],
            live_bytes: vec![live],
        };
        usage.add_list(&list(1, 5));
        usage.add_list(&list(1, 9));
        usage.add_list(&list(2, 10));
        usage.add_list(&proto::Usage {
            packs: vec![3; 32],
            live_bytes: Vec::new(),
        });
        let listed = vec![([1; 32], 100), ([2; 32], 100), ([3; 32], 100), ([4; 32], 100)];
        assert_eq!(usage.thin(&listed), [([1; 32], 100)]);
        assert!(usage.uses(&[3; 32]) && !usage.uses(&[4; 32]) && !usage.uses(&[3; 31]));
    }
}
