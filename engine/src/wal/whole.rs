//! Complete segments between files and objects, run by run: a segment is never held in memory.
//!
//! What always holds: what is stored is what was read in the one pass that also hashed, walked and sealed it;
//! what is written to a destination is complete and authentic, or the destination is gone.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::header::{HEADER_LEN, ObjectHeader};
use fairvault_format::wal::{WalSealer, open_wal_runs};
use fairvault_format::{limits, proto};

use super::archive::{Archive, Ours, Stored};
use super::summary::Summarizer;
use crate::env;
use crate::error::{Error, Kind, Result};
use crate::postgres::segment::{Segment, WalFile};
use crate::store::arriving::Arriving;

/// Runs of a segment that are opened at once.
const THREADS: usize = 4;

/// A segment that was read and sealed, and is not stored yet.
pub struct Sealed {
    segment: Segment,
    object: String,
    path: PathBuf,
    bytes: Vec<u8>,
    id: [u8; 32],
    /// What its records say.
    pub summary: proto::WalSummary,
    /// BLAKE3 of its content, without a key, if that was asked for.
    pub hash: Option<[u8; 32]>,
}

/// What an object that arrived was.
enum Opened {
    /// The segment, which is at its destination.
    Written,
    /// A seal of pieces.
    Seal(Vec<u8>),
    /// The segment, in runs that have to be opened one after the other.
    OtherwiseDivided,
}

/// Memory for a run, in huge pages where the system has them: it is used a few times at most, and a page fault for each
/// 4 KiB of it would take longer than decompressing.
fn buffer(len: usize) -> Result<memmap2::MmapMut> {
    let failed = |e| Error::io("asking for memory", e);
    let memory = memmap2::MmapMut::map_anon(len.max(1)).map_err(failed)?;
    // A system without them says no; nothing is lost by it.
    #[cfg(target_os = "linux")]
    let _ = memory.advise(memmap2::Advice::HugePage);
    Ok(memory)
}

/// BLAKE3 of a file's content under two keys.
pub(super) fn ids_of_file(path: &Path, one: &[u8; 32], other: &[u8; 32]) -> Result<([u8; 32], [u8; 32])> {
    let failed = |e| Error::io(format_args!("reading {}", path.display()), e);
    let (mut first, mut second) = (blake3::Hasher::new_keyed(one), blake3::Hasher::new_keyed(other));
    let mut file = File::open(path).map_err(failed)?;
    let mut run = vec![0u8; 256 << 10];
    loop {
        match file.read(&mut run).map_err(failed)? {
            0 => return Ok((*first.finalize().as_bytes(), *second.finalize().as_bytes())),
            len => {
                first.update(&run[..len]);
                second.update(&run[..len]);
            }
        }
    }
}

fn unwritten(to: &Path, error: std::io::Error) -> Error {
    Error::io(format_args!("writing {}", to.display()), error)
}

/// Work for another thread; `what` it was, if that dies.
pub(super) async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::failed(what).caused_by(error)),
    }
}

impl Sealed {
    /// Bytes of its object.
    pub fn object_len(&self) -> u64 {
        self.bytes.len() as u64
    }
}

impl Archive {
    /// Reads a segment from a file in one pass: walks, hashes, compresses and seals it.
    pub async fn seal_file(&self, segment: Segment, path: PathBuf, wants_hash: bool) -> Result<Sealed> {
        let archive = self.clone();
        blocking("sealing WAL", move || archive.seal_file_now(segment, &path, wants_hash)).await
    }

