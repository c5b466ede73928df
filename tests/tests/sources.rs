//! What makes base backups hard: pages torn while they are read, large files, servers that change roles.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairvault_engine::postgres::control::ControlFile;
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_tests::fixture::{SMALL, field, refused, signal};
use fairvault_tests::{Fixture, Shape, code, run, tools};

/// Waits until files of a backup are read.
fn wait_for_copying(s: &Fixture, server: &fairvault_tests::Server, source: &str) -> Result<()> {
    let query = match source {
        "stream" => "select count(*) from pg_stat_progress_basebackup where phase = 'streaming database files'",
        "local" => {
            "select count(*) from pg_stat_activity where query like 'SELECT catalog_version_no%' and state = 'idle'"
        }
        _ => "select count(*) from pg_stat_activity where query like 'WITH RECURSIVE f %' and state = 'idle'",
    };
    server.wait_for(&s.scratch, query, "1")
}

/// While a backup reads other files first, slowly, a page of a table changes, and is torn when it is read.
fn torn(source: &str) -> Result<()> {
    let s = Fixture::new(&format!("torn-{source}"), Shape::default())?;
    run(s.scratch.command("mkdir").arg(s.path("ts")))?;
    s.sql(&format!("create tablespace ts location '{}'", s.path("ts")))?;
    // BASE_BACKUP sends tablespaces first; the files of this machine are read in the other order.
    let (first, last) = match source {
        "stream" => ("ts", "pg_default"),
        _ => ("pg_default", "ts"),
    };
    s.sql(&format!(
        "create table filler tablespace {first} as select i, md5(i::text) from generate_series(1, 200000) i"
    ))?;
    s.sql(&format!(
        "create table t tablespace {last} as select i, 0 as v from generate_series(1, 10000) i"
    ))?;
    s.sql("create table untouched as select i from generate_series(1, 10000) i")?;
    s.sql("checkpoint")?;
    let path = s.sql("select pg_relation_filepath('t')")?;
    let arguments = ["backup", "acme", "--fast", "--source", source, "--max-rate", "4MiB"];
    let more = ["--progress", "none", "--output", "json"];
    let (exit, text) = std::thread::scope(|scope| -> Result<(i32, String)> {
        let backup = scope.spawn(|| code(s.command(&arguments).args(more)));
        wait_for_copying(&s, &s.server, source)?;
        s.sql("update t set v = 1 where i <= 100")?;
        // Half of the page as the server would write it, half as it was: here, garbage.
        let file = std::fs::File::options().write(true).open(s.server.data.join(&path))?;
        file.write_all_at(&[0x5A; 4096], 4096)?;
        backup.join().map_err(|_| anyhow::anyhow!("panicked"))
    })?;
    ensure!(exit == 0, "{exit} {text}");
    ensure!(
        text.contains("benign: torn while it was read") && text.contains(&path) && text.contains("\"damaged_pages\":0"),
        "{text}"
    );
    ensure!(text.contains(&format!("\"source\":\"{source}\"")), "{text}");
    ensure!(
        s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?
            .contains("all good")
    );
    let map = format!("all={}", s.path("r-ts"));
    let (exit, text) = s.restore("r", &["--tablespace-map", &map]);
    ensure!(exit == 0, "{text}");
    let copy = s.start("r", 5450)?;
    ensure!(copy.sql(&s.scratch, "select sum(v), count(*) from t")? == "100|10000");
    Ok(())
}

#[test]
fn a_page_that_was_torn_while_it_was_streamed_is_benign() -> Result<()> {
    torn("stream")
}

#[test]
fn a_page_that_was_torn_while_its_file_was_read_is_benign() -> Result<()> {
    torn("local")
}

#[test]
fn a_page_that_was_torn_while_it_was_read_over_sql_is_benign() -> Result<()> {
    torn("sql")
}

/// Whether the files that are read last are being read, and those before them were: the process has that one open, or
/// the server has been asked for it.
fn reads_last(s: &Fixture, backup: &Child, source: &str, before: &str, last: &str) -> Result<bool> {
    if source == "local" {
        let open = |path: &str| -> Result<bool> {
            let file = s.server.data.join(path).canonicalize()?;
            let mut links = std::fs::read_dir(format!("/proc/{}/fd", backup.id()))?.flatten();
            Ok(links.any(|link| std::fs::read_link(link.path()).is_ok_and(|to| to == file)))
        };
        return Ok(open(last)? && !open(before)?);
    }
    // A query's text begins with the first range that it asks for.
    let asked = format!("select count(*) > 0 from pg_stat_activity where query like 'COPY%VALUES (0, ''{last}''%'");
    Ok(s.sql(&asked)? == "t")
}

