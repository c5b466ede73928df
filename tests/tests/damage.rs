//! Damage in the repository and in the source: found, named, and never restored as if nothing had happened.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fairvault_tests::{Scratch, Server, code, run, tools};

struct Setup {
    scratch: Scratch,
    server: Server,
    options: Vec<String>,
}

impl Setup {
    fn new(name: &str) -> Result<Self> {
        let scratch = Scratch::new(name)?;
        let dir = scratch.path().display().to_string();
        run(&mut scratch.fairvault(&["key", "generate", &format!("{dir}/key")]))?;
        let server = Server::create(&scratch, 15, 5432, "")?;
        let options = vec![
            "--repo-url".into(),
            format!("file://{dir}/vault"),
            "--key-file".into(),
            format!("{dir}/key"),
            "--conninfo".into(),
            server.conninfo(),
        ];
        Ok(Self {
            scratch,
            server,
            options,
        })
    }

    fn fairvault(&self, arguments: &[&str]) -> (i32, String) {
        let mut all: Vec<&str> = self.options.iter().map(String::as_str).collect();
        all.extend(arguments);
        code(&mut self.scratch.fairvault(&all))
    }

    fn backup(&self) -> Result<String> {
        let (exit, text) = self.fairvault(&["backup", "acme", "--fast", "--progress", "none"]);
        ensure!(exit == 0, "{text}");
        Ok(text)
    }

    fn objects(&self, folder: &str) -> Vec<PathBuf> {
        let mut out = Vec::new();
        walk(&self.scratch.join("vault/acme").join(folder), &mut out);
        out.sort();
        out
    }
}

fn walk(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => walk(&path, out),
            path => out.push(path),
        }
    }
}

#[test]
fn verify_finds_every_flip_cut_and_loss() -> Result<()> {
    let s = Setup::new("verify")?;
    s.server.sql(
        &s.scratch,
        "create table t as select i, md5(i::text) from generate_series(1, 100000) i",
    )?;
    s.backup()?;
    s.server.sql(&s.scratch, "create table u as select 1 as x")?;
    s.backup()?;
    let verify = |level: &str| s.fairvault(&["verify", "acme", "--level", level, "--progress", "none"]);
    for level in ["objects", "data"] {
        let (exit, text) = verify(level);
        ensure!(exit == 0 && text.contains("all good"), "{exit} {text}");
    }
    let mut tried = 0;
    for folder in ["packs", "index", "roots", "wal", "log"] {
        let objects = s.objects(folder);
        ensure!(!objects.is_empty(), "{folder}");
        for object in &objects {
            let good = std::fs::read(object)?;
            let len = good.len();
            let mut spots = vec![0, 5, 20, 81, len / 3, len / 2, len - 40, len - 1];
            spots.retain(|&at| at < len);
            let flips = spots.into_iter().map(|at| {
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                (format!("bit at {at}"), Some(bad))
            });
            let cuts = [
                ("cut".to_owned(), Some(good[..len / 2].to_vec())),
                ("empty".to_owned(), Some(Vec::new())),
                ("gone".to_owned(), None),
            ];
            for (what, bad) in flips.chain(cuts) {
                match bad {
                    Some(bad) => std::fs::write(object, bad)?,
                    None => std::fs::remove_file(object)?,
                }
                let (exit, text) = verify("objects");
                ensure!(exit != 0, "{what} of {} was not found: {text}", object.display());
                tried += 1;
            }
            std::fs::write(object, &good)?;
        }
    }
    ensure!(tried > 60, "{tried}");
    let (exit, text) = verify("data");
    ensure!(exit == 0, "everything was put back: {text}");

    // What is lost is named; the other backup is not touched.
    let pack = s
        .objects("packs")
        .into_iter()
        .max_by_key(|p| std::fs::metadata(p).map_or(0, |m| m.len()))
        .context("a pack")?;
    let good = std::fs::read(&pack)?;
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    std::fs::write(&pack, &bad)?;
    let (exit, text) = verify("objects");
    ensure!(
        exit == 4 && text.contains("CANNOT be restored completely") && text.contains("lost: "),
        "{exit} {text}"
    );
    let to = s.scratch.join("r").display().to_string();
    let (exit, text) = s.fairvault(&["restore", "acme", "--to", &to, "--progress", "none"]);
    ensure!(
        exit == 4 && text.contains("does not open") && !Path::new(&to).join("global/pg_control").exists(),
        "{exit} {text}"
    );
    Ok(())
}

