//! WAL objects: segments, pieces, histories (SPEC.md, section 8).

use std::sync::atomic::{AtomicUsize, Ordering};

use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};

use crate::error::{FormatError, Result};
use crate::header::Kind;
use crate::keys::{EpochKeys, KeyRole, Scope};
use crate::limits;
use crate::object::{ObjectReader, ObjectWriter};
use crate::proto::WalHeader;
use crate::public::Fresh;

const NOT_ITS_ID: &str = "its content does not match its id";

/// How WAL is compressed.
#[derive(Default, Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compression {
    /// zstd level.
    pub level: i32,
    /// Records are taken apart before zstd (codec 3), where that makes a run smaller.
    pub records: bool,
}

impl From<i32> for Compression {
    /// zstd alone.
    fn from(level: i32) -> Self {
        Self { level, records: false }
    }
}

/// Seals a WAL file run by run: nothing but the sealed object is held.
pub struct WalSealer<'a> {
    writer: ObjectWriter<'a>,
    start: u64,
    len: u64,
    compression: Compression,
}

impl<'a> WalSealer<'a> {
    /// Begins one. `context` is its name below the stanza; `fresh` must be fresh and random; `start` is the LSN of its
    /// first byte, if it is WAL.
    pub fn new(
        keys: &'a EpochKeys,
        scope: &'a Scope,
        kind: Kind,
        fresh: impl Into<Fresh>,
        context: &str,
        start: u64,
        compression: impl Into<Compression>,
    ) -> Result<Self> {
        let mut writer = ObjectWriter::with_data(keys, scope, kind, fresh, context)?;
        writer.leave_first();
        Ok(Self {
            writer,
            start,
            len: 0,
            compression: compression.into(),
        })
    }

