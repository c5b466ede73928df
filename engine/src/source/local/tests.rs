//! Files that change while they are read, in a folder without a server.

use std::cell::Cell;
use std::collections::BTreeMap;

use fairvault_format::limits::CHUNK_BYTES;
use tokio::sync::mpsc::{Receiver, channel};

use super::*;
use crate::postgres::page;
use crate::progress::Progress;
use crate::source::PIPELINE_GONE;
use crate::source::again::READS;

/// The number of the first file: others have entries as well.
const FIRST: u32 = 7;
const CHUNK: usize = CHUNK_BYTES as usize;
const PAGE: usize = 8192;

/// A reader, and what comes of it; so many chunks may wait to be taken.
fn new_reader(room: usize, checksums: bool) -> (Reader, Receiver<Chunk>) {
    let (chunks, read) = channel(room);
    let feed = Feed::new(chunks, Arc::new(Progress::default()), Selection::default());
    let reader = Reader {
        first: FIRST,
        outlet: feed.outlet(),
        selection: Selection::default(),
        pace: Pace::new(None),
        checksums,
        failed: AtomicBool::new(false),
    };
    (reader, read)
}

/// A file as it is listed.
fn found(folder: &Path, name: &str) -> Found {
    let file = folder.join(name);
    let size = std::fs::metadata(&file).map_or(0, |meta| meta.len());
    Found {
        path: format!("base/5/{name}"),
        file,
        size,
    }
}

/// The content of each file, by its number. The reader must be gone.
fn content(mut read: Receiver<Chunk>) -> BTreeMap<u32, Vec<u8>> {
    let mut chunks = Vec::new();
    while let Some(chunk) = read.blocking_recv() {
        chunks.push(chunk);
    }
    chunks.sort_by_key(|chunk| (chunk.file, chunk.runs[0].offset));
    let mut content: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    for chunk in chunks {
        let of_file = content.entry(chunk.file).or_default();
        assert_eq!(chunk.runs[0].offset, of_file.len() as u64, "{}", chunk.path);
        assert_eq!(chunk.runs[0].len as usize, chunk.bytes.len(), "{}", chunk.path);
        of_file.extend_from_slice(&chunk.bytes);
    }
    content
}

/// Bytes of which none is zero, and no two chunks are the same.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at ^ at >> 8 ^ at >> 16) as u8 | 1).collect()
}

/// A job on an open file.
fn job(file: File, runs: Vec<Run>) -> Job {
    let open = Open {
        number: FIRST,
        path: "base/5/77".into(),
        file,
    };
    Job {
        open: Arc::new(open),
        runs: runs.into(),
    }
}

#[test]
fn files_that_vanished_are_left_out_and_the_others_keep_their_content() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    std::fs::create_dir(at.join("dropped")).unwrap();
    let names = ["a", "b", "dropped/c", "d", "empty", "e"];
    for name in names {
        std::fs::write(at.join(name), if name == "empty" { "" } else { name }).unwrap();
    }
    let files = names.map(|name| found(at, name));
    std::fs::remove_file(at.join("b")).unwrap();
    std::fs::remove_dir_all(at.join("dropped")).unwrap();
    let (reader, read) = new_reader(16, false);
    let entries = reader.read_all(files.into(), 2).unwrap();
    drop(reader);
    let sizes: Vec<(&str, u64)> = entries.iter().map(|entry| (&*entry.path, entry.size)).collect();
    let expected = [("base/5/a", 1), ("base/5/d", 1), ("base/5/empty", 0), ("base/5/e", 1)];
    assert_eq!(sizes, expected);
    // Numbers are those of the entries: nothing is skipped for what is left out, and an empty file has one.
    let expected = [(0, "a"), (1, "d"), (3, "e")].map(|(number, text)| (FIRST + number, text.as_bytes().to_vec()));
    assert_eq!(content(read), BTreeMap::from(expected));
}

#[test]
fn a_file_has_the_length_with_which_it_was_opened() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let before = bytes(2 * CHUNK + 3000);
    let names = ["emptied", "grew", "removed", "shrank"];
    for name in names {
        std::fs::write(at.join(name), &before).unwrap();
    }
    let (reader, read) = new_reader(16, false);
    let (jobs_in, jobs) = mpsc::sync_channel(16);
    let files = names.map(|name| found(at, name));
    let entries = reader.open_all(files.into(), &jobs_in).unwrap();
    drop(jobs_in);
    assert!(entries.iter().all(|entry| entry.size == before.len() as u64));
    // In the middle of the second chunk, and of a page.
    let kept = CHUNK + 12_345;
    let open = |name: &str| File::options().append(true).open(at.join(name)).unwrap();
    open("shrank").set_len(kept as u64).unwrap();
    open("emptied").set_len(0).unwrap();
    std::io::Write::write_all(&mut open("grew"), &[0xEE; 10_000]).unwrap();
    std::fs::remove_file(at.join("removed")).unwrap();
    for job in jobs {
        reader.read(&job).unwrap();
    }
    drop(reader);
    let content = content(read);
    let mut shrank = before.clone();
    shrank[kept..].fill(0);
    assert!(content[&FIRST] == vec![0; before.len()], "emptied");
    assert!(content[&(FIRST + 1)] == before, "grew");
    assert!(content[&(FIRST + 2)] == before, "removed");
    assert!(content[&(FIRST + 3)] == shrank, "shrank");
}

