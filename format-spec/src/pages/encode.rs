//! Pages into columns.

use super::{
    Bodies, FIXED, HEADER, Item, LAYOUT, LEAD_WORDS, MASKS, Occupied, PAGE, SPECIAL, Shape, Stored, TUPLE, WORDS,
    body_offset, is_tuple, kind, own_position,
};
use crate::columns;

/// Which planes hold differences, a bit for each plane of each column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Masks {
    /// Page header, special area, line pointers, tuple header, null bitmap.
    pub fixed: [u8; MASKS],
    /// Words of tuple bodies.
    pub heap: [u8; LEAD_WORDS],
    /// Words of items.
    pub items: [u8; LEAD_WORDS],
}

/// How a chunk is taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Words of a heap tuple's body that become columns, at most [`LEAD_WORDS`].
    pub heap_words: usize,
    /// Words of an item that become columns, at most [`LEAD_WORDS`].
    pub item_words: usize,
    /// Differences.
    pub masks: Masks,
}

/// Takes chunks apart; keeps its buffers from one to the next.
#[derive(Debug, Default)]
pub struct Encoder {
    kinds: Vec<u8>,
    blocks: Vec<u8>,
    next_block: u32,
    fixed: [Vec<u64>; MASKS],
    heap: [Vec<u64>; LEAD_WORDS],
    items: [Vec<u64>; LEAD_WORDS],
    rest: Vec<u8>,
    /// Of one page.
    stored: Vec<Stored>,
}

/// Positions of the fixed columns.
const SPECIAL_AT: usize = 3;
const POINTERS_AT: usize = SPECIAL_AT + SPECIAL / 8;

impl Encoder {
    /// Takes `plain` apart by `plan`; the result is appended to `out`. Returns how many of its pages were.
    pub fn encode(&mut self, plain: &[u8], plan: &Plan, out: &mut Vec<u8>) -> usize {
        let taken = self.split(plain, plan.heap_words.min(LEAD_WORDS), plan.item_words.min(LEAD_WORDS));
        self.write(plan, out);
        out.extend_from_slice(plain.as_chunks::<PAGE>().1);
        taken
    }

    /// Splits the pages of `plain`, and proposes a plan: differences where they have less entropy. It holds for fewer
    /// words as well.
    pub fn propose(&mut self, plain: &[u8], heap_words: usize, item_words: usize) -> Plan {
        self.split(plain, heap_words, item_words);
        let mut masks = Masks::default();
        for (column, mask) in self.fixed.iter().zip(&mut masks.fixed) {
            *mask = columns::propose(column);
        }
        for (column, mask) in self.heap.iter().zip(&mut masks.heap) {
            *mask = columns::propose(column);
        }
        for (column, mask) in self.items.iter().zip(&mut masks.items) {
            *mask = columns::propose(column);
        }
        Plan {
            heap_words,
            item_words,
            masks,
        }
    }

    fn split(&mut self, plain: &[u8], heap_words: usize, item_words: usize) -> usize {
        self.kinds.clear();
        self.blocks.clear();
        self.rest.clear();
        self.next_block = 0;
        let columns = self.fixed.iter_mut().chain(&mut self.heap).chain(&mut self.items);
        columns.for_each(Vec::clear);
        let mut taken = 0;
        for page in plain.as_chunks::<PAGE>().0 {
            match self.page(page, heap_words, item_words) {
                Some(()) => taken += 1,
                None if page.iter().all(|&byte| byte == 0) => self.kinds.push(kind::ZERO),
                None => {
                    self.kinds.push(kind::PLAIN);
                    self.rest.extend_from_slice(page);
                }
            }
        }
        taken
    }

    fn write(&self, plan: &Plan, out: &mut Vec<u8>) {
        let (heap_words, item_words) = (plan.heap_words.min(LEAD_WORDS), plan.item_words.min(LEAD_WORDS));
        out.reserve(FIXED + MASKS + heap_words + item_words + self.rest.len());
        out.extend_from_slice(&[LAYOUT, heap_words as u8, item_words as u8, 0]);
        out.extend_from_slice(&plan.masks.fixed);
        out.extend_from_slice(&plan.masks.heap[..heap_words]);
        out.extend_from_slice(&plan.masks.items[..item_words]);
        out.extend_from_slice(&self.kinds);
        out.extend_from_slice(&self.blocks);
        for (number, (column, mask)) in self.fixed.iter().zip(plan.masks.fixed).enumerate() {
            columns::write(column, if number == POINTERS_AT { 4 } else { 8 }, mask, out);
        }
        for (column, mask) in self.heap.iter().zip(plan.masks.heap).take(heap_words) {
            columns::write(column, 8, mask, out);
        }
        for (column, mask) in self.items.iter().zip(plan.masks.items).take(item_words) {
            columns::write(column, 8, mask, out);
        }
        out.extend_from_slice(&self.rest);
    }

