//! Counters that a long operation keeps and that a display reads.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// A counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Sets.
    pub fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How far a backup or a restore is.
#[derive(Debug, Default)]
pub struct Progress {
    phases: Mutex<Vec<&'static str>>,
    /// Bytes to go through; an estimate, 0 if not known.
    pub total_bytes: Counter,
    /// Bytes of the cluster read (backup) or written (restore).
    pub read_bytes: Counter,
    /// Of these, bytes that were already in the repository.
    pub deduplicated_bytes: Counter,
    /// Bytes of packs stored (backup) or fetched (restore).
    pub stored_bytes: Counter,
    /// Files, folders and links seen.
    pub files: Counter,
    /// WAL bytes streamed.
    pub wal_bytes: Counter,
}

impl Progress {
    /// Names what is being done.
    pub fn phase(&self, phase: &'static str) {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).push(phase);
        tracing::debug!("{phase}");
    }

    /// What was named so far, in order; the last one is being done.
    pub fn phases(&self) -> Vec<&'static str> {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
