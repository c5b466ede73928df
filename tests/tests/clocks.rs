//! Hosts with wrong clocks: what is young does not expire by them, and no lock is extended.

mod stores;

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use fairvault_engine::commit::Log;
use fairvault_engine::commit::session::Session;
use fairvault_engine::error::{Kind, Result as Outcome};
use fairvault_engine::expire::clock::check_for_locks;
use fairvault_engine::expire::rules::{Keep, Retention};
use fairvault_engine::expire::{self, Options, Report};
use fairvault_engine::stanza::create::create;
use fairvault_engine::stanza::{Access, Stanza};
use fairvault_engine::store::Store;
use fairvault_format::proto;

use fairvault_tests::clock::Ahead;
use stores::{CLUSTER, access, key, memory};

/// The log as a host sees it whose clock is so many days ahead.
async fn log(store: &Store, days: i64) -> Result<Log> {
    let access = Access {
        env: Arc::new(Ahead { days }),
        ..access(store, key(1))
    };
    Ok(Log::open(Stanza::open(&access).await?).await?)
}

/// Commits what a host whose clock is so many days ahead says of a full backup.
async fn back_up(store: &Store, id: &str, days: i64) -> Result<()> {
    let mut log = log(store, days).await?;
    let stopped_us = log.stanza().env().now_us();
    let session = Session::begin(&mut log, "backup", |_| id.to_owned()).await?;
    let info = proto::BackupInfo {
        id: id.to_owned(),
        r#type: "full".to_owned(),
        stopped_us,
        started_us: stopped_us,
        ..Default::default()
    };
    session.commit(&mut log, [id.as_bytes()[0]; 32], info).await?;
    Ok(())
}

/// What a host whose clock is so many days ahead would expire by an age of 30 days.
async fn expiring(store: &Store, days: i64, trust_clock: bool) -> Result<Outcome<Vec<String>>> {
    let options = Options {
        retention: Retention {
            full: Some(Keep::Age(30 * 86_400)),
            ..Default::default()
        },
        dry_run: true,
        trust_clock,
    };
    let report = expire::run(&mut log(store, days).await?, &options).await;
    let gone = |report: Report| report.backups.into_iter().filter(|b| !b.keep).map(|b| b.id).collect();
    Ok(report.map(gone))
}

#[tokio::test]
async fn a_clock_that_is_ahead_expires_nothing_unless_somebody_vouches_for_it() -> Result<()> {
    let store = memory();
    create(&access(&store, key(1)), CLUSTER, "main").await?;
    for (id, days) in [("a", -40), ("b", -20), ("c", -2), ("d", -1)] {
        back_up(&store, id, days).await?;
    }
    ensure!(expiring(&store, 0, false).await?? == ["a"]);
    // Years ahead: everything would be old, but for the newest.
    let error = expiring(&store, 1000, false)
        .await?
        .err()
        .context("it believes its clock")?;
    ensure!(
        error.kind() == Kind::Refused && error.advice().is_some_and(|a| a.contains("--trust-clock")),
        "{error}"
    );
    ensure!(expiring(&store, 1000, true).await??.len() == 3);
    // A backup that was taken by such a clock is in doubt too, and makes the others no older.
    back_up(&store, "e", 1000).await?;
    ensure!(expiring(&store, 0, false).await?.is_err());
    ensure!(expiring(&store, 1001, false).await?.is_err());
    ensure!(expiring(&store, 0, true).await?? == ["a"]);
    // One that is behind makes nothing old either.
    back_up(&store, "f", -5000).await?;
    ensure!(expiring(&store, 0, true).await?? == ["a"]);
    ensure!(expiring(&store, -3000, false).await?.is_err());
    Ok(())
}

/// All backups stay where only WAL has a window; finds a clock that is ahead ending that for WAL between young backups.
#[tokio::test]
async fn a_clock_that_is_ahead_ends_no_window_of_wal() -> Result<()> {
    let store = memory();
    create(&access(&store, key(1)), CLUSTER, "main").await?;
    for (id, days) in [("a", -3), ("b", -2), ("c", -1)] {
        back_up(&store, id, days).await?;
    }
    let expire = async |days: i64, trust_clock: bool| -> Result<Outcome<Report>> {
        let options = Options {
            retention: Retention {
                wal: Some(7 * 86_400),
                ..Default::default()
            },
            dry_run: true,
            trust_clock,
        };
        Ok(expire::run(&mut log(&store, days).await?, &options).await)
    };
    let report = expire(0, false).await??;
    ensure!(report.backups.len() == 3 && report.backups.iter().all(|backup| backup.keep));
    let error = expire(1000, false).await?.err().context("it believes its clock")?;
    ensure!(error.kind() == Kind::Refused, "{error}");
    expire(1000, true).await??;
    Ok(())
}

