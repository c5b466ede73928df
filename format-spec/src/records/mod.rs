//! The record transform of codec 3 (SPEC.md, section 16): a run of WAL taken apart into records, records of one
//! class into columns, and images of pages by the transform of codec 2.
//!
//! What always holds: what is put together is what was taken apart, for every input, WAL or not; what cannot be read
//! as records is kept as it is; the decoder believes nothing that it is told about lengths, and what it allocates is
//! bounded by the run.

mod checked;
mod classes;
mod decode;
mod encode;
mod images;
mod scan;
#[cfg(test)]
mod tests;

pub use checked::Checked;
pub use decode::Decoder;
pub use encode::Encoder;

/// Bytes of a WAL page.
const PAGE: usize = 8192;
/// Bytes of the header of a WAL page, and of that of a segment's first page.
const PAGE_HEADER: usize = 24;
const LONG_PAGE_HEADER: usize = 40;
/// Bytes of a record's header.
const RECORD_HEADER: usize = 24;
/// Layout of the transform.
const LAYOUT: u8 = 1;
/// Bytes of the transformed run before its class table.
const FIXED: usize = 44;
/// Most classes.
const CLASSES: usize = 4096;
/// Images of at least this many bytes can be pages.
const IMAGE_BYTES: usize = 1024;
/// Pages that are transformed together.
const GROUP_PAGES: usize = 64;

/// Flags in the header of a WAL page.
mod flag {
    pub const CONTINUES: u8 = 1;
    pub const LONG: u8 = 2;
    pub const OVERWRITES: u8 = 8;
}

/// Longest transformed run that is read, bytes.
pub const fn largest(plain_len: usize) -> usize {
    plain_len + plain_len / 8 + 4096
}

/// How far a position is into its page.
fn in_page(lsn: u64) -> usize {
    (lsn % PAGE as u64) as usize
}

/// Bytes of a page's header, by its first bytes.
fn header_len(header: &[u8; PAGE_HEADER]) -> usize {
    match header[2] & flag::LONG {
        0 => PAGE_HEADER,
        _ => LONG_PAGE_HEADER,
    }
}

/// The header that a page at `lsn` is expected to have: as the one before, with `remaining` bytes of a record that
/// goes on here.
fn expected_header(before: &[u8; PAGE_HEADER], lsn: u64, remaining: u32) -> [u8; PAGE_HEADER] {
    let mut header = *before;
    header[2] &= !(flag::CONTINUES | flag::LONG | flag::OVERWRITES);
    header[2] |= u8::from(remaining > 0) * flag::CONTINUES;
    header[8..16].copy_from_slice(&lsn.to_le_bytes());
    header[16..20].copy_from_slice(&remaining.to_le_bytes());
    header[20..].fill(0);
    header
}

/// Bytewise exclusive or.
fn xor(a: &[u8; PAGE_HEADER], b: &[u8; PAGE_HEADER]) -> [u8; PAGE_HEADER] {
    std::array::from_fn(|at| a[at] ^ b[at])
}

/// CRC of a record as its header has it, over all its bytes.
fn record_crc(record: &[u8]) -> u32 {
    let (header, body) = record.split_at(RECORD_HEADER.min(record.len()));
    crc32c::crc32c_append(crc32c::crc32c(body), header.get(..20).unwrap_or_default())
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
    let found = bytes.get(at..).and_then(<[u8]>::first_chunk);
    found.map_or(0, |b| u16::from_le_bytes(*b)).into()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let found = bytes.get(at..).and_then(<[u8]>::first_chunk);
    found.map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let found = bytes.get(at..).and_then(<[u8]>::first_chunk);
    found.map_or(0, |b| u64::from_le_bytes(*b))
}
