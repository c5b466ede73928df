//! Storing WAL: create-only, the same again is success, anything else under a taken name is an error.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::wal::{Compression, WalSealer};
use fairvault_format::{limits, names, object, proto, wal};

use super::fetch::{HEADER_GUESS, Piece};
use super::summary;
use super::whole::{blocking, ids_of_file};
use crate::commit::authors::Deed;
use crate::commit::fence::by_whom;
use crate::commit::{Log, state};
use crate::env::{self, has_fault};
use crate::error::{Context, Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{Segment, WalFile};
use crate::stanza::{Stanza, upgrade};
use crate::store::Created;
use crate::store::arriving::Arriving;

/// Content up to this size is sealed where we stand: a hop to another thread takes longer.
const INLINE_BYTES: usize = 64 << 10;
/// Histories up to this size are in their object's header too, where whoever only writes can read them.
const HISTORY_BYTES: usize = 256 << 10;

/// What happened to a file that was to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// It is new.
    New,
    /// The same content was there.
    Same,
    /// Another partial file of this segment was there; both are kept.
    Beside,
}

/// What was sealed, for whoever has to compare it.
pub(super) enum Ours<'a> {
    /// It is at hand.
    Bytes(&'a [u8]),
    /// It was read from here.
    File(PathBuf),
    /// It is no longer at hand.
    Gone,
}

impl Ours<'_> {
    /// Its id under another key; `own` is the one under which it has `id`.
    async fn id_under(self, key: &[u8; 32], own: &[u8; 32], id: [u8; 32]) -> Result<[u8; 32]> {
        match self {
            Ours::Bytes(content) => Ok(*blake3::keyed_hash(key, content).as_bytes()),
            Ours::Gone => Err(Error::new(
                Kind::Temporary,
                "its content is no longer at hand, and this host's key does not read what is stored",
            )
            .remedy("it is received or pushed again, and then compared as a whole")),
            Ours::File(path) => {
                let (key, own) = (*key, *own);
                let ids = blocking("hashing WAL", move || ids_of_file(&path, &own, &key)).await?;
                // It must still be what was sealed.
                match ids.0 == id {
                    true => Ok(ids.1),
                    false => Err(Error::new(Kind::Temporary, "the file has changed since it was read")
                        .remedy("it is read and compared anew when it is pushed again")),
                }
            }
        }
    }
}

/// The archive of one incarnation.
#[derive(Clone)]
pub struct Archive {
    /// Stanza.
    pub stanza: Arc<Stanza>,
    /// Incarnation.
    pub system_identifier: u64,
    /// wal_segment_size, bytes.
    pub segment_size: u64,
    /// How what is stored is compressed.
    pub compression: Compression,
    /// Archive epochs.
    pub epochs: Vec<proto::ArchiveEpoch>,
    /// Timelines that take no more WAL.
    pub closed: Vec<proto::CloseTimeline>,
    /// Timeline and stop LSN of every backup of this incarnation: WAL was there up to them.
    pub backups: Vec<(u32, Lsn)>,
    /// WAL of this incarnation that has expired: as good as gone.
    pub expired: Vec<proto::ExpiredWal>,
    /// The same incarnation in other repositories: whoever reads takes from them what this one does not have.
    pub others: Vec<Archive>,
    /// An object that was asked for while the log was read, with its name. Whoever wants it takes it.
    asked_for: Arc<Mutex<Option<(String, Arriving)>>>,
}

impl Archive {
    /// The archive of the stanza's newest incarnation, or of the one with `system_identifier`.
    pub fn open(log: &Log, system_identifier: Option<u64>, compression: impl Into<Compression>) -> Result<Self> {
        assert!(!has_fault("panic"), "a deliberate panic");
        let incarnations = &log.state().incarnations;
        let incarnation = match system_identifier {
            None => incarnations.last(),
            Some(id) => incarnations.iter().find(|i| i.system_identifier == id),
        };
        let incarnation = incarnation.ok_or_else(|| {
            Error::refused(format!(
                "stanza {} is not of the cluster with system identifier {}",
                log.stanza().name(),
                system_identifier.unwrap_or_default()
            ))
            .remedy(upgrade::remedy(log.stanza().name()))
        })?;
        Ok(Self {
            stanza: log.stanza().clone(),
            system_identifier: incarnation.system_identifier,
            segment_size: incarnation.wal_segment_size,
            compression: compression.into(),
            epochs: log.state().archive_epochs.clone(),
            closed: log.state().closed_timelines.clone(),
            backups: log
                .state()
                .backups
                .iter()
                .filter_map(|b| b.info.as_ref())
                .filter(|info| info.system_identifier == incarnation.system_identifier)
                .map(|info| (info.stop_timeline, Lsn(info.stop_lsn)))
                .collect(),
            expired: log
                .state()
                .expired_wal
                .iter()
                .filter(|wal| wal.system_identifier == incarnation.system_identifier)
                .cloned()
                .collect(),
            others: Vec::new(),
            asked_for: Arc::default(),
        })
    }

