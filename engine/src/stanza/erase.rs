//! Erasing a stanza by destroying its keys: what is stored stays where it is, and opens no more.
//!
//! What always holds: the log says so, signed by the operator, before the first slot goes; what died half-way is gone on
//! with by running it again, also where the slots that opened the log are gone already; what is not known to be destroyed
//! is said.

use fairvault_format::erased::ErasedNote;
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use fairvault_format::{keys, limits, names};

use super::{Access, Stanza, keys_in, read_repository, read_slot, slots};
use crate::commit::{Log, erased};
use crate::env::has_fault;
use crate::error::{Error, Kind, Result};
use crate::store::versions::Deleted;
use crate::store::{Created, Store};

/// Longest reason that is kept, characters.
const REASON: usize = 500;

/// What was done.
#[derive(Debug, Clone)]
pub struct Report {
    /// Who erased it when, and why.
    pub erased: proto::Erased,
    /// Slot objects that were deleted now.
    pub slots: usize,
    /// Older versions of slots that were deleted for good.
    pub versions: usize,
    /// Versions of slots that the bucket still has, and why: with the secret of one, the stanza opens.
    pub left: Vec<String>,
}

/// What is to be done in one repository.
pub enum Plan {
    /// The log is open.
    Open(Box<Log>),
    /// An earlier run came as far as this: nothing opens any more.
    Noted(proto::Erased),
}

/// The note in a stanza's folder that it was erased, if there is one.
pub async fn note(stanza: &Store) -> Result<Option<proto::Erased>> {
    let bytes = stanza.get_opt(names::ERASED, limits::REPOSITORY_JSON_BYTES).await?;
    let what = format!("{}/{}", stanza.shown(), names::ERASED);
    Ok(match bytes {
        Some(bytes) => Some(ErasedNote::decode(&bytes, &what)?.erased()),
        None => None,
    })
}

/// Fails if a note says that the stanza was erased, where no slot can be seen and the log is not asked. It is not signed:
/// whoever may write to the store can leave one.
pub async fn check_note(stanza: &Store) -> Result<()> {
    let remedy = format!(
        "that is what {}/{} says, and somebody with access to the store can have made it. If it is not so, bring the slots \
         back with `fairvault key import` or `fairvault repair`: they ask the log",
        stanza.shown(),
        names::ERASED
    );
    match note(stanza).await {
        Ok(None) => Ok(()),
        Ok(Some(found)) => Err(erased::error(stanza.shown(), &found).remedy(remedy)),
        Err(error) if error.kind() == Kind::Damaged => Err(error.remedy(remedy)),
        Err(error) => Err(error),
    }
}

/// Finds out what an erasure would do; changes nothing.
pub async fn plan(access: &Access) -> Result<Plan> {
    let store = access.repository.folder(&access.stanza);
    let opened = async {
        let stanza = Stanza::open(&Access {
            memory: None,
            ..access.clone()
        })
        .await?;
        Log::unread(stanza).also_erased().replayed().await
    };
    match opened.await {
        Ok(log) => {
            let stanza = log.stanza();
            slots::check_encrypted(stanza)?;
            slots::check_operator(stanza, "a stanza is erased")?;
            Ok(Plan::Open(Box::new(log)))
        }
        Err(error) if error.kind() == Kind::Temporary => Err(error),
        // What opened it may be gone already.
        Err(error) => {
            let noted = note(&store).await?.ok_or(error)?;
            check_left(access, &store).await?;
            Ok(Plan::Noted(noted))
        }
    }
}

/// A note is not signed, and goes for nothing where the log does not open: what is left of slots must be the given secret's,
/// and the operator's.
async fn check_left(access: &Access, store: &Store) -> Result<()> {
    let listed = store.list(names::KEYS).await?;
    if listed.is_empty() {
        return Ok(());
    }
    let repository = read_repository(&access.repository).await?.id()?;
    for (name, _) in listed {
        let slot = match read_slot(store, &name, &repository).await {
            Err(error) if error.kind() == Kind::Temporary => return Err(error),
            read => read.ok(),
        };
        let keys = slot.and_then(|slot| keys_in(&slot, access.secret.as_ref(), &keys::slot_scope(&slot)));
        if keys.is_none_or(|keys| keys.operator_seed.is_none()) {
            return Err(Error::refused(format!(
                "{}/{} says that the stanza was erased, which anybody with access to the store can have written; the log does \
                 not open with the given key, and neither does {name}, which is still there: nothing was deleted",
                store.shown(),
                names::ERASED
            ))
            .remedy(
                "give the operator's key with --key-file. If the note is a lie, remove it; if the stanza was erased, delete what \
                 is left below keys/ with the tools of the store",
            ));
        }
    }
    Ok(())
}

