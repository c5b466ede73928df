//! A backup of one repository into another: what the target does not have is fetched, opened, sealed anew under the
//! target's keys and packed as by a backup, and described by a manifest of the same files.
//!
//! What always holds: the copy's segments and extents are those of the original, place for place, only the frames are
//! others; a chunk counts as there only if the target's index has it, in a pack that is locked for long enough; the
//! commit is the last write.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use fairvault_format::frame::{FRAME_HEADER_LEN, FrameKey, FrameReader};
use fairvault_format::index::PackRef;
use fairvault_format::keys::TAG_LEN;
use fairvault_format::{limits, names, proto, sha256};
use futures::StreamExt;
use futures::future::Either;
use futures::stream::FuturesUnordered;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::twins::Twins;
use crate::backup::cut::Grain;
use crate::backup::manifest::{self, store_segment};
use crate::backup::pipeline::Shared;
use crate::backup::upload;
use crate::codec::Codec;
use crate::commit::lease::{Lease, NO_BACKUP};
use crate::commit::session::Session;
use crate::commit::{Log, state};
use crate::dedup::{Claim, Index, Known, SessionChunks, confirm_packs};
use crate::error::{Error, Result};
use crate::immutable::reliance::Locks;
use crate::manifest::{FrameRef, Outline};
use crate::pack::Packer;
use crate::progress::Progress;
use crate::restore::data::{RANGES, open_frame};
use crate::restore::ranges::ranges;
use crate::restore::target::info;
use crate::stanza::Stanza;

/// Manifest segments that are read at once.
const SEGMENTS: usize = 4;

type Id = [u8; 32];

/// A copy that relies on what is there is as good as a backup that does so: it is said, and makes no run a failed one.
pub fn say(target: &Stanza, notes: &[String]) {
    for note in notes {
        tracing::warn!("{}: {note}", target.shown());
    }
}

/// Copies a backup whose WAL is in the target already; returns the facts of the copy.
pub async fn copy(
    source: &Log,
    target: &mut Log,
    original: &proto::CommittedBackup,
    twins: &mut Twins,
    locks: &Locks,
    progress: &Arc<Progress>,
    stop: &watch::Receiver<bool>,
) -> Result<proto::BackupInfo> {
    let facts = info(original);
    let origin = state::origin(source.state(), &facts);
    let allowed = |now: &proto::Snapshot| state::is_new(now, &origin);
    let mut session = Session::begin_if(target, state::COPY, |state| free_id(state, &facts.id), allowed).await?;
    let stanza = target.stanza().clone();
    let lease = match Lease::take(&stanza, session.id(), state::COPY, NO_BACKUP).await {
        Ok(lease) => lease,
        Err(error) => {
            session.abort(target, &error.to_string()).await?;
            return Err(error);
        }
    };
    let outcome = tokio::select! {
        outcome = transfer(source, target, &mut session, original, twins, locks, progress) => outcome,
        () = super::stopped(stop) => Err(Error::interrupted()),
    };
    let ended = match outcome {
        Ok(Transferred { root, info, pairs }) => {
            progress.phase("committing");
            let committed = session.commit(target, root, info.clone()).await;
            committed.map(|()| {
                twins.add(&original.root, pairs);
                info
            })
        }
        Err(error) => {
            session.give_up(target, &error).await;
            Err(error)
        }
    };
    lease.release().await;
    ended
}

/// The original's id, or the nearest later one that no other backup of the target has.
fn free_id(now: &proto::Snapshot, wanted: &str) -> String {
    let taken = |id: &str| state::is_taken(now, id, state::COPY);
    let parsed = wanted.split_at_checked(15).and_then(|(time, letter)| {
        let time = jiff::civil::DateTime::strptime("%Y%m%d-%H%M%S", time).ok()?;
        Some((time, letter))
    });
    let mut seconds = 0i64;
    let mut id = wanted.to_owned();
    while taken(&id) {
        seconds += 1;
        let later = parsed.and_then(|(time, letter)| {
            let time = time.checked_add(jiff::SignedDuration::from_secs(seconds)).ok()?;
            Some(format!("{}{letter}", time.strftime("%Y%m%d-%H%M%S")))
        });
        id = later.unwrap_or_else(|| format!("{wanted}-{seconds}"));
    }
    id
}

