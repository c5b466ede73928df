//! Frames of pages that were taken apart.

use super::*;

/// A page with these items.
pub fn page(items: &[&[u8]], special: usize) -> Vec<u8> {
    let mut page = vec![0u8; 8192];
    let mut upper = 8192 - special;
    for (number, item) in items.iter().enumerate() {
        upper -= item.len().next_multiple_of(8);
        page[upper..upper + item.len()].copy_from_slice(item);
        let pointer = upper as u32 | 1 << 15 | (item.len() as u32) << 17;
        page[24 + 4 * number..28 + 4 * number].copy_from_slice(&pointer.to_le_bytes());
    }
    let lower = 24 + 4 * items.len();
    for (at, value) in [(0, 7), (12, lower), (14, upper), (16, 8192 - special), (18, 8196)] {
        page[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
    page[8192 - special..].fill(3);
    page
}

/// A heap tuple of block 9 at line pointer `number`.
pub fn tuple(number: u8, offset: u8, body: &[u8]) -> Vec<u8> {
    let mut tuple = vec![
        number, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, number, 0, 3, 0, 1, 8, offset,
    ];
    tuple.resize(offset.into(), 0x55);
    tuple.extend(body);
    tuple
}

/// Pages of every kind, and a tail.
fn pages_chunk() -> Vec<u8> {
    let tuples = [
        tuple(1, 24, b"twelve bytes"),
        tuple(2, 32, b"with a null bitmap, and longer than what becomes columns"),
        tuple(3, 24, b""),
        tuple(4, 48, b"a bitmap of several words"),
    ];
    let tuples: Vec<&[u8]> = tuples.iter().map(Vec::as_slice).collect();
    let mut chunk = page(&tuples, 0);
    let mut left = page(&tuples[..2], 0);
    left[4000] = 1;
    chunk.extend(left);
    chunk.extend(page(
        &[
            b"\0\0\x01\0\x02\0\x10\0keyvalue",
            b"\0\0\x01\0\x03\0\x10\0keyvaluf",
            b"short",
        ],
        16,
    ));
    chunk.extend([0; 8192]);
    chunk.extend((0..8192u32).map(|i| (i * i % 251) as u8));
    chunk.extend(b"a tail");
    chunk
}

#[test]
fn pages() {
    let (keys, chunk) = (epoch_keys(), pages_chunk());
    let header = ObjectHeader::new(Kind::Pack, 1, [18; 32]);
    let key = FrameKey::new(&keys, &SCOPE, &header).unwrap();
    let plan = Encoder::default().propose(&chunk, 2, 1);
    let (mut transformed, mut frame) = (Vec::new(), vec![0; FRAME_HEADER_LEN]);
    assert_eq!(Encoder::default().encode(&chunk, &plan, &mut transformed), 3);
    frame.extend(zstd::bulk::compress(&transformed, 1).unwrap());
    key.seal(0, codec::PAGES, chunk.len() as u32, &mut frame);
    let stored = vector("frame-pages", &frame);
    assert_eq!(key.open(0, &stored, "vector").unwrap(), chunk);
}

/// Pages with so many items that columns are kept as planes, with differences: heap pages, and index pages one of which
/// has something in its hole.
fn many_pages_chunk() -> Vec<u8> {
    let mut chunk = Vec::new();
    let mut row = 0u64;
    for _ in 0..4 {
        let tuples: Vec<Vec<u8>> = (1..=60u8)
            .map(|number| {
                row += 1;
                let body = [row, row * row % 1009, 7_000_000 * row].map(u64::to_le_bytes).concat();
                tuple(
                    number,
                    24,
                    &[&body[..], &b"texts of some length"[..row as usize % 20]].concat(),
                )
            })
            .collect();
        chunk.extend(page(&tuples.iter().map(Vec::as_slice).collect::<Vec<_>>(), 0));
    }
    for number in 0..3 {
        let items: Vec<[u8; 16]> = (0..100u64)
            .map(|item| {
                let mut bytes = *b"\0\0\x01\0\x02\0\x10\0keyvalue";
                bytes[8..].copy_from_slice(&(number * 100 + item * 3).to_le_bytes());
                bytes
            })
            .collect();
        let mut page = page(&items.iter().map(<[u8; 16]>::as_slice).collect::<Vec<_>>(), 16);
        page[3000] = number as u8;
        chunk.extend(page);
    }
    chunk
}

#[test]
fn pages_of_many_items() {
    let (keys, chunk) = (epoch_keys(), many_pages_chunk());
    let header = ObjectHeader::new(Kind::Pack, 1, [30; 32]);
    let key = FrameKey::new(&keys, &SCOPE, &header).unwrap();
    let plan = Encoder::default().propose(&chunk, 4, 2);
    let masks = &plan.masks;
    for (which, masks) in [
        ("fixed", &masks.fixed[..]),
        ("heap", &masks.heap),
        ("items", &masks.items),
    ] {
        assert!(masks.iter().any(|&mask| mask != 0), "no differences in {which}");
    }
    let (mut transformed, mut frame) = (Vec::new(), vec![0; FRAME_HEADER_LEN]);
    assert_eq!(Encoder::default().encode(&chunk, &plan, &mut transformed), 7);
    assert!(transformed.len() < chunk.len());
    frame.extend(zstd::bulk::compress(&transformed, 1).unwrap());
    key.seal(0, codec::PAGES, chunk.len() as u32, &mut frame);
    let stored = vector("frame-pages-many", &frame);
    assert_eq!(key.open(0, &stored, "vector").unwrap(), chunk);
}
