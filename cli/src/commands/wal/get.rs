//! `wal get`: delivered, proven absent, or an error that stops recovery.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fairvault_engine::bounded::bounded;
use fairvault_engine::error::{Context as _, Error, Result};
use fairvault_engine::postgres::segment::{Segment, WalFile};
use fairvault_engine::stanza::Stanza;
use fairvault_engine::wal::archive::Archive;
use fairvault_engine::wal::background::Exchange;
use fairvault_engine::wal::background::get::{self as background, Taken, Window};
use fairvault_engine::wal::get::{self, Follow, Needs};

use super::{PARALLEL, destinations, exchange, start_worker};
use crate::args::GetArgs;
use crate::away::{Away, PATIENCE};
use crate::commands::Outcome;
use crate::config;
use crate::context::Context;

/// How long `wal get` of a standby retries before it says "later".
const STANDBY_TRIES: u32 = 3;
/// How long a repository that answered before is waited for, where there are others.
const FIRST_PATIENCE: Duration = Duration::from_secs(30);
/// WAL that is fetched ahead, if nothing else is said.
const PREFETCH_BYTES: u64 = 128 << 20;

/// Runs it.
pub async fn run(context: Arc<Context>, args: GetArgs) -> Result<Outcome> {
    let lsn = |text: &Option<String>| text.as_deref().map(|t| t.parse().map_err(Error::usage)).transpose();
    let needs = Needs {
        through: lsn(&args.through)?,
        until: lsn(&args.until)?,
        follow: match args.timeline.as_deref() {
            None => Follow::Unknown,
            Some("latest") => Follow::Newest,
            Some(number) => Follow::Timeline(
                number
                    .parse()
                    .map_err(|_| Error::usage(format!("--timeline {number:?}: a number or latest")))?,
            ),
        },
        stops: args.stops,
    };
    let configured = context.wal(&args.stanza).prefetch;
    let prefetch = configured.map_or(Ok(PREFETCH_BYTES), |text| config::size("prefetch", &text))?;
    let repositories = context.repositories(Some(&args.stanza))?;
    // Only what a restore planned is fetched ahead: there, it is known what recovery needs.
    let ahead = match prefetch > 0 && needs.through.is_some() && is_segment(&args.name) {
        true => spool(&context, &args, &repositories)?,
        false => None,
    };
    if let Some(exchange) = ahead {
        if args.worker {
            work(context, &args, needs, &repositories, &exchange, prefetch).await?;
            return Ok(Outcome::Done);
        }
        // A worker that cannot be had is no reason to fail.
        match background::take(&exchange, &args.name, &args.destination).await {
            Ok(Taken::Delivered) => return Ok(Outcome::Done),
            Ok(Taken::NotHere) => {}
            Ok(Taken::NoWorker) => {
                let _ = start_worker(&exchange).inspect_err(|e| tracing::warn!("{e}; fetching one at a time"));
            }
            Err(error) => tracing::warn!("{error}; fetching one at a time"),
        }
    }
    let is_standby = std::path::Path::new("standby.signal").exists();
    let mut attempt = 0;
    let away = Away::for_reading(&context, &args.stanza);
    loop {
        attempt += 1;
        // Those that did not answer just now are asked last.
        let mut asked = repositories.clone();
        asked.sort_by_key(|repository| away.is_recent(repository));
        let is_alone = asked.len() == 1;
        let open_archive = async |repository: &String| open_archive(&context, &args, &away, repository, is_alone).await;
        match get::get(&asked, open_archive, &args.name, &args.destination, needs).await {
            Err(error) if is_standby && attempt < STANDBY_TRIES => {
                tracing::warn!("{}: {error}; trying again", args.name);
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
            Ok(get::Outcome::Delivered) => return Ok(Outcome::Done),
            Ok(get::Outcome::Absent) => return Ok(Outcome::Absent),
            Err(error) => return Err(error),
        }
    }
}

/// Opens a repository's archive; where there are others, it is not waited for too long, and not again so soon.
async fn open_archive(
    context: &Arc<Context>,
    args: &GetArgs,
    away: &Away,
    repository: &str,
    is_alone: bool,
) -> Result<Option<Archive>> {
    let (at, stanza, name) = (context.clone(), args.stanza.clone(), args.name.clone());
    let (of, system_identifier) = (repository.to_owned(), args.system_identifier);
    let open = move || async move {
        let access = at.access(&of, &stanza, false, false)?;
        let stanza = Stanza::open(&access).await?;
        stanza.check_reads("fetching WAL")?;
        Archive::open_for(stanza, system_identifier, &name, !is_alone).await
    };
    let limit = match away.is_recent(repository) {
        true => PATIENCE,
        false => FIRST_PATIENCE,
    };
    let opened = match is_alone {
        true => open().await,
        false => bounded(limit, open).await,
    };
    match &opened {
        Ok(_) if !is_alone => away.clear(repository, context.is_optional(repository)),
        Err(error) if !is_alone && away.mark(repository, error) => {
            tracing::warn!("repository {repository} is away, and is asked last: {error}");
        }
        _ => {}
    }
    opened.context(|| format!("repository {repository}"))
}

fn is_segment(name: &str) -> bool {
    name.len() == 24 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Where this recovery (restore_command runs in its data directory) and its worker meet.
fn spool(context: &Context, args: &GetArgs, repositories: &[String]) -> Result<Option<Exchange>> {
    let from = destinations(context, &args.stanza, repositories)?;
    let matters = (from, &args.through, &args.until, &args.timeline, args.system_identifier);
    let opened = exchange(context, &args.stanza, "get", Path::new("."), matters);
    Ok(opened.unwrap_or_else(|error| {
        tracing::warn!("{error}; fetching one at a time");
        None
    }))
}

/// The worker: segments from the first repository that has them.
async fn work(
    context: Arc<Context>,
    args: &GetArgs,
    needs: Needs,
    repositories: &[String],
    exchange: &Exchange,
    prefetch: u64,
) -> Result<()> {
    let mut archives = Vec::new();
    let away = Away::for_reading(&context, &args.stanza);
    for repository in repositories {
        match open_archive(&context, args, &away, repository, repositories.len() == 1).await {
            Ok(archive) => archives.extend(archive),
            Err(error) => tracing::warn!("{error}"),
        }
    }
    let Some(size) = archives.first().map(|archive| archive.segment_size) else {
        return Ok(());
    };
    let WalFile::Segment(first) = WalFile::parse(&args.name, size)? else {
        return Ok(());
    };
    let window = Window {
        segments: (prefetch / size).max(1),
        parallel: context.wal(&args.stanza).parallel.unwrap_or(PARALLEL).clamp(1, 64),
    };
    let archives = Arc::new(archives);
    let fetch = |segment: Segment, destination: PathBuf| {
        let archives = archives.clone();
        async move {
            let mut failure = None;
            for archive in archives.iter() {
                match get::ahead(archive, segment, needs, &destination).await {
                    Ok(true) => return Ok(true),
                    Ok(false) => {}
                    Err(error) => failure = Some(error),
                }
            }
            failure.map_or(Ok(false), Err)
        }
    };
    background::work(exchange, first, size, window, fetch).await
}
