//! Commands that have left nothing in a log: such that only look, would only say what they would do, or have found nothing
//! to do; and such that failed before they had changed anything.
//!
//! What always holds: the first one of an hour is said at once, and those that follow are said together, by whoever comes
//! when the hour is over: the next of them, a backup, a restore, or what moves WAL. Each user counts in a file of their
//! own: an entry names the user whose process has written it, and the file that WAL is counted in stays theirs who archive.

use serde::{Deserialize, Serialize};
use tracing::subscriber::NoSubscriber;

use super::{PATIENCE, Tally, count, hang_if_asked, take_due, tell};
use crate::bounded::bounded;
use crate::commit::Log;
use crate::error::{Error, Kind, Result};
use crate::stanza::{Access, Stanza};

/// Longest reason of a failure that is kept, characters: all kinds together must stay below what is read of a file.
const REASON: usize = 200;

/// How a command ended that has left nothing.
#[derive(Debug, Clone, Copy)]
pub enum End<'a> {
    /// It has said what there is, or there was nothing to do.
    Done,
    /// It has found damage.
    FoundDamage,
    /// Somebody at work has to be waited for.
    HasToWait,
    /// It failed.
    Failed(&'a Error),
}

/// What was done since the last entry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Count {
    began_us: i64,
    times: u64,
    found_damage: u64,
    has_to_wait: u64,
    failed: u64,
    /// Why the last one failed that did.
    reason: String,
}

impl Count {
    fn add(&mut self, end: End<'_>) {
        self.times = self.times.saturating_add(1);
        let sum = match end {
            End::Done => return,
            End::FoundDamage => &mut self.found_damage,
            End::HasToWait => &mut self.has_to_wait,
            End::Failed(error) => {
                self.reason = error.to_string().chars().take(REASON).collect();
                &mut self.failed
            }
        };
        *sum = sum.saturating_add(1);
    }
}

impl Tally for Count {
    const IS_SAID_AT_ONCE: bool = true;

    fn file() -> String {
        format!("looks-{}", rustix::process::geteuid().as_raw())
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
        0
    }

    fn merge(&mut self, later: &Self) {
        let sums = [
            (&mut self.times, later.times),
            (&mut self.found_damage, later.found_damage),
            (&mut self.has_to_wait, later.has_to_wait),
            (&mut self.failed, later.failed),
        ];
        for (sum, more) in sums {
            *sum = sum.saturating_add(more);
        }
        if later.failed > 0 {
            later.reason.clone_into(&mut self.reason);
        }
    }

    fn words(&self, _: &str) -> String {
        let mut said = match (self.times, self.failed) {
            (1, 1) => return format!("failed: {}", self.reason),
            (1, _) => "once".to_owned(),
            (times, _) => format!("{times} times"),
        };
        let sums = [(self.found_damage, "found damage"), (self.has_to_wait, "had to wait")];
        for (sum, what) in sums.iter().filter(|(sum, _)| *sum > 0) {
            said += &format!("; {sum} {what}");
        }
        // Last: what is too long is cut.
        if self.failed > 0 {
            said += &format!("; {} failed, the last: {}", self.failed, self.reason);
        }
        said
    }
}

/// Counts a command that has left nothing, and says what is due.
pub async fn looked(access: &Access, what: &str, end: End<'_>) {
    // Where nothing but a promise keeps writers apart, a look is none of them: what writes next says it.
    let is_due = count(access, what, |count: &mut Count| count.add(end)) || access.memory.is_none();
    if !is_due || access.repository.settings().single_writer {
        return;
    }
    // First of all: if the log cannot even be read, whoever comes next does not wait for it again.
    let due: Vec<(String, Count)> = match access.memory {
        Some(_) => take_due(access),
        // Nobody could say it later.
        None => {
            let mut one = Count::begun(access.env.now_us());
            one.add(end);
            vec![(what.to_owned(), one)]
        }
    };
    // Somebody else says it.
    if due.is_empty() {
        return;
    }
    let access = access.clone();
    let saying = move || async move {
        hang_if_asked().await;
        tell(&mut open_again(&access).await?, due).await;
        Ok::<_, Error>(())
    };
    if let Err(error) = bounded(PATIENCE, saying).await {
        tracing::debug!("nothing is noted in the log: {error}");
    }
}

