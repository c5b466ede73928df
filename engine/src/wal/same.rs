//! Is the WAL in the repository that of this server?
//!
//! Two servers that go on from one state (a snapshot that was rolled back, a copy that was started beside the original)
//! write different WAL under the same names. `archive_command` refuses that of the second, but a backup of it would find
//! the names that it waits for: it would be built on, and restored with, WAL of another history. Histories that have parted
//! never meet again, so one segment tells.

use std::time::Duration;

use super::archive::Archive;
use super::known::Known;
use super::receive::{check_not_behind, is_removed, not_the_same};
use crate::error::{Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;
use crate::replication::connection::Connection;
use crate::replication::wal_stream::{WalItem, WalStream};

/// How long the server may send nothing.
const PATIENCE: Duration = Duration::from_secs(30);

/// Fails, with [`Kind::Refused`], if what is stored of the segment that holds `at` is not what the server has of it. All
/// is well if nothing is stored of it, or if the server no longer has it: then `archive_command` has stored its own.
/// `connect` opens a connection for replication.
pub async fn check(
    archive: &Archive,
    timeline: u32,
    at: Lsn,
    connect: impl AsyncFnOnce() -> Result<Connection>,
) -> Result<()> {
    let size = archive.segment_size;
    let segment = Segment::of(timeline, at, size);
    let mut known = Known::of(archive, segment).await?;
    if known.is_compared() {
        return Ok(());
    }
    let begin = segment.start(size);
    let stored = Lsn(begin.0 + known.end as u64);
    let mut connection = connect().await?;
    let server = connection.identify().await?;
    if server.system_identifier != archive.system_identifier {
        return Err(Error::failed("the connection for comparing WAL reached another server")
            .remedy("name one host in conninfo, or use target_session_attrs"));
    }
    if server.timeline == timeline {
        check_not_behind(&server, stored, connection.in_recovery(), "the repository")?;
    }
    let ended = read(connection, segment, begin, stored, &mut known).await;
    match ended {
        Err(error) if is_removed(&error) => {
            tracing::debug!("{} is not compared: {error}", segment.name(size));
            Ok(())
        }
        ended => ended,
    }
}

async fn read(connection: Connection, segment: Segment, begin: Lsn, end: Lsn, known: &mut Known) -> Result<()> {
    let mut position = begin;
    let mut stream = WalStream::start(connection, None, position, segment.timeline).await?;
    while !known.is_compared() {
        let item = tokio::time::timeout(PATIENCE, stream.next()).await;
        let nothing = || {
            Error::temporary(format!(
                "the server sends no WAL behind {position}, and has it up to {end}"
            ))
        };
        match item.map_err(|_| nothing())?? {
            WalItem::Data { start, bytes } if start == position => {
                let len = bytes.len().min((end.0 - position.0) as usize);
                let compared = known.compare((position.0 - begin.0) as usize, &bytes[..len]);
                compared.map_err(|(from, to)| not_the_same(Lsn(begin.0 + from as u64), Lsn(begin.0 + to as u64)))?;
                position.0 += len as u64;
            }
            WalItem::Data { start, .. } => {
                return Err(Error::failed(format!("the server sent {start}, expected {position}")));
            }
            WalItem::Idle { .. } => stream.report(position, Lsn(0), false).await?,
            WalItem::TimelineEnd => {
                return Err(Error::new(
                    Kind::Temporary,
                    format!(
                        "timeline {} ended at {position} while its WAL was compared",
                        segment.timeline
                    ),
                ));
            }
        }
    }
    stream.stop().await;
    Ok(())
}
