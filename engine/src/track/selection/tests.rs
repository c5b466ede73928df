//! What is read and what is kept of relations whose parents are made by hand, and of one that is worked on for many
//! backups.

mod model;

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::error::Kind as ErrorKind;
use crate::manifest::FrameRef;
use crate::track::PARSER_VERSION;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Blocks of a chunk.
const CHUNK: u32 = 64;
const PATH: &str = "base/5/16384";
const ID: RelationId = RelationId {
    tablespace: 1663,
    database: 5,
    relation: 16384,
};
/// Where the parent began, and where the backup does.
const BEGAN: u64 = 0x1_0000_1000;
const START: u64 = 0x1_0000_2000;

fn parent() -> proto::BackupInfo {
    proto::BackupInfo {
        id: "20260101-000000F".to_owned(),
        start_lsn: BEGAN,
        ..Default::default()
    }
}

/// The path of a file of the relation.
fn file_of(segment: u32) -> String {
    match segment {
        0 => PATH.to_owned(),
        _ => format!("{PATH}.{segment}"),
    }
}

/// A manifest, file by file.
#[derive(Default)]
struct Made {
    files: Vec<proto::FileEntry>,
    frames: Vec<FrameRef>,
    placements: Vec<Placement>,
}

impl Made {
    /// A frame with a chunk of so many blocks.
    fn frame(&mut self, pack: u32, blocks: u32) -> u32 {
        let number = self.frames.len() as u32;
        self.frames.push(FrameRef {
            id: [0; 32],
            pack,
            ordinal: number,
            offset: 0,
            stored_len: 100,
            plain_len: blocks * BLOCK_BYTES,
        });
        number
    }

    /// A file of these parts, one behind the other: frame, first block in its chunk, blocks.
    fn file(&mut self, path: &str, parts: &[(u32, u32, u32)]) {
        let (file, mut size) = (self.files.len() as u32, 0);
        for &(frame, at, blocks) in parts {
            self.placements.push(Placement {
                file,
                file_offset: size,
                len: blocks * BLOCK_BYTES,
                frame,
                frame_offset: at * BLOCK_BYTES,
            });
            size += u64::from(blocks) * BLOCK;
        }
        self.files.push(proto::FileEntry {
            path: path.to_owned(),
            size,
            ..Default::default()
        });
    }

    /// A file as a backup stores it that reads all of it.
    fn whole(&mut self, path: &str, blocks: u32) {
        let lengths = (0..blocks).step_by(CHUNK as usize).map(|at| CHUNK.min(blocks - at));
        let parts: Vec<_> = lengths.map(|len| (self.frame(0, len), 0, len)).collect();
        self.file(path, &parts);
    }

    /// The relation with this file alone.
    fn of(blocks: u32) -> Self {
        let mut made = Self::default();
        made.whole(PATH, blocks);
        made
    }

    fn manifest(self) -> Manifest {
        Manifest {
            root: proto::Root::default(),
            usage: proto::Usage::default(),
            packs: Vec::new(),
            files: self.files,
            numbered: Vec::new(),
            frames: self.frames,
            placements: self.placements,
        }
    }

    /// What a backup builds on, if this is the parent's and the map is what changed since.
    fn basis(self, map: BlockMap) -> Basis {
        self.basis_of_packs(map, |_| true)
    }

    fn basis_of_packs(self, map: BlockMap, is_good: impl Fn(u32) -> bool) -> Basis {
        Basis::new(parent(), self.manifest(), map, Lsn(START), is_good)
    }
}

/// Named blocks of the relation.
fn changed(blocks: &[u32]) -> BlockMap {
    let mut map = BlockMap::default();
    blocks.iter().for_each(|&block| map.relation(ID).add(block));
    map
}

/// The relation was cut.
fn cut(limit: u32) -> BlockMap {
    let mut map = BlockMap::default();
    map.relation(ID).limit_to(limit);
    map
}

