//! The checksum of a page: PostgreSQL's variant of FNV-1a in 32 lanes (`storage/checksum_impl.h`).

/// Lanes of the checksum.
const LANES: usize = 32;
const PRIME: u32 = 16_777_619;

const OFFSETS: [u32; LANES] = [
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C, 0xF8D4474F,
    0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB, 0xE58F764B, 0x187636BC,
    0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4, 0x783125BB, 0x6CA8EAA2, 0xE407EAC6,
    0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
];

/// Offset of pd_checksum in the page header.
const CHECKSUM_AT: usize = 8;
/// Offset of pd_upper; 0 on a page that was never initialised.
const UPPER_AT: usize = 14;

/// The checksum of `page`, which is block `block` of its relation (segments included). The length of
/// `page` must be a multiple of 128.
pub fn checksum(page: &[u8], block: u32) -> u16 {
    let mut sums = OFFSETS;
    let (rows, _) = page.as_chunks::<{ LANES * 4 }>();
    for (index, row) in rows.iter().enumerate() {
        let mut words = [0u32; LANES];
        for (word, bytes) in words.iter_mut().zip(row.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        if index == 0 {
            // The stored checksum counts as zero.
            words[CHECKSUM_AT / 4] &= 0xFFFF_0000;
        }
        round(&mut sums, &words);
    }
    let zero = [0u32; LANES];
    round(&mut sums, &zero);
    round(&mut sums, &zero);
    let folded = sums.iter().fold(0, |a, b| a ^ b) ^ block;
    (folded % 65_535 + 1) as u16
}

#[inline(always)]
fn round(sums: &mut [u32; LANES], words: &[u32; LANES]) {
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ word;
        *sum = mixed.wrapping_mul(PRIME) ^ (mixed >> 17);
    }
}

/// What a page's checksum says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is right, or the page is new and has none.
    Good,
    /// It is wrong.
    Bad {
        /// What was computed.
        expected: u16,
        /// What the page says.
        found: u16,
    },
}

/// Checks a page. A page of zeros is new and has no checksum; one that merely says so (pd_upper is 0)
/// and is not zero is bad.
pub fn verify(page: &[u8], block: u32) -> Verdict {
    let found = u16::from_le_bytes([page[CHECKSUM_AT], page[CHECKSUM_AT + 1]]);
    if page[UPPER_AT] == 0 && page[UPPER_AT + 1] == 0 && page.iter().all(|&b| b == 0) {
        return Verdict::Good;
    }
    let expected = checksum(page, block);
    if expected == found {
        Verdict::Good
    } else {
        Verdict::Bad { expected, found }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_pages_are_good_and_flipped_ones_bad() {
        let mut page = vec![0u8; 8192];
        assert_eq!(verify(&page, 7), Verdict::Good);
        page[14] = 0x20;
        page[100] = 3;
        let sum = checksum(&page, 7);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(verify(&page, 7), Verdict::Good);
        assert!(
            matches!(verify(&page, 8), Verdict::Bad { .. }),
            "a page at another place"
        );
        page[8000] ^= 1;
        assert!(matches!(verify(&page, 7), Verdict::Bad { .. }));
    }
}
