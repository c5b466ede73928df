//! What must hold: at every moment, and at the end.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use fairvault_engine::commit::Log;
use fairvault_engine::dedup::{Index, distrusted, read_run};
use fairvault_engine::error::Kind;
use fairvault_engine::manifest::Manifest;
use fairvault_engine::postgres::segment::Segment;
use fairvault_engine::progress::Progress;
use fairvault_engine::repair;
use fairvault_engine::stanza::{Access, Stanza};
use fairvault_engine::store::Store;
use fairvault_engine::verify::Level;
use fairvault_engine::wal::archive::Archive;
use fairvault_format::proto::log_entry::Kind as Entry;
use fairvault_format::{limits, names, pack, sha256};

use super::actors::{self, access};
use super::server::{SEGMENT, Server, segments, wal};
use super::store::{World, as_store};
use super::watch::Fork;
use super::witness::Aside;

/// Chunks, each with the key epoch of its pack.
pub type Chunks = BTreeSet<(u32, [u8; 32])>;

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

/// What must hold at every moment, looked at as a whole. Returns the logs.
pub async fn check(world: &Arc<World>, notes: &Notes, server: &Server) -> Result<[Log; 2]> {
    // Before the repository is looked at: what is told later need not be there.
    let (archived, received) = (server.archived(), server.received());
    let told = |repo: usize| notes.committed[repo].lock().unwrap().clone();
    let first = repository(world, &told(0), 0, world.now(0)).await?;
    has_its_wal(&first, archived, &received).await?;
    let second = repository(world, &told(1), 1, world.now(1))
        .await
        .context("in the second repository")?;
    copies_have_their_wal(&second).await?;
    Ok([first, second])
}

/// The same of a repository as it was after an entry of its log; and if all of the index was lost then, it would come
/// back.
pub async fn check_closely(world: &Arc<World>, (repo, inner): Fork) -> Result<()> {
    let log = repository(world, &BTreeSet::new(), repo, as_store((repo, inner.clone()))).await?;
    let access = Access {
        env: Aside::new(world),
        ..access(as_store((repo, inner)), world)
    };
    let after = log.state().seq;
    let rebuilt = async {
        let mut log = mend(&access).await?;
        let runs = log.state().index_runs.iter();
        let runs: Vec<String> = runs
            .map(|run| format!("{}/{}", names::INDEX, hex::encode(run)))
            .collect();
        log.stanza().store().delete(&runs).await?;
        rebuild(&access, &mut log, !runs.is_empty()).await
    };
    rebuilt
        .await
        .with_context(|| format!("the index of repository {repo} was lost after entry {after}"))?;
    Ok(())
}

