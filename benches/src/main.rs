//! Micro benchmarks of the CPU stages, each as MB/s of plaintext on one core, and as a ratio to plain zstd
//! at the same level. `cargo run --release -p fairvault-benches [FILE]`; the file (a WAL segment, a table)
//! is cut to 16 MiB, without one a made-up text is used.

use std::hint::black_box;
use std::time::{Duration, Instant};

use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::postgres::page;
use fairvault_engine::wal::summary::summarize;
use fairvault_format::frame::{FRAME_HEADER_LEN, FrameKey};
use fairvault_format::header::{Kind, ObjectHeader};
use fairvault_format::keys::{EpochKeys, Scope};
use fairvault_format::{proto, wal};

const BYTES: usize = 16 << 20;
const LEVEL: i32 = 3;

/// The best of five runs.
fn best(mut work: impl FnMut()) -> Duration {
    (0..5)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed()
        })
        .min()
        .unwrap_or_default()
}

fn content() -> Vec<u8> {
    let mut bytes = match std::env::args().nth(1) {
        Some(path) => std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}")),
        None => (0u64..)
            .flat_map(|i| format!("row {i} {:x};", i.wrapping_mul(0x9E37_79B9_7F4A_7C15)).into_bytes())
            .take(BYTES)
            .collect(),
    };
    bytes.resize(BYTES, 0);
    bytes
}

fn main() {
    let plain = content();
    let keys = EpochKeys {
        epoch: 1,
        data_key: Some([1; 32]),
        id_key: [2; 32],
        meta_key: [3; 32],
        writer_seed: None,
        operator_seed: None,
        public_keys: Default::default(),
    };
    let scope = Scope {
        repository: [1; 16],
        stanza: [2; 16],
    };
    let zstd = best(|| _ = black_box(zstd::bulk::compress(&plain, LEVEL)));
    let show = |name: &str, time: Duration| {
        let rate = BYTES as f64 / 1e6 / time.as_secs_f64();
        println!(
            "{name:<34} {rate:>8.0} MB/s   {:>5.2} × zstd -{LEVEL}",
            time.as_secs_f64() / zstd.as_secs_f64()
        );
    };
    show("zstd", zstd);
    show(
        "page checksums",
        best(|| {
            for (block, page) in plain.chunks_exact(8192).enumerate() {
                black_box(page::checksum(page, block as u32));
            }
        }),
    );
    show(
        "chunk ids",
        best(|| plain.chunks(512 << 10).for_each(|c| _ = black_box(keys.chunk_id(c)))),
    );
    let header = ObjectHeader::new(Kind::Pack, 1, [4; 32]);
    let key = FrameKey::new(&keys, &scope, &header).expect("the keys are of this epoch");
    show(
        "sealing",
        best(|| {
            for (ordinal, chunk) in plain.chunks(512 << 10).enumerate() {
                let mut frame = vec![0; FRAME_HEADER_LEN];
                frame.extend_from_slice(chunk);
                key.seal(ordinal as u32, 0, chunk.len() as u32, &mut frame);
                black_box(&frame);
            }
        }),
    );
    show(
        "walking WAL",
        best(|| _ = black_box(summarize(&plain, Lsn(BYTES as u64), BYTES as u64))),
    );
    show(
        "a WAL segment, sealed as an object",
        best(|| {
            summarize(&plain, Lsn(BYTES as u64), BYTES as u64);
            let header = proto::WalHeader::default();
            _ = black_box(wal::seal_wal(
                &keys,
                &scope,
                Kind::WalSegment,
                [5; 32],
                "x",
                header,
                &plain,
                LEVEL,
            ));
        }),
    );
}
