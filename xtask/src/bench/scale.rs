//! `cargo xtask bench scale`: time and memory of backups and restores from one to many gigabytes, and what a store that
//! is far away costs.
//!
//! How many cores were busy is shown twice: with fairvault's own processes, and with all of the machine. The S3 server
//! and the proxy before it share the machine, and keep cores busy that tell nothing about fairvault.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use fairvault_tests::proxy::{Proxy, Target};
use fairvault_tests::s3::S3;
use fairvault_tests::{Fixture, Shape, tools};

use super::compare::{Cost, Run, Tool};
use super::data::ALL;
use super::{elsewhere, results, size_of};

/// Of the data sets, the one whose compression takes the most: the cores are what a far store should keep busy.
const DATA: &str = "mixed";
/// Its units of about half a gigabyte in a gigabyte.
const UNITS: u32 = 2;
/// From a request to the first byte of its answer, beside what the server takes.
const ROUND_TRIP: Duration = Duration::from_millis(20);

/// Builds with optimisation, and runs there.
pub fn run_it(gigabytes: u32) -> Result<()> {
    if elsewhere(&["scale", &gigabytes.to_string()])? {
        return Ok(());
    }
    tools::install_debian()?;
    tools::install_ministack()?;
    tools::install_time()?;
    let mut table = String::from(
        "| data | GiB | action | wall s | s a GiB | its own cores | cores of the machine | peak MiB | stored GiB |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    for size in [1, 3, 10, 30].into_iter().filter(|&size| size <= gigabytes) {
        let s = server(size)?;
        let measured = Measured::new(&s, None, "near")?;
        measured.run(&format!("{DATA}, directory"), &mut table)?;
    }
    // The server holds what it is given in memory.
    for size in [1, 3].into_iter().filter(|&size| size <= gigabytes) {
        let s = server(size)?;
        let s3 = S3::start(&s.scratch, "bucket")?;
        let proxy = Proxy::start(Target::Port(s3.port))?;
        for (round_trip, what) in [(Duration::ZERO, "here"), (ROUND_TRIP, "20 ms away")] {
            proxy.round_trip(round_trip);
            let measured = Measured::new(&s, Some(&proxy), &format!("far{}", round_trip.as_millis()))?;
            measured.run(&format!("{DATA}, S3 {what}"), &mut table)?;
        }
    }
    let file = results()?.join("scale.md");
    std::fs::write(&file, &table)?;
    println!("\n{table}\nwritten to {}", file.display());
    Ok(())
}

fn server(gigabytes: u32) -> Result<Fixture> {
    let s = Fixture::new(
        &format!("scale{gigabytes}"),
        Shape {
            stanza: false,
            settings: "shared_buffers = 512MB\nmax_wal_size = 8GB\nmaintenance_work_mem = 256MB\nautovacuum = off\nfsync = off\n",
            ..Default::default()
        },
    )?;
    println!("making {gigabytes} GB");
    for data in ALL.iter().filter(|data| data.name == DATA) {
        data.make(&s, gigabytes * UNITS)?;
    }
    s.sql("select pg_switch_wal(); checkpoint")?;
    Ok(s)
}

struct Measured<'a> {
    run: Run<'a>,
    proxy: Option<&'a Proxy>,
    gib: f64,
}

impl<'a> Measured<'a> {
    fn new(s: &'a Fixture, proxy: Option<&'a Proxy>, id: &str) -> Result<Self> {
        let run = Run {
            s,
            tool: Tool::Ours,
            s3: proxy.map(|proxy| format!("http://127.0.0.1:{}", proxy.port)),
            id: id.to_owned(),
            more: "",
        };
        // WAL of before is no part of a backup.
        let bytes: f64 = s.sql("select sum(pg_database_size(oid)) from pg_database")?.parse()?;
        let gib = bytes / f64::from(1 << 30);
        Ok(Self { run, proxy, gib })
    }

    fn run(&self, data: &str, table: &mut String) -> Result<()> {
        self.run.prepare()?;
        for (action, command) in [
            ("full backup", self.run.backup("full")),
            ("restore", self.run.restore(false)),
        ] {
            let cost = self.cost(data, action, command)?;
            let stored = size_of(&self.run.s.scratch.join(&self.run.name("repo"))) as f64 / f64::from(1 << 30);
            *table += &format!(
                "| {data} | {:.1} | {action} | {:.2} | {:.2} | {:.2} | {:.2} | {:.0} | {stored:.2} |\n",
                self.gib,
                cost.wall,
                cost.wall / self.gib,
                cost.own / cost.wall,
                cost.cpu / cost.wall,
                cost.memory
            );
        }
        Ok(())
    }

    fn cost(&self, data: &str, action: &str, command: Command) -> Result<Cost> {
        let requests = || self.proxy.map_or(0, Proxy::requests);
        let before = requests();
        let cost = self.run.measure(command)?;
        println!(
            "{data}: {action} of {:.1} GiB: {:.2} s wall, {:.2} s CPU of its own, {:.2} s of the machine, {:.0} MiB peak, {} requests",
            self.gib,
            cost.wall,
            cost.own,
            cost.cpu,
            cost.memory,
            requests() - before
        );
        Ok(cost)
    }
}
