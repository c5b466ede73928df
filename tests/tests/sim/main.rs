//! Many hosts on one bad store, in simulated time: writers, collectors, a restore, retention, a fence and rotations of
//! keys, with crashes at any await and hosts that stand still. Everything follows from a seed.
//!
//! What must hold at every moment: each backup that the log names can be read in full, and its WAL is there; what a
//! writer was told is committed stays until it expires, and so does WAL that was archived; the log has one order, and
//! nobody writes into it what is void. And in the end, nothing is left over.
//!
//! `cargo xtask sim [SEEDS] [FIRST]` runs more of it. Planted bugs show that it would find them.

mod actors;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fairvault_engine::commit::Log;
use fairvault_engine::dedup::Index;
use fairvault_engine::gc;
use fairvault_engine::postgres::segment::Segment;
use fairvault_engine::progress::Progress;
use fairvault_engine::stanza::Stanza;
use fairvault_engine::stanza::create::{Cluster, create};
use fairvault_engine::wal::archive::Archive;
use fairvault_format::names;
use fairvault_format::proto::log_entry::Kind as Entry;
use fairvault_tests::dice::number;
use tokio::time::{sleep, timeout};

use actors::{SEGMENT, access};
use store::World;

/// Simulated seconds after which nobody starts anything new.
const DAY_S: u64 = 1500;

/// What writers were told.
type Told = Arc<Mutex<BTreeSet<String>>>;
/// The segment that the server archives next: all before it are durable, as it was told.
type Position = Arc<AtomicU64>;

/// Does something again and again, dying now and then in the middle of it.
async fn again<F, Fut>(world: Arc<World>, pause_s: u64, mortality: u64, mut act: F) -> Result<()>
where
    F: FnMut(Arc<World>) -> Fut,
    Fut: Future<Output = Result<()>> + 'static,
{
    let began = tokio::time::Instant::now();
    while began.elapsed().as_secs() < DAY_S {
        sleep(Duration::from_millis(world.roll(pause_s * 2000))).await;
        let mut task = tokio::task::spawn_local(act(world.clone()));
        match world.roll(100) < mortality {
            // Dropped where it stands, with its heart.
            true => match timeout(Duration::from_millis(world.roll(60_000)), &mut task).await {
                Ok(ended) => ended??,
                Err(_) => task.abort(),
            },
            false => task.await??,
        }
    }
    Ok(())
}

/// What must hold at every moment.
async fn check(world: &Arc<World>, told: &Told, position: &Position) -> Result<Log> {
    // Before the repository is looked at: what is told later need not be there.
    let told = told.lock().unwrap().clone();
    let archived = position.load(Ordering::SeqCst);
    let log = Log::replay(Stanza::open(&access(world.now(), world)).await?).await?;
    let void: Vec<u64> = (1..=log.state().seq).filter(|seq| log.is_void(*seq)).collect();
    ensure!(void.is_empty(), "written by who had not read what was before: {void:?}");
    let mut there = BTreeSet::new();
    for backup in &log.state().backups {
        let id = backup.info.as_ref().map(|info| info.id.clone()).unwrap_or_default();
        actors::read_all(log.stanza(), backup)
            .await
            .with_context(|| format!("backup {id}, after entry {}", log.state().seq))?;
        there.insert(id);
    }
    for entry in log.entries() {
        if let Some(Entry::Expired(gone)) = &entry.kind {
            there.insert(gone.backup.clone());
        }
    }
    let segments = actors::segments(&log).await?;
    let newest = log.state().backups.len().saturating_sub(1);
    for (number, backup) in log.state().backups.iter().enumerate() {
        let info = backup.info.clone().unwrap_or_default();
        let last = match number == newest {
            true => archived.max(info.stop_lsn / SEGMENT + 1),
            false => info.stop_lsn / SEGMENT + 1,
        };
        let missing: Vec<_> = (info.start_lsn / SEGMENT..last)
            .filter(|n| !segments.contains(n))
            .collect();
        ensure!(
            missing.is_empty(),
            "WAL that backup {} needs, or that came after it, is gone: {missing:?}",
            info.id
        );
    }
    ensure!(newest > 0 || (1..archived).all(|n| segments.contains(&n)) || !log.state().expired_wal.is_empty());
    let lost: Vec<_> = told.difference(&there).collect();
    ensure!(lost.is_empty(), "told to be committed, and not in the log: {lost:?}");
    Ok(log)
}

