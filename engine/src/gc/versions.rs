//! Deleting for good, in a bucket that keeps versions.
//!
//! What collection deletes stays there as older versions below a delete marker. Here these versions go, as far as they
//! are not locked. What always holds: a version goes only if its object cannot be seen, and if it is known that
//! collection has deleted it: a sweep in the log says so, it is of a kind that nothing relies on, or something whole
//! has taken its place. That something is hidden says nothing: whoever wants to harm puts a delete marker above what is
//! needed. The marker goes last: the version below it would be seen again.
//!
//! Of two collectors at one mark, one may keep for a reader what the other, who has seen none, deletes a moment later and
//! cannot say any more: the mark has ended. No listing shows it, so no mark would ever name it again. Therefore what the last
//! sweep has left, and what cannot be seen and is needed by no backup, is marked once more. Then a sweep decides as always:
//! for a reader who lives it is kept once more, whoever has hidden it.

use std::collections::{HashMap, HashSet};

use fairvault_format::names;
use fairvault_format::proto::{GcMark, LogEntry, log_entry::Kind as Entry};
use futures::{StreamExt, TryStreamExt};
use serde::Serialize;

use super::history::Past;
use super::sweep::{self, hashes};
use super::usage::Usage;
use super::wal::Expired;
use super::{Count, MARK_PACKS, Options, Report, SNAPSHOTS};
use crate::commit::Log;
use crate::error::{Error, Result};
use crate::immutable::pieces::{Pieces, Settled};
use crate::progress::Progress;
use crate::store::Store;
use crate::store::versions::{Bucket, Deleted, Object, Version};

/// Objects at once.
const CONCURRENT: usize = 16;

/// What became of versions.
#[derive(Debug, Clone, Default, Serialize, PartialEq, Eq)]
pub struct Versions {
    /// Deleted for good.
    pub deleted: Count,
    /// Still locked: a later run deletes them.
    pub locked: Count,
    /// When the last of these locks ends, seconds since 1970.
    pub locked_until_s: Option<i64>,
}

impl Versions {
    fn lock(&mut self, size: u64, until_us: i64) {
        self.locked.add(size);
        self.locked_until_s = self.locked_until_s.max(Some(until_us / 1_000_000));
    }

    fn add(&mut self, other: &Self) {
        for (mine, theirs) in [(&mut self.deleted, other.deleted), (&mut self.locked, other.locked)] {
            mine.objects += theirs.objects;
            mine.bytes += theirs.bytes;
        }
        self.locked_until_s = self.locked_until_s.max(other.locked_until_s);
    }
}

/// What sweeps have deleted, by the log: about as much memory as for packs that are there.
#[derive(Debug, Default)]
struct Swept {
    packs: HashSet<[u8; 32]>,
    roots: HashSet<[u8; 32]>,
    runs: HashSet<[u8; 32]>,
    left: Left,
}

/// What the last sweep that could have deleted it has not, as far as it says.
#[derive(Debug, Default)]
struct Left {
    packs: HashSet<[u8; 32]>,
    roots: HashSet<[u8; 32]>,
}

impl Left {
    /// Those of some objects in a folder that cannot be seen: somebody has deleted or hidden them since.
    fn unseen(&self, folder: &str, objects: &[Object]) -> Vec<Vec<u8>> {
        let left = match folder {
            names::PACKS => &self.packs,
            names::ROOTS => &self.roots,
            _ => return Vec::new(),
        };
        let unseen = objects.iter().filter(|object| !object.is_visible());
        let named = unseen.filter_map(|object| names::parse_hash(&object.name));
        named
            .filter(|hash| left.contains(hash))
            .map(|hash| hash.to_vec())
            .collect()
    }
}

impl Swept {
    /// From a log that was replayed with all of its entries.
    fn of(log: &Log) -> Self {
        // What old keys or fenced hosts say was never swept.
        let valid = log.entries().iter().filter(|entry| !log.is_void(entry.seq));
        Self::by(valid, &log.state().open_marks)
    }

