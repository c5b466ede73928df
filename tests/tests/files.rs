//! Backups that read the files of a data directory: what they hold is what a streamed one holds, whatever the server
//! does meanwhile.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fairvault_tests::fixture::{field, files, refused, signal};
use fairvault_tests::{Fixture, Shape, output, run};

/// What a restored directory holds: for each path, its mode and content.
fn content(folder: &Path) -> Result<BTreeMap<String, (u32, Vec<u8>)>> {
    let mut found = BTreeMap::new();
    for path in files(folder) {
        let name = path.strip_prefix(folder)?.display().to_string();
        found.insert(
            name,
            (std::fs::metadata(&path)?.permissions().mode(), std::fs::read(&path)?),
        );
    }
    Ok(found)
}

/// Folders below a folder, empty ones too.
fn folders(folder: &Path) -> Result<String> {
    run(std::process::Command::new("find")
        .args([".", "-type", "d", "-printf", "%p %m\\n"])
        .current_dir(folder))
}

#[test]
fn every_source_gives_the_same() -> Result<()> {
    let s = Fixture::new("same", Shape::default())?;
    run(s.scratch.command("mkdir").arg(s.path("ts")))?;
    s.sql(&format!("create tablespace ts location '{}'", s.path("ts")))?;
    s.sql("create table a as select i, md5(i::text) as t from generate_series(1, 50000) i")?;
    s.sql("create index on a (t)")?;
    s.sql("create table b tablespace ts as select i from generate_series(1, 20000) i")?;
    s.sql("create unlogged table c as select i from generate_series(1, 20000) i")?;
    s.sql("create index on c (i)")?;
    s.sql("create table empty (i int)")?;
    s.sql("create database other")?;
    s.sql("vacuum analyze")?;
    s.sql("select pg_create_physical_replication_slot('kept', true)")?;
    // What a crashed server leaves, and what is nobody's.
    for (name, text) in [
        ("base/5/t3_16999", "temporary"),
        ("base/5/t3_16999_fsm.1", "temporary"),
        ("pg_stat_tmp/global.tmp", "statistics"),
        ("backup_label.old", "old"),
        ("tablespace_map.old", "old"),
        ("backup_manifest", "{}"),
        ("postgresql.auto.conf.tmp", "x"),
        ("somebody's notes", "kept"),
    ] {
        s.scratch.write(&format!("data5432/{name}"), text.as_bytes())?;
    }
    run(s.scratch.command("mkdir").arg(s.path("data5432/base/pgsql_tmp")))?;
    run(s
        .scratch
        .command("ln")
        .args(["-s", "/etc/hostname", &s.path("data5432/link")]))?;
    run(s.scratch.command("mkdir").args(["-p", &s.path("ts/PG_14_202107181/5")]))?;
    s.sql("checkpoint")?;
    let streamed = s.backup_id(&["--source", "stream"])?;
    let text = s.ok(&[
        "backup",
        "acme",
        "--fast",
        "--source",
        "local",
        "--output",
        "json",
        "--progress",
        "none",
    ])?;
    let local = fairvault_tests::fixture::field(&text, "id")?;
    ensure!(text.contains("\"source\":\"local\""), "{text}");
    let new: u64 = fairvault_tests::fixture::field(&text, "new_plain_bytes")?.parse()?;
    ensure!(new < 200 << 10, "what was streamed is known: {text}");
    // What the link leads to is none of the cluster's, and SQL cannot tell.
    run(s.scratch.command("rm").arg(s.path("data5432/link")))?;
    let sql = s.backup_id(&["--source", "sql"])?;
    for (name, id) in [("streamed", &streamed), ("local", &local), ("sql", &sql)] {
        let map = format!("all={}", s.path(&format!("{name}-ts")));
        let (exit, text) = s.restore(name, &["--backup", id, "--tablespace-map", &map]);
        ensure!(exit == 0, "{text}");
    }
    let pairs = [
        ("streamed", "local"),
        ("streamed-ts", "local-ts"),
        ("streamed", "sql"),
        ("streamed-ts", "sql-ts"),
    ];
    for (a, b) in pairs {
        ensure!(folders(&s.scratch.join(a))? == folders(&s.scratch.join(b))?);
        let (a, b) = (content(&s.scratch.join(a))?, content(&s.scratch.join(b))?);
        let one_sided: Vec<&String> = a
            .keys()
            .filter(|k| !b.contains_key(*k))
            .chain(b.keys().filter(|k| !a.contains_key(*k)))
            .collect();
        // Up to version 15, it is not asked for with a stream; restores make the links themselves.
        ensure!(one_sided.iter().all(|name| *name == "tablespace_map"), "{one_sided:?}");
        for (name, (mode, bytes)) in a.iter().filter(|(name, _)| b.contains_key(*name)) {
            ensure!(*mode == b[name].0, "{name}: mode");
            // These say when and where.
            let differs = [
                "backup_label",
                "global/pg_control",
                "backup_manifest",
                "postgresql.auto.conf",
                "tablespace_map",
            ];
            ensure!(
                differs.contains(&name.as_str()) || *bytes == b[name].1,
                "{name} differs"
            );
        }
    }
    ensure!(!s.scratch.join("local/base/5/t3_16999").exists() && s.scratch.join("local/somebody's notes").exists());
    ensure!(
        s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?
            .contains("all good")
    );
    let copy = s.start("local", 5450)?;
    ensure!(
        copy.sql(
            &s.scratch,
            "select (select count(*) from a), (select sum(i) from b), (select count(*) from c)"
        )? == "50000|200010000|0"
    );
    Ok(())
}