async fn day(seed: u64) -> Result<BTreeMap<&'static str, u64>> {
    let world = World::new(seed);
    let cluster = Cluster {
        system_identifier: 7,
        major: 17,
        wal_segment_size: SEGMENT,
    };
    create(&access(world.store(), &world), cluster, "main").await?;
    // The stanza is no news any more.
    sleep(Duration::from_secs(60)).await;
    world.is_bad.store(true, Ordering::Relaxed);
    let told = Told::default();
    let position = Position::new(AtomicU64::new(1));
    let (committed, at) = (told.clone(), position.clone());
    let write = move |world: Arc<World>| {
        let (told, at) = (committed.clone(), at.clone());
        async move {
            // A writer may fail in any way; what it may not do is to be wrong about success.
            if let Ok(id) = actors::backup(&world, &at).await {
                told.lock().unwrap().insert(id);
            }
            Ok(())
        }
    };
    let checks = async {
        loop {
            sleep(Duration::from_secs(151)).await;
            check(&world, &told, &position).await?;
        }
        #[allow(unreachable_code)]
        Ok::<(), anyhow::Error>(())
    };
    let w = || world.clone();
    let push = |world: Arc<World>| {
        let position = position.clone();
        async move { actors::pusher(&world, &position).await }
    };
    let work = async {
        tokio::try_join!(
            again(w(), 200, 25, write.clone()),
            again(w(), 300, 25, write.clone()),
            again(w(), 40, 20, push),
            again(w(), 150, 10, |world| async move { actors::expirer(&world).await }),
            again(w(), 200, 25, |world| async move { actors::collector(&world).await }),
            again(w(), 400, 10, |world| async move { actors::collector(&world).await }),
            again(w(), 200, 10, |world| async move { actors::restore(&world).await }),
            again(w(), 1500, 0, |world| async move { actors::fencer(&world).await }),
            again(w(), 1500, 25, |world| async move { actors::rotator(&world).await }),
        )
    };
    tokio::select! {
        ended = work => { ended?; }
        Err(error) = checks => return Err(error),
    }
    // The store is good again, what was late comes in, and collection gets to its end: nothing is left over.
    world.is_bad.store(false, Ordering::Relaxed);
    sleep(Duration::from_secs(1000)).await;
    for _ in 0..3 {
        let options = gc::Options {
            dry_run: false,
            patience: Duration::from_secs(90),
        };
        let log = Log::open(Stanza::open(&access(world.store(), &world)).await?).await?;
        gc::run(&log, &options, &Progress::default()).await?;
    }
    let log = check(&world, &told, &position).await?;
    let archive = Archive::open(&log, None, 0)?;
    let gone = |number: &u64| {
        archive.is_expired(Segment {
            timeline: 1,
            number: *number,
        })
    };
    ensure!(!actors::segments(&log).await?.iter().any(gone), "WAL that has expired");
    let stanza = log.stanza().clone();
    let (mut used, mut is_current) = (BTreeSet::new(), false);
    for backup in &log.state().backups {
        let manifest = fairvault_engine::restore::plan::Manifest::read(&stanza, &backup.root).await?;
        used.extend(manifest.packs.iter().map(|pack| names::pack(&pack.name)));
        let mut packs = manifest.packs.iter();
        is_current |= packs.any(|pack| pack.header.epoch == stanza.keys().epoch);
    }
    let listed = |folder: &'static str| {
        let stanza = stanza.clone();
        async move { stanza.store().list(folder).await }
    };
    let packs: BTreeSet<_> = listed(names::PACKS).await?.into_iter().map(|(name, _)| name).collect();
    ensure!(packs == used, "packs that nothing uses: {:?}", packs.difference(&used));
    let roots = listed(names::ROOTS).await?.len();
    ensure!(roots == log.state().backups.len(), "{roots} roots");
    let runs = listed(names::INDEX).await?.len();
    ensure!(runs == log.state().index_runs.len(), "{runs} index runs");
    ensure!(log.state().open_marks.is_empty() && log.state().open_sessions.is_empty());
    // Whatever is used, and of the newest keys, can be found again.
    let index = Index::load(&stanza, log.state()).await?;
    ensure!(!is_current || !index.is_empty());
    let count = |is: fn(&Entry) -> bool| {
        let kinds = log.entries().iter().filter_map(|entry| entry.kind.as_ref());
        kinds.filter(|kind| is(kind)).count() as u64
    };
    Ok(BTreeMap::from([
        ("commits", count(|e| matches!(e, Entry::Commit(_)))),
        ("aborts", count(|e| matches!(e, Entry::Abort(_)))),
        ("fences", count(|e| matches!(e, Entry::SetFence(_)))),
        ("rotations", count(|e| matches!(e, Entry::KeyEpoch(_)))),
        ("expired", count(|e| matches!(e, Entry::Expired(_)))),
        ("expired WAL", count(|e| matches!(e, Entry::ExpiredWal(_)))),
        ("sweeps", count(|e| matches!(e, Entry::GcSwept(_)))),
        ("entries", log.entries().len() as u64),
    ]))
}