    /// By entries that count. Of what several marks named, the last sweep says whether it is gone: what was marked again
    /// was seen again. A root that no sweep says it has deleted is kept, as those are that earlier versions have swept: a
    /// reader may hold it.
    fn by<'a>(entries: impl Iterator<Item = &'a LogEntry>, open_marks: &[GcMark]) -> Self {
        let mut this = Self::default();
        let mut marks = HashMap::new();
        for entry in entries {
            match &entry.kind {
                Some(Entry::GcMark(mark)) => _ = marks.insert(entry.seq, mark),
                Some(Entry::GcSwept(swept)) => {
                    if let Some(mark) = marks.remove(&swept.mark) {
                        let left = &mut this.left;
                        this.packs.extend(hashes(&mark.packs));
                        hashes(&mark.packs).for_each(|pack| _ = left.packs.remove(&pack));
                        hashes(&swept.kept).for_each(|pack| _ = this.packs.remove(&pack));
                        left.packs.extend(hashes(&swept.kept));
                        hashes(&mark.roots).for_each(|root| _ = this.roots.remove(&root));
                        left.roots.extend(hashes(&mark.roots));
                        hashes(&swept.roots).for_each(|root| _ = left.roots.remove(&root));
                        this.roots.extend(hashes(&swept.roots));
                        // Those that it did not delete are live, or were withdrawn since.
                        this.runs.extend(hashes(&mark.index_runs));
                    }
                    this.runs.extend(hashes(&swept.index_runs));
                }
                _ => {}
            }
        }
        // What is marked again is somebody else's.
        for open in open_marks {
            for pack in hashes(&open.packs) {
                this.packs.remove(&pack);
                this.left.packs.remove(&pack);
            }
            for root in hashes(&open.roots) {
                this.roots.remove(&root);
                this.left.roots.remove(&root);
            }
            hashes(&open.index_runs).for_each(|run| _ = this.runs.remove(&run));
        }
        this
    }

    /// Without what is needed.
    fn without(&mut self, past: &Past, usage: &Usage) {
        for packs in [&mut self.packs, &mut self.left.packs] {
            packs.retain(|pack| !usage.uses(pack));
        }
        for backup in past.needed() {
            for root in hashes([&backup.root]) {
                self.roots.remove(&root);
                self.left.roots.remove(&root);
            }
        }
    }
}

/// Deletes versions of what was deleted, and counts those that are locked.
pub async fn purge(
    log: &mut Log,
    expired: &Expired,
    options: &Options,
    report: &mut Report,
    progress: &Progress,
) -> Result<()> {
    let stanza = log.stanza().clone();
    let store = stanza.store();
    let bucket = store.bucket_or_plain().await?;
    // Not where versioning is suspended: whatever is stored then has the same id as the marker that it takes the place of.
    if !bucket.versioning {
        return Ok(());
    }
    progress.phase("deleting old versions");
    // All entries, before it is looked at what is needed: what is swept later than that is for another run.
    let mut swept = Swept::of(&Log::replay(stanza.clone()).await?);
    log.refresh().await?;
    let (past, usage) = Usage::of_needed(log).await?;
    swept.without(&past, &usage);
    hashes(&log.state().index_runs).for_each(|run| _ = swept.runs.remove(&run));
    drop(usage);
    let snapshots = store.list(names::SNAPSHOTS).await?;
    let oldest_kept = snapshots.iter().rev().nth(SNAPSHOTS - 1).map(|(name, _)| name.clone());

    let purge = Purge {
        store,
        bucket,
        now_us: stanza.env().now_us(),
        dry_run: options.dry_run,
    };
    let mut again = GcMark::default();
    let out = report.versions.insert(Versions::default());
    for folder in [
        names::PACKS,
        names::ROOTS,
        names::INDEX,
        names::SNAPSHOTS,
        names::LEASES,
    ] {
        let mut listing = store.versions(&format!("{folder}/"));
        while let Some(page) = listing.next().await? {
            let is_swept = |swept: &HashSet<[u8; 32]>, name: &str| {
                names::parse_hash(name).is_some_and(|hash| swept.contains(&hash))
            };
            let is_old = |object: &Object| match folder {
                names::PACKS => is_swept(&swept.packs, &object.name),
                names::ROOTS => is_swept(&swept.roots, &object.name),
                names::INDEX => is_swept(&swept.runs, &object.name),
                names::SNAPSHOTS => oldest_kept.as_ref().is_some_and(|kept| object.name < *kept),
                _ => true,
            };
            match folder {
                names::PACKS => again.packs.extend(swept.left.unseen(folder, &page)),
                _ => again.roots.extend(swept.left.unseen(folder, &page)),
            }
            let is_lease = folder == names::LEASES;
            let mut old: Vec<Object> = page.into_iter().filter(is_old).collect();
            // Of a lease that somebody holds, the heartbeats before the last one.
            if is_lease {
                old.iter_mut()
                    .filter(|object| object.is_visible())
                    .for_each(|lease| _ = lease.versions.remove(0));
            } else {
                old.retain(|object| !object.is_visible());
            }
            out.add(&purge.all(old).await?);
        }
    }
    let (mut pieces, mut settled) = (Pieces::new(&stanza), Settled::default());
    let mut listing = store.versions(&format!("{}/", names::WAL));
    while let Some(page) = listing.next().await? {
        for object in page {
            match expired.has(&object.name) {
                true if object.is_visible() => {}
                true => settled.replaced.push(object),
                false => _ = pieces.next(object, &mut settled).await?,
            }
        }
        settled.needed.clear();
        out.add(&purge.all(std::mem::take(&mut settled.replaced)).await?);
    }
    pieces.settle(&mut settled).await?;
    out.add(&purge.all(settled.replaced).await?);
    // Where somebody is waited for, no sweep would come to its end: the next run marks that.
    match options.dry_run || !report.waiting.is_empty() {
        true => Ok(()),
        false => mark_again(log, again, options, report).await,
    }
}

