//! Whoever sees every change of a store at the moment when it is made.
//!
//! What must hold after every single one: the log grows by one entry after the other, each of which follows on the one
//! before and is not void; no entry, no key slot, no WAL, and nothing that a live backup is made of is overwritten; a
//! backup that is committed restores byte for byte at that moment, out of packs that say of themselves what is in them;
//! nothing of it goes for as long as it lives, nor slots of a key epoch that the log names, nor WAL that it needs or that
//! the server was told is durable, which is there when that is said; and the index names no pack that is gone, but while
//! its sweep is under way. What was whole, and of which nothing changes, stays whole: so each backup restores after every
//! step, and the index can be made from its packs.

use std::collections::{BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fairvault_engine::commit::Log;
use fairvault_engine::dedup::read_run;
use fairvault_engine::env::{Env, SystemEnv};
use fairvault_engine::manifest::Manifest;
use fairvault_engine::postgres::segment::WalFile;
use fairvault_engine::stanza::{Access, Stanza};
use fairvault_engine::wal::archive::Archive;
use fairvault_format::proto::log_entry::Kind as Entry;
use fairvault_format::proto::{BackupInfo, CommittedBackup};
use fairvault_format::{limits, names, pack, sha256};
use fairvault_tests::dice::Dice;

use super::actors::{access, read_all};
use super::checks::has_bytes;
use super::server::{SEGMENT, Server};
use super::store::World;

/// The witness of one repository.
#[derive(Debug)]
pub struct Witness {
    is_second: bool,
    server: Arc<Server>,
    log: Log,
    /// What live backups are made of, and which of them.
    needed: HashMap<String, BTreeSet<String>>,
    /// Every backup that has counted so far.
    counted: BTreeSet<String>,
    /// What parts of the index name, as they were when the log named them.
    named: HashMap<Vec<u8>, Vec<[u8; 32]>>,
}

fn id_of(backup: &CommittedBackup) -> String {
    backup.info.as_ref().map(|info| info.id.clone()).unwrap_or_default()
}

/// Numbers of the segments that a backup itself needs.
fn segments_of(info: &BackupInfo) -> RangeInclusive<u64> {
    info.start_lsn / SEGMENT..=info.stop_lsn / SEGMENT
}

impl Witness {
    /// One that has read what is there.
    pub async fn new(world: &Arc<World>, repo: usize, server: &Arc<Server>) -> Result<Self> {
        // Not the world's clock and dice: what is looked at changes nothing, and whoever belongs to the world must not
        // hold it.
        let access = Access {
            env: Arc::new(SystemEnv),
            ..access(world.itself(repo), world)
        };
        Ok(Self {
            is_second: repo == 1,
            server: server.clone(),
            log: Log::replay(Stanza::open(&access).await?).await?,
            needed: HashMap::new(),
            counted: BTreeSet::new(),
            named: HashMap::new(),
        })
    }

    /// Whether a backup is, or was, in the log and counted.
    pub fn has_counted(&self, backup: &str) -> bool {
        self.counted.contains(backup)
    }

    /// An object of the stanza has changed from one content to another; `None` is none. Nothing is waited for.
    pub async fn saw(&mut self, name: &str, before: Option<Bytes>, now: Option<Bytes>) -> Result<()> {
        let is_below = |folder: &str| name.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'));
        let (is_entry, is_wal) = (is_below(names::LOG), is_below(names::WAL));
        let mut epochs = self.log.state().key_epochs.iter();
        let is_key = epochs.any(|epoch| name.starts_with(&names::slot(epoch.epoch, "")));
        let needed = self.needed.get(name);
        match (before, now) {
            (None, Some(_)) if is_entry => return self.appended(name).await,
            (Some(before), Some(now)) => ensure!(
                before == now || !(is_entry || is_key || is_wal || needed.is_some()),
                "{name} was overwritten with other content"
            ),
            (Some(_), None) if is_wal => return self.wal_stays(name).await,
            (Some(_), None) => {
                ensure!(!(is_entry || is_key), "{name} was deleted");
                ensure!(needed.is_none(), "{name} was deleted, and {needed:?} need it");
                if is_below(names::PACKS)
                    && let Some(pack) = names::parse_hash(name)
                {
                    for (run, _) in self.named.iter().filter(|(_, packs)| packs.contains(&pack)) {
                        self.may_name(run, &pack).await?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    async fn appended(&mut self, name: &str) -> Result<()> {
        let seq = self.log.state().seq + 1;
        self.log
            .refresh()
            .await
            .with_context(|| format!("{name} was written"))?;
        let last = self.log.state().seq;
        ensure!(
            last == seq && name == names::log_context(seq),
            "{name} was written, and the log now ends with entry {last} instead of {seq}"
        );
        ensure!(
            !self.log.is_void(seq),
            "{name} was written by who had not read what was before"
        );
        let backups = self.log.state().backups.clone();
        for backup in backups.iter().filter(|backup| backup.seq == seq) {
            let committed = self.committed(backup).await;
            committed.with_context(|| format!("backup {}, which entry {seq} has committed", id_of(backup)))?;
        }
        let live: BTreeSet<String> = backups.iter().map(id_of).collect();
        self.needed.retain(|_, of| {
            of.retain(|backup| live.contains(backup));
            !of.is_empty()
        });
        self.index_names_what_is_there().await
    }

    /// Looks at what is new in the index, and at all of it where a mark has ended.
    async fn index_names_what_is_there(&mut self) -> Result<()> {
        let last = self.log.entries().last().and_then(|entry| entry.kind.as_ref());
        let has_swept = matches!(last, Some(Entry::GcSwept(_)));
        let (stanza, runs) = (self.log.stanza().clone(), self.log.state().index_runs.clone());
        self.named.retain(|run, _| runs.contains(run));
        for run in &runs {
            let is_new = !self.named.contains_key(run);
            if is_new {
                let read = read_run(&stanza, run).await.unwrap_or_default();
                let packs = read.packs.iter().map(|pack| pack.name).collect();
                self.named.insert(run.clone(), packs);
            }
            for pack in self.named[run].iter().filter(|_| is_new || has_swept) {
                self.may_name(run, pack).await?;
            }
        }
        Ok(())
    }

    /// A part of the index may name a pack that is there, or marked; what nobody can read may name anything.
    async fn may_name(&self, run: &[u8], pack: &[u8; 32]) -> Result<()> {
        let (stanza, name) = (self.log.stanza(), names::pack(pack));
        let mut marks = self.log.state().open_marks.iter();
        let is_marked = marks.any(|mark| mark.packs.iter().any(|marked| marked == pack));
        let is_fine = is_marked || stanza.store().len(&name).await?.is_some() || read_run(stanza, run).await.is_err();
        ensure!(is_fine, "the index names {name}, which is gone");
        Ok(())
    }

    async fn committed(&mut self, backup: &CommittedBackup) -> Result<()> {
        let (id, stanza) = (id_of(backup), self.log.stanza().clone());
        read_all(&stanza, backup).await?;
        let manifest = Manifest::read(&stanza, &backup.root).await?;
        for (number, of) in manifest.packs.iter().enumerate() {
            let name = names::pack(&of.name);
            let bytes = stanza.store().get(&name, limits::PACK_BYTES).await?;
            ensure!(sha256(&bytes) == of.name, "{name} has other content than its name says");
            let (_, frames) = pack::open_pack(stanza.keys_for(&bytes, &name)?, stanza.scope(), &bytes, &name)?;
            for frame in manifest.frames.iter().filter(|frame| frame.pack as usize == number) {
                let said = frames.get(frame.ordinal as usize);
                let is_right = said.is_some_and(|said| (said.id, said.stored_len) == (frame.id, frame.stored_len));
                ensure!(is_right, "{name} does not say that it has {frame:?}");
            }
            self.needed.entry(name).or_default().insert(id.clone());
        }
        let root = <[u8; 32]>::try_from(backup.root.as_slice())?;
        self.needed.entry(names::root(&root)).or_default().insert(id.clone());
        let archive = Archive::open(&self.log, None, 0)?;
        for number in segments_of(&backup.info.clone().unwrap_or_default()) {
            has_bytes(&archive, number, self.must_have(number)).await?;
        }
        self.counted.insert(id);
        Ok(())
    }

    /// WAL was deleted: what must be there of its segment still is.
    async fn wal_stays(&self, name: &str) -> Result<()> {
        let Some(WalFile::Segment(segment)) = names::parse_wal(name)
            .map(|parsed| WalFile::parse(parsed.file, SEGMENT))
            .transpose()?
        else {
            return Ok(());
        };
        let len = self.must_have(segment.number);
        if len == 0 {
            return Ok(());
        }
        let archive = Archive::open(&self.log, None, 0)?;
        let stays = has_bytes(&archive, segment.number, len).await;
        stays.with_context(|| format!("{name} was deleted"))
    }

    /// The server was told that WAL of these segments is durable. Nothing is waited for.
    pub async fn told(&self, segments: RangeInclusive<u64>) -> Result<()> {
        let archive = Archive::open(&self.log, None, 0)?;
        for number in segments {
            let len = self.must_have(number);
            if len > 0 {
                let there = has_bytes(&archive, number, len).await;
                there.context("the server was told that it is durable")?;
            }
        }
        Ok(())
    }

    /// How much of a segment must be there by now, bytes.
    fn must_have(&self, number: u64) -> u64 {
        let state = self.log.state();
        let infos = state.backups.iter().filter_map(|backup| backup.info.as_ref());
        let users = infos.filter(|info| segments_of(info).contains(&number));
        let up_to = |lsn: u64| lsn.saturating_sub(number * SEGMENT).min(SEGMENT);
        if self.is_second {
            return users.map(|info| up_to(info.stop_lsn)).max().unwrap_or(0);
        }
        // From the newest backup on, whatever the server was told is durable; without one, all of it until some expires.
        let newest = state.backups.last().and_then(|backup| backup.info.as_ref());
        let oldest = match newest {
            Some(info) => info.start_lsn / SEGMENT,
            None if state.expired_wal.is_empty() => 1,
            None => u64::MAX,
        };
        if users.count() > 0 || (oldest..self.server.archived()).contains(&number) {
            return SEGMENT;
        }
        let received = self.server.received();
        let received = received
            .iter()
            .filter(|wal| number >= oldest && wal.start / SEGMENT <= number);
        received.map(|wal| up_to(wal.end)).max().unwrap_or(0)
    }
}

/// Time of the world and dice of its own, for whoever looks at a copy of a store: that changes nothing in the world.
#[derive(Debug)]
pub struct Aside {
    world: Arc<World>,
    dice: Mutex<u64>,
}

impl Aside {
    /// One whose dice begin anew.
    pub fn new(world: &Arc<World>) -> Arc<Self> {
        Arc::new(Self {
            world: world.clone(),
            dice: Mutex::new(0),
        })
    }
}

impl Env for Aside {
    fn now_us(&self) -> i64 {
        self.world.now_us()
    }

    fn random(&self, buffer: &mut [u8]) -> fairvault_engine::error::Result<()> {
        let mut state = self.dice.lock().unwrap();
        let mut dice = Dice(*state);
        buffer.iter_mut().for_each(|byte| *byte = dice.roll(256) as u8);
        *state = dice.0;
        Ok(())
    }
}
