//! What a backup consists of, read and checked: its root, its segments, its files, and in which frames of which packs
//! their content is.
//!
//! What always holds: whatever a manifest says that cannot be is damage, before anything is done by it. Paths stay inside
//! the data directory, extents inside their files and chunks, frames inside their packs.

use std::collections::HashMap;

use bytes::Bytes;
use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::index::{PackRef, decode_pack_table};
use fairvault_format::keys::KeyRole;
use fairvault_format::manifest::{absolute_frames, decode_segment};
use fairvault_format::object::ObjectReader;
use fairvault_format::proto::{self, FileEntry, ManifestSegment, Root, Usage};
use fairvault_format::{limits, names, sha256};
use futures::{StreamExt, TryStreamExt};

use crate::error::{Context, Error, Result};
use crate::restore::data::read_frames;
use crate::stanza::Stanza;

/// Manifest segments that are read at once, and ranges of one segment.
const SEGMENTS: usize = 8;
const RUNS: usize = 8;

/// A frame to fetch.
#[derive(Debug, Clone, Copy)]
pub struct FrameRef {
    /// Chunk id.
    pub id: [u8; 32],
    /// Position in [`Manifest::packs`].
    pub pack: u32,
    /// Ordinal, offset and stored length in the pack.
    pub ordinal: u32,
    /// Offset, bytes.
    pub offset: u32,
    /// Stored length, bytes.
    pub stored_len: u32,
    /// Length of the chunk, bytes.
    pub plain_len: u32,
}

/// A part of a file, in a frame.
#[derive(Debug, Clone, Copy)]
pub struct Placement {
    /// Number of the file.
    pub file: u32,
    /// Offset in the file, bytes.
    pub file_offset: u64,
    /// Length, bytes.
    pub len: u32,
    /// Number of the frame.
    pub frame: u32,
    /// Offset in the chunk, bytes.
    pub frame_offset: u32,
}

/// A backup's manifest, checked.
#[derive(Debug)]
pub struct Manifest {
    /// Root.
    pub root: Root,
    /// Usage list.
    pub usage: Usage,
    /// Packs.
    pub packs: Vec<PackRef>,
    /// Files in path order; their extents are in `placements`.
    pub files: Vec<FileEntry>,
    /// Distinct frames.
    pub frames: Vec<FrameRef>,
    /// What its segments number, in path order.
    pub numbered: Vec<Numbered>,
    /// Where their content goes.
    pub placements: Vec<Placement>,
}

/// What the numbers of a manifest segment mean.
#[derive(Debug)]
pub struct Numbered {
    /// Path of its first file.
    pub first_path: String,
    /// Positions in [`Manifest::packs`].
    pub packs: Vec<u32>,
    /// Positions in [`Manifest::frames`].
    pub frames: Vec<u32>,
}

fn damaged(what: &str, why: impl std::fmt::Display) -> Error {
    Error::damaged(format!("{what} is damaged: {why}"))
}

