//! A relation that is worked on for many backups: what each of them reads, keeps and holds, beside a model.

use super::*;

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    /// One below `end`.
    fn below(&mut self, end: u32) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(end)) as u32
    }
}

/// A relation whose pages hold numbers that nothing else ever held, and the chunks that backups of it have stored.
#[derive(Default)]
struct Model {
    pages: Vec<u64>,
    newest: u64,
    /// Pack and pages of each.
    chunks: Vec<(u32, Vec<u64>)>,
}

impl Model {
    fn of(blocks: u32) -> Self {
        let mut model = Self::default();
        model.grow(blocks);
        model
    }

    /// Without a word in the WAL.
    fn grow(&mut self, blocks: u32) {
        for _ in 0..blocks {
            self.newest += 1;
            self.pages.push(self.newest);
        }
    }

    fn change(&mut self, map: &mut BlockMap, block: u32) {
        self.newest += 1;
        self.pages[block as usize] = self.newest;
        map.relation(ID).add(block);
    }

    fn cut(&mut self, map: &mut BlockMap, end: u32) {
        self.pages.truncate(end as usize);
        map.relation(ID).limit_to(end);
    }

    /// What somebody does to it between two backups; returns what the WAL says.
    fn work(&mut self, dice: &mut Dice) -> BlockMap {
        let mut map = BlockMap::default();
        for _ in 0..3 {
            let blocks = self.pages.len() as u32;
            match dice.below(40) {
                0 => {
                    let end = 1 + dice.below(blocks).max(dice.below(blocks));
                    self.cut(&mut map, end);
                }
                1..=6 => self.grow(1 + dice.below(200)),
                7..=15 => {}
                _ => {
                    for _ in 0..dice.below(2 + blocks / 8) {
                        let block = dice.below(blocks);
                        self.change(&mut map, block);
                    }
                }
            }
        }
        map
    }

    /// Takes a backup, with its own chunks in a pack of their own. Returns its manifest, in which every page of every
    /// file is as it is now.
    fn backup(&mut self, basis: Option<&Basis>, pack: u32) -> Made {
        let (mut made, mut numbers) = (Made::default(), HashMap::new());
        for (segment, pages) in self.pages.chunks(BLOCKS_PER_SEGMENT as usize).enumerate() {
            let (path, size) = (file_of(segment as u32), pages.len() as u64 * BLOCK);
            let wanted = basis.map_or(Wanted::All, |basis| basis.wanted(&path, size));
            // Offset in the file, chunk, offset in it, length.
            let mut parts = Vec::new();
            for runs in wanted.chunks(size) {
                let (chunk, mut content) = (self.chunks.len() as u32, Vec::new());
                for run in runs {
                    parts.push((run.offset, chunk, content.len() as u32 * BLOCK_BYTES, run.len));
                    let first = (run.offset / BLOCK) as usize;
                    content.extend_from_slice(&pages[first..first + (run.len / BLOCK_BYTES) as usize]);
                }
                self.chunks.push((pack, content));
            }
            if let (Some(basis), Wanted::Blocks(ranges)) = (basis, &wanted) {
                for kept in basis.kept(&path, size, ranges) {
                    let chunk = basis.manifest.frames[kept.frame as usize].ordinal;
                    parts.push((kept.file_offset, chunk, kept.frame_offset, kept.len));
                }
            }
            parts.sort_unstable();
            let (file, mut covered) = (made.files.len() as u32, 0);
            for (file_offset, chunk, frame_offset, len) in parts {
                assert_eq!(file_offset, covered, "{path}: a gap, or bytes that are there twice");
                covered += u64::from(len);
                let (of_pack, content) = &self.chunks[chunk as usize];
                let (at, inside) = ((file_offset / BLOCK) as usize, (frame_offset / BLOCK_BYTES) as usize);
                let count = (len / BLOCK_BYTES) as usize;
                assert_eq!(
                    content[inside..inside + count],
                    pages[at..at + count],
                    "{path} from block {at} on"
                );
                let frame = *numbers.entry(chunk).or_insert_with(|| {
                    let number = made.frame(*of_pack, content.len() as u32);
                    made.frames[number as usize].ordinal = chunk;
                    number
                });
                made.placements.push(Placement {
                    file,
                    file_offset,
                    len,
                    frame,
                    frame_offset,
                });
            }
            assert_eq!(covered, size, "{path}");
            made.files.push(proto::FileEntry {
                path,
                size,
                ..Default::default()
            });
        }
        made
    }

    /// Blocks that a backup has read.
    fn read(&self, pack: u32) -> usize {
        let own = self.chunks.iter().filter(|(of_pack, _)| *of_pack == pack);
        own.map(|(_, content)| content.len()).sum()
    }
}

