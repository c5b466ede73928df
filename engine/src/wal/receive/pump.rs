//! Receiving and storing, side by side: one thing is stored at a time, in order, while WAL keeps coming in
//! as long as there is room for it.
//!
//! Memory: the segment that is being filled and the one that is being stored. Segments larger than
//! [`WHOLE_BYTES`] are never held: their pieces are sealed.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::Instant;

use super::start::Start;
use super::{Ended, Options};
use crate::commit::Log;
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;
use crate::replication::wal_stream::{WalItem, WalStream};
use crate::wal::archive::Archive;
use crate::wal::summary::Summarizer;

/// Segments up to this size are held and stored as one object.
const WHOLE_BYTES: u64 = 16 << 20;
/// Pieces of a segment after which one piece from its beginning takes their place.
const MERGE_PIECES: usize = 32;
/// How often the server hears from us at least.
const STATUS: Duration = Duration::from_secs(10);
/// A server that is silent for so long, although it was asked for an answer, is gone.
const SILENCE: Duration = Duration::from_secs(60);

/// What was stored.
struct Done {
    segment: Segment,
    /// Up to where WAL is durable now.
    durable: Lsn,
    /// The piece, if it was one.
    piece: Option<(u64, u64, String)>,
    /// The segment is complete.
    whole: bool,
}

type Storing<'a> = Pin<Box<dyn Future<Output = Result<Done>> + Send + 'a>>;

/// The segment that is being received.
struct Current {
    segment: Segment,
    /// Bytes from `base` on.
    buffer: Vec<u8>,
    /// Offset in the segment of the buffer's first byte.
    base: usize,
    /// Offset up to which pieces are stored or being stored.
    stored: usize,
    /// What was stored by an earlier run and must come again.
    have: Vec<u8>,
    /// Since when something waits.
    waiting_since: Option<Instant>,
    pieces: Vec<(u64, u64, String)>,
    summary: Summarizer,
    /// Of the whole segment.
    hash: blake3::Hasher,
}

impl Current {
    fn new(archive: &Archive, segment: Segment) -> Self {
        Self {
            segment,
            buffer: Vec::new(),
            base: 0,
            stored: 0,
            have: Vec::new(),
            waiting_since: None,
            pieces: Vec::new(),
            summary: Summarizer::new(segment.start(archive.segment_size), archive.segment_size),
            hash: blake3::Hasher::new_keyed(&archive.stanza.keys().id_key),
        }
    }

    fn received(&self) -> usize {
        self.base + self.buffer.len()
    }
}

/// Receives until the stream ends or `stop` says so.
pub async fn run(
    log: &mut Log,
    archive: &Archive,
    options: &Options,
    stream: WalStream,
    start: Start,
    stop: watch::Receiver<bool>,
) -> Result<Ended> {
    let mut current = Current::new(archive, start.segment);
    let durable = start.durable(archive.segment_size);
    current.stored = start.have.len();
    current.have = start.have;
    current.pieces = start.pieces;
    Pump {
        archive,
        options,
        stream,
        current,
        durable,
        pending: None,
        holds_whole: archive.segment_size <= WHOLE_BYTES && !options.keep_pieces,
    }
    .run(log, stop)
    .await
}

struct Pump<'a> {
    archive: &'a Archive,
    options: &'a Options,
    stream: WalStream,
    current: Current,
    durable: Lsn,
    /// WAL of the next segment that came with the end of this one.
    pending: Option<(Lsn, Bytes)>,
    holds_whole: bool,
}

