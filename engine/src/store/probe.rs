//! Does the store really create only if absent? Asked, never assumed.
//!
//! A race of concurrent creates must have exactly one winner, a create in sequence must lose, and it must
//! still lose a moment later. Probe objects are deleted where the credentials allow it.

use std::time::Duration;

use bytes::Bytes;
use object_store::{PutMode, PutOptions, PutPayload};

use super::Store;
use crate::env::{self, Env};
use crate::error::{Error, Kind, Result};

/// Folder of the probe's objects.
const FOLDER: &str = "probe";
/// Writers in the race.
const RACERS: usize = 8;

/// Proves conditional create, or fails with what happened instead.
pub async fn probe(store: &Store, env: &dyn Env) -> Result<()> {
    let name = format!("{FOLDER}/{}", hex::encode(env::id(env)?));
    let outcome = race(store, &name).await;
    if store.settings().may_delete
        && let Err(error) = store.delete(std::slice::from_ref(&name)).await
    {
        tracing::debug!("the probe object {name} stays: {error}");
    }
    outcome
}

async fn race(store: &Store, name: &str) -> Result<()> {
    let racers = (0..RACERS).map(|i| raw_create(store, name, format!("racer {i}").into()));
    let mut winners = 0;
    for result in futures::future::join_all(racers).await {
        winners += usize::from(result?);
    }
    if winners != 1 {
        return Err(refusal(
            store,
            format!("{winners} of {RACERS} concurrent creates of one name succeeded"),
        ));
    }
    for wait_ms in [0, 300] {
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        if raw_create(store, name, "a late one".into()).await? {
            return Err(refusal(store, "a name that was taken could be created again".into()));
        }
    }
    match store.get(name, 64).await {
        Ok(bytes) if bytes.starts_with(b"racer") => Ok(()),
        Ok(_) => Err(refusal(store, "the winner's bytes were replaced".into())),
        Err(error) if error.kind() == Kind::NotFound => Err(refusal(store, "what was created cannot be read".into())),
        Err(error) => Err(error),
    }
}

/// One create without the certainty that [`Store::create`] adds.
async fn raw_create(store: &Store, name: &str, bytes: Bytes) -> Result<bool> {
    let (path, payload) = (store.path(name)?, PutPayload::from(bytes));
    let options = PutOptions {
        mode: PutMode::Create,
        ..store.put_options(&payload)
    };
    let uploads = store.uploads.client()?;
    match store.upload(&uploads, &path, payload, options).await {
        Ok(_) => Ok(true),
        Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Ok(false),
        Err(error @ (object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. })) => {
            Err(refusal(store, error.to_string()))
        }
        Err(error) if error.to_string().contains("501 Not Implemented") => Err(refusal(store, error.to_string())),
        Err(error) => Err(store.error("probing", name, error)),
    }
}

fn refusal(store: &Store, what: String) -> Error {
    Error::refused(format!(
        "{} does not create objects conditionally: {what}",
        store.shown()
    ))
    .remedy(
        "two writers could overwrite each other there; use another store, or set single_writer = true for this \
         repository and make sure that only one host ever writes to it",
    )
}
