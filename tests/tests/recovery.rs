//! What PostgreSQL does with a restored copy: it reaches exactly what was promised, or it stops and says why.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{SMALL, field, refused};
use fairvault_tests::receiver::wait_until_durable;
use fairvault_tests::{Fixture, Receiver, Server, Shape, code, run, tools};

fn set_up(name: &str, settings: &str) -> Result<Fixture> {
    Fixture::new(
        name,
        Shape {
            archiving: true,
            settings,
            ..Default::default()
        },
    )
}

fn restored(s: &Fixture, name: &str, more: &[&str]) -> Result<String> {
    let (exit, text) = s.restore(name, more);
    ensure!(exit == 0, "{name}: {exit} {text}");
    Ok(text)
}

/// Waits until a server has ended by itself, and returns its log.
fn ended(server: &Server) -> Result<String> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while server.is_running() {
        ensure!(Instant::now() < deadline, "it still runs:\n{}", server.log_text());
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(server.log_text())
}

#[test]
fn a_hole_that_opens_after_the_plan_stops_recovery() -> Result<()> {
    let s = set_up("hole", "")?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    let mut segments = Vec::new();
    for i in 1..=3 {
        s.sql(&format!("insert into t values ({i})"))?;
        segments.push(s.flush_archive(&s.server)?);
    }
    restored(&s, "r", &[])?;
    let middle = s
        .objects("wal")
        .into_iter()
        .find(|p| p.display().to_string().contains(&segments[1]))
        .context("the middle segment")?;
    std::fs::remove_file(&middle)?;
    let copy = s.copy("r", 5450);
    // It may accept connections for a moment; then it must end, and never promote.
    let _ = copy.try_start(&s.scratch, true);
    let log = ended(&copy)?;
    ensure!(
        log.contains("is missing") && log.contains("this recovery has to reach"),
        "{log}"
    );
    ensure!(!log.contains("selected new timeline"), "{log}");
    Ok(())
}

#[test]
fn latest_before_a_hole_and_a_time_after_the_last_commit_end_where_the_plan_says() -> Result<()> {
    let s = set_up("until", "")?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    s.sql("insert into t values (1)")?;
    s.flush_archive(&s.server)?;
    let text = restored(&s, "by-time", &["--target-time", "2099-01-01T00:00:00Z"])?;
    ensure!(text.contains("no commit after"), "{text}");
    restored(&s, "by-end", &[])?;
    // The original goes on, and so does its archive: that is after the plan.
    s.sql("insert into t values (2)")?;
    let lost = s.flush_archive(&s.server)?;
    s.sql("insert into t values (3)")?;
    s.flush_archive(&s.server)?;
    let rows = |server: &Server| server.sql(&s.scratch, "select string_agg(x::text, ',') from t");
    let copy = s.start("by-time", 5450)?;
    ensure!(
        rows(&copy)? == "1",
        "a target in time is never overshot: {}",
        rows(&copy)?
    );
    drop(copy);
    let copy = s.start("by-end", 5451)?;
    ensure!(rows(&copy)? == "1,2,3", "the end is the end: {}", rows(&copy)?);
    drop(copy);
    let stored = s.objects("wal");
    let hole = stored.iter().find(|p| p.display().to_string().contains(&lost));
    std::fs::remove_file(hole.context("the segment")?)?;
    let text = restored(&s, "before-hole", &[])?;
    ensure!(text.contains(&lost), "{text}");
    let copy = s.start("before-hole", 5452)?;
    ensure!(rows(&copy)? == "1", "{}", rows(&copy)?);
    Ok(())
}