    /// The same, for reading from others too.
    #[must_use]
    pub fn beside(self, others: Vec<Self>) -> Self {
        Self { others, ..self }
    }

    /// The same, as if nothing had expired, for whoever wants what is still there.
    #[must_use]
    pub fn with_expired(self) -> Self {
        Self {
            expired: Vec::new(),
            others: self.others.into_iter().map(Self::with_expired).collect(),
            ..self
        }
    }

    /// Opens the log and the archive for a request for the file `name`, which is asked for meanwhile. It need not be here
    /// when this returns, but if `others` may be asked instead: then whoever waits for this waits for all of it. `None` if
    /// this repository has never heard of the cluster: it cannot have anything of it.
    pub async fn open_for(
        stanza: Arc<Stanza>,
        system_identifier: Option<u64>,
        name: &str,
        others: bool,
    ) -> Result<Option<Self>> {
        let fetch = async |log: &Log| {
            let archive = Self::open(log, system_identifier, 0).ok()?;
            let file = WalFile::parse(name, archive.segment_size).ok()?;
            let object = archive.object_name(&file, name);
            // A failure is met again by whoever really asks.
            let store = archive.stanza.store();
            let mut arriving = store.arriving(&object, limits::WAL_OBJECT_BYTES).await.ok()??;
            if others {
                arriving = arriving.rest().await.ok()?.into();
            }
            Some((object, arriving))
        };
        let (log, asked_for) = Log::open_beside(stanza, fetch).await?;
        let mut known = log.state().incarnations.iter();
        if system_identifier.is_some_and(|id| known.all(|life| life.system_identifier != id)) {
            return Ok(None);
        }
        let archive = Self::open(&log, system_identifier, 0)?;
        Ok(Some(Self {
            asked_for: Arc::new(Mutex::new(asked_for.flatten())),
            ..archive
        }))
    }

    /// The object that holds a whole file, as it arrives.
    pub(super) async fn arriving(&self, object: &str) -> Result<Option<Arriving>> {
        match self.take_asked_for(object) {
            None => self.stanza.store().arriving(object, limits::WAL_OBJECT_BYTES).await,
            asked_for => Ok(asked_for),
        }
    }

    fn take_asked_for(&self, object: &str) -> Option<Arriving> {
        let mut asked_for = self.asked_for.lock().unwrap_or_else(PoisonError::into_inner);
        asked_for
            .take_if(|(name, _)| name == object)
            .map(|(_, arriving)| arriving)
    }

    /// The object that holds a whole file.
    pub(super) async fn object(&self, object: &str) -> Result<Option<Bytes>> {
        if let Some(arriving) = self.take_asked_for(object) {
            match arriving.rest().await {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(error) => tracing::debug!("{error}; reading it again"),
            }
        }
        self.stanza.store().get_opt(object, limits::WAL_OBJECT_BYTES).await
    }

    /// The archive epoch that rules at a position.
    pub fn epoch(&self, timeline: u32, lsn: Lsn) -> u32 {
        let snapshot = proto::Snapshot {
            archive_epochs: self.epochs.clone(),
            ..Default::default()
        };
        state::archive_epoch(&snapshot, self.system_identifier, timeline, lsn.0)
    }

    /// The object name of an archived file under the epoch that rules there.
    pub fn object_name(&self, file: &WalFile, name: &str) -> String {
        let lsn = match file {
            WalFile::Segment(s) | WalFile::Partial(s) | WalFile::BackupHistory(s) => s.start(self.segment_size),
            WalFile::History(_) => Lsn(0),
        };
        names::wal_file(
            self.system_identifier,
            file.timeline(),
            name,
            self.epoch(file.timeline(), lsn),
        )
    }

