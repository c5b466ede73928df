//! The `sql` source: byte ranges of files over several ordinary connections, in parallel, between `pg_backup_start`
//! and `pg_backup_stop`.
//!
//! What always holds: the server lists its files after backup mode has begun; each range comes with its number, and
//! is put where it belongs; a file that vanished is left out, a range that is shorter than it was is padded with
//! zeros; `pg_control` is read last.

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use fairvault_format::limits::CHUNK_BYTES;
use fairvault_format::proto::{self, FileKind};
use tokio::task::JoinSet;

use super::again::{READS, torn};
use super::backup_mode::{BackupMode, CONTROL_READS, finish};
use super::copy_rows::Rows;
use super::pace::Pace;
use super::stream::Ended;
use super::walk::{CONTROL, EMPTY, is_left_out};
use super::{Chunk, Entry, Feed, Outlet, Reading, Run, Wanted};
use crate::error::{Error, Result};
use crate::postgres::BLOCK_BYTES;
use crate::postgres::control::ControlFile;
use crate::postgres::files::relation_file;
use crate::postgres::lsn::Lsn;
use crate::replication::connection::{Connection, grants, quote_text};
use crate::replication::conninfo::ConnInfo;

/// Bytes that one query asks for.
const QUERY_BYTES: u64 = 4 << 20;
/// Ranges that one query asks for.
const QUERY_RANGES: usize = 512;

/// A server in backup mode, and how to reach it again.
pub struct Sql {
    session: BackupMode,
    /// Tablespaces for the manifest.
    pub listed: Vec<proto::Tablespace>,
    version_folder: String,
    /// Mode of folders; files have the same without execution.
    mode: u32,
    readers: Vec<Connection>,
    pace: Arc<Pace>,
    checksums: bool,
}

/// A file as the server lists it.
struct Listed {
    path: String,
    size: u64,
    is_folder: bool,
    mtime_us: i64,
}

impl Sql {
    /// Looks for tablespaces. The server is in backup mode.
    pub async fn open(mut session: BackupMode, info: ConnInfo, mode: u32, reading: Reading) -> Result<Self> {
        let version_folder = session.version_folder().await?;
        let query =
            "SELECT oid, pg_tablespace_location(oid) FROM pg_tablespace WHERE oid NOT IN (1663, 1664) ORDER BY oid";
        let mut listed = Vec::new();
        for row in session.connection.query(query).await? {
            let mut row = row.into_iter();
            let oid = row.next().flatten().and_then(|text| text.parse().ok());
            let location = row.next().flatten().unwrap_or_default();
            let oid = oid.ok_or_else(|| Error::failed("the server lists a tablespace without an oid"))?;
            let in_place = !location.starts_with('/');
            listed.push(proto::Tablespace {
                oid,
                location: if in_place { String::new() } else { location },
                in_place,
            });
        }
        let mut readers = Vec::new();
        for _ in 0..reading.readers {
            readers.push(reader(&info, &mut session).await?);
        }
        Ok(Self {
            session,
            listed,
            version_folder,
            mode,
            readers,
            pace: Arc::new(Pace::new(reading.rate)),
            checksums: reading.checksums,
        })
    }

    /// Start LSN.
    pub fn start(&self) -> Lsn {
        self.session.start
    }

    /// Timeline of the start.
    pub fn timeline(&self) -> u32 {
        self.session.timeline
    }

