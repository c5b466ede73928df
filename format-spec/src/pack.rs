//! Packs: frames, a sealed directory and a fixed footer (SPEC.md, section 4).

use prost::Message;

use crate::error::{FormatError, Result, check_limit};
use crate::header::{HEADER_LEN, Kind, ObjectHeader};
use crate::keys::{EpochKeys, KeyRole, Scope};
use crate::object::SECTION_HEADER_LEN;
use crate::{limits, proto};

/// Length of the footer, bytes.
pub const FOOTER_LEN: usize = 32;
const FOOTER_MAGIC: &[u8; 8] = b"FVPACKv1";

/// One frame of a pack, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Chunk id.
    pub id: [u8; 32],
    /// Length as stored.
    pub stored_len: u32,
    /// Length of the chunk.
    pub plain_len: u32,
}

/// Where the directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Offset of the directory's section header.
    pub directory_offset: u64,
    /// Length of the directory, section header included.
    pub directory_len: u32,
    /// Frames in the pack.
    pub frames: u32,
}

impl Footer {
    fn encode(&self) -> [u8; FOOTER_LEN] {
        let mut out = [0u8; FOOTER_LEN];
        out[..8].copy_from_slice(&self.directory_offset.to_le_bytes());
        out[8..12].copy_from_slice(&self.directory_len.to_le_bytes());
        out[12..16].copy_from_slice(&self.frames.to_le_bytes());
        out[24..].copy_from_slice(FOOTER_MAGIC);
        out
    }

    /// Reads the footer from the last bytes of a pack of `pack_len` bytes.
    pub fn decode(tail: &[u8], pack_len: u64, what: &str) -> Result<Self> {
        check_limit(what, pack_len, limits::PACK_BYTES)?;
        let Some(b) = tail.last_chunk::<FOOTER_LEN>() else {
            return Err(FormatError::damaged(what, "it is shorter than a pack footer"));
        };
        if &b[24..30] == b"FVPACK" && &b[24..] != FOOTER_MAGIC {
            return Err(FormatError::unsupported(what, "pack footer of another version"));
        }
        if &b[24..] != FOOTER_MAGIC || b[16..24] != [0; 8] {
            return Err(FormatError::damaged(what, "it does not end with a pack footer"));
        }
        let mut offset = [0u8; 8];
        offset.copy_from_slice(&b[..8]);
        let footer = Self {
            directory_offset: u64::from_le_bytes(offset),
            directory_len: u32::from_le_bytes([b[8], b[9], b[10], b[11]]),
            frames: u32::from_le_bytes([b[12], b[13], b[14], b[15]]),
        };
        check_limit(what, footer.frames.into(), limits::PACK_FRAMES.into())?;
        let end = footer.directory_offset.checked_add(footer.directory_len.into());
        if footer.directory_offset < HEADER_LEN as u64
            || (footer.directory_len as usize) < SECTION_HEADER_LEN
            || end != pack_len.checked_sub(FOOTER_LEN as u64)
        {
            return Err(FormatError::damaged(what, "its footer points outside the pack"));
        }
        Ok(footer)
    }
}

/// The bytes that follow the frames of a pack: sealed directory and footer.
pub fn seal_tail(
    keys: &EpochKeys,
    scope: &Scope,
    header: &ObjectHeader,
    entries: &[DirectoryEntry],
) -> Result<Vec<u8>> {
    check_limit("frames of a pack", entries.len() as u64, limits::PACK_FRAMES.into())?;
    let directory = proto::PackDirectory {
        ids: entries.iter().flat_map(|e| e.id).collect(),
        stored_len: entries.iter().map(|e| e.stored_len).collect(),
        plain_len: entries.iter().map(|e| e.plain_len).collect(),
    };
    let mut tail = crate::object::seal_section(keys, scope, header, KeyRole::Meta, &directory.encode_to_vec())?;
    let footer = Footer {
        directory_offset: HEADER_LEN as u64 + entries.iter().map(|e| u64::from(e.stored_len)).sum::<u64>(),
        directory_len: tail.len() as u32,
        frames: entries.len() as u32,
    };
    tail.extend_from_slice(&footer.encode());
    Ok(tail)
}

/// Opens a directory; `directory` are the bytes that the footer points to.
pub fn open_directory(
    keys: &EpochKeys,
    scope: &Scope,
    header: &ObjectHeader,
    footer: &Footer,
    directory: &[u8],
    what: &str,
) -> Result<Vec<DirectoryEntry>> {
    let plain = crate::object::open_section(keys, scope, header, KeyRole::Meta, directory, what)?;
    let d = proto::PackDirectory::decode(plain.as_slice()).map_err(|e| FormatError::damaged(what, e.to_string()))?;
    let count = footer.frames as usize;
    if d.ids.len() != count * 32 || d.stored_len.len() != count || d.plain_len.len() != count {
        return Err(FormatError::damaged(
            what,
            "its directory does not list as many frames as its footer says",
        ));
    }
    let entries: Vec<_> = d
        .ids
        .as_chunks::<32>()
        .0
        .iter()
        .zip(d.stored_len.iter().zip(&d.plain_len))
        .map(|(&id, (&stored_len, &plain_len))| DirectoryEntry {
            id,
            stored_len,
            plain_len,
        })
        .collect();
    let frames: u64 = entries.iter().map(|e| u64::from(e.stored_len)).sum();
    if HEADER_LEN as u64 + frames != footer.directory_offset {
        return Err(FormatError::damaged(
            what,
            "its frames do not add up to the directory's offset",
        ));
    }
    Ok(entries)
}

/// Reads header, footer and directory of a whole pack in memory.
pub fn open_pack(
    keys: &EpochKeys,
    scope: &Scope,
    bytes: &[u8],
    what: &str,
) -> Result<(ObjectHeader, Vec<DirectoryEntry>)> {
    let footer = Footer::decode(bytes, bytes.len() as u64, what)?;
    let header = ObjectHeader::decode_kind(bytes, Kind::Pack, what)?;
    let from = footer.directory_offset as usize;
    let directory = &bytes[from..from + footer.directory_len as usize];
    let entries = open_directory(keys, scope, &header, &footer, directory, what)?;
    Ok((header, entries))
}
