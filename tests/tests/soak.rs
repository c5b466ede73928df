//! Push and receive together, synchronously, while everything around them dies: whatever was acknowledged can
//! be restored, after every round.
//!
//! The schedule follows from a seed. `cargo xtask soak [ROUNDS] [SEED]` runs it for longer.

use std::collections::{BTreeSet, HashSet};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairvault_engine::replication::connection::{Connection, Mode};
use fairvault_engine::replication::conninfo::ConnInfo;
use fairvault_tests::dice::{Dice, number};
use fairvault_tests::proxy::{Proxy, Target};
use fairvault_tests::receiver::Receiver;
use fairvault_tests::s3::S3;
use fairvault_tests::{Fixture, Server, Shape, code, run, tools};

/// What can happen; at the end of every round, server and receiver are killed together.
#[derive(Debug, Clone, Copy)]
enum Event {
    ReceiverKilled,
    WorkerKilled,
    ServerKilled,
    StoreAway,
    ServerCut,
    StoreSlow,
    StoreCut,
}

/// What can happen around any store.
const EVENTS: [Event; 5] = [
    Event::ReceiverKilled,
    Event::WorkerKilled,
    Event::ServerKilled,
    Event::StoreAway,
    Event::ServerCut,
];
/// What can happen around one that is reached over a network.
const OVER_NETWORK: [Event; 2] = [Event::StoreSlow, Event::StoreCut];
/// Events in a round: in two rounds, everything happens.
const IN_A_ROUND: usize = 4;
/// Clients that commit all the time.
const CLIENTS: u32 = 4;

/// Commits by clients that were told of them.
type Acknowledged = Arc<Mutex<BTreeSet<(u32, u32)>>>;

/// Clients that commit one row after another, each with a number of its own, for as long as it lives.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(conninfo: &str, first: u32, acknowledged: &Acknowledged) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let info = ConnInfo::parse(conninfo)?;
        let clients = (0..CLIENTS).map(|client| {
            let (info, stop, acknowledged) = (info.clone(), stop.clone(), acknowledged.clone());
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.expect("a runtime");
                runtime.block_on(commits(&info, client, first, &stop, &acknowledged));
            })
        });
        Ok(Self {
            clients: clients.collect(),
            stop,
        })
    }

    /// Once the server is dead, no client hears of a commit any more.
    fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        for client in self.clients {
            ensure!(client.join().is_ok(), "a client panicked");
        }
        Ok(())
    }
}

async fn commits(info: &ConnInfo, client: u32, first: u32, stop: &AtomicBool, acknowledged: &Acknowledged) {
    let mut number = first;
    while !stop.load(Ordering::SeqCst) {
        let Ok(mut connection) = Connection::open(info, Mode::Sql).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        // Of one that failed, nobody knows whether it was committed: its number is not used again.
        loop {
            number += 1;
            let insert = format!("insert into c values ({client}, {number})");
            if stop.load(Ordering::SeqCst) || connection.query(&insert).await.is_err() {
                break;
            }
            let mut all = acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
            all.insert((client, number));
        }
    }
}

