//! A stanza with a public key, its operator, and a host that only writes.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use fairvault_tests::fixture::{Fixture, SMALL, Shape, files};

pub const QUIET: [&str; 2] = ["--progress", "none"];

pub const ARCHIVING: Shape<'static> = Shape {
    archiving: true,
    stanza: false,
    ..SMALL
};

/// A stanza with a public key. The configuration has the key of its host, which writes only; the operator's is elsewhere.
pub struct WriteOnly {
    pub s: Fixture,
    /// What makes a command the operator's.
    pub operator: Vec<String>,
}

impl std::ops::Deref for WriteOnly {
    type Target = Fixture;

    fn deref(&self) -> &Fixture {
        &self.s
    }
}

impl WriteOnly {
    pub fn new(name: &str, shape: Shape<'_>) -> Result<Self> {
        let this = Self::of(Fixture::new(name, shape)?);
        let said = this.by_operator(&["stanza", "create", "acme", "--public-key"])?;
        ensure!(said.contains("encrypted to a public key"), "{said}");
        this.add_host()?;
        Ok(this)
    }

    /// The host's configuration names a key that opens nothing yet.
    pub fn of(s: Fixture) -> Self {
        let operator = ["--key-file", &s.path("key"), "--cache", &s.path("operator")].map(str::to_owned);
        Self {
            s,
            operator: operator.to_vec(),
        }
    }

    /// Makes the host's key and its slot, and configures it.
    pub fn add_host(&self) -> Result<()> {
        let path = self.path("host.key");
        self.ok(&["key", "generate", &path])?;
        let said = self.by_operator(&[
            "key",
            "add-slot",
            "acme",
            "host",
            "--secret-file",
            &path,
            "--write-only",
        ])?;
        ensure!(said.contains("reads nothing of what is stored"), "{said}");
        let config = self.path("fairvault.toml");
        let text = std::fs::read_to_string(&config)?;
        let key = |name: &str| format!("key = {{ file = \"{}\" }}", self.path(name));
        ensure!(text.contains(&key("key")), "{text}");
        Ok(std::fs::write(&config, text.replace(&key("key"), &key("host.key")))?)
    }

    pub fn as_operator(&self, arguments: &[&str]) -> (i32, String) {
        let operator: Vec<&str> = self.operator.iter().map(String::as_str).collect();
        self.fairvault(&[arguments, &operator].concat())
    }

    pub fn by_operator(&self, arguments: &[&str]) -> Result<String> {
        let (exit, text) = self.as_operator(arguments);
        ensure!(exit == 0, "{arguments:?} by the operator ended with {exit}: {text}");
        Ok(text)
    }

    pub fn restores(&self, name: &str, more: &[&str], rows: &str) -> Result<()> {
        let to = self.path(name);
        self.by_operator(&[&["restore", "acme", "--to", &to], &QUIET[..], more].concat())?;
        let copy = self.start(name, 5450)?;
        let found = self.rows(&copy)?;
        ensure!(found == rows, "{name}: {found} rows instead of {rows}");
        copy.stop(&self.scratch, "fast")
    }

    pub fn all_good(&self) -> Result<()> {
        let text = self.by_operator(&[&["verify", "acme", "--level", "data"], &QUIET[..]].concat())?;
        ensure!(text.contains("all good"), "{text}");
        Ok(())
    }

    pub fn fill(&self, rows: u32) -> Result<()> {
        self.sql(&format!(
            "insert into t select md5(random()::text) from generate_series(1, {rows})"
        ))?;
        Ok(())
    }

    /// The copies of manifests that the host keeps.
    pub fn copies(&self) -> Vec<PathBuf> {
        let is_copy = |path: &PathBuf| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("manifest-"))
        };
        files(&self.scratch.join("cache")).into_iter().filter(is_copy).collect()
    }
}
