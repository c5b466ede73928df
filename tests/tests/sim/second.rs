//! The second repository, which is brought up to date by copies; and somebody who loses parts of the first one's index,
//! and somebody who repairs it.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use fairvault_engine::error::Kind;
use fairvault_engine::expire::rules::{Keep, Retention};
use fairvault_engine::progress::Progress;
use fairvault_engine::verify::Level;
use fairvault_engine::{copy, repair};
use fairvault_format::names;

use super::actors::{access, open, passing};
use super::checks::Notes;
use super::store::World;

/// Brings the second repository up to date.
pub async fn copier(world: &Arc<World>, notes: &Notes) -> Result<()> {
    let options = copy::Options {
        retention: Retention {
            full: [None, Some(Keep::Count(2))][world.roll(2) as usize],
            ..Default::default()
        },
        ..Default::default()
    };
    let done = async {
        let source = open(world, 0).await?;
        let mut target = open(world, 1).await?;
        let progress = Arc::new(Progress::default());
        copy::run(&source, &mut target, &options, &progress, std::future::pending()).await
    };
    match done.await {
        Ok(report) => {
            notes.count("copies", report.backups.len() as u64);
            notes.count("WAL copied", report.wal.segments);
            for copied in report.backups {
                ensure!(
                    world.watch.has_counted(1, &copied.copy),
                    "the copy {} is not in the log, and somebody was told so",
                    copied.copy
                );
                notes.commit(1, copied.copy);
            }
            Ok(())
        }
        Err(error) => passing(error).context("a copy"),
    }
}

/// A part of the index is lost, or damaged; in half of the seeds.
pub async fn spoiler(world: &Arc<World>) -> Result<()> {
    if !world.is_spoiled {
        return Ok(());
    }
    let runs = world.now(0).folder("acme").list(names::INDEX).await?;
    if !runs.is_empty() {
        let at = world.roll(runs.len() as u64) as usize;
        world.spoil(0, &runs[at].0).await;
    }
    Ok(())
}

/// Repairs the first repository, while everybody is at work in it.
pub async fn repairer(world: &Arc<World>, notes: &Notes) -> Result<()> {
    let options = repair::Options {
        dry_run: false,
        level: Level::Objects,
        older_log: None,
    };
    let repaired = repair::run(&access(world.store(0), world), options, &Progress::default()).await;
    match repaired {
        Ok(report) => {
            notes.count("repairs", u64::from(!report.index.damaged_runs.is_empty()));
            notes.count("rebuilt packs", report.index.rebuilt_packs);
            Ok(())
        }
        // What it looks at may be collected meanwhile.
        Err(error) if error.kind() == Kind::NotFound => Ok(()),
        Err(error) => passing(error).context("a repair"),
    }
}
