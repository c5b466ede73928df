//! Restores that must be refused, repeated, mapped or followed across timelines.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{field, files, refused};
use fairvault_tests::{Fixture, Server, Shape, run};

fn set_up(name: &str, archiving: bool) -> Result<Fixture> {
    Fixture::new(
        name,
        Shape {
            archiving,
            ..Default::default()
        },
    )
}

#[test]
fn directories_that_are_not_ours_are_left_alone() -> Result<()> {
    let s = set_up("dirs", false)?;
    s.sql("create table t as select generate_series(1, 1000) as x")?;
    s.backup()?;
    run(s.scratch.command("mkdir").arg(s.path("busy")))?;
    s.scratch.write("busy/precious", b"do not touch")?;
    refused(s.restore("busy", &[]), 1, "not empty")?;
    refused(s.restore("busy", &["--force"]), 1, "PG_VERSION")?;
    refused(s.restore("busy", &["--delta"]), 1, "PG_VERSION")?;
    ensure!(std::fs::read(s.path("busy/precious"))? == b"do not touch");
    refused(s.restore("data5432", &["--force"]), 1, "runs on")?;

    let (exit, plan) = s.restore("new", &["--dry-run"]);
    ensure!(
        exit == 0 && plan.contains("WAL       complete") && !Path::new(&s.path("new")).exists(),
        "{plan}"
    );
    ensure!(s.restore("new", &[]).0 == 0);
    let copy = s.start("new", 5450)?;
    copy.stop(&s.scratch, "fast")?;

    // Delta puts back what was changed, removes what came later, and keeps the rest.
    std::fs::write(s.path("new/base/stranger"), b"x")?;
    run(s
        .scratch
        .command("mkdir")
        .args(["-p", &s.path("new/base/strange/folder")]))?;
    s.scratch.write("new/base/strange/folder/file", b"x")?;
    let victim = format!("new/{}", s.sql("select pg_relation_filepath('t')")?);
    let before = std::fs::read(s.path(&victim))?;
    std::fs::write(s.path(&victim), b"garbage")?;
    let (exit, text) = s.restore("new", &["--delta", "--output", "json"]);
    ensure!(exit == 0 && !text.contains("\"kept_files\":0"), "{text}");
    ensure!(!Path::new(&s.path("new/base/stranger")).exists());
    ensure!(!Path::new(&s.path("new/base/strange")).exists());
    ensure!(std::fs::read(s.path(&victim))?.len() == before.len());
    let copy = s.start("new", 5450)?;
    ensure!(copy.sql(&s.scratch, "select count(*) from t")? == "1000");
    copy.stop(&s.scratch, "fast")?;

    // What a killed restore leaves never starts, is recognised, and can be run again.
    std::fs::remove_file(s.path("new/global/pg_control"))?;
    s.scratch.write("new/fairvault.restoring", b"")?;
    let dead = Server::existing(&s.scratch, 15, s.path("new"), 5451);
    ensure!(dead.start(&s.scratch).is_err());
    let (exit, text) = s.restore("new", &[]);
    ensure!(exit == 0, "{text}");
    s.start("new", 5450)?.stop(&s.scratch, "fast")?;
    ensure!(s.restore("new", &["--force"]).0 == 0);
    s.start("new", 5450)?;
    Ok(())
}

