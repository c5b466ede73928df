//! `verify`.

use std::sync::Arc;

use fairvault_engine::commit::Log;
use fairvault_engine::error::{Error, Result};
use fairvault_engine::progress::Progress;
use fairvault_engine::stanza::Stanza;
use fairvault_engine::verify::{self, BackupVerdict, Level};

use super::{Outcome, or_left_out};
use crate::args::{Output, ProgressMode, VerifyLevel};
use crate::context::Context;
use crate::output;

/// Ranges that are shown of a file.
const RANGES: usize = 8;

/// What can be said of a backup.
pub fn print_backup(backup: &BackupVerdict) {
    if backup.restorable {
        output::line(format_args!("backup {}: can be restored", backup.id));
        return;
    }
    if backup.problems.is_empty() && backup.lost_file_count == 0 {
        output::line(format_args!(
            "backup {}: NOT KNOWN, {} objects that it needs could not be read now",
            backup.id,
            backup.unknown.len()
        ));
        return;
    }
    output::line(format_args!("backup {}: CANNOT be restored completely", backup.id));
    for problem in &backup.problems {
        output::line(format_args!("  {problem}"));
    }
    for file in &backup.lost {
        let ranges: Vec<_> = file
            .ranges
            .iter()
            .take(RANGES)
            .map(|r| format!("{}-{}", r.from, r.to - 1))
            .collect();
        let more = file.range_count.saturating_sub(ranges.len() as u64);
        let more = if more > 0 {
            format!(" and {more} more ranges")
        } else {
            String::new()
        };
        output::line(format_args!(
            "  lost: {}: {} of {} bytes: {}{more}",
            file.path,
            file.lost_bytes,
            file.size,
            ranges.join(", ")
        ));
    }
    let more = backup.lost_file_count.saturating_sub(backup.lost.len() as u64);
    if more > 0 {
        output::line(format_args!("  and {more} more files"));
    }
}

/// Runs it.
pub async fn run(context: &Arc<Context>, stanza: &str, level: VerifyLevel, mode: ProgressMode) -> Result<Outcome> {
    let level = match level {
        VerifyLevel::Objects => Level::Objects,
        VerifyLevel::Data => Level::Data,
    };
    let (mut good, mut unread, mut is_left_out) = (true, 0, false);
    for repository in context.repositories(Some(stanza))? {
        if context.is_optional(&repository) && or_left_out(context, stanza, &repository).await?.is_none() {
            is_left_out = true;
            continue;
        }
        let access = context.access(&repository, stanza, false, true)?;
        let log = Log::open(Stanza::open(&access).await?).await?;
        let progress = Arc::new(Progress::default());
        let display = output::Display::start(mode, progress.clone(), "");
        let result = verify::run(&log, &access, level, progress).await;
        drop(display);
        let report = result?;
        good &= report.findings.is_empty()
            && report
                .backups
                .iter()
                .all(|b| b.problems.is_empty() && b.lost_file_count == 0);
        unread += report.unread.len();
        if context.global.output == Output::Json {
            output::json(
                "verify",
                &serde_json::json!({ "stanza": stanza, "repository": log.stanza().shown(), "good": report.is_good(), "report": report }),
            );
            continue;
        }
        for finding in &report.findings {
            output::line(format_args!("{}: {}", finding.object, finding.problem));
        }
        for gap in &report.gaps {
            output::line(format_args!("note: {}: {}", gap.object, gap.problem));
        }
        for finding in &report.unread {
            output::line(format_args!(
                "{}: could not be read now: {}",
                finding.object, finding.problem
            ));
        }
        for backup in &report.backups {
            print_backup(backup);
        }
        output::line(format_args!(
            "{}: {} objects, {} read, {}",
            log.stanza().shown(),
            report.objects,
            output::bytes(report.bytes),
            if report.is_good() {
                "all good".to_owned()
            } else {
                format!("{} problems", report.findings.len() + report.unread.len())
            }
        ));
    }
    match (good, unread) {
        (false, _) => Ok(Outcome::DamageFound),
        (true, 0) if is_left_out => Ok(Outcome::Warnings),
        (true, 0) => Ok(Outcome::Done),
        (true, _) => Err(Error::temporary(format!("{unread} objects could not be read just now"))
            .remedy("verify again when the store answers: nothing is known of them")),
    }
}
