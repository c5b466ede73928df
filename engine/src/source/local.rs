//! The `local` source: files of a data directory on this machine, read in parallel by chunk, between
//! `pg_backup_start` and `pg_backup_stop`.
//!
//! What always holds: the directory is proved to be the one that the connection's server works in, before and by
//! more than its path; `pg_control` is read last; a file that vanished is left out, one that shrank is padded with
//! zeros, one that grew is read up to the length that it had: WAL makes all of that right.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use fairvault_format::proto;

use super::again::mend;
use super::backup_mode::{BackupMode, CONTROL_READS, finish};
use super::pace::Pace;
use super::stream::Ended;
use super::walk::{CONTROL, Found, Tree, entry, walk};
use super::{Chunk, Entry, Feed, Reading, Run};
use crate::cached::{read_cached, read_past};
use crate::error::{Error, Result};
use crate::postgres::control::ControlFile;
use crate::postgres::lsn::Lsn;
use crate::replication::connection::Connection;
use crate::track::selection::Selection;

/// Bytes of pg_control.
const CONTROL_BYTES: usize = 8192;

/// A data directory whose server is in backup mode.
pub struct Local {
    session: BackupMode,
    directory: PathBuf,
    tree: Tree,
    /// Tablespaces for the manifest.
    pub listed: Vec<proto::Tablespace>,
    reading: Reading,
}

/// The data directory of the connection's server, if it is on this machine and can be read; fails with the reason if
/// not. `directory` is where it is said to be; without, the server is asked.
pub async fn find(connection: &mut Connection, directory: Option<&Path>, system_identifier: u64) -> Result<PathBuf> {
    let directory = match directory {
        Some(directory) => directory.to_owned(),
        None => connection
            .show("data_directory")
            .await?
            .map(PathBuf::from)
            .ok_or_else(|| {
                Error::refused("the server does not tell this role where its data directory is")
                    .remedy("GRANT pg_read_all_settings, or name the directory with --data-directory")
            })?,
    };
    let backend = connection.value("SELECT pg_backend_pid()").await?.unwrap_or_default();
    let started = connection
        .value("SELECT extract(epoch FROM pg_postmaster_start_time())::bigint")
        .await?;
    let started: i64 = started.and_then(|text| text.parse().ok()).unwrap_or_default();
    let shown = directory.display();
    let other = |why: String| {
        Error::refused(format!(
            "{shown} is not the data directory of this connection's server: {why}"
        ))
    };
    let read = |path: &str| {
        let path = directory.join(path);
        std::fs::read(&path).map_err(|e| unreadable(&path, e))
    };
    let control = read_control(&directory).map_err(|e| unreadable(&directory.join(CONTROL), e))?;
    let control = ControlFile::parse(&control)?;
    if control.system_identifier != system_identifier {
        return Err(other(format!(
            "its system identifier is {}, the server's {system_identifier}",
            control.system_identifier
        )));
    }
    // A standby on another host has the same identifier, and often the same path.
    let text = String::from_utf8_lossy(&read("postmaster.pid")?).into_owned();
    let mut lines = text.lines();
    let postmaster = lines.next().unwrap_or_default().trim().to_owned();
    let began: i64 = lines
        .nth(1)
        .and_then(|line| line.trim().parse().ok())
        .unwrap_or_default();
    if !(began - 1..=began + 10).contains(&started) {
        return Err(other(
            "the server that works there was started at another time".to_owned(),
        ));
    }
    // Where the process may be looked at, it says itself where it works; in another namespace, numbers mean nothing.
    let works_in = std::fs::read_link(format!("/proc/{postmaster}/cwd"));
    let is_elsewhere = works_in.is_ok_and(|at| directory.canonicalize().is_ok_and(|directory| at != directory));
    let name = std::fs::read_to_string(format!("/proc/{postmaster}/comm")).unwrap_or_default();
    if is_elsewhere || !(name.starts_with("postgres") || name.starts_with("postmaster")) {
        return Err(other(format!(
            "process {postmaster} of this machine does not work there"
        )));
    }
    let parent = parent_of(&backend).ok_or_else(|| {
        other(format!(
            "process {backend}, which serves the connection, is not on this machine"
        ))
    })?;
    match parent == postmaster {
        true => Ok(directory),
        false => Err(other(format!(
            "process {postmaster} works there, and process {parent} serves the connection"
        ))),
    }
}

fn unreadable(path: &Path, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::refused(format!("{} cannot be read", path.display()))
        .remedy("run as the server's user, on its host, or use --source stream")
        .caused_by(error)
}

/// The parent of a process of this machine.
fn parent_of(process: &str) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let (_, behind) = stat.rsplit_once(')')?;
    behind.split_whitespace().nth(1).map(str::to_owned)
}

