//! What an incremental backup stores of the manifest of a hundred thousand relations, three files each: nothing where
//! nothing changed, and otherwise the parts of it that say what did. In memory, by way of the store and back.

use std::sync::Arc;

use fairvault_format::header::ObjectHeader;
use fairvault_format::keys::Secret;
use fairvault_format::{names, sha256};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::*;
use crate::dedup::{Index, SessionChunks, store_run};
use crate::env::SystemEnv;
use crate::manifest::{FrameRef, Manifest};
use crate::pack::{Packer, index_run};
use crate::postgres::BLOCK_BYTES;
use crate::postgres::lsn::Lsn;
use crate::stanza::{Access, create};
use crate::store::url::RepositoryUrl;
use crate::track::map::{BlockMap, RelationId};
use crate::track::selection::Selection;

const BLOCK: u64 = BLOCK_BYTES as u64;
const FIRST: u32 = 16384;
const RELATIONS: u32 = 100_000;
/// Blocks of a relation's files.
const FORKS: [(&str, u32); 3] = [("", 10), ("_fsm", 3), ("_vm", 1)];
/// So much may be stored of a manifest in which a handful of files changed; all of it is some 14 MiB.
const MOST: u64 = 256 << 10;
/// The root says where every piece of the manifest lies, changed or not.
const MOST_IN_ROOT: u64 = 512 << 10;

/// A file. Contents are numbers.
struct File {
    path: String,
    blocks: u32,
    content: u64,
    /// A block that changed since it was read as a whole.
    changed: Option<(u32, u64)>,
}

impl File {
    fn content_of(&self, block: u32) -> u64 {
        match self.changed {
            Some((changed, content)) if changed == block => content,
            _ => self.content,
        }
    }
}

fn path(relation: u32, fork: &str) -> String {
    format!("base/5/{}{fork}", FIRST + relation)
}

fn id(relation: u32) -> RelationId {
    RelationId {
        tablespace: 1663,
        database: 5,
        relation: FIRST + relation,
    }
}

/// Where some content lies: somebody has stored it.
fn place(content: u64, plain_len: u32) -> (PackRef, FrameRef) {
    const STORED: u32 = 3000;
    const IN_PACK: u64 = 10_000;
    let (name, ordinal) = (sha256(&(content / IN_PACK).to_le_bytes()), (content % IN_PACK) as u32);
    let pack = PackRef {
        name,
        header: ObjectHeader::new(ObjectKind::Pack, 1, name),
    };
    let frame = FrameRef {
        id: sha256(&content.to_be_bytes()),
        pack: 0,
        ordinal,
        offset: 80 + ordinal * STORED,
        stored_len: STORED,
        plain_len,
    };
    (pack, frame)
}

/// Objects and bytes in the folders that backups write to.
#[derive(Debug)]
struct Stored {
    packs: (usize, u64),
    runs: usize,
    roots: (usize, u64),
}

/// A cluster, and the repository that its backups go to.
struct Cluster {
    stanza: Arc<Stanza>,
    runtime: Runtime,
    /// In the order of their paths.
    files: Vec<File>,
    newest: u64,
    /// Index runs.
    runs: Vec<Vec<u8>>,
}

