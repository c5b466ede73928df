#![no_main]
//! Taking runs of WAL apart and putting them together: what comes back is what went in; what nobody took apart is
//! refused. Buffers and decoder are kept from one input to the next, as they are from run to run.
use std::cell::RefCell;

use fairvault_format::records::{Decoder, Encoder};
use libfuzzer_sys::fuzz_target;

const PAGE: usize = 8192;

#[derive(Default)]
struct Kept {
    encoder: Encoder,
    decoder: Decoder,
    transformed: Vec<u8>,
    back: Vec<u8>,
}

thread_local!(static KEPT: RefCell<Kept> = RefCell::default());

fuzz_target!(|data: &[u8]| {
    // As something that claims to have been taken apart.
    KEPT.with_borrow_mut(|kept| {
        kept.back.resize(3 * PAGE, 1);
        let _ = kept.decoder.decode(data, &mut kept.back, "a run");
    });
    // As it is, and as pages of records, whose bodies are what the fuzzer gives.
    comes_back(data, 0);
    let Some((&how, bodies)) = data.split_first() else {
        return;
    };
    // Near both ends of what there is.
    let start = match how {
        0..128 => u64::from(how) << 13,
        _ => u64::MAX << 13 << (255 - how) % 8,
    };
    comes_back(&wal(start, bodies), start);
});

fn comes_back(run: &[u8], start: u64) {
    KEPT.with_borrow_mut(|kept| {
        kept.transformed.clear();
        if kept.encoder.encode(run, start, &mut kept.transformed) == 0 {
            return;
        }
        kept.back.resize(run.len(), 1);
        kept.decoder
            .decode(&kept.transformed, &mut kept.back, "a run")
            .expect("what was taken apart comes back");
        assert_eq!(kept.back, run);
    });
}

/// Records, each with a byte for its resource manager, one for its length in eights, and its body.
fn wal(start: u64, mut bodies: &[u8]) -> Vec<u8> {
    let (mut out, mut previous) = (Vec::new(), 0);
    while let [rmid, len, rest @ ..] = bodies {
        let (body, behind) = rest.split_at(rest.len().min(usize::from(*len) * 8));
        bodies = behind;
        begin_page(&mut out, start, 0);
        let lsn = start.wrapping_add(out.len() as u64);
        let mut record = (24 + body.len() as u32).to_le_bytes().to_vec();
        record.extend([0, 3, 0, 0]);
        record.extend(u64::to_le_bytes(previous));
        record.extend([0, *rmid, 0, 0]);
        let crc = crc(&[body, &record].concat());
        record.extend(crc.to_le_bytes());
        record.extend(body);
        let mut left = &record[..];
        while !left.is_empty() {
            begin_page(&mut out, start, left.len());
            let (here, rest) = left.split_at(left.len().min(PAGE - out.len() % PAGE));
            out.extend(here);
            left = rest;
        }
        out.resize(out.len().next_multiple_of(8), 0);
        previous = lsn;
    }
    out
}

fn begin_page(out: &mut Vec<u8>, start: u64, remaining: usize) {
    if out.len() % PAGE == 0 {
        let lsn = start.wrapping_add(out.len() as u64);
        out.extend([0x10, 0xD1, 4 | u8::from(remaining > 0), 0, 1, 0, 0, 0]);
        out.extend(lsn.to_le_bytes());
        out.extend((remaining as u64).to_le_bytes());
    }
}

fn crc(bytes: &[u8]) -> u32 {
    let mut sum = !0u32;
    for &byte in bytes {
        sum ^= u32::from(byte);
        for _ in 0..8 {
            sum = if sum & 1 != 0 { sum >> 1 ^ 0x82F6_3B78 } else { sum >> 1 };
        }
    }
    !sum
}
