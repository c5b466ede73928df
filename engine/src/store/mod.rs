//! The object store: names, create-only writes, retries, probing.
//!
//! What always holds (see SPEC.md, section 1): nothing is overwritten; the outcome of a conditional create
//! is known before it is reported; LIST is never a proof of absence.

pub mod arriving;
mod lazy;
mod listing;
pub(crate) mod owner;
pub mod probe;
mod s3;
mod signing;
pub mod url;
pub mod versions;

use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use fairvault_format::error::check_limit;
use fairvault_format::names;

use crate::env::has_fault;
use crate::error::{Error, Kind, Result};
use lazy::Lazy;
use owner::Owner;

/// How a conditional create ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    /// The name holds our bytes.
    Won,
    /// The name holds something else; these bytes, or the first of them.
    Lost(Bytes),
}

/// How much is fetched of what is there already.
#[derive(Debug, Clone, Copy)]
enum Look {
    /// All of it, and no more than so many bytes.
    All(u64),
    /// The first bytes: it begins with what is random.
    Head(u64),
}

/// What may be tuned.
#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// How long the store may stay away before an operation fails.
    pub retry_timeout: Duration,
    /// The store has no conditional create, and only one writer is promised.
    pub single_writer: bool,
    /// Storage class of packs, where the store has such a thing.
    pub storage_class: Option<String>,
    /// Nobody else is there to delete what is needed no more.
    pub may_delete: bool,
    /// The store lists names in order.
    pub ordered_lists: bool,
    /// The folder of a directory repository, as it was when it was opened.
    pub root: Option<Root>,
    /// Every upload carries the MD5 of its body.
    pub content_md5: bool,
    /// File that processes of this host lock around creates where `single_writer` is promised.
    pub lock_file: Option<PathBuf>,
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self {
            retry_timeout: Duration::from_secs(180),
            single_writer: false,
            storage_class: None,
            may_delete: true,
            ordered_lists: false,
            root: None,
            content_md5: false,
            lock_file: None,
        }
    }
}

/// A folder on this machine that must stay what it was: a disk may be unmounted under a process that runs
/// for weeks, and writing would then make the folders anew on the disk below.
#[derive(Debug, Clone)]
pub struct Root {
    path: PathBuf,
    identity: (u64, u64),
    /// As whom to write there, if not as who this process is.
    owner: Option<Owner>,
}

fn identity(path: &std::path::Path) -> std::io::Result<(u64, u64)> {
    std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

impl Root {
    /// The folder as it is now.
    pub fn of(path: &std::path::Path) -> std::io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            identity: identity(path)?,
            owner: Owner::of(path),
        })
    }

    /// Still the same folder, or another one with this repository in it.
    fn is_there(&self) -> bool {
        identity(&self.path).is_ok_and(|now| now == self.identity) || self.path.join(names::REPOSITORY).is_file()
    }
}

type Client = Arc<dyn ObjectStore>;

/// A folder of an object store: a repository, or a stanza in it.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    /// For uploads: over HTTP, a limit for silence would also limit how long a body may take.
    uploads: Lazy<Client>,
    /// For what S3 knows and the client does not: versions and locks.
    s3: Option<Lazy<Arc<s3::S3>>>,
    prefix: String,
    shown: String,
    settings: StoreSettings,
}

impl Store {
    /// A store below `prefix`; `shown` is how it is called in messages.
    pub fn new(inner: Arc<dyn ObjectStore>, prefix: &str, shown: &str, settings: StoreSettings) -> Self {
        Self {
            uploads: Lazy::new({
                let inner = inner.clone();
                move || Ok(inner.clone())
            }),
            s3: None,
            inner,
            prefix: prefix.trim_matches('/').to_owned(),
            shown: shown.trim_end_matches('/').to_owned(),
            settings,
        }
    }

    /// The same store with another client for uploads.
    #[must_use]
    pub fn with_uploads(self, make: impl Fn() -> Result<Arc<dyn ObjectStore>> + Send + Sync + 'static) -> Self {
        Self {
            uploads: Lazy::new(make),
            ..self
        }
    }

    /// The same store, which can be asked about versions and locks.
    fn with_s3(self, make: impl Fn() -> Result<Arc<s3::S3>> + Send + Sync + 'static) -> Self {
        Self {
            s3: Some(Lazy::new(make)),
            ..self
        }
    }

    /// The same store, one folder deeper.
    #[must_use]
    pub fn folder(&self, name: &str) -> Self {
        Self {
            prefix: self.key(name),
            shown: format!("{}/{name}", self.shown),
            ..self.clone()
        }
    }

