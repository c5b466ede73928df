//! `wal push` and `wal get` as PostgreSQL calls them: exit codes, refusals, holes.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fairvault_tests::{Scratch, Server, code, run};

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
        let server = Server::create_with(&scratch, 15, 5432, "", &["-k", "--wal-segsize=1"])?;
        let options = vec![
            "--repo-url".into(),
            format!("file://{dir}/vault"),
            "--key-file".into(),
            format!("{dir}/key"),
            "--conninfo".into(),
            server.conninfo(),
        ];
        let this = Self {
            scratch,
            server,
            options,
        };
        let (exit, text) = this.fairvault(&["stanza", "create", "acme"]);
        ensure!(exit == 0, "{text}");
        Ok(this)
    }

    fn fairvault(&self, arguments: &[&str]) -> (i32, String) {
        let mut all: Vec<&str> = self.options.iter().map(String::as_str).collect();
        all.extend(arguments);
        code(&mut self.scratch.fairvault(&all))
    }

    fn push(&self, path: &Path) -> (i32, String) {
        self.fairvault(&["wal", "push", "acme", &path.display().to_string()])
    }

    fn get(&self, name: &str, more: &[&str]) -> (i32, String) {
        let target = self.scratch.join("fetched").display().to_string();
        let mut all = vec!["wal", "get", "acme", name, target.as_str()];
        all.extend(more);
        self.fairvault(&all)
    }

    /// Complete segments, by name.
    fn segments(&self, count: usize) -> Result<Vec<PathBuf>> {
        for _ in 0..count {
            self.server.sql(&self.scratch, "create table if not exists t (x text); insert into t select md5(i::text) from generate_series(1, 500) i; select pg_switch_wal()")?;
        }
        let current = self
            .server
            .sql(&self.scratch, "select pg_walfile_name(pg_current_wal_lsn())")?;
        let mut names: Vec<_> = std::fs::read_dir(self.server.data.join("pg_wal"))?
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|n| n.len() == 24 && *n < current)
            .collect();
        names.sort();
        Ok(names
            .iter()
            .rev()
            .take(count)
            .rev()
            .map(|n| self.server.data.join("pg_wal").join(n))
            .collect())
    }

    /// A changed copy of a segment under its own name in a folder of its own.
    fn altered(&self, path: &Path, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Result<PathBuf> {
        let mut content = std::fs::read(path)?;
        change(&mut content);
        run(self
            .scratch
            .command("mkdir")
            .arg("-p")
            .arg(self.scratch.join("altered/pg_wal")))?;
        self.scratch.write(&format!("altered/pg_wal/{name}"), &content)
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[test]
fn push_accepts_what_is_right_and_refuses_what_is_not() -> Result<()> {
    let s = Setup::new("push")?;
    let segments = s.segments(4)?;
    let first = &segments[0];
    ensure!(s.push(first).0 == 0);
    ensure!(s.push(first).0 == 0, "the same content again is success");

    let refused = |path: &Path, word: &str| -> Result<()> {
        let (exit, text) = s.push(path);
        ensure!(
            exit == 1 && text.contains(word),
            "expected a refusal with {word:?}, got {exit}: {text}"
        );
        Ok(())
    };
    refused(&s.altered(first, &name(first), |c| c[5000] ^= 1)?, "other content")?;
    refused(
        &s.altered(&segments[1], &name(&segments[1]), |c| c[24] ^= 1)?,
        "system identifier",
    )?;
    refused(
        &s.altered(&segments[1], &name(&segments[1]), |c| c.truncate(70_000))?,
        "bytes",
    )?;
    refused(&s.altered(&segments[1], &name(&segments[2]), |_| ())?, "its name says")?;
    refused(
        &s.altered(
            &segments[1],
            &name(&segments[1]).replacen("00000001", "00000009", 1),
            |_| (),
        )?,
        "history",
    )?;
    refused(&s.altered(&segments[1], &name(&segments[1]), |c| c[4] = 9)?, "timeline")?;
    refused(&s.altered(&segments[1], &name(&segments[1]), |c| c.fill(0))?, "magic")?;
    // A copy that was padded for a recovery: zeros, without the switch record before them.
    refused(
        &s.altered(&segments[1], &name(&segments[1]), |c| c[8192..].fill(0))?,
        "padded",
    )?;
    refused(&s.altered(&segments[1], "not-wal", |_| ())?, "not the name")?;
    // A restored copy that was not adopted.
    let copy = s.altered(&segments[1], &name(&segments[1]), |_| ())?;
    s.scratch.write("altered/fairvault.restored", b"")?;
    refused(&copy, "restored copy")?;
    std::fs::remove_file(s.scratch.join("altered/fairvault.restored"))?;
    ensure!(s.push(&copy).0 == 0);
    // A missing file, a typo, a missing repository.
    ensure!(s.push(Path::new("/nonexistent/000000010000000000000001")).0 == 1);
    ensure!(s.fairvault(&["wal", "push", "acme", "--typo"]).0 == 1);
    std::fs::rename(s.scratch.join("vault"), s.scratch.join("away"))?;
    let (exit, text) = s.push(&segments[2]);
    ensure!(exit == 75, "a store that is away is temporary: {exit} {text}");
    std::fs::rename(s.scratch.join("away"), s.scratch.join("vault"))?;
    ensure!(s.push(&segments[2]).0 == 0);
    Ok(())
}

#[test]
fn histories_and_partial_segments() -> Result<()> {
    let s = Setup::new("side")?;
    let segment = s.segments(1)?.remove(0);
    let partial = format!("{}.partial", name(&segment));
    let path = s.altered(&segment, &partial, |_| ())?;
    ensure!(s.push(&path).0 == 0 && s.push(&path).0 == 0);
    let path = s.altered(&segment, &partial, |c| c[900_000..].fill(7))?;
    let (exit, text) = s.push(&path);
    ensure!(exit == 0 && text.contains("both are kept"), "{exit} {text}");
    let write = |file: &str, content: &[u8]| s.scratch.write(&format!("altered/pg_wal/{file}"), content);
    let history = write("00000002.history", b"1\t0/5000000\tno recovery target specified\n")?;
    ensure!(s.push(&history).0 == 0 && s.push(&history).0 == 0);
    ensure!(
        s.push(&write("00000002.history", b"1\t0/6000000\tanother\n")?).0 == 1,
        "another history of the same name"
    );
    ensure!(s.push(&write("00000003.history", b"rubbish\n")?).0 == 1);
    ensure!(
        s.push(&write(
            "000000010000000000000002.00000028.backup",
            b"START WAL LOCATION: 0/2000028\n"
        )?)
        .0 == 0
    );
    ensure!(s.get("00000002.history", &[]).0 == 0);
    ensure!(std::fs::read(s.scratch.join("fetched"))?.starts_with(b"1\t0/5000000"));
    Ok(())
}

#[test]
fn get_delivers_proves_absence_or_stops_recovery() -> Result<()> {
    let s = Setup::new("get")?;
    let segments = s.segments(5)?;
    for path in [&segments[0], &segments[1], &segments[3]] {
        ensure!(s.push(path).0 == 0);
    }
    ensure!(s.get(&name(&segments[0]), &[]).0 == 0);
    ensure!(std::fs::read(s.scratch.join("fetched"))? == std::fs::read(&segments[0])?);
    // Beyond the end: proven absent. In a hole: recovery must stop.
    ensure!(s.get(&name(&segments[4]), &[]).0 == 1);
    let (exit, text) = s.get(&name(&segments[2]), &[]);
    ensure!(exit == 200 && text.contains("hole"), "{exit} {text}");
    // Absent, but this recovery has to get further.
    let far = s.server.sql(&s.scratch, "select pg_current_wal_lsn()")?;
    ensure!(s.get(&name(&segments[4]), &["--through", &far]).0 == 200);
    ensure!(s.get("00000007.history", &[]).0 == 1);
    ensure!(s.get("00000007.history", &["--timeline", "7"]).0 == 200);
    ensure!(s.get("00000001.history", &["--timeline", "1"]).0 == 1);
    // Everything that goes wrong is 200, from a typo on.
    ensure!(s.get("nonsense", &[]).0 == 200);
    ensure!(s.get(&name(&segments[0]), &["--typo"]).0 == 200);
    ensure!(s.get(&name(&segments[0]), &["--through", "x"]).0 == 200);
    ensure!(s.fairvault(&["wal", "get"]).0 == 200);
    ensure!(
        s.fairvault(&["wal", "get", "unknown", &name(&segments[0]), "/dev/null"])
            .0
            == 200
    );
    ensure!(
        s.fairvault(&[
            "--config",
            "/nonexistent",
            "wal",
            "get",
            "acme",
            &name(&segments[0]),
            "/dev/null"
        ])
        .0 == 200
    );
    // A flipped bit in the stored segment.
    let stored = find(&s.scratch.join("vault/acme/wal"), &name(&segments[0])).context("the stored segment")?;
    let mut bytes = std::fs::read(&stored)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&stored, &bytes)?;
    let (exit, text) = s.get(&name(&segments[0]), &[]);
    ensure!(exit == 200 && text.contains("does not open"), "{exit} {text}");
    // A standby would be shut down by a code above 125.
    s.scratch.write("standby.signal", b"")?;
    ensure!(s.get("nonsense", &[]).0 == 75);
    Ok(())
}

fn find(folder: &Path, prefix: &str) -> Option<PathBuf> {
    for entry in std::fs::read_dir(folder).ok()?.flatten() {
        let path = entry.path();
        let found = if path.is_dir() {
            find(&path, prefix)
        } else {
            name(&path).starts_with(prefix).then_some(path)
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

#[test]
fn a_passphrase_is_never_stretched_while_archiving() -> Result<()> {
    let s = Setup::new("passphrase")?;
    let dir = s.scratch.path().display().to_string();
    let segment = s.segments(1)?.remove(0);
    s.scratch.write("pass", b"correct horse battery staple\n")?;
    let repo = format!("file://{dir}/vault2");
    let pass = format!("{dir}/pass");
    let with = |cache: &str, pass: &str, arguments: &[&str]| {
        let cache = format!("{dir}/{cache}");
        let conninfo = s.server.conninfo();
        let mut all = vec![
            "--repo-url",
            &repo,
            "--passphrase-file",
            pass,
            "--cache",
            &cache,
            "--conninfo",
            &conninfo,
        ];
        all.extend(arguments);
        code(&mut s.scratch.fairvault(&all))
    };
    let push = ["wal", "push", "acme", &segment.display().to_string()].map(str::to_owned);
    let push: Vec<&str> = push.iter().map(String::as_str).collect();
    ensure!(with("cache1", &pass, &["stanza", "create", "acme"]).0 == 0);
    ensure!(
        with("cache1", &pass, &push).0 == 0,
        "the key was cached when the stanza was made"
    );
    let (exit, text) = with("cache2", &pass, &push);
    ensure!(exit == 1 && text.contains("no cached key"), "{exit} {text}");
    let (exit, text) = with("cache2", &pass, &["info", "acme"]);
    ensure!(exit == 0, "{text}");
    ensure!(with("cache2", &pass, &push).0 == 0);
    // A wrong passphrase is never helped by the cache.
    s.scratch.write("wrong", b"wrong\n")?;
    let (exit, text) = with("cache2", &format!("{dir}/wrong"), &["info", "acme"]);
    ensure!(exit == 1 && text.contains("wrong key"), "{exit} {text}");
    Ok(())
}
