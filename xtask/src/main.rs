//! `cargo xtask demo | test | ci | fuzz | bench`: each does all of its own set-up.

mod bench;
mod demo;
mod fuzz;
mod steps;
mod suite;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask COMMAND
  demo           the whole story on a scratch server, in under a minute
  test           install what is needed, then all tests of the default run
  test --full    the same with PostgreSQL 19, the tools of 17 to 19, all tests on Ceph's radosgw, and emulators of other stores
  lint           formatting, clippy, licences and sources of dependencies
  fuzz [SECONDS] every fuzz target for some seconds each
  sim [SEEDS] [FIRST]   many hosts on one bad store, in simulated time: seeds (20000)
  memory [N]     what collection holds in memory, with N (50) million chunks; needs 6 GB of disk and of memory
  soak [ROUNDS] [SEED] push and receive while everything around them dies: rounds (15) on each of four set-ups
  torture [ROUNDS] [SEED] incremental backups under random changes, each compared page by page with what replay makes:
                 rounds (50) on each version
  bench compare [SIZE] [ROUNDS] [DATA] backups and restores beside pgBackRest, pg_basebackup and Barman, of data sets of SIZE (1)
                 times a few hundred MB, ROUNDS (3) times; DATA is pgbench, mixed, small or blobs; needs root
  bench compare incr    incremental backups: bench incr 1 many
  bench incr [SIZE] [many [PERCENT]] incremental backups of SIZE (1) GB beside pgBackRest; with `many`, the last of 200 is
                 restored, each after changes on PERCENT (0.05) of the pages; needs root
  bench month    what a month of fulls, diffs and incrementals stores, beside pgBackRest; needs root
  bench wal [N]  archiving and fetching N segments (200) beside pgBackRest; needs root
  bench rpo      what a lost server costs: twenty deaths on each kind of repository, and the distribution
  bench sync [S] commits a second with a synchronous receiver, beside pg_receivewal
  bench replay [N] recovery of N segments (200) from an S3 server, beside cp
  bench scale [N] backups and restores of 1 to N (10) GB, and into and out of an S3 server that is 20 ms away
  bench sources [SIZE] [ROUNDS] full backups of SIZE (2) times 600 MB from each source with 1 and 2 workers, beside the most that
                 could come from there, ROUNDS (3) times
  ci             lint, then test, then a short run of the fuzz targets";

fn number<T: std::str::FromStr>(text: &str) -> anyhow::Result<T> {
    text.parse().map_err(|_| anyhow::anyhow!("{text:?} is no number"))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["demo"] => demo::run(),
        ["test"] => steps::test(false),
        ["test", "--full"] => steps::test(true),
        ["lint"] => steps::lint(),
        ["fuzz"] => fuzz::run(60),
        ["fuzz", seconds] => number(seconds).and_then(fuzz::run),
        ["sim"] => steps::sim("20000", "1"),
        ["sim", seeds] => steps::sim(seeds, "1"),
        ["sim", seeds, first] => steps::sim(seeds, first),
        ["memory"] => steps::memory("50"),
        ["memory", millions] => steps::memory(millions),
        ["soak"] => steps::soak("15", "1"),
        ["soak", rounds] => steps::soak(rounds, "1"),
        ["soak", rounds, seed] => steps::soak(rounds, seed),
        ["torture"] => steps::torture("50", "1"),
        ["torture", rounds] => steps::torture(rounds, "1"),
        ["torture", rounds, seed] => steps::torture(rounds, seed),
        ["bench", "compare"] => bench::compare::run_it(1, 3, None),
        ["bench", "compare", "incr"] => bench::incremental::run_it(1, Some(0.05)),
        ["bench", "compare", size] => number(size).and_then(|size| bench::compare::run_it(size, 3, None)),
        ["bench", "compare", size, rounds] => {
            number(size).and_then(|size| bench::compare::run_it(size, number(rounds)?, None))
        }
        ["bench", "compare", size, rounds, data] => {
            number(size).and_then(|size| bench::compare::run_it(size, number(rounds)?, Some(data)))
        }
        ["bench", "incr"] => bench::incremental::run_it(1, None),
        ["bench", "incr", size] => number(size).and_then(|size| bench::incremental::run_it(size, None)),
        ["bench", "incr", size, "many"] => number(size).and_then(|size| bench::incremental::run_it(size, Some(0.05))),
        ["bench", "incr", size, "many", percent] => {
            number(size).and_then(|size| bench::incremental::run_it(size, Some(number(percent)?)))
        }
        ["bench", "month"] => bench::incremental::run_month(),
        ["bench", "wal"] => bench::wal::run_it(200),
        ["bench", "wal", segments] => number(segments).and_then(bench::wal::run_it),
        ["bench", "rpo"] => steps::rpo(),
        ["bench", "sync"] => bench::sync::run_it(10),
        ["bench", "sync", seconds] => number(seconds).and_then(bench::sync::run_it),
        ["bench", "replay"] => bench::replay::run_it(200),
        ["bench", "replay", segments] => number(segments).and_then(bench::replay::run_it),
        ["bench", "scale"] => bench::scale::run_it(10),
        ["bench", "scale", gigabytes] => number(gigabytes).and_then(bench::scale::run_it),
        ["bench", "sources"] => bench::sources::run_it(2, 3),
        ["bench", "sources", size] => number(size).and_then(|size| bench::sources::run_it(size, 3)),
        ["bench", "sources", size, rounds] => {
            number(size).and_then(|size| bench::sources::run_it(size, number(rounds)?))
        }
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
