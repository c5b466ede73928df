//! `wal receive`: what the server has committed is in the repository within seconds, whatever happens.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{SMALL, signal};
use fairvault_tests::proxy::{Proxy, Target};
use fairvault_tests::receiver::wait_until_durable;
use fairvault_tests::s3::S3;
use fairvault_tests::tools::reader;
use fairvault_tests::{Fixture, Receiver, Shape, run, tools};

#[test]
fn what_was_committed_is_there_although_its_segment_is_not_full() -> Result<()> {
    let s = Fixture::new("receive", Shape::default())?;
    let receiver = Receiver::start(&s, &["--flush-interval", "200ms"])?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    s.sql("insert into t select generate_series(1, 1000)")?;
    wait_until_durable(&s, &s.server)?;
    let pieces = || {
        let objects = s.objects("wal");
        objects
            .iter()
            .filter(|p| p.display().to_string().contains(".d/"))
            .count()
    };
    let before = pieces();
    ensure!(before > 0, "{:?}", s.objects("wal"));
    // While nothing arrives, nothing is stored: fifteen intervals, in which the server may log its state once.
    std::thread::sleep(Duration::from_secs(3));
    ensure!(pieces() <= before + 1, "{before} pieces have become {}", pieces());
    // The machine is gone.
    receiver.kill()?;
    s.server.stop(&s.scratch, "immediate")?;
    std::fs::rename(&s.server.data, s.scratch.join("lost"))?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "1000");
    ensure!(
        s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?
            .contains("all good")
    );
    Ok(())
}

#[test]
fn when_a_receiver_began_and_ended_is_in_the_log() -> Result<()> {
    let s = Fixture::new("receivenoted", Shape::default())?;
    let spool = s.path("spool");
    let noted = |word: &str| -> Result<usize> {
        let audit = s.ok(&["audit", "acme"])?;
        let lines = audit.lines().filter(|line| line.contains("  wal receive"));
        Ok(lines.filter(|line| line.contains(&format!(": {word}"))).count())
    };
    for (before, more) in [&[][..], &["--spool", &spool]].into_iter().enumerate() {
        let receiver = Receiver::start(&s, more)?;
        s.sql(&format!("create table t{before} as select generate_series(1, 1000)"))?;
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while noted("began")? == before {
            ensure!(std::time::Instant::now() < deadline, "{}", receiver.text());
            std::thread::sleep(Duration::from_millis(200));
        }
        ensure!(noted("")? == 2 * before + 1);
        receiver.stop()?;
        ensure!(noted("stopped")? == before + 1 && noted("")? == 2 * before + 2);
        let audit = s.ok(&["audit", "acme", "--output", "json"])?;
        let audit: serde_json::Value = serde_json::from_str(&audit)?;
        let entries = audit["entries"].as_array().context("entries")?.iter();
        let stops = entries.filter(|entry| entry["what"].as_str().is_some_and(|what| what.contains("stopped")));
        ensure!(stops.clone().all(|entry| entry["bytes"].as_u64() > Some(0)), "{audit}");
        ensure!(stops.count() == before + 1, "{audit}");
    }
    Ok(())
}

