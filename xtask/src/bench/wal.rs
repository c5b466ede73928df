//! `cargo xtask bench wal`: archiving and fetching real WAL, beside pgBackRest on the same machine.
//!
//! The same segments, one after the other as PostgreSQL asks for them, both encrypting: each tool as it comes,
//! and both at zstd level 3 with two processes; into and out of a directory, and an S3 server over TLS.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail, ensure};
use fairvault_tests::s3::S3;
use fairvault_tests::{Fixture, Shape, run, tools};

use super::{elsewhere, make_wal, results, size_of, timed};

/// One measurement, for one segment.
struct Row {
    what: String,
    who: &'static str,
    wall: f64,
    cpu: f64,
    stored: u64,
}

/// What both tools are told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Settings {
    /// Nothing: as they come.
    Default,
    /// zstd level 3, two processes.
    Equal,
}

/// Builds with optimisation, and runs there.
pub fn run_it(segments: usize) -> Result<()> {
    if elsewhere(&["wal", &segments.to_string()])? {
        return Ok(());
    }
    tools::install_debian()?;
    tools::install_ministack()?;
    tools::install_sid()?;
    tools::install_pgbackrest()?;
    let s = Fixture::new(
        "bench",
        Shape {
            stanza: false,
            settings: "wal_keep_size = 64GB\nmax_wal_size = 1GB\nshared_buffers = 512MB\n",
            ..Default::default()
        },
    )?;
    let names = make_wal(&s, segments)?;
    let s3 = S3::start_tls(&s.scratch, "bucket")?;
    let mut rows = Vec::new();
    let compared = compare(&s, &s3, &names, &mut rows);
    tools::unmount_sid();
    compared?;
    report(&rows, segments)
}

/// One pair of tools with their configurations.
struct Bench<'a> {
    s: &'a Fixture,
    names: &'a [String],
    title: String,
    /// Configuration files of pgBackRest: one at a time, and asynchronous.
    peer: [PathBuf; 2],
    /// Configuration files of fairvault, likewise.
    ours: [PathBuf; 2],
    /// Folders whose size is what was stored, if they are here.
    stored: Option<[PathBuf; 4]>,
}

fn compare(s: &Fixture, s3: &S3, names: &[String], rows: &mut Vec<Row>) -> Result<()> {
    let mut benches = Vec::new();
    for settings in [Settings::Default, Settings::Equal] {
        for on_s3 in [false, true] {
            benches.push(set_up(s, on_s3.then_some(s3), names, settings)?);
        }
    }
    s.server.stop(&s.scratch, "fast")?;
    for bench in &benches {
        bench.measure(rows)?;
    }
    Ok(())
}

