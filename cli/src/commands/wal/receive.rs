//! `wal receive`: WAL in every repository seconds after it was written.

use std::path::PathBuf;
use std::time::Duration;

use fairvault_engine::commit::Log;
use fairvault_engine::error::{Context as _, Error, Kind, Result};
use fairvault_engine::replication::conninfo::ConnInfo;
use fairvault_engine::stanza::Stanza;
use fairvault_engine::wal::receive::{self, AtWork, Options};
use tokio::sync::watch;

use crate::args::ReceiveArgs;
use crate::commands::{Outcome, stop_signal};
use crate::config;
use crate::context::Context;

/// What may wait, and how long, if nothing else is said.
const FLUSH_INTERVAL: Duration = Duration::from_secs(5);
const PIECE_SIZE: u64 = 4 << 20;
/// What the spool may hold, if nothing else is said.
const SPOOL_SIZE: u64 = 1 << 30;
/// Pause before a repository that needs a person is tried again, while others are fine.
const PAUSE: Duration = Duration::from_secs(60);
/// Longest name of a slot.
const NAME_BYTES: usize = 63;

/// Into every repository, each over a connection and through a slot of its own.
pub async fn run(context: &Context, args: ReceiveArgs) -> Result<Outcome> {
    let stanza = &args.stanza;
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
        let slot = match (&named, repositories.len()) {
            (Some(name), 1) => name.clone(),
            (Some(name), _) => slot_name(&[name, repository]),
            (None, _) => slot_name(&["fairvault", stanza, repository]),
        };
        let options = Options {
            conninfo: context.conninfo(stanza)?,
            slot: (!args.no_slot).then_some(slot),
            standbys: standbys.clone(),
            flush_interval: interval.map_or(Ok(FLUSH_INTERVAL), |text| config::duration("flush_interval", text))?,
            piece_size: piece_size.map_or(Ok(PIECE_SIZE), |text| config::size("piece_size", text))?,
            synchronous: args.synchronous,
            keep_pieces: args.keep_pieces || configured.keep_pieces,
            skip_gap: args.skip_gap,
            compression: context.wal_compression(stanza)?,
        };
        let spool = spool.as_ref().map(|folder| folder.join(stanza).join(repository));
        each.push(Receiver {
            context,
            stanza,
            repository,
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
    let receivers = each.iter().map(|receiver| receiver.run(alone, stop.clone()));
    let all = futures::future::join_all(receivers);
    tokio::pin!(all, signalled);
    let ended = tokio::select! {
        ended = &mut all => ended,
        () = &mut signalled => all.await,
    };
    ended.into_iter().collect::<Result<Vec<()>>>()?;
    Ok(Outcome::Done)
}

/// Receives into one repository.
struct Receiver<'a> {
    context: &'a Context,
    stanza: &'a str,
    repository: &'a str,
    options: Options,
    /// Folder of its spool.
    spool: Option<PathBuf>,
    /// Bytes that the spool may hold.
    spool_size: u64,
}

impl Receiver<'_> {
    /// What needs a person ends it if it is the only one, and must not hold up others.
    async fn run(&self, alone: bool, mut stop: watch::Receiver<bool>) -> Result<()> {
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
            tracing::error!("{error}; trying again in {} s", PAUSE.as_secs());
            if let Some(remedy) = error.advice() {
                tracing::error!("{remedy}");
            }
            tokio::select! {
                () = tokio::time::sleep(PAUSE) => {}
                _ = stop.wait_for(|stop| *stop) => return Err(error),
            }
        }
    }

    async fn once(&self, mut stop: watch::Receiver<bool>) -> Result<()> {
        let access = self.context.access(self.repository, self.stanza, false, true)?;
        // With a spool, the store may be away: this host remembers the keys.
        let opened = Stanza::open(&access).await?;
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
        let log = Log::open(opened.clone()).await?;
        match receive::journals_folder(&opened).filter(|_| self.options.synchronous) {
            // The repository is a folder, and there: the log was read from it.
            Some(folder) => receive::run_with_spool(opened, folder, limit, &self.options, stopped).await,
            None => receive::run(log, &self.options, stopped).await,
        }
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
