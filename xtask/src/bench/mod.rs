//! Benchmarks beside peers on the same machine. Ratios within one run are what counts; CPU time is that of the
//! whole machine, so that background workers are in it: leave the machine alone meanwhile.

mod chart;
pub mod compare;
mod data;
pub mod incremental;
pub mod replay;
mod report;
pub mod scale;
pub mod sources;
pub mod sync;
pub mod wal;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fairvault_tests::{Fixture, run};

use crate::steps::{cargo, top};

/// Runs a benchmark with optimisation: builds, and starts this program again from there. `true` if that was done.
fn elsewhere(arguments: &[&str]) -> Result<bool> {
    let me = std::env::current_exe()?;
    if me.components().any(|part| part.as_os_str() == "release") {
        return Ok(false);
    }
    cargo(&["build", "--release", "--package", "fairvault", "--package", "xtask"])?;
    let program = top().join("target/release/xtask");
    let status = Command::new(program).arg("bench").args(arguments).status()?;
    ensure!(status.success(), "the benchmark ended with {status}");
    Ok(true)
}

/// Seconds of all cores, by the kernel.
fn cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("/proc/stat")?;
    let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|t| t.parse().ok()).collect();
    // user, nice and system, in hundredths.
    Ok(ticks.iter().take(3).sum::<u64>() as f64 / 100.0)
}

/// Wall and CPU seconds of some work.
fn timed(work: impl FnOnce() -> Result<()>) -> Result<(f64, f64)> {
    let (began, cpu) = (Instant::now(), cpu_seconds()?);
    work()?;
    Ok((began.elapsed().as_secs_f64(), cpu_seconds()? - cpu))
}

/// Folder of results.
fn results() -> Result<PathBuf> {
    let folder = top().join("target/bench");
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Bytes of the files below a folder; those that links lead to as well (pgBackRest's `latest`) count once.
fn size_of(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = fairvault_tests::fixture::files(folder);
    let lengths: std::collections::HashMap<(u64, u64), u64> = files
        .iter()
        .filter_map(|file| std::fs::metadata(file).ok())
        .map(|meta| ((meta.dev(), meta.ino()), meta.len()))
        .collect();
    lengths.values().sum()
}

/// Makes `segments` complete segments of WAL: half of pgbench's transactions, half of rows with random text.
/// Returns their names; what initdb and pgbench's own loading wrote is before them.
fn make_wal(s: &Fixture, segments: usize) -> Result<Vec<String>> {
    println!("making {segments} segments of WAL");
    let current = || -> Result<u64> {
        let text = s.sql("select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint / 16777216")?;
        Ok(text.parse()?)
    };
    run(&mut s.server.pgbench(&s.scratch, &["-i", "-q", "-s", "40"]))?;
    s.sql("create table mixed (id bigint generated always as identity primary key, at timestamptz default clock_timestamp(), name text, tags text[], body text)")?;
    s.sql("create index on mixed (name)")?;
    s.scratch.write(
        "mixed.sql",
        b"insert into mixed (name, tags, body) select md5(random()::text), array[md5(random()::text)], repeat(md5(random()::text), 3) from generate_series(1, 20);\nupdate mixed set at = clock_timestamp() where id = (select max(id) - 1000 * random() from mixed)::bigint;\n",
    )?;
    s.sql("checkpoint; select pg_switch_wal()")?;
    let first = current()? + 1;
    let script = s.path("mixed.sql");
    while current()? < first + segments as u64 {
        run(&mut s.server.pgbench(&s.scratch, &["-n", "-c", "4", "-j", "2", "-T", "4"]))?;
        run(&mut s
            .server
            .pgbench(&s.scratch, &["-n", "-c", "4", "-j", "2", "-T", "4", "-f", &script]))?;
        s.sql("checkpoint")?;
    }
    s.sql("select pg_switch_wal()")?;
    let names = (first..first + segments as u64).map(|n| format!("{:08X}{:08X}{:08X}", 1, n / 256, n % 256));
    Ok(names.collect())
}