/// What is read of a file that now has so many bytes: ranges of blocks, or `None` for all of it.
fn read_of(basis: &Basis, path: &str, size: u64) -> Option<Vec<(u32, u32)>> {
    match basis.wanted(path, size) {
        Wanted::All => None,
        Wanted::Blocks(ranges) => Some(ranges.iter().map(|range| (range.start, range.end)).collect()),
    }
}

fn read(basis: &Basis, blocks: u32) -> Option<Vec<(u32, u32)>> {
    read_of(basis, PATH, u64::from(blocks) * BLOCK)
}

/// Block by block: its number in the file, its frame, and its number in the chunk.
fn blocks_of<'a>(placements: impl IntoIterator<Item = &'a Placement>) -> Vec<(u32, u32, u32)> {
    let mut all = Vec::new();
    for p in placements {
        assert!(p.len > 0 && p.len.is_multiple_of(BLOCK_BYTES), "{p:?}");
        assert!(
            p.file_offset.is_multiple_of(BLOCK) && p.frame_offset.is_multiple_of(BLOCK_BYTES),
            "{p:?}"
        );
        let (first, inside) = ((p.file_offset / BLOCK) as u32, p.frame_offset / BLOCK_BYTES);
        all.extend((0..p.len / BLOCK_BYTES).map(|n| (first + n, p.frame, inside + n)));
    }
    all
}

/// What must be kept of a file that now has so many blocks: every block that the parent has and that is not read.
fn expected(basis: &Basis, file: u32, blocks: u32, wanted: &[Range<u32>]) -> Vec<(u32, u32, u32)> {
    let mut all = blocks_of(basis.manifest.placements.iter().filter(|p| p.file == file));
    all.retain(|(block, ..)| *block < blocks && !wanted.iter().any(|range| range.contains(block)));
    all
}

fn ranges(blocks: impl IntoIterator<Item = u32>) -> Vec<Range<u32>> {
    let mut all: Vec<Range<u32>> = Vec::new();
    for block in blocks {
        match all.last_mut() {
            Some(last) if last.end == block => last.end += 1,
            _ => all.push(block..block + 1),
        }
    }
    all
}

#[test]
fn what_wal_names_is_read_and_nothing_else() {
    // Block 100 is behind the end; other relations say nothing of this one.
    let mut map = changed(&[99, 64, 0, 63, 2, 1, 100]);
    for other in [
        RelationId { relation: 16385, ..ID },
        RelationId { database: 6, ..ID },
        RelationId { tablespace: 1664, ..ID },
    ] {
        map.relation(other).add(7);
        map.relation(other).limit_to(8);
    }
    let basis = Made::of(100).basis(map);
    assert_eq!(read(&basis, 100), Some(vec![(0, 3), (63, 65), (99, 100)]));
    // And the same, as a source asks.
    let selection = Selection {
        basis: Some(Arc::new(basis)),
        audit: None,
    };
    let wanted = selection.of(PATH, 100 * BLOCK);
    assert_eq!(wanted.bytes(100 * BLOCK), 6 * BLOCK);
    assert_eq!(Selection::default().of(PATH, 100 * BLOCK), Wanted::All);
}

#[test]
fn where_nine_tenths_are_to_be_read_everything_is() {
    for (blocks, changes, is_whole) in [
        (100, 0, false),
        (100, 89, false),
        (100, 90, true),
        (100, 100, true),
        (10, 8, false),
        (10, 9, true),
        (11, 9, false),
        (11, 10, true),
        (1, 0, false),
        (1, 1, true),
    ] {
        let named: Vec<u32> = (0..changes).collect();
        let basis = Made::of(blocks).basis(changed(&named));
        let read = read(&basis, blocks);
        assert_eq!(read.is_none(), is_whole, "{changes} of {blocks}: {read:?}");
    }
    // What is new counts as well, and each block once, however many reasons there are to read it.
    assert_eq!(
        read(&Made::of(11).basis(BlockMap::default()), 100),
        Some(vec![(11, 100)])
    );
    assert_eq!(read(&Made::of(10).basis(BlockMap::default()), 100), None);
    let map = changed(&(11..100).collect::<Vec<u32>>());
    assert_eq!(read(&Made::of(11).basis(map), 100), Some(vec![(11, 100)]));
}

