//! Stores for the tests that run inside the engine: in memory, and failing in one chosen way.

#![allow(dead_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use fairvault_engine::commit::Log;
use fairvault_engine::env::SystemEnv;
use fairvault_engine::stanza::create::Cluster;
use fairvault_engine::stanza::{Access, Stanza};
use fairvault_engine::store::url::RepositoryUrl;
use fairvault_engine::store::{Store, StoreSettings};
use fairvault_format::keys::{EpochKeys, Secret};
use fairvault_format::log::seal_entry;
use fairvault_format::names;
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use fairvault_tests::Fixture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};

/// A cluster that nothing is asked of.
pub const CLUSTER: Cluster = Cluster {
    system_identifier: 7,
    major: 17,
    wal_segment_size: 16 << 20,
};

/// How tests open the stanza.
pub fn access(store: &Store, secret: Option<Secret>) -> Access {
    Access {
        repository: store.clone(),
        stanza: "acme".into(),
        secret,
        memory: None,
        may_stretch: true,
        env: Arc::new(SystemEnv),
        trace: Default::default(),
    }
}

/// A key file's secret.
pub fn key(byte: u8) -> Option<Secret> {
    Some(Secret::Key([byte; 32]))
}

/// The log of a fixture's stanza, as whoever has its key reads it; the repository is a folder.
pub async fn log_of(s: &Fixture) -> anyhow::Result<Log> {
    let url = RepositoryUrl {
        url: format!("file://{}", s.path("vault")),
        ..Default::default()
    };
    let secret = Secret::from_text(&std::fs::read(s.path("key"))?)?;
    let opened = access(&url.open(false)?, Some(secret));
    Ok(Log::open(Stanza::open(&opened).await?).await?)
}

/// A store in memory.
pub fn memory() -> Store {
    Store::new(
        Arc::new(object_store::memory::InMemory::new()),
        "",
        "memory://",
        StoreSettings::default(),
    )
}

/// Puts an entry behind the last one of a log, as somebody with these keys would.
pub async fn forge(store: &Store, log: &Log, keys: &EpochKeys, kind: Entry, snapshot: Vec<u8>) -> anyhow::Result<()> {
    let entry = proto::LogEntry {
        seq: log.state().seq + 1,
        previous: log.state().head.clone(),
        fence: log.state().fence,
        snapshot,
        kind: Some(kind),
        ..Default::default()
    };
    let sealed = seal_entry(keys, log.stanza().scope(), [entry.seq as u8; 32], &entry)?;
    let name = format!("acme/{}", names::log_context(entry.seq));
    store.put_hashed(&name, Bytes::from(sealed).into()).await?;
    Ok(())
}

/// What goes wrong in a [`Faulty`] store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing; requests are counted.
    None,
    /// Every third create is carried out and then answered with an error.
    LostAnswers,
    /// Create overwrites.
    NoConditionalCreate,
    /// Every other LIST is throttled the way Wasabi does it.
    ThrottledLists,
    /// WAL arrives in small parts, and every other time only half of it: with an error, or without.
    CutWal,
    /// Each segment is not there when it is asked for the first time: somebody stores it just then.
    LateWal,
    /// As soon as pieces of WAL were listed, what is [`Faulty::late`] takes their place.
    SealedOnceListed,
    /// As soon as one of them was read.
    SealedOnceRead,
    /// As soon as a folder was listed whose name has this in it, what is [`Faulty::late`] is there.
    LateOnceListed(&'static str),
}

/// A store that counts requests and fails in one way.
#[derive(Debug)]
pub struct Faulty {
    /// What holds the objects.
    pub inner: object_store::memory::InMemory,
    /// Requests so far.
    pub requests: AtomicU64,
    fault: Fault,
    asked: std::sync::Mutex<std::collections::HashSet<Path>>,
    /// Objects that take the place of pieces, or that somebody else has just stored.
    pub late: std::sync::Mutex<Vec<(Path, Bytes)>>,
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "faulty")
    }
}

impl Faulty {
    /// A new one.
    pub fn new(fault: Fault) -> Arc<Self> {
        Arc::new(Self {
            inner: object_store::memory::InMemory::new(),
            requests: AtomicU64::new(0),
            fault,
            asked: Default::default(),
            late: Default::default(),
        })
    }

    /// As a repository.
    pub fn store(self: &Arc<Self>) -> Store {
        Store::new(self.clone(), "", "faulty://", StoreSettings::default())
    }

    /// Every object.
    pub async fn objects(&self) -> Answer<Vec<(Path, Bytes)>> {
        let mut all = Vec::new();
        let mut listed = self.inner.list(None);
        while let Some(found) = listed.next().await {
            let path = found?.location;
            let bytes = self.inner.get(&path).await?.bytes().await?;
            all.push((path, bytes));
        }
        Ok(all)
    }

