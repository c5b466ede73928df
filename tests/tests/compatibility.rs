//! A repository that version 0.1.0 has written is read, restored, continued and collected by every later version.
//!
//! `tests/fixtures/v1` was written before keys could be rotated, slots could write only, WAL could expire and stanzas
//! could be upgraded; `v1-relative` after manifests got relative columns. They are never written again.
//! `FAIRVAULT_FIXTURES=write` makes the last one where it is not there.

mod old;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use fairvault_format::sha256;
use fairvault_tests::fixture::{Fixture, Shape, field, refused};
use fairvault_tests::receiver::wait_until_durable;
use fairvault_tests::tools::reader;
use fairvault_tests::{Receiver, run};

use old::{AT_ONCE, Content, QUERY, RESTORED, digest, insert, query, restore, strip, write_if_asked};

const CONFIGURATION: &str = "retention = { full = 1 }\ncompression = { level = 22 }";
/// The repositories, oldest first.
const OLD: &str = "v1";
const LATER: &str = "v1-relative";

fn folder(repository: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(repository)
}

/// A scratch copy of a repository, and what it is said to hold.
fn copy_of(repository: &str, name: &str) -> Result<(Fixture, Content)> {
    write_if_asked(&folder(LATER), write_fixture)?;
    let s = Fixture::of_repository(name, &folder(repository), CONFIGURATION)?;
    Ok((s, Content::read(&folder(repository))?))
}

#[test]
fn an_old_repository_is_read() -> Result<()> {
    is_read(OLD, "oldread")?;
    is_read(LATER, "laterread")
}

fn is_read(repository: &str, name: &str) -> Result<()> {
    let (s, content) = copy_of(repository, name)?;
    let info = s.ok(&["info", "acme", "--output", "json"])?;
    let backups = content.backups()?;
    for backup in &backups {
        ensure!(
            info.contains(&format!("\"id\":\"{}\"", backup.id)),
            "{} is not in {info}",
            backup.id
        );
    }
    ensure!(info.matches("\"restorable\":true").count() == backups.len(), "{info}");
    ensure!(info.contains("\"hold\":\"a court wants it\""), "{info}");
    let expired = content.word("expired")?;
    ensure!(!info.contains(expired), "{info}");
    let audit = s.ok(&["audit", "acme"])?;
    ensure!(audit.contains(&format!("backup {expired} has expired")), "{audit}");
    let verified = s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    ensure!(verified.contains("all good"), "{verified}");
    for root in s.objects("roots") {
        // Feature bit 0: its columns may be relative.
        ensure!(
            std::fs::read(&root)?[6] == u8::from(repository == LATER),
            "{}",
            root.display()
        );
    }
    // Not less is looked at than there is.
    let count = |what: &str| -> Result<usize> { Ok(content.word(what)?.parse()?) };
    let wal: Vec<String> = s.objects("wal").iter().map(|path| path.display().to_string()).collect();
    ensure!(
        wal.iter().filter(|name| name.contains(".d/")).count() == count("pieces")?,
        "{wal:?}"
    );
    ensure!(
        wal.iter().filter(|name| name.contains(".history.")).count() == count("histories")?,
        "{wal:?}"
    );
    Ok(())
}

#[test]
fn an_old_repository_restores_byte_for_byte() -> Result<()> {
    for (repository, name) in [(OLD, "oldback"), (LATER, "laterback")] {
        let (s, content) = copy_of(repository, name)?;
        ensure!(content.backups()?.len() >= 2);
        // The end of its WAL is across a promotion, and through pieces.
        old::restores_byte_for_byte(&s, &content, |name, id| {
            restore(&s, name, &[&["--backup", id], AT_ONCE.as_slice()].concat())
        })?;
    }
    Ok(())
}

#[test]
fn an_old_repository_is_continued() -> Result<()> {
    is_continued(OLD, "oldon")
}

#[test]
fn a_later_repository_is_continued() -> Result<()> {
    is_continued(LATER, "lateron")
}

