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

    // This host remembers the slots, and garbage in their place is no reason to write none, or to leave one out.
    let slot = s.scratch.join("vault/acme/keys/00000001/main");
    let kept = std::fs::read(&slot)?;
    std::fs::remove_file(&slot)?;
    let (late, nowhere) = (s.path("late"), s.path("nowhere"));
    refused(
        s.fairvault(&["key", "export", "acme", &late]),
        6,
        "the repository has lost",
    )?;
    let slots_of = |kit: &str| -> Result<Vec<String>> {
        let text = std::fs::read_to_string(kit)?;
        let slots = text.lines().filter(|line| line.starts_with("slot "));
        Ok(slots.map(str::to_owned).collect())
    };
    ensure!(slots_of(&late)? == slots_of(&kit)?, "{:?}", slots_of(&late)?);
    std::fs::write(&slot, b"garbage")?;
    let (again, empty) = (s.path("again"), s.path("empty"));
    let said = s.fairvault(&["key", "export", "acme", &again]);
    refused(said, 6, "left out: ")?;
    ensure!(slots_of(&again)? == slots_of(&kit)?, "{:?}", slots_of(&again)?);
    // What is there is not written over; a host that remembers nothing has nothing to write.
    refused(s.fairvault(&["key", "import", "acme", &kit]), 1, "and another one")?;
    let export = ["key", "export", "acme", &empty, "--cache", &nowhere];
    ensure!(s.fairvault(&export).0 != 0 && !std::path::Path::new(&empty).exists());
    std::fs::remove_file(&slot)?;
    // A line that was damaged does not keep the others from coming back.
    let damaged = format!("{}slot keys/00000001/torn 00ff\n", std::fs::read_to_string(&kit)?);
    std::fs::write(&late, damaged)?;
    refused(s.fairvault(&["key", "import", "acme", &late]), 6, "left out: line ")?;
    ensure!(std::fs::read(&slot)? == kept);
    s.ok(&["key", "check", "acme"])?;

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
    // That there was nothing to do is said once an hour.
    gc()?;
    gc()?;
    ensure!(sizes(&s, "operation", "gc, ")? == [deleted]);
    ensure!(sizes(&s, "operation", "gc: once")? == [0]);

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

/// Where this host counts what it archives and fetches.
const TALLY: &str = "tally";
/// Where a user counts commands that have left nothing.
const LOOKS: &str = "looks-";

/// The file of counts whose name begins like this.
fn counts(s: &Fixture, begin: &str) -> Result<std::path::PathBuf> {
    let begins = |path: &std::path::PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(begin)
    };
    let mut found = files(&s.scratch.join("cache")).into_iter().filter(begins);
    found.next().context("nothing is counted")
}

/// An hour passes for it.
fn age(s: &Fixture, begin: &str) -> Result<()> {
    let path = counts(s, begin)?;
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
    age(&s, TALLY)?;
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
    std::fs::write(counts(&s, TALLY)?, "{\"wal push\":{")?;
    push(4)?;
    // Nothing fails, and nobody waits long, where the log cannot be written; it is tried again in an hour.
    let log = s.scratch.join("vault/acme/log");
    let mode = log.metadata()?.permissions();
    std::fs::set_permissions(&log, std::fs::Permissions::from_mode(0o555))?;
    age(&s, TALLY)?;
    let began = Instant::now();
    let pushed = push(4);
    let took = began.elapsed();
    std::fs::set_permissions(&log, mode)?;
    pushed?;
    ensure!(took < Duration::from_secs(15), "{took:?}");
    push(4)?;
    ends("wal push", &[&first])?;
    age(&s, TALLY)?;
    push(4)?;
    let second = format!("B: 1 segment stored, {}; 3 were there already", names[4]);
    ends("wal push", &[&first, &second])?;

    get(0)?;
    ends("wal get", &[])?;
    age(&s, TALLY)?;
    get(1)?;
    let fetched = format!("2 MiB: 2 segments fetched, {} to {}", names[0], names[1]);
    ends("wal get", &[&fetched])?;
    // An archive that has stopped has said all that it stored once there is a backup.
    push(4)?;
    age(&s, TALLY)?;
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
        &["info", "acme"],
    ] {
        age(&s, TALLY)?;
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
    age(&s, TALLY)?;
    s.ok(&["wal", "push", "acme", &path])?;
    // What could not be said then is said now.
    ensure!(!sizes(&s, "operation", "wal push")?.is_empty());
    ensure!(sizes(&s, "operation", "wal get")?.len() == 1);
    Ok(())
}

