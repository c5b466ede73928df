//! How a chunk is compressed: raw, zstd, or pages taken apart before zstd, chosen by what a sample comes to.
//!
//! What always holds: what was chosen is recorded in the frame; a wrong choice costs bytes, nothing else.

mod choose;

use fairvault_format::frame::FRAME_HEADER_LEN;
use fairvault_format::keys::TAG_LEN;
use fairvault_format::object::codec;
use fairvault_format::pages::{Encoder, PAGE};
use zstd::bulk::Compressor;
use zstd::zstd_safe::compress_bound;

use crate::error::{Error, Result};
use choose::Choice;

/// Chunks of a file after which its sample is taken anew.
const CHUNKS_PER_SAMPLE: u32 = 16;

/// What a chunk is likely to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Pages of a relation. Chunks of one file, which has this number, are likely to be alike.
    Pages {
        /// File.
        file: u32,
    },
    /// Anything else.
    Other,
}

/// Compresses chunks; one for each worker.
pub struct Codec {
    zstd: Compressor<'static>,
    encoder: Encoder,
    transformed: Vec<u8>,
    packed: Vec<u8>,
    last: Option<Last>,
}

/// What was chosen last.
struct Last {
    file: u32,
    choice: Choice,
    chunks: u32,
}

impl Codec {
    /// With a zstd level.
    pub fn new(level: i32) -> Result<Self> {
        Ok(Self {
            zstd: Compressor::new(level).map_err(|e| Error::failed("zstd cannot be set up").caused_by(e))?,
            encoder: Encoder::default(),
            transformed: Vec::new(),
            packed: Vec::new(),
            last: None,
        })
    }

    /// Encodes a chunk, with room for the frame header in front and for a tag behind. Returns the codec's number.
    pub fn encode(&mut self, plain: &[u8], content: Content) -> (u8, Vec<u8>) {
        let choice = match content {
            Content::Pages { file } if plain.len() >= PAGE => self.choice(file, plain),
            _ => Choice::Plain,
        };
        let (number, input) = match choice {
            Choice::Plain => (codec::ZSTD, plain),
            Choice::Pages(plan) => {
                self.transformed.clear();
                match self.encoder.encode(plain, &plan, &mut self.transformed) {
                    0 => (codec::ZSTD, plain),
                    _ => (codec::PAGES, &self.transformed[..]),
                }
            }
        };
        let mut pack = |number, input: &[u8]| {
            self.packed.resize(compress_bound(input.len()), 0);
            match self.zstd.compress_to_buffer(input, &mut self.packed[..]) {
                Ok(len) if len < plain.len() => Some((number, frame(&self.packed[..len]))),
                _ => None,
            }
        };
        let mut packed = pack(number, input);
        if packed.is_none() && number == codec::PAGES {
            // What was chosen for other chunks of the file is nothing for this one.
            packed = pack(codec::ZSTD, plain);
        }
        packed.unwrap_or_else(|| (codec::RAW, frame(plain)))
    }

    fn choice(&mut self, file: u32, plain: &[u8]) -> Choice {
        if let Some(last) = self
            .last
            .as_mut()
            .filter(|last| last.file == file && last.chunks < CHUNKS_PER_SAMPLE)
        {
            last.chunks += 1;
            return last.choice;
        }
        let choice = choose::choose(&mut self.zstd, &mut self.encoder, plain);
        let chunks = 1;
        self.last = Some(Last { file, choice, chunks });
        choice
    }
}

/// A fresh buffer of the right size: packs live until they are stored.
fn frame(content: &[u8]) -> Vec<u8> {
    let mut buffer = Vec::with_capacity(FRAME_HEADER_LEN + content.len() + TAG_LEN);
    buffer.resize(FRAME_HEADER_LEN, 0);
    buffer.extend_from_slice(content);
    buffer
}

#[cfg(test)]
mod tests {
    use fairvault_format::frame::decode_chunk;

