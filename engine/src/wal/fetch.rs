//! Reading WAL back: whole segments, pieces put together, partial segments, histories.

use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::{names, proto, wal};

use super::archive::Archive;
use crate::error::{Error, Kind, Result};
use crate::postgres::segment::{History, Segment, WalFile};

/// Bytes that are fetched to read the header of a WAL object.
const HEADER_GUESS: u64 = 4096;

impl Archive {
    /// The content of an archived file; `None` if there is no such object.
    pub async fn file(&self, file: &WalFile, name: &str) -> Result<Option<Vec<u8>>> {
        let object = self.object_name(file, name);
        let Some(bytes) = self.stanza.store().get_opt(&object).await? else {
            return Ok(None);
        };
        let keys = self.stanza.keys_for(&bytes, &object)?;
        let (header, content) = wal::open_wal(keys, self.stanza.scope(), Self::object_kind(file), &bytes, &object)?;
        let expected = matches!(file, WalFile::Segment(_)).then_some(self.segment_size);
        if header.name != name || expected.is_some_and(|len| len != content.len() as u64) {
            return Err(Error::damaged(format!(
                "{}/{object} holds {} of {} bytes",
                self.stanza.shown(),
                header.name,
                content.len()
            )));
        }
        Ok(Some(content))
    }

    /// The header of an archived segment, without its content.
    pub async fn segment_header(&self, segment: Segment) -> Result<Option<proto::WalHeader>> {
        let name = segment.name(self.segment_size);
        let object = self.object_name(&WalFile::Segment(segment), &name);
        let store = self.stanza.store();
        let mut bytes = match store.get_range(&object, 0..HEADER_GUESS).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let keys = self.stanza.keys_for(&bytes, &object)?;
        let need = wal::header_len(keys, self.stanza.scope(), ObjectKind::WalSegment, &bytes, &object)?;
        if need > bytes.len() {
            bytes = store.get_range(&object, 0..need as u64).await?;
        }
        Ok(Some(wal::open_header(
            keys,
            self.stanza.scope(),
            ObjectKind::WalSegment,
            &bytes,
            &object,
        )?))
    }

    /// What the pieces of a segment amount to, from its start; empty if there are none.
    pub async fn pieces(&self, segment: Segment) -> Result<Vec<u8>> {
        let name = segment.name(self.segment_size);
        let folder = format!(
            "{}/{name}.d",
            names::wal_folder(self.system_identifier, segment.timeline)
        );
        let mut pieces: Vec<_> = self
            .stanza
            .store()
            .list(&folder)
            .await?
            .into_iter()
            .filter_map(|(object, _)| Some((names::parse_piece(object.rsplit('/').next()?)?, object)))
            .collect();
        pieces.sort();
        let base = segment.start(self.segment_size).0;
        let mut content: Vec<u8> = Vec::new();
        for ((start, end, _), object) in pieces {
            let bad = |why: &str| Error::damaged(format!("{}/{object}: {why}", self.stanza.shown()));
            if start < base || end > base + self.segment_size || start >= end {
                return Err(bad("its range is outside of its segment"));
            }
            let at = (start - base) as usize;
            if at > content.len() {
                // A hole between pieces: what is behind it cannot be used.
                break;
            }
            let bytes = self.stanza.store().get(&object).await?;
            let keys = self.stanza.keys_for(&bytes, &object)?;
            let (_, piece) = wal::open_wal(keys, self.stanza.scope(), ObjectKind::WalPiece, &bytes, &object)?;
            if piece.len() as u64 != end - start {
                return Err(bad("its length is not that of its range"));
            }
            let overlap = (content.len() - at).min(piece.len());
            if content[at..at + overlap] != piece[..overlap] {
                return Err(bad("it contradicts another piece of the segment"));
            }
            content.extend_from_slice(&piece[overlap..]);
        }
        Ok(content)
    }

    /// Everything that is known of a segment: the whole one, else pieces or a partial segment, cut where
    /// they end. `None` if there is nothing.
    pub async fn segment_or_parts(&self, segment: Segment) -> Result<Option<Vec<u8>>> {
        let name = segment.name(self.segment_size);
        if let Some(content) = self.file(&WalFile::Segment(segment), &name).await? {
            return Ok(Some(content));
        }
        let mut best = self.pieces(segment).await?;
        if let Some(partial) = self
            .file(&WalFile::Partial(segment), &format!("{name}.partial"))
            .await?
            && best.len() < partial.len()
        {
            best = partial;
        }
        if !best.is_empty() {
            return Ok(Some(best));
        }
        // It may have been completed between the two looks.
        self.file(&WalFile::Segment(segment), &name).await
    }

    /// The history of a timeline; for timeline 1 there is none to read.
    pub async fn history(&self, timeline: u32) -> Result<Option<History>> {
        if timeline == 1 {
            return Ok(Some(History {
                timeline: 1,
                ancestors: Vec::new(),
            }));
        }
        let content = self
            .file(&WalFile::History(timeline), &format!("{timeline:08X}.history"))
            .await?;
        content.map(|c| History::parse(timeline, &c)).transpose()
    }
}
