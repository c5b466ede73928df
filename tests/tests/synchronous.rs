//! `wal receive --synchronous` into a directory: what was acknowledged is in the repository, in its journals at first.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::SMALL;
use fairvault_tests::{Fixture, Receiver, Shape, run, tools};

#[test]
fn acknowledged_commits_are_never_lost_in_synchronous_mode() -> Result<()> {
    let s = Fixture::new(
        "sync",
        Shape {
            settings: "synchronous_standby_names = 'fairvault'\nsynchronous_commit = on\n",
            ..Default::default()
        },
    )?;
    s.sql("set synchronous_commit = local; create table t (x int)")?;
    s.backup()?;
    let mut acknowledged = 0;
    for round in 0..3 {
        let receiver = Receiver::start(&s, &["--synchronous"])?;
        s.server.wait_for(
            &s.scratch,
            "select string_agg(sync_state, ',') from pg_stat_replication",
            "sync",
        )?;
        // One commit after the other; each psql call returns when its commit was acknowledged.
        for _ in 0..5 + round * 3 {
            s.sql("insert into t values (1)")?;
            acknowledged += 1;
        }
        receiver.kill()?;
    }
    s.server.stop(&s.scratch, "immediate")?;
    std::fs::rename(&s.server.data, s.scratch.join("lost"))?;
    let there: u32 = restored(&s, "r")?.parse()?;
    ensure!(there >= acknowledged, "{there} of {acknowledged}");
    Ok(())
}