#[test]
fn files_that_come_and_go_while_they_are_read_do_no_harm() -> Result<()> {
    churn("local")
}

#[test]
fn files_that_come_and_go_while_they_are_read_over_sql_do_no_harm() -> Result<()> {
    churn("sql")
}

#[test]
fn files_that_come_and_go_while_they_are_streamed_do_no_harm() -> Result<()> {
    churn("stream")
}

fn churn(source: &str) -> Result<()> {
    let s = Fixture::new(&format!("churn-{source}"), Shape::default())?;
    run(&mut s.server.pgbench(&s.scratch, &["-i", "-q", "-s", "3"]))?;
    s.sql("create table grows (i int, t text)")?;
    s.sql("create table shrinks as select i, md5(i::text) from generate_series(1, 100000) i")?;
    s.scratch.write(
        "churn.sql",
        b"create table gone_:client_id as select i, md5(i::text) from generate_series(1, 3000) i;\n\
          insert into grows select i, md5(i::text) from generate_series(1, 2000) i;\n\
          delete from shrinks where i > (select max(i) - 3000 from shrinks);\nvacuum shrinks;\ndrop table gone_:client_id;\n",
    )?;
    s.scratch.write(
        "move.sql",
        b"\\set aid random(1, 300000)\nbegin;\nupdate pgbench_accounts set abalance = abalance + 1 where aid = :aid;\nselect pg_sleep(0.002);\n\
          update pgbench_branches set bbalance = bbalance + 1 where bid = 1;\ncommit;\n",
    )?;
    let (churn, moves) = (s.path("churn.sql"), s.path("move.sql"));
    let backup = std::thread::scope(|scope| -> Result<String> {
        let churning = scope.spawn(|| {
            run(&mut s
                .server
                .pgbench(&s.scratch, &["-n", "-c", "2", "-T", "8", "-f", &churn]))
        });
        let moving = scope.spawn(|| {
            run(&mut s
                .server
                .pgbench(&s.scratch, &["-n", "-c", "2", "-T", "8", "-f", &moves]))
        });
        std::thread::sleep(Duration::from_secs(1));
        let begun = Instant::now();
        let said = s.backup_json(&["--source", source, "--max-rate", "20MiB"])?;
        let took = begun.elapsed().as_secs_f64();
        // However fast the machine is.
        let read: f64 = field(&said, "read_bytes")?.parse()?;
        let least = read / f64::from(20 << 20) - 0.5;
        ensure!(least > 1.0 && took >= least, "{read} bytes took {took} s");
        for thread in [churning, moving] {
            thread.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        }
        field(&said, "id")
    })?;
    ensure!(
        s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?
            .contains("all good")
    );
    let (exit, text) = s.restore("r", &["--backup", &backup, "--target", "immediate"]);
    ensure!(exit == 0, "{text}");
    let copy = s.start("r", 5450)?;
    s.server.wait_for(&s.scratch, "select 1", "1")?;
    // Each transaction changed both by one.
    let balance = "select (select sum(abalance) from pgbench_accounts) = (select sum(bbalance) from pgbench_branches)";
    ensure!(copy.sql(&s.scratch, balance)? == "t");
    copy.sql(&s.scratch, "create extension amcheck")?;
    let check = "select count(*) from (select bt_index_check(indexrelid, true) from pg_index join pg_class on oid = indexrelid where relam = 403) x";
    copy.sql(&s.scratch, check)?;
    let heaps = "select count(*) from pg_class, verify_heapam(oid::regclass) where relkind in ('r', 't', 'm') and relpersistence = 'p'";
    ensure!(copy.sql(&s.scratch, heaps)? == "0");
    Ok(())
}

