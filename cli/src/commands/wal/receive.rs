//! `wal receive`: WAL in every repository seconds after it was written.

use std::time::Duration;

use fairvault_engine::error::{Context as _, Result};
use fairvault_engine::wal::receive::{self, Options};

use crate::args::ReceiveArgs;
use crate::commands::{Outcome, stop_signal};
use crate::config;
use crate::context::Context;

/// What may wait, and how long, if nothing else is said.
const FLUSH_INTERVAL: Duration = Duration::from_secs(5);
const PIECE_SIZE: u64 = 4 << 20;

/// `wal receive`: into every repository, each over a connection and through a slot of its own.
pub async fn run(context: &Context, args: ReceiveArgs) -> Result<Outcome> {
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
