//! Background workers: archiving ahead of PostgreSQL, and fetching ahead of recovery.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::field;
use fairvault_tests::{Fixture, Shape, run};

const SMALL_SEGMENTS: &[&str] = &["-k", "--wal-segsize=1"];

fn fixture(name: &str, more: &str) -> Result<Fixture> {
    Fixture::new(
        name,
        Shape {
            archiving: true,
            initdb: SMALL_SEGMENTS,
            settings: "archive_timeout = 60\nmax_wal_size = 2GB\n",
            more,
            ..Default::default()
        },
    )
}

/// Fills about `n` segments of 1 MiB.
fn fill(s: &Fixture, n: u32) -> Result<()> {
    for _ in 0..n {
        s.sql("insert into t select md5(i::text) from generate_series(1, 9000) i")?;
    }
    Ok(())
}

/// Workers of this test: processes with its folder in their arguments.
fn workers(s: &Fixture) -> Vec<String> {
    let mark = s.path("");
    let is_ours = |pid: &str| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.contains(mark.trim_end_matches('/')) && line.contains("--worker")
    };
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().into_string().ok());
    pids.filter(|name| name.bytes().all(|b| b.is_ascii_digit()) && is_ours(name))
        .collect()
}

fn kill_workers(s: &Fixture) -> usize {
    let found = workers(s);
    for pid in &found {
        let _ = run(Command::new("kill").args(["-9", pid]));
    }
    found.len()
}

/// Waits until every worker of this test has ended by itself.
fn wait_for_no_workers(s: &Fixture) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !workers(s).is_empty() {
        ensure!(Instant::now() < deadline, "a worker does not end");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn ready(s: &Fixture) -> usize {
    let status = s.server.data.join("pg_wal/archive_status");
    let names = std::fs::read_dir(status).into_iter().flatten().flatten();
    names
        .filter(|e| e.file_name().to_string_lossy().ends_with(".ready"))
        .count()
}

fn wait_until_archived(s: &Fixture) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(90);
    while ready(s) > 0 {
        ensure!(Instant::now() < deadline, "{} wait: {}", ready(s), s.server.log_text());
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn a_worker_archives_ahead_and_its_death_loses_nothing() -> Result<()> {
    let s = fixture("ahead", "wal = { async = true }")?;
    s.sql("create table t (x text)")?;
    s.backup()?;
    let mut killed = 0;
    for _ in 0..5 {
        fill(&s, 4)?;
        killed += kill_workers(&s);
    }
    s.sql("select pg_switch_wal()")?;
    wait_until_archived(&s)?;
    ensure!(killed > 0, "there was no worker to kill");
    let info = s.ok(&["info", "acme"])?;
    ensure!(!info.contains("gap"), "{info}");
    // An answer of a worker is for the bytes that it stored, not for a name.
    let log = s.server.log_text();
    ensure!(!log.contains("panicked"), "{log}");
    s.server.stop(&s.scratch, "fast")?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    let copy = s.start("r", 5450)?;
    ensure!(copy.sql(&s.scratch, "select count(*) from t")? == "180000");
    ensure!(s.ok(&["verify", "acme", "--progress", "none"])?.contains("all good"));
    Ok(())
}

#[test]
fn with_the_store_away_wal_waits_and_then_drains() -> Result<()> {
    let s = fixture(
        "backlog",
        "wal = { async = true, push_timeout = \"2s\", max_backlog = \"3MiB\" }",
    )?;
    s.sql("create table t (x text)")?;
    s.backup()?;
    wait_until_archived(&s)?;
    std::fs::rename(s.path("vault"), s.path("hidden"))?;
    fill(&s, 8)?;
    // What PostgreSQL runs says: try again.
    let names = std::fs::read_dir(s.server.data.join("pg_wal/archive_status"))?;
    let mut waiting: Vec<PathBuf> = names
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "ready"))
        .collect();
    waiting.sort();
    let first = waiting[0]
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let path = s.path(&format!("data5432/pg_wal/{first}"));
    let (exit, text) = s.fairvault(&["wal", "push", "acme", &path]);
    ensure!(exit == 75, "{exit} {text}");
    ensure!(text.contains("ALARM") && text.contains("is not archived"), "{text}");
    ensure!(ready(&s) >= 5, "{}", ready(&s));
    std::fs::rename(s.path("hidden"), s.path("vault"))?;
    // PostgreSQL pauses a minute after three failures: a new segment does not wake it, a reload does.
    s.server.stop(&s.scratch, "fast")?;
    s.server.start(&s.scratch)?;
    wait_until_archived(&s)?;
    let info = s.ok(&["info", "acme"])?;
    ensure!(!info.contains("gap"), "{info}");
    Ok(())
}

