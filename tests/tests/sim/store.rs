//! Two stores that keep their promises and nothing more: they are slow, fail before and after they have done something,
//! do things late or twice, and list late. All of it follows from a seed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fairvault_engine::env::Env;
use fairvault_engine::store::{Store, StoreSettings};
use fairvault_tests::dice::Dice;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use tokio::time::{Instant, sleep};

type Answer<T> = object_store::Result<T>;

/// What all hosts share.
#[derive(Debug)]
pub struct World {
    inner: [InMemory; 2],
    dice: Mutex<u64>,
    began: Instant,
    born: Mutex<HashMap<(usize, Path), Instant>>,
    /// The stores misbehave.
    pub is_bad: AtomicBool,
}

impl World {
    /// A new one.
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            inner: [InMemory::new(), InMemory::new()],
            dice: Mutex::new(seed),
            began: Instant::now(),
            born: Mutex::default(),
            is_bad: AtomicBool::new(false),
        })
    }

    /// From 0 to `sides` - 1.
    pub fn roll(&self, sides: u64) -> u64 {
        let mut state = self.dice.lock().unwrap();
        let mut dice = Dice(*state);
        let rolled = dice.roll(sides);
        *state = dice.0;
        rolled
    }

    /// Happens so many times in a thousand, while the store is bad.
    fn happens(&self, permille: u64) -> bool {
        self.is_bad.load(Ordering::Relaxed) && self.roll(1000) < permille
    }

    /// A repository as a host sees it.
    pub fn store(self: &Arc<Self>, repo: usize) -> Store {
        let host = Host {
            world: self.clone(),
            repo,
        };
        Store::new(Arc::new(host), "", SHOWN[repo], StoreSettings::default())
    }

    /// A repository as it is at this moment, which stays as it is.
    pub fn now(&self, repo: usize) -> Store {
        let fork = Arc::new(self.inner[repo].fork());
        Store::new(fork, "", SHOWN[repo], StoreSettings::default())
    }

    /// Whatever somebody does behind everybody's back: an object is gone, or has other bytes.
    pub async fn spoil(&self, repo: usize, name: &str) {
        let path = Path::from(format!("acme/{name}"));
        let Ok(found) = self.inner[repo].get(&path).await else {
            return;
        };
        let mut bytes = found.bytes().await.unwrap().to_vec();
        let at = self.roll(bytes.len() as u64) as usize;
        bytes[at] ^= 0x55;
        match self.roll(2) {
            0 => self.inner[repo].delete(&path).await.unwrap(),
            _ => _ = self.inner[repo].put(&path, bytes.into()).await.unwrap(),
        }
    }

    /// Time passes; on some occasions, a lot.
    async fn pass(&self) {
        if self.is_bad.load(Ordering::Relaxed) {
            let ms = match self.roll(1000) {
                0..4 => 30_000 + self.roll(300_000),
                4..20 => self.roll(20_000),
                _ => self.roll(60),
            };
            sleep(Duration::from_millis(ms)).await;
        }
    }
}

impl Env for World {
    fn now_us(&self) -> i64 {
        1_800_000_000_000_000 + i64::try_from(self.began.elapsed().as_micros()).unwrap()
    }

    fn random(&self, buffer: &mut [u8]) -> fairvault_engine::error::Result<()> {
        buffer.iter_mut().for_each(|byte| *byte = self.roll(256) as u8);
        Ok(())
    }
}

/// How the repositories are called.
const SHOWN: [&str; 2] = ["sim://first", "sim://second"];

/// A store as one host reaches it.
#[derive(Debug, Clone)]
struct Host {
    world: Arc<World>,
    repo: usize,
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sim")
    }
}

fn broken(what: &'static str) -> object_store::Error {
    object_store::Error::Generic {
        store: "sim",
        source: what.into(),
    }
}

impl Host {
    fn inner(&self) -> &InMemory {
        &self.world.inner[self.repo]
    }

    async fn put(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Answer<PutResult> {
        let done = self.inner().put_opts(at, payload, options).await;
        if done.is_ok() {
            let key = (self.repo, at.clone());
            self.world.born.lock().unwrap().insert(key, Instant::now());
        }
        done
    }
}

#[async_trait::async_trait]
impl ObjectStore for Host {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Answer<PutResult> {
        let world = &self.world;
        // A heart that is not heard is taken for dead, rightly: a restore would fail because of it.
        if at.as_ref().contains("/leases/") {
            return self.put(at, payload, options).await;
        }
        world.pass().await;
        if world.happens(10) {
            return Err(broken("500"));
        }
        if world.happens(8) {
            // The answer is lost, and the request comes in when nobody expects it any more.
            let (late, at, ms) = (self.clone(), at.clone(), world.roll(200_000));
            tokio::spawn(async move {
                sleep(Duration::from_millis(ms)).await;
                let _ = late.put(&at, payload, options).await;
            });
            return Err(broken("timed out"));
        }
        if world.happens(5) && options.mode == object_store::PutMode::Create {
            return Err(object_store::Error::AlreadyExists {
                path: at.to_string(),
                source: "409: try again".into(),
            });
        }
        if world.happens(10) {
            // Sent twice on its way.
            let _ = self.put(at, payload.clone(), options.clone()).await;
        }
        let done = self.put(at, payload, options).await;
        world.pass().await;
        match world.happens(10) {
            true => Err(broken("503, and done all the same")),
            false => done,
        }
    }

    async fn put_multipart_opts(&self, at: &Path, options: PutMultipartOptions) -> Answer<Box<dyn MultipartUpload>> {
        self.inner().put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Answer<GetResult> {
        self.world.pass().await;
        match self.world.happens(8) {
            true => Err(broken("503")),
            false => self.inner().get_opts(at, options).await,
        }
    }

    fn delete_stream(&self, paths: BoxStream<'static, Answer<Path>>) -> BoxStream<'static, Answer<Path>> {
        let host = self.clone();
        paths
            .then(move |path| {
                let host = host.clone();
                async move {
                    let (path, world) = (path?, &host.world);
                    world.pass().await;
                    if world.happens(8) {
                        return Err(broken("500"));
                    }
                    host.inner().delete(&path).await?;
                    match world.happens(8) {
                        true => Err(broken("503, and done all the same")),
                        false => Ok(path),
                    }
                }
            })
            .boxed()
    }

    fn list(&self, folder: Option<&Path>) -> BoxStream<'static, Answer<ObjectMeta>> {
        let host = self.clone();
        let folder = folder.cloned();
        futures::stream::once(async move {
            let world = &host.world;
            world.pass().await;
            if world.happens(8) {
                return vec![Err(broken("503"))];
            }
            let listed: Vec<_> = host.inner().list(folder.as_ref()).collect().await;
            // What is new may not be listed yet. Leases are: readers rely on that, and SPEC.md says so.
            let is_late = world.happens(200);
            let born = world.born.lock().unwrap();
            let is_shown = |meta: &ObjectMeta| {
                let age = born.get(&(host.repo, meta.location.clone())).map(Instant::elapsed);
                !is_late || meta.location.as_ref().contains("/leases/") || age.is_none_or(|age| age.as_secs() > 20)
            };
            listed
                .into_iter()
                .filter(|meta| meta.as_ref().is_ok_and(is_shown))
                .collect()
        })
        .flat_map(futures::stream::iter)
        .boxed()
    }

    async fn list_with_delimiter(&self, folder: Option<&Path>) -> Answer<ListResult> {
        self.world.pass().await;
        self.inner().list_with_delimiter(folder).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Answer<()> {
        self.inner().copy_opts(from, to, options).await
    }
}
