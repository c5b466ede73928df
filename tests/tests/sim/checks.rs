//! What must hold: at every moment, and at the end.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use fairvault_engine::commit::Log;
use fairvault_engine::dedup::{Index, distrusted, read_run};
use fairvault_engine::error::Kind;
use fairvault_engine::postgres::segment::Segment;
use fairvault_engine::progress::Progress;
use fairvault_engine::repair;
use fairvault_engine::restore::plan::Manifest;
use fairvault_engine::stanza::Stanza;
use fairvault_engine::verify::Level;
use fairvault_engine::wal::archive::Archive;
use fairvault_format::proto::log_entry::Kind as Entry;
use fairvault_format::{limits, names, pack, sha256};

use super::actors::{self, access};
use super::server::{SEGMENT, Server, segments, wal};
use super::store::World;

/// What writers were told, and what there was to do.
#[derive(Debug, Default)]
pub struct Notes {
    /// Backups that are committed, by repository.
    pub committed: [Mutex<BTreeSet<String>>; 2],
    /// How often something happened.
    pub counts: Mutex<BTreeMap<&'static str, u64>>,
}

impl Notes {
    /// A backup is committed, as its writer was told.
    pub fn commit(&self, repo: usize, id: String) {
        self.committed[repo].lock().unwrap().insert(id);
    }

    /// Something happened so many times.
    pub fn count(&self, what: &'static str, times: u64) {
        *self.counts.lock().unwrap().entry(what).or_default() += times;
    }
}

/// What must hold at every moment. Returns the logs.
pub async fn check(world: &Arc<World>, notes: &Notes, server: &Server) -> Result<[Log; 2]> {
    // Before the repository is looked at: what is told later need not be there.
    let (archived, received) = (server.archived(), server.received());
    let first = repository(world, notes, 0).await?;
    has_its_wal(&first, archived, &received).await?;
    let second = repository(world, notes, 1).await.context("in the second repository")?;
    copies_have_their_wal(&second).await?;
    Ok([first, second])
}

async fn repository(world: &Arc<World>, notes: &Notes, repo: usize) -> Result<Log> {
    let told = notes.committed[repo].lock().unwrap().clone();
    let log = Log::replay(Stanza::open(&access(world.now(repo), world)).await?).await?;
    let void: Vec<u64> = (1..=log.state().seq).filter(|seq| log.is_void(*seq)).collect();
    ensure!(void.is_empty(), "written by who had not read what was before: {void:?}");
    let mut there = BTreeSet::new();
    for backup in &log.state().backups {
        let id = backup.info.as_ref().map(|info| info.id.clone()).unwrap_or_default();
        actors::read_all(log.stanza(), backup)
            .await
            .with_context(|| format!("backup {id}, after entry {}", log.state().seq))?;
        there.insert(id);
    }
    for entry in log.entries() {
        if let Some(Entry::Expired(gone)) = &entry.kind {
            there.insert(gone.backup.clone());
        }
    }
    let lost: Vec<_> = told.difference(&there).collect();
    ensure!(lost.is_empty(), "told to be committed, and not in the log: {lost:?}");
    index_is_right(world, repo, &log)
        .await
        .with_context(|| format!("after entry {}", log.state().seq))?;
    Ok(log)
}

/// Whatever can be read of the index says what packs say of themselves; and of packs that are gone, nothing is said but
/// while their sweep is under way. What the store has cut off says nothing of itself: no backup may rely on that.
async fn index_is_right(world: &World, repo: usize, log: &Log) -> Result<()> {
    let stanza = log.stanza();
    let marks = log.state().open_marks.iter();
    let marked: HashSet<&[u8]> = marks.flat_map(|mark| mark.packs.iter().map(Vec::as_slice)).collect();
    let mut directories = BTreeMap::new();
    for hash in &log.state().index_runs {
        let run = match read_run(stanza, hash).await {
            Ok(run) => run,
            Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => continue,
            Err(error) => return Err(error.into()),
        };
        for reference in &run.packs {
            if directories.contains_key(&reference.name) {
                continue;
            }
            let name = names::pack(&reference.name);
            let directory = match stanza.store().get_opt(&name, limits::PACK_BYTES).await? {
                Some(bytes) if sha256(&bytes) != reference.name => {
                    ensure!(world.was_cut(repo, &name), "{name} has other content");
                    None
                }
                Some(bytes) => {
                    let keys = stanza.keys_for(&bytes, &name)?;
                    let (header, frames) = pack::open_pack(keys, stanza.scope(), &bytes, &name)?;
                    ensure!(header == reference.header, "the index has another header of {name}");
                    Some(frames)
                }
                None => {
                    let is_sweeping = marked.contains(&reference.name[..]);
                    ensure!(is_sweeping, "the index names {name}, which is gone");
                    None
                }
            };
            directories.insert(reference.name, directory);
        }
        for entry in &run.entries {
            let of_pack = directories.get(&run.packs[entry.pack as usize].name);
            let Some(Some(frames)) = of_pack else { continue };
            let before = frames.iter().take(entry.ordinal as usize);
            let offset = 80 + before.map(|frame| frame.stored_len).sum::<u32>();
            let frame = frames.get(entry.ordinal as usize).context("a frame of nobody's")?;
            let is_right = (frame.id, frame.stored_len, offset) == (entry.id, entry.stored_len, entry.offset);
            ensure!(is_right, "the index has another frame in the place of {entry:?}");
        }
    }
    Ok(())
}

