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
        self.packed.resize(compress_bound(input.len()), 0);
        match self.zstd.compress_to_buffer(input, &mut self.packed[..]) {
            Ok(len) if len < plain.len() => (number, frame(&self.packed[..len])),
            _ => (codec::RAW, frame(plain)),
        }
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
