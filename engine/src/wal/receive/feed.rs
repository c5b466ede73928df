//! From the server into the spool: one half of a receiver with a spool. The other half, [`super::run`]'s
//! pump, takes WAL from there into the repository at its own pace.
//!
//! What always holds: the server is told that WAL is flushed once it is synced in the spool, never before; a
//! store that is away holds up nothing until the spool is full.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::spool::{Cluster, Position, Spool, Writer};
use super::start::{self, Lessons};
use super::storing::Guard;
use super::{Ended, Options, STATUS, Server, check_not_behind, connect, is_removed, learn_removed, quiet};
use crate::error::{Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment};
use crate::replication::wal_stream::{Told, WalItem, WalStream};
use crate::wal::archive::Archive;

/// Received bytes that may wait for the disk.
const PENDING_BYTES: usize = 2 << 20;

/// What others hear of the feed.
pub struct Heard {
    /// Connections so far.
    pub connected: watch::Sender<u64>,
    /// What the server was told to be durable.
    pub told: watch::Sender<Told>,
}

/// One connection's work. `repository` is asked only where the spool is empty.
pub async fn once(
    spool: &Arc<Spool>,
    repository: &mut watch::Receiver<Option<Arc<Guard>>>,
    options: &Options,
    lessons: &mut Lessons,
    heard: &Heard,
    mut stop: watch::Receiver<bool>,
) -> Result<Ended> {
    let mut server = tokio::select! {
        server = connect(options, options.slot.as_deref()) => server?,
        _ = stop.wait_for(|stop| *stop) => return Ok(Ended::Stopped),
    };
    let cluster = Cluster {
        system_identifier: server.identity.system_identifier,
        segment_size: server.segment_size,
    };
    if spool.cluster().is_some_and(|known| known != cluster) {
        return Err(Error::refused(format!(
            "the server's system identifier is {}, and the spool holds WAL of another cluster",
            cluster.system_identifier
        ))
        .remedy("connect to the right server, or give this stanza a spool folder of its own"));
    }
    let timeline = server.identity.timeline;
    let history = match &server.history {
        Some(content) => {
            spool.put_history(timeline, content)?;
            History::parse(timeline, content)?
        }
        None => History {
            timeline,
            ancestors: Vec::new(),
        },
    };
    let (from, why) = match spool.end() {
        Some(end) => (goes_on(spool, &server, &history, end)?, None),
        None => {
            let guard = tokio::select! {
                ready = repository.wait_for(Option::is_some) => ready.ok().and_then(|guard| guard.clone()),
                _ = stop.wait_for(|stop| *stop) => return Ok(Ended::Stopped),
            };
            let guard = guard.ok_or_else(|| Error::failed("the repository is not opened"))?;
            let (from, why) = from_repository(&guard, &mut server, &history, options, lessons).await?;
            (from, Some(why))
        }
    };
    check_open(repository, cluster, from).await?;
    tracing::info!(
        "receiving WAL from {} on timeline {} into the spool",
        from.lsn,
        from.timeline
    );
    let seam = match why {
        None => Seam::of(spool, from, cluster.segment_size)?,
        Some(_) => None,
    };
    let begin = seam.as_ref().map_or(from.lsn, |seam| seam.begin);
    let slot = options.slot.as_deref();
    let started = WalStream::start(server.connection, slot, begin, from.timeline).await;
    let mut has_received = false;
    let received = match started {
        Ok(mut stream) => {
            stream.tell(heard.told.clone());
            heard.connected.send_modify(|count| *count += 1);
            let writer = spool.writer(cluster, from, options.synchronous)?;
            let mut feed = Feed {
                spool,
                options,
                stream,
                seam,
                received: begin,
                durable: from.lsn,
                pending: Vec::new(),
                pending_bytes: 0,
                writer: Some(writer),
                writing: None,
                said_full: false,
            };
            let ended = feed.receive(stop).await;
            let drained = feed.drain().await;
            has_received = feed.received > begin;
            match (ended, drained) {
                (Err(error), _) | (Ok(_), Err(error)) => Err(error),
                (Ok(ended), Ok(())) => Ok(feed.finish(ended, from.timeline).await),
            }
        }
        Err(error) => Err(error),
    };
    match received {
        Err(error) if is_removed(&error) && !has_received => match why {
            Some(why) => {
                let segment = Segment::of(from.timeline, from.lsn, cluster.segment_size);
                learn_removed(error, segment, why, cluster.segment_size, options, lessons)
            }
            // The repository may be further than this spool, or have a hole: that is found out from there.
            None if spool.is_stored() => {
                tracing::warn!("{error}; the spool ends there, and the repository has all of it: it is emptied");
                spool.clear();
                Ok(Ended::Next)
            }
            None => {
                spool.end_timeline(from.timeline);
                Err(Error::temporary(format!(
                    "{error}; the spool ends there: what it holds is stored first"
                )))
            }
        },
        // The server removed WAL while we were on our way: the next start finds out what that means.
        Err(error) if is_removed(&error) => Err(Error::temporary(error.to_string())),
        Err(error) => Err(error.context(format_args!("receiving WAL from {}", from.lsn))),
        Ok(ended) => Ok(ended),
    }
}

