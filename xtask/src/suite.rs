//! All tests of the workspace, two binaries at a time.
//!
//! What always holds: every test runs, whatever failed before it. A test that fails is run once more, alone, when all
//! others are through; if it passes then, it is named as unstable together with what it said, and a second failure fails
//! the run. Tests of whole servers share two cores with each other, and one that waited too long says nothing about the
//! code. They wait more than they compute: that is why two binaries run beside each other, and what only computes, in
//! simulated time, beside both.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use fairvault_tests::Scratch;
use serde_json::Value;

use crate::steps::{cargo, top};

/// Binaries at a time; each runs as many tests at once as there are cores.
const LANES: usize = 2;
/// Only computes, and has no clock but its own: it takes what time the others leave.
const COMPUTES: &str = "tests/sim";
/// Measures seconds.
const ALONE: &str = "tests/rpo";

/// A binary with tests.
struct Binary {
    name: String,
    program: PathBuf,
    /// Where cargo would run it.
    folder: PathBuf,
}

/// Builds and runs all tests, with these variables.
pub fn run(variables: &[(&str, &str)]) -> Result<()> {
    let mut binaries = build()?;
    // Tests begin with copies of clusters that initdb has made for others.
    let templates = Scratch::new("templates")?;
    let folder = templates.path().display().to_string();
    let variables = [variables, &[("FAIRVAULT_TEMPLATES", folder.as_str())]].concat();
    let computes: Vec<Binary> = binaries.extract_if(.., |binary| binary.name == COMPUTES).collect();
    let alone: Vec<Binary> = binaries.extract_if(.., |binary| binary.name == ALONE).collect();
    let results = Mutex::new(Vec::new());
    let (computes, binaries) = (Mutex::new(computes.into_iter()), Mutex::new(binaries.into_iter()));
    let lane = |of: &Mutex<std::vec::IntoIter<Binary>>, politely: bool| -> Result<()> {
        loop {
            let next = of.lock().unwrap().next();
            let Some(binary) = next else { return Ok(()) };
            let outcome = binary.run(&[], &variables, politely)?;
            results.lock().unwrap().push((binary, outcome));
        }
    };
    std::thread::scope(|scope| {
        let mut lanes = vec![scope.spawn(|| lane(&computes, true))];
        lanes.extend((0..LANES).map(|_| scope.spawn(|| lane(&binaries, false))));
        lanes.into_iter().try_for_each(|lane| lane.join().unwrap())
    })?;
    lane(&Mutex::new(alone.into_iter()), false)?;

    let (mut failed, mut unstable) = (Vec::new(), Vec::new());
    for (binary, first) in results.into_inner().unwrap() {
        if first.passed {
            continue;
        }
        if first.failed.is_empty() {
            failed.push(format!("{}: it ended without naming a test", binary.name));
        }
        for test in first.failed {
            let name = format!("{}: {test}", binary.name);
            println!("{name} failed; once more, alone:");
            match binary.run(&["--exact", &test], &variables, false)?.passed {
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
    /// Runs it and prints what it said. `politely`, it gives way to all others.
    fn run(&self, arguments: &[&str], variables: &[(&str, &str)], politely: bool) -> Result<Outcome> {
        let begun = Instant::now();
        let mut command = match politely {
            true => Command::new("nice"),
            false => Command::new(&self.program),
        };
        if politely {
            command.args(["-n", "19"]).arg(&self.program);
        }
        let output = command
            .args(arguments)
            .envs(variables.iter().copied())
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        println!("{text}{}: {:.1} s", self.name, begun.elapsed().as_secs_f64());
        let failed = text
            .lines()
            .filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
        Ok(Outcome {
            passed: output.status.success(),
            failed: failed.map(str::to_owned).collect(),
        })
    }
}