#[test]
fn recovery_across_wal_level_minimal_is_refused_beforehand() -> Result<()> {
    let s = set_up("minimal", "")?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    let before = s.sql("select pg_current_wal_insert_lsn()")?;
    s.sql("insert into t values (1)")?;
    let newest = s.sql("select (now() at time zone 'UTC')::text")?;
    let conf = s.server.data.join("postgresql.auto.conf");
    s.server.stop(&s.scratch, "fast")?;
    let good = std::fs::read_to_string(&conf)?;
    std::fs::write(
        &conf,
        format!("{good}wal_level = minimal\nmax_wal_senders = 0\narchive_mode = off\n"),
    )?;
    s.server.start(&s.scratch)?;
    let (exit, text) = s.fairvault(&["backup", "acme", "--fast", "--progress", "none"]);
    ensure!(exit != 0 && text.contains("max_wal_senders"), "{exit} {text}");
    s.sql("insert into t values (2)")?;
    s.server.stop(&s.scratch, "fast")?;
    std::fs::write(&conf, good)?;
    s.server.start(&s.scratch)?;
    s.sql("insert into t values (3)")?;
    s.flush_archive(&s.server)?;
    refused(s.restore("r", &[]), 3, "wal_level = minimal")?;
    let windows = |text: &str| text.lines().filter(|line| line.contains("restorable on")).count();
    let info = s.ok(&["info", "acme"])?;
    ensure!(
        windows(&info) == 1 && info.contains("CANNOT BE REPLAYED: wal_level = minimal at"),
        "{info}"
    );
    // Commits of the same segment that come after the break are not in the window.
    let to = field(&s.ok(&["info", "acme", "--output", "json"])?, "to")?;
    let to = to.trim_end_matches('Z').replace('T', " ");
    ensure!(
        to < newest,
        "commits up to {to} are promised, and {newest} was before the break"
    );
    ensure!(!Path::new(&s.path("r")).exists());
    restored(&s, "earlier", &["--target-lsn", &before])?;
    s.start("earlier", 5450)?;
    // From a newer backup on, all is well.
    s.backup()?;
    let info = s.ok(&["info", "acme"])?;
    ensure!(
        windows(&info) == 2 && info.matches("CANNOT BE REPLAYED").count() == 1,
        "{info}"
    );
    restored(&s, "r", &[])?;
    ensure!(s.start("r", 5451)?.sql(&s.scratch, "select count(*) from t")? == "3");
    Ok(())
}

#[test]
fn settings_of_the_original_do_not_disturb_the_copy() -> Result<()> {
    let s = set_up("inherited", "")?;
    let pid_file = s.path("original.pid");
    for setting in [
        "recovery_target_name = 'elsewhere'",
        "recovery_target_action = 'shutdown'",
        "restore_command = 'false'",
        &format!("recovery_end_command = 'touch {}'", s.path("touched")),
        "primary_conninfo = 'host=/nonexistent'",
        "recovery_min_apply_delay = '1h'",
        &format!("external_pid_file = '{pid_file}'"),
    ] {
        s.sql(&format!("alter system set {setting}"))?;
    }
    s.server.stop(&s.scratch, "fast")?;
    s.server.start(&s.scratch)?;
    let original = std::fs::read_to_string(&pid_file)?;
    s.sql("create table t as select 1 as x")?;
    s.backup()?;
    s.sql("insert into t values (2)")?;
    s.sql("select pg_create_restore_point('here')")?;
    s.sql("insert into t values (3)")?;
    s.flush_archive(&s.server)?;
    restored(&s, "r", &["--target-name", "here"])?;
    let copy = s.start("r", 5450)?;
    ensure!(copy.sql(&s.scratch, "select count(*) from t")? == "2");
    ensure!(!Path::new(&s.path("touched")).exists(), "a command of the original ran");
    ensure!(
        std::fs::read_to_string(&pid_file)? == original,
        "the original's pid file"
    );
    Ok(())
}

#[test]
fn a_time_means_what_it_says_to_the_microsecond() -> Result<()> {
    let s = set_up("exact", "track_commit_timestamp = on\n")?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    let xid = s.sql("begin; insert into t values (1); select pg_current_xact_id(); commit")?;
    let xid = xid
        .lines()
        .find(|l| l.parse::<u32>().is_ok())
        .context("xid")?
        .to_owned();
    let time = s.sql(&format!(
        "select to_char(pg_xact_commit_timestamp('{xid}') at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US\"+00\"')"
    ))?;
    s.sql("insert into t values (2)")?;
    s.flush_archive(&s.server)?;
    for (name, port, more, expected) in [
        ("inclusive", 5450, None, "1"),
        ("exclusive", 5451, Some("--target-exclusive"), ""),
    ] {
        let mut all = vec!["--target-time", time.as_str()];
        all.extend(more);
        restored(&s, name, &all)?;
        let copy = s.start(name, port)?;
        let rows = copy.sql(&s.scratch, "select string_agg(x::text, ',') from t")?;
        ensure!(rows == expected, "{name}: {rows:?}, expected {expected:?}");
    }
    Ok(())
}

