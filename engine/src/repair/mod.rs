//! Repair: what is hidden is brought back; what of the index is lost or damaged is made anew from packs; what content
//! is lost is named.
//!
//! What always holds: nothing is believed that does not prove itself. The index is made from packs whose bytes match
//! their names and whose directories open. Nothing is deleted (but by [`entry`], on purpose). What a newer version wrote is left alone, and so is the
//! index for as long as something could not be read. It works beside backups and collection: everything that it changes
//! is one session's, so that no collector deletes what it has just stored. Whoever comes after an interrupted repair
//! goes on where that stopped.

pub mod entry;
mod rebuild;

use std::collections::{BTreeSet, HashSet};

use fairvault_format::names;
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use serde::Serialize;

use crate::commit::fence::by_whom;
use crate::commit::lease::{Lease, NO_BACKUP};
use crate::commit::session::{Session, timed_id};
use crate::commit::{Log, state};
use crate::dedup::{self, read_run};
use crate::env::has_fault;
use crate::error::{Error, Kind, Result};
use crate::gc::{runs, sweep::are_live, usage::Usage};
use crate::immutable::hidden::{self, Hidden};
use crate::immutable::written;
use crate::progress::Progress;
use crate::stanza::{Access, Stanza, erasure, read_repository};
use crate::verify::packs::Checking;
use crate::verify::{self, Finding, Level, Needed};
use rebuild::Rebuild;

/// How to go about it.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Only say what is lost, and what would be done.
    pub dry_run: bool,
    /// How thoroughly packs are looked at.
    pub level: Level,
    /// Where two logs part at this entry: the one that was written first comes back, whatever the other one says.
    pub older_log: Option<u64>,
}

/// What became of the index.
#[derive(Debug, Default, Serialize)]
pub struct IndexReport {
    /// Parts of the index that are lost or damaged.
    pub damaged_runs: Vec<Finding>,
    /// Packs that they may have named: they are in the index again.
    pub rebuilt_packs: u64,
    /// Chunks in them.
    pub rebuilt_chunks: u64,
    /// Parts of the index that were withdrawn, or replaced by others without packs that are lost or damaged.
    pub withdrawn_runs: u64,
}

/// What was found and done.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Objects that were deleted or replaced in a bucket that still has them.
    pub hidden: Vec<Hidden>,
    /// The index.
    pub index: IndexReport,
    /// Packs that are lost or damaged: nothing relies on them from now on.
    pub gone_packs: Vec<String>,
    /// What was found, and what it means for each backup. Of WAL, nothing is said: `verify` looks at that.
    #[serde(flatten)]
    pub found: verify::Report,
}

impl Report {
    /// Nothing is wrong, and nothing was to be done.
    pub fn is_good(&self) -> bool {
        self.found.is_good()
            && self.hidden.is_empty()
            && self.index.damaged_runs.is_empty()
            && self.gone_packs.is_empty()
    }
}

/// Brings back what is hidden, unless that is only asked for, and adds it to `all`.
async fn back(found: Vec<Hidden>, dry_run: bool, all: &mut Vec<Hidden>) -> Result<()> {
    if !dry_run {
        return hidden::bring_back(found, all).await;
    }
    all.extend(found);
    Ok(())
}

/// Opens the stanza and reads its log to the end. What hides either is brought back, in the order in which a stanza is
/// opened, and added to `all`.
async fn open(access: &Access, options: Options, all: &mut Vec<Hidden>) -> Result<Log> {
    let dry_run = options.dry_run;
    let found = hidden::of_opening(access).await?;
    // Slots that were destroyed are not hidden.
    let is_note_false = erasure::check_repair(access, &found).await?;
    back(found, dry_run, all).await?;
    let lacks = all.iter().filter(|hidden| !hidden.brought_back);
    let names: Vec<&str> = lacks.map(|hidden| hidden.object.as_str()).collect();
    let opened = async {
        let stanza = Stanza::open(access).await?;
        // Not what this host remembers of it: a newer version may have taken over meanwhile.
        read_repository(&access.repository).await?;
        Ok::<_, Error>(stanza)
    };
    let stanza = opened.await.map_err(|error| match names.is_empty() {
        true => error,
        false => {
            // Where no slot can be seen, the note is all that is read.
            let error = match is_note_false && error.kind() == Kind::Refused {
                true => Error::refused(format!("key slots of stanza {} are hidden", access.stanza)),
                false => error,
            };
            error.remedy(format!(
                "`fairvault repair` without --dry-run brings back {}",
                names.join(", ")
            ))
        }
    })?;
    let mut log = Log::unread(stanza);
    let found = written::of_log(&mut log).await?;
    match (&found.fork, options.older_log) {
        (Some(fork), wanted) => {
            fork.decide(&log, wanted)?;
            if !dry_run {
                // First: it asks for keys that write, without which nothing is to be changed.
                fork.make_room(&mut log).await?;
            }
        }
        (None, Some(wanted)) => {
            return Err(Error::refused(format!(
                "{} has one log: no older one parts from it at entry {wanted}",
                log.stanza().shown()
            ))
            .remedy("run this without --older-log"));
        }
        (None, None) if dry_run && !found.hidden.is_empty() => log.check_seen()?,
        (None, None) => {}
    }
    back(found.hidden, dry_run, all).await?;
    log.mark_read();
    Ok(log)
}