#[test]
fn delta_rewrites_what_differs_and_nothing_else() -> Result<()> {
    use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
    let s = set_up("delta", false)?;
    for name in ["longer", "shorter", "changed", "missing", "linked", "mode"] {
        s.sql(&format!(
            "create table {name} as select i, md5(i::text) as t from generate_series(1, 60000) i"
        ))?;
    }
    s.sql("checkpoint")?;
    // One chunk that two files have: only one of them will be damaged.
    let twin = pages(70);
    for name in ["data5432/twin1", "data5432/twin2"] {
        s.scratch.write(name, &twin)?;
    }
    s.backup()?;
    for name in ["good", "bad"] {
        let (exit, text) = s.restore(name, &[]);
        ensure!(exit == 0, "{text}");
    }
    let path = |name: &str| -> Result<std::path::PathBuf> {
        let file = s.sql(&format!("select pg_relation_filepath('{name}')"))?;
        Ok(s.scratch.join("bad").join(file))
    };
    let open = |name: &str| -> Result<std::fs::File> {
        Ok(std::fs::File::options().read(true).write(true).open(path(name)?)?)
    };
    let longer = open("longer")?;
    let len = longer.metadata()?.len();
    longer.write_all_at(&[7; 100_000], len)?;
    open("shorter")?.set_len(len / 2)?;
    open("changed")?.write_all_at(b"changed", len / 2)?;
    std::fs::remove_file(path("missing")?)?;
    let precious = s.scratch.write("precious", b"do not touch")?;
    std::fs::remove_file(path("linked")?)?;
    symlink(&precious, path("linked")?)?;
    std::fs::set_permissions(path("mode")?, std::fs::Permissions::from_mode(0o644))?;
    let twin = std::fs::File::options().write(true).open(s.path("bad/twin2"))?;
    // Pages at both ends of a chunk, and in the last one.
    for page in [0, 63, 65] {
        twin.write_all_at(b"changed", page * 8192 + 100)?;
    }
    let (exit, text) = s.restore("bad", &["--delta", "--output", "json"]);
    ensure!(exit == 0, "{text}");
    let written: u64 = field(&text, "bytes")?.parse()?;
    // Two whole files, half of one, single pages; and what every restore writes.
    let expected = 2 * len + len / 2 + 5 * 8192;
    ensure!(
        (expected - 8192..expected + (64 << 10)).contains(&written),
        "{written} of {len} each: {text}"
    );
    ensure!(std::fs::read(&precious)? == b"do not touch");
    let all = files(&s.scratch.join("good"));
    ensure!(all.len() == files(&s.scratch.join("bad")).len());
    for good in all {
        let bad = s.scratch.join("bad").join(good.strip_prefix(s.scratch.join("good"))?);
        ensure!(std::fs::read(&good)? == std::fs::read(&bad)?, "{}", bad.display());
        let mode = |path: &Path| Ok::<_, std::io::Error>(path.symlink_metadata()?.permissions().mode());
        ensure!(mode(&good)? == mode(&bad)?, "{}", bad.display());
    }
    ensure!(s.start("bad", 5450)?.sql(&s.scratch, "select count(*) from linked")? == "60000");
    Ok(())
}

/// Pages that all differ.
fn pages(count: u32) -> Vec<u8> {
    (0..count).flat_map(|page| page.to_le_bytes().repeat(2048)).collect()
}