/// Marks and sweeps what is gone, and no sweep says of it that it is. Its versions are for a later run.
async fn mark_again(log: &mut Log, mut again: GcMark, options: &Options, report: &mut Report) -> Result<()> {
    again.packs.truncate(MARK_PACKS);
    again.roots.truncate(MARK_PACKS);
    if again.packs.is_empty() && again.roots.is_empty() {
        return Ok(());
    }
    let seq = log.append(Entry::GcMark(again), |_| Ok(())).await?;
    let mut open = log.state().open_marks.iter();
    // If somebody has to be waited for, that is said, and the mark stays open.
    match open.find(|mark| mark.seq == seq).cloned() {
        Some(mark) => sweep::run(log, &mark, options, report).await.map(|_| ()),
        None => Ok(()),
    }
}

struct Purge<'a> {
    store: &'a Store,
    bucket: Bucket,
    now_us: i64,
    dry_run: bool,
}

impl Purge<'_> {
    async fn all(&self, objects: Vec<Object>) -> Result<Versions> {
        let each = objects.into_iter().map(|object| self.one(object));
        futures::stream::iter(each)
            .buffer_unordered(CONCURRENT)
            .try_fold(Versions::default(), async |mut sum, one| {
                sum.add(&one);
                Ok(sum)
            })
            .await
    }

    async fn one(&self, object: Object) -> Result<Versions> {
        let mut out = Versions::default();
        for version in object.contents() {
            let until = self.bucket.locks_until(version.modified_us);
            if until > self.now_us {
                out.lock(version.size, until);
                continue;
            }
            match self.delete(&object, version).await? {
                None => out.deleted.add(version.size),
                Some(until) => out.lock(version.size, until),
            }
        }
        if out.locked.objects == 0 {
            for marker in object.versions.iter().filter(|version| version.is_marker) {
                self.delete(&object, marker).await?;
            }
        }
        Ok(out)
    }

    /// `Some`: until when it is locked.
    async fn delete(&self, object: &Object, version: &Version) -> Result<Option<i64>> {
        if self.dry_run {
            return Ok(None);
        }
        let why = match self.store.delete_version(&object.name, &version.id).await? {
            Deleted::Gone => return Ok(None),
            Deleted::Refused(why) => why,
        };
        let lock = match version.is_marker {
            true => None,
            false => self.store.lock_of(&object.name, &version.id).await?,
        };
        match lock.filter(|lock| lock.until_us > self.now_us) {
            Some(lock) => Ok(Some(lock.until_us)),
            None => Err(Error::failed(format!(
                "a version of {}/{} is not locked, and the store refuses to delete it: {why}",
                self.store.shown(),
                object.name
            ))
            .remedy("the credentials need the right s3:DeleteObjectVersion, or the version is under a legal hold")),
        }
    }
}

#[cfg(test)]
mod tests {
    use fairvault_format::proto::GcSwept;

    use super::*;

    fn list(numbers: &[u8]) -> Vec<Vec<u8>> {
        numbers.iter().map(|number| vec![*number; 32]).collect()
    }

    fn mark(seq: u64, packs: &[u8], roots: &[u8]) -> LogEntry {
        let mark = GcMark {
            packs: list(packs),
            roots: list(roots),
            ..Default::default()
        };
        LogEntry {
            seq,
            kind: Some(Entry::GcMark(mark)),
            ..Default::default()
        }
    }

    fn swept(mark: u64, kept: &[u8], roots: &[u8]) -> LogEntry {
        let swept = GcSwept {
            mark,
            kept: list(kept),
            roots: list(roots),
            ..Default::default()
        };
        LogEntry {
            seq: mark + 1,
            kind: Some(Entry::GcSwept(swept)),
            ..Default::default()
        }
    }

