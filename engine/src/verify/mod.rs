//! Is everything there and unchanged? And if not: what can still be restored?
//!
//! `objects` reads every object that a live backup needs and compares its hash with its name, WAL included;
//! it needs no data key. `data` also opens every frame, checks every chunk's id and the checksum of every
//! page, and walks the WAL that backups need.

mod metadata;
pub(crate) mod packs;
mod wal;

use std::sync::Arc;

use fairvault_format::{names, proto};
use serde::Serialize;

use crate::commit::Log;
use crate::commit::lease::Lease;
use crate::error::{Error, Kind, Result};
use crate::manifest::Manifest;
use crate::progress::Progress;
use crate::restore::target::info;
use crate::stanza::Access;

/// How thorough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Every object is there and its hash holds.
    Objects,
    /// Every frame opens, every chunk and page is right, the WAL can be walked.
    Data,
}

/// Something that is wrong.
#[derive(Debug, Clone, Serialize, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Object or file.
    pub object: String,
    /// What is wrong.
    pub problem: String,
}

/// Bytes of a file, from the first one to the one behind the last.
#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub from: u64,
    /// Behind the last one.
    pub to: u64,
}

/// A file of a backup of which bytes are lost.
#[derive(Debug, Clone, Serialize)]
pub struct LostFile {
    /// Path in the data directory.
    pub path: String,
    /// Its size, bytes.
    pub size: u64,
    /// Bytes that are lost.
    pub lost_bytes: u64,
    /// Where they are, at most [`MAX_LISTED`].
    pub ranges: Vec<ByteRange>,
    /// Number of ranges.
    pub range_count: u64,
}

impl LostFile {
    /// A range that lies behind the others.
    fn add(&mut self, from: u64, len: u64) {
        let to = from + len;
        self.lost_bytes += len;
        match self.ranges.last_mut() {
            Some(last) if last.to == from => last.to = to,
            _ => {
                self.range_count += 1;
                if self.ranges.len() < MAX_LISTED {
                    self.ranges.push(ByteRange { from, to });
                }
            }
        }
    }
}

/// What can be said of one backup.
#[derive(Debug, Clone, Serialize)]
pub struct BackupVerdict {
    /// Backup id.
    pub id: String,
    /// It can be restored.
    pub restorable: bool,
    /// Files whose content is lost, at most [`MAX_LISTED`].
    pub lost_files: Vec<String>,
    /// Which bytes of them are lost.
    pub lost: Vec<LostFile>,
    /// Number of them.
    pub lost_file_count: u64,
    /// What is wrong with it.
    pub problems: Vec<String>,
    /// What could not be looked at just now: without it nothing is known.
    pub unknown: Vec<String>,
}

impl BackupVerdict {
    /// Of a backup of which nothing bad is known.
    fn new(id: String) -> Self {
        Self {
            id,
            restorable: true,
            lost_files: Vec::new(),
            lost: Vec::new(),
            lost_file_count: 0,
            problems: Vec::new(),
            unknown: Vec::new(),
        }
    }

    /// Whether it can be restored, by all that was noted.
    pub(crate) fn conclude(&mut self) {
        self.restorable = self.problems.is_empty() && self.lost_file_count == 0 && self.unknown.is_empty();
    }

    fn note(&mut self, what: &str, error: &Error) {
        let list = match error.kind() {
            Kind::Damaged | Kind::NotFound | Kind::Unsupported => &mut self.problems,
            _ => &mut self.unknown,
        };
        list.push(format!("{what}: {error}"));
    }
}

/// Files listed per backup.
pub const MAX_LISTED: usize = 100;

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Objects that could not be looked at just now: nothing can be said of them.
    pub unread: Vec<Finding>,
    /// Objects looked at.
    pub objects: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// WAL that is not there, and that nobody was to bring, as far as is known: backups bring their own.
    pub gaps: Vec<Finding>,
    /// Each backup.
    pub backups: Vec<BackupVerdict>,
}

impl Report {
    /// Nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.findings.is_empty() && self.unread.is_empty() && self.backups.iter().all(|b| b.restorable)
    }

    /// Each finding once.
    pub(crate) fn tidy(&mut self) {
        for list in [&mut self.findings, &mut self.unread, &mut self.gaps] {
            list.sort();
            list.dedup();
        }
    }

    fn add(&mut self, object: impl Into<String>, problem: impl std::fmt::Display) {
        self.findings.push(Finding {
            object: object.into(),
            problem: problem.to_string(),
        });
    }

    /// Notes an error about one object: as damage, or as something to ask again later. The rest goes on.
    pub(crate) fn note(&mut self, object: impl Into<String>, error: &Error) {
        let list = match error.kind() {
            Kind::Damaged | Kind::NotFound | Kind::Unsupported => &mut self.findings,
            _ => &mut self.unread,
        };
        list.push(Finding {
            object: object.into(),
            problem: error.to_string(),
        });
    }
}

