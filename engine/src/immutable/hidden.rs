//! Objects that are needed and cannot be seen: below a delete marker, or below a version with other content.
//!
//! A marker is taken away where the credentials may do that; above anything else, the right version is stored once
//! more. No content is ever deleted.

use bytes::Bytes;
use fairvault_format::{keys, limits, names, proto, sha256};
use futures::{StreamExt, TryStreamExt};
use serde::Serialize;
use tokio::sync::Semaphore;

use super::needs::Needs;
use super::pieces::{Pieces, Settled};
use crate::commit::Log;
use crate::error::{Error, Kind, Result};
use crate::stanza::Access;
use crate::store::Store;
use crate::store::versions::{Deleted, Object, Version};

/// Objects that are brought back at once.
const CONCURRENT: usize = 16;
/// Of these, objects that are held in memory.
const HELD: usize = 2;
/// Versions of one object that are read to find the right one.
const TRIES: usize = 16;

/// A hidden object.
#[derive(Debug, Clone, Serialize)]
pub struct Hidden {
    /// Name.
    pub object: String,
    /// What hides it.
    pub problem: String,
    /// It can be seen again.
    pub brought_back: bool,
    #[serde(skip)]
    store: Store,
    #[serde(skip)]
    right: Version,
    /// Above the right version there are these markers, and nothing else.
    #[serde(skip)]
    markers: Option<Vec<Version>>,
}

impl Hidden {
    pub(super) fn new(store: &Store, object: &Object, right: &Version) -> Self {
        let above: Vec<Version> = object
            .versions
            .iter()
            .take_while(|v| v.id != right.id)
            .cloned()
            .collect();
        let by = above.first().unwrap_or(right);
        let when = jiff::Timestamp::from_microsecond(by.modified_us).unwrap_or_default();
        let when = when.strftime("%Y-%m-%dT%H:%M:%SZ");
        Self {
            object: object.name.clone(),
            problem: match by.is_marker {
                true => format!("it was deleted at {when}, and the bucket still has it"),
                false => format!("it was replaced at {when}, and the bucket still has what was there before"),
            },
            brought_back: false,
            store: store.clone(),
            right: right.clone(),
            markers: above.iter().all(|version| version.is_marker).then_some(above),
        }
    }

    /// Makes the right version the newest one.
    async fn bring_back(&mut self, memory: &Semaphore) -> Result<()> {
        if !self.take_markers().await? {
            let _held = memory.acquire().await;
            let bytes = self.read().await?.ok_or_else(|| {
                Error::temporary(format!(
                    "{}/{} changes while it is repaired",
                    self.store.shown(),
                    self.object
                ))
                .remedy("run this again")
            })?;
            self.store.put_hashed(&self.object, bytes.into()).await?;
        }
        self.brought_back = true;
        Ok(())
    }

