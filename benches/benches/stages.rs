//! Micro benchmarks of the CPU stages, on one core where they do not say otherwise, in bytes of plaintext a second:
//! `cargo bench -p fairvault-benches`.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fairvault_benches::{CHUNK, RUN, RUN_START, heap, index, names, ragged, text, wal as run_of_wal};
use fairvault_engine::backup::cut::{Grain, cuts};
use fairvault_engine::codec::{Codec, Content};
use fairvault_engine::dedup::{Index, SessionChunks};
use fairvault_engine::env::SystemEnv;
use fairvault_engine::pack::Packer;
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::postgres::page;
use fairvault_engine::source::tar::Parser;
use fairvault_engine::stanza::create::{Cluster, create};
use fairvault_engine::stanza::{Access, Stanza};
use fairvault_engine::store::url::RepositoryUrl;
use fairvault_engine::wal::summary::summarize;
use fairvault_format::frame::{FRAME_HEADER_LEN, FRAME_OVERHEAD, FrameKey, FrameReader};
use fairvault_format::header::{HEADER_LEN, Kind, ObjectHeader};
use fairvault_format::keys::{EpochKeys, Scope, Secret};
use fairvault_format::object::codec::RAW;
use fairvault_format::pack::{DirectoryEntry, seal_tail};
use fairvault_format::pages::{Decoder, Encoder, PAGE};
use fairvault_format::records::{self, Checked};
use fairvault_format::{limits, proto, sha256, wal};
use tokio::sync::mpsc;

const SCOPE: Scope = Scope {
    repository: [1; 16],
    stanza: [2; 16],
};

fn keys() -> EpochKeys {
    EpochKeys {
        epoch: 1,
        data_key: Some([1; 32]),
        data_private_key: None,
        id_key: [2; 32],
        meta_key: [3; 32],
        writer_seed: None,
        operator_seed: None,
        public_keys: Default::default(),
    }
}