    /// How it is called in messages.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// The folder on this machine that it is, if it is one.
    pub fn directory(&self) -> Option<PathBuf> {
        let root = self.settings.root.as_ref()?;
        Some(root.path.join(&self.prefix))
    }

    /// Its settings.
    pub fn settings(&self) -> &StoreSettings {
        &self.settings
    }

    fn key(&self, name: &str) -> String {
        if self.prefix.is_empty() {
            name.to_owned()
        } else {
            format!("{}/{name}", self.prefix)
        }
    }

    fn path(&self, name: &str) -> Result<Path> {
        Path::parse(self.key(name)).map_err(|e| Error::usage(format!("{name:?} is no object name")).caused_by(e))
    }

    fn error(&self, doing: &str, name: &str, error: object_store::Error) -> Error {
        use object_store::Error as E;
        let what = format!("{doing} {}/{name}", self.shown);
        match &error {
            E::NotFound { .. } => Error::not_found(format!("{what}: there is no such object")).caused_by(error),
            _ if is_denied(&error) => {
                Error::new(Kind::Failed, format!("{what}: the store refused the credentials"))
                    .remedy("check access key, secret, region and the bucket's policy; where only a collector may delete, `deleter` of the repository has its credentials")
                    .caused_by(error)
            }
            E::Generic { .. } if lacks_checksum(&error) => Error::failed(what)
                .remedy("buckets with object lock want a checksum: set checksum = true, or \"md5\" if the store refuses that")
                .caused_by(error),
            E::Generic { .. } if is_of_other_key(&error) => {
                Error::failed(format!("{what}: it was stored with a key of somebody else, which the store wants for it"))
                    .caused_by(error)
            }
            E::Generic { .. } if is_permission_io(&error) => Error::new(Kind::Failed, what)
                .remedy("check who owns the repository folder and its permissions")
                .caused_by(error),
            E::Generic { .. } if is_bad_medium(&error) => {
                Error::damaged(format!("{what}: it cannot be read")).caused_by(error)
            }
            E::Generic { .. } | E::JoinError { .. } => Error::temporary(what).caused_by(error),
            _ => Error::failed(what).caused_by(error),
        }
    }

    /// Runs an operation again while the store throttles in a way that the client below does not know
    /// (HTTP 400 with RequestRateLimitExceeded or SlowDown).
    async fn throttled<T, F, Fut>(&self, mut operation: F) -> object_store::Result<T>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = object_store::Result<T>>,
    {
        let mut wait = Duration::from_millis(200);
        let deadline = tokio::time::Instant::now() + self.settings.retry_timeout;
        loop {
            match operation().await {
                Err(error) if is_throttle(&error) && tokio::time::Instant::now() + wait < deadline => {
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(Duration::from_secs(10));
                }
                other => return other,
            }
        }
    }

    /// Fails if the folder of the repository is gone.
    fn check_root(&self) -> Result<()> {
        match &self.settings.root {
            Some(root) if !root.is_there() => Err(Error::temporary(format!(
                "the repository folder {} is gone",
                root.path.display()
            ))
            .remedy("was it unmounted? Nothing is written until it is back")),
            _ => Ok(()),
        }
    }

    /// Fails unless a folder's object is where the repository is: what was written while the folder went away may
    /// be in another one that was made in its place.
    fn check_written(&self, path: &Path) -> Result<()> {
        self.check_root()?;
        let Some(root) = &self.settings.root else { return Ok(()) };
        if !root.path.join(path.as_ref()).is_file() {
            return Err(Error::temporary(format!(
                "{}/{path} was written, and is not there: the folder went away meanwhile",
                self.shown
            )));
        }
        self.check_root()
    }

    /// Writes an object that is named by its hash; the same bytes may be there already.
    pub async fn put_hashed(&self, name: &str, payload: PutPayload) -> Result<()> {
        self.check_root()?;
        let path = self.path(name)?;
        let mut attributes = object_store::Attributes::new();
        let is_pack = name
            .strip_prefix(names::PACKS)
            .is_some_and(|rest| rest.starts_with('/'));
        if let Some(class) = self.settings.storage_class.as_ref().filter(|_| is_pack) {
            attributes.insert(object_store::Attribute::StorageClass, class.clone().into());
        }
        let options = PutOptions {
            attributes,
            ..self.put_options(&payload)
        };
        let uploads = self.uploads.client()?;
        self.throttled(|| self.upload(&uploads, &path, payload.clone(), options.clone()))
            .await
            .map_err(|e| self.error("writing", name, e))?;
        self.check_written(&path)
    }

