//! Files of a restore as such: looked at, made with their length, and synced in the end.
//!
//! What always holds: while a file is written its owner can read and write it; its own permissions come with the sync.

use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use fairvault_format::proto::{FileEntry, FileKind};

use super::direct::{DIRECT_BYTES, make_room};
use super::plan::Plan;
use crate::error::{Error, Result};

/// Files that are synced at the same time.
const SYNCS: usize = 16;

/// What was found and made before anything is written.
pub struct Prepared {
    /// By file, whether its old content may be of use.
    pub there: Vec<bool>,
    /// By file, whether it has its length and its mode.
    pub made: Vec<Mutex<bool>>,
}

/// Looks for old content, and gives large files their room, so that a full disk is noticed now. Whoever writes to one
/// of the others first makes it: making many files takes as long as filling them.
pub fn prepare(plan: &Plan, paths: &[PathBuf], delta: bool, sparse: bool) -> Result<Prepared> {
    // What no extent covers is zero: only a file that is covered as a whole can be compared extent by extent.
    let mut covered = vec![0; plan.files.len()];
    for placement in &plan.placements {
        covered[placement.file as usize] += u64::from(placement.len);
    }
    let mut prepared = Prepared {
        there: vec![false; plan.files.len()],
        made: Vec::new(),
    };
    for (number, file) in plan.files.iter().enumerate() {
        let mut made = false;
        if file.kind() == FileKind::FileRegular {
            let path = &paths[number];
            let of_use = delta && covered[number] == file.size;
            let meta = of_use.then(|| path.symlink_metadata().ok()).flatten();
            let meta = meta.filter(std::fs::Metadata::is_file);
            prepared.there[number] = meta.is_some();
            // One that is as it should be is not touched: each change to its inode would have to be written.
            let is_ready = |meta: &std::fs::Metadata| {
                let has_room = sparse || meta.blocks() * 512 >= meta.len();
                meta.len() == file.size && has_room && meta.permissions().mode() & 0o7777 == modes(file).0
            };
            match &meta {
                Some(meta) if is_ready(meta) => made = true,
                None if file.size < DIRECT_BYTES => {}
                _ => {
                    create(file, path, meta.is_none(), !sparse)?;
                    made = true;
                }
            }
        }
        prepared.made.push(Mutex::new(made));
    }
    Ok(prepared)
}

/// Permissions that a file has while it is written, and those that it has in the end.
fn modes(file: &FileEntry) -> (u32, u32) {
    let mode = if file.mode == 0 { 0o600 } else { file.mode & 0o7777 };
    (mode | 0o600, mode)
}

/// A file of full length that can be written; empty, if `truncate` says so.
pub fn create(file: &FileEntry, path: &Path, truncate: bool, with_room: bool) -> Result<()> {
    let what = |e| Error::io(format_args!("creating {}", path.display()), e);
    let permissions = std::fs::Permissions::from_mode(modes(file).0);
    let open = || {
        std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(truncate)
            .mode(modes(file).0)
            .open(path)
    };
    let out = match open() {
        // One that is there may be for reading only.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied && !truncate => {
            std::fs::set_permissions(path, permissions.clone()).map_err(what)?;
            open()
        }
        other => other,
    };
    let out = out.map_err(what)?;
    make_room(&out, file.size, with_room).map_err(what)?;
    out.set_permissions(permissions).map_err(what)
}

/// Syncs a file, and gives it the permissions that it has in the end.
pub fn sync_file(file: &FileEntry, path: &Path) -> Result<()> {
    let (meanwhile, mode) = modes(file);
    let finish = |out: std::fs::File| {
        if mode != meanwhile {
            out.set_permissions(std::fs::Permissions::from_mode(mode))?;
        }
        out.sync_all()
    };
    std::fs::File::open(path)
        .and_then(finish)
        .map_err(|e| Error::io(format_args!("syncing {}", path.display()), e))
}

/// Syncs files by number, many at once: the file system then writes its journal for many of them together. Each is
/// synced once; an error is that of one of those that failed.
pub fn many_at_once(count: usize, sync: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let worker = || -> Result<()> {
        loop {
            match next.fetch_add(1, Ordering::Relaxed) {
                number if number < count => sync(number)?,
                _ => return Ok(()),
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..SYNCS).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|_| Err(Error::failed("syncing files panicked")))
        })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, PoisonError};
    use std::time::Duration;

    use super::*;

    /// The first ones wait for each other: fewer threads than that would wait in vain.
    #[test]
    fn each_file_is_synced_once_and_many_of_them_at_the_same_time() {
        const FILES: usize = 1000;
        let (begun, all_begun) = (Mutex::new(0), Condvar::new());
        let synced: Vec<AtomicUsize> = (0..FILES).map(|_| AtomicUsize::new(0)).collect();
        let done = many_at_once(FILES, |number| {
            let mut count = begun.lock().unwrap_or_else(PoisonError::into_inner);
            *count += 1;
            all_begun.notify_all();
            let waited = all_begun.wait_timeout_while(count, Duration::from_secs(20), |count| *count < SYNCS);
            let (count, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            drop(count);
            synced[number].fetch_add(1, Ordering::Relaxed);
            match waited.timed_out() {
                true => Err(Error::failed(format!("fewer than {SYNCS} at once"))),
                false => Ok(()),
            }
        });
        done.unwrap();
        assert!(synced.iter().all(|count| count.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn a_file_that_cannot_be_synced_fails_the_restore() {
        for bad in [0, 7, 99] {
            let done = many_at_once(100, |number| match number == bad {
                true => Err(Error::failed(format!("file {number}"))),
                false => Ok(()),
            });
            assert_eq!(done.unwrap_err().to_string(), format!("file {bad}"));
        }
        many_at_once(0, |_| Err(Error::failed("there is no file"))).unwrap();
    }

    /// While it is written, its owner can write to it; afterwards, only what it says counts.
    #[test]
    fn the_permissions_of_a_file_come_with_its_sync() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = FileEntry {
            mode: 0o440,
            size: 5,
            ..Default::default()
        };
        let mode = || path.metadata().unwrap().permissions().mode() & 0o7777;
        create(&file, &path, true, true).unwrap();
        assert_eq!((mode(), path.metadata().unwrap().len()), (0o640, 5));
        sync_file(&file, &path).unwrap();
        assert_eq!(mode(), 0o440);
        let missing = folder.path().join("missing");
        let error = sync_file(&file, &missing).unwrap_err().to_string();
        assert!(error.contains("syncing") && error.contains("missing"), "{error}");
    }
}