fn chunks() -> [(&'static str, Vec<u8>); 3] {
    [("heap", heap()), ("index", index()), ("text", text())]
}

fn checks(c: &mut Criterion) {
    let (heap, keys) = (heap(), keys());
    let mut group = c.benchmark_group("checks");
    group.throughput(Throughput::Bytes(CHUNK as u64));
    group.bench_function("page checksums", |b| {
        b.iter(|| {
            for (block, page) in heap.chunks_exact(8192).enumerate() {
                black_box(page::checksum(page, block as u32));
            }
        });
    });
    group.bench_function("chunk id", |b| b.iter(|| keys.chunk_id(black_box(&heap))));
    group.bench_function("crc-32c", |b| b.iter(|| crc32c::crc32c(black_box(&heap))));
    group.bench_function("pack name", |b| b.iter(|| sha256(black_box(&heap))));
    group.finish();
}

fn transform(c: &mut Criterion) {
    let mut group = c.benchmark_group("pages");
    group.throughput(Throughput::Bytes(CHUNK as u64));
    let chunks = [
        ("heap", heap()),
        ("index", index()),
        ("heap, NULLs and all lengths", ragged()),
        ("index, texts", names()),
    ];
    for (name, plain) in chunks {
        let (mut encoder, mut out) = (Encoder::default(), Vec::new());
        let plan = encoder.propose(&plain, 4, 4);
        assert_eq!(
            encoder.encode(&plain, &plan, &mut out),
            CHUNK / PAGE,
            "pages are left over"
        );
        group.bench_function(BenchmarkId::new("take apart", name), |b| {
            b.iter(|| {
                out.clear();
                encoder.encode(black_box(&plain), &plan, &mut out)
            });
        });
        let (mut decoder, mut back) = (Decoder::default(), vec![0; plain.len()]);
        group.bench_function(BenchmarkId::new("put together", name), |b| {
            b.iter(|| {
                let decoded = decoder.decode(black_box(&out), &mut back, "a chunk");
                decoded.expect("what was taken apart can be put together");
            });
        });
        assert_eq!(
            back.iter().any(|&byte| byte != 0),
            back == plain,
            "something else came back"
        );
    }
    group.finish();
}

fn records(c: &mut Criterion) {
    let mut group = c.benchmark_group("records");
    group.throughput(Throughput::Bytes(RUN as u64));
    let (plain, mut out) = (run_of_wal(), Vec::new());
    let mut encoder = records::Encoder::default();
    assert!(
        encoder.encode(&plain, RUN_START, &mut out) > 10_000,
        "there are no records"
    );
    group.bench_function("take apart", |b| {
        b.iter(|| {
            out.clear();
            encoder.encode(black_box(&plain), RUN_START, &mut out)
        });
    });
    let (mut decoder, mut back) = (records::Decoder::default(), vec![0; RUN]);
    group.bench_function("put together", |b| {
        b.iter(|| {
            decoder
                .decode(black_box(&out), &mut back, "a run")
                .map_err(|e| e.to_string())
        });
    });
    let mut checked = Checked::default();
    group.bench_function("take apart and check", |b| {
        b.iter(|| checked.transform(black_box(&plain), RUN_START).map(<[u8]>::len));
    });
    for (name, bytes) in [("plain", &plain), ("taken apart", &out)] {
        let mut zstd = zstd::bulk::Compressor::new(3).expect("a level");
        group.bench_function(BenchmarkId::new("zstd 3", name), |b| {
            b.iter(|| zstd.compress(black_box(bytes)))
        });
    }
    group.finish();
}

fn codec(c: &mut Criterion) {
    let mut group = c.benchmark_group("codec");
    group.throughput(Throughput::Bytes(CHUNK as u64));
    let (keys, header) = (keys(), ObjectHeader::new(Kind::Pack, 1, [4; 32]));
    let key = FrameKey::new(&keys, &SCOPE, &header).expect("the keys are of this epoch");
    for (name, plain) in chunks() {
        for level in [1, 3] {
            let mut zstd = zstd::bulk::Compressor::new(level).expect("a level");
            group.bench_function(BenchmarkId::new(format!("zstd {level}"), name), |b| {
                b.iter(|| zstd.compress(black_box(&plain)));
            });
        }
        let mut codec = Codec::new(1).expect("a level");
        group.bench_function(BenchmarkId::new("encode", name), |b| {
            b.iter(|| codec.encode(black_box(&plain), Content::Pages { file: 1 }));
        });
        let (number, mut frame) = codec.encode(&plain, Content::Pages { file: 1 });
        key.seal(0, number, plain.len() as u32, &mut frame);
        let mut reader = FrameReader::default();
        group.bench_function(BenchmarkId::new("open and decode", name), |b| {
            b.iter(|| {
                let chunk = key.open_with(&mut reader, 0, black_box(&frame), "a frame");
                chunk.expect("the frame opens").len()
            });
        });
    }
    group.finish();
}

/// What workers on all cores together can make of a backup that costs nothing to read and nothing to store, and what
/// plain zstd makes on as many.
fn all_cores(c: &mut Criterion) {
    /// Chunks of each worker.
    const EACH: usize = 64;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut group = c.benchmark_group("all cores");
    group.throughput(Throughput::Bytes((cores * EACH * CHUNK) as u64));
    group.sample_size(10);
    for (name, plain) in chunks() {
        group.bench_function(BenchmarkId::new("encode", name), |b| {
            b.iter(|| {
                on_each(cores, || {
                    let mut codec = Codec::new(1).expect("a level");
                    for _ in 0..EACH {
                        black_box(codec.encode(black_box(&plain), Content::Pages { file: 1 }));
                    }
                });
            });
        });
        for level in [1, 3] {
            group.bench_function(BenchmarkId::new(format!("zstd {level}"), name), |b| {
                b.iter(|| {
                    on_each(cores, || {
                        let mut zstd = zstd::bulk::Compressor::new(level).expect("a level");
                        for _ in 0..EACH {
                            black_box(zstd.compress(black_box(&plain)).expect("there is room").len());
                        }
                    });
                });
            });
        }
    }
    group.finish();
}

/// The same work by so many threads.
fn on_each(threads: usize, work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(&work);
        }
    });
}

fn seal(c: &mut Criterion) {
    let (keys, header, plain) = (keys(), ObjectHeader::new(Kind::Pack, 1, [4; 32]), text());
    let key = FrameKey::new(&keys, &SCOPE, &header).expect("the keys are of this epoch");
    let mut group = c.benchmark_group("seal");
    group.throughput(Throughput::Bytes(CHUNK as u64));
    group.bench_function("frame", |b| {
        b.iter(|| {
            let mut frame = Vec::with_capacity(FRAME_HEADER_LEN + CHUNK + 16);
            frame.resize(FRAME_HEADER_LEN, 0);
            frame.extend_from_slice(black_box(&plain));
            key.seal(0, 0, CHUNK as u32, &mut frame);
            frame
        });
    });
    let entries = vec![
        DirectoryEntry {
            id: [7; 32],
            stored_len: 4096,
            plain_len: 8192,
        };
        4096
    ];
    group.throughput(Throughput::Elements(entries.len() as u64));
    group.bench_function("directory of a pack", |b| {
        b.iter(|| seal_tail(&keys, &SCOPE, &header, black_box(&entries)));
    });
    group.finish();
}

