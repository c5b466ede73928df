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
use crate::postgres::{BLOCK_BYTES, BLOCKS_PER_SEGMENT};
use crate::progress::Progress;
use crate::source::{Chunk, Run};
use crate::stanza::Stanza;
use crate::track::audit::Audit;
use crate::track::selection::Basis;

/// A run of a chunk that went through the pipeline.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Number of the entry.
    pub file: u32,
    /// Handle of the chunk.
    pub handle: u32,
    /// Where it is in the file.
    pub run: Run,
    /// Where it is in the chunk, bytes.
    pub in_chunk: u32,
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
    /// The cluster has checksums.
    pub checksums: bool,
    /// The parent, if there is one.
    pub basis: Option<Arc<Basis>>,
    /// What it would have left out is compared.
    pub audit: Option<Arc<Audit>>,
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
    check_pages(shared, chunk, &mut results.bad_pages)?;
    if let Some(audit) = &shared.audit {
        audit.check(chunk)?;
    }
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
    let mut in_chunk = 0;
    for &run in &chunk.runs {
        let content = &chunk.bytes[in_chunk as usize..(in_chunk + run.len) as usize];
        results.done.push(Done {
            file: chunk.file,
            handle,
            run,
            in_chunk,
            crc32c: crc32c::crc32c(content),
        });
        in_chunk += run.len;
    }
    Ok(())
}

fn check_pages(shared: &Shared, chunk: &Chunk, bad: &mut Vec<BadPage>) -> Result<()> {
    let verifies = shared.checksums && !chunk.is_verified;
    if !verifies && shared.basis.is_none() {
        return Ok(());
    }
    let Some(file) = relation_file(&chunk.path) else {
        return Ok(());
    };
    let mut rest = &chunk.bytes[..];
    for run in &chunk.runs {
        let (content, behind) = rest.split_at(run.len as usize);
        rest = behind;
        let first = (run.offset / u64::from(BLOCK_BYTES)) as u32;
        for (index, page) in content.chunks_exact(BLOCK_BYTES as usize).enumerate() {
            let block = first + index as u32;
            let in_relation = file.segment.wrapping_mul(BLOCKS_PER_SEGMENT).wrapping_add(block);
            let verdict = match verifies {
                true => page::verify(page, in_relation),
                false => page::Verdict::Good,
            };
            match verdict {
                page::Verdict::Bad { expected, found } => bad.push(BadPage {
                    entry: chunk.file,
                    path: chunk.path.clone(),
                    file,
                    block,
                    expected,
                    found,
                }),
                // A page that says nothing sensible says nothing of the WAL either.
                _ => {
                    if let Some(basis) = shared.basis.as_ref().filter(|_| shared.audit.is_none()) {
                        basis.check_page(&chunk.path, &file, in_relation, page)?;
                    }
                }
            }
        }
    }
    Ok(())
}