/// Carries out what [`plan`] has found.
pub async fn erase(access: &Access, reason: &str, plan: Plan) -> Result<Report> {
    let store = access.repository.folder(&access.stanza);
    let (erased, own) = match plan {
        Plan::Noted(erased) => (erased, Vec::new()),
        Plan::Open(mut log) => {
            if log.state().erased.is_none() {
                let entry = proto::Erasure {
                    epoch: 0,
                    reason: reason.chars().take(REASON).collect(),
                };
                log.append(Entry::Erasure(entry), |_| Ok(())).await?;
            }
            let erased = log.state().erased.clone();
            let erased = erased.ok_or_else(|| Error::failed("the erasure is not in the log"))?;
            let all = slots::all(&log).await?;
            let is_own = |slot: &slots::SlotObject| slot.keys(access.secret.as_ref(), log.stanza()).is_some();
            let own: Vec<String> = all.into_iter().filter(is_own).map(|slot| slot.object).collect();
            (erased, own)
        }
    };
    if has_fault("erase before its note") {
        return Err(Error::failed("the erasure dies before its note, as was asked for"));
    }
    let bytes = ErasedNote::new(&erased).encode();
    let created = store
        .create(names::ERASED, bytes.clone().into(), limits::REPOSITORY_JSON_BYTES)
        .await?;
    if let Created::Lost(there) = created
        && there[..] != bytes[..]
    {
        tracing::warn!(
            "{}/{} was there and says something else than the log; it stays, since nothing is written over: the log counts, and \
             whoever reads the note without it is told what is not so",
            store.shown(),
            names::ERASED
        );
    }
    let deleted = delete_slots(&store, &own).await?;
    let (versions, left) = delete_versions(&store).await?;
    if let Some(memory) = &access.memory {
        memory.forget_stanza(access);
    }
    Ok(Report {
        erased,
        slots: deleted,
        versions,
        left,
    })
}

/// Deletes all slots; those that open the log for whoever does it go last, so that it can be done again.
async fn delete_slots(store: &Store, own: &[String]) -> Result<usize> {
    let listed = store.list(names::KEYS).await?;
    let (last, first): (Vec<String>, Vec<String>) = listed
        .into_iter()
        .map(|(name, _)| name)
        .partition(|name| own.contains(name));
    store.delete(&first).await?;
    if has_fault("erase half-way") {
        return Err(Error::failed(
            "the erasure dies before the last slots, as was asked for",
        ));
    }
    store.delete(&last).await?;
    match store.list(names::KEYS).await?.first() {
        None => Ok(first.len() + last.len()),
        Some((name, _)) => Err(Error::temporary(format!(
            "{}/{name} is still there after it was deleted",
            store.shown()
        ))
        .remedy("run this again")),
    }
}

/// Deletes what a bucket keeps of slots; returns how many versions went, and what stays.
async fn delete_versions(store: &Store) -> Result<(usize, Vec<String>)> {
    let (mut gone, mut left) = (0, Vec::new());
    let bucket = match store.bucket().await {
        Ok(Some(bucket)) => bucket,
        // A folder has none; of other stores it cannot be asked.
        Ok(None) => {
            left.extend(store.directory().is_none().then(|| {
                format!(
                    "whether {} keeps older versions of deleted objects is not known: delete those below {} with the tools of the \
                     store",
                    store.shown(),
                    names::KEYS
                )
            }));
            return Ok((0, left));
        }
        Err(error) if error.kind() == Kind::Temporary => return Err(error),
        Err(error) => {
            left.push(format!(
                "whether the bucket keeps older versions of slots is not known: {error}"
            ));
            return Ok((0, left));
        }
    };
    if !bucket.has_versions {
        return Ok((0, left));
    }
    for object in store.all_versions(&format!("{}/", names::KEYS)).await? {
        let mut stays = false;
        for version in object.contents() {
            let why = match store.delete_version(&object.name, &version.id).await {
                Ok(Deleted::Gone) => {
                    gone += 1;
                    continue;
                }
                Ok(Deleted::Refused(why)) => why,
                Err(error) if error.kind() == Kind::Temporary => return Err(error),
                Err(error) => error.to_string(),
            };
            stays = true;
            let lock = store.lock_of(&object.name, &version.id).await.ok().flatten();
            let until = lock.map(|lock| jiff::Timestamp::from_microsecond(lock.until_us).unwrap_or_default());
            left.push(match until {
                Some(until) => format!(
                    "a version of {} is locked until {}",
                    object.name,
                    until.strftime("%Y-%m-%dT%H:%M:%SZ")
                ),
                None => format!("a version of {} could not be deleted: {why}", object.name),
            });
        }
        // Without its marker, what stays below it would be seen again.
        for marker in object.versions.iter().filter(|version| version.is_marker && !stays) {
            let _ = store.delete_version(&object.name, &marker.id).await?;
        }
    }
    Ok((gone, left))
}