#[test]
fn what_is_received_is_in_the_log_while_it_goes_on() -> Result<()> {
    let s = Fixture::new("receivegoeson", Shape::default())?;
    let at = |lsn: &str| -> Result<u64> { Ok(s.sql(&format!("select {lsn} - '0/0'::pg_lsn"))?.parse()?) };
    // A receiver begins at the beginning of a segment.
    let from = at("pg_current_wal_lsn()")? >> 24 << 24;
    let log = s.scratch.join("receive.log");
    let file = std::fs::File::create(&log)?;
    let mut command = s.scratch.command("env");
    command
        .arg(format!("HOME={}", s.scratch.path().display()))
        .arg("FAIRVAULT_FAULT=short hours")
        .arg(s.path("fairvault"))
        .args(&s.options)
        .args(["wal", "receive", "acme"]);
    let mut child = command.stdout(file.try_clone()?).stderr(file).spawn()?;
    let noted = |word: &str| -> Result<Vec<u64>> {
        let audit = s.ok(&["audit", "acme", "--output", "json"])?;
        let audit: serde_json::Value = serde_json::from_str(&audit)?;
        let entries = audit["entries"].as_array().context("entries")?.iter();
        let meant = entries.filter(|entry| {
            let what = entry["what"].as_str().unwrap_or_default();
            what.starts_with("wal receive") && what.ends_with(word)
        });
        meant.map(|entry| entry["bytes"].as_u64().context("bytes")).collect()
    };
    let wait_for = |count: usize| -> Result<Vec<u64>> {
        let deadline = std::time::Instant::now() + Duration::from_secs(40);
        loop {
            let found = noted(": goes on")?;
            if found.len() >= count {
                return Ok(found);
            }
            let text = std::fs::read_to_string(&log)?;
            ensure!(std::time::Instant::now() < deadline, "{found:?}: {text}");
            std::thread::sleep(Duration::from_millis(200));
        }
    };
    let found = (|| {
        s.sql("create table t as select generate_series(1, 1000) x")?;
        let first = wait_for(1)?.len();
        s.sql("insert into t select generate_series(1, 100000)")?;
        wait_for(first + 1)
    })();
    signal(&child, "TERM")?;
    ensure!(child.wait()?.success());
    // Each says what came since the one before.
    let (found, ends) = (found?, noted(": stopped")?);
    ensure!(
        found.iter().all(|&bytes| bytes > 0) && ends.len() == 1,
        "{found:?} {ends:?}"
    );
    let all = noted("")?.iter().sum::<u64>();
    let written = at("pg_current_wal_lsn()")? - from;
    ensure!(all <= written, "{all} of {written}: something was said twice");
    Ok(())
}

#[test]
fn large_segments_are_sealed_from_pieces_pushed_and_restored() -> Result<()> {
    let s = Fixture::new(
        "largesegments",
        Shape {
            initdb: &["-k", "--wal-segsize=64"],
            settings: "wal_keep_size = 1GB\n",
            ..Default::default()
        },
    )?;
    s.sql("create table t (x int, y text)")?;
    s.backup()?;
    let receiver = Receiver::start(&s, &["--flush-interval", "500ms"])?;
    let first = s.sql("select pg_walfile_name(pg_current_wal_insert_lsn())")?;
    s.sql("insert into t select n, repeat(md5(n::text), 30) from generate_series(1, 80000) n")?;
    let second = s.sql("select pg_walfile_name(pg_current_wal_insert_lsn())")?;
    ensure!(first != second, "more than a segment was written");
    wait_until_durable(&s, &s.server)?;
    // Whoever pushes it finds the same content; a segment of this size has no object for the whole.
    let file = |name: &str| s.server.data.join("pg_wal").join(name);
    let pieces = |name: &str| {
        let folder = format!("{name}.d/");
        let objects = s.objects("wal");
        objects
            .iter()
            .filter(|p| p.display().to_string().contains(&folder))
            .count()
    };
    ensure!(pieces(&first) > 1, "{:?}", s.objects("wal"));
    s.ok(&["wal", "push", "acme", &file(&first).display().to_string()])?;
    let to = s.path("fetched");
    s.ok(&["wal", "get", "acme", &first, &to])?;
    ensure!(
        std::fs::read(&to)? == std::fs::read(file(&first))?,
        "{first} came back otherwise"
    );
    // One that was only pushed is one object.
    receiver.kill()?;
    s.sql("select pg_switch_wal()")?;
    let third = s.sql("select pg_walfile_name(pg_current_wal_insert_lsn())")?;
    s.sql("insert into t select n, '' from generate_series(1, 1000) n")?;
    s.sql("select pg_switch_wal()")?;
    for name in [&second, &third] {
        s.ok(&["wal", "push", "acme", &file(name).display().to_string()])?;
        s.ok(&["wal", "get", "acme", name, &to])?;
        ensure!(
            std::fs::read(&to)? == std::fs::read(file(name))?,
            "{name} came back otherwise"
        );
    }
    ensure!(pieces(&third) == 0);
    s.server.stop(&s.scratch, "immediate")?;
    std::fs::rename(&s.server.data, s.scratch.join("lost"))?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "81000");
    Ok(())
}

