//! What of a data directory belongs to a backup: the same as BASE_BACKUP takes (`backend/backup/basebackup.c`).

use std::collections::HashSet;
use std::fs::Metadata;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use fairvault_format::proto::FileKind;

use super::{Entry, Wanted};
use crate::error::{Error, Result};
use crate::postgres::files::{Fork, relation_file};

/// Folders that are kept without what is in them.
pub const EMPTY: [&str; 8] = [
    "pg_dynshmem",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_wal",
];
/// Files that are left out wherever they are.
const LEFT_OUT: [&str; 7] = [
    "backup_label",
    "backup_manifest",
    "current_logfiles.tmp",
    "postgresql.auto.conf.tmp",
    "postmaster.opts",
    "postmaster.pid",
    "tablespace_map",
];
/// The file that is read last.
pub const CONTROL: &str = "global/pg_control";

/// A file that was found.
#[derive(Debug)]
pub struct Found {
    /// In the manifest.
    pub path: String,
    /// On this machine.
    pub file: PathBuf,
    /// Length when it was found, bytes.
    pub size: u64,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Tree {
    /// Folders, without the data directory itself.
    pub folders: Vec<Entry>,
    /// Files to read, `pg_control` not among them.
    pub files: Vec<Found>,
    /// What is neither: left out, as the server does.
    pub strange: Vec<String>,
}

/// Walks a data directory and its tablespaces; of those, only the folder `version_folder` is this server's.
pub fn walk(directory: &Path, tablespaces: &[u32], version_folder: &str, has_summaries: bool) -> Result<Tree> {
    let mut tree = Tree::default();
    folder(&mut tree, directory, "")?;
    for oid in tablespaces {
        let link = directory.join(format!("pg_tblspc/{oid}"));
        let at = link.join(version_folder);
        match metadata(&at)? {
            Some(meta) => {
                let path = format!("pg_tblspc/{oid}/{version_folder}");
                tree.folders.push(entry(&path, &meta));
                folder(&mut tree, &at, &path)?;
            }
            // It was dropped meanwhile.
            None if metadata(&link)?.is_none() => {}
            None => {
                return Err(Error::refused(format!("tablespace {oid} cannot be seen: there is no {}", at.display()))
                    .remedy("make its folder visible to this process (mounts, systemd's ProtectHome or PrivateTmp), or use --source stream"));
            }
        }
    }
    // They are there in every backup, whatever is in pg_wal.
    let wal = tree.folders.iter().find(|f| f.path == "pg_wal").cloned();
    if let Some(wal) = wal {
        let inner = ["archive_status"]
            .into_iter()
            .chain(has_summaries.then_some("summaries"));
        tree.folders.extend(inner.map(|name| Entry {
            path: format!("pg_wal/{name}"),
            ..wal.clone()
        }));
    }
    Ok(tree)
}

fn folder(tree: &mut Tree, at: &Path, path: &str) -> Result<()> {
    let mut names = Vec::new();
    let listing = match std::fs::read_dir(at) {
        // A database may be dropped meanwhile.
        Err(error) if error.kind() == ErrorKind::NotFound && !path.is_empty() => return Ok(()),
        other => other.map_err(|e| Error::io(format_args!("listing {}", at.display()), e))?,
    };
    for found in listing {
        let found = found.map_err(|e| Error::io(format_args!("listing {}", at.display()), e))?;
        let name = found.file_name().into_string().map_err(|name| {
            Error::refused(format!("{} has a name that is not UTF-8", at.join(name).display()))
                .remedy("remove it, or use --source stream")
        })?;
        names.push(name);
    }
    names.sort();
    // A name that is replaced meanwhile may be listed twice.
    names.dedup();
    let inits: HashSet<&str> = names.iter().filter_map(|name| name.strip_suffix("_init")).collect();
    let unlogged = |relation: &str| inits.contains(relation);
    for name in &names {
        let path = match path {
            "" => name.clone(),
            path => format!("{path}/{name}"),
        };
        if is_left_out(&path, name, &unlogged) {
            continue;
        }
        let at = at.join(name);
        let Some(mut meta) = metadata(&at)? else { continue };
        let is_wal_link = path == "pg_wal" && meta.is_symlink();
        if is_wal_link {
            meta = std::fs::metadata(&at).map_err(|e| Error::io(format_args!("looking at {}", at.display()), e))?;
        }
        if meta.is_dir() {
            tree.folders.push(entry(&path, &meta));
            if !EMPTY.contains(&path.as_str()) {
                folder(tree, &at, &path)?;
            }
        } else if meta.is_file() {
            check_readable(&at)?;
            if path != CONTROL {
                tree.files.push(Found {
                    path,
                    file: at,
                    size: meta.len(),
                });
            }
        } else if !path.starts_with("pg_tblspc/") && !meta.file_type().is_socket() {
            // Links of tablespaces are described by the list of tablespaces.
            tree.strange.push(path);
        }
    }
    Ok(())
}

/// Whether a backup leaves out `path`, whose last part is `name`; `unlogged` says whether a relation of the same folder
/// has an initial fork.
pub fn is_left_out(path: &str, name: &str, unlogged: &dyn Fn(&str) -> bool) -> bool {
    let is_temporary = name.starts_with("pgsql_tmp") || name.starts_with("pg_internal.init");
    if is_temporary || LEFT_OUT.contains(&name) {
        return true;
    }
    if !path.starts_with("base/") && !path.starts_with("pg_tblspc/") {
        return false;
    }
    if is_temporary_relation(name) {
        return true;
    }
    // Of an unlogged relation, only its initial contents.
    relation_file(path).is_some_and(|file| file.fork != Fork::Init && unlogged(&file.relation.to_string()))
}

/// `t<backend>_<relation>`, with fork and segment.
fn is_temporary_relation(name: &str) -> bool {
    let Some((backend, rest)) = name.strip_prefix('t').and_then(|rest| rest.split_once('_')) else {
        return false;
    };
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let rest = match rest.split_once('.') {
        Some((rest, segment)) if is_number(segment) => rest,
        Some(_) => return false,
        None => rest,
    };
    let relation = rest.split_once('_').map_or(rest, |(relation, _)| relation);
    is_number(backend) && is_number(relation)
}

/// Before the backup relies on this source.
fn check_readable(at: &Path) -> Result<()> {
    use rustix::io::Errno;
    match rustix::fs::access(at, rustix::fs::Access::READ_OK) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(Error::io(format_args!("reading {}", at.display()), error.into())
            .remedy("run as the server's user, or use --source stream")),
    }
}

