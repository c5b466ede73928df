//! Packs and the frames that backups need of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use fairvault_format::frame::{FrameKey, FrameReader};
use fairvault_format::header::ObjectHeader;
use fairvault_format::index::PackRef;
use fairvault_format::pack::DirectoryEntry;
use fairvault_format::{limits, names, pack, sha256};
use futures::StreamExt;

use super::{BackupVerdict, CONCURRENT, Finding, Level, LostFile, MAX_LISTED, Report};
use crate::error::{Kind, Result};
use crate::manifest::{FrameRef, Manifest};
use crate::postgres::files::relation_file;
use crate::postgres::{BLOCK_BYTES, BLOCKS_PER_SEGMENT, page};
use crate::progress::Progress;
use crate::restore::data::open_frame;
use crate::stanza::Stanza;

/// What is lost, and what is not known.
#[derive(Default)]
pub struct Checked {
    /// Lost frames, by pack and ordinal.
    lost: BTreeSet<([u8; 32], u32)>,
    /// Packs that could not be looked at just now.
    unknown: BTreeSet<[u8; 32]>,
    /// Packs that are not there, or were found damaged.
    pub gone: BTreeSet<[u8; 32]>,
    /// What a newer version wrote, in words.
    pub unsupported: Vec<String>,
}

impl Checked {
    /// Nothing is lost, and everything was looked at.
    pub fn is_clean(&self) -> bool {
        self.lost.is_empty() && self.unknown.is_empty()
    }
}

/// Findings listed for one pack.
const MAX_PER_PACK: usize = 20;

/// Checksummed pages in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pages {
    /// The first one, counted in the chunk.
    at: u32,
    /// How many.
    count: u32,
    /// Block of the first one in its relation; `None` if a page was damaged at its source.
    block: Option<u32>,
}

impl Pages {
    /// Which block a page of the chunk is, if it is one of these; the inner `None` if it cannot be compared.
    fn block_of(&self, page: u32) -> Option<Option<u32>> {
        let behind = page.checked_sub(self.at).filter(|&behind| behind < self.count)?;
        Some(self.block.map(|block| block.wrapping_add(behind)))
    }
}

struct Frame {
    place: FrameRef,
    /// Different backups may use different parts.
    pages: Vec<Pages>,
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
        let mut pages: Vec<Vec<Pages>> = vec![Vec::new(); manifest.frames.len()];
        for p in &manifest.placements {
            let path = &manifest.files[p.file as usize].path;
            let is_paged = has_checksums && p.frame_offset.is_multiple_of(BLOCK_BYTES);
            let Some(relation) = relation_file(path).filter(|_| is_paged) else {
                continue;
            };
            let block = (p.file_offset / u64::from(BLOCK_BYTES)) as u32;
            let count = p.len / BLOCK_BYTES;
            let known_bad = failed
                .get(path.as_str())
                .is_some_and(|blocks| blocks.iter().any(|b| (block..block + count).contains(b)));
            let in_relation = relation.segment.wrapping_mul(BLOCKS_PER_SEGMENT).wrapping_add(block);
            pages[p.frame as usize].push(Pages {
                at: p.frame_offset / BLOCK_BYTES,
                count,
                block: (!known_bad).then_some(in_relation),
            });
        }
        for reference in &manifest.packs {
            self.packs.entry(reference.name).or_default().reference = Some(*reference);
        }
        for (frame, pages) in manifest.frames.iter().zip(pages) {
            let pack = self.packs.entry(manifest.packs[frame.pack as usize].name).or_default();
            let known = pack.frames.entry(frame.ordinal).or_insert_with(|| Frame {
                place: *frame,
                pages: Vec::new(),
            });
            let new = pages.into_iter().filter(|pages| !known.pages.contains(pages));
            let new: Vec<Pages> = new.collect();
            known.pages.extend(new);
        }
    }
}

#[derive(Default)]
struct PackCheck {
    name: [u8; 32],
    bytes: u64,
    findings: Vec<Finding>,
    unread: Option<Finding>,
    lost: Vec<u32>,
    rotten: bool,
    missing: bool,
    unsupported: Option<String>,
    directory: Option<(ObjectHeader, Vec<DirectoryEntry>)>,
}

/// How packs are checked.
pub struct Checking<'a> {
    /// Stanza.
    pub stanza: &'a Stanza,
    /// How thoroughly.
    pub level: Level,
    /// Packs that are found damaged are marked, so that later backups store their content again.
    pub marks: bool,
    /// How far.
    pub progress: &'a Progress,
}

impl Checking<'_> {
    /// Checks packs. Those that are as they should be are handed to `whole`, with their directories.
    pub async fn run(
        &self,
        wanted: &Wanted,
        report: &mut Report,
        mut whole: impl AsyncFnMut(PackRef, Vec<DirectoryEntry>) -> Result<()>,
    ) -> Result<Checked> {
        let mut all = Checked::default();
        let packs = wanted.packs.iter();
        let checks = packs.map(|(name, wanted)| check_pack(self.stanza, name, wanted, self.level));
        let mut checks = futures::stream::iter(checks).buffer_unordered(CONCURRENT);
        while let Some(mut checked) = checks.next().await {
            report.objects += 1;
            report.bytes += checked.bytes;
            self.progress.read_bytes.add(checked.bytes);
            let more = checked.findings.len().saturating_sub(MAX_PER_PACK);
            checked.findings.truncate(MAX_PER_PACK);
            report.findings.extend(checked.findings);
            if more > 0 {
                report.add(names::pack(&checked.name), format_args!("and {more} more problems"));
            }
            if let Some(unread) = checked.unread {
                report.unread.push(unread);
                all.unknown.insert(checked.name);
            }
            all.unsupported.extend(checked.unsupported);
            let lost = checked.lost.iter().map(|&ordinal| (checked.name, ordinal));
            all.lost.extend(lost);
            if checked.rotten && self.marks {
                distrust(self.stanza, &checked.name).await;
            }
            if checked.rotten || checked.missing {
                all.gone.insert(checked.name);
            } else if let Some((header, entries)) = checked.directory {
                let name = checked.name;
                whole(PackRef { name, header }, entries).await?;
            }
        }
        Ok(all)
    }
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

