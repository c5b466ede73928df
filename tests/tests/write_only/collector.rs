//! Who decides what goes, and who deletes it: the operator's key, of which collection needs no part that opens content.

use anyhow::{Result, ensure};
use fairvault_tests::fixture::{Shape, refused};

use crate::fixture::{ARCHIVING, QUIET, WriteOnly};

const GC: [&str; 6] = ["gc", "acme", "--patience", "1s", "--progress", "none"];

/// Full backups with WAL between them. WAL that recovery into later WAL does not start from expires at once.
fn world(name: &str, retention: &str, backups: usize) -> Result<(WriteOnly, Vec<String>)> {
    let s = WriteOnly::new(
        name,
        Shape {
            more: retention,
            ..ARCHIVING
        },
    )?;
    s.sql("create table t (x text)")?;
    let mut ids = Vec::new();
    for _ in 0..backups {
        s.fill(1000)?;
        ids.push(s.backup_id(&["--type", "full"])?);
        for _ in 0..2 {
            s.fill(1)?;
            s.flush_archive(&s.server)?;
        }
    }
    Ok((s, ids))
}

/// Everything that a collection may delete.
fn stored(s: &WriteOnly) -> Vec<std::path::PathBuf> {
    ["packs", "roots", "index", "wal"]
        .iter()
        .flat_map(|folder| s.objects(folder))
        .collect()
}

#[test]
fn what_the_operator_decides_a_host_does_not() -> Result<()> {
    let (s, ids) = world("hostdecides", "retention = { full = 1, wal = \"0s\" }", 2)?;
    let word = "the operator key";
    // What would be decided, a host may look at.
    let plan = s.ok(&["expire", "acme", "--dry-run"])?;
    ensure!(plan.contains("no rule keeps it"), "{plan}");
    refused(s.fairvault(&["expire", "acme"]), 1, word)?;
    refused(s.fairvault(&["policy", "acme", "--minimum-retention", "0s"]), 1, word)?;
    refused(
        s.fairvault(&["stanza", "fence", "acme", "--reason", "a trial"]),
        1,
        word,
    )?;
    let info = s.ok(&["info", "acme"])?;
    ensure!(ids.iter().all(|id| info.contains(id.as_str())), "{info}");

    s.by_operator(&["expire", "acme"])?;
    let before = stored(&s);
    let plan = s.ok(&[&GC[..], &["--dry-run"]].concat())?;
    ensure!(plan.contains("would be deleted"), "{plan}");
    refused(s.fairvault(&GC), 1, "the operator")?;
    ensure!(stored(&s) == before, "a host has deleted something");
    // Who tried it is in the log.
    let audit = s.by_operator(&["audit", "acme"])?;
    for verb in ["expire", "policy", "stanza fence", "gc"] {
        ensure!(
            audit.matches(&format!("  {verb}: failed: ")).count() == 1,
            "{verb} is not in\n{audit}"
        );
    }
    s.by_operator(&GC)?;
    ensure!(s.objects("roots").len() == 1);
    s.all_good()
}

#[test]
fn a_host_deletes_no_wal_where_nothing_else_goes() -> Result<()> {
    let (s, ids) = world("hostwal", "retention = { full = 2, wal = \"0s\" }", 2)?;
    let plan = s.by_operator(&["expire", "acme"])?;
    ensure!(plan.contains("WAL of timeline 1 from"), "{plan}");
    ensure!(plan.matches("  stays  ").count() == ids.len(), "{plan}");
    let before = stored(&s);
    refused(s.fairvault(&GC), 1, "the operator")?;
    ensure!(stored(&s) == before, "a host has deleted something");
    s.by_operator(&GC)?;
    ensure!(stored(&s).len() < before.len());
    s.all_good()
}

#[test]
fn collection_needs_no_data_key() -> Result<()> {
    let (s, ids) = world("nodatakey", "retention = { full = 1, wal = \"0s\" }", 3)?;
    let (key, cache) = (s.path("collector.key"), s.path("collector"));
    s.ok(&["key", "generate", &key])?;
    let add = ["key", "add-slot", "acme", "collector", "--secret-file", &key];
    let said = s.by_operator(&[&add[..], &["--no-content"]].concat())?;
    ensure!(said.contains("reads nothing of what is stored"), "{said}");
    let said = s.by_operator(&[&add[..], &["--no-content"]].concat())?;
    ensure!(said.contains("nothing to do"), "{said}");
    let as_collector = |words: &[&str]| s.fairvault(&[words, &["--key-file", &key, "--cache", &cache]].concat());
    let (exit, said) = as_collector(&["key", "check", "acme"]);
    ensure!(
        exit == 0 && said.contains("expires and collects in key epoch 1, and reads nothing of it"),
        "{exit} {said}"
    );
    // It reads nothing.
    let to = s.path("r");
    let restore = [&["restore", "acme", "--to", &to], &QUIET[..]].concat();
    refused(as_collector(&restore), 1, "can write only")?;
    // It makes no keys and no slots: they would open less than they say, or to it alone.
    let spare = s.path("spare.key");
    s.ok(&["key", "generate", &spare])?;
    let objects = s.objects("keys");
    let add_spare = ["key", "add-slot", "acme", "spare", "--secret-file", &spare];
    refused(as_collector(&add_spare), 1, "needs the private key")?;
    refused(
        as_collector(&["key", "rotate", "acme", "--drop-slots"]),
        1,
        "needs the private key",
    )?;
    ensure!(s.objects("keys") == objects, "a collector has made slots");
    // A secret has one place: which of two a host would take is not certain.
    let host = s.path("host.key");
    let both = [
        "key",
        "add-slot",
        "acme",
        "both",
        "--no-content",
        "--secret-file",
        &host,
    ];
    refused(s.as_operator(&both), 1, "opens slot host already")?;
    let less = ["key", "add-slot", "acme", "less", "--write-only", "--secret-file", &key];
    refused(s.as_operator(&less), 1, "opens slot collector already")?;

    let (exit, said) = as_collector(&["expire", "acme"]);
    ensure!(exit == 0 && said.contains("WAL of timeline 1 from"), "{exit} {said}");
    let (before, wal) = (stored(&s), s.objects("wal").len());
    let (exit, said) = as_collector(&GC);
    ensure!(exit == 0 && said.contains("manifests deleted"), "{exit} {said}");
    ensure!(
        stored(&s).len() < before.len() && s.objects("roots").len() == 1,
        "{said}"
    );
    ensure!(s.objects("wal").len() < wal, "{said}");
    let (exit, said) = as_collector(&GC);
    ensure!(exit == 0 && said.contains("nothing deleted"), "{exit} {said}");
    // What is left is whole, and the host goes on.
    s.all_good()?;
    s.restores("left", &["--backup", &ids[2]], "3006")?;
    let said = s.ok(&[&["backup", "acme", "--fast"], &QUIET[..]].concat())?;
    ensure!(!said.contains("everything is read"), "{said}");
    s.all_good()
}
