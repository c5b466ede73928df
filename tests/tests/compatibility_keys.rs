//! A repository with what came after the first one of `compatibility`: two key epochs, a public key and a host that writes
//! only, WAL in records, WAL that has expired, a cluster that took another's place, a timeline that was closed, and an
//! incremental backup across a rotation. It is read, restored, continued, copied, verified and collected by every later
//! version.
//!
//! `tests/fixtures/v1-keys` is never written again. `FAIRVAULT_FIXTURES=write` makes one where there is none.

mod old;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fairvault_format::sha256;
use fairvault_tests::fixture::{BACKUP_JSON, Fixture, Shape, field, files, refused};
use fairvault_tests::receiver::wait_until_durable;
use fairvault_tests::{Receiver, run};

use old::{AT_ONCE, Content, QUERY, RESTORED, digest, insert, query, restore, strip, write_if_asked};

const CONFIGURATION: &str = "retention = { full = 1, wal = \"0s\" }\ncompression = { level = 22, wal = \"records\" }";
/// A backup is restored on the timeline that it is of: of the newest cluster's, one is closed.
const OWN_TIMELINE: [&str; 2] = ["--target-timeline", "current"];
/// What is committed stays small.
const MOST_BYTES: u64 = 450 << 10;
const VERIFY: [&str; 6] = ["verify", "acme", "--level", "data", "--progress", "none"];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/v1-keys")
}

/// A scratch copy of the repository, with the key of its host beside the operator's.
fn kept(name: &str) -> Result<(Fixture, Content)> {
    write_if_asked(&folder(), write_fixture)?;
    let s = Fixture::of_repository(name, &folder(), CONFIGURATION)?;
    s.scratch
        .write("host.key", &std::fs::read(folder().join("host.key"))?)?;
    Ok((s, Content::read(&folder())?))
}

fn restore_own(s: &Fixture, name: &str, id: &str, more: &[&str]) -> Result<()> {
    restore(
        s,
        name,
        &[&["--backup", id][..], &AT_ONCE, &OWN_TIMELINE, more].concat(),
    )
}

/// By the key that writes only.
fn by_host(s: &Fixture, words: &[&str]) -> (i32, String) {
    let (key, cache) = (s.path("host.key"), s.path("hostcache"));
    s.fairvault(&[words, &["--key-file", &key, "--cache", &cache]].concat())
}

/// Whether a WAL object has sections of records, codec 3.
fn has_records(object: &Path) -> Result<bool> {
    let bytes = std::fs::read(object)?;
    let mut rest = bytes.get(80..).context("an object without a header")?;
    while let Some(section) = rest.first_chunk::<16>() {
        if section[1] == 3 {
            return Ok(true);
        }
        let len = u32::from_le_bytes([section[4], section[5], section[6], section[7]]);
        rest = rest.get(16 + len as usize..).context("a section that is cut off")?;
    }
    Ok(false)
}

/// Segments and pieces.
fn wal_of_records(s: &Fixture) -> Result<usize> {
    let mut count = 0;
    for object in s.objects("wal") {
        let name = object.display().to_string();
        if !name.contains(".backup.") && !name.contains(".history.") {
            count += usize::from(has_records(&object)?);
        }
    }
    Ok(count)
}

#[test]
fn what_came_later_is_read() -> Result<()> {
    let (s, content) = kept("keysread")?;
    let info = s.ok(&["info", "acme", "--output", "json"])?;
    let backups = content.backups()?;
    for backup in &backups {
        ensure!(info.contains(&format!("\"id\":\"{}\"", backup.id)), "{info}");
    }
    ensure!(info.matches("\"restorable\":true").count() == backups.len(), "{info}");
    for word in ["earlier-cluster", "cluster"] {
        ensure!(info.contains(&format!("\"{}\"", content.word(word)?)), "{word}: {info}");
    }
    let shown = s.ok(&["info", "acme"])?;
    ensure!(shown.contains("WAL timeline 1 was closed"), "{shown}");
    ensure!(shown.contains("of the earlier cluster"), "{shown}");
    let expired = content.word("expired")?;
    ensure!(!shown.contains(expired), "{shown}");
    let audit = s.ok(&["audit", "acme"])?;
    ensure!(audit.contains(&format!("backup {expired} has expired")), "{audit}");
    ensure!(s.ok(&VERIFY)?.contains("all good"));

    // Every epoch opens with the operator's key, and nothing of any with the host's.
    let check = s.ok(&["key", "check", "acme"])?;
    let (exit, of_host) = by_host(&s, &["key", "check", "acme"]);
    ensure!(exit == 0, "{of_host}");
    for epoch in [1, 2] {
        ensure!(
            check.contains(&format!("opens key epoch {epoch} (a manifest")),
            "{check}"
        );
        let writes = format!("writes in key epoch {epoch}, and reads nothing");
        ensure!(of_host.contains(&writes), "{of_host}");
    }
    let to = s.path("none");
    refused(by_host(&s, &["restore", "acme", "--to", &to]), 1, "can write only")?;
    // Not less is looked at than there is.
    ensure!(wal_of_records(&s)? == content.word("records")?.parse::<usize>()?);
    Ok(())
}

