//! All tests of the workspace, a binary at a time.
//!
//! What always holds: every test runs, whatever failed before it. A test that fails is run once more, alone; if it
//! passes then, it is named as unstable together with what it said, and a second failure fails the run. Tests of
//! whole servers share two cores with each other, and one that waited too long says nothing about the code.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::steps::{cargo, top};

/// A binary with tests.
struct Binary {
    name: String,
    program: PathBuf,
    /// Where cargo would run it.
    folder: PathBuf,
}

/// Builds and runs all tests, with these variables.
pub fn run(variables: &[(&str, &str)]) -> Result<()> {
    let (mut failed, mut unstable) = (Vec::new(), Vec::new());
    for binary in build()? {
        let begun = Instant::now();
        let first = binary.run(&[], variables)?;
        println!("{}: {:.1} s", binary.name, begun.elapsed().as_secs_f64());
        if first.passed {
            continue;
        }
        if first.failed.is_empty() {
            failed.push(format!("{}: it ended without naming a test", binary.name));
        }
        for test in first.failed {
            let name = format!("{}: {test}", binary.name);
            println!("{name} failed; once more, alone:");
            match binary.run(&["--exact", &test], variables)?.passed {
                true => unstable.push(name),
                false => failed.push(name),
            }
        }
    }
    for name in unstable {
        println!("UNSTABLE: {name} failed among others and passed alone; what it said is above");
    }
    if !failed.is_empty() {
        bail!("failed, twice:\n  {}", failed.join("\n  "));
    }
    cargo(&["test", "--workspace", "--doc", "--quiet"])
}

fn build() -> Result<Vec<Binary>> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program)
        .args(["test", "--workspace", "--no-run", "--message-format=json"])
        .current_dir(top())
        .stderr(Stdio::inherit())
        .output()
        .context("starting cargo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let messages: Vec<Value> = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    if !output.status.success() {
        let rendered = messages.iter().filter_map(|m| m["message"]["rendered"].as_str());
        bail!(
            "building the tests ended with {}\n{}",
            output.status,
            rendered.collect::<String>()
        );
    }
    let mut binaries: Vec<Binary> = messages.iter().filter_map(binary).collect();
    binaries.sort_by(|a, b| a.name.cmp(&b.name));
    match binaries.is_empty() {
        true => bail!("cargo built no tests"),
        false => Ok(binaries),
    }
}

fn binary(message: &Value) -> Option<Binary> {
    if message["profile"]["test"] != true {
        return None;
    }
    let folder = PathBuf::from(message["manifest_path"].as_str()?).parent()?.to_owned();
    Some(Binary {
        name: format!(
            "{}/{}",
            folder.file_name()?.to_str()?,
            message["target"]["name"].as_str()?
        ),
        program: message["executable"].as_str()?.into(),
        folder,
    })
}

struct Outcome {
    passed: bool,
    failed: Vec<String>,
}

impl Binary {
    fn run(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Result<Outcome> {
        let mut child = Command::new(&self.program)
            .args(arguments)
            .envs(variables.iter().copied())
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let mut failed = Vec::new();
        for line in BufReader::new(child.stdout.take().context("no output")?).lines() {
            let line = line?;
            println!("{line}");
            let name = line.strip_prefix("test ").and_then(|l| l.strip_suffix(" ... FAILED"));
            failed.extend(name.map(str::to_owned));
        }
        Ok(Outcome {
            passed: child.wait()?.success(),
            failed,
        })
    }
}
