//! Tallies, for the audit: what goes on all the time is added up on this host, and said in one entry of the log an hour.
//!
//! What always holds: counting costs a small file in what this host remembers of the stanza, and no request; nothing fails
//! for want of it, and no command waits for an entry longer than `PATIENCE`, but for backups and restores, which have time.
//! A count is kept until its entry is there: one whose entry was still on its way when that was given up may be said twice.
//! Where nothing is remembered, nothing is counted.

pub mod looks;
pub mod wal;
#[cfg(test)]
mod world;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::bounded::bounded;
use crate::commit::Log;
use crate::env::has_fault;
use crate::stanza::{Access, Stanza};

/// Age at which a count is said; and time between attempts.
const HOUR: Duration = Duration::from_secs(60 * 60);
/// How long a command waits for an entry: with what the end of a process waits for a thread that hangs, it is no more than
/// five seconds.
const PATIENCE: Duration = Duration::from_millis(2_900);

/// How often the log is told of what goes on all the time.
pub fn every() -> Duration {
    match has_fault("short hours") {
        true => Duration::from_secs(2),
        false => HOUR,
    }
}

/// What is counted of one kind.
trait Tally: Clone + Default + PartialEq + Serialize + DeserializeOwned {
    /// The first one after an hour of silence is said at once; otherwise it waits an hour for others.
    const IS_SAID_AT_ONCE: bool;

    /// The file that it is counted in.
    fn file() -> String;
    /// A new one.
    fn begun(now_us: i64) -> Self;
    /// When it began, microseconds since 1970.
    fn began_us(&self) -> i64;
    /// How much it is about.
    fn bytes(&self) -> u64;
    /// Adds what was counted later.
    fn merge(&mut self, later: &Self);
    /// What is said of it. `what` is its kind.
    fn words(&self, what: &str) -> String;
}

/// The counts of one kind.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Book<T> {
    counting: Option<T>,
    /// What somebody is saying, or tried to.
    saying: Option<T>,
    /// When that was tried last.
    tried_us: i64,
}

impl<T: Tally> Book<T> {
    /// Also by a clock that was set back.
    fn is_due(&self, now_us: i64) -> bool {
        let since = match (&self.saying, &self.counting) {
            (None, None) => return false,
            (None, Some(count)) if !T::IS_SAID_AT_ONCE => count.began_us(),
            _ => self.tried_us,
        };
        u128::from(now_us.abs_diff(since)) >= every().as_micros()
    }

    /// What is to be said now; from here on it is counted anew.
    fn begin(&mut self, now_us: i64) -> T {
        let counted = self.counting.take().unwrap_or_default();
        let count = match self.saying.take() {
            None => counted,
            Some(mut unsaid) => {
                unsaid.merge(&counted);
                unsaid
            }
        };
        self.saying = Some(count.clone());
        self.tried_us = now_us;
        count
    }
}

/// By kind.
type Books<T> = BTreeMap<String, Book<T>>;

/// What cannot be read is counted anew.
fn change<T: Tally, R>(access: &Access, change: impl FnOnce(&mut Books<T>) -> R) -> Option<R> {
    access.memory.as_ref()?.change_note(access, &T::file(), |bytes| {
        let mut books: Books<T> = serde_json::from_slice(bytes).unwrap_or_default();
        let done = change(&mut books);
        (serde_json::to_vec(&books).unwrap_or_default(), done)
    })
}

/// Counts; returns whether something is due.
fn count<T: Tally>(access: &Access, what: &str, add: impl FnOnce(&mut T)) -> bool {
    let now_us = access.env.now_us();
    let counted = change(access, |books: &mut Books<T>| {
        let book = books.entry(what.to_owned()).or_default();
        add(book.counting.get_or_insert_with(|| T::begun(now_us)));
        books.values().any(|book| book.is_due(now_us))
    });
    counted.unwrap_or(false)
}

/// Takes what is due, of each kind, to say it: nobody else does within the hour.
fn take_due<T: Tally>(access: &Access) -> Vec<(String, T)> {
    // Whoever only says makes no file: another user, who counts, could not write to it.
    let memory = access.memory.as_ref();
    if !memory.is_some_and(|memory| memory.has_note(access, &T::file())) {
        return Vec::new();
    }
    let now_us = access.env.now_us();
    let due = change(access, |books: &mut Books<T>| {
        let due = books.iter_mut().filter(|(_, book)| book.is_due(now_us));
        let due = due.map(|(what, book)| (what.clone(), book.begin(now_us)));
        due.collect::<Vec<_>>()
    });
    due.unwrap_or_default()
}

/// Says it, in one entry for each kind; returns whether all of it was said.
async fn tell<T: Tally>(log: &mut Log, due: Vec<(String, T)>) -> bool {
    let access = log.stanza().access().clone();
    for (what, count) in due {
        let (since_us, bytes, end) = (count.began_us(), count.bytes(), Ok(count.words(&what)));
        // It stays, for the next hour, and so does what comes after it: nobody waits once for each.
        if log.note_end(&what, since_us, bytes, end).await.is_none() {
            return false;
        }
        change(&access, |books: &mut Books<T>| {
            if let Some(book) = books.get_mut(&what)
                && book.saying.as_ref() == Some(&count)
            {
                book.saying = None;
            }
        });
    }
    true
}

/// All that is due.
struct Due {
    wal: Vec<(String, wal::Count)>,
    looks: Vec<(String, looks::Count)>,
}

impl Due {
    fn take(access: &Access) -> Option<Self> {
        let this = Self {
            wal: take_due(access),
            looks: take_due(access),
        };
        let is_nothing = this.wal.is_empty() && this.looks.is_empty();
        (!is_nothing).then_some(this)
    }

    async fn tell(self, log: &mut Log) {
        if tell(log, self.wal).await {
            tell(log, self.looks).await;
        }
    }
}

/// Says what is due, for whoever has time and an open log. What is said is not about what that does.
pub async fn say(log: &Log) {
    if let Some(due) = Due::take(log.stanza().access()) {
        due.tell(&mut log.untraced()).await;
    }
}

/// The same for whoever moves WAL: in a log that is opened for it, on a thread of its own, since a store may hang in a
/// system call.
pub async fn say_in(stanza: Arc<Stanza>) {
    // First of all: if the log cannot even be read, whoever comes next does not wait for it again.
    let Some(due) = Due::take(stanza.access()) else {
        return;
    };
    let saying = async move || {
        hang_if_asked().await;
        due.tell(&mut Log::open(stanza).await?).await;
        Ok(())
    };
    if let Err(error) = bounded(PATIENCE, saying).await {
        tracing::debug!("nothing is noted in the log: {error}");
    }
}

/// In a system call, and then it goes on: for tests.
async fn hang_if_asked() {
    if has_fault("notes hang") {
        std::thread::sleep(PATIENCE + Duration::from_secs(1));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
