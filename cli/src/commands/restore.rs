//! `restore`.

use std::sync::Arc;

use fairvault_engine::commit::Log;
use fairvault_engine::error::{Error, Result};
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::progress::Progress;
use fairvault_engine::restore::plan::Plan;
use fairvault_engine::restore::target::{Action, Target, TimelineChoice};
use fairvault_engine::restore::{self, Options};
use fairvault_engine::wal::receive::{self, AtWork};

use super::{Outcome, copy, stop_signal};
use crate::args::{ActionArg, Archiving, Output, RestoreArgs, TargetWord};
use crate::context::Context;
use crate::{output, time};

fn target(args: &RestoreArgs) -> Result<Target> {
    if let Some(text) = &args.target_time {
        let zone = time::zone(args.timezone.as_deref())?;
        let moment = time::parse(text, &jiff::Timestamp::now().to_zoned(zone))?;
        let zone_name = moment
            .time_zone()
            .iana_name()
            .map_or_else(|| moment.offset().to_string(), str::to_owned);
        tracing::info!(
            "target time: {} ({zone_name})",
            moment.strftime("%Y-%m-%dT%H:%M:%S%.f%:z")
        );
        return Ok(Target::Time(moment.timestamp().as_microsecond()));
    }
    if let Some(text) = &args.target_lsn {
        return text.parse().map(Target::Lsn).map_err(Error::usage);
    }
    Ok(match (args.target_xid, &args.target_name, args.target) {
        (Some(xid), _, _) => Target::Xid(xid),
        (_, Some(name), _) => Target::Name(name.clone()),
        (_, _, Some(TargetWord::Immediate)) => Target::Immediate,
        _ => Target::Latest,
    })
}

fn options(context: &Context, args: &RestoreArgs) -> Result<Options> {
    let target = target(args)?;
    let mut map = Vec::new();
    for pair in &args.tablespace_map {
        let (old, new) = pair
            .split_once('=')
            .ok_or_else(|| Error::usage(format!("--tablespace-map {pair:?} is not OLD=NEW")))?;
        map.push((old.to_owned(), new.to_owned()));
    }
    let timeline = match args.target_timeline.as_str() {
        "latest" => TimelineChoice::Latest,
        "current" => TimelineChoice::Current,
        number => TimelineChoice::Number(number.parse().map_err(|_| {
            Error::usage(format!("--target-timeline {number:?} is not a timeline"))
                .remedy("give a number, latest or current")
        })?),
    };
    let action = match args.target_action {
        Some(ActionArg::Pause) => Action::Pause,
        Some(ActionArg::Shutdown) => Action::Shutdown,
        Some(ActionArg::Promote) | None => Action::Promote,
    };
    Ok(Options {
        directory: std::path::absolute(&args.to).map_err(|e| Error::io(format_args!("{}", args.to.display()), e))?,
        backup: args.backup.clone(),
        target,
        exclusive: args.target_exclusive,
        action,
        timeline,
        keep_archiving: args.archiving == Archiving::Keep,
        standby: args.standby,
        delta: args.delta,
        sparse: args.sparse,
        force: args.force,
        tablespace_map: map,
        keep_tablespaces: args.keep_tablespaces,
        command: context.command_words()?,
    })
}

fn describe(plan: &Plan) -> String {
    match &plan.reachable.setting {
        None => format!("the end of the WAL ({})", plan.reachable.wal_end),
        Some((name, value)) => format!("{} {value}", name.trim_start_matches("recovery_").replace('_', " ")),
    }
}

fn print_plan(plan: &Plan, options: &Options, json: bool) {
    let bytes: u64 = plan.files.iter().map(|f| f.size).sum();
    let stored: u64 = plan.frames.iter().map(|f| u64::from(f.stored_len)).sum();
    if json {
        let spaces: Vec<_> = plan
            .tablespaces
            .iter()
            .map(|(oid, l)| serde_json::json!({ "oid": oid, "location": l }))
            .collect();
        output::json(
            "restore-plan",
            &serde_json::json!({
                "backup": plan.info.id, "directory": options.directory.display().to_string(), "target": describe(plan),
                "timeline": plan.reachable.history.timeline, "through_lsn": plan.reachable.through.to_string(),
                "files": plan.files.len(), "bytes": bytes, "stored_bytes": stored, "tablespaces": spaces, "notes": plan.reachable.notes,
            }),
        );
        return;
    }
    output::line(format_args!(
        "backup    {} (PostgreSQL {}, consistent at {})",
        plan.info.id,
        plan.info.server_version / 10_000,
        Lsn(plan.info.stop_lsn)
    ));
    output::line(format_args!(
        "target    {} on timeline {}",
        describe(plan),
        plan.reachable.history.timeline
    ));
    output::line(format_args!(
        "WAL       complete from {} through {}",
        Lsn(plan.info.start_lsn),
        plan.reachable.through
    ));
    output::line(format_args!(
        "write     {} in {} files to {}",
        output::bytes(bytes),
        plan.files.len(),
        options.directory.display()
    ));
    output::line(format_args!(
        "fetch     {} from {} packs",
        output::bytes(stored),
        plan.packs.len()
    ));
    for (oid, location) in &plan.tablespaces {
        output::line(format_args!(
            "tablespace {oid} → {}",
            location.as_deref().unwrap_or("in place")
        ));
    }
    for note in &plan.reachable.notes {
        output::line(format_args!("note      {note}"));
    }
}

