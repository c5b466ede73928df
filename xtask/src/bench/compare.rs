//! `cargo xtask bench compare`: base backups and restores of several data sets, beside pgBackRest,
//! pg_basebackup and Barman on the same server, each with two workers.
//!
//! Every run begins with an empty repository and an empty directory. Nothing is deleted before all is measured: file
//! systems pay for what was deleted a moment ago (discarded blocks, inodes that must not be used again yet). Each round
//! runs every tool once, in turn; what is shown are the medians, and their ratios to pgBackRest at zstd level 3.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use fairvault_tests::proxy::{Proxy, Target};
use fairvault_tests::s3::S3;
use fairvault_tests::{Fixture, Shape, run, tools};

use super::data::{ALL, Data};
use super::report::{About, Row, report};
use super::{elsewhere, size_of, timed};

/// A tool with its settings.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// pgBackRest at zstd level 3: what all are compared with.
    PeerZstd,
    /// pgBackRest as it comes, but with two processes.
    Peer,
    /// fairvault as it comes.
    Ours,
    /// fairvault at zstd level 3, without taking pages apart.
    OursZstd,
    /// pg_basebackup with zstd level 3 on the client: it encrypts nothing.
    BaseBackup,
    /// Barman's backups into object stores, with gzip: it encrypts nothing either.
    Barman,
}

impl Tool {
    const ALL: [Self; 6] = [
        Self::PeerZstd,
        Self::Ours,
        Self::Peer,
        Self::OursZstd,
        Self::BaseBackup,
        Self::Barman,
    ];

    /// How it is called in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::PeerZstd => "pgBackRest, zstd 3",
            Self::Peer => "pgBackRest, as it comes",
            Self::Ours => "fairvault, as it comes",
            Self::OursZstd => "fairvault, zstd 3",
            Self::BaseBackup => "pg_basebackup, zstd 3",
            Self::Barman => "barman-cloud, gzip",
        }
    }
}

/// What one action came to.
#[derive(Clone, Copy, Default)]
pub struct Cost {
    /// Seconds.
    pub wall: f64,
    /// Seconds of all cores, the server's included.
    pub cpu: f64,
    /// Of these, seconds of the tool's own processes: what the kernel says when they end.
    pub own: f64,
    /// Largest process, MiB.
    pub memory: f64,
    /// MiB in the repository.
    pub stored: f64,
    /// Read from files and pipes by the tool's own processes, MiB: not what comes from a server.
    pub read: f64,
    /// To and from an S3 server, MiB.
    pub network: f64,
    /// Requests to an S3 server, where they were counted.
    pub requests: u64,
}

/// Barman for object stores, pinned.
const BARMAN: [&str; 3] = ["barman==3.19.1", "boto3==1.44.8", "psycopg2-binary"];

const MIB: f64 = 1_048_576.0;

/// What is measured.
const ACTIONS: [&str; 4] = [
    "full backup",
    "restore",
    "delta restore, 1 % damaged",
    "delta restore, 1 % damaged, nothing cached",
];

/// Builds with optimisation, and runs there.
pub fn run_it(size: u32, rounds: usize, only: Option<&str>) -> Result<()> {
    ensure!(rounds > 0, "no round was asked for: give one at least");
    let names: Vec<&str> = ALL.iter().map(|data| data.name).collect();
    ensure!(
        only.is_none_or(|only| names.contains(&only)),
        "{:?} is no data set: give one of {}",
        only.unwrap_or_default(),
        names.join(", ")
    );
    let mut arguments = vec!["compare".to_owned(), size.to_string(), rounds.to_string()];
    arguments.extend(only.map(str::to_owned));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if elsewhere(&arguments)? {
        return Ok(());
    }
    tools::install_debian()?;
    tools::install_ministack()?;
    tools::install_time()?;
    tools::install_sid()?;
    tools::install_pgbackrest()?;
    tools::python("barman", &BARMAN)?;
    let mut rows = Vec::new();
    let compared = ALL
        .iter()
        .filter(|data| only.is_none_or(|only| only == data.name))
        .try_for_each(|data| compare(data, size, rounds, &mut rows));
    tools::unmount_sid();
    compared?;
    let about = About {
        size,
        rounds,
        data: only,
        versions: [
            run(Command::new(fairvault_tests::scratch::binary()?).arg("--version"))?,
            run(Command::new("chroot").arg(tools::sid()).args(["pgbackrest", "version"]))?,
            std::fs::read_to_string("/proc/sys/kernel/osrelease")?,
        ],
    };
    report(&rows, &about)
}

