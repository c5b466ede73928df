//! All tests of the workspace, two binaries at a time.
//!
//! What always holds: every test runs, whatever failed before it. A test that fails is run once more, alone, when all
//! others are through; if it passes then, it is named as unstable together with what it said, and a second failure fails
//! the run. So does a binary that ends before its harness has counted its tests, whatever passes then. Tests of whole
//! servers share two cores with each other, and one that waited too long says nothing about the code. They wait more
//! than they compute: that is why two binaries run beside each other, and what only computes, in simulated time, beside
//! both.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
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
    for name in [COMPUTES, ALONE] {
        ensure!(
            binaries.iter().any(|binary| binary.name == name),
            "no tests are called {name}"
        );
    }
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
        match first.counted {
            None => failed.push(format!("{}: it ended before all of its tests had", binary.name)),
            Some((_, count)) if count != first.failed.len() || first.succeeded != (count == 0) => {
                let named = first.failed.len();
                failed.push(format!("{}: {count} tests failed, and it named {named}", binary.name));
            }
            Some(_) => {}
        }
        for test in first.failed {
            let name = format!("{}: {test}", binary.name);
            println!("{name} failed; once more, alone:");
            let second = binary.run(&["--exact", &test], &variables, false)?;
            // One, and not none because it is called otherwise.
            match second.succeeded && second.counted == Some((1, 0)) {
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
        .args(["build", "--workspace", "--message-format=json"])
        // Tests, and the binary that they run: in one command, or all that they have in common is built twice, since
        // tests ask libraries for more.
        .args(["--lib", "--bins", "--tests"])
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
    /// What its exit code says.
    succeeded: bool,
    /// How many tests passed and failed, as the harness counts them at its end; none if it did not get there.
    counted: Option<(usize, usize)>,
    /// Those that failed.
    failed: Vec<String>,
}

impl Outcome {
    /// What a harness said, and how it ended.
    fn of(text: &str, succeeded: bool) -> Self {
        // Not the lines of single tests: what else writes there may be in the middle of them.
        let list = text.rsplit_once("\nfailures:\n").map_or("", |(_, list)| list);
        let failed = list.lines().map_while(|line| line.strip_prefix("    "));
        Self {
            succeeded,
            counted: text.lines().rev().find_map(counted),
            failed: failed.map(str::to_owned).collect(),
        }
    }
}

/// How many tests passed and failed, of the line in which a harness says it.
fn counted(line: &str) -> Option<(usize, usize)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut counts = counts.split("; ");
    let passed = counts.next()?.strip_suffix(" passed")?;
    let failed = counts.next()?.strip_suffix(" failed")?;
    Some((passed.parse().ok()?, failed.parse().ok()?))
}

impl Binary {
    /// Runs it and prints what it said when it has ended, since others talk as well; but at once which of its tests
    /// take long. `politely`, it gives way to all others.
    fn run(&self, arguments: &[&str], variables: &[(&str, &str)], politely: bool) -> Result<Outcome> {
        let begun = Instant::now();
        let mut command = match politely {
            true => Command::new("nice"),
            false => Command::new(&self.program),
        };
        if politely {
            command.args(["-n", "19"]).arg(&self.program);
        }
        let mut child = command
            .args(arguments)
            .envs(variables.iter().copied())
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let mut text = String::new();
        for line in BufReader::new(child.stdout.take().context("no output")?).split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            if line.contains(" has been running for over ") {
                println!("{}: {line}", self.name);
            }
            text.push_str(&line);
            text.push('\n');
        }
        let succeeded = child.wait()?.success();
        println!("{text}{}: {:.1} s", self.name, begun.elapsed().as_secs_f64());
        Ok(Outcome::of(&text, succeeded))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAILED: &str = "running 3 tests\ntest a::b ... ok\nnoise of a child test c - should panic ... FAILED\n\
        test d ... FAILED\n\nfailures:\n\n---- d stdout ----\nfailures:\n    not one\n\n\nfailures:\n    c\n    d\n\n\
        test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s\n\n";

    #[test]
    fn what_failed_is_what_the_harness_lists_at_its_end() {
        let outcome = Outcome::of(FAILED, false);
        assert_eq!((outcome.counted, outcome.succeeded), (Some((1, 2)), false));
        assert_eq!(outcome.failed, ["c", "d"]);
        let good = "running 1 test\ntest a ... ok\n\n\
            test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 4 filtered out; finished in 0.10s\n\n";
        let outcome = Outcome::of(good, true);
        assert_eq!((outcome.counted, outcome.failed.len()), (Some((1, 0)), 0));
    }

    /// One that dies has not run all of its tests, also if it named some that failed.
    #[test]
    fn what_dies_before_its_end_has_counted_nothing() {
        let cut = &FAILED[..FAILED.find("test result").unwrap()];
        assert_eq!(Outcome::of(cut, false).counted, None);
        assert_eq!(Outcome::of("running 3 tests\ntest d ... FAILED\n", false).counted, None);
    }
}
