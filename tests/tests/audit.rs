//! What was done is in the log, and the log is proved; key slots that were lost come back from a file.

use anyhow::{Result, ensure};
use fairvault_tests::fixture::{Fixture, Shape, files, refused};

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
        "MiB: clean",
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