#[test]
fn positions_that_no_record_reaches_are_refused() -> Result<()> {
    let s = set_up("positions", "")?;
    s.backup()?;
    s.sql("create table t (x int)")?;
    let segment = s.flush_archive(&s.server)?;
    // Behind the record that ended the last archived segment.
    let end = s.sql(&format!(
        "select pg_lsn('0/0') + (('x' || right('{segment}', 8))::bit(32)::bigint + 1) * 16777216 - 64"
    ))?;
    refused(s.restore("r", &["--target-lsn", &end]), 3, "never reached")?;
    Ok(())
}

/// PostgreSQL stops at the first record that begins at the target or later: at the very end there is none yet.
#[test]
fn the_end_of_the_last_record_is_no_target_and_its_beginning_is() -> Result<()> {
    let s = Fixture::new("lastrecord", SMALL)?;
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    s.sql("insert into t values (1)")?;
    let position = || s.sql("select pg_current_wal_insert_lsn()");
    let beginning = position()?;
    s.sql("insert into t values (2)")?;
    let end = position()?;
    wait_until_durable(&s, &s.server)?;
    receiver.stop()?;
    s.server.stop(&s.scratch, "immediate")?;
    refused(s.restore("r", &["--target-lsn", &end]), 3, "never reached")?;
    restored(&s, "r", &["--target-lsn", &beginning])?;
    ensure!(s.rows(&s.start("r", 5450)?)? == "1");
    Ok(())
}

#[test]
fn tablespaces_of_others_are_not_touched_even_by_force() -> Result<()> {
    let s = set_up("foreign", "")?;
    run(s
        .scratch
        .command("mkdir")
        .args([s.path("ts1"), s.path("ts2"), s.path("foreign")]))?;
    s.scratch.write("foreign/precious", b"do not touch")?;
    for name in ["ts1", "ts2"] {
        s.sql(&format!("create tablespace {name} location '{}'", s.path(name)))?;
        s.sql(&format!(
            "create table {name} tablespace {name} as select generate_series(1, 1000) as x"
        ))?;
    }
    s.backup()?;
    let map = |old: &str, new: &str| format!("{}={}", s.path(old), s.path(new));
    let (first, second) = (map("ts1", "r-ts1"), map("ts2", "r-ts2"));
    let good = ["--tablespace-map", &first, "--tablespace-map", &second];
    let foreign = map("ts2", "foreign");
    let same = map("ts2", "r-ts1");
    let nested = map("ts2", "r-ts1/below");
    for more in [&[][..], &["--delta"], &["--force"]] {
        let with = |mapped: &str| {
            let mut all = vec!["--tablespace-map", &first, "--tablespace-map", mapped];
            all.extend(more);
            s.restore("r", &all)
        };
        refused(with(&foreign), 1, "nothing shows that it belongs")?;
        refused(with(&same), 2, "a folder of its own")?;
        refused(with(&nested), 2, "a folder of its own")?;
    }
    ensure!(std::fs::read(s.path("foreign/precious"))? == b"do not touch");
    // Our own are used again, and what else stands beside the version's folder stays.
    restored(&s, "r", &good)?;
    s.scratch.write("r-ts1/beside", b"not ours")?;
    restored(&s, "r", &[&good[..], &["--delta"]].concat())?;
    restored(&s, "r", &[&good[..], &["--force"]].concat())?;
    ensure!(std::fs::read(s.path("r-ts1/beside"))? == b"not ours");
    // Died half-way: the links are gone, and the marker knows whose the folders are.
    for link in std::fs::read_dir(s.path("r/pg_tblspc"))? {
        std::fs::remove_file(link?.path())?;
    }
    std::fs::remove_file(s.path("r/global/pg_control"))?;
    let marker = format!("tablespace {}\ntablespace {}\n", s.path("r-ts1"), s.path("r-ts2"));
    s.scratch.write("r/fairvault.restoring", marker.as_bytes())?;
    restored(&s, "r", &good)?;
    let copy = s.start("r", 5450)?;
    ensure!(
        copy.sql(
            &s.scratch,
            "select (select count(*) from ts1) + (select count(*) from ts2)"
        )? == "2000"
    );
    Ok(())
}

