//! Whatever a server does between and during backups, every backup that was built on another one is, page by page, what
//! PostgreSQL's own replay of all WAL makes of the first full backup; and, where the server stands still, what its own
//! files are.
//!
//! Each one is restored and recovered twice. Once to its stop, as it is by itself: nothing that comes later hides what
//! it lacks. A physical copy of the server, which the first full backup was restored to, is replayed to the same LSN.
//! Where the server stands still, one more backup is taken, and no page changes from its beginning on: it is also
//! compared with the server's own files at that LSN. And once to a restore point after more work, where PostgreSQL's
//! own tools judge one of the copies.
//!
//! Seeded: `FAIRVAULT_TORTURE_SEED` and `FAIRVAULT_TORTURE_ROUNDS`; every failure names the seed.

mod copies;
mod steps;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fairvault_tests::dice::{Dice, number};
use fairvault_tests::fixture::field;
use fairvault_tests::physical::differences;
use fairvault_tests::server::sid_program;
use fairvault_tests::{Fixture, Server, Shape, code, run, tools};

const TABLES: u64 = 4;
const DATABASES: u64 = 2;
const SOURCES: [&str; 3] = ["local", "sql", "stream"];
/// Of every access method; bloom is an extension, whose pages are logged by generic records. None that is packaged has a
/// resource manager of its own.
const INDEXES: [&str; 8] = [
    "btree (a)",
    "hash (b)",
    "gin (c)",
    "gist (p)",
    "brin (id)",
    "spgist (b)",
    "btree (b, d)",
    "bloom (a)",
];

/// What a round is about, besides its backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// The first full backup.
    First,
    /// Nothing else.
    Nothing,
    /// Another full backup, on which later ones build.
    Full,
    /// A standby stands still while the primary goes on, and both are backed up.
    Lag,
    /// The standby becomes the primary: everything is read, and then backups build on each other again.
    Promotion,
    /// The server stops at the moment of comparison, and its own files are compared.
    Still,
}

/// In five rounds, each comes up once; versions begin with different ones.
const OCCASIONS: [Occasion; 5] = [
    Occasion::Nothing,
    Occasion::Full,
    Occasion::Lag,
    Occasion::Promotion,
    Occasion::Still,
];

/// A backup that was taken.
struct Taken {
    id: String,
    parent: String,
    /// The LSN from which on it is consistent.
    stop: String,
}

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
    /// How many there were; the newest has this number in its name.
    standbys: u32,
    /// The primary's folder of the tablespace.
    space: PathBuf,
    /// The primary's timeline.
    timeline: u32,
    /// No backup of this timeline is there to build on.
    is_new_timeline: bool,
    /// The newest backup that was built on nothing.
    base: String,
    points: u32,
    incremental: u32,
    /// A deliberate bug in what archives and backs up.
    fault: &'static str,
}

