//! Frames into packs, in parallel, with memory bounded by one open pack and the uploads under way.
//!
//! A worker reserves a place in the open pack, seals its frame without holding anything, and puts it in.
//! Whoever completes a full pack hashes it and hands it to the uploader; when too many uploads are under
//! way, that worker waits, and with it in the end the source.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use fairvault_format::frame::{FRAME_HEADER_LEN, FrameKey};
use fairvault_format::header::ObjectHeader;
use fairvault_format::index::{IndexEntry, IndexRun, PackRef};
use fairvault_format::keys::TAG_LEN;
use fairvault_format::pack::{DirectoryEntry, seal_tail};
use fairvault_format::{limits, names};
use sha2::Digest;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::backup::upload::CONCURRENT;
use crate::dedup::{Place, SessionChunks};
use crate::env;
use crate::error::{Error, Result};
use crate::stanza::Stanza;

/// A finished pack on its way to the store.
#[derive(Debug)]
pub struct FinishedPack {
    number: u32,
    reference: PackRef,
    parts: Vec<Bytes>,
    entries: Vec<DirectoryEntry>,
    memory: OwnedSemaphorePermit,
}

struct Contents {
    frames: Vec<Option<Bytes>>,
    entries: Vec<DirectoryEntry>,
    size: u64,
    missing: usize,
    closed: bool,
    /// Room for this pack in memory; travels with it until it is stored.
    memory: Option<OwnedSemaphorePermit>,
}

struct OpenPack {
    number: u32,
    header: ObjectHeader,
    key: FrameKey,
    contents: Mutex<Contents>,
}

impl OpenPack {
    fn contents(&self) -> std::sync::MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Collects frames into packs.
pub struct Packer {
    stanza: Arc<Stanza>,
    chunks: Arc<SessionChunks>,
    open: Mutex<Option<Arc<OpenPack>>>,
    finished: mpsc::Sender<FinishedPack>,
    memory: Arc<Semaphore>,
}

/// Packs in memory at once, wherever they are: being filled, waiting, under way.
const PACKS_IN_MEMORY: usize = CONCURRENT + 2;

impl Packer {
    /// A packer that hands finished packs to `finished`.
    pub fn new(stanza: Arc<Stanza>, chunks: Arc<SessionChunks>, finished: mpsc::Sender<FinishedPack>) -> Self {
        Self {
            stanza,
            chunks,
            open: Mutex::new(None),
            finished,
            memory: Arc::new(Semaphore::new(PACKS_IN_MEMORY)),
        }
    }

    /// Stores a chunk that a codec has encoded: `buffer` is [`FRAME_HEADER_LEN`] bytes of room and the
    /// codec's output. Blocks while too many packs wait for the store; not for async code.
    pub fn add(&self, id: [u8; 32], codec: u8, plain_len: u32, mut buffer: Vec<u8>) -> Result<Place> {
        debug_assert!(buffer.len() >= FRAME_HEADER_LEN);
        let stored_len = (buffer.len() + TAG_LEN) as u32;
        let (pack, place) = self.reserve(DirectoryEntry {
            id,
            stored_len,
            plain_len,
        })?;
        pack.key.seal(place.ordinal, codec, plain_len, &mut buffer);
        let complete = {
            let mut contents = pack.contents();
            contents.frames[place.ordinal as usize] = Some(buffer.into());
            contents.missing -= 1;
            contents.closed && contents.missing == 0
        };
        if complete {
            self.finish(&pack)?;
        }
        Ok(place)
    }

    fn reserve(&self, entry: DirectoryEntry) -> Result<(Arc<OpenPack>, Place)> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let pack = match &*open {
            Some(pack) => pack.clone(),
            None => open.insert(Arc::new(self.new_pack()?)).clone(),
        };
        let mut contents = pack.contents();
        let place = Place {
            pack: pack.number,
            ordinal: contents.entries.len() as u32,
            offset: contents.size as u32,
            stored_len: entry.stored_len,
        };
        contents.size += u64::from(entry.stored_len);
        contents.entries.push(entry);
        contents.frames.push(None);
        contents.missing += 1;
        if contents.size >= limits::PACK_TARGET_BYTES || contents.entries.len() as u32 >= limits::PACK_FRAMES / 2 {
            contents.closed = true;
            *open = None;
        }
        drop(contents);
        Ok((pack, place))
    }

