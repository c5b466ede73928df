//! What the hosts of the simulation do. Everything that decides is the engine's own; only the server is left out:
//! a backup's files are numbers, and the content of a file follows from its name.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fairvault_engine::backup::manifest::{root_of, seal_root};
use fairvault_engine::commit::lease::{Lease, NO_BACKUP};
use fairvault_engine::commit::session::Session;
use fairvault_engine::commit::{Log, fence};
use fairvault_engine::dedup::{Claim, Index, Place, SessionChunks, confirm_packs, usable_packs};
use fairvault_engine::error::{Error, Kind};
use fairvault_engine::expire::rules::{Keep, Retention};
use fairvault_engine::manifest::Manifest;
use fairvault_engine::stanza::{Access, Stanza, rotate};
use fairvault_engine::store::Store;
use fairvault_engine::{env, expire, gc, progress::Progress};
use fairvault_format::frame::{FRAME_HEADER_LEN, FrameKey};
use fairvault_format::header::{HEADER_LEN, Kind as ObjectKind, ObjectHeader};
use fairvault_format::index::{IndexEntry, IndexRun, PackRef, seal_run};
use fairvault_format::keys::{Secret, TAG_LEN};
use fairvault_format::manifest::encode_segment;
use fairvault_format::pack::{DirectoryEntry, seal_tail};
use fairvault_format::proto::{self, BackupInfo};
use fairvault_format::{names, sha256};

use super::server::{SEGMENT, Server};
use super::store::{WAS_LIED_TO, World};

/// Different contents that files can have.
const CONTENTS: u64 = 14;

/// How the stanza is opened.
pub fn access(store: Store, world: &Arc<World>) -> Access {
    Access {
        repository: store,
        stanza: "acme".into(),
        secret: Some(Secret::Key([1; 32])),
        memory: None,
        may_stretch: true,
        env: world.clone(),
        trace: Default::default(),
    }
}

/// Opens the stanza of a repository.
pub async fn open(world: &Arc<World>, repo: usize) -> Result<Log, Error> {
    Log::open(Stanza::open(&access(world.store(repo), world)).await?).await
}

fn content(number: u64) -> Vec<u8> {
    let len = 300 + number as usize * 97;
    (0..len as u64)
        .map(|at| (((at + 1) * (number + 3) * 2_654_435_761) >> 15) as u8)
        .collect()
}

/// Makes a pack of chunks, stores it and announces it.
async fn store_pack(
    stanza: &Arc<Stanza>,
    log: &mut Log,
    session: &mut Session,
    chunks: &SessionChunks,
    new: &[(u32, Vec<u8>)],
) -> Result<(), Error> {
    let keys = stanza.keys();
    let header = ObjectHeader::new(ObjectKind::Pack, keys.epoch, env::salt(stanza.env())?);
    let key = FrameKey::new(keys, stanza.scope(), &header)?;
    let number = chunks.new_pack();
    let mut bytes = header.encode().to_vec();
    let (mut directory, mut run) = (Vec::new(), IndexRun::default());
    for (ordinal, (handle, plain)) in new.iter().enumerate() {
        let ordinal = ordinal as u32;
        let mut frame = vec![0; FRAME_HEADER_LEN];
        frame.extend_from_slice(plain);
        key.seal(ordinal, 0, plain.len() as u32, &mut frame);
        assert_eq!(frame.len(), FRAME_HEADER_LEN + plain.len() + TAG_LEN);
        let place = Place {
            pack: number,
            ordinal,
            offset: bytes.len() as u32,
            stored_len: frame.len() as u32,
        };
        let id = keys.chunk_id(plain);
        directory.push(DirectoryEntry {
            id,
            stored_len: place.stored_len,
            plain_len: plain.len() as u32,
        });
        run.entries.push(IndexEntry {
            id,
            pack: 0,
            ordinal,
            offset: place.offset,
            stored_len: place.stored_len,
        });
        bytes.extend(frame);
        chunks.stored(*handle, place);
    }
    bytes.extend(seal_tail(keys, stanza.scope(), &header, &directory)?);
    let pack = PackRef {
        name: sha256(&bytes),
        header,
    };
    chunks.pack_named(number, pack);
    run.packs.push(pack);
    stanza
        .store()
        .put_hashed(&names::pack(&pack.name), bytes.into())
        .await?;
    let sealed = seal_run(keys, stanza.scope(), env::salt(stanza.env())?, run)?;
    let hash = sha256(&sealed);
    stanza
        .store()
        .put_hashed(&names::index_run(&hash), sealed.into())
        .await?;
    session.announce(log, hash).await
}

