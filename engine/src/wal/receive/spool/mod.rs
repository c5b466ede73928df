//! The spool: received WAL on this host's disk, durable before the repository has it.
//!
//! What always holds: what was acknowledged is in synced journals (format-spec, section 14) and stays there
//! until its whole segment is in the repository; after a crash or a failed write a new journal is begun,
//! nothing is appended to an old one; a journal that does not give back what was acknowledged is an error.
//!
//! [`files`] finds what an earlier run left, [`writer`] appends, [`reader`] gives it to whoever stores it.

mod files;
mod lock;
mod reader;
mod writer;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::error::{Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;
use crate::stanza::Stanza;
use crate::store::owner::{self, Owner};
use files::Part;
pub use reader::Reader;
pub use writer::Writer;

/// A position on a timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Timeline.
    pub timeline: u32,
    /// Position.
    pub lsn: Lsn,
}

/// Which cluster the spool's WAL is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cluster {
    /// System identifier.
    pub system_identifier: u64,
    /// wal_segment_size, bytes.
    pub segment_size: u64,
}

#[derive(Debug, Default)]
struct State {
    cluster: Option<Cluster>,
    /// In the order in which they were received.
    parts: Vec<Part>,
    /// Timelines of which no more comes.
    ended: BTreeSet<u32>,
    /// Bytes on disk.
    bytes: u64,
    /// Up to where the reader has taken it.
    taken: Option<Position>,
    /// Up to where it is durable in the repository.
    stored: Option<Position>,
    /// Rises when WAL goes on elsewhere than where it ended: whoever reads begins anew.
    generation: u64,
}

impl State {
    fn end(&self) -> Option<Position> {
        self.parts.last().map(|part| Position {
            timeline: part.timeline,
            lsn: part.end,
        })
    }
}

/// The spool of one receiver.
#[derive(Debug)]
pub struct Spool {
    /// Its keys seal journals.
    stanza: Mutex<Arc<Stanza>>,
    folder: PathBuf,
    limit: u64,
    state: Mutex<State>,
    changed: watch::Sender<()>,
    /// As whom journals in a repository are written, if not as who this process is.
    owner: Option<Owner>,
    _lock: File,
}

/// Whether an error says that its folder's owner may not do that.
fn may_not(error: &std::io::Error) -> bool {
    use std::io::ErrorKind as K;
    matches!(error.kind(), K::PermissionDenied | K::ReadOnlyFilesystem)
}

