//! Receiving and storing, side by side: one thing is stored at a time, in order, while WAL keeps coming in
//! as long as there is room for it.
//!
//! Memory: the segment that is being filled and the one that is being stored. Segments larger than
//! [`WHOLE_BYTES`] are never held: their pieces are sealed.

use std::collections::BTreeSet;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::Instant;

use super::known::Known;
use super::origin::Origin;
use super::start::Start;
use super::storing::{self, Done, Full, Guard, Storing};
use super::{Ended, Options, STATUS, quiet};
use crate::error::{Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;
use crate::replication::wal_stream::WalItem;
use crate::wal::archive::Archive;
use crate::wal::fetch::Piece;
use crate::wal::summary::Summarizer;

/// Segments up to this size are held and stored as one object.
const WHOLE_BYTES: u64 = 16 << 20;
/// The largest piece.
const PIECE_BYTES: usize = 4 << 20;
/// Pieces of about one size after which one takes their place.
const MERGE_PIECES: usize = 32;

/// A stored piece, and how many generations of pieces it took the place of.
struct Held {
    piece: Piece,
    generation: u8,
}

/// The segment that is being received.
struct Current {
    segment: Segment,
    /// Bytes from `base` on.
    buffer: Vec<u8>,
    /// Offset in the segment of the buffer's first byte.
    base: usize,
    /// Offset up to which it is stored or being stored.
    stored: usize,
    /// What was stored by an earlier run; `None` while that is being found out.
    known: Option<Known>,
    /// Since when something waits.
    waiting_since: Option<Instant>,
    pieces: Vec<Held>,
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
            known: None,
            waiting_since: None,
            pieces: Vec::new(),
            summary: Summarizer::new(segment.start(archive.segment_size), archive.segment_size),
            hash: blake3::Hasher::new_keyed(&archive.stanza.keys().id_key),
        }
    }

    fn know(&mut self, mut known: Known) {
        self.stored = known.end;
        let pieces = std::mem::take(&mut known.pieces);
        self.pieces = pieces.into_iter().map(|piece| Held { piece, generation: 0 }).collect();
        self.known = Some(known);
    }

    fn received(&self) -> usize {
        self.base + self.buffer.len()
    }

    fn is_known_whole(&self) -> bool {
        self.known.as_ref().is_some_and(|known| known.is_whole)
    }
}

/// How receiving ended.
pub struct Outcome {
    /// The segment that it has got to.
    pub at: Segment,
    /// How.
    pub ended: Result<Ended>,
    /// The store failed, not where WAL comes from.
    pub store_failed: bool,
}

/// Receives until `origin` ends or `stop` says so.
pub async fn run<'a>(
    guard: &'a Guard,
    archive: &'a Archive,
    options: &'a Options,
    origin: Origin,
    start: Start,
    stop: watch::Receiver<bool>,
) -> Outcome {
    let mut current = Current::new(archive, start.segment);
    let durable = start.durable(archive.segment_size);
    current.know(start.known);
    let mut pump = Pump {
        guard,
        archive,
        options,
        origin,
        current,
        durable,
        pending: None,
        there: start.there,
        store_failed: false,
        spare: Vec::new(),
        holds_whole: archive.segment_size <= WHOLE_BYTES && !options.keep_pieces,
    };
    let mut storing: Option<Storing<'a>> = None;
    let mut ended = pump.receive(&mut storing, stop).await;
    // The server is gone, and what it sent is here: that may be all that is left of it. After a failure of the
    // store, nothing more is stored: what comes after a hole must not look complete.
    if let Err(error) = &ended
        && matches!(error.kind(), Kind::Temporary | Kind::Failed | Kind::Damaged)
        && !pump.store_failed
        && let Err(worse) = pump.drain(storing).await
    {
        ended = Err(worse);
    }
    Outcome {
        at: pump.current.segment,
        ended,
        store_failed: pump.store_failed,
    }
}

/// How many of the last pieces are to be replaced by one, and its generation: a run of one generation, and
/// the run before it if that makes one more of its own.
fn many(pieces: &[Held]) -> (usize, u8) {
    let (mut count, mut generation) = (0, 0);
    loop {
        let rest = pieces.iter().rev().skip(count);
        let run = rest.take_while(|held| held.generation == generation).count();
        if run < MERGE_PIECES - 1 {
            return (count, generation);
        }
        count += run;
        generation += 1;
    }
}

struct Pump<'a> {
    guard: &'a Guard,
    archive: &'a Archive,
    options: &'a Options,
    origin: Origin,
    current: Current,
    durable: Lsn,
    /// WAL of the next segment that came with the end of this one.
    pending: Option<(Lsn, Bytes)>,
    /// Segments of this timeline of which the repository had anything at the start.
    there: BTreeSet<u64>,
    store_failed: bool,
    holds_whole: bool,
    /// A buffer that was used for a segment before.
    spare: Vec<u8>,
}