#[test]
fn of_a_file_that_grew_what_is_new_is_read_without_being_named() {
    let grew = |map| read(&Made::of(50).basis(map), 60);
    assert_eq!(grew(BlockMap::default()), Some(vec![(50, 60)]));
    assert_eq!(grew(changed(&[3, 49, 55])), Some(vec![(3, 4), (49, 60)]));
    assert_eq!(grew(changed(&[48])), Some(vec![(48, 49), (50, 60)]));
    // What was cut and grew again is not what it was, even where it has its old length.
    assert_eq!(grew(cut(30)), Some(vec![(30, 60)]));
    assert_eq!(grew(cut(50)), Some(vec![(50, 60)]));
    assert_eq!(grew(cut(60)), Some(vec![(50, 60)]));
    assert_eq!(read(&Made::of(50).basis(cut(40)), 50), Some(vec![(40, 50)]));
    // Made anew.
    assert_eq!(grew(cut(0)), None);
}

#[test]
fn of_a_file_that_shrank_nothing_is_kept_from_behind_its_end() {
    for blocks in [1, 40, 63, 64, 65, 70, 99] {
        let basis = Made::of(100).basis(cut(blocks));
        assert_eq!(read(&basis, blocks), Some(vec![]), "{blocks}");
        let kept = basis.kept(PATH, u64::from(blocks) * BLOCK, &[]);
        assert_eq!(blocks_of(&kept), expected(&basis, 0, blocks, &[]));
        assert_eq!(kept.len(), if blocks > CHUNK { 2 } else { 1 });
        let len: u64 = kept.iter().map(|p| u64::from(p.len)).sum();
        assert_eq!(len, u64::from(blocks) * BLOCK);
    }
    // Cut deeper, then named and grown, and shorter than before all the same.
    let mut map = cut(30);
    map.relation(ID).add(10);
    let basis = Made::of(100).basis(map);
    assert_eq!(read(&basis, 70), Some(vec![(10, 11), (30, 70)]));
    let kept = basis.kept(PATH, 70 * BLOCK, &ranges((10..11).chain(30..70)));
    let (blocks, inside): (Vec<u32>, Vec<u32>) = blocks_of(&kept).iter().map(|&(block, _, n)| (block, n)).unzip();
    let expected: Vec<u32> = (0..10).chain(11..30).collect();
    assert_eq!((&blocks, &inside), (&expected, &expected));
}

/// WAL numbers blocks from the beginning of the relation, files from their own.
#[test]
fn a_relation_of_several_files_is_numbered_through() {
    const FULL: u32 = BLOCKS_PER_SEGMENT;
    let basis = |map| {
        let mut made = Made::default();
        for (segment, blocks) in [(0, FULL), (1, FULL), (2, 100)] {
            made.whole(&file_of(segment), blocks);
        }
        made.basis(map)
    };
    let read = |basis: &Basis, segment: u32, blocks: u32| read_of(basis, &file_of(segment), u64::from(blocks) * BLOCK);
    let named = basis(changed(&[
        131_071,
        131_072,
        131_077,
        2 * 131_072 - 1,
        2 * 131_072 + 7,
        3 * 131_072,
    ]));
    assert_eq!(read(&named, 0, FULL), Some(vec![(131_071, 131_072)]));
    let second = vec![(0, 1), (5, 6), (131_071, 131_072)];
    assert_eq!(read(&named, 1, FULL), Some(second));
    assert_eq!(read(&named, 2, 100), Some(vec![(7, 8)]));
    let wanted = ranges([0, 5, 131_071]);
    let kept = named.kept(&file_of(1), u64::from(FULL) * BLOCK, &wanted);
    assert!(kept.iter().all(|p| p.file == 1));
    let blocks = blocks_of(&kept);
    assert_eq!(blocks.len(), 131_069);
    assert_eq!(blocks, expected(&named, 1, FULL, &wanted));
    // A file that the parent does not have.
    assert_eq!(read(&named, 3, 100), None);

    // A cut in the middle of the second one leaves the first, and ends the third.
    let second_cut = basis(cut(131_072 + 10));
    assert_eq!(read(&second_cut, 0, FULL), Some(vec![]));
    assert_eq!(read(&second_cut, 1, 20), Some(vec![(10, 20)]));
    assert_eq!(read(&second_cut, 1, 10), Some(vec![]));
    assert_eq!(read(&second_cut, 2, 100), None);
    // Just where the second one begins.
    let between = basis(cut(131_072));
    assert_eq!(read(&between, 0, FULL), Some(vec![]));
    assert_eq!(read(&between, 1, FULL), None);
    let before = basis(cut(131_071));
    assert_eq!(read(&before, 0, FULL), Some(vec![(131_071, 131_072)]));
    assert_eq!(read(&before, 1, FULL), None);
}

