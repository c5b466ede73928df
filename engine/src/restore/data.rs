//! File content: ranged reads in pack order, frames opened and checked in parallel, positional writes, every file
//! synced at the end.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use fairvault_format::frame::{FrameKey, FrameReader};
use fairvault_format::index::PackRef;
use fairvault_format::names;
use fairvault_format::proto::FileKind;
use futures::{Stream, StreamExt, stream};
use tokio::sync::{Semaphore, mpsc};

use super::Options;
use super::compare::{Comparison, Found};
use super::crc::Parts;
use super::direct::{DIRECT_BYTES, Output};
use super::files::{Prepared, create, many_at_once, prepare, sync_file};
use super::layout::Layout;
use super::plan::Plan;
use super::ranges::{Range, batches, ranges};
use super::spans::spans;
use super::spare::Spares;
use crate::error::{Context, Error, Kind, Result};
use crate::manifest::{FrameRef, Placement};
use crate::progress::Progress;
use crate::stanza::Stanza;

/// Ranges under way: this bounds memory.
pub const RANGES: usize = 4;
/// The smallest hole, and what is compared where a chunk differs; bytes.
pub const PAGE_BYTES: usize = 8192;

/// What was written.
#[derive(Debug, Default, Clone)]
pub struct Written {
    /// Files.
    pub files: u64,
    /// Bytes.
    pub bytes: u64,
    /// Files that were right already.
    pub kept: u64,
    /// CRC-32C of files whose manifest does not have it, by number.
    pub crcs: HashMap<u32, u32>,
}

/// One frame, read and checked.
pub async fn read_frame(stanza: &Stanza, pack: &PackRef, frame: &FrameRef) -> Result<Vec<u8>> {
    read_frames(stanza, pack, std::slice::from_ref(frame)).await
}

/// The content of frames that lie one behind the other in a pack.
pub async fn read_frames(stanza: &Stanza, pack: &PackRef, frames: &[FrameRef]) -> Result<Vec<u8>> {
    let name = names::pack(&pack.name);
    let from = frames.first().map_or(0, |frame| u64::from(frame.offset));
    let len: u64 = frames.iter().map(|frame| u64::from(frame.stored_len)).sum();
    let bytes = stanza.store().get_range(&name, from..from + len).await?;
    let key = FrameKey::new(stanza.keys_of(pack.header.epoch)?, stanza.scope(), &pack.header)?;
    let mut reader = FrameReader::default();
    let (mut content, mut at) = (Vec::new(), 0);
    for frame in frames {
        let stored = bytes.get(at..at + frame.stored_len as usize).unwrap_or_default();
        at += frame.stored_len as usize;
        content.extend_from_slice(open_frame(&mut reader, stanza, &key, pack, frame, stored)?);
    }
    Ok(content)
}

/// Opens a frame into the reader's buffer and checks its id.
pub fn open_frame<'a>(
    reader: &'a mut FrameReader,
    stanza: &Stanza,
    key: &FrameKey,
    pack: &PackRef,
    frame: &FrameRef,
    stored: &[u8],
) -> Result<&'a [u8]> {
    let what = format!(
        "{}/{}, frame {} at {}",
        stanza.shown(),
        names::pack(&pack.name),
        frame.ordinal,
        frame.offset
    );
    if stored.len() != frame.stored_len as usize {
        return Err(Error::damaged(format!(
            "{what} is cut off: {} of {} bytes are there",
            stored.len(),
            frame.stored_len
        )));
    }
    let chunk = key.open_with(reader, frame.ordinal, stored, &what)?;
    if chunk.len() != frame.plain_len as usize || stanza.keys_of(pack.header.epoch)?.chunk_id(chunk) != frame.id {
        return Err(Error::damaged(format!(
            "{what} holds another chunk than the manifest says"
        )));
    }
    Ok(chunk)
}

