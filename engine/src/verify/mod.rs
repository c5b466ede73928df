//! Is everything there and unchanged? And if not: what can still be restored?
//!
//! `objects` reads every object that a live backup needs and compares its hash with its name, WAL included;
//! it needs no data key. `data` also opens every frame, checks every chunk's id and the checksum of every
//! page, and walks the WAL that backups need.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::{names, pack, sha256, wal};
use futures::StreamExt;
use serde::Serialize;

use crate::commit::Log;
use crate::error::{Error, Kind, Result};
use crate::postgres::files::relation_file;
use crate::postgres::lsn::Lsn;
use crate::postgres::page;
use crate::postgres::segment::History;
use crate::progress::Progress;
use crate::restore::data::open_frame;
use crate::restore::plan::Manifest;
use crate::restore::target::{Reader, info};
use crate::stanza::Stanza;
use crate::wal::archive::Archive;
use crate::wal::coverage::Coverage;

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

/// What can be said of one backup.
#[derive(Debug, Clone, Serialize)]
pub struct BackupVerdict {
    /// Backup id.
    pub id: String,
    /// It can be restored.
    pub restorable: bool,
    /// Files whose content is lost, at most [`MAX_LISTED`].
    pub lost_files: Vec<String>,
    /// Number of them.
    pub lost_file_count: u64,
    /// What is wrong with it.
    pub problems: Vec<String>,
}

/// Files listed per backup.
pub const MAX_LISTED: usize = 100;

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Objects looked at.
    pub objects: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// Each backup.
    pub backups: Vec<BackupVerdict>,
}

impl Report {
    /// Nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.findings.is_empty() && self.backups.iter().all(|b| b.restorable)
    }

    fn add(&mut self, object: impl Into<String>, problem: impl std::fmt::Display) {
        self.findings.push(Finding {
            object: object.into(),
            problem: problem.to_string(),
        });
    }
}

/// Objects under way at once; the largest has 64 MiB.
const CONCURRENT: usize = 2;

/// Verifies a stanza.
pub async fn run(log: &Log, level: Level, progress: Arc<Progress>) -> Result<Report> {
    let stanza = log.stanza().clone();
    let mut report = Report::default();
    progress.phase("verifying the log and the index");
    check_log(log, &mut report).await?;
    let indexed = check_runs(log, &mut report).await?;
    progress.phase("verifying packs");
    let mut manifests: Vec<(String, Result<Manifest>)> = Vec::new();
    for backup in &log.state().backups {
        manifests.push((info(backup).id, Manifest::read(&stanza, &backup.root).await));
    }
    let mut wanted = wanted_frames(&manifests);
    for pack in indexed {
        // Later backups may rely on it, even if no committed one does.
        wanted.packs.entry(pack).or_default();
    }
    progress.total_bytes.set(
        manifests
            .iter()
            .filter_map(|(_, m)| m.as_ref().ok())
            .flat_map(|m| &m.usage.live_bytes)
            .sum(),
    );
    let bad = check_packs(&stanza, &wanted, level, &mut report, &progress).await?;
    progress.phase("verifying WAL");
    let bad_wal = check_wal(log, &mut report, &progress).await?;
    for ((id, manifest), backup) in manifests.into_iter().zip(&log.state().backups) {
        let mut verdict = BackupVerdict {
            id: id.clone(),
            restorable: true,
            lost_files: Vec::new(),
            lost_file_count: 0,
            problems: Vec::new(),
        };
        match manifest {
            Err(error) if error.kind() == Kind::Temporary => return Err(error),
            Err(error) => {
                report.add(
                    names::root(&backup.root.as_slice().try_into().unwrap_or([0; 32])),
                    &error,
                );
                verdict.problems.push(format!("its manifest cannot be read: {error}"));
            }
            Ok(manifest) => {
                lost_files(&manifest, &bad, &mut verdict);
                if level == Level::Data {
                    check_crcs(&manifest, &mut verdict);
                }
            }
        }
        check_backup_wal(log, backup, level, &bad_wal, &mut verdict).await?;
        verdict.restorable = verdict.problems.is_empty() && verdict.lost_file_count == 0;
        report.backups.push(verdict);
    }
    report.findings.sort();
    report.findings.dedup();
    Ok(report)
}