/// What entries say that begin like this.
fn said(s: &Fixture, begin: &str) -> Result<Vec<String>> {
    let audit = json(s, &["audit", "acme"])?;
    let entries = audit["entries"].as_array().context("no entries")?.iter();
    let said = entries.filter_map(|entry| entry["what"].as_str().map(str::to_owned));
    Ok(said.filter(|said| said.starts_with(begin)).collect())
}

/// Finds a command that fails before it has changed anything, and leaves no trace of who tried it.
#[test]
fn what_fails_before_it_changes_anything_is_in_the_log() -> Result<()> {
    let s = Fixture::new("auditrefused", SMALL)?;
    let spare = s.path("spare");
    s.ok(&["key", "generate", &spare])?;
    for (arguments, verb) in [
        (&["hold", "acme", "none", "--reason", "a trial"][..], "hold"),
        (&["unhold", "acme", "none"], "unhold"),
        (&["lock", "acme", "--days", "1"], "lock"),
        (&["key", "remove-slot", "acme", "none"], "key remove-slot"),
        (
            &["key", "add-slot", "acme", "no/name", "--secret-file", &spare],
            "key add-slot",
        ),
        (
            &["backup", "acme", "--conninfo", "host=/nowhere", "--progress", "none"],
            "backup",
        ),
    ] {
        // Each time, and not only the first in an hour.
        for count in 1..=2 {
            let (exit, text) = s.fairvault(arguments);
            ensure!(exit != 0, "{arguments:?}: {text}");
            let failed = said(&s, &format!("{verb}: failed: "))?;
            ensure!(failed.len() == count, "{arguments:?}: {failed:?} {text}");
        }
    }
    ensure!(said(&s, "hold: failed: stanza acme has no backup \"none\"")?.len() == 2);
    // What cannot be understood is refused before anything is opened.
    let entries = s.objects("log").len();
    refused(s.fairvault(&["gc", "acme", "--patience", "soon"]), 2, "--patience")?;
    refused(
        s.fairvault(&["hold", "other", "none", "--reason", "a trial"]),
        3,
        "no stanza",
    )?;
    ensure!(s.objects("log").len() == entries);

    // A slot that cannot be deleted is not said to be.
    s.ok(&["key", "add-slot", "acme", "spare", "--secret-file", &spare])?;
    let slots = s.objects("keys");
    let folder = slots
        .first()
        .and_then(|slot| slot.parent())
        .context("a folder of slots")?;
    let may = |mode| std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode));
    let remove = ["key", "remove-slot", "acme", "spare"];
    may(0o500)?;
    let (exit, text) = s.fairvault(&remove);
    may(0o700)?;
    ensure!(exit != 0 && s.objects("keys") == slots, "{exit} {text}");
    let noted = said(&s, "removal of key slot spare: ")?;
    ensure!(noted.len() == 2 && noted[0].contains(": began: keys/"), "{noted:?}");
    ensure!(noted[1].contains(": failed: "), "{noted:?}");
    ensure!(said(&s, "key slot spare removed")?.is_empty());
    s.ok(&remove)?;
    ensure!(said(&s, "key slot spare removed: done")?.len() == 1);
    ensure!(said(&s, "removal of key slot spare: began")?.len() == 2);
    Ok(())
}