#[test]
fn gathered_blocks_are_read_one_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let all = bytes(5 * PAGE);
    std::fs::write(folder.path().join("file"), &all).unwrap();
    let file = File::open(folder.path().join("file")).unwrap();
    let runs = [(1, 1), (3, 4)].map(|(block, count)| Run {
        offset: block * PAGE as u64,
        len: count * PAGE as u32,
    });
    let (reader, mut read) = new_reader(1, false);
    reader.read(&job(file, runs.into())).unwrap();
    let chunk = read.blocking_recv().unwrap();
    assert_eq!(
        (chunk.file, &*chunk.path, &*chunk.runs),
        (FIRST, "base/5/77", &runs[..])
    );
    // The second run begins inside of the file and ends behind it.
    let expected = [&all[PAGE..2 * PAGE], &all[3 * PAGE..], &vec![0; 2 * PAGE]].concat();
    assert!(chunk.bytes == expected);
}

#[test]
fn what_cannot_be_read_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    std::fs::write(at.join("file"), "x").unwrap();
    // There is something, and it cannot be opened.
    let (reader, _read) = new_reader(1, false);
    let error = reader.read_all(vec![found(at, "file/below")], 2).unwrap_err();
    assert!(error.to_string().contains("file/below"), "{error}");
    // It was opened, and cannot be read: a folder has no bytes.
    let run = Run {
        offset: 8192,
        len: 8192,
    };
    let error = reader.read(&job(File::open(at).unwrap(), vec![run])).unwrap_err();
    assert!(error.to_string().contains("base/5/77 at 8192"), "{error}");
    if !rustix::process::geteuid().is_root() {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(at.join("file"), std::fs::Permissions::from_mode(0o0)).unwrap();
        let error = reader.read_all(vec![found(at, "file")], 2).unwrap_err();
        assert!(error.to_string().contains("/file: "), "{error}");
    }
}

#[test]
fn when_nobody_takes_chunks_all_readers_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = File::create(folder.path().join("large")).unwrap();
    // More chunks than may wait anywhere; nothing is stored of them.
    file.set_len(100 * CHUNK as u64).unwrap();
    let (reader, read) = new_reader(1, false);
    drop(read);
    let error = reader.read_all(vec![found(folder.path(), "large")], 3).unwrap_err();
    assert_eq!(error.to_string(), PIPELINE_GONE);
}

#[test]
fn a_page_that_is_torn_at_first_is_read_again_and_never_handed_on_that_way() {
    let folder = tempfile::tempdir().unwrap();
    let mut good = vec![9; 2 * PAGE];
    for (block, page) in (0..).zip(good.chunks_exact_mut(PAGE)) {
        let sum = page::checksum(page, block);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
    }
    std::fs::write(folder.path().join("77"), &good).unwrap();
    let mut torn = good.clone();
    torn[PAGE + 4096..].fill(0x5A);
    // How often the file's end is torn while it is read; whether the cluster has checksums; how often it is read;
    // whether what is handed on is right.
    for (tears, checksums, expected, is_right) in [
        (0, true, 1, true),
        (1, true, 2, true),
        (READS, true, 1 + READS, true),
        (READS + 1, true, 1 + READS, false),
        (1, false, 1, false),
    ] {
        let job = job(
            File::open(folder.path().join("77")).unwrap(),
            vec![Run {
                offset: 0,
                len: 2 * PAGE as u32,
            }],
        );
        let (reader, mut read) = new_reader(1, checksums);
        let reads = Cell::new(0);
        reader
            .read_with(&job, |bytes, offset| {
                read_at(&job.open.file, bytes, offset)?;
                reads.set(reads.get() + 1);
                if reads.get() <= tears {
                    let from = (PAGE as u64 + 4096 - offset) as usize;
                    bytes[from..].fill(0x5A);
                }
                Ok(())
            })
            .unwrap();
        let handed_on = read.blocking_recv().unwrap().bytes;
        assert_eq!(reads.get(), expected, "{tears} tears");
        assert!(handed_on == if is_right { &good } else { &torn }, "{tears} tears");
    }
}
