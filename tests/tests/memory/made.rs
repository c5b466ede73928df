//! A stanza of many chunks, made without the data that they would hold: index runs, usage lists and log entries are real
//! ones, and packs are files of the right size with nothing in them. One run is in memory at a time.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use fairvault_engine::commit::Log;
use fairvault_engine::commit::session::Session;
use fairvault_engine::env::{self, Env, SystemEnv};
use fairvault_engine::stanza::Stanza;
use fairvault_engine::stanza::create::create;
use fairvault_engine::store::url::RepositoryUrl;
use fairvault_format::header::{Kind, ObjectHeader};
use fairvault_format::index::{IndexEntry, IndexRun, PackRef, seal_run};
use fairvault_format::keys::KeyRole;
use fairvault_format::object::ObjectWriter;
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use fairvault_format::{names, sha256};
use fairvault_tests::dice::Dice;

use super::stores::{CLUSTER, access, key};

/// Backups that were taken.
const BACKUPS: u64 = 24;
/// Of these, the oldest, which have expired.
const EXPIRED: u64 = 16;
/// Packs that a backup announces at once.
const PACKS_PER_RUN: u64 = 8;
/// Index runs that an entry of the log announces.
const RUNS_PER_ENTRY: usize = 16;
/// Size of a pack, bytes.
const PACK_BYTES: u64 = 32 << 20;

/// How much there is.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Packs; each is stored by one backup, and used by some of those that follow on it.
    pub packs: u64,
    /// Chunks in each of them.
    pub chunks_per_pack: u64,
}

impl Shape {
    /// All chunks.
    pub fn chunks(&self) -> u64 {
        self.packs * self.chunks_per_pack
    }

    fn dice(pack: u64) -> Dice {
        Dice(pack.wrapping_mul(0x9E37))
    }

    /// The first backup that uses a pack, and the first that no longer does.
    fn life(&self, pack: u64) -> (u64, u64) {
        let born = pack * BACKUPS / self.packs;
        let mut dice = Self::dice(pack);
        let end = match dice.roll(10) {
            0..6 => BACKUPS,
            _ => BACKUPS.min(born + 1 + dice.roll(4)),
        };
        (born, end)
    }

    /// Whether a live backup uses it.
    pub fn is_used(&self, pack: u64) -> bool {
        self.life(pack).1 > EXPIRED
    }

    /// Whether so little of it is used that later backups do without it.
    pub fn is_thin(pack: u64) -> bool {
        pack % 50 == 7
    }

    /// The name of a pack.
    pub fn name(pack: u64) -> [u8; 32] {
        sha256(&pack.to_le_bytes())
    }

    fn reference(pack: u64) -> PackRef {
        let name = Self::name(pack);
        let header = ObjectHeader::new(Kind::Pack, 1, sha256(&name));
        PackRef { name, header }
    }

    /// An index run of consecutive packs.
    fn run(&self, packs: std::ops::Range<u64>) -> IndexRun {
        let mut run = IndexRun::default();
        for pack in packs {
            let mut dice = Dice(pack << 24);
            let stored_len = (PACK_BYTES / self.chunks_per_pack / 2) as u32;
            for ordinal in 0..self.chunks_per_pack as u32 {
                let mut id = [0; 32];
                id.chunks_exact_mut(8)
                    .for_each(|word| word.copy_from_slice(&dice.roll(u64::MAX).to_le_bytes()));
                run.entries.push(IndexEntry {
                    id,
                    pack: run.packs.len() as u32,
                    ordinal,
                    offset: 80 + ordinal * stored_len,
                    stored_len,
                });
            }
            run.packs.push(Self::reference(pack));
        }
        run
    }

    /// What a backup uses.
    fn usage(&self, backup: u64) -> proto::Usage {
        let mut usage = proto::Usage::default();
        for pack in 0..self.packs {
            let (born, end) = self.life(pack);
            if (born..end).contains(&backup) {
                usage.packs.extend(Self::name(pack));
                usage.live_bytes.push(match Self::is_thin(pack) {
                    true => PACK_BYTES / 20,
                    false => PACK_BYTES / 2,
                });
            }
        }
        usage
    }
}