/// What a segment holds need not fit into memory: 1 GiB is the largest size there is.
#[test]
fn the_largest_segments_are_received_in_little_memory() -> Result<()> {
    let s = Fixture::new(
        "largestsegments",
        Shape {
            initdb: &["-k", "--wal-segsize=1024"],
            settings: "wal_keep_size = 4GB\nmax_wal_size = 8GB\nmin_wal_size = 2GB\n",
            ..Default::default()
        },
    )?;
    s.sql("create table t (x int, y text)")?;
    let receiver = Receiver::start(&s, &["--flush-interval", "1s"])?;
    s.backup()?;
    s.sql("insert into t select n, repeat(md5(n::text), 30) from generate_series(1, 80000) n")?;
    let first = s.sql("select pg_walfile_name(pg_current_wal_insert_lsn())")?;
    s.sql("select pg_switch_wal()")?;
    s.sql("insert into t select n, repeat(md5(n::text), 30) from generate_series(1, 80000) n")?;
    wait_until_durable(&s, &s.server)?;
    let peak = receiver.peak_memory()?;
    println!("{peak} MiB");
    ensure!(peak <= 64, "{peak} MiB");
    receiver.stop()?;
    // Pushed as well, it is the same; and it comes back as it was.
    let file = s.server.data.join("pg_wal").join(&first);
    s.ok(&["wal", "push", "acme", &file.display().to_string()])?;
    s.ok(&["wal", "get", "acme", &first, &s.path("fetched")])?;
    run(std::process::Command::new("cmp").arg(&file).arg(s.path("fetched")))?;
    s.server.stop(&s.scratch, "immediate")?;
    std::fs::rename(&s.server.data, s.scratch.join("lost"))?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "160000");
    Ok(())
}

#[test]
fn a_slot_that_is_no_physical_one_is_refused() -> Result<()> {
    for major in [14, 15] {
        let s = Fixture::new(
            "logicalslot",
            Shape {
                major,
                settings: "wal_level = logical\n",
                ..SMALL
            },
        )?;
        s.sql("select pg_create_logical_replication_slot('taken', 'pgoutput')")?;
        let (exit, text) = Receiver::spawn(&s, &["--slot", "taken"])?.wait()?;
        let named = text.contains("replication slot taken is a logical one") && text.contains("--slot");
        ensure!(exit == 1 && named, "{major}: {exit} {text}");
    }
    Ok(())
}