    /// Reads everything and ends backup mode.
    pub async fn read(self, feed: &mut Feed) -> Result<Ended> {
        let Self {
            mut session,
            listed,
            version_folder,
            mode,
            readers: connections,
            pace,
            checksums,
        } = self;
        let has_summaries = session.connection.major() >= 17;
        let found = list(&mut session.connection, &listed, &version_folder).await?;
        let wanted: Vec<Wanted> = found.iter().map(|f| feed.selection().of(&f.path, f.size)).collect();
        feed.total(found.iter().zip(&wanted).map(|(f, wanted)| wanted.bytes(f.size)).sum());
        let mut files = Vec::new();
        for (file, wanted) in found.iter().zip(wanted) {
            let number = feed.entry(Entry {
                wanted: wanted.clone(),
                ..entry(file, mode)
            });
            if file.path == "pg_wal" {
                for inner in ["archive_status"]
                    .into_iter()
                    .chain(has_summaries.then_some("summaries"))
                {
                    feed.entry(Entry {
                        path: format!("pg_wal/{inner}"),
                        ..entry(file, mode)
                    });
                }
            }
            if !file.is_folder {
                files.push(File {
                    number,
                    path: file.path.as_str().into(),
                    size: file.size,
                    chunks: match is_whole(&file.path, file.size) {
                        true => Chunks::Whole,
                        false => Chunks::Of(wanted.chunks(file.size)),
                    },
                });
            }
        }
        let queue = Arc::new(Queue::new(files, checksums));
        let mut readers = JoinSet::new();
        for connection in connections {
            readers.spawn(read_ranges(connection, queue.clone(), feed.outlet(), pace.clone()));
        }
        while let Some(done) = readers.join_next().await {
            done.map_err(|e| Error::failed("a reader panicked").caused_by(e))??;
        }
        let ended = queue.ended();
        feed.left_out(&ended.vanished);
        feed.resize(&ended.sizes);
        let content = control(&mut session.connection).await?;
        let control = Entry {
            path: CONTROL.to_owned(),
            kind: FileKind::FileRegular,
            size: content.len() as u64,
            mode: 0o600,
            mtime_us: 0,
            link_target: String::new(),
            is_gone: false,
            wanted: Wanted::All,
        };
        finish(session, feed, control, content).await
    }
}

/// Another connection to the very server that is in backup mode: with several hosts, or behind a balancer, it may
/// reach another one, whose files are of another moment.
async fn reader(info: &ConnInfo, session: &mut BackupMode) -> Result<Connection> {
    let own = "SELECT pg_backend_pid() || ' ' || extract(epoch FROM backend_start) FROM pg_stat_activity WHERE pid = pg_backend_pid()";
    let token = session.connection.value(own).await?.unwrap_or_default();
    let mut connection = BackupMode::connect(info).await?;
    let query = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE pid || ' ' || extract(epoch FROM backend_start) = {}",
        quote_text(&token)
    );
    match connection.value(&query).await?.as_deref() {
        Some("1") if !token.is_empty() => Ok(connection),
        _ => Err(
            Error::refused("a connection for reading reached another server than the one in backup mode")
                .remedy("name one host in conninfo, and do not connect through a balancer or a pooler"),
        ),
    }
}

/// Files that WAL does not make right are read as a whole, with the length that they have then: they may be replaced
/// meanwhile.
fn is_whole(path: &str, size: u64) -> bool {
    size <= u64::from(CHUNK_BYTES) && relation_file(path).is_none()
}

fn entry(file: &Listed, mode: u32) -> Entry {
    // A server's key, for one, must be nobody else's.
    let file_mode = match relation_file(&file.path) {
        Some(_) => mode & 0o666,
        None => 0o600,
    };
    Entry {
        path: file.path.clone(),
        kind: if file.is_folder {
            FileKind::FileDirectory
        } else {
            FileKind::FileRegular
        },
        size: if file.is_folder { 0 } else { file.size },
        mode: if file.is_folder { mode } else { file_mode },
        mtime_us: file.mtime_us,
        link_target: String::new(),
        is_gone: false,
        wanted: Wanted::All,
    }
}

