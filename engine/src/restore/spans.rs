//! Frames of which incremental backups have left only parts in use, all at their old places. They are written as they
//! once were, since one long write is faster than many short ones, and the newer pages over them.
//!
//! What always holds: what a span writes without being asked to is written again by somebody else, afterwards; no two
//! spans overlap.

use std::collections::HashMap;

use fairvault_format::proto::FileEntry;

use crate::manifest::Placement;

/// The frames that are written as they once were, by number: each at one place, from its first part that is in use to
/// its last. `placements` are sorted by frame.
pub fn spans(files: &[FileEntry], placements: &[Placement]) -> HashMap<u32, Placement> {
    let mut covered = vec![0; files.len()];
    for placement in placements {
        covered[placement.file as usize] += u64::from(placement.len);
    }
    let mut spans = Vec::new();
    for parts in placements
        .chunk_by(|a, b| a.frame == b.frame)
        .filter(|parts| parts.len() > 1)
    {
        let (mut from, mut to, mut used) = (parts[0].frame_offset, 0, 0);
        for part in parts {
            from = from.min(part.frame_offset);
            to = to.max(part.frame_offset + part.len);
            used += part.len;
        }
        let first = parts[0];
        let shift = |part: &Placement| part.file_offset.wrapping_sub(part.frame_offset.into());
        let in_place = parts
            .iter()
            .all(|part| part.file == first.file && shift(part) == shift(&first));
        // Gaps must be filled by others.
        let is_filled = covered[first.file as usize] == files[first.file as usize].size;
        if in_place && is_filled && used >= (to - from) / 2 {
            let file_offset = shift(&first).wrapping_add(from.into());
            let span = Placement {
                file_offset,
                len: to - from,
                frame_offset: from,
                ..first
            };
            spans.push(span);
        }
    }
    // Two that overlap would each write what is old over what is right in the other.
    spans.sort_unstable_by_key(|span| (span.file, span.file_offset));
    let mut end = (u32::MAX, 0);
    spans.retain(|span| {
        let is_free = span.file != end.0 || span.file_offset >= end.1;
        if is_free {
            end = (span.file, span.file_offset + u64::from(span.len));
        }
        is_free
    });
    spans.into_iter().map(|span| (span.frame, span)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGE: u32 = 8192;
    const PAGES: u32 = 200;

    proptest! {
        /// A file of generations of pages: whatever spans write first, what is right is there in the end.
        #[test]
        fn what_spans_write_too_much_is_written_over(
            generations in proptest::collection::vec(proptest::collection::vec((0..PAGES, 1..80u32), 1..4), 0..6),
        ) {
            // Of each frame, the pages that it holds; of each page, its frame.
            let all: Vec<u32> = (0..PAGES).collect();
            let mut frames: Vec<Vec<u32>> = Vec::new();
            let mut right = vec![0usize; PAGES as usize];
            let changes = generations.iter().map(|runs| {
                let pages = runs.iter().flat_map(|&(from, len)| from..PAGES.min(from + len));
                pages.collect::<BTreeSet<u32>>().into_iter().collect::<Vec<u32>>()
            });
            for pages in std::iter::once(all).chain(changes) {
                for chunk in pages.chunks(64) {
                    chunk.iter().for_each(|&page| right[page as usize] = frames.len());
                    frames.push(chunk.to_vec());
                }
            }
            let mut placements = Vec::new();
            for (number, pages) in frames.iter().enumerate() {
                let used = pages.iter().enumerate().filter(|(_, page)| right[**page as usize] == number);
                for (at, &page) in used {
                    placements.push(Placement {
                        file: 0,
                        file_offset: u64::from(page * PAGE),
                        len: PAGE,
                        frame: number as u32,
                        frame_offset: at as u32 * PAGE,
                    });
                }
            }
            let file = FileEntry { size: u64::from(PAGES * PAGE), ..Default::default() };
            let spans = spans(&[file], &placements);
            let mut there = vec![usize::MAX; PAGES as usize];
            let rest = placements.iter().filter(|p| !spans.contains_key(&p.frame));
            for written in spans.values().chain(rest) {
                for page in 0..written.len / PAGE {
                    let at = written.file_offset / u64::from(PAGE) + u64::from(page);
                    let content = frames[written.frame as usize][(written.frame_offset / PAGE + page) as usize];
                    prop_assert_eq!(u64::from(content), at);
                    there[at as usize] = written.frame as usize;
                }
            }
            prop_assert_eq!(there, right);
        }
    }
}
