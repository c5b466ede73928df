//! `wal receive`: WAL in every repository seconds after it was written.

use std::time::Duration;

use fairvault_engine::error::{Context as _, Error, Kind, Result};
use fairvault_engine::wal::receive::{self, Options};
use tokio::sync::watch;

use crate::args::ReceiveArgs;
use crate::commands::{Outcome, stop_signal};
use crate::config;
use crate::context::Context;

/// What may wait, and how long, if nothing else is said.
const FLUSH_INTERVAL: Duration = Duration::from_secs(5);
const PIECE_SIZE: u64 = 4 << 20;
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
            flush_interval: interval.map_or(Ok(FLUSH_INTERVAL), |text| config::duration("flush_interval", text))?,
            piece_size: piece_size.map_or(Ok(PIECE_SIZE), |text| config::size("piece_size", text))?,
            synchronous: args.synchronous,
            keep_pieces: args.keep_pieces || configured.keep_pieces,
            skip_gap: args.skip_gap,
            level: context.level(stanza, None)?,
        };
        each.push((repository, options));
    }
    let (stop_in, stop) = watch::channel(false);
    let signalled = async {
        stop_signal().await;
        let _ = stop_in.send(true);
    };
    let alone = each.len() == 1;
    let receivers = each
        .iter()
        .map(|(repository, options)| one(context, stanza, repository, options, alone, stop.clone()));
    let all = futures::future::join_all(receivers);
    tokio::pin!(all, signalled);
    let ended = tokio::select! {
        ended = &mut all => ended,
        () = &mut signalled => all.await,
    };
    ended.into_iter().collect::<Result<Vec<()>>>()?;
    Ok(Outcome::Done)
}

/// Receives into one repository. What needs a person ends it if it is the only one, and must not hold up others.
async fn one(
    context: &Context,
    stanza: &str,
    repository: &str,
    options: &Options,
    alone: bool,
    mut stop: watch::Receiver<bool>,
) -> Result<()> {
    loop {
        let mut stopped = stop.clone();
        let ended = async {
            let log = context.open_log_in(repository, stanza, true).await?;
            let stopped = async { _ = stopped.wait_for(|stop| *stop).await };
            receive::run(log, options, stopped).await
        };
        let what = || format!("receiving WAL of {stanza} into {repository}");
        let error: Error = match ended.await.context(what) {
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
