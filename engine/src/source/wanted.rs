//! What of a file is to be read, and in which pieces of work.

use std::ops::Range;
use std::sync::Arc;

use fairvault_format::limits::CHUNK_BYTES;

use crate::postgres::BLOCK_BYTES;

/// Consecutive bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub len: u32,
}

/// What of a file is to be read; of the rest, the parent's content is right.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Wanted {
    /// All of it.
    #[default]
    All,
    /// Blocks of the file: ascending ranges that do not touch.
    Blocks(Arc<[Range<u32>]>),
}

impl Wanted {
    /// How much of a file of `size` bytes.
    pub fn bytes(&self, size: u64) -> u64 {
        match self {
            Self::All => size,
            Self::Blocks(ranges) => ranges
                .iter()
                .map(|range| range.len() as u64 * u64::from(BLOCK_BYTES))
                .sum(),
        }
    }

    /// Whether a block of the file is.
    pub fn has(&self, block: u32) -> bool {
        match self {
            Self::All => true,
            Self::Blocks(ranges) => {
                let at = ranges.partition_point(|range| range.end <= block);
                ranges.get(at).is_some_and(|range| range.contains(&block))
            }
        }
    }

    /// Chunks of at most 512 KiB: consecutive ones of a file that is wanted as a whole, else gathered blocks.
    pub fn chunks(&self, size: u64) -> Chunks {
        let ranges = match self {
            Self::All => None,
            Self::Blocks(ranges) => Some(ranges.clone()),
        };
        Chunks {
            ranges,
            at: 0,
            position: 0,
            size,
        }
    }
}

/// See [`Wanted::chunks`].
pub struct Chunks {
    ranges: Option<Arc<[Range<u32>]>>,
    at: usize,
    position: u64,
    size: u64,
}

impl Iterator for Chunks {
    type Item = Vec<Run>;

    fn next(&mut self) -> Option<Vec<Run>> {
        let Some(ranges) = &self.ranges else {
            let len = u64::from(CHUNK_BYTES).min(self.size - self.position) as u32;
            let run = Run {
                offset: self.position,
                len,
            };
            self.position += u64::from(len);
            return (len > 0).then(|| vec![run]);
        };
        let (mut runs, mut left) = (Vec::new(), CHUNK_BYTES);
        while left > 0
            && let Some(range) = ranges.get(self.at)
        {
            let block = u64::from(BLOCK_BYTES);
            let (from, to) = (u64::from(range.start) * block, u64::from(range.end) * block);
            let offset = self.position.max(from);
            let len = u64::from(left).min(to - offset) as u32;
            runs.push(Run { offset, len });
            left -= len;
            self.position = offset + u64::from(len);
            if self.position == to {
                self.at += 1;
            }
        }
        (!runs.is_empty()).then_some(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_are_what_is_wanted(
            blocks in proptest::collection::btree_set(0u32..600, 0..300),
            size in 0u64..(600 * 8192),
        ) {
            let mut ranges: Vec<Range<u32>> = Vec::new();
            for &block in &blocks {
                match ranges.last_mut() {
                    Some(last) if last.end == block => last.end += 1,
                    _ => ranges.push(block..block + 1),
                }
            }
            let wanted = Wanted::Blocks(ranges.into());
            let mut seen = Vec::new();
            for chunk in wanted.chunks(600 * 8192) {
                prop_assert!(chunk.iter().map(|run| u64::from(run.len)).sum::<u64>() <= u64::from(CHUNK_BYTES));
                for run in chunk {
                    prop_assert!(run.offset % 8192 == 0 && run.len % 8192 == 0 && run.len > 0);
                    seen.extend(run.offset / 8192..run.offset / 8192 + u64::from(run.len / 8192));
                }
            }
            let expected: Vec<u64> = blocks.iter().map(|&block| block.into()).collect();
            prop_assert_eq!(seen, expected);
            prop_assert_eq!(wanted.bytes(600 * 8192), blocks.len() as u64 * 8192);
            for block in 0..600 {
                prop_assert_eq!(wanted.has(block), blocks.contains(&block));
            }
            let mut position = 0;
            for chunk in Wanted::All.chunks(size) {
                prop_assert_eq!((chunk.len(), chunk[0].offset), (1, position));
                position += u64::from(chunk[0].len);
            }
            prop_assert_eq!(position, size);
        }
    }
}
