//! `wal receive`: WAL in every repository seconds after it was written.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fairvault_engine::bounded::bounded;
use fairvault_engine::commit::Log;
use fairvault_engine::env::{Env as _, SystemEnv};
use fairvault_engine::error::{Context as _, Error, Kind, Result};
use fairvault_engine::replication::conninfo::ConnInfo;
use fairvault_engine::stanza::{Stanza, read_repository};
use fairvault_engine::tally;
use fairvault_engine::tally::looks::{self, End};
use fairvault_engine::wal::receive::{self, AtWork, Options};
use tokio::sync::watch;

use crate::args::ReceiveArgs;
use crate::away::{Away, PATIENCE};
use crate::commands::{Outcome, stop_signal};
use crate::config;
use crate::context::{Context, check_no_password};

/// What may wait, and how long, if nothing else is said.
const FLUSH_INTERVAL: Duration = Duration::from_secs(5);
const PIECE_SIZE: u64 = 4 << 20;
/// What the spool may hold, if nothing else is said.
const SPOOL_SIZE: u64 = 1 << 30;
/// Pause before a repository that needs a person is tried again, while others are fine.
const PAUSE: Duration = Duration::from_secs(60);
/// Time between looks at whether an optional repository is there, and between attempts to receive into it.
const WATCH: Duration = Duration::from_secs(10);
/// How long a receiver has been at work before the log is told: what fails at once again and again must not fill it.
const SETTLED: Duration = Duration::from_secs(10);
/// Time between attempts to tell the log that a receiver began.
const UNTOLD: Duration = Duration::from_secs(60);
/// How long a receiver that stops waits for the log to be told.
const LAST_NOTE: Duration = Duration::from_secs(3);
/// Longest name of a slot.
const NAME_BYTES: usize = 63;

/// Into every repository, each over a connection and through a slot of its own.
pub async fn run(context: &Arc<Context>, args: ReceiveArgs) -> Result<Outcome> {
    let stanza = &args.stanza;
    for text in &args.standby {
        check_no_password("--standby", text)?;
    }
    let configured = context.wal(stanza);
    let interval = args.flush_interval.as_ref().or(configured.flush_interval.as_ref());
    let piece_size = args.piece_size.as_ref().or(configured.piece_size.as_ref());
    let repositories = context.repositories(Some(stanza))?;
    let named = args.slot.clone().or(configured.slot);
    let spool = args.spool.clone().or(configured.receive_spool);
    let spool_size = args.spool_size.as_ref().or(configured.receive_spool_size.as_ref());
    let spool_size = spool_size.map_or(Ok(SPOOL_SIZE), |text| config::size("receive_spool_size", text))?;
    let standbys = match args.standby.is_empty() {
        true => &configured.standbys,
        false => &args.standby,
    };
    let standbys = standbys.iter().map(|text| ConnInfo::parse(text).context(|| "standby"));
    let standbys = standbys.collect::<Result<Vec<_>>>()?;
    let mut each = Vec::new();
    for repository in &repositories {
        let slot = slot_of(named.as_deref(), stanza, repository, repositories.len());
        let is_optional = context.is_optional(repository);
        let mut conninfo = context.conninfo(stanza)?;
        if is_optional {
            // It must never be the standby that a commit waits for.
            conninfo.application_name += "_optional";
        }
        let options = Options {
            conninfo,
            // One that is away must not make the server keep WAL: `copy` brings what it misses.
            slot: (!args.no_slot && !is_optional).then_some(slot),
            standbys: standbys.clone(),
            flush_interval: interval.map_or(Ok(FLUSH_INTERVAL), |text| config::duration("flush_interval", text))?,
            piece_size: piece_size.map_or(Ok(PIECE_SIZE), |text| config::size("piece_size", text))?,
            synchronous: args.synchronous && !is_optional,
            keep_pieces: args.keep_pieces || configured.keep_pieces,
            skip_gap: args.skip_gap || is_optional,
            compression: context.wal_compression(stanza)?,
            taken: Arc::default(),
        };
        let spool = spool.as_ref().filter(|_| !is_optional);
        let spool = spool.map(|folder| folder.join(stanza).join(repository));
        each.push(Receiver {
            context: context.clone(),
            stanza: stanza.clone(),
            repository: repository.clone(),
            is_optional,
            options,
            spool,
            spool_size,
        });
    }
    let (stop_in, stop) = watch::channel(false);
    let signalled = async {
        stop_signal().await;
        let _ = stop_in.send(true);
    };
    let alone = each.len() == 1;
    let (optional, each): (Vec<_>, Vec<_>) = each.into_iter().partition(|receiver| receiver.is_optional);
    let beside: Vec<_> = optional
        .into_iter()
        .map(|receiver| receiver.beside(stop.clone()))
        .collect();
    let receivers = each.iter().map(|receiver| receiver.run(alone, stop.clone()));
    let all = futures::future::join_all(receivers);
    tokio::pin!(all, signalled);
    let ended = tokio::select! {
        ended = &mut all => ended,
        () = &mut signalled => all.await,
    };
    let _ = stop_in.send(true);
    let _ = tokio::time::timeout(PATIENCE, futures::future::join_all(beside)).await;
    ended.into_iter().collect::<Result<Vec<()>>>()?;
    Ok(Outcome::Done)
}