fn set_up<'a>(s: &'a Fixture, s3: Option<&S3>, names: &'a [String], settings: Settings) -> Result<Bench<'a>> {
    let dir = s.scratch.path().display().to_string();
    let place = if s3.is_some() { "S3" } else { "directory" };
    let title = match settings {
        Settings::Default => format!("{place}, as they come"),
        Settings::Equal => format!("{place}, zstd 3, 2 processes"),
    };
    let id = format!("{}{}", place.to_lowercase(), settings as u8);
    let mut files = Vec::new();
    for asynchronous in [false, true] {
        let name = format!("{id}-peer{}", u8::from(asynchronous));
        let repo = match s3 {
            None => format!("repo1-path={dir}/{name}"),
            Some(s3) => format!(
                "repo1-type=s3\nrepo1-path=/{name}\nrepo1-s3-bucket=bucket\nrepo1-s3-endpoint=localhost:{}\nrepo1-s3-region=us-east-1\n\
                 repo1-s3-key=test\nrepo1-s3-key-secret=test\nrepo1-s3-uri-style=path\nrepo1-storage-ca-file={dir}/ca.crt",
                s3.port
            ),
        };
        let equal = match settings {
            Settings::Default => "",
            Settings::Equal => "compress-type=zst\ncompress-level=3\nprocess-max=2\n",
        };
        let text = format!(
            "[global]\n{repo}\nrepo1-cipher-type=aes-256-cbc\nrepo1-cipher-pass=secret\n{equal}spool-path={dir}/{name}-spool\n\
             lock-path={dir}/{name}-lock\nlog-path={dir}/{name}-log\nlog-level-console=warn\narchive-async={}\n\
             [acme]\npg1-path={}\npg1-socket-path={dir}\npg1-port=5432\npg1-user=postgres\n",
            if asynchronous { "y" } else { "n" },
            s.server.data.display()
        );
        let file = s.scratch.write(&format!("{name}.conf"), text.as_bytes())?;
        for folder in ["", "-spool", "-lock", "-log"] {
            let path = format!("{dir}/{name}{folder}");
            run(s.scratch.command("mkdir").args(["-m", "777", &path]))?;
        }
        run(&mut peer(&file, &["stanza-create"]))?;
        files.push(file);
    }
    let mut ours = Vec::new();
    for asynchronous in [false, true] {
        let name = format!("{id}-ours{}", u8::from(asynchronous));
        let repo = match s3 {
            None => format!("url = \"file://{dir}/{name}\""),
            Some(s3) => {
                s.scratch.write("s3.secret", b"test")?;
                format!(
                    "url = \"s3://bucket/{name}\"\nendpoint = \"{}\"\nregion = \"us-east-1\"\naccess_key = \"test\"\n\
                     secret_key_file = \"{dir}/s3.secret\"\nca_file = \"{dir}/ca.crt\"",
                    s3.endpoint()
                )
            }
        };
        let wal = match (asynchronous, settings) {
            (false, _) => "",
            (true, Settings::Default) => "wal = { async = true }",
            (true, Settings::Equal) => "wal = { async = true, parallel = 2 }",
        };
        let text = format!(
            "cache = \"{dir}/{name}-cache\"\n[repo.main]\n{repo}\n[stanza.acme]\nconninfo = \"{}\"\nkey = {{ file = \"{dir}/key\" }}\n{wal}\n",
            s.server.conninfo()
        );
        let file = s.scratch.write(&format!("{name}.toml"), text.as_bytes())?;
        run(&mut our(s, &file, &["stanza", "create", "acme"]))?;
        ours.push(file);
    }
    let folder = |name: &str| s.scratch.join(&format!("{id}-{name}"));
    let stored = ["peer0", "ours0", "peer1", "ours1"].map(folder);
    let pair = |files: Vec<PathBuf>| <[PathBuf; 2]>::try_from(files).map_err(|_| anyhow::anyhow!("two files"));
    Ok(Bench {
        s,
        names,
        title,
        peer: pair(files)?,
        ours: pair(ours)?,
        stored: s3.is_none().then_some(stored),
    })
}

fn peer(config: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("chroot");
    command
        .args(["--userspec=postgres:postgres".as_ref(), tools::sid().as_os_str()])
        .args(["pgbackrest", "--stanza=acme", &format!("--config={}", config.display())])
        .args(arguments);
    command
}

/// Started as the peer is: by the same program, as the same user.
fn our(s: &Fixture, config: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("chroot");
    command
        .args(["--userspec=postgres:postgres", "/"])
        .arg(s.scratch.join("fairvault"))
        .args(["--config".as_ref(), config.as_os_str()])
        .args(arguments)
        .env("HOME", s.scratch.join(""));
    command
}

