//! Columns back into pages.

use super::{
    FIXED, HEADER, Item, LAYOUT, LEAD_WORDS, MASKS, Occupied, PAGE, SPECIAL, Shape, TUPLE, body_offset, is_tuple, kind,
    own_position,
};
use crate::columns::{self, Input};
use crate::error::{FormatError, Result};

/// A column, and how far it has been used.
#[derive(Debug, Default)]
struct Column {
    words: Vec<u64>,
    used: usize,
}

impl Column {
    /// Takes `count` words from the input.
    fn read(&mut self, input: &mut Input<'_>, count: usize, planes: usize, mask: u8) -> Result<()> {
        columns::read(input.take(count * planes)?, planes, mask, &mut self.words);
        self.used = 0;
        Ok(())
    }

    fn next(&mut self) -> u64 {
        let word = self.words.get(self.used).copied().unwrap_or_default();
        self.used += 1;
        word
    }
}

/// A page that was taken apart.
#[derive(Debug)]
struct Page {
    shape: Shape,
    head: [u64; 3],
    kind: u8,
    block: u32,
    /// Where its line pointers begin among those of all pages.
    first: usize,
}

impl Page {
    fn is_heap(&self) -> bool {
        self.kind & !kind::HOLE == kind::HEAP
    }

    fn items<'a>(&self, all: &'a [Item]) -> &'a [Item] {
        &all[self.first..self.first + self.shape.items()]
    }
}

/// Puts chunks together; keeps its buffers from one to the next.
#[derive(Debug, Default)]
pub struct Decoder {
    pages: Vec<Page>,
    items: Vec<Item>,
    head: [Column; 3],
    special: [Column; SPECIAL / 8],
    pointers: Column,
    tuples: [Column; TUPLE],
    bits: Column,
    heap: [Column; LEAD_WORDS],
    other: [Column; LEAD_WORDS],
}

impl Decoder {
    /// Fills `out`, a chunk, from what [`super::Encoder`] made of it. `what` is the object, for messages.
    pub fn decode(&mut self, transformed: &[u8], out: &mut [u8], what: &str) -> Result<()> {
        let mut input = Input::new(transformed, what, "its pages cannot be put together");
        let fixed = input.take(FIXED)?;
        if fixed[0] != LAYOUT {
            return Err(FormatError::unsupported(what, format!("page layout {}", fixed[0])));
        }
        if fixed[3] != 0 {
            return Err(input.damaged("a byte that is always zero"));
        }
        let (heap_words, item_words) = (usize::from(fixed[1]), usize::from(fixed[2]));
        if heap_words.max(item_words) > LEAD_WORDS {
            return Err(input.damaged("too many columns"));
        }
        let masks = input.take(MASKS)?;
        let (heap_masks, item_masks) = (input.take(heap_words)?, input.take(item_words)?);
        let (slots, tail) = out.as_chunks_mut::<PAGE>();
        let kinds = input.take(slots.len())?;
        self.read_heads(&mut input, kinds, masks)?;
        for (at, column) in self.special.iter_mut().enumerate() {
            let count = self.pages.iter().filter(|page| page.shape.special_words() > at).count();
            column.read(&mut input, count, 8, masks[3 + at])?;
        }
        self.read_items(&mut input, masks[3 + SPECIAL / 8])?;
        let tuple_masks = &masks[3 + SPECIAL / 8 + 1..];
        self.read_tuples(&mut input, tuple_masks)?;
        self.read_words(&mut input, tuple_masks[TUPLE], heap_masks, item_masks)?;
        let mut apart = 0;
        for (slot, &kind) in slots.iter_mut().zip(kinds) {
            match kind {
                kind::ZERO => slot.fill(0),
                kind::PLAIN => slot.copy_from_slice(input.take(PAGE)?),
                _ => {
                    self.put_together(&mut input, apart, heap_words, item_words, slot)?;
                    apart += 1;
                }
            }
        }
        tail.copy_from_slice(input.take(tail.len())?);
        input.end()
    }

    /// Pages and their headers.
    fn read_heads(&mut self, input: &mut Input<'_>, kinds: &[u8], masks: &[u8]) -> Result<()> {
        let (mut apart, mut heaps) = (0, 0);
        for &kind in kinds {
            match kind & !kind::HOLE {
                kind::PLAIN => {}
                kind::HEAP => heaps += 1,
                kind::ITEMS => apart += 1,
                _ => return Err(input.damaged("a page of an unknown kind")),
            }
        }
        let mut blocks = input.take(4 * heaps)?.as_chunks::<4>().0.iter();
        for (column, &mask) in self.head.iter_mut().zip(masks) {
            column.read(input, apart + heaps, 8, mask)?;
        }
        self.pages.clear();
        let (mut next_block, mut first) = (0u32, 0);
        for &kind in kinds.iter().filter(|&&kind| kind & !kind::HOLE != kind::PLAIN) {
            let head = [self.head[0].next(), self.head[1].next(), self.head[2].next()];
            let shape = Shape::of(head).ok_or_else(|| input.damaged("a page header"))?;
            let mut page = Page {
                shape,
                head,
                kind,
                block: 0,
                first,
            };
            first += shape.items();
            if page.is_heap() {
                if shape.special != PAGE {
                    return Err(input.damaged("a heap page with a special area"));
                }
                let step = blocks.next().map_or(0, |bytes| u32::from_le_bytes(*bytes));
                page.block = next_block.wrapping_add(step);
                next_block = page.block.wrapping_add(1);
            }
            self.pages.push(page);
        }
        Ok(())
    }

