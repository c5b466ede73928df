//! What a server is asked for, and what becomes of its answers. The server is played by the test.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::channel;

use super::*;
use crate::progress::Progress;
use crate::replication::connection::Mode;
use crate::track::selection::Selection;

const CHUNK: usize = CHUNK_BYTES as usize;
const PAGE: usize = BLOCK_BYTES as usize;

/// A file as it is listed.
fn file(number: u32, path: &str, size: usize) -> File {
    let size = size as u64;
    File {
        number,
        path: path.into(),
        size,
        chunks: match is_whole(path, size) {
            true => Chunks::Whole,
            false => Chunks::Of(Wanted::All.chunks(size)),
        },
    }
}

/// How often a file's one chunk is asked for whose content is always this.
fn times(path: &str, content: &[u8], checksums: bool) -> usize {
    let queue = Queue::new(vec![file(3, path, content.len())], checksums);
    let mut times = 0;
    loop {
        let asked = queue.next();
        let [chunk] = &asked[..] else { return times };
        assert_eq!((chunk.number, &*chunk.path, chunk.missing), (3, path, 1));
        assert_eq!(
            chunk.likely,
            (content.len() as u64).max(u64::from(BLOCK_BYTES)),
            "what a limit of the rate counts"
        );
        times += 1;
        queue.take_or_ask_again(chunk, content);
    }
}

#[test]
fn a_chunk_with_a_torn_page_is_asked_for_again_a_few_times() {
    let wrong = [7; 2 * PAGE];
    assert_eq!(times("base/5/77", &wrong, true), 1 + READS);
    // There is nothing to be wrong.
    assert_eq!(times("base/5/77", &wrong, false), 1);
    assert_eq!(times("base/5/77", &[0; 2 * PAGE], true), 1);
    assert_eq!(times("pg_xact/0000", &wrong, true), 1);
    assert_eq!(times("PG_VERSION", b"15\n", true), 1);
}

/// Lengths with which files are listed.
const GREW: usize = 10 << 20;
const SHRANK: usize = 2 * CHUNK + PAGE;
/// Files of a page each behind the others.
const SMALL: u32 = 600;

fn listed() -> Vec<File> {
    let mut files = vec![
        file(0, "base/5/77", GREW),
        file(1, "base/5/78", SHRANK),
        file(2, "base/5/79", 2 * CHUNK),
        file(3, "PG_VERSION", 3),
    ];
    files.extend((0..SMALL).map(|small| file(4 + small, &format!("base/5/{}", 20_000 + small), PAGE)));
    files
}

fn byte(at: usize) -> u8 {
    (at ^ at >> 8 ^ at >> 16) as u8 | 1
}

/// What the server has of them by then; `None` if the file is gone.
fn content(path: &str, offset: usize, len: usize) -> Option<Vec<u8>> {
    let end = match path {
        "base/5/77" => GREW + 9000,
        "base/5/78" => CHUNK + 5000,
        "base/5/79" if offset > 0 => return None,
        "PG_VERSION" => 6,
        _ => usize::MAX,
    };
    Some((offset..end.min(offset + len)).map(byte).collect())
}

/// The next message of a client; the first one of a session has no type.
async fn message(socket: &mut TcpStream, is_first: bool) -> Vec<u8> {
    if !is_first {
        assert_eq!(socket.read_u8().await.unwrap(), b'Q', "no simple query");
    }
    let len = socket.read_u32().await.unwrap() as usize;
    let mut body = vec![0; len - 4];
    socket.read_exact(&mut body).await.unwrap();
    body
}