    /// Which kind of object holds a file.
    pub fn object_kind(file: &WalFile) -> ObjectKind {
        match file {
            WalFile::Segment(_) => ObjectKind::WalSegment,
            _ => ObjectKind::WalSide,
        }
    }

    fn header(&self, file: &WalFile, name: &str, content: &[u8]) -> proto::WalHeader {
        let mut header = proto::WalHeader {
            name: name.to_owned(),
            system_identifier: self.system_identifier,
            timeline: file.timeline(),
            segment_size: self.segment_size,
            ..Default::default()
        };
        if matches!(file, WalFile::History(_)) && content.len() <= HISTORY_BYTES {
            header.history = content.to_vec();
        }
        if let WalFile::Segment(segment) | WalFile::Partial(segment) = file {
            let start = segment.start(self.segment_size);
            header.start_lsn = start.0;
            header.end_lsn = start.0 + content.len() as u64;
            header.summary = Some(summary::summarize(content, start, self.segment_size));
        }
        header
    }

    /// Whether a segment has expired.
    pub fn is_expired(&self, segment: Segment) -> bool {
        let (start, end) = (segment.start(self.segment_size).0, segment.end(self.segment_size).0);
        let of_timeline = self.expired.iter().filter(|wal| wal.timeline == segment.timeline);
        of_timeline
            .into_iter()
            .any(|wal| wal.from_lsn <= start && end <= wal.to_lsn)
    }

    /// Where a timeline was closed, if it was.
    pub fn closed_at(&self, timeline: u32) -> Option<Lsn> {
        let is_it = |c: &&proto::CloseTimeline| c.system_identifier == self.system_identifier && c.timeline == timeline;
        self.closed.iter().find(is_it).map(|closed| Lsn(closed.lsn))
    }

    /// Fails if WAL of a timeline up to `end` is refused because that was closed.
    pub fn check_open(&self, timeline: u32, end: Lsn) -> Result<()> {
        let is_it = |c: &&proto::CloseTimeline| {
            c.system_identifier == self.system_identifier && c.timeline == timeline && Lsn(c.lsn) < end
        };
        match self.closed.iter().find(is_it) {
            None => Ok(()),
            Some(closed) => Err(Error::new(
                Kind::Held,
                format!(
                    "timeline {timeline} was closed at {}, and WAL of it up to {end} is not stored: {}",
                    Lsn(closed.lsn),
                    closed.reason
                ),
            )
            .remedy(
                "this server goes on with a history that was given up: stop it, or rewind it to the new timeline. \
                 If it is the right one, `fairvault stanza fence --timeline N --reopen`",
            )),
        }
    }

    /// Stores a file.
    pub async fn put(&self, file: WalFile, name: &str, content: Vec<u8>) -> Result<Stored> {
        Ok(self.put_sized(file, name, content).await?.0)
    }

    /// The same; returns the bytes of its object, too.
    pub async fn put_sized(&self, file: WalFile, name: &str, content: Vec<u8>) -> Result<(Stored, u64)> {
        match file {
            WalFile::Segment(s) => self.check_open(s.timeline, s.end(self.segment_size))?,
            WalFile::Partial(s) => self.check_open(s.timeline, Lsn(s.start(self.segment_size).0 + 1))?,
            WalFile::BackupHistory(_) | WalFile::History(_) => {}
        }
        let object = self.object_name(&file, name);
        let kind = Self::object_kind(&file);
        let id = self.stanza.keys().chunk_id(&content);
        let sealed = self
            .seal(kind, object.clone(), self.header(&file, name, &content), content)
            .await?;
        let len = sealed.0.len() as u64;
        match self
            .stanza
            .store()
            .create(&object, sealed.0.into(), limits::WAL_OBJECT_BYTES)
            .await?
        {
            Created::Won => return Ok((Stored::New, len)),
            Created::Lost(there) if self.has_same(kind, &there, &object, id, Ours::Bytes(&sealed.1)).await? => {
                return Ok((Stored::Same, len));
            }
            Created::Lost(_) if matches!(file, WalFile::Partial(_)) => {}
            Created::Lost(_) => return Err(other_content(&self.stanza, &object)),
        }
        let beside = format!("{name}-{}", hex::encode(&id[..4]));
        let object = self.object_name(&file, &beside);
        let sealed = self
            .seal(kind, object.clone(), self.header(&file, name, &sealed.1), sealed.1)
            .await?;
        let len = sealed.0.len() as u64;
        match self
            .stanza
            .store()
            .create(&object, sealed.0.into(), limits::WAL_OBJECT_BYTES)
            .await?
        {
            Created::Won => Ok((Stored::Beside, len)),
            Created::Lost(there) if self.has_same(kind, &there, &object, id, Ours::Bytes(&sealed.1)).await? => {
                Ok((Stored::Same, len))
            }
            Created::Lost(_) => Err(Error::refused(format!(
                "{object} exists with other content; nothing was overwritten"
            ))),
        }
    }

