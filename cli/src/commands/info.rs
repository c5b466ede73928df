//! `info`.

use std::sync::Arc;

use fairvault_engine::error::Result;
use fairvault_engine::inspect::{Info, info_of};
use serde::Serialize;

use super::{Outcome, copy, stanza};
use crate::args::Output;
use crate::away::Away;
use crate::context::Context;
use crate::output;

/// A repository that cannot be read.
#[derive(Serialize)]
struct Unreadable {
    repository: String,
    optional: bool,
    error: String,
    /// Since when it has been away, as this host has marked it, and why.
    marked: Option<String>,
}

/// Runs it.
pub async fn run(context: &Arc<Context>, wanted: Option<String>) -> Result<Outcome> {
    let mut infos = Vec::new();
    let mut unreadable = Vec::new();
    let mut failure = None;
    match wanted {
        Some(name) => {
            let repositories = context.repositories(Some(&name))?;
            for repository in &repositories {
                let optional = context.is_optional(repository);
                let error = match copy::open(context, &name, repository, optional).await {
                    Ok(log) => {
                        infos.push(info_of(&log).await?);
                        continue;
                    }
                    Err(error) if repositories.len() == 1 => return Err(error),
                    Err(error) => error,
                };
                unreadable.push(Unreadable {
                    repository: repository.clone(),
                    optional,
                    error: error.to_string(),
                    marked: Away::of(context, &name).since(repository),
                });
                if !optional {
                    failure.get_or_insert(error.context(format_args!("repository {repository}")));
                }
            }
        }
        None => {
            for repository in context.repositories(None)? {
                for name in stanza::names(context, &repository).await? {
                    match context.open_log_in(&repository, &name, true).await {
                        Ok(log) => infos.push(info_of(&log).await?),
                        Err(error) => tracing::warn!("stanza {name}: {error}"),
                    }
                }
            }
        }
    }
    if context.global.output == Output::Json {
        output::json(
            "info",
            &serde_json::json!({ "stanzas": infos, "unreadable": unreadable }),
        );
    } else {
        infos.iter().for_each(print);
        for one in &unreadable {
            let kind = if one.optional {
                "optional repository"
            } else {
                "repository"
            };
            output::line(format_args!("{kind} {} is away: {}", one.repository, one.error));
            if let Some(marked) = &one.marked {
                output::line(format_args!("  since {marked}"));
            }
        }
    }
    failure.map_or(Ok(Outcome::Done), Err)
}

fn print(info: &Info) {
    output::line(format_args!(
        "stanza {} in {} ({})",
        info.stanza,
        info.repository,
        if info.encrypted { "encrypted" } else { "NOT encrypted" }
    ));
    for session in &info.sessions {
        output::line(format_args!(
            "  unfinished: {} on {} since {}",
            session.what, session.host, session.since
        ));
    }
    if info.backups.is_empty() {
        output::line("  no backups");
    }
    for b in &info.backups {
        output::line(format_args!(
            "  {:<17} {:<5} {}  {:>10}  {:>10} added  PostgreSQL {}{}{}{}{}{}",
            b.id,
            b.r#type,
            b.stopped,
            output::bytes(b.plain_bytes),
            output::bytes(b.new_stored_bytes),
            b.server_version / 10_000,
            if b.no_parent_reason.is_empty() {
                ""
            } else {
                "  everything was read"
            },
            if b.damaged_pages > 0 {
                format!("  {} DAMAGED PAGES", b.damaged_pages)
            } else {
                String::new()
            },
            if b.restorable {
                ""
            } else {
                "  NOT RESTORABLE: its WAL is not complete"
            },
            b.damage
                .as_ref()
                .map(|why| format!("  DAMAGED: {why}; see `fairvault verify`"))
                .unwrap_or_default(),
            b.hold.as_ref().map(|why| format!("  held: {why}")).unwrap_or_default(),
        ));
    }
    // Which cluster, where there were several.
    let of = |system_identifier: &String| match info.system_identifiers.as_slice() {
        [_] => String::new(),
        [.., newest] if newest == system_identifier => String::new(),
        _ => format!(" of the earlier cluster {system_identifier}"),
    };
    for timeline in &info.wal {
        for range in &timeline.ranges {
            let after = match range.after {
                Some("gap") => "  (after a gap)",
                Some(_) => "  (what lies between has expired)",
                None => "",
            };
            output::line(format_args!(
                "  WAL timeline {}{}: {} to {}, {} segments{after}",
                timeline.timeline,
                of(&timeline.system_identifier),
                range.first,
                range.last,
                range.segments
            ));
        }
    }
    for timeline in &info.wal {
        if let Some(closed) = &timeline.closed {
            output::line(format_args!("  WAL timeline {} was closed {closed}", timeline.timeline));
        }
        if let Some(problem) = &timeline.problem {
            output::line(format_args!(
                "  WAL timeline {} CANNOT BE FOLLOWED: {problem}",
                timeline.timeline
            ));
        }
    }
    for w in &info.windows {
        output::line(format_args!(
            "  restorable on timeline {}{}: {} ({}) to {} ({}){}",
            w.timeline,
            of(&w.system_identifier),
            w.from,
            w.from_lsn,
            w.to.as_deref().unwrap_or("no commit known"),
            w.to_lsn,
            w.hole
                .as_ref()
                .zip(w.hole_end.as_ref())
                .map(|(first, last)| match first == last {
                    true => format!("; then {first} is MISSING"),
                    false => format!("; then {first} to {last} are MISSING"),
                })
                .or_else(|| Some(format!("; beyond that, WAL CANNOT BE REPLAYED: {}", w.broken.as_ref()?)))
                .unwrap_or_default()
        ));
    }
}