fn compare(data: &Data, size: u32, rounds: usize, rows: &mut Vec<Row>) -> Result<()> {
    println!("\n{}: {}", data.name, data.about);
    let settings = "shared_buffers = 512MB\nmax_wal_size = 8GB\nmaintenance_work_mem = 256MB\nautovacuum = off\nmax_locks_per_transaction = 1000\n";
    let s = Fixture::new(
        &format!("compare-{}", data.name),
        Shape {
            stanza: false,
            settings,
            ..Default::default()
        },
    )?;
    data.make(&s, size)?;
    // WAL of before is no part of a backup.
    s.sql("select pg_switch_wal(); checkpoint")?;
    let bytes: f64 = s.sql("select sum(pg_database_size(oid)) from pg_database")?.parse()?;
    println!("{:.0} MiB in databases", bytes / MIB);
    let s3 = S3::start_tls(&s.scratch, "bucket")?;
    for place in [None, Some(&s3)] {
        let title = format!("{}, {}", data.name, if place.is_some() { "S3" } else { "directory" });
        // pg_basebackup knows folders only, barman-cloud object stores.
        let in_place = |tool: &&Tool| match place {
            None => **tool != Tool::Barman,
            Some(_) => matches!(tool, Tool::PeerZstd | Tool::Ours | Tool::OursZstd | Tool::Barman),
        };
        let tools: Vec<Tool> = Tool::ALL.iter().filter(in_place).copied().collect();
        let mut costs: Vec<[Vec<Cost>; ACTIONS.len()]> = tools.iter().map(|_| Default::default()).collect();
        for round in 0..rounds {
            for (tool, costs) in tools.iter().zip(&mut costs) {
                let run = Run {
                    s: &s,
                    tool: *tool,
                    s3: place.map(S3::endpoint),
                    id: format!("{}{round}{}", *tool as u8, u8::from(place.is_some())),
                    more: "",
                };
                run.all(place, costs)?;
            }
        }
        for (action, name) in ACTIONS.iter().enumerate() {
            for (tool, costs) in tools.iter().zip(&costs).filter(|(_, costs)| !costs[action].is_empty()) {
                rows.push(Row {
                    data: title.clone(),
                    action: name,
                    tool: tool.name(),
                    cost: median(&costs[action]),
                    allowed: None,
                });
            }
        }
    }
    drop(s3);
    backups_from_disk(data, &s, rounds, rows)?;
    // However many relations there are.
    let allowed = (data.name == "small").then_some((bytes / MIB / 16.0) as u64 + 50);
    count_requests(data, &s, allowed, rows)
}

/// Backups of a cluster of which nothing is in the kernel's cache.
fn backups_from_disk(data: &Data, s: &Fixture, rounds: usize, rows: &mut Vec<Row>) -> Result<()> {
    let action = "full backup, nothing cached";
    let tools = [Tool::PeerZstd, Tool::Ours, Tool::BaseBackup];
    let mut costs = tools.map(|_| Vec::new());
    for round in 0..rounds {
        for (tool, costs) in tools.into_iter().zip(&mut costs) {
            let run = Run {
                s,
                tool,
                s3: None,
                id: format!("cold{}{round}", tool as u8),
                more: "",
            };
            run.prepare()?;
            empty_cache()?;
            let cost = run.measure(run.backup("full"))?;
            println!(
                "{:<28} {action:<26} {:>7.2} s wall {:>7.2} s CPU",
                tool.name(),
                cost.wall,
                cost.cpu
            );
            costs.push(cost);
        }
    }
    for (tool, costs) in tools.iter().zip(&costs) {
        rows.push(Row {
            data: format!("{}, directory", data.name),
            action,
            tool: tool.name(),
            cost: median(costs),
            allowed: None,
        });
    }
    Ok(())
}

/// Nothing of any file is in the kernel's cache afterwards.
fn empty_cache() -> Result<()> {
    run(&mut Command::new("sync"))?;
    Ok(std::fs::write("/proc/sys/vm/drop_caches", "1")?)
}

