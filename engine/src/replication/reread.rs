//! WAL that a server still has, read again in order: to compare it, to judge by it, to follow its changes.
//!
//! What always holds: what is handed on has no gap; a server that sends nothing is not waited for without end; nothing
//! is told to be durable.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, sleep, timeout_at};

use super::connection::{Connection, Mode};
use super::conninfo::ConnInfo;
use super::wal_files::WalFiles;
use super::wal_stream::{WalItem, WalStream};
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;

/// How long the server may send nothing.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two questions for WAL that it does not have yet.
const PAUSE: Duration = Duration::from_millis(20);

/// WAL of one timeline, from some position on.
pub struct Reread {
    origin: Origin,
    position: Lsn,
}

enum Origin {
    /// A connection for replication.
    Stream(WalStream),
    /// An ordinary one.
    Files(WalFiles),
}

impl Reread {
    /// Connects, and begins at `from`. Fails if that is not the server of `system_identifier`.
    pub async fn open(server: &ConnInfo, system_identifier: u64, timeline: u32, from: Lsn) -> Result<Self> {
        let mut connection = Connection::open_either(server).await?;
        if connection.identify().await?.system_identifier != system_identifier {
            return Err(Error::failed(
                "the connection for reading WAL again reached another server",
            ));
        }
        Self::start(connection, timeline, from).await
    }

    /// The same on a connection of either kind.
    pub async fn start(connection: Connection, timeline: u32, from: Lsn) -> Result<Self> {
        let origin = match connection.mode() {
            Mode::Replication => Origin::Stream(WalStream::start(connection, None, from, timeline).await?),
            Mode::Sql => Origin::Files(WalFiles::open(connection, timeline).await?),
        };
        Ok(Self { origin, position: from })
    }

    /// Where the next byte is.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The next bytes. The server has those before `end`, or is about to have them; more may come.
    pub async fn next(&mut self, end: Lsn) -> Result<Bytes> {
        let position = self.position;
        // Keepalives alone bring it nowhere.
        let deadline = Instant::now() + PATIENCE;
        let nothing = |_: Elapsed| {
            Error::temporary(format!(
                "the server sends no WAL behind {position}, and should have it up to {end}"
            ))
        };
        let stream = match &mut self.origin {
            Origin::Stream(stream) => stream,
            Origin::Files(files) => loop {
                if let Some(bytes) = timeout_at(deadline, files.next(position)).await.map_err(nothing)?? {
                    self.position.0 += bytes.len() as u64;
                    return Ok(bytes.into());
                }
                timeout_at(deadline, sleep(PAUSE)).await.map_err(nothing)?;
            },
        };
        loop {
            let item = timeout_at(deadline, stream.next()).await;
            match item.map_err(nothing)?? {
                WalItem::Data { start, bytes } if start == position => {
                    self.position.0 += bytes.len() as u64;
                    return Ok(bytes);
                }
                WalItem::Data { start, .. } => {
                    return Err(Error::failed(format!("the server sent {start}, expected {position}")));
                }
                WalItem::Idle { end: has, .. } if has < end => {
                    stream.report(position, Lsn(0), true).await?;
                    sleep(PAUSE).await;
                }
                WalItem::Idle { .. } => stream.report(position, Lsn(0), false).await?,
                WalItem::TimelineEnd => {
                    return Err(Error::temporary(format!(
                        "the timeline ended at {position} while its WAL was read"
                    )));
                }
            }
        }
    }

    /// Ends the stream politely.
    pub async fn stop(self) {
        if let Origin::Stream(mut stream) = self.origin {
            stream.stop().await;
        }
    }
}
