//! Content that the repository of a restore cannot give, from another one that has a copy of the same backup.
//!
//! What always holds: a spare describes the same files with the same extents, so that frame stands for frame; what it
//! gives was opened with its own keys and has the id that its own manifest says.

use fairvault_format::index::PackRef;
use tokio::sync::OnceCell;

use super::data::read_frame;
use super::plan::Plan;
use super::target::info;
use crate::commit::lease::Lease;
use crate::commit::{Log, state};
use crate::error::{Error, Result};
use crate::manifest::{FrameRef, Manifest, Placement};

/// A copy of the backup in another repository.
struct Spare {
    log: Log,
    packs: Vec<PackRef>,
    /// By the number of the frame in the plan.
    frames: Vec<FrameRef>,
    lease: Option<Lease>,
}

/// Other repositories; what they have is read when it is first needed.
pub struct Spares {
    origin: fairvault_format::proto::CopiedFrom,
    others: Vec<Log>,
    loaded: OnceCell<Vec<Spare>>,
}

impl Spares {
    /// For a plan that was made with `log`.
    pub fn new(log: &Log, plan: &Plan, others: &[Log]) -> Self {
        Self {
            origin: state::origin(log.state(), &plan.info),
            others: others.to_vec(),
            loaded: OnceCell::new(),
        }
    }

    /// A frame's content, which could not be had because of `why`.
    pub async fn frame(&self, plan: &Plan, number: u32, why: &Error) -> Result<Vec<u8>> {
        let spares = self.loaded.get_or_init(|| self.load(plan, why)).await;
        let mut failures = Vec::new();
        for spare in spares {
            let frame = &spare.frames[number as usize];
            match read_frame(spare.log.stanza(), &spare.packs[frame.pack as usize], frame).await {
                Ok(content) => return Ok(content),
                Err(error) => failures.push(format!("nor from {}: {error}", spare.log.stanza().shown())),
            }
        }
        let mut error = Error::new(why.kind(), why.to_string());
        if let Some(advice) = why.advice() {
            error = error.remedy(advice);
        }
        Err(match failures.is_empty() {
            true => error,
            false => error.caused_by(failures.join("; ")),
        })
    }

    async fn load(&self, plan: &Plan, why: &Error) -> Vec<Spare> {
        let mut spares = Vec::new();
        for log in &self.others {
            let shown = log.stanza().shown();
            match self.load_one(log, plan).await {
                Ok(Some(spare)) => {
                    tracing::warn!("{why}; content that is lost comes from the copy of this backup in {shown}");
                    spares.push(spare);
                }
                Ok(None) => {}
                Err(error) => tracing::warn!("the copy of this backup in {shown} is no help: {error}"),
            }
        }
        spares
    }

    async fn load_one(&self, log: &Log, plan: &Plan) -> Result<Option<Spare>> {
        // The lease first, then the log: what that names is not collected from here on.
        let lease = Lease::for_reading(log.stanza(), "restore", "").await;
        let mut log = log.clone();
        log.refresh().await?;
        let Some(backup) = state::find_origin(log.state(), &self.origin) else {
            return Ok(None);
        };
        let manifest = Manifest::read(log.stanza(), &backup.root).await?;
        let place = |p: &Placement| (p.file, p.file_offset, p.len, p.frame_offset);
        let same_places = || {
            manifest
                .placements
                .iter()
                .map(place)
                .eq(plan.placements.iter().map(place))
        };
        if manifest.files != plan.files || !same_places() {
            return Err(Error::damaged(format!(
                "backup {} does not describe the same files as its original",
                info(backup).id
            )));
        }
        let mut frames: Vec<Option<FrameRef>> = vec![None; plan.frames.len()];
        for (ours, theirs) in plan.placements.iter().zip(&manifest.placements) {
            frames[ours.frame as usize] = Some(manifest.frames[theirs.frame as usize]);
        }
        let all: Option<Vec<FrameRef>> = frames.into_iter().collect();
        let frames = all.ok_or_else(|| Error::failed("a frame that no file uses"))?;
        if frames.iter().zip(&plan.frames).any(|(a, b)| a.plain_len != b.plain_len) {
            return Err(Error::damaged(
                "its chunks have other lengths than those of its original",
            ));
        }
        Ok(Some(Spare {
            packs: manifest.packs,
            frames,
            lease,
            log,
        }))
    }

    /// Ends the leases.
    pub async fn release(self) {
        for spare in self.loaded.into_inner().into_iter().flatten() {
            if let Some(lease) = spare.lease {
                lease.release().await;
            }
        }
    }
}
