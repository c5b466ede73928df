//! A tally of the WAL that this host archives and fetches, for the audit: an entry of the log for each segment would be
//! as many again as there are segments.
//!
//! What always holds: counting costs a small file in what this host remembers of the stanza, and no request; a count is
//! said in one entry once it is an hour old, by whoever counts next, or by the next backup or restore; nothing fails for
//! want of it, and no command that moves WAL waits for it longer than `PATIENCE`. A count is kept until its entry is
//! there: one whose entry was still on its way when that was given up may be said twice. Where nothing is remembered,
//! nothing is counted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::archive::Stored;
use super::push::Pushed;
use crate::bounded::bounded;
use crate::commit::Log;
use crate::env::has_fault;
use crate::error::Result;
use crate::stanza::Stanza;
use crate::stanza::memory::Memory;

/// Age at which a count is said; and time between attempts.
const HOUR: Duration = Duration::from_secs(60 * 60);
/// How long whoever moves WAL waits for an entry: with what the end of a process waits for a thread that hangs, it is no
/// more than five seconds.
const PATIENCE: Duration = Duration::from_millis(2_900);
/// Where the counts are.
const FILE: &str = "tally";

/// How entries about what was archived begin.
const PUSH: &str = "wal push";
/// The same of what was fetched.
const GET: &str = "wal get";

/// How often the log is told of what goes on all the time.
pub fn every() -> Duration {
    match has_fault("short hours") {
        true => Duration::from_secs(2),
        false => HOUR,
    }
}

/// What was done since the last entry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Count {
    began_us: i64,
    segments: u64,
    /// Histories, partial segments, labels of backups.
    others: u64,
    /// Of objects that were stored; of WAL that was fetched.
    bytes: u64,
    /// Files that were stored already.
    same: u64,
    /// Attempts.
    failed: u64,
    /// The first and the last name, in their order.
    first: String,
    last: String,
}

impl Count {
    fn add(&mut self, name: &str, bytes: u64) {
        let number = match name.len() {
            24 => &mut self.segments,
            _ => &mut self.others,
        };
        *number = number.saturating_add(1);
        self.bytes = self.bytes.saturating_add(bytes);
        self.reach(name);
    }

    fn reach(&mut self, name: &str) {
        if !name.is_empty() && (self.first.is_empty() || name < self.first.as_str()) {
            name.clone_into(&mut self.first);
        }
        if name > self.last.as_str() {
            name.clone_into(&mut self.last);
        }
    }

    fn merge(&mut self, later: &Self) {
        let sums = [
            (&mut self.segments, later.segments),
            (&mut self.others, later.others),
            (&mut self.bytes, later.bytes),
            (&mut self.same, later.same),
            (&mut self.failed, later.failed),
        ];
        for (sum, more) in sums {
            *sum = sum.saturating_add(more);
        }
        self.reach(&later.first);
        self.reach(&later.last);
    }

    fn words(&self, what: &str) -> String {
        let done = if what == GET { "fetched" } else { "stored" };
        let of = |number: u64, one: &str, more: &str| match number {
            0 => None,
            1 => Some(format!("1 {one}")),
            _ => Some(format!("{number} {more}")),
        };
        let files = [
            of(self.segments, "segment", "segments"),
            of(self.others, "other file", "other files"),
        ];
        let files: Vec<_> = files.into_iter().flatten().collect();
        let mut said = match files.is_empty() {
            true => format!("nothing {done}"),
            false if self.first == self.last => format!("{} {done}, {}", files.join(" and "), self.first),
            false => format!("{} {done}, {} to {}", files.join(" and "), self.first, self.last),
        };
        if let Some(same) = of(self.same, "was there already", "were there already") {
            said += &format!("; {same}");
        }
        if let Some(failed) = of(self.failed, "attempt failed", "attempts failed") {
            said += &format!("; {failed}");
        }
        said
    }
}

/// The counts of one kind.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Book {
    counting: Option<Count>,
    /// What somebody is saying, or tried to.
    saying: Option<Count>,
    /// When that was tried.
    tried_us: i64,
}

impl Book {
    /// Also by a clock that was set back.
    fn is_due(&self, now_us: i64) -> bool {
        let since = match (&self.saying, &self.counting) {
            (Some(_), _) => self.tried_us,
            (None, Some(count)) => count.began_us,
            (None, None) => return false,
        };
        u128::from(now_us.abs_diff(since)) >= every().as_micros()
    }