/// A message of the server.
fn said(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[kind][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

/// The ranges that a query asks for: path, offset, length.
fn asked_for(query: &[u8]) -> Vec<(String, usize, usize)> {
    let text = std::str::from_utf8(query).unwrap();
    let (_, values) = text.split_once("VALUES (").unwrap();
    let (values, _) = values.split_once(")) AS r").unwrap();
    let number = |text: &str| text.trim_end_matches("::bigint").parse::<usize>().unwrap();
    let range = |(at, row): (usize, &str)| {
        let row: Vec<&str> = row.split(", ").collect();
        let [first, path, offset, len] = row[..] else {
            panic!("{row:?}")
        };
        assert_eq!(number(first), at);
        (path.trim_matches('\'').to_owned(), number(offset), number(len))
    };
    values.split("), (").enumerate().map(range).collect()
}

fn answer_to(query: &[u8]) -> Vec<u8> {
    let mut rows = [&b"PGCOPY\n\xff\r\n\0"[..], &[0; 8]].concat();
    for (number, (path, offset, len)) in (0i32..).zip(asked_for(query)) {
        let bytes = content(&path, offset, len);
        rows.extend(2i16.to_be_bytes());
        rows.extend(4i32.to_be_bytes());
        rows.extend(number.to_be_bytes());
        rows.extend(bytes.as_ref().map_or(-1, |bytes| bytes.len() as i32).to_be_bytes());
        rows.extend(bytes.unwrap_or_default());
    }
    rows.extend((-1i16).to_be_bytes());
    let mut answer = said(b'H', &[1, 0, 2, 0, 1, 0, 1]);
    for part in rows.chunks(60_000) {
        answer.extend(said(b'd', part));
    }
    for (kind, body) in [(b'c', &b""[..]), (b'C', &b"COPY 1\0"[..]), (b'Z', &b"I"[..])] {
        answer.extend(said(kind, body));
    }
    answer
}

/// One session of so many queries, each of which is answered only once the next one is there.
async fn serve(listener: TcpListener, queries: usize) {
    let (mut socket, _) = listener.accept().await.unwrap();
    message(&mut socket, true).await;
    for (kind, body) in [
        (b'R', &[0; 4][..]),
        (b'S', &b"server_version\x0015.1\0"[..]),
        (b'Z', &b"I"[..]),
    ] {
        socket.write_all(&said(kind, body)).await.unwrap();
    }
    let mut last = message(&mut socket, false).await;
    for _ in 1..queries {
        let next = message(&mut socket, false).await;
        socket.write_all(&answer_to(&last)).await.unwrap();
        last = next;
    }
    socket.write_all(&answer_to(&last)).await.unwrap();
}

/// Finds a query that waits for the answer to the one before, one that asks for too little or too much, and ranges that
/// come to lie in the wrong place.
#[tokio::test]
async fn ranges_are_asked_for_together_and_ahead_whatever_becomes_of_files() {
    let queue = Queue::new(listed(), false);
    let all = std::iter::from_fn(|| Some(queue.next()).filter(|asked| !asked.is_empty()));
    let sizes: Vec<(u64, usize)> = all
        .map(|asked| (asked.iter().map(|chunk| chunk.likely).sum(), asked.len()))
        .collect();
    assert!(sizes.len() > 4, "{sizes:?}");
    for (number, &(bytes, rows)) in sizes.iter().enumerate() {
        let is_full = bytes >= QUERY_BYTES || rows == QUERY_RANGES || number + 1 == sizes.len();
        assert!(is_full && bytes < QUERY_BYTES + u64::from(CHUNK_BYTES), "{sizes:?}");
    }

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let info = format!("host=127.0.0.1 port={port} user=r dbname=postgres sslmode=disable");
    let info = ConnInfo::parse_with(&info, &|_| None).unwrap();
    let (chunks, mut read) = channel(1024);
    let feed = Feed::new(chunks, Arc::new(Progress::default()), Selection::default());
    let queue = Arc::new(Queue::new(listed(), false));
    let client = async {
        let connection = Connection::open(&info, Mode::Sql).await?;
        read_ranges(connection, queue.clone(), feed.outlet(), Arc::new(Pace::new(None))).await
    };
    let both = async { tokio::join!(serve(listener, sizes.len()), client) };
    let both = tokio::time::timeout(Duration::from_secs(60), both).await;
    let ((), done) = both.expect("a query waits for the answer to the one before");
    done.unwrap();
    drop(feed);

    let mut found: BTreeMap<(u32, u64), Bytes> = BTreeMap::new();
    while let Some(chunk) = read.recv().await {
        let run = chunk.runs[0];
        assert_eq!((chunk.runs.len(), run.len as usize), (1, chunk.bytes.len()));
        let before = found.insert((chunk.file, run.offset), chunk.bytes);
        assert!(before.is_none(), "{} at {} came twice", chunk.path, run.offset);
    }
    let of = |number: u32| -> Vec<u8> {
        let chunks = found.range((number, 0)..(number + 1, 0));
        chunks.flat_map(|(_, bytes)| bytes.to_vec()).collect()
    };
    let bytes = |len: usize| -> Vec<u8> { (0..len).map(byte).collect() };
    assert!(of(0) == bytes(GREW), "what grew has the length that it was listed with");
    let mut shrank = bytes(CHUNK + 5000);
    shrank.resize(SHRANK, 0);
    assert!(of(1) == shrank, "what shrank is padded with zeros");
    assert!(of(3) == bytes(6), "what may be replaced is whole");
    assert!((0..SMALL).all(|small| of(4 + small) == bytes(PAGE)));
    let ended = queue.ended();
    assert_eq!((ended.vanished, ended.sizes), (vec![2], vec![(3, 6)]));
}
