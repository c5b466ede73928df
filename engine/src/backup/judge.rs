//! Is a page with a wrong checksum damage, or was it read while the server wrote it?
//!
//! A torn page is benign only if the WAL between start and stop restores it: it holds a full image of the
//! block, or initialises it. Free-space and visibility maps repair themselves. Anything else is damage.

use std::collections::HashSet;

use fairvault_format::proto;

use super::pipeline::BadPage;
use crate::error::Result;
use crate::postgres::BLOCKS_PER_SEGMENT;
use crate::postgres::files::Fork;
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;
use crate::postgres::walker::{BlockRef, WAL_PAGE, Walker};
use crate::replication::conninfo::ConnInfo;
use crate::replication::reread::Reread;
use crate::wal::archive::Archive;

/// Key of a block: tablespace, database, relation, number of the fork, block.
type Block = (u32, u32, u32, u8, u32);

/// Judges pages with the WAL in the repository; with that of the server where this host's key does not read what is stored.
pub async fn judge(
    archive: &Archive,
    server: &ConnInfo,
    timeline: u32,
    start: Lsn,
    stop: Lsn,
    bad: &[BadPage],
) -> Result<Vec<proto::PageFailure>> {
    if bad.is_empty() {
        return Ok(Vec::new());
    }
    let key = |page: &BadPage| -> Block {
        let block = page
            .file
            .segment
            .wrapping_mul(BLOCKS_PER_SEGMENT)
            .wrapping_add(page.block);
        (
            page.file.tablespace,
            page.file.database,
            page.file.relation,
            page.file.fork.number(),
            block,
        )
    };
    let wanted: HashSet<Block> = bad.iter().map(key).collect();
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
            let whole = |b: &&BlockRef| b.restores_whole;
            for b in decoded.blocks.iter().filter(whole) {
                let block = (b.tablespace, b.database, b.relation, b.fork, b.block);
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
        Fork::Main | Fork::Init if restored.contains(&key(page)) => {
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
    let from = Segment::of(timeline, start, archive.segment_size).start(archive.segment_size);
    let mut stream = Reread::open(server, archive.system_identifier, timeline, from).await?;
    let mut held: Vec<u8> = Vec::new();
    while stream.position() < stop {
        held.extend_from_slice(&stream.next(stop).await?);
        let whole = held.len() / WAL_PAGE * WAL_PAGE;
        feed(&held[..whole]);
        held.drain(..whole);
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
