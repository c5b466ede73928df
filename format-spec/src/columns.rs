//! What the transforms of codecs 2 and 3 share: columns of words, stored as planes of bytes, a plane as it is or as
//! differences to the byte before; which of the two is smaller; and reading what was transformed.
//!
//! What always holds: whatever is missing from an input is damage, before anything is allocated for it.

use crate::error::{FormatError, Result};

/// Reads from front to back.
pub struct Input<'a> {
    bytes: &'a [u8],
    what: &'a str,
    problem: &'static str,
}

impl<'a> Input<'a> {
    /// `what` is the object, `problem` what cannot be done if the input is damaged.
    pub fn new(bytes: &'a [u8], what: &'a str, problem: &'static str) -> Self {
        Self { bytes, what, problem }
    }

    /// What to say of damage.
    pub fn damaged(&self, why: &str) -> FormatError {
        FormatError::damaged(self.what, format!("{}: {why}", self.problem))
    }

    /// The next bytes.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, left) = self
            .bytes
            .split_at_checked(count)
            .ok_or_else(|| self.damaged("it is too short"))?;
        self.bytes = left;
        Ok(taken)
    }

    /// Fails if anything is left.
    pub fn end(&self) -> Result<()> {
        match self.bytes.is_empty() {
            true => Ok(()),
            false => Err(self.damaged("there is something behind its end")),
        }
    }
}

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

/// Whether one word differs; without branches, and without calling `memcmp`.
fn differ(a: &[u64; 8], b: &[u64; 8]) -> bool {
    a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) != 0
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
    // What repeats, and most of what headers hold does, is transposed once.
    let (mut last, mut rows) = ([0; 8], [0; 8]);
    for (number, eight) in eights.iter().enumerate() {
        let mut changed = *eight;
        if mask != 0 {
            for word in &mut changed {
                *word = change(*word);
            }
        }
        if differ(&changed, &last) {
            (last, rows) = (changed, transpose(changed));
        }
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
        before = add(before, word & mask);
        before | word & !mask
    };
    // As in `write`.
    let (mut last, mut eight) = ([0; 8], [0; 8]);
    let mut of_planes: [&[[u8; 8]]; 8] = Default::default();
    for (plane, eights) in of_planes.iter_mut().enumerate().take(planes) {
        *eights = stored[plane * count..][..count].as_chunks().0;
    }
    for number in 0..count / 8 {
        let rows = of_planes.map(|eights| eights.get(number).map_or(0, |eight| u64::from_le_bytes(*eight)));
        if differ(&rows, &last) {
            (last, eight) = (rows, transpose(rows));
        }
        let mut changed = eight;
        if mask != 0 {
            for word in &mut changed {
                *word = change(*word);
            }
        }
        words.extend_from_slice(&changed);
    }
    for number in count / 8 * 8..count {
        let mut bytes = [0; 8];
        for plane in 0..planes {
            bytes[plane] = stored[plane * count + number];
        }
        words.push(change(u64::from_le_bytes(bytes)));
    }
}

/// Words of a column that are looked at.
pub const SAMPLE: usize = 512;
/// A column of fewer words says nothing.
const FEW: usize = 16;

/// For each plane of a column: do differences have less entropy?
pub fn propose(column: &[u64]) -> u8 {
    let sample = &column[..column.len().min(SAMPLE)];
    if sample.len() < FEW {
        return 0;
    }
    let varies = sample.iter().fold(0, |all, word| all | (word ^ sample[0]));
    let mut mask = 0;
    for plane in 0..8 {
        if (varies >> (8 * plane)) as u8 == 0 {
            continue;
        }
        if differences_pay(sample.iter().map(|word| (word >> (8 * plane)) as u8)) {
            mask |= 1 << plane;
        }
    }
    mask
}

/// Whether differences of these bytes, at most [`SAMPLE`], have less entropy than the bytes.
pub fn differences_pay(sample: impl Iterator<Item = u8>) -> bool {
    let (mut plain, mut difference) = (Counts::new(), Counts::new());
    let (mut before, mut count) = (0u8, 0);
    for byte in sample.take(SAMPLE) {
        plain.add(byte);
        difference.add(byte.wrapping_sub(before));
        before = byte;
        count += 1;
    }
    difference.entropy(count) < plain.entropy(count) * 0.95
}

/// How often each byte occurs.
struct Counts([u16; 256]);

impl Counts {
    fn new() -> Self {
        Self([0; 256])
    }

    fn add(&mut self, byte: u8) {
        self.0[usize::from(byte)] += 1;
    }

    /// Bits that an ideal coder of order 0 needs for `total` bytes.
    fn entropy(&self, total: usize) -> f32 {
        let terms = weights();
        let used: f32 = self.0.iter().map(|&count| terms[usize::from(count)]).sum();
        terms[total] - used
    }
}

/// n × log2(n), for every count in a sample.
fn weights() -> &'static [f32; SAMPLE + 1] {
    static WEIGHTS: std::sync::OnceLock<[f32; SAMPLE + 1]> = std::sync::OnceLock::new();
    WEIGHTS.get_or_init(|| {
        std::array::from_fn(|n| match n {
            0 => 0.0,
            n => n as f32 * (n as f32).log2(),
        })
    })
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
