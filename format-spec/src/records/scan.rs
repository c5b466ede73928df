//! Where the records of a run are, and what they are made of.
//!
//! What always holds: a record is one only if its CRC is right, it names the one before it, and its padding is zero:
//! all that is computed when it is put together. At the first thing that is none, the records end.

use super::classes::{Field, ImageAt};
use super::{PAGE, PAGE_HEADER, RECORD_HEADER, flag, header_len, in_page, record_crc, u16_at, u32_at, u64_at};

/// Magic of WAL pages of PostgreSQL 15, since which images have other flags.
const MAGIC_15: usize = 0xD110;
/// Most blocks of a record (XLR_MAX_BLOCK_ID).
const MOST_BLOCKS: u8 = 32;

/// Most images, and most fields, of a record: those of a real one.
const MOST_PARTS: usize = MOST_BLOCKS as usize + 1;

/// A record of the run.
#[derive(Debug, Clone, Copy)]
pub struct Record {
    /// Where it begins among the bytes of records.
    pub at: usize,
    /// Its length, bytes.
    pub len: usize,
}

/// A stretch of bytes of records between two page headers.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Where it begins among the bytes of records.
    at: usize,
    /// Where it begins in the run.
    run_at: usize,
    /// Where the page header before it begins in the run; `None` if that does not belong to it.
    header_at: Option<usize>,
}

/// The records of a run.
#[derive(Debug, Default)]
pub struct Scan {
    /// The bytes of records, without page headers.
    pub bytes: Vec<u8>,
    /// The records, one behind the other.
    pub records: Vec<Record>,
    /// Where in the run the first one, or the page header before it, begins.
    pub first: usize,
    /// Where in the run the last one's padding ends.
    pub end: usize,
    /// What the first one says comes before it.
    pub first_previous: u64,
    /// Page headers among them: where in the run, and bytes left of a record that goes on behind.
    pub headers: Vec<(usize, u32)>,
    /// Whether images have the flags of 15 and later.
    pub is_15: bool,
    pieces: Vec<Piece>,
}

impl Scan {
    /// Finds the records of `plain`, whose first byte is at `start`. Returns how many there are.
    pub fn run(&mut self, plain: &[u8], start: u64) -> usize {
        self.records.clear();
        if !start.is_multiple_of(8) {
            return 0;
        }
        let next_page = (PAGE - in_page(start)) % PAGE;
        if next_page > 0 && self.from(plain, start, 0) > 0 {
            return self.records.len();
        }
        match first_record(plain, start, next_page) {
            Some(first) => self.from(plain, start, first),
            None => 0,
        }
    }

    /// The same, if they begin at `first`.
    fn from(&mut self, plain: &[u8], start: u64, first: usize) -> usize {
        self.first = first;
        self.strip(plain, start);
        self.find(start);
        self.place(start, plain);
        self.records.len()
    }

    /// Takes page headers away, as far as there are pages.
    fn strip(&mut self, plain: &[u8], start: u64) {
        self.bytes.clear();
        self.pieces.clear();
        self.is_15 = true;
        let mut at = self.first;
        while at < plain.len() {
            let lsn = start.wrapping_add(at as u64);
            let mut header_at = None;
            if in_page(lsn) == 0 {
                let Some(header) = page_header(plain, at, lsn) else {
                    break;
                };
                self.is_15 = u16_at(header, 0) >= MAGIC_15;
                header_at = Some(at);
                at += header_len(header);
            }
            let end = (at + PAGE - in_page(start.wrapping_add(at as u64))).min(plain.len());
            let Some(bytes) = plain.get(at..end) else {
                break;
            };
            self.pieces.push(Piece {
                at: self.bytes.len(),
                run_at: at,
                header_at,
            });
            self.bytes.extend_from_slice(bytes);
            at = end;
        }
    }

    /// Finds the records among the bytes.
    fn find(&mut self, start: u64) {
        self.records.clear();
        let (mut at, mut piece) = (0, 0);
        let mut previous = None;
        while let Some(header) = self.bytes.get(at..).and_then(<[u8]>::first_chunk::<RECORD_HEADER>) {
            let len = u32_at(header, 0) as usize;
            let Some(record) = self.bytes.get(at..at.saturating_add(len)) else {
                break;
            };
            let Some(padding) = self.bytes.get(at + len..(at + len).next_multiple_of(8)) else {
                break;
            };
            let before = u64_at(header, 8);
            let is_record = len >= RECORD_HEADER
                && header[18..20] == [0; 2]
                && previous.is_none_or(|previous| previous == before)
                && padding.iter().all(|&byte| byte == 0)
                && record_crc(record) == u32_at(header, 20);
            if !is_record {
                break;
            }
            if previous.is_none() {
                self.first_previous = before;
            }
            while self.pieces.get(piece + 1).is_some_and(|next| next.at <= at) {
                piece += 1;
            }
            let Piece { at: from, run_at, .. } = self.pieces[piece];
            previous = Some(start.wrapping_add((run_at + at - from) as u64));
            self.records.push(Record { at, len });
            at += len.next_multiple_of(8);
        }
    }

