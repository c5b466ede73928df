//! What the micro benchmarks work on: pages as PostgreSQL writes them, always the same.

/// Bytes of a chunk.
pub const CHUNK: usize = 512 << 10;
const PAGE: usize = 8192;

/// Numbers that look random.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.0 >> 33
    }
}

/// A page of `special` bytes at its end, filled with items.
fn page(special: usize, mut item: impl FnMut(u16) -> Vec<u8>) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    let (mut lower, mut upper) = (24, PAGE - special);
    for number in 1.. {
        let bytes = item(number);
        let aligned = bytes.len().next_multiple_of(8);
        if lower + 4 + aligned > upper {
            break;
        }
        upper -= aligned;
        page[upper..upper + bytes.len()].copy_from_slice(&bytes);
        let pointer = upper as u32 | 1 << 15 | (bytes.len() as u32) << 17;
        page[lower..lower + 4].copy_from_slice(&pointer.to_le_bytes());
        lower += 4;
    }
    for (at, value) in [(12, lower), (14, upper), (16, PAGE - special), (18, PAGE | 4)] {
        page[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
    page
}

/// A chunk of a table: bigint, timestamptz, int, a short text, and 16 random bytes.
pub fn heap() -> Vec<u8> {
    let mut numbers = Numbers(1);
    let mut id = 0u64;
    let pages = (0..(CHUNK / PAGE) as u32).map(|block| {
        page(0, |number| {
            id += 1;
            let mut tuple = Vec::with_capacity(80);
            tuple.extend(700u32.to_le_bytes());
            tuple.extend([0; 8]);
            tuple.extend(((block >> 16) as u16).to_le_bytes());
            tuple.extend((block as u16).to_le_bytes());
            tuple.extend(number.to_le_bytes());
            tuple.extend([5, 0, 2, 9, 24, 0]);
            tuple.extend(id.to_le_bytes());
            tuple.extend((id * 7_000_000 + numbers.next() % 3_000_000).to_le_bytes());
            tuple.extend(((numbers.next() % 50_000) as u32).to_le_bytes());
            tuple.extend(
                [["\x0dlogin", "\x0dorder", "\x0bview "][(numbers.next() % 3) as usize]]
                    .concat()
                    .bytes(),
            );
            tuple.extend(numbers.next().to_le_bytes());
            tuple.extend(numbers.next().to_le_bytes());
            tuple
        })
    });
    pages.flatten().collect()
}

/// A chunk of a B-tree on a bigint in order.
pub fn index() -> Vec<u8> {
    let mut id = 0u64;
    let pages = (0..CHUNK / PAGE).map(|_| {
        page(16, |number| {
            id += 1;
            let mut item = Vec::with_capacity(16);
            item.extend(((id / 60) as u32).to_le_bytes());
            item.extend(number.to_le_bytes());
            item.extend([16, 0]);
            item.extend(id.to_le_bytes());
            item
        })
    });
    pages.flatten().collect()
}

/// A chunk of a text.
pub fn text() -> Vec<u8> {
    (0u64..)
        .flat_map(|i| format!("row {i} {:x};", i.wrapping_mul(0x9E37_79B9_7F4A_7C15)).into_bytes())
        .take(CHUNK)
        .collect()
}