async fn repository(world: &Arc<World>, told: &BTreeSet<String>, repo: usize, store: Store) -> Result<Log> {
    let log = Log::replay(Stanza::open(&access(store, world)).await?).await?;
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
pub async fn has_bytes(archive: &Archive, number: u64, len: u64) -> Result<()> {
    let segment = Segment { timeline: 1, number };
    let there = archive.segment_or_parts(segment).await?.unwrap_or_default();
    let (there, wanted) = (there.get(..len as usize), wal(number));
    ensure!(
        there == Some(&wanted[..len as usize]),
        "of segment {number}, {len} bytes are not there"
    );
    Ok(())
}

/// Chunks in packs that backups use, not too little, and that may be used on: those that the packs say they have, and
/// those of them that are in what can be read of the index.
async fn usable_chunks(log: &Log) -> Result<(Chunks, Chunks)> {
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
    let (mut there, mut known, mut elsewhere) = (Chunks::new(), Chunks::new(), Chunks::new());
    for name in usable.iter().map(names::pack) {
        let bytes = stanza.store().get(&name, limits::PACK_BYTES).await?;
        let (header, frames) = pack::open_pack(stanza.keys_for(&bytes, &name)?, stanza.scope(), &bytes, &name)?;
        there.extend(frames.iter().map(|frame| (header.epoch, frame.id)));
    }
    for hash in &log.state().index_runs {
        let Ok(run) = read_run(stanza, hash).await else {
            continue;
        };
        let entries = run
            .entries
            .iter()
            .map(|entry| (&run.packs[entry.pack as usize], entry.id));
        let (of_use, others): (Vec<_>, Vec<_>) = entries.partition(|(pack, _)| usable.contains(&pack.name));
        known.extend(of_use.iter().map(|(pack, id)| (pack.header.epoch, *id)));
        // Where two of its packs have a chunk, a run says so of one. If that is of no use any more, the chunk is stored again.
        if run.packs.iter().any(|pack| usable.contains(&pack.name)) {
            elsewhere.extend(others.iter().map(|(pack, id)| (pack.header.epoch, *id)));
        }
    }
    there.retain(|chunk| known.contains(chunk) || !elsewhere.contains(chunk));
    Ok((there, known))
}

const REPAIR: repair::Options = repair::Options {
    dry_run: false,
    level: Level::Objects,
    older_log: None,
};

/// What was lost of the index before is repaired: what is lost with it later could not be told from that.
async fn mend(access: &Access) -> Result<Log> {
    repair::run(access, REPAIR, &Progress::default()).await?;
    Ok(Log::open(Stanza::open(access).await?).await?)
}

/// A repair brings back into the index what was there before; and if anything `is_lost`, whatever packs hold that are of
/// use: then nobody knows any more what was there. Returns these chunks, and how many packs were looked into.
async fn rebuild(access: &Access, log: &mut Log, is_lost: bool) -> Result<(Chunks, u64)> {
    let report = repair::run(access, REPAIR, &Progress::default()).await?;
    log.refresh().await?;
    for run in &log.state().index_runs {
        read_run(log.stanza(), run).await?;
    }
    let (there, known) = usable_chunks(log).await?;
    let lost = there.difference(&known).count();
    ensure!(
        lost == 0 || !is_lost,
        "{lost} of {} chunks are not in the index again",
        there.len()
    );
    Ok((known, report.index.rebuilt_packs))
}

/// Half of the index is lost, and comes back from the packs. Returns the chunks that are in it then.
pub async fn index_comes_back(world: &Arc<World>, notes: &Notes) -> Result<Chunks> {
    let access = access(world.store(0), world);
    let mut log = mend(&access).await?;
    let (_, before) = usable_chunks(&log).await?;
    let runs = log.state().index_runs.clone();
    for (number, run) in runs.iter().enumerate() {
        // One of them at least.
        if world.roll(2) == 0 || number == 0 {
            world.spoil(0, &format!("{}/{}", names::INDEX, hex::encode(run))).await;
        }
    }
    let (after, rebuilt_packs) = rebuild(&access, &mut log, !runs.is_empty()).await?;
    notes.count("rebuilt packs", rebuilt_packs);
    let lost = before.difference(&after).count();
    ensure!(
        lost == 0,
        "{lost} of {} chunks are not in the index again",
        before.len()
    );
    Ok(after)
}

/// Chunks that the index of a repository knows and that can be used on. If it knows none of the newest keys although there
/// are some, it has been lost: `is_excused` says that somebody has seen to that, or may have.
pub async fn known_chunks(log: &Log, is_excused: bool) -> Result<Chunks> {
    let (there, known) = usable_chunks(log).await?;
    let epoch = log.stanza().keys().epoch;
    let is_any = |chunks: &Chunks| chunks.iter().any(|(of, _)| *of == epoch);
    ensure!(
        is_excused || is_any(&known) || !is_any(&there),
        "none of {} chunks is in the index",
        there.len()
    );
    Ok(known)
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

/// After collection has got to its end, nothing is left over; and of what is used, nothing that was `known` before is
/// forgotten.
pub async fn nothing_is_left(log: &Log, known: &Chunks) -> Result<()> {
    let archive = Archive::open(log, None, 0)?;
    let gone = |number: &u64| {
        archive.is_expired(Segment {
            timeline: 1,
            number: *number,
        })
    };
    ensure!(!segments(log).await?.iter().any(gone), "WAL that has expired");
    let stanza = log.stanza();
    let mut used = BTreeSet::new();
    for backup in &log.state().backups {
        let manifest = Manifest::read(stanza, &backup.root).await?;
        used.extend(manifest.packs.iter().map(|pack| names::pack(&pack.name)));
    }
    let packs = stanza.store().list(names::PACKS).await?;
    let packs: BTreeSet<_> = packs.into_iter().map(|(name, _)| name).collect();
    ensure!(packs == used, "packs that nothing uses: {:?}", packs.difference(&used));
    let roots = stanza.store().list(names::ROOTS).await?.len();
    ensure!(roots == log.state().backups.len(), "{roots} roots");
    let runs = stanza.store().list(names::INDEX).await?.len();
    ensure!(runs == log.state().index_runs.len(), "{runs} index runs");
    ensure!(log.state().open_marks.is_empty() && log.state().open_sessions.is_empty());
    // Whatever is used, and of the newest keys, can be found again by the next backup.
    let index = Index::load(stanza, log.state()).await?;
    let current = known.iter().filter(|(epoch, _)| *epoch == stanza.keys().epoch);
    let forgotten = current.filter(|(_, id)| index.find(id).is_none()).count();
    ensure!(
        forgotten == 0,
        "{forgotten} of {} chunks that were in the index cannot be found any more",
        known.len()
    );
    Ok(())
}