/// Opens the stanza in every repository that can be opened, in order; with why others cannot.
async fn open_all(context: &Arc<Context>, stanza: &str) -> Result<(Vec<Log>, Vec<String>)> {
    let repositories = context.repositories(Some(stanza))?;
    let (mut logs, mut unusable, mut first) = (Vec::new(), Vec::new(), None);
    for repository in &repositories {
        let opened = copy::open(context, stanza, repository, context.is_optional(repository)).await;
        let readable = opened.and_then(|log| log.stanza().check_reads("restoring").map(|()| log));
        match readable {
            Ok(log) => logs.push(log),
            Err(error) if repositories.len() == 1 => return Err(error),
            Err(error) => {
                tracing::warn!("repository {repository} cannot be used: {error}");
                unusable.push(format!("repository {repository} could not be used: {error}"));
                first.get_or_insert(error);
            }
        }
    }
    match first {
        Some(error) if logs.is_empty() => Err(error),
        _ => Ok((logs, unusable)),
    }
}

/// Runs it.
pub async fn run(context: &Arc<Context>, args: RestoreArgs) -> Result<Outcome> {
    let options = options(context, &args)?;
    let (logs, unusable) = open_all(context, &args.stanza).await?;
    if args.dry_run {
        let plan = restore::plan(&logs, &options).await?;
        print_plan(&plan, &options, context.global.output == Output::Json);
        return Ok(Outcome::Done);
    }
    for log in &logs {
        receive::store_journals(log.stanza(), context.wal_compression(&args.stanza)?, AtWork::Wait).await?;
    }
    let progress = Arc::new(Progress::default());
    let started = std::time::Instant::now();
    let display = output::Display::start(args.progress, progress.clone(), "fetched");
    let result = restore::run(&logs, &options, progress, stop_signal()).await;
    drop(display);
    let report = result?;
    let fell_over: Vec<&String> = unusable.iter().chain(&report.passed_over).collect();
    if context.global.output == Output::Json {
        output::json(
            "restore",
            &serde_json::json!({
                "backup": report.plan.info.id, "directory": options.directory.display().to_string(), "target": describe(&report.plan),
                "repository": report.repository, "passed_over": fell_over,
                "timeline": report.plan.reachable.history.timeline, "through_lsn": report.plan.reachable.through.to_string(),
                "files": report.files, "bytes": report.bytes, "kept_files": report.kept_files,
                "elapsed_ms": started.elapsed().as_millis() as u64, "notes": report.plan.reachable.notes,
            }),
        );
        return Ok(Outcome::Done);
    }
    output::line(format_args!(
        "restored backup {} to {}: {} in {} files{}, {}",
        report.plan.info.id,
        options.directory.display(),
        output::bytes(report.bytes),
        report.files,
        if report.kept_files > 0 {
            format!(" ({} were right already)", report.kept_files)
        } else {
            String::new()
        },
        output::seconds(started.elapsed())
    ));
    output::line(format_args!(
        "start the server: it will recover to {}",
        describe(&report.plan)
    ));
    for why in &fell_over {
        output::line(format_args!("note: {why}"));
    }
    if logs.len() > 1 || !fell_over.is_empty() {
        output::line(format_args!("note: restored from {}", report.repository));
    }
    for note in &report.plan.reachable.notes {
        output::line(format_args!("note: {note}"));
    }
    if options.standby && !report.plan.reachable.is_newest {
        output::line(format_args!(
            "note: the standby stays on timeline {}: it will not follow a promotion of its primary",
            report.plan.reachable.history.timeline
        ));
    }
    if !options.keep_archiving {
        output::line(
            "note: this copy does not archive WAL; see docs/restore.md for how to let it replace the original",
        );
    }
    if !options.directory.join("postgresql.conf").exists() {
        output::line(
            "note: the backup holds no postgresql.conf (Debian keeps it in /etc/postgresql): give the server one whose max_connections, \
             max_worker_processes, max_wal_senders, max_prepared_transactions and max_locks_per_transaction are not below the original's",
        );
    }
    Ok(Outcome::Done)
}
