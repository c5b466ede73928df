//! What was taken apart comes back, whatever it was; what claims to have been taken apart is not believed.

use super::*;

fn plan(heap_words: usize, item_words: usize) -> Plan {
    Plan {
        heap_words,
        item_words,
        masks: Masks::default(),
    }
}

fn decode(transformed: &[u8], plain_len: usize, what: &str) -> crate::error::Result<Vec<u8>> {
    // What is in the buffer must not matter.
    let mut out = vec![0xee; plain_len];
    Decoder::default().decode(transformed, &mut out, what).map(|()| out)
}

/// Numbers that look random, always the same.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// A page with tuples of different sizes, special area, a hole, and whatever else pages have.
fn page(numbers: &mut Numbers, block: u32, is_heap: bool) -> Vec<u8> {
    let mut page = vec![0u8; PAGE];
    let special = if is_heap {
        PAGE
    } else {
        PAGE - 8 * numbers.below(4) as usize
    };
    let mut upper = special;
    let mut lower = HEADER;
    let count = numbers.below(180) as usize;
    for number in 1..=count {
        let largest = if numbers.below(8) == 0 { 900 } else { 60 };
        let len = 24 + numbers.below(largest) as usize;
        let aligned = len.next_multiple_of(8);
        if lower + 4 + aligned > upper {
            break;
        }
        let flags = numbers.below(10);
        let (offset, stored) = match flags {
            0 => (numbers.below(200) as usize, 0),
            _ => {
                upper -= aligned;
                (upper, len)
            }
        };
        let pointer = offset as u32 | (flags.min(1) as u32) << 15 | (stored as u32) << 17;
        page[lower..lower + 4].copy_from_slice(&pointer.to_le_bytes());
        lower += 4;
        if stored == 0 {
            continue;
        }
        for byte in &mut page[offset..offset + len] {
            *byte = numbers.below(7) as u8;
        }
        if is_heap {
            let body = if len > 40 && numbers.below(3) == 0 { 32 } else { 24 };
            page[offset + 22] = body;
            page[offset + 12..offset + 14].copy_from_slice(&((block >> 16) as u16).to_le_bytes());
            page[offset + 14..offset + 16].copy_from_slice(&(block as u16).to_le_bytes());
            page[offset + 16..offset + 18].copy_from_slice(&(number as u16).to_le_bytes());
        }
    }
    // A gap between the hole and the items now and then, and something left in the hole.
    if numbers.below(4) == 0 && lower + 64 < upper {
        upper -= 16;
        page[upper] = 9;
    }
    if numbers.below(4) == 0 && lower < upper {
        page[lower + (upper - lower) / 2] = 5;
    }
    for byte in &mut page[special..] {
        *byte = numbers.below(256) as u8;
    }
    for (at, value) in [(12, lower), (14, upper), (16, special), (18, PAGE | 4)] {
        page[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
    page
}

/// A page full of items of one size, as indexes have them; `mixed` puts them in any order.
fn page_of_one_size(numbers: &mut Numbers, len: usize, mixed: bool) -> Vec<u8> {
    let mut page = vec![0u8; PAGE];
    let special = PAGE - 16;
    let count = (special - HEADER) / (len + 4);
    let mut places: Vec<usize> = (1..=count).map(|place| special - place * len).collect();
    if mixed {
        for at in (1..count).rev() {
            places.swap(at, numbers.below(at as u64 + 1) as usize);
        }
    }
    for (pointer, &place) in page[HEADER..].as_chunks_mut::<4>().0.iter_mut().zip(&places) {
        *pointer = (place as u32 | 1 << 15 | (len as u32) << 17).to_le_bytes();
    }
    let upper = special - count * len;
    page[upper..].fill_with(|| numbers.below(256) as u8);
    for (at, value) in [(12, HEADER + 4 * count), (14, upper), (16, special), (18, PAGE | 4)] {
        page[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
    page
}

fn comes_back(plain: &[u8], plan: &Plan) -> usize {
    let mut out = Vec::new();
    let taken = Encoder::default().encode(plain, plan, &mut out);
    assert!(out.len() <= plain.len() + overhead(plain.len()));
    assert_eq!(decode(&out, plain.len(), "a chunk").unwrap(), plain);
    taken
}

#[test]
fn pages_of_all_kinds_come_back() {
    let mut numbers = Numbers(1);
    for round in 0..200 {
        let mut plain = Vec::new();
        for block in 0..numbers.below(9) as u32 {
            match numbers.below(6) {
                0 => plain.extend(vec![0; PAGE]),
                1 => plain.extend((0..PAGE).map(|_| numbers.below(256) as u8)),
                n => plain.extend(page(&mut numbers, 70_000 + block, n > 3)),
            }
        }
        plain.extend((0..numbers.below(3) * 100).map(|i| i as u8));
        let proposed = Encoder::default().propose(&plain, round % 17, (round / 3) % 17);
        comes_back(&plain, &proposed);
        comes_back(&plain, &plan(round % 5, round % 3));
    }
}

#[test]
fn real_shapes_are_taken_apart() {
    let mut numbers = Numbers(2);
    let plain: Vec<u8> = (0..32)
        .flat_map(|block| page(&mut numbers, block, block % 2 == 0))
        .collect();
    assert_eq!(comes_back(&plain, &plan(4, 4)), 32);
}

#[test]
fn items_of_one_size_come_back_in_any_order() {
    let mut numbers = Numbers(5);
    for len in [8, 16, 24, 40, 104, 256] {
        let pages = (0..6).flat_map(|number| page_of_one_size(&mut numbers, len, number % 2 == 0));
        let plain: Vec<u8> = pages.collect();
        for words in 0..LEAD_WORDS {
            assert_eq!(comes_back(&plain, &plan(words, words)), 6);
        }
    }
}

#[test]
fn pages_with_something_wrong_come_back() {
    let mut numbers = Numbers(3);
    for _ in 0..3000 {
        let is_heap = numbers.below(2) == 0;
        let mut plain = page(&mut numbers, 5, is_heap);
        for _ in 0..=numbers.below(3) {
            // Mostly where the layout is.
            let most = if numbers.below(4) == 0 { PAGE as u64 } else { 200 };
            let at = numbers.below(most) as usize;
            plain[at] = numbers.below(256) as u8;
        }
        comes_back(&plain, &plan(2, 3));
    }
}

#[test]
fn a_hostile_input_is_an_error() {
    let mut numbers = Numbers(4);
    let plain: Vec<u8> = (0..4)
        .flat_map(|block| page(&mut numbers, block, block % 2 == 0))
        .collect();
    let mut good = Vec::new();
    Encoder::default().encode(&plain, &plan(3, 2), &mut good);
    for len in 0..good.len() {
        assert!(decode(&good[..len], plain.len(), "x").is_err(), "{len}");
    }
    let mut long = good.clone();
    long.push(0);
    assert!(decode(&long, plain.len(), "x").is_err());
    for _ in 0..20_000 {
        let mut bad = good.clone();
        for _ in 0..=numbers.below(4) {
            let at = numbers.below(bad.len() as u64) as usize;
            bad[at] = numbers.below(256) as u8;
        }
        if let Ok(other) = decode(&bad, plain.len(), "x") {
            assert_eq!(other.len(), plain.len());
        }
    }
}
