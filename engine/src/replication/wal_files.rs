//! WAL of a primary from its own `pg_wal`, over an ordinary connection: for a role that may not replicate, or a server
//! without senders of WAL, where the role may run `pg_read_binary_file` and `pg_stat_file`.
//!
//! What always holds: what is read was flushed by the server, which is what it would send to a standby; bytes of a
//! segment that was recycled while it was read are an error, the one that a server gives for WAL that it has removed.

use fairvault_format::limits::CHUNK_BYTES;

use super::connection::{Connection, quote_text};
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;

/// The files of one timeline, which is the server's own.
pub struct WalFiles {
    connection: Connection,
    timeline: u32,
    segment_size: u64,
    /// Up to here the server is known to have flushed.
    flushed: Lsn,
}

impl WalFiles {
    /// Asks how long segments are.
    pub async fn open(mut connection: Connection, timeline: u32) -> Result<Self> {
        let segment_size = connection.wal_segment_size().await?;
        Ok(Self {
            connection,
            timeline,
            segment_size,
            flushed: Lsn(0),
        })
    }

    /// What there is from `position` on, a part of it; `None` if the server has flushed nothing behind it.
    pub async fn next(&mut self, position: Lsn) -> Result<Option<Vec<u8>>> {
        if self.flushed <= position {
            let server = self.connection.identify().await?;
            if server.timeline != self.timeline {
                return Err(Error::temporary(format!(
                    "the server is on timeline {}, and an ordinary connection reads no WAL of timeline {}",
                    server.timeline, self.timeline
                )));
            }
            self.flushed = server.flush;
        }
        let segment = Segment::of(self.timeline, position, self.segment_size);
        let chunk = Lsn(position.0.saturating_add(u64::from(CHUNK_BYTES)));
        let end = self.flushed.min(segment.end(self.segment_size)).min(chunk);
        if end <= position {
            return Ok(None);
        }
        let path = format!("pg_wal/{}", segment.name(self.segment_size));
        let (offset, len) = (position.0 - segment.start(self.segment_size).0, end.0 - position.0);
        let bytes = self.connection.read_file(&path, offset, len).await?;
        // A segment is renamed before it is written anew: what still has its name was not.
        let still_there = format!("SELECT size FROM pg_stat_file({}, false)", quote_text(&path));
        self.connection.query(&still_there).await?;
        match bytes.len() as u64 == len {
            true => Ok(Some(bytes)),
            false => Err(Error::temporary(format!(
                "the server has {} bytes of {path} from {position} on, and flushed WAL up to {end}",
                bytes.len()
            ))),
        }
    }
}
