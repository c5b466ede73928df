//! `wal receive` and several histories: promotions, servers that were set back, primaries that go on.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, ensure};
use fairvault_tests::fixture::{SMALL, host_name, refused};
use fairvault_tests::receiver::wait_until_durable;
use fairvault_tests::{Fixture, Receiver, Shape, run};

#[test]
fn a_promotion_is_followed() -> Result<()> {
    let s = Fixture::new("failover", Shape::default())?;
    // Two hosts in one conninfo: whoever is the primary is received from.
    let hosts = format!(
        "host={0},{0} port=5432,5460 user=postgres target_session_attrs=primary",
        s.scratch.path().display()
    );
    let receiver = Receiver::start(&s, &["--conninfo", &hosts, "--flush-interval", "100ms"])?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    wait_until_durable(&s, &s.server)?;
    let standby = s.standby("standby", 5460, &[], "")?;
    s.sql("insert into t values (1)")?;
    standby.wait_for(&s.scratch, "select count(*) from t", "1")?;
    wait_until_durable(&s, &s.server)?;
    s.server.stop(&s.scratch, "fast")?;
    s.promote(&standby)?;
    standby.sql(&s.scratch, "insert into t values (2)")?;
    wait_until_durable(&s, &standby)?;
    let text = receiver.stop()?;
    ensure!(text.contains("on timeline 2"), "{text}");
    let info = s.ok(&["info", "acme"])?;
    ensure!(info.contains("restorable on timeline 2"), "{info}");
    drop(standby);
    for (name, port, more, expected) in [
        ("latest", 5461, vec![], "2"),
        ("current", 5462, vec!["--target-timeline", "current"], "1"),
        ("number", 5463, vec!["--target-timeline", "2"], "2"),
    ] {
        let (exit, text) = s.restore(name, &more);
        ensure!(exit == 0, "{name}: {text}");
        let copy = s.start(name, port)?;
        ensure!(
            s.rows(&copy)? == expected,
            "{name}: {}\n{}",
            s.rows(&copy)?,
            copy.log_text()
        );
    }
    Ok(())
}

/// Received from a standby, which becomes the primary meanwhile.
#[test]
fn a_standby_that_is_received_from_may_be_promoted() -> Result<()> {
    let s = Fixture::new("fromstandby", SMALL)?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    let standby = s.standby("standby", 5460, &[], "")?;
    let conninfo = format!("host={} port=5460 user=postgres", s.scratch.path().display());
    let mut receiver = Receiver::start(&s, &["--conninfo", &conninfo, "--flush-interval", "100ms"])?;
    for n in 0..3 {
        s.sql(&format!("insert into t values ({n})"))?;
        s.sql("select pg_switch_wal()")?;
    }
    // The end of timeline 1 is in the middle of a segment.
    s.sql("insert into t values (3)")?;
    standby.wait_for(&s.scratch, "select count(*) from t", "4")?;
    let durable = "select count(*) from pg_stat_replication where flush_lsn >= pg_last_wal_receive_lsn()";
    standby.wait_for(&s.scratch, durable, "1")?;
    s.server.stop(&s.scratch, "immediate")?;
    s.promote(&standby)?;
    standby.sql(&s.scratch, "insert into t values (4)")?;
    receiver.wait_for_line("on timeline 2")?;
    wait_until_durable(&s, &standby)?;
    let text = receiver.stop()?;
    ensure!(!text.contains("missing") && !text.contains("MISSING"), "{text}");
    drop(standby);
    for (name, port, more, expected) in [
        ("latest", 5461, vec![], "5"),
        ("current", 5462, vec!["--target-timeline", "current"], "4"),
    ] {
        let (exit, text) = s.restore(name, &more);
        ensure!(exit == 0, "{name}: {text}");
        let rows = s.rows(&s.start(name, port)?)?;
        ensure!(rows == expected, "{name}: {rows}");
    }
    let text = s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    ensure!(text.contains("all good"), "{text}");
    Ok(())
}

