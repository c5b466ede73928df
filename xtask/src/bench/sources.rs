//! `cargo xtask bench sources`: full backups of one cluster from each source, with one worker and with two, beside the
//! most that could come from there: the files read, `COPY` of `pg_read_binary_file`, and BASE_BACKUP, each into nothing.
//!
//! All of the cluster is in the kernel's cache. Each round runs everything once, in turn, and every backup goes into a
//! new repository; what is shown are medians. A backup is compared with a limit that has as many readers.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, anyhow, ensure};
use fairvault_tests::fixture::files;
use fairvault_tests::{Fixture, Shape, run, text, tools};

use super::compare::{Cost, Run, Tool, median, warm};
use super::data::ALL;
use super::{elsewhere, results, timed};

/// Of the data sets, the one that compresses fastest: here, sources show.
const DATA: &str = "pgbench";
/// Bytes that are asked for at once; a chunk of fairvault's is as long.
const PIECE: u64 = 512 << 10;

/// A way to read the cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// A backup from this source.
    Backup(&'static str),
    /// Threads that read files.
    Files,
    /// Connections of psql that read files by SQL.
    Copy,
    /// pg_basebackup, without WAL, manifest and checksums.
    BaseBackup,
}

/// Each way, with so many workers.
const CASES: [(Way, usize); 11] = [
    (Way::Files, 1),
    (Way::Backup("local"), 1),
    (Way::Files, 2),
    (Way::Backup("local"), 2),
    (Way::Copy, 1),
    (Way::Backup("sql"), 1),
    (Way::Copy, 2),
    (Way::Backup("sql"), 2),
    (Way::BaseBackup, 1),
    (Way::Backup("stream"), 1),
    (Way::Backup("stream"), 2),
];

impl Way {
    fn name(self) -> String {
        match self {
            Self::Backup(source) => format!("backup from `{source}`"),
            Self::Files => "limit: reading the files".to_owned(),
            Self::Copy => "limit: COPY of pg_read_binary_file".to_owned(),
            Self::BaseBackup => "limit: pg_basebackup".to_owned(),
        }
    }

    /// The most that could come from where a backup reads.
    fn limit(self) -> Option<Self> {
        match self {
            Self::Backup("local") => Some(Self::Files),
            Self::Backup("sql") => Some(Self::Copy),
            Self::Backup(_) => Some(Self::BaseBackup),
            _ => None,
        }
    }

    /// Readers of so many workers: BASE_BACKUP comes over one connection.
    fn readers(self, workers: usize) -> usize {
        match self {
            Self::BaseBackup | Self::Backup("stream") => 1,
            _ => workers,
        }
    }
}

/// A part of a file.
struct Piece {
    path: String,
    at: u64,
    len: u64,
}

struct Row {
    way: Way,
    workers: usize,
    cost: Cost,
    bytes: u64,
}

impl Row {
    fn readers(&self) -> usize {
        self.way.readers(self.workers)
    }

    /// MB of the cluster a second.
    fn rate(&self) -> f64 {
        self.bytes as f64 / self.cost.wall / 1e6
    }
}

