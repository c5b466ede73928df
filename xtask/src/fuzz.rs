//! Every fuzz target for a while, with coverage guidance, on the stable toolchain.

use std::process::Command;

use anyhow::{Result, bail};

use crate::steps::top;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What `cargo fuzz` passes to instrument for coverage; these flags need no nightly toolchain.
const FLAGS: &str = "--cfg fuzzing -Cdebug-assertions -Ccodegen-units=1 -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares";

/// Builds the targets and runs each for `seconds`.
pub fn run(seconds: u32) -> Result<()> {
    let fuzz = top().join("fuzz");
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(program)
        .args([
            "build",
            "--release",
            "--quiet",
            "--bins",
            "--target",
            TARGET,
            "--target-dir",
            "target",
        ])
        .env("RUSTFLAGS", FLAGS)
        .current_dir(&fuzz)
        .status()?;
    if !status.success() {
        bail!("building the fuzz targets ended with {status}");
    }
    let mut targets: Vec<String> = std::fs::read_dir(fuzz.join("fuzz_targets"))?
        .filter_map(|e| e.ok()?.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned))
        .collect();
    targets.sort();
    for target in targets {
        let corpus = fuzz.join("corpus").join(&target);
        std::fs::create_dir_all(&corpus)?;
        let work = fuzz.join("target/corpus").join(&target);
        std::fs::create_dir_all(&work)?;
        let artifacts = fuzz.join("artifacts/");
        std::fs::create_dir_all(&artifacts)?;
        let output = Command::new(fuzz.join(format!("target/{TARGET}/release/{target}")))
            .arg(&work)
            .arg(&corpus)
            .args([
                &format!("-max_total_time={seconds}"),
                "-rss_limit_mb=2048",
                "-timeout=10",
                "-print_final_stats=1",
            ])
            .arg(format!("-artifact_prefix={}", artifacts.display()))
            .output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        let runs = text
            .lines()
            .find_map(|l| l.strip_prefix("stat::number_of_executed_units:"))
            .unwrap_or("?")
            .trim();
        if !output.status.success() {
            bail!("fuzz target {target} found something:\n{text}");
        }
        println!("fuzz {target}: {runs} runs, nothing found");
    }
    Ok(())
}