fn panicked(error: tokio::task::JoinError) -> Error {
    Error::failed("reading the data directory panicked").caused_by(error)
}

/// The checkpoint with which the backup began is in the directory's pg_control, or a later one.
fn begun_at(control: &[u8], start: Lsn, directory: &Path) -> Result<()> {
    let redo = ControlFile::parse(control)?.redo;
    match redo >= start {
        true => Ok(()),
        false => Err(Error::refused(format!(
            "{} is not the data directory of this connection's server: its last checkpoint is at {redo}, and the backup began at {start}",
            directory.display()
        ))),
    }
}

impl Local {
    /// Lists what there is. The server is in backup mode.
    pub async fn open(mut session: BackupMode, directory: PathBuf, reading: Reading) -> Result<Self> {
        let version_folder = session.version_folder().await?;
        let (mut tablespaces, mut listed) = (Vec::new(), Vec::new());
        let folder = directory.join("pg_tblspc");
        let problem = |e| Error::io(format_args!("listing {}", folder.display()), e);
        for found in std::fs::read_dir(&folder).map_err(problem)? {
            let found = found.map_err(problem)?;
            let Some(oid) = found.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // One in place is an ordinary folder.
            let in_place = !found.file_type().map_err(problem)?.is_symlink();
            let mut location = String::new();
            if !in_place {
                let target = std::fs::read_link(found.path()).map_err(problem)?;
                let absolute = target.to_str().filter(|path| path.starts_with('/'));
                location = absolute.map(str::to_owned).ok_or_else(|| {
                    Error::refused(format!("the path of tablespace {oid} is not absolute, or not UTF-8"))
                        .remedy("use --source stream")
                })?;
                tablespaces.push(oid);
            }
            listed.push(proto::Tablespace {
                oid,
                location,
                in_place,
            });
        }
        listed.sort_by_key(|t| t.oid);
        let has_summaries = session.connection.major() >= 17;
        let at = directory.clone();
        let start = session.start;
        let walked = tokio::task::spawn_blocking(move || {
            // The server's checkpoint is there: this is where it works.
            begun_at(&read_control(&at)?, start, &at)?;
            walk(&at, &tablespaces, &version_folder, has_summaries)
        });
        let tree = walked.await.map_err(panicked)??;
        Ok(Self {
            session,
            directory,
            tree,
            listed,
            reading,
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
            session,
            directory,
            tree,
            reading,
            ..
        } = self;
        let Reading {
            readers,
            rate,
            checksums,
        } = reading;
        if !tree.strange.is_empty() {
            tracing::warn!("left out, as neither files nor folders: {}", tree.strange.join(", "));
        }
        let selection = feed.selection().clone();
        let to_read = tree.files.iter().map(|f| selection.of(&f.path, f.size).bytes(f.size));
        feed.total(to_read.sum());
        for folder in tree.folders {
            feed.entry(folder);
        }
        let reader = Reader {
            first: feed.next_number(),
            outlet: feed.outlet(),
            selection,
            pace: Pace::new(rate),
            checksums,
            failed: AtomicBool::new(false),
        };
        let read = tokio::task::spawn_blocking(move || reader.read_all(tree.files, readers));
        for entry in read.await.map_err(panicked)?? {
            feed.entry(entry);
        }
        let start = session.start;
        let control = tokio::task::spawn_blocking(move || -> Result<_> {
            let meta = std::fs::metadata(directory.join(CONTROL)).map_err(|e| Error::io("looking at pg_control", e))?;
            let content = read_control(&directory)?;
            begun_at(&content, start, &directory)?;
            Ok((content, meta))
        });
        let (content, meta) = control.await.map_err(panicked)??;
        let mut control = entry(CONTROL, &meta);
        control.size = content.len() as u64;
        finish(session, feed, control, content).await
    }
}

/// pg_control, as the server writes it in one go: read until its CRC holds.
fn read_control(directory: &Path) -> Result<Vec<u8>> {
    let path = directory.join(CONTROL);
    let mut last = None;
    for _ in 0..CONTROL_READS {
        let content = std::fs::read(&path).map_err(|e| Error::io(format_args!("reading {}", path.display()), e))?;
        match ControlFile::parse(&content) {
            Ok(_) if content.len() == CONTROL_BYTES => return Ok(content),
            Ok(_) => {
                last = Some(Error::damaged(format!(
                    "{} has {} bytes",
                    path.display(),
                    content.len()
                )))
            }
            Err(error) => last = Some(error),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(last.unwrap_or_else(|| Error::damaged("pg_control")))
}

/// An open file.
struct Open {
    number: u32,
    path: Arc<str>,
    file: File,
}

/// A chunk to be read.
struct Job {
    open: Arc<Open>,
    runs: Box<[Run]>,
}

struct Reader {
    /// Number of the first file.
    first: u32,
    outlet: super::Outlet,
    selection: Selection,
    pace: Pace,
    checksums: bool,
    failed: AtomicBool,
}

impl Reader {
    /// One thread opens files in turn, others read them. Returns the entries. Blocks.
    fn read_all(&self, files: Vec<Found>, readers: usize) -> Result<Vec<Entry>> {
        let (jobs_in, jobs) = mpsc::sync_channel::<Job>(readers * 4);
        let jobs = Mutex::new(jobs);
        std::thread::scope(|scope| {
            let reading: Vec<_> = (0..readers)
                .map(|_| {
                    scope.spawn(|| {
                        loop {
                            let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
                            let Ok(job) = job else { return Ok(()) };
                            if let Err(error) = self.read(&job) {
                                self.failed.store(true, Ordering::Relaxed);
                                // Whoever opens files may be waiting for somebody to take the next one.
                                while jobs.lock().unwrap_or_else(PoisonError::into_inner).recv().is_ok() {}
                                return Err(error);
                            }
                        }
                    })
                })
                .collect();
            let entries = self.open_all(files, &jobs_in);
            drop(jobs_in);
            let mut failure = None;
            for thread in reading {
                let outcome = thread
                    .join()
                    .unwrap_or_else(|_| Err(Error::failed("a reader panicked")));
                failure = failure.or(outcome.err());
            }
            match failure {
                Some(error) => Err(error),
                None => entries,
            }
        })
    }

    fn open_all(&self, files: Vec<Found>, jobs: &mpsc::SyncSender<Job>) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for found in files {
            let problem = |e| Error::io(format_args!("reading {}", found.file.display()), e);
            let file = match File::open(&found.file) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                other => other.map_err(problem)?,
            };
            let meta = file.metadata().map_err(problem)?;
            if !meta.is_file() {
                continue;
            }
            // The kernel must not read ahead: what was not in its cache does not stay there.
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random);
            let open = Arc::new(Open {
                number: self.first + entries.len() as u32,
                path: found.path.as_str().into(),
                file,
            });
            let wanted = self.selection.of(&found.path, meta.len());
            let chunks = wanted.chunks(meta.len());
            entries.push(Entry {
                wanted,
                ..entry(&found.path, &meta)
            });
            for runs in chunks {
                let (open, runs) = (open.clone(), runs.into());
                if jobs.send(Job { open, runs }).is_err() || self.failed.load(Ordering::Relaxed) {
                    return Err(Error::failed(super::PIPELINE_GONE));
                }
            }
        }
        Ok(entries)
    }