    /// Finds the end of the records, and the page headers up to it.
    fn place(&mut self, start: u64, plain: &[u8]) {
        self.headers.clear();
        self.end = self.first;
        let Some(last) = self.records.last() else {
            return;
        };
        let end = last.at + last.len.next_multiple_of(8);
        let mut records = self.records.iter().peekable();
        for piece in self.pieces.iter().take_while(|piece| piece.at < end) {
            let in_page = PAGE - in_page(start.wrapping_add(piece.run_at as u64));
            self.end = (piece.run_at + end - piece.at)
                .min(piece.run_at + in_page)
                .min(plain.len());
            let Some(header_at) = piece.header_at else {
                continue;
            };
            while records.next_if(|record| record.at + record.len <= piece.at).is_some() {}
            let remaining = match records.peek() {
                Some(record) if record.at < piece.at => record.at + record.len - piece.at,
                _ => 0,
            };
            self.headers.push((header_at, remaining as u32));
        }
    }
}

/// The header of the page at `at`, if one is there.
fn page_header(plain: &[u8], at: usize, lsn: u64) -> Option<&[u8; PAGE_HEADER]> {
    let header = plain.get(at..)?.first_chunk()?;
    let fits = header[1] == 0xD1 && u64_at(header, 8) == lsn && at + header_len(header) <= plain.len();
    fits.then_some(header)
}

/// Where the first record that begins at or behind the page at `page` does so, or the page header before it.
fn first_record(plain: &[u8], start: u64, mut page: usize) -> Option<usize> {
    let lsn = |page: usize| start.wrapping_add(page as u64);
    let header = page_header(plain, page, lsn(page))?;
    if header[2] & flag::CONTINUES == 0 {
        return Some(page);
    }
    let mut remaining = (u32_at(header, 16) as usize).next_multiple_of(8);
    loop {
        let header = page_header(plain, page, lsn(page))?;
        let from = page + header_len(header);
        page += PAGE;
        if from + remaining <= page {
            return Some(from + remaining);
        }
        remaining -= page - from;
    }
}

/// What a record is made of.
#[derive(Debug, Default)]
pub struct Parts {
    /// Bytes of the head.
    pub head: usize,
    /// Bytes of the main data, where that is not the middle.
    pub main: usize,
    /// Bytes of the middle, without images.
    pub middle: usize,
    /// Images, and whether they are compressed.
    pub images: Vec<(ImageAt, bool)>,
    /// Fields with the length of the middle.
    pub fields: Vec<Field>,
    /// Where in the head its first relation is.
    pub relation: Option<usize>,
}

impl Parts {
    /// Takes a record apart, `body` being what is behind its header. False if it contradicts itself.
    pub fn parse(&mut self, body: &[u8], is_15: bool) -> bool {
        self.images.clear();
        self.fields.clear();
        self.relation = None;
        self.try_parse(body, is_15).is_some()
    }

    fn try_parse(&mut self, body: &[u8], is_15: bool) -> Option<()> {
        let (mut at, mut data, mut images) = (0usize, 0usize, 0usize);
        let (mut main, mut main_field) = (0usize, None);
        while at + data + images + main < body.len() {
            let id = body[at];
            at += 1;
            match id {
                255 => {
                    main = (*body.get(at)?).into();
                    main_field = Some(Field {
                        at: at as u16,
                        width: 1,
                    });
                    at += 1;
                    break;
                }
                254 => {
                    body.get(at..at + 4)?;
                    main = u32_at(body, at) as usize;
                    main_field = Some(Field {
                        at: at as u16,
                        width: 4,
                    });
                    at += 4;
                    break;
                }
                253 => at += 2,
                252 => at += 4,
                0..=MOST_BLOCKS => {
                    let flags = *body.get(at)?;
                    body.get(at..at + 3)?;
                    let len = u16_at(body, at + 1);
                    let field = Field {
                        at: (at + 1) as u16,
                        width: 2,
                    };
                    at += 3;
                    if flags & 0x10 != 0 {
                        let header = body.get(at..at + 5)?;
                        let is_compressed = header[4] & if is_15 { 0x1C } else { 2 } != 0;
                        let image = ImageAt {
                            header: at as u16,
                            before: u16::try_from(data).ok()?,
                        };
                        self.images.push((image, is_compressed));
                        images += u16_at(header, 0);
                        at += if header[4] & 1 != 0 && is_compressed { 7 } else { 5 };
                    }
                    if flags & 0x80 == 0 {
                        self.relation.get_or_insert(at);
                        at += 12;
                    }
                    at += 4;
                    if len > 0 {
                        data += len;
                        self.fields.push(field);
                    }
                }
                _ => return None,
            }
        }
        self.head = at;
        (self.main, self.middle) = match self.fields.is_empty() && self.images.is_empty() {
            true => {
                self.fields.extend(main_field);
                (0, main)
            }
            false => (main, data),
        };
        let is_whole = at.checked_add(data)?.checked_add(images)?.checked_add(main)? == body.len();
        let is_small = at.max(self.main) <= u16::MAX.into() && self.images.len().max(self.fields.len()) <= MOST_PARTS;
        (is_whole && is_small).then_some(())
    }
}
