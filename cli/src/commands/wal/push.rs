//! `wal push`: durable in every repository that is not optional, or an error.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fairvault_engine::bounded::bounded;
use fairvault_engine::commit::Log;
use fairvault_engine::error::{Context as _, Error, Kind, Result};
use fairvault_engine::stanza::Stanza;
use fairvault_engine::tally;
use fairvault_engine::wal::background::{Exchange, push as background};
use fairvault_engine::wal::push;
use fairvault_format::wal::Compression;

use super::{PARALLEL, destinations, exchange, file_name, folder_of, open, start_worker};
use crate::args::PushArgs;
use crate::away::{Away, PATIENCE};
use crate::commands::{Outcome, stop_signal};
use crate::config;
use crate::context::Context;

/// How long one call waits for the background worker, if nothing else is said.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Pause of the service after a failure: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));
/// Segments in flight hold memory, sealed: bytes of WAL in flight, whatever `parallel` says.
const IN_FLIGHT_BYTES: u64 = 256 << 20;

/// Larger files are given more time by an optional repository's patience.
const SMALL_SEGMENT: u64 = 16 << 20;

/// Runs it.
pub async fn run(context: Arc<Context>, args: PushArgs) -> Result<Outcome> {
    if args.serve {
        return serve(context, args).await;
    }
    push::check_adopted(&args.path)?;
    let name = file_name(&args.path)?;
    let pg_wal = folder_of(&args.path);
    let wal = context.wal(&args.stanza);
    alarm(&pg_wal, &args, wal.max_backlog.as_deref())?;
    let everywhere = Everywhere::new(&context, &args.stanza, args.worker)?;
    // A file that PostgreSQL has not marked as ready is pushed by a person: the worker would not find it.
    let is_ready = pg_wal.join("archive_status").join(format!("{name}.ready")).exists();
    if !wal.asynchronous || !(is_ready || args.worker) {
        everywhere.archive(&name, &args.path).await?;
        return Ok(Outcome::Done);
    }
    let shown = destinations(&context, &args.stanza, &everywhere.repositories)?;
    let exchange = exchange(&context, &args.stanza, "push", &pg_wal, &shown)?.ok_or_else(no_spool)?;
    if args.worker {
        let worker = Worker {
            everywhere,
            exchange,
            shown,
            pg_wal,
            parallel: wal.parallel,
        };
        worker.work(background::IDLE).await?;
        return Ok(Outcome::Done);
    }
    let timeout = wal.push_timeout.as_deref();
    let patience = timeout.map_or(Ok(TIMEOUT), |text| config::duration("push_timeout", text))?;
    let hash = push::hash_file(&args.path)?;
    let handed = background::hand_over(&exchange, &name, &hash, &shown, patience, || start_worker(&exchange)).await;
    match handed {
        Ok(()) => Ok(Outcome::Done),
        // A worker that cannot live (a full disk, say) must not keep PostgreSQL from freeing pg_wal.
        Err(error) if !exchange.is_worked().unwrap_or(false) => {
            tracing::warn!("without the background worker: {error}");
            everywhere.archive(&name, &args.path).await?;
            Ok(Outcome::Done)
        }
        Err(error) => Err(error).context(|| not_archived(&name, &pg_wal)),
    }
}

