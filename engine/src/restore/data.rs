//! File content: ranged reads in pack order, frames opened and checked in parallel, positional writes, one
//! sync per file at the end.

use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use fairvault_format::frame::FrameKey;
use fairvault_format::index::PackRef;
use fairvault_format::names;
use fairvault_format::proto::{FileEntry, FileKind};
use futures::StreamExt;

use super::layout::Layout;
use super::plan::{FrameRef, Placement, Plan};
use crate::error::{Context, Error, Result};
use crate::progress::Progress;
use crate::stanza::Stanza;

/// Bytes asked for at once.
const RANGE_BYTES: u64 = 8 << 20;
/// Unneeded bytes between two frames that are fetched along rather than asked around.
const GAP_BYTES: u32 = 256 << 10;
/// Ranges under way; with their decoded content this bounds memory.
const RANGES: usize = 4;

/// What was written.
#[derive(Debug, Default, Clone, Copy)]
pub struct Written {
    /// Files.
    pub files: u64,
    /// Bytes.
    pub bytes: u64,
    /// Files that were right already.
    pub kept: u64,
}

/// One frame, read and checked.
pub async fn read_frame(stanza: &Stanza, pack: &PackRef, frame: &FrameRef) -> Result<Vec<u8>> {
    let name = names::pack(&pack.name);
    let from = u64::from(frame.offset);
    let bytes = stanza
        .store()
        .get_range(&name, from..from + u64::from(frame.stored_len))
        .await?;
    let key = FrameKey::new(stanza.keys_of(pack.header.epoch)?, stanza.scope(), &pack.header)?;
    open_frame(stanza, &key, pack, frame, &bytes)
}

/// Opens a frame and checks its id.
pub fn open_frame(stanza: &Stanza, key: &FrameKey, pack: &PackRef, frame: &FrameRef, stored: &[u8]) -> Result<Vec<u8>> {
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
    let chunk = key.open(frame.ordinal, stored, &what)?;
    if chunk.len() != frame.plain_len as usize || stanza.keys_of(pack.header.epoch)?.chunk_id(&chunk) != frame.id {
        return Err(Error::damaged(format!(
            "{what} holds another chunk than the manifest says"
        )));
    }
    Ok(chunk)
}

/// A range of a pack and the frames in it.
#[derive(Debug, Clone)]
struct Range {
    pack: u32,
    from: u32,
    to: u32,
    frames: Vec<u32>,
}

/// Cuts the needed frames into ranges, in pack order.
fn ranges(frames: &[FrameRef], needed: &[bool]) -> Vec<Range> {
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
    packs: Vec<PackRef>,
    frames: Vec<FrameRef>,
    /// By frame.
    placements: Vec<Placement>,
    placed_from: Vec<u32>,
    paths: Vec<PathBuf>,
    progress: Arc<Progress>,
}

/// Writes every file.
pub async fn write_all(
    stanza: Arc<Stanza>,
    plan: &Plan,
    layout: &Layout,
    delta: bool,
    progress: Arc<Progress>,
) -> Result<Written> {
    let mut written = Written::default();
    let paths: Vec<PathBuf> = plan.files.iter().map(|f| layout.path(&f.path)).collect();
    let mut wanted = vec![false; plan.files.len()];
    for (number, file) in plan.files.iter().enumerate() {
        if file.kind() != FileKind::FileRegular {
            continue;
        }
        if delta && is_right(file, &paths[number])? {
            written.kept += 1;
            progress.read_bytes.add(file.size);
            progress.deduplicated_bytes.add(file.size);
        } else {
            create(file, &paths[number])?;
            wanted[number] = true;
            written.files += 1;
            written.bytes += file.size;
        }
        progress.files.add(1);
    }
    let mut placements: Vec<Placement> = plan
        .placements
        .iter()
        .filter(|p| wanted[p.file as usize])
        .copied()
        .collect();
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
    let ranges = ranges(&plan.frames, &needed);
    let work = Arc::new(Work {
        stanza,
        packs: plan.packs.clone(),
        frames: plan.frames.clone(),
        placements,
        placed_from,
        paths,
        progress,
    });
    let mut running =
        futures::stream::iter(ranges.into_iter().map(|range| fetch(work.clone(), range))).buffer_unordered(RANGES);
    while let Some(result) = running.next().await {
        result?;
    }
    let synced = work.clone();
    let regular: Vec<bool> = plan.files.iter().map(|f| f.kind() == FileKind::FileRegular).collect();
    tokio::task::spawn_blocking(move || sync_files(&synced.paths, &regular))
        .await
        .map_err(|e| Error::failed("syncing files panicked").caused_by(e))??;
    Ok(written)
}

