//! What a backup has to read of each file, given its parent and what changed since.
//!
//! What always holds: of a file that is not read as a whole, each block is read or is in the parent as it was when this
//! backup began. Files that are not main forks of relations are always read.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use fairvault_format::proto::{self, FileKind};

use super::audit::Audit;
use super::map::{BlockMap, Changes, RelationId};
use crate::error::{Error, Result};
use crate::manifest::{Manifest, Placement};
use crate::postgres::files::{Fork, RelationFile, relation_file};
use crate::postgres::lsn::Lsn;
use crate::postgres::{BLOCK_BYTES, BLOCKS_PER_SEGMENT};
use crate::source::Wanted;

/// A frame of which less than this part is still used is not relied on any more: its rest is read again.
const LEAST_USED: u64 = 4;
/// What a backup may read again for that: this part of the cluster, and at least some MiB.
const REWRITE_PART: u64 = 32;
const REWRITE_BYTES: u64 = 64 << 20;

/// A parent, and what changed since.
pub struct Basis {
    /// Facts of the parent.
    pub parent: proto::BackupInfo,
    /// Its manifest.
    pub manifest: Manifest,
    /// What WAL changed from the parent's start to `start`.
    map: BlockMap,
    /// Where this backup starts.
    start: Lsn,
    files: HashMap<String, u32>,
    /// Placements of each file: from here up to the next.
    placed: Vec<u32>,
    /// Blocks that must be read again whether they changed or not, by file.
    again: HashMap<u32, Changes>,
}

impl Basis {
    /// A parent whose changes are known. `is_good` says of each of its packs whether it may be relied on.
    pub fn new(
        parent: proto::BackupInfo,
        manifest: Manifest,
        map: BlockMap,
        start: Lsn,
        is_good: impl Fn(u32) -> bool,
    ) -> Self {
        let files = manifest.files.iter().enumerate();
        let files = files.map(|(number, file)| (file.path.clone(), number as u32)).collect();
        let mut placed = vec![0; manifest.files.len() + 1];
        for placement in &manifest.placements {
            placed[placement.file as usize + 1] += 1;
        }
        for number in 1..placed.len() {
            placed[number] += placed[number - 1];
        }
        let mut this = Self {
            parent,
            manifest,
            map,
            start,
            files,
            placed,
            again: HashMap::new(),
        };
        this.distrust(is_good);
        this
    }

    /// What must be read again: what lies in packs that are gone or damaged, pages that were damaged when the parent
    /// read them, and the rests of frames that are hardly used any more.
    fn distrust(&mut self, is_good: impl Fn(u32) -> bool) {
        let Self { manifest, again, .. } = self;
        let mut used = vec![0u64; manifest.frames.len()];
        for placement in &manifest.placements {
            used[placement.frame as usize] += u64::from(placement.len);
        }
        let mut budget = (self.parent.plain_bytes / REWRITE_PART).max(REWRITE_BYTES);
        let thin = manifest.frames.iter().zip(used).map(|(frame, used)| {
            // What is read again anyway takes nothing of the budget.
            let is_thin = is_good(frame.pack) && used * LEAST_USED < u64::from(frame.plain_len) && used <= budget;
            budget -= if is_thin { used } else { 0 };
            is_thin
        });
        let is_thin: Vec<bool> = thin.collect();
        for placement in &manifest.placements {
            let frame = &manifest.frames[placement.frame as usize];
            if is_thin[placement.frame as usize] || !is_good(frame.pack) {
                let blocks = again.entry(placement.file).or_default();
                let first = placement.file_offset / u64::from(BLOCK_BYTES);
                let end = (placement.file_offset + u64::from(placement.len)).div_ceil(u64::from(BLOCK_BYTES));
                (first..end).for_each(|block| blocks.add(block as u32));
            }
        }
        for failure in &manifest.root.page_failures {
            if let Some(&file) = self.files.get(&failure.path) {
                again.entry(file).or_default().add(failure.block);
            }
        }
    }

