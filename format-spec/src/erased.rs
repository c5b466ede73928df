//! The note that a stanza was erased: what is left to read where nothing opens any more (SPEC.md, section 9).
//!
//! It is not sealed and not signed, since nobody has the keys: it says what to make of a stanza without slots, and proves
//! nothing. Why it was erased is in the log alone: the note is readable for whoever reads the store.

use serde::{Deserialize, Serialize};

use crate::error::{FormatError, Result, check_limit};
use crate::limits;
use crate::proto::Erased;

const FORMAT: &str = "fairvault-erased";

/// Content of a stanza's `erased`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErasedNote {
    format: String,
    version: u32,
    /// Number of the log entry that says the same, signed.
    pub entry: u64,
    /// When, microseconds since 1970-01-01 UTC.
    pub time_us: i64,
    /// Where.
    pub host: String,
    /// By whom.
    pub user: String,
}

impl ErasedNote {
    /// The note of what the log says.
    pub fn new(erased: &Erased) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: 1,
            entry: erased.seq,
            time_us: erased.time_us,
            host: erased.host.clone(),
            user: erased.user.clone(),
        }
    }

    /// What it says.
    pub fn erased(&self) -> Erased {
        Erased {
            seq: self.entry,
            time_us: self.time_us,
            host: self.host.clone(),
            user: self.user.clone(),
            reason: String::new(),
        }
    }

    /// The bytes as stored.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("a struct of strings and numbers is always JSON")
    }

    /// Reads a note.
    pub fn decode(bytes: &[u8], what: &str) -> Result<Self> {
        check_limit(what, bytes.len() as u64, limits::REPOSITORY_JSON_BYTES)?;
        let this: Self = serde_json::from_slice(bytes).map_err(|e| FormatError::damaged(what, e.to_string()))?;
        match (this.format.as_str(), this.version) {
            (FORMAT, 1) => Ok(this),
            (FORMAT, other) => Err(FormatError::unsupported(what, format!("version {other}"))),
            _ => Err(FormatError::damaged(what, format!("its \"format\" is not {FORMAT:?}"))),
        }
    }
}
