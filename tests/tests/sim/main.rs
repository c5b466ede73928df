//! Many hosts on two bad stores, in simulated time: writers, a receiver, collectors, a restore, retention, a fence and
//! rotations of keys, copies to a second repository, somebody who loses parts of the index and somebody who repairs it,
//! with crashes at any await and hosts that stand still. In three of eight seeds the stores also do what none should: they
//! keep a part of what is stored, leave old objects out of lists, or answer with the content of others. Everything follows
//! from a seed.
//!
//! What must hold at every moment, in both: each backup that the log names can be read in full, and its WAL is there; what
//! a writer was told is committed stays until it expires, and so does WAL that was archived or received; what the index
//! says of packs is what they say of themselves; the log has one order, and nobody writes into it what is void. A
//! [`witness`] sees to that after each change of a store; now and then, and in some seeds after each entry of the log, all
//! of it is read. And in the end, what was lost of the index is in it again, and nothing is left over.
//!
//! `cargo xtask sim [SEEDS] [FIRST]` runs more of it. Planted bugs show that it would find them.

mod actors;
mod checks;
mod second;
mod server;
mod store;
mod watch;
mod witness;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fairvault_engine::commit::Log;
use fairvault_engine::gc;
use fairvault_engine::progress::Progress;
use fairvault_engine::stanza::Stanza;
use fairvault_engine::stanza::create::{Cluster, create};
use fairvault_format::proto::log_entry::Kind as Entry;
use fairvault_tests::dice::number;
use tokio::time::{sleep, timeout};

use actors::access;
use checks::{Notes, check, check_closely, index_comes_back, known_chunks, nothing_is_left, was_repaired};
use server::{SEGMENT, SYSTEM, Server};
use store::{WAS_LIED_TO, World};
use witness::Witness;

/// Simulated seconds after which nobody starts anything new.
const DAY_S: u64 = 1200;
/// Simulated seconds between two looks at all that there is.
const LOOK_S: u64 = 401;

/// In each so manyth seed, all of it after each entry of a log.
const CLOSE: u64 = 127;

/// Does something again and again, dying now and then in the middle of it.
async fn again<F, Fut>(world: Arc<World>, pause_s: u64, mortality: u64, mut act: F) -> Result<()>
where
    F: FnMut(Arc<World>) -> Fut,
    Fut: Future<Output = Result<()>> + 'static,
{
    let began = tokio::time::Instant::now();
    while began.elapsed().as_secs() < DAY_S {
        sleep(Duration::from_millis(world.roll(pause_s * 2000))).await;
        let act = WAS_LIED_TO.scope(Cell::new(false), act(world.clone()));
        let mut task = tokio::task::spawn_local(act);
        match world.roll(100) < mortality {
            // Dropped where it stands, with its heart.
            true => match timeout(Duration::from_millis(world.roll(60_000)), &mut task).await {
                Ok(ended) => ended??,
                Err(_) => {
                    world.deaths.fetch_add(1, Ordering::Relaxed);
                    task.abort();
                }
            },
            false => task.await??,
        }
    }
    Ok(())
}

