//! By a clock that is in doubt no lock is extended: nobody can take that back.

use fairvault_engine::commit::Log;
use fairvault_engine::error::Kind;
use fairvault_engine::expire::rules::Retention;
use fairvault_engine::immutable::extend::{self, Options};
use fairvault_engine::immutable::reliance::{Locks, Reliance};
use fairvault_engine::progress::Progress;
use fairvault_format::names;
use fairvault_tests::clock::Ahead;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_lock_is_extended_by_a_clock_in_doubt() -> Result<()> {
    let scratch = Scratch::new("clockstore")?;
    let server = S3::start(&scratch, "other")?;
    let w = World::new("clocks", &Server::of(&server), true, "retention = { full = \"20d\" }")?;
    w.backup()?;
    let opened = async |days: i64| -> Result<Log> {
        let access = w.access(Arc::new(Ahead { days }))?;
        Ok(Log::open(Stanza::open(&access).await?).await?)
    };
    let rely = async |log: &Log| -> Result<Vec<String>> {
        let reliance = Reliance {
            window_s: None,
            kept_s: 20 * 86_400,
            keeper: Some(w.store.clone()),
            is_required: false,
        };
        let mut notes = Vec::new();
        Locks::of(log, Some(reliance), &mut notes).await?;
        Ok(notes)
    };
    let before = w.pack_locks().await?;
    for days in [3650, -30] {
        let log = opened(days).await?;
        let lock = async |dry_run: bool, trust_clock: bool| {
            let options = Options {
                retention: Retention::default(),
                days: Some(30),
                dry_run,
                trust_clock,
            };
            extend::run(&log, &w.store, async || None::<Log>, &options, &Progress::default()).await
        };
        let error = lock(false, false).await.err().context("it believes its clock")?;
        ensure!(
            error.kind() == Kind::Refused && error.advice().is_some_and(|advice| advice.contains("--trust-clock")),
            "{error}"
        );
        let notes = rely(&log).await?;
        ensure!(
            notes.iter().any(|note| note.contains("no locks are extended")),
            "{notes:?}"
        );
        ensure!(w.pack_locks().await? == before, "{days}");
        lock(true, true).await?;
    }
    let log = opened(0).await?;
    let notes = rely(&log).await?;
    ensure!(notes.is_empty() && w.pack_locks().await? != before, "{notes:?}");

    // A backup that takes longer than anybody thought, and has nobody who extends locks, does not count.
    bucket::set_default(&Server::of(&server), "clocks", 40)?;
    let reliance = Reliance {
        window_s: None,
        kept_s: 20 * 86_400,
        keeper: None,
        is_required: true,
    };
    let mut notes = Vec::new();
    let relied_on = Locks::of(&log, Some(reliance), &mut notes).await?;
    ensure!(notes.is_empty() && relied_on.ending().is_empty(), "{notes:?}");
    let used: Vec<[u8; 32]> = w
        .pack_locks()
        .await?
        .iter()
        .filter_map(|(name, _)| names::parse_hash(name))
        .collect();
    let confirm = async |days: i64| {
        let used = used.iter().map(|pack| (*pack, true));
        relied_on
            .confirm(&log, used, now_us() + days * DAY_US, &mut Vec::new())
            .await
    };
    confirm(0).await?;
    let error = confirm(10)
        .await
        .err()
        .context("it relies on what is locked too briefly")?;
    ensure!(
        error.kind() == Kind::Refused && error.to_string().contains("does not count"),
        "{error}"
    );

    // That it was refused is noted, by the same clock, and makes nobody believe that.
    let before = w.pack_locks().await?;
    for days in 3650..3654 {
        let mut log = opened(days).await?;
        let options = Options {
            retention: Retention::default(),
            days: Some(30),
            dry_run: false,
            trust_clock: false,
        };
        let ended = extend::run(&log, &w.store, async || None::<Log>, &options, &Progress::default()).await;
        let error = ended.err().context("it believes its clock after all")?;
        let began_us = now_us() + days * DAY_US;
        ensure!(log.note_end("lock", began_us, 0, Err(&error)).await.is_some());
    }
    ensure!(w.pack_locks().await? == before);
    Ok(())
}