/// Whether a path stays inside the directory that it is relative to.
fn safe_path(path: &str) -> bool {
    path.len() <= limits::PATH_BYTES
        && !path.contains('\0')
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// The root of a manifest, checked; its segments are read one by one.
#[derive(Debug)]
pub struct Outline {
    /// Root.
    pub root: Root,
    /// Usage list.
    pub usage: Usage,
    /// Packs.
    pub packs: Vec<PackRef>,
    /// How it is called in messages.
    pub what: String,
    frames: Vec<FrameRef>,
    by_name: HashMap<[u8; 32], u32>,
}

/// The root object of a backup and what it is called.
async fn root_object(stanza: &Stanza, root_hash: &[u8]) -> Result<(Bytes, String)> {
    let hash: [u8; 32] = root_hash
        .try_into()
        .map_err(|_| Error::damaged("the log names a root without a hash"))?;
    let name = names::root(&hash);
    let what = format!("{}/{name}", stanza.shown());
    let bytes = stanza
        .store()
        .get(&name, limits::OBJECT_BYTES)
        .await
        .context(|| "reading the manifest")?;
    match sha256(&bytes) == hash {
        true => Ok((bytes, what)),
        false => Err(damaged(&what, "its content does not match its name")),
    }
}

/// The usage list of a backup: no key that opens content is needed.
pub async fn usage(stanza: &Stanza, root_hash: &[u8]) -> Result<Usage> {
    let (bytes, what) = root_object(stanza, root_hash).await?;
    let keys = stanza.keys_for(&bytes, &what)?;
    Ok(ObjectReader::new(keys, stanza.scope(), ObjectKind::Root, &bytes, "", &what)?.message(KeyRole::Meta)?)
}

impl Outline {
    /// Reads and checks the root of a backup.
    pub async fn read(stanza: &Stanza, root_hash: &[u8]) -> Result<Self> {
        let (bytes, what) = root_object(stanza, root_hash).await?;
        let keys = stanza.keys_for(&bytes, &what)?;
        let mut reader = ObjectReader::new(keys, stanza.scope(), ObjectKind::Root, &bytes, "", &what)?;
        let usage: Usage = reader.message(KeyRole::Meta)?;
        let mut root: Root = reader.message(KeyRole::Data)?;
        reader.end()?;
        if let Some(frames) = &mut root.frames {
            absolute_frames(frames, &what)?;
        }
        let table = root.packs.clone().unwrap_or_default();
        let packs = decode_pack_table(&table.names, &table.headers, &what)?;
        let in_root = |pack: u32| ((pack as usize) < packs.len()).then_some(pack);
        let frames = frames(&root.frames.clone().unwrap_or_default(), in_root, &what)?;
        for segment in &root.segments {
            let from = segment.frame_from as usize;
            if from.saturating_add(segment.frame_count as usize) > frames.len() {
                return Err(damaged(&what, "a segment lies outside its frame table"));
            }
        }
        Ok(Self {
            root,
            usage,
            by_name: numbers(&packs),
            packs,
            what,
            frames,
        })
    }

    /// Number of its segments.
    pub fn segments(&self) -> usize {
        self.root.segments.len()
    }

    /// Length of all segments, bytes.
    pub fn manifest_bytes(&self) -> u64 {
        self.frames.iter().map(|frame| u64::from(frame.plain_len)).sum()
    }

    /// Reads a segment.
    pub async fn segment(&self, stanza: &Stanza, number: usize) -> Result<ManifestSegment> {
        let segment = &self.root.segments[number];
        let from = segment.frame_from as usize;
        let list = &self.frames[from..from + segment.frame_count as usize];
        read_segment(stanza, &self.packs, list, &self.what).await
    }

    /// The frames that the files of one of its segments refer to.
    pub fn frames_of(&self, segment: &ManifestSegment) -> Result<Vec<FrameRef>> {
        segment_frames(segment, &self.by_name, &self.what)
    }
}

fn numbers(packs: &[PackRef]) -> HashMap<[u8; 32], u32> {
    packs
        .iter()
        .zip(0..)
        .map(|(pack, number)| (pack.name, number))
        .collect()
}

fn segment_frames(segment: &ManifestSegment, by_name: &HashMap<[u8; 32], u32>, what: &str) -> Result<Vec<FrameRef>> {
    let number = |name: &Vec<u8>| by_name.get(name.as_slice()).copied();
    let local: Vec<Option<u32>> = segment.pack_names.iter().map(number).collect();
    let none = proto::FrameTable::default();
    let in_root = |pack: u32| local.get(pack as usize).copied().flatten();
    frames(segment.frames.as_ref().unwrap_or(&none), in_root, what)
}

impl Manifest {
    /// Reads and checks the manifest of a backup.
    pub async fn read(stanza: &Stanza, root_hash: &[u8]) -> Result<Self> {
        let outline = Outline::read(stanza, root_hash).await?;
        let reading = (0..outline.segments()).map(|number| outline.segment(stanza, number));
        let segments = futures::stream::iter(reading).buffered(SEGMENTS).try_collect().await?;
        Self::from_messages(outline.root, outline.usage, segments, &outline.what)
    }

    /// Checks decoded messages and puts them together. `what` names the root in errors.
    pub fn from_messages(root: Root, usage: Usage, segments: Vec<ManifestSegment>, what: &str) -> Result<Self> {
        let table = root.packs.clone().unwrap_or_default();
        let packs = decode_pack_table(&table.names, &table.headers, what)?;
        let by_name = numbers(&packs);
        let mut this = Self {
            root,
            usage,
            packs,
            files: Vec::new(),
            frames: Vec::new(),
            numbered: Vec::new(),
            placements: Vec::new(),
        };
        let mut frame_numbers: HashMap<(u32, u32), u32> = HashMap::new();
        for segment in segments {
            this.add_segment(segment, &by_name, &mut frame_numbers, what)?;
        }
        Ok(this)
    }

    fn add_segment(
        &mut self,
        segment: ManifestSegment,
        by_name: &HashMap<[u8; 32], u32>,
        numbers: &mut HashMap<(u32, u32), u32>,
        what: &str,
    ) -> Result<()> {
        let table = segment_frames(&segment, by_name, what)?;
        let number = |frame: &FrameRef| {
            *numbers.entry((frame.pack, frame.ordinal)).or_insert_with(|| {
                self.frames.push(*frame);
                self.frames.len() as u32 - 1
            })
        };
        let numbers: Vec<u32> = table.iter().map(number).collect();
        let packs = segment.pack_names.iter();
        let packs = packs.filter_map(|name| by_name.get(name.as_slice()).copied()).collect();
        let first_path = segment.files.first().map(|file| file.path.clone()).unwrap_or_default();
        for mut file in segment.files {
            if !file.path_bytes.is_empty() || !safe_path(&file.path) {
                return Err(damaged(what, format_args!("it lists the path {:?}", file.path)));
            }
            if self
                .files
                .last()
                .is_some_and(|last| last.path.as_bytes() >= file.path.as_bytes())
            {
                return Err(damaged(what, format_args!("{:?} is out of order", file.path)));
            }
            let number = self.files.len() as u32;
            let e = file.extents.take().unwrap_or_default();
            let count = e.file_offset.len();
            if e.len.len() != count || e.frame.len() != count || e.frame_offset.len() != count {
                return Err(damaged(what, format_args!("the extents of {:?}", file.path)));
            }
            let mut covered = 0u64;
            for i in 0..count {
                let frame = numbers.get(e.frame[i] as usize).copied();
                // As it is fetched: tables may say of one frame that it has several lengths.
                let inside = frame.is_some_and(|at| {
                    let plain_len = self.frames[at as usize].plain_len;
                    u64::from(e.frame_offset[i]) + u64::from(e.len[i]) <= u64::from(plain_len)
                });
                let end = e.file_offset[i]
                    .checked_add(e.len[i].into())
                    .filter(|&end| end <= file.size);
                let (Some(frame), true, Some(end)) = (frame, inside && e.file_offset[i] >= covered, end) else {
                    return Err(damaged(what, format_args!("the extents of {:?}", file.path)));
                };
                covered = end;
                self.placements.push(Placement {
                    file: number,
                    file_offset: e.file_offset[i],
                    len: e.len[i],
                    frame,
                    frame_offset: e.frame_offset[i],
                });
            }
            self.files.push(file);
        }
        self.numbered.push(Numbered {
            first_path,
            packs,
            frames: numbers,
        });
        Ok(())
    }
}

async fn read_segment(stanza: &Stanza, packs: &[PackRef], list: &[FrameRef], what: &str) -> Result<ManifestSegment> {
    let total: u64 = list.iter().map(|f| u64::from(f.plain_len)).sum();
    fairvault_format::error::check_limit(what, total, limits::MANIFEST_SEGMENT_BYTES)?;
    // Of chunks that lie one behind the other, one range is asked for.
    let mut runs: Vec<&[FrameRef]> = Vec::new();
    let mut from = 0;
    for at in 1..=list.len() {
        let goes_on = list.get(at).is_some_and(|next| {
            let last = &list[at - 1];
            next.pack == last.pack && next.offset == last.offset + last.stored_len
        });
        if !goes_on {
            runs.push(&list[from..at]);
            from = at;
        }
    }
    let reading = runs
        .into_iter()
        .map(|run| read_frames(stanza, &packs[run[0].pack as usize], run));
    let bytes: Vec<Vec<u8>> = futures::stream::iter(reading).buffered(RUNS).try_collect().await?;
    let bytes = bytes.concat();
    Ok(decode_segment(&bytes, what)?)
}

fn frames(table: &proto::FrameTable, pack: impl Fn(u32) -> Option<u32>, what: &str) -> Result<Vec<FrameRef>> {
    let count = table.pack.len();
    let columns = [
        table.ordinal.len(),
        table.offset.len(),
        table.stored_len.len(),
        table.plain_len.len(),
    ];
    if table.ids.len() != count * 32 || columns.iter().any(|&n| n != count) {
        return Err(damaged(what, "the columns of its frame table differ in length"));
    }
    (0..count)
        .map(|i| {
            let mut id = [0u8; 32];
            id.copy_from_slice(&table.ids[i * 32..i * 32 + 32]);
            fairvault_format::error::check_limit(what, table.plain_len[i].into(), limits::MANIFEST_CHUNK_BYTES.into())?;
            fairvault_format::error::check_limit(
                what,
                u64::from(table.offset[i]) + u64::from(table.stored_len[i]),
                limits::PACK_BYTES,
            )?;
            Ok(FrameRef {
                id,
                pack: pack(table.pack[i])
                    .ok_or_else(|| damaged(what, "a frame is in a pack that its table does not have"))?,
                ordinal: table.ordinal[i],
                offset: table.offset[i],
                stored_len: table.stored_len[i],
                plain_len: table.plain_len[i],
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use fairvault_format::header::ObjectHeader;
    use fairvault_format::index::encode_pack_table;

    use super::*;

    /// Of a frame that is listed twice, what is there has one length: nothing is read behind its end.
    #[test]
    fn a_frame_has_one_length() {
        let manifest = |lens: [u32; 2]| {
            let name = [7; 32];
            let header = ObjectHeader::new(ObjectKind::Pack, 1, name);
            let (names, headers) = encode_pack_table(&[PackRef { name, header }]);
            let root = Root {
                packs: Some(proto::PackTable { names, headers }),
                ..Default::default()
            };
            let frames = proto::FrameTable {
                ids: vec![1; 64],
                pack: vec![0; 2],
                ordinal: vec![5; 2],
                offset: vec![80; 2],
                stored_len: vec![10; 2],
                plain_len: lens.to_vec(),
                ..Default::default()
            };
            let extents = proto::Extents {
                file_offset: vec![0],
                len: vec![100],
                frame: vec![1],
                frame_offset: vec![0],
                ..Default::default()
            };
            let file = FileEntry {
                path: "base/1/2".to_owned(),
                size: 100,
                extents: Some(extents),
                ..Default::default()
            };
            let segment = ManifestSegment {
                pack_names: vec![name.to_vec()],
                frames: Some(frames),
                files: vec![file],
            };
            Manifest::from_messages(root, Usage::default(), vec![segment], "the manifest")
        };
        assert_eq!(manifest([100, 100]).unwrap().frames.len(), 1);
        let error = manifest([8, 100]).err().unwrap();
        assert_eq!(error.kind(), crate::error::Kind::Damaged);
    }

    /// What leads out of the data directory, or is there twice, is in no manifest that we wrote.
    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        let manifest = |paths: &[&str]| {
            let file = |path: &&str| proto::FileEntry {
                path: (*path).to_owned(),
                ..Default::default()
            };
            let segment = ManifestSegment {
                files: paths.iter().map(file).collect(),
                ..Default::default()
            };
            Manifest::from_messages(Root::default(), Usage::default(), vec![segment], "the manifest")
        };
        assert_eq!(
            manifest(&["PG_VERSION", "base/1/2", "base/1/2_vm"])
                .unwrap()
                .files
                .len(),
            3
        );
        let long = "x".repeat(limits::PATH_BYTES + 1);
        let bad = [
            "",
            "/etc/passwd",
            "..",
            "../x",
            "base/../../x",
            "base/..",
            "./x",
            "base//1",
            "base/",
            "a\0b",
            &long,
        ];
        for path in bad {
            let error = manifest(&[path]).err().unwrap();
            assert_eq!(error.kind(), crate::error::Kind::Damaged, "{path:?}");
            assert!(error.to_string().contains("it lists the path"), "{error}");
        }
        for twice in [&["base/1", "base/1"], &["base/2", "base/1"]] {
            assert!(manifest(twice).err().unwrap().to_string().contains("is out of order"));
        }
    }
}
