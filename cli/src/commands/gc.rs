//! `gc`.

use std::sync::Arc;
use std::time::Duration;

use fairvault_engine::commit::lease;
use fairvault_engine::error::{Context as _, Error, Result};
use fairvault_engine::gc::{self, Count, Options, Versions};
use fairvault_engine::progress::Progress;

use super::{Outcome, or_left_out};
use crate::args::{GcArgs, Output};
use crate::config;
use crate::context::Context;
use crate::output;

/// Runs it, in every repository.
pub async fn run(context: &Arc<Context>, args: GcArgs) -> Result<Outcome> {
    let patience = config::duration("--patience", &args.patience)?;
    // Tests do not wait that long.
    let least = if cfg!(debug_assertions) {
        Duration::ZERO
    } else {
        lease::BEAT * 3
    };
    if patience < least {
        return Err(Error::usage(format!("--patience {:?} is too short", args.patience))
            .remedy("hearts beat every 20 s, and a beat may be late: give at least 60s"));
    }
    let options = Options {
        dry_run: args.dry_run,
        patience,
    };
    let mut outcome = Outcome::Done;
    for repository in context.repositories(Some(&args.stanza))? {
        if context.is_optional(&repository) && or_left_out(context, &args.stanza, &repository).await?.is_none() {
            outcome = Outcome::Warnings;
            continue;
        }
        let log = context.open_log_to_delete(&repository, &args.stanza).await?;
        let progress = Arc::new(Progress::default());
        let display = output::Display::start(args.progress, progress.clone(), "");
        let result = gc::run(&log, &options, &progress).await;
        drop(display);
        let report = result.context(|| format!("repository {repository}"))?;
        if !report.waiting.is_empty() {
            outcome = Outcome::Held;
        }
        let shown = log.stanza().shown();
        if context.global.output == Output::Json {
            output::json(
                "gc",
                &serde_json::json!({ "repository": shown, "dry_run": args.dry_run, "report": report }),
            );
            continue;
        }
        let word = if args.dry_run { "would be deleted" } else { "deleted" };
        output::line(format_args!("{shown}"));
        let counts: [(&str, Count); 5] = [
            ("packs", report.packs),
            ("manifests", report.roots),
            ("parts of the index", report.index_runs),
            ("objects of WAL", report.wal),
            ("snapshots of the log", report.snapshots),
        ];
        for (what, count) in counts.iter().filter(|(_, count)| count.objects > 0) {
            output::line(format_args!(
                "  {} {what} {word}, {}",
                count.objects,
                output::bytes(count.bytes)
            ));
        }
        if counts.iter().all(|(_, count)| count.objects == 0) {
            output::line(format_args!("  nothing {word}"));
        }
        if report.thin_packs.objects > 0 {
            output::line(format_args!(
                "  {} packs of which little is used will run dry, {}",
                report.thin_packs.objects,
                output::bytes(report.thin_packs.bytes)
            ));
        }
        if let Some(versions) = &report.versions {
            print_versions(versions, word);
        }
        report
            .kept
            .iter()
            .for_each(|why| output::line(format_args!("  kept: {why}")));
        for who in &report.waiting {
            output::line(format_args!(
                "  not finished: waiting for {who}. Run this again when that has ended, or stop it with `fairvault stanza fence`"
            ));
        }
    }
    Ok(outcome)
}

/// What became of versions of what was deleted.
fn print_versions(versions: &Versions, word: &str) {
    if versions.deleted.objects > 0 {
        output::line(format_args!(
            "  {} old versions {word} for good, {}",
            versions.deleted.objects,
            output::bytes(versions.deleted.bytes)
        ));
    }
    if let Some(until) = versions.locked_until_s {
        output::line(format_args!(
            "  {} old versions are locked, {}, the last until {}: a later run deletes them",
            versions.locked.objects,
            output::bytes(versions.locked.bytes),
            output::time(until)
        ));
    }
}