impl<'a> Pump<'a> {
    async fn run(mut self, log: &mut Log, mut stop: watch::Receiver<bool>) -> Result<Ended> {
        let size = self.archive.segment_size as usize;
        let mut storing: Option<Storing<'a>> = None;
        let (mut last_heard, mut last_said) = (Instant::now(), Instant::now());
        loop {
            if storing.is_none() {
                storing = self.next_work(false);
            }
            if let Some((start, bytes)) = self.pending.take_if(|_| self.current.received() < size) {
                self.take(start, bytes)?;
                continue;
            }
            let wake = self.wake_at(last_said, storing.is_some());
            let room = self.pending.is_none() && self.current.received() < size;
            tokio::select! {
                done = async { match storing.as_mut() { Some(work) => work.await, None => std::future::pending().await } } => {
                    storing = None;
                    self.finished(log, done?).await?;
                    last_said = Instant::now();
                }
                item = self.stream.next(), if room => {
                    last_heard = Instant::now();
                    match item? {
                        WalItem::Data { start, bytes } => self.take(start, bytes)?,
                        WalItem::Idle { wants_answer: true, .. } => {
                            self.stream.report(self.reported()).await?;
                            last_said = Instant::now();
                        }
                        WalItem::Idle { .. } => {}
                        WalItem::TimelineEnd { next } => {
                            self.drain(log, storing.take()).await?;
                            let next = next.map_or("a new one".to_owned(), |(timeline, at)| format!("timeline {timeline} from {at}"));
                            tracing::info!("timeline {} has ended at {}; going on with {next}", self.current.segment.timeline, self.durable);
                            return Ok(Ended::Next);
                        }
                    }
                }
                () = tokio::time::sleep_until(wake) => {
                    if last_said.elapsed() >= STATUS {
                        self.stream.ask(self.reported()).await?;
                        last_said = Instant::now();
                    }
                    if room && last_heard.elapsed() > SILENCE {
                        return Err(Error::temporary("the server has been silent for a minute"));
                    }
                }
                changed = stop.changed() => {
                    if changed.is_err() || *stop.borrow() {
                        self.drain(log, storing.take()).await?;
                        self.stream.report(self.reported()).await?;
                        self.stream.stop().await;
                        return Ok(Ended::Stopped);
                    }
                }
            }
        }
    }

    /// What the server is told to be flushed: nothing if no slot remembers it.
    fn reported(&self) -> Lsn {
        match self.options.slot.is_some() || self.options.synchronous {
            true => self.durable,
            false => Lsn(0),
        }
    }

    fn wake_at(&self, last_said: Instant, is_storing: bool) -> Instant {
        let status = last_said + STATUS;
        match self.current.waiting_since {
            Some(since) if !is_storing => status.min(since + self.options.flush_interval),
            _ => status,
        }
    }

    /// Takes bytes from the stream; what belongs to the next segment waits until this one is stored.
    fn take(&mut self, start: Lsn, mut bytes: Bytes) -> Result<()> {
        let size = self.archive.segment_size;
        let expected = Lsn(self.current.segment.start(size).0 + self.current.received() as u64);
        if start != expected {
            return Err(Error::failed(format!(
                "the server sent WAL of {start}, expected {expected}"
            )));
        }
        let at = self.current.received();
        let rest = bytes.split_off(bytes.len().min(size as usize - at));
        if !rest.is_empty() {
            self.pending = Some((Lsn(start.0 + bytes.len() as u64), rest));
        }
        let again = self.current.have.len().saturating_sub(at).min(bytes.len());
        if self.current.have[at.min(self.current.have.len())..][..again] != bytes[..again] {
            return Err(Error::refused(format!(
                "the server sends other WAL at {start} than what is stored: it was set back or replaced"
            ))
            .remedy("nothing was overwritten; find out which history is the right one, and promote the server to a new timeline"));
        }
        self.current.summary.feed(&bytes);
        if !self.holds_whole {
            self.current.hash.update(&bytes);
        } else if self.current.buffer.capacity() == 0 {
            self.current.buffer.reserve_exact(size as usize);
        }
        self.current.buffer.extend_from_slice(&bytes);
        if !self.holds_whole {
            // What is stored already need not be held.
            let known = self
                .current
                .stored
                .saturating_sub(self.current.base)
                .min(self.current.buffer.len());
            self.current.buffer.drain(..known);
            self.current.base += known;
        }
        if self.current.received() > self.current.stored && self.current.waiting_since.is_none() {
            self.current.waiting_since = Some(Instant::now());
        }
        Ok(())
    }

