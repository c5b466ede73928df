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
use crate::replication::reread::Reread;

/// How often what is stored is looked at while it changes, and after what time again.
const LOOKS: usize = 5;
const PAUSE: Duration = Duration::from_millis(200);

/// Fails, with [`Kind::Refused`], if what is stored of the segment that holds `at` is not what the server has of it. All
/// is well if nothing is stored of it, or if the server no longer has it: then `archive_command` has stored its own.
/// `connect` opens a connection of either kind.
pub async fn check(
    archive: &Archive,
    timeline: u32,
    at: Lsn,
    connect: impl AsyncFnOnce() -> Result<Connection>,
) -> Result<()> {
    let size = archive.segment_size;
    let segment = Segment::of(timeline, at, size);
    let mut known = what_is_stored(archive, segment).await?;
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
    if server.timeline == timeline && connection.in_recovery() && server.flush < stored {
        return or_removed(
            check_beginning(archive, connection, segment, server.flush).await,
            segment,
            size,
        );
    }
    if server.timeline == timeline {
        check_not_behind(&server, stored, false, "the repository")?;
    }
    or_removed(
        read(connection, segment, begin, stored, &mut known).await,
        segment,
        size,
    )
}

/// What the server no longer has cannot be compared.
fn or_removed(compared: Result<()>, segment: Segment, size: u64) -> Result<()> {
    match compared {
        Err(error) if is_removed(&error) => {
            tracing::debug!("{} is not compared: {error}", segment.name(size));
            Ok(())
        }
        compared => compared,
    }
}

/// Whoever receives joins pieces, and completes segments, under our eyes.
async fn what_is_stored(archive: &Archive, segment: Segment) -> Result<Known> {
    for _ in 0..LOOKS {
        match Known::of(archive, segment).await {
            Err(error) if error.kind() == Kind::Temporary => tokio::time::sleep(PAUSE).await,
            known => return known,
        }
    }
    Known::of(archive, segment).await
}

/// A standby may lag behind what its primary archived: what it has must be the beginning of that. A key that does not
/// read cannot tell.
async fn check_beginning(archive: &Archive, connection: Connection, segment: Segment, flush: Lsn) -> Result<()> {
    let begin = segment.start(archive.segment_size);
    if flush <= begin || !archive.stanza.keys().can_read() {
        return Ok(());
    }
    let Some(stored) = archive.segment_or_parts(segment).await? else {
        return Ok(());
    };
    let end = flush.min(Lsn(begin.0 + stored.len() as u64));
    let mut stream = Reread::start(connection, segment.timeline, begin).await?;
    while stream.position() < end {
        let position = stream.position();
        let mut bytes = stream.next(end).await?;
        bytes.truncate((end.0 - position.0) as usize);
        let at = (position.0 - begin.0) as usize;
        if stored[at..at + bytes.len()] != bytes[..] {
            return Err(not_the_same(position, Lsn(position.0 + bytes.len() as u64)));
        }
    }
    stream.stop().await;
    Ok(())
}

async fn read(connection: Connection, segment: Segment, begin: Lsn, end: Lsn, known: &mut Known) -> Result<()> {
    let mut stream = Reread::start(connection, segment.timeline, begin).await?;
    while !known.is_compared() {
        let position = stream.position();
        let mut bytes = stream.next(end).await?;
        bytes.truncate((end.0 - position.0) as usize);
        let compared = known.compare((position.0 - begin.0) as usize, &bytes);
        compared.map_err(|(from, to)| not_the_same(Lsn(begin.0 + from as u64), Lsn(begin.0 + to as u64)))?;
    }
    stream.stop().await;
    Ok(())
}
