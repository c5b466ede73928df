//! Is what tracking would have left out as it was? A backup reads everything, and compares it with the parent.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use super::map::BlockMap;
use super::range::{self, Range};
use super::selection::{Basis, id};
use crate::error::Result;
use crate::postgres::files::relation_file;
use crate::postgres::hints::mask;
use crate::postgres::{BLOCK_BYTES, BLOCKS_PER_SEGMENT};
use crate::replication::conninfo::ConnInfo;
use crate::restore::data::read_frame;
use crate::source::{Chunk, Wanted};
use crate::stanza::Stanza;
use crate::wal::archive::Archive;

const BLOCK: usize = BLOCK_BYTES as usize;
/// Frames of the parent that are held: at most 512 KiB each.
const FRAMES: usize = 64;

/// A block that changed, and of which the block map knows nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Missed {
    /// File.
    pub path: String,
    /// Block in the file.
    pub block: u32,
}

/// An audit under way.
pub struct Audit {
    basis: Arc<Basis>,
    stanza: Arc<Stanza>,
    runtime: tokio::runtime::Handle,
    /// What of each file would have been read.
    predicted: Mutex<HashMap<String, Wanted>>,
    missed: Mutex<Vec<Missed>>,
    /// The last ones that were fetched, the newest first.
    frames: Mutex<VecDeque<(u32, Arc<Vec<u8>>)>>,
}

impl Audit {
    /// Begins one; to be called where the store can be asked.
    pub fn new(stanza: Arc<Stanza>, basis: Arc<Basis>) -> Self {
        Self {
            basis,
            stanza,
            runtime: tokio::runtime::Handle::current(),
            predicted: Mutex::default(),
            missed: Mutex::default(),
            frames: Mutex::default(),
        }
    }

    /// Bytes that may have to be fetched: what the parent has of main forks, if each frame is fetched once.
    pub fn to_fetch(&self) -> u64 {
        self.basis.stored_bytes()
    }

    /// What of a file tracking would have read.
    pub fn predict(&self, path: &str, wanted: Wanted) {
        let mut predicted = self.predicted.lock().unwrap_or_else(PoisonError::into_inner);
        predicted.insert(path.to_owned(), wanted);
    }

    /// Compares what tracking would have left out of a chunk with the parent. Blocks.
    pub fn check(&self, chunk: &Chunk) -> Result<()> {
        let predicted = {
            let predicted = self.predicted.lock().unwrap_or_else(PoisonError::into_inner);
            predicted.get(&*chunk.path).cloned()
        };
        let Some(Wanted::Blocks(ranges)) = predicted else {
            return Ok(());
        };
        let mut missed = Vec::new();
        let mut rest = &chunk.bytes[..];
        for run in &chunk.runs {
            let (content, behind) = rest.split_at(run.len as usize);
            rest = behind;
            let end = run.offset + u64::from(run.len);
            for kept in self.basis.kept_within(&chunk.path, run.offset..end, &ranges) {
                let before = self.frame(kept.frame)?;
                let (at, inside) = ((kept.file_offset - run.offset) as usize, kept.frame_offset as usize);
                let len = kept.len as usize;
                let now = content[at..at + len].as_chunks::<BLOCK>().0;
                let before = before[inside..inside + len].as_chunks::<BLOCK>().0;
                let first = (kept.file_offset / u64::from(BLOCK_BYTES)) as u32;
                for (block, (now, before)) in (first..).zip(now.iter().zip(before)) {
                    if now != before && !means_the_same(now, before) {
                        missed.push(Missed {
                            path: chunk.path.to_string(),
                            block,
                        });
                    }
                }
            }
        }
        self.missed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(missed);
        Ok(())
    }

    /// A frame of the parent. Files that were changed often lie in parts of several, in turn.
    fn frame(&self, number: u32) -> Result<Arc<Vec<u8>>> {
        let frames = || self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, content)) = frames().iter().find(|(other, _)| *other == number) {
            return Ok(content.clone());
        }
        let frame = &self.basis.manifest.frames[number as usize];
        let pack = &self.basis.manifest.packs[frame.pack as usize];
        let content = Arc::new(self.runtime.block_on(read_frame(&self.stanza, pack, frame))?);
        let mut frames = frames();
        frames.truncate(FRAMES - 1);
        frames.push_front((number, content.clone()));
        Ok(content)
    }

    /// What tracking has missed, in order. What the WAL of this backup, `during`, changed says nothing: the page was read
    /// at some moment of it, perhaps in the middle of a write, and recovery brings it to where it must be.
    pub async fn finish(&self, archive: &Archive, server: &ConnInfo, during: Range) -> Vec<Missed> {
        let mut missed = std::mem::take(&mut *self.missed.lock().unwrap_or_else(PoisonError::into_inner));
        if missed.is_empty() {
            return missed;
        }
        missed.sort();
        let map = range::changes(archive, server, &[], during).await;
        if let Some(why) = map.unknown() {
            tracing::warn!("blocks that differ may have changed during the backup, which is not known: {why}");
            return missed;
        }
        missed.retain(|missed| !has_changed(&map, missed));
        missed
    }
}

fn has_changed(map: &BlockMap, missed: &Missed) -> bool {
    relation_file(&missed.path).is_some_and(|relation| {
        let block = relation
            .segment
            .saturating_mul(BLOCKS_PER_SEGMENT)
            .saturating_add(missed.block);
        map.has(id(&relation), block)
    })
}

fn means_the_same(one: &[u8; BLOCK], two: &[u8; BLOCK]) -> bool {
    let (mut one, mut two) = (*one, *two);
    mask(&mut one);
    mask(&mut two);
    one == two
}