/// Notes at once that a command failed, which is no look. If it cannot be noted now, it is counted like one; where the log
/// is refused, it is not.
pub async fn failed(access: &Access, what: &str, began_us: i64, error: &Error) {
    // Nobody waits for an entry who has interrupted something; and where nothing but a promise keeps writers apart, what
    // failed is none of them.
    if error.kind() == Kind::Interrupted || access.repository.settings().single_writer {
        count(access, what, |count: &mut Count| count.add(End::Failed(error)));
        return;
    }
    let (again, said) = (access.clone(), format!("failed: {error}"));
    let kind = what.to_owned();
    let saying = move || async move {
        hang_if_asked().await;
        let mut log = open_again(&again).await?;
        let entry = log.note_end(&kind, began_us, 0, Ok(said)).await;
        Ok::<_, Error>(entry.is_some())
    };
    let is_kept = match bounded(PATIENCE, saying).await {
        Ok(is_noted) => !is_noted,
        Err(refusal) => {
            tracing::debug!("nothing is noted in the log: {refusal}");
            refusal.kind() == Kind::Temporary
        }
    };
    if is_kept {
        count(access, what, |count: &mut Count| count.add(End::Failed(error)));
    }
}

/// Opens the log for an entry.
async fn open_again(access: &Access) -> Result<Log> {
    // What there is to warn of, the command has said.
    let _quiet = tracing::subscriber::set_default(NoSubscriber::new());
    Log::open(Stanza::open(access).await?).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::world::{HOUR_US, World, access};
    use crate::tally::{say, say_in, wal};

    /// What entries say, in order.
    async fn said(w: &World) -> Vec<String> {
        let noted = w.noted().await.into_iter();
        noted.map(|noted| format!("{}: {}", noted.what, noted.result)).collect()
    }

    fn damaged() -> Error {
        Error::damaged("it is rotten")
    }

    #[tokio::test]
    async fn the_first_of_an_hour_is_said_at_once_and_the_others_together() {
        let w = World::new().await;
        let began_us = w.stanza.env().now_us();
        looked(&w.access(), "info", End::Done).await;
        assert_eq!(said(&w).await, ["info: once"]);
        assert_eq!(w.noted().await[0].began_us, began_us);
        for _ in 0..3 {
            w.wait(1);
            looked(&w.access(), "info", End::Done).await;
        }
        looked(&w.access(), "info", End::Failed(&damaged())).await;
        w.wait(HOUR_US - 4);
        looked(&w.access(), "info", End::Failed(&Error::refused("no"))).await;
        assert_eq!(said(&w).await.len(), 1, "the hour is not over");
        w.wait(1);
        looked(&w.access(), "info", End::Done).await;
        let others = "info: 6 times; 2 failed, the last: no";
        assert_eq!(said(&w).await, ["info: once", others]);
        assert_eq!(w.noted().await[1].began_us, began_us + 1);
        // Another hour begins with that, in which nobody looks.
        w.wait(HOUR_US);
        say(&Log::open(w.stanza.clone()).await.unwrap()).await;
        assert_eq!(said(&w).await.len(), 2);
        looked(&w.access(), "info", End::Done).await;
        assert_eq!(said(&w).await[2..], ["info: once"]);
        // A clock that was set back keeps nothing unsaid.
        w.wait(-2 * HOUR_US);
        looked(&w.access(), "info", End::Done).await;
        assert_eq!(said(&w).await.len(), 4);
    }

    #[tokio::test]
    async fn each_kind_has_an_hour_of_its_own_and_ends_are_told_apart() {
        let w = World::new().await;
        looked(&w.access(), "check", End::Failed(&damaged())).await;
        w.wait(HOUR_US / 2);
        looked(&w.access(), "lock --dry-run", End::FoundDamage).await;
        looked(&w.access(), "gc", End::HasToWait).await;
        let first = [
            "check: failed: it is rotten",
            "lock --dry-run: once; 1 found damage",
            "gc: once; 1 had to wait",
        ];
        assert_eq!(said(&w).await, first);
        looked(&w.access(), "check", End::Done).await;
        looked(&w.access(), "gc", End::HasToWait).await;
        looked(&w.access(), "gc", End::Done).await;
        w.wait(HOUR_US / 2);
        // Whoever comes next says what is due, whatever it is.
        looked(&w.access(), "info", End::Done).await;
        assert_eq!(said(&w).await[3..], ["check: once", "info: once"]);
        w.wait(HOUR_US / 2);
        say(&Log::open(w.stanza.clone()).await.unwrap()).await;
        assert_eq!(said(&w).await[5..], ["gc: 2 times; 1 had to wait"]);
    }

    #[tokio::test]
    async fn whoever_may_not_write_keeps_the_count() {
        let w = World::new().await;
        let log = w.folder.path().join("vault/acme/log");
        let may = |mode| {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(&log, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        // Where one writer is promised, a look is none.
        let reader = || access(w.folder.path(), &w.clock, true);
        for _ in 0..3 {
            looked(&reader(), "info", End::Done).await;
        }
        assert!(said(&w).await.is_empty());
        w.wait(HOUR_US);
        looked(&reader(), "info", End::Done).await;
        assert!(said(&w).await.is_empty());
        looked(&w.access(), "info", End::Done).await;
        assert_eq!(said(&w).await, ["info: 5 times"]);
        // A log that is for reading only keeps nobody out who is root.
        if rustix::process::geteuid().is_root() {
            return;
        }
        w.wait(HOUR_US);
        may(0o500);
        looked(&w.access(), "info", End::Done).await;
        failed(&w.access(), "hold", 7, &damaged()).await;
        may(0o700);
        assert_eq!(said(&w).await.len(), 1);
        looked(&w.access(), "info", End::Done).await;
        assert_eq!(
            said(&w).await[1..],
            ["hold: failed: it is rotten"],
            "the other has an hour to wait"
        );
        w.wait(HOUR_US);
        looked(&w.access(), "check", End::Done).await;
        assert_eq!(said(&w).await[2..], ["check: once", "info: 2 times"]);
    }

    #[tokio::test]
    async fn a_failure_is_said_at_once_each_time() {
        let w = World::new().await;
        for began_us in [1, 2] {
            failed(&w.access(), "hold", began_us, &damaged()).await;
        }
        assert_eq!(said(&w).await, ["hold: failed: it is rotten"; 2]);
        assert_eq!(w.noted().await[1].began_us, 2);
        // What is refused is not kept for later.
        let wrong = Access {
            secret: None,
            ..w.access()
        };
        failed(&wrong, "hold", 3, &damaged()).await;
        w.wait(HOUR_US);
        looked(&w.access(), "info", End::Done).await;
        assert_eq!(said(&w).await[2..], ["info: once"]);
    }

    #[tokio::test]
    async fn a_long_reason_is_cut() {
        let w = World::new().await;
        let long = Error::failed("x".repeat(100_000));
        for _ in 0..2 {
            looked(&w.access(), "info", End::Failed(&long)).await;
        }
        let path = w.stanza.memory().unwrap().place(&w.stanza).join(Count::file());
        assert!(path.metadata().unwrap().len() < 1000);
        assert_eq!(said(&w).await, [format!("info: failed: {}", "x".repeat(REASON))]);
    }

    /// Finds an entry about something else that is taken for the command's own, which then says nothing.
    #[tokio::test]
    async fn what_is_said_of_others_is_no_trace_of_a_command() {
        let w = World::new().await;
        looked(&w.access(), "info", End::Done).await;
        looked(&w.access(), "info", End::Done).await;
        wal::fetched(&w.stanza, "00000001000000000000000A", 1);
        w.wait(HOUR_US);
        let access = w.access();
        assert!(!access.trace.was_read());
        let mut log = Log::open(Stanza::open(&access).await.unwrap()).await.unwrap();
        say(&log).await;
        assert_eq!(said(&w).await.len(), 3);
        assert!(access.trace.was_read() && !access.trace.has_entry());
        log.note_end("restore", 0, 0, Ok("done".to_owned())).await.unwrap();
        assert!(access.trace.has_entry() && !access.trace.has_failure());
        log.note_end("restore", 0, 0, Err(&damaged())).await.unwrap();
        assert!(access.trace.has_failure());
        // What moves WAL says it as well.
        looked(&w.access(), "info", End::Done).await;
        w.wait(HOUR_US);
        say_in(w.stanza.clone()).await;
        assert_eq!(said(&w).await.last().unwrap(), "info: once");
    }

    /// What a version wrote that counted WAL only is said by this one, and the looks of this one do not touch it.
    #[tokio::test]
    async fn counts_of_the_version_before_are_said() {
        let w = World::new().await;
        let place = w.stanza.memory().unwrap().place(&w.stanza);
        let began_us = w.stanza.env().now_us();
        let before = format!(
            r#"{{"wal push":{{"counting":{{"began_us":{began_us},"segments":3,"others":0,"bytes":300,"same":0,"failed":0,"first":"a","last":"b"}},"saying":null,"tried_us":0}}}}"#
        );
        std::fs::write(place.join("tally"), &before).unwrap();
        w.wait(HOUR_US);
        looked(&w.access(), "info", End::Done).await;
        assert_eq!(said(&w).await, ["info: once"]);
        assert_eq!(std::fs::read_to_string(place.join("tally")).unwrap(), before);
        say(&Log::open(w.stanza.clone()).await.unwrap()).await;
        let noted = w.noted().await;
        assert_eq!(said(&w).await[1..], ["wal push: 3 segments stored, a to b"]);
        assert_eq!((noted[1].bytes, noted[1].began_us), (300, began_us));
    }

    #[tokio::test]
    async fn each_is_said_where_nothing_is_remembered() {
        let w = World::new().await;
        let forgetful = Access {
            memory: None,
            ..w.access()
        };
        looked(&forgetful, "info", End::Done).await;
        looked(&forgetful, "info", End::FoundDamage).await;
        failed(&forgetful, "hold", 0, &damaged()).await;
        let all = ["info: once", "info: once; 1 found damage", "hold: failed: it is rotten"];
        assert_eq!(said(&w).await, all);
    }
}
