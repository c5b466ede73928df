//! The spool: received WAL on this host's disk, durable before the repository has it.
//!
//! What always holds: what was acknowledged is in synced journals (format-spec, section 14) and stays there
//! until its whole segment is in the repository; after a crash or a failed write a new journal is begun,
//! nothing is appended to an old one; a journal that does not give back what was acknowledged is an error.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use fairvault_format::header::HEADER_LEN;
use fairvault_format::journal::Journal;
use fairvault_format::object::SECTION_HEADER_LEN;
use fairvault_format::{limits, proto};
use tokio::sync::watch;

use crate::env;
use crate::error::{Context, Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment, valid_segment_size};
use crate::stanza::Stanza;

const LOCK: &str = "receiver.lock";

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

/// A journal: what it holds from `start` to `end` is durable.
#[derive(Debug, Clone)]
struct Part {
    timeline: u32,
    start: Lsn,
    end: Lsn,
}

impl Part {
    fn name(&self) -> String {
        format!("{:08X}-{:016X}.wal", self.timeline, self.start.0)
    }

    fn parse(name: &str) -> Option<Self> {
        let (timeline, start) = name.strip_suffix(".wal")?.split_once('-')?;
        let start = Lsn(u64::from_str_radix(start, 16).ok()?);
        let part = Self {
            timeline: u32::from_str_radix(timeline, 16).ok()?,
            start,
            end: start,
        };
        (part.name() == name).then_some(part)
    }
}

#[derive(Debug, Default)]
struct State {
    cluster: Option<Cluster>,
    /// In the order of their positions.
    parts: Vec<Part>,
    /// Timelines of which no more comes.
    ended: BTreeSet<u32>,
    /// Bytes on disk.
    bytes: u64,
    /// Up to where the reader has taken it.
    taken: Option<Position>,
    /// Up to where it is durable in the repository.
    stored: Option<Position>,
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
    stanza: Arc<Stanza>,
    folder: PathBuf,
    limit: u64,
    state: Mutex<State>,
    changed: watch::Sender<()>,
    _lock: File,
}

