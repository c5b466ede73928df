//! Snapshots of the log's state: what a reader begins with, so that a long log costs no more than a short one.

use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::log::{Signers, open_entry};
use fairvault_format::proto::Snapshot;
use fairvault_format::{limits, names, object, sha256};

use super::{Log, state};
use crate::env;
use crate::error::{Error, Kind, Result};

/// How many snapshots are tried before the log is read from its beginning.
const SNAPSHOT_TRIES: usize = 3;

impl Log {
    /// Takes the state of the newest snapshot that counts, if there is one.
    pub(super) async fn start_from_snapshot(&mut self) -> Result<()> {
        let store = self.stanza.store();
        let mut found: Vec<_> = store
            .list(names::SNAPSHOTS)
            .await?
            .into_iter()
            .filter_map(|(name, _)| names::parse_snapshot(name.rsplit('/').next()?))
            .collect();
        found.sort_unstable();
        for (seq, hash) in found.into_iter().rev().take(SNAPSHOT_TRIES) {
            if let Some(state) = self.try_snapshot(seq, hash).await? {
                self.adopt(state);
                return Ok(());
            }
        }
        Ok(())
    }

    /// A snapshot counts if the entry after it names it and follows its head, and both are of the newest key epoch.
    async fn try_snapshot(&self, seq: u64, hash: [u8; 32]) -> Result<Option<Snapshot>> {
        let store = self.stanza.store();
        let read = async {
            let bytes = store.get(&names::snapshot(seq, &hash), limits::OBJECT_BYTES).await?;
            let entry = store.get(&names::log_context(seq + 1), limits::LOG_ENTRY_BYTES).await?;
            Ok::<_, Error>((bytes, entry))
        };
        let (bytes, entry) = match read.await {
            Ok(read) => read,
            Err(error) => {
                tracing::debug!("log snapshot {seq} is not used: {error}");
                return Ok(None);
            }
        };
        if sha256(&bytes) != hash {
            return Ok(None);
        }
        let what = format!("log snapshot {seq}");
        let opened = self.stanza.keys_for(&bytes, &what).and_then(|keys| {
            let scope = self.stanza.scope();
            let state: Snapshot = object::open_message(keys, scope, ObjectKind::Snapshot, &bytes, "", &what)?;
            state
                .key_epochs
                .iter()
                .try_for_each(|epoch| self.check_signers(&self.stanza, epoch))?;
            let of_entry = self.stanza.keys_for(&entry, "log entry")?;
            // Whoever has old keys only could claim that no newer ones were ever named.
            let newest = [state::newest_epoch(&state), of_entry.epoch, self.stanza.newest_slot()];
            match newest.iter().all(|epoch| *epoch == keys.epoch) {
                true => Ok((state, of_entry)),
                false => Err(Error::refused("it is not of the newest key epoch")),
            }
        });
        let (state, keys) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                // After a rotation of keys, that is so for a while.
                match error.kind() {
                    Kind::Refused => tracing::debug!("{what} is not used: {error}"),
                    _ => tracing::warn!("{what} is not used: {error}"),
                }
                return Ok(None);
            }
        };
        let mut signers = Signers::default();
        for epoch in &state.key_epochs {
            signers.add(epoch);
        }
        let Ok(head) = <[u8; 32]>::try_from(state.head.as_slice()) else {
            return Ok(None);
        };
        match open_entry(keys, self.stanza.scope(), &entry, seq + 1, &head, &signers) {
            Ok(entry) if entry.snapshot == hash && state.seq == seq => Ok(Some(state)),
            _ => Ok(None),
        }
    }

    /// Stores a snapshot of the state; returns its hash.
    pub(super) async fn write_snapshot(&self) -> Result<[u8; 32]> {
        let stanza = &self.stanza;
        let salt = env::salt(stanza.env())?;
        let bytes = object::seal_message(
            stanza.keys(),
            stanza.scope(),
            ObjectKind::Snapshot,
            salt,
            "",
            &self.state,
        )?;
        let hash = sha256(&bytes);
        stanza
            .store()
            .put_hashed(&names::snapshot(self.state.seq, &hash), bytes.into())
            .await?;
        Ok(hash)
    }
}