/// Repairs the stanza that `access` opens. How it ended is in the log, as soon as that can be read.
pub async fn run(access: &Access, options: Options, progress: &Progress) -> Result<Report> {
    progress.phase("looking for what is hidden");
    let mut report = Report::default();
    let mut log = open(access, options, &mut report.hidden).await?;
    let began_us = log.stanza().env().now_us();
    let done = work(&mut log, options, &mut report, progress).await;
    if !options.dry_run {
        note(&mut log, began_us, &report, progress, done.as_ref().err()).await;
    }
    done?;
    Ok(report)
}

/// Repairs a stanza whose log was read to its end.
async fn work(log: &mut Log, options: Options, report: &mut Report, progress: &Progress) -> Result<()> {
    let content = hidden::of_content(log).await?;
    back(content, options.dry_run, &mut report.hidden).await?;
    let stanza = log.stanza().clone();
    stanza.check_reads("repairing")?;
    progress.phase("reading the log");
    let lease = Lease::for_reading(&stanza, "repair", "").await;
    let log_folder = format!("{}/", names::LOG);
    let is_hidden = report
        .hidden
        .iter()
        .any(|hidden| hidden.object.starts_with(&log_folder));
    let repaired = async {
        match options.dry_run && is_hidden {
            // What would come back was read; what can be seen is something else.
            true => {}
            false => *log = Log::replay(stanza.clone()).await?,
        }
        Work::begin(log, options).await?.run(progress).await
    };
    let repaired = repaired.await;
    if let Some(lease) = lease {
        lease.release().await;
    }
    let found = repaired?;
    *report = Report {
        hidden: std::mem::take(&mut report.hidden),
        ..found
    };
    Ok(())
}

/// Says in the log what was done, also by a repair that failed then.
async fn note(log: &mut Log, began_us: i64, report: &Report, progress: &Progress, error: Option<&Error>) {
    let seen = format!("{} objects can be seen again", report.hidden.len());
    let said = match (error, report.is_good()) {
        (Some(_), _) => seen,
        (None, true) => "nothing to do".to_owned(),
        (None, false) => format!(
            "{seen}, {} packs are in the index again, {} are gone",
            report.index.rebuilt_packs,
            report.gone_packs.len()
        ),
    };
    log.note_done("repair", began_us, progress.read_bytes.get(), said, error)
        .await;
}

/// The live runs: what can be read of them, and what not.
#[derive(Default)]
struct Runs {
    /// Packs that they name.
    named: BTreeSet<[u8; 32]>,
    /// Those that are lost or damaged.
    damaged: Vec<Finding>,
}

impl Runs {
    /// Reads them, one at a time.
    async fn read(log: &Log) -> Result<Self> {
        let mut this = Self::default();
        for hash in &log.state().index_runs {
            match read_run(log.stanza(), hash).await {
                Ok(run) => this.named.extend(run.packs.iter().map(|pack| pack.name)),
                Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => this.damaged.push(Finding {
                    object: format!("{}/{}", names::INDEX, hex::encode(hash)),
                    problem: error.to_string(),
                }),
                Err(error) => return Err(error),
            }
        }
        Ok(this)
    }
}

/// A session that repairs, and its lease.
struct Writer {
    session: Session,
    lease: Lease,
}

impl Writer {
    async fn begin(log: &mut Log) -> Result<Self> {
        let stanza = log.stanza().clone();
        let session = Session::begin(log, "repair", |state| timed_id(state, stanza.env(), 'R')).await?;
        match Lease::take(&stanza, session.id(), "repair", NO_BACKUP).await {
            Ok(lease) => Ok(Self { session, lease }),
            Err(error) => {
                session.abort(log, &error.to_string()).await?;
                Err(error)
            }
        }
    }