/// Makes a repository in a new folder, with the stanza `acme`.
pub async fn make(folder: &Path, shape: Shape) -> Result<()> {
    let mut log = open(folder, true).await?;
    let making = Making {
        folder: folder.join("acme"),
        stanza: log.stanza().clone(),
    };
    for first in 0..256 {
        fs::create_dir_all(making.folder.join(format!("packs/{first:02x}")))?;
    }
    fs::create_dir_all(making.folder.join("index"))?;
    let mut next = 0;
    for backup in 0..BACKUPS {
        let from = next;
        while next < shape.packs && shape.life(next).0 == backup {
            next += 1;
        }
        making.backup(&mut log, shape, backup, from..next).await?;
    }
    for backup in 0..EXPIRED {
        let entry = proto::Expired {
            backup: id(backup),
            ..Default::default()
        };
        log.append(Entry::Expired(entry), |_| Ok(())).await?;
    }
    Ok(())
}

struct Making {
    folder: PathBuf,
    stanza: Arc<Stanza>,
}

impl Making {
    async fn backup(&self, log: &mut Log, shape: Shape, number: u64, packs: std::ops::Range<u64>) -> Result<()> {
        let mut session = Session::begin(log, "backup", |_| id(number)).await?;
        let mut from = packs.start;
        while from < packs.end {
            let to = packs.end.min(from + PACKS_PER_RUN);
            for pack in from..to {
                File::create(self.folder.join(names::pack(&Shape::name(pack))))?.set_len(PACK_BYTES)?;
            }
            let salt = env::salt(&SystemEnv)?;
            let sealed = seal_run(self.stanza.keys(), self.stanza.scope(), salt, shape.run(from..to))?;
            let hash = sha256(&sealed);
            // Not through the store, which waits for the disk each time.
            fs::write(self.folder.join(names::index_run(&hash)), sealed)?;
            session.announced.push(hash);
            from = to;
        }
        for some in session.announced.chunks(RUNS_PER_ENTRY) {
            let entry = proto::Announce {
                session: session.id().to_vec(),
                index_runs: some.iter().map(|run| run.to_vec()).collect(),
            };
            log.append(Entry::Announce(entry), |_| Ok(())).await?;
        }
        let info = proto::BackupInfo {
            id: id(number),
            r#type: "full".to_owned(),
            system_identifier: CLUSTER.system_identifier,
            start_timeline: 1,
            stop_timeline: 1,
            stopped_us: SystemEnv.now_us() - (BACKUPS - number) as i64 * 86_400_000_000,
            ..Default::default()
        };
        let salt = env::salt(&SystemEnv)?;
        let mut root = ObjectWriter::new(self.stanza.keys(), self.stanza.scope(), Kind::Root, salt, "");
        root.message(KeyRole::Meta, &shape.usage(number))?;
        let facts = proto::Root {
            info: Some(info.clone()),
            ..Default::default()
        };
        root.message(KeyRole::Data, &facts)?;
        let root = root.finish();
        let hash = sha256(&root);
        self.stanza.store().put_hashed(&names::root(&hash), root.into()).await?;
        session.commit(log, hash, info).await?;
        Ok(())
    }
}

fn id(backup: u64) -> String {
    format!("202601{:02}-000000F", backup + 1)
}

/// The log of the stanza in a folder.
pub async fn open(folder: &Path, is_new: bool) -> Result<Log> {
    let url = RepositoryUrl {
        url: format!("file://{}", folder.display()),
        ..Default::default()
    };
    let access = access(&url.open(is_new)?, key(1));
    Ok(match is_new {
        true => create(&access, CLUSTER, "main").await?,
        false => Log::open(Stanza::open(&access).await?).await?,
    })
}