    /// Stores bytes of a segment from `offset` on as a piece.
    pub async fn put_piece(&self, segment: Segment, offset: u64, content: Vec<u8>) -> Result<(Stored, Piece)> {
        let piece = self.piece(segment, offset, offset + content.len() as u64);
        self.check_open(segment.timeline, Lsn(piece.end))?;
        let id = self.stanza.keys().chunk_id(&content);
        let header = proto::WalHeader {
            start_lsn: piece.start,
            end_lsn: piece.end,
            ..self.plain_header(segment.timeline, &segment.name(self.segment_size))
        };
        let sealed = self
            .seal(ObjectKind::WalPiece, piece.object.clone(), header, content)
            .await?;
        let stored = self
            .create_same(
                ObjectKind::WalPiece,
                &piece.object,
                sealed.0,
                id,
                Ours::Bytes(&sealed.1),
            )
            .await?;
        Ok((stored, piece))
    }

    /// The piece of a segment between two offsets, by the name that it has or will have.
    pub fn piece(&self, segment: Segment, from: u64, to: u64) -> Piece {
        let base = segment.start(self.segment_size);
        let (start, end) = (base.0 + from, base.0 + to);
        let name = segment.name(self.segment_size);
        let epoch = self.epoch(segment.timeline, base);
        let object = names::wal_piece(self.system_identifier, segment.timeline, &name, start, end, epoch);
        Piece { start, end, object }
    }

    /// Stores a complete segment whose summary was made while it arrived.
    pub async fn put_whole(&self, segment: Segment, summary: proto::WalSummary, content: Vec<u8>) -> Result<Stored> {
        let archive = self.clone();
        let seal = move || archive.seal_runs(segment, summary, content.chunks(limits::WAL_SECTION_BYTES));
        self.put_sealed_by(segment, seal).await
    }

    /// The same of a segment in runs of [`limits::WAL_SECTION_BYTES`]: each is let go of once it is sealed.
    pub async fn put_runs(
        &self,
        segment: Segment,
        summary: proto::WalSummary,
        runs: VecDeque<Vec<u8>>,
    ) -> Result<Stored> {
        let archive = self.clone();
        let seal = move || archive.seal_runs(segment, summary, runs.into_iter());
        self.put_sealed_by(segment, seal).await
    }

    async fn put_sealed_by(
        &self,
        segment: Segment,
        seal: impl FnOnce() -> Result<(Vec<u8>, [u8; 32])> + Send + 'static,
    ) -> Result<Stored> {
        self.check_open(segment.timeline, segment.end(self.segment_size))?;
        let (sealed, id) = match self.segment_size as usize <= INLINE_BYTES {
            true => seal()?,
            false => blocking("sealing WAL", seal).await?,
        };
        let object = self.object_name(&WalFile::Segment(segment), &segment.name(self.segment_size));
        self.create_same(ObjectKind::WalSegment, &object, sealed, id, Ours::Gone)
            .await
    }

    /// A segment's object, and the id of its content.
    fn seal_runs<R: AsRef<[u8]>>(
        &self,
        segment: Segment,
        summary: proto::WalSummary,
        runs: impl Iterator<Item = R>,
    ) -> Result<(Vec<u8>, [u8; 32])> {
        let stanza = &self.stanza;
        let object = self.object_name(&WalFile::Segment(segment), &segment.name(self.segment_size));
        let mut sealer = WalSealer::new(
            stanza.keys(),
            stanza.scope(),
            ObjectKind::WalSegment,
            env::fresh(stanza.env())?,
            &object,
            segment.start(self.segment_size).0,
            self.compression,
        )?;
        let mut id = blake3::Hasher::new_keyed(&stanza.keys().id_key);
        for run in runs {
            id.update(run.as_ref());
            sealer.run(run.as_ref())?;
        }
        let id = *id.finalize().as_bytes();
        let header = proto::WalHeader {
            content_id: id.to_vec(),
            ..self.segment_facts(segment, summary)
        };
        Ok((sealer.finish(header)?, id))
    }