/// Builds with optimisation, and runs there.
pub fn run_it(size: u32, rounds: usize) -> Result<()> {
    ensure!(rounds > 0, "no round was asked for: give one at least");
    if elsewhere(&["sources", &size.to_string(), &rounds.to_string()])? {
        return Ok(());
    }
    tools::install_debian()?;
    tools::install_time()?;
    let s = Fixture::new(
        "sources",
        Shape {
            stanza: false,
            settings: "shared_buffers = 512MB\nmax_wal_size = 8GB\nmaintenance_work_mem = 256MB\nautovacuum = off\n",
            ..Default::default()
        },
    )?;
    println!("making the data");
    for data in ALL.iter().filter(|data| data.name == DATA) {
        data.make(&s, size)?;
    }
    // WAL of before is no part of a backup.
    s.sql("select pg_switch_wal(); checkpoint")?;
    let pieces = pieces(&s.server.data)?;
    let bench = Bench { s, pieces };
    let mut costs: Vec<Vec<Cost>> = CASES.iter().map(|_| Vec::new()).collect();
    let mut bytes = [0; CASES.len()];
    for round in 0..rounds {
        for (at, &(way, workers)) in CASES.iter().enumerate() {
            let (cost, read) = bench.measure(way, workers, format!("{at}x{round}"))?;
            println!("{:<36} {workers} {:>6.2} s wall", way.name(), cost.wall);
            costs[at].push(cost);
            bytes[at] = read;
        }
    }
    // pg_basebackup sends what a backup from `stream` gets.
    let streamed = CASES.iter().position(|(way, _)| *way == Way::Backup("stream"));
    let streamed = streamed.map_or(0, |at| bytes[at]);
    let row = |(at, &(way, workers)): (usize, &(Way, usize))| Row {
        way,
        workers,
        cost: median(&costs[at]),
        bytes: if way == Way::BaseBackup { streamed } else { bytes[at] },
    };
    let rows: Vec<Row> = CASES.iter().enumerate().map(row).collect();
    report(&rows, size, rounds)
}

/// All content of relations.
fn pieces(data: &Path) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    for file in files(&data.join("base")) {
        let size = std::fs::metadata(&file)?.len();
        let path = file.strip_prefix(data)?.to_str().context("a name that is not UTF-8")?;
        for at in (0..size).step_by(PIECE as usize) {
            pieces.push(Piece {
                path: path.to_owned(),
                at,
                len: PIECE.min(size - at),
            });
        }
    }
    ensure!(!pieces.is_empty(), "there are no relations in {}", data.display());
    Ok(pieces)
}

struct Bench {
    s: Fixture,
    pieces: Vec<Piece>,
}

impl Bench {
    /// What it costs, and how many bytes of the cluster were read; 0 if that is not known.
    fn measure(&self, way: Way, workers: usize, id: String) -> Result<(Cost, u64)> {
        warm(&self.s.server.data)?;
        let all: u64 = self.pieces.iter().map(|piece| piece.len).sum();
        let (spent, bytes) = match way {
            Way::Backup(source) => return self.backup(source, workers, id),
            Way::Files => (timed(|| self.read_files(workers))?, all),
            Way::Copy => {
                let commands = self.copies(workers)?;
                (timed(|| drain(commands))?, all)
            }
            Way::BaseBackup => (timed(|| drain(vec![self.base_backup()]))?, 0),
        };
        let (wall, cpu) = spent;
        let cost = Cost {
            wall,
            cpu,
            ..Default::default()
        };
        Ok((cost, bytes))
    }

    fn backup(&self, source: &str, workers: usize, id: String) -> Result<(Cost, u64)> {
        let ours = Run {
            s: &self.s,
            tool: Tool::Ours,
            s3: None,
            id,
            more: "",
        };
        ours.prepare()?;
        let workers = workers.to_string();
        let more = ["--source", source, "--workers", &workers, "--progress", "none"];
        let arguments = [&["backup", "acme", "--type", "full", "--fast"][..], &more].concat();
        let cost = ours.measure(ours.command(&arguments))?;
        let info = run(&mut ours.command(&["info", "acme", "--output", "json"]))?;
        let info: serde_json::Value = serde_json::from_str(&info)?;
        let backup = &info["stanzas"][0]["backups"][0];
        ensure!(backup["source"] == source, "no backup from {source}: {info}");
        let bytes = backup["plain_bytes"].as_u64();
        Ok((cost, bytes.with_context(|| format!("no plain_bytes in {info}"))?))
    }