/// Blocks of the relation that lie in chunks of which less than a quarter is used, by chunk.
fn thin(made: &Made) -> HashMap<u32, Vec<u32>> {
    let mut used: HashMap<u32, Vec<u32>> = HashMap::new();
    for placement in &made.placements {
        let first = placement.file * BLOCKS_PER_SEGMENT + (placement.file_offset / BLOCK) as u32;
        let blocks = first..first + placement.len / BLOCK_BYTES;
        used.entry(placement.frame).or_default().extend(blocks);
    }
    let by_chunk = used.into_iter().filter_map(|(number, blocks)| {
        let frame = &made.frames[number as usize];
        let is_thin = blocks.len() * 4 < (frame.plain_len / BLOCK_BYTES) as usize;
        is_thin.then_some((frame.ordinal, blocks))
    });
    by_chunk.collect()
}

#[test]
fn whatever_happens_to_a_relation_each_backup_has_all_of_it() {
    let (mut kept, mut rewritten, mut lost) = (0, 0, 0);
    for seed in 0..12 {
        let (mut dice, mut model) = (Dice(seed), Model::of(700));
        let mut bad = HashSet::new();
        let mut made = model.backup(None, 0);
        for round in 1..80 {
            let map = model.work(&mut dice);
            if dice.below(10) == 0 {
                lost += usize::from(bad.insert(dice.below(round)));
            }
            let thin = thin(&made);
            let basis = made.basis_of_packs(map, |pack| !bad.contains(&pack));
            made = model.backup(Some(&basis), round);
            for frame in &made.frames {
                assert!(!bad.contains(&frame.pack), "seed {seed}, round {round}: {frame:?}");
                assert!(
                    !thin.contains_key(&frame.ordinal),
                    "seed {seed}, round {round}: {frame:?}"
                );
            }
            kept += made.frames.iter().filter(|frame| frame.pack != round).count();
            rewritten += thin.len();
        }
    }
    // All of it did happen.
    assert!(kept > 1000 && rewritten > 100 && lost > 50, "{kept} {rewritten} {lost}");
}

#[test]
fn around_the_end_of_a_file_each_backup_has_all_of_a_relation() {
    type Work = fn(&mut Model, &mut BlockMap);
    // With how many blocks each backup reads.
    let steps: [(Work, usize); 6] = [
        (
            |model, map| {
                for block in [0, 131_071, 131_072, 131_073] {
                    model.change(map, block);
                }
            },
            4,
        ),
        (|model, map| model.cut(map, 131_172), 0),
        (
            |model, map| {
                model.change(map, 131_100);
                model.grow(200);
            },
            201,
        ),
        (|model, map| model.cut(map, 131_072), 0),
        (|model, _| model.grow(500), 500),
        (
            |model, map| {
                model.cut(map, 131_000);
                model.grow(82);
            },
            82,
        ),
    ];
    let mut model = Model::of(131_072 + 300);
    let mut made = model.backup(None, 0);
    for (round, (work, expected)) in (1..).zip(steps) {
        let mut map = BlockMap::default();
        work(&mut model, &mut map);
        let basis = made.basis(map);
        made = model.backup(Some(&basis), round);
        assert_eq!(model.read(round), expected, "round {round}");
    }
}

/// A chunk that is hardly used is held by one more backup at most. So what is held stays within five times the
/// relation, however long this goes on; where pages change by chance, it is about twice the relation.
#[test]
fn after_many_backups_nothing_is_held_for_little() {
    const BLOCKS: u32 = 8192;
    let (mut dice, mut model) = (Dice(1), Model::of(BLOCKS));
    let mut made = model.backup(None, 0);
    let mut rewritten = 0;
    for round in 1..=120 {
        let (mut map, thin) = (BlockMap::default(), thin(&made));
        let mut expected: HashSet<u32> = thin.values().flatten().copied().collect();
        rewritten += expected.len();
        for _ in 0..BLOCKS / 20 {
            let block = dice.below(BLOCKS);
            model.change(&mut map, block);
            expected.insert(block);
        }
        let basis = made.basis(map);
        made = model.backup(Some(&basis), round);
        // Exactly what changed, and what lay in thin frames of the parent.
        assert_eq!(model.read(round), expected.len(), "round {round}");
        assert!(made.frames.iter().all(|frame| !thin.contains_key(&frame.ordinal)));
        let held: u64 = made.frames.iter().map(|frame| u64::from(frame.plain_len)).sum();
        assert!(held <= 3 * u64::from(BLOCKS) * BLOCK, "round {round}: {held}");
    }
    assert!(rewritten > BLOCKS as usize / 2, "{rewritten}");
}

/// Seven pages of eight change: of every frame an eighth stays in use, 128 MiB in all. That is twice what one backup
/// reads again.
#[test]
fn what_one_backup_leaves_of_thin_frames_the_next_one_reads_again() {
    let mut model = Model::of(BLOCKS_PER_SEGMENT);
    let mut made = model.backup(None, 0);
    let mut map = BlockMap::default();
    for block in (0..BLOCKS_PER_SEGMENT).filter(|block| block % 8 != 0) {
        model.change(&mut map, block);
    }
    for (round, expected) in [(1, 114_688), (2, 8192), (3, 8192), (4, 0)] {
        let basis = made.basis(std::mem::take(&mut map));
        made = model.backup(Some(&basis), round);
        assert_eq!(model.read(round), expected, "round {round}");
    }
    assert!(
        made.frames.iter().all(|frame| frame.pack != 0),
        "the first one is not needed any more"
    );
}
