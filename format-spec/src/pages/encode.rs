//! Pages into columns.

use super::{
    FIXED, HEADER, Item, LAYOUT, LEAD_WORDS, MASKS, Occupied, PAGE, SPECIAL, Shape, TUPLE, WORDS, body_offset,
    is_tuple, kind, own_position,
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
}

/// Positions of the fixed columns.
const SPECIAL_AT: usize = 3;
const POINTERS_AT: usize = SPECIAL_AT + SPECIAL / 8;
const TUPLE_AT: usize = POINTERS_AT + 1;
const BITS_AT: usize = TUPLE_AT + TUPLE;

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
        let word = |at: usize| u64::from_le_bytes(page.as_chunks::<8>().0[at % WORDS]);
        let shape = Shape::of([word(0), word(1), word(2)])?;
        let mut occupied = Occupied::new();
        let pointers = page[HEADER..shape.lower].as_chunks::<4>().0;
        let pointers = pointers.iter().map(|bytes| Item(u32::from_le_bytes(*bytes)));
        let mut is_heap = shape.special == PAGE;
        for item in pointers.clone().filter(|item| item.len() > 0) {
            occupied.take(&shape, item)?;
            is_heap &= item.len() >= 8 * TUPLE && is_tuple(word(item.offset() / 8 + 2), item.len());
        }
        let hole = &page[shape.lower..shape.upper];
        let has_hole = hole.iter().any(|&byte| byte != 0);
        self.kinds
            .push(if is_heap { kind::HEAP } else { kind::ITEMS } + if has_hole { kind::HOLE } else { 0 });
        for at in 0..3 {
            self.fixed[at].push(word(at));
        }
        for at in 0..shape.special_words() {
            self.fixed[SPECIAL_AT + at].push(word(shape.special / 8 + at));
        }
        let mut expected = shape.special;
        for item in pointers.clone() {
            let shown = match item.len() {
                0 => item,
                len => {
                    let shown = item.with_offset(expected.wrapping_sub(len).wrapping_sub(item.offset()));
                    expected = item.offset();
                    shown
                }
            };
            self.fixed[POINTERS_AT].push(u64::from(shown.0));
        }
        let stored = pointers.enumerate().filter(|(_, item)| item.len() > 0);
        match is_heap {
            true => self.tuples(page, stored, heap_words),
            false => {
                for (_, item) in stored {
                    self.item(page, item, item_words);
                }
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

    fn item(&mut self, page: &[u8; PAGE], item: Item, lead: usize) {
        let bytes = &page[item.offset()..item.offset() + item.len()];
        let words = bytes.as_chunks::<8>().0;
        for (column, word) in self.items.iter_mut().zip(words).take(lead) {
            column.push(u64::from_le_bytes(*word));
        }
        self.rest.extend_from_slice(bytes.get(lead * 8..).unwrap_or_default());
    }

    fn tuples(&mut self, page: &[u8; PAGE], stored: impl Iterator<Item = (usize, Item)> + Clone, lead: usize) {
        let block = own_block(page, stored.clone());
        self.blocks
            .extend_from_slice(&block.wrapping_sub(self.next_block).to_le_bytes());
        self.next_block = block.wrapping_add(1);
        for (number, item) in stored {
            let bytes = &page[item.offset()..item.offset() + item.len()];
            let words = bytes.as_chunks::<8>().0;
            let word = |at: usize| words.get(at).map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let (high, low) = own_position(block, number + 1);
            self.fixed[TUPLE_AT].push(word(0));
            self.fixed[TUPLE_AT + 1].push(word(1) ^ high);
            self.fixed[TUPLE_AT + 2].push(word(2) ^ low);
            let body = body_offset(word(2));
            if body > TUPLE {
                self.fixed[BITS_AT].push(word(TUPLE));
                self.rest
                    .extend_from_slice(bytes.get(8 * (TUPLE + 1)..8 * body).unwrap_or_default());
            }
            let columns = words.get(body..).unwrap_or_default();
            for (column, word) in self.heap.iter_mut().zip(columns).take(lead) {
                column.push(u64::from_le_bytes(*word));
            }
            self.rest
                .extend_from_slice(bytes.get(8 * (body + lead)..).unwrap_or_default());
        }
    }
}

/// The block that the first tuple that points to itself says it is in; 0 if there is none.
fn own_block(page: &[u8; PAGE], stored: impl Iterator<Item = (usize, Item)>) -> u32 {
    for (number, item) in stored {
        let Some(ctid) = page[item.offset()..].get(12..18) else {
            break;
        };
        if u16::from_le_bytes([ctid[4], ctid[5]]) as usize == number + 1 {
            return u32::from(u16::from_le_bytes([ctid[0], ctid[1]])) << 16
                | u32::from(u16::from_le_bytes([ctid[2], ctid[3]]));
        }
    }
    0
}
