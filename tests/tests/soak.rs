//! Push and receive together, synchronously, while everything around them dies: whatever was acknowledged can
//! be restored, after every round.
//!
//! The schedule follows from a seed. `cargo xtask soak [ROUNDS] [SEED]` runs it for longer.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fairvault_tests::dice::{Dice, number};
use fairvault_tests::proxy::{Proxy, Target};
use fairvault_tests::receiver::Receiver;
use fairvault_tests::s3::S3;
use fairvault_tests::{Fixture, Server, Shape, code, run, tools};

/// What can happen, in words for the log.
const EVENTS: [&str; 8] = [
    "the receiver is killed",
    "the archiving worker is killed",
    "the server is killed",
    "the store goes away",
    "the store is slow",
    "the server's connection is cut in mid-message",
    "the store's connection is cut in mid-message",
    "nothing",
];

struct Soak {
    s: Fixture,
    _s3: Option<S3>,
    store: Option<Proxy>,
    link: Proxy,
    spool: Option<String>,
    receiver: Option<Receiver>,
    /// Commits that pgbench's clients were told of.
    acknowledged: u64,
    round: u64,
}

impl Soak {
    fn new(on_s3: bool, with_spool: bool) -> Result<Self> {
        let flush = "flush_interval = \"200ms\"";
        let wal = format!("wal = {{ async = true, parallel = 2, push_timeout = \"5s\", {flush} }}");
        let mut s = Fixture::new(
            "soak",
            Shape {
                stanza: false,
                more: &wal,
                settings: "synchronous_commit = on\nmax_wal_size = 64MB\nwal_sender_timeout = 5s\n",
                initdb: &["-k", "--wal-segsize=1"],
                ..Default::default()
            },
        )?;
        let (mut s3, mut store) = (None, None);
        if on_s3 {
            let server = S3::start(&s.scratch, "bucket")?;
            let proxy = Proxy::start(Target::Port(server.port))?;
            s.use_s3(&format!("http://127.0.0.1:{}", proxy.port), "s3://bucket/x", &wal)?;
            (s3, store) = (Some(server), Some(proxy));
        }
        s.ok(&["stanza", "create", "acme"])?;
        s.sql("create table c (client int)")?;
        let config = s.options[1].clone();
        let command = format!(
            "{} --config {config} wal push acme %p",
            s.scratch.join("fairvault").display()
        );
        s.sql("alter system set archive_mode = on")?;
        s.sql(&format!("alter system set archive_command = '{command}'"))?;
        s.sql("alter system set synchronous_standby_names = 'soak'")?;
        s.server.stop(&s.scratch, "fast")?;
        s.server.start(&s.scratch)?;
        let link = Proxy::start(Target::Socket(s.scratch.join(".s.PGSQL.5432")))?;
        s.scratch.write("commit.sql", b"insert into c values (:client_id);\n")?;
        let mut this = Self {
            spool: with_spool.then(|| s.path("spool")),
            s,
            _s3: s3,
            store,
            link,
            receiver: None,
            acknowledged: 0,
            round: 0,
        };
        this.start_receiver()?;
        // With the receiver up, a backup's own commits do not wait.
        this.s.backup()?;
        Ok(this)
    }

    fn start_receiver(&mut self) -> Result<()> {
        let conninfo = format!(
            "host=127.0.0.1 port={} user=postgres sslmode=disable application_name=soak",
            self.link.port
        );
        let mut options = vec!["--synchronous", "--conninfo", &conninfo];
        match &self.spool {
            Some(spool) => options.extend(["--spool", spool]),
            // Here, pieces stay and are sealed.
            None if self.store.is_some() => options.push("--keep-pieces"),
            None => {}
        }
        self.receiver = Some(Receiver::spawn(&self.s, &options)?);
        Ok(())
    }

    fn kill_server(&self) -> Result<()> {
        let pid = std::fs::read_to_string(self.s.server.data.join("postmaster.pid"))?;
        let pid = pid.lines().next().context("pid")?.to_owned();
        run(Command::new("kill").args(["-9", &pid]))?;
        // Its children notice, and let go of its memory.
        while std::path::Path::new("/proc").join(&pid).exists() {
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    }

    fn start_server(&self) -> Result<()> {
        for _ in 0..20 {
            if self.s.server.try_start(&self.s.scratch, true).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(300));
        }
        self.s.server.start(&self.s.scratch)
    }