struct Work {
    stanza: Arc<Stanza>,
    plan: Arc<Plan>,
    spares: Arc<Spares>,
    /// The repository does not answer: nothing more is asked of it, if another has a copy.
    is_away: AtomicBool,
    /// Pages of zeros are left out, but of files that had any content.
    holes: Option<Arc<[bool]>>,
    /// By frame.
    placements: Arc<[Placement]>,
    placed_from: Vec<u32>,
    /// What of that is there already, where it is compared.
    found: Option<Arc<Found>>,
    /// By frame: what is written in one piece, gaps included.
    spans: HashMap<u32, Placement>,
    paths: Arc<[PathBuf]>,
    /// By file, whether it has been made.
    made: Vec<Mutex<bool>>,
    /// By file, whether anything was written to it.
    changed: Vec<AtomicBool>,
    /// Bytes that were not there already.
    written: AtomicU64,
    parts: Arc<Parts>,
    progress: Arc<Progress>,
    /// Twice as many pieces of work at once as there are cores: half of them may be waiting for the disk.
    cores: Semaphore,
    /// Readers that nobody uses at the moment.
    readers: Mutex<Vec<FrameReader>>,
    /// Files this large are written past the kernel's cache.
    direct_from: AtomicU64,
}

/// Writes every file.
pub async fn write_all(
    stanza: Arc<Stanza>,
    plan: &Arc<Plan>,
    spares: &Arc<Spares>,
    layout: &Layout,
    options: &Options,
    progress: Arc<Progress>,
) -> Result<Written> {
    let (delta, sparse) = (options.delta, options.sparse);
    let paths: Arc<[PathBuf]> = plan.files.iter().map(|f| layout.path(&f.path)).collect();
    let (of, at) = (plan.clone(), paths.clone());
    let preparing = tokio::task::spawn_blocking(move || prepare(&of, &at, delta, sparse));
    let Prepared { there, made } = preparing.await.map_err(panicked)??;
    let there: Arc<[bool]> = there.into();
    let mut placements = plan.placements.clone();
    placements.sort_unstable_by_key(|p| p.frame);
    let placements: Arc<[Placement]> = placements.into();
    let regular = plan.files.iter().filter(|file| file.kind() == FileKind::FileRegular);
    progress.files.add(regular.count() as u64);
    let mut placed_from = vec![0u32; plan.frames.len() + 1];
    for placement in placements.iter() {
        placed_from[placement.frame as usize + 1] += 1;
    }
    for i in 1..placed_from.len() {
        placed_from[i] += placed_from[i - 1];
    }
    // Over what is there already, and around holes, only what is needed may be written.
    let spans = match delta || sparse {
        true => HashMap::new(),
        false => spans(&plan.files, &placements),
    };
    let work = Arc::new(Work {
        stanza,
        plan: plan.clone(),
        spares: spares.clone(),
        is_away: AtomicBool::new(false),
        holes: sparse.then(|| there.clone()),
        found: delta.then(|| Arc::new(Found::none(placements.len()))),
        placements,
        placed_from,
        spans,
        paths,
        made,
        changed: plan.files.iter().map(|_| AtomicBool::new(false)).collect(),
        written: AtomicU64::new(0),
        parts: Arc::default(),
        progress,
        cores: Semaphore::new(2 * std::thread::available_parallelism().map_or(2, usize::from)),
        readers: Mutex::default(),
        direct_from: AtomicU64::new(DIRECT_BYTES),
    });
    match &work.found {
        Some(found) => write_what_differs(&work, found, &there, layout.is_resumed).await?,
        None => {
            // What lies in the gaps of the spans comes after them.
            for is_span in [true, false] {
                let frames = (0..plan.frames.len() as u32).filter(|frame| work.is_placed(*frame));
                let frames = frames.filter(|frame| work.spans.contains_key(frame) == is_span);
                fetch_all(&work, stream::iter([frames.collect()])).await?;
            }
        }
    }
    let synced = work.clone();
    let syncing = tokio::task::spawn_blocking(move || synced.sync_files());
    syncing.await.map_err(panicked)??;
    let mut written = Written {
        bytes: work.written.load(Ordering::Relaxed),
        crcs: work.parts.finish(plan),
        ..Default::default()
    };
    for (number, file) in plan.files.iter().enumerate() {
        if file.kind() == FileKind::FileRegular {
            match there[number] && !work.changed[number].load(Ordering::Relaxed) {
                true => written.kept += 1,
                false => written.files += 1,
            }
        }
    }
    Ok(written)
}

