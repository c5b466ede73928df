//! Rules of the repository, on a directory, in memory and on an S3 server over HTTP.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, bail, ensure};
use bytes::Bytes;
use fairvault_engine::commit::Log;
use fairvault_engine::commit::session::Session;
use fairvault_engine::env::SystemEnv;
use fairvault_engine::error::Kind;
use fairvault_engine::stanza::create::{Cluster, create};
use fairvault_engine::stanza::memory::Memory;
use fairvault_engine::stanza::{Access, Stanza};
use fairvault_engine::store::probe::probe;
use fairvault_engine::store::url::RepositoryUrl;
use fairvault_engine::store::{Created, Store, StoreSettings};
use fairvault_format::keys::Secret;
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use fairvault_tests::Scratch;
use fairvault_tests::s3::S3;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};

const CLUSTER: Cluster = Cluster {
    system_identifier: 7,
    major: 17,
    wal_segment_size: 16 << 20,
};

fn access(store: &Store, secret: Option<Secret>) -> Access {
    Access {
        repository: store.clone(),
        stanza: "acme".into(),
        secret,
        memory: None,
        may_stretch: true,
        env: Arc::new(SystemEnv),
    }
}

fn key(byte: u8) -> Option<Secret> {
    Some(Secret::Key([byte; 32]))
}

fn memory() -> Store {
    Store::new(
        Arc::new(object_store::memory::InMemory::new()),
        "",
        "memory://",
        StoreSettings::default(),
    )
}

/// The rules that every store has to carry.
async fn conformance(store: &Store) -> Result<()> {
    probe(store, &SystemEnv).await?;
    // Create-only, with the outcome known.
    ensure!(store.create("a/b", Bytes::from_static(b"1")).await? == Created::Won);
    ensure!(
        store.create("a/b", Bytes::from_static(b"1")).await? == Created::Won,
        "our own bytes are a win"
    );
    ensure!(store.create("a/b", Bytes::from_static(b"2")).await? == Created::Lost(Bytes::from_static(b"1")));
    ensure!(store.get_opt("a/none").await?.is_none() && store.len("a/none").await?.is_none());
    store
        .put_hashed("a/c", Bytes::from_static(b"0123456789").into())
        .await?;
    store
        .put_hashed("a/c", Bytes::from_static(b"0123456789").into())
        .await?;
    ensure!(store.get_range("a/c", 2..5).await? == "234" && store.get_range("a/c", 8..100).await? == "89");
    ensure!(store.list("a").await? == [("a/b".to_owned(), 1), ("a/c".to_owned(), 10)]);
    store.delete(&["a/c".to_owned(), "a/none".to_owned()]).await?;
    ensure!(store.get_opt("a/c").await?.is_none());

    // A stanza: created twice is the same, another cluster or a wrong key is refused.
    let log = create(&access(store, key(1)), CLUSTER, "main").await?;
    ensure!(log.state().seq == 1);
    ensure!(create(&access(store, key(1)), CLUSTER, "main").await?.state().seq == 1);
    let other = Cluster {
        system_identifier: 8,
        ..CLUSTER
    };
    ensure!(
        create(&access(store, key(1)), other, "main")
            .await
            .is_err_and(|e| e.to_string().contains("system identifier"))
    );
    for (secret, word) in [
        (key(2), "wrong key"),
        (None, "is encrypted"),
        (Some(Secret::Passphrase(b"x".to_vec())), "of a kind"),
    ] {
        match Stanza::open(&access(store, secret)).await {
            Ok(_) => bail!("{word}: it opened"),
            Err(error) => ensure!(
                error.to_string().contains(word) && error.kind() == Kind::Refused,
                "{error}"
            ),
        }
    }
    // Writers at once: every entry has its own place.
    let writers = (0..6).map(|i| {
        let store = store.clone();
        async move {
            let mut log = Log::open(Stanza::open(&access(&store, key(1))).await?).await?;
            let session = Session::begin(&mut log, "test", &format!("b{i}")).await?;
            session.abort(&mut log, "over").await
        }
    });
    for result in futures::future::join_all(writers).await {
        result?;
    }
    let log = Log::open(Stanza::open(&access(store, key(1))).await?).await?;
    ensure!(
        log.state().seq == 13 && log.state().open_sessions.is_empty(),
        "{}",
        log.state().seq
    );
    Ok(())
}

#[tokio::test]
async fn conformance_in_memory() -> Result<()> {
    conformance(&memory()).await
}

