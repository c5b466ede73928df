//! Making a stanza: repository description, keys, first log entry, in an order that can be repeated after
//! a crash at any point.

use std::sync::Arc;

use fairvault_format::keys::{self, EpochKeys, Scope};
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use fairvault_format::{limits, names, repository::Repository};

use super::{Access, Stanza, erase, read_repository, slots};
use crate::commit::Log;
use crate::commit::authors::Deed;
use crate::env::{self, Env};
use crate::error::{Error, Kind, Result};
use crate::store::{Created, Store, probe};

/// The cluster that the stanza is for.
#[derive(Debug, Clone, Copy)]
pub struct Cluster {
    /// System identifier.
    pub system_identifier: u64,
    /// Major version.
    pub major: u32,
    /// wal_segment_size, bytes.
    pub wal_segment_size: u64,
}

/// Creates the stanza, or, if it exists and is of the same cluster, opens it.
pub async fn create(access: &Access, cluster: Cluster, slot: &str) -> Result<Log> {
    create_with(access, cluster, slot, DataKeys::Symmetric).await
}

/// The same; what is created seals content with such keys.
pub async fn create_with(access: &Access, cluster: Cluster, slot: &str, data: DataKeys) -> Result<Log> {
    names::check_name("stanza name", &access.stanza)?;
    names::check_name("slot name", slot)?;
    let env = &*access.env;
    if access.repository.settings().single_writer {
        tracing::warn!(
            "{}: single_writer = true: nothing protects it against a second writer",
            access.repository.shown()
        );
    } else {
        probe::probe(&access.repository, env).await?;
    }
    let repository = ensure_repository(&access.repository, env).await?;
    let store = access.repository.folder(&access.stanza);
    if store.list(names::KEYS).await?.is_empty() {
        check_unused(access, &store).await?;
        let scope = Scope {
            repository: repository.id()?,
            stanza: env::id(env)?,
        };
        let keys = new_keys(env, 1, data)?;
        let sealed = keys::seal_slot(
            &scope,
            &keys,
            slot,
            access.secret.as_ref(),
            keys::default_argon2(),
            env::salt(env)?,
            env.now_us(),
        )?;
        let object = names::slot(1, slot);
        if let Created::Lost(there) = store.create(&object, sealed.into(), limits::SLOT_BYTES).await? {
            let since = slots::since(&object, keys::decode_slot(&there, &object).ok().as_ref());
            return Err(Error::new(
                Kind::Held,
                format!("somebody else is creating stanza {} just now{since}", access.stanza),
            )
            .remedy("run it again: with the same key, it goes on with what the other one has made"));
        }
    }
    // From the store: what this host remembers must not stand in for what the repository holds.
    let from_store = Access {
        memory: None,
        ..access.clone()
    };
    Stanza::open(&from_store).await?;
    let stanza = Stanza::open(access).await?;
    let log = match Log::open(stanza.clone()).await {
        Err(error) if error.kind() == Kind::NotFound => begin_log(stanza, access, cluster, slot).await?,
        other => other?,
    };
    check_cluster(&log, &cluster)?;
    if data == DataKeys::Public && !log.stanza().keys().has_public_key() {
        return Err(Error::refused(format!(
            "stanza {} is there, and its content is not sealed to a public key",
            access.stanza
        ))
        .remedy(format!(
            "change that with `fairvault key rotate {} --public-key`",
            access.stanza
        )));
    }
    Ok(log)
}

/// New keys are made only where nothing is: a stanza whose key slots were lost, or a LIST that shows too
/// little, must not be written over.
async fn check_unused(access: &Access, store: &Store) -> Result<()> {
    erase::check_note(store).await?;
    let first = names::log_context(1);
    let has_log = store.get_opt(&first, limits::LOG_ENTRY_BYTES).await?.is_some() || store.has_any(names::LOG).await?;
    let found = match has_log {
        true => Some(names::LOG),
        false => content(store).await?,
    };
    if let Some(found) = found {
        return Err(Error::refused(format!(
            "{} has no key slots and yet holds {found}: its keys were lost, and new ones would not open what is there",
            store.shown()
        ))
        .remedy("bring back the objects below keys/, or choose another stanza name; delete the whole folder only if nothing in it is needed"));
    }
    match access.memory.as_ref().and_then(|m| m.knows(access)) {
        None => Ok(()),
        Some(place) => Err(Error::refused(format!(
            "this host knows stanza {} in {}, and there it is empty: was it deleted, or is this another bucket?",
            access.stanza,
            access.repository.shown()
        ))
        .remedy(format!("if it was emptied on purpose, delete {}", place.display()))),
    }
}

/// A folder with something that only a stanza with a log can have.
async fn content(store: &Store) -> Result<Option<&'static str>> {
    for folder in [names::PACKS, names::INDEX, names::ROOTS, names::SNAPSHOTS, names::WAL] {
        if store.has_any(folder).await? {
            return Ok(Some(folder));
        }
    }
    Ok(None)
}

