//! What was done is in the log, and the log is proved; key slots that were lost come back from a file.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{Fixture, SMALL, Shape, files, refused};
use serde_json::Value;

#[test]
fn who_did_what_is_in_the_log() -> Result<()> {
    let s = Fixture::new("audit", Shape::default())?;
    s.sql("create table t (x int)")?;
    let id = s.backup_id(&[])?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    s.ok(&["verify", "acme", "--progress", "none"])?;
    refused(s.restore("r", &[]), 1, "not empty")?;
    s.ok(&["hold", "acme", &id, "--reason", "a trial"])?;
    let audit = s.ok(&["audit", "acme"])?;
    for said in [
        "postgres@",
        "stanza acme was created, encrypted",
        &format!("backup {id} began"),
        &format!("backup {id} is complete"),
        &format!("restore of backup {id}, "),
        "MiB: done",
        "iB: clean",
        "failed: ",
        &format!("backup {id} is held: a trial"),
        "each signed",
    ] {
        ensure!(audit.contains(said), "{said:?} is not in\n{audit}");
    }
    let json = s.ok(&["audit", "acme", "--output", "json"])?;
    ensure!(
        json.contains("\"kind\":\"hold\"") && json.contains("\"user\":\"postgres\""),
        "{json}"
    );

    // An entry less, at the end or in the middle, is noticed: by a host that saw it, and by any.
    let log = files(&s.scratch.join("vault/acme/log"));
    let hide = |path: &std::path::Path| -> Result<()> { Ok(std::fs::rename(path, s.path("hidden"))?) };
    let back = |path: &std::path::Path| -> Result<()> { Ok(std::fs::rename(s.path("hidden"), path)?) };
    let last = &log[log.len() - 1];
    hide(last)?;
    refused(s.fairvault(&["audit", "acme"]), 4, "rolled back")?;
    back(last)?;
    let middle = &log[log.len() / 2];
    hide(middle)?;
    refused(
        s.fairvault(&["audit", "acme", "--cache", &s.path("elsewhere")]),
        4,
        "is missing",
    )?;
    back(middle)?;
    // One that was changed.
    let good = std::fs::read(middle)?;
    let mut bad = good.clone();
    let at = bad.len() / 2;
    bad[at] ^= 1;
    std::fs::write(middle, &bad)?;
    refused(s.fairvault(&["audit", "acme"]), 4, "log entry")?;
    std::fs::write(middle, &good)?;
    s.ok(&["audit", "acme"]).map(|_| ())
}

/// Finds a repair that fails and leaves no trace in the log of what it had read and changed until then.
#[test]
fn who_failed_is_in_the_log() -> Result<()> {
    let s = Fixture::new("auditfailed", SMALL)?;
    s.backup_id(&[])?;
    let repair = ["repair", "acme", "--progress", "none"];
    let runs = s.objects("index");
    let run = runs.first().context("an index run")?;
    let may = |mode| std::fs::set_permissions(run, std::fs::Permissions::from_mode(mode));
    may(0o000)?;
    let failed = s.fairvault(&repair);
    may(0o600)?;
    refused(failed, 1, "index/")?;
    s.ok(&repair)?;
    let audit = s.ok(&["audit", "acme"])?;
    for said in [
        "repair: 0 objects can be seen again; then it failed: ",
        "iB: nothing to do",
    ] {
        ensure!(audit.matches(said).count() == 1, "{said:?} is not in\n{audit}");
    }
    Ok(())
}

#[test]
fn lost_key_slots_come_back_from_a_file() -> Result<()> {
    let s = Fixture::new("keykit", Shape::default())?;
    let id = s.backup_id(&[])?;
    let said = s.ok(&["key", "check", "acme"])?;
    ensure!(said.contains("opens key epoch 1 (a manifest"), "{said}");
    let kit = s.path("kit");
    s.ok(&["key", "export", "acme", &kit])?;
    ensure!(!std::fs::read_to_string(&kit)?.contains(std::fs::read_to_string(s.path("key"))?.trim()));
    refused(s.fairvault(&["key", "export", "acme", &kit]), 1, "never overwritten")?;

    std::fs::remove_dir_all(s.scratch.join("vault/acme/keys"))?;
    refused(s.fairvault(&["key", "check", "acme"]), 3, "no stanza")?;
    s.ok(&["key", "import", "acme", &kit])?;
    s.ok(&["key", "check", "acme"])?;
    ensure!(s.ok(&["info", "acme", "--cache", &s.path("elsewhere")])?.contains(&id));
    let audit = s.ok(&["audit", "acme"])?;
    for said in [
        "KiB: 1 slots written to a file",
        "KiB: failed: writing ",
        "KiB: 1 slots are there",
    ] {
        ensure!(audit.matches(said).count() == 1, "{said:?} is not in\n{audit}");
    }
    ensure!(audit.matches("  key export, ").count() == 2, "{audit}");
    ensure!(audit.matches("  key import, ").count() == 1, "{audit}");
    ensure!(audit.matches("key check: it opens everything").count() == 2, "{audit}");

    // Neither another slot nor another key passes.
    let text = std::fs::read_to_string(&kit)?;
    std::fs::write(
        &kit,
        text.replace("slot keys/00000001/main", "slot keys/00000001/other"),
    )?;
    refused(s.fairvault(&["key", "import", "acme", &kit]), 2, "name of another")?;
    s.ok(&["key", "generate", &s.path("key2")])?;
    let other = s.path("key2");
    refused(
        s.fairvault(&["key", "check", "acme", "--key-file", &other]),
        1,
        "wrong key",
    )
}