    async fn end(self, log: &mut Log, reason: &str) -> Result<()> {
        let ended = self.session.abort(log, reason).await;
        self.lease.release().await;
        ended
    }
}

struct Work<'a> {
    log: &'a mut Log,
    options: Options,
    runs: Runs,
    writer: Option<Writer>,
}

impl<'a> Work<'a> {
    async fn begin(log: &'a mut Log, options: Options) -> Result<Self> {
        let mut this = Self {
            runs: Runs::read(log).await?,
            log,
            options,
            writer: None,
        };
        if !this.runs.damaged.is_empty() && !options.dry_run {
            this.writer = Some(Writer::begin(this.log).await?);
            // What was live when the session began: from here on, a collector waits.
            this.runs = match Runs::read(this.log).await {
                Ok(runs) => runs,
                Err(error) => return Err(this.give_up(error).await),
            };
        }
        Ok(this)
    }

    async fn give_up(self, error: Error) -> Error {
        if let Some(writer) = self.writer
            && let Err(other) = writer.end(self.log, &error.to_string()).await
        {
            tracing::warn!("the end of this repair could not be noted; nothing is lost by it: {other}");
        }
        error
    }

    async fn run(mut self, progress: &Progress) -> Result<Report> {
        match self.repair(progress).await {
            Ok(report) => {
                if let Some(writer) = self.writer {
                    let reason = format!("{} packs are in the index again", report.index.rebuilt_packs);
                    writer.end(self.log, &reason).await?;
                }
                Ok(report)
            }
            Err(error) => Err(self.give_up(error).await),
        }
    }

    async fn repair(&mut self, progress: &Progress) -> Result<Report> {
        let mut report = Report::default();
        report.index.damaged_runs = std::mem::take(&mut self.runs.damaged);
        let is_incomplete = !report.index.damaged_runs.is_empty();
        progress.phase("reading manifests");
        let mut usage = Usage::default();
        // The log goes on while packs are read; verdicts are about what it says now.
        let backups = self.log.state().backups.clone();
        let needed = Needed::read(self.log, |manifest| usage.add_list(&manifest.usage)).await;
        let Needed { mut wanted, manifests } = needed;
        for manifest in &manifests {
            if let Err(error) = manifest
                && !matches!(error.kind(), Kind::Damaged | Kind::NotFound)
            {
                return Err(Error::new(error.kind(), error.to_string()).context("nothing was changed"));
            }
        }
        let lacking = match is_incomplete {
            true => self.lacking(&usage).await?,
            false => HashSet::new(),
        };
        wanted.add_packs(self.runs.named.clone());
        wanted.add_packs(lacking.iter().copied().collect());
        progress.total_bytes.set(wanted.bytes());
        progress.phase("looking at packs");
        let checking = Checking {
            stanza: &self.log.stanza().clone(),
            level: self.options.level,
            marks: !self.options.dry_run,
            progress,
        };
        let mut rebuild = Rebuild::default();
        let (log, writer) = (&mut *self.log, &mut self.writer);
        let checked = checking
            .run(&wanted, &mut report.found, async |pack, entries| {
                if !lacking.contains(&pack.name) {
                    return Ok(());
                }
                rebuild.add(pack, &entries);
                match writer {
                    Some(writer) if rebuild.is_full() => rebuild.announce(log, &mut writer.session).await,
                    Some(_) => Ok(()),
                    None => {
                        rebuild.forget();
                        Ok(())
                    }
                }
            })
            .await?;
        drop(wanted);
        if let Some(what) = checked.unsupported.first() {
            return Err(Error::new(Kind::Unsupported, what.clone())
                .remedy("repair with the version that wrote it, or a newer one"));
        }
        if let Some(writer) = &mut self.writer {
            rebuild.announce(self.log, &mut writer.session).await?;
        }
        report.index.rebuilt_packs = rebuild.packs;
        report.index.rebuilt_chunks = rebuild.chunks;
        let gone = self
            .still_wanted(checked.gone.iter().copied().collect(), &usage, &mut report)
            .await?;
        report.gone_packs = gone.iter().map(names::pack).collect();
        for (manifest, backup) in manifests.into_iter().zip(backups) {
            let mut verdict = verify::judge(self.log, &backup, manifest, &checked, &mut report.found).await;
            verdict.conclude();
            report.found.backups.push(verdict);
        }
        report.found.tidy();
        // What could not be read now may be what a damaged part named: that stays until it is known.
        if !self.options.dry_run && report.found.unread.is_empty() {
            progress.phase("mending the index");
            report.index.withdrawn_runs = self.withdraw(&gone.into_iter().collect()).await?;
        }
        Ok(report)
    }

