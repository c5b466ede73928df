//! Leases: who is at work, for as long as its heartbeat goes on.
//!
//! A reader writes its lease and then reads the log; a collector writes its mark and then reads the leases. So
//! whichever comes second sees the other, and nothing that is being read is deleted. A lease is dead when its
//! bytes stand still for longer than a collector's patience, by the collector's own clock: clocks of hosts are
//! never compared.

use std::sync::Arc;
use std::time::Duration;

use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::{limits, names, object, proto};
use tokio::sync::Mutex;

use crate::env;
use crate::error::{Error, Kind, Result};
use crate::stanza::Stanza;

/// Time between heartbeats.
pub const BEAT: Duration = Duration::from_secs(20);
/// How long a collector waits for a heartbeat, if nothing else is said.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// The same in this process. Tests do not wait that long.
fn beat() -> Duration {
    match env::has_fault("quick hearts") {
        true => Duration::from_millis(200),
        false => BEAT,
    }
}

/// A lease of this process; its heart stops when this is dropped.
#[derive(Debug)]
pub struct Lease {
    stanza: Arc<Stanza>,
    name: String,
    says: Arc<Mutex<proto::Lease>>,
    heart: tokio::task::JoinHandle<()>,
}

/// What a lease of a session protects: nothing that is named, since the session itself is waited for.
pub const NO_BACKUP: &str = "-";

impl Lease {
    /// Takes a lease. `backup` is what will be read; empty for anything that the log names.
    pub async fn take(stanza: &Arc<Stanza>, id: [u8; 16], what: &str, backup: &str) -> Result<Self> {
        let name = names::lease(&id);
        let lease = proto::Lease {
            id: id.to_vec(),
            what: what.to_owned(),
            backup: backup.to_owned(),
            heartbeat: 0,
            host: stanza.host().to_owned(),
            since_us: stanza.env().now_us(),
        };
        let says = Arc::new(Mutex::new(lease));
        store(stanza, &name, &says).await?;
        let (beating, to, what) = (stanza.clone(), name.clone(), says.clone());
        let heart = tokio::spawn(async move {
            loop {
                tokio::time::sleep(beat()).await;
                what.lock().await.heartbeat += 1;
                if let Err(error) = store(&beating, &to, &what).await {
                    tracing::warn!("a heartbeat could not be stored: {error}");
                }
            }
        });
        Ok(Self {
            stanza: stanza.clone(),
            name,
            says,
            heart,
        })
    }

    /// From now on only this backup is read.
    pub async fn narrow(&self, backup: &str) -> Result<()> {
        {
            let mut says = self.says.lock().await;
            says.heartbeat += 1;
            backup.clone_into(&mut says.backup);
        }
        store(&self.stanza, &self.name, &self.says).await
    }

    /// A reader's lease; `None`, with a warning, where this host may not write.
    pub async fn for_reading(stanza: &Arc<Stanza>, what: &str, backup: &str) -> Option<Self> {
        let taken = match env::id(stanza.env()) {
            Ok(id) => Self::take(stanza, id, what, backup).await,
            Err(error) => Err(error),
        };
        taken
            .inspect_err(|error| {
                tracing::warn!(
                    "{what} goes on without a lease, and fails if what it reads is collected meanwhile: {error}"
                );
            })
            .ok()
    }

    /// Ends it. Where it cannot be deleted, a collector finds it dead.
    pub async fn release(self) {
        self.heart.abort();
        if !self.stanza.store().settings().may_delete {
            return;
        }
        if let Err(error) = self.stanza.store().delete(std::slice::from_ref(&self.name)).await {
            tracing::debug!("{} stays behind: {error}", self.name);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.heart.abort();
    }
}

async fn store(stanza: &Stanza, name: &str, lease: &Mutex<proto::Lease>) -> Result<()> {
    // Held until it is stored: an older state must not come after a newer one.
    let lease = lease.lock().await;
    let salt = env::salt(stanza.env())?;
    let bytes = object::seal_message(stanza.keys(), stanza.scope(), ObjectKind::Lease, salt, name, &*lease)?;
    stanza.store().replace(name, bytes.into()).await
}

/// A lease as a collector finds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Object.
    pub name: String,
    /// What it says; `None` if it cannot be read: then it may mean anything.
    pub lease: Option<proto::Lease>,
    bytes: bytes::Bytes,
}

