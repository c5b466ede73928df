//! WAL from the server during a backup: from the segment of the start LSN to the stop LSN, on a connection
//! of its own, so that a backup can be restored although nobody archives.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::archive::Archive;
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{Segment, WalFile};
use crate::progress::Progress;
use crate::replication::connection::Connection;
use crate::replication::wal_stream::{WalItem, WalStream};

/// Where the backup ends, once that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Until {
    /// Stop LSN.
    pub stop: Lsn,
    /// The server fills the rest of the segment (a primary switches at the end of a backup).
    pub whole_segment: bool,
}

/// How long the stream may stand still once the stop LSN is known.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// How often the server hears from us while a segment waits for the store.
const STATUS_INTERVAL: std::time::Duration = std::time::Duration::from_secs(10);

/// Streams from the beginning of the segment that holds `from` until `until` is known and reached. At most
/// three segments are in memory.
pub async fn capture(
    connection: Connection,
    archive: Archive,
    slot: String,
    from: Lsn,
    timeline: u32,
    until: watch::Receiver<Option<Until>>,
    progress: Arc<Progress>,
) -> Result<()> {
    let first = Segment::of(timeline, from, archive.segment_size);
    let stream = WalStream::start(connection, Some(&slot), first.start(archive.segment_size), timeline).await?;
    let (full_in, full_out) = mpsc::channel(1);
    let (durable_in, durable) = watch::channel(Lsn(0));
    let ended = until.clone();
    let receiving = receive(stream, first, archive.segment_size, until, full_in, durable, progress);
    let storing = store(&archive, full_out, durable_in);
    let ((segment, rest), ()) = tokio::try_join!(receiving, storing)?;
    // What came beyond the end, in the meantime, is nobody's: it would look like the work of a receiver.
    let is_needed = ended
        .borrow()
        .is_none_or(|until| segment.start(archive.segment_size) < until.stop);
    if !rest.is_empty() && is_needed {
        archive.put_piece(segment, 0, rest).await?;
    }
    Ok(())
}

/// Stores full segments in order and says how far they are durable.
async fn store(
    archive: &Archive,
    mut full: mpsc::Receiver<(Segment, Vec<u8>)>,
    durable: watch::Sender<Lsn>,
) -> Result<()> {
    while let Some((segment, content)) = full.recv().await {
        let name = segment.name(archive.segment_size);
        archive.put(WalFile::Segment(segment), &name, content).await?;
        let _ = durable.send(segment.end(archive.segment_size));
    }
    Ok(())
}

/// Receives until the end; returns the last segment and what there is of it.
async fn receive(
    mut stream: WalStream,
    mut segment: Segment,
    size: u64,
    mut until: watch::Receiver<Option<Until>>,
    full: mpsc::Sender<(Segment, Vec<u8>)>,
    mut durable: watch::Receiver<Lsn>,
    progress: Arc<Progress>,
) -> Result<(Segment, Vec<u8>)> {
    let mut content: Vec<u8> = Vec::with_capacity(size as usize);
    let mut sender_gone = false;
    let mut still_since = tokio::time::Instant::now();
    loop {
        let position = Lsn(segment.start(size).0 + content.len() as u64);
        let target = *until.borrow_and_update();
        if let Some(end) = target {
            let goal = if end.whole_segment {
                Lsn(end.stop.0.div_ceil(size) * size)
            } else {
                end.stop
            };
            if position >= goal {
                break;
            }
        } else if sender_gone {
            return Err(Error::failed("the backup ended before its WAL did"));
        }
        let item = tokio::select! {
            item = stream.next() => item?,
            changed = until.changed(), if !sender_gone => {
                sender_gone = changed.is_err();
                still_since = tokio::time::Instant::now();
                continue;
            }
            () = tokio::time::sleep_until(still_since + PATIENCE), if target.is_some() => {
                return Err(Error::temporary(format!("the server sends no WAL beyond {position}, and the backup needs it up to {}", target.map_or(Lsn(0), |t| t.stop))));
            }
        };
        let (start, bytes) = match item {
            WalItem::Data { start, bytes } => (start, bytes),
            WalItem::Idle { wants_answer, .. } => {
                if wants_answer {
                    let reached = *durable.borrow_and_update();
                    stream.report(reached, reached, false).await?;
                }
                continue;
            }
            WalItem::TimelineEnd => {
                return Err(Error::failed(
                    "the server was promoted during the backup; this backup cannot be completed",
                )
                .remedy("start the backup again"));
            }
        };
        if start != position {
            return Err(Error::failed(format!(
                "the server sent WAL of {start}, expected {position}"
            )));
        }
        still_since = tokio::time::Instant::now();
        progress.wal_bytes.add(bytes.len() as u64);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let take = (size as usize - content.len()).min(rest.len());
            content.extend_from_slice(&rest[..take]);
            rest = &rest[take..];
            if content.len() as u64 == size {
                let done = std::mem::replace(&mut content, Vec::with_capacity(size as usize));
                hand_over(&mut stream, &full, &mut durable, (segment, done)).await?;
                // The time that the store took is not the server's.
                still_since = tokio::time::Instant::now();
                segment = segment.next();
            }
        }
    }
    stream.stop().await;
    Ok((segment, content))
}

/// Hands a segment to the store; meanwhile the server is told that we live.
async fn hand_over(
    stream: &mut WalStream,
    full: &mpsc::Sender<(Segment, Vec<u8>)>,
    durable: &mut watch::Receiver<Lsn>,
    item: (Segment, Vec<u8>),
) -> Result<()> {
    loop {
        let waited = tokio::time::timeout(STATUS_INTERVAL, full.reserve()).await;
        let reached = *durable.borrow_and_update();
        stream.report(reached, reached, false).await?;
        match waited {
            Ok(Ok(room)) => {
                room.send(item);
                return Ok(());
            }
            Ok(Err(_)) => return Err(Error::failed("storing WAL has ended early")),
            Err(_) => {}
        }
    }
}
