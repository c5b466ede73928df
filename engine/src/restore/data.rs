//! File content: ranged reads in pack order, frames opened and checked in parallel, positional writes, every file
//! synced at the end.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use fairvault_format::frame::{FrameKey, FrameReader};
use fairvault_format::index::PackRef;
use fairvault_format::names;
use fairvault_format::proto::FileKind;
use futures::StreamExt;
use tokio::sync::Semaphore;

use super::crc::Parts;
use super::direct::{DIRECT_BYTES, Output};
use super::files::{Prepared, create, prepare, sync_file};
use super::layout::Layout;
use super::plan::{FrameRef, Placement, Plan};
use super::spans::spans;
use super::spare::Spares;
use super::{Options, compare};
use crate::error::{Context, Error, Kind, Result};
use crate::progress::Progress;
use crate::stanza::Stanza;

/// Bytes asked for at once.
const RANGE_BYTES: u64 = 8 << 20;
/// Unneeded bytes between two frames that are fetched along rather than asked around.
const GAP_BYTES: u32 = 256 << 10;
/// Ranges under way: this bounds memory.
pub const RANGES: usize = 4;
/// Content that is decoded and written in one piece of work, bytes.
const BATCH_BYTES: u64 = 4 << 20;
/// The smallest hole.
const HOLE_BYTES: usize = 8192;
/// Files that are synced at the same time.
const SYNCS: usize = 16;

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

/// A range of a pack and the frames in it.
#[derive(Debug, Clone)]
pub struct Range {
    /// Pack.
    pub pack: u32,
    /// Its first byte in the pack.
    pub from: u32,
    /// Behind its last byte.
    pub to: u32,
    /// Numbers of the frames.
    pub frames: Vec<u32>,
}

