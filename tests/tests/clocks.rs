//! Hosts with wrong clocks: what is young does not expire by them.

mod stores;

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use fairvault_engine::commit::Log;
use fairvault_engine::commit::session::Session;
use fairvault_engine::env::{Env, SystemEnv};
use fairvault_engine::error::{Kind, Result as Outcome};
use fairvault_engine::expire::rules::{Keep, Retention};
use fairvault_engine::expire::{self, Options, Report};
use fairvault_engine::stanza::create::create;
use fairvault_engine::stanza::{Access, Stanza};
use fairvault_engine::store::Store;
use fairvault_format::proto;

use stores::{CLUSTER, access, key, memory};

const DAY_US: i64 = 86_400_000_000;

/// A machine whose clock is ahead.
#[derive(Debug)]
struct Ahead {
    days: i64,
}

impl Env for Ahead {
    fn now_us(&self) -> i64 {
        SystemEnv.now_us() + self.days * DAY_US
    }

    fn random(&self, buffer: &mut [u8]) -> Outcome<()> {
        SystemEnv.random(buffer)
    }
}

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