    /// Whoever receives has sealed a segment and removes its pieces.
    async fn seal(&self) -> Answer<()> {
        let late = std::mem::take(&mut *self.late.lock().expect("one at a time"));
        if late.is_empty() {
            return Ok(());
        }
        for (path, content) in late {
            self.inner
                .put_opts(&path, content.into(), PutOptions::default())
                .await?;
        }
        let mut listed = self.inner.list(None);
        while let Some(found) = listed.next().await {
            let path = found?.location;
            if path.as_ref().contains(".d/") {
                self.inner.delete(&path).await?;
            }
        }
        Ok(())
    }

    fn count(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed) + 1
    }
}

type Answer<T> = object_store::Result<T>;

fn is_in(folder: Option<&Path>, word: &str) -> bool {
    folder.map_or("", |folder| folder.as_ref()).contains(word)
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, l: &Path, p: PutPayload, mut o: PutOptions) -> Answer<PutResult> {
        let number = self.count();
        let creating = matches!(o.mode, PutMode::Create);
        if creating && self.fault == Fault::NoConditionalCreate {
            o.mode = PutMode::Overwrite;
        }
        let result = self.inner.put_opts(l, p, o).await;
        if creating && self.fault == Fault::LostAnswers && number.is_multiple_of(3) {
            return Err(object_store::Error::Generic {
                store: "faulty",
                source: "the answer was lost".into(),
            });
        }
        result
    }
    async fn put_multipart_opts(&self, l: &Path, o: PutMultipartOptions) -> Answer<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(l, o).await
    }
    async fn get_opts(&self, l: &Path, o: GetOptions) -> Answer<GetResult> {
        let number = self.count();
        let is_first = || self.asked.lock().is_ok_and(|mut asked| asked.insert(l.clone()));
        if self.fault == Fault::LateWal && l.as_ref().contains("/wal/") && is_first() {
            return Err(object_store::Error::NotFound {
                path: l.to_string(),
                source: "it comes just now".into(),
            });
        }
        let mut found = self.inner.get_opts(l, o).await?;
        if self.fault == Fault::SealedOnceRead && l.as_ref().contains(".d/") {
            self.seal().await?;
        }
        if self.fault == Fault::CutWal && l.as_ref().contains("/wal/") {
            let (meta, attributes, range, extensions) = (
                found.meta.clone(),
                found.attributes.clone(),
                found.range.clone(),
                found.extensions.clone(),
            );
            let all = found.bytes().await?;
            let len = if number.is_multiple_of(2) {
                all.len()
            } else {
                all.len() / 2
            };
            let mut parts: Vec<Answer<Bytes>> = all[..len]
                .chunks(9_999)
                .map(|part| Ok(Bytes::copy_from_slice(part)))
                .collect();
            if number % 4 == 1 {
                parts.push(Err(object_store::Error::Generic {
                    store: "faulty",
                    source: "the connection was lost".into(),
                }));
            }
            found = GetResult {
                payload: GetResultPayload::Stream(futures::stream::iter(parts).boxed()),
                meta,
                attributes,
                range,
                extensions,
            };
        }
        Ok(found)
    }
    fn delete_stream(&self, l: BoxStream<'static, Answer<Path>>) -> BoxStream<'static, Answer<Path>> {
        self.inner.delete_stream(l)
    }
    fn list(&self, p: Option<&Path>) -> BoxStream<'static, Answer<ObjectMeta>> {
        let number = self.count();
        if self.fault == Fault::ThrottledLists && number.is_multiple_of(2) {
            let error = object_store::Error::Generic {
                store: "faulty",
                source: "400 Bad Request: <Code>RequestRateLimitExceeded</Code>".into(),
            };
            return futures::stream::once(async { Err(error) }).boxed();
        }
        let listed = self.inner.list(p);
        if !matches!(self.fault, Fault::SealedOnceListed | Fault::LateOnceListed(_)) {
            return listed;
        }
        // What is listed is that from before; in memory, nothing is waited for.
        let found: Vec<_> = listed.collect().now_or_never().expect("in memory");
        let is_time = match self.fault {
            Fault::LateOnceListed(word) => is_in(p, word),
            _ => found
                .iter()
                .flatten()
                .any(|meta| meta.location.as_ref().contains(".d/")),
        };
        if is_time {
            let sealed = self.seal().now_or_never().expect("in memory");
            sealed.expect("in memory");
        }
        futures::stream::iter(found).boxed()
    }
    async fn list_with_delimiter(&self, p: Option<&Path>) -> Answer<ListResult> {
        self.count();
        let listed = self.inner.list_with_delimiter(p).await;
        if matches!(self.fault, Fault::LateOnceListed(word) if is_in(p, word)) {
            self.seal().await?;
        }
        listed
    }
    async fn copy_opts(&self, f: &Path, t: &Path, o: CopyOptions) -> Answer<()> {
        self.inner.copy_opts(f, t, o).await
    }
}
