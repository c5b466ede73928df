//! Index runs from the directories of packs, announced one after the other.

use fairvault_format::header::HEADER_LEN;
use fairvault_format::index::{IndexEntry, IndexRun, PackRef};
use fairvault_format::pack::DirectoryEntry;

use crate::commit::Log;
use crate::commit::session::Session;
use crate::dedup::store_run;
use crate::error::Result;

/// Entries after which a run is stored: 12 MiB.
const RUN_ENTRIES: usize = 1 << 18;
/// Packs after which a run is stored.
const RUN_PACKS: usize = 1 << 12;

/// The run that is being made.
#[derive(Debug, Default)]
pub struct Rebuild {
    run: IndexRun,
    /// Packs so far, of all runs.
    pub packs: u64,
    /// Chunks so far, of all runs.
    pub chunks: u64,
}

impl Rebuild {
    /// Adds what a pack holds.
    pub fn add(&mut self, pack: PackRef, directory: &[DirectoryEntry]) {
        self.packs += 1;
        self.chunks += directory.len() as u64;
        let number = self.run.packs.len() as u32;
        self.run.packs.push(pack);
        // A pack has at most 64 MiB.
        let mut offset = HEADER_LEN as u32;
        for (ordinal, frame) in directory.iter().enumerate() {
            self.run.entries.push(IndexEntry {
                id: frame.id,
                pack: number,
                ordinal: ordinal as u32,
                offset,
                stored_len: frame.stored_len,
            });
            offset += frame.stored_len;
        }
    }

    /// Whether it is to be stored before more is added.
    pub fn is_full(&self) -> bool {
        self.run.entries.len() >= RUN_ENTRIES || self.run.packs.len() >= RUN_PACKS
    }

    /// Only what was counted matters: nothing is to be stored.
    pub fn forget(&mut self) {
        self.run = IndexRun::default();
    }

    /// Stores what was added since, and makes it known: also if this process dies then.
    pub async fn announce(&mut self, log: &mut Log, session: &mut Session) -> Result<()> {
        if self.run.packs.is_empty() {
            return Ok(());
        }
        let hash = store_run(log.stanza(), std::mem::take(&mut self.run)).await?;
        session.announce(log, hash).await
    }
}

#[cfg(test)]
mod tests {
    use fairvault_format::header::{Kind, ObjectHeader};

    use super::*;

    #[test]
    fn frames_lie_one_behind_the_other() {
        let pack = |n: u8| PackRef {
            name: [n; 32],
            header: ObjectHeader::new(Kind::Pack, 1, [n; 32]),
        };
        let frame = |id: u8, stored_len| DirectoryEntry {
            id: [id; 32],
            stored_len,
            plain_len: 1,
        };
        let mut rebuild = Rebuild::default();
        rebuild.add(pack(1), &[frame(1, 100), frame(2, 50), frame(3, 7)]);
        rebuild.add(pack(2), &[frame(4, 9)]);
        let found: Vec<_> = rebuild
            .run
            .entries
            .iter()
            .map(|e| (e.id[0], e.pack, e.ordinal, e.offset))
            .collect();
        assert_eq!(found, [(1, 0, 0, 80), (2, 0, 1, 180), (3, 0, 2, 230), (4, 1, 0, 80)]);
        assert_eq!((rebuild.packs, rebuild.chunks), (2, 4));
        assert!(!rebuild.is_full());
    }
}
