//! Notes: what somebody has done that changes nothing of what the log amounts to, for the audit.
//!
//! What always holds: nobody waits long for a note, nothing fails for want of one, and where this host may not write,
//! none is made.

use std::sync::Arc;
use std::time::Duration;

use fairvault_format::proto::{self, log_entry::Kind as Entry};

use super::Log;
use crate::error::Error;

/// How long a note may take: nobody waits for it.
const NOTE_TIME: Duration = Duration::from_secs(10);
/// Longest result that is kept, characters.
const RESULT: usize = 500;

impl Log {
    /// Its end was reached, which whoever runs a command may ask for. After an erasure, nothing is noted any more.
    pub(crate) fn mark_read(&self) {
        if self.state.erased.is_none() {
            self.stanza.trace().mark_read();
        }
    }

    /// The same, for entries about what others have done: they are no trace of this command.
    pub(crate) fn untraced(&self) -> Self {
        Self {
            stanza: Arc::new(self.stanza.untraced()),
            ..self.clone()
        }
    }

    /// Notes something that was done, or that failed because of `error`. Returns the number of its entry, if there is one.
    pub async fn note(&mut self, mut operation: proto::Operation, error: Option<&Error>) -> Option<u64> {
        operation.result = operation.result.chars().take(RESULT).collect();
        let noted = self.append(Entry::Operation(operation), |_| Ok(()));
        let noted = tokio::time::timeout(NOTE_TIME, noted).await;
        match noted {
            Ok(Ok(seq)) => {
                if error.is_some() {
                    self.stanza.trace().mark_failure();
                }
                return Some(seq);
            }
            Ok(Err(error)) => tracing::debug!("nothing is noted in the log: {error}"),
            Err(_) => tracing::debug!("nothing is noted in the log: that takes too long"),
        }
        None
    }

    /// Notes how something ended that is not about one backup: what came of it, or why it failed.
    pub async fn note_end(
        &mut self,
        what: &str,
        began_us: i64,
        bytes: u64,
        end: std::result::Result<String, &Error>,
    ) -> Option<u64> {
        let (result, error) = match end {
            Ok(said) => (said, None),
            Err(error) => (format!("failed: {error}"), Some(error)),
        };
        let operation = proto::Operation {
            what: what.to_owned(),
            result,
            bytes,
            began_us,
            ..Default::default()
        };
        self.note(operation, error).await
    }

    /// The same of what was done in parts: `said` is of those that were done, also if it failed then.
    pub async fn note_done(
        &mut self,
        what: &str,
        began_us: i64,
        bytes: u64,
        said: String,
        error: Option<&Error>,
    ) -> Option<u64> {
        let operation = proto::Operation {
            what: what.to_owned(),
            result: match error {
                None => said,
                Some(error) => format!("{said}; then it failed: {error}"),
            },
            bytes,
            began_us,
            ..Default::default()
        };
        self.note(operation, error).await
    }
}