/// Fails if the repository, as far as it is opened, says that WAL from here on is not wanted.
async fn check_open(repository: &watch::Receiver<Option<Arc<Guard>>>, cluster: Cluster, from: Position) -> Result<()> {
    let guard = repository.borrow().clone();
    let Some(guard) = guard else { return Ok(()) };
    let log = guard.log().await;
    let archive = Archive::open(&log, Some(cluster.system_identifier), 0)?;
    archive.check_open(from.timeline, Lsn(from.lsn.0 + 1))
}

/// The beginning of a segment that the spool ends in. It is received once more: a server that was set back or
/// replaced must not go on where another one stopped.
struct Seam {
    begin: Lsn,
    end: Lsn,
    expected: blake3::Hash,
    seen: blake3::Hasher,
}

impl Seam {
    fn of(spool: &Arc<Spool>, end: Position, segment_size: u64) -> Result<Option<Self>> {
        let begin = Segment::of(end.timeline, end.lsn, segment_size).start(segment_size);
        let from = Position { lsn: begin, ..end };
        if begin == end.lsn || spool.end() != Some(end) {
            return Ok(None);
        }
        let expected = spool.hash(from, end.lsn)?;
        Ok(expected.map(|expected| Self {
            begin,
            end: end.lsn,
            expected,
            seen: blake3::Hasher::new(),
        }))
    }
}

/// Where an empty spool begins.
async fn from_repository(
    guard: &Guard,
    server: &mut Server,
    history: &History,
    options: &Options,
    lessons: &Lessons,
) -> Result<(Position, start::Why)> {
    let archive = {
        let mut log = guard.log().await;
        log.refresh().await?;
        Archive::open(&log, Some(server.identity.system_identifier), options.compression)?
    };
    super::check_segment_size(&archive, server.segment_size)?;
    super::store_history(&archive, server.identity.timeline, server.history.clone()).await?;
    let start = start::find(&archive, history, &server.identity, lessons).await?;
    // The repository may have been away for long: what others have archived since is younger than the server's answer.
    server.catch_up(start.durable(archive.segment_size)).await?;
    let in_recovery = server.connection.in_recovery();
    start::check(&start, history, &server.identity, in_recovery, archive.segment_size)?;
    let at = Position {
        timeline: start.segment.timeline,
        lsn: start.segment.start(archive.segment_size),
    };
    Ok((at, start.why))
}

/// Where a spool that ends at `end` goes on with this server.
fn goes_on(spool: &Spool, server: &Server, history: &History, end: Position) -> Result<Position> {
    let size = server.segment_size;
    match history.end_of(end.timeline) {
        Ok(None) => {
            let in_recovery = server.connection.in_recovery();
            check_not_behind(&server.identity, end.lsn, in_recovery, "the spool")?;
            Ok(end)
        }
        Ok(Some(switch)) if end.lsn < switch => Ok(end),
        Ok(Some(switch)) => {
            spool.end_timeline(end.timeline);
            let next = history.ancestors.iter().map(|a| a.timeline).chain([history.timeline]);
            let next = next.skip_while(|&t| t != end.timeline).nth(1);
            let timeline = next.unwrap_or(history.timeline);
            Ok(Position {
                timeline,
                lsn: Segment::of(timeline, switch, size).start(size),
            })
        }
        Err(_) => Err(Error::refused(format!(
            "the spool holds WAL of timeline {}, which is not in the history of the server's timeline {}",
            end.timeline, history.timeline
        ))
        .remedy("connect to the right server; or move the spool's folder out of the way, and keep it")),
    }
}

struct Feed<'a> {
    spool: &'a Arc<Spool>,
    options: &'a Options,
    stream: WalStream,
    /// What has to come again, and be the same, before anything is believed.
    seam: Option<Seam>,
    received: Lsn,
    durable: Lsn,
    pending: Vec<Bytes>,
    pending_bytes: usize,
    /// Here, or with the blocking write.
    writer: Option<Writer>,
    writing: Option<JoinHandle<(Writer, Result<()>)>>,
    said_full: bool,
}

