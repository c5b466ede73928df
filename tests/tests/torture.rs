//! Whatever a server does between and during backups, every backup that was built on another one is, page by page, what
//! PostgreSQL's own replay of all WAL makes of the first full backup.
//!
//! Seeded: `FAIRVAULT_TORTURE_SEED` and `FAIRVAULT_TORTURE_ROUNDS`; every failure names the seed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fairvault_tests::dice::{Dice, number};
use fairvault_tests::fixture::field;
use fairvault_tests::physical::differences;
use fairvault_tests::{Fixture, Server, Shape, code, run, tools};

const TABLES: u64 = 4;
const DATABASES: u64 = 2;

struct Torture {
    s: Fixture,
    dice: Dice,
    /// Which tables there are.
    tables: Vec<bool>,
    databases: Vec<bool>,
    /// Names of prepared transactions.
    prepared: Vec<String>,
    /// The first full backup, recovered by replay alone up to the last restore point.
    truth: Option<Server>,
    /// A standby, from the first backup of it on.
    standby: Option<Server>,
    points: u32,
    incremental: u32,
    /// A deliberate bug in what archives and backs up.
    fault: &'static str,
}

impl Torture {
    fn new(major: u32, seed: u64, fault: &'static str) -> Result<Self> {
        let s = Fixture::new(
            &format!("torture{major}"),
            Shape {
                major,
                archiving: true,
                settings: "max_prepared_transactions = 5\nmax_wal_size = 64MB\nautovacuum_naptime = 1s\nwal_keep_size = 64MB\n",
                initdb: if seed.is_multiple_of(3) {
                    &["--wal-segsize=1", "--no-locale"]
                } else {
                    &["-k", "--wal-segsize=1"]
                },
                ..Default::default()
            },
        )?;
        let push = format!("{} {} wal push acme %p", s.path("fairvault"), s.options.join(" "));
        s.sql(&format!(
            "alter system set archive_command = 'env \"FAIRVAULT_FAULT={}\" {push}'",
            fault.replace('\'', "''")
        ))?;
        s.sql("select pg_reload_conf()")?;
        run(s.scratch.command("mkdir").arg(s.path("ts")))?;
        s.sql(&format!("create tablespace ts location '{}'", s.path("ts")))?;
        s.sql("create sequence numbers; create table los (id oid)")?;
        s.sql("create table wide (id int, t text); alter table wide alter t set storage plain")?;
        s.sql("create table busy (id int primary key, n int, t text) with (fillfactor = 70)")?;
        s.sql("insert into busy select i, 0, repeat('x', 100) from generate_series(1, 3000) i")?;
        Ok(Self {
            s,
            dice: Dice(seed),
            tables: vec![false; TABLES as usize],
            databases: vec![false; DATABASES as usize],
            prepared: Vec::new(),
            truth: None,
            standby: None,
            points: 0,
            incremental: 0,
            fault,
        })
    }

    fn sql(&self, sql: &str) -> Result<String> {
        println!("    {sql}");
        self.s.sql(sql)
    }