/// A stanza in memory.
fn stanza() -> Arc<Stanza> {
    let url = RepositoryUrl {
        url: "memory://".to_owned(),
        ..Default::default()
    };
    let access = Access {
        repository: url.open(true).expect("a store in memory"),
        stanza: "bench".to_owned(),
        secret: Some(Secret::Key([1; 32])),
        memory: None,
        may_stretch: true,
        env: Arc::new(SystemEnv),
        trace: Default::default(),
    };
    let cluster = Cluster {
        system_identifier: 7,
        major: 17,
        wal_segment_size: 16 << 20,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let log = runtime.expect("a runtime").block_on(create(&access, cluster, "main"));
    log.expect("a stanza").stanza().clone()
}

fn packs(c: &mut Criterion) {
    let mut group = c.benchmark_group("packs");
    // Whatever it is, each byte is looked at once.
    let plain = [text(), heap()].concat();
    group.throughput(Throughput::Bytes(plain.len() as u64));
    group.bench_function("cutting a manifest segment", |b| {
        b.iter(|| cuts(black_box(&plain), Grain::COARSE).count())
    });
    let (finished_in, mut finished) = mpsc::channel(1);
    let packer = Packer::new(stanza(), Arc::new(SessionChunks::new(Index::default())), finished_in);
    group.sample_size(20);
    for (name, len) in [("512 KiB", CHUNK), ("8 KiB", 8 << 10)] {
        // As many as fill one pack: the last one ends it.
        let count = (limits::PACK_TARGET_BYTES as usize - HEADER_LEN).div_ceil(len + FRAME_OVERHEAD);
        let frame = |_| {
            let mut frame = Vec::with_capacity(len + FRAME_OVERHEAD);
            frame.resize(FRAME_HEADER_LEN, 0);
            frame.extend_from_slice(&plain[..len]);
            frame
        };
        group.throughput(Throughput::Bytes((count * len) as u64));
        group.bench_function(BenchmarkId::new("a pack of frames", name), |b| {
            b.iter_batched(
                || (0..count).map(frame).collect::<Vec<_>>(),
                |frames| {
                    for frame in frames {
                        let place = packer.add([7; 32], RAW, len as u32, frame);
                        place.expect("there is room for a pack");
                    }
                    // Whoever drops it makes room for the next one, and is not measured.
                    finished.try_recv().expect("the pack is full")
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

fn streams(c: &mut Criterion) {
    let mut group = c.benchmark_group("streams");
    let plain = text();
    let mut archive = vec![0u8; 512];
    archive[..4].copy_from_slice(b"file");
    archive[100..108].copy_from_slice(b"0000600\0");
    archive[124..136].copy_from_slice(format!("{CHUNK:011o}\0").as_bytes());
    archive[136..148].copy_from_slice(b"00000000000\0");
    archive[156] = b'0';
    archive[257..265].copy_from_slice(b"ustar\x0000");
    archive[148..156].fill(b' ');
    let sum: u32 = archive.iter().map(|&byte| u32::from(byte)).sum();
    archive[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    archive.extend_from_slice(&plain);
    group.throughput(Throughput::Bytes(archive.len() as u64));
    group.bench_function("tar", |b| {
        b.iter(|| {
            let (mut parser, mut events) = (Parser::default(), 0);
            for message in black_box(&archive).chunks(64 << 10) {
                let mut input = message;
                while parser.next(&mut input).expect("an archive").is_some() {
                    events += 1;
                }
            }
            events
        });
    });
    let run = run_of_wal();
    // In the middle of a segment, whose first page would say more.
    let walk = |run: &[u8]| summarize(run, Lsn(RUN_START), 64 << 20).records;
    assert!(walk(&run) > 10_000, "{} records", walk(&run));
    group.throughput(Throughput::Bytes(run.len() as u64));
    group.bench_function("walking WAL", |b| b.iter(|| walk(black_box(&run))));
    let segment: Vec<u8> = plain.iter().copied().cycle().take(16 << 20).collect();
    group.throughput(Throughput::Bytes(segment.len() as u64));
    group.sample_size(10);
    let keys = keys();
    group.bench_function("a WAL segment as an object", |b| {
        b.iter(|| {
            let header = proto::WalHeader::default();
            wal::seal_wal(
                &keys,
                &SCOPE,
                Kind::WalSegment,
                [5; 32],
                "x",
                header,
                black_box(&segment),
                3,
            )
        });
    });
    group.finish();
}

criterion_group!(
    stages, checks, transform, records, codec, all_cores, seal, packs, streams
);
criterion_main!(stages);
