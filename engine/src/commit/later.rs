//! The end of a log: what lies under later names says whether an entry is missing.
//!
//! What always holds: where the next entry is absent and a later one is there, that is an error. But only what proves
//! itself is an entry: it opens under its name, and is signed. Whoever may create objects can leave anything else under
//! any name, and stops nobody by that before the log comes there.

use fairvault_format::log::{Signers, open_unchained};
use fairvault_format::proto::KeyEpoch;
use fairvault_format::{limits, names};

use super::{Log, state};
use crate::error::{Error, Kind, Result};

/// Later objects that are looked at, the nearest first: entries follow on each other, so what is behind a lost one is near.
/// One is in memory at a time.
const LOOKS: usize = 16;

impl Log {
    /// Reads the log to an end that is certain: where an entry is absent, no later one may be there.
    pub async fn refresh_proven(&mut self) -> Result<()> {
        let store = self.stanza.store().clone();
        loop {
            self.refresh().await?;
            let next = names::log_context(self.state.seq + 1);
            let later = self.names_after(&names::log_context(self.state.seq)).await?;
            if later.is_empty() {
                return Ok(());
            }
            // Appended just now.
            if store.get_opt(&next, limits::LOG_ENTRY_BYTES).await?.is_some() {
                continue;
            }
            let Some(later) = self.first_entry(&later).await? else {
                tracing::warn!(
                    "{}/{} lies behind the end of the log and is no entry: somebody with access to the store made it. \
                     `fairvault repair {} --drop-entry {}` takes it away",
                    self.stanza.shown(),
                    later[0],
                    self.stanza.name(),
                    number_of(&later[0]).unwrap_or_default()
                );
                return Ok(());
            };
            return Err(Error::damaged(format!(
                "{}/{next} is missing, and {later} is there: what the log says after it cannot be known",
                self.stanza.shown()
            ))
            .remedy(
                "bring the entry back from a copy of the repository, or from an older version of the object where the bucket \
                 keeps versions. If no entry is missing, somebody with a key that writes has left the later one: rotate the \
                 keys, and delete it with the tools of the store",
            ));
        }
    }

    /// Names of entries that are listed behind this one, the lowest first.
    pub(crate) async fn names_after(&self, object: &str) -> Result<Vec<String>> {
        let mut listed = self.stanza.store().list_after(names::LOG, object, "log/").await?;
        listed.retain(|name| number_of(name).is_some());
        Ok(listed)
    }

    /// The first of these objects that is an entry.
    pub(crate) async fn first_entry(&self, objects: &[String]) -> Result<Option<String>> {
        for name in objects.iter().take(LOOKS) {
            let read = self.stanza.store().get_opt(name, limits::LOG_ENTRY_BYTES).await;
            let why = match read {
                Ok(None) => continue,
                Ok(Some(bytes)) => match self.check_entry(name, &bytes) {
                    Ok(()) => return Ok(Some(name.clone())),
                    Err(why) => why,
                },
                Err(error) if matches!(error.kind(), Kind::Temporary | Kind::Interrupted) => return Err(error),
                // More than an entry may have, or what the store gives to nobody.
                Err(error) => error,
            };
            tracing::debug!("{name} is no entry: {why}");
        }
        Ok(None)
    }

    /// Fails unless these bytes are an entry of this log, whatever it follows on: it opens under its name, and whoever
    /// signed it may write under the keys that rule. Under older ones, only the holder of leaked keys would leave a gap.
    pub(crate) fn check_entry(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let seq = number_of(name).unwrap_or_default();
        let keys = self.stanza.keys_for(bytes, name)?;
        if keys.epoch < state::newest_epoch(&self.state) {
            return Err(Error::damaged(format!(
                "{name} is of key epoch {}, which rules no more",
                keys.epoch
            )));
        }
        // The log may not be read as far as it names them; a slot does.
        let public = keys.public_keys();
        let list = |key: Option<[u8; 32]>| key.map(|key| key.to_vec()).unwrap_or_default();
        let mut signers: Signers = self.signers.clone();
        signers.add(&KeyEpoch {
            epoch: keys.epoch,
            writer_public_key: list(public.writer),
            operator_public_key: list(public.operator),
            ..Default::default()
        });
        open_unchained(keys, self.stanza.scope(), bytes, seq, &signers)?;
        Ok(())
    }
}

/// The number in the name of an entry. In a folder below, it is none of the log.
fn number_of(name: &str) -> Option<u64> {
    let seq = name.rsplit('/').next().and_then(names::parse_log)?;
    (names::log_context(seq) == name).then_some(seq)
}
