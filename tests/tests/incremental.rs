//! Backups that are built on others: what they read, when they read everything, and that they hold what they must.

use std::io::Write;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{SMALL, field, files, number, refused};
use fairvault_tests::{Fixture, Shape, code, run, tools};

/// What SQL says of a restored copy of a backup, or of the newest.
fn restored(s: &Fixture, name: &str, more: &[&str], sql: &str) -> Result<String> {
    let (exit, text) = s.restore(name, more);
    ensure!(exit == 0, "{text}");
    let copy = s.start(name, 5450)?;
    let said = copy.sql(&s.scratch, sql)?;
    copy.stop(&s.scratch, "immediate")?;
    Ok(said)
}

const SUM: &str = "select count(*), sum(n) from t";

#[test]
fn only_what_changed_is_read_and_every_backup_is_complete() -> Result<()> {
    let s = Fixture::new(
        "incr",
        Shape {
            archiving: true,
            ..Default::default()
        },
    )?;
    s.sql("create table t (id int primary key, n int, x text) with (fillfactor = 80)")?;
    s.sql("insert into t select i, 0, md5(i::text) || md5((i * 3)::text) from generate_series(1, 400000) i")?;
    s.sql("vacuum analyze")?;
    let full = s.backup_json(&[])?;
    ensure!(field(&full, "type")? == "full", "the first one: {full}");
    let cluster = number(&full, "plain_bytes")?;
    let mut ids = vec![(field(&full, "id")?, "400000|0".to_owned())];
    for (round, source) in ["local", "sql", "stream", "local"].iter().enumerate() {
        let step = 997 + round;
        s.sql(&format!("update t set n = n + 1 where id % {step} = 0"))?;
        let now = s.sql(SUM)?;
        let incr = s.backup_json(&["--source", source])?;
        ensure!(
            field(&incr, "type")? == "incr" && field(&incr, "parent")? == ids[round].0,
            "{incr}"
        );
        ensure!(number(&incr, "new_stored_bytes")? < 3 << 20, "{incr}");
        ensure!(
            *source == "stream" || number(&incr, "read_bytes")? < cluster / 2,
            "{incr}"
        );
        ids.push((field(&incr, "id")?, now));
    }
    let diff = s.backup_json(&["--type", "diff"])?;
    ensure!(field(&diff, "parent")? == ids[0].0, "{diff}");
    let unchanged = s.backup_json(&["--source", "local"])?;
    ensure!(number(&unchanged, "new_stored_bytes")? < 300 << 10, "{unchanged}");
    // Each one by itself, whatever became of the others' order.
    for (number, (id, sum)) in ids.iter().enumerate() {
        let there = restored(
            &s,
            &format!("r{number}"),
            &["--backup", id, "--target", "immediate"],
            SUM,
        )?;
        ensure!(there == *sum, "backup {id} holds {there}, and should {sum}");
    }
    let text = s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    ensure!(text.contains("all good"), "{text}");
    Ok(())
}

