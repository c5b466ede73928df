//! What this process has left in the log of a stanza: whoever runs a command sees by it what is still to be noted there.
//!
//! What always holds: all that is opened by copies of one [`Access`](super::Access) shares one trace; nothing about the
//! stanza is decided by it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What this process has left in the log of a stanza so far.
#[derive(Debug, Clone, Default)]
pub struct Trace(Arc<Marks>);

#[derive(Debug, Default)]
struct Marks {
    was_read: AtomicBool,
    has_entry: AtomicBool,
    has_failure: AtomicBool,
}

impl Trace {
    /// Whether the log was read to its end, and says of no erasure.
    pub fn was_read(&self) -> bool {
        self.0.was_read.load(Ordering::SeqCst)
    }

    /// Whether an entry of this process is there.
    pub fn has_entry(&self) -> bool {
        self.0.has_entry.load(Ordering::SeqCst)
    }

    /// Whether an entry of this process says that something failed, and why.
    pub fn has_failure(&self) -> bool {
        self.0.has_failure.load(Ordering::SeqCst)
    }

    pub(crate) fn mark_read(&self) {
        self.0.was_read.store(true, Ordering::SeqCst);
    }

    pub(crate) fn mark_entry(&self) {
        self.0.has_entry.store(true, Ordering::SeqCst);
    }

    pub(crate) fn mark_failure(&self) {
        self.0.has_failure.store(true, Ordering::SeqCst);
    }
}
