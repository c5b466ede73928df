//! Packs that a new backup would rely on although their locks end before it expires: it would be protected for less long
//! than it seems. Before anything is read, the locks of what the last backups use are asked for, and extended where
//! somebody may do that. What then ends too soon is not relied on: its content is stored again.
//!
//! What always holds: where locks count, a backup relies on no pack that was there before, unless it is known until when
//! that is locked, and that is not before the backup expires. What cannot be found out ends too soon. Where a new lock
//! would end too soon as well, the backup is refused. A lock lasts as long as the store has said, or as the bucket's
//! default says of what was stored while this host knew it. The oldest version counts, since nothing was ever
//! overwritten: whoever stores another one above it makes no lock longer.

use std::collections::{BTreeMap, HashSet};

use fairvault_format::names;
use fairvault_format::proto::{CommittedBackup, Snapshot};
use futures::StreamExt;

use super::extend::{CONCURRENT, Job, locking, one};
use super::seen::Seen;
use crate::commit::Log;
use crate::error::{Error, Kind, Result};
use crate::expire::clock;
use crate::expire::rules::days;
use crate::gc::usage;
use crate::restore::target::info;
use crate::stanza::Stanza;
use crate::store::Store;
use crate::store::versions::{Bucket, DAY_US};

type Pack = [u8; 32];

/// A backup may take so long at least, beyond what its locks were asked for.
const DURATION_US: i64 = DAY_US;
/// So many of the newest backups say how far apart they are.
const SPACES: usize = 6;

/// What to do where nothing is locked for long enough.
pub(super) const WAYS_OUT: &str = "let a `keeper` extend locks, or raise the bucket's default retention to twice of what is kept; \
                                   where `fairvault lock` runs elsewhere, and that is enough, set store_again = false for this \
                                   repository";

/// For how long the packs must be locked that a backup relies on.
#[derive(Debug, Clone)]
pub struct Reliance {
    /// How long backups are kept, seconds.
    pub kept_s: u64,
    /// How long WAL is kept, seconds: the newest backup before it stays as long.
    pub window_s: Option<u64>,
    /// The repository with credentials that may extend locks. Without, what is not locked for long enough is stored again.
    pub keeper: Option<Store>,
    /// What is locked for less long is not relied on. Otherwise only the keeper is asked to extend it.
    pub is_required: bool,
}

/// How long the signed policy keeps every backup, seconds.
pub fn minimum_s(state: &Snapshot) -> u64 {
    state.policy.as_ref().map_or(0, |policy| policy.minimum_retention_s)
}

