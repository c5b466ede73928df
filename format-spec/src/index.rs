//! Index runs: which chunk is in which pack (SPEC.md, section 5).

use crate::error::{FormatError, Result};
use crate::header::{HEADER_LEN, Kind, ObjectHeader};
use crate::keys::{EpochKeys, Scope};
use crate::object::{open_message, seal_message};
use crate::proto;

/// Length of an entry, bytes.
pub const ENTRY_LEN: usize = 48;

/// A pack as an index run or a manifest knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PackRef {
    /// SHA-256 of the pack.
    pub name: [u8; 32],
    /// Its object header.
    pub header: ObjectHeader,
}

/// Where a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexEntry {
    /// Chunk id.
    pub id: [u8; 32],
    /// Position of the pack in the run's table.
    pub pack: u32,
    /// Position of the frame in the pack.
    pub ordinal: u32,
    /// Offset of the frame in the pack, bytes.
    pub offset: u32,
    /// Length of the frame as stored, bytes.
    pub stored_len: u32,
}

/// A decoded run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IndexRun {
    /// Packs that entries point to.
    pub packs: Vec<PackRef>,
    /// Entries in the order of their ids.
    pub entries: Vec<IndexEntry>,
}

/// Encodes a pack table: names and headers.
pub fn encode_pack_table(packs: &[PackRef]) -> (Vec<u8>, Vec<u8>) {
    (
        packs.iter().flat_map(|p| p.name).collect(),
        packs.iter().flat_map(|p| p.header.encode()).collect(),
    )
}

/// Decodes a pack table.
pub fn decode_pack_table(names: &[u8], headers: &[u8], what: &str) -> Result<Vec<PackRef>> {
    let (names, rest) = names.as_chunks::<32>();
    let (headers, more) = headers.as_chunks::<HEADER_LEN>();
    if names.len() != headers.len() || !rest.is_empty() || !more.is_empty() {
        return Err(FormatError::damaged(what, "its pack table is not consistent"));
    }
    names
        .iter()
        .zip(headers)
        .map(|(&name, header)| {
            Ok(PackRef {
                name,
                header: ObjectHeader::decode_kind(header, Kind::Pack, what)?,
            })
        })
        .collect()
}

/// Seals a run; the entries are sorted here.
pub fn seal_run(keys: &EpochKeys, scope: &Scope, salt: [u8; 32], mut run: IndexRun) -> Result<Vec<u8>> {
    run.entries.sort_unstable_by_key(|e| e.id);
    run.entries.dedup_by_key(|e| e.id);
    let (packs, headers) = encode_pack_table(&run.packs);
    let mut entries = Vec::with_capacity(run.entries.len() * ENTRY_LEN);
    for e in &run.entries {
        entries.extend_from_slice(&e.id);
        for word in [e.pack, e.ordinal, e.offset, e.stored_len] {
            entries.extend_from_slice(&word.to_le_bytes());
        }
    }
    seal_message(
        keys,
        scope,
        Kind::IndexRun,
        salt,
        "",
        &proto::IndexRun {
            packs,
            headers,
            entries,
        },
    )
}

/// Opens a run.
pub fn open_run(keys: &EpochKeys, scope: &Scope, bytes: &[u8], what: &str) -> Result<IndexRun> {
    let message: proto::IndexRun = open_message(keys, scope, Kind::IndexRun, bytes, "", what)?;
    let packs = decode_pack_table(&message.packs, &message.headers, what)?;
    let (chunks, rest) = message.entries.as_chunks::<ENTRY_LEN>();
    if !rest.is_empty() {
        return Err(FormatError::damaged(what, "its entries are not a multiple of 48 bytes"));
    }
    let mut entries = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let word = |at: usize| u32::from_le_bytes([chunk[at], chunk[at + 1], chunk[at + 2], chunk[at + 3]]);
        let mut id = [0u8; 32];
        id.copy_from_slice(&chunk[..32]);
        let entry = IndexEntry {
            id,
            pack: word(32),
            ordinal: word(36),
            offset: word(40),
            stored_len: word(44),
        };
        if entry.pack as usize >= packs.len() {
            return Err(FormatError::damaged(what, "an entry points outside its pack table"));
        }
        if entries.last().is_some_and(|last: &IndexEntry| last.id >= entry.id) {
            return Err(FormatError::damaged(what, "its entries are not sorted"));
        }
        entries.push(entry);
    }
    Ok(IndexRun { packs, entries })
}