async fn fetch(work: Arc<Work>, range: Range) -> Result<()> {
    let name = names::pack(&work.packs[range.pack as usize].name);
    let bytes = work
        .stanza
        .store()
        .get_range(&name, range.from.into()..range.to.into())
        .await?;
    work.progress.stored_bytes.add(bytes.len() as u64);
    tokio::task::spawn_blocking(move || place(&work, &range, &bytes))
        .await
        .map_err(|e| Error::failed("writing files panicked").caused_by(e))?
}

fn place(work: &Work, range: &Range, bytes: &Bytes) -> Result<()> {
    let pack = &work.packs[range.pack as usize];
    let key = FrameKey::new(
        work.stanza.keys_of(pack.header.epoch)?,
        work.stanza.scope(),
        &pack.header,
    )?;
    let mut open: Option<(u32, std::fs::File)> = None;
    for &number in &range.frames {
        let frame = &work.frames[number as usize];
        let from = (frame.offset - range.from) as usize;
        let stored = bytes.get(from..from + frame.stored_len as usize).unwrap_or_default();
        let chunk = open_frame(&work.stanza, &key, pack, frame, stored).context(|| "restoring")?;
        let (a, b) = (
            work.placed_from[number as usize] as usize,
            work.placed_from[number as usize + 1] as usize,
        );
        for p in &work.placements[a..b] {
            let path = &work.paths[p.file as usize];
            let what = || format!("writing {}", path.display());
            let file = match &mut open {
                Some((file_number, file)) if *file_number == p.file => file,
                other => {
                    let file = std::fs::OpenOptions::new()
                        .write(true)
                        .open(path)
                        .map_err(|e| Error::io(what(), e))?;
                    &mut other.insert((p.file, file)).1
                }
            };
            let content = &chunk[p.frame_offset as usize..p.frame_offset as usize + p.len as usize];
            file.write_all_at(content, p.file_offset)
                .map_err(|e| Error::io(what(), e))?;
            work.progress.read_bytes.add(p.len.into());
        }
    }
    Ok(())
}

/// An empty file of full length and with its mode.
fn create(file: &FileEntry, path: &std::path::Path) -> Result<()> {
    let what = || format!("creating {}", path.display());
    let mode = if file.mode == 0 { 0o600 } else { file.mode & 0o7777 };
    let out = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)
        .map_err(|e| Error::io(what(), e))?;
    out.set_len(file.size).map_err(|e| Error::io(what(), e))?;
    out.set_permissions(std::fs::Permissions::from_mode(mode))
        .map_err(|e| Error::io(what(), e))
}

/// Whether a file is there with the right length and CRC.
fn is_right(file: &FileEntry, path: &std::path::Path) -> Result<bool> {
    use std::io::Read;
    let Ok(mut there) = std::fs::File::open(path) else {
        return Ok(false);
    };
    let meta = there
        .metadata()
        .map_err(|e| Error::io(format_args!("looking at {}", path.display()), e))?;
    if !meta.is_file() || meta.len() != file.size {
        return Ok(false);
    }
    let mut buffer = vec![0u8; 1 << 20];
    let mut crc = 0;
    loop {
        let n = there
            .read(&mut buffer)
            .map_err(|e| Error::io(format_args!("reading {}", path.display()), e))?;
        if n == 0 {
            return Ok(crc == file.crc32c);
        }
        crc = crc32c::crc32c_append(crc, &buffer[..n]);
    }
}

/// Syncs every file: those that were right already may have been written by a restore that died.
fn sync_files(paths: &[PathBuf], regular: &[bool]) -> Result<()> {
    for (path, _) in paths.iter().zip(regular).filter(|(_, regular)| **regular) {
        std::fs::File::open(path)
            .and_then(|file| file.sync_all())
            .map_err(|e| Error::io(format_args!("syncing {}", path.display()), e))?;
    }
    Ok(())
}