/// Somebody made the slot without reserving WAL: nothing was kept for it so far, and everything is from now on.
#[test]
fn a_slot_without_reserved_wal_keeps_it_once_somebody_receives() -> Result<()> {
    for major in [14, 15] {
        let s = Fixture::new(
            "bareslot",
            Shape {
                major,
                settings: "wal_keep_size = 0\nmax_wal_size = 32MB\nmin_wal_size = 2MB\n",
                ..SMALL
            },
        )?;
        s.sql("create table t (x text)")?;
        s.sql("select pg_create_physical_replication_slot('bare')")?;
        let kept = "select coalesce(restart_lsn::text, 'nothing') from pg_replication_slots where slot_name = 'bare'";
        ensure!(s.sql(kept)? == "nothing");
        let more = ["--slot", "bare", "--flush-interval", "100ms"];
        let receiver = Receiver::start(&s, &more)?;
        s.backup()?;
        s.sql("insert into t select md5(i::text) from generate_series(1, 1000) i")?;
        wait_until_durable(&s, &s.server)?;
        let text = receiver.kill()?;
        ensure!(major == 14 || text.contains("slot bare keeps no WAL"), "{text}");
        ensure!(
            s.sql(kept)? != "nothing",
            "{major}: the slot keeps nothing although somebody has received"
        );
        // More than the server keeps without a slot.
        for _ in 0..4 {
            s.sql("insert into t select md5(i::text) from generate_series(1, 30000) i")?;
            s.sql("select pg_switch_wal()")?;
            s.sql("checkpoint")?;
        }
        let receiver = Receiver::start(&s, &more)?;
        wait_until_durable(&s, &s.server)?;
        let text = receiver.stop()?;
        ensure!(
            !text.contains("keeps no WAL") && !text.contains("GAP"),
            "{major}: {text}"
        );
        let info = s.ok(&["info", "acme"])?;
        ensure!(!info.contains("gap"), "{major}: {info}");
    }
    Ok(())
}

#[test]
fn restarts_go_on_exactly_and_full_segments_take_over() -> Result<()> {
    let s = Fixture::new("resume", SMALL)?;
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms", "--piece-size", "64KiB"])?;
    s.sql("create table t (x text)")?;
    s.backup()?;
    let fill = "insert into t select md5(i::text) from generate_series(1, 3000) i";
    for _ in 0..5 {
        s.sql(fill)?;
    }
    wait_until_durable(&s, &s.server)?;
    receiver.kill()?;
    for _ in 0..5 {
        s.sql(fill)?;
    }
    // While nobody received, the slot has kept everything.
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
    s.sql(fill)?;
    wait_until_durable(&s, &s.server)?;
    let text = receiver.stop()?;
    ensure!(!text.contains("trying again"), "{text}");
    let info = s.ok(&["info", "acme"])?;
    ensure!(!info.contains("gap") && !info.contains("MISSING"), "{info}");
    // Whole segments have replaced their pieces.
    let objects = s.objects("wal");
    let whole: Vec<String> = objects
        .iter()
        .filter(|p| !p.display().to_string().contains(".d/"))
        .filter_map(|p| Some(p.file_name()?.to_str()?[..24].to_owned()))
        .collect();
    ensure!(whole.len() > 3, "{whole:?}");
    for object in &objects {
        let text = object.display().to_string();
        ensure!(!whole.iter().any(|name| text.contains(&format!("{name}.d"))), "{text}");
    }
    s.server.stop(&s.scratch, "immediate")?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "33000");
    ensure!(
        s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?
            .contains("all good")
    );
    Ok(())
}

/// Of segments that are too large to be held, a restart goes on in the middle: what comes again is compared, and not stored
/// once more.
#[test]
fn a_restart_in_the_middle_of_a_large_segment_goes_on_there() -> Result<()> {
    let s = Fixture::new(
        "largeresume",
        Shape {
            initdb: &["-k", "--wal-segsize=64"],
            settings: "wal_keep_size = 1GB\n",
            ..Default::default()
        },
    )?;
    s.sql("create table t (x int, y text)")?;
    let more = ["--flush-interval", "200ms"];
    let mut receiver = Receiver::start(&s, &more)?;
    s.backup()?;
    let fill = "insert into t select n, repeat(md5(n::text), 30) from generate_series(1, 12000) n";
    for _ in 0..6 {
        s.sql(fill)?;
        wait_until_durable(&s, &s.server)?;
        receiver.kill()?;
        receiver = Receiver::start(&s, &more)?;
    }
    wait_until_durable(&s, &s.server)?;
    receiver.stop()?;
    // No position lies in two pieces.
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for object in s.objects("wal") {
        let name = object.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if object.display().to_string().contains(".d/") {
            let (start, end, _) = fairvault_format::names::parse_piece(&name).context("a piece")?;
            ranges.push((start, end));
        }
    }
    ranges.sort_unstable();
    ensure!(ranges.len() > 15, "{ranges:?}");
    ensure!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{ranges:?}");
    s.server.stop(&s.scratch, "immediate")?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "72000");
    Ok(())
}