#[test]
fn a_standby_is_read_where_it_is() -> Result<()> {
    let s = Fixture::new(
        "localstandby",
        Shape {
            archiving: true,
            ..Default::default()
        },
    )?;
    s.sql("create table t as select i from generate_series(1, 100000) i")?;
    s.backup()?;
    s.flush_archive(&s.server)?;
    let standby = s.standby("standby", 5460, &[], "")?;
    let conninfo = standby.conninfo();
    // The primary's directory is on this machine as well, and has the same system identifier.
    let primary = s.server.data.display().to_string();
    refused(
        s.fairvault(&[
            "--conninfo",
            &conninfo,
            "backup",
            "acme",
            "--source",
            "local",
            "--data-directory",
            &primary,
        ]),
        1,
        "is not the data directory of this connection's server",
    )?;
    refused(
        s.fairvault(&["backup", "acme", "--source", "local", "--data-directory", "/nowhere"]),
        1,
        "/nowhere/global/pg_control cannot be read",
    )?;
    s.sql("insert into t select i from generate_series(1, 1000) i")?;
    standby.wait_for(&s.scratch, "select count(*) from t", "101000")?;
    let id = s.backup_id(&["--conninfo", &conninfo, "--source", "local"])?;
    let (exit, text) = s.restore("r", &["--backup", &id, "--target", "immediate"]);
    ensure!(exit == 0, "{text}");
    ensure!(s.start("r", 5461)?.sql(&s.scratch, "select count(*) from t")? == "101000");
    Ok(())
}

#[test]
fn files_that_are_replaced_meanwhile_are_whole() -> Result<()> {
    let s = Fixture::new("replaced", Shape::default())?;
    s.sql("create table filler as select i, md5(i::text) from generate_series(1, 200000) i")?;
    let arguments = [
        "backup",
        "acme",
        "--fast",
        "--source",
        "sql",
        "--max-rate",
        "6MiB",
        "--progress",
        "none",
    ];
    std::thread::scope(|scope| -> Result<()> {
        let backup = scope.spawn(|| s.ok(&arguments));
        s.server.wait_for(
            &s.scratch,
            "select count(*) from pg_stat_activity where query like 'WITH RECURSIVE f %' and state = 'idle'",
            "1",
        )?;
        // Longer than when it was listed.
        s.sql("alter system set application_name = 'a name that is longer than what was there before'")?;
        backup.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        Ok(())
    })?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    let settings = std::fs::read_to_string(s.path("r/postgresql.auto.conf"))?;
    ensure!(!settings.contains('\0'), "{settings:?}");
    s.start("r", 5450)?;
    Ok(())
}

#[test]
fn a_tablespace_that_cannot_be_seen_is_not_passed_over() -> Result<()> {
    let s = Fixture::new("hidden", Shape::default())?;
    run(s.scratch.command("mkdir").arg(s.path("ts")))?;
    s.sql(&format!("create tablespace ts location '{}'", s.path("ts")))?;
    s.sql("create table t tablespace ts as select i from generate_series(1, 1000) i")?;
    s.sql("checkpoint")?;
    // As if it were mounted for the server only.
    let link = s.path(&format!(
        "data5432/pg_tblspc/{}",
        s.sql("select oid from pg_tablespace where spcname = 'ts'")?
    ));
    run(s.scratch.command("ln").args(["-sfn", &s.path("nowhere"), &link]))?;
    refused(
        s.fairvault(&["backup", "acme", "--fast", "--source", "local"]),
        1,
        "cannot be seen",
    )?;
    run(s.scratch.command("ln").args(["-sfn", &s.path("ts"), &link]))?;
    s.backup_id(&["--source", "local"])?;
    Ok(())
}

