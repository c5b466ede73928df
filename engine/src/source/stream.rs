//! The `stream` source: a base backup over the replication protocol, taken apart into entries and chunks.
//!
//! Files come one after the other, `pg_control` last. A chunk buffer is filled straight from the socket's
//! buffer, which is the only copy before the codec.

use std::sync::Arc;

use bytes::BytesMut;
use fairvault_format::limits::CHUNK_BYTES;
use fairvault_format::proto::{self, FileKind};

use super::tar::{Event, Header, Kind, Parser};
use super::{Chunk, Entry, Feed, Run, Wanted};
use crate::error::{Error, Result};
use crate::postgres::files::relation_file;
use crate::postgres::lsn::Lsn;
use crate::postgres::{BLOCK_BYTES, BLOCKS_PER_SEGMENT};
use crate::replication::base_backup::{BaseBackup, Item};
use crate::track::selection::Selection;

/// Of the LSN that a page begins with.
const LSN_BYTES: usize = 8;

/// What a source found out besides the files.
#[derive(Debug)]
pub struct Ended {
    /// Stop LSN.
    pub stop: Lsn,
    /// Its timeline.
    pub timeline: u32,
}

/// Tablespaces as the server lists them.
pub fn tablespaces(backup: &BaseBackup<'_>) -> Vec<proto::Tablespace> {
    backup
        .tablespaces
        .iter()
        .filter_map(|row| {
            let in_place = !row.location.starts_with('/');
            let location = if in_place { String::new() } else { row.location.clone() };
            row.oid.map(|oid| proto::Tablespace {
                oid,
                location,
                in_place,
            })
        })
        .collect()
}

struct Current {
    number: u32,
    path: Arc<str>,
    wanted: Wanted,
    /// What came so far, bytes.
    position: u64,
    size: u64,
    /// The chunk that is being filled, and where it is in the file.
    buffer: BytesMut,
    runs: Vec<Run>,
    /// What came of the LSN of a page that is passed over: a message may end inside it.
    lsn: Vec<u8>,
}

/// Reads the base backup to its end.
pub async fn read(backup: &mut BaseBackup<'_>, feed: &mut Feed) -> Result<Ended> {
    let mut parser = Parser::default();
    let mut prefix = String::new();
    let mut current: Option<Current> = None;
    loop {
        match backup.next().await? {
            Item::Archive { tablespace } => {
                if !parser.at_boundary() {
                    return Err(Error::failed("an archive ended inside a file"));
                }
                parser = Parser::default();
                prefix = tablespace.map(|oid| format!("pg_tblspc/{oid}/")).unwrap_or_default();
            }
            Item::Data(data) => {
                let mut input = &data[..];
                while let Some(event) = parser.next(&mut input)? {
                    match event {
                        Event::Entry(header) => current = begin(feed, &prefix, header)?,
                        Event::Data(bytes) => {
                            if let Some(file) = &mut current {
                                append(feed, file, bytes).await?;
                            }
                        }
                        Event::EntryEnd => {
                            if let Some(mut file) = current.take()
                                && !file.buffer.is_empty()
                            {
                                flush(feed, &mut file).await?;
                            }
                        }
                    }
                }
            }
            Item::End { lsn, timeline } => {
                if !parser.at_boundary() {
                    return Err(Error::failed("the base backup ended inside a file"));
                }
                return Ok(Ended { stop: lsn, timeline });
            }
        }
    }
}

/// Notes an entry; returns what is needed to take its content, if it is a file.
fn begin(feed: &mut Feed, prefix: &str, header: Header) -> Result<Option<Current>> {
    let path = match header.path.as_str() {
        "" | "." => return Ok(None),
        path => format!("{prefix}{path}"),
    };
    check_path(&path)?;
    let Some(kind) = kind_of(&path, &header.kind)? else {
        return Ok(None);
    };
    let entry = Entry {
        path,
        kind,
        size: header.size,
        mode: header.mode,
        mtime_us: header.mtime_s.saturating_mul(1_000_000),
        link_target: String::new(),
        is_gone: false,
        wanted: Wanted::All,
    };
    let path: Arc<str> = entry.path.as_str().into();
    let size = entry.size;
    let wanted = feed.selection().of(&path, size);
    let entry = Entry {
        wanted: wanted.clone(),
        ..entry
    };
    let number = feed.entry(entry);
    Ok((kind == FileKind::FileRegular).then(|| Current {
        number,
        path,
        wanted,
        position: 0,
        size,
        buffer: BytesMut::new(),
        runs: Vec::new(),
        lsn: Vec::with_capacity(LSN_BYTES),
    }))
}

/// What an entry is in the manifest; `None` for a link of a tablespace, which the list of tablespaces describes. PostgreSQL
/// sends no others, and one of a server that lies would lead out of the restored directory.
fn kind_of(path: &str, kind: &Kind) -> Result<Option<FileKind>> {
    match kind {
        Kind::File => Ok(Some(FileKind::FileRegular)),
        Kind::Directory => Ok(Some(FileKind::FileDirectory)),
        Kind::Symlink(_) if path.strip_prefix("pg_tblspc/").is_some_and(|p| !p.contains('/')) => Ok(None),
        Kind::Symlink(target) => Err(Error::refused(format!(
            "the server sent the link {path:?} to {target:?}, and a base backup has none but those of tablespaces"
        ))),
    }
}