/// The last block that PostgreSQL can number is the last but one of its file.
#[test]
fn the_last_block_of_the_largest_relation_is_seen() {
    let path = file_of(32_767);
    let mut made = Made::default();
    made.whole(&path, 131_071);
    made.whole(&file_of(32_768), 10);
    let basis = made.basis(changed(&[u32::MAX - 1, u32::MAX - 131_071]));
    let size = 131_071 * BLOCK;
    assert_eq!(read_of(&basis, &path, size), Some(vec![(0, 1), (131_070, 131_071)]));
    // No block of such a file has a number.
    assert_eq!(read_of(&basis, &file_of(32_768), 10 * BLOCK), None);
}

/// No block has this number: a file of this length is none of PostgreSQL's, and so it is in doubt.
#[test]
fn a_file_whose_last_block_has_no_number_is_read_as_a_whole() {
    let path = file_of(32_767);
    let mut made = Made::default();
    made.whole(&path, BLOCKS_PER_SEGMENT);
    let basis = made.basis(changed(&[u32::MAX - 131_071]));
    assert_eq!(read_of(&basis, &path, u64::from(BLOCKS_PER_SEGMENT) * BLOCK), None);
}

/// Nothing changed, and all is kept: each doubt by itself makes the difference.
#[test]
fn whatever_is_in_doubt_is_read_as_a_whole() {
    const SIZE: u64 = 100 * BLOCK;
    let files = [
        "base/5/16384_fsm",
        "base/5/16384_vm",
        "base/5/16384_init",
        "base/5/PG_VERSION",
        "base/5/pg_filenode.map",
        "base/5/t3_16384",
        "global/pg_control",
        "pg_xact/0000",
    ];
    let made = || {
        let mut made = Made::of(100);
        files.iter().for_each(|path| made.whole(path, 100));
        made
    };
    let basis = made().basis(BlockMap::default());
    assert_eq!(read_of(&basis, PATH, SIZE), Some(vec![]));
    // Whose changes WAL does not name, or which are no relations.
    for path in files {
        assert_eq!(read_of(&basis, path, SIZE), None, "{path}");
    }
    // What the parent does not have: another relation, another file of it, the same in another place.
    for path in [
        "base/5/16385",
        "base/5/16384.1",
        "base/6/16384",
        "global/16384",
        "pg_tblspc/16400/PG_15_202209061/5/16384",
    ] {
        assert_eq!(read_of(&basis, path, SIZE), None, "{path}");
    }
    for size in [0, 1, SIZE - 1, SIZE + 1, SIZE + BLOCK / 2] {
        assert_eq!(read_of(&basis, PATH, size), None, "{size} bytes");
    }
    // Longer than a file of a relation can be.
    let mut long = Made::of(131_072);
    long.whole("base/5/16385", 131_073);
    let long = long.basis(BlockMap::default());
    assert_eq!(read(&long, 131_072), Some(vec![]));
    assert_eq!(read_of(&long, "base/5/16385", 131_073 * BLOCK), None);

    // What the parent says of the file.
    for size in [SIZE - 1, SIZE + 4096] {
        let mut torn = made();
        torn.files[0].size = size;
        assert_eq!(read(&torn.basis(BlockMap::default()), 100), None, "{size} bytes before");
    }
    for kind in [FileKind::FileDirectory, FileKind::FileSymlink] {
        let mut other = made();
        other.files[0].kind = kind as i32;
        assert_eq!(read(&other.basis(BlockMap::default()), 100), None, "{kind:?}");
    }

    // What the WAL says.
    let mut everything = BlockMap::default();
    everything.everything("a record is not understood");
    assert_eq!(read(&made().basis(everything), 100), None);
    let mut database = BlockMap::default();
    database.database(1663, 5);
    assert_eq!(read(&made().basis(database), 100), None);
    let mut others = BlockMap::default();
    others.database(1663, 6);
    others.database(1664, 5);
    assert_eq!(read(&made().basis(others), 100), Some(vec![]));
}

