//! The harness of the whole-system tests and of the demo: installs and starts PostgreSQL of every version
//! and an S3-compatible server, runs the real `fairvault`, and cleans up.
//!
//! PostgreSQL refuses to run as root: as root, servers and the commands that PostgreSQL would run go to the
//! user `postgres`.

pub mod clock;
pub mod dice;
pub mod fixture;
pub mod physical;
pub mod policy;
pub mod proxy;
pub mod receiver;
pub mod rgw;
pub mod s3;
pub mod scratch;
pub mod server;
pub mod snapshot;
pub mod tools;

pub use fixture::{Fixture, Shape};
pub use receiver::Receiver;
pub use scratch::Scratch;
pub use server::Server;

use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

/// Runs a command and returns its standard output; fails with everything it printed.
pub fn run(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    if !output.status.success() {
        bail!("{command:?} ended with {}\n{}", output.status, text(&output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command, whatever it says.
pub fn output(command: &mut Command) -> Result<Output> {
    command
        .stdin(std::process::Stdio::null())
        .output()
        .with_context(|| format!("starting {command:?}"))
}

/// Everything that a command printed.
pub fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Exit code and everything printed.
pub fn code(command: &mut Command) -> (i32, String) {
    match output(command) {
        Ok(output) => (output.status.code().unwrap_or(-1), text(&output)),
        Err(error) => (-1, error.to_string()),
    }
}
