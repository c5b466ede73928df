//! Columns back into pages.

use super::{
    Bodies, FIXED, HEADER, Item, LAYOUT, LEAD_WORDS, MASKS, Occupied, PAGE, SPECIAL, Shape, Stored, TUPLE, WORDS,
    body_offset, is_tuple, kind, own_position,
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
        self.next_of(1).first().copied().unwrap_or_default()
    }

    /// The next words; fewer if there are fewer.
    fn next_of(&mut self, count: usize) -> &[u64] {
        let words = &self.words[self.used.min(self.words.len())..];
        self.used += count;
        &words[..count.min(words.len())]
    }
}

/// A page that was taken apart.
#[derive(Debug)]
struct Page {
    shape: Shape,
    kind: u8,
    block: u32,
    /// Where it comes to lie among all pages of the chunk.
    slot: usize,
    /// Its items among those of all pages.
    stored: std::ops::Range<usize>,
    /// Words that it has behind its items, among those of all pages.
    gaps: std::ops::Range<usize>,
    bodies: Bodies,
}

impl Page {
    fn is_heap(&self) -> bool {
        self.kind & !kind::HOLE == kind::HEAP
    }
}

/// The words of a page that is being put together.
struct Words<'a>(&'a mut [u8; PAGE]);

impl Words<'_> {
    /// Behind the end is the beginning: whoever is not sure of `at` checks it before he succeeds.
    fn set(&mut self, at: usize, word: u64) {
        self.0.as_chunks_mut::<8>().0[at % WORDS] = word.to_le_bytes();
    }

    /// Takes those from `from` on and before `to`, mostly few, from the input.
    fn take(&mut self, from: usize, to: usize, input: &mut Input<'_>) -> Result<()> {
        const FEW: usize = 8;
        let words = &mut self.0.as_chunks_mut::<8>().0[from..to];
        let taken = input.take(8 * words.len())?;
        match words.len() {
            ..=FEW => {
                for (word, taken) in words.iter_mut().zip(taken.as_chunks::<8>().0) {
                    *word = *taken;
                }
            }
            _ => words.as_flattened_mut().copy_from_slice(taken),
        }
        Ok(())
    }
}