#[test]
fn what_came_later_restores_byte_for_byte() -> Result<()> {
    let (s, content) = kept("keysback")?;
    ensure!(content.backups()?.len() == 3);
    // The end of its WAL is past the closed timeline, and through pieces.
    old::restores_byte_for_byte(&s, &content, |name, id| restore_own(&s, name, id, &[]))
}

#[test]
fn what_came_later_is_continued_by_operator_and_host() -> Result<()> {
    let (s, content) = kept("keyson")?;
    restore(&s, "on", &["--archiving", "keep"])?;
    s.configure("on", &s.archiving())?;
    let server = s.start("on", 5432)?;
    ensure!(query(&s, &server)? == content.word("latest")?);
    insert(&s, &server, 9000, 9010)?;
    s.flush_archive(&server)?;
    let incremental = s.backup_id(&["--type", "incr"])?;
    insert(&s, &server, 9100, 9110)?;
    let (exit, said) = by_host(&s, &[&BACKUP_JSON[..], &["--type", "full"]].concat());
    ensure!(exit == 0, "{said}");
    let full = field(&said, "id")?;
    s.flush_archive(&server)?;
    let expected = query(&s, &server)?;
    server.stop(&s.scratch, "fast")?;
    let info = s.ok(&["info", "acme", "--output", "json"])?;
    ensure!(
        info.matches("\"restorable\":true").count() == content.backups()?.len() + 2,
        "{info}"
    );
    ensure!(s.ok(&VERIFY)?.contains("all good"));
    for (name, id) in [("by-operator", &incremental), ("by-host", &full)] {
        restore(&s, name, &["--backup", id])?;
        let copy = s.start(name, 5433)?;
        ensure!(query(&s, &copy)? == expected, "{name}");
        copy.stop(&s.scratch, "fast")?;
    }
    Ok(())
}

#[test]
fn what_came_later_is_copied() -> Result<()> {
    let (s, content) = kept("keyscopy")?;
    let backups = content.backups()?;
    let config = std::fs::read_to_string(&s.options[1])?;
    let second = s.path("second");
    let both = format!("{config}repos = [\"main\", \"second\"]\n[repo.second]\nurl = \"file://{second}\"\n");
    // The other repository sees both clusters, one after the other. They recover from what is there before it is.
    let first = backups.first().context("a backup")?;
    restore_own(&s, "before", &first.id, &[])?;
    restore(&s, "after", &[])?;
    for name in ["before", "after"] {
        s.start(name, 5432)?.stop(&s.scratch, "fast")?;
    }
    s.scratch.write("fairvault.toml", both.as_bytes())?;
    for (name, verb) in [("before", "create"), ("after", "upgrade")] {
        let server = s.start(name, 5432)?;
        s.ok(&["--repo", "second", "stanza", verb, "acme"])?;
        server.stop(&s.scratch, "fast")?;
    }
    let said = s.ok(&["copy", "acme", "--progress", "none"])?;
    ensure!(said.matches(" copied, ").count() == backups.len(), "{said}");
    ensure!(
        s.ok(&[&["--repo", "second"][..], &VERIFY].concat())?
            .contains("all good")
    );
    // What is there does not come from the first one.
    std::fs::rename(s.path("vault"), s.path("vault.away"))?;
    let only = both.replace("repos = [\"main\", \"second\"]", "repos = [\"second\"]");
    s.scratch.write("fairvault.toml", only.as_bytes())?;
    for (number, backup) in backups.iter().enumerate() {
        let name = format!("copy{number}");
        restore_own(&s, &name, &backup.id, &[])?;
        let expected = (backup.files, backup.digest.clone());
        ensure!(digest(&s.scratch.join(&name))? == expected, "{}", backup.id);
    }
    restore(&s, "latest", &[])?;
    ensure!(query(&s, &s.start("latest", 5433)?)? == content.word("latest")?);
    Ok(())
}