    /// Takes a page apart; `None`, and nothing has happened, if it is none.
    fn page(&mut self, page: &[u8; PAGE], heap_words: usize, item_words: usize) -> Option<()> {
        let words = Words(page);
        let shape = Shape::of([words.get(0), words.get(1), words.get(2)])?;
        let pointers = page[HEADER..shape.lower].as_chunks::<4>().0;
        let pointers = pointers.iter().map(|bytes| Item(u32::from_le_bytes(*bytes)));
        self.stored.clear();
        let mut offsets = 0;
        for (index, item) in pointers.clone().enumerate().filter(|(_, item)| item.len() > 0) {
            offsets |= item.offset();
            self.stored.push(Stored::of(index, item));
        }
        if offsets % 8 != 0 {
            return None;
        }
        let occupied = Occupied::of(&shape, &self.stored)?;
        let is_heap = shape.special == PAGE && self.are_tuples(&words);
        let hole = &page[shape.lower..shape.upper];
        let has_hole = hole.iter().any(|&byte| byte != 0);
        self.kinds
            .push(if is_heap { kind::HEAP } else { kind::ITEMS } + if has_hole { kind::HOLE } else { 0 });
        for at in 0..3 {
            self.fixed[at].push(words.get(at));
        }
        for at in 0..shape.special_words() {
            self.fixed[SPECIAL_AT + at].push(words.get(shape.special / 8 + at));
        }
        let mut expected = shape.special;
        self.fixed[POINTERS_AT].extend(pointers.map(|item| match item.len() {
            0 => u64::from(item.0),
            len => {
                let shown = item.with_offset(expected.wrapping_sub(len).wrapping_sub(item.offset()));
                expected = item.offset();
                u64::from(shown.0)
            }
        }));
        match is_heap {
            true => {
                self.tuples(&words);
                put_columns(&mut self.heap[..heap_words], &words, &self.stored);
                self.put_rest(&words, heap_words);
            }
            false => {
                put_columns(&mut self.items[..item_words], &words, &self.stored);
                self.put_rest(&words, item_words);
            }
        }
        for (from, to) in occupied.gaps(&shape) {
            self.rest.extend_from_slice(&page[from * 8..to * 8]);
        }
        if has_hole {
            self.rest.extend_from_slice(hole);
        }
        Some(())
    }

    /// Whether all items can be heap tuples; if so, notes where their bodies begin.
    fn are_tuples(&mut self, words: &Words<'_>) -> bool {
        let is_tuple = |item: &Stored| item.len >= TUPLE as u16 && is_tuple(words.get(item.at() + 2), item.len);
        if !self.stored.iter().all(is_tuple) {
            return false;
        }
        for item in &mut self.stored {
            item.body = body_offset(words.get(item.at() + 2));
        }
        true
    }

    /// Block number and tuple headers.
    fn tuples(&mut self, words: &Words<'_>) {
        let block = own_block(words, &self.stored);
        self.blocks
            .extend_from_slice(&block.wrapping_sub(self.next_block).to_le_bytes());
        self.next_block = block.wrapping_add(1);
        let position = |item: &Stored| own_position(block, item.number);
        let [.., first, second, third, bits] = &mut self.fixed;
        first.extend(self.stored.iter().map(|item| words.get(item.at())));
        second.extend(
            self.stored
                .iter()
                .map(|item| words.get(item.at() + 1) ^ position(item).0),
        );
        third.extend(
            self.stored
                .iter()
                .map(|item| words.get(item.at() + 2) ^ position(item).1),
        );
        let with_bits = self.stored.iter().filter(|item| usize::from(item.body) > TUPLE);
        bits.extend(with_bits.map(|item| words.get(item.at() + TUPLE)));
    }

    /// What columns leave of items.
    fn put_rest(&mut self, words: &Words<'_>, lead: usize) {
        for item in &self.stored {
            if usize::from(item.body) > TUPLE + 1 {
                words.append(item.at() + TUPLE + 1, item.body_at(), &mut self.rest);
            }
            if item.body_len() > lead {
                words.append(item.body_at() + lead, item.end(), &mut self.rest);
            }
        }
    }
}

/// Appends to each column a word of the bodies that have so many.
fn put_columns(columns: &mut [Vec<u64>], words: &Words<'_>, stored: &[Stored]) {
    let bodies = Bodies::of(stored);
    for (number, column) in columns.iter_mut().enumerate().take(bodies.most) {
        if number < bodies.least {
            column.extend(stored.iter().map(|item| words.get(item.body_at() + number)));
            continue;
        }
        // Whatever a shorter one leaves is written over by the next.
        let mut used = column.len();
        column.resize(used + stored.len(), 0);
        for item in stored {
            column[used] = words.get(item.body_at() + number);
            used += usize::from(item.body_len() > number);
        }
        column.truncate(used);
    }
}

/// The words of a page.
struct Words<'a>(&'a [u8; PAGE]);

impl Words<'_> {
    /// Behind the end is the beginning.
    fn get(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0.as_chunks::<8>().0[at % WORDS])
    }

    /// Appends those from `from` on and before `to`, mostly few.
    fn append(&self, from: usize, to: usize, out: &mut Vec<u8>) {
        const FEW: usize = 8;
        let words = &self.0.as_chunks::<8>().0[from..to];
        match words.len() {
            ..=FEW => words.iter().for_each(|word| out.extend_from_slice(word)),
            _ => out.extend_from_slice(words.as_flattened()),
        }
    }
}

/// The block that the first tuple that points to itself says it is in; 0 if there is none.
fn own_block(words: &Words<'_>, stored: &[Stored]) -> u32 {
    let own = |item: &&Stored| words.get(item.at() + 2) as u16 == item.number;
    stored.iter().find(own).map_or(0, |item| {
        let second = words.get(item.at() + 1);
        ((second >> 32) as u32 & 0xffff) << 16 | (second >> 48) as u32
    })
}
