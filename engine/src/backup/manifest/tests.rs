//! What many backups make of the manifest of a file that changes a little between each two of them; in memory.

use std::sync::Arc;

use fairvault_format::header::ObjectHeader;
use fairvault_format::manifest::decode_segment;

use super::*;
use crate::dedup::Place;
use crate::manifest::Manifest;
use crate::postgres::lsn::Lsn;
use crate::postgres::{BLOCK_BYTES, BLOCKS_PER_SEGMENT};
use crate::track::map::{BlockMap, RelationId};
use crate::track::selection::Selection;

const BLOCK: u64 = BLOCK_BYTES as u64;
const PATH: &str = "base/5/16384";
const ID: RelationId = RelationId {
    tablespace: 1663,
    database: 5,
    relation: 16384,
};
/// 64 MiB: so much may be read again of thin frames at once, all of it.
const BLOCKS: u32 = 8192;
const SIZE: u64 = BLOCKS as u64 * BLOCK;
const ROUNDS: u32 = 60;

/// The pack of a round.
fn pack(round: u32) -> PackRef {
    let mut name = [0x5A; 32];
    name[..4].copy_from_slice(&round.to_be_bytes());
    PackRef {
        name,
        header: ObjectHeader::new(ObjectKind::Pack, 1, name),
    }
}

/// A chunk whose id begins with its number, as it lies in a pack.
fn chunk(number: u32, pack: u32, ordinal: u32, plain_len: u32) -> Known {
    const STORED: u32 = 128 << 10;
    let mut id = [0xA5; 32];
    id[..4].copy_from_slice(&number.to_be_bytes());
    Known {
        id,
        plain_len,
        place: Some(Place {
            pack,
            ordinal,
            offset: 80 + ordinal * STORED,
            stored_len: STORED,
        }),
    }
}

/// A file, and the chunks that backups of it have stored. Each page holds a number that nothing else ever held.
struct Model {
    pages: Vec<u64>,
    newest: u64,
    chunks: Vec<Vec<u64>>,
    dice: u64,
}

impl Model {
    /// One page in twenty changes, wherever it is.
    fn work(&mut self) -> BlockMap {
        let mut map = BlockMap::default();
        for _ in 0..BLOCKS / 20 {
            self.dice = self
                .dice
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let block = (self.dice >> 33) % u64::from(BLOCKS);
            self.newest += 1;
            self.pages[block as usize] = self.newest;
            map.relation(ID).add(block as u32);
        }
        map
    }