#[test]
fn what_came_later_is_collected() -> Result<()> {
    let (s, content) = kept("keysgc")?;
    let gc = || s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"]);
    let (roots, wal) = (s.objects("roots").len(), s.objects("wal").len());
    let said = gc()?;
    ensure!(s.objects("roots").len() == roots - 1, "{said}");
    ensure!(
        s.objects("wal").len() < wal && said.contains("objects of WAL deleted"),
        "WAL that has expired goes: {said}"
    );
    ensure!(gc()?.contains("nothing deleted"), "a second time");
    ensure!(s.ok(&VERIFY)?.contains("all good"));
    let backups = content.backups()?;
    let check = |which: &[usize]| -> Result<()> {
        for &number in which {
            let (backup, name) = (&backups[number], format!("copy{number}-{}", s.objects("roots").len()));
            restore_own(&s, &name, &backup.id, &[])?;
            let expected = (backup.files, backup.digest.clone());
            ensure!(digest(&s.scratch.join(&name))? == expected, "{}", backup.id);
        }
        Ok(())
    };
    check(&[0, 1, 2])?;
    // The last backup of the earlier cluster is needed no more, nor is the cluster's WAL.
    s.ok(&["unhold", "acme", &backups[0].id])?;
    s.ok(&["expire", "acme", "--trust-clock"])?;
    gc()?;
    ensure!(s.objects("roots").len() == roots - 2);
    let earlier = format!("wal/{:016x}", content.word("earlier-cluster")?.parse::<u64>()?);
    let left = s.objects(&earlier);
    ensure!(
        left.iter().all(|path| path.display().to_string().contains(".history")),
        "{left:?}"
    );
    ensure!(s.ok(&VERIFY)?.contains("all good"));
    check(&[1, 2])?;
    restore(&s, "latest", &[])?;
    ensure!(query(&s, &s.start("latest", 5433)?)? == content.word("latest")?);
    Ok(())
}

fn system_identifier(s: &Fixture) -> Result<String> {
    s.sql("select system_identifier from pg_control_system()")
}

/// The stopped cluster becomes another one, with the same content, and WAL that goes on behind its own: what pg_upgrade
/// makes has as much in common with the cluster before, and cannot be stored as small.
fn become_another_cluster(s: &Fixture) -> Result<()> {
    let path = s.server.data.join("global/pg_control");
    let mut control = std::fs::read(&path)?;
    let crc = |control: &[u8], at: usize| crc32c::crc32c(&control[..at]).to_le_bytes();
    let mut places = (200..508).step_by(4);
    let at = places
        .find(|&at| control[at..at + 4] == crc(&control, at))
        .context("pg_control has no CRC")?;
    control[0] ^= 0xff;
    let sum = crc(&control, at);
    control[at..at + 4].copy_from_slice(&sum);
    std::fs::write(&path, control)?;
    let mut reset = s.server.program(&s.scratch, "pg_resetwal");
    run(reset.arg("-D").arg(&s.server.data)).map(|_| ())
}