impl Torture {
    fn new(major: u32, seed: u64, fault: &'static str) -> Result<Self> {
        // Without checksums, hints are set without WAL. One seed of three, and with each seed some versions.
        let has_checksums = !(seed + u64::from(major)).is_multiple_of(3);
        let initdb: &[&str] = match (has_checksums, major) {
            (true, _) => &["-k", "--wal-segsize=1"],
            (false, ..18) => &["--wal-segsize=1", "--no-locale"],
            (false, _) => &["--no-data-checksums", "--wal-segsize=1", "--no-locale"],
        };
        let s = Fixture::new(
            &format!("torture{major}"),
            Shape {
                major,
                archiving: true,
                settings: "max_prepared_transactions = 5\nmax_wal_size = 64MB\nautovacuum_naptime = 1s\nwal_keep_size = 64MB\n",
                initdb,
                ..Default::default()
            },
        )?;
        let checksums = s.sql("show data_checksums")?;
        ensure!((checksums == "on") == has_checksums, "checksums are {checksums}");
        let push = format!("{} {} wal push acme %p", s.path("fairvault"), s.options.join(" "));
        s.sql(&format!(
            "alter system set archive_command = 'env \"FAIRVAULT_FAULT={}\" {push}'",
            fault.replace('\'', "''")
        ))?;
        s.sql("select pg_reload_conf()")?;
        run(s.scratch.command("mkdir").arg(s.path("ts")))?;
        s.sql(&format!("create tablespace ts location '{}'", s.path("ts")))?;
        s.sql("create extension bloom; create sequence numbers; create table los (id oid)")?;
        s.sql("create table wide (id int, t text); alter table wide alter t set storage plain")?;
        s.sql("create table cut (t text) with (autovacuum_enabled = off); alter table cut alter t set storage plain")?;
        s.sql("create table busy (id int primary key, n int, t text) with (fillfactor = 70)")?;
        s.sql("insert into busy select i, 0, repeat('x', 100) from generate_series(1, 3000) i")?;
        let space = s.scratch.join("ts");
        Ok(Self {
            s,
            dice: Dice(seed),
            tables: vec![false; TABLES as usize],
            databases: vec![false; DATABASES as usize],
            prepared: Vec::new(),
            truth: None,
            standby: None,
            standbys: 0,
            space,
            timeline: 1,
            is_new_timeline: false,
            base: String::new(),
            points: 0,
            incremental: 0,
            fault,
        })
    }

    fn sql(&self, sql: &str) -> Result<String> {
        println!("    {sql}");
        self.s.sql(sql)
    }

    /// A standby that has replayed what there is, and made a restartpoint of it; how to connect to it.
    fn catch_up(&mut self) -> Result<String> {
        let s = &self.s;
        let standby = match &self.standby {
            Some(standby) => standby,
            None => {
                self.standbys += 1;
                let name = format!("standby{}", self.standbys);
                println!("    {name}");
                let map = format!("all={}", s.path(&format!("{name}-ts")));
                let more = ["--tablespace-map", &map, "--archiving", "keep"];
                let server = s.standby(&name, 5462, &more, "wal_retrieve_retry_interval = '200ms'")?;
                self.standby.insert(server)
            }
        };
        s.sql("checkpoint")?;
        let at = s.sql("select pg_current_wal_lsn()")?;
        standby.wait_for(&s.scratch, &format!("select pg_last_wal_replay_lsn() >= '{at}'"), "t")?;
        standby.sql(&s.scratch, "checkpoint")?;
        Ok(standby.conninfo())
    }

    /// The same, and from then on it stands still while the primary goes on.
    fn fall_behind(&mut self) -> Result<String> {
        let conninfo = self.catch_up()?;
        let standby = self.standby.as_ref().context("a standby")?;
        standby.sql(&self.s.scratch, "select pg_wal_replay_pause()")?;
        standby.wait_for(&self.s.scratch, "select pg_get_wal_replay_pause_state()", "paused")?;
        for _ in 0..1 + self.dice.roll(3) {
            self.step()?;
        }
        Ok(conninfo)
    }

    /// Nothing is written any more that nobody asks for, until the next start, and what was written is archived.
    fn quiet(&self) -> Result<()> {
        let s = &self.s;
        s.sql("alter system set autovacuum = off")?;
        s.sql("select pg_reload_conf()")?;
        let busy = "select count(*) from pg_stat_activity where backend_type like 'autovacuum%' or application_name = 'pgbench'";
        s.server.wait_for(&s.scratch, busy, "0")?;
        s.sql("alter system reset autovacuum")?;
        s.flush_archive(&s.server).map(drop)
    }