#[test]
fn damaged_pages_of_the_source_are_reported_and_kept() -> Result<()> {
    let s = Setup::new("pages")?;
    s.server.sql(
        &s.scratch,
        "create table t as select i from generate_series(1, 100000) i; create table fine as select 1 as x",
    )?;
    let path = s.server.sql(&s.scratch, "select pg_relation_filepath('t')")?;
    s.server.stop(&s.scratch, "fast")?;
    let file = s.server.data.join(&path);
    let mut content = std::fs::read(&file)?;
    content[3 * 8192 + 4000] ^= 1;
    std::fs::write(&file, &content)?;
    s.server.start(&s.scratch)?;
    let (exit, text) = s.fairvault(&["backup", "acme", "--fast", "--progress", "none"]);
    ensure!(
        exit == 6 && text.contains(&format!("page 3 of {path}")) && text.contains("damaged"),
        "{exit} {text}"
    );
    let (exit, text) = s.fairvault(&["verify", "acme", "--level", "data", "--progress", "none"]);
    ensure!(exit == 0, "the repository holds what the server had: {text}");
    ensure!(s.fairvault(&["info", "acme"]).1.contains("1 DAMAGED PAGES"));
    let to = s.scratch.join("r").display().to_string();
    ensure!(s.fairvault(&["restore", "acme", "--to", &to, "--progress", "none"]).0 == 0);
    ensure!(std::fs::read(Path::new(&to).join(&path))? == content);
    Ok(())
}

#[test]
fn a_killed_backup_leaves_a_valid_repository_and_its_packs_are_used_again() -> Result<()> {
    let s = Setup::new("killed")?;
    // Incompressible: several packs.
    s.server.sql(
        &s.scratch,
        "create table t as select i, (select string_agg(md5(random()::text || j), '') from generate_series(i - i + 1, 60) j) as x from generate_series(1, 240000) i",
    )?;
    ensure!(s.fairvault(&["stanza", "create", "acme"]).0 == 0);
    let mut all: Vec<&str> = s.options.iter().map(String::as_str).collect();
    all.extend(["backup", "acme", "--fast", "--max-rate", "64MiB", "--progress", "none"]);
    let mut child = s.scratch.fairvault(&all).spawn()?;
    // Until the first packs are announced: genesis, begin, announce.
    let entry = s.scratch.join(&format!("vault/acme/log/{:020}", 3));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !entry.exists() {
        ensure!(
            std::time::Instant::now() < deadline && child.try_wait()?.is_none(),
            "no packs were announced"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    run(Command::new("pkill").args([
        "-KILL",
        "-f",
        &format!("{}/fairvault --repo-url", s.scratch.path().display()),
    ]))?;
    child.wait()?;
    let (exit, text) = s.fairvault(&["verify", "acme", "--progress", "none"]);
    ensure!(exit == 0, "{text}");
    ensure!(s.fairvault(&["info", "acme"]).1.contains("unfinished: backup"));
    let (exit, text) = s.fairvault(&["backup", "acme", "--fast", "--progress", "none", "--output", "json"]);
    ensure!(exit == 0, "{text}");
    let number = |key: &str| -> Result<u64> {
        let rest = text.split(&format!("\"{key}\":")).nth(1).context("a number")?;
        Ok(rest.split([',', '}']).next().context("a number")?.parse()?)
    };
    let known = number("plain_bytes")? - number("new_plain_bytes")?;
    ensure!(
        known > 200 << 20,
        "only {known} bytes of the dead session were used again"
    );
    ensure!(
        s.fairvault(&["verify", "acme", "--level", "data", "--progress", "none"])
            .0
            == 0
    );

    // A polite stop ends the session.
    let mut child = s.scratch.fairvault(&all).spawn()?;
    std::thread::sleep(std::time::Duration::from_millis(700));
    run(Command::new("pkill").args([
        "-TERM",
        "-f",
        &format!("{}/fairvault --repo-url", s.scratch.path().display()),
    ]))?;
    let status = child.wait()?;
    ensure!(status.code() == Some(130), "{status}");
    ensure!(
        s.fairvault(&["info", "acme"]).1.matches("unfinished").count() == 1,
        "only the killed one"
    );
    Ok(())
}

#[test]
fn a_full_disk_and_a_server_that_is_away_are_temporary() -> Result<()> {
    let s = Setup::new("full")?;
    if !tools::is_root() {
        eprintln!("a small file system can only be mounted by root");
        return Ok(());
    }
    let small = s.scratch.join("small");
    std::fs::create_dir(&small)?;
    run(Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=600k,mode=0777", "tmpfs"])
        .arg(&small))?;
    let url = format!("file://{}/vault", small.display());
    let key = s.options[3].clone();
    let conninfo = s.server.conninfo();
    let (exit, text) = code(&mut s.scratch.fairvault(&[
        "--repo-url",
        &url,
        "--key-file",
        &key,
        "--conninfo",
        &conninfo,
        "backup",
        "acme",
        "--fast",
        "--progress",
        "none",
    ]));
    let umount = run(Command::new("umount").arg(&small));
    ensure!(exit == 75 && text.to_lowercase().contains("no space"), "{exit} {text}");
    umount?;
    s.server.stop(&s.scratch, "fast")?;
    let (exit, text) = s.fairvault(&["backup", "acme", "--progress", "none"]);
    ensure!(exit == 75 && text.contains("is the server running"), "{exit} {text}");
    Ok(())
}