/// A backup and a restore by fairvault, for their requests: those of before were encrypted.
fn count_requests(data: &Data, s: &Fixture, allowed: Option<u64>, rows: &mut Vec<Row>) -> Result<()> {
    let s3 = S3::start(&s.scratch, "bucket")?;
    let proxy = Proxy::start(Target::Port(s3.port))?;
    let run = Run {
        s,
        tool: Tool::Ours,
        s3: Some(format!("http://127.0.0.1:{}", proxy.port)),
        id: "counted".to_owned(),
        more: "",
    };
    run.prepare()?;
    for (action, command) in ACTIONS.iter().zip([run.backup("full"), run.restore(false)]) {
        let before = proxy.requests();
        let mut cost = run.measure(command)?;
        // The proxy is between them: all went over the network twice, and took its time.
        cost.network /= 2.0;
        cost.requests = proxy.requests() - before;
        println!("{action}: {} requests", cost.requests);
        rows.push(Row {
            data: format!("{}, S3, requests counted", data.name),
            action,
            tool: run.tool.name(),
            cost,
            allowed,
        });
    }
    Ok(())
}

/// The median of each figure.
pub fn median(costs: &[Cost]) -> Cost {
    let of = |value: fn(&Cost) -> f64| {
        let mut values: Vec<f64> = costs.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Cost {
        wall: of(|c| c.wall),
        cpu: of(|c| c.cpu),
        own: of(|c| c.own),
        memory: of(|c| c.memory),
        stored: of(|c| c.stored),
        read: of(|c| c.read),
        network: of(|c| c.network),
        requests: costs.iter().map(|c| c.requests).max().unwrap_or_default(),
    }
}

/// One tool at work in its own repository.
pub struct Run<'a> {
    /// The server, and a folder for everything.
    pub s: &'a Fixture,
    /// Which tool.
    pub tool: Tool,
    /// URL of the S3 server that the repository is on, if not in a folder.
    pub s3: Option<String>,
    /// Part of every name.
    pub id: String,
    /// More lines of pgBackRest's configuration.
    pub more: &'static str,
}