fn sync_folder(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

fn write_zeros(file: &mut File, len: u64) -> std::io::Result<()> {
    let zeros = vec![0u8; 256 << 10];
    let mut left = len;
    while left > 0 {
        let now = left.min(zeros.len() as u64);
        file.write_all(&zeros[..now as usize])?;
        left -= now;
    }
    Ok(())
}

impl Spool {
    /// Opens the spool in `folder`, which is made if it is not there. It holds `limit` bytes at most.
    pub fn open(stanza: Arc<Stanza>, folder: PathBuf, limit: u64) -> Result<Arc<Self>> {
        let what = |doing: &str| format!("{doing} the receiver's spool {}", folder.display());
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|e| Error::io(what("making"), e))?;
        let mut options = File::options();
        let lock = options.create(true).append(true).mode(0o600).open(folder.join(LOCK));
        let lock = lock.map_err(|e| Error::io(what("locking"), e))?;
        if lock.try_lock().is_err() {
            return Err(Error::new(
                Kind::Held,
                format!("another receiver of this host uses {}", folder.display()),
            )
            .remedy("one receiver a stanza and repository is enough"));
        }
        let this = Self {
            state: Mutex::default(),
            changed: watch::channel(()).0,
            stanza,
            folder,
            limit,
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

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn io(&self, doing: &str, name: &str) -> impl FnOnce(std::io::Error) -> Error {
        let what = format!("{doing} {}", self.path(name).display());
        move |e| Error::io(what, e)
    }

    /// What an earlier run left.
    fn scan(&self) -> Result<State> {
        let mut state = State::default();
        let entries = std::fs::read_dir(&self.folder).map_err(self.io("listing", ""))?;
        let mut parts: Vec<Part> = entries
            .filter_map(|entry| Part::parse(entry.ok()?.file_name().to_str()?))
            .collect();
        parts.sort_by_key(|part| (part.timeline, part.start));
        for at in 0..parts.len() {
            let mut part = parts[at].clone();
            let name = part.name();
            let next = parts.get(at + 1).filter(|next| next.timeline == part.timeline);
            let head = self.open_part(&part);
            match (head, next) {
                (Ok((mut open, cluster)), _) => {
                    match state.cluster {
                        Some(known) if known != cluster => return Err(self.damaged(&name, "it is of another cluster")),
                        _ => state.cluster = Some(cluster),
                    }
                    // What lies before the next one was acknowledged; of the last, whatever opens.
                    part.end = match next {
                        Some(next) => next.start,
                        None => {
                            while open.section()?.is_some() {}
                            open.at
                        }
                    };
                }
                // It was begun when the machine died: nothing of it was acknowledged.
                (Err(error), None) if error.kind() == Kind::Damaged => {
                    tracing::warn!("{name} is empty: {error}");
                    std::fs::remove_file(self.path(&name)).map_err(self.io("removing", &name))?;
                    continue;
                }
                (Err(error), _) => return Err(error),
            }
            state.bytes += std::fs::metadata(self.path(&name)).map_or(0, |meta| meta.len());
            state.parts.push(part);
        }
        if let Some(newest) = state.parts.last().map(|part| part.timeline) {
            let older = state.parts.iter().map(|part| part.timeline).filter(|&t| t < newest);
            state.ended = older.collect();
        }
        Ok(state)
    }

    fn damaged(&self, name: &str, why: impl std::fmt::Display) -> Error {
        Error::damaged(format!("{}: {why}", self.path(name).display())).remedy(
            "WAL that was acknowledged may be lost here. Keep the folder, move it out of the way, and start again: \
             what the server still has is received anew, and what is missing is said; then take a new backup",
        )
    }

    fn open_part(&self, part: &Part) -> Result<(OpenPart, Cluster)> {
        let name = part.name();
        let mut file = File::open(self.path(&name)).map_err(self.io("reading", &name))?;
        let mut header = [0u8; HEADER_LEN];
        let read = file.read_exact(&mut header);
        read.map_err(|_| self.damaged(&name, "it ends inside its header"))?;
        let keys = self.stanza.keys_for(&header, &name)?;
        let journal = Journal::open(keys, self.stanza.scope(), &header, &name)?;
        let mut open = OpenPart {
            file,
            journal,
            at: part.start,
            name: part.name(),
        };
        let bytes = open.read_section()?;
        let head = match bytes {
            Some(bytes) => open.journal.head(&bytes)?,
            None => return Err(self.damaged(&name, "it ends inside its first section")),
        };
        let is_it = head.timeline == part.timeline && head.start_lsn == part.start.0;
        if !is_it || !valid_segment_size(head.segment_size) {
            return Err(self.damaged(&name, "its head is of another journal"));
        }
        let cluster = Cluster {
            system_identifier: head.system_identifier,
            segment_size: head.segment_size,
        };
        Ok((open, cluster))
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

    /// Up to where WAL is durable here.
    pub fn end(&self) -> Option<Position> {
        self.state().end()
    }

    /// Whether more may be received.
    pub fn has_room(&self) -> bool {
        self.state().bytes < self.limit
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

    /// Keeps a history file.
    pub fn put_history(&self, timeline: u32, content: &[u8]) -> Result<()> {
        let name = format!("{timeline:08X}.history");
        if std::fs::read(self.path(&name)).is_ok_and(|there| there == content) {
            return Ok(());
        }
        let temporary = self.path(&format!("{name}.tmp"));
        let write = || -> std::io::Result<()> {
            let mut options = File::options();
            let mut file = options
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(content)?;
            file.sync_all()?;
            std::fs::rename(&temporary, self.path(&name))?;
            sync_folder(&self.folder)
        };
        write().map_err(self.io("writing", &name))
    }

    /// The history of a timeline: content, and what it says.
    pub fn history(&self, timeline: u32) -> Result<Option<(Vec<u8>, History)>> {
        let name = format!("{timeline:08X}.history");
        match std::fs::read(self.path(&name)) {
            Ok(content) => {
                let history = History::parse(timeline, &content).context(|| self.path(&name).display().to_string())?;
                Ok(Some((content, history)))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.io("reading", &name)(e)),
        }
    }

    /// WAL up to `lsn` of `timeline` is durable in the repository: whole segments, and timelines before, go.
    pub fn stored(&self, timeline: u32, lsn: Lsn) {
        let mut state = self.state();
        let Some(cluster) = state.cluster else { return };
        let stored = Position { timeline, lsn };
        if state.stored.is_some_and(|before| before >= stored) {
            return;
        }
        state.stored = Some(stored);
        let whole = Segment::of(timeline, lsn, cluster.segment_size).start(cluster.segment_size);
        self.remove(&mut state, |part| {
            part.timeline < timeline || (part.timeline == timeline && part.end <= whole)
        });
    }

    /// All of a timeline that has ended is durable in the repository.
    pub fn stored_timeline(&self, timeline: u32) {
        let mut state = self.state();
        self.remove(&mut state, |part| part.timeline <= timeline);
    }

    /// Removes everything; only after all of it was stored.
    pub fn clear(&self) {
        let mut state = self.state();
        self.remove(&mut state, |_| true);
        *state = State::default();
    }

    fn remove(&self, state: &mut State, gone: impl Fn(&Part) -> bool) {
        let (old, kept): (Vec<Part>, Vec<Part>) = state.parts.drain(..).partition(gone);
        state.parts = kept;
        for part in &old {
            let path = self.path(&part.name());
            let bytes = std::fs::metadata(&path).map_or(0, |meta| meta.len());
            match std::fs::remove_file(&path) {
                Ok(()) => state.bytes = state.bytes.saturating_sub(bytes),
                Err(e) => tracing::warn!("{} stays: {e}", path.display()),
            }
        }
        if !old.is_empty() {
            self.changed.send_replace(());
        }
    }

    /// Goes on with WAL at `from`, in a new journal. `fast` has journals written full of zeros first: then a sync
    /// has no change of a file's size to wait for.
    pub fn writer(self: &Arc<Self>, cluster: Cluster, from: Position, fast: bool) -> Result<Writer> {
        // The segment that is received stays until it is stored as a whole, and there must be more room.
        let least = 3 * cluster.segment_size;
        if self.limit < least {
            return Err(Error::usage(format!(
                "the spool may hold {} MiB, and needs {} at least: three segments",
                self.limit >> 20,
                least >> 20
            )));
        }
        self.state().cluster = Some(cluster);
        Ok(Writer {
            spool: self.clone(),
            cluster,
            at: from,
            fast,
            open: None,
        })
    }

    /// Reads from `from` on.
    pub fn reader(self: &Arc<Self>, from: Position) -> Reader {
        let changes = self.changes();
        Reader {
            spool: self.clone(),
            at: from,
            open: None,
            changes,
        }
    }
}

/// A journal that is being read.
struct OpenPart {
    file: File,
    journal: Journal,
    /// Position of the next section.
    at: Lsn,
    name: String,
}

impl OpenPart {
    /// The next section as it is stored; `None` where there is no whole one.
    fn read_section(&mut self) -> Result<Option<Vec<u8>>> {
        let failed = |e: std::io::Error| Error::io(format_args!("reading {}", self.name), e);
        let at = self.file.stream_position().map_err(failed)?;
        let mut bytes = vec![0u8; SECTION_HEADER_LEN];
        let whole = match self.file.read_exact(&mut bytes) {
            Ok(()) => match self.journal.section_len(&bytes) {
                Ok(len) => {
                    bytes.resize(len, 0);
                    self.file.read_exact(&mut bytes[SECTION_HEADER_LEN..])
                }
                Err(_) => return Ok(None),
            },
            Err(e) => Err(e),
        };
        match whole {
            Ok(()) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                let back = self.file.seek(SeekFrom::Start(at));
                back.map_err(|e| Error::io(format_args!("reading {}", self.name), e))?;
                Ok(None)
            }
            Err(e) => Err(Error::io(format_args!("reading {}", self.name), e)),
        }
    }

    /// The next section's WAL and its position; `None` where nothing opens.
    fn section(&mut self) -> Result<Option<(Lsn, Vec<u8>)>> {
        let Some(bytes) = self.read_section()? else {
            return Ok(None);
        };
        let Ok(content) = self.journal.content(&bytes) else {
            return Ok(None);
        };
        let at = self.at;
        self.at = Lsn(at.0 + content.len() as u64);
        Ok(Some((at, content)))
    }
}

/// A journal that is being written.
struct OpenJournal {
    file: File,
    journal: Journal,
    /// Bytes that were written.
    len: u64,
    /// Bytes of the file, zeros at its end included.
    reserved: u64,
}

/// Appends to the spool. After an error it is of no use: nothing may follow what could be torn.
pub struct Writer {
    spool: Arc<Spool>,
    cluster: Cluster,
    at: Position,
    fast: bool,
    open: Option<OpenJournal>,
}

impl Writer {
    /// Where it is.
    pub fn at(&self) -> Position {
        self.at
    }

    /// Appends what was received, and syncs it: then it counts. It blocks.
    pub fn append(&mut self, received: &[Bytes]) -> Result<()> {
        let size = self.cluster.segment_size;
        for bytes in received {
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let left = (size - self.at.lsn.0 % size) as usize;
                let (now, later) = rest.split_at(rest.len().min(left).min(limits::JOURNAL_SECTION_BYTES));
                self.write(now)?;
                rest = later;
            }
        }
        self.sync()
    }

    fn write(&mut self, content: &[u8]) -> Result<()> {
        let at_segment = self.at.lsn.0.is_multiple_of(self.cluster.segment_size);
        let is_full = self.open.as_ref().is_none_or(|open| open.journal.is_full());
        if at_segment || is_full {
            self.begin()?;
        }
        let Some(open) = &mut self.open else {
            return Err(Error::failed("the spool has no journal to write to"));
        };
        let sealed = open.journal.seal(content)?;
        open.file
            .write_all(&sealed)
            .map_err(|e| Error::io(format_args!("writing to the spool {}", self.spool.folder.display()), e))?;
        self.at.lsn.0 += content.len() as u64;
        open.len += sealed.len() as u64;
        let more = open.len.saturating_sub(open.reserved);
        open.reserved += more;
        self.spool.state().bytes += more;
        Ok(())
    }

    /// Begins a journal here.
    fn begin(&mut self) -> Result<()> {
        self.sync()?;
        let spool = self.spool.clone();
        let part = Part {
            timeline: self.at.timeline,
            start: self.at.lsn,
            end: self.at.lsn,
        };
        let name = part.name();
        let head = proto::WalHeader {
            name: Segment::of(part.timeline, part.start, self.cluster.segment_size).name(self.cluster.segment_size),
            system_identifier: self.cluster.system_identifier,
            timeline: part.timeline,
            start_lsn: part.start.0,
            segment_size: self.cluster.segment_size,
            ..Default::default()
        };
        let stanza = &spool.stanza;
        let salt = env::salt(stanza.env())?;
        let (journal, bytes) = Journal::begin(stanza.keys(), stanza.scope(), salt, &name, &head)?;
        // One that is there under this name holds nothing that counts.
        // The rest of the segment, and what sections take around it.
        let size = self.cluster.segment_size;
        let left = size - self.at.lsn.0 % size;
        let reserved = if self.fast { left + left / 16 } else { 0 };
        let replaced = std::fs::metadata(spool.path(&name)).map_or(0, |meta| meta.len());
        {
            let mut state = spool.state();
            state.parts.retain(|there| there.name() != name);
            state.bytes = state.bytes.saturating_sub(replaced);
        }
        let create = || -> std::io::Result<File> {
            let _ = std::fs::remove_file(spool.path(&name));
            let mut options = File::options();
            let mut file = options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(spool.path(&name))?;
            if reserved > 0 {
                write_zeros(&mut file, reserved)?;
                file.sync_all()?;
                file.rewind()?;
            }
            file.write_all(&bytes)?;
            sync_folder(&spool.folder)?;
            Ok(file)
        };
        let file = create().map_err(spool.io("writing", &name))?;
        let len = bytes.len() as u64;
        let reserved = reserved.max(len);
        let mut state = spool.state();
        state.bytes += reserved;
        state.parts.push(part);
        self.open = Some(OpenJournal {
            file,
            journal,
            len,
            reserved,
        });
        Ok(())
    }

    /// What was written counts from here on.
    fn sync(&mut self) -> Result<()> {
        let Some(open) = &self.open else { return Ok(()) };
        open.file
            .sync_data()
            .map_err(|e| Error::io(format_args!("syncing the spool {}", self.spool.folder.display()), e))?;
        let mut state = self.spool.state();
        if let Some(part) = state.parts.last_mut() {
            part.end = self.at.lsn;
        }
        drop(state);
        self.spool.changed.send_replace(());
        Ok(())
    }
}

/// Reads the spool in order, and waits where it ends.
pub struct Reader {
    spool: Arc<Spool>,
    at: Position,
    open: Option<OpenPart>,
    changes: watch::Receiver<()>,
}

impl Reader {
    /// The next bytes and where they begin; `None` once the timeline has ended. Cancelling it loses nothing.
    pub async fn next(&mut self) -> Result<Option<(Lsn, Bytes)>> {
        loop {
            self.changes.borrow_and_update();
            if let Some(found) = self.take()? {
                return Ok(Some(found));
            }
            if self.spool.state().ended.contains(&self.at.timeline) {
                return Ok(None);
            }
            if self.changes.changed().await.is_err() {
                return Ok(None);
            }
        }
    }

    fn take(&mut self) -> Result<Option<(Lsn, Bytes)>> {
        let at = self.at;
        let part = {
            let mut state = self.spool.state();
            state.taken = state.taken.max(Some(at));
            let holds = |part: &&Part| part.timeline == at.timeline && part.start <= at.lsn && at.lsn < part.end;
            match state.parts.iter().find(holds) {
                Some(part) => part.clone(),
                None => return Ok(None),
            }
        };
        let name = part.name();
        if self
            .open
            .as_ref()
            .is_none_or(|open| open.name != name || open.at > at.lsn)
        {
            self.open = Some(self.spool.open_part(&part)?.0);
        }
        let Some(open) = &mut self.open else { return Ok(None) };
        loop {
            let Some((start, content)) = open.section()? else {
                let end = part.end;
                let why = format!("it cannot be read beyond {}, and was written up to {end}", open.at);
                return Err(self.spool.damaged(&name, why));
            };
            // Behind its end there may be what did not count.
            let (from, to) = (at.lsn.max(start), open.at.min(part.end));
            if from >= to {
                continue;
            }
            let bytes = Bytes::from(content).slice((from.0 - start.0) as usize..(to.0 - start.0) as usize);
            self.at.lsn = to;
            return Ok(Some((from, bytes)));
        }
    }

    /// The repository has WAL up to `lsn`.
    pub fn stored(&self, lsn: Lsn) {
        self.spool.stored(self.at.timeline, lsn);
    }

    /// The repository has all of this timeline.
    pub fn stored_timeline(&self) {
        self.spool.stored_timeline(self.at.timeline);
    }
}