/// Of the segment in which a timeline ended, a promoted standby archives what it has as `.partial`, and nobody the rest.
#[test]
fn a_partial_segment_is_the_end_of_its_timeline() -> Result<()> {
    let shape = Shape {
        archiving: true,
        ..SMALL
    };
    let s = Fixture::new("partialend", shape)?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    let standby = s.standby("standby", 5460, &["--archiving", "keep"], "")?;
    s.sql("insert into t values (1)")?;
    standby.wait_for(&s.scratch, "select count(*) from t", "1")?;
    s.server.stop(&s.scratch, "immediate")?;
    s.promote(&standby)?;
    standby.sql(&s.scratch, "insert into t values (2)")?;
    s.flush_archive(&standby)?;
    drop(standby);
    let stored: Vec<String> = s.objects("wal").iter().map(|p| p.display().to_string()).collect();
    ensure!(stored.iter().any(|name| name.contains(".partial")), "{stored:#?}");
    for (name, port, more, expected) in [
        ("latest", 5461, vec![], "2"),
        ("current", 5462, vec!["--target-timeline", "current"], "1"),
    ] {
        let (exit, text) = s.restore(name, &more);
        ensure!(exit == 0, "{name}: {text}");
        let rows = s.rows(&s.start(name, port)?)?;
        ensure!(rows == expected, "{name}: {rows}");
    }
    Ok(())
}

/// A hole in the WAL of a later timeline is told by everybody who looks.
#[test]
fn a_gap_on_a_later_timeline_is_said() -> Result<()> {
    let shape = Shape {
        archiving: true,
        ..SMALL
    };
    let s = Fixture::new("latermissing", shape)?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    let standby = s.standby("standby", 5460, &["--archiving", "keep"], "")?;
    s.sql("insert into t values (1)")?;
    s.flush_archive(&s.server)?;
    standby.wait_for(&s.scratch, "select count(*) from t", "1")?;
    s.server.stop(&s.scratch, "fast")?;
    s.promote(&standby)?;
    let mut segments = Vec::new();
    for _ in 0..4 {
        standby.sql(&s.scratch, "insert into t values (2)")?;
        segments.push(s.flush_archive(&standby)?);
    }
    let check = |more: &[&str]| {
        let conninfo = format!("host={} port=5460 user=postgres", s.scratch.path().display());
        s.fairvault(&[&["check", "acme", "--conninfo", &conninfo], more].concat())
    };
    let (exit, text) = check(&[]);
    ensure!(exit == 0, "{exit} {text}");
    let lost = &segments[2];
    ensure!(lost.starts_with("00000002"), "{lost}");
    let object = s
        .objects("wal")
        .into_iter()
        .find(|p| p.display().to_string().contains(lost.as_str()));
    std::fs::remove_file(object.unwrap_or_default())?;
    let info = s.ok(&["info", "acme"])?;
    ensure!(
        info.contains("(after a gap)") && info.contains(&format!("{lost} is MISSING")),
        "{info}"
    );
    let (exit, text) = check(&[]);
    ensure!(
        exit == 1 && text.contains("is missing, and later WAL is there"),
        "{exit} {text}"
    );
    let (exit, text) = s.fairvault(&["verify", "acme", "--progress", "none"]);
    ensure!(exit == 4 && text.contains(lost.as_str()), "{exit} {text}");
    Ok(())
}

#[test]
fn a_server_that_was_set_back_is_refused() -> Result<()> {
    let s = Fixture::new("back", Shape::default())?;
    s.sql("create table t (x int)")?;
    s.sql("checkpoint")?;
    s.server.stop(&s.scratch, "fast")?;
    run(s
        .scratch
        .command("cp")
        .args(["-a", &s.path("data5432"), &s.path("snapshot")]))?;
    s.server.start(&s.scratch)?;
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms", "--no-slot"])?;
    s.backup()?;
    s.sql("insert into t select generate_series(1, 10000)")?;
    std::thread::sleep(Duration::from_secs(1));
    receiver.stop()?;
    s.server.stop(&s.scratch, "immediate")?;
    std::fs::rename(&s.server.data, s.scratch.join("gone"))?;
    run(s
        .scratch
        .command("cp")
        .args(["-a", &s.path("snapshot"), &s.path("data5432")]))?;
    s.server.start(&s.scratch)?;
    let (exit, text) = s.fairvault(&["wal", "receive", "acme", "--no-slot"]);
    ensure!(exit == 1 && text.contains("set back"), "{exit} {text}");
    // It has gone on beyond what is stored, with other WAL: the difference is seen.
    for _ in 0..4 {
        s.sql("insert into t select generate_series(1, 100); select pg_switch_wal()")?;
    }
    let (exit, text) = s.fairvault(&["wal", "receive", "acme", "--no-slot"]);
    ensure!(exit == 1 && text.contains("other WAL"), "{exit} {text}");
    // Whoever pushes it is refused as well.
    let stored = s.objects("wal").into_iter().filter_map(|path| {
        let name = path.file_name()?.to_str()?.get(..24)?.to_owned();
        (path.extension()? == "0001").then_some(name)
    });
    let mut refused = 0;
    for name in stored.collect::<std::collections::BTreeSet<_>>() {
        let path = s.server.data.join("pg_wal").join(&name);
        if !path.exists() {
            continue;
        }
        let (exit, text) = s.fairvault(&["wal", "push", "acme", &path.display().to_string()]);
        if exit == 1 && text.contains("exists with other content; nothing was overwritten") {
            refused += 1;
        }
    }
    ensure!(refused > 0, "{:?}", s.objects("wal"));
    // Of a segment of which there are pieces only, they are what commits were acknowledged by.
    let folders = s.objects("wal").into_iter().filter_map(|path| {
        let folder = path.parent()?.file_name()?.to_str()?.strip_suffix(".d")?.to_owned();
        Some(folder)
    });
    let mut compared = 0;
    for name in folders.collect::<std::collections::BTreeSet<_>>() {
        let path = s.path(&format!("data5432/pg_wal/{name}"));
        let (exit, text) = s.fairvault(&["wal", "push", "acme", &path]);
        ensure!(
            exit == 1 && text.contains("exists with other content"),
            "{name}: {exit} {text}"
        );
        compared += 1;
    }
    ensure!(compared > 0, "there are no pieces: {:?}", s.objects("wal"));
    // So whoever receives still finds them.
    let (exit, text) = s.fairvault(&["wal", "receive", "acme", "--no-slot"]);
    ensure!(exit == 1 && text.contains("other WAL"), "{exit} {text}");
    Ok(())
}