/// A server that archives, and backups, with a deliberate bug.
struct Faulty(Fixture, &'static str);

impl Faulty {
    fn new(fault: &'static str) -> Result<Self> {
        let s = Fixture::new(
            "incrfault",
            Shape {
                archiving: true,
                ..Default::default()
            },
        )?;
        let push = format!("{} {} wal push acme %p", s.path("fairvault"), s.options.join(" "));
        s.sql(&format!(
            "alter system set archive_command = 'env \"FAIRVAULT_FAULT={fault}\" {push}'"
        ))?;
        s.sql("select pg_reload_conf()")?;
        Ok(Self(s, fault))
    }

    fn run(&self, more: &[&str]) -> (i32, String) {
        let mut command = self.0.scratch.command("env");
        command
            .arg(format!("HOME={}", self.0.path("")))
            .arg(format!("FAIRVAULT_FAULT={}", self.1))
            .arg(self.0.path("fairvault"))
            .args(&self.0.options)
            .args(["backup", "acme", "--fast", "--progress", "none"])
            .args(more);
        code(&mut command)
    }

    fn backup(&self) -> Result<String> {
        let (exit, text) = self.run(&["--output", "json"]);
        ensure!(exit == 0, "{exit} {text}");
        Ok(text)
    }
}

/// A transaction cuts its own new table, whose first rows a backup has seen, and its file grows without any WAL, as by
/// a crash after it was extended. Returns how many rows the next backup brings back: there is one.
fn cut_and_grown(fault: &'static str) -> Result<String> {
    let faulty = Faulty::new(fault)?;
    let s = &faulty.0;
    let mut psql = s.scratch.command(tools::bin(15).join("psql"));
    psql.args(["-X", "-q", "-U", "postgres", "-p", "5432", "-h"])
        .arg(s.scratch.path());
    let mut session = psql.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    let mut says = session.stdin.take().context("a pipe")?;
    writeln!(
        says,
        "begin; create table t (n int, x text); insert into t select 1, repeat('x', 1000) from generate_series(1, 7000); \
         select pg_advisory_lock(1);"
    )?;
    let is_there = "select count(*) from pg_locks where locktype = 'advisory' and granted";
    s.server.wait_for(&s.scratch, is_there, "1")?;
    faulty.backup()?;
    writeln!(says, "truncate t; insert into t values (1, 'the only one'); commit;")?;
    drop(says);
    session.wait()?;
    s.sql("checkpoint")?;
    let path = s.server.data.join(s.sql("select pg_relation_filepath('t')")?);
    s.server.stop(&s.scratch, "fast")?;
    ensure!(path.metadata()?.len() == 8192, "{} bytes", path.metadata()?.len());
    std::fs::File::options().write(true).open(&path)?.set_len(600 * 8192)?;
    s.server.start(&s.scratch)?;
    let text = faulty.backup()?;
    ensure!(!field(&text, "parent")?.is_empty(), "{text}");
    restored(s, "r", &[], "select count(*) from t")
}

#[test]
fn what_was_cut_and_grew_without_wal_is_read_again() -> Result<()> {
    ensure!(cut_and_grown("")? == "1");
    // A tracker that misses it brings back what was cut: this test would see it.
    ensure!(cut_and_grown("no limits")? != "1", "the deliberate bug does no harm");
    Ok(())
}

/// A database is made anew under its old number, by copying files of which no WAL says what is in them. Returns what
/// the next backup says is in them: 2.
fn copied_anew(fault: &'static str) -> Result<String> {
    let faulty = Faulty::new(fault)?;
    let s = &faulty.0;
    s.sql("create database form")?;
    let in_form = |sql: &str| s.server.sql_in(&s.scratch, "form", sql);
    in_form("create table t as select 1 as n")?;
    let copy = "create database d oid = 50000 template form strategy file_copy";
    s.sql(copy)?;
    faulty.backup()?;
    in_form("update t set n = 2")?;
    s.sql("drop database d")?;
    s.sql(copy)?;
    let text = faulty.backup()?;
    ensure!(!field(&text, "parent")?.is_empty(), "{text}");
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    let copy = s.start("r", 5450)?;
    copy.sql_in(&s.scratch, "d", "select n from t")
}

#[test]
fn a_database_that_was_copied_is_read_again() -> Result<()> {
    ensure!(copied_anew("")? == "2");
    let with_bug = copied_anew("no databases");
    ensure!(!with_bug.is_ok_and(|n| n == "2"), "the deliberate bug does no harm");
    Ok(())
}

/// What changed last lies in the last segment before the one in which a backup begins.
#[test]
fn what_changed_last_before_a_backup_is_in_it() -> Result<()> {
    for fault in ["", "a segment early"] {
        let faulty = Faulty::new(fault)?;
        let s = &faulty.0;
        s.sql("create table t (id int primary key, n int) with (fillfactor = 50, autovacuum_enabled = off)")?;
        s.sql("insert into t select i, 0 from generate_series(1, 20000) i")?;
        faulty.backup()?;
        for (id, source) in [(100, "stream"), (10_000, "local")] {
            // No record leads into the segment of the change, and all before it is archived.
            s.flush_archive(&s.server)?;
            s.sql(&format!("update t set n = 1 where id = {id}"))?;
            let (exit, text) = faulty.run(&["--source", source, "--type", "incr"]);
            match (fault, source) {
                ("", _) | (_, "local") => ensure!(exit == 0, "{fault} {source}: {exit} {text}"),
                // Over the network, every page is looked at.
                _ => ensure!(exit == 4 && text.contains("ALARM: block"), "{exit} {text}"),
            }
        }
        let sum = restored(s, "r", &[], "select sum(n) from t");
        match fault {
            "" => ensure!(sum? == "2"),
            _ => ensure!(!sum.is_ok_and(|sum| sum == "2"), "the deliberate bug does no harm"),
        }
    }
    Ok(())
}

#[test]
fn an_audit_finds_what_tracking_missed() -> Result<()> {
    for fault in ["", "no btree"] {
        let faulty = Faulty::new(fault)?;
        let s = &faulty.0;
        let (exit, text) = faulty.run(&["--audit"]);
        ensure!(exit == 2 && text.contains("nothing to audit"), "{exit} {text}");
        s.sql("create table t (n int primary key, x text)")?;
        s.sql("insert into t select i, 'x' from generate_series(1, 50000) i")?;
        faulty.backup()?;
        // Hints are set without WAL, and are no difference.
        s.sql("select count(*) from t")?;
        s.sql(
            "insert into t select i, 'y' from generate_series(50001, 60000) i; update t set x = 'z' where n % 50 = 0",
        )?;
        let (exit, text) = faulty.run(&["--audit", "--source", "sql"]);
        match fault {
            "" => ensure!(exit == 0 && text.contains("auditing"), "{exit} {text}"),
            _ => ensure!(exit == 4 && text.contains("missed: block"), "{exit} {text}"),
        }
        // Either way, it is right.
        ensure!(restored(s, "r", &[], "select count(*) from t")? == "60000");
    }
    Ok(())
}

/// A page that is newer than the map says is an alarm: nothing is committed, and it is not taken for less.
#[test]
fn a_page_that_is_newer_than_its_map_stops_the_backup() -> Result<()> {
    let faulty = Faulty::new("no btree")?;
    let s = &faulty.0;
    s.sql("create table t (n int primary key, x text)")?;
    s.sql("insert into t select i, 'x' from generate_series(1, 50000) i")?;
    faulty.backup()?;
    s.sql("insert into t select i, 'y' from generate_series(50001, 60000) i")?;
    let before = (
        s.objects("roots"),
        s.ok(&["info", "acme", "--output", "json"])?
            .matches("\"parent\"")
            .count(),
    );
    // Over the network, everything is sent, and so everything is looked at.
    let (exit, text) = faulty.run(&["--source", "stream"]);
    ensure!(
        exit == 4 && text.contains("ALARM: block") && text.contains("--type full"),
        "{exit} {text}"
    );
    let after = (
        s.objects("roots"),
        s.ok(&["info", "acme", "--output", "json"])?
            .matches("\"parent\"")
            .count(),
    );
    ensure!(before == after, "it was committed all the same");
    // What the alarm asks for works, and is right.
    let (exit, text) = faulty.run(&["--source", "stream", "--type", "full"]);
    ensure!(exit == 0, "{exit} {text}");
    ensure!(restored(s, "r", &[], "select count(*) from t")? == "60000");
    Ok(())
}

#[test]
fn what_changes_during_an_audit_is_not_missed() -> Result<()> {
    let shape = Shape {
        archiving: true,
        ..Default::default()
    };
    let s = Fixture::new("busyaudit", shape)?;
    s.sql("create table t (n int, x text) with (fillfactor = 50)")?;
    s.sql("insert into t select i, md5(i::text) from generate_series(1, 600000) i")?;
    s.sql("create table gone as select * from t")?;
    s.sql("vacuum analyze")?;
    s.backup_json(&[])?;
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let audited = std::thread::scope(|scope| {
        let load = scope.spawn(|| -> Result<()> {
            let mut round = 0;
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                // Every page of the table, on the disk too; and a table that shrinks and vanishes.
                s.sql(&format!("update t set n = n + 1 where n % 40 = {}", round % 40))?;
                s.sql("delete from gone where n > 300000")?;
                s.sql("vacuum gone")?;
                s.sql("checkpoint")?;
                round += 1;
            }
            s.sql("drop table gone").map(|_| ())
        });
        let audited = s.backup_json(&["--audit", "--source", "sql", "--workers", "1"]);
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        load.join()
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the load panicked")))?;
        audited
    })?;
    ensure!(audited.contains("\"missed_blocks\":[]"), "{audited}");
    Ok(())
}

