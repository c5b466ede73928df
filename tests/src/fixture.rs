//! A server, a directory repository with a key, and a stanza `acme`: where most tests begin.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result, ensure};

use crate::{Scratch, Server, code, run};

/// How a fixture is to be.
#[derive(Debug, Clone, Copy)]
pub struct Shape<'a> {
    /// Major version of the server.
    pub major: u32,
    /// archive_command is `fairvault wal push`.
    pub archiving: bool,
    /// The stanza is created; otherwise the first backup with options does it.
    pub stanza: bool,
    /// More lines of the stanza in the configuration.
    pub more: &'a str,
    /// Options on the command line instead of a configuration file.
    pub flags: bool,
    /// More lines for postgresql.conf.
    pub settings: &'a str,
    /// Arguments for initdb.
    pub initdb: &'a [&'a str],
}

impl Default for Shape<'_> {
    fn default() -> Self {
        Self {
            major: 15,
            archiving: false,
            stanza: true,
            more: "",
            flags: false,
            settings: "",
            initdb: &["-k"],
        }
    }
}

/// Segments of 1 MiB.
pub const SMALL: Shape<'static> = Shape {
    major: 15,
    archiving: false,
    stanza: true,
    more: "",
    flags: false,
    settings: "",
    initdb: &["-k", "--wal-segsize=1"],
};

/// The fixture.
#[derive(Debug)]
pub struct Fixture {
    /// Its folder.
    pub scratch: Scratch,
    /// Its server.
    pub server: Server,
    /// The options that say where repository, key and server are.
    pub options: Vec<String>,
}

impl Fixture {
    /// Sets it up.
    pub fn new(name: &str, shape: Shape<'_>) -> Result<Self> {
        let scratch = Scratch::new(name)?;
        let dir = scratch.path().display().to_string();
        run(&mut scratch.fairvault(&["key", "generate", &format!("{dir}/key")]))?;
        let config = write_config(&scratch, shape.more)?;
        let archive = match shape.archiving {
            true => archive_settings(&scratch, &config),
            false => String::new(),
        };
        let settings = format!("{archive}{}", shape.settings);
        let server = Server::create_with(&scratch, shape.major, 5432, &settings, shape.initdb)?;
        let options = match shape.flags {
            false => vec!["--config".to_owned(), config],
            true => [
                "--repo-url",
                &format!("file://{dir}/vault"),
                "--key-file",
                &format!("{dir}/key"),
                "--conninfo",
                &server.conninfo(),
            ]
            .map(str::to_owned)
            .to_vec(),
        };
        let this = Self {
            scratch,
            server,
            options,
        };
        if shape.stanza {
            this.ok(&["stanza", "create", "acme"])?;
        }
        Ok(this)
    }

    /// A copy of a repository with its key, as they lie in a folder. The server is not there: restore it.
    pub fn of_repository(name: &str, folder: &Path, more: &str) -> Result<Self> {
        let scratch = Scratch::new(name)?;
        scratch.write("key", &std::fs::read(folder.join("key"))?)?;
        scratch.copy_folder(&folder.join("vault"), "vault")?;
        let options = vec!["--config".to_owned(), write_config(&scratch, more)?];
        let server = Server::existing(&scratch, 15, scratch.join("data5432"), 5432);
        Ok(Self {
            scratch,
            server,
            options,
        })
    }

    /// What makes a server archive into the repository, for a fixture with a configuration file.
    pub fn archiving(&self) -> String {
        archive_settings(&self.scratch, &self.options[1])
    }

    /// Puts the repository into a bucket of an S3 server; for a fixture whose stanza is not created yet.
    pub fn use_s3(&mut self, endpoint: &str, url: &str, more: &str) -> Result<()> {
        let dir = self.scratch.path().display().to_string();
        let text = format!(
            "cache = \"{dir}/cache\"\n[repo.main]\nurl = \"{url}\"\nendpoint = \"{endpoint}\"\nregion = \"us-east-1\"\naccess_key = \"test\"\nsecret_key_file = \"{dir}/s3.secret\"\nretry_timeout = \"5s\"\n\
             [stanza.acme]\nconninfo = \"host={dir} port=5432 user=postgres\"\nkey = {{ file = \"{dir}/key\" }}\n{more}\n"
        );
        self.scratch.write("s3.secret", b"test")?;
        self.scratch.write("s3.toml", text.as_bytes())?;
        self.options = vec!["--config".to_owned(), format!("{dir}/s3.toml")];
        Ok(())
    }