    fn happen(&mut self, event: u64, dice: &mut Dice) -> Result<()> {
        println!("  {}", EVENTS[event as usize]);
        match event {
            0 => {
                if let Some(receiver) = self.receiver.take() {
                    receiver.kill()?;
                }
                dice.pause(800);
                self.start_receiver()?;
            }
            1 => {
                let mark = self.s.path("");
                let pattern = format!("{}.*--worker", mark.trim_end_matches('/'));
                let _ = code(Command::new("pkill").args(["-9", "-f", &pattern]));
            }
            2 => {
                self.kill_server()?;
                dice.pause(500);
                self.start_server()?;
            }
            3 => match &self.store {
                Some(proxy) => {
                    proxy.away(true);
                    dice.pause(3000);
                    proxy.away(false);
                }
                None => {
                    std::fs::rename(self.s.path("vault"), self.s.path("hidden"))?;
                    dice.pause(3000);
                    // A write that was on its way may have made a new folder in its place; it is not believed.
                    while std::fs::rename(self.s.path("hidden"), self.s.path("vault")).is_err() {
                        std::fs::remove_dir_all(self.s.path("vault"))?;
                    }
                }
            },
            4 => {
                if let Some(proxy) = &self.store {
                    proxy.rate(200_000);
                    dice.pause(1500);
                    proxy.rate(0);
                }
            }
            5 => self.link.cut_after(1 + dice.roll(20_000)),
            6 => {
                if let Some(proxy) = &self.store {
                    proxy.cut_after(1 + dice.roll(2_000));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn load(&self) -> Result<Child> {
        let (script, log) = (self.s.path("commit.sql"), self.s.path(&format!("load{}", self.round)));
        let arguments = ["-n", "-f", &script, "-c", "4", "-T", "4", "-l", "--log-prefix", &log];
        let mut command = self.s.server.pgbench(&self.s.scratch, &arguments);
        let silent = || Stdio::null();
        Ok(command.stdin(silent()).stdout(silent()).stderr(silent()).spawn()?)
    }

    /// Transactions in pgbench's logs of this round: each was acknowledged.
    fn count(&self) -> Result<u64> {
        let prefix = format!("load{}.", self.round);
        let mut lines = 0;
        for entry in std::fs::read_dir(self.s.scratch.path())? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                let text = std::fs::read_to_string(entry.path())?;
                // The last line may have been cut.
                lines += text.matches('\n').count() as u64;
            }
        }
        Ok(lines)
    }

    fn round(&mut self, dice: &mut Dice) -> Result<()> {
        self.round += 1;
        println!("round {}", self.round);
        let mut load = self.load()?;
        for _ in 0..1 + dice.roll(3) {
            dice.pause(1200);
            let event = dice.roll(EVENTS.len() as u64);
            self.happen(event, dice)?;
        }
        // Commits that wait for a receiver that is away would keep it for long: its clients are cut off.
        let mut waited = 0;
        while load.try_wait()?.is_none() && waited < 300 {
            std::thread::sleep(Duration::from_millis(50));
            waited += 1;
        }
        if load.try_wait()?.is_none() {
            load.kill()?;
            load.wait()?;
        }
        self.acknowledged += self.count()?;
        // The server is dead, and the receiver too: what is left is the repository, and the spool.
        if self.s.server.is_running() {
            self.kill_server()?;
        }
        if let Some(receiver) = self.receiver.take() {
            receiver.kill()?;
        }
        if self.spool.is_some() {
            self.start_receiver()?;
            std::thread::sleep(Duration::from_secs(2));
            if let Some(receiver) = self.receiver.take() {
                receiver.stop()?;
            }
        }
        self.check()?;
        self.start_server()?;
        self.start_receiver()
    }

    fn check(&self) -> Result<()> {
        let s = &self.s;
        let _ = std::fs::remove_dir_all(s.scratch.join("r"));
        let (exit, text) = s.restore("r", &[]);
        ensure!(exit == 0, "round {}: {text}", self.round);
        s.configure("r", "synchronous_standby_names = ''\n")?;
        let copy: Server = s.start("r", 5450)?;
        let there: u64 = copy.sql(&s.scratch, "select count(*) from c")?.parse()?;
        copy.stop(&s.scratch, "immediate")?;
        println!("  {} acknowledged, {there} restored", self.acknowledged);
        ensure!(there >= self.acknowledged, "{there} of {} commits", self.acknowledged);
        let text = s.ok(&["verify", "acme", "--progress", "none"])?;
        ensure!(text.contains("all good"), "{text}");
        let info = s.ok(&["info", "acme"])?;
        ensure!(!info.contains("gap") && !info.contains("MISSING"), "{info}");
        Ok(())
    }
}

fn soak(on_s3: bool, with_spool: bool) -> Result<()> {
    let rounds = number("FAIRVAULT_SOAK_ROUNDS", if tools::is_full() { 6 } else { 2 });
    let seed = number("FAIRVAULT_SOAK_SEED", 1);
    let mut dice = Dice(seed + 2 * u64::from(on_s3) + u64::from(with_spool));
    let mut soak = Soak::new(on_s3, with_spool)?;
    for _ in 0..rounds {
        soak.round(&mut dice)
            .with_context(|| format!("seed {seed}, S3 {on_s3}, spool {with_spool}, round {}", soak.round))?;
    }
    ensure!(soak.acknowledged > 0, "nothing was acknowledged in {rounds} rounds");
    Ok(())
}

#[test]
fn whatever_dies_around_a_directory() -> Result<()> {
    soak(false, false)
}

#[test]
fn whatever_dies_around_a_directory_with_a_spool() -> Result<()> {
    soak(false, true)
}

#[test]
fn whatever_dies_around_s3() -> Result<()> {
    soak(true, false)
}

#[test]
fn whatever_dies_around_s3_with_a_spool() -> Result<()> {
    soak(true, true)
}