impl Cluster {
    fn new() -> Self {
        let url = RepositoryUrl {
            url: "memory://".to_owned(),
            ..Default::default()
        };
        let access = Access {
            repository: url.open(true).unwrap(),
            stanza: "acme".to_owned(),
            secret: Some(Secret::Key([7; 32])),
            memory: None,
            may_stretch: true,
            env: Arc::new(SystemEnv),
            trace: Default::default(),
        };
        let cluster = create::Cluster {
            system_identifier: 7,
            major: 15,
            wal_segment_size: 16 << 20,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.unwrap();
        let log = runtime.block_on(create::create(&access, cluster, "main")).unwrap();
        let mut this = Self {
            stanza: log.stanza().clone(),
            runtime,
            files: Vec::new(),
            newest: 0,
            runs: Vec::new(),
        };
        (0..RELATIONS).for_each(|relation| this.add(relation));
        this.files.sort_by(|a, b| a.path.cmp(&b.path));
        this
    }

    fn content(&mut self) -> u64 {
        self.newest += 1;
        self.newest
    }

    fn add(&mut self, relation: u32) {
        for (fork, blocks) in FORKS {
            let content = self.content();
            self.files.push(File {
                path: path(relation, fork),
                blocks,
                content,
                changed: None,
            });
        }
    }

    fn file(&mut self, path: &str) -> &mut File {
        let at = self
            .files
            .binary_search_by(|file| file.path.as_str().cmp(path))
            .unwrap();
        &mut self.files[at]
    }

    /// A block of each of a few relations changes, and its visibility map; one relation is dropped, and another made.
    fn work(&mut self) -> BlockMap {
        let mut map = BlockMap::default();
        for relation in (7..RELATIONS).step_by(20_000) {
            let (page, of_map) = (self.content(), self.content());
            self.file(&path(relation, "")).changed = Some((3, page));
            self.file(&path(relation, "_vm")).content = of_map;
            map.relation(id(relation)).add(3);
        }
        let dropped = FORKS.map(|(fork, _)| path(50_000, fork));
        self.files.retain(|file| !dropped.contains(&file.path));
        map.relation(id(50_000)).limit_to(0);
        self.add(RELATIONS);
        map.relation(id(RELATIONS)).limit_to(0);
        self.files.sort_by(|a, b| a.path.cmp(&b.path));
        map
    }

    /// Takes a backup whose content is in the repository already, and reads its manifest back.
    fn backup(&mut self, basis: Option<Arc<Basis>>) -> Manifest {
        let state = proto::Snapshot {
            index_runs: self.runs.clone(),
            ..Default::default()
        };
        let index = self.runtime.block_on(Index::load(&self.stanza, &state)).unwrap();
        let chunks = Arc::new(SessionChunks::new(index));
        let (finished_in, mut finished) = mpsc::channel(8);
        let shared = Shared {
            stanza: self.stanza.clone(),
            chunks: chunks.clone(),
            packer: Packer::new(self.stanza.clone(), chunks.clone(), finished_in),
            level: 1,
            pages: true,
            checksums: false,
            basis: basis.clone(),
            audit: None,
            progress: Arc::default(),
        };
        let selection = Selection { basis, audit: None };
        let (mut entries, mut done) = (Vec::new(), Vec::new());
        for (number, file) in (0..).zip(&self.files) {
            let size = u64::from(file.blocks) * BLOCK;
            let wanted = selection.of(&file.path, size);
            for runs in wanted.chunks(size) {
                let content = file.content_of((runs[0].offset / BLOCK) as u32);
                let (pack, frame) = place(content, runs.iter().map(|run| run.len).sum());
                let handle = chunks.adopt(&pack, &frame);
                let mut in_chunk = 0;
                for run in runs {
                    done.push(Done {
                        file: number,
                        handle,
                        run,
                        in_chunk,
                        crc32c: content as u32,
                    });
                    in_chunk += run.len;
                }
            }
            let newest = file.changed.map_or(file.content, |(_, content)| content);
            entries.push(Entry {
                path: file.path.clone(),
                kind: proto::FileKind::FileRegular,
                size,
                mode: 0o600,
                mtime_us: 1_800_000_000_000_000 + newest as i64,
                link_target: String::new(),
                is_gone: false,
                wanted,
            });
        }
        let extents = extents(&shared, &entries, done).unwrap();
        let (known, packs) = chunks.finish().unwrap();
        let segments = store_segments(&shared, None, &entries, &extents, &known, &packs).unwrap();
        shared.packer.close().unwrap();
        let (known, packs) = chunks.finish().unwrap();
        let mut uploaded = Vec::new();
        while let Ok(pack) = finished.try_recv() {
            uploaded.push(self.runtime.block_on(pack.upload(&self.stanza)).unwrap());
        }
        if !uploaded.is_empty() {
            let run = store_run(&self.stanza, index_run(&uploaded));
            self.runs.push(self.runtime.block_on(run).unwrap().to_vec());
        }
        let (usage, root) = root_of(facts(), &segments, &known, &packs, Vec::new()).unwrap();
        let root = seal_root(&self.stanza, &usage, &root).unwrap();
        let hash = sha256(&root);
        let name = names::root(&hash);
        let put = self.stanza.store().put_hashed(&name, root.into());
        self.runtime.block_on(put).unwrap();
        self.runtime.block_on(Manifest::read(&self.stanza, &hash)).unwrap()
    }

    /// Every block of every file is where the manifest says, as it is now.
    fn check(&self, manifest: &Manifest) {
        assert_eq!(manifest.files.len(), self.files.len());
        let mut covered = 0;
        for p in &manifest.placements {
            let file = &self.files[p.file as usize];
            assert_eq!(manifest.files[p.file as usize].path, file.path);
            let first = (p.file_offset / BLOCK) as u32;
            let content = file.content_of(first);
            let same = (first..first + p.len / BLOCK_BYTES).all(|block| file.content_of(block) == content);
            let frame = &manifest.frames[p.frame as usize];
            assert!(
                same && frame.id == sha256(&content.to_be_bytes()),
                "{}: {p:?}",
                file.path
            );
            covered += u64::from(p.len);
        }
        let all: u64 = self.files.iter().map(|file| u64::from(file.blocks) * BLOCK).sum();
        assert_eq!(covered, all);
    }

    fn stored(&self) -> Stored {
        let folder = |name: &str| {
            let listed = self.runtime.block_on(self.stanza.store().list(name)).unwrap();
            (listed.len(), listed.iter().map(|(_, len)| *len).sum::<u64>())
        };
        Stored {
            packs: folder(names::PACKS),
            runs: folder(names::INDEX).0,
            roots: folder(names::ROOTS),
        }
    }
}

fn facts() -> proto::BackupInfo {
    proto::BackupInfo {
        start_lsn: 1000,
        ..Default::default()
    }
}

fn built_on(manifest: Manifest, map: BlockMap) -> Option<Arc<Basis>> {
    Some(Arc::new(Basis::new(facts(), manifest, map, Lsn(2000), |_| true)))
}

#[test]
fn of_many_relations_a_manifest_stores_what_changed() {
    let mut cluster = Cluster::new();
    let manifest = cluster.backup(None);
    cluster.check(&manifest);
    let full = cluster.stored();
    assert!(
        full.packs.1 > 20 * MOST,
        "{full:?}: nothing is saved by storing all of it"
    );

    // The root, and nothing else.
    let manifest = cluster.backup(built_on(manifest, BlockMap::default()));
    cluster.check(&manifest);
    let same = cluster.stored();
    assert_eq!((same.packs, same.runs, same.roots.0), (full.packs, full.runs, 2));

    let map = cluster.work();
    let manifest = cluster.backup(built_on(manifest, map));
    cluster.check(&manifest);
    let changed = cluster.stored();
    assert_eq!(
        (changed.packs.0, changed.runs, changed.roots.0),
        (same.packs.0 + 1, same.runs + 1, 3)
    );
    let (content, root) = (changed.packs.1 - same.packs.1, changed.roots.1 - same.roots.1);
    assert!(
        content < MOST && root < MOST_IN_ROOT,
        "{content} bytes, and {root} in the root"
    );
}
