//! The main job with every supported version: back up under load, recover to exact moments, and let
//! PostgreSQL's own tools judge the result.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::field;
use fairvault_tests::server::sid_program;
use fairvault_tests::{Fixture, Server, Shape, run, tools};

/// A server that archives into a stanza, with what makes backups hard: tablespaces, unlogged and toasted
/// tables, empty files, many small ones.
struct Cluster(Fixture);

impl std::ops::Deref for Cluster {
    type Target = Fixture;
    fn deref(&self) -> &Fixture {
        &self.0
    }
}

impl Cluster {
    fn new(major: u32) -> Result<Self> {
        let shape = Shape {
            major,
            archiving: true,
            settings: "allow_in_place_tablespaces = on\n",
            ..Default::default()
        };
        Ok(Self(Fixture::new(&format!("v{major}"), shape)?))
    }

    fn fill(&self) -> Result<()> {
        for space in ["ts1", "ts2"] {
            run(self.scratch.command("mkdir").arg(self.path(space)))?;
            self.sql(&format!("create tablespace {space} location '{}'", self.path(space)))?;
        }
        self.sql("create tablespace inplace location ''")?;
        self.sql("create table in_place (x int) tablespace inplace")?;
        self.sql("insert into in_place select generate_series(1, 1000)")?;
        self.sql(
            "create table a tablespace ts1 as select i, repeat(md5(i::text), 3) as t from generate_series(1, 20000) i",
        )?;
        self.sql("create index on a (i) tablespace ts2")?;
        self.sql("create table toasted as select i, string_agg(md5((i * j)::text), '') as t from generate_series(1, 50) i, generate_series(1, 500) j group by i")?;
        self.sql("create unlogged table volatile as select generate_series(1, 1000) as x")?;
        self.sql("create table empty (x int)")?;
        self.sql("create table marker (n bigserial primary key, at timestamptz default clock_timestamp())")?;
        self.sql("create database other")?;
        self.server.sql_in(
            &self.scratch,
            "other",
            "create table o as select generate_series(1, 100) as x",
        )?;
        Ok(())
    }

    fn mark(&self) -> Result<i64> {
        Ok(self
            .sql("insert into marker default values returning n")?
            .lines()
            .next()
            .context("a marker")?
            .parse()?)
    }

    /// Restores with every tablespace mapped.
    fn restored(&self, name: &str, arguments: &[&str]) -> Result<()> {
        let map = format!("all={}", self.path(&format!("{name}-spaces")));
        let mut all = vec!["--tablespace-map", &map];
        all.extend(arguments);
        let (exit, text) = self.restore(name, &all);
        ensure!(exit == 0, "{name}: {text}");
        Ok(())
    }

    /// Restores, starts the copy, waits for the end of recovery.
    fn recovered(&self, name: &str, port: u16, arguments: &[&str]) -> Result<Server> {
        self.restored(name, arguments)?;
        self.start(name, port)
    }

    fn markers(&self, server: &Server) -> Result<(i64, i64)> {
        let out = server.sql(&self.scratch, "select coalesce(max(n), 0), count(*) from marker")?;
        let (max, count) = out.split_once('|').context("two numbers")?;
        Ok((max.parse()?, count.parse()?))
    }

    /// All databases as SQL; 15's pg_dump for servers up to 15, COPY for the others.
    fn contents(&self, server: &Server) -> Result<String> {
        let list = "select string_agg(format('%I.%I', schemaname, tablename), ' ' order by schemaname, tablename) from pg_tables \
                    where schemaname = 'public' and tablename <> 'volatile'";
        let mut out = String::new();
        for database in ["postgres", "other"] {
            if server.major() <= 15 {
                let mut dump = self.scratch.command(tools::bin(15).join("pg_dump"));
                dump.args([
                    "-U",
                    "postgres",
                    "--no-unlogged-table-data",
                    "-p",
                    &server.port.to_string(),
                    "-d",
                    database,
                    "-h",
                ])
                .arg(self.scratch.path());
                // pg_dump writes a random token around its output; sequences may jump by 32 in a recovery.
                let noise = |line: &&str| {
                    !["\\restrict", "\\unrestrict", "SELECT pg_catalog.setval"]
                        .iter()
                        .any(|n| line.starts_with(n))
                };
                out += &run(&mut dump)?.lines().filter(noise).collect::<Vec<_>>().join("\n");
            }
            for table in server.sql_in(&self.scratch, database, list)?.split(' ') {
                let digest = format!(
                    "select '{table}', count(*), md5(string_agg(t::text, ',' order by t::text)) from {table} t"
                );
                out += &server.sql_in(&self.scratch, database, &digest)?;
                out.push('\n');
            }
        }
        Ok(out)
    }