#[test]
fn everything_is_read_after_a_promotion_and_where_wal_is_missing() -> Result<()> {
    let s = Fixture::new(
        "incrall",
        Shape {
            archiving: true,
            ..SMALL
        },
    )?;
    s.sql("create table t (n int, x text); insert into t select i, md5(i::text) from generate_series(1, 30000) i")?;
    s.backup_json(&[])?;
    s.sql("update t set n = n + 1 where n % 100 = 0")?;
    s.flush_archive(&s.server)?;
    s.flush_archive(&s.server)?;
    // WAL in between is gone, and the server does not have it any more either.
    let mut segments = s.objects("wal");
    segments.retain(|path| path.extension().is_some_and(|e| e == "0001") && !path.to_string_lossy().contains("backup"));
    let victim = &segments[segments.len() - 2];
    std::fs::rename(victim, s.scratch.join("victim"))?;
    s.sql("checkpoint")?;
    let text = s.backup_json(&["--type", "incr"])?;
    let why = field(&text, "no_parent_reason")?;
    ensure!(
        field(&text, "parent")?.is_empty() && why.contains("is not known"),
        "{text}"
    );
    std::fs::rename(s.scratch.join("victim"), victim)?;
    ensure!(!field(&s.backup_json(&[])?, "parent")?.is_empty());
    // A copy goes on on a timeline of its own.
    let (exit, text) = s.restore("r", &["--archiving", "keep"]);
    ensure!(exit == 0, "{text}");
    s.server.stop(&s.scratch, "fast")?;
    let copy = s.start("r", 5432)?;
    copy.sql(&s.scratch, "insert into t select 1, 'new' from generate_series(1, 100)")?;
    let text = s.backup_json(&["--type", "incr"])?;
    let why = field(&text, "no_parent_reason")?;
    ensure!(why.contains("timeline"), "{text}");
    let text = s.backup_json(&["--type", "incr"])?;
    ensure!(!field(&text, "parent")?.is_empty(), "the one after: {text}");
    copy.stop(&s.scratch, "fast")?;
    let rows = restored(&s, "again", &[], "select count(*) from t")?;
    ensure!(rows == "30100", "{rows}");
    Ok(())
}

