//! The whole story on a scratch server: load, archiving, a backup, a mistake, and the way back.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use fairvault_tests::{Scratch, Server, run as execute, tools};

use crate::steps::cargo;

fn say(text: impl std::fmt::Display) {
    println!("\n\x1b[1m▸ {text}\x1b[0m");
}

fn show(scratch: &Scratch, arguments: &[&str]) -> Result<()> {
    println!("$ fairvault {}", arguments.join(" "));
    let out = execute(&mut scratch.fairvault(arguments))?;
    for line in out.lines() {
        println!("  {line}");
    }
    Ok(())
}

/// pgbench in the background; killed when dropped.
struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn load(server: &Server, scratch: &Scratch) -> Result<Load> {
    let mut command = server.pgbench(scratch, &["-n", "-c", "2", "-T", "120", "-R", "400"]);
    Ok(Load(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?,
    ))
}

/// Tells it.
pub fn run_story(scratch: &Scratch) -> Result<()> {
    let started = Instant::now();
    say("A PostgreSQL 15 server, a repository, a key");
    execute(&mut scratch.fairvault(&["key", "generate", &scratch.join("demo.key").to_string_lossy()]))?;
    let config = format!(
        "[repo.local]\nurl = \"file://{0}/vault\"\n\n[stanza.demo]\nconninfo = \"host={0} port=5432 user=postgres\"\nkey = {{ file = \"{0}/demo.key\" }}\n",
        scratch.path().display()
    );
    scratch.write("fairvault.toml", config.as_bytes())?;
    print!("{}", config.lines().map(|l| format!("  {l}\n")).collect::<String>());
    let config = scratch.join("fairvault.toml").to_string_lossy().into_owned();
    let archive_command = format!(
        "{} --config {config} wal push demo %p",
        scratch.join("fairvault").display()
    );
    println!("  archive_command = '{archive_command}'");
    let settings = format!("archive_mode = on\narchive_command = '{archive_command}'\narchive_timeout = 5");
    let server = Server::create(scratch, 15, 5432, &settings)?;
    show(scratch, &["--config", &config, "stanza", "create", "demo"])?;
    execute(&mut server.pgbench(scratch, &["-i", "-q", "-s", "8"]))?;

    say("Load begins; a full backup is taken under it");
    let running = load(&server, scratch)?;
    std::thread::sleep(Duration::from_secs(1));
    show(
        scratch,
        &["--config", &config, "backup", "demo", "--fast", "--progress", "none"],
    )?;

    say("More load, then somebody drops a table");
    std::thread::sleep(Duration::from_secs(3));
    drop(running);
    let before = server.sql(scratch, "select count(*), sum(abalance) from pgbench_accounts")?;
    let history = server.sql(scratch, "select count(*) from pgbench_history")?;
    let moment = server.sql(
        scratch,
        "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
    )?;
    println!("  {moment}: accounts {before}, history {history}");
    std::thread::sleep(Duration::from_millis(20));
    server.sql(scratch, "drop table pgbench_history")?;
    println!("  DROP TABLE pgbench_history");
    execute(&mut server.pgbench(scratch, &["-n", "-S", "-t", "10"]))?;
    server.sql(scratch, "create table too_late (x int)")?;
    server.sql(scratch, "select pg_switch_wal()")?;
    server.wait_for(scratch, "select last_archived_wal >= pg_walfile_name(pg_current_wal_lsn() - 1) or pg_switch_wal() is null from pg_stat_archiver", "t")?;

    say("The server is destroyed");
    server.stop(scratch, "immediate")?;
    std::fs::remove_dir_all(&server.data)?;
    show(scratch, &["--config", &config, "info", "demo"])?;

    say("Back to the moment before the mistake");
    let target = scratch.join("restored");
    let target = target.to_string_lossy();
    show(
        scratch,
        &[
            "--config",
            &config,
            "restore",
            "demo",
            "--to",
            &target,
            "--target-time",
            &moment,
            "--progress",
            "none",
        ],
    )?;
    let restored = Server::existing(scratch, 15, target.as_ref(), 5433);
    restored.start(scratch)?;
    restored.wait_for(scratch, "select pg_is_in_recovery()", "f")?;
    let after = restored.sql(scratch, "select count(*), sum(abalance) from pgbench_accounts")?;
    let history_after = restored.sql(scratch, "select count(*) from pgbench_history")?;
    println!("  accounts {after}, history {history_after}");
    if after != before || history_after != history {
        bail!("the restored rows differ: {after} and {history_after}, expected {before} and {history}");
    }
    println!("  equal to what was there before the table was dropped");
    restored.stop(scratch, "fast")?;

    say("Is the repository sound?");
    show(
        scratch,
        &[
            "--config",
            &config,
            "verify",
            "demo",
            "--level",
            "data",
            "--progress",
            "none",
        ],
    )?;
    say(format_args!(
        "Done in {:.0} s; everything is cleaned up",
        started.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// Builds, installs, tells the story, cleans up.
pub fn run() -> Result<()> {
    cargo(&["build", "--quiet", "--package", "fairvault"])?;
    tools::install_debian()?;
    run_story(&Scratch::new("demo")?)
}
