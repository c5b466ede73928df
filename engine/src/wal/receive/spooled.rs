//! A receiver with a spool: two loops side by side, the server into the spool, and the spool into the
//! repository. Each tries again on its own, so that neither a server nor a store that is away holds up the
//! other.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::origin::Origin;
use super::spool::{Cluster, Position, Spool};
use super::start::{self, Lessons, Start, Why};
use super::storing::Guard;
use super::{
    Ended, Options, check_segment_size, connect, feed, is_removed, keep_trying, learn_removed, pump, say_start,
    with_standbys,
};
use crate::commit::Log;
use crate::error::{Error, Kind, Result};
use crate::postgres::segment::{History, Segment, WalFile};
use crate::replication::connection::SystemIdentity;
use crate::replication::wal_stream::WalStream;
use crate::stanza::Stanza;
use crate::wal::archive::Archive;

/// How long a hole before the spool is left alone after the server could not be asked for it.
const POSTPONED: Duration = Duration::from_secs(60);
/// How long a polite stop waits for what the spool holds to be taken from it. What is left stays there.
const LAST: Duration = Duration::from_secs(10);

/// Receives through the spool in `folder`, which holds `limit` bytes at most, until `cancelled` completes or
/// something needs a person.
pub async fn run(
    stanza: Arc<Stanza>,
    folder: PathBuf,
    limit: u64,
    options: &Options,
    cancelled: impl Future<Output = ()>,
) -> Result<()> {
    let spool = Spool::open(stanza.clone(), folder, limit)?;
    let (guard_in, guard) = watch::channel(None);
    let (stop_in, stop) = watch::channel(false);
    let (stop_storing_in, stop_storing) = watch::channel(false);
    let heard = feed::Heard {
        connected: watch::Sender::new(0),
        told: watch::Sender::new(None),
    };
    let mut connected = heard.connected.subscribe();

    // Commits wait for the spool, and nobody for the repository.
    let at_leisure = Options {
        synchronous: false,
        ..options.clone()
    };
    let mut lessons = Lessons::default();
    let feeding = async {
        let mut repository = guard;
        let fed = keep_trying(stop.clone(), async || {
            let stop = stop.clone();
            feed::once(&spool, &mut repository, options, &mut lessons, &heard, stop).await
        });
        let fed = fed.await;
        let _ = tokio::time::timeout(LAST, all_taken(&spool)).await;
        stop_storing_in.send_replace(true);
        fed
    };
    let store = Storing {
        spool: &spool,
        stanza,
        guard: guard_in,
        options: &at_leisure,
        asks_server: true,
    };
    let mut stored_lessons = Lessons::default();
    let storing = keep_trying(stop_storing.clone(), async || {
        let stop = stop_storing.clone();
        store.once(&mut stored_lessons, &mut connected, stop).await
    });
    // What the one half cannot go on with ends both: but what was received is stored first.
    let both = async {
        let (fed, stored) = futures::future::join(feeding, async {
            let stored = storing.await;
            if stored.is_err() {
                stop_in.send_replace(true);
            }
            stored
        })
        .await;
        stored.and(fed)
    };
    with_standbys(both, options, &heard.told, cancelled, &stop_in).await?;
    match (spool.is_stored(), spool.begin(), spool.end()) {
        (false, Some(begin), Some(end)) => Err(Error::temporary(format!(
            "stopped, and WAL from {} on timeline {} to {} on timeline {} is in the spool, not all of it in the repository",
            begin.lsn, begin.timeline, end.lsn, end.timeline
        ))
        .remedy("keep the spool: the next start stores it")),
        _ => Ok(()),
    }
}

async fn all_taken(spool: &Spool) {
    let mut changes = spool.changes();
    while !spool.is_taken() {
        let again = Duration::from_millis(50);
        let _ = tokio::time::timeout(again, changes.changed()).await;
    }
}

/// Stores what `spool` holds, without a server, until `stop` says that it is enough.
pub async fn store_only(
    stanza: Arc<Stanza>,
    spool: &Arc<Spool>,
    options: &Options,
    stop: watch::Receiver<bool>,
) -> Result<()> {
    let store = Storing {
        spool,
        stanza,
        guard: watch::channel(None).0,
        options,
        asks_server: false,
    };
    let mut lessons = Lessons::default();
    let (_never, mut connected) = watch::channel(0);
    loop {
        let before = (spool.begin(), lessons.postponed.len());
        let ended = store.once(&mut lessons, &mut connected, stop.clone()).await?;
        if ended == Ended::Stopped || *stop.borrow() || spool.is_stored() {
            return Ok(());
        }
        // Trying the same again would be for ever.
        if before == (spool.begin(), lessons.postponed.len()) {
            return Err(Error::failed("it does not go on from where it was"));
        }
    }
}

struct Storing<'a> {
    spool: &'a Arc<Spool>,
    stanza: Arc<Stanza>,
    guard: watch::Sender<Option<Arc<Guard>>>,
    options: &'a Options,
    /// Whether holes before what the spool holds are filled from the server.
    asks_server: bool,
}