#[test]
fn a_backup_of_a_promoted_copy_carries_its_history_and_no_leftovers() -> Result<()> {
    let s = set_up("promoted", "")?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    s.sql("insert into t values (1)")?;
    s.flush_archive(&s.server)?;
    restored(&s, "copy", &[])?;
    let copy = s.start("copy", 5450)?;
    ensure!(copy.sql(&s.scratch, "select timeline_id from pg_control_checkpoint()")? == "2");
    copy.sql(&s.scratch, "insert into t values (2)")?;
    ensure!(Path::new(&s.path("copy/fairvault.restored")).exists());
    // ALTER SYSTEM writes the file anew, without comments.
    copy.sql(&s.scratch, "alter system set work_mem = '5MB'")?;
    let id = s.backup_id(&["--conninfo", &copy.conninfo()])?;
    let histories = s
        .objects("wal")
        .iter()
        .filter(|p| p.display().to_string().contains(".history"))
        .count();
    ensure!(
        histories == 1,
        "nobody archives there, so the backup brings the history"
    );
    drop(copy);
    restored(&s, "r", &["--backup", &id, "--archiving", "keep"])?;
    ensure!(!Path::new(&s.path("r/fairvault.restored")).exists());
    let conf = std::fs::read_to_string(s.path("r/postgresql.auto.conf"))?;
    ensure!(!conf.contains("archive_mode") && conf.contains("work_mem"), "{conf}");
    ensure!(conf.matches("restore_command").count() == 1, "{conf}");
    let copy = s.start("r", 5451)?;
    ensure!(copy.sql(&s.scratch, "select string_agg(x::text, ',') from t")? == "1,2");
    // Without the history, the plan says so before anything is written.
    drop(copy);
    let stored = s.objects("wal");
    let history = stored.iter().find(|p| p.display().to_string().contains(".history"));
    std::fs::remove_file(history.context("history")?)?;
    let current = ["--backup", &id, "--target-timeline", "current"];
    refused(s.restore("r2", &current), 4, "00000002.history")?;
    let (exit, text) = s.fairvault(&["verify", "acme", "--progress", "none"]);
    ensure!(
        exit == 4 && text.contains("history of its timeline 2 is missing"),
        "{text}"
    );
    // The older backup does not need it.
    let first = s.ok(&["info", "acme", "--output", "json"])?;
    let first = fairvault_tests::fixture::field(&first, "id")?;
    restored(&s, "r3", &["--backup", &first, "--target-timeline", "current"])?;
    Ok(())
}

#[test]
fn what_lies_behind_the_target_does_not_matter() -> Result<()> {
    // Two backups that brought their own WAL, and nothing in between: PostgreSQL reads ahead of what it replays.
    let s = Fixture::new("behind", Shape::default())?;
    s.sql("create table t as select 1 as x")?;
    let first = s.backup_id(&[])?;
    for _ in 0..2 {
        s.sql("insert into t values (2); select pg_switch_wal()")?;
    }
    s.backup_id(&[])?;
    restored(&s, "hole", &["--backup", &first, "--target", "immediate"])?;
    ensure!(s.start("hole", 5450)?.sql(&s.scratch, "select count(*) from t")? == "1");

    // Damage in a later segment.
    let s = set_up("later", "")?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    s.sql("insert into t values (1)")?;
    s.sql("select pg_create_restore_point('good')")?;
    let lsn = s.sql("select pg_current_wal_insert_lsn()")?;
    s.sql("insert into t values (2)")?;
    s.flush_archive(&s.server)?;
    s.sql("insert into t values (3)")?;
    let later = s.flush_archive(&s.server)?;
    s.flush_archive(&s.server)?;
    let stored = s.objects("wal");
    let object = stored.iter().find(|p| p.display().to_string().contains(&later));
    std::fs::write(object.context("the segment")?, b"rubbish")?;
    for (name, port, target) in [
        ("by-lsn", 5451, ["--target-lsn", &lsn]),
        ("by-name", 5452, ["--target-name", "good"]),
    ] {
        restored(&s, name, &target)?;
        let copy = s.start(name, port)?;
        let rows = copy.sql(&s.scratch, "select count(*) from t where x = 1")?;
        ensure!(rows == "1", "{name}: {rows}");
    }
    refused(s.restore("by-end", &[]), 4, &later)?;
    Ok(())
}