    /// The next thing to store, if it is time for one; `all` means: whatever is there.
    fn next_work(&mut self, all: bool) -> Option<Storing<'a>> {
        let size = self.archive.segment_size as usize;
        let (received, stored) = (self.current.received(), self.current.stored);
        if received == size && (self.holds_whole || stored == size) {
            return Some(self.complete());
        }
        let waiting = received.checked_sub(stored).filter(|&n| n > 0)?;
        let due = self
            .current
            .waiting_since
            .is_some_and(|since| since.elapsed() >= self.options.flush_interval);
        let now =
            all || due || self.options.synchronous || waiting as u64 >= self.options.piece_size || received == size;
        now.then(|| self.piece())
    }

    fn piece(&mut self) -> Storing<'a> {
        let (archive, segment) = (self.archive, self.current.segment);
        let merge = self.holds_whole && self.current.pieces.len() >= MERGE_PIECES;
        let from = if merge { 0 } else { self.current.stored };
        let content = self.current.buffer[from - self.current.base..].to_vec();
        let end = from + content.len();
        self.current.stored = end;
        self.current.waiting_since = None;
        if !self.holds_whole {
            self.current.buffer.clear();
            self.current.base = end;
        }
        Box::pin(async move {
            let start = segment.start(archive.segment_size).0 + from as u64;
            let len = content.len() as u64;
            let (_, object) = archive.put_piece(segment, from as u64, content).await?;
            Ok(Done {
                segment,
                durable: Lsn(start + len),
                piece: Some((start, start + len, object)),
                whole: false,
            })
        })
    }

    /// The segment is full: it becomes one object, or its pieces are sealed.
    fn complete(&mut self) -> Storing<'a> {
        let archive = self.archive;
        let next = Current::new(archive, self.current.segment.next());
        let done = std::mem::replace(&mut self.current, next);
        let holds_whole = self.holds_whole;
        Box::pin(async move {
            let segment = done.segment;
            let summary = done.summary.finish();
            if summary.stopped_at != 0 && !summary.switched {
                return Err(Error::refused(format!(
                    "{} cannot be stored as complete: it cannot be read beyond {}: {}",
                    segment.name(archive.segment_size),
                    Lsn(summary.stopped_at),
                    summary.stopped_why
                ))
                .remedy("its pieces stay; the server sends WAL that PostgreSQL could not replay either"));
            }
            let mut pieces = done.pieces;
            if holds_whole {
                archive.put_whole(segment, summary, done.buffer).await?;
                archive.delete_pieces(&pieces).await;
            } else {
                pieces.sort();
                let id = *done.hash.finalize().as_bytes();
                archive.put_seal(segment, summary, id, &pieces).await?;
            }
            Ok(Done {
                segment,
                durable: segment.end(archive.segment_size),
                piece: None,
                whole: true,
            })
        })
    }

    async fn finished(&mut self, log: &mut Log, done: Done) -> Result<()> {
        self.durable = self.durable.max(done.durable);
        if let Some((start, end, object)) = done.piece
            && done.segment == self.current.segment
        {
            let (inside, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.current.pieces)
                .into_iter()
                .partition(|(s, e, _)| *s >= start && *e <= end);
            self.current.pieces = rest;
            if !self.options.keep_pieces && self.holds_whole {
                let inside: Vec<_> = inside.into_iter().filter(|(_, _, name)| *name != object).collect();
                self.archive.delete_pieces(&inside).await;
            }
            self.current.pieces.push((start, end, object));
        }
        self.stream.report(self.reported()).await?;
        if done.whole {
            self.archive.check_fence(log).await?;
            tracing::debug!("{} is complete", done.segment.name(self.archive.segment_size));
        }
        Ok(())
    }

    /// Stores everything that was received.
    async fn drain(&mut self, log: &mut Log, storing: Option<Storing<'a>>) -> Result<()> {
        let mut next = storing;
        loop {
            match next.take().or_else(|| self.next_work(true)) {
                Some(work) => {
                    let done = work.await?;
                    self.durable = self.durable.max(done.durable);
                    if done.whole {
                        self.archive.check_fence(log).await?;
                    }
                    if let Some(piece) = done.piece.filter(|_| done.segment == self.current.segment) {
                        self.current.pieces.push(piece);
                    }
                }
                None => return Ok(()),
            }
        }
    }
}
