//! Reading WAL back: whole segments, pieces put together, partial segments, histories.

use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::header::ObjectHeader;
use fairvault_format::{limits, names, object as objects, proto, wal};

use super::archive::Archive;
use super::summary;
use crate::error::{Error, Kind, Result};
use crate::immutable::pieces::is_genuine;
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment, WalFile};
use crate::postgres::walker::Walker;
use crate::stanza::Stanza;

/// How often pieces are listed anew because one was replaced meanwhile.
const LISTINGS: usize = 10;
/// Bytes that are fetched to read the header of a WAL object.
pub(super) const HEADER_GUESS: u64 = 16 << 10;

/// A stored piece of a segment: LSNs of its first byte and behind its last one, and its object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece {
    /// Start.
    pub start: u64,
    /// End.
    pub end: u64,
    /// Object.
    pub object: String,
}

impl Archive {
    /// This archive, and those that it is read together with.
    pub(super) fn all(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.others)
    }

    /// The content of an archived file, from the first archive that gives it; `None` if there is no such object.
    pub async fn file(&self, file: &WalFile, name: &str) -> Result<Option<Vec<u8>>> {
        let mut failure = None;
        for archive in self.all() {
            match archive.own_file(file, name).await {
                Ok(None) => {}
                Ok(found) => return Ok(found),
                Err(error) => _ = failure.get_or_insert(error),
            }
        }
        failure.map_or(Ok(None), Err)
    }

    async fn own_file(&self, file: &WalFile, name: &str) -> Result<Option<Vec<u8>>> {
        let object = self.object_name(file, name);
        let Some((header, content)) = self.open_object(&object, Self::object_kind(file)).await? else {
            return Ok(None);
        };
        if matches!(file, WalFile::Segment(_)) {
            self.check_is(&header, name, &object)?;
        } else if header.name != name {
            return Err(Error::damaged(format!(
                "{}/{object} holds {}",
                self.stanza.shown(),
                header.name
            )));
        }
        Ok(Some(content))
    }

    async fn open_object(&self, object: &str, kind: ObjectKind) -> Result<Option<(proto::WalHeader, Vec<u8>)>> {
        let Some(bytes) = self.object(object).await? else {
            return Ok(None);
        };
        Ok(Some(self.content_in(kind, &bytes, object).await?))
    }

    /// The header in a stored object. Under a segment's name there may be a seal of pieces.
    pub fn header_in(&self, kind: ObjectKind, bytes: &[u8], object: &str) -> Result<proto::WalHeader> {
        let keys = self.stanza.keys_for(bytes, object)?;
        let Some(seal) = self.seal_in(kind, bytes, object)? else {
            return Ok(wal::open_header(keys, self.stanza.scope(), kind, bytes, object)?);
        };
        seal.header
            .ok_or_else(|| Error::damaged(format!("{}/{object} is a seal without a header", self.stanza.shown())))
    }

    /// Header and content of a stored object; of a seal, what its pieces make up.
    pub async fn content_in(
        &self,
        kind: ObjectKind,
        bytes: &[u8],
        object: &str,
    ) -> Result<(proto::WalHeader, Vec<u8>)> {
        let keys = self.stanza.keys_for(bytes, object)?;
        let Some(seal) = self.seal_in(kind, bytes, object)? else {
            return Ok(wal::open_wal(keys, self.stanza.scope(), kind, bytes, object)?);
        };
        let header = self.header_in(kind, bytes, object)?;
        let WalFile::Segment(segment) = WalFile::parse(&header.name, self.segment_size)? else {
            return Err(Error::damaged(format!("{object} is a seal of {}", header.name)));
        };
        let folder = format!("{}/{}.d", self.folder(segment.timeline), header.name);
        let pieces = seal
            .pieces
            .iter()
            .filter_map(|file| self.piece_of(segment, format!("{folder}/{file}")))
            .collect();
        let joined = self.join_pieces(segment, pieces).await;
        let content = joined.map_err(|error| match error.kind() {
            Kind::NotFound => Error::damaged(format!("a piece of a sealed segment is missing: {error}")),
            _ => error,
        })?;
        if content.len() as u64 != self.segment_size || keys.chunk_id(&content)[..] != header.content_id {
            return Err(Error::damaged(format!(
                "{}/{object}: the sealed pieces are not the segment",
                self.stanza.shown()
            )));
        }
        Ok((header, content))
    }

    fn seal_in(&self, kind: ObjectKind, bytes: &[u8], object: &str) -> Result<Option<proto::PieceSeal>> {
        let is_seal =
            kind == ObjectKind::WalSegment && ObjectHeader::decode(bytes, object)?.kind == ObjectKind::PieceSeal;
        if !is_seal {
            return Ok(None);
        }
        let (keys, scope) = (self.stanza.keys_for(bytes, object)?, self.stanza.scope());
        let seal = objects::open_message(keys, scope, ObjectKind::PieceSeal, bytes, object, object)?;
        Ok(Some(seal))
    }

    fn folder(&self, timeline: u32) -> String {
        names::wal_folder(self.system_identifier, timeline)
    }

    /// The header of an archived segment, without its content. A summary that a faulty parser may have made is made anew.
    pub async fn segment_header(&self, segment: Segment) -> Result<Option<proto::WalHeader>> {
        let Some((_, mut header)) = self.segment_stored(segment).await? else {
            return Ok(None);
        };
        if header.summary.as_ref().is_some_and(summary::may_be_wrong) {
            let start = segment.start(self.segment_size);
            header.summary = match self.whole_segment(segment).await {
                Ok(content) => content.map(|bytes| summary::summarize(&bytes, start, self.segment_size)),
                Err(error) if error.kind() == Kind::Temporary => return Err(error),
                // Whoever needs it walks the segment, and meets the error there.
                Err(_) => None,
            };
        }
        Ok(Some(header))
    }

    /// The header of an archived segment and the key epoch of its content's id.
    pub async fn segment_stored(&self, segment: Segment) -> Result<Option<(u32, proto::WalHeader)>> {
        Ok(self
            .segment_kept(segment)
            .await?
            .map(|(_, epoch, header)| (epoch, header)))
    }

    /// The same, and whose keys these are.
    pub(super) async fn segment_kept(&self, segment: Segment) -> Result<Option<(&Stanza, u32, proto::WalHeader)>> {
        let name = segment.name(self.segment_size);
        let mut failure = None;
        for archive in self.all() {
            let object = archive.object_name(&WalFile::Segment(segment), &name);
            match archive.header_of(ObjectKind::WalSegment, &object).await {
                Ok((epoch, header)) => return Ok(Some((&archive.stanza, epoch, header))),
                Err(error) if error.kind() == Kind::NotFound => {}
                Err(error) => _ = failure.get_or_insert(error),
            }
        }
        failure.map_or(Ok(None), Err)
    }

    /// The header of a piece, without its content, and its key epoch.
    pub async fn piece_header(&self, piece: &Piece) -> Result<(u32, proto::WalHeader)> {
        self.header_of(ObjectKind::WalPiece, &piece.object).await
    }

    pub(super) async fn header_of(&self, kind: ObjectKind, object: &str) -> Result<(u32, proto::WalHeader)> {
        let store = self.stanza.store();
        let mut bytes = store.get_range(object, 0..HEADER_GUESS).await?;
        let header = ObjectHeader::decode(&bytes, object)?;
        let keys = self.stanza.keys_of(header.epoch)?;
        // Of a seal, the first section is all there is.
        let need = wal::header_len(keys, self.stanza.scope(), header.kind, &bytes, object)?;
        if need > bytes.len() {
            bytes = store.get_range(object, 0..need as u64).await?;
        }
        Ok((header.epoch, self.header_in(kind, &bytes, object)?))
    }

    /// Whether the segment is there as one object, and not as a seal of pieces: then these are needed no more.
    pub async fn is_one_object(&self, segment: Segment) -> Result<bool> {
        let object = self.object_name(&WalFile::Segment(segment), &segment.name(self.segment_size));
        is_genuine(&self.stanza, ObjectKind::WalSegment, &object).await
    }

    /// The whole segment, if it is there: as an object, or as sealed pieces.
    pub async fn whole_segment(&self, segment: Segment) -> Result<Option<Vec<u8>>> {
        let name = segment.name(self.segment_size);
        self.file(&WalFile::Segment(segment), &name).await
    }

    /// The whole segment with its header, if it is there.
    pub async fn whole_with_header(&self, segment: Segment) -> Result<Option<(proto::WalHeader, Vec<u8>)>> {
        let name = segment.name(self.segment_size);
        let object = self.object_name(&WalFile::Segment(segment), &name);
        let opened = self.open_object(&object, ObjectKind::WalSegment).await?;
        if let Some((header, _)) = &opened {
            self.check_is(header, &name, &object)?;
        }
        Ok(opened)
    }

    /// The pieces of a segment under the archive epoch that rules there, in the order of their ranges.
    pub async fn piece_list(&self, segment: Segment) -> Result<Vec<Piece>> {
        let folder = format!(
            "{}/{}.d",
            self.folder(segment.timeline),
            segment.name(self.segment_size)
        );
        let listed = self.stanza.store().list(&folder).await?;
        let mut pieces: Vec<Piece> = listed
            .into_iter()
            .filter_map(|(object, _)| self.piece_of(segment, object))
            .collect();
        pieces.sort();
        Ok(pieces)
    }

    /// A piece by its object's name, if it is one of this segment under the ruling archive epoch.
    fn piece_of(&self, segment: Segment, object: String) -> Option<Piece> {
        let base = segment.start(self.segment_size);
        let (start, end, epoch) = names::parse_piece(object.rsplit('/').next()?)?;
        let is_inside = base.0 <= start && start < end && end <= base.0 + self.segment_size;
        let rules = epoch == self.epoch(segment.timeline, base);
        (is_inside && rules).then_some(Piece { start, end, object })
    }

    /// The longest beginning of a segment that its pieces and partial files amount to, as far as they agree; empty if
    /// there are none. A damaged part is passed over as long as another one is good.
    pub async fn parts(&self, segment: Segment) -> Result<Vec<u8>> {
        let mut best = Vec::new();
        let mut failure = None;
        let mut limit = usize::MAX;
        for archive in self.all() {
            match archive.own_parts(segment).await {
                Ok(part) => self.take_part(segment, &mut best, part, &mut limit),
                Err(error) => _ = failure.get_or_insert(error),
            }
        }
        match failure {
            Some(error) if best.is_empty() => Err(error),
            _ => Ok(best),
        }
    }

    /// Takes another part into account: the longer one, as far as both agree. Where they do not, nobody knows which is
    /// right: what lies beyond that `limit` is not used, whoever else has it.
    fn take_part(&self, segment: Segment, best: &mut Vec<u8>, mut part: Vec<u8>, limit: &mut usize) {
        part.truncate(*limit);
        let common = best.iter().zip(&part).take_while(|(a, b)| a == b).count();
        if common < best.len().min(part.len()) {
            tracing::warn!(
                "parts of {} in {} differ from {} on: only what they have in common is used",
                segment.name(self.segment_size),
                self.stanza.shown(),
                Lsn(segment.start(self.segment_size).0 + common as u64)
            );
            best.truncate(common);
            *limit = common;
        } else if part.len() > best.len() {
            *best = part;
        }
    }

    async fn own_parts(&self, segment: Segment) -> Result<Vec<u8>> {
        for _ in 0..LISTINGS {
            match self.listed_parts(segment).await {
                // Whoever receives has replaced it by a longer one, or by the whole.
                Err(error) if error.kind() == Kind::NotFound => {}
                other => return other,
            }
        }
        Err(Error::temporary(format!(
            "the pieces of {} change faster than they can be read",
            segment.name(self.segment_size)
        )))
    }

    async fn listed_parts(&self, segment: Segment) -> Result<Vec<u8>> {
        let folder = self.folder(segment.timeline);
        let start = format!("{folder}/{}.", segment.name(self.segment_size));
        let listed = self.stanza.store().list_after(&folder, &start, &start).await?;
        let mut pieces = Vec::new();
        let mut best: Vec<u8> = Vec::new();
        let mut partials = Vec::new();
        let mut failure: Option<Error> = None;
        for object in listed {
            if object[start.len()..].starts_with("d/") {
                pieces.extend(self.piece_of(segment, object));
            } else if object[start.len()..].starts_with("partial") {
                match self.partial(segment, &object).await {
                    Ok(content) => partials.push(content),
                    Err(error) if error.kind() == Kind::Temporary => return Err(error),
                    Err(error) => failure = Some(error),
                }
            }
        }
        pieces.sort();
        match self.join_pieces(segment, pieces).await {
            Ok(content) => partials.push(content),
            Err(error) if matches!(error.kind(), Kind::Temporary | Kind::NotFound) => return Err(error),
            Err(error) => failure = Some(error),
        }
        let mut limit = usize::MAX;
        for part in partials {
            self.take_part(segment, &mut best, part, &mut limit);
        }
        match failure {
            Some(error) if best.is_empty() => Err(error),
            Some(error) => {
                tracing::warn!("a part of {} is passed over: {error}", segment.name(self.segment_size));
                Ok(best)
            }
            None => Ok(best),
        }
    }

    /// A partial file, cut where its records end: what follows is padding or what the file held before.
    async fn partial(&self, segment: Segment, object: &str) -> Result<Vec<u8>> {
        let opened = self.open_object(object, ObjectKind::WalSide).await?;
        let mut content = opened.map(|(_, content)| content).unwrap_or_default();
        let start = segment.start(self.segment_size);
        let mut walker = Walker::new(start, self.segment_size);
        walker.feed(&content, |_| {});
        if let Some(stop) = walker.stopped() {
            content.truncate(stop.at.0.saturating_sub(start.0) as usize);
        }
        Ok(content)
    }

    async fn join_pieces(&self, segment: Segment, pieces: Vec<Piece>) -> Result<Vec<u8>> {
        let base = segment.start(self.segment_size).0;
        let mut content: Vec<u8> = Vec::new();
        for Piece { start, end, object } in pieces {
            let bad = |why: &str| Error::damaged(format!("{}/{object}: {why}", self.stanza.shown()));
            let at = (start - base) as usize;
            if at > content.len() {
                // A hole between pieces: what is behind it cannot be used.
                break;
            }
            let stored = self.stanza.store().get(&object, limits::WAL_OBJECT_BYTES).await?;
            let keys = self.stanza.keys_for(&stored, &object)?;
            let (_, piece) = wal::open_wal(keys, self.stanza.scope(), ObjectKind::WalPiece, &stored, &object)?;
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

    /// Everything that is known of a segment: the whole one, else the longest part, cut where it ends.
    /// `None` if there is nothing.
    pub async fn segment_or_parts(&self, segment: Segment) -> Result<Option<Vec<u8>>> {
        if let Some(content) = self.whole_segment(segment).await? {
            return Ok(Some(content));
        }
        let part = self.parts(segment).await?;
        // It may have been completed since, and its parts removed under our eyes.
        if let Some(content) = self.whole_segment(segment).await? {
            return Ok(Some(content));
        }
        Ok((!part.is_empty()).then_some(part))
    }

    /// The history of a timeline; for timeline 1 there is none to read.
    pub async fn history(&self, timeline: u32) -> Result<Option<History>> {
        if timeline == 1 {
            return Ok(Some(History {
                timeline: 1,
                ancestors: Vec::new(),
            }));
        }
        let (file, name) = (WalFile::History(timeline), format!("{timeline:08X}.history"));
        let content = match self.history_in_header(&file, &name).await? {
            Some(content) => Some(content),
            None => self.file(&file, &name).await?,
        };
        content.map(|c| History::parse(timeline, &c)).transpose()
    }

    /// A history from its object's header: no key that opens content is needed. `None` where it is in none.
    async fn history_in_header(&self, file: &WalFile, name: &str) -> Result<Option<Vec<u8>>> {
        for archive in self.all() {
            let object = archive.object_name(file, name);
            let found = match archive.header_of(ObjectKind::WalSide, &object).await {
                Ok(found) => found,
                Err(error) if error.kind() == Kind::Temporary => return Err(error),
                // Whoever reads its content meets the reason.
                Err(_) => continue,
            };
            let (epoch, header) = found;
            let id = archive.stanza.keys_of(epoch)?.chunk_id(&header.history);
            if header.name == name && !header.history.is_empty() && header.content_id == id {
                return Ok(Some(header.history));
            }
        }
        Ok(None)
    }
}