#[test]
fn primary_and_standby_take_turns_and_one_that_lags_reads_everything() -> Result<()> {
    let s = Fixture::new(
        "incrstandby",
        Shape {
            archiving: true,
            ..Default::default()
        },
    )?;
    s.sql("create table t (n int, x text); insert into t select i, md5(i::text) from generate_series(1, 50000) i")?;
    s.backup_json(&[])?;
    s.flush_archive(&s.server)?;
    let standby = s.standby("standby", 5460, &[], "")?;
    let conninfo = standby.conninfo();
    let catch_up = || -> Result<()> {
        let at = s.sql("select pg_current_wal_lsn()")?;
        standby.wait_for(&s.scratch, &format!("select pg_last_wal_replay_lsn() >= '{at}'"), "t")?;
        standby.sql(&s.scratch, "checkpoint").map(drop)
    };
    for (round, source) in ["local", "stream", "sql", "local"].iter().enumerate() {
        s.sql(&format!(
            "update t set n = n + 1 where n % {} = 0; checkpoint",
            50 + round
        ))?;
        catch_up()?;
        let sum = s.sql(SUM)?;
        let text = match round % 2 {
            0 => s.backup_json(&["--conninfo", &conninfo, "--source", source])?,
            _ => s.backup_json(&["--source", source])?,
        };
        ensure!(!field(&text, "parent")?.is_empty(), "{text}");
        let id = field(&text, "id")?;
        let there = restored(
            &s,
            &format!("r{round}"),
            &["--backup", &id, "--target", "immediate"],
            SUM,
        )?;
        ensure!(there == sum, "{id}: {there} and not {sum}");
    }
    // What the primary's backup has seen is the standby's future.
    catch_up()?;
    standby.sql(&s.scratch, "select pg_wal_replay_pause()")?;
    standby.wait_for(&s.scratch, "select pg_get_wal_replay_pause_state()", "paused")?;
    let paused = standby.sql(&s.scratch, SUM)?;
    s.sql("update t set n = n + 1")?;
    s.backup_json(&[])?;
    let text = s.backup_json(&["--conninfo", &conninfo, "--type", "incr"])?;
    let parent = field(&text, "parent")?;
    let newest = s.ok(&["info", "acme"])?;
    let id = field(&text, "id")?;
    let (before, _) = newest.split_once(&id).context("the backup")?;
    let primarys = before.lines().rev().nth(1).context("the one before")?;
    ensure!(!primarys.contains(&parent) || parent.is_empty(), "{text}\n{newest}");
    let there = restored(&s, "last", &["--backup", &id, "--target", "immediate"], SUM)?;
    ensure!(there == paused, "{there} and not {paused}");
    Ok(())
}