    fn read(&self, job: &Job) -> Result<()> {
        self.read_with(job, |bytes, offset| read_at(&job.open.file, bytes, offset))
    }

    /// `read` fills a buffer from an offset of the file.
    fn read_with(&self, job: &Job, read: impl Fn(&mut [u8], u64) -> std::io::Result<()>) -> Result<()> {
        let read = |bytes: &mut [u8], offset: u64| {
            read(bytes, offset).map_err(|e| Error::io(format_args!("reading {} at {offset}", job.open.path), e))
        };
        let len: usize = job.runs.iter().map(|run| run.len as usize).sum();
        self.pace.wait(len as u64);
        let mut bytes = vec![0; len];
        let mut rest = &mut bytes[..];
        for run in &job.runs {
            let (now, behind) = rest.split_at_mut(run.len as usize);
            read(now, run.offset)?;
            rest = behind;
        }
        let mut is_verified = false;
        if self.checksums {
            let again = |bytes: &mut [u8], offset: u64| {
                self.pace.wait(bytes.len() as u64);
                read(bytes, offset)
            };
            is_verified = mend(&job.open.path, &job.runs, &mut bytes, again)?;
        }
        self.outlet.send(Chunk {
            file: job.open.number,
            path: job.open.path.clone(),
            runs: job.runs.clone(),
            bytes: bytes.into(),
            is_verified,
        })
    }
}

/// Fills `bytes`, with zeros where the file has ended. What the kernel has in its cache stays there, and what it did
/// not have is not left there: a backup must not push out what the server needs.
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    let done = match read_past(file, bytes, offset)? {
        Some(done) => done,
        None => read_and_drop(file, bytes, offset)?,
    };
    bytes[done..].fill(0);
    Ok(())
}

/// Returns how much there was. Everything behind the first byte that was not in the cache goes from there: whether more
/// of it was there cannot be told, since asking brings it there.
fn read_and_drop(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let cached = read_cached(file, bytes, offset);
    let mut done = cached;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let len = std::num::NonZeroU64::new((done - cached) as u64);
    if len.is_some() {
        let _ = rustix::fs::fadvise(file, offset + cached as u64, len, rustix::fs::Advice::DontNeed);
    }
    Ok(done)
}
