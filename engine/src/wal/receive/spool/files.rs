//! The files of a spool: journals and histories, and what is made of those that an earlier run left.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use fairvault_format::header::HEADER_LEN;
use fairvault_format::journal::Journal;
use fairvault_format::object::SECTION_HEADER_LEN;
use fairvault_format::proto;

use super::{Cluster, Position, Spool, State, sync_folder};
use crate::env;
use crate::error::{Context, Error, Kind, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::{History, Segment, valid_segment_size};
use crate::store::owner;

/// Names up to where whole segments were released: what a release that died has left goes at the next start.
const RELEASED: &str = "released";
/// What a journal begins with lies within its first bytes; content may lie behind them.
const HEAD_BYTES: usize = 4096;

/// A journal: what it holds from `start` to `end` is durable.
#[derive(Debug, Clone)]
pub struct Part {
    pub timeline: u32,
    pub start: Lsn,
    pub end: Lsn,
}

impl Part {
    /// Its file name.
    pub fn name(&self) -> String {
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

/// A journal that is being read.
pub struct OpenPart {
    file: File,
    journal: Journal,
    /// Position of the next section.
    pub at: Lsn,
    /// Its file name.
    pub name: String,
}

impl OpenPart {
    fn failed(&self) -> impl FnOnce(std::io::Error) -> Error {
        let what = format!("reading {}", self.name);
        move |e| Error::io(what, e)
    }

    /// The next section as it is stored; `None` where there is no whole one.
    fn read_section(&mut self) -> Result<Option<Vec<u8>>> {
        let at = self.file.stream_position().map_err(self.failed())?;
        let mut bytes = vec![0u8; SECTION_HEADER_LEN];
        let whole = match self.file.read_exact(&mut bytes) {
            Ok(()) => match self.journal.section_len(&bytes) {
                Ok(len) => {
                    bytes.resize(len, 0);
                    self.file.read_exact(&mut bytes[SECTION_HEADER_LEN..])
                }
                Err(_) => Err(std::io::ErrorKind::UnexpectedEof.into()),
            },
            Err(e) => Err(e),
        };
        match whole {
            Ok(()) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                self.file.seek(SeekFrom::Start(at)).map_err(self.failed())?;
                Ok(None)
            }
            Err(e) => Err(self.failed()(e)),
        }
    }

    /// The next section's WAL and its position; `None` where nothing opens.
    pub fn section(&mut self) -> Result<Option<(Lsn, Vec<u8>)>> {
        let Some(bytes) = self.read_section()? else {
            return Ok(None);
        };
        let Ok(content) = self.journal.content(&bytes) else {
            let back = -(bytes.len() as i64);
            self.file.seek(SeekFrom::Current(back)).map_err(self.failed())?;
            return Ok(None);
        };
        let at = self.at;
        self.at = Lsn(at.0 + content.len() as u64);
        Ok(Some((at, content)))
    }
}

impl Spool {
    /// The journals that are there, in order.
    fn parts(&self) -> Result<Vec<Part>> {
        let entries = std::fs::read_dir(&self.folder).map_err(self.io("listing", ""))?;
        let mut parts: Vec<Part> = entries
            .filter_map(|entry| Part::parse(entry.ok()?.file_name().to_str()?))
            .collect();
        parts.sort_by_key(|part| (part.timeline, part.start));
        Ok(parts)
    }

    /// Where the last journal ends, as far as it opens; nothing is changed.
    pub(super) fn last_position(&self) -> Result<Option<(Cluster, Position)>> {
        for part in self.parts()?.iter().rev() {
            // One that was only begun holds nothing yet.
            let Ok((mut open, cluster)) = self.open_part(part) else {
                continue;
            };
            while open.section()?.is_some() {}
            if open.at > part.start {
                let (timeline, lsn) = (part.timeline, open.at);
                return Ok(Some((cluster, Position { timeline, lsn })));
            }
        }
        Ok(None)
    }

    /// What an earlier run left. The last journal of a timeline is written anew: what is read of it may never have
    /// been synced, and counts only once it is.
    pub(super) fn scan(&self) -> Result<State> {
        let mut state = State::default();
        let parts = self.parts()?;
        for at in 0..parts.len() {
            let mut part = parts[at].clone();
            let next = parts.get(at + 1).filter(|next| next.timeline == part.timeline);
            if let Ok((_, cluster)) = self.open_part(&part) {
                match state.cluster {
                    Some(known) if known != cluster => {
                        return Err(self.damaged(&part.name(), "it is of another cluster"));
                    }
                    _ => state.cluster = Some(cluster),
                }
            }
            part.end = match next {
                // What lies before the next one was acknowledged; whether it opens is seen when it is read.
                Some(next) => next.start,
                None => match self.renew(&part)? {
                    Some(end) => end,
                    None => continue,
                },
            };
            state.bytes += self.len_of(&part);
            state.parts.push(part);
        }
        sync_folder(&self.folder).map_err(self.io("syncing", ""))?;
        self.finish_release(&mut state)?;
        if let Some(newest) = state.parts.last().map(|part| part.timeline) {
            let older = state.parts.iter().map(|part| part.timeline).filter(|&t| t < newest);
            state.ended = older.collect();
        }
        Ok(state)
    }

    pub(super) fn len_of(&self, part: &Part) -> u64 {
        std::fs::metadata(self.path(&part.name())).map_or(0, |meta| meta.len())
    }

    /// Writes the last journal of a timeline anew, as far as it opens; returns where it ends. One that was only
    /// begun is put aside.
    fn renew(&self, part: &Part) -> Result<Option<Lsn>> {
        let name = part.name();
        let bytes = std::fs::read(self.path(&name)).map_err(self.io("reading", &name))?;
        let (mut open, cluster) = match self.open_part(part) {
            Ok(opened) => opened,
            Err(error) => {
                let has_more = bytes.iter().skip(HEAD_BYTES).any(|&byte| byte != 0);
                if has_more || error.kind() != Kind::Damaged {
                    return Err(self.damaged(&name, error));
                }
                tracing::warn!("{name} was only begun, and is put aside: {error}");
                self.put_aside(part, "begun")?;
                return Ok(None);
            }
        };
        let temporary = format!("{name}.tmp");
        let (mut journal, head) = self.begin_journal(cluster, part)?;
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(self.path(&temporary));
        let mut file = file.map_err(self.io("writing", &temporary))?;
        file.write_all(&head).map_err(self.io("writing", &temporary))?;
        while let Some((_, content)) = open.section()? {
            let sealed = journal.seal(&content)?;
            file.write_all(&sealed).map_err(self.io("writing", &temporary))?;
        }
        let read = open.file.stream_position().map_err(self.io("reading", &name))? as usize;
        let rest = bytes.iter().skip(read).filter(|&&byte| byte != 0).count();
        if rest > 0 {
            tracing::warn!(
                "{name} ends at {}: what lies behind it ({rest} bytes) does not open, as after a write that was not finished",
                open.at
            );
        }
        let put_in_place = || -> std::io::Result<()> {
            file.sync_all()?;
            std::fs::rename(self.path(&temporary), self.path(&name))
        };
        put_in_place().map_err(self.io("writing", &name))?;
        Ok(Some(open.at))
    }

    /// Keeps a journal out of the way, for a person to look at.
    pub(super) fn put_aside(&self, part: &Part, why: &str) -> Result<()> {
        let name = part.name();
        let aside = self.path(&format!("{name}.{why}"));
        std::fs::rename(self.path(&name), aside).map_err(self.io("putting aside", &name))
    }

    /// The same for one that is needed as well.
    pub(super) fn copy_aside(&self, part: &Part, why: &str) -> Result<()> {
        let name = part.name();
        match std::fs::hard_link(self.path(&name), self.path(&format!("{name}.{why}"))) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(self.io("putting aside", &name)(e)),
            _ => Ok(()),
        }
    }

    /// Removes what a release that died half-way has left.
    fn finish_release(&self, state: &mut State) -> Result<()> {
        let path = self.path(RELEASED);
        if !path.exists() {
            let made = self.note_released(0, Lsn(0));
            return made.map_err(self.io("writing", RELEASED));
        }
        let text = std::fs::read_to_string(path).map_err(self.io("reading", RELEASED))?;
        let released = text.trim().split_once(' ').and_then(|(timeline, lsn)| {
            let lsn = u64::from_str_radix(lsn, 16).ok()?;
            Some((u32::from_str_radix(timeline, 16).ok()?, Lsn(lsn)))
        });
        if let Some((timeline, lsn)) = released {
            self.remove(state, |part| part.timeline == timeline && part.end <= lsn);
        }
        Ok(())
    }

    /// Remembers what is about to be released. In place, so that a full disk is no reason to keep it full.
    pub(super) fn note_released(&self, timeline: u32, lsn: Lsn) -> std::io::Result<()> {
        let mut options = File::options();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(self.path(RELEASED))?;
        file.write_all_at(format!("{timeline:08X} {:016X}\n", lsn.0).as_bytes(), 0)
    }

    /// A new journal for a part, and the bytes that it begins with.
    pub(super) fn begin_journal(&self, cluster: Cluster, part: &Part) -> Result<(Journal, Vec<u8>)> {
        let size = cluster.segment_size;
        let head = proto::WalHeader {
            name: Segment::of(part.timeline, part.start, size).name(size),
            system_identifier: cluster.system_identifier,
            timeline: part.timeline,
            start_lsn: part.start.0,
            segment_size: size,
            ..Default::default()
        };
        let stanza = self.stanza();
        let salt = env::salt(stanza.env())?;
        Ok(Journal::begin(
            stanza.keys(),
            stanza.scope(),
            salt,
            &part.name(),
            &head,
        )?)
    }

    pub(super) fn damaged(&self, name: &str, why: impl std::fmt::Display) -> Error {
        Error::damaged(format!("{}: {why}", self.path(name).display())).remedy(
            "WAL that was acknowledged may be lost here. Keep the folder, move it out of the way, and start again: \
             what the server still has is received anew, and what is missing is said; then take a new backup",
        )
    }

    /// Opens a journal for reading.
    pub(super) fn open_part(&self, part: &Part) -> Result<(OpenPart, Cluster)> {
        let name = part.name();
        let mut file = File::open(self.path(&name)).map_err(self.io("reading", &name))?;
        let mut header = [0u8; HEADER_LEN];
        let read = file.read_exact(&mut header);
        read.map_err(|_| self.damaged(&name, "it ends inside its header"))?;
        let stanza = self.stanza();
        let journal = Journal::open(stanza.keys_for(&header, &name)?, stanza.scope(), &header, &name)?;
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

    /// Keeps a history file. Another one under its timeline is of another server.
    pub fn put_history(&self, timeline: u32, content: &[u8]) -> Result<()> {
        let name = format!("{timeline:08X}.history");
        match std::fs::read(self.path(&name)) {
            Ok(there) if there == content => return Ok(()),
            Ok(_) if self.timelines().contains(&timeline) => {
                return Err(Error::refused(format!(
                    "the server's history of timeline {timeline} is not the one that the spool has: two servers were \
                     promoted to one timeline"
                ))
                .remedy("connect to the right one; or move the spool's folder out of the way, and keep it"));
            }
            _ => {}
        }
        let temporary = self.path(&format!("{name}.tmp"));
        let write = || -> std::io::Result<()> {
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&temporary)?;
            file.write_all(content)?;
            file.sync_all()?;
            std::fs::rename(&temporary, self.path(&name))?;
            sync_folder(&self.folder)
        };
        owner::write(self.owner.as_ref(), write, super::may_not).map_err(self.io("writing", &name))
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
}
