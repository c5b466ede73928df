#![no_main]
//! WAL pages and records, with right CRCs put in where the input has room for them.
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::postgres::walker::Walker;
use fairvault_engine::wal::summary::summarize;
use libfuzzer_sys::fuzz_target;

const PAGE: usize = 8192;
/// Of the versions 14 to 19.
const MAGIC: [u16; 6] = [0xD10D, 0xD110, 0xD113, 0xD116, 0xD118, 0xD122];

fuzz_target!(|data: &[u8]| {
    let start = Lsn(16 << 20);
    let Some((version, data)) = data.split_first() else { return };
    let magic = MAGIC[usize::from(*version) % MAGIC.len()];
    let mut content = data.to_vec();
    content.resize(content.len().next_multiple_of(PAGE).max(PAGE), 0);
    for (number, page) in content.chunks_exact_mut(PAGE).enumerate() {
        page[..2].copy_from_slice(&magic.to_le_bytes());
        page[8..16].copy_from_slice(&(start.0 + (number * PAGE) as u64).to_le_bytes());
    }
    // The first record's CRC, so that what is inside is looked at.
    let at = if content[2] & 2 != 0 { 40 } else { 24 };
    let len = u32::from_le_bytes([content[at], content[at + 1], content[at + 2], content[at + 3]]) as usize;
    if (24..PAGE - at).contains(&len) {
        let crc = crc(&content[at..at + len]);
        content[at + 20..at + 24].copy_from_slice(&crc.to_le_bytes());
    }
    let mut walker = Walker::new(start, 16 << 20);
    walker.feed(&content, |record| {
        let _ = record.decode();
        let _ = record.event();
    });
    let _ = summarize(&content, start, 16 << 20);
});

fn crc(record: &[u8]) -> u32 {
    let mut sum = !0u32;
    for &byte in record[24..].iter().chain(&record[..20]) {
        sum ^= u32::from(byte);
        for _ in 0..8 {
            sum = if sum & 1 != 0 { sum >> 1 ^ 0x82F6_3B78 } else { sum >> 1 };
        }
    }
    !sum
}