    /// Something happens.
    fn step(&mut self) -> Result<()> {
        if self.dice.roll(5) == 0 {
            return self.crowd();
        }
        let n = self.dice.roll(TABLES) as usize;
        let t = format!("t{n}");
        if !self.tables[n] {
            self.tables[n] = true;
            let space = ["", "tablespace ts"][self.dice.roll(2) as usize];
            let kind = ["", "", "unlogged"][self.dice.roll(3) as usize];
            self.sql(&format!(
                "create {kind} table {t} (id bigserial, a int, b text, c jsonb, p point, d timestamptz default now()) {space}"
            ))?;
            for index in [
                "btree (a)",
                "hash (b)",
                "gin (c)",
                "gist (p)",
                "brin (id)",
                "spgist (b)",
                "btree (b, d)",
            ] {
                if self.dice.roll(2) == 0 {
                    self.sql(&format!("create index on {t} using {index}"))?;
                }
            }
            return self.grow(&t);
        }
        let part = 1 + self.dice.roll(30);
        let what = match self.dice.roll(26) {
            0..=4 => return self.grow(&t),
            5 | 6 => format!("update {t} set b = b || 'u' where id % {part} = 0"),
            7 | 8 => format!("update {t} set a = a + 1, p = point(a, id) where id % {part} = 0"),
            9 => format!("delete from {t} where id % {part} = 0"),
            10 => format!("delete from {t} where id > (select max(id) / 2 from {t})"),
            11 => format!("vacuum {t}"),
            12 => format!("vacuum (freeze) {t}"),
            13 => format!("vacuum full {t}"),
            14 => format!("truncate {t}"),
            15 => format!("reindex table {t}"),
            16 => {
                self.tables[n] = false;
                format!("drop table {t}")
            }
            17 => format!(
                "alter table {t} set tablespace {}",
                self.dice.pick(&["ts", "pg_default"])
            ),
            18 => format!("alter table {t} set {}", self.dice.pick(&["logged", "unlogged"])),
            19 => return self.database(),
            20 => return self.transactions(&t),
            21 => "select nextval('numbers') from generate_series(1, 100)".to_owned(),
            22 => "insert into los select lo_from_bytea(0, repeat('lo', 5000)::bytea) from generate_series(1, 5)"
                .to_owned(),
            23 => "select lo_unlink(id) from los where id::bigint % 2 = 0; delete from los where id::bigint % 2 = 0"
                .to_owned(),
            24 => "checkpoint".to_owned(),
            _ => return self.crash(),
        };
        self.sql(&what).map(drop)
    }

    /// Many at once fill a table, or it is cut to nothing. Where many wait for room, the server adds more of it than
    /// anybody uses at once: pages of zeros that no WAL names.
    fn crowd(&mut self) -> Result<()> {
        if self.dice.roll(3) == 0 {
            self.sql("delete from wide")?;
            return self.sql("vacuum wide").map(drop);
        }
        println!("    a crowd");
        let script = b"insert into wide select i, repeat('w', 1900) from generate_series(1, 10) i;\n";
        let script = self.s.scratch.write("crowd.sql", script)?.display().to_string();
        let times = (1 + self.dice.roll(20)).to_string();
        let arguments = ["-n", "-f", &script, "-c", "8", "-j", "2", "-t", &times];
        run(&mut self.s.server.pgbench(&self.s.scratch, &arguments)).map(drop)
    }

    fn grow(&mut self, t: &str) -> Result<()> {
        let rows = 10 + self.dice.roll(3000);
        let wide = ["", "|| repeat(md5((i * 7)::text), 100)"][(self.dice.roll(6) == 0) as usize];
        let rows = if wide.is_empty() { rows } else { rows / 20 + 1 };
        let select = format!(
            "select i % 97, md5(i::text) {wide}, json_build_object('k', i % 13, 'v', md5(i::text))::jsonb, point(i % 100, i) \
             from generate_series(1, {rows}) i"
        );
        // COPY extends by many pages at a time.
        match self.dice.roll(2) {
            0 => self.sql(&format!("insert into {t} (a, b, c, p) {select}")).map(drop),
            _ => {
                let file = self.s.path("rows");
                self.sql(&format!("copy ({select}) to '{file}'"))?;
                self.sql(&format!("copy {t} (a, b, c, p) from '{file}'")).map(drop)
            }
        }
    }

    fn database(&mut self) -> Result<()> {
        let n = self.dice.roll(DATABASES) as usize;
        if self.databases[n] && self.dice.roll(3) == 0 {
            self.databases[n] = false;
            return self.sql(&format!("drop database d{n}")).map(drop);
        }
        if self.databases[n] && self.dice.roll(3) == 0 {
            let space = self.dice.pick(&["ts", "pg_default"]);
            self.sql(&format!("alter database d{n} set tablespace {space}"))?;
            // That the old folder is gone is logged after the commit, and a crash may lose it.
            return self.sql("checkpoint").map(drop);
        }
        if !self.databases[n] {
            self.databases[n] = true;
            let strategy = match self.s.server.major() >= 15 {
                true => format!("strategy {}", self.dice.pick(&["wal_log", "file_copy"])),
                false => String::new(),
            };
            self.s
                .sql(&format!("create database d{n} template template0 {strategy}"))?;
        }
        let name = format!("x{}", self.dice.roll(1000));
        let make =
            format!("create table if not exists {name} as select i, md5(i::text) from generate_series(1, 2000) i");
        self.s.server.sql_in(&self.s.scratch, &format!("d{n}"), &make).map(drop)
    }