    /// What goes with every upload.
    fn put_options(&self, payload: &PutPayload) -> PutOptions {
        let mut options = PutOptions::default();
        if self.settings.content_md5 {
            options.extensions.insert(s3::ContentMd5::of(payload));
        }
        options
    }

    /// Stores an object in the place of the one before: only leases are stored like that.
    pub async fn replace(&self, name: &str, bytes: Bytes) -> Result<()> {
        self.put_hashed(name, bytes.into()).await
    }

    /// Creates an object if its name is free. The outcome is certain: an unclear answer is followed by the
    /// same bytes again until the name is occupied, and then by a comparison. `limit` bounds what may be there.
    pub async fn create(&self, name: &str, bytes: Bytes, limit: u64) -> Result<Created> {
        self.create_unless(name, bytes, Look::All(limit)).await
    }

    /// The same for a sealed object, which begins with what is random: of another one that is there, only the first
    /// `head` bytes are fetched.
    pub async fn create_large(&self, name: &str, bytes: Bytes, head: u64) -> Result<Created> {
        self.create_unless(name, bytes, Look::Head(head)).await
    }

    async fn create_unless(&self, name: &str, bytes: Bytes, look: Look) -> Result<Created> {
        self.check_root()?;
        let created = match self.settings.single_writer {
            true => self.create_single_writer(name, bytes, look).await?,
            false => self.create_conditionally(name, bytes, look).await?,
        };
        self.check_written(&self.path(name)?)?;
        Ok(created)
    }

    /// What is there, compared with what is ours; `None` if nothing is.
    async fn there(&self, name: &str, ours: &Bytes, look: Look) -> Result<Option<Created>> {
        let (there, is_ours) = match look {
            Look::All(limit) => match self.get_opt(name, limit).await? {
                None => return Ok(None),
                Some(there) => {
                    let is_ours = there == *ours;
                    (there, is_ours)
                }
            },
            Look::Head(head) => {
                let Some(len) = self.len(name).await? else {
                    return Ok(None);
                };
                let there = match self.get_range(name, 0..head).await {
                    Err(error) if error.kind() == Kind::NotFound => return Ok(None),
                    there => there?,
                };
                let is_ours = len == ours.len() as u64 && ours.starts_with(&there);
                (there, is_ours)
            }
        };
        Ok(Some(match is_ours {
            true => Created::Won,
            false => Created::Lost(there),
        }))
    }

