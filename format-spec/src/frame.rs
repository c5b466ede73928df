//! Frames: sealed chunks inside a pack (SPEC.md, section 4).

use crate::error::{FormatError, Result, check_limit};
use crate::header::{HEADER_LEN, Kind, ObjectHeader};
use crate::keys::{EpochKeys, KeyRole, ObjectKey, Scope, TAG_LEN};
use crate::limits;
use crate::object::{codec, wrong_length};
use crate::pages;
use crate::public::Fresh;

/// Length of the sealed frame header, bytes.
pub const FRAME_HEADER_LEN: usize = 8;
/// What sealing adds to the codec's output, bytes.
pub const FRAME_OVERHEAD: usize = FRAME_HEADER_LEN + TAG_LEN;

/// Seals and opens the frames of one pack.
pub struct FrameKey {
    key: ObjectKey,
    header: [u8; HEADER_LEN],
}

impl FrameKey {
    /// The frame key of the pack with this header.
    pub fn new(keys: &EpochKeys, scope: &Scope, header: &ObjectHeader) -> Result<Self> {
        Ok(Self {
            key: keys.object_key(scope, header, KeyRole::Data)?,
            header: header.encode(),
        })
    }

    /// The header of a new pack, and its frame key.
    pub fn of_new_pack(keys: &EpochKeys, scope: &Scope, fresh: impl Into<Fresh>) -> Result<(ObjectHeader, Self)> {
        let (header, key) = keys.seal_data(scope, Kind::Pack, fresh)?;
        let encoded = header.encode();
        Ok((header, Self { key, header: encoded }))
    }

    fn aad(&self, ordinal: u32) -> [u8; HEADER_LEN + 4] {
        let mut aad = [0u8; HEADER_LEN + 4];
        aad[..HEADER_LEN].copy_from_slice(&self.header);
        aad[HEADER_LEN..].copy_from_slice(&ordinal.to_le_bytes());
        aad
    }

    /// Seals a chunk that a codec has encoded. `buffer` holds [`FRAME_HEADER_LEN`] bytes of room and then
    /// the codec's output; it becomes the frame as stored.
    pub fn seal(&self, ordinal: u32, codec: u8, plain_len: u32, buffer: &mut Vec<u8>) {
        buffer[..FRAME_HEADER_LEN].fill(0);
        buffer[0] = codec;
        buffer[4..8].copy_from_slice(&plain_len.to_le_bytes());
        self.key.seal(ordinal.into(), &self.aad(ordinal), buffer, 0);
    }

    /// Opens a frame and decodes its chunk. The caller checks the chunk's id.
    pub fn open(&self, ordinal: u32, stored: &[u8], what: &str) -> Result<Vec<u8>> {
        let mut reader = FrameReader::default();
        self.open_with(&mut reader, ordinal, stored, what).map(<[u8]>::to_vec)
    }

    /// The same, into the reader's buffer.
    pub fn open_with<'a>(
        &self,
        reader: &'a mut FrameReader,
        ordinal: u32,
        stored: &[u8],
        what: &str,
    ) -> Result<&'a [u8]> {
        reader.frame.clear();
        reader.frame.extend_from_slice(stored);
        self.key
            .open(ordinal.into(), &self.aad(ordinal), &mut reader.frame, what)?;
        reader.decode(what)
    }
}

/// Where a [`FrameReader`]'s chunks begin in memory: at multiples of this, as file systems want it of whoever writes
/// past their cache.
pub const CHUNK_ALIGN: usize = 4096;

/// Decodes frames; keeps its buffers from one to the next.
#[derive(Default)]
pub struct FrameReader {
    /// Frame header and codec output.
    frame: Vec<u8>,
    transformed: Vec<u8>,
    /// The chunk, somewhere in it.
    space: Vec<u8>,
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    pages: pages::Decoder,
}

impl FrameReader {
    /// Codec and codec output of the frame that was opened last: to be sealed anew under other keys.
    pub fn encoded(&self) -> (u8, &[u8]) {
        match self.frame.split_first_chunk::<FRAME_HEADER_LEN>() {
            Some((header, output)) => (header[0], output),
            None => (codec::RAW, &[]),
        }
    }

    fn decode(&mut self, what: &str) -> Result<&[u8]> {
        let Some((header, output)) = self.frame.split_first_chunk::<FRAME_HEADER_LEN>() else {
            return Err(FormatError::damaged(what, "it is shorter than a frame header"));
        };
        if header[0] > codec::PAGES {
            return Err(FormatError::unsupported(what, format!("codec {}", header[0])));
        }
        if header[1] != 0 || header[2..4] != [0; 2] {
            return Err(FormatError::unsupported(
                what,
                format!("frame flags {:?}", &header[1..4]),
            ));
        }
        let plain_len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        check_limit(what, plain_len.into(), limits::MANIFEST_CHUNK_BYTES.into())?;
        let plain_len = plain_len as usize;
        if self.space.len() < plain_len + CHUNK_ALIGN {
            self.space.resize(plain_len + CHUNK_ALIGN, 0);
        }
        let from = self.space.as_ptr().align_offset(CHUNK_ALIGN) % CHUNK_ALIGN;
        let chunk = &mut self.space[from..from + plain_len];
        if header[0] == codec::RAW {
            if output.len() != plain_len {
                return Err(wrong_length(what, output.len(), plain_len));
            }
            chunk.copy_from_slice(output);
            return Ok(chunk);
        }
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert(
                zstd::bulk::Decompressor::new()
                    .map_err(|e| FormatError::damaged(what, format!("zstd cannot be set up: {e}")))?,
            ),
        };
        let failed = |e: std::io::Error| FormatError::damaged(what, format!("zstd: {e}"));
        if header[0] == codec::PAGES {
            self.transformed.clear();
            self.transformed.reserve(plain_len + pages::overhead(plain_len));
            zstd.decompress_to_buffer(output, &mut self.transformed)
                .map_err(failed)?;
            self.pages.decode(&self.transformed, chunk, what)?;
            return Ok(chunk);
        }
        match zstd.decompress_to_buffer(output, chunk).map_err(failed)? {
            len if len == plain_len => Ok(chunk),
            len => Err(wrong_length(what, len, plain_len)),
        }
    }
}

/// Decodes an opened frame: frame header and codec output.
pub fn decode_chunk(frame: Vec<u8>, what: &str) -> Result<Vec<u8>> {
    let mut reader = FrameReader {
        frame,
        ..Default::default()
    };
    reader.decode(what).map(<[u8]>::to_vec)
}