    /// Transactions that end in unusual ways.
    fn transactions(&mut self, t: &str) -> Result<()> {
        if let Some(name) = self.prepared.pop() {
            let end = self.dice.pick(&["commit", "rollback"]);
            return self.sql(&format!("{end} prepared '{name}'")).map(drop);
        }
        let number = self.dice.roll(1_000_000);
        let what = match self.dice.roll(4) {
            0 => {
                self.prepared.push(format!("p{number}"));
                format!(
                    "begin; create table q{number} as select generate_series(1, 500) as i; \
                     insert into busy values (10000 + {number}, 1, 'p'); prepare transaction 'p{number}'"
                )
            }
            1 => format!(
                "begin; truncate {t}; create table q{number} as select generate_series(1, 500) as i; \
                 insert into {t} (a, b) select i, 'aborted' from generate_series(1, 2000) i; rollback"
            ),
            2 => format!(
                "begin; insert into {t} (a, b) select i, 'one' from generate_series(1, 200) i; savepoint s; truncate {t}; \
                 insert into {t} (a, b) select i, 'two' from generate_series(1, 900) i; rollback to s; \
                 insert into {t} (a, b) select i, 'three' from generate_series(1, 200) i; commit"
            ),
            _ => format!(
                "begin; truncate {t}; insert into {t} (a, b) select i, 'anew' from generate_series(1, 700) i; commit"
            ),
        };
        self.sql(&what).map(drop)
    }

    fn crash(&mut self) -> Result<()> {
        self.s.server.stop(&self.s.scratch, "immediate")?;
        self.s.server.start(&self.s.scratch)
    }

    /// A standby that has replayed what there is, and made a restartpoint of it; how to connect to it.
    fn catch_up(&mut self) -> Result<String> {
        let s = &self.s;
        let standby = match &self.standby {
            Some(standby) => standby,
            None => {
                println!("    a standby");
                let map = format!("all={}", s.path("standby-ts"));
                let server = s.standby("standby", 5462, &["--tablespace-map", &map], "")?;
                self.standby.insert(server)
            }
        };
        s.sql("checkpoint")?;
        let at = s.sql("select pg_current_wal_lsn()")?;
        standby.wait_for(&s.scratch, &format!("select pg_last_wal_replay_lsn() >= '{at}'"), "t")?;
        standby.sql(&s.scratch, "checkpoint")?;
        Ok(standby.conninfo())
    }