#[test]
fn recovery_takes_what_was_fetched_ahead() -> Result<()> {
    let s = fixture("prefetch", "")?;
    s.sql("create table t (x text)")?;
    s.backup()?;
    fill(&s, 40)?;
    s.sql("select pg_switch_wal()")?;
    wait_until_archived(&s)?;
    s.server.stop(&s.scratch, "fast")?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    let copy = s.copy("r", 5450);
    copy.try_start(&s.scratch, false)?;
    // The worker's death is a detour.
    let mut killed = 0;
    let deadline = Instant::now() + Duration::from_secs(20);
    while killed < 2 && Instant::now() < deadline && !copy.log_text().contains("archive recovery complete") {
        killed += kill_workers(&s);
        std::thread::sleep(Duration::from_millis(20));
    }
    copy.wait_for(&s.scratch, "select pg_is_in_recovery()", "f")?;
    ensure!(copy.sql(&s.scratch, "select count(*) from t")? == "360000");
    ensure!(killed > 0, "there was no worker to kill: {}", copy.log_text());
    Ok(())
}

/// What is fetched ahead takes no more room than it may, and is handed over by renaming.
#[test]
fn what_is_fetched_ahead_is_bounded_and_renamed() -> Result<()> {
    let s = fixture("window", "wal = { prefetch = \"3MiB\" }")?;
    s.sql("create table t (x text)")?;
    s.backup()?;
    fill(&s, 12)?;
    s.sql("select pg_switch_wal()")?;
    wait_until_archived(&s)?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    // What PostgreSQL would run, in the copy's folder.
    let conf = std::fs::read_to_string(s.path("r/postgresql.auto.conf"))?;
    let line = conf.lines().rev().find(|line| line.starts_with("restore_command = '"));
    let line = line
        .unwrap_or_default()
        .trim_start_matches("restore_command = '")
        .trim_end_matches('\'');
    let command = line.replace("''", "'");
    let first = field(&s.ok(&["info", "acme", "--output", "json"])?, "start_lsn")?;
    let first = first
        .split_once('/')
        .map_or(0, |(_, low)| u64::from_str_radix(low, 16).unwrap_or(0) >> 20);
    let segment = |number: u64| format!("0000000100000000{number:08X}");
    let get = |number: u64| -> Result<PathBuf> {
        let to = s.scratch.join(&format!("r/pg_wal/got{number}"));
        let command = command
            .replace("%f", &segment(number))
            .replace("%p", &to.display().to_string());
        run(s
            .scratch
            .command("sh")
            .args(["-c", &format!("cd {} && {command}", s.path("r"))]))?;
        Ok(to)
    };
    let ahead = || -> Vec<PathBuf> {
        let all = fairvault_tests::fixture::files(&s.scratch.join("cache/spool"));
        all.into_iter()
            .filter(|path| path.metadata().is_ok_and(|meta| meta.len() >= 1 << 20))
            .collect()
    };
    get(first)?;
    for number in first + 1..first + 6 {
        // What comes next is there, and no more than may be.
        let deadline = Instant::now() + Duration::from_secs(4);
        let next = loop {
            let there = ahead();
            ensure!(there.len() <= 3, "{there:#?}");
            if there.len() == 3 || Instant::now() > deadline {
                break there.into_iter().find(|path| path.ends_with(segment(number)));
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let next = next.with_context(|| format!("{} was not fetched ahead: {:#?}", segment(number), ahead()))?;
        std::thread::sleep(Duration::from_millis(200));
        ensure!(ahead().len() == 3, "{:#?}", ahead());
        let inode = std::fs::metadata(&next)?.ino();
        let to = get(number)?;
        ensure!(
            std::fs::metadata(&to)?.ino() == inode && !next.exists(),
            "it was copied"
        );
        let original = std::fs::read(s.server.data.join("pg_wal").join(segment(number)))?;
        ensure!(std::fs::read(&to)? == original, "{}", segment(number));
    }
    // Nobody asks any more: nothing stays.
    wait_for_no_workers(&s)?;
    ensure!(ahead().is_empty(), "{:#?}", ahead());
    Ok(())
}

#[test]
fn a_store_that_vanishes_in_mid_recovery_stops_it() -> Result<()> {
    let s = fixture("vanish", "wal = { prefetch = \"2MiB\" }")?;
    s.sql("create table t (x text)")?;
    s.backup()?;
    fill(&s, 60)?;
    s.sql("select pg_switch_wal()")?;
    wait_until_archived(&s)?;
    s.server.stop(&s.scratch, "fast")?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    let copy = s.copy("r", 5450);
    copy.try_start(&s.scratch, false)?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while copy.log_text().matches("restored log file").count() < 5 {
        ensure!(Instant::now() < deadline, "{}", copy.log_text());
        std::thread::sleep(Duration::from_millis(5));
    }
    std::fs::rename(s.path("vault"), s.path("hidden"))?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while copy.is_running() {
        ensure!(Instant::now() < deadline, "it still runs: {}", copy.log_text());
        std::thread::sleep(Duration::from_millis(100));
    }
    let log = copy.log_text();
    ensure!(!log.contains("selected new timeline") && log.contains("FATAL"), "{log}");
    // When the store is back, the same copy goes on to the end.
    std::fs::rename(s.path("hidden"), s.path("vault"))?;
    copy.start(&s.scratch)?;
    copy.wait_for(&s.scratch, "select pg_is_in_recovery()", "f")?;
    ensure!(copy.sql(&s.scratch, "select count(*) from t")? == "540000");
    Ok(())
}

#[test]
fn a_gap_is_said_as_soon_as_it_exists() -> Result<()> {
    for more in ["", "wal = { async = true }"] {
        let s = fixture("untold", more)?;
        s.sql("create table t (x text)")?;
        s.backup()?;
        fill(&s, 2)?;
        wait_until_archived(&s)?;
        // PostgreSQL was told that a segment is archived, and it is not: a wrong archive_command for a while. A worker
        // that is still there would archive it all the same.
        wait_for_no_workers(&s)?;
        s.sql("alter system set archive_command = '/bin/true'")?;
        s.sql("select pg_reload_conf(), pg_sleep(1)")?;
        fill(&s, 2)?;
        wait_until_archived(&s)?;
        s.sql("alter system reset archive_command")?;
        s.sql("select pg_reload_conf(), pg_sleep(1)")?;
        fill(&s, 3)?;
        wait_until_archived(&s)?;
        let said: Vec<String> = match more {
            "" => s.server.log_text().lines().map(str::to_owned).collect(),
            _ => worker_log(&s),
        };
        let gaps = said.iter().filter(|l| l.contains("GAP: ")).count();
        ensure!(gaps == 1, "{gaps}: {said:#?}");
        ensure!(s.ok(&["info", "acme"])?.contains("gap"), "info does not know");
        let (exit, text) = s.fairvault(&["check", "acme"]);
        ensure!(
            exit == 1 && text.contains("is missing, and later WAL is there"),
            "{exit} {text}"
        );
        let (exit, text) = s.fairvault(&["verify", "acme", "--progress", "none"]);
        ensure!(
            exit == 4 && text.contains("recovery from earlier backups ends before it"),
            "{exit} {text}"
        );
    }
    Ok(())
}

/// Lines of the worker's log; the worker of this test has the only one in its spool folder.
fn worker_log(s: &Fixture) -> Vec<String> {
    fairvault_tests::fixture::files(&s.scratch.join("cache/spool"))
        .iter()
        .filter(|p| p.ends_with("worker.log"))
        .flat_map(|p| {
            std::fs::read_to_string(p)
                .unwrap_or_default()
                .lines()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn the_worker_can_be_a_service() -> Result<()> {
    let s = fixture("serve", "wal = { async = true }")?;
    let pg_wal = s.path("data5432/pg_wal");
    let (exit, text) = s.fairvault(&["wal", "push", "acme", "--serve", &s.path("data5432")]);
    ensure!(exit == 2 && text.contains("archive_status"), "{exit} {text}");
    // Whatever worker archived what initdb wrote is gone before the service comes.
    wait_for_no_workers(&s)?;
    let log = std::fs::File::create(s.scratch.join("service.log"))?;
    let start = || -> Result<std::process::Child> {
        let mut command = s.command(&["wal", "push", "acme", "--serve", &pg_wal]);
        command
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?);
        Ok(command.spawn()?)
    };
    let mut service = start()?;
    std::thread::sleep(Duration::from_millis(500));
    s.sql("create table t (x text)")?;
    s.backup()?;
    fill(&s, 5)?;
    s.sql("select pg_switch_wal()")?;
    wait_until_archived(&s)?;
    ensure!(workers(&s).is_empty(), "a command started a worker beside the service");
    // It dies, and commands go on without it; it comes back, and takes over once their worker has ended.
    service.kill()?;
    service.wait()?;
    fill(&s, 5)?;
    s.sql("select pg_switch_wal()")?;
    wait_until_archived(&s)?;
    let mut service = start()?;
    wait_for_no_workers(&s)?;
    // A store that is away for a while does not end it.
    std::fs::rename(s.path("vault"), s.path("hidden"))?;
    fill(&s, 3)?;
    std::thread::sleep(Duration::from_secs(7));
    std::fs::rename(s.path("hidden"), s.path("vault"))?;
    s.sql("select pg_switch_wal()")?;
    wait_until_archived(&s)?;
    ensure!(
        service.try_wait()?.is_none(),
        "{}",
        std::fs::read_to_string(s.scratch.join("service.log"))?
    );
    fairvault_tests::fixture::signal(&service, "TERM")?;
    let status = service.wait()?;
    ensure!(status.success(), "{status}");
    // What it stores while somebody fences writers is not acknowledged; it begins anew, with what the log says now.
    wait_for_no_workers(&s)?;
    let mut service = start()?;
    std::thread::sleep(Duration::from_millis(500));
    fill(&s, 2)?;
    s.sql("select pg_switch_wal()")?;
    wait_until_archived(&s)?;
    ensure!(workers(&s).is_empty(), "a command started a worker beside the service");
    s.ok(&["stanza", "fence", "acme", "--reason", "a trial"])?;
    fill(&s, 2)?;
    s.sql("select pg_switch_wal()")?;
    wait_until_archived(&s)?;
    let said = std::fs::read_to_string(s.scratch.join("service.log"))?;
    ensure!(said.contains("was fenced") && said.contains("trying again"), "{said}");
    ensure!(service.try_wait()?.is_none(), "{said}");
    service.kill()?;
    service.wait()?;
    ensure!(!s.ok(&["info", "acme"])?.contains("gap"));
    Ok(())
}