impl Run<'_> {
    /// A backup, a restore, and restores over damage.
    fn all(&self, s3: Option<&S3>, costs: &mut [Vec<Cost>; ACTIONS.len()]) -> Result<()> {
        let [repository, restored] = ["repo", "restored"].map(|name| self.s.scratch.join(&self.name(name)));
        self.prepare()?;
        // Each tool finds the cluster in the kernel's cache.
        warm(&self.s.server.data)?;
        let mut cost = self.measure(self.backup("full"))?;
        let stored = match s3 {
            None => size_of(&repository),
            Some(s3) => s3.stored("bucket", &format!("{}/", self.name("repo")))?,
        };
        cost.stored = stored as f64 / MIB;
        self.note(0, cost, costs);
        if self.tool != Tool::BaseBackup {
            let cost = self.measure(self.restore(false))?;
            self.note(1, cost, costs);
        }
        if !matches!(self.tool, Tool::BaseBackup | Tool::Barman) {
            // What a restore before has left in the kernel's cache is another matter for each tool: once it is all
            // there, and once nothing.
            damage(&restored)?;
            warm(&restored)?;
            let cost = self.measure(self.restore(true))?;
            self.note(2, cost, costs);
            damage(&restored)?;
            empty_cache()?;
            let cost = self.measure(self.restore(true))?;
            self.note(3, cost, costs);
        }
        Ok(())
    }

    fn note(&self, action: usize, cost: Cost, costs: &mut [Vec<Cost>; ACTIONS.len()]) {
        println!(
            "{:<28} {:<26} {:>7.2} s wall {:>7.2} s CPU {:>5.0} MiB peak {:>8.1} MiB stored {:>7.0} MiB read {:>7.0} MiB over the network",
            self.tool.name(),
            ACTIONS[action],
            cost.wall,
            cost.cpu,
            cost.memory,
            cost.stored,
            cost.read,
            cost.network
        );
        costs[action].push(cost);
    }

    /// Its name of something.
    pub fn name(&self, what: &str) -> String {
        format!("{what}{}", self.id)
    }

    /// Its place of something.
    pub fn path(&self, what: &str) -> String {
        self.s.path(&self.name(what))
    }

    /// Empty folders, configuration, stanza.
    pub fn prepare(&self) -> Result<()> {
        for folder in ["repo", "restored"] {
            run(self.s.scratch.command("mkdir").args(["-m", "700", &self.path(folder)]))?;
        }
        let dir = self.s.scratch.path().display().to_string();
        match self.tool {
            Tool::Peer | Tool::PeerZstd => {
                let repo = match &self.s3 {
                    None => format!("repo1-path={}", self.path("repo")),
                    Some(s3) => format!(
                        "repo1-type=s3\nrepo1-path=/{}\nrepo1-s3-bucket=bucket\nrepo1-s3-endpoint={}\nrepo1-s3-region=us-east-1\n\
                         repo1-s3-key=test\nrepo1-s3-key-secret=test\nrepo1-s3-uri-style=path\nrepo1-storage-ca-file={dir}/ca.crt",
                        self.name("repo"),
                        s3.trim_start_matches("https://")
                    ),
                };
                let compression = match self.tool {
                    Tool::PeerZstd => "compress-type=zst\ncompress-level=3\n",
                    _ => "",
                };
                let text = format!(
                    "[global]\n{repo}\nrepo1-cipher-type=aes-256-cbc\nrepo1-cipher-pass=secret\n{compression}process-max=2\n\
                     spool-path={dir}/spool\nlock-path={dir}/lock\nlog-path={dir}/log\nlog-level-console=warn\nlog-level-file=off\narchive-check=n\nstart-fast=y\n{}\
                     [acme]\npg1-path={}\npg1-socket-path={dir}\npg1-port=5432\npg1-user=postgres\n",
                    self.more,
                    self.s.server.data.display()
                );
                self.s.scratch.write(&self.name("conf"), text.as_bytes())?;
                run(&mut self.command(&["stanza-create", "--no-online"])).map(drop)
            }
            Tool::Ours | Tool::OursZstd => {
                let repo = match &self.s3 {
                    None => format!("url = \"file://{}\"", self.path("repo")),
                    Some(s3) => {
                        self.s.scratch.write("s3.secret", b"test")?;
                        let ca = match s3.starts_with("https:") {
                            true => format!("ca_file = \"{dir}/ca.crt\""),
                            false => String::new(),
                        };
                        format!(
                            "url = \"s3://bucket/{}\"\nendpoint = \"{s3}\"\nregion = \"us-east-1\"\naccess_key = \"test\"\n\
                             secret_key_file = \"{dir}/s3.secret\"\n{ca}",
                            self.name("repo")
                        )
                    }
                };
                let compression = match self.tool {
                    Tool::OursZstd => "[defaults]\ncompression = { codec = \"zstd\", level = 3 }\n",
                    _ => "",
                };
                let text = format!(
                    "cache = \"{}\"\n[repo.main]\n{repo}\n{compression}[stanza.acme]\nconninfo = \"{}\"\nkey = {{ file = \"{dir}/key\" }}\n",
                    self.path("cache"),
                    self.s.server.conninfo()
                );
                self.s.scratch.write(&self.name("conf"), text.as_bytes())?;
                run(&mut self.command(&["stanza", "create", "acme"])).map(drop)
            }
            Tool::BaseBackup | Tool::Barman => Ok(()),
        }
    }

    /// The tool with its configuration.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let config = format!("--config={}", self.path("conf"));
        match self.tool {
            Tool::Peer | Tool::PeerZstd => {
                let mut command = Command::new("chroot");
                command
                    .args(["--userspec=postgres:postgres".as_ref(), tools::sid().as_os_str()])
                    .args(["pgbackrest", "--stanza=acme", &config])
                    .args(arguments);
                command
            }
            Tool::Ours | Tool::OursZstd => {
                let mut all = vec![config.as_str()];
                all.extend(arguments);
                self.s.scratch.fairvault(&all)
            }
            Tool::Barman => {
                // As root: Python is where only root may look.
                let mut command = Command::new("env");
                let dir = self.s.scratch.path().display();
                command
                    .args([
                        "AWS_ACCESS_KEY_ID=test",
                        "AWS_SECRET_ACCESS_KEY=test",
                        "AWS_DEFAULT_REGION=us-east-1",
                    ])
                    .arg(format!("AWS_CA_BUNDLE={dir}/ca.crt"))
                    .arg(tools::folder().join("barman/bin").join(arguments[0]))
                    .arg("--endpoint-url")
                    .arg(self.s3.as_deref().unwrap_or_default())
                    .args(&arguments[1..]);
                command
            }
            Tool::BaseBackup => {
                let mut command = self.s.scratch.command(tools::bin(15).join("pg_basebackup"));
                command.args(["-d", &self.s.server.conninfo()]).args(arguments);
                command
            }
        }
    }

    /// A backup of a type.
    pub fn backup(&self, kind: &str) -> Command {
        match self.tool {
            Tool::Peer | Tool::PeerZstd => self.command(&["backup", &format!("--type={kind}")]),
            Tool::Ours | Tool::OursZstd => self.command(&[
                "backup",
                "acme",
                "--type",
                kind,
                "--fast",
                "--workers",
                "2",
                "--progress",
                "none",
            ]),
            Tool::Barman => self.command(&[
                "barman-cloud-backup",
                "--jobs=2",
                "--gzip",
                "--immediate-checkpoint",
                "--host",
                &self.s.scratch.path().display().to_string(),
                "--port=5432",
                "--user=postgres",
                "--name=once",
                &format!("s3://bucket/{}", self.name("repo")),
                "acme",
            ]),
            Tool::BaseBackup => self.command(&[
                "-D",
                &self.path("repo"),
                "-Ft",
                "-c",
                "fast",
                "--compress=client-zstd:level=3,workers=2",
            ]),
        }
    }

    /// A restore, over what is there or into an empty folder.
    pub fn restore(&self, delta: bool) -> Command {
        let target = self.path("restored");
        match self.tool {
            Tool::Ours | Tool::OursZstd => {
                let mut arguments = vec!["restore", "acme", "--to", &target, "--progress", "none"];
                arguments.extend(delta.then_some("--delta"));
                self.command(&arguments)
            }
            Tool::Barman => self.command(&[
                "barman-cloud-restore",
                &format!("s3://bucket/{}", self.name("repo")),
                "acme",
                "once",
                &target,
            ]),
            _ => {
                let to = format!("--pg1-path={target}");
                let mut arguments = vec![to.as_str(), "restore"];
                arguments.extend(delta.then_some("--delta"));
                self.command(&arguments)
            }
        }
    }

    /// What a command costs.
    pub fn measure(&self, command: Command) -> Result<Cost> {
        // What a run before has left to be written is not this one's.
        run(&mut Command::new("sync"))?;
        let file = self.s.scratch.join("peak");
        // The same two cores for all, however many there are.
        let mut timed_command = Command::new("taskset");
        timed_command
            .args(["-c", "0,1", "/usr/bin/time", "-f", "%M %U %S", "-o"])
            .arg(&file)
            .arg(command.get_program());
        timed_command.args(command.get_args());
        if let Some(folder) = command.get_current_dir() {
            timed_command.current_dir(folder);
        }
        let (read_before, network_before) = (read_by_children()?, over_loopback()?);
        let (wall, cpu) = timed(|| run(&mut timed_command).map(drop))?;
        let read = (read_by_children()? - read_before) / MIB;
        let network = (over_loopback()? - network_before) / MIB;
        let text = std::fs::read_to_string(&file)?;
        // The peak in KiB, then seconds as a user and in the kernel.
        let line = text.lines().last().context("GNU time has written nothing")?;
        let numbers: Vec<f64> = line.split(' ').map(str::parse::<f64>).collect::<Result<_, _>>()?;
        let [peak, user, system] = numbers[..] else {
            bail!("GNU time has written {line:?} instead of three numbers");
        };
        Ok(Cost {
            wall,
            cpu,
            own: user + system,
            memory: peak / 1024.0,
            read,
            network,
            ..Default::default()
        })
    }
}