fn sync_folder(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

impl Spool {
    /// Opens the spool in `folder`, which is made if it is not there. It holds `limit` bytes at most.
    pub fn open(stanza: Arc<Stanza>, folder: PathBuf, limit: u64) -> Result<Arc<Self>> {
        let owner = stanza.store().owner_of(&folder);
        let open = || Self::open_as(owner.as_ref(), &stanza, &folder, limit);
        let is_for_root = |error: &Error| matches!(error.kind(), Kind::Failed | Kind::Temporary);
        owner::write(owner.as_ref(), open, is_for_root)
    }

    fn open_as(owner: Option<&Owner>, stanza: &Arc<Stanza>, folder: &Path, limit: u64) -> Result<Arc<Self>> {
        let what = |doing: &str| format!("{doing} the receiver's spool {}", folder.display());
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|e| Error::io(what("making"), e))?;
        // The folder of the stanza in it, and the spool folder itself, may have been made just now.
        for above in folder.ancestors().skip(1).take(2) {
            sync_folder(above).map_err(|e| Error::io(what("syncing the folders of"), e))?;
        }
        let lock = lock::take(stanza, folder)?;
        let this = Self {
            state: Mutex::default(),
            changed: watch::channel(()).0,
            stanza: Mutex::new(stanza.clone()),
            folder: folder.to_owned(),
            limit,
            owner: owner.cloned(),
            _lock: lock,
        };
        let state = this.scan()?;
        if let Some(end) = state.end() {
            tracing::info!(
                "the spool holds WAL up to {} on timeline {}, {} MiB",
                end.lsn,
                end.timeline,
                state.bytes >> 20
            );
        }
        *this.state() = state;
        Ok(Arc::new(this))
    }

    /// Of a spool that somebody else has open: its cluster, and where it ends now.
    pub fn look(stanza: Arc<Stanza>, folder: PathBuf) -> Result<Option<(Cluster, Position)>> {
        let lock = File::open(folder.join(lock::NAME)).map_err(|e| Error::io(folder.display(), e))?;
        let this = Self {
            state: Mutex::default(),
            changed: watch::channel(()).0,
            stanza: Mutex::new(stanza),
            folder,
            limit: 0,
            owner: None,
            _lock: lock,
        };
        this.last_position()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stanza(&self) -> Arc<Stanza> {
        self.stanza.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on, journals are sealed with the keys that `stanza` writes with.
    pub fn seal_with(&self, stanza: &Arc<Stanza>) {
        *self.stanza.lock().unwrap_or_else(PoisonError::into_inner) = stanza.clone();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn io(&self, doing: &str, name: &str) -> impl FnOnce(std::io::Error) -> Error {
        let what = format!("{doing} {}", self.path(name).display());
        // A repository may go away and come back, and journals in it go with it.
        let stanza = self.stanza();
        let is_in_repository = stanza.store().directory().is_some_and(|d| self.folder.starts_with(d));
        move |e| match e.kind() == std::io::ErrorKind::NotFound && is_in_repository {
            true => Error::new(Kind::Temporary, what).caused_by(e),
            false => Error::io(what, e),
        }
    }

    /// Its cluster, if it holds anything.
    pub fn cluster(&self) -> Option<Cluster> {
        self.state().cluster
    }

    /// Where it begins.
    pub fn begin(&self) -> Option<Position> {
        self.state().parts.first().map(|part| Position {
            timeline: part.timeline,
            lsn: part.start,
        })
    }

    /// The timelines of which it holds anything.
    pub fn timelines(&self) -> BTreeSet<u32> {
        self.state().parts.iter().map(|part| part.timeline).collect()
    }

    /// Whether no more comes of a timeline.
    pub fn has_ended(&self, timeline: u32) -> bool {
        self.state().ended.contains(&timeline)
    }

    /// Up to where WAL is durable here.
    pub fn end(&self) -> Option<Position> {
        self.state().end()
    }

    /// Whether more may be received. What the repository has already must not keep the rest of its segment out.
    pub fn has_room(&self) -> bool {
        let bytes = self.state().bytes;
        bytes < self.limit || self.is_stored()
    }

    /// Whether the repository has everything.
    pub fn is_stored(&self) -> bool {
        let state = self.state();
        state.end() <= state.stored
    }

    /// Whether everything was taken from it, on its way into the repository.
    pub fn is_taken(&self) -> bool {
        let state = self.state();
        state.end() <= state.taken
    }

    /// Told whenever something changes.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// No more comes of a timeline.
    pub fn end_timeline(&self, timeline: u32) {
        self.state().ended.insert(timeline);
        self.changed.send_replace(());
    }

    /// WAL up to `lsn` of `timeline` is durable in the repository: whole segments go.
    pub fn stored(&self, timeline: u32, lsn: Lsn) {
        let mut state = self.state();
        let Some(cluster) = state.cluster else { return };
        let stored = Position { timeline, lsn };
        if state.stored.is_some_and(|before| before >= stored) {
            return;
        }
        state.stored = Some(stored);
        let whole = Segment::of(timeline, lsn, cluster.segment_size).start(cluster.segment_size);
        self.release(&mut state, timeline, whole);
    }

    /// All of a timeline that has ended, at `lsn`, is durable in the repository. If it goes on after all, from another
    /// host, only segments that are complete go.
    pub fn stored_timeline(&self, timeline: u32, lsn: Lsn) {
        let mut state = self.state();
        let Some(cluster) = state.cluster else { return };
        let goes_on = |part: &Part| part.timeline == timeline && part.end > lsn;
        if !state.ended.contains(&timeline) || state.parts.iter().any(goes_on) {
            let whole = Segment::of(timeline, lsn, cluster.segment_size).start(cluster.segment_size);
            return self.release(&mut state, timeline, whole);
        }
        self.release(&mut state, timeline, lsn);
        // Nobody writes to one that was begun at the end.
        self.remove(&mut state, |part| part.timeline == timeline && part.end <= lsn);
    }

    /// Whether the spool has WAL of a timeline behind `lsn`, and not what comes there.
    pub fn has_hole(&self, at: Position) -> bool {
        let state = self.state();
        let is_behind = |part: &Part| at.lsn < part.start;
        let holds = |part: &Part| part.start <= at.lsn && at.lsn < part.end;
        let mut parts = state.parts.iter().filter(|part| part.timeline == at.timeline);
        !parts.clone().any(holds) && parts.any(is_behind)
    }

    fn release(&self, state: &mut State, timeline: u32, end: Lsn) {
        // One that was just begun ends where it begins, and is being written to.
        let gone = |part: &Part| part.timeline == timeline && part.start < end && part.end <= end;
        if !state.parts.iter().any(gone) {
            return;
        }
        if let Err(e) = self.note_released(timeline, end) {
            tracing::warn!("what is released from the spool is not noted: {e}");
        }
        self.remove(state, gone);
    }

    /// Puts aside what a timeline that was closed at `end` has beyond that.
    pub fn give_up(&self, timeline: u32, end: Lsn) -> Result<()> {
        let mut state = self.state();
        let last = state.parts.iter().rfind(|part| part.timeline == timeline);
        if let Some(last) = last.filter(|last| last.end > end) {
            tracing::error!(
                "WAL of timeline {timeline} from {end} to {} was received, and is given up: the timeline was closed",
                last.end
            );
        }
        let beyond = |part: &Part| part.timeline == timeline && part.start >= end;
        let mut given_up = 0;
        for part in state
            .parts
            .iter()
            .filter(|part| part.timeline == timeline && part.end > end)
        {
            match beyond(part) {
                true => {
                    given_up += self.len_of(part);
                    self.put_aside(part, "closed")?;
                }
                false => self.copy_aside(part, "closed")?,
            }
        }
        state.bytes = state.bytes.saturating_sub(given_up);
        state.parts.retain(|part| !beyond(part));
        // Of one that lies across, what comes before is all that counts.
        for part in state.parts.iter_mut().filter(|part| part.timeline == timeline) {
            part.end = part.end.min(end);
        }
        self.changed.send_replace(());
        Ok(())
    }

    /// Removes everything; only after all of it was stored.
    pub fn clear(&self) {
        let mut state = self.state();
        let generation = state.generation + 1;
        self.remove(&mut state, |_| true);
        *state = State {
            generation,
            ..Default::default()
        };
        self.changed.send_replace(());
    }

    fn remove(&self, state: &mut State, gone: impl Fn(&Part) -> bool) {
        let mut removed = false;
        while let Some(at) = state.parts.iter().position(&gone) {
            let path = self.path(&state.parts[at].name());
            let bytes = self.len_of(&state.parts[at]);
            // What comes after one that stays must stay as well.
            if let Err(e) = std::fs::remove_file(&path) {
                tracing::warn!("{} stays: {e}", path.display());
                break;
            }
            state.bytes = state.bytes.saturating_sub(bytes);
            state.parts.remove(at);
            removed = true;
        }
        if removed {
            self.changed.send_replace(());
        }
    }
}
