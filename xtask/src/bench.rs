//! `cargo xtask bench wal`: archiving and fetching real WAL, beside pgBackRest on the same machine.
//!
//! Ratios within one run are what counts: the same segments, one after the other as PostgreSQL asks for
//! them, both encrypting, into and out of a directory. CPU time is that of the whole machine, so that
//! background workers are in it: leave the machine alone meanwhile.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use fairvault_tests::{Fixture, Shape, run, tools};

use crate::steps::{cargo, top};

/// Seconds of all cores, by the kernel.
fn cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("/proc/stat")?;
    let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|t| t.parse().ok()).collect();
    // user, nice and system, in hundredths.
    Ok(ticks.iter().take(3).sum::<u64>() as f64 / 100.0)
}

/// One measurement.
struct Row {
    what: &'static str,
    who: &'static str,
    wall: f64,
    cpu: f64,
    stored: u64,
}

fn measure(what: &'static str, who: &'static str, segments: usize, work: impl FnOnce() -> Result<u64>) -> Result<Row> {
    let (began, cpu) = (Instant::now(), cpu_seconds()?);
    let stored = work()?;
    let row = Row {
        what,
        who,
        wall: began.elapsed().as_secs_f64() / segments as f64,
        cpu: (cpu_seconds()? - cpu) / segments as f64,
        stored,
    };
    println!(
        "{:<28} {:<20} {:>7.1} ms wall {:>7.1} ms CPU a segment{}",
        row.what,
        row.who,
        row.wall * 1e3,
        row.cpu * 1e3,
        match row.stored {
            0 => String::new(),
            bytes => format!(", {:.2} MiB stored", bytes as f64 / segments as f64 / 1_048_576.0),
        }
    );
    Ok(row)
}

fn size_of(folder: &Path) -> u64 {
    let files = fairvault_tests::fixture::files(folder);
    files
        .iter()
        .filter_map(|f| std::fs::metadata(f).ok())
        .map(|m| m.len())
        .sum()
}

/// Builds with optimisation, and runs there.
pub fn wal(segments: usize) -> Result<()> {
    let me = std::env::current_exe()?;
    if !me.components().any(|part| part.as_os_str() == "release") {
        cargo(&["build", "--release", "--package", "fairvault", "--package", "xtask"])?;
        let program = top().join("target/release/xtask");
        let status = Command::new(program)
            .args(["bench", "wal", &segments.to_string()])
            .status()?;
        ensure!(status.success(), "the benchmark ended with {status}");
        return Ok(());
    }
    tools::install_debian()?;
    tools::install_sid()?;
    tools::install_pgbackrest()?;
    let s = Fixture::new(
        "bench",
        Shape {
            settings: "wal_keep_size = 64GB\nmax_wal_size = 1GB\nshared_buffers = 512MB\n",
            more: "compression = { level = 3 }",
            ..Default::default()
        },
    )?;
    let names = make_wal(&s, segments)?;
    let rows = compare(&s, &names);
    tools::unmount_sid();
    report(&rows?, segments)
}

/// Complete segments of pgbench's making, the first ones left out: they are of initdb.
fn make_wal(s: &Fixture, segments: usize) -> Result<Vec<String>> {
    println!("making {segments} segments of WAL with pgbench");
    let current = || -> Result<usize> {
        let text = s.sql("select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint / 16777216")?;
        Ok(text.parse()?)
    };
    run(&mut s.server.pgbench(&s.scratch, &["-i", "-q", "-s", "40"]))?;
    while current()? < segments + 10 {
        run(&mut s.server.pgbench(&s.scratch, &["-n", "-c", "4", "-j", "2", "-T", "5"]))?;
        s.sql("checkpoint")?;
    }
    s.sql("select pg_switch_wal()")?;
    let names = (5..5 + segments as u64).map(|n| format!("{:08X}{:08X}{:08X}", 1, n / 256, n % 256));
    Ok(names.collect())
}