/// Bytes that this process, and those that it has waited for, have read with system calls on files and pipes.
fn read_by_children() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/io")?;
    let line = text.lines().find_map(|line| line.strip_prefix("rchar: "));
    Ok(line.context("no rchar in /proc/self/io")?.trim().parse()?)
}

/// Bytes that this machine has sent to itself: servers of databases are spoken to by other means.
fn over_loopback() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/net/dev")?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("lo:"));
    let bytes = line
        .and_then(|line| line.split_whitespace().next())
        .context("no lo in /proc/net/dev")?;
    Ok(bytes.parse()?)
}

/// Brings a folder's files into the kernel's cache.
pub fn warm(folder: &Path) -> Result<()> {
    for file in fairvault_tests::fixture::files(folder) {
        // One that has gone meanwhile needs no warmth.
        if let Ok(mut file) = std::fs::File::open(file) {
            std::io::copy(&mut file, &mut std::io::sink())?;
        }
    }
    Ok(())
}

/// Overwrites one page in a hundred of the relation files, always the same ones.
fn damage(folder: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let mut files: Vec<PathBuf> = fairvault_tests::fixture::files(&folder.join("base"));
    files.sort();
    ensure!(!files.is_empty(), "nothing was restored");
    let mut state = 1u64;
    for path in files {
        let pages = std::fs::metadata(&path)?.len() / 8192;
        let file = std::fs::File::options().write(true).open(&path)?;
        for page in 0..pages {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if (state >> 33).is_multiple_of(100) {
                file.write_all_at(&state.to_le_bytes(), page * 8192 + 4096)?;
            }
        }
    }
    Ok(())
}
