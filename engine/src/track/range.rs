//! The block map of a range of WAL: from the archive, and what is not there yet from the server.

use std::time::Duration;

use futures::StreamExt;

use super::map::BlockMap;
use super::records;
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;
use crate::postgres::walker::{WAL_PAGE, Walker};
use crate::replication::connection::{Connection, Mode};
use crate::replication::conninfo::ConnInfo;
use crate::replication::wal_stream::{WalItem, WalStream};
use crate::wal::archive::Archive;

/// Segments fetched at once.
const FETCH: usize = 3;
/// How long the server may send nothing.
const PATIENCE: Duration = Duration::from_secs(30);
/// There is a record at the end of the range: this much of it must have come, so that it is known to begin there.
const RECORD_HEADER: u64 = 24;

/// WAL of one timeline whose changes are wanted. Both ends are where records begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Timeline.
    pub timeline: u32,
    /// The first record that counts.
    pub from: Lsn,
    /// The first one that does not.
    pub to: Lsn,
}

/// What the range changed. Where that cannot be known, the map says so, and why.
pub async fn changes(archive: &Archive, server: &ConnInfo, system_identifier: u64, range: Range) -> BlockMap {
    let read = async {
        let (tracker, missing) = from_archive(archive, range).await?;
        match missing {
            None => Ok(tracker),
            Some(segment) => from_server(tracker, server, system_identifier, segment).await,
        }
    };
    let why = match read.await {
        Ok(tracker) => return tracker.map,
        Err(error) => error,
    };
    let mut map = BlockMap::default();
    map.everything(format!("WAL from {} to {}: {why}", range.from, range.to));
    map
}

/// Walks WAL from the beginning of a segment on.
struct Tracker {
    walker: Walker,
    range: Range,
    segment_size: u64,
    map: BlockMap,
}

impl Tracker {
    fn new(range: Range, segment_size: u64) -> Self {
        let first = Segment::of(range.timeline, range.from, segment_size).start(segment_size);
        Self {
            walker: Walker::new(first, segment_size),
            range,
            segment_size,
            map: BlockMap::default(),
        }
    }

    /// Takes whole pages; an error if what they hold cannot be read as far as it is needed.
    fn feed(&mut self, pages: &[u8]) -> Result<()> {
        let Self { walker, range, map, .. } = self;
        walker.feed(pages, |record| {
            if (range.from..range.to).contains(&record.lsn) {
                records::note(map, record);
            }
        });
        match walker.stopped() {
            Some(stop) if stop.at < range.to => {
                Err(Error::failed(format!("it cannot be read at {}: {}", stop.at, stop.why)))
            }
            _ => Ok(()),
        }
    }

    fn is_done(&self) -> bool {
        self.walker.stopped().is_some_and(|stop| stop.at >= self.range.to) || self.walker.next_record() >= self.range.to
    }
}

/// Whole segments of the archive; also says from which one on they are missing.
async fn from_archive(archive: &Archive, range: Range) -> Result<(Tracker, Option<Segment>)> {
    let size = archive.segment_size;
    let mut tracker = Tracker::new(range, size);
    let first = Segment::of(range.timeline, range.from, size);
    let segments = std::iter::successors(Some(first), |segment| Some(segment.next()));
    let mut fetched = futures::stream::iter(segments)
        .map(|segment| async move { (segment, archive.whole_segment(segment).await) })
        .buffered(FETCH);
    while let Some((segment, content)) = fetched.next().await {
        let Some(content) = content? else {
            return Ok((tracker, Some(segment)));
        };
        let walked = tokio::task::spawn_blocking(move || {
            tracker.feed(&content)?;
            Ok::<_, Error>(tracker)
        });
        tracker = walked
            .await
            .map_err(|e| Error::failed("walking WAL panicked").caused_by(e))??;
        if tracker.is_done() {
            return Ok((tracker, None));
        }
    }
    Err(Error::failed("there is no end to it"))
}

/// The rest, from `segment` on.
async fn from_server(
    mut tracker: Tracker,
    server: &ConnInfo,
    system_identifier: u64,
    segment: Segment,
) -> Result<Tracker> {
    let mut connection = Connection::open(server, Mode::Replication).await?;
    if connection.identify().await?.system_identifier != system_identifier {
        return Err(Error::failed("the connection for it reached another server"));
    }
    let mut position = segment.start(tracker.segment_size);
    let mut stream = WalStream::start(connection, None, position, segment.timeline).await?;
    let mut rest: Vec<u8> = Vec::new();
    let needed = tracker.range.to.0 + RECORD_HEADER;
    while position.0 < needed {
        let item = tokio::time::timeout(PATIENCE, stream.next()).await;
        let item = item.map_err(|_| Error::failed(format!("the server sends nothing behind {position}")))??;
        match item {
            WalItem::Data { start, bytes } if start == position => {
                position.0 += bytes.len() as u64;
                rest.extend_from_slice(&bytes);
                let whole = rest.len() / WAL_PAGE * WAL_PAGE;
                tracker.feed(&rest[..whole])?;
                rest.drain(..whole);
            }
            WalItem::Data { start, .. } => {
                return Err(Error::failed(format!("the server sent {start}, expected {position}")));
            }
            WalItem::Idle { end, .. } if end.0 < needed => {
                stream.report(position, Lsn(0), true).await?;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            WalItem::Idle { .. } => stream.report(position, Lsn(0), false).await?,
            WalItem::TimelineEnd => return Err(Error::failed("the timeline ends before it")),
        }
    }
    stream.stop().await;
    // What is behind the end need not be there.
    rest.resize(rest.len().next_multiple_of(WAL_PAGE), 0);
    tracker.feed(&rest)?;
    match tracker.is_done() {
        true => Ok(tracker),
        false => Err(Error::failed(format!("it ends at {}", tracker.walker.next_record()))),
    }
}
