//! `copy`: bring other repositories of a stanza up to date.

use std::sync::Arc;

use fairvault_engine::bounded::bounded;
use fairvault_engine::commit::Log;
use fairvault_engine::copy::{self, Options, Plan, Report};
use fairvault_engine::error::{Context as _, Error, Kind, Result};
use fairvault_engine::immutable::reliance::minimum_s;
use fairvault_engine::progress::Progress;

use super::{Outcome, stop_signal};
use crate::args::{CopyArgs, Output};
use crate::away::{Away, PATIENCE};
use crate::context::Context;
use crate::output;

/// From where, and to where.
fn choose(context: &Context, args: &CopyArgs) -> Result<(String, Vec<String>)> {
    let all = context.repositories(Some(&args.stanza))?;
    for named in [&args.from_repo, &args.to_repo].into_iter().flatten() {
        if !all.contains(named) {
            return Err(
                Error::usage(format!("{named} is no repository of stanza {}", args.stanza))
                    .remedy(format!("repositories: {}", all.join(", "))),
            );
        }
    }
    let from = match (&args.from_repo, &args.to_repo) {
        (Some(from), _) => Some(from.clone()),
        (None, to) => all.iter().find(|name| Some(*name) != to.as_ref()).cloned(),
    };
    let Some(from) = from else {
        return Err(Error::usage("there is one repository, and nothing to copy to")
            .remedy("name several repositories in `repos`"));
    };
    let to: Vec<String> = match &args.to_repo {
        Some(to) => vec![to.clone()],
        None => all.into_iter().filter(|name| *name != from).collect(),
    };
    match to.is_empty() || to.contains(&from) {
        true => Err(Error::usage(format!("there is nothing to copy to from {from}"))
            .remedy("name two different repositories with --from-repo and --to-repo")),
        false => Ok((from, to)),
    }
}

/// Runs it.
pub async fn run(context: Arc<Context>, args: CopyArgs) -> Result<Outcome> {
    let (from, targets) = choose(&context, &args)?;
    let opened = context.open_log_in(&from, &args.stanza, true).await;
    let source = opened.context(|| format!("repository {from}"))?;
    let away = Away::of(&context, &args.stanza);
    let mut outcome = Outcome::Done;
    let mut failed = Vec::new();
    let mut first: Option<Error> = None;
    for to in targets {
        // One that fails does not keep others from theirs.
        let is_left_out = context.is_optional(&to) && args.to_repo.is_none();
        match into_one(&context, &args, &source, &from, &to, is_left_out).await {
            Ok(report) => {
                away.clear(&to, false);
                failed.extend(report.failed.iter().map(|left| format!("{} ({})", left.id, left.why)));
                if !report.notes.is_empty() {
                    outcome = Outcome::Warnings;
                }
            }
            Err(error) if error.kind() == Kind::Interrupted => return Err(error),
            Err(error) if is_left_out => {
                away.alarm(&to, &error);
                outcome = Outcome::Warnings;
            }
            Err(error) => {
                let error = error.context(format_args!("copying from {from} to {to}"));
                match &first {
                    None => first = Some(error),
                    Some(_) => tracing::error!("{error}"),
                }
            }
        }
    }
    if let Some(error) = first {
        return Err(error);
    }
    match failed.is_empty() {
        true => Ok(outcome),
        false => Err(
            Error::damaged(format!("not everything could be copied: {}", failed.join("; ")))
                .remedy("look at the repository that is copied from with `fairvault verify`"),
        ),
    }
}