/// What backups need of packs, and of each backup whether its manifest can be read.
pub(crate) struct Needed {
    /// Packs and frames.
    pub wanted: packs::Wanted,
    /// In the order of the log.
    pub manifests: Vec<Result<()>>,
}

impl Needed {
    /// Reads the manifests of all live backups. One manifest is in memory at a time; of all of them only the frames stay.
    pub async fn read(log: &Log, mut seen: impl FnMut(&Manifest)) -> Self {
        let mut this = Self {
            wanted: packs::Wanted::default(),
            manifests: Vec::new(),
        };
        for backup in &log.state().backups {
            let manifest = Manifest::read(log.stanza(), &backup.root).await;
            if let Ok(manifest) = &manifest {
                this.wanted.add(manifest);
                seen(manifest);
            }
            this.manifests.push(manifest.map(|_| ()));
        }
        this
    }
}

/// What the loss of frames means for a backup.
pub(crate) async fn judge(
    log: &Log,
    backup: &proto::CommittedBackup,
    manifest: Result<()>,
    checked: &packs::Checked,
    report: &mut Report,
) -> BackupVerdict {
    let mut verdict = BackupVerdict::new(info(backup).id);
    let again = match manifest {
        Ok(()) if checked.is_clean() => Ok(()),
        Ok(()) => Manifest::read(log.stanza(), &backup.root)
            .await
            .map(|manifest| packs::judge(&manifest, checked, &mut verdict)),
        Err(error) => Err(error),
    };
    if let Err(error) = again {
        let root = backup.root.as_slice().try_into().unwrap_or([0; 32]);
        report.note(names::root(&root), &error);
        verdict.note("its manifest cannot be read", &error);
    }
    verdict
}

/// Objects under way at once; the largest has 64 MiB.
const CONCURRENT: usize = 2;

/// Verifies a stanza that `access` has opened. Packs that were found damaged are marked, so that later backups
/// store their content again. How it ended is in the log.
pub async fn run(log: &Log, access: &Access, level: Level, progress: Arc<Progress>) -> Result<Report> {
    let stanza = log.stanza().clone();
    let began_us = stanza.env().now_us();
    let (mut noted, mut report) = (log.clone(), Report::default());
    let done = async {
        stanza.check_reads("verifying")?;
        let lease = Lease::for_reading(&stanza, "verify", "").await;
        let looked = look(&mut noted, access, level, &progress, &mut report).await;
        if let Some(lease) = lease {
            lease.release().await;
        }
        looked
    };
    let done = done.await;
    let end = done.as_ref().map(|()| match report.is_good() {
        true => "clean".to_owned(),
        false => format!("{} problems", report.findings.len() + report.unread.len()),
    });
    noted.note_end("verify", began_us, report.bytes, end).await;
    done?;
    Ok(report)
}

async fn look(log: &mut Log, access: &Access, level: Level, progress: &Progress, report: &mut Report) -> Result<()> {
    log.refresh().await?;
    let log = &*log;
    // Keys may have been rotated since it was opened.
    let stanza = log.stanza().clone();
    progress.phase("verifying keys, log and index");
    metadata::check_keys(access, log, report).await;
    metadata::check_log(log, report).await;
    let indexed = metadata::check_runs(log, report).await;
    progress.phase("looking for what is hidden");
    metadata::check_hidden(access, &stanza, report).await;

    progress.phase("reading manifests");
    let Needed { mut wanted, manifests } = Needed::read(log, |_| ()).await;
    wanted.add_packs(indexed);
    progress.total_bytes.set(wanted.bytes());
    progress.phase("verifying packs");
    let checking = packs::Checking {
        stanza: &stanza,
        level,
        marks: true,
        progress,
    };
    let checked = checking.run(&wanted, report, async |_, _| Ok(())).await?;
    drop(wanted);
    progress.phase("verifying WAL");
    let mut archives = wal::Archives::check_objects(log, report, progress).await;
    for (manifest, backup) in manifests.into_iter().zip(&log.state().backups) {
        let mut verdict = judge(log, backup, manifest, &checked, report).await;
        if let Err(error) = archives.check_backup(log, backup, level, &mut verdict, report).await {
            report.note(format!("WAL of backup {}", verdict.id), &error);
            verdict.note("its own WAL cannot be read", &error);
        }
        verdict.conclude();
        report.backups.push(verdict);
    }
    report.tidy();
    Ok(())
}