    /// What of a file is to be read that now has `size` bytes.
    fn wanted(&self, path: &str, size: u64) -> Wanted {
        self.blocks(path, size)
            .map_or(Wanted::All, |ranges| Wanted::Blocks(ranges.into()))
    }

    /// `None`: all of it.
    fn blocks(&self, path: &str, size: u64) -> Option<Vec<Range<u32>>> {
        let block = u64::from(BLOCK_BYTES);
        let relation = relation_file(path).filter(|relation| relation.fork == Fork::Main)?;
        let &number = self.files.get(path)?;
        let before = &self.manifest.files[number as usize];
        let is_usable = before.kind() == FileKind::FileRegular
            && size.is_multiple_of(block)
            && before.size.is_multiple_of(block)
            && size <= block * u64::from(BLOCKS_PER_SEGMENT);
        if !is_usable || size == 0 || self.map.unknown().is_some() || self.map.has_database(id(&relation)) {
            return None;
        }
        let first = relation.segment.checked_mul(BLOCKS_PER_SEGMENT)?;
        let count = (size / block) as u32;
        // Blocks that have no number are none of a relation.
        first.checked_add(count)?;
        // From where the parent's file ended, and from where the relation was cut, all blocks are read.
        let mut known = count.min((before.size / block) as u32);
        let changes = self.map.changes(id(&relation));
        if let Some(limit) = changes.and_then(Changes::limit) {
            known = known.min(limit.saturating_sub(first));
        }
        let mut ranges: Vec<Range<u32>> = Vec::new();
        let mut add = |from: u32, to: u32| match ranges.last_mut() {
            Some(last) if from <= last.end => last.end = last.end.max(to),
            _ => ranges.push(from..to),
        };
        let changed = changes
            .into_iter()
            .flat_map(|c| c.blocks(first, first + known).map(|at| at - first));
        let again = self.again.get(&number).into_iter().flat_map(|c| c.blocks(0, known));
        let mut blocks: Vec<u32> = changed.chain(again).collect();
        blocks.sort_unstable();
        blocks.into_iter().for_each(|at| add(at, at + 1));
        if known < count {
            add(known, count);
        }
        // What is nearly whole is better off in whole chunks, which other backups share.
        let wanted: u64 = ranges.iter().map(|range| range.len() as u64).sum();
        (wanted * 10 < u64::from(count) * 9).then_some(ranges)
    }

    /// The parent's content of a file outside of `wanted`: offset, length and offset in the chunk of each part, with
    /// the number of its frame.
    pub fn kept(&self, path: &str, size: u64, wanted: &[Range<u32>]) -> Vec<Placement> {
        let Some(&number) = self.files.get(path) else {
            return Vec::new();
        };
        let block = u64::from(BLOCK_BYTES);
        let (from, to) = (self.placed[number as usize], self.placed[number as usize + 1]);
        let mut kept = Vec::new();
        for placement in &self.manifest.placements[from as usize..to as usize] {
            let end = size.min(placement.file_offset + u64::from(placement.len));
            let mut at = placement.file_offset;
            let mut keep = |from: u64, to: u64| {
                if from < to {
                    kept.push(Placement {
                        file_offset: from,
                        len: (to - from) as u32,
                        frame_offset: placement.frame_offset + (from - placement.file_offset) as u32,
                        ..*placement
                    });
                }
            };
            let next = wanted.partition_point(|range| u64::from(range.end) * block <= at);
            for range in &wanted[next..] {
                let (from, to) = (u64::from(range.start) * block, u64::from(range.end) * block);
                if from >= end {
                    break;
                }
                keep(at, from);
                at = at.max(to);
            }
            keep(at, end);
        }
        kept
    }