#[tokio::test]
async fn conformance_in_a_directory() -> Result<()> {
    let scratch = Scratch::new("dir")?;
    let url = RepositoryUrl {
        url: format!("file://{}/repo", scratch.path().display()),
        ..Default::default()
    };
    ensure!(
        url.open(false).is_err_and(|e| e.kind() == Kind::Temporary),
        "a missing folder is never made in passing"
    );
    conformance(&url.open(true)?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conformance_on_s3() -> Result<()> {
    let scratch = Scratch::new("s3")?;
    let server = S3::start(&scratch, "bucket")?;
    let url = RepositoryUrl {
        url: "s3://bucket/some/prefix".into(),
        endpoint: Some(server.endpoint()),
        region: Some("us-east-1".into()),
        access_key: Some("test".into()),
        secret_key: Some("testsecret".into()),
        ..Default::default()
    };
    conformance(&url.open(false)?).await
}

#[tokio::test]
async fn an_unencrypted_stanza_must_be_meant() -> Result<()> {
    let store = memory();
    create(&access(&store, None), CLUSTER, "main").await?;
    Stanza::open(&access(&store, None)).await?;
    let error = Stanza::open(&access(&store, key(1)))
        .await
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    ensure!(error.contains("not encrypted"), "{error}");
    Ok(())
}

#[tokio::test]
async fn a_dead_creator_leaves_nothing_in_the_way() -> Result<()> {
    let store = memory();
    create(&access(&store, key(1)), CLUSTER, "main").await?;
    // As if it had died between the key slot and the first log entry.
    store.delete(&[format!("acme/log/{:020}", 1)]).await?;
    ensure!(create(&access(&store, key(1)), CLUSTER, "main").await?.state().seq == 1);
    Ok(())
}

#[tokio::test]
async fn a_log_that_was_rolled_back_is_refused() -> Result<()> {
    let scratch = Scratch::new("memory")?;
    let store = memory();
    let with_memory = Access {
        memory: Some(Memory::new(scratch.join("cache"))),
        ..access(&store, key(1))
    };
    let mut log = create(&with_memory, CLUSTER, "main").await?;
    for _ in 0..3 {
        Session::begin(&mut log, "test", "x").await?.abort(&mut log, "").await?;
    }
    store.delete(&[format!("acme/log/{:020}", log.state().seq)]).await?;
    let error = Log::open(Stanza::open(&with_memory).await?)
        .await
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    ensure!(error.contains("rolled back"), "{error}");
    // A host without a memory cannot know.
    Log::open(Stanza::open(&access(&store, key(1))).await?).await?;
    Ok(())
}

#[tokio::test]
async fn a_fenced_session_cannot_commit() -> Result<()> {
    let store = memory();
    let mut log = create(&access(&store, key(1)), CLUSTER, "main").await?;
    let mut other = Log::open(Stanza::open(&access(&store, key(1))).await?).await?;
    let session = Session::begin(&mut log, "backup", "b").await?;
    other.refresh().await?;
    let begun = other.state().open_sessions[0].begin.clone().unwrap_or_default();
    let fence = proto::Fence {
        fence: 1,
        sessions: vec![begun.session],
        reason: "test".into(),
    };
    other.append(Entry::SetFence(fence), |_| Ok(())).await?;
    let error = session
        .commit(&mut log, [0; 32], proto::BackupInfo::default())
        .await
        .err();
    ensure!(error.is_some_and(|e| e.kind() == Kind::Held));
    ensure!(log.state().backups.is_empty());
    Ok(())
}

#[tokio::test]
async fn tampering_with_the_log_is_found() -> Result<()> {
    let store = memory();
    let mut log = create(&access(&store, key(1)), CLUSTER, "main").await?;
    Session::begin(&mut log, "test", "x").await?.abort(&mut log, "").await?;
    for (seq, from) in [(2u64, 3u64), (3, 2)] {
        let name = |n: u64| format!("acme/log/{n:020}");
        let (there, other) = (store.get(&name(seq)).await?, store.get(&name(from)).await?);
        store.put_hashed(&name(seq), other.into()).await?;
        let error = Log::open(Stanza::open(&access(&store, key(1))).await?)
            .await
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        ensure!(error.contains("does not open"), "an entry in another's place: {error}");
        let mut flipped = there.to_vec();
        flipped[100] ^= 1;
        store.put_hashed(&name(seq), Bytes::from(flipped).into()).await?;
        ensure!(Log::open(Stanza::open(&access(&store, key(1))).await?).await.is_err());
        let mut newer = there.to_vec();
        newer[4] = 2;
        store.put_hashed(&name(seq), Bytes::from(newer).into()).await?;
        let error = Log::open(Stanza::open(&access(&store, key(1))).await?).await.err();
        ensure!(
            error.is_some_and(|e| e.kind() == Kind::Unsupported),
            "a newer version is unsupported, not damaged"
        );
        store.put_hashed(&name(seq), there.into()).await?;
    }
    Log::open(Stanza::open(&access(&store, key(1))).await?).await?;
    Ok(())
}

/// What goes wrong in a [`Faulty`] store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Nothing; requests are counted.
    None,
    /// Every third create is carried out and then answered with an error.
    LostAnswers,
    /// Create overwrites.
    NoConditionalCreate,
}

/// A store that counts requests and fails in one way.
#[derive(Debug)]
struct Faulty {
    inner: object_store::memory::InMemory,
    requests: AtomicU64,
    fault: Fault,
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "faulty")
    }
}