/// Puts chunks together; keeps its buffers from one to the next.
#[derive(Debug, Default)]
pub struct Decoder {
    pages: Vec<Page>,
    stored: Vec<Stored>,
    gaps: Vec<(usize, usize)>,
    column: Column,
    head: [Column; 3],
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
        self.read_heads(&mut input, kinds, masks, slots)?;
        self.read_special(&mut input, &masks[3..], slots)?;
        self.read_items(&mut input, masks[3 + SPECIAL / 8], slots)?;
        let tuple_masks = &masks[3 + SPECIAL / 8 + 1..];
        self.read_tuples(&mut input, tuple_masks, slots)?;
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
    fn read_heads(
        &mut self,
        input: &mut Input<'_>,
        kinds: &[u8],
        masks: &[u8],
        slots: &mut [[u8; PAGE]],
    ) -> Result<()> {
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
        let mut next_block = 0u32;
        for (slot, &kind) in kinds
            .iter()
            .enumerate()
            .filter(|(_, kind)| **kind & !kind::HOLE != kind::PLAIN)
        {
            let head = [self.head[0].next(), self.head[1].next(), self.head[2].next()];
            let shape = Shape::of(head).ok_or_else(|| input.damaged("a page header"))?;
            let mut words = Words(&mut slots[slot]);
            for (at, word) in head.into_iter().enumerate() {
                words.set(at, word);
            }
            let mut page = Page {
                shape,
                kind,
                block: 0,
                slot,
                stored: 0..0,
                gaps: 0..0,
                bodies: Bodies { least: 0, most: 0 },
            };
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

    /// Special areas.
    fn read_special(&mut self, input: &mut Input<'_>, masks: &[u8], slots: &mut [[u8; PAGE]]) -> Result<()> {
        for (at, &mask) in masks.iter().enumerate().take(SPECIAL / 8) {
            let with_word = || self.pages.iter().filter(|page| page.shape.special_words() > at);
            self.column.read(input, with_word().count(), 8, mask)?;
            for (page, &word) in with_word().zip(&self.column.words) {
                Words(&mut slots[page.slot]).set(page.shape.special / 8 + at, word);
            }
        }
        Ok(())
    }

    /// Line pointers, with their offsets: where items lie is known from here on, and that they do not overlap.
    fn read_items(&mut self, input: &mut Input<'_>, mask: u8, slots: &mut [[u8; PAGE]]) -> Result<()> {
        let count = self.pages.iter().map(|page| page.shape.items()).sum();
        self.column.read(input, count, 4, mask)?;
        self.stored.clear();
        self.gaps.clear();
        for page in &mut self.pages {
            let shape = &page.shape;
            let (first, mut expected, mut offsets) = (self.stored.len(), shape.special, 0);
            let pointers = slots[page.slot][HEADER..shape.lower].as_chunks_mut::<4>().0;
            let shown = self.column.next_of(pointers.len());
            for (index, (slot, &shown)) in pointers.iter_mut().zip(shown).enumerate() {
                let mut item = Item(shown as u32);
                let len = item.len();
                if len > 0 {
                    item = item.with_offset(expected.wrapping_sub(len).wrapping_sub(item.offset()));
                    expected = item.offset();
                    offsets |= expected;
                    self.stored.push(Stored::of(index, item));
                }
                *slot = item.0.to_le_bytes();
            }
            page.stored = first..self.stored.len();
            let stored = &self.stored[page.stored.clone()];
            let occupied = Occupied::of(shape, stored).filter(|_| offsets % 8 == 0);
            let occupied = occupied.ok_or_else(|| input.damaged("a line pointer"))?;
            let first = self.gaps.len();
            self.gaps.extend(occupied.gaps(shape));
            page.gaps = first..self.gaps.len();
        }
        Ok(())
    }

    /// Headers of heap tuples, in their own words.
    fn read_tuples(&mut self, input: &mut Input<'_>, masks: &[u8], slots: &mut [[u8; PAGE]]) -> Result<()> {
        let heaps = || self.pages.iter().filter(|page| page.is_heap());
        let count = heaps().map(|page| page.stored.len()).sum();
        for (column, &mask) in self.tuples.iter_mut().zip(masks) {
            column.read(input, count, 8, mask)?;
        }
        let [first, second, third] = &mut self.tuples;
        for page in heaps() {
            let stored = &mut self.stored[page.stored.clone()];
            let mut words = Words(&mut slots[page.slot]);
            let headers = first.next_of(stored.len()).iter().zip(second.next_of(stored.len()));
            let headers = headers.zip(third.next_of(stored.len()));
            let mut are_tuples = true;
            for (item, ((&first, &second), &third)) in stored.iter_mut().zip(headers) {
                let (high, low) = own_position(page.block, item.number);
                let last = third ^ low;
                are_tuples &= is_tuple(last, item.len);
                item.body = body_offset(last);
                words.set(item.at(), first);
                words.set(item.at() + 1, second ^ high);
                words.set(item.at() + 2, last);
            }
            if !are_tuples {
                return Err(input.damaged("a tuple header"));
            }
        }
        Ok(())
    }

    /// Null bitmaps and the leading words of bodies and of other items.
    fn read_words(&mut self, input: &mut Input<'_>, bits_mask: u8, heap: &[u8], other: &[u8]) -> Result<()> {
        let (mut bits, mut heap_counts, mut other_counts) = (0, [0; LEAD_WORDS + 1], [0; LEAD_WORDS + 1]);
        for page in &mut self.pages {
            let stored = &self.stored[page.stored.clone()];
            page.bodies = Bodies::of(stored);
            let (counts, columns) = match page.is_heap() {
                true => {
                    bits += stored.iter().filter(|item| usize::from(item.body) > TUPLE).count();
                    (&mut heap_counts, heap.len())
                }
                false => (&mut other_counts, other.len()),
            };
            if page.bodies.least >= columns || page.bodies.least == page.bodies.most {
                counts[page.bodies.least.min(columns)] += stored.len();
                continue;
            }
            for item in stored {
                counts[item.body_len().min(columns)] += 1;
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

    /// What is left of a page: bodies, gaps and the hole.
    fn put_together(
        &mut self,
        input: &mut Input<'_>,
        number: usize,
        heap_words: usize,
        item_words: usize,
        out: &mut [u8; PAGE],
    ) -> Result<()> {
        let page = &self.pages[number];
        let stored = &self.stored[page.stored.clone()];
        let mut words = Words(out);
        let columns = match page.is_heap() {
            true => {
                for item in stored.iter().filter(|item| usize::from(item.body) > TUPLE) {
                    words.set(item.at() + TUPLE, self.bits.next());
                }
                &mut self.heap[..heap_words]
            }
            false => &mut self.other[..item_words],
        };
        let lead = columns.len();
        for (number, column) in columns.iter_mut().enumerate().take(page.bodies.most) {
            if number < page.bodies.least {
                for (item, &word) in stored.iter().zip(column.next_of(stored.len())) {
                    words.set(item.body_at() + number, word);
                }
                continue;
            }
            for item in stored.iter().filter(|item| item.body_len() > number) {
                words.set(item.body_at() + number, column.next());
            }
        }
        for item in stored {
            if usize::from(item.body) > TUPLE + 1 {
                words.take(item.at() + TUPLE + 1, item.body_at(), input)?;
            }
            if item.body_len() > lead {
                words.take(item.body_at() + lead, item.end(), input)?;
            }
        }
        for &(from, to) in &self.gaps[page.gaps.clone()] {
            words.take(from, to, input)?;
        }
        let hole = &mut out[page.shape.lower..page.shape.upper];
        match page.kind & kind::HOLE {
            0 => hole.fill(0),
            _ => hole.copy_from_slice(input.take(hole.len())?),
        }
        Ok(())
    }
}