/// Everything that belongs to a backup, `pg_control` not among it.
async fn list(
    connection: &mut Connection,
    tablespaces: &[proto::Tablespace],
    version_folder: &str,
) -> Result<Vec<Listed>> {
    let empty = EMPTY.map(quote_text).join(", ");
    // What is below other folders of a tablespace is another server's.
    let query = format!(
        "WITH RECURSIVE f (path, is_folder, size, mtime) AS ( \
           SELECT name, s.isdir, s.size, s.modification FROM pg_ls_dir('.', true, false) name, pg_stat_file(name, true) s \
           UNION ALL \
           SELECT f.path || '/' || name, s.isdir, s.size, s.modification \
           FROM f, pg_ls_dir(f.path, true, false) name, pg_stat_file(f.path || '/' || name, true) s \
           WHERE f.is_folder AND f.path NOT IN ({empty}) AND f.path !~ '^([^/]+/){{6}}' \
             AND (f.path !~ '^pg_tblspc/[0-9]+$' OR name = {}) ) \
         SELECT path, is_folder, size, (extract(epoch FROM mtime) * 1000000)::bigint FROM f WHERE size IS NOT NULL ORDER BY path",
        quote_text(version_folder)
    );
    let rows = connection.query(&query).await.map_err(grants)?;
    let mut found = Vec::with_capacity(rows.len());
    for row in rows {
        let field = |at: usize| row.get(at).and_then(Option::as_deref).unwrap_or_default();
        let bad = || Error::failed(format!("the server lists {:?} in a strange way", field(0)));
        if field(0).contains('\u{FFFD}') {
            return Err(
                Error::refused(format!("{} has a name that is not UTF-8", field(0))).remedy("use --source stream")
            );
        }
        found.push(Listed {
            path: field(0).to_owned(),
            is_folder: field(1) == "t",
            size: field(2).parse().map_err(|_| bad())?,
            mtime_us: field(3).parse().map_err(|_| bad())?,
        });
    }
    for file in &found {
        super::stream::check_path(&file.path)?;
    }
    let inits = found.iter().filter_map(|file| file.path.strip_suffix("_init"));
    let unlogged: HashSet<String> = inits.map(str::to_owned).collect();
    // Links of tablespaces are described by the list of tablespaces; one that was made since then is made by WAL.
    let belongs = |path: &str| {
        let Some(below) = path.strip_prefix("pg_tblspc/") else {
            return true;
        };
        let (oid, is_itself) = below.split_once('/').map_or((below, true), |(oid, _)| (oid, false));
        let known = tablespaces.iter().find(|t| t.oid.to_string() == oid);
        known.is_some_and(|t| t.in_place || !is_itself)
    };
    let mut left_out: Vec<String> = Vec::new();
    found.retain(|file| {
        let (folder, name) = file.path.rsplit_once('/').unwrap_or(("", &file.path));
        let is_unlogged = |relation: &str| unlogged.contains(&format!("{folder}/{relation}"));
        let is_below = left_out.iter().any(|out| {
            file.path
                .strip_prefix(out.as_str())
                .is_some_and(|rest| rest.starts_with('/'))
        });
        let out = is_below || is_left_out(&file.path, name, &is_unlogged) || file.path == CONTROL;
        if out && file.is_folder && !is_below {
            left_out.push(file.path.clone());
        }
        !out && belongs(&file.path)
    });
    Ok(found)
}

/// Chunks that nobody has asked for yet.
struct Queue {
    left: Mutex<Left>,
    ended: Mutex<Ends>,
    /// Pages that are wrong are asked for again.
    checksums: bool,
}

/// What became of files other than what was listed.
#[derive(Default)]
struct Ends {
    /// They are gone.
    vanished: Vec<u32>,
    /// They have another length.
    sizes: Vec<(u32, u64)>,
}

struct Left {
    files: std::vec::IntoIter<File>,
    current: Option<File>,
    /// To be asked for once more.
    again: Vec<Asked>,
}

/// A file, and what nobody has asked for yet of it.
struct File {
    number: u32,
    path: Arc<str>,
    /// As it was listed, bytes.
    size: u64,
    chunks: Chunks,
}

enum Chunks {
    /// All of it, however long it is by now.
    Whole,
    /// These.
    Of(super::wanted::Chunks),
    /// No more.
    None,
}