/// What a command prints as JSON.
fn json(s: &Fixture, words: &[&str]) -> Result<Value> {
    let said = s.ok(&[words, &["--output", "json"]].concat())?;
    let line = said.lines().find(|line| line.starts_with("{\""));
    Ok(serde_json::from_str(line.context(said.clone())?)?)
}

/// Sizes in entries of a kind whose words begin like this.
fn sizes(s: &Fixture, kind: &str, words: &str) -> Result<Vec<u64>> {
    let audit = json(s, &["audit", "acme"])?;
    let entries = audit["entries"].as_array().context("no entries")?.iter();
    let of_kind = entries.filter(|entry| entry["kind"] == kind);
    let meant = of_kind.filter(|entry| entry["what"].as_str().is_some_and(|what| what.starts_with(words)));
    meant.map(|entry| entry["bytes"].as_u64().context("no size")).collect()
}

#[test]
fn what_was_deleted_is_in_the_log_with_its_size() -> Result<()> {
    let shape = Shape {
        archiving: true,
        more: "retention = { full = 1, wal = \"0s\" }",
        ..SMALL
    };
    let s = Fixture::new("auditgc", shape)?;
    let gc = || -> Result<Value> {
        let quiet = ["gc", "acme", "--patience", "1s", "--progress", "none"];
        Ok(json(&s, &quiet)?["report"].clone())
    };
    let full = || -> Result<()> {
        s.sql("create table if not exists t (x text); truncate t; insert into t select md5(random()::text) from generate_series(1, 20000)")?;
        s.backup_id(&["--type", "full"])?;
        s.flush_archive(&s.server)?;
        s.ok(&["expire", "acme"])?;
        Ok(())
    };
    // WAL from before the first backup goes, and nothing else.
    s.flush_archive(&s.server)?;
    full()?;
    let wal = sizes(&s, "expired-wal", "WAL of timeline 1")?;
    ensure!(
        !wal.is_empty() && wal.iter().all(|bytes| *bytes > 0 && bytes % (1 << 20) == 0),
        "{wal:?}"
    );
    let done = gc()?;
    let deleted = done["wal"]["bytes"].as_u64().context("wal")?;
    ensure!(deleted > 0 && done["packs"]["objects"] == 0, "{done}");
    ensure!(sizes(&s, "gc-swept", "")?.is_empty(), "{done}");
    ensure!(sizes(&s, "operation", "gc, ")? == [deleted], "{done}");
    // Nothing to do, and nothing to say.
    gc()?;
    ensure!(sizes(&s, "operation", "gc")?.len() == 1);

    full()?;
    let expired = sizes(&s, "expired", "backup ")?;
    ensure!(expired.len() == 1 && expired[0] > 0, "{expired:?}");
    let done = gc()?;
    let of = |what: &str| done[what]["bytes"].as_u64().unwrap_or_default();
    let swept: u64 = sizes(&s, "gc-swept", "")?.iter().sum();
    // Parts of the index that it has replaced go after that was said.
    ensure!(of("roots") > 0 && swept >= of("packs") + of("roots"), "{swept} {done}");
    ensure!(swept <= of("packs") + of("roots") + of("index_runs"), "{swept} {done}");
    ensure!(sizes(&s, "operation", "gc, ")? == [deleted, of("wal")], "{done}");
    Ok(())
}

/// The file in which this host counts what it archives and fetches.
fn tally(s: &Fixture) -> Result<std::path::PathBuf> {
    let found = files(&s.scratch.join("cache")).into_iter();
    let mut found = found.filter(|path| path.ends_with("tally"));
    found.next().context("nothing is counted")
}

/// An hour passes for it.
fn age(s: &Fixture) -> Result<()> {
    let path = tally(s)?;
    let mut books: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    for book in books.as_object_mut().context("counts")?.values_mut() {
        for name in ["/counting/began_us", "/tried_us"] {
            if let Some(us) = book.pointer_mut(name) {
                *us = (us.as_i64().context("a time")? - 3_600_000_000).into();
            }
        }
    }
    Ok(std::fs::write(&path, books.to_string())?)
}

