//! A PostgreSQL server of a given version in a scratch folder, reachable by its Unix socket.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::{Scratch, run, tools};

/// A data directory and the programs for it.
#[derive(Debug)]
pub struct Server {
    major: u32,
    scratch: PathBuf,
    /// Data directory.
    pub data: PathBuf,
    /// Port, which is part of the socket's name.
    pub port: u16,
}

impl Server {
    /// A server on an existing data directory.
    pub fn existing(scratch: &Scratch, major: u32, data: impl Into<PathBuf>, port: u16) -> Self {
        Self {
            major,
            scratch: scratch.path().to_owned(),
            data: data.into(),
            port,
        }
    }

    /// A new, running server with `settings` appended to postgresql.conf.
    pub fn create(scratch: &Scratch, major: u32, port: u16, settings: &str) -> Result<Self> {
        Self::create_with(scratch, major, port, settings, &["-k"])
    }

    /// The same with other arguments for initdb.
    pub fn create_with(scratch: &Scratch, major: u32, port: u16, settings: &str, initdb: &[&str]) -> Result<Self> {
        let this = Self::existing(scratch, major, scratch.join(&format!("data{port}")), port);
        this.initialize(scratch, initdb)?;
        let conf = this.data.join("postgresql.conf");
        let text = format!(
            "{}\nfsync = off\nlog_min_messages = warning\nmax_wal_senders = 8\nwal_keep_size = 0\nlog_checkpoints = off\n{settings}\n",
            std::fs::read_to_string(&conf)?
        );
        std::fs::write(&conf, text)?;
        this.start(scratch)?;
        Ok(this)
    }

    /// Makes its cluster: with initdb, or as a copy of one that initdb has made in the same way for another test, where
    /// the run has a folder for such. The first cluster of a test may be a copy; the others have identities of their own.
    fn initialize(&self, scratch: &Scratch, initdb: &[&str]) -> Result<()> {
        let make = |data: &Path| -> Result<()> {
            let mut command = self.program(scratch, "initdb");
            command
                .arg("-D")
                .arg(data)
                .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"])
                .args(initdb);
            run(&mut command).map(|_| ())
        };
        let may_be_copy = self.port == 5432 && self.major < 19 && !initdb.contains(&"-X");
        let templates = std::env::var_os("FAIRVAULT_TEMPLATES").filter(|_| may_be_copy);
        let Some(templates) = templates.map(PathBuf::from) else {
            return make(&self.data);
        };
        let name = format!("{}{}", self.major, initdb.concat());
        let template = templates.join(&name);
        if !template.exists() {
            let of_whom = self.scratch.file_name().unwrap_or_default().to_string_lossy();
            let new = templates.join(format!("{name}.{of_whom}"));
            make(&new)?;
            // Somebody else may have been faster.
            if std::fs::rename(&new, &template).is_err() {
                std::fs::remove_dir_all(&new)?;
            }
        }
        let mut copy = scratch.command("cp");
        run(copy.args(["-a", "-T"]).arg(&template).arg(&self.data)).map(|_| ())
    }

    /// Major version.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// A program of this version, as the servers' user. 19 runs inside the Debian folder.
    pub fn program(&self, scratch: &Scratch, name: &str) -> Command {
        if self.major >= 19 {
            return sid_program(self.major, name);
        }
        scratch.command(tools::bin(self.major).join(name))
    }

    fn log(&self) -> PathBuf {
        self.scratch.join(format!("log{}", self.port))
    }

    /// What the server has logged.
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// Starts it and waits until it accepts connections.
    pub fn start(&self, scratch: &Scratch) -> Result<()> {
        match self.try_start(scratch, true) {
            Ok(()) => Ok(()),
            Err(error) => bail!("{error:#}\n{}", self.log_text()),
        }
    }

