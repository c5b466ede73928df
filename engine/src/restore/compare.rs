//! What of a directory that is already there is right: content is compared chunk by chunk, by id; of chunks that
//! differ, it is noted page by page what is there, so that only pages that differ are written.
//!
//! What always holds: a frame is handed on once, when all that it could be compared with has been looked at.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use super::crc::Parts;
use super::data::PAGE_BYTES;
use super::direct::Input;
use super::plan::Plan;
use crate::error::{Error, Result};
use crate::manifest::Placement;
use crate::progress::Progress;
use crate::stanza::Stanza;

/// Placements that a worker takes at once.
const RUN: usize = 16;
/// Content of frames that are handed on together, bytes: of those that are close in their pack, one range is asked for.
const TOGETHER_BYTES: u64 = 64 << 20;

/// Hash of a page, long enough that none is taken for another.
type PageHash = [u8; 16];

/// What was found so far.
pub struct Found {
    /// By placement: whether its file has the right content there.
    right: Vec<AtomicBool>,
    /// Pages of those that are not known to be right, by placement.
    pages: Mutex<HashMap<u32, Vec<PageHash>>>,
}

/// Placements whose pages are noted: what is beyond is written as a whole. This bounds memory (64 MiB).
const NOTED: usize = 64 << 10;

impl Found {
    /// Nothing has been found.
    pub fn none(placements: usize) -> Self {
        Self {
            right: std::iter::repeat_with(AtomicBool::default).take(placements).collect(),
            pages: Mutex::default(),
        }
    }

    /// Whether nothing needs to be written for a placement.
    pub fn is_right(&self, placement: usize) -> bool {
        self.right[placement].load(Ordering::Acquire)
    }

    /// Notes what is there instead of a placement's content.
    fn note(&self, placement: u32, content: &[u8]) {
        let hashes = hashes(content);
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if pages.len() < NOTED {
            pages.insert(placement, hashes);
        }
    }

    /// The pages of `content` that are not already there; `None` if that is not known.
    pub fn differing(&self, placement: usize, content: &[u8]) -> Option<Vec<bool>> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let there = pages.remove(&(placement as u32))?;
        drop(pages);
        let hashes = hashes(content);
        Some(hashes.iter().zip(&there).map(|(a, b)| a != b).collect())
    }
}

fn hashes(content: &[u8]) -> Vec<PageHash> {
    let hash = |page: &[u8]| {
        let mut hash = PageHash::default();
        hash.copy_from_slice(&blake3::hash(page).as_bytes()[..16]);
        hash
    };
    content.chunks(PAGE_BYTES).map(hash).collect()
}

/// What is compared with what.
pub struct Comparison {
    /// Repository.
    pub stanza: Arc<Stanza>,
    /// Files and frames.
    pub plan: Arc<Plan>,
    /// Where content belongs, in the order of frames.
    pub placements: Arc<[Placement]>,
    /// Where files are.
    pub paths: Arc<[PathBuf]>,
    /// Which files may have any of it.
    pub there: Arc<[bool]>,
    /// They are what an earlier restore has left that failed.
    pub is_resumed: bool,
    /// CRCs of what is right.
    pub parts: Arc<Parts>,
    /// Counters.
    pub progress: Arc<Progress>,
    /// What is found.
    pub found: Arc<Found>,
}

/// Frames on their way to whoever fetches them.
struct Ready {
    to: mpsc::Sender<Vec<u32>>,
    waiting: Mutex<(Vec<u32>, u64)>,
}

impl Ready {
    /// Hands on what waits together with `frames`, if that is enough.
    fn add(&self, plan: &Plan, frames: &[u32], enough: u64) -> Result<()> {
        let bytes: u64 = frames
            .iter()
            .map(|&f| u64::from(plan.frames[f as usize].plain_len))
            .sum();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.0.extend(frames);
        waiting.1 += bytes;
        if waiting.1 < enough || waiting.0.is_empty() {
            return Ok(());
        }
        let (batch, _) = std::mem::take(&mut *waiting);
        drop(waiting);
        // Whoever does not take it any more has failed, or was interrupted.
        self.to.blocking_send(batch).map_err(|_| Error::interrupted())
    }
}