struct Soak {
    s: Fixture,
    _s3: Option<S3>,
    store: Option<Proxy>,
    link: Proxy,
    spool: Option<String>,
    receiver: Option<Receiver>,
    acknowledged: Acknowledged,
    /// What will happen next, from the end; shuffled anew once it is empty.
    deck: Vec<Event>,
    round: u32,
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
        s.sql("create table c (client int, number int)")?;
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
        let mut this = Self {
            spool: with_spool.then(|| s.path("spool")),
            s,
            _s3: s3,
            store,
            link,
            receiver: None,
            acknowledged: Acknowledged::default(),
            deck: Vec::new(),
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

    fn postmaster(&self) -> Result<u32> {
        let text = std::fs::read_to_string(self.s.server.data.join("postmaster.pid"))?;
        Ok(text.lines().next().context("pid")?.trim().parse()?)
    }

    fn last_words(&self) -> String {
        self.receiver.as_ref().map(Receiver::text).unwrap_or_default()
    }

    fn kill_server(&self) -> Result<()> {
        run(Command::new("kill").args(["-9", &self.postmaster()?.to_string()]))?;
        self.wait_until_dead()
    }

    fn wait_until_dead(&self) -> Result<()> {
        let pid = self.postmaster()?.to_string();
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

    fn next_event(&mut self, dice: &mut Dice) -> Event {
        if self.deck.is_empty() {
            self.deck.extend(EVENTS);
            if self.store.is_some() {
                self.deck.extend(OVER_NETWORK);
            }
            for at in (1..self.deck.len()).rev() {
                let other = dice.roll(at as u64 + 1) as usize;
                self.deck.swap(at, other);
            }
        }
        self.deck.pop().unwrap_or(Event::ReceiverKilled)
    }

    fn happen(&mut self, event: Event, dice: &mut Dice) -> Result<()> {
        println!("  {event:?}");
        match event {
            Event::ReceiverKilled => {
                if let Some(receiver) = self.receiver.take() {
                    receiver.kill()?;
                }
                dice.pause(800);
                self.start_receiver()?;
            }
            Event::WorkerKilled => {
                let mark = self.s.path("");
                let pattern = format!("{}.*--worker", mark.trim_end_matches('/'));
                let kill = || code(Command::new("pkill").args(["-9", "-f", &pattern])).0 == 0;
                let deadline = Instant::now() + Duration::from_secs(30);
                while !kill() {
                    ensure!(Instant::now() < deadline, "there is no worker to kill");
                    // A segment that is full starts one.
                    let fill = "set synchronous_commit = off; select pg_switch_wal()";
                    let _ = self.s.sql(fill);
                    dice.pause(100);
                }
            }
            Event::ServerKilled => {
                self.kill_server()?;
                dice.pause(500);
                self.start_server()?;
            }
            Event::StoreAway => match &self.store {
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
            Event::StoreSlow => {
                if let Some(proxy) = &self.store {
                    proxy.rate(200_000);
                    dice.pause(1500);
                    proxy.rate(0);
                }
            }
            Event::ServerCut => self.link.cut_after(1 + dice.roll(20_000)),
            Event::StoreCut => {
                if let Some(proxy) = &self.store {
                    proxy.cut_after(1 + dice.roll(2_000));
                }
            }
        }
        Ok(())
    }

    fn count(&self) -> usize {
        self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn round(&mut self, dice: &mut Dice) -> Result<()> {
        self.round += 1;
        println!("round {}", self.round);
        let load = Load::start(&self.s.server.conninfo(), self.round * 1_000_000, &self.acknowledged)?;
        for _ in 0..IN_A_ROUND {
            dice.pause(1200);
            let event = self.next_event(dice);
            self.happen(event, dice)?;
        }
        // Whatever happened, commits go on; and at some moment, all is lost at once.
        let (before, deadline) = (self.count(), Instant::now() + Duration::from_secs(60));
        while self.count() < before + 50 {
            ensure!(Instant::now() < deadline, "commits do not go on: {}", self.last_words());
            std::thread::sleep(Duration::from_millis(20));
        }
        dice.pause(1200);
        let receiver = self.receiver.take().context("a receiver")?;
        signal_now(receiver.pid(), self.postmaster()?)?;
        receiver.kill()?;
        self.wait_until_dead()?;
        load.end()?;
        // What is left is the repository, and the spool.
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
        let rows = copy.sql(&s.scratch, "select client || ' ' || number from c")?;
        copy.stop(&s.scratch, "immediate")?;
        let there: HashSet<&str> = rows.lines().collect();
        let acknowledged = self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
        println!("  {} acknowledged, {} restored", acknowledged.len(), there.len());
        let lost: Vec<_> = acknowledged
            .iter()
            .filter(|(client, number)| !there.contains(format!("{client} {number}").as_str()))
            .collect();
        ensure!(
            lost.is_empty(),
            "{} commits were lost: {:?} …",
            lost.len(),
            lost.iter().take(10)
        );
        let text = s.ok(&["verify", "acme", "--progress", "none"])?;
        ensure!(text.contains("all good"), "{text}");
        let info = s.ok(&["info", "acme"])?;
        ensure!(!info.contains("gap") && !info.contains("MISSING"), "{info}");
        Ok(())
    }
}

/// Kills both at once: what one has sent and the other has not taken is lost.
fn signal_now(receiver: u32, postmaster: u32) -> Result<()> {
    run(Command::new("kill").args(["-9", &receiver.to_string(), &postmaster.to_string()]))?;
    Ok(())
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