    async fn create_conditionally(&self, name: &str, bytes: Bytes, look: Look) -> Result<Created> {
        let (path, uploads) = (self.path(name)?, self.uploads.client()?);
        let deadline = tokio::time::Instant::now() + self.settings.retry_timeout;
        let mut wait = Duration::from_millis(100);
        let payload = PutPayload::from(bytes.clone());
        let options = PutOptions {
            mode: PutMode::Create,
            ..self.put_options(&payload)
        };
        loop {
            let upload = self.upload(&uploads, &path, payload.clone(), options.clone());
            let unclear = match upload.await {
                Ok(_) => return Ok(Created::Won),
                Err(object_store::Error::AlreadyExists { .. }) if has_fault("exists") => return Ok(Created::Won),
                Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                    match self.there(name, &bytes, look).await? {
                        Some(created) => return Ok(created),
                        // A transient conflict, or somebody deleted it: the name is free, try again.
                        None => Error::temporary(format!(
                            "creating {}/{name}: the store answers \"exists\" for a free name",
                            self.shown
                        )),
                    }
                }
                Err(error @ object_store::Error::Generic { .. }) if is_permission_io(&error) => {
                    return Err(self.error("creating", name, error));
                }
                Err(error @ (object_store::Error::Generic { .. } | object_store::Error::JoinError { .. })) => {
                    self.error("creating", name, error)
                }
                Err(error) => return Err(self.error("creating", name, error)),
            };
            if has_fault("unclear") {
                return Ok(Created::Won);
            }
            if has_fault("absent") && self.there(name, &bytes, look).await?.is_none() {
                return Err(unclear);
            }
            if tokio::time::Instant::now() + wait > deadline {
                return Err(unclear);
            }
            tokio::time::sleep(wait).await;
            self.check_root()?;
            wait = (wait * 2).min(Duration::from_secs(10));
        }
    }

    /// For stores without conditional create, where configuration promises one writer: look, write, read
    /// back, one process of this host at a time.
    async fn create_single_writer(&self, name: &str, bytes: Bytes, look: Look) -> Result<Created> {
        let _lock = self.lock_single_writer().await?;
        if let Some(created) = self.there(name, &bytes, look).await? {
            return Ok(created);
        }
        // An unclear answer is followed by the same bytes again: a late write of ours must not meet another's.
        let deadline = tokio::time::Instant::now() + self.settings.retry_timeout;
        while let Err(error) = self.put_hashed(name, bytes.clone().into()).await {
            if error.kind() != Kind::Temporary || tokio::time::Instant::now() > deadline {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        match self.there(name, &bytes, look).await? {
            Some(created) => Ok(created),
            None => Err(Error::temporary(format!(
                "{}/{name} is not there after it was written",
                self.shown
            ))),
        }
    }

    async fn lock_single_writer(&self) -> Result<std::fs::File> {
        let path = self.settings.lock_file.clone().ok_or_else(|| {
            Error::usage(format!("{}: single_writer = true needs a cache folder", self.shown)).remedy(
                "set `cache` in the configuration to a folder that every command of this host uses: a lock file there keeps them apart",
            )
        })?;
        let what = format!("locking {}", path.display());
        let lock = move || {
            if let Some(folder) = path.parent() {
                std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
            }
            let mut options = std::fs::File::options();
            let file = options.create(true).append(true).mode(0o600).open(&path)?;
            file.lock()?;
            Ok(file)
        };
        match tokio::task::spawn_blocking(lock).await {
            Ok(locked) => locked.map_err(|e| Error::io(what, e)),
            Err(error) => Err(Error::failed(what).caused_by(error)),
        }
    }

    /// A whole object of at most `limit` bytes; nothing of a larger one is read.
    pub async fn get(&self, name: &str, limit: u64) -> Result<Bytes> {
        let path = self.path(name)?;
        let fetch = || async {
            let found = self.inner.get(&path).await?;
            match check_limit(&format!("{}/{name}", self.shown), found.meta.size, limit) {
                Ok(()) => Ok(Ok(found.bytes().await?)),
                Err(error) => Ok(Err(error)),
            }
        };
        Ok(self
            .throttled(fetch)
            .await
            .map_err(|e| self.error("reading", name, e))??)
    }

    /// A whole object, `None` if there is none.
    pub async fn get_opt(&self, name: &str, limit: u64) -> Result<Option<Bytes>> {
        match self.get(name, limit).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A part of an object. Shorter than asked for, or empty, means that the object ends there.
    pub async fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes> {
        let path = self.path(name)?;
        let fetch = || {
            let options = GetOptions {
                range: Some(GetRange::Bounded(range.clone())),
                ..Default::default()
            };
            async { self.inner.get_opts(&path, options).await?.bytes().await }
        };
        match self.throttled(fetch).await {
            Ok(bytes) => Ok(bytes),
            // A range behind the end is an error of a general kind (416): the length tells.
            Err(error @ object_store::Error::Generic { .. }) => match self.len(name).await? {
                Some(len) if len <= range.start => Ok(Bytes::new()),
                _ => Err(self.error("reading", name, error)),
            },
            Err(error) => Err(self.error("reading", name, error)),
        }
    }

    /// Length of an object, bytes; `None` if there is none.
    pub async fn len(&self, name: &str) -> Result<Option<u64>> {
        let path = self.path(name)?;
        match self.throttled(|| self.inner.head(&path)).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.error("looking at", name, error)),
        }
    }

    /// Everything below `folder`: names relative to this store, with lengths, sorted. A hint, no proof.
    pub async fn list(&self, folder: &str) -> Result<Vec<(String, u64)>> {
        let path = self.path(folder)?;
        let skip = self.key("").len();
        let listing = || {
            self.inner
                .list(Some(&path))
                .map_ok(|meta| (meta.location.as_ref()[skip..].to_owned(), meta.size))
                .try_collect()
        };
        let mut found: Vec<(String, u64)> = self
            .throttled(listing)
            .await
            .map_err(|e| self.error("listing", folder, e))?;
        found.sort();
        Ok(found)
    }

    /// What is named by its hash below `folder`, with lengths, sorted. Names are not held: this is 40 bytes an object. A
    /// hint, no proof.
    pub async fn list_hashes(&self, folder: &str) -> Result<Vec<([u8; 32], u64)>> {
        let path = self.path(folder)?;
        let listing = || async {
            let mut listed = self.inner.list(Some(&path));
            let mut found = Vec::new();
            while let Some(meta) = listed.try_next().await? {
                found.extend(names::parse_hash(meta.location.as_ref()).map(|hash| (hash, meta.size)));
            }
            Ok(found)
        };
        let listed = self.throttled(listing).await;
        let mut found = listed.map_err(|e| self.error("listing", folder, e))?;
        found.sort_unstable();
        Ok(found)
    }

    /// Names below `folder` that come after `name` and begin with `prefix`, sorted. Where the store lists in
    /// order, this costs one request for few names, however many there are behind them. A hint, no proof.
    pub async fn list_after(&self, folder: &str, name: &str, prefix: &str) -> Result<Vec<String>> {
        let (path, offset) = (self.path(folder)?, self.path(name)?);
        let skip = self.key("").len();
        let ordered = self.settings.ordered_lists;
        let listing = || async {
            let mut listed = self.inner.list_with_offset(Some(&path), &offset);
            let mut found = Vec::new();
            while let Some(meta) = listed.try_next().await? {
                let found_name = &meta.location.as_ref()[skip..];
                // Not every store knows where to begin, and says so.
                if meta.location <= offset {
                    continue;
                }
                if found_name.starts_with(prefix) {
                    found.push(found_name.to_owned());
                } else if ordered && found_name > prefix {
                    break;
                }
            }
            found.sort();
            Ok(found)
        };
        self.throttled(listing)
            .await
            .map_err(|e| self.error("listing", folder, e))
    }

    /// Whether anything is listed below `folder`.
    pub async fn has_any(&self, folder: &str) -> Result<bool> {
        let path = self.path(folder)?;
        let listing = || async { self.inner.list(Some(&path)).try_next().await };
        let first = self.throttled(listing).await;
        Ok(first.map_err(|e| self.error("listing", folder, e))?.is_some())
    }

    /// Names of the folders directly below this store.
    pub async fn folders(&self) -> Result<Vec<String>> {
        let prefix = (!self.prefix.is_empty()).then(|| Path::from(self.prefix.as_str()));
        let result = self
            .throttled(|| self.inner.list_with_delimiter(prefix.as_ref()))
            .await
            .map_err(|e| self.error("listing", "", e))?;
        let mut names: Vec<String> = result
            .common_prefixes
            .iter()
            .filter_map(|p| p.filename().map(str::to_owned))
            .collect();
        names.sort();
        Ok(names)
    }

    /// Deletes objects; what is not there counts as deleted.
    pub async fn delete(&self, names: &[String]) -> Result<()> {
        let paths: Vec<_> = names.iter().map(|n| self.path(n)).collect::<Result<_>>()?;
        let mut results = self
            .inner
            .delete_stream(futures::stream::iter(paths.into_iter().map(Ok)).boxed());
        while let Some(result) = results.next().await {
            match result {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(self.error("deleting from", "", error)),
            }
        }
        Ok(())
    }
}

