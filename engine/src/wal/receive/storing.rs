//! What is stored, one thing at a time: pieces, complete segments, and what takes the place of both.

use std::collections::VecDeque;
use std::pin::Pin;
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};
use tokio::time::Instant;

use crate::commit::{Log, rotated};
use crate::error::{Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;
use crate::wal::archive::{Archive, Stored, fenced};
use crate::wal::fetch::Piece;
use crate::wal::known::Known;
use crate::wal::summary::Summarizer;

/// How long the log is believed not to have grown, while pieces are stored.
const FENCE_INTERVAL: Duration = Duration::from_secs(5);

/// What was stored.
pub struct Done {
    /// Of this segment.
    pub segment: Segment,
    /// Up to where WAL is durable now.
    pub durable: Lsn,
    /// The piece, if it was one.
    pub piece: Option<Piece>,
    /// What is stored of the next segment, if this one is complete.
    pub next: Option<Known>,
}

/// Something that is being stored.
pub type Storing<'a> = Pin<Box<dyn Future<Output = Result<Done>> + Send + 'a>>;

/// Looks whether we may still write.
pub struct Guard {
    log: Mutex<Log>,
    fence: u32,
    looked: std::sync::Mutex<Instant>,
}

impl Guard {
    /// Whoever fences the stanza from now on stops us.
    pub fn new(log: Log) -> Self {
        Self {
            fence: log.state().fence,
            log: Mutex::new(log),
            looked: std::sync::Mutex::new(Instant::now()),
        }
    }

    /// The log.
    pub async fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().await
    }

    /// What was refused may have met what newer keys have sealed: then it is for the next attempt, which has them.
    async fn judge<T>(&self, archive: &Archive, stored: Result<T>) -> Result<T> {
        match stored {
            Err(error) if error.kind() == Kind::Refused => {
                self.check(archive, false).await?;
                Err(error)
            }
            stored => stored,
        }
    }

    /// Fails if the stanza was fenced, or if other keys or archive epochs rule, or other timelines are closed, than
    /// `archive` knows. But for the fence, the next attempt goes on with what it finds then.
    async fn check(&self, archive: &Archive, patient: bool) -> Result<()> {
        let looked = || self.looked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if patient && looked().elapsed() < FENCE_INTERVAL {
            return Ok(());
        }
        let mut log = self.log().await;
        log.refresh().await?;
        *looked() = Instant::now();
        if log.state().fence != self.fence {
            return Err(fenced(log.state()));
        }
        if log.stanza().keys().epoch != archive.stanza.keys().epoch {
            return Err(Error::temporary(rotated(&archive.stanza).to_string()));
        }
        match log.state().archive_epochs == archive.epochs && log.state().closed_timelines == archive.closed {
            true => Ok(()),
            false => Err(Error::temporary(
                "another archive epoch rules now, or a timeline was closed or reopened",
            )),
        }
    }
}

/// Stores `content` as the piece from offset `from` on.
pub fn piece<'a>(
    guard: &'a Guard,
    archive: &'a Archive,
    segment: Segment,
    from: usize,
    content: Vec<u8>,
) -> Storing<'a> {
    Box::pin(async move {
        let stored = archive.put_piece(segment, from as u64, content).await;
        let (_, piece) = guard.judge(archive, stored).await?;
        guard.check(archive, true).await?;
        Ok(Done {
            segment,
            // The last piece does not make a segment: until it is sealed, the server must be able to send it again.
            durable: Lsn(piece.end.min(segment.end(archive.segment_size).0 - 1)),
            piece: Some(piece),
            next: None,
        })
    })
}

/// Pieces that were made one.
pub struct Joined {
    /// The one.
    pub piece: Piece,
    /// Its generation.
    pub generation: u8,
    /// What it takes the place of, in the order of their ranges: these may be deleted.
    pub replaced: Vec<Piece>,
}

/// Pieces that are being made one.
pub type Joining<'a> = Pin<Box<dyn Future<Output = Result<Joined>> + Send + 'a>>;

/// Stores `content`, which is that of the stored pieces `replaced`, as one piece.
pub fn join<'a>(
    guard: &'a Guard,
    archive: &'a Archive,
    segment: Segment,
    content: Vec<u8>,
    replaced: Vec<Piece>,
    generation: u8,
) -> Joining<'a> {
    Box::pin(async move {
        let from = replaced.first().map_or(0, |piece| piece.start) - segment.start(archive.segment_size).0;
        let stored = archive.put_piece(segment, from, content).await;
        let (_, piece) = guard.judge(archive, stored).await?;
        guard.check(archive, true).await?;
        Ok(Joined {
            piece,
            generation,
            replaced,
        })
    })
}

/// A segment that has arrived as a whole.
pub struct Full {
    /// Which.
    pub segment: Segment,
    /// It was there already.
    pub is_known: bool,
    /// All of it, in runs, if it is to be stored as one object.
    pub content: Option<VecDeque<Vec<u8>>>,
    /// Its pieces, in the order of their ranges.
    pub pieces: Vec<Piece>,
    /// Its summary.
    pub summary: Summarizer,
    /// Over all of it, keyed.
    pub hash: blake3::Hasher,
    /// Something of the next one is there already.
    pub next_is_known: bool,
}

/// Makes a full segment one object, or seals its pieces as the segment.
pub fn full<'a>(guard: &'a Guard, archive: &'a Archive, full: Full) -> Storing<'a> {
    Box::pin(async move {
        let segment = full.segment;
        if !full.is_known {
            let stored = store(
                archive,
                full.segment,
                full.summary,
                full.content,
                full.pieces,
                full.hash,
            );
            guard.judge(archive, stored.await).await?;
        }
        guard.check(archive, full.is_known).await?;
        let next = match full.next_is_known {
            false => Known::default(),
            true => Known::of(archive, segment.next()).await?,
        };
        Ok(Done {
            segment,
            durable: segment.end(archive.segment_size),
            piece: None,
            next: Some(next),
        })
    })
}

async fn store(
    archive: &Archive,
    segment: Segment,
    summary: Summarizer,
    content: Option<VecDeque<Vec<u8>>>,
    mut pieces: Vec<Piece>,
    hash: blake3::Hasher,
) -> Result<()> {
    let summary = summary.finish();
    if summary.stopped_at != 0 && !summary.switched {
        return Err(Error::refused(format!(
            "{} cannot be stored as complete: it cannot be read beyond {}: {}",
            segment.name(archive.segment_size),
            Lsn(summary.stopped_at),
            summary.stopped_why
        ))
        .remedy("its pieces stay; the server sends WAL that PostgreSQL could not replay either"));
    }
    pieces.sort_by_key(|piece| (piece.start, piece.end));
    match content {
        None => {
            let id = *hash.finalize().as_bytes();
            archive.put_seal(segment, summary, id, &pieces).await?;
        }
        Some(content) => {
            let stored = archive.put_runs(segment, summary, content).await?;
            // What was there already may be a seal of these very pieces.
            if stored == Stored::New || archive.is_one_object(segment).await? {
                archive.delete_pieces(&pieces).await;
            }
        }
    }
    Ok(())
}