/// A path of a server that lies must not lead out of the restored directory.
pub(super) fn check_path(path: &str) -> Result<()> {
    let bad = path.len() > fairvault_format::limits::PATH_BYTES
        || path.split('/').any(|part| matches!(part, "" | "." | ".."))
        || path.contains('\0');
    if bad {
        Err(Error::refused(format!("the server sent the file name {path:?}")))
    } else {
        Ok(())
    }
}

async fn append(feed: &Feed, file: &mut Current, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        let room = CHUNK_BYTES as usize - file.buffer.len();
        let (take, is_wanted) = match &file.wanted {
            Wanted::All => (room.min(bytes.len()), true),
            // To the end of the page, which begins here or began before.
            Wanted::Blocks(_) => {
                let block = (file.position / u64::from(BLOCK_BYTES)) as u32;
                let begun = (file.position % u64::from(BLOCK_BYTES)) as usize;
                let take = (BLOCK_BYTES as usize - begun).min(bytes.len());
                (take, file.wanted.has(block))
            }
        };
        let (now, rest) = bytes.split_at(take);
        match is_wanted {
            true => keep(file, now),
            false => pass_over(feed.selection(), file, now)?,
        }
        if !is_wanted {
            feed.passed_over(take as u64);
        }
        file.position += take as u64;
        bytes = rest;
        if file.buffer.len() == CHUNK_BYTES as usize {
            flush(feed, file).await?;
        }
    }
    Ok(())
}

fn keep(file: &mut Current, bytes: &[u8]) {
    if file.buffer.capacity() == 0 {
        let left = usize::try_from(file.size.saturating_sub(file.position)).unwrap_or(usize::MAX);
        file.buffer.reserve((CHUNK_BYTES as usize).min(left));
    }
    file.buffer.extend_from_slice(bytes);
    let (offset, len) = (file.position, bytes.len() as u32);
    match file.runs.last_mut() {
        Some(last) if last.offset + u64::from(last.len) == offset => last.len += len,
        _ => file.runs.push(Run { offset, len }),
    }
}

/// What the parent has: it came all the same, so that it can be seen whether that is true.
fn pass_over(selection: &Selection, file: &mut Current, bytes: &[u8]) -> Result<()> {
    let block = u64::from(BLOCK_BYTES);
    let begun = (file.position % block) as usize;
    if begun >= LSN_BYTES {
        return Ok(());
    }
    if begun == 0 {
        file.lsn.clear();
    }
    file.lsn.extend_from_slice(&bytes[..bytes.len().min(LSN_BYTES - begun)]);
    match (&selection.basis, relation_file(&file.path)) {
        (Some(basis), Some(relation)) if file.lsn.len() == LSN_BYTES => {
            let number = relation.segment * BLOCKS_PER_SEGMENT + (file.position / block) as u32;
            basis.check_page(&file.path, &relation, number, &file.lsn)
        }
        _ => Ok(()),
    }
}

async fn flush(feed: &Feed, file: &mut Current) -> Result<()> {
    feed.chunk(Chunk {
        file: file.number,
        path: file.path.clone(),
        runs: std::mem::take(&mut file.runs).into(),
        bytes: std::mem::take(&mut file.buffer).freeze(),
        is_verified: false,
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_comes_in_pieces_is_looked_at_as_well() {
        let page: Vec<u8> = (0..BLOCK_BYTES).map(|at| at as u8 | 1).collect();
        for cuts in [&[][..], &[3], &[1, 2, 7], &[8], &[3, 4000]] {
            let mut file = Current {
                number: 0,
                path: "base/5/77".into(),
                wanted: Wanted::All,
                position: u64::from(BLOCK_BYTES),
                size: 3 * u64::from(BLOCK_BYTES),
                buffer: BytesMut::new(),
                runs: Vec::new(),
                lsn: vec![7; 5],
            };
            let mut from = 0;
            for &to in cuts.iter().chain([&(BLOCK_BYTES as usize)]) {
                pass_over(&Selection::default(), &mut file, &page[from..to]).unwrap();
                file.position += (to - from) as u64;
                from = to;
            }
            assert_eq!(file.lsn, page[..LSN_BYTES], "cut at {cuts:?}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for good in [
            "PG_VERSION",
            "base/1/2_vm",
            "pg_tblspc/16384/PG_15_202209061/5/6",
            "..a/b..",
        ] {
            check_path(good).unwrap();
        }
        let long = "x".repeat(fairvault_format::limits::PATH_BYTES + 1);
        for bad in [
            "/etc/passwd",
            "../x",
            "base/../../x",
            "base/..",
            "./x",
            "base//1",
            "a\0b",
            &long,
        ] {
            assert!(check_path(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn links_other_than_those_of_tablespaces_are_refused() {
        let link = |target: &str| Kind::Symlink(target.to_owned());
        assert_eq!(kind_of("base/1", &Kind::File).unwrap(), Some(FileKind::FileRegular));
        assert_eq!(kind_of("pg_tblspc/16384", &link("/srv/space")).unwrap(), None);
        for path in ["base/1", "postmaster.opts", "pg_tblspc/16384/PG_15_202209061/5"] {
            let error = kind_of(path, &link("../../etc")).unwrap_err().to_string();
            assert!(error.contains(path) && error.contains("../../etc"), "{error}");
        }
    }
}
