//! Columns of words, stored as eight planes of bytes each; a plane may hold differences to the byte before.

const HIGH: u64 = 0x8080_8080_8080_8080;

/// Bytewise a − b.
fn sub(a: u64, b: u64) -> u64 {
    ((a | HIGH) - (b & !HIGH)) ^ ((a ^ !b) & HIGH)
}

/// Bytewise a + b.
fn add(a: u64, b: u64) -> u64 {
    ((a & !HIGH) + (b & !HIGH)) ^ ((a ^ b) & HIGH)
}

/// The bits of a mask, as bytes of ones and zeros.
fn spread(mask: u8) -> u64 {
    (0..8).fold(0, |all, bit| all | (u64::from(mask >> bit & 1) * 0xff) << (8 * bit))
}

/// Byte j of word i becomes byte i of word j.
fn transpose(mut x: [u64; 8]) -> [u64; 8] {
    let mut swap = |a: usize, b: usize, shift: u32, mask: u64| {
        let t = ((x[a] >> shift) ^ x[b]) & mask;
        x[b] ^= t;
        x[a] ^= t << shift;
    };
    for i in 0..4 {
        swap(i, i + 4, 32, 0x0000_0000_ffff_ffff);
    }
    for i in [0, 1, 4, 5] {
        swap(i, i + 2, 16, 0x0000_ffff_0000_ffff);
    }
    for i in [0, 2, 4, 6] {
        swap(i, i + 1, 8, 0x00ff_00ff_00ff_00ff);
    }
    x
}

/// Appends the planes of a column: `planes` lowest bytes of each word, those in `mask` as differences.
pub fn write(words: &[u64], planes: usize, mask: u8, out: &mut Vec<u8>) {
    let (base, count, mask) = (out.len(), words.len(), spread(mask));
    out.resize(base + planes * count, 0);
    let out = &mut out[base..];
    let mut before = 0;
    let mut change = |word: u64| {
        let difference = sub(word, before);
        before = word;
        word & !mask | difference & mask
    };
    let (eights, rest) = words.as_chunks::<8>();
    for (number, eight) in eights.iter().enumerate() {
        let rows = transpose(eight.map(&mut change));
        for (plane, row) in rows.iter().enumerate().take(planes) {
            let at = plane * count + number * 8;
            out[at..at + 8].copy_from_slice(&row.to_le_bytes());
        }
    }
    let done = eights.len() * 8;
    for (number, &word) in rest.iter().enumerate() {
        let bytes = change(word).to_le_bytes();
        for plane in 0..planes {
            out[plane * count + done + number] = bytes[plane];
        }
    }
}

/// Reads a column that [`write`] has written: `stored` is its `planes` planes. Replaces what is in `words`.
pub fn read(stored: &[u8], planes: usize, mask: u8, words: &mut Vec<u64>) {
    let (count, mask) = (stored.len() / planes, spread(mask));
    words.clear();
    words.reserve(count);
    let mut before = 0;
    let mut change = |word: u64| {
        before = word & !mask | add(word, before) & mask;
        before
    };
    for number in 0..count / 8 {
        let mut rows = [0; 8];
        for (plane, row) in rows.iter_mut().enumerate().take(planes) {
            let at = plane * count + number * 8;
            *row = stored[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        }
        words.extend(transpose(rows).map(&mut change));
    }
    for number in count / 8 * 8..count {
        let mut bytes = [0; 8];
        for plane in 0..planes {
            bytes[plane] = stored[plane * count + number];
        }
        words.push(change(u64::from_le_bytes(bytes)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_come_back() {
        for count in [0, 1, 7, 8, 9, 64, 100] {
            for mask in [0, 0xff, 0b1010_0110] {
                for planes in [4, 8] {
                    let limit = u64::MAX >> (64 - 8 * planes);
                    let words: Vec<u64> = (0..count)
                        .map(|i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(i as u32 * 7) & limit)
                        .collect();
                    let mut out = vec![7];
                    write(&words, planes, mask, &mut out);
                    assert_eq!(out.len(), 1 + planes * words.len());
                    let mut back = Vec::new();
                    read(&out[1..], planes, mask, &mut back);
                    assert_eq!(back, words);
                }
            }
        }
    }
}