#[test]
fn what_lies_in_a_pack_that_is_not_good_is_read_again() {
    // More than is rewritten of thin frames.
    let mut made = Made::default();
    let parts: Vec<_> = (0..600).map(|n| (made.frame(n % 2, CHUNK), 0, CHUNK)).collect();
    made.file(PATH, &parts);
    let basis = made.basis_of_packs(BlockMap::default(), |pack| pack == 0);
    let expected: Vec<(u32, u32)> = (0..300).map(|n| (n * 128 + 64, n * 128 + 128)).collect();
    let len: u64 = expected.iter().map(|(from, to)| u64::from(to - from) * BLOCK).sum();
    assert!(len > REWRITE_BYTES, "{len}");
    assert_eq!(read(&basis, 600 * CHUNK), Some(expected));

    // A part that does not end where blocks do: all that it touches.
    let mut made = Made::default();
    let (good, bad) = (made.frame(0, CHUNK), made.frame(1, 1));
    for (frame, file_offset, len) in [
        (good, 0, 4096),
        (bad, 4096, 8192),
        (good, 12_288, 20 * BLOCK_BYTES - 12_288),
    ] {
        made.placements.push(Placement {
            file: 0,
            file_offset,
            len,
            frame,
            frame_offset: 0,
        });
    }
    made.files.push(proto::FileEntry {
        path: PATH.to_owned(),
        size: 20 * BLOCK,
        ..Default::default()
    });
    let basis = made.basis_of_packs(BlockMap::default(), |pack| pack == 0);
    assert_eq!(read(&basis, 20), Some(vec![(0, 2)]));
    let kept = basis.kept(PATH, 20 * BLOCK, &ranges([0, 1]));
    let places: Vec<_> = kept
        .iter()
        .map(|p| (p.file_offset, p.frame, p.frame_offset, p.len))
        .collect();
    assert_eq!(places, [(16_384, good, 4096, 18 * BLOCK_BYTES)]);
}

#[test]
fn pages_that_the_parent_found_damaged_are_read_again() {
    let mut manifest = Made::of(100).manifest();
    let failure = |path: &str, block| proto::PageFailure {
        path: path.to_owned(),
        block,
        ..Default::default()
    };
    // One is of a file that is gone, one lies behind the end.
    manifest.root.page_failures = vec![failure(PATH, 7), failure("base/5/16385", 8), failure(PATH, 100)];
    let basis = Basis::new(parent(), manifest, changed(&[6]), Lsn(START), |_| true);
    assert_eq!(read(&basis, 100), Some(vec![(6, 8)]));
}