/// Finds a clock believed that is ahead by less than would be noticed where backups are rare.
#[tokio::test]
async fn a_clock_is_judged_by_how_often_backups_are_taken() -> Result<()> {
    let store = memory();
    create(&access(&store, key(1)), CLUSTER, "main").await?;
    for (id, days) in ["a", "b", "c", "d", "e", "f", "g"].into_iter().zip(-7..) {
        back_up(&store, id, days).await?;
    }
    // Two nights without a backup are nothing.
    for days in [0, 2] {
        ensure!(expiring(&store, days, false).await??.is_empty());
    }
    let in_doubt = async |days: i64| -> Result<bool> {
        let error = expiring(&store, days, false).await?.err();
        let error = error.context("it believes its clock")?;
        Ok(error.kind() == Kind::Refused && error.to_string().contains("more than 4 d is in doubt"))
    };
    ensure!(in_doubt(8).await? && in_doubt(40).await?);
    ensure!(expiring(&store, 40, true).await??.len() == 6);
    // Nothing is too old by numbers alone.
    let by_number = Options {
        retention: Retention {
            full: Some(Keep::Count(3)),
            ..Default::default()
        },
        dry_run: true,
        trust_clock: false,
    };
    let report = expire::run(&mut log(&store, 40).await?, &by_number).await?;
    ensure!(report.backups.len() == 7, "{report:?}");
    // A backup was taken by that clock, which was set right then, or was not.
    back_up(&store, "h", 40).await?;
    ensure!(in_doubt(40).await? && in_doubt(0).await?);
    ensure!(expiring(&store, 0, true).await??.is_empty());
    Ok(())
}

/// Whether locks would be extended by a clock that is so many days ahead: by whoever has read all of the log, and by a
/// backup.
async fn locks_by(store: &Store, days: i64) -> Result<(Outcome<()>, Outcome<()>)> {
    let opened = log(store, days).await?;
    let replayed = Log::replay(opened.stanza().clone()).await?;
    let now_us = opened.stanza().env().now_us();
    Ok((check_for_locks(&replayed, now_us), check_for_locks(&opened, now_us)))
}

#[tokio::test]
async fn locks_do_not_last_for_years_because_of_a_clock() -> Result<()> {
    let store = memory();
    create(&access(&store, key(1)), CLUSTER, "main").await?;
    for (id, days) in [("a", -2), ("b", -1)] {
        back_up(&store, id, days).await?;
    }
    let believed = async |days: i64| -> Result<bool> {
        let (all, backups) = locks_by(&store, days).await?;
        ensure!(all.is_ok() == backups.is_ok(), "{days}: {all:?} {backups:?}");
        let error = all.err();
        ensure!(error.as_ref().is_none_or(|error| {
            error.kind() == Kind::Refused && error.advice().is_some_and(|advice| advice.contains("--trust-clock"))
        }));
        Ok(error.is_none())
    };
    // Some days too many do no harm, and backups may have stopped for a while.
    for days in [0, 8, 40] {
        ensure!(believed(days).await?, "{days}");
    }
    for days in [-3, 60, 3650] {
        ensure!(!believed(days).await?, "{days}");
    }
    // The newest backup was taken by that clock.
    back_up(&store, "c", 3650).await?;
    ensure!(!believed(3650).await? && !believed(0).await?);
    // The next one was not.
    back_up(&store, "d", 0).await?;
    ensure!(believed(0).await? && !believed(3650).await?);
    Ok(())
}

/// A stanza that takes no backups any more stays locked.
#[tokio::test]
async fn locks_that_were_extended_say_that_the_clock_was_right() -> Result<()> {
    let store = memory();
    create(&access(&store, key(1)), CLUSTER, "main").await?;
    back_up(&store, "a", -1).await?;
    let (before, _) = locks_by(&store, 80).await?;
    ensure!(before.is_err());
    let noted = log(&store, 40)
        .await?
        .note_done("lock", 0, 0, "the locks of 3 objects extended".to_owned(), None)
        .await;
    ensure!(noted.is_some());
    let (after, _) = locks_by(&store, 80).await?;
    after?;
    Ok(())
}
