//! Two data directories compared page by page, as far as PostgreSQL lets two copies at one LSN differ.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use fairvault_engine::postgres::files::{Fork, relation_file};
use fairvault_engine::postgres::hints::mask;

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
    let one_sided = of_a.iter().filter(|(name, _)| !of_b.contains_key(*name));
    let other = of_b.iter().filter(|(name, _)| !of_a.contains_key(*name));
    for (name, path) in one_sided.chain(other) {
        // What was dropped leaves an empty file until the next checkpoint; a visibility map that is not there says no
        // more than an empty one.
        let is_map = relation_file(name).is_some_and(|file| file.fork == Fork::Vm);
        let len = std::fs::metadata(path)?.len();
        if !is_map && len > 0 {
            found.push(format!(
                "{name} is only in one of them: {} of {len} bytes",
                path.display()
            ));
        }
    }
    for (name, path) in of_a.iter().filter(|(name, _)| of_b.contains_key(*name)) {
        let (mut one, mut two) = (std::fs::read(path)?, std::fs::read(&of_b[name])?);
        let len = one.len().max(two.len());
        // Zeros at the end are pages that were never used.
        one.resize(len, 0);
        two.resize(len, 0);
        if len % PAGE != 0 {
            if one != two {
                found.push(format!("{name} differs"));
            }
            continue;
        }
        let is_map = relation_file(name).is_some_and(|file| file.fork == Fork::Vm);
        let pages = one
            .as_chunks_mut::<PAGE>()
            .0
            .iter_mut()
            .zip(two.as_chunks_mut::<PAGE>().0);
        for (block, (one, two)) in pages.enumerate() {
            let lsns = (lsn(one), lsn(two));
            if one == two || means_the_same(one, two, is_map) {
                continue;
            }
            let at = (0..PAGE).find(|&at| one[at] != two[at]).unwrap_or_default();
            let end = (0..PAGE).rfind(|&at| one[at] != two[at]).unwrap_or_default();
            let show = |page: &[u8]| {
                page[at..PAGE.min(at + 16)]
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect::<String>()
            };
            found.push(format!(
                "{name} block {block} from {at} to {end}: {} and {}; LSN {} and {}",
                show(one),
                show(two),
                lsns.0,
                lsns.1
            ));
            if found.len() >= limit {
                return Ok(found);
            }
        }
    }
    Ok(found)
}

/// Whether two pages are the same but for what may differ; that is taken out of both.
fn means_the_same(one: &mut [u8; PAGE], two: &mut [u8; PAGE], is_map: bool) -> bool {
    if !is_map {
        mask(one);
        mask(two);
        return one == two;
    }
    one[..24].fill(0);
    two[..24].fill(0);
    // CREATE DATABASE with WAL_LOG logs maps without what is in them: replay leaves them empty.
    let is_empty = |page: &[u8; PAGE]| page.iter().all(|&byte| byte == 0);
    one == two || is_empty(one) || is_empty(two)
}