#[test]
fn what_is_lost_in_the_repository_is_read_again() -> Result<()> {
    let s = Fixture::new(
        "incrlost",
        Shape {
            archiving: true,
            ..Default::default()
        },
    )?;
    s.sql("create table t (n int, x text)")?;
    s.sql("insert into t select i, md5(i::text) || md5((i * 7)::text) from generate_series(1, 600000) i")?;
    s.backup_json(&[])?;
    let sum = s.sql(SUM)?;
    // The one with the content; the manifest is in another.
    let mut packs = files(&s.scratch.join("vault/acme/packs"));
    packs.sort_by_key(|path| path.metadata().map_or(0, |meta| meta.len()));
    std::fs::remove_file(packs.last().context("a pack")?)?;
    let text = s.backup_json(&["--type", "incr"])?;
    ensure!(!field(&text, "parent")?.is_empty(), "{text}");
    let id = field(&text, "id")?;
    ensure!(restored(&s, "r", &["--backup", &id, "--target", "immediate"], SUM)? == sum);
    Ok(())
}

#[test]
fn of_many_tables_an_incremental_writes_little() -> Result<()> {
    let s = Fixture::new(
        "incrmany",
        Shape {
            archiving: true,
            settings: "max_locks_per_transaction = 2000\nautovacuum = off\n",
            ..Default::default()
        },
    )?;
    for hundred in 0..50 {
        s.sql(&format!(
            "do $$ begin for i in 1..100 loop execute format('create table t_{hundred}_%s (id int primary key)', i); end loop; end $$"
        ))?;
    }
    s.backup_json(&[])?;
    s.sql("insert into t_1_1 values (1)")?;
    for source in ["local", "sql"] {
        s.sql("create table more (i int); drop table more; insert into t_7_1 values (random() * 1000000)")?;
        // What another source knows of files (times, modes) is another manifest.
        s.backup_json(&["--source", source])?;
        s.sql("create table one_more (i int)")?;
        let text = s.backup_json(&["--source", source])?;
        s.sql("drop table one_more")?;
        ensure!(number(&text, "files")? > 10_000, "{text}");
        ensure!(number(&text, "new_stored_bytes")? < 400 << 10, "{text}");
    }
    run(s
        .command(&["verify", "acme", "--level", "data", "--progress", "none"])
        .stdout(Stdio::null()))
    .map(drop)
}

#[test]
fn a_plain_backup_takes_the_kind_that_is_due() -> Result<()> {
    // Whenever this runs, a differential backup has been due since less than a minute, a full one for a year at most.
    let schedule = "schedule = { full = \"0 0 1 1 *\", diff = \"* * * * *\", timezone = \"UTC\" }";
    let s = Fixture::new(
        "schedule",
        Shape {
            more: schedule,
            ..SMALL
        },
    )?;
    ensure!(field(&s.backup_json(&[])?, "type")? == "full");
    ensure!(field(&s.backup_json(&[])?, "type")? == "diff");
    ensure!(field(&s.backup_json(&["--type", "incr"])?, "type")? == "incr");
    ensure!(field(&s.backup_json(&[])?, "type")? == "diff");
    let config = std::fs::read_to_string(s.path("fairvault.toml"))?.replace("* * * * *", "daily");
    let wrong = s.scratch.write("wrong.toml", config.as_bytes())?.display().to_string();
    let (exit, text) = code(&mut s.scratch.fairvault(&["--config", &wrong, "backup", "acme"]));
    ensure!(
        exit == 2 && text.contains("schedule.diff") && text.contains("0 2 * * SUN"),
        "{exit} {text}"
    );
    Ok(())
}

