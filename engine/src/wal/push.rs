//! `archive_command`: a file of pg_wal into the repository, with every doubt a refusal.
//!
//! Exit 0 of `wal push` lets PostgreSQL delete the segment: it is given only once the object is durable.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use fairvault_format::wal::Compression;

use super::archive::{Archive, Stored};
use super::coverage::Coverage;
use crate::commit::Log;
use crate::error::{Context, Error, Result};
use crate::postgres::control::ControlFile;
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{NotAnAncestor, Segment, WalFile, valid_segment_size};
use crate::postgres::walker::{LongHeader, PageHeader, WAL_PAGE};
use crate::restore::CONTROL_FILE;

/// The file in a restored data directory that forbids archiving until it is adopted.
pub const RESTORED_MARKER: &str = "fairvault.restored";

/// The file is there, and no larger than the largest possible segment; returns its length.
fn check_file(path: &Path) -> Result<u64> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(format_args!("reading {}", path.display()), e))?;
    if !meta.is_file() || meta.len() > 1 << 30 {
        return Err(Error::refused(format!(
            "{} is no WAL file: it has {} bytes",
            path.display(),
            meta.len()
        )));
    }
    Ok(meta.len())
}

fn read_file(path: &Path) -> Result<Vec<u8>> {
    check_file(path)?;
    std::fs::read(path).map_err(|e| Error::io(format_args!("reading {}", path.display()), e))
}

/// BLAKE3 of a file's content, without a key.
pub fn hash_file(path: &Path) -> Result<[u8; 32]> {
    check_file(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(|e| Error::io(format_args!("reading {}", path.display()), e))?;
    let mut buffer = vec![0u8; 256 << 10];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(*hasher.finalize().as_bytes()),
            Ok(n) => _ = hasher.update(&buffer[..n]),
            Err(e) => return Err(Error::io(format_args!("reading {}", path.display()), e)),
        }
    }
}

/// Refuses to archive from a restored copy that was not told to.
pub fn check_adopted(path: &Path) -> Result<()> {
    let data_directory = path
        .parent()
        .and_then(Path::parent)
        .map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p });
    let folders = [Some(Path::new(".")), data_directory];
    match folders
        .into_iter()
        .flatten()
        .find(|folder| folder.join(RESTORED_MARKER).exists())
    {
        None => Ok(()),
        Some(folder) => Err(Error::refused(format!(
            "{} is a restored copy: it does not archive, so that it cannot poison the archive of its original",
            folder.display()
        ))
        .remedy(format!(
            "if this copy replaces the original, delete {}/{RESTORED_MARKER}; otherwise set archive_mode = off",
            folder.display()
        ))),
    }
}

/// The cluster in whose pg_wal a file lies, which does not say itself of which one it is; `None` if it lies elsewhere.
fn cluster_of(path: &Path) -> Result<Option<u64>> {
    let pg_wal = path.parent().filter(|folder| folder.ends_with("pg_wal"));
    let Some(data_directory) = pg_wal.and_then(Path::parent) else {
        return Ok(None);
    };
    let control = data_directory.join(CONTROL_FILE);
    let bytes = match std::fs::read(&control) {
        Ok(bytes) => bytes,
        // A folder of that name beside no cluster.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(format_args!("reading {}", control.display()), e)),
    };
    // It may be being written just now.
    let control = ControlFile::parse(&bytes).map_err(|e| Error::temporary("global/pg_control").caused_by(e))?;
    Ok(Some(control.system_identifier))
}

fn refuse(name: &str, why: impl std::fmt::Display) -> Error {
    Error::refused(format!("{name} is not archived: {why}"))
}

/// A file that was stored.
#[derive(Debug, Clone, Copy)]
pub struct Pushed {
    /// What happened.
    pub stored: Stored,
    /// Bytes of its object.
    pub bytes: u64,
    /// BLAKE3 of the content that was stored, without a key, if that was asked for.
    pub hash: Option<[u8; 32]>,
}