    fn judge(&self, server: &Server) -> Result<()> {
        let bin = tools::bin(15);
        let socket = self.scratch.path().display().to_string();
        let port = server.port.to_string();
        // pg_amcheck works across versions.
        run(self.scratch.command(bin.join("pg_amcheck")).args([
            "-U",
            "postgres",
            "-h",
            &socket,
            "-p",
            &port,
            "-a",
            "--install-missing",
            "--heapallindexed",
        ]))?;
        server.stop(&self.scratch, "fast")?;
        if server.major() <= 16 {
            // 15's tool looks for its own version's folder in tablespaces.
            for space in std::fs::read_dir(server.data.join("pg_tblspc"))? {
                let space = space?.path();
                let own = std::fs::read_dir(&space)?
                    .next()
                    .context("a folder in the tablespace")??
                    .file_name();
                if !own.to_string_lossy().starts_with("PG_15_") {
                    std::os::unix::fs::symlink(own, space.join("PG_15_202209061"))?;
                }
            }
            run(self
                .scratch
                .command(bin.join("pg_checksums"))
                .arg("--check")
                .arg("-D")
                .arg(&server.data))?;
        } else if tools::is_full() {
            run(sid_program(server.major(), "pg_checksums")
                .arg("--check")
                .arg("-D")
                .arg(&server.data))?;
        }
        Ok(())
    }

    fn verify_backup(&self, directory: &std::path::Path) -> Result<()> {
        let mut command = match self.server.major() {
            ..=16 => self.scratch.command(tools::bin(15).join("pg_verifybackup")),
            major if tools::is_full() => sid_program(major, "pg_verifybackup"),
            _ => return Ok(()),
        };
        run(command.arg("-n").arg(directory))?;
        Ok(())
    }
}

