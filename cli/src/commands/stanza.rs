//! `stanza create`, `upgrade`, `list`, `fence`, `distrust`.

use std::sync::Arc;

use fairvault_engine::commit::{Log, fence};
use fairvault_engine::error::{Context as _, Error, Result};
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::replication::connection::Connection;
use fairvault_engine::stanza::create::{Cluster, DataKeys, create_with as create_stanza};
use fairvault_engine::stanza::upgrade::{Claims, upgrade as upgrade_stanza};

use super::{Outcome, or_left_out};
use crate::args::{DistrustArgs, FenceArgs, Output, StanzaCreateArgs, UpgradeArgs};
use crate::context::Context;
use crate::output;

/// Name of the slot that a new stanza gets.
const FIRST_SLOT: &str = "main";

/// Asks the server which cluster it is.
pub async fn cluster(context: &Context, stanza: &str) -> Result<Cluster> {
    Ok(cluster_and_end(context, stanza).await?.0)
}

/// The same, and where its WAL ends.
async fn cluster_and_end(context: &Context, stanza: &str) -> Result<(Cluster, Lsn)> {
    let mut connection = Connection::open_either(&context.conninfo(stanza)?).await?;
    let identity = connection.identify().await?;
    let cluster = Cluster {
        system_identifier: identity.system_identifier,
        major: connection.major(),
        wal_segment_size: connection.wal_segment_size().await?,
    };
    Ok((cluster, identity.flush))
}

/// Creates a stanza in a repository, for a cluster.
pub async fn create_in(
    context: &Context,
    repository: &str,
    stanza: &str,
    cluster: Cluster,
    no_encryption: bool,
    data: DataKeys,
) -> Result<Log> {
    let access = context.access(repository, stanza, true, true)?;
    match (&access.secret, no_encryption) {
        (None, false) => {
            return Err(Error::usage(format!("stanza {stanza} has no key, and backups are encrypted unless you say otherwise")).remedy(
                "make a key with `fairvault key generate FILE` and give --key-file FILE (or `key` in the configuration); --no-encryption stores everything readable",
            ));
        }
        (Some(_), true) => {
            return Err(Error::usage(
                "a key is configured, and --no-encryption was given: which one is meant?",
            ));
        }
        _ => {}
    }
    create_stanza(&access, cluster, FIRST_SLOT, data)
        .await
        .context(|| format!("creating stanza {stanza}"))
}

/// `stanza create`
pub async fn create(context: &Context, args: StanzaCreateArgs) -> Result<Outcome> {
    let cluster = cluster(context, &args.stanza).await?;
    let data = match args.public_key {
        true => DataKeys::Public,
        false => DataKeys::Symmetric,
    };
    for repository in context.repositories(Some(&args.stanza))? {
        let log = create_in(context, &repository, &args.stanza, cluster, args.no_encryption, data).await?;
        let has_public_key = log.stanza().keys().has_public_key();
        let encrypted = log.state().genesis.as_ref().is_some_and(|g| g.encrypted);
        match context.global.output {
            Output::Json => output::json(
                "stanza",
                &serde_json::json!({ "stanza": args.stanza, "repository": log.stanza().shown(), "encrypted": encrypted,
                    "public_key": has_public_key, "system_identifier": cluster.system_identifier.to_string() }),
            ),
            Output::Text => output::line(format_args!(
                "stanza {} is ready in {} ({}, PostgreSQL {}, system identifier {})",
                args.stanza,
                log.stanza().shown(),
                match (encrypted, has_public_key) {
                    (true, false) => "encrypted",
                    (true, true) => "encrypted to a public key",
                    (false, _) => "NOT encrypted",
                },
                cluster.major,
                cluster.system_identifier
            )),
        }
    }
    Ok(Outcome::Done)
}

