//! Packs and the frames that backups need of them.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use fairvault_format::frame::FrameKey;
use fairvault_format::index::PackRef;
use fairvault_format::{limits, names, pack, sha256};
use futures::StreamExt;

use super::{BackupVerdict, CONCURRENT, Finding, Level, MAX_LISTED, Report};
use crate::error::{Kind, Result};
use crate::postgres::files::relation_file;
use crate::postgres::page;
use crate::progress::Progress;
use crate::restore::data::open_frame;
use crate::restore::plan::{FrameRef, Manifest};
use crate::stanza::Stanza;

/// Page size and blocks in a segment file, as `backup` insists on them.
const PAGE: u64 = 8192;
const BLOCKS_PER_SEGMENT: u32 = 131_072;

/// Lost frames, by pack and ordinal.
pub type Lost = BTreeSet<([u8; 32], u32)>;

/// Which checksummed pages a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// None that is known.
    Unknown,
    /// Those of a relation, from this block on.
    From(u32),
    /// Two relations share the frame, or a page was damaged at its source: nothing to compare with.
    Incomparable,
}

impl Pages {
    fn merge(self, other: Self) -> Self {
        match (self, other) {
            (Self::Unknown, known) | (known, Self::Unknown) => known,
            (a, b) if a == b => a,
            _ => Self::Incomparable,
        }
    }
}

struct Frame {
    place: FrameRef,
    pages: Pages,
}

/// The packs that must be there, and the frames in them that backups need.
#[derive(Default)]
pub struct Wanted {
    packs: BTreeMap<[u8; 32], WantedPack>,
}

/// A pack that must be there, and its frames by ordinal. The reference is known if a backup names the pack.
#[derive(Default)]
struct WantedPack {
    reference: Option<PackRef>,
    frames: BTreeMap<u32, Frame>,
}

impl Wanted {
    /// Packs without any frame that is known to be needed: later backups may rely on them.
    pub fn add_packs(&mut self, packs: BTreeSet<[u8; 32]>) {
        for name in packs {
            self.packs.entry(name).or_default();
        }
    }

    /// Stored bytes of all frames.
    pub fn bytes(&self) -> u64 {
        let frames = self.packs.values().flat_map(|pack| pack.frames.values());
        frames.map(|f| u64::from(f.place.stored_len)).sum()
    }

    /// Adds what a backup needs.
    pub fn add(&mut self, manifest: &Manifest) {
        let has_checksums = manifest.root.info.as_ref().is_some_and(|i| i.data_checksums);
        let mut failed: HashMap<&str, Vec<u32>> = HashMap::new();
        for failure in &manifest.root.page_failures {
            failed.entry(&failure.path).or_default().push(failure.block);
        }
        let mut pages = vec![Pages::Unknown; manifest.frames.len()];
        for p in &manifest.placements {
            let path = &manifest.files[p.file as usize].path;
            let Some(relation) = relation_file(path).filter(|_| has_checksums && p.frame_offset == 0) else {
                continue;
            };
            let block = (p.file_offset / PAGE) as u32;
            let covered = block..block + p.len / PAGE as u32;
            let known_bad = failed
                .get(path.as_str())
                .is_some_and(|blocks| blocks.iter().any(|b| covered.contains(b)));
            let here = match known_bad {
                true => Pages::Incomparable,
                false => Pages::From(relation.segment.wrapping_mul(BLOCKS_PER_SEGMENT).wrapping_add(block)),
            };
            let known = &mut pages[p.frame as usize];
            *known = known.merge(here);
        }
        for reference in &manifest.packs {
            self.packs.entry(reference.name).or_default().reference = Some(*reference);
        }
        for (frame, pages) in manifest.frames.iter().zip(pages) {
            let pack = self.packs.entry(manifest.packs[frame.pack as usize].name).or_default();
            match pack.frames.entry(frame.ordinal) {
                Entry::Vacant(slot) => _ = slot.insert(Frame { place: *frame, pages }),
                Entry::Occupied(mut there) => {
                    let there = there.get_mut();
                    there.pages = there.pages.merge(pages);
                }
            }
        }
    }
}

#[derive(Default)]
struct Checked {
    bytes: u64,
    findings: Vec<Finding>,
    unread: Option<Finding>,
    lost: Vec<([u8; 32], u32)>,
    rotten: Option<[u8; 32]>,
}