impl<'a> Pump<'a> {
    async fn receive(&mut self, storing: &mut Option<Storing<'a>>, mut stop: watch::Receiver<bool>) -> Result<Ended> {
        let (mut last_heard, mut last_said) = (Instant::now(), Instant::now());
        loop {
            if storing.is_none() {
                *storing = self.next_work(false);
            }
            self.take_pending()?;
            if self.origin.is_over(self.current.segment) {
                self.drain(storing.take()).await?;
                self.origin.stop().await;
                return Ok(Ended::Next);
            }
            let room = self.has_room();
            if !room {
                last_heard = Instant::now();
            }
            let wake = self.wake_at(last_said, storing.is_some());
            tokio::select! {
                done = async { match storing.as_mut() { Some(work) => work.await, None => std::future::pending().await } } => {
                    *storing = None;
                    self.finished(done)?;
                    self.say(false).await?;
                    last_said = Instant::now();
                }
                item = self.origin.next(), if room => {
                    last_heard = Instant::now();
                    match item? {
                        WalItem::Data { start, bytes } => self.take(start, bytes)?,
                        WalItem::Idle { wants_answer: true, .. } => {
                            self.say(false).await?;
                            last_said = Instant::now();
                        }
                        WalItem::Idle { .. } => {}
                        WalItem::TimelineEnd => {
                            let next = self.origin.timeline_ended().await?;
                            self.drain(storing.take()).await?;
                            self.compare_beginning().await?;
                            self.origin.all_stored();
                            tracing::info!(
                                "timeline {} has ended at {}; going on with {next}",
                                self.current.segment.timeline,
                                self.durable
                            );
                            return Ok(Ended::Next);
                        }
                    }
                }
                () = tokio::time::sleep_until(wake) => {
                    if last_said.elapsed() >= STATUS {
                        self.say(true).await?;
                        last_said = Instant::now();
                    }
                    if room && self.origin.is_server() {
                        quiet(last_heard)?;
                    }
                }
                _ = stop.wait_for(|stop| *stop) => {
                    self.drain(storing.take()).await?;
                    self.say(false).await?;
                    self.origin.stop().await;
                    return Ok(Ended::Stopped);
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        let current = &self.current;
        let fits = self.holds_whole || current.is_known_whole() || current.buffer.len() < 2 * PIECE_BYTES;
        let is_open = current.known.is_some() && current.received() < self.archive.segment_size as usize;
        self.pending.is_none() && is_open && fits
    }

    fn take_pending(&mut self) -> Result<()> {
        while self.pending.is_some()
            && self.current.known.is_some()
            && self.current.received() < self.archive.segment_size as usize
        {
            if let Some((start, bytes)) = self.pending.take() {
                self.take(start, bytes)?;
            }
        }
        Ok(())
    }

    /// Tells the server what was received, and what is flushed: nothing if no slot remembers it, or while
    /// what is stored has not been compared.
    async fn say(&mut self, wants_answer: bool) -> Result<()> {
        let counts = self.origin.counts(self.options);
        let is_compared = self.current.known.as_ref().is_none_or(Known::is_compared);
        let flushed = if counts && is_compared { self.durable } else { Lsn(0) };
        let start = self.current.segment.start(self.archive.segment_size);
        let received = Lsn(start.0 + self.current.received() as u64);
        self.origin.report(received, flushed, wants_answer).await
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
        let size = self.archive.segment_size as usize;
        let at = self.current.received();
        let begin = self.current.segment.start(self.archive.segment_size);
        let expected = Lsn(begin.0 + at as u64);
        if start != expected {
            return Err(Error::failed(format!(
                "the server sent WAL of {start}, expected {expected}"
            )));
        }
        let rest = bytes.split_off(bytes.len().min(size - at));
        if !rest.is_empty() {
            self.pending = Some((Lsn(start.0 + bytes.len() as u64), rest));
        }
        let current = &mut self.current;
        let known = current.known.get_or_insert_default();
        if let Err((from, to)) = known.compare(at, &bytes) {
            return Err(Error::refused(format!(
                "the server sends other WAL from {} to {} than what is stored: it was set back or replaced",
                Lsn(begin.0 + from as u64),
                Lsn(begin.0 + to as u64)
            ))
            .remedy("nothing was overwritten; find out which history is the right one, and promote the server to a new timeline"));
        }
        if known.is_whole {
            // It is there: nothing of it is held.
            current.hash.update(&bytes);
            current.base += bytes.len();
            return Ok(());
        }
        current.summary.feed(&bytes);
        if !self.holds_whole {
            current.hash.update(&bytes);
        } else if current.buffer.capacity() == 0 {
            current.buffer = std::mem::take(&mut self.spare);
            current.buffer.reserve_exact(size);
        }
        current.buffer.extend_from_slice(&bytes);
        if !self.holds_whole {
            // What is stored already need not be held.
            let known = current.stored.saturating_sub(current.base).min(current.buffer.len());
            current.buffer.drain(..known);
            current.base += known;
        }
        if current.received() > current.stored && current.waiting_since.is_none() {
            current.waiting_since = Some(Instant::now());
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
        let enough = waiting as u64 >= self.options.piece_size || waiting >= PIECE_BYTES || received == size;
        (all || due || self.options.synchronous || enough).then(|| self.piece())
    }

    /// Stores what waits; together with the pieces before it, if there are many.
    fn piece(&mut self) -> Storing<'a> {
        let base = self.current.segment.start(self.archive.segment_size).0;
        let (count, generation) = match self.holds_whole {
            true => many(&self.current.pieces),
            false => (0, 0),
        };
        let pieces = &self.current.pieces;
        let merged = pieces[pieces.len() - count..]
            .iter()
            .map(|held| (held.piece.start - base) as usize);
        let merged = merged.fold(self.current.stored, usize::min);
        // Large pieces stay as they are: what is stored at once is bounded.
        let (count, generation, from) = match self.current.received() - merged <= PIECE_BYTES {
            true => (count, generation, merged),
            false => (0, 0, self.current.stored),
        };
        let at = self.current.pieces.len() - count;
        let replaced: Vec<Piece> = self.current.pieces.drain(at..).map(|held| held.piece).collect();
        let content = &self.current.buffer[from - self.current.base..];
        let content = content[..content.len().min(PIECE_BYTES)].to_vec();
        let end = from + content.len();
        self.current.stored = end;
        if end == self.current.received() {
            self.current.waiting_since = None;
        }
        if !self.holds_whole {
            self.current.buffer.drain(..content.len());
            self.current.base = end;
        }
        self.current.pieces.push(Held {
            // Its object's name is known once it is stored.
            piece: Piece {
                start: base + from as u64,
                end: base + end as u64,
                object: String::new(),
            },
            generation,
        });
        storing::piece(self.guard, self.archive, self.current.segment, from, content, replaced)
    }

    /// The segment is full: it becomes one object, or its pieces are sealed.
    fn complete(&mut self) -> Storing<'a> {
        let next = Current::new(self.archive, self.current.segment.next());
        let next_is_known = self.there.contains(&next.segment.number);
        let is_known = self.current.is_known_whole();
        let done = std::mem::replace(&mut self.current, next);
        let full = Full {
            segment: done.segment,
            is_known,
            content: (self.holds_whole && !is_known).then_some(done.buffer),
            pieces: done.pieces.into_iter().map(|held| held.piece).collect(),
            summary: done.summary,
            hash: done.hash,
            next_is_known,
        };
        if !next_is_known {
            self.current.know(Known::default());
        }
        storing::full(self.guard, self.archive, full)
    }

    fn finished(&mut self, done: Result<Done>) -> Result<()> {
        self.store_failed |= done.is_err();
        let mut done = done?;
        if let Some(mut spare) = done.spare.take() {
            spare.clear();
            self.spare = spare;
        }
        self.durable = self.durable.max(done.durable);
        if let Some(piece) = done.piece
            && done.segment == self.current.segment
            && let Some(held) = self.current.pieces.last_mut()
        {
            held.piece = piece;
        }
        if let Some(next) = done.next {
            tracing::debug!("{} is complete", done.segment.name(self.archive.segment_size));
            if self.current.known.is_none() {
                self.current.know(next);
            }
        }
        Ok(())
    }

    /// Of a segment that the repository has as a whole, only the beginning has come: it must be the same.
    async fn compare_beginning(&mut self) -> Result<()> {
        let current = &self.current;
        if !current.is_known_whole() || current.received() == 0 {
            return Ok(());
        }
        let stored = self.archive.whole_segment(current.segment).await?.unwrap_or_default();
        let mut hash = blake3::Hasher::new_keyed(&self.archive.stanza.keys().id_key);
        hash.update(stored.get(..current.received()).unwrap_or_default());
        match hash.finalize() == current.hash.finalize() {
            true => Ok(()),
            false => Err(Error::refused(format!(
                "what was received of {} is not what is stored of it",
                current.segment.name(self.archive.segment_size)
            ))
            .remedy("nothing was overwritten; keep the spool, and find out which history is the right one")),
        }
    }

    /// Stores everything that was received.
    async fn drain(&mut self, storing: Option<Storing<'a>>) -> Result<()> {
        let mut next = storing;
        loop {
            self.take_pending()?;
            match next.take().or_else(|| self.next_work(true)) {
                Some(work) => self.finished(work.await)?,
                None => return Ok(()),
            }
        }
    }
}
