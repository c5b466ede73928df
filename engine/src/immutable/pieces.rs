//! Hidden pieces of WAL: which of them are needed, and which ones something whole has replaced.
//!
//! A receiver deletes pieces once their segment, or a longer piece, is there. So a piece that is hidden is needed only
//! if neither the segment nor other pieces have its bytes.

use fairvault_format::header::{Kind as ObjectKind, ObjectHeader};
use fairvault_format::{names, wal};

use crate::error::{Error, Kind, Result};
use crate::stanza::Stanza;
use crate::store::versions::Object;

/// What is read of a segment at first.
const HEADER_GUESS: u64 = 64 << 10;

/// Hidden pieces of one segment.
#[derive(Debug, Default)]
pub struct Settled {
    /// Nothing else has their bytes; and such as can be seen, and have other versions.
    pub needed: Vec<Object>,
    /// Something else has.
    pub replaced: Vec<Object>,
}

/// Goes through a listing of WAL, in which a segment's object comes before its pieces.
pub struct Pieces<'a> {
    stanza: &'a Stanza,
    /// `wal/…/<segment>` of what follows.
    segment: String,
    /// Objects of that name that can be seen.
    whole: Vec<String>,
    pieces: Vec<Object>,
}

impl<'a> Pieces<'a> {
    /// Before the first object.
    pub fn new(stanza: &'a Stanza) -> Self {
        Self {
            stanza,
            segment: String::new(),
            whole: Vec::new(),
            pieces: Vec::new(),
        }
    }

    /// Takes the next object of the listing, and returns it if it is none of pieces. `out` gets what is known by now.
    pub async fn next(&mut self, object: Object, out: &mut Settled) -> Result<Option<Object>> {
        let (file, is_piece) = match object.name.rsplit_once(".d/") {
            Some((segment, _)) => (segment.to_owned(), true),
            None => (object.name.split('.').next().unwrap_or_default().to_owned(), false),
        };
        if file != self.segment {
            self.settle(out).await?;
            self.segment = file;
        }
        if is_piece {
            self.pieces.push(object);
            return Ok(None);
        }
        if object.is_visible() {
            self.whole.push(object.name.clone());
        }
        Ok(Some(object))
    }

    /// Behind the last object, or behind all of a segment.
    pub async fn settle(&mut self, out: &mut Settled) -> Result<()> {
        let (whole, pieces) = (std::mem::take(&mut self.whole), std::mem::take(&mut self.pieces));
        let (seen, mut hidden): (Vec<_>, Vec<_>) = pieces.into_iter().partition(Object::is_visible);
        if !hidden.is_empty() {
            let mut complete = Vec::new();
            for name in whole {
                if is_genuine(self.stanza, ObjectKind::WalSegment, &name).await? {
                    complete.push(name);
                }
            }
            let is_whole = |piece: &Object| {
                let epoch = piece.name.rsplit_once('.').map_or("", |(_, epoch)| epoch);
                complete.contains(&format!("{}.{epoch}", self.segment))
            };
            let (replaced, rest): (Vec<_>, Vec<_>) = hidden.into_iter().partition(is_whole);
            out.replaced.extend(replaced);
            hidden = rest;
        }
        if !hidden.is_empty() {
            let mut known = Vec::new();
            for piece in &seen {
                if is_genuine(self.stanza, ObjectKind::WalPiece, &piece.name).await? {
                    known.extend(range(piece));
                }
            }
            known.sort_unstable();
            let is_covered = |piece: &Object| range(piece).is_some_and(|range| covers(&known, range));
            let (replaced, rest): (Vec<_>, Vec<_>) = hidden.into_iter().partition(is_covered);
            out.replaced.extend(replaced);
            out.needed.extend(rest);
        }
        out.needed
            .extend(seen.into_iter().filter(|piece| piece.versions.len() > 1));
        Ok(())
    }
}

/// Whether an object is what its name says, and of this stanza: a segment may also be a seal of pieces. It is opened, which
/// proves that it is this object: whoever asks lets go of what it stands for.
pub async fn is_genuine(stanza: &Stanza, kind: ObjectKind, name: &str) -> Result<bool> {
    let store = stanza.store();
    let scope = stanza.scope();
    let opened = async {
        let mut bytes = store.get_range(name, 0..HEADER_GUESS).await?;
        let header = ObjectHeader::decode(&bytes, name)?;
        if header.kind != kind {
            return Ok(false);
        }
        let keys = stanza.keys_of(header.epoch)?;
        let need = wal::header_len(keys, scope, kind, &bytes, name)?;
        if need > bytes.len() {
            bytes = store.get_range(name, 0..need as u64).await?;
        }
        wal::open_header(keys, scope, kind, &bytes, name)?;
        Ok::<_, Error>(true)
    };
    match opened.await {
        Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => Ok(false),
        other => other,
    }
}

fn range(piece: &Object) -> Option<(u64, u64)> {
    let (start, end, _) = names::parse_piece(piece.name.rsplit('/').next()?)?;
    Some((start, end))
}

/// Whether ranges in ascending order have every byte of `of`.
fn covers(known: &[(u64, u64)], of: (u64, u64)) -> bool {
    let mut from = of.0;
    for &(start, end) in known {
        if start <= from {
            from = from.max(end);
        }
    }
    from >= of.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_replaced_by_what_has_all_of_their_bytes() {
        let known = [(0, 10), (5, 20), (30, 40)];
        for replaced in [(0, 20), (3, 12), (30, 40), (10, 10)] {
            assert!(covers(&known, replaced), "{replaced:?}");
        }
        for needed in [(0, 21), (15, 35), (20, 30), (39, 41)] {
            assert!(!covers(&known, needed), "{needed:?}");
        }
        assert!(!covers(&[], (0, 1)));
    }
}
