//! From the pipeline's results to manifest segments and a root.

#[cfg(test)]
mod many;
mod numbers;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::index::{PackRef, encode_pack_table};
use fairvault_format::keys::KeyRole;
use fairvault_format::manifest::{encode_segment, relative_frames};
use fairvault_format::object::ObjectWriter;
use fairvault_format::{limits, proto};

use self::numbers::{Numbers, numbered};
use super::cut::{Grain, cuts};
use super::pipeline::{Done, Shared};
use super::remembered::Draft;
use crate::codec::{Codec, Content};
use crate::crc::combine;
use crate::dedup::{Claim, Known};
use crate::env;
use crate::error::{Error, Result};
use crate::source::{Entry, Wanted};
use crate::stanza::Stanza;
use crate::track::selection::Basis;

/// Files in a manifest segment: at most, and about how many.
const SEGMENT_FILES: usize = 4096;
const USUAL_FILES: u32 = 1024;
/// Extents in a manifest segment.
const SEGMENT_EXTENTS: usize = 65_536;

/// About what a file and an extent take in a manifest, bytes.
const FILE_BYTES: u64 = 40;
const EXTENT_BYTES: u64 = 60;

/// zstd level of manifest segments: they are small.
pub const LEVEL: i32 = 3;

/// Consecutive bytes of a file that are consecutive in a chunk too.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    file: u32,
    offset: u64,
    len: u32,
    handle: u32,
    in_chunk: u32,
    /// Of what was read; 0 for what the parent has.
    crc32c: u32,
}

/// What every file is made of: what was read, and what the parent has.
pub fn extents(shared: &Shared, entries: &[Entry], done: Vec<Done>) -> Result<Vec<Extent>> {
    let mut read = vec![0u64; entries.len()];
    let mut all = Vec::with_capacity(done.len());
    for d in done {
        read[d.file as usize] += u64::from(d.run.len);
        all.push(Extent {
            file: d.file,
            offset: d.run.offset,
            len: d.run.len,
            handle: d.handle,
            in_chunk: d.in_chunk,
            crc32c: d.crc32c,
        });
    }
    for (number, entry) in entries.iter().enumerate() {
        let (Wanted::Blocks(ranges), false) = (&entry.wanted, entry.is_gone) else {
            continue;
        };
        let basis = shared.basis.as_ref();
        let basis = basis.ok_or_else(|| Error::failed("a part of a file was read without a parent"))?;
        let wanted = entry.wanted.bytes(entry.size);
        if read[number] != wanted {
            let read = read[number];
            return Err(Error::failed(format!(
                "{}: {read} of {wanted} changed bytes went through the pipeline",
                entry.path
            )));
        }
        for kept in basis.kept(&entry.path, entry.size, ranges) {
            let frame = &basis.manifest.frames[kept.frame as usize];
            let pack = &basis.manifest.packs[frame.pack as usize];
            all.push(Extent {
                file: number as u32,
                offset: kept.file_offset,
                len: kept.len,
                handle: shared.chunks.adopt(pack, frame),
                in_chunk: kept.frame_offset,
                crc32c: 0,
            });
        }
    }
    all.sort_unstable_by_key(|e| (e.file, e.offset));
    Ok(all)
}

/// Stores the manifest segments as chunks. Returns for each its first path, its number of files and the
/// handles of its chunks. A `draft` takes them as they are. Blocks.
pub fn store_segments(
    shared: &Shared,
    mut draft: Option<&mut Draft>,
    entries: &[Entry],
    extents: &[Extent],
    known: &[Known],
    packs: &[PackRef],
) -> Result<Vec<(String, u32, Vec<u32>)>> {
    let mut order: Vec<usize> = (0..entries.len()).filter(|&number| !entries[number].is_gone).collect();
    order.sort_by(|&a, &b| entries[a].path.as_bytes().cmp(entries[b].path.as_bytes()));
    if let Some(pair) = order
        .windows(2)
        .find(|pair| entries[pair[0]].path == entries[pair[1]].path)
    {
        return Err(
            Error::temporary(format!("{} was listed twice", entries[pair[0]].path)).remedy("take the backup again")
        );
    }
    let mut codec = Codec::new(LEVEL)?;
    let mut out = Vec::new();
    let mut builder = SegmentBuilder::default();
    let grain = Grain::of(order.len() as u64 * FILE_BYTES + extents.len() as u64 * EXTENT_BYTES);
    for (position, &number) in order.iter().enumerate() {
        let from = extents.partition_point(|e| (e.file as usize) < number);
        let to = extents.partition_point(|e| e.file as usize <= number);
        let entry = &entries[number];
        let basis = shared.basis.as_ref();
        let before = basis.and_then(|basis| basis.unchanged(&entry.path, entry.size, &entry.wanted));
        builder.file(entry, &extents[from..to], before)?;
        let full = builder.segment.files.len() >= SEGMENT_FILES || builder.extents >= SEGMENT_EXTENTS;
        if full || position + 1 == order.len() || ends_segment(&entries[number].path) {
            let (segment, first) = std::mem::take(&mut builder).finish(shared.basis.as_deref(), known, packs)?;
            let files = segment.files.len() as u32;
            if let Some(draft) = &mut draft {
                draft.add(&segment);
            }
            out.push((first, files, store_segment(shared, &mut codec, segment, grain)?));
        }
    }
    Ok(out)
}