fn write_fixture() -> Result<()> {
    let s = Fixture::new(
        "v1keys",
        Shape {
            more: CONFIGURATION,
            stanza: false,
            settings: "autovacuum = off\nfull_page_writes = off",
            initdb: &["-k", "--wal-segsize=1", "--locale=C"],
            ..Default::default()
        },
    )?;
    strip(&s)?;
    s.sql("create table t (i int primary key, x text)")?;
    s.server.stop(&s.scratch, "fast")?;
    s.configure("data5432", &s.archiving())?;
    s.server.start(&s.scratch)?;
    s.ok(&["stanza", "create", "acme", "--public-key"])?;
    let host = s.path("host.key");
    s.ok(&["key", "generate", &host])?;
    let add_host = [
        "key",
        "add-slot",
        "acme",
        "host",
        "--secret-file",
        &host,
        "--write-only",
    ];
    s.ok(&add_host)?;

    // The earlier cluster: a backup that has expired, with WAL behind it, and one that is held.
    let earlier = system_identifier(&s)?;
    insert(&s, &s.server, 1, 500)?;
    let expired = s.backup_id(&["--type", "full"])?;
    for n in 0..2 {
        insert(&s, &s.server, 501 + n * 10, 505 + n * 10)?;
        s.flush_archive(&s.server)?;
    }
    let held = s.backup_id(&["--type", "full"])?;
    s.flush_archive(&s.server)?;
    let plan = s.ok(&["expire", "acme"])?;
    ensure!(plan.contains("WAL of timeline 1 from"), "{plan}");
    s.ok(&["hold", "acme", &held, "--reason", "a court wants it"])?;

    // The cluster that takes its place: a backup by the host, new keys, and an incremental backup on it.
    s.server.stop(&s.scratch, "fast")?;
    become_another_cluster(&s)?;
    s.server.start(&s.scratch)?;
    let now = system_identifier(&s)?;
    ensure!(now != earlier, "it is the same cluster");
    s.ok(&["stanza", "upgrade", "acme"])?;
    insert(&s, &s.server, 2001, 2100)?;
    let (exit, said) = by_host(&s, &[&BACKUP_JSON[..], &["--type", "full"]].concat());
    ensure!(exit == 0, "{said}");
    let full = field(&said, "id")?;
    s.ok(&["key", "rotate", "acme", "--drop-slots"])?;
    s.ok(&add_host)?;
    insert(&s, &s.server, 3001, 3050)?;
    let last = s.backup_id(&["--type", "incr"])?;
    insert(&s, &s.server, 3101, 3150)?;
    s.flush_archive(&s.server)?;
    s.server.stop(&s.scratch, "fast")?;

    // A copy goes on, on another timeline; the one that it left is closed. Its newest WAL is there in pieces.
    restore(&s, "two", &["--archiving", "keep"])?;
    let two = s.start("two", 5432)?;
    insert(&s, &two, 4001, 4050)?;
    let segment = s.flush_archive(&two)?;
    let fence = [
        "stanza",
        "fence",
        "acme",
        "--timeline",
        "1",
        "--reason",
        "a copy goes on",
    ];
    s.ok(&fence)?;
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
    for n in 0..3 {
        insert(&s, &two, 5001 + n * 10, 5005 + n * 10)?;
        wait_until_durable(&s, &two)?;
    }
    receiver.stop()?;
    two.stop(&s.scratch, "immediate")?;

    let mut text = describe(&s, &[(&held, "full"), (&full, "full"), (&last, "incr")], &segment)?;
    let records = wal_of_records(&s)?;
    ensure!(records > 0, "no WAL is stored in records");
    write!(
        text,
        "expired {expired}\nearlier-cluster {earlier}\ncluster {now}\nrecords {records}\n"
    )?;
    ensure!(s.objects("leases").is_empty(), "a lease is left");
    let mut bytes = 0;
    for path in files(&s.scratch.join("vault")) {
        bytes += std::fs::metadata(path)?.len();
    }
    ensure!(bytes < MOST_BYTES, "{bytes} bytes are too many for what is committed");
    std::fs::create_dir_all(folder())?;
    run(Command::new("cp").arg("-r").arg(s.scratch.join("vault")).arg(folder()))?;
    for key in ["key", "host.key"] {
        std::fs::copy(s.scratch.join(key), folder().join(key))?;
    }
    // Last: without it, nothing is taken for a fixture.
    Ok(std::fs::write(folder().join("content.txt"), text)?)
}

fn describe(s: &Fixture, backups: &[(&String, &str)], segment: &str) -> Result<String> {
    let version = s.ok(&["--version"])?;
    let mut text = format!(
        "# A repository of format version 1, written by {}. Never written again: every later version reads it.\n\
         # A directory repository with stanza acme, the operator's key, and the key of a host that writes only. Two key\n\
         # epochs with public keys; WAL in records; timeline 1 of the newest cluster is closed. The cluster is a PostgreSQL 15\n\
         # without what it can do without, with segments of 1 MiB.\n#\n\
         # backup   id, type, files, SHA-256 over \"path SHA-256\" of each of them in order (without {}), result of the query:\n\
         #          one of the earlier cluster, which is held; one by the host; one across the rotation\n\
         # latest   result of the query at the end of the WAL, on timeline 2\n\
         # segment: one of timeline 2, and its SHA-256\n\
         # expired  a full backup that has expired with WAL behind it; neither was collected\n\
         # earlier-cluster, cluster: system identifiers; records: WAL objects with sections of codec 3\n\
         # The query: {QUERY}\n\n",
        version.trim(),
        RESTORED.join(", ")
    );
    for (number, (id, kind)) in backups.iter().enumerate() {
        let name = format!("held{number}");
        restore_own(s, &name, id, &[])?;
        let (files, digest) = digest(&s.scratch.join(&name))?;
        let server = s.start(&name, 5433)?;
        writeln!(text, "backup {id} {kind} {files} {digest} {}", query(s, &server)?)?;
        server.stop(&s.scratch, "fast")?;
    }
    restore(s, "end", &[])?;
    let server = s.start("end", 5433)?;
    writeln!(text, "latest {}", query(s, &server)?)?;
    server.stop(&s.scratch, "fast")?;
    let got = s.path("segment");
    s.ok(&["wal", "get", "acme", segment, &got])?;
    let hash = hex::encode(sha256(&std::fs::read(&got)?));
    writeln!(text, "segment {segment}\nsegment-sha256 {hash}")?;
    Ok(text)
}