    /// Adds what comes next; runs have [`limits::WAL_SECTION_BYTES`], but the last.
    pub fn run(&mut self, content: &[u8]) -> Result<()> {
        let start = self.start.wrapping_add(self.len);
        self.len += content.len() as u64;
        match self.compression {
            Compression { level, records: true } => self.writer.records_section(content, start, level),
            Compression { level, records: false } => self.writer.section(KeyRole::Data, content, level),
        }
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
    fresh: impl Into<Fresh>,
    context: &str,
    mut header: WalHeader,
    content: &[u8],
    compression: impl Into<Compression>,
) -> Result<Vec<u8>> {
    header.content_id = keys.chunk_id(content).to_vec();
    let mut sealer = WalSealer::new(keys, scope, kind, fresh, context, header.start_lsn, compression)?;
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
    let mut reader = ObjectReader::new(keys, scope, kind, bytes, context, context)?;
    let header: WalHeader = reader.message(KeyRole::Meta)?;
    let capacity = header.content_len.min(bytes.len() as u64 * 64);
    let mut content = Vec::with_capacity(usize::try_from(capacity).unwrap_or(0));
    let mut run = Vec::new();
    while reader.section_into(KeyRole::Data, &mut run)? {
        content.extend_from_slice(&run);
        if content.len() as u64 > header.content_len {
            return Err(FormatError::damaged(context, "it holds more than its header says"));
        }
    }
    match content.len() as u64 == header.content_len && keys.chunk_id(&content)[..] == header.content_id {
        true => Ok((header, content)),
        false => Err(FormatError::damaged(context, NOT_ITS_ID)),
    }
}

/// Opens a whole WAL object, up to `threads` of its runs at once, each of which goes to `take` with its place in the
/// content, in any order. Every run that `take` gets is authentic; only a return without an error says that they are
/// all, and its content's id. Each thread asks `buffer` once for memory for the longest run, of that many bytes.
#[allow(clippy::too_many_arguments)]
pub fn open_wal_runs<E: From<FormatError> + Send, B: AsMut<[u8]>>(
    keys: &EpochKeys,
    scope: &Scope,
    kind: Kind,
    bytes: &[u8],
    context: &str,
    threads: usize,
    buffer: impl Fn(usize) -> std::result::Result<B, E> + Sync,
    take: impl Fn(&WalHeader, u64, &[u8]) -> std::result::Result<(), E> + Sync,
) -> std::result::Result<WalHeader, E> {
    let mut reader = ObjectReader::new(keys, scope, kind, bytes, context, context)?;
    let header: WalHeader = reader.message(KeyRole::Meta)?;
    let lengths = reader.lengths_of_rest()?;
    let mut starts = Vec::with_capacity(lengths.len());
    let mut len = 0;
    for run in &lengths {
        starts.push(len);
        len += u64::from(*run);
    }
    let mismatch = |why| E::from(FormatError::damaged(context, why));
    if len != header.content_len {
        return Err(mismatch("it does not hold as much as its header says"));
    }
    let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
    // Runs of this length are subtrees of the hash; an object may be divided in other ways.
    let run_len = limits::WAL_SECTION_BYTES as u64;
    let starts_so = starts.iter().zip(0..).all(|(&start, n)| start == n * run_len);
    let is_divided = starts_so && lengths.iter().all(|&len| (1..=run_len).contains(&u64::from(len)));
    if lengths.len() < 2 || !is_divided {
        let mut hasher = blake3::Hasher::new_keyed(&keys.id_key);
        let mut memory = buffer(longest)?;
        for (&start, &len) in starts.iter().zip(&lengths) {
            let run = &mut memory.as_mut()[..len as usize];
            reader.section_to(KeyRole::Data, run)?;
            hasher.update(run);
            take(&header, start, run)?;
        }
        return match hasher.finalize().as_bytes()[..] == header.content_id {
            true => Ok(header),
            false => Err(mismatch(NOT_ITS_ID)),
        };
    }
    let next = AtomicUsize::new(0);
    let open = |mut reader: ObjectReader<'_>| {
        let (mut memory, mut hashes) = (buffer(longest)?, Vec::new());
        let mut at = 0;
        loop {
            let mine = next.fetch_add(1, Ordering::Relaxed);
            let Some(&start) = starts.get(mine) else {
                return Ok::<_, E>(hashes);
            };
            reader.skip(mine - at)?;
            let run = &mut memory.as_mut()[..lengths[mine] as usize];
            reader.section_to(KeyRole::Data, run)?;
            at = mine + 1;
            let mut hasher = blake3::Hasher::new_keyed(&keys.id_key);
            hashes.push((mine, hasher.set_input_offset(start).update(run).finalize_non_root()));
            take(&header, start, run).inspect_err(|_| next.store(starts.len(), Ordering::Relaxed))?;
        }
    };
    let opened = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.clamp(1, lengths.len()))
            .map(|_| {
                let reader = reader.again();
                scope.spawn(|| open(reader))
            })
            .collect();
        let mut all = vec![open(reader.again())];
        for other in others {
            all.push(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        all
    });
    let mut hashes = vec![[0; 32]; lengths.len()];
    for opened in opened {
        for (run, hash) in opened? {
            hashes[run] = hash;
        }
    }
    match id_of_runs(&keys.id_key, &hashes, len) == header.content_id[..] {
        true => Ok(header),
        false => Err(mismatch(NOT_ITS_ID)),
    }
}

/// BLAKE3 of a content whose runs (all of [`limits::WAL_SECTION_BYTES`], but the last) have these chaining values.
fn id_of_runs(key: &[u8; 32], runs: &[ChainingValue], len: u64) -> [u8; 32] {
    fn halves(runs: &[ChainingValue], len: u64) -> (&[ChainingValue], u64, &[ChainingValue], u64) {
        let left = left_subtree_len(len);
        let (first, second) = runs.split_at((left / limits::WAL_SECTION_BYTES as u64) as usize);
        (first, left, second, len - left)
    }
    fn subtree(mode: Mode<'_>, runs: &[ChainingValue], len: u64) -> ChainingValue {
        if let [run] = runs {
            return *run;
        }
        let (first, left, second, right) = halves(runs, len);
        merge_subtrees_non_root(&subtree(mode, first, left), &subtree(mode, second, right), mode)
    }
    let mode = Mode::KeyedHash(key);
    let (first, left, second, right) = halves(runs, len);
    let (left, right) = (subtree(mode, first, left), subtree(mode, second, right));
    *merge_subtrees_root(&left, &right, mode).as_bytes()
}
