//! `lock`: locks that last as long as what they protect is needed.

use std::sync::Arc;

use fairvault_engine::error::{Context as _, Result};
use fairvault_engine::immutable::extend::{self, Options, Report};
use fairvault_engine::progress::Progress;

use super::{Outcome, or_left_out};
use crate::args::{LockArgs, Output};
use crate::context::Context;
use crate::output;

/// Runs it, in every repository.
pub async fn run(context: &Arc<Context>, args: LockArgs) -> Result<Outcome> {
    let mut outcome = Outcome::Done;
    for repository in context.repositories(Some(&args.stanza))? {
        if context.is_optional(&repository) && or_left_out(context, &args.stanza, &repository).await?.is_none() {
            outcome = Outcome::Warnings;
            continue;
        }
        let (log, store) = context.open_log_to_lock(&repository, &args.stanza).await?;
        let options = Options {
            retention: context.retention(&repository, &args.stanza)?,
            days: args.days,
            dry_run: args.dry_run,
            trust_clock: args.trust_clock,
        };
        // Who may lock need not be able to write.
        let noted = async || {
            let opened = context.open_log_in(&repository, &args.stanza, true).await;
            let opened = opened.inspect_err(|error| tracing::debug!("nothing is noted in the log: {error}"));
            opened.ok()
        };
        let progress = Arc::new(Progress::default());
        let display = output::Display::start(args.progress, progress.clone(), "");
        let result = extend::run(&log, &store, noted, &options, &progress).await;
        drop(display);
        let report = result.context(|| format!("repository {repository}"))?;
        if !report.hidden.is_empty() || !report.lost.is_empty() {
            outcome = Outcome::DamageFound;
        }
        let shown = log.stanza().shown();
        match context.global.output {
            Output::Json => output::json(
                "lock",
                &serde_json::json!({ "repository": shown, "dry_run": args.dry_run, "report": report }),
            ),
            Output::Text => print(shown, &report, args.dry_run),
        }
    }
    Ok(outcome)
}

fn print(shown: &str, report: &Report, dry_run: bool) {
    output::line(shown);
    output::line(format_args!(
        "  {} objects are needed, {}; the locks of {}, {}, {} extended; {} requests",
        report.needed.objects,
        output::bytes(report.needed.bytes),
        report.extended.objects,
        output::bytes(report.extended.bytes),
        if dry_run { "would be" } else { "were" },
        report.requests
    ));
    if let Some(until) = report.locked_until_s {
        output::line(format_args!(
            "  the first of these locks ends at {}",
            output::time(until)
        ));
    }
    for name in &report.hidden {
        output::line(format_args!(
            "  {name} is locked, and hidden: `fairvault repair` brings it back"
        ));
    }
    for name in &report.lost {
        output::line(format_args!(
            "  {name} is lost: what else its backup needs is not locked"
        ));
    }
}