    /// Line pointers, with their offsets.
    fn read_items(&mut self, input: &mut Input<'_>, mask: u8) -> Result<()> {
        let count = self.pages.iter().map(|page| page.shape.items()).sum();
        self.pointers.read(input, count, 4, mask)?;
        self.items.clear();
        for page in &self.pages {
            let mut expected = page.shape.special;
            for &shown in &self.pointers.words[page.first..page.first + page.shape.items()] {
                let shown = Item(shown as u32);
                self.items.push(match shown.len() {
                    0 => shown,
                    len => {
                        let item = shown.with_offset(expected.wrapping_sub(len).wrapping_sub(shown.offset()));
                        expected = item.offset();
                        item
                    }
                });
            }
        }
        Ok(())
    }

    /// Headers of heap tuples, in their own words.
    fn read_tuples(&mut self, input: &mut Input<'_>, masks: &[u8]) -> Result<()> {
        let heaps = || self.pages.iter().filter(|page| page.is_heap());
        let stored = |page: &Page| page.items(&self.items).iter().filter(|item| item.len() > 0).count();
        let count = heaps().map(stored).sum();
        for (column, &mask) in self.tuples.iter_mut().zip(masks) {
            column.read(input, count, 8, mask)?;
        }
        let mut at = 0;
        for page in heaps() {
            let items = page.items(&self.items).iter().enumerate();
            for (number, item) in items.filter(|(_, item)| item.len() > 0) {
                let (high, low) = own_position(page.block, number + 1);
                self.tuples[1].words[at] ^= high;
                self.tuples[2].words[at] ^= low;
                if !is_tuple(self.tuples[2].words[at], item.len()) {
                    return Err(input.damaged("a tuple header"));
                }
                at += 1;
            }
        }
        Ok(())
    }

    /// Null bitmaps and the leading words of bodies and of other items.
    fn read_words(&mut self, input: &mut Input<'_>, bits_mask: u8, heap: &[u8], other: &[u8]) -> Result<()> {
        let (mut bits, mut heap_counts, mut other_counts) = (0, [0; LEAD_WORDS + 1], [0; LEAD_WORDS + 1]);
        let mut tuples = self.tuples[2].words.iter();
        for page in &self.pages {
            let is_heap = page.is_heap();
            for item in page.items(&self.items).iter().filter(|item| item.len() > 0) {
                let words = item.len() / 8;
                if is_heap {
                    let body = tuples.next().map_or(0, |&last| body_offset(last));
                    bits += usize::from(body > TUPLE);
                    heap_counts[(words - body).min(heap.len())] += 1;
                } else {
                    other_counts[words.min(other.len())] += 1;
                }
            }
        }
        self.bits.read(input, bits, 8, bits_mask)?;
        let all = [
            (&mut self.heap, heap_counts, heap),
            (&mut self.other, other_counts, other),
        ];
        for (columns, counts, masks) in all {
            for (at, (column, &mask)) in columns.iter_mut().zip(masks).enumerate() {
                // Whoever has more words has this one.
                column.read(input, counts[at + 1..].iter().sum(), 8, mask)?;
            }
        }
        Ok(())
    }

    fn put_together(
        &mut self,
        input: &mut Input<'_>,
        number: usize,
        heap_words: usize,
        item_words: usize,
        out: &mut [u8; PAGE],
    ) -> Result<()> {
        let page = &self.pages[number];
        let shape = &page.shape;
        for (slot, word) in out.as_chunks_mut::<8>().0.iter_mut().zip(page.head) {
            *slot = word.to_le_bytes();
        }
        let special = out[shape.special..].as_chunks_mut::<8>().0;
        for (slot, column) in special.iter_mut().zip(&mut self.special) {
            *slot = column.next().to_le_bytes();
        }
        let items = page.items(&self.items);
        for (slot, item) in out[HEADER..].as_chunks_mut::<4>().0.iter_mut().zip(items) {
            *slot = item.0.to_le_bytes();
        }
        let is_heap = page.is_heap();
        let mut occupied = Occupied::new();
        for &item in items.iter().filter(|item| item.len() > 0) {
            occupied
                .take(shape, item)
                .ok_or_else(|| input.damaged("a line pointer"))?;
            let bytes = &mut out[item.offset()..item.offset() + item.len()];
            if !is_heap {
                fill(bytes, &mut self.other[..item_words], input)?;
                continue;
            }
            let header = [self.tuples[0].next(), self.tuples[1].next(), self.tuples[2].next()];
            // `is_tuple` has been asked: there is a header, and a body behind it.
            let (head, body) = bytes.split_at_mut(8 * body_offset(header[2]));
            let (head, bits) = head.split_at_mut(8 * TUPLE);
            for (slot, word) in head.as_chunks_mut::<8>().0.iter_mut().zip(header) {
                *slot = word.to_le_bytes();
            }
            fill(bits, std::slice::from_mut(&mut self.bits), input)?;
            fill(body, &mut self.heap[..heap_words], input)?;
        }
        for (from, to) in occupied.gaps(shape) {
            out[from * 8..to * 8].copy_from_slice(input.take((to - from) * 8)?);
        }
        let hole = &mut out[shape.lower..shape.upper];
        match page.kind & kind::HOLE {
            0 => hole.fill(0),
            _ => hole.copy_from_slice(input.take(hole.len())?),
        }
        Ok(())
    }
}

/// Fills `bytes` from columns, a word from each, and what is left from the input.
fn fill(bytes: &mut [u8], columns: &mut [Column], input: &mut Input<'_>) -> Result<()> {
    let lead = (bytes.len() / 8).min(columns.len());
    let (words, rest) = bytes.split_at_mut(8 * lead);
    for (slot, column) in words.as_chunks_mut::<8>().0.iter_mut().zip(columns) {
        *slot = column.next().to_le_bytes();
    }
    if !rest.is_empty() {
        rest.copy_from_slice(input.take(rest.len())?);
    }
    Ok(())
}