    fn seal_file_now(&self, segment: Segment, path: &Path, wants_hash: bool) -> Result<Sealed> {
        let failed = |e| Error::io(format_args!("reading {}", path.display()), e);
        let (stanza, size) = (&self.stanza, self.segment_size);
        let name = segment.name(size);
        let object = self.object_name(&WalFile::Segment(segment), &name);
        let fresh = env::fresh(stanza.env())?;
        let mut sealer = WalSealer::new(
            stanza.keys(),
            stanza.scope(),
            ObjectKind::WalSegment,
            fresh,
            &object,
            segment.start(size).0,
            self.compression,
        )?;
        let mut summarizer = Summarizer::new(segment.start(size), size);
        let mut id = blake3::Hasher::new_keyed(&stanza.keys().id_key);
        let mut hash = wants_hash.then(blake3::Hasher::new);
        let mut file = File::open(path).map_err(failed)?;
        let mut run = vec![0u8; limits::WAL_SECTION_BYTES.min(size as usize)];
        let mut len = 0;
        while len < size {
            file.read_exact(&mut run).map_err(failed)?;
            // Compressing takes as long as all the rest.
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    summarizer.feed(&run);
                    id.update(&run);
                    if let Some(hash) = &mut hash {
                        hash.update(&run);
                    }
                });
                sealer.run(&run)
            })?;
            len += run.len() as u64;
        }
        let summary = summarizer.finish();
        let id = *id.finalize().as_bytes();
        let header = proto::WalHeader {
            content_id: id.to_vec(),
            ..self.segment_facts(segment, summary.clone())
        };
        let bytes = sealer.finish(header)?;
        Ok(Sealed {
            segment,
            object,
            path: path.to_owned(),
            bytes,
            id,
            summary,
            hash: hash.map(|hash| *hash.finalize().as_bytes()),
        })
    }

    /// Stores what [`Archive::seal_file`] made.
    pub async fn put_sealed(&self, sealed: Sealed) -> Result<Stored> {
        let segment = sealed.segment;
        self.check_open(segment.timeline, segment.end(self.segment_size))?;
        let ours = Ours::File(sealed.path);
        self.create_same(ObjectKind::WalSegment, &sealed.object, sealed.bytes, sealed.id, ours)
            .await
    }

    /// Writes a whole segment to `destination`, if it is there: its beginning while the rest arrives. Not synced: after a
    /// crash, recovery asks again, and what it keeps it syncs itself.
    pub async fn write_whole(&self, segment: Segment, destination: &Path) -> Result<bool> {
        let name = segment.name(self.segment_size);
        let object = self.object_name(&WalFile::Segment(segment), &name);
        let Some(arriving) = self.arriving(&object).await? else {
            return Ok(false);
        };
        let (archive, to) = (self.clone(), destination.to_owned());
        let write = move || {
            let opened = archive.write_arriving(segment, arriving, &to);
            if !matches!(opened, Ok(Opened::Written)) {
                let _ = std::fs::remove_file(&to);
            }
            opened
        };
        let again = match blocking("opening WAL", write).await {
            Ok(Opened::Written) => return Ok(true),
            Ok(Opened::Seal(bytes)) => {
                let (header, content) = self.content_in(ObjectKind::WalSegment, &bytes, &object).await?;
                self.check_is(&header, &name, &object)?;
                Some(content)
            }
            Ok(Opened::OtherwiseDivided) => self.whole_segment(segment).await?,
            // It began to arrive, and then no more came.
            Err(error) if error.kind() == Kind::Temporary => {
                tracing::debug!("{error}; reading it again");
                self.whole_segment(segment).await?
            }
            Err(error) => return Err(error),
        };
        let Some(content) = again else {
            return Ok(false);
        };
        match std::fs::write(destination, content) {
            Ok(()) => Ok(true),
            Err(error) => {
                let _ = std::fs::remove_file(destination);
                Err(unwritten(destination, error))
            }
        }
    }

    /// But for what was written, and after an error, `to` holds nothing of use.
    fn write_arriving(&self, segment: Segment, mut arriving: Arriving, to: &Path) -> Result<Opened> {
        let name = segment.name(self.segment_size);
        let object = self.object_name(&WalFile::Segment(segment), &name);
        let mut head = Vec::new();
        arriving.read(&mut head, HEADER_LEN)?;
        let header = ObjectHeader::decode(&head, &object)?;
        if header.kind == ObjectKind::PieceSeal {
            arriving.read(&mut head, usize::MAX)?;
            return Ok(Opened::Seal(head));
        }
        let file = File::create(to).map_err(|e| unwritten(to, e))?;
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS));
        let opened = open_wal_runs(
            self.stanza.keys_of(header.epoch)?,
            self.stanza.scope(),
            ObjectKind::WalSegment,
            &head,
            &object,
            threads,
            |into, len| arriving.read(into, len),
            buffer,
            |header, start, run| {
                self.check_is(header, &name, &object)?;
                file.write_all_at(run, start).map_err(|e| unwritten(to, e))
            },
        )?;
        let Some(header) = opened else {
            return Ok(Opened::OtherwiseDivided);
        };
        self.check_is(&header, &name, &object)?;
        Ok(Opened::Written)
    }

    /// Fails unless a header is that of a whole segment with this name.
    pub(super) fn check_is(&self, header: &proto::WalHeader, name: &str, object: &str) -> Result<()> {
        match header.name == name && header.content_len == self.segment_size {
            true => Ok(()),
            false => Err(Error::damaged(format!(
                "{}/{object} holds {} of {} bytes",
                self.stanza.shown(),
                header.name,
                header.content_len
            ))),
        }
    }
}