/// After incrementals, a file's content lies in parts of many frames: whole chunks are compared by id, parts of them by
/// what the repository has of them. A restore that is killed meanwhile can be run again.
#[test]
fn delta_puts_right_what_incrementals_have_made() -> Result<()> {
    use std::os::unix::fs::FileExt;
    let s = set_up("delta-incr", true)?;
    s.sql("create table t with (fillfactor = 50) as select i, md5(i::text) as t from generate_series(1, 100000) i")?;
    s.backup()?;
    for round in 0..3 {
        s.sql(&format!(
            "update t set t = 'new' where i % 3000 between {round} and {round} + 20"
        ))?;
        s.flush_archive(&s.server)?;
        s.ok(&["backup", "acme", "--type", "incr", "--fast"])?;
    }
    for name in ["good", "bad"] {
        let (exit, text) = s.restore(name, &[]);
        ensure!(exit == 0, "{text}");
    }
    let path = s.sql("select pg_relation_filepath('t')")?;
    let file = std::fs::File::options()
        .write(true)
        .open(s.scratch.join("bad").join(path))?;
    let pages = file.metadata()?.len() / 8192;
    ensure!(pages > 1000, "{pages} pages");
    for page in (0..pages).step_by(37) {
        file.write_all_at(b"changed", page * 8192 + 8000)?;
    }
    let bad = s.path("bad");
    let arguments = ["restore", "acme", "--to", &bad, "--delta", "--progress", "none"];
    for pause in [10, 40, 80, 120] {
        let mut child = s
            .command(&arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        std::thread::sleep(Duration::from_millis(pause));
        child.kill()?;
        child.wait()?;
    }
    let (exit, text) = s.restore("bad", &["--delta"]);
    ensure!(exit == 0, "{text}");
    let is_same = || -> Result<()> {
        for good in files(&s.scratch.join("good")) {
            let bad = s.scratch.join("bad").join(good.strip_prefix(s.scratch.join("good"))?);
            ensure!(std::fs::read(&good)? == std::fs::read(&bad)?, "{}", bad.display());
        }
        Ok(())
    };
    is_same()?;
    // Where all is right, nothing of the cluster is written, whatever it is made of.
    let (exit, text) = s.restore("bad", &["--delta", "--output", "json"]);
    ensure!(exit == 0, "{text}");
    let written: u64 = field(&text, "bytes")?.parse()?;
    ensure!(written < 64 << 10, "{text}");
    is_same()
}

#[test]
fn targets_that_cannot_be_reached_say_why() -> Result<()> {
    let s = set_up("targets", true)?;
    let long_ago = s.sql("select now()")?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    s.sql("insert into t values (1)")?;
    s.flush_archive(&s.server)?;
    refused(s.restore("r", &["--target-time", &long_ago]), 3, "after the target")?;
    refused(s.restore("r", &["--target-name", "nowhere"]), 3, "not in the WAL")?;
    refused(s.restore("r", &["--target-xid", "4000000000"]), 3, "not in the WAL")?;
    refused(s.restore("r", &["--target-lsn", "F/0"]), 3, "needs WAL up to")?;
    refused(s.restore("r", &["--target-lsn", "0/100"]), 3, "consistent at")?;
    refused(s.restore("r", &["--target-timeline", "7"]), 3, "timeline 7")?;
    refused(s.restore("r", &["--backup", "nope"]), 3, "has no backup")?;
    refused(s.restore("r", &["--target-time", "soonish"]), 2, "not a time")?;
    refused(
        s.restore("r", &["--tablespace-map", "/nowhere=/x"]),
        2,
        "no such tablespace",
    )?;
    // A time after the last commit: PostgreSQL would refuse to start, so recovery goes to the end, and says so.
    let (exit, text) = s.restore("end", &["--target-time", "2099-01-01T00:00:00Z"]);
    ensure!(exit == 0 && text.contains("no commit after"), "{text}");
    let copy = s.start("end", 5450)?;
    ensure!(copy.sql(&s.scratch, "select count(*) from t")? == "1");
    drop(copy);

    // A hole: what lies behind it is out of reach, and the segment is named.
    s.sql("insert into t values (2)")?;
    let middle = s.flush_archive(&s.server)?;
    s.sql("insert into t values (3)")?;
    let late = s.sql("select pg_current_wal_insert_lsn()")?;
    s.flush_archive(&s.server)?;
    let stored = s.objects("wal");
    let hole = stored
        .iter()
        .find(|p| p.display().to_string().contains(&middle))
        .context("the middle segment")?;
    std::fs::remove_file(hole)?;
    refused(s.restore("r", &["--target-lsn", &late]), 3, &middle)?;
    let info = s.ok(&["info", "acme"])?;
    ensure!(info.contains("MISSING") && info.contains("after a gap"), "{info}");
    // A recovery that was told to follow the archive stops at the hole instead of promoting.
    ensure!(s.restore("stopped", &[]).0 == 0);
    let text = std::fs::read_to_string(s.path("stopped/postgresql.auto.conf"))?;
    ensure!(text.contains("--through"));
    Ok(())
}

#[test]
fn tablespaces_are_never_written_where_the_original_lives() -> Result<()> {
    let s = set_up("spaces", true)?;
    run(s.scratch.command("mkdir").args([s.path("ts"), s.path("later")]))?;
    s.sql(&format!("create tablespace ts location '{}'", s.path("ts")))?;
    s.sql("create table t tablespace ts as select generate_series(1, 1000) as x")?;
    s.backup()?;
    refused(s.restore("r", &[]), 1, "was not mapped")?;
    refused(s.restore("r", &["--keep-tablespaces"]), 1, "not empty")?;
    let map = format!("{}={}", s.path("ts"), s.path("r-ts"));
    ensure!(s.restore("r", &["--tablespace-map", &map]).0 == 0);
    let copy = s.start("r", 5450)?;
    ensure!(copy.sql(&s.scratch, "select count(*) from t")? == "1000");
    ensure!(
        std::fs::read_link(
            s.scratch
                .join("r/pg_tblspc")
                .join(copy.sql(&s.scratch, "select oid from pg_tablespace where spcname = 'ts'")?)
        )? == Path::new(&s.path("r-ts"))
    );
    drop(copy);
    // A tablespace made after the backup: replay would write into the original's folder.
    s.sql(&format!("create tablespace later location '{}'", s.path("later")))?;
    s.sql("create table l tablespace later as select 1 as x")?;
    s.flush_archive(&s.server)?;
    let map = format!("{}={}", s.path("ts"), s.path("r2-ts"));
    refused(s.restore("r2", &["--tablespace-map", &map]), 1, "CREATE TABLESPACE")?;
    ensure!(
        !Path::new(&s.path("r2")).exists(),
        "refused before anything was written"
    );
    Ok(())
}

#[test]
fn recovery_crosses_timelines() -> Result<()> {
    let s = set_up("timelines", true)?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    s.sql("insert into t values (1)")?;
    let fork = s.sql("select pg_current_wal_insert_lsn()")?;
    s.sql("insert into t values (-1)")?;
    s.flush_archive(&s.server)?;
    // A copy that replaces the original: it archives as timeline 2.
    ensure!(
        s.restore(
            "second",
            &["--target-lsn", &fork, "--target-exclusive", "--archiving", "keep"]
        )
        .0 == 0
    );
    s.server.stop(&s.scratch, "fast")?;
    let second = s.start("second", 5460)?;
    ensure!(second.sql(&s.scratch, "select string_agg(x::text, ',') from t")? == "1");
    second.sql(&s.scratch, "insert into t values (2)")?;
    s.flush_archive(&second)?;
    let lsn = second.sql(&s.scratch, "select pg_current_wal_insert_lsn()")?;
    second.sql(&s.scratch, "insert into t values (3)")?;
    s.flush_archive(&second)?;
    // latest follows the new timeline from the old backup; current stays on the old one.
    for (name, port, more, expected) in [
        ("latest", 5461, vec![], "1,2,3"),
        (
            "number",
            5462,
            vec!["--target-timeline", "2", "--target-lsn", &lsn],
            "1,2",
        ),
        ("current", 5463, vec!["--target-timeline", "current"], "1,-1"),
    ] {
        let (exit, text) = s.restore(name, &more);
        ensure!(exit == 0, "{name}: {text}");
        let copy = s.start(name, port)?;
        let rows = copy.sql(&s.scratch, "select string_agg(x::text, ',') from t")?;
        ensure!(
            rows == expected,
            "{name}: {rows}, expected {expected}\n{}",
            copy.log_text()
        );
    }
    // Another one replaces that: from the old backup, recovery crosses two switches.
    second.stop(&s.scratch, "fast")?;
    ensure!(s.restore("third", &["--archiving", "keep"]).0 == 0);
    let third = s.start("third", 5464)?;
    third.sql(&s.scratch, "insert into t values (4)")?;
    s.flush_archive(&third)?;
    let (exit, text) = s.restore("across", &[]);
    ensure!(exit == 0, "{text}");
    let copy = s.start("across", 5465)?;
    let rows = copy.sql(&s.scratch, "select string_agg(x::text, ',') from t")?;
    ensure!(rows == "1,2,3,4", "{rows}\n{}", copy.log_text());
    let timeline = copy.sql(
        &s.scratch,
        "select ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int",
    )?;
    ensure!(timeline == "4", "{timeline}");
    let info = s.ok(&["info", "acme"])?;
    for timeline in 1..=3 {
        ensure!(info.contains(&format!("restorable on timeline {timeline}")), "{info}");
    }
    Ok(())
}

#[test]
fn transactions_that_were_prepared_are_targets() -> Result<()> {
    let s = Fixture::new(
        "prepared",
        Shape {
            archiving: true,
            settings: "max_prepared_transactions = 5\n",
            ..Default::default()
        },
    )?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    let prepare = |x: u32, how: &str| -> Result<String> {
        let text = s.sql(&format!(
            "begin; insert into t values ({x}); select pg_current_xact_id(); prepare transaction '{how}'"
        ))?;
        let number = text.lines().find(|line| line.parse::<u64>().is_ok());
        Ok(number.with_context(|| text.clone())?.to_owned())
    };
    let committed = prepare(1, "c")?;
    let aborted = prepare(2, "a")?;
    // They end long after they were prepared, under the numbers of then.
    s.sql("insert into t values (3)")?;
    s.sql("commit prepared 'c'")?;
    s.sql("insert into t values (4)")?;
    s.sql("rollback prepared 'a'")?;
    s.sql("insert into t values (5)")?;
    s.flush_archive(&s.server)?;
    for (name, port, xid, more, expected) in [
        ("committed", 5461, &committed, None, "1,3"),
        ("before", 5462, &committed, Some("--target-exclusive"), "3"),
        ("aborted", 5463, &aborted, None, "1,3,4"),
    ] {
        let mut options = vec!["--target-xid", xid.as_str()];
        options.extend(more);
        let (exit, text) = s.restore(name, &options);
        ensure!(exit == 0, "{name}: {text}");
        let copy = s.start(name, port)?;
        let rows = copy.sql(&s.scratch, "select string_agg(x::text, ',' order by x) from t")?;
        ensure!(rows == expected, "{name}: {rows}\n{}", copy.log_text());
    }
    Ok(())
}

#[test]
fn a_standby_is_backed_up_and_a_restored_standby_follows() -> Result<()> {
    let s = set_up("standby", true)?;
    s.sql("create table t as select generate_series(1, 1000) as x")?;
    s.backup()?;
    s.flush_archive(&s.server)?;
    // A restored standby follows the archive.
    ensure!(s.restore("follower", &["--standby"]).0 == 0);
    let follower = Server::existing(&s.scratch, 15, s.path("follower"), 5470);
    follower.start(&s.scratch)?;
    s.sql("insert into t values (1001)")?;
    s.flush_archive(&s.server)?;
    follower.wait_for(&s.scratch, "select count(*) from t", "1001")?;
    // Stream to it, and back the standby up over the replication protocol.
    follower.stop(&s.scratch, "fast")?;
    let conf = s.path("follower/postgresql.auto.conf");
    let text = std::fs::read_to_string(&conf)?
        + &format!("primary_conninfo = '{}'\nfull_page_writes = on\n", s.server.conninfo());
    std::fs::write(&conf, text)?;
    follower.start(&s.scratch)?;
    s.sql("insert into t values (1002)")?;
    follower.wait_for(&s.scratch, "select count(*) from t", "1002")?;
    let out = s.ok(&[
        "--conninfo",
        &follower.conninfo(),
        "backup",
        "acme",
        "--fast",
        "--progress",
        "none",
        "--output",
        "json",
    ])?;
    ensure!(out.contains("\"wal_method\":\"stream\""), "{out}");
    let id = field(&out, "id")?;
    let (exit, text) = s.restore("from-standby", &["--backup", &id, "--target", "immediate"]);
    ensure!(exit == 0, "{text}");
    let copy = s.start("from-standby", 5471)?;
    ensure!(copy.sql(&s.scratch, "select count(*) from t")? == "1002");
    Ok(())
}
