//! `backup`.

use std::collections::BTreeMap;
use std::sync::Arc;

use fairvault_engine::backup::{self, Options, SourceKind, WalMethod, judge};
use fairvault_engine::commit::Log;
use fairvault_engine::copy as engine;
use fairvault_engine::error::{Error, Kind, Result};
use fairvault_engine::immutable::reliance::minimum_s;
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::progress::Progress;
use fairvault_engine::stanza::create::DataKeys;
use fairvault_engine::tally;

use super::{Outcome, copy, stanza, stop_signal};
use crate::args::{BackupArgs, BackupType, Output, Source, WalArg};
use crate::away::Away;
use crate::config;
use crate::config::Codec;
use crate::context::Context;
use crate::output;

/// KiB a second from a size such as "20MiB".
fn rate_kib(text: &str) -> Result<u32> {
    let kib = config::size("--max-rate", text)? >> 10;
    u32::try_from(kib)
        .ok()
        .filter(|k| (32..=1_048_576).contains(k))
        .ok_or_else(|| {
            Error::usage(format!("--max-rate {text} is out of range")).remedy("PostgreSQL takes 32KiB to 1GiB a second")
        })
}

/// Opens the stanza; with options alone, a new one is made.
async fn open(context: &Context, args: &BackupArgs, repository: &str) -> Result<Log> {
    let opened = context.open_log_in(repository, &args.stanza, true).await;
    match opened {
        Err(error) if context.is_from_flags() && is_missing(&error) => {
            let cluster = stanza::cluster(context, &args.stanza).await?;
            let log = stanza::create_in(
                context,
                repository,
                &args.stanza,
                cluster,
                args.no_encryption,
                DataKeys::Symmetric,
            )
            .await?;
            tracing::info!("stanza {} was created in {}", args.stanza, log.stanza().shown());
            Ok(log)
        }
        other => other,
    }
}

/// There is no such stanza, or a directory repository that was never made.
fn is_missing(error: &Error) -> bool {
    error.kind() == Kind::NotFound || error.kind() == Kind::Temporary && error.to_string().ends_with("is not there")
}

/// Copies a backup that was just taken to the other repositories that backups go to.
async fn copy_on(context: &Arc<Context>, args: &BackupArgs, log: &Log, id: &str, others: &[String]) -> Result<Outcome> {
    let away = Away::of(context, &args.stanza);
    let mut outcome = Outcome::Done;
    for repository in others {
        let is_optional = context.is_optional(repository);
        let copying = async {
            let mut target = copy::open(context, &args.stanza, repository, is_optional).await?;
            let options = engine::Options {
                backup: Some(id.to_owned()),
                retention: context.retention(repository, &args.stanza)?,
                compression: context.wal_compression(&args.stanza)?,
                reliance: context.reliance(repository, &args.stanza, minimum_s(target.state()))?,
            };
            let progress = Arc::new(Progress::default());
            let display = output::Display::start(args.progress, progress.clone(), "stored");
            let began_us = target.stanza().env().now_us();
            let copied = engine::run(log, &mut target, &options, &progress, stop_signal()).await;
            drop(display);
            let mut copied = copied?;
            copy::note_wal(&mut target, log, began_us, &copied).await;
            match copied.failed.pop() {
                None => Ok(()),
                Some(failed) => Err(Error::damaged(failed.why)),
            }
        };
        match copying.await {
            Ok(()) => {
                away.clear(repository, false);
                tracing::info!("backup {id} was copied to {repository}");
            }
            Err(error) if is_optional && error.kind() != Kind::Interrupted => {
                away.alarm(repository, &error);
                tracing::warn!("backup {id} is not in the optional repository {repository}: {error}");
                outcome = Outcome::Warnings;
            }
            Err(error) => {
                let what = format!(
                    "backup {id} is complete in {}, and was not copied to {repository}",
                    log.stanza().shown()
                );
                return Err(error
                    .context(what)
                    .remedy(format!("try again with `fairvault copy {}`", args.stanza)));
            }
        }
    }
    Ok(outcome)
}

