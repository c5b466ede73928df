//! Two stores that keep their promises and nothing more: they are slow, fail before and after they have done something,
//! do things late or twice, and list late. In some seeds they have a vice beside that, and do what no promise allows: see
//! [`Vice`]. All of it follows from a seed.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use fairvault_engine::env::Env;
use fairvault_engine::store::{Store, StoreSettings};
use fairvault_tests::dice::Dice;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use tokio::time::{Instant, sleep};

use super::watch::{Fork, Watch};

tokio::task_local! {
    /// Whether whoever is at work was given the content of another object than asked for.
    pub static WAS_LIED_TO: Cell<bool>;
}

type Answer<T> = object_store::Result<T>;

/// Objects of a repository.
type Key = (usize, Path);

/// What the stores of a seed do that no store should. Conditional creates, leases, keys and the repository's description
/// are left alone: whatever stands on them could not know better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vice {
    /// Nothing.
    None,
    /// Of what is named by its hash, a part is stored now and then. The answer is that it failed; or, of packs, that all
    /// is well. Nothing may rely on it.
    Cuts,
    /// LIST leaves out what has been there for long. Of WAL it does not: what is listed is what there is to copy, to join
    /// and to count.
    Forgets,
    /// For a minute or two, the content of another object of the same kind is the answer. Nothing may be handed on, or
    /// deleted, because of it; that it is damaged may be said.
    Confuses,
}

impl Vice {
    /// Most seeds have none, and what happens in them does not depend on these.
    fn of(seed: u64) -> Self {
        match seed % 8 {
            0 => Self::Cuts,
            1 => Self::Forgets,
            3 => Self::Confuses,
            _ => Self::None,
        }
    }
}

/// What all hosts share.
#[derive(Debug)]
pub struct World {
    inner: [Arc<InMemory>; 2],
    dice: Mutex<u64>,
    began: Instant,
    born: Mutex<HashMap<Key, Instant>>,
    /// The stores misbehave.
    pub is_bad: AtomicBool,
    vice: Vice,
    /// Of which a part was stored.
    cuts: Mutex<HashSet<Key>>,
    /// Whose content is the answer instead, and until when.
    confused: Mutex<HashMap<Key, (Path, Instant)>>,
    /// How often something was left out of a list, or answered with other content.
    lies: AtomicU64,
    /// How often something happened that a good store does not do.
    faults: AtomicU64,
    /// Hosts that died at work.
    pub deaths: AtomicU64,
    /// Parts of the index are lost or damaged while everybody is at work.
    pub is_spoiled: bool,
    /// Who looks at every change.
    pub watch: Watch,
}