impl Feed<'_> {
    async fn receive(&mut self, mut stop: watch::Receiver<bool>) -> Result<Ended> {
        let (mut last_heard, mut last_said) = (Instant::now(), Instant::now());
        let mut changes = self.spool.changes();
        loop {
            if self.start_write()? {
                self.say(false).await?;
                last_said = Instant::now();
            }
            let has_room = self.has_room();
            let room = has_room && self.pending_bytes < PENDING_BYTES;
            if !room {
                last_heard = Instant::now();
            }
            tokio::select! {
                written = async { match self.writing.as_mut() { Some(write) => write.await, None => std::future::pending().await } } => {
                    self.written(written)?;
                    self.say(false).await?;
                    last_said = Instant::now();
                }
                item = self.stream.next(), if room => {
                    last_heard = Instant::now();
                    match item? {
                        WalItem::Data { start, bytes } => {
                            let had_seam = self.seam.is_some();
                            self.take(start, bytes)?;
                            // Commits may wait for what is known to be durable only now.
                            if had_seam && self.seam.is_none() {
                                self.say(false).await?;
                                last_said = Instant::now();
                            }
                        }
                        WalItem::Idle { wants_answer: true, .. } => {
                            self.say(false).await?;
                            last_said = Instant::now();
                        }
                        WalItem::Idle { .. } => {}
                        WalItem::TimelineEnd => return Ok(Ended::Next),
                    }
                }
                _ = changes.changed(), if !has_room => {}
                () = tokio::time::sleep_until(last_said + STATUS) => {
                    self.say(true).await?;
                    last_said = Instant::now();
                    quiet(last_heard)?;
                }
                _ = stop.wait_for(|stop| *stop) => return Ok(Ended::Stopped),
            }
        }
    }

    fn has_room(&mut self) -> bool {
        let has_room = self.spool.has_room();
        if !has_room && !self.said_full {
            tracing::error!(
                "ALARM: the spool is full, and the repository does not take what it holds: the server keeps WAL from {} on",
                self.durable
            );
        }
        self.said_full = !has_room;
        has_room
    }

    fn take(&mut self, start: Lsn, mut bytes: Bytes) -> Result<()> {
        if start != self.received {
            return Err(Error::failed(format!(
                "the server sent WAL of {start}, expected {}",
                self.received
            )));
        }
        self.received.0 += bytes.len() as u64;
        if let Some(seam) = &mut self.seam {
            let known = bytes.len().min((seam.end.0 - start.0) as usize);
            seam.seen.update(&bytes.split_to(known));
            if self.received < seam.end {
                return Ok(());
            }
            if seam.seen.finalize() != seam.expected {
                return Err(Error::refused(format!(
                    "the server sends other WAL from {} to {} than what the spool holds: it was set back or replaced",
                    seam.begin, seam.end
                ))
                .remedy(
                    "nothing was overwritten; find out which history is the right one, and promote the server to a new timeline",
                ));
            }
            self.seam = None;
        }
        if !bytes.is_empty() {
            self.pending_bytes += bytes.len();
            self.pending.push(bytes);
        }
        Ok(())
    }

    /// Everything that has arrived is written and synced at once. Where commits wait for it, that is done here:
    /// two hops between threads take as long as the sync itself.
    fn start_write(&mut self) -> Result<bool> {
        if self.pending.is_empty() {
            return Ok(false);
        }
        let Some(mut writer) = self.writer.take() else {
            return Ok(false);
        };
        let batch = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        if self.options.synchronous {
            let done = writer.append(&batch);
            self.written(Ok((writer, done)))?;
            return Ok(true);
        }
        self.writing = Some(tokio::task::spawn_blocking(move || {
            let done = writer.append(&batch);
            (writer, done)
        }));
        Ok(false)
    }

    fn written(&mut self, joined: std::result::Result<(Writer, Result<()>), tokio::task::JoinError>) -> Result<()> {
        self.writing = None;
        let (writer, done) = joined.map_err(|e| Error::failed("writing to the spool").caused_by(e))?;
        // A disk that is full, or that fails for once, may be well again; the server keeps what did not count.
        done.map_err(|error| match error.kind() {
            Kind::Usage => error,
            _ => Error::temporary(error.to_string()),
        })?;
        self.durable = writer.at().lsn;
        self.writer = Some(writer);
        Ok(())
    }

    /// Writes what has arrived: the server may be gone for good.
    async fn drain(&mut self) -> Result<()> {
        loop {
            self.start_write()?;
            match self.writing.as_mut() {
                Some(write) => {
                    let written = write.await;
                    self.written(written)?;
                }
                None => return Ok(()),
            }
        }
    }

    async fn finish(&mut self, ended: Ended, timeline: u32) -> Ended {
        let said = self.say(false).await;
        match ended {
            Ended::Stopped => self.stream.stop().await,
            Ended::Next => {
                self.spool.end_timeline(timeline);
                let next = match said {
                    Ok(()) => self.stream.finish().await,
                    Err(error) => Err(error),
                };
                match next {
                    Ok(Some((next, at))) => {
                        tracing::info!("timeline {timeline} has ended; going on with timeline {next} from {at}");
                    }
                    Ok(None) => tracing::info!("timeline {timeline} has ended"),
                    Err(error) => tracing::warn!("timeline {timeline} has ended: {error}"),
                }
            }
        }
        ended
    }

    async fn say(&mut self, wants_answer: bool) -> Result<()> {
        let counts = (self.options.slot.is_some() || self.options.synchronous) && self.seam.is_none();
        let flushed = if counts { self.durable } else { Lsn(0) };
        self.stream.report(self.received, flushed, wants_answer).await
    }
}
