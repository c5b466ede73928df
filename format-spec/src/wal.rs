//! WAL objects: segments, pieces, histories (SPEC.md, section 8).

use std::sync::{Mutex, PoisonError};

use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};

use crate::error::{FormatError, Result};
use crate::header::Kind;
use crate::keys::{EpochKeys, KeyRole, Scope};
use crate::limits;
use crate::object::{ObjectReader, ObjectWriter, SECTION_HEADER_LEN, SectionHeader};
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

/// Opens a whole WAL object while it arrives, up to `threads` of its runs at once, each of which goes to `take` with its
/// place in the content, in any order. Every run that `take` gets is authentic; only a return without an error says that
/// they are all, and its content's id. `None` says that it is not divided into runs of [`limits::WAL_SECTION_BYTES`] and a
/// rest, which [`open_wal`] reads too.
///
/// `head` is the object's header; `read` appends as many of the bytes that follow as it is told, and fewer at the end of
/// the object only. Each thread asks `buffer` once for memory for the longest run, of that many bytes.
#[allow(clippy::too_many_arguments)]
pub fn open_wal_runs<E: From<FormatError> + Send, B: AsMut<[u8]>>(
    keys: &EpochKeys,
    scope: &Scope,
    kind: Kind,
    head: &[u8],
    context: &str,
    threads: usize,
    mut read: impl FnMut(&mut Vec<u8>, usize) -> std::result::Result<(), E> + Send,
    buffer: impl Fn(usize) -> std::result::Result<B, E> + Sync,
    take: impl Fn(&WalHeader, u64, &[u8]) -> std::result::Result<(), E> + Sync,
) -> std::result::Result<Option<WalHeader>, E> {
    let mut first = head.to_vec();
    loop {
        let more = header_len(keys, scope, kind, &first, context)?.saturating_sub(first.len());
        let had = first.len();
        if more > 0 {
            read(&mut first, more)?;
        }
        // All of it, or what there is: then the reader says what is wrong.
        if first.len() < had + more || more == 0 {
            break;
        }
    }
    let mut reader = ObjectReader::new(keys, scope, kind, &first, context, context)?;
    let header: WalHeader = reader.message(KeyRole::Meta)?;
    let (len, run_len) = (header.content_len, limits::WAL_SECTION_BYTES as u64);
    let count = len.div_ceil(run_len);
    let longest = len.min(run_len) as usize;
    let source = Mutex::new(Source {
        read,
        sections: 0,
        state: State::Arriving,
    });
    let open = |mut reader: ObjectReader<'_>| {
        let (mut memory, mut hashes) = (None, Vec::new());
        let mut sealed = Vec::new();
        loop {
            let next = source
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .next(&reader, len, &mut sealed);
            let Some(section) = next? else {
                return Ok::<_, E>(hashes);
            };
            let mut opened = || {
                let start = u64::from(section.ordinal - 1) * run_len;
                let memory = match &mut memory {
                    Some(memory) => memory,
                    none => none.insert(buffer(longest)?),
                };
                let run = &mut memory.as_mut()[..section.plain_len as usize];
                reader.section_apart(&section, &mut sealed, KeyRole::Data, run)?;
                let mut hasher = blake3::Hasher::new_keyed(&keys.id_key);
                let hasher = hasher.set_input_offset(start).update(run);
                hashes.push(match count {
                    1 => (start, *hasher.finalize().as_bytes()),
                    _ => (start, hasher.finalize_non_root()),
                });
                take(&header, start, run)
            };
            opened().inspect_err(|_| source.lock().unwrap_or_else(PoisonError::into_inner).state = State::Ended)?;
        }
    };
    let threads = threads.clamp(1, usize::try_from(count).unwrap_or(usize::MAX).max(1));
    let opened = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads)
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
    let mut hashes = Vec::new();
    for opened in opened {
        hashes.extend(opened?);
    }
    if source.into_inner().unwrap_or_else(PoisonError::into_inner).state == State::OtherwiseDivided {
        return Ok(None);
    }
    hashes.sort_unstable();
    let hashes: Vec<ChainingValue> = hashes.into_iter().map(|(_, hash)| hash).collect();
    let id = match &hashes[..] {
        [] => keys.chunk_id(&[]),
        [whole] => *whole,
        runs => id_of_runs(&keys.id_key, runs, len),
    };
    match id == header.content_id[..] {
        true => Ok(Some(header)),
        false => Err(FormatError::damaged(context, NOT_ITS_ID).into()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Arriving,
    /// There is no more, or nobody wants it.
    Ended,
    /// Some section has not the length of a run.
    OtherwiseDivided,
}

/// The runs of an object in their order.
struct Source<R> {
    read: R,
    /// Runs that were given out.
    sections: u32,
    state: State,
}

impl<R> Source<R> {
    /// The next run, sealed, of a content of `len` bytes; `None` if there is no more.
    fn next<E: From<FormatError>>(
        &mut self,
        object: &ObjectReader<'_>,
        len: u64,
        sealed: &mut Vec<u8>,
    ) -> std::result::Result<Option<SectionHeader>, E>
    where
        R: FnMut(&mut Vec<u8>, usize) -> std::result::Result<(), E>,
    {
        if self.state != State::Arriving {
            return Ok(None);
        }
        // Whatever happens: nobody reads on behind an error.
        self.state = State::Ended;
        let run_len = limits::WAL_SECTION_BYTES as u64;
        let left = len.saturating_sub(u64::from(self.sections) * run_len);
        sealed.clear();
        (self.read)(sealed, SECTION_HEADER_LEN)?;
        if sealed.is_empty() {
            return match left {
                0 => Ok(None),
                _ => Err(FormatError::damaged(
                    object.called(self.sections + 1),
                    format!("the object ends, and {left} bytes of content are missing"),
                )
                .into()),
            };
        }
        // The first section is the header.
        let section = object.header_of(self.sections + 1, sealed)?;
        if left == 0 || u64::from(section.plain_len) != left.min(run_len) {
            self.state = State::OtherwiseDivided;
            return Ok(None);
        }
        sealed.clear();
        (self.read)(sealed, section.sealed_len as usize)?;
        object.check_arrived(&section, sealed.len())?;
        self.sections += 1;
        self.state = State::Arriving;
        Ok(Some(section))
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
