//! `cargo xtask demo | test | ci | fuzz | bench`: each does all of its own set-up.

mod bench;
mod demo;
mod fuzz;
mod steps;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask COMMAND
  demo           the whole story on a scratch server, in under a minute
  test           install what is needed, then all tests of the default run
  test --full    the same with PostgreSQL 19, the tools of 17 to 19, and Ceph's radosgw
  lint           formatting, clippy, licences and sources of dependencies
  fuzz [SECONDS] every fuzz target for some seconds each
  bench wal [N]  archiving and fetching N segments (200) beside pgBackRest; needs root
  ci             lint, then test, then a short run of the fuzz targets";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["demo"] => demo::run(),
        ["test"] => steps::test(false),
        ["test", "--full"] => steps::test(true),
        ["lint"] => steps::lint(),
        ["fuzz"] => fuzz::run(60),
        ["fuzz", seconds] => seconds.parse().map_err(anyhow::Error::from).and_then(fuzz::run),
        ["bench", "wal"] => bench::wal(200),
        ["bench", "wal", segments] => segments.parse().map_err(anyhow::Error::from).and_then(bench::wal),
        ["ci"] => steps::lint()
            .and_then(|()| steps::test(false))
            .and_then(|()| fuzz::run(5)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nxtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
