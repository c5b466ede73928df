//! What was done is in the log, and the log is proved; key slots that were lost come back from a file.

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