fn compare(s: &Fixture, names: &[String]) -> Result<Vec<Row>> {
    let n = names.len();
    let dir = s.scratch.path().display().to_string();
    let pg_wal = s.server.data.join("pg_wal");
    let config = |asynchronous: bool, repo: &str| {
        format!(
            "[global]\nrepo1-path={dir}/{repo}\nrepo1-cipher-type=aes-256-cbc\nrepo1-cipher-pass=secret\ncompress-type=zst\ncompress-level=3\n\
             process-max=2\nspool-path={dir}/{repo}-spool\nlock-path={dir}/{repo}-lock\nlog-path={dir}/{repo}-log\nlog-level-console=warn\n\
             archive-async={}\n[acme]\npg1-path={}\npg1-socket-path={dir}\npg1-port=5432\npg1-user=postgres\n",
            if asynchronous { "y" } else { "n" },
            s.server.data.display()
        )
    };
    let pgbackrest = |repo: &str, arguments: &[&str]| {
        let mut command = Command::new("chroot");
        command
            .args(["--userspec=postgres:postgres".as_ref(), tools::sid().as_os_str()])
            .args(["pgbackrest", "--stanza=acme", &format!("--config={dir}/{repo}.conf")])
            .args(arguments);
        command
    };
    for (repo, asynchronous) in [("sync", false), ("async", true)] {
        s.scratch
            .write(&format!("{repo}.conf"), config(asynchronous, repo).as_bytes())?;
        for folder in ["", "-spool", "-lock", "-log"] {
            run(s
                .scratch
                .command("mkdir")
                .arg("-m")
                .arg("777")
                .arg(format!("{dir}/{repo}{folder}")))?;
        }
        run(&mut pgbackrest(repo, &["stanza-create"]))?;
    }
    s.scratch.write(
        "async.toml",
        std::fs::read_to_string(s.scratch.join("fairvault.toml"))?
            .replace("/vault\"", "/vault2\"")
            .replace("compression", "wal = { async = true, parallel = 2 }\ncompression")
            .as_bytes(),
    )?;
    let asynchronous = |arguments: &[&str]| {
        let config = format!("{dir}/async.toml");
        let mut all = vec!["--config", &config];
        all.extend(arguments);
        s.scratch.fairvault(&all)
    };
    run(&mut asynchronous(&["stanza", "create", "acme"]))?;
    s.server.stop(&s.scratch, "fast")?;
    let path = |name: &str| pg_wal.join(name).display().to_string();
    let mark = |from: &str, to: &str, name: &str| -> Result<()> {
        let status = pg_wal.join("archive_status");
        if from.is_empty() {
            s.scratch
                .write(&format!("data5432/pg_wal/archive_status/{name}.{to}"), b"")?;
        } else {
            std::fs::rename(
                status.join(format!("{name}.{from}")),
                status.join(format!("{name}.{to}")),
            )?;
        }
        Ok(())
    };
    let all_ready = || -> Result<()> {
        for name in names {
            let _ = std::fs::remove_file(pg_wal.join(format!("archive_status/{name}.done")));
            mark("", "ready", name)?;
        }
        Ok(())
    };
    let each = |make: &dyn Fn(&str) -> Command| -> Result<()> {
        for name in names {
            run(&mut make(name))?;
            let ready = pg_wal.join(format!("archive_status/{name}.ready"));
            if ready.exists() {
                mark("ready", "done", name)?;
            }
        }
        Ok(())
    };
    let mut rows = Vec::new();
    rows.push(measure("push, one at a time", "pgBackRest", n, || {
        each(&|name| pgbackrest("sync", &["archive-push", &path(name)]))?;
        Ok(size_of(&s.scratch.join("sync")))
    })?);
    rows.push(measure("push, one at a time", "fairvault", n, || {
        each(&|name| s.command(&["wal", "push", "acme", &path(name)]))?;
        Ok(size_of(&s.scratch.join("vault")))
    })?);
    all_ready()?;
    rows.push(measure("push, in the background", "pgBackRest", n, || {
        each(&|name| pgbackrest("async", &["archive-push", &path(name)]))?;
        Ok(size_of(&s.scratch.join("async")))
    })?);
    all_ready()?;
    rows.push(measure("push, in the background", "fairvault", n, || {
        each(&|name| asynchronous(&["wal", "push", "acme", &path(name)]))?;
        Ok(size_of(&s.scratch.join("vault2")))
    })?);
    let into = s.path("fetched");
    let check = |name: &str| -> Result<()> {
        ensure!(
            std::fs::read(&into)? == std::fs::read(pg_wal.join(name))?,
            "{name} differs"
        );
        Ok(())
    };
    let through = {
        let number = 5 + names.len() as u64;
        format!("{:X}/{:X}", (number << 24) >> 32, (number << 24) & 0xFFFF_FFFF)
    };
    rows.push(measure("get, one at a time", "pgBackRest", n, || {
        each(&|name| pgbackrest("sync", &["archive-get", name, &into]))?;
        Ok(0)
    })?);
    check(&names[n - 1])?;
    rows.push(measure("get, one at a time", "fairvault", n, || {
        each(&|name| s.command(&["wal", "get", "acme", name, &into]))?;
        Ok(0)
    })?);
    check(&names[n - 1])?;
    rows.push(measure("get, fetched ahead", "pgBackRest", n, || {
        each(&|name| pgbackrest("async", &["archive-get", name, &into]))?;
        Ok(0)
    })?);
    check(&names[n - 1])?;
    rows.push(measure("get, fetched ahead", "fairvault", n, || {
        each(&|name| s.command(&["wal", "get", "acme", name, &into, "--through", &through]))?;
        Ok(0)
    })?);
    check(&names[n - 1])?;
    Ok(rows)
}

fn report(rows: &[Row], segments: usize) -> Result<()> {
    let folder = top().join("target/bench");
    std::fs::create_dir_all(&folder)?;
    let mut table = String::from(
        "| | pgBackRest wall, CPU (ms) | fairvault wall, CPU (ms) | times as fast | CPU ratio |\n|---|---|---|---|---|\n",
    );
    let mut json = Vec::new();
    for pair in rows.chunks(2) {
        let [peer, ours] = pair else {
            bail!("an odd number of measurements")
        };
        table += &format!(
            "| {} | {:.1}, {:.1} | {:.1}, {:.1} | {:.2} | {:.2} |\n",
            ours.what,
            peer.wall * 1e3,
            peer.cpu * 1e3,
            ours.wall * 1e3,
            ours.cpu * 1e3,
            peer.wall / ours.wall,
            ours.cpu / peer.cpu
        );
    }
    for row in rows {
        json.push(format!(
            "{{\"what\":\"{}\",\"who\":\"{}\",\"wall_ms\":{:.2},\"cpu_ms\":{:.2},\"stored_bytes\":{}}}",
            row.what,
            row.who,
            row.wall * 1e3,
            row.cpu * 1e3,
            row.stored
        ));
    }
    std::fs::write(folder.join("wal.md"), &table)?;
    std::fs::write(
        folder.join("wal.json"),
        format!("{{\"segments\":{segments},\"rows\":[{}]}}\n", json.join(",")),
    )?;
    println!("\n{table}\nwritten to {}", folder.display());
    Ok(())
}