impl Bench<'_> {
    fn measure(&self, rows: &mut Vec<Row>) -> Result<()> {
        let pg_wal = self.s.server.data.join("pg_wal");
        let path = |name: &str| pg_wal.join(name).display().to_string();
        let last = &self.names[self.names.len() - 1];
        let into = self.s.scratch.join("fetched");
        let into_text = into.display().to_string();
        let through = {
            let end = u64::from_str_radix(&last[8..16], 16)? * 256 + u64::from_str_radix(&last[16..], 16)? + 1;
            format!("{:X}/{:X}", (end << 24) >> 32, (end << 24) & 0xFFFF_FFFF)
        };
        let check = || -> Result<()> {
            let same = std::fs::read(&into)? == std::fs::read(pg_wal.join(last))?;
            ensure!(same, "{last} differs");
            Ok(())
        };
        for (at, how) in ["one at a time", "in the background"].iter().enumerate() {
            let what = format!("{}: push, {how}", self.title);
            for (who, side) in [("pgBackRest", 0), ("fairvault", 1)] {
                self.all_ready()?;
                let make = |name: &String| match side {
                    0 => peer(&self.peer[at], &["archive-push", &path(name)]),
                    _ => our(self.s, &self.ours[at], &["wal", "push", "acme", &path(name)]),
                };
                let (wall, cpu) = timed(|| self.each(make))?;
                let stored = self
                    .stored
                    .as_ref()
                    .map_or(0, |folders| size_of(&folders[at * 2 + side]));
                self.row(rows, &what, who, wall, cpu, stored);
            }
        }
        for (at, how) in ["one at a time", "fetched ahead"].iter().enumerate() {
            let what = format!("{}: get, {how}", self.title);
            for (who, side) in [("pgBackRest", 0), ("fairvault", 1)] {
                // Each file is a new one, as it is for PostgreSQL, which renames it away.
                let make = |name: &String| {
                    let _ = std::fs::remove_file(&into);
                    match (side, at) {
                        (0, _) => peer(&self.peer[at], &["archive-get", name, &into_text]),
                        (_, 0) => our(self.s, &self.ours[at], &["wal", "get", "acme", name, &into_text]),
                        _ => {
                            let through = ["--through", &through];
                            our(
                                self.s,
                                &self.ours[at],
                                &["wal", "get", "acme", name, &into_text, through[0], through[1]],
                            )
                        }
                    }
                };
                let (wall, cpu) = timed(|| self.each(make))?;
                check()?;
                self.row(rows, &what, who, wall, cpu, 0);
            }
        }
        Ok(())
    }

    fn row(&self, rows: &mut Vec<Row>, what: &str, who: &'static str, wall: f64, cpu: f64, stored: u64) {
        let n = self.names.len() as f64;
        let row = Row {
            what: what.to_owned(),
            who,
            wall: wall / n,
            cpu: cpu / n,
            stored,
        };
        let bytes = match row.stored {
            0 => String::new(),
            bytes => format!(", {:.2} MiB stored", bytes as f64 / n / 1_048_576.0),
        };
        println!(
            "{:<52} {:<11} {:>6.1} ms wall {:>6.1} ms CPU a segment{bytes}",
            row.what,
            row.who,
            row.wall * 1e3,
            row.cpu * 1e3,
        );
        rows.push(row);
    }

    /// Marks all segments as waiting, as PostgreSQL does.
    fn all_ready(&self) -> Result<()> {
        for name in self.names {
            let status = self.s.server.data.join("pg_wal/archive_status");
            let _ = std::fs::remove_file(status.join(format!("{name}.done")));
            let file = format!("data5432/pg_wal/archive_status/{name}.ready");
            self.s.scratch.write(&file, b"")?;
        }
        Ok(())
    }

    /// Runs a command for every segment, and marks it as done.
    fn each(&self, make: impl Fn(&String) -> Command) -> Result<()> {
        let status = self.s.server.data.join("pg_wal/archive_status");
        for name in self.names {
            run(&mut make(name))?;
            let ready = status.join(format!("{name}.ready"));
            if ready.exists() {
                std::fs::rename(ready, status.join(format!("{name}.done")))?;
            }
        }
        Ok(())
    }
}

fn report(rows: &[Row], segments: usize) -> Result<()> {
    let folder = results()?;
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
        json.push(serde_json::json!({
            "what": row.what,
            "who": row.who,
            "wall_ms": row.wall * 1e3,
            "cpu_ms": row.cpu * 1e3,
            "stored_bytes": row.stored,
        }));
    }
    std::fs::write(folder.join("wal.md"), &table)?;
    let json = serde_json::json!({ "segments": segments, "rows": json });
    std::fs::write(folder.join("wal.json"), format!("{json}\n"))?;
    println!("\n{table}\nwritten to {}", folder.display());
    Ok(())
}