/// All WAL from the newest backup on that the server was told is durable, and that of each backup.
async fn has_its_wal(log: &Log, archived: u64, received: &[std::ops::Range<u64>]) -> Result<()> {
    let archive = Archive::open(log, None, 0)?;
    let whole = segments(log).await?;
    let newest = log.state().backups.len().saturating_sub(1);
    let mut oldest = 1;
    for (number, backup) in log.state().backups.iter().enumerate() {
        let info = backup.info.clone().unwrap_or_default();
        let last = match number == newest {
            true => archived.max(info.stop_lsn / SEGMENT + 1),
            false => info.stop_lsn / SEGMENT + 1,
        };
        oldest = info.start_lsn / SEGMENT;
        let missing: Vec<_> = (oldest..last).filter(|n| !whole.contains(n)).collect();
        ensure!(
            missing.is_empty(),
            "WAL that backup {} needs, or that came after it, is gone: {missing:?}",
            info.id
        );
    }
    ensure!(newest > 0 || (1..archived).all(|n| whole.contains(&n)) || !log.state().expired_wal.is_empty());
    if log.state().backups.is_empty() && !log.state().expired_wal.is_empty() {
        return Ok(());
    }
    for number in whole.range(oldest..) {
        has_bytes(&archive, *number, SEGMENT).await?;
    }
    for range in received {
        for number in range.start / SEGMENT..=range.end / SEGMENT {
            let len = (range.end - number * SEGMENT).min(SEGMENT);
            if number >= oldest && len > 0 && !whole.contains(&number) {
                has_bytes(&archive, number, len)
                    .await
                    .context("a receiver has said that it is durable")?;
            }
        }
    }
    Ok(())
}

/// Each copy has the WAL that it needs for itself.
async fn copies_have_their_wal(log: &Log) -> Result<()> {
    let archive = Archive::open(log, None, 0)?;
    for backup in &log.state().backups {
        let info = backup.info.clone().unwrap_or_default();
        for number in info.start_lsn / SEGMENT..=info.stop_lsn / SEGMENT {
            let len = (info.stop_lsn - number * SEGMENT).min(SEGMENT);
            has_bytes(&archive, number, len)
                .await
                .with_context(|| format!("the copy {} needs it", info.id))?;
        }
    }
    Ok(())
}

/// The beginning of a segment is there, as the server wrote it.
async fn has_bytes(archive: &Archive, number: u64, len: u64) -> Result<()> {
    let segment = Segment { timeline: 1, number };
    let there = archive.segment_or_parts(segment).await?.unwrap_or_default();
    let (there, wanted) = (there.get(..len as usize), wal(number));
    ensure!(
        there == Some(&wanted[..len as usize]),
        "of segment {number}, {len} bytes are not there"
    );
    Ok(())
}