/// A chunk that a query asks for, a row for each of its runs.
struct Asked {
    number: u32,
    path: Arc<str>,
    runs: Box<[Run]>,
    whole: bool,
    /// How much is likely to come, bytes: a file that is asked for as a whole may be small.
    likely: u64,
    /// What came, while rows are missing.
    content: Vec<u8>,
    missing: usize,
    /// How often it was asked for before.
    before: usize,
}

impl Asked {
    /// The same once more.
    fn again(&self) -> Self {
        Self {
            number: self.number,
            path: self.path.clone(),
            missing: self.runs.len(),
            runs: self.runs.clone(),
            whole: self.whole,
            likely: self.likely,
            content: Vec::new(),
            before: self.before + 1,
        }
    }

    fn len(&self) -> usize {
        self.runs.iter().map(|run| run.len as usize).sum()
    }
}

impl File {
    fn next(&mut self) -> Option<Asked> {
        let (runs, whole) = match &mut self.chunks {
            Chunks::Whole => {
                self.chunks = Chunks::None;
                let len = CHUNK_BYTES;
                (vec![Run { offset: 0, len }], true)
            }
            Chunks::Of(chunks) => (chunks.next()?, false),
            Chunks::None => return None,
        };
        let len: u64 = runs.iter().map(|run| u64::from(run.len)).sum();
        Some(Asked {
            number: self.number,
            path: self.path.clone(),
            missing: runs.len(),
            likely: len.min(self.size.max(u64::from(BLOCK_BYTES))),
            runs: runs.into(),
            whole,
            content: Vec::new(),
            before: 0,
        })
    }
}

impl Queue {
    fn new(files: Vec<File>, checksums: bool) -> Self {
        Self {
            left: Mutex::new(Left {
                files: files.into_iter(),
                current: None,
                again: Vec::new(),
            }),
            ended: Mutex::default(),
            checksums,
        }
    }