    fn read_files(&self, threads: usize) -> Result<()> {
        let next = AtomicUsize::new(0);
        let reader = || -> Result<()> {
            let mut buffer = vec![0; PIECE as usize];
            while let Some(piece) = self.pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                let file = std::fs::File::open(self.s.server.data.join(&piece.path))?;
                let read = file.read_exact_at(&mut buffer[..piece.len as usize], piece.at);
                read.with_context(|| format!("reading {} at {}", piece.path, piece.at))?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..threads).map(|_| scope.spawn(reader)).collect();
            readers
                .into_iter()
                .try_for_each(|reader| reader.join().unwrap_or_else(|_| Err(anyhow!("a reader panicked"))))
        })
    }

    /// psql for each connection, with its part of the pieces.
    fn copies(&self, connections: usize) -> Result<Vec<Command>> {
        let one = |number: usize| -> Result<Command> {
            let mine = self.pieces.iter().skip(number).step_by(connections);
            let rows: Vec<String> = mine.map(|p| format!("('{}',{},{})", p.path, p.at, p.len)).collect();
            let sql = format!(
                "copy (select pg_read_binary_file(path, place, size, true) from (values {}) piece (path, place, size)) \
                 to stdout (format binary);\n",
                rows.join(",")
            );
            let script = self.s.scratch.write(&format!("copy{number}.sql"), sql.as_bytes())?;
            let mut command = self.s.scratch.command(tools::bin(15).join("psql"));
            command
                .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d"])
                .arg(format!("{} dbname=postgres", self.s.server.conninfo()))
                .arg("-f")
                .arg(script);
            Ok(command)
        };
        (0..connections).map(one).collect()
    }

    fn base_backup(&self) -> Command {
        let mut command = self.s.scratch.command(tools::bin(15).join("pg_basebackup"));
        command
            .args(["-D", "-", "-Ft", "-X", "none", "-c", "fast"])
            .args(["--no-manifest", "--no-verify-checksums", "-d"])
            .arg(self.s.server.conninfo());
        command
    }
}

/// Runs commands side by side; what they print goes nowhere.
fn drain(commands: Vec<Command>) -> Result<()> {
    let start = |mut command: Command| {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
    };
    let running = commands.into_iter().map(start).collect::<std::io::Result<Vec<_>>>()?;
    for child in running {
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "a reader ended with {}\n{}",
            output.status,
            text(&output)
        );
    }
    Ok(())
}

fn report(rows: &[Row], size: u32, rounds: usize) -> Result<()> {
    let mut table = String::from(
        "| | workers | readers | wall s | MB/s | MB/s a reader | CPU s of fairvault | CPU s of the machine | of its limit |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    let mut json = Vec::new();
    for row in rows {
        let limit = rows
            .iter()
            .find(|limit| row.way.limit() == Some(limit.way) && limit.readers() == row.readers());
        let of_limit = limit.map(|limit| row.rate() / limit.rate());
        let own = limit.map(|_| row.cost.own);
        let shown = |value: Option<f64>| value.map(|value| format!("{value:.2}")).unwrap_or_default();
        table += &format!(
            "| {} | {} | {} | {:.2} | {:.0} | {:.0} | {} | {:.2} | {} |\n",
            row.way.name(),
            row.workers,
            row.readers(),
            row.cost.wall,
            row.rate(),
            row.rate() / row.readers() as f64,
            shown(own),
            row.cost.cpu,
            shown(of_limit)
        );
        json.push(serde_json::json!({
            "way": row.way.name(), "workers": row.workers, "readers": row.readers(), "bytes": row.bytes,
            "wall_s": row.cost.wall, "mb_s": row.rate(), "mb_s_reader": row.rate() / row.readers() as f64,
            "own_cpu_s": own, "cpu_s": row.cost.cpu, "of_limit": of_limit,
        }));
    }
    let folder = results()?;
    std::fs::write(folder.join("sources.md"), &table)?;
    let json = serde_json::json!({ "data": DATA, "size": size, "rounds": rounds, "rows": json });
    std::fs::write(folder.join("sources.json"), format!("{json}\n"))?;
    println!("\n{table}\nwritten to {}", folder.display());
    Ok(())
}