struct Transferred {
    root: Id,
    info: proto::BackupInfo,
    /// Ids of the source and of the target.
    pairs: Vec<(Id, Id)>,
}

async fn transfer(
    source: &Log,
    target: &mut Log,
    session: &mut Session,
    original: &proto::CommittedBackup,
    twins: &Twins,
    locks: &Locks,
    progress: &Arc<Progress>,
) -> Result<Transferred> {
    let (from, to) = (source.stanza().clone(), target.stanza().clone());
    progress.phase("loading the index");
    let index = Index::load_without(&to, target.state(), locks.ending()).await?;
    let outline = Arc::new(Outline::read(&from, &original.root).await?);
    let facts = info(original);
    if outline.root.info.as_ref() != Some(&facts) {
        return Err(Error::damaged(format!(
            "{}: its facts are not those in the log",
            outline.what
        )));
    }
    let before = (
        progress.stored_bytes.get(),
        progress.deduplicated_bytes.get(),
        progress.read_bytes.get(),
    );
    progress.phase("copying");
    let chunks = Arc::new(SessionChunks::new(index));
    // The last packs of content and of manifests find room at once; the packer bounds how many there are.
    let (finished_in, finished_out) = mpsc::channel(2);
    let shared = Arc::new(Shared {
        stanza: to.clone(),
        chunks: chunks.clone(),
        packer: Packer::new(to.clone(), chunks.clone(), finished_in),
        level: manifest::LEVEL,
        pages: false,
        checksums: false,
        basis: None,
        audit: None,
        progress: progress.clone(),
    });
    let storing = upload::run(to.clone(), finished_out, target, session, progress);
    let working = work(shared, from, outline.clone(), twins);
    let (worked, stored) = tokio::join!(working, storing);
    // When the store fails, the packer only sees that it is gone.
    stored?;
    let (segments, handles) = worked?;
    let (known, packs) = chunks.finish()?;
    confirm_packs(&to, &known, &packs).await?;
    let (used, mut notes) = (packs.iter().map(|pack| (pack.name, chunks.was_there(pack))), Vec::new());
    locks.confirm(target, used, facts.stopped_us, &mut notes).await?;
    say(&to, &notes);
    let info = proto::BackupInfo {
        id: session.backup().to_owned(),
        copied_from: Some(state::origin(source.state(), &facts)),
        new_stored_bytes: progress.stored_bytes.get() - before.0,
        new_plain_bytes: (progress.read_bytes.get() - before.2)
            .saturating_sub(progress.deduplicated_bytes.get() - before.1),
        ..facts
    };
    let failures = outline.root.page_failures.clone();
    let (usage, root) = manifest::root_of(info.clone(), &segments, &known, &packs, failures)?;
    let root = manifest::seal_root(&to, &usage, &root)?;
    fairvault_format::error::check_limit("the manifest root", root.len() as u64, limits::SECTION_BYTES)?;
    let hash = sha256(&root);
    to.store().put_hashed(&names::root(&hash), root.into()).await?;
    let pairs = handles.into_iter().map(|(id, handle)| (id, known[handle as usize].id));
    Ok(Transferred {
        root: hash,
        info,
        pairs: pairs.collect(),
    })
}

type Handles = HashMap<Id, u32>;
type Segments = Vec<(String, u32, Vec<u32>)>;