fn is_continued(repository: &str, name: &str) -> Result<()> {
    let (s, content) = copy_of(repository, name)?;
    restore(&s, "copy", &["--archiving", "keep"])?;
    s.configure("copy", &s.archiving())?;
    let server = s.start("copy", 5432)?;
    ensure!(query(&s, &server)? == content.word("latest")?);
    server.sql(&s.scratch, "insert into t values (9999, 'later')")?;
    s.flush_archive(&server)?;
    let incremental = s.backup_id(&["--type", "incr"])?;
    let built_on = s.backup_id(&["--type", "incr"])?;
    server.sql(&s.scratch, "insert into t values (10000, 'latest')")?;
    s.flush_archive(&server)?;
    let info = s.ok(&["info", "acme", "--output", "json"])?;
    ensure!(info.contains(&format!("\"parent\":\"{incremental}\"")), "{info}");
    ensure!(
        info.matches("\"restorable\":true").count() == content.backups()?.len() + 2,
        "{info}"
    );
    // Content of the old backups is not stored again.
    let new = s.ok(&[
        "backup",
        "acme",
        "--type",
        "full",
        "--fast",
        "--progress",
        "none",
        "--output",
        "json",
    ])?;
    let (new_plain, plain): (u64, u64) = (
        field(&new, "new_plain_bytes")?.parse()?,
        field(&new, "plain_bytes")?.parse()?,
    );
    ensure!(new_plain * 4 < plain, "{new}");
    let expected = query(&s, &server)?;
    server.stop(&s.scratch, "fast")?;
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    restore(&s, "again", &["--backup", &built_on])?;
    ensure!(query(&s, &s.start("again", 5433)?)? == expected);
    Ok(())
}

#[test]
fn an_old_repository_is_collected() -> Result<()> {
    is_collected(OLD, "oldgc")
}

#[test]
fn a_later_repository_is_collected() -> Result<()> {
    is_collected(LATER, "latergc")
}

fn is_collected(repository: &str, name: &str) -> Result<()> {
    let (s, content) = copy_of(repository, name)?;
    let gc = || s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"]);
    let roots = s.objects("roots").len();
    let said = gc()?;
    ensure!(
        s.objects("roots").len() == roots - 1,
        "the manifest of the expired backup goes: {said}"
    );
    let backups = content.backups()?;
    let [held, last] = backups.as_slice() else {
        anyhow::bail!("two backups")
    };
    // Of the two, the newer one alone is needed once nobody holds the other.
    s.ok(&["policy", "acme", "--minimum-full", "0"])?;
    s.ok(&["unhold", "acme", &held.id])?;
    let none = CONFIGURATION.replace("full = 1", "full = 0, min_full = 0, incr = 1");
    let config = std::fs::read_to_string(&s.options[1])?.replace(CONFIGURATION, &none);
    s.scratch.write("fairvault.toml", config.as_bytes())?;
    let plan = s.ok(&["expire", "acme", "--trust-clock"])?;
    ensure!(!s.ok(&["info", "acme"])?.contains(&held.id), "{plan}");
    let said = gc()?;
    ensure!(s.objects("roots").len() == roots - 2, "{said}");
    ensure!(gc()?.contains("nothing deleted"), "a second time");
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    restore(&s, "copy", &[&["--backup", &last.id], AT_ONCE.as_slice()].concat())?;
    ensure!(digest(&s.scratch.join("copy"))? == (last.files, last.digest.clone()));
    restore(&s, "latest", &[])?;
    ensure!(query(&s, &s.start("latest", 5433)?)? == content.word("latest")?);
    Ok(())
}

/// What was written before keys could be rotated is of the first epoch: it stays restorable when another one rules, also
/// one with a public key, and the stanza goes on. Finds a reader that takes an epoch for granted, and a rotation that loses
/// slots, backups or WAL of the one before.
#[test]
fn an_old_repository_gets_new_keys() -> Result<()> {
    gets_new_keys(OLD, ["oldkeys", "oldpublic"])
}

#[test]
fn a_later_repository_gets_new_keys() -> Result<()> {
    gets_new_keys(LATER, ["laterkeys", "laterpublic"])
}

