//! Which chunk of one repository is which of another, whose keys make other ids of the same content: learnt from backups
//! that both have, so that what is known is not fetched again.
//!
//! What always holds: two chunks are twins if manifests of the same backup have them in the same place of segments that
//! describe the same files, and only then; what the target holds under old keys is not built on.

use std::collections::{HashMap, HashSet};

use fairvault_format::proto::CommittedBackup;
use futures::StreamExt;

use crate::error::{Error, Kind, Result};
use crate::manifest::Outline;
use crate::stanza::Stanza;

/// Segments that are read at once.
const SEGMENTS: usize = 4;

type Id = [u8; 32];

/// Ids of the source, and what they are in the target.
#[derive(Debug, Default)]
pub struct Twins {
    known: HashMap<Id, Id>,
    /// Roots of the source that were learnt.
    learnt: HashSet<Vec<u8>>,
}

impl Twins {
    /// The chunk's id in the target.
    pub fn get(&self, id: &Id) -> Option<&Id> {
        self.known.get(id)
    }

    /// Adds what a copy has come to; `root` is its original's.
    pub fn add(&mut self, root: &[u8], pairs: impl IntoIterator<Item = (Id, Id)>) {
        self.known.extend(pairs);
        self.learnt.insert(root.to_vec());
    }

    /// Learns from a backup that both repositories have, segment by segment: no manifest is ever held. What cannot be
    /// read costs what it would have saved.
    pub async fn learn(
        &mut self,
        (source, original): (&Stanza, &CommittedBackup),
        (target, copy): (&Stanza, &CommittedBackup),
    ) -> Result<()> {
        if !self.learnt.insert(original.root.clone()) {
            return Ok(());
        }
        match self.compare(source, &original.root, target, &copy.root).await {
            Err(error) if error.kind() != Kind::Temporary => {
                tracing::warn!("what both repositories have of a backup is not known, and is fetched again: {error}");
                Ok(())
            }
            other => other,
        }
    }

    async fn compare(&mut self, source: &Stanza, original: &[u8], target: &Stanza, copy: &[u8]) -> Result<()> {
        let (one, two) = tokio::try_join!(Outline::read(source, original), Outline::read(target, copy))?;
        let differ = || Error::damaged(format!("{} and {} do not describe the same files", one.what, two.what));
        if one.segments() != two.segments() {
            return Err(differ());
        }
        let reading = (0..one.segments())
            .map(async |number| tokio::try_join!(one.segment(source, number), two.segment(target, number)));
        let mut reading = futures::stream::iter(reading).buffered(SEGMENTS);
        while let Some(segments) = reading.next().await {
            let (a, b) = segments?;
            let (here, there) = (one.frames_of(&a)?, two.frames_of(&b)?);
            let lengths_differ = || here.iter().zip(&there).any(|(a, b)| a.plain_len != b.plain_len);
            if a.files != b.files || here.len() != there.len() || lengths_differ() {
                return Err(differ());
            }
            let twins = here.iter().zip(&there);
            let newest = twins.filter(|(_, b)| two.packs[b.pack as usize].header.epoch == target.keys().epoch);
            self.known.extend(newest.map(|(a, b)| (a.id, b.id)));
        }
        Ok(())
    }
}