/// Runs it.
pub async fn run(context: &Arc<Context>, args: BackupArgs) -> Result<Outcome> {
    let mut annotations = BTreeMap::new();
    for annotation in &args.annotation {
        let (key, value) = annotation
            .split_once('=')
            .ok_or_else(|| Error::usage(format!("--annotation {annotation:?} is not KEY=VALUE")))?;
        annotations.insert(key.to_owned(), value.to_owned());
    }
    let (codec, level) = context.backup_compression(&args.stanza, args.level)?;
    // What is wrong with it is said before anything is done.
    let schedule = context.schedule(&args.stanza)?;
    let mut options = Options {
        kind: match args.kind {
            BackupType::Auto => backup::Kind::Auto,
            BackupType::Full => backup::Kind::Full,
            BackupType::Diff => backup::Kind::Diff,
            BackupType::Incr => backup::Kind::Incr,
        },
        audit: args.audit,
        source: match args.source {
            Source::Auto => SourceKind::Auto,
            Source::Local => SourceKind::Local,
            Source::Sql => SourceKind::Sql,
            Source::Stream => SourceKind::Stream,
        },
        data_directory: args.data_directory.clone(),
        conninfo: context.conninfo(&args.stanza)?,
        fast: args.fast,
        max_rate_kib: args.max_rate.as_deref().map(rate_kib).transpose()?,
        level,
        pages: codec == Codec::PageZstd,
        wal_records: context.wal_compression(&args.stanza)?.records,
        workers: args.workers,
        wal: match args.wal {
            WalArg::Auto => WalMethod::Auto,
            WalArg::Archive => WalMethod::Archive,
            WalArg::Stream => WalMethod::Stream,
        },
        archive_timeout: context.archive_timeout(&args.stanza)?,
        annotations,
        reliance: None,
    };
    let repositories = context.backup_repositories(&args.stanza)?;
    let mut log = open(context, &args, &repositories[0]).await?;
    options.reliance = context.reliance(&repositories[0], &args.stanza, minimum_s(log.state()))?;
    let taken = log.state().backups.iter().filter_map(|backup| backup.info.as_ref());
    // Without any backup there is nothing to decide.
    if options.kind == backup::Kind::Auto
        && !log.state().backups.is_empty()
        && let Some(due) = schedule.due(jiff::Timestamp::now(), taken)
    {
        tracing::info!("{}", due.why);
        options.kind = due.kind;
    }
    let progress = Arc::new(Progress::default());
    let started = std::time::Instant::now();
    let display = output::Display::start(args.progress, progress.clone(), "stored");
    let result = backup::run(&mut log, &options, progress.clone(), stop_signal()).await;
    drop(display);
    // An archive that has stopped says nothing any more.
    tally::say(&log).await;
    let report = result?;
    let info = &report.info;
    let copied = copy_on(context, &args, &log, &info.id, &repositories[1..]).await;
    let damaged: Vec<_> = report.page_failures.iter().filter(|f| judge::is_damage(f)).collect();
    if context.global.output == Output::Json {
        let failures: Vec<_> = report
            .page_failures
            .iter()
            .map(|f| serde_json::json!({ "path": f.path, "block": f.block, "expected": f.expected, "found": f.found, "judgement": f.judgement }))
            .collect();
        let missed = report.missed.iter();
        let missed: Vec<_> = missed
            .map(|m| serde_json::json!({ "path": m.path, "block": m.block }))
            .collect();
        output::json(
            "backup",
            &serde_json::json!({
                "id": info.id, "type": info.r#type, "parent": info.parent, "no_parent_reason": info.no_parent_reason, "read_bytes": info.read_bytes, "stanza": args.stanza, "repository": log.stanza().shown(),
                "start_lsn": Lsn(info.start_lsn).to_string(), "stop_lsn": Lsn(info.stop_lsn).to_string(), "timeline": info.stop_timeline,
                "files": info.files, "plain_bytes": info.plain_bytes, "new_plain_bytes": info.new_plain_bytes,
                "new_stored_bytes": info.new_stored_bytes, "elapsed_ms": started.elapsed().as_millis() as u64,
                "wal_method": info.wal_method, "source": info.source, "page_failures": failures, "audited": args.audit, "missed_blocks": missed, "damaged_pages": info.damaged_pages, "notes": report.notes,
            }),
        );
    } else {
        let known = info.read_bytes.saturating_sub(info.new_plain_bytes);
        let mut what = format!("{} in {} files", output::bytes(info.plain_bytes), info.files);
        if !info.parent.is_empty() {
            what += &format!(" on {}, {} read", info.parent, output::bytes(info.read_bytes));
        }
        what += &format!(", {} stored", output::bytes(info.new_stored_bytes));
        if known > 0 {
            what += &format!(", {} deduplicated", output::bytes(known));
        }
        output::line(format_args!(
            "{} backup {} of {}: {what}, {} ({}/s)",
            info.r#type,
            info.id,
            args.stanza,
            output::seconds(started.elapsed()),
            output::bytes((info.read_bytes as f64 / started.elapsed().as_secs_f64().max(0.001)) as u64),
        ));
        output::line(format_args!(
            "consistent from {} (timeline {})",
            Lsn(info.stop_lsn),
            info.stop_timeline
        ));
        for note in &report.notes {
            output::line(format_args!("note: {note}"));
        }
        for missed in &report.missed {
            output::line(format_args!("missed: block {} of {}", missed.block, missed.path));
        }
        for failure in &report.page_failures {
            output::line(format_args!(
                "page {} of {}: checksum {:04x}, expected {:04x}: {}",
                failure.block, failure.path, failure.found, failure.expected, failure.judgement
            ));
        }
    }
    if !report.missed.is_empty() {
        return Err(Error::damaged(format!(
            "{} blocks changed although the WAL since backup {} does not say so",
            report.missed.len(),
            info.parent
        ))
        .remedy(
            "this backup is right, since everything was read. Trust no incremental backup before it, and report this",
        ));
    }
    let outcome = copied?;
    if damaged.is_empty() {
        return Ok(outcome);
    }
    tracing::warn!(
        "{} pages are damaged on the server. The backup is complete and holds them as they are: check the server's storage, and keep older backups",
        damaged.len()
    );
    Ok(Outcome::Warnings)
}
