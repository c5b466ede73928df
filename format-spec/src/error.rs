//! The one error of the format: what is wrong with which object, and whether a newer version might know it.
//!
//! `Unsupported` and `Damaged` are kept apart on purpose: a repository written by a newer version is
//! healthy, and nothing may try to repair it.

/// Result with [`FormatError`].
pub type Result<T> = std::result::Result<T, FormatError>;

/// Why bytes could not be encoded or decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The bytes contradict the format.
    #[error("{what} is damaged: {why}")]
    Damaged {
        /// Object or part of it.
        what: String,
        /// What was expected and what was found.
        why: String,
    },
    /// A newer version may have written this.
    #[error("{what} is not supported by this version of fairvault (format 1): {why}; use a newer version")]
    Unsupported {
        /// Object or part of it.
        what: String,
        /// The unknown version, kind, codec or feature.
        why: String,
    },
    /// A length is above its limit.
    #[error("{what} is {found} long; at most {limit} is allowed")]
    TooLarge {
        /// Object or part of it.
        what: String,
        /// Length found.
        found: u64,
        /// Limit.
        limit: u64,
    },
    /// An authenticated decryption failed: the key is wrong or the bytes are changed.
    #[error("{what} does not open: the key is wrong, or the bytes were changed")]
    DoesNotOpen {
        /// Object or part of it.
        what: String,
    },
    /// A secret that this holder does not have is needed.
    #[error("{what} needs {secret}, which the given key does not carry")]
    MissingSecret {
        /// What was to be done.
        what: String,
        /// The secret's name.
        secret: &'static str,
    },
    /// Content is to be read with keys that can only write it.
    #[error("the given key can write only: reading {what} needs the private key")]
    WriteOnly {
        /// What was to be read.
        what: String,
    },
    /// A name or a parameter is not valid.
    #[error("{what} {value:?} is not valid: {expected}")]
    Invalid {
        /// The kind of name.
        what: &'static str,
        /// What was given.
        value: String,
        /// What is expected.
        expected: &'static str,
    },
}

impl FormatError {
    /// Shorthand for [`FormatError::Damaged`].
    pub fn damaged(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Damaged {
            what: what.into(),
            why: why.into(),
        }
    }

    /// Shorthand for [`FormatError::Unsupported`].
    pub fn unsupported(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Unsupported {
            what: what.into(),
            why: why.into(),
        }
    }

    /// Whether the bytes themselves are at fault (damaged, too large, or not opening).
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. } | Self::TooLarge { .. } | Self::DoesNotOpen { .. }
        )
    }
}

/// Fails with `TooLarge` if `found` is above `limit`.
pub fn check_limit(what: &str, found: u64, limit: u64) -> Result<()> {
    if found > limit {
        return Err(FormatError::TooLarge {
            what: what.to_owned(),
            found,
            limit,
        });
    }
    Ok(())
}