async fn check_pack(stanza: &Stanza, name: &[u8; 32], wanted: &WantedPack, level: Level) -> PackCheck {
    let object = names::pack(name);
    let finding = |problem: String| Finding {
        object: object.clone(),
        problem,
    };
    let mut out = PackCheck {
        name: *name,
        ..Default::default()
    };
    let bytes = match stanza.store().get(&object, limits::PACK_BYTES).await {
        Ok(bytes) => bytes,
        Err(error) => match error.kind() {
            Kind::Damaged | Kind::NotFound => {
                out.rotten = error.kind() == Kind::Damaged;
                out.missing = !out.rotten;
                out.findings.push(finding(match out.rotten {
                    true => error.to_string(),
                    false => "it is missing".to_owned(),
                }));
                out.lost = wanted.frames.keys().copied().collect();
                return out;
            }
            _ => {
                out.unread = Some(finding(error.to_string()));
                return out;
            }
        },
    };
    out.bytes = bytes.len() as u64;
    if sha256(&bytes) != *name {
        out.rotten = true;
        out.findings.push(finding(format!(
            "its {} bytes do not match its name: it was changed or cut off",
            bytes.len()
        )));
    } else {
        let opened = stanza
            .keys_for(&bytes, &object)
            .and_then(|keys| Ok(pack::open_pack(keys, stanza.scope(), &bytes, &object)?));
        match opened {
            Ok(directory) => out.directory = Some(directory),
            Err(error) => {
                out.rotten = error.kind() == Kind::Damaged;
                out.unsupported = (error.kind() == Kind::Unsupported).then(|| error.to_string());
                out.findings.push(finding(error.to_string()));
            }
        }
    }
    // In a damaged pack, frames that still open are not lost. In one that matches its name, a frame that
    // does not open was spoilt before it was stored.
    if out.rotten || level == Level::Data {
        let mut reader = FrameReader::default();
        for (&ordinal, frame) in &wanted.frames {
            let reference = wanted.reference.as_ref();
            match reference.map_or(Ok(None), |reference| {
                check_frame(&mut reader, stanza, reference, frame, &bytes)
            }) {
                Ok(None) => {}
                Ok(Some(problem)) => out.findings.push(finding(problem)),
                Err(error) => {
                    out.rotten |= error.kind() == Kind::Damaged;
                    out.findings.push(finding(error.to_string()));
                    out.lost.push(ordinal);
                }
            }
        }
    }
    out
}

/// Opens a frame and checks its pages. `Some`: a page is bad, which the frame itself is not.
fn check_frame(
    reader: &mut FrameReader,
    stanza: &Stanza,
    reference: &PackRef,
    frame: &Frame,
    pack_bytes: &[u8],
) -> Result<Option<String>> {
    let keys = stanza.keys_of(reference.header.epoch)?;
    let key = FrameKey::new(keys, stanza.scope(), &reference.header)?;
    let from = frame.place.offset as usize;
    let stored = pack_bytes
        .get(from..from + frame.place.stored_len as usize)
        .unwrap_or_default();
    let chunk = open_frame(reader, stanza, &key, reference, &frame.place, stored)?;
    if frame.pages.is_empty() {
        return Ok(None);
    }
    for (at, page) in chunk.chunks_exact(BLOCK_BYTES as usize).enumerate() {
        let mut blocks = frame.pages.iter().filter_map(|pages| pages.block_of(at as u32));
        // Two relations that share the frame have pages without checksums in common: nothing to compare with.
        let Some(Some(block)) = blocks.next() else { continue };
        if blocks.any(|other| other != Some(block)) {
            continue;
        }
        if let page::Verdict::Bad { expected, found } = page::verify(page, block) {
            return Ok(Some(format!(
                "frame {}: page {block} has checksum {found:04x}, expected {expected:04x}",
                frame.place.ordinal
            )));
        }
    }
    Ok(None)
}

/// Notes which bytes of which files of a backup are lost with the frames, and what is not known of it.
pub fn judge(manifest: &Manifest, checked: &Checked, verdict: &mut BackupVerdict) {
    let mut last = None;
    // In the order of files, and of their bytes.
    for p in &manifest.placements {
        let frame = &manifest.frames[p.frame as usize];
        let pack = manifest.packs[frame.pack as usize].name;
        if !checked.lost.contains(&(pack, frame.ordinal)) {
            continue;
        }
        if last != Some(p.file) {
            last = Some(p.file);
            verdict.lost_file_count += 1;
            if verdict.lost.len() < MAX_LISTED {
                let file = &manifest.files[p.file as usize];
                verdict.lost_files.push(file.path.clone());
                verdict.lost.push(LostFile {
                    path: file.path.clone(),
                    size: file.size,
                    lost_bytes: 0,
                    ranges: Vec::new(),
                    range_count: 0,
                });
            }
        }
        if verdict.lost_file_count <= MAX_LISTED as u64
            && let Some(file) = verdict.lost.last_mut()
        {
            file.add(p.file_offset, p.len.into());
        }
    }
    let unknown = manifest.packs.iter().filter(|p| checked.unknown.contains(&p.name));
    verdict
        .unknown
        .extend(unknown.take(MAX_LISTED).map(|p| names::pack(&p.name)));
}
