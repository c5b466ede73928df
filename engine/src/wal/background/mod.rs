//! Background workers for the commands that PostgreSQL runs one at a time, and how the two talk.
//!
//! A command starts a worker if none is alive, and asks it through an [`Exchange`]. Nothing depends on a
//! worker: where it is dead, slow or wrong, the command does the work itself or says "try again". Nothing
//! that it leaves behind is believed without being compared ([`push`]) or outlives it ([`get`]).

pub mod get;
pub mod push;

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Longest message.
const MESSAGE_BYTES: u64 = 64 << 10;
const LOCK: &str = "worker.lock";

/// A folder (mode 0700) through which a command and its worker talk, on one host.
#[derive(Debug, Clone)]
pub struct Exchange {
    folder: PathBuf,
}

impl Exchange {
    /// Opens it; the folder is made if it is not there.
    pub fn open(folder: PathBuf) -> Result<Self> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|e| Error::io(format_args!("making the spool folder {}", folder.display()), e))?;
        Ok(Self { folder })
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn error(&self, doing: &str, name: &str) -> impl FnOnce(std::io::Error) -> Error {
        let what = format!("{doing} {}", self.folder.join(name).display());
        move |e| Error::io(what, e)
    }

    fn lock_file(&self) -> Result<File> {
        let open = File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.folder.join(LOCK));
        open.map_err(self.error("opening", LOCK))
    }

    /// The worker's lock, held for as long as the file is open; `None` if another worker has it.
    pub fn lock(&self) -> Result<Option<File>> {
        let file = self.lock_file()?;
        // Somebody may just be looking whether a worker is alive.
        for _ in 0..20 {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::WouldBlock) => std::thread::sleep(std::time::Duration::from_millis(5)),
                Err(TryLockError::Error(e)) => return Err(self.error("locking", LOCK)(e)),
            }
        }
        Ok(None)
    }

    /// Whether a worker is alive.
    pub fn is_worked(&self) -> Result<bool> {
        match self.lock_file()?.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(e)) => Err(self.error("locking", LOCK)(e)),
        }
    }

    /// Leaves a message: it is there as a whole or not at all.
    pub fn publish(&self, name: &str, content: &[u8]) -> Result<()> {
        let temporary = self.folder.join(format!("{name}.{}.tmp", std::process::id()));
        let write = || -> std::io::Result<()> {
            let mut file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(content)?;
            std::fs::rename(&temporary, self.folder.join(name))
        };
        write().map_err(self.error("writing", name))
    }

    /// A message, if there is one.
    pub fn read(&self, name: &str) -> Result<Option<String>> {
        let mut text = String::new();
        let read = File::open(self.folder.join(name)).and_then(|f| f.take(MESSAGE_BYTES).read_to_string(&mut text));
        match read {
            Ok(_) => Ok(Some(text)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.error("reading", name)(e)),
        }
    }

    /// Removes a message, if there is one.
    pub fn remove(&self, name: &str) -> Result<()> {
        match std::fs::remove_file(self.folder.join(name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(self.error("removing", name)(e)),
            _ => Ok(()),
        }
    }

    /// Names in it.
    fn names(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.folder).map_err(self.error("listing", ""))?;
        Ok(entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect())
    }
}
