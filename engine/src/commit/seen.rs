//! What this host has seen of a log, where that does not open: then the log may be another one.
//!
//! What always holds: a log that is known to be rolled back is refused; where that is not known, everybody waits until
//! somebody has looked, but those who move WAL.

use fairvault_format::proto::Snapshot;

use super::{Log, state};
use crate::error::{Error, Kind, Result};

/// What a log is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// What can wait until somebody has looked at what is in doubt.
    Any,
    /// WAL is stored.
    Archiving,
    /// WAL is read.
    Fetching,
}

impl Log {
    /// What this host remembers did not open before the log was read. With the keys that the log names it may open now, and
    /// must still be there. If it does not, it may be of a log that was replaced, and is if its keys are newer than those.
    pub(super) async fn check_doubtful_head(&self, purpose: Purpose) -> Result<()> {
        let error = match self.remembered() {
            Ok(None) => return Ok(()),
            Ok(Some(state)) => {
                let mut seen = Self::empty(self.stanza.clone());
                seen.adopt(state);
                return seen.check_remembered_head().await;
            }
            Err(error) => error,
        };
        let seen = self.stanza.memory().and_then(|memory| memory.head_epoch(&self.stanza));
        let newest = state::newest_epoch(&self.state);
        if let Some(seen) = seen.filter(|seen| *seen > newest) {
            let was = format!(
                "this host saw the log of {} under key epoch {seen}, and the newest that it names is {newest}: it was rolled \
                 back or replaced",
                self.stanza.shown()
            );
            return Err(Error::damaged(was).remedy(error.advice().unwrap_or_default()));
        }
        if purpose == Purpose::Any {
            return Err(error);
        }
        tracing::error!("{error}. WAL goes on; other commands wait until somebody has looked at that");
        Ok(())
    }

    /// What came of reading on from this state, which this host remembers, up to entry `seq`. Where nothing follows on it, that
    /// there is another log says more than that the next entry is a bad one: nobody is to drop an entry of that.
    pub(super) async fn explain(&self, seq: u64, refreshed: Result<()>) -> Result<()> {
        match refreshed {
            Err(error) if error.kind() == Kind::Damaged && seq == self.state.seq => {
                self.check_remembered_head().await?;
                Err(error)
            }
            refreshed => refreshed,
        }
    }

    /// The state as this host last saw it, if it remembers one; an error if that does not open.
    pub(super) fn remembered(&self) -> Result<Option<Snapshot>> {
        match self.stanza.memory() {
            Some(memory) => memory.head(&self.stanza),
            None => Ok(None),
        }
    }
}
