//! COPY's binary format, for rows of a number and a chunk of bytes. Rows may be cut anywhere on their way.

use bytes::{Buf, Bytes, BytesMut};
use fairvault_format::limits::CHUNK_BYTES;

use crate::error::{Error, Result};

/// Rows of COPY's binary format: a number and bytes, or NULL.
#[derive(Default)]
pub struct Rows {
    buffer: BytesMut,
    begun: bool,
    ended: bool,
}

const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";

impl Rows {
    /// Takes what came next.
    pub fn feed(&mut self, data: &[u8]) {
        self.buffer.extend_from_slice(data);
    }

    /// The next row that is complete.
    pub fn next(&mut self) -> Result<Option<(i32, Option<Bytes>)>> {
        let bad = || Error::failed("the server's answer is no binary copy");
        if !self.begun {
            let header = SIGNATURE.len() + 8;
            if self.buffer.len() < header {
                return Ok(None);
            }
            if !self.buffer.starts_with(SIGNATURE) || self.buffer[SIGNATURE.len()..header] != [0; 8] {
                return Err(bad());
            }
            self.buffer.advance(header);
            self.begun = true;
        }
        if self.ended {
            return if self.buffer.is_empty() { Ok(None) } else { Err(bad()) };
        }
        let Some(fields) = self.buffer.first_chunk::<2>() else {
            return Ok(None);
        };
        match i16::from_be_bytes(*fields) {
            -1 => {
                self.ended = true;
                self.buffer.advance(2);
                return if self.buffer.is_empty() { Ok(None) } else { Err(bad()) };
            }
            2 => {}
            _ => return Err(bad()),
        }
        // Fields, length and number, length of the bytes.
        let Some(head) = self.buffer.first_chunk::<14>() else {
            return Ok(None);
        };
        let word = |at: usize| i32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (number_len, number, len) = (word(2), word(6), word(10));
        if number_len != 4 || !(-1..=CHUNK_BYTES as i32).contains(&len) {
            return Err(bad());
        }
        if len < 0 {
            self.buffer.advance(14);
            return Ok(Some((number, None)));
        }
        let len = len as usize;
        if self.buffer.len() < 14 + len {
            self.buffer.reserve(14 + len - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(14);
        Ok(Some((number, Some(self.buffer.split_to(len).freeze()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_out_however_they_are_cut() {
        let mut stream = SIGNATURE.to_vec();
        stream.extend([0; 8]);
        for (number, bytes) in [(0i32, Some(&b"some bytes"[..])), (1, None), (2, Some(b""))] {
            stream.extend(2i16.to_be_bytes());
            stream.extend(4i32.to_be_bytes());
            stream.extend(number.to_be_bytes());
            stream.extend(bytes.map_or(-1, |bytes| bytes.len() as i32).to_be_bytes());
            stream.extend(bytes.unwrap_or_default());
        }
        stream.extend((-1i16).to_be_bytes());
        for cut in 1..stream.len() {
            let (mut rows, mut found) = (Rows::default(), Vec::new());
            for part in stream.chunks(cut) {
                rows.feed(part);
                while let Some(row) = rows.next().unwrap() {
                    found.push(row);
                }
            }
            let text = |bytes: &'static [u8]| Some(Bytes::from_static(bytes));
            assert_eq!(found, [(0, text(b"some bytes")), (1, None), (2, text(b""))]);
        }
        let mut rows = Rows::default();
        rows.feed(&[stream.clone(), vec![0]].concat());
        assert!((0..4).any(|_| rows.next().is_err()), "something behind the end");
        let mut rows = Rows::default();
        rows.feed(b"no copy at all, but long enough");
        assert!(rows.next().is_err());
    }
}