/// Checks packs; returns the frames that are lost.
pub async fn check(
    stanza: &Arc<Stanza>,
    wanted: &Wanted,
    level: Level,
    report: &mut Report,
    progress: &Progress,
) -> Lost {
    let mut lost = Lost::new();
    let checks = wanted
        .packs
        .iter()
        .map(|(name, wanted)| check_pack(stanza, name, wanted, level));
    let mut checks = futures::stream::iter(checks).buffer_unordered(CONCURRENT);
    while let Some(checked) = checks.next().await {
        report.objects += 1;
        report.bytes += checked.bytes;
        progress.read_bytes.add(checked.bytes);
        report.findings.extend(checked.findings);
        report.unread.extend(checked.unread);
        lost.extend(checked.lost);
        if let Some(name) = checked.rotten {
            distrust(stanza, &name).await;
        }
    }
    lost
}

/// Marks a damaged pack, so that no later backup relies on it.
async fn distrust(stanza: &Stanza, name: &[u8; 32]) {
    if let Err(error) = stanza
        .store()
        .put_hashed(&names::distrusted(name), bytes::Bytes::new().into())
        .await
    {
        tracing::warn!(
            "{} is damaged and could not be marked: the next backup may rely on it ({error})",
            names::pack(name)
        );
    }
}

async fn check_pack(stanza: &Stanza, name: &[u8; 32], wanted: &WantedPack, level: Level) -> Checked {
    let object = names::pack(name);
    let finding = |problem: String| Finding {
        object: object.clone(),
        problem,
    };
    let mut out = Checked::default();
    let (bytes, whole) = match stanza.store().get(&object, limits::PACK_BYTES).await {
        Ok(bytes) if sha256(&bytes) != *name => {
            out.rotten = Some(*name);
            let problem = format!(
                "its {} bytes do not match its name: it was changed or cut off",
                bytes.len()
            );
            (bytes, Err(problem))
        }
        Ok(bytes) => (bytes, Ok(())),
        Err(error) if error.kind() == Kind::Temporary => {
            out.unread = Some(finding(error.to_string()));
            return out;
        }
        Err(error) if error.kind() == Kind::NotFound => (bytes::Bytes::new(), Err("it is missing".to_owned())),
        Err(error) => (bytes::Bytes::new(), Err(error.to_string())),
    };
    out.bytes = bytes.len() as u64;
    if let Err(problem) = &whole {
        out.findings.push(finding(problem.clone()));
    } else {
        let opened = stanza
            .keys_for(&bytes, &object)
            .and_then(|keys| Ok(pack::open_pack(keys, stanza.scope(), &bytes, &object)?));
        if let Err(error) = opened {
            out.findings.push(finding(error.to_string()));
        }
    }
    // In a damaged pack, frames that still open are not lost.
    if whole.is_err() || level == Level::Data {
        for (&ordinal, frame) in &wanted.frames {
            let reference = wanted.reference.as_ref();
            match reference.map_or(Ok(None), |reference| check_frame(stanza, reference, frame, &bytes)) {
                Ok(None) => {}
                Ok(Some(problem)) => out.findings.push(finding(problem)),
                Err(error) => {
                    out.findings.push(finding(error.to_string()));
                    out.lost.push((*name, ordinal));
                }
            }
        }
    }
    out
}

/// Opens a frame and checks its pages. `Some`: a page is bad, which the frame itself is not.
fn check_frame(stanza: &Stanza, reference: &PackRef, frame: &Frame, pack_bytes: &[u8]) -> Result<Option<String>> {
    let keys = stanza.keys_of(reference.header.epoch)?;
    let key = FrameKey::new(keys, stanza.scope(), &reference.header)?;
    let from = frame.place.offset as usize;
    let stored = pack_bytes
        .get(from..from + frame.place.stored_len as usize)
        .unwrap_or_default();
    let chunk = open_frame(stanza, &key, reference, &frame.place, stored)?;
    let Pages::From(first) = frame.pages else {
        return Ok(None);
    };
    for (i, page) in chunk.chunks_exact(PAGE as usize).enumerate() {
        let block = first.wrapping_add(i as u32);
        if let page::Verdict::Bad { expected, found } = page::verify(page, block) {
            return Ok(Some(format!(
                "frame {}: page {block} has checksum {found:04x}, expected {expected:04x}",
                frame.place.ordinal
            )));
        }
    }
    Ok(None)
}

/// Notes which files of a backup are lost with the frames.
pub fn lost_files(manifest: &Manifest, bad: &Lost, verdict: &mut BackupVerdict) {
    let mut lost: BTreeSet<u32> = BTreeSet::new();
    for p in &manifest.placements {
        let frame = &manifest.frames[p.frame as usize];
        if bad.contains(&(manifest.packs[frame.pack as usize].name, frame.ordinal)) {
            lost.insert(p.file);
        }
    }
    verdict.lost_file_count = lost.len() as u64;
    verdict.lost_files = lost
        .iter()
        .take(MAX_LISTED)
        .map(|&f| manifest.files[f as usize].path.clone())
        .collect();
}
