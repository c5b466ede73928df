//! The `stream` source: a base backup over the replication protocol, taken apart into entries and chunks.
//!
//! Files come one after the other, `pg_control` last. A chunk buffer is filled straight from the socket's
//! buffer, which is the only copy before the codec.

use std::sync::Arc;

use bytes::BytesMut;
use fairvault_format::limits::CHUNK_BYTES;
use fairvault_format::proto::{self, FileKind};

use super::tar::{Event, Header, Kind, Parser};
use super::{Chunk, Entry, Feed};
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::replication::base_backup::{BaseBackup, Item};

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
    offset: u64,
    buffer: BytesMut,
    left: u64,
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
    // Links of tablespaces are described by the list of tablespaces.
    if matches!(header.kind, Kind::Symlink(_)) && path.strip_prefix("pg_tblspc/").is_some_and(|p| !p.contains('/')) {
        return Ok(None);
    }
    let (kind, link_target) = match header.kind {
        Kind::File => (FileKind::FileRegular, String::new()),
        Kind::Directory => (FileKind::FileDirectory, String::new()),
        Kind::Symlink(target) => (FileKind::FileSymlink, target),
    };
    let entry = Entry {
        path,
        kind,
        size: header.size,
        mode: header.mode,
        mtime_us: header.mtime_s.saturating_mul(1_000_000),
        link_target,
        is_gone: false,
    };
    let path: Arc<str> = entry.path.as_str().into();
    let size = entry.size;
    let number = feed.entry(entry);
    Ok((kind == FileKind::FileRegular).then(|| Current {
        number,
        path,
        offset: 0,
        buffer: BytesMut::new(),
        left: size,
    }))
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
        if file.buffer.capacity() == 0 {
            file.buffer
                .reserve((CHUNK_BYTES as usize).min(usize::try_from(file.left).unwrap_or(usize::MAX)));
        }
        let take = (CHUNK_BYTES as usize - file.buffer.len()).min(bytes.len());
        file.buffer.extend_from_slice(&bytes[..take]);
        bytes = &bytes[take..];
        if file.buffer.len() == CHUNK_BYTES as usize {
            flush(feed, file).await?;
        }
    }
    Ok(())
}

async fn flush(feed: &Feed, file: &mut Current) -> Result<()> {
    let bytes = std::mem::take(&mut file.buffer).freeze();
    let offset = file.offset;
    file.offset += bytes.len() as u64;
    file.left = file.left.saturating_sub(bytes.len() as u64);
    feed.chunk(Chunk {
        file: file.number,
        path: file.path.clone(),
        offset,
        bytes,
    })
    .await
}