async fn check_log(log: &Log, report: &mut Report) -> Result<()> {
    // The log was opened from what this host remembers or from a snapshot: here all of it is read.
    let stanza = log.stanza();
    let mut fresh = Log::empty(stanza.clone());
    if let Err(error) = fresh.refresh().await {
        if error.kind() == Kind::Temporary {
            return Err(error);
        }
        report.add("log", error);
    } else if fresh.state().seq < log.state().seq {
        report.add(
            names::log_context(fresh.state().seq + 1),
            "it is missing, and later entries were seen before",
        );
    }
    report.objects += fresh.state().seq;
    Ok(())
}

/// Checks index runs; returns the packs that they name.
async fn check_runs(log: &Log, report: &mut Report) -> Result<BTreeSet<[u8; 32]>> {
    let mut packs = BTreeSet::new();
    for run in &log.state().index_runs {
        let Ok(hash) = <[u8; 32]>::try_from(run.as_slice()) else {
            continue;
        };
        let name = names::index_run(&hash);
        let stanza = log.stanza();
        report.objects += 1;
        match read(stanza, &name, &hash).await? {
            Ok(bytes) => {
                report.bytes += bytes.len() as u64;
                let opened = stanza
                    .keys_for(&bytes, &name)
                    .and_then(|keys| Ok(fairvault_format::index::open_run(keys, stanza.scope(), &bytes, &name)?));
                match opened {
                    Ok(run) => packs.extend(run.packs.iter().map(|p| p.name)),
                    Err(error) => report.add(&name, error),
                }
            }
            Err(problem) => report.add(
                &name,
                format_args!("{problem}; it only speeds up backups and can be rebuilt from packs"),
            ),
        }
    }
    Ok(packs)
}

/// A hash-named object: its bytes, or what is wrong with it.
async fn read(stanza: &Stanza, name: &str, hash: &[u8; 32]) -> Result<std::result::Result<bytes::Bytes, String>> {
    Ok(match stanza.store().get_opt(name).await? {
        None => Err("it is missing".to_owned()),
        Some(bytes) if sha256(&bytes) != *hash => Err(format!(
            "its {} bytes do not match its name: it was changed or cut off",
            bytes.len()
        )),
        Some(bytes) => Ok(bytes),
    })
}

/// A frame, by the name of its pack and its ordinal.
type FrameKeyed = ([u8; 32], u32);

#[derive(Default)]
struct Wanted {
    packs: BTreeMap<[u8; 32], Vec<WantedFrame>>,
}

struct WantedFrame {
    pack: fairvault_format::index::PackRef,
    frame: crate::restore::plan::FrameRef,
    /// A relation's blocks, if the frame holds checksummed pages: first block in the relation.
    first_block: Option<u32>,
}

fn wanted_frames(manifests: &[(String, Result<Manifest>)]) -> Wanted {
    let mut seen: BTreeSet<FrameKeyed> = BTreeSet::new();
    let mut wanted = Wanted::default();
    for manifest in manifests.iter().filter_map(|(_, m)| m.as_ref().ok()) {
        let root_info = manifest.root.info.clone().unwrap_or_default();
        let damaged: BTreeSet<(&str, u32)> = manifest
            .root
            .page_failures
            .iter()
            .map(|f| (f.path.as_str(), f.block))
            .collect();
        for pack in &manifest.packs {
            wanted.packs.entry(pack.name).or_default();
        }
        let mut first_blocks: HashMap<u32, Option<u32>> = HashMap::new();
        for p in &manifest.placements {
            let path = &manifest.files[p.file as usize].path;
            let block = (p.file_offset / 8192) as u32;
            let known_bad = damaged
                .iter()
                .any(|(f, b)| f == path && (block..block + p.len / 8192).contains(b));
            let relation =
                relation_file(path).filter(|_| root_info.data_checksums && p.frame_offset == 0 && !known_bad);
            let first = relation.map(|r| r.segment.wrapping_mul(131_072).wrapping_add(block));
            // A chunk that two relations share cannot have checksums of both: only zeros can.
            first_blocks
                .entry(p.frame)
                .and_modify(|known| {
                    if *known != first {
                        *known = None
                    }
                })
                .or_insert(first);
        }
        for (number, frame) in manifest.frames.iter().enumerate() {
            let pack = manifest.packs[frame.pack as usize];
            if seen.insert((pack.name, frame.ordinal)) {
                let first_block = first_blocks.get(&(number as u32)).copied().flatten();
                wanted.packs.entry(pack.name).or_default().push(WantedFrame {
                    pack,
                    frame: *frame,
                    first_block,
                });
            }
        }
    }
    wanted
}

