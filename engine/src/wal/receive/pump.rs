//! Receiving and storing, side by side: what is being stored is acknowledged in order, while WAL keeps coming
//! in as long as there is room for it. Joining many small pieces to a large one is done beside it: no commit
//! waits for that.
//!
//! Memory: the segment that is being stored, sealed and not, and [`AHEAD_BYTES`] of the next one. Segments larger
//! than [`WHOLE_BYTES`] are never held: their pieces are sealed.

use std::collections::BTreeSet;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::current::{Current, Held, many};
use super::origin::Origin;
use super::start::Start;
use super::storing::{self, Done, Full, Guard, Joining, Storing};
use super::{Ended, Options, STATUS, not_the_same, quiet};
use crate::env::has_fault;
use crate::error::{Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;
use crate::replication::wal_stream::WalItem;
use crate::wal::archive::Archive;
use crate::wal::fetch::Piece;
use crate::wal::known::Known;

/// Segments up to this size are held and stored as one object.
const WHOLE_BYTES: u64 = 16 << 20;
/// Held of a segment while the one before it is being stored.
const AHEAD_BYTES: usize = 4 << 20;
/// The largest piece.
const PIECE_BYTES: usize = 4 << 20;

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
        completing: false,
        holds_whole: archive.segment_size <= WHOLE_BYTES && !options.keep_pieces,
    };
    let mut work = Work::default();
    let mut ended = pump.receive(&mut work, stop).await;
    // The server is gone, and what it sent is here: that may be all that is left of it. After a failure of the
    // store, nothing more is stored: what comes after a hole must not look complete.
    if let Err(error) = &ended
        && matches!(error.kind(), Kind::Temporary | Kind::Failed | Kind::Damaged)
        && !pump.store_failed
        && let Err(worse) = pump.drain(&mut work).await
    {
        ended = Err(worse);
    }
    Outcome {
        at: pump.current.segment,
        ended,
        store_failed: pump.store_failed,
    }
}

/// What is under way.
#[derive(Default)]
struct Work<'a> {
    /// A piece or a complete segment.
    storing: Option<Storing<'a>>,
    /// Pieces that become one.
    joining: Option<Joining<'a>>,
    /// Pieces that are deleted, because one took their place.
    deleting: JoinSet<()>,
}

/// Waits for what may not be there.
async fn waited<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
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
    /// A segment is being completed.
    completing: bool,
}

