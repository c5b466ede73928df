//! The target directory: is it safe to write there, and which path does each file get.

use std::collections::HashSet;
use std::io::Write;
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
    /// An earlier restore has not come to its end there.
    pub is_resumed: bool,
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

/// How the marker of an unfinished restore names a tablespace folder.
const MARKER_TABLESPACE: &str = "tablespace ";

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
    check_tablespaces(plan, &directory)?;
    make_directory(&directory)?;
    let mode = match plan.info.data_directory_mode & 0o777 {
        0o750 => 0o750,
        _ => 0o700,
    };
    std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(mode))
        .map_err(io("setting the mode of", &directory))?;
    if options.delta || options.force || resuming {
        clear(plan, &directory, options.delta || (resuming && !options.force))?;
    }
    write_marker(plan, &directory)?;
    make_tree(plan, &directory)?;
    Ok(Layout {
        directory,
        is_resumed: resuming,
    })
}

/// Marks the directory as half-restored, and the tablespace folders as ours to fill.
fn write_marker(plan: &Plan, directory: &Path) -> Result<()> {
    let marker = directory.join(UNFINISHED_MARKER);
    let mut text = format!("a restore of backup {} is not finished\n", plan.info.id);
    for location in plan.tablespaces.iter().filter_map(|(_, l)| l.as_ref()) {
        text.push_str(&format!("{MARKER_TABLESPACE}{location}\n"));
    }
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&marker)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(io("writing", &marker))?;
    super::sync_directory(directory)
}

/// Fails if a tablespace folder is no place to write to: inside another one, or holding what is not provably
/// of this very data directory.
fn check_tablespaces(plan: &Plan, directory: &Path) -> Result<()> {
    let marked = std::fs::read_to_string(directory.join(UNFINISHED_MARKER)).unwrap_or_default();
    let mut earlier: Vec<&Path> = Vec::new();
    for (oid, location) in &plan.tablespaces {
        let Some(location) = location.as_deref().map(Path::new) else {
            continue;
        };
        if location.starts_with(directory) || directory.starts_with(location) {
            return Err(Error::usage(format!(
                "tablespace folder {} and the data directory are inside each other",
                location.display()
            )));
        }
        if let Some(other) = earlier
            .iter()
            .find(|other| location.starts_with(other) || other.starts_with(location))
        {
            return Err(Error::usage(format!(
                "two tablespaces would go to {} and {}: each needs a folder of its own",
                other.display(),
                location.display()
            )));
        }
        earlier.push(location);
        let linked = std::fs::read_link(directory.join(format!("pg_tblspc/{oid}"))).is_ok_and(|to| to == location);
        let begun = marked
            .lines()
            .any(|line| line.strip_prefix(MARKER_TABLESPACE).map(Path::new) == Some(location));
        if !is_empty(location)? && !linked && !begun {
            return Err(Error::refused(format!(
                "tablespace folder {} is not empty, and nothing shows that it belongs to {}",
                location.display(),
                directory.display()
            ))
            .remedy("map the tablespace to an empty folder; it may be that of another, running server"));
        }
    }
    Ok(())
}

/// The folder of this server version below a tablespace's location: nothing else there is ours.
fn version_folder(plan: &Plan, oid: u32) -> Option<&str> {
    let prefix = format!("pg_tblspc/{oid}/");
    plan.files
        .iter()
        .find_map(|f| f.path.strip_prefix(&prefix)?.split('/').next())
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
    write_marker(plan, directory)?;
    let marker = directory.join(UNFINISHED_MARKER);
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
    for (oid, location) in &plan.tablespaces {
        if let (Some(location), Some(version)) = (location, version_folder(plan, *oid)) {
            roots.push(Path::new(location).join(version));
        }
    }
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
