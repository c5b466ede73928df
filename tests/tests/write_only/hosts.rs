//! What a host with such a key can do, and what it cannot.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fairvault_format::keys::{self, Secret};
use fairvault_tests::fixture::{Fixture, SMALL, Shape, field, refused};
use fairvault_tests::receiver::{Receiver, wait_until_durable};
use fairvault_tests::tools::reader;

use crate::fixture::{ARCHIVING, QUIET, WriteOnly};

/// The key mode that an object says.
fn mode_of(path: &Path) -> Result<u8> {
    let bytes = std::fs::read(path)?;
    bytes.get(12).copied().with_context(|| format!("{}", path.display()))
}

#[test]
fn a_host_writes_and_reads_nothing() -> Result<()> {
    let s = WriteOnly::new("writeonly", ARCHIVING)?;
    s.sql("create table t (x text)")?;
    s.fill(20_000)?;
    let full = s.backup_id(&[])?;
    s.fill(1)?;
    let segment = s.flush_archive(&s.server)?;
    let incremental = s.backup_id(&[])?;
    ensure!(
        full.ends_with('F') && incremental.ends_with('I'),
        "{full} {incremental}"
    );
    let differential = s.backup_id(&["--type", "diff"])?;
    s.fill(1)?;
    s.flush_archive(&s.server)?;
    for (source, kind) in [("local", "incr"), ("sql", "incr"), ("stream", "full")] {
        let said = s.ok(&[
            &["backup", "acme", "--fast", "--source", source, "--type", kind],
            &QUIET[..],
        ]
        .concat())?;
        ensure!(!said.contains("everything is read"), "{source}: {said}");
    }
    let info = s.ok(&["info", "acme"])?;
    for id in [&full, &incremental, &differential] {
        ensure!(info.contains(id.as_str()), "{info}");
    }
    let check = s.ok(&["check", "acme"])?;
    ensure!(check.contains("WAL arrives"), "{check}");
    // What is content is sealed to the public key, all of it.
    for folder in ["packs", "roots", "wal"] {
        let objects = s.objects(folder);
        ensure!(!objects.is_empty(), "{folder}");
        for object in objects {
            ensure!(mode_of(&object)? == 1, "{}", object.display());
        }
    }

    // Reading is refused, in words, and a recovery does not end early by it.
    let word = "can write only";
    refused(s.restore("r", &[]), 1, word)?;
    refused(s.fairvault(&[&["verify", "acme"], &QUIET[..]].concat()), 1, word)?;
    refused(s.fairvault(&[&["repair", "acme"], &QUIET[..]].concat()), 1, word)?;
    let audit = s.by_operator(&["audit", "acme"])?;
    for tried in ["verify: failed", "repair: 0 objects can be seen again; then it failed"] {
        let said = format!("{tried}: this host's key {word}");
        ensure!(audit.contains(&said), "{said:?} is not in\n{audit}");
    }
    refused(
        s.fairvault(&[&["backup", "acme", "--audit"], &QUIET[..]].concat()),
        1,
        word,
    )?;
    let to = s.path("fetched");
    for name in [segment.as_str(), "0000000100000000000000FF", "00000009.history"] {
        refused(s.fairvault(&["wal", "get", "acme", name, &to]), 200, word)?;
        ensure!(!Path::new(&to).exists());
    }
    // So is what only the operator may say.
    let hold = ["hold", "acme", &full, "--reason", "x"];
    refused(s.fairvault(&hold), 1, "the operator key")?;
    refused(s.fairvault(&["key", "rotate", "acme"]), 1, "the operator's key")?;
    let spare = s.path("host.key");
    let add = ["key", "add-slot", "acme", "spare", "--secret-file", &spare];
    refused(s.fairvault(&add), 1, "the operator's key")?;
    refused(
        s.fairvault(&["key", "remove-slot", "acme", "main"]),
        1,
        "the operator's key",
    )?;
    refused(
        s.fairvault(&["key", "erase", "acme", "--confirm", "acme"]),
        1,
        "the operator's key",
    )?;
    let said = s.ok(&["key", "check", "acme"])?;
    ensure!(said.contains("writes in key epoch 1, and reads nothing"), "{said}");
    let list = s.ok(&["key", "list", "acme"])?;
    ensure!(
        list.contains("slot host (key, writes only)") && list.contains("slot main (key)"),
        "{list}"
    );
    // A secret that reads does not become one that does not.
    let (key, again) = (
        s.path("key"),
        ["key", "add-slot", "acme", "less", "--write-only", "--secret-file"],
    );
    refused(
        s.as_operator(&[&again[..], &[&key]].concat()),
        1,
        "opens slot main already",
    )?;

    // The same again is the same, and other content is not.
    s.by_operator(&["wal", "get", "acme", &segment, &to])?;
    let named = s.scratch.join(&segment);
    std::fs::rename(&to, &named)?;
    s.ok(&["wal", "push", "acme", &named.display().to_string()])?;
    let history = s.path("000000010000000000000002.00000028.backup");
    for (content, exit, word) in [("a", 0, ""), ("a", 0, ""), ("b", 1, "other content")] {
        std::fs::write(&history, content)?;
        refused(s.fairvault(&["wal", "push", "acme", &history]), exit, word)?;
    }

    // The operator's key restores everything; so does a reader that shares no code.
    s.all_good()?;
    s.restores("a", &["--backup", &full, "--target", "immediate"], "20000")?;
    s.restores("b", &["--backup", &incremental], "20002")?;
    s.restores("c", &[], "20002")?;
    let vault = s.path("vault");
    reader(&[
        &vault,
        "restore",
        "acme",
        &incremental,
        &s.path("python"),
        "--key-file",
        &key,
    ])?;
    reader(&[&vault, "wal", "acme", &segment, &s.path("wal"), "--key-file", &key])?;
    ensure!(std::fs::read(s.path("wal"))? == std::fs::read(&named)?);
    let refusal = reader(&[
        &vault,
        "restore",
        "acme",
        &full,
        &s.path("p2"),
        "--key-file",
        &s.path("host.key"),
    ]);
    ensure!(refusal.is_err(), "an independent reader reads with the host's key");
    Ok(())
}

