//! `repair`.

use std::sync::Arc;

use fairvault_engine::error::{Context as _, Error, Result};
use fairvault_engine::progress::Progress;
use fairvault_engine::repair::{self, Options, Report, entry};
use fairvault_engine::verify::Level;

use super::Outcome;
use super::verify::print_backup;
use crate::args::{Output, RepairArgs, VerifyLevel};
use crate::context::Context;
use crate::output;

/// Runs it, in every repository.
pub async fn run(context: &Context, args: RepairArgs) -> Result<Outcome> {
    if let Some(entry) = args.drop_entry {
        return drop_entry(context, &args, entry).await;
    }
    let options = Options {
        dry_run: args.dry_run,
        level: match args.level {
            VerifyLevel::Objects => Level::Objects,
            VerifyLevel::Data => Level::Data,
        },
        older_log: args.older_log,
    };
    let repositories = context.repositories(Some(&args.stanza))?;
    if args.older_log.is_some() {
        one_of(&repositories, "--older-log")?;
    }
    let (mut outcome, mut unread) = (Outcome::Done, 0);
    for repository in repositories {
        let access = context.access(&repository, &args.stanza, false, true)?;
        let shown = access.repository.folder(&args.stanza).shown().to_owned();
        let progress = Arc::new(Progress::default());
        let display = output::Display::start(args.progress, progress.clone(), "");
        let result = repair::run(&access, options, &progress).await;
        drop(display);
        let report = result.context(|| format!("repository {repository}"))?;
        unread += report.found.unread.len();
        let is_lost = report.found.backups.iter().any(|backup| !backup.restorable);
        if is_lost || args.dry_run && !report.is_good() {
            outcome = Outcome::DamageFound;
        }
        match context.global.output {
            Output::Json => output::json(
                "repair",
                &serde_json::json!({ "stanza": args.stanza, "repository": shown, "dry_run": args.dry_run, "report": report }),
            ),
            Output::Text => print(&shown, &report, args.dry_run),
        }
    }
    match unread {
        0 => Ok(outcome),
        // What is known to be lost says more.
        _ if outcome == Outcome::DamageFound => Ok(outcome),
        _ => Err(Error::temporary(format!("{unread} objects could not be read just now"))
            .remedy("run this again when the store answers: until then, the index stays as it is")),
    }
}

/// The only one of these repositories: an entry's number means another one in each.
fn one_of<'a>(repositories: &'a [String], option: &str) -> Result<&'a String> {
    match repositories {
        [repository] => Ok(repository),
        _ => Err(
            Error::usage(format!("{option} is for one repository, and the stanza has several"))
                .remedy("say with --repo which one it is"),
        ),
    }
}

/// Takes away what is no entry of the log, in one repository.
async fn drop_entry(context: &Context, args: &RepairArgs, number: u64) -> Result<Outcome> {
    let repositories = context.repositories(Some(&args.stanza))?;
    let repository = one_of(&repositories, "--drop-entry")?;
    let access = context.access_to_delete(repository, &args.stanza)?;
    let shown = access.repository.folder(&args.stanza).shown().to_owned();
    let found = entry::find(&access, number).await?;
    let (object, problem) = (found.object.clone(), found.problem.clone());
    let all = match found.is_all() {
        true => "is kept",
        false => "its first 16 MiB are kept",
    };
    let mut kept = None;
    if !args.dry_run {
        let hash = &hex::encode(fairvault_format::sha256(&found.content))[..8];
        let name = format!("{}-{repository}-{number}-{hash}.dropped", args.stanza);
        let path = context.keep(&name, &found.content)?;
        tracing::info!("{object} is kept in {}", path.display());
        kept = Some(path.display().to_string());
        found.drop().await?;
    }
    match context.global.output {
        Output::Json => output::json(
            "repair",
            &serde_json::json!({
                "stanza": args.stanza, "repository": shown, "dry_run": args.dry_run,
                "dropped": { "object": object, "problem": problem, "kept": kept },
            }),
        ),
        Output::Text => {
            output::line(format_args!("{shown}\n  {object}: {problem}"));
            output::line(match &kept {
                Some(kept) => format!("  it was dropped, and {all} in {kept}; the log can be read again"),
                None => "  it would be dropped".to_owned(),
            });
        }
    }
    Ok(Outcome::Done)
}

fn print(shown: &str, report: &Report, dry_run: bool) {
    output::line(shown);
    for hidden in &report.hidden {
        output::line(format_args!(
            "  {}: {}; it {}",
            hidden.object,
            hidden.problem,
            if hidden.brought_back {
                "can be seen again"
            } else {
                "would be brought back"
            }
        ));
    }
    let index = &report.index;
    for run in &index.damaged_runs {
        output::line(format_args!("  {}: {}", run.object, run.problem));
    }
    for finding in &report.found.findings {
        output::line(format_args!("  {}: {}", finding.object, finding.problem));
    }
    for finding in &report.found.unread {
        output::line(format_args!(
            "  {}: could not be read now: {}",
            finding.object, finding.problem
        ));
    }
    if !index.damaged_runs.is_empty() {
        output::line(format_args!(
            "  index: {} parts are lost or damaged; {} packs with {} chunks {}",
            index.damaged_runs.len(),
            index.rebuilt_packs,
            index.rebuilt_chunks,
            if dry_run {
                "would be put into it again"
            } else {
                "are in it again"
            }
        ));
    }
    if !report.gone_packs.is_empty() {
        output::line(format_args!(
            "  packs: {} are lost or damaged; {}",
            report.gone_packs.len(),
            if dry_run {
                "nothing would rely on them any more"
            } else {
                "nothing relies on them any more, and the next backup stores their content anew"
            }
        ));
    }
    if report.is_good() {
        output::line("  nothing to repair");
    }
    report
        .found
        .backups
        .iter()
        .filter(|backup| !backup.restorable)
        .for_each(print_backup);
}