/// Segments end where the paths say so, not by number: a file that is new then changes one segment, and the others are
/// shared with the parent.
fn ends_segment(path: &str) -> bool {
    crc32c::crc32c(path.as_bytes()).is_multiple_of(USUAL_FILES)
}

/// Stores a manifest segment as chunks; returns their handles. Blocks.
pub fn store_segment(
    shared: &Shared,
    codec: &mut Codec,
    segment: proto::ManifestSegment,
    grain: Grain,
) -> Result<Vec<u32>> {
    let bytes = encode_segment(segment);
    fairvault_format::error::check_limit("a manifest segment", bytes.len() as u64, limits::MANIFEST_SEGMENT_BYTES)?;
    let mut handles = Vec::new();
    for cut in cuts(&bytes, grain) {
        let chunk = &bytes[cut];
        let id = shared.stanza.keys().chunk_id(chunk);
        handles.push(match shared.chunks.claim(id, chunk.len() as u32) {
            Claim::Present(handle) => handle,
            Claim::New(handle) => {
                let (number, buffer) = codec.encode(chunk, Content::Other);
                let place = shared.packer.add(id, number, chunk.len() as u32, buffer)?;
                shared.chunks.stored(handle, place);
                handle
            }
        });
    }
    Ok(handles)
}

#[derive(Default)]
struct SegmentBuilder {
    segment: proto::ManifestSegment,
    /// Handles in the order in which they were met, and their positions there; extents hold the latter until all are
    /// known.
    handles: Vec<u32>,
    positions: HashMap<u32, u32>,
    extents: usize,
}

impl SegmentBuilder {
    fn file(&mut self, entry: &Entry, parts: &[Extent], before: Option<&proto::FileEntry>) -> Result<()> {
        let mut extents = proto::Extents::default();
        let is_composed = entry.wanted != Wanted::All;
        let (mut crc, mut covered, mut last) = (0u32, 0u64, None::<&Extent>);
        for part in parts {
            if part.offset != covered {
                return Err(Error::failed(format!(
                    "{}: its chunks do not follow each other",
                    entry.path
                )));
            }
            crc = combine(crc, part.crc32c, part.len.into());
            let goes_on = last.is_some_and(|last| {
                last.handle == part.handle && last.in_chunk + last.len == part.in_chunk && part.offset == covered
            });
            covered = part.offset + u64::from(part.len);
            last = Some(part);
            if let Some(len) = extents.len.last_mut().filter(|_| goes_on) {
                *len += part.len;
                continue;
            }
            extents.file_offset.push(part.offset);
            extents.len.push(part.len);
            extents.frame.push(self.frame(part.handle));
            extents.frame_offset.push(part.in_chunk);
        }
        if covered != entry.size {
            return Err(Error::failed(format!(
                "{}: {covered} of {} bytes went through the pipeline",
                entry.path, entry.size
            )));
        }
        self.extents += extents.len.len();
        self.segment.files.push(proto::FileEntry {
            path: entry.path.clone(),
            kind: entry.kind as i32,
            size: entry.size,
            mode: entry.mode,
            mtime_us: entry.mtime_us,
            link_target: entry.link_target.clone(),
            // What is known of a file that is as it was stays known.
            crc32c: match before {
                Some(before) => before.crc32c,
                None if is_composed => 0,
                None => crc,
            },
            extents: (!parts.is_empty()).then_some(extents),
            path_bytes: Vec::new(),
            composed: before.map_or(is_composed, |before| before.composed),
        });
        Ok(())
    }

    fn frame(&mut self, handle: u32) -> u32 {
        let next = self.handles.len() as u32;
        let position = *self.positions.entry(handle).or_insert(next);
        if position == next {
            self.handles.push(handle);
        }
        position
    }