    pub(super) fn segment_facts(&self, segment: Segment, summary: proto::WalSummary) -> proto::WalHeader {
        proto::WalHeader {
            start_lsn: segment.start(self.segment_size).0,
            end_lsn: segment.end(self.segment_size).0,
            summary: Some(summary),
            ..self.plain_header(segment.timeline, &segment.name(self.segment_size))
        }
    }

    fn plain_header(&self, timeline: u32, name: &str) -> proto::WalHeader {
        proto::WalHeader {
            name: name.to_owned(),
            system_identifier: self.system_identifier,
            timeline,
            segment_size: self.segment_size,
            ..Default::default()
        }
    }

    /// Makes pieces, in the order of their ranges, the complete segment: under its name, as if it was stored
    /// as one. `content_id` is that of the whole.
    pub async fn put_seal(
        &self,
        segment: Segment,
        summary: proto::WalSummary,
        content_id: [u8; 32],
        pieces: &[Piece],
    ) -> Result<Stored> {
        self.check_open(segment.timeline, segment.end(self.segment_size))?;
        let name = segment.name(self.segment_size);
        let object = self.object_name(&WalFile::Segment(segment), &name);
        // A seal that names less than the segment would be the end of it.
        let mut end = segment.start(self.segment_size).0;
        for piece in pieces {
            if piece.start <= end {
                end = end.max(piece.end);
            }
        }
        if end != segment.end(self.segment_size).0 || pieces.iter().any(|piece| piece.object.is_empty()) {
            return Err(Error::failed(format!("the pieces of {name} do not make it up")));
        }
        let file = |name: &String| name.rsplit('/').next().unwrap_or_default().to_owned();
        let seal = proto::PieceSeal {
            header: Some(proto::WalHeader {
                content_id: content_id.to_vec(),
                content_len: self.segment_size,
                ..self.segment_facts(segment, summary)
            }),
            pieces: pieces.iter().map(|piece| file(&piece.object)).collect(),
        };
        let stanza = &self.stanza;
        let salt = env::salt(stanza.env())?;
        let sealed = object::seal_message(
            stanza.keys(),
            stanza.scope(),
            ObjectKind::PieceSeal,
            salt,
            &object,
            &seal,
        )?;
        self.create_same(ObjectKind::WalSegment, &object, sealed, content_id, Ours::Gone)
            .await
    }

    /// Removes pieces that something whole has replaced. What cannot be removed stays: it does no harm.
    pub async fn delete_pieces(&self, pieces: &[Piece]) {
        let names: Vec<String> = pieces.iter().map(|piece| piece.object.clone()).collect();
        if !names.is_empty()
            && self.stanza.store().settings().may_delete
            && let Err(error) = self.stanza.store().delete(&names).await
        {
            tracing::debug!("{} pieces stay beside their segment: {error}", names.len());
        }
    }

    /// Creates a segment's object, or that of a piece; the same content under the name is success, other content is an error. `ours` is
    /// what was sealed.
    pub(super) async fn create_same(
        &self,
        kind: ObjectKind,
        object: &str,
        sealed: Vec<u8>,
        id: [u8; 32],
        ours: Ours<'_>,
    ) -> Result<Stored> {
        let store = self.stanza.store();
        let Created::Lost(head) = store.create_large(object, sealed.into(), HEADER_GUESS).await? else {
            return Ok(Stored::New);
        };
        let compared = async {
            let keys = self.stanza.keys_for(&head, object)?;
            // Ids compare only within one key epoch.
            match keys.epoch == self.stanza.keys().epoch {
                true => Ok(self.header_of(kind, object).await?.1.content_id == id),
                false => {
                    let there = store.get(object, limits::WAL_OBJECT_BYTES).await?;
                    self.has_same(kind, &there, object, id, ours).await
                }
            }
        };
        let same = compared.await.map_err(|error: Error| match error.kind() {
            // It was there a moment ago.
            Kind::NotFound => Error::temporary(error.to_string()),
            _ => error,
        });
        let same = same.context(|| format!("comparing with {}/{object}", self.stanza.shown()))?;
        match same {
            true => Ok(Stored::Same),
            false => Err(other_content(&self.stanza, object)),
        }
    }

