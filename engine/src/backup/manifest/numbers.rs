//! Which numbers the frames and packs of a manifest segment get: those that the parent gave them, so that what is as it
//! was is encoded as it was, and stored no second time. A new one takes the number of one that is not used any more.

use std::collections::HashMap;

use crate::manifest::Numbered;
use crate::track::selection::Basis;

/// Frames or packs `0..count` in the order of their numbers. `before` is what the parent gave one.
pub fn numbered(count: u32, before: impl Fn(u32) -> Option<u32>) -> Vec<u32> {
    let (mut kept, mut fresh) = (Vec::new(), Vec::new());
    for at in 0..count {
        match before(at) {
            Some(number) => kept.push((number, at)),
            None => fresh.push(at),
        }
    }
    kept.sort_unstable();
    let mut fresh = fresh.into_iter();
    let mut out = Vec::with_capacity(count as usize);
    let mut next = 0;
    for (number, at) in kept {
        let free = (number - next) as usize;
        // Too few of them would move everything behind as well.
        if free <= fresh.len() {
            out.extend(fresh.by_ref().take(free));
        }
        next = number + 1;
        out.push(at);
    }
    out.extend(fresh);
    out
}

/// The numbers that the parent gave in a segment.
#[derive(Default)]
pub struct Numbers {
    /// By id.
    pub frames: HashMap<[u8; 32], u32>,
    /// By name.
    pub packs: HashMap<[u8; 32], u32>,
}

impl Numbers {
    /// Of the segment in which the parent has, or would have, a file.
    pub fn of(basis: Option<&Basis>, path: &str) -> Self {
        let Some(manifest) = basis.map(|basis| &basis.manifest) else {
            return Self::default();
        };
        let before = |segment: &Numbered| segment.first_path.as_bytes() <= path.as_bytes();
        let at = manifest.numbered.partition_point(before).saturating_sub(1);
        let Some(segment) = manifest.numbered.get(at) else {
            return Self::default();
        };
        let frames = segment.frames.iter().map(|&frame| manifest.frames[frame as usize].id);
        let packs = segment.packs.iter().map(|&pack| manifest.packs[pack as usize].name);
        Self {
            frames: frames.zip(0..).collect(),
            packs: packs.zip(0..).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::numbered;

    #[test]
    fn frames_keep_their_numbers_and_new_ones_fill_the_gaps() {
        let numbers = |frames: &[Option<u32>]| numbered(frames.len() as u32, |at| frames[at as usize]);
        let (kept, new) = (Some, None);
        assert!(numbers(&[]).is_empty());
        assert_eq!(numbers(&[new, new]), [0, 1]);
        // In whichever order they are met.
        assert_eq!(numbers(&[kept(2), kept(0), kept(1)]), [1, 2, 0]);
        // The first one was replaced, and one in the middle; there is one more.
        assert_eq!(numbers(&[new, kept(1), new, kept(3), new]), [0, 1, 2, 3, 4]);
        assert_eq!(numbers(&[kept(1), kept(3), new, new, new]), [2, 0, 3, 1, 4]);
        // Two went and one came: where one was missing, it takes its place; where two were, they all move.
        assert_eq!(numbers(&[kept(0), kept(2), kept(4), new]), [0, 3, 1, 2]);
        assert_eq!(numbers(&[kept(0), kept(3), kept(5), new]), [0, 1, 3, 2]);
        assert_eq!(numbers(&[kept(1), kept(2)]), [0, 1]);
    }
}
