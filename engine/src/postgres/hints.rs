//! What two copies of a page may differ in although no WAL says so: hints, unused space, and what replay does not keep
//! (`backend/access/common/bufmask.c` and the masks of each access method).

const PAGE: usize = 8192;

fn u16_at(page: &[u8; PAGE], at: usize) -> usize {
    usize::from(u16::from_le_bytes([page[at], page[at + 1]]))
}

fn zero(page: &mut [u8; PAGE], at: usize, len: usize) {
    page[at..at + len].fill(0);
}

/// Takes out of a main fork's page what may differ. Two pages that are the same afterwards mean the same.
pub fn mask(page: &mut [u8; PAGE]) {
    let (lower, upper, special) = (u16_at(page, 12), u16_at(page, 14), u16_at(page, 16));
    // pd_lsn, which two processes that set the same hint may leave behind the WAL; pd_checksum; PD_HAS_FREE_LINES,
    // PD_PAGE_FULL; pd_prune_xid.
    zero(page, 0, 10);
    page[10] &= !3;
    zero(page, 20, 4);
    if !(24 <= lower && lower <= upper && upper <= special && special <= PAGE) {
        return;
    }
    zero(page, lower, upper - lower);
    let opaque = PAGE - special;
    let last = u16_at(page, PAGE - 2);
    let is_btree = opaque == 16 && last <= 0xFF7F;
    if is_btree {
        let flags = u16_at(page, PAGE - 4);
        // BTP_DELETED and BTP_HALF_DEAD: what they hold does not count.
        if flags & (4 | 16) != 0 {
            return page.fill(0);
        }
        // BTP_SPLIT_END, BTP_HAS_GARBAGE, and the number of a vacuum.
        let kept = (flags & !(32 | 64)) as u16;
        page[PAGE - 4..PAGE - 2].copy_from_slice(&kept.to_le_bytes());
        zero(page, PAGE - 2, 2);
    }
    if opaque == 8 && u16_at(page, special) == 0x1717 {
        // A sequence: values are logged ahead of their use.
        return zero(page, upper, special - upper);
    }
    // GIN_DELETED, as the pages of a pending list that was worked off.
    if opaque == 8 && last < 0x200 && last & 4 != 0 {
        return page.fill(0);
    }
    // SP-GiST's metapage holds a cache of pages with room, which is not logged.
    if opaque == 8 && last == 0xFF82 && page[special] & 1 != 0 {
        return zero(page, 28.min(lower), lower - 28.min(lower));
    }
    items(page, (lower, upper, special), opaque == 0);
    if opaque == 16 && last == 0xFF80 {
        // Hash: LH_PAGE_HAS_DEAD_TUPLES.
        page[PAGE - 4] &= !0x80;
    }
    if opaque == 16 && last == 0xFF81 {
        // GiST: F_HAS_GARBAGE, and the NSN, which only counts during a split.
        page[PAGE - 4] &= !16;
        zero(page, special, 8);
    }
}

/// Line pointers and tuples.
fn items(page: &mut [u8; PAGE], (lower, upper, special): (usize, usize, usize), is_heap: bool) {
    for number in 0..(lower - 24) / 4 {
        let at = 24 + number * 4;
        let pointer = u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
        let (offset, flags, len) = ((pointer & 0x7FFF) as usize, pointer >> 15 & 3, (pointer >> 17) as usize);
        if !is_heap {
            // A dead index item is a hint.
            if flags == 3 && len > 0 {
                page[at..at + 4].copy_from_slice(&(pointer & !(3 << 15) | 1 << 15).to_le_bytes());
            }
        } else if flags == 1 && len >= 23 && offset >= upper && offset + len <= special {
            // t_cid; hint bits of t_infomask, HEAP_COMBOCID; padding.
            zero(page, offset + 8, 4);
            page[offset + 20] &= !0x20;
            page[offset + 21] &= !0x0F;
            let padding = len.next_multiple_of(8).min(special - offset) - len;
            zero(page, offset + len, padding);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_can_be_masked_and_again(seed in proptest::collection::vec(any::<u8>(), 64), lower in 20u16..9000, upper in 20u16..9000, special in 8000u16..8300) {
            let mut page = [0u8; PAGE];
            page.iter_mut().enumerate().for_each(|(at, byte)| *byte = seed[at * 7 % 64] ^ at as u8);
            for (at, value) in [(12, lower), (14, upper), (16, special)] {
                page[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
            mask(&mut page);
            let once = page;
            mask(&mut page);
            prop_assert!(page == once);
        }
    }
}