#[test]
fn an_old_primary_that_goes_on_is_a_branch_until_it_is_fenced() -> Result<()> {
    let s = Fixture::new(
        "divergent",
        Shape {
            archiving: true,
            ..SMALL
        },
    )?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    s.sql("insert into t values (1)")?;
    s.flush_archive(&s.server)?;
    let standby = s.standby("standby", 5460, &["--archiving", "keep"], "")?;
    standby.wait_for(&s.scratch, "select count(*) from t", "1")?;
    s.promote(&standby)?;
    // Both go on, and both archive.
    for server in [&s.server, &standby] {
        for _ in 0..3 {
            server.sql(&s.scratch, "insert into t values (2)")?;
            s.flush_archive(server)?;
        }
    }
    s.sql("insert into t values (3)")?;
    s.flush_archive(&s.server)?;
    let info = s.ok(&["info", "acme"])?;
    for timeline in [1, 2] {
        ensure!(info.contains(&format!("restorable on timeline {timeline}")), "{info}");
    }
    // The old one is stopped by a word, and only it.
    let reason = ["--reason", "failover on Tuesday"];
    let text = s.ok(&["stanza", "fence", "acme", "--timeline", "1", reason[0], reason[1]])?;
    ensure!(text.contains("timeline 1 is closed at"), "{text}");
    let segment = s.sql("insert into t values (4); select pg_walfile_name(pg_current_wal_lsn())")?;
    s.sql("select pg_switch_wal()")?;
    let path = s.path(&format!(
        "data5432/pg_wal/{}",
        segment.lines().last().unwrap_or_default()
    ));
    let (exit, text) = s.fairvault(&["wal", "push", "acme", &path]);
    ensure!(exit == 1 && text.contains("failover on Tuesday"), "{exit} {text}");
    let (exit, text) = s.fairvault(&["wal", "receive", "acme", "--no-slot", "--flush-interval", "100ms"]);
    ensure!(exit == 5 && text.contains("was closed at"), "{exit} {text}");
    standby.sql(&s.scratch, "insert into t values (3), (4)")?;
    s.flush_archive(&standby)?;
    ensure!(s.ok(&["info", "acme"])?.contains("timeline 1 was closed"));
    for (name, port, more, expected) in [
        ("latest", 5461, vec![], "6"),
        ("current", 5462, vec!["--target-timeline", "current"], "5"),
    ] {
        let (exit, text) = s.restore(name, &more);
        ensure!(exit == 0, "{name}: {text}");
        let copy = s.start(name, port)?;
        ensure!(s.rows(&copy)? == expected, "{name}: {}", s.rows(&copy)?);
    }
    // Taken back, it archives again.
    s.ok(&[
        "stanza",
        "fence",
        "acme",
        "--timeline",
        "1",
        "--reopen",
        reason[0],
        reason[1],
    ])?;
    s.ok(&["wal", "push", "acme", &path])?;
    // A backup of the one, taken after the other had left it, does not lead there.
    let late = s.backup_id(&["--type", "full"])?;
    let (exit, text) = s.restore("late", &["--backup", &late, "--target-timeline", "2"]);
    ensure!(
        exit == 3 && text.contains("is not on the way to timeline 2"),
        "{exit} {text}"
    );
    // A receiver that is at work is stopped by a fence.
    drop(standby);
    let hosts = ["--no-slot", "--flush-interval", "100ms"];
    let receiver = Receiver::start(&s, &hosts)?;
    s.ok(&["stanza", "fence", "acme", reason[0], reason[1]])?;
    s.sql("insert into t values (5)")?;
    std::thread::sleep(Duration::from_secs(6));
    s.sql("insert into t values (6)")?;
    let (exit, text) = receiver.wait()?;
    let by_whom = format!(" on {} at 2", host_name()?);
    ensure!(
        exit == 5 && text.contains("was fenced by") && text.contains(&by_whom),
        "{exit} {text}"
    );
    Ok(())
}

