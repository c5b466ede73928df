//! Holes in WAL that a receiver stores: filled from the server, from pushed segments, or passed over by a word; and what is none.

use std::time::Duration;

use anyhow::{Result, ensure};
use fairvault_tests::fixture::SMALL;
use fairvault_tests::receiver::wait_until_durable;
use fairvault_tests::{Fixture, Receiver, Shape, run};

#[test]
fn what_the_server_still_has_is_filled_in() -> Result<()> {
    let s = Fixture::new("fill", SMALL)?;
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
    s.sql("create table t (x text)")?;
    let first = s.backup_id(&[])?;
    let fill = "insert into t select md5(i::text) from generate_series(1, 3000) i";
    // Between two backups, the receiver has brought what there is: WAL is archived here, although no command does it.
    for _ in 0..5 {
        s.sql(fill)?;
    }
    wait_until_durable(&s, &s.server)?;
    s.backup()?;
    wait_until_durable(&s, &s.server)?;
    receiver.kill()?;
    for _ in 0..10 {
        s.sql(fill)?;
    }
    // This backup brings its own WAL, far ahead of where the receiver stopped.
    s.backup()?;
    ensure!(s.ok(&["info", "acme"])?.contains("gap"), "there is no gap to fill");
    let (exit, text) = s.fairvault(&["verify", "acme", "--progress", "none"]);
    ensure!(
        exit == 4 && text.contains("recovery from earlier backups ends before it"),
        "{exit} {text}"
    );
    let (exit, text) = s.fairvault(&["check", "acme"]);
    ensure!(
        exit == 1 && text.contains("is missing, and later WAL is there"),
        "{exit} {text}"
    );
    let mut receiver = Receiver::start_until(&s, &["--flush-interval", "100ms"], "filling what is missing")?;
    s.sql(fill)?;
    wait_until_durable(&s, &s.server)?;
    receiver.wait_for_line("filling what is missing")?;
    // A server that shuts down does not wait for ever for what a receiver says.
    s.server.stop(&s.scratch, "fast")?;
    receiver.stop()?;
    let info = s.ok(&["info", "acme"])?;
    ensure!(!info.contains("gap"), "{info}");
    let (exit, text) = s.restore("r", &["--backup", &first]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "48000");
    ensure!(s.ok(&["verify", "acme", "--progress", "none"])?.contains("all good"));
    Ok(())
}

/// Backups that bring their own WAL, and nothing else: what lies between them is missed by nobody.
#[test]
fn without_an_archive_there_is_no_gap() -> Result<()> {
    let s = Fixture::new("ownwal", SMALL)?;
    s.sql("create table t (x text)")?;
    let fill = "insert into t select md5(i::text) from generate_series(1, 9000) i";
    let load = s.scratch.write("load.sql", format!("{fill};\n").as_bytes())?;
    for _ in 0..3 {
        // The server goes on while a backup is stored: it streams beyond what it needs.
        let mut pgbench = s
            .server
            .pgbench(&s.scratch, &["-n", "-T", "4", "-f", &load.display().to_string()]);
        let mut pgbench = pgbench
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()?;
        s.ok(&[
            "backup",
            "acme",
            "--fast",
            "--progress",
            "none",
            "--max-rate",
            "12MiB",
            "--source",
            "stream",
        ])?;
        pgbench.wait()?;
        for _ in 0..3 {
            s.sql(fill)?;
        }
    }
    ensure!(s.ok(&["info", "acme"])?.contains("gap"));
    let text = s.ok(&["verify", "acme", "--progress", "none"])?;
    ensure!(
        text.contains("all good") && text.contains("note: wal/"),
        "it is told, and is no damage: {text}"
    );
    let (exit, text) = s.fairvault(&["check", "acme"]);
    ensure!(exit == 0, "{exit} {text}");
    Ok(())
}

