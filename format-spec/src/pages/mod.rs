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

/// An item that something is stored for; all in words.
#[derive(Debug, Clone, Copy)]
struct Stored {
    /// Its line pointer's number, from 1.
    number: u16,
    /// Where it begins.
    at: u16,
    len: u16,
    /// Where in it the words begin that are made columns of: a heap tuple's body.
    body: u16,
}

impl Stored {
    /// Of a line pointer, counted from 0. It may lie anywhere.
    fn of(index: usize, item: Item) -> Self {
        Self {
            number: index as u16 + 1,
            at: (item.offset() / 8) as u16,
            len: (item.len() / 8) as u16,
            body: 0,
        }
    }

    fn at(&self) -> usize {
        self.at.into()
    }

    /// Where it ends.
    fn end(&self) -> usize {
        usize::from(self.at) + usize::from(self.len)
    }

    /// Where its body begins.
    fn body_at(&self) -> usize {
        usize::from(self.at) + usize::from(self.body)
    }

    /// Words of its body; it has been asked that there is one.
    fn body_len(&self) -> usize {
        usize::from(self.len.saturating_sub(self.body))
    }
}

/// Fewest and most words of bodies.
#[derive(Debug, Clone, Copy)]
struct Bodies {
    least: usize,
    most: usize,
}

impl Bodies {
    fn of(stored: &[Stored]) -> Self {
        let (mut least, mut most) = (u16::MAX, 0);
        for item in stored {
            let len = item.len.saturating_sub(item.body);
            (least, most) = (least.min(len), most.max(len));
        }
        Self {
            least: least.min(most).into(),
            most: most.into(),
        }
    }
}

/// Which words of a page items occupy.
struct Occupied {
    bits: [u64; WORDS / 64],
    /// Everything from here to the special area is occupied, without bits.
    full_from: usize,
}

impl Occupied {
    /// By these items; `None` if one does not lie between `upper` and `special`, or overlaps another.
    fn of(shape: &Shape, stored: &[Stored]) -> Option<Self> {
        let (upper, special) = (shape.upper / 8, shape.special / 8);
        let mut occupied = Self {
            bits: [0; WORDS / 64],
            full_from: special,
        };
        // Mostly each lies right before the one before it.
        let mut full_from = special;
        let mut apart = 0;
        for item in stored {
            apart |= item.end() ^ full_from;
            full_from = item.at();
        }
        if apart == 0 {
            occupied.full_from = full_from;
            return (full_from >= upper).then_some(occupied);
        }
        for item in stored {
            if item.at() < upper || item.end() > special {
                return None;
            }
            occupied.take(item.at(), item.end())?;
        }
        Some(occupied)
    }

    /// Notes an item's words, which are words of the page; fails if one of them is occupied.
    fn take(&mut self, mut at: usize, to: usize) -> Option<()> {
        while at < to {
            let bit = at % 64;
            let count = (64 - bit).min(to - at);
            let mask = (u64::MAX >> (64 - count)) << bit;
            let word = &mut self.bits[at / 64];
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
        let (mut at, end) = (shape.upper / 8, self.full_from);
        let is_free = |at: usize| self.bits[at / 64] >> (at % 64) & 1 == 0;
        std::iter::from_fn(move || {
            while at < end && !is_free(at) {
                // Whole words of items are passed at once.
                at += match at % 64 == 0 && self.bits[at / 64] == u64::MAX {
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
fn body_offset(last: u64) -> u16 {
    u16::from((last >> 48) as u8 / 8)
}

/// Whether a heap tuple of `len` words can have this last word in its header.
fn is_tuple(last: u64, len: u16) -> bool {
    let offset = (last >> 48) as u8;
    offset.is_multiple_of(8) && (TUPLE as u16..=len).contains(&u16::from(offset / 8))
}

/// What the second and third word of a tuple header are compared with: the tuple's own position.
fn own_position(block: u32, number: u16) -> (u64, u64) {
    let block = u64::from(block);
    (block >> 16 << 32 | (block & 0xffff) << 48, u64::from(number))
}

#[cfg(test)]
mod tests;