/// Compares what is there, and meanwhile fetches what differs.
async fn write_what_differs(work: &Arc<Work>, found: &Arc<Found>, there: &Arc<[bool]>, is_resumed: bool) -> Result<()> {
    let comparison = Comparison {
        stanza: work.stanza.clone(),
        plan: work.plan.clone(),
        placements: work.placements.clone(),
        paths: work.paths.clone(),
        there: there.clone(),
        is_resumed,
        parts: work.parts.clone(),
        progress: work.progress.clone(),
        found: found.clone(),
    };
    // Its thread ends when nobody takes what it sends.
    let (to, mut differing) = mpsc::channel(1);
    let comparing = tokio::task::spawn_blocking(move || comparison.run(to));
    fetch_all(work, stream::poll_fn(|context| differing.poll_recv(context))).await?;
    comparing
        .await
        .map_err(|e| Error::failed("comparing files panicked").caused_by(e))?
}

/// Fetches frames and writes their content; of those that come together and are close in their pack, one range is
/// asked for.
async fn fetch_all(work: &Arc<Work>, frames: impl Stream<Item = Vec<u32>>) -> Result<()> {
    let ranges = frames.flat_map(|frames| stream::iter(ranges(&work.plan.frames, frames)));
    let mut running = std::pin::pin!(ranges.map(|range| fetch(work.clone(), range)).buffer_unordered(RANGES));
    while let Some(result) = running.next().await {
        result?;
    }
    Ok(())
}

fn panicked(error: tokio::task::JoinError) -> Error {
    Error::failed("writing files panicked").caused_by(error)
}

async fn fetch(work: Arc<Work>, range: Range) -> Result<()> {
    let name = names::pack(&work.plan.packs[range.pack as usize].name);
    let fetched = match work.is_away.load(Ordering::Relaxed) {
        true => Err(Error::temporary(format!("{} is away", work.stanza.shown()))),
        false => {
            let store = work.stanza.store();
            store.get_range(&name, range.from.into()..range.to.into()).await
        }
    };
    let bytes = match fetched {
        Ok(bytes) => bytes,
        Err(error) => {
            rescue(&work, range.frames, &error).await?;
            if error.kind() == Kind::Temporary {
                work.is_away.store(true, Ordering::Relaxed);
            }
            return Ok(());
        }
    };
    work.progress.stored_bytes.add(bytes.len() as u64);
    let batches = batches(&work.plan.frames, range).map(|batch| {
        let (work, bytes) = (work.clone(), bytes.clone());
        async move {
            let core = work.cores.acquire().await;
            let inner = work.clone();
            let lost = tokio::task::spawn_blocking(move || inner.place(&batch, &bytes))
                .await
                .map_err(panicked)??;
            drop(core);
            match lost {
                Some((frames, why)) => rescue(&work, frames, &why).await,
                None => Ok(()),
            }
        }
    });
    futures::future::try_join_all(batches).await.map(drop)
}

/// Frames that the repository does not give, from another one.
async fn rescue(work: &Arc<Work>, frames: Vec<u32>, why: &Error) -> Result<()> {
    let fetching = frames.into_iter().map(async |number| {
        let chunk = work.spares.frame(&work.plan, number, why).await?;
        let inner = work.clone();
        let place = move || inner.write(&mut None, number, &chunk);
        tokio::task::spawn_blocking(place).await.map_err(panicked)?
    });
    let mut fetching = futures::stream::iter(fetching).buffer_unordered(RANGES);
    while let Some(placed) = fetching.next().await {
        placed?;
    }
    Ok(())
}

/// Frames that could not be opened, and why the first of them could not.
type Lost = Option<(Vec<u32>, Error)>;

impl Work {
    /// Makes a file, unless somebody has.
    fn make(&self, number: usize) -> Result<()> {
        let mut made = self.made[number].lock().unwrap_or_else(PoisonError::into_inner);
        if !*made {
            let with_room = self.holes.is_none();
            create(&self.plan.files[number], &self.paths[number], true, with_room)?;
            *made = true;
        }
        Ok(())
    }

    fn place(&self, range: &Range, bytes: &Bytes) -> Result<Lost> {
        let idle = || self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reader = idle().pop().unwrap_or_default();
        let placed = self.place_with(&mut reader, range, bytes);
        idle().push(reader);
        placed
    }

    fn place_with(&self, reader: &mut FrameReader, range: &Range, bytes: &Bytes) -> Result<Lost> {
        let pack = &self.plan.packs[range.pack as usize];
        let key = FrameKey::new(
            self.stanza.keys_of(pack.header.epoch)?,
            self.stanza.scope(),
            &pack.header,
        )?;
        let mut open: Option<(u32, Output)> = None;
        let mut lost: Lost = None;
        for &number in &range.frames {
            let frame = &self.plan.frames[number as usize];
            let from = (frame.offset - range.from) as usize;
            let stored = bytes.get(from..from + frame.stored_len as usize).unwrap_or_default();
            match open_frame(reader, &self.stanza, &key, pack, frame, stored).context(|| "restoring") {
                Ok(chunk) => self.write(&mut open, number, chunk)?,
                Err(error) => lost.get_or_insert_with(|| (Vec::new(), error)).0.push(number),
            }
        }
        Ok(lost)
    }

