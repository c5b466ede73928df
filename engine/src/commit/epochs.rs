//! Which keys the log is written with: those of the newest epoch that it names.
//!
//! What always holds: a log never goes on under old keys. Whoever works for long asks it before something counts, and
//! begins anew if keys were rotated meanwhile.

use std::sync::Arc;

use fairvault_format::proto::KeyEpoch;

use super::{Log, state};
use crate::error::{Error, Kind, Result};
use crate::stanza::Stanza;

impl Log {
    /// Goes over to the newest keys that the log names. Costs nothing unless they are new to this host.
    pub(super) async fn follow_keys(&mut self) -> Result<()> {
        let Some(newest) = self.state.key_epochs.last() else {
            return Ok(());
        };
        if newest.epoch == self.stanza.keys().epoch {
            return Ok(());
        }
        let stanza = self.stanza.in_epoch(newest).await?;
        // Named before its slots were read.
        let mut named = self.state.key_epochs.iter();
        named.try_for_each(|epoch| self.check_signers(&stanza, epoch))?;
        self.stanza = Arc::new(stanza);
        Ok(())
    }

    /// A rotation that died leaves slots of an epoch that the log does not name. So does a log that was rolled back.
    pub(super) fn warn_of_unfinished_rotation(&self) {
        let (named, there) = (state::newest_epoch(&self.state), self.stanza.newest_slot());
        if there > named {
            tracing::warn!(
                "{} has slots of key epoch {there}, and its log names {named} as the newest: a rotation of keys was not \
                 finished (run `fairvault key rotate` again); if you know that one was, the log was rolled back",
                self.stanza.shown()
            );
        }
    }

    /// Public keys in the log must be those that the key slots name: what is signed by others is forged.
    pub(super) fn check_signers(&self, stanza: &Stanza, epoch: &KeyEpoch) -> Result<()> {
        let Ok(keys) = stanza.keys_of(epoch.epoch) else {
            return Ok(());
        };
        let known = keys.public_keys();
        let differs = |named: &[u8], known: Option<[u8; 32]>| known.is_some_and(|known| named != known);
        let is_other = differs(&epoch.writer_public_key, known.writer)
            || differs(&epoch.operator_public_key, known.operator)
            // Content that is sealed to another key is read by somebody else.
            || epoch.data_public_key != known.data.map(|key| key.to_vec()).unwrap_or_default();
        if is_other {
            return Err(Error::damaged(format!(
                "the log of {} names public keys for key epoch {} that are not those of the key slots: it is forged",
                self.stanza.shown(),
                epoch.epoch
            )));
        }
        Ok(())
    }
}

/// The error of a writer whose keys are no longer those that rule.
pub fn rotated(stanza: &Stanza) -> Error {
    Error::new(
        Kind::Held,
        format!(
            "the keys of {} were rotated while this was at work, and it wrote with the old ones",
            stanza.shown()
        ),
    )
    .remedy("start it again: it uses the new keys then. `fairvault audit` shows every rotation")
}