/// Stops the process while the last files are read, lets the server make a checkpoint, and expects that one in the
/// pg_control of the copy, which is read after everything else.
fn control_is_last(source: &str) -> Result<()> {
    let s = Fixture::new(&format!("control-{source}"), Shape::default())?;
    run(s.scratch.command("mkdir").arg(s.path("ts")))?;
    s.sql(&format!("create tablespace ts location '{}'", s.path("ts")))?;
    // Tablespaces are read behind global/. Each table has more chunks than may wait to be read.
    let mut paths = Vec::new();
    for table in ["t", "u"] {
        s.sql(&format!(
            "create table {table} tablespace ts as select i, md5(i::text) from generate_series(1, 300000) i"
        ))?;
        paths.push(s.sql(&format!("select pg_relation_filepath('{table}')"))?);
    }
    ensure!(paths[0] < paths[1], "{paths:?}");
    s.sql("checkpoint")?;
    let arguments = ["backup", "acme", "--fast", "--source", source, "--max-rate", "8MiB"];
    let mut backup = s
        .command(&arguments)
        .args(["--progress", "none"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(120);
    while !reads_last(&s, &backup, source, &paths[0], &paths[1])? {
        ensure!(
            backup.try_wait()?.is_none() && Instant::now() < deadline,
            "{source}: it was missed"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    signal(&backup, "STOP")?;
    // It has not come to the end in the meantime: the session still waits for what comes behind all files.
    wait_for_copying(&s, &s.server, source)?;
    ensure!(
        reads_last(&s, &backup, source, &paths[0], &paths[1])?,
        "{source}: too late"
    );
    s.sql("create table v as select 1 as x")?;
    s.sql("checkpoint")?;
    let newest = s.sql("select checkpoint_lsn from pg_control_checkpoint()")?;
    let newest: Lsn = newest.parse().map_err(anyhow::Error::msg)?;
    signal(&backup, "CONT")?;
    let ended = backup.wait_with_output()?;
    ensure!(ended.status.success(), "{}", fairvault_tests::text(&ended));
    let map = format!("all={}", s.path("r-ts"));
    let (exit, text) = s.restore("r", &["--tablespace-map", &map]);
    ensure!(exit == 0, "{text}");
    let control = ControlFile::parse(&std::fs::read(s.path("r/global/pg_control"))?)?;
    ensure!(
        control.checkpoint >= newest,
        "{source}: pg_control knows the checkpoint at {}, and that at {newest} came before the last file was read",
        control.checkpoint
    );
    let copy = s.start("r", 5450)?;
    ensure!(copy.sql(&s.scratch, "select (select count(*) from u), (select x from v)")? == "300000|1");
    Ok(())
}

#[test]
fn pg_control_is_read_after_all_files() -> Result<()> {
    control_is_last("local")
}

#[test]
fn pg_control_is_read_after_all_files_over_sql() -> Result<()> {
    control_is_last("sql")
}

#[test]
fn files_beyond_one_gibibyte_and_a_linked_pg_wal() -> Result<()> {
    let wal = std::env::temp_dir().join(format!("fv-linked-wal-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&wal);
    let wal_text = wal.display().to_string();
    let s = Fixture::new(
        "large",
        Shape {
            initdb: &["-k", "-X", &wal_text],
            ..Default::default()
        },
    )?;
    s.sql("create table big (x int); insert into big values (0)")?;
    let path = s.sql("select pg_relation_filepath('big')")?;
    s.server.stop(&s.scratch, "fast")?;
    // Pages of zeros are new pages: the next rows go into a second file.
    std::fs::File::options()
        .write(true)
        .open(s.server.data.join(&path))?
        .set_len(1 << 30)?;
    s.server.start(&s.scratch)?;
    s.sql("insert into big select generate_series(1, 100000)")?;
    ensure!(s.server.data.join(format!("{path}.1")).exists());
    let text = s.backup()?;
    ensure!(!text.contains("checksum"), "{text}");
    ensure!(
        s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?
            .contains("all good")
    );
    let (exit, text) = s.restore("r", &["--sparse"]);
    ensure!(exit == 0, "{text}");
    let restored = std::fs::metadata(s.scratch.join("r").join(&path))?;
    let (len, stored) = (restored.len(), std::os::unix::fs::MetadataExt::blocks(&restored) * 512);
    ensure!(
        len == 1 << 30 && stored < 64 << 20,
        "{len} bytes, {stored} of them stored"
    );
    ensure!(
        std::fs::symlink_metadata(s.path("r/pg_wal"))?.is_dir(),
        "a copy keeps its WAL to itself"
    );
    let copy = s.start("r", 5450)?;
    ensure!(copy.sql(&s.scratch, "select count(*), sum(x) from big")? == "100001|5000050000");
    copy.stop(&s.scratch, "fast")?;
    run(s
        .scratch
        .command(tools::bin(15).join("pg_checksums"))
        .args(["--check", "-D", &s.path("r")]))?;
    s.server.stop(&s.scratch, "fast")?;
    std::fs::remove_dir_all(&wal)?;
    Ok(())
}

#[test]
fn a_checkpoint_that_takes_its_time_is_waited_for() -> Result<()> {
    let settings = "checkpoint_timeout = 30s\ncheckpoint_completion_target = 0.2\n";
    let s = Fixture::new(
        "spread",
        Shape {
            settings,
            ..Default::default()
        },
    )?;
    s.sql("create table t as select i, md5(i::text) from generate_series(1, 100000) i")?;
    let started = Instant::now();
    let (exit, text) = s.fairvault(&["backup", "acme", "--progress", "plain"]);
    ensure!(
        exit == 0 && text.contains("waiting for the server's checkpoint"),
        "{text}"
    );
    ensure!(
        started.elapsed() > Duration::from_secs(1),
        "the checkpoint was not spread"
    );
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.start("r", 5450)?.sql(&s.scratch, "select count(*) from t")? == "100000");
    Ok(())
}

#[test]
fn a_promotion_during_a_streamed_backup_fails_it() -> Result<()> {
    promoted("stream")
}

#[test]
fn a_promotion_while_files_are_read_fails_the_backup() -> Result<()> {
    promoted("local")
}

#[test]
fn a_promotion_while_files_are_read_over_sql_fails_the_backup() -> Result<()> {
    promoted("sql")
}

fn promoted(source: &str) -> Result<()> {
    let s = Fixture::new(
        &format!("promotion-{source}"),
        Shape {
            archiving: true,
            ..Default::default()
        },
    )?;
    s.sql("create table t as select i, md5(i::text) from generate_series(1, 300000) i")?;
    s.backup()?;
    s.flush_archive(&s.server)?;
    let standby = s.standby("standby", 5460, &[], "full_page_writes = on")?;
    // A standby cannot have its last segment archived.
    let conninfo = standby.conninfo();
    let (exit, text) = s.fairvault(&["--conninfo", &conninfo, "backup", "acme", "--wal", "archive"]);
    ensure!(exit == 2 && text.contains("needs a primary"), "{exit} {text}");
    let arguments = [
        "--conninfo",
        &conninfo,
        "backup",
        "acme",
        "--fast",
        "--source",
        source,
        "--max-rate",
        "4MiB",
        "--progress",
        "none",
    ];
    let (exit, text) = std::thread::scope(|scope| -> Result<(i32, String)> {
        let backup = scope.spawn(|| code(&mut s.command(&arguments)));
        wait_for_copying(&s, &standby, source)?;
        run(standby
            .program(&s.scratch, "pg_ctl")
            .args(["promote", "-w", "-D"])
            .arg(&standby.data))?;
        backup.join().map_err(|_| anyhow::anyhow!("panicked"))
    })?;
    ensure!(exit != 0 && text.contains("promoted"), "{exit} {text}");
    let info = s.ok(&["info", "acme"])?;
    ensure!(!info.contains("unfinished"), "the session was ended: {info}");
    ensure!(info.matches(" full ").count() == 1, "{info}");
    // The new primary is backed up as it is, on its own timeline.
    let id = s.backup_id(&["--conninfo", &conninfo, "--source", source])?;
    let (exit, text) = s.restore("r", &["--backup", &id]);
    ensure!(exit == 0, "{text}");
    ensure!(s.start("r", 5461)?.sql(&s.scratch, "select count(*) from t")? == "300000");
    Ok(())
}

/// Nothing but what `check` prints, on a server that lets nobody replicate.
#[test]
fn a_role_that_may_not_replicate_backs_up_what_is_archived() -> Result<()> {
    without_replication(15)
}

/// Its functions have other names.
#[test]
fn a_role_that_may_not_replicate_backs_up_what_is_archived_by_14() -> Result<()> {
    without_replication(14)
}

fn without_replication(major: u32) -> Result<()> {
    let shape = Shape {
        major,
        archiving: true,
        stanza: false,
        ..SMALL
    };
    let s = Fixture::new(&format!("ordinary{major}"), shape)?;
    s.sql("create role r login")?;
    let conninfo = |port: u16| format!("host={} port={port} user=r dbname=postgres", s.path(""));
    let first = conninfo(5432);
    let as_r = |arguments: &[&str]| s.fairvault(&[&["--conninfo", first.as_str()][..], arguments].concat());
    let (exit, text) = as_r(&["stanza", "create", "acme"]);
    ensure!(exit == 0, "{text}");
    refused(as_r(&["backup", "acme", "--source", "stream"]), 1, "SQLSTATE 42501")?;
    s.server.forbid_replication(&s.scratch)?;
    let none = "no pg_hba.conf entry for replication connection";
    refused(as_r(&["backup", "acme", "--source", "stream"]), 1, none)?;
    refused(as_r(&["backup", "acme", "--wal", "stream"]), 1, "--wal archive")?;
    // Without anything granted there is no source at all.
    refused(as_r(&["backup", "acme", "--source", "sql"]), 1, "GRANT EXECUTE")?;
    refused(as_r(&["backup", "acme"]), 1, none)?;
    let (exit, check) = as_r(&["check", "acme"]);
    ensure!(
        exit == 1 && check.contains("sources: none; not stream"),
        "{exit} {check}"
    );
    let of_sql = check.lines().find_map(|line| line.split_once("not sql: "));
    let grant = of_sql.and_then(|(_, rest)| rest.split_once("→ "));
    let (_, grant) = grant.with_context(|| check.clone())?;
    s.sql(grant)?;
    let (_, check) = as_r(&["check", "acme"]);
    ensure!(check.contains("sources: sql; not stream"), "{check}");

    s.sql("create table t as select i, md5(i::text) from generate_series(1, 20000) i")?;
    let full = s.backup_json(&["--conninfo", &first])?;
    ensure!(
        field(&full, "source")? == "sql" && field(&full, "type")? == "full",
        "{full}"
    );
    ensure!(!full.contains("could not be compared"), "{full}");
    // What changed is known from WAL that is archived, and from the segment that is not.
    s.sql("update t set i = i where i % 100 = 0; insert into t select i, '' from generate_series(1, 20000) i")?;
    let incr = s.backup_json(&["--conninfo", &first, "--source", "sql", "--audit"])?;
    ensure!(field(&incr, "parent")? == field(&full, "id")?, "{incr}");
    ensure!(!incr.contains("could not be compared"), "{incr}");

    // Another timeline, whose history is a file as well.
    s.server.stop(&s.scratch, "fast")?;
    let (exit, text) = s.restore("r", &["--archiving", "keep"]);
    ensure!(exit == 0, "{text}");
    let copy = s.start("r", 5450)?;
    ensure!(s.rows(&copy)? == "40000");
    let id = s.backup_id(&["--conninfo", &conninfo(5450)])?;
    copy.stop(&s.scratch, "fast")?;
    let (exit, text) = s.restore("q", &["--backup", &id]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("q", 5451)?)? == "40000");
    Ok(())
}

/// Whatever the role may do there. Finds a backup that needs a connection for replication, and a refusal that does not say
/// what to do.
#[test]
fn a_server_without_senders_of_wal_is_backed_up_over_ordinary_connections() -> Result<()> {
    let shape = Shape {
        archiving: true,
        settings: "max_wal_senders = 0\n",
        ..SMALL
    };
    let s = Fixture::new("nosenders", shape)?;
    s.sql("create table t as select i, md5(i::text) from generate_series(1, 20000) i")?;
    for source in ["local", "sql"] {
        let said = s.backup_json(&["--source", source])?;
        ensure!(
            field(&said, "source")? == source && !said.contains("could not be compared"),
            "{said}"
        );
    }
    let (_, check) = s.fairvault(&["check", "acme"]);
    ensure!(check.contains("sources: local, sql; not stream"), "{check}");
    for way in ["--source", "--wal"] {
        let asked = s.fairvault(&["backup", "acme", "--fast", "--progress", "none", way, "stream"]);
        refused(asked, 75, "raise max_wal_senders")?;
    }
    s.flush_archive(&s.server)?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "20000");
    Ok(())
}

#[test]
fn progress_is_told_to_people_and_to_machines() -> Result<()> {
    let s = Fixture::new("progress", Shape::default())?;
    s.sql("create table t as select i, md5(i::text) from generate_series(1, 200000) i")?;
    let (exit, text) = s.fairvault(&[
        "backup",
        "acme",
        "--fast",
        "--max-rate",
        "8MiB",
        "--progress",
        "json",
        "--output",
        "json",
    ]);
    ensure!(exit == 0, "{text}");
    let events: Vec<serde_json::Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let copying: Vec<_> = events
        .iter()
        .filter(|e| e["kind"] == "progress" && e["phase"] == "copying")
        .collect();
    ensure!(copying.len() >= 2, "{text}");
    let read: Vec<u64> = copying.iter().filter_map(|e| e["read_bytes"].as_u64()).collect();
    ensure!(read.is_sorted() && read.last() > read.first(), "{read:?}");
    ensure!(
        copying.iter().all(|e| e["total_bytes"].as_u64() > Some(10 << 20)),
        "{text}"
    );
    let result = events.iter().find(|e| e["kind"] == "backup");
    ensure!(
        result.is_some_and(|e| e["plain_bytes"].as_u64() >= read.last().copied()),
        "{text}"
    );
    // Not a terminal: plain lines, without control characters.
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0 && !text.contains("copying"), "--progress none: {text}");
    let (exit, text) = s.fairvault(&["restore", "acme", "--to", &s.path("r2")]);
    ensure!(
        exit == 0 && text.contains("planning …") && text.contains("copying") && !text.contains('\x1b'),
        "{text}"
    );
    ensure!(Path::new(&s.path("r2/global/pg_control")).exists());
    Ok(())
}

/// Runs a command under GNU time; returns its peak memory, KiB.
fn peak_memory(s: &Fixture, arguments: &[&str]) -> Result<u64> {
    let mut command = s.scratch.command("/usr/bin/time");
    let program = s.path("fairvault");
    command.args(["-f", "peak %M", "env", &format!("HOME={}", s.path("")), &program]);
    command.args(&s.options).args(arguments);
    let (exit, text) = code(&mut command);
    ensure!(exit == 0, "{exit} {text}");
    let peak = text.lines().find_map(|l| l.strip_prefix("peak "));
    Ok(peak.context("no peak")?.parse()?)
}

#[test]
fn five_gigabytes_take_little_memory() -> Result<()> {
    if !tools::is_full() {
        eprintln!("the database of 5 GB is part of `cargo xtask test --full`");
        return Ok(());
    }
    tools::install_time()?;
    let s = Fixture::new("five", Shape::default())?;
    s.sql("create table t (x text); alter table t alter x set storage plain")?;
    // Hardly compressible, and never the same twice: every byte is packed and stored.
    s.sql("copy t from program 'head -c 4100M /dev/urandom | base64 -w 4000'")?;
    let rows = s.sql("select count(*) from t")?;
    ensure!(s.sql("select pg_database_size('postgres') > 5::bigint << 30")? == "t");
    let backup = peak_memory(&s, &["backup", "acme", "--fast", "--progress", "none"])?;
    s.server.stop(&s.scratch, "immediate")?;
    std::fs::remove_dir_all(&s.server.data)?;
    let to = s.path("r");
    let restore = peak_memory(&s, &["restore", "acme", "--to", &to, "--progress", "none"])?;
    println!(
        "peak memory: backup {} MiB, restore {} MiB",
        backup >> 10,
        restore >> 10
    );
    ensure!(backup <= 256 << 10, "backup took {backup} KiB");
    ensure!(restore <= 256 << 10, "restore took {restore} KiB");
    ensure!(s.start("r", 5450)?.sql(&s.scratch, "select count(*) from t")? == rows);
    Ok(())
}