/// Those of a standby end inside a segment, of which they keep a piece.
#[test]
fn between_backups_of_a_standby_nothing_is_missed_either() -> Result<()> {
    let s = Fixture::new("standbywal", SMALL)?;
    s.sql("create table t (x text)")?;
    let fill = "insert into t select md5(i::text) from generate_series(1, 9000) i";
    s.backup()?;
    let standby = s.standby("standby", 5460, &[], "")?;
    let conninfo = format!("host={} port=5460 user=postgres", s.scratch.path().display());
    for round in 1..=3 {
        for _ in 0..3 {
            s.sql(fill)?;
        }
        s.sql("checkpoint")?;
        standby.wait_for(&s.scratch, "select count(*) from t", &(round * 27_000).to_string())?;
        s.ok(&[
            "backup",
            "acme",
            "--fast",
            "--progress",
            "none",
            "--conninfo",
            &conninfo,
        ])?;
    }
    let text = s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    ensure!(text.contains("all good"), "{text}");
    for _ in 0..5 {
        s.sql(fill)?;
    }
    let (exit, text) = s.fairvault(&["check", "acme"]);
    ensure!(exit == 0, "{exit} {text}");
    drop(standby);
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "81000");
    Ok(())
}

#[test]
fn wal_that_nobody_has_any_more_needs_a_word() -> Result<()> {
    let s = Fixture::new(
        "removed",
        Shape {
            settings: "max_wal_size = 2MB\nmin_wal_size = 2MB\n",
            ..SMALL
        },
    )?;
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms", "--no-slot"])?;
    s.sql("create table t (x text)")?;
    s.backup()?;
    // Without a slot, the server does not wait for the receiver, but it can shut down beside it.
    s.server.stop(&s.scratch, "fast")?;
    receiver.kill()?;
    s.server.start(&s.scratch)?;
    for _ in 0..10 {
        s.sql("insert into t select md5(i::text) from generate_series(1, 9000) i; checkpoint")?;
    }
    let (exit, text) = s.fairvault(&["wal", "receive", "acme", "--no-slot"]);
    ensure!(exit == 1 && text.contains("--skip-gap"), "{exit} {text}");
    let mut receiver = Receiver::start(&s, &["--no-slot", "--skip-gap", "--flush-interval", "100ms"])?;
    receiver.wait_for_line("is passed over")?;
    std::thread::sleep(Duration::from_secs(2));
    s.sql("insert into t values ('after')")?;
    std::thread::sleep(Duration::from_secs(1));
    receiver.stop()?;
    let info = s.ok(&["info", "acme"])?;
    ensure!(info.contains("MISSING"), "{info}");
    // With a new backup the hole is history, and no word is needed.
    s.backup()?;
    let word = "recovery from backups before it ends there";
    let receiver = Receiver::start_until(&s, &["--no-slot", "--flush-interval", "100ms"], word)?;
    std::thread::sleep(Duration::from_secs(1));
    s.sql("insert into t values ('later')")?;
    std::thread::sleep(Duration::from_secs(1));
    receiver.stop()?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "90002");
    Ok(())
}

/// WAL that the server removed, and that somebody had kept, fills the hole: the receiver goes on by itself.
#[test]
fn a_hole_is_filled_by_pushed_segments() -> Result<()> {
    let s = Fixture::new(
        "pushedhole",
        Shape {
            settings: "max_wal_size = 2MB\nmin_wal_size = 2MB\n",
            ..SMALL
        },
    )?;
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms", "--no-slot"])?;
    s.sql("create table t (x text)")?;
    s.backup()?;
    s.server.stop(&s.scratch, "fast")?;
    receiver.kill()?;
    s.server.start(&s.scratch)?;
    let (pg_wal, kept) = (s.server.data.join("pg_wal"), s.scratch.join("kept/pg_wal"));
    run(s.scratch.command("mkdir").arg("-p").arg(&kept))?;
    for _ in 0..10 {
        s.sql("insert into t select md5(i::text) from generate_series(1, 9000) i; select pg_switch_wal()")?;
        let copy = format!("cp {}/0* {}", pg_wal.display(), kept.display());
        run(s.scratch.command("sh").args(["-c", &copy]))?;
        s.sql("checkpoint")?;
    }
    let receive = ["wal", "receive", "acme", "--no-slot"];
    let (exit, text) = s.fairvault(&receive);
    ensure!(
        exit == 1 && text.contains("wal push"),
        "the remedy names it: {exit} {text}"
    );
    let current = s.sql("select pg_walfile_name(pg_current_wal_lsn())")?;
    let mut segments: Vec<_> = std::fs::read_dir(&kept)?.flatten().map(|e| e.path()).collect();
    segments.sort();
    let is_over = |path: &std::path::Path| path.file_name().is_some_and(|name| *name.to_string_lossy() < *current);
    for path in segments.iter().filter(|path| is_over(path)) {
        let (exit, text) = s.fairvault(&["wal", "push", "acme", &path.display().to_string()]);
        ensure!(exit == 0, "{exit} {text}");
    }
    let receiver = Receiver::start(&s, &["--no-slot", "--flush-interval", "100ms"])?;
    s.sql("insert into t values ('after')")?;
    std::thread::sleep(Duration::from_secs(2));
    let text = receiver.stop()?;
    ensure!(!text.contains("passed over"), "{text}");
    let info = s.ok(&["info", "acme"])?;
    ensure!(!info.contains("MISSING") && !info.contains("gap"), "{info}");
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "90001");
    Ok(())
}

