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

/// Longest text that is shown of what an object says, which nobody may have signed.
const SHOWN: usize = 200;

pub(super) fn shown_text(text: &str) -> String {
    let plain = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(SHOWN).map(plain).collect()
}

/// The error of a stanza that was erased.
pub fn error(shown: &str, erased: &Erased) -> Error {
    let time = jiff::Timestamp::from_microsecond(erased.time_us).unwrap_or_default();
    let host = shown_text(&erased.host);
    let who = match erased.user.as_str() {
        "" => host,
        user => format!("{}@{host}", shown_text(user)),
    };
    let reason = match erased.reason.as_str() {
        "" => String::new(),
        reason => format!(": {}", shown_text(reason)),
    };
    Error::refused(format!(
        "{shown} was erased at {} by {who}{reason}; its keys were destroyed, and nothing in it can be read",
        time.strftime("%Y-%m-%dT%H:%M:%SZ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_note_says_is_shown_in_one_short_line() {
        let erased = Erased {
            host: "h\u{1b}[2J".to_owned(),
            user: "u\nroot".to_owned(),
            reason: "x".repeat(100_000),
            ..Default::default()
        };
        let said = error("vault/acme", &erased).to_string();
        assert!(said.contains("u\u{fffd}root@h\u{fffd}[2J: x"), "{said}");
        assert!(!said.chars().any(char::is_control) && said.len() < 1000, "{said}");
    }
}
