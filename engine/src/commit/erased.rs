//! The end of a log: after an erasure, nothing of the stanza is read or written any more.

use fairvault_format::proto::Erased;

use super::Log;
use crate::error::{Error, Result};

impl Log {
    /// Fails if the stanza was erased: its slots are gone, or about to go. What this host remembers of its keys goes now.
    pub(super) fn check_not_erased(&self) -> Result<()> {
        match &self.state.erased {
            Some(erased) if !self.reads_erased => {
                self.remember();
                self.stanza.forget_keys();
                Err(error(self.stanza.shown(), erased).remedy(
                    "if its key slots are still there, the erasure was not finished: run `fairvault key erase` again",
                ))
            }
            _ => Ok(()),
        }
    }
}

/// The error of a stanza that was erased.
pub fn error(shown: &str, erased: &Erased) -> Error {
    let time = jiff::Timestamp::from_microsecond(erased.time_us).unwrap_or_default();
    let who = match erased.user.as_str() {
        "" => erased.host.clone(),
        user => format!("{user}@{}", erased.host),
    };
    let reason = match erased.reason.as_str() {
        "" => String::new(),
        reason => format!(": {reason}"),
    };
    Error::refused(format!(
        "{shown} was erased at {} by {who}{reason}; its keys were destroyed, and nothing in it can be read",
        time.strftime("%Y-%m-%dT%H:%M:%SZ")
    ))
}