fn simulate(seed: u64) -> Result<BTreeMap<&'static str, u64>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()?;
    let tasks = tokio::task::LocalSet::new();
    tasks
        .block_on(&runtime, day(seed))
        .with_context(|| format!("seed {seed}"))
}

#[test]
fn whatever_happens_nothing_is_lost() -> Result<()> {
    let (seeds, first) = (number("FAIRVAULT_SIM_SEEDS", 1000), number("FAIRVAULT_SIM_FIRST", 1));
    let next = AtomicU64::new(first);
    let total = Mutex::new(BTreeMap::<&str, u64>::new());
    let run = || -> Result<()> {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + seeds {
                return Ok(());
            }
            for (what, count) in simulate(seed).inspect_err(|_| next.store(u64::MAX / 2, Ordering::Relaxed))? {
                *total.lock().unwrap().entry(what).or_default() += count;
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(run)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap())
    })?;
    println!("{seeds} seeds: {:?}", total.lock().unwrap());
    Ok(())
}

#[test]
fn a_seed_says_it_all() -> Result<()> {
    ensure!(simulate(7)? == simulate(7)?);
    Ok(())
}

/// Each bug is put into the engine, and must be found.
#[test]
fn planted_bugs_are_found() -> Result<()> {
    for (fault, what) in [
        ("fence", "a fenced session commits"),
        ("open sessions", "sessions from before the mark are not waited for"),
        ("marked packs", "marked packs are used"),
        ("leases", "leases are not looked at"),
        ("exists", "any answer \"exists\" is taken for our own"),
        ("expired wal", "WAL expires that a backup at work needs"),
        ("unclear", "an unclear answer is taken for success"),
    ] {
        let run = Command::new(std::env::current_exe()?)
            .args(["--exact", "whatever_happens_nothing_is_lost", "--nocapture"])
            .envs([
                ("FAIRVAULT_FAULT", fault),
                ("FAIRVAULT_SIM_SEEDS", "600"),
                ("RUST_BACKTRACE", "0"),
            ])
            .output()?;
        let said = [run.stdout, run.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let found = said.lines().find(|line| line.contains("seed "));
        let found = found.with_context(|| format!("not found: {what}\n{said}"))?;
        ensure!(!run.status.success());
        println!("{what}: {found}");
    }
    Ok(())
}
