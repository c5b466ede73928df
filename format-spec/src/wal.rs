//! WAL objects: segments, pieces, histories (SPEC.md, section 8).

use crate::error::{FormatError, Result};
use crate::header::Kind;
use crate::keys::{EpochKeys, KeyRole, Scope};
use crate::limits;
use crate::object::{ObjectReader, ObjectWriter};
use crate::proto::WalHeader;

/// Runs from this size on are hashed beside what else is done with them.
const PARALLEL_BYTES: usize = 1 << 20;

/// Seals a WAL file run by run: nothing but the sealed object is held.
pub struct WalSealer<'a> {
    writer: ObjectWriter<'a>,
    len: u64,
    level: i32,
}

impl<'a> WalSealer<'a> {
    /// Begins one. `context` is its name below the stanza; `salt` must be fresh and random.
    pub fn new(keys: &'a EpochKeys, scope: &'a Scope, kind: Kind, salt: [u8; 32], context: &str, level: i32) -> Self {
        let mut writer = ObjectWriter::new(keys, scope, kind, salt, context);
        writer.leave_first();
        Self { writer, len: 0, level }
    }

    /// Adds what comes next; runs have [`limits::WAL_SECTION_BYTES`], but the last.
    pub fn run(&mut self, content: &[u8]) -> Result<()> {
        self.len += content.len() as u64;
        self.writer.section(KeyRole::Data, content, self.level)
    }

    /// The object. `header` has the content's id (BLAKE3 with the epoch's `id_key`); its length is set here.
    pub fn finish(self, mut header: WalHeader) -> Result<Vec<u8>> {
        header.content_len = self.len;
        self.writer.finish_with_first(KeyRole::Meta, &header)
    }
}

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
    let mut sealer = WalSealer::new(keys, scope, kind, salt, context, level);
    for run in content.chunks(limits::WAL_SECTION_BYTES) {
        sealer.run(run)?;
    }
    sealer.finish(header)
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
    let mut content = Vec::new();
    let header = open_wal_runs(keys, scope, kind, bytes, context, |header, run| {
        if content.is_empty() {
            let capacity = header.content_len.min(bytes.len() as u64 * 64);
            content.reserve_exact(usize::try_from(capacity).unwrap_or(0));
        }
        content.extend_from_slice(run);
        Ok::<(), FormatError>(())
    })?;
    Ok((header, content))
}

/// Opens a whole WAL object run by run. Every run that `take` gets is authentic; only a return without an error
/// says that they are all, and its content's id.
pub fn open_wal_runs<E: From<FormatError>>(
    keys: &EpochKeys,
    scope: &Scope,
    kind: Kind,
    bytes: &[u8],
    context: &str,
    mut take: impl FnMut(&WalHeader, &[u8]) -> std::result::Result<(), E>,
) -> std::result::Result<WalHeader, E> {
    let mut reader = ObjectReader::new(keys, scope, kind, bytes, context, context)?;
    let header: WalHeader = reader.message(KeyRole::Meta)?;
    let mut hasher = blake3::Hasher::new_keyed(&keys.id_key);
    let (mut len, mut run) = (0, Vec::new());
    while reader.section_into(KeyRole::Data, &mut run)? {
        len += run.len() as u64;
        if len > header.content_len {
            return Err(FormatError::damaged(context, "it holds more than its header says").into());
        }
        // Taking a large run lasts as long as hashing it.
        match run.len() >= PARALLEL_BYTES {
            true => std::thread::scope(|scope| {
                scope.spawn(|| hasher.update(&run));
                take(&header, &run)
            })?,
            false => {
                hasher.update(&run);
                take(&header, &run)?;
            }
        }
    }
    if len != header.content_len || hasher.finalize().as_bytes()[..] != header.content_id {
        return Err(FormatError::damaged(context, "its content does not match its id").into());
    }
    Ok(header)
}
