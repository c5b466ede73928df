//! A folder for one test, owned by the servers' user, with the binary in it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::{run, tools};

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// The folder; removed when dropped, unless `FAIRVAULT_KEEP` is set.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

/// The binary that was built beside the running test or xtask.
pub fn binary() -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    me.ancestors()
        .map(|folder| folder.join("fairvault"))
        .find(|candidate| candidate.is_file())
        .context("the fairvault binary is not built: run `cargo build` first, or use `cargo xtask test`")
}

impl Scratch {
    /// A new folder.
    pub fn new(name: &str) -> Result<Self> {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("/tmp/fv-{name}-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path)?;
        let own = path.join("fairvault");
        match std::env::var_os("FAIRVAULT_TEMPLATES") {
            // The same file for all tests of a run: nobody writes to it.
            Some(templates) => std::fs::hard_link(Path::new(&templates).join("fairvault"), own)?,
            // Another process copies: a descriptor for writing that a child of this one inherits would make the copy
            // "Text file busy" for whoever starts it.
            None => drop(run(Command::new("cp").arg(binary()?).arg(own))?),
        }
        if tools::is_root() {
            run(Command::new("chown").arg("postgres:").arg(&path))?;
        }
        Ok(Self { path })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A command as the servers' user, with HOME here.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = if tools::is_root() {
            let mut command = Command::new("setpriv");
            command
                .args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--reset-env"])
                .arg(program);
            // setpriv --reset-env sets HOME; the environment of the test does not reach the program.
            command
        } else {
            Command::new(program)
        };
        command.current_dir(&self.path);
        command
    }

    /// `fairvault` with arguments, as the servers' user.
    pub fn fairvault(&self, arguments: &[&str]) -> Command {
        let mut command = self.command("env");
        command
            .arg(format!("HOME={}", self.path.display()))
            .arg(self.join("fairvault"))
            .args(arguments);
        command
    }

    /// Copies a folder to here; the servers' user owns the copy.
    pub fn copy_folder(&self, from: &Path, name: &str) -> Result<PathBuf> {
        let to = self.join(name);
        run(Command::new("cp").arg("-r").arg(from).arg(&to))?;
        if tools::is_root() {
            run(Command::new("chown").args(["-R", "postgres:"]).arg(&to))?;
        }
        Ok(to)
    }

    /// Writes a file that the servers' user owns.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt;
        let path = self.join(name);
        std::fs::write(&path, content)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        if tools::is_root() {
            run(Command::new("chown").arg("postgres:").arg(&path))?;
        }
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::env::var_os("FAIRVAULT_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