/// A receiver applies nothing: who waits for that waits for ever. It is said, and what was cancelled was not acknowledged.
#[test]
fn remote_apply_waits_for_ever_and_is_said() -> Result<()> {
    let s = Fixture::new(
        "remoteapply",
        Shape {
            settings: "synchronous_standby_names = 'fairvault'\nsynchronous_commit = remote_apply\n",
            ..Default::default()
        },
    )?;
    s.sql("set synchronous_commit = local; create table t (x int)")?;
    let mut receiver = Receiver::start(&s, &["--synchronous"])?;
    receiver.wait_for_line("synchronous_commit is remote_apply")?;
    let sync = "select string_agg(sync_state, ',') from pg_stat_replication";
    s.server.wait_for(&s.scratch, sync, "sync")?;
    let mut waiting = s.server.program(&s.scratch, "psql");
    waiting.args([
        "-X",
        "-U",
        "postgres",
        "-h",
        &s.path(""),
        "-p",
        "5432",
        "-d",
        "postgres",
    ]);
    waiting
        .args(["-c", "insert into t values (1)"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let waiting = waiting.spawn()?;
    let is_waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep' and query like 'insert%'";
    s.server.wait_for(&s.scratch, is_waiting, "1")?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(s.sql(is_waiting)? == "1");
    s.sql("select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'")?;
    let ended = waiting.wait_with_output()?;
    let text = String::from_utf8_lossy(&ended.stderr);
    ensure!(text.contains("canceling wait for synchronous replication"), "{text}");
    // With what can be kept, it is acknowledged.
    s.sql("set synchronous_commit = on; insert into t values (2)")?;
    receiver.stop()?;
    Ok(())
}

/// One server under load, killed at some moment, its disk gone, and in every other round the receiver with it; returns how
/// many commits were acknowledged to the clients, and how many came back.
fn killed_under_load(number: u32) -> Result<(u32, u32)> {
    let s = Fixture::new(
        "syncload",
        Shape {
            settings: "synchronous_standby_names = 'fairvault'\nsynchronous_commit = on\n",
            ..Default::default()
        },
    )?;
    s.sql("set synchronous_commit = local; create table t (x int)")?;
    s.backup()?;
    let receiver = Receiver::start(&s, &["--synchronous"])?;
    let sync = "select string_agg(sync_state, ',') from pg_stat_replication";
    s.server.wait_for(&s.scratch, sync, "sync")?;
    s.scratch.write("commit.sql", b"insert into t values (1);\n")?;
    let load = s
        .server
        .pgbench(&s.scratch, &["-n", "-f", &s.path("commit.sql"), "-c", "8", "-T", "60"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    std::thread::sleep(Duration::from_millis(1500 + u64::from(number * 7919 % 2500)));
    let dies_too = number.is_multiple_of(2);
    let receiver = match dies_too {
        true => {
            receiver.kill()?;
            None
        }
        false => Some(receiver),
    };
    let pid = std::fs::read_to_string(s.server.data.join("postmaster.pid"))?;
    run(std::process::Command::new("kill").args(["-9", pid.lines().next().unwrap_or_default()]))?;
    std::fs::rename(&s.server.data, s.scratch.join("lost"))?;
    // Its clients are cut off, and it says what was acknowledged to them before.
    let said = String::from_utf8(load.wait_with_output()?.stdout)?;
    let line = said
        .lines()
        .find_map(|line| line.strip_prefix("number of transactions actually processed: "));
    let acknowledged = line
        .and_then(|line| line.split('/').next())
        .with_context(|| said.clone())?;
    if let Some(receiver) = receiver {
        receiver.kill()?;
    }
    Ok((acknowledged.parse()?, restored(&s, "r")?.parse()?))
}

#[test]
fn what_was_acknowledged_under_load_outlives_server_and_receiver() -> Result<()> {
    for number in 0..if tools::is_full() { 20 } else { 2 } {
        let (acknowledged, there) = killed_under_load(number)?;
        println!("round {number}: {acknowledged} acknowledged, {there} there");
        ensure!(acknowledged > 0, "round {number}: there was no load");
        ensure!(there >= acknowledged, "round {number}: {there} of {acknowledged}");
    }
    Ok(())
}

#[test]
fn a_restore_waits_for_what_a_receiver_has_acknowledged() -> Result<()> {
    let s = Fixture::new(
        "syncjournal",
        Shape {
            settings: "synchronous_standby_names = 'fairvault'\nsynchronous_commit = on\n",
            more: "wal = { flush_interval = \"3s\" }",
            ..Default::default()
        },
    )?;
    s.sql("set synchronous_commit = local; create table t (x int)")?;
    s.backup()?;
    let receiver = Receiver::start(&s, &["--synchronous"])?;
    let commit = || s.sql("insert into t values (1)");
    for _ in 0..7 {
        commit()?;
    }
    s.server.stop(&s.scratch, "immediate")?;
    std::fs::rename(&s.server.data, s.scratch.join("lost"))?;
    // What was acknowledged is in the repository's journals; the receiver lives, and stores it after a while.
    ensure!(restored(&s, "alive")? == "7");
    receiver.kill()?;
    // A journal that nobody has stored, in a repository that cannot be written.
    let journals = s.scratch.join("vault/acme/journals");
    let left = fairvault_tests::fixture::files(&journals);
    ensure!(
        left.iter().any(|f| f.extension().is_some_and(|e| e == "wal")),
        "{left:?}"
    );
    let pieces = s.scratch.join("vault/acme/wal");
    std::fs::rename(&pieces, s.scratch.join("hidden"))?;
    s.scratch.write("vault/acme/wal", b"")?;
    let (exit, text) = s.restore("refused", &[]);
    ensure!(
        exit != 0 && text.contains("storing acknowledged WAL from"),
        "{exit} {text}"
    );
    std::fs::remove_file(&pieces)?;
    std::fs::rename(s.scratch.join("hidden"), &pieces)?;
    ensure!(restored(&s, "dead")? == "7");
    let left = fairvault_tests::fixture::files(&journals);
    ensure!(
        !left.iter().any(|f| f.extension().is_some_and(|e| e == "wal")),
        "{left:?}"
    );
    Ok(())
}

#[test]
fn journals_of_a_host_that_has_another_name_now_are_stored() -> Result<()> {
    let s = Fixture::new(
        "syncmoved",
        Shape {
            settings: "synchronous_standby_names = 'fairvault'\nsynchronous_commit = on\n",
            more: "wal = { flush_interval = \"60s\" }",
            ..Default::default()
        },
    )?;
    s.sql("set synchronous_commit = local; create table t (x int)")?;
    s.backup()?;
    let receiver = Receiver::start(&s, &["--synchronous"])?;
    for _ in 0..7 {
        s.sql("insert into t values (1)")?;
    }
    receiver.kill()?;
    let journals = s.scratch.join("vault/acme/journals");
    let own = std::fs::read_dir(&journals)?.next().context("a folder")??.path();
    std::fs::rename(&own, journals.join("another-name"))?;
    // The server has forgotten what was acknowledged.
    let receiver = Receiver::start(&s, &["--synchronous"])?;
    s.sql("insert into t values (1)")?;
    receiver.kill()?;
    let left = fairvault_tests::fixture::files(&journals.join("another-name"));
    ensure!(
        !left.iter().any(|f| f.extension().is_some_and(|e| e == "wal")),
        "{left:?}"
    );
    s.server.stop(&s.scratch, "immediate")?;
    ensure!(restored(&s, "r")? == "8");
    Ok(())
}

#[test]
fn journals_behind_what_the_repository_has_hold_up_nobody() -> Result<()> {
    let s = Fixture::new(
        "syncbehind",
        Shape {
            settings: "synchronous_standby_names = 'fairvault'\nsynchronous_commit = on\n",
            more: "wal = { flush_interval = \"200ms\" }",
            ..Default::default()
        },
    )?;
    s.sql("set synchronous_commit = local; create table t (x int)")?;
    s.backup()?;
    let commits = |count: usize| (0..count).try_for_each(|_| s.sql("insert into t values (1)").map(drop));
    let journals = s.scratch.join("vault/acme/journals");
    let receiver = Receiver::start(&s, &["--synchronous"])?;
    commits(5)?;
    let own = std::fs::read_dir(&journals)?.next().context("a folder")??.path();
    run(s.scratch.command("cp").arg("-a").arg(&own).arg(s.path("early")))?;
    commits(5)?;
    // A polite stop, in the middle of a segment: its journal stays.
    receiver.stop()?;
    // Pieces that reach further than a journal.
    run(s
        .scratch
        .command("mv")
        .arg(s.path("early"))
        .arg(journals.join("another-name")))?;
    ensure!(restored(&s, "r1")? == "10");
    // The whole segment.
    let receiver = Receiver::start(&s, &["--synchronous"])?;
    commits(1)?;
    receiver.stop()?;
    s.sql("set synchronous_commit = local; insert into t values (1)")?;
    s.backup_id(&["--wal", "stream"])?;
    ensure!(restored(&s, "r2")? == "12");
    // One that ends where a segment does.
    let receiver = Receiver::start(&s, &["--synchronous"])?;
    commits(1)?;
    s.sql("select pg_switch_wal()")?;
    receiver.kill()?;
    ensure!(restored(&s, "r3")? == "13");
    let left = fairvault_tests::fixture::files(&journals);
    ensure!(
        !left.iter().any(|f| f.extension().is_some_and(|e| e == "wal")),
        "{left:?}"
    );
    Ok(())
}

#[test]
fn a_repository_that_comes_and_goes_stops_no_receiver() -> Result<()> {
    let s = Fixture::new(
        "synccomes",
        Shape {
            settings: "synchronous_standby_names = 'fairvault'\nsynchronous_commit = on\n",
            more: "wal = { flush_interval = \"100ms\" }",
            ..SMALL
        },
    )?;
    s.sql("set synchronous_commit = local; create table t (x int)")?;
    s.backup()?;
    let receiver = Receiver::start(&s, &["--synchronous"])?;
    std::thread::scope(|scope| {
        let commits = scope.spawn(|| {
            let insert = "insert into t select generate_series(1, 1000)";
            (0..60).try_for_each(|_| s.sql(insert).map(drop))
        });
        for n in 0..25 {
            let (vault, hidden) = (s.path("vault"), s.path("hidden"));
            std::thread::sleep(Duration::from_millis(37 * (n % 7)));
            std::fs::rename(&vault, &hidden)?;
            std::thread::sleep(Duration::from_millis(61 * (n % 5)));
            // What a write that was on its way has made in its place is not believed.
            while std::fs::rename(&hidden, &vault).is_err() {
                std::fs::remove_dir_all(&vault)?;
            }
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while !commits.is_finished() {
            if Instant::now() > deadline {
                // Whoever waits for the receiver is let go.
                s.server.stop(&s.scratch, "immediate")?;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        commits.join().unwrap()
    })
    .with_context(|| receiver.text())?;
    receiver.kill()?;
    s.server.stop(&s.scratch, "immediate")?;
    ensure!(restored(&s, "r")? == "60000");
    Ok(())
}

fn restored(s: &Fixture, name: &str) -> Result<String> {
    let (exit, text) = s.restore(name, &[]);
    ensure!(exit == 0, "{text}");
    s.configure(name, "synchronous_standby_names = ''\n")?;
    let server = s.start(name, 5450)?;
    let rows = s.rows(&server)?;
    server.stop(&s.scratch, "immediate")?;
    Ok(rows)
}

/// A backup streams WAL beside a receiver, and by another name: no commit counts by it.
#[test]
fn a_backup_is_no_synchronous_standby() -> Result<()> {
    let s = Fixture::new(
        "syncbackup",
        Shape {
            settings: "synchronous_standby_names = '2 (fairvault)'\n",
            ..SMALL
        },
    )?;
    s.sql("set synchronous_commit = local; create table t as select repeat(md5(i::text), 30) from generate_series(1, 60000) i")?;
    let receiver = Receiver::start(&s, &["--synchronous"])?;
    let mut backup = s.command(&["backup", "acme", "--fast", "--progress", "none", "--max-rate", "20MiB"]);
    let mut backup = backup.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let names = "select string_agg(application_name, ' ' order by application_name) from pg_stat_replication \
                 where state = 'streaming'";
    s.server.wait_for(&s.scratch, names, "fairvault fairvault_backup")?;
    // Of two that are asked for, there is one: a commit waits, however much WAL the backup has stored.
    s.scratch.write("commit.sql", b"insert into t values (1);\n")?;
    let script = s.path("commit.sql");
    let mut commit = s.server.pgbench(&s.scratch, &["-n", "-t", "1", "-f", &script]);
    let mut commit = commit.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let waits = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
    s.server.wait_for(&s.scratch, waits, "1")?;
    for _ in 0..3 {
        s.sql("set synchronous_commit = local; insert into t select repeat(md5(i::text), 30) from generate_series(1, 1500) i")?;
    }
    ensure!(backup.wait()?.success());
    ensure!(commit.try_wait()?.is_none(), "a commit was acknowledged by a backup");
    s.sql("alter system set synchronous_standby_names = 'fairvault'")?;
    s.sql("select pg_reload_conf()")?;
    ensure!(commit.wait()?.success());
    receiver.stop()?;
    Ok(())
}