/// A server that was set back writes other WAL under the same names; the archive has that of its first life.
#[test]
fn wal_of_another_life_is_no_basis_and_no_part_of_a_backup() -> Result<()> {
    let shape = Shape {
        archiving: true,
        ..SMALL
    };
    let s = Fixture::new("lives", shape)?;
    s.sql("create table t (n int); insert into t select generate_series(1, 1000)")?;
    s.backup()?;
    s.server.stop(&s.scratch, "fast")?;
    let copy = |from: &str, to: &str| run(s.scratch.command("cp").args(["-a", &s.path(from), &s.path(to)]));
    copy("data5432", "snapshot")?;
    s.server.start(&s.scratch)?;
    for _ in 0..6 {
        s.sql("insert into t select generate_series(1, 5000)")?;
        s.flush_archive(&s.server)?;
    }
    s.server.stop(&s.scratch, "fast")?;
    std::fs::rename(s.path("data5432"), s.path("first"))?;
    copy("snapshot", "data5432")?;
    s.server.start(&s.scratch)?;
    s.sql("update t set n = n + 1")?;
    for kind in ["incr", "full"] {
        let backup = ["backup", "acme", "--fast", "--wal", "archive", "--type", kind];
        refused(s.fairvault(&backup), 1, "set back")?;
    }
    // A receiver stops at what the other life has pushed.
    refused(s.fairvault(&["wal", "receive", "acme", "--no-slot"]), 1, "set back")?;
    ensure!(
        s.ok(&["info", "acme", "--output", "json"])?
            .matches("\"parent\"")
            .count()
            == 1
    );
    Ok(())
}

#[test]
fn wal_that_another_server_archives_is_not_that_of_a_backup() -> Result<()> {
    twins("twins", true)
}

/// The server's files tell the same as a connection for replication.
#[test]
fn wal_that_another_server_archives_is_not_that_of_a_backup_without_replication() -> Result<()> {
    twins("sqltwins", false)
}

/// Two servers of one history, of which the other one archives: names that a backup waits for arrive.
fn twins(name: &str, may_replicate: bool) -> Result<()> {
    let shape = Shape {
        archiving: true,
        ..SMALL
    };
    let s = Fixture::new(name, shape)?;
    s.sql("create table t (n int); insert into t select generate_series(1, 1000)")?;
    s.backup()?;
    s.server.stop(&s.scratch, "fast")?;
    let (from, to) = (s.path("data5432"), s.path("twin"));
    run(s.scratch.command("cp").args(["-a", &from, &to]))?;
    s.configure("twin", "archive_mode = off\n")?;
    let twin = s.copy("twin", 5450);
    twin.start(&s.scratch)?;
    if !may_replicate {
        twin.forbid_replication(&s.scratch)?;
    }
    s.server.start(&s.scratch)?;
    for kind in ["full", "incr"] {
        let conninfo = format!("host={} port=5450 user=postgres", s.scratch.path().display());
        let mut command = s.command(&["backup", "acme", "--fast", "--wal", "archive", "--conninfo", &conninfo]);
        command.args(["--type", kind]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        std::thread::sleep(std::time::Duration::from_secs(3));
        for _ in 0..4 {
            s.sql("insert into t select generate_series(1, 1000)")?;
            s.flush_archive(&s.server)?;
        }
        let ended = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&ended.stderr);
        let is_refused = text.contains("other WAL") || text.contains("set back");
        ensure!(ended.status.code() == Some(1) && is_refused, "{kind}: {text}");
    }
    ensure!(
        s.ok(&["info", "acme", "--output", "json"])?
            .matches("\"parent\"")
            .count()
            == 1
    );
    Ok(())
}
