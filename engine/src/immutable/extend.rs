//! Locks that last as long as what they protect is needed.
//!
//! A bucket's default retention counts from the upload. Backups share packs, so a new backup may rely on packs whose
//! locks end long before it expires; and keys and log are needed for as long as there is a backup. Here their locks are
//! extended. Locks are never shortened, so none is extended by a clock that is in doubt. What the log is told of it is locked
//! with the rest.

use std::collections::BTreeMap;

use fairvault_format::proto::CommittedBackup;
use fairvault_format::{limits, names};
use futures::{StreamExt, TryStreamExt};
use serde::Serialize;

use super::kept_for;
use super::needs::Needs;
use super::reliance;
use super::seen::{self, Seen};
use crate::commit::Log;
use crate::error::{Error, Result};
use crate::expire::clock;
use crate::expire::rules::Retention;
use crate::gc::{Count, SNAPSHOTS};
use crate::progress::Progress;
use crate::restore::target::info;
use crate::store::Store;
use crate::store::versions::{Bucket, DAY_US, Lock, Mode, Object};

/// What is needed is locked for so many days at least, whatever the retention says: as long as it is not run again.
const LEAST_DAYS: i64 = 7;
/// A lock is extended by so many days more than needed, so that not every run has to do it again.
const MORE_DAYS: i64 = 7;
/// The next backups come within so many days, as a rule.
const NEXT_DAYS: i64 = 2;
/// Objects at once.
pub(super) const CONCURRENT: usize = 16;

/// How to go about it.
#[derive(Debug, Clone)]
pub struct Options {
    /// What is kept.
    pub retention: Retention,
    /// Lock everything that is needed for so many days from now on, whatever the retention says.
    pub days: Option<u32>,
    /// Only say what would be done.
    pub dry_run: bool,
    /// The clock of this host is right, although the log makes it seem far ahead or behind.
    pub trust_clock: bool,
}

/// What was done, or would be.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Objects that are needed.
    pub needed: Count,
    /// Of these, those whose locks were extended.
    pub extended: Count,
    /// When the first of the needed locks ends now that is known, seconds since 1970.
    pub locked_until_s: Option<i64>,
    /// Requests about single objects.
    pub requests: u64,
    /// Needed objects that cannot be seen: the right version is locked, and `repair` brings it back.
    pub hidden: Vec<String>,
    /// Manifests that are lost: what else they need is not locked.
    pub lost: Vec<String>,
}

/// One object, and what its lock is to be.
pub(super) struct Job {
    pub store: Store,
    pub object: Object,
    pub until_us: i64,
}

/// Extends the locks of what the stanza of `log` and its backups need. `repository` is where the stanza lies.
/// If locks were extended, that is noted in what `noted` opens: the same log, for somebody who may write to it.
pub async fn run(
    log: &Log,
    repository: &Store,
    noted: impl AsyncFnOnce() -> Option<Log>,
    options: &Options,
    progress: &Progress,
) -> Result<Report> {
    let bucket = locking(repository).await?;
    progress.phase("reading the log");
    let log = Log::replay(log.stanza().clone()).await?;
    let minimum_s = log
        .state()
        .policy
        .as_ref()
        .map_or(0, |policy| policy.minimum_retention_s);
    let now = log.stanza().env().now_us();
    if !options.trust_clock {
        clock::check_for_locks(&log, now)?;
    }
    let least = now + LEAST_DAYS * DAY_US;
    let kept_us = match (options.days, kept_for(&options.retention, minimum_s)) {
        (Some(_), _) => None,
        (None, Some(kept_s)) => Some(i64::try_from(kept_s.saturating_mul(1_000_000)).unwrap_or(i64::MAX)),
        (None, None) => {
            return Err(Error::usage(
                "the retention of this stanza gives no age, so it is not known how long locks must last",
            )
            .remedy("say it with --days N: everything that is needed is locked for N days from now on"));
        }
    };
    // The next backups build on these, and need them for as long as they will be kept.
    let built_on: Vec<&Vec<u8>> = reliance::built_on(log.state()).map(|backup| &backup.root).collect();
    let next = kept_for(&options.retention, minimum_s).map_or(0, |kept_s| {
        let until_us = reliance::Past::of(log.state(), now).until_us(now, kept_s);
        until_us.saturating_add(NEXT_DAYS * DAY_US)
    });
    let until = |backup: &CommittedBackup| match (options.days, kept_us) {
        (Some(days), _) => now.saturating_add(DAY_US.saturating_mul(days.into())),
        // What comes from the future is of now.
        (None, kept) => {
            let own = info(backup)
                .stopped_us
                .min(now)
                .saturating_add(kept.unwrap_or_default());
            let next = if built_on.contains(&&backup.root) { next } else { 0 };
            own.max(least).max(next)
        }
    };
    let least = options
        .days
        .map_or(least, |days| now.saturating_add(DAY_US.saturating_mul(days.into())));
    let needs = Needs::of(&log, least, until).await?;

    progress.phase("extending locks");
    let stanza = log.stanza().store();
    let snapshots = stanza.list(names::SNAPSHOTS).await?;
    let newest: Vec<&String> = snapshots.iter().rev().take(SNAPSHOTS).map(|(name, _)| name).collect();
    let known = Seen::load(log.stanza(), bucket);
    let mut found = BTreeMap::new();
    let mut report = Report {
        lost: needs.lost_roots.clone(),
        ..Default::default()
    };
    let folders = [
        (repository, names::REPOSITORY.to_owned()),
        (stanza, format!("{}/", names::KEYS)),
        (stanza, format!("{}/", names::LOG)),
        (stanza, format!("{}/", names::SNAPSHOTS)),
        (stanza, format!("{}/", names::ROOTS)),
        (stanza, format!("{}/", names::INDEX)),
        (stanza, format!("{}/", names::PACKS)),
        (stanza, format!("{}/", names::WAL)),
    ];
    let work = async {
        for (store, prefix) in folders {
            let mut listing = store.versions(&prefix);
            while let Some(page) = listing.next().await? {
                let jobs = page.into_iter().filter_map(|object| {
                    let name = object.name.as_str();
                    let until_us = match name == names::REPOSITORY || newest.iter().any(|snapshot| *snapshot == name) {
                        true => Some(needs.last()),
                        // What is hidden of pieces is what a segment has replaced, as a rule.
                        false if name.contains(".d/") && !object.is_visible() => None,
                        false => needs.until(name),
                    };
                    Some(Job {
                        store: store.clone(),
                        until_us: until_us?,
                        object,
                    })
                });
                extend(bucket, &known, jobs.collect(), options.dry_run, &mut report, &mut found).await?;
            }
        }
        Ok::<_, Error>(())
    };
    let done = work.await;
    let noted = match !options.dry_run && report.extended.objects > 0 {
        true => noted().await,
        false => None,
    };
    let written = match noted {
        Some(mut noted) => note(&mut noted, now, &report, done.as_ref().err()).await,
        None => Vec::new(),
    };
    done?;
    for prefix in written {
        let mut listing = stanza.versions(&prefix);
        while let Some(page) = listing.next().await? {
            let jobs = page.into_iter().map(|object| Job {
                store: stanza.clone(),
                object,
                until_us: needs.last(),
            });
            extend(bucket, &known, jobs.collect(), false, &mut report, &mut found).await?;
        }
    }
    if !options.dry_run {
        known.keep(log.stanza(), found);
    }
    Ok(report)
}