async fn ensure_repository(store: &Store, env: &dyn Env) -> Result<Repository> {
    // Every key slot carries the repository's id: if only the description was lost, it keeps its id.
    let known = async || -> Result<Option<[u8; 16]>> {
        for stanza in store.folders().await? {
            for (name, _) in store.list(&format!("{stanza}/{}", names::KEYS)).await? {
                let bytes = store.get(&name, limits::SLOT_BYTES).await?;
                if let Ok(slot) = keys::decode_slot(&bytes, &name) {
                    tracing::warn!(
                        "{} of {} was lost and is written again",
                        names::REPOSITORY,
                        store.shown()
                    );
                    return Ok(Some(keys::slot_scope(&slot).repository));
                }
            }
        }
        Ok(None)
    };
    if store
        .get_opt(names::REPOSITORY, limits::REPOSITORY_JSON_BYTES)
        .await?
        .is_none()
    {
        let id = match known().await? {
            Some(id) => id,
            None => env::id(env)?,
        };
        let created = Repository::new(id);
        store
            .create(
                names::REPOSITORY,
                created.encode().into(),
                limits::REPOSITORY_JSON_BYTES,
            )
            .await?;
    }
    read_repository(store).await
}

/// What content is sealed with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DataKeys {
    /// One key: whoever writes can read.
    #[default]
    Symmetric,
    /// A public key: whoever has only that can write, and not read.
    Public,
}

impl DataKeys {
    /// What the content of an epoch is sealed with.
    pub fn of(keys: &EpochKeys) -> Self {
        match keys.has_public_key() {
            true => Self::Public,
            false => Self::Symmetric,
        }
    }
}

/// Fresh secrets.
pub fn new_keys(env: &dyn Env, epoch: u32, data: DataKeys) -> Result<EpochKeys> {
    let random = env::salt(env)?;
    Ok(EpochKeys {
        epoch,
        data_key: (data == DataKeys::Symmetric).then_some(random),
        data_private_key: (data == DataKeys::Public).then_some(random),
        id_key: env::salt(env)?,
        meta_key: env::salt(env)?,
        writer_seed: Some(env::salt(env)?),
        operator_seed: Some(env::salt(env)?),
        public_keys: Default::default(),
    })
}

async fn begin_log(stanza: Arc<Stanza>, access: &Access, cluster: Cluster, slot: &str) -> Result<Log> {
    if let Some(found) = content(stanza.store()).await? {
        return Err(Error::damaged(format!(
            "{} has no log and yet holds {found}: its log was lost",
            stanza.shown()
        ))
        .remedy("bring back the objects below log/ from a copy, or from older versions where the bucket keeps them: without them no backup can be found"));
    }
    let bundle = stanza.keys().to_bundle();
    let genesis = proto::Genesis {
        repository_id: stanza.scope().repository.to_vec(),
        stanza_id: stanza.scope().stanza.to_vec(),
        stanza: access.stanza.clone(),
        encrypted: access.secret.is_some(),
        key_epoch: Some(proto::KeyEpoch {
            epoch: stanza.keys().epoch,
            writer_public_key: bundle.writer_public_key.clone(),
            operator_public_key: bundle.operator_public_key.clone(),
            data_public_key: bundle.data_public_key.clone(),
            slots: vec![slot.to_owned()],
        }),
        incarnation: Some(proto::Incarnation {
            system_identifier: cluster.system_identifier,
            server_major: cluster.major,
            wal_segment_size: cluster.wal_segment_size,
        }),
        single_writer: access.repository.settings().single_writer,
    };
    let mut log = Log::empty(stanza.clone());
    let is_first = |state: &proto::Snapshot| match state.seq {
        0 => Ok(()),
        _ => Err(Error::new(Kind::Held, "somebody else has created it")),
    };
    match log.append(Entry::Genesis(genesis), is_first).await {
        Ok(_) => Log::open(stanza).await,
        Err(error) if error.kind() == Kind::Held => Err(Error::new(
            Kind::Held,
            format!(
                "somebody else has created stanza {} just now{}",
                access.stanza,
                log.whose(Deed::Creation)
            ),
        )
        .remedy("run it again: it opens what the other one has made, if that is of the same cluster")),
        Err(error) => Err(error),
    }
}

/// Fails if the log is of another cluster.
pub fn check_cluster(log: &Log, cluster: &Cluster) -> Result<()> {
    let known = &log.state().incarnations;
    if known.iter().any(|i| i.system_identifier == cluster.system_identifier) {
        return Ok(());
    }
    let ids: Vec<_> = known.iter().map(|i| i.system_identifier.to_string()).collect();
    Err(Error::refused(format!(
        "stanza {} is of the cluster with system identifier {}; this server's is {}",
        log.stanza().name(),
        ids.join(", "),
        cluster.system_identifier
    ))
    .remedy(super::upgrade::remedy(log.stanza().name())))
}