#[test]
fn what_was_pushed_and_fetched_is_in_the_log_once_an_hour() -> Result<()> {
    let shape = Shape {
        settings: "wal_keep_size = 64MB\n",
        ..SMALL
    };
    let s = Fixture::new("audittally", shape)?;
    let mut names = Vec::new();
    for at in 0..5 {
        names.push(s.sql("select pg_walfile_name(pg_current_wal_insert_lsn())")?);
        s.sql(&format!("create table t{at} (x int); select pg_switch_wal()"))?;
    }
    let push = |at: usize| -> Result<()> {
        let path = s.server.data.join("pg_wal").join(&names[at]);
        s.ok(&["wal", "push", "acme", &path.display().to_string()]).map(|_| ())
    };
    let get = |at: usize| s.ok(&["wal", "get", "acme", &names[at], &s.path("got")]);
    // Ends of what entries say.
    let ends = |what: &str, ends: &[&str]| -> Result<()> {
        let audit = json(&s, &["audit", "acme"])?;
        let entries = audit["entries"].as_array().context("no entries")?.iter();
        let said: Vec<_> = entries.filter_map(|entry| entry["what"].as_str()).collect();
        let said: Vec<_> = said.into_iter().filter(|said| said.starts_with(what)).collect();
        let fits = said.len() == ends.len() && said.iter().zip(ends).all(|(said, end)| said.ends_with(end));
        ensure!(fits, "{ends:?} is not {said:?}");
        Ok(())
    };
    push(0)?;
    push(1)?;
    push(1)?;
    ends("wal push", &[])?;
    age(&s)?;
    push(2)?;
    let first = format!(
        "B: 3 segments stored, {} to {}; 1 was there already",
        names[0], names[2]
    );
    ends("wal push", &[&first])?;
    let lengths = s.objects("wal").into_iter().map(|path| Ok(path.metadata()?.len()));
    let stored = lengths.sum::<Result<u64>>()?;
    ensure!(sizes(&s, "operation", "wal push")? == [stored], "{stored}");
    // What comes then has an hour of its own.
    push(3)?;
    ends("wal push", &[&first])?;

    // What cannot be read is counted anew.
    std::fs::write(tally(&s)?, "{\"wal push\":{")?;
    push(4)?;
    // Nothing fails, and nobody waits long, where the log cannot be written; it is tried again in an hour.
    let log = s.scratch.join("vault/acme/log");
    let mode = log.metadata()?.permissions();
    std::fs::set_permissions(&log, std::fs::Permissions::from_mode(0o555))?;
    age(&s)?;
    let began = Instant::now();
    let pushed = push(4);
    let took = began.elapsed();
    std::fs::set_permissions(&log, mode)?;
    pushed?;
    ensure!(took < Duration::from_secs(15), "{took:?}");
    push(4)?;
    ends("wal push", &[&first])?;
    age(&s)?;
    push(4)?;
    let second = format!("B: 1 segment stored, {}; 3 were there already", names[4]);
    ends("wal push", &[&first, &second])?;

    get(0)?;
    ends("wal get", &[])?;
    age(&s)?;
    get(1)?;
    let fetched = format!("2 MiB: 2 segments fetched, {} to {}", names[0], names[1]);
    ends("wal get", &[&fetched])?;
    // An archive that has stopped has said all that it stored once there is a backup.
    push(4)?;
    age(&s)?;
    s.backup()?;
    ends(
        "wal push",
        &[&first, &second, "wal push: nothing stored; 1 was there already"],
    )
}

/// A store may hang while something is noted, and come back when nobody waits for it any more.
#[test]
fn a_note_that_hangs_fails_nothing() -> Result<()> {
    let shape = Shape {
        settings: "wal_keep_size = 64MB\n",
        ..SMALL
    };
    let s = Fixture::new("audithangs", shape)?;
    let name = s.sql("select pg_walfile_name(pg_current_wal_insert_lsn())")?;
    s.sql("create table t (x int); select pg_switch_wal()")?;
    let path = s.server.data.join("pg_wal").join(&name).display().to_string();
    let got = s.path("got");
    s.ok(&["wal", "push", "acme", &path])?;
    for arguments in [
        &["wal", "push", "acme", &path][..],
        &["wal", "get", "acme", &name, &got],
    ] {
        age(&s)?;
        let mut command = s.scratch.command("env");
        command
            .arg(format!("HOME={}", s.path("")))
            .args(["FAIRVAULT_FAULT=notes hang", &s.path("fairvault")])
            .args(&s.options)
            .args(arguments);
        let began = Instant::now();
        let ended = command.output()?;
        let (took, text) = (began.elapsed(), String::from_utf8_lossy(&ended.stderr));
        ensure!(ended.status.success(), "{arguments:?}: {} {text}", ended.status);
        ensure!(!text.contains("panicked"), "{arguments:?}: {text}");
        // It was waited for, and not for long.
        let fits = Duration::from_secs(2)..Duration::from_secs(10);
        ensure!(fits.contains(&took), "{arguments:?}: {took:?}");
    }
    age(&s)?;
    s.ok(&["wal", "push", "acme", &path])?;
    // What could not be said then is said now.
    ensure!(!sizes(&s, "operation", "wal push")?.is_empty());
    ensure!(sizes(&s, "operation", "wal get")?.len() == 1);
    Ok(())
}