/// Checks packs; returns the frames that are lost.
async fn check_packs(
    stanza: &Arc<Stanza>,
    wanted: &Wanted,
    level: Level,
    report: &mut Report,
    progress: &Progress,
) -> Result<BTreeSet<FrameKeyed>> {
    let mut bad = BTreeSet::new();
    let mut checks = futures::stream::iter(wanted.packs.iter().map(|(name, frames)| async move {
        let object = names::pack(name);
        let mut findings: Vec<Finding> = Vec::new();
        let mut lost: Vec<FrameKeyed> = Vec::new();
        let finding = |problem: String| Finding {
            object: object.clone(),
            problem,
        };
        let (bytes, whole) = match stanza.store().get_opt(&object).await? {
            None => (bytes::Bytes::new(), Err("it is missing".to_owned())),
            Some(bytes) if sha256(&bytes) != *name => {
                let problem = format!(
                    "its {} bytes do not match its name: it was changed or cut off",
                    bytes.len()
                );
                (bytes, Err(problem))
            }
            Some(bytes) => (bytes, Ok(())),
        };
        if let Err(problem) = &whole {
            findings.push(finding(problem.clone()));
        } else {
            let opened = stanza
                .keys_for(&bytes, &object)
                .and_then(|keys| Ok(pack::open_pack(keys, stanza.scope(), &bytes, &object)?));
            if let Err(error) = opened {
                findings.push(finding(error.to_string()));
            }
        }
        // In a damaged pack, frames that still open are not lost.
        if whole.is_err() || level == Level::Data {
            for w in frames {
                match check_frame(stanza, w, &bytes) {
                    Ok(None) => {}
                    Ok(Some(problem)) => findings.push(finding(problem)),
                    Err(error) => {
                        findings.push(finding(error.to_string()));
                        lost.push((*name, w.frame.ordinal));
                    }
                }
            }
        }
        Ok::<_, Error>((bytes.len() as u64, findings, lost))
    }))
    .buffer_unordered(CONCURRENT);
    while let Some(result) = checks.next().await {
        let (len, findings, lost) = result?;
        report.objects += 1;
        report.bytes += len;
        progress.read_bytes.add(len);
        report.findings.extend(findings);
        bad.extend(lost);
    }
    Ok(bad)
}

/// Opens a frame and checks its pages. `Some`: a page is bad, which the frame itself is not.
fn check_frame(stanza: &Stanza, wanted: &WantedFrame, pack_bytes: &[u8]) -> Result<Option<String>> {
    let keys = stanza.keys_of(wanted.pack.header.epoch)?;
    let key = fairvault_format::frame::FrameKey::new(keys, stanza.scope(), &wanted.pack.header)?;
    let from = wanted.frame.offset as usize;
    let stored = pack_bytes
        .get(from..from + wanted.frame.stored_len as usize)
        .unwrap_or_default();
    let chunk = open_frame(stanza, &key, &wanted.pack, &wanted.frame, stored)?;
    let Some(first) = wanted.first_block else {
        return Ok(None);
    };
    for (i, page) in chunk.chunks_exact(8192).enumerate() {
        if let page::Verdict::Bad { expected, found } = page::verify(page, first.wrapping_add(i as u32)) {
            return Ok(Some(format!(
                "frame {}: page {} has checksum {found:04x}, expected {expected:04x}",
                wanted.frame.ordinal,
                first.wrapping_add(i as u32)
            )));
        }
    }
    Ok(None)
}