    /// `false` if that is not all there is to do, or not allowed.
    async fn take_markers(&self) -> Result<bool> {
        let Some(markers) = self.markers.as_ref().filter(|_| self.store.settings().may_delete) else {
            return Ok(false);
        };
        // Where versioning is suspended, whatever comes next has the same id as the marker, and would be deleted for it.
        if markers.iter().any(|marker| marker.id == "null") {
            return Ok(false);
        }
        for marker in markers {
            if let Deleted::Refused(why) = self.store.delete_version(&self.object, &marker.id).await? {
                tracing::debug!("the marker above {} stays: {why}", self.object);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The right content; `None` if its version is gone.
    pub(crate) async fn read(&self) -> Result<Option<Bytes>> {
        let limit = limit(&self.object);
        self.store.get_version(&self.object, &self.right.id, limit).await
    }
}

/// Brings all of them back, and adds those to `done` that are: also if another one then fails.
pub async fn bring_back(hidden: Vec<Hidden>, done: &mut Vec<Hidden>) -> Result<()> {
    let memory = &Semaphore::new(HELD);
    let each = hidden.into_iter().map(|mut hidden| async move {
        hidden.bring_back(memory).await?;
        tracing::info!("{} is there again", hidden.object);
        Ok::<_, Error>(hidden)
    });
    let mut back = futures::stream::iter(each).buffered(CONCURRENT);
    while let Some(hidden) = back.try_next().await? {
        done.push(hidden);
    }
    Ok(())
}

fn limit(name: &str) -> u64 {
    match name.split('/').next().unwrap_or_default() {
        names::REPOSITORY => limits::REPOSITORY_JSON_BYTES,
        names::KEYS => limits::SLOT_BYTES,
        names::LOG => limits::LOG_ENTRY_BYTES,
        names::PACKS => limits::PACK_BYTES,
        names::WAL => limits::WAL_OBJECT_BYTES,
        _ => limits::OBJECT_BYTES,
    }
}

/// The hash that an object's content must have, if its name says so.
fn hash_of(name: &str) -> Option<[u8; 32]> {
    let folder = name.split('/').next()?;
    let is_hashed = [names::PACKS, names::INDEX, names::ROOTS].contains(&folder);
    is_hashed.then(|| names::parse_hash(name)).flatten()
}

fn is_suspicious(object: &Object) -> bool {
    !object.is_visible() || object.versions.len() > 1
}

/// Whether the store says that all versions with content have the same; `true` also if there is one, or none.
pub(super) fn have_same_content(object: &Object) -> bool {
    let Some(oldest) = object.contents().next() else {
        return true;
    };
    object
        .contents()
        .skip(1)
        .all(|version| !version.etag.is_empty() && version.etag == oldest.etag && version.size == oldest.size)
}

/// Finds the right version of an object, and says whether anything hides it. `None` also if there is no right version:
/// then the object is damaged, and that is found elsewhere.
async fn judge(store: &Store, object: &Object) -> Result<Option<Hidden>> {
    let Some(oldest) = object.contents().next() else {
        return Ok(None);
    };
    let newest = object.versions.first().filter(|newest| !newest.is_marker);
    if have_same_content(object) {
        return Ok(match newest {
            Some(_) => None,
            None => Some(Hidden::new(store, object, oldest)),
        });
    }
    let (name, limit) = (&object.name, limit(&object.name));
    let Some(hash) = hash_of(name) else {
        // Other names of the same content are possible where the store encrypts.
        let is_right = match newest {
            Some(newest) if newest.size == oldest.size => {
                // One that nobody can read hides what is below.
                let is = match store.get_version(name, &newest.id, limit).await {
                    Err(error) if !matches!(error.kind(), Kind::Temporary | Kind::Interrupted) => None,
                    read => Some(read?),
                };
                is == Some(store.get_version(name, &oldest.id, limit).await?)
            }
            _ => false,
        };
        return Ok((!is_right).then(|| Hidden::new(store, object, oldest)));
    };
    for version in newest.into_iter().chain(object.contents()).take(TRIES) {
        // One that is longer than an object can be is not the right one.
        let bytes = match store.get_version(name, &version.id, limit).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == Kind::Temporary => return Err(error),
            Err(_) => None,
        };
        if bytes.is_some_and(|bytes| sha256(&bytes) == hash) {
            let is_seen = newest.is_some_and(|newest| newest.id == version.id);
            return Ok((!is_seen).then(|| Hidden::new(store, object, version)));
        }
    }
    Ok(None)
}

/// The content of a hidden object that is named by its hash; `None` if no version has it. An error if the bucket may not be
/// asked: what may be there is not gone.
pub async fn right_content(store: &Store, name: &str) -> Result<Option<Bytes>> {
    if !store.bucket().await?.is_some_and(|bucket| bucket.has_versions) {
        return Ok(None);
    }
    for object in store
        .all_versions(name)
        .await?
        .iter()
        .filter(|object| object.name == name)
    {
        if let Some(hidden) = judge(store, object).await? {
            return hidden.read().await;
        }
    }
    Ok(None)
}

/// Hidden objects that a stanza is opened with: the repository's description and key slots. No key is needed.
pub async fn of_opening(access: &Access) -> Result<Vec<Hidden>> {
    let repository = &access.repository;
    let mut found = Vec::new();
    if !repository.bucket_or_plain().await?.has_versions {
        return Ok(found);
    }
    let stanza = repository.folder(&access.stanza);
    let description = repository.all_versions(names::REPOSITORY).await?;
    let slots = stanza.all_versions(&format!("{}/", names::KEYS)).await?;
    for object in description
        .iter()
        .filter(|object| object.name == names::REPOSITORY && is_suspicious(object))
    {
        found.extend(judge(repository, object).await?);
    }
    for object in slots.iter().filter(|object| is_suspicious(object)) {
        found.extend(judge(&stanza, object).await?);
    }
    Ok(found)
}

/// Whether this is a key slot.
pub(crate) fn is_slot(hidden: &Hidden) -> bool {
    hidden.object.split('/').next() == Some(names::KEYS)
}

/// All key slots of a stanza that can be read, with the right content of those that [`of_opening`] has found. Nothing is
/// brought back.
pub async fn slots(stanza: &Store, found: &[Hidden]) -> Result<Vec<proto::Slot>> {
    let mut contents = Vec::new();
    for hidden in found.iter().filter(|hidden| is_slot(hidden)) {
        contents.push((hidden.object.clone(), hidden.read().await));
    }
    for (name, _) in stanza.list(names::KEYS).await? {
        if found.iter().all(|hidden| hidden.object != name) {
            let content = stanza.get_opt(&name, limits::SLOT_BYTES).await;
            contents.push((name, content));
        }
    }
    let mut slots = Vec::new();
    for (name, content) in contents {
        let slot = match content {
            Ok(None) => continue,
            Ok(Some(bytes)) => keys::decode_slot(&bytes, &name).map_err(Error::from),
            Err(error) if error.kind() == Kind::Temporary => return Err(error),
            Err(error) => Err(error),
        };
        match slot {
            Ok(slot) => slots.push(slot),
            Err(error) => tracing::debug!("a key slot is passed over: {error}"),
        }
    }
    Ok(slots)
}

/// Entries of the log below a delete marker: entries are never deleted. No key is needed.
pub async fn deleted_entries(stanza: &Store) -> Result<Vec<Hidden>> {
    let mut found = Vec::new();
    if !stanza.bucket_or_plain().await?.has_versions {
        return Ok(found);
    }
    for object in stanza.all_versions(&format!("{}/", names::LOG)).await? {
        if let Some(oldest) = object.contents().next().filter(|_| !object.is_visible()) {
            found.push(Hidden::new(stanza, &object, oldest));
        }
    }
    Ok(found)
}

/// Hidden objects among what a log that was read to its end, and its backups, need.
pub async fn of_content(log: &Log) -> Result<Vec<Hidden>> {
    let stanza = log.stanza();
    let store = stanza.store();
    let mut found = Vec::new();
    if !store.bucket_or_plain().await?.has_versions {
        return Ok(found);
    }
    let needs = Needs::of(log, 0, |_| 0).await?;
    for folder in [names::ROOTS, names::PACKS, names::INDEX] {
        let mut listing = store.versions(&format!("{folder}/"));
        while let Some(page) = listing.next().await? {
            let is_wanted = |object: &&Object| is_suspicious(object) && needs.until(&object.name).is_some();
            for object in page.iter().filter(is_wanted) {
                found.extend(judge(store, object).await?);
            }
        }
    }
    let (mut pieces, mut settled) = (Pieces::new(stanza), Settled::default());
    let mut listing = store.versions(&format!("{}/", names::WAL));
    while let Some(page) = listing.next().await? {
        for object in page {
            let is_needed = needs.until(&object.name).is_some();
            if let Some(object) = pieces.next(object, &mut settled).await?
                && is_needed
                && is_suspicious(&object)
            {
                found.extend(judge(store, &object).await?);
            }
        }
    }
    pieces.settle(&mut settled).await?;
    for object in settled.needed.iter().filter(|piece| needs.until(&piece.name).is_some()) {
        found.extend(judge(store, object).await?);
    }
    Ok(found)
}