impl Storing<'_> {
    /// The repository, opened once.
    async fn guard(&self) -> Result<Arc<Guard>> {
        let known = self.guard.borrow().clone();
        match known {
            Some(guard) => Ok(guard),
            None => {
                let guard = Arc::new(Guard::new(Log::open_to_archive(self.stanza.clone()).await?));
                self.guard.send_replace(Some(guard.clone()));
                Ok(guard)
            }
        }
    }

    async fn once(
        &self,
        lessons: &mut Lessons,
        connected: &mut watch::Receiver<u64>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Ended> {
        let guard = self.guard().await?;
        let (cluster, begin, end) = tokio::select! {
            held = self.held() => held,
            _ = stop.wait_for(|stop| *stop) => return Ok(Ended::Stopped),
        };
        let archive = {
            let mut log = guard.log().await;
            log.refresh().await?;
            self.spool.seal_with(log.stanza());
            Archive::open(&log, Some(cluster.system_identifier), self.options.compression)?
        };
        check_segment_size(&archive, cluster.segment_size)?;
        let history = self.store_histories(&archive, end.timeline).await?;
        connected.borrow_and_update();
        let first = Segment::of(begin.timeline, begin.lsn, cluster.segment_size);
        let identity = SystemIdentity {
            system_identifier: cluster.system_identifier,
            timeline: end.timeline,
            flush: end.lsn,
        };
        let missing = start::find(&archive, &history, &identity, lessons).await?;
        if missing.why != Why::Compare && missing.segment.number < first.number {
            if !self.asks_server {
                let missing = missing.segment;
                tracing::warn!("GAP: {} is not in the repository", missing.name(archive.segment_size));
                lessons.postponed.insert((missing.timeline, missing.number));
                return Ok(Ended::Next);
            }
            return self.fill(&guard, &archive, missing, first, lessons, stop).await;
        }
        // Of a timeline that was closed, what lies beyond is not stored.
        let closed = archive.closed_at(first.timeline);
        let until = closed.filter(|_| self.spool.has_ended(first.timeline));
        if let Some(end) = until {
            self.spool.give_up(first.timeline, end)?;
            if self.spool.begin() != Some(begin) {
                return Ok(Ended::Next);
            }
        }
        let start = start::at(&archive, first).await?;
        say_start(
            &start,
            archive.segment_size,
            &Options {
                slot: None,
                ..self.options.clone()
            },
        );
        let from = Position {
            timeline: first.timeline,
            lsn: first.start(archive.segment_size),
        };
        let reader = self.spool.reader(from, until);
        let origin = Origin::Spool(Box::new(reader));
        let may_fill = self.asks_server && !lessons.postponed.is_empty();
        tokio::select! {
            outcome = pump::run(&guard, &archive, self.options, origin, start, stop) => outcome.ended,
            // The server may have what is missing by now. What is being stored is in the spool.
            () = tokio::time::sleep(POSTPONED), if may_fill => {
                lessons.postponed.clear();
                Ok(Ended::Next)
            }
            Ok(()) = connected.changed(), if may_fill => {
                lessons.postponed.clear();
                Ok(Ended::Next)
            }
        }
    }

    /// What the spool holds, once it holds anything.
    async fn held(&self) -> (Cluster, Position, Position) {
        let mut changes = self.spool.changes();
        loop {
            changes.borrow_and_update();
            if let (Some(cluster), Some(begin), Some(end)) =
                (self.spool.cluster(), self.spool.begin(), self.spool.end())
            {
                return (cluster, begin, end);
            }
            let _ = changes.changed().await;
        }
    }

    /// Stores the histories that the spool holds; returns that of the newest timeline.
    async fn store_histories(&self, archive: &Archive, newest: u32) -> Result<History> {
        for timeline in self.spool.timelines() {
            if let Some((content, _)) = self.spool.history(timeline)? {
                let name = format!("{timeline:08X}.history");
                archive.put(WalFile::History(timeline), &name, content).await?;
            }
        }
        let history = self.spool.history(newest)?.map(|(_, history)| history);
        Ok(history.unwrap_or(History {
            timeline: newest,
            ancestors: Vec::new(),
        }))
    }

    /// Fills a hole before what the spool holds, from the server, on a connection of its own.
    async fn fill(
        &self,
        guard: &Guard,
        archive: &Archive,
        start: Start,
        until: Segment,
        lessons: &mut Lessons,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Ended> {
        let (segment, why) = (start.segment, start.why);
        let key = (segment.timeline, segment.number);
        let size = archive.segment_size;
        tracing::info!(
            "filling what is missing from {} on, on timeline {}",
            segment.name(size),
            segment.timeline
        );
        let connecting = async {
            let server = connect(self.options, None).await?;
            if server.identity.system_identifier != archive.system_identifier {
                return Err(Error::temporary("another cluster answers"));
            }
            WalStream::start(server.connection, None, segment.start(size), segment.timeline).await
        };
        let stream = tokio::select! {
            stream = connecting => stream,
            _ = stop.wait_for(|stop| *stop) => return Ok(Ended::Stopped),
        };
        let (at, filled, store_failed) = match stream {
            Ok(stream) => {
                let origin = Origin::ServerUntil(stream, until);
                let outcome = pump::run(guard, archive, self.options, origin, start, stop).await;
                (outcome.at, outcome.ended, outcome.store_failed)
            }
            Err(error) => (segment, Err(error), false),
        };
        match filled {
            Err(error) if is_removed(&error) && at == segment => {
                learn_removed(error, segment, why, size, self.options, lessons)
            }
            // What the spool holds must not wait for the server.
            Err(error) if error.kind() == Kind::Temporary && !store_failed => {
                tracing::warn!("GAP: {} is not filled in now: {error}", segment.name(size));
                lessons.postponed.insert(key);
                Ok(Ended::Next)
            }
            Err(error) if is_removed(&error) => Ok(Ended::Next),
            other => other,
        }
    }
}
