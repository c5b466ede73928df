//! Repositories that did not answer lately, so that those who come next need not wait for them again.
//!
//! What always holds: a mark only ever shortens a wait, it decides nothing; a spell raises one alarm, and its end is
//! told.

use std::collections::HashMap;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use fairvault_engine::error::Error;

use crate::context::Context;

/// How long an optional repository is waited for.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Time after a failure in which it is not asked again.
const PAUSE: Duration = Duration::from_secs(60);

/// What is known of the repositories of a stanza.
pub struct Away {
    stanza: String,
    /// Marks of this name.
    kind: &'static str,
    /// Where marks are, if this host has a place for them.
    folder: Option<PathBuf>,
    /// When each failed last, as this process has seen it.
    seen: Mutex<HashMap<String, Instant>>,
}

impl Away {
    /// For a stanza.
    pub fn of(context: &Context, stanza: &str) -> Self {
        Self {
            stanza: stanza.to_owned(),
            kind: "away",
            folder: context.spool(stanza).map(|spool| spool.join(stanza)),
            seen: Mutex::default(),
        }
    }

    /// For who only reads: whether writers have alarmed is not its business.
    pub fn for_reading(context: &Context, stanza: &str) -> Self {
        Self {
            kind: "unread",
            ..Self::of(context, stanza)
        }
    }

    fn mark_of(&self, repository: &str) -> Option<PathBuf> {
        let plain: String = repository
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || "-_".contains(c) {
                    c
                } else {
                    '_'
                }
            })
            .collect();
        Some(self.folder.as_ref()?.join(format!("{}-{plain}", self.kind)))
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, HashMap<String, Instant>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when a repository has been away, and why, as marks say.
    pub fn since(&self, repository: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.mark_of(repository)?).ok()?;
        Some(text.trim_end().chars().take(500).collect())
    }

    /// Whether it failed so lately that it is not asked now.
    pub fn is_recent(&self, repository: &str) -> bool {
        if self.seen().get(repository).is_some_and(|at| at.elapsed() < PAUSE) {
            return true;
        }
        let modified = self
            .mark_of(repository)
            .and_then(|mark| mark.metadata().ok()?.modified().ok());
        modified.is_some_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age < PAUSE))
    }

    /// It failed; returns whether that is news.
    pub fn mark(&self, repository: &str, error: &Error) -> bool {
        let known = self.seen().insert(repository.to_owned(), Instant::now()).is_some();
        let Some(mark) = self.mark_of(repository) else {
            return !known;
        };
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
        if let Some(folder) = mark.parent() {
            let _ = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        }
        let mut options = std::fs::File::options();
        options.write(true).create_new(true).mode(0o600);
        match options.open(&mark) {
            Ok(mut file) => {
                let _ = writeln!(file, "{now}: {error}");
                true
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                let touched = std::fs::File::options().append(true).open(&mark);
                let _ = touched.and_then(|file| file.set_modified(SystemTime::now()));
                false
            }
            Err(_) => !known,
        }
    }

    /// An optional repository failed: alarms, once in a spell.
    pub fn alarm(&self, repository: &str, error: &Error) {
        if self.mark(repository, error) {
            tracing::error!(
                "ALARM: the optional repository {repository} of {} is away, and is left out until it answers: {error}",
                self.stanza
            );
        }
    }

    /// It answered.
    pub fn clear(&self, repository: &str, is_optional: bool) {
        let known = self.seen().remove(repository).is_some();
        let marked = self
            .mark_of(repository)
            .is_some_and(|mark| std::fs::remove_file(mark).is_ok());
        if known || marked {
            let what = match is_optional {
                true => format!("; `fairvault copy {}` brings what it missed", self.stanza),
                false => String::new(),
            };
            tracing::warn!("repository {repository} of {} is back{what}", self.stanza);
        }
    }
}