fn whole_story(major: u32) -> Result<()> {
    let c = Cluster::new(major)?;
    c.fill()?;
    run(&mut c.server.pgbench(&c.scratch, &["-i", "-q", "-s", "3"]))?;
    c.mark()?;
    let mut load = c.server.pgbench(&c.scratch, &["-n", "-c", "2", "-T", "60"]);
    let mut load = load
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let json = ["--fast", "--progress", "none", "--output", "json"];
    let take = |more: &[&str]| c.ok(&[&["backup", "acme"], &json[..], more].concat());
    let backup = take(&["--source", "stream"])?;
    ensure!(backup.contains("\"wal_method\":\"archive\""), "{backup}");
    // Databases come and go while the next backup runs; most of its content is known by now.
    let churn = std::thread::scope(|scope| -> Result<String> {
        let making = scope.spawn(|| -> Result<()> {
            for i in 0..4 {
                c.sql(&format!("create database d{i}"))?;
                if i % 2 == 0 {
                    c.sql(&format!("drop database d{i}"))?;
                }
            }
            Ok(())
        });
        let out = take(&["--source", "local", "--wal", "stream", "--max-rate", "200MiB"]);
        making.join().map_err(|_| anyhow::anyhow!("churn panicked"))??;
        out
    })?;
    ensure!(churn.contains("\"wal_method\":\"stream\""), "{churn}");
    // The newest, from which most of what follows is recovered.
    take(&["--source", "sql"])?;

    // Moments, each between two markers.
    let first = c.mark()?;
    let time = c.sql("select clock_timestamp()")?;
    std::thread::sleep(std::time::Duration::from_millis(50));
    let second = c.mark()?;
    c.sql("select pg_create_restore_point('before-third')")?;
    c.mark()?;
    let xid_marker = c.sql("begin; insert into marker default values returning n, pg_current_xact_id(); commit")?;
    let (xid_n, xid) = xid_marker
        .lines()
        .nth(1)
        .and_then(|l| l.split_once('|'))
        .context("n and xid")?;
    let lsn = c.sql("select pg_current_wal_insert_lsn()")?;
    let after_lsn = c.mark()?;
    let _ = load.kill();
    load.wait()?;
    c.server.wait_for(
        &c.scratch,
        "select count(*) from pg_stat_activity where application_name = 'pgbench'",
        "0",
    )?;
    let quiet = c.contents(&c.server)?;
    let last = c.mark()?;
    c.sql("delete from marker where n = (select max(n) from marker)")?;
    c.sql("select pg_switch_wal()")?;
    c.server.wait_for(
        &c.scratch,
        "select last_archived_wal >= pg_walfile_name(pg_current_wal_lsn() - 1) from pg_stat_archiver",
        "t",
    )?;

    // A time: the marker before it is there, the one after it is not.
    let by_time = c.recovered("by-time", 5440, &["--target-time", &time])?;
    ensure!(
        c.markers(&by_time)?.0 == first,
        "time {time}: {:?}, expected {first}",
        c.markers(&by_time)?
    );
    c.judge(&by_time)?;
    let by_name = c.recovered(
        "by-name",
        5441,
        &["--target-name", "before-third", "--backup", &field(&churn, "id")?],
    )?;
    ensure!(
        c.markers(&by_name)?.0 == second,
        "name: {:?}, expected {second}",
        c.markers(&by_name)?
    );
    drop(by_name);
    let by_xid = c.recovered("by-xid", 5442, &["--target-xid", xid])?;
    ensure!(
        c.markers(&by_xid)?.0.to_string() == xid_n,
        "xid: {:?}, expected {xid_n}",
        c.markers(&by_xid)?
    );
    drop(by_xid);
    let before_xid = c.recovered("before-xid", 5443, &["--target-xid", xid, "--target-exclusive"])?;
    ensure!(
        c.markers(&before_xid)?.0 == xid_n.parse::<i64>()? - 1,
        "exclusive xid: {:?}",
        c.markers(&before_xid)?
    );
    drop(before_xid);
    let by_lsn = c.recovered("by-lsn", 5444, &["--target-lsn", &lsn])?;
    ensure!(c.markers(&by_lsn)?.0 < after_lsn, "lsn: {:?}", c.markers(&by_lsn)?);
    drop(by_lsn);

    // The end of everything, from the older backup: the same content, file for table.
    let id = field(&backup, "id")?;
    c.restored("latest", &["--backup", &id])?;
    c.verify_backup(&c.scratch.join("latest"))?;
    let copy = c.start("latest", 5445)?;
    let restored = c.contents(&copy)?;
    ensure!(
        restored == quiet,
        "the restored copy differs from the source:\n{restored}\n---\n{quiet}"
    );
    ensure!(c.markers(&copy)?.0 == last - 1);
    ensure!(
        copy.sql(&c.scratch, "select count(*) from volatile")? == "0",
        "unlogged tables come back empty"
    );
    ensure!(copy.sql(&c.scratch, "show archive_mode")? == "off");
    for space in ["ts1", "ts2"] {
        let location = copy.sql(
            &c.scratch,
            &format!("select pg_tablespace_location(oid) from pg_tablespace where spcname = '{space}'"),
        )?;
        ensure!(location.starts_with(&c.path("latest-spaces")), "{location}");
    }
    c.judge(&copy)?;
    ensure!(
        c.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?
            .contains("all good")
    );
    Ok(())
}

macro_rules! versions {
    ($($name:ident = $major:literal),*) => {
        $(#[test] fn $name() -> Result<()> { whole_story($major) })*
    };
}

versions!(
    postgresql_14 = 14,
    postgresql_15 = 15,
    postgresql_16 = 16,
    postgresql_17 = 17,
    postgresql_18 = 18
);

#[test]
fn postgresql_19() -> Result<()> {
    // Needs the Debian folder of the full run.
    if !tools::is_full() {
        eprintln!("PostgreSQL 19 is part of `cargo xtask test --full`");
        return Ok(());
    }
    whole_story(19)
}