/// What arrives is stored as soon as it is `piece_size`, however long the interval is; and after the interval, however
/// little it is.
#[test]
fn pieces_are_as_large_or_as_old_as_was_asked_for() -> Result<()> {
    let s = Fixture::new("piecesize", Shape::default())?;
    let receiver = Receiver::start(&s, &["--flush-interval", "1h", "--piece-size", "256KiB"])?;
    s.sql("create table t (x text)")?;
    let pieces = || {
        let objects = s.objects("wal").into_iter();
        objects.filter(|p| p.display().to_string().contains(".d/")).count()
    };
    // What the server had before has come.
    std::thread::sleep(Duration::from_secs(2));
    for _ in 0..3 {
        let (before, deadline) = (pieces(), std::time::Instant::now() + Duration::from_secs(20));
        s.sql("insert into t select md5(i::text) from generate_series(1, 6000) i")?;
        while pieces() == before {
            ensure!(std::time::Instant::now() < deadline, "{before}: {}", receiver.text());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    // Less than that waits.
    std::thread::sleep(Duration::from_secs(1));
    let settled = pieces();
    s.sql("insert into t values ('a little')")?;
    std::thread::sleep(Duration::from_secs(7));
    ensure!(pieces() == settled, "{settled} pieces have become {}", pieces());
    receiver.stop()?;
    // The interval, if nothing is said: five seconds.
    let receiver = Receiver::start(&s, &[])?;
    wait_until_durable(&s, &s.server)?;
    s.sql("insert into t values ('a little')")?;
    let began = std::time::Instant::now();
    let settled = pieces();
    while pieces() == settled {
        ensure!(began.elapsed() < Duration::from_secs(20), "{}", receiver.text());
        std::thread::sleep(Duration::from_millis(50));
    }
    receiver.stop()?;
    Ok(())
}

#[test]
fn pieces_can_be_sealed_instead() -> Result<()> {
    let s = Fixture::new("sealed", SMALL)?;
    let receiver = Receiver::start(
        &s,
        &["--flush-interval", "100ms", "--piece-size", "256KiB", "--keep-pieces"],
    )?;
    s.sql("create table t (x text)")?;
    s.backup()?;
    for _ in 0..20 {
        s.sql("insert into t select md5(i::text) from generate_series(1, 1500) i")?;
    }
    wait_until_durable(&s, &s.server)?;
    receiver.stop()?;
    // A seal has the name of its segment, and is of the kind 11.
    let objects = s.objects("wal");
    let mut seals = Vec::new();
    for object in &objects {
        if object.extension().is_some_and(|e| e == "0001") && std::fs::read(object)?[5] == 11 {
            seals.push(object.clone());
        }
    }
    ensure!(seals.len() > 2, "{objects:?}");
    s.server.stop(&s.scratch, "immediate")?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "30000");
    ensure!(
        s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?
            .contains("all good")
    );
    let sealed = seals.last().context("seal")?;
    let name = sealed.file_stem().context("name")?.to_string_lossy().into_owned();
    // Pushed as well, it is the same; the independent reader sees it as we do.
    let (exit, text) = s.fairvault(&["wal", "push", "acme", &s.path(&format!("data5432/pg_wal/{name}"))]);
    ensure!(exit == 0, "{text}");
    s.ok(&["wal", "get", "acme", &name, &s.path("fetched")])?;
    let options = ["--key-file", &s.path("key"), &s.path("read")];
    reader(&[
        &s.path("vault"),
        "wal",
        "acme",
        &name,
        options[2],
        options[0],
        options[1],
    ])?;
    ensure!(std::fs::read(s.path("fetched"))? == std::fs::read(s.path("read"))?);
    ensure!(std::fs::read(sealed)?[5] == 11);
    // A piece that a seal names is damaged: its segment is not delivered.
    let pieces = sealed.with_extension("d");
    let piece = objects.iter().find(|p| p.starts_with(&pieces)).context("piece")?;
    std::fs::write(piece, b"rubbish")?;
    ensure!(s.fairvault(&["verify", "acme", "--progress", "none"]).0 == 4);
    let (exit, text) = s.fairvault(&["wal", "get", "acme", &name, &s.path("fetched")]);
    ensure!(exit == 200, "{exit} {text}");
    Ok(())
}

#[test]
fn store_and_server_may_go_away_for_a_while() -> Result<()> {
    let s = Fixture::new(
        "away",
        Shape {
            archiving: true,
            ..Default::default()
        },
    )?;
    // Pushed and received at once: the same segment from both is one object.
    let mut receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    s.sql("insert into t values (1)")?;
    s.flush_archive(&s.server)?;
    wait_until_durable(&s, &s.server)?;
    std::fs::rename(s.path("vault"), s.path("hidden"))?;
    s.sql("insert into t values (2)")?;
    receiver.wait_for_line("trying again")?;
    if tools::is_full() {
        std::thread::sleep(Duration::from_secs(60));
    }
    std::fs::rename(s.path("hidden"), s.path("vault"))?;
    wait_until_durable(&s, &s.server)?;
    s.server.stop(&s.scratch, "immediate")?;
    std::thread::sleep(Duration::from_secs(1));
    s.server.start(&s.scratch)?;
    s.sql("insert into t values (3)")?;
    s.flush_archive(&s.server)?;
    wait_until_durable(&s, &s.server)?;
    receiver.stop()?;
    s.server.stop(&s.scratch, "immediate")?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "3");
    ensure!(
        s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?
            .contains("all good")
    );
    Ok(())
}

