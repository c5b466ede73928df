//! The segment that is being received: what of it is held, and what of it is stored.

use tokio::time::Instant;

use super::runs::Runs;
use crate::postgres::segment::Segment;
use crate::wal::archive::Archive;
use crate::wal::fetch::Piece;
use crate::wal::known::Known;
use crate::wal::summary::Summarizer;

/// Pieces of about one size after which one takes their place.
const MERGE_PIECES: usize = 32;

/// A piece, and how many generations of pieces it took the place of.
pub struct Held {
    /// Which.
    pub piece: Piece,
    /// How many generations it took the place of.
    pub generation: u8,
    /// It is there: not only on its way.
    pub is_stored: bool,
}

/// The segment that is being received.
pub struct Current {
    /// Which.
    pub segment: Segment,
    /// Bytes from `base` on.
    pub buffer: Runs,
    /// Offset in the segment of the buffer's first byte.
    pub base: usize,
    /// Offset up to which it is stored or being stored.
    pub stored: usize,
    /// What was stored by an earlier run; `None` while that is being found out.
    pub known: Option<Known>,
    /// Since when something waits.
    pub waiting_since: Option<Instant>,
    /// What is stored of it, or on its way, in the order of their ranges.
    pub pieces: Vec<Held>,
    /// Of what was received.
    pub summary: Summarizer,
    /// Of the whole segment.
    pub hash: blake3::Hasher,
}

impl Current {
    /// Nothing of it yet.
    pub fn new(archive: &Archive, segment: Segment) -> Self {
        Self {
            segment,
            buffer: Runs::default(),
            base: 0,
            stored: 0,
            known: None,
            waiting_since: None,
            pieces: Vec::new(),
            summary: Summarizer::new(segment.start(archive.segment_size), archive.segment_size),
            hash: blake3::Hasher::new_keyed(&archive.stanza.keys().id_key),
        }
    }

    /// What an earlier run stored of it.
    pub fn know(&mut self, mut known: Known) {
        self.stored = known.end;
        let pieces = std::mem::take(&mut known.pieces);
        self.pieces = pieces
            .into_iter()
            .map(|piece| Held {
                piece,
                generation: 0,
                is_stored: true,
            })
            .collect();
        self.known = Some(known);
    }

    /// Offset up to which it was received.
    pub fn received(&self) -> usize {
        self.base + self.buffer.len()
    }

    /// The repository has all of it.
    pub fn is_known_whole(&self) -> bool {
        self.known.as_ref().is_some_and(|known| known.is_whole)
    }
}

/// How many of the last pieces are to be replaced by one, and its generation: a run of one generation, and
/// the run before it if that makes one more of its own.
pub fn many(pieces: &[Held]) -> (usize, u8) {
    let (mut count, mut generation) = (0, 0);
    loop {
        let rest = pieces.iter().rev().skip(count);
        let run = rest.take_while(|held| held.generation == generation).count();
        if run + usize::from(count > 0) < MERGE_PIECES {
            return (count, generation);
        }
        count += run;
        generation += 1;
    }
}