/// Content, then what describes it; packs of content must have their names before a manifest can point to them.
async fn work(
    shared: Arc<Shared>,
    source: Arc<Stanza>,
    outline: Arc<Outline>,
    twins: &Twins,
) -> Result<(Segments, Handles)> {
    let handles = content(&shared, &source, &outline, twins).await?;
    close(&shared).await?;
    let (known, packs) = shared.chunks.finish()?;
    let known = Arc::new((known, packs));
    let mut segments = Vec::with_capacity(outline.segments());
    let grain = Grain::of(outline.manifest_bytes());
    let reading = (0..outline.segments()).map(|number| outline.segment(&source, number));
    let mut reading = futures::stream::iter(reading).buffered(SEGMENTS);
    while let Some(segment) = reading.next().await {
        let segment = segment?;
        let frames = outline.frames_of(&segment)?;
        let first = segment.files.first().map(|file| file.path.clone()).unwrap_or_default();
        let files = segment.files.len() as u32;
        let chosen = frames.iter().map(|frame| handles.get(&frame.id).copied());
        let chosen: Option<Vec<u32>> = chosen.collect();
        let chosen = chosen.ok_or_else(|| Error::failed(format!("{} changed while it was copied", outline.what)))?;
        let (at, known) = (shared.clone(), known.clone());
        let stored = blocking(move || {
            let segment = described(segment, &chosen, &known.0, &known.1)?;
            store_segment(&at, &mut Codec::new(manifest::LEVEL)?, segment, grain)
        });
        segments.push((first, files, stored.await?));
    }
    close(&shared).await?;
    Ok((segments, handles))
}

async fn close(shared: &Arc<Shared>) -> Result<()> {
    let shared = shared.clone();
    blocking(move || shared.packer.close()).await
}

async fn blocked<T>(working: JoinHandle<Result<T>>) -> Result<T> {
    let worked = working.await;
    worked.map_err(|error| Error::failed("copying panicked").caused_by(error))?
}

/// Begins work that takes its time, away from the async threads. Where there is but one thread it is done at once: a
/// simulation, which must not depend on who is faster.
fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> impl Future<Output = Result<T>> + Send {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::CurrentThread => Either::Left(futures::future::ready(work())),
        _ => Either::Right(blocked(tokio::task::spawn_blocking(work))),
    }
}

/// The same segment over the target's frames, in the same order, so that its extents stay as they are.
fn described(
    segment: proto::ManifestSegment,
    handles: &[u32],
    known: &[Known],
    packs: &[PackRef],
) -> Result<proto::ManifestSegment> {
    let mut frames = proto::FrameTable::default();
    let mut pack_names: Vec<Vec<u8>> = Vec::new();
    let mut numbers: HashMap<u32, u32> = HashMap::new();
    for &handle in handles {
        let chunk = &known[handle as usize];
        let place = chunk.place.ok_or_else(|| Error::failed("a chunk without a place"))?;
        let number = *numbers.entry(place.pack).or_insert_with(|| {
            pack_names.push(packs[place.pack as usize].name.to_vec());
            pack_names.len() as u32 - 1
        });
        manifest::push_frame(&mut frames, chunk, number)?;
    }
    Ok(proto::ManifestSegment {
        pack_names,
        frames: Some(frames),
        files: segment.files,
    })
}

/// A frame that has to be fetched; with its id and handle in the target, where they are known.
type Needed = (FrameRef, Option<(Id, u32)>);

/// Fetched bytes of a pack, and the frames in them.
struct Job {
    pack: PackRef,
    from: u32,
    bytes: Bytes,
    frames: Vec<Needed>,
}