/// From 18 on, a slot that nobody uses for some time may be invalidated.
#[test]
fn a_slot_that_was_idle_for_too_long_is_said() -> Result<()> {
    let s = Fixture::new(
        "idleslot",
        Shape {
            major: 18,
            settings: "idle_replication_slot_timeout = 2s\nwal_keep_size = 64MB\n",
            ..SMALL
        },
    )?;
    s.sql("create table t (x text)")?;
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
    wait_until_durable(&s, &s.server)?;
    // One that is at work is not idle, although nothing happens.
    std::thread::sleep(Duration::from_secs(4));
    s.sql("checkpoint")?;
    let reason = "select coalesce(invalidation_reason, 'none') from pg_replication_slots";
    ensure!(s.sql(reason)? == "none");
    receiver.kill()?;
    s.sql("insert into t values ('x'); select pg_switch_wal()")?;
    std::thread::sleep(Duration::from_secs(4));
    s.sql("checkpoint")?;
    ensure!(s.sql(reason)? == "idle_timeout", "{}", s.sql(reason)?);
    let (exit, text) = s.fairvault(&["wal", "receive", "acme"]);
    let is_named = text.contains("invalidated due to \"idle_timeout\"") && text.contains("pg_drop_replication_slot");
    ensure!(exit == 1 && is_named, "{exit} {text}");
    s.sql("select pg_drop_replication_slot('fairvault_acme_main')")?;
    // What came meanwhile is still in pg_wal.
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
    wait_until_durable(&s, &s.server)?;
    receiver.stop()?;
    ensure!(!s.ok(&["info", "acme"])?.contains("gap"));
    Ok(())
}

#[test]
fn what_a_dying_server_has_sent_is_stored() -> Result<()> {
    let s = Fixture::new("dying", Shape::default())?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    // Nothing would be stored for a minute: only the server's end makes it.
    let receiver = Receiver::start(&s, &["--flush-interval", "60s"])?;
    s.sql("insert into t select generate_series(1, 1000)")?;
    s.server.wait_for(
        &s.scratch,
        "select count(*) from pg_stat_replication where write_lsn >= pg_current_wal_flush_lsn()",
        "1",
    )?;
    s.server.stop(&s.scratch, "immediate")?;
    std::fs::rename(&s.server.data, s.scratch.join("lost"))?;
    std::thread::sleep(Duration::from_secs(2));
    receiver.kill()?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "1000");
    Ok(())
}

