//! WAL objects: segments, pieces, histories (SPEC.md, section 8).

use crate::error::{FormatError, Result};
use crate::header::Kind;
use crate::keys::{EpochKeys, KeyRole, Scope};
use crate::limits;
use crate::object::{ObjectReader, ObjectWriter};
use crate::proto::WalHeader;

/// Seals a WAL file. `context` is its name below the stanza; `header`'s content id and length are set here.
#[allow(clippy::too_many_arguments)]
pub fn seal_wal(
    keys: &EpochKeys,
    scope: &Scope,
    kind: Kind,
    salt: [u8; 32],
    context: &str,
    mut header: WalHeader,
    content: &[u8],
    level: i32,
) -> Result<Vec<u8>> {
    header.content_id = keys.chunk_id(content).to_vec();
    header.content_len = content.len() as u64;
    let mut writer = ObjectWriter::new(keys, scope, kind, salt, context);
    writer.message(KeyRole::Meta, &header)?;
    for run in content.chunks(limits::WAL_SECTION_BYTES) {
        writer.section(KeyRole::Data, run, level)?;
    }
    Ok(writer.finish())
}

/// How many bytes from the beginning of a WAL object are needed to read its header; more than `bytes` has
/// means: fetch that many and ask again.
pub fn header_len(keys: &EpochKeys, scope: &Scope, kind: Kind, bytes: &[u8], context: &str) -> Result<usize> {
    ObjectReader::new(keys, scope, kind, bytes, context, context)?.next_section_end()
}

/// Opens the header of a WAL object, from its beginning.
pub fn open_header(keys: &EpochKeys, scope: &Scope, kind: Kind, bytes: &[u8], context: &str) -> Result<WalHeader> {
    ObjectReader::new(keys, scope, kind, bytes, context, context)?.message(KeyRole::Meta)
}

/// Opens a whole WAL object and checks its content's id.
pub fn open_wal(
    keys: &EpochKeys,
    scope: &Scope,
    kind: Kind,
    bytes: &[u8],
    context: &str,
) -> Result<(WalHeader, Vec<u8>)> {
    let mut reader = ObjectReader::new(keys, scope, kind, bytes, context, context)?;
    let header: WalHeader = reader.message(KeyRole::Meta)?;
    let capacity = usize::try_from(header.content_len.min(bytes.len() as u64 * 64)).unwrap_or(0);
    let mut content = Vec::with_capacity(capacity);
    while let Some(run) = reader.section(KeyRole::Data)? {
        content.extend_from_slice(&run);
        if content.len() as u64 > header.content_len {
            return Err(FormatError::damaged(context, "it holds more than its header says"));
        }
    }
    if content.len() as u64 != header.content_len || keys.chunk_id(&content)[..] != header.content_id {
        return Err(FormatError::damaged(context, "its content does not match its id"));
    }
    Ok((header, content))
}