impl Faulty {
    fn new(fault: Fault) -> Arc<Self> {
        Arc::new(Self {
            inner: object_store::memory::InMemory::new(),
            requests: AtomicU64::new(0),
            fault,
        })
    }

    fn store(self: &Arc<Self>) -> Store {
        Store::new(self.clone(), "", "faulty://", StoreSettings::default())
    }

    fn count(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed) + 1
    }
}

type Answer<T> = object_store::Result<T>;

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
        self.count();
        self.inner.get_opts(l, o).await
    }
    fn delete_stream(&self, l: BoxStream<'static, Answer<Path>>) -> BoxStream<'static, Answer<Path>> {
        self.inner.delete_stream(l)
    }
    fn list(&self, p: Option<&Path>) -> BoxStream<'static, Answer<ObjectMeta>> {
        self.count();
        self.inner.list(p)
    }
    async fn list_with_delimiter(&self, p: Option<&Path>) -> Answer<ListResult> {
        self.count();
        self.inner.list_with_delimiter(p).await
    }
    async fn copy_opts(&self, f: &Path, t: &Path, o: CopyOptions) -> Answer<()> {
        self.inner.copy_opts(f, t, o).await
    }
}

#[tokio::test]
async fn opening_stays_cheap_after_ten_thousand_entries() -> Result<()> {
    let faulty = Faulty::new(Fault::None);
    let store = faulty.store();
    let mut log = create(&access(&store, key(1)), CLUSTER, "main").await?;
    while log.state().seq < 10_007 {
        Session::begin(&mut log, "test", "x").await?.abort(&mut log, "").await?;
    }
    let before = faulty.requests.load(Ordering::Relaxed);
    let fresh = Log::open(Stanza::open(&access(&store, key(1))).await?).await?;
    let cost = faulty.requests.load(Ordering::Relaxed) - before;
    ensure!(fresh.state().seq == log.state().seq);
    ensure!(cost <= 24, "a host without a memory needed {cost} requests");
    // A host with a memory.
    let scratch = Scratch::new("cheap")?;
    let with_memory = Access {
        memory: Some(Memory::new(scratch.join("cache"))),
        ..access(&store, key(1))
    };
    Log::open(Stanza::open(&with_memory).await?).await?;
    let before = faulty.requests.load(Ordering::Relaxed);
    Log::open(Stanza::open(&with_memory).await?).await?;
    let cost = faulty.requests.load(Ordering::Relaxed) - before;
    ensure!(cost <= 2, "a host with a memory needed {cost} requests");
    Ok(())
}

#[tokio::test]
async fn lost_answers_are_resolved() -> Result<()> {
    let faulty = Faulty::new(Fault::LostAnswers);
    let store = faulty.store();
    for i in 0..30 {
        let name = format!("x/{i}");
        ensure!(
            store.create(&name, Bytes::from_static(b"mine")).await? == Created::Won,
            "{i}"
        );
        ensure!(store.create(&name, Bytes::from_static(b"other")).await? == Created::Lost(Bytes::from_static(b"mine")));
    }
    let mut log = create(
        &Access {
            ..access(&Faulty::new(Fault::None).store(), key(1))
        },
        CLUSTER,
        "main",
    )
    .await?;
    Session::begin(&mut log, "test", "x").await?.abort(&mut log, "").await?;
    Ok(())
}

#[tokio::test]
async fn a_store_that_overwrites_is_refused() -> Result<()> {
    let faulty = Faulty::new(Fault::NoConditionalCreate);
    let error = create(&access(&faulty.store(), key(1)), CLUSTER, "main").await.err();
    let error = error.map(|e| (e.to_string(), e.advice().map(str::to_owned)));
    ensure!(
        error
            .as_ref()
            .is_some_and(|(text, advice)| text.contains("conditionally")
                && advice.as_ref().is_some_and(|a| a.contains("single_writer"))),
        "{error:?}"
    );
    // Said explicitly, it works.
    let settings = StoreSettings {
        single_writer: true,
        ..Default::default()
    };
    let store = Store::new(Faulty::new(Fault::NoConditionalCreate), "", "faulty://", settings);
    create(&access(&store, key(1)), CLUSTER, "main").await?;
    Ok(())
}
