//! A running `fairvault wal receive`, and what the server thinks of it.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::fixture::signal;
use crate::{Fixture, Server};

/// A receiver of stanza `acme`; killed when dropped.
#[derive(Debug)]
pub struct Receiver {
    child: Child,
    log: PathBuf,
}

impl Receiver {
    /// Starts it, and waits until it receives.
    pub fn start(s: &Fixture, more: &[&str]) -> Result<Self> {
        Self::start_until(s, more, "receiving WAL from")
    }

    /// Starts it, and waits until it has said `word`.
    pub fn start_until(s: &Fixture, more: &[&str], word: &str) -> Result<Self> {
        let mut this = Self::spawn(s, more)?;
        this.wait_for_line(word)?;
        Ok(this)
    }

    /// Starts it.
    pub fn spawn(s: &Fixture, more: &[&str]) -> Result<Self> {
        let log = s
            .scratch
            .join(&format!("receive-{}.log", std::fs::read_dir(s.scratch.path())?.count()));
        let file = std::fs::File::create(&log)?;
        let mut all = vec!["wal", "receive", "acme"];
        all.extend(more);
        let child = s
            .command(&all)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()?;
        Ok(Self { child, log })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The most memory that it has had, MiB.
    pub fn peak_memory(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        Ok(kib.context("VmHWM")?.parse::<u64>()? >> 10)
    }

    /// Everything that it has said.
    pub fn text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has said `word`.
    pub fn wait_for_line(&mut self, word: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.text().contains(word) {
            ensure!(Instant::now() < deadline, "no {word:?} in {}", self.text());
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// A polite stop: everything that was received is stored. Returns what it has said.
    pub fn stop(mut self) -> Result<String> {
        signal(&self.child, "TERM")?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}: {}", self.text());
        Ok(self.text())
    }

    /// kill -9.
    pub fn kill(mut self) -> Result<String> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(self.text())
    }

    /// Waits for its end: exit code and what it has said.
    pub fn wait(mut self) -> Result<(i32, String)> {
        let status = self.child.wait()?;
        Ok((status.code().unwrap_or(-1), self.text()))
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until a server says that everything is flushed by the receiver.
pub fn wait_until_durable(s: &Fixture, server: &Server) -> Result<()> {
    let now = server.sql(&s.scratch, "select pg_current_wal_flush_lsn()")?;
    server.wait_for(
        &s.scratch,
        &format!(
            "select count(*) from pg_stat_replication where application_name = 'fairvault' and flush_lsn >= '{now}'"
        ),
        "1",
    )
}
