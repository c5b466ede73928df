//! `cargo xtask bench sync`: what a synchronous receiver costs commits, beside `pg_receivewal --synchronous`.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use fairvault_tests::{Fixture, Shape, run, tools};

use super::{elsewhere, results};

/// A receiver; killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = run(Command::new("kill").args(["-INT", &self.0.id().to_string()]));
        std::thread::sleep(Duration::from_secs(1));
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(mut command: Command) -> Result<Running> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(Running(command.spawn()?))
}

/// Commits a second of `clients` clients, each one waiting for the receiver.
fn tps(s: &Fixture, clients: &str, seconds: &str) -> Result<f64> {
    let script = s.path("commit.sql");
    let arguments = ["-n", "-f", &script, "-c", clients, "-j", "2", "-T", seconds];
    let text = run(&mut s.server.pgbench(&s.scratch, &arguments))?;
    let line = text.lines().find(|line| line.starts_with("tps = "));
    let number = line.and_then(|line| line.split_whitespace().nth(2));
    Ok(number.context("no tps")?.parse()?)
}

/// Builds with optimisation, and runs there.
pub fn run_it(seconds: u32) -> Result<()> {
    if elsewhere(&["sync", &seconds.to_string()])? {
        return Ok(());
    }
    tools::install_debian()?;
    let settings = "fsync = on\nwal_keep_size = 4GB\nmax_wal_size = 4GB\nsynchronous_commit = on\n";
    let s = Fixture::new(
        "benchsync",
        Shape {
            settings,
            ..Default::default()
        },
    )?;
    s.sql("create table c (at timestamptz)")?;
    s.scratch
        .write("commit.sql", b"insert into c values (clock_timestamp());\n")?;
    s.backup()?;
    let dir = s.scratch.path().display().to_string();
    run(s.scratch.command("mkdir").arg("received"))?;
    let conninfo = |name: &str| format!("{} application_name={name}", s.server.conninfo());
    let (peer, direct, spooled) = (conninfo("peer"), conninfo("direct"), conninfo("spooled"));
    let mut receivewal = s.scratch.command(tools::bin(15).join("pg_receivewal"));
    receivewal
        .args(["-D", &format!("{dir}/received"), "-d", &peer])
        .args(["--synchronous", "--no-loop"]);
    let spool = format!("{dir}/spool");
    let fairvault = |more: &[&str]| {
        let mut all = vec!["wal", "receive", "acme", "--synchronous", "--no-slot", "--conninfo"];
        all.extend(more);
        s.command(&all)
    };
    let cases: [(&str, &str, Option<Command>); 4] = [
        ("no receiver", "", None),
        ("pg_receivewal --synchronous", "peer", Some(receivewal)),
        ("fairvault into a directory", "direct", Some(fairvault(&[&direct]))),
        (
            "fairvault with a spool",
            "spooled",
            Some(fairvault(&[&spooled, "--spool", &spool])),
        ),
    ];
    let seconds = seconds.to_string();
    let mut table = String::from("| | 1 client | 8 clients | 32 clients |\n|---|---|---|---|\n");
    let mut peer_tps = [0.0; 3];
    for (what, name, command) in cases {
        let running = command.map(spawn).transpose()?;
        s.sql(&format!("alter system set synchronous_standby_names = '{name}'"))?;
        s.sql("select pg_reload_conf()")?;
        if running.is_some() {
            let sync = "select count(*) from pg_stat_replication where sync_state = 'sync'";
            s.server.wait_for(&s.scratch, sync, "1")?;
        }
        let mut cells = String::new();
        for (at, clients) in ["1", "8", "32"].iter().enumerate() {
            let tps = tps(&s, clients, &seconds)?;
            if name == "peer" {
                peer_tps[at] = tps;
            }
            let ratio = match peer_tps[at] > 0.0 {
                true => format!(" ({:.2} of the peer)", tps / peer_tps[at]),
                false => String::new(),
            };
            println!("{what:<30} {clients:>2} clients: {tps:>8.0} commits a second{ratio}");
            cells += &format!(" {tps:.0}{ratio} |");
        }
        table += &format!("| {what} |{cells}\n");
        s.sql("alter system set synchronous_standby_names = ''")?;
        s.sql("select pg_reload_conf()")?;
        drop(running);
    }
    let file = results()?.join("sync.md");
    std::fs::write(&file, &table)?;
    println!("\n{table}\nwritten to {}", file.display());
    Ok(())
}
