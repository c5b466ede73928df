//! WAL from the server during a backup: from the segment of the start LSN to the stop LSN, on a connection
//! of its own, so that a backup can be restored although nobody archives.

use std::sync::Arc;

use tokio::sync::watch;

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

/// Streams from the beginning of the segment that holds `from` until `until` is known and reached.
pub async fn capture(
    connection: Connection,
    archive: Archive,
    slot: String,
    from: Lsn,
    timeline: u32,
    mut until: watch::Receiver<Option<Until>>,
    progress: Arc<Progress>,
) -> Result<()> {
    let size = archive.segment_size;
    let mut segment = Segment::of(timeline, from, size);
    let mut stream = WalStream::start(connection, Some(&slot), segment.start(size), timeline).await?;
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
        match item {
            WalItem::Data { start, bytes } => {
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
                        let full = std::mem::replace(&mut content, Vec::with_capacity(size as usize));
                        archive
                            .put(WalFile::Segment(segment), &segment.name(size), full)
                            .await?;
                        segment = segment.next();
                        stream.report(segment.start(size)).await?;
                    }
                }
            }
            WalItem::Idle { .. } => {}
            WalItem::TimelineEnd { .. } => {
                return Err(Error::failed(
                    "the server was promoted during the backup; this backup cannot be completed",
                )
                .remedy("start the backup again"));
            }
        }
    }
    if !content.is_empty() {
        archive.put_piece(segment, content).await?;
    }
    stream.stop().await;
    Ok(())
}