/// Of the name itself, not of what a link leads to; `None` if it has vanished.
fn metadata(at: &Path) -> Result<Option<Metadata>> {
    match std::fs::symlink_metadata(at) {
        Ok(meta) => Ok(Some(meta)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format_args!("looking at {}", at.display()), error)),
    }
}

/// A folder's entry, or a file's without content.
pub fn entry(path: &str, meta: &Metadata) -> Entry {
    let is_folder = meta.is_dir();
    Entry {
        path: path.to_owned(),
        kind: if is_folder {
            FileKind::FileDirectory
        } else {
            FileKind::FileRegular
        },
        size: if is_folder { 0 } else { meta.len() },
        mode: meta.mode() & 0o7777,
        mtime_us: meta.mtime().saturating_mul(1_000_000),
        link_target: String::new(),
        is_gone: false,
        wanted: Wanted::All,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_outlive_the_server_is_left_out() {
        let unlogged = |relation: &str| relation == "77";
        let out = |path: &str| is_left_out(path, path.rsplit('/').next().unwrap(), &unlogged);
        for path in [
            "postmaster.pid",
            "base/pgsql_tmp",
            "base/5/pg_internal.init",
            "global/pg_internal.init.123",
            "base/5/t3_16385",
            "base/5/t3_16385_fsm.1",
            "base/5/77",
            "base/5/77.1",
            "base/5/77_vm",
        ] {
            assert!(out(path), "{path}");
        }
        for path in [
            "base/5/77_init",
            "base/5/78",
            "base/5/PG_VERSION",
            "global/77",
            "postgresql.auto.conf",
            "base/5/table_1",
        ] {
            assert!(!out(path), "{path}");
        }
    }

    #[test]
    fn pg_control_is_not_among_the_files_that_are_read_in_turn() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        for name in ["base/5", "global", "pg_wal/archive_status"] {
            std::fs::create_dir_all(at.join(name)).unwrap();
        }
        let files = [
            "PG_VERSION",
            "base/5/1259",
            "base/5/pg_control",
            CONTROL,
            "global/1262",
            "pg_wal/000000010000000000000001",
            "postmaster.pid",
        ];
        for name in files {
            std::fs::write(at.join(name), "x").unwrap();
        }
        let tree = walk(at, &[], "PG_15_202209061", false).unwrap();
        let mut paths: Vec<&str> = tree.files.iter().map(|file| &*file.path).collect();
        paths.sort_unstable();
        assert_eq!(paths, ["PG_VERSION", "base/5/1259", "base/5/pg_control", "global/1262"]);
        assert!(tree.strange.is_empty(), "{:?}", tree.strange);
        let mut folders: Vec<&str> = tree.folders.iter().map(|folder| &*folder.path).collect();
        folders.sort_unstable();
        assert_eq!(folders, ["base", "base/5", "global", "pg_wal", "pg_wal/archive_status"]);
    }
}