    /// The same for a part of the file.
    pub fn kept_within(&self, path: &str, part: Range<u64>, wanted: &[Range<u32>]) -> Vec<Placement> {
        let mut kept = self.kept(path, part.end, wanted);
        kept.retain(|p| p.file_offset + u64::from(p.len) > part.start);
        for p in &mut kept {
            let before = part.start.saturating_sub(p.file_offset);
            p.file_offset += before;
            p.frame_offset += before as u32;
            p.len -= before as u32;
        }
        kept
    }

    /// The parent's file, if nothing of it is read again.
    pub fn unchanged(&self, path: &str, size: u64, wanted: &Wanted) -> Option<&proto::FileEntry> {
        let file = &self.manifest.files[*self.files.get(path)? as usize];
        (wanted.bytes(size) == 0 && file.size == size && *wanted != Wanted::All).then_some(file)
    }

    /// Versions of the parsers that a backup on it relies on.
    pub fn parser_versions(&self) -> Vec<u32> {
        let mut versions = self.parent.parser_versions.clone();
        versions.push(super::PARSER_VERSION);
        versions.extend(self.map.parsers());
        versions.sort_unstable();
        versions.dedup();
        versions
    }

    /// What the parent has stored of main forks, bytes.
    pub fn stored_bytes(&self) -> u64 {
        let Manifest {
            files,
            frames,
            placements,
            ..
        } = &self.manifest;
        let is_main = |path: &str| relation_file(path).is_some_and(|relation| relation.fork == Fork::Main);
        let used = placements.iter().filter(|p| is_main(&files[p.file as usize].path));
        let used: std::collections::HashSet<u32> = used.map(|p| p.frame).collect();
        used.iter()
            .map(|&frame| u64::from(frames[frame as usize].stored_len))
            .sum()
    }

    /// Fails if a page is newer than the map says: then the map is wrong, and nothing that was left out can be trusted.
    /// `block` counts from the beginning of the relation. A file that the parent does not have inherits nothing; it may
    /// be a copy of another one, pages and all, that is being made.
    pub fn check_page(&self, path: &str, relation: &RelationFile, block: u32, page: &[u8]) -> Result<()> {
        let Some(&[a, b, c, d, e, f, g, h]) = page.first_chunk::<8>() else {
            return Ok(());
        };
        // pd_lsn: the high half first.
        let high = u64::from(u32::from_le_bytes([a, b, c, d]));
        let lsn = Lsn(high << 32 | u64::from(u32::from_le_bytes([e, f, g, h])));
        // It is the end of the record that changed the page.
        let is_new = lsn > Lsn(self.parent.start_lsn) && lsn <= self.start;
        let is_tracked = relation.fork == Fork::Main && is_new && !self.map.has(id(relation), block);
        if !is_tracked || !self.files.contains_key(path) {
            return Ok(());
        }
        Err(Error::damaged(format!(
            "ALARM: block {block} of relation {}/{}/{} was changed at {lsn}, and the WAL since backup {} does not name it",
            relation.tablespace, relation.database, relation.relation, self.parent.id
        ))
        .remedy("no incremental backup of this cluster can be trusted: take one with --type full, and report this"))
    }
}

pub(super) fn id(relation: &RelationFile) -> RelationId {
    RelationId {
        tablespace: relation.tablespace,
        database: relation.database,
        relation: relation.relation,
    }
}

/// What a source asks about each file.
#[derive(Clone, Default)]
pub struct Selection {
    /// Without one, everything is read.
    pub basis: Option<Arc<Basis>>,
    /// Everything is read, and what would have been left out is compared.
    pub audit: Option<Arc<Audit>>,
}

impl Selection {
    /// What of a file is to be read that now has `size` bytes.
    pub fn of(&self, path: &str, size: u64) -> Wanted {
        let Some(basis) = &self.basis else {
            return Wanted::All;
        };
        let wanted = basis.wanted(path, size);
        match &self.audit {
            None => wanted,
            Some(audit) => {
                audit.predict(path, wanted);
                Wanted::All
            }
        }
    }
}
