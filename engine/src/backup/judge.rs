//! Is a page with a wrong checksum damage, or was it read while the server wrote it?
//!
//! A torn page is benign only if the WAL between start and stop restores it: it holds a full image of the
//! block, or initialises it. Free-space and visibility maps repair themselves. Anything else is damage.

use std::collections::HashSet;
use std::time::Duration;

use fairvault_format::proto;

use super::pipeline::BadPage;
use crate::error::{Error, Result};
use crate::postgres::files::Fork;
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;
use crate::postgres::walker::{BlockRef, WAL_PAGE, Walker};
use crate::replication::connection::{Connection, Mode};
use crate::replication::conninfo::ConnInfo;
use crate::replication::wal_stream::{WalItem, WalStream};
use crate::wal::archive::Archive;

/// How long the server may send no WAL.
const PATIENCE: Duration = Duration::from_secs(30);

/// Key of a block: tablespace, database, relation, block.
type Block = (u32, u32, u32, u32);

/// Judges pages with the WAL in the repository; with that of the server where this host's key does not read what is stored.
pub async fn judge(
    archive: &Archive,
    server: &ConnInfo,
    timeline: u32,
    start: Lsn,
    stop: Lsn,
    bad: &[BadPage],
    blocks_per_segment: u32,
) -> Result<Vec<proto::PageFailure>> {
    if bad.is_empty() {
        return Ok(Vec::new());
    }
    let key = |page: &BadPage| -> Block {
        let block = page
            .file
            .segment
            .wrapping_mul(blocks_per_segment)
            .wrapping_add(page.block);
        (page.file.tablespace, page.file.database, page.file.relation, block)
    };
    let wanted: HashSet<Block> = bad.iter().filter(|p| p.file.fork == Fork::Main).map(key).collect();
    let mut restored: HashSet<Block> = HashSet::new();
    let mut broken_off = None;
    let mut walker = Walker::new(
        Segment::of(timeline, start, archive.segment_size).start(archive.segment_size),
        archive.segment_size,
    );
    let mut feed = |content: &[u8]| {
        walker.feed(content, |record| {
            if record.lsn < start || record.lsn >= stop {
                return;
            }
            let Some(decoded) = record.decode() else { return };
            let whole = |b: &&BlockRef| b.restores_whole && b.fork == 0;
            for b in decoded.blocks.iter().filter(whole) {
                let block = (b.tablespace, b.database, b.relation, b.block);
                if wanted.contains(&block) {
                    restored.insert(block);
                }
            }
        });
    };
    if archive.stanza.keys().can_read() {
        let mut segment = Segment::of(timeline, start, archive.segment_size);
        while segment.start(archive.segment_size) < stop {
            let Some(mut content) = archive.segment_or_parts(segment).await? else {
                broken_off = Some(format!(
                    "{} is not in the repository",
                    segment.name(archive.segment_size)
                ));
                break;
            };
            // A part may end inside a page: its last records count too.
            content.resize(content.len().next_multiple_of(WAL_PAGE), 0);
            feed(&content);
            segment = segment.next();
        }
    } else if let Err(error) = from_server(archive, server, timeline, start, stop, &mut feed).await {
        broken_off = Some(format!(
            "this host's key can write only, and the server's WAL could not be read again: {error}"
        ));
    }
    if let Some(end) = walker.stopped().filter(|s| s.at < stop) {
        broken_off = Some(format!("the WAL cannot be read at {}: {}", end.at, end.why));
    }
    let verdict = |page: &BadPage| match page.file.fork {
        Fork::Fsm | Fork::Vm => "benign: a map that repairs itself".to_owned(),
        Fork::Main if restored.contains(&key(page)) => {
            "benign: torn while it was read, and the WAL of the backup restores it".to_owned()
        }
        _ => match &broken_off {
            None => "damaged".to_owned(),
            Some(why) => format!("damaged (not fully judged: {why})"),
        },
    };
    Ok(bad
        .iter()
        .map(|page| proto::PageFailure {
            path: page.path.to_string(),
            block: page.block,
            expected: page.expected.into(),
            found: page.found.into(),
            judgement: verdict(page),
        })
        .collect())
}

/// Hands the server's WAL from the segment of `start` to `stop` to `feed`, in whole pages.
async fn from_server(
    archive: &Archive,
    server: &ConnInfo,
    timeline: u32,
    start: Lsn,
    stop: Lsn,
    feed: &mut impl FnMut(&[u8]),
) -> Result<()> {
    let mut connection = Connection::open(server, Mode::Replication).await?;
    if connection.identify().await?.system_identifier != archive.system_identifier {
        return Err(Error::failed("the connection for it reached another server"));
    }
    let mut position = Segment::of(timeline, start, archive.segment_size).start(archive.segment_size);
    let mut stream = WalStream::start(connection, None, position, timeline).await?;
    let mut held: Vec<u8> = Vec::new();
    // Keepalives alone bring it nowhere: without WAL for that long, it ends.
    let mut deadline = tokio::time::Instant::now() + PATIENCE;
    while position < stop {
        let item = tokio::time::timeout_at(deadline, stream.next()).await;
        let item = item.map_err(|_| Error::failed(format!("the server sends nothing behind {position}")))??;
        match item {
            WalItem::Data { start, bytes } if start == position => {
                position.0 += bytes.len() as u64;
                deadline = tokio::time::Instant::now() + PATIENCE;
                held.extend_from_slice(&bytes);
                let whole = held.len() / WAL_PAGE * WAL_PAGE;
                feed(&held[..whole]);
                held.drain(..whole);
            }
            WalItem::Data { start, .. } => {
                return Err(Error::failed(format!("the server sent {start}, expected {position}")));
            }
            WalItem::Idle { .. } => stream.report(position, Lsn(0), false).await?,
            WalItem::TimelineEnd => {
                return Err(Error::failed(format!(
                    "timeline {timeline} ends at {position}, before the backup does"
                )));
            }
        }
    }
    stream.stop().await;
    held.resize(held.len().next_multiple_of(WAL_PAGE), 0);
    feed(&held);
    Ok(())
}

/// Whether a judgement is that of damage.
pub fn is_damage(failure: &proto::PageFailure) -> bool {
    !failure.judgement.starts_with("benign")
}
