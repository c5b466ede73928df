//! What of a directory that is already there is right: content is compared chunk by chunk, by id.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::direct::Input;
use super::plan::{Placement, Plan};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::stanza::Stanza;

/// For each placement of the plan whether the file has the right content there, and the CRC-32C of that. `there` says
/// which files may have any.
pub async fn right(
    stanza: &Arc<Stanza>,
    plan: &Arc<Plan>,
    paths: &Arc<[PathBuf]>,
    there: &Arc<[bool]>,
    progress: &Arc<Progress>,
) -> Result<Vec<Option<u32>>> {
    let stop = StopOnDrop::default();
    let comparison = Comparison {
        stanza: stanza.clone(),
        plan: plan.clone(),
        paths: paths.clone(),
        there: there.clone(),
        progress: progress.clone(),
        stopped: stop.0.clone(),
    };
    tokio::task::spawn_blocking(move || comparison.run())
        .await
        .map_err(|e| Error::failed("comparing files panicked").caused_by(e))?
}

/// Threads cannot be dropped: they look whether anybody still waits.
#[derive(Default)]
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Comparison {
    stanza: Arc<Stanza>,
    plan: Arc<Plan>,
    paths: Arc<[PathBuf]>,
    there: Arc<[bool]>,
    progress: Arc<Progress>,
    stopped: Arc<AtomicBool>,
}

impl Comparison {
    fn run(&self) -> Result<Vec<Option<u32>>> {
        let Self {
            stanza,
            plan,
            paths,
            there,
            progress,
            stopped,
        } = self;
        // Placements of one file, one after the other, so that it is read from front to back.
        let mut order: Vec<u32> = (0..plan.placements.len() as u32)
            .filter(|&number| {
                let placement = &plan.placements[number as usize];
                there[placement.file as usize] && is_whole(plan, placement)
            })
            .collect();
        order.sort_unstable_by_key(|&number| {
            let placement = &plan.placements[number as usize];
            (placement.file, placement.file_offset)
        });
        let next = AtomicUsize::new(0);
        let worker = || -> Result<Vec<(u32, u32)>> {
            let mut right = Vec::new();
            let mut open: Option<(u32, Input)> = None;
            loop {
                if stopped.load(Ordering::Relaxed) {
                    return Err(Error::interrupted());
                }
                let from = next.fetch_add(RUN, Ordering::Relaxed);
                let Some(run) = order
                    .get(from..order.len().min(from + RUN))
                    .filter(|run| !run.is_empty())
                else {
                    return Ok(right);
                };
                for &number in run {
                    let placement = &plan.placements[number as usize];
                    let file = match &mut open {
                        Some((file_number, file)) if *file_number == placement.file => file,
                        other => {
                            let path = &paths[placement.file as usize];
                            let file = Input::open(path)
                                .map_err(|e| Error::io(format_args!("reading {}", path.display()), e))?;
                            &mut other.insert((placement.file, file)).1
                        }
                    };
                    // What cannot be read is written anew.
                    let Ok(content) = file.read(placement.len as usize, placement.file_offset) else {
                        continue;
                    };
                    let frame = &plan.frames[placement.frame as usize];
                    let epoch = plan.packs[frame.pack as usize].header.epoch;
                    if stanza.keys_of(epoch)?.chunk_id(content) == frame.id {
                        right.push((number, crc32c::crc32c(content)));
                        progress.read_bytes.add(placement.len.into());
                        progress.deduplicated_bytes.add(placement.len.into());
                    }
                }
            }
        };
        let workers = std::thread::available_parallelism().map_or(2, usize::from);
        let found: Vec<Result<Vec<(u32, u32)>>> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
            let joined = handles.into_iter().map(|handle| {
                handle
                    .join()
                    .unwrap_or_else(|_| Err(Error::failed("comparing files panicked")))
            });
            joined.collect()
        });
        let mut all = vec![None; plan.placements.len()];
        for numbers in found {
            for (number, crc) in numbers? {
                all[number as usize] = Some(crc);
            }
        }
        Ok(all)
    }
}

/// Placements that a worker takes at once.
const RUN: usize = 16;

/// Only a whole chunk has an id.
fn is_whole(plan: &Plan, placement: &Placement) -> bool {
    placement.frame_offset == 0 && placement.len == plan.frames[placement.frame as usize].plain_len
}