fn is_throttle(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::Generic { .. }) && {
        let text = error.to_string();
        text.contains("RequestRateLimitExceeded") || text.contains("<Code>SlowDown</Code>")
    }
}

/// The client below has no word of its own for a list that is denied.
fn is_denied(error: &object_store::Error) -> bool {
    use object_store::Error as E;
    match error {
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => true,
        E::Generic { .. } => error.to_string().contains("403 Forbidden"),
        _ => false,
    }
}

/// What a bucket with object lock says to an upload that it cannot check.
fn lacks_checksum(error: &object_store::Error) -> bool {
    let text = error.to_string();
    text.contains("400 Bad Request") && text.contains("Content-MD5")
}

/// What a bucket says to whoever reads an object that was stored with a key which the store does not keep (SSE-C): trying
/// again does not help.
fn is_of_other_key(error: &object_store::Error) -> bool {
    let text = error.to_string();
    text.contains("400 Bad Request") && text.contains("Server Side Encryption")
}

/// The first I/O error among the causes.
fn io_cause(error: &object_store::Error) -> Option<&std::io::Error> {
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return Some(io);
        }
        source = cause.source();
    }
    None
}

/// EIO: asking again does not help.
fn is_bad_medium(error: &object_store::Error) -> bool {
    io_cause(error).is_some_and(|io| io.raw_os_error() == Some(5))
}

fn is_permission_io(error: &object_store::Error) -> bool {
    use std::io::ErrorKind as K;
    io_cause(error).is_some_and(|io| {
        matches!(
            io.kind(),
            K::PermissionDenied | K::ReadOnlyFilesystem | K::NotADirectory
        )
    })
}