/// Checks and stores a file.
pub async fn push(
    log: &mut Log,
    name: &str,
    path: &Path,
    compression: Compression,
    wants_hash: bool,
) -> Result<Pushed> {
    let long = first_page(name, path)?;
    let cluster = match long {
        Some((_, long)) => Some(long.system_identifier),
        None => cluster_of(path).context(|| format!("{name} is not archived"))?,
    };
    if cluster.is_none() && log.state().incarnations.len() > 1 {
        return Err(refuse(
            name,
            "it does not say of which of the stanza's clusters it is, and lies in no pg_wal",
        ));
    }
    let archive = Archive::open(log, cluster, compression).context(|| format!("{name} is not archived"))?;
    let file = WalFile::parse(name, archive.segment_size)?;
    let pushed = match (&file, long) {
        (WalFile::Segment(segment), Some((page, long))) => {
            check_segment(&archive, name, *segment, check_file(path)?, &page, &long).await?;
            push_segment(&archive, name, *segment, path, wants_hash).await?
        }
        (WalFile::Segment(_) | WalFile::Partial(_), None) => {
            return Err(refuse(name, "it does not begin with a WAL page"));
        }
        (_, long) => {
            let content = read_file(path)?;
            if let (WalFile::Partial(segment), Some((page, long))) = (&file, long) {
                check_segment(&archive, name, *segment, content.len() as u64, &page, &long).await?;
            }
            if let WalFile::History(timeline) = file {
                crate::postgres::segment::History::parse(timeline, &content)?;
            }
            let hash = wants_hash.then(|| *blake3::hash(&content).as_bytes());
            let (stored, bytes) = archive.put_sized(file, name, content).await?;
            Pushed { stored, bytes, hash }
        }
    };
    if pushed.stored == Stored::Beside {
        tracing::warn!("{name}: another partial segment of this name was archived before; both are kept");
    }
    archive.check_fence(log).await?;
    Ok(pushed)
}

/// A complete segment is full of records, or ends with a switch. One that cannot be read to its end is
/// damaged, or a copy that was padded for a recovery: it must never take the place of the real one.
async fn push_segment(
    archive: &Archive,
    name: &str,
    segment: Segment,
    path: &Path,
    wants_hash: bool,
) -> Result<Pushed> {
    let (sealed, beside) = tokio::join!(
        archive.seal_file(segment, path.to_owned(), wants_hash),
        archive.check_beside(segment, path.to_owned(), archive.segment_size),
    );
    let sealed = sealed?;
    let hash = sealed.hash;
    let mut bytes = sealed.object_len();
    let (stopped_at, why) = (Lsn(sealed.summary.stopped_at), sealed.summary.stopped_why.clone());
    let stored = match stopped_at.0 != 0 {
        false => {
            beside?;
            archive.put_sealed(sealed).await?
        }
        true => {
            let size = archive.segment_size;
            let content = read_file(path)?;
            let from = stopped_at.0.saturating_sub(segment.start(size).0) as usize;
            let zeros = content.get(from..).is_some_and(|rest| rest.iter().all(|&b| b == 0));
            if zeros && sealed.summary.switched {
                beside?;
                archive.put_sealed(sealed).await?
            } else if let Some(end) = ended_inside(archive, segment, stopped_at).await? {
                // A standby that archives (archive_mode = always) hands over the last segment of a timeline
                // under its complete name.
                let len = (end.0 - segment.start(size).0) as usize;
                archive.check_beside(segment, path.to_owned(), len as u64).await?;
                bytes = len as u64;
                archive.put_piece(segment, 0, content[..len].to_vec()).await?.0
            } else {
                return Err(not_filled(name, stopped_at, &why, zeros));
            }
        }
    };
    Ok(Pushed { stored, bytes, hash })
}

/// Where the segment's timeline ended inside it, before `stopped_at`, as a history says.
async fn ended_inside(archive: &Archive, segment: Segment, stopped_at: Lsn) -> Result<Option<Lsn>> {
    let start = segment.start(archive.segment_size);
    let coverage = Coverage::read(archive).await?;
    let ends = coverage
        .histories()
        .filter_map(|h| h.ancestors.iter().find(|a| a.timeline == segment.timeline))
        .map(|a| a.end);
    let mut inside = ends.filter(|end| *end > start && *end <= stopped_at);
    Ok(inside.next())
}

fn not_filled(name: &str, stopped_at: Lsn, why: &str, zeros: bool) -> Error {
    let error = refuse(
        name,
        match zeros {
            true => format!(
                "it is empty from {stopped_at} on, without a switch record: a padded copy, not a complete segment"
            ),
            false => format!("it cannot be read beyond {stopped_at}: {why}"),
        },
    );
    error.remedy(
        "if this timeline ended here because a standby was promoted, it is archived as soon as the history of the new timeline is; \
         otherwise the server's pg_wal is damaged: take a new backup",
    )
}