    /// The primary is lost, and the standby takes its place.
    fn promote(&mut self) -> Result<()> {
        // All of its whole segments are archived, and the standby has the rest.
        self.quiet()?;
        self.catch_up()?;
        let how = *self.dice.pick(&["fast", "immediate"]);
        println!("    the primary stops ({how}), and its standby is promoted");
        let standby = self.standby.take().context("a standby")?;
        let s = &mut self.s;
        s.server.stop(&s.scratch, how)?;
        s.promote(&standby)?;
        // It goes on where everybody expects the primary.
        standby.stop(&s.scratch, "fast")?;
        // It would stop whatever runs in its folder.
        drop(standby);
        let name = format!("standby{}", self.standbys);
        let server = s.copy(&name, s.server.port);
        let old = std::mem::replace(&mut s.server, server);
        let old_space = std::mem::replace(&mut self.space, s.scratch.join(&format!("{name}-ts")));
        for folder in [&old.data, &old_space] {
            std::fs::remove_dir_all(folder)?;
        }
        s.server.start(&s.scratch)?;
        let timeline: u32 = s.sql("select timeline_id from pg_control_checkpoint()")?.parse()?;
        ensure!(timeline > self.timeline, "timeline {timeline} after {}", self.timeline);
        self.timeline = timeline;
        self.is_new_timeline = true;
        Ok(())
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

    fn occasion(&self, round: u64) -> Occasion {
        if self.truth.is_none() {
            return Occasion::First;
        }
        // A deliberate bug is found by backups that are built on each other, and these alone.
        if !self.fault.is_empty() {
            return Occasion::Nothing;
        }
        let number = round + u64::from(self.s.server.major());
        OCCASIONS[(number % OCCASIONS.len() as u64) as usize]
    }

    fn round(&mut self, round: u64) -> Result<()> {
        let occasion = self.occasion(round);
        println!("  {occasion:?}");
        self.cut(round)?;
        for _ in 0..3 + self.dice.roll(8) {
            self.step()?;
        }
        if occasion == Occasion::Promotion {
            self.promote()?;
        }
        let kind = match occasion {
            Occasion::First | Occasion::Full => "full",
            _ => *self.dice.pick(&["incr", "incr", "incr", "diff"]),
        };
        let source = *self.dice.pick(&SOURCES);
        let of_standby = match occasion {
            Occasion::Lag => Some(self.fall_behind()?),
            Occasion::Nothing | Occasion::Still if self.dice.roll(5) == 0 => Some(self.catch_up()?),
            _ => None,
        };
        let mut load = self.load()?;
        std::thread::sleep(Duration::from_millis(100 + self.dice.roll(400)));
        // Now and then, somebody else takes one at the same time.
        let may_be_two = matches!(occasion, Occasion::Nothing | Occasion::Full | Occasion::Still);
        let other = match may_be_two && self.dice.roll(4) == 0 {
            true => {
                let source = *self.dice.pick(&SOURCES);
                Some(self.backup("incr", source))
            }
            false => None,
        };
        let other = other.map(|mut command| command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn());
        let other = other.transpose()?;
        let mut command = self.backup(kind, source);
        if let Some(conninfo) = of_standby.as_ref().filter(|_| occasion != Occasion::Lag) {
            command.args(["--conninfo", conninfo]);
        }
        let mut outcomes = vec![(kind, source, code(&mut command))];
        // The standby that stands still comes after the primary; the first one of a timeline is built on at once.
        if matches!(occasion, Occasion::Lag | Occasion::Promotion) {
            let source = *self.dice.pick(&SOURCES);
            let mut command = self.backup("incr", source);
            if let Some(conninfo) = &of_standby {
                command.args(["--conninfo", conninfo]);
            }
            outcomes.push(("incr", source, code(&mut command)));
        }
        let other = other.map(Child::wait_with_output).transpose()?;
        let _ = load.kill();
        load.wait()?;
        if let Some(output) = other {
            let (exit, text) = (output.status.code().unwrap_or(-1), fairvault_tests::text(&output));
            outcomes.push(("incr", "beside it", (exit, text)));
        }
        let mut backups = Vec::new();
        for (kind, source, outcome) in outcomes {
            backups.push(self.taken(kind, source, outcome)?);
        }
        if occasion == Occasion::Lag {
            let (ahead, behind) = (&backups[0], &backups[1]);
            ensure!(
                behind.parent != ahead.id,
                "{} is built on what is its future",
                behind.id
            );
            let standby = self.standby.as_ref().context("a standby")?;
            standby.sql(&self.s.scratch, "select pg_wal_replay_resume()")?;
        }
        // Whoever works on goes on before the moment of comparison, or not.
        for _ in 0..self.dice.roll(3) {
            self.step()?;
        }
        self.points += 1;
        let point = format!("point{}", self.points);
        if occasion == Occasion::Still {
            self.quiet()?;
            // No page changes while it is taken, nor behind it: at its stop, the server's files are as they stay.
            let source = *self.dice.pick(&SOURCES);
            let outcome = code(&mut self.backup("incr", source));
            backups.push(self.taken("incr", source, outcome)?);
        }
        // A server that shuts down in recovery writes its pages out only if it has seen a checkpoint.
        self.sql("checkpoint")?;
        let at = self.sql(&format!("select pg_create_restore_point('{point}')"))?;
        println!("  {point} at {at}");
        if occasion != Occasion::Still {
            self.s.flush_archive(&self.s.server)?;
            return self.compare(&backups, &point, occasion);
        }
        // Whoever shuts down archives the segment that is not full, and changes no page.
        self.s.server.stop(&self.s.scratch, "fast")?;
        self.compare(&backups, &point, occasion)?;
        self.s.server.start(&self.s.scratch)
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

    /// What it said, once it was taken.
    fn taken(&mut self, kind: &str, source: &str, (exit, text): (i32, String)) -> Result<Taken> {
        ensure!(exit == 0, "{exit} {text}");
        let (id, parent, stop) = (field(&text, "id")?, field(&text, "parent")?, field(&text, "stop_lsn")?);
        self.incremental += u32::from(!parent.is_empty());
        println!(
            "  {kind} from {source}: {id}, {} to {stop}, {} read, {} stored",
            field(&text, "start_lsn")?,
            field(&text, "read_bytes")?,
            field(&text, "new_stored_bytes")?
        );
        let is_first = std::mem::take(&mut self.is_new_timeline);
        if is_first || kind == "full" {
            let why = field(&text, "no_parent_reason")?;
            ensure!(parent.is_empty() && why.contains("timeline") == is_first, "{text}");
            self.base.clone_from(&id);
        } else {
            let is_right = !parent.is_empty() && (kind != "diff" || parent == self.base);
            ensure!(
                is_right,
                "the newest that was built on nothing is {}: {text}",
                self.base
            );
        }
        Ok(Taken { id, parent, stop })
    }
}

fn torture(major: u32) -> Result<()> {
    let seed = number("FAIRVAULT_TORTURE_SEED", 1);
    let usual = match major {
        _ if tools::is_full() => 20,
        16 | 17 => 2,
        _ => 5,
    };
    let rounds = number("FAIRVAULT_TORTURE_ROUNDS", usual);
    println!("version {major}, seed {seed}");
    all_rounds(major, seed, rounds).with_context(|| format!("version {major}, seed {seed}"))
}

fn all_rounds(major: u32, seed: u64, rounds: u64) -> Result<()> {
    let mut torture = Torture::new(major, seed, "")?;
    for round in 0..=rounds {
        println!("round {round}");
        torture.round(round).with_context(|| format!("round {round}"))?;
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
    let seed = 4;
    println!("{fault}, seed {seed}");
    until_noticed(fault, seed).with_context(|| format!("{fault}, seed {seed}"))
}

fn until_noticed(fault: &'static str, seed: u64) -> Result<()> {
    let mut torture = Torture::new(15, seed, fault)?;
    for round in 0..20 {
        let Err(error) = torture.round(round) else { continue };
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
fn a_tracker_that_overlooks_that_a_relation_was_cut_is_found_out() -> Result<()> {
    planted("no limits")
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
