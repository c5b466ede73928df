//! Files of a restore as such: looked at, made with their length, and synced in the end.
//!
//! What always holds: while a file is written its owner can read and write it; its own permissions come with the sync.

use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use fairvault_format::proto::{FileEntry, FileKind};

use super::direct::{DIRECT_BYTES, make_room};
use super::plan::Plan;
use crate::error::{Error, Result};

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
