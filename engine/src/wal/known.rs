//! What the repository has of a segment, compared with what the server sends as it arrives.
//!
//! Contents are compared by their ids, so that nothing that is stored has to be fetched.

use fairvault_format::proto::WalHeader;

use crate::error::{Error, Kind, Result};
use crate::postgres::segment::Segment;
use crate::stanza::Stanza;
use crate::wal::archive::Archive;
use crate::wal::fetch::Piece;

/// A range whose content must come again.
struct Expected {
    start: usize,
    end: usize,
    id: Vec<u8>,
    hasher: blake3::Hasher,
}

/// What is stored of one segment.
#[derive(Default)]
pub struct Known {
    /// Not yet compared.
    expected: Vec<Expected>,
    /// Offset up to which it is stored without a hole.
    pub end: usize,
    /// It is stored as a whole.
    pub is_whole: bool,
    /// Its pieces, in the order of their ranges.
    pub pieces: Vec<Piece>,
}

impl Known {
    /// Whatever is stored of a segment.
    pub async fn of(archive: &Archive, segment: Segment) -> Result<Self> {
        match archive.segment_stored(segment).await? {
            Some((epoch, header)) => Self::whole(archive, epoch, &header),
            None => Self::pieces(archive, segment).await,
        }
    }

    /// Looks at a segment's pieces.
    pub async fn pieces(archive: &Archive, segment: Segment) -> Result<Self> {
        let base = segment.start(archive.segment_size).0;
        let mut this = Self::default();
        for piece in archive.piece_list(segment).await? {
            let (start, end) = ((piece.start - base) as usize, (piece.end - base) as usize);
            // Behind a hole, and what another piece has already, is of no use.
            if start > this.end || end <= this.end {
                continue;
            }
            let header = archive.piece_header(&piece).await.map_err(|error| match error.kind() {
                // Something took its place, or the segment is complete: the next attempt sees that.
                Kind::NotFound => Error::temporary(error.to_string()),
                _ => error,
            })?;
            this.expected
                .push(Expected::new(&archive.stanza, start..end, header.0, &header.1)?);
            this.end = end;
            this.pieces.push(piece);
        }
        Ok(this)
    }

    /// A segment that is stored as a whole.
    pub fn whole(archive: &Archive, epoch: u32, header: &WalHeader) -> Result<Self> {
        let end = archive.segment_size as usize;
        Ok(Self {
            expected: vec![Expected::new(&archive.stanza, 0..end, epoch, header)?],
            end,
            is_whole: true,
            pieces: Vec::new(),
        })
    }

    /// Whether everything that is stored has been compared.
    pub fn is_compared(&self) -> bool {
        self.expected.is_empty()
    }

    /// Compares the next bytes, which begin at offset `at`; fails with the range that differs.
    pub fn compare(&mut self, at: usize, bytes: &[u8]) -> std::result::Result<(), (usize, usize)> {
        let until = at + bytes.len();
        for range in &mut self.expected {
            let (from, to) = (range.start.max(at), range.end.min(until));
            if from < to {
                range.hasher.update(&bytes[from - at..to - at]);
            }
            if range.end <= until && range.hasher.finalize().as_bytes()[..] != range.id {
                return Err((range.start, range.end));
            }
        }
        self.expected.retain(|range| range.end > until);
        Ok(())
    }
}

impl Expected {
    fn new(stanza: &Stanza, range: std::ops::Range<usize>, epoch: u32, header: &WalHeader) -> Result<Self> {
        if header.content_len != range.len() as u64 {
            return Err(Error::damaged(format!(
                "an object of {} says that it holds {} bytes, and its name {}",
                header.name,
                header.content_len,
                range.len()
            )));
        }
        Ok(Self {
            start: range.start,
            end: range.end,
            id: header.content_id.clone(),
            hasher: blake3::Hasher::new_keyed(&stanza.keys_of(epoch)?.id_key),
        })
    }
}