impl Comparison {
    /// Looks at everything; frames that are needed go to `to`, some while others are still looked at.
    pub fn run(&self, to: mpsc::Sender<Vec<u32>>) -> Result<()> {
        let Self {
            plan,
            placements,
            there,
            ..
        } = self;
        let mut left: Vec<AtomicU32> = Vec::new();
        left.resize_with(plan.frames.len(), AtomicU32::default);
        let needed: Vec<AtomicBool> = plan.frames.iter().map(|_| AtomicBool::new(false)).collect();
        let mut order: Vec<u32> = Vec::new();
        for (number, placement) in placements.iter().enumerate() {
            match there[placement.file as usize] {
                true => {
                    *left[placement.frame as usize].get_mut() += 1;
                    order.push(number as u32);
                }
                false => needed[placement.frame as usize].store(true, Ordering::Relaxed),
            }
        }
        let ready = Ready {
            to,
            waiting: Mutex::default(),
        };
        let at_once: Vec<u32> = (0..plan.frames.len() as u32)
            .filter(|&f| needed[f as usize].load(Ordering::Relaxed) && left[f as usize].load(Ordering::Relaxed) == 0)
            .collect();
        ready.add(plan, &at_once, 0)?;
        // Placements of one file, one after the other, so that it is read from front to back.
        order.sort_unstable_by_key(|&number| {
            let placement = &placements[number as usize];
            (placement.file, placement.file_offset)
        });
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            let mut open: Option<(u32, Input)> = None;
            let mut frames = Vec::new();
            loop {
                let from = next.fetch_add(RUN, Ordering::Relaxed);
                let Some(run) = order.get(from..order.len().min(from + RUN)) else {
                    return Ok(());
                };
                frames.clear();
                for &number in run {
                    let frame = placements[number as usize].frame as usize;
                    if !self.look(number, &mut open)? {
                        needed[frame].store(true, Ordering::Release);
                    }
                    let is_last = left[frame].fetch_sub(1, Ordering::AcqRel) == 1;
                    if is_last && needed[frame].load(Ordering::Acquire) {
                        frames.push(frame as u32);
                    }
                }
                ready.add(plan, &frames, TOGETHER_BYTES)?;
                if ready.to.is_closed() {
                    return Err(Error::interrupted());
                }
            }
        };
        let worker = || -> Result<()> {
            let result = work();
            if result.is_err() {
                // Nobody looks at the rest.
                next.store(order.len(), Ordering::Relaxed);
            }
            result
        };
        let workers = std::thread::available_parallelism().map_or(2, usize::from);
        std::thread::scope(|scope| {
            let handles: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
            handles.into_iter().try_for_each(|handle| {
                handle
                    .join()
                    .unwrap_or_else(|_| Err(Error::failed("comparing files panicked")))
            })
        })?;
        ready.add(plan, &[], 0)
    }

    /// Whether a placement's content is there; what is there instead is noted.
    fn look(&self, number: u32, open: &mut Option<(u32, Input)>) -> Result<bool> {
        let placement = &self.placements[number as usize];
        let file = match open {
            Some((file_number, file)) if *file_number == placement.file => file,
            other => {
                let path = &self.paths[placement.file as usize];
                let file = Input::open(path, self.is_resumed)
                    .map_err(|e| Error::io(format_args!("reading {}", path.display()), e))?;
                &mut other.insert((placement.file, file)).1
            }
        };
        // What cannot be read is written anew.
        let Ok(content) = file.read(placement.len as usize, placement.file_offset) else {
            return Ok(false);
        };
        let frame = &self.plan.frames[placement.frame as usize];
        let epoch = self.plan.packs[frame.pack as usize].header.epoch;
        // Only a whole chunk has an id; of a part of one, it is seen page by page when the right content has come.
        let is_whole = placement.frame_offset == 0 && placement.len == frame.plain_len;
        if !is_whole || self.stanza.keys_of(epoch)?.chunk_id(content) != frame.id {
            self.found.note(number, content);
            return Ok(false);
        }
        self.found.right[number as usize].store(true, Ordering::Release);
        if self.plan.files[placement.file as usize].composed {
            self.parts.add_crc(placement, crc32c::crc32c(content));
        }
        self.progress.read_bytes.add(placement.len.into());
        self.progress.deduplicated_bytes.add(placement.len.into());
        Ok(true)
    }
}
