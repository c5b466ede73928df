//! The engine's error: a stable kind, a message that names the object, and what to do about it.
//!
//! Rules: an error says what was expected and what was found; where a person can act, `remedy` says how;
//! a cause is kept as `source` and printed after a colon. Secrets never appear. The kind decides the exit
//! code, in `cli`.

use std::fmt;

use fairvault_format::FormatError;

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What sort of failure it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The operation failed.
    Failed,
    /// Bad configuration or arguments.
    Usage,
    /// What was asked for does not exist.
    NotFound,
    /// Damage was found in the repository or in the source.
    Damaged,
    /// Somebody else holds what is needed, or we were fenced.
    Held,
    /// Refused, because doing it would lose or endanger data.
    Refused,
    /// A newer version wrote this.
    Unsupported,
    /// Trying again later may help: store or server away, disk full, throttled.
    Temporary,
    /// Stopped by a signal.
    Interrupted,
}

impl Kind {
    /// The kind's stable name in JSON output.
    pub fn code(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::NotFound => "not-found",
            Self::Damaged => "damaged",
            Self::Held => "held",
            Self::Refused => "refused",
            Self::Unsupported => "unsupported",
            Self::Temporary => "temporary",
            Self::Interrupted => "interrupted",
        }
    }
}

type Source = Box<dyn std::error::Error + Send + Sync>;

/// What to do where a key that only writes is asked to read.
pub const WITH_THE_OTHER_KEY: &str = "run it where the operator's key is, or give that with --key-file: it opens what \
     this one has written";

/// An error of the engine.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    remedy: Option<String>,
    source: Option<Source>,
}

impl Error {
    /// A new error.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            remedy: None,
            source: None,
        }))
    }

    /// The same with what to do about it.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy = Some(remedy.into());
        self
    }

    /// The same with its cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Source>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The same, seen from a higher level: `context: message`.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.0.message = format!("{context}: {}", self.0.message);
        self
    }

    /// What sort of failure it is.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// What to do about it, if anything is known.
    pub fn advice(&self) -> Option<&str> {
        self.0.remedy.as_deref()
    }

    /// Shorthands for the common kinds.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Kind::Failed, message)
    }
    /// Bad configuration or arguments.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }
    /// Does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }
    /// Damage.
    pub fn damaged(message: impl Into<String>) -> Self {
        Self::new(Kind::Damaged, message)
    }
    /// Refused for safety.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(Kind::Refused, message)
    }
    /// Worth trying again.
    pub fn temporary(message: impl Into<String>) -> Self {
        Self::new(Kind::Temporary, message)
    }
    /// Stopped by a signal.
    pub fn interrupted() -> Self {
        Self::new(
            Kind::Interrupted,
            "interrupted; what was announced stays usable by the next run",
        )
    }
    /// An I/O error on a local path.
    pub fn io(what: impl fmt::Display, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Kind::Temporary,
            std::io::ErrorKind::NotFound => Kind::NotFound,
            _ => Kind::Failed,
        };
        Self::new(kind, what.to_string()).caused_by(source)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        let mut source = self.0.source.as_deref().map(|s| s as &dyn std::error::Error);
        let mut said = self.0.message.clone();
        while let Some(cause) = source {
            let text = cause.to_string();
            if !said.contains(&text) {
                write!(f, ": {text}")?;
                said.push_str(&text);
            }
            source = cause.source();
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|s| s as _)
    }
}

impl From<FormatError> for Error {
    fn from(error: FormatError) -> Self {
        let kind = match &error {
            FormatError::Unsupported { .. } => Kind::Unsupported,
            FormatError::Invalid { .. } => Kind::Usage,
            FormatError::MissingSecret { .. } | FormatError::WriteOnly { .. } => Kind::Refused,
            _ => Kind::Damaged,
        };
        let is_write_only = matches!(error, FormatError::WriteOnly { .. });
        let error = Self::new(kind, error.to_string());
        match is_write_only {
            true => error.remedy(WITH_THE_OTHER_KEY),
            false => error,
        }
    }
}

/// Adds context to a result's error.
pub trait Context<T> {
    /// `context: message`, made only if there is an error.
    fn context<C: fmt::Display>(self, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context<C: fmt::Display>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|e| e.into().context(context()))
    }
}