#[test]
fn a_standby_follows_what_it_can_and_waits_for_its_target() -> Result<()> {
    let s = set_up("follow", "")?;
    let before = s.sql("select pg_current_wal_insert_lsn()")?;
    s.backup()?;
    s.flush_archive(&s.server)?;
    let conf = |name: &str| std::fs::read_to_string(s.path(&format!("{name}/postgresql.auto.conf")));
    restored(&s, "newest", &["--standby"])?;
    ensure!(
        conf("newest")?.contains("recovery_target_timeline = 'latest'")
            && conf("newest")?.contains("--timeline latest")
    );
    // A time that has not come: it waits there, instead of going on for ever.
    restored(&s, "waiting", &["--standby", "--target-time", "2099-01-01T00:00:00Z"])?;
    ensure!(
        conf("waiting")?.contains("recovery_target_time = '2099-01-01"),
        "{}",
        conf("waiting")?
    );
    // A branch that left before the backup: PostgreSQL's latest would go there, and fail.
    let history = format!("1\t{before}\tno recovery target specified\n");
    let history = s.scratch.write("00000002.history", history.as_bytes())?;
    s.ok(&["wal", "push", "acme", &history.display().to_string()])?;
    let text = restored(&s, "pinned", &["--standby"])?;
    ensure!(text.contains("stays on timeline 1"), "{text}");
    ensure!(conf("pinned")?.contains("recovery_target_timeline = '1'"));
    let follower = s.copy("pinned", 5450);
    follower.start(&s.scratch)?;
    s.sql("create table later (x int)")?;
    s.flush_archive(&s.server)?;
    follower.wait_for(
        &s.scratch,
        "select count(*) from pg_tables where tablename = 'later'",
        "1",
    )?;
    Ok(())
}

/// A running standby outlives a store that is away or damaged, and is never promoted by it.
#[test]
fn a_running_standby_waits_for_a_store_in_doubt() -> Result<()> {
    let s = set_up("doubtful", "")?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    s.flush_archive(&s.server)?;
    restored(&s, "standby", &["--standby"])?;
    let standby = s.copy("standby", 5450);
    standby.start(&s.scratch)?;
    s.sql("insert into t values (1)")?;
    let segment = s.flush_archive(&s.server)?;
    standby.wait_for(&s.scratch, "select count(*) from t", "1")?;
    // Until `wal get` has given up at least once: it tries three times, five seconds apart.
    let goes_on = |what: &str| -> Result<()> {
        let ends = || standby.log_text().matches("fairvault: ").count();
        let (before, deadline) = (ends(), Instant::now() + Duration::from_secs(60));
        while ends() < before + 2 {
            ensure!(standby.is_running(), "{what}: {}", standby.log_text());
            ensure!(Instant::now() < deadline, "{what}: {}", standby.log_text());
            std::thread::sleep(Duration::from_millis(200));
        }
        std::thread::sleep(Duration::from_secs(1));
        ensure!(standby.is_running(), "{what}: {}", standby.log_text());
        ensure!(standby.sql(&s.scratch, "select pg_is_in_recovery()")? == "t", "{what}");
        Ok(())
    };
    std::fs::rename(s.path("vault"), s.path("away"))?;
    goes_on("away")?;
    std::fs::rename(s.path("away"), s.path("vault"))?;
    s.sql("insert into t values (2)")?;
    let next = s.flush_archive(&s.server)?;
    standby.wait_for(&s.scratch, "select count(*) from t", "2")?;
    // What comes next is damaged on its way in: it stops there, or dies; it does not go on without it.
    ensure!(segment < next);
    s.sql("insert into t values (3)")?;
    standby.stop(&s.scratch, "fast")?;
    let name = s.flush_archive(&s.server)?;
    let object = s
        .objects("wal")
        .into_iter()
        .find(|p| p.display().to_string().contains(&name));
    let object = object.context("the segment")?;
    let good = std::fs::read(&object)?;
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    std::fs::write(&object, bad)?;
    standby.try_start(&s.scratch, false)?;
    let before = standby.log_text().matches("fairvault: ").count();
    let deadline = Instant::now() + Duration::from_secs(60);
    while standby.log_text().matches("fairvault: ").count() == before {
        ensure!(Instant::now() < deadline, "{}", standby.log_text());
        std::thread::sleep(Duration::from_millis(200));
    }
    std::thread::sleep(Duration::from_secs(2));
    ensure!(
        !standby.log_text().contains("selected new timeline"),
        "{}",
        standby.log_text()
    );
    if standby.is_running() {
        standby.stop(&s.scratch, "immediate")?;
    }
    std::fs::write(&object, good)?;
    standby.start(&s.scratch)?;
    standby.wait_for(&s.scratch, "select count(*) from t", "3")?;
    ensure!(standby.sql(&s.scratch, "select pg_is_in_recovery()")? == "t");
    Ok(())
}