#[test]
fn without_its_copy_of_the_manifest_everything_is_read() -> Result<()> {
    let s = WriteOnly::new("copies", ARCHIVING)?;
    s.sql("create table t (x text)")?;
    s.fill(5000)?;
    s.backup()?;
    let backup = |more: &[&str]| s.ok(&[&["backup", "acme", "--fast"], &QUIET[..], more].concat());
    ensure!(!backup(&[])?.contains("everything is read"));
    // Of the full backup and of the one on it, and for nobody else to read.
    let copies = s.copies();
    ensure!(copies.len() == 2, "{copies:?}");
    for copy in &copies {
        use std::os::unix::fs::PermissionsExt;
        ensure!(std::fs::metadata(copy)?.permissions().mode() & 0o777 == 0o600);
        let text = std::fs::read(copy)?;
        ensure!(!text.windows(10).any(|part| part == b"PG_VERSION"), "it is not sealed");
        std::fs::remove_file(copy)?;
    }
    let said = backup(&[])?;
    ensure!(
        said.contains("everything is read") && said.contains("keeps no copy of the manifest"),
        "{said}"
    );
    ensure!(!backup(&[])?.contains("everything is read"), "the new copy serves");
    // Cut off, or with a byte changed, it is none.
    for damage in [
        |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2),
        |bytes: &mut Vec<u8>| {
            let at = bytes.len() - 9;
            bytes[at] ^= 1;
        },
    ] {
        for copy in s.copies() {
            let mut bytes = std::fs::read(&copy)?;
            damage(&mut bytes);
            std::fs::write(&copy, bytes)?;
        }
        let said = backup(&[])?;
        ensure!(
            said.contains("everything is read") && said.contains("its copy of the manifest is of no use"),
            "{said}"
        );
    }
    s.fill(1)?;
    // Others' backups are none to build on; its own older one is.
    s.by_operator(&[&["backup", "acme", "--fast", "--type", "full"], &QUIET[..]].concat())?;
    s.fill(1)?;
    let said = backup(&["--output", "json"])?;
    ensure!(!said.contains("everything is read"), "{said}");
    let last = field(&said, "id")?;
    s.all_good()?;
    s.restores("r", &["--backup", &last], "5002")
}