/// The log, and what it knows of a receiver.
struct Told {
    log: Log,
    /// Until when, microseconds since 1970.
    until_us: i64,
    /// Bytes of WAL that were taken by then.
    taken: u64,
}

/// Receives into one repository.
struct Receiver {
    context: Arc<Context>,
    stanza: String,
    repository: String,
    /// It holds up nothing, and nobody waits for it.
    is_optional: bool,
    options: Options,
    /// Folder of its spool.
    spool: Option<PathBuf>,
    /// Bytes that the spool may hold.
    spool_size: u64,
}

/// Notes something in the log; returns it.
async fn noted(mut log: Log, since_us: i64, bytes: u64, said: &str) -> Result<Log> {
    let entry = log.note_end("wal receive", since_us, bytes, Ok(said.to_owned())).await;
    entry.ok_or_else(|| Error::temporary("nothing can be written to it"))?;
    Ok(log)
}

impl Receiver {
    /// On threads of its own: a store may hang in a system call.
    fn beside(self, stop: watch::Receiver<bool>) -> tokio::task::JoinHandle<()> {
        let runtime = tokio::runtime::Handle::current();
        let work = move || async move {
            let away = Away::of(&self.context, &self.stanza);
            let receiving = async {
                if let Err(error) = self.run(false, stop.clone()).await {
                    tracing::warn!("{error}");
                }
            };
            tokio::join!(receiving, self.watch(&away, stop.clone()));
        };
        tokio::task::spawn_blocking(move || runtime.block_on(work()))
    }