/// Says in the log what was extended. Returns how the names of what was stored for that begin: it needs locks as well.
async fn note(log: &mut Log, began_us: i64, report: &Report, error: Option<&Error>) -> Vec<String> {
    let extended = report.extended;
    let said = format!("{}{} objects extended", clock::EXTENDED, extended.objects);
    let Some(seq) = log.note_done("lock", began_us, extended.bytes, said, error).await else {
        return Vec::new();
    };
    let mut written = vec![names::log_context(seq)];
    if seq.is_multiple_of(limits::SNAPSHOT_INTERVAL) {
        written.push(format!("{}/{:020}-", names::SNAPSHOTS, seq - 1));
    }
    written
}

/// The bucket, if it can lock objects.
pub(super) async fn locking(repository: &Store) -> Result<Bucket> {
    match repository.bucket().await? {
        Some(bucket) if bucket.lock => Ok(bucket),
        Some(_) => Err(
            Error::refused(format!("the bucket of {} locks no objects", repository.shown()))
                .remedy("object lock is switched on when a bucket is made: see immutability in the documentation"),
        ),
        None => Err(Error::refused(format!("{} locks no objects", repository.shown()))
            .remedy("that is known of S3 buckets only: see immutability in the documentation")),
    }
}

/// What came out of one job: bytes, whether its lock was extended, requests, and when it ends.
pub(super) struct Done {
    /// What is to be remembered of its lock.
    pub remember: Option<(String, i64)>,
    bytes: u64,
    /// It was too short.
    pub extended: bool,
    requests: u64,
    until_us: i64,
    hidden: Option<String>,
}

async fn extend(
    bucket: Bucket,
    seen: &Seen,
    jobs: Vec<Job>,
    dry_run: bool,
    report: &mut Report,
    found: &mut BTreeMap<String, i64>,
) -> Result<()> {
    let each = jobs.into_iter().map(|job| one(bucket, seen, job, dry_run));
    let mut all = futures::stream::iter(each).buffer_unordered(CONCURRENT);
    while let Some(done) = all.try_next().await? {
        let Some(done) = done else { continue };
        report.needed.add(done.bytes);
        if done.extended {
            report.extended.add(done.bytes);
        }
        report.requests += done.requests;
        report.hidden.extend(done.hidden);
        found.extend(done.remember);
        let until_s = done.until_us / 1_000_000;
        report.locked_until_s = Some(report.locked_until_s.map_or(until_s, |first| first.min(until_s)));
    }
    Ok(())
}

/// Looks at one object, and extends its lock: that of the oldest version, since nothing was ever overwritten.
pub(super) async fn one(bucket: Bucket, seen: &Seen, job: Job, dry_run: bool) -> Result<Option<Done>> {
    let Some(version) = job.object.contents().next() else {
        return Ok(None);
    };
    let name = &job.object.name;
    let mut done = Done {
        remember: seen.known(name, version),
        bytes: version.size,
        extended: false,
        requests: 0,
        until_us: seen.end(bucket, name, version),
        hidden: (!job.object.is_visible()).then(|| name.clone()),
    };
    if done.until_us >= job.until_us {
        return Ok(Some(done));
    }
    done.requests += 1;
    let is = job.store.lock_of(name, &version.id).await?;
    done.until_us = is.map_or(0, |lock| lock.until_us);
    done.remember = is.and_then(|lock| seen::to_remember(name, version, lock));
    if done.until_us >= job.until_us {
        return Ok(Some(done));
    }
    let lock = Lock {
        mode: is
            .map(|lock| lock.mode)
            .or(bucket.default.map(|(mode, _)| mode))
            .unwrap_or(Mode::Compliance),
        until_us: job.until_us.saturating_add(MORE_DAYS * DAY_US),
    };
    if !dry_run {
        done.requests += 1;
        job.store.set_lock(name, &version.id, lock).await?;
        done.remember = seen::to_remember(name, version, lock);
    }
    done.extended = true;
    done.until_us = lock.until_us;
    Ok(Some(done))
}