    use super::*;

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

        fn bytes(&mut self, len: usize) -> Vec<u8> {
            (0..len).map(|_| self.below(256) as u8).collect()
        }
    }

    /// A page of heap tuples with such bodies.
    fn page(block: u32, mut body: impl FnMut() -> [u8; 32]) -> Vec<u8> {
        const TUPLE: usize = 24 + 32;
        let mut page = vec![0; PAGE];
        let count = (PAGE - 24) / (4 + TUPLE);
        for number in 1..=count {
            let at = PAGE - number * TUPLE;
            let tuple = &mut page[at..at + TUPLE];
            tuple[..4].copy_from_slice(&700u32.to_le_bytes());
            tuple[12..14].copy_from_slice(&((block >> 16) as u16).to_le_bytes());
            tuple[14..16].copy_from_slice(&(block as u16).to_le_bytes());
            tuple[16..18].copy_from_slice(&(number as u16).to_le_bytes());
            tuple[22] = 24;
            tuple[24..].copy_from_slice(&body());
            let pointer = at as u32 | 1 << 15 | (TUPLE as u32) << 17;
            let place = 24 + (number - 1) * 4;
            page[place..place + 4].copy_from_slice(&pointer.to_le_bytes());
        }
        let (lower, upper) = (24 + count * 4, PAGE - count * TUPLE);
        for (at, value) in [(12, lower), (14, upper), (16, PAGE), (18, PAGE | 4)] {
            page[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
        }
        page
    }

    /// Pages of four columns that rise: made for being taken apart.
    fn rising(pages: u32) -> Vec<u8> {
        let mut row = 0u64;
        let mut body = || {
            row += 1;
            let mut bytes = [0u8; 32];
            for (word, value) in bytes.as_chunks_mut::<8>().0.iter_mut().zip([1, 3, 7, 9]) {
                *word = (row * value).to_le_bytes();
            }
            bytes
        };
        (0..pages).flat_map(|block| page(block, &mut body)).collect()
    }

    /// Pages of parts of one text, each beginning anywhere in it: whole parts repeat, and no column does.
    fn parts(pages: u32) -> Vec<u8> {
        let mut numbers = Numbers(1);
        let text = numbers.bytes(251).repeat(2);
        let mut body = || {
            let at = numbers.below(251) as usize;
            let mut bytes = [0u8; 32];
            bytes.copy_from_slice(&text[at..at + 32]);
            bytes
        };
        (0..pages).flat_map(|block| page(block, &mut body)).collect()
    }

    /// Words, and no pages.
    fn words(len: usize) -> Vec<u8> {
        (0u32..)
            .flat_map(|i| format!("line {i}, ").into_bytes())
            .take(len)
            .collect()
    }

    fn of(file: u32) -> Content {
        Content::Pages { file }
    }

    /// Encodes and decodes a chunk; returns the codec that was chosen, and how long its output is.
    fn there_and_back(with: &mut Codec, plain: &[u8], content: Content) -> (u8, usize) {
        let (number, mut frame) = with.encode(plain, content);
        let len = frame.len() - FRAME_HEADER_LEN;
        assert!(frame.capacity() >= frame.len() + TAG_LEN, "there is no room for a tag");
        assert_eq!(frame[..FRAME_HEADER_LEN], [0; FRAME_HEADER_LEN]);
        frame[0] = number;
        frame[4..8].copy_from_slice(&(plain.len() as u32).to_le_bytes());
        assert!(decode_chunk(frame, "a chunk").unwrap() == plain, "codec {number}");
        (number, len)
    }

    #[test]
    fn pages_are_taken_apart_only_where_that_pays() {
        let mut with = Codec::new(1).unwrap();
        let (rising, parts) = (rising(4), parts(4));
        for plain in [&rising, &parts] {
            let taken = Encoder::default().encode(plain, &Encoder::default().propose(plain, 4, 4), &mut Vec::new());
            assert_eq!(taken, 4, "all of them can be taken apart");
        }
        let (number, len) = there_and_back(&mut with, &rising, of(1));
        assert_eq!(number, codec::PAGES);
        let (_, plain_len) = there_and_back(&mut with, &rising, Content::Other);
        assert!(len * 4 < plain_len, "{len} bytes, {plain_len} without");
        // A file of its own is looked at by itself.
        let (number, len) = there_and_back(&mut with, &parts, of(2));
        assert_eq!(number, codec::ZSTD);
        assert!(len * 4 < parts.len(), "{len}");
    }

    #[test]
    fn each_chunk_falls_back_by_itself() {
        let mut with = Codec::new(1).unwrap();
        let noise = Numbers(2).bytes(4 * PAGE);
        let (rising, words) = (rising(4), words(4 * PAGE));
        // All of one file, so that what was chosen for its first chunk holds.
        for (plain, expected) in [
            (&rising, codec::PAGES),
            (&words, codec::ZSTD),
            (&noise, codec::RAW),
            (&rising, codec::PAGES),
        ] {
            let (number, len) = there_and_back(&mut with, plain, of(1));
            assert_eq!(number, expected);
            assert!(
                len < plain.len() || expected == codec::RAW && len == plain.len(),
                "{len}"
            );
        }
        // What is no relation, or less than a page, is never taken apart.
        assert_eq!(there_and_back(&mut with, &rising, Content::Other).0, codec::ZSTD);
        assert_eq!(there_and_back(&mut with, &rising[..PAGE - 1], of(1)).0, codec::ZSTD);
        assert_eq!(there_and_back(&mut with, &[], of(1)), (codec::RAW, 0));
    }

    #[test]
    fn a_file_that_changes_is_looked_at_again() {
        let mut with = Codec::new(1).unwrap();
        let (rising, parts) = (rising(4), parts(4));
        assert_eq!(there_and_back(&mut with, &rising, of(1)).0, codec::PAGES);
        for _ in 1..CHUNKS_PER_SAMPLE {
            there_and_back(&mut with, &parts, of(1));
        }
        assert_eq!(there_and_back(&mut with, &parts, of(1)).0, codec::ZSTD);
        for _ in 1..CHUNKS_PER_SAMPLE {
            there_and_back(&mut with, &rising, of(1));
        }
        assert_eq!(there_and_back(&mut with, &rising, of(1)).0, codec::PAGES);
    }

    #[test]
    fn whatever_goes_in_comes_out() {
        let mut with = Codec::new(1).unwrap();
        let mut numbers = Numbers(3);
        let (rising, parts, words) = (rising(8), parts(8), words(8 * PAGE));
        for _ in 0..300 {
            let mut plain = Vec::new();
            for _ in 0..numbers.below(8) {
                let from = numbers.below(8) as usize * PAGE;
                let mut page = match numbers.below(5) {
                    0 => vec![0; PAGE],
                    1 => numbers.bytes(PAGE),
                    2 => words[from..from + PAGE].to_vec(),
                    3 => parts[from..from + PAGE].to_vec(),
                    _ => rising[from..from + PAGE].to_vec(),
                };
                // Damage, mostly where the layout is.
                for _ in 0..numbers.below(3) {
                    let most = if numbers.below(3) == 0 { PAGE as u64 } else { 120 };
                    page[numbers.below(most) as usize] = numbers.below(256) as u8;
                }
                plain.extend(page);
            }
            let tail = numbers.below(3) as usize * 1000;
            plain.extend(numbers.bytes(tail));
            // Few files, so that what was chosen for one chunk meets others.
            let content = match numbers.below(4) {
                0 => Content::Other,
                file => of(file as u32 / 3),
            };
            let (_, len) = there_and_back(&mut with, &plain, content);
            assert!(len <= plain.len());
        }
    }
}
