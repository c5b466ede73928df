//! A stanza in a folder, with a memory and a clock of its own: where the tests of tallies begin.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use fairvault_format::keys::Secret;
use fairvault_format::proto::{Operation, log_entry::Kind as Entry};

use super::HOUR;
use crate::commit::Log;
use crate::env::{Env, SystemEnv};
use crate::error::Result;
use crate::stanza::memory::Memory;
use crate::stanza::{Access, Stanza, Trace, create};
use crate::store::url::RepositoryUrl;

pub(super) const HOUR_US: i64 = HOUR.as_micros() as i64;

#[derive(Debug)]
pub(super) struct Clock(AtomicI64);

impl Env for Clock {
    fn now_us(&self) -> i64 {
        self.0.load(Ordering::SeqCst)
    }

    fn random(&self, buffer: &mut [u8]) -> Result<()> {
        SystemEnv.random(buffer)
    }
}

pub(super) struct World {
    pub(super) folder: tempfile::TempDir,
    pub(super) clock: Arc<Clock>,
    pub(super) stanza: Arc<Stanza>,
}

/// How the stanza is opened. It was made for several writers: who takes it for one with a single writer may read its log,
/// and not write to it.
pub(super) fn access(folder: &Path, clock: &Arc<Clock>, single_writer: bool) -> Access {
    let url = RepositoryUrl {
        url: format!("file://{}", folder.join("vault").display()),
        single_writer,
        ..Default::default()
    };
    Access {
        repository: url.open(true).unwrap(),
        stanza: "acme".to_owned(),
        secret: Some(Secret::Key([7; 32])),
        memory: Some(Memory::new(folder.join("cache"))),
        may_stretch: true,
        env: clock.clone(),
        trace: Trace::default(),
    }
}

impl World {
    pub(super) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(Clock(AtomicI64::new(1_800_000_000_000_000)));
        let cluster = create::Cluster {
            system_identifier: 7,
            major: 15,
            wal_segment_size: 16 << 20,
        };
        let access = access(folder.path(), &clock, false);
        let log = create::create(&access, cluster, "main").await.unwrap();
        let stanza = log.stanza().clone();
        Self { folder, clock, stanza }
    }

    /// As another process opens it.
    pub(super) fn access(&self) -> Access {
        access(self.folder.path(), &self.clock, false)
    }

    pub(super) fn wait(&self, us: i64) {
        self.clock.0.fetch_add(us, Ordering::SeqCst);
    }

    /// Everything that was noted.
    pub(super) async fn noted(&self) -> Vec<Operation> {
        let log = Log::replay(self.stanza.clone()).await.unwrap();
        let kinds = log.entries().iter().filter_map(|entry| entry.kind.clone());
        let noted = kinds.filter_map(|kind| match kind {
            Entry::Operation(operation) => Some(operation),
            _ => None,
        });
        noted.collect()
    }
}
