//! The target directory: is it safe to write there, and which path does each file get.

use std::collections::HashSet;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use fairvault_format::proto::FileKind;

use super::plan::Plan;
use super::{CONTROL_FILE, Options, UNFINISHED_MARKER};
use crate::error::{Error, Result};

/// Where things go.
#[derive(Debug)]
pub struct Layout {
    /// Data directory.
    pub directory: PathBuf,
}

impl Layout {
    /// The path of a file of the manifest. Tablespace content goes through the link that was made for it.
    pub fn path(&self, path: &str) -> PathBuf {
        if path == CONTROL_FILE {
            return self.directory.join(format!("{CONTROL_FILE}.fairvault"));
        }
        self.directory.join(path)
    }

    /// Every folder that was written to.
    pub fn folders(&self, plan: &Plan) -> Vec<PathBuf> {
        let mut folders: HashSet<PathBuf> = HashSet::from([self.directory.clone()]);
        for file in &plan.files {
            if file.kind() == FileKind::FileDirectory {
                folders.insert(self.directory.join(&file.path));
            }
        }
        folders.extend(
            plan.tablespaces
                .iter()
                .filter_map(|(_, l)| l.as_ref().map(PathBuf::from)),
        );
        folders.insert(self.directory.join("pg_tblspc"));
        folders.into_iter().filter(|f| f.is_dir()).collect()
    }
}

fn io(what: impl std::fmt::Display, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let what = format!("{what} {}", path.display());
    move |e| Error::io(what, e)
}

fn is_empty(path: &Path) -> Result<bool> {
    match std::fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(e) => Err(io("looking into", path)(e)),
    }
}

/// Fails if a server runs on the directory.
fn check_no_server(directory: &Path) -> Result<()> {
    let path = directory.join("postmaster.pid");
    let Ok(text) = std::fs::read_to_string(&path) else {
        return Ok(());
    };
    let pid = text.lines().next().and_then(|l| l.trim().parse::<u32>().ok());
    match pid.filter(|pid| Path::new(&format!("/proc/{pid}")).exists()) {
        None => Ok(()),
        Some(pid) => Err(Error::refused(format!(
            "a PostgreSQL server (process {pid}) runs on {}",
            directory.display()
        ))
        .remedy("stop it first")),
    }
}

/// Checks and prepares the target.
pub fn prepare(plan: &Plan, options: &Options) -> Result<Layout> {
    let directory = options.directory.clone();
    check_no_server(&directory)?;
    let resuming = directory.join(UNFINISHED_MARKER).exists();
    if !is_empty(&directory)? && !resuming && !options.force && !options.delta {
        return Err(Error::refused(format!("{} is not empty", directory.display()))
            .remedy("choose an empty or new directory; --delta reuses what is there, --force replaces it"));
    }
    if (options.force || options.delta) && !resuming && !is_empty(&directory)? && !directory.join("PG_VERSION").exists()
    {
        return Err(Error::refused(format!(
            "{} is not empty and is no data directory (it has no PG_VERSION)",
            directory.display()
        ))
        .remedy("fairvault does not delete what it does not know; empty it yourself if that is meant"));
    }
    for (_, location) in &plan.tablespaces {
        let Some(location) = location.as_deref().map(Path::new) else {
            continue;
        };
        if location.starts_with(&directory) {
            return Err(Error::usage(format!(
                "tablespace folder {} is inside the data directory",
                location.display()
            )));
        }
        if !is_empty(location)? && !resuming && !options.force && !options.delta {
            return Err(
                Error::refused(format!("tablespace folder {} is not empty", location.display()))
                    .remedy("map it to an empty folder"),
            );
        }
    }
    make_directory(&directory)?;
    std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o700))
        .map_err(io("setting the mode of", &directory))?;
    if options.delta || options.force || resuming {
        clear(plan, &directory, options.delta || (resuming && !options.force))?;
    }
    let marker = directory.join(UNFINISHED_MARKER);
    std::fs::write(
        &marker,
        format!("a restore of backup {} is not finished\n", plan.info.id),
    )
    .map_err(io("writing", &marker))?;
    super::sync_directory(&directory)?;
    make_tree(plan, &directory)?;
    Ok(Layout { directory })
}