/// Finds a command that only looks, or has nothing to do, and is not in the log; and one that fills it.
#[test]
fn what_only_looks_is_in_the_log_once_an_hour() -> Result<()> {
    let shape = Shape {
        more: "retention = { full = 2 }",
        ..SMALL
    };
    let s = Fixture::new("auditlooks", shape)?;
    s.backup_id(&[])?;
    let to = s.path("r");
    for (arguments, verb) in [
        (&["info", "acme"][..], "info"),
        (&["check", "acme"], "check"),
        (&["key", "list", "acme"], "key list"),
        (&["policy", "acme"], "policy"),
        (&["expire", "acme", "--dry-run"], "expire --dry-run"),
        (&["gc", "acme", "--dry-run", "--progress", "none"], "gc --dry-run"),
        (
            &["repair", "acme", "--dry-run", "--progress", "none"],
            "repair --dry-run",
        ),
        (&["restore", "acme", "--dry-run", "--to", &to], "restore --dry-run"),
        // Nothing is to be done.
        (&["expire", "acme"], "expire"),
        (&["stanza", "create", "acme"], "stanza create"),
        (&["stanza", "upgrade", "acme"], "stanza upgrade"),
    ] {
        for _ in 0..3 {
            s.fairvault(arguments);
        }
        let found = said(&s, &format!("{verb}: "))?;
        ensure!(found.len() == 1, "{arguments:?}: {found:?}");
        ensure!(verb == "check" || found[0] == format!("{verb}: once"), "{found:?}");
    }
    ensure!(said(&s, "audit: ")? == ["audit: once"]);
    // What follows within the hour is said when that is over, by whoever comes then.
    let entries = s.objects("log").len();
    s.ok(&["info", "acme"])?;
    ensure!(s.objects("log").len() == entries, "the hour is not over");
    age(&s, LOOKS)?;
    s.ok(&["info", "acme"])?;
    ensure!(said(&s, "info: ")? == ["info: once", "info: 4 times"]);
    ensure!(said(&s, "gc --dry-run: ")? == ["gc --dry-run: once", "gc --dry-run: 2 times"]);
    // A look that fails is one, too.
    age(&s, LOOKS)?;
    for _ in 0..2 {
        refused(s.restore("r", &["--dry-run", "--backup", "none"]), 3, "no backup")?;
    }
    let failed = said(&s, "restore --dry-run: failed: ")?;
    ensure!(failed.len() == 1 && failed[0].contains("no backup"), "{failed:?}");
    // A backup says what is due, and itself.
    age(&s, LOOKS)?;
    s.backup()?;
    let failed = said(&s, "restore --dry-run: failed: ")?;
    ensure!(failed.len() == 2, "{failed:?}");

    // Where the log cannot be written, nothing fails, and nothing is lost.
    age(&s, LOOKS)?;
    let (entries, log) = (s.objects("log").len(), s.scratch.join("vault/acme/log"));
    let may = |mode| std::fs::set_permissions(&log, std::fs::Permissions::from_mode(mode));
    may(0o500)?;
    let began = Instant::now();
    let found = s.fairvault(&["info", "acme"]);
    let held = s.fairvault(&["hold", "acme", "none", "--reason", "a trial"]);
    let took = began.elapsed();
    let left = s.objects("log").len();
    may(0o700)?;
    refused(found, 0, "restorable")?;
    refused(held, 3, "no backup")?;
    ensure!(
        left == entries && took < Duration::from_secs(15),
        "{left} {entries} {took:?}"
    );
    // The next look says what failed; what was tried already waits for its hour.
    s.ok(&["key", "list", "acme"])?;
    ensure!(said(&s, "hold: failed: ")?.len() == 1 && said(&s, "info: ")?.len() == 2);
    age(&s, LOOKS)?;
    s.ok(&["key", "list", "acme"])?;
    ensure!(said(&s, "info: ")?.len() == 3);
    Ok(())
}