async fn day(seed: u64) -> Result<BTreeMap<&'static str, u64>> {
    let world = World::new(seed);
    let cluster = Cluster {
        system_identifier: SYSTEM,
        major: 17,
        wal_segment_size: SEGMENT,
    };
    for repo in 0..2 {
        create(&access(world.store(repo), &world), cluster, "main").await?;
    }
    // The stanza is no news any more.
    sleep(Duration::from_secs(60)).await;
    let (notes, server) = (Arc::new(Notes::default()), Server::new());
    for repo in 0..2 {
        world.watch.begin(repo, Witness::new(&world, repo, &server).await?);
    }
    world.is_bad.store(true, Ordering::Relaxed);
    let checks = async {
        loop {
            sleep(Duration::from_secs(LOOK_S)).await;
            check(&world, &notes, &server).await?;
        }
        #[allow(unreachable_code)]
        Ok::<(), anyhow::Error>(())
    };
    let is_close = seed.is_multiple_of(number("FAIRVAULT_SIM_CLOSE", CLOSE));
    let mut forks = is_close.then(|| world.watch.forks());
    let close_checks = async {
        while let Some(fork) = forks.as_mut()?.recv().await {
            if let Err(error) = check_closely(&world, fork).await {
                return Some(error);
            }
        }
        None
    };
    tokio::select! {
        biased;
        Err(error) = world.watch.objection() => return Err(error),
        Some(error) = close_checks => return Err(error),
        ended = work(&world, &notes, &server) => { ended?; }
        Err(error) = checks => return Err(error),
    }
    world.watch.verdict()?;
    if let Some(mut forks) = forks {
        // What was written last has not been looked at yet.
        while let Ok(fork) = forks.try_recv() {
            check_closely(&world, fork).await?;
        }
    }
    // The store is good again, what was late comes in, and collection gets to its end: nothing is left over.
    world.is_bad.store(false, Ordering::Relaxed);
    sleep(Duration::from_secs(1000)).await;
    let [first, second] = [0, 1].map(|repo| world.itself(repo));
    let first = Log::replay(Stanza::open(&access(first, &world)).await?).await?;
    let second = Log::replay(Stanza::open(&access(second, &world)).await?).await?;
    // Of the index, whoever reads takes what is not as it should be for lost, and a collection that comes before a repair
    // lets go of it.
    let is_confused = world.has_confused();
    known_chunks(&first, was_repaired(&first) || is_confused || world.is_spoiled).await?;
    let known = [
        index_comes_back(&world, &notes).await?,
        known_chunks(&second, is_confused)
            .await
            .context("in the second repository")?,
    ];
    for repo in 0..2 {
        for _ in 0..3 {
            let options = gc::Options {
                dry_run: false,
                patience: Duration::from_secs(90),
            };
            gc::run(&actors::open(&world, repo).await?, &options, &Progress::default()).await?;
        }
    }
    let [first, second] = check(&world, &notes, &server).await?;
    nothing_is_left(&first, &known[0]).await?;
    nothing_is_left(&second, &known[1])
        .await
        .context("in the second repository")?;
    world.watch.verdict()?;
    let count = |is: fn(&Entry) -> bool| {
        let kinds = first.entries().iter().filter_map(|entry| entry.kind.as_ref());
        kinds.filter(|kind| is(kind)).count() as u64
    };
    let mut counts = BTreeMap::from([
        ("commits", count(|e| matches!(e, Entry::Commit(_)))),
        ("aborts", count(|e| matches!(e, Entry::Abort(_)))),
        ("fences", count(|e| matches!(e, Entry::SetFence(_)))),
        ("rotations", count(|e| matches!(e, Entry::KeyEpoch(_)))),
        ("expired", count(|e| matches!(e, Entry::Expired(_)))),
        ("expired WAL", count(|e| matches!(e, Entry::ExpiredWal(_)))),
        ("sweeps", count(|e| matches!(e, Entry::GcSwept(_)))),
        ("entries", first.entries().len() as u64),
        ("entries of the second", second.entries().len() as u64),
        (
            "KiB received",
            server.received().iter().map(|wal| (wal.end - wal.start) / 1024).sum(),
        ),
    ]);
    let (cuts, lies) = world.vices();
    counts.extend([
        ("uploads that were cut", cuts),
        ("false lists and answers", lies),
        ("faults", world.faults()),
        ("deaths", world.deaths.load(Ordering::Relaxed)),
    ]);
    counts.extend(notes.counts.lock().unwrap().iter());
    Ok(counts)
}

/// Everybody, until the day ends.
async fn work(world: &Arc<World>, notes: &Arc<Notes>, server: &Arc<Server>) -> Result<()> {
    let w = || world.clone();
    let write = move |world: Arc<World>| {
        let (notes, server) = (notes.clone(), server.clone());
        async move {
            // A writer may fail in any way; what it may not do is to be wrong about success.
            if let Ok(id) = actors::backup(&world, &server).await {
                ensure!(
                    world.watch.has_counted(0, &id),
                    "backup {id} is not in the log, and its writer was told so"
                );
                notes.commit(0, id);
            }
            Ok(())
        }
    };
    let push = |world: Arc<World>| {
        let server = server.clone();
        async move { server.push(&world).await }
    };
    let receive = |world: Arc<World>| {
        let server = server.clone();
        async move { server.stream(&world).await }
    };
    let copy = |world: Arc<World>| {
        let notes = notes.clone();
        async move { second::copier(&world, &notes).await }
    };
    let repair = |world: Arc<World>| {
        let notes = notes.clone();
        async move { second::repairer(&world, &notes).await }
    };
    tokio::try_join!(
        again(w(), 200, 25, write),
        again(w(), 300, 25, write),
        again(w(), 40, 20, push),
        again(w(), 100, 20, receive),
        again(w(), 150, 10, |world| async move { actors::expirer(&world, 0).await }),
        again(w(), 200, 25, |world| async move { actors::collector(&world, 0).await }),
        again(w(), 400, 10, |world| async move { actors::collector(&world, 0).await }),
        again(w(), 200, 10, |world| async move { actors::restore(&world).await }),
        again(w(), 1500, 0, |world| async move { actors::fencer(&world).await }),
        again(w(), 1500, 25, |world| async move { actors::rotator(&world).await }),
        again(w(), 300, 20, copy),
        again(w(), 600, 10, |world| async move { actors::expirer(&world, 1).await }),
        again(w(), 600, 10, |world| async move { actors::collector(&world, 1).await }),
        again(w(), 500, 0, |world| async move { second::spoiler(&world).await }),
        again(w(), 400, 20, repair),
    )?;
    Ok(())
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
    let (seeds, first) = (number("FAIRVAULT_SIM_SEEDS", 2000), number("FAIRVAULT_SIM_FIRST", 1));
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
        ("absent", "a commit that is not to be seen is taken for one that failed"),
        ("received", "a receiver says that WAL is durable as soon as it has it"),
        ("unproven copy", "a copy counts WAL as there that it has not compared"),
        (
            "repair marked",
            "a repair brings packs back into the index that are being collected",
        ),
        ("unconfirmed packs", "packs of which a part was stored are relied on"),
    ] {
        let run = Command::new(std::env::current_exe()?)
            .args(["--exact", "whatever_happens_nothing_is_lost", "--nocapture"])
            .envs([
                ("FAIRVAULT_FAULT", fault),
                ("FAIRVAULT_SIM_SEEDS", "3000"),
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
