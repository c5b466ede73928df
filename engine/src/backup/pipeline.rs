//! The CPU stages of a backup: page checksums, CRC, id, dedup, compression, sealing; one worker a core.
//!
//! Workers take chunks from a bounded channel, so that a slow store slows the source down instead of
//! filling memory.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::codec::{Codec, Content};
use crate::dedup::{Claim, SessionChunks};
use crate::error::{Error, Result};
use crate::pack::Packer;
use crate::postgres::files::{RelationFile, relation_file};
use crate::postgres::page;
use crate::progress::Progress;
use crate::source::Chunk;
use crate::stanza::Stanza;

/// A chunk that went through the pipeline.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Number of the entry.
    pub file: u32,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub len: u32,
    /// Handle of the chunk.
    pub handle: u32,
    /// CRC-32C of the content.
    pub crc32c: u32,
}

/// A page whose checksum was wrong.
#[derive(Debug, Clone)]
pub struct BadPage {
    /// Number of the entry.
    pub entry: u32,
    /// Path of its file.
    pub path: Arc<str>,
    /// The file.
    pub file: RelationFile,
    /// Block within the file.
    pub block: u32,
    /// What the checksum should be.
    pub expected: u16,
    /// What it is.
    pub found: u16,
}

/// What the workers have found.
#[derive(Debug, Default)]
pub struct Results {
    /// Chunks, in no order.
    pub done: Vec<Done>,
    /// Pages whose checksum was wrong.
    pub bad_pages: Vec<BadPage>,
}

/// What every worker needs.
pub struct Shared {
    /// Stanza.
    pub stanza: Arc<Stanza>,
    /// Chunks of the session.
    pub chunks: Arc<SessionChunks>,
    /// Where new ones go.
    pub packer: Packer,
    /// zstd level.
    pub level: i32,
    /// Pages may be taken apart.
    pub pages: bool,
    /// Size of a page if the cluster has checksums.
    pub checked_page: Option<u32>,
    /// Blocks in a segment file.
    pub blocks_per_segment: u32,
    /// Counters.
    pub progress: Arc<Progress>,
}

/// Runs `workers` workers until the channel is closed and empty. Blocks.
pub fn run(shared: &Shared, workers: usize, input: mpsc::Receiver<Chunk>) -> Result<Results> {
    let input = Mutex::new(input);
    let outcomes: Vec<Result<Results>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(|| worker(shared, &input))).collect();
        handles
            .into_iter()
            .map(|handle| {
                handle
                    .join()
                    .unwrap_or_else(|_| Err(Error::failed("a worker of the pipeline panicked")))
            })
            .collect()
    });
    let mut all = Results::default();
    for outcome in outcomes {
        let results = outcome?;
        all.done.extend(results.done);
        all.bad_pages.extend(results.bad_pages);
    }
    shared.packer.close()?;
    Ok(all)
}

fn worker(shared: &Shared, input: &Mutex<mpsc::Receiver<Chunk>>) -> Result<Results> {
    let mut results = Results::default();
    let mut codec = Codec::new(shared.level)?;
    loop {
        let next = {
            let mut input = input.lock().unwrap_or_else(PoisonError::into_inner);
            input.blocking_recv()
        };
        let Some(chunk) = next else { return Ok(results) };
        let outcome = process(shared, &mut codec, &chunk, &mut results);
        if let Err(error) = outcome {
            // Closing the channel stops the source and the other workers.
            input.lock().unwrap_or_else(PoisonError::into_inner).close();
            return Err(error);
        }
    }
}

fn process(shared: &Shared, codec: &mut Codec, chunk: &Chunk, results: &mut Results) -> Result<()> {
    check_pages(shared, chunk, &mut results.bad_pages);
    let id = shared.stanza.keys().chunk_id(&chunk.bytes);
    let len = chunk.bytes.len() as u32;
    let handle = match shared.chunks.claim(id, len) {
        Claim::Present(handle) => {
            shared.progress.deduplicated_bytes.add(len.into());
            handle
        }
        Claim::New(handle) => {
            let content = match relation_file(&chunk.path) {
                Some(_) if shared.pages => Content::Pages { file: chunk.file },
                _ => Content::Other,
            };
            let (number, buffer) = codec.encode(&chunk.bytes, content);
            let place = shared.packer.add(id, number, len, buffer)?;
            shared.chunks.stored(handle, place);
            handle
        }
    };
    results.done.push(Done {
        file: chunk.file,
        offset: chunk.offset,
        len,
        handle,
        crc32c: crc32c::crc32c(&chunk.bytes),
    });
    Ok(())
}

fn check_pages(shared: &Shared, chunk: &Chunk, bad: &mut Vec<BadPage>) {
    let Some(page_size) = shared.checked_page else { return };
    let Some(file) = relation_file(&chunk.path) else { return };
    let first = (chunk.offset / u64::from(page_size)) as u32;
    for (index, page) in chunk.bytes.chunks_exact(page_size as usize).enumerate() {
        let block = first + index as u32;
        let in_relation = file.segment.wrapping_mul(shared.blocks_per_segment).wrapping_add(block);
        if let page::Verdict::Bad { expected, found } = page::verify(page, in_relation) {
            bad.push(BadPage {
                entry: chunk.file,
                path: chunk.path.clone(),
                file,
                block,
                expected,
                found,
            });
        }
    }
}