#[test]
fn a_receiver_writes_only() -> Result<()> {
    for spool in [false, true] {
        let name = if spool { "wospool" } else { "woreceive" };
        let s = WriteOnly::new(name, Shape { stanza: false, ..SMALL })?;
        let dir = s.path("spool");
        let mut more = vec!["--flush-interval", "100ms", "--piece-size", "64KiB"];
        if spool {
            more.extend(["--spool", &dir]);
        } else {
            // Its journals in the repository would be WAL that every host's key opens.
            let synchronous = ["wal", "receive", "acme", "--synchronous", "--no-slot"];
            refused(
                s.fairvault(&synchronous),
                1,
                "give --synchronous a spool on this host's own disk",
            )?;
            ensure!(!s.scratch.join("vault/acme/journals").exists());
        }
        let receiver = Receiver::start(&s, &more)?;
        s.sql("create table t (x text)")?;
        s.backup()?;
        for _ in 0..4 {
            s.fill(2000)?;
        }
        wait_until_durable(&s, &s.server)?;
        receiver.kill()?;
        s.fill(2000)?;
        let receiver = Receiver::start(&s, &more)?;
        s.fill(2000)?;
        wait_until_durable(&s, &s.server)?;
        // What it stored is pushed as well, and is the same.
        let pushed = s.sql("select pg_walfile_name(pg_switch_wal())")?;
        s.fill(1)?;
        wait_until_durable(&s, &s.server)?;
        s.ok(&[
            "wal",
            "push",
            "acme",
            &s.server.data.join("pg_wal").join(&pushed).display().to_string(),
        ])?;
        let said = s.ok(&[&["backup", "acme", "--fast"], &QUIET[..]].concat())?;
        ensure!(!said.contains("everything is read"), "{said}");
        wait_until_durable(&s, &s.server)?;
        let text = receiver.stop()?;
        ensure!(!text.contains("GAP") && !text.contains("trying again"), "{text}");
        let info = s.ok(&["info", "acme"])?;
        ensure!(
            !info.contains("gap") && !info.contains("MISSING") && !info.contains("WARN"),
            "{info}"
        );
        // Where WAL ends, the operator sees too, who reads it.
        let windows = |text: &str| text.lines().filter(|line| line.contains("restorable on")).count();
        let by_operator = s.by_operator(&["info", "acme"])?;
        ensure!(windows(&info) == windows(&by_operator), "{info}\n{by_operator}");
        s.server.stop(&s.scratch, "immediate")?;
        s.restores("r", &[], "12001")?;
        s.all_good()?;
    }
    Ok(())
}