    /// Seals away from the async threads, unless that is done at once; returns the object and the content.
    async fn seal(
        &self,
        kind: ObjectKind,
        object: String,
        header: proto::WalHeader,
        content: Vec<u8>,
    ) -> Result<(Vec<u8>, Vec<u8>)> {
        let (stanza, compression) = (self.stanza.clone(), self.compression);
        let fresh = env::fresh(stanza.env())?;
        let small = content.len() <= INLINE_BYTES;
        let work = move || {
            wal::seal_wal(
                stanza.keys(),
                stanza.scope(),
                kind,
                fresh,
                &object,
                header,
                &content,
                compression,
            )
            .map(|sealed| (sealed, content))
        };
        if small {
            return Ok(work()?);
        }
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => Ok(result?),
            Err(error) => Err(Error::failed("sealing WAL").caused_by(error)),
        }
    }

    /// Whether what is stored has our content, whose id is `id`. Ids compare only within one key epoch: of another
    /// one, what is stored is opened; where the key does not do that, what is ours is hashed again under its `id_key`.
    async fn has_same(
        &self,
        kind: ObjectKind,
        bytes: &[u8],
        object: &str,
        id: [u8; 32],
        ours: Ours<'_>,
    ) -> Result<bool> {
        let compared = async {
            let there = self.header_in(kind, bytes, object)?.content_id;
            if there.len() != id.len() {
                return Err(Error::damaged(format!("{object} has no content id")));
            }
            let keys = self.stanza.keys_for(bytes, object)?;
            if keys.epoch == self.stanza.keys().epoch {
                return Ok(there == id);
            }
            // What old keys have stored may say of itself what it is not.
            if !keys.can_read() {
                let id = ours.id_under(&keys.id_key, &self.stanza.keys().id_key, id).await?;
                return Ok(there == id);
            }
            let (_, content) = self.content_in(kind, bytes, object).await?;
            Ok(self.stanza.keys().chunk_id(&content) == id)
        };
        let compared: Result<bool> = compared.await;
        compared.context(|| format!("comparing with {}/{object}", self.stanza.shown()))
    }

    /// Whether a segment that is there as a whole has this content; `None` if it is not there.
    pub async fn has_content(&self, segment: Segment, content: &[u8]) -> Result<Option<bool>> {
        let Some((stanza, epoch, header)) = self.segment_kept(segment).await? else {
            return Ok(None);
        };
        let keys = stanza.keys_of(epoch)?;
        if epoch == self.stanza.keys().epoch || !keys.can_read() {
            return Ok(Some(header.content_id == keys.chunk_id(content)));
        }
        let there = self.whole_segment(segment).await?;
        Ok(there.map(|there| there == content))
    }

    /// The error of two contents for one segment.
    pub fn contradicts(&self, segment: Segment) -> Error {
        let name = segment.name(self.segment_size);
        other_content(&self.stanza, &self.object_name(&WalFile::Segment(segment), &name))
    }

    /// Fails if the stanza was fenced, or a timeline closed, since the log was read.
    pub async fn check_fence(&self, log: &mut crate::commit::Log) -> Result<()> {
        let before = log.state().fence;
        log.refresh().await?;
        let now = log.state();
        if now.fence != before {
            return Err(fenced(now));
        }
        let what = match now.closed_timelines == self.closed {
            true if now.archive_epochs == self.epochs => return Ok(()),
            true => "another archive epoch began".to_owned(),
            false => format!("a timeline was closed or reopened{}", log.whose(Deed::Closing)),
        };
        Err(
            Error::new(Kind::Held, format!("what was just written may not count: {what}"))
                .remedy("start it again; `fairvault audit` shows why that was done"),
        )
    }
}

/// What was written since somebody fenced the stanza may not count.
pub fn fenced(now: &proto::Snapshot) -> Error {
    Error::new(
        Kind::Held,
        format!(
            "the stanza was fenced{} while this was written; it may not count",
            by_whom(now)
        ),
    )
    .remedy("`fairvault audit` shows every fence")
}

pub(super) fn other_content(stanza: &Stanza, object: &str) -> Error {
    Error::refused(format!(
        "{}/{object} exists with other content; nothing was overwritten",
        stanza.shown()
    ))
    .remedy(
        "two clusters or two histories archive under one name: a restored copy, an old primary that came back, or a \
         stanza used twice. Find the other one before you archive again",
    )
}