/// Whether `name` is the segment after `before`, or the same one, on one timeline, by their names.
pub fn follows(before: &str, name: &str) -> bool {
    // Names wrap at every 4 GiB: there, the answer is no, which costs a look.
    let number = |name: &str| {
        let (timeline, rest) = name.split_at_checked(8)?;
        (name.len() == 24).then_some(())?;
        Some((timeline.to_owned(), u64::from_str_radix(rest, 16).ok()?))
    };
    match (number(before), number(name)) {
        (Some((old, a)), Some((new, b))) => old == new && (b == a || b == a + 1),
        _ => false,
    }
}

/// Whether WAL that the archive once had goes on to this segment: else, which segment is missing. Costs one
/// small request unless something is missing.
pub async fn gap_before(log: &Log, name: &str, path: &Path) -> Result<Option<String>> {
    let Some((_, long)) = first_page(name, path)? else {
        return Ok(None);
    };
    let archive = Archive::open(log, Some(long.system_identifier), 0)?;
    let WalFile::Segment(segment) = WalFile::parse(name, archive.segment_size)? else {
        return Ok(None);
    };
    let Some(number) = segment.number.checked_sub(1) else {
        return Ok(None);
    };
    let previous = Segment { number, ..segment };
    let before = previous.name(archive.segment_size);
    let object = archive.object_name(&WalFile::Segment(previous), &before);
    if archive.stanza.store().len(&object).await?.is_some() {
        return Ok(None);
    }
    let coverage = Coverage::read(&archive).await?;
    let Some(history) = archive.history(segment.timeline).await? else {
        return Ok(None);
    };
    let Some(oldest) = coverage
        .oldest(&history)
        .filter(|oldest| oldest.number < segment.number)
    else {
        return Ok(None);
    };
    let missing = coverage.reach(&history, oldest.start(archive.segment_size)).missing;
    Ok((missing.number < segment.number).then(|| {
        let first = missing.name(archive.segment_size);
        match first == before {
            true => first,
            false => format!("{first} to {before}"),
        }
    }))
}

/// The first page's header, for files that have one.
fn first_page(name: &str, path: &Path) -> Result<Option<(PageHeader, LongHeader)>> {
    if name.ends_with(".history") || name.ends_with(".backup") {
        return Ok(None);
    }
    check_file(path)?;
    let mut start = Vec::new();
    let opened = File::open(path).and_then(|file| file.take(WAL_PAGE as u64).read_to_end(&mut start));
    opened.map_err(|e| Error::io(format_args!("reading {}", path.display()), e))?;
    let page = PageHeader::parse(&start).map_err(|why| refuse(name, why))?;
    let long = page
        .long
        .ok_or_else(|| refuse(name, "its first page has no long header"))?;
    if !valid_segment_size(long.segment_size.into()) {
        return Err(refuse(
            name,
            format_args!("it says that segments have {} bytes", long.segment_size),
        ));
    }
    Ok(Some((page, long)))
}

async fn check_segment(
    archive: &Archive,
    name: &str,
    segment: Segment,
    len: u64,
    page: &PageHeader,
    long: &LongHeader,
) -> Result<()> {
    let size = archive.segment_size;
    if u64::from(long.segment_size) != size {
        return Err(refuse(
            name,
            format_args!(
                "its segments have {} bytes, those of the stanza {size}",
                long.segment_size
            ),
        ));
    }
    if len != size {
        return Err(refuse(name, format_args!("it has {len} bytes; a segment has {size}")));
    }
    let start = segment.start(size);
    if page.address != start {
        return Err(refuse(
            name,
            format_args!("its first page is of {}, its name says {start}", page.address),
        ));
    }
    if page.timeline == segment.timeline {
        return Ok(());
    }
    if page.timeline > segment.timeline {
        return Err(refuse(
            name,
            format_args!("its first page is of timeline {}", page.timeline),
        ));
    }
    // The first segment after a promotion begins with a copy of the old timeline's.
    let history = archive.history(segment.timeline).await?.ok_or_else(|| {
        refuse(
            name,
            format_args!("the history of timeline {} is not archived yet", segment.timeline),
        )
        .remedy("PostgreSQL archives the history first; if it is lost, copy it into pg_wal of the server")
    })?;
    match history.end_of(page.timeline) {
        Ok(Some(end)) if end >= start && end.0 < start.0 + size => Ok(()),
        Ok(end) => Err(refuse(
            name,
            format_args!(
                "it begins with timeline {}, which ended at {}",
                page.timeline,
                end.unwrap_or(Lsn(0))
            ),
        )),
        Err(NotAnAncestor) => Err(refuse(
            name,
            format_args!(
                "it begins with timeline {}, which is not in the history of {}",
                page.timeline, segment.timeline
            ),
        )),
    }
}
