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
use crate::replication::wal_stream::{WalItem, WalStream};
use crate::wal::archive::Archive;

/// Received bytes that may wait for the disk.
const PENDING_BYTES: usize = 2 << 20;

/// What others hear of the feed.
pub struct Heard {
    /// Connections so far.
    pub connected: watch::Sender<u64>,
    /// What the server was told to be durable.
    pub told: watch::Sender<Lsn>,
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
    let server = tokio::select! {
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
            let (from, why) = from_repository(&guard, &server, &history, options, lessons).await?;
            (from, Some(why))
        }
    };
    tracing::info!(
        "receiving WAL from {} on timeline {} into the spool",
        from.lsn,
        from.timeline
    );
    let slot = options.slot.as_deref();
    let started = WalStream::start(server.connection, slot, from.lsn, from.timeline).await;
    let received = match started {
        Ok(mut stream) => {
            stream.tell(heard.told.clone());
            heard.connected.send_modify(|count| *count += 1);
            let writer = spool.writer(cluster, from, options.synchronous)?;
            let mut feed = Feed {
                spool,
                options,
                stream,
                received: from.lsn,
                durable: from.lsn,
                pending: Vec::new(),
                pending_bytes: 0,
                writer: Some(writer),
                writing: None,
                said_full: false,
            };
            let ended = feed.receive(stop).await;
            match (ended, feed.drain().await) {
                (Err(error), _) | (Ok(_), Err(error)) => Err(error),
                (Ok(ended), Ok(())) => Ok(feed.finish(ended, from.timeline).await),
            }
        }
        Err(error) => Err(error),
    };
    match received {
        Err(error) if is_removed(&error) && spool.end().is_none_or(|end| end == from) => match why {
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
            None => Err(Error::temporary(format!(
                "{error}; the spool ends there: what it holds has to be stored first"
            ))),
        },
        // The server removed WAL while we were on our way: the next start finds out what that means.
        Err(error) if is_removed(&error) => {
            tracing::warn!("{error}");
            Ok(Ended::Next)
        }
        Err(error) => Err(error.context(format_args!("receiving WAL from {}", from.lsn))),
        Ok(ended) => Ok(ended),
    }
}

/// Where an empty spool begins.
async fn from_repository(
    guard: &Guard,
    server: &Server,
    history: &History,
    options: &Options,
    lessons: &Lessons,
) -> Result<(Position, start::Why)> {
    let archive = {
        let mut log = guard.log().await;
        log.refresh().await?;
        Archive::open(&log, Some(server.identity.system_identifier), options.level)?
    };
    super::check_segment_size(&archive, server.segment_size)?;
    super::store_history(&archive, server.identity.timeline, server.history.clone()).await?;
    let start = start::find(&archive, history, &server.identity, lessons).await?;
    start::check(
        &start,
        history,
        &server.identity,
        server.connection.in_recovery(),
        archive.segment_size,
    )?;
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
                        WalItem::Data { start, bytes } => self.take(start, bytes)?,
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

    fn take(&mut self, start: Lsn, bytes: Bytes) -> Result<()> {
        if start != self.received {
            return Err(Error::failed(format!(
                "the server sent WAL of {start}, expected {}",
                self.received
            )));
        }
        self.received.0 += bytes.len() as u64;
        self.pending_bytes += bytes.len();
        self.pending.push(bytes);
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
        let counts = self.options.slot.is_some() || self.options.synchronous;
        let flushed = if counts { self.durable } else { Lsn(0) };
        self.stream.report(self.received, flushed, wants_answer).await
    }
}
