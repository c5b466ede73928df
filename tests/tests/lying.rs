//! A store that answers with the content of another object: whoever reads finds that out, and nobody lets go of anything
//! by such an answer.

mod stores;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fairvault_engine::commit::Log;
use fairvault_engine::error::{Error, Kind};
use fairvault_engine::gc;
use fairvault_engine::postgres::segment::{Segment, WalFile};
use fairvault_engine::progress::Progress;
use fairvault_engine::stanza::create::{Cluster, create};
use fairvault_engine::store::{Store, StoreSettings};
use fairvault_engine::wal::archive::Archive;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult,
};

use stores::{CLUSTER, access, key};

type Answer<T> = object_store::Result<T>;

/// Bytes of a segment of WAL.
const SEGMENT: u64 = 1 << 20;
const SHORT: Cluster = Cluster {
    wal_segment_size: SEGMENT,
    ..CLUSTER
};

/// Answers for one object with the content of another.
#[derive(Debug, Default)]
struct Liar {
    inner: InMemory,
    instead: Mutex<Option<(Path, Path)>>,
}

impl Liar {
    fn store(self: &Arc<Self>) -> Store {
        Store::new(self.clone(), "", "liar://", StoreSettings::default())
    }

    /// From now on, `object` of the stanza is answered with what `other` holds.
    fn confuse(&self, object: &str, other: &str) {
        let path = |name: &str| Path::from(format!("acme/{name}"));
        *self.instead.lock().expect("one at a time") = Some((path(object), path(other)));
    }

    fn be_honest(&self) {
        *self.instead.lock().expect("one at a time") = None;
    }
}

impl std::fmt::Display for Liar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "liar")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Liar {
    async fn put_opts(&self, l: &Path, p: PutPayload, o: PutOptions) -> Answer<PutResult> {
        self.inner.put_opts(l, p, o).await
    }
    async fn put_multipart_opts(&self, l: &Path, o: PutMultipartOptions) -> Answer<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(l, o).await
    }
    async fn get_opts(&self, l: &Path, o: GetOptions) -> Answer<GetResult> {
        let instead = self.instead.lock().expect("one at a time").clone();
        let from = instead.filter(|(object, _)| object == l).map(|(_, other)| other);
        self.inner.get_opts(from.as_ref().unwrap_or(l), o).await
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

fn segment(number: u64) -> Segment {
    Segment { timeline: 1, number }
}

fn content(number: u64) -> Vec<u8> {
    (0..SEGMENT).map(|at| (at / 512 * number % 251) as u8).collect()
}

/// A stanza whose first segment is sealed as two pieces; the second one is stored as a whole, and so is the third, with
/// a piece beside it that nobody has deleted yet.
async fn sealed(store: &Store) -> Result<(Log, Archive)> {
    let log = create(&access(store, key(1)), SHORT, "main").await?;
    let archive = Archive::open(&log, None, 0)?;
    let whole = content(1);
    let half = whole.len() / 2;
    let (_, first) = archive.put_piece(segment(1), 0, whole[..half].to_vec()).await?;
    let (_, second) = archive
        .put_piece(segment(1), half as u64, whole[half..].to_vec())
        .await?;
    let id = log.stanza().keys().chunk_id(&whole);
    archive
        .put_seal(segment(1), Default::default(), id, &[first, second])
        .await?;
    for number in 2..=3 {
        archive
            .put_whole(segment(number), Default::default(), content(number))
            .await?;
    }
    archive.put_piece(segment(3), 0, content(3)[..4096].to_vec()).await?;
    Ok((log, archive))
}

fn object(archive: &Archive, number: u64) -> String {
    let name = segment(number).name(SEGMENT);
    archive.object_name(&WalFile::Segment(segment(number)), &name)
}

async fn pieces(store: &Store) -> Result<usize> {
    let listed = store.list("acme/wal").await?;
    Ok(listed.iter().filter(|(name, _)| name.contains(".d/")).count())
}

async fn collect(log: &Log) -> Result<gc::Report, Error> {
    let options = gc::Options {
        dry_run: false,
        patience: Duration::from_millis(10),
    };
    gc::run(log, &options, &Progress::default()).await
}

/// Finds whoever takes the kind in an object's header for what the object is, without opening it: the sealed pieces are all
/// that there is of their segment.
#[tokio::test]
async fn pieces_of_a_seal_stay_whatever_the_store_says_it_is() -> Result<()> {
    let liar = Arc::new(Liar::default());
    let store = liar.store();
    let (log, archive) = sealed(&store).await?;
    ensure!(pieces(&store).await? == 3);
    liar.confuse(&object(&archive, 1), &object(&archive, 2));
    ensure!(!archive.is_one_object(segment(1)).await?, "it is what another one is");
    let report = collect(&log).await?;
    // The piece beside a segment that is what it says goes as ever.
    ensure!(report.wal.objects == 1 && pieces(&store).await? == 2, "{report:?}");
    // The other way round, nothing is let go of either, until the store is honest again.
    archive.put_piece(segment(3), 0, content(3)[..4096].to_vec()).await?;
    liar.confuse(&object(&archive, 3), &object(&archive, 1));
    let report = collect(&log).await?;
    ensure!(report.wal.objects == 0 && pieces(&store).await? == 3, "{report:?}");
    liar.be_honest();
    collect(&log).await?;
    ensure!(pieces(&store).await? == 2);
    for number in 1..=3 {
        let there = archive.whole_segment(segment(number)).await?;
        ensure!(there.as_ref() == Some(&content(number)), "segment {number}");
    }
    Ok(())
}

/// Finds a reader that hands on what it was given.
#[tokio::test]
async fn nobody_is_handed_the_content_of_another_object() -> Result<()> {
    let liar = Arc::new(Liar::default());
    let (_, archive) = sealed(&liar.store()).await?;
    for (asked, answered) in [(1, 2), (2, 1), (2, 3), (3, 2)] {
        liar.confuse(&object(&archive, asked), &object(&archive, answered));
        let error = archive.whole_segment(segment(asked)).await.err();
        let error = error.with_context(|| format!("{asked} is answered with {answered}, and that is believed"))?;
        ensure!(error.kind() == Kind::Damaged, "{error}");
        // Nor is WAL taken for archived that another object has.
        let again = archive
            .put_whole(segment(asked), Default::default(), content(asked))
            .await;
        ensure!(
            again.as_ref().err().is_some_and(|error| error.kind() == Kind::Damaged),
            "{asked} {answered}: {again:?}"
        );
    }
    liar.be_honest();
    for number in 1..=3 {
        archive
            .put_whole(segment(number), Default::default(), content(number))
            .await?;
    }
    Ok(())
}