#[test]
fn of_a_frame_of_which_less_than_a_quarter_is_used_the_rest_is_read_again() {
    for (used, is_thin) in [(64, false), (17, false), (16, false), (15, true), (1, true)] {
        let mut made = Made::default();
        let (before, thin, behind) = (made.frame(0, CHUNK), made.frame(0, CHUNK), made.frame(0, CHUNK));
        made.file(PATH, &[(before, 0, CHUNK), (thin, 0, used), (behind, 0, CHUNK)]);
        let expected = if is_thin { vec![(64, 64 + used)] } else { vec![] };
        let basis = made.basis(BlockMap::default());
        assert_eq!(read(&basis, 128 + used), Some(expected), "{used} of 64");
    }
    // All that is used of it counts, wherever it is.
    for (each, is_thin) in [(8, false), (7, true)] {
        let mut made = Made::default();
        let (whole, thin) = (made.frame(0, CHUNK), made.frame(0, CHUNK));
        made.file(PATH, &[(whole, 0, CHUNK), (thin, 0, each)]);
        let other = made.frame(0, CHUNK);
        made.file("base/5/16385", &[(thin, 40, each), (other, 0, CHUNK)]);
        let basis = made.basis(BlockMap::default());
        let (first, second) = match is_thin {
            true => (vec![(64, 64 + each)], vec![(0, each)]),
            false => (vec![], vec![]),
        };
        assert_eq!(read(&basis, 64 + each), Some(first), "{each}");
        let size = u64::from(64 + each) * BLOCK;
        assert_eq!(read_of(&basis, "base/5/16385", size), Some(second), "{each}");
    }
    // A chunk that was never a large one is not thin.
    let mut made = Made::default();
    let (small, whole) = (made.frame(0, 2), made.frame(0, CHUNK));
    made.file(PATH, &[(small, 0, 1), (whole, 0, CHUNK)]);
    assert_eq!(read(&made.basis(BlockMap::default()), 65), Some(vec![]));
}

/// 600 frames of which 15 blocks of 64 are used, and one of which one is.
#[test]
fn what_is_read_again_of_thin_frames_is_bounded() {
    const FRAMES: u32 = 600;
    let made = || {
        let mut made = Made::default();
        let mut parts = Vec::new();
        for _ in 0..FRAMES {
            parts.push((made.frame(0, CHUNK), 0, 15));
            parts.push((made.frame(0, CHUNK), 0, CHUNK));
        }
        parts.push((made.frame(0, CHUNK), 0, 1));
        made.file(PATH, &parts);
        made
    };
    let blocks = FRAMES * 79 + 1;
    for (cluster, frames, and_last) in [
        // 64 MiB are 8192 blocks: behind 546 frames, only the last one still fits.
        (0, 546, true),
        (32 * 8192 * BLOCK, 546, true),
        // A 32nd of the cluster, where that is more.
        (32 * 9000 * BLOCK, 600, false),
        (32 * 9001 * BLOCK, 600, true),
        (32 * 8999 * BLOCK, 599, true),
    ] {
        let parent = proto::BackupInfo {
            plain_bytes: cluster,
            ..parent()
        };
        let basis = Basis::new(parent, made().manifest(), BlockMap::default(), Lsn(START), |_| true);
        let mut expected: Vec<(u32, u32)> = (0..frames).map(|n| (n * 79, n * 79 + 15)).collect();
        if and_last {
            expected.push((blocks - 1, blocks));
        }
        assert_eq!(read(&basis, blocks), Some(expected), "{cluster} bytes");
    }
}

/// What is as it was is told from what is only as long as it was.
#[test]
fn a_file_of_which_nothing_is_read_is_the_parents() {
    const SIZE: u64 = 100 * BLOCK;
    let is_unchanged = |map, size| {
        let basis = Made::of(100).basis(map);
        let wanted = basis.wanted(PATH, size);
        basis.unchanged(PATH, size, &wanted).is_some()
    };
    assert!(is_unchanged(BlockMap::default(), SIZE));
    assert!(!is_unchanged(changed(&[3]), SIZE));
    assert!(!is_unchanged(cut(40), 40 * BLOCK), "it shrank");
    assert!(!is_unchanged(BlockMap::default(), SIZE + BLOCK), "it grew");
    assert!(!is_unchanged(cut(0), SIZE), "all of it is read");
    // Nothing is read of an empty file, and all of it is.
    let mut made = Made::default();
    made.file(PATH, &[]);
    let basis = made.basis(BlockMap::default());
    assert!(basis.unchanged(PATH, 0, &basis.wanted(PATH, 0)).is_none());
    assert!(
        basis
            .unchanged("base/5/16385", 0, &Wanted::Blocks(Arc::new([])))
            .is_none()
    );
}