#[test]
fn an_interrupted_backup_leaves_the_server_as_it_was() -> Result<()> {
    interrupted("local")
}

#[test]
fn an_interrupted_backup_over_sql_leaves_the_server_as_it_was() -> Result<()> {
    interrupted("sql")
}

#[test]
fn an_interrupted_streamed_backup_leaves_the_server_as_it_was() -> Result<()> {
    interrupted("stream")
}

fn interrupted(source: &str) -> Result<()> {
    let s = Fixture::new(&format!("{source}stop"), Shape::default())?;
    s.sql("create table t as select i, md5(i::text) from generate_series(1, 200000) i")?;
    let arguments = [
        "backup",
        "acme",
        "--fast",
        "--source",
        source,
        "--max-rate",
        "2MiB",
        "--progress",
        "none",
    ];
    let mut child = s
        .command(&arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    // While files are read, and with all its connections gone afterwards.
    let reading = match source {
        "stream" => "pg_stat_progress_basebackup where phase = 'streaming database files'",
        "sql" => "pg_stat_activity where query like '%pg_read_binary_file%' and query not like '%pg_stat_activity%'",
        _ => "pg_stat_activity where query like 'SELECT catalog_version_no%' and state = 'idle'",
    };
    s.server
        .wait_for(&s.scratch, &format!("select count(*) > 0 from {reading}"), "t")?;
    signal(&child, "INT")?;
    ensure!(child.wait()?.code() == Some(130));
    s.server.wait_for(
        &s.scratch,
        "select count(*) from pg_stat_activity where application_name like 'fairvault%'",
        "0",
    )?;
    ensure!(!s.ok(&["info", "acme"])?.contains("unfinished"));
    s.backup_id(&["--source", source])?;
    Ok(())
}

#[test]
fn a_role_without_rights_is_told_which() -> Result<()> {
    let s = Fixture::new("localrights", Shape::default())?;
    s.sql("create role r login replication")?;
    let conninfo = format!("host={} port=5432 user=r dbname=postgres", s.path(""));
    let directory = s.server.data.display().to_string();
    refused(
        s.fairvault(&["--conninfo", &conninfo, "backup", "acme", "--source", "local"]),
        1,
        "pg_read_all_settings",
    )?;
    refused(
        s.fairvault(&[
            "--conninfo",
            &conninfo,
            "backup",
            "acme",
            "--source",
            "local",
            "--data-directory",
            &directory,
        ]),
        1,
        "GRANT EXECUTE ON FUNCTION pg_backup_start",
    )?;
    // Without being asked for it, the backup is streamed.
    let text = s.ok(&[
        "--conninfo",
        &conninfo,
        "backup",
        "acme",
        "--fast",
        "--output",
        "json",
        "--progress",
        "none",
    ])?;
    ensure!(text.contains("\"source\":\"stream\""), "{text}");
    // What it is told is enough.
    let (exit, text) = s.fairvault(&["--conninfo", &conninfo, "backup", "acme", "--source", "sql"]);
    ensure!(
        exit == 1 && text.contains("r may not read the server's files over SQL"),
        "{exit} {text}"
    );
    let grant = text
        .lines()
        .find_map(|line| line.split_once("→ "))
        .map(|(_, sql)| sql.to_owned());
    let grant = grant.unwrap_or_default();
    let (_, check) = s.fairvault(&["--conninfo", &conninfo, "check", "acme"]);
    ensure!(!grant.is_empty() && check.contains(&grant), "{grant} is not in {check}");
    s.sql(&grant)?;
    let (_, check) = s.fairvault(&["--conninfo", &conninfo, "check", "acme"]);
    ensure!(!check.contains("GRANT EXECUTE"), "{check}");
    let id = s.backup_id(&["--conninfo", &conninfo])?;
    let text = s.ok(&["info", "acme", "--output", "json"])?;
    ensure!(text.contains("\"source\":\"sql\""), "{text}");
    let (exit, text) = s.restore("q", &["--backup", &id]);
    ensure!(exit == 0, "{text}");
    let id = s.backup_id(&[
        "--conninfo",
        &conninfo,
        "--source",
        "local",
        "--data-directory",
        &directory,
    ])?;
    let (exit, text) = s.restore("r", &["--backup", &id]);
    ensure!(exit == 0, "{text}");
    Ok(())
}

/// How much of a file the kernel has in its cache, bytes.
fn cached(file: &Path) -> Result<u64> {
    let arguments = ["--bytes", "--noheadings", "--raw", "--output", "RES"];
    let text = run(Command::new("fincore").args(arguments).arg(file))?;
    // Nothing is said of nothing.
    Ok(match text.trim() {
        "" => 0,
        number => number.parse()?,
    })
}

/// Whether reads can be told to leave nothing in the cache, as far as that is known.
fn has_uncached_reads(folder: &Path) -> Result<bool> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let parts = release.trim().split(['.', '-']);
    let version: Vec<u32> = parts.map_while(|part| part.parse().ok()).collect();
    let is_known = version.first_chunk::<2>().is_some_and(|version| *version >= [6, 16]);
    let file_system = run(Command::new("stat")
        .args(["--file-system", "--format", "%T"])
        .arg(folder))?;
    Ok(is_known && matches!(file_system.trim(), "ext2/ext3" | "xfs"))
}