    /// Says when an optional repository goes away, and when it is back.
    async fn watch(&self, away: &Away, mut stop: watch::Receiver<bool>) {
        loop {
            let (context, repository) = (self.context.clone(), self.repository.clone());
            let ask = move || async move { read_repository(&context.open_repository(&repository, false)?).await };
            match bounded(PATIENCE, ask).await {
                Ok(_) => away.clear(&self.repository, true),
                Err(error) => away.alarm(&self.repository, &error),
            }
            tokio::select! {
                () = tokio::time::sleep(WATCH) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    /// Receives, and notes in the log when that began, every hour how much it was, and how it ended.
    async fn run(&self, alone: bool, stop: watch::Receiver<bool>) -> Result<()> {
        let (began, began_us) = (Instant::now(), SystemEnv.now_us());
        let (receiving, telling) = (self.receive(alone, stop), self.note_start(began_us));
        tokio::pin!(receiving, telling);
        let mut told: Option<Told> = None;
        let ended = loop {
            tokio::select! {
                ended = &mut receiving => break ended,
                first = &mut telling, if told.is_none() => told = Some(first),
                () = self.note_on(told.as_mut()) => {}
            }
        };
        // It may just be telling the log that it began.
        if told.is_none() && began.elapsed() > SETTLED {
            told = tokio::time::timeout(LAST_NOTE, telling).await.ok();
        }
        if told.is_none() {
            self.note_brief(ended.as_ref().err()).await;
        }
        if let Some(mut told) = told {
            let end = ended.as_ref().map(|()| "stopped".to_owned());
            let taken = self.options.taken.get().saturating_sub(told.taken);
            let noted = told.log.note_end("wal receive", told.until_us, taken, end);
            if tokio::time::timeout(LAST_NOTE, noted).await.is_err() {
                tracing::debug!("that this has stopped is not noted in the log: that takes too long");
            }
        }
        ended
    }

    /// Counts one that ended before the log was told that it began: once an hour, that is said.
    async fn note_brief(&self, error: Option<&Error>) {
        let (context, repository, stanza) = (self.context.clone(), self.repository.clone(), self.stanza.clone());
        let why = error.map(ToString::to_string);
        let tell = move || async move {
            let access = context.access(&repository, &stanza, false, false)?;
            let error = why.map(Error::failed);
            looks::looked(&access, "wal receive", error.as_ref().map_or(End::Done, End::Failed)).await;
            Ok(())
        };
        if let Err(error) = bounded(LAST_NOTE, tell).await {
            tracing::debug!("that this has ended is not counted: {error}");
        }
    }

    /// Notes in the log that this has begun, as soon as it is there; returns what it knows. Whoever may not write to it
    /// never gets there. On a thread of its own: the command that gives the key, or a store, may hang, and commits may wait
    /// for what is received meanwhile.
    async fn note_start(&self, began_us: i64) -> Told {
        tokio::time::sleep(SETTLED).await;
        loop {
            let (context, repository, stanza) = (self.context.clone(), self.repository.clone(), self.stanza.clone());
            let tell = move || async move {
                let log = context.open_log_in(&repository, &stanza, false).await?;
                noted(log, began_us, 0, "began").await
            };
            match bounded(UNTOLD, tell).await {
                Ok(log) => {
                    return Told {
                        log,
                        until_us: began_us,
                        taken: 0,
                    };
                }
                Err(error) => tracing::debug!("that this has begun is not noted in the log: {error}"),
            }
            tokio::time::sleep(UNTOLD).await;
        }
    }

    /// Notes in the log from time to time how much was received since it was told last; never ends. On a thread of its own,
    /// too.
    async fn note_on(&self, told: Option<&mut Told>) {
        let Some(told) = told else {
            return std::future::pending().await;
        };
        loop {
            tokio::time::sleep(tally::every()).await;
            let (now_us, taken) = (SystemEnv.now_us(), self.options.taken.get());
            let (log, since_us, bytes) = (told.log.clone(), told.until_us, taken.saturating_sub(told.taken));
            if bytes == 0 {
                continue;
            }
            let tell = move || noted(log, since_us, bytes, "goes on");
            match bounded(UNTOLD, tell).await {
                Ok(log) => {
                    *told = Told {
                        log,
                        until_us: now_us,
                        taken,
                    }
                }
                Err(error) => tracing::debug!("what was received is not noted in the log: {error}"),
            }
        }
    }

    /// What needs a person ends it if it is the only one, and must not hold up others.
    async fn receive(&self, alone: bool, mut stop: watch::Receiver<bool>) -> Result<()> {
        let Self { stanza, repository, .. } = self;
        loop {
            let ended = self.once(stop.clone()).await;
            let error: Error = match ended.context(|| format!("receiving WAL of {stanza} into {repository}")) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            // A store that is away while we start is like one that goes away later.
            if *stop.borrow() || (alone && error.kind() != Kind::Temporary) {
                return Err(error);
            }
            let pause = if self.is_optional { WATCH } else { PAUSE };
            match self.is_optional {
                // One alarm a spell is enough.
                true => tracing::debug!("{error}; trying again in {} s", pause.as_secs()),
                false => tracing::error!("{error}; trying again in {} s", pause.as_secs()),
            }
            if let Some(remedy) = error.advice().filter(|_| !self.is_optional) {
                tracing::error!("{remedy}");
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stop.wait_for(|stop| *stop) => return Err(error),
            }
        }
    }

    async fn once(&self, mut stop: watch::Receiver<bool>) -> Result<()> {
        let access = self.context.access(&self.repository, &self.stanza, false, true)?;
        // With a spool, the store may be away: this host remembers the keys.
        let opened = Arc::new(Stanza::open(&access).await?.as_remembered());
        let limit = self.spool_size;
        // The server keeps nothing that was acknowledged: what another run has left in the repository's journals,
        // perhaps on a host of another name, comes first.
        let journals = receive::store_journals(&opened, self.options.compression, AtWork::Leave);
        let mut stopping = stop.clone();
        let stored = tokio::select! {
            stored = journals => stored,
            _ = stopping.wait_for(|stop| *stop) => return Ok(()),
        };
        if let Some(folder) = &self.spool {
            // The store may be away.
            if let Err(error) = stored {
                tracing::warn!("{error}");
            }
            let stopped = async { _ = stop.wait_for(|stop| *stop).await };
            return receive::run_with_spool(opened, folder.clone(), limit, &self.options, stopped).await;
        }
        stored?;
        let stopped = async { _ = stop.wait_for(|stop| *stop).await };
        let log = Log::open_to_archive(opened.clone()).await?;
        // The log knows which keys it is written with.
        let folder = match self.options.synchronous {
            true => receive::journals_folder(log.stanza())?,
            false => None,
        };
        match folder {
            // The repository is a folder, and there: the log was read from it.
            Some(folder) => receive::run_with_spool(opened, folder, limit, &self.options, stopped).await,
            None => receive::run(log, &self.options, stopped).await,
        }
    }
}

/// The slot of the receiver into one of `repositories` repositories; `named` is what was chosen.
pub fn slot_of(named: Option<&str>, stanza: &str, repository: &str, repositories: usize) -> String {
    match (named, repositories) {
        (Some(name), 1) => name.to_owned(),
        (Some(name), _) => slot_name(&[name, repository]),
        (None, _) => slot_name(&["fairvault", stanza, repository]),
    }
}

/// A slot's name from parts. Where something does not fit into one, a short hash keeps names apart.
fn slot_name(parts: &[&str]) -> String {
    let plain = parts.join("_");
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if plain.bytes().all(fits) && plain.len() <= NAME_BYTES {
        return plain;
    }
    let hash = &hex::encode(fairvault_format::sha256(plain.as_bytes()))[..8];
    let mut name: String = plain
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    name.truncate(NAME_BYTES - hash.len() - 1);
    format!("{name}_{hash}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_different_stanzas_and_repositories_have_different_names() {
        assert_eq!(slot_name(&["fairvault", "acme", "main"]), "fairvault_acme_main");
        let long = "x".repeat(64);
        let names = [
            slot_name(&["fairvault", "a.b", "main"]),
            slot_name(&["fairvault", "a-b", "main"]),
            slot_name(&["fairvault", &long, "eu"]),
            slot_name(&["fairvault", &long, "us"]),
        ];
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
        assert!(names.iter().all(|name| name.len() <= NAME_BYTES), "{names:?}");
    }
}