/// Takes a backup; returns its id.
pub async fn backup(world: &Arc<World>, server: &Server) -> Result<String, Error> {
    let mut log = open(world, 0).await?;
    let kind = if world.roll(2) == 0 { "full" } else { "incr" };
    let name = |state: &proto::Snapshot| format!("{}-{kind}", state.seq);
    let mut session = Session::begin(&mut log, "backup", name).await?;
    let id = session.backup().to_owned();
    let lease = Lease::take(log.stanza(), session.id(), "backup", NO_BACKUP).await?;
    let done = transfer(world, &mut log, &mut session, server, kind).await;
    let ended = match done {
        Ok((root, info)) => session.commit(&mut log, root, info).await,
        Err(error) => {
            let _ = session.abort(&mut log, "failed").await;
            Err(error)
        }
    };
    lease.release().await;
    ended.map(|()| id)
}

/// Waits until the segment in which the backup ends is archived; returns where that is.
async fn wal_is_there(server: &Server) -> Result<u64, Error> {
    let last = server.archived();
    for _ in 0..60 {
        if server.archived() > last {
            return Ok(last * SEGMENT + 100);
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    Err(Error::temporary("WAL does not arrive"))
}

async fn transfer(
    world: &Arc<World>,
    log: &mut Log,
    session: &mut Session,
    server: &Server,
    kind: &str,
) -> Result<([u8; 32], BackupInfo), Error> {
    let stanza = log.stanza().clone();
    let start_lsn = server.archived() * SEGMENT + 8;
    let index = Index::load(&stanza, log.state()).await?;
    // What a parent has may be taken over without asking the index.
    let parent = match log.state().backups.last().filter(|_| kind == "incr") {
        Some(parent) => match Manifest::read(&stanza, &parent.root).await {
            Ok(manifest) => Some((usable_packs(&stanza, log.state(), &index, &manifest).await?, manifest)),
            Err(error) if error.kind() == Kind::Temporary => return Err(error),
            Err(_) => None,
        },
        None => None,
    };
    let chunks = SessionChunks::new(index);
    let mut files: Vec<(u64, u32)> = Vec::new();
    let mut new = Vec::new();
    for number in (0..CONTENTS).filter(|_| world.roll(3) == 0) {
        let plain = content(number);
        let id = stanza.keys().chunk_id(&plain);
        let adopted = parent.as_ref().and_then(|(usable, manifest)| {
            let frame = manifest.frames.iter().find(|frame| frame.id == id)?;
            usable[frame.pack as usize].then(|| chunks.adopt(&manifest.packs[frame.pack as usize], frame))
        });
        let handle = match adopted {
            Some(handle) => handle,
            None => match chunks.claim(id, plain.len() as u32) {
                Claim::Present(handle) => handle,
                Claim::New(handle) => {
                    new.push((handle, plain));
                    handle
                }
            },
        };
        files.push((number, handle));
    }
    drop(parent);
    for some in new.chunks(3) {
        tokio::time::sleep(Duration::from_millis(world.roll(30_000))).await;
        store_pack(&stanza, log, session, &chunks, some).await?;
    }
    // The manifest is a chunk as well.
    let (known, packs) = chunks.finish()?;
    let mut segment = proto::ManifestSegment {
        pack_names: packs.iter().map(|pack| pack.name.to_vec()).collect(),
        ..Default::default()
    };
    let table = segment.frames.get_or_insert_default();
    for (n, (number, handle)) in files.iter().enumerate() {
        let chunk = &known[*handle as usize];
        let place = chunk.place.ok_or_else(|| Error::failed("no place"))?;
        table.ids.extend_from_slice(&chunk.id);
        table.pack.push(place.pack);
        table.ordinal.push(place.ordinal);
        table.offset.push(place.offset);
        table.stored_len.push(place.stored_len);
        table.plain_len.push(chunk.plain_len);
        segment.files.push(proto::FileEntry {
            path: format!("{number:04}"),
            size: chunk.plain_len.into(),
            extents: Some(proto::Extents {
                file_offset: vec![0],
                len: vec![chunk.plain_len],
                frame: vec![n as u32],
                frame_offset: vec![0],
                ..Default::default()
            }),
            ..Default::default()
        });
    }
    let plain = encode_segment(segment);
    let handle = match chunks.claim(stanza.keys().chunk_id(&plain), plain.len() as u32) {
        Claim::Present(handle) => handle,
        Claim::New(handle) => {
            store_pack(&stanza, log, session, &chunks, &[(handle, plain)]).await?;
            handle
        }
    };
    let (known, packs) = chunks.finish()?;
    confirm_packs(&stanza, &known, &packs).await?;
    let info = BackupInfo {
        id: session.backup().to_owned(),
        start_lsn,
        stop_lsn: wal_is_there(server).await?,
        wal_segment_size: SEGMENT,
        r#type: kind.to_owned(),
        system_identifier: 7,
        start_timeline: 1,
        stop_timeline: 1,
        stopped_us: stanza.env().now_us(),
        files: files.len() as u64,
        ..Default::default()
    };
    let segments = [(String::new(), files.len() as u32, vec![handle])];
    let (usage, root) = root_of(info.clone(), &segments, &known, &packs, Vec::new())?;
    let root = seal_root(&stanza, &usage, &root)?;
    let hash = sha256(&root);
    stanza.store().put_hashed(&names::root(&hash), root.into()).await?;
    Ok((hash, info))
}

/// Reads all content of a backup and compares it with what it must be.
pub async fn read_all(stanza: &Arc<Stanza>, backup: &proto::CommittedBackup) -> Result<()> {
    let manifest = Manifest::read(stanza, &backup.root).await?;
    let files = backup.info.as_ref().map_or(0, |info| info.files);
    ensure!(
        manifest.files.len() as u64 == files,
        "{} files of {files}",
        manifest.files.len()
    );
    for placement in &manifest.placements {
        let frame = &manifest.frames[placement.frame as usize];
        let pack = &manifest.packs[frame.pack as usize];
        let (from, len) = (u64::from(frame.offset), u64::from(frame.stored_len));
        let name = names::pack(&pack.name);
        ensure!(from >= HEADER_LEN as u64);
        let stored = stanza.store().get_range(&name, from..from + len).await?;
        let key = FrameKey::new(stanza.keys_of(pack.header.epoch)?, stanza.scope(), &pack.header)?;
        let plain = key.open(frame.ordinal, &stored, &name).map_err(Error::from)?;
        let number = manifest.files[placement.file as usize].path.parse()?;
        ensure!(plain == content(number), "file {number} has other content");
    }
    Ok(())
}

/// A restore: whatever the log names after the lease was taken must be there to its end.
pub async fn restore(world: &Arc<World>) -> Result<()> {
    let log = match open(world, 0).await {
        Ok(log) => log,
        Err(error) => return passing(error),
    };
    let Some(lease) = Lease::for_reading(log.stanza(), "restore", "").await else {
        return Ok(());
    };
    let mut log = log;
    if let Err(error) = log.refresh().await {
        return passing(error);
    }
    let backups = log.state().backups.clone();
    if backups.is_empty() {
        return Ok(());
    }
    let backup = &backups[world.roll(backups.len() as u64) as usize];
    let id = backup.info.as_ref().map(|info| info.id.clone()).unwrap_or_default();
    if lease.narrow(&id).await.is_err() {
        return Ok(());
    }
    tokio::time::sleep(Duration::from_millis(world.roll(400_000))).await;
    let read = read_all(log.stanza(), backup).await;
    lease.release().await;
    match read.map_err(|error| error.downcast::<Error>()) {
        Ok(()) => Ok(()),
        Err(Ok(error)) => passing(error).context(format!("a restore of {id} under a lease")),
        Err(Err(error)) => Err(error.context(format!("a restore of {id}"))),
    }
}

/// The store may fail anybody; nothing else may go wrong.
pub fn passing(error: Error) -> Result<()> {
    // Somebody else who was given other content is no excuse.
    let was_lied_to = WAS_LIED_TO.try_with(Cell::get).unwrap_or(false);
    match error.kind() {
        Kind::Temporary | Kind::Failed | Kind::Held => Ok(()),
        // Whoever was given other content says of something whole that it is damaged, or of a newer version, or another's.
        Kind::Damaged | Kind::NotFound | Kind::Refused | Kind::Unsupported if was_lied_to => Ok(()),
        // Keys were rotated since this host read the log, and somebody has used the new ones: whoever begins anew has them.
        Kind::Refused if error.to_string().contains("which the given key does not open") => Ok(()),
        kind => bail!("{kind:?}: {error}"),
    }
}

/// Retention.
pub async fn expirer(world: &Arc<World>, repo: usize) -> Result<()> {
    let retention = Retention {
        full: Some(Keep::Count(1 + world.roll(2) as u32)),
        wal: [None, Some(0), Some(200)][world.roll(3) as usize],
        ..Default::default()
    };
    let options = expire::Options {
        retention,
        ..Default::default()
    };
    let done = async { expire::run(&mut open(world, repo).await?, &options).await };
    done.await.map_or_else(passing, |_| Ok(()))
}

/// Collection.
pub async fn collector(world: &Arc<World>, repo: usize) -> Result<()> {
    let options = gc::Options {
        dry_run: false,
        patience: Duration::from_secs(90),
    };
    let done = async { gc::run(&open(world, repo).await?, &options, &Progress::default()).await };
    done.await.map_or_else(passing, |_| Ok(()))
}

/// Somebody who believes that keys have leaked.
pub async fn rotator(world: &Arc<World>) -> Result<()> {
    let access = access(world.store(0), world);
    let options = rotate::Options::default();
    let done = async {
        let mut log = open(world, 0).await?;
        let plan = rotate::plan(&mut log, &access, &options).await?;
        rotate::rotate(&log, &access, &options, plan).await
    };
    done.await.map_or_else(passing, |_| Ok(()))
}

/// Somebody who believes that no writer is right.
pub async fn fencer(world: &Arc<World>) -> Result<()> {
    let done = async { fence::fence_writers(&mut open(world, 0).await?, "by a person").await };
    done.await.map_or_else(passing, |_| Ok(()))
}
