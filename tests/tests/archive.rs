//! `wal push` and `wal get` as PostgreSQL calls them: exit codes, refusals, holes.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fairvault_tests::{Fixture, Shape, code, run};

/// Small segments, pushed and fetched by hand.
struct Setup(Fixture);

impl std::ops::Deref for Setup {
    type Target = Fixture;
    fn deref(&self) -> &Fixture {
        &self.0
    }
}

impl Setup {
    fn new(name: &str) -> Result<Self> {
        let shape = Shape {
            flags: true,
            initdb: &["-k", "--wal-segsize=1"],
            ..Default::default()
        };
        Ok(Self(Fixture::new(name, shape)?))
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
    // Behind the record that ended the segment early.
    let last = |c: &mut Vec<u8>| c.last_mut().into_iter().for_each(|byte| *byte ^= 1);
    refused(&s.altered(first, &name(first), last)?, "other content")?;
    refused(
        &s.altered(&segments[1], &name(&segments[1]), |c| c[5000] ^= 1)?,
        "cannot be read beyond",
    )?;
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
    // Another stanza's key, one that is not there, and one that is none.
    let other = s.path("other.key");
    s.ok(&["key", "generate", &other])?;
    let (missing, none) = (s.path("missing.key"), s.path("none.key"));
    s.scratch.write("none.key", b"no key")?;
    for key in [&other, &missing, &none] {
        let cache = s.path("no-cache");
        let (exit, text) = s.get(&name(&segments[0]), &["--key-file", key, "--cache", &cache]);
        ensure!(exit == 200, "{key}: {exit} {text}");
    }
    // A flipped bit in the stored segment.
    let stored = s.objects("wal");
    let stored = stored
        .iter()
        .find(|path| name(path).starts_with(&name(&segments[0])))
        .context("the stored segment")?;
    let mut bytes = std::fs::read(stored)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(stored, &bytes)?;
    let (exit, text) = s.get(&name(&segments[0]), &[]);
    ensure!(exit == 200 && text.contains("does not open"), "{exit} {text}");
    // A standby would be shut down by a code above 125.
    s.scratch.write("standby.signal", b"")?;
    ensure!(s.get("nonsense", &[]).0 == 75);
    Ok(())
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
    // A second passphrase opens the stanza too, on hosts that remember the first one.
    s.scratch.write("second", b"another one\n")?;
    let second = format!("{dir}/second");
    ensure!(
        with(
            "cache2",
            &pass,
            &["key", "add-slot", "acme", "more", "--secret-file", &second]
        )
        .0 == 0
    );
    for cache in ["cache1", "cache2"] {
        let (exit, text) = with(cache, &second, &["info", "acme"]);
        ensure!(exit == 0, "{cache}: {text}");
        ensure!(with(cache, &second, &push).0 == 0);
    }
    // A wrong passphrase is never helped by the cache.
    s.scratch.write("wrong", b"wrong\n")?;
    let (exit, text) = with("cache2", &format!("{dir}/wrong"), &["info", "acme"]);
    ensure!(exit == 1 && text.contains("wrong key"), "{exit} {text}");
    Ok(())
}

/// A copy of the current, unfinished segment under a name; up to `flush` it is WAL.
fn unfinished(s: &Setup, more: &str) -> Result<(String, PathBuf, usize)> {
    s.sql("insert into t select md5(i::text) from generate_series(1, 300) i")?;
    let name = s.sql("select pg_walfile_name(pg_current_wal_flush_lsn())")?;
    let len = s.sql("select (pg_walfile_name_offset(pg_current_wal_flush_lsn())).file_offset")?;
    let path = s.altered(
        &s.server.data.join("pg_wal").join(&name),
        &format!("{name}{more}"),
        |_| (),
    )?;
    Ok((name, path, len.parse()?))
}

/// What is stored of a segment whose first `len` bytes are valid.
fn padded(wal: &[u8], len: usize) -> Vec<u8> {
    let mut part = wal[..len].to_vec();
    part.resize(wal.len(), 0);
    part
}

#[test]
fn parts_of_a_segment_end_a_recovery_and_never_stand_for_the_whole() -> Result<()> {
    let s = Setup::new("parts")?;
    let first = s.segments(1)?.remove(0);
    ensure!(s.push(&first).0 == 0);
    // Two partial files of one segment: the one that is valid further counts, and its rest is not WAL.
    let (name_of, short, short_len) = unfinished(&s, ".partial")?;
    ensure!(s.push(&short).0 == 0);
    let (same, long, len) = unfinished(&s, ".partial")?;
    ensure!(same == name_of && len > short_len, "still in the same segment");
    let (exit, text) = s.push(&long);
    ensure!(exit == 0 && text.contains("both are kept"), "{text}");
    let wal = std::fs::read(&long)?;
    ensure!(s.get(&name_of, &[]).0 == 0);
    let got = std::fs::read(s.scratch.join("fetched"))?;
    ensure!(got.len() == wal.len() && got[..len] == wal[..len]);
    ensure!(got[len + 16..].iter().all(|&b| b == 0), "padded with zeros");
    // It is enough for a recovery that ends in it, not for one that has to get further.
    let at = |offset: usize| {
        s.sql(&format!(
            "select pg_lsn('0/0') + ('x' || right('{name_of}', 8))::bit(32)::bigint * 1048576 + {offset}"
        ))
    };
    ensure!(s.get(&name_of, &["--through", &at(len)?]).0 == 0);
    ensure!(s.get(&name_of, &["--through", &at(len + 4096)?]).0 == 200);
    // Not beyond what was planned.
    ensure!(s.get(&name_of, &["--until", &at(short_len)?]).0 == 0);
    let got = std::fs::read(s.scratch.join("fetched"))?;
    ensure!(got[..short_len] == wal[..short_len] && got[short_len..].iter().all(|&b| b == 0));
    ensure!(s.get(&name_of, &["--until", &at(0)?]).0 == 1);
    // A copy in pg_wal that is longer is not hidden by the part, and counts for how far recovery gets; one that is no longer,
    // or no WAL, is replaced.
    let (same, longer, longer_len) = unfinished(&s, ".copy")?;
    ensure!(same == name_of && longer_len > len, "still in the same segment");
    let longer = std::fs::read(longer)?;
    let beside = s.scratch.join(&name_of);
    std::fs::write(&beside, &longer)?;
    std::fs::write(s.scratch.join("fetched"), b"before")?;
    ensure!(s.get(&name_of, &[]).0 == 1);
    ensure!(s.get(&name_of, &["--through", &at(longer_len)?]).0 == 1);
    ensure!(s.get(&name_of, &["--through", &at(longer_len + 4096)?]).0 == 200);
    ensure!(
        std::fs::read(s.scratch.join("fetched"))? == b"before",
        "nothing was delivered"
    );
    for other in [padded(&wal, len), vec![0; wal.len()], longer[..longer_len].to_vec()] {
        std::fs::write(&beside, other)?;
        ensure!(s.get(&name_of, &[]).0 == 0);
        ensure!(std::fs::read(s.scratch.join("fetched"))?[..len] == wal[..len]);
    }
    std::fs::remove_file(&beside)?;
    // Later WAL shows that the part is not the end: however often it is asked for.
    s.sql("select pg_switch_wal()")?;
    let next = s.segments(1)?.remove(0);
    ensure!(s.push(&next).0 == 0);
    for _ in 0..2 {
        let (exit, text) = s.get(&name_of, &[]);
        ensure!(exit == 200 && text.contains("hole"), "{exit} {text}");
    }
    // The whole takes over.
    let whole = s.server.data.join("pg_wal").join(&name_of);
    ensure!(s.push(&whole).0 == 0 && s.get(&name_of, &[]).0 == 0);
    ensure!(std::fs::read(s.scratch.join("fetched"))? == std::fs::read(&whole)?);
    Ok(())
}

#[test]
fn the_next_repository_has_what_the_first_lacks() -> Result<()> {
    let s = Setup::new("two")?;
    let dir = s.scratch.path().display().to_string();
    let config = format!(
        "[repo.a]\nurl = \"file://{dir}/vault\"\n[repo.b]\nurl = \"file://{dir}/vault2\"\n[defaults]\nrepos = [\"a\", \"b\"]\n\
         [stanza.acme]\nconninfo = \"{}\"\nkey = {{ file = \"{dir}/key\" }}\n",
        s.server.conninfo()
    );
    let config = s.scratch.write("two.toml", config.as_bytes())?.display().to_string();
    let with = |arguments: &[&str]| {
        code(
            &mut s
                .scratch
                .fairvault(&[&["--config", config.as_str()], arguments].concat()),
        )
    };
    let (exit, text) = with(&["stanza", "create", "acme"]);
    ensure!(exit == 0, "{text}");
    let segments = s.segments(2)?;
    let (name_of, partial, len) = unfinished(&s, ".partial")?;
    // The first repository has a part only, the second the whole.
    ensure!(with(&["--repo", "a", "wal", "push", "acme", &partial.display().to_string()]).0 == 0);
    s.sql("select pg_switch_wal()")?;
    let whole = s.server.data.join("pg_wal").join(&name_of);
    ensure!(with(&["--repo", "b", "wal", "push", "acme", &whole.display().to_string()]).0 == 0);
    let target = s.path("fetched");
    let get = |name: &str| with(&["wal", "get", "acme", name, &target]);
    ensure!(get(&name_of).0 == 0);
    ensure!(std::fs::read(&target)? == std::fs::read(&whole)? && len > 0);
    // Pushed to both, or not acknowledged.
    let path = segments[0].display().to_string();
    std::fs::rename(s.path("vault2"), s.path("away"))?;
    let (exit, text) = with(&["wal", "push", "acme", &path]);
    ensure!(exit == 75 && text.contains("repository b"), "{exit} {text}");
    // With one repository away, what the other has is delivered, and absence is not proved.
    ensure!(get(&name(&segments[0])).0 == 0);
    ensure!(get(&name(&segments[1])).0 == 200);
    std::fs::rename(s.path("away"), s.path("vault2"))?;
    ensure!(with(&["wal", "push", "acme", &path]).0 == 0);
    Ok(())
}

/// Whatever is wrong with this program is no word on where the WAL ends.
#[test]
fn a_panic_proves_nothing() -> Result<()> {
    let s = Setup::new("panic")?;
    let segments = s.segments(1)?;
    let (path, target) = (segments[0].display().to_string(), s.path("fetched"));
    let segment = name(&segments[0]);
    for (arguments, expected) in [
        (vec!["wal", "get", "acme", &segment, &target], 200),
        (vec!["wal", "push", "acme", &path], 1),
        (vec!["info", "acme"], 1),
    ] {
        let mut command = s.scratch.command("env");
        command
            .arg(format!("HOME={}", s.path("")))
            .args(["FAIRVAULT_FAULT=panic", &s.path("fairvault")]);
        let ended = command.args(&s.options).args(&arguments).output()?;
        let text = String::from_utf8_lossy(&ended.stderr);
        ensure!(
            ended.status.code() == Some(expected),
            "{arguments:?}: {:?} {text}",
            ended.status
        );
        ensure!(text.contains("a deliberate panic"), "{text}");
    }
    ensure!(!Path::new(&target).exists() && s.objects("wal").is_empty());
    Ok(())
}

#[test]
fn a_store_that_never_answers_proves_nothing() -> Result<()> {
    let s = Setup::new("still")?;
    // The kernel takes connections, and nobody ever reads from them.
    let silent = std::net::TcpListener::bind("127.0.0.1:0")?;
    let dir = s.scratch.path().display();
    let config = format!(
        "[repo.main]\nurl = \"s3://bucket/x\"\nendpoint = \"http://127.0.0.1:{}\"\nregion = \"us-east-1\"\n\
         access_key = \"key\"\nsecret_key_file = \"{dir}/secret\"\nrequest_timeout = \"1s\"\nretry_timeout = \"2s\"\n\
         [stanza.acme]\nconninfo = \"{}\"\nkey = {{ file = \"{dir}/key\" }}\n",
        silent.local_addr()?.port(),
        s.server.conninfo()
    );
    s.scratch.write("secret", b"secret")?;
    let config = s.scratch.write("still.toml", config.as_bytes())?.display().to_string();
    let get = || {
        let wanted = ["wal", "get", "acme", "000000010000000000000001", "/dev/null"];
        code(
            &mut s
                .scratch
                .fairvault(&[&["--config", config.as_str()], &wanted[..]].concat()),
        )
    };
    let (exit, text) = get();
    ensure!(exit == 200 && text.contains("s3://bucket/x"), "{exit} {text}");
    // A standby tries again, and is told "later": it would be shut down by 200, and would take 1 for the end.
    s.scratch.write("standby.signal", b"")?;
    let (exit, text) = get();
    ensure!(exit == 75 && text.contains("trying again"), "{exit} {text}");
    Ok(())
}

#[test]
fn the_last_segment_of_a_timeline_under_its_complete_name() -> Result<()> {
    let s = Setup::new("always")?;
    s.segments(1)?;
    let (name_of, path, len) = unfinished(&s, "")?;
    let (exit, text) = s.push(&path);
    ensure!(
        exit == 1 && text.contains("as soon as the history of the new timeline is"),
        "{exit} {text}"
    );
    // As a standby that archives does it after a promotion: the history says where the timeline ended.
    let end = s.sql("select pg_current_wal_insert_lsn()")?;
    let history = format!("1\t{end}\tno recovery target specified\n");
    let history = s.scratch.write("altered/pg_wal/00000002.history", history.as_bytes())?;
    ensure!(s.push(&history).0 == 0);
    let (exit, text) = s.push(&path);
    ensure!(exit == 0, "{text}");
    ensure!(s.push(&path).0 == 0, "the same again");
    ensure!(s.get(&name_of, &[]).0 == 0);
    let (got, wal) = (std::fs::read(s.scratch.join("fetched"))?, std::fs::read(&path)?);
    ensure!(got[..len] == wal[..len] && got.len() == wal.len());
    Ok(())
}

#[test]
fn keys_come_from_files_variables_and_commands() -> Result<()> {
    let s = Setup::new("keys")?;
    let dir = s.scratch.path().display().to_string();
    let text = std::fs::read_to_string(s.path("key"))?;
    let info = |source: &str, variables: &[&str]| -> Result<(i32, String)> {
        let config = format!("[repo.a]\nurl = \"file://{dir}/vault\"\n[stanza.acme]\nkey = {{ {source} }}\n");
        let config = s.scratch.write("keys.toml", config.as_bytes())?.display().to_string();
        let mut command = s.scratch.command("env");
        command
            .arg(format!("HOME={dir}"))
            .args(variables)
            .arg(s.scratch.join("fairvault"));
        Ok(code(command.args(["--config", &config, "info", "acme"])))
    };
    let good = |(exit, text): (i32, String)| -> Result<()> {
        ensure!(exit == 0 && text.contains("encrypted"), "{exit} {text}");
        Ok(())
    };
    good(info(&format!("file = \"{dir}/key\""), &[])?)?;
    good(info("env = \"VAULT_KEY\"", &[&format!("VAULT_KEY={}", text.trim())])?)?;
    good(info(&format!("command = [\"cat\", \"{dir}/key\"]"), &[])?)?;
    for (source, exit, word) in [
        ("env = \"VAULT_KEY\"".to_owned(), 2, "VAULT_KEY for the key is not set"),
        (
            "command = [\"false\"]".to_owned(),
            75,
            "which gives the key, ended with",
        ),
        ("command = [\"/nonexistent\"]".to_owned(), 2, "running /nonexistent"),
        (
            "command = [\"echo\", \"fairvault-key-1:12\"]".to_owned(),
            2,
            "64 hexadecimal digits",
        ),
        (format!("file = \"{dir}/key\", env = \"X\""), 2, "exactly one"),
        ("file = \"/nonexistent\"".to_owned(), 2, "key generate"),
    ] {
        let (code, text) = info(&source, &[])?;
        ensure!(code == exit && text.contains(word), "{source}: {code} {text}");
    }
    // A key file that everybody can read is not used.
    run(s.scratch.command("chmod").args(["0644", &s.path("key")]))?;
    let (exit, text) = info(&format!("file = \"{dir}/key\""), &[])?;
    ensure!(exit == 2 && text.contains("chmod 0600"), "{exit} {text}");
    Ok(())
}