/// Ids of chunks in packs that backups use, not too little, and that may be used on: by what can be read of the index.
async fn usable_chunks(log: &Log) -> Result<BTreeSet<[u8; 32]>> {
    let stanza = log.stanza();
    let mut live: BTreeMap<[u8; 32], u64> = BTreeMap::new();
    for backup in &log.state().backups {
        let usage = Manifest::read(stanza, &backup.root).await?.usage;
        for (pack, bytes) in usage.packs.as_chunks::<32>().0.iter().zip(usage.live_bytes) {
            let most = live.entry(*pack).or_default();
            *most = bytes.max(*most);
        }
    }
    let listed = stanza.store().list_hashes(names::PACKS).await?;
    // Where the store has answered with other content, something whole may have been taken for damaged.
    let bad = distrusted(stanza).await?;
    let marks = log.state().open_marks.iter();
    let marked: HashSet<&[u8]> = marks.flat_map(|mark| mark.packs.iter().map(Vec::as_slice)).collect();
    let usable = listed.iter().filter(|(pack, len)| {
        let used = live.get(pack).copied().unwrap_or_default();
        used > 0 && used * 10 >= *len && !marked.contains(&pack[..]) && !bad.contains(pack)
    });
    let usable: HashSet<[u8; 32]> = usable.map(|(pack, _)| *pack).collect();
    let mut ids = BTreeSet::new();
    for hash in &log.state().index_runs {
        let Ok(run) = read_run(stanza, hash).await else {
            continue;
        };
        let entries = run.entries.iter();
        let entries = entries.filter(|entry| usable.contains(&run.packs[entry.pack as usize].name));
        ids.extend(entries.map(|entry| entry.id));
    }
    Ok(ids)
}

/// Half of the index is lost, and comes back from the packs.
pub async fn index_comes_back(world: &Arc<World>, notes: &Notes) -> Result<()> {
    let log = actors::open(world, 0).await?;
    // What was lost before is repaired first: what is lost with it now could not be told from that.
    let access = access(world.store(0), world);
    let options = repair::Options {
        dry_run: false,
        level: Level::Objects,
    };
    repair::run(&access, options, &Progress::default()).await?;
    let mut log = log;
    log.refresh().await?;
    let before = usable_chunks(&log).await?;
    for run in log.state().index_runs.clone() {
        if world.roll(2) == 0 {
            world.spoil(0, &format!("{}/{}", names::INDEX, hex::encode(run))).await;
        }
    }
    let report = repair::run(&access, options, &Progress::default()).await?;
    notes.count("rebuilt packs", report.index.rebuilt_packs);
    log.refresh().await?;
    for run in &log.state().index_runs {
        read_run(log.stanza(), run).await?;
    }
    let after = usable_chunks(&log).await?;
    let lost = before.difference(&after).count();
    ensure!(
        lost == 0,
        "{lost} of {} chunks are not in the index again",
        before.len()
    );
    Ok(())
}

/// Whether a repair has changed something, or died and may have. One that met an open mark puts nothing back into the
/// index that the mark names; if it turns out to be used, it is not found again, and stored anew by the next backup that
/// has it.
pub fn was_repaired(log: &Log) -> bool {
    let (mut begun, mut noted, mut changed) = (0, 0, false);
    for entry in log.entries() {
        match &entry.kind {
            Some(Entry::Begin(begin)) if begin.what == "repair" => begun += 1,
            Some(Entry::Operation(operation)) if operation.what == "repair" => {
                noted += 1;
                changed |= operation.result != "nothing to do";
            }
            _ => {}
        }
    }
    changed || begun > noted
}

/// After collection has got to its end, nothing is left over. `is_partial`: the index may lack what is used.
pub async fn nothing_is_left(log: &Log, is_partial: bool) -> Result<()> {
    let archive = Archive::open(log, None, 0)?;
    let gone = |number: &u64| {
        archive.is_expired(Segment {
            timeline: 1,
            number: *number,
        })
    };
    ensure!(!segments(log).await?.iter().any(gone), "WAL that has expired");
    let stanza = log.stanza();
    let (mut used, mut is_current) = (BTreeSet::new(), false);
    for backup in &log.state().backups {
        let manifest = Manifest::read(stanza, &backup.root).await?;
        used.extend(manifest.packs.iter().map(|pack| names::pack(&pack.name)));
        let mut packs = manifest.packs.iter();
        is_current |= packs.any(|pack| pack.header.epoch == stanza.keys().epoch);
    }
    let packs = stanza.store().list(names::PACKS).await?;
    let packs: BTreeSet<_> = packs.into_iter().map(|(name, _)| name).collect();
    ensure!(packs == used, "packs that nothing uses: {:?}", packs.difference(&used));
    let roots = stanza.store().list(names::ROOTS).await?.len();
    ensure!(roots == log.state().backups.len(), "{roots} roots");
    let runs = stanza.store().list(names::INDEX).await?.len();
    ensure!(runs == log.state().index_runs.len(), "{runs} index runs");
    ensure!(log.state().open_marks.is_empty() && log.state().open_sessions.is_empty());
    // Whatever is used, and of the newest keys, can be found again.
    let index = Index::load(stanza, log.state()).await?;
    ensure!(!is_current || !index.is_empty() || is_partial);
    Ok(())
}
