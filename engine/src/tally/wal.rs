//! The WAL that this host archives and fetches: an entry of the log for each segment would be as many again as there are
//! segments. All users of a host count in one file.

use serde::{Deserialize, Serialize};

use super::{Tally, count};
use crate::error::Result;
use crate::stanza::Stanza;
use crate::wal::archive::Stored;
use crate::wal::push::Pushed;

/// Where the counts are.
const FILE: &str = "tally";

/// How entries about what was archived begin.
const PUSH: &str = "wal push";
/// The same of what was fetched.
const GET: &str = "wal get";

/// What was done since the last entry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Count {
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
}

impl Tally for Count {
    const IS_SAID_AT_ONCE: bool = false;

    fn file() -> String {
        FILE.to_owned()
    }

    fn begun(now_us: i64) -> Self {
        Self {
            began_us: now_us,
            ..Default::default()
        }
    }

    fn began_us(&self) -> i64 {
        self.began_us
    }

    fn bytes(&self) -> u64 {
        self.bytes
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

/// Counts a file that was to be stored; returns whether something is due.
pub fn pushed(stanza: &Stanza, name: &str, pushed: &Result<Pushed>) -> bool {
    count(stanza.access(), PUSH, |count: &mut Count| match pushed {
        Ok(pushed) if pushed.stored == Stored::Same => count.same = count.same.saturating_add(1),
        Ok(pushed) => count.add(name, pushed.bytes),
        Err(_) => count.failed = count.failed.saturating_add(1),
    })
}

/// Counts a file that could not be fetched. It is said with those that could.
pub fn missed(stanza: &Stanza) {
    count(stanza.access(), GET, |count: &mut Count| {
        count.failed = count.failed.saturating_add(1)
    });
}

/// Counts a file that was fetched; returns whether something is due.
pub fn fetched(stanza: &Stanza, name: &str, bytes: u64) -> bool {
    count(stanza.access(), GET, |count: &mut Count| count.add(name, bytes))
}

#[cfg(test)]
mod tests {
    use fairvault_format::proto::Operation;

    use super::*;
    use crate::commit::Log;
    use crate::error::Error;
    use crate::tally::world::{HOUR_US, World, access};
    use crate::tally::{Books, say, say_in};

    impl World {
        fn push(&self, name: &str, stored: Stored, bytes: u64) -> bool {
            let hash = None;
            pushed(&self.stanza, name, &Ok(Pushed { stored, bytes, hash }))
        }
    }

    fn segment(number: u32) -> String {
        format!("0000000100000000{number:08X}")
    }

    #[tokio::test]
    async fn a_count_is_said_once_when_it_is_an_hour_old() {
        let w = World::new().await;
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
        let log = Log::open(w.stanza.clone()).await.unwrap();
        say(&log).await;
        let noted = w.noted().await;
        assert_eq!(noted.len(), 2);
        assert_eq!(noted[1].result, format!("1 segment stored, {}", segment(16)));
        // The other kind has an hour of its own.
        w.wait(HOUR_US / 2);
        say(&log).await;
        let noted = w.noted().await;
        assert_eq!((noted.len(), noted[2].what.as_str()), (3, GET));
        let said = format!("2 segments fetched, {} to {}", segment(1), segment(2));
        assert_eq!((&noted[2].result, noted[2].bytes), (&said, 32 << 20));
        // Nothing was done since.
        w.wait(5 * HOUR_US);
        say(&log).await;
        assert_eq!(w.noted().await.len(), 3);
    }

    #[tokio::test]
    async fn what_cannot_be_said_is_kept_for_the_next_hour() {
        let w = World::new().await;
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
        let w = World::new().await;
        // Whoever says, and has never counted, leaves no file that others might not write to.
        say(&Log::open(w.stanza.clone()).await.unwrap()).await;
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
        let w = World::new().await;
        let path = w.stanza.memory().unwrap().place(&w.stanza).join(FILE);
        let other = w.folder.path().join("other");
        std::fs::write(&other, "somebody's").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(!w.push(&segment(1), Stored::New, 100));
        w.wait(HOUR_US);
        say(&Log::open(w.stanza.clone()).await.unwrap()).await;
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "somebody's");
    }

    #[tokio::test]
    async fn all_who_count_at_once_are_counted() {
        let w = World::new().await;
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
        let w = World::new().await;
        let path = w.stanza.memory().unwrap().place(&w.stanza).join(FILE);
        let long = "x".repeat(1 << 20);
        for broken in ["{\"wal push\":{\"counting\":{\"began_us\":1", "", "[1]", long.as_str()] {
            std::fs::write(&path, broken).unwrap();
            assert!(!w.push(&segment(1), Stored::New, 100));
            let text = std::fs::read(&path).unwrap();
            let books: Books<Count> = serde_json::from_slice(&text).unwrap();
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
