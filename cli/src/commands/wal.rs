//! `wal push`, `wal get` and `wal receive`.

use std::time::Duration;

use fairvault_engine::commit::Log;
use fairvault_engine::error::{Context as _, Error, Kind, Result};
use fairvault_engine::stanza::Stanza;
use fairvault_engine::wal::archive::Archive;
use fairvault_engine::wal::get::{self, Follow, Needs};
use fairvault_engine::wal::push;
use fairvault_engine::wal::receive::{self, Options};

use super::{Outcome, stop_signal};
use crate::args::{GetArgs, PushArgs, ReceiveArgs};
use crate::config;
use crate::context::Context;

/// How long `wal get` of a standby retries before it says "later".
const STANDBY_TRIES: u32 = 3;

/// Opens the log without ever stretching a passphrase.
async fn open(context: &Context, repository: &str, stanza: &str) -> Result<Log> {
    let access = context.access(repository, stanza, false, false)?;
    Log::open(Stanza::open(&access).await?).await
}

/// `wal push`: durable in every repository, or an error.
pub async fn push(context: &Context, args: PushArgs) -> Result<Outcome> {
    push::check_adopted(&args.path)?;
    let name = args
        .path
        .file_name()
        .and_then(|n| n.to_str())
        .ok_or_else(|| Error::refused(format!("{} is not the name of a WAL file", args.path.display())))?
        .to_owned();
    let level = context.level(&args.stanza, None)?;
    let repositories = context.repositories(Some(&args.stanza))?;
    let pushes = repositories.iter().map(|repository| {
        let (name, path, stanza) = (&name, &args.path, &args.stanza);
        async move {
            let mut log = open(context, repository, stanza).await?;
            let stored = push::push(&mut log, name, push::read_file(path)?, level).await?;
            tracing::debug!("{name}: {stored:?} in {repository}");
            Ok::<_, Error>(())
        }
    });
    // All of them are tried, whatever one says: then a retry has less to do.
    let mut worst: Option<Error> = None;
    for (result, repository) in futures::future::join_all(pushes).await.into_iter().zip(&repositories) {
        if let Err(error) = result {
            let error = if repositories.len() > 1 {
                error.context(format_args!("repository {repository}"))
            } else {
                error
            };
            if worst.as_ref().is_none_or(|w| w.kind() == Kind::Temporary) {
                worst = Some(error);
            }
        }
    }
    match worst {
        None => Ok(Outcome::Done),
        Some(error) => Err(error).context(|| format!("{name} is not archived")),
    }
}

/// `wal get`: delivered, proven absent, or an error that stops recovery.
pub async fn get(context: &Context, args: GetArgs) -> Result<Outcome> {
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
    };
    let is_standby = std::path::Path::new("standby.signal").exists();
    let mut attempt = 0;
    loop {
        attempt += 1;
        match get_once(context, &args, needs).await {
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

async fn get_once(context: &Context, args: &GetArgs, needs: Needs) -> Result<get::Outcome> {
    let repositories = context.repositories(Some(&args.stanza))?;
    let open_archive = async |repository: &String| {
        let log = open(context, repository, &args.stanza)
            .await
            .context(|| format!("repository {repository}"))?;
        Archive::open(&log, args.system_identifier, 3)
    };
    get::get(&repositories, open_archive, &args.name, &args.destination, needs).await
}

/// What may wait, and how long, if nothing else is said.
const FLUSH_INTERVAL: Duration = Duration::from_secs(5);
const PIECE_SIZE: u64 = 4 << 20;

/// `wal receive`: into every repository, each over a connection and through a slot of its own.
pub async fn receive(context: &Context, args: ReceiveArgs) -> Result<Outcome> {
    let stanza = &args.stanza;
    let configured = context.wal(stanza);
    let interval = args.flush_interval.as_ref().or(configured.flush_interval.as_ref());
    let piece_size = args.piece_size.as_ref().or(configured.piece_size.as_ref());
    let repositories = context.repositories(Some(stanza))?;
    let own_slot = args.slot.clone().or(configured.slot);
    let receivers = repositories.iter().map(|repository| {
        let named = own_slot.clone().unwrap_or_else(|| slot_name(&["fairvault", stanza]));
        let slot = match repositories.len() {
            1 => named,
            _ => slot_name(&[&named, repository]),
        };
        let options = Options {
            conninfo: context.conninfo(stanza)?,
            slot: (!args.no_slot).then_some(slot),
            flush_interval: interval.map_or(Ok(FLUSH_INTERVAL), |text| config::duration("flush_interval", text))?,
            piece_size: piece_size.map_or(Ok(PIECE_SIZE), |text| config::size("piece_size", text))?,
            synchronous: args.synchronous,
            keep_pieces: args.keep_pieces || configured.keep_pieces,
            skip_gap: args.skip_gap,
            level: context.level(stanza, None)?,
        };
        Ok(async move {
            let mut log = context.open_log_in(repository, stanza, true).await?;
            receive::run(&mut log, &options, stop_signal())
                .await
                .context(|| format!("receiving WAL of {stanza} into {repository}"))
        })
    });
    let receivers: Vec<_> = receivers.collect::<Result<_>>()?;
    futures::future::try_join_all(receivers).await?;
    Ok(Outcome::Done)
}

/// A slot's name from parts: what may not stand in one becomes an underscore.
fn slot_name(parts: &[&str]) -> String {
    let mut name = parts.join("_").to_lowercase();
    name = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    name.truncate(63);
    name
}