    /// Where a frame's content belongs: positions in `placements`.
    fn placed(&self, frame: u32) -> std::ops::Range<usize> {
        let [from, to] = [frame, frame + 1].map(|f| self.placed_from[f as usize] as usize);
        from..to
    }

    fn is_placed(&self, frame: u32) -> bool {
        !self.placed(frame).is_empty()
    }

    /// Writes a frame's content to where it belongs and is not yet.
    fn write(&self, open: &mut Option<(u32, Output)>, number: u32, chunk: &[u8]) -> Result<()> {
        let span = self.spans.get(&number);
        let found = self.found.as_ref();
        let is_right = |at: usize| found.is_some_and(|found| found.is_right(at));
        for at in self.placed(number).filter(|&at| !is_right(at)) {
            let p = &self.placements[at];
            let content = &chunk[p.frame_offset as usize..(p.frame_offset + p.len) as usize];
            self.parts.add(&self.plan, p, content);
            self.progress.read_bytes.add(p.len.into());
            let runs = match found.and_then(|found| found.differing(at, content)) {
                Some(differs) => runs(content, |page, _| differs[page]),
                None if self.leaves_holes(p.file) => runs(content, |_, page| page.iter().any(|&byte| byte != 0)),
                None => std::iter::once(0..content.len()).collect(),
            };
            if !runs.is_empty() {
                self.changed[p.file as usize].store(true, Ordering::Relaxed);
            }
            let bytes: usize = runs.iter().map(std::ops::Range::len).sum();
            self.written.fetch_add(bytes as u64, Ordering::Relaxed);
            if span.is_none() {
                self.write_runs(open, p, content, &runs)?;
            }
        }
        match span {
            Some(p) => {
                let content = &chunk[p.frame_offset as usize..(p.frame_offset + p.len) as usize];
                self.write_runs(open, p, content, std::slice::from_ref(&(0..content.len())))
            }
            None => Ok(()),
        }
    }

    /// Whether pages of zeros are left out of a file.
    fn leaves_holes(&self, file: u32) -> bool {
        self.holes.as_ref().is_some_and(|there| !there[file as usize])
    }

    fn write_runs(
        &self,
        open: &mut Option<(u32, Output)>,
        p: &Placement,
        content: &[u8],
        runs: &[std::ops::Range<usize>],
    ) -> Result<()> {
        let path = &self.paths[p.file as usize];
        let file = match &mut *open {
            Some((file_number, file)) if *file_number == p.file => file,
            other => {
                self.make(p.file as usize)?;
                let is_large = self.plan.files[p.file as usize].size >= self.direct_from.load(Ordering::Relaxed);
                &mut other.insert((p.file, Output::open(path, is_large))).1
            }
        };
        for run in runs {
            let at = run.start;
            let wrote = file.write(
                &content[run.clone()],
                p.frame_offset + at as u32,
                p.file_offset + at as u64,
            );
            if !wrote.map_err(|e| Error::io(format_args!("writing {}", path.display()), e))? {
                // This file system does not do it.
                self.direct_from.store(u64::MAX, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Syncs every file, also those that were right already: a restore that died may have written them.
    fn sync_files(&self) -> Result<()> {
        many_at_once(self.plan.files.len(), |number| {
            let file = &self.plan.files[number];
            if file.kind() == FileKind::FileRegular {
                // One that nothing was written to.
                self.make(number)?;
                sync_file(file, &self.paths[number])?;
            }
            Ok(())
        })
    }
}

/// The runs of pages of some content that are wanted, by number and content.
fn runs(content: &[u8], wanted: impl Fn(usize, &[u8]) -> bool) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (number, page) in content.chunks(PAGE_BYTES).enumerate() {
        let from = number * PAGE_BYTES;
        match runs.last_mut() {
            _ if !wanted(number, page) => {}
            Some(last) if last.end == from => last.end += page.len(),
            _ => runs.push(from..from + page.len()),
        }
    }
    runs
}
