//! An S3-compatible server in memory, for one test.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::{Scratch, run, tools};

/// The server; it ends with this value.
#[derive(Debug)]
pub struct S3 {
    child: Child,
    /// Its port.
    pub port: u16,
}

/// A TCP port that is free just now.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl S3 {
    /// Starts it with a bucket.
    pub fn start(scratch: &Scratch, bucket: &str) -> Result<Self> {
        let port = free_port()?;
        let log = std::fs::File::create(scratch.join("s3.log"))?;
        let child = Command::new(tools::install_ministack()?)
            .env("BIND_HOST", "127.0.0.1")
            .env("GATEWAY_PORT", port.to_string())
            .env("SERVICES", "s3")
            .env("LOG_LEVEL", "WARNING")
            .env("TMPDIR", scratch.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let this = Self { child, port };
        let deadline = Instant::now() + Duration::from_secs(30);
        while run(Command::new("curl").args(["-fs", &format!("{}/_ministack/health", this.endpoint())])).is_err() {
            if Instant::now() > deadline {
                bail!(
                    "the S3 server did not start: {}",
                    std::fs::read_to_string(scratch.join("s3.log"))?
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        run(Command::new("curl").args(["-fs", "-X", "PUT", &format!("{}/{bucket}", this.endpoint())]))?;
        Ok(this)
    }

    /// Its URL.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// A `[repo.NAME]` section for it.
    pub fn config(&self, name: &str, url: &str, extra: &str) -> String {
        format!(
            "[repo.{name}]\nurl = \"{url}\"\nendpoint = \"{}\"\nregion = \"us-east-1\"\naccess_key = \"test\"\nsecret_key_file = \"s3.secret\"\n{extra}\n",
            self.endpoint()
        )
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