/// Copies to one repository, or says what would be copied.
async fn into_one(
    context: &Arc<Context>,
    args: &CopyArgs,
    source: &Log,
    from: &str,
    to: &str,
    is_bounded: bool,
) -> Result<Report> {
    let mut target = open(context, &args.stanza, to, is_bounded).await?;
    let options = Options {
        backup: args.backup.clone(),
        retention: context.retention(to, &args.stanza)?,
        compression: context.wal_compression(&args.stanza)?,
        reliance: match args.dry_run {
            true => None,
            false => context.reliance(to, &args.stanza, minimum_s(target.state()))?,
        },
    };
    if args.dry_run {
        print_plan(context, from, to, &copy::plan(source, &target, &options).await?);
        return Ok(Report::default());
    }
    let progress = Arc::new(Progress::default());
    let started = std::time::Instant::now();
    let began_us = target.stanza().env().now_us();
    let display = output::Display::start(args.progress, progress.clone(), "stored");
    let result = copy::run(source, &mut target, &options, &progress, stop_signal()).await;
    drop(display);
    let report = result?;
    note_wal(&mut target, source, began_us, &report).await;
    print(context, from, to, &report, started.elapsed());
    Ok(report)
}

/// Notes in the log of where WAL was copied to how much that was. Of backups, it says so in any case.
pub async fn note_wal(target: &mut Log, source: &Log, began_us: i64, report: &Report) {
    let wal = &report.wal;
    let objects = wal.segments + wal.parts + wal.files;
    if objects > 0 {
        let said = format!("{objects} objects of WAL copied from {}", source.stanza().shown());
        target.note_end("copy", began_us, wal.bytes, Ok(said)).await;
    }
}

/// Opens a stanza in a repository; with an end to waiting, if it is optional.
pub async fn open(context: &Arc<Context>, stanza: &str, repository: &str, is_bounded: bool) -> Result<Log> {
    if !is_bounded {
        return context.open_log_in(repository, stanza, true).await;
    }
    let (context, stanza, repository) = (context.clone(), stanza.to_owned(), repository.to_owned());
    bounded(PATIENCE, move || async move {
        context.open_log_in(&repository, &stanza, true).await
    })
    .await
}

fn print_plan(context: &Context, from: &str, to: &str, plan: &Plan) {
    if context.global.output == Output::Json {
        output::json(
            "copy-plan",
            &serde_json::json!({ "from": from, "to": to, "plan": plan }),
        );
        return;
    }
    output::line(format_args!("{from} → {to} (nothing is changed)"));
    for backup in &plan.backups {
        output::line(format_args!("  {:<17} {:<5} is copied", backup.id, backup.r#type));
    }
    for left in &plan.left {
        output::line(format_args!("  {:<17} is not copied: {}", left.id, left.why));
    }
    output::line(format_args!("  {}", brings(plan)));
}

/// What a copy would bring, in words.
pub fn brings(plan: &Plan) -> String {
    format!(
        "{} backups (about {}) and {} WAL objects ({})",
        plan.backups.len(),
        output::bytes(plan.backup_bytes),
        plan.wal_objects,
        output::bytes(plan.wal_bytes)
    )
}

fn print(context: &Context, from: &str, to: &str, report: &Report, elapsed: std::time::Duration) {
    if context.global.output == Output::Json {
        let elapsed = elapsed.as_millis() as u64;
        output::json(
            "copy",
            &serde_json::json!({ "from": from, "to": to, "report": report, "elapsed_ms": elapsed }),
        );
        return;
    }
    output::line(format_args!("{from} → {to}, {}", output::seconds(elapsed)));
    for backup in &report.backups {
        let id = match backup.copy == backup.id {
            true => String::new(),
            false => format!(" as {}", backup.copy),
        };
        let stored = output::bytes(backup.stored_bytes);
        output::line(format_args!(
            "  {:<17} {:<5} copied{id}, {stored} stored",
            backup.id, backup.r#type
        ));
    }
    for left in &report.left {
        output::line(format_args!("  {:<17} not copied: {}", left.id, left.why));
    }
    for left in &report.failed {
        output::line(format_args!("  {:<17} NOT COPIED: {}", left.id, left.why));
    }
    let wal = &report.wal;
    output::line(format_args!(
        "  WAL: {} segments, {} parts, {} histories copied ({}); {} compared",
        wal.segments,
        wal.parts,
        wal.files,
        output::bytes(wal.bytes),
        wal.compared
    ));
    for note in &report.notes {
        output::line(format_args!("  note: {note}"));
    }
}