#[test]
fn a_tablespace_that_is_made_after_the_plan_is_not_replayed_into_the_original() -> Result<()> {
    let s = set_up("after-plan", "")?;
    run(s.scratch.command("mkdir").arg(s.path("ts")))?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    s.flush_archive(&s.server)?;
    restored(&s, "r", &[])?;
    s.sql(&format!("create tablespace ts location '{}'", s.path("ts")))?;
    s.sql("create table l tablespace ts as select generate_series(1, 1000) as x")?;
    s.flush_archive(&s.server)?;
    let copy = s.copy("r", 5450);
    let _ = copy.try_start(&s.scratch, true);
    let log = ended(&copy)?;
    ensure!(log.contains("creates a tablespace"), "{log}");
    ensure!(s.sql("select count(*) from l")? == "1000");
    Ok(())
}

/// What comes after the target is not replayed, in the same segment or not.
#[test]
fn a_tablespace_that_is_made_after_the_target_does_not_matter() -> Result<()> {
    let s = set_up("after-target", "")?;
    run(s.scratch.command("mkdir").arg(s.path("ts")))?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    s.sql("insert into t values (1)")?;
    s.sql("select pg_create_restore_point('before')")?;
    s.sql(&format!("create tablespace ts location '{}'", s.path("ts")))?;
    s.sql("create table l tablespace ts as select generate_series(1, 1000) as x")?;
    s.flush_archive(&s.server)?;
    restored(&s, "r", &["--target-name", "before"])?;
    ensure!(s.rows(&s.start("r", 5450)?)? == "1");
    ensure!(s.sql("select count(*) from l")? == "1000");
    Ok(())
}

/// The same where a receiver has stored the WAL, and the segment is not full.
#[test]
fn a_tablespace_of_which_only_pieces_tell_is_not_replayed_into_the_original() -> Result<()> {
    let s = Fixture::new("after-pieces", Shape::default())?;
    let receiver = Receiver::start(&s, &["--flush-interval", "100ms"])?;
    run(s.scratch.command("mkdir").arg(s.path("ts")))?;
    s.backup()?;
    wait_until_durable(&s, &s.server)?;
    restored(&s, "r", &[])?;
    s.sql(&format!("create tablespace ts location '{}'", s.path("ts")))?;
    s.sql("create table l tablespace ts as select generate_series(1, 1000) as x")?;
    wait_until_durable(&s, &s.server)?;
    receiver.stop()?;
    let copy = s.copy("r", 5450);
    let _ = copy.try_start(&s.scratch, true);
    let log = ended(&copy)?;
    ensure!(log.contains("creates a tablespace"), "{log}");
    ensure!(s.sql("select count(*) from l")? == "1000");
    Ok(())
}