    /// The command, to be run by the caller.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut all: Vec<&str> = self.options.iter().map(String::as_str).collect();
        all.extend(arguments);
        self.scratch.fairvault(&all)
    }

    /// Exit code and everything printed.
    pub fn fairvault(&self, arguments: &[&str]) -> (i32, String) {
        code(&mut self.command(arguments))
    }

    /// Everything printed by a run that must succeed.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        let (exit, text) = self.fairvault(arguments);
        ensure!(exit == 0, "fairvault {arguments:?} ended with {exit}:\n{text}");
        Ok(text)
    }

    /// A backup; returns what it printed.
    pub fn backup(&self) -> Result<String> {
        self.ok(&["backup", "acme", "--fast", "--progress", "none"])
    }

    /// What a backup that succeeds says as JSON.
    pub fn backup_json(&self, more: &[&str]) -> Result<String> {
        self.ok(&[&BACKUP_JSON, more].concat())
    }

    /// The id of a new backup.
    pub fn backup_id(&self, more: &[&str]) -> Result<String> {
        field(&self.backup_json(more)?, "id")
    }

    /// SQL in database postgres of the server.
    pub fn sql(&self, sql: &str) -> Result<String> {
        self.server.sql(&self.scratch, sql)
    }

    /// Rows of table t on a server.
    pub fn rows(&self, server: &Server) -> Result<String> {
        server.sql(&self.scratch, "select count(*) from t")
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> String {
        self.scratch.join(name).display().to_string()
    }

    /// `restore acme --to <name>`.
    pub fn restore(&self, name: &str, more: &[&str]) -> (i32, String) {
        let to = self.path(name);
        let mut all = vec!["restore", "acme", "--to", &to, "--progress", "none"];
        all.extend(more);
        self.fairvault(&all)
    }

    /// A restored copy, not started.
    pub fn copy(&self, name: &str, port: u16) -> Server {
        Server::existing(&self.scratch, self.server.major(), self.path(name), port)
    }

    /// Restores a standby that streams from the server, with more options of `restore` and more settings, and
    /// starts it.
    pub fn standby(&self, name: &str, port: u16, more: &[&str], settings: &str) -> Result<Server> {
        let (exit, text) = self.restore(name, &[&["--standby"], more].concat());
        ensure!(exit == 0, "{text}");
        let streaming = format!("primary_conninfo = '{}'\n{settings}\n", self.server.conninfo());
        self.configure(name, &streaming)?;
        let standby = self.copy(name, port);
        standby.start(&self.scratch)?;
        Ok(standby)
    }

    /// Adds settings to a restored copy.
    pub fn configure(&self, name: &str, settings: &str) -> Result<()> {
        let conf = self.path(&format!("{name}/postgresql.auto.conf"));
        Ok(std::fs::write(&conf, std::fs::read_to_string(&conf)? + settings)?)
    }

    /// Promotes a standby, and waits until that is done.
    pub fn promote(&self, standby: &Server) -> Result<()> {
        let mut command = standby.program(&self.scratch, "pg_ctl");
        run(command.args(["promote", "-w", "-D"]).arg(&standby.data))?;
        Ok(())
    }

    /// Starts a restored copy and waits for the end of recovery.
    pub fn start(&self, name: &str, port: u16) -> Result<Server> {
        let server = self.copy(name, port);
        server.start(&self.scratch)?;
        server.wait_for(&self.scratch, "select pg_is_in_recovery()", "f")?;
        Ok(server)
    }

    /// Ends the current segment and waits until it is archived. Returns its name.
    pub fn flush_archive(&self, server: &Server) -> Result<String> {
        let segment = server.sql(&self.scratch, "select pg_walfile_name(pg_current_wal_lsn())")?;
        server.sql(
            &self.scratch,
            "create table if not exists fill (x int); insert into fill values (1); select pg_switch_wal()",
        )?;
        server.wait_for(
            &self.scratch,
            &format!("select last_archived_wal >= '{segment}' from pg_stat_archiver"),
            "t",
        )?;
        Ok(segment)
    }

    /// Objects of the stanza below a folder, sorted.
    pub fn objects(&self, folder: &str) -> Vec<PathBuf> {
        files(&self.scratch.join("vault/acme").join(folder))
    }
}

/// A directory repository with a key and a stanza. Returns the file's path.
fn write_config(scratch: &Scratch, more: &str) -> Result<String> {
    let dir = scratch.path().display();
    let text = format!(
        "cache = \"{dir}/cache\"\n[repo.main]\nurl = \"file://{dir}/vault\"\n[stanza.acme]\nconninfo = \"host={dir} port=5432 user=postgres\"\nkey = {{ file = \"{dir}/key\" }}\n{more}\n",
    );
    Ok(scratch.write("fairvault.toml", text.as_bytes())?.display().to_string())
}

fn archive_settings(scratch: &Scratch, config: &str) -> String {
    let dir = scratch.path().display();
    format!("archive_mode = on\narchive_command = '{dir}/fairvault --config {config} wal push acme %p'\n")
}

/// Every file below a folder, sorted.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => out.extend(files(&path)),
            path => out.push(path),
        }
    }
    out.sort();
    out
}

/// A field of JSON output, wherever it is: strings without quotes.
pub fn field(text: &str, key: &str) -> Result<String> {
    let rest = text.split(&format!("\"{key}\":")).nth(1);
    let value = rest.and_then(|rest| rest.split([',', '}']).next());
    Ok(value
        .with_context(|| format!("no {key} in {text}"))?
        .trim_matches('"')
        .to_owned())
}

/// A number of a JSON text; see [`field`].
pub fn number(text: &str, key: &str) -> Result<u64> {
    field(text, key)?.parse().with_context(|| format!("{key} in {text}"))
}

/// Fails unless a run ended with this code and said this.
pub fn refused((exit, text): (i32, String), expected: i32, word: &str) -> Result<()> {
    ensure!(
        exit == expected && text.contains(word),
        "expected {expected} and {word:?}, got {exit}: {text}"
    );
    Ok(())
}

/// A backup that says what it was, for machines.
pub const BACKUP_JSON: [&str; 7] = ["backup", "acme", "--fast", "--progress", "none", "--output", "json"];

/// What this host is called in the log, in leases and in messages.
pub fn host_name() -> Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned())
}

/// Sends a signal to a program that [`Fixture::command`] started.
pub fn signal(child: &Child, name: &str) -> Result<()> {
    run(Command::new("kill").arg(format!("-{name}")).arg(child.id().to_string()))?;
    Ok(())
}
