//! Where a manifest segment is cut into chunks: by its content, so that what is inserted or changed leaves the chunks
//! before and behind it as they are, and the next backup shares them.
//!
//! A gear hash: each byte shifts the hash and adds a number of its own; a cut is where the upper bits are zero.

use std::ops::Range;

/// The longest chunk, bytes.
const LONGEST: usize = 64 << 10;
/// Manifests up to this size are cut finely.
const SMALL: u64 = 1 << 20;

/// How finely a manifest is cut. Small chunks share more with the backup before; but each is named in the root, which
/// every backup writes anew. Where the manifest is small, that list is short.
#[derive(Clone, Copy)]
pub struct Grain {
    /// The shortest chunk, bytes.
    shortest: usize,
    /// Where these bits are zero is a cut.
    mask: u64,
}

impl Grain {
    /// 1.5 KiB on average.
    pub const FINE: Self = Self {
        shortest: 512,
        mask: 0x3FF << 54,
    };
    /// 6 KiB on average.
    pub const COARSE: Self = Self {
        shortest: 2 << 10,
        mask: 0xFFF << 52,
    };

    /// For a manifest of about so many bytes.
    pub fn of(manifest: u64) -> Self {
        if manifest <= SMALL { Self::FINE } else { Self::COARSE }
    }
}

/// A number for each value of a byte (splitmix64).
const GEAR: [u64; 256] = {
    let mut table = [0u64; 256];
    let mut at = 0;
    while at < 256 {
        let mut z = (at as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        table[at] = z ^ (z >> 31);
        at += 1;
    }
    table
};

/// The chunks of `bytes`, in order and without gaps.
pub fn cuts(bytes: &[u8], grain: Grain) -> impl Iterator<Item = Range<usize>> + '_ {
    let mut from = 0;
    std::iter::from_fn(move || {
        if from == bytes.len() {
            return None;
        }
        let end = bytes.len().min(from + LONGEST);
        let mut hash = 0u64;
        let mut to = end;
        for (at, &byte) in bytes.iter().enumerate().take(end).skip(from) {
            hash = (hash << 1).wrapping_add(GEAR[usize::from(byte)]);
            if at - from >= grain.shortest && hash & grain.mask == 0 {
                to = at + 1;
                break;
            }
        }
        let cut = from..to;
        from = to;
        Some(cut)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn cuts_cover_everything_and_survive_an_insertion() {
        for grain in [Grain::FINE, Grain::COARSE] {
            for len in [0, 1, grain.shortest, LONGEST, 1 << 20] {
                let bytes = noise(len, 7);
                let mut end = 0;
                for cut in cuts(&bytes, grain) {
                    assert!(cut.start == end && !cut.is_empty() && cut.len() <= LONGEST);
                    end = cut.end;
                }
                assert_eq!(end, len);
            }
            let before = noise(1 << 20, 3);
            let mut after = before.clone();
            after.splice(500_000..500_010, noise(40, 9));
            let chunks =
                |bytes: &[u8]| -> HashSet<Vec<u8>> { cuts(bytes, grain).map(|cut| bytes[cut].to_vec()).collect() };
            let (before, after) = (chunks(&before), chunks(&after));
            assert!(before.len() > 40, "{}", before.len());
            assert!(after.difference(&before).count() <= 3);
            // What does not vary is cut all the same.
            assert_eq!(cuts(&vec![0; 200_000], grain).count(), 4);
        }
    }

    #[test]
    fn small_manifests_are_cut_finely() {
        let bytes = noise(1 << 20, 5);
        let [fine, coarse] = [SMALL, SMALL + 1].map(|len| cuts(&bytes, Grain::of(len)).count());
        assert!(fine > 3 * coarse && fine < (1 << 20) / 1024, "{fine}, {coarse}");
    }
}
