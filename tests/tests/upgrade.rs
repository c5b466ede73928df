//! A stanza outlives a pg_upgrade: until somebody says so, the new cluster is a stranger; then both have their place.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{Fixture, SMALL, Shape, files, refused};
use fairvault_tests::{Scratch, Server, run, tools};
use serde_json::Value;

const ARCHIVING: Shape<'static> = Shape {
    archiving: true,
    more: "retention = { full = 2 }",
    ..SMALL
};

/// An empty cluster of the shape that the fixture's has; it is running.
fn new_cluster(s: &Fixture, port: u16, settings: &str) -> Result<Server> {
    Server::create_with(&s.scratch, 15, port, settings, SMALL.initdb)
}

/// Runs pg_upgrade from one stopped cluster to another. The same version will do: it makes another cluster of it.
fn pg_upgrade(scratch: &Scratch, from: &Path, to: &Path) -> Result<()> {
    let bin = tools::bin(15);
    let mut command = scratch.command(bin.join("pg_upgrade"));
    command
        .arg("-b")
        .arg(&bin)
        .arg("-B")
        .arg(&bin)
        .args(["-U", "postgres", "-p", "5460", "-P", "5461"]);
    command.arg("-s").arg(scratch.path());
    run(command.arg("-d").arg(from).arg("-D").arg(to)).map(|_| ())
}

fn system_identifier(s: &Fixture, server: &Server) -> Result<String> {
    server.sql(&s.scratch, "select system_identifier from pg_control_system()")
}

fn info(s: &Fixture) -> Result<Value> {
    let value: Value = serde_json::from_str(&s.ok(&["info", "acme", "--output", "json"])?)?;
    Ok(value["stanzas"][0].clone())
}

/// The folder of a cluster's WAL in the repository.
fn folder(identifier: &str) -> Result<String> {
    Ok(format!("wal/{:016x}", identifier.parse::<u64>()?))
}

fn restores(s: &Fixture, name: &str, more: &[&str], rows: &str) -> Result<()> {
    let (exit, text) = s.restore(name, more);
    ensure!(exit == 0, "{text}");
    let copy = s.start(name, 5450)?;
    ensure!(s.rows(&copy)? == rows, "{name}");
    copy.stop(&s.scratch, "fast")
}