    /// Starts it; without `wait` it may still be in recovery, or fail later.
    pub fn try_start(&self, scratch: &Scratch, wait: bool) -> Result<()> {
        let options = format!("-p {} -k {} -c listen_addresses=", self.port, self.scratch.display());
        let mut command = self.program(scratch, "pg_ctl");
        command
            .arg("-D")
            .arg(&self.data)
            .arg(if wait { "-w" } else { "-W" })
            .arg("-l")
            .arg(self.log())
            .arg("-o")
            .arg(options)
            .arg("start");
        // pg_ctl's child keeps the pipes open: the output must not be waited for.
        command
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        let status = command.status()?;
        if !status.success() {
            bail!("pg_ctl start ended with {status}");
        }
        Ok(())
    }

    /// Stops it; `mode` is fast or immediate.
    pub fn stop(&self, scratch: &Scratch, mode: &str) -> Result<()> {
        run(self
            .program(scratch, "pg_ctl")
            .arg("-D")
            .arg(&self.data)
            .args(["-w", "-m", mode, "stop"]))?;
        Ok(())
    }

    /// Runs SQL in database postgres; unaligned tuples.
    pub fn sql(&self, scratch: &Scratch, sql: &str) -> Result<String> {
        self.sql_in(scratch, "postgres", sql)
    }

    /// Runs SQL in a database.
    pub fn sql_in(&self, scratch: &Scratch, database: &str, sql: &str) -> Result<String> {
        let mut command = scratch.command(tools::bin(15).join("psql"));
        command
            .args(["-X", "-At", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-h"])
            .arg(&self.scratch);
        Ok(run(command
            .arg("-p")
            .arg(self.port.to_string())
            .args(["-d", database, "-c", sql]))?
        .trim()
        .to_owned())
    }

    /// pgbench with arguments.
    pub fn pgbench(&self, scratch: &Scratch, arguments: &[&str]) -> Command {
        let mut command = scratch.command(tools::bin(15).join("pgbench"));
        command
            .args(["-U", "postgres", "-h"])
            .arg(&self.scratch)
            .arg("-p")
            .arg(self.port.to_string())
            .args(arguments)
            .arg("postgres");
        command
    }

    /// Has pg_hba.conf let everybody in, and nobody replicate.
    pub fn forbid_replication(&self, scratch: &Scratch) -> Result<()> {
        std::fs::write(self.data.join("pg_hba.conf"), "local all all trust\n")?;
        let before = self.sql(scratch, "select pg_conf_load_time()")?;
        self.sql(scratch, "select pg_reload_conf()")?;
        self.wait_for(scratch, &format!("select pg_conf_load_time() > '{before}'"), "t")
    }

    /// How fairvault connects to it.
    pub fn conninfo(&self) -> String {
        format!("host={} port={} user=postgres", self.scratch.display(), self.port)
    }

    /// Waits until a query returns `expected`.
    pub fn wait_for(&self, scratch: &Scratch, sql: &str, expected: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut last = String::new();
        while Instant::now() < deadline {
            match self.sql(scratch, sql) {
                Ok(value) if value == expected => return Ok(()),
                Ok(value) => last = value,
                Err(error) => last = error.to_string(),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("{sql}: {last:?} instead of {expected:?}\n{}", self.log_text())
    }

    /// Whether the server's process is there.
    pub fn is_running(&self) -> bool {
        let pid = std::fs::read_to_string(self.data.join("postmaster.pid")).ok();
        let pid = pid.as_deref().and_then(|text| text.lines().next()).map(str::to_owned);
        pid.is_some_and(|pid| Path::new("/proc").join(pid.trim()).exists())
    }
}

/// A program of 17, 18 or 19 from the Debian folder, as its user postgres.
pub fn sid_program(major: u32, name: &str) -> Command {
    let mut command = Command::new("chroot");
    command.arg("--userspec=postgres:postgres").arg(tools::sid());
    command
        .args(["env", "-i", "PATH=/usr/bin:/bin", "LANG=C.UTF-8"])
        .arg(format!("/usr/lib/postgresql/{major}/bin/{name}"));
    command
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.is_running() {
            return;
        }
        if let Ok(text) = std::fs::read_to_string(self.data.join("postmaster.pid"))
            && let Some(pid) = text.lines().next()
        {
            // QUIT is PostgreSQL's immediate shutdown.
            let _ = Command::new("kill").args(["-QUIT", pid]).status();
            for _ in 0..50 {
                if !self.is_running() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}
