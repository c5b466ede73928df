//! An S3-compatible server in memory, for one test.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::{Scratch, run, tools};

/// The server; it ends with this value.
#[derive(Debug)]
pub struct S3 {
    child: Child,
    /// Its port.
    pub port: u16,
    /// Certificate of the authority, if it speaks TLS.
    ca: Option<PathBuf>,
}

/// A TCP port that is free just now, of those that the kernel does not give to outgoing connections: so nobody takes
/// it before a server that starts slowly does.
pub fn free_port() -> Result<u16> {
    static TRIED: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(97);
    for _ in 0..PORTS {
        let number = first.wrapping_add(TRIED.fetch_add(1, Ordering::Relaxed)) % PORTS;
        let port = FIRST_PORT + number as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no port from {FIRST_PORT} on is free")
}

const FIRST_PORT: u16 = 10_000;
const PORTS: u32 = 20_000;

impl S3 {
    /// Starts it with a bucket.
    pub fn start(scratch: &Scratch, bucket: &str) -> Result<Self> {
        Self::start_with(scratch, bucket, None)
    }

    /// The same over TLS, with a certificate of an authority that nobody knows: it is in `ca.crt`. The server is
    /// `localhost`, and `s3.localhost` with its buckets.
    pub fn start_tls(scratch: &Scratch, bucket: &str) -> Result<Self> {
        let openssl = |arguments: &str| run(scratch.command("openssl").args(arguments.split(' ')));
        openssl("req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.crt")?;
        scratch.write(
            "san",
            b"subjectAltName=DNS:localhost,DNS:s3.localhost,DNS:*.s3.localhost\n",
        )?;
        openssl("req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout s3.key -out s3.csr")?;
        openssl("x509 -req -in s3.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile san -out s3.crt")?;
        Self::start_with(scratch, bucket, Some(scratch.join("ca.crt")))
    }

    fn start_with(scratch: &Scratch, bucket: &str, ca: Option<PathBuf>) -> Result<Self> {
        // A port that was free a moment ago may be somebody else's by now.
        for _ in 0..4 {
            if let Some(this) = Self::try_start(scratch, ca.clone())? {
                this.curl(&["-fs", "-X", "PUT", &format!("{}/{bucket}", this.endpoint())])?;
                return Ok(this);
            }
        }
        bail!(
            "the S3 server did not start: {}",
            std::fs::read_to_string(scratch.join("s3.log"))?
        )
    }

    /// `None` if it ends at once.
    fn try_start(scratch: &Scratch, ca: Option<PathBuf>) -> Result<Option<Self>> {
        let port = free_port()?;
        let log = std::fs::File::create(scratch.join("s3.log"))?;
        let mut command = Command::new(tools::install_ministack()?);
        if ca.is_some() {
            command
                .env("USE_SSL", "1")
                .env("MINISTACK_SSL_CERT", scratch.join("s3.crt"))
                .env("MINISTACK_SSL_KEY", scratch.join("s3.key"));
        }
        let child = command
            .env("BIND_HOST", "127.0.0.1")
            .env("GATEWAY_PORT", port.to_string())
            .env("SERVICES", "s3")
            .env("LOG_LEVEL", "WARNING")
            .env("TMPDIR", scratch.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut this = Self { child, port, ca };
        let deadline = Instant::now() + Duration::from_secs(30);
        while this
            .curl(&["-fs", &format!("{}/_ministack/health", this.endpoint())])
            .is_err()
        {
            if this.child.try_wait()?.is_some() {
                return Ok(None);
            }
            if Instant::now() > deadline {
                bail!(
                    "the S3 server did not start: {}",
                    std::fs::read_to_string(scratch.join("s3.log"))?
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(Some(this))
    }

    /// Runs curl, which trusts the server.
    pub fn curl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("curl");
        if let Some(ca) = &self.ca {
            command.arg("--cacert").arg(ca);
        }
        run(command.args(arguments))
    }

    /// Bytes of the objects of a bucket whose names begin so.
    pub fn stored(&self, bucket: &str, prefix: &str) -> Result<u64> {
        let mut total = 0;
        let mut after = String::new();
        loop {
            let url = format!("{}/{bucket}?list-type=2&prefix={prefix}{after}", self.endpoint());
            let text = self.curl(&["-fs", &url])?;
            let inside = |name: &str| -> Vec<String> {
                let opening = format!("<{name}>");
                let parts = text.split(&opening).skip(1);
                parts
                    .map(|part| part.split('<').next().unwrap_or_default().to_owned())
                    .collect()
            };
            for size in inside("Size") {
                total += size.parse::<u64>()?;
            }
            match inside("NextContinuationToken").pop() {
                Some(token) => after = format!("&continuation-token={}", encode(&token)),
                None => return Ok(total),
            }
        }
    }

    /// Its URL.
    pub fn endpoint(&self) -> String {
        match self.ca {
            None => format!("http://127.0.0.1:{}", self.port),
            Some(_) => format!("https://localhost:{}", self.port),
        }
    }
}

/// Of a query, what is not a letter or a digit in hex.
fn encode(text: &str) -> String {
    let byte = |byte: u8| match byte.is_ascii_alphanumeric() {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