#[test]
fn a_stanza_goes_on_after_pg_upgrade() -> Result<()> {
    let mut s = Fixture::new("upgrade", ARCHIVING)?;
    s.sql("create table t as select i from generate_series(1, 1000) i")?;
    let old_id = system_identifier(&s, &s.server)?;
    let before = s.backup_id(&[])?;
    s.sql("insert into t values (1001)")?;
    s.flush_archive(&s.server)?;
    // Segments that a new cluster does not get to by itself.
    for _ in 0..3 {
        s.flush_archive(&s.server)?;
    }
    s.backup_id(&[])?;
    let late = s.flush_archive(&s.server)?;
    s.ok(&["wal", "get", "acme", &late, &s.path(&late)])?;
    s.server.stop(&s.scratch, "fast")?;
    let fresh = new_cluster(&s, 5433, "")?;
    fresh.stop(&s.scratch, "fast")?;
    pg_upgrade(&s.scratch, &s.server.data, &fresh.data)?;
    std::fs::write(fresh.data.join("postgresql.auto.conf"), s.archiving())?;
    let new = Server::existing(&s.scratch, 15, fresh.data.clone(), 5432);
    new.start(&s.scratch)?;
    let new_id = system_identifier(&s, &new)?;
    ensure!(new_id != old_id);
    // The old data directory stays where it was; only its server is gone.
    s.server = new;

    // A stranger, for everything that writes.
    let remedy = "fairvault stanza upgrade acme";
    s.sql("insert into t values (1002); select pg_switch_wal()")?;
    s.server
        .wait_for(&s.scratch, "select failed_count > 0 from pg_stat_archiver", "t")?;
    refused(
        s.fairvault(&["backup", "acme", "--fast", "--progress", "none"]),
        1,
        remedy,
    )?;
    refused(s.fairvault(&["stanza", "create", "acme"]), 1, remedy)?;
    refused(s.fairvault(&["check", "acme"]), 1, remedy)?;
    let waiting = files(&s.server.data.join("pg_wal/archive_status"));
    let ready = waiting
        .iter()
        .find(|path| path.extension().is_some_and(|end| end == "ready"))
        .context("a segment")?;
    let segment = ready.file_stem().context("a name")?.to_string_lossy().into_owned();
    let path = format!("{}/pg_wal/{segment}", s.server.data.display());
    refused(s.fairvault(&["wal", "push", "acme", &path]), 1, remedy)?;
    ensure!(s.objects(&folder(&new_id)?).is_empty());

    // Nobody else becomes the successor by accident.
    let other = new_cluster(&s, 5434, "")?;
    let of_other = other.conninfo();
    let by_other =
        |more: &[&str]| s.fairvault(&[&["stanza", "upgrade", "acme", "--conninfo", &of_other], more].concat());
    refused(by_other(&[]), 1, "pg_upgrade has not made it of that")?;
    refused(by_other(&["--back"]), 3, "was never a cluster of stanza acme")?;
    let key = s.path("key");
    s.ok(&["stanza", "create", "other", "--conninfo", &of_other, "--key-file", &key])?;
    s.ok(&[
        "backup",
        "other",
        "--conninfo",
        &of_other,
        "--key-file",
        &key,
        "--fast",
        "--progress",
        "none",
    ])?;
    refused(by_other(&["--unrelated"]), 1, "is that of stanza other")?;
    ensure!(info(&s)?["system_identifiers"].as_array().context("a list")?.len() == 1);

    let said = s.ok(&["stanza", "upgrade", "acme"])?;
    ensure!(said.contains(&old_id) && said.contains(&new_id), "{said}");
    ensure!(s.ok(&["stanza", "upgrade", "acme"])?.contains("nothing to do"));
    refused(
        s.fairvault(&["restore", "acme", "--to", &s.path("none")]),
        3,
        "restored by name, with --backup",
    )?;
    // What has waited is archived with what comes next.
    s.flush_archive(&s.server)?;
    let has_it = |path: &PathBuf| path.display().to_string().contains(&segment);
    ensure!(s.objects(&folder(&new_id)?).iter().any(has_it));
    let after = s.backup_id(&[])?;
    ensure!(after.ends_with('F'), "{after} builds on nothing of the old cluster");
    let incremental = s.backup_id(&[])?;
    ensure!(incremental.ends_with('I'), "{incremental}");
    s.sql("insert into t values (1003)")?;
    s.flush_archive(&s.server)?;
    s.ok(&["check", "acme"])?;

    // What the old cluster still has to say has its own place: segments, and files that do not say whose they are.
    let of_late = |path: &PathBuf| path.display().to_string().ends_with(&format!("/{late}.0001"));
    let object = s
        .objects(&folder(&old_id)?)
        .into_iter()
        .find(of_late)
        .context("its object")?;
    std::fs::remove_file(&object)?;
    s.ok(&["wal", "push", "acme", &s.path(&late)])?;
    ensure!(object.exists());
    let history = s.scratch.write(
        "data5432/pg_wal/00000007.history",
        b"1\t0/100000\tno recovery target specified\n",
    )?;
    s.ok(&["wal", "push", "acme", &history.display().to_string()])?;
    let has_history = |identifier: &str| -> Result<bool> {
        let all = s.objects(&folder(identifier)?);
        Ok(all
            .iter()
            .any(|path| path.display().to_string().contains("00000007.history")))
    };
    ensure!(has_history(&old_id)? && !has_history(&new_id)?);

    // Both are listed, and both restore.
    let found = info(&s)?;
    let backups = found["backups"].as_array().context("backups")?;
    ensure!(
        backups.len() == 4 && backups.iter().all(|backup| backup["restorable"] == true),
        "{found}"
    );
    ensure!(
        backups[0]["system_identifier"] == *old_id && backups[3]["system_identifier"] == *new_id,
        "{found}"
    );
    let windows = found["windows"].as_array().context("windows")?;
    for identifier in [&old_id, &new_id] {
        ensure!(
            windows.iter().any(|window| window["system_identifier"] == **identifier),
            "{found}"
        );
    }
    ensure!(
        s.ok(&["info", "acme"])?
            .contains(&format!("of the earlier cluster {old_id}"))
    );
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    restores(&s, "new", &[], "1003")?;
    restores(&s, "old", &["--backup", &before, "--target-timeline", "1"], "1001")?;

    // Retention counts backups of all clusters: the newest two full ones are one of each.
    let plan = s.ok(&["expire", "acme"])?;
    let stays = |id: &str| plan.lines().any(|line| line.contains(id) && line.contains("stays"));
    ensure!(stays(&before) && stays(&after), "{plan}");
    s.backup_id(&["--type", "full"])?;
    s.ok(&["expire", "acme"])?;
    ensure!(!s.ok(&["info", "acme"])?.contains(&before));
    s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"])?;
    // With the last backup of the old cluster, its WAL has gone; histories stay.
    let left = s.objects(&folder(&old_id)?);
    ensure!(
        left.iter().all(|path| path.display().to_string().contains(".history")),
        "{left:?}"
    );
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    restores(&s, "again", &[], "1003")
}