    /// Small changes all the time, while a backup is taken.
    fn load(&self) -> Result<Child> {
        let script = self.s.scratch.write(
            "load.sql",
            b"\\set i random(1, 3000)\nupdate busy set n = n + 1 where id = :i;\ndelete from busy where id = :i + 3000;\ninsert into busy values (:i + 3000, 1, repeat('y', 50)) on conflict do nothing;\n",
        )?;
        let script = script.display().to_string();
        let mut command = self
            .s
            .server
            .pgbench(&self.s.scratch, &["-n", "-f", &script, "-c", "2", "-T", "600"]);
        Ok(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
    }

    fn round(&mut self) -> Result<()> {
        for _ in 0..3 + self.dice.roll(8) {
            self.step()?;
        }
        let kind = match self.truth {
            None => "full",
            Some(_) => self.dice.pick(&["incr", "incr", "incr", "diff"]),
        };
        let source = *self.dice.pick(&["local", "sql", "stream"]);
        let is_of_standby = self.truth.is_some() && self.dice.roll(5) == 0;
        let of_standby = match is_of_standby {
            true => Some(self.catch_up()?),
            false => None,
        };
        let mut load = self.load()?;
        std::thread::sleep(Duration::from_millis(100 + self.dice.roll(400)));
        // Now and then, somebody else takes one at the same time.
        let other = match self.truth.is_some() && self.dice.roll(4) == 0 {
            true => {
                let source = *self.dice.pick(&["local", "sql", "stream"]);
                Some(self.backup("incr", source))
            }
            false => None,
        };
        let other = other.map(|mut command| command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn());
        let other = other.transpose()?;
        let mut command = self.backup(kind, source);
        if let Some(conninfo) = &of_standby {
            command.args(["--conninfo", conninfo]);
        }
        let taken = code(&mut command);
        let other = other.map(Child::wait_with_output).transpose()?;
        let _ = load.kill();
        load.wait()?;
        let mut ids = vec![self.taken(kind, source, taken)?];
        if let Some(output) = other {
            let (exit, text) = (output.status.code().unwrap_or(-1), fairvault_tests::text(&output));
            ids.push(self.taken("incr", "beside it", (exit, text))?);
        }
        // Whoever works on goes on before the moment of comparison, or not.
        for _ in 0..self.dice.roll(3) {
            self.step()?;
        }
        self.points += 1;
        let point = format!("point{}", self.points);
        // A server that shuts down in recovery writes its pages out only if it has seen a checkpoint.
        self.sql("checkpoint")?;
        let at = self.sql(&format!("select pg_create_restore_point('{point}')"))?;
        println!("  {point} at {at}");
        self.s.flush_archive(&self.s.server)?;
        self.compare(&ids, &point)
    }

    /// A backup that somebody takes.
    fn backup(&self, kind: &str, source: &str) -> Command {
        let mut command = self.s.scratch.command("env");
        command
            .arg(format!("HOME={}", self.s.path("")))
            .arg(format!("FAIRVAULT_FAULT={}", self.fault))
            .arg(self.s.path("fairvault"))
            .args(&self.s.options)
            .args(["backup", "acme", "--fast", "--progress", "none", "--output", "json"])
            .args(["--type", kind, "--source", source]);
        command
    }

    /// Its id, once it was taken.
    fn taken(&mut self, kind: &str, source: &str, (exit, text): (i32, String)) -> Result<String> {
        ensure!(exit == 0, "{exit} {text}");
        let id = field(&text, "id")?;
        let has_parent = !field(&text, "parent")?.is_empty();
        self.incremental += u32::from(has_parent);
        println!(
            "  {kind} from {source}: {id}, {} to {}, {} read, {} stored",
            field(&text, "start_lsn")?,
            field(&text, "stop_lsn")?,
            field(&text, "read_bytes")?,
            field(&text, "new_stored_bytes")?
        );
        ensure!(has_parent == (kind != "full"), "{text}");
        Ok(id)
    }

    fn compare(&mut self, ids: &[String], point: &str) -> Result<()> {
        let s = &self.s;
        let restored = |name: &str, port, id: &str| -> Result<Server> {
            let target = ["--target-name", point, "--target-action", "shutdown", "--backup", id];
            let map = format!("all={}", s.path(&format!("{name}-ts")));
            let (exit, text) = s.restore(name, &[&target[..], &["--tablespace-map", &map]].concat());
            ensure!(exit == 0, "{text}");
            Ok(s.copy(name, port))
        };
        if self.truth.is_none() {
            let truth = restored("truth", 5460, &ids[0])?;
            recover(s, &truth)?;
            self.truth = Some(truth);
            return Ok(());
        }
        let truth = self.truth.as_ref().context("a truth")?;
        let auto = truth.data.join("postgresql.auto.conf");
        let text = std::fs::read_to_string(&auto)?;
        // Its first restore planned no further than to its first target.
        let get = format!("{} {} wal get acme %f %p", s.path("fairvault"), s.options.join(" "));
        let with_point = text.lines().map(|line| match line.split(' ').next() {
            Some("recovery_target_name") => format!("recovery_target_name = '{point}'"),
            Some("restore_command") => format!("restore_command = '{get}'"),
            _ => line.to_owned(),
        });
        std::fs::write(&auto, with_point.collect::<Vec<_>>().join("\n") + "\n")?;
        recover(s, truth)?;
        for id in ids {
            let copy = restored("copy", 5461, id)?;
            verify(s, &copy)?;
            recover(s, &copy)?;
            let found = differences(&truth.data, &copy.data, 10)?;
            ensure!(
                found.is_empty(),
                "backup {id} differs from what replay makes:\n{}",
                found.join("\n")
            );
            look_inside(s, &copy).with_context(|| format!("backup {id}"))?;
            for name in ["copy", "copy-ts"] {
                let _ = std::fs::remove_dir_all(s.scratch.join(name));
            }
        }
        Ok(())
    }
}

/// What PostgreSQL's own tools say of a copy that was recovered: tables and indexes agree, and everything can be read.
fn look_inside(s: &Fixture, copy: &Server) -> Result<()> {
    // Other versions here come without these tools, or without amcheck.
    if copy.major() != 15 {
        return Ok(());
    }
    s.configure("copy", "recovery_target_action = 'promote'\n")?;
    copy.start(&s.scratch)?;
    copy.wait_for(&s.scratch, "select pg_is_in_recovery()", "f")?;
    let host = s.path("");
    let tool = |name: &str, arguments: &[&str]| {
        let mut command = copy.program(&s.scratch, name);
        let port = copy.port.to_string();
        run(command
            .args(["-h", &host, "-p", &port, "-U", "postgres"])
            .args(arguments))
    };
    tool(
        "pg_amcheck",
        &["--all", "--install-missing", "--heapallindexed", "--parent-check"],
    )?;
    let dump = tool("pg_dumpall", &[])?;
    ensure!(
        dump.contains("PostgreSQL database cluster dump complete"),
        "the dump ends early"
    );
    copy.stop(&s.scratch, "immediate")
}

/// Recovers to the target, where the server shuts down.
fn recover(s: &Fixture, server: &Server) -> Result<()> {
    server.try_start(&s.scratch, false)?;
    let began = Instant::now();
    std::thread::sleep(Duration::from_millis(300));
    while server.data.join("postmaster.pid").exists() {
        ensure!(
            began.elapsed() < Duration::from_secs(120),
            "recovery does not end\n{}",
            server.log_text()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let log = server.log_text();
    match log.contains("FATAL") || log.contains("PANIC") {
        true => bail!("{log}"),
        false => Ok(()),
    }
}

/// The restored files against the `backup_manifest` that the restore wrote, where there is a tool for it.
fn verify(s: &Fixture, copy: &Server) -> Result<()> {
    if copy.major() > 16 || !Path::new(&copy.data.join("backup_manifest")).exists() {
        return Ok(());
    }
    let tool = tools::bin(15).join("pg_verifybackup");
    run(s.scratch.command(tool).arg("-n").arg(&copy.data)).map(drop)
}

fn torture(major: u32) -> Result<()> {
    let seed = number("FAIRVAULT_TORTURE_SEED", 1);
    let rounds = number("FAIRVAULT_TORTURE_ROUNDS", if tools::is_full() { 20 } else { 5 });
    let mut torture = Torture::new(major, seed, "")?;
    for round in 0..=rounds {
        println!("round {round}");
        torture
            .round()
            .with_context(|| format!("version {major}, seed {seed}, round {round}"))?;
    }
    ensure!(torture.incremental > 0, "no backup was built on another one");
    let text = torture
        .s
        .ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    ensure!(text.contains("all good"), "{text}");
    Ok(())
}

/// A tracker with a bug is found out: by a page that is newer than its map, or by the comparison.
fn planted(fault: &'static str) -> Result<()> {
    let mut torture = Torture::new(15, 4, fault)?;
    for round in 0..20 {
        let Err(error) = torture.round() else { continue };
        let text = format!("{error:#}");
        ensure!(
            text.contains("differs from what replay makes") || text.contains("ALARM"),
            "round {round}: {text}"
        );
        return Ok(());
    }
    bail!("nobody noticed")
}

#[test]
fn a_tracker_that_passes_over_a_kind_of_record_is_found_out() -> Result<()> {
    planted("no btree")
}

#[test]
fn a_tracker_that_begins_at_the_parents_stop_is_found_out() -> Result<()> {
    planted("parent's stop")
}

#[test]
fn every_backup_of_19_is_what_replay_makes() -> Result<()> {
    if !tools::is_full() {
        eprintln!("PostgreSQL 19 is part of `cargo xtask test --full` and of `cargo xtask torture`");
        return Ok(());
    }
    tools::install_sid()?;
    torture(19)
}

#[test]
fn every_backup_of_14_is_what_replay_makes() -> Result<()> {
    torture(14)
}

#[test]
fn every_backup_of_15_is_what_replay_makes() -> Result<()> {
    torture(15)
}

#[test]
fn every_backup_of_16_is_what_replay_makes() -> Result<()> {
    torture(16)
}

#[test]
fn every_backup_of_17_is_what_replay_makes() -> Result<()> {
    torture(17)
}

#[test]
fn every_backup_of_18_is_what_replay_makes() -> Result<()> {
    torture(18)
}
