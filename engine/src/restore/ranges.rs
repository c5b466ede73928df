//! Frames cut into the ranges of packs that are asked for at once, and these into pieces of work.
//!
//! What always holds: each frame is in one range, and ranges are in pack order.

use crate::manifest::FrameRef;

/// Bytes asked for at once.
const RANGE_BYTES: u64 = 8 << 20;
/// Unneeded bytes between two frames that are fetched along rather than asked around.
const GAP_BYTES: u32 = 256 << 10;
/// Content that is decoded and written in one piece of work, bytes.
const BATCH_BYTES: u64 = 4 << 20;

/// A range of a pack and the frames in it.
#[derive(Debug, Clone)]
pub struct Range {
    /// Pack.
    pub pack: u32,
    /// Its first byte in the pack.
    pub from: u32,
    /// Behind its last byte.
    pub to: u32,
    /// Numbers of the frames.
    pub frames: Vec<u32>,
}

/// Cuts frames, by number, into ranges in pack order.
pub fn ranges(frames: &[FrameRef], mut order: Vec<u32>) -> Vec<Range> {
    order.sort_unstable_by_key(|&f| (frames[f as usize].pack, frames[f as usize].offset));
    let mut out: Vec<Range> = Vec::new();
    for number in order {
        let frame = &frames[number as usize];
        let end = frame.offset + frame.stored_len;
        match out.last_mut() {
            Some(last)
                if last.pack == frame.pack
                    && frame.offset <= last.to.saturating_add(GAP_BYTES)
                    && u64::from(end - last.from) <= RANGE_BYTES =>
            {
                last.to = last.to.max(end);
                last.frames.push(number);
            }
            _ => out.push(Range {
                pack: frame.pack,
                from: frame.offset,
                to: end,
                frames: vec![number],
            }),
        }
    }
    out
}

/// Cuts a range so that each part decodes to a few MiB: a range may decode to very much.
pub fn batches(frames: &[FrameRef], range: Range) -> impl Iterator<Item = Range> {
    let mut parts: Vec<Range> = Vec::new();
    let mut bytes = BATCH_BYTES;
    for &number in &range.frames {
        let len = u64::from(frames[number as usize].plain_len);
        if bytes + len > BATCH_BYTES {
            bytes = 0;
            parts.push(Range {
                frames: Vec::new(),
                ..range
            });
        }
        bytes += len;
        if let Some(part) = parts.last_mut() {
            part.frames.push(number);
        }
    }
    parts.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames of `(pack, offset, stored, plain)` bytes.
    fn table(frames: &[(u32, u32, u32, u32)]) -> Vec<FrameRef> {
        let frame = |(ordinal, &(pack, offset, stored_len, plain_len)): (usize, &(u32, u32, u32, u32))| FrameRef {
            id: [0; 32],
            pack,
            ordinal: ordinal as u32,
            offset,
            stored_len,
            plain_len,
        };
        frames.iter().enumerate().map(frame).collect()
    }

    fn cut(frames: &[(u32, u32, u32, u32)], order: &[u32]) -> Vec<(u32, u32, u32, Vec<u32>)> {
        let ranges = ranges(&table(frames), order.to_vec());
        ranges.into_iter().map(|r| (r.pack, r.from, r.to, r.frames)).collect()
    }

    #[test]
    fn neighbours_are_asked_for_at_once_in_pack_order() {
        let frames = [(1, 500, 100, 1), (0, 100, 100, 1), (0, 0, 100, 1), (1, 600, 50, 1)];
        assert_eq!(
            cut(&frames, &[0, 1, 2, 3]),
            [(0, 0, 200, vec![2, 1]), (1, 500, 650, vec![0, 3])]
        );
        // Only what is wanted.
        assert_eq!(cut(&frames, &[3, 2]), [(0, 0, 100, vec![2]), (1, 600, 650, vec![3])]);
        assert!(cut(&frames, &[]).is_empty());
    }

    #[test]
    fn a_small_gap_is_fetched_along_and_a_large_one_is_not() {
        let gap = |bytes| [(0, 0, 100, 1), (0, 100 + bytes, 100, 1)];
        assert_eq!(cut(&gap(GAP_BYTES), &[0, 1]), [(0, 0, 200 + GAP_BYTES, vec![0, 1])]);
        assert_eq!(cut(&gap(GAP_BYTES + 1), &[0, 1]).len(), 2);
    }

    #[test]
    fn no_range_is_longer_than_its_limit_unless_one_frame_is() {
        let mib = 1 << 20;
        let frames: Vec<_> = (0..20).map(|n| (0, n * mib, mib, mib)).collect();
        let all: Vec<u32> = (0..20).collect();
        let found = cut(&frames, &all);
        let lengths: Vec<u32> = found.iter().map(|(_, from, to, _)| (to - from) / mib).collect();
        assert_eq!(lengths, [8, 8, 4]);
        assert_eq!(
            found
                .iter()
                .flat_map(|(_, _, _, frames)| frames.clone())
                .collect::<Vec<_>>(),
            all
        );
        assert_eq!(cut(&[(0, 0, 9 * mib, 1), (0, 9 * mib, 1, 1)], &[0, 1]).len(), 2);
    }

    #[test]
    fn work_is_cut_by_what_frames_decode_to() {
        let mib = 1 << 20;
        // A few stored bytes that decode to very much.
        let frames = table(&(0..9).map(|n| (0, n * 10, 10, mib)).collect::<Vec<_>>());
        let range = ranges(&frames, (0..9).collect()).remove(0);
        let parts: Vec<Vec<u32>> = batches(&frames, range).map(|part| part.frames).collect();
        assert_eq!(parts, [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8]]);
    }
}