#[test]
fn a_store_that_goes_away_leaves_no_seal_over_a_hole() -> Result<()> {
    let s = Fixture::new("holes", SMALL)?;
    let receiver = Receiver::start(
        &s,
        &["--flush-interval", "50ms", "--piece-size", "64KiB", "--keep-pieces"],
    )?;
    s.sql("create table t (x text)")?;
    s.backup()?;
    for _ in 0..3 {
        std::fs::rename(s.path("vault"), s.path("hidden"))?;
        for _ in 0..6 {
            s.sql("insert into t select md5(i::text) from generate_series(1, 3000) i")?;
        }
        // Longer than what one operation waits for a store that is away.
        std::thread::sleep(Duration::from_secs(7));
        std::fs::rename(s.path("hidden"), s.path("vault"))?;
        s.sql("insert into t values ('more')")?;
        wait_until_durable(&s, &s.server)?;
    }
    receiver.stop()?;
    s.server.stop(&s.scratch, "immediate")?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "54003");
    ensure!(
        s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?
            .contains("all good")
    );
    Ok(())
}

#[test]
fn a_slot_that_was_invalidated_is_said() -> Result<()> {
    for major in [15, 18] {
        let s = Fixture::new(
            "lost",
            Shape {
                major,
                settings: "max_slot_wal_keep_size = 2MB\nmax_wal_size = 2MB\nmin_wal_size = 2MB\n",
                ..SMALL
            },
        )?;
        s.sql("create table t (x text)")?;
        let receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
        s.backup()?;
        wait_until_durable(&s, &s.server)?;
        receiver.kill()?;
        for _ in 0..10 {
            s.sql("insert into t select md5(i::text) from generate_series(1, 9000) i; checkpoint")?;
        }
        ensure!(s.sql("select wal_status from pg_replication_slots")? == "lost");
        let (exit, text) = s.fairvault(&["wal", "receive", "acme"]);
        ensure!(exit == 1 && text.contains("it was invalidated"), "{exit} {text}");
        // From 18 on, the server refuses it; before, it says that WAL is missing.
        let word = if major >= 18 {
            "pg_drop_replication_slot"
        } else {
            "--skip-gap"
        };
        ensure!(text.contains(word), "{major}: {text}");
        s.sql("select pg_drop_replication_slot('fairvault_acme_main')")?;
        let (exit, text) = s.fairvault(&["wal", "receive", "acme"]);
        ensure!(exit == 1 && text.contains("--skip-gap"), "{exit} {text}");
        s.backup()?;
        let receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
        s.sql("insert into t values ('later')")?;
        wait_until_durable(&s, &s.server)?;
        receiver.stop()?;
    }
    Ok(())
}

#[test]
fn a_receiver_takes_little_memory() -> Result<()> {
    let s = Fixture::new("memory", MUCH_WAL)?;
    let spool = s.path("spool");
    receives_in_little_memory(
        &s,
        "s",
        &[
            &["--flush-interval", "200ms"],
            &["--spool", &spool],
            &["--spool", &spool, "--synchronous"],
        ],
    )
}

/// Over a network.
#[test]
fn a_receiver_into_s3_takes_little_memory() -> Result<()> {
    let mut s = Fixture::new(
        "memorys3",
        Shape {
            stanza: false,
            ..MUCH_WAL
        },
    )?;
    let s3 = S3::start(&s.scratch, "bucket")?;
    s.use_s3(&s3.endpoint(), "s3://bucket/x", "")?;
    s.ok(&["stanza", "create", "acme"])?;
    let spool = s.path("spool");
    receives_in_little_memory(
        &s,
        "s3",
        &[&["--flush-interval", "200ms"], &["--synchronous"], &["--spool", &spool]],
    )
}