/// Under symmetric keys, and under a public one.
fn gets_new_keys(repository: &str, names: [&str; 2]) -> Result<()> {
    for (name, public) in names.into_iter().zip([false, true]) {
        let (s, content) = copy_of(repository, name)?;
        let (new, vault) = (s.path("new"), s.path("vault"));
        s.ok(&["key", "generate", &new])?;
        let rotate = ["key", "rotate", "acme", "--new-secret-file", &new];
        let more: &[&str] = if public { &["--public-key"] } else { &[] };
        let said = s.ok(&[&rotate[..], more].concat())?;
        ensure!(said.contains("key epoch 2 follows on 1"), "{said}");
        refused(s.fairvault(&["info", "acme"]), 1, "were rotated")?;
        let config = std::fs::read_to_string(&s.options[1])?;
        let named = |name: &str| format!("key = {{ file = \"{}\" }}", s.path(name));
        ensure!(config.contains(&named("key")), "{config}");
        std::fs::write(&s.options[1], config.replace(&named("key"), &named("new")))?;

        // The new secret opens all of it, and nothing of it has changed.
        let check = s.ok(&["key", "check", "acme"])?;
        ensure!(check.contains("opens key epoch 1 (a manifest"), "{check}");
        let verify = ["verify", "acme", "--level", "data", "--progress", "none"];
        ensure!(s.ok(&verify)?.contains("all good"));
        let backups = content.backups()?;
        for (number, backup) in backups.iter().enumerate() {
            let name = format!("copy{number}");
            restore(&s, &name, &[&["--backup", &backup.id], AT_ONCE.as_slice()].concat())?;
            let expected = (backup.files, backup.digest.clone());
            ensure!(digest(&s.scratch.join(&name))? == expected, "{}", backup.id);
            let by_reader = s.scratch.join(&format!("reader{number}"));
            let to = by_reader.display().to_string();
            reader(&[&vault, "restore", "acme", &backup.id, &to, "--key-file", &new])?;
            ensure!(digest(&by_reader)? == expected, "{} by the reader", backup.id);
        }

        // It goes on under the new keys.
        restore(&s, "on", &["--archiving", "keep"])?;
        s.configure("on", &s.archiving())?;
        let server = s.start("on", 5432)?;
        ensure!(query(&s, &server)? == content.word("latest")?);
        server.sql(&s.scratch, "insert into t values (9999, 'later')")?;
        s.flush_archive(&server)?;
        let full = s.backup_id(&["--type", "full"])?;
        server.sql(&s.scratch, "insert into t values (10000, 'latest')")?;
        let last = s.backup_id(&["--type", "incr"])?;
        let info = s.ok(&["info", "acme", "--output", "json"])?;
        ensure!(info.contains(&format!("\"parent\":\"{full}\"")), "{info}");
        ensure!(
            info.matches("\"restorable\":true").count() == backups.len() + 2,
            "{info}"
        );
        s.flush_archive(&server)?;
        let expected = query(&s, &server)?;
        server.stop(&s.scratch, "fast")?;
        ensure!(s.ok(&verify)?.contains("all good"));
        restore(&s, "again", &["--backup", &last])?;
        let again = s.start("again", 5433)?;
        ensure!(query(&s, &again)? == expected);
        again.stop(&s.scratch, "fast")?;
    }
    Ok(())
}