#[test]
fn a_stanza_goes_over_to_a_public_key() -> Result<()> {
    let mut s = WriteOnly::of(Fixture::new(
        "goesover",
        Shape {
            stanza: true,
            ..ARCHIVING
        },
    )?);
    s.sql("create table t (x text)")?;
    s.fill(1000)?;
    let before = s.backup_id(&[])?;
    let path = s.path("early.key");
    s.ok(&["key", "generate", &path])?;
    let add = ["key", "add-slot", "acme", "host", "--write-only", "--secret-file"];
    refused(
        s.as_operator(&[&add[..], &[&path]].concat()),
        1,
        "rotate acme --public-key",
    )?;
    // The host has had the key so far: the private key is for another one.
    let over = ["key", "rotate", "acme", "--public-key"];
    let (former, operator) = (s.path("key"), s.path("operator.key"));
    refused(s.as_operator(&over), 2, "has been on the database host")?;
    let again = [&over[..], &["--new-secret-file", &former]].concat();
    refused(s.as_operator(&again), 2, "--new-secret-file FILE")?;
    ensure!(s.objects("keys").len() == 1);
    s.ok(&["key", "generate", &operator])?;
    s.by_operator(&[&over[..], &["--new-secret-file", &operator]].concat())?;
    s.operator[1] = operator;
    s.add_host()?;
    s.fill(1)?;
    s.flush_archive(&s.server)?;
    let said = s.ok(&[&["backup", "acme", "--fast", "--output", "json"], &QUIET[..]].concat())?;
    ensure!(said.contains("everything is read"), "{said}");
    let first = field(&said, "id")?;
    let second = s.backup_id(&[])?;
    // Whoever has the former key opens nothing that was sealed since, by any slot or with any reader.
    let secret = Secret::from_text(&std::fs::read(&former)?)?;
    let mut opened = Vec::new();
    for object in s.objects("keys") {
        let slot = keys::decode_slot(&std::fs::read(&object)?, "slot")?;
        if keys::open_slot(&slot, Some(&secret), "slot").is_ok() {
            opened.push(slot.epoch);
        }
    }
    ensure!(opened == [1], "the former key opens epochs {opened:?}");
    let (thief, vault, to) = (s.path("thief"), s.path("vault"), s.path("stolen"));
    let with_former = ["--key-file", &former, "--cache", &thief];
    for id in [&first, &second] {
        let restore = [&["restore", "acme", "--to", &to, "--backup", id], &with_former[..]].concat();
        refused(s.fairvault(&restore), 1, "were rotated")?;
        let read = reader(&[&vault, "restore", "acme", id, &to, "--key-file", &former]);
        ensure!(read.is_err(), "{id} is read with the former key");
    }
    // What was stored under the old keys, the host does not read either.
    refused(s.restore("r", &["--backup", &before]), 1, "can write only")?;

    // The mode stays. The host's slot has to be made again, under its name: its secret is not at hand.
    let rotate = ["key", "rotate", "acme"];
    refused(s.as_operator(&rotate), 1, "with --write-only")?;
    s.by_operator(&[&rotate[..], &["--drop-slots"]].concat())?;
    refused(s.fairvault(&["info", "acme"]), 1, "were rotated")?;
    s.by_operator(&[&add[..], &[&s.path("host.key")]].concat())?;
    s.fill(1)?;
    let segment = s.flush_archive(&s.server)?;
    let is_it = |path: &PathBuf| path.display().to_string().contains(&segment);
    let object = s.objects("wal").into_iter().find(is_it).context("a segment")?;
    let bytes = std::fs::read(&object)?;
    ensure!(
        (bytes[8], bytes[12]) == (3, 1),
        "epoch {}, mode {}",
        bytes[8],
        bytes[12]
    );
    // Pushed again under newer keys, it is compared without being read.
    let file = s.path(&segment);
    s.by_operator(&["wal", "get", "acme", &segment, &file])?;
    s.by_operator(&["key", "rotate", "acme", "--drop-slots"])?;
    s.by_operator(&[&add[..], &[&s.path("host.key")]].concat())?;
    s.ok(&["wal", "push", "acme", &file])?;
    // Its own copy of the parent is of an older epoch, and serves.
    let said = s.ok(&[&["backup", "acme", "--fast", "--output", "json"], &QUIET[..]].concat())?;
    ensure!(!said.contains("everything is read"), "{said}");
    let third = field(&said, "id")?;
    s.by_operator(&["key", "check", "acme"])?;
    s.all_good()?;
    for (name, id, rows) in [
        ("a", &before, "1000"),
        ("b", &first, "1001"),
        ("c", &second, "1001"),
        ("d", &third, "1002"),
    ] {
        s.restores(name, &["--backup", id, "--target", "immediate"], rows)?;
    }
    Ok(())
}

