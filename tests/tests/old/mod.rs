//! What the tests of older repositories share: what such a repository is said to hold, and how one is made small.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use fairvault_format::sha256;
use fairvault_tests::fixture::{Fixture, files};
use fairvault_tests::tools::reader;
use fairvault_tests::{Server, run};

/// What is asked of every restored server.
pub const QUERY: &str = "select count(*) || '/' || sum(i) || '/' || md5(string_agg(x, ',' order by i)) from t";
/// What a restore adds or changes beside the content of a backup.
pub const RESTORED: [&str; 4] = [
    "postgresql.auto.conf",
    "recovery.signal",
    "backup_manifest",
    "fairvault.restored",
];
/// To the end of the backup, and no further.
pub const AT_ONCE: [&str; 4] = ["--target", "immediate", "--target-action", "promote"];

/// SHA-256 over path and content of every file of a backup, as it was restored; and their number.
pub fn digest(root: &Path) -> Result<(usize, String)> {
    let (mut text, mut count) = (String::new(), 0);
    for path in files(root) {
        let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
        if !RESTORED.contains(&name.as_str()) {
            writeln!(text, "{name} {}", hex::encode(sha256(&std::fs::read(&path)?)))?;
            count += 1;
        }
    }
    Ok((count, hex::encode(sha256(text.as_bytes()))))
}

/// A backup that the repository holds.
pub struct Held {
    pub id: String,
    pub files: usize,
    pub digest: String,
    pub result: String,
}

/// What the repository is said to hold: the lines of `content.txt` by their first word.
pub struct Content(BTreeMap<String, Vec<Vec<String>>>);

impl Content {
    pub fn read(folder: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(folder.join("content.txt"))?;
        let mut lines: BTreeMap<String, Vec<Vec<String>>> = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            let mut words = line.split(' ').map(str::to_owned);
            let first = words.next().context("a word")?;
            lines.entry(first).or_default().push(words.collect());
        }
        Ok(Self(lines))
    }

    pub fn word(&self, first: &str) -> Result<&str> {
        let line = self.0.get(first).and_then(|lines| lines.first()?.first());
        line.map(String::as_str)
            .with_context(|| format!("content.txt has no line {first}"))
    }

    pub fn backups(&self) -> Result<Vec<Held>> {
        let lines = self.0.get("backup").context("content.txt has no backup")?;
        let backups = lines.iter().map(|words| match words.as_slice() {
            [id, _, files, digest, result] => Ok(Held {
                id: id.clone(),
                files: files.parse()?,
                digest: digest.clone(),
                result: result.clone(),
            }),
            other => anyhow::bail!("{other:?}"),
        });
        backups.collect()
    }
}

pub fn query(s: &Fixture, server: &Server) -> Result<String> {
    server.sql(&s.scratch, QUERY)
}

pub fn restore(s: &Fixture, name: &str, more: &[&str]) -> Result<()> {
    let (exit, text) = s.restore(name, more);
    ensure!(exit == 0, "{text}");
    Ok(())
}

/// Every backup comes back byte for byte, by the engine and by the independent reader, and its server answers as it did; so
/// does the end of the WAL, and a segment. `restore_one` restores a backup, no further than to its end.
pub fn restores_byte_for_byte(
    s: &Fixture,
    content: &Content,
    restore_one: impl Fn(&str, &str) -> Result<()>,
) -> Result<()> {
    let (vault, key) = (s.path("vault"), s.path("key"));
    for (number, backup) in content.backups()?.iter().enumerate() {
        let name = format!("copy{number}");
        restore_one(&name, &backup.id)?;
        let expected = (backup.files, backup.digest.clone());
        ensure!(digest(&s.scratch.join(&name))? == expected, "{}", backup.id);
        let by_reader = s.scratch.join(&format!("reader{number}"));
        let to = by_reader.display().to_string();
        reader(&[&vault, "restore", "acme", &backup.id, &to, "--key-file", &key])?;
        ensure!(digest(&by_reader)? == expected, "{} by the reader", backup.id);
        let server = s.start(&name, 5433)?;
        ensure!(query(s, &server)? == backup.result, "{}", backup.id);
        server.stop(&s.scratch, "fast")?;
    }
    restore(s, "latest", &[])?;
    let server = s.start("latest", 5433)?;
    ensure!(query(s, &server)? == content.word("latest")?);
    let segment = content.word("segment")?;
    let (engine, python) = (s.path("segment-engine"), s.path("segment-reader"));
    s.ok(&["wal", "get", "acme", segment, &engine])?;
    reader(&[&vault, "wal", "acme", segment, &python, "--key-file", &key])?;
    let by_engine = std::fs::read(&engine)?;
    ensure!(by_engine == std::fs::read(&python)? && hex::encode(sha256(&by_engine)) == content.word("segment-sha256")?);
    Ok(())
}

/// Everything that a small repository does not need.
pub fn strip(s: &Fixture) -> Result<()> {
    let sql = |options: &str, sql: &str| {
        let mut command = s.server.program(&s.scratch, "psql");
        let port = s.server.port.to_string();
        command
            .args(["-X", "-At", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-h"])
            .arg(s.scratch.path());
        let conninfo = format!("dbname=postgres options='{options}'");
        run(command.args(["-p", &port, "-c", sql]).arg(conninfo))
    };
    for template in ["template0", "template1"] {
        sql("", "update pg_database set datistemplate = false")?;
        sql("", &format!("drop database {template}"))?;
    }
    sql("", "drop schema information_schema cascade")?;
    let anything = "-c allow_system_table_mods=on";
    sql(
        anything,
        "do $$ declare v name; begin for v in select relname from pg_class where relkind = 'v' and \
         relnamespace = 'pg_catalog'::regnamespace and relname not in ('pg_stat_archiver', 'pg_stat_replication') loop \
         execute format('drop view if exists pg_catalog.%I cascade', v); end loop; end $$",
    )?;
    for statement in [
        "delete from pg_statistic",
        "delete from pg_description",
        "delete from pg_collation where collname not in ('default', 'C', 'POSIX', 'ucs_basic')",
        "vacuum full",
        "checkpoint",
        "select pg_switch_wal()",
    ] {
        sql(anything, statement)?;
    }
    Ok(())
}

pub fn insert(s: &Fixture, server: &Server, from: u32, to: u32) -> Result<()> {
    let sql = format!("insert into t select i, md5(i::text) from generate_series({from}, {to}) i");
    server.sql(&s.scratch, &sql).map(|_| ())
}

static WRITING: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// With `FAIRVAULT_FIXTURES=write`, makes the repository of a folder that is not there.
pub fn write_if_asked(folder: &Path, write: fn() -> Result<()>) -> Result<()> {
    let _one = WRITING.lock();
    let is_asked = std::env::var("FAIRVAULT_FIXTURES").is_ok_and(|word| word == "write");
    match is_asked && !folder.exists() {
        true => write().context("writing the fixture"),
        false => Ok(()),
    }
}