    /// What a backup would store of it as its manifest's segment, with the packs that this names.
    fn backup(&mut self, parent: Option<&Arc<Basis>>, round: u32) -> (Vec<u8>, Vec<PackRef>) {
        let selection = Selection {
            basis: parent.cloned(),
            audit: None,
        };
        let entry = Entry {
            path: PATH.to_owned(),
            kind: proto::FileKind::FileRegular,
            size: SIZE,
            mode: 0o600,
            mtime_us: 1_800_000_000_000_000,
            link_target: String::new(),
            is_gone: false,
            wanted: selection.of(PATH, SIZE),
        };
        let (mut known, mut packs, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        if let (Some(basis), Wanted::Blocks(ranges)) = (parent, &entry.wanted) {
            // Handles are the parent's numbers.
            known.extend(basis.manifest.frames.iter().map(|frame| Known {
                id: frame.id,
                plain_len: frame.plain_len,
                place: Some(Place {
                    pack: frame.pack,
                    ordinal: frame.ordinal,
                    offset: frame.offset,
                    stored_len: frame.stored_len,
                }),
            }));
            packs.extend_from_slice(&basis.manifest.packs);
            parts.extend(basis.kept(PATH, SIZE, ranges).iter().map(|kept| Extent {
                file: 0,
                offset: kept.file_offset,
                len: kept.len,
                handle: kept.frame,
                in_chunk: kept.frame_offset,
                crc32c: 0,
            }));
        }
        let own = packs.len() as u32;
        packs.push(pack(round));
        for (ordinal, runs) in (0..).zip(entry.wanted.chunks(SIZE)) {
            let (handle, mut content) = (known.len() as u32, Vec::new());
            for run in runs {
                parts.push(Extent {
                    file: 0,
                    offset: run.offset,
                    len: run.len,
                    handle,
                    in_chunk: content.len() as u32 * BLOCK_BYTES,
                    crc32c: 0,
                });
                let first = (run.offset / BLOCK) as usize;
                content.extend_from_slice(&self.pages[first..first + (run.len / BLOCK_BYTES) as usize]);
            }
            let len = content.len() as u32 * BLOCK_BYTES;
            known.push(chunk(self.chunks.len() as u32, own, ordinal, len));
            self.chunks.push(content);
        }
        parts.sort_unstable_by_key(|part| part.offset);
        let mut builder = SegmentBuilder::default();
        builder.file(&entry, &parts, None).unwrap();
        let basis = parent.map(|basis| &**basis);
        let (segment, first) = builder.finish(basis, &known, &packs).unwrap();
        assert_eq!(first, PATH);
        (encode_segment(segment), packs)
    }

    /// Every page of the file is where the manifest says, as it is now; and what could be one extent is one.
    fn check(&self, manifest: &Manifest) {
        let mut covered = 0;
        for p in &manifest.placements {
            assert_eq!(p.file_offset, covered);
            covered += u64::from(p.len);
            let id = &manifest.frames[p.frame as usize].id;
            let content = &self.chunks[u32::from_be_bytes([id[0], id[1], id[2], id[3]]) as usize];
            let (at, inside) = (
                (p.file_offset / BLOCK) as usize,
                (p.frame_offset / BLOCK_BYTES) as usize,
            );
            let count = (p.len / BLOCK_BYTES) as usize;
            assert_eq!(content[inside..inside + count], self.pages[at..at + count], "{p:?}");
        }
        assert_eq!(covered, SIZE);
        for pair in manifest.placements.windows(2) {
            let goes_on = pair[0].frame == pair[1].frame && pair[0].frame_offset + pair[0].len == pair[1].frame_offset;
            assert!(!goes_on, "{pair:?}");
        }
    }
}

/// Extents are columns of small numbers. In the worst case nearly every page is an extent of its own: even then the
/// manifest has no more than twelve bytes an extent, frames included, and less than a four hundredth of the file.
#[test]
fn extents_stay_compact_over_many_backups() {
    let mut model = Model {
        pages: (1..=u64::from(BLOCKS)).collect(),
        newest: u64::from(BLOCKS),
        chunks: Vec::new(),
        dice: 1,
    };
    let (mut parent, mut extents, mut len) = (None::<Arc<Basis>>, 0, 0);
    for round in 0..=ROUNDS {
        let (bytes, packs) = model.backup(parent.as_ref(), round);
        let (names, headers) = encode_pack_table(&packs);
        let root = proto::Root {
            packs: Some(proto::PackTable { names, headers }),
            ..Default::default()
        };
        let segment = decode_segment(&bytes, "a segment").unwrap();
        let packs = segment.pack_names.len();
        let manifest = Manifest::from_messages(root, proto::Usage::default(), vec![segment], "the manifest").unwrap();
        model.check(&manifest);
        let frames = manifest.frames.len();
        (extents, len) = (manifest.placements.len(), bytes.len());
        // Length 3 bytes, frame 2, offset in the chunk 3. Of a frame: id 32, pack 1, ordinal 1 or 2, offset 1 to 4, stored
        // length 3, plain length 3. Names of packs with their own lengths.
        let most = 8 * extents + 45 * frames + 34 * packs + 256;
        assert!(
            len <= most,
            "round {round}: {len} bytes for {extents} extents, {frames} frames, {packs} packs"
        );
        // Of a frame that is held, a quarter was used one backup before, or it is new: on average, it is about a half.
        let held: u64 = manifest.frames.iter().map(|frame| u64::from(frame.plain_len)).sum();
        assert!(held <= 3 * SIZE, "round {round}: {held}");
        let info = proto::BackupInfo {
            start_lsn: 1000,
            ..Default::default()
        };
        let map = model.work();
        parent = Some(Arc::new(Basis::new(info, manifest, map, Lsn(2000), |_| true)));
    }
    // So far it has come.
    assert!(extents > BLOCKS as usize / 2, "{extents} extents");
    assert!(len <= 12 * extents, "{len} bytes for {extents} extents");
    assert!(len as u64 * 400 <= SIZE, "{len} bytes");
}

/// Of eight files of 1 GiB, every other page has changed since they were read as a whole: each page is an extent of its
/// own, a million in all. They take a thousandth of the files at most, and each page is where it was.
#[test]
fn a_million_extents_stay_compact() {
    const FILES: u32 = 8;
    const CHUNK: u32 = limits::CHUNK_BYTES / BLOCK_BYTES;
    /// Chunks of a file that was read as a whole; half as many hold what has changed since.
    const WHOLE: u32 = BLOCKS_PER_SEGMENT / CHUNK;
    const CHUNKS: u32 = WHOLE + WHOLE / 2;
    const IN_PACK: u32 = 128;
    // Of a file's block: its chunk, and its number there.
    let place = |block: u32| match block % 2 {
        0 => (block / CHUNK, block % CHUNK),
        _ => (WHOLE + block / 2 / CHUNK, block / 2 % CHUNK),
    };
    let packs: Vec<PackRef> = (0..FILES * CHUNKS / IN_PACK).map(pack).collect();
    let known: Vec<Known> = (0..FILES * CHUNKS)
        .map(|number| chunk(number, number / IN_PACK, number % IN_PACK, limits::CHUNK_BYTES))
        .collect();
    let (mut segments, mut len) = (Vec::new(), 0);
    for file in 0..FILES {
        let entry = Entry {
            path: format!("base/5/{}", 16384 + file),
            kind: proto::FileKind::FileRegular,
            size: u64::from(BLOCKS_PER_SEGMENT) * BLOCK,
            mode: 0o600,
            mtime_us: 1_800_000_000_000_000,
            link_target: String::new(),
            is_gone: false,
            wanted: Wanted::Blocks(Arc::new([])),
        };
        let part = |block: u32| {
            let (chunk, at) = place(block);
            Extent {
                file,
                offset: u64::from(block) * BLOCK,
                len: BLOCK_BYTES,
                handle: file * CHUNKS + chunk,
                in_chunk: at * BLOCK_BYTES,
                crc32c: 0,
            }
        };
        let parts: Vec<Extent> = (0..BLOCKS_PER_SEGMENT).map(part).collect();
        let mut builder = SegmentBuilder::default();
        builder.file(&entry, &parts, None).unwrap();
        let bytes = encode_segment(builder.finish(None, &known, &packs).unwrap().0);
        len += bytes.len();
        segments.push(decode_segment(&bytes, "a segment").unwrap());
    }
    let (names, headers) = encode_pack_table(&packs);
    let root = proto::Root {
        packs: Some(proto::PackTable { names, headers }),
        ..Default::default()
    };
    let manifest = Manifest::from_messages(root, proto::Usage::default(), segments, "the manifest").unwrap();
    let extents = manifest.placements.len();
    assert_eq!(extents, (FILES * BLOCKS_PER_SEGMENT) as usize);
    assert!(len <= 8 * extents, "{len} bytes for {extents} extents");
    for (number, p) in (0..).zip(&manifest.placements) {
        let (file, block) = (number / BLOCKS_PER_SEGMENT, number % BLOCKS_PER_SEGMENT);
        let (chunk, at) = place(block);
        let id = &manifest.frames[p.frame as usize].id;
        let found = u32::from_be_bytes([id[0], id[1], id[2], id[3]]);
        assert_eq!(
            (p.file, p.file_offset, p.len),
            (file, u64::from(block) * BLOCK, BLOCK_BYTES)
        );
        assert_eq!((found, p.frame_offset), (file * CHUNKS + chunk, at * BLOCK_BYTES));
    }
}
