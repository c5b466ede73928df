//! The page transform of codec 2 (SPEC.md, section 15): PostgreSQL pages taken apart into columns, so that what is
//! alike comes to lie side by side before zstd sees it.
//!
//! What always holds: what is put together is what was taken apart, for every input, valid page or not; whatever does not look
//! like a page is kept as it is; the decoder believes nothing that it is told about lengths.

mod decode;
mod encode;

pub use decode::Decoder;
pub use encode::{Encoder, Masks, Plan};

/// Bytes of a page.
pub const PAGE: usize = 8192;
/// Words of a page.
const WORDS: usize = PAGE / 8;
/// Bytes of a page header; line pointers follow.
const HEADER: usize = 24;
/// Largest special area that is made columns of, bytes.
const SPECIAL: usize = 32;
/// Most words of a tuple's body, or of an index item, that are made columns of.
pub const LEAD_WORDS: usize = 16;
/// Words of a heap tuple's header.
const TUPLE: usize = 3;
/// Layout of the transform.
const LAYOUT: u8 = 1;
/// Bytes before the masks.
const FIXED: usize = 4;
/// Masks that are always there: page header, special area, line pointers, tuple header, null bitmap.
const MASKS: usize = 3 + SPECIAL / 8 + 1 + TUPLE + 1;

/// Most that the transform adds to a chunk of `plain_len` bytes, bytes.
pub const fn overhead(plain_len: usize) -> usize {
    FIXED + MASKS + 2 * LEAD_WORDS + 5 * (plain_len / PAGE)
}

/// What a page is kept as.
mod kind {
    /// As it is.
    pub const PLAIN: u8 = 0;
    /// Only zeros: nothing is kept.
    pub const ZERO: u8 = 1;
    /// Items with heap tuple headers.
    pub const HEAP: u8 = 2;
    /// Items of any kind.
    pub const ITEMS: u8 = 4;
    /// Added to the two above: there is something in the hole.
    pub const HOLE: u8 = 1;
}

/// A page's layout, from its header.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// End of the line pointers, bytes.
    lower: usize,
    /// Where items begin, bytes.
    upper: usize,
    /// Where the special area begins, bytes.
    special: usize,
}

impl Shape {
    /// From the first three words of a page; `None` unless it looks like a page.
    fn of(head: [u64; 3]) -> Option<Self> {
        let part = |word: u64, at: u32| (word >> at) as u16 as usize;
        let (lower, upper) = (part(head[1], 32), part(head[1], 48));
        let (special, size_and_version) = (part(head[2], 0), part(head[2], 16));
        let fits = size_and_version == PAGE | 4
            && HEADER <= lower
            && lower <= upper
            && upper <= special
            && (PAGE - SPECIAL..=PAGE).contains(&special)
            && lower % 4 == 0
            && upper % 8 == 0
            && special % 8 == 0;
        fits.then_some(Self { lower, upper, special })
    }

    fn items(&self) -> usize {
        (self.lower - HEADER) / 4
    }

    fn special_words(&self) -> usize {
        (PAGE - self.special) / 8
    }
}

/// A line pointer.
#[derive(Debug, Clone, Copy)]
struct Item(u32);

impl Item {
    /// Offset in the page; of something else where nothing is stored.
    fn offset(self) -> usize {
        (self.0 & 0x7fff) as usize
    }

    /// Bytes that are stored for it, with what aligns them; 0 if there are none.
    fn len(self) -> usize {
        ((self.0 >> 17) as usize).next_multiple_of(8)
    }

    /// The same with another offset.
    fn with_offset(self, offset: usize) -> Self {
        Self(self.0 & !0x7fff | offset as u32 & 0x7fff)
    }
}

/// Which words of a page items occupy.
struct Occupied([u64; WORDS / 64]);

impl Occupied {
    fn new() -> Self {
        Self([0; WORDS / 64])
    }

    /// Notes an item; fails if it does not lie between `upper` and `special`, is not aligned, or overlaps another.
    fn take(&mut self, shape: &Shape, item: Item) -> Option<()> {
        let (from, to) = (item.offset(), item.offset() + item.len());
        if from % 8 != 0 || from < shape.upper || to > shape.special {
            return None;
        }
        let (mut at, to) = (from / 8, to / 8);
        while at < to {
            let bit = at % 64;
            let count = (64 - bit).min(to - at);
            let mask = (u64::MAX >> (64 - count)) << bit;
            let word = &mut self.0[at / 64];
            if *word & mask != 0 {
                return None;
            }
            *word |= mask;
            at += count;
        }
        Some(())
    }

    /// Runs of words between `upper` and `special` that nothing occupies: first, and behind the last.
    fn gaps(&self, shape: &Shape) -> impl Iterator<Item = (usize, usize)> {
        let (mut at, end) = (shape.upper / 8, shape.special / 8);
        let is_free = |at: usize| self.0[at / 64] >> (at % 64) & 1 == 0;
        std::iter::from_fn(move || {
            while at < end && !is_free(at) {
                // Whole words of items are passed at once.
                at += match at % 64 == 0 && self.0[at / 64] == u64::MAX {
                    true => 64,
                    false => 1,
                };
            }
            let from = at;
            while at < end && is_free(at) {
                at += 1;
            }
            (from < at).then_some((from, at))
        })
    }
}

/// Offset of a heap tuple's body, in words, from the last word of its header.
fn body_offset(last: u64) -> usize {
    (last >> 48) as u8 as usize / 8
}

/// Whether a heap tuple of `len` bytes can have this last word in its header.
fn is_tuple(last: u64, len: usize) -> bool {
    let offset = (last >> 48) as u8 as usize;
    offset.is_multiple_of(8) && (8 * TUPLE..=len).contains(&offset)
}

/// What the second and third word of a tuple header are compared with: the tuple's own position.
fn own_position(block: u32, number: usize) -> (u64, u64) {
    let block = u64::from(block);
    (block >> 16 << 32 | (block & 0xffff) << 48, number as u64 & 0xffff)
}

#[cfg(test)]
mod tests;