impl<'a> Pump<'a> {
    async fn receive(&mut self, work: &mut Work<'a>, mut stop: watch::Receiver<bool>) -> Result<Ended> {
        let (mut last_heard, mut last_said) = (Instant::now(), Instant::now());
        loop {
            self.begin_work(work, false);
            self.take_pending()?;
            if self.origin.is_over(self.current.segment) {
                self.drain(work).await?;
                self.origin.stop().await;
                return Ok(Ended::Next);
            }
            let room = self.has_room();
            if !room {
                last_heard = Instant::now();
            }
            let wake = self.wake_at(last_said, work.storing.is_some());
            // In this order, so that it is always the same: what ends by itself, and what is heard, which may never end.
            tokio::select! {
                biased;
                done = waited(&mut work.storing) => {
                    work.storing = None;
                    self.finished(done)?;
                    self.say(false).await?;
                    last_said = Instant::now();
                }
                joined = waited(&mut work.joining) => self.joined(work, joined)?,
                Some(_) = work.deleting.join_next() => {}
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
                    self.drain(work).await?;
                    self.say(false).await?;
                    self.origin.stop().await;
                    return Ok(Ended::Stopped);
                }
                item = self.origin.next(), if room => {
                    last_heard = Instant::now();
                    if let Some(ended) = self.heard(item?, work).await? {
                        return Ok(ended);
                    }
                }
            }
        }
    }

    /// Takes what the stream brought; how receiving has ended, if it has.
    async fn heard(&mut self, item: WalItem, work: &mut Work<'a>) -> Result<Option<Ended>> {
        match item {
            WalItem::Data { start, bytes } => {
                self.options.taken.add(bytes.len() as u64);
                self.take(start, bytes)?;
            }
            WalItem::Idle { wants_answer: true, .. } => self.say(false).await?,
            WalItem::Idle { .. } => {}
            WalItem::TimelineEnd => {
                let next = self.origin.timeline_ended().await?;
                self.drain(work).await?;
                self.compare_beginning().await?;
                self.origin.all_stored();
                tracing::info!(
                    "timeline {} has ended at {}; going on with {next}",
                    self.current.segment.timeline,
                    self.durable
                );
                return Ok(Some(Ended::Next));
            }
        }
        Ok(None)
    }

    fn has_room(&self) -> bool {
        let current = &self.current;
        let limit = match (self.holds_whole, self.completing) {
            (true, false) => usize::MAX,
            (true, true) => AHEAD_BYTES,
            (false, _) => 2 * PIECE_BYTES,
        };
        let fits = current.is_known_whole() || current.buffer.len() < limit;
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
        let start = self.current.segment.start(self.archive.segment_size);
        let received = Lsn(start.0 + self.current.received() as u64);
        let flushed = match counts && is_compared {
            true if has_fault("received") => received,
            true => self.durable,
            false => Lsn(0),
        };
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
            return Err(not_the_same(Lsn(begin.0 + from as u64), Lsn(begin.0 + to as u64)));
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
        }
        current.buffer.extend(&bytes);
        if !self.holds_whole {
            // What is stored already need not be held.
            let known = current.stored.saturating_sub(current.base).min(current.buffer.len());
            current.buffer.let_go(known);
            current.base += known;
        }
        if current.received() > current.stored && current.waiting_since.is_none() {
            current.waiting_since = Some(Instant::now());
        }
        Ok(())
    }

    /// Begins what it is time for; `all` means: whatever is there.
    fn begin_work(&mut self, work: &mut Work<'a>, all: bool) {
        if work.storing.is_none() {
            work.storing = self.next_work(work.joining.is_none(), all);
        }
        if !all && work.joining.is_none() {
            work.joining = self.join_many();
        }
    }

    /// The next thing to store. A segment is completed while nothing is done to its pieces.
    fn next_work(&mut self, may_complete: bool, all: bool) -> Option<Storing<'a>> {
        let size = self.archive.segment_size as usize;
        let is_full = self.current.received() == size && (self.holds_whole || self.current.stored == size);
        if is_full && may_complete {
            return Some(self.complete());
        }
        // Of a full one, what waits is stored as a piece meanwhile: commits wait for it.
        self.is_due(all).then(|| self.piece())
    }

    /// Whether what waits is to be stored now.
    fn is_due(&self, all: bool) -> bool {
        let (received, stored) = (self.current.received(), self.current.stored);
        let waiting = received.saturating_sub(stored);
        let since = self.current.waiting_since;
        let due = since.is_some_and(|since| since.elapsed() >= self.options.flush_interval);
        let enough = waiting as u64 >= self.options.piece_size
            || waiting >= PIECE_BYTES
            || received as u64 == self.archive.segment_size;
        waiting > 0 && (all || due || self.options.synchronous || enough)
    }

    /// Stores what waits.
    fn piece(&mut self) -> Storing<'a> {
        let segment = self.current.segment;
        let from = self.current.stored;
        let at = from - self.current.base;
        let content = self.current.buffer.copy(at..at + PIECE_BYTES);
        let end = from + content.len();
        self.current.stored = end;
        if end == self.current.received() {
            self.current.waiting_since = None;
        }
        if !self.holds_whole {
            self.current.buffer.let_go(content.len());
            self.current.base = end;
        }
        self.current.pieces.push(Held {
            piece: self.archive.piece(segment, from as u64, end as u64),
            generation: 0,
            is_stored: false,
        });
        storing::piece(self.guard, self.archive, segment, from, content)
    }

    /// Makes one of many stored pieces. Large ones stay as they are: what is stored at once is bounded.
    fn join_many(&self) -> Option<Joining<'a>> {
        let (received, stored) = (self.current.received(), self.current.stored);
        // After a start, what is stored comes again first, and is compared.
        if !self.holds_whole || received < stored || received as u64 == self.archive.segment_size {
            return None;
        }
        let pieces = &self.current.pieces;
        let stored = pieces.iter().take_while(|held| held.is_stored).count();
        let (count, generation) = many(&pieces[..stored]);
        let joined = &pieces[stored - count..stored];
        let segment = self.current.segment;
        let base = segment.start(self.archive.segment_size).0;
        let from = joined.iter().map(|held| held.piece.start).min()? - base;
        let to = joined.iter().map(|held| held.piece.end).max()? - base;
        if to - from > PIECE_BYTES as u64 {
            return None;
        }
        let base = self.current.base;
        let content = self.current.buffer.copy(from as usize - base..to as usize - base);
        let replaced = joined.iter().map(|held| held.piece.clone()).collect();
        Some(storing::join(
            self.guard,
            self.archive,
            segment,
            content,
            replaced,
            generation,
        ))
    }

    /// The segment is full: it becomes one object, or its pieces are sealed.
    fn complete(&mut self) -> Storing<'a> {
        let next = Current::new(self.archive, self.current.segment.next());
        let next_is_known = self.there.contains(&next.segment.number);
        let is_known = self.current.is_known_whole();
        let done = std::mem::replace(&mut self.current, next);
        self.completing = true;
        let full = Full {
            segment: done.segment,
            is_known,
            content: (self.holds_whole && !is_known).then(|| done.buffer.into_runs()),
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
        let done = done?;
        self.durable = self.durable.max(done.durable);
        if let Some(piece) = done.piece
            && done.segment == self.current.segment
            && let Some(held) = self.current.pieces.iter_mut().find(|held| held.piece == piece)
        {
            held.is_stored = true;
        }
        if let Some(next) = done.next {
            self.completing = false;
            tracing::debug!("{} is complete", done.segment.name(self.archive.segment_size));
            if self.current.known.is_none() {
                self.current.know(next);
            }
        }
        Ok(())
    }

    fn joined(&mut self, work: &mut Work<'a>, joined: Result<storing::Joined>) -> Result<()> {
        work.joining = None;
        self.store_failed |= joined.is_err();
        let joined = joined?;
        let pieces = &mut self.current.pieces;
        let at = pieces
            .iter()
            .position(|held| Some(&held.piece) == joined.replaced.first());
        if let Some(at) = at {
            let kept = joined.piece.clone();
            let one = Held {
                piece: joined.piece,
                generation: joined.generation,
                is_stored: true,
            };
            pieces.splice(at..at + joined.replaced.len(), [one]);
            let archive = self.archive.clone();
            let replaced: Vec<Piece> = joined.replaced.into_iter().filter(|p| *p != kept).collect();
            work.deleting
                .spawn(async move { archive.delete_pieces(&replaced).await });
        }
        Ok(())
    }

    /// Of a segment that the repository has as a whole, only the beginning has come: it must be the same.
    async fn compare_beginning(&mut self) -> Result<()> {
        let current = &self.current;
        if !current.is_known_whole() || current.received() == 0 {
            return Ok(());
        }
        if !self.archive.stanza.keys().can_read() {
            // Its id is that of all of it. What was received comes once more, at the beginning of the next timeline.
            tracing::warn!(
                "{} is stored as a whole, and only its beginning was received: this host's key can write only, and the two \
                 are not compared",
                current.segment.name(self.archive.segment_size)
            );
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
    async fn drain(&mut self, work: &mut Work<'a>) -> Result<()> {
        loop {
            self.take_pending()?;
            self.begin_work(work, true);
            if work.storing.is_some() {
                let done = waited(&mut work.storing).await;
                work.storing = None;
                self.finished(done)?;
            } else if work.joining.is_some() {
                let joined = waited(&mut work.joining).await;
                self.joined(work, joined)?;
            } else {
                while work.deleting.join_next().await.is_some() {}
                return Ok(());
            }
        }
    }
}