/// The worker as a service: it is there before the first command, and outlives failures.
async fn serve(context: Arc<Context>, args: PushArgs) -> Result<Outcome> {
    let pg_wal = args.path;
    if !pg_wal.join("archive_status").is_dir() {
        return Err(Error::usage(format!(
            "{} has no archive_status: --serve wants the path of the server's pg_wal",
            pg_wal.display()
        )));
    }
    // As for a file in it: a restored copy does not archive.
    push::check_adopted(&pg_wal.join("x"))?;
    let wal = context.wal(&args.stanza);
    if !wal.asynchronous {
        return Err(Error::usage("a service archives for commands that ask for it")
            .remedy("set async = true in the stanza's wal = { … }, also for archive_command"));
    }
    let stop = stop_signal();
    tokio::pin!(stop);
    let mut pause = PAUSES.0;
    loop {
        let everywhere = Everywhere::new(&context, &args.stanza, true)?;
        let shown = destinations(&context, &args.stanza, &everywhere.repositories)?;
        let worker = Worker {
            exchange: exchange(&context, &args.stanza, "push", &pg_wal, &shown)?.ok_or_else(no_spool)?,
            everywhere,
            shown,
            pg_wal: pg_wal.clone(),
            parallel: wal.parallel,
        };
        let began = Instant::now();
        let ended = tokio::select! {
            ended = worker.work(Duration::MAX) => ended,
            () = &mut stop => return Ok(Outcome::Done),
        };
        if began.elapsed() > PAUSES.1 * 2 {
            pause = PAUSES.0;
        }
        match ended {
            // Another worker was there first: it ends when there is nothing to do.
            Ok(()) => {}
            Err(error) => {
                tracing::warn!("{error}; trying again in {} s", pause.as_secs());
                if let Some(remedy) = error.advice() {
                    tracing::warn!("{remedy}");
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = &mut stop => return Ok(Outcome::Done),
        }
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// What works ahead of PostgreSQL's commands.
struct Worker {
    everywhere: Arc<Everywhere>,
    exchange: Exchange,
    shown: String,
    pg_wal: PathBuf,
    parallel: Option<usize>,
}

impl Worker {
    /// Until there was nothing to do for `idle`.
    async fn work(&self, idle: Duration) -> Result<()> {
        let Self { everywhere, pg_wal, .. } = self;
        let parallel = self.parallel.unwrap_or(PARALLEL).clamp(1, 64);
        let parallel = parallel.min(fit(pg_wal, everywhere.repositories.len()));
        let one = |name: String| {
            let (everywhere, path) = (everywhere.clone(), pg_wal.join(&name));
            async move {
                let hash = everywhere.push(&name, &path).await?;
                hash.ok_or_else(|| Error::failed("the hash of what was stored is not known"))
            }
        };
        // Files that come one after the other leave no gap between them.
        let last = Mutex::new(String::new());
        let stored = async |name: &str| {
            let before = std::mem::replace(&mut *lock(&last), name.to_owned());
            if !push::follows(&before, name) {
                everywhere.look_for_gap(name, &pg_wal.join(name)).await;
            }
            // PostgreSQL waits for the answer.
            let telling = everywhere.clone();
            tokio::spawn(async move { telling.tell().await });
        };
        let ended = background::work(&self.exchange, pg_wal, &self.shown, parallel, idle, one, stored).await;
        everywhere.tell().await;
        ended
    }
}

/// How many segments may be in flight: each is held for each repository, sealed, and twice while it is compared.
fn fit(pg_wal: &Path, repositories: usize) -> usize {
    let is_segment = |name: &str| name.len() == 24;
    let names = background::waiting(pg_wal).unwrap_or_default();
    let lengths = names.iter().filter(|name| is_segment(name)).filter_map(|name| {
        let meta = std::fs::metadata(pg_wal.join(name)).ok()?;
        Some(meta.len())
    });
    let each = lengths.max().unwrap_or(16 << 20).max(1 << 20) * (2 * repositories as u64);
    usize::try_from(IN_FLIGHT_BYTES / each).unwrap_or(1).max(1)
}

fn no_spool() -> Error {
    Error::usage("async = true needs a folder for the background worker")
        .remedy("set `spool` in the stanza's wal = { … }, or `cache`, to a folder of the server's user")
}

fn not_archived(name: &str, pg_wal: &Path) -> String {
    let waiting = background::waiting(pg_wal).map_or(0, |names| names.len());
    match waiting {
        0 | 1 => format!("{name} is not archived"),
        _ => format!("{name} is not archived; {waiting} files wait"),
    }
}

/// Says loudly that WAL piles up; nothing is ever dropped for it.
fn alarm(pg_wal: &Path, args: &PushArgs, max_backlog: Option<&str>) -> Result<()> {
    let Some(limit) = max_backlog.map(|text| config::size("max_backlog", text)).transpose()? else {
        return Ok(());
    };
    let names = background::waiting(pg_wal).unwrap_or_default();
    let lengths = names
        .iter()
        .filter_map(|name| std::fs::metadata(pg_wal.join(name)).ok());
    let bytes: u64 = lengths.map(|meta| meta.len()).sum();
    if bytes > limit {
        tracing::error!(
            "ALARM: {} MiB of WAL in {} files wait to be archived for {}, more than max_backlog: the archive does not keep up, \
             and pg_wal fills the server's disk",
            bytes >> 20,
            names.len(),
            args.stanza
        );
    }
    Ok(())
}

/// A stanza in all of its repositories.
struct Everywhere {
    context: Arc<Context>,
    stanza: String,
    /// Those that are not optional come first.
    repositories: Vec<String>,
    required: usize,
    away: Away,
    compression: Compression,
    is_worker: bool,
    /// Opened logs of each repository that nobody uses just now.
    logs: Vec<Mutex<Vec<Log>>>,
    /// Where it is time to note in the log what was stored.
    due: Mutex<Vec<Arc<Stanza>>>,
}

impl Everywhere {
    fn new(context: &Arc<Context>, stanza: &str, is_worker: bool) -> Result<Arc<Self>> {
        let repositories = context.repositories(Some(stanza))?;
        Ok(Arc::new(Self {
            compression: context.wal_compression(stanza)?,
            required: repositories.iter().filter(|name| !context.is_optional(name)).count(),
            away: Away::of(context, stanza),
            is_worker,
            context: context.clone(),
            stanza: stanza.to_owned(),
            logs: repositories.iter().map(|_| Mutex::default()).collect(),
            due: Mutex::default(),
            repositories,
        }))
    }

    /// Stores a file, and says what there is to say.
    async fn archive(self: &Arc<Self>, name: &str, path: &Path) -> Result<()> {
        let pushed = self.push(name, path).await;
        if pushed.is_ok() {
            self.look_for_gap(name, path).await;
        }
        self.tell().await;
        pushed.map(|_| ())
    }

    /// Stores a file in every repository; returns the hash of its content, if this is a worker. An optional repository
    /// holds this up for a bounded time, however many there are.
    async fn push(self: &Arc<Self>, name: &str, path: &Path) -> Result<Option<[u8; 32]>> {
        let required = futures::future::join_all((0..self.required).map(|at| self.push_into(at, name, path)));
        let optional = (self.required..self.repositories.len()).map(|at| self.push_beside(at, name, path));
        let (pushed, _) = futures::future::join(required, futures::future::join_all(optional)).await;
        // All of them are tried, whatever one says: then a retry has less to do.
        let mut worst: Option<Error> = None;
        let mut hashes = Vec::new();
        for (result, repository) in pushed.into_iter().zip(&self.repositories) {
            let error = match result {
                Ok(hash) => {
                    hashes.push(hash);
                    continue;
                }
                Err(error) if self.repositories.len() == 1 => error,
                Err(error) => error.context(format_args!("repository {repository}")),
            };
            if worst.as_ref().is_none_or(|w| w.kind() == Kind::Temporary) {
                worst = Some(error);
            }
        }
        match worst {
            None if hashes.windows(2).all(|pair| pair[0] == pair[1]) => Ok(hashes.first().copied().flatten()),
            None => Err(Error::temporary(format!("{name} changed while it was archived"))),
            Some(error) => Err(error).context(|| format!("{name} is not archived")),
        }
    }

    /// Into an optional repository: what it does not take now, `copy` brings.
    async fn push_beside(self: &Arc<Self>, at: usize, name: &str, path: &Path) {
        let repository = &self.repositories[at];
        if self.away.is_recent(repository) {
            return;
        }
        let len = path.metadata().map_or(0, |meta| meta.len());
        let limit = PATIENCE * u32::try_from(len.div_ceil(SMALL_SEGMENT).max(1)).unwrap_or(1);
        let (this, name, path) = (self.clone(), name.to_owned(), path.to_owned());
        match bounded(limit, move || async move { this.push_into(at, &name, &path).await }).await {
            Ok(_) => self.away.clear(repository, true),
            Err(error) => self.away.alarm(repository, &error),
        }
    }

    async fn push_into(&self, at: usize, name: &str, path: &Path) -> Result<Option<[u8; 32]>> {
        let mut log = self.log(at).await?;
        let pushed = push::push(&mut log, name, path, self.compression, self.is_worker).await;
        if tally::wal::pushed(log.stanza(), name, &pushed) {
            lock(&self.due).push(log.stanza().clone());
        }
        let pushed = pushed?;
        tracing::debug!("{name}: {:?} in {}", pushed.stored, self.repositories[at]);
        lock(&self.logs[at]).push(log);
        Ok(pushed.hash)
    }

    /// Notes in the logs what is due. What was stored is stored, whatever comes of this.
    async fn tell(&self) {
        let due = std::mem::take(&mut *lock(&self.due));
        futures::future::join_all(due.into_iter().map(tally::say_in)).await;
    }

    async fn log(&self, at: usize) -> Result<Log> {
        let idle = lock(&self.logs[at]).pop();
        match idle {
            Some(log) => Ok(log),
            None => open(&self.context, &self.repositories[at], &self.stanza).await,
        }
    }

    /// Says loudly that WAL before a stored segment is missing. It is stored all the same: what comes next
    /// is worth as much as before.
    async fn look_for_gap(&self, name: &str, path: &Path) {
        // `check` tells of those that are optional, and `copy` fills them.
        for (at, repository) in self.repositories.iter().enumerate().take(self.required) {
            let found = match self.log(at).await {
                Ok(log) => {
                    let found = push::gap_before(&log, name, path).await;
                    lock(&self.logs[at]).push(log);
                    found
                }
                Err(error) => Err(error),
            };
            match found {
                Ok(None) => {}
                Ok(Some(missing)) => tracing::error!(
                    "GAP: {missing} of {} is missing in {repository}: no recovery gets across it. If the server still has it in pg_wal, \
                     archive it with `fairvault wal push`; else take a new backup",
                    self.stanza
                ),
                Err(error) => tracing::warn!("whether WAL before {name} is complete is not known: {error}"),
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
