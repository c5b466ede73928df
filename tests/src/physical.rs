//! Two data directories compared page by page, as far as PostgreSQL lets two copies at one LSN differ: hints, unused
//! space, and what replay does not keep (`backend/access/common/bufmask.c`).

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use fairvault_engine::postgres::files::{Fork, relation_file};

const PAGE: usize = 8192;

/// Files of relations, free space maps left out; those of unlogged relations too.
fn relations(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![(folder.to_owned(), String::new())];
    while let Some((at, name)) = folders.pop() {
        for entry in std::fs::read_dir(&at).with_context(|| at.display().to_string())? {
            let entry = entry?;
            let name = format!("{name}{}", entry.file_name().to_string_lossy());
            // Tablespaces are links.
            match std::fs::metadata(entry.path()) {
                Ok(meta) if meta.is_dir() => folders.push((entry.path(), format!("{name}/"))),
                Ok(_) => _ = found.insert(name, entry.path()),
                Err(_) => {}
            }
        }
    }
    let inits: HashSet<String> = found
        .keys()
        .filter_map(|name| name.strip_suffix("_init").map(str::to_owned))
        .collect();
    found.retain(|name, _| {
        let relation = name.split('.').next().unwrap_or_default();
        let main = relation.strip_suffix("_vm").unwrap_or(relation);
        relation_file(name).is_some_and(|file| file.fork != Fork::Fsm) && !inits.contains(main)
            || name.ends_with("pg_filenode.map")
    });
    Ok(found)
}

fn u16_at(page: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes([page[at], page[at + 1]]))
}

fn zero(page: &mut [u8], at: usize, len: usize) {
    page[at..at + len].fill(0);
}

/// Takes out of a page what may differ.
fn mask(page: &mut [u8]) {
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
    // Sequences and BRIN have a special area too; their items have no hints.
    let last = u16_at(page, PAGE - 2);
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
        return zero(page, 28, lower - 28);
    }
    let is_heap = opaque == 0;
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
    for number in 0..(lower - 24) / 4 {
        let at = 24 + number * 4;
        let pointer = u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
        let (offset, flags, len) = ((pointer & 0x7FFF) as usize, pointer >> 15 & 3, (pointer >> 17) as usize);
        if !is_heap {
            // A dead index item is a hint.
            if flags == 3 && len > 0 {
                page[at..at + 4].copy_from_slice(&(pointer & !(3 << 15) | 1 << 15).to_le_bytes());
            }
            continue;
        }
        if flags == 1 && len >= 23 && offset >= upper && offset + len <= special {
            // t_cid; hint bits of t_infomask, HEAP_COMBOCID; padding.
            zero(page, offset + 8, 4);
            page[offset + 20] &= !0x20;
            page[offset + 21] &= !0x0F;
            let padding = len.next_multiple_of(8).min(special - offset) - len;
            zero(page, offset + len, padding);
        }
    }
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

fn lsn(page: &[u8]) -> String {
    let half = |at: usize| {
        page.get(at..at + 4)
            .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    };
    format!("{:X}/{:X}", half(0), half(4))
}

/// What differs, in words; at most `limit` pages.
pub fn differences(a: &Path, b: &Path, limit: usize) -> Result<Vec<String>> {
    let (of_a, of_b) = (relations(a)?, relations(b)?);
    let mut found = Vec::new();
    let one_sided = of_a
        .keys()
        .filter(|name| !of_b.contains_key(*name))
        .map(|name| (name, &of_a[name]));
    let other = of_b
        .keys()
        .filter(|name| !of_a.contains_key(*name))
        .map(|name| (name, &of_b[name]));
    for (name, path) in one_sided.chain(other) {
        // What was dropped leaves an empty file until the next checkpoint; a visibility map that is not there says no
        // more than an empty one.
        let is_map = relation_file(name).is_some_and(|file| file.fork == Fork::Vm);
        if !is_map && std::fs::metadata(path)?.len() > 0 {
            found.push(format!("{name} is only in one of them"));
        }
    }
    for (name, path) in of_a.iter().filter(|(name, _)| of_b.contains_key(*name)) {
        let (mut one, mut two) = (std::fs::read(path)?, std::fs::read(&of_b[name])?);
        let len = one.len().max(two.len());
        // Zeros at the end are pages that were never used.
        one.resize(len, 0);
        two.resize(len, 0);
        let is_map = relation_file(name).is_some_and(|file| file.fork == Fork::Vm);
        for (block, (one, two)) in one.chunks_mut(PAGE).zip(two.chunks_mut(PAGE)).enumerate() {
            if one == two {
                continue;
            }
            let lsns = (lsn(one), lsn(two));
            if one.len() < PAGE {
                found.push(format!("{name} differs"));
                break;
            }
            match is_map {
                true => {
                    zero(one, 0, 24);
                    zero(two, 0, 24);
                    // CREATE DATABASE with WAL_LOG logs maps without what is in them: replay leaves them empty.
                    if one.iter().all(|&b| b == 0) || two.iter().all(|&b| b == 0) {
                        continue;
                    }
                }
                false => {
                    mask(one);
                    mask(two);
                }
            }
            if let Some(at) = (0..PAGE).find(|&at| one[at] != two[at]) {
                let end = (0..PAGE).rfind(|&at| one[at] != two[at]).unwrap_or(at);
                let show = |page: &[u8]| {
                    page[at..PAGE.min(at + 16)]
                        .iter()
                        .map(|b| format!("{b:02x}"))
                        .collect::<String>()
                };
                found.push(format!(
                    "{name} block {block} from {at} to {end} (lower {}, upper {}, special {}): {} and {}; LSN {} and {}",
                    u16_at(one, 12),
                    u16_at(one, 14),
                    u16_at(one, 16),
                    show(one),
                    show(two),
                    lsns.0,
                    lsns.1
                ));
            }
            if found.len() >= limit {
                return Ok(found);
            }
        }
    }
    Ok(found)
}