/// Cuts the needed frames into ranges, in pack order.
pub fn ranges(frames: &[FrameRef], needed: &[bool]) -> Vec<Range> {
    let mut order: Vec<u32> = (0..frames.len() as u32).filter(|&f| needed[f as usize]).collect();
    order.sort_unstable_by_key(|&f| (frames[f as usize].pack, frames[f as usize].offset));
    let mut out: Vec<Range> = Vec::new();
    for number in order {
        let frame = &frames[number as usize];
        let end = frame.offset + frame.stored_len;
        match out.last_mut() {
            Some(last)
                if last.pack == frame.pack
                    && frame.offset <= last.to.saturating_add(GAP_BYTES)
                    && u64::from(end - last.from) <= RANGE_BYTES =>
            {
                last.to = last.to.max(end);
                last.frames.push(number);
            }
            _ => out.push(Range {
                pack: frame.pack,
                from: frame.offset,
                to: end,
                frames: vec![number],
            }),
        }
    }
    out
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
    placements: Vec<Placement>,
    placed_from: Vec<u32>,
    /// By frame: what is written in one piece, gaps included.
    spans: HashMap<u32, Placement>,
    paths: Arc<[PathBuf]>,
    /// By file, whether it has been made.
    made: Vec<Mutex<bool>>,
    parts: Parts,
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
    let parts = Parts::default();
    if delta {
        let right = compare::right(&stanza, plan, &paths, &there, &progress).await?;
        let mut right = right.into_iter();
        placements.retain(|placement| match right.next().flatten() {
            Some(crc) => {
                parts.add_crc(placement, crc);
                false
            }
            None => true,
        });
    }
    let mut written = count(plan, &there, &placements);
    progress.files.add(written.files + written.kept);
    placements.sort_unstable_by_key(|p| p.frame);
    let mut needed = vec![false; plan.frames.len()];
    let mut placed_from = vec![0u32; plan.frames.len() + 1];
    for placement in &placements {
        needed[placement.frame as usize] = true;
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
    let [first, second] = [true, false].map(|is_span| {
        let frames = needed.iter().enumerate();
        let needed: Vec<bool> = frames
            .map(|(frame, &needed)| needed && spans.contains_key(&(frame as u32)) == is_span)
            .collect();
        ranges(&plan.frames, &needed)
    });
    let work = Arc::new(Work {
        stanza,
        plan: plan.clone(),
        spares: spares.clone(),
        is_away: AtomicBool::new(false),
        holes: sparse.then_some(there),
        placements,
        placed_from,
        spans,
        paths,
        made,
        parts,
        progress,
        cores: Semaphore::new(2 * std::thread::available_parallelism().map_or(2, usize::from)),
        readers: Mutex::default(),
        direct_from: AtomicU64::new(DIRECT_BYTES),
    });
    // What lies in the gaps of the spans comes after them.
    for ranges in [first, second] {
        let fetching = ranges.into_iter().map(|range| fetch(work.clone(), range));
        let mut running = futures::stream::iter(fetching).buffer_unordered(RANGES);
        while let Some(result) = running.next().await {
            result?;
        }
    }
    let synced = work.clone();
    let syncing = tokio::task::spawn_blocking(move || synced.sync_files());
    syncing.await.map_err(panicked)??;
    written.crcs = work.parts.finish(plan);
    Ok(written)
}

fn panicked(error: tokio::task::JoinError) -> Error {
    Error::failed("writing files panicked").caused_by(error)
}

/// What is going to be written.
fn count(plan: &Plan, there: &[bool], placements: &[Placement]) -> Written {
    let mut written = Written::default();
    let mut changes = vec![false; plan.files.len()];
    for placement in placements {
        changes[placement.file as usize] = true;
        written.bytes += u64::from(placement.len);
    }
    for (number, file) in plan.files.iter().enumerate() {
        if file.kind() == FileKind::FileRegular {
            match there[number] && !changes[number] {
                true => written.kept += 1,
                false => written.files += 1,
            }
        }
    }
    written
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

/// Cuts a range so that each part decodes to a few MiB: a range may decode to very much.
fn batches(frames: &[FrameRef], range: Range) -> impl Iterator<Item = Range> {
    let mut parts: Vec<Range> = Vec::new();
    let mut bytes = BATCH_BYTES;
    for &number in &range.frames {
        let len = u64::from(frames[number as usize].plain_len);
        if bytes + len > BATCH_BYTES {
            bytes = 0;
            parts.push(Range {
                frames: Vec::new(),
                ..range
            });
        }
        bytes += len;
        if let Some(part) = parts.last_mut() {
            part.frames.push(number);
        }
    }
    parts.into_iter()
}

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

    /// Writes a frame's content to where it belongs.
    fn write(&self, open: &mut Option<(u32, Output)>, number: u32, chunk: &[u8]) -> Result<()> {
        let (a, b) = (
            self.placed_from[number as usize] as usize,
            self.placed_from[number as usize + 1] as usize,
        );
        let placements = &self.placements[a..b];
        for p in placements {
            self.parts.add(
                &self.plan,
                p,
                &chunk[p.frame_offset as usize..(p.frame_offset + p.len) as usize],
            );
            self.progress.read_bytes.add(p.len.into());
        }
        let span = self.spans.get(&number).map(std::slice::from_ref);
        for p in span.unwrap_or(placements) {
            let path = &self.paths[p.file as usize];
            let what = |e| Error::io(format_args!("writing {}", path.display()), e);
            let file = match &mut *open {
                Some((file_number, file)) if *file_number == p.file => file,
                other => {
                    self.make(p.file as usize)?;
                    let is_large = self.plan.files[p.file as usize].size >= self.direct_from.load(Ordering::Relaxed);
                    &mut other.insert((p.file, Output::open(path, is_large))).1
                }
            };
            let content = &chunk[p.frame_offset as usize..p.frame_offset as usize + p.len as usize];
            let leaves_holes = self.holes.as_ref().is_some_and(|there| !there[p.file as usize]);
            for run in runs(content, leaves_holes) {
                let at = run.start;
                let wrote = file.write(&content[run], p.frame_offset + at as u32, p.file_offset + at as u64);
                if !wrote.map_err(what)? {
                    // This file system does not do it.
                    self.direct_from.store(u64::MAX, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    /// Syncs every file, also those that were right already: a restore that died may have written them. Many at once:
    /// the file system then writes its journal for many of them together.
    fn sync_files(&self) -> Result<()> {
        let next = AtomicUsize::new(0);
        let worker = || -> Result<()> {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(file) = self.plan.files.get(number) else {
                    return Ok(());
                };
                if file.kind() == FileKind::FileRegular {
                    // One that nothing was written to.
                    self.make(number)?;
                    sync_file(file, &self.paths[number])?;
                }
            }
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..SYNCS).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().try_for_each(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|_| Err(Error::failed("syncing files panicked")))
            })
        })
    }
}

/// What of some content is to be written: all of it, or the runs of pages that are not only zeros.
fn runs(content: &[u8], leaves_holes: bool) -> Vec<std::ops::Range<usize>> {
    if !leaves_holes {
        return std::iter::once(0..content.len()).collect();
    }
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (number, page) in content.chunks(HOLE_BYTES).enumerate() {
        let from = number * HOLE_BYTES;
        match runs.last_mut() {
            _ if page.iter().all(|&byte| byte == 0) => {}
            Some(last) if last.end == from => last.end += page.len(),
            _ => runs.push(from..from + page.len()),
        }
    }
    runs
}