#[test]
fn nothing_builds_on_a_distrusted_parser_nor_across_a_switch_of_checksums() -> Result<()> {
    let s = Fixture::new(
        "distrust",
        Shape {
            initdb: &["--wal-segsize=1"],
            ..SMALL
        },
    )?;
    s.backup_json(&[])?;
    let incr = s.backup_json(&[])?;
    ensure!(
        field(&incr, "type")? == "incr" && field(&incr, "no_parent_reason")?.is_empty(),
        "{incr}"
    );
    let reason = |text: &str| field(text, "no_parent_reason");
    // There and back: the second time, there are older backups of the state that it is in again.
    for how in ["--enable", "--disable"] {
        s.server.stop(&s.scratch, "fast")?;
        run(s
            .server
            .program(&s.scratch, "pg_checksums")
            .args([how, "-D"])
            .arg(&s.server.data))?;
        s.server.start(&s.scratch)?;
        let switched = s.backup_json(&["--type", "incr"])?;
        ensure!(
            field(&switched, "parent")?.is_empty() && reason(&switched)?.contains("checksums were switched on or off"),
            "{how}: {switched}"
        );
        ensure!(reason(&s.backup_json(&["--type", "incr"])?)?.is_empty(), "{how}");
    }

    let distrust = |parser| s.fairvault(&["stanza", "distrust", "acme", "--parser", parser, "--reason", "a test"]);
    refused(distrust("9"), 2, "parser 9")?;
    let info: serde_json::Value = serde_json::from_str(&s.ok(&["info", "acme", "--output", "json"])?)?;
    ensure!(info.to_string().contains("\"parser_versions\":[2]"), "{info}");
    let (exit, text) = distrust("2");
    ensure!(exit == 0 && text.contains("parser 2 is distrusted"), "{exit} {text}");
    let after = s.backup_json(&["--type", "incr"])?;
    ensure!(reason(&after)?.contains("distrusted"), "{after}");
    ensure!(s.ok(&["audit", "acme"])?.contains("parser 2 are distrusted: a test"));
    Ok(())
}

#[test]
fn of_frames_that_are_hardly_used_the_rest_is_read_again_once() -> Result<()> {
    let s = Fixture::new(
        "incrthin",
        Shape {
            archiving: true,
            ..Default::default()
        },
    )?;
    s.sql("create table t (id int primary key, n int, x text) with (fillfactor = 50, autovacuum_enabled = off)")?;
    s.sql("insert into t select i, 0, md5(i::text) || md5((i * 3)::text) from generate_series(1, 150000) i")?;
    s.sql("vacuum analyze")?;
    s.backup_json(&["--type", "full"])?;
    // Seven pages of eight change: of the frames of the full, an eighth stays in use.
    s.sql("update t set n = 1 where (ctid::text::point)[0]::int % 8 <> 0")?;
    let pages = s.sql("select pg_relation_size('t') / 8192")?;
    let rest = pages.trim().parse::<u64>()? * 8192 / 8;
    let now = s.sql(SUM)?;
    let mut read = Vec::new();
    for _ in 0..3 {
        let incr = s.backup_json(&["--type", "incr", "--source", "local"])?;
        ensure!(field(&incr, "type")? == "incr", "{incr}");
        read.push(number(&incr, "read_bytes")?);
    }
    ensure!(rest > 2 << 20 && read[0] > rest * 6, "{rest} {read:?}");
    let again = read[1] - read[2];
    ensure!(again > rest * 9 / 10 && again < rest * 3 / 2, "{rest} {read:?}");
    ensure!(restored(&s, "copy", &["--target", "immediate"], SUM)? == now);
    let text = s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    ensure!(text.contains("all good"), "{text}");
    Ok(())
}