    /// Numbers the frames as the parent did, so that what is as it was is encoded as it was. A new one takes the place of
    /// one that is not used any more, as far as there are enough of them; the others follow.
    fn finish(
        mut self,
        basis: Option<&Basis>,
        known: &[Known],
        packs: &[PackRef],
    ) -> Result<(proto::ManifestSegment, String)> {
        let first = self.segment.files.first().map(|f| f.path.clone()).unwrap_or_default();
        let before = Numbers::of(basis, &first);
        let chunk = |at: u32| &known[self.handles[at as usize] as usize];
        let sorted = numbered(self.handles.len() as u32, |at| {
            before.frames.get(&chunk(at).id).copied()
        });
        let placed = sorted.iter().map(|&at| chunk(at));
        let (mut met, mut is_met) = (Vec::new(), HashSet::new());
        for chunk in placed.clone() {
            let place = chunk.place.ok_or_else(|| Error::failed("a chunk without a place"))?;
            if is_met.insert(place.pack) {
                met.push(place.pack);
            }
        }
        let name = |at: u32| &packs[met[at as usize] as usize].name;
        let of_packs = numbered(met.len() as u32, |at| before.packs.get(name(at)).copied());
        self.segment.pack_names = of_packs.iter().map(|&at| name(at).to_vec()).collect();
        let pack_numbers: HashMap<u32, u32> = of_packs.iter().map(|&at| met[at as usize]).zip(0..).collect();
        let mut numbers = vec![0u32; sorted.len()];
        let mut frames = proto::FrameTable::default();
        for ((number, &at), chunk) in (0..).zip(&sorted).zip(placed) {
            numbers[at as usize] = number;
            let pack = chunk.place.and_then(|place| pack_numbers.get(&place.pack));
            let pack = pack.ok_or_else(|| Error::failed("a pack without a number"))?;
            push_frame(&mut frames, chunk, *pack)?;
        }
        let extents = self.segment.files.iter_mut().filter_map(|file| file.extents.as_mut());
        for frame in extents.flat_map(|extents| &mut extents.frame) {
            *frame = numbers[*frame as usize];
        }
        self.segment.frames = Some(frames);
        Ok((self.segment, first))
    }
}

/// Adds a chunk to a frame table whose pack number `pack` is its own.
pub fn push_frame(table: &mut proto::FrameTable, chunk: &Known, pack: u32) -> Result<()> {
    let place = chunk.place.ok_or_else(|| Error::failed("a chunk without a place"))?;
    table.ids.extend_from_slice(&chunk.id);
    table.pack.push(pack);
    table.ordinal.push(place.ordinal);
    table.offset.push(place.offset);
    table.stored_len.push(place.stored_len);
    table.plain_len.push(chunk.plain_len);
    Ok(())
}

/// What the root object says.
pub fn root_of(
    info: proto::BackupInfo,
    segments: &[(String, u32, Vec<u32>)],
    known: &[Known],
    packs: &[PackRef],
    page_failures: Vec<proto::PageFailure>,
) -> Result<(proto::Usage, proto::Root)> {
    let mut frames = proto::FrameTable::default();
    let mut refs = Vec::new();
    for (first_path, files, handles) in segments {
        let frame_from = frames.pack.len() as u32;
        for &handle in handles {
            let place = known[handle as usize]
                .place
                .ok_or_else(|| Error::failed("a chunk without a place"))?;
            push_frame(&mut frames, &known[handle as usize], place.pack)?;
        }
        refs.push(proto::SegmentRef {
            first_path: first_path.clone(),
            files: *files,
            frame_from,
            frame_count: handles.len() as u32,
        });
    }
    relative_frames(&mut frames);
    let (names, headers) = encode_pack_table(packs);
    let mut live = vec![0u64; packs.len()];
    for chunk in known {
        if let Some(place) = chunk.place {
            live[place.pack as usize] += u64::from(place.stored_len);
        }
    }
    let usage = proto::Usage {
        packs: names.clone(),
        live_bytes: live,
    };
    let root = proto::Root {
        info: Some(info),
        packs: Some(proto::PackTable { names, headers }),
        frames: Some(frames),
        segments: refs,
        page_failures,
    };
    Ok((usage, root))
}

/// Seals the root object.
pub fn seal_root(stanza: &Stanza, usage: &proto::Usage, root: &proto::Root) -> Result<Vec<u8>> {
    let fresh = env::fresh(stanza.env())?;
    let mut writer = ObjectWriter::with_data(stanza.keys(), stanza.scope(), ObjectKind::Root, fresh, "")?;
    writer.message(KeyRole::Meta, usage)?;
    writer.message(KeyRole::Data, root)?;
    Ok(writer.finish())
}
