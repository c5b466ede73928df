//! `expire`, `hold`, `unhold` and `policy`: what is kept, and what is not.

use std::sync::Arc;

use fairvault_engine::error::{Context as _, Result};
use fairvault_engine::expire::{self, Options};

use super::{Outcome, or_left_out};
use crate::args::{ExpireArgs, Output, PolicyArgs};
use crate::config;
use crate::context::Context;
use crate::output;

/// `expire`: in every repository, each by its own retention.
pub async fn run(context: &Arc<Context>, args: ExpireArgs) -> Result<Outcome> {
    let mut outcome = Outcome::Done;
    for repository in context.repositories(Some(&args.stanza))? {
        let options = Options {
            retention: context.retention(&repository, &args.stanza)?,
            dry_run: args.dry_run,
            trust_clock: args.trust_clock,
        };
        let Some(mut log) = or_left_out(context, &args.stanza, &repository).await? else {
            outcome = Outcome::Warnings;
            continue;
        };
        let report = expire::run(&mut log, &options)
            .await
            .context(|| format!("repository {repository}"))?;
        let shown = log.stanza().shown();
        if context.global.output == Output::Json {
            output::json(
                "expire",
                &serde_json::json!({ "repository": shown, "dry_run": args.dry_run, "report": report }),
            );
            continue;
        }
        output::line(format_args!(
            "{shown}{}",
            if args.dry_run { " (nothing is changed)" } else { "" }
        ));
        for backup in &report.backups {
            output::line(format_args!(
                "  {:<17} {:<5} {}  {:<7} {}",
                backup.id,
                backup.r#type,
                backup.stopped,
                if backup.keep { "stays" } else { "expires" },
                backup.why
            ));
        }
        report
            .notes
            .iter()
            .for_each(|note| output::line(format_args!("  WARNING: {note}")));
        for wal in &report.wal {
            output::line(format_args!(
                "  WAL of timeline {} from {} to {} expires, {} segments: no backup that stays needs it",
                wal.timeline, wal.from_lsn, wal.to_lsn, wal.segments
            ));
        }
        report
            .wal_notes
            .iter()
            .for_each(|note| output::line(format_args!("  {note}")));
        if !args.dry_run {
            output::line("  what nothing needs any more is deleted by `fairvault gc`");
        }
    }
    Ok(outcome)
}

/// `hold` and `unhold`.
pub async fn hold(context: &Arc<Context>, stanza: &str, backup: &str, reason: &str, released: bool) -> Result<Outcome> {
    let mut done = Vec::new();
    let mut missing = None;
    let mut outcome = Outcome::Done;
    for repository in context.repositories(Some(stanza))? {
        let Some(mut log) = or_left_out(context, stanza, &repository).await? else {
            outcome = Outcome::Warnings;
            continue;
        };
        match expire::hold(&mut log, backup, reason, released).await {
            Ok(()) => done.push(log.stanza().shown().to_owned()),
            // Backups may be in one repository only.
            Err(error) if error.kind() == fairvault_engine::error::Kind::NotFound => missing = Some(error),
            Err(error) => return Err(error),
        }
    }
    if let (true, Some(error)) = (done.is_empty(), missing) {
        return Err(error);
    }
    let word = if released { "no longer held" } else { "held" };
    match context.global.output {
        Output::Json => output::json(
            "hold",
            &serde_json::json!({ "backup": backup, "held": !released, "repositories": done }),
        ),
        Output::Text => done
            .iter()
            .for_each(|shown| output::line(format_args!("{shown}: backup {backup} is {word}"))),
    }
    Ok(outcome)
}

/// `policy`
pub async fn policy(context: &Arc<Context>, args: PolicyArgs) -> Result<Outcome> {
    let age = args.minimum_retention.as_deref();
    let age = age.map(|text| config::age("--minimum-retention", text)).transpose()?;
    let mut outcome = Outcome::Done;
    for repository in context.repositories(Some(&args.stanza))? {
        let Some(mut log) = or_left_out(context, &args.stanza, &repository).await? else {
            outcome = Outcome::Warnings;
            continue;
        };
        let policy = match (age, args.minimum_full) {
            (None, None) => {
                log.prove().await?;
                log.state().policy.clone().unwrap_or_default()
            }
            _ => expire::set_policy(&mut log, age, args.minimum_full).await?,
        };
        let shown = log.stanza().shown();
        match context.global.output {
            Output::Json => output::json(
                "policy",
                &serde_json::json!({ "repository": shown, "minimum_retention_s": policy.minimum_retention_s,
                    "minimum_full": policy.minimum_full }),
            ),
            Output::Text => output::line(format_args!(
                "{shown}: no backup expires before {}, and {} full backups never do",
                expire::rules::days(policy.minimum_retention_s),
                policy.minimum_full
            )),
        }
    }
    Ok(outcome)
}