    fn new_pack(&self) -> Result<OpenPack> {
        let keys = self.stanza.keys();
        let memory = futures::executor::block_on(self.memory.clone().acquire_owned())
            .map_err(|_| Error::failed("the packer was closed"))?;
        let fresh = env::fresh(self.stanza.env())?;
        let (header, key) = FrameKey::of_new_pack(keys, self.stanza.scope(), fresh)?;
        Ok(OpenPack {
            number: self.chunks.new_pack(),
            header,
            key,
            contents: Mutex::new(Contents {
                frames: Vec::new(),
                entries: Vec::new(),
                size: fairvault_format::header::HEADER_LEN as u64,
                missing: 0,
                closed: false,
                memory: Some(memory),
            }),
        })
    }

    fn finish(&self, pack: &OpenPack) -> Result<()> {
        let (frames, entries, memory) = {
            let mut contents = pack.contents();
            (
                std::mem::take(&mut contents.frames),
                std::mem::take(&mut contents.entries),
                contents.memory.take(),
            )
        };
        let memory = memory.ok_or_else(|| Error::failed("a pack was finished twice"))?;
        let tail = seal_tail(self.stanza.keys(), self.stanza.scope(), &pack.header, &entries)?;
        let mut parts = Vec::with_capacity(frames.len() + 2);
        parts.push(Bytes::copy_from_slice(&pack.header.encode()));
        parts.extend(frames.into_iter().flatten());
        parts.push(tail.into());
        let mut hash = sha2::Sha256::new();
        for part in &parts {
            hash.update(part);
        }
        let reference = PackRef {
            name: hash.finalize().into(),
            header: pack.header,
        };
        self.chunks.pack_named(pack.number, reference);
        let finished = FinishedPack {
            number: pack.number,
            reference,
            parts,
            entries,
            memory,
        };
        let sent = match self.finished.try_send(finished) {
            Err(TrySendError::Full(finished)) => self.finished.blocking_send(finished).is_ok(),
            other => other.is_ok(),
        };
        match sent {
            true => Ok(()),
            false => Err(Error::failed("the upload of packs has ended early")),
        }
    }

    /// Closes the open pack. Call it when all workers are done; blocks like [`Packer::add`].
    pub fn close(&self) -> Result<()> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner).take();
        match open {
            Some(pack) => self.finish(&pack),
            None => Ok(()),
        }
    }
}

impl FinishedPack {
    /// Length, bytes.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|p| p.len() as u64).sum()
    }

    /// Whether it has no bytes; it never has.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Stores it. Returns what an index run needs to know of it.
    pub async fn upload(self, stanza: &Stanza) -> Result<UploadedPack> {
        let name = names::pack(&self.reference.name);
        stanza
            .store()
            .put_hashed(&name, self.parts.into_iter().collect())
            .await?;
        drop(self.memory);
        Ok(UploadedPack {
            number: self.number,
            reference: self.reference,
            entries: self.entries,
        })
    }
}

/// A stored pack that no index run names yet.
#[derive(Debug)]
pub struct UploadedPack {
    /// Its number in the session.
    pub number: u32,
    /// Its name and header.
    pub reference: PackRef,
    entries: Vec<DirectoryEntry>,
}

impl UploadedPack {
    /// Frames in it.
    pub fn frames(&self) -> usize {
        self.entries.len()
    }
}

/// The index run of some packs.
pub fn index_run(packs: &[UploadedPack]) -> IndexRun {
    let mut run = IndexRun::default();
    for (number, pack) in packs.iter().enumerate() {
        run.packs.push(pack.reference);
        let mut offset = fairvault_format::header::HEADER_LEN as u32;
        for (ordinal, entry) in pack.entries.iter().enumerate() {
            run.entries.push(IndexEntry {
                id: entry.id,
                pack: number as u32,
                ordinal: ordinal as u32,
                offset,
                stored_len: entry.stored_len,
            });
            offset += entry.stored_len;
        }
    }
    run
}
