//! The block map of a range of WAL: from the archive, and what is not there yet from the server.

use fairvault_format::proto;
use futures::StreamExt;
use tokio::sync::Semaphore;

use super::PARSER_VERSION;
use super::map::BlockMap;
use super::segment::{Chain, is_usable};
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;
use crate::postgres::walker::WAL_PAGE;
use crate::replication::conninfo::ConnInfo;
use crate::replication::reread::Reread;
use crate::wal::archive::Archive;
use crate::wal::summary::Summarizer;

/// Segments fetched at once.
const FETCH: usize = 8;
/// Of these, segments that are held as a whole.
const WALKS: usize = 2;
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

/// What the range changed, and perhaps more. Where that cannot be known, the map says so, and why. Maps of parsers in
/// `distrusted` are made anew.
pub async fn changes(
    archive: &Archive,
    server: &ConnInfo,
    distrusted: &[proto::DistrustParser],
    range: Range,
) -> BlockMap {
    let mut map = BlockMap::default();
    if distrusted.iter().any(|d| d.parser_version == PARSER_VERSION) {
        map.everything("the parser of this version is distrusted");
        return map;
    }
    let read = async {
        let mut chain = Chain::default();
        match from_archive(archive, distrusted, range, &mut chain).await? {
            None => Ok(chain),
            Some(segment) => from_server(archive, server, range, segment, chain).await,
        }
    };
    let why = match read.await {
        Ok(chain) => return chain.finish(),
        Err(error) => error,
    };
    map.everything(format!("WAL from {} to {}: {why}", range.from, range.to));
    map
}

/// Whole segments of the archive; says from which one on they are missing, if they end too early.
async fn from_archive(
    archive: &Archive,
    distrusted: &[proto::DistrustParser],
    range: Range,
    chain: &mut Chain,
) -> Result<Option<Segment>> {
    let size = archive.segment_size;
    let first = Segment::of(range.timeline, range.from, size);
    let heavy = &Semaphore::new(WALKS);
    let segments = std::iter::successors(Some(first), |segment| Some(segment.next()));
    let mut summaries = futures::stream::iter(segments)
        .map(|segment| async move { (segment, summary(archive, distrusted, segment, heavy).await) })
        .buffered(FETCH);
    while let Some((segment, summary)) = summaries.next().await {
        let Some(summary) = summary? else {
            return Ok(Some(segment));
        };
        let taken = chain.push(&summary, range.to);
        taken.map_err(|why| Error::failed(format!("{}: {why}", segment.name(size))))?;
        if chain.is_complete(segment.end(size), range.to) {
            return Ok(None);
        }
    }
    Err(Error::failed("there is no end to it"))
}

/// What a segment says of itself, from its header; from its content where the header holds no map that can be used.
async fn summary(
    archive: &Archive,
    distrusted: &[proto::DistrustParser],
    segment: Segment,
    heavy: &Semaphore,
) -> Result<Option<proto::WalSummary>> {
    let Some(header) = archive.segment_header(segment).await? else {
        return Ok(None);
    };
    let kept = header
        .summary
        .filter(|s| s.map.as_ref().is_some_and(|map| is_usable(map, distrusted)));
    if kept.is_some() {
        return Ok(kept);
    }
    let _one = heavy.acquire().await;
    let Some(content) = archive.whole_segment(segment).await? else {
        return Ok(None);
    };
    let (start, size) = (segment.start(archive.segment_size), archive.segment_size);
    let walked = tokio::task::spawn_blocking(move || {
        let mut summarizer = Summarizer::new(start, size);
        summarizer.feed(&content);
        summarizer.finish_with_map()
    });
    let summary = walked
        .await
        .map_err(|e| Error::failed("walking WAL panicked").caused_by(e))?;
    Ok(Some(summary))
}

/// The rest, from `segment` on.
async fn from_server(
    archive: &Archive,
    server: &ConnInfo,
    range: Range,
    mut segment: Segment,
    mut chain: Chain,
) -> Result<Chain> {
    let size = archive.segment_size;
    let mut position = segment.start(size);
    let mut stream = Reread::open(server, archive.system_identifier, segment.timeline, position).await?;
    let mut summarizer = Summarizer::new(position, size);
    let needed = Lsn(range.to.0 + RECORD_HEADER);
    while position < needed {
        let bytes = stream.next(needed).await?;
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let room = (segment.end(size).0 - position.0) as usize;
            let (now, behind) = rest.split_at(room.min(rest.len()));
            summarizer.feed(now);
            position.0 += now.len() as u64;
            rest = behind;
            if position == segment.end(size) {
                let whole = std::mem::replace(&mut summarizer, Summarizer::new(position, size));
                push(&mut chain, whole, segment, size, range)?;
                segment = segment.next();
            }
        }
    }
    stream.stop().await;
    if position > segment.start(size) {
        // Of the last page, what is behind the end need not be there.
        let missing = (WAL_PAGE - position.0 as usize % WAL_PAGE) % WAL_PAGE;
        summarizer.feed(&vec![0; missing]);
        push(&mut chain, summarizer, segment, size, range)?;
    }
    match chain.is_complete(position, range.to) {
        true => Ok(chain),
        false => Err(Error::failed(format!("it is not whole at {position}"))),
    }
}

fn push(chain: &mut Chain, summarizer: Summarizer, segment: Segment, size: u64, range: Range) -> Result<()> {
    let taken = chain.push(&summarizer.finish_with_map(), range.to);
    taken.map_err(|why| Error::failed(format!("{} from the server: {why}", segment.name(size))))
}