/// A record that crosses into the next segment is seen when that one is asked for, whenever it was archived.
#[test]
fn a_tablespace_record_in_two_segments_is_seen() -> Result<()> {
    const SIZE: u64 = 1 << 20;
    let s = Fixture::new("after-crossing", SMALL)?;
    let created = |name: &str, folder: &str| -> Result<(u64, u64)> {
        run(s.scratch.command("mkdir").arg(s.path(folder)))?;
        let before = position(&s)?;
        s.sql(&format!("create tablespace {name} location '{}'", s.path(folder)))?;
        Ok((before, tablespace_record(&s, before)?))
    };
    // Without page images, the record begins as far behind what was there before, whenever it is.
    let images = |on: &str| -> Result<()> {
        s.sql(&format!("alter system set full_page_writes = {on}"))?;
        s.sql("select pg_reload_conf(), pg_sleep(1)")?;
        Ok(())
    };
    images("off")?;
    let folder = |number: u32| format!("a-folder-with-a-name-that-makes-its-record-long-{number}");
    created("ts0", &folder(0))?;
    s.sql("drop tablespace ts0")?;
    let (before, at) = created("ts1", &folder(1))?;
    s.sql("drop tablespace ts1")?;
    images("on")?;
    s.backup()?;
    restored(&s, "r", &[])?;
    images("off")?;
    for attempt in 2..8 {
        let fill = format!(
            "do $$ begin while {SIZE} - (pg_current_wal_insert_lsn() - '0/0') % {SIZE} not between {} and {} loop \
             perform pg_logical_emit_message(false, '', ''); end loop; end $$",
            at - before + 30,
            at - before + 100,
        );
        s.sql(&fill)?;
        let (_, at) = created(&format!("ts{attempt}"), &folder(attempt))?;
        // Whatever else was written at that moment has moved it.
        if SIZE - at % SIZE > 100 {
            continue;
        }
        s.sql("select pg_switch_wal()")?;
        let name = |number: u64| format!("0000000100000000{number:08X}");
        let file = |number| s.path(&format!("data5432/pg_wal/{}", name(number)));
        let number = at / SIZE;
        let settings = std::fs::read_to_string(s.scratch.join("r/postgresql.auto.conf"))?;
        let line = settings.lines().rfind(|line| line.starts_with("restore_command = '"));
        let line = line.context("restore_command")?;
        let command = line["restore_command = '".len()..]
            .trim_end_matches('\'')
            .replace("''", "'");
        let get = |number| {
            let command = command.replace("%f", &name(number)).replace("%p", "got");
            code(s.scratch.command("sh").current_dir(s.path("r")).args(["-c", &command]))
        };
        for n in number.saturating_sub(9)..=number {
            let _ = s.fairvault(&["wal", "push", "acme", &file(n)]);
        }
        let (exit, text) = get(number);
        ensure!(exit == 0, "{exit} {text}");
        s.ok(&["wal", "push", "acme", &file(number + 1)])?;
        let (exit, text) = get(number + 1);
        ensure!(exit == 200 && text.contains("creates a tablespace"), "{exit} {text}");
        return Ok(());
    }
    anyhow::bail!("no record lies across two segments")
}

/// Where the server's WAL is.
fn position(s: &Fixture) -> Result<u64> {
    Ok(s.sql("select pg_current_wal_insert_lsn() - '0/0'")?.parse()?)
}

/// Where the first record from `from` on begins that creates a tablespace.
fn tablespace_record(s: &Fixture, from: u64) -> Result<u64> {
    let mut waldump = s.scratch.command(tools::bin(15).join("pg_waldump"));
    let start = format!("{:X}/{:X}", from >> 32, from & 0xFFFF_FFFF);
    let wal = s.path("data5432/pg_wal");
    let (_, text) = code(waldump.args(["-p", &wal, "-r", "Tablespace", "-s", &start]));
    let line = text
        .lines()
        .find(|line| line.contains("CREATE"))
        .with_context(|| text.clone())?;
    let at = line
        .split("lsn: ")
        .nth(1)
        .and_then(|rest| rest.split(',').next())
        .context("lsn")?;
    let (high, low) = at.split_once('/').context("lsn")?;
    Ok(u64::from_str_radix(high, 16)? << 32 | u64::from_str_radix(low, 16)?)
}