    fn of(entries: &[LogEntry]) -> (Vec<u8>, Vec<u8>) {
        let swept = Swept::by(entries.iter(), &[]);
        let sorted = |set: &HashSet<[u8; 32]>| {
            let mut all: Vec<u8> = set.iter().map(|hash| hash[0]).collect();
            all.sort_unstable();
            all
        };
        (sorted(&swept.packs), sorted(&swept.roots))
    }

    #[test]
    fn only_what_a_sweep_says_it_has_deleted_is_gone() {
        let first = [mark(1, &[1, 2], &[3, 4]), swept(1, &[2], &[4])];
        assert_eq!(of(&first), (vec![1], vec![4]), "what readers hold is kept");
        // The reader has gone.
        let second = [mark(3, &[2], &[3]), swept(3, &[], &[3])];
        let all = [&first[..], &second[..]].concat();
        assert_eq!(of(&all), (vec![1, 2], vec![3, 4]));
        // What was deleted was brought back, marked again, and kept for a reader.
        let third = [mark(5, &[1], &[4]), swept(5, &[1], &[])];
        assert_eq!(of(&[&all[..], &third[..]].concat()), (vec![2], vec![3]));
    }

    #[test]
    fn roots_of_sweeps_that_do_not_name_them_are_kept() {
        let entries = [mark(1, &[1], &[3]), swept(1, &[], &[])];
        assert_eq!(of(&entries), (vec![1], Vec::new()));
        // A second end of the mark says nothing.
        let again = [&entries[..], &[swept(1, &[], &[3])]].concat();
        assert_eq!(of(&again), (vec![1], Vec::new()));
    }

    #[test]
    fn what_is_marked_again_is_not_gone() {
        let entries = [mark(1, &[1, 2], &[3, 4]), swept(1, &[2], &[3])];
        let open = GcMark {
            packs: list(&[1, 2]),
            roots: list(&[3, 4]),
            ..Default::default()
        };
        let swept = Swept::by(entries.iter(), &[open]);
        assert!(swept.packs.is_empty() && swept.roots.is_empty());
        assert!(swept.left.packs.is_empty() && swept.left.roots.is_empty());
    }

    fn object(folder: &str, number: u8, markers: &[bool]) -> Object {
        let name = match folder {
            names::PACKS => names::pack(&[number; 32]),
            _ => names::root(&[number; 32]),
        };
        let version = |is_marker: &bool| Version {
            id: "1".to_owned(),
            is_marker: *is_marker,
            modified_us: 0,
            size: 1,
            etag: String::new(),
        };
        Object {
            name,
            versions: markers.iter().map(version).collect(),
        }
    }

    #[test]
    fn what_a_sweep_has_left_and_nobody_sees_is_for_the_next_one() {
        // A sweep has kept a pack and a manifest for a reader; another one, of the same mark, has deleted them.
        let first = [mark(1, &[1, 2], &[3, 4]), swept(1, &[2], &[4])];
        let unseen = |entries: &[LogEntry], folder: &str, markers: &[bool]| {
            let left = Swept::by(entries.iter(), &[]).left;
            let objects: Vec<Object> = (1..=4).map(|number| object(folder, number, markers)).collect();
            left.unseen(folder, &objects)
        };
        let deleted = [true, false];
        assert_eq!(unseen(&first, names::PACKS, &deleted), list(&[2]));
        assert_eq!(unseen(&first, names::ROOTS, &deleted), list(&[3]));
        // What can be seen is marked as it always is.
        assert!(unseen(&first, names::PACKS, &[false]).is_empty());
        assert!(unseen(&first, names::ROOTS, &[false]).is_empty());
        // The next sweep says that they are gone: there is nothing left.
        let second = [&first[..], &[mark(3, &[2], &[3]), swept(3, &[], &[3])]].concat();
        assert_eq!(of(&second), (vec![1, 2], vec![3, 4]));
        for folder in [names::PACKS, names::ROOTS, names::INDEX] {
            assert!(unseen(&second, folder, &deleted).is_empty(), "{folder}");
        }
        // Or a reader still holds them.
        let second = [&first[..], &[mark(3, &[2], &[3]), swept(3, &[2], &[])]].concat();
        assert_eq!(of(&second), (vec![1], vec![4]));
        assert_eq!(unseen(&second, names::ROOTS, &deleted), list(&[3]));
    }
}