/// Brings every chunk of the files into the target; returns their handles there by their ids in the source.
async fn content(shared: &Arc<Shared>, source: &Arc<Stanza>, outline: &Outline, twins: &Twins) -> Result<Handles> {
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    let mut handles = Handles::new();
    let mut sealing = FuturesUnordered::new();
    let mut met: HashSet<Id> = HashSet::new();
    let reading = (0..outline.segments()).map(|number| outline.segment(source, number));
    let mut reading = futures::stream::iter(reading).buffered(SEGMENTS);
    while let Some(segment) = reading.next().await {
        let frames = outline.frames_of(&segment?)?;
        let frames = frames.into_iter().filter(|frame| met.insert(frame.id)).collect();
        let needed = not_there(shared, frames, twins, &mut handles);
        let frames: Vec<FrameRef> = needed.iter().map(|(frame, _)| *frame).collect();
        let fetching = ranges(&frames, (0..frames.len() as u32).collect())
            .into_iter()
            .map(async |range| {
                let pack = outline.packs[range.pack as usize];
                let bytes = source
                    .store()
                    .get_range(&names::pack(&pack.name), range.from.into()..range.to.into())
                    .await?;
                let frames = range.frames.iter().map(|&number| needed[number as usize]).collect();
                let from = range.from;
                Ok::<_, Error>(Job {
                    pack,
                    from,
                    bytes,
                    frames,
                })
            });
        let mut fetching = futures::stream::iter(fetching).buffer_unordered(RANGES);
        while let Some(job) = fetching.next().await {
            while sealing.len() >= workers
                && let Some(done) = sealing.next().await
            {
                handles.extend::<Vec<(Id, u32)>>(done?);
            }
            let (shared, source, job) = (shared.clone(), source.clone(), job?);
            sealing.push(blocking(move || reseal(&shared, &source, &job)));
        }
    }
    while let Some(done) = sealing.next().await {
        handles.extend(done?);
    }
    Ok(handles)
}

/// Of some frames, those that the target does not have; the handles of the others are added.
fn not_there(shared: &Shared, frames: Vec<FrameRef>, twins: &Twins, handles: &mut Handles) -> Vec<Needed> {
    let mut needed = Vec::new();
    for frame in frames {
        shared.progress.read_bytes.add(frame.plain_len.into());
        let twin = twins
            .get(&frame.id)
            .map(|id| (*id, shared.chunks.claim(*id, frame.plain_len)));
        match twin {
            Some((_, Claim::Present(handle))) => {
                shared.progress.deduplicated_bytes.add(frame.plain_len.into());
                handles.insert(frame.id, handle);
            }
            Some((id, Claim::New(handle))) => needed.push((frame, Some((id, handle)))),
            None => needed.push((frame, None)),
        }
    }
    needed
}

/// Opens and seals anew. Blocks.
fn reseal(shared: &Shared, source: &Stanza, job: &Job) -> Result<Vec<(Id, u32)>> {
    let (mut reader, mut done) = (FrameReader::default(), Vec::with_capacity(job.frames.len()));
    let pack = &job.pack;
    let key = FrameKey::new(source.keys_of(pack.header.epoch)?, source.scope(), &pack.header)?;
    for (frame, twin) in &job.frames {
        let at = (frame.offset - job.from) as usize;
        let stored = job.bytes.get(at..at + frame.stored_len as usize).unwrap_or_default();
        let chunk = open_frame(&mut reader, source, &key, pack, frame, stored)?;
        let id = shared.stanza.keys().chunk_id(chunk);
        let claim = match twin {
            None => shared.chunks.claim(id, frame.plain_len),
            Some((expected, handle)) if *expected == id => Claim::New(*handle),
            Some(_) => {
                return Err(Error::damaged(format!(
                    "{}, frame {}: the two repositories have different content for one chunk of a backup",
                    names::pack(&pack.name),
                    frame.ordinal
                )));
            }
        };
        let handle = match claim {
            Claim::Present(handle) => {
                shared.progress.deduplicated_bytes.add(frame.plain_len.into());
                handle
            }
            Claim::New(handle) => {
                let (codec, output) = reader.encoded();
                let mut buffer = Vec::with_capacity(FRAME_HEADER_LEN + output.len() + TAG_LEN);
                buffer.resize(FRAME_HEADER_LEN, 0);
                buffer.extend_from_slice(output);
                let place = shared.packer.add(id, codec, frame.plain_len, buffer)?;
                shared.chunks.stored(handle, place);
                handle
            }
        };
        done.push((frame.id, handle));
    }
    Ok(done)
}