fn lost_files(manifest: &Manifest, bad: &BTreeSet<FrameKeyed>, verdict: &mut BackupVerdict) {
    let mut lost: BTreeSet<u32> = BTreeSet::new();
    for p in &manifest.placements {
        let frame = &manifest.frames[p.frame as usize];
        if bad.contains(&(manifest.packs[frame.pack as usize].name, frame.ordinal)) {
            lost.insert(p.file);
        }
    }
    verdict.lost_file_count = lost.len() as u64;
    verdict.lost_files = lost
        .iter()
        .take(MAX_LISTED)
        .map(|&f| manifest.files[f as usize].path.clone())
        .collect();
}

/// A file that the backup says is damaged at its source is no fault of the repository; it is said again.
fn check_crcs(manifest: &Manifest, verdict: &mut BackupVerdict) {
    let damaged = manifest
        .root
        .page_failures
        .iter()
        .filter(|f| crate::backup::judge::is_damage(f))
        .count();
    if damaged > 0 {
        tracing::warn!(
            "backup {}: {damaged} pages were already damaged on the server when it was taken",
            verdict.id
        );
    }
}

/// Opens every WAL object; returns the segments that are bad.
async fn check_wal(log: &Log, report: &mut Report, progress: &Progress) -> Result<BTreeSet<String>> {
    let stanza = log.stanza();
    let mut bad = BTreeSet::new();
    let objects = stanza.store().list(names::WAL).await?;
    let mut checks = futures::stream::iter(objects.into_iter().map(|(object, _)| async move {
        let bytes = stanza.store().get(&object).await?;
        let in_piece_folder = object.rsplit('/').nth(1).is_some_and(|folder| folder.ends_with(".d"));
        let file = object
            .rsplit('/')
            .next()
            .and_then(names::parse_wal_file)
            .map(|(name, _)| name.to_owned());
        let kind = match &file {
            _ if in_piece_folder => ObjectKind::WalPiece,
            Some(name) if name.len() == 24 => ObjectKind::WalSegment,
            _ => ObjectKind::WalSide,
        };
        let opened = stanza
            .keys_for(&bytes, &object)
            .and_then(|keys| Ok(wal::open_wal(keys, stanza.scope(), kind, &bytes, &object)?));
        Ok::<_, Error>((object, bytes.len() as u64, opened.err(), file))
    }))
    .buffer_unordered(CONCURRENT);
    while let Some(result) = checks.next().await {
        let (object, len, error, file) = match result {
            Ok(checked) => checked,
            Err(error) if error.kind() == Kind::NotFound => continue,
            Err(error) => return Err(error),
        };
        report.objects += 1;
        report.bytes += len;
        progress.read_bytes.add(len);
        if let Some(error) = error {
            report.add(&object, error);
            bad.extend(file);
        }
    }
    Ok(bad)
}

/// The WAL that a backup needs for itself.
async fn check_backup_wal(
    log: &Log,
    backup: &fairvault_format::proto::CommittedBackup,
    level: Level,
    bad: &BTreeSet<String>,
    verdict: &mut BackupVerdict,
) -> Result<()> {
    let info = info(backup);
    let archive = Archive::open(log, Some(info.system_identifier), 3)?;
    let coverage = Coverage::read(&archive).await?;
    let known = coverage.timelines.get(&info.start_timeline).map(|t| t.history.clone());
    let history = known.unwrap_or(History {
        timeline: info.start_timeline,
        ancestors: Vec::new(),
    });
    let (start, stop) = (Lsn(info.start_lsn), Lsn(info.stop_lsn));
    let reach = coverage.reach(&history, start);
    if reach.end < stop {
        verdict.problems.push(format!(
            "{} of its own WAL is missing",
            reach.missing.name(archive.segment_size)
        ));
        return Ok(());
    }
    let reader = Reader::new(&archive, &history);
    for segment in reader.segments(start, stop) {
        let name = segment.name(archive.segment_size);
        if bad.contains(&name) {
            verdict.problems.push(format!("{name} of its own WAL is damaged"));
            return Ok(());
        }
    }
    if level == Level::Data {
        let end = reader.walk(start, stop, |_| {}).await?;
        if end < stop {
            verdict
                .problems
                .push(format!("its own WAL cannot be read beyond {end}; it needs {stop}"));
        }
    }
    Ok(())
}