/// Until when something must be locked that is stopped then, microseconds since 1970.
fn until_us(stopped_us: i64, kept_s: u64) -> i64 {
    let kept_us = i64::try_from(kept_s.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
    stopped_us.saturating_add(kept_us)
}

/// What is known of the locks that a backup, or a run of copies, would rely on.
#[derive(Debug, Default)]
pub struct Locks {
    /// Nothing, where locks do not count.
    counting: Option<Counting>,
    /// Packs that are not relied on.
    ending: HashSet<Pack>,
}

#[derive(Debug)]
struct Counting {
    reliance: Reliance,
    bucket: Bucket,
    began_us: i64,
    /// A backup counts as stopped then at least, microseconds since 1970.
    floor_us: i64,
    /// Until when `locked` are locked at least, microseconds since 1970.
    until_us: i64,
    locked: HashSet<Pack>,
}

impl Locks {
    /// Asks for the locks of what the last backups of `log` use, and has them extended where somebody may. An error says
    /// that nothing could be relied on.
    pub async fn of(log: &Log, reliance: Option<Reliance>, notes: &mut Vec<String>) -> Result<Self> {
        let Some(mut reliance) = reliance else {
            return Ok(Self::default());
        };
        let stanza = log.stanza();
        let began_us = stanza.env().now_us();
        let past = Past::of(log.state(), began_us);
        reliance.kept_s = reliance.kept_s.max(minimum_s(log.state()));
        if let Some(window_s) = reliance.window_s {
            reliance.kept_s = reliance.kept_s.max(window_s.saturating_add(past.space_s));
        }
        let until_us = past.until_us(began_us, reliance.kept_s);
        let used = used(log).await?;
        // Nobody can take back a lock: by a clock in doubt none is extended, as if the keeper had failed.
        let doubt = clock::check_for_locks(log, began_us).err().map(|doubt| {
            Error::refused(format!(
                "no locks are extended, and how long they must last is in doubt: {doubt}; if the clock is right, \
                 `fairvault lock --trust-clock --days N` extends them, on each day until backups of two days have come"
            ))
        });
        if doubt.is_some() {
            reliance.keeper = None;
        }
        let Some(mut found) = reliance
            // What came after the newest backup was left by one that did not end.
            .look(
                stanza,
                |pack, stored_us| used.contains(pack) || stored_us >= past.newest_us,
                until_us,
                notes,
            )
            .await?
        else {
            return Ok(Self::default());
        };
        if let Some(doubt) = doubt {
            notes.push(doubt.to_string());
            found.why.get_or_insert(doubt);
        }
        // What no backup uses any more is not relied on either, and nobody has to hear of that.
        let ending = found.ending.intersection(&used).count();
        if ending > 0 {
            let what = format!("{ending} packs that the last backups use");
            let what =
                format!("{what} are locked for less long than this backup is kept, or it is not known for how long");
            if reliance.is_required {
                reliance.may_store_again(&found, &what, until_us.saturating_sub(began_us))?;
            }
            notes.push(match reliance.is_required {
                true => format!("{what}: what it needs of them is stored again"),
                false => format!("{what} (`fairvault lock`)"),
            });
        }
        Ok(Self {
            ending: match reliance.is_required {
                true => found.ending,
                false => HashSet::new(),
            },
            counting: Some(Counting {
                reliance,
                bucket: found.bucket,
                began_us,
                floor_us: past.floor_us,
                until_us,
                locked: found.locked,
            }),
        })
    }

    /// Packs that are not to be relied on.
    pub fn ending(&self) -> &HashSet<Pack> {
        &self.ending
    }

    /// Asked before a backup counts, with the packs that it uses, and whether each was there before: fails if it relies on
    /// one of which it is not known that it is locked until the backup expires that ends now. Has the locks of what it
    /// stored itself extended, where they are too short and somebody may.
    pub async fn confirm(
        &self,
        log: &Log,
        packs: impl Iterator<Item = (Pack, bool)>,
        stopped_us: i64,
        notes: &mut Vec<String>,
    ) -> Result<()> {
        let Some(counting) = &self.counting else {
            return Ok(());
        };
        let stanza = log.stanza();
        // The policy may say more by now.
        let kept_s = counting.reliance.kept_s.max(minimum_s(log.state()));
        let until_us = until_us(stopped_us.max(counting.floor_us), kept_s);
        let is_late = until_us > counting.until_us;
        // What it stored itself is locked by the bucket's default, as that was when it began.
        let is_short = counting.bucket.locks_until(counting.began_us) < until_us;
        let (mut before, mut own) = (HashSet::new(), HashSet::new());
        for (pack, was_there) in packs {
            match was_there {
                true if is_late || !counting.locked.contains(&pack) => before.insert(pack),
                false if is_short => own.insert(pack),
                _ => false,
            };
        }
        if !before.is_empty() {
            let found = counting
                .reliance
                .look(stanza, |pack, _| before.contains(pack), until_us, notes)
                .await?;
            let is_locked = |pack: &Pack| found.as_ref().is_some_and(|found| found.locked.contains(pack));
            let ending = before.iter().filter(|pack| !is_locked(pack)).count();
            if ending > 0 && counting.reliance.is_required {
                let why = found.and_then(|found| found.why).map(|why| format!(" ({why})"));
                return Err(Error::refused(format!(
                    "{ending} packs that this backup relies on are locked for less long than it would be kept, or it is not known \
                     for how long: it does not count{}",
                    why.unwrap_or_default()
                ))
                .remedy("start it again: locks are asked for, and extended, when it begins (`fairvault check`)"));
            }
        }
        if !own.is_empty() {
            counting.extend_own(stanza, &own, until_us, notes).await;
        }
        Ok(())
    }
}

/// What the backups that there are say of the next one.
#[derive(Debug)]
pub(super) struct Past {
    /// When the newest one stopped, microseconds since 1970; 0 if there is none.
    newest_us: i64,
    /// The next one counts as stopped then at least: expiry takes none for older than those before it. What is far in the
    /// future says nothing.
    floor_us: i64,
    /// How long the next one may take, microseconds.
    duration_us: i64,
    /// How far the newest ones are apart at most, seconds.
    space_s: u64,
}

impl Past {
    pub fn of(state: &Snapshot, now_us: i64) -> Self {
        let all: Vec<_> = state.backups.iter().filter_map(|backup| backup.info.as_ref()).collect();
        let stopped = || all.iter().map(|info| info.stopped_us);
        let newest_us = stopped().max().unwrap_or(0);
        let took = all
            .iter()
            .map(|info| info.stopped_us.saturating_sub(info.started_us))
            .max();
        let mut times: Vec<i64> = stopped().filter(|time_us| *time_us < now_us).chain([now_us]).collect();
        times.sort_unstable_by(|a, b| b.cmp(a));
        let spaces = times
            .windows(2)
            .take(SPACES)
            .map(|pair| pair[0].saturating_sub(pair[1]));
        let space_us = spaces.max().unwrap_or(0).min(clock::QUIET_US);
        Self {
            newest_us,
            floor_us: newest_us.min(now_us.saturating_add(clock::QUIET_US)),
            duration_us: took.unwrap_or(0).saturating_mul(2).clamp(DURATION_US, clock::QUIET_US),
            space_s: u64::try_from(space_us / 1_000_000).unwrap_or(0),
        }
    }

    /// Until when the packs must be locked that a backup relies on which begins now, microseconds since 1970.
    pub fn until_us(&self, now_us: i64, kept_s: u64) -> i64 {
        until_us(now_us.max(self.floor_us), kept_s).saturating_add(self.duration_us)
    }
}

impl Counting {
    /// Extends the locks of what a backup has stored itself. That it cannot be done is said: it relies on nobody.
    async fn extend_own(&self, stanza: &Stanza, own: &HashSet<Pack>, until_us: i64, notes: &mut Vec<String>) {
        let mut why = match self.reliance.keeper {
            Some(_) => "they could not be extended",
            None => "nobody extends them here (`fairvault lock`)",
        };
        if let Some(keeper) = &self.reliance.keeper {
            match look_as(stanza, keeper, true, |pack, _| own.contains(pack), until_us).await {
                Ok(found) if own.iter().all(|pack| found.locked.contains(pack)) => return,
                Ok(_) => why = "the bucket does not list them",
                Err(error) => notes.push(format!(
                    "the locks of what this backup has stored were not extended: {error}"
                )),
            }
        }
        let locked_us = self.bucket.locks_until(0);
        notes.push(format!(
            "what this backup has stored is locked for {} d, and kept for {}: {why}",
            locked_us / DAY_US,
            days(self.reliance.kept_s)
        ));
    }
}

/// What came of asking for locks.
struct Found {
    bucket: Bucket,
    /// These last.
    locked: HashSet<Pack>,
    /// These do not, or it is not known.
    ending: HashSet<Pack>,
    /// Why they could not be extended, or asked for.
    why: Option<Error>,
}

impl Reliance {
    /// Looks for locks that last until then: first with the keeper, who extends those of `wanted`, then without. `None` if
    /// the bucket locks nothing.
    async fn look(
        &self,
        stanza: &Stanza,
        wanted: impl Fn(&Pack, i64) -> bool,
        until_us: i64,
        notes: &mut Vec<String>,
    ) -> Result<Option<Found>> {
        let mut why = None;
        if let Some(keeper) = &self.keeper {
            match look_as(stanza, keeper, true, &wanted, until_us).await {
                Ok(found) => return Ok(Some(found)),
                Err(error) => {
                    notes.push(format!(
                        "the locks of what the last backups use could not be extended (`keeper`): {error}"
                    ));
                    why = Some(error);
                }
            }
        }
        let asked = async {
            match stanza.store().bucket().await?.is_some_and(|bucket| bucket.lock) {
                true => look_as(stanza, stanza.store(), false, &wanted, until_us)
                    .await
                    .map(Some),
                false => Ok(None),
            }
        };
        match asked.await {
            Ok(found) => Ok(found.map(|found| Found {
                why: why.or(found.why),
                ..found
            })),
            Err(error) if error.kind() == Kind::Temporary => Err(error),
            Err(error) if self.is_required => Err(error
                .context("it is not known how long packs are locked that this backup would rely on")
                .remedy(
                    "allow s3:GetBucketVersioning, s3:GetBucketObjectLockConfiguration and s3:ListBucketVersions; or, if locks \
                     do not matter, set store_again = false for this repository",
                )),
            Err(error) => {
                notes.push(format!("it is not known how long packs are locked: {error}"));
                Ok(None)
            }
        }
    }

    /// Whether backups in this bucket are refused as soon as there is something to rely on.
    pub(super) fn refuses(&self, bucket: Bucket) -> bool {
        let kept_s = self.kept_s.max(self.window_s.unwrap_or(0));
        let lasting_us = until_us(DURATION_US, kept_s);
        self.is_required && self.keeper.is_none() && bucket.locks_until(0) <= lasting_us
    }

    /// Fails if it does not help to store again what is not locked for long enough: for `lasting_us` from now on.
    fn may_store_again(&self, found: &Found, what: &str, lasting_us: i64) -> Result<()> {
        if found.bucket.locks_until(0) > lasting_us {
            return Ok(());
        }
        let mut said = format!(
            "{what}. Backups are kept for {}, and what would be stored again is locked for {} d only",
            days(self.kept_s),
            found.bucket.locks_until(0) / DAY_US
        );
        let mut kind = Kind::Refused;
        if let Some(why) = &found.why {
            said += &format!(" ({why})");
            if why.kind() == Kind::Temporary {
                kind = Kind::Temporary;
            }
        }
        Err(Error::new(kind, said).remedy(WAYS_OUT))
    }
}

/// Looks at the locks of all packs, with the credentials of `role`, a repository or a stanza's folder. Of `wanted` (which is
/// told when one was stored, microseconds since 1970) it is asked for what is not known, and they are extended if `extends`; an error then says that this could not be done.
async fn look_as(
    stanza: &Stanza,
    role: &Store,
    extends: bool,
    wanted: impl Fn(&Pack, i64) -> bool,
    until_us: i64,
) -> Result<Found> {
    let bucket = locking(role).await?;
    let store = match extends {
        true => role.folder(stanza.name()),
        false => role.clone(),
    };
    let seen = Seen::load(stanza, bucket);
    let mut found = Found {
        bucket,
        locked: HashSet::new(),
        ending: HashSet::new(),
        why: None,
    };
    let (mut ends, mut failed) = (BTreeMap::new(), None);
    let folder = format!("{}/", names::PACKS);
    let mut listing = store.versions(&folder);
    while let Some(page) = listing.next().await? {
        let mut jobs = Vec::new();
        for object in page {
            let Some(pack) = names::parse_hash(&object.name) else {
                continue;
            };
            let version = object.contents().next();
            match version.map(|version| seen.end(bucket, &object.name, version)) {
                Some(end) if end >= until_us => _ = found.locked.insert(pack),
                Some(_) if failed.is_none() && version.is_some_and(|version| wanted(&pack, version.modified_us)) => {
                    jobs.push((pack, object));
                }
                _ => _ = found.ending.insert(pack),
            }
        }
        let each = jobs.into_iter().map(|(pack, object)| {
            let job = Job {
                store: store.clone(),
                object,
                until_us,
            };
            let (bucket, seen) = (bucket, &seen);
            async move { (pack, one(bucket, seen, job, !extends).await) }
        });
        let mut all = futures::stream::iter(each).buffer_unordered(CONCURRENT);
        while let Some((pack, done)) = all.next().await {
            match done {
                Ok(Some(done)) => {
                    let lasts = extends || !done.extended;
                    ends.extend(done.remember);
                    match lasts {
                        true => found.locked.insert(pack),
                        false => found.ending.insert(pack),
                    };
                }
                Ok(None) => _ = found.ending.insert(pack),
                Err(error) => {
                    found.ending.insert(pack);
                    failed.get_or_insert(error);
                }
            }
        }
    }
    seen.keep_also(stanza, ends);
    match failed {
        // Without the right to ask, what is not known is not relied on.
        Some(error) if !extends && error.kind() != Kind::Temporary => found.why = Some(error),
        Some(error) => return Err(error),
        None => {}
    }
    Ok(found)
}

/// The newest backup, and the newest full one: what a new one builds on.
pub(super) fn built_on(state: &Snapshot) -> impl Iterator<Item = &CommittedBackup> {
    let full = |backup: &&CommittedBackup| info(backup).r#type == "full";
    let of = [state.backups.last(), state.backups.iter().rev().find(full)];
    of.into_iter().flatten()
}

/// Packs that these use. A list that cannot be read makes more to be stored, and no error.
async fn used(log: &Log) -> Result<HashSet<Pack>> {
    let (mut packs, mut roots) = (HashSet::new(), HashSet::new());
    for backup in built_on(log.state()) {
        if !roots.insert(&backup.root) {
            continue;
        }
        match usage::read(log.stanza(), &backup.root).await {
            Ok(list) => packs.extend(list.packs.as_chunks::<32>().0),
            Err(error) if error.kind() == Kind::Temporary => return Err(error),
            Err(error) => tracing::warn!("it is not known what backup {} uses: {error}", info(backup).id),
        }
    }
    Ok(packs)
}
