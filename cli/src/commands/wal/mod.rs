//! `wal push`, `wal get` and `wal receive`.

pub mod get;
pub mod push;
pub mod receive;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fairvault_engine::commit::Log;
use fairvault_engine::error::{Error, Result};
use fairvault_engine::stanza::Stanza;
use fairvault_engine::wal::background::Exchange;

use crate::context::Context;

/// Files that a background worker moves at once, if nothing else is said.
const PARALLEL: usize = 4;
/// Where a worker writes its log, in its spool folder.
const WORKER_LOG: &str = "worker.log";
/// A longer log is put aside, in the place of the one before.
const WORKER_LOG_BYTES: u64 = 1 << 20;

/// Opens the log for storing WAL, without ever stretching a passphrase.
async fn open(context: &Context, repository: &str, stanza: &str) -> Result<Log> {
    let access = context.access(repository, stanza, false, false)?;
    Log::open_to_archive(Stanza::open(&access).await?).await
}

/// Where commands for one folder of one server, which differ in nothing that matters, meet their worker;
/// `None` if this host has no place for it.
fn exchange(
    context: &Context,
    stanza: &str,
    what: &str,
    folder: &Path,
    matters: impl Hash,
) -> Result<Option<Exchange>> {
    let Some(spool) = context.spool(stanza) else {
        return Ok(None);
    };
    let meta = std::fs::metadata(folder).map_err(|e| Error::io(format_args!("looking at {}", folder.display()), e))?;
    let mut hasher = DefaultHasher::new();
    (meta.dev(), meta.ino(), matters).hash(&mut hasher);
    let place = spool.join(stanza).join(format!("{what}-{:016x}", hasher.finish()));
    Exchange::open(place).map(Some)
}

/// The stanza in its repositories as configured: what an answer is for.
fn destinations(context: &Context, stanza: &str, repositories: &[String]) -> Result<String> {
    let shown = repositories
        .iter()
        .map(|repository| Ok(format!("{repository} {stanza} {}", context.identity(repository)?)));
    Ok(shown.collect::<Result<Vec<_>>>()?.join("\n"))
}

/// Starts this command again as a background worker, which outlives it.
fn start_worker(exchange: &Exchange) -> Result<()> {
    let log = exchange.folder().join(WORKER_LOG);
    let start = || -> std::io::Result<()> {
        // What earlier ones have said stays to be read, up to a size.
        if std::fs::metadata(&log).is_ok_and(|meta| meta.len() > WORKER_LOG_BYTES) {
            std::fs::rename(&log, log.with_extension("log.1"))?;
        }
        let mut options = std::fs::File::options();
        let log = options.create(true).append(true).mode(0o600).open(&log)?;
        Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .arg("--worker")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()?;
        Ok(())
    };
    start().map_err(|e| Error::io("starting a background worker", e))
}

/// Name of the file at `path`.
fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name().and_then(|n| n.to_str());
    name.map(str::to_owned)
        .ok_or_else(|| Error::refused(format!("{} is not the name of a WAL file", path.display())))
}

/// The folder of a file: `.` for a bare name.
fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