#[test]
fn the_newest_restorable_backup_may_be_of_an_earlier_cluster() -> Result<()> {
    let s = Fixture::new(
        "upgradeback",
        Shape {
            more: "retention = { full = 1, min_full = 0 }",
            ..ARCHIVING
        },
    )?;
    s.sql("create table t as select i from generate_series(1, 10) i")?;
    let old_id = system_identifier(&s, &s.server)?;
    let before = s.backup_id(&[])?;
    s.flush_archive(&s.server)?;
    // Filled from a dump: its WAL begins anew.
    let new = new_cluster(&s, 5434, &s.archiving())?;
    let conninfo = new.conninfo();
    let upgrade = |more: &[&str]| s.fairvault(&[&["stanza", "upgrade", "acme"], more].concat());
    let (exit, said) = upgrade(&["--unrelated", "--conninfo", &conninfo]);
    ensure!(exit == 0, "{said}");
    refused(upgrade(&[]), 1, "--back")?;
    let with_new = |words: &[&str]| s.ok(&[words, &["--conninfo", &conninfo]].concat());
    with_new(&["backup", "acme", "--fast", "--progress", "none"])?;
    let segment = s.flush_archive(&new)?;
    let id = system_identifier(&s, &new)?;
    let found = info(&s)?;
    ensure!(found["system_identifiers"][1] == *id, "{found}");
    // Without its WAL, the new backup is not what is left to restore from.
    new.stop(&s.scratch, "fast")?;
    for path in s.objects(&folder(&id)?) {
        std::fs::remove_file(path)?;
    }
    let plan = s.ok(&["expire", "acme", "--dry-run"])?;
    let line = plan.lines().find(|line| line.contains(&before)).context("a line")?;
    ensure!(
        line.contains("stays") && line.contains("newest that can be restored"),
        "{plan}, {segment}"
    );

    // The upgrade is given up: the old cluster goes on, where it was.
    let (exit, said) = upgrade(&["--back"]);
    ensure!(exit == 0 && said.contains(&old_id), "{said}");
    s.sql("insert into t values (11)")?;
    s.flush_archive(&s.server)?;
    ensure!(s.backup_id(&[])?.ends_with('I'), "it builds on the backup from before");
    restores(&s, "r", &[], "11")
}
