//! A store that gives no answer, and does later what it was asked to: whoever looks meanwhile reads that nothing is there.
//! Nobody takes that for the end of it.

mod stores;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, ensure};
use fairvault_engine::commit::Log;
use fairvault_engine::commit::session::Session;
use fairvault_engine::error::{Error, Kind};
use fairvault_engine::stanza::Stanza;
use fairvault_engine::stanza::create::create;
use fairvault_engine::store::{Store, StoreSettings};
use fairvault_format::{names, proto, sha256};
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult,
};

use stores::{CLUSTER, access, key};

type Answer<T> = object_store::Result<T>;

/// Holds back uploads of log entries.
#[derive(Debug, Default)]
struct Late {
    inner: InMemory,
    /// How many of the next ones.
    next: Mutex<u64>,
    held: Mutex<Vec<(Path, PutPayload, PutOptions)>>,
}

impl Late {
    fn store(self: &Arc<Self>) -> Store {
        let settings = StoreSettings {
            retry_timeout: Duration::from_millis(300),
            ..Default::default()
        };
        Store::new(self.clone(), "", "late://", settings)
    }

    fn hold(&self, next: u64) {
        *self.next.lock().expect("one at a time") = next;
    }

    /// What was held back comes in; returns how many uploads that were, and how many of them found the name free.
    async fn deliver(&self) -> (usize, usize) {
        self.hold(0);
        let held = std::mem::take(&mut *self.held.lock().expect("one at a time"));
        let (all, mut stored) = (held.len(), 0);
        for (path, payload, options) in held {
            stored += usize::from(self.inner.put_opts(&path, payload, options).await.is_ok());
        }
        (all, stored)
    }
}

impl std::fmt::Display for Late {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "late")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Late {
    async fn put_opts(&self, l: &Path, p: PutPayload, o: PutOptions) -> Answer<PutResult> {
        let is_held = || {
            let mut next = self.next.lock().expect("one at a time");
            let is_held = *next > 0;
            *next = next.saturating_sub(1);
            is_held
        };
        if l.as_ref().contains("/log/") && is_held() {
            self.held.lock().expect("one at a time").push((l.clone(), p, o));
            return Err(object_store::Error::Generic {
                store: "late",
                source: "no answer came".into(),
            });
        }
        self.inner.put_opts(l, p, o).await
    }
    async fn put_multipart_opts(&self, l: &Path, o: PutMultipartOptions) -> Answer<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(l, o).await
    }
    async fn get_opts(&self, l: &Path, o: GetOptions) -> Answer<GetResult> {
        self.inner.get_opts(l, o).await
    }
    fn delete_stream(&self, l: BoxStream<'static, Answer<Path>>) -> BoxStream<'static, Answer<Path>> {
        self.inner.delete_stream(l)
    }
    fn list(&self, p: Option<&Path>) -> BoxStream<'static, Answer<ObjectMeta>> {
        self.inner.list(p)
    }
    async fn list_with_delimiter(&self, p: Option<&Path>) -> Answer<ListResult> {
        self.inner.list_with_delimiter(p).await
    }
    async fn copy_opts(&self, f: &Path, t: &Path, o: CopyOptions) -> Answer<()> {
        self.inner.copy_opts(f, t, o).await
    }
}

async fn open(store: &Store) -> Result<Log> {
    Ok(Log::open(Stanza::open(&access(store, key(1))).await?).await?)
}

/// Stores the root of a backup and commits it, while the next so many uploads to the log are held back. Returns the log as
/// the writer has it, the root's name, and how that ended.
async fn commit(late: &Arc<Late>, held: u64) -> Result<(Log, String, Result<(), Error>)> {
    let store = late.store();
    let mut log = create(&access(&store, key(1)), CLUSTER, "main").await?;
    let session = Session::begin(&mut log, "backup", |_| "b".into()).await?;
    let bytes = b"what a backup has".to_vec();
    let root = sha256(&bytes);
    log.stanza()
        .store()
        .put_hashed(&names::root(&root), bytes.into())
        .await?;
    let info = proto::BackupInfo {
        id: session.backup().to_owned(),
        ..Default::default()
    };
    late.hold(held);
    let ended = session.commit(&mut log, root, info).await;
    Ok((log, names::root(&root), ended))
}

/// The same bytes are sent again, and what comes late finds its name taken.
#[tokio::test(start_paused = true)]
async fn what_is_sent_again_counts_once() -> Result<()> {
    let late = Arc::new(Late::default());
    let (log, _, ended) = commit(&late, 1).await?;
    ended?;
    ensure!(late.deliver().await == (1, 0));
    let again = open(&late.store()).await?;
    ensure!(again.state().backups.len() == 1 && again.state() == log.state());
    Ok(())
}

/// The writer gives up without knowing; nothing can be read; and when the commit comes, all that it names is there.
#[tokio::test(start_paused = true)]
async fn a_commit_that_cannot_be_seen_may_still_come() -> Result<()> {
    let late = Arc::new(Late::default());
    let (log, root, ended) = commit(&late, u64::MAX).await?;
    ensure!(
        ended.is_err_and(|error| error.kind() == Kind::Temporary),
        "nobody can know that it failed"
    );
    let meanwhile = open(&late.store()).await?;
    ensure!(meanwhile.state().backups.is_empty() && meanwhile.state().seq == log.state().seq);
    let (all, stored) = late.deliver().await;
    ensure!(all > 1 && stored == 1, "{stored} of {all}");
    let then = open(&late.store()).await?;
    ensure!(then.state().backups.len() == 1 && then.state().seq == log.state().seq + 1);
    let there = then.stanza().store().len(&root).await?;
    ensure!(there.is_some(), "the backup counts, and {root} is gone");
    Ok(())
}

/// Whoever writes next decides: what comes after that does not count, and overwrites nothing.
#[tokio::test(start_paused = true)]
async fn whoever_writes_meanwhile_keeps_the_place() -> Result<()> {
    let late = Arc::new(Late::default());
    let (_, _, ended) = commit(&late, u64::MAX).await?;
    ensure!(ended.is_err());
    late.hold(0);
    let mut other = open(&late.store()).await?;
    let session = Session::begin(&mut other, "test", |_| "x".into()).await?;
    let (all, stored) = late.deliver().await;
    ensure!(all > 1 && stored == 0, "{stored} of {all}");
    session.abort(&mut other, "").await?;
    let then = open(&late.store()).await?;
    ensure!(then.state().backups.is_empty() && then.state() == other.state());
    Ok(())
}