#[test]
fn a_backup_leaves_the_kernels_cache_as_it_was() -> Result<()> {
    if output(Command::new("fincore").arg("--version")).is_err() {
        eprintln!("there is no fincore (util-linux), which says what is in the kernel's cache");
        return Ok(());
    }
    let file_system = run(Command::new("stat").args(["--file-system", "--format", "%T", "/tmp"]))?;
    if file_system.trim() == "tmpfs" {
        eprintln!("/tmp is nowhere but in the kernel's cache");
        return Ok(());
    }
    let s = Fixture::new(
        "cache",
        Shape {
            settings: "autovacuum = off\n",
            ..Default::default()
        },
    )?;
    let mut files: Vec<PathBuf> = Vec::new();
    for table in ["warm", "cold", "mixed"] {
        s.sql(&format!(
            "create table {table} as select i, md5(i::text) from generate_series(1, 200000) i"
        ))?;
        let path = s.sql(&format!("select pg_relation_filepath('{table}')"))?;
        files.push(s.server.data.join(path));
    }
    // Hints and all: nobody writes to these files any more.
    s.sql("vacuum (freeze) warm, cold, mixed")?;
    s.sql("checkpoint")?;
    for file in &files {
        // Synced, so that nothing must stay, and dropped.
        let of = format!("of={}", file.display());
        run(Command::new("dd").args([
            of.as_str(),
            "if=/dev/null",
            "oflag=nocache",
            "conv=notrunc,fdatasync",
            "count=0",
        ]))?;
        ensure!(
            cached(file)? == 0,
            "{} cannot be taken out of the cache",
            file.display()
        );
    }
    let [warm, cold, mixed] = &files[..] else {
        anyhow::bail!("{files:?}")
    };
    let size = std::fs::metadata(warm)?.len();
    std::fs::read(warm)?;
    std::fs::read(mixed)?;
    // The first page of each chunk goes; the others are those that the server uses.
    let chunks = size.div_ceil(512 << 10);
    for chunk in 0..chunks {
        let (from, skip) = (format!("if={}", mixed.display()), format!("skip={}", chunk * 64));
        run(Command::new("dd").args([
            from.as_str(),
            "of=/dev/null",
            "iflag=nocache",
            "bs=8K",
            "count=1",
            &skip,
        ]))?;
    }
    let before = [cached(warm)?, cached(cold)?, cached(mixed)?];
    ensure!(
        before[0] >= size && before[1] == 0 && (size / 2..size).contains(&before[2]),
        "{before:?} of {size}"
    );
    s.backup_id(&["--source", "local"])?;
    let after = [cached(warm)?, cached(cold)?, cached(mixed)?];
    ensure!(after[0] >= before[0], "what was there is gone: {before:?}, {after:?}");
    // Without uncached reads, a few pages may stay.
    ensure!(
        after[1] <= size / 16,
        "what was not there has come: {before:?}, {after:?}"
    );
    if has_uncached_reads(s.scratch.path())? {
        ensure!(after == before, "{before:?}, {after:?}");
    } else {
        eprintln!("what becomes of files of which some pages are cached is not tested on this kernel");
    }
    Ok(())
}