impl World {
    /// A new one.
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            inner: Default::default(),
            dice: Mutex::new(seed),
            began: Instant::now(),
            born: Mutex::default(),
            is_bad: AtomicBool::new(false),
            vice: Vice::of(seed),
            cuts: Mutex::default(),
            confused: Mutex::default(),
            lies: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            deaths: AtomicU64::new(0),
            is_spoiled: (seed / 8).is_multiple_of(2),
            watch: Watch::default(),
        })
    }

    /// What an object holds.
    async fn content(&self, repo: usize, at: &Path) -> Option<Bytes> {
        self.inner[repo].get(at).await.ok()?.bytes().await.ok()
    }

    /// An object was stored or deleted: whoever watches sees that now.
    async fn changed(&self, repo: usize, at: &Path, before: Option<Bytes>) {
        if let Some(name) = at.as_ref().strip_prefix("acme/") {
            let now = self.content(repo, at).await;
            self.watch.show(repo, &self.inner[repo], name, before, now);
        }
    }

    /// Whether a part of an object was stored, where all of it should have been.
    pub fn was_cut(&self, repo: usize, name: &str) -> bool {
        let path = Path::from(format!("acme/{name}"));
        self.cuts.lock().unwrap().contains(&(repo, path))
    }

    /// Whether anybody was given the content of another object than asked for.
    pub fn has_confused(&self) -> bool {
        self.vice == Vice::Confuses && self.lies.load(Ordering::Relaxed) > 0
    }

    /// How often a vice has shown.
    pub fn vices(&self) -> (u64, u64) {
        let cuts = self.cuts.lock().unwrap().len() as u64;
        (cuts, self.lies.load(Ordering::Relaxed))
    }

    /// How often it failed, answered wrongly, or did something late, twice or not at all.
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
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
        let happens = self.is_bad.load(Ordering::Relaxed) && self.roll(1000) < permille;
        self.faults.fetch_add(happens.into(), Ordering::Relaxed);
        happens
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
        as_store((repo, Arc::new(self.inner[repo].fork())))
    }

    /// A repository as it is, at every moment.
    pub fn itself(&self, repo: usize) -> Store {
        as_store((repo, self.inner[repo].clone()))
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

/// A repository at a moment, as a store that does all that it is told.
pub fn as_store((repo, inner): Fork) -> Store {
    Store::new(inner, "", SHOWN[repo], StoreSettings::default())
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

/// Whether an object is below one of these folders of the stanza.
fn is_below(at: &Path, folders: &[&str]) -> bool {
    let folder = at.as_ref().split('/').nth(1).unwrap_or_default();
    folders.contains(&folder)
}

/// Where the last frame of a pack ends: its last 32 bytes say so first.
fn frames_end(pack: &[u8]) -> usize {
    let footer = pack.last_chunk::<32>().and_then(|footer| footer.first_chunk::<8>());
    footer.map_or(pack.len(), |offset| u64::from_le_bytes(*offset) as usize)
}

impl Host {
    fn inner(&self) -> &InMemory {
        &self.world.inner[self.repo]
    }

    /// Stores a part of an object that is named by its hash, if that is what is to happen.
    async fn cut(&self, at: &Path, payload: &PutPayload, options: &PutOptions) -> Option<Answer<PutResult>> {
        let world = &self.world;
        let is_hashed = options.mode == object_store::PutMode::Overwrite;
        if world.vice != Vice::Cuts || !is_hashed || payload.content_length() == 0 {
            return None;
        }
        let is_pack = is_below(at, &["packs"]);
        let is_silent = is_pack && world.happens(20);
        if !is_silent && !world.happens(15) {
            return None;
        }
        let all: Bytes = payload.iter().flatten().copied().collect();
        // Of a pack, the end of the last frame is missing: one that lacks its directory restores all the same.
        let end = if is_pack { frames_end(&all) } else { all.len() };
        let len = world.roll(end as u64) as usize;
        let key = (self.repo, at.clone());
        world.cuts.lock().unwrap().insert(key);
        let done = self.put(at, all.slice(..len).into(), options.clone()).await;
        match is_silent {
            true => Some(done),
            false => Some(Err(broken("500, and a part of it is there"))),
        }
    }

    /// Whose content is the answer to somebody who asks for an object.
    async fn answered_by(&self, at: &Path, options: &GetOptions) -> Path {
        let world = &self.world;
        let is_possible = is_below(at, &["packs", "roots", "index", "snapshots", "log", "wal"]);
        let is_bad = world.is_bad.load(Ordering::Relaxed);
        if world.vice != Vice::Confuses || !is_bad || !is_possible || options.head {
            return at.clone();
        }
        let key = (self.repo, at.clone());
        let known = world.confused.lock().unwrap().get(&key).cloned();
        if let Some((other, until)) = known
            && Instant::now() < until
        {
            world.lies.fetch_add(1, Ordering::Relaxed);
            let _ = WAS_LIED_TO.try_with(|was_lied_to| was_lied_to.set(true));
            return other;
        }
        // Entries of the log are asked for most, and what is wrong with one of them stops everybody.
        let permille = if is_below(at, &["log"]) { 1 } else { 10 };
        if !world.happens(permille) {
            return at.clone();
        }
        let folder: Path = at.parts().take(2).collect();
        let listed: Vec<Path> = self
            .inner()
            .list(Some(&folder))
            .map_ok(|meta| meta.location)
            .try_collect()
            .await
            .unwrap_or_default();
        let other = match listed.contains(at) {
            true => listed[world.roll(listed.len() as u64) as usize].clone(),
            false => at.clone(),
        };
        if other != *at {
            let until = Instant::now() + Duration::from_secs(world.roll(150));
            world.confused.lock().unwrap().insert(key, (other.clone(), until));
            world.lies.fetch_add(1, Ordering::Relaxed);
            let _ = WAS_LIED_TO.try_with(|was_lied_to| was_lied_to.set(true));
        }
        other
    }

    async fn put(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Answer<PutResult> {
        let (world, repo) = (&self.world, self.repo);
        let before = world.content(repo, at).await;
        let done = self.inner().put_opts(at, payload, options).await;
        if done.is_ok() {
            let key = (repo, at.clone());
            world.born.lock().unwrap().insert(key, Instant::now());
            world.changed(repo, at, before).await;
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
            // The answer is lost, and the request comes in when nobody expects it any more: often soon, before anybody
            // else has done anything.
            let (late, at, rolled) = (self.clone(), at.clone(), world.roll(200_000));
            let ms = rolled * rolled / 200_000;
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
        if let Some(answer) = self.cut(at, &payload, &options).await {
            return answer;
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
            false => {
                let from = self.answered_by(at, &options).await;
                self.inner().get_opts(&from, options).await
            }
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
                    let before = world.content(host.repo, &path).await;
                    host.inner().delete(&path).await?;
                    world.changed(host.repo, &path, before).await;
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
            let left_out = match world.vice == Vice::Forgets && world.happens(50) {
                true => Some(world.roll(3) as usize),
                false => None,
            };
            let is_left_out = |(number, meta): (usize, &ObjectMeta)| {
                let is_hint = is_below(&meta.location, &["packs", "roots", "index", "snapshots", "log"]);
                let is_missing = is_hint && left_out == Some(number % 3);
                world.lies.fetch_add(is_missing.into(), Ordering::Relaxed);
                is_missing
            };
            let born = world.born.lock().unwrap();
            let is_shown = |meta: &ObjectMeta| {
                let age = born.get(&(host.repo, meta.location.clone())).map(Instant::elapsed);
                !is_late || meta.location.as_ref().contains("/leases/") || age.is_none_or(|age| age.as_secs() > 20)
            };
            listed
                .into_iter()
                .enumerate()
                .filter(|(number, meta)| {
                    meta.as_ref()
                        .is_ok_and(|meta| is_shown(meta) && !is_left_out((*number, meta)))
                })
                .map(|(_, meta)| meta)
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