/// Not only the first: whoever repairs one must know of the next.
#[test]
fn every_hole_is_named() -> Result<()> {
    let s = Fixture::new(
        "everyhole",
        Shape {
            archiving: true,
            ..SMALL
        },
    )?;
    s.sql("create table t (x text)")?;
    s.backup()?;
    for _ in 0..8 {
        s.sql("insert into t select md5(i::text) from generate_series(1, 3000) i")?;
        s.flush_archive(&s.server)?;
    }
    let objects = s.objects("wal");
    let whole: Vec<_> = objects
        .iter()
        .filter(|p| p.extension().is_some_and(|e| e == "0001"))
        .collect();
    let mut lost = Vec::new();
    for at in [whole.len() - 6, whole.len() - 3] {
        std::fs::remove_file(whole[at])?;
        lost.push(whole[at].file_name().unwrap_or_default().to_string_lossy()[..24].to_owned());
    }
    let (exit, verified) = s.fairvault(&["verify", "acme", "--progress", "none"]);
    ensure!(exit == 4, "{exit} {verified}");
    let (exit, checked) = s.fairvault(&["check", "acme"]);
    ensure!(exit == 1 && checked.contains("there are 2 gaps"), "{exit} {checked}");
    for name in lost {
        ensure!(verified.contains(&name), "{name} is not named: {verified}");
    }
    Ok(())
}

/// The slot of a receiver, as the server has it: whoever is to receive, and does not, fills the server's disk.
#[test]
fn a_slot_that_nobody_uses_is_an_error() -> Result<()> {
    let s = Fixture::new(
        "unusedslot",
        Shape {
            settings: "max_slot_wal_keep_size = 8MB\nmax_wal_size = 4MB\nmin_wal_size = 2MB\n",
            ..SMALL
        },
    )?;
    s.sql("create table t (x text)")?;
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
    s.backup()?;
    s.sql("insert into t select md5(i::text) from generate_series(1, 3000) i")?;
    wait_until_durable(&s, &s.server)?;
    let checked = s.ok(&["check", "acme"])?;
    ensure!(
        checked.contains("receiver into main: receives through slot fairvault_acme_main; durable up to"),
        "{checked}"
    );
    receiver.kill()?;
    // The server may need a moment to see that it is gone.
    std::thread::sleep(Duration::from_secs(1));
    let (exit, checked) = s.fairvault(&["check", "acme"]);
    ensure!(
        exit == 1 && checked.contains("no receiver uses replication slot fairvault_acme_main"),
        "{exit} {checked}"
    );
    // Nobody came.
    for _ in 0..10 {
        s.sql("insert into t select md5(i::text) from generate_series(1, 20000) i")?;
        s.sql("select pg_switch_wal()")?;
        s.sql("checkpoint")?;
    }
    let (exit, checked) = s.fairvault(&["check", "acme"]);
    ensure!(
        exit == 1 && checked.contains("is lost: the server has removed WAL"),
        "{exit} {checked}"
    );
    ensure!(checked.contains("segments behind the server"), "{checked}");
    Ok(())
}
