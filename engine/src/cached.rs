//! What the kernel has in its cache of files, read without changing what is there.

use std::fs::File;
use std::io::IoSliceMut;
use std::sync::LazyLock;

use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// RWF_DONTCACHE (`linux/fs.h`, since 6.14): what a read brings into the cache goes with it, and what was there stays.
const DONT_CACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// The first version of Linux whose such reads leave alone what is being written meanwhile (commit "mm/filemap: use
/// filemap_end_dropbehind() for read invalidation").
const SAFE_SINCE: (u32, u32) = (6, 16);

/// Reads what is in the kernel's cache from there and the rest past it, which is left as it was. Returns how much there
/// was up to the end of the file; `None`, where the kernel or the file system has no such reads.
pub fn read_past(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<Option<usize>> {
    if !reads_past() {
        return Ok(None);
    }
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut [IoSliceMut::new(&mut bytes[done..])];
        match preadv2(file, rest, offset + done as u64, DONT_CACHE) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Some(done))
}

fn reads_past() -> bool {
    static ANSWER: LazyLock<bool> = LazyLock::new(|| {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        version(&release).is_some_and(|version| version >= SAFE_SINCE)
    });
    *ANSWER
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.trim().split(['.', '-']).map(str::parse::<u32>);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

/// Reads as far as the kernel's cache has it; returns how many bytes that was. The disk is not waited for, but asked:
/// what is lacking comes into the cache.
pub fn read_cached(file: &File, bytes: &mut [u8], offset: u64) -> usize {
    preadv2(file, &mut [IoSliceMut::new(bytes)], offset, ReadWriteFlags::NOWAIT).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_drop_what_is_being_written_are_not_asked_to() {
        let is_safe = |release: &str| version(release).is_some_and(|version| version >= SAFE_SINCE);
        for release in ["6.18.4-1-generic\n", "6.16.0", "6.100.1", "7.0-rc1\n"] {
            assert!(is_safe(release), "{release}");
        }
        for release in [
            "6.15.11-generic\n",
            "6.6.1",
            "5.14.0-503.el9.x86_64\n",
            "4.4.0",
            "",
            "6",
        ] {
            assert!(!is_safe(release), "{release}");
        }
    }

    #[test]
    fn what_there_is_is_read_whole_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let all: Vec<u8> = (0..100_000u32).map(|at| (at % 251) as u8 | 1).collect();
        std::fs::write(folder.path().join("file"), &all).unwrap();
        let file = File::open(folder.path().join("file")).unwrap();
        for (offset, len) in [(0, 8192), (8192, 65_536), (98_304, 8192), (106_496, 8192)] {
            let mut bytes = vec![0xEE; len];
            // `None` where there are no such reads.
            if let Some(done) = read_past(&file, &mut bytes, offset as u64).unwrap() {
                let there = &all[all.len().min(offset)..all.len().min(offset + len)];
                assert!(
                    done == there.len() && bytes.starts_with(there),
                    "{done} bytes at {offset}"
                );
            }
        }
    }
}