fn write_fixture() -> Result<()> {
    let s = Fixture::new(
        "v1",
        Shape {
            more: CONFIGURATION,
            stanza: false,
            settings: "autovacuum = off",
            initdb: &["-k", "--wal-segsize=1", "--locale=C"],
            ..Default::default()
        },
    )?;
    strip(&s)?;
    s.sql("create table t (i int primary key, x text)")?;
    s.server.stop(&s.scratch, "fast")?;
    s.configure("data5432", &s.archiving())?;
    s.server.start(&s.scratch)?;
    s.ok(&["stanza", "create", "acme"])?;
    insert(&s, &s.server, 1, 500)?;
    let expired = s.backup_id(&["--type", "full"])?;
    insert(&s, &s.server, 501, 1000)?;
    s.sql("delete from t where i % 7 = 0")?;
    let held = s.backup_id(&["--type", "full"])?;
    s.ok(&["hold", "acme", &held, "--reason", "a court wants it"])?;
    insert(&s, &s.server, 2001, 2200)?;
    let last = s.backup_id(&["--type", "incr"])?;
    insert(&s, &s.server, 3001, 3050)?;
    s.flush_archive(&s.server)?;
    s.ok(&["policy", "acme", "--minimum-full", "1"])?;
    s.ok(&["expire", "acme"])?;
    s.server.stop(&s.scratch, "fast")?;
    // A copy takes its place, on another timeline; its newest WAL is there in pieces.
    restore(&s, "two", &["--archiving", "keep"])?;
    let two = s.start("two", 5432)?;
    insert(&s, &two, 4001, 4050)?;
    let segment = s.flush_archive(&two)?;
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
    for n in 0..3 {
        insert(&s, &two, 5001 + n * 10, 5005 + n * 10)?;
        wait_until_durable(&s, &two)?;
    }
    receiver.stop()?;
    two.stop(&s.scratch, "immediate")?;
    let text = describe(&s, &expired, &[(&held, "full"), (&last, "incr")], &segment)?;
    ensure!(s.objects("leases").is_empty(), "a lease is left");
    let folder = folder(LATER);
    std::fs::create_dir_all(&folder)?;
    run(std::process::Command::new("cp")
        .arg("-r")
        .arg(s.scratch.join("vault"))
        .arg(&folder))?;
    std::fs::copy(s.scratch.join("key"), folder.join("key"))?;
    // Last: without it, nothing is taken for a fixture.
    Ok(std::fs::write(folder.join("content.txt"), text)?)
}

fn describe(s: &Fixture, expired: &str, backups: &[(&String, &str)], segment: &str) -> Result<String> {
    let version = s.ok(&["--version"])?;
    let mut text = format!(
        "# A repository of format version 1, written by {}. Never written again: every later version reads it.\n\
         # A directory repository with stanza acme, and the key that opens it. The cluster is a PostgreSQL 15 without what\n\
         # it can do without (no templates, few system views), with segments of 1 MiB.\n#\n\
         # expired  a full backup that has expired, and was not collected\n\
         # backup   id, type, files, SHA-256 over \"path SHA-256\" of each of them in order (without {}), result of the query\n\
         # latest   result of the query at the end of the WAL, on timeline 2\n\
         # pieces, histories: objects of these kinds; segment: one of timeline 2, and its SHA-256\n\
         # The query: {QUERY}\n\n\
         expired {expired}\n",
        version.trim(),
        RESTORED.join(", ")
    );
    for (number, (id, kind)) in backups.iter().enumerate() {
        let name = format!("held{number}");
        restore(s, &name, &[&["--backup", id], AT_ONCE.as_slice()].concat())?;
        let (files, digest) = digest(&s.scratch.join(&name))?;
        let server = s.start(&name, 5433)?;
        writeln!(text, "backup {id} {kind} {files} {digest} {}", query(s, &server)?)?;
        server.stop(&s.scratch, "fast")?;
    }
    restore(s, "end", &[])?;
    let server = s.start("end", 5433)?;
    writeln!(text, "latest {}", query(s, &server)?)?;
    server.stop(&s.scratch, "fast")?;
    let wal: Vec<String> = s.objects("wal").iter().map(|path| path.display().to_string()).collect();
    writeln!(
        text,
        "pieces {}",
        wal.iter().filter(|name| name.contains(".d/")).count()
    )?;
    writeln!(
        text,
        "histories {}",
        wal.iter().filter(|name| name.contains(".history.")).count()
    )?;
    let got = s.path("segment");
    s.ok(&["wal", "get", "acme", segment, &got])?;
    writeln!(
        text,
        "segment {segment}\nsegment-sha256 {}",
        hex::encode(sha256(&std::fs::read(&got)?))
    )?;
    Ok(text)
}
