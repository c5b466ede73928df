//! Going on where entries of another log lie, in a bucket that keeps versions: they stay as older versions.

use bytes::Bytes;
use fairvault_format::names;
use fairvault_format::proto::log_entry::Kind as Entry;

use super::Log;
use crate::env;
use crate::error::{Kind, Result};

impl Log {
    /// Appends an entry where the store shows another one that does not follow on this log.
    pub(crate) async fn append_over(&mut self, entry: Entry) -> Result<()> {
        let nonce = env::id(self.stanza.env())?.to_vec();
        self.check_single_writer(&entry)?;
        let bytes = self.sealed(entry, &nonce).await?;
        let name = names::log_context(self.state.seq + 1);
        let store = self.stanza.store();
        store.put_hashed(&name, Bytes::from(bytes.clone()).into()).await?;
        self.stanza.trace().mark_entry();
        self.apply(&bytes)?;
        self.follow_keys().await?;
        self.remember();
        Ok(())
    }

    /// Reads on, and says whether the store shows something behind that which does not follow on this log.
    pub(crate) async fn has_other_next(&mut self) -> Result<bool> {
        match self.refresh().await {
            Ok(()) => Ok(false),
            Err(error)
                if self.state.erased.is_some() || matches!(error.kind(), Kind::Temporary | Kind::Interrupted) =>
            {
                Err(error)
            }
            Err(_) => {
                let next = names::log_context(self.state.seq + 1);
                Ok(self.stanza.store().len(&next).await?.is_some())
            }
        }
    }

    /// From now on this host remembers this log, of which all entries were read, whatever it saw before.
    pub(crate) fn remember_instead(&self) {
        self.remember();
        if let Some(memory) = self.stanza.memory() {
            memory.remember_proven(&self.stanza, &self.state);
        }
    }
}