    /// What is to be said now; from here on it is counted anew.
    fn begin(&mut self, now_us: i64) -> Count {
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

/// By what was done.
type Books = BTreeMap<String, Book>;

/// What cannot be read is counted anew.
fn change<T>(stanza: &Stanza, change: impl FnOnce(&mut Books) -> T) -> Option<T> {
    stanza.memory()?.change_note(stanza, FILE, |bytes| {
        let mut books: Books = serde_json::from_slice(bytes).unwrap_or_default();
        let done = change(&mut books);
        (serde_json::to_vec(&books).unwrap_or_default(), done)
    })
}

/// Counts; returns whether something is due.
fn count(stanza: &Stanza, what: &str, add: impl FnOnce(&mut Count)) -> bool {
    let now_us = stanza.env().now_us();
    let counted = change(stanza, |books| {
        let book = books.entry(what.to_owned()).or_default();
        add(book.counting.get_or_insert_with(|| Count {
            began_us: now_us,
            ..Default::default()
        }));
        books.values().any(|book| book.is_due(now_us))
    });
    counted.unwrap_or(false)
}

/// Counts a file that was to be stored; returns whether something is due.
pub fn pushed(stanza: &Stanza, name: &str, pushed: &Result<Pushed>) -> bool {
    count(stanza, PUSH, |count| match pushed {
        Ok(pushed) if pushed.stored == Stored::Same => count.same = count.same.saturating_add(1),
        Ok(pushed) => count.add(name, pushed.bytes),
        Err(_) => count.failed = count.failed.saturating_add(1),
    })
}

/// Counts a file that was fetched; returns whether something is due.
pub fn fetched(stanza: &Stanza, name: &str, bytes: u64) -> bool {
    count(stanza, GET, |count| count.add(name, bytes))
}

/// Takes what is due, of each kind, to say it: nobody else does within the hour.
fn take_due(stanza: &Stanza) -> Vec<(String, Count)> {
    // Whoever only says makes no file: another user, who counts, could not write to it.
    let is_there = |memory: &Memory| memory.place(stanza).join(FILE).exists();
    if !stanza.memory().is_some_and(is_there) {
        return Vec::new();
    }
    let now_us = stanza.env().now_us();
    let due = change(stanza, |books| {
        let due = books.iter_mut().filter(|(_, book)| book.is_due(now_us));
        let due = due.map(|(what, book)| (what.clone(), book.begin(now_us)));
        due.collect::<Vec<_>>()
    });
    due.unwrap_or_default()
}

/// Says what is due, in one entry for each kind.
pub async fn say(log: &mut Log) {
    let due = take_due(log.stanza());
    tell(log, due).await;
}

async fn tell(log: &mut Log, due: Vec<(String, Count)>) {
    let stanza = log.stanza().clone();
    for (what, count) in due {
        let end = Ok(count.words(&what));
        // It stays, for the next hour.
        if log.note_end(&what, count.began_us, count.bytes, end).await.is_none() {
            continue;
        }
        change(&stanza, |books| {
            if let Some(book) = books.get_mut(&what)
                && book.saying.as_ref() == Some(&count)
            {
                book.saying = None;
            }
        });
    }
}

/// The same for whoever moves WAL: in a log that is opened for it, on a thread of its own, since a store may hang in a
/// system call.
pub async fn say_in(stanza: Arc<Stanza>) {
    // First of all: if the log cannot even be read, whoever comes next does not wait for it again.
    let due = take_due(&stanza);
    if due.is_empty() {
        return;
    }
    let saying = async move || {
        if has_fault("notes hang") {
            // In a system call, and then it goes on.
            std::thread::sleep(PATIENCE + Duration::from_secs(1));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tell(&mut Log::open(stanza).await?, due).await;
        Ok(())
    };
    if let Err(error) = bounded(PATIENCE, saying).await {
        tracing::debug!("nothing is noted in the log: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicI64, Ordering};

    use fairvault_format::keys::Secret;
    use fairvault_format::proto::{Operation, log_entry::Kind as Entry};

    use super::*;
    use crate::env::{Env, SystemEnv};
    use crate::error::Error;
    use crate::stanza::{Access, create};
    use crate::store::url::RepositoryUrl;

    const HOUR_US: i64 = HOUR.as_micros() as i64;

    #[derive(Debug)]
    struct Clock(AtomicI64);

    impl Env for Clock {
        fn now_us(&self) -> i64 {
            self.0.load(Ordering::SeqCst)
        }

        fn random(&self, buffer: &mut [u8]) -> Result<()> {
            SystemEnv.random(buffer)
        }
    }

    struct World {
        folder: tempfile::TempDir,
        clock: Arc<Clock>,
        stanza: Arc<Stanza>,
    }

    fn access(folder: &Path, clock: &Arc<Clock>, single_writer: bool) -> Access {
        let url = RepositoryUrl {
            url: format!("file://{}", folder.join("vault").display()),
            single_writer,
            ..Default::default()
        };
        Access {
            repository: url.open(true).unwrap(),
            stanza: "acme".to_owned(),
            secret: Some(Secret::Key([7; 32])),
            memory: Some(Memory::new(folder.join("cache"))),
            may_stretch: true,
            env: clock.clone(),
        }
    }

    async fn world() -> World {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(Clock(AtomicI64::new(1_800_000_000_000_000)));
        let cluster = create::Cluster {
            system_identifier: 7,
            major: 15,
            wal_segment_size: 16 << 20,
        };
        let access = access(folder.path(), &clock, false);
        let log = create::create(&access, cluster, "main").await.unwrap();
        let stanza = log.stanza().clone();
        World { folder, clock, stanza }
    }

    impl World {
        fn wait(&self, us: i64) {
            self.clock.0.fetch_add(us, Ordering::SeqCst);
        }

        fn push(&self, name: &str, stored: Stored, bytes: u64) -> bool {
            let hash = None;
            pushed(&self.stanza, name, &Ok(Pushed { stored, bytes, hash }))
        }

        /// Everything that was noted.
        async fn noted(&self) -> Vec<Operation> {
            let log = Log::replay(self.stanza.clone()).await.unwrap();
            let kinds = log.entries().iter().filter_map(|entry| entry.kind.clone());
            let noted = kinds.filter_map(|kind| match kind {
                Entry::Operation(operation) => Some(operation),
                _ => None,
            });
            noted.collect()
        }
    }

    fn segment(number: u32) -> String {
        format!("0000000100000000{number:08X}")
    }

    #[tokio::test]
    async fn a_count_is_said_once_when_it_is_an_hour_old() {
        let w = world().await;
        let began_us = w.stanza.env().now_us();
        for number in [12, 10, 11] {
            assert!(!w.push(&segment(number), Stored::New, 100));
        }
        assert!(!w.push("00000002.history", Stored::New, 7));
        assert!(!w.push(&segment(9), Stored::Same, 50));
        assert!(!pushed(&w.stanza, &segment(13), &Err(Error::refused("no"))));
        w.wait(HOUR_US - 1);
        assert!(!w.push(&segment(14), Stored::New, 100));
        say_in(w.stanza.clone()).await;
        assert!(w.noted().await.is_empty());
        w.wait(1);
        assert!(w.push(&segment(15), Stored::New, 100));
        say_in(w.stanza.clone()).await;
        let expected = Operation {
            what: PUSH.to_owned(),
            result: format!(
                "5 segments and 1 other file stored, {} to 00000002.history; 1 was there already; 1 attempt failed",
                segment(10)
            ),
            bytes: 507,
            began_us,
            ..Default::default()
        };
        assert_eq!(w.noted().await, [expected]);
        // What comes then begins a new one, of which others say nothing.
        say_in(w.stanza.clone()).await;
        assert!(!w.push(&segment(16), Stored::New, 1));
        w.wait(HOUR_US / 2);
        assert!(!fetched(&w.stanza, &segment(1), 16 << 20));
        w.wait(HOUR_US / 2);
        assert!(fetched(&w.stanza, &segment(2), 16 << 20));
        let mut log = Log::open(w.stanza.clone()).await.unwrap();
        say(&mut log).await;
        let noted = w.noted().await;
        assert_eq!(noted.len(), 2);
        assert_eq!(noted[1].result, format!("1 segment stored, {}", segment(16)));
        // The other kind has an hour of its own.
        w.wait(HOUR_US / 2);
        say(&mut log).await;
        let noted = w.noted().await;
        assert_eq!((noted.len(), noted[2].what.as_str()), (3, GET));
        let said = format!("2 segments fetched, {} to {}", segment(1), segment(2));
        assert_eq!((&noted[2].result, noted[2].bytes), (&said, 32 << 20));
        // Nothing was done since.
        w.wait(5 * HOUR_US);
        say(&mut log).await;
        assert_eq!(w.noted().await.len(), 3);
    }

    #[tokio::test]
    async fn what_cannot_be_said_is_kept_for_the_next_hour() {
        let w = world().await;
        w.push(&segment(1), Stored::New, 100);
        w.wait(HOUR_US);
        // This one may read the log, and not write to it.
        let other = Stanza::open(&access(w.folder.path(), &w.clock, true)).await.unwrap();
        say_in(other).await;
        assert!(w.noted().await.is_empty());
        assert!(!w.push(&segment(2), Stored::New, 100));
        say_in(w.stanza.clone()).await;
        assert!(w.noted().await.is_empty(), "it is not tried again at once");
        w.wait(HOUR_US);
        assert!(w.push(&segment(3), Stored::New, 100));
        say_in(w.stanza.clone()).await;
        let noted = w.noted().await;
        assert_eq!((noted.len(), noted[0].bytes), (1, 300));
        assert_eq!(noted[0].began_us, w.stanza.env().now_us() - 2 * HOUR_US);
        let said = format!("3 segments stored, {} to {}", segment(1), segment(3));
        assert_eq!(noted[0].result, said);
    }

    #[tokio::test]
    async fn a_log_that_cannot_be_read_is_tried_once_an_hour() {
        let w = world().await;
        // Whoever says, and has never counted, leaves no file that others might not write to.
        say(&mut Log::open(w.stanza.clone()).await.unwrap()).await;
        assert!(!w.stanza.memory().unwrap().place(&w.stanza).join(FILE).exists());
        w.push(&segment(1), Stored::New, 100);
        w.wait(HOUR_US);
        assert!(w.push(&segment(2), Stored::New, 100));
        let (log, aside) = (w.folder.path().join("vault/acme/log"), w.folder.path().join("aside"));
        std::fs::rename(&log, &aside).unwrap();
        say_in(w.stanza.clone()).await;
        assert!(!w.push(&segment(3), Stored::New, 100), "whoever comes next waits again");
        std::fs::rename(&aside, &log).unwrap();
        w.wait(HOUR_US);
        assert!(w.push(&segment(4), Stored::New, 100));
        say_in(w.stanza.clone()).await;
        let noted = w.noted().await;
        assert_eq!((noted.len(), noted[0].bytes), (1, 400));
    }

    #[tokio::test]
    async fn a_link_leads_nowhere() {
        let w = world().await;
        let path = w.stanza.memory().unwrap().place(&w.stanza).join(FILE);
        let other = w.folder.path().join("other");
        std::fs::write(&other, "somebody's").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(!w.push(&segment(1), Stored::New, 100));
        w.wait(HOUR_US);
        say(&mut Log::open(w.stanza.clone()).await.unwrap()).await;
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "somebody's");
    }

    #[tokio::test]
    async fn all_who_count_at_once_are_counted() {
        let w = world().await;
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let w = &w;
                scope.spawn(move || {
                    for number in 0..25 {
                        assert!(!w.push(&segment(25 * thread + number), Stored::New, 1));
                    }
                });
            }
        });
        w.wait(-HOUR_US);
        // A clock that was set back keeps nothing unsaid.
        say_in(w.stanza.clone()).await;
        let noted = w.noted().await;
        assert_eq!((noted.len(), noted[0].bytes), (1, 100));
        assert!(noted[0].result.starts_with("100 segments stored, "), "{noted:?}");
    }

    #[tokio::test]
    async fn a_broken_file_is_counted_anew() {
        let w = world().await;
        let path = w.stanza.memory().unwrap().place(&w.stanza).join(FILE);
        let long = "x".repeat(1 << 20);
        for broken in ["{\"wal push\":{\"counting\":{\"began_us\":1", "", "[1]", long.as_str()] {
            std::fs::write(&path, broken).unwrap();
            assert!(!w.push(&segment(1), Stored::New, 100));
            let text = std::fs::read(&path).unwrap();
            let books: Books = serde_json::from_slice(&text).unwrap();
            let counted = books[PUSH].counting.clone().unwrap();
            assert_eq!((counted.segments, counted.bytes), (1, 100));
        }
        // A number that somebody wrote there ends nothing.
        let full = serde_json::json!({ PUSH: { "counting": { "segments": u64::MAX, "bytes": u64::MAX } } });
        std::fs::write(&path, full.to_string()).unwrap();
        assert!(w.push(&segment(1), Stored::New, 100));
        // Without a place for it there is no count, and no error.
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(!w.push(&segment(1), Stored::New, 100));
        say_in(w.stanza.clone()).await;
        assert!(w.noted().await.is_empty());
    }
}