#[test]
fn a_promotion_is_followed_by_a_host_that_reads_nothing() -> Result<()> {
    let s = WriteOnly::new("wopromote", ARCHIVING)?;
    s.sql("create table t (x text)")?;
    s.fill(100)?;
    s.backup()?;
    s.flush_archive(&s.server)?;
    s.server.stop(&s.scratch, "fast")?;
    // The copy that was restored takes over, with the host's key.
    let to = s.path("next");
    s.by_operator(&[&["restore", "acme", "--to", &to], &QUIET[..]].concat())?;
    std::fs::remove_file(s.scratch.join("next/fairvault.restored"))?;
    s.configure("next", &s.archiving())?;
    // Its restore_command is the operator's.
    let next = s.start("next", 5432)?;
    next.sql(&s.scratch, "insert into t values ('x')")?;
    s.flush_archive(&next)?;
    let second = s
        .objects("wal")
        .into_iter()
        .any(|path| path.display().to_string().contains("00000002.history"));
    ensure!(second, "{:?}", s.objects("wal"));
    let info = s.ok(&["info", "acme"])?;
    ensure!(!info.contains("gap") && !info.contains("MISSING"), "{info}");
    s.ok(&["check", "acme"])?;
    s.ok(&[&["backup", "acme", "--fast"], &QUIET[..]].concat())?;
    next.stop(&s.scratch, "fast")?;
    s.restores("r", &[], "101")?;
    s.all_good()
}

/// Finds a file that lacks the slot of the operator or of the host.
#[test]
fn lost_slots_of_both_come_back_from_a_file() -> Result<()> {
    let s = WriteOnly::new("writekit", Shape { stanza: false, ..SMALL })?;
    s.sql("create table t (x text)")?;
    s.fill(10)?;
    s.backup_id(&[])?;
    let keys = s.scratch.join("vault/acme/keys");
    let lose = || -> Result<()> { Ok(std::fs::remove_dir_all(&keys)?) };
    let back = |kit: &str| -> Result<()> {
        let nowhere = s.path(&format!("nowhere-{}", kit.rsplit('/').next().unwrap_or_default()));
        refused(s.fairvault(&["info", "acme", "--cache", &nowhere]), 3, "no stanza")?;
        s.ok(&["key", "import", "acme", kit])?;
        ensure!(s.objects("keys").len() == 2, "{:?}", s.objects("keys"));
        s.by_operator(&["key", "check", "acme"])?;
        let check = s.ok(&["key", "check", "acme"])?;
        ensure!(check.contains("writes in key epoch 1"), "{check}");
        Ok(())
    };
    let (kit, own, late, none) = (s.path("kit"), s.path("own"), s.path("late"), s.path("none"));
    let said = s.by_operator(&["key", "export", "acme", &kit])?;
    ensure!(
        said.contains("2 slots, by which the given key opens all key epochs (1)"),
        "{said}"
    );
    let said = s.ok(&["key", "export", "acme", &own])?;
    ensure!(said.contains("with the operator's key"), "{said}");
    for kit in [&kit, &own] {
        lose()?;
        back(kit)?;
    }
    // A host that remembers them has them still; one that does not is told so, and leaves no file.
    s.by_operator(&["info", "acme"])?;
    lose()?;
    refused(s.as_operator(&["key", "export", "acme", &late]), 6, "remembers")?;
    let elsewhere = s.path("elsewhere");
    let export = ["key", "export", "acme", &none, "--cache", &elsewhere];
    refused(s.fairvault(&export), 3, "no stanza")?;
    ensure!(!Path::new(&none).exists());
    back(&late)?;
    // Where only the host's own slot is left, a file would open nothing for reading.
    for slot in s.objects("keys").iter().filter(|slot| slot.ends_with("main")) {
        std::fs::remove_file(slot)?;
    }
    refused(s.fairvault(&export), 1, "no slot that reads")?;
    ensure!(!Path::new(&none).exists());
    s.ok(&["key", "import", "acme", &kit])?;
    s.all_good()
}
