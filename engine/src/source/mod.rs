//! Bytes out of a cluster. Every source feeds the same pipeline: entries of the file tree, and chunks of
//! file content that begin at multiples of the chunk size.

mod again;
pub mod backup_mode;
mod copy_rows;
pub mod local;
mod pace;
pub mod sql;

pub mod stream;
pub mod tar;
mod walk;
mod wanted;

use std::sync::Arc;

use bytes::Bytes;
use fairvault_format::proto::FileKind;
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::track::selection::Selection;
pub use wanted::{Run, Wanted};

/// How to read.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    /// Threads, or connections.
    pub readers: usize,
    /// Bytes a second.
    pub rate: Option<u64>,
    /// The cluster has checksums: pages that are wrong are read again.
    pub checksums: bool,
}

/// A file, folder or link, without its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the data directory; tablespaces below `pg_tblspc/<oid>`.
    pub path: String,
    /// What it is.
    pub kind: FileKind,
    /// Length, bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, microseconds since 1970.
    pub mtime_us: i64,
    /// Target of a link.
    pub link_target: String,
    /// It vanished while it was read, and is no part of the backup.
    pub is_gone: bool,
    /// What of it is read.
    pub wanted: Wanted,
}

/// A chunk of file content.
#[derive(Debug)]
pub struct Chunk {
    /// Number of the entry.
    pub file: u32,
    /// The entry's path, for messages and to know whether it has checksummed pages.
    pub path: Arc<str>,
    /// Where it is in the file, in order: one run, or gathered blocks.
    pub runs: Box<[Run]>,
    /// Content of the runs, one after the other.
    pub bytes: Bytes,
    /// The source has found the checksum of every page right.
    pub is_verified: bool,
}

/// What a source says when the stage behind it is gone; the cause is that stage's.
pub const PIPELINE_GONE: &str = "the pipeline has ended early";

/// Where a source puts what it reads.
pub struct Feed {
    entries: Vec<Entry>,
    chunks: mpsc::Sender<Chunk>,
    progress: Arc<Progress>,
    selection: Selection,
}

impl Feed {
    /// A feed into a bounded channel, of what `selection` says.
    pub fn new(chunks: mpsc::Sender<Chunk>, progress: Arc<Progress>, selection: Selection) -> Self {
        Self {
            entries: Vec::new(),
            chunks,
            progress,
            selection,
        }
    }

    /// What is to be read.
    pub fn selection(&self) -> &Selection {
        &self.selection
    }

    /// Bytes that came and are in the parent.
    pub fn passed_over(&self, bytes: u64) {
        self.progress.read_bytes.add(bytes);
        self.progress.deduplicated_bytes.add(bytes);
    }

    /// How much there is to read, as far as that is known.
    pub fn total(&self, bytes: u64) {
        self.progress.total_bytes.set(bytes);
    }

    /// The number that the next entry gets.
    pub fn next_number(&self) -> u32 {
        self.entries.len() as u32
    }

    /// For threads that read.
    pub fn outlet(&self) -> Outlet {
        Outlet {
            chunks: self.chunks.clone(),
            progress: self.progress.clone(),
        }
    }

    /// Adds an entry; its number goes with its chunks.
    pub fn entry(&mut self, entry: Entry) -> u32 {
        self.entries.push(entry);
        self.progress.files.add(1);
        self.entries.len() as u32 - 1
    }

    /// Hands a chunk on; waits while the pipeline is full.
    pub async fn chunk(&self, chunk: Chunk) -> Result<()> {
        self.progress.read_bytes.add(chunk.bytes.len() as u64);
        self.chunks.send(chunk).await.map_err(|_| Error::failed(PIPELINE_GONE))
    }

    /// Takes back entries of files that have vanished; their chunks count for nothing.
    pub fn left_out(&mut self, numbers: &[u32]) {
        for &number in numbers {
            self.entries[number as usize].is_gone = true;
        }
    }

    /// Files that turned out to have other lengths than they were listed with.
    pub fn resize(&mut self, sizes: &[(u32, u64)]) {
        for &(number, size) in sizes {
            self.entries[number as usize].size = size;
        }
    }

    /// The entries, in the order of their numbers. Closes the feed.
    pub fn finish(self) -> Vec<Entry> {
        self.entries
    }
}

/// The way for chunks out of threads.
pub struct Outlet {
    chunks: mpsc::Sender<Chunk>,
    progress: Arc<Progress>,
}

impl Outlet {
    /// Hands a chunk on; waits while the pipeline is full.
    pub async fn send_async(&self, chunk: Chunk) -> Result<()> {
        self.progress.read_bytes.add(chunk.bytes.len() as u64);
        self.chunks.send(chunk).await.map_err(|_| Error::failed(PIPELINE_GONE))
    }

    /// Hands a chunk on; blocks while the pipeline is full.
    pub fn send(&self, chunk: Chunk) -> Result<()> {
        self.progress.read_bytes.add(chunk.bytes.len() as u64);
        self.chunks
            .blocking_send(chunk)
            .map_err(|_| Error::failed(PIPELINE_GONE))
    }
}