fn make_directory(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io("creating", path))
}

/// Removes what must not survive: pg_control first, so that a half-restored directory never starts.
fn clear(plan: &Plan, directory: &Path, keep_known_files: bool) -> Result<()> {
    let control = directory.join(CONTROL_FILE);
    if control.exists() {
        std::fs::remove_file(&control).map_err(io("removing", &control))?;
        super::sync_directory(&directory.join("global"))?;
    }
    let marker = directory.join(UNFINISHED_MARKER);
    std::fs::write(&marker, "a restore is not finished\n").map_err(io("writing", &marker))?;
    super::sync_directory(directory)?;
    let known: HashSet<PathBuf> = match keep_known_files {
        true => plan
            .files
            .iter()
            .filter(|f| f.kind() == FileKind::FileRegular)
            .map(|f| directory.join(&f.path))
            .collect(),
        false => HashSet::new(),
    };
    let mut roots = vec![directory.to_path_buf()];
    roots.extend(
        plan.tablespaces
            .iter()
            .filter_map(|(_, l)| l.as_ref().map(PathBuf::from)),
    );
    for root in roots.iter().filter(|r| r.is_dir()) {
        let aliases = |path: &Path| -> bool {
            let via_link = plan
                .tablespaces
                .iter()
                .filter_map(|(oid, l)| Some((oid, l.as_ref()?)))
                .find_map(|(oid, l)| {
                    path.strip_prefix(l)
                        .ok()
                        .map(|rest| directory.join(format!("pg_tblspc/{oid}")).join(rest))
                });
            known.contains(path) || via_link.is_some_and(|p| known.contains(&p))
        };
        remove_unknown(root, &aliases, &marker)?;
    }
    Ok(())
}

fn remove_unknown(folder: &Path, known: &dyn Fn(&Path) -> bool, marker: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(io("looking into", folder))? {
        let entry = entry.map_err(io("looking into", folder))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(io("looking at", &path))?;
        if kind.is_dir() {
            remove_unknown(&path, known, marker)?;
            // A folder that still has known files stays.
            let _ = std::fs::remove_dir(&path);
        } else if path != marker && (kind.is_symlink() || !known(&path)) {
            std::fs::remove_file(&path).map_err(io("removing", &path))?;
        }
    }
    Ok(())
}

/// Folders and links, before any file.
fn make_tree(plan: &Plan, directory: &Path) -> Result<()> {
    make_directory(&directory.join("pg_tblspc"))?;
    for (oid, location) in &plan.tablespaces {
        let link = directory.join(format!("pg_tblspc/{oid}"));
        match location {
            None => make_directory(&link)?,
            Some(location) => {
                make_directory(Path::new(location))?;
                match std::os::unix::fs::symlink(location, &link) {
                    Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                        let there = std::fs::read_link(&link).map_err(io("reading the link", &link))?;
                        if there != Path::new(location) {
                            return Err(Error::refused(format!(
                                "{} points to {}",
                                link.display(),
                                there.display()
                            )));
                        }
                    }
                    other => other.map_err(io("linking", &link))?,
                }
            }
        }
    }
    for file in &plan.files {
        let path = directory.join(&file.path);
        // Nothing is written through a link that the manifest brings itself.
        match file.kind() {
            FileKind::FileDirectory => {
                make_directory(&path)?;
                let mode = if file.mode == 0 { 0o700 } else { file.mode & 0o7777 };
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))
                    .map_err(io("setting the mode of", &path))?;
            }
            FileKind::FileRegular | FileKind::FileSymlink => {
                if let Some(parent) = path.parent() {
                    make_directory(parent)?;
                }
            }
        }
    }
    for folder in ["pg_wal", "pg_wal/archive_status"] {
        make_directory(&directory.join(folder))?;
    }
    Ok(())
}