    /// The chunks of the next query; none if there are no more.
    fn next(&self) -> Vec<Asked> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut asked, mut bytes, mut rows) = (Vec::new(), 0, 0);
        while bytes < QUERY_BYTES && rows < QUERY_RANGES {
            if let Some(chunk) = left.again.pop() {
                bytes += chunk.likely;
                rows += chunk.runs.len();
                asked.push(chunk);
                continue;
            }
            let Some(mut file) = left.current.take().or_else(|| left.files.next()) else {
                break;
            };
            let Some(chunk) = file.next() else { continue };
            bytes += chunk.likely;
            rows += chunk.runs.len();
            asked.push(chunk);
            left.current = Some(file);
        }
        asked
    }

    /// Whether what came of a chunk goes on. If a page in it is wrong, it is asked for again a few times; who asks this
    /// takes the next query afterwards, so that no chunk is forgotten.
    fn take_or_ask_again(&self, chunk: &Asked, bytes: &[u8]) -> bool {
        let may_be_torn = self.checksums && !chunk.whole && chunk.before < READS;
        if !may_be_torn || torn(&chunk.path, &chunk.runs, bytes).is_empty() {
            return true;
        }
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.again.push(chunk.again());
        false
    }

    fn note(&self, note: impl FnOnce(&mut Ends)) {
        note(&mut self.ended.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn ended(&self) -> Ends {
        std::mem::take(&mut *self.ended.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One connection: the next query is on its way while the answer to the last one is read.
async fn read_ranges(mut connection: Connection, queue: Arc<Queue>, outlet: Outlet, pace: Arc<Pace>) -> Result<()> {
    let mut under_way = std::collections::VecDeque::new();
    loop {
        while under_way.len() < 2 {
            let asked = queue.next();
            if asked.is_empty() {
                break;
            }
            pace.wait_async(asked.iter().map(|chunk| chunk.likely).sum()).await;
            connection.send_query(&query(&asked)).await?;
            under_way.push_back(asked);
        }
        match under_way.pop_front() {
            Some(asked) => answer(&mut connection, asked, &queue, &outlet).await?,
            None => return Ok(()),
        }
    }
}

/// Each run of each chunk, numbered in that order.
fn query(asked: &[Asked]) -> String {
    let runs = asked
        .iter()
        .flat_map(|chunk| chunk.runs.iter().map(|run| (&chunk.path, run)));
    let values: Vec<String> = runs
        .enumerate()
        .map(|(number, (path, run))| {
            let path = quote_text(path);
            format!("({number}, {path}, {}::bigint, {}::bigint)", run.offset, run.len)
        })
        .collect();
    format!(
        "COPY (SELECT n, pg_read_binary_file(p, o, l, true) FROM (VALUES {}) AS r (n, p, o, l)) TO STDOUT (FORMAT binary)",
        values.join(", ")
    )
}

/// Takes the answer to a query.
async fn answer(connection: &mut Connection, mut asked: Vec<Asked>, queue: &Queue, outlet: &Outlet) -> Result<()> {
    // Of each row: its chunk, and the run of that.
    let places: Vec<(usize, usize)> = asked
        .iter()
        .enumerate()
        .flat_map(|(chunk, asked)| (0..asked.runs.len()).map(move |run| (chunk, run)))
        .collect();
    let mut seen = vec![false; places.len()];
    let mut rows = Rows::default();
    let mut copy = connection.copy_out();
    while let Some(data) = copy.next().await.map_err(grants)? {
        rows.feed(&data);
        while let Some((number, content)) = rows.next()? {
            let row = usize::try_from(number)
                .ok()
                .filter(|&row| seen.get(row) == Some(&false));
            let row = row.ok_or_else(|| Error::failed("the server answers with a range that was not asked for"))?;
            seen[row] = true;
            let (chunk, run) = places[row];
            if let Some(bytes) = take(&mut asked[chunk], run, content, queue)?
                && !bytes.is_empty()
                && queue.take_or_ask_again(&asked[chunk], &bytes)
            {
                let chunk = &asked[chunk];
                let mut runs = chunk.runs.clone();
                if chunk.whole {
                    runs[0].len = bytes.len() as u32;
                }
                outlet
                    .send_async(Chunk {
                        file: chunk.number,
                        path: chunk.path.clone(),
                        runs,
                        bytes,
                        is_verified: false,
                    })
                    .await?;
            }
        }
    }
    match seen.iter().all(|&seen| seen) {
        true => Ok(()),
        false => Err(Error::failed("the server's answer lacks a range")),
    }
}

/// Takes the content of a run, `None` if its file is gone; gives the chunk's content once all of it came.
fn take(chunk: &mut Asked, run: usize, content: Option<Bytes>, queue: &Queue) -> Result<Option<Bytes>> {
    let number = chunk.number;
    let len = chunk.runs[run].len as usize;
    if content.is_none() {
        queue.note(|ends| ends.vanished.push(number));
    }
    let content = content.unwrap_or_default();
    if content.len() > len {
        return Err(Error::failed(format!("the server sent too much of {}", chunk.path)));
    }
    if chunk.whole {
        queue.note(|ends| ends.sizes.push((number, content.len() as u64)));
        return Ok(Some(content));
    }
    if chunk.runs.len() == 1 && content.len() == len {
        return Ok(Some(content));
    }
    // What is missing is zero.
    let total = chunk.len();
    chunk.content.resize(total, 0);
    let from: usize = chunk.runs[..run].iter().map(|run| run.len as usize).sum();
    chunk.content[from..from + content.len()].copy_from_slice(&content);
    chunk.missing -= 1;
    Ok((chunk.missing == 0).then(|| std::mem::take(&mut chunk.content).into()))
}

/// pg_control, until its CRC holds.
async fn control(connection: &mut Connection) -> Result<Vec<u8>> {
    let mut last = None;
    for _ in 0..CONTROL_READS {
        let content = connection.read_file(CONTROL, 0, 8192).await?;
        match ControlFile::parse(&content) {
            Ok(_) if content.len() == 8192 => return Ok(content),
            Ok(_) => last = Some(Error::damaged(format!("pg_control has {} bytes", content.len()))),
            Err(error) => last = Some(error),
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    Err(last.unwrap_or_else(|| Error::damaged("pg_control")))
}
