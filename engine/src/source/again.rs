//! Pages that are read once more because their checksum is wrong: mostly the server was writing them just then.
//!
//! What always holds: they are read again before the source reads `pg_control` and ends backup mode, as everything else
//! is: later, a page could be newer than what the backup ends with. With `local`, a page takes the place of a wrong one
//! only if its own checksum is right; `sql` asks for the whole chunk again, and takes what comes. What is still wrong
//! after a few times is judged by the WAL (`backup::judge`).

use std::time::Duration;

use super::Run;
use crate::error::Result;
use crate::postgres::files::relation_file;
use crate::postgres::page::{self, Verdict};
use crate::postgres::{BLOCK_BYTES, BLOCKS_PER_SEGMENT};

/// How often a page is read again.
pub const READS: usize = 3;
/// How long whoever writes a page has to end that.
const PAUSE: Duration = Duration::from_millis(2);

const PAGE: usize = BLOCK_BYTES as usize;

/// A page whose checksum is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Torn {
    /// Where it is in the chunk, bytes.
    at: usize,
    /// Where it is in the file, bytes.
    offset: u64,
    /// Its number in the relation.
    block: u32,
}

/// Those of a chunk of this file; none if the file has no pages.
pub fn torn(path: &str, runs: &[Run], bytes: &[u8]) -> Vec<Torn> {
    let Some(file) = relation_file(path) else {
        return Vec::new();
    };
    let first_of_file = file.segment.wrapping_mul(BLOCKS_PER_SEGMENT);
    let mut found = Vec::new();
    let mut begin = 0;
    for run in runs {
        let content = &bytes[begin..begin + run.len as usize];
        for (number, page) in content.chunks_exact(PAGE).enumerate() {
            let inside = number * PAGE;
            let offset = run.offset + inside as u64;
            let block = first_of_file.wrapping_add((offset / PAGE as u64) as u32);
            if is_wrong(page, block) {
                let at = begin + inside;
                found.push(Torn { at, offset, block });
            }
        }
        begin += run.len as usize;
    }
    found
}

fn is_wrong(page: &[u8], block: u32) -> bool {
    matches!(page::verify(page, block), Verdict::Bad { .. })
}

/// Reads those of a chunk again with `read`, which fills a buffer from an offset of the file. Returns whether all are
/// right now. Blocks.
pub fn mend(
    path: &str,
    runs: &[Run],
    bytes: &mut [u8],
    mut read: impl FnMut(&mut [u8], u64) -> Result<()>,
) -> Result<bool> {
    let mut left = torn(path, runs, bytes);
    for _ in 0..READS {
        if left.is_empty() {
            break;
        }
        std::thread::sleep(PAUSE);
        let mut still = Vec::new();
        for page in left {
            let mut again = [0; PAGE];
            read(&mut again, page.offset)?;
            match is_wrong(&again, page.block) {
                true => still.push(page),
                false => bytes[page.at..page.at + PAGE].copy_from_slice(&again),
            }
        }
        left = still;
    }
    Ok(left.is_empty())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::error::Error;

    /// A page that is right as this block of its relation.
    fn page(block: u32, filler: u8) -> Vec<u8> {
        let mut page = vec![filler; PAGE];
        let sum = page::checksum(&page, block);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        page
    }

    /// Blocks 0, 1, 5 and 6 of a file.
    fn runs() -> [Run; 2] {
        [0, 5].map(|block| Run {
            offset: block * PAGE as u64,
            len: 2 * BLOCK_BYTES,
        })
    }

    /// The chunk of these runs in a file's second segment.
    fn chunk() -> Vec<u8> {
        [0, 1, 5, 6].map(|block| page(BLOCKS_PER_SEGMENT + block, 9)).concat()
    }

    const PATH: &str = "base/5/77.1";

    #[test]
    fn only_pages_that_are_wrong_where_they_are_count() {
        let mut bytes = chunk();
        assert!(torn(PATH, &runs(), &bytes).is_empty());
        assert_eq!(torn("base/5/77", &runs(), &bytes).len(), 4, "blocks of another segment");
        bytes[2 * PAGE + 5000] ^= 1;
        let found = torn(PATH, &runs(), &bytes);
        let expected = Torn {
            at: 2 * PAGE,
            offset: 5 * PAGE as u64,
            block: BLOCKS_PER_SEGMENT + 5,
        };
        assert_eq!(found, [expected]);
        // New pages have no checksum, other files no pages.
        bytes[2 * PAGE..3 * PAGE].fill(0);
        assert!(torn(PATH, &runs(), &bytes).is_empty());
        assert!(torn("pg_xact/0000", &runs(), &vec![7; 4 * PAGE]).is_empty());
    }

    #[test]
    fn a_page_that_is_right_later_takes_the_place_of_a_wrong_one() {
        let good = chunk();
        let mut bytes = good.clone();
        for number in [1, 2] {
            bytes[number * PAGE + 4096..(number + 1) * PAGE].fill(0x5A);
        }
        // Block 1 has changed meanwhile, and is right at once; block 5 is torn once more.
        let newer = page(BLOCKS_PER_SEGMENT + 1, 10);
        let mut reads: HashMap<u64, usize> = HashMap::new();
        let read = |into: &mut [u8], offset: u64| {
            let read = reads.entry(offset / PAGE as u64).or_default();
            *read += 1;
            match (offset / PAGE as u64, *read) {
                (1, _) => into.copy_from_slice(&newer),
                (5, 1) => into.fill(0x77),
                (5, _) => into.copy_from_slice(&good[2 * PAGE..3 * PAGE]),
                _ => return Err(Error::failed("a page that was right is read again")),
            }
            Ok(())
        };
        assert!(mend(PATH, &runs(), &mut bytes, read).unwrap());
        assert_eq!(reads, HashMap::from([(1, 1), (5, 2)]));
        let expected = [&good[..PAGE], &newer, &good[2 * PAGE..]].concat();
        assert!(bytes == expected);
    }

    #[test]
    fn a_page_that_stays_wrong_is_left_as_it_was_read_first() {
        let mut bytes = chunk();
        bytes[3 * PAGE + 100] ^= 1;
        let before = bytes.clone();
        let mut reads = 0;
        let read = |into: &mut [u8], _: u64| {
            reads += 1;
            into.fill(reads as u8);
            Ok(())
        };
        assert!(!mend(PATH, &runs(), &mut bytes, read).unwrap());
        assert_eq!(reads, READS);
        assert!(bytes == before);
        let failing = |_: &mut [u8], _: u64| Err(Error::failed("the disk is gone"));
        let error = mend(PATH, &runs(), &mut bytes, failing).unwrap_err();
        assert_eq!(error.to_string(), "the disk is gone");
    }
}
