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

/// A chunk of a table whose tuples have NULLs and texts of all lengths, so that no two are alike.
pub fn ragged() -> Vec<u8> {
    let mut numbers = Numbers(3);
    let pages = (0..(CHUNK / PAGE) as u32).map(|block| {
        page(0, |number| {
            let nulls = numbers.next() as u8 & 0b1110;
            let mut tuple = Vec::with_capacity(160);
            tuple.extend((700 + numbers.next() as u32 % 3).to_le_bytes());
            tuple.extend([0; 8]);
            tuple.extend(((block >> 16) as u16).to_le_bytes());
            tuple.extend((block as u16).to_le_bytes());
            tuple.extend(number.to_le_bytes());
            tuple.extend([4, 0, 3, 9, 24, !nulls]);
            tuple.extend((numbers.next() as u32).to_le_bytes());
            for column in 1..4 {
                if nulls & 1 << column == 0 {
                    let len = (numbers.next() % 40) as usize;
                    tuple.push((len as u8 + 1) << 1 | 1);
                    tuple.extend(std::iter::repeat_with(|| b'a' + (numbers.next() % 26) as u8).take(len));
                }
            }
            tuple
        })
    });
    pages.flatten().collect()
}

/// A chunk of a B-tree on texts of all lengths in order.
pub fn names() -> Vec<u8> {
    let mut numbers = Numbers(4);
    let mut id = 0u64;
    let pages = (0..CHUNK / PAGE).map(|_| {
        page(16, |number| {
            id += 1 + numbers.next() % 50;
            let key = format!(
                "customer-{id:09}{}",
                &"-abcdefghijklmnop"[..(numbers.next() % 17) as usize]
            );
            let len = (8 + 1 + key.len()).next_multiple_of(8);
            let mut item = Vec::with_capacity(len);
            item.extend((numbers.next() as u32 % 10_000).to_le_bytes());
            item.extend(number.to_le_bytes());
            item.extend((len as u16 | 0x4000).to_le_bytes());
            item.push((key.len() as u8 + 1) << 1 | 1);
            item.extend(key.bytes());
            item.resize(len, 0);
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

/// Bytes of a run of WAL.
pub const RUN: usize = 4 << 20;
/// Where it begins.
pub const RUN_START: u64 = 1 << 24;

/// A run of WAL: inserts, updates and index entries of a small load, commits, and a few images of pages.
pub fn wal() -> Vec<u8> {
    let (mut numbers, mut out, mut previous, mut xid) = (Numbers(2), Vec::with_capacity(RUN), RUN_START, 1000u32);
    let pages = heap();
    let relation = [127u8, 6, 0, 0, 5, 0, 0, 0, 2, 64, 0, 0];
    for number in 0u32.. {
        let (block, offset) = (number / 60, (number % 60) as u16);
        let data = |len: usize| [&[0, 0x20, len as u8, 0][..], &relation, &block.to_le_bytes()].concat();
        let (rmid, info, body) = match (number % 5, number % 500) {
            (_, 499) => {
                let page = &pages[(number as usize / 500 % 64) * PAGE..][..PAGE];
                let (lower, upper) = (page[12..14].to_vec(), u16::from_le_bytes([page[14], page[15]]) as usize);
                let end = u16::from_le_bytes([lower[0], lower[1]]) as usize;
                let len = (PAGE - (upper - end)) as u16;
                let head = [&[0, 0x10, 0, 0][..], &len.to_le_bytes(), &lower, &[3]].concat();
                (
                    0,
                    0xB0,
                    [&head[..], &relation, &block.to_le_bytes(), &page[..end], &page[upper..]].concat(),
                )
            }
            (0, _) => {
                xid += 1;
                let time = 800_000_000_000_000 + u64::from(number) * 20_000 + numbers.next() % 9000;
                (1, 0, [&[255, 8][..], &time.to_le_bytes()].concat())
            }
            (1 | 2, _) => {
                let text = format!("\x1drow {number} {:x}", numbers.next());
                let tuple = [&[5, 0, 2, 9, 24][..], &u64::from(number).to_le_bytes(), text.as_bytes()].concat();
                let main = [&offset.to_le_bytes()[..], &[8]].concat();
                (10, 0, [&data(tuple.len())[..], &[255, 3], &tuple, &main].concat())
            }
            (3, _) => {
                let main = [
                    &xid.to_le_bytes()[..],
                    &offset.to_le_bytes(),
                    &[0, 32],
                    &[0; 4],
                    &[61, 0],
                ]
                .concat();
                let tuple = [
                    &[4, 0, 0x10, 40, 24][..],
                    &(numbers.next() as u32).to_le_bytes(),
                    &[7; 12],
                ]
                .concat();
                (10, 0x40, [&data(tuple.len())[..], &[255, 14], &tuple, &main].concat())
            }
            _ => {
                let item = [
                    &block.to_le_bytes()[..],
                    &offset.to_le_bytes(),
                    &[16, 0],
                    &numbers.next().to_le_bytes(),
                ]
                .concat();
                (
                    11,
                    0,
                    [&data(item.len())[..], &[255, 2], &item, &offset.to_le_bytes()].concat(),
                )
            }
        };
        if out.len() + body.len() + 3 * 40 > RUN {
            break;
        }
        begin_page(&mut out, 0);
        let lsn = RUN_START + out.len() as u64;
        let head = [
            &(24 + body.len() as u32).to_le_bytes()[..],
            &xid.to_le_bytes(),
            &previous.to_le_bytes(),
        ]
        .concat();
        let head = [&head[..], &[info, rmid, 0, 0]].concat();
        let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &head);
        let record = [&head[..], &crc.to_le_bytes(), &body].concat();
        let mut left = &record[..];
        while !left.is_empty() {
            begin_page(&mut out, left.len());
            let (here, behind) = left.split_at(left.len().min(PAGE - out.len() % PAGE));
            out.extend(here);
            left = behind;
        }
        out.resize(out.len().next_multiple_of(8), 0);
        previous = lsn;
    }
    out.resize(RUN, 0);
    out
}

fn begin_page(out: &mut Vec<u8>, remaining: usize) {
    if out.len().is_multiple_of(PAGE) {
        let lsn = RUN_START + out.len() as u64;
        out.extend([0x10, 0xD1, 4 | u8::from(remaining > 0), 0, 1, 0, 0, 0]);
        out.extend(lsn.to_le_bytes());
        out.extend((remaining as u64).to_le_bytes());
    }
}