#[test]
fn what_an_audit_fetches_and_who_parsed_are_told() {
    let mut made = Made::default();
    let (shared, own, other) = (made.frame(0, CHUNK), made.frame(0, CHUNK), made.frame(0, CHUNK));
    made.file("base/5/16384", &[(shared, 0, CHUNK), (own, 0, CHUNK)]);
    made.file("base/5/16384_vm", &[(other, 0, CHUNK)]);
    made.file("base/5/16385", &[(shared, 0, CHUNK)]);
    let parent = proto::BackupInfo {
        parser_versions: vec![PARSER_VERSION + 7, PARSER_VERSION, PARSER_VERSION + 7],
        ..parent()
    };
    let basis = Basis::new(parent, made.manifest(), BlockMap::default(), Lsn(START), |_| true);
    assert_eq!(basis.stored_bytes(), 200, "two frames, each once");
    assert_eq!(basis.parser_versions(), [PARSER_VERSION, PARSER_VERSION + 7]);
    let first = Made::of(1).basis(BlockMap::default());
    assert_eq!(first.parser_versions(), [PARSER_VERSION]);
    // Maps that were kept may be of other parsers than this one.
    let mut kept = changed(&[0]);
    kept.made_by(PARSER_VERSION + 1);
    assert_eq!(
        Made::of(1).basis(kept).parser_versions(),
        [PARSER_VERSION, PARSER_VERSION + 1]
    );
}

/// A page with this LSN.
fn page(lsn: u64) -> Vec<u8> {
    let mut page = vec![0; BLOCK_BYTES as usize];
    page[..4].copy_from_slice(&((lsn >> 32) as u32).to_le_bytes());
    page[4..8].copy_from_slice(&(lsn as u32).to_le_bytes());
    page
}

#[test]
fn a_page_that_is_newer_than_the_map_says_is_an_alarm() {
    let mut map = changed(&[7]);
    map.relation(RelationId { relation: 16385, ..ID }).limit_to(8);
    map.database(1663, 6);
    let mut made = Made::of(100);
    for path in ["base/5/16385", "base/5/16384_vm", "base/6/16384"] {
        made.whole(path, 100);
    }
    let basis = made.basis(map);
    let check = |path: &str, block, page: &[u8]| {
        let relation = relation_file(path).expect("a relation's file");
        basis.check_page(path, &relation, block, page)
    };
    // Pages of the parent, and of what comes while this backup runs, say nothing.
    for (lsn, is_alarm) in [
        (0, false),
        (BEGAN, false),
        (BEGAN + 1, true),
        (START, true),
        (START + 1, false),
        // The halves in the other order.
        (START.rotate_left(32), false),
        ((BEGAN + 1).rotate_left(32), false),
    ] {
        let checked = check(PATH, 8, &page(lsn));
        assert_eq!(checked.is_err(), is_alarm, "{}", Lsn(lsn));
        if let Err(error) = checked {
            assert_eq!(error.kind(), ErrorKind::Damaged);
            assert!(
                error.to_string().contains("ALARM: block 8 of relation 1663/5/16384"),
                "{error}"
            );
        }
    }
    let new = page(BEGAN + 1);
    for (path, block, is_alarm) in [
        (PATH, 7, false),
        (PATH, 6, true),
        // The map counts from the beginning of the relation.
        ("base/5/16385", 8, false),
        ("base/5/16385", 7, true),
        ("base/6/16384", 8, false),
        // Not tracked; and a file that nothing is inherited of.
        ("base/5/16384_vm", 8, false),
        ("base/5/16386", 8, false),
    ] {
        assert_eq!(check(path, block, &new).is_err(), is_alarm, "{path}, block {block}");
    }
    assert!(check(PATH, 8, &new[..7]).is_ok(), "no page");
}