const MUCH_WAL: Shape<'static> = Shape {
    major: 15,
    archiving: false,
    stanza: true,
    more: "",
    flags: false,
    settings: "max_wal_size = 1GB\nwal_keep_size = 1GB\n",
    initdb: &["-k"],
};

/// Each of `forms` while WAL comes faster than it can be stored: text, and what cannot be compressed; and while others have
/// archived some of it already.
fn receives_in_little_memory(s: &Fixture, name: &str, forms: &[&[&str]]) -> Result<()> {
    s.sql("create extension pgcrypto; create table t (x text); create table b (x bytea)")?;
    s.sql("alter table b alter x set storage external")?;
    for more in forms {
        let receiver = Receiver::start(s, more)?;
        for _ in 0..2 {
            s.sql("insert into t select md5(i::text) from generate_series(1, 500000) i")?;
            let first = s.sql("select pg_walfile_name(pg_current_wal_lsn())")?;
            s.sql("insert into b select gen_random_bytes(1024) from generate_series(1, 60000) i")?;
            // It may have been pushed before it is received.
            let path = s.path(&format!("data5432/pg_wal/{first}"));
            s.ok(&["wal", "push", "acme", &path])?;
        }
        wait_until_durable(s, &s.server)?;
        let peak = receiver.peak_memory()?;
        println!("{name} {more:?}: {peak} MiB");
        ensure!(peak <= 64, "{name} {more:?}: {peak} MiB");
        receiver.stop()?;
    }
    Ok(())
}

#[test]
fn only_what_is_asked_for_is_promised() -> Result<()> {
    // Whoever reports flushed WAL is taken as a synchronous standby by `*`.
    let s = Fixture::new(
        "promise",
        Shape {
            settings: "synchronous_standby_names = '*'\nsynchronous_commit = local\n",
            ..Default::default()
        },
    )?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    let receiver = Receiver::start(&s, &["--no-slot", "--flush-interval", "100ms"])?;
    s.sql("insert into t values (1)")?;
    let now = s.sql("select pg_current_wal_flush_lsn()")?;
    let written = format!("select write_lsn >= '{now}' from pg_stat_replication");
    s.server.wait_for(&s.scratch, &written, "t")?;
    std::thread::sleep(Duration::from_secs(1));
    let flushed = s.sql("select coalesce(flush_lsn, '0/0') from pg_stat_replication")?;
    ensure!(flushed == "0/0", "{flushed}");
    receiver.stop()?;
    Ok(())
}

#[test]
fn a_slow_store_is_no_reason_for_the_server_to_hang_up() -> Result<()> {
    let mut s = Fixture::new(
        "slow",
        Shape {
            stanza: false,
            settings: "wal_sender_timeout = 3s\n",
            ..SMALL
        },
    )?;
    let s3 = S3::start(&s.scratch, "bucket")?;
    let proxy = Proxy::start(Target::Port(s3.port))?;
    s.use_s3(&format!("http://127.0.0.1:{}", proxy.port), "s3://bucket/x", "")?;
    s.ok(&["stanza", "create", "acme"])?;
    s.sql("create table t (x text)")?;
    s.backup()?;
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
    // A segment of random text takes longer than the server's patience.
    proxy.rate(100_000);
    s.sql("insert into t select md5(random()::text) from generate_series(1, 12000) i")?;
    std::thread::sleep(Duration::from_secs(8));
    proxy.rate(0);
    wait_until_durable(&s, &s.server)?;
    let text = receiver.stop()?;
    ensure!(!text.contains("trying again"), "{text}");
    ensure!(
        !s.server.log_text().contains("terminating walsender"),
        "{}",
        s.server.log_text()
    );
    Ok(())
}