    /// Of packs that are gone, those that a backup uses or a run names: the others were collected meanwhile.
    async fn still_wanted(
        &mut self,
        gone: BTreeSet<[u8; 32]>,
        usage: &Usage,
        report: &mut Report,
    ) -> Result<BTreeSet<[u8; 32]>> {
        if gone.is_empty() {
            return Ok(gone);
        }
        self.log.refresh().await?;
        let named = Runs::read(self.log).await?.named;
        let (wanted, collected): (BTreeSet<_>, BTreeSet<_>) = gone
            .into_iter()
            .partition(|pack| usage.uses(pack) || named.contains(pack));
        let collected: HashSet<String> = collected.iter().map(names::pack).collect();
        report
            .found
            .findings
            .retain(|finding| !collected.contains(&finding.object));
        Ok(wanted)
    }

    /// Packs that no run names any more, and that one of the damaged ones may have named. Only those that a backup uses:
    /// any other may have been marked once, and somebody may still be about to delete it. Not those that collection has
    /// left out on purpose either: ones that run dry.
    async fn lacking(&self, usage: &Usage) -> Result<HashSet<[u8; 32]>> {
        let stanza = self.log.stanza();
        let listed: Vec<_> = dedup::list_packs(stanza).await?.into_iter().collect();
        let bad = dedup::distrusted(stanza).await?;
        let marked = dedup::marked(self.log.state());
        let thin: HashSet<_> = usage.thin(&listed).into_iter().map(|(pack, _)| pack).collect();
        let packs = listed.into_iter().map(|(pack, _)| pack);
        let packs = packs.filter(|pack| {
            has_fault("repair marked") && !self.runs.named.contains(pack)
                || usage.uses(pack)
                    && !self.runs.named.contains(pack)
                    && !bad.contains(pack)
                    && !marked.contains(&pack[..])
                    && !thin.contains(pack)
        });
        Ok(packs.collect())
    }

    /// Withdraws runs that cannot be read, and puts others in the place of those that name packs that are gone: with an
    /// empty mark, since only the end of a mark withdraws. Returns how many.
    async fn withdraw(&mut self, gone: &HashSet<[u8; 32]>) -> Result<u64> {
        if self.writer.is_none() {
            let gone = gone.iter().map(|pack| (*pack, 0)).collect();
            if !runs::name_any(self.log, &gone).await? {
                return Ok(0);
            }
            self.writer = Some(Writer::begin(self.log).await?);
        }
        let session = self
            .writer
            .as_ref()
            .map(|writer| writer.session.id())
            .unwrap_or_default();
        // Runs of a session that was taken for dead may be gone.
        let still_open = |now: &proto::Snapshot| match state::is_open(now, &session) {
            true => Ok(()),
            false => Err(Error::new(
                Kind::Held,
                format!("this repair was stopped by a fence{}: run it again", by_whom(now)),
            )),
        };
        let mut open = None;
        loop {
            self.log.refresh().await?;
            still_open(self.log.state())?;
            let changes = runs::without(self.log, gone).await?;
            if changes.withdrawn.is_empty() {
                return Ok(0);
            }
            let is_open = |log: &Log, mark: u64| log.state().open_marks.iter().any(|open| open.seq == mark);
            let mark = match open {
                Some(mark) if is_open(self.log, mark) => mark,
                _ => {
                    let mark = Entry::GcMark(proto::GcMark::default());
                    self.log.append(mark, still_open).await?
                }
            };
            open = Some(mark);
            let swept = proto::GcSwept {
                mark,
                kept: Vec::new(),
                index_runs: changes.withdrawn.clone(),
                new_runs: changes.new,
                bytes: 0,
                roots: Vec::new(),
            };
            let withdrawn = &changes.withdrawn;
            let unchanged = |now: &proto::Snapshot| match still_open(now).is_ok()
                && are_live(withdrawn, now)
                && now.open_marks.iter().any(|open| open.seq == mark)
            {
                true => Ok(()),
                false => Err(Error::temporary("the log has grown")),
            };
            let seen = self.log.state().seq;
            match self.log.append(Entry::GcSwept(swept), unchanged).await {
                Ok(_) => return Ok(withdrawn.len() as u64),
                // A collector was at work: look again.
                Err(_) if self.log.state().seq > seen => {}
                Err(error) => return Err(error),
            }
        }
    }
}