proptest! {
    /// Block by block: what WAL names, what lies behind the parent's end or behind a cut, and what is in a bad pack.
    #[test]
    fn a_block_is_read_if_there_is_a_reason_to(
        named in proptest::collection::btree_set(0u32..400, 0..120),
        limit in proptest::option::of(0u32..400),
        before in 1u32..300,
        now in 1u32..300,
        bad in proptest::collection::btree_set(0u32..5, 0..2),
    ) {
        const FIRST: u32 = BLOCKS_PER_SEGMENT;
        let mut made = Made::default();
        made.whole(PATH, 100);
        let of_first = made.frames.len();
        made.whole(&file_of(1), before);
        for (pack, frame) in (0..).zip(&mut made.frames[of_first..]) {
            frame.pack = pack;
        }
        let mut map = BlockMap::default();
        for &block in &named {
            map.relation(ID).add(FIRST + block);
            // What is named of the first file says nothing of the second.
            map.relation(ID).add((block * 7 + 1) % 400);
        }
        if let Some(limit) = limit {
            map.relation(ID).limit_to(FIRST + limit);
        }
        let basis = made.basis_of_packs(map, |pack| !bad.contains(&pack));
        let expected: Vec<u32> = (0..now)
            .filter(|block| {
                named.contains(block)
                    || limit.is_some_and(|limit| *block >= limit)
                    || *block >= before
                    || bad.contains(&(block / CHUNK))
            })
            .collect();
        let size = u64::from(now) * BLOCK;
        let is_nearly_whole = expected.len() * 10 >= now as usize * 9;
        match basis.wanted(&file_of(1), size) {
            Wanted::All => prop_assert!(is_nearly_whole, "{} of {}", expected.len(), now),
            Wanted::Blocks(wanted) => {
                prop_assert!(!is_nearly_whole, "{} of {}", expected.len(), now);
                prop_assert_eq!(wanted.to_vec(), ranges(expected), "ascending, and none touches the next");
                // Each block is read or kept, and none both.
                let kept = basis.kept(&file_of(1), size, &wanted);
                let mut all: Vec<u32> = blocks_of(&kept).iter().map(|(block, ..)| *block).collect();
                all.extend(wanted.iter().cloned().flatten());
                all.sort_unstable();
                prop_assert_eq!(all, (0..now).collect::<Vec<u32>>());
            }
        }
    }

    /// Whatever is read: of the rest, each block is kept from where the parent has it, also of a part of the file.
    #[test]
    fn what_is_kept_is_what_is_not_read(
        parts in proptest::collection::vec((1u32..=64, 0u32..=20), 1..12),
        named in proptest::collection::btree_set(0u32..800, 0..200),
        now in 1u32..800,
        part in (0u32..800, 0u32..800),
    ) {
        let mut made = Made::default();
        made.whole("base/5/16383", 70);
        let parts: Vec<_> = parts.iter().map(|&(len, at)| (made.frame(0, at + len), at, len)).collect();
        made.file(PATH, &parts);
        made.whole("base/5/16385", 70);
        let basis = made.basis(BlockMap::default());
        let wanted = ranges(named);
        let kept = basis.kept(PATH, u64::from(now) * BLOCK, &wanted);
        prop_assert_eq!(blocks_of(&kept), expected(&basis, 1, now, &wanted));
        let (from, to) = (part.0.min(part.1), part.0.max(part.1));
        let within = basis.kept_within(PATH, u64::from(from) * BLOCK..u64::from(to) * BLOCK, &wanted);
        let mut expected = expected(&basis, 1, to, &wanted);
        expected.retain(|(block, ..)| *block >= from);
        prop_assert_eq!(blocks_of(&within), expected);
        prop_assert!(basis.kept("base/5/16386", u64::from(now) * BLOCK, &wanted).is_empty());
    }
}