/// `stanza upgrade`: in every repository.
pub async fn upgrade(context: &Arc<Context>, args: UpgradeArgs) -> Result<Outcome> {
    let (cluster, end) = cluster_and_end(context, &args.stanza).await?;
    let claims = Claims {
        unrelated: args.unrelated,
        back: args.back,
    };
    let mut outcome = Outcome::Done;
    for repository in context.repositories(Some(&args.stanza))? {
        let Some(mut log) = or_left_out(context, &args.stanza, &repository).await? else {
            outcome = Outcome::Warnings;
            continue;
        };
        let access = context.access(&repository, &args.stanza, false, true)?;
        let done = upgrade_stanza(&mut log, &access, cluster, end, claims)
            .await
            .context(|| format!("repository {repository}"))?;
        let shown = log.stanza().shown();
        let (from, to) = (done.from, done.to);
        match context.global.output {
            Output::Json => output::json(
                "upgrade",
                &serde_json::json!({ "stanza": args.stanza, "repository": shown, "changed": from != to,
                    "from": { "system_identifier": from.system_identifier.to_string(), "major": from.server_major },
                    "to": { "system_identifier": to.system_identifier.to_string(), "major": to.server_major } }),
            ),
            Output::Text if from == to => output::line(format_args!(
                "{shown}: nothing to do, it is of this cluster (PostgreSQL {}, system identifier {})",
                to.server_major, to.system_identifier
            )),
            Output::Text => output::line(format_args!(
                "{shown}: it goes on with PostgreSQL {}, system identifier {} (before: {}, {}). Take a backup now: there is none of this cluster yet unless it had one before",
                to.server_major, to.system_identifier, from.server_major, from.system_identifier
            )),
        }
    }
    Ok(outcome)
}

/// Folders of a repository that are no stanzas.
const NO_STANZAS: [&str; 1] = ["probe"];

/// Names of the stanzas in a repository.
pub async fn names(context: &Context, repository: &str) -> Result<Vec<String>> {
    let store = context.open_repository(repository, false)?;
    fairvault_engine::stanza::read_repository(&store).await?;
    Ok(store
        .folders()
        .await?
        .into_iter()
        .filter(|n| !NO_STANZAS.contains(&n.as_str()))
        .collect())
}

/// `stanza list`
pub async fn list(context: &Context) -> Result<Outcome> {
    let mut all = Vec::new();
    for repository in context.repositories(None)? {
        let names = names(context, &repository).await?;
        if context.global.output == Output::Text {
            for name in &names {
                output::line(name);
            }
        }
        all.push(serde_json::json!({ "repository": repository, "stanzas": names }));
    }
    if context.global.output == Output::Json {
        output::json("stanzas", &serde_json::json!({ "repositories": all }));
    }
    Ok(Outcome::Done)
}

/// `stanza fence`: in every repository.
pub async fn fence(context: &Arc<Context>, args: FenceArgs) -> Result<Outcome> {
    let after = args
        .after
        .as_deref()
        .map(|text| text.parse().map_err(Error::usage))
        .transpose()?;
    let mut outcome = Outcome::Done;
    for repository in context.repositories(Some(&args.stanza))? {
        let Some(mut log) = or_left_out(context, &args.stanza, &repository).await? else {
            outcome = Outcome::Warnings;
            continue;
        };
        let said = match args.timeline {
            None => {
                let sessions = fence::fence_writers(&mut log, &args.reason).await?;
                format!("all writers were stopped; {sessions} unfinished sessions have ended")
            }
            Some(timeline) if args.reopen => {
                fence::reopen_timeline(&mut log, timeline, &args.reason).await?;
                format!("timeline {timeline} takes WAL again")
            }
            Some(timeline) => {
                let at = fence::close_timeline(&mut log, timeline, after, &args.reason).await?;
                format!("timeline {timeline} is closed at {at}: WAL of it beyond that is refused")
            }
        };
        let stanza = log.stanza().shown();
        match context.global.output {
            Output::Json => output::json("fence", &serde_json::json!({ "stanza": stanza, "done": said })),
            Output::Text => output::line(format_args!("{stanza}: {said}")),
        }
    }
    Ok(outcome)
}

/// `stanza distrust`: in every repository.
pub async fn distrust(context: &Arc<Context>, args: DistrustArgs) -> Result<Outcome> {
    let mut outcome = Outcome::Done;
    for repository in context.repositories(Some(&args.stanza))? {
        let Some(mut log) = or_left_out(context, &args.stanza, &repository).await? else {
            outcome = Outcome::Warnings;
            continue;
        };
        let backups = fairvault_engine::track::distrust(&mut log, args.parser, &args.reason).await?;
        let stanza = log.stanza().shown();
        match context.global.output {
            Output::Json => output::json(
                "distrust",
                &serde_json::json!({ "stanza": stanza, "parser_version": args.parser, "backups": backups }),
            ),
            Output::Text => output::line(format_args!(
                "{stanza}: parser {} is distrusted; no backup builds on the {backups} that were made with it. They stay: test what you restore of them",
                args.parser
            )),
        }
    }
    Ok(outcome)
}