impl Found {
    /// Whether it is of a session.
    pub fn is_of(&self, session: &[u8]) -> bool {
        self.lease.as_ref().is_some_and(|lease| lease.id == session)
    }

    /// The backup that it protects; empty for all.
    pub fn backup(&self) -> &str {
        self.lease.as_ref().map_or("", |lease| &lease.backup)
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.lease {
            None => write!(f, "{}, which cannot be read", self.name),
            Some(lease) => {
                let since = jiff::Timestamp::from_microsecond(lease.since_us).unwrap_or_default();
                write!(
                    f,
                    "{} on {} since {}",
                    lease.what,
                    lease.host,
                    since.strftime("%Y-%m-%dT%H:%M:%SZ")
                )
            }
        }
    }
}

/// All leases.
pub async fn all(stanza: &Stanza) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for (name, _) in stanza.store().list(names::LEASES).await? {
        // Released meanwhile.
        let Some(bytes) = stanza.store().get_opt(&name, limits::SLOT_BYTES).await? else {
            continue;
        };
        let opened = stanza.keys_for(&bytes, &name).and_then(|keys| {
            let scope = stanza.scope();
            Ok(object::open_message(
                keys,
                scope,
                ObjectKind::Lease,
                &bytes,
                &name,
                &name,
            )?)
        });
        let lease = match opened {
            Ok(lease) => Some(lease),
            Err(error) if error.kind() == Kind::Temporary => return Err(error),
            Err(error) => {
                tracing::warn!("a lease cannot be read, and counts for everything while it lives: {error}");
                None
            }
        };
        found.push(Found { name, lease, bytes });
    }
    Ok(found)
}

/// Those of `leases` that live: waits until each has shown a heartbeat, or for as long as `patience` lasts.
pub async fn living(stanza: &Stanza, leases: Vec<Found>, patience: Duration) -> Result<Vec<Found>> {
    let deadline = tokio::time::Instant::now() + patience;
    let (mut waiting, mut living) = (leases, Vec::new());
    while !waiting.is_empty() {
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        if left.is_zero() {
            break;
        }
        tokio::time::sleep(left.min(patience / 10).max(Duration::from_millis(10))).await;
        let now = all(stanza).await?;
        let mut still = Vec::new();
        for lease in waiting {
            match now.iter().find(|other| other.name == lease.name) {
                None => {}
                Some(same) if same.bytes == lease.bytes => still.push(lease),
                Some(moved) => living.push(moved.clone()),
            }
        }
        waiting = still;
    }
    Ok(living)
}

/// Leases of those of `sessions` that live. One that has none yet gets as much time to show it.
pub async fn of_sessions(stanza: &Stanza, sessions: &[Vec<u8>], patience: Duration) -> Result<Vec<Found>> {
    let deadline = tokio::time::Instant::now() + patience;
    let before = all(stanza).await?;
    loop {
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        let moved = all(stanza).await?.into_iter().filter(|lease| !before.contains(lease));
        let living: Vec<_> = moved.filter(|lease| sessions.iter().any(|s| lease.is_of(s))).collect();
        if left.is_zero() || living.len() >= sessions.len() {
            return Ok(living);
        }
        tokio::time::sleep(left.min(patience / 10).max(Duration::from_millis(10))).await;
    }
}

/// Deletes leases that were found dead.
pub async fn bury(stanza: &Stanza, dead: &[Found]) -> Result<()> {
    let names: Vec<String> = dead.iter().map(|lease| lease.name.clone()).collect();
    stanza
        .store()
        .delete(&names)
        .await
        .map_err(|error| Error::new(error.kind(), "dead leases could not be removed").caused_by(error))
}
